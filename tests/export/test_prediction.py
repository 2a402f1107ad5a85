"""A row for each image, with the predictions of the run's own validation."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import scipy.special
import torch
from conftest import save_noise, write_list
from helpers import train
from PIL import Image
from prediction_helpers import IN_PHOTOS, NAMES, Colours, make_photos

from workbench import runs, training
from workbench.augmentation import EvalTransform
from workbench.data import toy
from workbench.data.images import ImageError
from workbench.export import (
    ExportError,
    PredictionError,
    open_source,
    predict,
    predict_image,
    predict_to_file,
)
from workbench.export.inputs import find_images
from workbench.export.prediction import SUFFIXES
from workbench.recipe import Recipe
from workbench.runs import RunError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> runs.Run:
    """One epoch on a tenth of the digits, with EMA."""
    folder = tmp_path_factory.mktemp("trained")
    return train(Recipe(
        name="digits", train_fraction=0.1, epochs=1, batch_size=32, ema_decay=0.7, lr=0.02,
        image_size=16, val_resize=16, mean=[0.3] * 3, std=[0.4] * 3, model="test_resnet",
        workers=0, device="cpu", precision="fp32", runs_dir=str(folder),
    ))  # fmt: skip


@pytest.fixture
def run(trained, tmp_path) -> runs.Run:
    """A copy of the run."""
    return runs.Run(shutil.copytree(trained.path, tmp_path / "run"))


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path / "photos")


# ---- predictions


@pytest.mark.parametrize("weights", ["", "ema", "raw"])
def test_predictions_are_those_of_the_runs_own_validation(trained, weights):
    own = trained.predictions(weights or "ema").sort_values("file", ignore_index=True)
    table = predict(trained.path, [toy.embedded("digits") / "val"], weights=weights)
    assert table.file.tolist() == own.file.tolist() and len(table) == 500
    assert (table.error == "").all()
    assert table.class1.tolist() == [str(label) for label in own.class1]
    p = [f"p{i}" for i in range(1, 6)]
    assert np.abs(table[p].to_numpy() - own[p].to_numpy()).max() < 1e-5
    other = trained.predictions("raw" if weights != "raw" else "ema").sort_values("file")
    assert np.abs(table.p1.to_numpy() - other.p1.to_numpy()).max() > 1e-3


def test_without_a_last_checkpoint_the_best_weights_are_used(run):
    source, top1 = open_source(run.path), run.choose_weights("ema")[1]
    assert str(source) == f"{run.path}/last.pt, ema weights ({top1}), 10 classes"
    assert open_source(run.path, "raw").fingerprint != source.fingerprint
    run.file("last.pt").unlink()
    run.file("status.json").write_text('{"state": "stopped"}')
    source = open_source(run.path)
    assert "best.safetensors, " in str(source)
    assert str(source).endswith(f" weights ({top1}), of a run that is stopped, 10 classes")
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    model = training.create_model(Recipe(**run.recipe()), 10).eval()
    model.load_state_dict(safetensors.torch.load_file(run.file("best.safetensors")))
    with torch.no_grad():
        np.testing.assert_allclose(source(pixels), model((pixels / 255 - 0.3) / 0.4), atol=1e-5)


def test_the_table_is_that_of_a_plain_loop(photos):
    table = predict(Colours(), [photos], top=2, batch_size=4)
    assert list(table) == ["file", "class1", "class2", "p1", "p2", "error"]
    assert table.file.tolist() == IN_PHOTOS
    for row in table.itertuples():
        with Image.open(photos / row.file) as image:
            pixels = np.asarray(EvalTransform(8, 8)(image.convert("RGB")), np.float64)
        p = scipy.special.softmax(pixels[:4].mean((0, 1)) / 25)
        order = np.argsort(-p)
        assert [row.class1, row.class2] == [NAMES[i] for i in order[:2]]
        np.testing.assert_allclose([row.p1, row.p2], p[order[:2]], rtol=1e-5)
    assert table.p1.dtype == np.float32
    workers = predict(Colours(), [photos], top=2, batch_size=4, workers=2)
    pd.testing.assert_frame_equal(table, workers)


def test_there_are_no_more_columns_than_classes_and_ties_are_in_class_order(tmp_path):
    Image.new("RGB", (9, 9), (90, 90, 90)).save(tmp_path / "grey.png")
    table = predict(Colours(), [tmp_path])
    assert list(table) == "file class1 class2 class3 p1 p2 p3 error".split()
    np.testing.assert_allclose(table[["p1", "p2", "p3"]].sum(axis=1), 1, rtol=1e-6)
    assert table.loc[0, ["class1", "class2", "class3"]].tolist() == NAMES


def test_small_probabilities_keep_their_precision_and_nan_is_an_error(photos, tmp_path):
    class Steep(Colours):
        def forward(self, pixels):
            logits = torch.tensor([[0.0, 20, 40]]).repeat(len(pixels), 1)
            logits[1] = torch.tensor([0, torch.inf, torch.nan])
            return logits

    predict_to_file(Steep(), [photos], tmp_path / "out.csv")
    table = pd.read_csv(tmp_path / "out.csv", keep_default_na=False, na_values={"p1": ""})
    assert (table.error != "").tolist() == [i == 1 for i in range(9)]
    assert table.error[1].startswith("not finite: ") and np.isnan(table.p1[1])
    p = table.drop(1)[["p1", "p2", "p3"]].to_numpy(float)
    np.testing.assert_allclose(p, [[1, np.exp(-20), np.exp(-40)]] * 8, rtol=1e-5)


def test_an_image_from_a_file_or_from_memory_is_its_row_in_the_table(photos):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    with Image.open(photos / "3.png") as upright:
        upright.load()
    upright.save(photos / "rotated.png", exif=exif)
    with Image.open(photos / "rotated.png") as rotated:
        rotated.load()
    rows = predict(Colours(), [photos]).set_index("file")
    assert rows.p1["3.png"] != rows.p1["rotated.png"]
    found = {
        "3.png": (photos / "3.png", str(photos / "3.png"), upright, upright.convert("RGBA")),
        "rotated.png": (photos / "rotated.png", rotated),
    }
    for name, image in ((name, image) for name, several in found.items() for image in several):
        table, row = predict_image(Colours(), image, top=2), rows.loc[name]
        assert list(table) == ["class", "p"] and table.p.dtype == np.float32
        assert table["class"].tolist() == [row.class1, row.class2]
        assert table.p.tolist() == [row.p1, row.p2]
    with pytest.raises(ImageError, match="too small: 4x1"):
        predict_image(Colours(), Image.new("RGB", (4, 1)))


def test_a_strip_of_a_million_pixels_is_resized_without_gigabytes(tmp_path):
    Image.new("RGB", (4, 1_000_000), "red").save(tmp_path / "strip.png")
    assert predict(Colours(size=256), [tmp_path]).class1.tolist() == ["ant"]


# ---- inputs


def test_names_are_relative_to_one_input_or_begin_with_each_as_given(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    names = lambda *inputs: [entry.file for entry in find_images(inputs)]
    assert names("photos") == names(photos) == names("./photos/") == IN_PHOTOS
    assert names("photos/below/1.jpg") == ["1.jpg"]
    below = ["photos/below/0.png", "photos/below/1.jpg"]
    assert names("photos/below", "photos/0.png") == [*below, "photos/0.png"]
    Path("more.txt").write_text("photos/0.png 0\n")
    Path("more.jsonl").write_text(json.dumps({"filename": "photos/1.png"}))
    inputs = [photos, photos.parent / "more.txt", photos.parent / "more.jsonl"]
    assert all(Path(file).exists() for file in predict(Colours(), inputs).file)


def test_folders_are_sorted_and_skipped_files_are_named(photos, capsys):
    Image.open(photos / "0.png").save(photos / "a.jp2", "JPEG2000")
    for name in ("no suffix", "below.png"):
        shutil.copy(photos / "0.png", photos / name)
    for name in (".DS_Store", "notes.json"):
        (photos / name).write_bytes(b"{}")
    (photos / "below" / "up").symlink_to(photos)  # a circle
    found = [entry.file for entry in find_images([photos])]
    numbers = [f"{i}.png" for i in range(7)]
    below = ["below/0.png", "below/1.jpg", "below.png"]
    assert found == [*numbers, "a.jp2", *below, "no suffix"]
    skipped = {".DS_Store": "hidden", "notes.json": "no image", "below/up": "a link to a folder"}
    printed = capsys.readouterr().err
    assert all(f"{photos / name} ({why})" in printed for name, why in skipped.items())
    assert printed.startswith("3 files or folders")


def test_composed_and_decomposed_accents_are_the_same_name(photos):
    shutil.copytree(photos, photos.parent / "caf\u00e9")
    assert len(find_images([photos.parent / "cafe\u0301"])) == len(find_images([photos]))
    shutil.copy(photos / "0.png", photos / "cafe\u0301.png")
    [entry] = find_images([write_list(photos / "list.txt", "caf\u00e9.png")])
    assert entry.file == "caf\u00e9.png" and os.path.exists(entry.path)


def test_lists_may_have_labels_and_leave_their_folder_only_by_absolute_paths(photos):
    away = str(save_noise(photos.parent / "away.png", 99))
    lines = ["0.png 17", "", "a b.png -1", "../away.png", away, "../photos/0.png"]
    names = ["0.png", "a b.png", "../away.png", away, "../photos/0.png"]
    objects = [json.dumps({"filename": name}) for name in names]
    errors = ["", "missing: no such file", "outside: leaves the folder of its list", "", ""]
    for path in (write_list(photos / "x.txt", *lines), write_list(photos / "x.jsonl", *objects)):
        table = predict(Colours(), [path])
        assert table.file.tolist() == names and table.error.tolist() == errors
        assert table.p1.isna().tolist() == [error != "" for error in errors]


def truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 90).save(path)
    os.truncate(path, path.stat().st_size // 2)


# name of the file -> (how it is made, the error of its row)
BAD = {
    "empty.jpg": (Path.touch, "undecodable: empty file"),
    "cut.jpg": (truncated, "truncated: "),
    "text.jpg": (lambda p: p.write_text("no image"), "undecodable: no known image format"),
    "thin.png": (lambda p: Image.new("RGB", (4, 1)).save(p), "too small: 4x1 pixels"),
    "large.png": (lambda p: Image.new("1", (10_000, 10_000)).save(p), "too large: "),
    "dangling.jpg": (lambda p: p.symlink_to(p.parent / "nowhere"), "missing: "),
    "itself.jpg": (lambda p: p.symlink_to(p), "unreadable: "),
    "pipe.jpg": (os.mkfifo, "unreadable: no regular file"),
    "float.tif": (lambda p: Image.new("F", (9, 9)).save(p), "undecodable: mode F"),
}
ODD_NAMES = ["ü 猫.png", "two\nlines.png", 'a,"b".png', "=1+1.png", "c\r.png", " .png", "%s{0}.png"]


@pytest.fixture(scope="module")
def wild(tmp_path_factory) -> Path:
    """A folder of everything in BAD, good images with odd names, and a folder named x.jpg."""
    folder = tmp_path_factory.mktemp("wild")
    for name, (make, _) in BAD.items():
        make(folder / name)
    (folder / "x.jpg").mkdir()
    for i, name in enumerate([*ODD_NAMES, "x.jpg/inside.png"]):
        save_noise(folder / name, i)
    shutil.copy(folder / ODD_NAMES[0], os.fsdecode(os.fsencode(folder) + b"/raw\xff.png"))
    return folder


def test_every_file_is_a_row_with_a_prediction_or_its_error(wild):
    table = predict(Colours(), [wild], batch_size=5).set_index("file")
    good = [*ODD_NAMES, "x.jpg/inside.png", "raw\\xff.png"]
    assert (table.loc[good].error == "").all() and table.loc[good].p1.notna().all()
    assert sorted([*BAD, *good]) == sorted(table.index)
    for name, (_, error) in BAD.items():
        assert table.loc[name].error.startswith(error), name
        assert table.loc[name].drop("error").isna().all(), name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_file_format_has_the_same_names_and_values(wild, tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    counts = predict_to_file(Colours(), [wild], out, batch_size=5)
    table = predict(Colours(), [wild], batch_size=5)
    assert counts == table.error.str.partition(":")[0].value_counts().to_dict()
    if suffix == ".csv":
        found = pd.read_csv(out, dtype=str, keep_default_na=False)
        found = found.replace("", None).assign(error=found.error)
    elif suffix == ".jsonl":
        found = pd.DataFrame([json.loads(x) for x in out.read_text().splitlines()])
    else:
        found = pd.read_parquet(out)
        assert found.p1.dtype == np.float32
    assert list(found) == list(table)
    for column in table:
        if column[0] == "p":
            np.testing.assert_array_equal(found[column].astype(np.float32), table[column])
        else:
            assert found[column].fillna("-").tolist() == table[column].fillna("-").tolist()


def test_a_folder_that_cannot_be_listed_is_a_row(photos, unlistable):
    unlistable("below")
    table = predict(Colours(), [photos]).set_index("file")
    assert table.error["below"] == "unreadable: Permission denied"
    assert (table.error.drop("below") == "").all() and len(table) == 8


# name of an input and its content -> the error
REFUSED = {
    ("nowhere.jpg", None): "nowhere.jpg' does not exist; give images",
    ("empty.txt", b"\n \n"): "no images in",
    ("latin.txt", b"\xfc.png\n"): "latin.txt'.*UnicodeDecodeError",
    ("text.jsonl", b"{}\n0.png\n"): "text.jsonl', line '{}'",
    ("label.jsonl", b'{"label": 3}\n'): "line .*label.*KeyError",
    ("number.jsonl", b'{"filename": 3}\n'): "line .*TypeError",
    ("deep.jsonl", b"[" * 100_000): r"line '\[\[.*RecursionError",
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_inputs_are_one_error(tmp_path, case):
    path = tmp_path / case[0]
    if case[1] is not None:
        path.write_bytes(case[1])
    with pytest.raises(PredictionError, match=REFUSED[case]):
        predict_to_file(Colours(), [path], tmp_path / "out.csv")
    assert not list(tmp_path.glob("*out*"))


# ---- runs that cannot be used


def without(*names):
    return lambda run: [run.file(name).unlink() for name in names]


def checkpoint(change):
    return lambda run: torch.save(change(run.load_checkpoint()), run.file("last.pt"))


def truncated_best(run: runs.Run) -> None:
    run.file("last.pt").unlink()
    os.truncate(run.file("best.safetensors"), 5000)


def other_model(run: runs.Run) -> None:
    Recipe(**run.recipe()).replace(model="test_vit").to_yaml(run.file("recipe.yaml"))


def with_nan(state: dict) -> dict:
    next(iter(state["ema"].values())).fill_(float("nan"))
    return state


DAMAGED = {
    "no weights": (without("last.pt", "best.safetensors"), "has no weights yet"),
    "truncated last.pt": (lambda r: os.truncate(r.file("last.pt"), 5000), "last.pt cannot be read"),
    "truncated best": (truncated_best, "best.safetensors cannot be read"),
    "a list": (checkpoint(lambda _: [1, 2]), "last.pt is not a checkpoint"),
    "numbers": (checkpoint(lambda state: {**state, "ema": 5}), "does not fit recipe.yaml"),
    "no ema": (checkpoint(lambda state: {**state, "ema": None}), "has no ema weights, only raw"),
    "nan": (checkpoint(with_nan), "contains nan or infinity"),
    "another model": (other_model, "does not fit recipe.yaml and environment.json, test_vit"),
    "no recipe": (without("recipe.yaml"), "is no readable run"),
    "no classes": (without("environment.json"), "has no classes in environment.json"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_run_is_one_error(run, case):
    damage, message = DAMAGED[case]
    damage(run)
    with pytest.raises((RunError, ExportError), match=message) as error:
        open_source(run.path, "ema")
    assert str(run.path) in str(error.value)


# ---- the command


def test_the_command_writes_the_table_and_counts_the_errors(trained, wild, tmp_path, command):
    out = tmp_path / "out.csv"
    words = (trained.path, wild, "--out", out, "--top", 3, "--weights", "raw", "--workers", 1)
    done = command("predict", *words, "--annotate-dir", tmp_path / "shown")
    assert done.returncode == 0
    good, top1 = len(ODD_NAMES) + 2, trained.choose_weights()[1]
    assert done.stdout.splitlines()[:2] == [
        f"predictions of {trained.path}/last.pt, raw weights ({top1}), 10 classes",
        f"{len(BAD) + good} images: {good} predictions in {out}",
    ]
    assert "\n3 undecodable: see the column error\n" in done.stdout
    table = pd.read_csv(out, dtype=str, keep_default_na=False, lineterminator="\n")
    assert list(table) == "file class1 class2 class3 p1 p2 p3 error".split()
    raw = predict(trained.path, [wild], top=3, weights="raw")
    assert table.class1.tolist() == raw.class1.fillna("").tolist()
    assert len(list((tmp_path / "shown").rglob("*.png"))) == good
    done = command("predict", *words)
    assert done.returncode == 1 and "exists and is not replaced; move it" in done.stderr
    done = command("predict", trained.path, wild / "cut.jpg", "--out", tmp_path / "bad.csv")
    assert done.returncode == 1 and "1 image: 0 predictions" in done.stdout
    assert (tmp_path / "bad.csv").exists()
