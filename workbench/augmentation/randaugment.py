"""RandAugment in timm's variant and United Perception's, and torchvision's policies."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from workbench.augmentation import pixel_ops
from workbench.augmentation.pixel_ops import MATRICES

Operation = tuple[str, float | None, str]  # name, value, interpolation


class Level(NamedTuple):
    """How a magnitude M, 0 to 10, becomes an operation's value."""

    value: Callable[[float, float], float | None]  # (M, sign of 1 or -1)
    unit: str


def _levels(variant: str, increasing: bool) -> dict[str, Level]:
    """The 15 operations of a variant, "timm" or "up"."""
    timm = variant == "timm"
    constant = Level(lambda m, sign: None, "")
    signed = lambda most, unit: Level(lambda m, sign: sign * (m / 10 * most), unit)
    shift = signed(0.45, "of the side") if timm else signed(100, "pixels")
    whole = int if timm else float
    if increasing:
        bits = lambda m, sign: 4 - int(m / 10 * 4)
        threshold = lambda m, sign: 256 - whole(m / 10 * 256)
        factor = lambda m, sign: max(0.1, 1 + sign * (m / 10 * 0.9))
    else:  # milder as M grows, or strong at both ends
        bits = lambda m, sign: max(0 if timm else 1, int(m / 10 * 4))
        threshold = lambda m, sign: whole(m / 10 * 256)
        factor = lambda m, sign: m / 10 * 1.8 + 0.1
    added = Level(lambda m, sign: int(m / 10 * 110), "added")
    return {
        **dict.fromkeys(("autocontrast", "equalize", "invert"), constant),
        "rotate": signed(30, "degrees"),
        "posterize": Level(bits, "bits"),
        "solarize": Level(threshold, "threshold"),
        "solarize_add" if timm else "solarize_add_all": added,
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), Level(factor, "factor")),
        "shear_x": signed(0.3, "pixels a row"),
        "shear_y": signed(0.3, "pixels a column"),
        "translate_x": shift,
        "translate_y": shift,
    }


_LEVELS = {(v, i): _levels(v, i) for v in ("up", "timm") for i in (False, True)}
UNITS = {name: level.unit for levels in _LEVELS.values() for name, level in levels.items()}


@dataclass(frozen=True)
class RandAugment:
    """n of 15 operations, sampled with replacement; each is applied with probability 1/2.

    Cubuk et al., arXiv 1909.13719. Each magnitude is normal around m with standard deviation std,
    clipped to 0 to 10. Some operations become milder with it (posterize, solarize) or are strong at
    both ends (color ...); RandAugmentIncreasing reverses these. The default variant is United
    Perception's ("up"): translations of up to 100 pixels, nearest neighbour, black fill; timm's has
    up to 0.45 of the side, bilinear or bicubic, the mean colour.
    """

    n: int = 2
    m: float = 7.0
    std: float = 0.5
    fill: tuple[int, int, int] = (0, 0, 0)
    interpolations: tuple[str, ...] = ("nearest",)
    variant: str = "up"

    @classmethod
    def timm(cls, n: int, m: float, std: float, mean: tuple[float, ...]) -> "RandAugment":
        """timm's `rand-m{m}-n{n}-mstd{std}` (and `-inc1`), filled with `mean` (0 to 1)."""
        fill = tuple(min(255, round(255 * x)) for x in mean)
        return cls(n, m, std, fill, ("bilinear", "bicubic"), "timm")

    @property
    def levels(self) -> dict[str, Level]:
        """The 15 operations by name."""
        return _LEVELS[self.variant, False]

    def sample_params(self, rng: np.random.Generator, size: int) -> list[Operation]:
        """The operations that are applied to size x size pixels, in order."""
        uniform, normal = rng.random((self.n, 4)).tolist(), rng.standard_normal(self.n).tolist()
        names, params = list(self.levels), []
        for (which, applied, side, kind), deviation in zip(uniform, normal, strict=True):
            if applied < 0.5:
                magnitude = min(10.0, max(0.0, self.m + self.std * deviation))
                name = names[int(which * len(names))]
                params.append(self.at(name, magnitude, size, 1 if side < 0.5 else -1, kind))
        return params

    def at(
        self, name: str, magnitude: float, size: int, sign: float = 1, kind: float = 0.0
    ) -> Operation:
        """One operation at a magnitude; `kind`, 0 to 1, chooses the interpolation."""
        value, unit = self.levels[name].value(magnitude, sign), self.levels[name].unit
        if unit == "of the side":
            value *= size
        interpolation = self.interpolations[int(kind * len(self.interpolations))]
        return name, value, interpolation if name in MATRICES else ""

    def apply(self, pixels: np.ndarray, params: list[Operation]) -> np.ndarray:
        """Pixels (h, w, 3) after these operations."""
        for name, value, interpolation in params:
            if name in MATRICES:
                matrix = MATRICES[name](value, pixels.shape[1], pixels.shape[0])
                pixels = pixel_ops.warp(pixels, matrix, interpolation, self.fill)
            else:
                pixels = pixel_ops.COLOURS[name](pixels, value)
        return pixels

    def table(self) -> list[dict[str, str | float | None]]:
        """For every operation its name, value at magnitude m (positive side) and unit."""
        return [
            {"operation": name, "value": level.value(self.m, 1), "unit": level.unit}
            for name, level in self.levels.items()
        ]


@dataclass(frozen=True)
class RandAugmentIncreasing(RandAugment):
    """RandAugment in which a higher magnitude is never milder, as RSB and UP use it (inc1)."""

    @property
    def levels(self) -> dict[str, Level]:
        return _LEVELS[self.variant, True]


POLICIES = {
    "autoaugment": v2.AutoAugment(),  # 25 sub-policies for ImageNet, arXiv 1805.09501
    "trivialaugment": v2.TrivialAugmentWide(),  # one operation of any strength, arXiv 2103.10158
    "augmix": v2.AugMix(),  # a mixture of three chains, arXiv 1912.02781, without its loss
}


def apply_policy(name: str, pixels: np.ndarray, seed: int) -> np.ndarray:
    """A policy of torchvision's on pixels (h, w, 3) with a seed; torch's own state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return np.asarray(POLICIES[name](Image.fromarray(pixels)))
