"""What follows from a table with a row per validation image."""

from collections.abc import Mapping

import numpy as np
import pandas as pd


def summary(predictions: pd.DataFrame) -> dict[str, float | int]:
    """top1 and top5 in percent, mean loss, and the number of images they stand on."""
    label = predictions.label.to_numpy()
    ranks = [c for c in predictions.columns if c.startswith("class")]
    hits = predictions[ranks].to_numpy() == label[:, None]
    return {
        "top1": 100 * float(hits[:, 0].mean()),
        "top5": 100 * float(hits.any(axis=1).mean()),
        "val_loss": float(predictions.loss.to_numpy().astype(np.float64).mean()),
        "val_images": len(predictions),
    }


def confusion(
    predictions: pd.DataFrame, classes: list[str], most: int | None = None
) -> pd.DataFrame:
    """Counts, a row per true class and a column per predicted one; of the `most` confused alone.

    attrs has the images of each row over all columns, and the number of all classes.
    """
    label, answer = predictions.label.to_numpy(), predictions.class1.to_numpy()
    images = np.bincount(label, minlength=len(classes))
    kept = np.arange(len(classes))
    if most is not None and most < len(classes):
        wrong = np.concatenate([label[label != answer], answer[label != answer]])
        errors = np.bincount(wrong, minlength=len(classes))
        kept = np.sort(np.argsort(-errors, kind="stable")[:most])
    shown = np.isin(label, kept) & np.isin(answer, kept)
    table = np.zeros((len(kept), len(kept)), np.int64)
    np.add.at(table, tuple(np.searchsorted(kept, x[shown]) for x in (label, answer)), 1)
    names = [classes[i] for i in kept]
    frame = pd.DataFrame(table, index=names, columns=names)
    frame.attrs = {"images": images[kept].tolist(), "classes": len(classes)}
    return frame


def per_class(predictions: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """class, images, top1 in percent (nan without images) and its most frequent mistake."""
    label, answer = predictions.label.to_numpy(np.int64), predictions.class1.to_numpy(np.int64)
    counts, hits = (np.bincount(x, minlength=len(classes)) for x in (label, label[label == answer]))
    pairs = label[label != answer] * len(classes) + answer[label != answer]
    pairs, times = np.unique(pairs, return_counts=True)
    mistake = np.full(len(classes), "", object)
    # The last one stays: the most frequent, of equal ones the lowest class number.
    for pair in pairs[np.lexsort((-pairs, times))].tolist():
        mistake[pair // len(classes)] = classes[pair % len(classes)]
    top1 = 100 * hits / np.where(counts, counts, np.nan)
    return pd.DataFrame({"class": classes, "images": counts, "top1": top1, "mistaken for": mistake})


def side_by_side(predictions: Mapping[str, pd.DataFrame], classes: list[str]) -> pd.DataFrame:
    """class, images, and a column of top-1 in percent for every name. Raises ValueError when the
    predictions are of different images."""
    table = None
    keys = {tuple(zip(f.list, f.file, strict=True)) for f in predictions.values()}
    if len(keys) > 1:
        raise ValueError("these predictions are of different images; compare within one list")
    for name, frame in predictions.items():
        part = per_class(frame, classes)
        if table is None:
            table = part[["class", "images"]].copy()
        table[name] = part.top1
    return table


def shared_teacher_errors(student: pd.DataFrame, teacher: pd.DataFrame) -> dict[str, float | int]:
    """What a student says where its teacher is wrong.

    wrong is the number of such images; same, other and right the percentages of them on which
    the student gives the same wrong answer, another one, or the right one. Both are predictions
    of the same images in the same order.
    """
    wrong = (teacher.class1 != teacher.label).to_numpy()
    ours, theirs = student.class1.to_numpy()[wrong], teacher.class1.to_numpy()[wrong]
    label = teacher.label.to_numpy()[wrong]
    same, right = ours == theirs, ours == label
    share = lambda mask: 100 * float(mask.mean()) if len(mask) else float("nan")
    return {
        "wrong": int(wrong.sum()),
        "same": share(same),
        "other": share(~same & ~right),
        "right": share(right),
    }


def mistakes(predictions: pd.DataFrame, count: int = 12) -> pd.DataFrame:
    """The wrong answers given with most confidence, worst first."""
    wrong = predictions[predictions.label != predictions.class1]
    return wrong.sort_values("p1", ascending=False, kind="stable").head(count)
