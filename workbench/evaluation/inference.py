"""A model's predictions as a table with a row per image."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from workbench import models
from workbench.data import Batch, DataError

TOP = 5


@torch.no_grad()
def predict(
    model: nn.Module, batches: Any, normalize: Any, device: torch.device, progress: Any = None
) -> pd.DataFrame:
    """Predictions of a model over batches, in full precision, in the order of the frame.

    Columns: row (of the frame), label, class1 to class5 (ids, best first; fewer when there are
    fewer classes), p1 to p5 (softmax), p_label, loss (natural log, no smoothing). Images that
    could not be read have no row; attrs["failures"] holds their (row, reason, detail).
    """
    parts, failures = [], []
    with models.eval_mode(model):
        for batch in batches:
            failures += batch.failures
            if len(batch.images):
                images = normalize(batch.images.to(device, non_blocking=True))
                logits = model(images).float()
                parts.append(_rows(batch, logits))
            if progress is not None:
                progress(len(batch.images))
    if not parts:
        raise DataError("no image of the validation list could be read")
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
    # Copies: what came from a loader's process holds a file open for as long as it is kept.
    columns = {"row": batch.indices.numpy().copy(), "label": batch.labels.numpy().copy()}
    for i in range(k):
        columns[f"class{i + 1}"] = best.indices[:, i].cpu().numpy().astype(np.int32)
    for i in range(k):
        columns[f"p{i + 1}"] = best.values[:, i].exp().cpu().numpy()
    columns["p_label"] = label_log_p.exp().cpu().numpy()
    columns["loss"] = -label_log_p.cpu().numpy()
    return columns
