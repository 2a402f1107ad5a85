"""What augmentation does to one image: uint8 (h, w, 3) in, the same out, with Pillow's meaning.

Those that look colours up give Pillow's pixels to the bit. Those that blend or interpolate compute
the same formula in faster code: a level of 255 apart where it blends, a few at the edges of things
where it moves pixels (coordinates are rounded to 1/32 of a pixel).
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

JITTER = ("brightness", "contrast", "saturation", "hue")  # of the operations below
LEVELS = np.arange(256)
CUT_OFF = -0.499  # added before OpenCV rounds, it cuts off as Pillow does; whole levels stay


def _look_up(pixels: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Every level of pixels or of one channel replaced by its entry (256,), cut off and clipped."""
    return cv2.LUT(pixels, np.clip(levels, 0, 255).astype(np.uint8))


# ---- colours: (pixels, value) -> pixels


def autocontrast(pixels: np.ndarray, _: None = None) -> np.ndarray:
    """Every channel stretched from its darkest to its brightest level over 0 to 255."""

    def stretched(channel: np.ndarray) -> np.ndarray:
        low, high, _, _ = cv2.minMaxLoc(channel)
        if low == high:
            return channel
        scale = 255.0 / (high - low)
        return _look_up(channel, LEVELS * scale - low * scale)

    return cv2.merge([stretched(channel) for channel in cv2.split(pixels)])


def equalize(pixels: np.ndarray, _: None = None) -> np.ndarray:
    """Every channel's levels spread so that each is about equally frequent."""

    def spread(channel: np.ndarray) -> np.ndarray:
        counts = cv2.calcHist([channel], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        step = (channel.size - counts[np.flatnonzero(counts)[-1]]) // 255
        if step == 0:
            return channel
        return _look_up(channel, (np.cumsum(counts) - counts + step // 2) // step)

    return cv2.merge([spread(channel) for channel in cv2.split(pixels)])


def invert(pixels: np.ndarray, _: None = None) -> np.ndarray:
    """255 less the level."""
    return cv2.bitwise_not(pixels)


def posterize(pixels: np.ndarray, bits: int) -> np.ndarray:
    """The highest `bits` of 8 kept; none is black, which Pillow itself refuses."""
    return pixels & np.uint8(256 - 2 ** (8 - int(bits)))


def solarize(pixels: np.ndarray, threshold: float) -> np.ndarray:
    """Levels of `threshold` or more inverted."""
    return _look_up(pixels, np.where(LEVELS < threshold, LEVELS, 255 - LEVELS))


def solarize_add(pixels: np.ndarray, value: float) -> np.ndarray:
    """`value` added to what is darker than 128."""
    return _look_up(pixels, np.where(LEVELS < 128, np.minimum(255, LEVELS + value), LEVELS))


def solarize_add_all(pixels: np.ndarray, value: float) -> np.ndarray:
    """`value` added everywhere, then what is 128 or brighter inverted: United Perception's form."""
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
    """The distance from the mean around the pixel, itself five times in it, times `factor`."""
    # The mean over nine, which OpenCV has fast, makes up 9 / 13 of that mean.
    around = cv2.blur(pixels, (3, 3))
    inner = _blend(pixels, factor + (1 - factor) * 4 / 13, around, (1 - factor) * 9 / 13)
    result = pixels.copy()  # Pillow's filter leaves the outermost row and column as they are
    result[1:-1, 1:-1] = inner[1:-1, 1:-1]
    return result


def hue(pixels: np.ndarray, turn: float) -> np.ndarray:
    """The colour circle turned; 1 is all the way round."""
    circle = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    circle[..., 0] += np.uint8(int(turn * 255) % 256)
    return cv2.cvtColor(circle, cv2.COLOR_HSV2RGB_FULL)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """Luma (h, w) of ITU-R 601-2, as Pillow's mode L."""
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def _blend(a: np.ndarray, share: float, b: np.ndarray, other: float) -> np.ndarray:
    return cv2.addWeighted(a, share, b, other, CUT_OFF)


# ---- moves: (pixels, value, interpolation, fill) -> pixels


def _turn(degrees: float, width: int, height: int) -> tuple[float, ...]:
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)  # as Image.rotate
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


# Of a move's value, width and height: the matrix of `affine`. To the left about the centre; every
# row left, or column up, by the value times its number; all of it left, or up, by pixels.
MATRICES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "rotate": _turn,
    "shear_x": lambda slope, *_: (1, slope, 0, 0, 1, 0),
    "shear_y": lambda slope, *_: (1, 0, 0, slope, 1, 0),
    "translate_x": lambda shift, *_: (1, 0, shift, 0, 1, 0),
    "translate_y": lambda shift, *_: (1, 0, 0, 0, 1, shift),
}


def move(pixels: np.ndarray, name: str, value: float, *how) -> np.ndarray:
    """`affine` by a matrix of MATRICES: a rotation in degrees, a slope, a shift in pixels."""
    return affine(pixels, MATRICES[name](value, pixels.shape[1], pixels.shape[0]), *how)


_KINDS = {
    "nearest": cv2.INTER_NEAREST,
    "bilinear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
}


def affine(
    pixels: np.ndarray,
    matrix: Sequence[float],
    interpolation: str = "nearest",
    fill: tuple[int, int, int] = (0, 0, 0),
) -> np.ndarray:
    """What stands at x' = a x + b y + c, y' = d x + e y + f for a matrix (a, b, c, d, e, f).

    Coordinates count from the corner of the canvas, so that the first pixel's centre is at 0.5;
    what comes from outside of it is `fill`. Interpolation is nearest, bilinear or bicubic.
    """
    height, width = pixels.shape[:2]
    a, b, c, d, e, f = matrix
    if (a, b, d, e) == (1, 0, 0, 1):
        return _shift(_shift(pixels, c, 1, interpolation, fill), f, 0, interpolation, fill)
    # OpenCV counts from the centre of the first pixel.
    centred = np.array([[a, b, (a + b - 1) / 2 + c], [d, e, (d + e - 1) / 2 + f]])
    how = {
        "dsize": (width, height),
        "flags": _KINDS[interpolation] | cv2.WARP_INVERSE_MAP,
        "borderMode": cv2.BORDER_CONSTANT,
        "borderValue": (*fill, 0),
    }
    # What is fastest: four channels rather than three between neighbours, floats between four.
    if interpolation == "bilinear":
        moved = cv2.warpAffine(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA), centred, **how)
        return cv2.cvtColor(moved, cv2.COLOR_RGBA2RGB)
    if interpolation == "bicubic":
        moved = cv2.warpAffine(pixels.astype(np.float32), centred, **how)
        return cv2.add(moved, CUT_OFF, dtype=cv2.CV_8U)
    return cv2.warpAffine(pixels, centred, **how)


def _shift(
    pixels: np.ndarray, shift: float, axis: int, interpolation: str, fill: tuple[int, int, int]
) -> np.ndarray:
    """`affine` where every pixel moves by the same, along one axis: one filter for all of them."""
    if shift == 0:
        return pixels
    side = pixels.shape[axis]
    # A centre that is asked for lies on the canvas, 0 <= x + shift + 0.5 < side, for x in between.
    first = min(side, max(0, math.ceil(-shift - 0.5)))
    last = max(first, min(side, math.ceil(side - shift - 0.5)))
    whole = math.floor(shift + 0.5) if interpolation == "nearest" else math.floor(shift)
    moved = cv2.copyMakeBorder(pixels, *_sides(axis, 1, 1), cv2.BORDER_REPLICATE)
    if interpolation != "nearest" and shift != whole:
        taps = np.float32(_TAPS[interpolation](shift - whole)).reshape((1, -1) if axis else (-1, 1))
        at = taps.size // 2 - 1
        how = {"delta": CUT_OFF, "borderType": cv2.BORDER_REPLICATE}
        moved = cv2.filter2D(moved, -1, taps, anchor=(at, 0) if axis else (0, at), **how)
    if first == last:
        return np.full_like(pixels, fill)
    kept = slice(first + whole + 1, last + whole + 1)
    kept = moved[:, kept] if axis else moved[kept]
    edge = _sides(axis, first, side - last)
    return cv2.copyMakeBorder(kept, *edge, cv2.BORDER_CONSTANT, value=fill)


def _sides(axis: int, before: int, after: int) -> tuple[int, int, int, int]:
    """A border's top, bottom, left and right."""
    return (0, 0, before, after) if axis else (before, after, 0, 0)


# Weights of the neighbours of a place, from the left; it lies `x` right of the middle left one.
_TAPS: dict[str, Callable[[float], list[float]]] = {
    "bilinear": lambda x: [1 - x, x],
    "bicubic": lambda x: [_cubic(1 + x), _cubic(x), _cubic(1 - x), _cubic(2 - x)],
}


def _cubic(x: float) -> float:
    """Keys' kernel with a = -1, which Pillow moves pixels with (it resizes with -0.5)."""
    return (x - 2) * x * x + 1 if x < 1 else ((5 - x) * x - 8) * x + 4
