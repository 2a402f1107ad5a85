"""The embedded data sets, digits and letters: folders of images with lists, made at first use."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from workbench import CACHE

Entry = tuple[str, str, int, Image.Image]  # side, file, label, pixels
VERSION = 1  # of the files


def as_files(name: str) -> dict[str, str | list[str]]:
    """The options of `dataset: files` that describe an embedded set."""
    lists = {f"{side}_list": [f"meta/{side}.txt"] for side in ("train", "val")}
    return {"data_dir": str(embedded(name)), "class_names": "classes.txt", **lists}


def digits() -> Iterator[Entry]:
    """scikit-learn's 1,797 handwritten digits as 8x8 pixels.

    1,297 for training and 500 (50 a class) for validation, a split that never changes. Source:
    Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI 1998, its test part.
    """
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


def letters() -> Iterator[Entry]:
    """26 letters, upper and lower case, drawn from matplotlib's fonts as 32x32 pixels.

    Training and validation have no font family in common.
    """
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


def embedded(name: str) -> Path:
    """The folder of digits or letters, renamed when it is complete: safe for two processes."""
    folder = CACHE / f"{name}-{VERSION}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=f".{name}.") as temporary:
        made, lines, classes = Path(temporary, name), {"train": [], "val": []}, set()
        (made / "meta").mkdir(parents=True)
        for side, file, label, image in {"digits": digits, "letters": letters}[name]():
            path = made / side / file
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            lines[side].append(f"{file} {label}\n")
            classes.add(path.parent.name)
        for side in lines:
            (made / "meta" / f"{side}.txt").write_text("".join(lines[side]))
        (made / "classes.txt").write_text("\n".join(sorted(classes)) + "\n")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder
