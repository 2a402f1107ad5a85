"""Losses of classification, one value per image: the mean over a step is the caller's.

Logits are (n, C). Targets are class numbers (n,), or soft labels (n, C) that sum to 1 over the
classes, as mixing makes them.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from workbench import parts
from workbench.recipe import Recipe
from workbench.recipe_checks import is_part
from workbench.schedule import TrainingError


def soft(targets: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Targets as soft labels (n, C): class numbers become one-hot rows, soft labels stay."""
    return (targets if targets.ndim == 2 else F.one_hot(targets, classes)).to(dtype)


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """t * (1 - s) + s / C for soft labels t (n, C); rows keep their sum of 1.

    Szegedy et al., arXiv 1512.00567, section 7; for a one-hot t also Bag of Tricks, section 5.2.
    """
    return targets * (1 - smoothing) + smoothing / targets.shape[1]


def smooth_up(targets: Tensor, smoothing: float) -> Tensor:
    """t * (1 - s + s / C) where t > 0, else s / C: United Perception's form, to reproduce it.

    The same as `smooth` for one-hot labels; a row that mixes k classes sums to
    1 - (k - 1) * s / C.
    """
    rest = smoothing / targets.shape[1]
    return torch.where(targets > 0, targets * (1 - smoothing + rest), rest)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    *,
    up_smoothing: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """-sum_c w_c * t_c * log softmax(z)_c, shape (n,), in nats; t smoothed as `smooth` has it.

    `up_smoothing` smooths as `smooth_up` instead, which differs for soft labels alone. `weight` w
    is (C,), 1 for None; torch's mean reduction would also divide by the sum of the weights.
    """
    if up_smoothing and targets.ndim == 2:
        targets, smoothing = smooth_up(targets, smoothing), 0.0
    how = {"reduction": "none", "label_smoothing": smoothing}
    return F.cross_entropy(logits, targets, weight, **how)


def focal(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
) -> Tensor:
    """-sum_c w_c * t_c * (1 - p_c)^gamma * log p_c with p = softmax(z), shape (n,).

    Lin et al., arXiv 1708.02002, equation 5, with the softmax of exclusive classes in place of the
    sigmoid; gamma 0 gives `cross_entropy`, with its `smoothing`.
    """
    log_p = F.log_softmax(logits, 1)
    targets = smooth(soft(targets, logits.shape[1], logits.dtype), smoothing)
    # 1 - p, exact where p is near 1; the clamp keeps its gradient finite there.
    others = (-torch.expm1(log_p)).clamp(min=torch.finfo(logits.dtype).tiny) ** gamma
    terms = targets * others * log_p
    return -(terms if weight is None else terms * weight).sum(1)


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    smoothing: float = 0.0,
    *,
    threshold: float | None = None,
    sum_classes: bool = False,
    shift: bool = False,
) -> Tensor:
    """-mean_c [t_c * log p_c + (1 - t_c) * log(1 - p_c)] with p = sigmoid(z), shape (n,).

    Wightman et al., "ResNet strikes back", arXiv 2110.00476, section 3.1. There a class counts as
    fully present (t = 1) when its share after smoothing is above `threshold` (0.2), else as absent.
    `sum_classes` sums over the classes instead of taking the mean: C times the gradient. `shift`
    replaces z by z - ln C, so that initial logits near 0 give p = 1 / (C + 1) instead of 1/2.
    United Perception's `bias: true` is both, `bias: false` neither.
    """
    classes = logits.shape[1]
    targets = smooth(soft(targets, classes, logits.dtype), smoothing)
    if threshold is not None:
        targets = (targets > threshold).to(logits.dtype)
    if shift:
        logits = logits - math.log(classes)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss.sum(1) if sum_classes else loss.mean(1)


def class_weights(recipe: Recipe, labels: np.ndarray, classes: list[str]) -> Tensor | None:
    """The recipe's weights (C,); None where it has none. Raises TrainingError.

    Balanced weights are scikit-learn's: their mean over the training images is 1.
    """
    if not (given := recipe.class_weights):
        return None
    if given == ["balanced"]:
        counts = np.bincount(labels, minlength=len(classes))
        if missing := [name for name, n in zip(classes, counts, strict=True) if n == 0]:
            raise TrainingError(
                f"class_weights balanced: {missing[0]!r} has no training image; leave the class "
                "out, or give one number for each class"
            )
        given = len(labels) / (len(classes) * counts)
    if len(given) != len(classes):
        raise TrainingError(f"class_weights has {len(given)} numbers for {len(classes)} classes")
    return torch.tensor(given, dtype=torch.float32)


def loss_function(
    recipe: Recipe, weight: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """(logits (n, classes), targets (n,) or soft (n, classes)) -> losses (n,) of training."""
    if is_part(recipe.loss):
        return parts.load("loss", recipe.loss, **recipe.loss_args)
    options = {"smoothing": recipe.label_smoothing}
    if recipe.loss == "bce":
        options |= {"threshold": recipe.bce_threshold, "sum_classes": recipe.bce_sum}
        return functools.partial(binary_cross_entropy, shift=recipe.bce_shift, **options)
    options["weight"] = weight
    if recipe.loss == "focal":
        return functools.partial(focal, gamma=recipe.focal_gamma, **options)
    return functools.partial(cross_entropy, up_smoothing=recipe.up_smoothing, **options)
