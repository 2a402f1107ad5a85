"""United Perception's `net`: backbone, head and loss."""

import re
from collections.abc import Callable

from workbench.importers.up_reader import DEFECT, MISSING, TABLES, Reader, nearest
from workbench.importers.up_yaml import Node
from workbench.recipe_checks import RESNETS

SWINS = TABLES["swins"]
MODELS: dict[str, str] = {name: name for name in RESNETS} | TABLES["models"]


def read_net(up: Reader, node: Node | None, take: Callable) -> None:
    """Passes the options of a network to `take`: the recipe's, or those of a teacher."""
    for block in up.entries(node):
        name, kind = up.get(block, "name", str, ""), up.get(block, "type", str, "")
        kwargs = up.block(block, "kwargs")
        if kind not in (known := TABLES["parts"].get(name, [kind])):
            text = f"no counterpart of {kind}; {known[0]} is taken{nearest(kind, known)}"
            up.say(MISSING, up.where(block, "type"), text)
        if name == "backbone" and kind:
            if take == up.take and "model" in up.values:
                up.say(MISSING, block.where, "a second backbone; the last is taken")
            read_backbone(up, block, kind, take)
        elif name == "head" or kind.endswith("_head"):
            read_head(up, kwargs, take)
        elif "cls_loss" in kwargs.value and take == up.take:
            read_loss(up, kwargs.value["cls_loss"])
        elif not name.startswith("post") or take != up.take:
            up.say(MISSING, block, f"no counterpart of {name} {kind}".rstrip())


def read_head(up: Reader, kwargs: Node, take: Callable) -> None:
    up.put(kwargs, {"dropout": "dropout"}, take)
    where = up.where(kwargs, "num_classes")
    if counts := up.get(kwargs, "num_classes", [int], [], minimum=1):
        take("num_classes", counts[0], where)
        up.defaults = {"num_classes": counts[0], **up.defaults}
    if len(counts) > 1:
        up.say(MISSING, where, f"no counterpart of {len(counts)} heads; one is taken")


def read_backbone(up: Reader, block: Node, kind: str, take: Callable) -> None:
    kwargs, where = up.block(block, "kwargs"), up.where(block, "type")
    plain = re.sub("_[dD]$", "", kind)
    key = re.sub(r"[^a-z0-9.]|transformer|224$", "", plain.lower())
    for part in ("scale", "width_mult", "mode"):
        key += re.sub(r"^1(\.0)?$", "", up.get(kwargs, part, str, ""))
    if key.startswith("swin"):
        plain = key = swin(up, kwargs, kind, where)
    model = MODELS.get(key, plain)
    if model in MODELS.values():
        take("model", model, where)
    else:
        take("model", kind, where)
        text = f"timm has no {kind}" + " of these kwargs" * key.startswith("swin")
        near = re.sub("'(.+)'", lambda found: repr(MODELS[found[1]]), nearest(key, MODELS))
        up.say(MISSING, where, f"{text}; choose a model{near}")
    if plain != kind and key in RESNETS:
        take("avg_down", True, where)
        text = "no whole ResNet-D in UP: 7x7 stem unless deep_stem, a padded pool in shortcuts"
        up.say(DEFECT, where, f"{text}; avg_down is the nearest, deep_stem makes it whole")
    up.put(kwargs, TABLES["backbone"], take)
    up.block(kwargs, "normalize")
    if take == up.take:
        read_training_of(up, kwargs, key, where)


def swin(up: Reader, kwargs: Node, kind: str, where: str) -> str:
    """The model that the arguments describe: UP does not go by the name."""
    keys, usual = ("embed_dim", "depths", "num_heads"), SWINS["tiny"]
    shape = [up.get(kwargs, k, object, u) for k, u in zip(keys, usual, strict=True)]
    size = next((size for size, own in SWINS.items() if own == shape), "of no known size")
    window = {7: "", 12: "384"}.get(up.get(kwargs, "window_size", int, 7), "w")
    if size not in kind:
        up.say(DEFECT, where, f"UP goes by kwargs, not by name: Swin {size}, {shape}")
    return f"swin{size}{window}"


def read_training_of(up: Reader, kwargs: Node, key: str, where: str) -> None:
    """What a backbone drops, normalises and freezes in training."""
    for begin, share in TABLES["drop_paths"].items():
        if key.startswith(begin) and "drop_path" not in up.values:
            up.take("drop_path", share, where, "UP's default")
    if key.startswith(("vit", "deit")):
        text = "not reproduced: dropout and attention dropout in every block, 0.1 by default; drop "
        text += "path of every block alike; here it grows from 0 in the first to drop_path"
        up.say(MISSING, where, text)
    if "normalize" not in kwargs.value and re.match("resnet|mobilenet|efficientnet", key):
        text = "missing: UP freezes every batch norm then; here they are trained"
        up.say(DEFECT, up.where(kwargs, "normalize"), text)
    if frozen := up.get(kwargs, "frozen_layers", [int], [], minimum=0):
        names = [part for i in frozen for part in ([f"layer{i}"] if i else ["conv1", "bn1"])]
        up.take("freeze", names, where := up.where(kwargs, "frozen_layers"))
        if key not in RESNETS:
            up.say(MISSING, where, "timm names these otherwise; choose modules of the model")


def read_loss(up: Reader, node: Node) -> None:
    if isinstance(node.value, list):
        node.read = True
        for other in node.value[1:]:
            up.say(MISSING, other, "no counterpart: the loss of another head")
        node = next(iter(node.value), Node({}, node.where, node.line))
    at = up.mapping(node)
    name, where, kwargs = up.get(at, "type", str, ""), f"{at.where}.type", up.block(at, "kwargs")
    mixed = up.values.get("mixup_alpha", 0) > 0 or up.values.get("cutmix_alpha", 0) > 0
    if name == "bce":
        bias, place = up.get(kwargs, "bias", bool, False), up.where(kwargs, "bias")
        why = "" if bias else "mean over classes; UP's strikes files have bias: true"
        up.take("loss", "bce", where, why)
        for option in ("bce_sum", "bce_shift") if bias else ():
            up.take(option, True, place)
        if bias and not up.soft_labels:
            up.say(DEFECT, place, "labels are not mixed: UP takes the mean over classes then")
    elif name in ("ce", "stce", "label_smooth_ce"):
        up.take("loss", "ce", where)
        if name == "label_smooth_ce":
            up.put(kwargs, {"smooth_ratio": "label_smoothing"})
        if name == "stce" and not up.soft_labels and "dataset" in up.root.value:
            up.say(DEFECT, where, "UP's stce takes mixed labels alone and fails on these")
        if mixed and (share := up.values.get("label_smoothing")):
            text = f"mixed labels sum to 1 - {share:g} / classes in UP, and with up_smoothing"
            up.say(DEFECT, up.where(at, "kwargs.smooth_ratio"), text)
            up.take("up_smoothing", True, where, "labels are mixed")
    else:
        near = nearest(name, ("ce", "stce", "label_smooth_ce", "bce"))
        up.say(MISSING, where, f"no counterpart of {name or 'none'}; ce is taken{near}")
