"""Images to predict: files, folders and lists."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from workbench import data

LISTS = (".txt", ".jsonl")


class PredictionError(RuntimeError):
    """A source, input or output cannot be used; the text says why and what to do."""


class Entry(NamedTuple):
    """An image of the inputs: name in the table, path, and why it cannot be read, or empty."""

    file: str
    path: str
    error: str = ""


def find_images(inputs: Sequence[str | Path]) -> list[Entry]:
    """The images of the inputs in their order; none is opened.

    An input is an image file, a folder (images as data.image_files finds them, sorted; other files
    are named on stderr), an index of shards (.arrow) or a list: .txt with a path on each line, a
    label after the last space is ignored, or .jsonl with {"filename": path}. Relative paths of a
    list start in its folder and may not leave it, absolute paths are allowed. Names are relative to
    one input; of several they begin with the folder as given. Raises PredictionError, DataError.
    """
    entries: list[Entry] = []
    paths = [data.on_disk(os.path.normpath(os.path.expanduser(given))) for given in inputs]
    if len({*paths}) < len(paths):
        raise PredictionError(f"an input is given twice in {paths}; leave one out")
    for path in paths:
        base = path if os.path.isdir(path) else os.path.dirname(path)
        if os.path.isdir(path):
            found = _read_folder(path)
        elif not os.path.exists(path):
            raise PredictionError(f"input {path!r} does not exist; give images, folders or lists")
        elif data.is_index(path):
            frame, _ = data.open_index(Path(path), None)
            found = [*map(Entry, frame.file, frame.path)]
        elif path.lower().endswith(LISTS):
            found = _read_list(path)
        else:
            found = [Entry(os.path.basename(path), path)]
        if len(inputs) > 1:  # join leaves absolute paths of lists unchanged
            found = [entry._replace(file=os.path.join(base, entry.file)) for entry in found]
        entries += found
    if not entries:
        raise PredictionError(f"no images in {[str(path) for path in inputs]}")
    return [entry._replace(file=printable(entry.file)) for entry in entries]


def printable(name: str) -> str:
    r"""A name as valid Unicode; invalid bytes become \xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_folder(root: str) -> list[Entry]:
    files, others = data.image_files(root, root)
    entries, skipped = [Entry(os.path.relpath(path, root), path) for path in files], []
    for name, reason in others:
        path = os.path.join(root, name)
        if reason.startswith("unreadable"):
            entries.append(Entry(name, path, reason))
        else:
            skipped.append((printable(path), reason))
    if skipped:
        print(data.describe_skipped(skipped), file=sys.stderr)
    return sorted(entries, key=lambda entry: entry.file.split(os.sep))


def _read_list(path: str) -> list[Entry]:
    root, entries, line = os.path.abspath(os.path.dirname(path)), [], ""
    is_json = path.lower().endswith(".jsonl")
    try:
        for line in Path(path).read_text(encoding="utf-8-sig").split("\n"):
            if not line.strip():
                continue
            file = json.loads(line)["filename"] if is_json else re.sub(r" [+-]?\d{1,9}$", "", line)
            full = data.on_disk(os.path.join(root, file))
            inside = os.path.abspath(full).startswith(os.path.join(root, ""))
            allowed = inside or os.path.isabs(file)
            error = "" if allowed else "outside: leaves the folder of its list"
            entries.append(Entry(file, full, error))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PredictionError(f"list {path!r}, line {line[:60]!r}: {error!r}; fix it") from None
    return entries
