"""Reads values from nodes, collects options of a recipe, and keeps a note on every place."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from workbench.importers.up_yaml import (
    Node,
    UnitedPerceptionError,
    UnknownAlias,
    error_at,
    short,
)
from workbench.recipe import Recipe, RecipeError

TAKEN, NOTHING = "taken", "has no effect on the recipe"
MISSING = "not understood or not reproduced, please decide"
DEFECT = "United Perception does something else"
KIND_NAMES = {"nothing": NOTHING, "missing": MISSING, "defect": DEFECT}
IMAGENET = 1_281_167  # images of ImageNet-1k's training list

TABLES = yaml.safe_load(Path(__file__).with_name("united_perception.yaml").read_text("utf-8"))
NOTHING_KEYS = {key: why for why, keys in TABLES["nothing"].items() for key in keys.split()}
# Every key that is read, for the hint beside one that is not.
KNOWN_KEYS = {*NOTHING_KEYS, *TABLES["defaults"], *TABLES["keys"].split()}
KNOWN_KEYS.update(*TABLES["transforms"].values())
KNOWN_KEYS.update(*(keys for _, *tables in TABLES["optimizers"].values() for keys in tables))
KNOWN_KEYS.update(*({length, *keys} for _, length, keys in TABLES["schedules"].values()))


class Note(NamedTuple):
    """What became of one place: a dotted path, an *alias or a missing --option."""

    kind: str  # TAKEN, MISSING, DEFECT or NOTHING
    where: str
    text: str


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint such as "; the nearest is 'resnet18'", or an empty text."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.6)
    return f"; the nearest is {close[0]!r}" if close and close[0] != name else ""


def square(value: Any) -> int:
    """a number of pixels, or two equal ones"""
    twice = isinstance(value, list) and value == value[:1] * 2
    return convert(int, value[0] if twice else value, 1)


# Where the kind cannot be read off the default of the option.
KINDS: dict[str, Any] = {
    **dict.fromkeys(("image_size", "val_image_size", "val_resize"), square),
    **dict.fromkeys(("crop_scale", "crop_ratio", "mean", "std"), [float]),
    **dict.fromkeys(("clip_grad_norm", "ema_decay", "layer_decay"), float),
    "workers": int,
}
KIND_WORDS = {bool: "true or false", int: "a whole number", float: "a number"}
KIND_WORDS |= {str: "a line of text"}


def convert(kind: Any, value: Any, minimum: float = -math.inf) -> Any:
    """The value as bool, int, float, str, object (anything), a [list] of one, or kind(value).

    Raises ValueError, TypeError, LookupError or AttributeError.
    """
    if isinstance(kind, list):
        values = value if isinstance(value, list) else [value]
        return [convert(kind[0], one, minimum) for one in values]
    if kind not in KIND_WORDS:
        return value if kind is object else kind(value)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, str | int | float):
        raise TypeError
    if kind is str and not str(value).isprintable():
        raise ValueError
    if kind in (bool, str):
        return kind(value)
    if not math.isfinite(number := float(value)) or number < minimum or kind(number) != number:
        raise ValueError
    return kind(number)


def wanted(kind: Any, minimum: float) -> str:
    """What `convert` accepts, in words."""
    if isinstance(kind, list):
        return f"a list, each {wanted(kind[0], minimum)}"
    text = KIND_WORDS.get(kind) or kind.__doc__
    return text if minimum == -math.inf else f"{text}, {'0 or more' if minimum == 0 else 'above 0'}"


@dataclass
class Reader:
    """One pass over the nodes of a file; what was not read is noted at the end."""

    root: Node
    gpus: int | None
    images: int | None  # of the training list
    values: dict[str, Any] = field(default_factory=dict)  # option -> value
    origin: dict[str, Note] = field(default_factory=dict)  # option -> its note
    notes: dict[Note, None] = field(default_factory=dict)  # an ordered set
    batch: int | None = None  # images per step, on all GPUs
    epochs: int | None = None
    iterations: int | None = None  # steps of the training, where the file counts them
    needs_images: bool = False  # the number of images was used
    soft_labels: bool = False  # UP's labels are shares of classes
    checks: list[Callable[[Recipe], None]] = field(default_factory=list)  # of the final recipe
    defaults: dict[str, Any] = field(default_factory=lambda: dict(TABLES["defaults"]))

    @property
    def steps(self) -> int | None:
        """Steps per epoch; None without a batch size."""
        self.needs_images |= self.batch is not None
        images = int((self.images or IMAGENET) * self.values.get("train_fraction", 1.0))
        return self.batch and max(1, math.ceil(images / self.batch))

    @property
    def total(self) -> int | None:
        """Steps of the training."""
        return self.iterations or (self.epochs and self.steps and self.epochs * self.steps)

    # reading

    def at(self, node: Node, path: str) -> Node | None:
        """The node at a dotted path; None where there is none, or empty kwargs."""
        for key in path.split("."):
            node = self.mapping(node).value.get(key)
            if node is None or (node.value is None and key == "kwargs"):
                return None
        return node

    def where(self, node: Node, path: str) -> str:
        found = self.at(node, path)
        return found.where if found else f"{node.where}.{path}".lstrip(".")

    def block(self, node: Node, path: str) -> Node:
        """The mapping at a dotted path; an empty one where there is none."""
        found = self.at(node, path)
        return self.mapping(found) if found else Node({}, self.where(node, path), node.line)

    def mapping(self, node: Node) -> Node:
        if isinstance(node.value, UnknownAlias):
            self.say_unknown(node)
            return Node({}, node.where, node.line)
        if not isinstance(node.value, dict):
            came = "empty" if node.value is None else short(node.plain())
            raise error_at(node.line, f"{node.where} is {came}; wanted a block of `key: value`")
        node.read = True
        return node

    def entries(self, node: Node | None) -> list[Node]:
        """The mappings of a list."""
        if node is None or node.value is None:
            return []
        if not isinstance(node.value, list):
            raise error_at(node.line, f"{node.where} is {short(node.plain())}; wanted a list")
        node.read = True
        return [entry for entry in map(self.mapping, node.value) if entry.value]

    def say_unknown(self, node: Node) -> None:
        self.say(MISSING, node, f"*{node.value.value} has no anchor in this text; left out")

    def get(self, node: Node, path: str, kind: Any, default: Any = None, minimum=-math.inf) -> Any:
        """The value at a dotted path, see `convert`; the default where there is none."""
        if (found := self.at(node, path)) is None or found.value is None:
            return default
        for part in found.walk():
            part.read = True
            if isinstance(part.value, UnknownAlias):
                self.say_unknown(part)
                return default
        came = found.plain()
        try:
            value = convert(kind, came, minimum)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            text = f"{found.where} is {short(came)}; wanted {wanted(kind, minimum)}"
            raise error_at(found.line, text) from None
        if isinstance(came, str) and isinstance(value, int | float):
            self.say(DEFECT, found.where, f"{short(came)} is text to YAML 1.1; read as {value:g}")
        return value

    # notes and options

    def say(self, kind: str, where: str | Node, text: str) -> None:
        """A note on a path, or on a node and everything in it."""
        if isinstance(where, Node):
            for part in where.walk():
                part.read = part.noted = True
            where = where.where
        self.notes[Note(kind, where or "the file", text)] = None

    def take(self, option: str, value: Any, where: str, why: str = "") -> None:
        """Sets an option; a later call replaces it."""
        self.values[option] = value
        text = f"{option} {short(value)}" + (f"; {why}" if why else "")
        self.origin[option] = Note(TAKEN, where, text)

    def add(self, option: str, value: Any, where: str) -> None:
        """Appends to an option that is a list; its note is at the place of the first entry."""
        first = self.origin.get(option)
        self.take(option, [*self.values.get(option, []), value], first.where if first else where)

    def drop(self, option: str) -> str:
        """Unsets an option; returns where it was."""
        self.values.pop(option)
        return self.origin.pop(option, Note(TAKEN, option, "")).where

    def put(self, node: Node, table: dict[str, Any], take: Callable | None = None) -> None:
        """Takes the options of a table, see united_perception.yaml, from a block."""
        for key, option in table.items():
            option, default = option if isinstance(option, list) else (option, None)
            kind = KINDS.get(option) or type(Recipe.model_fields[option].default)
            if (value := self.get(node, key, kind) if key else None) is not None:
                (take or self.take)(option, value, self.where(node, key))
            elif default is not None:
                where = node.where.removesuffix(".kwargs") + ".type"
                (take or self.take)(option, default, where, "implied")

    # the end

    def recipe(self) -> Recipe:
        """The recipe; options without effect in it become notes."""
        while True:
            try:
                return Recipe(**self.values)
            except RecipeError as error:
                problems = {text.partition(":")[0]: text for text in error.problems}
            unused = {k: MISSING for k in problems if k in TABLES["optional"]}
            unused |= {k: NOTHING for k, text in problems.items() if " has no effect" in text}
            for option, kind in unused.items():
                self.say(kind, self.drop(option), f"{problems[option]}; left out")
            if not unused:
                where = lambda k: f" ({self.origin[k].where})" if k in self.origin else ""
                lines = [f"\n  - {text}{where(option)}" for option, text in problems.items()]
                raise UnitedPerceptionError("the recipe is not valid" + "".join(lines))

    def finish(self, recipe: Recipe) -> list[Note]:
        """All notes, with those on single values, missing keys and what was not read."""
        for check in self.checks:
            check(recipe)
        for node, typed in self.typed_nodes(self.root, "", set()):
            self.check_value(node, typed)
        told = {note.where for note in (*self.notes, *self.origin.values())}
        self.note_unread("", self.root, told)
        for option in ("batch_size", "model"):
            if self.values and option not in self.values:
                text = f"not in this text, {Recipe.model_fields[option].default} is taken"
                self.say(TAKEN, f"--set {option}", text)
        if self.batch and self.gpus is None:
            self.say(TAKEN, "--gpus", "not given, 1 assumed: batch_size is UP's for one GPU")
        if self.gpus and not self.batch:
            self.say(TAKEN, "--gpus", "no batch size in this text that it would multiply")
        if self.needs_images and self.images is None:
            text = f"not given, {IMAGENET:,} assumed (ImageNet-1k): {self.steps:,} steps an epoch"
            self.say(TAKEN, "--train-images", text)
        return [*self.origin.values(), *self.notes]

    def typed_nodes(self, node: Node, typed: str, seen: set[int]) -> Iterator[tuple[Node, str]]:
        """Every node with a path that starts at the nearest `type`, such as SGD.kwargs.lr."""
        if id(node) in seen:
            return
        seen.add(id(node))
        keys = [""] * len(node.children())
        if isinstance(node.value, dict):
            kind = node.value.get("type")
            typed = str(kind.value) if kind else typed
            keys = [f".{key}" for key in node.value]
        yield node, typed
        for key, child in zip(keys, node.children(), strict=True):
            yield from self.typed_nodes(child, typed + key, seen)

    def check_value(self, node: Node, typed: str) -> None:
        """Notes from the tables `required` and `facts`."""
        if node.noted or not node.where or node.value == {}:
            return
        for name, keys in TABLES["required"].items() if isinstance(node.value, dict) else ():
            if re.fullmatch(name, typed) or re.search(rf"(^|\.){name}$", node.where):
                for key in (key for key in keys.split() if not self.at(node, key)):
                    text = "missing: UP stops (a TypeError, KeyError or failed assertion)"
                    self.say(DEFECT, self.where(node, key), text)
        came = str(node.plain())
        for path, pattern, kind, text in TABLES["facts"]:
            if not (re.search(f"{path}$", node.where) or re.search(f"{path}$", typed)):
                continue
            if re.fullmatch(pattern, came):
                names = re.findall(r"\w+", pattern) if pattern.startswith("(?!(") else ()
                self.say(KIND_NAMES[kind], node, text + nearest(came, names))
                return
            known = node.where.rpartition(".")[2] in NOTHING_KEYS
            if pattern.startswith("(?!") and not known:  # the value that the recipe has
                for part in node.walk():
                    part.read = True

    def note_unread(self, key: str, node: Node, told: set[str], above: str = "") -> None:
        """Notes on values that were not read; `above` is the reason that covers a block."""
        value, above = node.value, NOTHING_KEYS.get(key, above)
        if node.noted or value in ({}, []) or (node.where in told and not isinstance(value, dict)):
            return
        if node.read and isinstance(value, dict | list):
            for name, child in value.items() if isinstance(value, dict) else enumerate(value):
                self.note_unread(str(name), child, told, above)
        elif node.read:
            self.say(TAKEN, node, short(value))
        elif value is None:
            self.say(NOTHING, node, above or "empty; left out")
        elif (default := self.defaults.get(key)) is not None:
            came = node.plain()
            each = came if isinstance(came, list) and not isinstance(default, list) else [came]
            if all(one == default for one in each):
                self.say(NOTHING, node, above or "the same here")
            else:
                self.say(MISSING, node, f"{short(came)} is not reproduced; {default} is taken")
        elif above:
            self.say(NOTHING, node, above)
        else:
            keys = KNOWN_KEYS.union(TABLES["mimic_keys"].split() if "mimic" in node.where else ())
            self.say(MISSING, node, f"not known here; left out{nearest(key, keys)}")
