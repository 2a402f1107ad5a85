"""Learning rates against torch's and timm's schedulers and against United Perception's values."""

import warnings

import pytest
import timm.scheduler
import torch

from workbench.schedule import Constant, Cosine, MultiStep, Warmup


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
    ],
)
def test_the_rates_are_united_perceptions(schedule, step, rate):
    assert schedule(step) == pytest.approx(rate, rel=0.02 if rate < 1e-9 else 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda warmup: Constant(0.4, warmup),
        lambda warmup: MultiStep(0.4, (60, 80), 0.1, warmup),
        lambda warmup: Cosine(0.4, 100, 0.001, warmup),
    ],
)
@pytest.mark.parametrize("warmup", [Warmup(), Warmup(1), Warmup(2, 0.5), Warmup(20, 0.1)])
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
