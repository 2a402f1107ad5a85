"""Images annotated with their predicted class."""

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from workbench import data, shard_store
from workbench.data import images
from workbench.export.inputs import Entry, PredictionError

LONG_SIDE, FONT_SIZE = 512, 16  # pixels


def annotate(image: Image.Image, name: str, p: float) -> Image.Image:
    """The image, at most LONG_SIDE pixels long, above a band with class name and softmax."""
    shown, font = image.copy(), _font()
    shown.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    text = f"{' '.join(name.split())}  {100 * p:.1f} %"
    width = max(shown.width, int(font.getlength(text)) + FONT_SIZE)
    sheet = Image.new("RGB", (width, shown.height + 2 * FONT_SIZE), "white")
    sheet.paste(shown, ((width - shown.width) // 2, 0))
    middle = (width / 2, shown.height + FONT_SIZE)
    ImageDraw.Draw(sheet).text(middle, text, fill="black", font=font, anchor="mm")
    return sheet


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(fonts / "DejaVuSans.ttf", FONT_SIZE)


def annotation_paths(
    entries: list[Entry], inputs: Sequence[str | Path], folder: str | Path | None
) -> list[Path | None]:
    """The path of each annotated image: its name below the folder. None for each without a folder.

    Raises PredictionError if an input or another annotated image would be overwritten, or if the
    images would be inputs of the next call.
    """
    if folder is None:
        return [None] * len(entries)
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    sources: dict[Path, str] = {}
    targets = []
    for path in inputs:
        if os.path.isdir(path) and folder.is_relative_to(os.path.realpath(path)):
            raise PredictionError(f"annotate_dir {folder} is in the input {path}; choose another")
    for entry in entries:
        path = os.path.realpath(entry.path)
        if Path(path).is_relative_to(folder):
            raise PredictionError(f"{entry.path} is in annotate_dir {folder}; choose another")
        parts = [part for part in entry.file.split("/") if part not in ("", ".", "..")]
        target = folder.joinpath(*parts)
        if target.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            target = target.with_name(target.name + ".jpg")
        if (other := sources.setdefault(target, path)) != path:
            raise PredictionError(f"{path} and {other} would both be annotated as {target}")
        targets.append(target)
    for parent in {target.parent for target in targets}:
        if os.path.realpath(parent) != str(parent):
            raise PredictionError(f"{parent} is below a link; choose another annotate_dir")
    return targets


def annotate_batch(
    entries: list[Entry], targets: list[Path | None], rows: list[dict[str, Any]]
) -> None:
    """Writes the annotated images of a batch. Existing files are replaced. Raises OSError."""
    todo = [t for t in zip(entries, targets, rows, strict=True) if t[1] and not t[2]["error"]]
    contents = shard_store.read([entry.path for entry, *_ in todo])
    with ThreadPoolExecutor(data.available_cpus()) as pool:
        list(pool.map(lambda pair: _write(*pair[0], pair[1]), zip(todo, contents, strict=True)))


def _write(entry: Entry, target: Path, row: dict[str, Any], content: bytes | None) -> None:
    try:
        sheet = annotate(images.decode(entry.path, content), row["class1"], row["p1"])
    except images.ImageError:
        return  # removed after its prediction
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a link is not followed
    sheet.save(target, "PNG" if target.suffix.lower() == ".png" else "JPEG", quality=90)
