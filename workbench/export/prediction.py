"""Predictions for images without labels, a row for each image.

    predict("runs/digits_baseline-seed0", ["photos", "more.txt"])          # a data frame
    predict_image("packages/digits_1.0.0.tar", "photos/1.jpg")             # class, p

An image that cannot be read is a row with an error.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from workbench import consumer, data, runs, training
from workbench.data import images
from workbench.evaluation import inference
from workbench.export.archive import ExportError
from workbench.export.inputs import Entry, PredictionError, find_images, printable
from workbench.export.packaging import load_run
from workbench.export.verify import Package, load
from workbench.progress import bar
from workbench.recipe import Recipe

Row = dict[str, Any]  # of a table, by column


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
    raw or ema, by default as in Run.choose_weights. Raises PredictionError, PackageError.
    """
    if not isinstance(source, str | Path):
        return source
    path = Path(source).expanduser()
    if weights not in ("", "raw", "ema"):
        raise PredictionError(f"weights is {weights!r}; choose raw or ema, or leave it out")
    if not path.exists():
        raise PredictionError(f"{path} does not exist; `workbench runs` lists run folders")
    if path.suffix == ".tar" and path.is_file():
        if weights:
            raise PredictionError(
                f"{path} is a package with one kind of weights; leave out weights"
            )
        return load(path)
    if not path.is_dir():
        raise PredictionError(f"{path} is neither a run folder nor a package (.tar)")
    run = runs.Run(path)
    try:
        recipe, classes, model, kind, file = load_run(run, weights)
        state = run.status()["state"]
    except (ExportError, runs.RunError) as error:
        raise PredictionError(str(error)) from None
    top1 = run.choose_weights(kind)[1]
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
    open_source, `inputs` those of find_images. Raises
    PredictionError.
    """
    check_numbers(top, batch_size, workers)
    entries = find_images(inputs)
    source = open_source(source, weights)
    batches = predict_batches(source, entries, top, batch_size, workers)
    return to_frame([row for rows in batches for row in rows], columns(source, top))


def predict_image(
    source: Source | str | Path, image: Image.Image | str | Path, top: int = 5
) -> pd.DataFrame:
    """The best classes of an image: class, p (float32). Raises ImageError, PredictionError."""
    check_numbers(top)
    if isinstance(image, Image.Image):
        consumer.check_size(*image.size)
        image = Image.fromarray(consumer.upright(image))
    else:
        image = images.decode(Path(image).expanduser())
    source = open_source(source)
    pixels = torch.from_numpy(np.array(source.transform(image))).permute(2, 0, 1)[None]
    zero = torch.zeros(1, dtype=torch.int64)
    batch = data.Batch(pixels, zero, zero, zero, 0, True, 1, [])
    [(names, values)] = _best(source, batch, top).values()
    return pd.DataFrame({"class": names, "p": np.array(values, np.float32)})


def check_numbers(top: int, batch_size: int = 1, workers: int | None = None) -> None:
    """Raises PredictionError for a number that is too small."""
    numbers = (("top", top, 1), ("batch_size", batch_size, 1), ("workers", workers or 0, 0))
    for name, value, least in numbers:
        if value < least:
            raise PredictionError(f"{name} is {value}; it must be {least} or more")


def predict_batches(
    source: Source, entries: list[Entry], top: int, batch_size: int, workers: int | None
) -> Iterator[list[Row]]:
    """Rows of the entries, a list for each batch."""
    if not entries:
        return
    # An entry with an error keeps its position in its batch; nothing is opened for it.
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
    errors = {row: f"{reason}: {detail}" for row, reason, detail in batch.failures}
    best, rows, names = _best(source, batch, top), [], columns(source, top)
    for index, entry in enumerate(entries, start):
        classes, values = best.get(index, ([], []))
        error = entry.error or errors.get(index, "")
        if classes and not np.isfinite(values).all():
            classes, error = [], "not finite: the logits have NaN or infinity"
        given = [*classes, *values] if classes else [None] * (len(names) - 2)
        rows.append(dict(zip(names, [entry.file, *given, error], strict=True)))
    return rows


def _best(source: Source, batch: data.Batch, top: int) -> dict[int, tuple[list[str], list[float]]]:
    """The names of the best classes of each image that was read, and their softmax, by row."""
    if not len(batch.images):
        return {}
    table = inference.predict(source, [batch], lambda images: images, source.device, top=top)
    ids = table.filter(regex=r"^class\d+$").to_numpy()
    values = table.filter(regex=r"^p\d+$").to_numpy()
    names = [printable(name) for name in source.classes]
    return {  # str of a float32 is the shortest text that gives it back
        row: ([names[i] for i in best], [float(str(value)) for value in p])
        for row, best, p in zip(table.row.tolist(), ids, values, strict=True)
    }


def columns(source: Source, top: int) -> list[str]:
    """The columns of a table."""
    numbers = range(1, min(top, len(source.classes)) + 1)
    return ["file", *(f"class{i}" for i in numbers), *(f"p{i}" for i in numbers), "error"]


def to_frame(rows: list[Row], columns: list[str]) -> pd.DataFrame:
    """Rows as a data frame of str and float32."""
    frame = pd.DataFrame(rows, columns=columns, dtype=object)
    return frame.astype({c: np.float32 if c.startswith("p") else "str" for c in columns})
