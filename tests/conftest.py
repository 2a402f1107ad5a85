"""A cache of its own for the whole session, and a small folder of pictures for every test."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before workbench is imported anywhere: it reads the place of its cache once.
os.environ["WORKBENCH_CACHE"] = tempfile.mkdtemp(prefix="workbench-tests-")
atexit.register(shutil.rmtree, os.environ["WORKBENCH_CACHE"], ignore_errors=True)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

CLASSES = ("a", "b", "c")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with train/<a|b|c>/0..5.png and val/<a|b|c>/0..1.png, 40 x 32 pixels."""
    root = tmp_path / "pictures"
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                save_noise(root / part / name / f"{i}.png", seed=[label, i, part == "val"])
    return root


def save_noise(path: Path, seed, size: tuple[int, int] = (40, 32)) -> Path:
    """A picture of smooth noise (width x height) that no other seed gives; the suffix decides."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_list(path: Path, *rows: str) -> Path:
    """A list file with one row per line."""
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path
