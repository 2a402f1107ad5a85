"""Comparison of recipes from run folders.

    result = compare(["runs/a-seed0", "runs/a-seed1", "runs/b-seed0", "runs/b-seed1"])
    result.table                             # a row per recipe
    print(*result.sentences(), sep="\n")     # each recipe against the baseline, and cautions

The last evaluation of a run counts, not its best epoch: that is selected on the validation images.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench import counted
from workbench.evaluation import metrics
from workbench.evaluation.recipe_diff import differing_options, identity, recipe_difference
from workbench.evaluation.statistics import difference, holm, top1_interval
from workbench.evaluation.verdict import Verdict
from workbench.recipe import defaults, runtime_only
from workbench.runs import Run, RunError

LIST_KEY = ["list", "file"]  # columns that identify a validation image
CAUTIONED = ("image_size", "val_image_size", "val_resize", "interpolation", "epochs")
LEGEND = (
    "top1 and top5 in percent; low to high: 95 % interval of top1, for other images or other seeds "
    "and images; ece: expected calibration error, 0 to 1; custom metrics: mean "
    "over runs; differs: options that differ from the "
    "first recipe, with its value in brackets"
)
MEASURES = {  # of curves: (table, column, label of the axis)
    "top-1": ("metrics", "top1", "validation top-1 (%)"),
    "top-1, EMA": ("metrics", "ema_top1", "validation top-1 of EMA weights (%)"),
    "top-5": ("metrics", "top5", "validation top-5 (%)"),
    "validation loss": ("metrics", "val_loss", "validation loss (nats)"),
    "training loss": ("metrics", "train_loss", "training loss (nats)"),
    "loss by step": ("steps", "loss", "training loss (nats)"),
    "lr": ("steps", "lr", "lr"),
    "speed": ("steps", "images_per_second", "images per second"),
    "waiting": ("steps", "data_wait", "share of the time waiting for data"),
}
AXES = {"epoch": "epoch", "step": "step", "minutes": "minutes of training"}


class ComparisonError(RuntimeError):
    """These runs cannot be compared; the message says which, why and what to do."""


class EvaluatedRun:
    """The files of a run that a comparison needs, read once."""

    def __init__(self, run: Run, weights: str = "raw"):
        self.name, self.path = run.path.name, run.path
        try:
            self.recipe = defaults() | run.recipe()
            self.environment, self.state = run.environment(), run.status()["state"]
            self.identity = identity(self.recipe, self.environment)
            self.classes: list[str] = self.environment["classes"]
            frame = run.predictions()
        except (RunError, OSError, ValueError, KeyError) as error:
            raise ComparisonError(f"{error}; leave {run.path} out, or train it further") from None
        self.weights = weights if weights in frame.weights.unique() else "raw"
        frame = frame[frame.weights == self.weights].reset_index(drop=True)
        self.predictions = frame if "list" in frame else frame.assign(list=0)  # a row per image
        self.images = len(frame)  # before images are left out that other runs lack
        self.steps, self.metrics = run.steps(), run.metrics()
        last = self.metrics.dropna(subset=["top1"] if len(self.metrics) else []).tail(1)
        p = "ema_" if self.weights == "ema" else ""
        self.custom = {k: last[p + k].mean() for k in metrics.custom_metrics(last) if p + k in last}
        self.epoch = int(last.epoch.iloc[0]) if len(last) else 0  # of the predictions


@dataclass(eq=False)
class SeedGroup:
    """The runs of one recipe, which differ only in the seed."""

    name: str
    runs: list[EvaluatedRun] = field(repr=False)

    @property
    def recipe(self) -> dict[str, Any]:
        return self.runs[0].recipe

    @property
    def predictions(self) -> list[pd.DataFrame]:
        return [run.predictions for run in self.runs]

    @functools.cached_property
    def correct(self) -> np.ndarray:
        """Whether the prediction is the label, bool (runs, images)."""
        return np.stack([(f.class1 == f.label).to_numpy() for f in self.predictions])

    @property
    def top1(self) -> np.ndarray:
        """Percent, float (runs,)."""
        return 100 * self.correct.mean(1)

    @property
    def unfinished(self) -> bool:
        return any(run.state != "finished" for run in self.runs)

    @property
    def majority(self) -> np.ndarray:
        """The class that most runs predict, of equally frequent ones the lowest: int (images,)."""
        votes = np.stack([f.class1.to_numpy() for f in self.predictions])
        counts = (votes[:, None] == votes).sum(1)
        return np.where(counts == counts.max(0), votes, votes.max()).min(0)


@dataclass(eq=False)
class Comparison:
    """The result of `compare`."""

    groups: list[SeedGroup]  # the first is the baseline
    verdicts: list[Verdict]  # of the other groups
    cautions: list[str]  # sentences: what makes the comparison unequal, what is left out
    images: pd.DataFrame = field(repr=False)  # list, file, label of every image
    classes: list[str] = field(repr=False)

    def sentences(self) -> list[str]:
        """Verdicts, then cautions."""
        alone = f"one recipe, {self.groups[0].name}: nothing to compare it with"
        verdicts = [*map(str, self.verdicts)] or [alone]
        return [*verdicts, *(f"caution: {text}" for text in self.cautions)]

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """A row per recipe; LEGEND explains the columns."""
        return pd.DataFrame([_row(group, self.groups[0]) for group in self.groups])

    def group(self, name: str) -> SeedGroup:
        """The recipe of a name. Raises ComparisonError."""
        groups = {group.name: group for group in self.groups}
        if name not in groups:
            raise ComparisonError(f"no recipe {name!r} here; there are {', '.join(groups)}")
        return groups[name]

    def flips(self, name: str) -> pd.DataFrame:
        """The images that more or fewer runs of a recipe predict correctly than of the baseline.

        list, file, label, before and after (majority class), correct_before and correct_after
        (share of the runs), change; sorted by the size of the change.
        """
        new, old = self.group(name), self.groups[0]
        before, after = old.correct.mean(0), new.correct.mean(0)
        frame = self.images.assign(before=old.majority, after=new.majority, correct_before=before)
        frame = frame.assign(correct_after=after, change=after - before).query("change != 0")
        return frame.sort_values("change", key=abs, ascending=False, kind="stable")

    def by_class(self) -> pd.DataFrame:
        """class, images, and a column of mean top-1 in percent for every recipe."""
        table = metrics.per_class(self.groups[0].predictions[0], self.classes)[["class", "images"]]
        for group in self.groups:
            pooled = metrics.per_class(pd.concat(group.predictions), self.classes)
            table[group.name] = pooled.top1
        return table

    def by_column(self, most: int = 20) -> pd.DataFrame:
        """column, value, images, recipe, top1, low, high: by columns of a table with few values."""
        from workbench import data  # loads torch

        rows, images = [], self.groups[0].predictions[0]
        for column in data.own_columns(images):
            parts = images.groupby(column, dropna=False)
            for value, part in parts if len(parts) <= most else ():
                for group in self.groups:
                    correct = group.correct[:, part.index]
                    interval = 100 * correct.mean(), *top1_interval(correct)
                    rows.append((column, value, len(part), group.name, *interval))
        return pd.DataFrame(rows, columns="column value images recipe top1 low high".split())

    def confusion(self, name: str, most: int | None = None) -> pd.DataFrame:
        """Confusions per run minus those of the baseline, rows true, columns predicted classes.

        Only the `most` classes that changed most; attrs["classes"] is the number of all classes.
        """
        new, old = (
            metrics.pair_counts(pd.concat(group.predictions)) / len(group.runs)
            for group in (self.group(name), self.groups[0])
        )
        change = new.sub(old, fill_value=0)
        return metrics.class_table(change, change.abs(), self.classes, most)

    def agreement(self) -> pd.DataFrame:
        """The share of the images in percent for which two runs predict the same class."""
        runs = [run for group in self.groups for run in group.runs]
        classes = {run.name: run.predictions.class1.to_numpy() for run in runs}
        same = {x: [100 * (classes[x] == y).mean() for y in classes.values()] for x in classes}
        return pd.DataFrame(same, index=pd.Index(classes, name="run"))


def compare(
    folders: Iterable[str | Path], *, weights: str = "raw", baseline: str = ""
) -> Comparison:
    """Compares every recipe with the first, or with the one named `baseline`.

    `weights` are raw, or ema where a run has them. Raises ComparisonError for runs that cannot be
    read, have no predictions, or have predictions of other images.
    """
    if weights not in ("raw", "ema"):
        raise ComparisonError(f"weights {weights!r}; allowed are raw and ema")
    folders = {Path(path).resolve(): path for path in folders}.values()
    runs = [EvaluatedRun(Run(path), weights) for path in folders]
    if not runs:
        raise ComparisonError("no run to compare; name two or more run folders")
    images, groups = _align(runs), _seed_groups(runs)
    result = Comparison(groups, [], [*_left_out(runs, groups, images)], images, runs[0].classes)
    if baseline:
        groups.insert(0, groups.pop(groups.index(result.group(baseline))))
    result.cautions.extend(_inequalities(runs, groups, weights))
    first, *others = groups
    # Optuna's trials are in the order of their top-1: the first was chosen after comparing all.
    is_study = any((run.path.parent / "study.log").exists() for run in runs)
    count = len(others) * len(groups) // 2 if is_study else len(others)
    differences = [difference(first.correct, group.correct, count) for group in others]
    adjusted = holm([d.p for d in differences] + [1.0] * (count - len(others)))
    for group, d, p in zip(others, differences, adjusted, strict=False):
        unfinished = first.unfinished or group.unfinished
        result.verdicts.append(Verdict(group.name, first.name, d.with_adjusted(p), unfinished))
    return result


def out_of_fold(folders: Iterable[str | Path], weights: str = "raw") -> pd.DataFrame:
    """The predictions of runs that differ in `fold`: a row per image, of the run that left it out.

    Columns: run (name of the folder), recipe (other options that differ, "lr=0.1 seed=0", else
    "all"), then those of Run.predictions. Several recipes have a row per image each. Raises
    ComparisonError for folds and images that are missing or there twice.
    """
    runs = [EvaluatedRun(Run(path), weights) for path in folders]
    if not runs:
        raise ComparisonError("there is no run of a fold; name one for each")
    options = [key for key in defaults() if key not in runtime_only | {"fold"}]
    options = [key for key in options if len({repr(run.recipe[key]) for run in runs}) > 1]
    recipes: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        text = " ".join(f"{key}={run.recipe[key]}" for key in options)
        recipes.setdefault(text or "all", []).append(run)
    return pd.concat([_joined(*pair) for pair in recipes.items()], ignore_index=True)


def _joined(recipe: str, runs: list[EvaluatedRun]) -> pd.DataFrame:
    folds, facts = sorted(run.recipe["fold"] for run in runs), [run.environment for run in runs]
    if folds != sorted(f"{i + 1}/{len(runs)}" for i in range(len(runs))):
        text = f"there are the folds {folds}; each, such as 1/3, 2/3 and 3/3, is needed once"
        raise ComparisonError(f"{recipe}: {text}")
    whole = pd.concat([run.predictions.assign(run=run.name, recipe=recipe) for run in runs])
    sizes = {count := len(whole.drop_duplicates(LIST_KEY)), len(whole)}
    sizes |= {sum(fact["val_images"] for fact in facts)}
    if runs[0].recipe["train_fraction"] == 1:
        sizes |= {fact["train_images"] + fact["val_images"] for fact in facts}
    if len(sizes) > 1:
        text = f"{len(whole):,} predictions are of {count:,} images, some missing or there twice"
        raise ComparisonError(f"{recipe}: {text}; list each once, train all folds on the same data")
    return whole[["run", "recipe", *whole.columns.drop(["run", "recipe"])]]


def _align(runs: list[EvaluatedRun]) -> pd.DataFrame:
    """The images that every run has; all predictions are reduced to them, in the same order."""
    first, *others = runs
    common = first.predictions[[*LIST_KEY, "label"]]
    for other in others:
        common = _common_images(first, common, other)
    for run in runs:
        if not run.predictions[LIST_KEY].equals(common[LIST_KEY]):
            ordered = common[LIST_KEY].merge(run.predictions, on=LIST_KEY, validate="one_to_one")
            run.predictions = ordered
    return common.reset_index(drop=True)


def _common_images(first: EvaluatedRun, common: pd.DataFrame, other: EvaluatedRun) -> pd.DataFrame:
    """The rows of `common` that another run has too; 1 % may be missing."""
    problem = f"{other.name} was validated on other images than {first.name}"
    if other.classes != first.classes:
        raise ComparisonError(f"{problem}: the classes or their order differ")
    if len({run.environment.get("val_data") for run in (first, other)} - {None}) > 1:
        raise ComparisonError(f"{problem}: the fingerprints of their validation lists differ")
    frame = other.predictions[common.columns]
    if frame.equals(common):
        return common
    if any(part.duplicated(LIST_KEY).any() for part in (common, frame)):
        text = "and those that its list repeats cannot be told apart; list each image once"
        raise ComparisonError(f"{problem}, {text}")
    both = common.merge(frame, on=LIST_KEY, suffixes=("", "_other"))
    equal, most = int((both.label == both.label_other).sum()), max(len(common), len(frame))
    if equal < max(len(both), 0.99 * most):
        raise ComparisonError(f"{problem}: {equal:,} of {most:,} have the same file and label")
    return both[common.columns]


def _seed_groups(runs: list[EvaluatedRun]) -> list[SeedGroup]:
    """Runs by recipe, sorted by seed; of several runs of a seed the first finished one."""
    recipes: dict[str, dict[int, EvaluatedRun]] = {run.identity: {} for run in runs}
    for run in sorted(runs, key=lambda run: run.state != "finished"):
        recipes[run.identity].setdefault(run.recipe["seed"], run)
    groups: dict[str, SeedGroup] = {}
    for seeds in recipes.values():
        members = [seeds[seed] for seed in sorted(seeds)]
        name = str(members[0].recipe["name"])
        while name in groups:  # another recipe with the same name
            name = members[0].name if name != members[0].name else f"{name} again"
        groups[name] = SeedGroup(name, members)
    return [*groups.values()]


def _left_out(
    runs: list[EvaluatedRun], groups: list[SeedGroup], images: pd.DataFrame
) -> Iterator[str]:
    """Cautions on images and runs that are left out."""
    for run in runs:
        if lost := run.images - len(images):
            yield f"{run.name}: {counted(lost, 'image')} left out that other runs lack"
    if len(runs) > 1 and not all("val_data" in run.environment for run in runs):
        yield "validation images are matched by name only, a run has no fingerprint"
    seed = lambda run: (run.identity, run.recipe["seed"])
    compared = {seed(run): run for group in groups for run in group.runs}
    for run in runs:
        used = compared[seed(run)]
        reason = f"{run.name} is left out: it is {used.name} again, with the same seed"
        if run.state != used.state:
            yield f"{reason}, and has not finished ({run.state})"
        elif not run.predictions.class1.equals(used.predictions.class1):
            yield f"{reason}, and other predictions (another machine or number of threads)"
        elif run is not used:
            yield reason


def _inequalities(runs: list[EvaluatedRun], groups: list[SeedGroup], weights: str) -> Iterator[str]:
    """Cautions on weights, unfinished runs, evaluation, training length and data."""
    if raw := [run.name for run in runs if run.weights != weights]:
        yield f"raw weights of {', '.join(raw)} are compared: there are no EMA weights"
    for run in runs:
        if run.state != "finished":
            epochs = f"{run.epoch} of {run.recipe['epochs']}"
            yield f"{run.name} is {run.state}, evaluated at epoch {epochs}"
        for text in run.environment.get("trained_on_validation", ()):
            yield f"{run.name}: {text}"
    yield from {t: None for run in runs for t in metrics.image_cautions(run.environment)}
    first, *others = groups
    for group in others:
        for option in CAUTIONED:
            ours, theirs = group.recipe[option], first.recipe[option]
            if ours != theirs:
                yield f"{group.name} has {option} {ours}, {first.name} {theirs}"
        if weights == "raw" and group.recipe["ema_decay"] != first.recipe["ema_decay"]:
            text = "differ in ema_decay, which does not change the raw weights that are compared"
            yield f"{group.name} and {first.name} {text}; set weights to ema"
        if len({one.runs[0].environment.get("data") for one in (first, group)} - {None}) > 1:
            yield f"{group.name} and {first.name} have different training images"
        elif not recipe_difference(first.recipe, group.recipe):
            text = "had, or may have had, other weights of a teacher or to start from"
            yield f"{group.name} and {first.name} {text}"
    shards = [item for run in runs for item in run.environment.get("shards", {}).items()]
    if len({*shards}) > len({urls for urls, _ in shards}):
        yield "a shard was replaced between the runs, whose images may differ"


def _row(group: SeedGroup, first: SeedGroup) -> dict[str, Any]:
    """A row of Comparison.table."""
    runs, top1, several = group.runs, group.top1, len(group.runs) > 1
    low, high = top1_interval(group.correct)
    epochs, trained = group.recipe["epochs"], min(run.epoch for run in runs)
    if trained < epochs:  # unfinished, or stopped early
        epochs = f"{trained} of {epochs}"
    speeds = [run.steps.get("images_per_second", pd.Series(dtype=float)).median() for run in runs]
    minutes = [run.environment.get("seconds", math.nan) / 60 for run in runs]
    custom = pd.DataFrame([run.custom for run in runs]).mean(skipna=False)
    scores = {
        "recipe": group.name,
        "top1": float(top1.mean()),
        "sd": float(top1.std(ddof=1)) if several else math.nan,
        "low": low,
        "high": high,
        "interval": "seeds and images" if several else "images",
        "seeds": len(runs),
        "images": group.correct.shape[1],
        "top5": float(np.mean([metrics.top_k(frame) for frame in group.predictions])),
        "ece": float(np.mean([metrics.calibration_error(frame) for frame in group.predictions])),
    }
    training = {
        "epochs": epochs,
        "minutes": float(np.mean(minutes)),
        "img/s": float(np.mean(speeds)),
        "device": " / ".join(sorted({run.environment.get("device", "") for run in runs})),
        "differs": ", ".join(recipe_difference(first.recipe, group.recipe).values()),
    }
    ours = scores.keys() | training.keys()
    return scores | {k + "_" * (k in ours): v for k, v in custom.items()} | training


def options(groups: Sequence[SeedGroup]) -> pd.DataFrame:
    """The options that differ between recipes as text, a row each; empty for one recipe."""
    rows = differing_options([group.recipe for group in groups])
    table = pd.DataFrame.from_dict(rows, "index", columns=[group.name for group in groups])
    return table.rename_axis("option")


def curves(
    groups: Sequence[SeedGroup], measure: str = "top-1", by: str = "epoch"
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(recipe, x, y) of every run that has the measure, one of MEASURES; `by` is one of AXES."""
    table, column, _ = MEASURES[measure]
    lines = []
    for name, run in [(group.name, run) for group in groups for run in group.runs]:
        frame = getattr(run, table)
        if column not in frame:
            continue
        frame = frame.dropna(subset=[column])
        x = frame.step.to_numpy(float)
        if by == "epoch" and len(run.metrics):
            x = x * (run.metrics.epoch.iloc[-1] / run.metrics.step.iloc[-1])
        elif by == "minutes" and len(run.steps):
            x = np.interp(x, run.steps.step, run.steps.seconds / 60)
        lines.append((name, x, frame[column].to_numpy(float)))
    return lines


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, floats with two digits, missing values empty."""
    text = table.map(lambda v: "" if pd.isna(v) else f"{v:.2f}" if isinstance(v, float) else str(v))
    rows = [[*table.columns], ["---"] * len(table.columns), *text.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows)


def newest_pair(runs: Sequence[Run], baseline: str = "") -> list[Run]:
    """The runs of the first run's recipe and of its baseline, every seed, in the order given.

    The baseline is the recipe of that name, or the one that differs in the fewest options, of
    several the oldest. Only runs with the validation images of the first are considered.
    """
    recipes: dict[str, list[Run]] = {}
    val_sets = [[run.environment().get(key) for key in ("val_data", "classes")] for run in runs]
    for run, val_set in zip(runs, val_sets, strict=True):
        if val_set == val_sets[0]:
            recipes.setdefault(identity(run.recipe(), run.environment()), []).append(run)
    newest, *others = recipes.values() or [[]]
    others = [same for same in others if baseline in ("", same[0].recipe().get("name"))]
    distance = lambda same: len(recipe_difference(same[0].recipe(), newest[0].recipe()))
    chosen = min(reversed(others), key=distance, default=[])
    return [run for run in runs if run in newest or run in chosen]
