"""Transforms of one image against Pillow and torchvision: pixels and distributions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import differences, noise_image, photograph
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms.v2 import functional as F

from workbench import training
from workbench.augmentation import (
    EvalTransform,
    RandAugment,
    RandAugmentIncreasing,
    ResizeShortSide,
    TrainTransform,
    describe,
)
from workbench.augmentation.pixel_ops import JITTER
from workbench.data import DRAW, rng_for
from workbench.recipe import Recipe

STANDARD = TrainTransform(224, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)  # UP's T-std
STRONG = replace(STANDARD, randaug=RandAugmentIncreasing(), autoaugment=True)


def samples(transform: TrainTransform, width: int, height: int, count: int) -> list[dict]:
    return [transform.sample_params(rng_for(0, DRAW, 0, i), width, height) for i in range(count)]


SIZES = [(40, 32), (32, 40), (33, 33), (17, 90), (300, 201)]


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
def test_a_crop_is_pillows_crop_and_resize(width, height, interpolation):
    image, transform = noise_image(width, height), TrainTransform(24, interpolation=interpolation)
    params = transform.sample_params(np.random.default_rng(3), width, height)
    left, top = params["left"], params["top"]
    crop = image.crop((left, top, left + params["width"], top + params["height"]))
    wanted = crop.resize((24, 24), Image.Resampling[interpolation.upper()])
    if params["flip"]:
        wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    apart = differences(transform.apply(image, params), wanted)
    # Bilinear and bicubic are computed with weights of 16 bits where Pillow has 22.
    most, mean = {"bilinear": (1, 0.3), "bicubic": (4, 0.4)}.get(interpolation, (0, 0))
    assert apart.max() <= most and apart.mean() <= mean


def test_the_standard_transform_gives_torchvisions_pixels(monkeypatch):
    """Our parameters in torchvision's own (classic) RandomResizedCrop and ColorJitter."""
    image, seen = photograph(90, 70), set()
    theirs = transforms.RandomResizedCrop(224), transforms.ColorJitter(0.2, 0.2, 0.2, 0.1)
    for i, params in enumerate(samples(STANDARD, 90, 70, 12)):
        names = tuple(name for name in params if name in JITTER)
        seen.add(names)
        box = (params["top"], params["left"], params["height"], params["width"])
        order = torch.tensor([list(JITTER).index(name) for name in names])
        jitter = (order, *(params[name] for name in JITTER))
        monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", lambda *a, b=box: b)
        monkeypatch.setattr(transforms.ColorJitter, "get_params", lambda *a, p=jitter: p)
        flip = transforms.RandomHorizontalFlip(float(params["flip"]))
        wanted = theirs[1](flip(theirs[0](image)))
        apart = differences(STANDARD(image, rng_for(0, DRAW, 0, i)), wanted)
        assert apart.mean() <= 1.5 and np.quantile(apart, 0.999) <= 12  # hue has 8 bits in both
    assert len(seen) > 4  # the order of the jitter varies


@pytest.mark.parametrize("width, height", [*SIZES, (500, 375), (256, 256), (224, 1000)])
@pytest.mark.parametrize("resize, size", [(256, 224), (32, 32), (40, 33)])
def test_the_eval_transform_is_torchvisions(width, height, resize, size):
    image = noise_image(width, height)
    theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])(image)
    apart = differences(EvalTransform(size, resize)(image), theirs)
    # Ours resizes the box of the crop alone. Pillow rounds between its two passes, whose order it
    # chooses by the sizes, and has the corner in single precision.
    assert apart.max() <= 2 and apart.mean() <= 0.3


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic", "lanczos", "hamming"])
def test_the_eval_transform_uses_its_interpolation(interpolation):
    image = noise_image(90, 64)
    whole = image.resize((45, 32), Image.Resampling[interpolation.upper()])
    ours = EvalTransform(32, 32, interpolation)(image)
    # torchvision and UP place the centre at round((45 - 32) / 2) = 6
    apart = differences(ours, whole.crop((6, 0, 38, 32)))
    assert apart.max() <= 1 and apart.mean() <= 0.001


def test_an_image_of_the_right_size_is_unchanged_and_a_small_one_not_enlarged():
    image = noise_image(32, 32)
    neutral = TrainTransform(32, crop_scale=(1, 1), crop_ratio=(1, 1), hflip=0)
    np.testing.assert_array_equal(neutral(image, np.random.default_rng(0)), image)
    np.testing.assert_array_equal(EvalTransform(32, 32)(image), image)
    np.testing.assert_array_equal(ResizeShortSide(500)(image), image)


@pytest.mark.parametrize("width, height", [(500, 375), (1000, 50), (50, 1000)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.35, 1.0)])
def test_crops_have_torchvisions_distribution(width, height, scale):
    count, ratio = 1500, (3 / 4, 4 / 3)
    ours = samples(TrainTransform(224, scale, ratio), width, height, count)
    ours = np.array([[d["left"], d["top"], d["width"], d["height"]] for d in ours], float)
    image = Image.new("L", (width, height))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        get = transforms.RandomResizedCrop.get_params
        theirs = np.array([get(image, scale, ratio) for _ in range(count)], float)[:, [1, 0, 3, 2]]
    rng = np.random.default_rng(0)  # breaks ties between whole pixels, which KS does not know

    def features(boxes):
        left, top, w, h = (boxes + rng.uniform(-0.5, 0.5, boxes.shape)).T
        free_left, free_top = left / (width - w + 2), top / (height - h + 2)
        return {"area": w * h, "ratio": w / h, "left": free_left, "top": free_top}

    for (name, a), b in zip(features(ours).items(), features(theirs).values(), strict=True):
        assert stats.ks_2samp(a, b).pvalue > 1e-3, name


@pytest.mark.parametrize("width, height", [(4, 4), (4, 900), (900, 4), (5, 7)])
def test_an_image_of_any_shape_has_a_crop(width, height):
    for params in samples(TrainTransform(8), width, height, 50):
        assert 1 <= params["width"] <= width and 0 <= params["left"] <= width - params["width"]
        assert 1 <= params["height"] <= height and 0 <= params["top"] <= height - params["height"]
    assert TrainTransform(8)(noise_image(width, height), rng_for(0, DRAW)).shape == (8, 8, 3)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_have_their_probability(probability):
    flips = sum(d["flip"] for d in samples(TrainTransform(8, hflip=probability), 9, 9, 2000))
    assert stats.binomtest(flips, 2000, probability).pvalue > 1e-3


def test_jitter_is_uniform_around_no_change_in_all_24_orders():
    many = samples(STANDARD, 64, 64, 2400)
    for name, neutral in JITTER.items():
        strength, values = getattr(STANDARD, name), [d[name] for d in many]
        spread = (neutral - strength, 2 * strength)
        assert stats.kstest(values, "uniform", spread).pvalue > 1e-3, name
    orders = [tuple(k for k in d if k in JITTER) for d in many]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def test_the_parameters_of_an_image_are_independent():
    transform = replace(STANDARD, crop_scale=(0.08, 0.3))  # small, so that every ratio fits
    columns = []
    for d in samples(transform, 500, 500, 2000):
        area, ratio = d["width"] * d["height"], d["width"] / d["height"]
        left, top = d["left"] / (500 - d["width"]), d["top"] / (500 - d["height"])
        columns.append([area, ratio, left, top, d["flip"], *(d[name] for name in JITTER)])
    assert np.abs(np.corrcoef(np.transpose(columns)) - np.eye(9)).max() < 0.1


def test_an_operation_does_not_change_the_parameters_of_others():
    plain = TrainTransform(32, hflip=0.5, contrast=0.2)
    for name, value in dict(brightness=0.4, saturation=0.3, hue=0.1, autoaugment=True,
                            randaug=RandAugmentIncreasing()).items():  # fmt: skip
        more = replace(plain, **{name: value})
        for a, b in zip(samples(plain, 40, 32, 20), samples(more, 40, 32, 20), strict=True):
            assert a.items() <= b.items() and set(b) - set(a) == {name}


def test_parameters_are_plain_numbers_that_can_be_repeated_and_do_not_change_the_image():
    image = noise_image(64, 48)
    before = image.copy()
    for transform in (STANDARD, STRONG):
        seen = transform(image, rng_for(0, DRAW))
        params = eval(repr(transform.sample_params(rng_for(0, DRAW), 64, 48)))
        np.testing.assert_array_equal(transform.apply(image, params), seen)
        assert (transform(image, rng_for(0, DRAW, 1)) != seen).any()
    assert image == before


def test_a_sweep_has_every_operation_in_use_from_end_to_end():
    rows = STANDARD.sweep()
    assert list(rows) == ["crop", "aspect", "flip", *JITTER]
    assert [row["brightness"] for row in rows["brightness"]][::2] == pytest.approx([0.8, 1, 1.2])
    assert rows["hue"][-1] == {"hue": pytest.approx(0.1)}
    assert [s["area"] for s in rows["crop"]][::4] == pytest.approx([1.0, 0.08])
    assert rows["aspect"][0]["ratio"] == pytest.approx(3 / 4)
    image = noise_image(64, 48)
    for settings in STRONG.sweep().values():
        assert all(STRONG.at(image, s).shape == (224, 224, 3) for s in settings)
    assert TrainTransform(32, crop_scale=(1.0, 1.0), crop_ratio=(1, 1), hflip=0.0).sweep() == {}


def test_the_neutral_setting_changes_nothing():
    image, transform = noise_image(32, 32), TrainTransform(32, brightness=0.4, hue=0.2)
    middle = {name: row[2] for name, row in transform.sweep().items() if name in JITTER}
    np.testing.assert_array_equal(transform.at(image, middle["brightness"]), image)
    np.testing.assert_array_equal(transform.at(image, {"flip": False}), image)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    np.testing.assert_array_equal(transform.at(image, {"flip": True}), mirrored)
    assert differences(transform.at(image, middle["hue"]), image).max() <= 8  # HSV has 8 bits


def test_randaugment_comes_after_the_flip_and_before_the_jitter():
    image, box = photograph(64, 64), {"left": 0, "top": 0, "width": 64, "height": 64}
    transform = replace(STRONG, size=64)
    params = {**box, "flip": True, "brightness": 1.4, "randaug": [("rotate", 21.0, "nearest")]}
    turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(21)
    apart = differences(transform.apply(image, params), F.adjust_brightness(turned, 1.4))
    assert (apart > 0).mean() < 0.01  # nearest neighbours half way between two


@pytest.mark.parametrize(
    "params, text",
    [
        ({"flip": False}, ""),
        ({"flip": True, "randaug": [("rotate", -21.0, "nearest"), ("invert", None, "")],
          "brightness": 1.2}, "flip, rotate -21°, invert, brightness 1.20"),
        ({"randaug": [("translate_x", 31.5, "bicubic")]}, "translate_x 31.5 px"),
        ({"randaug": [("posterize", 2, "")]}, "posterize 2 bits"),
    ],
)  # fmt: skip
def test_describe_names_the_operations(params, text):
    assert describe(params) == text


def test_transforms_are_built_from_a_recipe():
    options = dict(
        hflip=0.3, brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4, autoaugment=True
    )
    recipe = Recipe(
        image_size=48, crop_scale=[0.2, 0.9], crop_ratio=[0.5, 2.0], interpolation="bicubic",
        train_resize=64, val_resize=60, val_image_size=56, augment_on_device=False, **options,
    )  # fmt: skip
    wanted = TrainTransform(
        48, (0.2, 0.9), (0.5, 2.0), "bicubic", **options, resize=ResizeShortSide(64, "bicubic")
    )
    assert training.train_transform(recipe) == wanted
    assert training.eval_transform(recipe) == EvalTransform(56, 60, "bicubic")
    assert training.eval_transform(Recipe(image_size=24)).size == 24
    on = Recipe(randaug_n=3, randaug_m=8.0, randaug_std=1.0)
    assert training.train_transform(on).randaug == RandAugmentIncreasing(3, 8.0, 1.0)
    on = on.replace(randaug_increasing=False, randaug_variant="timm", augment_on_device=True)
    ours = training.train_transform(on)
    assert ours.on_device and ours.randaug == RandAugment.timm(3, 8.0, 1.0, on.mean)
