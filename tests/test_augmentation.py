"""Transforms against Pillow and torchvision: the same pixels, draws of the same distribution."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy import stats
from torchvision import transforms

from workbench.augmentation import JITTER, TestTransform, TrainTransform
from workbench.data import DRAW, stream

STANDARD = TrainTransform(224, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)  # UP's T-std


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def draws(transform: TrainTransform, width: int, height: int, count: int) -> list[dict]:
    return [transform.draw(stream(0, DRAW, 0, i), width, height) for i in range(count)]


# ---- pixels

SIZES = [(40, 32), (32, 40), (33, 33), (17, 90), (64, 48), (300, 201)]


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
def test_a_crop_is_pillows_crop_and_resize(width, height, interpolation):
    image, transform = picture(width, height), TrainTransform(24, interpolation=interpolation)
    draw = transform.draw(np.random.default_rng(3), width, height)
    left, top = draw["left"], draw["top"]
    crop = image.crop((left, top, left + draw["width"], top + draw["height"]))
    wanted = crop.resize((24, 24), Image.Resampling[interpolation.upper()])
    if draw["flip"]:
        wanted = wanted.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert transform.apply(image, draw) == wanted


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "name, enhance",
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.8, 1.0, 1.2])
def test_jitter_is_pillows_enhancement(name, enhance, factor, flip):
    image = picture(24, 24)
    whole = {"left": 0, "top": 0, "width": 24, "height": 24, "flip": flip}
    wanted = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image
    ours = TrainTransform(24).apply(image, {**whole, name: factor})
    assert ours == enhance(wanted).enhance(factor)


def test_hue_turns_the_colour_circle():
    whole = {"left": 0, "top": 0, "width": 8, "height": 8, "flip": False}
    for shift, colour in [(0.0, "#ff0000"), (1 / 3, "#00ff00"), (-1 / 3, "#0000ff")]:
        ours = TrainTransform(8).apply(Image.new("RGB", (8, 8), "red"), {**whole, "hue": shift})
        wanted = np.asarray(Image.new("RGB", (8, 8), colour), int)
        assert np.abs(np.asarray(ours, int) - wanted).max() <= 6  # 8-bit steps of the circle


def test_the_standard_transform_gives_torchvisions_pixels(monkeypatch):
    """Our draw put into torchvision's own (classic) modules: RandomResizedCrop and ColorJitter."""
    image, seen = picture(90, 70), set()
    for i, draw in enumerate(draws(STANDARD, 90, 70, 12)):
        names = [name for name in draw if name in JITTER]
        seen.add(tuple(names))
        box = (draw["top"], draw["left"], draw["height"], draw["width"])
        parameters = (
            torch.tensor([["brightness", "contrast", "saturation", "hue"].index(n) for n in names]),
            *(draw[n] for n in ("brightness", "contrast", "saturation", "hue")),
        )
        monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", lambda *a, b=box: b)
        monkeypatch.setattr(transforms.ColorJitter, "get_params", lambda *a, p=parameters: p)
        theirs = transforms.Compose(
            [
                transforms.RandomResizedCrop(224),
                transforms.RandomHorizontalFlip(float(draw["flip"])),
                transforms.ColorJitter(0.2, 0.2, 0.2, 0.1),
            ]
        )(image)
        assert STANDARD(image, stream(0, DRAW, 0, i)) == theirs
    assert len(seen) > 4  # the order of the jitter varies


@pytest.mark.parametrize("width, height", [*SIZES, (500, 375), (256, 256), (224, 1000)])
@pytest.mark.parametrize("resize, size", [(256, 224), (32, 32), (40, 33)])
def test_the_test_transform_is_torchvisions(width, height, resize, size):
    image = picture(width, height)
    theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])(image)
    ours = TestTransform(size, resize)(image)
    assert ours == theirs and ours.size == (size, size)


@pytest.mark.parametrize("interpolation", ["nearest", "bicubic", "lanczos", "hamming"])
def test_the_test_transform_takes_the_interpolation_asked_for(interpolation):
    image = picture(90, 64)
    whole = image.resize((45, 32), Image.Resampling[interpolation.upper()])
    ours = TestTransform(32, 32, interpolation)(image)
    # torchvision and UP place the centre at round((45 - 32) / 2) = 6
    assert ours == whole.crop((6, 0, 38, 32))


def test_a_picture_of_the_right_size_passes_through_untouched():
    image = picture(32, 32)
    neutral = TrainTransform(32, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0)
    assert neutral(image, np.random.default_rng(0)) == image
    assert TestTransform(32, 32)(image) == image


# ---- distributions


@pytest.mark.parametrize("width, height", [(500, 375), (60, 90), (1000, 50), (50, 1000)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.35, 1.0)])
def test_crops_have_torchvisions_distribution(width, height, scale):
    count, ratio = 1500, (3 / 4, 4 / 3)
    ours = draws(TrainTransform(224, scale, ratio), width, height, count)
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


def test_crops_stay_inside_and_keep_the_area_and_ratio_asked_for():
    transform = TrainTransform(32, (0.25, 0.5), (0.5, 2.0))
    for draw in draws(transform, 200, 160, 500):
        assert 0 <= draw["left"] <= 200 - draw["width"]
        assert 0 <= draw["top"] <= 160 - draw["height"]
        assert 0.24 < draw["width"] * draw["height"] / (200 * 160) < 0.51
        assert 0.49 < draw["width"] / draw["height"] < 2.05


@pytest.mark.parametrize("width, height", [(4, 4), (4, 900), (900, 4), (5, 7)])
def test_a_picture_of_any_shape_has_a_crop(width, height):
    for draw in draws(TrainTransform(8), width, height, 50):
        assert 1 <= draw["width"] <= width and 0 <= draw["left"] <= width - draw["width"]
        assert 1 <= draw["height"] <= height and 0 <= draw["top"] <= height - draw["height"]
    assert TrainTransform(8)(picture(width, height), stream(0, DRAW)).size == (8, 8)


def test_the_crop_reaches_every_edge():
    boxes = draws(TrainTransform(8, (0.5, 1.0)), 12, 10, 600)
    assert {0, 1, 2} <= {d["left"] for d in boxes} and {0, 1, 2} <= {d["top"] for d in boxes}
    assert any(d["left"] + d["width"] == 12 and d["left"] for d in boxes)
    assert any(d["top"] + d["height"] == 10 and d["top"] for d in boxes)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_flips_come_as_often_as_asked(probability):
    flips = sum(d["flip"] for d in draws(TrainTransform(8, flip=probability), 9, 9, 2000))
    assert stats.binomtest(flips, 2000, probability).pvalue > 1e-3


def test_jitter_is_uniform_around_no_change():
    many = draws(STANDARD, 64, 64, 2000)
    spans = dict(brightness=(0.8, 1.2), contrast=(0.8, 1.2), saturation=(0.8, 1.2), hue=(-0.1, 0.1))
    for name, (low, high) in spans.items():
        values = [d[name] for d in many]
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3, name


def test_all_24_orders_of_jitter_are_equally_likely():
    orders = [tuple(k for k in d if k in JITTER) for d in draws(STANDARD, 64, 64, 2400)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3


def test_what_is_drawn_for_one_picture_is_independent():
    transform = replace(STANDARD, crop_scale=(0.08, 0.3))  # small, so that every ratio fits
    columns = []
    for d in draws(transform, 500, 500, 2000):
        area, ratio = d["width"] * d["height"], d["width"] / d["height"]
        left, top = d["left"] / (500 - d["width"]), d["top"] / (500 - d["height"])
        columns.append([area, ratio, left, top, d["flip"], *(d[name] for name in JITTER)])
    assert np.abs(np.corrcoef(np.transpose(columns)) - np.eye(9)).max() < 0.1


# ---- draws


def test_switching_an_operation_on_leaves_the_others_as_they_were():
    plain = TrainTransform(32, flip=0.5, contrast=0.2)
    for name, value in dict(brightness=0.4, saturation=0.3, hue=0.1).items():
        more = TrainTransform(32, flip=0.5, contrast=0.2, **{name: value})
        for a, b in zip(draws(plain, 40, 32, 20), draws(more, 40, 32, 20), strict=True):
            assert a.items() <= b.items() and set(b) - set(a) == {name}


def test_the_same_stream_gives_the_same_picture_and_another_gives_another():
    image = picture(64, 48)
    first, again, other = (STANDARD(image, stream(0, DRAW, 2, row)) for row in (5, 5, 6))
    assert first == again and first != other


def test_a_transform_leaves_the_picture_it_was_given_alone():
    image = picture(64, 48)
    before = image.copy()
    STANDARD(image, stream(0, DRAW))
    TestTransform(32, 40)(image)
    assert image == before


def test_a_draw_is_plain_numbers_that_can_be_repeated():
    draw = STANDARD.draw(stream(0, DRAW), 64, 48)
    assert {type(v) for v in draw.values()} <= {int, float, bool}
    image = picture(64, 48)
    assert STANDARD.apply(image, eval(repr(draw))) == STANDARD(image, stream(0, DRAW))


# ---- strengths


def test_strengths_show_every_operation_in_use_alone_and_to_its_ends():
    rows = STANDARD.strengths(5)
    assert list(rows) == ["crop", "aspect", "flip", *JITTER]
    assert rows["brightness"][0] == {"brightness": pytest.approx(0.8)}
    assert rows["brightness"][2] == {"brightness": pytest.approx(1.0)}
    assert rows["hue"][-1] == {"hue": pytest.approx(0.1)}
    assert [s["area"] for s in rows["crop"]][::4] == pytest.approx([1.0, 0.08])
    assert rows["aspect"][0]["ratio"] == pytest.approx(3 / 4)
    image = picture(64, 48)
    for settings in rows.values():
        assert all(STANDARD.at(image, s).size == (224, 224) for s in settings)


def test_an_operation_that_is_off_has_no_strengths():
    off = TrainTransform(32, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    assert off.strengths() == {}


def test_the_neutral_strength_changes_nothing():
    image, transform = picture(32, 32), TrainTransform(32, brightness=0.4, hue=0.2)
    middle = {name: row[2] for name, row in transform.strengths(5).items() if name in JITTER}
    assert transform.at(image, middle["brightness"]) == image
    assert transform.at(image, {"flip": False}) == image
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert transform.at(image, {"flip": True}) == mirrored
    unturned = np.asarray(transform.at(image, middle["hue"]), int)
    assert np.abs(unturned - np.asarray(image, int)).max() <= 8  # HSV has 8 bits
