"""Losses against torch, timm and slow loops over the formula."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from workbench.recipe import Recipe, RecipeError
from workbench.training import TrainingError, losses

N, C = 7, 11
LOGITS = 3 * torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(N) * 3 % C


def mixed(share: float = 0.3) -> torch.Tensor:
    """Two classes a row, as Mixup and CutMix make them."""
    first, second = losses.soft(LABELS, C), losses.soft(LABELS.flip(0), C)
    return (share * first + (1 - share) * second).double()


def slow_ce(z: torch.Tensor, t: torch.Tensor) -> list[float]:
    values = []
    for row, target in zip(z.tolist(), t.tolist(), strict=True):
        total = math.log(sum(math.exp(z) for z in row))
        values.append(-sum(t * (z - total) for t, z in zip(target, row, strict=True)))
    return values


def slow_bce(z: torch.Tensor, t: torch.Tensor, over=sum) -> list[float]:
    def one(z: float, t: float) -> float:
        p = 1 / (1 + math.exp(-z))
        return -(t * math.log(p) + (1 - t) * math.log(1 - p))

    rows = zip(z.tolist(), t.tolist(), strict=True)
    return [over([one(*pair) for pair in zip(*row, strict=True)]) for row in rows]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


hard_and_mixed = pytest.mark.parametrize("targets", [LABELS, mixed()], ids=["hard", "mixed"])


@hard_and_mixed
@pytest.mark.parametrize("s", [0.0, 0.1])
def test_cross_entropy_is_its_formula(targets, s):
    t = losses.smooth(losses.soft(targets, C, torch.float64), s)
    torch.testing.assert_close(t.sum(1), torch.ones(N, dtype=torch.float64))
    ours = losses.cross_entropy(LOGITS, targets, s)
    assert ours.tolist() == pytest.approx(slow_ce(LOGITS, t))


def test_cross_entropy_is_timms_for_hard_and_for_soft_labels():
    ours = losses.cross_entropy(LOGITS, LABELS, 0.1).mean()
    torch.testing.assert_close(ours, LabelSmoothingCrossEntropy(0.1)(LOGITS, LABELS))
    ours = losses.cross_entropy(LOGITS, mixed()).mean()
    torch.testing.assert_close(ours, SoftTargetCrossEntropy()(LOGITS, mixed()))


def test_united_perceptions_smoothing_loses_s_over_c_where_two_classes_are_mixed():
    smoothed = losses.smooth_up(mixed(), 0.1)
    wanted = torch.where(LABELS != LABELS.flip(0), 1 - 0.1 / C, 1.0).double()
    torch.testing.assert_close(smoothed.sum(1), wanted)
    for row, target in zip(smoothed.tolist(), mixed().tolist(), strict=True):
        assert row == pytest.approx([t * (0.9 + 0.1 / C) if t > 0 else 0.1 / C for t in target])
    ours = losses.cross_entropy(LOGITS, mixed(), 0.1, up_smoothing=True)
    assert ours.tolist() == pytest.approx(slow_ce(LOGITS, smoothed))


def test_united_perceptions_smoothing_is_the_standard_one_for_hard_labels():
    torch.testing.assert_close(
        losses.cross_entropy(LOGITS, LABELS, 0.1, up_smoothing=True),
        losses.cross_entropy(LOGITS, LABELS, 0.1),
    )
    one_hot = losses.soft(LABELS, C, torch.float64)
    torch.testing.assert_close(losses.smooth_up(one_hot, 0.1), losses.smooth(one_hot, 0.1))


@hard_and_mixed
@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_binary_cross_entropy_is_its_formula(targets, sum_classes, shift):
    t = losses.soft(targets, C, torch.float64)
    z = LOGITS - math.log(C) if shift else LOGITS
    ours = losses.binary_cross_entropy(LOGITS, targets, sum_classes=sum_classes, shift=shift)
    assert ours.tolist() == pytest.approx(slow_bce(z, t, sum if sum_classes else mean))


@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2, 0.5])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_binary_cross_entropy_is_timms(sum_classes, threshold, share):
    theirs = BinaryCrossEntropy(0.1, target_threshold=threshold, sum_classes=sum_classes)
    options = {"threshold": threshold, "sum_classes": sum_classes}
    # timm expects mixed labels to be smoothed already
    for targets, smoothed in (LABELS, LABELS), (mixed(share), losses.smooth(mixed(share), 0.1)):
        ours = losses.binary_cross_entropy(LOGITS, targets, 0.1, **options).mean()
        torch.testing.assert_close(ours, theirs(LOGITS, smoothed))


@pytest.mark.parametrize("threshold", [0.2, 0.4])
def test_every_class_above_the_threshold_is_fully_present(threshold):
    options = {"threshold": threshold, "sum_classes": True}
    ours = losses.binary_cross_entropy(LOGITS, mixed(0.3), **options)
    present = (mixed(0.3) > threshold).double()
    assert ours.tolist() == pytest.approx(slow_bce(LOGITS, present))


def test_initial_logits_cost_about_what_cross_entropy_costs_only_with_sum_and_shift():
    """At C = 1000: 7.9 against ln 1000 = 6.9; 693 without the shift, 0.69 without the sum."""
    logits, target = torch.zeros(1, 1000), torch.tensor([3])
    cost = lambda **options: losses.binary_cross_entropy(logits, target, **options).item()
    assert cost(sum_classes=True, shift=True) == pytest.approx(math.log(1000) + 1, rel=0.01)
    assert cost(sum_classes=True) == pytest.approx(1000 * math.log(2))
    assert cost() == pytest.approx(math.log(2))
    assert losses.cross_entropy(logits, target).item() == pytest.approx(math.log(1000))


@hard_and_mixed
@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.binary_cross_entropy])
def test_each_image_has_its_own_loss_and_gradient(loss, targets):
    z = LOGITS.clone().requires_grad_()
    value = loss(z, targets)
    assert value.shape == (N,)
    value[2].backward()
    assert z.grad[2].any() and not z.grad[[0, 1, 3, 4, 5, 6]].any()


# ---- focal loss and class weights


def test_focal_loss_is_its_formula_and_that_of_torchvision_for_two_classes():
    logits = torch.randn(8, 5, dtype=torch.float64) * 3
    hard = torch.arange(8) % 5
    p = logits.softmax(1)
    expected = [-((1 - row[t]) ** 2.5) * row[t].log() for row, t in zip(p, hard, strict=True)]
    ours = losses.focal(logits, hard, gamma=2.5)
    torch.testing.assert_close(ours, torch.stack(expected))
    # The softmax of (0, z) is the sigmoid of z.
    z = logits[:, 0]
    theirs = sigmoid_focal_loss(z, torch.ones_like(z), alpha=-1, gamma=2.5)
    both = torch.stack([torch.zeros_like(z), z], 1)
    torch.testing.assert_close(losses.focal(both, torch.ones_like(hard), gamma=2.5), theirs)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1]).double()])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_gamma_focal_loss_is_weighted_cross_entropy_for_hard_and_mixed_labels(
    weight, smoothing
):
    logits = torch.randn(8, 5, dtype=torch.float64) * 3
    hard = torch.arange(8) % 5
    mixed = 0.3 * F.one_hot(hard, 5).double() + 0.7 * F.one_hot(hard.flip(0), 5).double()
    for t in (hard, mixed):
        theirs = F.cross_entropy(logits, t, weight, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(
            losses.cross_entropy(logits, t, smoothing, weight=weight), theirs
        )
        ours = losses.focal(logits, t, smoothing, gamma=0.0, weight=weight)
        torch.testing.assert_close(ours, theirs)


def test_focal_loss_has_finite_gradients_where_the_prediction_is_certain():
    for gamma in (0.5, 1.0, 2.0):
        logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
        losses.focal(logits, torch.tensor([0, 0]), gamma=gamma).sum().backward()
        assert torch.isfinite(logits.grad).all() and logits.grad[1].abs().min() > 0.9


def test_balanced_weights_are_those_of_scikit_learn_and_average_to_one():
    labels = np.array([0, 0, 0, 0, 1, 2, 2])
    ours = losses.class_weights(Recipe(class_weights="balanced"), labels, ["a", "b", "c"])
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert ours.tolist() == pytest.approx(theirs) and ours[labels].mean() == pytest.approx(1.0)
    given = losses.class_weights(Recipe(class_weights="[1, 2.5, 3e-1]"), labels, ["a", "b", "c"])
    assert given.tolist() == pytest.approx([1.0, 2.5, 0.3])
    with pytest.raises(TrainingError, match="'d' has no training image"):
        losses.class_weights(Recipe(class_weights="balanced"), labels, ["a", "b", "c", "d"])
    with pytest.raises(TrainingError, match="3 numbers for 2 classes"):
        losses.class_weights(Recipe(class_weights=[1, 2, 3]), labels, ["a", "b"])


@pytest.mark.parametrize(
    "values, key",
    [
        (dict(class_weights=[1.0, 0.0]), "class_weights"),
        (dict(class_weights=["balanced", 1.0]), "class_weights"),
        (dict(class_weights="equal"), "class_weights"),
        (dict(class_weights="balanced", loss="bce"), "class_weights"),
        (dict(focal_gamma=1.0), "focal_gamma"),
        (dict(focal_gamma=-1.0, loss="focal"), "focal_gamma"),
    ],
)
def test_weights_and_gamma_that_mean_nothing_are_refused(values, key):
    with pytest.raises(RecipeError) as caught:
        Recipe(**values)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [key]
