"""Learning rates of imported recipes, compared with UP's formulas, written out slowly."""

import math
import re

import pytest
from up_files import FAMILIES, KWARGS, STEPS, config, cosine, read, refused, said, told, unwarmed

from workbench import training
from workbench.importers.united_perception import MISSING, loads

IMAGENET = 1_281_167
E_OF = {name: math.ceil(IMAGENET / (64 * case["gpus"])) for name, case in FAMILIES.items()}


def up_warmup(t, peak, ratio, steps):
    return ratio * peak + (peak - ratio * peak) * t / (steps - 1)


def up_multistep(t, peak, milestones, steps):
    rate = peak
    for milestone in milestones:
        if milestone * steps <= t:
            rate = rate * 0.1
    return rate


def up_cosine(t, peak, end, length, steps, own):
    angle = math.pi * (t - own) / (length * steps - own)
    return end + (peak - end) * (1 + math.cos(angle)) / 2


def up_epoch_cosine(t, peak, end, length, steps, warm):
    epoch = t // steps
    return end + (peak - end) * (1 + math.cos(math.pi * (epoch - warm) / length)) / 2


def up_share_cosine(t, peak, share, length, steps):
    epoch = t // steps
    return peak * ((1 - share) * (1 + math.cos(math.pi * epoch / length)) / 2 + share)


RATES = {
    "plain": (2500, 0.25, lambda t: up_multistep(t, 0.4, [30, 60, 90], 1252), 1e-12),
    "bag of tricks": (3130, 0.25, lambda t: up_cosine(t, 0.8, 0, 200, 626, 3130), 1e-9),
    "strikes 300e": (3130, 0.0002, lambda t: up_epoch_cosine(t, 0.005, 1e-6, 300, 626, 5), 1e-9),
    "softmax eql": (0, 0, lambda t: up_share_cosine(t, 0.1, 0.01, 90, 2503), 1e-9),
    "downstream": (0, 0, lambda t: up_multistep(t, 0.01, [50, 100], 128), 1e-12),
    "downstream strikes": (0, 0, lambda t: up_cosine(t, 0.01, 0, 300, 128, 0), 1e-9),
    # 312,500 steps are 249.6 epochs; UP rounds 25,020 steps up to 20 epochs, 3,760 down to 3
    "mobilenet": (2500, 0.25, lambda t: up_cosine(t, 0.4, 0, 312500, 1, 2500), 0.01),
    "swin": (25020, 0.0001, lambda t: up_epoch_cosine(t, 0.001, 1e-5, 300, 1252, 20), 2e-3),
    "vit": (3760, 0.00133, lambda t: up_epoch_cosine(t, 0.00075, 1e-6, 300, 1252, 3), 2e-3),
}


@pytest.mark.parametrize("name", RATES)
def test_lr_equals_ups_formula(name):
    steps_of_warmup, ratio, after, close = RATES[name]
    cars = name.startswith("downstream")
    found = read(name, train_images=8144 if cars else IMAGENET)
    steps = 128 if cars else E_OF[name]
    rate, peak = training.lr_schedule(found.recipe, steps), found.recipe.lr
    total = 312_500 if name == "mobilenet" else found.recipe.epochs * steps
    points = [0, steps_of_warmup // 3, max(0, steps_of_warmup - 1), steps_of_warmup]
    for t in [*points, total // 3, total // 2, 2 * total // 3, 0.95 * total // 1, total - 1]:
        warm = t < steps_of_warmup
        wanted = up_warmup(t, peak, ratio, steps_of_warmup) if warm else after(int(t))
        floor = 1e-3 * peak if name == "mobilenet" else 1e-15
        assert rate(int(t)) == pytest.approx(wanted, rel=close, abs=floor), t


def test_scaled_warmup_starts_from_lr():
    scheduler = STEPS.format(2500, -1, "MultiStepLR", "milestones: [30]")
    scheduler = re.sub(r" +warmup_(register_type|ratio).*\n", "", scheduler)
    found = loads(config(scheduler=scheduler), gpus=16)
    rate = training.lr_schedule(found.recipe, 1252)
    assert rate(0) == pytest.approx(0.4) and rate(2499) == pytest.approx(0.4 * 64 * 16)
    where = "trainer.lr_scheduler.warmup_register_type"
    assert "lr 0.4 by GPUs x batch size, here by 1,024" in said(found, where)


def test_lr_is_unchanged_without_batch_size():
    text = "optimizer: {type: SGD, kwargs: {lr: 0.4}}\nlr_scheduler: {type: CosineAnnealingLR}\n"
    found = loads(text, gpus=8)
    assert found.recipe.lr == 0.4
    assert "here by 1" in said(found, "lr_scheduler.warmup_register_type")


@pytest.mark.parametrize(
    "kind, ours", [("linear", "linear"), ("exp", "exponential"), ("cosine", "cosine"), ("", "")]
)
def test_form_of_the_warmup(kind, ours):
    scheduler = STEPS.format(101, 0.25, "MultiStepLR", "milestones: [30]")
    line = f"    warmup_type: {kind}\n" if kind else ""
    text = config(scheduler=scheduler.replace("    warmup_type: linear\n", line))
    recipe = loads(text, gpus=16).recipe
    assert recipe.warmup == (ours or "exponential")
    share = {"linear": 0.3, "cosine": (1 - math.cos(math.pi * 0.3)) / 2}.get(kind)
    wanted = 0.1 + 0.3 * share if share else 0.1 * (0.4 / 0.1) ** 0.3
    assert training.lr_schedule(recipe, 1252)(30) == pytest.approx(wanted)


def test_exponential_warmup_from_0_is_refused():
    text = config(scheduler=STEPS.format(100, 0.0, "CosineAnnealingLR", "T_max: 100"))
    assert "exponential warm-up multiplies" in refused(text.replace("type: linear", "type: exp"))


@pytest.mark.parametrize(
    "kind, kwargs, options",
    [
        ("MultiStepLR", "milestones: [30, 120]", dict(schedule="multistep", milestones=[30])),
        ("MultiStepLR", "milestones: [100]", dict(schedule="constant")),
        ("MultiStepLR", "milestones: []", dict(schedule="constant")),
        ("MultiStepLR", "milestones: [6, 3.4, 6]", dict(schedule="multistep", milestones=[3, 6])),
        ("CosineAnnealingLR", "T_max: 100", {}),
        ("CosineAnnealingLR", "T_max: 50", dict(cosine_epochs=50.0)),
        ("CosineAnnealingLR", "eta_min: 0.1", dict(lr_min=0.1)),
    ],
)
def test_schedule_and_length(kind, kwargs, options):
    found = loads(config(scheduler=unwarmed(kind, kwargs)), gpus=16)
    usual = "lr schedule milestones gamma lr_min cosine_epochs lr_per_epoch epochs warmup_steps"
    got = {k: v for k, v in found.recipe.non_default().items() if k in usual.split()}
    assert got == {"lr": 0.4, "epochs": 100, **options}


@pytest.mark.parametrize("kind", ["StepLR", "OneCycleLR"])
def test_other_schedules_are_left_out(kind):
    found = loads(config(scheduler=unwarmed(kind, "step_size: 30, max_epoch: 100, max_lr: 0.7")))
    assert found.recipe.schedule == "cosine" and found.recipe.lr == 0.4
    assert f"{kind!r} is not supported" in said(found, "trainer.lr_scheduler", MISSING)


def test_cosine_longer_than_training():
    found = loads(config(scheduler=cosine(2504, 0.25, 150, 0.0, 2504)), gpus=16)
    rate = training.lr_schedule(found.recipe, 1252)
    assert found.recipe.cosine_epochs == 148
    for t in (2504, 60_000, 125_199):
        assert rate(t) == pytest.approx(up_cosine(t, 0.4, 0, 150, 1252, 2504), rel=1e-9)
    assert "lr ends at 0.1024" in said(found, f"{KWARGS}.T_max")


def slowly(lr: float, steps: int, warm: int, ratio: float, after) -> list[float]:
    """UP's lr in every step: a linear climb of `warm` steps, then `after(step, lr)`."""
    climb = [ratio * lr + (lr - ratio * lr) * t / (warm - 1) for t in range(warm)]
    return climb + [after(t, lr) for t in range(warm, steps)]


def scheduled(kind: str, kwargs: str, warm: int, ratio: float = 0.25, epochs: int = 100):
    """(what is found, the lr of its recipe in every step) of a training with 20 steps an epoch."""
    slots = {"scheduler": STEPS.format(warm, ratio, kind, kwargs), "length": f"max_epoch: {epochs}"}
    found = loads(config(**slots), train_images=1280)
    rate = training.lr_schedule(found.recipe, 20)
    return found, [rate(t) for t in range(20 * found.recipe.epochs)]


def test_milestone_inside_the_warmup_is_not_applied():
    found, rates = scheduled("MultiStepLR", "milestones: [2, 30], gamma: 0.1", warm=60)
    wanted = slowly(0.4, 2000, 60, 0.25, lambda t, lr: lr * 0.1 if t >= 600 else lr)
    assert rates == pytest.approx(wanted, rel=1e-9)
    assert "never applies [2], inside the warm-up" in said(found, f"{KWARGS}.milestones")
    found, rates = scheduled("MultiStepLR", "milestones: [3, 30], gamma: 0.1", warm=60)
    assert rates[60] == pytest.approx(0.04)  # where the warm-up ends, it is


@pytest.mark.parametrize(
    "epochs, warm, kind, own, gap",
    [
        (300, 20, "CosineAnnealingLR", "", 6.3),  # ConvNeXt's: the cosine begins in step 0
        (300, 40, "CosineAnnealingLR", "", 12.95),
        (300, 20, "CosineLREpochScheduler", ", warm_epoch: 20", 0),  # Swin's is reproduced
    ],
)
def test_largest_difference_of_a_cosine_is_noted(epochs, warm, kind, own, gap):
    found, rates = scheduled(
        kind, f"T_max: {epochs}, eta_min: 0.000001{own}", warm * 20, 0.001, epochs
    )
    low, start = 1e-6, float(own[-2:] or 0)

    def up(t: int, lr: float) -> float:
        share = t / (epochs * 20) if kind == "CosineAnnealingLR" else (t // 20 - start) / epochs
        return low + (lr - low) * (1 + math.cos(math.pi * share)) / 2

    theirs = slowly(0.4, epochs * 20, warm * 20, 0.001, up)
    real = 100 * max(abs(a - b) for a, b in zip(rates, theirs, strict=True)) / max(rates)
    percents = re.findall(r"differs by up to ([\d.]+) % of its peak", told(found, MISSING))
    assert real == pytest.approx(gap, abs=0.06) and len(percents) == bool(gap)
    assert not gap or float(percents[0]) == pytest.approx(real, abs=0.1)
