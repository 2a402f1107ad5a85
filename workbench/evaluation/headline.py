"""The result of a run as a sentence."""

import contextlib

import numpy as np
import pandas as pd

from workbench.evaluation.comparison import ComparisonError, EvaluatedRun, compare
from workbench.evaluation.metrics import image_cautions, per_class
from workbench.evaluation.statistics import LEVEL, difference, top1_interval
from workbench.evaluation.verdict import p_text
from workbench.runs import Run, RunError, finished


def headline(run: Run, against: Run | None = None) -> str:
    """One sentence of Markdown: top-1 with its interval, best and worst class, a comparison.

    Of the last evaluation of a finished or stopped run; before that, the sentence says that there
    is no result. A finished run is compared with `against`, without it with the other seeds of its
    recipe in the same folder, by `statistics.difference`. The weights are those of
    `Run.choose_weights`. Raises ComparisonError for damaged runs and other validation images.
    """
    status, evaluated = run.status(), run.file("predictions.parquet").exists()
    if status["state"] not in ("finished", "stopped") or not evaluated:
        step = f" at step {status['step']} of {status['steps']}" if status["steps"] else ""
        return f"No result yet: {run.path.name} is {status['state']}{step}."
    result = EvaluatedRun(run, run.choose_weights()[0])
    parts = [_top1(result), *_classes(per_class(result.predictions, result.classes))]
    parts += result.environment.get("trained_on_validation", [])
    parts += image_cautions(result.environment)
    if result.state == "finished":
        others = [against] if against else _other_seeds(run, result)
        others = [other for other in others if other.status()["state"] == "finished"]
        parts += _compared(run, result, others)
    return "; ".join(dict.fromkeys(parts)) + "."


def _top1(result: EvaluatedRun) -> str:
    correct = (result.predictions.class1 == result.predictions.label).to_numpy()
    low, high = top1_interval(correct[None])
    trained, epochs = result.metrics.dropna(subset=["top1"]).epoch.max(), result.recipe["epochs"]
    early = f" after {trained} of {epochs} epochs" if trained < epochs else ""
    ema = ", EMA weights" if result.weights == "ema" else ""
    interval = f"{100 * LEVEL:.0f} % interval {low:.1f} to {high:.1f}, {result.images:,} images"
    return f"Top-1 **{100 * correct.mean():.1f} %**{early} ({interval}{ema})"


def _classes(table: pd.DataFrame) -> list[str]:
    """The best and the worst class; nothing if all are equal."""
    ends = {"best": table[table.top1 == table.top1.max()]}
    ends["worst"] = table[table.top1 == table.top1.min()]
    if ends["best"].equals(ends["worst"]):
        return []
    texts = []
    for word, rows in ends.items():
        also = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        size = f" of {rows.images.iloc[0]:,} images" if len(rows) == 1 else ""
        texts.append(
            f"{word} class {rows['class'].iloc[0]}{also} ({rows.top1.iloc[0]:.1f} %{size})"
        )
    return [", ".join(texts)]


def _other_seeds(run: Run, result: EvaluatedRun) -> list[Run]:
    """The finished runs of the recipe beside this one, of the same images."""
    same = {k: v for k, v in result.environment.items() if k in ("data", "val_data", "classes")}
    seeds = {}
    for other in finished(run.path.parent, **same):
        with contextlib.suppress(ComparisonError, RunError):  # of a damaged run
            one = EvaluatedRun(other, result.weights)
            if one.identity == result.identity:
                seeds.setdefault(one.recipe["seed"], other)
    seeds.pop(result.recipe["seed"], None)
    return [seeds[seed] for seed in sorted(seeds)]


def _compared(run: Run, result: EvaluatedRun, others: list[Run]) -> list[str]:
    """The difference from another run, or from the mean of several; nothing without any."""
    found = compare([run.path, *(other.path for other in others)], weights=result.weights)
    pairs = [pair for group in found.groups for pair in zip(group.runs, group.correct, strict=True)]
    mine = [correct for one, correct in pairs if one.name == result.name]
    theirs = [(one, correct) for one, correct in pairs if one.name != result.name]
    if not (mine and theirs):
        return []
    d = difference(np.stack([correct for _, correct in theirs]), np.stack(mine))
    significant, seeds = d.adjusted < 1 - LEVEL, [str(one.recipe["seed"]) for one, _ in theirs]
    name = theirs[0][0].name
    if theirs[0][0].identity == result.identity:
        name = f"the mean of seeds {', '.join(seeds)}" if len(seeds) > 1 else f"seed {seeds[0]}"
    low, high = (-d.high, -d.low) if d.points < 0 else (d.low, d.high)
    interval = f"{100 * LEVEL:.0f} % interval {low:.1f} to {high:.1f}, p {p_text(d.p)}"
    if len(seeds) > 1:
        judged = f", {'more than' if significant else 'within what'} seeds differ"
    else:
        judged = ", significant for these two runs" if significant else ", not significant"
    size = f"{abs(d.points):.1f} points {'below' if d.points < 0 else 'above'}"
    return [f"{size} {name} ({interval}){judged}", *found.cautions]
