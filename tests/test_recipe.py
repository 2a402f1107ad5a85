"""Recipes: values that are understood or refused, files, notebooks, fingerprints."""

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import papermill
import pytest
import yaml

from workbench import ROOT
from workbench.recipe import RENAMED, Recipe, RecipeError, metadata, runtime_only
from workbench.recipe_checks import RESNETS

FIELDS = list(Recipe.model_fields)


def problems(**values) -> list[str]:
    """What is wrong with a recipe; empty when nothing is."""
    try:
        Recipe(**values)
    except RecipeError as error:
        return error.problems
    return []


def keys(found: list[str]) -> list[str]:
    return [problem.partition(":")[0] for problem in found]


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
        ("learning_rate", "lr"),  # names of other tools
        ("arch", "model"),
        ("amp", "precision"),
        ("smooth_ratio", "label_smoothing"),
        ("frozen_layers", "freeze"),
    ],
)
def test_an_unknown_option_gets_the_nearest_name(key, right):
    [problem] = problems(**{key: 1})
    assert problem.startswith(f"{key}: ") and f"'{right}'" in problem


def test_without_a_near_name_the_list_of_options_is_named():
    [problem] = problems(zzzzqqqq=1)
    assert "workbench options" in problem and "nearest" not in problem


def test_a_former_name_is_an_error_that_gives_the_present_one():
    for old, new in RENAMED.items():
        [problem] = problems(**{old: 1})
        assert problem.startswith(f"{old}: renamed to '{new}'") and new in FIELDS


@pytest.mark.parametrize("key", ["1", "on", "self", "2026-01-02"])
def test_a_key_that_is_not_a_name_is_an_unknown_option(tmp_path, key):
    with pytest.raises(RecipeError, match="no such option"):
        Recipe.from_yaml(written(tmp_path, f"{key}: 1\n"))


def test_all_problems_are_in_one_error(tmp_path):
    text = "learning_rate: 1\nlr: -1\nepochs: many\nseed: true\nnesterov: true\nmomentum: 0\n"
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(path)
    wanted = ["epochs", "learning_rate", "lr", "nesterov", "seed"]
    assert sorted(keys(caught.value.problems)) == wanted
    assert str(caught.value).startswith(f"{path}: 5 problem")
    assert all(f"  - {problem}" in str(caught.value) for problem in caught.value.problems)


# ---- types and ranges


@pytest.mark.parametrize("text", ["007", "1e3", "1_000", "None", "20261126", "yes", "1.0"])
def test_a_text_option_takes_the_text_as_it_is_written(tmp_path, text):
    path = written(tmp_path, f"name: {text}\nfreeze: [layer1, {text}]\nteacher: {text}\n")
    recipe = Recipe.from_yaml(path)
    assert (recipe.name, recipe.teacher, recipe.freeze) == (text, [text], ["layer1", text])
    given = Recipe.from_yaml(written(tmp_path, ""), name=text, freeze=f"[layer1, {text}]")
    assert (given.name, given.freeze) == (text, ["layer1", text])
    recipe.to_yaml(tmp_path / "again.yaml")
    assert Recipe.from_yaml(tmp_path / "again.yaml") == recipe


def test_a_whole_number_that_papermill_made_of_a_text_is_that_text():
    assert Recipe.from_namespace({"name": 20261126}).name == "20261126"


@pytest.mark.parametrize(
    "key, value",
    [
        ("epochs", True),
        ("lr", True),
        ("verify_data", 1),
        ("hflip", "often"),
        ("epochs", 0.5),
        ("epochs", "0.5"),
        ("epochs", [1]),
        ("lr", None),
        ("lr", {"peak": 1}),
        ("name", 5.0),
        ("model", None),
        ("milestones", "soon"),
        ("milestones", [1.5]),
        ("milestones", "[30"),
        ("train_list", [1.5]),
        ("mean", [0.5, 0.5]),
        ("precision", "fp8"),
        ("optimizer_args", "0.9"),
        ("optimizer_args", [0.9]),
        ("optimizer_args", "{betas: [0.9"),
        ("teacher", True),
        ("teacher_mean", [0.5, "grey", 0.5]),
        ("kd_loss", "hinton"),
        ("layer_decay", "half"),
    ],
)
def test_a_wrong_type_is_one_problem_with_the_value_and_the_help(key, value):
    [problem] = problems(**{key: value})
    assert problem.startswith(f"{key}: ") and repr(value) in problem
    assert Recipe.model_fields[key].description in problem


OUT_OF_RANGE = {
    "val_fraction": [-0.1, 1.0],
    "num_classes": [1],
    "train_fraction": [0.0, 1.01],
    "image_size": [7, 4097],
    "val_resize": [8193],
    "mean": [[0.5, 0.5, 127.5]],
    "std": [[0.2, 0.0, 0.2], [0.5] * 4],
    "model": [""],
    "drop_path": [1.0],
    "epochs": [0, 100_001],
    "batch_size": [0],
    "micro_batch_size": [0],
    "lr": [0.0, math.inf, math.nan, "nan", "1e999"],
    "momentum": [1.0],
    "weight_decay": [-1e-4],
    "warmup_start_factor": [1.5],
    "ema_decay": [1.0],
    "label_smoothing": [1.0],
    "crop_scale": [[0.0, 1.0], [0.5, 1.1]],
    "hflip": [1.1],
    "hue": [0.6],
    "seed": [-1, 2**32],
    "eval_every": [0],
    "train_root": [[]],
    "teacher_weight": [[], [0.0]],
    "distill_pairs": [[]],
    "temperature": [0.0],
    "task_weight": [-1.0],
    "log_every": [0],
    "workers": [-1],
    "runs_dir": [""],
    "name": ["", "a/b", "a\\b"],
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(key):
    for value in OUT_OF_RANGE[key]:
        assert keys(problems(**{key: value})) == [key], value


@pytest.mark.parametrize(
    "key, text, means",
    [
        ("lr", "3e-4", 0.0003),
        ("epochs", "1e2", 100),
        ("epochs", 20.0, 20),
        ("verify_data", "false", False),
        ("nesterov", "TRUE", True),
        ("crop_scale", "[0.08, 1]", [0.08, 1.0]),
        ("crop_scale", (0.08, 1.0), [0.08, 1.0]),
        ("mean", ["1e-1", "0.5", 0], [0.1, 0.5, 0.0]),
        ("workers", "none", None),
        ("workers", "4", 4),
        ("ema_decay", "0.9999", 0.9999),
        ("lr", 1, 1.0),
    ],
)
def test_text_is_read_as_the_value_it_means(key, text, means):
    value = getattr(Recipe(**{key: text}), key)
    assert value == means and type(value) is type(means)


def test_lists_may_be_written_as_text_or_as_one_item():
    for text, milestones in (("[30, 60]", [30, 60]), ("30", [30])):
        recipe = Recipe(epochs=90, schedule="multistep", milestones=text)
        assert recipe.milestones == milestones
    assert Recipe(dataset="files", train_list="[2026-13-45]").train_list == ["2026-13-45"]
    recipe = Recipe(teacher="runs/a-seed0", teacher_weight="2", kd_loss="kl")
    assert (recipe.teacher, recipe.teacher_weight) == (["runs/a-seed0"], [2.0])
    assert recipe.kd_loss == ["kl"]
    assert Recipe(dataset="files", train_list="{a}.txt").train_list == ["{a}.txt"]


ARGS = {"betas": [0.9, 0.99], "caution": True, "eps": 3e-4, "mode": "a: b # c"}


def test_a_mapping_is_the_same_from_every_source(tmp_path):
    mapping = "{mode: 'a: b # c', eps: 3e-4, betas: [0.9, 0.99], caution: true}"
    block = (
        "optimizer_args:\n  mode: 'a: b # c'\n  eps: 3e-4\n  betas: [0.9, 0.99]\n  caution: true\n"
    )
    recipe = Recipe(optimizer_args=mapping)
    recipe.to_yaml(tmp_path / "again.yaml")
    cell = f"# Parameters\noptimizer_args = {ARGS!r}"
    namespace = {"In": ["", cell], "optimizer_args": ARGS}
    for same in (
        Recipe(optimizer_args=dict(reversed(ARGS.items()))),
        Recipe(optimizer_args={**ARGS, "betas": (0.9, 0.99)}),
        Recipe.from_yaml(written(tmp_path, f"optimizer_args: {mapping}\n")),
        Recipe.from_yaml(written(tmp_path, block)),
        Recipe.from_yaml(written(tmp_path, ""), optimizer_args=mapping),
        Recipe.from_yaml(tmp_path / "again.yaml"),
        Recipe.from_namespace(namespace),
        Recipe.from_namespace({"optimizer_args": mapping}),
    ):
        assert same.optimizer_args == ARGS and same.fingerprint == recipe.fingerprint
    assert yaml.safe_load((tmp_path / "again.yaml").read_text())["optimizer_args"] == ARGS
    assert Recipe(optimizer_args={**ARGS, "eps": 1e-8}).fingerprint != recipe.fingerprint
    with pytest.raises(RecipeError, match="'betas' is repeated"):
        Recipe.from_yaml(written(tmp_path, "optimizer_args: {betas: [1.0], betas: [2.0]}\n"))


@pytest.mark.parametrize(
    "args, text",
    [
        ({"betas": {"first": 0.9}}, "betas is {'first': 0.9}; an argument is a number, a text"),
        ({"betas": [[0.9]]}, "an argument is a number"),
        ({"eps": math.nan}, "eps is nan, which is not finite"),
        ({"eps": "inf"}, "eps is inf, which is not finite"),
        ({1: 2}, "valid string"),
    ],
)
def test_an_argument_that_cannot_be_saved_is_refused(args, text):
    [problem] = problems(optimizer_args=args)
    assert problem.startswith("optimizer_args: ") and text in problem


@pytest.mark.parametrize("text", ["[" * 2000, "[&a [x], *a]", "[!!int x]"])
def test_text_that_only_begins_like_a_list_is_a_problem(text):
    assert keys(problems(dataset="files", train_list=text)) == ["train_list"]


# ---- options without an effect, options that contradict each other

# options, and the values of others that they need
NEEDS = [
    ("data_dir train_list train_root val_list val_root val_fraction", {"dataset": "files"}),
    ("class_names num_classes allow_outside_root shard_cache_gb", {"dataset": "files"}),
    ("file_column label_column", {"dataset": "files"}),
    ("group_column", {"dataset": "files", "fold": "1/2"}),
    ("cache_dir", {"cache": True}),
    ("deep_stem avg_down", {"model": "resnet18"}),
    ("allow_partial_weights", {"weights": "a.pt"}),
    ("decay_norm_and_bias", {"weight_decay": 0.1}),
    ("trust_clip always_adapt", {"optimizer": "lamb"}),
    ("milestones", {"schedule": "multistep"}),
    ("lr_step_epochs", {"schedule": "step"}),
    ("power", {"schedule": "polynomial"}),
    ("pct_start", {"schedule": "one_cycle"}),
    ("warmup warmup_start_factor", {"warmup_epochs": 1.0}),
    ("bce_threshold bce_sum bce_shift", {"loss": "bce"}),
    ("focal_gamma", {"loss": "focal"}),
    ("up_smoothing", {"label_smoothing": 0.1, "mixup_alpha": 0.2}),
    ("randaug_m randaug_std randaug_increasing randaug_variant", {"randaug_n": 2}),
    ("switch_prob", {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}),
    ("mix_per_sample mix_prob", {"mixup_alpha": 0.2}),
    ("erase_mode erase_count", {"erase_prob": 0.5}),
    ("augment_on_device", {"hflip": 0.5}),
    ("teacher_model teacher_weight teacher_image_size teacher_mean teacher_std", {"teacher": "a"}),
    ("kd_loss kd_weight temperature kd_warmup_epochs task_weight", {"teacher": "a"}),
    ("cache_teacher_logits", {"teacher": "a"}),
    ("distill_pairs", {"teacher": "a", "kd_loss": "l2"}),
    ("dkd_beta", {"teacher": "a", "kd_loss": "dkd"}),
    ("dataset_args", {"dataset": "mine.py:frames"}),
    ("model_args", {"model": "mine.py:model"}),
    ("loss_args", {"loss": "mine.py:loss"}),
    ("kd_loss_args", {"teacher": "a", "kd_loss": "mine.py:kd"}),
]
NEEDED = {key: others for options, others in NEEDS for key in options.split()}
# what is set beside these options so that they contradict nothing
BESIDE = {
    "transform_args": {"transform": "mine.py:transform"},
    "image_size": {"val_resize": 64},
    "val_image_size": {"val_resize": 64},
    "file_column": {"dataset": "files", "train_list": ["a.csv"]},
    "label_column": {"dataset": "files", "train_list": ["a.csv"]},
    "group_column": {"dataset": "files", "train_list": ["a.csv"], "fold": "1/2"},
    "gamma": {"schedule": "multistep", "milestones": [2]},
    "warmup": {"warmup_epochs": 1.0, "warmup_start_factor": 0.1},
}
# other values than the default where no rule of other_value gives one
OTHER: dict[str, Any] = {
    "dataset": "letters",
    "dataset_args": {"part": 1},
    "kd_loss_args": {"temperature": 2.0},
    "fold": "2/5",
    "loss": "bce",
    "model_args": {"width": 8},
    "loss_args": {"gamma": 1.0},
    "transform": "mine.py:transform",
    "transform_args": {"sigma": 3.0},
    "metrics": ["mine.py:metric"],
    "schedule": "constant",
    "optimizer_args": {"dampening": 0.5},
    "mean": [0.1, 0.2, 0.3],
    "std": [0.1, 0.2, 0.3],
    "num_classes": 9,
    "train_resize": 48,
    "val_image_size": 40,
    "micro_batch_size": 8,
    "milestones": [3],
    "lr_step_epochs": 3,
    "cosine_epochs": 4.0,
    "layer_decay": 0.75,
    "clip_grad_norm": 1.0,
    "ema_decay": 0.9,
    "bce_threshold": 0.2,
    "class_weights": ["balanced"],
    "crop_scale": [0.5, 1.0],
    "crop_ratio": [1.0, 1.0],
    "teacher_weight": [2.0],
    "teacher_image_size": [64],
    "teacher_mean": [0.5] * 3,
    "teacher_std": [0.5] * 3,
    "distill_pairs": ["logits", "layer4 -> layer4"],
    "kd_loss": ["kl"],
    "kd_weight": [2.0],
    "workers": 3,
    "early_stopping": 2,
}


def other_value(key: str) -> Any:
    """A valid value that is not the default."""
    field = Recipe.model_fields[key]
    if key in OTHER:
        return OTHER[key]
    if get_origin(field.annotation) is Literal:
        return next(value for value in get_args(field.annotation) if value != field.default)
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, int):
        return field.default + 1
    if isinstance(field.default, float):
        return 0.8 * field.default + 0.05
    return ["other"] if isinstance(field.default, list) else "other"


def test_an_option_that_would_change_nothing_is_a_problem():
    for key in NEEDED:
        value = other_value(key)
        [problem] = problems(**{key: value})
        shown = value if isinstance(value, list | str) else repr(value)
        assert problem.startswith(f"{key}: ") and str(shown) in problem
        assert " has no effect, since " in problem


@pytest.mark.parametrize(
    "key, value, others",
    [
        ("train_list", ["a.txt"], dict(dataset="letters")),
        ("deep_stem", True, dict(model="resnet50d")),
        ("micro_batch_size", 32, dict(batch_size=32)),
        ("momentum", 0.8, dict(optimizer="adamw")),
        ("nesterov", True, dict(optimizer="adamw")),
        ("gamma", 0.5, dict(schedule="cosine")),
        ("lr_min", 0.01, dict(schedule="multistep", milestones=[2])),
        ("always_adapt", True, dict(optimizer="lamb", weight_decay=0.1)),
        ("cosine_epochs", 4.0, dict(schedule="polynomial")),
        ("lr_per_epoch", True, dict(schedule="constant")),
        ("warmup_epochs", 1.0, dict(schedule="one_cycle")),
        ("warmup_steps", 5, dict(schedule="one_cycle")),
        ("up_smoothing", True, dict(mixup_alpha=0.2)),
        ("up_smoothing", True, dict(label_smoothing=0.1)),
        ("up_smoothing", True, dict(loss="bce", label_smoothing=0.1, mixup_alpha=0.2)),
        ("switch_prob", 0.3, dict(cutmix_alpha=1.0)),
        ("eval_every", 9, dict(epochs=8)),
        ("temperature", 4.0, dict(teacher=["a"], kd_loss=["up_kl"])),
        ("dkd_beta", 4.0, dict(teacher=["a"], kd_loss=["kl"])),
        ("loss", "bce", dict(teacher=["a"], task_weight=0.0)),
        ("label_smoothing", 0.1, dict(teacher=["a"], task_weight=0.0)),
    ],
)
def test_an_option_has_no_effect_beside_others(key, value, others):
    [problem] = problems(**{key: value}, **others)
    assert problem.startswith(f"{key}: {value!r} has no effect, since ")
    assert problems(**others) == []


def test_the_options_of_a_loss_without_weight_have_no_effect():
    for key in ("bce_threshold", "bce_sum", "bce_shift"):
        found = problems(**{key: other_value(key)}, loss="bce", teacher=["a"], task_weight=0.0)
        assert keys(found) == ["loss", key]


@pytest.mark.parametrize(
    "values",
    [
        *[dict(model=name, deep_stem=True, avg_down=True) for name in RESNETS],
        dict(optimizer="adamw", momentum=0.9),  # a default may be written out
        dict(warmup_steps=10, warmup_start_factor=0.1, warmup="exponential"),
        dict(optimizer="lamb", weight_decay=0.1, decay_norm_and_bias=False, always_adapt=True),
        dict(schedule="step", lr_step_epochs=2, gamma=0.5, warmup_epochs=1.0),
        dict(schedule="polynomial", lr_min=0.01, lr_per_epoch=True),
        dict(schedule="multistep", epochs=90, milestones=[1, 30, 89]),
        dict(repeated_aug=32, batch_size=32),
        dict(dataset="files", train_list=["a", "b"], train_root=["t"]),
        dict(dataset="files", train_list=["a", "b"], train_root=["t", "u"]),
        dict(dataset="files", train_root=["t", "u"]),
        dict(
            teacher=["runs/a-seed0", "b.pth", "resnet50.a1_in1k"],
            teacher_model=["", "resnet18", ""],
            teacher_weight=[1.0, 2.0, 0.5],
            teacher_mean=[0.5] * 9,
            teacher_std=[0.5] * 3,
            distill_pairs=["logits", "layer4 -> layer4", "layer3.1.conv2 -> teacher3:layer2"],
            kd_loss=["kl", "l2", "l2_normalized"],
            kd_weight=[1.0, 2.0, 3.0],
            kd_warmup_epochs=8.0,
            task_weight=0.0,
        ),
        dict(teacher=["a"], distill_pairs=["logits -> logits"], kd_loss=["dkd"], dkd_beta=4.0),
        dict(teacher=["a", "b"], distill_pairs=["logits -> teacher2:logits"], kd_loss=["l2"]),
    ],
)
def test_options_are_valid_together(values):
    assert problems(**values) == []


FEATURES = dict(teacher=["a"], distill_pairs=["a -> b"], kd_loss=["l2"])


@pytest.mark.parametrize(
    "key, values",
    [
        ("name", dict(name="..")),
        ("train_root", dict(dataset="files", train_list=["a", "b", "c"], train_root=["t", "u"])),
        ("val_root", dict(dataset="files", val_list=["a"], val_root=["t", "u"])),
        ("val_fraction", dict(dataset="files", val_fraction=0.1, val_list=["a"])),
        ("val_fraction", dict(dataset="files", val_fraction=0.1, val_root=["v"])),
        ("val_resize", dict(image_size=64, val_resize=63)),
        ("val_resize", dict(val_image_size=64, val_resize=63)),
        ("train_resize", dict(train_resize=31)),
        ("cache", dict(cache=True, verify_data=False)),
        ("weights", dict(weights="a.pt", pretrained=True)),
        ("resume_from", dict(resume_from="runs/a", weights="a.pt")),
        ("resume_from", dict(resume_from="runs/a", pretrained=True)),
        ("freeze", dict(freeze=["conv1", ""])),
        ("micro_batch_size", dict(micro_batch_size=7, cutmix_alpha=1.0)),
        ("repeated_aug", dict(repeated_aug=33, batch_size=32)),
        ("batch_size", dict(batch_size=1, mixup_alpha=0.2)),
        ("nesterov", dict(nesterov=True, momentum=0.0)),
        ("milestones", dict(schedule="multistep")),
        ("milestones", dict(schedule="multistep", epochs=8, milestones=[0])),
        ("milestones", dict(schedule="multistep", epochs=8, milestones=[4, 8])),
        ("milestones", dict(schedule="multistep", epochs=8, milestones=[4, 2])),
        ("milestones", dict(schedule="multistep", epochs=8, milestones=[2, 2])),
        ("lr_step_epochs", dict(schedule="step")),
        ("lr_step_epochs", dict(schedule="step", epochs=8, lr_step_epochs=8)),
        ("lr_min", dict(lr=0.1, lr_min=0.2)),
        ("warmup_epochs", dict(epochs=8, warmup_epochs=8.0)),
        ("warmup_epochs", dict(warmup_epochs=1.0, warmup_steps=3)),
        ("warmup_start_factor", dict(warmup_steps=10, warmup="exponential")),
        ("head_only_epochs", dict(epochs=8, head_only_epochs=8)),
        ("crop_scale", dict(crop_scale=[1.0, 0.08])),
        ("crop_ratio", dict(crop_ratio=[1.3, 0.7])),
        ("augment_on_device", dict(augment_on_device=True, autoaugment=True)),
        ("teacher_weight", dict(teacher=["a", "b", "c"], teacher_weight=[1.0, 2.0])),
        ("teacher_image_size", dict(teacher=["a", "b", "c"], teacher_image_size=[64, 64])),
        ("teacher_mean", dict(teacher=["a"], teacher_mean=[0.5])),
        ("teacher_std", dict(teacher=["a", "b"], teacher_std=[0.5] * 9)),
        ("teacher_model", dict(teacher=["a", "b"], teacher_model=["resnet18"])),
        ("distill_pairs", FEATURES | dict(distill_pairs=["layer4"])),
        ("distill_pairs", FEATURES | dict(distill_pairs=["logits -> layer4"])),
        ("distill_pairs", FEATURES | dict(distill_pairs=["layer4 -> teacher1:logits"])),
        ("distill_pairs", FEATURES | dict(distill_pairs=["layer 4 -> layer4"])),
        ("distill_pairs", FEATURES | dict(distill_pairs=["layer4 -> teacher2:layer4"])),
        ("distill_pairs", FEATURES | dict(distill_pairs=["layer4 -> teacher0:layer4"])),
        ("distill_pairs", FEATURES | dict(distill_pairs=["teacher1:logits"])),
        ("kd_loss", FEATURES | dict(kd_loss=["dist"])),
        ("kd_loss", FEATURES | dict(distill_pairs=["logits", "a -> b"], kd_loss=["l2", "kl"])),
        ("kd_loss", dict(teacher=["a"], kd_loss=["kl", "l2"])),
        ("kd_weight", dict(teacher=["a"], kd_weight=[1.0, 2.0])),
        ("kd_warmup_epochs", dict(teacher=["a"], epochs=8, kd_warmup_epochs=9.0)),
        ("task_weight", FEATURES | dict(task_weight=0.0)),
        ("cache_teacher_logits", FEATURES | dict(cache_teacher_logits=True)),
    ],
)
def test_options_that_contradict_each_other_are_a_problem(key, values):
    assert keys(problems(**values)) == [key]


def test_a_bad_value_is_not_judged_beside_others():
    assert len(problems(lr="fast", lr_min=0.2)) == 1
    assert keys(problems(dataset="lion", data_dir="x", lr_min=0.2)) == ["dataset", "lr_min"]


# ---- files


@pytest.mark.parametrize("value", [5e-05, 1e16, 1e-300, 0.1 + 0.2])
def test_floats_survive_write_and_read(tmp_path, value):
    recipe = Recipe(lr=value, crop_ratio=[1e-5, 2.0])
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    plain = yaml.safe_load((tmp_path / "recipe.yaml").read_text())  # numbers to other readers too
    assert type(plain["lr"]) is float and plain["lr"] == value
    assert plain["crop_ratio"] == [1e-5, 2.0]


@pytest.mark.parametrize(
    "text",
    [
        "数据",
        'a "quoted" name',
        "a: b # c",
        " padded ",
        "true",
        "[a, b]",
        "*alias",
        "tab\tand\nnewline",
        "a\u2028b",
        "a\x85b",
        "a\x7fb",
    ],
)
def test_text_survives_write_and_read(tmp_path, text):
    recipe = Recipe(dataset="files", name=text, train_root=[text, "b"], train_list=["c", text])
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_a_written_recipe_has_every_option_with_its_help(tmp_path):
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
        pytest.param("lr: 0.1\nepochs: 3\nlr: 0.2\n", "line 3.*'lr'", id="repeated key"),
        pytest.param("lr: &x 0.1\ngamma: *x\n", "line 2.*alias", id="alias"),
        pytest.param(LAUGHS, "alias", id="billion laughs"),
        pytest.param("- lr\n- 0.1\n", "list", id="a list"),
        pytest.param("0\n", "int", id="a number"),
        pytest.param("lr: [0.1\nepochs: 3\n", "line", id="syntax"),
        pytest.param("a: 1\n---\nb: 2\n", "single document", id="two documents"),
        pytest.param("name: a\x00b\n", "not allowed", id="zero byte"),
        pytest.param("lr: !!python/name:os.system\n", "python/name", id="python object"),
        pytest.param("[lr, epochs]: 1\n", "", id="list as key"),
        pytest.param("lr: " + "[" * 2000, "", id="deep nesting"),
        pytest.param("lr: !!int ten\n", "", id="no int"),
        pytest.param("seed: " + "9" * 5000 + "\n", "", id="5,000 digits"),
        pytest.param(b"name: caf\xe9\n", "utf-8", id="latin-1"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_one_error(tmp_path, content, says):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=f"(?s)^{path}: .*{says}"):
        Recipe.from_yaml(path)


def test_a_missing_file_gets_the_nearest_name(tmp_path):
    written(tmp_path, "")
    with pytest.raises(RecipeError, match="cannot be read.*the nearest is 'recipe.yaml'"):
        Recipe.from_yaml(tmp_path / "recpie.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_yaml(tmp_path)


# ---- notebooks

TAGGED = "# Parameters. Every option.\nlr = 0.1  # peak\nepochs = 8\ntrain_list = []\n"


def notebook(*cells: str) -> dict:
    """The namespace of a kernel that ran these cells, as IPython keeps it."""
    namespace: dict = {"In": [""], "__name__": "__main__"}
    for cell in cells:
        namespace["In"].append(cell)
        exec(cell, namespace)
    return namespace


def test_from_namespace_takes_a_mapping():
    assert Recipe.from_namespace({"lr": 0.3, "epochs": 3, "_": 5}) == Recipe(lr=0.3, epochs=3)
    with pytest.raises(RecipeError, match="'lr'"):
        Recipe.from_namespace({"learning_rate": 0.3})


def test_from_namespace_takes_the_tagged_cell_and_what_papermill_injects():
    namespace = notebook(
        "import math\nhelper = 3\nbatch_sizes = [1]",
        TAGGED,
        "# Parameters\nlr = 0.004\nseed, name = 3, 'other'\n",
        "row = {'a': 1}\nlabel_smothing = 2",
    )
    assert Recipe.from_namespace(namespace) == Recipe(lr=0.004, epochs=8, seed=3, name="other")


def test_from_namespace_takes_the_present_value_of_a_variable():
    assert Recipe.from_namespace(notebook(TAGGED, "lr = 0.7")).lr == 0.7


def test_an_injected_misspelling_is_found():
    with pytest.raises(RecipeError, match="label_smoothng: no such option.*'label_smoothing'"):
        Recipe.from_namespace(notebook(TAGGED, "# Parameters\nlabel_smoothng = 0.1\n"))
    corrected = notebook("# Parameters\nlearning_rate = 0.3\n", "# Parameters\nlr = 0.3\n")
    assert Recipe.from_namespace(corrected) == Recipe(lr=0.3)


def test_the_parameters_cell_runs_to_the_defaults():
    namespace: dict = {}
    exec(Recipe.parameters_cell(), namespace)
    namespace.pop("__builtins__")
    assert list(namespace) == FIELDS
    assert Recipe(**namespace) == Recipe()
    assert Recipe.from_namespace(notebook(Recipe.parameters_cell())) == Recipe()


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[:2] < "05"], ids=lambda p: p.stem)
def test_papermill_sees_every_option_of_a_notebook(path):
    assert set(FIELDS) <= set(papermill.inspect_notebook(str(path)))
    namespace = parameters(path)
    assert Recipe(**{key: namespace[key] for key in FIELDS}) == Recipe()


def test_papermill_sees_the_parameters_of_the_comparison_with_help():
    path = ROOT / "notebooks" / "05_compare.ipynb"
    seen = papermill.inspect_notebook(str(path))
    names = {"runs_dir", "sweep", "names", "baseline", "weights", "unfinished", "export_dir"}
    assert set(seen) == names == set(parameters(path))
    assert all(option["help"] for option in seen.values())


def parameters(path: Path) -> dict:
    """What the cell of a notebook that papermill overrides sets."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    [tagged] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    namespace: dict = {}
    exec("".join(tagged["source"]), {}, namespace)
    return namespace


# ---- identity


@pytest.mark.parametrize("key", FIELDS)
def test_the_fingerprint_covers_what_can_change_the_weights_and_nothing_else(key):
    base = BESIDE.get(key) or NEEDED.get(key) or {}
    default = {"milestones": [2], "lr_step_epochs": 2}.get(key, Recipe.model_fields[key].default)
    one, other = (Recipe(**{**base, key: value}) for value in (default, other_value(key)))
    assert (one.fingerprint == other.fingerprint) == (key in runtime_only)


def test_runtime_options_are_those_that_cannot_change_the_weights():
    assert {"name", "data_dir", "runs_dir", "workers", "device", "log_every"} <= runtime_only
    results = "seed lr epochs batch_size micro_batch_size model dataset precision channels_last"
    assert not runtime_only & set(results.split())


def test_the_fingerprint_is_the_same_in_another_process():
    code = "from workbench.recipe import Recipe; print(Recipe(lr=0.3).fingerprint)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == Recipe(lr=0.3).fingerprint
    assert re.fullmatch("[0-9a-f]{12}", Recipe().fingerprint)


def test_a_recipe_is_frozen_and_can_be_replaced():
    recipe = Recipe(lr=0.3)
    with pytest.raises(Exception, match="frozen"):
        recipe.lr = 0.5
    other = recipe.replace(epochs=3)
    assert (other.lr, other.epochs, recipe.epochs) == (0.3, 3, Recipe().epochs)
    with pytest.raises(RecipeError, match="epochs"):
        recipe.replace(epochs=0)


def test_non_default_has_what_differs_from_the_defaults():
    assert Recipe().non_default() == {}
    assert Recipe(lr=0.1, epochs=3, hflip=0.5).non_default() == {"epochs": 3, "hflip": 0.5}


def test_the_run_folder_follows_from_name_and_seed(tmp_path):
    recipe = Recipe(name="a b", seed=3, runs_dir=str(tmp_path))
    assert recipe.folder == tmp_path / "a b-seed3"
    assert Recipe(name="x").folder == ROOT / "runs" / "x-seed0"


def test_every_option_is_read_by_the_package():
    """As an attribute, or by its name as text."""
    read = {"runs_dir"}  # by Recipe.folder
    for path in (ROOT / "workbench").rglob("*.py"):
        if (
            path.stem in ("options", "overrides", "recipe", "recipe_checks")
            or path.parent.name == "importers"
        ):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            read |= {getattr(node, "attr", None), getattr(node, "value", None)}
    assert set(FIELDS) <= read


def test_every_option_has_help_and_every_hint_leads_to_one_option():
    assert all(field.description for field in Recipe.model_fields.values())
    elsewhere = [name for key in FIELDS for name in metadata(key)["aka"]]
    assert len(set(elsewhere)) == len(elsewhere) and not set(elsewhere) & set(FIELDS)
