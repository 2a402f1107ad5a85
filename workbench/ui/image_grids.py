"""Figures of many images with titles."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colors
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy.typing import ArrayLike
from PIL import Image

from workbench.ui.figure import DPI, Figure, missing_glyphs_allowed

CELL, SIDE, LINE = 104, 96, 13  # pixels: cell of an image, its longer side, a line of its title
AnyImage = Image.Image | np.ndarray  # an array is (height, width, 3), uint8


def grid(
    images: Sequence[AnyImage], titles: Sequence[str] = (), *, columns: int = 8, heading: str = ""
) -> Figure:
    """Images (PIL or height x width x 3) in rows of `columns` with a title above each."""
    titles = titles or [""] * len(images)
    columns = max(1, math.ceil(7 * len(heading) / CELL), min(columns, len(images)))
    starts = range(0, max(1, len(images)), columns)
    rows = [("", images[i : i + columns], titles[i : i + columns]) for i in starts]
    return _image_sheet(rows, heading, CELL * columns)


def image_rows(
    rows: Mapping[str, tuple[Sequence[AnyImage], Sequence[str]]],
    heading: str = "",
    columns: int = 1,
) -> Figure:
    """A row of (images, titles) for every name, `columns` rows side by side."""
    margin = 12 + 7 * max(len(line) for name in rows for line in name.split("\n"))
    width = margin + CELL * max(len(images) for images, _ in rows.values())
    named = [(name, *row) for name, row in rows.items()]
    return _image_sheet(named, heading, width, margin, columns)


def _image_sheet(
    rows: Sequence[tuple[str, Sequence[AnyImage], Sequence[str]]],
    heading: str,
    row_width: int,
    margin: int = 0,
    columns: int = 1,
) -> Figure:
    """Rows of (name, images, titles) drawn as one image: one Axes per image would be slow."""
    lines = max((t.count("\n") + 1 for *_, titles in rows for t in titles if t), default=0)
    heading_height, title_height = 25 if heading else 0, 4 + LINE * lines
    row_height = title_height + SIDE + 4
    height = heading_height + row_height * -(-len(rows) // columns)
    width = max(columns * row_width, 7 * len(heading))
    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = Figure(width / DPI, height / DPI, layout=None)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()

    def write(x: float, y: float, text: str, size: float, ha: str, va: str) -> None:
        ax.text(x, y, text.replace("$", r"\$"), fontsize=size, ha=ha, va=va)

    if heading:
        write(width / 2, 5, heading, 10, "center", "top")
    for i, (name, images, titles) in enumerate(rows):
        left = row_width * (i % columns) + margin
        top = heading_height + row_height * (i // columns) + title_height
        if name:
            write(left - 6, top + SIDE / 2, name, 9, "right", "center")
        for k, (image, title) in enumerate(zip(images, titles, strict=True)):
            pixels = _thumbnail(image)
            x = left + CELL * k + (CELL - pixels.shape[1]) // 2
            canvas[top : top + pixels.shape[0], x : x + pixels.shape[1]] = pixels
            write(x + pixels.shape[1] / 2, top - 3, *_fit_title(title), "center", "bottom")
    extent = (0, width, height, 0)
    ax.imshow(canvas, extent=extent, aspect="auto", interpolation="nearest")
    return figure


def _thumbnail(image: AnyImage) -> np.ndarray:
    """An image with a longer side of SIDE pixels, uint8 (h, w, 3)."""
    image = Image.fromarray(np.asarray(image)).convert("RGB")
    scale = SIDE / max(image.size)
    size = [max(1, round(scale * side)) for side in image.size]
    filter = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    return np.asarray(image.resize(size, filter))


@functools.lru_cache(4096)
def _fit_title(title: str) -> tuple[str, float]:
    """A title and its size in points, 8 to 5, so that it fits a cell; a longer one is shortened."""
    lines, font, room = title.split("\n"), FontProperties(size=8), CELL - 10
    with missing_glyphs_allowed():
        widths = [text_to_path.get_text_width_height_descent(t, font, False)[0] for t in lines]
    points = 8 * room / max(room, max(widths) * DPI / 72)
    if points < 5:
        half = max(4, int(max(map(len, lines)) * points / 10) - 1)
        cut = lambda line: line if len(line) <= 2 * half + 3 else f"{line[:half]}...{line[-half:]}"
        lines, points = list(map(cut, lines)), 5.0
    return "\n".join(lines), points


def label_text(target: ArrayLike, classes: Sequence[str], most: int | None = None) -> str:
    """A class number as its name, a soft label as its shares: "0.62 cat", one per line.

    Only the `most` largest shares, and none that would read 0.00.
    """
    if np.ndim(target) == 0:
        return classes[int(target)]
    shares = np.asarray(target)
    if shares.max() >= 0.9995:
        return classes[int(shares.argmax())]
    digits = 2 if 0.1 <= shares.max() < 0.995 else 3
    mixed = [i for i in np.argsort(-shares)[:most] if shares[i] >= 0.5 * 0.1**digits]
    return "\n".join(f"{shares[i]:.{digits}f} {classes[i]}" for i in mixed)


def tinted(image: AnyImage, weight: np.ndarray) -> np.ndarray:
    """An image tinted blue where `weight` (h, w) is 0, orange where it is 1: uint8 (h, w, 3)."""
    grey = Image.fromarray(np.asarray(image)).convert("L")
    light = np.asarray(grey, np.float32)[..., None] / 255
    weight = np.asarray(weight, np.float32)[..., None]
    dark, bright = (
        (1 - weight) * np.array(colors.to_rgb(cold)) + weight * np.array(colors.to_rgb(warm))
        for cold, warm in (("#0d1a4d", "#803300"), ("#cce6ff", "#ffe673"))
    )
    return (255 * (dark + (bright - dark) * light)).round().astype(np.uint8)
