"""Every image decoded once before training; what cannot be read, duplicates and leaks."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from workbench import CACHE, image_files, shard_store
from workbench.data import images
from workbench.data.dataset import DataError, Dataset, text_digest
from workbench.progress import bar

STAT = ["path", "size", "time", "changed"]  # archives restore a file's time, not its last change
FACTS = ["bytes", "width", "height", "digest", "problem", "detail"]


def verify_images(
    frame: pd.DataFrame, *, cache: bool = True, progress: bool = True
) -> pd.DataFrame:
    """The frame with FACTS about every image, from decoding all of it.

    problem is empty or one of image_files.REASONS; digest identifies the file's bytes. Facts of
    valid images are cached in CACHE/facts until a file's size or time changes. Raises StoreError.
    """
    paths = frame.path.tolist()
    stats = [file_stat(path) for path in paths]
    store = CACHE / "facts" / (text_digest("\n".join(sorted(set(paths))))[:24] + ".parquet")
    known = _read_facts(store) if cache else {}
    facts = [known.get(stat) for stat in stats]
    todo = [i for i, fact in enumerate(facts) if fact is None]
    try:
        with (
            counter(len(todo), "reading images", "img", progress) as count,
            ThreadPoolExecutor(max(2, available_cpus())) as pool,
        ):
            size = 100 if "index" in frame.attrs else 1000  # few in flight, so that Ctrl-C works
            for start in range(0, len(todo), size):
                chunk = todo[start : start + size]
                some = [paths[i] for i in chunk]  # asked of a store at once; threads read files
                contents = shard_store.read(path if "://" in path else "" for path in some)
                for i, fact in zip(chunk, pool.map(_facts, some, contents), strict=True):
                    facts[i] = fact
                    count()
    finally:
        if cache and todo:  # also after an interrupt
            _write_facts(store, stats, facts)
    return pd.concat([frame, pd.DataFrame(facts, columns=FACTS, index=frame.index)], axis=1)


@contextlib.contextmanager
def counter(total: int, text: str, unit: str, show: bool) -> Iterator[Callable[[], object]]:
    """A function that advances a progress bar, or does nothing."""
    with bar(total, text, unit) if show and total else contextlib.nullcontext() as shown:
        yield shown.update if shown is not None else lambda: None


def available_cpus() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_digest(path: str, content: bytes | None = None) -> str:
    """SHA-1 of a file's bytes, the `digest` of a verified frame; `content` has them if known.

    Raises OSError, and ImageError for a pipe, which would block.
    """
    with images.opened(path, content) as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def _facts(path: str, content: bytes | None) -> tuple:
    size, digest = 0, ""
    content = next(shard_store.read([path])) if content is None else content
    try:
        digest = image_files.with_reason(path, lambda: file_digest(path, content))
        size = image_files.with_reason(path, lambda: image_files.stored_in(path)[1])
        image = images.open(path, content)
        image.pixels()
        return size, image.width, image.height, digest, "", ""
    except images.ImageError as error:
        return size, 0, 0, digest, error.reason, error.detail


def file_stat(path: str) -> tuple[str, int, int, int] | None:
    """STAT of an image's file, or of its archive: equal while nothing is written to it.

    None if there is no such file.
    """
    try:
        found = os.stat(image_files.stored_in(path)[0])
    except OSError:
        return None
    return path, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_facts(store: Path) -> dict[tuple, tuple]:
    try:
        rows = pd.read_parquet(store, columns=[*STAT, *FACTS]).itertuples(index=False, name=None)
        return {tuple(row[: len(STAT)]): tuple(row[len(STAT) :]) for row in rows}
    except Exception:  # with a missing or corrupt cache all images are read
        return {}


def _write_facts(store: Path, stats: list[tuple | None], facts: list[tuple | None]) -> None:
    pairs = zip(stats, facts, strict=True)
    rows = [(*stat, *fact) for stat, fact in pairs if stat and fact]
    table = pd.DataFrame(rows, columns=[*STAT, *FACTS]).drop_duplicates(STAT)
    table = table[table.problem == ""]  # a corrupt file may be complete the next time
    with contextlib.suppress(OSError):  # training works without this cache
        store.parent.mkdir(parents=True, exist_ok=True)
        temporary = store.with_suffix(f".{os.getpid()}")
        table.to_parquet(temporary, index=False)
        os.replace(temporary, store)


def drop_corrupt(frame: pd.DataFrame, side: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A verified frame without the images that cannot be read, and these for quarantine.csv.

    Raises DataError when more than one in five cannot be read: then the root is wrong.
    """
    bad = frame.problem != ""
    if bad.mean() > 0.2:
        first = frame[bad].iloc[0]
        raise DataError(
            f"{side}: {bad.sum()} of {len(frame)} images cannot be read, first {first.path!r} "
            f"({first.problem}: {first.detail}); `workbench check-data` lists them all"
        )
    out = frame[bad].rename(columns={"problem": "reason"}).assign(side=side, step=-1)
    columns = ["side", "file", "label", "reason", "detail", "step"]
    return frame[~bad].reset_index(drop=True), out[columns]


def check_data(data: Dataset, *, progress: bool = True) -> pd.DataFrame:
    """What is wrong with the images, a row each: finding, side, file, label, detail.

    Load `data` with strict=False: entries that training would refuse are then rows here.
    Findings: image_files.REASONS, "label out of range", "outside root", "class without images",
    "skipped" (detail says why), "duplicate" (the same bytes twice on a side) and "in train and
    validation". The details of the last two say where, and whether labels differ.
    """
    rows = [("skipped", side, file, -1, why) for side, file, why in data.skipped]
    sides = {"train": data.train, "val": data.val}
    verified = {side: verify_images(f, progress=progress) for side, f in sides.items()}
    for side, frame in verified.items():
        rows += _faults(side, frame, data.classes)
    train, val = (frame[frame.problem == ""] for frame in verified.values())
    first = train.drop_duplicates("digest").set_index("digest")
    for r in val[val.digest.isin(first.index)].itertuples():
        detail = f"in training as {_same_bytes(first.loc[r.digest], r.label)}"
        rows.append(("in train and validation", "val", r.file, r.label, detail))
    return pd.DataFrame(rows, columns=["finding", "side", "file", "label", "detail"])


def _faults(side: str, frame: pd.DataFrame, classes: list[str]) -> Iterator[tuple]:
    for r in frame[frame.problem != ""].itertuples():
        yield r.problem, side, r.file, r.label, r.detail
    for r in frame[frame.outside].itertuples():
        yield "outside root", side, r.file, r.label, r.path
    detail = f"there are {len(classes)} classes, counted from 0"
    for r in frame[~frame.label.between(0, len(classes) - 1)].itertuples():
        yield "label out of range", side, r.file, r.label, detail
    for label in sorted(set(range(len(classes))) - set(frame.label)):
        yield "class without images", side, "", label, f"class {classes[label]!r}"
    valid = frame[frame.problem == ""]
    for _, group in valid[valid.digest.duplicated(keep=False)].groupby("digest", sort=False):
        for r in group.iloc[1:].itertuples():
            yield "duplicate", side, r.file, r.label, f"of {_same_bytes(group.iloc[0], r.label)}"


def _same_bytes(other: pd.Series, label: int) -> str:
    return other.file + ("" if other.label == label else f", labelled {other.label} there")
