"""Predictions for images without labels, a row for each image.

    predict("runs/digits_baseline-seed0", ["photos", "more.txt"])          # a data frame
    predict_to_file("packages/digits_1.0.0.tar", ["photos"], "out.csv")    # resumes after a kill

An image that cannot be read is a row with an error.
"""

import csv
import filecmp
import glob
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from workbench import data, image_files, locks, runs, shard_store, training
from workbench.data import images
from workbench.data.verify import file_stat
from workbench.evaluation import inference
from workbench.export.annotation import annotate_batch, annotation_paths
from workbench.export.inputs import Entry, PredictionError, find_images, printable
from workbench.export.packaging import trained_model
from workbench.export.verify import Package, load
from workbench.progress import bar
from workbench.recipe import Recipe

SUFFIXES = (".csv", ".jsonl", ".parquet")

Row = dict[str, Any]  # of a table, by column
Stats = list[tuple | None]  # of files


class RunSource(nn.Module):
    """The network of a run in full precision, with the preprocessing of its validation."""

    def __init__(self, description: str, recipe: Recipe, classes: list[str], model: nn.Module):
        super().__init__()
        self.description, self.classes = description, classes
        self.transform = training.eval_transform(recipe)
        self.device = training.pick_device("auto")
        self.normalize = training.Normalize(recipe, self.device)
        settings = (recipe.model, classes, self.transform, recipe.mean, recipe.std)
        digest = hashlib.sha256(repr(settings).encode())
        for name, values in model.state_dict().items():
            digest.update(name.encode() + values.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self.model = model.to(self.device, memory_format=self.normalize.layout)

    def __str__(self) -> str:
        return f"{self.description}, {len(self.classes)} classes"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.normalize(images))


Source = RunSource | Package


def open_source(source: Source | str | Path, weights: str = "") -> Source:
    """The network of a run folder or of a package (.tar); a Source is returned unchanged.

    Of a run the weights of the last epoch (last.pt, without it best.safetensors); `weights` is
    raw or ema, by default as in Run.choose_weights. Raises PredictionError, PackageError, or an
    error of packaging.FAILURES.
    """
    if not isinstance(source, str | Path):
        return source
    path = Path(source).expanduser()
    if path.suffix == ".tar":
        if weights:
            raise PredictionError(f"{path} has one kind of weights; leave out weights")
        return load(path)
    run = runs.Run(path)
    recipe, classes, model, kind, file = trained_model(run, weights)
    top1, state = run.choose_weights(kind)[1], run.status()["state"]
    description = f"{path / file}, {kind} weights" + (f" ({top1})" if top1 else "")
    description += "" if state == "finished" else f", of a run that is {state}"
    return RunSource(description, recipe, classes, model)


def predict(
    source: Source | str | Path,
    inputs: Sequence[str | Path],
    *,
    top: int = 5,
    batch_size: int = 64,
    workers: int | None = None,
    weights: str = "",
) -> pd.DataFrame:
    """A row per image: file, class1 to class`top` (names, best first), p1 to p`top`, error.

    p is the softmax, float32; there are at most as many columns as classes. An image that cannot
    be read has missing values and the reason in `error`. `source` and `weights` are those of
    open_source, `inputs` those of find_images.
    """
    check_numbers(top, batch_size)
    entries, source = find_images(inputs), open_source(source, weights)
    batches = predict_batches(source, entries, top, batch_size, workers)
    return to_frame([row for rows in batches for row in rows], columns(source, top))


def predict_image(
    source: Source | str | Path, image: Image.Image | str | Path, top: int = 5
) -> pd.DataFrame:
    """The best classes of an image: class, p (float32). Raises ImageError, PredictionError."""
    check_numbers(top)
    if isinstance(image, Image.Image):
        image_files.check_size(*image.size)
        image = Image.fromarray(image_files.upright(image))
    else:
        image = images.decode(Path(image).expanduser())
    source = open_source(source)
    pixels = torch.from_numpy(np.array(source.transform(image))).permute(2, 0, 1)[None]
    zero = torch.zeros(1, dtype=torch.int64)
    batch = data.Batch(pixels, zero, zero, zero, 0, True, 1, [])
    [(names, values)] = _best(source, batch, top).values()
    return pd.DataFrame({"class": names, "p": np.array(values, np.float32)})


def check_numbers(top: int, batch_size: int = 1) -> None:
    """Raises PredictionError for a number below 1."""
    if min(top, batch_size) < 1:
        raise PredictionError(f"top is {top}, batch_size {batch_size}; they must be 1 or more")


def predict_batches(
    source: Source, entries: list[Entry], top: int, batch_size: int, workers: int | None
) -> Iterator[list[Row]]:
    """Rows of the entries, a list for each batch."""
    # An entry with an error has its position in its batch; nothing is opened for it.
    paths = ["" if entry.error else entry.path for entry in entries]
    frame = pd.DataFrame({"path": pd.Series(paths, dtype=object), "label": 0})
    use_workers = workers is not None or len(entries) > 2000
    workers = training.pick_workers(workers) if use_workers else 0
    batches = data.eval_loader(frame, source.transform, batch_size=batch_size, workers=workers)
    with bar(len(entries), "predicting", "img") as progress:
        for start, batch in zip(range(0, len(entries), batch_size), batches, strict=True):
            rows = _rows(source, batch, entries[start : start + batch_size], start, top)
            yield rows
            progress.update(len(rows))


def _rows(
    source: Source, batch: data.Batch, entries: list[Entry], start: int, top: int
) -> list[Row]:
    best, names, rows = _best(source, batch, top), columns(source, top), []
    errors = {row: f"{reason}: {detail}" for row, reason, detail in batch.failures}
    for index, entry in enumerate(entries, start):
        classes, p = best.get(index, ([], []))
        error = entry.error or errors.get(index, "")
        if not np.isfinite(p).all():
            classes, error = [], "not finite: the logits have NaN or infinity"
        values = [*classes, *p] if classes else [None] * (len(names) - 2)
        rows.append(dict(zip(names, [entry.file, *values, error], strict=True)))
    return rows


def _best(source: Source, batch: data.Batch, top: int) -> dict[int, tuple[list[str], list[float]]]:
    """The names of the best classes of each image that was read, and their softmax, by row."""
    if not len(batch.images):
        return {}
    table = inference.predict(source, [batch], lambda images: images, source.device, top=top)
    ids, p = (table.filter(regex=rf"^{name}\d+$").to_numpy() for name in ("class", "p"))
    names = [printable(name) for name in source.classes]
    return {  # str of a float32 is the shortest text that gives it back
        row: ([names[i] for i in best], [float(str(value)) for value in values])
        for row, best, values in zip(table.row.tolist(), ids, p, strict=True)
    }


def columns(source: Source, top: int) -> list[str]:
    """The columns of a table."""
    numbers = range(1, min(top, len(source.classes)) + 1)
    return ["file", *(f"class{i}" for i in numbers), *(f"p{i}" for i in numbers), "error"]


def to_frame(rows: list[Row], columns: list[str]) -> pd.DataFrame:
    """Rows as a data frame of str and float32."""
    frame = pd.DataFrame(rows, columns=columns, dtype=object)
    return frame.astype({c: np.float32 if c.startswith("p") else "str" for c in columns})


# ---- a table file: rows are appended to <out>.partial, and it is written at the end


def predict_to_file(
    source: Source | str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    top: int = 5,
    batch_size: int = 64,
    workers: int | None = None,
    annotate_dir: str | Path | None = None,
    weights: str = "",
) -> dict[str, int]:
    """Writes the table of `predict` to a new .csv, .jsonl or .parquet file.

    Returns the number of images by reason of failure, most frequent first; "" counts the predicted
    ones. After an interruption it goes on before the first image whose file was changed since.
    Raises PredictionError, also if that call had other inputs, weights or arguments, or if another
    process of this machine writes this file, or the filesystem has no flock to know that by.
    """
    check_numbers(top, batch_size)
    out = Path(out).expanduser()
    partial = out.with_name(f"{out.name}.partial")
    if out.suffix not in SUFFIXES:
        raise PredictionError(f"out is {str(out)!r}; its suffix must be {', '.join(SUFFIXES)}")
    entries = find_images(inputs)
    targets = annotation_paths(entries, inputs, annotate_dir)
    source = open_source(source, weights)
    files = "\n".join(f"{entry.file}\0{os.path.abspath(entry.path)}" for entry in entries)
    header = {
        "weights": source.fingerprint,
        "inputs": hashlib.sha256(os.fsencode(files)).hexdigest()[:16],
        "top": top,
        "batch_size": batch_size,
        "annotate_dir": printable(os.path.abspath(annotate_dir)) if annotate_dir else "",
    }
    try:
        with locks.locking(partial) as (handle, locked):
            if locked is None:
                partial.stat().st_size or partial.unlink()  # it was just created
                raise PredictionError(f"{out}: no flock on this filesystem; choose another folder")
            if not locked:
                raise PredictionError(f"{out} is being written by another process; wait for it")
            stats = [file_stat(entry.path) for entry in entries]  # before any is read
            done = _resume(handle, partial, out, header, entries, stats)
            for rows in predict_batches(source, entries[done:], top, batch_size, workers):
                batch = slice(done, done + len(rows))
                annotate_batch(entries[batch], targets[batch], rows)
                pairs = zip(rows, stats[batch], strict=True)
                _append(handle, [row | {"stat": stat and stat[1:]} for row, stat in pairs])
                done += len(rows)
            _finish(out, partial, columns(source, top))
            counts = Counter(row["error"].partition(":")[0] for row in _read_rows(partial))
            partial.unlink()
    except shard_store.StoreError:
        raise
    except OSError as error:
        raise PredictionError(
            f"{out} was not written ({error}); the same command resumes from {partial.name}"
        ) from None
    return dict(counts.most_common())


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise PredictionError(f"{out} exists and is not replaced; move it, or choose another out")


def _resume(
    handle: int, partial: Path, out: Path, header: Row, entries: list[Entry], stats: Stats
) -> int:
    """Truncates the partial file after the last complete batch; returns its number of images."""
    end, done = _complete(partial, header, entries, stats)
    if done < len(entries):
        if not end and os.path.lexists(out):
            partial.unlink()  # new
        _refuse_existing(out)
    os.ftruncate(handle, end)
    os.lseek(handle, end, os.SEEK_SET)
    if not end:
        _append(handle, [header])
    return done


def _complete(partial: Path, header: Row, entries: list[Entry], stats: Stats) -> tuple[int, int]:
    """(bytes, images) up to the last complete batch of unchanged files.

    Raises PredictionError for other arguments.
    """
    first, *lines = partial.read_bytes().splitlines(keepends=True) or [b""]
    if not first.endswith(b"\n") and _line(header).startswith(first):
        return 0, 0  # new, or interrupted in the header
    before = _parse(first)
    if changed := [key for key in header if header[key] != before.get(key)]:
        raise PredictionError(
            f"{partial} is of a call with other {', '.join(changed)}; use the same arguments to "
            "resume, or delete it"
        )
    there = ((row.get("file"), row.get("stat")) for row in map(_parse, lines))
    here = ((e.file, stat and [*stat[1:]]) for e, stat in zip(entries, stats, strict=True))
    pairs = zip(there, here, strict=False)
    done = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if done < len(entries):
        done -= done % header["batch_size"]
    return len(first) + sum(map(len, lines[:done])), done


def _line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _parse(line: bytes) -> Row:
    """A line's row; empty if it is incomplete or damaged."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _append(handle: int, rows: Sequence[Row]) -> None:
    """Appends rows and syncs the file."""
    text = b"".join(map(_line, rows))
    while text:  # os.write may write a part
        text = text[os.write(handle, text) :]
    os.fsync(handle)


def _read_rows(partial: Path) -> Iterator[Row]:
    with open(partial, "rb") as file:
        next(file)
        for row in map(json.loads, file):
            row.pop("stat", None)
            yield row


def _finish(out: Path, partial: Path, columns: list[str]) -> None:
    """Writes the table, and removes temporary files of killed processes."""
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.????????"):
        leftover.unlink(missing_ok=True)
    with runs.atomic_write(out) as temporary:
        rows = _read_rows(partial)
        if out.suffix == ".parquet":
            to_frame(list(rows), columns).to_parquet(temporary, index=False)
        elif out.suffix == ".jsonl":
            with open(temporary, "wb") as file:
                file.writelines(map(_line, rows))
        else:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                # It quotes a carriage return in a name only where one is in its line ends.
                lines = SimpleNamespace(write=lambda line: file.write(f"{line[:-2]}\n"))
                writer = csv.DictWriter(lines, columns, lineterminator="\r\n")
                writer.writeheader()
                writer.writerows(rows)
        # After a kill between this and the removal of the partial file the table is there.
        if os.path.lexists(out) and not filecmp.cmp(temporary, out, shallow=False):
            _refuse_existing(out)
