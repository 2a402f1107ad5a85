"""Learning rates as functions of the step: values you can call, plot and compare.

    lr = Cosine(0.8, steps=125_200, warmup=Warmup(3130, ratio=0.25))
    lr(0), lr(3129), lr(125_199)        # 0.2, 0.8, 1.3e-10

Steps are counted from 0. Schedules have no state: a resumed run needs only the step.
Every schedule is at its peak in the first step after the warm-up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from workbench.recipe import Recipe


@dataclass(frozen=True)
class Warmup:
    """The lr rises over the first `steps` steps, from ratio * peak to the peak at steps - 1.

    Linear (Goyal et al., arXiv 1706.02677, section 2.2), half a cosine, or exponential, which
    multiplies by the same factor every step and so needs a ratio above 0.
    """

    steps: int = 0
    ratio: float = 0.0
    kind: str = "linear"

    def factor(self, step: int) -> float:
        """Share of the peak at a step inside the warm-up."""
        share = step / max(1, self.steps - 1)
        if self.kind == "exponential":
            return self.ratio ** (1 - share)
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.ratio + (1 - self.ratio) * share


class _Schedule:
    """The warm-up, then `rate(step)` of the class below."""

    def __call__(self, step: int) -> float:
        if step < self.warmup.steps:
            return self.peak * self.warmup.factor(step)
        return self.rate(step)


@dataclass(frozen=True)
class Constant(_Schedule):
    """The peak, after the warm-up."""

    peak: float
    warmup: Warmup = Warmup()

    def rate(self, step: int) -> float:
        return self.peak


@dataclass(frozen=True)
class MultiStep(_Schedule):
    """The peak times gamma for every milestone (a step number) reached."""

    peak: float
    milestones: tuple[int, ...]
    gamma: float = 0.1
    warmup: Warmup = Warmup()

    def rate(self, step: int) -> float:
        return self.peak * self.gamma ** sum(step >= m for m in self.milestones)


@dataclass(frozen=True)
class Step(_Schedule):
    """The peak times gamma after every `every` steps."""

    peak: float
    every: int
    gamma: float = 0.1
    warmup: Warmup = Warmup()

    def rate(self, step: int) -> float:
        return self.peak * self.gamma ** (step // self.every)


@dataclass(frozen=True)
class Cosine(_Schedule):
    """Half a cosine from the peak, where the warm-up ends, to `end` after the last of `steps`.

    Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts. `hold` steps share one
    rate (steps per epoch: changes once an epoch). `period` is the number of steps from the end
    of the warm-up to `end`; None is all that remain. United Perception's per-epoch cosine has a
    period of all epochs, so that it stops short of `end` by its warm-up.
    """

    peak: float
    steps: int
    end: float = 0.0
    warmup: Warmup = Warmup()
    hold: int = 1
    period: int | None = None

    def rate(self, step: int) -> float:
        share = _share(step, self.steps, self.warmup.steps, self.hold, self.period)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Polynomial(_Schedule):
    """(1 - share)^power from the peak, where the warm-up ends, to `end`; power 1 is a line."""

    peak: float
    steps: int
    power: float = 1.0
    end: float = 0.0
    warmup: Warmup = Warmup()
    hold: int = 1

    def rate(self, step: int) -> float:
        share = _share(step, self.steps, self.warmup.steps, self.hold)
        return self.end + (self.peak - self.end) * (1 - share) ** self.power


@dataclass(frozen=True)
class OneCycle:
    """Half a cosine up to the peak over `rise` of the steps, half a cosine down over the rest.

    Smith and Topin, arXiv 1708.07120, with torch's constants: starts at peak / 25, ends at
    peak / 250,000 with the last step. The momentum is constant.
    """

    peak: float
    steps: int
    rise: float = 0.3

    def __call__(self, step: int) -> float:
        top, last = self.rise * self.steps - 1, self.steps - 1
        if step <= top and top:
            low, share = self.peak / 25, 1 - step / top
        else:
            low, share = self.peak / 250_000, min(1.0, (step - top) / (last - top))
        return low + (self.peak - low) * (1 + math.cos(math.pi * share)) / 2


def _share(step: int, steps: int, start: int, hold: int, period: int | None = None) -> float:
    """The position of a step between `start` and the end, 0 to 1."""
    gone = max(0, step // hold * hold - start)
    return min(1.0, gone / max(1, period or steps - start))


# ---- of a recipe


class TrainingError(RuntimeError):
    """Training cannot continue; the text says at which step and what to try."""


def steps_per_epoch(count: int, batch_size: int, drop_last: bool = False) -> int:
    """Optimizer steps in an epoch; the incomplete last batch counts unless it is dropped."""
    return count // batch_size if drop_last else -(-count // batch_size)


def warmup_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps of the warm-up, from warmup_steps or warmup_epochs."""
    return recipe.warmup_steps or round(recipe.warmup_epochs * steps_per_epoch)


def lr_schedule(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate as a function of the step, counted from 0.

    Raises TrainingError when the warm-up would leave no training at the peak.
    """
    steps = recipe.epochs * steps_per_epoch
    climb = warmup_steps(recipe, steps_per_epoch)
    if climb >= steps:
        raise TrainingError(
            f"the warm-up takes {climb} steps and the whole training {steps}; lower warmup_steps"
        )
    warmup = Warmup(climb, recipe.warmup_start_factor, recipe.warmup)
    hold = steps_per_epoch if recipe.lr_per_epoch else 1
    match recipe.schedule:
        case "multistep":
            milestones = tuple(m * steps_per_epoch for m in recipe.milestones)
            return MultiStep(recipe.lr, milestones, recipe.gamma, warmup)
        case "step":
            every = recipe.lr_step_epochs * steps_per_epoch
            return Step(recipe.lr, every, recipe.gamma, warmup)
        case "cosine":
            period = recipe.cosine_epochs and round(recipe.cosine_epochs * steps_per_epoch)
            return Cosine(recipe.lr, steps, recipe.lr_min, warmup, hold, period)
        case "polynomial":
            return Polynomial(recipe.lr, steps, recipe.power, recipe.lr_min, warmup, hold)
        case "one_cycle":
            return OneCycle(recipe.lr, steps, recipe.pct_start)
    return Constant(recipe.lr, warmup)
