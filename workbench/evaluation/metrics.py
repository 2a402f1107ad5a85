"""Metrics of a table of predictions, which has a row per validation image."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from workbench.evaluation.statistics import wilson

BINS = 15  # of the reliability diagram
_TWICE = {  # facts of environment.json
    "train_val_duplicates": "in training too, so top-1 is too high",
    "val_repeats": "repeated, so intervals are too narrow",
}
_OURS = re.compile("kind|epoch|steps?|lr|(val_)?images|top[15]|val_loss|train_.*|ema_.*")


def custom_metrics(columns: Iterable[str]) -> list[str]:
    """The columns of metrics.csv that are from custom metrics, those of raw weights."""
    return [name for name in columns if not _OURS.fullmatch(name)]


def top_k(predictions: pd.DataFrame) -> float:
    """Top-5 accuracy in percent; with fewer than five classes, top-k of all."""
    ranks = [c for c in predictions.columns if re.fullmatch(r"class\d+", c)]
    hits = predictions[ranks].to_numpy() == predictions.label.to_numpy()[:, None]
    return 100 * float(hits.any(axis=1).mean())


def summary(predictions: pd.DataFrame) -> dict[str, float | int]:
    """top1 and top5 in percent, val_loss (mean cross-entropy) and val_images."""
    return {
        "top1": 100 * float((predictions.class1 == predictions.label).mean()),
        "top5": top_k(predictions),
        "val_loss": float(predictions.loss.to_numpy().astype(np.float64).mean()),
        "val_images": len(predictions),
    }


def pair_counts(predictions: pd.DataFrame) -> pd.Series:
    """The number of images by true and predicted class, sorted; pairs without images are absent."""
    return predictions.groupby(["label", "class1"]).size()


def class_table(
    counts: pd.Series, weights: pd.Series, classes: list[str], most: int | None = None
) -> pd.DataFrame:
    """Values by (true, predicted) class as a table, rows true classes, columns predicted ones.

    With `most` only the classes with the largest sum of weights in row and column. attrs has
    "classes", the number of all, and "images", the sum of each row over all columns.
    """
    true, predicted = (counts.index.get_level_values(i).to_numpy() for i in (0, 1))
    totals = sum(np.bincount(side, weights, len(classes)) for side in (true, predicted))
    chosen = np.sort(np.argsort(-totals, kind="stable")[:most])
    shown = np.isin(true, chosen) & np.isin(predicted, chosen)
    table = counts[shown].unstack(fill_value=0).reindex(index=chosen, columns=chosen, fill_value=0)
    table.index = table.columns = [classes[i] for i in chosen]
    images = np.bincount(true, counts, len(classes))[chosen]
    table.attrs = {"classes": len(classes), "images": images.tolist()}
    return table


def confusion(
    predictions: pd.DataFrame, classes: list[str], most: int | None = None
) -> pd.DataFrame:
    """Counts by true (rows) and predicted (columns) class; with `most` of those confused most."""
    counts = pair_counts(predictions)
    true, predicted = (counts.index.get_level_values(i) for i in (0, 1))
    return class_table(counts, counts.where(true != predicted, 0), classes, most)


def per_class(predictions: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """class, images, top1 in percent (nan without images) and "mistaken for".

    That is the class predicted most often by mistake, of equally frequent ones the first.
    """
    label = predictions.label.to_numpy(np.int64)
    wrong = pair_counts(predictions[label != predictions.class1])
    # Of several pairs with one label the last counts: the most frequent one.
    mistakes = dict(wrong.sort_values(ascending=False, kind="stable").index[::-1])
    names = [classes[mistakes[k]] if k in mistakes else "" for k in range(len(classes))]
    images = np.bincount(label, minlength=len(classes))
    correct = np.bincount(label[label == predictions.class1], minlength=len(classes))
    top1 = 100 * correct / np.where(images, images, np.nan)
    return pd.DataFrame({"class": classes, "images": images, "top1": top1, "mistaken for": names})


def by_column(predictions: pd.DataFrame, column: str) -> pd.DataFrame:
    """images, top1 and its Wilson interval (low, high) in percent, by the values of a column.

    Raises ValueError where there is no such column.
    """
    if column not in predictions:
        raise ValueError(f"no column {column!r}; these predictions have {[*predictions.columns]}")
    correct = predictions.class1 == predictions.label
    table = correct.groupby(predictions[column], dropna=False).agg(["size", "sum"])
    rows = [[n, k / n, *wilson(k, n)] for n, k in table.itertuples(index=False)]
    found = pd.DataFrame(rows, table.index, ["images", "top1", "low", "high"])
    return found * [1, 100, 100, 100]


def side_by_side(predictions: Mapping[str, pd.DataFrame], classes: list[str]) -> pd.DataFrame:
    """class, images, and a column of top-1 in percent per name.

    Raises ValueError when the predictions are of different images.
    """
    images = {tuple(zip(f.list, f.file, strict=True)) for f in predictions.values()}
    if len(images) > 1:
        raise ValueError("these predictions are of different images; compare within one list")
    parts = {name: per_class(frame, classes) for name, frame in predictions.items()}
    first = next(iter(parts.values()))[["class", "images"]]
    return first.assign(**{name: part.top1 for name, part in parts.items()})


def shared_teacher_errors(student: pd.DataFrame, teacher: pd.DataFrame) -> dict[str, float | int]:
    """What a student predicts where its teacher is wrong, for the same images in the same order.

    wrong is the number of these images; same, other and correct are percentages of them: the
    student predicts the teacher's class, another wrong class, or the label. nan without an image.
    """
    wrong = (teacher.class1 != teacher.label).to_numpy()
    predicted = student.class1[wrong].to_numpy()
    same = predicted == teacher.class1[wrong].to_numpy()
    correct = predicted == teacher.label[wrong].to_numpy()
    shares = pd.DataFrame({"same": same, "other": ~same & ~correct, "correct": correct}).mean()
    return {"wrong": int(wrong.sum()), **(100 * shares).to_dict()}


def image_cautions(environment: Mapping[str, Any]) -> list[str]:
    """Sentences on validation images that are there twice, by a run's environment.json."""
    of = f"of the {environment.get('val_images', 0):,} validation images are"
    found = [(environment.get(key), text) for key, text in _TWICE.items()]
    return [f"{n:,} {of} {text}; see workbench check-data" for n, text in found if n]


def mistakes(predictions: pd.DataFrame, count: int = 12) -> pd.DataFrame:
    """The wrong predictions with the highest confidence, highest first."""
    wrong = predictions[predictions.label != predictions.class1]
    return wrong.sort_values("p1", ascending=False, kind="stable").head(count)


def reliability(predictions: pd.DataFrame) -> pd.DataFrame:
    """images, confidence (mean p1) and top1 (both 0 to 1) by BINS bins of p1 of equal width.

    Guo et al., arXiv 1706.04599, section 2. The index is the upper edge of the bin; empty bins
    have no row. A probability of nan counts as 0.
    """
    p = predictions.p1.fillna(0).to_numpy(float)
    correct = (predictions.class1 == predictions.label).to_numpy(float)
    edge = np.clip(np.ceil(p * BINS).astype(int), 1, BINS) / BINS
    bins = pd.DataFrame({"images": 1, "confidence": p, "top1": correct}).groupby(edge)
    return bins.mean().assign(images=bins.size()).rename_axis("up to")


def calibration_error(predictions: pd.DataFrame) -> float:
    """Expected calibration error, 0 to 1: the mean over images of |confidence - top1| by bin."""
    table = reliability(predictions)
    gaps = (table.confidence - table.top1).abs()
    return float((gaps * table.images).sum() / table.images.sum())
