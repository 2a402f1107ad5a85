"""United Perception's `trainer`, `ema`, `saver` and `hooks`: length, optimizer and its groups."""

import re

from workbench.importers import up_schedules
from workbench.importers.up_reader import (
    DEFECT,
    MISSING,
    NOTHING,
    NOTHING_KEYS,
    TABLES,
    Reader,
    nearest,
)
from workbench.importers.up_yaml import Node

NORMS = r"ndim_is1|bias$|_b$|bn|norm|(^|[._])ln"  # in names of parameters
SPARED = f"{NORMS}|pos_|position|token"
GROUPS = "bn_w bn_b ln_w ln_b linear_w linear_b nodecay".split()


def read_trainer(up: Reader) -> None:
    whole = "trainer" in up.root.value
    at = up.block(up.root, "trainer") if whole else up.root
    read_length(up, at)
    for key, read in (("optimizer", read_optimizer), ("lr_scheduler", up_schedules.read_schedule)):
        home = at if key in at.value else up.root
        if whole and home is up.root:
            text = "UP looks for it in `trainer` and stops with a KeyError"
            up.say(DEFECT, key, text + ("; taken from here" * (key in home.value)))
        if key in home.value:
            read(up, up.block(home, key))
    if every := up.get(at, "test_freq", int, minimum=1):
        in_steps = up.iterations and (up_schedules.by_step(up) or every > (up.epochs or every))
        why = f"{every:,} steps" if in_steps and up.steps else ""
        every = min(max(1, round(every / up.steps)), up.epochs) if why else every
        up.take("eval_every", every, up.where(at, "test_freq"), why)
    ema = up.block(up.root, "ema")
    if up.get(ema, "enable", bool, True):
        up.put(up.block(ema, "kwargs"), {"decay": "ema_decay"})
    else:
        up.say(NOTHING, ema, "enable is false")


def read_length(up: Reader, at: Node) -> None:
    up.epochs = up.get(at, "max_epoch", int, minimum=1)
    up.iterations = up.get(at, "max_iter", int, minimum=1)
    where = up.where(at, "max_iter")
    if up.iterations and up.epochs:
        up.say(DEFECT, up.where(at, "max_epoch"), "UP takes max_iter where both are there")
        up.epochs = None
    if up.epochs:
        up.take("epochs", up.epochs, up.where(at, "max_epoch"))
    elif up.iterations and up.steps:
        exact = up.iterations / up.steps
        up.epochs = max(1, round(exact))
        why = f"{up.iterations:,} steps are {exact:.2f} epochs of {up.steps:,}"
        up.take("epochs", up.epochs, where, why)
        if abs(exact - up.epochs) > 0.01 * exact:
            up.say(MISSING, where, f"{why}; a recipe has whole epochs, {up.epochs} here")
    elif up.iterations:
        up.say(MISSING, where, "no batch size in this text; set epochs")


def read_optimizer(up: Reader, at: Node) -> None:
    name, kwargs, where = up.get(at, "type", str, ""), up.block(at, "kwargs"), at.where
    plain = {"lr": "lr", "weight_decay": "weight_decay"}
    ours, options, others = TABLES["optimizers"].get(name, ("", plain, {}))
    up.defaults |= others
    up.put(kwargs, options)
    if ours:
        up.take("optimizer", ours, f"{where}.type")
    else:
        near = nearest(name, TABLES["optimizers"])
        up.say(MISSING, f"{where}.type", f"no counterpart of {name or 'none'}; sgd is taken{near}")
    for key, node in kwargs.value.items():
        if ours and key not in (*options, *others, "pconfig", "special_param_group"):
            up.say(DEFECT, node, f"{name} does not take it: UP stops with a TypeError")
    if "lr" not in kwargs.value:
        up.say(DEFECT, f"{where}.kwargs", f"no lr; {up.values.get('lr', 0.1)} is taken")
    if up.values.get("nesterov") and not up.values["momentum"]:
        text = "torch refuses nesterov without momentum; left out"
        up.say(DEFECT, up.drop("nesterov"), text)
    for home in (at, kwargs):
        for key in ("pconfig", "special_param_group"):
            read_groups(up, home.value.get(key))


def read_groups(up: Reader, node: Node | None) -> None:
    """Groups without decay become decay_norm_and_bias: false; by layer type or by name."""
    many = node is None or isinstance(node.value, list)
    for entry in up.entries(node) if many else [up.mapping(node)]:
        named = up.get(entry, "key", str)
        groups = {named: entry} if named else entry.value
        for name, group in sorted(groups.items(), key=lambda pair: pair[0] == "nodecay"):
            if name in GROUPS or named:
                read_group(up, name, group)
            elif name == "layer_decay":
                up.put(group, {"value": "layer_decay", "base_lr": "lr"})
            else:
                up.say(DEFECT, group, f"UP knows no group {name} and stops with a KeyError")


def read_group(up: Reader, name: str, group: Node) -> None:
    parts, decays = [name], [0.0]
    if name == "nodecay":
        parts = up.get(Node({name: group}, "", group.line), name, [str])
    else:
        decays = [up.get(group, f"{path}weight_decay", float) for path in ("", "kwargs.")]
    known = "decay_norm_and_bias" in up.values or any(re.search(NORMS, part) for part in parts)
    if 0 in decays and known and all(re.search(SPARED, part) for part in parts):
        why = f"{name} has none; here norms, biases and position embeddings together"
        up.take("decay_norm_and_bias", False, group.where, why)
    else:
        text = "no counterpart: groups differ in decay alone, see decay_norm_and_bias"
        up.say(MISSING, group, text)


def read_run(up: Reader) -> None:
    options = {"auto_resume": "auto_resume", "pretrain_model": "weights"}
    up.put(up.block(up.root, "saver"), {**options, "resume_model": "resume_from"})
    if "resume_from" in up.values:
        text = "a run folder can be resumed; of a checkpoint of UP take the weights: `weights`"
        up.say(NOTHING, "saver.resume_model", text)
        if "weights" in up.values:
            up.say(DEFECT, up.drop("weights"), "resume_model comes first; left out")
    for at in up.entries(up.root.value.get("hooks")):
        name, mode = up.get(at, "type", str, ""), up.get(at, "kwargs.mode", str, "")
        if name in NOTHING_KEYS:
            up.say(NOTHING, at, NOTHING_KEYS[name])
        elif name != "grad_clipper":
            near = nearest(name, [*NOTHING_KEYS, "grad_clipper"])
            up.say(MISSING, at, f"no counterpart of {name}{near}")
        elif mode not in ("", "pre_defined"):
            up.say(MISSING, at, f"no counterpart of {mode}, a limit that follows the norms")
        elif most := up.get(at, "kwargs.max_norm", float, minimum=1e-9):
            norm = min(most, up.values.get("clip_grad_norm", most))
            why = "" if norm == most else "LAMB's own is smaller"
            up.take("clip_grad_norm", norm, up.where(at, "kwargs.max_norm"), why)
