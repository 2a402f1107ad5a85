"""The embedded digits and letters."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from workbench import data
from workbench.data import images
from workbench.recipe import Recipe


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load_dataset(Recipe())


@pytest.fixture(scope="module")
def letters() -> data.Dataset:
    return data.load_dataset(Recipe(dataset="letters"))


def test_digits_are_all_of_sklearns_split_once(digits):
    assert (len(digits.train), len(digits.val)) == (1297, 500)
    assert (digits.val.label.value_counts() == 50).all() and len(digits.classes) == 10
    place = [int(Path(f).stem) for f in [*digits.train.file, *digits.val.file]]
    assert sorted(place) == list(range(1797))


def test_digits_have_sklearns_pixels(digits):
    bunch = load_digits()
    for row in digits.val.itertuples():
        i = int(Path(row.file).stem)
        with Image.open(row.path) as image:
            pixels = np.asarray(image)
        np.testing.assert_array_equal(np.round(pixels * (16 / 255)), bunch.images[i])
        assert row.label == bunch.target[i]


def test_the_split_of_the_digits_never_changes(digits):
    """Golden: a changed split would make every earlier run incomparable."""
    assert sorted(digits.val.file)[:4] == [
        "0/0030.png",
        "0/0150.png",
        "0/0185.png",
        "0/0229.png",
    ]
    assert data.fingerprint(digits) == "e5d75a8b87ae"


def test_letters_have_26_classes_on_both_sides_and_no_font_in_common(letters):
    for frame in (letters.train, letters.val):
        assert sorted(set(frame.label)) == list(range(26))
        assert frame.label.value_counts().nunique() == 1
        assert [f[0] for f in frame.file] == [letters.classes[label] for label in frame.label]
    fonts = [set(f.file.str.extract(r"/(.+)-\d+-[ul]")[0]) for f in (letters.train, letters.val)]
    assert all(fonts) and not fonts[0] & fonts[1]
    families = [{name.split("-")[0] for name in side} for side in fonts]
    assert not families[0] & families[1]


@pytest.mark.parametrize("dataset", ["digits", "letters"])
def test_the_embedded_sets_have_no_findings(dataset):
    assert len(data.check_data(Recipe(dataset=dataset), progress=False)) == 0


def test_letters_are_drawn_dark_on_light_and_inside_the_image(letters):
    for row in letters.val.iloc[::40].itertuples():
        pixels = np.asarray(images.decode(row.path))
        assert pixels.shape == (32, 32, 3) and pixels.min() < 80
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert border.mean() > 240
