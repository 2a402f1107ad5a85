"""Fixtures of all tests: a cache folder of the session, small images, run folders, commands."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Before workbench is imported anywhere: it reads the folder of its cache once.
os.environ["WORKBENCH_CACHE"] = tempfile.mkdtemp(prefix="workbench-tests-")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch is imported below, before workbench
os.environ.pop("VIRTUAL_ENV", None)  # of another environment IPython would warn
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("WORKBENCH_TEST_DEVICE") != "cuda":  # tests compare bits and float64 on the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# A job in the background ignores it, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
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
    """One thread of torch, as in child processes: sums in the same order."""
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
    """Runs `workbench` with these words in this process."""

    def call(*words) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["workbench", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        (out, err), code = capsys.readouterr(), ended.value.code
        text = code if isinstance(code, str) else ""  # Python prints it and exits with 1
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
    """An image of smooth noise (width x height), another one for each seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_list(path: Path, *rows: str) -> Path:
    """A list file with one row per line."""
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


IMAGES, JUDGED = 400, ["ant", "bee", "cat", "dog"]  # images and classes of run_folder


def run_folder(
    root: Path, name: str, seed: int = 0, *, top1: float = 0.8, n: int = IMAGES, **options
) -> Path:
    """A run folder as training writes it; `top1` of the `n` predictions are correct, with noise."""
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


@pytest.fixture
def logit_cache(tmp_path, monkeypatch) -> Path:
    """An empty folder for caches of teacher logits."""
    monkeypatch.setattr("workbench.distillation.logit_cache.CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "teachers"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Paths of teachers of digits: run, a run with EMA, and wide, an untrained resnet10t."""
    from helpers import TEACHER, train
    from safetensors.torch import save_file

    from workbench import models

    folder = tmp_path_factory.mktemp("teachers")
    run = train(Recipe(name="teacher", runs_dir=str(folder), **TEACHER))
    save_file(models.create("resnet10t", 10, seed=7).state_dict(), folder / "wide.safetensors")
    return {"run": str(run.path), "wide": str(folder / "wide.safetensors")}


@pytest.fixture
def unlistable(monkeypatch):
    """Makes folders of a name impossible to list, also for root."""
    scan = os.scandir

    def refuse(name: str) -> None:
        def closed(path):
            if os.path.basename(path) == name:
                raise PermissionError(13, "Permission denied", path)
            return scan(path)

        monkeypatch.setattr(os, "scandir", closed)

    return refuse
