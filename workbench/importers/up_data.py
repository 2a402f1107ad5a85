"""United Perception's `runtime` and `dataset`: lists, transforms, batches."""

import posixpath
import re

from workbench.importers.up_reader import DEFECT, MISSING, NOTHING, TABLES, TAKEN, Reader, nearest
from workbench.importers.up_yaml import Node, error_at

TRANSFORMS = TABLES["transforms"]
VALIDATION = ("torch_resize", "torch_center_crop")


def read_runtime(up: Reader) -> None:
    at = up.block(up.root, "runtime")
    up.put(at, {"random_seed": "seed"})
    if (device := up.get(at, "device", str)) in ("cpu", "mps"):
        up.take("device", device, "runtime.device")
    fp16, whole = up.get(at, "fp16", object), {"dataset", "trainer"} <= set(up.root.value)
    if fp16 is False or (not fp16 and (whole or "fp16" in up.root.value)):
        up.take("precision", "fp32", "runtime.fp16", "UP's default" if fp16 is None else "")


def read_data(up: Reader) -> None:
    data, train = up.block(up.root, "dataset"), up.block(up.root, "dataset.train")
    sides = {side: up.block(data, f"{side}.dataset") for side in ("train", "test")}
    if not {"train", "test"} & set(data.value):
        sides["train"] = data  # the inner block alone
    if "dataset" in up.root.value:
        up.take("dataset", "files", "dataset")
    paths: dict[str, tuple[list[str], str]] = {}
    for side, block in sides.items():
        kwargs = up.block(block, "kwargs")
        for key, end in (("meta_file", "list"), ("image_reader.kwargs.image_dir", "root")):
            if found := up.get(kwargs, key, [str]):
                paths[f"{side.replace('test', 'val')}_{end}"] = found, up.where(kwargs, key)
        read_transforms(up, kwargs, side)
    up.put(up.block(sides["train"], "kwargs"), {"fraction": "train_fraction"})
    take_paths(up, paths)
    for key in ("batch_sampler", "dataloader"):
        if key in train.value and (node := up.at(data, key)):
            up.say(DEFECT, node, f"UP reads dataset.train.{key} alone")
        if node := up.at(data, f"test.{key}"):
            up.say(NOTHING, node, "chosen here, it changes no result")
    read_batches(up, Node({**data.value, **train.value}, train.where, data.line))
    read_unused_transforms(up)
    take_validation_size(up)


def take_paths(up: Reader, paths: dict[str, tuple[list[str], str]]) -> None:
    """Absolute paths become data_dir and paths below it; others are taken unchanged."""
    clean, folders = {}, []
    for option, (found, where) in paths.items():
        if not all(found):
            up.say(DEFECT, where, "an empty path: UP finds nothing")
            continue
        found = [p if "://" in p else re.sub("^//", "/", posixpath.normpath(p)) for p in found]
        clean[option] = found, where
        folders += map(posixpath.dirname, found) if option.endswith("list") else found
    absolute = bool(folders) and all(path.startswith("/") for path in folders)
    base = posixpath.commonpath(folders) if absolute else "/"
    for option, (found, where) in clean.items():
        below = [posixpath.relpath(path, base) for path in found] if base != "/" else found
        up.take(option, below, where)
    if base != "/":
        up.take("data_dir", base, "dataset", "holds all its lists and images")
    elif folders and not absolute:
        up.say(NOTHING, "dataset", "its paths are relative or in a store; set data_dir")


def read_batches(up: Reader, at: Node) -> None:
    sampler = up.block(at, "batch_sampler.kwargs")
    loader = up.block(at, "dataloader.kwargs")
    if up.get(sampler, "sampler.type", str) == "class_balance":
        up.take("class_balanced_sampling", 1.0, up.where(sampler, "sampler.type"))
    if size := up.get(sampler, "batch_size", int, minimum=1):
        up.batch, why = size * (up.gpus or 1), f"{size:,} on each of {up.gpus or 1:,} GPUs"
        up.take("batch_size", up.batch, up.where(sampler, "batch_size"), why)
    up.put(sampler, {"drop_last": "drop_last"})
    up.put(loader, {"drop_last": "drop_last", "num_workers": "workers"})
    if "batch_fn" in loader.value:
        read_transform(up, up.block(loader, "batch_fn"), "train")


def read_transforms(up: Reader, kwargs: Node, side: str) -> None:
    node = kwargs.value.get("transformer")
    done = [read_transform(up, entry, side) for entry in up.entries(node)]
    names = [name for name in done if name in TRANSFORMS and "flip" not in name]
    order = [list(TRANSFORMS).index(name) for name in names]  # a flip may be anywhere
    if order != sorted(order):
        text = "here the order is crop, flip, AutoAugment, RandAugment, jitter, erase"
        up.say(MISSING, node.where, text)
    for name, text in TABLES["expected"][side].items() if done else ():
        if name not in done:
            up.say(MISSING, node.where, f"no {name}: {text}")
    kinds = [name.removesuffix("Incre") for name in done if name]
    for name in sorted({name for name in kinds if kinds.count(name) > 1}):
        up.say(MISSING, node.where, f"UP applies every {name}; only the last is taken")
    if side == "train" and "to_tensor" in done and "normalize" not in done:
        up.take("mean", [0.0] * 3, node.where, "has no normalize")
        up.take("std", [1.0] * 3, node.where, "has no normalize")


def read_transform(up: Reader, node: Node, side: str) -> str:
    """Takes the options of one transform or batch function; returns its type."""
    name, kwargs = up.get(node, "type", str, ""), up.block(node, "kwargs")
    if node.where.startswith("*"):
        text = f"no such anchor in this text; UP's usual {name} {kwargs.plain() or ''}".rstrip()
        up.say(TAKEN, node.where, text)
    if name not in TRANSFORMS:
        text = f"no counterpart of {name or 'what has no type'}{nearest(name, TRANSFORMS)}"
        up.say(MISSING, node, text)
    elif side == "train" and name in VALIDATION:
        up.say(MISSING, node, "no counterpart: training crops at random, see crop_scale")
    elif side == "test" and name not in (*VALIDATION, "normalize", "to_tensor"):
        up.say(MISSING, node, "no counterpart: validation takes one centre crop")
    else:

        def take(option: str, value: object, where: str, why: str = "") -> None:
            shared = side == "test" and option in ("mean", "std", "interpolation")
            if shared and (trained := up.values.get(option, value)) != value:
                text = f"{option} is the training's, {trained}: one option serves both"
                up.say(MISSING, node.where, text)
            else:
                up.take(option, value, where, why)

        up.put(kwargs, TRANSFORMS[name], take)
        up.soft_labels |= "mix" in name
        take_mix_prob(up)
    if "andom_augm" in name and "randaug_n" not in up.values:
        raise error_at(node.line, f"{node.where}: {name} without n, the number of operations")
    return name


def take_mix_prob(up: Reader) -> None:
    """With one alpha 0, UP leaves the batches unmixed that would be mixed the other way."""
    mixup, cutmix = (up.values.get(f"{way}_alpha", 0) > 0 for way in ("mixup", "cutmix"))
    if "switch_prob" in up.values and not (mixup and cutmix):
        share = up.values["switch_prob"] if cutmix else 1 - up.values["switch_prob"]
        where = up.drop("switch_prob")
        if mixup or cutmix:
            up.take("mix_prob", share, where, "one alpha is 0")


def read_unused_transforms(up: Reader) -> None:
    """Transforms at the top level that no list refers to."""
    for node in up.root.children():
        kind = node.value.get("type") if isinstance(node.value, dict) else None
        if not kind or kind.read or kind.plain() not in list(TRANSFORMS):
            continue
        if "dataset" in up.root.value:
            text = f"{kind.value} is in no transformer list and no batch_fn: does nothing"
            up.say(DEFECT, node, text)
        else:
            read_transform(up, node, "test" if kind.value in VALIDATION else "train")


def take_validation_size(up: Reader) -> None:
    """No validation size that equals the training's; UP's usual resize where there is none."""
    train, val = up.values.get("image_size"), up.values.get("val_image_size")
    if val:
        where = up.drop("val_image_size")
        if val != train:
            up.take("val_image_size" if train else "image_size", val, where)
    if (val or train) and "val_resize" not in up.values:
        text = "no torch_resize in this text; UP's 256 for 224"
        up.take("val_resize", round((val or train) * 8 / 7), "*torch_resize", text)
