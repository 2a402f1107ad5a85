"""The embedded digits and letters."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from workbench import data
from workbench.data import images
from workbench.recipe import Recipe


def test_digits_are_those_of_sklearn_in_a_split_that_never_changes():
    digits, bunch = data.load_dataset(Recipe()), load_digits()
    assert (len(digits.train), len(digits.val)) == (1297, 500)
    assert (digits.val.label.value_counts() == 50).all() and len(digits.classes) == 10
    places = []
    for row in [*digits.train.itertuples(), *digits.val.itertuples()]:
        places.append(int(Path(row.file).stem))
        with Image.open(row.path) as image:
            pixels = np.asarray(image)
        np.testing.assert_array_equal(np.round(pixels * (16 / 255)), bunch.images[places[-1]])
        assert row.label == bunch.target[places[-1]]
    assert sorted(places) == list(range(1797))
    first = ["0/0030.png", "0/0150.png", "0/0185.png", "0/0229.png"]
    assert sorted(digits.val.file)[:4] == first
    assert data.fingerprint(digits) == "e5d75a8b87ae"  # also that of earlier runs


def test_letters_have_26_classes_on_both_sides_and_no_font_in_common():
    letters = data.load_dataset(Recipe(dataset="letters"))
    families = []
    for frame in (letters.train, letters.val):
        assert sorted(set(frame.label)) == list(range(26))
        assert frame.label.value_counts().nunique() == 1
        assert [f[0] for f in frame.file] == [letters.classes[label] for label in frame.label]
        fonts = set(frame.file.str.extract(r"/(.+)-\d+-[ul]")[0])
        families.append({name.split("-")[0] for name in fonts})
    assert all(families) and not families[0] & families[1]
    for row in letters.val.iloc[::40].itertuples():
        pixels = np.asarray(images.decode(row.path))
        assert pixels.shape == (32, 32, 3) and pixels.min() < 80
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert border.mean() > 240


@pytest.mark.parametrize("dataset", ["digits", "letters"])
def test_the_embedded_sets_have_no_findings(dataset):
    assert len(data.check_data(data.load_dataset(Recipe(dataset=dataset)), progress=False)) == 0
