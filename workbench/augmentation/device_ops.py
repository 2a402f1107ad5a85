"""Flip, RandAugment and colour jitter of a whole batch at once, on its device.

Every image has its own parameters of TrainTransform.sample_params, with Pillow's meaning. The same
operation of several images runs as one.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from workbench.augmentation.pixel_ops import JITTER, MATRICES

# Factors and coordinates are sent to the device as integers in units of 1 / ONE: they are computed
# in double precision here, which not every device has.
ONE = 2**32
# group (flip, randaug, jitter), position in it, name, interpolation of a warp: operations that are
# equal run together, in their order, which is that of every image
Operation = tuple[int, int, str, str]


def apply(
    images: torch.Tensor, params: list[dict[str, Any]], fill: tuple[int, int, int]
) -> torch.Tensor:
    """The augmented images, uint8 (n, 3, h, w) on the same device, in the same memory format.

    Args:
        images: uint8 (n, 3, h, w), already cropped; they are not changed.
        params: of each image, as of TrainTransform.sample_params: `flip` is applied first, then
            `randaug`, then jitter, in the order of the dict; the crop is ignored.
        fill: RGB outside of a rotated, sheared or translated image.

    Nothing waits for the device. Raises ValueError for AutoAugment and unknown parameters.
    """
    if images.dtype != torch.uint8 or images.shape[1] != 3 or len(params) != len(images):
        raise ValueError(f"images must be uint8 (n, 3, h, w), not {images.dtype} {images.shape}")
    groups: dict[Operation, list[tuple[int, Any]]] = defaultdict(list)
    for i, of_image in enumerate(params):
        for operation, value in _operations(of_image):
            groups[operation].append((i, value))
    result = images.clone()
    if not groups:
        return result
    # One transfer for all: the fill, then a row per operation, its image and numbers.
    height, width = images.shape[2:]
    rows, order = [[*fill, 0, 0, 0, 0]], sorted(groups)
    for operation in order:
        for i, value in groups[operation]:
            numbers = _numbers(operation, value, width, height)
            rows.append([i, *numbers, *[0] * (6 - len(numbers))])
    table = torch.tensor(rows).to(images.device, non_blocking=True)
    colour = table[0, :3].to(torch.uint8)[:, None, None]
    parts = table[1:].split([len(groups[operation]) for operation in order])
    for (_, _, name, interpolation), part in zip(order, parts, strict=True):
        chosen, numbers = part[:, 0], part[:, 1:]
        if name in MATRICES:
            axes = "xy" if name == "rotate" else name[-1]
            changed = _warp(result[chosen], numbers, axes, interpolation, colour)
        else:
            changed = _COLOURS[name](result[chosen], numbers[:, :1, None, None])
        result[chosen] = changed
    return result


def _operations(params: dict[str, Any]) -> list[tuple[Operation, Any]]:
    """The operations of an image and their values, in order. Raises ValueError."""
    if unknown := set(params) - {"left", "top", "width", "height", "flip", "randaug", *JITTER}:
        raise ValueError(f"{sorted(unknown)} are not implemented on the device")
    found = [((0, 0, "flip", ""), None)] if params.get("flip") else []
    for i, (name, value, interpolation) in enumerate(params.get("randaug", [])):
        found.append(((1, i, name, interpolation), value))
    jitter = [name for name in params if name in JITTER]
    return found + [((2, i, name, ""), params[name]) for i, name in enumerate(jitter)]


def _numbers(operation: Operation, value: Any, width: int, height: int) -> list[int]:
    """The integers an operation is computed with, six for a warp and one for any other."""
    _, _, name, interpolation = operation
    if name not in MATRICES:
        return [0 if value is None else _NUMBER.get(name, _factor)(value)]
    a, b, c, d, e, f = MATRICES[name](value, width, height)
    # Pillow's nearest neighbour has units of 1 / 65536 of a pixel, except for translations.
    unit = 2**16 if interpolation == "nearest" and (b or d) else ONE
    x, y = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5  # the first pixel's centre is at 0.5
    return [math.floor(number * unit + 0.5) * (ONE // unit) for number in (a, b, x, d, e, y)]


def _factor(value: float) -> int:
    return int(np.float32(value) * ONE)  # rounded as Pillow rounds it


# Other values than factors, as integers
_NUMBER: dict[str, Callable[[Any], int]] = {
    "posterize": lambda bits: 256 - 2 ** (8 - int(bits)),  # a mask
    "solarize": math.ceil,
    "solarize_add": int,
    "solarize_add_all": int,
    "hue": lambda turn: int(turn * 255) % 256,
}


# ---- colours: (pixels uint8 (m, 3, h, w), number int64 (m, 1, 1, 1)) -> pixels


def _autocontrast(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    # Pillow's table is computed in double precision, and some entries depend on its rounding.
    kind = torch.float32 if pixels.device.type == "mps" else torch.float64  # mps has no double
    low, high = pixels.amin((2, 3)).to(kind)[..., None], pixels.amax((2, 3)).to(kind)[..., None]
    levels = torch.arange(256, device=pixels.device, dtype=kind)
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    stretched = (levels * scale + -low * scale).clamp(0, 255)
    return _look_up(pixels, torch.where(low < high, stretched, levels))


def _equalize(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    levels = pixels.flatten(2).long()
    counts = levels.new_zeros((*levels.shape[:2], 256), dtype=torch.int32)
    counts.scatter_add_(2, levels, counts.new_ones(()).expand_as(levels))
    brightest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255
    spread = (counts.cumsum(2, dtype=torch.int32) - counts + step // 2) // step.clamp(min=1)
    same = torch.arange(256, device=pixels.device)
    return _look_up(pixels, torch.where(step > 0, spread.clamp(max=255), same))


def _look_up(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Replaces every level by its entry in the table (m, 3, 256), truncated."""
    entries = table.to(torch.uint8).gather(2, pixels.flatten(2).long())
    return entries.view(pixels.shape)


def _solarize_add(pixels: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.where(pixels < 128, _added(pixels, value), pixels)


def _solarize_add_all(pixels: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    added = _added(pixels, value)
    return torch.where(added < 128, added, 255 - added)


def _added(pixels: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (pixels + value.to(torch.int16)).clamp(0, 255).to(torch.uint8)


def _contrast(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    grey = _grey(pixels)
    count = grey[0].numel()
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + count) // (2 * count)  # rounded half up
    return _blend(mean, pixels, factor)


def _sharpness(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    around = pixels.float()  # smoothed: weights 5 / 13 in the middle, 1 / 13 around it
    inner = around[:, :, 1:-1, 1:-1]  # Pillow leaves the outermost row and column unchanged
    rows = around[:, :, :-2] + around[:, :, 1:-1] + around[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    inner.copy_((total / 13 + 0.5).floor_())
    return _blend(around, pixels, factor)


def _hue(pixels: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotates the hue by `turn` / 256 of the circle, in 8-bit hue, saturation and value."""
    red, green, blue = pixels.int().unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    span = value - torch.minimum(torch.minimum(red, green), blue)
    sixths = torch.where(green == value, 2 * span + blue - red, 4 * span + red - green)
    sixths = torch.where(red == value, green - blue, sixths)
    sixths = torch.where(sixths < 0, sixths + 6 * span, sixths)
    hue = 85 * sixths // (2 * span).clamp_(min=1)
    saturation = 255 * span // value.clamp(min=1)
    # Back to RGB: a channel decreases with the distance of the hue from its third of the circle,
    # which here has 6 * 255 steps.
    hue = _wrapped(hue + turn[:, 0].int(), 256)
    third = 255 * torch.arange(5, 0, -2, device=pixels.device, dtype=torch.int32)[:, None, None]
    position = _wrapped(6 * hue[:, None] + third, 1530)
    lack = torch.minimum(position, 1020 - position).clamp_(0, 255) * saturation[:, None]
    return ((2 * value[:, None] * (65025 - lack) + 65025) // 130050).to(torch.uint8)  # rounded


def _wrapped(numbers: torch.Tensor, most: int) -> torch.Tensor:
    """Positions on a circle of `most` steps, from 0 up; at most one circle is subtracted."""
    return torch.where(numbers < most, numbers, numbers - most)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """Luma (m, 1, h, w) of ITU-R 601-2, int32, as Pillow's mode L."""
    red, green, blue = pixels.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(other: torch.Tensor | int, pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The distance from `other` times `factor`, truncated as Pillow does."""
    return ((pixels.float() - other) * _real(factor) + other).clamp_(0, 255).to(torch.uint8)


def _real(number: torch.Tensor) -> torch.Tensor:
    return number.float() / ONE


def _saturation(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(_grey(pixels), pixels, factor)


_COLOURS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "flip": lambda pixels, _: pixels.flip(3),
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": lambda pixels, _: 255 - pixels,
    "posterize": lambda pixels, mask: pixels & mask.to(torch.uint8),
    "solarize": lambda pixels, least: torch.where(
        pixels < least.to(torch.int16), pixels, 255 - pixels
    ),
    "solarize_add": _solarize_add,
    "solarize_add_all": _solarize_add_all,
    "brightness": lambda pixels, factor: _blend(0, pixels, factor),
    "contrast": _contrast,
    "saturation": _saturation,
    "color": _saturation,  # as RandAugment's papers and libraries call it
    "sharpness": _sharpness,
    "hue": _hue,
}


# ---- warps


def _warp(
    pixels: torch.Tensor, matrix: torch.Tensor, axes: str, interpolation: str, fill: torch.Tensor
) -> torch.Tensor:
    """The pixels at x' = a x + b y + c, y' = d x + e y + f, for pixels (m, 3, h, w).

    `matrix` int64 (m, 6) has a to f in units of 1 / ONE, c and f for the centre of the first pixel.
    Only along `axes` is interpolated. `fill` (3, 1, 1) is used where a position is outside of the
    image; neighbours outside are those at the edge.
    """
    height, width = pixels.shape[2:]
    across = torch.arange(width, device=pixels.device)
    down = torch.arange(height, device=pixels.device)[:, None]
    a, b, c, d, e, f = matrix.T[..., None, None]
    x, y = a * across + b * down + c, d * across + e * down + f
    inside = (x >= 0) & (x < width * ONE) & (y >= 0) & (y < height * ONE)
    levels = pixels.flatten(2)
    if interpolation != "nearest":
        levels, x, y = levels.float(), x - ONE // 2, y - ONE // 2  # now from a centre
    left, top = x >> 32, y >> 32  # ONE is 2**32
    x_rest, y_rest = _real(x & (ONE - 1))[:, None], _real(y & (ONE - 1))[:, None]

    def pixel_at(position: torch.Tensor) -> torch.Tensor:
        return levels.gather(2, position.flatten(1)[:, None].expand(-1, 3, -1)).view(pixels.shape)

    x_steps, y_steps = (_NEIGHBOURS[interpolation] if axis in axes else (0,) for axis in "xy")
    columns = [(left + k).clamp(0, width - 1) for k in x_steps]
    rows = [(top + k).clamp(0, height - 1) * width for k in y_steps]
    lines = [_interpolate([pixel_at(row + column) for column in columns], x_rest) for row in rows]
    moved = _interpolate(lines, y_rest)
    if interpolation != "nearest":
        moved = moved.clamp(0, 255).to(torch.uint8)
    return torch.where(inside[:, None], moved, fill)


# Neighbours of a position, relative to the one to the left of or above it.
_NEIGHBOURS = {"nearest": (0,), "bilinear": (0, 1), "bicubic": (-1, 0, 1, 2)}


def _interpolate(taps: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The value `x` (0 to 1) past the middle left one of 1, 2 or 4 neighbours.

    With four, Keys' kernel with a = -1, Pillow's for affine transforms (torch has -0.75). Constant
    areas stay constant, to the bit.
    """
    if len(taps) == 1:
        return taps[0]
    if len(taps) == 2:
        return taps[0] + (taps[1] - taps[0]) * x
    before, here, after, beyond = taps
    cubic = (here - before) + (beyond - after)
    square = 2 * (before - here) + (after - beyond)
    return here + x * ((after - before) + x * (square + x * cubic))
