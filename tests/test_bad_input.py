"""Bad input is refused or quarantined by name, and an existing run loses nothing."""

import contextlib
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import CLASSES, save_noise, write_list
from helpers import noise_image
from helpers import train as train_run
from PIL import Image
from torch.nn import functional as F

from workbench import data, doctor, evaluation, models, runs, training
from workbench.data import DataError
from workbench.evaluation.comparison import compare
from workbench.models import ModelError
from workbench.recipe import Recipe, RecipeError, runtime_only
from workbench.runs import RunError
from workbench.training import TrainingError
from workbench.ui import widgets
from workbench.ui.training_text import start_text

TRAIN = [f"{name}/{i}.png" for name in CLASSES for i in range(6)]
VAL = [f"{name}/{i}.png" for name in CLASSES for i in range(2)]
RUN = "runs/first-seed0"

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
    labelled(world)
    recipe = small(world, name="first")
    train_until(recipe, "epoch")
    assert runs.Run(recipe.folder).status()["state"] == "stopped"
    return world


@pytest.fixture
def world(stopped_world, tmp_path) -> Path:
    """A copy for each test."""
    return Path(shutil.copytree(stopped_world, tmp_path / "world"))


def small(world: Path, **changes) -> Recipe:
    """Three steps an epoch. Changes of the weights make a new run, others resume the first."""
    name = "first" if set(changes) <= runtime_only else "new"
    options = {"name": name, "dataset": "files", "data_dir": str(world / "images")}
    options |= {
        "train_list": ["train.txt"],
        "val_list": ["val.txt"],
        "runs_dir": str(world / "runs"),
    }
    options |= {"image_size": 16, "val_resize": 16, "epochs": 2, "batch_size": 6, "lr": 0.05}
    options |= {"log_every": 1, "device": "cpu", "precision": "fp32", "workers": 0}
    return Recipe(**{**options, **changes})


def train_until(recipe: Recipe, kind: str) -> runs.Run:
    """A run that is stopped after its first row of this kind."""
    run = runs.Run(recipe.folder)
    with contextlib.closing(training.fit(recipe, run)) as rows:
        next(row for row in rows if row["kind"] == kind)
    return run


def record(run: Path) -> dict[str, bytes]:
    """Every byte of a run folder but its status, which may say that something failed."""
    files = [
        path
        for path in sorted(run.iterdir())
        if path.name.partition(".")[0] not in ("status", "lock")
    ]
    return {path.name: path.read_bytes() for path in files}


# ---- bad input: each function changes the world and returns options


def labelled(world, only="", **changes):
    """Writes both lists; labels of the classes in `only` are the next ones."""
    for side, files in (("train", TRAIN), ("val", VAL)):
        rows = [f"{f} {(CLASSES.index(f[0]) + (f[0] in only)) % 3}" for f in files]
        write_list(world / "images" / f"{side}.txt", *rows)
    return changes


def first_row(world, row, **changes):
    """Replaces the first row of train.txt."""
    path = world / "images" / "train.txt"
    write_list(path, row, *path.read_text().splitlines()[1:])
    return changes


def without(world, path, **changes):
    """Removes a file or a folder."""
    path = world / path
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return changes


def written(world, path, content, **changes):
    """Writes bytes or text to a file."""
    (world / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return changes


def cut(world, path, **changes):
    """Removes the second half of a file."""
    content = (world / path).read_bytes()
    return written(world, path, content[: len(content) // 2], **changes)


def saved(world, content, **changes):
    """weights.pt with this content."""
    torch.save(content, world / "weights.pt")
    return {"weights": str(world / "weights.pt"), **changes}


def broken(world, side, files):
    """Images that contain text."""
    for file in files:
        written(world, f"images/{side}/{file}", "<html>404 Not Found</html>")
    return {}


class RunsCode:
    """A pickle that would create a file named `ran`."""

    def __init__(self, world):
        self.path = str(world / "ran")

    def __reduce__(self):
        return open, (self.path, "w")


def code(world) -> bytes:
    return pickle.dumps(RunsCode(world))


FOLDERS = {"train_list": [], "val_list": []}  # class folders instead of lists


def named(world, there, here, **changes):
    """The run has these class names, the data now have others."""
    path = world / RUN / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": there.split()}))
    write_list(world / "images" / "names.txt", *here.split())
    return {"class_names": "names.txt", **changes}


def resumed(world, **changes):
    """A new run that continues the first one."""
    return {"resume_from": str(world / RUN), "epochs": 3, **changes}


def renamed(world, **changes):
    """A class folder has another name, which changes the order of the classes."""
    for side in ("train", "val"):
        (world / "images" / side / "a").rename(world / "images" / side / "z")
    return {**changes, **FOLDERS}


def one_class(world):
    write_list(world / "images" / "train.txt", "a/0.png 0", "a/1.png 0")
    return {"val_list": ["train.txt"]}


# bad input: function, error, words of the message
REFUSED = {
    # data
    "list missing": (lambda w: without(w, "images/train.txt"), DataError, ["train.txt"]),
    "label in words": (lambda w: first_row(w, "a/0.png cat"), DataError, ["line 1", "'cat'"]),
    "label negative": (lambda w: first_row(w, "a/0.png -1"), DataError, ["-1", "'a/0.png'"]),
    "label above num_classes": (
        lambda w: first_row(w, "a/0.png 7", num_classes=3),
        DataError,
        ["7 for 'a/0.png'", "outside 0 to 2"],
    ),
    "label far above": (lambda w: first_row(w, "a/0.png 200000"), DataError, ["num_classes"]),
    "entry outside its root": (
        lambda w: first_row(w, "../val/a/0.png 0"),
        DataError,
        ["'../val/a/0.png'", "allow_outside_root: true"],
    ),
    "class names missing": (lambda w: {"class_names": "no.txt"}, DataError, ["no.txt"]),
    "more than a fifth unreadable": (
        lambda w: broken(w, "train", TRAIN[:4]),
        DataError,
        ["train: 4 of 18", "a/0.png", "undecodable"],
    ),
    "no validation image readable": (lambda w: broken(w, "val", VAL), DataError, ["val: 6 of 6"]),
    "data_dir missing": (lambda w: {"data_dir": "/nowhere"}, DataError, ["/nowhere", "data_dir"]),
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
    "one class": (one_class, DataError, ["one class"]),
    # options
    "several problems": (
        lambda w: {"epoch": 3, "lr": -1, "milestones": [1]},
        RecipeError,
        ["3 problem", "'epochs'", "lr: -1", "milestones: [1] has no effect"],
    ),
    "model unknown": (lambda w: {"model": "test_resnett"}, ModelError, ["test_resnet"]),
    "drop_path unsupported": (
        lambda w: {"model": "vgg11", "drop_path": 0.1},
        ModelError,
        ["vgg11", "drop_path_rate"],
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
    "drop_last leaves no batch": (
        lambda w: {"batch_size": 19, "drop_last": True},
        TrainingError,
        ["batch_size 19", "18 training images"],
    ),
    "runs_dir below a file": (
        lambda w: {"runs_dir": str(w / "images" / "train.txt" / "runs")},
        RunError,
        ["cannot write", "choose another runs_dir"],
    ),
    "run folder a file": (
        lambda w: written(w, "runs/new-seed0", "", lr=0.01),
        RunError,
        ["cannot write", "new-seed0"],
    ),
    # initial weights
    "weights truncated": (
        lambda w: cut(w, "weights.pt", **saved(w, models.create("test_resnet", 3).state_dict())),
        ModelError,
        ["weights.pt is truncated"],
    ),
    "weights that are code": (
        lambda w: written(w, "w.pt", code(w), weights=str(w / "w.pt")),
        ModelError,
        ["w.pt", "not run here"],
    ),
    "weights of another model": (
        lambda w: saved(w, models.create("test_convnext", 3).state_dict()),
        ModelError,
        ["fits 0 of", "another model"],
    ),
    "weights in no run folder": (
        lambda w: {"weights": str(w / "images")},
        ModelError,
        ["images is no run folder", "last.pt"],
    ),
    # runs to resume
    "last.pt truncated": (lambda w: cut(w, f"{RUN}/last.pt"), RunError, ["cannot be read"]),
    "last.pt code": (lambda w: written(w, f"{RUN}/last.pt", code(w)), RunError, ["cannot be"]),
    "last.pt with other contents": (
        lambda w: torch.save([1, 2], w / RUN / "last.pt") or {},
        RunError,
        ["last.pt does not fit"],
    ),
    "recipe.yaml not text": (
        lambda w: written(w, f"{RUN}/recipe.yaml", b"\xff\xfe\x00"),
        RunError,
        ["first-seed0 is no readable run"],
    ),
    "environment.json cut": (
        lambda w: cut(w, f"{RUN}/environment.json"),
        RunError,
        ["first-seed0", "environment.json"],
    ),
    "resume_from with other batches": (
        lambda w: resumed(w, batch_size=9),
        RunError,
        ["an epoch had 3 steps, now 2"],
    ),
    "resume_from another model": (
        lambda w: resumed(w, model="resnet10t"),
        RunError,
        ["last.pt does not fit", "`weights`"],
    ),
    "resume_from another optimizer": (
        lambda w: resumed(w, optimizer="adamw"),
        RunError,
        ["was trained with sgd", "`weights`"],
    ),
    "resume_from a run past the end": (
        lambda w: resumed(w, epochs=1),
        RunError,
        ["is at step 3", "ends at 3"],
    ),
    "resume_from a folder without checkpoint": (
        lambda w: resumed(w, resume_from=str(w / "images")),
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
    "an image changed": (
        lambda w: save_noise(w / "images/train/a/0.png", seed=99) and {},
        RunError,
        ["data changed", "first-seed0"],
    ),
    "an image removed": (
        lambda w: without(w, "images/train/a/0.png"),
        RunError,
        ["data changed", "first-seed0"],
    ),
    "a label changed": (
        lambda w: first_row(w, "a/0.png 1"),
        RunError,
        ["data changed", "first-seed0"],
    ),
    "resume_from after a class was renamed": (
        lambda w: resumed(w, **named(w, "cat dog emu", "cat dog owl")),
        RunError,
        ["first-seed0", "'emu' there, 'owl' here"],
    ),
    "resume_from after classes changed places": (
        lambda w: resumed(w, **named(w, "cat dog emu", "dog cat emu")),
        RunError,
        ["first-seed0", "'cat' there, 'dog' here; 'dog' there, 'cat' here"],
    ),
    "resume_from after class folders were renamed": (
        lambda w: named(w, "a b c", "") and renamed(w, **resumed(w)),
        RunError,
        ["first-seed0", "'a' there, 'b' here"],
    ),
    "resume_from after labels changed places": (
        lambda w: labelled(w, only="abc", **resumed(w)),
        TrainingError,
        ["first-seed0", "6 of 6 validation images have another label"],
    ),
    "resume_from after one of three classes got another label": (
        lambda w: labelled(w, only="a", **resumed(w)),
        TrainingError,
        ["first-seed0", "2 of 6 validation images have another label"],
    ),
    "a list whose folders have the names of other classes": (
        lambda w: named(w, "a b c", "b a c", name="new"),
        DataError,
        ["folder 'a' have label 0", "class 0 is 'b'"],
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_and_an_existing_run_loses_nothing(world, kind):
    build, error, words = REFUSED[kind]
    changes = build(world)
    before = record(world / RUN)
    assert {"metrics.csv", "last.pt", "best.safetensors"} <= before.keys()
    with pytest.raises(error) as caught:
        train_run(small(world, **changes))
    assert caught.type is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert record(world / RUN) == before
    assert not (world / "runs" / "new-seed0" / "last.pt").exists()
    assert not (world / "ran").exists()  # no code from a file


def test_the_status_of_a_refused_run_has_the_reason(world):
    recipe = small(world, name="new", batch_size=1)
    with pytest.raises(TrainingError):
        train_run(recipe)
    status = runs.Run(recipe.folder).status()
    assert status["state"] == "failed" and "batch norm" in status["message"]


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_run_is_resumed_only_with_its_class_names(world, state):
    """The images are the same, the names of their classes are not."""
    write_list(world / "images" / "names.txt", "cat", "dog", "emu")
    recipe = small(world, name="named", class_names="names.txt", epochs=1)
    run = train_run(recipe)
    with run.writing():
        run.set_status(state)
    write_list(world / "images" / "names.txt", "dog", "cat", "emu")
    with pytest.raises(RunError, match="'cat' there, 'dog' here"):
        train_run(recipe)


@pytest.mark.parametrize("content", [b"", b"null", b'{"state": 5}', b"\xff"])
def test_a_run_with_a_damaged_status_is_resumed(world, content):
    written(world, f"{RUN}/status.json", content)
    run = train_run(small(world))
    assert run.status()["state"] == "finished"
    assert run.metrics().epoch.tolist() == [1, 2]


def test_training_and_doctor_name_skipped_files_and_empty_classes(world, command):
    (world / "images/train/d").mkdir()
    (world / "images/train/a/notes.txt").touch()
    recipe = small(world, name="new", epochs=1, **FOLDERS)
    recipe.to_yaml(world / "recipe.yaml")
    run = train_run(recipe)
    facts = run.environment()
    assert "1 file or folder skipped: a/notes.txt (no image)" in facts["skipped_files"]
    assert facts["empty_classes"] == ["d"]
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines):
        progress = widgets.Progress(run)
        progress.show({"kind": "step", "step": 1, "steps": 3, "epoch": 0, "lr": 0.1, "loss": 1.0,
                       "seconds": 1.0, "images_per_second": 1.0})  # fmt: skip
        progress.close()
    assert "a/notes.txt (no image)" in lines.getvalue()
    done = command("doctor", world / "recipe.yaml")
    assert "a/notes.txt (no image)" in done.stdout
    assert "1 of 4 classes has no training image" in done.stdout


@pytest.mark.parametrize("verify_data", [True, False])
def test_a_run_says_how_many_validation_lines_repeat_an_image(world, verify_data):
    lines = (world / "images" / "val.txt").read_text().splitlines()
    write_list(world / "images" / "twice.txt", *lines, *lines[:2])
    run = train_run(small(world, val_list=["twice.txt"], epochs=1, verify_data=verify_data))
    n = len(lines) + 2
    assert run.environment()["val_repeats"] == 2 and run.metrics().val_images.tolist() == [n]
    text = f"2 of the {n} validation images are repeated, so intervals are too narrow"
    assert text in evaluation.headline(run) and text in start_text(run, 3)
    assert any(text in caution for caution in compare([run.path]).cautions)


@pytest.mark.parametrize("verify_data", [True, False])
def test_a_run_says_how_many_validation_images_it_trains_on(world, verify_data):
    roots = {"train_root": ["train", "val"], "train_list": ["train.txt", "val.txt"]}
    run = train_run(small(world, **roots, val_root="val", epochs=1, verify_data=verify_data))
    n = run.environment()["val_images"]
    text = f"{n} of the {n} validation images are in training too, so top-1 is too high"
    assert text in evaluation.headline(run) and text in start_text(run, 3)


def test_the_doctor_refuses_one_class():
    with pytest.raises(DataError, match="found 1 class"):
        doctor.examine(Recipe(), images=10, classes=1)


# ---- unreadable images


def encoded(image, name, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def swapped(world, content, suffix=".png", side="train"):
    """Another content, and suffix, for the first image of a side."""
    without(world, f"images/{side}/a/0.png")
    path = world / "images" / f"{side}.txt"
    path.write_text(path.read_text().replace("a/0.png", f"a/0{suffix}"))
    return written(world, f"images/{side}/a/0{suffix}", content)


JPEG = encoded(noise_image(40, 32), "JPEG")
CMYK = encoded(noise_image(40, 32).convert("CMYK"), "JPEG")

# kind: (function that changes the images, the quarantined ones: (side, file, reason))
QUARANTINED = {
    "missing": (
        lambda w: without(w, "images/train/a/0.png"),
        [("train", "a/0.png", "missing")],
    ),
    "text": (
        lambda w: swapped(w, b"<html>404</html>", ".jpg"),
        [("train", "a/0.jpg", "undecodable")],
    ),
    "truncated": (
        lambda w: swapped(w, JPEG[:-400], ".jpg"),
        [("train", "a/0.jpg", "truncated")],
    ),
    "a folder": (
        lambda w: without(w, "images/train/a/0.png") or (w / "images/train/a/0.png").mkdir(),
        [("train", "a/0.png", "unreadable")],
    ),
    "one on each side": (
        lambda w: swapped(w, b"") or swapped(w, b"", side="val"),
        [("train", "a/0.png", "undecodable"), ("val", "a/0.png", "undecodable")],
    ),
    "none: CMYK is an image": (lambda w: swapped(w, CMYK, ".jpg"), []),
    "none: a folder in a class folder": (
        lambda w: (w / "images/train/a/x.png").mkdir() or FOLDERS,
        [],
    ),
}


@pytest.mark.parametrize("kind", QUARANTINED)
def test_an_unreadable_image_is_quarantined_by_name_and_the_others_train(world, kind):
    build, wanted = QUARANTINED[kind]
    run = train_run(small(world, **(build(world) or {}), name="new", epochs=1))
    assert run.status()["state"] == "finished"
    found = run.quarantine()
    assert list(zip(found.side, found.file, found.reason, strict=True)) == wanted
    assert (found.label == 0).all()
    sides = [side for side, _, _ in wanted]
    assert run.metrics().images.tolist() == [len(TRAIN) - sides.count("train")]
    assert run.metrics().val_images.tolist() == [len(VAL) - sides.count("val")]
    if "val" in sides:
        assert run.predictions().file.tolist() == VAL[1:]  # none took its place


def test_a_resume_leaves_the_quarantine_as_it_was(world):
    swapped(world, encoded(Image.new("RGB", (1, 1)), "PNG"))  # its reason has a comma
    without(world, "images/val/a/0.png")
    recipe = small(world, name="new")
    run = train_until(recipe, "step")
    before = run.file("quarantine.csv").read_text()
    assert len(run.quarantine()) == 2
    train_run(recipe)
    assert run.file("quarantine.csv").read_text() == before


# ---- images that vanish after they were verified


def test_an_image_that_vanishes_before_training_is_left_out_by_name(world):
    recipe = small(world, verify_data=False, name="new")
    prepared = data.load_dataset(recipe)
    without(world, "images/train/b/3.png")
    without(world, "images/val/c/1.png")
    run = train_run(recipe, dataset=prepared)
    quarantine = run.quarantine()
    assert quarantine.file.tolist() == ["b/3.png", "c/1.png"]
    assert quarantine.reason.tolist() == ["missing", "missing"]
    assert quarantine.label.tolist() == [1, 2]
    assert quarantine.step.tolist()[1] == 3  # found by the validation after three steps
    assert run.metrics().images.tolist() == [17, 17]
    assert run.metrics().val_images.tolist() == [5, 5]
    assert run.predictions().file.tolist() == VAL[:-1]


def test_a_vanished_image_is_named_once_also_after_a_resume(world):
    recipe = small(world, verify_data=False, name="new")
    without(world, "images/train/b/3.png")
    without(world, "images/val/c/1.png")
    run = train_until(recipe, "epoch")
    train_run(recipe)
    assert run.quarantine().file.tolist() == ["b/3.png", "c/1.png"]


def test_a_vanished_image_does_not_lower_the_training_loss(world):
    recipe = small(world, verify_data=False, name="new", epochs=1, lr=1e-12)
    content = data.load_dataset(recipe)
    without(world, "images/train/b/3.png")
    run = train_run(recipe)

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


def test_a_vanished_image_that_leaves_a_batch_of_one_does_not_end_the_training(world):
    recipe = small(world, verify_data=False, name="new", epochs=1, batch_size=8)
    content = data.load_dataset(recipe)
    rows, _ = data.Sampler(content.train.label, seed=0, batch_size=8).rows(2)
    assert len(rows) == 2
    gone = content.train.file[rows[0]]
    without(world, f"images/train/{gone}")
    run = train_run(recipe)
    assert run.status()["state"] == "finished"
    assert run.quarantine().file.tolist() == [gone]


def test_a_vanished_validation_list_is_an_error_and_the_checkpoint_stays(world):
    recipe = small(world, verify_data=False, name="new", checkpoint_minutes=0.0)
    run = runs.Run(recipe.folder)
    rows = training.fit(recipe, run)
    next(row for row in rows if row["kind"] == "epoch")
    before = run.metrics()
    without(world, "images/val")
    with pytest.raises((DataError, TrainingError), match="validation"):
        list(rows)
    assert run.status()["state"] == "failed"
    assert run.load_checkpoint()["progress"]["step"] == 5  # the sixth is the one with validation
    assert run.metrics().equals(before)


# ---- a loss that is not finite


def assert_all_finite(tensors):
    assert not [name for name, value in tensors.items() if not torch.isfinite(value).all()]


@pytest.mark.parametrize(
    "cause",
    [
        {"lr": 1e12, "warmup_epochs": 1.0},  # in the middle of an epoch, after good steps
        {"lr": 1e4},  # the weights stay finite at first, the statistics of batch norm do not
    ],
    ids=["weights", "statistics"],
)
def test_a_loss_that_is_not_finite_names_step_and_images_and_the_last_good_state_stays(
    world, cause
):
    recipe = small(world, name="new", checkpoint_minutes=0.0, momentum=0.0, **cause)
    with pytest.raises(TrainingError) as caught:
        train_run(recipe)
    run = runs.Run(recipe.folder)
    entries = data.read_list(world / "images/train.txt", world / "images/train")
    batch = pd.read_csv(run.file("nonfinite.csv"))
    step = int(batch.step[0])
    rows, _ = data.Sampler(entries.label, seed=0, batch_size=6).rows(step)
    assert f"at step {step};" in str(caught.value)
    assert repr(entries.file[rows[0]]) in str(caught.value)
    assert batch.file.tolist() == entries.file[rows].tolist()
    assert run.status()["state"] == "failed"
    state = run.load_checkpoint()
    assert 0 < state["progress"]["step"] <= step
    assert_all_finite(state["model"])
    if run.file("best.safetensors").exists():
        assert_all_finite(safetensors.torch.load_file(run.file("best.safetensors")))

    before = record(run.path)
    with pytest.raises(TrainingError) as again:
        train_run(recipe)
    assert str(again.value) == str(caught.value)
    assert record(run.path)["last.pt"] == before["last.pt"]


@pytest.mark.parametrize(
    "changes, step",
    [
        ({}, 1),  # no weight is finite after a step: the loss of the second step is named
        ({"batch_size": 18, "epochs": 1}, 0),  # the only step, whose loss is finite
    ],
)
def test_weights_that_are_not_finite_are_written_nowhere(world, changes, step):
    recipe = small(world, name="new", lr=1e300, momentum=0.0, **changes)
    with pytest.raises(TrainingError, match=f"at step {step};"):
        train_run(recipe)
    run = runs.Run(recipe.folder)
    assert run.steps().empty or run.steps().step.tolist() == [1]
    assert run.steps().empty or np.isfinite(run.steps().loss).all()
    assert run.metrics().empty
    assert not run.file("last.pt").exists() and not run.file("best.safetensors").exists()


# ---- the command


def test_the_train_command_prints_the_error_without_a_traceback(world, command):
    first_row(world, "a/0.png cat")
    small(world).to_yaml(world / "recipe.yaml")
    before = record(world / RUN)
    done = command("train", world / "recipe.yaml")
    assert done.returncode == 1
    assert "DataError" in done.stderr and "'cat' is no whole number" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert record(world / RUN) == before
