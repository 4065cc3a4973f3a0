"""Files that may be compressed, read as one stream of bytes in constant memory. No torch."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapoly.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = (".gz", ".zst")
#: What reading a damaged stream raises.
ERRORS = (OSError, EOFError, zlib.error)

_STEP = 8 << 10  # compressed bytes at a time: at the format's extreme they become 256 MiB
_LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` asks for, as large dumps do


def open_stream(raw: io.FileIO, suffix: str) -> io.BufferedReader:
    """The decompressed bytes of ``raw``. Reading raises one of :data:`ERRORS` where they are damaged or end early.

    Raises:
        ConfigError: zstandard, which reads .zst, is not installed.
    """
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    if suffix == ".zst":
        return io.BufferedReader(_Zstandard(raw), 1 << 20)
    return io.BufferedReader(raw, 1 << 20)


def compression(path: Path) -> str:
    """The suffix of compression that a file's name ends with, or nothing."""
    return path.suffix if path.suffix in SUFFIXES else ""


class _Zstandard(io.RawIOBase):
    """Frames of Zstandard. The library's own stream takes a file that was cut short for a whole one."""

    def __init__(self, raw: io.FileIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError("reading .zst needs zstandard: pip install 'megapoly[data]'") from error
        self._raw = raw
        self._error = zstandard.ZstdError
        self._open = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._output:
            if not self._advance():
                return 0
        count = min(len(target), len(self._output))
        target[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _advance(self) -> bool:
        """Decompress a little more; whether there was any."""
        data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        data = data or self._raw.read(_STEP)
        if not data:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("the file ends within a frame")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = self._open()
        try:
            self._output = memoryview(self._frame.decompress(data))
        except self._error as error:
            raise OSError(str(error)) from error
        return True
