"""Augmentation of a batch on its device against Pillow, image by image."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import differences, pillow_operation
from PIL import Image
from scipy import stats
from timm.data import auto_augment

from workbench.augmentation import RandAugmentIncreasing, TrainTransform, device_ops
from workbench.augmentation.pixel_ops import JITTER

WIDTH, HEIGHT = 53, 37
FILL = (124, 116, 104)
UP = RandAugmentIncreasing()
TIMM = RandAugmentIncreasing.timm(2, 7, 0.5, (0.485, 0.456, 0.406))
VARIANTS = {"up": UP, "timm": TIMM}

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(low, high, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def smooth(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


IMAGES = {
    "noise": noise(),
    "smooth": smooth(),
    "dull": noise(1, 60, 180),
    "even": np.full((HEIGHT, WIDTH, 3), (77, 0, 255), np.uint8),
}


def batch(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def after(images: list[np.ndarray], params: list[dict], fill=FILL) -> np.ndarray:
    """The augmented images (n, h, w, 3)."""
    return device_ops.apply(batch(images), params, fill).permute(0, 2, 3, 1).numpy()


def one(name: str, value: Any, interpolation: str = "") -> dict:
    """The parameters of one operation."""
    jitter = name in ("saturation", "hue")
    return {name: value} if jitter else {"randaug": [(name, value, interpolation)]}


def by_pillow(pixels: np.ndarray, params: dict, fill=FILL) -> np.ndarray:
    """All operations but the crop by Pillow."""
    image = Image.fromarray(pixels[:, ::-1] if params.get("flip") else pixels)
    for name, value, interpolation in params.get("randaug", []):
        image = pillow_operation(image, name, value, interpolation, fill)
    for name in params:
        if name in JITTER:
            image = pillow_operation(image, name, params[name])
    return np.asarray(image)


# ---- one operation

INTERPOLATIONS = ["nearest", "bilinear", "bicubic"]
FACTORS = [0.0, 0.1, 0.37, 0.8, 1.0, 1.2, 1.63, 1.9]
COLOURS = {
    "autocontrast": [None],
    "equalize": [None],
    "invert": [None],
    "posterize": range(9),
    "solarize": [0, 1, 76.8, 128, 128.00000000000003, 179.2, 256],
    "solarize_add": [0, 33, 77, 110],
    "solarize_add_all": [0, 33, 77, 110],
    **dict.fromkeys(("brightness", "contrast", "saturation", "color", "sharpness"), FACTORS),
}
SHIFTS = [70, -70, 0.0, 7, -9.3, 16.65, 0.5, -0.5, 36.6]
HALVES = [9.4999999, 9.5, 9.5000001, -9.4999999, -9.5, -9.5000001]
WARPS = {
    "rotate": [21.0, -21.0, 0.0, 0.1, 30.0, 90.0, 180.0],
    **dict.fromkeys(("shear_x", "shear_y"), [0.21, -0.21, 0.0, 0.3, 0.001]),
    **dict.fromkeys(("translate_x", "translate_y"), SHIFTS),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colour_operations_give_pillows_pixels_to_the_bit(name):
    images = list(IMAGES.values())
    for value in COLOURS[name]:
        ours = after(images, [one(name, value)] * len(images))
        for kind, before, seen in zip(IMAGES, images, ours, strict=True):
            assert (seen == by_pillow(before, one(name, value))).all(), (value, kind)


def test_every_operation_is_compared_with_pillow():
    assert {*COLOURS, *WARPS, "hue"} == {*UP.levels, *TIMM.levels, *JITTER}


def test_autocontrast_rounds_as_pillow_from_any_darkest_to_any_brightest_level():
    """Pillow's table is a level lower where double precision is, 254 for 255."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(0, 256, (500, 2, 1, 3)), 1)
    ramps = np.clip(np.arange(256)[None, :, None], ends[:, 0], ends[:, 1])
    ramps, params = ramps.reshape(500, 16, 16, 3).astype(np.uint8), one("autocontrast", None)
    for before, seen in zip(ramps, after(list(ramps), [params] * 500), strict=True):
        assert (seen == by_pillow(before, params)).all()


@pytest.mark.parametrize("share", [1, 254, 255, 256, 509, 510, 511, 765])
def test_equalize_is_pillows_where_its_step_just_is_one_or_two(share):
    """`share` pixels are darker than the brightest, which is a step of `share` // 255."""
    pixels = np.full((HEIGHT * WIDTH, 3), 250, np.uint8)
    pixels[:share] = np.random.default_rng(share).integers(10, 240, (share, 3))
    pixels, params = pixels.reshape(HEIGHT, WIDTH, 3), one("equalize", None)
    assert (after([pixels], [params])[0] == by_pillow(pixels, params)).all()


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.02, 0.5])
def test_hue_is_pillows_but_for_one_colour_in_a_thousand(turn):
    """Where the hue is a whole step of 8 bits, Pillow's single precision may take the one before:
    6 levels then."""
    levels = np.linspace(0, 255, 43), np.linspace(0, 255, 61), np.linspace(0, 255, 59)
    colours = np.stack(np.meshgrid(*levels, indexing="ij"), -1).astype(np.uint8)
    colours = colours.reshape(43 * 61, 59, 3)
    far = differences(after([colours], [{"hue": turn}])[0], by_pillow(colours, {"hue": turn}))
    assert far.max() <= 6 and (far > 0).any(-1).mean() < 0.003


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", WARPS)
def test_a_warp_is_pillows(name, interpolation):
    """To the bit by the nearest neighbour. Between neighbours Pillow truncates more digits: now and
    then a level apart."""
    images = list(IMAGES.values())
    halves = HALVES if name.startswith("translate") and interpolation == "nearest" else []
    for value in WARPS[name] + halves:
        params = one(name, value, interpolation)
        ours = after(images, [params] * len(images))
        for kind, before, seen in zip(IMAGES, images, ours, strict=True):
            far = differences(seen, by_pillow(before, params))
            exact = interpolation == "nearest" or kind == "even"
            assert far.max() <= (not exact) and far.mean() < 0.05, (value, kind)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("name", WARPS)
def test_a_warp_by_any_value_is_pillows_on_an_image_of_usual_size(name, interpolation):
    """Of ten thousand values less than one is a level apart."""
    rng = np.random.default_rng(0)
    most = {"rotate": 30, "shear_x": 0.3, "shear_y": 0.3}.get(name, 100)
    params = [one(name, value, interpolation) for value in rng.uniform(-most, most, 6).tolist()]
    images = [rng.integers(0, 256, (200, 224, 3), dtype=np.uint8) for _ in params]
    for seen, before, each in zip(after(images, params), images, params, strict=True):
        far = differences(seen, by_pillow(before, each))
        assert far.max() <= (interpolation != "nearest") and far.mean() < 1e-4, each


# ---- all operations of an image


def uncropped(variant: str, count: int, size: int = 48) -> list[dict]:
    """Parameters with all operations on and the whole of size x size pixels as the crop."""
    samples = [everything(variant, size).sample_params(np.random.default_rng(i), size, size)
             for i in range(count)]  # fmt: skip
    return [{**d, "left": 0, "top": 0, "width": size, "height": size} for d in samples]


def everything(variant: str, size: int) -> TrainTransform:
    jitter = dict(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
    return TrainTransform(size, **jitter, randaug=VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_operations_of_an_image_are_pillows_and_near_those_in_the_loader(variant):
    """A later equalize or autocontrast stretches differences; the loader rounds more coarsely."""
    samples, fill = uncropped(variant, 300), VARIANTS[variant].fill
    images, loader = [smooth(i, 48, 48) for i in range(300)], everything(variant, 48)
    seen = after(images, samples, fill)
    for wanted, most, mean in (
        (lambda image, params: by_pillow(image, params, fill), 0.2, 0.005),
        (loader.apply, 3, 1.2),
    ):
        pairs = zip(seen, images, samples, strict=True)
        far = [differences(ours, wanted(image, params)).mean() for ours, image, params in pairs]
        assert max(far) < most and np.mean(far) < mean


def test_flip_comes_first_then_randaugment_then_jitter_each_in_their_order():
    before, steps = smooth(), [("rotate", 21.0, "nearest"), ("shear_x", 0.3, "nearest")]
    seen = set()
    for randaug in (steps, steps[::-1]):
        for jitter in ({"contrast": 1.9, "brightness": 1.3}, {"brightness": 1.3, "contrast": 1.9}):
            for params in (
                {"flip": True, "randaug": randaug, **jitter},
                {**jitter, "randaug": randaug, "flip": True},
            ):
                [ours] = after([before], [params])
                assert (ours == by_pillow(before, params)).all()
                seen.add(ours.tobytes())
    assert len(seen) == 4


def test_the_timm_variant_has_timms_distribution():
    image, count = smooth(3, 40, 40), 2000
    augment = auto_augment.rand_augment_transform("rand-m7-n2-mstd0.5-inc1", {"img_mean": FILL})
    auto_augment.random.seed(0)
    np.random.seed(0)  # noqa: NPY002  timm chooses operations from it
    theirs = np.stack([np.asarray(augment(Image.fromarray(image))) for _ in range(count)])
    samples = [{"randaug": TIMM.sample_params(np.random.default_rng(i), 40)} for i in range(count)]
    ours = after([image] * count, samples)
    for feature in (
        lambda images: images.mean((1, 2, 3)),
        lambda images: images.astype(float).var((1, 2, 3)),
        lambda images: (images == FILL).all(-1).mean((1, 2)),
        lambda images: images[:, :, :20].mean((1, 2, 3)),
        lambda images: images[:, :20].mean((1, 2, 3)),
    ):  # equal images have equal features: rounded, since sums depend on their order
        assert stats.ks_2samp(feature(ours).round(6), feature(theirs).round(6)).pvalue > 1e-3


# ---- a batch


def mixed(count: int = 60, size: int = 40) -> tuple[torch.Tensor, list[dict]]:
    """Images and parameters of both variants, with every operation, and some with none."""
    samples = uncropped("up", count, size)
    samples[1::2] = uncropped("timm", count // 2, size)
    steps = [(name, COLOURS[name][-1], "") for name in COLOURS if name != "saturation"]
    steps += [(name, WARPS[name][0], how) for name in WARPS for how in INTERPOLATIONS]
    for params, step in zip(samples, steps, strict=False):
        params["randaug"].append(step)
    samples[-10:] = [{key: d[key] for key in ("flip", *JITTER)} for d in samples[-10:]]
    return batch([smooth(i, size, size) for i in range(count)]), samples


def test_an_image_does_not_depend_on_its_neighbours_or_its_position():
    images, samples = mixed()
    whole = device_ops.apply(images, samples, FILL)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = device_ops.apply(images[order], [samples[i] for i in order], FILL)
    assert torch.equal(shuffled, whole[order])
    for i, params in enumerate(samples):
        assert torch.equal(device_ops.apply(images[i : i + 1], [params], FILL)[0], whole[i])


def test_the_memory_format_changes_no_byte_and_stays_the_same():
    images, samples = mixed()
    last = images.contiguous(memory_format=torch.channels_last)
    seen = device_ops.apply(last, samples, FILL)
    assert torch.equal(seen, device_ops.apply(images, samples, FILL))
    assert seen.is_contiguous(memory_format=torch.channels_last) and not seen.is_contiguous()
    assert device_ops.apply(images, samples, FILL).is_contiguous()
    from_the_middle = torch.cat([images, images], 3)[..., 40:]
    assert torch.equal(device_ops.apply(from_the_middle, samples, FILL), seen)


def test_the_input_is_not_changed():
    images, samples = mixed()
    before, text = images.clone(), repr(samples)
    device_ops.apply(images, samples, FILL)
    assert torch.equal(images, before) and repr(samples) == text
    for off in ({}, {"flip": False, "randaug": [], "left": 3, "top": 0, "width": 9, "height": 9}):
        seen = device_ops.apply(images, [off] * len(images), FILL)
        assert torch.equal(seen, before)
        seen.zero_()
        assert torch.equal(images, before)


@pytest.mark.parametrize("width, height", [(4, 4), (5, 90), (90, 5), (64, 41)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_any_shape_are_pillows(variant, width, height):
    rng, randaug, fill = np.random.default_rng(1), VARIANTS[variant], VARIANTS[variant].fill
    steps = [randaug.at(n, m, width, s, 0.0) for n in randaug.levels for m, s in ((3, 1), (8, -1))]
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in steps]
    params = [{"randaug": [step]} for step in steps]
    for seen, before, each in zip(after(images, params, fill), images, params, strict=True):
        far = differences(seen, by_pillow(before, each, fill))
        assert far.max() <= (each["randaug"][0][2] == "bilinear"), each
    empty = device_ops.apply(torch.empty(0, 3, height, width, dtype=torch.uint8), [], FILL)
    assert empty.shape == (0, 3, height, width) and empty.dtype == torch.uint8


@pytest.mark.parametrize(
    "images, params, says",
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [{"autoaugment": 7}], "'autoaugment'"),
        (torch.zeros(1, 3, 8, 8), [{}], "not torch.float32"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [{}], r"not torch.uint8 .*\[1, 8, 8, 3\]"),
    ],
)
def test_other_operations_types_and_shapes_are_refused(images, params, says):
    with pytest.raises(ValueError, match=says):
        device_ops.apply(images, params, FILL)


# ---- devices


def test_no_value_comes_back_from_the_device():
    """A meta tensor has no values: reading one, or waiting for one, is an error."""
    images, samples = mixed()
    seen = device_ops.apply(images.to("meta"), samples, FILL)
    assert seen.shape == images.shape and seen.dtype == torch.uint8
    with pytest.raises(RuntimeError):
        seen.max().item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs WORKBENCH_TEST_DEVICE=cuda")
@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_a_gpu_gives_the_same(kind):
    """And waits for nothing: copies of values back would raise."""
    images, samples = mixed(240)
    if kind == "noise":
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, images.shape, generator=generator, dtype=torch.uint8)
    wanted = device_ops.apply(images, samples, FILL)
    there = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = device_ops.apply(there, samples, FILL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    far = (seen.cpu().int() - wanted.int()).abs()
    assert (far <= 1).float().mean() >= 0.999
