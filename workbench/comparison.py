"""Which recipe is better, and could it be luck? From run folders alone.

    found = compare(["runs/a-seed0", "runs/a-seed1", "runs/b-seed0", "runs/b-seed1"])
    found.table                             # a row per recipe
    print(*found.sentences(), sep="\n")     # each against the first, and what is not alike

Runs whose recipes differ in the seed alone are one recipe. What counts is the last evaluation of a
run, never the best of its epochs: that was chosen on the pictures it would be judged by. Points are
percentage points of top-1.
"""

import bisect
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from workbench.recipe import PLACE, Recipe, without_effect
from workbench.runs import Run, RunError

LEVEL, POWER = 0.95, 0.8  # of every interval; of what is called detectable
TARGET = 0.5  # points: what "how many more seeds" is asked for
BINS = 15  # of the reliability diagram
SEEN = ("image_size", "val_image_size", "val_resize", "interpolation")  # how a picture is judged


LEFT_OUT = "is left out"
LEGEND = (
    "top1 and top5 in percent; low to high is the 95 % interval of top1, over seeds or pictures; "
    "ece the calibration error, 0 to 1; differs: a knob's value (that of the first recipe; idle: "
    "unused)"
)


class ComparisonError(RuntimeError):
    """These runs cannot be compared; the text says which, why and what to do."""


# ---- statistics; answers are arrays of bool (runs, pictures), right or wrong


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value that two runs are equally good.

    Of the pictures that only one of them gets right, `only_a` and `only_b`, each would be either's
    with probability 1/2. McNemar 1947; Dietterich 1998, section 3.1.
    """
    n = only_a + only_b
    return float(stats.binomtest(only_a, n).pvalue) if n else 1.0


def bootstrap(only_a: int, only_b: int, pictures: int, draws: int = 10_000) -> tuple[float, float]:
    """The paired bootstrap interval of top-1 of b less that of a, in points.

    Percentiles over `draws` lists drawn from the pictures with replacement. A picture counts -1, 0
    or 1, so the three counts of a list are multinomial and no list has to be made.
    """
    shares = np.array([only_a, only_b, pictures - only_a - only_b]) / pictures
    counts = np.random.default_rng(0).multinomial(pictures, shares, size=draws)
    points = 100 * (counts[:, 1] - counts[:, 0]) / pictures
    low, high = np.quantile(points, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Top-1 of b less that of a in points, its interval and p."""

    points: float
    low: float
    high: float
    p: float
    seeds: tuple[int, int]
    pictures: int
    error: float  # its standard error, in points
    df: float  # degrees of freedom
    spread: "Spread | None" = None  # None for one run each

    @property
    def detectable(self) -> float:
        """The difference, in points, that these runs find with probability POWER."""
        return _detectable(self.error, self.df)

    def seeds_wanted(self, points: float) -> int | None:
        """The seeds of each recipe that detect a difference; None where no number does."""
        return self.spread and self.spread.seeds_wanted(points)


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """What answers (runs, pictures) of two recipes to the same pictures say of their top-1.

    With one run each it is McNemar's p and a paired bootstrap: about these two networks, for other
    pictures. With several, runs are the unit: a t interval for other seeds and other pictures.
    """
    if len(a) == len(b) == 1:
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        n = a.shape[1]
        low, high = bootstrap(only_a, only_b, n)
        error = 100 * math.sqrt(only_a + only_b) / n
        points = 100 * (only_b - only_a) / n
        return Difference(points, low, high, mcnemar(only_a, only_b), (1, 1), n, error, math.inf)
    spread = Spread.of(a, b)
    points = 100 * float(b.mean() - a.mean())
    error, df = spread.error(len(a), len(b))
    if error == 0:
        p, half = float(points == 0), 0.0
    else:
        p = 2 * float(stats.t.sf(abs(points) / error, df))
        half = error * float(stats.t.ppf((1 + LEVEL) / 2, df))
    seeds, n = (len(a), len(b)), a.shape[1]
    return Difference(points, points - half, points + half, p, seeds, n, error, df, spread)


@dataclass(frozen=True)
class Spread:
    """Variances of the top-1 of two recipes, in points^2: of a run of each, and of the pictures.

    A run's comes from its seed and its luck on single pictures. The pictures' comes from those that
    suit one recipe and not the other: other pictures would tell another difference, however many
    seeds there are. What luck on single pictures puts into it is taken out, as in an analysis of
    variance with runs and pictures crossed (Clark 1973, for subjects and words).
    """

    a: float
    b: float
    pictures: float
    df_pictures: int

    @classmethod
    def of(cls, a: np.ndarray, b: np.ndarray) -> "Spread":
        """From answers (runs, pictures); of a recipe with one run, its rival's variance is taken.

        Raises ComparisonError where neither has two runs.
        """
        if max(len(a), len(b)) < 2:
            raise ComparisonError("one run of each recipe says nothing about other seeds")
        n = a.shape[1]
        runs, luck = {}, {}
        for name, right in (("a", a), ("b", b)):
            if len(right) > 1:
                runs[name] = 1e4 * float(right.mean(1).var(ddof=1))
                luck[name] = 1e4 * float(right.var(0, ddof=1).mean())
        for some, other in (("a", "b"), ("b", "a")):
            runs.setdefault(some, runs.get(other))
            luck.setdefault(some, luck.get(other))
        whole = 1e4 * float((b.mean(0) - a.mean(0)).var(ddof=1)) if n > 1 else 0.0
        pictures = max(0.0, whole - luck["a"] / len(a) - luck["b"] / len(b)) / n
        return cls(runs["a"], runs["b"], pictures, max(1, n - 1))

    def error(self, runs_a: int, runs_b: int) -> tuple[float, float]:
        """The standard error of a difference in points, and its degrees of freedom.

        Welch-Satterthwaite's; with fewer than three runs of a recipe those of the runs alone, since
        a variance of two values is often small by luck and would hand its weight to the pictures.
        """
        if min(runs_a, runs_b) > 1:
            parts = [(self.a / runs_a, runs_a - 1), (self.b / runs_b, runs_b - 1)]
        else:  # one variance for both, from the recipe that has several runs
            parts = [(self.a / runs_a + self.b / runs_b, runs_a + runs_b - 2)]
        variance = self.pictures + sum(v for v, _ in parts)
        if min(runs_a, runs_b) > 2:
            parts.append((self.pictures, self.df_pictures))
        weights = sum(v**2 / df for v, df in parts)
        df = sum(v for v, _ in parts) ** 2 / weights if weights else 1.0
        return math.sqrt(variance), df

    def seeds_wanted(self, points: float, most: int = 1000) -> int | None:
        """The least seeds of each recipe that detect a difference; None when `most` do not."""
        enough = lambda k: _detectable(*self.error(k, k)) <= points
        if not enough(most):
            return None
        return bisect.bisect_left(range(2, most), True, key=enough) + 2


@functools.lru_cache
def _detectable(error: float, df: float) -> float:
    """The difference that a two-sided t-test at 1 - LEVEL finds with probability POWER."""
    if error == 0:
        return 0.0
    if math.isinf(df):
        return error * float(stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER))
    critical = stats.t.ppf((1 + LEVEL) / 2, df)
    missed = lambda shift: stats.nct.sf(critical, df, shift) - POWER
    return error * float(optimize.brentq(missed, 0, 4 * critical + 4))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for having asked len(p) questions: Holm 1979, step down."""
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate([(len(p) - i) * p[k] for i, k in enumerate(order)])
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, steps)
    return adjusted.tolist()


def reliability(predictions: pd.DataFrame, bins: int = BINS) -> pd.DataFrame:
    """pictures, confidence (mean p1) and top1 (both 0 to 1) by bins of p1 of equal width.

    Guo et al., arXiv 1706.04599, section 2. Rows are indexed by the upper edge of the bin; a bin
    without pictures has no row.
    """
    p, right = predictions.p1.to_numpy(float), (predictions.class1 == predictions.label).to_numpy()
    place = np.clip(np.ceil(p * bins).astype(int), 1, bins)
    frame = pd.DataFrame({"confidence": p, "top1": right.astype(float)})
    table = frame.groupby(place / bins).mean()
    table.insert(0, "pictures", frame.groupby(place / bins).size())
    return table.rename_axis("up to")


def calibration_error(predictions: pd.DataFrame, bins: int = BINS) -> float:
    """Expected calibration error, 0 to 1: the mean distance of confidence from top-1 over bins."""
    table = reliability(predictions, bins)
    gaps = (table.confidence - table.top1).abs()
    return float((gaps * table.pictures).sum() / table.pictures.sum())


# ---- runs


@dataclass(eq=False)
class Group:
    """The runs of one recipe, which differ in the seed alone."""

    name: str
    runs: list[Run]
    recipe: dict[str, Any] = field(repr=False)
    predictions: list[pd.DataFrame] = field(repr=False)  # a frame per run, of the same pictures
    right: np.ndarray = field(repr=False)  # bool (runs, pictures)
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
        """The class most of its runs give to each picture, of equally many the lowest: (n,)."""
        votes = np.stack([f.class1.to_numpy() for f in self.predictions])
        return votes[0] if len(votes) == 1 else stats.mode(votes, axis=0).mode


@dataclass(frozen=True)
class Verdict:
    """One recipe against another; printed it is one sentence. p is Holm's where several are."""

    name: str
    against: str
    found: Difference
    p: float
    asked: int  # comparisons made at once
    unfinished: bool = False  # a run of either is still to go on

    @property
    def real(self) -> bool:
        """Whether the difference is more than luck, at 1 - LEVEL."""
        return self.p < 1 - LEVEL

    def __str__(self) -> str:
        text = self._sentence()
        return f"so far, before the end of every run: {text}" if self.unfinished else text

    def _sentence(self) -> str:
        d, (ours, theirs) = self.found, self.found.seeds
        worse = self.real and d.points < 0  # then the sentence turns all signs round
        low, high = (-d.high, -d.low) if worse else (d.low, d.high)
        interval = f"{100 * LEVEL:.0f} % interval {low:.2f} to {high:.2f}, p {_p(self.p)}"
        interval += f" for {self.asked} questions" if self.asked > 1 else ""
        if ours == theirs == 1:
            on = f"{interval}, one run each on {d.pictures:,} pictures"
        else:
            n = f"{ours} seeds" if ours == theirs else f"{ours} and {theirs} seeds"
            on = f"{interval}, {n}, {d.pictures:,} pictures"
        if self.real:
            word = "worse" if worse else "better"
            text = f"{self.name} is {word} than {self.against} by {abs(d.points):.2f} points ({on})"
            if ours == theirs == 1:
                text += "; that is about these two runs: another seed of each shows the recipes"
            return text
        text = f"no difference between {self.name} and {self.against} that these runs can show: "
        text += (
            f"{d.points:+.2f} points ({on}); a difference of {d.detectable:.2f} would have shown"
        )
        if not low <= 0 <= high:
            text += "; a borderline case: the bootstrap's interval leaves out 0, the test does not"
        if ours == theirs == 1:
            return f"{text}, and nothing about other seeds"
        if d.detectable <= TARGET:
            return text
        wanted = d.seeds_wanted(TARGET)
        if wanted is None:
            return f"{text}; {TARGET} points need more pictures, no number of seeds shows them"
        if ours != theirs:
            return f"{text}; {wanted} seeds of each would show {TARGET} points"
        more = max(1, wanted - ours)
        return f"{text}; {more} more seed{'s' * (more > 1)} each would show {TARGET} points"


def _p(p: float) -> str:
    return f"{p:.1g}" if p < 0.095 else f"{p:.2f}"


@dataclass(eq=False)
class Comparison:
    """What compare returns: groups in the order given, their table, verdicts and flags."""

    groups: list[Group]
    verdicts: list[Verdict]  # each recipe against the first
    flags: list[str]  # sentences: what is not like with like
    pictures: pd.DataFrame = field(repr=False)  # file, list, label of every picture judged
    classes: list[str] = field(repr=False)

    def sentences(self) -> list[str]:
        """Verdicts and flags as text, in this order; what to do where there is one recipe."""
        if not self.verdicts:
            return [f"one recipe, {self.groups[0].name}: nothing to compare it with", *self.flags]
        unlike = lambda flag: flag if LEFT_OUT in flag else f"not like with like: {flag}"
        return [*map(str, self.verdicts), *map(unlike, self.flags)]

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """A row per recipe, top-1 with its interval first, `differs` in it from the first last.

        low and high are the 95 % interval of the mean over seeds, of a single run that over
        pictures (Wilson); `interval` says which. ece is 0 to 1, minutes those of a run.
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
        """The pictures whose answer changes: right by more or fewer of the runs than before.

        file, list, label, before and after (the class most runs give), right_before and right_after
        (share of the runs), change; the largest changes first, in the order of the list.
        """
        new, old = self.group(name), self.group(against)
        frame = self.pictures.copy()
        frame["before"], frame["after"] = old.answers, new.answers
        frame["right_before"], frame["right_after"] = old.right.mean(0), new.right.mean(0)
        frame["change"] = frame.right_after - frame.right_before
        order = frame.change.abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].query("change != 0")

    def by_class(self) -> pd.DataFrame:
        """class, images, and a column of top-1 in percent for every recipe, means over its runs."""
        labels = self.pictures.label.to_numpy()
        counts = np.bincount(labels, minlength=len(self.classes))
        table = pd.DataFrame({"class": self.classes, "images": counts})
        for group in self.groups:
            hits = np.bincount(labels, group.right.mean(0), minlength=len(self.classes))
            table[group.name] = 100 * hits / np.where(counts, counts, np.nan)
        return table

    def confusion(self, name: str, against: str) -> pd.DataFrame:
        """Counts of predicted (columns) by true classes, the first less the second, per run."""
        tables = []
        for group in (self.group(name), self.group(against)):
            table = np.zeros((len(self.classes), len(self.classes)))
            for frame in group.predictions:
                np.add.at(table, (frame.label.to_numpy(), frame.class1.to_numpy()), 1)
            tables.append(table / len(group.runs))
        return pd.DataFrame(tables[0] - tables[1], index=self.classes, columns=self.classes)

    def agreement(self) -> pd.DataFrame:
        """The share of the pictures, in percent, to which two runs give the same answer."""
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


def alike(runs: Sequence[Run]) -> list[Run]:
    """Those of the runs that were validated on the pictures of the first, in their order."""
    known = [(e.get("val_data"), e.get("classes")) for e in (run.environment() for run in runs)]
    return [run for run, its in zip(runs, known, strict=True) if its == known[0]]


def compare(
    runs: Iterable[str | Path | Run], *, weights: str = "raw", against: str = ""
) -> Comparison:
    """Runs grouped by recipe, each recipe held against the first, or against the one named.

    `weights` are raw, or ema: those of the average where a run kept one. Raises ComparisonError for
    runs that cannot be read, were never evaluated, or were judged by other pictures.
    """
    opened = [_Opened(run if isinstance(run, Run) else Run(run), weights) for run in runs]
    if weights not in ("raw", "ema"):
        raise ComparisonError(f"weights {weights!r}; allowed are raw and ema")
    if not opened:
        raise ComparisonError("no run to compare; name two or more run folders")
    opened = list({run.run.path.resolve(): run for run in opened}.values())
    flags: list[str] = []
    pictures = _same_pictures(opened, flags)
    groups = _groups(opened, flags)
    if against:
        names = [g.name for g in groups]
        if against not in names:
            raise ComparisonError(f"no recipe {against!r} here; there are {', '.join(names)}")
        groups.insert(0, groups.pop(names.index(against)))
    flags += _unlike(opened, groups, weights)
    found = [difference(groups[0].right, g.right) for g in groups[1:]]
    adjusted = holm([d.p for d in found])
    verdicts = [
        Verdict(g.name, groups[0].name, d, p, len(found), groups[0].unfinished or g.unfinished)
        for g, d, p in zip(groups[1:], found, adjusted, strict=True)
    ]
    return Comparison(groups, verdicts, flags, pictures, opened[0].classes)


class _Opened:
    """One run, read once."""

    def __init__(self, run: Run, weights: str):
        self.run, self.name = run, run.path.name
        if not run.file("recipe.yaml").exists():
            raise ComparisonError(f"{run.path} is no run folder; name some, such as runs/*")
        try:
            defaults = {k: f.default for k, f in Recipe.model_fields.items()}
            self.recipe = defaults | run.recipe()  # a run of an older version knows fewer knobs
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

    @property
    def knobs(self) -> str:
        """What makes it a recipe: every knob but the seed and the place."""
        kept = {k: v for k, v in self.recipe.items() if k not in PLACE and k != "seed"}
        return repr(sorted(kept.items()))


def _same_pictures(opened: list[_Opened], flags: list[str]) -> pd.DataFrame:
    """Aligns all predictions to the pictures that every run has; raises where they are others."""
    first = opened[0]
    key = ["list", "file"]
    common = first.predictions[[*key, "label"]]
    for other in opened[1:]:
        if other.classes != first.classes:
            raise ComparisonError(
                f"{other.name} knows {len(other.classes)} classes, {first.name} "
                f"{len(first.classes)}, or others in another order; compare within one data set"
            )
        theirs, ours = (o.environment.get("val_data") for o in (other, first))
        if theirs and ours and theirs != ours:
            raise ComparisonError(
                f"{other.name} was validated on other pictures than {first.name} (fingerprints "
                f"{theirs} and {ours}); train or evaluate both on one list"
            )
        frame = other.predictions[[*key, "label"]]
        if frame.equals(common):
            continue
        both = common.merge(frame, on=key, suffixes=("", "_there"))
        alike = int((both.label == both.label_there).sum())
        if alike < max(len(both), 0.99 * max(len(common), len(frame))):
            raise ComparisonError(
                f"{other.name} was validated on other pictures than {first.name}: of "
                f"{len(frame):,} and {len(common):,} files {len(both):,} have the same name, "
                f"{alike:,} the same label too; compare runs of one validation list"
            )
        common = both[[*key, "label"]]
    for one in opened:
        if len(one.predictions) > len(common):
            lost = len(one.predictions) - len(common)
            flags.append(f"{one.name}: {lost:,} pictures are left out that others do not have")
        if not one.predictions[key].equals(common[key]):
            one.predictions = common[key].merge(one.predictions, on=key, validate="one_to_one")
    if len(opened) > 1 and not all("val_data" in one.environment for one in opened):
        flags.append(
            "that the validation pictures are the same is known by their names alone: a run of an "
            "older version keeps no fingerprint of them"
        )
    return common.reset_index(drop=True)


def _groups(opened: list[_Opened], flags: list[str]) -> list[Group]:
    members: dict[str, list[_Opened]] = {}
    for one in opened:
        members.setdefault(one.knobs, []).append(one)
    groups: list[Group] = []
    for alike in members.values():
        kept: dict[Any, _Opened] = {}
        for one in alike:
            seed = one.recipe["seed"]
            if seed in kept:
                same = one.predictions.class1.equals(kept[seed].predictions.class1)
                flags.append(
                    f"{one.name} {LEFT_OUT}: it is {kept[seed].name} again, with the same seed"
                    + ("" if same else ", and other answers, as another machine or number of "
                       "threads gives them")
                )  # fmt: skip
            else:
                kept[seed] = one
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
            flags.append("raw weights are compared: no run kept an average (EMA)")
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
                    f"{group.name} sees validation pictures otherwise than {first.name}: {key} "
                    f"{_value(ours)} against {_value(theirs)}"
                )
        if group.recipe["epochs"] != first.recipe["epochs"]:
            flags.append(
                f"{group.name} was trained for {group.recipe['epochs']} epochs, {first.name} for "
                f"{first.recipe['epochs']}"
            )
    trained = {one.environment.get("data") for one in opened} - {None}
    if len(trained) > 1:
        flags.append("the training pictures differ between runs")
    return flags


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# ---- the table


def _row(group: Group, first: Group) -> dict[str, Any]:
    top1, n = group.top1, group.right.shape[1]
    mean, sd = float(top1.mean()), float(top1.std(ddof=1)) if len(top1) > 1 else math.nan
    if len(top1) > 1:
        half = sd / math.sqrt(len(top1)) * float(stats.t.ppf((1 + LEVEL) / 2, len(top1) - 1))
        low, high, of = max(0.0, mean - half), min(100.0, mean + half), "seeds"
    else:
        hits = int(group.right.sum())
        wilson = stats.binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
        low, high, of = 100 * wilson.low, 100 * wilson.high, "pictures"
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
        "interval": of,
        "seeds": len(top1),
        "pictures": n,
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
    """What differs between two recipes, by knob: "lr 0.2 (0.1)", the former in brackets."""
    told = _differing([before, now])
    return {key: f"{key} {ours} ({theirs})" for key, (theirs, ours) in told.items()}


def _differing(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Knobs that differ between recipes, as text; one that changes nothing beside others is "idle".

    A knob that stands at its default wherever it is not idle is left out: what makes it idle in
    the one and not in the other is another knob, which is told.
    """
    idle = [without_effect(recipe) for recipe in recipes]
    found = {}
    for key in recipes[-1]:
        values = [recipe.get(key) for recipe in recipes]
        shown = ["idle" if key in its else _value(v) for v, its in zip(values, idle, strict=True)]
        used = [v for v, its in zip(values, idle, strict=True) if key not in its]
        field = Recipe.model_fields.get(key)
        plain = len(used) < len(values) and field and all(v == field.default for v in used)
        if key not in PLACE and key != "seed" and len(set(shown)) > 1 and not plain:
            found[key] = shown
    return found


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def knobs(groups: Sequence[Group]) -> pd.DataFrame:
    """The knobs that differ between recipes, a row each, as text; empty for one recipe."""
    rows = _differing([group.recipe for group in groups])
    table = pd.DataFrame.from_dict(rows, "index", columns=[group.name for group in groups])
    return table.rename_axis("knob")


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
