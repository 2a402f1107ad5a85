"""Losses against torch, timm and slow loops over the formula."""

import math

import pytest
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from workbench.training import losses

N, C = 7, 11


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def labels() -> torch.Tensor:
    return torch.arange(N) * 3 % C


def mixed(share: float = 0.3) -> torch.Tensor:
    """Two classes a row, as Mixup and CutMix make them."""
    first, second = losses.soft(labels(), C), losses.soft(labels().flip(0), C)
    return (share * first + (1 - share) * second).double()


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(z) for z in row))
    return [z - total for z in row]


def slow_ce(z: torch.Tensor, t: torch.Tensor) -> list[float]:
    return [
        -sum(share * log for share, log in zip(target, log_softmax(row), strict=True))
        for row, target in zip(z.tolist(), t.tolist(), strict=True)
    ]


def slow_bce(z: torch.Tensor, t: torch.Tensor, over) -> list[float]:
    def one(z: float, t: float) -> float:
        p = 1 / (1 + math.exp(-z))
        return -(t * math.log(p) + (1 - t) * math.log(1 - p))

    rows = zip(z.tolist(), t.tolist(), strict=True)
    return [over([one(*pair) for pair in zip(*row, strict=True)]) for row in rows]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("targets", [labels(), mixed()], ids=["hard", "mixed"])
@pytest.mark.parametrize("s", [0.0, 0.1])
def test_cross_entropy_is_its_formula(targets, s):
    t = losses.soft(targets, C, torch.float64) * (1 - s) + s / C
    assert losses.cross_entropy(logits(), targets, s).tolist() == pytest.approx(
        slow_ce(logits(), t)
    )


def test_cross_entropy_equals_timm_for_hard_and_for_soft_labels():
    ours = losses.cross_entropy(logits(), labels(), 0.1).mean()
    torch.testing.assert_close(ours, LabelSmoothingCrossEntropy(0.1)(logits(), labels()))
    ours = losses.cross_entropy(logits(), mixed()).mean()
    torch.testing.assert_close(ours, SoftTargetCrossEntropy()(logits(), mixed()))


def test_soft_labels_of_one_class_cost_what_the_class_number_costs():
    hard = losses.cross_entropy(logits(), labels(), 0.1)
    torch.testing.assert_close(
        hard, losses.cross_entropy(logits(), losses.soft(labels(), C, torch.float64), 0.1)
    )
    hard = losses.binary_cross_entropy(logits(), labels(), 0.1)
    torch.testing.assert_close(
        hard, losses.binary_cross_entropy(logits(), losses.soft(labels(), C), 0.1)
    )


@pytest.mark.parametrize("s", [0.0, 0.1, 0.3])
def test_canonical_smoothing_keeps_a_sum_of_one(s):
    for targets in (losses.soft(labels(), C), mixed()):
        sums = losses.smooth(targets, s).sum(1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_united_perceptions_smoothing_loses_s_over_c_where_two_classes_are_mixed():
    smoothed = losses.smooth_up(mixed(), 0.1)
    different = labels() != labels().flip(0)
    wanted = torch.where(different, 1 - 0.1 / C, 1.0).double()
    torch.testing.assert_close(smoothed.sum(1), wanted)
    for row, target in zip(smoothed.tolist(), mixed().tolist(), strict=True):
        assert row == pytest.approx([t * (0.9 + 0.1 / C) if t > 0 else 0.1 / C for t in target])
    torch.testing.assert_close(
        losses.cross_entropy(logits(), mixed(), 0.1, up_smoothing=True),
        torch.tensor(slow_ce(logits(), smoothed), dtype=torch.float64),
    )


def test_united_perceptions_smoothing_is_the_canonical_one_for_hard_labels():
    torch.testing.assert_close(
        losses.cross_entropy(logits(), labels(), 0.1, up_smoothing=True),
        losses.cross_entropy(logits(), labels(), 0.1),
    )
    one_hot = losses.soft(labels(), C, torch.float64)
    torch.testing.assert_close(losses.smooth_up(one_hot, 0.1), losses.smooth(one_hot, 0.1))


@pytest.mark.parametrize("targets", [labels(), mixed()], ids=["hard", "mixed"])
@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_binary_cross_entropy_is_its_formula(targets, sum_classes, shift):
    t = losses.soft(targets, C, torch.float64)
    z = logits() - math.log(C) if shift else logits()
    ours = losses.binary_cross_entropy(logits(), targets, sum_classes=sum_classes, shift=shift)
    assert ours.tolist() == pytest.approx(slow_bce(z, t, sum if sum_classes else mean))


@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2, 0.5])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_binary_cross_entropy_equals_timm(sum_classes, threshold, share):
    theirs = BinaryCrossEntropy(0.1, target_threshold=threshold, sum_classes=sum_classes)
    options = {"threshold": threshold, "sum_classes": sum_classes}
    torch.testing.assert_close(
        losses.binary_cross_entropy(logits(), labels(), 0.1, **options).mean(),
        theirs(logits(), labels()),
    )
    torch.testing.assert_close(  # timm expects mixed labels to be smoothed already
        losses.binary_cross_entropy(logits(), mixed(share), 0.1, **options).mean(),
        theirs(logits(), losses.smooth(mixed(share), 0.1)),
    )


def test_the_threshold_makes_every_class_above_it_fully_present():
    both = losses.binary_cross_entropy(logits(), mixed(0.3), threshold=0.2, sum_classes=True)
    present = (mixed(0.3) > 0).double()
    assert both.tolist() == pytest.approx(slow_bce(logits(), present, sum))
    one = losses.binary_cross_entropy(logits(), mixed(0.3), threshold=0.4, sum_classes=True)
    stronger = (mixed(0.3) > 0.4).double()
    assert one.tolist() == pytest.approx(slow_bce(logits(), stronger, sum))


def test_the_sum_is_classes_times_the_mean():
    a = losses.binary_cross_entropy(logits(), mixed(), sum_classes=True)
    torch.testing.assert_close(a, C * losses.binary_cross_entropy(logits(), mixed()))


def test_fresh_logits_cost_about_what_cross_entropy_costs_only_with_sum_and_shift():
    """At C = 1000: 7.9 against ln 1000 = 6.9; 693 without the shift, 0.69 without the sum."""
    fresh, target = torch.zeros(1, 1000), torch.tensor([3])
    cost = lambda **options: losses.binary_cross_entropy(fresh, target, **options).item()
    assert cost(sum_classes=True, shift=True) == pytest.approx(math.log(1000) + 1, rel=0.01)
    assert cost(sum_classes=True) == pytest.approx(1000 * math.log(2))
    assert cost() == pytest.approx(math.log(2))
    assert losses.cross_entropy(fresh, target).item() == pytest.approx(math.log(1000))


def test_losses_come_one_per_image_with_gradients_of_their_own():
    for loss in (losses.cross_entropy, losses.binary_cross_entropy):
        for targets in (labels(), mixed()):
            z = logits().requires_grad_()
            value = loss(z, targets)
            assert value.shape == (N,)
            value[2].backward()
            assert z.grad[2].any() and not z.grad[[0, 1, 3, 4, 5, 6]].any()
