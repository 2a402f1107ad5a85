"""Reads values of a YAML text, collects options of a recipe, and keeps a note on every place."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_origin

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from workbench import schedule
from workbench.recipe import Recipe, RecipeError

TAKEN, NOTHING = "taken", "has no effect on the recipe"
MISSING = "not understood or not reproduced, please decide"
DEFECT = "United Perception does something else"
KIND_NAMES = {"nothing": NOTHING, "missing": MISSING, "defect": DEFECT}
IMAGENET = 1_281_167  # images of ImageNet-1k's training list
MAX_VALUES = 3_000
TABLES = yaml.safe_load(Path(__file__).with_name("united_perception.yaml").read_text("utf-8"))
USUAL = {key.value: node for key, node in yaml.compose(yaml.safe_dump(TABLES["usual"])).value}
PLACES = {id(node): f"*{name}" for name, node in USUAL.items()}
REPAIRS = {  # part of PyYAML's message: what to do
    "quoted": "close the quote",
    "simple key": "this is no `key: value`; comment it out or delete it",
    "flow": "check its brackets and quotes",
    "block collection": "indent the lines of a `- name` entry by two spaces more",
    "mapping values": "this is no `key: value`; comment it out, or fix the indentation",
    "undefined alias": "add its anchor, or write its value",
    "": "check tabs, indentation and quotes here and in the lines above",
}
NOTHING_NAMES = {name: why for why, names in TABLES["nothing"].items() for name in names.split()}


class UnitedPerceptionError(ValueError):
    """The text is not a configuration of United Perception; the message names the line."""


class Value(NamedTuple):
    """A block, a list or a scalar of the file."""

    plain: Any
    where: str  # the path where it is written: that of the anchor for an alias
    typed: str  # the path from the nearest `type`, such as SGD.kwargs.lr
    line: int


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def join(path: str, key: str) -> str:
    return f"{path}.{key}".lstrip(".").replace(".[", "[")


def parse(text: str) -> dict[str, Value]:
    """Every value of a YAML text by the path where it is used; a block comes before its contents.

    Raises UnitedPerceptionError if it is no configuration, RecursionError if nested too deeply.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.CollectionNode):
            raise UnitedPerceptionError("no blocks such as `trainer:` in this text")
        top = "net" if isinstance(root, yaml.SequenceNode) else ""  # an entry of `net` alone
        values = dict(islice(loader.walk(root, top, top, top), MAX_VALUES + 1))
    except yaml.MarkedYAMLError as error:
        raise _explain(error, text.splitlines() or [""]) from None
    except (yaml.YAMLError, LookupError) as error:  # odd characters and tags
        raise UnitedPerceptionError(f"invalid YAML: {error}") from None
    if len(values) > MAX_VALUES:
        raise UnitedPerceptionError("more entries than a configuration")
    return values


class _Loader(yaml.SafeLoader):
    """The safe loader; it refuses what PyYAML accepts by mistake."""

    def __init__(self, text: str):
        super().__init__(text)
        self.first: dict[int, tuple[str, str]] = {}  # where and typed, by id of a node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        name = getattr(self.peek_event(), "anchor", None)
        if self.check_event(yaml.AliasEvent) and name not in self.anchors and name in USUAL:
            self.get_event()
            return USUAL[name]
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, names = super().compose_mapping_node(anchor), set()
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            merge = name == "<<" and isinstance(value, yaml.MappingNode)
            if not merge and not re.fullmatch(r"[\w@ -]{1,60}", name):
                raise UnitedPerceptionError(f"line {line}: {short(name)} is no plain name")
            if name in names:
                raise UnitedPerceptionError(f"line {line}: {name!r} appears twice in its block")
            names.add(name)
        return node

    def walk(self, node: yaml.Node, path: str, at: str, typed: str) -> Iterator[tuple[str, Value]]:
        """This node and all below it, with `<<` merged; `at` is the path where it is written."""
        line, last = node.start_mark.line + 1, node.end_mark.line + 1
        if isinstance(node, yaml.ScalarNode) and (last > line or not node.value.isprintable()):
            text = f"the text {short(node.value)} spans lines {line} to {last}: close its quote, "
            text += "or comment out or delete the line that is no `key: value`"
            raise UnitedPerceptionError(f"line {line if node.style else last}: {text}")
        at, typed = self.first.setdefault(id(node), (PLACES.get(id(node), at), typed))
        plain = self.construct_object(node, deep=True)
        yield path, Value(plain, at, typed, line)
        children = {}
        if isinstance(node, yaml.MappingNode):
            children = {key.value: child for key, child in node.value}
        elif isinstance(node, yaml.SequenceNode):
            children = {f"[{i}]": child for i, child in enumerate(node.value)}
        typed = str(children["type"].value) if "type" in children else typed
        for key, child in children.items():
            yield from self.walk(child, join(path, key), join(at, key), join(typed, key))


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_str)


def _explain(error: yaml.MarkedYAMLError, lines: list[str]) -> UnitedPerceptionError:
    """The line to change, and how, for an error of PyYAML."""
    message = f"{error.context} {error.problem}"
    repair = next(repair for words, repair in REPAIRS.items() if words in message)
    from_start = re.search("quoted|simple key|flow", message) and error.context_mark
    line = min((from_start or error.problem_mark or error.context_mark).line, len(lines) - 1)
    if line and "mapping values" in message and ":" not in lines[line - 1]:
        line -= 1  # text that PyYAML joins with the next line
    text = f"line {line + 1}: {short(lines[line].strip())}: {error.problem}; {repair}"
    return UnitedPerceptionError(text)


class Note(NamedTuple):
    """What became of one place: a dotted path, an *alias or a missing --option."""

    kind: str  # TAKEN, MISSING, DEFECT or NOTHING
    where: str
    text: str


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint such as "; the nearest is 'resnet18'", or an empty text."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; the nearest is {close[0]!r}" if close else ""


def parents(path: str) -> list[str]:
    """The blocks that a path is in, the outermost first."""
    return ["", *(path[: match.start()] for match in re.finditer(r"\.|\[", path))]


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def square(value: Any) -> Any:
    """A number of pixels, or the same number twice."""
    twice = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return value[0] if twice else value


SIZES = ("image_size", "val_image_size", "val_resize")
LAX = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)


class Reader:
    """One pass over a file; what was not read is noted at the end."""

    def __init__(self, text: str, gpus: int | None, images: int | None):
        self.values = parse(text)  # by the path where they are used
        for old, new in TABLES["homes"].items():
            if new not in self.values:
                found = self.values.items()
                self.values = {re.sub(rf"^{old}\b", new, path): value for path, value in found}
        self.gpus, self.images = gpus, images  # as given; images are those of the training list
        self.options: dict[str, Any] = {}
        self.origin: dict[str, Note] = {}  # option -> its note
        self.notes: dict[Note, None] = {}  # an ordered set
        self.asked: set[str] = set()  # paths that a configuration may have
        self.used: set[str] = set()  # where values are written that were read
        self.covered: set[str] = set()  # where blocks are written that a note covers
        self.defaults: dict[str, Any] = dict(TABLES["defaults"])
        self.batch: int | None = None  # images per step, on all GPUs
        self.epochs: int | None = None
        self.iterations: int | None = None  # steps of the training, where the file counts them
        self.cosine: Callable[[int], float] | None = None  # the share of UP's that is gone
        self.soft_labels = False  # UP's labels are shares of classes

    @property
    def steps(self) -> int | None:
        """Steps per epoch; None without a batch size."""
        images = int((self.images or IMAGENET) * self.options.get("train_fraction", 1.0))
        drop_last = self.options.get("drop_last", False)
        return self.batch and max(1, schedule.steps_per_epoch(images, self.batch, drop_last))

    def get(self, path: str, kind: Any, default: Any = None) -> Any:
        """The value at a dotted path, converted to a type; the default where there is none."""
        self.asked.add(path)
        value = self.values.get(path)
        if value is None or value.plain is None:
            return default
        self.used.add(value.where)
        try:
            found = TypeAdapter(kind, config=LAX).validate_python(value.plain)
        except ValidationError as error:
            text = f"line {value.line}: {value.where} is {short(value.plain)}: "
            raise UnitedPerceptionError(text + error.errors()[0]["msg"]) from None
        if isinstance(value.plain, str) and not isinstance(found, str | list):
            self.say(DEFECT, path, f"{short(value.plain)} is text to YAML 1.1; read as {found}")
        return found

    def known(self, path: str, names: Iterable[str]) -> str:
        """The name at a path if it is one of these; others are left unread."""
        value = self.values.get(path)
        return self.get(path, str) if value and str(value.plain) in names else ""

    def entries(self, path: str) -> list[str]:
        """The paths of the entries of a list."""
        return list(takewhile(self.values.__contains__, (f"{path}[{i}]" for i in count())))

    def where(self, path: str) -> str:
        """Where the value at a path is, or would be, written: at its anchor for an alias."""
        if path in self.values:
            return self.values[path].where
        head, _, key = path.rpartition(".")
        return join(self.where(head), key) if head else path

    def say(self, kind: str, path: str, text: str, whole: bool = False) -> None:
        """A note on a path, and on everything below it if `whole`."""
        self.notes[Note(kind, self.where(path), text)] = None
        self.covered |= {self.where(path)} if whole else set()

    def take(self, option: str, value: Any, path: str, why: str = "") -> None:
        """Sets an option; a note where another place had another value for it."""
        text, note = f"{option} {short(value)}", self.origin.get(option)
        if note and note.where != self.where(path) and self.options[option] != value:
            self.say(MISSING, note.where, f"{note.text} gives way to {text} of {self.where(path)}")
        self.options[option] = value
        self.origin[option] = Note(TAKEN, self.where(path), text + (f"; {why}" if why else ""))

    def drop(self, option: str) -> str:
        """Removes an option; returns the place it was read from."""
        self.options.pop(option)
        return self.origin.pop(option, Note(TAKEN, option, "")).where

    def put(self, path: str, table: dict[str, Any]) -> None:
        """Takes the options of a table, see united_perception.yaml, from a block."""
        for key, option in table.items():
            option, default = option if isinstance(option, list) else (option, None)
            kind = Recipe.model_fields[option].annotation
            if get_origin(kind) is list or option in SIZES:
                kind = Annotated[kind, BeforeValidator(square if option in SIZES else listed)]
            if (value := self.get(f"{path}.{key}", kind) if key else None) is not None:
                self.take(option, value, f"{path}.{key}")
            elif default is not None:
                self.take(option, default, path.removesuffix(".kwargs") + ".type", "implied")

    def recipe(self) -> Recipe:
        """The recipe; options without effect in it become notes."""
        while True:
            try:
                return Recipe(**self.options)
            except RecipeError as error:
                problems = {text.partition(":")[0]: text for text in error.problems}
            unused = [option for option, text in problems.items() if " has no effect" in text]
            for option in unused:
                self.say(NOTHING, self.drop(option), f"{problems[option]}; left out")
            if not unused:
                where = {option: f" ({note.where})" for option, note in self.origin.items()}
                lines = [f"\n  - {text}{where.get(k, '')}" for k, text in problems.items()]
                raise UnitedPerceptionError("the recipe is not valid" + "".join(lines))

    def finish(self) -> list[Note]:
        """All notes, with those on single values, on assumptions and on what was not read."""
        for where, value in {value.where: value for value in self.values.values()}.items():
            if value.plain is not None:
                self.check_value(where, value)
        self.note_unread()
        if self.batch and self.gpus is None:
            self.say(TAKEN, "--gpus", "not given, 1 assumed: batch_size is UP's for one GPU")
        if self.batch and self.images is None:
            text = f"not given, {IMAGENET:,} assumed (ImageNet-1k): {self.steps:,} steps an epoch"
            self.say(TAKEN, "--train-images", text)
        return [*self.origin.values(), *self.notes]

    def check_value(self, where: str, value: Value) -> None:
        """Notes from the table `facts`."""
        for path, pattern, kind, text in TABLES["facts"]:
            at = re.search(f"{path}$", where) or re.search(f"{path}$", value.typed)
            if not at or self.is_covered(where):
                continue
            if re.fullmatch(pattern, str(value.plain)):
                self.say(KIND_NAMES[kind], where, text, whole=True)
            elif pattern.startswith("(?!") and where.rpartition(".")[2] not in NOTHING_NAMES:
                self.used.add(where)  # the value that the recipe has

    def is_covered(self, where: str) -> bool:
        return not self.covered.isdisjoint([where, *parents(where)])

    def note_unread(self) -> None:
        """Notes on all values without one."""
        told = {note.where for note in (*self.notes, *self.origin.values())}
        blocks = {block for path in self.asked for block in parents(path)}  # with known keys
        places = {block for path in self.asked for block in parents(self.where(path))}
        for path, value in list(self.values.items())[1:]:  # a block comes before what is in it
            parent, where, plain = parents(path)[-1], value.where, value.plain
            key = path.removeprefix(parent).removeprefix(".")
            if parent in self.values and path not in self.asked | blocks:
                where = join(self.where(parent), key)  # not that of an alias at an unknown key
            if isinstance(plain, dict | list):
                dicts = isinstance(plain, list) and any(isinstance(one, dict) for one in plain)
                if dicts or not plain or path in blocks or where in places:
                    continue
            if not self.is_covered(where):
                self.covered.add(where)
                if where not in told:
                    self.notes[self.status(key, value, where)] = None

    def status(self, key: str, value: Value, where: str) -> Note:
        """The note on a value that has none."""
        plain, default = value.plain, self.defaults.get(key)
        kind = plain.get("type", plain) if isinstance(plain, dict) else plain
        reason = NOTHING_NAMES.get(key) or NOTHING_NAMES.get(str(kind))
        usual = plain == default or all(one == default for one in listed(plain))
        if where in self.used:
            return Note(TAKEN, where, short(plain))
        if default is not None and plain is not None and not usual:
            return Note(MISSING, where, f"{short(plain)} is not reproduced; {default} is taken")
        if reason or plain is None or default is not None:
            return Note(NOTHING, where, reason or "empty, or the default of UP and of timm")
        known = {path.rpartition(".")[2] for path in self.asked} | {*NOTHING_NAMES, *self.defaults}
        near = "" if key in known else nearest(key, known)
        return Note(MISSING, where, f"{short(kind)} is not supported here; left out{near}")
