"""Distillation losses against slow loops over the formulas, torch and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.special import softmax as scipy_softmax
from scipy.stats import entropy, pearsonr, zscore
from torch import Tensor
from torch.nn import functional as F

from workbench.distillation import losses as kd_losses

NAMES = ["kl", "ce", "l2", "l2_normalized", "up_kl", "dist", "dkd", "kl_standardized_logits"]
TEMPERED = ["kl", "ce", "dist", "dkd", "kl_standardized_logits"]
PER_IMAGE = [name for name in NAMES if name != "dist"]
SHAPES = [(1, 2), (1, 5), (2, 2), (4, 3), (7, 11)]
TEMPERATURES = [0.5, 1.0, 4.0]
BETA = 3.0


def logits(seed: int, n: int = 6, classes: int = 5, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale


def labels(n: int = 6, classes: int = 5) -> Tensor:
    return torch.arange(n) * 3 % classes


def decided(seed: int) -> Tensor:
    """Logits of a teacher that has learnt: one class well above the others."""
    return logits(seed, scale=1.0) + 4 * F.one_hot(labels().flip(0), 5)


def loss_of(name: str, student: Tensor, teacher: Tensor, t: float = 1.0) -> Tensor:
    return kd_losses.create_loss(name, t, BETA)(student, teacher, labels(*student.shape))


def gradient(name: str, student: Tensor, teacher: Tensor, t: float = 1.0) -> Tensor:
    student = student.clone().requires_grad_()
    loss_of(name, student, teacher, t).backward()
    return student.grad


# ---- slow references, from the formulas alone


def log_softmax(row: list[float], t: float = 1.0) -> list[float]:
    total = math.log(sum(math.exp(z / t) for z in row))
    return [z / t - total for z in row]


def divergence(teacher: list[float], student: list[float]) -> float:
    """KL of two rows of probabilities."""
    return sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))


def slow_softmax(row: list[float], t: float = 1.0) -> list[float]:
    return [math.exp(log) for log in log_softmax(row, t)]


def slow_kl(s: list[float], t: list[float], label: int, temperature: float) -> float:
    return temperature**2 * divergence(slow_softmax(t, temperature), slow_softmax(s, temperature))


def slow_ce(s: list[float], t: list[float], label: int, temperature: float) -> float:
    p = slow_softmax(t, temperature)
    return -sum(p * log for p, log in zip(p, log_softmax(s, temperature), strict=True))


def slow_l2(s: list[float], t: list[float], label: int, temperature: float) -> float:
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def slow_l2_normalized(s: list[float], t: list[float], label: int, temperature: float) -> float:
    s_norm, t_norm = (math.sqrt(sum(x * x for x in row)) for row in (s, t))
    return sum((a / s_norm - b / t_norm) ** 2 for a, b in zip(s, t, strict=True))


def slow_up_kl(s: list[float], t: list[float], label: int, temperature: float) -> float:
    return slow_kl([max(z, 0) for z in s], [max(z, 0) for z in t], label, 1.0)


def slow_dkd(s: list[float], t: list[float], label: int, temperature: float) -> float:
    p_s, p_t = slow_softmax(s, temperature), slow_softmax(t, temperature)
    target = divergence([p_t[label], sum(p_t) - p_t[label]], [p_s[label], sum(p_s) - p_s[label]])
    rest_s, rest_t = ([z for c, z in enumerate(row) if c != label] for row in (s, t))
    rest = divergence(slow_softmax(rest_t, temperature), slow_softmax(rest_s, temperature))
    return temperature**2 * (target + BETA * rest)


def slow_kl_standardized(s: list[float], t: list[float], label: int, temperature: float) -> float:
    def standard(row: list[float]) -> list[float]:
        mean = sum(row) / len(row)
        sd = math.sqrt(sum((z - mean) ** 2 for z in row) / len(row))
        return [(z - mean) / sd for z in row]

    return slow_kl(standard(s), standard(t), label, temperature)


def slow_pearson(x: list[float], y: list[float]) -> float:
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    both = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    squares = [sum((a - m) ** 2 for a in row) for row, m in ((x, x_mean), (y, y_mean))]
    return both / math.sqrt(squares[0] * squares[1])


def slow_dist(student: list, teacher: list, temperature: float) -> float:
    p_s, p_t = ([slow_softmax(row, temperature) for row in side] for side in (student, teacher))
    n, classes = len(p_s), len(p_s[0])
    inter = 1 - sum(slow_pearson(a, b) for a, b in zip(p_s, p_t, strict=True)) / n
    if n == 1:
        return temperature**2 * inter
    columns = zip(zip(*p_s, strict=True), zip(*p_t, strict=True), strict=True)
    intra = 1 - sum(slow_pearson(a, b) for a, b in columns) / classes
    return temperature**2 * (inter + intra)


SLOW = {
    "kl": slow_kl,
    "ce": slow_ce,
    "l2": slow_l2,
    "l2_normalized": slow_l2_normalized,
    "up_kl": slow_up_kl,
    "dkd": slow_dkd,
    "kl_standardized_logits": slow_kl_standardized,
}


def slow(name: str, student: Tensor, teacher: Tensor, temperature: float) -> float:
    s, t = student.tolist(), teacher.tolist()
    if name == "dist":
        return slow_dist(s, t, temperature)
    rows = zip(s, t, labels(*student.shape).tolist(), strict=True)
    return sum(SLOW[name](*row, temperature) for row in rows) / len(s)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_is_its_formula(name, shape, temperature):
    student, teacher = logits(1, *shape), logits(2, *shape)
    ours = loss_of(name, student, teacher, temperature)
    assert ours.shape == () and ours.dtype == torch.float64
    wanted = slow(name, student, teacher, temperature)
    assert ours.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


# ---- identities


def test_l2_of_any_shape_is_the_mean_over_images_and_elements():
    maps = logits(1, 4, 30).reshape(4, 5, 3, 2), logits(2, 4, 30).reshape(4, 5, 3, 2)
    wanted = np.mean((maps[0].numpy() - maps[1].numpy()) ** 2)
    assert kd_losses.l2(*maps).item() == pytest.approx(wanted)
    torch.testing.assert_close(kd_losses.l2(*maps), kd_losses.l2(*(x.flatten(1) for x in maps)))


def test_l2_normalized_of_any_shape_is_two_minus_two_cosines():
    maps = logits(1, 4, 30).reshape(4, 5, 3, 2), logits(2, 4, 30).reshape(4, 5, 3, 2)
    rows = zip(*(x.flatten(1).numpy() for x in maps), strict=True)
    wanted = np.mean([2 * cosine(a, b) for a, b in rows])
    assert kd_losses.l2_normalized(*maps).item() == pytest.approx(wanted)
    channels_last = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    assert kd_losses.l2_normalized(*channels_last).item() == pytest.approx(wanted)


def parts_of_dkd(student: Tensor, teacher: Tensor, t: float) -> tuple[np.ndarray, ...]:
    """TCKD, NCKD and the teacher's share of the target class, by scipy, one per image."""
    rows = np.arange(len(student))
    p, q = (scipy_softmax(z.numpy() / t, axis=1) for z in (teacher, student))
    own_p, own_q = (x[rows, labels(*student.shape)] for x in (p, q))
    tckd = entropy([own_p, 1 - own_p], [own_q, 1 - own_q])
    p[rows, labels(*student.shape)] = q[rows, labels(*student.shape)] = 0
    return tckd, entropy(p, q, axis=1), own_p  # entropy brings the rest to a sum of 1


@pytest.mark.parametrize("t", TEMPERATURES)
def test_kl_is_tckd_plus_weighted_nckd(t):
    """The identity of the DKD paper, eq. 6; image by image, since the doubt is an image's."""
    student, teacher = logits(1), logits(2)
    tckd, nckd, sure = parts_of_dkd(student, teacher, t)
    wanted = t**2 * (tckd + (1 - sure) * nckd).mean()
    assert kd_losses.kl(student, teacher, t).item() == pytest.approx(wanted)
    for i in range(len(student)):
        one = student[i : i + 1], teacher[i : i + 1]
        ours = kd_losses.dkd(*one, labels()[i : i + 1], t, 1 - sure[i])
        torch.testing.assert_close(ours, kd_losses.kl(*one, t))


# ---- equal student and teacher, degenerate logits


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equal_logits_have_no_loss_and_no_gradient(name, shape, temperature):
    teacher = logits(1, *shape)
    cost = loss_of(name, teacher, teacher, temperature).item()
    if name == "ce":
        p = scipy_softmax(teacher.numpy() / temperature, axis=1)
        cost -= entropy(p, axis=1).mean()
    assert cost == pytest.approx(0, abs=1e-12)
    still = gradient(name, teacher, teacher, temperature)
    torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-12)


DEGENERATE = {
    "all logits 0": torch.zeros(4, 3),
    "constant rows": torch.tensor([[0.1], [-7.3], [0.003], [9e3]]).expand(4, 3),
    "constant columns": torch.tensor([0.3, -1.1, 2.7]).expand(4, 3),
    "one class constant": torch.tensor([[1.0, 2.0, -60.0], [2.0, 1.0, -60.0]]),
    "a constant row among others": torch.tensor([[1.0, 2.0, 4.0], [0.7, 0.7, 0.7]]),
    "two classes": torch.tensor([[0.1, 0.2], [3.0, -3.0], [0.0, 0.0]]),
    "one image": torch.tensor([[0.1, 0.2, 5.0]]),
    "huge": torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [9e3, -1e4, 9.001e3]]),
    "a thousand classes": torch.full((3, 1000), 0.1),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_equal_degenerate_logits_have_no_loss_in_float32(name, case):
    both = DEGENERATE[case]
    cost = loss_of(name, both, both)
    if name == "ce":
        cost = cost - entropy(scipy_softmax(both.double().numpy(), axis=1), axis=1).mean()
    assert cost.dtype == torch.float32
    assert cost.item() == pytest.approx(0, abs=1e-6)
    still = gradient(name, both, both)
    torch.testing.assert_close(still, torch.zeros_like(still), rtol=0, atol=1e-6)


@pytest.mark.parametrize("swap", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_logits_have_finite_losses_and_small_gradients(name, temperature, case, swap):
    """A denominator guarded by 1e-8 would give gradients of 1e8."""
    pair = DEGENERATE[case], logits(3, *DEGENERATE[case].shape).float()
    student, teacher = reversed(pair) if swap else pair
    cost = loss_of(name, student, teacher, temperature)
    assert cost.isfinite() and cost >= 0
    slope = gradient(name, student, teacher, temperature)
    assert slope.isfinite().all()
    if name != "l2":
        assert slope.abs().max() < 100


@pytest.mark.parametrize("name", NAMES)
def test_huge_opposite_logits_stay_finite_in_float32(name):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 50.0]])
    for teacher in (-student, student.flip(1), student.flip(0)):
        for temperature in (0.1, 1.0, 20.0):
            assert loss_of(name, student, teacher, temperature).isfinite()
            assert gradient(name, student, teacher, temperature).isfinite().all()


# ---- precision


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


@pytest.mark.parametrize("name", NAMES)
def test_the_higher_precision_is_used(name):
    student, teacher = logits(1).float(), logits(2)
    ours = loss_of(name, student, teacher)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, loss_of(name, student.double(), teacher))
    assert gradient(name, student, teacher).dtype == torch.float32


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", NAMES)
def test_float32_is_close_to_float64(name, temperature):
    student, teacher = logits(1, 32, 100, 4.0).float(), logits(2, 32, 100, 4.0).float()
    for find in (loss_of, gradient):
        ours = find(name, student, teacher, temperature)
        exact = find(name, student.double(), teacher.double(), temperature)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)


def test_dist_counts_classes_whose_probabilities_underflow():
    """e^-150 is 0 in float32, but r of the class is a matter of ratios, as slow_dist has it."""
    student, teacher = logits(1, classes=4).float(), logits(2, classes=4).float()
    for z in (student, teacher):
        z[:, 0] -= 150
    wanted = slow("dist", student, teacher, 1.0)
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


# ---- the mean over images


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


# ---- invariances


@pytest.mark.parametrize("name", TEMPERED)
def test_losses_are_invariant_to_a_constant_per_row(name):
    student, teacher, shift = logits(1), logits(2), logits(3, classes=1)
    wanted = loss_of(name, student, teacher, 2.0)
    torch.testing.assert_close(loss_of(name, student + shift, teacher, 2.0), wanted)
    torch.testing.assert_close(loss_of(name, student, teacher + shift, 2.0), wanted)


def test_kl_standardized_is_invariant_to_scale_and_kl_is_not():
    student, teacher = logits(1), logits(2)
    scale, shift = logits(3, classes=1).exp(), logits(4, classes=1)
    wanted = kd_losses.kl_standardized_logits(student, teacher, 2.0)
    for s, t in ((student * scale + shift, teacher), (student, teacher * scale + shift)):
        torch.testing.assert_close(kd_losses.kl_standardized_logits(s, t, 2.0), wanted)
        assert abs(kd_losses.kl(s, t, 2.0) - kd_losses.kl(student, teacher, 2.0)) > 0.1
    assert abs(kd_losses.kl_standardized_logits(-student, teacher, 2.0) - wanted) > 0.05


def test_l2_normalized_is_invariant_to_length():
    student, teacher, scale = logits(1), logits(2), logits(3, classes=1).exp()
    wanted = kd_losses.l2_normalized(student, teacher)
    torch.testing.assert_close(kd_losses.l2_normalized(student * scale, teacher), wanted)
    torch.testing.assert_close(kd_losses.l2_normalized(student, teacher * scale), wanted)
    assert kd_losses.l2_normalized(-teacher, teacher).item() == pytest.approx(4)


def test_dist_is_invariant_to_scale_and_shift_of_probabilities():
    """One scale for all rows and shifts by column sum keep rows and columns linear images."""
    teacher = logits(1)
    student = (0.3 * teacher.softmax(1) + 0.7 / 5).log()
    assert kd_losses.dist(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert kd_losses.kl(student, teacher).item() > 0.1
    torch.testing.assert_close(
        kd_losses.dist(student, logits(2)), kd_losses.dist(teacher, logits(2)), rtol=1e-9, atol=0
    )


def test_dist_is_0_for_correlated_and_4_for_opposite_predictions():
    """Of two classes and two images, where r is 1 or -1 in every row and column."""
    teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert kd_losses.dist(teacher * 3, teacher).item() == pytest.approx(0, abs=1e-6)
    assert kd_losses.dist(-teacher, teacher).item() == pytest.approx(4)
    assert kd_losses.dist(-teacher, teacher, 3.0).item() == pytest.approx(36, rel=1e-5)


def test_up_kl_ignores_negative_logits():
    teacher = torch.tensor([[3.0, -1.0, -2.0, 1.0]])
    student = torch.tensor([[3.0, -9.0, -0.1, 1.0]])
    assert kd_losses.up_kl(student, teacher) == 0 and kd_losses.kl(student, teacher) > 0.01
    assert not gradient("up_kl", student, teacher).any()
    stuck = torch.tensor([[-0.5, 2.0]])  # the teacher is for class 0, where the student is below 0
    slope = gradient("up_kl", stuck, -stuck)
    assert slope[0, 0] == 0 and slope[0, 1] > 0


# ---- temperature


@pytest.mark.parametrize("name", ["kl", "dkd", "kl_standardized_logits"])
def test_t_squared_keeps_the_gradient_constant(name):
    student, teacher = logits(1), logits(2)
    sizes = [gradient(name, student, teacher, t).norm().item() for t in (10, 20, 40, 80)]
    assert max(sizes) < 1.3 * min(sizes)


def test_gradient_of_ce_decreases_with_t_squared():
    student, teacher = logits(1), logits(2)
    at_20, at_40 = (gradient("ce", student, teacher, t).norm().item() for t in (20, 40))
    assert at_40 == pytest.approx(at_20 / 4, rel=0.1)


def test_gradient_of_dist_grows_with_t_squared():
    student, teacher = logits(1), logits(2)
    at_20, at_40 = (gradient("dist", student, teacher, t).norm().item() for t in (20, 40))
    assert at_40 == pytest.approx(4 * at_20, rel=0.1)


def test_kl_at_high_temperature_matches_centred_logits():
    """Hinton et al., eq. 4: its gradient is (s - t) / C per image."""
    student, teacher = (z - z.mean(1, keepdim=True) for z in (logits(1), logits(2)))
    slope = gradient("kl", student, teacher, 1e4)
    torch.testing.assert_close(slope, (student - teacher) / 5 / 6, rtol=1e-3, atol=1e-5)


# ---- undefined correlations and directions


def test_dist_is_zero_for_a_constant_teacher():
    student = logits(1).requires_grad_()
    indifferent = torch.zeros_like(student)
    kd_losses.dist(student, indifferent).backward()
    assert kd_losses.dist(student, indifferent).item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12


def test_dist_moves_a_constant_student_to_the_teacher():
    student, teacher = torch.zeros(6, 5, dtype=torch.float64), decided(2)
    assert kd_losses.dist(student, teacher).item() == pytest.approx(2)
    moved = student - gradient("dist", student, teacher)
    assert (moved.argmax(1) == teacher.argmax(1)).all()
    assert kd_losses.dist(moved, teacher) < 1


def test_dist_counts_a_constant_class_as_zero():
    """The mean still counts it, with 0."""
    shares = [[0.5, 0.2, 0.3], [0.5, 0.4, 0.1], [0.5, 0.1, 0.4]]
    student, teacher = logits(1, 3, 3), torch.tensor(shares, dtype=torch.float64).log()
    p, q = student.softmax(1).numpy(), teacher.softmax(1).numpy()
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
    assert ours == pytest.approx(slow("dist", spread * student, teacher, 1.0), rel=0.01)


# ---- labels


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


# ---- learning


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_gradient_descent_leads_to_the_teachers_predictions(name, seed):
    student, teacher = logits(seed, scale=0.5), decided(seed + 10)
    if name == "up_kl":
        student = student.abs()  # where it is below 0 it never learns
    least = loss_of(name, teacher, teacher).item()
    costs = [loss_of(name, student, teacher).item() - least]
    for _ in range(100):
        student = student - gradient(name, student, teacher)
        costs.append(loss_of(name, student, teacher).item() - least)
    assert costs[1] < costs[0] and costs[-1] < 0.1 * costs[0]
    assert (student.argmax(1) == teacher.argmax(1)).all()


# ---- names and shapes


def test_create_loss_uses_the_options_of_the_recipe():
    student, teacher = logits(1), logits(2)
    for name in NAMES:
        own = [2.0] * (name in TEMPERED) + [BETA] * (name == "dkd")
        extra = [labels()] * (name == "dkd")
        wanted = getattr(kd_losses, name)(student, teacher, *extra, *own)
        assert kd_losses.create_loss(name, 2.0, BETA)(student, teacher, labels()) == wanted
        if name != "dkd":
            assert kd_losses.create_loss(name, 2.0, BETA)(student, teacher, None) == wanted


def test_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'kd'.*" + ", ".join(NAMES)):
        kd_losses.create_loss("kd", 1.0, BETA)


@pytest.mark.parametrize("name", NAMES)
def test_other_shapes_are_refused_even_if_they_broadcast(name):
    for shape in ((6, 1), (1, 5), (6, 4), (6, 5, 1)):
        with pytest.raises(ValueError, match=r"\(6, 5\)"):
            kd_losses.create_loss(name, 1.0, BETA)(torch.ones(6, 5), torch.ones(shape), labels())
