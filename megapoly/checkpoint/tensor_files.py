"""The files of weights in a Hugging Face folder, whose tensors are views of maps: safetensors, or torch's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapoly.checkpoint.accounting import some
from megapoly.checkpoint.files import CODES
from megapoly.checkpoint.pickled import Record, StoredTensor
from megapoly.checkpoint.torch_files import TorchFile
from megapoly.errors import CheckpointError
from megapoly.spec import Index

SAFETENSORS, PYTORCH = "model.safetensors", "pytorch_model.bin"
INDEX = ".index.json"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {code: dtype for dtype, code in CODES.items()}


def check_dtype(path: Path, name: str, dtype: torch.dtype) -> None:
    """Refuse what is no float that a model is trained in.

    Raises:
        CheckpointError: the dtype is another.
    """
    if dtype not in _FLOATS:
        raise CheckpointError(
            f"{path}: tensor {name} is {dtype}, expected floats: quantised weights cannot be converted; take the"
            " model's full ones"
        )


class TensorFiles:
    """All tensors of a folder by name; opening reads headers.

    Attributes:
        files: that hold them.
        tensors: shape and dtype by name.

    Raises:
        CheckpointError: there are none, one is missing or damaged, or two hold the same tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.files = _files(folder)
        self._open: dict[Path, _Safetensors | _Pickled] = {}
        self._at: dict[str, Path] = {}
        self.tensors: dict[str, tuple[Index, torch.dtype]] = {}
        for path in self.files:
            for name, found in _headers(path).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} is in {self._at[name].name} too; remove the file that does not belong"
                        " to these weights"
                    )
                self.tensors[name], self._at[name] = found, path

    def get(self, name: str) -> Tensor:
        """A tensor whose bytes are read when they are touched."""
        path = self._at[name]
        if path not in self._open:
            self._open[path] = _guarded(path, lambda: _opened(path))
        tensor: Tensor = _guarded(path, lambda: self._open[path][name])
        return tensor

    def release(self) -> None:
        """Give back the maps, once no tensor is held, and with them the memory that their pages take."""
        for path, opened in list(self._open.items()):
            if isinstance(opened, _Pickled):
                opened.release()  # which remembers what it has checked
            else:
                del self._open[path]


class _Safetensors(Mapping[str, Any]):
    """``safe_open`` as a mapping."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Any:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())

    def headers(self) -> dict[str, tuple[Index, torch.dtype]]:
        slices = {name: self._file.get_slice(name) for name in self}
        return {name: (tuple(each.get_shape()), _dtype(name, each.get_dtype())) for name, each in slices.items()}


def _dtype(name: str, code: str) -> torch.dtype:
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise ValueError(f"tensor {name!r} has dtype {code}, which is not one of {', '.join(_DTYPES)}")
    return dtype


class _Pickled(Mapping[str, Any]):
    """A file of ``torch.save``, of either format, as a mapping; see :mod:`megapoly.checkpoint.torch_files`."""

    def __init__(self, path: Path) -> None:
        self._file = TorchFile(path)
        value = self._file.value
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: holds no tensors by name; take a file that transformers has saved")
        for name, each in value.items():
            if not isinstance(each, StoredTensor) or not isinstance(name, str):
                found = each.name if isinstance(each, Record) else type(each).__name__
                raise CheckpointError(
                    f"{path}: holds {name!r}, which is of {found}, expected tensors by name only; such a file can do"
                    " harm where it is trusted: take the weights from another source, as safetensors"
                )
        self._tensors: dict[str, StoredTensor] = value

    def __getitem__(self, name: str) -> Tensor:
        return self._file.view(self._tensors[name])

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def release(self) -> None:
        self._file.release()

    def headers(self) -> dict[str, tuple[Index, torch.dtype]]:
        return {name: (tuple(each.shape), each.dtype) for name, each in self._tensors.items()}


def _opened(path: Path) -> _Safetensors | _Pickled:
    return _Safetensors(path) if path.suffix == ".safetensors" else _Pickled(path)


def _headers(path: Path) -> dict[str, tuple[Index, torch.dtype]]:
    return _guarded(path, lambda: _opened(path).headers())


def _guarded(path: Path, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{path}: cannot be read as a file of weights ({reason}); it may be cut short: compare its size with the"
            " source's, and copy it again"
        ) from error


def _files(folder: Path) -> list[Path]:
    for name in (SAFETENSORS, PYTORCH):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}{INDEX}"
        if index.exists():
            return _shards(index)
    raise CheckpointError(
        f"{folder}: has no weights: none of {SAFETENSORS}, {SAFETENSORS}{INDEX}, {PYTORCH}, {PYTORCH}{INDEX}; copy them"
        " into it"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: is no index of weights ({error!r}); copy it again from its source") from error
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(paths)} files are missing: {some(missing)}; copy them"
        )
    return paths
