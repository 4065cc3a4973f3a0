"""The batches of a run in order, read ahead by a thread, and the opening of its datasets."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from megapoly.config import Config, Data
from megapoly.data import _index
from megapoly.data.indexed import IndexedDataset
from megapoly.data.plan import Plan
from megapoly.data.samples import Batch, check_pack, read
from megapoly.data.tokenizer import Tokenizer, check_matches
from megapoly.errors import DataError

DEPTH = 2


class Loader:
    """Iterates over optimizer steps: each gives the micro-batches (``list[Batch]``) of one data-parallel rank.

    The global batch of a step is the next ``config.batches.size_at(sample)`` samples. Data-parallel rank r of n has its
    r-th part of n, in a row, cut into micro-batches of ``layout.micro_batch`` samples: the union over the ranks is the
    global batch in order, under every layout. It ends where less than a global batch is left of the plan. A thread
    reads two steps ahead; an error in it is raised here. A step that is waited for longer than ``data.slow_seconds``
    says so, with the source that is being read; ``data.timeout_seconds`` of waiting are an error. Use it as a context
    manager, or call :meth:`close`. Token ids, labels and positions are int32.

    Args:
        config: settled for its ranks by ``config.on(world_size)``.
        start: first sample, the number of samples trained so far.
        rank: position on the dp axis.
        with_tokens: False on pipeline stages that need only positions and documents.
        say: is given the line about a slow disk.
        pin: batches lie in page-locked memory, from which a GPU copies by itself.

    Raises:
        DataError: a plan or packs of another sequence length; in the iteration, what :func:`read` raises, or a read
            that took too long, by its sample numbers and its source.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        datasets: Mapping[str, IndexedDataset],
        *,
        start: int,
        rank: int,
        with_tokens: bool = True,
        say: Callable[[str], None] = lambda text: None,
        pin: bool = False,
    ) -> None:
        if plan.sequence != config.train.sequence:
            raise DataError(
                f"train.sequence is {config.train.sequence}, but the plan of this run has windows of {plan.sequence}"
                f" tokens; set it to {plan.sequence}, or start a new run"
            )
        for source in plan.sources:
            check_pack(source.name, datasets[source.name], plan.sequence, config.data.separate_documents)
        dp, micro_batch, batches, total = config.mesh.dp, config.layout.micro_batch, config.batches, plan.total_samples
        vocabulary, separate = config.model.vocabulary, config.data.separate_documents
        all_learned = config.data.loss == "all"

        progress = _index.Progress()

        def read_step(sample: int, size: int) -> list[Batch]:
            part = size // dp
            samples = sample + rank * part + np.arange(part, dtype=np.int64)
            batch = read(
                plan, datasets, samples, vocabulary=vocabulary, separate_documents=separate, with_tokens=with_tokens,
                all_learned=all_learned, ids=torch.int32, progress=progress,
            )  # fmt: skip
            return (batch.pinned() if pin else batch).split(micro_batch)

        def steps() -> Iterator[tuple[int, int]]:
            """First sample and number of samples of every step."""
            sample = start
            while sample + (size := batches.size_at(sample)) <= total:
                yield sample, size
                sample += size

        self._steps, self._say, self._progress = steps(), say, progress
        self._slow, self._timeout = config.data.slow_seconds, config.data.timeout_seconds
        self._names = [f"{source.name!r} ({datasets[source.name].prefix})" for source in plan.sources]
        self._ready: queue.Queue[Any] = queue.Queue(DEPTH)
        self._failure: BaseException | None = None
        stop = threading.Event()
        thread = threading.Thread(
            target=_fill, args=(self._ready, stop, steps(), read_step), name="megapoly-loader", daemon=True
        )
        # Also runs at interpreter exit, where a thread inside torch or numpy must not outlive them. The thread holds no
        # reference to this object, so that a forgotten loader is collected and ends its thread.
        self._end = weakref.finalize(self, _finish, self._ready, stop, thread)
        thread.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._failure is not None:
            raise self._failure
        step = next(self._steps, None) if self._end.alive else None
        if step is None:
            self.close()
            raise StopIteration
        sample, size = step
        result = self._take(f"samples {sample} to {sample + size - 1}")
        if isinstance(result, BaseException):
            self._failure = result
            raise result
        return list(result)

    def _take(self, what: str) -> Any:
        """What the thread has read or met; an error where it takes too long. Says when it is slow, ever more rarely."""
        began, before = time.monotonic(), self._progress.bytes
        waited = min(self._slow, self._timeout)
        while True:
            try:
                return self._ready.get(timeout=max(0.0, began + waited - time.monotonic()))
            except queue.Empty:
                source, rate = self._progress.source, (self._progress.bytes - before) / waited / 1e6
                where = f"at {rate:.2f} MB/s, source {self._names[source]}" if source >= 0 else "nothing was read yet"
            if waited == self._timeout:
                return DataError(
                    f"{what} were not read within {waited:g} s ({where}); check that the storage of the datasets"
                    f" answers, then resume"
                )
            self._say(f"slow data: {waited:g} s of waiting for {what} ({where})")
            waited = min(2 * waited, self._timeout)

    def close(self) -> None:
        """End the thread and drop what it has read. The iteration is over; closing again does nothing."""
        self._end()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fill(
    ready: queue.Queue[Any],
    stop: threading.Event,
    steps: Iterator[tuple[int, int]],
    read_step: Callable[[int, int], list[Batch]],
) -> None:
    """Thread: put every step, or the error that ended the reading. A put waits until the consumer has taken one."""
    for sample, size in steps:
        if stop.is_set():
            return
        try:
            ready.put(read_step(sample, size))
        except BaseException as error:
            ready.put(error)
            return


def _finish(ready: queue.Queue[Any], stop: threading.Event, thread: threading.Thread) -> None:
    """Ask the thread to end, make room for a put that waits, and wait; not for ever, since a read may hang."""
    stop.set()
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():  # the garbage collector may run this there
        thread.join(timeout=5.0)


def open_datasets(data: Data, tokenizer: Tokenizer) -> dict[str, IndexedDataset]:
    """The dataset of every source, by its name.

    Raises:
        DataError: a missing or damaged file, one of another tokenizer or language, or one with nothing to
            train on.
    """
    datasets = {}
    for name, source in data.sources.items():
        dataset = IndexedDataset(source.path)
        check_matches(tokenizer, dataset)
        if dataset.train_tokens == 0:
            raise DataError(
                f"source {name!r} ({source.path}): found {dataset.documents} documents and no training tokens; add text"
                f" in {source.language!r}, lower the held-out fraction, or remove the source"
            )
        if dataset.sidecar is not None and dataset.sidecar.language != source.language:
            raise DataError(
                f"source {name!r} has language {source.language!r}, but {source.path} was built as"
                f" {dataset.sidecar.language!r}; correct data.sources.{name}.path or .language"
            )
        datasets[name] = dataset
    return datasets
