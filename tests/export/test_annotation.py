"""Annotated images show the original above its class, and never replace another file."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import save_noise, write_list
from PIL import Image
from prediction_helpers import IN_PHOTOS, Colours, make_photos

from workbench.export import PredictionError, predict_to_file
from workbench.export.annotation import annotate


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.fixture
def predicted(tmp_path_factory):
    """Annotates the images of the inputs, and returns their table."""

    def call(inputs, annotate_dir) -> pd.DataFrame:
        out = tmp_path_factory.mktemp("out") / "out.csv"
        predict_to_file(Colours(), inputs, out, annotate_dir=annotate_dir)
        return pd.read_csv(out, keep_default_na=False)

    return call


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_annotated_images_have_the_names_of_their_originals_and_show_them(
    photos, tmp_path, predicted
):
    shown = tmp_path / "shown"
    Image.effect_noise((900, 600), 80).convert("RGB").save(photos / "below" / "wide.webp")
    rotated = Image.new("RGB", (60, 30), "red")
    rotated.paste("blue", (30, 0, 60, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter, clockwise
    rotated.save(photos / "rotated.jpg", exif=exif)
    predicted([photos], shown)
    files = {str(p.relative_to(shown)) for p in contents(shown)}
    assert files == {*IN_PHOTOS, "below/wide.webp.jpg", "rotated.jpg"}
    with Image.open(shown / "below" / "wide.webp.jpg") as wide:
        assert wide.size == (512, 341 + 32) and wide.format == "JPEG"
    with Image.open(shown / "rotated.jpg") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    width = pixels.shape[1]
    assert len(pixels) == 60 + 32
    assert pixels[10, width // 2, 0] > 200 > 50 > pixels[10, width // 2, 2]  # red above
    assert pixels[50, width // 2, 2] > 200 > 50 > pixels[50, width // 2, 0]
    with Image.open(photos / "1.png") as original, Image.open(shown / "1.png") as sheet:
        left = (sheet.width - original.width) // 2
        found = sheet.crop((left, 0, left + original.width, original.height))
        assert sheet.format == "PNG"
        np.testing.assert_array_equal(np.asarray(found), np.asarray(original))


@pytest.mark.parametrize("name", ["ant", "кошка", "x" * 300, "two\nlines", ""])
@pytest.mark.parametrize("size", [(8, 8), (4000, 30)])
def test_the_band_has_dark_letters_that_are_not_cut(name, size):
    image = Image.new("RGB", size, "black")
    sheet = annotate(image, name, 0.876)
    assert sheet.height == min(size[1], round(size[1] * 512 / max(512, size[0]))) + 32
    band = np.asarray(sheet.convert("L"))[-32:]
    assert (band < 60).sum() > 80 and (band > 240).mean() > 0.5
    edges = [band[:3], band[-3:], band[:, :6], band[:, -6:]]
    assert all((edge == 255).all() for edge in edges)
    others = (annotate(image, name + "y", 0.876), annotate(image, name, 0.877))
    assert len({found.tobytes() for found in (sheet, *others)}) == 3


def test_annotated_images_stay_in_their_folder(photos, tmp_path, monkeypatch, predicted):
    away = save_noise(tmp_path / "away.png", 99)
    entries = ["../away.png", str(away), "below/../0.png", "./0.png"]
    listed = write_list(photos / "list.txt", *entries)
    monkeypatch.chdir(photos / "below")
    before, shown = contents(tmp_path), tmp_path / "deep" / "shown"
    table = predicted([listed, "../1.png", "1.jpg", photos / "2.png"], shown)
    after = contents(tmp_path)
    assert {p: after[p] for p in before} == before
    assert all(p.is_relative_to(shown) for p in set(after) - set(before))
    assert (table.error != "").tolist() == [True] + [False] * 6
    assert len(after) - len(before) == 6


def test_existing_files_are_replaced_and_links_are_not_followed(photos, tmp_path, predicted):
    shown, away = tmp_path / "shown", tmp_path / "away"
    shown.mkdir()
    away.mkdir()
    (away / "mine.png").write_text("mine")
    (shown / "0.png").symlink_to(away / "mine.png")
    (shown / "1.png").write_text("of an earlier call")
    for name in ("0.png", "1.png"):
        predicted([photos / name], shown)
        assert not (shown / name).is_symlink()
        Image.open(shown / name).load()
    (shown / "below").symlink_to(away)
    with pytest.raises(PredictionError, match="is below a link"):
        predicted([photos], shown)
    assert contents(away) == {away / "mine.png": b"mine"}


@pytest.mark.parametrize(
    ("inputs", "shown", "message"),
    [
        (["."], ".", "is in the input"),
        (["."], "shown", "is in the input"),
        (["."], "..", "is in annotate_dir"),
        (["list.txt"], ".", "is in annotate_dir"),
        (["0.png", "../0.png"], "../shown", "would both be annotated as"),
        (["0.png"], "../taken", "was not written"),
    ],
)
def test_inputs_and_files_are_never_replaced(
    photos, monkeypatch, predicted, inputs, shown, message
):
    write_list(photos / "list.txt", "1.png")
    save_noise(photos.parent / "0.png", 1)
    (photos.parent / "taken").touch()
    before = contents(photos.parent)
    monkeypatch.chdir(photos)
    with pytest.raises(PredictionError, match=message):
        predicted(inputs, shown)
    assert contents(photos.parent) == before
