"""United Perception's `lr_scheduler`: warm-up, schedule, and where its lr differs from ours."""

import math
from dataclasses import dataclass
from functools import partial

from workbench import schedule
from workbench.importers.up_reader import DEFECT, MISSING, NOTHING, TABLES, Reader, nearest
from workbench.importers.up_yaml import Node
from workbench.recipe import Recipe


def by_step(up: Reader) -> bool:
    """Whether the file means steps, even where UP does not read it."""
    return any(up.get(up.root, f"{home}iter_base", bool, False) for home in ("", "runtime."))


@dataclass
class Lengths:
    """The lengths that a scheduler names: milestones, a period or a total."""

    written: list[float]
    where: str
    epochs: list[float]
    last_step: float  # the longest, in steps, as UP counts


def read_schedule(up: Reader, at: Node) -> None:
    name, kwargs = up.get(at, "type", str, ""), up.block(at, "kwargs")
    ours, key, table = TABLES["schedules"].get(name, ("", "T_max", {}))
    key = "max_iter" if name == "polylr" and up.get(kwargs, "max_iter", int, -1) > 0 else key
    written = up.get(kwargs, key, [float], [], minimum=1e-9)
    longest = max(written, default=0)
    in_steps = by_step(up) or key == "max_iter"
    in_steps |= bool(up.iterations and longest > 2 * (up.epochs or 0))
    epochs = sorted(x / up.steps if in_steps and up.steps else x for x in written)
    read_by_step = up.get(up.root, "runtime.iter_base", bool, False)
    last_step = longest if read_by_step else longest * (up.steps or 0)
    lengths = Lengths(written, up.where(kwargs, key), epochs, last_step)
    if up.epochs is None and not up.iterations and written:
        guess_epochs(up, ours, lengths)
    warmup = read_warmup(up, at, 1 if in_steps else up.steps)
    if not ours:
        text = f"no counterpart of {name or 'none'}; a cosine is taken"
        up.say(MISSING, f"{at.where}.type", text + nearest(name, TABLES["schedules"]))
        return
    up.take("schedule", ours, f"{at.where}.type")
    up.put(kwargs, table)
    if ours in ("multistep", "step"):
        read_milestones(up, at, name, lengths, warmup)
    elif written:
        read_smooth(up, kwargs, name, lengths, warmup)
    elif name == "polylr":
        up.say(DEFECT, lengths.where, "missing: UP takes -1, so lr grows as (1 + epochs)^power")


def guess_epochs(up: Reader, ours: str, lengths: Lengths) -> None:
    """The epochs of a text without max_epoch."""
    last = round(lengths.epochs[-1])
    before = round(lengths.epochs[-2]) if lengths.epochs[1:] else 0
    up.epochs = max(1, {"multistep": 2 * last - before, "step": 3 * last}.get(ours, last))
    up.take("epochs", up.epochs, lengths.where, "no max_epoch in this text: a guess from this")


def read_milestones(up: Reader, at: Node, name: str, lengths: Lengths, warmup: int) -> None:
    ours, epochs = up.values["schedule"], lengths.epochs
    warmup_epochs = warmup / up.steps if up.steps else up.values.get("warmup_epochs", 0)
    if ours == "step" and epochs and 0 < (every := round(epochs[0])) < warmup_epochs:
        ours, epochs = "multistep", [*range(every, up.epochs or every, every)]
        up.take("schedule", ours, f"{at.where}.type")
    rounded = sorted({round(x) for x in epochs} - {0})
    reached = [m for m in rounded if m < (up.epochs or math.inf)]
    if late := rounded[len(reached) :]:
        text = f"{late} are never reached in {up.epochs} epochs"
        up.say(DEFECT, lengths.where, text)
    if rounded != epochs:
        up.say(MISSING, lengths.where, f"as whole epochs, each once: {rounded}")
    if (early := [m for m in reached if m < warmup_epochs]) and ours == "multistep":
        up.say(DEFECT, lengths.where, f"{early} inside the warm-up: UP never applies them")
        reached = reached[len(early) :]
    if not reached:
        up.take("schedule", "constant", f"{at.where}.type", f"{name} that never steps")
    elif ours == "step":
        up.take("lr_step_epochs", reached[0], lengths.where)
    else:
        up.take("milestones", reached, lengths.where)


# the warm-up


def read_warmup(up: Reader, at: Node, steps_per_unit: int | None) -> int:
    """Takes the warm-up and the lr at its end; returns its number of steps."""
    steps = up.get(at, "warmup_iter", int, 0, minimum=0)
    epochs = up.get(at, "warmup_epochs", float, 0.0, minimum=0)
    from_epochs = int(epochs * (steps_per_unit or 0))
    by_epochs = from_epochs > steps or (epochs and not steps)
    key, other = ("warmup_iter", "warmup_epochs")[:: -1 if by_epochs else 1]
    if steps and epochs:
        up.say(NOTHING, up.where(at, other), f"{key} is longer")
    steps, where = max(steps, from_epochs), up.where(at, key)
    if by_epochs and steps_per_unit != 1 and (epochs.is_integer() or not steps_per_unit):
        up.take("warmup_epochs", epochs, where)
    elif steps > 1:
        up.take("warmup_steps", steps, where)
    factor, kind = scale_lr(up, at), up.get(at, "warmup_type", str, "exp")
    ratio = up.get(at, "warmup_ratio", float, -1.0)
    start = 1 / factor if ratio < 0 else ratio
    if steps == 1:
        up.say(DEFECT, where, f"UP never ends one step: lr stays at {start:g} of its target")
        up.take("lr", up.values.get("lr", 0.1) * start, where, f"{start:g} of its target")
    elif steps or epochs:
        take_warmup_form(up, at, kind, start)
        why = "UP starts from the file's lr then" if ratio < 0 else ""
        up.take("warmup_start_factor", start, up.where(at, "warmup_ratio"), why)
    for key in ("warmup_type", "warmup_ratio"):
        if key in at.value and not (steps or epochs):
            up.say(NOTHING, at.value[key], "there is no warm-up")
    if up.total and steps >= up.total:
        text = f"a warm-up of {steps:,} of {up.total:,} steps never reaches lr; shorten it"
        up.say(DEFECT, where, text)
    elif up.total and steps > 0.25 * up.total and abs(steps * ratio - 10) < 0.2:
        text = f"{steps / up.steps:.1f} of {up.epochs} epochs; as warmup_ratio is 1 /"
        text += f" {1 / ratio:,.0f}, {steps // 10:,} to {1 / ratio:,.0f} steps may be meant"
        up.say(DEFECT, where, text)
    return 0 if steps == 1 else steps


def take_warmup_form(up: Reader, at: Node, kind: str, start: float) -> None:
    where = up.where(at, "warmup_type")
    if kind not in TABLES["warmups"]:
        up.say(DEFECT, where, "UP knows no such warm-up; linear is taken")
        kind = "linear"
    elif kind == "exp" and start == 0:
        up.say(DEFECT, where, "it multiplies from 0; linear is taken")
        kind = "linear"
    why = "UP's default" if "warmup_type" not in at.value else ""
    up.take("warmup", TABLES["warmups"][kind], where, why)


def scale_lr(up: Reader, at: Node) -> float:
    """Multiplies lr as UP does without no_scale_lr; returns the factor."""
    register = up.get(at, "warmup_register_type", str, "base")
    where, lr = up.where(at, "warmup_register_type"), up.values.get("lr")
    if register == "no_scale_lr" or up.get(at, "type", str) == "OneCycleLR":
        return 1.0
    if register != "base" or not up.batch or lr is None:
        why = "UP multiplies lr by GPUs x batch size unless this is no_scale_lr"
        why = why if register == "base" else f"UP knows no {register}"
        up.say(DEFECT, where, f"{why}; lr is left unchanged")
        return 1.0
    text = f"not no_scale_lr, so UP multiplies lr {lr:g} by GPUs x batch size {up.batch:,}"
    up.say(DEFECT, where, f"{text}: {lr * up.batch:.8g} is taken")
    up.take("lr", lr * up.batch, up.origin["lr"].where, f"{lr:g} x {up.batch:,}")
    return float(up.batch)


# schedules without steps, and the comparison of a cosine with UP's

BEGIN = {"CosineAnnealingLR": "warmup_iter", "CosineLREpochScheduler": "warm_epoch"}


def read_smooth(up: Reader, kwargs: Node, name: str, lengths: Lengths, warmup: int) -> None:
    """Options of a cosine, a polynomial or a cycle."""
    steps, epochs, where = up.steps or 0, lengths.epochs[-1], lengths.where
    if name in ("polylr", "OneCycleLR"):
        if epochs != up.epochs:
            text = f"{epochs:g} epochs to UP, which does not stop there; here {up.epochs}"
            up.say(DEFECT, where, text)
        if name == "OneCycleLR" and up.get(kwargs, "cycle_momentum", bool, True):
            up.say(MISSING, where, "not reproduced: momentum between 0.95 and 0.85")
        if warmup:
            up.say(
                MISSING, where, f"UP counts the {warmup:,} steps of the warm-up; here it follows"
            )
        return
    default = warmup / (steps or 1) if name == "CosineLREpochScheduler" else 0.0
    key = BEGIN.get(name, where.rpartition(".")[2])
    begin = up.get(kwargs, key, float, default, minimum=0) if name in BEGIN else 0.0
    if name != "CosineAnnealingLR":
        up.take("cosine_epochs", epochs, where, "from the end of the warm-up")
    elif round(epochs) != up.epochs:
        after = epochs * steps - warmup  # steps from the peak to the end
        up.take("cosine_epochs", after / steps if steps and after > 0 else epochs, where)
    if name == "EpochBasedCosineAnnealingLR":
        low = up.values.get("lr", 1.0) * up.get(kwargs, "eta_min", float, 0.0)
        up.take("lr_min", low, up.where(kwargs, "eta_min"), "a share of lr in UP")
    if steps and up.total:
        begin_at = begin, up.where(kwargs, key)
        up.checks.append(partial(compare_cosine, up, name, begin_at, lengths, warmup))
    elif name == "CosineAnnealingLR" and begin != warmup:
        text = f"{begin:g}, but the warm-up takes {warmup:,} steps: in UP lr jumps; not here"
        up.say(DEFECT, up.where(kwargs, key), text)


def compare_cosine(
    up: Reader,
    name: str,
    begin_at: tuple[float, str],
    lengths: Lengths,
    warmup: int,
    recipe: Recipe,
) -> None:
    """Notes on UP's lr where it differs: after the warm-up, at the end, and at most."""
    steps, total, where, (begin, begin_where) = up.steps, up.total, lengths.where, begin_at
    if warmup >= recipe.epochs * steps:
        return
    ours, epochs, last = schedule.lr_schedule(recipe, steps), lengths.epochs[-1], lengths.last_step

    def theirs(t: int) -> float:
        by_steps = name == "CosineAnnealingLR"
        share = (t - begin) / (last - begin) if by_steps else (t // steps - begin) / epochs
        wave = (1 + math.cos(math.pi * share)) / 2
        return recipe.lr_min + (recipe.lr - recipe.lr_min) * wave

    difference = lambda t: abs(theirs(t) - ours(t)) / recipe.lr
    if difference(warmup) > 1e-4:
        text = f"{begin:g}, but " if "warm" in begin_where else ""
        text += f"the warm-up takes {warmup:,} steps ({warmup / steps:.2f} epochs): in UP lr "
        text += f"jumps from {recipe.lr:.5g} to {theirs(warmup):.5g} after it"
        up.say(DEFECT, begin_where, text)
    longest = max(lengths.written)
    mistaken = longest != epochs and last == longest * steps
    if abs(theirs(total - 1) - recipe.lr_min) > 1e-4 * recipe.lr:
        text = f"{longest:,.0f} epochs to UP while runtime.iter_base is not true: " * mistaken
        text += f"in UP lr ends at {theirs(total - 1):.8g} and not at {recipe.lr_min:g}"
        up.say(DEFECT, where, f"{text}, here at {ours(total - 1):.4g}")
    points = [*range(warmup, total, math.ceil(total / 5000)), total - 1]
    worst = max(points, key=difference)
    if difference(worst) > 1e-3 and not mistaken:
        text = f"UP's lr differs by up to {100 * difference(worst):.1f} % of its peak, in epoch "
        text += f"{worst // steps + 1} {theirs(worst):.5g}, here {ours(worst):.5g}"
        up.say(MISSING, where, f"not reproduced: {text}")
