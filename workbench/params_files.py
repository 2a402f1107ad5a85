"""Params files: flat YAML, read without surprises and written so that every reader agrees."""

import difflib
import functools
import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import yaml


def read(path: str | Path, text_options: Container[str] = ()) -> dict[str, Any]:
    """The flat mapping of a params file; numbers under `text_options` stay text (`name: 007`).

    Raises ValueError that names the line of a syntax error, a repeated key or an alias, or says
    what came instead of a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        siblings = [p.name for p in Path(path).parent.glob("*.y*ml")]
        near = difflib.get_close_matches(Path(path).name, siblings, n=1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"cannot be read: {error}{hint}") from None
    values = _parse(text, text_options)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"contains a {type(values).__name__}; write lines of `option: value`")
    return {str(key): value for key, value in values.items()}  # `on:` is a boolean in YAML 1.1


@functools.lru_cache(maxsize=4096)  # a comparison reads the recipe of each run several times
def parse_written(text: str) -> Any:
    """The cached content of a recipe.yaml, not to be changed. Raises ValueError."""
    # libyaml's parser where PyYAML has it: ten times as fast, as safe.
    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def parse_flow(text: str, *, as_text: bool) -> Any:
    """The list in `[a, b]` or the mapping in `{a: 1}`. Raises ValueError.

    With `as_text` numbers in it stay text.
    """
    return _parse(f"value: {text}", {"value"} if as_text else ())["value"]


def dump(value: Any) -> str:
    """A value as YAML on one line that YAML 1.1 and 1.2 read alike."""
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{dump(key)}: {dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        # JSON is YAML but for these control characters, which YAML takes escaped only.
        escape = lambda match: f"\\x{ord(match[0]):02x}"
        return re.sub("[\x7f-\x9f]", escape, json.dumps(value, ensure_ascii=False))
    return yaml.safe_dump(value).splitlines()[0]


def migrate(path: str | Path, renamed: dict[str, str], values: dict[str, str]) -> list[str]:
    """Renames options of a params file, and their values, keeping comments and order.

    A renamed option that is [] is left out: it is refused, and its default applies. Returns a
    sentence for each change; the file is written if there is one.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines(keepends=True)
    changes, key = [], ""
    for i, line in enumerate(lines):
        start = re.match(r"(\w+):", line)  # else a comment, or a further line of a value
        key = start[1] if start else key
        if key not in {*renamed, *renamed.values()} or line.lstrip().startswith("#"):
            continue
        text, hash_sign, comment = line.partition(" #")
        for old, new in values.items():
            text = re.sub(rf"\b{re.escape(old)}\b(?!_)", new, text)
        if start:
            text = renamed.get(key, key) + text[len(key) :]
        empty = start and re.search(r":\s*\[\s*\]\s*$", text)
        lines[i] = "" if empty else text + hash_sign + comment
        if lines[i] != line:
            now = "left out, the default applies" if empty else lines[i].strip()
            changes.append(f"line {i + 1}: {line.strip()} -> {now}")
    if changes:
        Path(path).write_text("".join(lines), encoding="utf-8")
    return changes


class _FlatLoader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases (no billion laughs), with an error on repeated keys."""

    text_options: Container[str] = ()
    # Dates stay text (`name: 2026-01-02`), as in papermill.
    yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in rules if tag != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: aliases are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = []
        for key_node, value in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} is repeated")
            keys.append(key)
            if key in self.text_options:
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    implicit = self.resolve(yaml.ScalarNode, one.value, (True, False))
                    if one.tag == implicit and implicit.endswith((":int", ":float", ":bool")):
                        one.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


def _parse(text: str, text_options: Container[str]) -> Any:
    """What YAML text contains. Raises ValueError."""
    try:
        loader = _FlatLoader(text)
        loader.text_options = text_options
        return loader.get_single_data()
    except Exception as error:  # PyYAML raises many types of them for invalid text
        raise ValueError(" ".join(str(error).split())) from None
