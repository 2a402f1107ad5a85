"""YAML text as nodes that know their path and line; only what a configuration needs is accepted."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

MAX_CHARS, MAX_NODES, MAX_DEPTH = 60_000, 3_000, 30
PREFIX = "tag:yaml.org,2002:"
NUMBERS = {PREFIX + tag for tag in ("int", "float", "bool", "null")}
TEXTS = {PREFIX + tag for tag in ("str", "timestamp", "value", "merge")}
BLOCKS = {PREFIX + "map", PREFIX + "seq"}


class UnitedPerceptionError(ValueError):
    """The text is not a configuration of United Perception; the message names the line."""


@dataclass(eq=False)
class Node:
    """A value of the file. An alias and its anchor are one node, with the path of the anchor."""

    value: Any  # a dict of nodes, a list of nodes, a scalar or an UnknownAlias
    where: str
    line: int
    read: bool = False
    noted: bool = False  # a note covers the node and everything in it

    def children(self) -> list["Node"]:
        values = self.value.values() if isinstance(self.value, dict) else self.value
        return list(values) if isinstance(self.value, dict | list) else []

    def walk(self) -> Iterator["Node"]:
        yield self
        for child in self.children():
            yield from child.walk()

    def plain(self) -> Any:
        """The value without nodes."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


class UnknownAlias(yaml.ScalarNode):
    """An alias whose anchor is not in the text; its value is the name."""


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def error_at(line: int, text: str) -> UnitedPerceptionError:
    return UnitedPerceptionError(f"line {line}: {text}")


def parse(text: str, aliases: dict[str, Node] | None = None) -> Node:
    """The root node of a YAML text; `aliases` are the nodes of aliases without an anchor.

    Raises UnitedPerceptionError if it is no configuration, RecursionError if nested too deeply.
    """
    if not isinstance(text, str) or len(text) > MAX_CHARS:
        raise UnitedPerceptionError(f"wanted YAML text of at most {MAX_CHARS:,} characters")
    try:
        root = _Composer(text).get_single_node()
    except UnitedPerceptionError:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise error_at(line, f"{error.character!r} is not allowed in a text file") from None
    except yaml.MarkedYAMLError as error:
        raise _explain(error, text.splitlines() or [""]) from None
    except (ValueError, LookupError) as error:  # PyYAML on invalid escapes
        raise UnitedPerceptionError(f"invalid YAML: {error}") from None
    if not isinstance(root, yaml.CollectionNode):
        came = short(root.value) if root else "nothing"
        raise UnitedPerceptionError(f"holds {came}; wanted blocks such as `trainer:` or `dataset:`")
    return _Builder(aliases or {}).node(root, "*" if aliases is None else "")


class _Composer(yaml.SafeLoader):
    """The safe loader with limits; an alias without anchor becomes an UnknownAlias."""

    count = depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and event.anchor not in self.anchors:
            self.get_event()
            return UnknownAlias("", event.anchor, event.start_mark, event.end_mark)
        self.count, self.depth = self.count + 1, self.depth + 1
        if self.count > MAX_NODES or self.depth > MAX_DEPTH:
            what = "nested more deeply" if self.depth > MAX_DEPTH else "more entries"
            raise error_at(event.start_mark.line + 1, f"{what} than a configuration")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Builder:
    """Turns PyYAML's nodes into Nodes and refuses what PyYAML accepts by mistake."""

    def __init__(self, aliases: dict[str, Node]):
        self.construct = yaml.constructor.SafeConstructor().construct_object
        self.aliases = aliases
        self.built: dict[int, Node | None] = {}  # by source; None while it is being built
        self.count = 0

    def node(self, source: yaml.Node, where: str) -> Node:
        line = source.start_mark.line + 1
        if isinstance(source, UnknownAlias):
            return self.aliases.get(source.value) or Node(source, where, line)
        if id(source) in self.built:
            if (node := self.built[id(source)]) is None:
                raise error_at(line, "an alias inside the block of its own anchor")
            self.count += sum(1 for _ in node.walk())
            return node
        self.built[id(source)] = None
        self.count += 1
        if self.count > MAX_NODES:
            raise error_at(line, "more entries than a configuration, with aliases written out")
        scalar = isinstance(source, yaml.ScalarNode)
        if source.tag not in (NUMBERS | TEXTS if scalar else BLOCKS):
            tag = short(source.tag.replace(PREFIX, "!!"))
            raise error_at(line, f"the tag {tag} is not supported; write out its value")
        if scalar:
            value = self.scalar(source, where)
        elif isinstance(source, yaml.MappingNode):
            value = self.mapping(source, where)
        else:
            value = [self.node(item, f"{where}[{i}]") for i, item in enumerate(source.value)]
        self.built[id(source)] = Node(value, where, line)
        return self.built[id(source)]

    def scalar(self, source: yaml.ScalarNode, where: str) -> Any:
        line, last = source.start_mark.line + 1, source.end_mark.line + 1
        if source.style not in ("|", ">") and last > line:
            text = f"the text {short(source.value)} spans lines {line} to {last}: close its quote, "
            text += "or comment out or delete the line that is no `key: value`"
            raise error_at(line if source.style else last, text)
        if source.tag in TEXTS:
            return source.value
        try:
            value = self.construct(source)
        except Exception:  # a number that Python cannot hold, a tag on the wrong value
            value = math.nan
        if value is not None and not abs(value) < 1e18:
            raise error_at(line, f"{where} is {short(source.value)}; wanted a number below 1e18")
        return value

    def mapping(self, source: yaml.MappingNode, where: str) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key, value in source.value:
            line = key.start_mark.line + 1
            if isinstance(key, UnknownAlias) or not isinstance(key, yaml.ScalarNode):
                raise error_at(line, "a key must be a plain name")
            self.node(key, where)  # checks its tag
            name = key.value if re.fullmatch(r"[\w@ -]{1,60}", key.value) else short(key.value)
            if name in own:
                raise error_at(line, f"{name!r} appears twice in {where or 'the file'}; keep one")
            if re.match("over(write|ride)@?$", name):
                raise error_at(line, f"{name} is not supported; write its values into their blocks")
            path = f"{where}.{name}" if where.strip("*") else where + name
            child = self.node(value, where if key.tag == PREFIX + "merge" else path)
            if key.tag != PREFIX + "merge":
                own[name] = child
                continue
            for block in child.value if isinstance(child.value, list) else [child]:
                if not isinstance(block.value, dict):
                    raise error_at(line, "<< wants a mapping, such as `<<: *anchor`")
                merged = block.value | merged
        return merged | own


REPAIRS = {  # part of PyYAML's message: what to do
    "single document": "a second document begins; keep one",
    "\\t": "replace the tab by spaces",
    "quoted": "close the quote",
    "simple key": "this is no `key: value`; comment it out or delete it",
    "flow": "check its brackets and quotes",
    "block collection": "indent the lines of a `- name` entry by two spaces more",
    "mapping values": "this is no `key: value`; comment it out, or fix the indentation",
    "": "check indentation and quotes here and in the lines above",
}


def _explain(error: yaml.MarkedYAMLError, lines: list[str]) -> UnitedPerceptionError:
    """The line to change, and how, for an error of PyYAML."""
    message = f"{error.context} {error.problem}"
    repair = next(repair for words, repair in REPAIRS.items() if words in message)
    from_start = re.search("quoted|simple key|flow", message) and error.context_mark
    mark = from_start or error.problem_mark or error.context_mark
    line = min(mark.line, len(lines) - 1)
    if line and "mapping values" in message and ":" not in lines[line - 1]:
        line -= 1  # text that PyYAML joins with the next line
    return error_at(line + 1, f"{short(lines[line].strip())}: {error.problem}; {repair}")
