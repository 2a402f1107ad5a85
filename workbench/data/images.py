"""Decoding: any image file as upright RGB, or one error that names what is wrong with it.

    image = images.open(path)                               # width and height, from the header
    pixels = image.resized(box, (224, 224), "bilinear")     # decodes no rows below the box

Pixels are uint8 (height, width, 3), a box is left, top, right, bottom in pixels of the upright
image, a size is width and height.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from PIL import Image
from torch.nn import functional as F

from workbench import image_files, shard_store

cv2.setNumThreads(0)  # there is a worker per core, and OpenCV's threads do not survive a fork
warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata

ImageError = image_files.ImageError
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .tif .tiff .webp .ppm .pgm .pbm .avif".split()
)
SMOOTH = ("bilinear", "bicubic", "hamming", "lanczos")  # filters that average
# Pixels of the smaller image that a filter reads beyond the edge of a box
FILTER_SUPPORT = {"nearest": 0, "box": 0.5, "bilinear": 1, "hamming": 1, "bicubic": 2, "lanczos": 3}
Box = tuple[float, float, float, float]


def decode(path: str | Path, content: bytes | None = None) -> Image.Image:
    """The image as an upright 8-bit RGB image.

    EXIF orientation is applied, transparency becomes white, 16-bit greys are scaled (not clipped),
    CMYK and palettes are converted, animations give their first frame. Raises ImageError.
    """
    return Image.fromarray(open(path, content).pixels())


def open(path: str | Path, content: bytes | None = None) -> "Pixels | Jpeg":
    """The image of `decode`; a JPEG is decoded at the first use of its pixels.

    `content` has the bytes at the path, if they were read. Raises ImageError, as do the methods
    that decode, and StoreError for a shard, which says nothing about the image.
    """
    content = next(shard_store.read([str(path)])) if content is None else content
    return image_files.with_reason(path, lambda: _open(path, content))


def open_all(paths: Sequence[str | Path]) -> Iterator["Pixels | Jpeg"]:
    """`open` of each path, with one request to a store. Raises ImageError, StoreError."""
    return map(open, paths, shard_store.read(map(str, paths)))


def image(image: "AnyImage") -> "Pixels | Jpeg":
    """Pixels of an RGB image of Pillow's or an array (h, w, 3); others are returned unchanged."""
    return image if isinstance(image, Pixels | Jpeg) else Pixels(np.asarray(image))


class Pixels:
    """An image in memory: uint8 (height, width, 3)."""

    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def pixels(self) -> np.ndarray:
        """All of it; read-only."""
        return self._pixels

    def resized(
        self, box: Box, size: tuple[int, int], interpolation: str, exact: bool = False
    ) -> np.ndarray:
        """`resize` of these pixels."""
        return resize(self._pixels, box, size, interpolation, exact)

    def downscaled(self, size: tuple[int, int], interpolation: str) -> np.ndarray:
        """All of it at a smaller size (width, height)."""
        return self.resized((0, 0, self.width, self.height), size, interpolation)


class Jpeg:
    """A JPEG file in memory; the pixels are those of Pillow, to the bit."""

    def __init__(self, raw: bytes, width: int, height: int, frame: int, orientation: int):
        self._raw, self._frame, self._orientation = raw, frame, orientation
        self._stored = height, width
        self.width, self.height = (height, width) if orientation > 4 else (width, height)

    def pixels(self) -> np.ndarray:
        """All of it, uint8 (height, width, 3). Raises ImageError."""
        return self._decoded(self._stored[0])[0]

    def resized(
        self, box: Box, size: tuple[int, int], interpolation: str, exact: bool = False
    ) -> np.ndarray:
        """`resize` of the pixels; those below the box are not decoded. Raises ImageError."""
        bottom = self._stored[0]
        if self._orientation == 1:
            scale = max(1, (box[3] - box[1]) / size[1])
            bottom = math.ceil(box[3] + (FILTER_SUPPORT[interpolation] * scale if exact else 0))
        pixels = self._decoded(bottom, space="RGBX" if exact else "RGB")[0]
        return resize(pixels, box, size, interpolation, exact)

    def downscaled(self, size: tuple[int, int], interpolation: str) -> np.ndarray:
        """All of it at a smaller size (width, height). Raises ImageError.

        Six times smaller or more, the file is decoded at 1/2, 1/4 or 1/8 of the scale, which is
        faster: within 1.5 of 255 of Pillow's resize on a photograph.
        """
        least = min(self.width / size[0], self.height / size[1])
        scale = next((s for s in (8, 4, 2) if least >= 3 * s), 1) if interpolation in SMOOTH else 1
        pixels, scale = self._decoded(self._stored[0], scale)
        # The last pixel of a side may cover less than `scale`; rotated, it is the first.
        x = -self.width % scale if self._orientation in (2, 3, 6, 7) else 0
        y = -self.height % scale if self._orientation in (3, 4, 7, 8) else 0
        box = [side / scale for side in (x, y, x + self.width, y + self.height)]
        return resize(pixels, box, size, interpolation)

    def _decoded(self, bottom: int, scale: int = 1, space: str = "RGB") -> tuple[np.ndarray, int]:
        """The upright pixels at 1 / scale, and the scale; rows from `bottom` on are undefined.

        They are part of the array: the order of Pillow's passes depends on its height.
        """
        height, width = self._stored
        # With fewer rows in the header the decoder stops early. Two more than needed, since colours
        # are interpolated from the row below; whole blocks of 16.
        rows, raw = -(-(bottom + 2) // 16) * 16, self._raw
        if cut := self._frame and rows < height:
            raw, height = bytearray(raw), rows
            raw[self._frame : self._frame + 2] = rows.to_bytes(2)
        wide, high = -(-width // scale), -(-height // scale)
        pixels = np.empty((-(-self._stored[0] // scale), wide, len(space)), np.uint8)
        how = {"colorspace": space, "fastdct": False, "fastupsample": False}
        how |= {"min_height": high, "min_width": wide, "buffer": pixels[:high]}
        try:
            simplejpeg.decode_jpeg(raw, **how)
        except ValueError as error:
            # libjpeg reports its first problem; the rows that were cut off are none.
            if not (cut and re.search(r"\d+ extraneous bytes before marker 0xd9", str(error))):
                return image_files.with_reason(
                    "", lambda: image_files.decode(io.BytesIO(self._raw))
                ), 1
        return image_files.UPRIGHT[self._orientation](pixels), scale


AnyImage = Pixels | Jpeg | Image.Image | np.ndarray


def resize(
    pixels: np.ndarray,
    box: Box,
    size: tuple[int, int],
    interpolation: str = "bilinear",
    exact: bool = False,
) -> np.ndarray:
    """A box (left, top, right, bottom) of pixels (h, w, 3) at a size (width, height), antialiased.

    With `exact` it is Pillow's resize, whose filter reads across the edge of the box; pixels with
    a fourth byte, Pillow's own layout, are not copied. Without, a box of whole pixels is cut out
    first, and bilinear and bicubic are computed faster, by a level of 255 apart here and there.
    The result may be a view of the pixels.
    """
    (width, height), (left, top, right, bottom) = size, box
    if not exact and all(side == int(side) for side in box):
        part = pixels[int(top) : int(bottom), int(left) : int(right)]
        if part.shape[:2] == (height, width):
            return part
        if interpolation == "bilinear" and part.shape[0] <= height and part.shape[1] <= width:
            return cv2.resize(part, size, interpolation=cv2.INTER_LINEAR)
        if interpolation in ("bilinear", "bicubic"):
            part = torch.from_numpy(np.require(part[None], None, "CW")).permute(0, 3, 1, 2)
            part = F.interpolate(part, (height, width), mode=interpolation, antialias=True)
            return np.ascontiguousarray(part.permute(0, 2, 3, 1)[0].numpy())
        pixels, box = part, (0, 0, part.shape[1], part.shape[0])
    if (*pixels.shape[1::-1],) == size and tuple(box) == (0, 0, *size):
        return pixels[..., :3]
    if pixels.shape[2] == 3:
        image = Image.fromarray(pixels)
    else:
        pixels = np.ascontiguousarray(pixels)
        stored = pa.Array.from_buffers(pa.uint8(), pixels.size, [None, pa.py_buffer(pixels)])
        image = Image.fromarrow(stored, "RGB", pixels.shape[1::-1])
    return np.asarray(image.resize(size, Image.Resampling[interpolation.upper()], box))


def opened(path: str | Path, content: bytes | None = None) -> BinaryIO:
    """`content`, the bytes of an image, else those at its path. Raises ImageError, OSError."""
    return image_files.opened(path) if content is None else io.BufferedReader(io.BytesIO(content))


def _open(path: str | Path, content: bytes | None) -> Pixels | Jpeg:
    with opened(path, content) as file:
        is_jpeg = file.raw.read(3) == b"\xff\xd8\xff"
        file.raw.seek(0)
        if is_jpeg and (found := _jpeg(file.raw.read())):
            return found
        file.raw.seek(0)
        return Pixels(image_files.decode(file))


def _jpeg(raw: bytes) -> Jpeg | None:
    """A JPEG in YCbCr or grey; None for any other kind."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(raw)
    except ValueError:
        return None
    if space not in ("YCbCr", "Gray"):
        return None
    image_files.check_size(width, height)
    (height_offset, has_app1), orientation = _markers(raw), 1
    if has_app1:  # which may have EXIF
        with Image.open(io.BytesIO(raw)) as image:
            orientation = image_files.orientation(image)
    return Jpeg(raw, width, height, height_offset, orientation)


def _markers(raw: bytes) -> tuple[int, bool]:
    """Where the header has the height of a JPEG whose last rows can be cut off, else 0; and
    whether it may have an APP1 segment.

    The first is one without restarts (DRI), in which one scan has all components. ITU-T T.81, B.1:
    marker segments up to the first scan (SOS); SOF0 and SOF1 head a sequential image.
    """
    at, frame, has_app1 = 2, 0, False
    while at + 9 < len(raw) and raw[at] == 0xFF and raw[at + 1] != 0xDD:
        has_app1 |= raw[at + 1] == 0xE1
        if raw[at + 1] in (0xC0, 0xC1):
            frame = at + 5
        elif raw[at + 1] == 0xDA:
            return (frame if frame and raw[at + 4] == raw[frame + 4] else 0), has_app1
        at += 2 + int.from_bytes(raw[at + 2 : at + 4])
    return 0, True
