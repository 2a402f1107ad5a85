"""Views of images: what they show is what training does."""

import math

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import JUDGED, run_folder, save_noise
from PIL import Image
from torch import nn

from workbench import data, training
from workbench.data import images
from workbench.evaluation import comparison
from workbench.evaluation.grad_cam import grad_cam
from workbench.recipe import Recipe
from workbench.ui import image_grids, views
from workbench.ui.figure import Sheet

STRONG = Recipe(
    crop_scale=[0.3, 1.0], hflip=0.5, brightness=0.4, hue=0.1, randaug_n=2, randaug_variant="timm"
)


def cell(sheet: Sheet, i: int, size: int = 32) -> np.ndarray:
    """The i-th image of a sheet at its own size, of which the cell is a multiple."""
    pixels = placed(sheet, i)
    factor, rest = divmod(pixels.shape[0], size)
    assert rest == 0 and pixels.shape[0] == pixels.shape[1]
    return pixels[::factor, ::factor]


def placed(sheet: Sheet, i: int) -> np.ndarray:
    """The i-th image as it is on the sheet."""
    return np.asarray(sheet.image.crop(sheet.cells[i][1]))


def texts(sheet: Sheet) -> list[str]:
    """Heading, names of rows and titles."""
    return [*sheet.texts, *filter(None, titles(sheet))]


def titles(sheet: Sheet) -> list[str]:
    return [title for title, _ in sheet.cells]


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load_dataset(Recipe())


# ---- figures


def test_augmentation_grid_shows_the_samples_of_training(digits):
    row = 5
    image = images.decode(digits.train.path[row])
    sheet = views.augmentation_grid(STRONG, image, row)
    steps = data.steps_per_epoch(len(digits.train), 100)
    transform = training.train_transform(STRONG)
    for epoch in range(2):
        of_epoch = range(epoch * steps, (epoch + 1) * steps)
        loader = data.train_loader(digits.train, transform, seed=0, batch_size=100, steps=of_epoch)
        [batch_images] = [b.images[b.indices == row] for b in loader if row in b.indices]
        sample = batch_images[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(cell(sheet, epoch + 2), sample)
    np.testing.assert_array_equal(cell(sheet, 1), training.eval_transform(STRONG)(image))
    later = views.augmentation_grid(STRONG, image, row, first_epoch=1)
    np.testing.assert_array_equal(cell(later, 2), cell(sheet, 3))
    assert titles(sheet)[:2] == ["original, 8 x 8", "validation"]
    assert titles(sheet)[3].startswith("epoch 2")
    other = views.augmentation_grid(STRONG.replace(seed=1), image, row)
    assert not np.array_equal(other.image, sheet.image)


def test_samples_are_of_the_downscaled_image_as_in_training(tmp_path):
    image = images.decode(save_noise(tmp_path / "mine.jpg", 1, (180, 120)))
    recipe = Recipe(train_resize=40, crop_scale=[0.3, 1.0], hflip=0.5)
    sheet = views.augmentation_grid(recipe, image, 3)
    wanted = training.train_transform(recipe)(image, data.rng_for(0, data.DRAW, 0, 3))
    np.testing.assert_array_equal(cell(sheet, 2), wanted)
    left, top, right, bottom = sheet.cells[0][1]
    assert (right - left) / (bottom - top) == pytest.approx(180 / 120, rel=0.01)


BLACK, WHITE = (np.full((32, 32, 3), level, np.uint8) for level in (0, 255))


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
@pytest.mark.parametrize("show", [views.augmentation_grid, views.operations])
def test_samples_are_mixed_with_the_other_image_by_the_share_in_their_title(kind, show):
    randaug = {"randaug_n": 1, "randaug_m": 0.0}  # of which one operation inverts
    recipe = Recipe(**{kind: 1.0}, **(randaug if show == views.operations else {}))
    sheet = show(recipe, BLACK, other=WHITE)
    mixed = [(i, t.split("label ")[1].split()[0]) for i, t in enumerate(titles(sheet))
             if "label" in t and "invert" not in t]  # fmt: skip
    assert len(mixed) >= 12
    for i, share in mixed:
        pixels = cell(sheet, i) / 255
        assert pixels.mean() == pytest.approx(1 - float(share), abs=0.01)
        assert (kind == "cutmix_alpha") == bool(set(np.unique(pixels)) <= {0, 1})


def test_samples_and_operations_are_erased_as_often_as_the_recipe_says():
    recipe = Recipe(erase_prob=0.5, erase_mode="const")
    grey = np.uint8(np.round(255 * np.array(recipe.mean)))
    covered = lambda sheet, i: (cell(sheet, i) == grey).all(2).mean()
    sheet = views.augmentation_grid(recipe, BLACK)
    shares = [covered(sheet, i) for i in range(2, 21)]
    assert 4 <= np.count_nonzero(shares) <= 15 and max(shares) <= 0.4
    assert covered(sheet, 1) == 0, "validation is never erased"
    of_randaug = views.operations(recipe.replace(randaug_n=1, randaug_m=0.0), WHITE)
    assert any(covered(of_randaug, i) for i in range(1, 16))


def test_each_operation_shows_mixing_and_erasing_at_three_strengths():
    recipe = Recipe(mixup_alpha=0.2, cutmix_alpha=1.0, erase_prob=0.1, erase_mode="const")
    recipe = recipe.replace(crop_ratio=[1.0, 1.0])
    sheet = views.sweep(recipe, BLACK, other=WHITE)
    assert sheet.texts == ["mixup", "cutmix", "erasing"]
    light = [placed(sheet, i).mean() / 255 for i in range(6)]
    assert light == pytest.approx([0, 0.25, 0.5] * 2, abs=0.02)
    grey = np.uint8(np.round(255 * np.array(recipe.mean)))
    erased = [(placed(sheet, i) == grey).all(2).mean() for i in range(6, 9)]
    assert erased == pytest.approx([0.02, 0.18, 0.33], abs=0.02)


def test_a_sweep_is_without_randaugment_and_a_table_if_all_is_off(digits):
    image = images.decode(digits.train.path[0])
    sheet = views.sweep(STRONG, image, "strong")
    assert sheet.texts == ["strong", "crop", "aspect", "flip", "brightness", "hue"]
    assert len(titles(sheet)) == 4 * 3 + 2
    nothing = views.sweep(Recipe(crop_ratio=[1.0, 1.0]), image, "plain")
    assert nothing.to_dict("list") == {"plain": ["crop, flip and jitter are off"]}


def test_the_operations_of_randaugment_follow_the_magnitude(digits):
    image = images.decode(digits.train.path[0])
    rotated = lambda m: next(
        t for t in titles(views.operations(Recipe(randaug_n=1, randaug_m=m), image)) if "rot" in t
    )
    assert rotated(5.0) == "rotate\n15°" and rotated(10.0) == "rotate\n30°"
    sheet = views.operations(Recipe(), image)  # RandAugment is off
    assert len(sheet.cells) == 16 and "magnitude 7, variant up" in sheet.texts[0]


@pytest.mark.parametrize("variant", ["up", "timm"])
def test_every_operation_of_randaugment_has_a_row_even_when_it_is_off(variant, digits):
    image = images.decode(digits.train.path[0])
    recipe = Recipe(randaug_n=1, randaug_variant=variant, crop_scale=[0.1, 1.0])
    operations = views.magnitude_table(recipe)[variant]["operation"].tolist()
    shown = texts(views.magnitudes(recipe, image))
    assert set(operations) <= set(shown) and len(operations) == 15
    assert f"variant {variant}" in shown[0]
    other = views.magnitude_table(Recipe())["up"]["operation"]
    assert set(other) <= set(texts(views.magnitudes(Recipe(), image)))


def test_model_inputs_are_those_of_the_first_step_with_their_mean(digits):
    recipe = STRONG.replace(erase_prob=1.0, mixup_alpha=0.8)
    sheet = views.model_inputs(recipe, digits)
    tensors, targets = training.preview_batch(recipe, digits, 24)
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    for i in range(24):
        pixels = (tensors[i].permute(1, 2, 0) * std + mean) * 255
        difference = cell(sheet, i) - pixels.clamp(0, 255).numpy()
        assert np.abs(difference).max() <= 0.51
    heading = f"(24, 3, 32, 32), mean {tensors.mean():.2f}, std {tensors.std():.2f}"
    assert sheet.texts == [heading]
    assert titles(sheet)[0] == image_grids.label_text(targets[0], digits.classes)


def test_other_predictions_of_an_exported_network_are_shown_by_format(digits):
    val = digits.val.iloc[[3, 7]]
    flips = pd.DataFrame({"file": val.file, "list": val.list, "format": ["int8", "onnx"],
                          "before": [1, 2], "after": [4, 5], "label": [1, 2]})  # fmt: skip
    figure = views.other_predictions(flips, "int8", Recipe(), digits.classes)
    assert texts(figure) == ["int8: 1 other predictions", "1 \u2192 4\nis 1"]
    see = training.eval_transform(Recipe())
    np.testing.assert_array_equal(cell(figure, 0), see(images.decode(val.path.iloc[0])))
    none = views.other_predictions(flips, "program", Recipe(), digits.classes)
    assert isinstance(none, pd.DataFrame) and none.empty


def test_distances_are_root_mean_squares_over_pixels_and_0_without_augmentation(digits):
    plain = views.distances(Recipe(crop_ratio=[1.0, 1.0]), digits, 3, 2)
    assert plain.area.tolist() == [1] * 6 and plain.change.tolist() == [0] * 6
    table = views.distances(Recipe(crop_ratio=[1.0, 1.0], hflip=1.0), digits, 3, 1)
    resize = lambda p: images.decode(p).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    whole = [np.asarray(resize(path), float) for path in digits.train.path[:3]]
    for i, row in enumerate(table.itertuples()):
        rms = lambda a, b: math.sqrt(((a - b) ** 2).mean())
        # The resizes of OpenCV and Pillow differ by a level in some pixels.
        assert row.change == pytest.approx(rms(whole[i][:, ::-1], whole[i]), rel=2e-3)
        assert row.reference_distance == pytest.approx(rms(whole[(i + 1) % 3], whole[i]), rel=2e-3)
        assert row.file == digits.train.file[i]


def test_the_area_is_that_of_the_crop(image_folder):
    recipe = Recipe(dataset="files", data_dir=str(image_folder), crop_scale=[0.25, 0.25])
    table = views.distances(recipe, data.load_dataset(recipe), 4, 10)
    assert len(table) == 40 and table.area.to_numpy() == pytest.approx(0.25, abs=0.03)


# ---- flips


def test_flips_show_the_share_of_correct_runs(tmp_path, monkeypatch):
    """The class that most runs predict may be right before and after."""
    paths = []
    for name, seed, predicted in (("a", 0, [0, 1]), ("a", 1, [1, 0]), ("b", 0, [0, 1])):
        path = run_folder(tmp_path, name, seed, n=2, lr=0.1 if name == "a" else 0.2)
        frame = pd.read_parquet(path / "predictions.parquet")
        frame = frame.assign(label=[0, 1], class1=np.int32(predicted))
        frame.to_parquet(path / "predictions.parquet", index=False)
        paths.append(path)
    place = save_noise(tmp_path / "0.png", 0)
    val = pd.DataFrame({"list": 0, "file": ["0.png", "1.png"], "path": str(place)})
    monkeypatch.setattr(data, "load_dataset", lambda recipe: data.Dataset(None, val, JUDGED))
    found = comparison.compare(paths)
    zero, one = JUDGED[:2]
    assert texts(views.flips(found, "b", "gained")) == [
        "gained: 2 of 2 images",
        f"right 50% \u2192 100%\nis {zero}",
        f"{zero} \u2192 {one}\nright 50% \u2192 100%\nis {one}",
    ]
    assert texts(views.flips(found, "b", of=one.upper()))[0] == "gained: 1 of 2 images"
    none = views.flips(found, "b", "lost")
    assert isinstance(none, pd.DataFrame) and none.empty and "file" in none


# ---- Grad-CAM


@pytest.fixture
def image_files(tmp_path):
    return [save_noise(tmp_path / f"{i}.png", i, (64, 64)) for i in range(4)]


RECIPE, NAMES = Recipe(image_size=48, val_resize=48, model="test_resnet"), list("abcdefg")


def test_a_row_is_the_image_and_the_map_of_each_class_with_its_probability(image_files):
    model = timm.create_model("resnet10t", num_classes=7).train()
    targets = {"predicted": (model, [0, 1, 2, 3]), "label": (model, [6, 5, 4, 3])}
    figure = views.grad_cam_grid(RECIPE, image_files, NAMES, targets, "four")
    assert model.training
    inputs = [training.eval_transform(RECIPE)(images.decode(path)) for path in image_files]
    batch = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2)
    batch = training.Normalize(RECIPE, torch.device("cpu"))(batch)
    with torch.no_grad():
        p = model.eval()(batch).softmax(1).numpy()
    expected = ["four"]
    for i in range(4):
        expected += [str(i + 1), f"predicted {NAMES[i]}: {p[i, i]:.2f}"]
        expected += [f"label {NAMES[6 - i]}: {p[i, 6 - i]:.2f}"]
    assert sorted(texts(figure)) == sorted(expected)
    maps = [grad_cam(model, batch[:1], [c])[0] for c in (0, 6)]
    for k, image in enumerate([inputs[0], *(image_grids.tinted(inputs[0], cam) for cam in maps)]):
        assert np.abs(cell(figure, k, 48).astype(int) - image).max() <= 1


def test_a_model_without_a_map_has_a_sentence_in_the_heading(image_files):
    flat, classes = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 3)), [0, 1, 2, 1]
    sentence = "teacher: the prediction depends on no feature map"
    only = {"teacher": (flat, classes)}
    both = {"student": (timm.create_model("resnet10t", num_classes=7), classes)} | only
    shown = texts(views.grad_cam_grid(RECIPE, image_files, NAMES, both, "copied"))
    assert f"copied; {sentence}" in shown
    assert len([text for text in shown if text.startswith("student ")]) == 4
    assert not [text for text in shown if text.startswith("teacher ")]
    assert texts(views.grad_cam_grid(RECIPE, image_files, NAMES, only)) == [sentence]
    assert texts(views.grad_cam_grid(RECIPE, [], NAMES, both, "0 mistakes")) == ["0 mistakes"]
