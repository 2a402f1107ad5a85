"""The operations on one image against Pillow: the same levels, or a level apart where stated."""

import numpy as np
import pytest
from helpers import differences, noise_image, photograph, pillow_operation
from PIL import Image

from workbench.augmentation import pixel_ops

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
        ours = getattr(pixel_ops, name)(np.asarray(IMAGES[kind]), value)
        theirs = pillow_operation(IMAGES[kind], name, value)
        np.testing.assert_array_equal(ours, theirs, err_msg=str(value))


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", ["saturation", "sharpness"])
def test_blends_are_one_level_from_pillow_at_most_and_not_darker_on_average(name, kind):
    for value in FACTORS:
        ours = getattr(pixel_ops, name)(np.asarray(IMAGES[kind]), value).astype(int)
        apart = ours - np.asarray(pillow_operation(IMAGES[kind], name, value), int)
        assert np.abs(apart).max() <= 1 and abs(apart.mean()) <= 0.15
        if value == 1:
            np.testing.assert_array_equal(ours, IMAGES[kind])


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.02, 0.3])
def test_hue_rotates_by_pillows_256_steps(turn):
    for kind in ("photograph", "dark"):
        ours = pixel_ops.hue(np.asarray(IMAGES[kind]), turn)
        apart = differences(ours, pillow_operation(IMAGES[kind], "hue", turn))
        assert apart.mean() <= 1.5 and np.quantile(apart, 0.99) <= 8
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, 2)
    np.testing.assert_array_equal(pixel_ops.hue(grey, turn), grey)


def warped(image: Image.Image, matrix: tuple, interpolation: str) -> Image.Image:
    how = Image.Resampling[interpolation.upper()]
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
def test_nearest_neighbours_are_pillows(matrix, kind):
    ours = pixel_ops.warp_affine(np.asarray(IMAGES[kind]), matrix, "nearest", FILL)
    apart = differences(ours, warped(IMAGES[kind], matrix, "nearest"))
    # Positions half way between two, as multiples of a tenth often are in the fourth.
    assert (apart > 0).mean() <= (0.05 if matrix == MATRICES[3] else 0.005)


@pytest.mark.parametrize("interpolation, most", [("bilinear", 1.0), ("bicubic", 2.0)])
@pytest.mark.parametrize("matrix", MATRICES[:-1])
def test_a_photograph_is_interpolated_as_in_pillow(matrix, interpolation, most):
    """Away from the edge of the image, which OpenCV blends with the fill."""
    image = photograph(90, 80, 3)
    ours = pixel_ops.warp_affine(np.asarray(image), matrix, interpolation, FILL)
    apart = differences(ours, warped(image, matrix, interpolation))
    outside = (np.asarray(warped(image, matrix, "nearest")) == FILL).all(2)
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
    for name in ("translate_x", "translate_y"):
        ours = pixel_ops.warp(np.asarray(IMAGES[kind]), name, shift, interpolation, FILL)
        theirs = pillow_operation(IMAGES[kind], name, shift, interpolation, FILL)
        assert differences(ours, theirs).max() <= (interpolation != "nearest")


@pytest.mark.parametrize("degrees", [-21.0, 7.5, 30.0])
def test_a_rotation_is_pillows(degrees):
    image = photograph(81, 64, 5)
    ours = pixel_ops.warp(np.asarray(image), "rotate", degrees, "nearest", FILL)
    theirs = pillow_operation(image, "rotate", degrees, "nearest", FILL)
    assert (differences(ours, theirs) > 0).mean() <= 0.01


def test_no_operation_writes_to_its_input():
    pixels = np.asarray(IMAGES["noise"])
    assert not pixels.flags.writeable
    for name, values in LOOK_UPS.items():
        getattr(pixel_ops, name)(pixels, values[0])
    for name in ("saturation", "sharpness", "hue"):
        getattr(pixel_ops, name)(pixels, 0.1)
    for interpolation in ("nearest", "bilinear", "bicubic"):
        for name in pixel_ops.MATRICES:
            pixel_ops.warp(pixels, name, 0.3, interpolation, FILL)
