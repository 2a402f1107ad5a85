"""A matplotlib figure for notebooks and files."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as MatplotlibFigure

DPI = 90  # of a figure saved as pixels


class Figure(MatplotlibFigure):
    """A matplotlib figure that a notebook displays, on white in dark themes too."""

    def __init__(self, width: float = 9, height: float = 3.2, layout: str | None = "constrained"):
        super().__init__(figsize=(width, height), layout=layout, facecolor="white")

    def png(self) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self.write(buffer, pil_kwargs={"compress_level": 1})  # fast
        return buffer.getvalue()

    def write(self, file: str | Path | io.BytesIO, **options: Any) -> None:
        """Writes the figure to a .png, .svg or .pdf file."""
        with missing_glyphs_allowed():
            self.savefig(file, dpi=DPI, **options)

    def _repr_png_(self) -> bytes:
        return self.png()


@contextlib.contextmanager
def missing_glyphs_allowed() -> Iterator[None]:
    """Without matplotlib's warning; a box replaces a glyph that the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield
