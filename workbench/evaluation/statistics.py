"""Intervals and tests of top-1 for one recipe and for the difference of two.

`correct` is a bool array (runs, images): whether a run predicts the label of an image. Points are
percentage points of top-1. Only numpy is used: scipy takes a second to import.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

LEVEL, POWER = 0.95, 0.8  # of intervals; of the detectable difference
MOST_SEEDS = 1000
MIN_P = 1e-16  # smaller p values are below the precision of a double
QUANTILE = NormalDist().inv_cdf
TYPICAL_SEED_SD = 0.3  # points: prior median of the standard deviation between seeds
SEED_SD = np.geomspace(0.003, 300, 80)  # points: grid over which the posterior is computed


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p value of McNemar's test (1947) that two runs are equally good.

    `only_a` and `only_b` count the images that only one of them predicts correctly.
    """
    n = only_a + only_b
    term = total = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for multiple comparisons (Holm 1979, step-down)."""
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate([(len(p) - i) * p[k] for i, k in enumerate(order)])
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted.tolist()


def wilson(count: float, n: int) -> tuple[float, float]:
    """The score interval of a proportion, 0 to 1 (Wilson 1927)."""
    z, share = QUANTILE((1 + LEVEL) / 2), count / n
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / n / 2) ** 2)
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    return max(0.0, low), min(1.0, high)  # clipped: rounding may give -1e-19


def wilson_percent(top1: float, n: int) -> tuple[float, float]:
    """`wilson` of a top-1 over n images, both in percent."""
    low, high = wilson(round(top1 * n / 100), n)
    return 100 * low, 100 * high


def tango(only_a: int, only_b: int, images: int, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of top-1 of b minus that of a for one run each, in points (Tango 1998)."""
    n, difference = images, (only_b - only_a) / images
    z = QUANTILE((1 + level) / 2)

    def score(d: float) -> float:
        half = (only_a + only_b - (2 * n - only_b + only_a) * d) / 2
        q = (half + math.sqrt(half**2 + 2 * n * only_a * d * (1 - d))) / (2 * n)  # P(only a | d)
        return (only_b - only_a - n * d) / math.sqrt(n * max(2 * q + d * (1 - d), 1e-300))

    end = 1 - 1e-12
    low = _root(lambda d: score(d) - z, -end, difference) if difference > -end else -1.0
    high = _root(lambda d: score(d) + z, difference, end) if difference < end else 1.0
    return 100 * low, 100 * high


def _root(decreasing: Callable[[float], float], low: float, high: float) -> float:
    """Where a decreasing function is 0, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if decreasing(middle) > 0 else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class NormalMixture:
    """The error of an estimate in points: normal distributions of mean 0, weighted."""

    weights: np.ndarray
    sds: np.ndarray

    @classmethod
    def of_seeds(
        cls, fixed: float, share: float, per_image: float, between_runs: float, df: int
    ) -> "NormalMixture":
        """With the variance `fixed` plus `share` of the variance between seeds."""
        variance = per_image + SEED_SD**2
        log = -df / 2 * (np.log(variance) + between_runs / variance)
        log += np.log(SEED_SD / (1 + (SEED_SD / TYPICAL_SEED_SD) ** 2))  # density over log(SEED_SD)
        weights = np.exp(log - log.max())
        return cls(weights / weights.sum(), np.sqrt(fixed + share * SEED_SD**2))

    def p(self, points: float) -> float:
        """The two-sided probability of an error of this size or larger."""
        ratios = abs(points) / math.sqrt(2) / self.sds
        return float(self.weights @ [math.erfc(ratio) for ratio in ratios.tolist()])

    def half_width(self, alpha: float) -> float:
        """Half the width of the interval with coverage 1 - alpha."""
        chebyshev = math.sqrt(float(self.weights @ self.sds**2) / alpha)
        return _root(lambda h: self.p(h) - alpha, 0.0, chebyshev)

    def median_sd(self) -> float:
        return float(self.sds[np.searchsorted(self.weights.cumsum(), 0.5)])

    def detectable(self, alpha: float) -> float:
        """The difference detected with probability POWER if the error has the median sd."""
        return self.half_width(alpha) + QUANTILE(POWER) * self.median_sd()


@dataclass(frozen=True)
class VarianceComponents:
    """The variances behind a difference of top-1 with several runs of either recipe, in points^2.

    - `per_image`: the mean over images of p (1 - p) / n for one run, estimated from how often runs
      of a recipe disagree. It is most of the variance between fully trained seeds (Jordan, arXiv
      2304.01910), and a lower bound even where two runs have the same top-1.
    - `interaction` of recipe and image: the variance over images of the difference, minus the
      per-image variance (Clark 1973). Both count one additional image on which all runs disagree.
    - The root of the variance between seeds has a half-Cauchy prior (Gelman 2006) of median
      TYPICAL_SEED_SD points, updated with `between_runs`. The error of the difference is a mixture
      over the posterior. benchmarks/verdict.py measures its errors: where seeds move top-1 by a
      point on 10,000 images, the type I error is 11 % with 2 + 2 runs and 6.5 % with 5 + 5.
    """

    interaction: float  # of the difference
    per_image: float  # of one run
    between_runs: float  # includes `per_image`; pooled over the recipes with several runs
    df: int  # degrees of freedom of `between_runs`

    @classmethod
    def estimate(cls, a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> "VarianceComponents":
        """From `correct` of two recipes, one of which has two runs or more."""
        several = [correct for correct in (a, b) if len(correct) > 1]
        n, df = counts.sum(), len(a) + len(b) - 2
        between = sum((100 * (c @ counts) / n).var() * len(c) for c in several) / df
        per_image = sum(_per_image_variance(c, counts) * (len(c) - 1) for c in several) / df
        whole = _variance_of_mean(b.mean(0) - a.mean(0), counts, 1.0)
        interaction = max(0.0, whole - per_image * (1 / len(a) + 1 / len(b)))
        return cls(interaction, per_image, between, df)

    def error(self, runs_a: int, runs_b: int) -> NormalMixture:
        """The error of the difference with this many runs."""
        share = 1 / runs_a + 1 / runs_b
        fixed = self.interaction + self.per_image * share
        return NormalMixture.of_seeds(fixed, share, self.per_image, self.between_runs, self.df)


def _variance_of_mean(values: np.ndarray, counts: np.ndarray, extra: float) -> float:
    """The variance of a mean over images, in points^2; `extra` is one additional square."""
    n = counts.sum()
    squares = (values - values @ counts / n) ** 2
    return 1e4 * float(squares @ counts + extra) / (n + 1) / n


def _per_image_variance(correct: np.ndarray, counts: np.ndarray) -> float:
    n, k, share = counts.sum(), len(correct), correct.mean(0)
    return 1e4 * float(share * (1 - share) @ counts * k / (k - 1) + 0.25) / (n + 1) / n


@dataclass(frozen=True)
class Difference:
    """Top-1 of b minus that of a in points, one of `comparisons` made together.

    The interval has the level 1 - (1 - LEVEL) / comparisons, so that all intervals hold together
    with probability LEVEL (Bonferroni). It excludes 0 exactly where `adjusted` is below 1 - LEVEL.
    """

    points: float
    low: float
    high: float
    p: float  # of this comparison alone, at least MIN_P
    seeds: tuple[int, int]  # of a and of b
    images: int
    detectable: float  # points: the difference detected with probability POWER
    adjusted: float  # p for all comparisons
    comparisons: int = 1
    variances: VarianceComponents | None = None  # None for one run each

    def with_adjusted(self, p: float) -> "Difference":
        """This difference with another adjusted p, such as Holm's.

        Where the test is significant and the interval contains 0, that end moves to half an image
        beside 0, as in the intervals that belong to Holm's test (Guilbaud 2008).
        """
        low, high, edge = self.low, self.high, 50 / self.images
        if p < 1 - LEVEL and low <= 0 <= high:
            low, high = (edge, high) if self.points > 0 else (low, -edge)
        return replace(self, low=low, high=high, adjusted=p)

    def seeds_needed(self, points: float) -> int | None:
        """The seeds of each recipe that detect a difference; None if more than MOST_SEEDS."""
        v, alpha = self.variances, (1 - LEVEL) / self.comparisons
        if v is None:
            return None
        seed_sd = NormalMixture.of_seeds(0.0, 1.0, v.per_image, v.between_runs, v.df).median_sd()
        between = v.per_image + seed_sd**2

        def enough(k: int) -> bool:
            expected = replace(v, between_runs=between, df=2 * k - 2)
            return expected.error(k, k).detectable(alpha) <= points

        seeds = bisect.bisect_left(range(2, MOST_SEEDS), True, key=enough) + 2
        return seeds if enough(seeds) else None


def difference(
    a: np.ndarray, b: np.ndarray, comparisons: int = 1, counts: np.ndarray | None = None
) -> Difference:
    """The difference of two recipes from `correct` of each on the same images.

    With one run each: McNemar's exact p and Tango's interval, for these two networks on other
    images. Where the interval excludes 0 and the test does not reject, the interval is extended
    to 0. With several runs of either, p and interval are for other seeds and other images, see
    VarianceComponents. `counts` has the number of images of each column, 1 by default.
    """
    counts = np.ones(a.shape[1], int) if counts is None else counts
    seeds, n, alpha = (len(a), len(b)), int(counts.sum()), (1 - LEVEL) / comparisons
    points = float(100 * ((b @ counts).mean() - (a @ counts).mean()) / n)
    if seeds == (1, 1):
        only_a, only_b = int(counts[a[0] & ~b[0]].sum()), int(counts[b[0] & ~a[0]].sum())
        p, variances = mcnemar(only_a, only_b), None
        low, high = tango(only_a, only_b, n, 1 - alpha)
        if p >= alpha:
            low, high = min(low, 0.0), max(high, 0.0)
        detectable = (high - low) / 2 * (1 - QUANTILE(POWER) / QUANTILE(alpha / 2))
    else:
        variances = VarianceComponents.estimate(a, b, counts)
        error = variances.error(*seeds)
        half, p, detectable = error.half_width(alpha), error.p(points), error.detectable(alpha)
        low, high = max(-100.0, points - half), min(100.0, points + half)
    p = min(1.0, max(p, MIN_P))
    adjusted = min(1.0, p * comparisons)
    result = Difference(
        points, low, high, p, seeds, n, float(detectable), adjusted, comparisons, variances
    )
    return result.with_adjusted(adjusted)


def top1_interval(correct: np.ndarray) -> tuple[float, float]:
    """The interval of a recipe's top-1 in percent.

    Wilson's for one run; of several as in VarianceComponents, for other seeds and images, but never
    narrower than Wilson's: a variance estimated from few images, or few errors, is too small.
    """
    n, k = correct.shape[1], len(correct)
    wilson_low, wilson_high = (100 * end for end in wilson(correct.sum() / k, n))
    if k == 1:
        return wilson_low, wilson_high
    top1, counts = 100 * correct.mean(1), np.ones(n, int)
    fixed, mean = _variance_of_mean(correct.mean(0), counts, 0.25), float(top1.mean())
    per_image, between = _per_image_variance(correct, counts), float(top1.var(ddof=1))
    half = NormalMixture.of_seeds(fixed, 1 / k, per_image, between, k - 1).half_width(1 - LEVEL)
    return max(0.0, min(wilson_low, mean - half)), min(100.0, max(wilson_high, mean + half))
