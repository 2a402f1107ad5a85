"""Augmentation operations on one image, uint8 (h, w, 3), with Pillow's meaning.

Operations by look-up table give Pillow's pixels to the bit. Those that blend or interpolate are
faster than Pillow: blends differ by one level of 255, warps by a few at edges (coordinates are
rounded to 1/32 of a pixel).
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

JITTER = ("brightness", "contrast", "saturation", "hue")
LEVELS = np.arange(256)
TRUNCATE = -0.499  # added before OpenCV rounds, it truncates as Pillow does


def _look_up(pixels: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Replaces every level by its entry in `levels` (256,), truncated and clipped."""
    return cv2.LUT(pixels, np.clip(levels, 0, 255).astype(np.uint8))


# ---- colours: (pixels, value) -> pixels


def autocontrast(pixels: np.ndarray, _: None = None) -> np.ndarray:
    """Stretches every channel's darkest to brightest level over 0 to 255."""

    def stretched(channel: np.ndarray) -> np.ndarray:
        low, high, _, _ = cv2.minMaxLoc(channel)
        if low == high:
            return channel
        scale = 255.0 / (high - low)
        return _look_up(channel, LEVELS * scale - low * scale)

    return cv2.merge([stretched(channel) for channel in cv2.split(pixels)])


def equalize(pixels: np.ndarray, _: None = None) -> np.ndarray:
    """Equalises the histogram of every channel."""

    def spread(channel: np.ndarray) -> np.ndarray:
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (channel.size - counts[np.flatnonzero(counts)[-1]]) // 255
        if step == 0:
            return channel
        return _look_up(channel, (np.cumsum(counts) - counts + step // 2) // step)

    return cv2.merge([spread(channel) for channel in cv2.split(pixels)])


def invert(pixels: np.ndarray, _: None = None) -> np.ndarray:
    """255 minus the level."""
    return cv2.bitwise_not(pixels)


def posterize(pixels: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest `bits` of 8; 0, an error in Pillow, gives black."""
    return pixels & np.uint8(256 - 2 ** (8 - int(bits)))


def solarize(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts levels of `threshold` or more."""
    return _look_up(pixels, np.where(LEVELS < threshold, LEVELS, 255 - LEVELS))


def solarize_add(pixels: np.ndarray, value: float) -> np.ndarray:
    """Adds `value` to levels below 128."""
    return _look_up(pixels, np.where(LEVELS < 128, np.minimum(255, LEVELS + value), LEVELS))


def solarize_add_all(pixels: np.ndarray, value: float) -> np.ndarray:
    """United Perception's variant: adds `value` everywhere, then inverts levels of 128 or more."""
    added = np.minimum(255, LEVELS + value)
    return _look_up(pixels, np.where(added < 128, added, 255 - added))


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """The level times `factor`."""
    return _look_up(pixels, np.float32(factor) * LEVELS.astype(np.float32))


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """The distance from the mean grey times `factor`."""
    grey = math.floor(cv2.mean(_grey(pixels))[0] + 0.5)
    return _look_up(pixels, grey + np.float32(factor) * (LEVELS - grey).astype(np.float32))


def saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    """The distance from the pixel's own grey times `factor`."""
    grey = cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB)
    return _blend(pixels, factor, grey, 1 - factor)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """The distance from Pillow's smoothed image times `factor`.

    Its kernel has weight 5 / 13 in the middle and 1 / 13 around it: 9 / 13 of OpenCV's box filter.
    """
    around = cv2.blur(pixels, (3, 3))
    inner = _blend(pixels, factor + (1 - factor) * 4 / 13, around, (1 - factor) * 9 / 13)
    result = pixels.copy()  # Pillow's filter leaves the outermost row and column unchanged
    result[1:-1, 1:-1] = inner[1:-1, 1:-1]
    return result


def hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    """Rotates the hue; 1 is the whole circle."""
    circle = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    circle[..., 0] += np.uint8(int(turn * 255) % 256)
    return cv2.cvtColor(circle, cv2.COLOR_HSV2RGB_FULL)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Luma (h, w) of ITU-R 601-2, as Pillow's mode L."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _blend(a: np.ndarray, share: float, b: np.ndarray, other: float) -> np.ndarray:
    return cv2.addWeighted(a, share, b, other, TRUNCATE)


# ---- warps


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)  # as Image.rotate
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


# From value, width and height to the matrix of `warp_affine`: degrees counter-clockwise, pixels to
# the left a row or up a column, pixels to the left or up.
MATRICES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "rotate": _rotation,
    "shear_x": lambda slope, *_: (1, slope, 0, 0, 1, 0),
    "shear_y": lambda slope, *_: (1, 0, 0, slope, 1, 0),
    "translate_x": lambda shift, *_: (1, 0, shift, 0, 1, 0),
    "translate_y": lambda shift, *_: (1, 0, 0, 0, 1, shift),
}


def warp(
    pixels: np.ndarray, name: str, value: float, interpolation: str, fill: tuple[int, int, int]
) -> np.ndarray:
    """`warp_affine` by a matrix of MATRICES."""
    matrix = MATRICES[name](value, pixels.shape[1], pixels.shape[0])
    return warp_affine(pixels, matrix, interpolation, fill)


_KINDS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
}


def warp_affine(
    pixels: np.ndarray,
    matrix: Sequence[float],
    interpolation: str = "nearest",
    fill: tuple[int, int, int] = (0, 0, 0),
) -> np.ndarray:
    """The pixels at x' = a x + b y + c, y' = d x + e y + f for a matrix (a, b, c, d, e, f).

    Coordinates start at the corner of the image, so that the first pixel's centre is at 0.5;
    outside of it is `fill`. Interpolation is nearest, bilinear or bicubic.
    """
    height, width = pixels.shape[:2]
    a, b, c, d, e, f = matrix
    if (a, b, d, e) == (1, 0, 0, 1):
        return _shift(_shift(pixels, c, 1, interpolation, fill), f, 0, interpolation, fill)
    # OpenCV's coordinates start at the centre of the first pixel.
    centred = np.array([[a, b, (a + b - 1) / 2 + c], [d, e, (d + e - 1) / 2 + f]])
    how = {
        "dsize": (width, height),
        "flags": _KINDS[interpolation] | cv2.WARP_INVERSE_MAP,
        "borderMode": cv2.BORDER_CONSTANT,
        "borderValue": (*fill, 0),
    }
    # Four channels are faster than three for bilinear, floats for bicubic.
    if interpolation == "bilinear":
        moved = cv2.warpAffine(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA), centred, **how)
        return cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB)
    if interpolation == "bicubic":
        moved = cv2.warpAffine(pixels.astype(np.float32), centred, **how)
        return cv2.add(moved, TRUNCATE, dtype=cv2.CV_8U)
    return cv2.warpAffine(pixels, centred, **how)


def _shift(
    pixels: np.ndarray, shift: float, axis: int, interpolation: str, fill: tuple[int, int, int]
) -> np.ndarray:
    """`warp_affine` by one distance along one axis: a filter with the same taps everywhere."""
    if shift == 0:
        return pixels
    side = pixels.shape[axis]
    # The source of pixel x is inside the image, 0 <= x + shift + 0.5 < side, from first to last.
    first = min(side, max(0, math.ceil(-shift - 0.5)))
    last = max(first, min(side, math.ceil(side - shift - 0.5)))
    whole = math.floor(shift + 0.5) if interpolation == "nearest" else math.floor(shift)
    sides = lambda before, after: (0, 0, before, after) if axis else (before, after, 0, 0)
    moved = cv2.copyMakeBorder(pixels, *sides(1, 1), cv2.BORDER_REPLICATE)
    if interpolation != "nearest" and shift != whole:
        taps = np.float32(_TAPS[interpolation](shift - whole)).reshape((1, -1) if axis else (-1, 1))
        at = taps.size // 2 - 1
        how = {"delta": TRUNCATE, "borderType": cv2.BORDER_REPLICATE}
        moved = cv2.filter2D(moved, -1, taps, anchor=(at, 0) if axis else (0, at), **how)
    if first == last:
        return np.full_like(pixels, fill)
    kept = slice(first + whole + 1, last + whole + 1)
    kept = moved[:, kept] if axis else moved[kept]
    return cv2.copyMakeBorder(kept, *sides(first, side - last), cv2.BORDER_CONSTANT, value=fill)


# Weights of the neighbours, from the left, of a position `x` right of the middle left one.
_TAPS: dict[str, Callable[[float], list[float]]] = {
    "bilinear": lambda x: [1 - x, x],
    "bicubic": lambda x: [_cubic(1 + x), _cubic(x), _cubic(1 - x), _cubic(2 - x)],
}


def _cubic(x: float) -> float:
    """Keys' kernel with a = -1, Pillow's for affine transforms (-0.5 for resizing)."""
    return (x - 2) * x * x + 1 if x < 1 else ((5 - x) * x - 8) * x + 4
