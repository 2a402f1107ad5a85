"""The doctor's numbers against slow arithmetic, its warnings on cue."""

import math

import pytest
import torch

from workbench import ROOT, doctor, models, training
from workbench.recipe import Recipe

IMAGENET = {"images": 1_281_167, "classes": 1000}
KNOWN = {  # a large training that nothing speaks against
    "dataset": "files",
    "image_size": 224,
    "val_resize": 256,
    "model": "resnet50",
    "epochs": 200,
    "batch_size": 1024,
    "lr": 0.4,
    "weight_decay": 1e-4,
    "warmup_epochs": 5.0,
}
LAMB = {**KNOWN, "batch_size": 2048, "optimizer": "lamb", "lr": 0.005, "weight_decay": 0.02,
        "clip_grad_norm": 1.0}  # fmt: skip


def said(kind: str, size: dict = IMAGENET, **knobs) -> str:
    findings = doctor.examine(Recipe(**knobs), **size)
    return "\n".join(f.text for f in findings if f.kind == kind)


def test_a_sound_recipe_is_warned_of_nothing():
    assert said("warning", **KNOWN) == ""
    assert said("warning", **LAMB) == ""


def test_facts_hold_the_steps_and_the_rates_of_the_schedule():
    facts = said("fact", **KNOWN)
    rate = training.lr_schedule(Recipe(**KNOWN), 1252)
    assert "1,252 steps an epoch of 1,281,167 pictures, 250,400 steps in all" in facts
    assert "the last step of an epoch has 143 pictures instead of 1,024" in facts  # 1281167 % 1024
    assert f"over 6,260 steps (5 of 200 epochs), is {rate(125_200):.3g} half way" in facts
    assert f"{rate(250_399):.3g} in the last step" in facts
    assert "1,281 pictures a class on average; guessing gives 0.1 % top-1" in facts


def test_counts_name_the_smallest_and_the_largest_class():
    findings = doctor.examine(Recipe(), images=60, classes=3, counts=[10, 20, 30])
    assert "20 pictures a class on average, 10 in the smallest and 30 in the largest" in str(
        [f.text for f in findings]
    )


def test_the_half_life_of_an_average_is_what_halving_it_takes():
    facts = said("fact", **KNOWN, ema_decay=0.9999)
    steps = 0
    weight = 1.0
    while weight > 0.5:
        weight *= 0.9999
        steps += 1
    assert abs(steps - 6931) <= 1 and "younger than 6,931 steps (5.54 epochs of 200)" in facts


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize(
    "knobs, slow",
    [
        ({}, lambda c: math.sqrt((1 - 1 / c) ** 2 + (c - 1) / c**2)),
        (dict(label_smoothing=0.1), lambda c: 0.9 * math.sqrt(1 - 1 / c)),
        (dict(loss="bce"), lambda c: 0.5 * math.sqrt(c) / c),
        (dict(loss="bce", bce_sum=True), lambda c: 0.5 * math.sqrt(c)),
        (
            dict(loss="bce", bce_sum=True, bce_shift=True),
            lambda c: math.sqrt((c / (c + 1)) ** 2 + (c - 1) / (c + 1) ** 2),
        ),
    ],
)
def test_the_gradient_of_a_fresh_picture_is_the_formulas(knobs, slow, classes):
    assert doctor.gradient_scale(Recipe(**knobs), classes) == pytest.approx(slow(classes))


def test_weight_decay_alone_halves_a_weight_in_the_epochs_it_says():
    knobs = {"epochs": 200, "batch_size": 100, "schedule": "constant"}
    for optimizer in ({"momentum": 0.0}, {"momentum": 0.9}, {"optimizer": "adamw"}):
        recipe = Recipe(**knobs, **optimizer, lr=0.01, weight_decay=0.05)
        [fact] = [
            f.text for f in doctor.examine(recipe, images=1000, classes=10) if "decay" in f.text
        ]
        epochs = float(fact.split(" in ")[1].split()[0])
        weight = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(weight.weight)
        optimizer = training.create_optimizer(recipe, weight)
        for _ in range(round(10 * epochs)):
            for p in weight.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert weight.weight.item() == pytest.approx(0.5, abs=0.02)


def test_mixing_says_its_shares():
    assert "Of all steps 70% Mixup (alpha 0.1) and 30% CutMix (alpha 1)" in said(
        "fact", **KNOWN, mixup_alpha=0.1, cutmix_alpha=1.0, switch_prob=0.3
    )
    one = said("fact", **KNOWN, cutmix_alpha=1.0, mix_per_sample=True)
    assert "Of all pictures 100% CutMix" in one and "Mixup" not in one


STRIKES = dict(loss="bce", bce_threshold=0.2, mixup_alpha=0.1, cutmix_alpha=1.0)
WARNED = [
    # (words of the warning, a recipe that earns it, what takes it away again)
    ("68.25", {**LAMB, **STRIKES, "model": "resnet18", "epochs": 100}, {"model": "resnet50"}),
    ("0.005 to 0.008 is", {**LAMB, "lr": 0.04}, {"lr": 0.008}),
    ("0.0018 to 0.008 is", {**LAMB, "batch_size": 256, "lr": 0.0005}, {"lr": 0.002}),
    ("0.01 to 0.016 is", {**LAMB, "batch_size": 8192, "lr": 0.005}, {"lr": 0.012}),
    ("without clip_grad_norm", {**LAMB, "clip_grad_norm": None}, {"clip_grad_norm": 1.0}),
    ("linear rule says 0.4", {**KNOWN, "lr": 4.0}, {"lr": 0.8}),
    ("linear rule says 3.2", {**KNOWN, "batch_size": 8192}, {"lr": 3.2}),
    ("no warm-up", {**KNOWN, "warmup_epochs": 0.0}, {"warmup_steps": 1000}),
    ("6,256", {**KNOWN, "warmup_epochs": 0.0, "warmup_steps": 62_560}, {"warmup_steps": 6256}),
    ("half-life of 6,931 steps of 25,040", {**KNOWN, "epochs": 20, "ema_decay": 0.9999},
     {"ema_decay": 0.999}),
    ("bce_sum, a larger lr", {**KNOWN, "loss": "bce"}, {"bce_sum": True, "bce_shift": True}),
    ("ask for longer training", {**KNOWN, "epochs": 90, "mixup_alpha": 0.2}, {"epochs": 200}),
    (
        "to 0.222",
        {**LAMB, "loss": "bce", "bce_threshold": 0.2, "label_smoothing": 0.1},
        {"label_smoothing": 0.0},
    ),
    ("moves by 70 of 64 pixels", {**KNOWN, "image_size": 64, "randaug_n": 2},
     {"randaug_form": "timm"}),
    ("is another or none", {"dataset": "letters", "flip": 0.5}, {"flip": 0.0}),
    ("its error rises below 16", {**KNOWN, "micro_batch_size": 8}, {"micro_batch_size": 32}),
    ("reach beyond the last epoch", {**KNOWN, "warmup_epochs": 20.0, "cosine_epochs": 200.0},
     {"cosine_epochs": None}),
]  # fmt: skip


@pytest.mark.parametrize("words, knobs, cure", WARNED, ids=[w[0] for w in WARNED])
def test_a_trap_is_named_with_its_evidence_and_gone_with_its_cure(words, knobs, cure):
    warned = [f for f in doctor.examine(Recipe(**knobs), **IMAGENET) if f.kind == "warning"]
    [finding] = [f for f in warned if words in f.text]
    assert finding.source and str(finding).startswith("warning: ")
    assert words not in said("warning", **{**knobs, **cure})


def test_every_rule_has_a_recipe_that_earns_it():
    assert len(doctor._EVIDENCE) <= len(WARNED)
    for rule, _ in doctor._EVIDENCE:
        earned = [rule(Recipe(**knobs), 1252, 1252 * knobs.get("epochs", 8), 1000)
                  for _, knobs, _ in WARNED]  # fmt: skip
        assert any(earned), rule.__name__


def test_a_fine_tuning_is_not_measured_by_the_rates_of_training_from_scratch():
    assert said("warning", **{**KNOWN, "lr": 0.001, "warmup_epochs": 0.0, "weights": "a.pt"}) == ""


def test_the_shipped_small_recipes_are_not_warned_of_their_own_rates():
    for path in (ROOT / "params").glob("*_strikes.yaml"):
        found = doctor.examine(Recipe.read(path), images=50_000, classes=10)
        assert not [f for f in found if "LAMB with" in f.text], path


def test_a_model_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(models.ModelError, match="resnet18"):
        doctor.examine(Recipe(model="resnet18q"), images=1000, classes=10)


def test_a_batch_larger_than_the_list_is_refused_in_words():
    with pytest.raises(training.TrainingError, match="above 20 pictures"):
        doctor.examine(Recipe(drop_last=True), images=20, classes=10)
