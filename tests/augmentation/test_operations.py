"""The operations on pixels against Pillow's own: the same levels, or one apart where it is said."""

import numpy as np
import pytest
from helpers import differences, noise_image, photograph
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as F

from workbench.augmentation import pixel_ops

IMAGES = {
    "noise": noise_image(48, 40),
    "photograph": photograph(60, 50),
    "one colour": Image.new("RGB", (20, 20), (7, 200, 90)),
    "two levels": Image.fromarray(np.asarray(noise_image(30, 20)) // 128 * 255),
    "dark": Image.fromarray(np.asarray(photograph(40, 40)) // 4),
}
FILL = (124, 116, 104)

# name -> (values, Pillow's form)
EXACT = {
    "autocontrast": ([None], lambda image, _: ImageOps.autocontrast(image)),
    "equalize": ([None], lambda image, _: ImageOps.equalize(image)),
    "invert": ([None], lambda image, _: ImageOps.invert(image)),
    "posterize": ([1, 2, 3, 4, 8], ImageOps.posterize),
    "solarize": ([0, 1, 76.8, 128, 255, 256], ImageOps.solarize),
    "brightness": ([0.1, 0.63, 1, 1.37, 1.9], lambda i, v: ImageEnhance.Brightness(i).enhance(v)),
    "contrast": ([0.1, 0.63, 1, 1.37, 1.9], lambda i, v: ImageEnhance.Contrast(i).enhance(v)),
}
BLENDED = {
    "saturation": ([0.1, 0.63, 1, 1.37, 1.9], lambda i, v: ImageEnhance.Color(i).enhance(v)),
    "sharpness": ([0.1, 0.63, 1, 1.37, 1.9], lambda i, v: ImageEnhance.Sharpness(i).enhance(v)),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", EXACT)
def test_what_looks_colours_up_gives_pillows_levels(name, kind):
    values, theirs = EXACT[name]
    for value in values:
        ours = getattr(pixel_ops, name)(np.asarray(IMAGES[kind]), value)
        np.testing.assert_array_equal(ours, theirs(IMAGES[kind], value), err_msg=str(value))


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", BLENDED)
def test_what_blends_is_one_level_from_pillow_at_most_and_not_darker_on_the_whole(name, kind):
    values, theirs = BLENDED[name]
    for value in values:
        ours = getattr(pixel_ops, name)(np.asarray(IMAGES[kind]), value).astype(int)
        apart = ours - np.asarray(theirs(IMAGES[kind], value))
        assert np.abs(apart).max() <= 1 and abs(apart.mean()) <= 0.15
        if value == 1:
            np.testing.assert_array_equal(ours, IMAGES[kind])


@pytest.mark.parametrize("bits", [0, 1, 4])
def test_no_bits_are_black(bits):
    pixels = np.asarray(IMAGES["noise"])
    np.testing.assert_array_equal(pixel_ops.posterize(pixels, bits), pixels >> 8 - bits << 8 - bits)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.02, 0.3])
def test_hue_turns_as_pillows_circle_of_256_steps(turn):
    for kind in ("photograph", "dark"):
        ours = pixel_ops.hue(np.asarray(IMAGES[kind]), turn)
        apart = differences(ours, F.adjust_hue(IMAGES[kind], turn))
        assert apart.mean() <= 1.5 and np.quantile(apart, 0.99) <= 8
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    np.testing.assert_array_equal(pixel_ops.hue(grey, turn), grey)


def moved(image: Image.Image, matrix: tuple, kind: str) -> Image.Image:
    how = Image.Resampling[kind.upper()]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=FILL)


MATRICES = [
    (1, 0.21, 0, 0, 1, 0),
    (1, -0.3, 0, 0, 1, 0),
    (1, 0, 0, 0.17, 1, 0),
    (0.9, 0.2, 3.3, -0.1, 1.1, -2.7),
    (1, 0, 5, 0, 1, -3),
    (1, 0, 500, 0, 1, 0),
]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_a_nearest_neighbour_is_pillows(matrix, kind):
    ours = pixel_ops.affine(np.asarray(IMAGES[kind]), matrix, "nearest", FILL)
    apart = differences(ours, moved(IMAGES[kind], matrix, "nearest"))
    # Where a place lies half way between two, as a tenth of a pixel often does in the fourth.
    assert (apart > 0).mean() <= (0.05 if matrix == MATRICES[3] else 0.005)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_between_pixels_a_photograph_moves_as_in_pillow(matrix, interpolation):
    """Away from the edge of the canvas, which OpenCV blends with the fill."""
    image = photograph(90, 80, 3)
    ours = pixel_ops.affine(np.asarray(image), matrix, interpolation, FILL)
    apart = differences(ours, moved(image, matrix, interpolation))
    outside = (np.asarray(moved(image, matrix, "nearest")) == FILL).all(2)
    near = np.asarray(Image.fromarray(outside).convert("L").resize((90, 80))) > 0
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            near |= np.roll(outside, (dy, dx), (0, 1))
    near[[0, -1]] = near[:, [0, -1]] = True
    inner = apart[~near]
    most = {"bilinear": 1.0, "bicubic": 2.0}[interpolation]
    assert inner.size == 0 or inner.mean() <= most


@pytest.mark.parametrize("kind", ["noise", "photograph"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5, 0.99, 3.0, 7.3, -0.4, -11.6, 39.9, 46.9, -60.0])
def test_a_shift_is_pillows_to_a_level_edges_included(shift, interpolation, kind):
    image = IMAGES[kind]
    for name, matrix in (
        ("translate_x", (1, 0, shift, 0, 1, 0)),
        ("translate_y", (1, 0, 0, 0, 1, shift)),
    ):
        ours = pixel_ops.move(np.asarray(image), name, shift, interpolation, FILL)
        apart = differences(ours, moved(image, matrix, interpolation))
        assert apart.max() <= (interpolation != "nearest")


@pytest.mark.parametrize("degrees", [-21.0, 7.5, 30.0])
def test_a_turn_is_pillows(degrees):
    image = photograph(81, 64, 5)
    ours = pixel_ops.move(np.asarray(image), "rotate", degrees, "nearest", FILL)
    apart = differences(ours, image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=FILL))
    assert (apart > 0).mean() <= 0.01


def test_no_operation_writes_to_the_pixels_it_is_given():
    pixels = np.asarray(IMAGES["noise"])
    assert not pixels.flags.writeable
    for name, (values, _) in {**EXACT, **BLENDED}.items():
        getattr(pixel_ops, name)(pixels, values[0])
    for kind in ("nearest", "bilinear", "bicubic"):
        for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
            pixel_ops.move(pixels, name, 0.3, kind, FILL)
    pixel_ops.hue(pixels, 0.1)
    pixel_ops.solarize_add(pixels, 30)
    pixel_ops.solarize_add_all(pixels, 30)
