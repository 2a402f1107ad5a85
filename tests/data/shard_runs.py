"""Servers of shards in processes of their own, and trainings from them, for tests."""

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from shard_helpers import pack_list

from workbench import data, runs
from workbench.data import toy
from workbench.recipe import Recipe

SIDES = {"train": 6, "val": 3}  # shards
TRAINING = {
    "train_fraction": 0.25, "epochs": 2, "image_size": 16, "val_resize": 16,
    "crop_scale": [0.5, 1.0], "hflip": 0.5, "brightness": 0.4, "ema_decay": 0.9,
    "lr": 0.05, "log_every": 1, "workers": 2,
}  # fmt: skip


@contextlib.contextmanager
def started(*words: str | Path) -> Iterator[str]:
    """The URL of shard_server.py, started with these words."""
    command = [sys.executable, str(Path(__file__).with_name("shard_server.py")), *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def requests(server: str) -> int:
    """How many ranges the server has been asked for."""
    with urllib.request.urlopen(f"{server}/ranges") as answer:
        return json.load(answer)


def faults(server: str, count: int | str = "") -> dict:
    """Lets the server damage this many requests; returns how many it has damaged."""
    with urllib.request.urlopen(f"{server}/faults{f'?{count}' if count != '' else ''}") as answer:
        return json.load(answer)


def pack_sides(folder: Path) -> Path:
    """A folder with the digits as shards in the order of their lists, and indexes: local_SIDE."""
    files = toy.embedded("digits")
    for side, count in SIDES.items():
        listed = files / "meta" / f"{side}.txt"
        made = pack_list(listed, files / side, folder / side, count)
        data.write_index([str(path) for path in made], folder / f"local_{side}.arrow")
    return folder


def recipe(folder: Path, kind: str, runs_dir: Path, **options) -> Recipe:
    """A short training from files (kind "files"), or of the indexes of this name."""
    lists = {f"{side}_list": [str(folder / f"{kind}_{side}.arrow")] for side in SIDES}
    where = toy.as_files("digits") if kind == "files" else lists
    options = {**TRAINING, "name": kind, "runs_dir": str(runs_dir), **where, **options}
    return Recipe(dataset="files", **options)


def weights(run: runs.Run) -> dict:
    return run.load_checkpoint()["model"]


def batches(options: Recipe) -> list:
    from workbench import training

    content = data.load_dataset(options)
    found = training.inputs.train_batches(options, content, range(12), workers=2)
    return [(batch.images, batch.labels, batch.indices) for batch in found]


def start(options: Recipe, folder: Path, **env) -> subprocess.Popen:
    options.to_yaml(folder / "recipe.yaml")
    command = [sys.executable, "-m", "workbench", "train", str(folder / "recipe.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
