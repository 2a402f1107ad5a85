"""Facts and warnings against slow arithmetic, autograd and real optimizers."""

import numpy as np
import pytest
import torch

from workbench import ROOT, counted, doctor, models, training
from workbench.doctor import rules
from workbench.recipe import Recipe

IMAGENET = {"images": 1_281_167, "classes": 1000}
KNOWN = {  # a large training without warnings
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


def texts(kind: str, size: dict = IMAGENET, **options) -> str:
    findings = doctor.examine(Recipe(**options), **size)
    return "\n".join(f.text for f in findings if f.kind == kind)


def test_facts_have_the_steps_and_learning_rates():
    facts = texts("fact", **KNOWN)
    rate = training.lr_schedule(Recipe(**KNOWN), 1252)
    assert "1,252 steps an epoch of 1,281,167 images, 250,400 steps in all" in facts
    assert "the last step of an epoch has 143 images instead of 1,024" in facts  # 1281167 % 1024
    assert f"over 6,260 steps (5 of 200 epochs), is {rate(125_200):.3g} half way" in facts
    assert f"{rate(250_399):.3g} in the last step" in facts
    assert "1,281 images a class on average; guessing gives 0.1 % top-1" in facts


def test_one_of_something_is_no_plural():
    assert [counted(n, "class") for n in (0, 1, 2)] == ["0 classes", "1 class", "2 classes"]
    assert counted(1200, "image") == "1,200 images" and counted(1, "image") == "1 image"
    facts = texts("fact", {"images": 12, "classes": 3}, epochs=1, batch_size=32)
    assert "1 step an epoch of 12 images, 1 step in all; that step" in facts
    facts = texts("fact", {"images": 33, "classes": 3}, epochs=1, batch_size=32)
    assert "2 steps an epoch" in facts and "the last step of an epoch has 1 image instead" in facts


def test_counts_give_the_smallest_and_largest_class_and_empty_ones():
    facts = texts("fact", {"images": 60, "classes": 3, "counts": [10, 20, 30]})
    assert "20 images a class on average, 10 in the smallest and 30 in the largest" in facts
    warnings = texts("warning", {"images": 30, "classes": 3, "counts": [10, 20, 0]})
    assert "1 of 3 classes has no training image" in warnings


def test_half_life_of_ema_equals_repeated_multiplication():
    facts = texts("fact", **KNOWN, ema_decay=0.9999)
    steps, weight = 0, 1.0
    while weight > 0.5:
        weight *= 0.9999
        steps += 1
    assert abs(steps - 6931) <= 1 and "younger than 6,931 steps, 5.54 epochs" in facts


@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.1}, {"loss": "bce"}, {"loss": "bce", "bce_sum": True},
    {"loss": "bce", "bce_sum": True, "bce_shift": True, "label_smoothing": 0.1},
    {"loss": "bce", "bce_threshold": 0.2, "label_smoothing": 0.1},
], ids=str)  # fmt: skip
def test_gradient_scale_equals_autograd(options, classes):
    recipe = Recipe(**options)
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    training.loss_function(recipe)(logits, torch.zeros(1, dtype=torch.int64)).sum().backward()
    wanted = logits.grad.norm().item()
    assert rules.gradient_scale(recipe, classes) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


STRIKES = dict(loss="bce", bce_threshold=0.2, mixup_alpha=0.1, cutmix_alpha=1.0)
WARNINGS = [
    # (words of the warning, options that cause it, options that remove it)
    ("68.25", {**LAMB, **STRIKES, "model": "resnet18", "epochs": 100}, {"model": "resnet50"}),
    ("try 0.005 to 0.008", {**LAMB, "lr": 0.04}, {"lr": 0.008}),
    ("try 0.0018 to 0.008", {**LAMB, "batch_size": 256, "lr": 0.0005}, {"lr": 0.002}),
    ("try 0.01 to 0.016", {**LAMB, "batch_size": 8192, "lr": 0.005}, {"lr": 0.012}),
    ("without clip_grad_norm", {**LAMB, "clip_grad_norm": None}, {"clip_grad_norm": 1.0}),
    ("linear rule gives 0.4", {**KNOWN, "lr": 4.0}, {"lr": 0.8}),
    ("linear rule gives 3.2", {**KNOWN, "batch_size": 8192}, {"lr": 3.2}),
    ("no warm-up", {**KNOWN, "warmup_epochs": 0.0}, {"warmup_steps": 1000}),
    ("62,560 of 250,400", {**KNOWN, "warmup_epochs": 0.0, "warmup_steps": 62_560},
     {"warmup_steps": 6256}),
    ("half-life of 6,931 of 25,040", {**KNOWN, "epochs": 20, "ema_decay": 0.9999},
     {"ema_decay": 0.999}),
    ("use bce_sum, a larger lr", {**KNOWN, "loss": "bce"}, {"bce_sum": True, "bce_shift": True}),
    ("need longer training", {**KNOWN, "epochs": 90, "mixup_alpha": 0.2}, {"epochs": 200}),
    ("to 0.222", {**LAMB, "loss": "bce", "bce_threshold": 0.2, "label_smoothing": 0.1},
     {"label_smoothing": 0.0}),
    ("covers 3/4 or more of", {**KNOWN, "image_size": 64, "randaug_n": 2},
     {"randaug_variant": "timm"}),
    ("changes their class", {"dataset": "letters", "hflip": 0.5}, {"hflip": 0.0}),
    ("the error rises below 16", {**KNOWN, "micro_batch_size": 8}, {"micro_batch_size": 32}),
    ("end after the last epoch", {**KNOWN, "warmup_epochs": 20.0, "cosine_epochs": 200.0},
     {"cosine_epochs": None}),
    ("dist to 74.5", {**KNOWN, "teacher": "a", "kd_loss": "kl", "cutmix_alpha": 1.0},
     {"kd_loss": "dist"}),
    ("kd_loss ce with strong augmentation", {**KNOWN, "teacher": "a", "randaug_n": 2,
     "distill_pairs": ["layer4 -> layer4", "logits"], "kd_loss": ["l2", "ce"]}, {"randaug_n": 0}),
    ("over the 8 images of a forward", {**KNOWN, "teacher": "a", "kd_loss": "dist",
     "micro_batch_size": 8}, {"kd_loss": "kl"}),
    ("use a tenth or less", {**KNOWN, "lr": 0.5, "weights": "a.pt"}, {"lr": 0.04}),
    ("[0.5, 0.5, 0.5] where its weights", {**KNOWN, "model": "vit_tiny_patch16_224",
     "pretrained": True, "lr": 0.01}, {"mean": [0.5] * 3, "std": [0.5] * 3}),
    ("leave random weights", {**KNOWN, "freeze": ["conv1"]}, {"pretrained": True}),
    ("leave random weights", {**KNOWN, "head_only_epochs": 5}, {"weights": "a.pt", "lr": 0.01}),
]  # fmt: skip


@pytest.mark.parametrize("words, options, cure", WARNINGS)
def test_warning_names_its_evidence_and_disappears_with_its_cure(words, options, cure):
    warned = [f for f in doctor.examine(Recipe(**options), **IMAGENET) if f.kind == "warning"]
    [finding] = [f for f in warned if words in f.text]
    assert finding.source and str(finding).startswith("warning: ")
    assert words not in texts("warning", **{**options, **cure})


@pytest.mark.parametrize(
    "options",
    [
        KNOWN,
        LAMB,
        {**KNOWN, "resume_from": "runs/before", "freeze": ["conv1"], "lr": 0.5},
        {**KNOWN, "teacher": "a", "distill_pairs": ["layer4 -> layer4"], "kd_loss": "l2",
         "cutmix_alpha": 1.0},
        {**KNOWN, "lr": 0.001, "warmup_epochs": 0.0, "weights": "a.pt"},
    ],
    ids=["sgd", "lamb", "resumed", "modules alone", "fine-tuning"],
)  # fmt: skip
def test_good_recipe_has_no_warning(options):
    assert texts("warning", **options) == ""


def test_train_resize_without_effect_is_a_warning():
    assert texts("warning", {**IMAGENET, "downscaled": 1}, **KNOWN, train_resize=256) == ""
    text = texts("warning", {**IMAGENET, "downscaled": 0}, **KNOWN, train_resize=256)
    assert text == "train_resize 256 shrinks none of 1,281,167 training images; leave it out"


def test_shipped_strikes_recipes_have_no_warning_about_lr():
    for path in (ROOT / "params").glob("*_strikes.yaml"):
        found = doctor.examine(Recipe.from_yaml(path), images=50_000, classes=10)
        assert not [f for f in found if "LAMB with" in f.text], path


def test_lr_rules_do_not_apply_below_64_images_a_step():
    """There the linear rule gives less than what works, from scratch and from weights."""
    few = {**KNOWN, "batch_size": 32, "lr": 0.5}
    assert "lr 0.5" not in texts("warning", **few) + texts("warning", **few, weights="a.pt")


def test_unknown_model_is_refused_with_close_names():
    with pytest.raises(models.ModelError, match="resnet18"):
        doctor.examine(Recipe(model="resnet18q"), images=1000, classes=10)


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(training.TrainingError, match="exceeds the 20 images"):
        doctor.examine(Recipe(drop_last=True), images=20, classes=10)


@pytest.mark.parametrize("variant, size", [("up", 32), ("up", 224), ("timm", 32)])
def test_lost_share_equals_the_share_of_translations_beyond_the_side(variant, size):
    """One operation of magnitude 7 moves by 70 pixels, or in timm's form by 45 % of 0.7."""
    options = {"randaug_n": 1, "randaug_m": 7.0, "randaug_std": 0.0, "randaug_variant": variant}
    recipe = Recipe(**options, image_size=size, val_resize=size)
    transform = training.train_transform(recipe)
    params = [transform.sample_params(np.random.default_rng(i), size, size) for i in range(200)]
    moved = [
        any(op.startswith("translate") and abs(value) >= 0.75 * size for op, value, *_ in ops)
        for ops in (param["randaug"] for param in params)
    ]
    assert rules.lost_share(recipe) == np.mean(moved)
    warned = "colour covers 3/4" in doctor.nothing_left(recipe)
    assert warned == (np.mean(moved) > 0.03) == (variant == "up" and size == 32)


def test_crop_of_one_pixel_leaves_one_colour():
    text = texts("warning", crop_scale=[0.001, 0.002])
    assert "colour covers 3/4" in text and "randaug_variant" not in text


@pytest.mark.parametrize(
    "options, worth",
    [
        ({}, False),
        ({"randaug_n": 2, "randaug_variant": "timm"}, False),
        ({"weights": "runs/a-seed0"}, True),
        ({"randaug_n": 2, "randaug_variant": "up"}, True),
        ({"randaug_n": 2, "randaug_variant": "up", "image_size": 224, "val_resize": 256}, False),
    ],
)
def test_worth_measuring_only_if_something_can_be_found(options, worth):
    assert doctor.worth_measuring(Recipe(**options)) is worth


def test_facts_say_what_several_processes_change_and_what_they_do_not():
    text = (
        "same batches in the same order; of 4, each has its own workers and 256 of 1,024 images, "
    )
    assert f"{text}batch norm the statistics of these." in texts("fact", **KNOWN)
    sync = texts("fact", **KNOWN, sync_batch_norm=True)
    assert f"{text}batch norm the statistics of all." in sync
