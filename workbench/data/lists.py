"""List files: an image and its label a line, in either of United Perception's formats.

imagenet:   relative/path with spaces.jpg 17      split at the last space
custom_cls: {"filename": "a.jpg", "label": 17}    one JSON object a line
"""

import codecs
import json
import os
import re
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from workbench.data.archives import members
from workbench.data.dataset import DataError

_SCHEMA = pa.schema({"filename": pa.large_string(), "label": pa.int64()})
_LABEL = re.compile(r"[+-]?\d{1,9}")


def read_list(path: str | Path, root: str | Path, number: int = 0) -> pd.DataFrame:
    """The entries of one list file; the first line decides the format.

    Returns the columns of a Dataset. `path` is the file below root (an absolute file is unchanged),
    with accents as on the disk; `file` has them in NFC. Blank lines are ignored. Raises DataError
    that quotes the first five bad lines.
    """
    try:
        raw = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        raw.decode()
    except (OSError, UnicodeDecodeError) as error:
        text = "; an index is named NAME.arrow, a tar is for train_root or `workbench index`"
        text *= isinstance(error, UnicodeDecodeError)
        raise DataError(f"list {str(path)!r} cannot be read: {error}{text}") from None
    raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    is_json = raw.lstrip().startswith(b"{")
    files, labels = _fast_rows(raw, is_json) or _slow_rows(str(path), raw.decode(), is_json)
    return located(files, labels, root, number)


def located(files: pa.Array, labels: pa.Array, root: str | Path, number: int) -> pd.DataFrame:
    """The columns of a Dataset for files below a root, a folder or an archive."""
    accents = _has_accents(files)
    paths, outside = _locate(files, accents, str(root))
    frame = pa.table({"file": files, "label": labels, "path": paths}).to_pandas()
    frame.loc[accents, "file"] = [normalize("NFC", f) for f in frame.file[accents]]
    frame["list"], frame["outside"] = number, outside
    if Path(root).is_file():
        places = frame.file.map(members(root))
        frame["path"] = places.fillna(frame.path)
    return frame


def _fast_rows(raw: bytes, is_json: bool) -> tuple[pa.Array, pa.Array] | None:
    """Files and labels of a list by Arrow; None where any row is unusual or not allowed."""
    try:
        if is_json:
            options = pa.json.ParseOptions(_SCHEMA, unexpected_field_behavior="ignore")
            table = pa.json.read_json(pa.BufferReader(raw), parse_options=options)
            files, labels = (table[name].combine_chunks() for name in _SCHEMA.names)
            ends = raw.count(b"\n") - raw.endswith(b"\n"), raw.count(b"}\n{")
            usual = ends == (len(table) - 1,) * 2  # an object a line, and nothing else
        else:
            offsets = pa.array([0, len(raw)], pa.int64()).buffers()[1]
            text = pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(raw)])
            lines = pc.split_pattern(text, "\n").values
            lines = lines.filter(pc.not_equal(lines, ""))
            parts = pc.split_pattern(lines, " ", max_splits=1, reverse=True)
            files, labels = (pc.list_element(parts, i) for i in (0, 1))
            digits = pc.and_(pc.ascii_is_decimal(labels), pc.less(pc.binary_length(labels), 10))
            usual = pc.all(digits).as_py()
            labels = labels.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    blank = pc.or_(pc.utf8_is_space(files), pc.equal(files, ""))
    blank = pc.or_(blank, pc.match_substring(files, "\0"))
    valid = pc.and_not(pc.and_(pc.greater_equal(labels, 0), pc.less(labels, 10**9)), blank)
    return (files, labels) if usual and pc.all(valid, skip_nulls=False).as_py() else None


def _slow_rows(path: str, text: str, is_json: bool) -> tuple[pa.Array, pa.Array]:
    """Files and labels of any list, line by line. Raises DataError."""
    parse = _parse_custom_cls if is_json else _parse_imagenet
    rows, bad = [], []
    for n, line in enumerate(text.split("\n"), 1):
        try:
            rows += [parse(line)] if line.strip() else []
        except ValueError as error:
            bad.append(f"line {n}: {error}")
    if bad:
        more = f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(f"list {path!r}:\n  " + "\n  ".join(bad[:5]) + more)
    if not rows:
        raise DataError(f"list {path!r} is empty")
    files, labels = zip(*rows, strict=True)
    return pa.array(files, pa.large_string()), pa.array(labels, pa.int64())


def _parse_imagenet(line: str) -> tuple[str, int]:
    file, _, label = line.rpartition(" ")
    if not file.strip():
        raise ValueError(f"{line[:60]!r} is not `path label` with one space between, not a tab")
    if not _LABEL.fullmatch(label):
        raise ValueError(f"label {label[:60]!r} is no whole number in {line[:60]!r}")
    if "\0" in file:
        raise ValueError(f"a zero byte in {line[:60]!r}")
    return file, int(label)


def _parse_custom_cls(line: str) -> tuple[str, int]:
    try:
        entry = json.loads(line)
        file, label = entry["filename"], entry["label"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f'no JSON object {{"filename": ..., "label": ...}}: {error!r}') from None
    if isinstance(label, list):
        if len(label) != 1:
            raise ValueError(f"{len(label)} labels for one image; several heads are not supported")
        label = label[0]
    if isinstance(label, str) and _LABEL.fullmatch(label):
        label = int(label)
    if not isinstance(file, str) or not file or "\0" in file or not is_utf8(file):
        raise ValueError(f"filename {file!r} is no file name")
    if type(label) is not int or abs(label) > 10**9:
        raise ValueError(f"label {label!r} is no whole number")
    return file, label


def _has_accents(files: pa.Array) -> np.ndarray:
    """Which names have two forms; pyarrow before 26 decomposes for "NFC", so Python compares."""
    found = ~pc.string_is_ascii(files).to_numpy(zero_copy_only=False)
    names = files.filter(found).to_pylist()
    found[found] = [normalize("NFC", name) != normalize("NFD", name) for name in names]
    return found


def _locate(files: pa.Array, accents: np.ndarray, root: str) -> tuple[pa.Array, np.ndarray]:
    """The paths of a list's entries, and which of them are outside of its root."""
    join, end = (pa.scalar(part, pa.large_string()) for part in (os.path.join(root, ""), ""))
    absolute, inside = (
        pc.starts_with(files, start) for start in ("/", os.path.join(os.path.abspath(root), ""))
    )
    paths = pc.if_else(absolute, files, pc.binary_join_element_wise(join, files, end))
    # Entries with accents or dots, and absolute ones, are checked one by one.
    odd = pc.or_(accents, pc.and_not(absolute, inside))
    odd = pc.or_(odd, pc.or_(pc.ends_with(files, "."), pc.ends_with(files, "/")))
    odd = pc.or_(odd, pc.match_substring(files, ".."))
    found = [on_disk(os.path.join(root, file)) for file in files.filter(odd).to_pylist()]
    outside = odd.to_numpy(zero_copy_only=False)
    outside[outside] = [not is_inside(path, root) for path in found]
    return pc.replace_with_mask(paths, odd, pa.array(found, pa.large_string())), outside


def on_disk(path: str) -> str:
    """The path with composed or decomposed accents, whichever exists; else unchanged."""
    if path.isascii() or os.path.lexists(path):
        return path
    head, tail = os.path.split(path)
    head = on_disk(head) if tail else head
    forms = (os.path.join(head, normalize(form, tail)) for form in ("NFC", "NFD"))
    return next(filter(os.path.lexists, forms), path)


def is_inside(path: str, root: str) -> bool:
    """Whether a path is below a root by name; links are not followed."""
    return os.path.abspath(path).startswith(os.path.join(os.path.abspath(root), ""))


def is_utf8(path: str) -> bool:
    """Whether a name has no bytes that are not UTF-8, which Python escapes as surrogates."""
    return not re.search("[\ud800-\udfff]", path)
