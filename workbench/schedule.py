"""Learning rates as functions of the step: values you can call, plot and compare.

    lr = Cosine(0.8, steps=125_200, warmup=Warmup(3130, ratio=0.25))
    lr(0), lr(3129), lr(125_199)        # 0.2, 0.8, 1.3e-10

Steps are counted from 0. Schedules have no state: a resumed run needs only the step.
Every schedule is at its peak in the first step after the warm-up.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from workbench import counted
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


@dataclass(frozen=True)
class _Schedule:
    """The warm-up, then `rate(step)` of the class below."""

    peak: float
    _: KW_ONLY
    warmup: Warmup = Warmup()

    def __call__(self, step: int) -> float:
        if step < self.warmup.steps:
            return self.peak * self.warmup.factor(step)
        return self.rate(step)


@dataclass(frozen=True)
class MultiStep(_Schedule):
    """The peak times gamma for every milestone (a step number) reached; constant without any."""

    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def rate(self, step: int) -> float:
        return self.peak * self.gamma ** sum(step >= m for m in self.milestones)


@dataclass(frozen=True)
class _Decay(_Schedule):
    """From the peak, where the warm-up ends, to `end` after the last of `steps`.

    `hold` steps share one rate (steps per epoch: changes once an epoch). `period` is the number of
    steps from the end of the warm-up to `end`; None is all that remain.
    """

    steps: int
    end: float = 0.0
    _: KW_ONLY
    hold: int = 1
    period: int | None = None

    def rate(self, step: int) -> float:
        start = self.warmup.steps
        done = max(0, step // self.hold * self.hold - start)
        share = min(1.0, done / max(1, self.period or self.steps - start))
        return self.end + (self.peak - self.end) * self.curve(share)


class Cosine(_Decay):
    """Half a cosine: Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts.

    United Perception's per-epoch cosine has a period of all epochs, so that it stops short of
    `end` by its warm-up.
    """

    def curve(self, share: float) -> float:
        return (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Polynomial(_Decay):
    """(1 - share)^power of the way from the end to the peak; power 1 is a line."""

    power: float = 1.0

    def curve(self, share: float) -> float:
        return (1 - share) ** self.power


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


class TrainingError(RuntimeError):
    """Training cannot continue; the text says at which step and what to try."""


def steps_per_epoch(count: int, batch_size: int, drop_last: bool = False) -> int:
    """Optimizer steps in an epoch; the incomplete last batch counts unless it is dropped."""
    return count // batch_size if drop_last else -(-count // batch_size)


def warmup_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Steps of the warm-up, from warmup_steps or warmup_epochs."""
    return recipe.warmup_steps or round(recipe.warmup_epochs * steps_per_epoch)


def lr_schedule(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate of a recipe as a function of the step, counted from 0.

    Raises TrainingError when the warm-up would leave no training at the peak.
    """
    steps, rise = recipe.epochs * steps_per_epoch, warmup_steps(recipe, steps_per_epoch)
    if rise >= steps:
        raise TrainingError(
            f"the warm-up takes {counted(rise, 'step')} and the whole training {steps}; lower "
            "warmup_steps"
        )
    warmup = Warmup(rise, recipe.warmup_start_factor, recipe.warmup)
    decay = {"warmup": warmup, "hold": steps_per_epoch if recipe.lr_per_epoch else 1}
    match recipe.schedule:
        case "multistep" | "step" as kind:
            every = recipe.lr_step_epochs
            epochs = (
                recipe.milestones if kind == "multistep" else range(every, recipe.epochs, every)
            )
            milestones = tuple(epoch * steps_per_epoch for epoch in epochs)
            return MultiStep(recipe.lr, milestones, recipe.gamma, warmup=warmup)
        case "cosine":
            period = recipe.cosine_epochs and round(recipe.cosine_epochs * steps_per_epoch)
            return Cosine(recipe.lr, steps, recipe.lr_min, period=period, **decay)
        case "polynomial":
            return Polynomial(recipe.lr, steps, recipe.lr_min, recipe.power, **decay)
        case "one_cycle":
            return OneCycle(recipe.lr, steps, recipe.pct_start)
    return MultiStep(recipe.lr, warmup=warmup)  # constant
