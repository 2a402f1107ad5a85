"""What happens to one image on its way into training and validation.

Parameters are sampled first and applied afterwards. They are a dict of plain numbers, so they can
be printed below the image, repeated and tested. Every operation reads its own numbers of the
stream: switching one on leaves those of the others unchanged.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from workbench.augmentation import pixel_ops
from workbench.augmentation.pixel_ops import JITTER
from workbench.augmentation.randaugment import POLICIES, UNITS, RandAugment, apply_policy
from workbench.data import images
from workbench.data.images import AnyImage

Params = dict[str, Any]
_ATTEMPTS = 10  # as torchvision's RandomResizedCrop before it falls back to the centre


@dataclass(frozen=True)
class ResizeShortSide:
    """Resizes an image to a short side of `side` pixels where it is longer; None leaves all.

    The pixel cache of training has the result.
    """

    side: int | None = None
    interpolation: str = "bilinear"

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the result."""
        short = min(width, height)
        if self.side is None or short <= self.side:
            return width, height
        return round(self.side * width / short), round(self.side * height / short)

    def image(self, image: AnyImage) -> images.Pixels | images.Jpeg:
        """The resized image; one that is small enough is not decoded."""
        image = images.image(image)
        shape = self.shape(image.width, image.height)
        if shape == (image.width, image.height):
            return image
        return images.Pixels(image.downscaled(shape, self.interpolation))

    def __call__(self, image: AnyImage) -> np.ndarray:
        """Pixels (h, w, 3) of the resized image."""
        return self.image(image).pixels()


@dataclass(frozen=True)
class TrainTransform:
    """`resize`, crop, flip, AutoAugment, RandAugment, colour jitter, `custom`, in this order.

    UP's T-std is crop 0.08-1, hflip 0.5, jitter 0.2/0.2/0.2/0.1. The crop is that of Szegedy et
    al., arXiv 1409.4842, section 6; crop, flip and jitter are torchvision's. With `on_device` the
    loaders only resize and crop, the rest is device_ops.apply. Results are read-only pixels.
    """

    size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    hflip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    autoaugment: bool | str = False  # True, or another name in POLICIES
    randaug: RandAugment | None = None
    resize: ResizeShortSide = ResizeShortSide()
    on_device: bool = False
    custom: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None

    def sample_params(self, rng: np.random.Generator, width: int, height: int) -> Params:
        """The crop (left, top, width, height in pixels), `flip`, and the rest where it is on.

        A policy and `custom` are seeds, `randaug` a list of (operation, value, interpolation),
        jitter a factor by name, in random order.
        """
        crops, rest = rng.random((_ATTEMPTS, 4)), rng.random(5)
        order, jitter = rng.permutation(len(JITTER)), list(JITTER.items())
        params: Params = self._crop_params(crops, width, height)
        params["flip"] = bool(rest[4] < self.hflip)
        for i in order:
            name, neutral = jitter[i]
            if strength := getattr(self, name):
                params[name] = neutral + strength * float(2 * rest[i] - 1)
        seed = int(rng.integers(2**31))
        if self.autoaugment:
            params["autoaugment" if self.autoaugment is True else self.autoaugment] = seed
        if self.randaug is not None:
            params["randaug"] = self.randaug.sample_params(rng, self.size)
        if self.custom:
            params["custom"] = int(rng.integers(2**31))
        return params

    def apply(self, image: AnyImage, params: Params) -> np.ndarray:
        """Pixels (size, size, 3) of an image with these parameters."""
        pixels = self.crop(image, params)
        if params["flip"]:
            pixels = cv2.flip(pixels, 1)
        for name in POLICIES.keys() & params.keys():
            pixels = apply_policy(name, pixels, params[name])
        if "randaug" in params:
            pixels = self.randaug.apply(pixels, params["randaug"])
        for name, value in params.items():
            if name in JITTER:
                pixels = pixel_ops.COLOURS[name](pixels, value)
        if "custom" in params:
            pixels = self.custom(np.array(pixels), np.random.default_rng(params["custom"]))
        return pixels

    def crop(self, image: AnyImage, params: Params) -> np.ndarray:
        """Pixels (size, size, 3) of the crop alone."""
        left, top = params["left"], params["top"]
        box = (left, top, left + params["width"], top + params["height"])
        return images.image(image).resized(box, (self.size, self.size), self.interpolation)

    def __call__(self, image: AnyImage, rng: np.random.Generator) -> np.ndarray:
        """Pixels (size, size, 3) of an image, resized, with parameters sampled from `rng`."""
        image = self.resize.image(image)
        return self.apply(image, self.sample_params(rng, image.width, image.height))

    def sweep(self) -> dict[str, list[Params]]:
        """For every operation in use, five parameters for `at` from the mildest to the strongest.

        RandAugment's operations have magnitudes from 0 to 10.
        """
        rows: dict[str, list[Params]] = {}
        if self.crop_scale != (1.0, 1.0):
            rows["crop"] = [{"area": a} for a in np.linspace(*self.crop_scale[::-1], 5)]
        if self.crop_ratio[0] != self.crop_ratio[1]:
            area, logs = sum(self.crop_scale) / 2, np.linspace(*np.log(self.crop_ratio), 5)
            rows["aspect"] = [{"area": area, "ratio": math.exp(x)} for x in logs]
        if self.hflip:
            rows["flip"] = [{"flip": False}, {"flip": True}]
        for name, neutral in JITTER.items():
            if strength := getattr(self, name):
                values = np.linspace(neutral - strength, neutral + strength, 5).tolist()
                rows[name] = [{name: value} for value in values]
        for name in self.randaug.levels if self.randaug else ():
            steps = [self.randaug.at(name, m, self.size) for m in (0.0, 2.5, 5.0, 7.5, 10.0)]
            rows[f"randaug\n{name}"] = [{"randaug": [step]} for step in steps]
        return rows

    def at(self, image: AnyImage, setting: Params) -> np.ndarray:
        """Pixels (size, size, 3) of an image with one entry of `sweep`, and nothing else.

        The centre crop has `area`, a share of the image, and `ratio`; by default it is all of it.
        """
        image = self.resize.image(image)
        width, height, ratio = image.width, image.height, setting.get("ratio", 1.0)
        pixels = width * height * setting.get("area", 1.0)
        crop_width = min(width, round(math.sqrt(pixels * ratio)))
        crop_height = min(height, round(math.sqrt(pixels / ratio)))
        box = _centre(crop_width, crop_height, width, height)
        return self.apply(image, {**box, "flip": False, **setting})

    def _crop_params(self, uniform: np.ndarray, width: int, height: int) -> dict[str, int]:
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for area_u, ratio_u, left_u, top_u in uniform.tolist():
            scale = self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * area_u
            ratio = math.exp(low + (high - low) * ratio_u)
            crop_width = round(math.sqrt(width * height * scale * ratio))
            crop_height = round(math.sqrt(width * height * scale / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(left_u * (width - crop_width + 1))
                top = int(top_u * (height - crop_height + 1))
                return {"left": left, "top": top, "width": crop_width, "height": crop_height}
        ratio = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1])
        crop = min(width, round(height * ratio)), min(height, round(width / ratio))
        return _centre(*crop, width, height)


def _centre(crop_width: int, crop_height: int, width: int, height: int) -> dict[str, int]:
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return {"left": left, "top": top, "width": crop_width, "height": crop_height}


@dataclass(frozen=True)
class EvalTransform:
    """Short side to `resize`, then the centre `size` x `size` pixels (UP's E-std: 256 and 224).

    `resize` is at least `size`.
    """

    size: int
    resize: int
    interpolation: str = "bilinear"
    on_device = False

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the result."""
        return self.size, self.size

    def __call__(self, image: AnyImage, rng: np.random.Generator | None = None) -> np.ndarray:
        """Pixels (size, size, 3) as of torchvision's Resize and CenterCrop on a Pillow image.

        Only the box of the centre crop is resized.
        """
        image, size = images.image(image), self.size
        width, height = image.width, image.height
        short = min(width, height)
        wide, high = int(self.resize * width / short), int(self.resize * height / short)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        x, y = width / wide, height / high
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resized(box, (size, size), self.interpolation, exact=True)


def describe(params: Params) -> str:
    """Parameters beside the crop, in a few words: "flip, rotate -21°, posterize 2 bits"."""
    short = {"degrees": "°", "bits": " bits", "pixels": " px", "of the side": " px"}
    words = ["flip"] if params.get("flip") else []
    words += [name for name in POLICIES if name in params]
    for name, value, _ in params.get("randaug", []):
        words.append(name if value is None else f"{name} {value:.3g}{short.get(UNITS[name], '')}")
    words += [f"{name} {params[name]:.2f}" for name in params if name in JITTER]
    return ", ".join(words)
