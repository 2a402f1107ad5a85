"""The embedded data sets, digits and letters: folders of images with lists, made at first use."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from workbench import CACHE
from workbench.data.dataset import DataError

Entry = tuple[str, str, int, Image.Image]  # side, file, label, pixels


def as_files(name: str) -> dict[str, str | list[str]]:
    """The options of `dataset: files` that describe an embedded set."""
    lists = {f"{side}_list": [f"meta/{side}.txt"] for side in ("train", "val")}
    root = {"digits": digits, "letters": letters}[name]()
    return {"data_dir": str(root), "class_names": "classes.txt", **lists}


def digits() -> Path:
    """The folder of scikit-learn's 1,797 handwritten digits as 8x8 PNG.

    1,297 for training and 500 (50 a class) for validation, a split that never changes. Source:
    Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI 1998, its test part.
    """
    return _embedded("digits-1", _make_digits, [str(d) for d in range(10)])


def _make_digits() -> Iterator[Entry]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    rank = np.random.Generator(np.random.Philox(key=0)).permutation(len(pixels))
    taken = [0] * 10
    for i in np.argsort(rank).tolist():
        label = int(bunch.target[i])
        side = "val" if taken[label] < 50 else "train"
        taken[label] += 1
        yield side, f"{label}/{i:04d}.png", label, Image.fromarray(pixels[i])


# Families are whole: no face of a validation family is in training.
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

    Training and validation have no font family in common.
    """
    return _embedded("letters-1", _make_letters, [chr(97 + i) for i in range(26)])


def _make_letters() -> Iterator[Entry]:
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    faces = [(side, name) for side, names in _LETTER_FONTS.items() for name in names.split()]
    for side, name in faces:
        for size in (18, 22, 26):
            font = ImageFont.truetype(fonts / f"{name}.ttf", size)
            for label in range(26):
                for case, letter in (("u", chr(65 + label)), ("l", chr(97 + label))):
                    image = Image.new("L", (32, 32), 255)
                    ImageDraw.Draw(image).text((16, 16), letter, fill=0, font=font, anchor="mm")
                    yield side, f"{chr(97 + label)}/{name}-{size}-{case}.png", label, image


def _embedded(name: str, make: Callable[[], Iterator[Entry]], classes: list[str]) -> Path:
    """The finished folder; it is written beside its place and renamed, safe for two processes."""
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
        lines = {"train": "", "val": ""}
        for side, file, label, image in make():
            path = temporary / side / file
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            lines[side] += f"{file} {label}\n"
        (temporary / "meta").mkdir()
        for side, text in lines.items():
            (temporary / "meta" / f"{side}.txt").write_text(text, encoding="utf-8")
        (temporary / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
        os.chmod(temporary, 0o755)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
