"""Reads United Perception's YAML: a whole configuration, or any block of its classification page.

    found = load("res50_strikes_300e_bce.yaml", gpus=32)
    print(found.params())                 # a flat params file with the notes in it

The recipe does what the file says. Where United Perception (UP) itself would have done something
else a note says what, in numbers; nothing of a file is passed over in silence, nothing is run.
"""

import difflib
import functools
import math
import posixpath
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from workbench import schedule
from workbench.recipe import Recipe, RecipeError
from workbench.recipe_checks import RESNETS, losses_with_temperature

TAKEN, NOTHING = "taken", "no meaning here"
MISSING = "not understood or not reproduced, decide"
DEFECT = "would not have done what it says"
_KIND_NAMES = {"nothing": NOTHING, "missing": MISSING, "defect": DEFECT}
IMAGENET = 1_281_167  # images of ImageNet-1k's training list


class UnitedPerceptionError(ValueError):
    """No file of United Perception's, or a broken one; the text names the line and a repair."""


class Note(NamedTuple):
    """What became of one place of a file: a dotted path, an *alias or a missing --option."""

    kind: str  # TAKEN, MISSING, DEFECT or NOTHING
    where: str
    text: str


@dataclass(frozen=True)
class Found:
    """A recipe, what is to be said about it, and the block that a recipe has no options for.

    deployment: to_kestrel as it stands, checked, resize_hw as [h, w].
    """

    recipe: Recipe
    notes: list[Note]
    deployment: dict[str, Any] | None
    source: str
    origin: dict[str, Note] = field(repr=False)  # option -> its note

    def _shown(self, kind: str) -> list[Note]:
        """The notes of a kind; of what was taken only what was assumed: aliases and options."""
        assumed = lambda where: where.startswith(("*", "--")) and "." not in where
        return [n for n in self.notes if n.kind == kind and (kind != TAKEN or assumed(n.where))]

    def params(self) -> str:
        """A params file: the notes as comments, then the changed options and where they stood."""
        head = f"{self.recipe.name}.yaml: read from United Perception's {self.source}"
        lines = [f"# {head if head.isprintable() else ascii(head)}"]
        wrap = {"width": 100, "initial_indent": "#   ", "subsequent_indent": "#     "}
        for kind in (MISSING, TAKEN, DEFECT, NOTHING):
            notes = [n for n in self._shown(kind) if n not in self.origin.values()]
            lines += [f"# {kind}:"] if notes else []
            for note in notes[:100]:  # a params file is a page or two
                lines += textwrap.wrap(f"{note.where}: {note.text}", **wrap)
            lines += [f"#   and {len(notes) - 100} more"] if len(notes) > 100 else []
        for option, value in self.recipe.non_default().items():
            how = {"default_style": None if str(value).isprintable() else '"', "width": 10**6}
            how |= {"default_flow_style": True, "allow_unicode": True}
            line = yaml.safe_dump({option: value}, **how).strip()[1:-1]
            if note := self.origin.get(option):
                text = note.text.removeprefix(f"{option} {_short(value)}")
                line = f"{line:<25} # {note.where}{text}"
            lines.append(line)
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """How many notes there are of each kind, and those that a person should read."""
        kinds = (MISSING, DEFECT, NOTHING, TAKEN)
        counts = [f"{sum(n.kind == kind for n in self.notes)} {kind}" for kind in kinds]
        lines = [f"{self.source}: {', '.join(counts)}"]
        for kind in (MISSING, DEFECT, TAKEN):
            notes = [f"  {n.where}: {n.text}" for n in self._shown(kind)]
            lines += [f"{kind}:", *notes] if notes else []
        return "\n".join(lines)


def load(
    path: str | Path,
    *,
    gpus: int | None = None,
    train_images: int | None = None,
    name: str | None = None,
) -> Found:
    """What a file says, as `loads` has it; the run is named after the file without `name`."""
    path = Path(path)
    try:
        if not path.is_file():
            raise OSError("no such file" if not path.exists() else "no plain file")
        with path.open("rb") as file:
            content = file.read(4 * _MOST_TEXT + 4)
        text = content.decode("utf-8-sig", "ignore" if len(content) > 4 * _MOST_TEXT else "strict")
    except (OSError, ValueError) as error:
        raise UnitedPerceptionError(f"{path}: cannot be read as text: {error}") from None
    return _read(text, path.name, gpus, train_images, path.stem if name is None else name)


def loads(
    text: str, *, gpus: int | None = None, train_images: int | None = None, name: str | None = None
) -> Found:
    """What a text says: a whole configuration, or a block of one.

    `gpus` turns UP's batch size, which counts for one GPU, into that of a step (1 if not given);
    `train_images` turns steps into epochs (ImageNet-1k). Raises UnitedPerceptionError.
    """
    return _read(text, "text", gpus, train_images, name)


def _read(text: str, source: str, gpus: Any, images: Any, name: str | None) -> Found:
    try:
        for option, value in (("gpus", gpus), ("train_images", images)):
            if value is not None and (type(value) is not int or not 0 < value < 10**12):
                raise UnitedPerceptionError(f"{option} is {value!r}; wanted a whole number above 0")
        return _Importer(_parse(text), gpus, images).found(source, name)
    except UnitedPerceptionError as error:
        raise UnitedPerceptionError(f"{source}: {error}") from None
    except (ArithmeticError, ValueError) as error:
        raise UnitedPerceptionError(f"{source}: a number beyond computing: {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- YAML, as nodes that know their line

_MOST_TEXT, _MOST_NODES, _DEEPEST = 60_000, 3_000, 30


@dataclass(eq=False)
class _Node:
    """A piece of a file; an alias and its anchor are one node, `where` is where it stands first."""

    value: Any  # a dict of nodes, a list of nodes, a plain value or an _Alias
    where: str
    line: int
    used: bool = False  # somebody asked for it
    told: bool = False  # a note speaks of everything in it
    size: int = 1  # nodes it stands for, and their depth, aliases written out
    depth: int = 1

    def children(self) -> Iterator["_Node"]:
        if isinstance(self.value, dict | list):
            yield from self.value.values() if isinstance(self.value, dict) else self.value

    def all(self) -> Iterator["_Node"]:
        yield self
        for child in self.children():
            yield from child.all()

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


class _Alias(yaml.ScalarNode):
    """An alias whose anchor is in another text; its value is the name."""


class _Loader(yaml.SafeLoader):
    """The safe loader down to _Nodes, which are counted; any alias is let through.

    It refuses what PyYAML lets pass and no configuration means.
    """

    VALUES = {f"tag:yaml.org,2002:{tag}" for tag in ("int", "float", "bool", "null")}
    TEXTS = {f"tag:yaml.org,2002:{tag}" for tag in ("str", "timestamp", "value", "merge")}
    BLOCKS = {f"tag:yaml.org,2002:{tag}" for tag in ("seq", "map")}

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.count = 0
        self.built: dict[int, _Node | None] = {}  # by source; None while it is being built

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor not in self.anchors:
            self.get_event()
            return _Alias("", event.anchor, event.start_mark, event.end_mark)
        self.depth, self.count = self.depth + 1, self.count + 1
        if self.depth > _DEEPEST or self.count > _MOST_NODES:
            what = "nested more deeply" if self.depth > _DEEPEST else "more entries"
            raise _fault(event.start_mark.line + 1, f"{what} than a configuration")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    @functools.cached_property
    def usual(self) -> dict[str, _Node]:
        return _parse(_TABLES["usual"], "*").value

    def node(self, source: yaml.Node, where: str) -> _Node:
        line = source.start_mark.line + 1
        if isinstance(source, _Alias):
            return self.usual.get(source.value) or _Node(source, where, line)
        if id(source) in self.built:
            if self.built[id(source)] is None:
                raise _fault(line, "an alias in the block of its own anchor")
            return self.built[id(source)]
        self.built[id(source)] = None
        scalar = isinstance(source, yaml.ScalarNode)
        if source.tag not in (self.VALUES | self.TEXTS if scalar else self.BLOCKS):
            tag = source.tag.replace("tag:yaml.org,2002:", "!!")
            raise _fault(line, f"the tag {_short(tag)} has no place here; write out what it means")
        if isinstance(source, yaml.SequenceNode):
            value = [self.node(item, f"{where}[{i}]") for i, item in enumerate(source.value)]
        else:
            value = (self.scalar if scalar else self.mapping)(source, where)
        node = _Node(value, where, line)
        node.size += sum(child.size for child in node.children())
        node.depth += max((child.depth for child in node.children()), default=0)
        if node.size > _MOST_NODES or node.depth > _DEEPEST:
            raise _fault(line, "aliases stand for more, or for deeper blocks, than a configuration")
        self.built[id(source)] = node
        return node

    def scalar(self, source: yaml.ScalarNode, where: str) -> Any:
        line, last = source.start_mark.line + 1, source.end_mark.line + 1
        if source.style not in ("|", ">") and last > line:
            text = f"the text {_short(source.value)} goes on from line {line} to {last}: close its"
            more = "quote, or put behind a # or delete the line that is no `key: value`"
            raise _fault(line if source.style else last, f"{text} {more}")
        if source.tag in self.TEXTS:
            return source.value
        try:
            value = self.construct_object(source)
        except Exception:  # a number of YAML's that Python has not, a tag on the wrong value
            value = math.nan
        if value is not None and not abs(value) < 1e18:
            raise _fault(line, f"{where} is {_short(source.value)}; wanted a number, not too large")
        return value

    def mapping(self, source: yaml.MappingNode, where: str) -> dict[str, _Node]:
        own, merged = {}, {}
        for key, value in source.value:
            line = key.start_mark.line + 1
            if isinstance(key, _Alias) or not isinstance(key, yaml.ScalarNode):
                raise _fault(line, "a key that is no plain name")
            self.node(key, where)  # refuses its tag
            name = key.value if re.fullmatch(r"[\w@ -]{1,60}", key.value) else _short(key.value)
            if key.tag.endswith(":merge"):
                blocks = self.node(value, where)
                for block in blocks.value if isinstance(blocks.value, list) else [blocks]:
                    if not isinstance(block.value, dict):
                        raise _fault(line, "<< wants a mapping, such as `<<: *anchor`")
                    merged = {**block.value, **merged}
                continue
            if name in own:
                raise _fault(line, f"{name!r} stands twice in {where or 'the file'}; keep one")
            if re.match("over(write|ride)@?$", name):
                raise _fault(line, f"{name} is not read; write its values into their blocks")
            own[name] = self.node(value, f"{where}.{name}" if where.strip("*") else where + name)
        self.contents_inside(own)
        return {**merged, **own}

    def contents_inside(self, block: dict[str, _Node]) -> None:
        """Refuses `type` and `kwargs` beside their block: PyYAML reads them as something else."""
        beside, names = block.get("type") or block.get("kwargs"), list(block)
        for name, following in zip(names, [*names[1:], None], strict=True) if beside else ():
            value, line, what = block[name].value, beside.line, "`type` and `kwargs` stand"
            entry = value[-1].value if isinstance(value, list) and value else {}
            if value is None and name == "kwargs" and following:
                line, what = block[following].line, f"`{following}` stands"
            elif isinstance(entry, dict) and "name" in entry and "type" not in entry:
                name = f"- name: {entry['name'].plain()}"
            elif value is not None or name not in _BLOCKS:
                continue
            raise _fault(line, f"{what} beside `{name}`, not in it; indent by two spaces more")


def _fault(line: int, text: str) -> UnitedPerceptionError:
    return UnitedPerceptionError(f"line {line}: {text}")


def _parse(text: str, top: str = "") -> _Node:
    """The nodes of a YAML text. Raises UnitedPerceptionError, whatever the text is."""
    if not isinstance(text, str) or len(text) > _MOST_TEXT:
        raise UnitedPerceptionError(f"wanted YAML text of at most {_MOST_TEXT:,} characters")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _fault(line, f"{error.character!r} is no character of a text file") from None
    except yaml.MarkedYAMLError as error:
        raise _explained(error, text.splitlines() or [""]) from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # PyYAML on odd escapes
        raise UnitedPerceptionError(f"no YAML: {error}") from None
    if not isinstance(root, yaml.CollectionNode):
        came = _short(root.value) if root else "nothing"
        raise UnitedPerceptionError(f"holds {came}; wanted blocks such as `trainer:` or `dataset:`")
    return loader.node(root, top)


def _explained(error: yaml.MarkedYAMLError, lines: list[str]) -> UnitedPerceptionError:
    """The line to fix, and how, for an error of PyYAML's."""
    problem, context = error.problem or "", error.context or ""
    last = min((error.problem_mark or error.context_mark).line, len(lines) - 1)
    start = min(error.context_mark.line if error.context_mark else 0, last)
    if "single document" in context:
        return _fault(last + 1, "a second document begins; keep one")
    if "\\t" in problem:
        return _fault(last + 1, "a tab; indent with spaces")
    bare = [re.sub(r"(^|\s)#.*|\"[^\"]*\"|'[^']*'", "", line).strip() for line in lines]
    at = lambda i: _short(lines[i].strip())
    # A quote that is not closed runs on to the next one, or to the end of the text.
    for i in [start] if "quoted" in context else range(last, max(-1, last - 4), -1):
        if re.search(r"[:\[,-]\s*['\"]", bare[i]):
            return _fault(i + 1, f"the quote of {at(i)} is not closed; close it")
    above = next((i for i in range(last - 1, -1, -1) if bare[i]), last)
    for i in sorted({start, above, last}):
        if bare[i] and ":" not in bare[i] and bare[i][0] not in "-[]{}&*!|>%@?":
            more = "put it behind a # if it is the tail of a wrapped comment, or delete it"
            return _fault(i + 1, f"{at(i)} is no `key: value`; {more}")
    if context == "while parsing a block collection":
        more = f"stands beside the entry {at(start)}, not in it; indent it by two spaces more"
        return _fault(last + 1, f"{at(last)} {more}, and type and kwargs alike")
    more = "look at the indentation, brackets and quotes here and in the line above"
    return _fault(last + 1, f"{at(last)}: {problem}; {more}")


# ---- what UP's names mean

# {key: option, or [option, its value where the key is missing]}; the key "" is never in a file
_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_TRANSFORMS: dict[str, dict[str, Any]] = _TABLES["transforms"]
_OPTIMIZERS, _SCHEDULES = _TABLES["optimizers"], _TABLES["schedules"]
_DEFAULTS, _BLOCKS = _TABLES["defaults"], set(_TABLES["blocks"].split())
_NOTHING = {key: why for why, keys in _TABLES["nothing"].items() for key in keys.split()}
_WARMUPS, _SWINS, _LOSSES = (_TABLES[key] for key in ("warmups", "swins", "mimic_losses"))
_VALIDATION = ("torch_resize", "torch_center_crop")
_NORMS, _POSITIONS = r"ndim_is1|bias$|_b$|bn|norm|(^|[._])ln", "pos_|position|token"  # in names
_GROUPS = "bn_w bn_b ln_w ln_b linear_w linear_b nodecay layer_decay".split()

# Keys that are read by their names alone, for the hint beside one that is not known.
_KEYS = {*_BLOCKS, *_NOTHING, *_DEFAULTS, *_TABLES["keys"].split()}
_KEYS.update(*_TRANSFORMS.values(), *(t for _, *tables in _OPTIMIZERS.values() for t in tables))
_KEYS.update(*({length, *table} for _, length, table in _SCHEDULES.values()))
_KEYS.discard("")

# UP's name in small letters, without signs, "transformer" and a last 224 -> timm's
_REGNETS = {m: f"{m // 100:03}" for m in (200, 400, 600, 800, 1600, 3200, 4000, 6400)}
_VITS = (("base", 16), ("base", 32), ("large", 16), ("huge", 14))
_WIDTHS = {"": "100", "0.35": "035", "0.5": "050", "0.75": "075", "1.4": "140"}
_SIZES = ("tiny", "small", "base", "large", "xlarge")
_TIMM = {
    **{name: name for name in RESNETS},
    **{f"regnet{kind}{m}m": f"regnet{kind}_{_REGNETS[m]}" for kind in "xy" for m in _REGNETS},
    **{f"convnext{size}": f"convnext_{size}" for size in _SIZES},
    **{f"efficientnetb{i}": f"efficientnet_b{i}" for i in range(8)},
    **{f"mobilenetv2{scale}": f"mobilenetv2_{width}" for scale, width in _WIDTHS.items()},
    **{f"mobilenetv3{size}": f"mobilenetv3_{size}_100" for size in ("small", "large")},
    **{f"vit{n}{p}": f"vit_{s}_patch{p}_224" for s, p in _VITS for n in (s, s[0], f"{s}patch")},
    **{f"deit{size}": f"deit_{size}_patch16_224" for size in _SIZES[:3]},
    **{f"swin{size}": f"swin_{size}_patch4_window7_224" for size in _SIZES[:4]},
    **{f"swin{size}384": f"swin_{size}_patch4_window12_384" for size in ("base", "large")},
}


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.6)
    close = [_TIMM[near] for near in close] if names is _TIMM else close
    return f"; the nearest is {close[0]!r}" if close and close[0] != name else ""


def _square(value: Any) -> int:
    """a number of pixels, or two equal ones"""
    return _as(int, value[0] if isinstance(value, list) and value == value[:1] * 2 else value, 1)


def _height_width(value: Any) -> list[int]:
    """height and width such as 224x224"""
    height, width = value.lower().split("x") if isinstance(value, str) else value
    return [_as(int, height, 1), _as(int, width, 1)]


def _labels(value: Any) -> dict[str, Any]:
    """categories, each with a list of labels"""
    return {name: {**about, "labels": _as([str], about["labels"])} for name, about in value.items()}


_KINDS = {
    **dict.fromkeys(("image_size", "val_image_size", "val_resize"), _square),
    **dict.fromkeys(("crop_scale", "crop_ratio", "mean", "std"), [float]),
    **{"num_classes": int, "workers": int, "clip_grad_norm": float, "ema_decay": float},
    "layer_decay": float,
}
_KESTREL = {
    **dict.fromkeys(("toks_type", "plugin", "model_name", "version", "save_to", "type"), str),
    **dict.fromkeys(("is_rgb", "save_all_label", "add_softmax"), bool),
    **{"input_channel": int, "resize_hw": _height_width, "class_label": _labels},
    **{"pixel_means": [float], "pixel_stds": [float], "support_labels": object},
}


def _as(kind: Any, value: Any, least: float = -math.inf) -> Any:
    """A value as bool, int, float, str, a list of one of them or object (anything).

    Raises ValueError, TypeError, LookupError or AttributeError.
    """
    if isinstance(kind, list):
        return [_as(kind[0], v, least) for v in (value if isinstance(value, list) else [value])]
    if kind not in (bool, int, float, str):
        return value if kind is object else kind(value)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, str | int | float):
        raise TypeError
    if kind is str and not str(value).isprintable():
        raise ValueError
    if kind in (bool, str):
        return kind(value)
    if not math.isfinite(number := float(value)) or number < least or kind(number) != number:
        raise ValueError
    return kind(number)


def _wanted(kind: Any, least: float) -> str:
    """What _as wants, in words."""
    if isinstance(kind, list):
        return f"a list, each {_wanted(kind[0], least)}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a line of text"}
    text = words.get(kind) or kind.__doc__
    return text if least == -math.inf else f"{text}, {'0 or more' if least == 0 else 'above 0'}"


# ---- the import


class _Importer:
    """One pass over the nodes; what nobody asked for is told at the end."""

    def __init__(self, root: _Node, gpus: int | None, images: int | None):
        if isinstance(root.value, list):  # the page shows an entry of `net` alone
            root = _Node({"net": root}, "", root.line)
        self.root, self.gpus, self.images = root, gpus, images
        self.values: dict[str, Any] = {}
        self.origin: dict[str, Note] = {}
        self.notes: dict[Note, None] = {}  # each once, in their order
        self.batch: int | None = None  # images of a step
        self.counted = False  # whether the number of images mattered
        self.soft = False  # whether UP's labels come as shares of classes
        self.defaults = _DEFAULTS

    def found(self, source: str, name: str | None) -> Found:
        self.values |= {} if name is None else {"name": name}
        self.runtime()
        self.data()
        self.trainer()
        self.net(self.root.value.get("net"), self.take)
        self.run()
        self.distillation()
        deployment = self.deployment()
        recipe = self.recipe()
        self.rest()
        notes = [*self.origin.values(), *self.notes]
        return Found(recipe, notes, deployment, source, self.origin)

    # asking

    def at(self, node: _Node, path: str) -> _Node | None:
        """The node at a dotted path; None where nothing stands, or empty kwargs."""
        for key in path.split("."):
            node = self.mapping(node).value.get(key)
            if node is None or (node.value is None and key == "kwargs"):
                return None
        return node

    def where(self, node: _Node, path: str) -> str:
        found = self.at(node, path)
        return found.where if found else f"{node.where}.{path}".lstrip(".")

    def block(self, node: _Node, path: str) -> _Node:
        """The mapping at a dotted path, an empty one where nothing stands."""
        found = self.at(node, path)
        return self.mapping(found) if found else _Node({}, self.where(node, path), node.line)

    def mapping(self, node: _Node) -> _Node:
        if isinstance(node.value, _Alias):
            return _Node({}, self.unknown(node).where, node.line)
        if not isinstance(node.value, dict):
            came = "empty" if node.value is None else _short(node.plain())
            raise _fault(node.line, f"{node.where} is {came}; wanted a block of `key: value`")
        node.used = True
        return node

    def entries(self, node: _Node | None) -> list[_Node]:
        """The mappings of a list."""
        if node is None or node.value is None:
            return []
        if not isinstance(node.value, list):
            raise _fault(node.line, f"{node.where} is {_short(node.plain())}; wanted a list")
        node.used = True
        return [entry for entry in map(self.mapping, node.value) if entry.value]

    def unknown(self, node: _Node) -> _Node:
        self.note(MISSING, node, f"*{node.value.value} has no anchor in this text; left out")
        return node

    def get(self, node: _Node, path: str, kind: Any, default: Any = None, least=-math.inf) -> Any:
        """What stands at a dotted path as `kind`, see _as; the default where nothing does."""
        if (found := self.at(node, path)) is None or found.value is None:
            return default
        for part in found.all():
            part.used = True
            if isinstance(part.value, _Alias):
                self.unknown(part)
                return default
        try:
            value = _as(kind, came := found.plain(), least)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            text = f"{found.where} is {_short(found.plain())}; wanted {_wanted(kind, least)}"
            raise _fault(found.line, text) from None
        if isinstance(came, str) and isinstance(value, int | float):
            self.say(DEFECT, found.where, f"{_short(came)} is text to YAML 1.1; read as {value:g}")
        return value

    # telling

    def say(self, kind: str, where: str, text: str) -> None:
        self.notes[Note(kind, where or "the file", text)] = None

    def note(self, kind: str, node: _Node, text: str) -> None:
        """A note on a node and everything in it."""
        for part in node.all():
            part.used = part.told = True
        self.say(kind, node.where, text)

    def take(self, option: str, value: Any, where: str, why: str = "") -> None:
        """Sets an option; where it was set before, this counts."""
        self.values[option] = value
        text = f"{option} {_short(value)}" + (f"; {why}" if why else "")
        self.origin[option] = Note(TAKEN, where, text)

    def leave(self, option: str, kind: str, text: str) -> None:
        """Unsets an option, for a reason."""
        self.values.pop(option)
        self.say(kind, self.origin.pop(option, Note(TAKEN, option, "")).where, f"{text}; left out")

    def put(self, node: _Node, table: dict[str, Any], take: Callable | None = None) -> None:
        """Takes the options of a table, see united_perception.yaml, from a block."""
        for key, option in table.items():
            option, default = option if isinstance(option, list) else (option, None)
            kind = _KINDS.get(option) or type(Recipe.model_fields[option].default)
            if (value := self.get(node, key, kind) if key else None) is not None:
                (take or self.take)(option, value, self.where(node, key))
            elif default is not None:
                self.take(option, default, node.where.removesuffix(".kwargs") + ".type", "implied")

    def recipe(self) -> Recipe:
        """The recipe; an option that would change nothing in it leaves a note in its place."""
        while True:
            try:
                return Recipe(**self.values)
            except RecipeError as error:
                problems = {text.partition(":")[0]: text for text in error.problems}
                idle = {k: MISSING for k in problems if k in _TABLES["loose"]}
                idle |= {k: NOTHING for k, text in problems.items() if " has no effect" in text}
                for option, kind in idle.items():
                    self.leave(option, kind, problems[option])
                if not idle:
                    where = lambda k: f" ({self.origin[k].where})" if k in self.origin else ""
                    lines = [f"\n  - {text}{where(option)}" for option, text in problems.items()]
                    raise UnitedPerceptionError("no recipe comes of it" + "".join(lines)) from None

    def rest(self) -> None:
        """Notes on values, on what nobody asked for and on what was assumed."""
        for part in dict.fromkeys(part for part in self.root.all() if part.where):
            for path, pattern, kind, text in _TABLES["facts"]:
                if not part.told and re.search(f"{path}$", part.where):
                    if re.fullmatch(pattern, came := str(part.plain())):
                        names = re.findall(r"\w+", pattern) if pattern.startswith("(?!(") else ()
                        self.note(_KIND_NAMES[kind], part, text + _near(came, names))
            block = part.value if isinstance(part.value, dict) and not part.told else {}
            titles = part.where, str(block["type"].value) if "type" in block else ""
            for name, keys in _TABLES["required"].items() if block else ():
                if any(re.fullmatch(rf"(.*\.)?{name}", title) for title in titles):
                    for key in (key for key in keys.split() if not self.at(part, key)):
                        text = "missing: UP stops (a TypeError, KeyError or failed assertion)"
                        self.say(DEFECT, self.where(part, key), text)
        self.tell("", self.root, {note.where for note in (*self.notes, *self.origin.values())})
        if self.batch and self.gpus is None:
            self.say(TAKEN, "--gpus", "not given, 1 assumed: batch_size is UP's for one GPU")
        if self.gpus and not self.batch:
            self.say(TAKEN, "--gpus", "no batch size in this text that it would multiply")
        for option in ("batch_size", "model"):
            if self.values and option not in self.values:
                text = f"not in this text, {Recipe.model_fields[option].default} is taken"
                self.say(TAKEN, f"--set {option}", text)
        if self.counted and self.images is None:
            text = f"not given, {IMAGENET:,} assumed (ImageNet-1k): {self.steps:,} steps an epoch"
            self.say(TAKEN, "--train-images", text)

    def tell(self, key: str, node: _Node, told: set[str], above: str = "") -> None:
        value, block = node.value, isinstance(node.value, dict)
        if node.told or value in ({}, []) or (node.where in told and not block):
            return
        above = _NOTHING.get(key, above)
        if not node.used:
            came, usual = node.plain(), self.defaults.get(key)
            each = came if isinstance(came, list) and not isinstance(usual, list) else [came]
            if value is None or (above if usual is None else all(one == usual for one in each)):
                text = "empty; left out" if value is None else "as it is here"
                self.note(NOTHING, node, above or text)
            elif usual is not None:
                self.note(MISSING, node, f"{_short(came)} is not reproduced; {usual} is taken")
            else:
                keys = _KEYS | set(_TABLES["mimic_keys"].split() if "mimic" in node.where else ())
                self.note(MISSING, node, f"not known here; left out{_near(key, keys)}")
        elif not isinstance(value, dict | list):
            self.note(TAKEN, node, _short(value))
        else:
            for key, child in value.items() if block else enumerate(value):
                self.tell(str(key), child, told, above)

    # data

    def runtime(self) -> None:
        at = self.block(self.root, "runtime")
        self.put(at, {"random_seed": "seed"})
        if (device := self.get(at, "device", str)) in ("cpu", "mps"):
            self.take("device", device, "runtime.device")
        fp16, whole = self.get(at, "fp16", object), {"dataset", "trainer"} <= set(self.root.value)
        if fp16 is False or (not fp16 and (whole or "fp16" in self.root.value)):
            self.take("precision", "fp32", "runtime.fp16", "UP's default" if fp16 is None else "")
        self.runner = self.get(at, "runner.type", str, "base")
        self.by_step = self.get(at, "iter_base", bool, False)
        self.meant_by_step = self.by_step or self.get(self.root, "iter_base", bool, False)

    def data(self) -> None:
        data, whole = self.block(self.root, "dataset"), "dataset" in self.root.value
        if whole:
            self.take("dataset", "files", "dataset")
        inner = {side: self.block(data, f"{side}.dataset") for side in ("train", "test")}
        if "train" not in data.value and "test" not in data.value:
            inner["train"] = data  # the page shows the inner block alone
        paths: dict[str, tuple[list[str], str]] = {}
        for side, block in inner.items():
            kwargs = self.block(block, "kwargs")
            for key, end in (("meta_file", "list"), ("image_reader.kwargs.image_dir", "root")):
                if found := self.get(kwargs, key, [str]):
                    paths[f"{side.replace('test', 'val')}_{end}"] = found, self.where(kwargs, key)
            self.get(block, "type", str)
            for key in ("meta_type", "image_reader.type", "image_reader.kwargs.color_mode"):
                self.get(kwargs, key, [str])
            self.transforms(kwargs, side)
        self.put(self.block(inner["train"], "kwargs"), {"fraction": "train_fraction"})
        self.places(paths)
        train = self.block(data, "train")
        for key in ("batch_sampler", "dataloader"):
            if key in train.value and (node := self.at(data, key)):
                self.note(DEFECT, node, f"UP reads dataset.train.{key} alone")
            if node := self.at(data, f"test.{key}"):
                self.note(NOTHING, node, "chosen here, it changes no result")
        self.loader(_Node({**data.value, **train.value}, train.where, data.line))
        for node in list(self.root.children()):
            name = node.value.get("type") if isinstance(node.value, dict) else None
            if not name or name.used or name.plain() not in list(_TRANSFORMS):
                continue
            if whole:
                text = f"{name.value} is in no transformer list and no batch_fn: does nothing"
                self.note(DEFECT, node, text)
            else:
                self.transform(node, "test" if name.value in _VALIDATION else "train")
        # No validation size that is the training's; a resize where the text has none.
        train, val = self.values.get("image_size"), self.values.pop("val_image_size", None)
        note = self.origin.pop("val_image_size", None)
        if val and val != train:
            self.take("val_image_size" if train else "image_size", val, note.where)
        if (val or train) and "val_resize" not in self.values:
            text = "no torch_resize in this text; UP's 256 for 224"
            self.take("val_resize", round((val or train) * 8 / 7), "*torch_resize", text)

    def places(self, paths: dict[str, tuple[list[str], str]]) -> None:
        """Absolute paths become a data_dir and paths below it; others stay as they are."""
        clean, folders = {}, []
        for option, (found, where) in paths.items():
            if not all(found):
                self.say(DEFECT, where, "an empty path: UP finds nothing")
                continue
            found = [p if "://" in p else re.sub("^//", "/", posixpath.normpath(p)) for p in found]
            clean[option] = found, where
            folders += map(posixpath.dirname, found) if option.endswith("list") else found
        absolute = bool(folders) and all(path.startswith("/") for path in folders)
        base = posixpath.commonpath(folders) if absolute else "/"
        for option, (found, where) in clean.items():
            below = [posixpath.relpath(path, base) for path in found] if base != "/" else found
            self.take(option, below, where)
        if base != "/":
            self.take("data_dir", base, "dataset", "holds all its lists and images")
        elif folders and not absolute:
            self.say(NOTHING, "dataset", "its paths are relative or in a store; say data_dir")

    def loader(self, at: _Node) -> None:
        sampler = self.block(at, "batch_sampler.kwargs")
        loader = self.block(at, "dataloader.kwargs")
        for key in ("batch_sampler.type", "dataloader.type", "batch_sampler.kwargs.sampler.type"):
            kind = self.get(at, key, str)
        if kind == "class_balance":
            self.take("class_balanced_sampling", 1.0, self.where(sampler, "sampler.type"))
        if size := self.get(sampler, "batch_size", int, least=1):
            gpus = self.gpus or 1
            self.batch, why = size * gpus, f"{size:,} on each of {gpus:,} GPUs"
            self.take("batch_size", self.batch, self.where(sampler, "batch_size"), why)
        self.put(sampler, {"drop_last": "drop_last"})
        self.put(loader, {"drop_last": "drop_last", "num_workers": "workers"})
        if "batch_fn" in loader.value:
            self.transform(self.block(loader, "batch_fn"), "train")

    def transforms(self, kwargs: _Node, side: str) -> None:
        node = kwargs.value.get("transformer")
        done = [self.transform(entry, side) for entry in self.entries(node)]
        names = [name for name in done if name in _TRANSFORMS and "flip" not in name]
        order = [list(_TRANSFORMS).index(name) for name in names]  # a flip may stand anywhere
        if order != sorted(order):
            text = "here the order is crop, flip, AutoAugment, RandAugment, jitter, erase"
            self.say(MISSING, node.where, text)
        for name, text in _TABLES["expected"][side].items() if done else ():
            if name not in done:
                self.say(MISSING, node.where, f"no {name}: {text}")
        kinds = [name.removesuffix("Incre") for name in done if name]
        for name in sorted({name for name in kinds if kinds.count(name) > 1}):
            self.say(MISSING, node.where, f"UP applies every {name}; only the last is taken")
        if side == "train" and "to_tensor" in done and "normalize" not in done:
            self.take("mean", [0.0] * 3, node.where, "has no normalize")
            self.take("std", [1.0] * 3, node.where, "has no normalize")

    def transform(self, node: _Node, side: str) -> str:
        """Takes what one transform or batch function means; its type comes back."""
        name, kwargs = self.get(node, "type", str, ""), self.block(node, "kwargs")
        before = {**self.values}, {**self.origin}
        if node.where.startswith("*"):
            text = f"no such anchor in this text; UP's usual {name} {kwargs.plain() or ''}".rstrip()
            self.say(TAKEN, node.where, text)
        if name not in _TRANSFORMS:
            text = f"no counterpart of {name or 'what has no type'}{_near(name, _TRANSFORMS)}"
            self.note(MISSING, node, text)
        elif side == "train" and name in _VALIDATION:
            self.note(MISSING, node, "no counterpart: training crops at random, see crop_scale")
        elif side == "test" and name not in (*_VALIDATION, "normalize", "to_tensor"):
            self.note(MISSING, node, "no counterpart: validation takes one centre crop")
        else:
            self.put(kwargs, _TRANSFORMS[name])
            for key, other in kwargs.value.items() if name == "torch_auto_augmentation" else ():
                self.note(NOTHING, other, f"UP's AutoAugment makes no use of {key}")
            self.soft |= "mix" in name
            # With one alpha 0, UP leaves the batches alone that would be mixed the other way.
            mixes = [self.values.get(f"{way}_alpha", 0) > 0 for way in ("mixup", "cutmix")]
            if "switch_prob" in _TRANSFORMS[name] and not all(mixes):
                share, note = self.values.pop("switch_prob"), self.origin.pop("switch_prob")
                share = share if mixes[1] else 1 - share
                if any(mixes):
                    self.take("mix_prob", share, note.where, "one alpha is 0")
            size = self.get(kwargs, "size", object)
            if name == "torch_resize" and isinstance(size, list) and size[1:]:
                text = f"UP resizes to {size[0]} x {size[1]} whatever the shape; not here"
                self.say(MISSING, self.where(kwargs, "size"), text)
        if "andom_augm" in name and "randaug_n" not in self.values:
            raise _fault(node.line, f"{node.where}: {name} without n; how many are drawn?")
        for option in ("mean", "std", "interpolation") if side == "test" else ():
            if option in before[0] and self.values[option] != before[0][option]:
                self.values[option], self.origin[option] = (state[option] for state in before)
                text = f"{option} is the training's, {self.values[option]}: one option serves both"
                self.say(MISSING, node.where, text)
        return name

    # optimisation

    @property
    def steps(self) -> int | None:
        """Steps of an epoch; None where the text names no batch size."""
        self.counted |= self.batch is not None
        images = int((self.images or IMAGENET) * self.values.get("train_fraction", 1.0))
        return self.batch and max(1, math.ceil(images / self.batch))

    @property
    def total(self) -> int | None:
        return self.iterations or (self.epochs and self.steps and self.epochs * self.steps)

    def trainer(self) -> None:
        whole = "trainer" in self.root.value
        at = self.block(self.root, "trainer") if whole else self.root
        self.epochs = self.get(at, "max_epoch", int, least=1)
        self.iterations = self.get(at, "max_iter", int, least=1)
        if self.iterations and self.epochs:
            self.say(DEFECT, self.where(at, "max_epoch"), "UP takes max_iter where both are there")
            self.epochs = None
        where = self.where(at, "max_iter")
        if self.epochs:
            self.take("epochs", self.epochs, self.where(at, "max_epoch"))
        elif self.iterations and self.steps:
            exact = self.iterations / self.steps
            self.epochs = max(1, round(exact))
            why = f"{self.iterations:,} steps are {exact:.2f} epochs of {self.steps:,}"
            self.take("epochs", self.epochs, where, why)
            if abs(exact - self.epochs) > 0.01 * exact:
                self.say(MISSING, where, f"{why}; a recipe has whole epochs, {self.epochs} here")
        elif self.iterations:
            self.say(MISSING, where, "no batch size in this text; say epochs")
        for key, read in (("optimizer", self.optimizer), ("lr_scheduler", self.scheduler)):
            home = at if key in at.value else self.root
            if whole and home is self.root:
                text = "UP looks for it in `trainer` and stops with a KeyError"
                self.say(DEFECT, key, text + ("; taken from here" * (key in home.value)))
            if key in home.value:
                read(self.block(home, key))
        if every := self.get(at, "test_freq", int, least=1):
            steps = self.iterations and (self.meant_by_step or every > (self.epochs or every))
            why = f"{every:,} steps" if steps and self.steps else ""
            every = min(max(1, round(every / self.steps)), self.epochs) if why else every
            self.take("eval_every", every, self.where(at, "test_freq"), why)
        ema = self.block(self.root, "ema")
        if not self.get(ema, "enable", bool, True):
            return self.note(NOTHING, ema, "enable is false")
        self.put(self.block(ema, "kwargs"), {"decay": "ema_decay"})
        for key in ("ema_type", "kwargs.inner_T", "kwargs.warmup"):
            self.get(ema, key, object)

    def optimizer(self, at: _Node) -> None:
        name, kwargs, where = self.get(at, "type", str, ""), self.block(at, "kwargs"), at.where
        plain = {"lr": "lr", "weight_decay": "weight_decay"}
        ours, options, others = _OPTIMIZERS.get(name, ("", plain, {}))
        self.defaults = _DEFAULTS | others
        self.put(kwargs, options)
        if ours:
            self.take("optimizer", ours, f"{where}.type")
        else:
            text = f"no counterpart of {name or 'none'}; sgd is taken{_near(name, _OPTIMIZERS)}"
            self.say(MISSING, f"{where}.type", text)
        for key, node in kwargs.value.items():
            if ours and key not in (*options, *others, "pconfig", "special_param_group"):
                self.note(DEFECT, node, f"{name} does not take it: UP stops with a TypeError")
        if "lr" not in kwargs.value:
            self.say(DEFECT, f"{where}.kwargs", f"no lr; {self.values.get('lr', 0.1)} is taken")
        if self.values.get("nesterov") and not self.values["momentum"]:
            self.leave("nesterov", DEFECT, "torch refuses nesterov without momentum")
        for home in (at, kwargs):
            for key in ("pconfig", "special_param_group"):
                self.groups(home.value.get(key))

    def groups(self, node: _Node | None) -> None:
        """Groups without decay become decay_norm_and_bias: false; by layer type or name."""
        many = node is None or isinstance(node.value, list)
        for entry in self.entries(node) if many else [self.mapping(node)]:
            named = self.get(entry, "key", str)
            groups = {named: entry} if named else entry.value
            for name, group in sorted(groups.items(), key=lambda pair: pair[0] == "nodecay"):
                self.group(name, group, not named)

    def group(self, name: str, group: _Node, by_kind: bool) -> None:
        inner = group.value if isinstance(group.value, dict) else {}
        decays = [self.get(group, f"{k}weight_decay", float) for k in ("", "kwargs.") if inner]
        kind = self.get(group, "type", str) if inner else None
        if by_kind and name == "layer_decay":
            self.put(group, {"value": "layer_decay", "base_lr": "lr"})
            if kind != "vit_base":
                self.say(DEFECT, f"{group.where}.type", f"UP stops at {kind}: vit_base alone")
            return
        nodecay = name == "nodecay"
        parts = [str(part.value) for part in group.children()] if nodecay else [name]
        spared = all(re.search(f"{_NORMS}|{_POSITIONS}", part) for part in parts)
        spared &= "decay_norm_and_bias" in self.values or any(
            re.search(_NORMS, part) for part in parts
        )
        if "nodecay" in inner:
            self.note(DEFECT, inner["nodecay"], f"UP ignores it inside {name}")
        if by_kind and name not in _GROUPS:
            self.note(DEFECT, group, f"UP knows no group {name} and stops with a KeyError")
        elif spared and (nodecay or 0 in decays):  # as decay_norm_and_bias: false
            why = f"{name} has none; here norms, biases and position embeddings together"
            self.take("decay_norm_and_bias", False, group.where, why)
            for part in group.all() if nodecay else ():
                part.used = True
            more = self.block(group, "kwargs").value if inner else {}
            for key, node in {**inner, **more}.items():
                if key not in ("key", "type", "weight_decay", "kwargs", "nodecay"):
                    self.note(MISSING, node, f"{key} of {name} alone is not reproduced")
        else:
            self.note(
                MISSING,
                group,
                "no counterpart: groups differ in decay alone, see decay_norm_and_bias",
            )

    def scheduler(self, at: _Node) -> None:
        name, kwargs = self.get(at, "type", str, ""), self.block(at, "kwargs")
        ours, key, table = _SCHEDULES.get(name, ("", "T_max", {}))
        key = "max_iter" if name == "polylr" and self.get(kwargs, "max_iter", int, -1) > 0 else key
        said = self.get(kwargs, key, [float], [], least=1e-9)
        where, longest, steps = self.where(kwargs, key), max(said, default=0), self.steps
        meant = self.meant_by_step or key == "max_iter"
        meant |= bool(self.iterations and longest > 2 * (self.epochs or 0))
        lengths = sorted(x / steps if meant and steps else x for x in said)
        if self.epochs is None and not self.iterations and said:
            last, before = round(lengths[-1]), round(lengths[-2] if said[1:] else 0)
            guess = {"multistep": 2 * last - before, "step": 3 * last}.get(ours, last)
            self.epochs = max(1, guess)
            self.take("epochs", self.epochs, where, "no max_epoch in this text: a guess from this")
        climb = self.warmup(at, 1 if meant else steps)
        if not ours:
            text = f"no counterpart of {name or 'none'}; a cosine is taken{_near(name, _SCHEDULES)}"
            self.say(MISSING, f"{at.where}.type", text)
            return
        climbed = climb / steps if steps else self.values.get("warmup_epochs", 0)
        if ours == "step" and lengths and 0 < (every := round(lengths[0])) < climbed:
            ours, lengths = "multistep", [*range(every, self.epochs or every, every)]
        self.take("schedule", ours, f"{at.where}.type")
        self.put(kwargs, table)
        if ours in ("multistep", "step"):
            rounded = sorted({round(x) for x in lengths} - {0})
            reached = [m for m in rounded if m < (self.epochs or math.inf)]
            if late := rounded[len(reached) :]:
                self.say(DEFECT, where, f"{late} are never over in {self.epochs} epochs")
            if rounded != lengths:
                self.say(MISSING, where, f"as whole epochs, each once: {rounded}")
            if (early := [m for m in reached if m < climbed]) and ours == "multistep":
                self.say(DEFECT, where, f"{early} inside the warm-up: UP never applies them")
                reached = reached[len(early) :]
            if not reached:
                self.take("schedule", "constant", f"{at.where}.type", f"{name} that never steps")
            elif ours == "step":
                self.take("lr_step_epochs", reached[0], where)
            else:
                self.take("milestones", reached, where)
        elif not said and name == "polylr":
            self.say(DEFECT, where, "missing: UP takes -1, so lr grows as (1 + epochs)^power")
        elif said:
            self.falling(name, kwargs, where, (longest, lengths[-1]), climb)

    def falling(self, name: str, kwargs: _Node, where: str, length: tuple, climb: int) -> None:
        """Options of a steady schedule; `length` as written and in epochs, `climb` in steps."""
        (said, epochs), steps, total = length, self.steps or 0, self.total
        peak, low = self.values.get("lr", 1.0), self.values.get("lr_min", 0.0)
        begins = {"CosineAnnealingLR": "warmup_iter", "CosineLREpochScheduler": "warm_epoch"}
        begin = begins.get(name, where.rpartition(".")[2])
        usual = climb / (steps or 1) if begin == "warm_epoch" else 0.0
        start = self.get(kwargs, begin, float, usual, least=0) if name in begins else 0.0
        begin, ours = self.where(kwargs, begin), (self.epochs or 0) * steps
        warmup, period = schedule.Warmup(climb), None
        last = said * (1 if self.by_step or where.endswith("max_iter") else steps)
        wave = lambda share: low + (peak - low) * (1 + math.cos(math.pi * share)) / 2
        if name == "CosineAnnealingLR":
            there = lambda t: wave((t - start) / (last - start))
            if round(epochs) != self.epochs:
                own = epochs * steps - climb  # steps from the peak to the end
                self.take("cosine_epochs", own / steps if steps and own > 0 else epochs, where)
                period = round(self.values["cosine_epochs"] * steps)
            here = schedule.Cosine(peak, ours, low, warmup, period=period)
        elif name == "polylr":
            power = self.values.get("power", 1.0)
            if power % 1 and last < (total or 0):
                return self.say(DEFECT, where, f"complex after {epochs:g} epochs, where UP stops")
            there = lambda t: low + (peak - low) * (1 - t / last) ** power
            here = schedule.Polynomial(peak, ours, power, low, warmup)
        elif name == "OneCycleLR":
            rise = self.values.get("pct_start", 0.3)
            cycle, here = (schedule.OneCycle(peak, n, rise) for n in (round(last), ours))
            end, both = round(last) - 1, 2 * (1 - rise) * round(last)  # UP's lr climbs again
            there = lambda t: cycle(t if t < end else end - min((t - end) % both, (end - t) % both))
            if self.get(kwargs, "cycle_momentum", bool, True) or climb:
                self.say(MISSING, where, "not reproduced: momentum from 0.95 to 0.85, a warm-up")
        else:
            there = lambda t: wave((t // steps - start) / epochs)
            self.take("cosine_epochs", epochs, where, "from the end of the warm-up")
            if name.startswith("EpochBased"):
                low = peak * self.get(kwargs, "eta_min", float, 0.0)
                self.take("lr_min", low, self.where(kwargs, "eta_min"), "a share of lr in UP")
            here = schedule.Cosine(peak, ours, low, warmup, steps or 1, round(epochs * steps))
        if steps and total:
            mistaken = f"{said:,.0f} epochs to UP while runtime.iter_base is not true: "
            mistaken *= said != epochs and last == said * steps
            self.apart(there, here, (begin, start), (where, mistaken), climb, name)
        elif name == "CosineAnnealingLR" and start != climb:
            text = f"{start:g}, but the warm-up takes {climb:,} steps: in UP lr jumps; not here"
            self.say(DEFECT, begin, text)

    def apart(
        self, there: Callable, here: Callable, begin: tuple, end: tuple, climb: int, name: str
    ) -> None:
        """Tells where UP's lr differs from ours: after the warm-up, at the end, at most."""
        steps, total, peak = self.steps, self.total, self.values.get("lr", 1.0)
        unit, (where, mistaken) = "" if "lr" in self.values else " x lr", end
        apart = lambda t: abs(there(t) - here(t)) / peak
        if apart(climb) > 1e-4 and name != "OneCycleLR":
            text = f"{begin[1]:g}, but " if "warm" in begin[0] else ""
            text += f"the warm-up takes {climb:,} steps ({climb / steps:.2f} epochs): in UP lr "
            text += f"jumps from {peak:.5g} to {there(climb):.5g}{unit} after it"
            self.say(DEFECT, begin[0], text)
        low = self.values.get("lr_min", 0.0)
        if abs(there(total - 1) - low) > 1e-4 * peak:
            text = f"{mistaken}in UP lr ends at {there(total - 1):.8g}{unit} and not at {low:g}"
            self.say(DEFECT, where, f"{text}, here at {here(total - 1):.4g}{unit}")
        most = max([*range(climb, total, math.ceil(total / 5000)), total - 1], key=apart)
        if (gap := apart(most)) > 1e-3 and not mistaken:
            text = f"UP's lr differs by up to {100 * gap:.1f} % of its peak, in epoch"
            both = f"{most // steps + 1} {there(most):.5g}{unit}, here {here(most):.5g}{unit}"
            self.say(MISSING, where, f"not reproduced: {text} {both}")

    def warmup(self, at: _Node, unit: int | None) -> int:
        """Takes the warm-up and the lr it climbs to; the number of its steps comes back."""
        steps = self.get(at, "warmup_iter", int, 0, least=0)
        epochs = self.get(at, "warmup_epochs", float, 0.0, least=0)
        by_epochs = int(epochs * (unit or 0))
        longer = by_epochs > steps or (epochs and not steps)
        key, other = ("warmup_iter", "warmup_epochs")[:: -1 if longer else 1]
        if steps and epochs:
            self.say(NOTHING, self.where(at, other), f"{key} is longer")
        steps, where = max(steps, by_epochs), self.where(at, key)
        if key == "warmup_epochs" and unit != 1 and (epochs.is_integer() or not unit):
            self.take("warmup_epochs", epochs, where)
        elif steps > 1:
            self.take("warmup_steps", steps, where)
        factor = self.factor(at)
        kind = self.get(at, "warmup_type", str, "exp")
        ratio = self.get(at, "warmup_ratio", float, -1.0)
        start = 1 / factor if ratio < 0 else ratio
        if steps == 1:
            self.say(DEFECT, where, f"UP never ends one step: lr stays at {start:g} of its target")
            self.take("lr", self.values.get("lr", 0.1) * start, where, f"{start:g} of its target")
            return 0
        form = self.where(at, "warmup_type")
        if kind not in _WARMUPS or (kind == "exp" and ratio == 0 and (steps or epochs)):
            text = "it multiplies from 0" if kind in _WARMUPS else "UP knows no such warm-up"
            self.say(DEFECT, form, f"{text}; linear is taken")
            kind = "linear"
        if steps or epochs:
            why = "UP's default" if "warmup_type" not in at.value else ""
            self.take("warmup", _WARMUPS[kind], form, why)
            why = "UP starts from the file's lr then" if ratio < 0 else ""
            self.take("warmup_start_factor", start, self.where(at, "warmup_ratio"), why)
        for key in ("warmup_type", "warmup_ratio"):
            if key in at.value and not (steps or epochs):
                self.note(NOTHING, at.value[key], "there is no warm-up")
        if self.total and steps >= self.total:
            text = f"a warm-up of {steps:,} of {self.total:,} steps never reaches lr; shorten it"
            self.say(DEFECT, where, text)
        elif self.total and steps > 0.25 * self.total and abs(steps * ratio - 10) < 0.2:
            text = f"{steps / self.steps:.1f} of {self.epochs} epochs; as warmup_ratio is 1 /"
            text += f" {1 / ratio:,.0f}, {steps // 10:,} to {1 / ratio:,.0f} steps may be meant"
            self.say(DEFECT, where, text)
        return steps

    def factor(self, at: _Node) -> float:
        """What UP multiplies lr by; it is in the option afterwards."""
        register = self.get(at, "warmup_register_type", str, "base")
        where, lr = self.where(at, "warmup_register_type"), self.values.get("lr")
        if register == "no_scale_lr" or self.get(at, "type", str) == "OneCycleLR":
            return 1.0
        if register != "base" or not self.batch or lr is None:
            why = "UP multiplies lr by GPUs x batch size unless this is no_scale_lr"
            why = why if register == "base" else f"UP knows no {register}"
            self.say(DEFECT, where, f"{why}; lr is left as it is")
            return 1.0
        text = f"not no_scale_lr, so UP multiplies lr {lr:g} by GPUs x batch size {self.batch:,}"
        self.say(DEFECT, where, f"{text}: {lr * self.batch:.8g} is taken")
        self.take("lr", lr * self.batch, self.origin["lr"].where, f"{lr:g} x {self.batch:,}")
        return float(self.batch)

    # model and loss

    def net(self, node: _Node | None, take: Callable) -> None:
        """Hands the options of a network to `take`: the recipe's, or those of a teacher."""
        for block in self.entries(node):
            name, kind = self.get(block, "name", str, ""), self.get(block, "type", str, "")
            kwargs = self.block(block, "kwargs")
            if kind not in (known := _TABLES["parts"].get(name, [kind])):
                text = f"no counterpart of {kind}; {known[0]} is taken{_near(kind, known)}"
                self.say(MISSING, self.where(block, "type"), text)
            if name == "backbone" and kind:
                if take == self.take and "model" in self.values:
                    self.say(MISSING, block.where, "a second backbone; the last is taken")
                self.backbone(block, kind, kwargs, take)
            elif name == "head" or kind.endswith("_head"):
                self.put(kwargs, {"dropout": "dropout"}, take)
                if kind == "vit_head" and (node := self.at(kwargs, "dropout")):
                    self.say(DEFECT, node.where, "UP's vit_head never applies it")
                where = self.where(kwargs, "num_classes")
                counts = self.get(kwargs, "num_classes", [int], [], least=1)
                if counts:
                    take("num_classes", counts[0], where)
                    self.defaults = {"num_classes": counts[0], **self.defaults}
                if len(counts) > 1:
                    self.say(MISSING, where, f"no counterpart of {len(counts)} heads; one is taken")
            elif "cls_loss" in kwargs.value and take == self.take:
                self.loss(kwargs.value["cls_loss"])
            elif not name.startswith("post") or take != self.take:
                self.note(MISSING, block, f"no counterpart of {name} {kind}".rstrip())

    def backbone(self, block: _Node, kind: str, kwargs: _Node, take: Callable) -> None:
        where, plain = self.where(block, "type"), re.sub("_[dD]$", "", kind)
        key = re.sub(r"[^a-z0-9.]|transformer|224$", "", plain.lower())
        for part in ("scale", "width_mult", "mode"):
            key += re.sub(r"^1(\.0)?$", "", self.get(kwargs, part, str, ""))
        if key.startswith("swin"):
            keys, usual = ("embed_dim", "depths", "num_heads"), _SWINS["tiny"]
            shape = [self.get(kwargs, k, object, u) for k, u in zip(keys, usual, strict=True)]
            size = next((size for size, own in _SWINS.items() if own == shape), "of no known size")
            window = {7: "", 12: "384"}.get(self.get(kwargs, "window_size", int, 7), "w")
            plain = key = f"swin{size}{window}"
            if size not in kind:
                self.say(DEFECT, where, f"UP goes by kwargs, not by name: Swin {size}, {shape}")
        if key in _TIMM or plain in _TIMM.values():
            take("model", _TIMM.get(key, plain), where)
        else:
            take("model", kind, where)
            text = f"timm has no {kind}" + " of these kwargs" * key.startswith("swin")
            self.say(MISSING, where, f"{text}; choose a model{_near(key, _TIMM)}")
        if plain != kind and key in RESNETS:
            take("avg_down", True, where)
            text = "no whole ResNet-D in UP: 7x7 stem unless deep_stem, a padded pool in shortcuts"
            self.say(DEFECT, where, f"{text}; avg_down is the nearest, deep_stem makes it whole")
        self.put(kwargs, _TABLES["backbone"], take)
        self.get(kwargs, "normalize.type", str)
        if take != self.take:
            return
        for begin, share in _TABLES["drop_paths"].items():
            if key.startswith(begin) and "drop_path" not in self.values:
                self.take("drop_path", share, where, "UP's default")
        if key.startswith(("vit", "deit")):
            rates = [name for name in kwargs.value if "drop" in name and "path" not in name]
            text = ", ".join(f"{name} {self.get(kwargs, name, float, 0.1):g}" for name in rates)
            text = f"dropout and attention dropout in every block, 0.1 but for {text or 'none'}"
            path = "drop path of every block alike; here it grows from 0 in the first to drop_path"
            self.say(MISSING, where, f"not reproduced: {text}; {path}")
        if "normalize" not in kwargs.value and re.match("resnet|mobilenet|efficientnet", key):
            text = "missing: UP freezes every batch norm then; here they are trained"
            self.say(DEFECT, self.where(kwargs, "normalize"), text)
        if frozen := self.get(kwargs, "frozen_layers", [int], [], least=0):
            names = [part for i in frozen for part in ([f"layer{i}"] if i else ["conv1", "bn1"])]
            take("freeze", names, where := self.where(kwargs, "frozen_layers"))
            if key not in RESNETS:
                self.say(MISSING, where, "timm names these otherwise; choose modules of the model")

    def loss(self, node: _Node) -> None:
        if isinstance(node.value, list):
            node.used = True
            for other in node.value[1:]:
                self.note(MISSING, other, "no counterpart: the loss of another head")
            node = next(iter(node.value), _Node({}, node.where, node.line))
        at = self.mapping(node)
        name, where = self.get(at, "type", str, ""), f"{at.where}.type"
        if name != "label_smooth_ce" and (ratio := self.at(at, "kwargs.smooth_ratio")):
            self.note(DEFECT, ratio, f"{name} does not take it: UP stops with a TypeError")
        mixed = self.values.get("mixup_alpha", 0) > 0 or self.values.get("cutmix_alpha", 0) > 0
        if name in ("ce", "stce", "label_smooth_ce"):
            self.take("loss", "ce", where)
            if name == "label_smooth_ce":
                self.put(self.block(at, "kwargs"), {"smooth_ratio": "label_smoothing"})
            if name == "stce" and not self.soft and "dataset" in self.root.value:
                self.say(DEFECT, where, "UP's stce takes mixed labels alone and fails on these")
            if mixed and (share := self.values.get("label_smoothing")):
                text = f"mixed labels sum to 1 - {share:g} / classes in UP, and with up_smoothing"
                self.say(DEFECT, self.where(at, "kwargs.smooth_ratio"), text)
                self.take("up_smoothing", True, where, "labels are mixed")
        elif name == "bce":
            bias, place = self.get(at, "kwargs.bias", bool, False), self.where(at, "kwargs.bias")
            why = "" if bias else "mean over classes; UP's strikes files have bias: true"
            self.take("loss", "bce", where, why)
            for option in ("bce_sum", "bce_shift") if bias else ():
                self.take(option, True, place)
            if bias and not self.soft:
                self.say(DEFECT, place, "labels are not mixed: UP takes the mean over classes then")
        else:
            near = _near(name, ("ce", "stce", "label_smooth_ce", "bce"))
            self.say(MISSING, where, f"no counterpart of {name or 'none'}; ce is taken{near}")

    # the run

    def run(self) -> None:
        options = {"auto_resume": "auto_resume", "pretrain_model": "weights"}
        self.put(self.block(self.root, "saver"), {**options, "resume_model": "resume_from"})
        if "resume_from" in self.values:
            text = "a run folder can be continued; of UP's checkpoint take the weights: `weights`"
            self.say(NOTHING, "saver.resume_model", text)
            if "weights" in self.values:
                self.leave("weights", DEFECT, "resume_model comes first")
        for at in self.entries(self.root.value.get("hooks")):
            name, mode = self.get(at, "type", str, ""), self.get(at, "kwargs.mode", str, "")
            if name != "grad_clipper":
                text = f"no counterpart of {name}{_near(name, [*_NOTHING, 'grad_clipper'])}"
                self.note(NOTHING if name in _NOTHING else MISSING, at, _NOTHING.get(name, text))
            elif mode not in ("", "pre_defined"):
                self.note(MISSING, at, f"no counterpart of {mode}, a limit that follows the norms")
            elif most := self.get(at, "kwargs.max_norm", float, least=1e-9):
                least = min(most, self.values.get("clip_grad_norm", most))
                why = "" if least == most else "LAMB's own is smaller"
                self.take("clip_grad_norm", least, self.where(at, "kwargs.max_norm"), why)

    # distillation

    def distillation(self) -> None:
        """The options of teachers, from the page's schema or that of UP's last version."""
        top, mimic = self.root.value.items(), self.block(self.root, "mimic")
        nets = {k: self.teacher(n) for k, n in top if "teacher" in k and isinstance(n.value, list)}
        jobs = [self.block(mimic, key) for key in mimic.value if key.startswith("mimic_job")]
        lessons = {}  # UP has a teacher in one job only
        for job in jobs or [mimic]:
            for key, node in job.value.items():
                if "teacher" in key and isinstance(node.value, dict):
                    lessons[key] = job
        if not self.get(mimic, "task_loss", bool, True):
            self.take("task_weight", 0.0, "mimic.task_loss")
        if "net" in self.root.value and bool(lessons) != (self.runner == "kd"):
            self.say(DEFECT, "mimic", "UP distils only with runtime.runner.type kd and a mimic")
        for i, (key, job) in enumerate(lessons.items(), 1):
            self.add("teacher_model", nets.pop(key, ""), f"{key}[0].type")
            self.lesson(key, job, f"teacher{i}:" if len(lessons) > 1 else "")
        for key in nets:
            self.say(MISSING, key, "no mimic in this text learns from it; left out")
        if not all(self.values.get("teacher_model", [])):
            self.leave("teacher_model", MISSING, "a network that is not in this text; say timm's")

    def teacher(self, node: _Node) -> str:
        """timm's name of a teacher's network."""
        found: dict[str, Any] = {}

        def take(option: str, value: Any, where: str, why: str = "") -> None:
            found[option] = value
            self.say(TAKEN, where, f"the teacher's {option} {_short(value)}")

        self.net(node, take)
        model = found.get("model", "")
        flags = [flag for flag in ("deep_stem", "avg_down") if found.get(flag)]
        if len(flags) == 1:
            self.say(MISSING, node.where, f"timm has no {model} with {flags[0]} alone")
        return f"{model}d" if len(flags) == 2 and model in RESNETS else model

    def lesson(self, key: str, job: _Node, of: str) -> None:
        """What is learnt from one teacher, which `of` names where there are several."""
        at = functools.partial(self.where, job)
        for path in ("mimic_ins_type", f"{key}.teacher_bn_mode"):
            self.get(job, path, str)  # see facts in the tables
        if not (weights := self.get(job, f"{key}.teacher_weight", str)):
            text = "no teacher_weight: UP learns from random weights then, silently; name one"
            self.say(MISSING, f"{job.where}.{key}", text)
        self.add("teacher", weights or "name-the-teacher", at(f"{key}.teacher_weight"))
        start, where = self.get(job, "student.student_weight", str), at("student.student_weight")
        if start and "weights" in self.values:
            self.say(NOTHING, where, "saver.pretrain_model is what the student starts from")
        elif start:
            self.take("weights", start, where)
        kind, kwargs, where, scale = "l2", job, at("mimic_type"), 1.0
        if old := [k for k in ("mimic_name", "mimic_type") if self.get(job, k, str)]:
            text = f"UP's last version ignores {', '.join(old)} and student_weight; without cfgs it"
            self.say(DEFECT, job.where, f"{text} takes an L2 loss of normalised logits")
            kind = self.get(job, "mimic_type", str, "kl")
        slots = self.block(job, "cfgs")
        for name, other in slots.value.items():
            if name != "loss":
                self.note(DEFECT, other, "UP reads the slot `loss` alone, L2 without it; so here")
        if slots.value:
            slot = self.block(slots, "loss")
            kind, kwargs = self.get(slot, "type", str, "l2"), self.block(slot, "kwargs")
            where, scale = self.where(slot, "type"), self.get(kwargs, "loss_weight", float, 1.0)
        loss = self.kd_loss(kind, kwargs, where)
        sides = [self.get(job, f"{side}.mimic_name", [str], []) for side in ("student", key)]
        if not sides[0] or len(sides[0]) != len(sides[1]):
            text = f"{len(sides[0])} modules of the student, {len(sides[1])} of {key}"
            raise _fault(job.line, f"{text}; wanted pairs")
        scale *= self.get(job, "loss_weight", float, 1.0) / len(sides[0])
        ours = {"head.classifier": "logits"}
        for pair in zip(*sides, strict=True):
            a, b = (ours.get(name, name.removeprefix("backbone.")) for name in pair)
            one = loss if a == "logits" or loss.startswith("l2") else "l2_normalized"
            if one != loss:
                self.say(MISSING, where, f"{loss} compares logits; {one} is taken for {a}")
            text = "logits" if {a, b, of} == {"logits", ""} else f"{a} -> {of}{b}"
            self.add("distill_pairs", text, at("student.mimic_name"))
            self.add("kd_loss", one, where)
            self.add("kd_weight", scale, at("loss_weight"))
        climb, where = max(0, self.get(job, "warm_up_iters", int, 0)), at("warm_up_iters")
        if climb and not self.steps:
            self.say(MISSING, where, "no batch size in this text; say kd_warmup_epochs")
        else:
            self.share("kd_warmup_epochs", climb / self.steps if climb else 0.0, where)

    def add(self, option: str, value: Any, where: str) -> None:
        """Takes one more entry of a list, beside the place of the first."""
        first = self.origin.get(option)
        self.take(option, [*self.values.get(option, []), value], first.where if first else where)

    def share(self, option: str, value: Any, where: str) -> None:
        """Takes an option that all mimics share; another value of it is told."""
        if self.values.get(option, value) == value:
            self.take(option, value, where)
        else:
            self.say(MISSING, where, f"{value:g}; all share {option} {self.values[option]:g}")

    def kd_loss(self, kind: str, kwargs: _Node, where: str) -> str:
        """Our name of a mimic loss, and its temperature."""
        self.get(kwargs, "norm", str)
        loss = _LOSSES.get(kind.removesuffix("_loss"))
        if loss is None:
            near = _near(kind, (f"{name}_loss" for name in _LOSSES))
            self.say(MISSING, where, f"no counterpart of {kind}; kl is taken{near}")
        if loss in (None, *losses_with_temperature):
            heat = self.get(kwargs, "T", float, 1.0, least=1e-9)
            self.share("temperature", heat, f"{kwargs.where}.T")
        if loss == "l2_normalized":
            norm, mean = (self.get(kwargs, key, bool, True) for key in ("feat_norm", "batch_mean"))
            loss = loss if norm else "l2"
            if norm != mean:
                text = ("images, not elements: multiply", "elements, not images: divide")[norm]
                text = f"UP divides by {text} kd_weight by the elements of an image"
                self.say(MISSING, f"{kwargs.where}.batch_mean", text)
        return loss or "kl"

    def deployment(self) -> dict[str, Any] | None:
        if "to_kestrel" not in self.root.value:
            return None
        at = self.block(self.root, "to_kestrel")
        found = {k: v for k, kind in _KESTREL.items() if (v := self.get(at, k, kind)) is not None}
        say = lambda key, text: self.say(DEFECT, f"to_kestrel.{key}", text)
        if found.get("toks_type") != "cls":
            say("toks_type", "only cls packs a classifier")
        if "plugin" not in found:
            say("plugin", "missing; UP needs classifier")
        if found.get("add_softmax"):
            say("add_softmax", "the exported scores are a softmax already: it is applied twice")
        if not found.get("is_rgb", True):
            say("is_rgb", "false, but training reads RGB")
        for key, option in (("pixel_means", "mean"), ("pixel_stds", "std")):
            ours = [round(255 * x, 3) for x in self.values.get(option, [])]
            theirs = found.get(key, [0, 0, 0])
            if len(theirs) != 3:
                raise _fault(at.line, f"to_kestrel.{key} is {theirs}; wanted three numbers")
            if key in found and any(abs(a - b) > 0.5 for a, b in zip(theirs, ours, strict=False)):
                say(key, f"{theirs}, but training has {ours}")
        return found
