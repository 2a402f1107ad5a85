"""Distillation losses against their formulas by numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.special import log_softmax, softmax
from scipy.stats import entropy, pearsonr, zscore
from torch import Tensor
from torch.nn import functional as F

from workbench.distillation import losses as kd_losses

NAMES = ["kl", "ce", "l2", "l2_normalized", "up_kl", "dist", "dkd", "kl_standardized_logits"]
TEMPERED = ["kl", "ce", "dist", "dkd", "kl_standardized_logits"]
PER_IMAGE = [name for name in NAMES if name != "dist"]
SHAPES = [(1, 5), (2, 2), (4, 3), (7, 11)]
TEMPERATURES = [0.5, 1.0, 4.0]
BETA = 3.0


def logits(seed: int, n: int = 6, classes: int = 5, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale


def labels(n: int = 6, classes: int = 5) -> Tensor:
    return torch.arange(n) * 3 % classes


def decided(seed: int) -> Tensor:
    """Logits of a trained teacher: one class well above the others."""
    return logits(seed, scale=1.0) + 4 * F.one_hot(labels().flip(0), 5)


def loss_of(name: str, student: Tensor, teacher: Tensor, t: float = 1.0) -> Tensor:
    return kd_losses.create_loss(name, t, BETA)(student, teacher, labels(*student.shape))


def gradient(name: str, student: Tensor, teacher: Tensor, t: float = 1.0) -> Tensor:
    student = student.clone().requires_grad_()
    loss_of(name, student, teacher, t).backward()
    return student.grad


def scipy_kl(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    """T^2 KL of one image, by scipy."""
    return temperature**2 * entropy(softmax(t / temperature), softmax(s / temperature))


def scipy_dkd(s: np.ndarray, t: np.ndarray, label: int, temperature: float) -> float:
    target = [softmax(z / temperature)[label] for z in (t, s)]
    others = (np.delete(z, label) for z in (s, t))
    tckd = entropy(*([p, 1 - p] for p in target))
    return temperature**2 * tckd + BETA * scipy_kl(*others, temperature)


def scipy_dist(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    p, q = (softmax(z / temperature, axis=1) for z in (student, teacher))
    r = lambda a, b: np.mean([pearsonr(x, y).statistic for x, y in zip(a, b, strict=True)])
    return temperature**2 * (1 - r(p, q) + (1 - r(p.T, q.T) if len(p) > 1 else 0))


# From the formulas: student's and teacher's logits of one image, label, temperature.
FORMULAS = {
    "kl": lambda s, t, label, T: scipy_kl(s, t, T),
    "ce": lambda s, t, label, T: -softmax(t / T) @ log_softmax(s / T),
    "l2": lambda s, t, label, T: np.mean((s - t) ** 2),
    "l2_normalized": lambda s, t, label, T: 2 * cosine(s, t),
    "up_kl": lambda s, t, label, T: scipy_kl(np.maximum(s, 0), np.maximum(t, 0), 1.0),
    "dkd": scipy_dkd,
    "kl_standardized_logits": lambda s, t, label, T: scipy_kl(zscore(s), zscore(t), T),
}


def by_formula(name: str, student: Tensor, teacher: Tensor, temperature: float) -> float:
    s, t = student.double().numpy(), teacher.double().numpy()
    if name == "dist":
        return scipy_dist(s, t, temperature)
    rows = zip(s, t, labels(*student.shape).tolist(), strict=True)
    return np.mean([FORMULAS[name](*row, temperature) for row in rows])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_its_formula(name, shape, temperature):
    student, teacher = logits(1, *shape), logits(2, *shape)
    ours = loss_of(name, student, teacher, temperature)
    assert ours.shape == () and ours.dtype == torch.float64
    wanted = by_formula(name, student, teacher, temperature)
    assert ours.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_l2_losses_take_any_shape_and_layout():
    maps = logits(1, 4, 30).reshape(4, 5, 3, 2), logits(2, 4, 30).reshape(4, 5, 3, 2)
    rows = list(zip(*(x.flatten(1).numpy() for x in maps), strict=True))
    for layout in (torch.contiguous_format, torch.channels_last):
        pair = [x.contiguous(memory_format=layout) for x in maps]
        squares = np.mean([np.square(a - b) for a, b in rows])
        assert kd_losses.l2(*pair).item() == pytest.approx(squares)
        cosines = np.mean([2 * cosine(a, b) for a, b in rows])
        assert kd_losses.l2_normalized(*pair).item() == pytest.approx(cosines)


@pytest.mark.parametrize("t", TEMPERATURES)
def test_dkd_equals_kl_if_beta_is_the_probability_of_the_other_classes(t):
    """The identity of the DKD paper, eq. 6, for each image."""
    student, teacher = logits(1), logits(2)
    for i, label in enumerate(labels()):
        one = student[i : i + 1], teacher[i : i + 1]
        others = 1 - (teacher[i] / t).softmax(0)[label].item()
        ours = kd_losses.dkd(*one, label[None], t, others)
        torch.testing.assert_close(ours, kd_losses.kl(*one, t))


# ---- equal student and teacher, degenerate logits


DEGENERATE = {
    "all logits 0": torch.zeros(4, 3),
    "constant rows": torch.tensor([[0.1], [-7.3], [0.003], [9e3]]).expand(4, 3),
    "constant columns": torch.tensor([0.3, -1.1, 2.7]).expand(4, 3),
    "one class constant": torch.tensor([[1.0, 2.0, -60.0], [2.0, 1.0, -60.0]]),
    "a constant row among others": torch.tensor([[1.0, 2.0, 4.0], [0.7, 0.7, 0.7]]),
    "plain": logits(1).float(),
    "two classes": torch.tensor([[0.1, 0.2], [3.0, -3.0], [0.0, 0.0]]),
    "one image": torch.tensor([[0.1, 0.2, 5.0]]),
    "huge": torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [9e3, -1e4, 9.001e3]]),
    "a thousand classes": torch.full((3, 1000), 0.1),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_equal_logits_have_no_loss_and_no_gradient_in_float32(name, case):
    both = DEGENERATE[case]
    cost = loss_of(name, both, both)
    if name == "ce":
        cost = cost - entropy(softmax(both.double().numpy(), axis=1), axis=1).mean()
    assert cost.dtype == torch.float32
    assert cost.item() == pytest.approx(0, abs=1e-6)
    still = gradient(name, both, both)
    torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-6)


@pytest.mark.parametrize("swap", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_logits_have_finite_losses_and_small_gradients(name, case, swap):
    """A denominator guarded by 1e-8 would give gradients of 1e8."""
    pair = DEGENERATE[case], logits(3, *DEGENERATE[case].shape).float()
    student, teacher = reversed(pair) if swap else pair
    cost = loss_of(name, student, teacher)
    assert cost.isfinite() and cost >= 0
    slope = gradient(name, student, teacher)
    assert slope.isfinite().all()
    if name != "l2":
        assert slope.abs().max() < 100


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name, half):
    student, teacher = logits(1).to(half), logits(2).to(half)
    wanted = loss_of(name, student.float(), teacher.float())
    for pair in ((student, teacher), (student.float(), teacher), (student, teacher.float())):
        ours = loss_of(name, *pair)
        assert ours.dtype == torch.float32 and ours == wanted
    slope = gradient(name, student, teacher)
    assert slope.dtype == half and slope.isfinite().all()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_close_to_float64(name, temperature):
    student, teacher = logits(1, 32, 100, 4.0).float(), logits(2, 32, 100, 4.0).float()
    for find in (loss_of, gradient):
        ours = find(name, student, teacher, temperature)
        exact = find(name, student.double(), teacher.double(), temperature)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
    assert loss_of(name, student, teacher.double()).dtype == torch.float64  # the higher one


def test_dist_counts_classes_whose_probabilities_underflow():
    """e^-150 is 0 in float32, but r does not depend on the scale of a class."""
    student, teacher = logits(1, classes=4).float(), logits(2, classes=4).float()
    for z in (student, teacher):
        z[:, 0] -= 150
    wanted = by_formula("dist", student, teacher, 1.0)
    assert kd_losses.dist(student, teacher).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(1, 4), (3, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_finite_differences(name, shape, temperature):
    student, teacher = logits(1, *shape).requires_grad_(), logits(2, *shape)
    assert torch.autograd.gradcheck(lambda s: loss_of(name, s, teacher, temperature), student)


@pytest.mark.parametrize("name", NAMES)
def test_teacher_has_no_gradient(name):
    student, teacher = logits(1).requires_grad_(), logits(2).requires_grad_()
    loss_of(name, student, teacher).backward()
    assert student.grad.any() and teacher.grad is None


@pytest.mark.parametrize("name", PER_IMAGE)
def test_batch_loss_is_the_mean_over_images(name):
    student, teacher, loss = logits(1), logits(2), kd_losses.create_loss(name, 2.0, BETA)
    own = [loss(*(x[i : i + 1] for x in (student, teacher, labels()))) for i in range(6)]
    torch.testing.assert_close(loss(student, teacher, labels()), torch.stack(own).mean())


def test_dist_depends_on_the_batch():
    """Every image in itself is matched, and still the batch is not."""
    teacher = logits(1)
    probabilities = teacher.softmax(1)
    # p * a + (1 - a) / C: another share of the teacher's row for every image, so r = 1 in rows
    share = torch.linspace(0.1, 1, 6, dtype=torch.float64)[:, None]
    student = (probabilities * share + (1 - share) / 5).log()
    alone = [kd_losses.dist(student[i : i + 1], teacher[i : i + 1]).item() for i in range(6)]
    assert alone == pytest.approx([0] * 6, abs=1e-12)
    assert kd_losses.dist(student, teacher).item() > 0.01


def test_kl_standardized_is_invariant_to_scale_and_kl_is_not():
    student, teacher = logits(1), logits(2)
    scale, shift = logits(3, classes=1).exp(), logits(4, classes=1)
    wanted = kd_losses.kl_standardized_logits(student, teacher, 2.0)
    for s, t in ((student * scale + shift, teacher), (student, teacher * scale + shift)):
        torch.testing.assert_close(kd_losses.kl_standardized_logits(s, t, 2.0), wanted)
        assert abs(kd_losses.kl(s, t, 2.0) - kd_losses.kl(student, teacher, 2.0)) > 0.1
    assert abs(kd_losses.kl_standardized_logits(-student, teacher, 2.0) - wanted) > 0.05


def test_dist_is_invariant_to_scale_and_shift_of_probabilities():
    """One scale for all rows and shifts by column sum keep rows and columns linear images."""
    teacher = logits(1)
    student = (0.3 * teacher.softmax(1) + 0.7 / 5).log()
    assert kd_losses.dist(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert kd_losses.kl(student, teacher).item() > 0.1
    torch.testing.assert_close(
        kd_losses.dist(student, logits(2)), kd_losses.dist(teacher, logits(2)), rtol=1e-9, atol=0
    )


def test_up_kl_ignores_negative_logits():
    teacher = torch.tensor([[3.0, -1.0, -2.0, 1.0]])
    student = torch.tensor([[3.0, -9.0, -0.1, 1.0]])
    assert kd_losses.up_kl(student, teacher) == 0 and kd_losses.kl(student, teacher) > 0.01
    slope = gradient("up_kl", torch.tensor([[-0.5, 2.0]]), torch.tensor([[0.5, -2.0]]))
    assert slope[0, 0] == 0 and slope[0, 1] > 0


GROWTH = {"kl": 1, "dkd": 1, "kl_standardized_logits": 1, "ce": 1 / 4, "dist": 4}


@pytest.mark.parametrize("name", GROWTH)
def test_gradient_from_t_20_to_t_40(name):
    """Constant with T^2; ce has none, and the correlation of dist does not decrease."""
    student, teacher = logits(1), logits(2)
    at_20, at_40 = (gradient(name, student, teacher, t).norm().item() for t in (20, 40))
    assert at_40 == pytest.approx(at_20 * GROWTH[name], rel=0.1)


def test_kl_at_high_temperature_matches_centred_logits():
    """Hinton et al., eq. 4: its gradient is (s - t) / C per image."""
    student, teacher = (z - z.mean(1, keepdim=True) for z in (logits(1), logits(2)))
    slope = gradient("kl", student, teacher, 1e4)
    torch.testing.assert_close(slope, (student - teacher) / 5 / 6, rtol=1e-3, atol=1e-5)


def test_dist_ignores_a_constant_teacher_and_moves_a_constant_student():
    student, teacher = logits(1), decided(2)
    flat = torch.zeros_like(student)
    assert kd_losses.dist(student, flat).item() == pytest.approx(0, abs=1e-12)
    assert gradient("dist", student, flat).abs().max() < 1e-12
    assert kd_losses.dist(flat, teacher).item() == pytest.approx(2)
    moved = flat - gradient("dist", flat, teacher)
    assert (moved.argmax(1) == teacher.argmax(1)).all()
    assert kd_losses.dist(moved, teacher) < 1


def test_dist_counts_a_constant_class_as_zero():
    q = np.array([[0.5, 0.2, 0.3], [0.5, 0.4, 0.1], [0.5, 0.1, 0.4]])
    student, teacher = logits(1, 3, 3), torch.from_numpy(q).log()
    p = student.softmax(1).numpy()
    inter = np.mean([1 - pearsonr(*pair).statistic for pair in zip(p, q, strict=True)])
    intra = sum(1 - pearsonr(p[:, j], q[:, j]).statistic for j in (1, 2)) / 3
    assert kd_losses.dist(student, teacher).item() == pytest.approx(inter + intra)


def test_kl_standardized_moves_a_constant_student_to_the_teacher():
    student, teacher = torch.full((6, 5), 0.1), logits(2).float()
    wanted = kd_losses.kl(torch.zeros(6, 5), torch.tensor(zscore(teacher.numpy(), axis=1)))
    torch.testing.assert_close(kd_losses.kl_standardized_logits(student, teacher), wanted)
    moved = student - gradient("kl_standardized_logits", student, teacher)
    assert (moved.argmax(1) == teacher.argmax(1)).all()


def test_l2_normalized_moves_zeros_to_the_teacher():
    student, teacher = torch.zeros(1, 4), torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    assert kd_losses.l2_normalized(student, teacher).item() == pytest.approx(1)
    assert kd_losses.l2_normalized(teacher, student).item() == pytest.approx(1)
    slope = gradient("l2_normalized", student, teacher)
    torch.testing.assert_close(slope, torch.tensor([[-1.2, 0.0, -1.6, 0.0]]))


@pytest.mark.parametrize("spread", [1e-2, 1e-4])
def test_a_small_spread_is_not_constant(spread):
    student, teacher = logits(1), logits(2)
    ours = kd_losses.kl_standardized_logits((1 + spread * student).float(), teacher.float())
    wanted = kd_losses.kl_standardized_logits(student, teacher).item()
    assert ours.item() == pytest.approx(wanted, rel=0.01)
    ours = kd_losses.dist((spread * student).float(), teacher.float()).item()
    assert ours == pytest.approx(by_formula("dist", spread * student, teacher, 1.0), rel=0.01)


def test_target_of_soft_labels_is_the_first_largest_class():
    student, teacher = logits(1, 3), logits(2, 3)
    soft = torch.tensor([[0.1, 0.6, 0.3, 0, 0], [0.5, 0, 0, 0, 0.5], [0, 0, 0.2, 0.4, 0.4]])
    wanted = kd_losses.dkd(student, teacher, torch.tensor([1, 0, 3]), 2.0)
    assert kd_losses.dkd(student, teacher, soft, 2.0) == wanted
    assert kd_losses.dkd(student, teacher, soft.bfloat16(), 2.0) == wanted
    assert kd_losses.dkd(student, teacher, torch.tensor([1, 4, 4]), 2.0) != wanted


@pytest.mark.parametrize("t", TEMPERATURES)
def test_dkd_of_two_classes_is_kl(t):
    student, teacher = logits(1, 6, 2), logits(2, 6, 2)
    ours = kd_losses.dkd(student, teacher, labels(6, 2), t, 1e6)
    torch.testing.assert_close(ours, kd_losses.kl(student, teacher, t))


@pytest.mark.parametrize("name", NAMES)
def test_create_loss_uses_the_options_of_the_recipe(name):
    own = [2.0] * (name in TEMPERED) + [BETA] * (name == "dkd")
    extra = [labels()] * (name == "dkd")
    wanted = getattr(kd_losses, name)(logits(1), logits(2), *extra, *own)
    assert loss_of(name, logits(1), logits(2), 2.0) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_other_shapes_are_refused_even_if_they_broadcast(name):
    for shape in ((6, 1), (1, 5), (6, 4), (6, 5, 1)):
        with pytest.raises(ValueError, match=r"\[6, 5\]"):
            kd_losses.create_loss(name, 1.0, BETA)(torch.ones(6, 5), torch.ones(shape), labels())
