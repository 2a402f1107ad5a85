"""Bad input: a sentence to act on or an image set aside by name, and no run is harmed."""

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import CLASSES, save_noise, write_list
from PIL import Image
from torch.nn import functional as F

from workbench import data, doctor, models, runs, training
from workbench.data import DataError
from workbench.models import ModelError
from workbench.recipe import Recipe, RecipeError, runtime_only
from workbench.runs import RunError
from workbench.training import TrainingError
from workbench.ui import widgets

TRAIN = [f"{name}/{i}.png" for name in CLASSES for i in range(6)]
VAL = [f"{name}/{i}.png" for name in CLASSES for i in range(2)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stopped_world(tmp_path_factory) -> Path:
    """images/ with lists of 18 and 6, runs/first-seed0 stopped after one of two epochs."""
    world = tmp_path_factory.mktemp("world")
    for side, files in (("train", TRAIN), ("val", VAL)):
        for i, file in enumerate(files):
            path = world / "images" / side / file
            path.parent.mkdir(parents=True, exist_ok=True)
            save_noise(path, seed=[i, side == "val"], size=(24 + i % 17, 32))
        rows = [f"{file} {CLASSES.index(file[0])}" for file in files]
        write_list(world / "images" / f"{side}.txt", *rows)
    recipe = small(world, name="first")
    with contextlib.closing(training.fit(recipe, runs.Run(recipe.folder))) as rows:
        next(row for row in rows if row["kind"] == "epoch")
    assert runs.Run(recipe.folder).status()["state"] == "stopped"
    return world


@pytest.fixture
def world(stopped_world, tmp_path) -> Path:
    """A copy of its own for every test."""
    return Path(shutil.copytree(stopped_world, tmp_path / "world"))


def small(world: Path, **changes) -> Recipe:
    """Three steps an epoch. What changes the weights gets a run of its own, the rest goes on."""
    options = {
        "name": "first" if set(changes) <= runtime_only else "new",
        "dataset": "files",
        "data_dir": str(world / "images"),
        "train_list": ["train.txt"],
        "val_list": ["val.txt"],
        "image_size": 16,
        "val_resize": 16,
        "model": "test_resnet",
        "epochs": 2,
        "batch_size": 6,
        "lr": 0.05,
        "log_every": 1,
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
        "runs_dir": str(world / "runs"),
    }
    return Recipe(**{**options, **changes})


def train(recipe: Recipe, **options) -> runs.Run:
    run = runs.Run(recipe.folder)
    for _ in training.fit(recipe, run, **options):
        pass
    return run


def record(run: Path) -> dict[str, bytes]:
    """Every byte of a run's record; its status may say that something failed meanwhile."""
    return {
        path.name: path.read_bytes()
        for path in sorted(run.iterdir())
        if path.is_file() and path.name not in ("status.json", "lock")
    }


# ---- making bad input


def listed(world, *rows, text=None, **changes):
    """Rewrites train.txt."""
    path = world / "images" / "train.txt"
    write_list(path, *rows) if text is None else path.write_bytes(text)
    return changes


def first_row(world, row, **changes):
    """Replaces the first row of train.txt."""
    rows = (world / "images" / "train.txt").read_text().splitlines()
    return listed(world, row, *rows[1:], **changes)


def without(world, path, **changes):
    """Removes a file or a folder."""
    path = world / path
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return changes


def written(world, path, content, **changes):
    """Writes bytes or text to a file."""
    content = content if isinstance(content, bytes) else content.encode()
    (world / path).write_bytes(content)
    return changes


def cut(world, path, share=0.5, **changes):
    """Keeps the first part of a file."""
    content = (world / path).read_bytes()
    return written(world, path, content[: int(len(content) * share)], **changes)


def folder_for(world, path, **changes):
    """Puts an empty folder where a file was."""
    without(world, path)
    (world / path).mkdir()
    return changes


def saved(world, content, **changes):
    """weights.pt with this content."""
    torch.save(content, world / "weights.pt")
    return {"weights": str(world / "weights.pt"), **changes}


def broken(world, side, files, **changes):
    """Images that hold text."""
    for file in files:
        written(world, f"images/{side}/{file}", "<html>404 Not Found</html>")
    return changes


def state_of_test_resnet(**changes):
    return {**models.create("test_resnet", 3).state_dict(), **changes}


class RunsCode:
    """A pickle that would leave a file named `ran`."""

    def __init__(self, world):
        self.path = str(world / "ran")

    def __reduce__(self):
        return open, (self.path, "w")


FOLDERS = {"train_list": [], "val_list": []}  # class folders instead of lists


def named(world, there, here, **changes):
    """The run knows classes by these names, the data now call them otherwise."""
    path = world / "runs" / "first-seed0" / "environment.json"
    environment = json.loads(path.read_text())
    path.write_text(json.dumps({**environment, "classes": there.split()}))
    write_list(world / "images" / "names.txt", *here.split())
    return {"class_names": "names.txt", **changes}


def resumed(world, **changes):
    """A longer training from the run."""
    return {"resume_from": str(world / "runs" / "first-seed0"), "epochs": 3, **changes}


def shifted(world, only="abc", **changes):
    """Every label of these classes is the next one, in both lists."""
    for side, files in (("train", TRAIN), ("val", VAL)):
        rows = [f"{f} {(CLASSES.index(f[0]) + (f[0] in only)) % 3}" for f in files]
        write_list(world / "images" / f"{side}.txt", *rows)
    return changes


def renamed(world, **changes):
    """A class folder has another name, which changes the order of the classes."""
    for side in ("train", "val"):
        (world / "images" / side / "a").rename(world / "images" / side / "z")
    return {**changes, **FOLDERS}


# kind of bad input: (builder of the input, error, words of its message)
REFUSED = {
    # lists
    "list missing": (
        lambda w: without(w, "images/train.txt"),
        DataError,
        ["train.txt", "is not there"],
    ),
    "list empty": (lambda w: listed(w, text=b""), DataError, ["train.txt", "is empty"]),
    "list of blank lines": (lambda w: listed(w, "", "  ", "\r"), DataError, ["is empty"]),
    "list parted by tabs": (
        lambda w: first_row(w, "a/0.png\t0"),
        DataError,
        ["line 1", "by a space, not a tab"],
    ),
    "label in words": (
        lambda w: first_row(w, "a/0.png cat"),
        DataError,
        ["line 1", "'cat'", "no whole number"],
    ),
    "label with a fraction": (
        lambda w: first_row(w, "a/0.png 1.5"),
        DataError,
        ["line 1", "'1.5'", "no whole number"],
    ),
    "label negative": (
        lambda w: first_row(w, "a/0.png -1"),
        DataError,
        ["-1", "'a/0.png'", "count from 0"],
    ),
    "label above num_classes": (
        lambda w: first_row(w, "a/0.png 7", num_classes=3),
        DataError,
        ["7 for 'a/0.png'", "outside 0 to 2"],
    ),
    "label above the class names": (
        lambda w: written(w, "images/names.txt", "cat\ndog\n", class_names="names.txt"),
        DataError,
        ["outside 0 to 1"],
    ),
    "label far above any count of classes": (
        lambda w: first_row(w, "a/0.png 200000"),
        DataError,
        ["a/0.png", "num_classes"],
    ),
    "many bad lines": (
        lambda w: listed(w, *["nolabel"] * 18),
        DataError,
        ["line 1", "line 5", "and 13 more"],
    ),
    "JSON broken in line 3": (
        lambda w: listed(w, *['{"filename": "a/0.png", "label": 0}'] * 2, '{"filename": "a/'),
        DataError,
        ["line 3", "JSON"],
    ),
    "JSON without filename": (
        lambda w: listed(w, '{"image": "a/0.png", "label": 0}'),
        DataError,
        ["line 1", "filename"],
    ),
    "JSON with a label for each of two heads": (
        lambda w: listed(w, '{"filename": "a/0.png", "label": [0, 1]}'),
        DataError,
        ["line 1", "several heads"],
    ),
    "JSON label null": (
        lambda w: listed(w, '{"filename": "a/0.png", "label": null}'),
        DataError,
        ["line 1", "None is no whole number"],
    ),
    "list in another encoding": (
        lambda w: listed(w, text="größe.png 0\n".encode("latin-1")),
        DataError,
        ["train.txt", "cannot be read", "utf-8"],
    ),
    "folder for a list": (
        lambda w: folder_for(w, "images/train.txt"),
        DataError,
        ["train.txt", "cannot be read", "directory"],
    ),
    "entry that climbs out of its root": (
        lambda w: first_row(w, "../val/a/0.png 0"),
        DataError,
        ["outside of their root", "'../val/a/0.png'", "allow_outside_root: true"],
    ),
    "entry with an absolute path": (
        lambda w: first_row(w, "/etc/hostname 0"),
        DataError,
        ["outside of their root", "'/etc/hostname'"],
    ),
    "zero byte in a name": (
        lambda w: first_row(w, "a/\0.png 0"),
        DataError,
        ["line 1", "zero byte"],
    ),
    "two lists with three roots": (
        lambda w: {"train_list": ["train.txt"] * 2, "train_root": ["train"] * 3},
        RecipeError,
        ["3 roots for 2 lists"],
    ),
    "class names missing": (
        lambda w: {"class_names": "names.txt"},
        DataError,
        ["names.txt", "cannot be read"],
    ),
    # images
    "no training image can be read": (
        lambda w: broken(w, "train", TRAIN),
        DataError,
        ["train: 18 of 18", "check-data"],
    ),
    "more than a fifth cannot be read": (
        lambda w: broken(w, "train", TRAIN[:4]),
        DataError,
        ["train: 4 of 18", "a/0.png", "undecodable"],
    ),
    "no validation image can be read": (
        lambda w: broken(w, "val", VAL),
        DataError,
        ["val: 6 of 6", "check-data"],
    ),
    # folders
    "data_dir not given": (lambda w: {"data_dir": ""}, DataError, ["data_dir is missing"]),
    "data_dir missing": (
        lambda w: {"data_dir": str(w / "nowhere")},
        DataError,
        ["nowhere", "is no folder", "data_dir"],
    ),
    "data_dir a file": (
        lambda w: {"data_dir": str(w / "images" / "train.txt")},
        DataError,
        ["train.txt", "is no folder"],
    ),
    "train_root missing": (
        lambda w: {"train_root": ["trian"]},
        DataError,
        ["trian", "data_dir holds ['train', 'val']"],
    ),
    "val_root missing": (
        lambda w: without(w, "images/val", **FOLDERS),
        DataError,
        ["val_root", "val_fraction"],
    ),
    "no class folders": (
        lambda w: {"train_root": ["train/a"], **FOLDERS},
        DataError,
        ["no images in class folders", "<class name>/<image>"],
    ),
    "class of validation unknown in training": (
        lambda w: without(w, "images/train/b", **FOLDERS),
        DataError,
        ["['b']", "not in training"],
    ),
    "one image in a class that is to be divided": (
        lambda w: (
            [without(w, f"images/train/a/{i}.png") for i in range(1, 6)]
            and {**FOLDERS, "val_fraction": 0.2}
        ),
        DataError,
        ["one image", "val_fraction"],
    ),
    "runs_dir below a file": (
        lambda w: {"runs_dir": str(w / "images" / "train.txt" / "runs")},
        RunError,
        ["cannot write", "choose another runs_dir"],
    ),
    "runs_dir where nothing can be made": (
        lambda w: {"runs_dir": "/proc/runs"},
        RunError,
        ["cannot write /proc/runs", "choose another runs_dir"],
    ),
    "run folder a file": (
        lambda w: written(w, "runs/new-seed0", "", seed=0, lr=0.01),
        RunError,
        ["cannot write", "new-seed0"],
    ),
    # recipes
    "option unknown": (lambda w: {"learning_rate": 0.1}, RecipeError, ["learning_rate", "'lr'"]),
    "several problems at once": (
        lambda w: {"epoch": 3, "lr": -1, "model": ["x"], "milestones": [1]},
        RecipeError,
        [
            "4 problems",
            "'epochs'",
            "lr: -1",
            "model: ['x']",
            "milestones: [1] has no effect",
        ],
    ),
    "option that would change nothing": (
        lambda w: {"optimizer": "adamw", "nesterov": True},
        RecipeError,
        ["nesterov", "has no effect", "adamw"],
    ),
    "number in words": (lambda w: {"epochs": "many"}, RecipeError, ["epochs: 'many'", "integer"]),
    "lr nan": (lambda w: {"lr": float("nan")}, RecipeError, ["lr", "finite"]),
    "model unknown": (
        lambda w: {"model": "test_resnett"},
        ModelError,
        ["no model 'test_resnett'", "test_resnet"],
    ),
    "drop_path on a model without it": (
        lambda w: {"model": "vgg11", "drop_path": 0.1},
        ModelError,
        ["vgg11 cannot be created", "drop_path_rate"],
    ),
    "batches of one with batch norm": (
        lambda w: {"batch_size": 1},
        TrainingError,
        ["one image", "batch norm", "batch_size to 2 or more"],
    ),
    "last batch of one with batch norm": (
        lambda w: {"batch_size": 17},
        TrainingError,
        ["18 images, batch_size 17", "drop_last: true"],
    ),
    "batch larger than the data with drop_last": (
        lambda w: {"batch_size": 19, "drop_last": True},
        TrainingError,
        ["batch_size 19", "18 training images", "drop_last"],
    ),
    # weights to start from
    "weights missing": (
        lambda w: {"weights": str(w / "none.pt")},
        ModelError,
        ["none.pt", "not there"],
    ),
    "weights truncated": (
        lambda w: cut(w, "weights.pt", **saved(w, state_of_test_resnet())),
        ModelError,
        ["weights.pt is truncated"],
    ),
    "weights that are code": (
        lambda w: written(w, "w.pt", pickle.dumps(RunsCode(w)), weights=str(w / "w.pt")),
        ModelError,
        ["w.pt", "not run here"],
    ),
    "weights of another model": (
        lambda w: saved(w, models.create("test_convnext", 3).state_dict()),
        ModelError,
        ["fits 0 of", "another model"],
    ),
    "weights with a nan": (
        lambda w: saved(
            w,
            {
                name: value * float("nan") if name.endswith("conv1.weight") else value
                for name, value in state_of_test_resnet().items()
            },
        ),
        ModelError,
        ["conv1.weight", "nan"],
    ),
    "weights without a tensor": (
        lambda w: saved(w, {"epoch": 3}),
        ModelError,
        ["no state dict", "epoch"],
    ),
    "safetensors garbage": (
        lambda w: written(w, "w.safetensors", "x" * 99, weights=str(w / "w.safetensors")),
        ModelError,
        ["w.safetensors", "no readable safetensors"],
    ),
    "run folder without weights": (
        lambda w: {"weights": str(w / "images")},
        ModelError,
        ["images is no run folder", "last.pt"],
    ),
    # runs to go on from
    "last.pt truncated": (
        lambda w: cut(w, "runs/first-seed0/last.pt"),
        RunError,
        ["last.pt cannot be read", "move it away"],
    ),
    "last.pt empty": (
        lambda w: written(w, "runs/first-seed0/last.pt", b""),
        RunError,
        ["last.pt cannot be read", "move it away"],
    ),
    "last.pt that is code": (
        lambda w: written(w, "runs/first-seed0/last.pt", pickle.dumps(RunsCode(w))),
        RunError,
        ["last.pt cannot be read"],
    ),
    "last.pt with other contents": (
        lambda w: torch.save([1, 2], w / "runs/first-seed0/last.pt") or {},
        RunError,
        ["last.pt does not fit"],
    ),
    "recipe.yaml not text": (
        lambda w: written(w, "runs/first-seed0/recipe.yaml", b"\xff\xfe\x00"),
        RunError,
        ["first-seed0 is no readable run"],
    ),
    "recipe.yaml a list": (
        lambda w: written(w, "runs/first-seed0/recipe.yaml", "[1, 2]\n"),
        RunError,
        ["first-seed0 is no readable run"],
    ),
    "environment.json cut off": (
        lambda w: cut(w, "runs/first-seed0/environment.json"),
        RunError,
        ["first-seed0", "environment.json"],
    ),
    "resume_from with other batches": (
        lambda w: {"resume_from": str(w / "runs/first-seed0"), "batch_size": 9},
        RunError,
        ["an epoch had 3 steps, now 2"],
    ),
    "resume_from another model": (
        lambda w: {"resume_from": str(w / "runs/first-seed0"), "model": "resnet10t"},
        RunError,
        ["last.pt does not fit", "`weights`"],
    ),
    "resume_from another optimizer": (
        lambda w: {"resume_from": str(w / "runs/first-seed0"), "optimizer": "adamw"},
        RunError,
        ["last.pt does not fit", "`weights`"],
    ),
    "resume_from a run that is past the end": (
        lambda w: {"resume_from": str(w / "runs/first-seed0"), "epochs": 1},
        RunError,
        ["is at step 3", "ends at 3"],
    ),
    "resume_from a folder without a checkpoint": (
        lambda w: {"resume_from": str(w / "images")},
        RunError,
        ["resume_from", "has no last.pt"],
    ),
    "another recipe under the same name": (
        lambda w: {"name": "first", "lr": 0.01},
        RunError,
        ["another recipe", "lr: 0.05 there, 0.01 here", "another name"],
    ),
    "a run where none is wanted": (
        lambda w: {"auto_resume": False},
        RunError,
        ["has a run already", "auto_resume is false"],
    ),
    "another image since the run started": (
        lambda w: save_noise(w / "images/train/a/0.png", seed=99) and {},
        RunError,
        ["data changed", "first-seed0"],
    ),
    "an image fewer since the run started": (
        lambda w: without(w, "images/train/a/0.png"),
        RunError,
        ["data changed", "first-seed0"],
    ),
    "resuming after a class was renamed": (
        lambda w: resumed(w, **named(w, "cat dog emu", "cat dog owl")),
        RunError,
        ["first-seed0", "'emu' there, 'owl' here"],
    ),
    "resuming after classes changed places": (
        lambda w: resumed(w, **named(w, "cat dog emu", "dog cat emu")),
        RunError,
        ["first-seed0", "'cat' there, 'dog' here; 'dog' there, 'cat' here"],
    ),
    "resuming after numbers changed places": (
        lambda w: resumed(w, **named(w, "0 1 2", "1 0 2")),
        RunError,
        ["first-seed0", "'0' there, '1' here"],
    ),
    "resuming after class folders were renamed": (
        lambda w: named(w, "a b c", "") and renamed(w, **resumed(w)),
        RunError,
        ["first-seed0", "'a' there, 'b' here"],
    ),
    "resuming after labels changed places": (
        lambda w: shifted(w, **resumed(w)),
        TrainingError,
        ["first-seed0", "6 of 6 validation images have another label"],
    ),
    "resuming after one of three classes got another label": (
        lambda w: shifted(w, only="a", **resumed(w)),
        TrainingError,
        ["first-seed0", "2 of 6 validation images have another label"],
    ),
    "a list whose folders have the names of other classes": (
        lambda w: named(w, "a b c", "b a c", name="new"),
        DataError,
        ["folder 'a' have label 0", "class 0 is 'b'"],
    ),
    "one class": (
        lambda w: listed(w, "a/0.png 0") or listed(w, "a/0.png 0", val_list=["train.txt"]),
        DataError,
        ["one class"],
    ),
    "another label since the run started": (
        lambda w: first_row(w, "a/0.png 1"),
        RunError,
        ["data changed", "first-seed0"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_in_words_and_an_existing_run_loses_nothing(world, kind):
    build, error, words = REFUSED[kind]
    changes = build(world)
    before = record(world / "runs" / "first-seed0")
    assert {"metrics.csv", "last.pt", "best.safetensors"} <= before.keys()
    with pytest.raises(error) as caught:
        train(small(world, **changes))
    assert caught.type is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert record(world / "runs" / "first-seed0") == before
    assert not (world / "runs" / "new-seed0" / "last.pt").exists()
    assert not (world / "ran").exists()  # no code from a file


def test_a_run_goes_on_only_with_its_own_class_names(world):
    """Its own folder, begun and finished; the images are the same, their names are not."""
    write_list(world / "images" / "names.txt", "cat", "dog", "emu")
    recipe = small(world, name="named", class_names="names.txt", epochs=1)
    train(recipe)
    write_list(world / "images" / "names.txt", "dog", "cat", "emu")
    for state in ("finished", "stopped"):
        run = runs.Run(recipe.folder)
        with run.writing():
            run.set_status(state)
        with pytest.raises(RunError, match="'cat' there, 'dog' here"):
            train(recipe)


def test_training_and_the_doctor_name_what_was_passed_over_and_empty_classes(world, command):
    (world / "images/train/d").mkdir()
    (world / "images/train/a/notes.txt").touch()
    recipe = small(world, name="new", epochs=1, **FOLDERS)
    recipe.to_yaml(world / "recipe.yaml")
    run = train(recipe)
    shown = run.environment()
    assert "1 files or folders passed over: a/notes.txt (no image)" in shown["skipped_files"]
    assert shown["empty_classes"] == ["d"]
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        progress = widgets.Progress(run)
        progress.show({"kind": "step", "step": 1, "steps": 3, "epoch": 0, "lr": 0.1, "loss": 1.0,
                       "seconds": 1.0, "images_per_second": 1.0})  # fmt: skip
        progress.close()
    assert "a/notes.txt (no image)" in lines.getvalue()
    done = command("doctor", world / "recipe.yaml")
    assert "a/notes.txt (no image)" in done.stdout
    assert "1 of 4 classes have no training image" in done.stdout


def test_the_doctor_refuses_one_class():
    with pytest.raises(DataError, match="there is 1 class"):
        doctor.examine(Recipe(), images=10, classes=1)


def test_at_least_thirty_six_kinds_are_tried():
    assert len(REFUSED) + len(SET_ASIDE) >= 36


# ---- images


def encoded(image, name, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def noise(*shape, dtype=np.uint8):
    return np.random.default_rng(7).integers(0, 256, shape).astype(dtype)


def png_header(width, height) -> bytes:
    """A PNG that claims a size and holds nothing of it."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [header, content, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


def swapped(world, content, suffix=".png", side="train"):
    """Another content, and suffix, for the first image of a side."""
    folder = world / "images"
    (folder / side / "a" / "0.png").unlink()
    (folder / side / "a" / f"0{suffix}").write_bytes(content)
    path = folder / f"{side}.txt"
    path.write_text(path.read_text().replace("a/0.png", f"a/0{suffix}"))
    return {}


def rgb():
    return Image.fromarray(noise(40, 32, 3))


WRONG_EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"  # 65535 entries, and then nothing

# kind: (builder of the images, what the quarantine names: (side, file, reason))
SET_ASIDE = {
    "missing": (
        lambda w: without(w, "images/train/a/0.png"),
        [("train", "a/0.png", "missing")],
    ),
    "link to nowhere": (
        lambda w: (
            [without(w, "images/train/a/0.png")]
            and (w / "images/train/a/0.png").symlink_to("gone.png")
        ),
        [("train", "a/0.png", "missing")],
    ),
    "empty file": (lambda w: swapped(w, b""), [("train", "a/0.png", "undecodable")]),
    "text named .jpg": (
        lambda w: swapped(w, b"<html>404</html>", ".jpg"),
        [("train", "a/0.jpg", "undecodable")],
    ),
    "truncated JPEG": (
        lambda w: swapped(w, encoded(rgb(), "JPEG")[:-400], ".jpg"),
        [("train", "a/0.jpg", "truncated")],
    ),
    "truncated PNG": (
        lambda w: swapped(w, encoded(rgb(), "PNG")[:-400]),
        [("train", "a/0.png", "truncated")],
    ),
    "one pixel": (
        lambda w: swapped(w, encoded(Image.new("RGB", (1, 1)), "PNG")),
        [("train", "a/0.png", "too small")],
    ),
    "decompression bomb": (
        lambda w: swapped(w, png_header(100_000, 100_000)),
        [("train", "a/0.png", "too large")],
    ),
    "folder named like an image": (
        lambda w: folder_for(w, "images/train/a/0.png"),
        [("train", "a/0.png", "unreadable")],
    ),
    "no permission": (
        lambda w: (w / "images/train/a/0.png").chmod(0),
        [("train", "a/0.png", "unreadable")],
    ),
    "float TIFF": (
        lambda w: swapped(w, encoded(Image.fromarray(noise(32, 32, dtype=np.float32)), "TIFF")),
        [("train", "a/0.png", "undecodable")],
    ),
    "32-bit TIFF": (
        lambda w: swapped(w, encoded(Image.fromarray(noise(32, 32, dtype=np.int32)), "TIFF")),
        [("train", "a/0.png", "undecodable")],
    ),
    "one of validation": (
        lambda w: swapped(w, b"", side="val"),
        [("val", "a/0.png", "undecodable")],
    ),
    "one on each side": (
        lambda w: swapped(w, b"") or swapped(w, b"", side="val"),
        [("train", "a/0.png", "undecodable"), ("val", "a/0.png", "undecodable")],
    ),
    # and what looks bad, but is an image
    "wrong EXIF": (lambda w: swapped(w, encoded(rgb(), "JPEG", exif=WRONG_EXIF), ".jpg"), []),
    "CMYK": (lambda w: swapped(w, encoded(rgb().convert("CMYK"), "JPEG"), ".jpg"), []),
    "16-bit": (
        lambda w: swapped(w, encoded(Image.fromarray(noise(32, 32, dtype=np.uint16)), "PNG")),
        [],
    ),
    "folder like an image in a class folder": (
        lambda w: (w / "images/train/a/x.png").mkdir() or FOLDERS,
        [],
    ),
}


@pytest.mark.parametrize("kind", SET_ASIDE)
def test_a_image_that_cannot_be_read_is_set_aside_by_name_and_the_rest_trains(world, kind):
    if kind == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    build, wanted = SET_ASIDE[kind]
    changes = build(world)
    run = train(small(world, **(changes or {}), name="new", epochs=1))
    assert run.status()["state"] == "finished"
    quarantine = run.quarantine()
    named = list(zip(quarantine.side, quarantine.file, quarantine.reason, strict=True))
    assert named == wanted
    assert (quarantine.label == 0).all()
    out = [side for side, _, _ in wanted]
    assert run.metrics().images.tolist() == [len(TRAIN) - out.count("train")]
    assert run.metrics().val_images.tolist() == [len(VAL) - out.count("val")]
    if "val" in out:
        assert run.predictions().file.tolist() == VAL[1:]  # none took its place


def test_images_set_aside_are_still_named_after_a_resume(world):
    swapped(world, encoded(Image.new("RGB", (1, 1)), "PNG"))  # its reason has a comma
    without(world, "images/val/a/0.png")
    recipe = small(world, name="new")
    run = runs.Run(recipe.folder)
    with contextlib.closing(training.fit(recipe, run)) as rows:
        next(rows)
    before = run.file("quarantine.csv").read_text()
    assert len(run.quarantine()) == 2
    train(recipe)
    assert run.file("quarantine.csv").read_text() == before


# ---- images that were sound and vanish


def test_a_image_that_vanishes_before_training_is_left_out_named_and_never_swapped(world):
    recipe = small(world, verify_data=False, name="new")
    prepared = data.load_dataset(recipe)
    without(world, "images/train/b/3.png")
    without(world, "images/val/c/1.png")
    run = train(recipe, dataset=prepared)
    quarantine = run.quarantine()
    assert quarantine.file.tolist() == ["b/3.png", "c/1.png"]
    assert quarantine.reason.tolist() == ["missing", "missing"]
    assert quarantine.label.tolist() == [1, 2]
    assert quarantine.step.tolist()[1] == 3  # seen by the validation after three steps
    assert run.metrics().images.tolist() == [17, 17]
    assert run.metrics().val_images.tolist() == [5, 5]
    assert run.predictions().file.tolist() == VAL[:-1]


def test_a_image_that_vanished_is_named_once_also_over_a_resume(world):
    recipe = small(world, verify_data=False, name="new")
    without(world, "images/train/b/3.png")
    without(world, "images/val/c/1.png")
    run = runs.Run(recipe.folder)
    with contextlib.closing(training.fit(recipe, run)) as rows:
        next(row for row in rows if row["kind"] == "epoch")
    train(recipe)
    assert run.quarantine().file.tolist() == ["b/3.png", "c/1.png"]


def test_a_image_that_vanished_does_not_lower_the_training_loss(world):
    recipe = small(world, verify_data=False, name="new", epochs=1, lr=1e-12)
    content = data.load_dataset(recipe)
    without(world, "images/train/b/3.png")
    run = train(recipe)

    model = training.create_model(recipe, 3).train()
    normalize = training.Normalize(recipe, torch.device("cpu"))
    losses = []
    for batch in data.train_loader(
        content.train, training.train_transform(recipe), seed=0, batch_size=6, steps=range(3)
    ):
        logits = model(normalize(batch.images))
        losses += F.cross_entropy(logits, batch.labels, reduction="none").tolist()
    assert len(losses) == 17
    assert run.metrics().train_loss[0] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_image_that_vanishes_and_leaves_one_in_its_batch_does_not_end_the_training(world):
    recipe = small(world, verify_data=False, name="new", epochs=1, batch_size=8)
    content = data.load_dataset(recipe)
    rows, _ = data.Sampler(content.train.label, seed=0, batch_size=8).rows(2)
    assert len(rows) == 2
    gone = content.train.file[rows[0]]
    without(world, f"images/train/{gone}")
    run = train(recipe)
    assert run.status()["state"] == "finished"
    assert run.quarantine().file.tolist() == [gone]


def test_all_of_validation_vanishing_ends_in_words_and_keeps_the_checkpoint(world):
    recipe = small(world, verify_data=False, name="new", checkpoint_minutes=0.0)
    run = runs.Run(recipe.folder)
    rows = training.fit(recipe, run)
    next(row for row in rows if row["kind"] == "epoch")
    kept = run.metrics()
    without(world, "images/val")
    with pytest.raises((DataError, TrainingError), match="validation"):
        list(rows)
    assert run.status()["state"] == "failed"
    assert run.load_checkpoint()["progress"]["step"] == 5  # the sixth is the one with validation
    assert run.metrics().equals(kept)


# ---- a record that is damaged, but not needed


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"state": 5}', "\xff"])
def test_a_damaged_status_does_not_keep_a_run_from_going_on(world, content):
    written(world, "runs/first-seed0/status.json", content.encode("latin-1"))
    run = train(small(world))
    assert run.status()["state"] == "finished"
    assert run.metrics().epoch.tolist() == [1, 2]


# ---- a loss that is not finite


def assert_all_finite(tensors):
    spoilt = [k for k, v in tensors.items() if not torch.isfinite(v).all()]
    assert not spoilt, f"not finite: {spoilt[:5]}"


@pytest.mark.parametrize(
    "spoiling",
    [
        {"lr": 1e12, "warmup_epochs": 1.0},  # in the middle of an epoch, after good steps
        {"lr": 1e4},  # the weights stay finite at first, the norms' statistics do not
    ],
    ids=["weights", "statistics"],
)
def test_a_loss_that_is_not_finite_names_step_and_images_and_keeps_the_last_good(world, spoiling):
    recipe = small(world, name="new", checkpoint_minutes=0.0, momentum=0.0, **spoiling)
    with pytest.raises(TrainingError) as caught:
        train(recipe)
    run = runs.Run(recipe.folder)
    entries = data.read_list(world / "images/train.txt", world / "images/train")
    spoilt = pd.read_csv(run.file("nonfinite.csv"))
    step = int(spoilt.step[0])
    rows, _ = data.Sampler(entries.label, seed=0, batch_size=6).rows(step)
    assert f"at step {step};" in str(caught.value)
    assert repr(entries.file[rows[0]]) in str(caught.value)
    assert spoilt.file.tolist() == entries.file[rows].tolist()
    assert run.status()["state"] == "failed"
    state = run.load_checkpoint()
    assert 0 < state["progress"]["step"] <= step
    assert_all_finite(state["model"])
    if run.file("best.safetensors").exists():
        assert_all_finite(safetensors.torch.load_file(run.file("best.safetensors")))

    before = record(run.path)
    with pytest.raises(TrainingError) as again:
        train(recipe)
    assert str(again.value) == str(caught.value)
    assert record(run.path)["last.pt"] == before["last.pt"]


def test_the_first_loss_that_is_not_finite_is_the_one_named(world):
    recipe = small(world, name="new", lr=1e300, momentum=0.0)  # no weight is finite after a step
    with pytest.raises(TrainingError, match="at step 1;"):
        train(recipe)
    run = runs.Run(recipe.folder)
    assert run.steps().step.tolist() == [1]
    assert np.isfinite(run.steps().loss).all()
    assert not run.file("last.pt").exists()


def test_weights_spoilt_by_the_last_step_of_an_epoch_are_written_nowhere(world):
    # The loss of the only step is finite; the weights after it are not.
    recipe = small(world, name="new", lr=1e300, batch_size=18, epochs=1)
    with pytest.raises(TrainingError, match="at step 0"):
        train(recipe)
    run = runs.Run(recipe.folder)
    assert not run.file("last.pt").exists()
    assert run.metrics().empty
    assert not run.file("best.safetensors").exists()


# ---- the commands


def test_the_train_command_says_one_sentence_and_no_traceback(world, command):
    first_row(world, "a/0.png cat")
    recipe = world / "recipe.yaml"
    small(world).to_yaml(recipe)
    before = record(world / "runs" / "first-seed0")
    done = command("train", recipe)
    assert done.returncode == 1
    assert "DataError" in done.stderr
    assert "'cat' is no whole number" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert record(world / "runs" / "first-seed0") == before


def test_the_train_command_lists_all_that_is_wrong_with_a_recipe(world, command):
    written(world, "recipe.yaml", "learning_rate: 0.1\nepochs: 0\n")
    done = command("train", world / "recipe.yaml", "-p", "modell=resnet18")
    assert done.returncode == 1
    for words in ("3 problems", "'lr'", "epochs: 0", "'model'"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_check_data_names_everything_that_training_would_refuse_or_set_aside(world, command):
    swapped(world, b"")
    shutil.copy(world / "images/train/b/0.png", world / "images/val/b/0.png")
    first_row(world, "../val/c/0.png -3")
    small(world).to_yaml(world / "recipe.yaml")
    without(world, "images/train/c/5.png")
    done = command("check-data", world / "recipe.yaml", "--out", world / "findings.csv")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    findings = pd.read_csv(world / "findings.csv")
    assert set(zip(findings.finding, findings.side, findings.file, strict=True)) == {
        ("outside root", "train", "../val/c/0.png"),
        ("label out of range", "train", "../val/c/0.png"),
        ("missing", "train", "c/5.png"),
        ("in train and validation", "val", "b/0.png"),
        ("in train and validation", "val", "c/0.png"),
    }
    for words in ("missing, train: 1", "c/5.png", "in training as b/0.png"):
        assert words in done.stdout


def test_the_record_of_a_refused_run_says_why(world):
    recipe = small(world, name="new", batch_size=1)
    with pytest.raises(TrainingError):
        train(recipe)
    status = json.loads((recipe.folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert "batch norm" in status["message"]
