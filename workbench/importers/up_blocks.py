"""What the blocks of a configuration mean as options of a recipe."""

import math
import posixpath
import re
from collections import Counter
from typing import Annotated, Literal

from pydantic import BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from workbench import schedule
from workbench.importers.up_reader import (
    DEFECT,
    MISSING,
    NOTHING,
    TABLES,
    TAKEN,
    Reader,
    UnitedPerceptionError,
    listed,
    nearest,
)
from workbench.recipe import Recipe
from workbench.recipe_checks import RESNETS, losses_with_temperature

TRANSFORMS = TABLES["transforms"]
VALIDATION = ("torch_resize", "torch_center_crop")
Texts = Annotated[list[str], BeforeValidator(listed)]
MODELS: dict[str, str] = {name: name for name in RESNETS} | TABLES["models"]
SWIN = dict(zip(TABLES["swin"], next(iter(TABLES["swins"].values())), strict=True))
NORMS = r"ndim_is1|bias$|_b$|bn|norm|(^|[._])ln"  # in names of parameters
SPARED = rf"{NORMS}|pos_|position|token"
OPTIMIZER, SCHEDULER = "trainer.optimizer", "trainer.lr_scheduler"
KWARGS = f"{SCHEDULER}.kwargs"
Lengths = Annotated[list[PositiveFloat], BeforeValidator(listed)]


def read_data(up: Reader) -> None:
    for path, table in TABLES["options"].items():
        up.put(path, table)
    fp16, whole = up.get("runtime.fp16", object), {"dataset", "trainer"} <= set(up.values)
    if fp16 is False or (not fp16 and (whole or "fp16" in up.values)):
        up.take("precision", "fp32", "runtime.fp16", "UP's default" if fp16 is None else "")
    if any(path.startswith("dataset.") for path in up.values):
        up.take("dataset", "files", "dataset")
    split_paths(up)
    sampler = "dataset.train.batch_sampler.kwargs"
    if up.get(f"{sampler}.sampler.type", str) == "class_balance":
        up.take("class_balanced_sampling", 1.0, f"{sampler}.sampler.type")
    if size := up.get(f"{sampler}.batch_size", PositiveInt):
        up.batch, why = size * (up.gpus or 1), f"{size:,} on each of {up.gpus or 1:,} GPUs"
        up.take("batch_size", up.batch, f"{sampler}.batch_size", why)
    read_transforms(up, "test")
    read_transforms(up, "train")  # where both set an option, training's is taken
    read_transform(up, "dataset.train.dataloader.kwargs.batch_fn", "train")
    read_unused_transforms(up)
    size, val_size = (up.options.get(key) for key in ("image_size", "val_image_size"))
    if val_size and val_size == size:
        up.drop("val_image_size")
    if (val_size or size) and "val_resize" not in up.options:
        text = "no torch_resize in this text; UP's 256 for 224"
        up.take("val_resize", round((val_size or size) * 8 / 7), "*torch_resize", text)


def split_paths(up: Reader) -> None:
    """Absolute paths become data_dir and paths below it."""
    names = ("train_list", "train_root", "val_list", "val_root")
    paths = {name: up.options[name] for name in names if name in up.options}
    folders = [p if "root" in n else posixpath.dirname(p) for n in paths for p in paths[n]]
    if folders and all(folder.startswith("/") for folder in folders):
        base = posixpath.commonpath(folders)
        for name, found in paths.items():
            below = [posixpath.relpath(path, base) for path in found]
            up.take(name, below, up.origin[name].where)
        up.take("data_dir", base, "dataset", "holds all its lists and images")
    elif folders:
        up.say(NOTHING, "dataset", "its paths are relative or in a store; set data_dir")


def read_transforms(up: Reader, side: str) -> None:
    path = f"dataset.{side}.dataset.kwargs.transformer"
    done = [read_transform(up, entry, side) for entry in up.entries(path)]
    kinds = [name.removesuffix("Incre") for name in done if name in TRANSFORMS]
    order = [list(TRANSFORMS).index(name) for name in kinds if "flip" not in name]
    if order != sorted(set(order)):
        text = "here each is applied once, in the order crop, flip, AutoAugment, RandAugment, "
        up.say(MISSING, path, f"{text}jitter, erase; the last of several is taken")
    for name, text in TABLES["expected"][side].items() if done else ():
        if name not in done:
            up.say(MISSING, path, f"no {name}: {text}")
    if side == "train" and "to_tensor" in done and "normalize" not in done:
        up.take("mean", [0.0] * 3, path, "has no normalize")
        up.take("std", [1.0] * 3, path, "has no normalize")


def read_transform(up: Reader, path: str, side: str) -> str:
    """Takes the options of one transform or batch function; returns its type."""
    names = {*VALIDATION, "normalize", "to_tensor"}
    name = up.known(f"{path}.type", names if side == "test" else {*TRANSFORMS} - {*VALIDATION})
    if not name:
        return ""
    if up.where(path).startswith("*"):
        up.say(TAKEN, path, f"no such anchor in this text; UP's usual {up.values[path].plain}")
    up.put(f"{path}.kwargs", TRANSFORMS[name])
    up.soft_labels |= "mix" in name
    mixup, cutmix = (up.options.get(f"{way}_alpha", 0) > 0 for way in ("mixup", "cutmix"))
    if "switch_prob" in up.options and mixup != cutmix:  # UP leaves the other batches unmixed
        share = up.options["switch_prob"] if cutmix else 1 - up.options["switch_prob"]
        up.take("mix_prob", share, up.drop("switch_prob"), "one alpha is 0")
    return name


def read_unused_transforms(up: Reader) -> None:
    """Transforms at the top level that no list refers to."""
    uses = Counter(value.where for value in up.values.values())
    for path, value in up.values.items():
        block, name = path.removesuffix(".type"), str(value.plain)
        if "." in block or block == path or name not in TRANSFORMS or uses[value.where] > 1:
            continue
        if "dataset" in up.values:
            text = f"{name} is in no transformer list and no batch_fn: does nothing"
            up.say(DEFECT, block, text, whole=True)
        else:
            read_transform(up, block, "test" if name in VALIDATION else "train")


def read_trainer(up: Reader) -> None:
    read_length(up)
    for key in ("optimizer", "lr_scheduler"):
        if "trainer" in up.values and up.where(f"trainer.{key}") == key:
            up.say(DEFECT, key, "UP looks for it in `trainer` and stops with a KeyError")
    if name := up.known(f"{OPTIMIZER}.type", TABLES["optimizers"]):
        options, others = TABLES["optimizers"][name]
        up.defaults |= others
        up.put(f"{OPTIMIZER}.kwargs", options)
    read_groups(up)
    if name := up.known(f"{SCHEDULER}.type", TABLES["schedules"]):
        read_schedule(up, name)
    if not by_step(up):
        up.put("trainer", {"test_freq": "eval_every"})
    if up.get("ema.enable", bool, True):
        up.put("ema.kwargs", {"decay": "ema_decay"})
        if "ema" in up.values and "ema_decay" not in up.options:
            up.say(MISSING, "ema", "no kwargs.decay: no average of weights here; set ema_decay")
    for path in up.entries("hooks"):
        most, mode = f"{path}.kwargs.max_norm", up.known(f"{path}.kwargs.mode", ["pre_defined"])
        name = up.known(f"{path}.type", ["grad_clipper"])
        if name and mode and (norm := up.get(most, PositiveFloat)):
            up.take("clip_grad_norm", min(norm, up.options.get("clip_grad_norm", norm)), most)


def by_step(up: Reader) -> bool:
    """Whether the file means steps, even where UP does not read it."""
    return any(up.get(f"{home}iter_base", bool, False) for home in ("", "runtime."))


def read_length(up: Reader) -> None:
    """The number of epochs. UP uses max_iter if the configuration sets max_epoch too."""
    up.iterations = up.get("trainer.max_iter", PositiveInt) if up.steps else None
    if up.iterations:
        exact = up.iterations / up.steps
        up.epochs = max(1, round(exact))
        why = f"{up.iterations:,} steps are {exact:.2f} epochs of {up.steps:,}"
        up.take("epochs", up.epochs, "trainer.max_iter", why)
        if abs(exact - up.epochs) > 0.01 * exact:
            up.say(MISSING, "trainer.max_iter", f"{why}; a recipe has whole epochs")
    elif epochs := up.get("trainer.max_epoch", PositiveInt):
        up.epochs = epochs
        up.take("epochs", epochs, "trainer.max_epoch")


def read_groups(up: Reader) -> None:
    """Groups of norms and biases without decay become decay_norm_and_bias: false."""
    path, parts = f"{OPTIMIZER}.pconfig", []
    for leaf, value in up.values.items():
        name, _, key = leaf.removeprefix(f"{path}.").partition(".")
        if not leaf.startswith(f"{path}.") or isinstance(value.plain, dict | list):
            continue
        if name.startswith("nodecay["):
            parts.append(str(value.plain))
        elif not re.match(r"type|nodecay", key):  # which UP ignores inside a group
            decayless = re.fullmatch(r"(kwargs\.)?weight_decay", key) and value.plain == 0
            parts.append(name if decayless else "another kind of group")
    if all(re.search(SPARED, p) for p in parts) and any(re.search(NORMS, p) for p in parts):
        up.get(path, object)
        why = "here norms, biases and position embeddings together"
        up.take("decay_norm_and_bias", False, path, why)


def read_schedule(up: Reader, name: str) -> None:
    ours, key, table = TABLES["schedules"][name]
    path = f"{KWARGS}.{key}"
    written = sorted(up.get(path, Lengths, []))
    in_steps = by_step(up) or (up.iterations and written and written[-1] > 2 * (up.epochs or 0))
    epochs = [x / up.steps if in_steps and up.steps else x for x in written]
    if written and not up.epochs and not up.iterations:
        after = epochs[-1] - epochs[-2] if epochs[1:] else 0
        up.epochs = max(1, round(epochs[-1] + after))
        up.take("epochs", up.epochs, path, "no max_epoch in this text: a guess from this")
    warmup = read_warmup(up)
    up.take("schedule", ours, f"{SCHEDULER}.type")
    up.put(KWARGS, table)
    if ours == "multistep":
        read_milestones(up, path, epochs, warmup)
    elif written:
        read_cosine(up, name, written[-1], epochs[-1], warmup)


def read_milestones(up: Reader, path: str, epochs: list[float], warmup: int) -> None:
    """The milestones that UP applies, as whole epochs."""
    rounded = sorted({round(x) for x in epochs} - {0})
    if rounded != epochs:
        up.say(MISSING, path, f"as whole epochs, each once: {rounded}")
    first, end = warmup / (up.steps or math.inf), up.epochs or math.inf
    reached = [m for m in rounded if first <= m < end]
    if lost := sorted({*rounded} - {*reached}):
        text = f"UP never applies {lost}, inside the warm-up or after the last of {end} epochs"
        up.say(DEFECT, path, text)
    if reached:
        up.take("milestones", reached, path)
    else:
        up.take("schedule", "constant", f"{SCHEDULER}.type", "it never steps")


def read_warmup(up: Reader) -> int:
    """Takes the warm-up and the lr at its end; returns its number of steps."""
    path, lr, factor = f"{SCHEDULER}.warmup_register_type", up.options.get("lr"), 1
    if up.get(path, Literal["base", "no_scale_lr"], "base") == "base" and lr:
        factor = up.batch or 1
        text = f"not no_scale_lr: UP multiplies lr {lr:g} by GPUs x batch size, here by {factor:,}"
        up.say(DEFECT, path, text)
        up.take("lr", lr * factor, up.origin["lr"].where, f"{lr:g} x {factor:,}")
    kind = up.get(f"{SCHEDULER}.warmup_type", Literal["linear", "exp", "cosine"], "exp")
    ratio = up.get(f"{SCHEDULER}.warmup_ratio", float, -1.0)
    start = 1 / factor if ratio < 0 else ratio  # UP starts from the file's lr without a ratio
    steps = up.get(f"{SCHEDULER}.warmup_iter", NonNegativeInt, 0)
    up.take("warmup", TABLES["warmups"][kind], f"{SCHEDULER}.warmup_type")
    up.take("warmup_start_factor", start, f"{SCHEDULER}.warmup_ratio")
    if steps < 2:
        return 0
    up.take("warmup_steps", steps, f"{SCHEDULER}.warmup_iter")
    return steps


def read_cosine(up: Reader, name: str, written: float, epochs: float, warmup: int) -> None:
    """A cosine of so many epochs; up.cosine becomes the share of it that is gone at a step."""
    path, steps = f"{KWARGS}.T_max", up.steps or 0
    begin, after = 0.0, epochs * steps - warmup  # steps from the peak to the end
    if name == "CosineAnnealingLR":
        begin = up.get(f"{KWARGS}.warmup_iter", NonNegativeFloat, 0.0)
        if round(epochs) != up.epochs:
            up.take("cosine_epochs", after / steps if steps and after > 0 else epochs, path)
        last = written * (1 if up.get("runtime.iter_base", bool, False) else steps)
        up.cosine = lambda step: (step - begin) / (last - begin)
        return
    up.take("cosine_epochs", epochs, path, "from the end of the warm-up")
    if name == "CosineLREpochScheduler":
        begin = up.get(f"{KWARGS}.warm_epoch", NonNegativeFloat, warmup / (steps or 1))
    else:
        low = up.options.get("lr", 1.0) * up.get(f"{KWARGS}.eta_min", float, 0.0)
        up.take("lr_min", low, f"{KWARGS}.eta_min", "a share of lr in UP")
    up.cosine = lambda step: (step // steps - begin) / epochs


def compare_lr(up: Reader, recipe: Recipe) -> None:
    """Notes on a long warm-up, and on UP's lr where it differs: after it, at the end, at most."""
    steps, warmup, low, path = up.steps, recipe.warmup_steps, recipe.lr_min, f"{KWARGS}.T_max"
    total = up.iterations or recipe.epochs * (steps or 0)
    if steps and warmup > 0.25 * total:
        text = f"a warm-up of {warmup:,} of {total:,} steps, {warmup / steps:.1f} epochs"
        up.say(DEFECT, f"{SCHEDULER}.warmup_iter", text)
    if up.cosine is None or not steps or warmup >= recipe.epochs * steps:
        return
    ours = schedule.lr_schedule(recipe, steps)
    theirs = lambda t: low + (recipe.lr - low) * (1 + math.cos(math.pi * up.cosine(t))) / 2
    difference = lambda t: abs(theirs(t) - ours(t)) / recipe.lr
    if difference(warmup) > 1e-4:
        text = f"the warm-up takes {warmup:,} steps ({warmup / steps:.2f} epochs): in UP lr jumps "
        text += f"from {recipe.lr:.5g} to {theirs(warmup):.5g} after it"
        up.say(DEFECT, path, text)
    if abs(theirs(total - 1) - low) > 1e-4 * recipe.lr:
        text = f"in UP lr ends at {theirs(total - 1):.8g} and not at {low:g}"
        up.say(DEFECT, path, f"{text}, here at {ours(total - 1):.4g}")
    worst = max([*range(warmup, total, math.ceil(total / 5000)), total - 1], key=difference)
    if difference(worst) > 1e-3:
        text = f"UP's lr differs by up to {100 * difference(worst):.1f} % of its peak, in epoch "
        text += f"{worst // steps + 1} {theirs(worst):.5g}, here {ours(worst):.5g}"
        up.say(MISSING, path, f"not reproduced: {text}")


def read_net(up: Reader) -> None:
    for path in up.entries("net"):
        name = up.get(f"{path}.name", str, "")
        up.known(f"{path}.type", TABLES["parts"].get(name, []))
        if name == "backbone":
            read_backbone(up, path)
        elif name == "head":
            up.put(f"{path}.kwargs", {"dropout": "dropout"})
            if classes := up.get(f"{path}.kwargs.num_classes", PositiveInt):
                up.take("num_classes", classes, f"{path}.kwargs.num_classes")
                up.defaults["num_classes"] = classes  # of the loss
        elif f"{path}.kwargs.cls_loss" in up.values:
            read_loss(up, f"{path}.kwargs.cls_loss")


def timm_name(up: Reader, path: str) -> tuple[str, str]:
    """The timm name of a backbone, and UP's in small letters."""
    kind, kwargs = up.get(f"{path}.type", str, ""), f"{path}.kwargs"
    up.get(f"{path}.name", str), up.get(f"{kwargs}.normalize.type", str)
    key = re.sub(r"_d$|[^a-z0-9.]|transformer|224$", "", kind.lower())
    for part in ("scale", "width_mult", "mode"):
        key += re.sub(r"^1(\.0)?$", "", up.get(f"{kwargs}.{part}", str, ""))
    model = kind if kind in MODELS.values() else MODELS.get(key, "")
    if key.startswith("swin"):  # UP goes by the arguments, not by the name
        given = [up.get(f"{kwargs}.{name}", object, usual) for name, usual in SWIN.items()]
        model = next((name for name, own in TABLES["swins"].items() if own == given), "")
        if not model or model.split("_")[1] not in kind:
            up.say(DEFECT, f"{path}.type", f"UP goes by kwargs, not by name: {model or given}")
    if not model:
        near = "" if key.startswith("swin") else nearest(key, MODELS)
        near = re.sub("'(.+)'", lambda found: repr(MODELS[found[1]]), near)
        text = f"timm has no {kind} of these kwargs; choose a model{near}"
        up.say(MISSING, f"{path}.type", text)
    return model or kind, key


def read_backbone(up: Reader, path: str) -> None:
    """The network, and what it drops, normalises and freezes in training."""
    (model, key), kwargs = timm_name(up, path), f"{path}.kwargs"
    up.take("model", model, f"{path}.type")
    if key in RESNETS and up.get(f"{path}.type", str).endswith(("_D", "_d")):
        up.take("avg_down", True, f"{path}.type")
        text = "no whole ResNet-D in UP: 7x7 stem unless deep_stem, a padded pool in shortcuts; "
        up.say(DEFECT, f"{path}.type", f"{text}avg_down is the nearest, deep_stem makes it whole")
    up.put(kwargs, TABLES["backbone"])
    for begin, share in TABLES["drop_paths"].items():
        if key.startswith(begin) and "drop_path" not in up.options:
            up.take("drop_path", share, f"{path}.type", "UP's default")
    if f"{kwargs}.normalize" not in up.values and re.match("resnet|mobilenet|efficientnet", key):
        text = "missing: UP freezes every batch norm then; here they are trained"
        up.say(DEFECT, f"{kwargs}.normalize", text)


def read_loss(up: Reader, path: str) -> None:
    bias = f"{path}.kwargs.bias"
    name, biased = up.known(f"{path}.type", TABLES["losses"]), up.get(bias, bool, False)
    up.put(f"{path}.kwargs", TABLES["losses"].get(name, {}))
    if name == "bce" and biased:
        up.take("bce_sum", True, bias)
        up.take("bce_shift", True, bias)
        if not up.soft_labels:
            up.say(DEFECT, bias, "labels are not mixed: UP takes the mean over classes then")
    elif name == "bce":
        text = "no bias, so UP takes the mean over classes; its strikes files have it and the sum"
        up.say(DEFECT, bias, text)
    if up.soft_labels and (share := up.options.get("label_smoothing")):
        text = f"mixed labels sum to 1 - {share:g} / classes in UP"
        up.take("up_smoothing", True, f"{path}.type", text)


def read_distillation(up: Reader) -> None:
    runner = up.get("runtime.runner.type", str, "base")
    teachers = [path for path in up.values if re.fullmatch(r"mimic\.\w*teacher\w*", path)]
    if "net" in up.values and bool(teachers) != (runner == "kd"):
        up.say(DEFECT, "mimic", "UP distils only with runtime.runner.type kd and a mimic")
    if not up.get("mimic.task_loss", bool, True):
        up.take("task_weight", 0.0, "mimic.task_loss")
    for teacher in teachers[:1]:
        read_teacher(up, teacher)
        read_pairs(up, teacher)


def read_teacher(up: Reader, teacher: str) -> None:
    """The weights of teacher and student, and timm's name of the teacher's network."""
    weights = up.get(f"{teacher}.teacher_weight", str)
    if not weights:
        text = "no teacher_weight: UP then distils from random weights without a warning; set one"
        up.say(MISSING, teacher, text)
    up.take("teacher", [weights or "name-the-teacher"], f"{teacher}.teacher_weight")
    if "weights" not in up.options:
        up.put("mimic.student", {"student_weight": "weights"})
    net = f"{teacher.removeprefix('mimic.')}[0]"
    if net not in up.values:
        up.say(MISSING, net, "a network that is not in this text; set teacher_model")
        return
    model, key = timm_name(up, net)
    flags = [up.get(f"{net}.kwargs.{flag}", bool, False) for flag in ("deep_stem", "avg_down")]
    flags[1] |= up.get(f"{net}.type", str, "")[-2:] in ("_d", "_D")
    if any(flags) and not (all(flags) and key in RESNETS):
        up.say(MISSING, net, f"timm has no {model} with deep_stem or avg_down alone")
    up.take("teacher_model", [f"{model}d" if all(flags) else model], f"{net}.type")


def read_pairs(up: Reader, teacher: str) -> None:
    """The modules that are compared, and their loss, in the form of either version."""
    sides = [up.get(f"{p}.mimic_name", Texts, []) for p in ("mimic.student", teacher)]
    if not sides[0] or len(sides[0]) != len(sides[1]):
        raise UnitedPerceptionError(f"mimic: the mimic_names {sides} are no pairs")
    kwargs, path, kind = "mimic", "mimic.mimic_type", "l2"
    if old := [key for key in ("mimic_name", "mimic_type") if up.get(f"mimic.{key}", str)]:
        text = f"UP's last version ignores {', '.join(old)} and student_weight; without cfgs it"
        up.say(DEFECT, "mimic", f"{text} takes an L2 loss of normalised logits")
        kind = "kl"
    if "mimic.cfgs.loss" in up.values:
        kwargs, path, kind = "mimic.cfgs.loss.kwargs", "mimic.cfgs.loss.type", "l2"
    kind = up.get(path, str, kind).removesuffix("_loss")
    if kind not in TABLES["mimic_losses"]:
        up.say(MISSING, path, f"no counterpart of {kind}; kl is taken")
    loss = TABLES["mimic_losses"].get(kind, "kl")
    if loss in losses_with_temperature:
        up.take("temperature", up.get(f"{kwargs}.T", PositiveFloat, 1.0), f"{kwargs}.T")
    ours = lambda name: "logits" if name == "head.classifier" else name.removeprefix("backbone.")
    pairs = [(ours(student), ours(other)) for student, other in zip(*sides, strict=True)]
    losses = [loss if s == "logits" or loss.startswith("l2") else "l2_normalized" for s, _ in pairs]
    if set(losses) != {loss}:
        up.say(MISSING, path, f"{loss} compares logits; l2_normalized is taken for the others")
    texts = ["logits" if s == t == "logits" else f"{s} -> {t}" for s, t in pairs]
    up.take("distill_pairs", texts, "mimic.student.mimic_name")
    up.take("kd_loss", losses, path)
    weights = [up.get(f"{p}.loss_weight", float, 1.0) for p in ("mimic", "mimic.cfgs.loss.kwargs")]
    up.take("kd_weight", [math.prod(weights) / len(pairs)] * len(pairs), "mimic.loss_weight")
    up.asked.add("mimic.warm_up_iters")
    if up.steps:
        steps = max(0, up.get("mimic.warm_up_iters", int, 0))
        up.take("kd_warmup_epochs", steps / up.steps, "mimic.warm_up_iters")
