"""Learning rates as functions of the step: values you can call, plot and compare.

    lr = Cosine(0.8, steps=125_200, warmup=Warmup(3130, ratio=0.25))
    lr(0), lr(3129), lr(125_199)        # 0.2, 0.8, 1.3e-10

A step is counted from 0. Nothing is remembered between calls: a resumed run needs only the step.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Warmup:
    """Linear climb over the first `steps` steps, from ratio * peak to the peak at steps - 1.

    Goyal et al., arXiv 1706.02677, section 2.2.
    """

    steps: int = 0
    ratio: float = 0.0

    def factor(self, step: int) -> float:
        """Share of the peak at a step inside the warm-up."""
        return self.ratio + (1 - self.ratio) * step / max(1, self.steps - 1)


@dataclass(frozen=True)
class Constant:
    """The peak, after the warm-up."""

    peak: float
    warmup: Warmup = Warmup()

    def __call__(self, step: int) -> float:
        if step < self.warmup.steps:
            return self.peak * self.warmup.factor(step)
        return self.peak


@dataclass(frozen=True)
class MultiStep:
    """The peak times gamma for every milestone (a step number) reached."""

    peak: float
    milestones: tuple[int, ...]
    gamma: float = 0.1
    warmup: Warmup = Warmup()

    def __call__(self, step: int) -> float:
        if step < self.warmup.steps:
            return self.peak * self.warmup.factor(step)
        return self.peak * self.gamma ** sum(step >= m for m in self.milestones)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the peak, where the warm-up ends, to `end` after the last of `steps`.

    Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts, updated every step.
    """

    peak: float
    steps: int
    end: float = 0.0
    warmup: Warmup = Warmup()

    def __call__(self, step: int) -> float:
        if step < self.warmup.steps:
            return self.peak * self.warmup.factor(step)
        share = (step - self.warmup.steps) / max(1, self.steps - self.warmup.steps)
        return self.end + (self.peak - self.end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
