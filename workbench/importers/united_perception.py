"""Reads United Perception's YAML: a whole configuration, or any block of its classification page.

    found = load("res50_strikes_300e_bce.yaml", gpus=32)
    print(found.params())                 # a flat params file with the notes in it

The recipe does what the file says. Where United Perception (UP) itself does something else, a note
says what, in numbers. Every key of the file is taken or noted; nothing of it is executed.
"""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from workbench.importers.up_data import read_data, read_runtime
from workbench.importers.up_distillation import read_distillation
from workbench.importers.up_model import read_net
from workbench.importers.up_optim import read_run, read_trainer
from workbench.importers.up_reader import (
    DEFECT,
    IMAGENET,
    MISSING,
    NOTHING,
    TABLES,
    TAKEN,
    Note,
    Reader,
    convert,
)
from workbench.importers.up_yaml import (
    MAX_CHARS,
    Node,
    UnitedPerceptionError,
    parse,
    short,
)
from workbench.recipe import Recipe

__all__ = ["DEFECT", "IMAGENET", "MISSING", "NOTHING", "TAKEN", "Found", "Note"]
__all__ += ["UnitedPerceptionError", "load", "loads"]


@dataclass(frozen=True)
class Found:
    """A recipe, the notes, and the deployment block, for which a recipe has no options.

    deployment: the checked to_kestrel, with resize_hw as [height, width].
    """

    recipe: Recipe
    notes: list[Note]
    deployment: dict[str, Any] | None
    source: str
    origin: dict[str, Note] = field(repr=False)  # option -> its note

    def _selected(self, kind: str) -> list[Note]:
        """The notes of a kind; of what was taken only what was assumed: aliases and options."""
        assumed = lambda where: where.startswith(("*", "--")) and "." not in where
        return [n for n in self.notes if n.kind == kind and (kind != TAKEN or assumed(n.where))]

    def params(self) -> str:
        """A params file: the notes as comments, then the options and where they come from."""
        head = f"{self.recipe.name}.yaml: read from United Perception's {self.source}"
        lines = [f"# {head if head.isprintable() else ascii(head)}"]
        wrap = {"width": 100, "initial_indent": "#   ", "subsequent_indent": "#     "}
        for kind in (MISSING, TAKEN, DEFECT, NOTHING):
            notes = [n for n in self._selected(kind) if n not in self.origin.values()]
            lines += [f"# {kind}:"] if notes else []
            for note in notes[:100]:  # keeps a params file readable
                lines += textwrap.wrap(f"{note.where}: {note.text}", **wrap)
            lines += [f"#   and {len(notes) - 100} more"] if len(notes) > 100 else []
        for option, value in self.recipe.non_default().items():
            style = {"default_flow_style": True, "allow_unicode": True, "width": 10**6}
            style["default_style"] = None if str(value).isprintable() else '"'
            line = yaml.safe_dump({option: value}, **style).strip()[1:-1]
            if note := self.origin.get(option):
                text = note.text.removeprefix(f"{option} {short(value)}")
                line = f"{line:<25} # {note.where}{text}"
            lines.append(line)
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """The number of notes of each kind, and those that need attention."""
        kinds = (MISSING, DEFECT, NOTHING, TAKEN)
        counts = [f"{sum(n.kind == kind for n in self.notes)} {kind}" for kind in kinds]
        lines = [f"{self.source}: {', '.join(counts)}"]
        for kind in (MISSING, DEFECT, TAKEN):
            notes = [f"  {n.where}: {n.text}" for n in self._selected(kind)]
            lines += [f"{kind}:", *notes] if notes else []
        return "\n".join(lines)


def load(
    path: str | Path,
    *,
    gpus: int | None = None,
    train_images: int | None = None,
    name: str | None = None,
) -> Found:
    """Reads a file, see `loads`; the run is named after the file without `name`."""
    path = Path(path)
    try:
        if not path.is_file():
            raise OSError("not a regular file" if path.exists() else "no such file")
        if path.stat().st_size > 4 * MAX_CHARS:
            raise OSError(f"larger than {MAX_CHARS:,} characters")
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UnitedPerceptionError(f"{path}: cannot be read as text: {error}") from None
    return _read(text, path.name, gpus, train_images, path.stem if name is None else name)


def loads(
    text: str, *, gpus: int | None = None, train_images: int | None = None, name: str | None = None
) -> Found:
    """Reads a text: a whole configuration, or a block of one.

    UP's batch size counts for one GPU: `gpus` (1 if not given) multiplies it. `train_images`
    converts steps to epochs (ImageNet-1k if not given). Raises UnitedPerceptionError.
    """
    return _read(text, "text", gpus, train_images, name)


def _read(
    text: str, source: str, gpus: int | None, train_images: int | None, name: str | None
) -> Found:
    try:
        for option, value in (("gpus", gpus), ("train_images", train_images)):
            if value is not None and (type(value) is not int or not 0 < value < 10**12):
                raise UnitedPerceptionError(f"{option} is {value!r}; wanted a whole number above 0")
        root = parse(text, aliases=parse(TABLES["usual"]).value)
        if isinstance(root.value, list):  # an entry of `net` alone
            root = Node({"net": root}, "", root.line)
        up = Reader(root, gpus, train_images)
        up.values |= {} if name is None else {"name": name}
        read_runtime(up)
        read_data(up)
        read_trainer(up)
        read_net(up, root.value.get("net"), up.take)
        read_run(up)
        read_distillation(up)
        deployment = read_deployment(up)
        recipe = up.recipe()
        return Found(recipe, up.finish(recipe), deployment, source, up.origin)
    except UnitedPerceptionError as error:
        raise UnitedPerceptionError(f"{source}: {error}") from None
    except RecursionError:
        raise UnitedPerceptionError(f"{source}: nested more deeply than a configuration") from None
    except (ArithmeticError, ValueError) as error:
        raise UnitedPerceptionError(f"{source}: a number is out of range: {error}") from None


def height_width(value: Any) -> list[int]:
    """height and width such as 224x224"""
    height, width = value.lower().split("x") if isinstance(value, str) else value
    return [convert(int, height, 1), convert(int, width, 1)]


def three_numbers(value: Any) -> list[float]:
    """three numbers"""
    red, green, blue = value
    return convert([float], [red, green, blue])


def categories(value: Any) -> dict[str, Any]:
    """categories, each with a list of labels"""
    return {k: {**about, "labels": convert([str], about["labels"])} for k, about in value.items()}


def read_deployment(up: Reader) -> dict[str, Any] | None:
    """to_kestrel, with notes on what would mislead its users."""
    if "to_kestrel" not in up.root.value:
        return None
    at = up.block(up.root, "to_kestrel")
    kinds = {"resize_hw": height_width, "class_label": categories, "support_labels": object}
    kinds |= {"pixel_means": three_numbers, "pixel_stds": three_numbers, "input_channel": int}
    kinds |= dict.fromkeys(("is_rgb", "save_all_label", "add_softmax"), bool)
    kinds |= dict.fromkeys("toks_type plugin model_name version save_to type".split(), str)
    found = {k: v for k, kind in kinds.items() if (v := up.get(at, k, kind)) is not None}
    for key, option in (("pixel_means", "mean"), ("pixel_stds", "std")):
        ours, theirs = [round(255 * x, 3) for x in up.values.get(option, [])], found.get(key, [])
        if any(abs(a - b) > 0.5 for a, b in zip(theirs, ours, strict=False)):
            up.say(DEFECT, f"to_kestrel.{key}", f"{theirs}, but training has {ours}")
    return found
