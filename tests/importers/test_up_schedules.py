"""Learning rates of imported recipes, compared with UP's formulas, written out slowly."""

import math
import re

import pytest
import torch
from up_files import (
    FAMILIES,
    KWARGS,
    MIXUP,
    STEPS,
    changed,
    config,
    cosine,
    read,
    said,
    told,
    unwarmed,
)

from workbench import training
from workbench.importers.united_perception import DEFECT, IMAGENET, MISSING, loads

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
    assert "0.4 by GPUs x batch size 1,024: 409.6" in said(found, where)


@pytest.mark.parametrize(
    "kind, ratio, ours",
    [("linear", 0.25, "linear"), ("exp", 0.25, "exponential"), ("cosine", 0.25, "cosine")],
)
def test_form_of_the_warmup(kind, ratio, ours):
    scheduler = STEPS.format(101, ratio, "MultiStepLR", "milestones: [30]")
    text = config(scheduler=scheduler.replace("warmup_type: linear", f"warmup_type: {kind}"))
    recipe = loads(text, gpus=16).recipe
    assert recipe.warmup == ours
    share = {"linear": 0.3, "cosine": (1 - math.cos(math.pi * 0.3)) / 2}.get(kind)
    wanted = 0.1 * (0.4 / 0.1) ** 0.3 if kind == "exp" else 0.1 + 0.3 * share
    assert training.lr_schedule(recipe, 1252)(30) == pytest.approx(wanted)


def test_lr_is_unchanged_without_batch_size():
    where = "lr_scheduler.warmup_register_type"
    text = "optimizer: {type: SGD, kwargs: {lr: 0.4}}\nlr_scheduler:\n  type: StepLR\n"
    text += "  kwargs: {step_size: 1}\n"
    found = loads(text, gpus=8)
    assert found.recipe.lr == 0.4 and "multiplies lr by GPUs x batch size" in said(found, where)
    found = loads(f"{text}  warmup_register_type: x\n")
    assert found.recipe.lr == 0.4 and "no x" in said(found, where)


def test_default_warmup_is_exponential_unless_from_0():
    scheduler = STEPS.format(100, 0.25, "MultiStepLR", "milestones: [30]")
    bare = scheduler.replace("    warmup_type: linear\n", "")
    assert loads(config(scheduler=bare)).recipe.warmup == "exponential"
    found = loads(config(scheduler=bare.replace("ratio: 0.25", "ratio: 0.0")))
    assert found.recipe.warmup == "linear" and found.recipe.warmup_start_factor == 0
    assert "multiplies from 0" in said(found, "trainer.lr_scheduler.warmup_type")


@pytest.mark.parametrize(
    "iters, epochs, options",
    [
        (100, 0, {"warmup_steps": 100}),
        (0, 2, {"warmup_epochs": 2.0}),
        (100, 2, {"warmup_epochs": 2.0}),
        (3000, 2, {"warmup_steps": 3000}),
        (0, 0.5, {"warmup_steps": 626}),
        (0, 1.7, {"warmup_steps": 2128}),
        (0, 0, {}),
    ],
)
def test_longer_of_two_warmups_is_taken(iters, epochs, options):
    scheduler = STEPS.format(
        f"{iters}\n    warmup_epochs: {epochs}", 0.25, "StepLR", "step_size: 9"
    )
    found = changed(config(scheduler=scheduler), gpus=16)
    assert {k: v for k, v in found.items() if k in ("warmup_steps", "warmup_epochs")} == options
    assert (found["schedule"], found["lr_step_epochs"]) == ("step", 9)


@pytest.mark.parametrize(
    "kind, kwargs, options",
    [
        ("StepLR", "step_size: 30", dict(schedule="step", lr_step_epochs=30)),
        ("StepLR", "step_size: 100", dict(schedule="constant")),
        ("MultiStepLR", "milestones: [30, 120]", dict(schedule="multistep", milestones=[30])),
        ("MultiStepLR", "milestones: [100]", dict(schedule="constant")),
        ("MultiStepLR", "milestones: []", dict(schedule="constant")),
        ("MultiStepLR", "milestones: [6, 3.4, 6]", dict(schedule="multistep", milestones=[3, 6])),
        ("CosineAnnealingLR", "T_max: 100", {}),
        ("CosineAnnealingLR", "T_max: 150", dict(cosine_epochs=150.0)),
        ("CosineAnnealingLR", "T_max: 50", dict(cosine_epochs=50.0)),
        ("CosineAnnealingLR", "eta_min: 0.1", dict(lr_min=0.1)),
        ("polylr", "power: 0.9, max_epoch: 100", dict(schedule="polynomial", power=0.9)),
        ("OneCycleLR", "max_lr: 0.7, pct_start: 0.3", dict(schedule="one_cycle", lr=0.7)),
        ("ReduceLROnPlateau", "factor: 0.1", {}),
        ("SimSiamScheduler", "", {}),
    ],
)
def test_schedule_and_length(kind, kwargs, options):
    found = loads(config(scheduler=unwarmed(kind, kwargs)), gpus=16)
    usual = "lr schedule milestones gamma lr_step_epochs power lr_min cosine_epochs lr_per_epoch"
    usual = f"{usual} epochs warmup_steps warmup_epochs warmup_start_factor".split()
    got = {k: v for k, v in found.recipe.non_default().items() if k in usual}
    assert got == {"lr": 0.4, "epochs": 100, **options}


def test_cosine_longer_than_training():
    found = loads(config(scheduler=cosine(2504, 0.25, 150, 0.0, 2504)), gpus=16)
    rate = training.lr_schedule(found.recipe, 1252)
    assert found.recipe.cosine_epochs == 148
    for t in (2504, 60_000, 125_199):
        assert rate(t) == pytest.approx(up_cosine(t, 0.4, 0, 150, 1252, 2504), rel=1e-9)
    assert "lr ends at 0.1024" in said(found, "trainer.lr_scheduler.kwargs.T_max")


def slowly(lr: float, steps: int, warm: int, ratio: float, after) -> list[float]:
    """UP's lr in every step: a linear climb of `warm` steps, then `after(step, lr)`."""
    rates = []
    for t in range(steps):
        if t < warm:
            rates.append(ratio * lr + (lr - ratio * lr) * t / (warm - 1))
        else:
            rates.append(after(t, lr))
    return rates


def scheduled(kind: str, kwargs: str, warm: int = 0, ratio: float = 0.25, epochs: int = 100, **of):
    """(what is found, the lr of its recipe in every step) of a training with 20 steps an epoch."""
    slots = {"scheduler": STEPS.format(warm, ratio, kind, kwargs), "length": f"max_epoch: {epochs}"}
    found = loads(config(**{**slots, **of}), train_images=1280)
    rate = training.lr_schedule(found.recipe, 20)
    return found, [rate(t) for t in range(20 * found.recipe.epochs)]


def gap_said(found) -> float:
    """The largest difference that a note names, in percent of the peak."""
    [percent] = re.findall(r"differs by up to ([\d.]+) % of its peak", told(found, MISSING))
    return float(percent)


def largest(ours: list[float], theirs: list[float]) -> float:
    return 100 * max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(ours)


def test_milestone_inside_the_warmup_is_not_applied():
    found, rates = scheduled("MultiStepLR", "milestones: [2, 30], gamma: 0.1", warm=60)
    wanted = slowly(0.4, 2000, 60, 0.25, lambda t, lr: lr * 0.1 if t >= 600 else lr)
    assert rates == pytest.approx(wanted, rel=1e-9)
    assert "[2] inside the warm-up" in said(found, f"{KWARGS}.milestones")
    found, rates = scheduled("MultiStepLR", "milestones: [3, 30], gamma: 0.1", warm=60)
    assert rates[60] == pytest.approx(0.04)  # where the warm-up ends, it is


def test_warmup_of_one_step_keeps_its_first_lr():
    found, rates = scheduled("MultiStepLR", "milestones: [30], gamma: 0.1", warm=1)
    assert rates == pytest.approx([0.1] * 600 + [0.01] * 1400, rel=1e-9)
    assert "lr stays at 0.25" in said(found, "trainer.lr_scheduler.warmup_iter")


def test_polynomial_equals_ups_formula():
    found, rates = scheduled("polylr", "power: 0.9, min_lr: 0.01, max_epoch: 100")
    wanted = [0.01 + 0.39 * (1 - t / 2000) ** 0.9 for t in range(2000)]
    assert rates == pytest.approx(wanted, rel=1e-9) and told(found, MISSING) == ""
    found, _ = scheduled("polylr", "power: 0.9, max_epoch: 120, max_iter: -1", warm=200)
    assert "120 epochs to UP" in said(found, f"{KWARGS}.max_epoch")
    assert "the 200 steps of the warm-up" in said(found, f"{KWARGS}.max_epoch", MISSING)


def test_one_cycle_equals_torch():
    kwargs = "max_lr: 0.7, max_epoch: 100, pct_start: 0.1, cycle_momentum: false"
    found, rates = scheduled("OneCycleLR", kwargs)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.7)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.7, 2000, pct_start=0.1, cycle_momentum=False
    )
    wanted = []
    for t in range(2000):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step() if t < 1999 else None
    assert rates == pytest.approx(wanted, rel=1e-9) and max(rates) == rates[199]
    assert told(found, MISSING) == "" and "max_epoch" not in told(found, DEFECT)
    found, _ = scheduled("OneCycleLR", kwargs.replace(", cycle_momentum: false", ""))
    assert "momentum between 0.95 and 0.85" in told(found, MISSING)


@pytest.mark.parametrize(
    "epochs, warm, kind, own, gap",
    [
        (300, 20, "CosineAnnealingLR", "", 6.3),  # ConvNeXt's: the cosine begins in step 0
        (300, 40, "CosineAnnealingLR", "", 12.95),
        (300, 20, "CosineLREpochScheduler", ", warm_epoch: 20", 0),  # Swin's is reproduced
        (300, 20, "CosineLREpochScheduler", ", warm_epoch: 0", None),
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

    real = largest(rates, slowly(0.4, epochs * 20, warm * 20, 0.001, up))
    if gap == 0:
        assert real < 1e-9 and "differs by" not in told(found, MISSING)
    else:
        assert gap_said(found) == pytest.approx(real, abs=0.1) and real > 1
        assert gap is None or gap_said(found) == pytest.approx(gap, abs=0.06)


def test_step_inside_the_warmup_is_not_applied():
    found, rates = scheduled("StepLR", "step_size: 2, gamma: 0.9", warm=100, epochs=12)
    lr, theirs = 0.4, []
    for t in range(240):  # UP's chain: the warm-up overwrites lr, a step multiplies it
        if t < 100:
            lr = 0.1 + 0.3 * t / 99
        elif t % 40 == 0:
            lr *= 0.9
        theirs.append(lr)
    assert rates == pytest.approx(theirs, rel=1e-9)
    assert "[2, 4] inside the warm-up" in said(found, f"{KWARGS}.step_size")


def test_what_stops_up_is_noted():
    found, _ = scheduled("CosineLREpochScheduler", "T_max: 100, eta_min: 0.0")
    assert "missing: UP stops" in said(found, f"{KWARGS}.warm_epoch")
    loss = "{type: stce, kwargs: {}}"
    where = "net[2].kwargs.cls_loss.type"
    assert "mixed labels alone" in said(loads(config(loss=loss)), where)
    assert said(loads(config(loss=loss, batch_fn=MIXUP)), where) == ""
