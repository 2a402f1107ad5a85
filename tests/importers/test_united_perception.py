"""A United Perception file becomes the recipe it names; what it does not do is said in numbers."""

import copy
import math
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

from workbench import ROOT, augmentation, training
from workbench.importers import united_perception
from workbench.importers.united_perception import (
    DEFECT,
    IMAGENET,
    MISSING,
    NOTHING,
    TAKEN,
    UnitedPerceptionError,
)
from workbench.recipe import Recipe

# ---- configurations in the shape of UP's, written for these tests; @slots@ differ between them

TEMPLATE = """
num_classes: &num_classes @classes@
runtime:
  task_names: cls
@runtime@
random_resized_crop: &random_resized_crop
  type: torch_random_resized_crop
  kwargs: {size: 224@crop@}
random_horizontal_flip: &random_horizontal_flip
  type: torch_random_horizontal_flip
pil_color_jitter: &pil_color_jitter
  type: torch_color_jitter
  kwargs: {@jitter@}
random_augmentation: &random_augmentation
  type: torch_random_augmentationIncre
  kwargs: {n: 2, m: @m@, magnitude_std: 0.5}
auto_augmentation: &auto_augmentation
  type: torch_auto_augmentation
  kwargs: {size: 224}
torch_resize: &torch_resize
  type: torch_resize
  kwargs: {size: 256}
torch_center_crop: &torch_center_crop
  type: torch_center_crop
  kwargs: {size: 224}
to_tensor: &to_tensor
  type: to_tensor
normalize: &normalize
  type: normalize
  kwargs: {mean: @mean@, std: @std@}
rand_erase: &rand_erase
  type: torch_randerase
  kwargs: {probability: 0.25}
cutmix_mixup: &cutmix_mixup
  type: torch_cutmix_mixup
  kwargs: {mixup_alpha: 0.1, cutmix_alpha: 1.0, switch_prob: 0.5, num_classes: *num_classes}

dataset:
  train:
    dataset:
      type: cls
      kwargs:
        meta_file: @train@
        image_reader:
          type: fs_pillow
          kwargs: {image_dir: @train_dir@, color_mode: RGB}
        transformer: [@transformer@]
    batch_sampler:
      type: base
      kwargs:
        sampler: {type: dist, kwargs: {}}
        batch_size: @batch@
    dataloader:
      type: cls_base
      kwargs:
        num_workers: 4
        pin_memory: true
        @batch_fn@
  test:
    dataset:
      type: cls
      kwargs:
        meta_file: @val@
        image_reader:
          type: fs_pillow
          kwargs: {image_dir: @val_dir@, color_mode: RGB}
        transformer: [*torch_resize, *torch_center_crop, *to_tensor, *normalize]
        evaluator: {type: imagenet, kwargs: {topk: [1, 5]}}
    batch_sampler: {type: base, kwargs: {sampler: {type: dist, kwargs: {}}, batch_size: 64}}

trainer:
  @length@
  test_freq: 5
  save_freq: 5
  only_save_latest: true
  optimizer: @optimizer@
  @scheduler@

saver:
  save_dir: runs/somewhere
  results_dir: runs/somewhere/results
  auto_resume: true
hooks:
  - type: auto_save_best
@extra@
net:
  - name: backbone
    type: @backbone@
    kwargs:
      out_layers: [4]
      normalize: {type: solo_bn}
      initializer: {method: msra}
      @options@
  - name: head
    type: base_cls_head
    kwargs: {num_classes: *num_classes, in_plane: 512, input_feature_idx: -1@head@}
  - name: post_process
    type: base_cls_postprocess
    kwargs:
      cls_loss: @loss@
"""
T_STD = "*random_resized_crop, *random_horizontal_flip, *pil_color_jitter, *to_tensor, *normalize"
SGD = "{{type: SGD, kwargs: {{lr: {}, nesterov: true, momentum: 0.9, weight_decay: {}}}}}"
STEPS = """lr_scheduler:
    warmup_iter: {}
    warmup_type: linear
    warmup_register_type: no_scale_lr
    warmup_ratio: {}
    type: {}
    kwargs: {{{}}}"""
PLAIN = {
    "classes": 1000,
    "runtime": "",
    "crop": "",
    "jitter": "brightness: 0.2, contrast: 0.2, saturation: 0.2, hue: 0.1",
    "m": 7,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "train": "images/meta/train.txt",
    "train_dir": "images/train",
    "val": "images/meta/val.txt",
    "val_dir": "images/val",
    "transformer": T_STD,
    "batch": 64,
    "batch_fn": "",
    "length": "max_epoch: 100",
    "optimizer": SGD.format(0.4, 0.0001),
    "scheduler": STEPS.format(2500, 0.25, "MultiStepLR", "milestones: [30, 60, 90], gamma: 0.1"),
    "extra": "",
    "backbone": "resnet18",
    "options": "",
    "head": "",
    "loss": "{type: label_smooth_ce, kwargs: {smooth_ratio: 0.1, num_classes: *num_classes}}",
}


def config(**slots) -> str:
    """The plain configuration of resnet18 with other contents of the slots."""
    text = TEMPLATE
    for slot, content in {**PLAIN, **slots}.items():
        assert slot in PLAIN
        text = text.replace(f"@{slot}@", str(content))
    return text


def unwarmed(kind, kwargs):
    return STEPS.format(0, 0.25, kind, kwargs)


def cosine(warmup, ratio, length, end, own=None, kind="CosineAnnealingLR"):
    """A scheduler block; `own` is the warm-up that the cosine itself knows of."""
    key = "warmup_iter" if kind == "CosineAnnealingLR" else "warm_epoch"
    inner = f"T_max: {length}, eta_min: {end}" + (f", {key}: {own}" if own is not None else "")
    return STEPS.format(warmup, ratio, kind, inner)


EMA = "ema: {{enable: true, ema_type: linear, kwargs: {{decay: {}}}}}"
BCE = "{type: bce, kwargs: {bias: true}}"
MIXUP = "batch_fn: {type: batch_mixup, kwargs: {alpha: 0.2, num_classes: *num_classes}}"
BOTH = (
    "batch_fn: {{type: batch_cutmixup, kwargs: "
    "{{mixup_alpha: {}, cutmix_alpha: 1.0, switch_prob: 0.5, num_classes: *num_classes}}}}"
).format
LAMB = "{{type: LAMB, kwargs: {{lr: {}, weight_decay: 0.02}}}}".format
ADAMW = "{{type: AdamW, kwargs: {{lr: {}, weight_decay: 0.05}}{}}}".format
CROP_FLIP = "*random_resized_crop, *random_horizontal_flip"
RSB_JITTER = {"jitter": "brightness: 0.4, contrast: 0.4, saturation: 0.4", "transformer": T_STD}

# what every one of them says beside its own
DATA = {
    "dataset": "files",
    "train_list": ["images/meta/train.txt"],
    "train_root": ["images/train"],
    "val_list": ["images/meta/val.txt"],
    "val_root": ["images/val"],
    "num_classes": 1000,
    "image_size": 224,
    "val_resize": 256,
    "crop_scale": [0.08, 1.0],
    "hflip": 0.5,
    "eval_every": 5,
    "workers": 4,
    "precision": "fp32",
}
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
STRONG = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
N = {"nesterov": True}
LS = {"label_smoothing": 0.1}
WARM = {"warmup_steps": 2500, "warmup_start_factor": 0.25}
SOFT = {"mixup_alpha": 0.2, "up_smoothing": True, **LS}
BCES = {"loss": "bce", "bce_sum": True, "bce_shift": True}
RSB = {"optimizer": "lamb", "weight_decay": 0.02, "clip_grad_norm": 1.0, **BCES}
RSB |= {"mixup_alpha": 0.1, "cutmix_alpha": 1.0}
SWITCH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "up_smoothing": True, **LS}
STEP_90 = {"schedule": "multistep", "milestones": [30, 60, 90]}
CARS = {
    "classes": 196,
    "train": "/cars//train.txt",
    "train_dir": "/cars/train",
    "val": "/cars/test.txt",
    "val_dir": "/cars/test",
    "backbone": "resnet50",
}
CARS_DATA = {
    "data_dir": "/cars",
    "train_list": ["train.txt"],
    "train_root": ["train"],
    "val_list": ["test.txt"],
    "val_root": ["test"],
    "num_classes": 196,
    "model": "resnet50",
}
KD = """teacher:
  - name: backbone
    type: resnet152
    kwargs: {normalize: {type: solo_bn}, deep_stem: true, avg_down: true}
  - name: head
    type: base_cls_head
    kwargs: {num_classes: *num_classes}
"""
KD_NEW = f"""{KD}mimic:
  mimic_ins_type: base
  loss_weight: 0.5
  warm_up_iters: 1000
  cfgs:
    loss: {{type: kd_loss, kwargs: {{T: 4, loss_weight: 3.0}}}}
  teacher: {{mimic_name: [head.classifier], teacher_weight: teacher.pth}}
  student: {{mimic_name: [head.classifier]}}
"""
KD_OLD = f"""{KD}mimic:
  mimic_name: res152_to_res18
  mimic_type: kl
  loss_weight: 1.0
  teacher: {{mimic_name: [head.classifier], teacher_weight: teacher.pth}}
  student: {{mimic_name: [head.classifier], student_weight: student.pth}}
"""
TEACHER = {"teacher": ["teacher.pth"], "teacher_model": ["resnet152d"]}
GROUPS = ", pconfig: {{bn_w: {0}, bn_b: {0}}}".format("{weight_decay: 0.0}")
MOBILE = {
    "optimizer": SGD.format(0.4, "0.00004")[:-1] + GROUPS + "}",
    "extra": EMA.format(0.999),
    "backbone": "mobilenet_v2",
    "length": "max_iter: 312500",
    "scheduler": cosine(2500, 0.25, 312500, 0.0, 2500),
}
SWIN_AUG = "*random_resized_crop, *auto_augmentation, *to_tensor, *normalize, *rand_erase"

# name: (slots, GPUs, what of the recipe differs from Recipe()'s defaults beside DATA)
FAMILIES: dict[str, tuple[dict, int, dict]] = {
    "plain": (
        {},
        16,
        dict(model="resnet18", epochs=100, batch_size=1024, lr=0.4, weight_decay=1e-4)
        | {**N, **STEP_90, **WARM, **LS, **JITTER},
    ),
    "bag of tricks": (
        {
            "length": "max_epoch: 200",
            "optimizer": SGD.format(0.8, "0.00005"),
            "scheduler": cosine(3130, 0.25, 200, 0.0, 3130),
            "batch_fn": MIXUP,
            "extra": EMA.format(0.9999),
            "backbone": "resnet50",
        },
        32,
        dict(model="resnet50", epochs=200, batch_size=2048, lr=0.8, weight_decay=5e-5)
        | dict(
            warmup_steps=3130, warmup_start_factor=0.25, ema_decay=0.9999, **N, **SOFT, **JITTER
        ),
    ),
    "resnet50D": (
        {
            "length": "max_epoch: 200",
            "scheduler": cosine(62560, 0.00015974, 200, "0.000001", 0),
            "batch_fn": MIXUP,
            "backbone": "resnet50_D",
        },
        32,
        dict(model="resnet50", avg_down=True, epochs=200, batch_size=2048, lr=0.4, lr_min=1e-6)
        | dict(weight_decay=1e-4, warmup_steps=62560, warmup_start_factor=0.00015974)
        | {**N, **SOFT, **JITTER},
    ),
    "strikes 100e": (
        {
            **RSB_JITTER,
            "optimizer": LAMB(0.008),
            "scheduler": cosine(3130, 0.02, 100, 0.0, 3130),
            "batch_fn": BOTH(0.1),
            "extra": EMA.format(0.9999),
            "loss": BCE,
        },
        32,
        dict(model="resnet18", epochs=100, batch_size=2048, lr=0.008, ema_decay=0.9999)
        | dict(warmup_steps=3130, warmup_start_factor=0.02, **RSB, **STRONG),
    ),
    "strikes 300e": (
        {
            "transformer": f"{CROP_FLIP}, *random_augmentation, *to_tensor, *normalize",
            "length": "max_epoch: 300",
            "optimizer": LAMB(0.005),
            "scheduler": cosine(3130, 0.0002, 300, "0.000001", 5, "CosineLREpochScheduler"),
            "batch_fn": BOTH(0.1),
            "loss": BCE,
            "backbone": "resnet50",
            "options": "drop_path_rate: 0.05",
        },
        32,
        dict(model="resnet50", drop_path=0.05, epochs=300, batch_size=2048, lr=0.005, lr_min=1e-6)
        | dict(
            warmup_steps=3130, warmup_start_factor=0.0002, cosine_epochs=300.0, lr_per_epoch=True
        )
        | dict(randaug_n=2, **RSB),
    ),
    "softmax eql": (
        {
            "optimizer": SGD.format(0.1, 0.0005),
            "length": "max_epoch: 90",
            "scheduler": unwarmed("EpochBasedCosineAnnealingLR", "T_max: 90, eta_min: 0.01"),
            "loss": "{type: softmax_eql, kwargs: {num_classes: 1000, indicator: pos, tau: 1}}",
        },
        8,
        dict(model="resnet18", epochs=90, batch_size=512, weight_decay=5e-4, lr_min=0.001)
        | dict(cosine_epochs=90.0, lr_per_epoch=True, **N, **JITTER),
    ),
    "kd": (
        {"extra": KD_NEW, "runtime": "  runner: {type: kd}"},
        16,
        dict(model="resnet18", epochs=100, batch_size=1024, lr=0.4, weight_decay=1e-4)
        | dict(kd_loss=["kl"], kd_weight=[1.5], temperature=4.0, **TEACHER)
        | dict(kd_warmup_epochs=1000 / 1252, **N, **STEP_90, **WARM, **LS, **JITTER),
    ),
    "kd bag of tricks": (
        {
            "extra": KD_OLD,
            "runtime": "  runner: {type: kd}",
            "length": "max_epoch: 180",
            "optimizer": SGD.format(0.4, 0),
            "scheduler": unwarmed("CosineAnnealingLR", "T_max: 180, eta_min: 0.0"),
            "batch_fn": MIXUP,
            "transformer": f"{CROP_FLIP}, *to_tensor, *normalize",
        },
        32,
        dict(model="resnet18", epochs=180, batch_size=2048, lr=0.4, weights="student.pth")
        | dict(kd_loss=["up_kl"], **TEACHER, **N, **SOFT),
    ),
    "downstream": (
        {
            **CARS,
            "length": "max_epoch: 150",
            "optimizer": SGD.format(0.01, 0.0005),
            "scheduler": unwarmed("MultiStepLR", "milestones: [50, 100], gamma: 0.1"),
        },
        1,
        dict(epochs=150, batch_size=64, lr=0.01, weight_decay=5e-4, schedule="multistep")
        | dict(milestones=[50, 100], **CARS_DATA, **N, **LS, **JITTER),
    ),
    "downstream strikes": (
        {
            **CARS,
            "transformer": f"{CROP_FLIP}, *random_augmentation, *to_tensor, *normalize,"
            " *cutmix_mixup",
            "length": "max_epoch: 300",
            "optimizer": SGD.format(0.01, 0.0005),
            "scheduler": unwarmed("CosineAnnealingLR", "T_max: 300, eta_min: 0.0"),
            "loss": BCE,
        },
        1,
        dict(epochs=300, batch_size=64, lr=0.01, weight_decay=5e-4, mixup_alpha=0.1)
        | dict(cutmix_alpha=1.0, mix_per_sample=True, randaug_n=2, **CARS_DATA, **N, **BCES),
    ),
    "mobilenet": (
        {**MOBILE, "runtime": "  iter_base: true\n  fp16: true"},
        16,
        dict(model="mobilenetv2_100", precision="auto", epochs=250, batch_size=1024, lr=0.4)
        | dict(weight_decay=4e-5)
        | dict(
            decay_norm_and_bias=False, ema_decay=0.999, eval_every=1, **N, **WARM, **LS, **JITTER
        ),
    ),
    "mobilenet as it is": (
        {**MOBILE, "runtime": "iter_base: true\nfp16: {enable: true}"},
        16,
        dict(model="mobilenetv2_100", epochs=250, batch_size=1024, lr=0.4, weight_decay=4e-5)
        | dict(
            decay_norm_and_bias=False, ema_decay=0.999, eval_every=1, **N, **WARM, **LS, **JITTER
        ),
    ),
    "mobilenetv3": (
        {"backbone": "mobilenet_v3_small", "head": ", dropout: 0.2"},
        16,
        dict(model="mobilenetv3_small_100", dropout=0.2, epochs=100, batch_size=1024, lr=0.4)
        | dict(weight_decay=1e-4, **N, **STEP_90, **WARM, **LS, **JITTER),
    ),
    "regnet": (
        {
            "backbone": "regnetx_200m",
            "length": "max_iter: 125000",
            "optimizer": SGD.format(0.8, "0.00005"),
            "scheduler": cosine(6250, 0.25, 125000, 0.0),
        },
        16,
        dict(model="regnetx_002", epochs=100, batch_size=1024, lr=0.8, weight_decay=5e-5)
        | dict(warmup_steps=6250, warmup_start_factor=0.25, **N, **LS, **JITTER),
    ),
    "convnext": (
        {
            "backbone": "convnext_tiny",
            "options": "drop_path_rate: 0.1",
            "transformer": f"{CROP_FLIP}, *random_augmentation, *to_tensor, *normalize,"
            " *rand_erase",
            "m": 9,
            "batch": 128,
            "length": "max_epoch: 300",
            "optimizer": ADAMW(0.004, ""),
            "scheduler": cosine(6260, 0.0001597, 300, "0.000001", 0),
            "batch_fn": BOTH(0.8),
            "extra": EMA.format(0.9999),
        },
        32,
        dict(model="convnext_tiny", drop_path=0.1, epochs=300, batch_size=4096, lr=0.004)
        | dict(optimizer="adamw", weight_decay=0.05, lr_min=1e-6, ema_decay=0.9999)
        | dict(warmup_steps=6260, warmup_start_factor=0.0001597, randaug_n=2, randaug_m=9.0)
        | dict(erase_prob=0.25, **SWITCH),
    ),
    "swin": (
        {
            "crop": ", interpolation: bicubic",
            "transformer": SWIN_AUG,
            "backbone": "swin_tiny",
            "options": "drop_path_rate: 0.2",
            "length": "max_epoch: 300",
            "optimizer": ADAMW(
                0.001,
                ", pconfig: {ln_w: {weight_decay: 0.0}, ln_b: {weight_decay: 0.0}, linear_b:"
                " {weight_decay: 0.0, nodecay: [relative_position_bias_table]}}",
            ),
            "scheduler": cosine(25020, 0.0001, 300, "0.00001", 20, "CosineLREpochScheduler"),
            "batch_fn": BOTH(0.8),
            "extra": "  - {type: grad_clipper, kwargs: {mode: average, max_norm: 5.0}}",
        },
        16,
        dict(model="swin_tiny_patch4_window7_224", drop_path=0.2, epochs=300, batch_size=1024)
        | dict(interpolation="bicubic", hflip=0.0, autoaugment=True, erase_prob=0.25, lr=0.001)
        | dict(optimizer="adamw", weight_decay=0.05, decay_norm_and_bias=False, lr_min=1e-5)
        | dict(
            warmup_steps=25020, warmup_start_factor=0.0001, cosine_epochs=300.0, lr_per_epoch=True
        )
        | SWITCH,
    ),
    "vit": (
        {
            "transformer": "*random_resized_crop, *auto_augmentation, *to_tensor, *normalize",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "backbone": "vit_base16",
            "options": "drop_path_rate: 0.1",
            "length": "max_epoch: 300",
            "optimizer": ADAMW(0.00075, ""),
            "scheduler": cosine(3760, 0.00133, 300, "0.000001", 3, "CosineLREpochScheduler"),
            "batch_fn": BOTH(0.8),
        },
        16,
        dict(model="vit_base_patch16_224", drop_path=0.1, epochs=300, batch_size=1024)
        | dict(mean=[0.5] * 3, std=[0.5] * 3, hflip=0.0, autoaugment=True, lr=0.00075)
        | dict(optimizer="adamw", weight_decay=0.05, lr_min=1e-6, warmup_steps=3760)
        | dict(warmup_start_factor=0.00133, cosine_epochs=300.0, lr_per_epoch=True, **SWITCH),
    ),
}


def swin_kwargs(width, blocks, heads):
    shape = f"embed_dim: {width}\n      depths: [2, 2, {blocks}, 2]\n      num_heads: "
    return f"{shape}{[heads, 2 * heads, 4 * heads, 8 * heads]}\n      "


def read(family: str, **options):
    slots, gpus, _ = FAMILIES[family]
    return united_perception.loads(config(**slots), gpus=gpus, **options)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, what was found, the options that were wanted)"""
    wanted = {k: v for k, v in (DATA | FAMILIES[request.param][2]).items() if v != default(k)}
    return request.param, read(request.param), wanted


def default(option: str):
    return Recipe.model_fields[option].default


def said(found, where: str, kind: str = DEFECT) -> str:
    """The notes of a kind on a place, in one text."""
    return "\n".join(n.text for n in found.notes if n.kind == kind and n.where == where)


def refused(text: str, **options) -> str:
    with pytest.raises(UnitedPerceptionError) as caught:
        united_perception.loads(text, **options)
    return str(caught.value)


def changed(text: str, **options) -> dict:
    return united_perception.loads(text, **options).recipe.non_default()


# ---- every value arrives


def test_a_configuration_becomes_the_recipe_it_names(family):
    _, found, wanted = family
    assert found.recipe.non_default() == wanted


def test_params_read_back_to_an_equal_recipe(family, tmp_path):
    _, found, wanted = family
    path = tmp_path / "recipe.yaml"
    path.write_text(found.params(), encoding="utf-8")
    assert Recipe.from_yaml(path) == found.recipe
    assert yaml.safe_load(found.params()) == wanted
    options = [line for line in found.params().splitlines() if not line.startswith("#")]
    assert [line.split(":")[0] for line in options] == [
        k for k in Recipe.model_fields if k in wanted
    ]
    assert all(" # " in line for line in options)


def test_every_note_stands_in_the_params_but_what_was_taken_as_it_is(family):
    _, found, _ = family
    text = " ".join(line.lstrip("# ") for line in found.params().splitlines())
    for kind, where, what in found.notes:
        if kind != TAKEN or where.startswith("--"):
            assert f"{where}: {what}" in text
    for note in found.origin.values():
        assert note in found.notes and note.kind == TAKEN


def test_models_are_timms(family):
    name, found, _ = family
    assert timm.is_model(found.recipe.model)


def test_every_name_in_the_table_of_models_is_timms():
    names = set(united_perception._TIMM.values())
    assert len(names) > 40 and all(timm.is_model(name) for name in names)


@pytest.mark.parametrize(
    "name, options, model",
    [
        *[(f"resnet{n}", "", f"resnet{n}") for n in (18, 34, 50, 101, 152)],
        ("mobilenet_v2", "scale: 1.0", "mobilenetv2_100"),
        ("mobilenetv2", "scale: 0.5", "mobilenetv2_050"),
        ("mobilenet_v3", "mode: large", "mobilenetv3_large_100"),
        ("regnetx_400m", "", "regnetx_004"),
        ("regnety_6400m", "", "regnety_064"),
        ("efficientnet_b4", "", "efficientnet_b4"),
        ("convnext_small", "", "convnext_small"),
        ("swin_transformer_small", swin_kwargs(96, 18, 3), "swin_small_patch4_window7_224"),
        ("swin_base_224", swin_kwargs(128, 18, 4), "swin_base_patch4_window7_224"),
        (
            "swin_base_384",
            swin_kwargs(128, 18, 4) + "window_size: 12",
            "swin_base_patch4_window12_384",
        ),
        (
            "swin_large",
            swin_kwargs(192, 18, 6) + "window_size: 12",
            "swin_large_patch4_window12_384",
        ),
        ("swin_large", "", "swin_tiny_patch4_window7_224"),
        ("vit_b16_224", "", "vit_base_patch16_224"),
        ("vit_huge14", "", "vit_huge_patch14_224"),
        ("deit_small", "", "deit_small_patch16_224"),
        ("vit_base_patch16_224", "", "vit_base_patch16_224"),
    ],
)
def test_a_backbone_has_timms_name(name, options, model):
    assert changed(config(backbone=name, options=options))["model"] == model
    assert timm.is_model(model)


@pytest.mark.parametrize(
    "name, options",
    [
        ("cswin_tiny", ""),
        ("mobilenet_v2", "scale: 2.0"),
        ("swin_tiny", "window_size: 12"),
        ("swin_huge", "embed_dim: 320"),
    ],
)
def test_a_backbone_that_timm_has_not_keeps_its_name_and_is_told(name, options):
    found = united_perception.loads(config(backbone=name, options=options))
    assert found.recipe.model == name and "timm has no" in said(found, "net[0].type", MISSING)


# ---- learning rates by UP's formulas, written out slowly

E_OF = {name: math.ceil(IMAGENET / (64 * gpus)) for name, (_, gpus, _) in FAMILIES.items()}
E_OF["convnext"] = 313


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


# name: (steps of warm-up, its ratio, UP's lr after it, largest relative difference)
RATES = {
    "plain": (2500, 0.25, lambda t: up_multistep(t, 0.4, [30, 60, 90], 1252), 1e-12),
    "bag of tricks": (3130, 0.25, lambda t: up_cosine(t, 0.8, 0, 200, 626, 3130), 1e-9),
    "strikes 100e": (3130, 0.02, lambda t: up_cosine(t, 0.008, 0, 100, 626, 3130), 1e-9),
    "strikes 300e": (3130, 0.0002, lambda t: up_epoch_cosine(t, 0.005, 1e-6, 300, 626, 5), 1e-9),
    "softmax eql": (0, 0, lambda t: up_share_cosine(t, 0.1, 0.01, 90, 2503), 1e-9),
    "kd bag of tricks": (0, 0, lambda t: up_cosine(t, 0.4, 0, 180, 626, 0), 1e-9),
    "downstream": (0, 0, lambda t: up_multistep(t, 0.01, [50, 100], 128), 1e-12),
    "downstream strikes": (0, 0, lambda t: up_cosine(t, 0.01, 0, 300, 128, 0), 1e-9),
    # 312,500 steps are 249.6 epochs; UP rounds 25,020 steps up to 20 epochs, 3,760 down to 3
    "mobilenet": (2500, 0.25, lambda t: up_cosine(t, 0.4, 0, 312500, 1, 2500), 0.01),
    "swin": (25020, 0.0001, lambda t: up_epoch_cosine(t, 0.001, 1e-5, 300, 1252, 20), 2e-3),
    "vit": (3760, 0.00133, lambda t: up_epoch_cosine(t, 0.00075, 1e-6, 300, 1252, 3), 2e-3),
}


@pytest.mark.parametrize("name", RATES)
def test_lr_is_what_up_computes(name):
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


def test_the_warm_up_that_is_scaled_starts_from_the_lr_of_the_file():
    scheduler = STEPS.format(2500, -1, "MultiStepLR", "milestones: [30]")
    scheduler = re.sub(r" +warmup_(register_type|ratio).*\n", "", scheduler)
    found = united_perception.loads(config(scheduler=scheduler), gpus=16)
    rate = training.lr_schedule(found.recipe, 1252)
    assert rate(0) == pytest.approx(0.4) and rate(2499) == pytest.approx(0.4 * 64 * 16)
    assert "0.4 by GPUs x batch size 1,024: 409.6" in said(
        found, "trainer.lr_scheduler.warmup_register_type"
    )


@pytest.mark.parametrize(
    "kind, ratio, ours",
    [("linear", 0.25, "linear"), ("exp", 0.25, "exponential"), ("cosine", 0.25, "cosine")],
)
def test_a_climb_has_ups_form(kind, ratio, ours):
    scheduler = STEPS.format(101, ratio, "MultiStepLR", "milestones: [30]")
    text = config(scheduler=scheduler.replace("warmup_type: linear", f"warmup_type: {kind}"))
    recipe = united_perception.loads(text, gpus=16).recipe
    assert recipe.warmup == ours
    share = {"linear": 0.3, "cosine": (1 - math.cos(math.pi * 0.3)) / 2}.get(kind)
    wanted = 0.1 * (0.4 / 0.1) ** 0.3 if kind == "exp" else 0.1 + 0.3 * share
    assert training.lr_schedule(recipe, 1252)(30) == pytest.approx(wanted)


def test_lr_is_left_alone_where_nobody_knows_the_batch_or_the_way():
    where = "lr_scheduler.warmup_register_type"
    text = "optimizer: {type: SGD, kwargs: {lr: 0.4}}\nlr_scheduler:\n  type: StepLR\n"
    text += "  kwargs: {step_size: 1}\n"
    found = united_perception.loads(text, gpus=8)
    assert found.recipe.lr == 0.4 and "multiplies lr by GPUs x batch size" in said(found, where)
    found = united_perception.loads(f"{text}  warmup_register_type: x\n")
    assert found.recipe.lr == 0.4 and "no x" in said(found, where)


def test_exponential_is_the_default_climb_and_cannot_start_from_nothing():
    scheduler = STEPS.format(100, 0.25, "MultiStepLR", "milestones: [30]")
    bare = scheduler.replace("    warmup_type: linear\n", "")
    assert united_perception.loads(config(scheduler=bare)).recipe.warmup == "exponential"
    found = united_perception.loads(config(scheduler=bare.replace("ratio: 0.25", "ratio: 0.0")))
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
def test_the_longer_of_two_warm_ups_counts(iters, epochs, options):
    scheduler = STEPS.format(
        f"{iters}\n    warmup_epochs: {epochs}", 0.25, "StepLR", "step_size: 9"
    )
    found = changed(config(scheduler=scheduler), gpus=16)
    assert {k: v for k, v in found.items() if k in ("warmup_steps", "warmup_epochs")} == options
    assert (found["schedule"], found["lr_step_epochs"]) == ("step", 9)


@pytest.mark.parametrize(
    "kind, kwargs, options",
    [
        (
            "StepLR",
            "step_size: 30, gamma: 0.5",
            dict(schedule="step", lr_step_epochs=30, gamma=0.5),
        ),
        ("StepLR", "step_size: 100", dict(schedule="constant")),
        ("MultiStepLR", "milestones: [30, 120]", dict(schedule="multistep", milestones=[30])),
        ("MultiStepLR", "milestones: [100]", dict(schedule="constant")),
        ("MultiStepLR", "milestones: []", dict(schedule="constant")),
        (
            "MultiStepLR",
            "milestones: [60, 30.4, 60]",
            dict(schedule="multistep", milestones=[30, 60]),
        ),
        ("CosineAnnealingLR", "T_max: 100", {}),
        ("CosineAnnealingLR", "T_max: 150", dict(cosine_epochs=150.0)),
        ("CosineAnnealingLR", "T_max: 50", dict(cosine_epochs=50.0)),
        ("CosineAnnealingLR", "eta_min: 0.1", dict(lr_min=0.1)),
        (
            "polylr",
            "power: 0.9, min_lr: 0.01, max_epoch: 100",
            dict(schedule="polynomial", power=0.9, lr_min=0.01),
        ),
        ("OneCycleLR", "max_lr: 0.7, pct_start: 0.3", dict(schedule="one_cycle", lr=0.7)),
        ("ReduceLROnPlateau", "factor: 0.1", {}),
        ("SimSiamScheduler", "", {}),
    ],
)
def test_a_schedule_and_its_length(kind, kwargs, options):
    found = united_perception.loads(config(scheduler=unwarmed(kind, kwargs)), gpus=16)
    usual = {
        "lr",
        "schedule",
        "milestones",
        "gamma",
        "lr_step_epochs",
        "power",
        "lr_min",
        "warmup_steps",
    }
    usual |= {"cosine_epochs", "lr_per_epoch", "warmup_start_factor", "warmup_epochs", "epochs"}
    got = {k: v for k, v in found.recipe.non_default().items() if k in usual}
    assert got == {"lr": 0.4, "epochs": 100, **options}


def test_a_cosine_that_knows_of_its_warm_up_but_not_of_the_length():
    found = united_perception.loads(config(scheduler=cosine(2504, 0.25, 150, 0.0, 2504)), gpus=16)
    rate = training.lr_schedule(found.recipe, 1252)
    assert found.recipe.cosine_epochs == 148
    for t in (2504, 60_000, 125_199):
        assert rate(t) == pytest.approx(up_cosine(t, 0.4, 0, 150, 1252, 2504), rel=1e-9)
    assert "lr ends at 0.1024" in said(found, "trainer.lr_scheduler.kwargs.T_max")


# ---- defects, with their numbers

KWARGS = "trainer.lr_scheduler.kwargs"


@pytest.mark.parametrize(
    "name, where, words",
    [
        ("resnet50D", f"{KWARGS}.warmup_iter", ["62,560 steps", "99.94", "from 0.4 to 0.2002 "]),
        ("resnet50D", "trainer.lr_scheduler.warmup_iter", ["99.9 of 200", "6,256 to 6,260"]),
        ("resnet50D", "net[0].type", ["no whole ResNet-D", "deep_stem"]),
        ("strikes 300e", f"{KWARGS}.T_max", ["5.9", "e-06", "not at 1e-06", "here at 5.9"]),
        ("swin", f"{KWARGS}.T_max", ["2.19", "e-05", "here at 2.19"]),
        ("convnext", f"{KWARGS}.warmup_iter", ["from 0.004 to 0.0039"]),
        ("mobilenet as it is", f"{KWARGS}.T_max", ["312,500 epochs", "0.39999938", "here at "]),
        ("mobilenet as it is", "iter_base", ["`runtime` only"]),
        ("mobilenet as it is", "fp16", ["fp32"]),
        ("regnet", f"{KWARGS}.T_max", ["125,000 epochs", "0.7999987"]),
        ("downstream strikes", "cutmix_mixup.type", ["does not know it"]),
        ("kd bag of tricks", "mimic", ["mimic_name, mimic_type", "L2 loss of normalised logits"]),
        ("bag of tricks", "net[2].kwargs.cls_loss.kwargs.smooth_ratio", ["1 - 0.1 / classes"]),
        ("swin", "trainer.optimizer.pconfig.linear_b.nodecay", ["ignores it inside linear_b"]),
        ("softmax eql", "trainer.lr_scheduler.type", ["yolov5"]),
        ("plain", "pil_color_jitter.type", []),
        ("plain", "net[2].kwargs.cls_loss.kwargs.smooth_ratio", []),
    ],
)
def test_a_defect_is_told_in_numbers(name, where, words):
    text = said(read(name), where)
    assert all(word in text for word in words) and bool(text) == bool(words)


@pytest.mark.parametrize(
    "slots, where, words",
    [
        ({"scheduler": cosine(3130, 0.25, 200, 0.0), "length": "max_epoch: 200", "batch": 2048,
          "optimizer": SGD.format(0.8, 0.1)}, f"{KWARGS}.warmup_iter", ["from 0.8 to 0.79877"]),
        ({"scheduler": cosine(200_000, 0.25, 100, 0.0, 200_000), "batch": 1024},
         "trainer.lr_scheduler.warmup_iter", ["200,000 of 125,200 steps never reaches lr"]),
        ({"scheduler": cosine(0, 0.25, 100, 0.0, 5000), "batch": 1024}, f"{KWARGS}.warmup_iter",
         ["5000, but the warm-up takes 0 steps", "from 0.4 to 0.39829"]),
        ({"scheduler": cosine(3130, 0.25, 100, 0.0, 5, "CosineLREpochScheduler")},
         f"{KWARGS}.warm_epoch", ["0.16 epochs", "from 0.4 to 0.39754"]),
        ({"scheduler": unwarmed("MultiStepLR", "milestones: [30, 120]")}, f"{KWARGS}.milestones",
         ["[120]", "100 epochs"]),
        ({"scheduler": unwarmed("ReduceLROnPlateau", "")}, "trainer.lr_scheduler.type",
         ["without a metric"]),
        ({"scheduler": unwarmed("CosineAnnealingLR", "")}, f"{KWARGS}.T_max", ["TypeError"]),
        ({"scheduler": ""}, "lr_scheduler", ["KeyError"]),
        ({"optimizer": "{type: AdamW, kwargs: {lr: 0.1, momentum: 0.9}}"},
         "trainer.optimizer.kwargs.momentum", ["AdamW does not take it", "TypeError"]),
        ({"optimizer": "{type: SGD, kwargs: {lr: 0.1, nesterov: true}}"},
         "trainer.optimizer.kwargs.nesterov", ["without momentum"]),
        ({"optimizer": "{type: AdamW, kwargs: {lr: 0.1}, pconfig: {linear: {weight_decay: 0}}}"},
         "trainer.optimizer.pconfig.linear", ["no group linear", "KeyError"]),
        ({"optimizer": "{type: AdamW, kwargs: {}}"}, "trainer.optimizer.kwargs", ["no lr"]),
        ({"optimizer": SGD.format("1e-3", 0)}, "trainer.optimizer.kwargs.lr", ["'1e-3' is text"]),
        ({"loss": BCE}, "net[2].kwargs.cls_loss.kwargs.bias", ["not mixed", "mean over classes"]),
        ({"train": "''", "train_dir": "''"}, "dataset.train.dataset.kwargs.meta_file", ["empty"]),
        ({"runtime": "  random_seed: 100000"}, "runtime.random_seed", ["65,536"]),
        ({"runtime": "  device: cpu"}, "runtime.device", ["needs CUDA"]),
        ({"options": "normalize_: 1", "backbone": "resnet34"}, "net[0].kwargs.normalize", []),
        ({"batch_fn": MIXUP, "extra": KD_OLD}, "mimic", ["only with runtime.runner.type kd"]),
        ({"extra": KD_NEW.replace("kd_loss", "kl_loss")}, "mimic.cfgs.loss.type",
         ["softmax(ReLU(logits))", "Hinton's is kl"]),
        ({"extra": "saver_: 1"}, "saver.save_dir", []),
    ],
)  # fmt: skip
def test_what_a_file_says_and_does_not_do_is_told(slots, where, words):
    text = said(united_perception.loads(config(**slots)), where)
    assert all(word in text for word in words) and bool(text) == bool(words)


def edited(*pairs: tuple[str, str]) -> str:
    text = config()
    for old, new in pairs:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    "old, new, kind, where, words",
    [
        ("normalize: {type: solo_bn}", "", DEFECT, "net[0].kwargs.normalize", "freezes every"),
        ("solo_bn", "sync_bn", MISSING, "net[0].kwargs.normalize.type", "one per device"),
        ("solo_bn}", "solo_bn, kwargs: {momentum: 0.99}}", DEFECT,
         "net[0].kwargs.normalize.kwargs.momentum", "new batch"),
        ("runs/somewhere\n", "checkpoints/cls_std\n", DEFECT, "saver.save_dir", "auto_resume"),
        ("auto_resume: true", "save_result: true", DEFECT, "saver.save_result", "deletes"),
        ("auto_resume: true", "resume_model: a.pth\n  pretrain_model: b.pth", DEFECT,
         "saver.pretrain_model", "resume_model comes first"),
        ("color_mode: RGB", "color_mode: BGR", DEFECT,
         "dataset.train.dataset.kwargs.image_reader.kwargs.color_mode", "red and blue"),
        ("fs_pillow", "fs_opencv", NOTHING, "dataset.train.dataset.kwargs.image_reader.type",
         "Pillow"),
        ("{topk: [1, 5]}", "{topk: [1, 5], num_classes: 1000}", DEFECT,
         "dataset.test.dataset.kwargs.evaluator.kwargs.num_classes", "TypeError"),
        ("type: dist,", "type: repeat_factor,", MISSING,
         "dataset.train.batch_sampler.kwargs.sampler.type", "every image once"),
        ("  - type: auto_save_best", "  - {type: grad_clipper, kwargs: {mode: moving_average,"
         " max_norm: 5}}", MISSING, "hooks[0]", "moving_average"),
        ("in_plane: 512", "dropout: 0.1, representation_size: 4", DEFECT,
         "net[1].kwargs.representation_size", "crashes"),
        ("*pil_color_jitter, ", "", DEFECT, "pil_color_jitter", "in no transformer list"),
        ("num_classes: *num_classes, in_plane", "num_classes: [1000, 7], in_plane", MISSING,
         "net[1].kwargs.num_classes", "2 heads"),
        ("label_smooth_ce", "softmax_eql", MISSING, "net[2].kwargs.cls_loss.type", "ce is taken"),
        ("type: SGD", "type: RMSprop", MISSING, "trainer.optimizer.type", "RMSprop"),
        ("momentum: 0.9", "momentum: 0.9, dampening: 0.1", MISSING,
         "trainer.optimizer.kwargs.dampening", "0.1 is not reproduced; 0 is taken"),
        ("*to_tensor, *normalize]\n    batch", "*to_tensor]\n    batch", MISSING,
         "normalize", "mean is the training's, [0.0, 0.0, 0.0]"),
        ("*random_resized_crop, *random_horizontal_flip, *pil_color_jitter",
         "*pil_color_jitter, *random_resized_crop, *random_horizontal_flip", MISSING,
         "dataset.train.dataset.kwargs.transformer", "order"),
        ("hooks:", "quant: {quant_type: qat, deploy_backend: tensorrt}\nhooks:", NOTHING, "quant",
         "quantisation"),
        ("images/meta/train.txt", "s3://bucket/train.txt", NOTHING, "dataset", "say data_dir"),
    ],
)  # fmt: skip
def test_a_detail_that_differs_here_or_in_up_is_told(old, new, kind, where, words):
    assert words in said(united_perception.loads(edited((old, new))), where, kind)


# ---- nothing in silence


def test_every_key_that_is_renamed_is_named_or_refused():
    """A misspelt key may cost its value, but never unsaid."""
    text = config(extra=EMA.format(0.99) + "\n" + KD_NEW)
    text = re.sub(r"(?ms)^  test:\n.*?(?=^trainer)", "", text)  # as the training side
    unused = "random_augmentation|auto_augmentation|rand_erase|cutmix_mixup|torch_\\w+"
    lines, silent = re.sub(rf"(?m)^({unused}): .*\n( .*\n)+", "", text).splitlines(), []
    for i, line in enumerate(lines):
        if (match := re.match(r"[ -]*(\w+):", line)) and (i % 3 or "type" not in line):
            renamed = line.replace(match[1] + ":", f"zzz_{match[1]}:", 1)
            text = "\n".join([*lines[:i], renamed, *lines[i + 1 :]])
            try:
                found = united_perception.loads(text)
            except UnitedPerceptionError:
                continue
            path = next(where for where in leaves(yaml.safe_load(text)) if "zzz_" in where)
            above = {path[: m.start()] for m in re.finditer(r"[.\[]", path)}
            notes = [n for n in found.notes if n.kind != TAKEN]
            whole = [n for n in notes if n.where in above and "no counterpart" in n.text]
            if not whole and not any("zzz_" in n.where for n in notes):
                silent.append(line.partition(":")[0])
    # names that a file chooses, those of a transform's anchor
    assert silent == [line.partition(":")[0] for line in lines if re.match(r"\w+: &", line)]


def leaves(node, where=""):
    if isinstance(node, dict | list) and node:
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in pairs:
            inner = f"[{key}]" if isinstance(node, list) else f".{key}" if where else key
            yield from leaves(value, where + inner)
    elif node not in ({}, []):
        yield where


def test_every_value_of_a_file_is_told(family):
    """Taken or noted, at its own place, that of its list or of a block of which all is noted."""
    name, found, _ = family
    slots, _, _ = FAMILIES[name]
    own = {n.where for n in found.notes}
    whole = {n.where for n in found.notes if n.kind != TAKEN}
    tree = yaml.safe_load(config(**slots))
    for where in leaves({k: v for k, v in tree.items() if k not in ("dataset", "net")}):
        if where.endswith(".num_classes"):  # an alias, told at its anchor
            continue
        above = {where[: m.start()] for m in re.finditer(r"[.\[]", where)}
        assert where in own or where.rpartition("[")[0] in own or above & whole, where


def test_an_alias_is_told_where_it_is_defined():
    found = read("plain")
    assert said(found, "num_classes", TAKEN) == "num_classes 1000"
    assert said(found, "pil_color_jitter.kwargs.hue", TAKEN) == "hue 0.1"


def test_what_is_assumed_stands_in_the_summary():
    found = united_perception.loads(config())
    assert "--gpus: not given" in found.summary() and found.recipe.batch_size == 64
    assert "--train-images: not given, 1,281,167" in found.summary()
    found = united_perception.loads(config(), gpus=4, train_images=5000)
    assert "--" not in found.summary() and found.recipe.batch_size == 256
    kinds = (MISSING, DEFECT, NOTHING, TAKEN)
    counts = [sum(n.kind == kind for n in found.notes) for kind in kinds]
    told = ", ".join(f"{n} {kind}" for n, kind in zip(counts, kinds, strict=True))
    assert found.summary().startswith(f"text: {told}")


UNKNOWN = [
    # (in the configuration, instead, where, the nearest name)
    ("type: SGD", "type: SDG", "trainer.optimizer.type", "SGD"),
    ("type: MultiStepLR", "type: MultistepLR", "trainer.lr_scheduler.type", "MultiStepLR"),
    ("type: resnet18", "type: resnet18q", "net[0].type", "resnet18"),
    ("type: label_smooth_ce", "type: label_smooth_cee", "net[2].kwargs.cls_loss.type",
     "label_smooth_ce"),
    ("test_freq:", "test_freqq:", "trainer.test_freqq", "test_freq"),
    ("gamma:", "gama:", "trainer.lr_scheduler.kwargs.gama", "gamma"),
    ("brightness:", "brigtness:", "pil_color_jitter.kwargs.brigtness", "brightness"),
    ("saver:", "savr:", "savr", "saver"),
]  # fmt: skip


@pytest.mark.parametrize("there, instead, where, nearest", UNKNOWN, ids=[u[1] for u in UNKNOWN])
def test_what_is_not_understood_comes_first_with_the_nearest_name(there, instead, where, nearest):
    text = config()
    assert there in text
    found = united_perception.loads(text.replace(there, instead, 1))
    assert f"the nearest is {nearest!r}" in said(found, where, MISSING)
    first = found.summary().splitlines()[1:3]
    assert first[0] == f"{MISSING}:" and first[1].startswith(f"  {where}: ")
    assert found.params().splitlines()[1] == f"# {MISSING}:"


def test_a_usual_configuration_is_understood_whole():
    found = united_perception.loads(config())
    assert [n for n in found.notes if n.kind == MISSING] == []
    assert MISSING + ":" not in found.summary()


def test_a_knob_that_would_change_nothing_leaves_a_note():
    found = united_perception.loads(config(length="max_epoch: 4", scheduler=cosine(0, 1, 4, 0.0)))
    assert "eval_every" not in found.recipe.non_default()
    assert "eval_every: 5 has no effect, since epochs is 4" in said(
        found, "trainer.test_freq", NOTHING
    )
    assert said(found, "trainer.test_freq", TAKEN) == ""


# ---- further values


@pytest.mark.parametrize(
    "old, new, options",
    [
        ("{size: 224}\nrandom_h", "{size: [160, 160], scale: [0.3, 1], ratio: [1, 2]}\nrandom_h",
         dict(image_size=160, val_image_size=224, crop_scale=[0.3, 1.0], crop_ratio=[1.0, 2.0])),
        ("{size: 256}", "{size: 232}", dict(val_resize=232)),
        ("torch_random_horizontal_flip\n", "torch_random_horizontal_flip\n  kwargs: {p: 0.3}\n",
         dict(hflip=0.3)),
        ("batch_size: 64\n    dataloader", "batch_size: 48\n    dataloader", dict(batch_size=192)),
        ("num_workers: 4", "num_workers: 2\n        drop_last: true",
         dict(workers=2, drop_last=True)),
        ("max_epoch: 100", "max_epoch: 95", dict(epochs=95)),
        ("type: cls\n", "type: cls\n", {}),
        ("meta_file: images/meta/train.txt", "fraction: 0.5\n        meta_file: [a.txt, b.txt]",
         dict(train_fraction=0.5, train_list=["a.txt", "b.txt"])),
        ("images/meta/train.txt", "/data//a/train.txt", dict(train_list=["/data/a/train.txt"])),
        ("momentum: 0.9, ", "", dict(nesterov=False, momentum=0.0)),
        ("task_names: cls", "random_seed: 131\n  fp16: false\n  device: cpu",
         dict(seed=131, precision="fp32", device="cpu")),
        ("auto_resume: true", "auto_resume: false\n  pretrain_model: a.pth",
         dict(auto_resume=False, weights="a.pth")),
        ("runs/somewhere\n", "x\n  resume_model: runs/a\n  pretrain_model: a.pth\n",
         dict(resume_from="runs/a")),
        ("- type: auto_save_best", "- {type: grad_clipper, kwargs: {mode: pre_defined,"
         " max_norm: 2.5}}", dict(clip_grad_norm=2.5)),
        ("type: SGD", "type: LAMB", dict(optimizer="lamb", clip_grad_norm=1.0, nesterov=False)),
        (SGD.format(0.4, 0.0001), "{type: LAMB, kwargs: {lr: 0.01, max_grad_norm: 2, trust_clip:"
         " true, weight_decay: 0, always_adapt: true}}", dict(optimizer="lamb", lr=0.01,
         clip_grad_norm=2.0, trust_clip=True, always_adapt=True, weight_decay=0.0, nesterov=False)),
        (SGD.format(0.4, 0.0001), "{type: AdamW, kwargs: {}}",
         dict(optimizer="adamw", lr=0.001, weight_decay=0.01, nesterov=False)),
        (SGD.format(0.4, 0.0001), "{type: SGD, kwargs: {lr: 0.3, momentum: 0.8, weight_decay: 0.1},"
         " special_param_group: [{key: bias, weight_decay: 0.0}]}",
         dict(lr=0.3, momentum=0.8, weight_decay=0.1, decay_norm_and_bias=False, nesterov=False)),
        ("type: label_smooth_ce, kwargs: {smooth_ratio: 0.1, ", "type: ce, kwargs: {",
         dict(label_smoothing=0.0)),
        ("type: label_smooth_ce, kwargs: {smooth_ratio: 0.1, ", "type: stce, kwargs: {",
         dict(label_smoothing=0.0)),
        ("type: label_smooth_ce, kwargs: {smooth_ratio: 0.1, ", "type: bce, kwargs: {",
         dict(label_smoothing=0.0, loss="bce")),
        ("in_plane: 512", "dropout: 0.2", dict(dropout=0.2)),
        ("type: solo_bn}", "type: solo_bn}\n      deep_stem: true\n      avg_down: true",
         dict(deep_stem=True, avg_down=True)),
        ("type: torch_color_jitter\n  kwargs:", "type: torch_random_augmentation\n  kwargs: {n: 3,"
         " m: 5}\nother:", dict(randaug_n=3, randaug_m=5.0, randaug_std=0.0,
         randaug_increasing=False, **dict.fromkeys(JITTER, 0.0))),
        ("type: torch_color_jitter\n  kwargs:", "type: torch_randerase\n  kwargs: {mode: rand, "
         "max_count: 3}\nother:", dict(erase_prob=0.5, erase_mode="rand", erase_count=3,
         **dict.fromkeys(JITTER, 0.0))),
        ("pin_memory: true\n", "batch_fn: {type: batch_cutmix, kwargs: {alpha: 0.7}}\n",
         dict(cutmix_alpha=0.7, up_smoothing=True)),
        ("pin_memory: true\n", "batch_fn: {type: batch_cutmixup, kwargs: {switch_prob: 0.3}}\n",
         dict(mixup_alpha=1.0, cutmix_alpha=1.0, switch_prob=0.3, up_smoothing=True)),
        ("*random_resized_crop, *random_horizontal_flip, *pil_color_jitter",
         "*torch_resize, *torch_center_crop",
         dict(crop_scale=[1.0, 1.0], hflip=0.0, **dict.fromkeys(JITTER, 0.0))),
    ],
)  # fmt: skip
def test_a_value_arrives_in_its_knob(old, new, options):
    assert config().count(old) >= 1
    text = config().replace(old, new)
    found = united_perception.loads(text, gpus=4)
    plain = united_perception.loads(config(), gpus=4).recipe.model_dump()
    got = found.recipe.model_dump()
    assert {k: v for k, v in got.items() if v != plain[k]} == {
        k: v for k, v in options.items() if v != plain[k]
    }


def test_a_merged_block_has_the_keys_of_its_anchor_and_its_own():
    text = "optimizer:\n  type: SGD\n  kwargs: &k {lr: 0.5, momentum: 0.8}\n"
    text += "ema:\n  enable: true\n  kwargs: {<<: *k, decay: 0.99}\n"
    assert changed(text) == dict(lr=0.5, momentum=0.8, ema_decay=0.99)
    assert changed(text.replace("<<: *k", "<<: [*k, {decay: 0.5}]"))["ema_decay"] == 0.99
    text = text.replace("<<: *k, decay: 0.99", "<<: [{decay: 0.9}, {decay: 0.8}]")
    assert changed(text)["ema_decay"] == 0.9  # of several the first, as YAML has it
    assert "wants a mapping" in refused("ema: {<<: 3}")


def test_absolute_paths_start_from_the_folder_they_share():
    text = "dataset: {{kwargs: {{meta_file: {}, image_reader: {{kwargs: {{image_dir: {}}}}}}}}}"
    for files, roots, base, lists, below in [
        ("/data/l/a.txt", "''", "/data/l", ["a.txt"], ["train"]),
        ("/data/a.txt", "/data", "/data", ["a.txt"], ["."]),
        ("[/d/a.txt, /d/x/b.txt]", "[/d/p, /d/x//q/]", "/d", ["a.txt", "x/b.txt"], ["p", "x/q"]),
        ("/data/a.txt", "/", "", ["/data/a.txt"], ["/"]),
        ("//data/a.txt", "images", "", ["/data/a.txt"], ["images"]),
    ]:
        recipe = united_perception.loads(text.format(files, roots)).recipe
        assert (recipe.data_dir, recipe.train_list, recipe.train_root) == (base, lists, below)


@pytest.mark.parametrize("most, wanted", [(5.0, 1.0), (0.5, 0.5)])
def test_lamb_clips_to_the_smaller_of_two_norms(most, wanted):
    hook = f"  - {{type: grad_clipper, kwargs: {{max_norm: {most}}}}}"
    assert changed(config(optimizer=LAMB(0.01), extra=hook))["clip_grad_norm"] == wanted


@pytest.mark.parametrize(
    "groups, decay_norm_and_bias",
    [
        ("pconfig: {bn_b: {weight_decay: 0.0}}", False),
        ("pconfig: {bn_b: {kwargs: {weight_decay: 0}}}", False),
        ("pconfig: {nodecay: [bias]}", False),
        ("kwargs: {lr: 1, pconfig: [{ln_w: {weight_decay: 0.0}}]}", False),
        ("special_param_group: [{key: bias, weight_decay: 0.0}]", False),
        ("pconfig: {bn_b: {weight_decay: 0.1}}", True),
        ("pconfig: {bn_b: {lr: 0.1}}", True),
        ("pconfig: {linear_w: {weight_decay: 0.0}, layer_decay: {value: 0.8}}", True),
        ("special_param_group: [{key: head, lr: 0.1}]", True),
    ],
)
def test_groups_without_decay_become_decay_all(groups, decay_norm_and_bias):
    more = "" if groups.startswith("kwargs") else "kwargs: {lr: 1, weight_decay: 0.1}, "
    found = united_perception.loads(f"optimizer: {{type: AdamW, {more}{groups}}}")
    assert found.recipe.decay_norm_and_bias is decay_norm_and_bias
    told = [n for n in found.notes if n.kind == MISSING and "see decay_norm_and_bias" in n.text]
    assert bool(told) is decay_norm_and_bias


def test_ema_that_is_not_enabled_is_off():
    found = united_perception.loads(EMA.format(0.99).replace("true", "false"))
    assert found.recipe == Recipe() and said(found, "ema", NOTHING) == "enable is false"


@pytest.mark.parametrize(
    "more, where, words",
    [
        ("ema_type: exp", "ema.ema_type", "1 - exp"),
        ("kwargs: {decay: 0.99, inner_T: 5}", "ema.kwargs.inner_T", "every step here"),
        ("kwargs: {decay: 0.99, warmup: 10}", "ema.kwargs.warmup", "lower at first"),
    ],
)
def test_forms_of_ema_that_differ_are_told(more, where, words):
    assert words in said(united_perception.loads(f"ema: {{enable: true, {more}}}"), where, MISSING)
    plain = "ema: {enable: true, ema_type: linear, kwargs: {decay: 0.9, inner_T: 1, warmup: 1}}"
    assert said(united_perception.loads(plain), where, MISSING) == ""


# ---- distillation and deployment


MIMIC = """
mimic:
  {}
  teacher: {{mimic_name: {}, teacher_weight: t.pth}}
  student: {{mimic_name: {}}}
"""


def learnt(job="loss_weight: 1.0", ours="[head.classifier]", theirs=None, more="", **options):
    """What is found in a mimic block, of one teacher that has weights."""
    text = MIMIC.format(job, theirs or ours, ours)
    return united_perception.loads(text + textwrap.dedent(more), **options)


def cfgs(kind: str, kwargs: str = "") -> str:
    return f"cfgs: {{loss: {{type: {kind}, kwargs: {{{kwargs}}}}}}}"


def distils(found) -> dict:
    """The options of distillation that differ from their defaults, without the teacher's name."""
    parts = ("distill_pairs", "kd_", "teacher_", "temperature", "task_weight")
    return {k: v for k, v in found.recipe.non_default().items() if k.startswith(parts)}


def test_a_file_without_a_teacher_has_no_knob_of_distillation():
    assert distils(read("plain")) == {} and read("plain").recipe.teacher == []
    assert read("plain").deployment is None and said(read("plain"), "mimic") == ""


@pytest.mark.parametrize(
    "job, loss, note",
    [
        # the last version: cfgs, an L2 loss without them
        ("loss_weight: 1.0", "l2_normalized", ""),
        (cfgs("kl_loss"), "up_kl", ""),
        (cfgs("kd_loss"), "kl", ""),
        (cfgs("ce_loss"), "ce", ""),
        (cfgs("l2_loss"), "l2_normalized", ""),
        (cfgs("l2_loss", "feat_norm: true, batch_mean: true"), "l2_normalized", ""),
        (cfgs("l2_loss", "feat_norm: false, batch_mean: false"), "l2", ""),
        (cfgs("l2_loss", "feat_norm: false"), "l2", "images, not elements: multiply"),
        (cfgs("l2_loss", "batch_mean: false"), "l2_normalized", "elements, not images: divide"),
        (cfgs("gkd_loss"), "kl", "no counterpart of gkd_loss; kl is taken"),
        (cfgs("kdd_loss"), "kl", "the nearest is 'kd_loss'"),
        (cfgs("bce_loss"), "kl", "no counterpart of bce_loss"),
        (cfgs("kl_loss", "norm: softmax"), "up_kl", ""),
        (cfgs("kl_loss", "norm: l2"), "up_kl", "a softmax is compared"),
        # the page's, a KL unless it says otherwise
        ("mimic_name: a", "up_kl", ""),
        *[(f"mimic_type: {k}", v, "") for k, v in
          {"kl": "up_kl", "kd": "kl", "ce": "ce", "l2": "l2_normalized"}.items()],
        ("mimic_type: kl\n  mimic_norm: true", "up_kl", ""),
        ("mimic_ins_type: base", "l2_normalized", ""),
        ("mimic_ins_type: DeFeat", "l2_normalized", "for detection"),
    ],
)  # fmt: skip
def test_a_mimic_loss_is_one_of_ours(job, loss, note):
    found = learnt(job)
    assert found.recipe.teacher == ["t.pth"] and distils(found) == {"kd_loss": [loss]}
    told = "\n".join(
        n.text for n in found.notes if n.kind == MISSING and n.where != "teacher[0].type"
    )
    assert (note in told) if note else told == ""
    old, where = "_type" in job.replace("ins_type", "") or "_name" in job, "mimic"
    assert ("L2 loss of normalised logits" in said(found, where)) == old
    for where in ("mimic.mimic_type", "mimic.cfgs.loss.type"):
        if "kl" in job and where in {n.where for n in found.notes}:
            assert "negative logits count as 0" in said(found, where)


def test_weights_of_a_mimic_multiply_and_are_shared_by_its_pairs():
    job = cfgs("kd_loss", "T: 2, loss_weight: 3.0") + "\n  loss_weight: 0.5"
    found = distils(learnt(job))
    assert found == {"kd_loss": ["kl"], "kd_weight": [1.5], "temperature": 2.0}
    found = learnt("loss_weight: 3.0", ours="[backbone.layer3, backbone.layer4, head.classifier]")
    assert found.recipe.distill_pairs == ["layer3 -> layer3", "layer4 -> layer4", "logits"]
    assert found.recipe.kd_weight == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "ours, theirs, mimic, told",
    [
        ("[head.classifier]", "[head.classifier]", "logits", False),
        ("head.classifier", "[head.classifier]", "logits", False),
        ("[backbone.layer4]", "[backbone.layer3]", "layer4 -> layer3", False),
        ("[backbone.layer4.1.conv2]", "[backbone.layer4]", "layer4.1.conv2 -> layer4", False),
        ("[neck_adapt.conv.0.0]", "[backbone.layer4]", "neck_adapt.conv.0.0 -> layer4", True),
        ("[backbone.layer4]", "[backbone.layers.3]", "layer4 -> layers.3", True),
        ("[backbone.layer0]", "[backbone.layer0]", "layer0 -> layer0", True),
    ],
)
def test_a_module_has_timms_name_or_is_told(ours, theirs, mimic, told):
    found = learnt(ours=ours, theirs=theirs)
    assert found.recipe.distill_pairs == [mimic]
    notes = [n for n in found.notes if n.kind == MISSING and n.where.endswith("mimic_name[0]")]
    assert all("adapter comes by itself" in n.text for n in notes) and bool(notes) == told


def test_modules_are_compared_by_l2_alone():
    found = learnt(cfgs("kd_loss", "T: 4"), ours="[backbone.layer4, head.classifier]")
    assert found.recipe.kd_loss == ["l2_normalized", "kl"] and found.recipe.temperature == 4
    words = "kl compares logits; l2_normalized is taken for layer4"
    assert words in said(found, "mimic.cfgs.loss.type", MISSING)


def test_what_is_taken_for_a_loss_keeps_its_temperature():
    assert learnt(cfgs("gkd_loss", "T: 4")).recipe.temperature == 4
    text = MIMIC.format(cfgs("kd_loss", "T: 0"), "[head.classifier]", "[head.classifier]")
    assert "line 3: mimic.cfgs.loss.kwargs.T is 0; wanted a number, above 0" in refused(text)


@pytest.mark.parametrize(
    "kind, flags, model, told",
    [
        ("resnet152", "", "resnet152", False),
        ("resnet152", "deep_stem: true, avg_down: true", "resnet152d", False),
        ("resnet50", "deep_stem: true, avg_down: true", "resnet50d", False),
        ("resnet152", "deep_stem: true, avg_down: false", "resnet152", True),
        ("resnet152", "avg_down: true", "resnet152", True),
        ("resnet101_D", "deep_stem: true", "resnet101d", False),
        ("resnet101_D", "", "resnet101", True),
        ("regnety_6400m", "", "regnety_064", False),
        ("cswin_tiny", "", "cswin_tiny", True),
    ],
)
def test_a_teacher_has_timms_name(kind, flags, model, told):
    net = (
        f"teacher:\n  - {{name: backbone, type: {kind}, kwargs: {{frozen_layers: [1], {flags}}}}}\n"
    )
    found = learnt(more=net)
    assert found.recipe.teacher_model == [model] and timm.is_model(model) != (model == "cswin_tiny")
    assert any("timm has no" in n.text for n in found.notes if n.kind == MISSING) == told
    assert found.recipe.freeze == [] and "here they are trained" not in found.summary()


def test_a_teacher_without_weights_is_to_be_named_first(tmp_path):
    text = config(extra=KD_NEW.replace(", teacher_weight: teacher.pth", ""))
    text = text.replace("task_names: cls", "runner: {type: kd}")
    found = united_perception.loads(text, gpus=16)
    assert found.recipe == read("kd").recipe.replace(teacher=["name-the-teacher"])
    first = found.params().splitlines()[1:3]
    assert first[0] == f"# {MISSING}:" and "mimic.teacher: no teacher_weight" in first[1]
    assert "random weights" in said(found, "mimic.teacher", MISSING)


def test_a_teacher_without_a_network_in_the_text_has_no_model():
    found = learnt()
    assert found.recipe.teacher_model == []
    assert "say timm's" in said(found, "teacher[0].type", MISSING)


def test_a_network_that_no_mimic_learns_from_is_no_knob():
    text = KD + "  - {name: post_process, kwargs: {cls_loss: {type: bce}}}\n"
    found = united_perception.loads(text + "num_classes: 7\nteacher_bn_mode: train\n")
    assert found.recipe == Recipe() and "no counterpart" in said(found, "teacher[2]", MISSING)
    assert "no mimic in this text learns from it" in said(found, "teacher", MISSING)
    found = learnt(more=KD.replace("*num_classes", "5").replace("teacher:", "teacher_b:"))
    assert found.recipe.teacher == ["t.pth"]
    assert "no mimic in this text learns from it" in said(found, "teacher_b", MISSING)


def test_several_jobs_teach_with_several_teachers():
    text = """
mimic:
  mimic_as_jobs: true
  mimic_job0:
    loss_weight: 2.0
    warm_up_iters: 40
    teacher0: {mimic_name: [backbone.layer3, head.classifier], teacher_weight: x.pth}
    student: {mimic_name: [backbone.layer4, head.classifier]}
    cfgs: {loss: {type: kd_loss, kwargs: {T: 4}}}
  mimic_job1:
    warm_up_iters: 60
    teacher1: {mimic_name: [head.classifier], teacher_weight: y.pth, teacher_bn_mode: train}
    student: {mimic_name: [head.classifier]}
    cfgs: {loss: {type: ce_loss, kwargs: {T: 2, loss_weight: 0.5}}}
"""
    for key, model in (("teacher0", "resnet50"), ("teacher1", "resnet101")):
        text += f"{key}: [{{name: backbone, type: {model}}}]\n"
    text += "dataset: {batch_sampler: {kwargs: {batch_size: 100}}}"
    found = united_perception.loads(text, train_images=1000)
    assert found.recipe.teacher == ["x.pth", "y.pth"]
    assert distils(found) == {
        "teacher_model": ["resnet50", "resnet101"],
        "distill_pairs": ["layer4 -> teacher1:layer3", "logits -> teacher1:logits",
                  "logits -> teacher2:logits"],
        "kd_loss": ["l2_normalized", "kl", "ce"],
        "kd_weight": [1.0, 1.0, 0.5],
        "temperature": 4.0,
        "kd_warmup_epochs": 4.0,
    }  # fmt: skip
    assert found.origin["teacher"].where == "mimic.mimic_job0.teacher0.teacher_weight"
    assert said(found, "mimic.mimic_job1.cfgs.loss.kwargs.T", MISSING).startswith("2; all share")
    assert said(found, "mimic.mimic_job1.warm_up_iters", MISSING).startswith("6; all share")
    where = "mimic.mimic_job1.teacher1.teacher_bn_mode"
    assert "eval mode" in said(found, where, MISSING)
    found = united_perception.loads(text.replace("mode: train", "mode: eval"), train_images=1000)
    assert said(found, where, TAKEN) == "'eval'"
    for there, instead in (
        ("[backbone.layer3, head.classifier]", "[backbone.layer3]"),
        ("[head.classifier], teacher_weight: y", "[], teacher_weight: y"),
    ):
        assert "wanted pairs" in refused(text.replace(there, instead))


def test_a_teacher_sees_what_the_student_sees():
    """As the weights file of a teacher does without a word; UP hands both the same batch."""
    recipe = read("kd").recipe
    assert recipe.teacher_image_size == recipe.teacher_mean == recipe.teacher_std == []


def test_a_misspelt_key_of_a_mimic_names_the_nearest():
    found = learnt("warmup_iters: 400\n  teacher_weigth: t.pth")
    assert "the nearest is 'warm_up_iters'" in said(found, "mimic.warmup_iters", MISSING)


def test_a_mimic_without_modules_is_refused():
    assert "0 modules of the student, 0 of teacher" in refused(MIMIC.format("a: 1", "[]", "[]"))


def test_two_teachers_of_one_job_are_told_apart():
    more = ", teacher_b: {mimic_name: [head.classifier], teacher_weight: u.pth}"
    found = united_perception.loads(
        "mimic: {student: {mimic_name: [head.classifier]}, teacher_a: {mimic_name:"
        f" [head.classifier], teacher_weight: t.pth}}{more}}}"
    )
    assert found.recipe.teacher == ["t.pth", "u.pth"]
    assert found.recipe.distill_pairs == ["logits -> teacher1:logits", "logits -> teacher2:logits"]


def test_the_climb_of_a_mimic_is_in_epochs():
    more = "dataset: {batch_sampler: {kwargs: {batch_size: 64}}}\ntrainer: {max_epoch: 9}\n"
    found = learnt("warm_up_iters: 400", more=more, gpus=2, train_images=12_800)
    assert found.recipe.kd_warmup_epochs == 4.0
    assert learnt("warm_up_iters: -1", more=more).recipe.kd_warmup_epochs == 0
    found = learnt("warm_up_iters: 400")
    assert found.recipe.kd_warmup_epochs == 0
    assert "say kd_warmup_epochs" in said(found, "mimic.warm_up_iters", MISSING)
    assert "never reach the whole loss (mimic.warm_up_iters)" in refused(
        MIMIC.format("warm_up_iters: 900000", "[head.classifier]", "[head.classifier]") + more
    )


def test_without_a_task_loss_the_teacher_alone_is_heard():
    found = learnt("task_loss: false", more="net: [{kwargs: {cls_loss: {type: bce}}}]")
    assert found.recipe.task_weight == 0 and found.recipe.loss == "ce"
    assert "task_weight is 0.0" in said(found, "net[0].kwargs.cls_loss.type", NOTHING)
    assert learnt("task_loss: true").recipe.task_weight == 1
    text = MIMIC.format("task_loss: false", "[backbone.layer4]", "[backbone.layer4]")
    assert "nothing would train the classifier (mimic.task_loss)" in refused(text)


def test_the_student_starts_from_what_the_saver_names_first():
    student = ["[head.classifier]", "[head.classifier], student_weight: s.pth"]
    text = MIMIC.format("loss_weight: 1.0", *student)
    assert united_perception.loads(text).recipe.weights == "s.pth"
    found = united_perception.loads(text + "saver: {pretrain_model: p.pth}")
    assert found.recipe.weights == "p.pth"
    assert "saver.pretrain_model" in said(found, "mimic.student.student_weight", NOTHING)


# ---- what stays as it is, and what learns less


@pytest.mark.parametrize(
    "layers, freeze",
    [("[]", []), ("[0]", ["conv1", "bn1"]), ("[0, 1, 3]", ["conv1", "bn1", "layer1", "layer3"])],
)
def test_frozen_layers_are_modules_of_a_resnet(layers, freeze):
    found = united_perception.loads(config(options=f"frozen_layers: {layers}"))
    assert found.recipe.freeze == freeze
    assert said(found, "net[0].kwargs.frozen_layers", MISSING) == ""
    found = united_perception.loads(
        config(backbone="swin_tiny", options=f"frozen_layers: {layers}")
    )
    assert bool(said(found, "net[0].kwargs.frozen_layers", MISSING)) == bool(freeze)


def test_layer_decay_has_the_lr_of_the_last_layer():
    text = "optimizer: {type: AdamW, kwargs: {lr: 0.001}, pconfig: {layer_decay:"
    text += " {type: vit_base, value: 0.65, base_lr: 0.002}}}"
    found = united_perception.loads(text)
    assert (found.recipe.layer_decay, found.recipe.lr) == (0.65, 0.002)
    assert said(found, "optimizer.pconfig.layer_decay.type") == ""
    found = united_perception.loads(text.replace("vit_base", "swin"))
    assert "vit_base alone" in said(found, "optimizer.pconfig.layer_decay.type")


KESTREL = """
to_kestrel:
  toks_type: cls
  plugin: classifier
  model_name: model
  version: 1.0
  resize_hw: 224x256
  pixel_means: [123.675, 116.28, 103.53]
  pixel_stds: [58.395, 57.12, 57.375]
  is_rgb: True
  save_all_label: True
  type: 'UNKNOWN'
  class_label: {imagenet: {calculator: bypass, labels: [cat, 7]}}
"""


def test_the_deployment_block_is_checked_and_given_back():
    found = united_perception.loads(KESTREL)
    wanted = yaml.safe_load(KESTREL)["to_kestrel"]
    wanted |= {"version": "1.0", "resize_hw": [224, 256]}
    wanted["class_label"]["imagenet"]["labels"] = ["cat", "7"]
    assert found.deployment == wanted and found.recipe == Recipe()
    assert not [note for note in found.notes if note.kind != TAKEN]


@pytest.mark.parametrize(
    "old, new, where, words",
    [
        ("toks_type: cls", "toks_type: det", "toks_type", "classifier"),
        ("plugin: classifier", "", "plugin", "missing"),
        ("is_rgb: True", "is_rgb: False", "is_rgb", "RGB"),
        ("type: 'UNKNOWN'", "add_softmax: True", "add_softmax", "twice"),
        ("[123.675, 116.28, 103.53]", "[127.5, 127.5, 127.5]", "pixel_means", "123.675"),
    ],
)
def test_a_deployment_block_that_would_mislead_is_told(old, new, where, words):
    text = config(extra=KESTREL.replace(old, new))
    assert words in said(united_perception.loads(text), f"to_kestrel.{where}")


@pytest.mark.parametrize(
    "old, new",
    [
        ("224x256", "large"),
        ("224x256", "[224]"),
        ("is_rgb: True", "is_rgb: 'yes'"),
        ("[58.395, 57.12, 57.375]", "[58.395]"),
        ("labels: [cat, 7]", "names: [cat]"),
        ("plugin: classifier", "plugin: [a]"),
    ],
)
def test_a_deployment_block_of_wrong_types_is_refused(old, new):
    assert "to_kestrel." in refused(KESTREL.replace(old, new))


# ---- what UP's code does where its file reads otherwise


def told(found, *kinds: str) -> str:
    """Every note of these kinds, a line each with its place."""
    return "\n".join(f"{n.where}: {n.text}" for n in found.notes if n.kind in kinds)


def test_max_iter_wins_over_max_epoch():
    sampler = "dataset: {batch_sampler: {kwargs: {batch_size: 100}}}\n"
    text = "trainer: {max_epoch: 10, max_iter: 3000}\n"
    found = united_perception.loads(sampler + text, train_images=100_000)
    assert found.recipe.epochs == 3
    assert "max_iter" in said(found, "trainer.max_epoch")
    found = united_perception.loads(sampler + text, train_images=200_000)  # 1.5 epochs
    assert found.recipe.epochs == 2
    assert "3,000 steps are 1.50 epochs of 2,000" in said(found, "trainer.max_iter", MISSING)
    assert "say epochs" in said(united_perception.loads(text), "trainer.max_iter", MISSING)


@pytest.mark.parametrize(
    "mixup, cutmix, switch, cut, mixed",  # shares of the batches, as UP draws them
    [
        (0, 1.0, 0.3, 0.3, 0.0),
        (0.8, 0, 0.3, 0.0, 0.7),
        (0.8, 1.0, 0.3, 0.3, 0.7),
        (0, 1.0, 1, 1, 0),
    ],
)
def test_the_way_of_mixing_whose_alpha_is_0_leaves_its_batches_unmixed(
    mixup, cutmix, switch, cut, mixed
):
    kwargs = f"mixup_alpha: {mixup}, cutmix_alpha: {cutmix}, switch_prob: {switch}"
    found = changed(f"a: {{type: batch_cutmixup, kwargs: {{{kwargs}}}}}")
    recipe = Recipe(**found)
    mix = augmentation.MixupCutmix(
        recipe.mixup_alpha, recipe.cutmix_alpha, recipe.switch_prob, prob=recipe.mix_prob
    )
    draws = [mix.sample_params(np.random.default_rng(seed), 2, 224) for seed in range(1000)]
    boxes = np.mean([bool(d["boxes"].any()) for d in draws])
    others = np.mean([not d["boxes"].any() and d["lam"][0] < 1 for d in draws])
    assert boxes == pytest.approx(cut, abs=0.05) and others == pytest.approx(mixed, abs=0.05)


def test_a_resize_to_a_height_and_a_width_is_told():
    text = "torch_resize: {type: torch_resize, kwargs: {size: [256, 256]}}"
    found = united_perception.loads(text)
    assert "256 x 256 whatever the shape" in said(found, "torch_resize.kwargs.size", MISSING)
    found = united_perception.loads(text.replace("[256, 256]", "256"))
    assert told(found, MISSING) == ""


@pytest.mark.parametrize(
    "group, where",
    [
        ("special_param_group: [{key: bias, weight_decay: 0.0, lr: 0.2}]",
         "optimizer.special_param_group[0].lr"),
        ("pconfig: {bn_b: {weight_decay: 0.0, lr: 0.2}}", "optimizer.pconfig.bn_b.lr"),
        ("pconfig: {bn_b: {kwargs: {weight_decay: 0.0, lr: 0.2}}}",
         "optimizer.pconfig.bn_b.kwargs.lr"),
    ],
)  # fmt: skip
def test_the_lr_of_a_group_is_told(group, where):
    text = f"optimizer: {{type: SGD, kwargs: {{lr: 0.1, weight_decay: 0.1}}, {group}}}"
    found = united_perception.loads(text)
    assert found.recipe.lr == 0.1 and not found.recipe.decay_norm_and_bias
    assert "not reproduced" in said(found, where, MISSING)
    assert told(united_perception.loads(text.replace(", lr: 0.2", "")), MISSING) == ""


def test_a_group_that_decay_all_does_not_spare_is_told():
    text = "optimizer: {type: SGD, kwargs: {lr: 0.1, weight_decay: 0.1}, special_param_group:"
    found = united_perception.loads(f"{text} [{{key: head, weight_decay: 0.0}}]}}")
    assert found.recipe.decay_norm_and_bias
    assert "no counterpart" in said(found, "optimizer.special_param_group[0]", MISSING)


def backbone(kind: str, kwargs: str = ""):
    return united_perception.loads(f"net: [{{name: backbone, type: {kind}, kwargs: {{{kwargs}}}}}]")


def test_a_swin_is_what_its_arguments_say_and_not_its_name():
    found = backbone("swin_small")
    assert found.recipe.model == "swin_tiny_patch4_window7_224" and found.recipe.drop_path == 0.2
    assert "not by name: Swin tiny" in said(found, "net[0].type")


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_a_swins_arguments_that_are_its_models_are_no_finding(size):
    model = f"swin_{size}_patch4_window7_224"
    with torch.device("meta"):
        stages = timm.create_model(model).layers
    width, depths = stages[0].dim, [len(stage.blocks) for stage in stages]
    heads = [stage.blocks[0].attn.num_heads for stage in stages]
    found = backbone(
        f"swin_{size}",
        f"embed_dim: {width}, depths: {depths}, num_heads: {heads}, drop_path_rate: 0.3",
    )
    assert (found.recipe.model, found.recipe.drop_path) == (model, 0.3)
    assert told(found, MISSING, DEFECT) == ""


@pytest.mark.parametrize("kind", ["vit_b16_224", "deit_small"])
def test_a_vit_drops_where_the_file_does_not_say(kind):
    found = backbone(kind)
    assert found.recipe.drop_path == 0.1 and found.recipe.dropout == 0
    for words in ("attention dropout", "0.1", "drop path", "not reproduced"):
        assert words in said(found, "net[0].type", MISSING)
    found = backbone(kind, "drop_path: 0.3, attention_dropout: 0.2")
    assert found.recipe.drop_path == 0.3
    assert "attention_dropout 0.2" in said(found, "net[0].type", MISSING)


@pytest.mark.parametrize("kind", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_batch_norms_that_up_freezes_are_told(kind):
    where = "net[0].kwargs.normalize"
    assert "freezes every batch norm" in said(backbone(kind), where)
    assert said(backbone(kind, "normalize: {type: solo_bn}"), where) == ""
    assert said(backbone("convnext_tiny"), where) == ""


def test_a_mimic_reads_the_slot_loss_alone():
    found = learnt("cfgs: {kd: {type: kd_loss, kwargs: {T: 4.0}}}")
    assert distils(found) == {"kd_loss": ["l2_normalized"]}
    assert "slot `loss` alone" in said(found, "mimic.cfgs.kd")
    found = learnt("cfgs: {kd: {type: ce_loss}, loss: {type: kd_loss, kwargs: {T: 4.0}}}")
    assert distils(found) == {"kd_loss": ["kl"], "temperature": 4.0}


# ---- learning rates by UP's formulas, step by step


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
    found = united_perception.loads(config(**{**slots, **of}), train_images=1280)
    rate = training.lr_schedule(found.recipe, 20)
    return found, [rate(t) for t in range(20 * found.recipe.epochs)]


def gap_said(found) -> float:
    """The largest difference that a note names, in percent of the peak."""
    [percent] = re.findall(r"differs by up to ([\d.]+) % of its peak", told(found, MISSING))
    return float(percent)


def largest(ours: list[float], theirs: list[float]) -> float:
    return 100 * max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / max(ours)


def test_a_milestone_inside_the_warm_up_is_never_applied():
    found, rates = scheduled("MultiStepLR", "milestones: [2, 30], gamma: 0.1", warm=60)
    wanted = slowly(0.4, 2000, 60, 0.25, lambda t, lr: lr * 0.1 if t >= 600 else lr)
    assert rates == pytest.approx(wanted, rel=1e-9)
    assert "[2] inside the warm-up" in said(found, f"{KWARGS}.milestones")
    found, rates = scheduled("MultiStepLR", "milestones: [3, 30], gamma: 0.1", warm=60)
    assert rates[60] == pytest.approx(0.04)  # where the warm-up ends, it is


def test_a_warm_up_of_one_step_stays_where_it_begins():
    found, rates = scheduled("MultiStepLR", "milestones: [30], gamma: 0.1", warm=1)
    assert rates == pytest.approx([0.1] * 600 + [0.01] * 1400, rel=1e-9)
    assert "lr stays at 0.25" in said(found, "trainer.lr_scheduler.warmup_iter")


@pytest.mark.parametrize("warm", [0, 200])
@pytest.mark.parametrize("length", ["max_epoch: 100", "max_epoch: 120", "max_iter: 2400"])
def test_a_polylr_ends_where_up_ends(length, warm):
    kwargs = f"power: 0.9, min_lr: 0.01, {length}"
    found, rates = scheduled("polylr", kwargs, warm)
    assert (found.recipe.schedule, found.recipe.lr_min) == ("polynomial", 0.01)
    total = 2000 if length.endswith("100") else 2400
    theirs = slowly(
        0.4, 2000, warm, 0.25, lambda t, lr: 0.01 + (lr - 0.01) * (1 - t / total) ** 0.9
    )
    if total == 2000 and not warm:
        assert rates == pytest.approx(theirs, rel=1e-9)
        assert "differs by" not in told(found, MISSING)
    else:
        assert gap_said(found) == pytest.approx(largest(rates, theirs), abs=0.1)
    if total == 2400:
        assert f"in UP lr ends at {theirs[-1]:.8g}"[:22] in told(found, DEFECT)
    assert "T_max" not in told(found, MISSING, DEFECT) and "missing" not in told(found, DEFECT)


def test_a_one_cycle_peaks_where_its_file_says():
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
    assert "momentum from 0.95 to 0.85" in told(found, MISSING)


def test_two_randaugments_are_told():
    both = "*random_augmentation, *plain"
    text = config(transformer=f"{CROP_FLIP}, {both}, *to_tensor, *normalize").replace(
        "auto_augmentation:", "plain: &plain {type: torch_random_augmentation, kwargs: {n: 1,"
        " m: 5}}\nauto_augmentation:")  # fmt: skip
    found = united_perception.loads(text)
    where = "dataset.train.dataset.kwargs.transformer"
    assert "every torch_random_augmentation; only the last" in said(found, where, MISSING)
    assert found.recipe.randaug_n == 1


def test_what_stops_up_is_told():
    found, _ = scheduled("CosineLREpochScheduler", "T_max: 100, eta_min: 0.0")
    assert "missing: UP stops" in said(found, f"{KWARGS}.warm_epoch")
    loss = "{type: stce, kwargs: {}}"
    where = "net[2].kwargs.cls_loss.type"
    assert "mixed labels alone" in said(united_perception.loads(config(loss=loss)), where)
    assert said(united_perception.loads(config(loss=loss, batch_fn=MIXUP)), where) == ""


@pytest.mark.parametrize(
    "epochs, warm, kind, own, gap",
    [
        (300, 20, "CosineAnnealingLR", "", 6.3),  # ConvNeXt's: the cosine begins in step 0
        (300, 40, "CosineAnnealingLR", "", 12.95),
        (300, 20, "CosineLREpochScheduler", ", warm_epoch: 20", 0),  # Swin's is reproduced
        (300, 20, "CosineLREpochScheduler", ", warm_epoch: 0", None),
    ],
)
def test_the_largest_difference_of_a_cosine_is_told(epochs, warm, kind, own, gap):
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


# ---- a value without an option is no meaning here at UP's default alone

KWARGS_OF_CLS = "type: cls\n      kwargs:\n"
WITHOUT_OPTION = [  # (in the configuration, where, at its default, as a file may have it)
    (KWARGS_OF_CLS, "dataset.train.dataset.kwargs.label_mapping", "[0, 0]", "[0, 5]"),
    (KWARGS_OF_CLS, "dataset.train.dataset.kwargs.multilabel", "false", "true"),
    ("kwargs: {num_classes: *num_classes, ", "net[1].kwargs.classifier_cfg", "{type: linear}",
     "{type: norm_linear}"),
    ("kwargs: {smooth_ratio: 0.1, ", "net[2].kwargs.cls_loss.kwargs.loss_weight", "1.0", "0.5"),
    ("kwargs: {lr: 0.01, ", "trainer.optimizer.kwargs.betas", "[0.9, 0.999]", "[0.9, 0.95]"),
    ("kwargs: {lr: 0.01, ", "trainer.optimizer.kwargs.eps", "0.000001", "0.1"),
    ("kwargs: {lr: 0.01, ", "trainer.optimizer.kwargs.bias_correction", "true", "false"),
    ("kwargs: {lr: 0.01, ", "trainer.optimizer.kwargs.grad_averaging", "true", "false"),
    ("kwargs: {lr: 0.4, ", "trainer.optimizer.kwargs.dampening", "0", "0.1"),
    ("kwargs: {probability: 0.25, ", "rand_erase.kwargs.min_count", "1", "2"),
    ("kwargs: {probability: 0.25, ", "rand_erase.kwargs.min_aspect", "0.3", "0.5"),
    ("kwargs: {probability: 0.25, ", "rand_erase.kwargs.max_area", "", "0.5"),
    ("runtime:\n", "runtime.sync_bn", "false", "true"),
    ("runtime:\n", "runtime.special_bn_init", "false", "true"),
    ("runtime:\n", "runtime.runner", "{type: base}", "{type: sparse}"),
    ("runtime:\n", "runtime.runner", "{type: base}", "{type: quant}"),
    ("out_layers: [4]\n", "net[0].kwargs.initializer", "{method: msra}", "{method: xavier}"),
]  # fmt: skip


@pytest.mark.parametrize("usual", [True, False])
@pytest.mark.parametrize("before, where, default, other", WITHOUT_OPTION)
def test_a_value_that_is_not_ups_default_is_not_reproduced(before, where, default, other, usual):
    text = config(transformer=f"{CROP_FLIP}, *to_tensor, *normalize, *rand_erase")
    text = text.replace("probability: 0.25}", "probability: 0.25, mode: pixel}")
    text = text.replace("      initializer: {method: msra}\n", "")
    if "betas" in where or "eps" in where or where.endswith(("correction", "averaging")):
        text = config(optimizer="{type: LAMB, kwargs: {lr: 0.01, weight_decay: 0.1}}")
    assert text.count(before) >= 1
    line = f"{where.rpartition('.')[2]}: {default if usual else other}"
    indent = re.search(r"\n( *)\S", text[text.index(before) + len(before) - 1 :])
    more = f"{indent[1]}{line}\n" if before.endswith("\n") else f"{line}, "
    found = united_perception.loads(text.replace(before, before + more, 1))
    notes = [n for n in found.notes if n.where.startswith(where) and n.kind == MISSING]
    assert bool(notes) != usual, told(found, MISSING)
    assert usual or "not reproduced" in notes[0].text


def test_a_resize_and_a_centre_crop_in_training_are_told():
    found = united_perception.loads(
        config(transformer="*torch_resize, *torch_center_crop, *to_tensor, *normalize")
    )
    for name in ("torch_resize", "torch_center_crop"):
        assert "crops at random" in said(found, name, MISSING)


def test_two_interpolations_are_told():
    found = united_perception.loads(config(crop=", interpolation: bicubic"))
    assert found.recipe.interpolation == "bicubic"
    assert "one option serves both" in said(found, "torch_resize", MISSING)


def test_a_class_balanced_sampler_and_a_drop_path_have_their_options():
    found = united_perception.loads(edited(("type: dist,", "type: class_balance,")))
    assert found.recipe.class_balanced_sampling == 1.0 and told(found, MISSING) == ""
    found = backbone("convnext_tiny", "drop_path: 0.3")
    assert found.recipe.drop_path == 0.3 and told(found, MISSING) == ""


def test_a_key_in_a_place_where_it_is_not_read_is_not_said_to_be_near_itself():
    found = united_perception.loads(
        config(scheduler=unwarmed("StepLR", "step_size: 9, max_epoch: 5"))
    )
    assert said(found, f"{KWARGS}.max_epoch", MISSING) == "not known here; left out"


# ---- what is taken, with a note, and what is no finding


def net(kind: str, kwargs: str = "", name: str = "backbone") -> str:
    return f"net: [{{name: {name}, type: {kind}, kwargs: {{{kwargs}}}}}]"


def optimizer(more: str) -> str:
    return f"optimizer: {{type: AdamW, kwargs: {{lr: 0.1, weight_decay: 0.1}}, {more}}}"


def transforms(train: str = "*random_resized_crop, *to_tensor", test: str = "") -> str:
    """A training list, or a validation list, of UP's usual transforms."""
    side, names = ("test", test) if test else ("train", train)
    return f"dataset: {{{side}: {{dataset: {{type: cls, kwargs: {{transformer: [{names}]}}}}}}}}"


def loss(kind: str, kwargs: str) -> str:
    return f"net: [{{kwargs: {{cls_loss: {{type: {kind}, kwargs: {{{kwargs}}}}}}}}}]"


def hook(kind: str, kwargs: str) -> str:
    return f"hooks: [{{type: {kind}, kwargs: {{{kwargs}}}}}]"


def schedules(kind: str, kwargs: str) -> str:
    plain = "warmup_register_type: no_scale_lr"
    return f"lr_scheduler: {{{plain}, type: {kind}, kwargs: {{{kwargs}}}}}"


GROUP = "{{type: {}, kwargs: {{weight_decay: 0.0}}}}".format
SOLO = "normalize: {type: solo_bn}"
HEAD = "{name: head, type: base_cls_head, kwargs: {num_classes: 1000}}"
FINDINGS = [  # (text, options of the recipe, kind of the note, where, words in it)
    (optimizer(f"pconfig: {{bn_b: {GROUP('weight')}}}"), {}, DEFECT,
     "optimizer.pconfig.bn_b.type", "no bias is in the group"),
    (optimizer(f"pconfig: {{ln_w: {GROUP('bias')}}}"), {}, DEFECT,
     "optimizer.pconfig.ln_w.type", "no weight is in the group"),
    (optimizer("pconfig: {bn_b: {kwargs: {weight_decay: 0.0}}}"), {"decay_norm_and_bias": False},
     DEFECT,
     "optimizer.pconfig.bn_b.type", "missing"),
    (optimizer("pconfig: {nodecay: [layer4]}"), {"decay_norm_and_bias": True},
     MISSING,
     "optimizer.pconfig.nodecay", "see decay_norm_and_bias"),
    (optimizer("pconfig: {nodecay: [relative_position_bias_table]}"), {"decay_norm_and_bias": True},
     MISSING,
     "optimizer.pconfig.nodecay", "see decay_norm_and_bias"),
    (optimizer("special_param_group: [{key: compose, weight_decay: 0.0}]"),
     {"decay_norm_and_bias": True},
     MISSING, "optimizer.special_param_group[0]", "see decay_norm_and_bias"),
    ("optimizer: {type: SGD, kwargs: {lr: 0.1, maximize: true}}", {}, MISSING,
     "optimizer.kwargs.maximize", "True is not reproduced; False is taken"),
    # networks
    (net("efficientnet_b0", SOLO), {"drop_path": 0.3}, TAKEN, "net[0].type", "UP's default"),
    (net("swin_tiny", "window_size: 14"), {"model": "swin_tiny"}, MISSING, "net[0].type",
     "of these kwargs; choose a model; the nearest is 'swin_tiny_patch4_window7_224'"),
    (net("vit_base"), {}, MISSING, "net[0].type", "the nearest is 'vit_base_patch32_224'"),
    *[(net("resnet50", f"normalize: {{type: {kind}}}"), {"model": "resnet50"}, MISSING,
       "net[0].kwargs.normalize.type", words)
      for kind, words in {"gn": "no counterpart", "ln": "no counterpart", "caffe_freeze_bn":
                          "batch norms are trained", "solo_nb": "nearest is 'solo_bn'"}.items()],
    (net("resnet50", f"{SOLO}, out_layers: [3], out_strides: [16]"), {}, MISSING,
     "net[0].kwargs.out_strides", "the last stage, of stride 32"),
    (net("convnext_tiny", "out_layers: [2]"), {}, MISSING, "net[0].kwargs.out_layers",
     "the last stage"),
    (net("resnet50", f"{SOLO}, nnie: true"), {}, MISSING, "net[0].kwargs.nnie", "not reproduced"),
    (net("mobilenet_v2", f"{SOLO}, c4_output: true"), {}, MISSING, "net[0].kwargs.c4_output",
     "not reproduced"),
    (net("convnext_tiny", "init_value: 0.1"), {}, MISSING, "net[0].kwargs.init_value", "left out"),
    (net("convnext_tiny", "layer_scale: false"), {}, MISSING, "net[0].kwargs.layer_scale",
     "left out"),
    (net("base_cls_haed", "num_classes: 10", "head"), {}, MISSING, "net[0].type",
     "the nearest is 'base_cls_head'"),
    (net("resnet18", SOLO)[:-1] + ", {name: backbone, type: resnet34, kwargs: {}}]",
     {"model": "resnet34"}, MISSING, "net[1]", "second backbone"),
    # losses
    *[(loss(kind, "smooth_ratio: 0.1"), {"label_smoothing": 0.0}, DEFECT,
       "net[0].kwargs.cls_loss.kwargs.smooth_ratio", f"{kind} does not take it")
      for kind in ("ce", "stce", "bce")],
    (loss("label_smooth_ce", "num_classes: 10"), {"label_smoothing": 0.0}, DEFECT,
     "net[0].kwargs.cls_loss.kwargs.smooth_ratio", "missing"),
    (loss("label_smooth_ce", "smooth_ratio: 0.1, num_classes: 10").replace("[", f"[{HEAD}, "),
     {"label_smoothing": 0.1}, MISSING, "net[1].kwargs.cls_loss.kwargs.num_classes",
     "10 is not reproduced; 1000 is taken"),
    # hooks, moving average, runner
    (hook("grad_cliper", "mode: pre_defined, max_norm: 5"), {"clip_grad_norm": None}, MISSING,
     "hooks[0]", "the nearest is 'grad_clipper'"),
    (hook("reload", "group: 4"), {}, MISSING, "hooks[0]", "no counterpart of reload"),
    (hook("grad_clipper", "mode: pre_defined"), {"clip_grad_norm": None}, DEFECT,
     "hooks[0].kwargs.max_norm", "missing"),
    (hook("grad_clipper", "max_norm: 5"), {"clip_grad_norm": 5.0}, DEFECT, "hooks[0].kwargs.mode",
     "missing"),
    ("ema: {enable: true, ema_type: linear}", {"ema_decay": None}, DEFECT, "ema.kwargs.decay",
     "missing"),
    ("ema: {kwargs: {decay: 0.9}}", {"ema_decay": 0.9}, DEFECT, "ema.enable", "missing"),
    ("ema: {enable: true, ema_type: lineer, kwargs: {decay: 0.9}}", {"ema_decay": 0.9}, MISSING,
     "ema.ema_type", "the nearest is 'linear'"),
    ("runtime: {runner: {type: kd}}\n" + net("resnet18", SOLO), {"teacher": []}, DEFECT, "mimic",
     "kd and a mimic"),
    ("fp16: {enable: true}", {"precision": "fp32"}, DEFECT, "fp16", "it trained in fp32"),
    # data
    (transforms("*random_horizontal_flip, *to_tensor"), {}, MISSING,
     "dataset.train.dataset.kwargs.transformer", "no torch_random_resized_crop: UP trains on the"),
    (transforms(test="*torch_center_crop, *to_tensor"), {}, MISSING,
     "dataset.test.dataset.kwargs.transformer", "no torch_resize: UP crops the image as it is"),
    (transforms(test="*torch_resize, *to_tensor"), {}, MISSING,
     "dataset.test.dataset.kwargs.transformer", "no torch_center_crop"),
    (transforms(test="*torch_resize, {type: torch_resize, kwargs: {size: 320}}"),
     {"val_resize": 320}, MISSING, "dataset.test.dataset.kwargs.transformer", "only the last"),
    ("a: {type: torch_random_augmentation, kwargs: {n: 2}}", {"randaug_n": 2}, DEFECT,
     "a.kwargs.m", "missing"),
    ("a: {type: torch_color_jitter, kwargs: {brightness: 0.2, contrast: 0.2}}", {}, DEFECT,
     "a.kwargs.saturation", "missing"),
    ("a: {type: torch_color_jitter, kwargs: {brightness: 1.5, contrast: 0.2, saturation: 0.2}}",
     {"brightness": 0.0, "contrast": 0.2}, MISSING, "a.kwargs.brightness", "left out"),
    ("a: {type: batch_mixup, kwargs: {alpha: -1}}", {"mixup_alpha": 0.0}, MISSING,
     "a.kwargs.alpha", "left out"),
    ("a: {type: torch_randerase, kwargs: {mode: Pixel}}", {"erase_mode": "pixel"}, MISSING,
     "a.kwargs.mode", "left out"),
    ("a: {type: torch_random_resized_crop}", {}, DEFECT, "a.kwargs.size", "missing"),
    (transforms().replace("type: cls", "type: coco"), {}, MISSING, "dataset.train.dataset.type",
     "cls is taken"),
    (transforms().replace("kwargs: {", "kwargs: {meta_type: imagnet, "), {}, MISSING,
     "dataset.train.dataset.kwargs.meta_type", "the nearest is 'imagenet'"),
    (transforms().replace("kwargs: {", "kwargs: {reload_cfg: {group: 4}, "), {}, MISSING,
     "dataset.train.dataset.kwargs.reload_cfg", "left out"),
    ("dataset: {train: {batch_sampler: {type: bsae}}}", {}, MISSING,
     "dataset.train.batch_sampler.type", "the nearest is 'base'"),
    ("dataset: {train: {batch_sampler: {kwargs: {sampler: {type: local}}}}}", {}, MISSING,
     "dataset.train.batch_sampler.kwargs.sampler.type", "the whole list"),
    ("dataset: {dataloader: {kwargs: {batch_fn: {type: batch_mixup}}}, train: {dataloader: {kwargs:"
     " {batch_fn: {type: batch_cutmix}}}}}", {"cutmix_alpha": 1.0, "mixup_alpha": 0.0}, DEFECT,
     "dataset.dataloader", "dataset.train.dataloader alone"),
    # schedules
    (schedules("StepLR", "gamma: 0.5"), {"schedule": "constant"}, DEFECT,
     "lr_scheduler.kwargs.step_size", "missing"),
    (schedules("MultiStepLR", "gamma: 0.5"), {"schedule": "constant"}, DEFECT,
     "lr_scheduler.kwargs.milestones", "missing"),
    (schedules("StepLR", "step_size: [30, 60]"), {}, DEFECT, "lr_scheduler.kwargs.step_size",
     "wants one number"),
    (schedules("OneCycleLR", "max_epoch: 9"), {"lr": 0.1}, DEFECT, "lr_scheduler.kwargs.max_lr",
     "missing"),
    (schedules("polylr", "power: 1.0"), {"schedule": "polynomial"}, DEFECT,
     "lr_scheduler.kwargs.max_epoch", "UP takes -1, so lr grows"),
    ("lr_scheduler: {warmup_iters: 9}", {}, MISSING, "lr_scheduler.warmup_iters",
     "the nearest is 'warmup_iter'"),
]  # fmt: skip


@pytest.mark.parametrize("text, options, kind, where, words", FINDINGS)
def test_what_up_does_otherwise_or_what_is_left_out_is_told(text, options, kind, where, words):
    found = united_perception.loads(text, gpus=8)
    assert {k: v for k, v in found.recipe.model_dump().items() if k in options} == options
    assert words in said(found, where, kind), told(found, MISSING, DEFECT, NOTHING)


@pytest.mark.parametrize(
    "text, options",
    [
        (optimizer(f"pconfig: {{bn_b: {GROUP('bias')}, bn_w: {GROUP('weight')}}}"),
         {"decay_norm_and_bias": False}),
        (optimizer(f"pconfig: {{nodecay: [relative_position_bias_table], ln_b: {GROUP('bias')}}}"),
         {"decay_norm_and_bias": False}),
        (optimizer("pconfig: {nodecay: [ndim_is1]}"), {"decay_norm_and_bias": False}),
        ("a: {type: torch_auto_augmentation, kwargs: {size: 224, scale: [0.08, 1]}}",
         {"autoaugment": True}),
        (net("mobilenet_v2", f"{SOLO}, out_strides: [32], c4_output: false"),
         {"model": "mobilenetv2_100"}),
        (net("resnet50", f"{SOLO}, nnie: false, out_layers: [4], out_strides: [32]"), {}),
        (net("swin_base_384", swin_kwargs(128, 18, 4).replace("\n", ", ").rstrip(" ,")
             + ", window_size: 12, pretrain_img_size: 384"),
         {"model": "swin_base_patch4_window12_384"}),
        (net("efficientnet_b0", f"{SOLO}, override_params: {{drop_connect_rate: 0.2}}"),
         {"drop_path": 0.2}),
        ("optimizer: {type: SGD, kwargs: {lr: 0.1, maximize: false}}", {}),
        (hook("memory_checkpoint", "enable: true"), {}),
        ("runtime: {fp16: true}", {"precision": "auto"}),
    ],
)  # fmt: skip
def test_what_is_as_in_up_is_no_finding(text, options):
    found = united_perception.loads(text)
    assert told(found, MISSING, DEFECT) == ""
    assert {k: v for k, v in found.recipe.model_dump().items() if k in options} == options


def test_a_configuration_without_fp16_trains_in_fp32():
    assert united_perception.loads(config()).recipe.precision == "fp32"
    half = config(runtime="  fp16: true")
    assert united_perception.loads(half).recipe.precision == "auto"


def test_a_text_without_batch_size_or_network_says_what_is_taken_for_them():
    found = united_perception.loads("optimizer: {type: SGD, kwargs: {lr: 0.1}}", gpus=32)
    said = {note.where: note.text for note in found.notes}
    assert "no batch size in this text" in said["--gpus"]
    assert said["--set batch_size"] == f"not in this text, {found.recipe.batch_size} is taken"
    assert said["--set model"] == f"not in this text, {found.recipe.model} is taken"
    assert "--set batch_size" in found.summary() and "--set model" in found.params()
    slots, gpus, _ = FAMILIES["resnet50D"]
    assert not [
        n for n in united_perception.loads(config(**slots), gpus=gpus).notes if "--set" in n.where
    ]


def test_a_share_of_the_list_has_shorter_epochs():
    text = edited(
        ("type: cls\n      kwargs:\n", "type: cls\n      kwargs:\n        fraction: 0.5\n"),
        ("max_epoch: 100", "max_iter: 25030"),
        ("milestones: [30, 60, 90]", "milestones: [4, 15]"),
        ("warmup_iter: 2500", "warmup_iter: 6260"),
    )
    found = united_perception.loads(text, gpus=8)
    assert found.recipe.epochs == 20 and "1,252 steps an epoch" in told(found, TAKEN)
    assert found.recipe.milestones == [15]  # the warm-up is 5 epochs
    assert "[4] inside the warm-up" in said(found, f"{KWARGS}.milestones")


def test_a_step_inside_the_warm_up_is_never_applied():
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


def test_a_polylr_shorter_than_the_training_goes_below_its_end():
    found, rates = scheduled("polylr", "max_epoch: 50, power: 1.0")
    theirs = [0.4 * (1 - t / 1000) for t in range(2000)]
    assert gap_said(found) == pytest.approx(largest(rates, theirs), abs=0.1)
    assert "in UP lr ends at -0.3996" in said(found, f"{KWARGS}.max_epoch")
    found, _ = scheduled("polylr", "max_epoch: 50, power: 0.9")
    assert "complex after 50 epochs, where UP stops" in said(found, f"{KWARGS}.max_epoch")
    assert "differs by" not in told(found, MISSING)


def test_a_polylrs_jump_stands_at_its_length_and_its_default_is_no_length():
    found, _ = scheduled("polylr", "max_epoch: 100, max_iter: -1", warm=200)
    assert "lr jumps from 0.4 to 0.36 after it" in said(found, f"{KWARGS}.max_epoch")
    assert "warm_epoch" not in told(found, DEFECT)


def test_a_one_cycle_climbs_again_after_its_end_and_knows_of_no_scaling():
    kwargs = "max_lr: 0.7, max_epoch: 50, cycle_momentum: false"
    found, rates = scheduled("OneCycleLR", kwargs)
    theirs = []
    for t in range(2000):
        low, share = (0.028, t / 299) if t <= 299 else (0.7 / 250_000, (t - 299) / 700)
        rise = t <= 299
        wave = (1 - math.cos(math.pi * share)) / 2 if rise else (1 + math.cos(math.pi * share)) / 2
        theirs.append(low + (0.7 - low) * wave)
    assert gap_said(found) == pytest.approx(largest(rates, theirs), abs=0.1)
    assert "UP stops" not in told(found, DEFECT)
    scheduler = unwarmed("OneCycleLR", kwargs).replace("no_scale_lr", "base")
    found = united_perception.loads(config(scheduler=scheduler), gpus=16)
    assert found.recipe.lr == 0.7 and "multiplies lr" not in told(found, DEFECT)


# ---- the blocks of the page, each alone

DATASET = """
    dataset:
      type: cls
      kwargs:
        meta_type: {}
        meta_file: {}train.txt
        image_reader:
           type: fs_pillow
           kwargs:
             image_dir: {}train
             color_mode: RGB
        transformer: [*random_resized_crop, *random_horizontal_flip, *pil_color_jitter, *to_tensor,
          *normalize]
"""
SEEN = dict(dataset="files", train_list=["train.txt"], image_size=224, val_resize=256, hflip=0.5)
SEEN |= dict(crop_scale=[0.08, 1.0], **JITTER)
BLOCKS = {
    "imagenet": (DATASET.format("imagenet", "", ""), SEEN),
    "custom_cls": (
        DATASET.format("custom_cls", "/cars//", "/cars/"),
        {**SEEN, "data_dir": "/cars"},
    ),
    "mixup": (
        "mixup: &mixup\n  type: torch_mixup\n  kwargs:\n    alpha: 0.2\n    num_classes: 1000\n"
        "    extra_input: True\n",
        dict(mixup_alpha=0.2, mix_per_sample=True),
    ),
    "erasing": (
        "rand_erase: &rand_erase\n  type: torch_randerase\n  kwargs:\n    probability: 0.25\n",
        dict(erase_prob=0.25),
    ),
    "cutmix and mixup": (
        "cutmix_mixup: &cutmix_mixup\n  type: torch_cutmix_mixup\n  kwargs:\n    mixup_alpha: 0.1\n"
        "    cutmix_alpha: 1.0\n    switch_prob: 0.5\n    num_classes: 1000\n"
        "    extra_input: True\n    transform: True\n",
        dict(mixup_alpha=0.1, cutmix_alpha=1.0, mix_per_sample=True),
    ),
    "to_kestrel": (KESTREL, {}),
    "cosine": (
        cosine(3130, 0.25, 200, 0.0, 3130),
        dict(epochs=200, warmup_steps=3130, warmup_start_factor=0.25),
    ),
    "LAMB": (
        "optimizer:\n  type: LAMB\n  kwargs:\n    lr: 0.008\n    weight_decay: 0.02\n",
        dict(optimizer="lamb", lr=0.008, weight_decay=0.02, clip_grad_norm=1.0),
    ),
    "BCE": (
        "- name: post_process\n  type: base_cls_postprocess\n  kwargs:\n     cls_loss:\n"
        "       type: bce\n       kwargs:\n         {}\n",
        dict(loss="bce"),
    ),
    "RandAugment": (
        "random_augmentation: &random_augmentation\n  type: torch_random_augmentationIncre\n"
        "  kwargs:\n    n: 2  # drawn\n    m: 7  # of 10\n    magnitude_std: 0.5\n",
        dict(randaug_n=2),
    ),
    "teacher": (KD, {}),
    "mimic": (
        KD_OLD[len(KD) :],
        dict(weights="student.pth", teacher=["teacher.pth"], kd_loss=["up_kl"]),
    ),
    "teacher and mimic": (
        KD_OLD.replace("*num_classes", "1000"),
        dict(weights="student.pth", kd_loss=["up_kl"], **TEACHER),
    ),
    "runtime": ("\n  runtime:\n    runner:\n      type: kd\n", {}),
    "saver": (
        "saver: # Required.\n  save_dir: a/checkpoints\n  results_dir: a/results\n"
        "  auto_resume: True\n  pretrain_model: up/ckpt_latest.pth\n",
        dict(weights="up/ckpt_latest.pth"),
    ),
    "optimizer and schedule": (
        f"    optimizer: {SGD.format(0.01, 0.0005)}\n    "
        + textwrap.indent(unwarmed("MultiStepLR", "milestones: [50, 100], gamma: 0.1"), "  ")[2:],
        dict(epochs=150, lr=0.01, weight_decay=5e-4, nesterov=True)
        | dict(schedule="multistep", milestones=[50, 100]),
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_the_page_is_read_alone(name):
    text, options = BLOCKS[name]
    assert changed(textwrap.dedent(text)) == options


def test_an_alias_without_its_anchor_is_ups_usual_or_left_out():
    found = united_perception.loads(BLOCKS["imagenet"][0])
    assert "UP's usual torch_color_jitter {'brightness': 0.2" in said(
        found, "*pil_color_jitter", TAKEN
    )
    assert "*normalize: no such anchor" in found.params() and "*torch_resize" in found.params()
    found = united_perception.loads(KD)
    assert "*num_classes has no anchor" in said(found, "teacher[1].kwargs.num_classes", MISSING)
    assert said(found, "teacher[0].type", TAKEN) == "the teacher's model 'resnet152'"
    text = "optimizer: {type: SGD, kwargs: {lr: *lr, nesterov: *no}}\nnet: [*head]\ntrainer: *all"
    found = united_perception.loads(text)
    assert found.recipe == Recipe(momentum=0.0)
    assert len([n for n in found.notes if "has no anchor in this text" in n.text]) == 4


@pytest.mark.parametrize(
    "text, number, words",
    [
        (
            "optimizer:\n  momentum=0.9,weight_decay=0.0001)\n  type: LAMB\n  kwargs:\n"
            "    lr: 0.008\n    weight_decay: 0.02\n",
            2,
            ["'momentum=0.9,weight_decay=0.0001)'", "comment"],
        ),
        (
            "- name: post_process\ntype: base_cls_postprocess\nkwargs:\n   cls_loss:\n"
            "     type: bce\n     kwargs:\n       {}\n",
            2,
            ["- name: post_process", "indent"],
        ),
        (KESTREL.replace("'UNKNOWN'", "'UNKNOWN").split("  class")[0], 12, ["quote", "close"]),
        # the same faults where PyYAML finds something else, or nothing at all
        (
            "optimizer:\n  type: SGD\n  momentum=0.9)\n  kwargs: {lr: 1}\n",
            3,
            ["'momentum=0.9)'", "comment"],
        ),
        ("optimizer:\n  type: SGD\n  kwargs:\n    lr: 0.1\n      (of 2)\n", 5, ["'0.1 (of 2)'"]),
        ("net:\n- name: post_process\ntype: x\nkwargs: {}\n", 3, ["- name: post_process"]),
        ("optimizer:\ntype: SGD\nkwargs: {lr: 0.1}\n", 2, ["`optimizer`", "indent"]),
        ("optimizer:\n  type: SGD\n  kwargs:\n  lr: 0.1\n", 4, ["`lr`", "kwargs", "indent"]),
        (KESTREL.replace("'UNKNOWN'", "'UNKNOWN"), 12, ["quote"]),
        ("a: 1\nsaver: {save_dir: 'x, b: 2}\nc: 'd'\n", 2, ["quote"]),
        ('runtime:\n  task_names: "cls\n  random_seed: 1\n  x: "y"\n', 2, ["quote"]),
        ("optimizer:\n  type: SGD\n\tkwargs: {}\n", 3, ["a tab"]),
        ("a: 1\n---\nb: 2\n", 2, ["second document"]),
        ("dataset: {a: 1\nb: 2\n", 2, ["brackets"]),
    ],
)
def test_a_broken_block_names_the_line_and_the_repair(text, number, words):
    message = refused(text)
    assert f"line {number}: " in message and all(word in message for word in words), message


# ---- hostile files


def nested(depth: int, mark: str = "[]") -> str:
    return f"a: {mark[0] * depth}{mark[1] * depth}"


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "nothing": ("", "holds nothing"),
    "only a comment": ("# a\n", "holds nothing"),
    "a word": ("hello\n", "'hello'"),
    "a number": ("5\n", "'5'"),
    "a list of words": ("- a\n- b\n", "wanted a block"),
    "a date": ("2026-01-01\n", "wanted blocks"),
    "python object": ("a: !!python/object/apply:os.system ['echo']\n", "!!python/object/apply"),
    "python name": ("a: !!python/name:os.system\n", "!!python/name:os.system"),
    "a tag of a key": ("!!python/name:os.system : 1\n", "!!python/name"),
    "include": ("a: !include other.yaml\n", "line 1: the tag '!include'"),
    "include with a merge": ("<<: !include other.yaml\n", "!include"),
    "binary": ("a: !!binary aGVsbG8=\n", "!!binary"),
    "set": ("a: !!set {b: null}\n", "!!set"),
    "overrides": ("overwrite@: {trainer.max_epoch: 3}\n", "write its values"),
    "doubled key": ("saver:\n  a: 3\n  a: 4\n", "line 3: 'a' stands twice in saver"),
    "doubled block": ("a: 1\nb: 2\na: 1\n", "line 3: 'a' stands twice in the file"),
    "doubled anchor": ("a: &x 1\nb: &x 2\n", "line 2"),
    "cycle": ("a: &a [*a]\n", "its own anchor"),
    "cycle of blocks": ("net: &a\n  - kwargs: {cls_loss: *a}\n", "its own anchor"),
    "billion laughs": (LAUGHS, "aliases stand for more"),
    "deep aliases": (
        "".join(f"a{i}: &a{i} {nested(20)[3:23]}*a{i - 1}{nested(20)[23:]}\n" for i in range(15)),
        "deeper blocks",
    ),
    "deep lists": (nested(500), "nested"),
    "deeper lists": (nested(20_000), "nested"),
    "deep blocks": ("".join(f"{' ' * i}a:\n" for i in range(200)), "nested"),
    "open lists": ("[" * 50_000, "nested"),
    "many entries": ("a: [" + "1, " * 15_000 + "]", "more entries"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(3_500)), "more entries"),
    "huge": ("# a\n" * 20_000, "at most"),
    "one line": ("a" * 59_000 + ": 1\n", "line 1"),
    "zero byte": ("a: \x00\n", "line 1"),
    "control": ("a: 1\nb: \x07\n", "line 2"),
    "surrogate": ("a: \udcff\n", "line 1"),
    "nan": ("optimizer: {type: SGD, kwargs: {lr: .nan}}\n", "kwargs.lr is '.nan'"),
    "infinity": ("optimizer: {type: SGD, kwargs: {lr: .inf}}\n", "kwargs.lr is '.inf'"),
    "text nan": ("optimizer: {type: SGD, kwargs: {lr: 'nan'}}\n", "wanted a number"),
    "text overflow": ("optimizer: {type: SGD, kwargs: {lr: '1e999'}}\n", "wanted a number"),
    "long number": (f"a: {'9' * 5000}\n", "line 1"),
    "sexagesimal": (f"a: 1{':59' * 3000}\n", "line 1"),
    "many epochs": ("trainer: {max_epoch: 99999999}\n", "less than or equal to 100000"),
    "no epochs": ("trainer: {max_epoch: 0}\n", "above 0"),
    "epochs in words": ("trainer:\n  max_epoch: many\n", "line 2: trainer.max_epoch is 'many'"),
    "half an epoch": ("trainer: {max_epoch: 0.5}\n", "whole number"),
    "a list of epochs": ("trainer: {max_epoch: [1]}\n", "whole number"),
    "true epochs": ("trainer: {max_epoch: true}\n", "whole number"),
    "a negative warm-up": ("lr_scheduler: {warmup_iter: -5}\n", "0 or more"),
    "a list for a block": ("trainer: [1]\n", "wanted a block"),
    "a word for a block": ("dataset: files\n", "wanted a block"),
    "an empty block": ("trainer:\n", "trainer is empty"),
    "an empty inner block": ("dataset:\n  train:\n", "dataset.train is empty"),
    "a block for a list": ("net: {a: 1}\n", "wanted a list"),
    "words for kwargs": ("optimizer: {type: SGD, kwargs: lr}\n", "optimizer.kwargs is 'lr'"),
    "a block for a word": ("optimizer: {type: {a: 1}}\n", "a line of text"),
    "two lines for a word": ("saver: {pretrain_model: \"a\\nb\"}\n", "a line of text"),
    "a key of blocks": ("{a: 1}: 2\n", "no plain name"),
    "a key of lists": ("? [a]\n: 2\n", "no plain name"),
    "an unknown alias for a key": ("*a : 2\n", "no plain name"),
    "a bad escape": ('a: "\\xZZ"\n', "line 1"),
    "a large escape": ('a: "\\UFFFFFFFF"\n', ""),
    "a bad bool": ("a: !!bool maybe\n", "line 1"),
    "a bad int": ("a: !!int x\n", "line 1"),
    "int of a list": ("a: !!int [1]\n", "!!int"),
    "text of a block": ("a: !!str {b: 1}\n", "!!str"),
    "a warm-up that no recipe has": ("lr_scheduler: {warmup_iter: 5, warmup_ratio: 3}\n"
     "optimizer: {type: SGD, kwargs: {lr: 1}}\n", "warmup_start_factor: 3.0"),
    "an lr of 0": ("optimizer: {type: SGD, kwargs: {lr: 0}}\n", "optimizer.kwargs.lr"),
    "an lr below eta_min": ("optimizer: {type: SGD, kwargs: {lr: 0.1}}\nlr_scheduler: {type: "
     "CosineAnnealingLR, kwargs: {T_max: 9, eta_min: 0.2}}\n", "lr_min"),
    "a negative length": ("lr_scheduler: {type: StepLR, kwargs: {step_size: -9}}\n", "above 0"),
    "a crop that is no square": ("a: {type: torch_random_resized_crop, kwargs: {size: [2, 3]}}\n",
     "two equal ones"),
    "RandAugment of nothing": ("a: {type: torch_random_augmentation, kwargs: {}}\n", "without n"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_a_sentence_within_a_second(name):
    text, words = HOSTILE[name]
    started = time.process_time()
    message = refused(text)
    assert time.process_time() - started < 1
    assert words in message and len(message) < 500, message


@pytest.mark.parametrize(
    "text",
    [
        "a: ~\nb: [~, {c: ~}]\n'': 1\n",
        "dataset: {}\ntrainer: {}\nnet: []\nhooks:\nmimic: {}\nto_kestrel: {}\nema: {}\nquant:\n",
        "trainer: {optimizer: {}, lr_scheduler: {}}\n",
        "lr_scheduler: {type: CosineAnnealingLR, kwargs: {T_max: 1.0e-8, warmup_iter: 9}}\n",
        "dataset: {train: {dataset: {kwargs: {transformer: [{}]}}}}\n",
        "net: [{name: head}, {type: x_head}, {kwargs: {cls_loss: []}}, {name: backbone}]\n",
        "a: |\n  two\n  lines\nb: >\n  folded\n  text\n",
        '2026-01-01: 2026-01-02\n1: 2\ntrue: no\n"a b\\nc: d": 1\n"a\\u2028b": 1\n',
        "a: {type: to_tensor, kwargs: }\n",
    ],
)
def test_an_odd_file_is_read_or_refused_and_its_params_are_sound(text, tmp_path):
    try:
        found = united_perception.loads(text, gpus=2)
    except UnitedPerceptionError:
        return
    path = tmp_path / "recipe.yaml"
    path.write_text(found.params(), encoding="utf-8")
    assert Recipe.from_yaml(path) == found.recipe


def test_a_key_cannot_smuggle_a_knob_into_the_params(tmp_path):
    text = (
        '"a\\nlr: 5": 1\n"b\\u2028lr: 5": 1\n"c\\x85lr: 5": 1\nsaver: {"d\\nlr: 6": "\\nlr: 7"}\n'
    )
    found = united_perception.loads(text, name="x\nlr: 8\x85lr: 9")
    lines = found.params().splitlines()
    assert found.recipe.non_default() == {"name": "x\nlr: 8\x85lr: 9"}
    [option] = [line for line in lines if not line.startswith("#")]
    assert option.startswith('"name": "x\\nlr: 8') and option.isprintable()
    path = tmp_path / "recipe.yaml"
    path.write_text(found.params(), encoding="utf-8")
    assert Recipe.from_yaml(path) == found.recipe


def test_many_unknown_keys_make_no_endless_params(tmp_path):
    text = "".join(f"unknown_{i}: 1\n" for i in range(1000))
    found = united_perception.loads(text)
    assert len(found.notes) == 1000 and "and 900 more" in found.params()
    path = tmp_path / "recipe.yaml"
    path.write_text(found.params(), encoding="utf-8")
    assert Recipe.from_yaml(path) == Recipe()


@pytest.mark.parametrize("gpus", [0, -1, 1.5, "4", True, 10**12])
def test_numbers_of_gpus_and_images_are_checked(gpus):
    assert "gpus is" in refused("a: 1", gpus=gpus)
    assert "train_images is" in refused("a: 1", train_images=gpus)


@pytest.mark.parametrize("text", [None, 5, b"a: 1", ["a: 1"]])
def test_what_is_no_text_is_refused(text):
    assert "wanted YAML text" in refused(text)


def test_a_name_that_is_no_name_of_a_folder_is_refused():
    assert "name" in refused("a: 1", name="a/b")


MUTATIONS = "'\"[]{}:,-&*!#|>%@ \n\t0x9.eé~"


def mutated(text: str, rng: random.Random) -> str:
    """A few cuts, copies and odd characters."""
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(text)) for _ in range(2))
        j = min(j, i + 60)
        text = rng.choice(
            [
                text[:i] + text[j:],
                text[:i] + rng.choice(MUTATIONS) + text[i + 1 :],
                text[:j] + text[i:],
                text[:i] + rng.choice(["null", "[]", "-1", "1e9", "*x", "true"]) + text[j:],
            ]
        )
        text = text or "a"
    return text


def test_a_mutated_file_is_read_or_refused(tmp_path):
    rng = random.Random(7)
    texts = [text for text, _ in BLOCKS.values()] * 12
    texts += [config(**slots) for slots, _, _ in FAMILIES.values()]
    outcomes = {True: 0, False: 0}
    for text in texts:
        text = mutated(textwrap.dedent(text), rng)
        try:
            found = united_perception.loads(text)
        except UnitedPerceptionError as error:
            outcomes[False] += 1
            assert len(str(error)) > 10
            continue
        outcomes[True] += 1
        (tmp_path / "recipe.yaml").write_text(found.params(), encoding="utf-8")
        assert Recipe.from_yaml(tmp_path / "recipe.yaml") == found.recipe
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("word", ["many", "-3", "[1, 2]", "{a: 1}", "null", "true", "''", "1e30"])
def test_a_value_of_a_wrong_type_is_read_or_refused_wherever_it_stands(word):
    """Every fifteenth value of a whole configuration, replaced by the word; each word its own."""
    tree = yaml.safe_load(config(extra=EMA.format(0.99) + "\n" + KD_NEW + KESTREL))
    value, places = yaml.safe_load(word), list(leaves(tree))
    for where in places[sum(map(ord, word)) % 15 :: 15]:
        spoilt = copy.deepcopy(tree)
        *path, last = [int(k) if k.isdigit() else k for k in re.findall(r"[^.\[\]]+", where)]
        node = spoilt
        for key in path:
            node = node[key]
        node[last] = value
        try:
            united_perception.loads(yaml.safe_dump(spoilt, default_flow_style=None))
        except UnitedPerceptionError as error:
            assert "beyond computing" not in str(error)


# ---- files and the command


def test_a_file_names_its_run(tmp_path):
    path = tmp_path / "res18.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + config().replace("\n", "\r\n").encode())
    found = united_perception.load(path, gpus=16)
    assert found.recipe.non_default() == {"name": "res18", **read("plain").recipe.non_default()}
    assert found.params().startswith("# res18.yaml: read from United Perception's res18.yaml\n")
    assert united_perception.load(path, name="mine").recipe.name == "mine"


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "cannot be read as text"),
        (bytes(range(256)) * 2000, "at most 60,000"),
        (b"a: 1\n" * 10**6, "at most 60,000"),
        (b"a: [\n", "line "),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(content, words, tmp_path):
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnitedPerceptionError) as caught:
        united_perception.load(path)
    assert words in str(caught.value) and "x.yaml: " in str(caught.value)


def test_what_is_no_plain_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UnitedPerceptionError, match="no plain file"):
            united_perception.load(path)


def command(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "workbench", "import-up", *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_command_prints_the_params_and_tells_the_notes(tmp_path):
    slots, gpus, _ = FAMILIES["resnet50D"]
    path = tmp_path / "res50d.yaml"
    path.write_text(config(**slots))
    done = command(path, "--gpus", gpus, "--train-images", 1_281_167, "--name", "mine")
    assert done.returncode == 0, done.stderr
    params = tmp_path / "params.yaml"
    params.write_text(done.stdout)
    assert Recipe.from_yaml(params) == read("resnet50D", name="mine").recipe
    assert "6,256 to 6,260 steps" in done.stderr and "--gpus" not in done.stderr
    path.write_text("optimizer:\n  type: 'SGD\n")
    done = command(path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("UnitedPerceptionError: ") and "line 2" in done.stderr
    assert "Traceback" not in done.stderr
