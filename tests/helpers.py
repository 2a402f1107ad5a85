"""Functions of several tests: trainings, comparisons of runs, images."""

import multiprocessing
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as F

from workbench import ROOT, runs, training

# Children are forked in milliseconds from a process that has imported everything.
fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload(["workbench.training", "workbench.recipe"])

TEACHER = {  # a teacher of digits with an image size and normalisation that are not the defaults
    "train_fraction": 0.25, "epochs": 3, "lr": 0.05, "ema_decay": 0.5, "eval_every": 3,
    "image_size": 24, "val_resize": 24, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.35],
    "workers": 0,
}  # fmt: skip


def train(recipe, **options) -> runs.Run:
    run = runs.Run(recipe.folder)
    list(training.fit(recipe, run, **options))
    return run


def last_step(run: runs.Run) -> int:
    """The last complete row of steps.csv, read in microseconds."""
    try:
        lines = run.file("steps.csv").read_bytes().split(b"\n")[1:-1]
    except OSError:
        return 0
    return int(lines[-1].split(b",")[0]) if lines else 0


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    # timm's optimizers have numbers among their tensors.
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    different = [k for k in ours if not same(ours[k], theirs[k])]
    assert not different, f"differ: {different[:5]}"


def assert_same_run(one: runs.Run, other: runs.Run):
    first, second = one.load_checkpoint(), other.load_checkpoint()
    for part in ("model", "ema", "adapters"):
        assert_same_tensors(first[part] or {}, second[part] or {})
    moments = [
        {(i, k): v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
        for state in (first, second)
    ]
    assert moments[0]
    assert_same_tensors(*moments)
    assert one.file("metrics.csv").read_bytes() == other.file("metrics.csv").read_bytes()
    ignore = ["seconds", "data_wait", *(f"{x}images_per_second" for x in ("", "loader_", "model_"))]
    pd.testing.assert_frame_equal(
        one.steps().drop(columns=ignore), other.steps().drop(columns=ignore), check_exact=True
    )
    pd.testing.assert_frame_equal(one.predictions(), other.predictions(), check_exact=True)


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with edges, as in a photograph."""
    coarse = noise_image(max(2, width // 12), max(2, height // 12), seed)
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def differences(a, b) -> np.ndarray:
    """Absolute differences of two images of the same shape."""
    a, b = np.asarray(a, int), np.asarray(b, int)
    assert a.shape == b.shape
    return np.abs(a - b)


def pillow_operation(image, name: str, value, interpolation: str = "", fill=(0, 0, 0)):
    """An operation of RandAugment or colour jitter by Pillow."""
    resample = Image.Resampling[interpolation.upper()] if interpolation else None

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)

    def point(level):
        return image.point([min(255, max(0, int(level(i)))) for i in range(256)] * 3)

    def inverted(level):
        return level if level < 128 else 255 - level

    return {
        "rotate": lambda: image.rotate(value, resample, fillcolor=fill),
        "shear_x": lambda: affine(1, value, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, value, 1, 0),
        "translate_x": lambda: affine(1, 0, value, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, value),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        # Pillow refuses to posterize to 0 bits
        "posterize": lambda: ImageOps.posterize(image, value) if value else point(lambda i: 0),
        "solarize": lambda: ImageOps.solarize(image, value),
        "solarize_add": lambda: point(lambda i: i + value if i < 128 else i),
        "solarize_add_all": lambda: point(lambda i: inverted(min(255, i + value))),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(value),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(value),
        "saturation": lambda: ImageEnhance.Color(image).enhance(value),
        "color": lambda: ImageEnhance.Color(image).enhance(value),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(value),
        "hue": lambda: F.adjust_hue(image, value),
    }[name]()


# ---- processes of a training

KEYS = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()


def clean(**variables: str) -> dict[str, str]:
    """This environment without launchers, with these variables."""
    rest = {k: v for k, v in os.environ.items() if k not in KEYS and not k.startswith("SLURM_")}
    return {**rest, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def started(recipe, rank: int, code: str = "", **variables: str) -> subprocess.Popen:
    """`workbench train`, after some code."""
    recipe.to_yaml(path := recipe.folder.parent / f"{recipe.name}.yaml")
    code += "\nfrom workbench.__main__ import main; main()"
    command = [sys.executable, "-c", code, "train", str(path)]
    return subprocess.Popen(command, env=clean(**variables), stderr=subprocess.PIPE, text=True)


def on_one_node(recipe, code: str = "") -> list[subprocess.Popen]:
    """Two processes with the variables of torchrun."""
    same = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    same["MASTER_PORT"] = free_port()
    own = lambda rank: {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return [started(recipe, rank, code, **same, **own(rank)) for rank in range(2)]


def codes(processes: list[subprocess.Popen]) -> list[int]:
    """Exit codes; whatever is left after two minutes is killed."""
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any("Traceback" in text for text in said), said
    return [process.returncode for process in processes]
