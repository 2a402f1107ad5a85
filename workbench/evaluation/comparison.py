"""Which recipe is better, and could it be luck? From run folders alone.

    found = compare(["runs/a-seed0", "runs/a-seed1", "runs/b-seed0", "runs/b-seed1"])
    found.table                             # a row per recipe
    print(*found.sentences(), sep="\n")     # each against the first, and what is not alike

Runs whose recipes differ in the seed alone are one recipe. What counts is the last evaluation of a
run, never the best of its epochs: that was chosen on the images it would be judged by. Points are
percentage points of top-1.
"""

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from workbench.recipe import Recipe, inactive_options, runtime_only
from workbench.runs import Run, RunError

LEVEL, POWER = 0.95, 0.8  # of every interval; of what is called detectable
TARGET = 0.5  # points: what "how many more seeds" is asked for
SMALL = 1.0  # points: an unproven difference from here on is called large
SMALLEST = 1e-16  # of p: below it a model's tail says nothing
QUANTILE = NormalDist().inv_cdf  # scipy would take a second to import
TYPICAL_SEED_SD = 0.3  # points: seeds of half of all recipes move top-1 by less
SEED_SD = np.geomspace(0.003, 300, 80)  # points: standard deviations that are weighed
BINS = 15  # of the reliability diagram
SEEN = ("image_size", "val_image_size", "val_resize", "interpolation")  # how an image is judged


LEFT_OUT = "is left out"
ALL_RAW = "raw weights are compared: no run kept an average (EMA)"
LEGEND = (
    "top1 and top5 in percent; low to high is the 95 % interval of top1 over what `interval` says; "
    "ece the calibration error, 0 to 1; differs: an option's value (that of the first recipe; "
    "idle: "
    "unused)"
)


class ComparisonError(RuntimeError):
    """These runs cannot be compared; the text says which, why and what to do."""


# ---- statistics; answers are arrays of bool (runs, images), right or wrong


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value that two runs are equally good.

    Of the images that only one of them gets right, `only_a` and `only_b`, each would be either's
    with probability 1/2. McNemar 1947; Dietterich 1998, section 3.1.
    """
    n = only_a + only_b
    term = total = 1
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**n)


def wilson(count: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a proportion, 0 to 1 (Wilson 1927)."""
    z, share = QUANTILE((1 + level) / 2), count / n
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / n / 2) ** 2)
    low, high = (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
    return max(0.0, low), min(1.0, high)  # rounding may leave -1e-19 of 0


def _crossing(f: Callable[[float], float], low: float, high: float) -> float:
    """Where f, which decreases, crosses 0 between low and high."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return (low + high) / 2


def tango(only_a: int, only_b: int, images: int, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of top-1 of b less that of a for one run each, in points.

    What the score test of paired proportions does not reject, never of width 0 (Tango 1998).
    """
    n, found = images, (only_b - only_a) / images
    z = QUANTILE((1 + level) / 2)

    def score(d: float) -> float:
        half = (only_a + only_b - (2 * n - only_b + only_a) * d) / 2
        q = (half + math.sqrt(half**2 + 2 * n * only_a * d * (1 - d))) / (2 * n)  # P(only a | d)
        return (only_b - only_a - n * d) / math.sqrt(n * max(2 * q + d * (1 - d), 1e-300))

    end = 1 - 1e-12
    low = _crossing(lambda d: score(d) - z, -end, found) if found > -end else -1.0
    high = _crossing(lambda d: score(d) + z, found, end) if found < end else 1.0
    return 100 * low, 100 * high


@dataclass(frozen=True)
class Difference:
    """Top-1 of b less that of a in points, one of `comparisons` made at once.

    Each interval is at 1 - (1 - LEVEL) / comparisons, so that all hold at once with probability
    LEVEL (Bonferroni). It leaves out 0 exactly where `adjusted` is below 1 - LEVEL.
    """

    points: float
    low: float
    high: float
    p: float  # of this comparison alone, at least SMALLEST
    seeds: tuple[int, int]  # of a and of b
    images: int
    detectable: float  # points: the difference that these runs find with probability POWER
    adjusted: float  # p for all comparisons: Holm's, of a single `difference` Bonferroni's
    comparisons: int = 1
    spread: "Spread | None" = None  # None for one run each

    def with_adjusted(self, p: float) -> "Difference":
        """This difference with its adjusted p.

        A test that is significant settles the sign: where the interval still holds 0, its end moves
        to half an image beside 0, as in the intervals that belong to Holm's test (Guilbaud 2008).
        """
        low, high, edge = self.low, self.high, 50 / self.images
        if p < 1 - LEVEL and low <= 0 <= high:
            low, high = (edge, high) if self.points > 0 else (low, -edge)
        return replace(self, low=low, high=high, adjusted=p)

    def seeds_wanted(self, points: float, most: int = 1000) -> int | None:
        """The least seeds of each recipe that detect a difference; None where `most` do not."""
        s, alpha = self.spread, (1 - LEVEL) / self.comparisons
        if s is None:
            return None
        between = s.floor + _errors(0.0, 1.0, s.floor, s.between, s.df).median() ** 2
        then = lambda k: replace(s, between=between, df=2 * k - 2).errors(k, k)
        enough = lambda k: then(k).detectable(alpha) <= points
        return bisect.bisect_left(range(2, most), True, key=enough) + 2 if enough(most) else None


def difference(
    a: np.ndarray, b: np.ndarray, comparisons: int = 1, counts: np.ndarray | None = None
) -> Difference:
    """What answers (runs, images) of two recipes to the same images say of their top-1.

    With one run each it is McNemar's exact p and Tango's interval: about these two networks, for
    other images. Where the two disagree about 0, the interval's end moves to the test's side.
    With several runs of either, runs are the unit, p and interval are for other seeds and other
    images, as `Spread` says. `counts`: how many images a column stands for, 1 if not given.
    """
    counts = np.ones(a.shape[1], int) if counts is None else counts
    seeds, n, alpha = (len(a), len(b)), int(counts.sum()), (1 - LEVEL) / comparisons
    points = float(100 * ((b @ counts).mean() - (a @ counts).mean()) / n)
    if seeds == (1, 1):
        only_a, only_b = int(counts[a[0] & ~b[0]].sum()), int(counts[b[0] & ~a[0]].sum())
        p, spread = mcnemar(only_a, only_b), None
        low, high = tango(only_a, only_b, n, 1 - alpha)
        if p >= alpha:
            low, high = min(low, 0.0), max(high, 0.0)
        reach = (high - low) / 2 * (1 - QUANTILE(POWER) / QUANTILE(alpha / 2))
    else:
        spread = Spread.of(a, b, counts)
        errors = spread.errors(*seeds)
        half, p, reach = errors.half(alpha), errors.p(points), errors.detectable(alpha)
        low, high = max(-100.0, points - half), min(100.0, points + half)
    p, adjusted = min(1.0, max(p, SMALLEST)), min(1.0, max(p, SMALLEST) * comparisons)
    found = Difference(points, low, high, p, seeds, n, float(reach), adjusted, comparisons, spread)
    return found.with_adjusted(adjusted)


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted for len(p) comparisons made at once: Holm 1979, step down."""
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate([(len(p) - i) * p[k] for i, k in enumerate(order)])
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted.tolist()


@dataclass(frozen=True)
class ErrorMixture:
    """How far an estimate in points may lie from the truth: normal distributions, weighted."""

    weights: np.ndarray
    errors: np.ndarray  # the standard error of each

    def p(self, points: float) -> float:
        """The two-sided probability of an estimate that far from the truth."""
        ratios = abs(points) / math.sqrt(2) / self.errors
        return float(self.weights @ [math.erfc(ratio) for ratio in ratios.tolist()])

    def half(self, alpha: float) -> float:
        """Half the width of the interval that leaves out the truth with probability alpha."""
        top = math.sqrt(float(self.weights @ self.errors**2) / alpha)  # Chebyshev
        return _crossing(lambda h: self.p(h) - alpha, 0.0, top)

    def median(self) -> float:
        return float(self.errors[np.searchsorted(self.weights.cumsum(), 0.5)])

    def detectable(self, alpha: float) -> float:
        """The difference found with probability POWER, if the error is the median one."""
        return self.half(alpha) + QUANTILE(POWER) * self.median()


@dataclass(frozen=True)
class Spread:
    """What else than the recipes the difference of their top-1 comes from: variances in points^2.

    - Per-image variance, the mean over images of p (1 - p) / n, is known well from how often runs
      of a recipe disagree. It is most of what seeds of fully trained networks differ by (Jordan,
      arXiv 2304.01910), and a floor however well two values of top-1 agree.
    - So is the interaction of recipe and image: the variance over images of the difference, less
      that floor (Clark 1973). Both count one image more, on which all disagree.
    - The seeds' own variance is known badly: two runs leave a degree of freedom or two. Its root
      has a half-Cauchy prior (Gelman 2006) of median TYPICAL_SEED_SD points, the same for both
      recipes, updated by the variance between runs. The error is a mixture over that posterior.

    Welch's t takes the variance between runs as it comes: it finds little with two runs, and
    anything where they agree by luck. A moderated t (Smyth 2004), 3 degrees of freedom at 3 times
    the floor, finds less on 500 images, where no seed moves top-1 by as much as the floor. What
    the prior costs: where seeds do move it by a point on 10,000 images, 2 + 2 runs claim a
    difference that is none in 11 % of cases, 5 + 5 in 6.5 % (benchmarks/verdict.py).
    """

    images: float  # the interaction's, of the difference
    floor: float  # per-image variance of a run
    between: float  # between runs, with the floor; pooled over the recipes with several runs
    df: int  # of `between`

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> "Spread":
        """From what `difference` takes; one of them has two runs or more."""
        several = [right for right in (a, b) if len(right) > 1]
        n, df = counts.sum(), sum(len(right) - 1 for right in several)
        between = sum((100 * (r @ counts) / n).var() * len(r) for r in several) / df
        floor = sum(_per_image_variance(r, counts) * (len(r) - 1) for r in several) / df
        whole = _variance_of_mean(b.mean(0) - a.mean(0), counts, 1.0)
        return cls(max(0.0, whole - floor * (1 / len(a) + 1 / len(b))), floor, between, df)

    def errors(self, runs_a: int, runs_b: int) -> ErrorMixture:
        """How far the difference of so many runs may lie from the truth."""
        share = 1 / runs_a + 1 / runs_b
        return _errors(self.images + self.floor * share, share, self.floor, self.between, self.df)


def _errors(fixed: float, share: float, floor: float, between: float, df: int) -> ErrorMixture:
    """Of an estimate with the variance `fixed` and `share` of the seeds', as `Spread` says."""
    variance = floor + SEED_SD**2
    log = -df / 2 * (np.log(variance) + between / variance)
    log += np.log(SEED_SD / (1 + (SEED_SD / TYPICAL_SEED_SD) ** 2))  # of the logarithm of SEED_SD
    weights = np.exp(log - log.max())
    return ErrorMixture(weights / weights.sum(), np.sqrt(fixed + share * SEED_SD**2))


def _variance_of_mean(values: np.ndarray, counts: np.ndarray, more: float) -> float:
    """The variance of the mean of values over images, in points^2; `more` is one more square."""
    n = counts.sum()
    squares = (values - values @ counts / n) ** 2
    return 1e4 * float(squares @ counts + more) / (n + 1) / n


def _per_image_variance(right: np.ndarray, counts: np.ndarray) -> float:
    """The variance of a run's top-1 that images alone explain, in points^2; never 0."""
    n, k, share = counts.sum(), len(right), right.mean(0)
    return 1e4 * float(share * (1 - share) @ counts * k / (k - 1) + 0.25) / (n + 1) / n


def top1_interval(right: np.ndarray) -> tuple[float, float]:
    """A recipe's interval in percent: of one run Wilson's, of several as `Spread` has it."""
    n, k = right.shape[1], len(right)
    if k == 1:
        low, high = wilson(int(right.sum()), n)
        return 100 * low, 100 * high
    top1, counts = 100 * right.mean(1), np.ones(n, int)
    fixed, mean = _variance_of_mean(right.mean(0), counts, 0.25), float(top1.mean())
    floor = _per_image_variance(right, counts)
    half = _errors(fixed, 1 / k, floor, float(top1.var(ddof=1)), k - 1).half(1 - LEVEL)
    return max(0.0, mean - half), min(100.0, mean + half)


def reliability(predictions: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """images, confidence (mean p1) and top1 (both 0 to 1) by bins of p1 of equal width.

    Guo et al., arXiv 1706.04599, section 2. Rows are indexed by the upper edge of the bin; a bin
    without images has no row.
    """
    p, right = predictions.p1.to_numpy(float), (predictions.class1 == predictions.label).to_numpy()
    place = np.clip(np.ceil(p * bins).astype(int), 1, bins)
    frame = pd.DataFrame({"confidence": p, "top1": right.astype(float)})
    table = frame.groupby(place / bins).mean()
    table.insert(0, "images", frame.groupby(place / bins).size())
    return table.rename_axis("up to")


def calibration_error(predictions: pd.DataFrame, bins: int = BINS) -> float:
    """Expected calibration error, 0 to 1: the mean distance of confidence from top-1 over bins."""
    table = reliability(predictions, bins)
    gaps = (table.confidence - table.top1).abs()
    return float((gaps * table.images).sum() / table.images.sum())


# ---- runs


@dataclass(eq=False)
class Group:
    """The runs of one recipe, which differ in the seed alone."""

    name: str
    runs: list[Run]
    recipe: dict[str, Any] = field(repr=False)
    predictions: list[pd.DataFrame] = field(repr=False)  # a frame per run, of the same images
    right: np.ndarray = field(repr=False)  # bool (runs, images)
    seeds: list[int]

    @property
    def top1(self) -> np.ndarray:
        """Percent, float (runs,)."""
        return 100 * self.right.mean(1)

    @functools.cached_property
    def tables(self) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
        """(steps, metrics) of every run, read once."""
        return [(run.steps(), run.metrics()) for run in self.runs]

    @functools.cached_property
    def unfinished(self) -> bool:
        """Whether a run is still to go on."""
        return any(run.status()["state"] != "finished" for run in self.runs)

    @property
    def answers(self) -> np.ndarray:
        """The class most of its runs give to each image, of equally many the lowest: (n,)."""
        votes = np.stack([f.class1.to_numpy() for f in self.predictions])
        counts = (votes[:, None] == votes).sum(1)
        return np.where(counts == counts.max(0), votes, votes.max()).min(0)


@dataclass(frozen=True)
class Verdict:
    """One recipe against another; printed it is one sentence."""

    name: str
    against: str
    found: Difference
    unfinished: bool = False  # a run of either is still to go on

    @property
    def real(self) -> bool:
        """Whether the difference is more than luck, at 1 - LEVEL over all comparisons."""
        return self.found.adjusted < 1 - LEVEL

    def __str__(self) -> str:
        text = self._sentence()
        return f"so far, before the end of every run: {text}" if self.unfinished else text

    def _sentence(self) -> str:
        d, size, single = self.found, abs(self.found.points), self.found.seeds == (1, 1)
        word = f"{self.name} is {'worse' if d.points < 0 else 'better'} than {self.against}"
        both, reach = f"{self.name} and {self.against}", max(-d.low, d.high)
        if self.real:
            only = "; that is about these two runs: another seed of each shows the recipes"
            return f"{word} by {size:.2f} points ({self._numbers()}){only if single else ''}"
        if size >= SMALL:
            text = f"a large difference that is not proven: {word} by {size:.2f} points"
        elif reach < SMALL:
            text = f"{both} are within {reach:.2f} points: {d.points:+.2f}"
        else:
            text = f"undecided between {both}: {d.points:+.2f} points"
        text += f" ({self._numbers()}); a difference of {d.detectable:.2f} would have shown"
        if single:
            return f"{text}, and nothing about other seeds"
        wanted = d.seeds_wanted(TARGET)
        if wanted is None:
            return f"{text}; {TARGET} points need more images, no number of seeds shows them"
        more = f"; {wanted} seeds of each would show {TARGET} points"
        return text + more * (d.detectable > TARGET)

    def _numbers(self) -> str:
        """Interval, p, runs and images; "worse by" turns the signs of the interval round."""
        d, (theirs, ours) = self.found, self.found.seeds
        turned = d.points < 0 and (self.real or d.points <= -SMALL)
        low, high = (-d.high, -d.low) if turned else (d.low, d.high)
        less = "< " if d.p <= SMALLEST else ""
        text = f"{100 * LEVEL:.0f} % interval {low:.2f} to {high:.2f}, p {less}{_p(d.p)}"
        if d.comparisons > 1:
            text += f", {less}{_p(d.adjusted)} adjusted for {d.comparisons} comparisons"
        if ours == theirs == 1:
            return f"{text}, one run each on {d.images:,} images"
        seeds = f"{ours} seed{'s' * (ours > 1)} of {self.name} and {theirs} of {self.against}"
        seeds = f"{ours} seeds each" if ours == theirs else seeds
        return f"{text}, {seeds}, {d.images:,} images"


def _p(p: float) -> str:
    if 0.045 <= p < 0.055:  # not rounded to the other side of 0.05
        return f"{p:.3g}"
    return f"{p:.1g}" if p < 0.095 else f"{p:.2f}"


@dataclass(eq=False)
class Comparison:
    """What compare returns: groups in the order given, their table, verdicts and flags."""

    groups: list[Group]
    verdicts: list[Verdict]  # each recipe against the first
    flags: list[str]  # sentences: what is not like with like
    images: pd.DataFrame = field(repr=False)  # file, list, label of every image judged
    classes: list[str] = field(repr=False)

    def sentences(self) -> list[str]:
        """Verdicts and flags as text, in this order; what to do where there is one recipe."""
        if not self.verdicts:
            return [f"one recipe, {self.groups[0].name}: nothing to compare it with", *self.flags]
        fair = lambda flag: LEFT_OUT in flag or flag == ALL_RAW
        unlike = lambda flag: flag if fair(flag) else f"not like with like: {flag}"
        return [*map(str, self.verdicts), *map(unlike, self.flags)]

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """A row per recipe, top-1 with its interval first, `differs` in it from the first last.

        low and high are the 95 % interval of the mean over other seeds and images, of a single
        run over other images; `interval` says which. ece is 0 to 1, minutes those of a run.
        """
        return pd.DataFrame([_row(g, self.groups[0]) for g in self.groups])

    def group(self, name: str) -> Group:
        """The recipe of a name. Raises ComparisonError."""
        for group in self.groups:
            if group.name == name:
                return group
        names = ", ".join(g.name for g in self.groups)
        raise ComparisonError(f"no recipe {name!r} here; there are {names}")

    def flips(self, name: str, against: str) -> pd.DataFrame:
        """The images whose answer changes: right by more or fewer of the runs than before.

        file, list, label, before and after (the class most runs give), right_before and right_after
        (share of the runs), change; the largest changes first, in the order of the list.
        """
        new, old = self.group(name), self.group(against)
        frame = self.images.copy()
        frame["before"], frame["after"] = old.answers, new.answers
        frame["right_before"], frame["right_after"] = old.right.mean(0), new.right.mean(0)
        frame["change"] = frame.right_after - frame.right_before
        order = frame.change.abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].query("change != 0")

    def by_class(self) -> pd.DataFrame:
        """class, images, and a column of top-1 in percent for every recipe, means over its runs."""
        labels = self.images.label.to_numpy()
        counts = np.bincount(labels, minlength=len(self.classes))
        table = pd.DataFrame({"class": self.classes, "images": counts})
        for group in self.groups:
            hits = np.bincount(labels, group.right.mean(0), minlength=len(self.classes))
            table[group.name] = 100 * hits / np.where(counts, counts, np.nan)
        return table

    def confusion(self, name: str, against: str, most: int | None = None) -> pd.DataFrame:
        """Counts of predicted (columns) by true classes, the first less the second, per run.

        Of the `most` classes that changed most alone; attrs has the number of all classes.
        """
        count, groups = len(self.classes), (self.group(name), self.group(against))
        pair = lambda frame: frame.label.to_numpy(np.int64) * count + frame.class1.to_numpy()
        found = [np.concatenate([*map(pair, group.predictions)]) for group in groups]
        pairs, place = np.unique(np.concatenate(found), return_inverse=True)
        ours, theirs = (
            np.bincount(part, minlength=len(pairs)) / len(group.runs)
            for part, group in zip(np.split(place, [len(found[0])]), groups, strict=True)
        )
        changes, (true, said) = ours - theirs, np.divmod(pairs, count)
        moved = sum(np.bincount(side, abs(changes), count) for side in (true, said))
        kept = np.sort(np.argsort(-moved, kind="stable")[:most])
        shown = np.isin(true, kept) & np.isin(said, kept)
        table = np.zeros((len(kept), len(kept)))
        table[tuple(np.searchsorted(kept, x[shown]) for x in (true, said))] = changes[shown]
        names = [self.classes[k] for k in kept]
        frame = pd.DataFrame(table, index=names, columns=names)
        frame.attrs["classes"] = count
        return frame

    def agreement(self) -> pd.DataFrame:
        """The share of the images, in percent, to which two runs give the same answer."""
        answers = {
            run.path.name: frame.class1.to_numpy()
            for group in self.groups
            for run, frame in zip(group.runs, group.predictions, strict=True)
        }
        same = lambda x: {name: 100 * (x == y).mean() for name, y in answers.items()}
        return pd.DataFrame({name: same(x) for name, x in answers.items()}).rename_axis("run")


def usable(root: str | Path) -> tuple[list[Run], dict[str, str]]:
    """The evaluated runs in a folder, newest first, and by name why the others are left out."""
    runs, left_out = [], {}
    for path in sorted(Path(root).glob("*/recipe.yaml")):
        run = Run(path.parent)
        try:
            run.recipe(), run.environment()
            if not run.file("predictions.parquet").exists():
                raise RunError(f"{run.status()['state']}, not evaluated yet")
            runs.append((run.file("predictions.parquet").stat().st_mtime, run))
        except (RunError, OSError) as error:
            left_out[run.path.name] = str(error)
    return [run for _, run in sorted(runs, key=lambda pair: -pair[0])], left_out


def newest_pair(runs: Sequence[Run], against: str = "") -> list[Run]:
    """The runs of the first run's recipe and of its baseline, every seed, in the order given.

    The baseline is the recipe named `against`, or the one that differs in the fewest options; of
    equally near ones the oldest. Only runs validated on the images of the first are considered.
    """
    recipes: dict[str, list[Run]] = {}
    judged = [[run.environment().get(key) for key in ("val_data", "classes")] for run in runs]
    for run in (run for run, its in zip(runs, judged, strict=True) if its == judged[0]):
        recipes.setdefault(_identity(run.recipe()), []).append(run)
    newest, *others = recipes.values() or [[]]
    others = [its for its in others if against in ("", its[0].recipe().get("name"))]
    distance = lambda its: len(recipe_difference(its[0].recipe(), newest[0].recipe()))
    baseline = min(reversed(others), key=distance, default=[])
    return [run for run in runs if run in newest or run in baseline]


def compare(
    runs: Iterable[str | Path | Run], *, weights: str = "raw", against: str = ""
) -> Comparison:
    """Runs grouped by recipe, each recipe held against the first, or against the one named.

    `weights` are raw, or ema: those of the average where a run kept one. Raises ComparisonError for
    runs that cannot be read, were never evaluated, or were judged by other images.
    """
    opened = [_Opened(run if isinstance(run, Run) else Run(run), weights) for run in runs]
    if weights not in ("raw", "ema"):
        raise ComparisonError(f"weights {weights!r}; allowed are raw and ema")
    if not opened:
        raise ComparisonError("no run to compare; name two or more run folders")
    opened = list({run.run.path.resolve(): run for run in opened}.values())
    flags: list[str] = []
    images = _same_images(opened, flags)
    groups = _groups(opened, flags)
    if against:
        names = [g.name for g in groups]
        if against not in names:
            raise ComparisonError(f"no recipe {against!r} here; there are {', '.join(names)}")
        groups.insert(0, groups.pop(names.index(against)))
    flags += _unlike(opened, groups, weights)
    first, *others = groups
    found = [difference(first.right, group.right, len(others)) for group in others]
    verdicts = [
        Verdict(g.name, first.name, d.with_adjusted(p), first.unfinished or g.unfinished)
        for g, d, p in zip(others, found, holm([d.p for d in found]), strict=True)
    ]
    return Comparison(groups, verdicts, flags, images, opened[0].classes)


class _Opened:
    """One run, read once."""

    def __init__(self, run: Run, weights: str):
        self.run, self.name = run, run.path.name
        if not run.file("recipe.yaml").exists():
            raise ComparisonError(f"{run.path} is no run folder; name some, such as runs/*")
        try:
            defaults = {k: f.default for k, f in Recipe.model_fields.items()}
            self.recipe = defaults | run.recipe()  # a run of an older version knows fewer options
            self.environment, self.status = run.environment(), run.status()
            frame = run.predictions()
        except (RunError, OSError, ValueError) as error:
            text = str(error) if isinstance(error, RunError) else f"{run.path}: {error}"
            raise ComparisonError(f"{text}; leave it out, or train it further") from None
        missing = {"file", "label", "class1", "p1", "weights"} - set(frame)
        if missing or frame.empty:
            raise ComparisonError(f"{run.path}: predictions.parquet holds no {sorted(missing)}")
        kept = frame.weights.unique().tolist()
        self.weights = weights if weights in kept else "raw"
        if kept != [self.weights]:
            frame = frame[frame.weights == self.weights].reset_index(drop=True)
        self.predictions = frame
        if "list" not in self.predictions:
            self.predictions["list"] = 0
        count = int(max(self.predictions.label.max(), self.predictions.class1.max())) + 1
        self.classes = self.environment.get("classes") or [str(i) for i in range(count)]


def _identity(recipe: Mapping[str, Any]) -> str:
    """What makes it a recipe: every option but the seed and the place."""
    recipe = {k: f.default for k, f in Recipe.model_fields.items()} | dict(recipe)
    return repr(sorted((k, v) for k, v in recipe.items() if k not in runtime_only and k != "seed"))


def _same_images(opened: list[_Opened], flags: list[str]) -> pd.DataFrame:
    """Aligns all predictions to the images that every run has; raises where they are others."""
    first = opened[0]
    key = ["list", "file"]
    common = first.predictions[[*key, "label"]]
    for other in opened[1:]:
        if other.classes != first.classes:
            theirs, ours = len(other.classes), len(first.classes)
            how = f"{theirs} classes and {ours}" if theirs != ours else (
                "classes of other names or in another order")  # fmt: skip
            raise ComparisonError(
                f"{other.name} and {first.name} have {how}; compare runs of one data set"
            )
        theirs, ours = (o.environment.get("val_data") for o in (other, first))
        if theirs and ours and theirs != ours:
            raise ComparisonError(
                f"{other.name} was validated on other images than {first.name} (fingerprints "
                f"{theirs} and {ours}); train or evaluate both on one list"
            )
        frame = other.predictions[[*key, "label"]]
        if frame.equals(common):
            continue
        both = common.merge(frame, on=key, suffixes=("", "_there"))
        alike = int((both.label == both.label_there).sum())
        if alike < max(len(both), 0.99 * max(len(common), len(frame))):
            raise ComparisonError(
                f"{other.name} was validated on other images than {first.name}: of "
                f"{len(frame):,} and {len(common):,} files {len(both):,} have the same name, "
                f"{alike:,} the same label too; compare runs of one validation list"
            )
        common = both[[*key, "label"]]
    for one in opened:
        if len(one.predictions) > len(common):
            lost = len(one.predictions) - len(common)
            flags.append(f"{one.name}: {lost:,} images are left out that others do not have")
        if not one.predictions[key].equals(common[key]):
            one.predictions = common[key].merge(one.predictions, on=key, validate="one_to_one")
    if len(opened) > 1 and not all("val_data" in one.environment for one in opened):
        flags.append(
            "that the validation images are the same is known by their names alone: a run of an "
            "older version keeps no fingerprint of them"
        )
    return common.reset_index(drop=True)


def _groups(opened: list[_Opened], flags: list[str]) -> list[Group]:
    members: dict[str, list[_Opened]] = {}
    for one in opened:
        members.setdefault(_identity(one.recipe), []).append(one)
    groups: list[Group] = []
    for alike in members.values():
        kept: dict[Any, _Opened] = {}
        for one in sorted(alike, key=lambda one: one.status["state"] != "finished"):
            first = kept.setdefault(one.recipe["seed"], one)
            if first is one:
                continue
            why = f"it is {first.name} again, with the same seed"
            if one.status["state"] != first.status["state"]:
                why += f", and has not finished ({one.status['state']})"
            elif not one.predictions.class1.equals(first.predictions.class1):
                why += ", and other predictions, as another machine or number of threads gives them"
            flags.append(f"{one.name} {LEFT_OUT}: {why}")
        ones = [kept[seed] for seed in sorted(kept, key=str)]
        name = str(ones[0].recipe["name"])
        while name in [g.name for g in groups]:  # another recipe under the same name
            name = ones[0].name if name != ones[0].name else f"{name} again"
        right = np.stack([(o.predictions.class1 == o.predictions.label).to_numpy() for o in ones])
        frames, seeds = [o.predictions for o in ones], [o.recipe["seed"] for o in ones]
        groups.append(Group(name, [o.run for o in ones], ones[0].recipe, frames, right, seeds))
    return groups


def _unlike(opened: list[_Opened], groups: list[Group], weights: str) -> list[str]:
    """Sentences on what makes a comparison less than like with like."""
    flags = []
    kinds = {one.weights for one in opened}
    if weights == "ema":
        raw = [one.name for one in opened if one.weights == "raw"]
        if kinds == {"raw"}:
            flags.append(ALL_RAW)
        if len(kinds) > 1:
            flags.append(f"averaged weights (EMA) against raw ones: {_few(raw)} kept no average")
    for one in opened:
        if one.status["state"] != "finished":
            metrics = one.run.metrics()
            at = int(metrics.epoch.iloc[-1]) if len(metrics) else 0
            flags.append(
                f"{one.name} is {one.status['state']}, judged at epoch {at} of "
                f"{one.recipe['epochs']}"
            )
    first = groups[0]
    for group in groups[1:]:
        for key in SEEN:
            ours, theirs = group.recipe[key], first.recipe[key]
            if ours != theirs:
                flags.append(
                    f"{group.name} sees validation images otherwise than {first.name}: {key} "
                    f"{_value(ours)} against {_value(theirs)}"
                )
        if group.recipe["epochs"] != first.recipe["epochs"]:
            flags.append(
                f"{group.name} was trained for {group.recipe['epochs']} epochs, {first.name} for "
                f"{first.recipe['epochs']}"
            )
    trained = {one.environment.get("data") for one in opened} - {None}
    if len(trained) > 1:
        flags.append("the training images differ between runs")
    return flags


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---- the table


def _row(group: Group, first: Group) -> dict[str, Any]:
    top1, (low, high) = group.top1, top1_interval(group.right)
    mean, sd = float(top1.mean()), float(top1.std(ddof=1)) if len(top1) > 1 else math.nan
    environments = [run.environment() for run in group.runs]
    speeds = [_median(steps, "images_per_second") for steps, _ in group.tables]
    minutes = [e.get("seconds", math.nan) / 60 for e in environments]
    devices = {str(e.get("device", "")) for e in environments}
    top5 = [_top5(f) for f in group.predictions]
    return {
        "recipe": group.name,
        "top1": mean,
        "sd": sd,
        "low": low,
        "high": high,
        "interval": "seeds and images" if len(top1) > 1 else "images",
        "seeds": len(top1),
        "images": group.right.shape[1],
        "top5": float(np.mean(top5)),
        "ece": float(np.mean([calibration_error(f) for f in group.predictions])),
        "epochs": _epochs(group),
        "minutes": float(np.mean(minutes)),
        "img/s": float(np.mean(speeds)),
        "device": " / ".join(sorted(devices)),
        "differs": ", ".join(recipe_difference(first.recipe, group.recipe).values()),
    }


def _epochs(group: Group) -> int | str:
    """Those of the recipe; "6 of 20" where a run has only come so far."""
    whole = group.recipe["epochs"]
    done = min(int(m.epoch.iloc[-1]) if len(m) else 0 for _, m in group.tables)
    return f"{done} of {whole}" if group.unfinished else whole


def _top5(frame: pd.DataFrame) -> float:
    ranks = [c for c in frame.columns if c.startswith("class")]
    return 100 * float((frame[ranks].to_numpy() == frame.label.to_numpy()[:, None]).any(1).mean())


def _median(frame: pd.DataFrame, column: str) -> float:
    return float(frame[column].median()) if column in frame else math.nan


def recipe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two recipes, by option: "lr 0.2 (0.1)", the former in brackets."""
    told = _differing([before, now])
    return {key: f"{key} {ours} ({theirs})" for key, (theirs, ours) in told.items()}


def _differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Options that differ between recipes, as text; one without effect beside others is "idle".

    An option that stands at its default wherever it is not idle is left out: what makes it idle in
    the one and not in the other is another option, which is told.
    """
    idle = [inactive_options(recipe) for recipe in recipes]
    found = {}
    for key in recipes[-1]:
        values = [recipe.get(key) for recipe in recipes]
        shown = ["idle" if key in its else _value(v) for v, its in zip(values, idle, strict=True)]
        used = [v for v, its in zip(values, idle, strict=True) if key not in its]
        field = Recipe.model_fields.get(key)
        plain = len(used) < len(values) and field and all(v == field.default for v in used)
        if key not in runtime_only and key != "seed" and len(set(shown)) > 1 and not plain:
            found[key] = shown
    return found


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def options(groups: Sequence[Group]) -> pd.DataFrame:
    """The options that differ between recipes, a row each, as text; empty for one recipe."""
    rows = _differing([group.recipe for group in groups])
    table = pd.DataFrame.from_dict(rows, "index", columns=[group.name for group in groups])
    return table.rename_axis("option")


MEASURES = {  # of curves: (table, column, unit)
    "top-1": ("metrics", "top1", "validation top-1 (%)"),
    "top-1, EMA": ("metrics", "ema_top1", "validation top-1 of averaged weights (%)"),
    "top-5": ("metrics", "top5", "validation top-5 (%)"),
    "validation loss": ("metrics", "val_loss", "validation loss (nats)"),
    "training loss": ("metrics", "train_loss", "training loss (nats)"),
    "loss by step": ("steps", "loss", "training loss (nats)"),
    "lr": ("steps", "lr", "lr"),
    "speed": ("steps", "images_per_second", "images per second"),
    "waiting": ("steps", "data_wait", "share of the time waiting for data"),
}
AXES = {"epoch": "epoch", "step": "step", "minutes": "minutes of training"}


def curves(
    groups: Sequence[Group], measure: str = "top-1", by: str = "epoch"
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(recipe, x, y) of every run that has the measure, one of MEASURES; `by` one of AXES."""
    table, column, _ = MEASURES[measure]
    lines = []
    for group in groups:
        for steps, metrics in group.tables:
            frame = steps if table == "steps" else metrics
            if column not in frame:
                continue
            frame = frame.dropna(subset=[column])
            x = frame.step.to_numpy(float)
            if by == "epoch":
                x = x * (metrics.epoch.iloc[-1] / metrics.step.iloc[-1] if len(metrics) else 1.0)
            elif by == "minutes" and len(steps):
                x = np.interp(x, steps.step, steps.seconds / 60)
            lines.append((group.name, x, frame[column].to_numpy(float)))
    return lines


def markdown(table: pd.DataFrame, digits: int = 2) -> str:
    """A table as Markdown, floats with `digits`, nothing for what is not known."""
    cell = lambda v: (
        "" if v is None or v != v else f"{v:.{digits}f}" if isinstance(v, float) else str(v)
    )
    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[cell(v).replace("|", "\\|") for v in row] for row in table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
