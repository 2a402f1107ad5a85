"""Flip, RandAugment and colour jitter of a whole batch at once, on the device it lies on.

The draws are augmentation.TrainTransform's, one for each image, and so is the meaning: Pillow's.
With few cores and a fast GPU the loaders then only decode and crop. Steps of the same kind run
together, whichever images they come from, and no image's pixels enter another's.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from workbench.augmentation.pixel_ops import JITTER, MATRICES

# Factors and coordinates reach the device as whole numbers of 1 / ONE. They are computed in double
# precision here, which not every device has, and whole numbers are the same on all of them.
ONE = 2**32

_CROP = {"left", "top", "width", "height"}  # keys of a draw that are used up before


def apply(
    images: torch.Tensor, draws: list[dict[str, Any]], fill: tuple[int, int, int]
) -> torch.Tensor:
    """The images after their draws, uint8 (n, 3, h, w) on the same device, in the same format.

    `images` are uint8 (n, 3, h, w), already cropped, and stay as they are. `draws` holds a dict for
    each of them, as TrainTransform.draw gives it: `flip` first, then the steps of `randaug` in
    order, then jitter in the order of its keys; each may be missing, and the crop's keys are passed
    over. `fill` is what rotations, shears and translations show from outside of the canvas. Nothing
    waits for the device.

    Raises ValueError where a draw asks for an operation or an interpolation that is not here,
    AutoAugment among them, and where shapes or counts do not fit.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"augmentation in batches takes uint8 images (n, 3, h, w), "
            f"not {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        )
    if len(draws) != len(images):
        raise ValueError(f"{len(images)} images need as many draws, not {len(draws)}")
    groups: dict[tuple, list[tuple[int, Any]]] = defaultdict(list)
    for i, draw in enumerate(draws):
        for step, value in _steps(draw):
            groups[step].append((i, value))
    result = images.clone()
    if not groups:
        return result
    # One transfer for all: the fill, then a row for each step, which are its image and numbers.
    height, width = images.shape[2:]
    rows, order = [[*fill, 0, 0, 0, 0]], sorted(groups)
    for step in order:
        for i, value in groups[step]:
            numbers = _numbers(step, value, width, height)
            rows.append([i, *numbers, *[0] * (6 - len(numbers))])
    table = torch.tensor(rows).to(images.device, non_blocking=True)
    colour = table[0, :3].to(torch.uint8)[:, None, None]
    parts = table[1:].split([len(groups[step]) for step in order])
    for step, part in zip(order, parts, strict=True):
        chosen, numbers = part[:, 0], part[:, 1:]
        if step.name in MATRICES:
            axes = "xy" if step.name == "rotate" else step.name[-1]
            after = _move(result[chosen], numbers, axes, step.how, colour)
        else:
            after = _COLOURS[step.name].run(result[chosen], numbers[:, :1, None, None])
        result[chosen] = after
    return result


# ---- what a draw asks for


class _Step(NamedTuple):
    """Steps that are equal run together; they run in their order, which is a draw's own."""

    part: int  # flip, randaug, jitter
    place: int
    name: str
    how: str  # interpolation of a move


def _steps(draw: dict[str, Any]) -> list[tuple[_Step, Any]]:
    """A draw's steps and their values, in order. Raises ValueError."""
    if "autoaugment" in draw:
        raise ValueError(
            "a draw holds autoaugment, which has no form in batches: apply it image by image "
            "with TrainTransform.apply"
        )
    if unknown := set(draw) - {*_CROP, *JITTER, "flip", "randaug"}:
        raise ValueError(
            f"a draw holds {', '.join(map(repr, sorted(unknown)))}; beside crop, flip and randaug "
            f"it may hold {', '.join(JITTER)}"
        )
    steps = [(_Step(0, 0, "flip", ""), None)] if draw.get("flip") else []
    for k, (name, value, how) in enumerate(draw.get("randaug", [])):
        if name not in {*MATRICES, *_COLOURS}:
            allowed = ", ".join(sorted({*MATRICES, *_COLOURS}))
            raise ValueError(f"randaug holds the operation {name!r}; there are {allowed}")
        if name in MATRICES and how not in _REACH:
            raise ValueError(
                f"randaug holds {name} by the interpolation {how!r}; there are {', '.join(_REACH)}"
            )
        steps.append((_Step(1, k, name, how if name in MATRICES else ""), value))
    jitter = [name for name in draw if name in JITTER]
    return steps + [(_Step(2, k, name, ""), draw[name]) for k, name in enumerate(jitter)]


def _numbers(step: _Step, value: Any, width: int, height: int) -> list[int]:
    """The whole numbers a step is computed with, six of a move and one of any other."""
    if step.name not in MATRICES:
        return [_COLOURS[step.name].number(value)]
    a, b, c, d, e, f = MATRICES[step.name](value, width, height)
    # Pillow moves nearest neighbours by 1 / 65536 of a pixel, unless they only shift.
    unit = 2**16 if step.how == "nearest" and (b or d) else ONE
    x, y = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5  # the first pixel's centre is at 0.5
    return [math.floor(number * unit + 0.5) * (ONE // unit) for number in (a, b, x, d, e, y)]


# ---- colours: (pixels uint8 (m, 3, h, w), number int64 (m, 1, 1, 1)) -> pixels


def _autocontrast(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    # Pillow's table comes from double precision, whose roundings decide some of its entries.
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
    """Every level replaced by its entry in the (m, 3, 256) of its image and channel, cut off."""
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
    around = pixels.float()  # the mean around a pixel, itself five times in it
    inner = around[:, :, 1:-1, 1:-1]  # Pillow leaves the outermost row and column as they are
    rows = around[:, :, :-2] + around[:, :, 1:-1] + around[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    inner.copy_((total / 13 + 0.5).floor_())
    return _blend(around, pixels, factor)


def _hue(pixels: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """By way of hue, saturation and value in 8 bits: `turn` of 256 steps round the circle."""
    red, green, blue = pixels.int().unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    span = value - torch.minimum(torch.minimum(red, green), blue)
    sixths = torch.where(green == value, 2 * span + blue - red, 4 * span + red - green)
    sixths = torch.where(red == value, green - blue, sixths)
    sixths = torch.where(sixths < 0, sixths + 6 * span, sixths)
    hue = 85 * sixths // (2 * span).clamp_(min=1)
    saturation = 255 * span // value.clamp(min=1)
    # Back: a channel lacks saturation by how far the hue is from its own third of the circle, here
    # of 6 * 255 steps.
    hue = _wrapped(hue + turn[:, 0].int(), 256)
    third = 255 * torch.arange(5, 0, -2, device=pixels.device, dtype=torch.int32)[:, None, None]
    place = _wrapped(6 * hue[:, None] + third, 1530)
    lack = torch.minimum(place, 1020 - place).clamp_(0, 255) * saturation[:, None]
    return ((2 * value[:, None] * (65025 - lack) + 65025) // 130050).to(torch.uint8)  # rounded


def _wrapped(numbers: torch.Tensor, most: int) -> torch.Tensor:
    """Numbers of a circle of `most` steps that went round once at most."""
    return torch.where(numbers < most, numbers, numbers - most)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    """Luma (m, 1, h, w) of ITU-R 601-2, int32, as Pillow's mode L."""
    red, green, blue = pixels.int().split(1, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _blend(other: torch.Tensor | int, pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The distance from `other` times `factor`, cut off as Pillow does."""
    return ((pixels.float() - other) * _real(factor) + other).clamp_(0, 255).to(torch.uint8)


def _real(number: torch.Tensor) -> torch.Tensor:
    return number.float() / ONE


class _Colour(NamedTuple):
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    number: Callable[[Any], int]  # of a draw's value, for `run`


_nothing = lambda value: 0
_factor = lambda value: int(np.float32(value) * ONE)  # rounded as Pillow rounds it
_saturation = _Colour(lambda pixels, factor: _blend(_grey(pixels), pixels, factor), _factor)
_COLOURS = {
    "flip": _Colour(lambda pixels, _: pixels.flip(3), _nothing),
    "autocontrast": _Colour(_autocontrast, _nothing),
    "equalize": _Colour(_equalize, _nothing),
    "invert": _Colour(lambda pixels, _: 255 - pixels, _nothing),
    "posterize": _Colour(
        lambda pixels, mask: pixels & mask.to(torch.uint8), lambda bits: 256 - 2 ** (8 - int(bits))
    ),
    "solarize": _Colour(
        lambda pixels, least: torch.where(pixels < least.to(torch.int16), pixels, 255 - pixels),
        math.ceil,
    ),
    "solarize_add": _Colour(_solarize_add, int),
    "solarize_add_all": _Colour(_solarize_add_all, int),
    "brightness": _Colour(lambda pixels, factor: _blend(0, pixels, factor), _factor),
    "contrast": _Colour(_contrast, _factor),
    "saturation": _saturation,
    "color": _saturation,  # as RandAugment's papers and libraries call it
    "sharpness": _Colour(_sharpness, _factor),
    "hue": _Colour(_hue, lambda turn: int(turn * 255) % 256),
}


# ---- moves


def _move(
    pixels: torch.Tensor, matrix: torch.Tensor, axes: str, how: str, fill: torch.Tensor
) -> torch.Tensor:
    """What stands at x' = a x + b y + c, y' = d x + e y + f: pixels (m, 3, h, w) of such.

    `matrix` int64 (m, 6) holds a to f in 1 / ONE, c and f for the centre of the first pixel. `axes`
    names those along which pixels move at all; along the others nothing is interpolated. `fill`
    (3, 1, 1) is where the centre asked for lies outside of the canvas; neighbours of one inside
    stop at its edge.
    """
    height, width = pixels.shape[2:]
    across = torch.arange(width, device=pixels.device)
    down = torch.arange(height, device=pixels.device)[:, None]
    a, b, c, d, e, f = matrix.T[..., None, None]
    x, y = a * across + b * down + c, d * across + e * down + f
    inside = (x >= 0) & (x < width * ONE) & (y >= 0) & (y < height * ONE)
    levels = pixels.flatten(2)
    if how != "nearest":
        levels, x, y = levels.float(), x - ONE // 2, y - ONE // 2  # now from a centre
    left, top = x >> 32, y >> 32  # ONE is 2**32
    x_rest, y_rest = _real(x & (ONE - 1))[:, None], _real(y & (ONE - 1))[:, None]

    columns = [(left + k).clamp(0, width - 1) for k in (_REACH[how] if "x" in axes else (0,))]
    rows = [(top + k).clamp(0, height - 1) * width for k in (_REACH[how] if "y" in axes else (0,))]

    def taken(place: torch.Tensor) -> torch.Tensor:
        return levels.gather(2, place.flatten(1)[:, None].expand(-1, 3, -1)).view(pixels.shape)

    lines = [_between([taken(row + column) for column in columns], x_rest) for row in rows]
    moved = _between(lines, y_rest)
    if how != "nearest":
        moved = moved.clamp(0, 255).to(torch.uint8)
    return torch.where(inside[:, None], moved, fill)


# The neighbours of a place that count, from the one to its left or above it.
_REACH = {"nearest": (0,), "bilinear": (0, 1), "bicubic": (-1, 0, 1, 2)}


def _between(taps: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The value `x` (0 to 1) past the middle left one of 1, 2 or 4 neighbours.

    Of four by Keys' kernel with a = -1, which Pillow moves pixels with (torch's own has -0.75).
    Both forms leave an even area even, to the bit.
    """
    if len(taps) == 1:
        return taps[0]
    if len(taps) == 2:
        return taps[0] + (taps[1] - taps[0]) * x
    before, here, after, beyond = taps
    cubic = (here - before) + (beyond - after)
    square = 2 * (before - here) + (after - beyond)
    return here + x * ((after - before) + x * (square + x * cubic))
