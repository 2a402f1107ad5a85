"""Learning rates against torch's and timm's schedulers and United Perception's values."""

import math

import pytest
import timm.scheduler
import torch
from torch.optim import lr_scheduler

from workbench.recipe import Recipe
from workbench.schedule import Cosine, MultiStep, OneCycle, Polynomial, Warmup, lr_schedule


def sgd(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


GAMMA = {"gamma": 0.3}
STEP = {"schedule": "step", "lr": 0.4, "lr_step_epochs": 4, "epochs": 17, **GAMMA}
ONE_CYCLE = {"max_lr": 0.4, "total_steps": 50, "cycle_momentum": False}


@pytest.mark.parametrize(
    "ours, theirs, options",
    [
        (Cosine(0.7, 50, end=0.003), "CosineAnnealingLR", {"T_max": 50, "eta_min": 0.003}),
        (MultiStep(0.4, (10, 20, 35), 0.3), "MultiStepLR", {"milestones": [10, 20, 35], **GAMMA}),
        (lr_schedule(Recipe(**STEP), 3), "StepLR", {"step_size": 12, **GAMMA}),
        (Polynomial(0.4, 50, power=0.5), "PolynomialLR", {"total_iters": 50, "power": 0.5}),
        (Polynomial(0.4, 50, power=2.0), "PolynomialLR", {"total_iters": 50, "power": 2.0}),
        # torch rises over total_iters steps; ours reaches the peak at the last warm-up step
        (MultiStep(0.8, warmup=Warmup(11, 1 / 3)), "LinearLR", {"total_iters": 10}),
        (OneCycle(0.4, 50), "OneCycleLR", ONE_CYCLE),
        (OneCycle(0.4, 50, 0.25), "OneCycleLR", {**ONE_CYCLE, "pct_start": 0.25}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_rates_are_torchs(ours, theirs, options):
    optimizer = sgd(ours.peak)
    scheduler = getattr(lr_scheduler, theirs)(optimizer, **options)
    for step in range(50):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [1, 7])  # of an epoch: by step, and as timm's train.py
def test_cosine_after_a_warmup_is_timms(steps):
    optimizer = sgd(0.5)
    theirs = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=25, lr_min=0.01, warmup_t=5, warmup_prefix=True
    )
    ours = Cosine(0.5, 30 * steps, end=0.01, warmup=Warmup(5 * steps), hold=steps)
    for step in range(5 * steps, 30 * steps):
        theirs.step(step // steps)
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize("steps, ratio", [(2, 0.5), (11, 0.1), (40, 1e-4)])
def test_a_cosine_warmup_is_half_a_cosine_and_an_exponential_one_multiplies(steps, ratio):
    cosine, exponential = (
        MultiStep(0.8, warmup=Warmup(steps, ratio, kind)) for kind in ("cosine", "exponential")
    )
    for step in range(steps):
        half = (1 - math.cos(math.pi * step / (steps - 1))) / 2
        assert cosine(step) == pytest.approx(0.8 * (ratio + (1 - ratio) * half))
        factor = ratio ** (-1 / (steps - 1))
        assert exponential(step) == pytest.approx(0.8 * ratio * factor**step)


# United Perception, lr_helper.py, run on its own code.
UP_COSINE = Cosine(0.8, 200 * 626, warmup=Warmup(3130, ratio=0.25))
UP_STEP = MultiStep(0.4, (37_560, 75_120, 112_680), 0.1, warmup=Warmup(2500, ratio=0.25))
# res50_strikes_300e: its per-epoch cosine does not reach 1e-6
UP_EPOCHS = Cosine(0.005, 300 * 626, 1e-6, warmup=Warmup(3130, 0.0002), hold=626, period=300 * 626)


@pytest.mark.parametrize(
    "schedule, rates",
    [
        (UP_COSINE, {0: 0.2, 3129: 0.8, 3130: 0.8, 125_199: 1.3e-10}),
        (UP_STEP, {0: 0.1, 2499: 0.4, 37_559: 0.4, 37_560: 0.04, 75_119: 0.04, 75_120: 0.004}),
        (UP_STEP, {125_199: 0.0004}),
        (UP_EPOCHS, {0: 1e-6, 3129: 0.005, 187_799: 5.9e-6}),
    ],
)
def test_rates_are_united_perceptions(schedule, rates):
    for step, rate in rates.items():
        within = 0.02 if rate in (1.3e-10, 5.9e-6) else 1e-6
        assert schedule(step) == pytest.approx(rate, rel=within)


@pytest.mark.parametrize(
    "warmup",
    [Warmup(), Warmup(1), Warmup(2, 0.5), *(Warmup(20, 0.1, k) for k in ("linear", "cosine"))],
)
@pytest.mark.parametrize(
    "kind, options",
    [
        (MultiStep, {}),
        (MultiStep, {"milestones": (60, 80)}),
        (Cosine, {"steps": 100, "end": 0.001}),
        (Cosine, {"steps": 100, "end": 0.001, "hold": 10, "period": 100}),
        (Polynomial, {"steps": 100, "end": 0.001, "power": 2.0, "hold": 10}),
    ],
)
def test_a_schedule_rises_to_its_peak_and_continues_without_a_jump(kind, options, warmup):
    schedule = kind(0.4, warmup=warmup, **options)
    rates = [schedule(step) for step in range(100)]
    rising, falling = rates[: warmup.steps], rates[warmup.steps :]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert max(rates) == pytest.approx(0.4) and falling[0] == pytest.approx(0.4)
    if warmup.steps > 1:
        assert rising[0] == pytest.approx(0.4 * warmup.ratio)
        assert rising[-1] == pytest.approx(0.4)


@pytest.mark.parametrize("kind", [Cosine, Polynomial])
def test_a_held_rate_changes_once_an_epoch_and_is_that_of_its_first_step(kind):
    each, held = (kind(0.4, 100, 0.01, warmup=Warmup(20), hold=hold) for hold in (1, 10))
    assert [held(t) for t in range(20, 100)] == [each(t // 10 * 10) for t in range(20, 100)]


def test_a_warmup_that_ends_inside_an_epoch_ends_at_the_peak():
    rate = Cosine(0.4, 100, warmup=Warmup(25), hold=10)
    assert rate(25) == rate(29) == pytest.approx(0.4) and rate(30) < 0.4


@pytest.mark.parametrize("period", [None, 40, 160])
def test_a_cosine_is_at_its_end_after_its_period_and_stays_there(period):
    rate, length = Cosine(0.4, 100, 0.05, warmup=Warmup(20), period=period), period or 80
    assert rate(20 + length // 2) == pytest.approx((0.4 + 0.05) / 2)
    assert rate(19 + length) > rate(20 + length) == pytest.approx(0.05) == rate(1000)


def test_a_one_cycle_may_start_at_its_peak():
    """Where the rise is one step long; torch divides by 0 there."""
    rate = OneCycle(0.4, 10, 0.1)
    assert [rate(t) for t in (0, 9, 100)] == pytest.approx([0.4, 0.4 / 250_000, 0.4 / 250_000])


def test_a_milestone_inside_the_warmup_counts_from_its_end():
    rate = MultiStep(0.4, (5, 20), 0.1, warmup=Warmup(10, 0.5))
    assert rate(9) == pytest.approx(0.4) and rate(10) == pytest.approx(0.04)
