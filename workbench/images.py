"""Any picture file as the RGB a person sees, or one error that names what is wrong with it."""

import contextlib
import errno
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .bmp .gif .tif .tiff .webp .ppm .pgm .pbm .avif".split()
)
MIN_SIDE = 4  # pixels; below it a crop or a rotation has nothing to work on
MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: 256 MiB of RGB

# A network file system stumbles; a second look a moment later tells a hiccup from a broken file.
_PASSING = {errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR}


class ImageError(ValueError):
    """A picture cannot be used. `reason` is one of REASONS, the text adds the detail."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return ImageError, (self.reason, self.detail)


REASONS = ("missing", "unreadable", "undecodable", "truncated", "too small", "too large")


def decode(path: str | Path) -> Image.Image:
    """The picture as an upright 8-bit RGB image.

    EXIF orientation is applied, transparency shows white, 16-bit greys are scaled (not clipped),
    CMYK and palettes are converted, animations give their first frame. Raises ImageError.
    """
    for attempt in (1, 2, 3):
        try:
            return _decode(path)
        except ImageError:
            raise
        except FileNotFoundError:
            raise ImageError("missing", "no such file") from None
        except UnidentifiedImageError:
            detail = "empty file" if Path(path).stat().st_size == 0 else "no known picture format"
            raise ImageError("undecodable", detail) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageError("too large", str(error).split(",")[0]) from None
        except OSError as error:
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


def _decode(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise ImageError("too small", f"{width}x{height} pixels, under {MIN_SIDE} on a side")
        if width * height > MAX_PIXELS:
            raise ImageError("too large", f"{width}x{height} pixels, over {MAX_PIXELS:,}")
        image.load()
        if image.mode == "I" and image.format == "PPM":  # Pillow has stretched it to 16 bits
            image = Image.fromarray(np.asarray(image).astype(np.uint16))
        return to_rgb(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings from Pillow about damaged metadata: the pixels decide. Not in threads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def to_rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB copy as a person sees it. Raises ImageError where white is not defined."""
    if image.mode == "RGB":
        # A PNG may name one colour that is transparent; otherwise these are the pixels.
        if "transparency" not in image.info:
            return image.copy() if image.readonly else image
    elif image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    elif image.mode in ("I", "F"):
        raise ImageError("undecodable", f"mode {image.mode} pixels have no defined white")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
