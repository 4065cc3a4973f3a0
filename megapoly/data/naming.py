"""The three files of a new dataset: written under temporary names, and named when all are whole. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megapoly.data.files import partial, sync_folder, temporaries, write_synced
from megapoly.data.indexed import part
from megapoly.data.sidecar import Sidecar
from megapoly.errors import DataError

_SUFFIXES = (".bin", ".json", ".idx")  # in the order in which they get their names


class NewDataset:
    """PREFIX.bin, .idx and .json while they are written; what :func:`new_dataset` gives.

    Attributes:
        prefix: of the dataset.
        bin, idx: the temporary names to write to; what is written there has to be on the disk before :meth:`name`.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.finals = {suffix: part(prefix, suffix) for suffix in _SUFFIXES}
        self.bin, self.idx = str(partial(self.finals[".bin"])), str(partial(self.finals[".idx"]))

    def name(self, sidecar: Sidecar | None) -> None:
        """Give the files their names, in place of those of an older dataset; without a sidecar there is no .json."""
        finals = self.finals
        if sidecar is not None:
            write_synced(partial(finals[".json"]), sidecar.text().encode())
        # From here to the end there is no .idx under the final name, so what is interrupted cannot be opened.
        finals[".idx"].unlink(missing_ok=True)
        for suffix, path in finals.items():
            if suffix == ".json" and sidecar is None:
                path.unlink(missing_ok=True)
            else:
                os.replace(partial(path), path)
        sync_folder(self.prefix.parent)


@contextmanager
def new_dataset(prefix: Path, *, overwrite: bool) -> Iterator[NewDataset]:
    """Whatever happens inside, what is not named by :meth:`NewDataset.name` is removed at the end.

    After a kill, files with temporary names are left, which the next run replaces; where it came between the renames,
    some have their names without an .idx, and are replaced too.

    Raises:
        DataError: files of a dataset at ``prefix`` exist and ``overwrite`` is not set, or the disk refuses.
    """
    new = NewDataset(prefix)
    present = [str(path) for path in new.finals.values() if path.exists()]
    try:
        interrupted = not new.finals[".idx"].exists() and partial(new.finals[".idx"]).exists()
        if present and not overwrite and not interrupted:
            raise DataError(f"{', '.join(present)}: exists already; choose another name or overwrite it")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with temporaries(*new.finals.values()):
            yield new
    except OSError as error:
        raise DataError(f"{prefix}: cannot be written ({error})") from error
