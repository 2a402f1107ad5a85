"""An index of tar shards: WebDataset samples or class folders, read where they are.

`workbench index` writes it once. It is an uncompressed Arrow file, since Parquet cannot be mapped
into memory: file (the name in the shard), label, and path, the place that image_files describes.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from workbench import counted, image_files, shard_store
from workbench.data import images
from workbench.data.archives import is_hidden
from workbench.data.dataset import DataError
from workbench.data.verify import counter

image_files.read_remote = lambda place: next(shard_store.read([place]))
_META, _AT_ONCE = b"workbench.index", 64  # shards


@dataclass(frozen=True)
class Index:
    """What an index says of its shards; frames have it in attrs["index"]."""

    digest: str  # of shards, names and labels
    rows: int
    shards: dict[str, shard_store.Shard]

    def __deepcopy__(self, memo: dict) -> "Index":  # pandas copies attrs at every step
        return self


def is_index(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".arrow"


def write_index(sources: Sequence[str], out: str | Path, *, progress: bool = True) -> str:
    """Lists the images of shards in a file; returns a sentence about them. Raises DataError.

    A source is a path or URL, with wildcards or a range: s3://bucket/train/{00000..00099}.tar.
    """
    if not is_index(out):
        raise DataError(f"--out {str(out)!r}: an index is mapped into memory; name it NAME.arrow")
    urls = [url for source in sources for url in _expand(source)]
    if twice := sorted({url for url in urls if urls.count(url) > 1} if len(urls) < 10**5 else ()):
        raise DataError(f"shard {twice[0]!r} is named twice")
    shards, tables, kinds = {}, [], set()
    with counter(len(urls), "listing shards", "shard", progress) as count:
        for start in range(0, len(urls), _AT_ONCE):
            some = urls[start : start + _AT_ONCE]
            for url, (shard, members) in zip(some, shard_store.members(some), strict=True):
                shards[url] = shard
                table, kind = _samples(url, members)
                tables.append(table)
                kinds.add(kind)
                count()
    if len(kinds) > 1:
        raise DataError("some shards have label files and others class folders; index one kind")
    table = pa.concat_tables(tables).combine_chunks()
    if len(once := pc.value_counts(table["file"])) < len(table):
        name = once.filter(pc.greater(once.field("counts"), 1))[0]["values"]
        both = table.filter(pc.equal(table["file"], name))["path"].to_pylist()
        raise DataError(f"{name.as_py()!r} is in the shards twice ({both[0]}, {both[1]}); keep one")
    labels, classes = _numbered(table["label"].combine_chunks(), kinds == {"folders"})
    table = table.set_column(1, "label", labels)
    digest = hashlib.sha256(json.dumps([shards, classes]).encode())
    for buffer in (b for n in ("file", "label") for b in table[n].chunk(0).buffers() if b):
        digest.update(buffer)
    meta = {"digest": digest.hexdigest(), "classes": classes, "shards": shards}
    table = table.replace_schema_metadata({_META: json.dumps(meta)})
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_file(temporary := f"{out}.{os.getpid()}", table.schema) as file:
        file.write_table(table)
    os.replace(temporary, out)
    what = [counted(len(table), "image"), counted(len(urls), "shard")]
    number = len(classes) if classes else pc.count_distinct(labels).as_py()
    return f"{out}: {what[0]} of {counted(number, 'class')} in {what[1]}"


def _expand(source: str) -> list[str]:
    """The shards that a path or URL with a range or wildcards names. Raises DataError."""
    if part := re.search(r"\{(\d+)\.\.(\d+)\}", source):
        width, (first, last) = len(part[1]), map(int, part.groups())
        between = [f"{i:0{width}d}" for i in range(first, last + 1)]
        return [url for n in between for url in _expand(source.replace(part[0], n, 1))]
    if not re.search(r"[*?\[]", source):
        return [source if shard_store.is_remote(source) else os.path.abspath(source)]
    if shard_store.is_remote(source):
        found = [url for url in shard_store.objects(source) if fnmatchcase(url, source)]
    else:
        found = glob.glob(os.path.abspath(source))
    if not found:
        raise DataError(f"no shard is named {source!r}")
    return sorted(found)


def _samples(url: str, members: shard_store.Members) -> tuple[pa.Table, str]:
    """file, label (text) and path of the images in a shard, and where the labels are from."""
    shown = [m for m in members if not any(map(is_hidden, m[0].removeprefix("./").split("/")))]
    ends = {name.rpartition("/")[2].partition(".")[2] for name, *_ in shown}
    by_file = bool(ends & {*shard_store.LABELS})
    found: dict[str, tuple] = {}
    labels: dict[str, dict[str, bytes]] = {}
    for name, start, size, content in shown:
        folder, _, base = name.rpartition("/")
        # A sample has one key, up to the first dot; in class folders every image is a sample.
        stem, _, end = base.partition(".") if by_file else (base, "", base.rpartition(".")[2])
        key = f"{folder}/{stem}"
        labels.setdefault(key, {})
        if end in shard_store.LABELS:
            labels[key][end] = content
        elif f".{end.lower()}" in images.SUFFIXES:
            if key in found:
                text = f"{found[key][0]!r} and {name!r} are one sample, or one name"
                raise DataError(f"shard {url}: {text}; a sample has one image and its own key")
            found[key] = normalize("NFC", name.removeprefix("./")), start, size
    if not found:
        raise DataError(f"shard {url} has no images; leave it out")
    if lost := sorted(key for key, given in labels.items() if given and key not in found):
        raise DataError(f"shard {url}: sample {lost[0]!r} has a label and no image; pack it again")
    rows = []
    for key, (name, start, size) in found.items():
        label = _label(labels[key]) if by_file else name.rpartition("/")[0]
        if not label:
            text = "pack KEY.cls, KEY.txt or KEY.json with it, or class folders"
            raise DataError(f"shard {url}: {name!r} has no label; {text}")
        rows.append((name, label, f"{url}::{start}+{size}:{name}"))
    columns = [pa.array(column, pa.large_string()) for column in zip(*rows, strict=True)]
    return pa.table(columns, ["file", "label", "path"]), "files" if by_file else "folders"


def _label(given: dict[str, bytes]) -> str:
    """The label of a sample as text, empty where there is none: .cls, then .json, then .txt."""
    text = given.get("cls", b"")
    if not text and "json" in given:
        try:
            entry = json.loads(given["json"])
            found = entry.get("cls", entry.get("label", ""))
            text = str(found).encode() if isinstance(found, int | str) else b""
        except (ValueError, AttributeError):
            text = b""
    try:
        return normalize("NFC", (text or given.get("txt", b"")).decode().strip())
    except UnicodeDecodeError:
        return ""


def _numbered(labels: pa.Array, folders: bool) -> tuple[pa.Array, list[str] | None]:
    """Class numbers in the smallest type, and the names; None where the labels are numbers."""
    coded = labels.dictionary_encode()
    texts, classes = coded.dictionary.to_pylist(), None
    if folders:  # one folder around all others is no class
        while len({t.partition("/")[0] for t in texts}) == 1 and all("/" in t for t in texts):
            texts = [text.partition("/")[2] for text in texts]
        texts = [text.partition("/")[0] for text in texts]
    are_numbers = [bool(re.fullmatch(r"\d{1,9}", text)) for text in texts]
    if folders or not any(are_numbers):
        classes = sorted(set(texts))
        place = {text: i for i, text in enumerate(classes)}
        numbers = np.array([place[text] for text in texts])
    elif not all(are_numbers):
        both = texts[are_numbers.index(True)], texts[are_numbers.index(False)]
        raise DataError(f"labels are numbers ({both[0]!r}) and names ({both[1]!r}); write one kind")
    else:
        numbers = np.array(texts).astype(np.int64)
    numbers = numbers.astype(np.min_scalar_type(-numbers.max() - 1))  # signed
    return pa.array(numbers[coded.indices.to_numpy()]), classes


def open_indexes(
    paths: Sequence[Path], classes: list[str] | None = None
) -> tuple[pd.DataFrame, list[str] | None]:
    """The rows of indexes, mapped into memory, and the class names, None for numbers.

    With `classes` (those of training) labels follow them. Raises DataError.
    """
    tables, digests, shards = [], [], {}
    for number, path in enumerate(paths):
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            meta = json.loads((table.schema.metadata or {})[_META])
        except (OSError, pa.ArrowException, KeyError) as error:
            text = str(error).partition("\n")[0] if not isinstance(error, KeyError) else "no index"
            text += "; make it with `workbench index SHARDS --out FILE`"
            raise DataError(f"index {str(path)!r} cannot be read: {text}") from None
        names = meta["classes"]
        known = classes if tables or classes else names
        if (names is None) != (known is None) or {*(names or ())} - {*(known or ())}:
            text = f"has {str(names)[:60]}, the other {str(known)[:60]}"
            raise DataError(f"index {str(path)!r} has other class names than training: {text}")
        frame = table.to_pandas(split_blocks=True)
        if names != known:
            frame["label"] = np.array([known.index(name) for name in names])[frame.label]
        classes = known
        listed = np.zeros(len(frame), np.int64)  # takes no memory while nothing is written
        if number:
            listed += number
        tables.append(frame.assign(list=listed, outside=np.zeros(len(frame), bool)))
        digests.append(meta["digest"])
        shards |= {url: shard_store.Shard(*shard) for url, shard in meta["shards"].items()}
    frame = tables[0] if len(tables) == 1 else pd.concat(tables, ignore_index=True)
    frame.attrs["index"] = Index(" ".join(digests), len(frame), shards)
    shard_store.known.update(shards)
    return frame, classes


def check_shards(frame: pd.DataFrame) -> None:
    """Raises StoreError where a shard of an index is missing or has changed since."""
    shards = frame.attrs["index"].shards
    for (url, shard), now in zip(shards.items(), shard_store.look(shards), strict=True):
        if shard != now:
            raise shard_store.changed(url, shard, now)
