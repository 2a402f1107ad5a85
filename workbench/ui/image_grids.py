"""Figures of many images with titles."""

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from matplotlib import colors
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from workbench.ui.figure import POINTS, SCALE, Sheet, font, shortened, text_width

# CSS pixels: cell of an image, space between images, the image's longer side, a line of text
CELL, GAP, LINE = 104, 8, 12
WIDTH, NARROW = 8 * CELL, 6 * CELL  # fits a notebook beside the side panel; beside controls
LEAST = 72  # of a cell, so that rows fit side by side
AnyImage = Image.Image | np.ndarray  # an array is (height, width, 3), uint8
Cell = tuple[AnyImage, str]  # an image and its title


def grid(
    images: Sequence[AnyImage],
    titles: Sequence[str] = (),
    *,
    columns: int = 8,
    heading: str = "",
    original: Cell | None = None,
    most_lines: int = 9,
) -> Sheet:
    """Images (PIL or height x width x 3) in rows of `columns` with a title above each.

    Rows end at WIDTH; a long title is wrapped, if that is not enough shortened, and ends after
    `most_lines`. `original` has the upper left corner, twice as large.
    """
    columns = max(3 if original else 1, min(columns, len(images), WIDTH // CELL))
    places = [(x, y) for y in range(len(images) + 2) for x in range(columns)]
    places = [(x, y) for x, y in places if not original or x > 1 or y > 1]
    placed = [
        (CELL * x, y, image, title)
        for (x, y), image, title in zip(places, images, titles or [""] * len(images), strict=False)
    ]
    return _image_sheet(placed, heading, CELL * columns, original=original, most_lines=most_lines)


def image_rows(
    rows: Mapping[str, tuple[Sequence[AnyImage], Sequence[str]]],
    heading: str = "",
    columns: int = 1,
    width: int = WIDTH,
) -> Sheet:
    """A row of (images, titles) for every name, up to `columns` rows side by side in `width`."""
    margin = 12 + math.ceil(max(map(text_width, rows)))
    most = max(len(images) for images, _ in rows.values())
    cells = {n: min(CELL, (width // n - margin) // most) for n in range(columns, 0, -1)}
    columns = next((n for n, cell in cells.items() if cell >= LEAST), 1)
    cell = cells[columns]
    left = lambda i: (margin + cell * most) * (i % columns) + margin
    placed = [
        (left(i) + cell * k, i // columns, image, title)
        for i, row in enumerate(rows.values())
        for k, (image, title) in enumerate(zip(*row, strict=True))
    ]
    names = [(left(i) - 6, i // columns, name) for i, name in enumerate(rows)]
    return _image_sheet(placed, heading, (margin + cell * most) * columns, cell, names)


def _image_sheet(
    placed: Sequence[tuple[int, int, AnyImage, str]],
    heading: str,
    width: int,
    cell: int = CELL,
    names: Sequence[tuple[int, int, str]] = (),
    original: Cell | None = None,
    most_lines: int = 9,
) -> Sheet:
    """Images (left, row, image, title) and names (right, row, name) drawn with Pillow.

    matplotlib takes ten times as long.
    """
    side, texts, cells, photographs = cell - GAP, [], [], False
    placed = [(x, y, image, _fit_title(title, side, most_lines)) for x, y, image, title in placed]
    width = max(width, min(WIDTH, math.ceil(text_width(heading, POINTS + 1)) + 10))
    heading = _fit_heading(heading, width - 8)
    lines = max((title.count("\n") + 1 for *_, title in placed if title), default=0)
    above = 12 + LINE * (heading.count("\n") + 1) if heading else 0
    height = 8 + LINE * lines + side  # of a row
    rows = 1 + max([y for _, y, *_ in placed] + [1 if original else 0])
    canvas = Image.new("RGB", (SCALE * width, SCALE * (above + height * rows)), "white")
    draw = ImageDraw.Draw(canvas)

    def write(x: float, y: float, text: str, anchor: str, points: int = POINTS) -> None:
        at, type = (SCALE * x, SCALE * y), font(points)
        spacing = SCALE * LINE - type.getbbox("A")[3]
        draw.multiline_text(at, text, "black", type, anchor, spacing, "center")

    def place(x: int, top: int, room: tuple[int, int], image: AnyImage, title: str) -> None:
        nonlocal photographs
        pixels, scale = _fitted(image, SCALE * room[0], SCALE * room[1])
        photographs |= scale < 4
        left, top = SCALE * x + SCALE * room[0] // 2 - pixels.width // 2, SCALE * top
        canvas.paste(pixels, (left, top))
        cells.append((title, (left, top, left + pixels.width, top + pixels.height)))
        if title:
            write(x + room[0] / 2, top / SCALE - 3, title, "md")

    if heading:
        write(width / 2, 5, heading, "ma", POINTS + 1)
        texts.append(heading)
    for x, y, name in names:
        write(x, above + height * (y + 1) - 4 - side / 2, name, "rm")
        texts.append(name)
    if original:
        room = 2 * cell - GAP, 2 * height - 8 - LINE
        place(GAP // 2, above + 4 + LINE, room, *original)
    for x, y, image, title in placed:
        place(x + GAP // 2, above + height * (y + 1) - 4 - side, (side, side), image, title)
    return Sheet(canvas, texts, cells, photographs)


def _fitted(image: AnyImage, width: int, height: int) -> tuple[Image.Image, float]:
    """An image as large as fits into a box of pixels, and its scale: whole numbers from 2 on."""
    pixels = np.asarray(Image.fromarray(np.asarray(image)).convert("RGB"))
    scale = min(width / pixels.shape[1], height / pixels.shape[0])
    scale = scale if scale < 2 else int(scale)
    size = [max(1, round(scale * side)) for side in pixels.shape[1::-1]]
    filter = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR if scale < 2 else cv2.INTER_NEAREST
    return Image.fromarray(cv2.resize(pixels, size, interpolation=filter)), scale


def _fit_heading(heading: str, width: int) -> str:
    """A heading in lines that fit a width."""
    fill = lambda characters: textwrap.fill(heading, characters)
    fits = lambda text: text_width(text, POINTS + 1) <= width
    return next(filter(fits, map(fill, range(len(heading), 8, -1))), heading)


@functools.lru_cache(4096)
def _fit_title(title: str, width: int, most_lines: int) -> str:
    """A title that fits a width: each line on two at most, its words shortened where needed."""
    fitted = []
    for line in title.replace(" px", "\N{NO-BREAK SPACE}px").split("\n"):
        first, *rest = line.split(" ")
        while rest and text_width(f"{first} {rest[0]}") <= width:
            first = f"{first} {rest.pop(0)}"
        parts = [first, " ".join(rest)] if rest else [first]
        fitted += [shortened(part, width) for part in parts]
    if len(fitted) > most_lines:
        fitted[most_lines - 1 :] = [shortened(f"{fitted[most_lines - 1]} …", width)]
    return "\n".join(fitted)


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
