"""Predictions for image files, with onnxruntime, numpy and Pillow alone.

python predict.py [model_int8.onnx] IMAGE ...     prints file, best class, probability

For a file that cannot be read it prints `error: ` and the reason, and the exit code is 1. Training
reads files by the same rules: workbench.data.images imports them from here.
"""

import errno
import io
import json
import os
import re
import stat
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

HERE = Path(__file__).parent
MIN_SIDE = 4  # pixels
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 256 MiB of RGB

# Errors of a network file system that may pass: the file is opened again.
_TEMPORARY = {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR}

REASONS = ("missing", "unreadable", "undecodable", "truncated", "too small", "too large")

# EXIF orientation (EXIF 2.3, 4.6.4) -> function that turns the pixels upright
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


class ImageError(ValueError):
    """An image cannot be used. `reason` is one of REASONS."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self):
        return f"{self.reason}: {self.detail}"


def with_reason(path: str | Path, read: Callable[[], Any], attempts: int = 3) -> Any:
    """The result of `read`; its exceptions are raised as ImageError."""
    try:
        return read()
    except ImageError:
        raise
    except UnidentifiedImageError:
        reason, is_empty = "undecodable", path and stored_in(path)[1] == 0
        detail = "empty file" if is_empty else "no known image format"
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # no error of the image
            raise
        if error.errno in _TEMPORARY and attempts > 1:
            time.sleep(4 - attempts)
            return with_reason(path, read, attempts - 1)
        reason, detail = "unreadable", error.strerror or str(error)
        if isinstance(error, FileNotFoundError):
            reason, detail = "missing", "no such file"
        elif error.errno is None:  # of Pillow
            reason = "truncated" if "truncated" in detail.lower() else "undecodable"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason, detail = "too large", str(error)
    except Exception as error:  # decoders raise many types for damaged files
        reason, detail = "undecodable", f"{type(error).__name__}: {error}"
    raise ImageError(reason, detail)


# An image inside of another file: ARCHIVE::START+SIZE:NAME, in bytes; z: a zip's header is at START
_MEMBER = re.compile(r"(.+?)::(z?)(\d+)\+(\d+):.*", re.DOTALL)


def stored_in(path: str | Path) -> tuple[str, int]:
    """The file that holds an image, itself or an archive, and the bytes that the image takes."""
    if member := _MEMBER.fullmatch(str(path)):
        return member[1], int(member[4])
    return str(path), os.path.getsize(path)


def opened(path: str | Path) -> BinaryIO:
    """A regular file, or a member; opening a pipe would block. Raises ImageError, OSError."""
    if member := _MEMBER.fullmatch(str(path)):
        return io.BufferedReader(io.BytesIO(_read_member(*member.groups())))
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ImageError("unreadable", "a folder" if stat.S_ISDIR(mode) else "no regular file")
    return os.fdopen(descriptor, "rb")


def _read_member(archive: str, is_zip: str, start: str, size: str) -> bytes:
    with opened(archive) as file:  # each call its own, for processes and threads
        file.seek(int(start))
        deflated = False
        if is_zip:
            header = file.read(30)  # APPNOTE.TXT 4.3.7
            if header[:4] != b"PK\3\4":
                raise ImageError("unreadable", f"{archive} has changed since it was listed")
            deflated, name, extra = (header[i] + 256 * header[i + 1] for i in (8, 26, 28))
            file.seek(name + extra, os.SEEK_CUR)
        content = file.read(int(size))
    if len(content) < int(size):
        raise ImageError("truncated", f"{archive} ends before it")
    return zlib.decompress(content, -zlib.MAX_WBITS) if deflated else content


def check_size(width: int, height: int) -> None:
    """Raises ImageError if a side is below MIN_SIDE or the area above MAX_PIXELS."""
    if min(width, height) < MIN_SIDE:
        raise ImageError("too small", f"{width}x{height} pixels, under {MIN_SIDE} on a side")
    if width * height > MAX_PIXELS:
        raise ImageError("too large", f"{width}x{height} pixels, over {MAX_PIXELS:,}")


def decode(file: BinaryIO) -> np.ndarray:
    """The upright pixels of the first frame; closes the file. Raises the errors of Pillow."""
    with file, Image.open(file) as image:
        check_size(*image.size)
        image.load()
        return upright(image)


def upright(image: Image.Image) -> np.ndarray:
    """Upright uint8 RGB (height, width, 3). Raises ImageError."""
    return UPRIGHT[orientation(image)](np.asarray(to_rgb(image)))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, a key of UPRIGHT; 1 if it is missing or damaged."""
    try:
        found = image.getexif().get(0x0112, 1)
        return found if found in UPRIGHT else 1
    except Exception:  # many types for damaged metadata
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB on a white background. Raises ImageError for modes without a defined white."""
    is_pgm = image.mode == "I" and image.format == "PPM"  # which Pillow scales to 16 bits
    if is_pgm or image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # TIFF 6.0: BitsPerSample, PhotometricInterpretation
        white = 2 ** tags.get(258, (16,))[0] - 1
        grey = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white
        grey = 255 - grey if tags.get(262) == 0 else grey  # WhiteIsZero, which Pillow leaves
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("undecodable", f"mode {image.mode} pixels have no defined white")
    # A PNG may have one transparent colour.
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def prepare(pixels: np.ndarray, preprocess: dict) -> np.ndarray:
    """The network's input (1, 3, size, size): short side to `resize`, centre crop, normalised."""
    image = Image.fromarray(pixels)
    sides, size = np.array(image.size), preprocess["size"]
    resized = (preprocess["resize"] * sides / sides.min()).astype(int)
    first = np.round((resized - size) / 2)
    # Only the centre is resized: its box in pixels of the image.
    box = [*(first * (sides / resized)), *((first + size) * (sides / resized))]
    kind = Image.Resampling[preprocess["interpolation"].upper()]
    pixels = np.asarray(image.resize((size, size), kind, box)).transpose(2, 0, 1)[None]
    if preprocess["normalised_inside"]:
        return pixels
    mean, std = (255 * np.array(preprocess[key], np.float32) for key in ("mean", "std"))
    return (pixels - mean.reshape(1, 3, 1, 1)) / std.reshape(1, 3, 1, 1)


def read(path: str | Path) -> np.ndarray:
    """The upright pixels of an image file. Raises ImageError."""
    return with_reason(path, lambda: decode(opened(path)))


def main(arguments: list[str]) -> int:
    """Prints file, best class and its probability for each image; returns the exit code."""
    if not arguments or arguments[0].startswith("-"):
        sys.exit(__doc__)
    import onnxruntime  # not needed for reading images

    network = arguments.pop(0) if arguments[0].endswith(".onnx") else "model.onnx"
    warnings.simplefilter("ignore")  # of Pillow, about damaged metadata
    meta = json.loads((HERE / "meta.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(HERE / network, providers=["CPUExecutionProvider"])
    exit_code = 0
    for path in arguments:
        try:
            data = prepare(read(path), meta["preprocess"])
            [score] = session.run(["score"], {"data": data})[0]
            if not np.isfinite(score).all():
                raise ImageError("not finite", "the logits have NaN or infinity")
            name, value = meta["classes"][score.argmax()], f"{score.max():.6f}"
        except (ImageError, OSError) as error:
            name, value, exit_code = "", "error: " + " ".join(str(error).split()), 1
        print(path, name, value, sep="\t")
    return exit_code


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # any file name
    sys.exit(main(sys.argv[1:]))
