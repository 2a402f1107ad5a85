"""Every params file loads, says where it is from, and means what its source means.

The tables below hold the sources' figures in the sources' terms; the learning rates are computed
from them by the sources' formulas, step by step, and not by workbench.schedule.
"""

import functools
import itertools
import json
import math
import re
import shlex
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import timm.optim
import timm.scheduler
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workbench import CACHE, ROOT, data, runs, training
from workbench.recipe import Recipe
from workbench.recipe_checks import losses_with_temperature

PARAMS = sorted((ROOT / "params").glob("*.yaml"))
IMAGENET = 1_281_167  # images in the training list of ImageNet-1k

each = pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)


def header(path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def field(path, name: str) -> str:
    """What the header says after `# Name:`, continued lines included; empty without the field."""
    text = "\n".join(line.removeprefix("#") for line in header(path))
    found = re.search(rf"^ {name}:(.*(?:\n {{10}}.*)*)", text, re.M)
    return found.group(1).strip() if found else ""


def sentence(path, name: str) -> str:
    """A field of the header on one line."""
    return " ".join(field(path, name).split())


def written(path) -> dict[str, Any]:
    """The options of a file, as any reader of YAML sees them."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def params(name: str):
    return ROOT / "params" / f"{name}.yaml"


def read(stem: str, **overrides) -> Recipe:
    return Recipe.from_yaml(params(stem), **overrides)


ON_IMAGENET = [path for path in PARAMS if "data_dir /data/imagenet" in field(path, "Run")]
PUBLISHED = [path for path in PARAMS if "data_dir /data/" in field(path, "Run")]
on_imagenet = pytest.mark.parametrize("path", ON_IMAGENET, ids=lambda path: path.stem)
published = pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
# images of the training list, of the test, classes
SETS = {
    "imagenet": (IMAGENET, 50_000, 1000),
    "cars": (8144, 8041, 196),
    "flowers": (2040, 6149, 102),
    "pets": (3680, 3669, 37),
}


def data_set(path) -> tuple[int, int, int]:
    """The set that a run line names, as SETS has it."""
    return SETS[re.search(r"data_dir /data/(\w+)", field(path, "Run"))[1]]


# ---- the header and the form


@each
def test_a_header_names_its_file_source_run_and_expectation(path):
    first, *lines = header(path)
    assert re.match(rf"# {re.escape(path.name)}: \S", first)
    found = [re.match(r"# ([A-Z][\w-]+): +\S", line) for line in lines]
    assert all(m or re.match(r"# {10}\S", line) for m, line in zip(found, lines, strict=True))
    keys = [m.group(1) for m in found if m]
    assert keys[:3] == ["Source", "Run", "Expect"]
    assert keys[3:] == [key for key in ("GPU-hours", "Note") if key in keys[3:]]
    assert all(field(path, key) for key in keys)
    assert "not measured" in field(path, "Expect") or "seed" in field(path, "Expect")


@each
def test_every_knob_exists_and_the_recipe_is_valid(path):
    assert set(written(path)) <= set(Recipe.model_fields)
    recipe = Recipe.from_yaml(path)
    for key, value in written(path).items():
        assert getattr(recipe, key) in (value, [value]), key  # a lone text is a list of one


@each
def test_other_readers_of_yaml_see_the_same_values(path):
    """papermill -f uses PyYAML as it is: a number it reads as text is no number there."""
    recipe = Recipe.from_yaml(path)
    assert Recipe.from_namespace(written(path)) == recipe
    for key, value in written(path).items():
        if isinstance(getattr(recipe, key), float | int):
            assert isinstance(value, float | int), key


@each
def test_a_recipe_is_named_after_its_file(path):
    assert Recipe.from_yaml(path).name == path.stem


@each
def test_a_run_line_is_a_command_of_this_repository(path):
    line = field(path, "Run").splitlines()[0]
    if line.startswith("make "):
        assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)
        assert f"params/{path.name}" in (ROOT / "Makefile").read_text()
        return
    words = shlex.split(line)
    assert words[0] == "papermill" and (ROOT / words[1]).exists()
    assert words[words.index("-f") + 1] == f"params/{path.name}"
    for flag, option in zip(words, words[1:], strict=False):
        assert flag != "-p" or option in Recipe.model_fields


@on_imagenet
def test_a_long_recipe_says_how_to_run_it_on_several_gpus(path):
    line = field(path, "Run").splitlines()[1].strip()
    command = f"-m workbench train params/{path.name} -p data_dir=/data/imagenet"
    assert line == f"or on 8 GPUs: torchrun --nproc-per-node 8 {command}"


@each
def test_data_dir_belongs_to_the_machine_and_not_into_a_recipe(path):
    assert not {"data_dir", "runs_dir", "device", "workers", "seed"} & set(written(path))


def switches(path) -> dict[str, str]:
    """The `-p option value` of a note."""
    return dict(re.findall(r"-p (\w+) ([\w.]*\w)", field(path, "Note")))


@each
def test_the_switches_of_a_note_give_another_recipe(path):
    recipe, other = Recipe.from_yaml(path), Recipe.from_yaml(path, **switches(path))
    for option in switches(path):
        assert getattr(recipe, option) != getattr(other, option) or option.startswith("randaug_")
    # another recipe needs another run folder; one that only flips or smooths says so itself
    if {"randaug_n", "brightness"} & set(switches(path)):
        assert other.name != recipe.name


# ---- sizes and costs

# img/s of a training step, channels last, mixed precision, one RTX 3090: timm,
# results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv
TIMM_SPEED = {
    "resnet18": 3481.78,
    "resnet34": 2036.51,
    "resnet50": 1218.01,
    "resnet50d": 1078.0,
    "mobilenetv2_050": 4051.14,
    "mobilenetv2_100": 2313.1,
    "mobilenetv3_small_100": 8035.08,
    "mobilenetv3_large_100": 2732.43,
    "regnetx_002": 4105.04,
    "regnetx_004": 1780.61,
    "regnety_002": 3777.81,
    "regnety_004": 2085.76,
    "convnext_tiny": 819.24,
    "convnext_small": 487.15,
    "swin_tiny_patch4_window7_224": 648.69,
    "swin_small_patch4_window7_224": 400.37,
    "swin_base_patch4_window7_224": 281.0,
    "vit_base_patch16_224": 392.99,
    # teachers; 152d was measured at 256 pixels
    "resnet152": 501.44,
    "resnet152d": 357.54 * (256 / 224) ** 2,
}


@functools.cache
def size(
    model: str, deep_stem: bool, avg_down: bool, pixels: int, classes: int
) -> tuple[int, float]:
    """Parameters and multiply-adds of a model, which is never given memory."""
    recipe = Recipe.model_construct(
        model=model, deep_stem=deep_stem, avg_down=avg_down, image_size=pixels
    )
    with torch.device("meta"), torch.no_grad():
        network = training.create_model(recipe, classes).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, pixels, pixels))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 2


@published
def test_the_model_can_be_built_and_has_the_size_the_header_says(path):
    recipe, (*_, classes) = Recipe.from_yaml(path), data_set(path)
    how = recipe.deep_stem, recipe.avg_down, recipe.image_size
    parameters, macs = size(recipe.model, *how, classes)
    assert recipe.num_classes in (None, classes)
    said = f"{parameters / 1e6:.3f} M parameters, {macs / 1e9:.2f} GMAC"
    assert said in sentence(path, "Source")


@published
def test_the_gpu_hours_are_the_estimate_they_say(path):
    recipe, said = Recipe.from_yaml(path), sentence(path, "GPU-hours")
    ratio = TIMM_SPEED["resnet50d" if recipe.deep_stem else recipe.model] / TIMM_SPEED["resnet50"]
    smaller = (224 / recipe.image_size) ** 2
    seconds = 1 / (2500 * ratio * smaller)
    if recipe.teacher:  # its forward at 224 pixels is a third of a training step
        theirs = TIMM_SPEED[recipe.teacher[0].partition(".")[0]] / TIMM_SPEED["resnet50"]
        seconds += 1 / (3 * 2500 * theirs)
        assert f"a third of the teacher's step there for its forward, times {theirs:.2f}" in said
        alone = data_set(path)[0] * recipe.epochs / (2500 * ratio * smaller) / 3600
        assert f"the student alone too, about {float(f'{alone:.2g}'):g} more" in said
    hours = data_set(path)[0] * recipe.epochs * seconds / 3600
    assert said.startswith(f"about {float(f'{hours:.2g}'):g} on one A100, estimated: 2,500 img/s")
    assert (f"times {ratio:.2f}, this model's ratio" in said) == (ratio != 1)
    assert (f"times (224 / {recipe.image_size})^2" in said) == (smaller != 1)
    assert said.endswith("not measured here")


@published
def test_a_downstream_recipe_says_what_its_lists_must_hold(path):
    train, test, classes = data_set(path)
    recipe = Recipe.from_yaml(path)
    assert (train != IMAGENET) == bool(recipe.train_list)
    if train != IMAGENET:
        assert (recipe.train_list, recipe.val_list) == (["meta/train.txt"], ["meta/val.txt"])
        entry = json.loads(re.search(r"\{.*\}", field(path, "Run"))[0])
        assert entry.keys() == {"filename", "label"} and type(entry["label"]) is int
        assert f"the label from 0 to {classes - 1}," in field(path, "Run")
        note = sentence(path, "Note")
        assert f"{train:,}" in note and f"{test:,}" in note
        assert "count from 1, a list's" in note and "from 0" in note


@each
def test_a_run_that_a_recipe_needs_is_one_of_these(path):
    """What it starts or learns from, and its header says so."""
    recipe = Recipe.from_yaml(path)
    needed = [name for name in (recipe.weights, *recipe.teacher) if name.startswith("runs/")]
    for name in needed:
        stem = re.fullmatch(r"runs/(\w+)-seed0", name)[1]
        assert params(stem) in PARAMS and f"{stem}.yaml" in "\n".join(header(path))
        assert read(stem).model == recipe.model or name in recipe.teacher
    assert all(timm.is_model_pretrained(name) for name in set(recipe.teacher) - set(needed))


# ---- United Perception's tables: configs/cls and benchmark/classification_benchmark.md


class Row(NamedTuple):
    """One row; warm-up and curve in UP's terms, the rest in the names of our options."""

    config: str
    top1: float | None  # published
    batch: int  # per GPU x GPUs
    epochs: int
    lr: float
    weight_decay: float
    warmup: tuple[int, float]  # iterations, share of lr it starts from
    curve: tuple
    options: dict[str, Any]
    meant: dict[str, Any] = {}  # what stands in the params file in the place of the above
    apart: float = 0.0  # as a share of lr, how far ours is at most from the row as it is written
    images: int = IMAGENET  # in the training list

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(self.images / self.batch)


MULTISTEP = ("multistep", (30, 60, 90))


def cosine(t_max: int, low: float, start: int) -> tuple:
    """Per iteration over t_max epochs; `start` is kwargs.warmup_iter, iterations."""
    return ("cosine", t_max, low, start)


def iterations(t_max: int, low: float, start: int) -> tuple:
    """The same with t_max in iterations, as iter_base should have made it."""
    return ("iterations", t_max, low, start)


def by_epoch(t_max: int, low: float, start: int) -> tuple:
    """Once an epoch; `start` is warm_epoch, and the divisor is t_max all the same."""
    return ("by_epoch", t_max, low, start)


SGD = {"optimizer": "sgd", "momentum": 0.9, "nesterov": True}
LAMB = {"optimizer": "lamb", "clip_grad_norm": 1.0, "trust_clip": False, "always_adapt": False}
ADAMW = {"optimizer": "adamw"}
ALL, SPARE = {"decay_norm_and_bias": True}, {"decay_norm_and_bias": False}
SMOOTH = {"loss": "ce", "label_smoothing": 0.1}
BIAS = {"loss": "bce", "bce_sum": True, "bce_shift": True, "label_smoothing": 0.0}
CROP = {"crop_scale": [0.08, 1.0], "hflip": 0.5, "interpolation": "bilinear"}
T_STD = {**CROP, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
JITTER = {**CROP, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.0}


def randaug(m: float) -> dict[str, Any]:
    drawn = {"randaug_n": 2, "randaug_m": m, "randaug_std": 0.5, "randaug_increasing": True}
    return {**CROP, **drawn, "randaug_variant": "up"}


AUTO = {**CROP, "autoaugment": True, "hflip": 0.0}
ERASE = {"erase_prob": 0.25, "erase_mode": "pixel", "erase_count": 1}
MIXUP = {"mixup_alpha": 0.2}
STRIKES_MIX = {"mixup_alpha": 0.1, "cutmix_alpha": 1.0, "switch_prob": 0.5}
MIX = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "switch_prob": 0.5}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}

PLAIN = {**SGD, **ALL, **SMOOTH, **T_STD}
TRICKS = {**PLAIN, **MIXUP, "ema_decay": 0.9999}
STRIKES = {**LAMB, **ALL, **BIAS, **JITTER, **STRIKES_MIX, "ema_decay": 0.9999}
MOBILE = {**SGD, **SPARE, **SMOOTH, **T_STD}
CONVNEXT = {**ADAMW, **ALL, **SMOOTH, **randaug(9.0), **ERASE, **MIX, "ema_decay": 0.9999}
SWIN = {**ADAMW, **SPARE, **SMOOTH, **AUTO, **ERASE, **MIX}
SWIN |= {"interpolation": "bicubic", "clip_grad_norm": 5.0}
VIT = {**ADAMW, **ALL, **SMOOTH, **AUTO, **MIX, **HALF}

TAUGHT = {"model": "resnet18", "weights": "runs/resnet18_100e-seed0", "kd_loss": ["up_kl"]}


def downstream(name: str) -> dict[str, Any]:
    lists = {"train_list": ["meta/train.txt"], "val_list": ["meta/val.txt"]}
    return {"model": "resnet50", "num_classes": SETS[name][2], **lists}


# What is meant, for whole families: warm-ups in whole epochs, cosines that fall, no jump.
TWO = {"warmup": (2504, 0.25)}
V2 = {**TWO, "curve": cosine(250, 0.0, 2504)}
V3 = {**TWO, "curve": cosine(350, 0.0, 2504)}
REGNET = {"warmup": (6260, 0.25), "curve": cosine(100, 0.0, 6260)}
NO_JUMP = {"curve": cosine(300, 1e-6, 6260)}
SIX = {"warmup": (6260, 0.00015974), "curve": cosine(200, 1e-6, 6260), "batch": 1024}
TWENTY = {"warmup": (25040, 1e-4)}

# config, top-1, batch, epochs, lr, weight decay, warm-up, curve, the rest
UP = {
    **{
        f"resnet{n}_100e": Row(
            f"resnet/res{n}", top1, 64 * 16, 100, 0.4, 1e-4, (2500, 0.25), MULTISTEP,
            {"model": f"resnet{n}", **PLAIN}, TWO, 1.2e-3,
        )
        for n, top1 in ((18, 70.32), (34, 74.14), (50, 76.76))
    },
    **{
        f"resnet{n}_bag_of_tricks_200e": Row(
            f"resnet/res{n}_200e_bag_of_tricks", top1, 64 * 32, 200, 0.8, 5e-5, (3130, 0.25),
            cosine(200, 0.0, 3130), {"model": f"resnet{n}", **TRICKS},
        )
        for n, top1 in ((18, 70.95), (50, 78.21))
    },
    # the row's own warm-up of 62,560 steps is another curve altogether
    "resnet50d_bag_of_tricks_200e": Row(
        "resnet/resnet50D_bag_of_tricks", 78.9, 64 * 32, 200, 0.4, 1e-4, (62560, 0.00015974),
        cosine(200, 1e-6, 0),
        {"model": "resnet50", "deep_stem": True, "avg_down": True, **PLAIN, **MIXUP}, SIX, 0.9,
    ),
    **{
        f"resnet{n}_strikes_{epochs}e": Row(
            f"resnet/res{n}_strikes_{epochs}e_bce", top1, 64 * 32, epochs, lr, 0.02, (3130, 0.02),
            cosine(epochs, 0.0, 3130), {"model": f"resnet{n}", **STRIKES},
        )
        for n, epochs, lr, top1 in (
            (18, 100, 0.008, None), (18, 300, 0.005, 72.78), (50, 100, 0.008, None)
        )
    },
    "resnet50_strikes_300e": Row(
        "resnet/res50_strikes_300e_bce", 79.16, 64 * 32, 300, 0.005, 0.02, (3130, 0.0002),
        by_epoch(300, 1e-6, 5),
        {"model": "resnet50", "drop_path": 0.05, **LAMB, **ALL, **BIAS, **randaug(7.0),
         **STRIKES_MIX},
    ),
    **{
        f"mobilenetv2_{timm_name}_250e": Row(
            f"mobilenetv2/mbv2_{width}", top1, 1024, 250, 0.4, 4e-5, (2500, 0.25),
            iterations(312_500, 0.0, 2500),
            {"model": f"mobilenetv2_{timm_name}", **MOBILE, "ema_decay": 0.999}, V2, 1.5e-3,
        )
        for timm_name, width, top1 in (("050", "0.5", 65.36), ("100", "1.0", 73.35))
    },
    **{
        f"mobilenetv3_{kind}_350e": Row(
            f"mobilenetv3/mbv3_{kind}_1.0", top1, 1024, 350, 0.4, 3e-5, (2500, 0.25),
            iterations(437_500, 0.0, 2500),
            {"model": f"mobilenetv3_{kind}_100", "dropout": 0.2, **MOBILE, "ema_decay": 0.9999},
            V3, 1.5e-3,
        )
        for kind, top1 in (("small", 67.97), ("large", 75.17))
    },
    **{
        f"regnet{kind}_00{n}_100e": Row(
            f"regnet/reg_{kind}{n}00", top1, 1024, 100, 0.8, 5e-5, (6250, 0.25),
            iterations(125_000, 0.0, 0), {"model": f"regnet{kind}_00{n}", **PLAIN}, REGNET, 0.048,
        )
        for kind, n, top1 in (("x", 2, 68.23), ("x", 4, 71.92), ("y", 2, 69.96), ("y", 4, 73.41))
    },
    **{
        f"convnext_{kind}_300e": Row(
            f"convnext/convnext_{kind[0]}", top1, 4096, 300, 0.004, 0.05, (6260, 1.597e-4),
            cosine(300, 1e-6, 0),
            {"model": f"convnext_{kind}", "drop_path": drop_path, **CONVNEXT}, NO_JUMP, 0.063,
        )
        for kind, drop_path, top1 in (("tiny", 0.1, 81.56), ("small", 0.4, 82.85))
    },
    **{
        f"swin_{kind}_300e": Row(
            f"swin/swin_transformer_{kind}", top1, 1024, 300, 0.001, 0.05, (25020, 1e-4),
            by_epoch(300, 1e-5, 20),
            {"model": f"swin_{kind}_patch4_window7_224", "drop_path": drop_path, **SWIN},
            TWENTY, 8e-4,
        )
        for kind, drop_path, top1 in (
            ("tiny", 0.2, 81.17), ("small", 0.3, 83.18), ("base", 0.5, 83.42)
        )
    },
    "vit_base_300e": Row(
        "vision_transformer/vit_b16_224", None, 1024, 300, 0.00075, 0.05, (3760, 1.33e-3),
        by_epoch(300, 1e-6, 3), {"model": "vit_base_patch16_224", "drop_path": 0.1, **VIT},
        {"warmup": (3756, 1.33e-3)}, 1.1e-3,
    ),
    "resnet18_distillation_100e": Row(
        "distiller/cls/res18_kd", 72.83, 64 * 16, 100, 0.4, 1e-4, (2500, 0.25), MULTISTEP,
        {**PLAIN, **TAUGHT, "teacher": ["resnet152.tv_in1k"]}, TWO, 1.2e-3,
    ),
    "resnet18_distillation_bag_of_tricks_180e": Row(
        "distiller/cls/res18_kd_bag_of_tricks", 73.03, 64 * 32, 180, 0.4, 0.0, (0, 0.0),
        cosine(180, 0.0, 0),
        {**SGD, **SMOOTH, **CROP, **MIXUP, **TAUGHT, "teacher": ["resnet152d.ra2_in1k"],
         "teacher_image_size": [224]},
    ),
    **{
        f"resnet50_{name}_150e": Row(
            f"resnet/downstream/res50_{name.removesuffix('s')}", top1, 64, 150, 0.01, 5e-4,
            (0, 0.0), ("multistep", (50, 100)),
            {**PLAIN, **downstream(name), "weights": "runs/resnet50_100e-seed0"},
            images=SETS[name][0],
        )
        for name, top1 in (("cars", 92.06), ("flowers", 96.86), ("pets", None))
    },
    **{
        f"resnet50_{name}_strikes_300e": Row(
            f"resnet/downstream/res50_{config}_strikes", top1, 64, 300, 0.01, 5e-4, (0, 0.0),
            cosine(300, 0.0, 0),
            {**SGD, **ALL, **BIAS, **randaug(7.0), **STRIKES_MIX, "mix_per_sample": True,
             **downstream(name), "weights": "runs/resnet50_strikes_300e-seed0"},
            images=SETS[name][0],
        )
        for name, config, top1 in (
            ("cars", "car", 93.52), ("flowers", "flower", 97.26), ("pets", "car", None)
        )
    },
}  # fmt: skip
rows = pytest.mark.parametrize("name, row", UP.items(), ids=UP)

E_STD = {"dataset": "files", "image_size": 224, "val_resize": 256, "val_image_size": None}


def test_the_files_are_the_rows_and_ours():
    small = {f"{d}_{r}" for d in ("digits", "cifar10") for r in ("baseline", *SMALL)}
    small |= {"tiny_imagenet_baseline", *BESIDE}
    assert {path.stem for path in PARAMS} == {*UP, *RSB, DIST, *small}
    assert {path.stem for path in PUBLISHED} == {*UP, *RSB, DIST}
    large = {name for name, row in UP.items() if row.images == IMAGENET}
    assert {path.stem for path in ON_IMAGENET} == {*large, *RSB, DIST}


def up_rate(t: int, row: Row) -> float:
    """The learning rate at iteration t by UP's lr_helper, for lr used as it stands."""
    epoch, (warm, ratio), (kind, *numbers) = row.steps, row.warmup, row.curve
    if t < warm:
        return row.lr * ratio + (row.lr - row.lr * ratio) * t / (warm - 1)
    if kind == "multistep":
        return row.lr * 0.1 ** len([m for m in numbers[0] if m * epoch <= t])
    t_max, low, start = numbers
    if kind == "cosine":
        angle = (t - start) / (t_max * epoch - start)
    elif kind == "iterations":
        angle = (t - start) / (t_max - start)
    else:
        angle = (t // epoch - start) / t_max
    return low + (row.lr - low) * (1 + math.cos(math.pi * angle)) / 2


@rows
def test_a_recipe_holds_every_value_of_its_row(name, row):
    row = row._replace(**row.meant)
    kind, *numbers = row.curve
    shape = {"schedule": "cosine", "lr_per_epoch": kind == "by_epoch"}
    if kind == "multistep":
        shape = {"schedule": "multistep", "milestones": list(numbers[0]), "gamma": 0.1}
    else:
        shape["lr_min"] = numbers[1]
        shape["cosine_epochs"] = numbers[0] if kind == "by_epoch" else None
    wanted = {
        **Recipe().model_dump(),
        **E_STD,
        **row.options,
        **shape,
        "epochs": row.epochs,
        "batch_size": row.batch,
        "lr": row.lr,
        "weight_decay": row.weight_decay,
        "warmup_epochs": row.warmup[0] / row.steps,
        "warmup_start_factor": row.warmup[1],
    }
    assert read(name).model_dump() == {**wanted, "name": name}


@rows
def test_a_recipe_trains_at_its_rows_rates(name, row):
    recipe, meant = read(name), row._replace(**row.meant)
    steps = data.steps_per_epoch(row.images, recipe.batch_size, recipe.drop_last)
    assert steps == meant.steps
    rate, last, warm = training.lr_schedule(recipe, steps), recipe.epochs * steps, meant.warmup[0]
    points = [0, 1, warm // 2, max(0, warm - 1), warm, warm + steps // 2]
    points += [last * k // 8 + steps // 3 for k in range(1, 8)] + [last - 1]
    for step in points:
        assert rate(step) == pytest.approx(up_rate(step, meant), rel=1e-9), step
    # and as far from the row as it is written as the table says
    gap = lambda t: abs(rate(t) - up_rate(t, row._replace(batch=meant.batch))) / recipe.lr
    ends = [max(0, w - 1) for w in (warm + 1, warm, row.warmup[0])]
    apart = max(map(gap, [*range(0, last, 613), *ends]))
    assert 0.9 * row.apart <= apart <= row.apart + 1e-12


# Values that UP's own scheduler gave when it was run.
UP_RAN = [
    ("resnet50_100e", {0: 0.1, 37_559: 0.4, 37_560: 0.04, 75_119: 0.04, 75_120: 0.004}),
    ("resnet50_100e", {2503: 0.4, 2504: 0.4, 125_199: 0.0004}),
    ("resnet50_bag_of_tricks_200e", {0: 0.2, 3129: 0.8, 3130: 0.8, 125_199: 1.3e-10}),
    ("resnet50_strikes_300e", {0: 1e-6, 3129: 0.005, 187_799: 5.9e-6}),
]


@pytest.mark.parametrize("name, values", UP_RAN)
def test_the_rates_are_those_up_was_seen_to_use(name, values):
    recipe = read(name)
    rate = training.lr_schedule(recipe, data.steps_per_epoch(IMAGENET, recipe.batch_size))
    for step, wanted in values.items():
        assert f"{rate(step):.2g}" == f"{wanted:.2g}", step


@pytest.mark.parametrize("name, row", UP.items(), ids=UP)
def test_a_recipe_names_its_config_and_its_published_top1(name, row):
    said = field(params(name), "Expect")
    folder = "configs" if "/cls/" in row.config else "configs/cls"
    assert f"{folder}/{row.config}" in field(params(name), "Source")
    expected = "no top-1 published" if row.top1 is None else f"top-1 {row.top1} as published"
    assert said.startswith(expected) and said.endswith("not measured here")


def test_where_a_recipe_leaves_its_row_it_says_so():
    """More than a warm-up rounded to whole epochs, which a comment beside the option says."""
    for name, row in UP.items():
        if 2e-3 < row.apart < 0.5:
            said = f"lr is at most {100 * row.apart:.1f} % of its peak higher"
            assert said in sentence(params(name), "Note"), name
        if row.meant.get("warmup", row.warmup)[0] != row.warmup[0]:
            text = params(name).read_text(encoding="utf-8")
            assert f"{row.warmup[0]:,}" in text, name


@rows
def test_how_often_a_source_validates_stands_in_the_note(name, row):
    """UP's files say test_freq 5, Swin-T's 2; those in iterations are tested at the end alone."""
    epochs = ("every fifth (eval_every 5)", "every second (eval_every 2)")[name == "swin_tiny_300e"]
    theirs = "the last alone" if row.curve[0] == "iterations" else epochs
    assert read(name).eval_every == 1
    said = f"alidation comes after every epoch, the source's after {theirs}"
    assert said in sentence(params(name), "Note")


def test_what_is_left_out_is_left_out_for_its_reason():
    assert not timm.is_model("mobilenetv2_200") and not timm.list_models("*cswin*")
    assert "2.0 (77.56), is left out" in sentence(params("mobilenetv2_100_250e"), "Note")
    assert "CSWin, of which timm has no model" in sentence(params("swin_base_300e"), "Note")


def test_the_plain_recipes_differ_in_the_model_alone():
    recipes = [read(f"resnet{n}_100e").non_default() for n in (18, 34, 50)]
    for recipe in recipes:
        del recipe["model"], recipe["name"]
    assert recipes[0] == recipes[1] == recipes[2]


@pytest.mark.parametrize("name", [n for n in UP if "_strikes_" in n and UP[n].images == IMAGENET])
def test_the_note_of_strikes_gives_the_other_augmentation(name):
    """Jitter where the file has RandAugment-Increasing and the other way round, nothing else."""
    note, jitter = switches(params(name)), name != "resnet50_strikes_300e"
    other = read(name, **note).model_dump()
    wanted = read(name).model_dump() | (randaug(7.0) if jitter else {"randaug_n": 0})
    wanted |= {
        option: 0.0 if jitter else 0.4 for option in ("brightness", "contrast", "saturation")
    }
    wanted["name"] = f"{name}_{'randaug' if jitter else 'jitter'}"
    assert other == wanted
    assert "documentation counts RandAugment-Increasing" in sentence(params(name), "Note")
    if UP[name].top1:
        assert f"published {UP[name].top1}" in sentence(params(name), "Note")


def test_a_recipe_means_torchvisions_transform():
    recipe = read("resnet50_100e")
    train, test = training.train_transform(recipe), training.eval_transform(recipe)
    assert (train.size, train.crop_scale, train.hflip) == (224, (0.08, 1.0), 0.5)
    jitter = (train.brightness, train.contrast, train.saturation, train.hue)
    assert jitter == (0.2, 0.2, 0.2, 0.1)
    assert (test.size, test.resize, test.interpolation) == (224, 256, "bilinear")


# ---- ResNet strikes back, arXiv 2110.00476, table 2, with what timm does where it is silent

# top-1, epochs, training pixels, lr, weight decay, smoothing, repeats, drop path, mixup, m, apart
RSB = {
    "resnet50_a1_600e": (80.4, 600, 224, 5e-3, 0.01, 0.1, 3, 0.05, 0.2, 7.0, 0.008),
    "resnet50_a2_300e": (79.8, 300, 224, 5e-3, 0.02, 0.0, 3, 0.05, 0.1, 7.0, 0.016),
    "resnet50_a3_100e": (78.1, 100, 160, 8e-3, 0.02, 0.0, 1, 0.0, 0.1, 6.0, 0.047),
}
rsb = pytest.mark.parametrize("name, row", RSB.items(), ids=RSB)


@rsb
def test_a_procedure_holds_every_value_of_the_paper(name, row):
    _, epochs, pixels, lr, decay, smoothing, repeats, drop_path, mixup, m, _ = row
    wanted = {
        **Recipe().model_dump(),
        "dataset": "files",
        "image_size": pixels,
        "val_image_size": None if pixels == 224 else 224,
        "val_resize": math.floor(224 / 0.95),  # as timm rounds
        "interpolation": "bicubic",
        "model": "resnet50",
        "drop_path": drop_path,
        "epochs": epochs,
        "batch_size": 2048,
        "drop_last": True,
        "repeated_aug": repeats,
        **LAMB,
        **SPARE,
        "lr": lr,
        "weight_decay": decay,
        "schedule": "cosine",
        "lr_min": 1e-6,
        "lr_per_epoch": True,
        "warmup_epochs": 5.0,
        "warmup_start_factor": pytest.approx(1e-4 / lr),
        "loss": "bce",
        "bce_threshold": 0.2,
        "bce_sum": False,
        "bce_shift": False,
        "label_smoothing": smoothing,
        "crop_scale": [0.08, 1.0],
        "hflip": 0.5,
        **{**randaug(m), "randaug_variant": "timm", "interpolation": "bicubic"},
        "mixup_alpha": mixup,
        "cutmix_alpha": 1.0,
        "switch_prob": 0.5,
    }
    assert read(name).model_dump() == {**wanted, "name": name}


def timm_rates(epochs: int, lr: float, prefix: bool) -> list[float]:
    """timm's own cosine, per epoch, climbing from 1e-4 over five; `prefix` counts from there."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = timm.scheduler.CosineLRScheduler(
            optimizer,
            t_initial=epochs - 5 if prefix else epochs,
            lr_min=1e-6,
            warmup_t=5,
            warmup_lr_init=1e-4,
            warmup_prefix=prefix,
            t_in_epochs=True,
        )
    return [scheduler._get_lr(epoch)[0] for epoch in range(epochs)]


@rsb
def test_a_procedure_trains_at_timms_rates(name, row):
    _, epochs, _, lr, *_, apart = row
    steps = data.steps_per_epoch(IMAGENET, 2048, drop_last=True)
    assert steps == 625 and steps == math.floor(IMAGENET / read(name).batch_size)
    rate = training.lr_schedule(read(name), steps)
    # the climb in steps, from 1e-4 to lr in the last step of epoch 5
    for step in (0, 1, 1000, 2000, 3124):
        assert rate(step) == pytest.approx(1e-4 + (lr - 1e-4) * step / 3124, rel=1e-9)
    # then timm's cosine counted from the end of the climb, one rate for all steps of an epoch
    exact, theirs = timm_rates(epochs, lr, prefix=True), timm_rates(epochs, lr, prefix=False)
    for epoch in range(5, epochs):
        for step in (0, 300, 624):
            assert rate(epoch * steps + step) == pytest.approx(exact[epoch], rel=1e-9)
    # which is as near to timm's count from epoch 0 as the note says
    gaps = [abs(rate(e * steps) - theirs[e]) / lr for e in range(5, epochs)]
    assert apart * 0.9 < max(gaps) <= apart
    assert f"which is {100 * max(gaps):.1f} % of lr apart at most" in sentence(params(name), "Note")


@rsb
def test_a_procedure_expects_the_papers_top1(name, row):
    said = field(params(name), "Expect")
    assert said.startswith(f"top-1 {row[0]} as published") and said.endswith("not measured here")
    assert "arXiv 2110.00476, table 2" in field(params(name), "Source")


# ---- DIST, arXiv 2205.10536, and the strategy dist_b2.yaml of hunto/image_classification_sota

DIST = "resnet18_dist_450e"
B2_STEPS = 160_146 // 96  # of an epoch: one GPU of eight, the last batch left out


def b2_rate(t: int) -> float:
    """The source's lr: constant in each of three epochs of climb, then 0.97 every 2.4 epochs."""
    if t <= 3 * B2_STEPS:
        return 1e-6 + (0.048 - 1e-6) * (t // B2_STEPS) / 3
    return 0.048 * 0.97 ** ((t - 3 * B2_STEPS - 1) // (2.4 * B2_STEPS))


def test_dist_holds_every_value_of_its_source():
    wanted = {
        **Recipe().model_dump(),
        **E_STD,
        "model": "resnet18",
        "epochs": 450,
        "batch_size": 96 * 8,
        "drop_last": True,
        **{"optimizer": "sgd", "momentum": 0.9, "nesterov": False},
        "lr": pytest.approx(0.048 / math.sqrt(0.001), rel=1e-4),
        "weight_decay": 1e-5,
        **SPARE,
        **{"schedule": "step", "lr_step_epochs": 1},
        "gamma": pytest.approx(0.97 ** (1 / 2.4), abs=5e-5),
        "warmup_epochs": 3.0,
        "warmup_start_factor": pytest.approx(1e-6 / 0.048, rel=1e-4),
        "ema_decay": 0.9999,
        **SMOOTH,
        **{**randaug(9.0), "randaug_increasing": False, "randaug_variant": "timm"},
        **{**ERASE, "erase_prob": 0.2},
        "teacher": ["resnet50.a1_in1k"],
        **{"kd_loss": ["dist"], "kd_weight": [2.0], "temperature": 1.0, "task_weight": 1.0},
    }
    assert read(DIST).model_dump() == {**wanted, "name": DIST}
    assert sentence(params(DIST), "Expect").startswith("top-1 74.5 as published by the source")
    assert "configs/strategies/distill/dist_b2.yaml" in sentence(params(DIST), "Source")


def test_the_rate_of_dist_is_as_far_from_its_source_as_the_note_says():
    steps = data.steps_per_epoch(IMAGENET, 96 * 8, drop_last=True)
    assert steps == B2_STEPS == 1668
    rate, scale = training.lr_schedule(read(DIST), steps), 0.048 / 1.518
    for epoch in range(3):  # the climb meets the source's where an epoch of it begins
        assert rate(epoch * steps) * scale == pytest.approx(b2_rate(epoch * steps), rel=1e-3)
    lower = [1 - rate(t) * scale / b2_rate(t) for t in range(3 * steps + 1, 450 * steps, 31)]
    said = f"so that lr is {100 * min(lower):.1f} to {100 * max(lower):.1f} % lower"
    assert said in sentence(params(DIST), "Note"), said


def test_the_rmsprop_of_dist_is_the_sgd_that_stands_for_it():
    """timm's RMSpropTF, which the source has, on gradients as small as a ResNet's."""
    noise, recipe = torch.Generator().manual_seed(0), read(DIST)
    ours, theirs = nn.Linear(40, 30, bias=False), nn.Linear(40, 30, bias=False)
    optimizers = (
        training.create_optimizer(recipe, ours),
        timm.optim.RMSpropTF(
            theirs.parameters(), lr=0.048, alpha=0.9, eps=1e-3, momentum=0.9, weight_decay=1e-5
        ),
    )
    for step in range(250):
        if step == 150:  # until then it remembers that its average began with ones
            theirs.load_state_dict(ours.state_dict())
            start = ours.weight.detach().clone()
            for buffers in (optimizers[0].state[ours.weight], optimizers[1].state[theirs.weight]):
                buffers["momentum_buffer"].zero_()
        gradient = 3e-4 * torch.randn(ours.weight.shape, generator=noise)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.weight.grad = gradient.clone()
            optimizer.step()
    gone = [model.weight.detach() - start for model in (ours, theirs)]
    assert (gone[0] - gone[1]).norm() < 1e-3 * gone[1].norm()


# ---- the ladder on small data: what is new, beside the baseline of the same budget

SMALL = {
    "bag_of_tricks": {"mixup_alpha": 0.2},
    "strikes": {
        **LAMB,
        "momentum": 0.9,  # sgd's, unused
        "nesterov": False,
        "weight_decay": 0.02,
        "warmup_start_factor": 0.02,
        **BIAS,
        "randaug_n": 2,
        "randaug_m": 7.0,
        "randaug_std": 0.5,
        "randaug_increasing": True,
        "randaug_variant": "timm",
        **STRIKES_MIX,
    },
}


@pytest.mark.parametrize("rung", SMALL)
@pytest.mark.parametrize("place", ["digits", "cifar10"])
def test_a_small_rung_is_the_baseline_and_what_is_new(place, rung):
    name = f"{place}_{rung}"
    recipe, baseline = read(name), read(f"{place}_baseline")
    wanted = {**baseline.model_dump(), **SMALL[rung], "name": name}
    if place == "cifar10":  # its baseline steps, as the plain recipe of the source
        wanted |= {"schedule": "cosine", "milestones": []}
    if rung == "strikes":
        wanted["lr"] = 0.008  # the source's for 100 epochs
    assert recipe.model_dump() == wanted
    assert recipe.hflip == (0.0 if place == "digits" else 0.5)


# name: the file beside which it stands, and what is new
KL4 = {"kd_loss": ["kl"], "temperature": 4.0}
BESIDE = {
    "digits_teacher": ("digits_baseline", {"model": "resnet10t", "label_smoothing": 0.0}),
    "digits_distillation": (
        "digits_baseline",
        {"epochs": 3, "cache_teacher_logits": True, "teacher": ["runs/digits_teacher-seed0"],
         **KL4},
    ),
    "letters_downstream": (
        "digits_baseline",
        {"dataset": "letters", "weights": "runs/digits_baseline-seed0"}
        | {"epochs": 3, "warmup_epochs": 0.5},
    ),
    "cifar10_teacher": (
        "cifar10_baseline",
        {"model": "resnet18", "image_size": 64, "val_resize": 64, "epochs": 15}
        | {"schedule": "cosine", "milestones": [], "label_smoothing": 0.0},
    ),
    "cifar10_distillation": (
        "cifar10_bag_of_tricks",
        {"mixup_alpha": 0.0, "cache_teacher_logits": True}
        | {"teacher": ["runs/cifar10_teacher-seed0"], **KL4},
    ),
    "cars_downstream": (
        "tiny_imagenet_baseline",
        {"val_resize": 72, "batch_size": 64, "warmup_epochs": 0.0, "warmup_start_factor": 0.0}
        | {"weights": "runs/tiny_imagenet_baseline-seed0", "lr": 0.01},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_a_teacher_a_student_and_a_transfer_are_a_baseline_and_what_is_new(name):
    beside, new = BESIDE[name]
    assert read(name).model_dump() == {**read(beside).model_dump(), **new, "name": name}


# ---- no option is written in vain

# Options that a file may state although they stand at Recipe's default, and another value each, so
# that they too are seen to matter.
STATED = {
    "dataset": "letters",
    "train_root": ["val"],
    "image_size": 48,
    "val_resize": 40,
    "interpolation": "bicubic",
    "model": "resnet18",
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 0.2,
    "momentum": 0.5,
    "decay_norm_and_bias": False,
    "schedule": "constant",
    "gamma": 0.5,
    "hflip": 0.5,
    "randaug_m": 9.0,
    "randaug_std": 2.0,
    "randaug_increasing": False,
    "randaug_variant": "timm",
    "switch_prob": 0.9,
    "erase_mode": "const",
    "kd_loss": ["kl"],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Lists, folders and class names of every kind a recipe may point at."""
    root = tmp_path_factory.mktemp("tree")
    (root / "meta").mkdir()
    (root / "classes.txt").write_text("cat\ndog\n")
    for number, side in enumerate(("train", "val", "test"), 1):
        (root / "meta" / f"{side}.txt").write_text("a/0.png 0\nb/0.png 1\n")
        for label in "ab":
            (root / side / label).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (8, 8)).save(root / side / label / f"{i}.png")
    return root


def images_found(recipe, tree) -> Iterator:
    try:
        found = data.load_dataset(recipe.model_copy(update={"data_dir": str(tree)}))
    except data.DataError as error:
        yield str(error)
    else:
        yield [[*zip(f.path, f.label, strict=True)] for f in (found.train, found.val)]
        yield found.classes


@functools.cache
def photograph() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC)


def training_images(recipe, _) -> Iterator:
    transform = training.train_transform(recipe)
    for i in range(40):
        yield transform(photograph(), np.random.default_rng(i)).tobytes()


def validation_images(recipe, _) -> Iterator:
    yield training.eval_transform(recipe)(photograph()).tobytes()


def batches(recipe, _) -> Iterator:
    transform = training.DeviceTransform(
        recipe.model_copy(update={"image_size": 16}), 10, torch.device("cpu")
    )
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=noise, dtype=torch.uint8)
    labels, places = torch.arange(8), torch.arange(8)
    for step in range(60):
        batch = data.Batch(images, labels, places, places, step, True, 8, [])
        yield [values.tolist() for values in transform(batch)]


def networks(recipe, _) -> Iterator:
    with torch.device("meta"):
        model = training.create_model(recipe, 7)
    yield {name: tuple(value.shape) for name, value in model.state_dict().items()}
    yield repr(model)  # drop path is a module, dropout before a classifier often a number
    yield getattr(model, "drop_rate", None)


def rates(recipe, _) -> Iterator:
    steps = data.steps_per_epoch(IMAGENET, recipe.batch_size, recipe.drop_last)
    last = steps * recipe.epochs
    yield last
    if recipe.schedule == "step" and not recipe.lr_step_epochs:
        yield "never steps"
        return
    rate = training.lr_schedule(recipe, steps)
    for step in [0, steps - 1, steps // 2, last - 1, *range(0, last, last // 97)]:
        yield rate(step)


def updates(recipe, _) -> Iterator:
    noise = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(1 + torch.rand(p.shape, generator=noise))
    optimizer = training.create_optimizer(recipe, model)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=noise)
        optimizer.step()
        yield [p.tolist() for p in model.parameters()]


@functools.cache
def tiny_run(**options) -> list:
    """What only the loop sees, through the loop: nine steps on real digits, large gradients."""
    with tempfile.TemporaryDirectory() as folder:
        return nine_steps(folder, **options)


def nine_steps(folder, **options) -> list:
    small = {
        "train_fraction": 0.055,
        "batch_size": 8,
        "epochs": 1,
        "crop_scale": [0.5, 1.0],
        "lr": 0.01,
    }
    small |= {"loss": "bce", "bce_sum": True, "workers": 0, "precision": "fp32"}
    recipe = Recipe(**{**small, "runs_dir": str(folder), **options})
    run = runs.Run(recipe.folder)
    rows = list(training.fit(recipe, run))
    seen = [row.get("loss") for row in rows] + [rows[-1]["train_loss"]]
    return [*seen, rows[-1].get("ema_val_loss"), "teacher_cache" in run.environment()]


@functools.cache
def other_run() -> str:
    """Stands for every teacher, and for all weights that a recipe starts from."""
    nine_steps(CACHE, name="other", seed=1, loss="ce", bce_sum=False)
    return str(CACHE / "other-seed1")


def loops(recipe, _) -> Iterator:
    names = ["clip_grad_norm", "ema_decay", "repeated_aug", "optimizer"]
    if recipe.teacher:
        names += ["kd_loss", "kd_weight", "cache_teacher_logits"]
        names += ["temperature"] if set(recipe.kd_loss) & {*losses_with_temperature} else []
    options = {name: getattr(recipe, name) for name in names}
    if recipe.weights:
        options["weights"] = other_run()
    if recipe.teacher:  # it sees 24 pixels for 224; without a word it sees its own 32
        options["teacher"] = other_run()
        options["teacher_image_size"] = [size * 3 // 28 for size in recipe.teacher_image_size]
    yield tiny_run(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})


def losses(recipe, _) -> Iterator:
    noise = torch.Generator().manual_seed(0)
    logits, labels = torch.randn((6, 10), generator=noise), torch.arange(6)
    share = torch.tensor([0.05, 0.18, 0.21, 0.4, 0.7, 1.0])[:, None]  # around RSB's threshold
    one_hot = nn.functional.one_hot(torch.stack([labels, labels + 3]), 10).float()
    loss = training.loss_function(recipe)
    yield loss(logits, labels).tolist()
    yield loss(logits, share * one_hot[0] + (1 - share) * one_hot[1]).tolist()


SEEN_IN = {
    images_found: "dataset train_list train_root val_list val_root class_names num_classes",
    training_images: "image_size interpolation crop_scale hflip brightness contrast saturation hue"
    " autoaugment randaug_n randaug_m randaug_std randaug_increasing randaug_variant",
    validation_images: "val_image_size val_resize",
    batches: "mean std mixup_alpha cutmix_alpha switch_prob mix_per_sample erase_prob erase_mode",
    networks: "model deep_stem avg_down drop_path dropout",
    rates: "epochs batch_size drop_last lr schedule milestones lr_step_epochs gamma lr_min"
    " cosine_epochs lr_per_epoch warmup_epochs warmup_start_factor",
    updates: "optimizer momentum nesterov weight_decay decay_norm_and_bias",
    loops: "clip_grad_norm ema_decay repeated_aug weights teacher teacher_image_size kd_loss"
    " kd_weight temperature cache_teacher_logits",
    losses: "loss bce_threshold bce_sum bce_shift label_smoothing",
}
OBSERVER = {option: view for view, options in SEEN_IN.items() for option in options.split()}


def _slow(path) -> tuple:
    """The shipped sets are quick cases; the files of large models take a second or more each."""
    return () if re.match("digits|letters|cifar10", path.stem) else (pytest.mark.slow,)


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=_slow(path)) for path in PARAMS]
)
def test_every_knob_of_a_file_changes_what_is_done(path, tree):
    """Each option alone is put back to its default (or a stated default elsewhere), unchecked."""
    recipe, vain, before = Recipe.from_yaml(path), [], {}
    for option in written(path).keys() - {"name"}:
        default = Recipe.model_fields[option].default
        other = STATED[option] if getattr(recipe, option) == default else default
        if option == "val_resize":  # whose default no crop of photographs allows
            other = recipe.val_resize + 8
        assert other != getattr(recipe, option)
        changed = Recipe.model_construct(**{**recipe.model_dump(), option: other})
        view = OBSERVER[option]
        before.setdefault(view, view(recipe, tree))
        before[view], own = itertools.tee(before[view])  # computed once, and as far as needed
        pairs = zip(own, view(changed, tree), strict=False)
        if all(ours == theirs for ours, theirs in pairs):
            vain.append(option)
    assert not vain


def test_the_decay_of_an_ema_reaches_the_loop_as_it_is():
    """On or off is seen above; here its value is."""
    assert tiny_run(ema_decay=0.9999) != tiny_run(ema_decay=0.99)


def test_no_more_is_excused_than_the_files_need():
    """An option at its default says what is on; the list of those is as short as can be."""
    default = {k: f.default for k, f in Recipe.model_fields.items()}
    recipes = [(Recipe.from_yaml(path), written(path)) for path in PARAMS]
    stated = {k for recipe, keys in recipes for k in keys if getattr(recipe, k) == default[k]}
    assert stated == set(STATED)
    assert {k for _, keys in recipes for k in keys} - {"name"} == set(OBSERVER)
