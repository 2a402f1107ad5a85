"""A model's predictions as a table with a row per image."""

from collections.abc import Callable, Iterable

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench import models
from workbench.data import Batch, DataError

TOP = 5


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    normalize: Callable[[Tensor], Tensor],
    device: torch.device,
    progress: Callable[[int], object] | None = None,
    top: int = TOP,
) -> pd.DataFrame:
    """Predictions of a model in evaluation mode and float32, in the order of the image list.

    Columns: row (of the list), label, class1 to class`top` (class numbers, best first; fewer when
    there are fewer classes), p1 to p`top` (softmax), p_label, loss (cross-entropy in nats, without
    smoothing). Where a logit is nan, p and loss are, and the label is ranked last: it counts as
    wrong. Images that could not be read have no row; attrs["failures"] lists their (row,
    reason, detail). `progress` receives the number of images of each batch. Raises
    DataError without any image.
    """
    parts, failures = [], []
    with models.eval_mode(model):
        for batch in batches:
            failures += batch.failures
            if len(batch.images):
                images = normalize(batch.images.to(device, non_blocking=True))
                parts.append(_columns(batch, model(images).float(), top))
            if progress is not None:
                progress(len(batch.images))
    if not parts:
        raise DataError("no image of the validation list could be read")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    frame = pd.DataFrame(columns).sort_values("row", ignore_index=True)
    frame.attrs["failures"] = failures
    return frame


def _columns(batch: Batch, logits: Tensor, top: int) -> dict[str, np.ndarray]:
    log_p, labels = F.log_softmax(logits, dim=1), batch.labels.to(logits.device)[:, None]
    # A stable sort ranks equal logits by class number; the order of topk is undefined.
    best = torch.sort(log_p, dim=1, descending=True, stable=True)
    label_log_p = log_p.gather(1, labels)[:, 0]
    after_label = (labels + 1 + torch.arange(logits.shape[1], device=logits.device)) % logits.shape[
        1
    ]
    ranked = torch.where(label_log_p[:, None].isnan(), after_label, best.indices)
    # Copies: tensors of a loader process keep a file of shared memory open.
    columns = {"row": batch.indices.numpy().copy(), "label": batch.labels.numpy().copy()}
    ranks = range(min(top, logits.shape[1]))
    columns |= {f"class{i + 1}": ranked[:, i].int().cpu().numpy() for i in ranks}
    columns |= {f"p{i + 1}": best.values[:, i].exp().cpu().numpy() for i in ranks}
    return columns | {
        "p_label": label_log_p.exp().cpu().numpy(),
        "loss": -label_log_p.cpu().numpy(),
    }
