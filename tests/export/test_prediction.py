"""Predictions: the run's own answers, one row per image whatever it is, whole after any kill."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import scipy.special
import torch
from PIL import Image

import workbench
from workbench import __main__ as command
from workbench import data, runs, training
from workbench.augmentation import EvalTransform
from workbench.data import images
from workbench.export import prediction
from workbench.export.prediction import PredictionError, predict, write
from workbench.recipe import Recipe

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["workbench.export.prediction", "workbench.__main__", "scipy.special", "pytest"]
)

NAMES = ["ant", "bee", "Kätzchen"]


# Not conftest's: the children import this file, and a cache of their own with it.
def save_noise(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    """An image of smooth noise (width x height) that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_list(path: Path, *rows: str) -> Path:
    """A list file with one row per line."""
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


pytestmark = pytest.mark.usefixtures("one_thread")


class Colours:
    """A source whose logits are the mean red, green and blue, so that a test can work them out."""

    def __init__(self, pause: float = 0.0, fingerprint: str = "colours"):
        self.classes, self.transform = NAMES, EvalTransform(8, 8)
        self.pause, self.fingerprint = pause, fingerprint

    def __call__(self, pixels):
        time.sleep(self.pause)
        assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, 8, 8)
        return pixels.double().mean((2, 3)).div(25).float().numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> runs.Run:
    """One epoch on a tenth of the digits, with EMA."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = Recipe(
        name="digits", train_fraction=0.1, epochs=1, batch_size=32, ema_decay=0.7, lr=0.02,
        image_size=16, val_resize=16, mean=[0.3] * 3, std=[0.4] * 3, model="test_resnet",
        workers=0, device="cpu", precision="fp32", runs_dir=str(folder),
    )  # fmt: skip
    run = runs.Run(recipe.folder)
    for _ in training.fit(recipe, run):
        pass
    return run


@pytest.fixture
def run(trained, tmp_path) -> runs.Run:
    """A copy of its own."""
    return runs.Run(shutil.copytree(trained.path, tmp_path / "run"))


@pytest.fixture
def photos(tmp_path) -> Path:
    """photos/0.png to 6.png, below/0.png and 1.jpg: nine images."""
    (tmp_path / "photos" / "below").mkdir(parents=True)
    for i in range(7):
        save_noise(tmp_path / "photos" / f"{i}.png", i, (12 + i, 10))
    save_noise(tmp_path / "photos" / "below" / "0.png", 10)
    save_noise(tmp_path / "photos" / "below" / "1.jpg", 11)
    return tmp_path / "photos"


IN_PHOTOS = [*(f"{i}.png" for i in range(7)), "below/0.png", "below/1.jpg"]


# ---- answers


@pytest.mark.parametrize("weights", ["", "ema", "raw"])
def test_the_answers_are_those_of_the_runs_own_validation(trained, weights):
    own = trained.predictions(weights or "ema").sort_values("file", ignore_index=True)
    ours = predict(trained.path, [data.digits() / "val"], weights=weights)
    assert ours.file.tolist() == own.file.tolist() and len(ours) == 500
    assert (ours.error == "").all()
    assert ours.class1.tolist() == [str(label) for label in own.class1]
    p = [f"p{i}" for i in range(1, 6)]
    assert np.abs(ours[p].to_numpy() - own[p].to_numpy()).max() < 1e-5
    other = trained.predictions("raw" if weights != "raw" else "ema").sort_values("file")
    assert np.abs(ours.p1.to_numpy() - other.p1.to_numpy()).max() > 1e-3


def test_without_a_last_checkpoint_the_best_weights_answer_and_say_so(run):
    source = prediction.open_source(run.path)
    measured = run.choose_weights("ema")[1]
    assert str(source) == f"{run.path}/last.pt, ema weights ({measured}), 10 classes"
    before = source.fingerprint
    assert prediction.open_source(run.path, "raw").fingerprint != before
    run.file("last.pt").unlink()
    run.file("status.json").write_text('{"state": "stopped"}')
    source = prediction.open_source(run.path)
    assert "best.safetensors, " in str(source)
    assert str(source).endswith(f" weights ({measured}), of a run that is stopped, 10 classes")
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    model = training.create_model(Recipe.from_yaml(run.file("recipe.yaml")), 10).eval()
    model.load_state_dict(safetensors.torch.load_file(run.file("best.safetensors")))
    with torch.no_grad():
        expected = model((pixels / 255 - 0.3) / 0.4).numpy()
    assert source(pixels).dtype == np.float32
    np.testing.assert_allclose(source(pixels), expected, atol=1e-5)


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


def test_fewer_classes_are_fewer_columns_and_their_values_add_up_to_one(photos):
    table = predict(Colours(), [photos])
    assert [name for name in table if name[0] == "p"] == ["p1", "p2", "p3"]
    np.testing.assert_allclose(table[["p1", "p2", "p3"]].sum(axis=1), 1, rtol=1e-6)


def test_a_small_share_is_kept_to_its_last_digit(photos, tmp_path):
    class Steep(Colours):
        def __call__(self, pixels):
            return np.tile(np.array([0, 20, 40], np.float32), (len(pixels), 1))

    write(Steep(), [photos], tmp_path / "out.csv")
    p = pd.read_csv(tmp_path / "out.csv")[["p1", "p2", "p3"]].to_numpy()
    np.testing.assert_allclose(p, [[1, np.exp(-20), np.exp(-40)]] * 9, rtol=1e-5)


def test_equal_answers_are_in_the_order_of_the_classes(tmp_path):
    Image.new("RGB", (9, 9), (90, 90, 90)).save(tmp_path / "grey.png")
    assert predict(Colours(), [tmp_path]).loc[0, ["class1", "class2", "class3"]].tolist() == NAMES


def test_loader_processes_change_nothing(photos):
    pd.testing.assert_frame_equal(
        predict(Colours(), [photos], batch_size=2),
        predict(Colours(), [photos], batch_size=2, workers=2),
    )


def test_one_image_from_a_file_or_from_memory_is_its_row_in_the_table(photos):
    row = predict(Colours(), [photos / "3.png"]).iloc[0]
    with Image.open(photos / "3.png") as opened:
        opened.load()
    for image in (photos / "3.png", str(photos / "3.png"), opened, opened.convert("RGBA")):
        found = prediction.one(Colours(), image, top=2)
        assert list(found) == ["class", "p"] and found.p.dtype == np.float32
        assert found["class"].tolist() == [row.class1, row.class2]
        assert found.p.tolist() == [row.p1, row.p2]
    with pytest.raises(images.ImageError, match="too small: 4x1"):
        prediction.one(Colours(), Image.new("RGB", (4, 1)))


def test_a_image_in_memory_is_turned_as_its_file_would_be(tmp_path):
    image = Image.new("RGB", (16, 16), "red")
    image.paste("blue", (0, 0, 16, 8))

    class Above(Colours):
        def __call__(self, pixels):
            return super().__call__(pixels[:, :, :1].expand(-1, -1, 8, -1))

    source = Above()
    source.transform = EvalTransform(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        for found in (opened, tmp_path / "turned.png"):
            assert prediction.one(source, found)["class"][0] == "ant"  # red is above
    assert prediction.one(source, image)["class"][0] == NAMES[2]


def test_a_package_is_opened_by_export_and_has_one_kind_of_weights(photos, tmp_path, monkeypatch):
    opened = []
    export = types.SimpleNamespace(load=lambda path: opened.append(path) or Colours())
    monkeypatch.setitem(sys.modules, "workbench.export", export)
    monkeypatch.setattr(workbench, "export", export, raising=False)
    package = tmp_path / "package.tar"
    package.touch()
    pd.testing.assert_frame_equal(predict(package, [photos]), predict(Colours(), [photos]))
    assert opened == [package]
    with pytest.raises(PredictionError, match="leave out weights"):
        predict(package, [photos], weights="raw")


def test_a_strip_of_a_million_pixels_costs_no_gigabytes(tmp_path):
    Image.new("RGB", (4, 1_000_000), "red").save(tmp_path / "strip.png")
    source = Colours()
    source.transform = EvalTransform(8, 256)
    assert predict(source, [tmp_path]).class1.tolist() == ["ant"]


# ---- inputs


def test_images_are_named_from_the_one_input_on_or_by_each_input_as_given(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    names = lambda *inputs: [entry.file for entry in prediction.find(inputs)]
    assert names("photos") == names(photos) == names("./photos/") == IN_PHOTOS
    assert names("photos/below/1.jpg") == ["1.jpg"]
    assert names("photos/below", "photos/0.png", "photos/below/0.png") == [
        "photos/below/0.png",
        "photos/below/1.jpg",
        "photos/0.png",
        "photos/below/0.png",
    ]
    other = shutil.copytree(photos, photos.parent / "more" / "photos")
    both = prediction.find([photos, other])
    assert len({entry.file for entry in both}) == len(both) == 18


def test_folders_come_sorted_without_hidden_files_each_once_whatever_links_say(photos):
    (photos / ".hidden.png").write_bytes((photos / "0.png").read_bytes())
    (photos / ".cache").mkdir()
    shutil.copy(photos / "0.png", photos / ".cache")
    (photos / "notes.md").touch()
    (photos / "below" / "round").symlink_to(photos)  # a circle
    shutil.copy(photos / "0.png", photos / "below.png")
    found = [entry.file for entry in prediction.find([photos])]
    assert found == [*(f"{i}.png" for i in range(7)), "below/0.png", "below/1.jpg", "below.png"]


def test_what_a_folder_holds_beside_images_is_named(photos):
    Image.open(photos / "0.png").save(photos / "a.jp2", "JPEG2000")
    shutil.copy(photos / "0.png", photos / "no suffix")
    for name in (".DS_Store", "Thumbs.db", "notes.json"):
        (photos / name).write_bytes(b"{}")
    (photos / "up").symlink_to("..")
    passed = []
    found = {entry.file for entry in prediction.find([photos], passed)}
    assert {"a.jp2", "no suffix"} < found and not any(file.startswith("up/") for file in found)
    assert {os.path.relpath(path, photos): why for path, why in passed} == {
        ".DS_Store": "hidden", "Thumbs.db": "no image", "notes.json": "no image",
        "up": "a link to a folder",
    }  # fmt: skip


def test_an_input_is_found_in_the_other_form_of_its_accents(photos):
    shutil.copytree(photos, photos.parent / "caf\u00e9")
    assert len(prediction.find([photos.parent / "cafe\u0301"])) == len(prediction.find([photos]))


def test_a_list_finds_files_in_the_other_form_of_their_accents(photos):
    shutil.copy(photos / "0.png", photos / "cafe\u0301.png")
    [entry] = prediction.find([write_list(photos / "list.txt", "caf\u00e9.png")])
    assert entry.file == "caf\u00e9.png" and os.path.exists(entry.path)


def test_lists_of_both_kinds_start_from_their_folder_and_may_carry_labels(photos):
    plain = write_list(photos / "plain.txt", "0.png", "", "below/0.png 17", "a b.png", "a b.png -1")
    objects = write_list(
        photos / "objects.jsonl", '{"filename": "0.png", "label": 3}', '{"filename": "ü.png"}'
    )
    files = [entry.file for entry in prediction.find([plain])]
    assert files == ["0.png", "below/0.png", "a b.png", "a b.png"]
    assert [entry.file for entry in prediction.find([objects])] == ["0.png", "ü.png"]
    assert predict(Colours(), [plain]).error.tolist() == ["", "", *["missing: no such file"] * 2]
    both = [entry.file for entry in prediction.find([plain, objects])]
    assert both[0] == f"{photos}/0.png" and both[4] == f"{photos}/0.png"


def test_an_entry_leaves_its_lists_folder_by_an_absolute_path_alone(photos):
    away = save_noise(photos.parent / "away.png", 99)
    entries = ["../away.png", str(away), "below/../0.png", "../photos/0.png"]
    table = predict(Colours(), [write_list(photos / "list.txt", *entries)])
    assert table.file.tolist() == entries
    assert table.error.tolist() == ["outside: leaves the folder of its list", "", "", ""]
    assert table.p1.isna().tolist() == [True, False, False, False]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content)
    )  # fmt: skip


def _bomb(path: Path) -> None:
    """A PNG that says 20,000 x 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"0" * 9))
    )


def _large(path: Path) -> None:
    """A true image of 100 megapixels; grey and of one value, so it is quickly made."""
    Image.new("1", (10_000, 10_000)).save(path)


def _cut(path: Path) -> None:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "JPEG")
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])


def _name(raw: bytes) -> str:
    return os.fsdecode(raw)


# name of the file -> (how it comes there, what its row says)
BAD = {
    "empty.jpg": (Path.touch, "undecodable: empty file"),
    "cut.jpg": (_cut, "truncated: "),
    "text.jpg": (lambda p: p.write_text("no image"), "undecodable: no known image format"),
    "html.png": (lambda p: p.write_text("<html>404</html>" * 99), "undecodable: "),
    "thin.png": (lambda p: Image.new("RGB", (4, 1)).save(p), "too small: 4x1 pixels"),
    "bomb.png": (_bomb, "too large: "),
    "large.png": (_large, "too large: "),
    "dangling.jpg": (lambda p: p.symlink_to(p.parent / "nowhere"), "missing: "),
    "itself.jpg": (lambda p: p.symlink_to(p), "unreadable: "),
    "pipe.jpg": (os.mkfifo, "unreadable: no regular file"),
    "device.jpg": (lambda p: p.symlink_to("/dev/zero"), "unreadable: no regular file"),
    "float.tif": (
        lambda p: Image.fromarray(np.ones((9, 9), np.float32)).save(p),
        "undecodable: mode F",
    ),
}
GOOD_NAMES = [
    "ü 猫.png",
    "two\nlines.png",
    'a,"b".png',
    "=1+1.png",
    "c\r.png",
    " .png",
    "%s{0}.png",
]


@pytest.fixture(scope="module")
def wild(tmp_path_factory) -> Path:
    """A folder of everything in BAD, good images under odd names, and a folder named x.jpg."""
    folder = tmp_path_factory.mktemp("wild")
    for name, (make, _) in BAD.items():
        make(folder / name)
    for i, name in enumerate(GOOD_NAMES):
        save_noise(folder / name, i)
    (folder / "x.jpg").mkdir()
    save_noise(folder / "x.jpg" / "inside.png", 77)
    shutil.copy(folder / "x.jpg" / "inside.png", _name(os.fsencode(folder) + b"/raw\xff.png"))
    return folder


@pytest.fixture(scope="module")
def wild_table(wild, tmp_path_factory) -> pd.DataFrame:
    return predict(
        Colours(), [wild], batch_size=5, images=tmp_path_factory.mktemp("shown")
    ).set_index("file")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_a_row_with_its_reason(wild_table, name):
    row = wild_table.loc[name]
    assert row.error.startswith(BAD[name][1])
    assert row.drop("error").isna().all()


def test_the_others_are_answered_and_nobody_is_left_out(wild_table):
    good = [*GOOD_NAMES, "x.jpg/inside.png", "raw\\xff.png"]
    assert (wild_table.loc[good].error == "").all() and wild_table.loc[good].p1.notna().all()
    assert sorted([*BAD, *good]) == sorted(wild_table.index)


@pytest.mark.parametrize("suffix", prediction.TABLES)
def test_every_kind_of_file_gives_back_every_name_and_the_very_values(wild, tmp_path, suffix):
    out = tmp_path / f"answers{suffix}"
    counts = write(Colours(), [wild], out, batch_size=5)
    table = predict(Colours(), [wild], batch_size=5)
    assert counts == table.error.str.partition(":")[0].value_counts().to_dict()
    if suffix == ".csv":
        texts = {c: str for c in table if c[0] != "p"}
        kept = pd.read_csv(out, dtype=texts, keep_default_na=False, na_values={
            c: [""] for c in table if c not in ("file", "error")}, lineterminator="\n")  # fmt: skip
    elif suffix == ".jsonl":
        kept = pd.DataFrame([json.loads(x) for x in out.read_text().splitlines()])
    else:
        kept = pd.read_parquet(out)
        assert kept.p1.dtype == np.float32
    assert list(kept) == list(table)
    for column in table:
        if column[0] == "p":
            same = kept[column].to_numpy(np.float32)
            np.testing.assert_array_equal(same, table[column])
        else:
            assert kept[column].fillna("-").tolist() == table[column].fillna("-").tolist()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere")
def test_what_may_not_be_read_is_a_row_too(photos):
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


def test_an_answer_that_is_no_number_is_an_error(photos):
    class Broken(Colours):
        def __call__(self, pixels):
            logits = super().__call__(pixels)
            logits[1] = np.nan
            return logits

    table = predict(Broken(), [photos])
    assert (table.error != "").tolist() == [i == 1 for i in range(9)]
    assert table.error[1].startswith("not finite: ") and table.p1.isna()[1]


# what -> (inputs below the photos, the error)
REFUSED = {
    "nothing": ([], "no images in nothing"),
    "an empty folder": (["void"], "no images in '.*void'; wanted images, folders with"),
    "a folder of other files": (["texts"], "no images in"),
    "a missing path": (["nowhere.jpg"], "nowhere.jpg' is not there; name images"),
    "a dangling link": (["dangling"], "is not there"),
    "the same twice": (["0.png", "./0.png"], "0.png' is given twice"),
    "an empty list": (["empty.txt"], "no images in"),
    "a list in another code": (["latin.txt"], "latin.txt' cannot be read"),
    "a zero byte": (["zero.txt"], "line 2: no file name; fix it"),
    "no JSON": (["text.jsonl"], "line 1: .*fix it"),
    "JSON without a name": (["label.jsonl"], 'line 1: wanted {"filename": "a.jpg"}, came'),
    "a name that no disk has": (["half.jsonl"], "line 1: .*surrogates"),
    "JSON without an end": (["deep.jsonl"], "line 1: .*fix it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_cannot_be_meant_are_one_sentence(photos, tmp_path, case):
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
    inputs, said = REFUSED[case]
    with pytest.raises(PredictionError, match=said):
        write(Colours(), [f"{photos}/{name}" for name in inputs], tmp_path / "out.csv")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", ".out"))]


# ---- outputs


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("nowhere/out.csv", {}, "there is no folder"),
        ("out.xlsx", {}, "its suffix is one of .csv, .jsonl, .parquet"),
        ("out", {}, "its suffix is one of"),
        ("out.csv", {"top": 0}, "top is 0; it is 1 or more"),
        ("out.csv", {"batch_size": 0}, "batch_size is 0"),
        ("out.csv", {"workers": -1}, "workers is -1"),
        ("out.csv", {"weights": "best"}, "weights is 'best'; choose raw or ema"),
        ("photos.csv", {}, "exists and is not replaced"),
        ("link.csv", {}, "exists and is not replaced"),
        ("folder.csv", {}, "exists and is not replaced"),
    ],
)
def test_an_output_or_number_that_will_not_do_is_said_before_the_work(
    photos, run, tmp_path, out, options, said
):
    (tmp_path / "photos.csv").write_text("mine")
    (tmp_path / "link.csv").symlink_to("nowhere")
    (tmp_path / "folder.csv").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PredictionError, match=said):
        write(run.path, [photos], tmp_path / out, **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "photos.csv").read_text() == "mine"


def _break(run: runs.Run, case: str) -> None:
    if case == "weights":
        run.file("last.pt").unlink()
        run.file("best.safetensors").unlink()
    elif case == "a truncated last.pt":
        os.truncate(run.file("last.pt"), 5000)
    elif case == "a truncated best.safetensors":
        run.file("last.pt").unlink()
        os.truncate(run.file("best.safetensors"), 5000)
    elif case == "a last.pt of nothing":
        torch.save({"model": {}, "ema": None}, run.file("last.pt"))
    elif case == "a last.pt of numbers":
        torch.save({"model": {}, "ema": 5}, run.file("last.pt"))
    elif case == "a last.pt of a list":
        torch.save([1, 2], run.file("last.pt"))
    elif case == "the recipe":
        run.file("recipe.yaml").unlink()
    elif case == "a sound recipe":
        run.file("recipe.yaml").write_text("- a\n")
    elif case == "the classes":
        run.file("environment.json").unlink()
    elif case == "sound classes":
        run.file("environment.json").write_text('{"classes": [1, 2]}')
    elif case == "these classes":
        run.file("environment.json").write_text('{"classes": ["a", "b"]}')
    elif case == "this model":
        Recipe.from_yaml(run.file("recipe.yaml")).replace(model="test_vit").to_yaml(
            run.file("recipe.yaml")
        )
    elif case == "numbers":
        state = run.load_checkpoint()
        next(iter(state["ema"].values())).fill_(float("nan"))
        torch.save(state, run.file("last.pt"))
    elif case == "an average":
        state = run.load_checkpoint()
        torch.save({**state, "ema": None}, run.file("last.pt"))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("weights", "has no weights yet"),
        ("a truncated last.pt", "last.pt cannot be read"),
        ("a truncated best.safetensors", "best.safetensors cannot be read"),
        ("a last.pt of nothing", "has no raw weights"),
        ("a last.pt of numbers", "does not fit recipe.yaml and environment.json"),
        ("a last.pt of a list", "last.pt is not a checkpoint"),
        ("the recipe", "no readable run: .*recipe.yaml"),
        ("a sound recipe", "recipe.yaml (contains|holds) "),
        ("the classes", "environment.json names no classes"),
        ("sound classes", "environment.json names no classes"),
        ("these classes", "does not fit recipe.yaml and environment.json, test_resnet with 2"),
        ("this model", "does not fit recipe.yaml and environment.json, test_vit"),
        ("numbers", "contains nan or infinity"),
        ("an average", "has no ema weights, only raw"),
    ],
)
def test_a_run_without_what_it_takes_is_one_sentence(run, case, said):
    _break(run, case)
    with pytest.raises(PredictionError, match=said) as error:
        prediction.open_source(run.path, "ema" if case == "an average" else "")
    assert str(run.path) in str(error.value) and "\n\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "said"), [("nowhere", "is not there"), ("a.pth", "neither a run folder nor a package")]
)
def test_what_is_no_run_is_one_sentence(tmp_path, path, said):
    (tmp_path / "a.pth").touch()
    with pytest.raises(PredictionError, match=said):
        prediction.open_source(tmp_path / path)


# ---- killed and gone on


def _left(folder: Path) -> list[str]:
    """What a call has left beside its output."""
    return [p.name for p in folder.iterdir() if ".partial" in p.name or p.name.startswith(".out")]


def _write_until_killed(source, inputs, out, ready, options):
    torch.set_num_threads(1)
    if isinstance(source, Path):
        opened = prediction.open_source(source)
        call = type(opened).__call__
        type(opened).__call__ = lambda self, x: time.sleep(0.02) or call(self, x)
        source = opened
    ready.set()
    write(source, inputs, out, **options)


def _start(source, inputs, out, **options):
    ready = _server.Event()
    process = _server.Process(
        target=_write_until_killed, args=(source, inputs, out, ready, options)
    )
    process.start()
    assert ready.wait(60)
    return process


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again_a_thousand_images_end_the_same(trained, tmp_path, kills):
    rng = np.random.default_rng(0)
    for i in range(1000):
        path = tmp_path / "in" / f"{i % 7}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    (tmp_path / "in" / "3" / "3.png").write_bytes(b"no image")
    options = {"batch_size": 16}
    calm, out = tmp_path / "calm.csv", tmp_path / "out.csv"
    assert write(trained.path, [tmp_path / "in"], calm, **options) == {"": 999, "undecodable": 1}
    partial = tmp_path / "out.csv.partial"
    lines = lambda: partial.read_bytes().count(b"\n") if partial.exists() else 0
    moments, begun = random.Random(0), [0]
    for i in range(kills):
        process = _start(trained.path, [tmp_path / "in"], out, workers=int(i == 1), **options)
        while i % 3 and lines() <= begun[-1] + 16:  # mostly it may get on by a batch or more
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not out.exists()
        begun.append(lines())
    assert len(set(begun)) > kills // 2 and begun[-1] > 30  # it was killed at work, and went on
    write(trained.path, [tmp_path / "in"], out, **options)
    assert out.read_bytes() == calm.read_bytes()
    assert _left(tmp_path) == []


def _die_at(number, half, inputs, out, options, counter):
    """Ends by SIGKILL before its numbered system call, or after half of a write.

    A negative counter says that the call was a write.
    """
    for name in ("write", "fsync", "replace", "unlink", "ftruncate", "mkdir"):
        call = getattr(os, name)

        def counted(*arguments, _call=call, _write=name == "write", **words):
            counter.value += 1
            if counter.value == number:
                if half and _write:
                    _call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                counter.value = -1 if _write else 1
                os.kill(os.getpid(), signal.SIGKILL)
            return _call(*arguments, **words)

        setattr(os, name, counted)
    data.available_cpus = lambda: 1  # one after the other, so that numbers mean the same every time
    write(Colours(), inputs, out, **options)


@pytest.mark.parametrize(
    "suffix", [".csv", *(pytest.param(x, marks=pytest.mark.slow) for x in (".jsonl", ".parquet"))]
)
def test_killed_at_every_single_step_it_ends_the_same(photos, tmp_path, suffix):
    inputs = [photos / "0.png", photos / "below"]
    options = {"batch_size": 2, "top": 2}
    contents = lambda folder: {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }

    def place(name):
        (tmp_path / name).mkdir()
        return tmp_path / name / f"out{suffix}", {**options, "images": tmp_path / name / "shown"}

    out, words = place("calm")
    write(Colours(), inputs, out, **words)
    whole = contents(tmp_path / "calm")
    assert len(whole) == 4
    number, half, halves = 1, False, 0
    while True:
        out, words = place(f"{number}{half}")
        counter = _server.Value("i", 0)
        process = _server.Process(target=_die_at, args=(number, half, inputs, out, words, counter))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        write(Colours(), inputs, out, **words)
        assert contents(out.parent) == whole, (number, half)
        # a write is met twice: whole left out, and half done
        half = counter.value == -1 and not half
        halves, number = halves + half, number + (not half)
    assert contents(out.parent) == whole
    assert number > 15 and halves == 3  # the header and two batches


def test_a_second_writer_is_refused_and_harms_nothing(photos, tmp_path):
    out = tmp_path / "out.csv"
    process = _start(Colours(pause=1.0), [photos], out, batch_size=1)
    try:
        while not (tmp_path / "out.csv.partial").exists():
            time.sleep(0.01)
        time.sleep(0.05)
        with pytest.raises(PredictionError, match="is being written by another process"):
            write(Colours(), [photos], out, batch_size=1)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    write(Colours(), [photos], out, batch_size=1)
    assert pd.read_csv(out).file.tolist() == IN_PHOTOS


def test_a_table_that_was_finished_while_this_call_began_is_left_with_nothing_beside_it(
    photos, tmp_path, monkeypatch
):
    out, locking = tmp_path / "out.csv", runs.locking

    def late(path):
        out.write_text("theirs")
        return locking(path)

    monkeypatch.setattr(runs, "locking", late)
    with pytest.raises(PredictionError, match="exists and is not replaced"):
        write(Colours(), [photos], out)
    assert out.read_text() == "theirs" and _left(tmp_path) == []


class _Stop(Exception):
    pass


def begin(photos: Path, out: Path, batches: int = 1, **options) -> bytes:
    """A call that is left after some batches of 4; what it has kept."""

    class Stopping(Colours):
        calls = 0

        def __call__(self, pixels):
            self.calls += 1
            if self.calls > batches:
                raise _Stop
            return super().__call__(pixels)

    with contextlib.suppress(_Stop):
        write(Stopping(), [photos], out, **{"batch_size": 4, **options})
    return out.with_name(f"{out.name}.partial").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top": 2}, "top 5, now 2"),
        ({"batch_size": 3}, "batch_size 4, now 3"),
        ({"fingerprint": "others"}, "weights 'colours', now 'others'"),
        ({"inputs": True}, "inputs '"),
        ({"images": "shown"}, "images '', now '.*shown'"),
    ],
)
def test_begun_otherwise_it_says_what_differs_and_touches_nothing(photos, tmp_path, change, said):
    out = tmp_path / "out.csv"
    before = begin(photos, out)
    words = {"batch_size": 4, **change}
    source = Colours(fingerprint=words.pop("fingerprint", "colours"))
    if words.pop("inputs", False):
        save_noise(photos / "new.png", 50)
    if "images" in words:
        words["images"] = tmp_path / "shown"
    with pytest.raises(PredictionError, match=f"{said}.* Call as before to go on, or delete"):
        write(source, [photos], out, **words)
    assert (tmp_path / "out.csv.partial").read_bytes() == before
    assert not out.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text,
        lambda text: text + b'{"file": "4.p',
        lambda text: text + text.splitlines(keepends=True)[-1],
        lambda text: text + b'{"file": "4.png"}\n' + b"\0" * 4096,
        lambda text: text + b"\xff\n" * 3,
        lambda text: text[:-5],
        lambda text: text.replace(b'"1.png"', b'"7.png"'),
        lambda text: text.splitlines(keepends=True)[0],
        lambda text: text.splitlines(keepends=True)[0][:-20],
        lambda text: b"",
    ],
)
def test_a_damaged_end_is_dropped_and_made_again(photos, tmp_path, damage):
    out, calm = tmp_path / "out.csv", tmp_path / "calm.csv"
    write(Colours(), [photos], calm, batch_size=4)
    partial = tmp_path / "out.csv.partial"
    begin(photos, out)
    partial.write_bytes(damage(partial.read_bytes()))
    write(Colours(), [photos], out, batch_size=4)
    assert out.read_bytes() == calm.read_bytes() and _left(tmp_path) == []


def test_a_file_that_came_meanwhile_is_not_replaced_and_the_answers_are_kept(photos, tmp_path):
    out = tmp_path / "out.csv"

    class Slow(Colours):
        def __call__(self, pixels):
            out.write_text("mine")
            return super().__call__(pixels)

    for source in (Slow(), Colours()):
        with pytest.raises(PredictionError, match="exists and is not replaced"):
            write(source, [photos], out, batch_size=4)
        assert out.read_text() == "mine"
    out.unlink()
    asked = []
    source = Colours()
    source.__class__ = type("Asked", (Colours,), {"__call__": lambda self, x: asked.append(x)})
    write(source, [photos], out, batch_size=4)
    assert pd.read_csv(out).file.tolist() == IN_PHOTOS and not asked


def test_what_was_answered_is_not_asked_again(photos, tmp_path):
    asked = []

    class Counting(Colours):
        def __call__(self, pixels):
            asked.append(len(pixels))
            return super().__call__(pixels)

    begin(photos, tmp_path / "out.csv", batches=2)
    write(Counting(), [photos], tmp_path / "out.csv", batch_size=4)
    assert asked == [1]


def test_the_disk_has_a_batch_before_the_next_is_asked(photos, tmp_path, monkeypatch):
    events = []
    fsync = os.fsync

    def synced(handle):
        fsync(handle)
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith(".partial"):
            events.append(os.fstat(handle).st_size == os.path.getsize(name) > 0 and "synced")

    class Noting(Colours):
        def __call__(self, pixels):
            events.append("asked")
            return super().__call__(pixels)

    monkeypatch.setattr(os, "fsync", synced)
    write(Noting(), [photos], tmp_path / "out.csv", batch_size=4)
    assert events == ["synced", *["asked", "synced"] * 3]


@pytest.mark.parametrize("text", [b"my notes\n", b"my notes", b'{"a": 1}\n', b"[1]\n"])
def test_a_file_of_someone_elses_in_that_place_is_left_alone(photos, tmp_path, text):
    partial = tmp_path / "out.csv.partial"
    partial.write_bytes(text)
    with pytest.raises(PredictionError, match="is no begun table.*delete"):
        write(Colours(), [photos], tmp_path / "out.csv")
    assert partial.read_bytes() == text


def _write_with_small_files(photos, out, limit, connection):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write(Colours(), [photos], out, batch_size=4, images=out.parent / "shown")
    except Exception as error:
        connection.send((type(error).__name__, str(error)))
    else:
        connection.send(("none", ""))


# In bytes: no header, half a batch, an image, the second batch, the table itself is the larger.
@pytest.mark.parametrize("limit", [0, 50, 1300, 1500])
def test_on_a_full_disk_it_says_so_and_goes_on_when_there_is_room(photos, tmp_path, limit):
    out, calm = tmp_path / "full" / "out.jsonl", tmp_path / "calm.jsonl"
    out.parent.mkdir()
    write(Colours(), [photos], calm, batch_size=4)
    receiver, sender = _server.Pipe(duplex=False)
    process = _server.Process(target=_write_with_small_files, args=(photos, out, limit, sender))
    process.start()
    sender.close()
    assert receiver.poll(60)
    kind, message = receiver.recv()
    process.join()
    assert kind == "PredictionError" and "File too large" in message
    assert not out.exists()
    write(Colours(), [photos], out, batch_size=4, images=out.parent / "shown")
    assert out.read_bytes() == calm.read_bytes() and _left(out.parent) == []
    assert len([p for p in (out.parent / "shown").rglob("*") if p.is_file()]) == 9


def test_a_disk_that_takes_a_part_of_a_write_is_given_the_rest(photos, tmp_path, monkeypatch):
    out, calm = tmp_path / "out.jsonl", tmp_path / "calm.jsonl"
    write(Colours(), [photos], calm)
    put = os.write
    monkeypatch.setattr(os, "write", lambda handle, text: put(handle, text[:100]))
    write(Colours(), [photos], out)
    assert out.read_bytes() == calm.read_bytes()


# ---- annotated images


def test_annotated_images_lie_where_their_originals_do_and_show_them(photos, tmp_path):
    shown = tmp_path / "shown"
    Image.effect_noise((900, 600), 80).convert("RGB").save(photos / "below" / "wide.webp")
    rotated = Image.new("RGB", (60, 30), "red")
    rotated.paste("blue", (30, 0, 60, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    rotated.save(photos / "turned.jpg", exif=exif)
    predict(Colours(), [photos], images=shown)
    files = {str(p.relative_to(shown)) for p in shown.rglob("*") if p.is_file()}
    assert files == {*IN_PHOTOS, "below/wide.webp.jpg", "turned.jpg"}
    with Image.open(shown / "below" / "wide.webp.jpg") as wide:
        assert wide.size == (512, 341 + 32) and wide.format == "JPEG"
    with Image.open(shown / "turned.jpg") as turned:
        pixels = np.asarray(turned.convert("RGB")).astype(int)
    width = pixels.shape[1]
    assert turned.height == 60 + 32
    assert pixels[10, width // 2, 0] > 200 > 50 > pixels[10, width // 2, 2]  # red above
    assert pixels[50, width // 2, 2] > 200 > 50 > pixels[50, width // 2, 0]
    with Image.open(photos / "1.png") as original, Image.open(shown / "1.png") as sheet:
        assert sheet.format == "PNG"
        left = (sheet.width - original.width) // 2
        seen = sheet.crop((left, 0, left + original.width, original.height))
        np.testing.assert_array_equal(np.asarray(seen), np.asarray(original.convert("RGB")))


@pytest.mark.parametrize("name", ["ant", "Kätzchen", "кошка", "x" * 300, "two\nlines", ""])
@pytest.mark.parametrize("size", [(8, 8), (512, 40), (4000, 30)])
def test_the_band_holds_dark_letters_on_white_that_are_not_cut(name, size):
    sheet = prediction.annotate(Image.new("RGB", size, "black"), name, 0.876)
    height = min(size[1], round(size[1] * 512 / max(512, size[0])))
    assert sheet.width <= 512 and sheet.height == height + 32
    band = np.asarray(sheet.convert("L"))[-32:]
    assert (band < 60).sum() > 80 and (band > 240).mean() > 0.5
    edges = [band[:3], band[-3:], band[:, :6], band[:, -6:]]
    assert all((edge == 255).all() for edge in edges)


def test_other_names_and_values_are_other_letters():
    image = Image.new("RGB", (200, 20))
    sheets = [
        prediction.annotate(image, name, p).tobytes()
        for name, p in [
            ("ant", 0.5),
            ("bee", 0.5),
            ("ant", 0.6),
            ("x" * 300, 0.5),
            ("x" * 300, 0.6),
        ]
    ]
    assert len(set(sheets)) == 5


def test_annotated_images_never_leave_their_folder_nor_meet(photos, tmp_path, monkeypatch):
    away = save_noise(tmp_path / "away.png", 99)
    for name in ("0.png.jpg", "0.tif"):
        save_noise(photos / name, name.encode()[0])
    save_noise(photos / "0.tif.jpg", 5)
    entries = ["../away.png", str(away), "0.tif", "0.tif.jpg", "below/../0.png", "./0.png"]
    listed = write_list(photos / "list.txt", *entries)
    monkeypatch.chdir(photos / "below")
    inputs = [listed, "../1.png", "1.jpg", photos / "2.png"]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    table = predict(Colours(), inputs, images=tmp_path / "deep" / "shown")
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p: after[p] for p in before} == before
    new = set(after) - set(before)
    assert all(p.is_relative_to(tmp_path / "deep" / "shown") for p in new)
    assert (table.error != "").sum() == 1
    # ./0.png and below/../0.png are one image under two names
    assert len(new) == len(table) - 1


def test_two_images_of_one_name_below_the_folder_are_kept_apart(tmp_path, monkeypatch):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    save_noise(tmp_path / "in" / "a.png", 1)
    save_noise(tmp_path / "a.png", 2)
    monkeypatch.chdir(tmp_path / "in")
    predict(Colours(), ["a.png", "../a.png"], images=tmp_path / "shown")
    assert sorted(p.name for p in (tmp_path / "shown").iterdir()) == ["a-2.png", "a.png"]
    sheets = [np.asarray(Image.open(tmp_path / "shown" / n)) for n in ("a.png", "a-2.png")]
    assert not np.array_equal(*sheets)


def test_links_in_the_folder_of_annotated_images_are_not_followed(photos, tmp_path):
    shown, away = tmp_path / "shown", tmp_path / "away"
    shown.mkdir()
    away.mkdir()
    (away / "mine.png").write_text("mine")
    (shown / "0.png").symlink_to(away / "mine.png")
    (shown / "1.png").write_text("of an earlier call")
    predict(Colours(), [photos / "0.png"], images=shown)
    predict(Colours(), [photos / "1.png"], images=shown)
    assert (away / "mine.png").read_text() == "mine"
    assert not (shown / "0.png").is_symlink()
    for name in ("0.png", "1.png"):
        Image.open(shown / name).load()
    (shown / ".2.png.partial").symlink_to(away / "mine.png")
    with pytest.raises(PredictionError, match="was not written"):
        predict(Colours(), [photos / "2.png"], images=shown)
    (shown / "below").symlink_to(away)
    with pytest.raises(PredictionError, match="leads elsewhere by a link"):
        predict(Colours(), [photos], images=shown)
    assert [p.name for p in away.iterdir()] == ["mine.png"]
    assert (away / "mine.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("inputs", "shown", "said"),
    [
        (["."], ".", "lies in the input"),
        (["."], "shown", "lies in the input"),
        (["."], "..", "lies in images"),
        (["0.png"], ".", "lies in images"),
        (["list.txt"], ".", "lies in images"),
    ],
)
def test_no_original_is_ever_replaced(photos, monkeypatch, inputs, shown, said):
    write_list(photos / "list.txt", "1.png")
    before = {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()}
    monkeypatch.chdir(photos)
    with pytest.raises(PredictionError, match=said):
        predict(Colours(), inputs, images=shown)
    assert {p: p.read_bytes() for p in photos.rglob("*") if p.is_file()} == before


def test_a_folder_of_images_that_is_a_file_is_one_sentence(photos, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(PredictionError, match="was not written"):
        predict(Colours(), [photos], images=tmp_path / "taken")


def test_an_entry_of_a_list_is_named_by_a_path_that_exists(photos, tmp_path):
    (photos.parent / "more.txt").write_text(f"{photos.name}/0.png 0\n")
    (photos.parent / "more.jsonl").write_text(json.dumps({"filename": f"{photos.name}/1.png"}))
    inputs = [photos, photos.parent / "more.txt", photos.parent / "more.jsonl"]
    for file in predict(Colours(), inputs).file:
        assert Path(file).exists(), file


# ---- the command


def call(monkeypatch, capsys, *words) -> tuple[int | str | None, str]:
    """(exit code or last words, what was printed) of `workbench predict`."""
    monkeypatch.setattr(sys, "argv", ["workbench", "predict", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code, capsys.readouterr().out


def test_the_command_writes_the_table_and_counts_the_reasons(
    trained, wild, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "answers.csv"
    words = (trained.path, wild, "--out", out, "--top", 3, "--weights", "raw", "--workers", 1)
    code, said = call(monkeypatch, capsys, *words, "--images", tmp_path / "shown")
    assert code == 0
    measured = trained.choose_weights()[1]
    assert said.splitlines()[:3] == [
        f"answers by {trained.path}/last.pt, raw weights ({measured}), 10 classes",
        f"{len(BAD) + len(GOOD_NAMES) + 2} images: {len(GOOD_NAMES) + 2} answered in {out}",
        "4 undecodable: see the column error",
    ]
    assert "1 truncated: see the column error" in said
    table = pd.read_csv(out, dtype=str, keep_default_na=False, lineterminator="\n")
    assert list(table) == "file class1 class2 class3 p1 p2 p3 error".split()
    raw = predict(trained.path, [wild], top=3, weights="raw")
    assert table.class1.tolist() == raw.class1.fillna("").tolist()
    assert len(list((tmp_path / "shown").rglob("*.png"))) == len(GOOD_NAMES) + 2
    code, said = call(monkeypatch, capsys, *words)
    assert code.startswith(f"PredictionError: {out} exists and is not replaced; move it, or")


def test_the_exit_code_is_one_when_no_image_could_be_read(trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jpg").write_text("no image")
    out = tmp_path / "out.csv"
    code, said = call(monkeypatch, capsys, trained.path, tmp_path / "a.jpg", "--out", out)
    assert code == 1 and f"\n1 images: 0 answered in {out}\n1 undecodable" in said
    assert out.exists()
