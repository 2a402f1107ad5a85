"""A table with a row per validation picture, and the numbers that follow from it."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from workbench.data import Batch, DataError

TOP = 5


@torch.no_grad()
def predict(
    model: nn.Module, batches: Any, normalize: Any, device: torch.device, progress: Any = None
) -> pd.DataFrame:
    """Predictions of a model over batches, in full precision, in the order of the frame.

    Columns: row (of the frame), label, class1 to class5 (ids, best first; fewer when there are
    fewer classes), p1 to p5 (softmax), p_label, loss (natural log, no smoothing). Pictures that
    could not be read have no row; attrs["failures"] holds their (row, reason, detail).
    """
    was_training = model.training
    model.eval()
    parts, failures = [], []
    for batch in batches:
        failures += batch.failures
        if len(batch.images):
            images = normalize(batch.images.to(device, non_blocking=True))
            logits = model(images).float()
            parts.append(_rows(batch, logits))
        if progress is not None:
            progress(len(batch.images))
    model.train(was_training)
    if not parts:
        raise DataError("no picture of the validation list could be read")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    frame = pd.DataFrame(columns).sort_values("row", ignore_index=True)
    frame.attrs["failures"] = failures
    return frame


def _rows(batch: Batch, logits: torch.Tensor) -> dict[str, np.ndarray]:
    labels = batch.labels.to(logits.device)
    log_p = F.log_softmax(logits, dim=1)
    # Equal logits are ranked by class number: topk leaves ties open, a stable sort does not.
    k = min(TOP, logits.shape[1])
    best = torch.sort(log_p, dim=1, descending=True, stable=True)
    label_log_p = log_p.gather(1, labels[:, None])[:, 0]
    columns = {"row": batch.indices.numpy(), "label": batch.labels.numpy()}
    for i in range(k):
        columns[f"class{i + 1}"] = best.indices[:, i].cpu().numpy().astype(np.int32)
    for i in range(k):
        columns[f"p{i + 1}"] = best.values[:, i].exp().cpu().numpy()
    columns["p_label"] = label_log_p.exp().cpu().numpy()
    columns["loss"] = -label_log_p.cpu().numpy()
    return columns


def summary(predictions: pd.DataFrame) -> dict[str, float | int]:
    """top1 and top5 in percent, mean loss, and the number of pictures they stand on."""
    label = predictions.label.to_numpy()
    ranks = [c for c in predictions.columns if c.startswith("class")]
    hits = predictions[ranks].to_numpy() == label[:, None]
    return {
        "top1": 100 * float(hits[:, 0].mean()),
        "top5": 100 * float(hits.any(axis=1).mean()),
        "val_loss": float(predictions.loss.to_numpy().astype(np.float64).mean()),
        "val_images": len(predictions),
    }


def confusion(predictions: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """Counts, a row per true class and a column per predicted one."""
    table = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(table, (predictions.label.to_numpy(), predictions.class1.to_numpy()), 1)
    return pd.DataFrame(table, index=classes, columns=classes)


def per_class(predictions: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """class, images, top1 in percent (nan without pictures) and its most frequent mistake."""
    table = confusion(predictions, classes)
    counts = table.sum(axis=1).to_numpy()
    hits = np.diag(table)
    with np.errstate(invalid="ignore"):
        top1 = 100 * hits / np.where(counts, counts, np.nan)
    wrong = table.to_numpy() - np.diag(hits)
    mistake = [classes[j] if wrong[i, j] else "" for i, j in enumerate(wrong.argmax(axis=1))]
    return pd.DataFrame({"class": classes, "images": counts, "top1": top1, "mistaken for": mistake})


def mistakes(predictions: pd.DataFrame, count: int = 12) -> pd.DataFrame:
    """The wrong answers given with most confidence, worst first."""
    wrong = predictions[predictions.label != predictions.class1]
    return wrong.sort_values("p1", ascending=False, kind="stable").head(count)
