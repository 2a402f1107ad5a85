"""Predictions for image files, with onnxruntime, numpy and Pillow alone.

python predict.py [model_int8.onnx] IMAGE ...     prints file, best class, probability

Of a file that cannot be read it prints `error: ` and why, and goes on; the exit code is then 1.
The rules for reading a file are those of training: workbench.data.images takes them from here.
"""

import errno
import json
import os
import stat
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

HERE = Path(__file__).parent
MIN_SIDE = 4  # pixels; below it a crop or a rotation has nothing to work on
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 256 MiB of RGB

# A network file system stumbles; a second look a moment later tells a hiccup from a broken file.
_PASSING = {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR}
_NOT_THE_FILE = {errno.EMFILE, errno.ENFILE}  # too many are open: no image is to blame

REASONS = ("missing", "unreadable", "undecodable", "truncated", "too small", "too large")

# How a sensor held the scene, by EXIF's number (EXIF 2.3, 4.6.4) -> the scene upright
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
    """An image cannot be used. `reason` is one of REASONS, the text adds the detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return ImageError, (self.reason, self.detail)


def told(path: str | Path, read: Callable[[], Any]) -> Any:
    """What `read` returns; whatever it raises becomes an ImageError with a reason."""
    for attempt in (1, 2, 3):
        try:
            return read()
        except ImageError:
            raise
        except FileNotFoundError:
            raise ImageError("missing", "no such file") from None
        except UnidentifiedImageError:
            detail = "empty file" if Path(path).stat().st_size == 0 else "no known image format"
            raise ImageError("undecodable", detail) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError("too large", str(error).split(",")[0]) from None
        except OSError as error:
            if error.errno in _NOT_THE_FILE:
                raise
            if error.errno in _PASSING and attempt < 3:
                time.sleep(attempt)
                continue
            if error.errno is not None:
                raise ImageError("unreadable", error.strerror or str(error)) from None
            reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
            raise ImageError(reason, str(error)) from None
        except Exception as error:  # damaged files make decoders raise nearly anything
            raise ImageError("undecodable", f"{type(error).__name__}: {error}") from None
    raise AssertionError("unreachable")


def opened(path: str | Path) -> BinaryIO:
    """A regular file: of another kind, a pipe would be waited for. Raises ImageError, OSError."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ImageError("unreadable", "a folder" if stat.S_ISDIR(mode) else "no regular file")
    return os.fdopen(descriptor, "rb")


def check_size(width: int, height: int) -> None:
    """Raises ImageError for an image with a side under MIN_SIDE or over MAX_PIXELS in all."""
    if min(width, height) < MIN_SIDE:
        raise ImageError("too small", f"{width}x{height} pixels, under {MIN_SIDE} on a side")
    if width * height > MAX_PIXELS:
        raise ImageError("too large", f"{width}x{height} pixels, over {MAX_PIXELS:,}")


def decode(file: BinaryIO) -> np.ndarray:
    """The first frame as `upright` gives it; the file is closed. Raises whatever Pillow does."""
    with file, Image.open(file) as image:
        check_size(*image.size)
        image.load()
        if image.mode == "I" and image.format == "PPM":  # Pillow has stretched it to 16 bits
            image = Image.fromarray(np.asarray(image).astype(np.uint16))
        return upright(image)


def upright(image: Image.Image) -> np.ndarray:
    """uint8 RGB (height, width, 3) as a person sees it. Raises ImageError, as `to_rgb`."""
    return UPRIGHT[orientation(image)](np.asarray(to_rgb(image)))


def orientation(image: Image.Image) -> int:
    """The key of UPRIGHT that the metadata names; 1 where they are missing or damaged."""
    try:
        found = image.getexif().get(0x0112, 1)
        return found if found in UPRIGHT else 1
    except Exception:  # as of decoders: the pixels may still be sound
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, white where it is transparent. Raises ImageError where white is not defined."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("undecodable", f"mode {image.mode} pixels have no defined white")
    # A PNG may name one colour that is transparent.
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def prepare(pixels: np.ndarray, seen: dict) -> np.ndarray:
    """The network's input (1, 3, size, size): short side to `resize`, the centre, normalised."""
    image = Image.fromarray(pixels)
    sides, size = np.array(image.size), seen["size"]
    resized = (seen["resize"] * sides / sides.min()).astype(int)
    first = np.round((resized - size) / 2)
    # Only what the centre shows is resized: its box in pixels of the image.
    box = [*(first * (sides / resized)), *((first + size) * (sides / resized))]
    image = image.resize((size, size), Image.Resampling[seen["interpolation"].upper()], box)
    pixels = np.asarray(image).transpose(2, 0, 1)[None]
    if seen["normalised_inside"]:
        return pixels
    mean, std = (255 * np.array(seen[k], np.float32).reshape(1, 3, 1, 1) for k in ("mean", "std"))
    return (pixels - mean) / std


def read(path: str | Path) -> np.ndarray:
    """What `decode` gives of a file. Raises ImageError."""
    return told(path, lambda: decode(opened(path)))


def main(words: list[str]) -> int:
    """Prints file, best class and its probability, a line each; returns the exit code."""
    if not words or words[0].startswith("-"):
        sys.exit(__doc__)
    import onnxruntime  # here, so that reading images does not load it

    network = words.pop(0) if words[0].endswith(".onnx") else "model.onnx"
    warnings.simplefilter("ignore")  # Pillow's, about damaged metadata: the pixels decide
    meta = json.loads((HERE / "meta.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(HERE / network, providers=["CPUExecutionProvider"])
    failed = 0
    for path in words:
        try:
            data = prepare(read(path), meta["preprocess"])
        except (ImageError, OSError) as error:
            print(path, "", "error: " + " ".join(str(error).split()), sep="\t")
            failed = 1
            continue
        [score] = session.run(["score"], {"data": data})[0]
        print(path, meta["classes"][score.argmax()], f"{score.max():.6f}", sep="\t")
    return failed


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # any name of a file
    sys.exit(main(sys.argv[1:]))
