"""A matplotlib figure for notebooks and files."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure as MatplotlibFigure

DPI = 90  # of a figure saved as pixels


class Figure(MatplotlibFigure):
    """A matplotlib figure that a notebook displays, on white in dark themes too."""

    def __init__(self, width: float = 9, height: float = 3.2, layout: str | None = "constrained"):
        super().__init__(figsize=(width, height), layout=layout, facecolor="white")

    def png(self) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self._save(buffer, "png")
        return buffer.getvalue()

    def write(self, path: str | Path) -> None:
        """Writes the figure to a .png, .svg or .pdf file."""
        self._save(path, Path(path).suffix[1:])

    def _save(self, target: str | Path | io.BytesIO, kind: str) -> None:
        with missing_glyphs_allowed():
            fast = {"pil_kwargs": {"compress_level": 1}} if kind == "png" else {}
            self.savefig(target, format=kind, dpi=DPI, **fast)

    def _repr_png_(self) -> bytes:
        return self.png()


@contextlib.contextmanager
def missing_glyphs_allowed() -> Iterator[None]:
    """Without matplotlib's warning; a box replaces a glyph that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield
