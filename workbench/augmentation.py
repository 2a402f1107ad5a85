"""What happens to a picture on its way into training, drawn first and applied afterwards.

A draw is a flat dict of plain numbers, so it can be printed under the picture, repeated and tested.
Every operation has its own place in the stream of random numbers: switching one on leaves what the
others draw as it was, and two recipes with the same seed see the same crops.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

JITTER = ("brightness", "contrast", "saturation", "hue")
_ATTEMPTS = 10  # as torchvision's RandomResizedCrop before it falls back to the centre


@dataclass(frozen=True)
class TrainTransform:
    """Random crop and resize, flip, colour jitter (UP's T-std: 0.08-1, 0.5, 0.2/0.2/0.2/0.1).

    Szegedy et al., arXiv 1409.4842, section 6, for the crop; the operations are torchvision's.
    """

    size: int
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def draw(self, rng: np.random.Generator, width: int, height: int) -> dict[str, Any]:
        """Where to crop (left, top, width, height in pixels), whether to flip, which factors."""
        crops, rest = rng.random((_ATTEMPTS, 4)), rng.random(5)
        order = rng.permutation(len(JITTER))
        left, top, crop_width, crop_height = self._box(crops, width, height)
        draw = {"left": left, "top": top, "width": crop_width, "height": crop_height}
        draw["flip"] = bool(rest[4] < self.flip)
        for i in order:
            if strength := getattr(self, JITTER[i]):
                centre = 0.0 if JITTER[i] == "hue" else 1.0
                draw[JITTER[i]] = centre + strength * float(2 * rest[i] - 1)
        return draw

    def apply(self, image: Image.Image, draw: dict[str, Any]) -> Image.Image:
        """The picture after a draw, size x size pixels; jitter in the order of the draw's keys."""
        image = F.resized_crop(
            image,
            draw["top"],
            draw["left"],
            draw["height"],
            draw["width"],
            [self.size, self.size],
            InterpolationMode(self.interpolation),
        )
        if draw["flip"]:
            image = F.horizontal_flip(image)
        for name, value in draw.items():
            if name in OPERATIONS:
                image = OPERATIONS[name](image, value)
        return image

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        return self.apply(image, self.draw(rng, *image.size))

    def strengths(self, count: int = 5) -> dict[str, list[Any]]:
        """For every operation in use, draws from its mildest to its strongest value.

        The rest of each draw is neutral (whole picture, no flip, no jitter), so a row of pictures
        shows one operation alone. Keys name the operation, values are draws without crop box for
        jitter and with `area` (share of the picture) for crop.
        """
        rows: dict[str, list[Any]] = {}
        if self.crop_scale != (1.0, 1.0):
            rows["crop"] = [{"area": a} for a in np.linspace(*self.crop_scale[::-1], count)]
        if self.crop_ratio[0] != self.crop_ratio[1]:
            logs = np.linspace(*np.log(self.crop_ratio), count)
            area = sum(self.crop_scale) / 2
            rows["aspect"] = [{"area": area, "ratio": math.exp(x)} for x in logs]
        if self.flip:
            rows["flip"] = [{"flip": False}, {"flip": True}]
        for name in JITTER:
            if strength := getattr(self, name):
                centre = 0.0 if name == "hue" else 1.0
                values = np.linspace(centre - strength, centre + strength, count)
                rows[name] = [{name: float(v)} for v in values]
        return rows

    def at(self, image: Image.Image, setting: dict[str, Any]) -> Image.Image:
        """The picture under one entry of `strengths`."""
        width, height = image.size
        setting = dict(setting)
        area, ratio = setting.pop("area", 1.0), setting.pop("ratio", 1.0)
        crop_width = min(width, round(math.sqrt(width * height * area * ratio)))
        crop_height = min(height, round(math.sqrt(width * height * area / ratio)))
        box = {
            "left": (width - crop_width) // 2,
            "top": (height - crop_height) // 2,
            "width": crop_width,
            "height": crop_height,
        }
        return self.apply(image, {**box, "flip": False, **setting})

    def _box(self, uniform: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for area_u, ratio_u, left_u, top_u in uniform.tolist():
            scale = self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * area_u
            ratio = math.exp(low + (high - low) * ratio_u)
            crop_width = round(math.sqrt(width * height * scale * ratio))
            crop_height = round(math.sqrt(width * height * scale / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left = int(left_u * (width - crop_width + 1))
                top = int(top_u * (height - crop_height + 1))
                return left, top, crop_width, crop_height
        ratio = min(max(width / height, self.crop_ratio[0]), self.crop_ratio[1])
        crop_width = min(width, round(height * ratio))
        crop_height = min(height, round(width / ratio))
        return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


@dataclass(frozen=True)
class TestTransform:
    """Short side to `resize`, then the centre `size` x `size` pixels (UP's E-std: 256 and 224)."""

    __test__ = False  # pytest: no test class

    size: int
    resize: int
    interpolation: str = "bilinear"

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        image = F.resize(image, [self.resize], InterpolationMode(self.interpolation))
        return F.center_crop(image, [self.size, self.size])


# Value of a draw -> picture. Factors are 1 for no change, hue is in turns of the colour circle.
OPERATIONS = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}
