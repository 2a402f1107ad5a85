"""Lists of images -> one data frame -> batches that depend on the recipe and the step alone.

    data = load_dataset(recipe)           # .train, .val: frames of file, label, path; .classes
    for batch in train_loader(data.train, transform, seed=0, batch_size=256, steps=range(0, 1000)):
        batch.images                          # uint8 (batch, 3, size, size)

The order of an epoch is a function of (seed, epoch); what happens to image i in it, of (seed,
epoch, i), and of the copy where i comes several times. So batches are the same bytes for any number
of workers, and from any step on.
"""

import codecs
import contextlib
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from multiprocessing import queues
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from workbench import CACHE, ROOT
from workbench.data import images
from workbench.progress import bar
from workbench.schedule import steps_per_epoch

COLUMNS = ["file", "label", "path", "list"]  # list: the number of the list an entry came from


class DataError(ValueError):
    """Lists or folders cannot be used; the text names the lines or files and the way out."""


@dataclass(frozen=True)
class Dataset:
    """Both sides of a data set: frames with COLUMNS, and the class names by label, in NFC.

    skipped: (side, file, why) of what lies in the class folders and was passed over.
    """

    train: pd.DataFrame
    val: pd.DataFrame
    classes: list[str]
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """Training images of every class, 0 for a class without any."""
        return np.bincount(self.train.label, minlength=len(self.classes)).tolist()


# ---- lists


def load_dataset(recipe: Any, *, strict: bool = True) -> Dataset:
    """The lists a recipe names, cheap checks done: entries, labels, roots. Reads no image.

    Raises DataError; with `strict` off, entries outside their root or with a label out of range
    are let through, for `report` to name.
    """
    if recipe.dataset == "files":
        sources = _files_sources(recipe)
    else:
        root = {"digits": digits, "letters": letters}[recipe.dataset]()
        sources = {s: ([root / "meta" / f"{s}.txt"], [root / s]) for s in ("train", "val")}
        names = (root / "classes.txt").read_text(encoding="utf-8").split()
    frames, folders, passed = {}, None, []
    for side, (lists, roots) in sources.items():
        if lists:
            frames[side] = pd.concat(
                [
                    read_list(path, root, i)
                    for i, (path, root) in enumerate(zip(lists, roots, strict=True))
                ],
                ignore_index=True,
            )
        else:
            frames[side], folders, left = read_folders(roots, folders)
            passed += [(side, *entry) for entry in left]
    if recipe.dataset == "files":
        names = _class_names(recipe, folders)
    for side, (lists, _) in sources.items():
        if lists and names:
            _check_names(side, frames[side], names)
        elif not lists:  # labels follow the file of class names
            place = {name: i for i, name in enumerate(names)}
            frames[side]["label"] = np.array([place[f] for f in folders])[frames[side].label]
    if recipe.val_fraction:
        frames["train"], frames["val"] = stratified_split(frames["train"], recipe.val_fraction)
    if "val" not in frames:
        raise DataError("no validation images: name val_list or val_root, or set val_fraction")
    count = recipe.num_classes or (
        len(names) if names else int(max(f.label.max() for f in frames.values())) + 1
    )
    images = sum(map(len, frames.values()))
    if count > images and not (recipe.num_classes or names):
        top = max(frames.values(), key=lambda f: f.label.max())
        raise DataError(
            f"label {count - 1} of {top.file[top.label.idxmax()]!r} makes {count:,} classes of "
            f"{images:,} images; fix the list, or say num_classes if that is meant"
        )
    if count < 2:
        raise DataError(
            f"there is one class, {(names or ['0'])[0]!r}, and a classifier needs two or more; "
            "train_root is to hold a folder per class, a list labels from 0 on"
        )
    if names and len(names) != count:
        raise DataError(f"num_classes is {count} but there are {len(names)} class names")
    for side, frame in frames.items() if strict else ():
        _check_entries(side, frame, count, recipe.allow_outside_root)
    if recipe.train_fraction < 1:
        frames["train"] = subset(frames["train"], recipe.train_fraction)
    return Dataset(frames["train"], frames["val"], names or [str(i) for i in range(count)], passed)


def _files_sources(recipe: Any) -> dict[str, tuple[list[Path], list[Path]]]:
    sides = (recipe.train_list or recipe.train_root, recipe.val_list or recipe.val_root)
    if not recipe.data_dir and not all(Path(p).is_absolute() for side in sides for p in side):
        raise DataError("data_dir is missing; dataset: files needs the folder the images lie in")
    base = Path(on_disk(str(ROOT / Path(recipe.data_dir).expanduser())))
    if not base.is_dir():
        raise DataError(f"data_dir {str(base)!r} is no folder; set data_dir to where the data lie")
    sources = {}
    for side in ("train", "val"):
        found = lambda name: [Path(on_disk(str(base / p))) for p in getattr(recipe, name)]
        lists, roots = found(f"{side}_list"), found(f"{side}_root")
        if side == "val" and recipe.val_fraction:
            continue
        for root in roots:
            if not root.is_dir():
                have = sorted(p.name for p in base.iterdir() if p.is_dir())[:8]
                raise DataError(
                    f"{side}_root {str(root)!r} is no folder; data_dir holds {have}. Name the "
                    "folder; without validation images hold some out with val_fraction"
                )
        sources[side] = (lists, roots * len(lists) if len(roots) == 1 and lists else roots)
    return sources


def _class_names(recipe: Any, folders: list[str] | None) -> list[str] | None:
    if not recipe.class_names:
        return folders
    path = Path(on_disk(str(ROOT / Path(recipe.data_dir).expanduser() / recipe.class_names)))
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class_names {str(path)!r} cannot be read: {error}") from None
    names = [unicodedata.normalize("NFC", name.strip()) for name in names]
    while names and not names[-1]:
        names.pop()
    if "" in names:
        raise DataError(
            f"class_names {str(path)!r}: line {names.index('') + 1} is blank; remove it"
        )
    if folders is not None and sorted(names) != sorted(folders):
        raise DataError(f"class_names {str(path)!r} and the class folders differ; leave it out")
    return names


def _check_names(side: str, frame: pd.DataFrame, names: list[str]) -> None:
    """Raises DataError where a folder is named as a class, and most of it has another label."""
    some = frame.iloc[:: len(frame) // 100_000 + 1]
    classes = set(names)
    folder = lambda file: next((p for p in file.split("/")[-2::-1] if p in classes), None)
    folders = some.file.map(folder)  # the innermost that is named as a class
    known = folders.notna()
    pairs = pd.DataFrame({"folder": folders[known], "label": some.label[known]})
    for (folder, label), share in (
        pairs.groupby("folder").label.value_counts(normalize=True).items()
    ):
        if share > 0.5 and 0 <= label < len(names) and names[label] != folder:
            raise DataError(
                f"{side}: entries in folder {folder!r} have label {label}, and class {label} is "
                f"{names[label]!r}; put the class names in the order of the labels"
            )


def read_list(path: str | Path, root: str | Path, number: int = 0) -> pd.DataFrame:
    """The entries of one list file, in either of UP's formats, told apart by the first line.

    imagenet:   relative/path with spaces.jpg 17      split at the last space
    custom_cls: {"filename": "a.jpg", "label": 17}    one JSON object a line

    Returns COLUMNS; `path` is file below root (an absolute file stays as it is), with accents as
    on the disk, `file` has them in NFC. Blank lines are passed over. Raises DataError that quotes
    the first bad lines and counts the rest.
    """
    try:
        raw = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
        if not raw.isascii():
            raw.decode()  # or it is no UTF-8
    except FileNotFoundError:
        raise DataError(f"list {str(path)!r} is not there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"list {str(path)!r} cannot be read: {error}") from None
    if b"\r" in raw:
        raw = raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    is_json = raw.lstrip().startswith(b"{")
    files, labels = _plain_rows(raw, is_json) or _rows(str(path), raw.decode(), is_json)
    del raw
    paths, outside = _placed(files, str(root))
    columns = {"file": pc.utf8_normalize(files, form="NFC"), "label": labels, "path": paths}
    frame = pa.table(columns).to_pandas()
    frame["list"], frame["outside"] = number, outside
    return frame


_ROW = pa.schema({"filename": pa.large_string(), "label": pa.int64()})


def _plain_rows(raw: bytes, is_json: bool) -> tuple[Any, Any] | None:
    """Files and labels of a list, fast; None where a row is unusual or not allowed."""
    try:
        if is_json:
            options = pa.json.ParseOptions(_ROW, unexpected_field_behavior="ignore")
            table = pa.json.read_json(pa.BufferReader(raw), parse_options=options)
            files, labels = (table[name].combine_chunks() for name in _ROW.names)
            ends = raw.count(b"\n") - raw.endswith(b"\n"), raw.count(b"}\n{")
            plain = ends == (len(table) - 1,) * 2  # an object a line, and nothing else
        else:
            offsets = pa.array([0, len(raw)], pa.int64()).buffers()[1]
            text = pa.Array.from_buffers(pa.large_string(), 1, [None, offsets, pa.py_buffer(raw)])
            lines = pc.split_pattern(text, "\n").values
            lines = lines.filter(pc.not_equal(lines, ""))
            parts = pc.split_pattern(lines, " ", max_splits=1, reverse=True)
            files, labels = (pc.list_element(parts, i) for i in (0, 1))
            digits = pc.and_(pc.ascii_is_decimal(labels), pc.less(pc.binary_length(labels), 10))
            plain = b"\0" not in raw and pc.all(digits).as_py()
            labels = labels.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    blank = pc.or_(pc.utf8_is_space(files), pc.equal(files, ""))
    blank = pc.or_(blank, pc.match_substring(files, "\0")) if is_json else blank
    allowed = pc.and_not(pc.and_(pc.greater_equal(labels, 0), pc.less(labels, 10**9)), blank)
    return (files, labels) if plain and pc.all(allowed, skip_nulls=False).as_py() else None


def _rows(path: str, text: str, is_json: bool) -> tuple[Any, Any]:
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


def _placed(files: Any, root: str) -> tuple[Any, np.ndarray]:
    """Where the entries of a list lie, and which of them outside its root."""
    join, end = (pa.scalar(part, pa.large_string()) for part in (os.path.join(root, ""), ""))
    whole, inside = (
        pc.starts_with(files, p) for p in ("/", os.path.join(os.path.abspath(root), ""))
    )
    paths = pc.if_else(whole, files, pc.binary_join_element_wise(join, files, end))
    accents = pc.not_equal(*(pc.utf8_normalize(files, form=form) for form in ("NFC", "NFD")))
    # The text of most entries shows where they lie; the others are looked at one by one.
    odd = pc.or_(accents, pc.and_not(whole, inside))
    odd = pc.or_(odd, pc.or_(pc.ends_with(files, "."), pc.ends_with(files, "/")))
    if b".." in files.buffers()[2].to_pybytes():  # cheaper than a look at each, which few need
        odd = pc.or_(odd, pc.match_substring(files, ".."))
    found = [on_disk(os.path.join(root, file)) for file in files.filter(odd).to_pylist()]
    outside = odd.to_numpy(zero_copy_only=False)
    outside[outside] = [not _inside(path, root) for path in found]
    return pc.replace_with_mask(paths, odd, pa.array(found, pa.large_string())), outside


def on_disk(path: str) -> str:
    """The path with composed or decomposed accents, whichever is there; else unchanged."""
    if path.isascii() or os.path.lexists(path):
        return path
    head, tail = os.path.split(path)
    head = on_disk(head) if tail else head
    forms = (os.path.join(head, unicodedata.normalize(form, tail)) for form in ("NFC", "NFD"))
    return next(filter(os.path.lexists, forms), path)


def _parse_imagenet(line: str) -> tuple[str, int]:
    file, _, label = line.rpartition(" ")
    if not file.strip():
        if "\t" in line:
            raise ValueError(f"a tab in {_short(line)}; path and label are parted by one space")
        raise ValueError(f"{_short(line)} is not `path label`")
    if not re.fullmatch(r"[+-]?\d{1,9}", label):
        raise ValueError(f"label {_short(label)} is no whole number in {_short(line)}")
    if "\0" in file:
        raise ValueError(f"a zero byte in {_short(line)}")
    return file, int(label)


def _parse_custom_cls(line: str) -> tuple[str, int]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON object: {error}") from None
    if not isinstance(entry, dict) or "filename" not in entry or "label" not in entry:
        raise ValueError(f'wanted {{"filename": ..., "label": ...}}, came {_short(line)}')
    file, label = entry["filename"], entry["label"]
    if isinstance(label, list):
        if len(label) != 1:
            raise ValueError(f"{len(label)} labels for one image; several heads are not supported")
        label = label[0]
    if isinstance(label, str) and re.fullmatch(r"[+-]?\d{1,9}", label):
        label = int(label)
    if not isinstance(file, str) or not file or "\0" in file or not _is_text(file):
        raise ValueError(f"filename {file!r} is no file name")
    if isinstance(label, bool) or not isinstance(label, int) or abs(label) > 10**9:
        raise ValueError(f"label {label!r} is no whole number")
    return file, label


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _inside(path: str, root: str) -> bool:
    """Judged by name: a link inside the root is the owner's own arrangement."""
    root = os.path.abspath(root)
    return os.path.abspath(path).startswith(root if root.endswith(os.sep) else root + os.sep)


_JUNK = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"}
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def read_folders(
    roots: Sequence[str | Path], classes: list[str] | None = None
) -> tuple[pd.DataFrame, list[str], list[tuple[str, str]]]:
    """Images in class folders (root/<class>/**), the class names, sorted, and what is passed over.

    With `classes` given (those of the training side) labels follow them; another folder name is an
    error. Which files are images `image_files` says.
    """
    found: list[tuple[str, str, str, int]] = []
    passed: list[tuple[str, str]] = []
    names, seen = set(), set()
    for number, root in enumerate(map(str, roots)):
        top = os.path.realpath(root)
        for folder in sorted(os.listdir(root)):
            path, name = os.path.join(root, folder), unicodedata.normalize("NFC", folder)
            real = os.path.realpath(path)
            nested = _inside(real, top) or f"{top}/".startswith(f"{real}/")
            if why := _hidden(folder) or ("in no class folder" if not os.path.isdir(path) else ""):
                passed.append((folder, why))
            elif real in seen or os.path.islink(path) and nested:
                passed.append((folder, "a folder that is read already"))
            else:
                seen.add(real)
                names.add(name)
                files, left = image_files(path, root)
                passed += left
                found += [(_name(file, root), name, file, number) for file in files]
    names = sorted(names)
    if len(splits := [name for name in names if name.lower() in _SPLITS]) > 1:
        raise DataError(f"folders {splits} are splits, not classes; name them train_root, val_root")
    if not found:
        raise DataError(
            f"no images in class folders below {[str(r) for r in roots]}; wanted "
            "<root>/<class name>/<image>, or a list file in train_list and val_list"
        )
    if classes is not None:
        if extra := sorted(set(names) - set(classes)):
            raise DataError(f"class folders {extra[:8]} of validation are not in training")
        names = classes
    passed = [(name.encode("utf-8", "backslashreplace").decode(), why) for name, why in passed]
    label = {name: i for i, name in enumerate(names)}
    frame = pd.DataFrame(found, columns=["file", "class", "path", "list"])
    frame["label"] = frame.pop("class").map(label).astype(np.int64)
    frame["outside"] = False
    return frame[[*COLUMNS, "outside"]], names, passed


def image_files(top: str, root: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Paths of the images below a folder; what is passed over, named from `root`, and why.

    A file is an image by its suffix (images.SUFFIXES), or by its content where Pillow knows it.
    Hidden files are passed over, and links to folders, so that each folder is read once.
    """
    found: list[str] = []
    passed: list[tuple[str, str]] = []
    leave = lambda path, why: passed.append((os.path.relpath(path, root), why))
    closed = lambda error: leave(error.filename, f"unreadable: {error.strerror}")
    for folder, below, files in os.walk(top, onerror=closed):
        kept, folders = [], set(below)
        for path in (os.path.join(folder, name) for name in sorted(below + files)):
            name, suffix = os.path.basename(path), os.path.splitext(path)[1].lower()
            if why := _hidden(name):
                leave(path, why)
            elif name in folders:
                leave(path, "a link to a folder") if os.path.islink(path) else kept.append(name)
            elif suffix in images.SUFFIXES or _known(path):
                found.append(path)
            else:
                leave(path, "no image")
        below[:] = kept
    return found, passed


def _hidden(name: str) -> str:
    return "hidden" if name.startswith(".") or name.lower() in _JUNK else ""


def _name(path: str, root: str) -> str:
    """The entry of a file in a frame. Raises DataError."""
    if not _is_text(path):
        raise DataError(f"{os.fsencode(path)!r} is no UTF-8 file name; rename it")
    return unicodedata.normalize("NFC", os.path.relpath(path, root))


def _known(path: str) -> bool:
    """Whether Pillow can open a file, whatever its name."""
    try:
        with images.quiet(), Image.open(path if os.path.isfile(path) else ""):
            return True
    except Exception:  # damaged files make decoders raise nearly anything
        return False


def describe_skipped(passed: Sequence[tuple]) -> str:
    """A sentence that counts and names files passed over: tuples that end in file and why."""
    if not passed:
        return ""
    named = ", ".join(f"{file} ({why})" for *_, file, why in passed[:5])
    more = f" and {len(passed) - 5:,} more" if len(passed) > 5 else ""
    return f"{len(passed):,} files or folders passed over: {named}{more}"


def _is_text(path: str) -> bool:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def stratified_split(frame: pd.DataFrame, share: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frame without, and only with, a fixed share of every class (at least one image).

    Which images depends on their names alone, so a folder that grows keeps most of its split.
    """
    rank = frame.file.map(lambda f: hashlib.sha256(f.encode("utf-8", "surrogateescape")).digest())
    place = rank.groupby(frame.label).rank(method="first")
    size = frame.groupby("label").label.transform("size")
    held = place <= np.clip((size * share).round(), 1, np.maximum(1, size - 1))
    if single := sorted(set(frame.label[size < 2])):
        raise DataError(f"classes {single[:8]} have one image; val_fraction cannot split them")
    return frame[~held].reset_index(drop=True), frame[held].reset_index(drop=True)


def subset(frame: pd.DataFrame, fraction: float) -> pd.DataFrame:
    """A fixed share of the rows, in their order; a smaller share lies inside a larger one."""
    chosen = np.random.default_rng(0).permutation(len(frame))[
        : max(1, round(len(frame) * fraction))
    ]
    return frame.iloc[np.sort(chosen)].reset_index(drop=True)


def _check_entries(side: str, frame: pd.DataFrame, classes: int, allow_outside_root: bool) -> None:
    wrong = frame[(frame.label < 0) | (frame.label >= classes)]
    if len(wrong):
        raise DataError(
            f"{side}: {len(wrong)} labels outside 0 to {classes - 1}, first "
            f"{wrong.iloc[0].label} for {wrong.iloc[0].file!r}; labels count from 0"
        )
    out = frame[frame.outside]
    if len(out) and not allow_outside_root:
        raise DataError(
            f"{side}: {len(out)} entries lie outside their root, first {out.iloc[0].file!r}; "
            "fix the list, or set allow_outside_root: true if that is meant"
        )


# ---- examining images


STAT = ["size", "time", "changed"]  # of a file; archives restore its time, not its last change
FACTS = ["bytes", "width", "height", "digest", "problem", "detail"]


def verify_images(
    frame: pd.DataFrame, *, cache: bool = True, progress: bool = True
) -> pd.DataFrame:
    """Facts about every image, from reading it whole: the frame with FACTS added.

    problem is empty or one of images.REASONS; digest identifies the file's bytes. What was read
    once is remembered under the cache folder until a file's size or time changes.
    """
    stats = [_stat(path) for path in frame.path]
    store = CACHE / "facts" / (_hash("\n".join(sorted(set(frame.path))))[:24] + ".parquet")
    known: dict[str, tuple] = {}
    if cache and store.exists():
        try:
            rows = pd.read_parquet(store, columns=["path", *STAT, *FACTS])
            known = {r[0]: (tuple(r[1:4]), r[4:]) for r in rows.itertuples(index=False, name=None)}
        except Exception:  # a damaged cache costs time, nothing else
            known = {}
    # Only what was found sound is remembered: a broken file may be whole again at the next look.
    facts = [
        known[path][1] if stat and known.get(path, (None,))[0] == stat else None
        for path, stat in zip(frame.path, stats, strict=True)
    ]
    todo = [i for i, fact in enumerate(facts) if fact is None]
    paths = frame.path.tolist()
    shown = bar(len(todo), "reading images", "img") if progress and todo else _Unseen()
    try:
        with shown, images.quiet(), ThreadPoolExecutor(max(2, available_cpus())) as pool:
            for start in range(0, len(todo), 1000):  # few in flight, so an interrupt is heard
                chunk = todo[start : start + 1000]
                for i, fact in zip(chunk, pool.map(_facts, [paths[i] for i in chunk]), strict=True):
                    facts[i] = fact
                    shown.update()
    finally:
        if cache and todo:  # also what an interrupt leaves
            _remember(store, paths, stats, facts)
    return pd.concat([frame, pd.DataFrame(facts, columns=FACTS, index=frame.index)], axis=1)


class _Unseen(contextlib.nullcontext):
    def update(self) -> None:
        pass


def file_digest(path: str) -> str:
    """What identifies a file's bytes, as `digest` of an examined frame.

    Raises OSError, and ImageError for a pipe, which would be waited for.
    """
    with images.opened(path) as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def _facts(path: str) -> tuple:
    try:
        digest = file_digest(path)
        size = os.path.getsize(path)
    except images.ImageError as error:
        return 0, 0, 0, "", error.reason, error.detail
    except OSError as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        return 0, 0, 0, "", reason, error.strerror or str(error)
    try:
        image = images.open(path)
        image.pixels()
        return size, image.width, image.height, digest, "", ""
    except images.ImageError as error:
        return size, 0, 0, digest, error.reason, error.detail


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _remember(store: Path, paths: list[str], stats: list, facts: list) -> None:
    rows = {
        path: (path, *stat, *fact)
        for path, stat, fact in zip(paths, stats, facts, strict=True)
        if stat is not None and fact is not None and not fact[FACTS.index("problem")]
    }
    if not rows:
        return
    table = pd.DataFrame(rows.values(), columns=["path", *STAT, *FACTS])
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_suffix(f".{os.getpid()}")
        table.to_parquet(temporary, index=False)
        os.replace(temporary, store)
    except OSError:
        pass  # no room or no permission for a cache is no reason to stop


def drop_corrupt(frame: pd.DataFrame, side: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """An examined frame without the images that cannot be read, and those, for the quarantine.

    Raises DataError when none, or more than one in five, can be read: then the root is wrong.
    """
    bad = frame.problem != ""
    if bad.any() and (bad.mean() > 0.2):
        first = frame[bad].iloc[0]
        raise DataError(
            f"{side}: {bad.sum()} of {len(frame)} images cannot be read, first {first.path!r} "
            f"({first.problem}: {first.detail}); check data_dir and the roots, then run "
            "`workbench check-data` for the whole list"
        )
    out = frame[bad]
    quarantine = pd.DataFrame(
        {
            "side": side,
            "file": out.file,
            "label": out.label,
            "reason": out.problem,
            "detail": out.detail,
            "step": -1,
        }
    )
    return frame[~bad].reset_index(drop=True), quarantine


def report(data: Dataset, *, cache: bool = True, progress: bool = True) -> pd.DataFrame:
    """Everything `check-data` finds, a row each: finding, side, file, label, detail.

    Findings: images.REASONS, "label out of range", "outside root", "class without images",
    "passed over" (detail says why), "duplicate" (the same bytes twice on a side; detail says where,
    and whether labels differ) and "in train and validation". Empty when there is nothing to say.
    """
    rows: list[tuple[str, str, str, Any, str]] = []
    sides = {"train": data.train, "val": data.val}
    examined = {s: verify_images(f, cache=cache, progress=progress) for s, f in sides.items()}
    rows += [("passed over", side, file, -1, why) for side, file, why in data.skipped]
    for side, frame in examined.items():
        for r in frame[frame.problem != ""].itertuples():
            rows.append((r.problem, side, r.file, r.label, r.detail))
        for r in frame[frame.outside].itertuples():
            rows.append(("outside root", side, r.file, r.label, r.path))
        out = frame[(frame.label < 0) | (frame.label >= len(data.classes))]
        for r in out.itertuples():
            detail = f"there are {len(data.classes)} classes, counted from 0"
            rows.append(("label out of range", side, r.file, r.label, detail))
        for label in sorted(set(range(len(data.classes))) - set(frame.label)):
            name = data.classes[label]
            rows.append(("class without images", side, "", label, f"class {name!r}"))
        read = frame[frame.problem == ""]
        for _, group in read[read.digest.duplicated(keep=False)].groupby("digest", sort=False):
            first = group.iloc[0]
            for r in group.iloc[1:].itertuples():
                other = "" if r.label == first.label else f", labelled {first.label} there"
                rows.append(("duplicate", side, r.file, r.label, f"of {first.file}{other}"))
    train, val = (f[f.problem == ""] for f in examined.values())
    places = train.drop_duplicates("digest").set_index("digest")
    for r in val[val.digest.isin(places.index)].itertuples():
        there = places.loc[r.digest]
        other = "" if r.label == there.label else f", labelled {there.label} there"
        detail = f"in training as {there.file}{other}"
        rows.append(("in train and validation", "val", r.file, r.label, detail))
    return pd.DataFrame(rows, columns=["finding", "side", "file", "label", "detail"])


def check_data(recipe: Any, *, cache: bool = True, progress: bool = True) -> pd.DataFrame:
    """`report` for a recipe; entries that training would refuse are rows here, not errors."""
    return report(load_dataset(recipe, strict=False), cache=cache, progress=progress)


def fingerprint(data: Dataset) -> str:
    """Twelve hex digits over files, labels and (where examined) bytes of both sides."""
    parts = []
    for frame in (data.train, data.val):
        digest = frame.digest if "digest" in frame else [""] * len(frame)
        parts += map("|".join, zip(frame.file, frame.label.astype(str), digest, strict=True))
    return _hash("\n".join(parts))[:12]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# ---- random by construction

ORDER, DRAW, STEP, ERASE, MIX, BALANCE = range(6)  # what a stream is for; streams never overlap
COPIES = 2**16  # copies of an image in an epoch that have streams of their own


def rng_for(
    seed: int, purpose: int, epoch: int = 0, index: int = 0, copy: int = 0
) -> np.random.Generator:
    """The random numbers of one purpose, epoch, index and copy: a Philox counter block of its own.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The lowest counter word
    counts the numbers drawn; copies start 2^48 blocks apart in it.
    """
    counter = [copy << 48, index, epoch, purpose]
    return np.random.Generator(np.random.Philox(counter=counter, key=seed))


class Streams:
    """`rng_for` of one seed time and again, for a quarter of the time: each ends the one before."""

    def __init__(self, seed: int):
        self._bits = np.random.Philox(key=seed)
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def __call__(
        self, purpose: int, epoch: int = 0, index: int = 0, copy: int = 0
    ) -> np.random.Generator:
        self._state["state"]["counter"][:] = copy << 48, index, epoch, purpose
        self._bits.state = self._state
        return self._generator


def epoch_permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation (count,) of an epoch, a function of (seed, epoch) alone."""
    return rng_for(seed, ORDER, epoch).permutation(count)


def repeat(rows: np.ndarray, batch_size: int, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """As many rows, of which the first 1 / copies come `copies` times, and which copy each is.

    Hoffer et al., arXiv 1901.09335: the copies of an image meet in one batch, each with a draw
    of its own. They lie a `copies`-th of the batch apart, so that neighbours, which are mixed
    with each other, are different images.
    """
    size = max(1, batch_size // copies)
    chunks = [rows[i : i + size] for i in range(0, -(-len(rows) // copies), size)]
    number = [np.repeat(np.arange(copies), len(chunk)) for chunk in chunks]
    repeated = [np.tile(chunk, copies) for chunk in chunks]
    return np.concatenate(repeated)[: len(rows)], np.concatenate(number)[: len(rows)]


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """64 bits for what the model draws in one step (dropout, drop path)."""
    return int(rng_for(seed, STEP, step, rank).bit_generator.random_raw())


def apportion(shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Whole numbers (n,) with the sum of the shares, which is whole: each rounded down or up.

    Those with the largest remainders are rounded up; among equal ones the lot decides, so that
    none is favoured for ever.
    """
    whole = np.floor(shares).astype(np.int64)
    # Six digits: equal remainders stay equal however the machine rounds, and 2.9999999 is a 3.
    remainders = np.round(shares - whole, 6)
    up = np.lexsort((rng.random(len(shares)), -remainders))[: round(shares.sum()) - whole.sum()]
    whole[up] += 1
    return whole


@dataclass(frozen=True, eq=False)
class Sampler:
    """Which rows of a frame a step shows, over all processes; a function of (seed, step).

    An epoch has as many images as there are labels: each once while `class_balanced_sampling` is 0.
    Otherwise a class of n images gets a share proportional to n ** (1 - b), Kang et al.,
    arXiv 1910.09217: 0.5 is the square-root sampling of Mahajan et al., arXiv 1805.00932, and 1
    shows all classes equally often. Within a class the images come equally often, but for one
    more time of some, drawn again in every epoch. Under `repeated_aug`, which keeps a random part
    of the epoch, the shares hold on average.
    """

    labels: Any  # whole numbers (n,), an array or a column
    _: KW_ONLY
    seed: int
    batch_size: int
    drop_last: bool = False
    repeated_aug: int = 1
    class_balanced_sampling: float = 0.0
    _epochs: dict[int, tuple] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.class_balanced_sampling:
            return
        _, sizes, shares = self._classes
        times = np.ceil(np.ceil(np.round(shares, 6)) / sizes).astype(np.int64)
        if (times * self.repeated_aug > COPIES).any():
            i = times.argmax()
            turns = f" in {self.repeated_aug} copies" if self.repeated_aug > 1 else ""
            raise DataError(
                f"label {np.unique(self.labels)[i]} has {sizes[i]:,} of {sizes.sum():,} images; "
                f"class_balanced_sampling {self.class_balanced_sampling} shows each {times[i]:,} "
                f"times an epoch{turns}"
                f", {COPIES:,} in all is the most. Lower class_balanced_sampling, or leave out "
                "that label"
            )

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.labels), self.batch_size, self.drop_last)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the frame in a step, and which copy of its row each is; both read-only.

        A row and a copy come together once an epoch at most, so each has a draw of its own.
        """
        epoch, slot = divmod(step, self.steps_per_epoch)
        rows, copies = self._epoch(epoch)
        part = slice(slot * self.batch_size, (slot + 1) * self.batch_size)
        return rows[part], copies[part]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        # Two are kept: an order of millions is made once, and at a turn of epochs both are asked.
        if epoch not in self._epochs:
            shuffled = epoch_permutation(self.seed, epoch, len(self.labels))
            rows, copies = repeat(shuffled, self.batch_size, self.repeated_aug)
            if self.class_balanced_sampling:  # then it is the chosen that were shuffled
                chosen, before = self._balanced(epoch)
                rows, copies = chosen[rows], before[rows] * self.repeated_aug + copies
            rows.flags.writeable = copies.flags.writeable = False
            for old in list(self._epochs)[:-1]:
                del self._epochs[old]
            self._epochs[epoch] = rows, copies
        return self._epochs[epoch]

    @functools.cached_property
    def _classes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The class of every row, without gaps; of every class its images and share of N."""
        _, of_row, sizes = np.unique(self.labels, return_inverse=True, return_counts=True)
        weights = sizes ** (1.0 - self.class_balanced_sampling)
        return of_row, sizes, weights * (len(of_row) / weights.sum())

    def _balanced(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows (n,) of an epoch, class by class, and how often each of them came before."""
        of_row, sizes, shares = self._classes
        rng = rng_for(self.seed, BALANCE, epoch)
        quotas = apportion(shares, rng)
        rows = rng.permutation(len(of_row))
        rows = rows[np.argsort(of_row[rows], kind="stable")]  # by class, in it still at random
        more = _counted(sizes) < np.repeat(quotas % sizes, sizes)  # the first of every class
        times = np.repeat(quotas // sizes, sizes) + more
        return np.repeat(rows, times), _counted(times)


def _counted(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each size, one run after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


# ---- batches


class Batch(NamedTuple):
    """One process's part of one step."""

    images: torch.Tensor  # uint8 (n, 3, size, size), channels last in memory
    labels: torch.Tensor  # int64 (n,)
    indices: torch.Tensor  # int64 (n,), rows of the frame
    positions: torch.Tensor  # int64 (n,), where in the whole step each image stands
    step: int
    is_last: bool  # whether the process's part of the step ends here
    global_size: int  # images in the whole step, over all parts and processes
    failures: list[tuple[int, str, str]]  # (row, reason, detail) of images that were left out
    aug_params: list[dict] | None = None  # of each image, what the device is to do yet
    seconds: float = 0.0  # what it took to read and transform them, in the process that did


def own_places(total: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """The places in a step of `total` images that process `rank` of `world` takes.

    Every world-th pair of neighbours: pairs, which are mixed with each other, stay together.
    """
    places = np.arange(total)
    return places[places // 2 % world == rank]


def train_loader(
    frame: pd.DataFrame,
    transform: Any,
    *,
    seed: int,
    batch_size: int,
    steps: range,
    micro_batch_size: int | None = None,
    drop_last: bool = False,
    repeated_aug: int = 1,
    class_balanced_sampling: float = 0.0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    cached: Any = None,
) -> Iterator[Batch]:
    """Training batches of the steps asked for, in order; which images, `Sampler` says.

    `cached` is a cache.Cache of the frame in the form transform.resize; it changes no byte.

    `batch_size` counts over all processes; process `rank` of `world` gets every world-th pair of
    rows of a step, in parts of at most `micro_batch_size`. A process without a row in a small last
    batch gets a part of no images.
    """
    sampler = Sampler(
        frame.label.to_numpy(np.int64),
        seed=seed,
        batch_size=batch_size,
        drop_last=drop_last,
        repeated_aug=repeated_aug,
        class_balanced_sampling=class_balanced_sampling,
    )
    dataset = _Steps(frame, transform, cached, sampler, micro_batch_size, rank, world)
    return _loader(dataset, dataset.keys(steps), workers, pin_memory)


def eval_loader(
    frame: pd.DataFrame,
    transform: Any,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    cached: Any = None,
) -> Iterator[Batch]:
    """Every world-th row from `rank` on, in the order of the frame, none doubled or dropped.

    `cached` is a cache.Cache of the frame in the form of the transform; it changes no byte.
    """
    rows = np.arange(len(frame))[rank::world]
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return _loader(_Rows(frame, transform, cached), parts, workers, pin_memory)


class _Rows(TorchDataset):
    """Reads rows of a frame into a Batch. Held by every worker, so the paths are one array."""

    def __init__(self, frame: pd.DataFrame, transform: Any, cached: Any = None):
        self.paths = np.array([os.fsencode(path) for path in frame.path])
        self.labels = frame.label.to_numpy(np.int64)
        self.transform, self.cached = transform, cached

    def __getitem__(self, rows: np.ndarray) -> Batch:
        return self.read(rows, lambda i: None, np.arange(len(rows)), 0, True, len(rows))

    def pixels(self, row: int, rng: np.random.Generator | None) -> tuple[np.ndarray, dict | None]:
        """Of a row its pixels (size, size, 3), and what the device is to do with them."""
        if self.cached is not None:
            return self.cached.image(row).pixels(), None
        return self.transform(self.open(row), rng), None

    def open(self, row: int) -> Any:
        return images.open(os.fsdecode(self.paths[row]))

    def read(
        self,
        rows: np.ndarray,
        randomness: Callable[[int], np.random.Generator | None],
        places: np.ndarray,
        step: int,
        last: bool,
        total: int,
    ) -> Batch:
        """The rows that can be read; the transform of rows[i] draws from `randomness(i)`."""
        decoded, draws, kept, failures = [], [], [], []
        start = time.perf_counter()
        with images.quiet():
            for i, row in enumerate(rows.tolist()):
                try:
                    pixels, draw = self.pixels(row, randomness(i))
                except images.ImageError as error:
                    failures.append((row, error.reason, error.detail))
                    continue
                decoded.append(pixels)
                draws.append(draw)
                kept.append(i)
        if decoded:
            block = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
        else:
            block = torch.zeros(0, 3, self.transform.size, self.transform.size, dtype=torch.uint8)
        rows, places = rows[kept].astype(np.int64), places[kept].astype(np.int64)
        labels, indices, places = map(torch.from_numpy, (self.labels[rows], rows, places))
        seconds = time.perf_counter() - start
        draws = draws if self.transform.on_device else None
        return Batch(block, labels, indices, places, step, last, total, failures, draws, seconds)


class _Steps(_Rows):
    def __init__(self, frame, transform, cached, sampler, micro, rank, world):
        super().__init__(frame, transform, cached)
        self.sampler, self.micro, self.rank, self.world = sampler, micro, rank, world

    def pixels(self, row: int, rng: np.random.Generator | None) -> tuple[np.ndarray, dict | None]:
        image = self.open(row) if self.cached is None else self.cached.image(row)
        if not self.transform.on_device:
            return self.transform(image, rng), None
        image = self.transform.resize.image(image)
        draw = self.transform.sample_params(rng, image.width, image.height)
        return self.transform.crop(image, draw), draw

    def parts(self, step: int) -> list[np.ndarray]:
        """This process's places of a step, part by part."""
        own = own_places(len(self.sampler.rows(step)[0]), self.rank, self.world)
        size = self.micro or max(1, len(own))
        return [own[i : i + size] for i in range(0, len(own), size)] or [own]

    def keys(self, steps: range) -> "_Keys":
        # The number of parts follows from the size of the step alone, not from its order.
        return _Keys(self, steps)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        step, part = key
        parts, (rows, copies) = self.parts(step), self.sampler.rows(step)
        seed, epoch = self.sampler.seed, step // self.sampler.steps_per_epoch
        places = parts[part]
        own, own_copies = rows[places], copies[places]
        streams = Streams(seed)
        randomness = lambda i: streams(DRAW, epoch, int(own[i]), int(own_copies[i]))
        return self.read(own, randomness, places, step, part == len(parts) - 1, len(rows))


@dataclass
class _Keys:
    """(step, part) of everything to read; made one at a time, a long training has millions."""

    dataset: _Steps
    steps: range

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in self.steps:
            yield from ((step, part) for part in range(len(self.dataset.parts(step))))


def _loader(dataset: TorchDataset, keys: Any, workers: int, pin_memory: bool) -> Iterator[Batch]:
    reader = told = None
    try:
        reader = iter(
            DataLoader(
                dataset,
                batch_size=None,
                sampler=keys,
                num_workers=workers,
                collate_fn=_same,
                pin_memory=pin_memory,
                worker_init_fn=_obey_parent,
                generator=torch.Generator(),  # its own, so the global one is left alone
            )
        )
        yield from reader
    except EOFError:  # a loader that has no file left cannot answer
        told = DataError(_TOO_MANY_FILES)
    except (OSError, RuntimeError) as error:
        # The semaphores of a loader lie in shared memory, too, and nothing here writes elsewhere.
        full = workers and getattr(error, "errno", None) == errno.ENOSPC
        told = DataError(_NO_SHARED_MEMORY) if full else explain_worker_crash(error)
        if isinstance(error, ConnectionError):  # it ended while it handed a batch over
            for loader in getattr(reader, "_workers", []):
                loader.join(1)
                told = told or explain_worker_crash(RuntimeError(f"exit code {loader.exitcode}."))
        if told is None:
            raise
    finally:
        reader = None  # ends its processes, also while a traceback holds this frame
    if told:  # here, where no traceback holds on to the reader any more
        raise told


def explain_worker_crash(error: BaseException) -> DataError | None:
    """What became of the loaders, where that is what an error in the main process comes from.

    torch raises it wherever the main process stands when one of them ends.
    """
    said = f"{error} {error.__cause__}"
    if os.strerror(errno.EMFILE) in said or f"exit code {errno.EMFILE}." in said:  # see _give_up
        return DataError(_TOO_MANY_FILES)
    if "Bus error" in said or f"exit code {errno.ENOSPC}." in said:
        return DataError(_NO_SHARED_MEMORY)
    return None


_NO_SHARED_MEMORY = (
    "shared memory (/dev/shm) is full: make it larger (docker run --shm-size) or set workers to 0; "
    "or a file of the cache was cut short while it was read: the same command goes on"
)
_TOO_MANY_FILES = (
    "too many open files: each batch is handed over as four; raise the limit (ulimit -n), or lower "
    "workers"
)


def _same(batch: Batch) -> Batch:
    return batch


def _obey_parent(_: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the main process decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for, args=(parent.pid,), daemon=True).start()
    else:  # macOS
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Nor may it outlive a main process that was killed: it would hold memory, and the run's lock.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    # A batch that the threads of multiprocessing cannot hand over would be waited for.
    queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: _give_up(error))
    sys.excepthook = lambda kind, error, trace: _give_up(error)


def _end_for(parent: int) -> None:
    """Ends this process at a SIGTERM of its parent, who waits for it, and of nobody else."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _give_up(error: BaseException) -> None:
    for number in (
        errno.EMFILE,
        errno.ENOSPC,
    ):  # `explain_worker_crash` knows them by the exit code
        if os.strerror(number) in str(error):
            os._exit(number)
    traceback.print_exception(error)
    os._exit(1)


def available_cpus() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the embedded sets


def digits() -> Path:
    """The folder of scikit-learn's 1,797 handwritten digits as 8x8 PNG, made when first asked.

    1,297 to train and 500 (50 a class) to validate, a split that never changes. Source: Alpaydin
    and Kaynak, "Optical recognition of handwritten digits", UCI 1998, its test part.
    """
    return _embedded("digits-1", _write_digits)


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    place = np.random.Generator(np.random.Philox(key=0)).permutation(len(pixels))
    entries: dict[str, list] = {"train": [], "val": []}
    taken = [0] * 10
    for i in sorted(range(len(pixels)), key=place.__getitem__):
        label = int(bunch.target[i])
        side = "val" if taken[label] < 50 else "train"
        taken[label] += 1
        entries[side].append((f"{label}/{i:04d}.png", label, Image.fromarray(pixels[i])))
    _write_set(folder, entries, [str(d) for d in range(10)])


# Families are whole: no face of a validation family is seen in training.
_LETTER_FONTS = {
    "train": (
        "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono "
        "DejaVuSansMono-Bold DejaVuSansMono-Oblique STIXGeneral STIXGeneralBol STIXGeneralItalic "
        "STIXGeneralBolIta cmb10 cmtt10"
    ),
    "val": "DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic cmss10",
}


def letters() -> Path:
    """The folder of 26 letters, upper and lower case, drawn from matplotlib's fonts as 32x32 PNG.

    Training and validation have no font family in common, so it measures new handwriting, so to
    speak, not new copies.
    """
    return _embedded("letters-1", _write_letters)


def _write_letters(folder: Path) -> None:
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    entries: dict[str, list] = {"train": [], "val": []}
    for side, names in _LETTER_FONTS.items():
        for name in names.split():
            for size in (18, 22, 26):
                font = ImageFont.truetype(fonts / f"{name}.ttf", size)
                for label in range(26):
                    for case, letter in (("u", chr(65 + label)), ("l", chr(97 + label))):
                        image = Image.new("L", (32, 32), 255)
                        pen = ImageDraw.Draw(image)
                        pen.text((16, 16), letter, fill=0, font=font, anchor="mm")
                        file = f"{chr(97 + label)}/{name}-{size}-{case}.png"
                        entries[side].append((file, label, image))
    _write_set(folder, entries, [chr(97 + i) for i in range(26)])


def _write_set(folder: Path, entries: dict[str, list], classes: list[str]) -> None:
    (folder / "meta").mkdir()
    for side, rows in entries.items():
        for file, _, image in rows:
            path = folder / side / file
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        lines = [f"{file} {label}\n" for file, label, _ in rows]
        (folder / "meta" / f"{side}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")


def _embedded(name: str, write: Any) -> Path:
    """The finished folder; made beside its place and moved there whole, by whoever comes first."""
    folder = CACHE / name
    if folder.is_dir():
        return folder
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=CACHE, prefix=f".{name}."))
    except OSError as error:
        raise DataError(
            f"cannot write {CACHE}: {error.strerror}; name another folder in WORKBENCH_CACHE"
        ) from None
    try:
        write(temporary)
        os.chmod(temporary, 0o755)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
