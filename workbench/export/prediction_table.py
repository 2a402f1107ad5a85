"""Predictions written to a table file; an interrupted call resumes.

Rows are appended to <out>.partial, JSON lines below a header, and synced after each batch. A call
with the same arguments resumes after the last complete batch; on a CPU the table is the same, bit
for bit.
"""

import csv
import filecmp
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from workbench import runs
from workbench.export.annotation import annotate_batch, annotation_paths
from workbench.export.inputs import Entry, PredictionError, find_images, printable
from workbench.export.prediction import (
    Row,
    Source,
    check_numbers,
    columns,
    open_source,
    predict_batches,
    to_frame,
)

SUFFIXES = (".csv", ".jsonl", ".parquet")


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
    skipped: list[tuple[str, str]] | None = None,
) -> dict[str, int]:
    """Writes the table of `predict` to a new .csv, .jsonl or .parquet file.

    `skipped` is that of find_images. Returns the number of images by reason of failure, most
    frequent first; "" counts the predicted ones. Raises PredictionError, also if an interrupted
    call had other inputs, weights or arguments, or if another process writes this file.
    """
    check_numbers(top, batch_size, workers)
    out = Path(out).expanduser()
    partial = out.with_name(f"{out.name}.partial")
    if out.suffix not in SUFFIXES:
        raise PredictionError(f"out is {str(out)!r}; its suffix must be {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise PredictionError(f"there is no folder {str(out.parent)!r}; create it")
    if os.path.lexists(out) and not partial.exists():
        raise _exists(out)
    entries = find_images(inputs, skipped)
    targets = annotation_paths(entries, inputs, annotate_dir)
    source = open_source(source, weights)
    files = "\n".join(f"{entry.file}\0{os.path.abspath(entry.path)}" for entry in entries)
    header = {
        "weights": source.fingerprint,
        "inputs": hashlib.sha256(files.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        "top": top,
        "batch_size": batch_size,
        "annotate_dir": printable(os.path.abspath(annotate_dir)) if annotate_dir else "",
    }
    try:
        with runs.locking(partial) as (handle, locked):
            if not locked:
                raise PredictionError(f"{out} is being written by another process; wait for it")
            done = _resume(handle, partial, out, header, entries)
            remaining = entries[done:]
            for rows in predict_batches(source, remaining, top, batch_size, workers):
                batch = slice(done, done + len(rows))
                annotate_batch(entries[batch], targets[batch], rows)
                _append(handle, rows)
                done += len(rows)
            _finish(out, partial, columns(source, top))
            counts = Counter(row["error"].partition(":")[0] for row in _read_rows(partial))
            partial.unlink()
    except OSError as error:
        raise PredictionError(
            f"{out} was not written ({error.strerror or error}); when this is fixed, the same "
            f"command resumes from {partial.name}"
        ) from None
    return dict(counts.most_common())


def _exists(out: Path) -> PredictionError:
    return PredictionError(f"{out} exists and is not replaced; move it, or choose another out")


def _resume(handle: int, partial: Path, out: Path, header: Row, entries: list[Entry]) -> int:
    """Truncates the partial file after the last complete batch; returns its number of images."""
    end, done = _complete(partial, header, entries)
    if os.path.lexists(out) and done < len(entries):
        if not end:
            partial.unlink()  # new: another process has just finished the table
        raise _exists(out)
    os.ftruncate(handle, end)
    os.lseek(handle, end, os.SEEK_SET)
    if not end:
        _append(handle, [header])
    return done


def _complete(partial: Path, header: Row, entries: list[Entry]) -> tuple[int, int]:
    """(bytes, images) up to the last complete batch. Raises PredictionError for other arguments."""
    way_out = f"delete {partial}, or choose another out"
    with open(partial, "rb") as file:
        first = file.readline()
        is_complete = first.endswith(b"\n")
        if not is_complete and _line(header).startswith(first):
            return 0, 0  # new, or interrupted in the header
        before = _parse(first)
        if not is_complete or before.keys() != header.keys():
            raise PredictionError(f"{partial} is not a partial table; {way_out}")
        changed = [f"{k} {before[k]!r}, now {v!r}" for k, v in header.items() if v != before[k]]
        if changed:
            raise PredictionError(
                f"{partial} has other arguments: {'; '.join(changed)}. Use the same ones to "
                f"resume, or {way_out}"
            )
        end, done, size = len(first), 0, len(first)
        for count, (line, entry) in enumerate(zip(file, entries, strict=False), 1):
            if not line.endswith(b"\n") or _parse(line).get("file") != entry.file:
                break
            size += len(line)
            if count % header["batch_size"] == 0 or count == len(entries):
                end, done = size, count
    return end, done


def _line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _parse(line: bytes) -> Row:
    """A line's row; empty if it is damaged, which a crash of the machine may cause."""
    try:
        row = json.loads(line)
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
        yield from map(json.loads, file)


def _finish(out: Path, partial: Path, columns: list[str]) -> None:
    """Writes the table, and removes temporary files of killed processes."""
    for leftover in out.parent.glob(f".{glob.escape(out.name)}.????????"):
        leftover.unlink(missing_ok=True)
    with runs.atomic_write(out) as temporary:
        _write_table(temporary, out.suffix, partial, columns)
        # After a kill between this and the removal of the partial file the table is there.
        if os.path.lexists(out) and not filecmp.cmp(temporary, out, shallow=False):
            raise _exists(out)


def _write_table(path: Path, suffix: str, partial: Path, columns: list[str]) -> None:
    rows = _read_rows(partial)
    if suffix == ".parquet":
        to_frame(list(rows), columns).to_parquet(path, index=False)
    elif suffix == ".jsonl":
        with open(path, "wb") as file:
            file.writelines(map(_line, rows))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
