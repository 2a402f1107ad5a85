"""A row for each image, with the predictions of the run's own validation."""

import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import scipy.special
import torch
from helpers import train
from PIL import Image
from prediction_helpers import IN_PHOTOS, NAMES, Colours, make_photos, save_noise, write_list

from workbench import __main__ as command_line
from workbench import data, runs, training
from workbench.augmentation import EvalTransform
from workbench.data import images
from workbench.export import (
    PredictionError,
    find_images,
    open_source,
    predict,
    predict_image,
    predict_to_file,
)
from workbench.export.prediction_table import SUFFIXES
from workbench.recipe import Recipe

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
    table = predict(trained.path, [data.digits() / "val"], weights=weights)
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
    model = training.create_model(Recipe.from_yaml(run.file("recipe.yaml")), 10).eval()
    model.load_state_dict(safetensors.torch.load_file(run.file("best.safetensors")))
    with torch.no_grad():
        np.testing.assert_allclose(source(pixels), model((pixels / 255 - 0.3) / 0.4), atol=1e-5)


def test_a_run_with_former_names_of_options_is_read(run):
    expected = open_source(run.path).fingerprint
    with open(run.file("recipe.yaml"), "a", encoding="utf-8") as file:
        file.write("flip: 0.25\n")  # hflip of earlier versions
    assert open_source(run.path).fingerprint == expected


def test_the_table_is_that_of_a_plain_loop(photos):
    table = predict(Colours(), [photos], top=2, batch_size=4)
    assert list(table) == ["file", "class1", "class2", "p1", "p2", "error"]
    assert table.file.tolist() == IN_PHOTOS
    for row in table.itertuples():
        with Image.open(photos / row.file) as image:
            pixels = np.asarray(EvalTransform(8, 8)(image.convert("RGB")), np.float64)
        p = scipy.special.softmax(pixels.mean((0, 1)) / 25)
        order = np.argsort(-p)
        assert [row.class1, row.class2] == [NAMES[i] for i in order[:2]]
        np.testing.assert_allclose([row.p1, row.p2], p[order[:2]], rtol=1e-5)
    assert table.p1.dtype == np.float32
    workers = predict(Colours(), [photos], top=2, batch_size=4, workers=2)
    pd.testing.assert_frame_equal(table, workers)


def test_there_are_no_more_columns_than_classes_and_ties_keep_their_order(tmp_path):
    Image.new("RGB", (9, 9), (90, 90, 90)).save(tmp_path / "grey.png")
    table = predict(Colours(), [tmp_path])
    assert list(table) == "file class1 class2 class3 p1 p2 p3 error".split()
    np.testing.assert_allclose(table[["p1", "p2", "p3"]].sum(axis=1), 1, rtol=1e-6)
    assert table.loc[0, ["class1", "class2", "class3"]].tolist() == NAMES


def test_small_probabilities_keep_their_precision(photos, tmp_path):
    class Steep(Colours):
        def forward(self, pixels):
            return torch.tensor([[0.0, 20, 40]]).repeat(len(pixels), 1)

    predict_to_file(Steep(), [photos], tmp_path / "out.csv")
    p = pd.read_csv(tmp_path / "out.csv")[["p1", "p2", "p3"]].to_numpy()
    np.testing.assert_allclose(p, [[1, np.exp(-20), np.exp(-40)]] * 9, rtol=1e-5)


def test_logits_of_nan_are_an_error(photos):
    class Broken(Colours):
        def forward(self, pixels):
            logits = super().forward(pixels)
            logits[1] = np.nan
            return logits

    table = predict(Broken(), [photos])
    assert (table.error != "").tolist() == [i == 1 for i in range(9)]
    assert table.error[1].startswith("not finite: ") and table.p1.isna()[1]


def test_one_image_from_a_file_or_from_memory_is_its_row_in_the_table(photos):
    row = predict(Colours(), [photos / "3.png"]).iloc[0]
    with Image.open(photos / "3.png") as opened:
        opened.load()
    for image in (photos / "3.png", str(photos / "3.png"), opened, opened.convert("RGBA")):
        found = predict_image(Colours(), image, top=2)
        assert list(found) == ["class", "p"] and found.p.dtype == np.float32
        assert found["class"].tolist() == [row.class1, row.class2]
        assert found.p.tolist() == [row.p1, row.p2]
    with pytest.raises(images.ImageError, match="too small: 4x1"):
        predict_image(Colours(), Image.new("RGB", (4, 1)))


def test_an_image_in_memory_is_turned_by_its_orientation(tmp_path):
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (0, 0, 16, 8))

    class Top(Colours):
        def forward(self, pixels):
            return super().forward(pixels[:, :, :1].expand(-1, -1, 8, -1))

    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        for found in (opened, tmp_path / "turned.png"):
            assert predict_image(Top(), found)["class"][0] == "ant"  # red is above
    assert predict_image(Top(), image)["class"][0] == NAMES[2]


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
    several = names("photos/below", "photos/0.png", "photos/below/0.png")
    assert several == [*below, "photos/0.png", "photos/below/0.png"]
    other = shutil.copytree(photos, photos.parent / "more" / "photos")
    assert len(set(names(photos, other))) == 18
    (photos.parent / "more.txt").write_text(f"{photos.name}/0.png 0\n")
    (photos.parent / "more.jsonl").write_text(json.dumps({"filename": f"{photos.name}/1.png"}))
    inputs = [photos, photos.parent / "more.txt", photos.parent / "more.jsonl"]
    assert all(Path(file).exists() for file in predict(Colours(), inputs).file)


def test_folders_are_sorted_and_skipped_files_are_named(photos):
    Image.open(photos / "0.png").save(photos / "a.jp2", "JPEG2000")
    shutil.copy(photos / "0.png", photos / "no suffix")
    shutil.copy(photos / "0.png", photos / "below.png")
    (photos / ".cache").mkdir()
    shutil.copy(photos / "0.png", photos / ".cache")
    for name in (".DS_Store", "Thumbs.db", "notes.json"):
        (photos / name).write_bytes(b"{}")
    (photos / "below" / "up").symlink_to(photos)  # a circle
    skipped = []
    found = [entry.file for entry in find_images([photos], skipped)]
    numbers = [f"{i}.png" for i in range(7)]
    assert found == [
        *numbers, "a.jp2", "below/0.png", "below/1.jpg", "below.png", "no suffix"]  # fmt: skip
    assert {os.path.relpath(path, photos): why for path, why in skipped} == {
        ".DS_Store": "hidden", ".cache": "hidden", "Thumbs.db": "no image",
        "notes.json": "no image", "below/up": "a link to a folder",
    }  # fmt: skip


def test_composed_and_decomposed_accents_are_the_same_name(photos):
    shutil.copytree(photos, photos.parent / "caf\u00e9")
    assert len(find_images([photos.parent / "cafe\u0301"])) == len(find_images([photos]))
    shutil.copy(photos / "0.png", photos / "cafe\u0301.png")
    [entry] = find_images([write_list(photos / "list.txt", "caf\u00e9.png")])
    assert entry.file == "caf\u00e9.png" and os.path.exists(entry.path)


def test_paths_of_lists_start_in_their_folder_and_may_have_labels(photos):
    plain = write_list(photos / "plain.txt", "0.png", "", "below/0.png 17", "a b.png", "a b.png -1")
    objects = write_list(
        photos / "objects.jsonl", '{"filename": "0.png", "label": 3}', '{"filename": "ü.png"}'
    )
    files = [entry.file for entry in find_images([plain])]
    assert files == ["0.png", "below/0.png", "a b.png", "a b.png"]
    assert [entry.file for entry in find_images([objects])] == ["0.png", "ü.png"]
    assert predict(Colours(), [plain]).error.tolist() == ["", "", *["missing: no such file"] * 2]
    both = [entry.file for entry in find_images([plain, objects])]
    assert both[0] == f"{photos}/0.png" and both[4] == f"{photos}/0.png"


def test_a_list_leaves_its_folder_only_by_absolute_paths(photos):
    away = save_noise(photos.parent / "away.png", 99)
    entries = ["../away.png", str(away), "below/../0.png", "../photos/0.png"]
    table = predict(Colours(), [write_list(photos / "list.txt", *entries)])
    assert table.file.tolist() == entries
    assert table.error.tolist() == ["outside: leaves the folder of its list", "", "", ""]
    assert table.p1.isna().tolist() == [True, False, False, False]


def _bomb(path: Path) -> None:
    """A PNG whose header has 20,000 x 20,000 pixels."""
    chunk = lambda kind, content: (
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )  # fmt: skip
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0" * 9)))


def _truncated(path: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "JPEG")
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])


def _float(path: Path) -> None:
    Image.fromarray(np.ones((9, 9), np.float32)).save(path)


# name of the file -> (how it is made, the error of its row)
BAD = {
    "empty.jpg": (Path.touch, "undecodable: empty file"),
    "cut.jpg": (_truncated, "truncated: "),
    "text.jpg": (lambda p: p.write_text("no image"), "undecodable: no known image format"),
    "html.png": (lambda p: p.write_text("<html>404</html>" * 99), "undecodable: "),
    "thin.png": (lambda p: Image.new("RGB", (4, 1)).save(p), "too small: 4x1 pixels"),
    "bomb.png": (_bomb, "too large: "),
    "large.png": (lambda p: Image.new("1", (10_000, 10_000)).save(p), "too large: "),
    "dangling.jpg": (lambda p: p.symlink_to(p.parent / "nowhere"), "missing: "),
    "itself.jpg": (lambda p: p.symlink_to(p), "unreadable: "),
    "pipe.jpg": (os.mkfifo, "unreadable: no regular file"),
    "device.jpg": (lambda p: p.symlink_to("/dev/zero"), "unreadable: no regular file"),
    "float.tif": (_float, "undecodable: mode F"),
}
NAMES_OF_FILES = [
    "ü 猫.png", "two\nlines.png", 'a,"b".png', "=1+1.png", "c\r.png", " .png", "%s{0}.png"
]  # fmt: skip


@pytest.fixture(scope="module")
def wild(tmp_path_factory) -> Path:
    """A folder of everything in BAD, good images with odd names, and a folder named x.jpg."""
    folder = tmp_path_factory.mktemp("wild")
    for name, (make, _) in BAD.items():
        make(folder / name)
    for i, name in enumerate(NAMES_OF_FILES):
        save_noise(folder / name, i)
    (folder / "x.jpg").mkdir()
    save_noise(folder / "x.jpg" / "inside.png", 77)
    invalid = os.fsdecode(os.fsencode(folder) + b"/raw\xff.png")
    shutil.copy(folder / "x.jpg" / "inside.png", invalid)
    return folder


def test_every_file_is_a_row_with_a_prediction_or_its_error(wild):
    table = predict(Colours(), [wild], batch_size=5).set_index("file")
    good = [*NAMES_OF_FILES, "x.jpg/inside.png", "raw\\xff.png"]
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
        texts = {c: str for c in table if c[0] != "p"}
        empty = {c: [""] for c in table if c not in ("file", "error")}
        found = pd.read_csv(
            out, dtype=texts, keep_default_na=False, na_values=empty, lineterminator="\n"
        )
    elif suffix == ".jsonl":
        found = pd.DataFrame([json.loads(x) for x in out.read_text().splitlines()])
    else:
        found = pd.read_parquet(out)
        assert found.p1.dtype == np.float32
    assert list(found) == list(table)
    for column in table:
        if column[0] == "p":
            np.testing.assert_array_equal(found[column].to_numpy(np.float32), table[column])
        else:
            assert found[column].fillna("-").tolist() == table[column].fillna("-").tolist()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
def test_missing_permission_is_an_error_of_the_row(photos):
    (photos / "0.png").chmod(0)
    (photos / "below").chmod(0)
    try:
        table = predict(Colours(), [photos]).set_index("file")
    finally:
        (photos / "below").chmod(0o755)
    assert table.error[["0.png", "below"]].tolist() == ["unreadable: Permission denied"] * 2


def test_a_folder_that_cannot_be_listed_is_a_row(photos, monkeypatch):
    scan = os.scandir

    def closed(path):
        if os.path.basename(path) == "below":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    table = predict(Colours(), [photos]).set_index("file")
    assert table.error["below"] == "unreadable: Permission denied"
    assert (table.error.drop("below") == "").all() and len(table) == 8


# inputs below the photos -> the error
REFUSED = {
    (): "no images in nothing",
    ("void",): "no images in '.*void'; give images, folders with",
    ("texts",): "no images in",
    ("nowhere.jpg",): "nowhere.jpg' does not exist; give images",
    ("dangling",): "does not exist",
    ("0.png", "./0.png"): "0.png' is given twice",
    ("empty.txt",): "no images in",
    ("latin.txt",): "latin.txt' cannot be read",
    ("zero.txt",): "line 2: no file name; fix it",
    ("text.jsonl",): "line 1: .*fix it",
    ("label.jsonl",): 'line 1: expected {"filename": "a.jpg"}, not',
    ("half.jsonl",): "line 1: .*surrogates",
    ("deep.jsonl",): "line 1: .*fix it",
}


@pytest.mark.parametrize("inputs", REFUSED)
def test_invalid_inputs_are_one_error(photos, tmp_path, inputs):
    (photos / "void").mkdir()
    (photos / "texts").mkdir()
    (photos / "texts" / "a.md").touch()
    (photos / "dangling").symlink_to("nowhere")
    (photos / "empty.txt").write_text("\n \n")
    (photos / "latin.txt").write_bytes("ü.png".encode("latin-1"))
    (photos / "zero.txt").write_bytes(b"0.png\n\0.png\n")
    (photos / "text.jsonl").write_text("0.png\n")
    (photos / "label.jsonl").write_text('{"label": 3}\n')
    (photos / "half.jsonl").write_text('{"filename": "\\ud800.png"}\n')
    (photos / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(PredictionError, match=REFUSED[inputs]):
        predict_to_file(Colours(), [f"{photos}/{n}" for n in inputs], tmp_path / "out.csv")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))]


# ---- sources that cannot be used


def _without(*names):
    return lambda run: [run.file(name).unlink() for name in names]


def _checkpoint(state):
    return lambda run: torch.save(state, run.file("last.pt"))


def _text(name, text):
    return lambda run: run.file(name).write_text(text)


def _truncate_best(run: runs.Run) -> None:
    run.file("last.pt").unlink()
    os.truncate(run.file("best.safetensors"), 5000)


def _other_model(run: runs.Run) -> None:
    path = run.file("recipe.yaml")
    Recipe.from_yaml(path).replace(model="test_vit").to_yaml(path)


def _nan(run: runs.Run) -> None:
    state = run.load_checkpoint()
    next(iter(state["ema"].values())).fill_(float("nan"))
    torch.save(state, run.file("last.pt"))


def _no_ema(run: runs.Run) -> None:
    torch.save({**run.load_checkpoint(), "ema": None}, run.file("last.pt"))


FIT = "does not fit recipe.yaml and environment.json, test_"
BROKEN = {
    "weights": (_without("last.pt", "best.safetensors"), "has no weights yet"),
    "truncated last.pt": (lambda r: os.truncate(r.file("last.pt"), 5000), "last.pt cannot be read"),
    "truncated best": (_truncate_best, "best.safetensors cannot be read"),
    "empty last.pt": (_checkpoint({"model": {}, "ema": None}), "has no raw weights"),
    "numbers": (_checkpoint({"model": {}, "ema": 5}), "does not fit recipe.yaml"),
    "a list": (_checkpoint([1, 2]), "last.pt is not a checkpoint"),
    "recipe": (_without("recipe.yaml"), "is no readable run"),
    "recipe list": (_text("recipe.yaml", "- a\n"), "recipe.yaml holds"),
    "classes": (_without("environment.json"), "has no classes in environment.json"),
    "classes as numbers": (_text("environment.json", '{"classes": [1, 2]}'), "has no classes"),
    "two classes": (_text("environment.json", '{"classes": ["a", "b"]}'), f"{FIT}resnet with 2"),
    "model": (_other_model, f"{FIT}vit"),
    "nan": (_nan, "contains nan or infinity"),
    "no ema": (_no_ema, "has no ema weights, only raw"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_run_is_one_error(run, case):
    damage, message = BROKEN[case]
    damage(run)
    with pytest.raises(PredictionError, match=message) as error:
        open_source(run.path, "ema" if case == "no ema" else "")
    assert str(run.path) in str(error.value) and "\n\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere", "does not exist"), ("a.pth", "neither a run folder nor a package")],
)
def test_other_paths_are_one_error(tmp_path, path, message):
    (tmp_path / "a.pth").touch()
    with pytest.raises(PredictionError, match=message):
        open_source(tmp_path / path)


# ---- the command


def call(monkeypatch, capsys, *words) -> tuple[int | str | None, str]:
    """(exit code or last words, what was printed) of `workbench predict`."""
    monkeypatch.setattr(sys, "argv", ["workbench", "predict", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    return ended.value.code, capsys.readouterr().out


def test_the_command_writes_the_table_and_counts_the_errors(
    trained, wild, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out.csv"
    words = (trained.path, wild, "--out", out, "--top", 3, "--weights", "raw", "--workers", 1)
    code, text = call(monkeypatch, capsys, *words, "--annotate-dir", tmp_path / "shown")
    assert code == 0
    good = len(NAMES_OF_FILES) + 2
    assert text.splitlines()[:3] == [
        f"predictions of {trained.path}/last.pt, raw weights ({trained.choose_weights()[1]}), "
        "10 classes",
        f"{len(BAD) + good} images: {good} predictions in {out}",
        "4 undecodable: see the column error",
    ]
    assert "1 truncated: see the column error" in text
    table = pd.read_csv(out, dtype=str, keep_default_na=False, lineterminator="\n")
    assert list(table) == "file class1 class2 class3 p1 p2 p3 error".split()
    raw = predict(trained.path, [wild], top=3, weights="raw")
    assert table.class1.tolist() == raw.class1.fillna("").tolist()
    assert len(list((tmp_path / "shown").rglob("*.png"))) == good
    code, text = call(monkeypatch, capsys, *words)
    assert code.startswith(f"PredictionError: {out} exists and is not replaced; move it, or")


def test_the_exit_code_is_one_if_no_image_could_be_read(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jpg").write_text("no image")
    out = tmp_path / "out.csv"
    code, text = call(monkeypatch, capsys, trained.path, tmp_path / "a.jpg", "--out", out)
    assert code == 1 and f"\n1 images: 0 predictions in {out}\n1 undecodable" in text
    assert out.exists()
