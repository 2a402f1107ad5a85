"""Reads United Perception's YAML: a whole configuration, or any block of its classification page.

    found = load("res50_strikes_300e_bce.yaml", gpus=32)
    print(found.params())                 # a flat params file with the notes in it

The recipe does what the file says. Where United Perception (UP) itself does something else, a note
says what, in numbers. Every key of the file is taken or noted; nothing of it is executed.
"""

import re
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, PositiveInt

from workbench.importers import up_blocks
from workbench.importers.up_reader import (
    DEFECT,
    MISSING,
    NOTHING,
    TAKEN,
    Note,
    Reader,
    UnitedPerceptionError,
)
from workbench.recipe import Recipe

__all__ = ["DEFECT", "MISSING", "NOTHING", "TAKEN", "Found", "Note", "UnitedPerceptionError"]
__all__ += ["load", "loads"]


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

    def _listing(self, *kinds: str) -> list[str]:
        """The notes by kind; of what was taken only what was assumed: aliases and options."""
        lines = []
        for kind in kinds:
            notes = [f"  {n.where}: {n.text}" for n in self.notes if n.kind == kind]
            if kind == TAKEN:
                notes = [line for line in notes if re.match(r"  [*-][^.]*: ", line)]
            lines += [f"{kind}:", *notes] if notes else []
        return lines

    def params(self) -> str:
        """A params file: the notes as comments, then the options and where they come from."""
        lines = [f"# read from United Perception's {self.source!r}"]
        for line in self._listing(MISSING, TAKEN, DEFECT, NOTHING):
            lines += textwrap.wrap(line, 98, initial_indent="# ", subsequent_indent="#     ")
        for option, value in self.recipe.non_default().items():
            style = {"default_flow_style": True, "allow_unicode": True, "width": 10**6}
            line = yaml.safe_dump({option: value}, **style).strip()[1:-1]
            note = self.origin.get(option, Note(TAKEN, "given", ""))
            _, semicolon, why = note.text.partition("; ")
            lines.append(f"{line:<25} # {note.where}{semicolon}{why}")
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """The number of notes of each kind, and those that need attention."""
        counts = Counter(note.kind for note in self.notes)
        counted = ", ".join(f"{counts[k]} {k}" for k in (MISSING, DEFECT, NOTHING, TAKEN))
        return "\n".join([f"{self.source}: {counted}", *self._listing(MISSING, DEFECT, TAKEN)])


def load(path: str | Path, *, name: str | None = None, **options: int | None) -> Found:
    """Reads a file, see `loads`; the run is named after the file without `name`."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UnitedPerceptionError(f"{path}: cannot be read as text: {error}") from None
    return loads(text, name=name or Path(path).stem, source=Path(path).name, **options)


def loads(
    text: str,
    *,
    gpus: int | None = None,
    train_images: int | None = None,
    name: str | None = None,
    source: str = "text",
) -> Found:
    """Reads a text: a whole configuration, or a block of one.

    UP's batch size counts for one GPU: `gpus` (1 if not given) multiplies it. `train_images`
    converts steps to epochs (ImageNet-1k if not given). Raises UnitedPerceptionError.
    """
    try:
        if (
            any(n is not None and n < 1 for n in (gpus, train_images))
            or not f"{name}".isprintable()
        ):
            raise UnitedPerceptionError("gpus and train_images must be above 0, name printable")
        up = Reader(text, gpus, train_images)
        up.options |= {} if name is None else {"name": name}
        up_blocks.read_data(up)
        up_blocks.read_trainer(up)
        up_blocks.read_net(up)
        up_blocks.read_distillation(up)
        deployment = read_deployment(up)
        recipe = up.recipe()
        up_blocks.compare_lr(up, recipe)
        return Found(recipe, up.finish(), deployment, source, up.origin)
    except (RecursionError, ArithmeticError, ValueError) as error:
        raise UnitedPerceptionError(f"{source}: {error}") from None


class Category(BaseModel, extra="allow", coerce_numbers_to_str=True):
    """A category of class_label."""

    labels: list[str]


DEPLOYMENT = {
    **dict.fromkeys("toks_type plugin model_name version save_to type".split(), str),
    **dict.fromkeys(("is_rgb", "save_all_label", "add_softmax"), bool),
    **dict.fromkeys(("pixel_means", "pixel_stds"), list[float]),
    **{"resize_hw": str | list[PositiveInt], "class_label": dict[str, Category]},
    **{"support_labels": object, "input_channel": int},
}


def read_deployment(up: Reader) -> dict[str, Any] | None:
    """to_kestrel, with notes on what would mislead its users."""
    if "to_kestrel" not in up.values:
        return None
    read = {key: up.get(f"to_kestrel.{key}", kind) for key, kind in DEPLOYMENT.items()}
    found = {key: value for key, value in read.items() if value is not None}
    for key, option in (("pixel_means", "mean"), ("pixel_stds", "std")):
        ours, theirs = [round(255 * x, 3) for x in up.options.get(option, [])], found.get(key, [])
        if any(abs(a - b) > 0.5 for a, b in zip(theirs, ours, strict=False)):
            up.say(DEFECT, f"to_kestrel.{key}", f"{theirs}, but training has {ours}")
    if isinstance(size := found.get("resize_hw"), str):
        found["resize_hw"] = [int(number) for number in size.lower().split("x")]
    labels = found.get("class_label", {})
    return found | {"class_label": {k: v.model_dump() for k, v in labels.items()}}
