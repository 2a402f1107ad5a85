"""Figures that a notebook displays at half their size in pixels: sharp on any screen."""

import base64
import contextlib
import functools
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import simplejpeg
from matplotlib import style
from matplotlib.figure import Figure as MatplotlibFigure
from PIL import Image, ImageFont

DPI, SCALE = 90, 2  # CSS pixels of an inch; pixels of a CSS pixel
POINTS = 8  # of all text; titles have one more
STYLE = {
    "font.size": POINTS, "axes.titlesize": POINTS + 1, "axes.labelsize": POINTS,
    "xtick.labelsize": POINTS, "ytick.labelsize": POINTS, "legend.fontsize": POINTS,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.alpha": 0.3, "lines.linewidth": 1.4,
}  # fmt: skip


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """The style of all charts, whatever rcParams a notebook has set; also a decorator."""
    with style.context(["default", STYLE]):
        yield


class Figure:
    """What a notebook displays as an image, on white in dark themes too."""

    format = "png"  # of what a notebook displays

    def png(self) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self.write(buffer, fast=True)
        return buffer.getvalue()

    def file(self) -> bytes:
        """What a notebook displays: a file of `format`."""
        return self.png()

    def write(self, file: str | Path | io.BytesIO, *, fast: bool = False) -> None:
        """Writes the figure to a file, in the format of its suffix; `fast` compresses less."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
        file, kind = self.file(), f"image/{self.format}"
        return {kind: base64.b64encode(file).decode()}, {kind: {"width": css_width(file)}}


class Chart(Figure, MatplotlibFigure):
    """A figure that matplotlib draws; width and height in inches."""

    def __init__(self, width: float = 9, height: float = 3.2, layout: str | None = "constrained"):
        size = [(round(DPI * side) + 0.001) / DPI for side in (width, height)]  # whole CSS pixels
        super().__init__(size, DPI * SCALE, layout=layout, facecolor="white")

    def write(self, file: str | Path | io.BytesIO, *, fast: bool = False) -> None:
        """Writes the figure to a .png, .svg or .pdf file; `fast` compresses a PNG less."""
        options: dict[str, Any] = {"pil_kwargs": {"compress_level": 1}} if fast else {}
        with styled(), warnings.catch_warnings():  # a box replaces a glyph that the font lacks
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            self.savefig(file, **options)


class Sheet(Figure):
    """A figure of pixels, SCALE for each CSS pixel.

    `texts` are heading and names of rows as they are shown; `cells` are titles and boxes (left,
    top, right, bottom; pixels) of its images. With `photographs` it is displayed as a JPEG of high
    quality: a PNG is twice as large, and takes five times as long to write.
    """

    def __init__(
        self,
        image: Image.Image,
        texts: Sequence[str] = (),
        cells: Sequence[tuple[str, tuple[int, int, int, int]]] = (),
        photographs: bool = False,
    ):
        self.image, self.texts, self.cells = image, list(texts), list(cells)
        self.format = "jpeg" if photographs else "png"

    def file(self) -> bytes:
        """The sheet as a JPEG or PNG file."""
        if self.format == "png":
            return self.png()
        pixels = np.asarray(self.image)  # the defaults of OpenCV and Pillow would blur colours
        return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444", fastdct=False)

    def write(self, file: str | Path | io.BytesIO, *, fast: bool = False) -> None:
        """Writes the figure to a file that Pillow knows; `fast` compresses a PNG less."""
        kind = "png" if isinstance(file, io.BytesIO) else None
        dpi = (DPI * SCALE, DPI * SCALE)
        self.image.save(file, kind, dpi=dpi, compress_level=1 if fast else 6)


def css_width(file: bytes) -> int:
    """The width in CSS pixels at which a Figure's file is neither blurred nor stretched."""
    return Image.open(io.BytesIO(file)).width // SCALE if file else 0


@functools.cache
def font(points: float = POINTS) -> ImageFont.FreeTypeFont:
    """matplotlib's default font at a size in points, for Pillow."""
    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    size = points * DPI * SCALE / 72
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def text_width(text: str, points: float = POINTS) -> float:
    """The width of the longest line in CSS pixels."""
    return max(font(points).getlength(line) for line in text.split("\n")) / SCALE


def shortened(text: str, width: float) -> str:
    """A line that fits `width` CSS pixels: its start and end if it is longer."""
    if text_width(text) <= width:
        return text
    half = int(len(text) * width / text_width(text) / 2)
    while half > 2 and text_width(f"{text[:half]}...{text[-half:]}") > width:
        half -= 1
    return f"{text[:half]}...{text[-half:]}"
