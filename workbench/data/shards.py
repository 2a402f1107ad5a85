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
from workbench.data.archives import SPLITS, is_hidden, is_image
from workbench.data.dataset import DataError, text_digest
from workbench.data.verify import counter

_META = b"workbench.index"
_KEY = re.compile(r"(.*/)?[^./]*", re.DOTALL)  # of a sample, to the first dot of the base name
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
    Path(out).parent.mkdir(parents=True, exist_ok=True)
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
    labels, classes, around = _numbered(table["label"].combine_chunks())
    meta = json.dumps({"classes": classes, "around": around, "shards": shards})
    table = table.set_column(1, "label", labels).replace_schema_metadata({_META: meta})
    with pa.ipc.new_file(temporary := f"{out}.{os.getpid()}", table.schema) as file:
        file.write_table(table)
    os.replace(temporary, out)
    number = counted(pc.count_distinct(labels).as_py(), "class")
    return f"{out}: {counted(len(table), 'image')} of {number} in {counted(len(urls), 'shard')}"


def _expand(source: str) -> list[str]:
    """The shards that a path or URL with a range or wildcards names. Raises DataError."""
    if os.path.exists(source):
        return [os.path.abspath(source)]
    if part := re.search(r"\{(\d+)\.\.(\d+)\}", source):
        if not (numbers := range(int(part[1]), int(part[2]) + 1)):
            raise DataError(f"{source!r}: {part[0]} is empty; write the smaller number first")
        names = (source.replace(part[0], f"{i:0{len(part[1])}d}", 1) for i in numbers)
        return [url for name in names for url in _expand(name)]
    if "**" in source:
        raise DataError(f"{source!r}: ** is not supported; write one * for every folder")
    source = source if "://" in source else os.path.abspath(source)
    if not re.search(r"[*?\[]", source):
        return [source]
    folder = re.split(r"[*?\[]", source)[0].rpartition("/")[0]
    [below] = shard_store.each("below", [f"{folder}/"]) if "://" in source else [[]]
    found = [u for u in below if u.count("/") == source.count("/") and fnmatchcase(u, source)]
    found = [source] if source in below else found or glob.glob(source)
    if not found:
        raise DataError(f"no shard has the name {source!r}")
    return sorted(found)


def _samples(url: str, files: list[tuple[str, int, int, bytes]]) -> pa.Table:
    """file, label and path of the images in a shard; a label that is a folder ends in a slash."""
    place = lambda name, start, size: f"{url}::{start}+{size}:{name}"
    found, others, given = [], [], {}
    for name, start, size, content in files:
        name = normalize("NFC", name.removeprefix("./"))
        if not any(map(is_hidden, name.split("/"))):
            stem, end = os.path.splitext(name)
            (found if end.lower() in images.SUFFIXES else others).append((name, start, size))
            if (end := end[1:].lower()) in shard_store.LABELS:
                given.setdefault(stem, {})[end] = content
    stems = {os.path.splitext(name)[0] for name, *_ in found}
    if any("cls" in ends or stem in stems for stem, ends in given.items()):
        labels = _labels(url, [name for name, *_ in found], given)
    else:  # images without a suffix are found by content, as in folders
        others = [file for file in others if "/" in file[0]]
        asked = [(url, *file[1:], None) for file in others if "://" in url]
        read = shard_store.each("read", asked) if asked else [None] * len(others)
        found += [f for f, c in zip(others, read, strict=True) if is_image(f[0], place(*f), c)]
        found.sort(key=lambda file: file[1])
        labels = {n: "".join(n.rpartition("/")[:2]) or _label(url, n, {}) for n, *_ in found}
    if not labels:
        raise DataError(f"shard {url} has no images; leave it out")
    rows = [(file[0], labels[file[0]], place(*file)) for file in found if file[0] in labels]
    columns = [pa.array(column, pa.large_string()) for column in zip(*rows, strict=True)]
    return pa.table(columns, ["file", "label", "path"])


def _labels(url: str, found: list[str], given: dict[str, dict[str, bytes]]) -> dict[str, str]:
    """The labels of samples by image. A key ends at the first dot, so that KEY.mask.png is none."""
    keys = {name: _KEY.match(name)[0] for name in found}
    samples: dict[str, str] = {}
    for name, key in keys.items():
        if os.path.splitext(name)[0] == key and (other := samples.setdefault(key, name)) != name:
            text = f"{other!r} and {name!r} have one key; a sample has one image, and its own key"
            raise DataError(f"shard {url}: {text}")
    labels = {name: _label(url, name, given.pop(key, {})) for key, name in samples.items()}
    for name, key in keys.items():
        if key not in samples or os.path.splitext(name)[0] in given:
            raise DataError(f"shard {url}: {name!r} has a key that ends at its first dot; keep one")
    if lost := [stem for stem in given if _KEY.match(stem)[0] not in samples]:
        raise DataError(f"shard {url}: {min(lost)!r} has a label and no image; pack it again")
    return labels


def _label(url: str, image: str, given: dict[str, bytes]) -> str:
    """The label of a sample as text: .cls, else cls or label of .json, else .txt."""
    try:
        texts = {end: given[end].decode("utf-8-sig") for end in given if end != "json"}
        entry = json.loads(given.get("json", "0"))
        entry = entry if isinstance(entry, dict) else {}
        order = (texts, "cls"), (entry, "cls"), (entry, "label"), (texts, "txt")
        value = next((some[key] for some, key in order if key in some), None)
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        label = normalize("NFC", str(value).strip()) if isinstance(value, int | str) else ""
        label.encode()  # half of a surrogate pair has no bytes
    except (ValueError, RecursionError) as error:
        value, label = error, ""
    if not label:
        raise DataError(f"shard {url}: {image!r} has no label ({value!r:.80}); add .cls or .txt")
    return label


def _numbered(labels: pa.Array) -> tuple[pa.Array, list[str] | None, list[str]]:
    """Labels in the smallest type, class names (None for numbers), and folders around all."""
    coded = labels.dictionary_encode()
    texts, classes, depth = coded.dictionary.to_pylist(), None, 0
    parts = [text.split("/") for text in texts]
    folders = [text for text in texts if text.endswith("/")]
    if folders and len(folders) < len(texts):
        raise DataError("some shards have class folders, and others label files; use one of both")
    if folders:
        while min(map(len, parts)) > depth + 2 and len({p[depth] for p in parts}) == 1:
            depth += 1
        texts = [part[depth] for part in parts]
        if len(splits := sorted({t for t in texts if t.lower() in SPLITS})) > 1:
            raise DataError(f"folders {splits} are splits, not classes; pack and index each alone")
    names = [text for text in texts if folders or not re.fullmatch(r"\d{1,9}", text)]
    if names and len(names) < len(texts):
        raise DataError(f"label {names[0]!r} is no number, and others are; write all as names")
    if names:
        classes = sorted({*texts})
        texts = [*map({name: i for i, name in enumerate(classes)}.get, texts)]
    numbers = np.array(texts).astype(np.int64)
    numbers = numbers.astype(np.min_scalar_type(-numbers.max() - 1))  # signed
    return pa.array(numbers[coded.indices.to_numpy()]), classes, parts[0][:depth]


def open_index(path: Path, classes: list[str] | None) -> tuple[pd.DataFrame, list[str] | None]:
    """The rows of an index, mapped into memory, and the class names, None for numbers.

    With `classes` (those of training) names follow them. attrs["index"] has a digest. Raises
    DataError.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        digest = text_digest((about := table.schema.metadata[_META]).decode())
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        text = f"cannot be read ({error}); `workbench index SHARDS --out FILE` makes it"
        raise DataError(f"index {str(path)!r} {text}") from None
    frame, (names, *around, shards) = table.to_pandas(split_blocks=True), json.loads(about).values()
    if own := [folder for folder in sum(around, []) if folder in (classes or ())]:
        names, frame["label"] = own[:1], 0  # one class, and the folders in it are none
    if classes and names and names != classes:
        if extra := sorted({*names} - {*classes}):
            raise DataError(f"index {str(path)!r} has {extra[:8]}, not in training or class_names")
        frame["label"] = np.array([*map(classes.index, names)])[frame.label]
    _opened[digest] = {url: tuple(shard) for url, shard in shards.items()}
    shard_store.known.update(_opened[digest])
    # Zeros that nobody writes, and that pandas does not copy, take no memory.
    zeros = {"list": np.zeros(len(frame), np.int64), "outside": np.zeros(len(frame), bool)}
    frame = pd.DataFrame({**frame, **zeros}, copy=False)
    frame.attrs["index"] = digest
    return frame, names and (classes or names)


def versions(frame: pd.DataFrame) -> dict[str, shard_store.Shard]:
    """The shards of a frame from an index by path or URL; none of another frame."""
    return _opened[frame.attrs["index"]] if "index" in frame.attrs else {}


def version_digests(frames: Iterable[pd.DataFrame]) -> dict[str, str]:
    """For frames of an index in an object store a digest of its ETags, by one of its URLs."""
    found = {}
    for frame in frames:
        remote = sorted((u, version) for u, (_, version) in versions(frame).items() if "://" in u)
        if remote:
            urls, tags = (text_digest("\n".join(part))[:12] for part in zip(*remote, strict=True))
            found[urls] = tags
    return found


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
    return f"shard cache: {size / 1e9:.3g} GB of shards, at most {limit / 1e9:g} kept in {folder}"
