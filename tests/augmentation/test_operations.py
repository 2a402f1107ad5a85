"""The operations on one image against Pillow: the same levels, or a level apart where stated."""

import numpy as np
import pytest
from helpers import differences, noise_image, photograph, pillow_operation
from PIL import Image

from workbench.augmentation.pixel_ops import COLOURS, MATRICES, warp

IMAGES = {
    "noise": noise_image(48, 40),
    "photograph": photograph(60, 50),
    "one colour": Image.new("RGB", (20, 20), (7, 200, 90)),
    "two levels": Image.fromarray(np.asarray(noise_image(30, 20)) // 128 * 255),
    "dark": Image.fromarray(np.asarray(photograph(40, 40)) // 4),
}
FILL = (124, 116, 104)
FACTORS = [0.1, 0.63, 1, 1.37, 1.9]
LOOK_UPS = {
    **dict.fromkeys(("autocontrast", "equalize", "invert"), [None]),
    "posterize": [0, 1, 2, 3, 4, 8],
    "solarize": [0, 1, 76.8, 128, 255, 256],
    **dict.fromkeys(("solarize_add", "solarize_add_all"), [0, 33, 77, 110]),
    **dict.fromkeys(("brightness", "contrast"), FACTORS),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", LOOK_UPS)
def test_look_ups_give_pillows_levels(name, kind):
    for value in LOOK_UPS[name]:
        ours = COLOURS[name](np.asarray(IMAGES[kind]), value)
        theirs = pillow_operation(IMAGES[kind], name, value)
        np.testing.assert_array_equal(ours, theirs, err_msg=str(value))


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", ["saturation", "color", "sharpness"])
def test_blends_are_one_level_from_pillow_at_most_and_not_darker_on_average(name, kind):
    for value in FACTORS:
        ours = COLOURS[name](np.asarray(IMAGES[kind]), value).astype(int)
        apart = ours - np.asarray(pillow_operation(IMAGES[kind], name, value), int)
        assert np.abs(apart).max() <= 1 and abs(apart.mean()) <= 0.15
        assert value != 1 or (ours == IMAGES[kind]).all()


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.02, 0.3])
def test_hue_rotates_by_pillows_256_steps(turn):
    for kind in ("photograph", "dark"):
        ours = COLOURS["hue"](np.asarray(IMAGES[kind]), turn)
        apart = differences(ours, pillow_operation(IMAGES[kind], "hue", turn))
        assert apart.mean() <= 1.5 and np.quantile(apart, 0.99) <= 8
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    np.testing.assert_array_equal(COLOURS["hue"](grey, turn), grey)


def by_pillow(image: Image.Image, matrix: tuple, interpolation: str) -> Image.Image:
    how = Image.Resampling[interpolation.upper()]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, how, fillcolor=FILL)


AFFINE = [
    (1, 0.21, 0, 0, 1, 0),
    (1, -0.3, 0, 0, 1, 0),
    (1, 0, 0, 0.17, 1, 0),
    MATRICES["rotate"](-21.0, 90, 80),
    (0.9, 0.2, 3.3, -0.1, 1.1, -2.7),
    (1, 0, 5, 0, 1, -3),
]


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("matrix", AFFINE)
def test_nearest_neighbours_are_pillows(matrix, kind):
    ours = warp(np.asarray(IMAGES[kind]), matrix, "nearest", FILL)
    apart = differences(ours, by_pillow(IMAGES[kind], matrix, "nearest"))
    # Positions half way between two, as multiples of a tenth often are in the fifth.
    assert (apart > 0).mean() <= (0.05 if matrix == AFFINE[4] else 0.01)


@pytest.mark.parametrize("interpolation, most", [("bilinear", 1.0), ("bicubic", 2.0)])
@pytest.mark.parametrize("matrix", AFFINE)
def test_a_photograph_is_interpolated_as_in_pillow(matrix, interpolation, most):
    """Away from the edge of the image, which OpenCV blends with the fill."""
    image = photograph(90, 80, 3)
    apart = differences(
        warp(np.asarray(image), matrix, interpolation, FILL),
        by_pillow(image, matrix, interpolation),
    )
    outside = (np.asarray(by_pillow(image, matrix, "nearest")) == FILL).all(2)
    near = np.zeros_like(outside)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            near |= np.roll(outside, (dy, dx), (0, 1))
    near[[0, -1]] = near[:, [0, -1]] = True
    assert apart[~near].mean() <= most


@pytest.mark.parametrize("kind", ["noise", "photograph"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5, 0.99, 3.0, 7.3, -0.4, -11.6, 39.9, 46.9, -60.0])
def test_a_translation_is_pillows_to_a_level_edges_included(shift, interpolation, kind):
    for matrix in ((1, 0, shift, 0, 1, 0), (1, 0, 0, 0, 1, shift)):
        ours = warp(np.asarray(IMAGES[kind]), matrix, interpolation, FILL)
        theirs = by_pillow(IMAGES[kind], matrix, interpolation)
        assert differences(ours, theirs).max() <= (interpolation != "nearest")


def test_no_operation_writes_to_its_input():
    pixels = np.asarray(IMAGES["noise"])
    assert not pixels.flags.writeable
    for operation in COLOURS.values():
        operation(pixels, 1)
    for matrix in AFFINE:
        for interpolation in ("nearest", "bilinear", "bicubic"):
            warp(pixels, matrix, interpolation, FILL)
