"""An index of tar shards: WebDataset samples or class folders, read where they are.

`workbench index` writes it once. It is an uncompressed Arrow file, since Parquet cannot be mapped
into memory: file (the name in the shard), label, and path, the place that image_files describes.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from workbench import counted, shard_cache, shard_store
from workbench.data import images
from workbench.data.archives import is_hidden
from workbench.data.dataset import DataError, text_digest
from workbench.data.verify import counter

_META = b"workbench.index"
_opened: dict[str, dict[str, shard_store.Shard]] = {}  # by the digest of an index, its shards


def is_index(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".arrow"


def write_index(sources: Sequence[str], out: str | Path, *, progress: bool = True) -> str:
    """Lists the images of shards in a file; returns a sentence about them.

    A source is a path or URL, with wildcards or a range: s3://bucket/train/{00000..00099}.tar.
    Raises DataError, StoreError.
    """
    if not is_index(out):
        raise DataError(f"--out {str(out)!r}: an index is mapped into memory; name it NAME.arrow")
    urls = [url for source in sources for url in _expand(source)]
    shards, tables = {}, []
    with counter(len(urls), "listing shards", "shard", progress) as count:
        for start in range(0, len(urls), 64):
            some = urls[start : start + 64]
            for url, (shards[url], files) in zip(some, shard_store.each("list", some), strict=True):
                tables.append(_samples(url, files))
                count()
    table = pa.concat_tables(tables).combine_chunks()
    counts = pc.value_counts(table["file"])
    if len(counts) < len(table):
        name = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
        first, other, *_ = table.filter(pc.equal(table["file"], name))["path"].to_pylist()
        raise DataError(f"{name.as_py()!r} is there twice: {first}, {other}; a key stands for one")
    labels, classes = _numbered(table["label"].combine_chunks())
    meta = json.dumps({"classes": classes, "shards": shards})
    table = table.set_column(1, "label", labels).replace_schema_metadata({_META: meta})
    with pa.ipc.new_file(temporary := f"{out}.{os.getpid()}", table.schema) as file:
        file.write_table(table)
    os.replace(temporary, out)
    number = counted(pc.count_distinct(labels).as_py(), "class")
    return f"{out}: {counted(len(table), 'image')} of {number} in {counted(len(urls), 'shard')}"


def _expand(source: str) -> list[str]:
    """The shards that a path or URL with a range or wildcards names. Raises DataError."""
    if part := re.search(r"\{(\d+)\.\.(\d+)\}", source):
        numbers = range(int(part[1]), int(part[2]) + 1)
        names = (source.replace(part[0], f"{i:0{len(part[1])}d}", 1) for i in numbers)
        return [url for name in names for url in _expand(name)]
    source = source if "://" in source else os.path.abspath(source)
    if not re.search(r"[*?\[]", source):
        return [source]
    [below] = shard_store.each("below", [source]) if "://" in source else [[]]
    found = [url for url in below if fnmatchcase(url, source)] or glob.glob(source)
    if not found:
        raise DataError(f"no shard has the name {source!r}")
    return sorted(found)


def _samples(url: str, files: list[tuple[str, int, int, bytes]]) -> pa.Table:
    """file, label and path of the images in a shard; a label that is a folder ends in a slash."""
    files = [(normalize("NFC", f[0].removeprefix("./")), *f[1:]) for f in files]
    files = [file for file in files if not any(map(is_hidden, file[0].split("/")))]
    by_file = any(name.rpartition(".")[2] in shard_store.LABELS for name, *_ in files)
    found: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, dict[str, bytes]] = {}
    for name, start, size, content in files:
        # A sample's key ends at the first dot; in class folders every image is a sample.
        folder, _, base = name.rpartition("/")
        stem, _, end = base.partition(".") if by_file else (base, "", base.rpartition(".")[2])
        key = f"{folder}/{stem}"
        if end in shard_store.LABELS:
            labels.setdefault(key, {})[end] = content
        elif f".{end.lower()}" in images.SUFFIXES:
            if key in found:
                both = f"{found[key][0]!r} and {name!r} have one key"
                raise DataError(f"shard {url}: {both}; a sample has one image, and its own key")
            found[key] = name, start, size
    if not found:
        raise DataError(f"shard {url} has no images; leave it out")
    rows = []
    for key, (name, start, size) in found.items():
        label = _label(labels.pop(key, {})) if by_file else "".join(name.rpartition("/")[:2])
        if not label:
            text = f"{name!r} has no label; add .cls, .json or .txt, or use class folders"
            raise DataError(f"shard {url}: {text}")
        rows.append((name, label, f"{url}::{start}+{size}:{name}"))
    if labels:
        raise DataError(f"shard {url}: {min(labels)!r} has a label and no image; pack it again")
    columns = [pa.array(column, pa.large_string()) for column in zip(*rows, strict=True)]
    return pa.table(columns, ["file", "label", "path"])


def _label(given: dict[str, bytes]) -> str:
    """The label of a sample as text, "" without one: .cls, else cls or label of .json, else .txt"""
    try:
        entry = json.loads(given.get("json", b"{}"))
        found = [entry.get("cls"), entry.get("label")] if isinstance(entry, dict) else []
        found = [given.get("cls", b"").decode(), *found, given.get("txt", b"").decode()]
        texts = [normalize("NFC", str(t).strip()) for t in found if isinstance(t, int | str)]
        return next(filter(None, texts), "")
    except ValueError:  # no JSON, or no UTF-8
        return ""


def _numbered(labels: pa.Array) -> tuple[pa.Array, list[str] | None]:
    """Labels as numbers of the smallest type, and the class names, None where they were numbers."""
    coded = labels.dictionary_encode()
    texts, classes = coded.dictionary.to_pylist(), None
    are_folders = all(text.endswith("/") for text in texts)
    if are_folders:  # one around all others is no class
        while all(t.count("/") > 1 for t in texts) and len({t.split("/")[0] for t in texts}) == 1:
            texts = [text.partition("/")[2] for text in texts]
        texts = [text.partition("/")[0] for text in texts]
    names = [text for text in texts if are_folders or not re.fullmatch(r"\d{1,9}", text)]
    if names and len(names) < len(texts):
        raise DataError(f"label {names[0]!r} is no number, and others are; write all as names")
    if names:
        classes = sorted({*texts})
        texts = [*map({name: i for i, name in enumerate(classes)}.get, texts)]
    numbers = np.array(texts).astype(np.int64)
    numbers = numbers.astype(np.min_scalar_type(-numbers.max() - 1))  # signed
    return pa.array(numbers[coded.indices.to_numpy()]), classes


def open_index(path: Path, classes: list[str] | None) -> tuple[pd.DataFrame, list[str] | None]:
    """The rows of an index, mapped into memory, and the class names, None for numbers.

    With `classes` (those of training) labels follow them. attrs["index"] has a digest and the
    number of rows. Raises DataError.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        digest = text_digest((about := table.schema.metadata[_META]).decode())
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        text = f"cannot be read ({error}); `workbench index SHARDS --out FILE` makes it"
        raise DataError(f"index {str(path)!r} {text}") from None
    frame, (names, shards) = table.to_pandas(split_blocks=True), json.loads(about).values()
    if classes and names != classes:
        if extra := sorted({*(names or ["numbers"])} - {*classes}):
            raise DataError(f"index {str(path)!r} has classes {extra[:8]}, not in training")
        frame["label"] = np.array([*map(classes.index, names)])[frame.label]
    _opened[digest] = {url: tuple(shard) for url, shard in shards.items()}
    shard_store.known.update(_opened[digest])
    # Zeros that nobody writes, and that pandas does not copy, take no memory.
    zeros = {"list": np.zeros(len(frame), np.int64), "outside": np.zeros(len(frame), bool)}
    frame = pd.DataFrame({**frame, **zeros}, copy=False)
    frame.attrs["index"] = digest, len(frame)
    return frame, classes or names


def versions(frame: pd.DataFrame) -> dict[str, shard_store.Shard]:
    """The shards of a frame from an index by path or URL; none of another frame."""
    return _opened[frame.attrs["index"][0]] if "index" in frame.attrs else {}


def check_shards(frame: pd.DataFrame) -> None:
    """Raises StoreError where a shard of an index is missing or has changed since."""
    shards = versions(frame)
    for (url, shard), now in zip(shards.items(), shard_store.each("look", shards), strict=True):
        shard_store.compare(url, shard, now)


def open_cache(frames: Iterable[pd.DataFrame], folder: Path, limit: int) -> str:
    """Keeps images of these frames from object stores in a folder; returns a sentence about it.

    limit: bytes. Raises DataError where there are none, and StoreError; see shard_cache.opened.
    """
    listed = [one for frame in frames for one in versions(frame).items()]
    remote = {url: shard for url, shard in listed if "://" in url}
    if not remote:
        raise DataError("shard_cache_gb: no shard is in an object store; leave it out")
    shard_store.cache = shard_cache.opened(folder, limit, remote)
    size = sum(size for size, _ in remote.values())
    return f"shard cache: at most {limit / 1e9:g} of {size / 1e9:.3g} GB in {folder}"
