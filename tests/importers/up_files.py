"""Texts in the shape of UP's configurations, and what the tests of the importer share."""

import functools
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
COMMON = FAMILIES.pop("common")  # options of every family
SLOTS = FAMILIES.pop("slots")

SGD = "{{type: SGD, kwargs: {{lr: {}, nesterov: true, momentum: 0.9, weight_decay: {}}}}}"
STEPS = """lr_scheduler:
    warmup_iter: {}
    warmup_type: linear
    warmup_register_type: no_scale_lr
    warmup_ratio: {}
    type: {}
    kwargs: {{{}}}"""


def config(**slots) -> str:
    """The plain configuration of resnet18 with other contents of the slots."""
    text = TEMPLATE
    for slot, content in {**SLOTS, **slots}.items():
        assert slot in SLOTS
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
LAMB = "{{type: LAMB, kwargs: {{lr: {}, weight_decay: 0.02}}}}".format
KD = BLOCKS["teacher"]["text"]
KD_NEW = FAMILIES["kd"]["slots"]["extra"]
KESTREL = "\n" + BLOCKS["to_kestrel"]["text"]


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


def told(found, *kinds: str) -> str:
    """Every note of these kinds, a line each with its place."""
    return "\n".join(f"{n.where}: {n.text}" for n in found.notes if n.kind in kinds)


@functools.cache
def read(family: str, **options) -> Found:
    case = FAMILIES[family]
    return loads(config(**case["slots"]), gpus=case["gpus"], **options)


def wanted(family: str) -> dict:
    """The options of a family's recipe that differ from the defaults."""
    options = COMMON | FAMILIES[family]["recipe"]
    return {k: v for k, v in options.items() if v != Recipe.model_fields[k].default}


def leaves(node, where=""):
    """The dotted paths of all values."""
    inner = {f"{where}.{k}".lstrip("."): v for k, v in node.items()} if type(node) is dict else {}
    if isinstance(node, list):
        inner = {f"{where}[{i}]": value for i, value in enumerate(node)}
    for path, value in inner.items():
        yield from leaves(value, path)
    if not isinstance(node, dict | list):
        yield where
