"""Texts in the shape of UP's configurations, and what the tests of the importer share."""

from pathlib import Path

import pytest
import yaml

from workbench.importers.united_perception import DEFECT, Found, UnitedPerceptionError, loads
from workbench.recipe import Recipe

HERE = Path(__file__).parent
TEMPLATE = (HERE / "configuration.yaml").read_text("utf-8")
FAMILIES = yaml.safe_load((HERE / "families.yaml").read_text("utf-8"))
BLOCKS = yaml.safe_load((HERE / "blocks.yaml").read_text("utf-8"))
FINDINGS = yaml.safe_load((HERE / "findings.yaml").read_text("utf-8"))
VALUES = yaml.safe_load((HERE / "values.yaml").read_text("utf-8"))
INVALID = yaml.safe_load((HERE / "invalid.yaml").read_text("utf-8"))
COMMON = FAMILIES.pop("common")  # options of every family


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
JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
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


def swin_kwargs(width, blocks, heads):
    shape = f"embed_dim: {width}\n      depths: [2, 2, {blocks}, 2]\n      num_heads: "
    return f"{shape}{[heads, 2 * heads, 4 * heads, 8 * heads]}\n      "


def said(found, where: str, kind: str = DEFECT) -> str:
    """The notes of a kind on a place, in one text."""
    return "\n".join(n.text for n in found.notes if n.kind == kind and n.where == where)


def refused(text: str, **options) -> str:
    with pytest.raises(UnitedPerceptionError) as caught:
        loads(text, **options)
    return str(caught.value)


def changed(text: str, **options) -> dict:
    return loads(text, **options).recipe.non_default()


KWARGS = "trainer.lr_scheduler.kwargs"


def edited(*pairs: tuple[str, str]) -> str:
    text = config()
    for old, new in pairs:
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    return text


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


def told(found, *kinds: str) -> str:
    """Every note of these kinds, a line each with its place."""
    return "\n".join(f"{n.where}: {n.text}" for n in found.notes if n.kind in kinds)


def net(kind: str, kwargs: str = "", name: str = "backbone") -> str:
    return f"net: [{{name: {name}, type: {kind}, kwargs: {{{kwargs}}}}}]"


def read(family: str, **options) -> Found:
    case = FAMILIES[family]
    return loads(config(**case["slots"]), gpus=case["gpus"], **options)


def wanted(family: str) -> dict:
    """The options of a family's recipe that differ from the defaults."""
    options = COMMON | FAMILIES[family]["recipe"]
    return {k: v for k, v in options.items() if v != Recipe.model_fields[k].default}


def leaves(node, where=""):
    """The dotted paths of all values."""
    if isinstance(node, dict | list) and node:
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in pairs:
            inner = f"[{key}]" if isinstance(node, list) else f".{key}" if where else key
            yield from leaves(value, where + inner)
    elif node not in ({}, []):
        yield where
