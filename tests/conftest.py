"""A cache of its own for the whole session, and a small folder of images for every test."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Before workbench is imported anywhere: it reads the place of its cache once.
os.environ["WORKBENCH_CACHE"] = tempfile.mkdtemp(prefix="workbench-tests-")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch is imported below, before workbench
os.environ.pop("VIRTUAL_ENV", None)  # of another environment IPython would warn
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
atexit.register(shutil.rmtree, os.environ["WORKBENCH_CACHE"], ignore_errors=True)

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from workbench.__main__ import main  # noqa: E402
from workbench.recipe import Recipe  # noqa: E402

CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def one_thread():
    """The same sums here and in the children, and no fight for the cores over tiny images."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64(monkeypatch):
    """Trains in float64, by the same code: the order of a sum then changes 1e-16 of it.

    In float32 two trainings of one recipe need bounds that depend on the processor's kernels.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `workbench` with these words in this process, where torch is imported already."""

    def call(*words) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["workbench", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        (out, err), code = capsys.readouterr(), ended.value.code
        text = code if isinstance(code, str) else ""  # which Python prints before it ends with 1
        return subprocess.CompletedProcess(words, 1 if text else code or 0, out, err + text)

    return call


def in_float64() -> None:
    """The fixture float64 for the rest of a child process."""
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder with train/<a|b|c>/0..5.png and val/<a|b|c>/0..1.png, 40 x 32 pixels."""
    root = tmp_path / "images"
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                save_noise(root / part / name / f"{i}.png", seed=[label, i, part == "val"])
    return root


def save_noise(path: Path, seed, size: tuple[int, int] = (40, 32)) -> Path:
    """An image of smooth noise (width x height) that no other seed gives; the suffix decides."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_list(path: Path, *rows: str) -> Path:
    """A list file with one row per line."""
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


IMAGES, JUDGED = 400, ["ant", "bee", "cat", "dog"]  # of the runs that run_folder makes up


def run_folder(
    root: Path, name: str, seed: int = 0, *, top1: float = 0.8, n: int = IMAGES, **options
) -> Path:
    """A run as training leaves it: of `n` images the first ones are right, but for some luck."""
    path = root / f"{name[:60]}-seed{seed}"
    path.mkdir(parents=True)
    Recipe(name=name, seed=seed, runs_dir=str(root), **options).to_yaml(path / "recipe.yaml")
    rng = np.random.default_rng([seed, len(name)])
    label = np.arange(n) % 4
    right = np.arange(n) < n * (top1 + rng.normal(0, 0.004))
    right ^= rng.random(n) < 0.02
    frame = pd.DataFrame({"weights": "raw", "file": [f"{i}.png" for i in range(n)], "list": 0})
    frame["row"], frame["label"] = np.arange(n), label
    for k in range(4):
        frame[f"class{k + 1}"] = ((label + k + ~right) % 4).astype(np.int32)
    frame["p1"] = rng.uniform(0.5, 1, n).astype(np.float32)
    frame.to_parquet(path / "predictions.parquet", index=False)
    environment = {"classes": JUDGED, "seconds": 60.0, "device": "a CPU", "data": "d"}
    (path / "environment.json").write_text(json.dumps({**environment, "val_data": "v"}))
    (path / "status.json").write_text(json.dumps({"state": "finished"}))
    metrics = pd.DataFrame({"epoch": [1, 2], "step": [2, 4], "top1": [50.0, 80.0]})
    metrics.to_csv(path / "metrics.csv", index=False)
    steps = pd.DataFrame({"step": [1, 2, 3], "images_per_second": [10.0, 300.0, 310.0]})
    steps.to_csv(path / "steps.csv", index=False)
    return path
