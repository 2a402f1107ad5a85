"""Augmentation operations on one image, uint8 (h, w, 3), with Pillow's meaning.

Operations by look-up table give Pillow's pixels to the bit. Those that blend or interpolate are
faster than Pillow: blends differ by one level of 255, warps by a few at edges (coordinates are
rounded to 1/32 of a pixel).
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

Colour = Callable[[np.ndarray, float | None], np.ndarray]
# Colour jitter: operation -> the value that changes nothing
JITTER = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
LEVELS = np.arange(256)
TRUNCATE = -0.499  # added before OpenCV rounds, it truncates as Pillow does


# ---- colours: (pixels, value) -> pixels


def _look_up(pixels: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Replaces every level by its entry in `levels` (256,), truncated and clipped."""
    return cv2.LUT(pixels, np.clip(levels, 0, 255).astype(np.uint8))


def _autocontrast(channel: np.ndarray) -> np.ndarray:
    low, high, _, _ = cv2.minMaxLoc(channel)
    if low == high:
        return channel
    scale = 255.0 / (high - low)
    return _look_up(channel, LEVELS * scale - low * scale)


def _equalize(channel: np.ndarray) -> np.ndarray:
    counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    step = (channel.size - counts[np.flatnonzero(counts)[-1]]) // 255
    if step == 0:
        return channel
    return _look_up(channel, (np.cumsum(counts) - counts + step // 2) // step)


def _each_channel(operation: Callable[[np.ndarray], np.ndarray]) -> Colour:
    return lambda pixels, _: cv2.merge([operation(channel) for channel in cv2.split(pixels)])


def _solarize_add_all(pixels: np.ndarray, value: float) -> np.ndarray:
    """United Perception's: adds `value` to all levels, then inverts those of 128 or more."""
    added = np.minimum(255, LEVELS + value)
    return _look_up(pixels, np.where(added < 128, added, 255 - added))


def _contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    grey = math.floor(cv2.mean(_grey(pixels))[0] + 0.5)
    return _look_up(pixels, grey + np.float32(factor) * (LEVELS - grey).astype(np.float32))


def _saturation(pixels: np.ndarray, factor: float) -> np.ndarray:
    grey = cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels, factor, grey, 1 - factor, TRUNCATE)


def _sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    # Pillow's kernel has 5 / 13 in the middle and 1 / 13 around it: 9 / 13 of OpenCV's box filter.
    around, own = cv2.blur(pixels, (3, 3)), factor + (1 - factor) * 4 / 13
    inner = cv2.addWeighted(pixels, own, around, (1 - factor) * 9 / 13, TRUNCATE)
    result = pixels.copy()  # Pillow's filter leaves the outermost row and column unchanged
    result[1:-1, 1:-1] = inner[1:-1, 1:-1]
    return result


def _hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    circle = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    circle[..., 0] += np.uint8(int(turn * 255) % 256)
    return cv2.cvtColor(circle, cv2.COLOR_HSV2RGB_FULL)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Luma (h, w) of ITU-R 601-2, as Pillow's mode L."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


COLOURS: dict[str, Colour] = {
    "autocontrast": _each_channel(_autocontrast),
    "equalize": _each_channel(_equalize),
    "invert": lambda pixels, _: cv2.bitwise_not(pixels),
    # 0 bits, an error in Pillow, give black.
    "posterize": lambda pixels, bits: pixels & np.uint8(256 - 2 ** (8 - int(bits))),
    "solarize": lambda pixels, threshold: _look_up(
        pixels, np.where(LEVELS < threshold, LEVELS, 255 - LEVELS)
    ),
    "solarize_add": lambda pixels, value: _look_up(
        pixels, np.where(LEVELS < 128, np.minimum(255, LEVELS + value), LEVELS)
    ),
    "solarize_add_all": _solarize_add_all,
    "brightness": lambda pixels, factor: _look_up(
        pixels, np.float32(factor) * LEVELS.astype(np.float32)
    ),
    "contrast": _contrast,
    "saturation": _saturation,
    "color": _saturation,  # as RandAugment's papers and libraries call it
    "sharpness": _sharpness,
    "hue": _hue,  # 1 is the whole circle
}


# ---- warps


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)  # as Image.rotate
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


# From value, width and height to the matrix of `warp`: degrees counter-clockwise, pixels to the
# left a row or up a column, pixels to the left or up.
MATRICES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "rotate": _rotation,
    "shear_x": lambda slope, *_: (1, slope, 0, 0, 1, 0),
    "shear_y": lambda slope, *_: (1, 0, 0, slope, 1, 0),
    "translate_x": lambda shift, *_: (1, 0, shift, 0, 1, 0),
    "translate_y": lambda shift, *_: (1, 0, 0, 0, 1, shift),
}
_FLAGS = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def warp(
    pixels: np.ndarray, matrix: Sequence[float], interpolation: str, fill: tuple[int, int, int]
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
    how = {"dsize": (width, height), "flags": _FLAGS[interpolation] | cv2.WARP_INVERSE_MAP}
    how |= {"borderMode": cv2.BORDER_CONSTANT, "borderValue": (*fill, 0)}
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
    """`warp` by one distance along one axis: a filter with the same taps everywhere."""
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
    inside = slice(first + whole + 1, last + whole + 1)
    inside = moved[:, inside] if axis else moved[inside]
    return cv2.copyMakeBorder(inside, *sides(first, side - last), cv2.BORDER_CONSTANT, value=fill)


# Weights of the neighbours, from the left, of a position `x` right of the middle left one.
_TAPS: dict[str, Callable[[float], list[float]]] = {
    "bilinear": lambda x: [1 - x, x],
    "bicubic": lambda x: [_cubic(1 + x), _cubic(x), _cubic(1 - x), _cubic(2 - x)],
}


def _cubic(x: float) -> float:
    """Keys' kernel with a = -1, Pillow's for affine transforms (-0.5 for resizing)."""
    return (x - 2) * x * x + 1 if x < 1 else ((5 - x) * x - 8) * x + 4
