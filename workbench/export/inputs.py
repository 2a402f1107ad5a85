"""Images to predict: files, folders and lists."""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from workbench import data
from workbench.data import images

LISTS = (".txt", ".jsonl")


class PredictionError(RuntimeError):
    """A source, input or output cannot be used; the text says why and what to do."""


class Entry(NamedTuple):
    """An image of the inputs: name in the table, path, and why it cannot be read, or empty."""

    file: str
    path: str
    error: str = ""


def find_images(
    inputs: Sequence[str | Path], skipped: list[tuple[str, str]] | None = None
) -> list[Entry]:
    """The images of the inputs in their order; none is opened.

    An input is an image file, a folder (images as data.image_files finds them, sorted; other files
    are appended to `skipped` with the reason) or a list: .txt with a path on each line, a label
    after the last space is ignored, or .jsonl with {"filename": path}. Relative paths of a list
    start in its folder and may not leave it, absolute paths are allowed. Names are relative to a
    single input; with several inputs they begin with the folder as given. Raises PredictionError.
    """
    paths = [data.on_disk(os.path.normpath(os.path.expanduser(path))) for path in inputs]
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise PredictionError(f"input {twice[0]!r} is given twice; leave one out")
    entries: list[Entry] = []
    for path in paths:
        if os.path.isdir(path):
            found, base = _read_folder(path, [] if skipped is None else skipped), path
        elif not os.path.exists(path):
            raise PredictionError(f"input {path!r} does not exist; give images, folders or lists")
        elif path.lower().endswith(LISTS):
            found, base = _read_list(path), os.path.dirname(path)
        else:
            file = os.path.basename(path)
            found, base = [Entry(file, path)], os.path.dirname(path)
        if len(paths) > 1:  # join leaves absolute paths of lists unchanged
            found = [entry._replace(file=os.path.join(base, entry.file)) for entry in found]
        entries += found
    if not entries:
        given = ", ".join(map(repr, paths)) or "nothing"
        suffixes, lists = " ".join(sorted(images.SUFFIXES)), ", ".join(LISTS)
        raise PredictionError(
            f"no images in {given}; give images, folders with {suffixes}, or lists ({lists})"
        )
    return [
        Entry(printable(file), path, error or _irregular(path)) for file, path, error in entries
    ]


def printable(name: str) -> str:
    r"""A name as valid Unicode; invalid bytes become \xff."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair
        return name.encode("utf-8", "backslashreplace").decode()


def _irregular(path: str) -> str:
    """The error of an existing path that is not a regular file: opening a pipe would block."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""  # the reason follows when it is opened
    return "" if stat.S_ISREG(mode) else "unreadable: no regular file"


def _read_folder(root: str, skipped: list[tuple[str, str]]) -> list[Entry]:
    files, others = data.image_files(root, root)
    entries = [Entry(os.path.relpath(path, root), path) for path in files]
    for name, reason in others:
        path = os.path.join(root, name)
        if reason.startswith("unreadable"):
            entries.append(Entry(name, path, reason))
        else:
            skipped.append((printable(path), reason))
    return sorted(entries, key=lambda entry: entry.file.split(os.sep))


def _read_list(path: str) -> list[Entry]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PredictionError(f"list {path!r} cannot be read: {error}") from None
    is_json = path.lower().endswith(".jsonl")
    root, entries = os.path.abspath(os.path.dirname(path)), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            file = _parse(line.rstrip("\r"), is_json)
            if not file or "\0" in file:
                raise ValueError("no file name")
            os.fsencode(file)
        except (ValueError, RecursionError) as error:
            raise PredictionError(f"list {path!r}, line {number}: {error}; fix it") from None
        full = data.on_disk(os.path.join(root, file))
        inside = os.path.abspath(full).startswith(root.rstrip(os.sep) + os.sep)
        allowed = inside or os.path.isabs(file)
        error = "" if allowed else "outside: leaves the folder of its list"
        entries.append(Entry(file, full, error))
    return entries


def _parse(line: str, is_json: bool) -> str:
    if not is_json:
        return re.sub(r" [+-]?\d{1,9}$", "", line)
    entry = json.loads(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
        raise ValueError(f'expected {{"filename": "a.jpg"}}, not {line[:60]!r}')
    return entry["filename"]
