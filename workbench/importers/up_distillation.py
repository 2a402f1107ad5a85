"""United Perception's `mimic` and teachers: the documented form and that of its last version."""

from typing import Any

from workbench.importers.up_model import read_net
from workbench.importers.up_reader import DEFECT, MISSING, NOTHING, TABLES, TAKEN, Reader, nearest
from workbench.importers.up_yaml import Node, error_at, short
from workbench.recipe_checks import RESNETS, losses_with_temperature

LOSSES = TABLES["mimic_losses"]


def read_distillation(up: Reader) -> None:
    mimic, runner = up.block(up.root, "mimic"), up.get(up.root, "runtime.runner.type", str, "base")
    nets = {
        key: read_teacher(up, node)
        for key, node in up.root.value.items()
        if "teacher" in key and isinstance(node.value, list)
    }
    jobs = [up.block(mimic, key) for key in mimic.value if key.startswith("mimic_job")]
    teachers = {}  # UP has a teacher in one job only
    for job in jobs or [mimic]:
        for key, node in job.value.items():
            if "teacher" in key and isinstance(node.value, dict):
                teachers[key] = job
    if not up.get(mimic, "task_loss", bool, True):
        up.take("task_weight", 0.0, "mimic.task_loss")
    if "net" in up.root.value and bool(teachers) != (runner == "kd"):
        up.say(DEFECT, "mimic", "UP distils only with runtime.runner.type kd and a mimic")
    for i, (key, job) in enumerate(teachers.items(), 1):
        up.add("teacher_model", nets.pop(key, ""), f"{key}[0].type")
        read_job(up, key, job, f"teacher{i}:" if len(teachers) > 1 else "")
    for key in nets:
        up.say(MISSING, key, "no mimic in this text uses it; left out")
    if not all(up.values.get("teacher_model", [])):
        text = "a network that is not in this text; set teacher_model to a timm model"
        up.say(MISSING, up.drop("teacher_model"), text)


def read_teacher(up: Reader, node: Node) -> str:
    """timm's name of a teacher's network."""
    found: dict[str, Any] = {}

    def take(option: str, value: Any, where: str, why: str = "") -> None:
        found[option] = value
        up.say(TAKEN, where, f"the teacher's {option} {short(value)}")

    read_net(up, node, take)
    model = found.get("model", "")
    flags = [flag for flag in ("deep_stem", "avg_down") if found.get(flag)]
    if len(flags) == 1:
        up.say(MISSING, node.where, f"timm has no {model} with {flags[0]} alone")
    return f"{model}d" if len(flags) == 2 and model in RESNETS else model


def read_job(up: Reader, key: str, job: Node, prefix: str) -> None:
    """What is learnt from one teacher; `prefix` names it where there are several."""
    if not (weights := up.get(job, f"{key}.teacher_weight", str)):
        text = "no teacher_weight: UP then distils from random weights without a warning; set one"
        up.say(MISSING, f"{job.where}.{key}", text)
    up.add("teacher", weights or "name-the-teacher", up.where(job, f"{key}.teacher_weight"))
    start = up.get(job, "student.student_weight", str)
    where = up.where(job, "student.student_weight")
    if start and "weights" in up.values:
        up.say(NOTHING, where, "saver.pretrain_model is what the student starts from")
    elif start:
        up.take("weights", start, where)
    loss, weight, where = read_kd_loss(up, job)
    sides = [up.get(job, f"{side}.mimic_name", [str], []) for side in ("student", key)]
    if not sides[0] or len(sides[0]) != len(sides[1]):
        text = f"{len(sides[0])} modules of the student, {len(sides[1])} of {key}"
        raise error_at(job.line, f"{text}; wanted pairs")
    weight *= up.get(job, "loss_weight", float, 1.0) / len(sides[0])
    for pair in zip(*sides, strict=True):
        ours = {"head.classifier": "logits"}
        student, teacher = (ours.get(m, m.removeprefix("backbone.")) for m in pair)
        one = loss if student == "logits" or loss.startswith("l2") else "l2_normalized"
        if one != loss:
            up.say(MISSING, where, f"{loss} compares logits; {one} is taken for {student}")
        plain = student == teacher == "logits" and not prefix
        text = "logits" if plain else f"{student} -> {prefix}{teacher}"
        up.add("distill_pairs", text, up.where(job, "student.mimic_name"))
        up.add("kd_loss", one, where)
        up.add("kd_weight", weight, up.where(job, "loss_weight"))
    steps, where = max(0, up.get(job, "warm_up_iters", int, 0)), up.where(job, "warm_up_iters")
    if steps and not up.steps:
        up.say(MISSING, where, "no batch size in this text; set kd_warmup_epochs")
    else:
        take_shared(up, "kd_warmup_epochs", steps / up.steps if steps else 0.0, where)


def read_kd_loss(up: Reader, job: Node) -> tuple[str, float, str]:
    """The loss, its weight in `cfgs`, and the place that names it."""
    kind, kwargs, where, weight = "l2", job, up.where(job, "mimic_type"), 1.0
    if old := [key for key in ("mimic_name", "mimic_type") if up.get(job, key, str)]:
        text = f"UP's last version ignores {', '.join(old)} and student_weight; without cfgs it"
        up.say(DEFECT, job.where, f"{text} takes an L2 loss of normalised logits")
        kind = up.get(job, "mimic_type", str, "kl")
    slots = up.block(job, "cfgs")
    for name, other in slots.value.items():
        if name != "loss":
            up.say(DEFECT, other, "UP reads the slot `loss` alone, L2 without it; so here")
    if slots.value:
        slot = up.block(slots, "loss")
        kind, kwargs = up.get(slot, "type", str, "l2"), up.block(slot, "kwargs")
        where, weight = up.where(slot, "type"), up.get(kwargs, "loss_weight", float, 1.0)
    loss = LOSSES.get(kind.removesuffix("_loss"))
    if loss is None:
        near = nearest(kind, (f"{name}_loss" for name in LOSSES))
        up.say(MISSING, where, f"no counterpart of {kind}; kl is taken{near}")
        loss = "kl"
    if loss in losses_with_temperature:
        temperature = up.get(kwargs, "T", float, 1.0, minimum=1e-9)
        take_shared(up, "temperature", temperature, f"{kwargs.where}.T")
    if loss == "l2_normalized":
        norm, mean = (up.get(kwargs, key, bool, True) for key in ("feat_norm", "batch_mean"))
        loss = loss if norm else "l2"
        if norm != mean:
            text = ("images, not elements: multiply", "elements, not images: divide")[norm]
            text = f"UP divides by {text} kd_weight by the elements of an image"
            up.say(MISSING, f"{kwargs.where}.batch_mean", text)
    return loss, weight, where


def take_shared(up: Reader, option: str, value: float, where: str) -> None:
    """Takes an option that all teachers share."""
    if up.values.get(option, value) == value:
        up.take(option, value, where)
    else:
        up.say(MISSING, where, f"{value:g}; all share {option} {up.values[option]:g}")
