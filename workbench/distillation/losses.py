"""What a student and its teacher are compared by in knowledge distillation.

Every loss is a 0-d tensor, the mean over the images of the batch, with a gradient for the student
alone. Logits are (n, C). Half precision is computed in float32. Raises ValueError where the shapes
of student and teacher differ, since broadcasting would compare what does not belong together.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * KL(softmax(t / T) || softmax(s / T)): Hinton et al., arXiv 1503.02531, section 2.

    The gradient at high temperatures goes with 1 / T^2; the factor keeps it beside the task's loss.
    """
    student, teacher = _pair(student, teacher)
    return temperature**2 * _kl(student / temperature, teacher / temperature)


def ce(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """-sum_c softmax(t / T)_c * log softmax(s / T)_c, without T^2: United Perception's ce_loss.

    It is kl / T^2 plus the entropy of the teacher. So where both agree the gradient is zero and the
    loss is not, and a high temperature makes the gradient small, unlike kl's.
    """
    student, teacher = _pair(student, teacher)
    return F.cross_entropy(student / temperature, (teacher / temperature).softmax(1))


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    """mean (s - t)^2 over images and elements, any shape (n, ...).

    Of features: FitNets, arXiv 1412.6550, eq. 3. Of logits: Ba & Caruana, arXiv 1312.6184, section
    2. Both have half the sum in the place of the mean over elements.
    """
    return F.mse_loss(*_pair(student, teacher))


def l2_normalized(student: Tensor, teacher: Tensor) -> Tensor:
    """sum (s / |s| - t / |t|)^2 per image, any shape (n, ...): United Perception's default.

    Its l2_loss with feat_norm and batch_mean. With a the angle between s and t it is 2 - 2 cos a.
    An image of zeros has no direction and stays zero, where United Perception has nan.
    """
    student, teacher = _pair(student, teacher)
    return (_unit(student.flatten(1)) - _unit(teacher.flatten(1))).square().sum(1).mean()


def up_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(max(t, 0)) || softmax(max(s, 0))): United Perception's kl_loss, to reproduce it.

    All logits below 0 are the same to it: what the teacher says about unlikely classes is lost, and
    a student's logit below 0 has no gradient, even where the teacher's is high. `kl` is the loss.
    """
    student, teacher = _pair(student, teacher)
    return _kl(student.relu(), teacher.relu())


def dist(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """DIST: T^2 * (inter + intra), with r Pearson's correlation of p = softmax(z / T):

        inter = 1 - mean_i r(p_s[i, :], p_t[i, :])    over the classes, for every image
        intra = 1 - mean_j r(p_s[:, j], p_t[:, j])    over the images, for every class

    Huang et al., arXiv 2205.10536, eqs. 9 to 11 with beta = gamma = 1; T^2 is from their code. It
    does not hold the gradient level as in kl, for r does not fade: at high T the loss grows by T^2.
    intra is a statement about the batch, so the loss of a batch is not the mean of its parts'.

    Where the teacher is constant, as every class is in a batch of one, r is not defined, there is
    nothing to match, and 1 - r counts as 0. Where only the student is constant r is 0, and the
    gradient leads away from there. Classes count alike, however small their probabilities; the
    authors add 1e-8 to the denominator of r, which takes out those that vary by less than 1e-4.
    """
    student, teacher = _pair(student, teacher)
    s, t = (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return temperature**2 * (_unlike(s, t) + _unlike(s.T, t.T))


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0, beta: float = 8.0
) -> Tensor:
    """T^2 * (TCKD + beta * NCKD): decoupled KD, Zhao et al., arXiv 2203.08679, eq. 7, alpha = 1.

    TCKD is the KL of (p, 1 - p), p the share of the target class; NCKD is that of the softmax over
    all other classes, 0 for two classes. kl is TCKD + (1 - p_t) * NCKD, so it forgets NCKD where
    the teacher is sure. `labels` are class numbers (n,), or soft labels (n, C): then the target is
    the class with the largest share, of equal ones the first.
    """
    student, teacher = _pair(student, teacher)
    target = labels.argmax(1) if labels.ndim == 2 else labels
    (s, s_others), (t, t_others) = (_split(z / temperature, target) for z in (student, teacher))
    return temperature**2 * (_kl(s, t) + beta * _kl(s_others, t_others))


def kl_standardized_logits(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """kl of the rows' z-scores (z - mean) / sd: Sun et al., arXiv 2403.01427, algorithm 1.

    What counts is the order and the relative distances of the logits, not their scale: a student
    may stay less sure than its teacher. sd is the population's, as in the paper; the authors' code
    divides by C - 1 in the place of C, which is a temperature sqrt(C / (C - 1)) times as high. A
    constant row has z-scores of 0.
    """
    student, teacher = _pair(student, teacher)
    scale = student.shape[1] ** 0.5 / temperature  # |z - mean| is sqrt(C) sd
    return temperature**2 * _kl(*(scale * _unit(z, centre=True) for z in (student, teacher)))


def between(
    name: str, temperature: float, dkd_beta: float
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The loss of a recipe's name, as a function of student, teacher and labels (dkd's alone).

    Raises ValueError for a name that is not there.
    """
    losses = {
        "kl": lambda s, t, labels: kl(s, t, temperature),
        "ce": lambda s, t, labels: ce(s, t, temperature),
        "l2": lambda s, t, labels: l2(s, t),
        "l2_normalized": lambda s, t, labels: l2_normalized(s, t),
        "up_kl": lambda s, t, labels: up_kl(s, t),
        "dist": lambda s, t, labels: dist(s, t, temperature),
        "dkd": lambda s, t, labels: dkd(s, t, labels, temperature, dkd_beta),
        "kl_standardized_logits": lambda s, t, labels: kl_standardized_logits(s, t, temperature),
    }
    if name not in losses:
        raise ValueError(f"mimic loss {name!r}; allowed are {', '.join(losses)}")
    return losses[name]


def _pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype, float32 at least, the teacher without gradient."""
    if student.shape != teacher.shape:
        shapes = f"{tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        raise ValueError(f"the student's shape is {shapes}; they cannot be compared")
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the softmax of logits, mean over rows; of logarithms, so that nothing underflows."""
    s, t = student.log_softmax(1), teacher.log_softmax(1)
    return F.kl_div(s, t, reduction="batchmean", log_target=True)


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of target against the rest (n, 2), and of the other classes (n, C - 1)."""
    target = target[:, None]
    others = torch.arange(logits.shape[1] - 1, device=logits.device)
    # Every class number from the target's on moves up by one. A mask would wait for a GPU.
    rest = logits.gather(1, others + (others >= target))
    # The softmax of these two is (p, 1 - p), without the cancellation of 1 - p.
    return torch.cat([logits.gather(1, target), rest.logsumexp(1, keepdim=True)], 1), rest


def _unit(rows: Tensor, *, centre: bool = False) -> Tensor:
    """Rows (m, k), less their mean with `centre`, over their L2 norm.

    A row of zeros, or with `centre` a constant one, is not divided: it becomes 0, up to rounding,
    and its gradient is that of a row with norm 1, so it can be left.
    """
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    least = 16 * torch.finfo(rows.dtype).eps * norm  # what rounding leaves of a constant row
    if centre:
        rows = rows - rows.mean(1, keepdim=True)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > least, norm, 1.0)


def _unlike(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - r of the exponentials of two logarithms (m, k), row by row, then the mean.

    0 where the teacher is constant.
    """
    # r does not depend on the scale: with a largest share of 1 no row vanishes in float32.
    s, t = (
        _unit((log - log.detach().amax(1, keepdim=True)).exp(), centre=True)
        for log in (student, teacher)
    )
    # t * t sums to 1, or to 0 for a constant row.
    return (t * (t - s)).sum(1).mean()
