"""A recipe is judged before anything is loaded: what it refuses, understands and gives back."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import papermill
import pytest
import yaml

from workbench import ROOT
from workbench.recipe import RENAMED, Recipe, RecipeError, metadata, runtime_only
from workbench.recipe_checks import RESNETS

FIELDS = list(Recipe.model_fields)


def problems(**values) -> list[str]:
    """What is wrong with a recipe, one sentence per problem; empty when nothing is."""
    try:
        Recipe(**values)
    except RecipeError as error:
        return error.problems
    return []


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- unknown options


@pytest.mark.parametrize(
    "key, right",
    [
        ("epoch", "epochs"),
        ("lable_smoothing", "label_smoothing"),
        ("LR", "lr"),
        ("Batch_Size", "batch_size"),
        ("weigth_decay", "weight_decay"),
        ("train_lists", "train_list"),
        # what other tools call it
        ("learning_rate", "lr"),
        ("max_epoch", "epochs"),
        ("num_workers", "workers"),
        ("arch", "model"),
        ("wd", "weight_decay"),
        ("amp", "precision"),
        ("smooth_ratio", "label_smoothing"),
        ("random_seed", "seed"),
        ("meta_file", "train_list"),
        ("kd_temperature", "temperature"),
        ("mimic_type", "kd_loss"),
        ("frozen_layers", "freeze"),
        ("layer_wise_decay", "layer_decay"),
    ],
)
def test_a_misspelt_knob_names_the_nearest(key, right):
    [problem] = problems(**{key: 1})
    assert problem.startswith(f"{key}: ") and f"'{right}'" in problem


def test_a_knob_like_no_other_points_to_the_list():
    [problem] = problems(zzzzqqqq=1)
    assert "workbench options" in problem and "nearest" not in problem


@pytest.mark.parametrize("key", ["1", "on", "null", "self", "2026-01-02", "1.5"])
def test_a_key_that_is_no_word_is_an_unknown_knob(tmp_path, key):
    with pytest.raises(RecipeError, match="no such option|not a plain name"):
        Recipe.from_yaml(written(tmp_path, f"{key}: 1\n"))


def test_every_problem_stands_in_one_error(tmp_path):
    text = "learning_rate: 1\nlr: -1\nepochs: many\nseed: true\nnesterov: true\nmomentum: 0\n"
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path)
    assert sorted(p.split(":")[0] for p in caught.value.problems) == [
        "epochs",
        "learning_rate",
        "lr",
        "nesterov",
        "seed",
    ]
    text = str(caught.value)
    assert text.startswith(f"{path}: 5 problems\n")
    assert all(f"  - {problem}" in text for problem in caught.value.problems)


# ---- types and ranges


@pytest.mark.parametrize("text", ["007", "1e3", "1_000", "None", "20261126", "yes", "0x10", "1.0"])
def test_a_text_option_takes_the_text_as_it_is_written(tmp_path, text):
    path = written(tmp_path, f"name: {text}\nfreeze: [layer1, {text}]\nteacher: {text}\n")
    recipe = Recipe.from_yaml(path)
    assert (recipe.name, recipe.teacher) == (text, [text])
    assert recipe.freeze == ["layer1", text]
    given = Recipe.from_yaml(written(tmp_path, ""), name=text, freeze=f"[layer1, {text}]")
    assert (given.name, given.freeze) == (text, ["layer1", text])
    recipe.to_yaml(tmp_path / "again.yaml")
    assert Recipe.from_yaml(tmp_path / "again.yaml") == recipe


def test_a_whole_number_that_papermill_made_of_a_text_is_that_text():
    assert Recipe.from_namespace({"name": 20261126}).name == "20261126"
    [problem] = problems(name=1000.0)
    assert "use -r instead of papermill's -p" in problem


@pytest.mark.parametrize(
    "key, value",
    [
        ("epochs", True),
        ("seed", False),
        ("lr", True),
        ("workers", True),
        ("verify_data", 1),
        ("hflip", "often"),
        ("epochs", 0.5),
        ("epochs", "0.5"),
        ("epochs", [1]),
        ("epochs", None),
        ("lr", None),
        ("lr", {"peak": 1}),
        ("lr", [0.1]),
        ("name", 5.0),
        ("model", None),
        ("milestones", "soon"),
        ("milestones", [1.5]),
        ("milestones", "[30, sixty]"),
        ("milestones", "[30"),
        ("train_list", [1.5]),
        ("mean", "0.5"),
        ("mean", [0.5, 0.5]),
        ("std", [0.5] * 4),
        ("optimizer", "lion"),
        ("teacher", True),
        ("teacher_weight", "heavy"),
        ("teacher_mean", [0.5, "grey", 0.5]),
        ("kd_loss", "hinton"),
        ("freeze", None),
        ("layer_decay", "half"),
        ("interpolation", "area"),
        ("device", "gpu"),
    ],
)
def test_a_wrong_type_is_one_problem_that_says_what_came(key, value):
    [problem] = problems(**{key: value})
    assert problem.startswith(f"{key}: ") and repr(value) in problem
    assert Recipe.model_fields[key].description in problem


@pytest.mark.parametrize(
    "key, value",
    [
        ("val_fraction", -0.1),
        ("val_fraction", 1.0),
        ("num_classes", 1),
        ("train_fraction", 0.0),
        ("train_fraction", 1.01),
        ("image_size", 7),
        ("image_size", 4097),
        ("val_image_size", 7),
        ("val_resize", 8193),
        ("mean", [0.5, 0.5, 127.5]),
        ("std", [0.2, 0.0, 0.2]),
        ("model", ""),
        ("drop_path", 1.0),
        ("dropout", -0.1),
        ("epochs", 0),
        ("epochs", 100_001),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("lr", 0.0),
        ("lr", math.inf),
        ("lr", math.nan),
        ("lr", "nan"),
        ("lr", "1e999"),
        ("momentum", 1.0),
        ("weight_decay", -1e-4),
        ("gamma", 1.0),
        ("lr_min", -1.0),
        ("warmup_epochs", -1.0),
        ("warmup_start_factor", 1.5),
        ("clip_grad_norm", 0.0),
        ("ema_decay", 1.0),
        ("label_smoothing", 1.0),
        ("crop_scale", [0.0, 1.0]),
        ("crop_scale", [0.5, 1.1]),
        ("crop_ratio", [0.0, 1.0]),
        ("hflip", 1.1),
        ("brightness", -0.2),
        ("hue", 0.6),
        ("seed", -1),
        ("seed", 2**32),
        ("eval_every", 0),
        ("class_balanced_sampling", 1.1),
        ("layer_decay", 1.0),
        ("head_only_epochs", -1),
        ("teacher_weight", []),
        ("teacher_weight", [0.0]),
        ("teacher_image_size", [7]),
        ("teacher_mean", [0.5, 0.5, 127.5]),
        ("teacher_std", [0.2, 0.0, 0.2]),
        ("distill_pairs", []),
        ("kd_loss", []),
        ("kd_weight", [-1.0]),
        ("temperature", 0.0),
        ("dkd_beta", 0.0),
        ("kd_warmup_epochs", -1.0),
        ("task_weight", -1.0),
        ("checkpoint_minutes", -1.0),
        ("log_every", 0),
        ("workers", -1),
        ("runs_dir", ""),
        ("name", ""),
        ("name", "a/b"),
        ("name", "a\\b"),
    ],
)
def test_a_value_out_of_range_is_refused(key, value):
    assert [p.split(":")[0] for p in problems(**{key: value})] == [key]


@pytest.mark.parametrize(
    "key, text, means",
    [
        ("lr", "3e-4", 0.0003),
        ("weight_decay", "5e-05", 5e-05),
        ("epochs", "20", 20),
        ("epochs", "1e2", 100),
        ("epochs", 20.0, 20),
        ("verify_data", "false", False),
        ("channels_last", "False", False),
        ("nesterov", "TRUE", True),
        ("crop_scale", "[0.08, 1]", [0.08, 1.0]),
        ("crop_scale", (0.08, 1.0), [0.08, 1.0]),
        ("mean", ["1e-1", "0.5", 0], [0.1, 0.5, 0.0]),
        ("workers", "none", None),
        ("workers", "null", None),
        ("workers", "4", 4),
        ("ema_decay", "0.9999", 0.9999),
        ("lr", 1, 1.0),
    ],
)
def test_text_is_read_as_the_value_it_means(key, text, means):
    value = getattr(Recipe(**{key: text}), key)
    assert value == means and type(value) is type(means)


def test_milestones_and_lists_may_be_written_as_text_or_alone():
    recipe = Recipe(epochs=90, schedule="multistep", milestones="[30, 60]")
    assert recipe.milestones == [30, 60]
    assert Recipe(epochs=90, schedule="multistep", milestones="30").milestones == [30]
    assert Recipe(dataset="files", train_list="meta/a.txt").train_list == ["meta/a.txt"]
    recipe = Recipe(
        teacher="runs/a-seed0", teacher_weight="2", kd_loss="kl", distill_pairs="logits"
    )
    assert (recipe.teacher, recipe.teacher_weight) == (["runs/a-seed0"], [2.0])
    assert (recipe.kd_loss, recipe.distill_pairs) == (["kl"], ["logits"])


@pytest.mark.parametrize("text", ["[" * 2000, "[&a [x], *a]", "[!!int x]"])
def test_text_that_only_begins_like_a_list_is_a_problem_and_no_crash(text):
    assert [p.split(":")[0] for p in problems(dataset="files", train_list=text)] == ["train_list"]


def test_a_date_in_text_stays_text():
    assert Recipe(dataset="files", train_list="[2026-13-45]").train_list == ["2026-13-45"]
    assert len(problems(schedule="multistep", milestones="[2026-01-02]")) == 1


# ---- options that would change nothing, options that exclude each other

# every option that needs a teacher, with a value that is not its default
DISTILLED = {
    "teacher_model": ["resnet18"],
    "teacher_weight": [2.0],
    "teacher_image_size": [64],
    "teacher_mean": [0.5, 0.5, 0.5],
    "teacher_std": [0.5, 0.5, 0.5],
    "distill_pairs": ["logits", "layer4 -> layer4"],
    "kd_loss": ["kl"],
    "kd_weight": [2.0],
    "temperature": 4.0,
    "dkd_beta": 4.0,
    "kd_warmup_epochs": 1.0,
    "task_weight": 0.5,
    "cache_teacher_logits": True,
}

UNUSED = [
    # (option, value, what makes it useless)
    *[
        (key, value, dict(dataset=dataset))
        for dataset in ("digits", "letters")
        for key, value in [
            ("data_dir", "/data"),
            ("train_list", ["a.txt"]),
            ("train_root", ["t"]),
            ("val_list", ["b.txt"]),
            ("val_root", ["v"]),
            ("val_fraction", 0.1),
            ("class_names", "c.txt"),
            ("num_classes", 5),
            ("allow_outside_root", True),
        ]
    ],
    ("deep_stem", True, dict(model="resnet50d")),
    ("avg_down", True, dict(model="resnet10t")),
    ("micro_batch_size", 32, dict(batch_size=32)),
    ("micro_batch_size", 33, dict(batch_size=32)),
    ("momentum", 0.8, dict(optimizer="adamw")),
    ("nesterov", True, dict(optimizer="adamw")),
    ("decay_norm_and_bias", False, dict(weight_decay=0.0)),
    ("milestones", [2], dict(schedule="cosine")),
    ("milestones", [2], dict(schedule="constant")),
    ("gamma", 0.5, dict(schedule="cosine")),
    ("lr_min", 0.01, dict(schedule="multistep", milestones=[2])),
    ("lr_min", 0.01, dict(schedule="constant")),
    ("warmup_start_factor", 0.1, dict(warmup_epochs=0.0)),
    ("warmup", "cosine", {}),
    ("trust_clip", True, dict(optimizer="sgd")),
    ("always_adapt", True, dict(optimizer="adamw", weight_decay=0.1, decay_norm_and_bias=False)),
    ("always_adapt", True, dict(optimizer="lamb", weight_decay=0.1)),
    ("lr_step_epochs", 2, dict(schedule="cosine")),
    ("power", 2.0, dict(schedule="cosine")),
    ("pct_start", 0.2, dict(schedule="cosine")),
    ("cosine_epochs", 4.0, dict(schedule="polynomial")),
    ("lr_per_epoch", True, dict(schedule="constant")),
    ("lr_min", 0.01, dict(schedule="one_cycle")),
    ("warmup_epochs", 1.0, dict(schedule="one_cycle")),
    ("warmup_steps", 5, dict(schedule="one_cycle")),
    ("bce_threshold", 0.2, dict(loss="ce")),
    ("bce_sum", True, dict(loss="ce")),
    ("bce_shift", True, dict(loss="ce")),
    ("up_smoothing", True, dict(mixup_alpha=0.2)),
    ("up_smoothing", True, dict(label_smoothing=0.1)),
    ("up_smoothing", True, dict(loss="bce", label_smoothing=0.1, mixup_alpha=0.2)),
    ("randaug_m", 5.0, {}),
    ("randaug_std", 0.0, {}),
    ("randaug_increasing", False, {}),
    ("randaug_variant", "timm", {}),
    ("switch_prob", 0.3, dict(mixup_alpha=0.2)),
    ("switch_prob", 0.3, dict(cutmix_alpha=1.0)),
    ("mix_per_sample", True, {}),
    ("mix_prob", 0.5, {}),
    ("erase_mode", "rand", {}),
    ("erase_count", 2, {}),
    ("eval_every", 9, dict(epochs=8)),
    ("allow_partial_weights", True, {}),
    *[(key, value, {}) for key, value in DISTILLED.items()],
    ("temperature", 4.0, dict(teacher=["a"], kd_loss=["up_kl"])),
    ("temperature", 4.0, dict(teacher=["a"], distill_pairs=["layer4 -> layer4"], kd_loss=["l2"])),
    ("dkd_beta", 4.0, dict(teacher=["a"], kd_loss=["kl"])),
    ("loss", "bce", dict(teacher=["a"], task_weight=0.0)),
    ("label_smoothing", 0.1, dict(teacher=["a"], task_weight=0.0)),
]


@pytest.mark.parametrize("key, value, others", UNUSED)
def test_a_knob_that_would_change_nothing_is_a_problem(key, value, others):
    [problem] = problems(**{key: value}, **others)
    assert re.match(rf"{key}: {re.escape(repr(value))} has no effect, since ", problem)
    assert problems(**others) == []


@pytest.mark.parametrize(
    "values",
    [
        dict(
            dataset="files",
            data_dir="/data",
            train_list=["a.txt"],
            train_root=["t"],
            val_list=["b.txt"],
            val_root=["v"],
            class_names="c.txt",
            num_classes=5,
            allow_outside_root=True,
        ),
        dict(dataset="files", val_fraction=0.1),
        *[dict(model=name, deep_stem=True, avg_down=True) for name in RESNETS],
        dict(batch_size=32, micro_batch_size=31),
        dict(optimizer="sgd", momentum=0.8, nesterov=True),
        dict(weight_decay=1e-4, decay_norm_and_bias=False),
        dict(schedule="multistep", epochs=90, milestones=[30, 60], gamma=0.5),
        dict(schedule="cosine", lr_min=0.01),
        dict(warmup_epochs=1.0, warmup_start_factor=0.1),
        dict(warmup_steps=10, warmup_start_factor=0.1, warmup="exponential"),
        dict(optimizer="lamb", weight_decay=0.1, decay_norm_and_bias=False, trust_clip=True),
        dict(optimizer="lamb", always_adapt=True),
        dict(optimizer="lamb", weight_decay=0.1, decay_norm_and_bias=False, always_adapt=True),
        dict(schedule="step", lr_step_epochs=2, gamma=0.5, warmup_epochs=1.0),
        dict(schedule="polynomial", power=2.0, lr_min=0.01, lr_per_epoch=True),
        dict(schedule="cosine", cosine_epochs=8.0, lr_per_epoch=True),
        dict(schedule="one_cycle", pct_start=0.1),
        dict(loss="bce", bce_threshold=0.2, bce_sum=True, bce_shift=True, label_smoothing=0.1),
        dict(label_smoothing=0.1, mixup_alpha=0.2, up_smoothing=True),
        dict(randaug_n=2, randaug_m=5.0, randaug_std=0.0, randaug_increasing=False),
        dict(mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.3, mix_per_sample=True),
        dict(mixup_alpha=0.2, mix_prob=0.5),
        dict(mixup_alpha=0.2, micro_batch_size=8),
        dict(erase_prob=0.25, erase_mode="rand", erase_count=2),
        dict(repeated_aug=32, batch_size=32),
        dict(epochs=8, eval_every=8),
        dict(optimizer="adamw", momentum=0.9),  # a default that is written out is no wish
        dict(schedule="constant"),
        dict(resume_from="runs/a-seed0"),
        dict(weights="a.safetensors"),
        dict(dataset="files", train_list=["a", "b"], train_root=["t"]),
        dict(dataset="files", train_list=["a", "b"], train_root=["t", "u"]),
        dict(dataset="files", train_root=["t", "u"]),
        dict(
            weights="a.pt", allow_partial_weights=True, freeze=["conv1", "layer1"], layer_decay=0.7
        ),
        dict(class_balanced_sampling=0.5, head_only_epochs=2),
        dict(
            teacher=["runs/a-seed0", "b.pth", "resnet50.a1_in1k"],
            teacher_model=["", "resnet18", ""],
            teacher_weight=[1.0, 2.0, 0.5],
            teacher_image_size=[32, 64, 64],
            teacher_mean=[0.5] * 9,
            teacher_std=[0.5] * 3,
            distill_pairs=["logits", "layer4 -> layer4", "layer3.1.conv2 -> teacher3:layer2"],
            kd_loss=["kl", "l2", "l2_normalized"],
            kd_weight=[1.0, 2.0, 3.0],
            temperature=4.0,
            kd_warmup_epochs=8.0,
            epochs=8,
            task_weight=0.0,
        ),
        dict(teacher=["a"], cache_teacher_logits=True),
        dict(teacher=["a"], distill_pairs=["logits -> logits"], kd_loss=["dkd"], dkd_beta=4.0),
        dict(teacher=["a", "b"], distill_pairs=["logits -> teacher2:logits"], kd_loss=["l2"]),
    ],
)
def test_the_same_knobs_are_welcome_where_they_have_an_effect(values):
    assert problems(**values) == []


@pytest.mark.parametrize(
    "key, values",
    [
        ("name", dict(name=".")),
        ("name", dict(name="..")),
        ("train_root", dict(dataset="files", train_root=[])),
        ("train_root", dict(dataset="files", train_list=["a", "b", "c"], train_root=["t", "u"])),
        ("val_root", dict(dataset="files", val_root=[])),
        ("val_root", dict(dataset="files", val_list=["a"], val_root=["t", "u"])),
        ("val_fraction", dict(dataset="files", val_fraction=0.1, val_list=["a"])),
        ("val_fraction", dict(dataset="files", val_fraction=0.1, val_root=["v"])),
        ("val_resize", dict(image_size=64, val_resize=63)),
        ("val_resize", dict(val_image_size=64, val_resize=63)),
        ("weights", dict(weights="a.pt", pretrained=True)),
        ("resume_from", dict(resume_from="runs/a", weights="a.pt")),
        ("resume_from", dict(resume_from="runs/a", pretrained=True)),
        ("nesterov", dict(nesterov=True, momentum=0.0)),
        ("milestones", dict(schedule="multistep")),
        ("milestones", dict(schedule="multistep", epochs=8, milestones=[0])),
        ("milestones", dict(schedule="multistep", epochs=8, milestones=[4, 8])),
        ("milestones", dict(schedule="multistep", epochs=8, milestones=[4, 2])),
        ("milestones", dict(schedule="multistep", epochs=8, milestones=[2, 2])),
        ("lr_min", dict(lr=0.1, lr_min=0.2)),
        ("warmup_epochs", dict(epochs=8, warmup_epochs=8.0)),
        ("warmup_epochs", dict(warmup_epochs=1.0, warmup_steps=3)),
        ("warmup_start_factor", dict(warmup_epochs=1.0, warmup="exponential")),
        ("warmup_start_factor", dict(warmup_steps=10, warmup="exponential")),
        ("lr_step_epochs", dict(schedule="step")),
        ("lr_step_epochs", dict(schedule="step", epochs=8, lr_step_epochs=8)),
        ("repeated_aug", dict(repeated_aug=33, batch_size=32)),
        ("batch_size", dict(batch_size=1, mixup_alpha=0.2)),
        ("micro_batch_size", dict(micro_batch_size=7, cutmix_alpha=1.0)),
        ("crop_scale", dict(crop_scale=[1.0, 0.08])),
        ("crop_ratio", dict(crop_ratio=[1.3, 0.7])),
        ("head_only_epochs", dict(epochs=8, head_only_epochs=8)),
        ("freeze", dict(freeze=["conv1", ""])),
        ("teacher_weight", dict(teacher=["a", "b", "c"], teacher_weight=[1.0, 2.0])),
        ("teacher_image_size", dict(teacher=["a", "b", "c"], teacher_image_size=[64, 64])),
        ("teacher_mean", dict(teacher=["a"], teacher_mean=[0.5])),
        ("teacher_mean", dict(teacher=["a"], teacher_mean=[0.5] * 6)),
        ("teacher_std", dict(teacher=["a", "b"], teacher_std=[0.5] * 9)),
        ("teacher_model", dict(teacher=["a", "b"], teacher_model=["resnet18"])),
        ("distill_pairs", dict(teacher=["a"], distill_pairs=["layer4"], kd_loss=["l2"])),
        ("distill_pairs", dict(teacher=["a"], distill_pairs=["logits -> layer4"], kd_loss=["l2"])),
        ("distill_pairs", dict(teacher=["a"], distill_pairs=["layer4 -> logits"], kd_loss=["l2"])),
        ("distill_pairs", dict(teacher=["a"], distill_pairs=["layer 4 -> layer4"], kd_loss=["l2"])),
        (
            "distill_pairs",
            dict(teacher=["a"], distill_pairs=["layer4 -> teacher2:layer4"], kd_loss=["l2"]),
        ),
        (
            "distill_pairs",
            dict(teacher=["a"], distill_pairs=["layer4 -> teacher0:layer4"], kd_loss=["l2"]),
        ),
        ("distill_pairs", dict(teacher=["a"], distill_pairs=["teacher1:logits"], kd_loss=["l2"])),
        ("kd_loss", dict(teacher=["a"], distill_pairs=["layer4 -> layer4"])),
        ("kd_loss", dict(teacher=["a"], distill_pairs=["logits", "a -> b"], kd_loss=["l2", "kl"])),
        ("kd_loss", dict(teacher=["a"], kd_loss=["kl", "l2"])),
        ("kd_weight", dict(teacher=["a"], kd_weight=[1.0, 2.0])),
        ("kd_warmup_epochs", dict(teacher=["a"], epochs=8, kd_warmup_epochs=9.0)),
        (
            "task_weight",
            dict(teacher=["a"], distill_pairs=["a -> b"], kd_loss=["l2"], task_weight=0.0),
        ),
        (
            "cache_teacher_logits",
            dict(
                teacher=["a"], distill_pairs=["a -> b"], kd_loss=["l2"], cache_teacher_logits=True
            ),
        ),
    ],
)
def test_knobs_that_exclude_each_other_are_a_problem(key, values):
    assert [p.split(":")[0] for p in problems(**values)] == [key]


def test_a_loss_that_is_not_asked_for_has_no_knobs():
    for key in ("bce_threshold", "bce_sum", "bce_shift"):
        changed = {**other_value(key), "teacher": ["a"], "task_weight": 0.0}
        assert {"loss", key} == {p.split(":")[0] for p in problems(**changed)}


def test_a_bad_value_is_not_judged_a_second_time_beside_others():
    assert len(problems(lr="fast", lr_min=0.2)) == 1
    assert len(problems(dataset="files", train_list=["a", "b"], train_root=[1, 2])) <= 2


# ---- files


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_params_file_survives_write_and_read(tmp_path, path):
    recipe = Recipe.from_yaml(path)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    again = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert again == recipe and again.fingerprint == recipe.fingerprint


@pytest.mark.parametrize("value", [5e-05, 1e16, 1e-300, 0.1 + 0.2, 1.0, 123456789.0, 2.5e20])
def test_awkward_floats_survive_write_and_read(tmp_path, value):
    recipe = Recipe(lr=value, crop_ratio=[1e-5, 2.0])
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    # and other readers of YAML see numbers, not text
    plain = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert type(plain["lr"]) is float and plain["lr"] == value
    assert plain["crop_ratio"] == [1e-5, 2.0]


@pytest.mark.parametrize(
    "text",
    [
        "Bilder für später",
        "数据",
        'a "quoted" name',
        "a: b # c",
        " padded ",
        "1e5",
        "true",
        "null",
        "2026-01-02",
        "[a, b]",
        "*alias",
        "tab\tand\nnewline",
        "\N{SLIGHTLY SMILING FACE}",
        "a\u2028b",
        "a\x85b",
        "a\x7fb",
    ],
)
def test_awkward_text_survives_write_and_read(tmp_path, text):
    recipe = Recipe(dataset="files", name=text, train_root=[text, "b"], train_list=["c", text])
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_a_written_recipe_holds_every_knob_with_its_description(tmp_path):
    Recipe().to_yaml(tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert list(yaml.safe_load(text)) == FIELDS
    assert all(field.description in text for field in Recipe.model_fields.values())


def test_overrides_win_over_the_file(tmp_path):
    recipe = Recipe.from_yaml(written(tmp_path, "lr: 3e-4\nepochs: 3\n"), lr="0.5", seed=7)
    assert (recipe.lr, recipe.epochs, recipe.seed) == (0.5, 3, 7)


def test_an_empty_file_is_the_default_recipe(tmp_path):
    assert Recipe.from_yaml(written(tmp_path, "# nothing\n")) == Recipe()
    (tmp_path / "recipe.yaml").write_bytes(b"\xef\xbb\xbfepochs: 3\r\n")  # as Windows writes it
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").epochs == 3


LAUGHS = "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(9))


@pytest.mark.parametrize(
    "content, says",
    [
        pytest.param("lr: 0.1\nepochs: 3\nlr: 0.2\n", "line 3.*'lr'", id="doubled key"),
        pytest.param("lr: &x 0.1\ngamma: *x\n", "line 2.*alias", id="alias"),
        pytest.param(LAUGHS, "alias", id="billion laughs"),
        pytest.param("- lr\n- 0.1\n", "list", id="a list"),
        pytest.param("0.1\n", "float", id="a number"),
        pytest.param("just words\n", "str", id="words"),
        pytest.param("lr: [0.1\nepochs: 3\n", "line", id="syntax"),
        pytest.param("\tlr: 0.1\n", "line", id="tab"),
        pytest.param("a: 1\n---\nb: 2\n", "single document", id="two documents"),
        pytest.param("name: a\x00b\n", "not allowed", id="zero byte"),
        pytest.param("lr: !!python/name:os.system\n", "python/name", id="python object"),
        pytest.param("[lr, epochs]: 1\n", "not a plain name", id="list as key"),
        pytest.param("x" * 1_000_001, "1,000,001 characters", id="huge"),
        pytest.param("lr: " + "[" * 2000, "", id="deep nesting"),
        pytest.param("lr: !!int ten\n", "", id="no int"),
        pytest.param("seed: 0x_\n", "", id="no hexadecimal"),
        pytest.param("nesterov: !!bool maybe\n", "", id="no bool"),
        pytest.param("name: !!timestamp soon\n", "", id="no date"),
        pytest.param("seed: " + "9" * 5000 + "\n", "", id="5,000 digits"),
        pytest.param(b"name: caf\xe9\n", "utf-8", id="latin-1"),
        pytest.param(b"\x89PNG\r\n\x1a\n\x00\x00", "utf-8", id="an image"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_clear_error(tmp_path, content, says):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=f"(?s)^{path}: .*{says}"):
        Recipe.from_yaml(path)


def test_a_long_file_of_unknown_knobs_is_refused_in_seconds(tmp_path):
    path = written(tmp_path, "".join(f"option{i}: 1\n" for i in range(20_000)))
    begin = time.process_time()
    with pytest.raises(RecipeError):
        Recipe.from_yaml(path)
    assert time.process_time() - begin < 5  # seconds


def test_a_missing_file_and_a_folder_are_clear_errors(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.from_yaml(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_a_clear_error(tmp_path):
    path = written(tmp_path, "lr: 0.1\n")
    path.chmod(0)
    with pytest.raises(RecipeError, match="[Pp]ermission"):
        Recipe.from_yaml(path)


# ---- notebooks

TAGGED = "# Parameters. Every option.\nlr = 0.1  # peak\nepochs = 8\ntrain_list = []\n"


def notebook(*cells: str) -> dict:
    """The namespace of a kernel that ran these cells, as IPython keeps it."""
    namespace: dict = {"In": [""], "__name__": "__main__"}
    for cell in cells:
        namespace["In"].append(cell)
        exec(cell, namespace)
    return namespace


def test_collect_takes_a_mapping():
    assert Recipe.from_namespace({"lr": 0.3, "epochs": 3, "_": 5}) == Recipe(lr=0.3, epochs=3)
    with pytest.raises(RecipeError, match="'lr'"):
        Recipe.from_namespace({"learning_rate": 0.3})


def test_collect_takes_the_tagged_cell_and_what_papermill_injects():
    namespace = notebook(
        "import math\nhelper = 3\nbatch_sizes = [1]",
        TAGGED,
        "# Parameters\nlr = 0.004\nseed = 3\n",
        "row = {'a': 1}\nlabel_smothing = 2",
    )
    assert Recipe.from_namespace(namespace) == Recipe(lr=0.004, epochs=8, seed=3)


def test_collect_sees_the_value_a_variable_has_by_now():
    assert Recipe.from_namespace(notebook(TAGGED, "lr = 0.7")).lr == 0.7


def test_an_injected_misspelling_is_found():
    with pytest.raises(RecipeError, match="label_smoothng: no such option.*'label_smoothing'"):
        Recipe.from_namespace(notebook(TAGGED, "# Parameters\nlabel_smoothng = 0.1\n"))


def test_a_misspelling_is_forgotten_when_the_corrected_cell_runs():
    corrected = notebook("# Parameters\nlearning_rate = 0.3\n", "# Parameters\nlr = 0.3\n")
    assert Recipe.from_namespace(corrected) == Recipe(lr=0.3)


def test_the_parameters_cell_runs_to_exactly_the_defaults():
    namespace: dict = {}
    exec(Recipe.parameters_cell(), namespace)
    namespace.pop("__builtins__")
    assert list(namespace) == FIELDS
    assert Recipe(**namespace) == Recipe()
    assert Recipe.from_namespace(notebook(Recipe.parameters_cell())) == Recipe()


def test_every_line_of_the_parameters_cell_is_one_papermill_can_read():
    head, *lines = Recipe.parameters_cell().split("\n")
    assert head.startswith("# Parameters")
    for line in lines:
        assert line.count("=") == 1, line
        assert len(line) <= 100, line


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[:2] < "05"], ids=lambda p: p.stem)
def test_papermill_sees_every_knob_of_a_notebook(path):
    seen = papermill.inspect_notebook(str(path))
    assert set(FIELDS) <= set(seen)
    namespace = parameters(path)
    assert Recipe(**{key: namespace[key] for key in FIELDS}) == Recipe()


def test_papermill_sees_what_to_compare_with_a_word_about_each():
    path = ROOT / "notebooks" / "05_compare.ipynb"
    seen = papermill.inspect_notebook(str(path))
    assert (
        set(seen)
        == {"runs_dir", "names", "baseline", "weights", "unfinished", "export_dir"}
        == set(parameters(path))
    )
    assert all(option["help"] for option in seen.values())


def parameters(path: Path) -> dict:
    """What the one cell of a notebook that papermill overrides sets."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    [tagged] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    namespace: dict = {}
    exec("".join(tagged["source"]), {}, namespace)
    return namespace


# ---- identity


def other_value(key: str) -> dict:
    """The default recipe with one option changed, and what that option needs to have an effect."""
    needs = {
        "train_list": dict(dataset="files"),
        "train_root": dict(dataset="files"),
        "val_list": dict(dataset="files"),
        "val_root": dict(dataset="files"),
        "val_fraction": dict(dataset="files"),
        "class_names": dict(dataset="files"),
        "num_classes": dict(dataset="files"),
        "allow_outside_root": dict(dataset="files"),
        "data_dir": dict(dataset="files"),
        "deep_stem": dict(model="resnet18"),
        "avg_down": dict(model="resnet18"),
        "decay_norm_and_bias": dict(weight_decay=0.1),
        "schedule": dict(schedule="constant"),
        "milestones": dict(schedule="multistep"),
        "gamma": dict(schedule="multistep", milestones=[2]),
        "warmup_start_factor": dict(warmup_epochs=1.0),
        "warmup": dict(warmup_epochs=1.0, warmup_start_factor=0.1),
        "trust_clip": dict(optimizer="lamb"),
        "always_adapt": dict(optimizer="lamb"),
        "lr_step_epochs": dict(schedule="step"),
        "power": dict(schedule="polynomial"),
        "pct_start": dict(schedule="one_cycle"),
        "up_smoothing": dict(label_smoothing=0.1, mixup_alpha=0.2),
        "switch_prob": dict(mixup_alpha=0.2, cutmix_alpha=1.0),
        **{key: dict(mixup_alpha=0.2) for key in ("mix_per_sample", "mix_prob")},
        **{key: dict(loss="bce") for key in ("bce_threshold", "bce_sum", "bce_shift")},
        **{f"randaug_{key}": dict(randaug_n=2) for key in ("m", "std", "increasing", "variant")},
        **{key: dict(erase_prob=0.5) for key in ("erase_mode", "erase_count")},
        "allow_partial_weights": dict(weights="a.pt"),
        **{key: dict(teacher=["a"]) for key in DISTILLED},
        "distill_pairs": dict(teacher=["a"], kd_loss=["l2"]),
        "dkd_beta": dict(teacher=["a"], kd_loss=["dkd"]),
        "image_size": dict(val_resize=64),
        "val_image_size": dict(val_resize=64),
        "cache_dir": dict(cache=True),
        "augment_on_device": dict(hflip=0.5),
    }.get(key, {})
    special = {
        "name": "other",
        "dataset": "letters",
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "mix_prob": 0.5,
        "std": [0.1, 0.2, 0.3],
        "optimizer": "adamw",
        "schedule": "constant",
        "milestones": [3],
        "lr_step_epochs": 3,
        "cosine_epochs": 4.0,
        "warmup": "cosine",
        "loss": "bce",
        "bce_threshold": 0.2,
        "randaug_variant": "timm",
        "erase_mode": "rand",
        "crop_scale": [0.5, 1.0],
        "crop_ratio": [1.0, 1.0],
        "device": "cpu",
        "precision": "bf16",
        "val_image_size": 40,
        "train_resize": 48,
        "num_classes": 9,
        "micro_batch_size": 8,
        "clip_grad_norm": 1.0,
        "ema_decay": 0.9,
        "workers": 3,
        "val_fraction": 0.25,
        "lr_min": 0.01,
        "gamma": 0.3,
        "train_fraction": 0.5,
        "hue": 0.1,
        "momentum": 0.5,
        "layer_decay": 0.75,
        **DISTILLED,
    }
    default = Recipe.model_fields[key].default
    if key in special:
        value = special[key]
    elif isinstance(default, bool):
        value = not default
    elif isinstance(default, int):
        value = default + 1
    elif isinstance(default, float):
        value = default + 0.25
    elif isinstance(default, list):
        value = ["other"]
    else:
        value = "other"
    return {**needs, key: value}


@pytest.mark.parametrize("key", FIELDS)
def test_the_fingerprint_tells_what_can_change_the_weights_and_nothing_else(key):
    changed = other_value(key)
    base = {k: v for k, v in changed.items() if k != key}
    base |= {"milestones": {"milestones": [2]}, "lr_step_epochs": {"lr_step_epochs": 2}}.get(
        key, {}
    )
    same = Recipe(**base).fingerprint == Recipe(**changed).fingerprint
    assert same == (key in runtime_only)


def test_place_holds_what_says_where_and_how_often():
    assert {"name", "data_dir", "runs_dir", "workers", "device", "log_every"} <= runtime_only
    results = "seed lr epochs batch_size micro_batch_size model dataset precision channels_last"
    assert not runtime_only & set(results.split())


def test_the_fingerprint_is_twelve_hex_digits_and_the_same_in_another_process():
    code = "from workbench.recipe import Recipe; print(Recipe(lr=0.3).fingerprint)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == Recipe(lr=0.3).fingerprint
    assert re.fullmatch("[0-9a-f]{12}", Recipe().fingerprint)


def test_a_recipe_cannot_be_changed_only_replaced():
    recipe = Recipe(lr=0.3)
    with pytest.raises(Exception, match="frozen"):
        recipe.lr = 0.5
    other = recipe.replace(epochs=3)
    assert (other.lr, other.epochs, recipe.epochs) == (0.3, 3, Recipe().epochs)
    with pytest.raises(RecipeError, match="epochs"):
        recipe.replace(epochs=0)


def test_changed_names_what_differs_from_the_defaults():
    assert Recipe().non_default() == {}
    assert Recipe(lr=0.1, epochs=3, hflip=0.5).non_default() == {"epochs": 3, "hflip": 0.5}


def test_the_run_folder_follows_from_name_and_seed(tmp_path):
    recipe = Recipe(name="a b", seed=3, runs_dir=str(tmp_path))
    assert recipe.folder == tmp_path / "a b-seed3"
    assert Recipe(name="x").folder == ROOT / "runs" / "x-seed0"


def test_every_option_has_a_description_and_hints_lead_to_real_options():
    assert all(field.description for field in Recipe.model_fields.values())
    elsewhere = [name for key in FIELDS for name in metadata(key)["aka"]]
    assert len(set(elsewhere)) == len(elsewhere) and not set(elsewhere) & set(FIELDS)


def test_a_former_name_is_an_error_that_gives_the_present_one():
    for old, new in RENAMED.items():
        [problem] = problems(**{old: 1})
        assert problem.startswith(f"{old}: renamed to '{new}'") and new in FIELDS
