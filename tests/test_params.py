"""Every params file loads, names its source, and has the values of its source.

The tables have the published figures in the terms of their sources; learning rates are computed
from them by the formulas of the sources, step by step, and not by workbench.schedule.
"""

import functools
import json
import math
import re
import shlex
import warnings
from typing import Any, NamedTuple

import pytest
import timm
import timm.optim
import timm.scheduler
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from workbench import ROOT, data, training
from workbench.recipe import Recipe

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


PUBLISHED = [path for path in PARAMS if "data_dir /data/" in field(path, "Run")]
published = pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
# images of the training list, of the test list, classes
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
def test_a_header_names_file_source_run_and_expected_result(path):
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
def test_a_file_is_valid_named_after_its_file_and_the_same_to_every_reader(path, tmp_path):
    """papermill -f uses PyYAML as it is: a number it reads as text is no number there."""
    recipe, values = Recipe.from_yaml(path), written(path)
    assert recipe.name == path.stem
    assert not {"data_dir", "runs_dir", "device", "workers", "seed"} & set(values)
    assert Recipe.from_namespace(values) == recipe
    for key, value in values.items():
        ours = getattr(recipe, key)
        assert ours in (value, [value]), key  # a lone text is a list of one
        assert isinstance(value, float | int) or not isinstance(ours, float | int), key
    recipe.to_yaml(tmp_path / "recipe.yaml")
    again = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert again == recipe and again.fingerprint == recipe.fingerprint


@each
def test_a_run_line_is_a_command_of_this_repository(path):
    line, *more = field(path, "Run").splitlines()
    if line.startswith("make "):
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{line.split()[1]}:", makefile, re.M)
        assert f"params/{path.name}" in makefile
        return
    words = shlex.split(line)
    assert words[0] == "papermill" and (ROOT / words[1]).exists()
    assert words[words.index("-f") + 1] == f"params/{path.name}"
    for flag, option in zip(words, words[1:], strict=False):
        assert flag != "-p" or option in Recipe.model_fields
    if "data_dir /data/imagenet" in line:
        command = f"-m workbench train params/{path.name} -p data_dir=/data/imagenet"
        assert more[0].strip() == f"or on 8 GPUs: torchrun --nproc-per-node 8 {command}"


def switches(path) -> dict[str, str]:
    """The `-p option value` of a note."""
    return dict(re.findall(r"-p (\w+) ([\w.]*\w)", field(path, "Note")))


@each
def test_the_switches_of_a_note_give_another_recipe(path):
    recipe, other = Recipe.from_yaml(path), Recipe.from_yaml(path, **switches(path))
    for option in switches(path):
        assert getattr(recipe, option) != getattr(other, option) or option.startswith("randaug_")
    # another augmentation needs another run folder
    if {"randaug_n", "brightness"} & set(switches(path)):
        assert other.name != recipe.name


@functools.cache
def size(model: str, deep: bool, avg_down: bool, pixels: int, classes: int) -> tuple[int, float]:
    """Parameters and multiply-adds of a model on the meta device."""
    recipe = Recipe.model_construct(
        model=model, deep_stem=deep, avg_down=avg_down, image_size=pixels
    )
    with torch.device("meta"), torch.no_grad():
        network = training.create_model(recipe, classes).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, pixels, pixels))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 2


@published
def test_the_model_has_the_size_in_the_header(path):
    recipe, (*_, classes) = Recipe.from_yaml(path), data_set(path)
    how = recipe.deep_stem, recipe.avg_down, recipe.image_size
    parameters, macs = size(recipe.model, *how, classes)
    assert recipe.num_classes in (None, classes)
    text = f"{parameters / 1e6:.3f} M parameters, {macs / 1e9:.2f} GMAC"
    assert text in sentence(path, "Source")


@published
def test_a_downstream_recipe_describes_its_lists(path):
    train, test, classes = data_set(path)
    recipe = Recipe.from_yaml(path)
    assert (train != IMAGENET) == bool(recipe.train_list)
    if train != IMAGENET:
        assert (recipe.train_list, recipe.val_list) == (["meta/train.txt"], ["meta/val.txt"])
        entry = json.loads(re.search(r"\{.*\}", field(path, "Run"))[0])
        assert entry.keys() == {"filename", "label"} and type(entry["label"]) is int
        assert f"the label from 0 to {classes - 1}," in field(path, "Run")
        assert f"{train:,}" in sentence(path, "Note") and f"{test:,}" in sentence(path, "Note")


@each
def test_a_run_that_a_recipe_needs_is_one_of_these(path):
    """The weights or teachers it needs, named in the header."""
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
    meant: dict[str, Any] = {}  # what the params file has instead of the above
    apart: float = 0.0  # largest difference of lr between row and params file, as a share of lr
    images: int = IMAGENET  # in the training list

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(self.images / self.batch)


MULTISTEP = ("multistep", (30, 60, 90))
# Cosines: (kind, t_max, low, start). "cosine" changes per iteration over t_max epochs, "iterations"
# the same with t_max in iterations; start is kwargs.warmup_iter. "by_epoch" changes once an epoch,
# start is warm_epoch, and the divisor is t_max all the same.

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
V2 = {**TWO, "curve": ("cosine", 250, 0.0, 2504)}
V3 = {**TWO, "curve": ("cosine", 350, 0.0, 2504)}
REGNET = {"warmup": (6260, 0.25), "curve": ("cosine", 100, 0.0, 6260)}
NO_JUMP = {"curve": ("cosine", 300, 1e-6, 6260)}
SIX = {"warmup": (6260, 0.00015974), "curve": ("cosine", 200, 1e-6, 6260), "batch": 1024}
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
            ("cosine", 200, 0.0, 3130), {"model": f"resnet{n}", **TRICKS},
        )
        for n, top1 in ((18, 70.95), (50, 78.21))
    },
    # the row's own warm-up of 62,560 steps is another curve altogether
    "resnet50d_bag_of_tricks_200e": Row(
        "resnet/resnet50D_bag_of_tricks", 78.9, 64 * 32, 200, 0.4, 1e-4, (62560, 0.00015974),
        ("cosine", 200, 1e-6, 0),
        {"model": "resnet50", "deep_stem": True, "avg_down": True, **PLAIN, **MIXUP}, SIX, 0.9,
    ),
    **{
        f"resnet{n}_strikes_{epochs}e": Row(
            f"resnet/res{n}_strikes_{epochs}e_bce", top1, 64 * 32, epochs, lr, 0.02, (3130, 0.02),
            ("cosine", epochs, 0.0, 3130), {"model": f"resnet{n}", **STRIKES},
        )
        for n, epochs, lr, top1 in (
            (18, 100, 0.008, None), (18, 300, 0.005, 72.78), (50, 100, 0.008, None)
        )
    },
    "resnet50_strikes_300e": Row(
        "resnet/res50_strikes_300e_bce", 79.16, 64 * 32, 300, 0.005, 0.02, (3130, 0.0002),
        ("by_epoch", 300, 1e-6, 5),
        {"model": "resnet50", "drop_path": 0.05, **LAMB, **ALL, **BIAS, **randaug(7.0),
         **STRIKES_MIX},
    ),
    **{
        f"mobilenetv2_{timm_name}_250e": Row(
            f"mobilenetv2/mbv2_{width}", top1, 1024, 250, 0.4, 4e-5, (2500, 0.25),
            ("iterations", 312_500, 0.0, 2500),
            {"model": f"mobilenetv2_{timm_name}", **MOBILE, "ema_decay": 0.999}, V2, 1.5e-3,
        )
        for timm_name, width, top1 in (("050", "0.5", 65.36), ("100", "1.0", 73.35))
    },
    **{
        f"mobilenetv3_{kind}_350e": Row(
            f"mobilenetv3/mbv3_{kind}_1.0", top1, 1024, 350, 0.4, 3e-5, (2500, 0.25),
            ("iterations", 437_500, 0.0, 2500),
            {"model": f"mobilenetv3_{kind}_100", "dropout": 0.2, **MOBILE, "ema_decay": 0.9999},
            V3, 1.5e-3,
        )
        for kind, top1 in (("small", 67.97), ("large", 75.17))
    },
    **{
        f"regnet{kind}_00{n}_100e": Row(
            f"regnet/reg_{kind}{n}00", top1, 1024, 100, 0.8, 5e-5, (6250, 0.25),
            ("iterations", 125_000, 0.0, 0), {"model": f"regnet{kind}_00{n}", **PLAIN}, REGNET,
            0.048,
        )
        for kind, n, top1 in (("x", 2, 68.23), ("x", 4, 71.92), ("y", 2, 69.96), ("y", 4, 73.41))
    },
    **{
        f"convnext_{kind}_300e": Row(
            f"convnext/convnext_{kind[0]}", top1, 4096, 300, 0.004, 0.05, (6260, 1.597e-4),
            ("cosine", 300, 1e-6, 0),
            {"model": f"convnext_{kind}", "drop_path": drop_path, **CONVNEXT}, NO_JUMP, 0.063,
        )
        for kind, drop_path, top1 in (("tiny", 0.1, 81.56), ("small", 0.4, 82.85))
    },
    **{
        f"swin_{kind}_300e": Row(
            f"swin/swin_transformer_{kind}", top1, 1024, 300, 0.001, 0.05, (25020, 1e-4),
            ("by_epoch", 300, 1e-5, 20),
            {"model": f"swin_{kind}_patch4_window7_224", "drop_path": drop_path, **SWIN},
            TWENTY, 8e-4,
        )
        for kind, drop_path, top1 in (
            ("tiny", 0.2, 81.17), ("small", 0.3, 83.18), ("base", 0.5, 83.42)
        )
    },
    "vit_base_300e": Row(
        "vision_transformer/vit_b16_224", None, 1024, 300, 0.00075, 0.05, (3760, 1.33e-3),
        ("by_epoch", 300, 1e-6, 3), {"model": "vit_base_patch16_224", "drop_path": 0.1, **VIT},
        {"warmup": (3756, 1.33e-3)}, 1.1e-3,
    ),
    "resnet18_distillation_100e": Row(
        "distiller/cls/res18_kd", 72.83, 64 * 16, 100, 0.4, 1e-4, (2500, 0.25), MULTISTEP,
        {**PLAIN, **TAUGHT, "teacher": ["resnet152.tv_in1k"]}, TWO, 1.2e-3,
    ),
    "resnet18_distillation_bag_of_tricks_180e": Row(
        "distiller/cls/res18_kd_bag_of_tricks", 73.03, 64 * 32, 180, 0.4, 0.0, (0, 0.0),
        ("cosine", 180, 0.0, 0),
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
            ("cosine", 300, 0.0, 0),
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


def test_every_file_has_a_source_here():
    small = {f"{d}_{r}" for d in ("digits", "cifar10") for r in ("baseline", *SMALL)}
    small |= {"tiny_imagenet_baseline", *BESIDE}
    assert {path.stem for path in PARAMS} == {*UP, *RSB, DIST, *small}
    assert {path.stem for path in PUBLISHED} == {*UP, *RSB, DIST}
    for path in PUBLISHED:
        assert data_set(path)[0] == getattr(UP.get(path.stem), "images", IMAGENET)


def up_rate(t: int, row: Row) -> float:
    """The learning rate at iteration t by UP's lr_helper, without scaling by the batch size."""
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
def test_a_recipe_has_every_value_of_its_row(name, row):
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
    # and the distance from the row without `meant` is `apart`
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
def test_a_recipe_trains_at_rates_that_up_printed(name, values):
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


# ---- ResNet strikes back, arXiv 2110.00476, table 2, with what timm does where it is silent

# top-1, epochs, training pixels, lr, weight decay, smoothing, repeats, drop path, mixup, m
RSB = {
    "resnet50_a1_600e": (80.4, 600, 224, 5e-3, 0.01, 0.1, 3, 0.05, 0.2, 7.0),
    "resnet50_a2_300e": (79.8, 300, 224, 5e-3, 0.02, 0.0, 3, 0.05, 0.1, 7.0),
    "resnet50_a3_100e": (78.1, 100, 160, 8e-3, 0.02, 0.0, 1, 0.0, 0.1, 6.0),
}
rsb = pytest.mark.parametrize("name, row", RSB.items(), ids=RSB)


@rsb
def test_a_procedure_has_every_value_of_the_paper(name, row):
    _, epochs, pixels, lr, decay, smoothing, repeats, drop_path, mixup, m = row
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


def timm_rates(epochs: int, lr: float) -> list[float]:
    """timm's cosine, per epoch, after a warm-up from 1e-4 over five."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = timm.scheduler.CosineLRScheduler(
            optimizer, epochs - 5, lr_min=1e-6, warmup_t=5, warmup_lr_init=1e-4, warmup_prefix=True
        )
    return [scheduler._get_lr(epoch)[0] for epoch in range(epochs)]


@rsb
def test_a_procedure_trains_at_timms_rates(name, row):
    epochs, lr = row[1], row[3]
    steps = data.steps_per_epoch(IMAGENET, 2048, drop_last=True)
    assert steps == 625 and steps == math.floor(IMAGENET / read(name).batch_size)
    rate = training.lr_schedule(read(name), steps)
    # the warm-up in steps, from 1e-4 to lr in the last step of epoch 5
    for step in (0, 1, 1000, 2000, 3124):
        assert rate(step) == pytest.approx(1e-4 + (lr - 1e-4) * step / 3124, rel=1e-9)
    # then timm's cosine from the end of the warm-up, one rate for all steps of an epoch
    exact = timm_rates(epochs, lr)
    for epoch in range(5, epochs):
        for step in (0, 300, 624):
            assert rate(epoch * steps + step) == pytest.approx(exact[epoch], rel=1e-9)


@rsb
def test_a_procedure_expects_the_papers_top1(name, row):
    said = field(params(name), "Expect")
    assert said.startswith(f"top-1 {row[0]} as published") and said.endswith("not measured here")
    assert "arXiv 2110.00476, table 2" in field(params(name), "Source")


# ---- DIST, arXiv 2205.10536, and the strategy dist_b2.yaml of hunto/image_classification_sota

DIST = "resnet18_dist_450e"
B2_STEPS = 160_146 // 96  # of an epoch: one GPU of eight, the last batch left out


def b2_rate(t: int) -> float:
    """The source's lr: constant in each of three warm-up epochs, then 0.97 every 2.4 epochs."""
    if t <= 3 * B2_STEPS:
        return 1e-6 + (0.048 - 1e-6) * (t // B2_STEPS) / 3
    return 0.048 * 0.97 ** ((t - 3 * B2_STEPS - 1) // (2.4 * B2_STEPS))


def test_dist_has_every_value_of_its_source():
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


def test_the_note_gives_the_difference_of_lr_between_dist_and_its_source():
    steps = data.steps_per_epoch(IMAGENET, 96 * 8, drop_last=True)
    assert steps == B2_STEPS == 1668
    rate, scale = training.lr_schedule(read(DIST), steps), 0.048 / 1.518
    for epoch in range(3):  # the warm-ups are equal at the start of each epoch
        assert rate(epoch * steps) * scale == pytest.approx(b2_rate(epoch * steps), rel=1e-3)
    lower = [1 - rate(t) * scale / b2_rate(t) for t in range(3 * steps + 1, 450 * steps, 31)]
    said = f"so that lr is {100 * min(lower):.1f} to {100 * max(lower):.1f} % lower"
    assert said in sentence(params(DIST), "Note"), said


def test_the_rmsprop_of_dist_takes_the_steps_of_this_sgd():
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


# ---- recipes on small data: what differs from the baseline of the same budget

SMALL = {
    "bag_of_tricks": {"mixup_alpha": 0.2},
    "strikes": {
        **LAMB,
        "momentum": 0.9,  # sgd's, unused
        "nesterov": False,
        "weight_decay": 0.02,
        "warmup_start_factor": 0.02,
        **BIAS,
        **{k: v for k, v in randaug(7.0).items() if k not in CROP},
        "randaug_variant": "timm",
        **STRIKES_MIX,
    },
}


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_a_small_recipe_is_the_baseline_with_changes(dataset, kind):
    name = f"{dataset}_{kind}"
    wanted = {**read(f"{dataset}_baseline").model_dump(), **SMALL[kind], "name": name}
    if dataset == "cifar10":  # its baseline has milestones, as the plain recipe of the source
        wanted |= {"schedule": "cosine", "milestones": []}
    if kind == "strikes":
        wanted["lr"] = 0.008  # the source's for 100 epochs
    assert read(name).model_dump() == wanted
    assert read(name).hflip == (0.0 if dataset == "digits" else 0.5)


# name: the recipe it is compared with, and what differs
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
def test_a_teacher_a_student_and_a_transfer_are_a_baseline_with_changes(name):
    beside, new = BESIDE[name]
    assert read(name).model_dump() == {**read(beside).model_dump(), **new, "name": name}
