"""Learning rates against torch's and timm's schedulers and against United Perception's values."""

import math
import warnings

import pytest
import timm.scheduler
import torch

from workbench.schedule import Constant, Cosine, MultiStep, OneCycle, Polynomial, Step, Warmup


def torch_rates(make, steps: int, peak: float) -> list[float]:
    """The rates one of torch's schedulers sets for each of `steps` steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("end", [0.0, 0.003])
def test_cosine_equals_torch(end):
    ours = Cosine(0.7, steps=50, end=end)
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50, eta_min=end), 50, 0.7
    )
    assert [ours(t) for t in range(50)] == pytest.approx(theirs, rel=1e-9)


def test_multistep_equals_torch():
    ours = MultiStep(0.4, milestones=(10, 20, 35), gamma=0.3)
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 20, 35], gamma=0.3), 50, 0.4
    )
    assert [ours(t) for t in range(50)] == pytest.approx(theirs, rel=1e-9)


def test_step_equals_torch():
    ours = Step(0.4, every=12, gamma=0.3)
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 12, gamma=0.3), 50, 0.4)
    assert [ours(t) for t in range(50)] == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_polynomial_equals_torch(power):
    ours = Polynomial(0.4, steps=50, power=power)
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 50, power=power), 50, 0.4
    )
    assert [ours(t) for t in range(50)] == pytest.approx(theirs, rel=1e-9)


def test_one_cycle_may_start_at_its_peak():
    """Where the rise is one step long; torch divides by 0 there."""
    ours = OneCycle(0.4, 10, 0.1)
    assert [ours(t) for t in (0, 9)] == pytest.approx([0.4, 0.4 / 250_000])


@pytest.mark.parametrize("steps, rise", [(50, 0.3), (120, 0.25)])
def test_one_cycle_equals_torch(steps, rise):
    def make(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.4, steps, pct_start=rise, cycle_momentum=False
        )

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler, theirs = make(optimizer), []
    for t in range(steps):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if t < steps - 1:
            scheduler.step()
    ours = OneCycle(0.4, steps, rise)
    assert [ours(t) for t in range(steps)] == pytest.approx(theirs, rel=1e-9)
    assert max(theirs) == pytest.approx(0.4) and ours(10 * steps) == pytest.approx(0.4 / 250_000)


def test_cosine_per_epoch_equals_timm_in_epochs():
    """timm's scheduler as its train.py calls it: warm-up by epoch, then once an epoch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = timm.scheduler.CosineLRScheduler(
            optimizer, t_initial=25, lr_min=0.01, warmup_t=5, warmup_prefix=True
        )
    ours = Cosine(0.5, steps=30 * 7, end=0.01, warmup=Warmup(5 * 7), hold=7)
    for epoch in range(5, 30):
        theirs.step(epoch)
        for t in range(7 * epoch, 7 * epoch + 7):
            assert ours(t) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_warmup_equals_torch_linear():
    """torch climbs over total_iters steps; ours reaches the peak at the last warm-up step."""
    ours = Constant(0.8, Warmup(11, ratio=0.25))
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=10), 30, 0.8
    )
    assert [ours(t) for t in range(30)] == pytest.approx(theirs, rel=1e-9)


def test_cosine_after_warmup_equals_timm():
    """timm with warmup_prefix counts its cosine from the end of the warm-up, as ours does."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = timm.scheduler.CosineLRScheduler(
            optimizer,
            t_initial=40,
            lr_min=0.01,
            warmup_t=10,
            warmup_lr_init=0.05,
            warmup_prefix=True,
            t_in_epochs=False,
        )
    ours = Cosine(0.5, steps=50, end=0.01, warmup=Warmup(10, ratio=0.1))
    for t in range(10, 50):
        theirs.step_update(t)
        assert ours(t) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize("steps, ratio", [(2, 0.5), (11, 0.1), (40, 1e-4)])
def test_a_cosine_warmup_is_half_a_cosine_and_an_exponential_one_multiplies(steps, ratio):
    cosine = Constant(0.8, Warmup(steps, ratio, "cosine"))
    exponential = Constant(0.8, Warmup(steps, ratio, "exponential"))
    for t in range(steps):
        share = t / (steps - 1)
        wanted = ratio + (1 - ratio) * (1 - math.cos(math.pi * share)) / 2
        assert cosine(t) == pytest.approx(0.8 * wanted)
    factors = {round(exponential(t + 1) / exponential(t), 9) for t in range(steps - 1)}
    assert len(factors) == 1
    for rate in (cosine, exponential):
        assert rate(0) == pytest.approx(0.8 * ratio)
        assert rate(steps - 1) == rate(steps) == pytest.approx(0.8)


# United Perception, lr_helper.py, run on its own code.
@pytest.mark.parametrize(
    "schedule, step, rate",
    [
        *[
            (Cosine(0.8, 200 * 626, warmup=Warmup(3130, ratio=0.25)), step, rate)
            for step, rate in [(0, 0.2), (3129, 0.8), (3130, 0.8), (125_199, 1.3e-10)]
        ],
        *[
            (MultiStep(0.4, (37_560, 75_120, 112_680), 0.1, Warmup(2500, ratio=0.25)), step, rate)
            for step, rate in [
                (0, 0.1),
                (2499, 0.4),
                (37_559, 0.4),
                (37_560, 0.04),
                (75_119, 0.04),
                (75_120, 0.004),
                (125_199, 0.0004),
            ]
        ],
        # res50_strikes_300e: its per-epoch cosine does not reach 1e-6
        *[
            (
                Cosine(0.005, 300 * 626, 1e-6, Warmup(3130, 0.0002), 626, 300 * 626),
                step,
                rate,
            )
            for step, rate in [(0, 1e-6), (3129, 0.005), (187_799, 5.9e-6)]
        ],
    ],
)
def test_the_rates_are_united_perceptions(schedule, step, rate):
    assert schedule(step) == pytest.approx(rate, rel=0.02 if rate in (1.3e-10, 5.9e-6) else 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda warmup: Constant(0.4, warmup),
        lambda warmup: MultiStep(0.4, (60, 80), 0.1, warmup),
        lambda warmup: Step(0.4, 30, 0.1, warmup),
        lambda warmup: Cosine(0.4, 100, 0.001, warmup),
        lambda warmup: Cosine(0.4, 100, 0.001, warmup, hold=10),
        lambda warmup: Cosine(0.4, 100, 0.001, warmup, hold=10, period=100),
        lambda warmup: Polynomial(0.4, 100, 2.0, 0.001, warmup),
        lambda warmup: Polynomial(0.4, 100, 1.0, 0.001, warmup, hold=10),
    ],
)
@pytest.mark.parametrize(
    "warmup",
    [
        Warmup(),
        Warmup(1),
        Warmup(2, 0.5),
        Warmup(20, 0.1),
        Warmup(20, 0.1, "cosine"),
        Warmup(20, 0.1, "exponential"),
    ],
)
def test_a_schedule_climbs_to_its_peak_and_hands_over_without_a_jump(make, warmup):
    rate = make(warmup)
    rates = [rate(t) for t in range(100)]
    climb = rates[: warmup.steps]
    assert climb == sorted(climb) and max(rates) == pytest.approx(0.4)
    assert rates[warmup.steps] == pytest.approx(0.4)
    if warmup.steps > 1:
        assert rates[0] == pytest.approx(0.4 * warmup.ratio)
        assert climb[-1] == pytest.approx(0.4)
    falling = rates[warmup.steps :]
    assert falling == sorted(falling, reverse=True)


def test_a_cosine_ends_at_its_end_and_stays_there():
    rate = Cosine(0.4, 100, end=0.05, warmup=Warmup(10))
    assert rate(99) > rate(100) == pytest.approx(0.05)
    assert rate(1000) == pytest.approx(0.05)
    assert rate(10 + 45) == pytest.approx((0.4 + 0.05) / 2)  # half way down, half the way through


@pytest.mark.parametrize("make", [Cosine, Polynomial])
def test_a_held_rate_changes_once_an_epoch_and_is_that_of_its_first_step(make):
    each = make(0.4, 100, end=0.01, warmup=Warmup(20))
    held = make(0.4, 100, end=0.01, warmup=Warmup(20), hold=10)
    for t in range(20, 100):
        assert held(t) == each(t // 10 * 10)


def test_a_warmup_that_ends_inside_an_epoch_hands_over_at_the_peak_too():
    rate = Cosine(0.4, 100, warmup=Warmup(25), hold=10)
    assert rate(25) == rate(29) == pytest.approx(0.4) and rate(30) < 0.4


@pytest.mark.parametrize("period", [40, 80, 160])
def test_a_period_says_when_a_cosine_reaches_its_end(period):
    rate = Cosine(0.4, 100, end=0.05, warmup=Warmup(20), period=period)
    assert rate(20 + period // 2) == pytest.approx((0.4 + 0.05) / 2)
    assert rate(20 + period) == pytest.approx(0.05) == rate(20 + 2 * period)
    assert rate(100) == pytest.approx(0.05) if period <= 80 else rate(100) > 0.2


def test_a_milestone_inside_the_warmup_counts_from_its_end():
    rate = MultiStep(0.4, (5, 20), 0.1, Warmup(10, 0.5))
    assert rate(9) == pytest.approx(0.4) and rate(10) == pytest.approx(0.04)


def test_a_schedule_is_a_value_that_remembers_nothing():
    rate = Cosine(0.4, 100, warmup=Warmup(10))
    forward = [rate(t) for t in range(100)]
    assert [rate(t) for t in reversed(range(100))] == forward[::-1]
    assert rate == Cosine(0.4, 100, warmup=Warmup(10)) and hash(rate) == hash(
        Cosine(0.4, 100, warmup=Warmup(10))
    )
