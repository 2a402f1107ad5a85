"""The same images in every form that can be read: the same batches, byte for byte, for an epoch.

WORKBENCH_CIFAR10 names a tar of CIFAR-10 (cifar10/train/<class>/*.jpg, cifar10/meta/train.txt);
otherwise 300 images are made.
"""

import hashlib
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import save_noise, write_list
from test_tables import by_their_library, imitated

from workbench import data
from workbench.recipe import Recipe
from workbench.training.inputs import train_batches

AUGMENTED = {"crop_scale": [0.3, 1.0], "hflip": 0.5, "randaug_n": 2, "brightness": 0.4}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with train/<class>/<image> and train.txt."""
    folder = tmp_path_factory.mktemp("same")
    if packed := os.environ.get("WORKBENCH_CIFAR10"):
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        (folder / "cifar10/meta/train.txt").rename(folder / "cifar10/train.txt")
        return folder / "cifar10"
    names = ["airplane", "bird", "ship with sails", "zébra"]
    lines = []
    for i in range(300):
        label, file = i // 75, f"{names[i // 75]}/{i:04d}.{('png', 'jpg')[i % 2]}"
        (folder / "train" / names[label]).mkdir(parents=True, exist_ok=True)
        save_noise(folder / "train" / file, seed=i)
        lines.append(f"{file} {label}")
    write_list(folder / "train.txt", *lines)
    return folder


@pytest.fixture(scope="module")
def expected(root) -> tuple[str, list[str], int]:
    return epoch(root)


def epoch(root: Path, **options) -> tuple[str, list[str], int]:
    """SHA-256 of the images and labels of an epoch, the class names, the number of images."""
    options = {"train_root": "train", **options}
    both = {key.replace("train_", "val_"): value for key, value in options.items()}
    recipe = Recipe(dataset="files", data_dir=str(root), batch_size=64, **AUGMENTED,
                    **options, **both)  # fmt: skip
    found, digest = data.load_dataset(recipe), hashlib.sha256()
    steps = data.steps_per_epoch(len(found.train), 64)
    for batch in train_batches(recipe, found, range(steps), workers=2):
        digest.update(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes())
    return digest.hexdigest(), found.classes, len(found.train)


def packed_zip(root: Path, files: list[str]) -> dict:
    options = {"compression": zipfile.ZIP_DEFLATED, "strict_timestamps": False}
    with zipfile.ZipFile(root / "train.zip", "w", **options) as archive:
        for file in files[::-1]:
            archive.write(root / "train" / file, file)
    return {"train_root": "train.zip"}


def packed_tar(root: Path, files: list[str]) -> dict:
    with tarfile.open(root / "train.tar", "w") as archive:
        archive.add(root / "train", "train")
    return {"train_root": "train.tar"}


def table(root: Path, files: list[str], suffix: str) -> dict:
    frame = pd.DataFrame({"file": files, "label": [file.partition("/")[0] for file in files]})
    if suffix == "csv":
        frame.to_csv(root / "train.csv", index=False)
    else:
        frame["file"] = [(root / "train" / file).read_bytes() for file in files]
        frame.to_parquet(root / "train.parquet", index=False)
    return {"train_list": f"train.{suffix}"}


def saved(root: Path, files: list[str], save) -> dict:
    names = sorted({file.partition("/")[0] for file in files})
    rows = [
        {"image": {"bytes": (root / "train" / file).read_bytes(), "path": Path(file).name},
         "label": names.index(file.partition("/")[0]), "camera": ""}
        for file in files
    ]  # fmt: skip
    shutil.rmtree(root / "saved", ignore_errors=True)
    save(root / "saved", rows, names)
    return {"train_root": "saved"}


FORMS = {
    "list": lambda root, files: {"train_list": "train.txt"},
    "csv with names": lambda root, files: table(root, files, "csv"),
    "parquet with bytes": lambda root, files: table(root, files, "parquet"),
    "zip": packed_zip,
    "tar": packed_tar,
    "Arrow streams": lambda root, files: saved(root, files, imitated),
    "Hugging Face": lambda root, files: saved(root, files, by_their_library),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_an_epoch_has_the_batches_of_class_folders(root, expected, form):
    files = [line.rpartition(" ")[0] for line in (root / "train.txt").read_text().splitlines()]
    digest, classes, images = epoch(root, **FORMS[form](root, files))
    assert (digest, images) == (expected[0], len(files))
    assert classes == expected[1] or form == "list"
    print(f"{form}: {images} images, sha256 {digest[:16]}")
