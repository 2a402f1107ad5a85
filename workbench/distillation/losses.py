"""Knowledge distillation losses.

Every loss returns a 0-d tensor, the mean over the images of the batch, and has a gradient for the
student only. Logits are (n, C). Half precision is computed in float32. Shapes that differ raise
ValueError, because broadcasting would compare unrelated elements.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def create_loss(name: str, temperature: float, dkd_beta: float) -> Loss:
    """The loss of a recipe's `kd_loss`, a function of (student, teacher, labels)."""
    losses: dict[str, Loss] = {
        "kl": lambda s, t, labels: kl(s, t, temperature),
        "ce": lambda s, t, labels: ce(s, t, temperature),
        "l2": lambda s, t, labels: l2(s, t),
        "l2_normalized": lambda s, t, labels: l2_normalized(s, t),
        "up_kl": lambda s, t, labels: up_kl(s, t),
        "dist": lambda s, t, labels: dist(s, t, temperature),
        "dkd": lambda s, t, labels: dkd(s, t, labels, temperature, dkd_beta),
        "kl_standardized_logits": lambda s, t, labels: kl_standardized_logits(s, t, temperature),
    }
    return losses[name]


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(t / T) || softmax(s / T)): Hinton et al., arXiv 1503.02531, section 2.

    T^2 compensates the gradient's decrease with 1 / T^2 at high temperatures.
    """
    student, teacher = _matched(student, teacher)
    return temperature**2 * _kl(student / temperature, teacher / temperature)


def ce(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_c softmax(t / T)_c * log softmax(s / T)_c, without T^2: United Perception's ce_loss.

    Equals kl / T^2 plus the entropy of the teacher; its gradient decreases with 1 / T^2.
    """
    student, teacher = _matched(student, teacher)
    return F.cross_entropy(student / temperature, (teacher / temperature).softmax(1))


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (s - t)^2 over images and elements, any shape (n, ...).

    FitNets (features), arXiv 1412.6550, eq. 3; Ba & Caruana (logits), arXiv 1312.6184, section 2.
    Both use half the sum instead of the mean over elements.
    """
    return F.mse_loss(*_matched(student, teacher))


def l2_normalized(student: Tensor, teacher: Tensor) -> Tensor:
    """sum (s / |s| - t / |t|)^2 per image, any shape (n, ...): United Perception's default.

    Equals 2 - 2 cos(s, t). An image of zeros stays zero, where United Perception returns nan.
    """
    student, teacher = _matched(student, teacher)
    difference = _normalize_rows(student.flatten(1)) - _normalize_rows(teacher.flatten(1))
    return difference.square().sum(1).mean()


def up_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(max(t, 0)) || softmax(max(s, 0))), which reproduces United Perception's kl_loss.

    It ignores differences between negative logits, and a student's negative logit has no gradient.
    """
    student, teacher = _matched(student, teacher)
    return _kl(student.relu(), teacher.relu())


def dist(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """DIST: T^2 * (inter + intra), with r Pearson's correlation of p = softmax(z / T):

        inter = 1 - mean_i r(p_s[i, :], p_t[i, :])    over the classes, for every image
        intra = 1 - mean_j r(p_s[:, j], p_t[:, j])    over the images, for every class

    Huang et al., arXiv 2205.10536, eqs. 9 to 11 with beta = gamma = 1; T^2 is from their code.
    intra depends on the whole batch, so the loss of a batch is not the mean over its parts. Where
    the teacher is constant (as every class is in a batch of one) 1 - r counts as 0; where only the
    student is constant r is 0. The authors add 1e-8 to the denominator of r instead, which ignores
    classes that vary by less than 1e-4.
    """
    student, teacher = _matched(student, teacher)
    s, t = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return temperature**2 * (_one_minus_correlation(s, t) + _one_minus_correlation(s.T, t.T))


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, beta: float = 8.0
) -> Tensor:
    """T^2 * (TCKD + beta * NCKD): decoupled KD, Zhao et al., arXiv 2203.08679, eq. 7, alpha = 1.

    TCKD is the KL of (p, 1 - p), p the probability of the target class; NCKD is the KL of the
    softmax over the other classes, 0 for two classes. kl equals TCKD + (1 - p_t) * NCKD. `labels`
    are class indices (n,) or soft labels (n, C), whose target is the first largest class.
    """
    student, teacher = _matched(student, teacher)
    target = labels.argmax(1) if labels.ndim == 2 else labels
    (s, s_others), (t, t_others) = (_split(z / temperature, target) for z in (student, teacher))
    return temperature**2 * (_kl(s, t) + beta * _kl(s_others, t_others))


def kl_standardized_logits(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """kl of the rows' z-scores (z - mean) / sd: Sun et al., arXiv 2403.01427, algorithm 1.

    sd divides by C, as in the paper; the authors' code divides by C - 1. A constant row has
    z-scores of 0.
    """
    student, teacher = _matched(student, teacher)
    scale = student.shape[1] ** 0.5 / temperature  # |z - mean| is sqrt(C) sd
    s, t = (scale * _normalize_rows(z, center=True) for z in (student, teacher))
    return temperature**2 * _kl(s, t)


def _matched(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, at least float32, the teacher detached."""
    if student.shape != teacher.shape:
        raise ValueError(f"shapes of student {student.shape} and teacher {teacher.shape} differ")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the softmax of logits, mean over rows; in log space, so that nothing underflows."""
    s, t = student.log_softmax(1), teacher.log_softmax(1)
    return F.kl_div(s, t, reduction="batchmean", log_target=True)


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the target against the rest (n, 2), and of the other classes (n, C - 1)."""
    target = target[:, None]
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    # Indices from the target on move up by one; a boolean mask would synchronise with the GPU.
    rest = logits.gather(1, others + (others >= target))
    # The softmax of these two is (p, 1 - p), without the cancellation of 1 - p.
    return torch.cat([logits.gather(1, target), rest.logsumexp(1, keepdim=True)], 1), rest


def _normalize_rows(rows: Tensor, *, center: bool = False) -> Tensor:
    """Rows (m, k), less their mean with `center`, divided by their L2 norm.

    A row of zeros (with `center`, a constant row) is not divided; its gradient is finite.
    """
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    least = 16 * torch.finfo(rows.dtype).eps * norm  # rounding error of a constant row
    if center:
        rows = rows - rows.mean(1, keepdim=True)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > least, norm, 1.0)


def _one_minus_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of 1 - r of exp(student) and exp(teacher); 0 for a constant teacher."""
    # r does not depend on the scale: with a maximum of 1 no row underflows in float32.
    s, t = (
        _normalize_rows((log - log.detach().amax(1, keepdim=True)).exp(), center=True)
        for log in (student, teacher)
    )
    # t * t sums to 1, or to 0 for a constant row.
    return (t * (t - s)).sum(1).mean()
