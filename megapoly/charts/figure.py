"""matplotlib's figures, written whole and the same every time. No torch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from megapoly.data.files import write_whole
from megapoly.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".svg", ".png", ".pdf")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'megapoly[data]', or leave it out") from error
    rcParams["svg.hashsalt"] = "megapoly"  # else every drawing has other names inside
    return Figure(figsize=(width, height), layout="constrained")


def palette(count: int) -> list[tuple[float, ...]]:
    """So many colours, of which 40 differ."""
    from matplotlib import colormaps

    different = [color for name in ("tab20", "tab20b") for color in colormaps[name].colors]  # type: ignore[attr-defined]
    return [different[i % len(different)] for i in range(count)]


def check_picture(path: Path) -> None:
    """Refuse a file that no picture can be written to, before the work for it begins.

    Raises:
        ConfigError: a suffix that is not .svg, .png or .pdf.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"--picture {path}: a picture is one of {', '.join(_SUFFIXES)}; give it a name that ends so")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture, in the format of its suffix.

    Raises:
        ConfigError: as :func:`check_picture`.
        DataError: the file cannot be written.
    """
    check_picture(path)
    data = io.BytesIO()
    metadata = {".svg": {"Date": None}, ".png": {"Software": None}, ".pdf": {"CreationDate": None}}[path.suffix]
    figure.savefig(data, format=path.suffix[1:], dpi=150, metadata=metadata)
    write_whole(path, data.getvalue())
