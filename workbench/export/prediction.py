"""Answers for images without labels: a table with a row per image, in the order asked.

    predict("runs/digits_baseline-seed0", ["photos", "more.txt"])          # a data frame
    write("runs/digits_baseline-seed0", ["photos"], "answers.csv")         # workbench predict
    one("runs/digits_baseline-seed0", "photos/1.jpg")                      # class, p

An image that cannot be read is a row with an error. What `write` has done is kept batch by batch
in <out>.partial; after a kill the same call goes on from there, and ends (on a CPU) with the same
bytes.
"""

import contextlib
import csv
import filecmp
import functools
import glob
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn import functional as F

from workbench import consumer, data, models, runs, training
from workbench.data import images
from workbench.progress import bar
from workbench.recipe import Recipe, RecipeError


class PredictionError(RuntimeError):
    """A source, input or output cannot be used; the text says why and what to do."""


# ---- sources


class Source(Protocol):
    """What gives the answers; str() is a line about it."""

    classes: list[str]
    transform: Any  # an augmentation.EvalTransform
    fingerprint: str  # differs where the answers could

    def __call__(self, images: torch.Tensor) -> np.ndarray:
        """Logits, float32 (n, classes), of uint8 images (n, 3, size, size)."""


class _RunSource:
    """A run's network in full precision, as its own validation asks it."""

    def __init__(self, about: str, recipe: Recipe, classes: list[str], model: nn.Module):
        self.about, self.classes = about, classes
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
        return f"{self.about}, {len(self.classes)} classes"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> np.ndarray:
        return self.model(self.normalize(images.to(self.device))).float().cpu().numpy()


def open_source(path: str | Path, weights: str = "") -> Source:
    """The network of a run folder, or of a deployment package (a .tar file).

    Of a run the last epoch answers (last.pt; without it best.safetensors), with weights as
    runs.Run.choose_weights says; `weights` "raw" or "ema" insists on one. Raises PredictionError.
    """
    path = Path(path).expanduser()
    if weights not in ("", "raw", "ema"):
        raise PredictionError(f"weights is {weights!r}; choose raw or ema, or leave it out")
    if not path.exists():
        raise PredictionError(
            f"{path} is not there; name a run folder, `workbench runs` lists them"
        )
    if path.suffix == ".tar" and path.is_file():
        if weights:
            raise PredictionError(
                f"{path} is a package with weights of one kind; leave out weights"
            )
        from workbench import export

        return export.load(path)
    if not path.is_dir():
        raise PredictionError(f"{path} is neither a run folder nor a package (.tar)")
    classes = models.run_classes(path)
    if not classes or not all(isinstance(name, str) for name in classes):
        raise PredictionError(
            f"{path} cannot answer: environment.json names no classes; training writes it there"
        )
    run = runs.Run(path)
    try:
        recipe = Recipe(**run.recipe())
        model, kind, file = training.load_run_model(recipe, run, len(classes), weights)
        state = run.status()["state"]
    except (RecipeError, runs.RunError, models.ModelError) as error:
        raise PredictionError(f"{path} cannot answer: {error}") from None
    measured = run.choose_weights(kind)[1]
    about = f"{path / file}, {kind} weights" + (f" ({measured})" if measured else "")
    about += "" if state == "finished" else f", of a run that is {state}"
    return _RunSource(about, recipe, classes, model)


def _opened(source: Source | str | Path, weights: str) -> Source:
    return open_source(source, weights) if isinstance(source, str | Path) else source


# ---- inputs


class Entry(NamedTuple):
    """An entry of the inputs: its name in the table, where it lies, why it cannot be read."""

    file: str
    path: str
    error: str = ""


LISTS = (".txt", ".jsonl")


def find(inputs: Sequence[str | Path], passed: list[tuple[str, str]] | None = None) -> list[Entry]:
    """The images that inputs name, in their order; none is read yet.

    An input is an image (any file), a folder (data.image_files, sorted; what that passes over is
    appended to `passed`, with the reason) or a list: .txt with a path a line, a
    label after the last space is passed over; .jsonl with {"filename": path} a line. A list's
    paths start from its folder. Absolute ones may lie anywhere; one that leaves the folder by
    `..` gets an error. One input's images are named from it on; of several inputs names begin with
    the folder as given, of a list with its folder, so two images never share one. Raises
    PredictionError when an input is not there or given twice, a list has a bad line, or nothing is
    found.
    """
    given = [data.on_disk(os.path.normpath(os.path.expanduser(path))) for path in inputs]
    if twice := [path for path, count in Counter(given).items() if count > 1]:
        raise PredictionError(f"input {twice[0]!r} is given twice; leave one out")
    found: list[Entry] = []
    passed = [] if passed is None else passed
    for path in given:
        if os.path.isdir(path):
            entries, base = _in_folder(path, passed), path
        elif not os.path.exists(path):
            raise PredictionError(f"input {path!r} is not there; name images, folders or lists")
        elif path.lower().endswith(LISTS):
            entries, base = _in_list(path), os.path.dirname(path)
        else:
            alone = os.path.basename(path) if len(given) == 1 else path
            found.append(Entry(alone, path, _irregular(path)))
            continue
        for entry in entries:
            single = len(given) == 1 or os.path.isabs(entry.file)
            found.append(entry if single else entry._replace(file=os.path.join(base, entry.file)))
    if not found:
        named, suffixes = (
            ", ".join(map(repr, given)) or "nothing",
            " ".join(sorted(images.SUFFIXES)),
        )
        wanted = f"wanted images, folders with {suffixes}, or lists ({' '.join(LISTS)})"
        raise PredictionError(f"no images in {named}; {wanted}")
    return [entry._replace(file=_text(entry.file)) for entry in found]


def _text(name: str) -> str:
    """A name as valid Unicode: bytes that are none stand as \\xff."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair
        return name.encode("utf-8", "backslashreplace").decode()


def _irregular(path: str) -> str:
    """Why a path that is there cannot be read as a file: opening a pipe would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return ""  # images.decode says what it is
    return "" if stat.S_ISREG(mode) else "unreadable: no regular file"


def _in_folder(root: str, passed: list[tuple[str, str]]) -> list[Entry]:
    files, left = data.image_files(root, root)
    named = [(os.path.relpath(path, root), path, _irregular(path)) for path in files]
    closed = [entry for entry in left if entry[1].startswith("unreadable")]
    named += [(name, os.path.join(root, name), why) for name, why in closed]
    passed += [(_text(os.path.join(root, n)), why) for n, why in left if (n, why) not in closed]
    return [Entry(*entry) for entry in sorted(named, key=lambda entry: entry[0].split(os.sep))]


def _in_list(path: str) -> list[Entry]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PredictionError(f"list {path!r} cannot be read: {error}") from None
    parse = _json_line if path.lower().endswith(".jsonl") else _text_line
    root, found = os.path.abspath(os.path.dirname(path)), []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            file = parse(line.rstrip("\r"))
            if not file or "\0" in file:
                raise ValueError("no file name")
            os.fsencode(file)
        except (ValueError, RecursionError) as error:
            raise PredictionError(f"list {path!r}, line {number}: {error}; fix it") from None
        where = data.on_disk(os.path.join(root, file))
        inside = os.path.abspath(where).startswith(root.rstrip(os.sep) + os.sep)
        error = _irregular(where)
        if not inside and not os.path.isabs(file):
            error = "outside: leaves the folder of its list"
        found.append(Entry(file, where, error))
    return found


def _text_line(line: str) -> str:
    return re.sub(r" [+-]?\d{1,9}$", "", line)


def _json_line(line: str) -> str:
    entry = json.loads(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("filename"), str):
        raise ValueError(f'wanted {{"filename": "a.jpg"}}, came {line[:60]!r}')
    return entry["filename"]


# ---- answers


def predict(
    source: Source | str | Path,
    inputs: Sequence[str | Path],
    *,
    top: int = 5,
    batch_size: int = 64,
    workers: int | None = None,
    images: str | Path | None = None,
    weights: str = "",
) -> pd.DataFrame:
    """A row per image: file, class1 to class`top` (names, best first), p1 to p`top`, error.

    p is the softmax, float32; of fewer classes there are fewer columns. An image that cannot be
    read has missing values and the reason in `error`, else empty. `source` and `weights` are as in
    open_source. Annotated images go into the folder `images`. Raises PredictionError.
    """
    _check_numbers(top, batch_size, workers)
    found = find(inputs)
    targets = _targets(found, inputs, images)
    source = _opened(source, weights)
    batches = _answers(source, found, targets, top, batch_size, workers)
    return _frame([row for rows in batches for row in rows], min(top, len(source.classes)))


def write(
    source: Source | str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    top: int = 5,
    batch_size: int = 64,
    workers: int | None = None,
    images: str | Path | None = None,
    weights: str = "",
    passed: list[tuple[str, str]] | None = None,
) -> dict[str, int]:
    """Writes what `predict` returns to a .csv, .jsonl or .parquet file, which must not exist.

    Interrupted, the same call goes on; `passed` is find's. Returns how many images had which
    reason not to be read, most frequent first; "" counts the answered ones. Raises PredictionError,
    also when the files left by an interrupted call are of other inputs, weights or arguments, or
    in use.
    """
    _check_numbers(top, batch_size, workers)
    out = Path(out).expanduser()
    partial = out.with_name(f"{out.name}.partial")
    if out.suffix not in TABLES:
        raise PredictionError(f"out is {str(out)!r}; its suffix is one of {', '.join(TABLES)}")
    if not out.parent.is_dir():
        raise PredictionError(f"there is no folder {str(out.parent)!r}; make it, or choose another")
    exists = PredictionError(f"{out} exists and is not replaced; move it, or choose another out")
    if os.path.lexists(out) and not partial.exists():
        raise exists
    found = find(inputs, passed)
    targets = _targets(found, inputs, images)
    source = _opened(source, weights)
    places = "\n".join(f"{entry.file}\0{os.path.abspath(entry.path)}" for entry in found)
    header = {
        "weights": source.fingerprint,
        "inputs": hashlib.sha256(places.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        "top": top,
        "batch_size": batch_size,
        "images": _text(os.path.abspath(images)) if images else "",
    }
    columns = _columns(min(top, len(source.classes)))
    try:
        with runs.locking(partial) as (handle, ours):
            if not ours:
                raise PredictionError(f"{out} is being written by another process; wait for it")
            end, done = _kept(partial, header, found, batch_size)
            if os.path.lexists(out) and done < len(found):
                if not end:
                    partial.unlink()  # locking made it: the other process ended a moment ago
                raise exists
            os.ftruncate(handle, end)
            os.lseek(handle, end, os.SEEK_SET)
            if not end:
                _put(handle, [header])
            left, places = found[done:], targets[done:]
            for rows in _answers(source, left, places, top, batch_size, workers):
                _put(handle, rows)
            for leftover in out.parent.glob(f".{glob.escape(out.name)}.????????"):
                leftover.unlink(missing_ok=True)  # of a process killed while replacing
            with runs.atomic_write(out) as temporary:
                _write_table(temporary, out.suffix, partial, columns)
                # Killed between this and the last line it is there; what else is there stays.
                if os.path.lexists(out) and not filecmp.cmp(temporary, out, shallow=False):
                    raise exists
            counts = Counter(row["error"].partition(":")[0] for row in _rows(partial))
            partial.unlink()
    except OSError as error:
        raise PredictionError(
            f"{out} was not written ({error.strerror or error}); once there is room and permission "
            f"the same command goes on from {partial.name}"
        ) from None
    return dict(counts.most_common())


def one(source: Source | str | Path, image: Image.Image | str | Path, top: int = 5) -> pd.DataFrame:
    """The best classes of an image: class, p (float32). Raises ImageError, PredictionError."""
    _check_numbers(top)
    if not isinstance(image, Image.Image):
        image = images.decode(Path(image).expanduser())
    else:
        consumer.check_size(*image.size)
        image = Image.fromarray(consumer.upright(image))
    source = _opened(source, "")
    pixels = torch.from_numpy(np.array(source.transform(image)))
    [(names, values)] = _best(source, pixels.permute(2, 0, 1)[None], top)
    return pd.DataFrame({"class": names, "p": np.array(values, np.float32)})


def _check_numbers(top: int, batch_size: int = 1, workers: int | None = None) -> None:
    numbers = (("top", top, 1), ("batch_size", batch_size, 1), ("workers", workers or 0, 0))
    for name, value, least in numbers:
        if value < least:
            raise PredictionError(f"{name} is {value}; it is {least} or more")


def _answers(
    source: Source,
    found: list[Entry],
    targets: list[Path | None],
    top: int,
    batch_size: int,
    workers: int | None,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of the images, a list per batch; their annotated images are there before."""
    if not found:
        return
    # A refused entry keeps its place in its batch, and nothing is opened for it.
    paths = ["" if entry.error else entry.path for entry in found]
    frame = pd.DataFrame({"path": pd.Series(paths, dtype=object), "label": 0})
    many = workers is not None or len(found) > 2000
    workers = training.pick_workers(workers) if many else 0
    batches = data.eval_loader(frame, source.transform, batch_size=batch_size, workers=workers)
    names = _columns(min(top, len(source.classes)))[1:-1]
    with bar(len(found), "predicting", "img") as shown:
        for start, batch in zip(range(0, len(found), batch_size), batches, strict=True):
            errors = {row: f"{reason}: {detail}" for row, reason, detail in batch.failures}
            best = dict(zip(batch.indices.tolist(), _best(source, batch.images, top), strict=True))
            rows = []
            part = slice(start, start + batch_size)
            for i, entry in enumerate(found[part], start):
                classes, values = best.get(i, ([], []))
                error = entry.error or errors.get(i, "")
                if classes and not np.isfinite(values).all():
                    classes, error = [], "not finite: the network answers nan or infinity"
                given = [*classes, *values] if classes else [None] * len(names)
                columns = dict(zip(names, given, strict=True))
                rows.append({"file": entry.file, **columns, "error": error})
            _draw(found[part], targets[part], rows)
            yield rows
            shown.update(len(rows))


def _best(source: Source, pixels: torch.Tensor, top: int) -> list[tuple[list[str], list[float]]]:
    """For each image the names of the best classes, and softmax values that float32 tells apart."""
    if not len(pixels):
        return []
    log_p = F.log_softmax(torch.from_numpy(source(pixels)), dim=1)
    # As evaluation ranks: of equal ones the lower class number is first.
    values, ids = torch.sort(log_p, dim=1, descending=True, stable=True)
    names = [_text(name) for name in source.classes]
    short = lambda p: [float(str(x)) for x in p.numpy()]  # the shortest text that gives it back
    return [
        ([names[i] for i in row.tolist()], short(p))
        for row, p in zip(ids[:, :top], values[:, :top].exp(), strict=True)
    ]


# ---- files

TABLES = (".csv", ".jsonl", ".parquet")


def _columns(count: int) -> list[str]:
    numbers = range(1, count + 1)
    return ["file", *(f"class{i}" for i in numbers), *(f"p{i}" for i in numbers), "error"]


def _frame(rows: list[dict[str, Any]], count: int) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=_columns(count), dtype=object)
    p = {f"p{i + 1}": np.float32 for i in range(count)}
    return frame.astype({**dict.fromkeys(frame.columns, "str"), **p})


def _put(handle: int, rows: Sequence[dict[str, Any]]) -> None:
    """Appends rows as JSON lines, and returns when the disk has them."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    while text:  # of a full disk the next call tells
        text = text[os.write(handle, text) :]
    os.fsync(handle)


def _kept(
    partial: Path, header: dict[str, Any], found: list[Entry], batch_size: int
) -> tuple[int, int]:
    """(bytes, images) up to the last whole batch. Raises PredictionError for another call's."""
    way_out = f"delete {partial}, or choose another out"
    with open(partial, "rb") as file:
        first = file.readline()
        whole = first.endswith(b"\n")
        if not whole and json.dumps(header, ensure_ascii=False).encode().startswith(first):
            return 0, 0  # nothing yet, or killed while it began
        before = _parsed(first)
        if not whole or before.keys() != header.keys():
            raise PredictionError(f"{partial} is no begun table; {way_out}")
        changed = [f"{k} {before[k]!r}, now {v!r}" for k, v in header.items() if v != before[k]]
        if changed:
            as_before = f"{'; '.join(changed)}. Call as before to go on, or {way_out}"
            raise PredictionError(f"{partial} was begun otherwise: {as_before}")
        end, done, size = len(first), 0, len(first)
        for count, (line, entry) in enumerate(zip(file, found, strict=False), 1):
            if not line.endswith(b"\n") or _parsed(line).get("file") != entry.file:
                break
            size += len(line)
            if count % batch_size == 0 or count == len(found):
                end, done = size, count
    return end, done


def _parsed(line: bytes) -> dict[str, Any]:
    """A line's mapping, empty where it is none: a machine that went down may leave anything."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _rows(partial: Path) -> Iterator[dict[str, Any]]:
    with open(partial, "rb") as file:
        next(file)
        yield from map(json.loads, file)


def _write_table(path: Path, suffix: str, partial: Path, columns: list[str]) -> None:
    if suffix == ".parquet":
        _frame(list(_rows(partial)), len(columns) // 2 - 1).to_parquet(path, index=False)
        return
    with open(path, "w", newline="", encoding="utf-8") as file:
        if suffix == ".csv":
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(_rows(partial))
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(partial))


# ---- annotated images

LONG_SIDE, FONT_SIZE = 512, 16  # pixels


def annotate(image: Image.Image, name: str, p: float) -> Image.Image:
    """The image, at most LONG_SIDE pixels long, above a band with class name and softmax."""
    shown = image.copy()
    shown.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    font, margin = _font(), FONT_SIZE // 2
    name, value = " ".join(name.split()), f"  {100 * p:.1f} %"
    text, cut = name + value, len(name)
    while font.getlength(text) > LONG_SIDE - 2 * margin and cut:
        cut -= 1
        text = name[:cut] + "…" + value
    width = max(shown.width, int(font.getlength(text)) + 2 * margin)
    sheet = Image.new("RGB", (width, shown.height + 2 * FONT_SIZE), "white")
    sheet.paste(shown, ((width - shown.width) // 2, 0))
    pen = ImageDraw.Draw(sheet)
    pen.text((width / 2, shown.height + FONT_SIZE), text, fill="black", font=font, anchor="mm")
    return sheet


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(fonts / "DejaVuSans.ttf", FONT_SIZE)


def _targets(
    found: list[Entry], inputs: Sequence[str | Path], folder: str | Path | None
) -> list[Path | None]:
    """Where each annotated image goes: its name below the folder, without `..` and root.

    Raises PredictionError where an input would be replaced, or read as an input the next time.
    """
    if folder is None:
        return [None] * len(found)
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    for path in inputs:
        if os.path.isdir(path) and folder.is_relative_to(os.path.realpath(path)):
            raise PredictionError(f"images {folder} lies in the input {path}; choose another")
    taken: dict[Path, str] = {}
    targets: list[Path | None] = []
    for entry in found:
        path = os.path.realpath(entry.path)
        if Path(path).is_relative_to(folder):
            raise PredictionError(f"{entry.path} lies in images {folder}; choose another folder")
        parts = [part for part in entry.file.split("/") if part not in ("", ".", "..")]
        target = plain = folder.joinpath(*parts or ["image"])
        if plain.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            target = plain = plain.with_name(plain.name + ".jpg")
        number = 1
        while taken.setdefault(target, path) != path:
            number += 1
            target = plain.with_name(f"{plain.stem}-{number}{plain.suffix}")
        targets.append(target)
    for parent in {target.parent for target in targets}:
        if os.path.realpath(parent) != str(parent):
            raise PredictionError(f"{parent} leads elsewhere by a link; choose another folder")
    return targets


def _draw(entries: list[Entry], targets: list[Path | None], rows: list[dict[str, Any]]) -> None:
    """Writes the annotated images of a batch, those of earlier runs replaced."""
    todo = [t for t in zip(entries, targets, rows, strict=True) if t[1] and not t[2]["error"]]
    with images.quiet(), ThreadPoolExecutor(data.available_cpus()) as pool:
        list(pool.map(_draw_one, todo))


def _draw_one(todo: tuple[Entry, Path, dict[str, Any]]) -> None:
    entry, target, row = todo
    try:
        sheet = annotate(images.decode(entry.path), row["class1"], row["p1"])
    except images.ImageError:
        return  # it went since it was answered
    kind = "PNG" if target.suffix.lower() == ".png" else "JPEG"
    # A killed process leaves the temporary file to the next one. A link in its place, or in that
    # of the image, is not followed.
    temporary = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            sheet.save(file, kind, quality=90)
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise PredictionError(f"{target} was not written: {error.strerror or error}") from None
