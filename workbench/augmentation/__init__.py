"""What happens to an image on its way into training, drawn first and applied afterwards.

TrainTransform works on one image in a loader's process, RandomErasing and MixupCutmix on a batch
on the device.
A draw is a dict of plain numbers, so it can be printed under the image, repeated and tested.
Every operation has its own place in the stream of random numbers: switching one on leaves what the
others draw as it was, and two recipes with the same seed see the same crops.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from workbench.augmentation import pixel_ops
from workbench.augmentation.pixel_ops import JITTER, MATRICES
from workbench.data import images

# ---- RandAugment

_NAMES = """
autocontrast equalize invert posterize solarize solarize_add solarize_add_all
contrast brightness sharpness
"""
_COLOURS = {name: getattr(pixel_ops, name) for name in _NAMES.split()}
_COLOURS["color"] = pixel_ops.saturation  # as RandAugment's papers and libraries call it


class Level(NamedTuple):
    """How a magnitude M, 0 to 10, becomes an operation's value."""

    value: Callable[[float, float], float | None]  # (M, sign of 1 or -1)
    unit: str


def _table(form: str, increasing: bool) -> dict[str, Level]:
    """The 15 operations of RandAugment in timm's form or United Perception's ("up")."""
    timm = form == "timm"
    nothing = Level(lambda m, sign: None, "")
    signed = lambda most, unit: Level(lambda m, sign: sign * (m / 10 * most), unit)
    shift = signed(0.45, "of the side") if timm else signed(100, "pixels")
    whole = int if timm else float
    if increasing:
        bits = lambda m, sign: 4 - int(m / 10 * 4)
        threshold = lambda m, sign: 256 - whole(m / 10 * 256)
        factor = lambda m, sign: max(0.1, 1 + sign * (m / 10 * 0.9))
    else:  # milder as M grows, or strong at both ends
        bits = lambda m, sign: max(0 if timm else 1, int(m / 10 * 4))
        threshold = lambda m, sign: whole(m / 10 * 256)
        factor = lambda m, sign: m / 10 * 1.8 + 0.1
    return {
        "autocontrast": nothing,
        "equalize": nothing,
        "invert": nothing,
        "rotate": signed(30, "degrees"),
        "posterize": Level(bits, "bits"),
        "solarize": Level(threshold, "threshold"),
        "solarize_add" if timm else "solarize_add_all": Level(
            lambda m, sign: int(m / 10 * 110), "added"
        ),
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), Level(factor, "factor")),
        "shear_x": signed(0.3, "pixels a row"),
        "shear_y": signed(0.3, "pixels a column"),
        "translate_x": shift,
        "translate_y": shift,
    }


_TABLES = {(f, i): _table(f, i) for f in ("up", "timm") for i in (False, True)}
_UNITS = {name: level.unit for table in _TABLES.values() for name, level in table.items()}


@dataclass(frozen=True)
class RandAugment:
    """n operations of 15, each drawn with replacement and then left out half of the time.

    Cubuk et al., arXiv 1909.13719. The magnitude of each is drawn around m with standard deviation
    std and kept within 0 to 10. Here some operations grow milder with it (posterize, solarize) or
    are strong at both ends (color ...); RandAugmentIncreasing turns these round. Defaults are
    United Perception's form: translations of up to 100 pixels, nearest neighbour, black fill;
    `timm(...)` is timm's: up to 0.45 of the side, bilinear or bicubic, the mean colour.
    """

    n: int = 2
    m: float = 7.0
    std: float = 0.5
    fill: tuple[int, int, int] = (0, 0, 0)
    interpolations: tuple[str, ...] = ("nearest",)
    form: str = "up"

    @classmethod
    def timm(cls, n: int, m: float, std: float, mean: tuple[float, ...]) -> "RandAugment":
        """timm's form, `rand-m{m}-n{n}-mstd{std}` (and `-inc1`), filled with `mean` (0 to 1)."""
        fill = tuple(min(255, round(255 * x)) for x in mean)
        return cls(n, m, std, fill, ("bilinear", "bicubic"), "timm")

    @property
    def levels(self) -> dict[str, Level]:
        """The 15 operations with their values; names are those of a draw."""
        return _TABLES[self.form, False]

    def sample_params(self, rng: np.random.Generator, size: int) -> list[tuple[str, Any, str]]:
        """(operation, value, interpolation) of those that are applied to size x size pixels."""
        uniform, normal = rng.random((self.n, 4)).tolist(), rng.standard_normal(self.n).tolist()
        names, drawn = list(self.levels), []
        for (which, applied, side, kind), deviation in zip(uniform, normal, strict=True):
            if applied >= 0.5:
                continue
            name = names[int(which * len(names))]
            magnitude = min(10.0, max(0.0, self.m + self.std * deviation))
            drawn.append(self.at(name, magnitude, size, 1 if side < 0.5 else -1, kind))
        return drawn

    def at(
        self, name: str, magnitude: float, size: int, sign: float = 1, kind: float = 0.0
    ) -> tuple[str, Any, str]:
        """One operation at a magnitude as in a draw; `kind`, 0 to 1, picks the interpolation."""
        value, unit = self.levels[name].value(magnitude, sign), self.levels[name].unit
        if unit == "of the side":
            value *= size
        interpolation = self.interpolations[int(kind * len(self.interpolations))]
        return name, value, interpolation if name in MATRICES else ""

    def apply(self, pixels: np.ndarray, drawn: list[tuple[str, Any, str]]) -> np.ndarray:
        """Pixels (h, w, 3) after `draw`'s operations, in their order."""
        for name, value, interpolation in drawn:
            if name in MATRICES:
                pixels = pixel_ops.move(pixels, name, value, interpolation, self.fill)
            else:
                pixels = _COLOURS[name](pixels, value)
        return pixels

    def table(self) -> list[dict[str, Any]]:
        """A row per operation: its name, its value at magnitude m (positive side), its unit."""
        return [
            {"operation": name, "value": level.value(self.m, 1), "unit": level.unit}
            for name, level in self.levels.items()
        ]


@dataclass(frozen=True)
class RandAugmentIncreasing(RandAugment):
    """RandAugment in which a higher magnitude is never milder, as RSB and UP use it (inc1)."""

    @property
    def levels(self) -> dict[str, Level]:
        return _TABLES[self.form, True]


# torchvision's 25 sub-policies for ImageNet, Cubuk et al., arXiv 1805.09501
_AUTOAUGMENT = v2.AutoAugment()


def _autoaugment(pixels: np.ndarray, seed: int) -> np.ndarray:
    """AutoAugment as drawn from a seed; torch's own state is left as it was."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        return np.asarray(_AUTOAUGMENT(Image.fromarray(pixels)))
    finally:
        torch.set_rng_state(state)


# ---- one image

_ATTEMPTS = 10  # as torchvision's RandomResizedCrop before it falls back to the centre


@dataclass(frozen=True)
class ResizeShortSide:
    """Short side to `side` pixels where it is longer; with None an image stays as it is.

    What of an image a training needs, and a cache keeps.
    """

    side: int | None = None
    interpolation: str = "bilinear"

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what comes out."""
        short = min(width, height)
        if self.side is None or short <= self.side:
            return width, height
        return round(self.side * width / short), round(self.side * height / short)

    def image(self, image: Any) -> images.Pixels | images.Jpeg:
        """An image as TrainTransform takes it, resized; where it is small already, unread."""
        image = images.image(image)
        size = (image.width, image.height)
        if (shape := self.shape(*size)) == size:
            return image
        return images.Pixels(image.downscaled(shape, self.interpolation))

    def __call__(self, image: Any) -> np.ndarray:
        """Its pixels (h, w, 3)."""
        return self.image(image).pixels()


@dataclass(frozen=True)
class TrainTransform:
    """Random crop and resize, flip, AutoAugment, RandAugment, colour jitter, in this order.

    `shrink` comes first, and what is drawn is drawn for what it leaves. With `on_device` a loader
    only crops and resizes, and hands the rest of a draw to batched.apply.

    UP's T-std is crop 0.08-1, hflip 0.5, jitter 0.2/0.2/0.2/0.1. Szegedy et al., arXiv 1409.4842,
    section 6, for the crop; crop, flip and jitter are torchvision's operations. An `image` is what
    images.open gives, one of Pillow's, or pixels (h, w, 3); the result is pixels, not to be
    written to.
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
    autoaugment: bool = False
    randaug: RandAugment | None = None
    resize: ResizeShortSide = ResizeShortSide()
    on_device: bool = False

    def sample_params(self, rng: np.random.Generator, width: int, height: int) -> dict[str, Any]:
        """Where to crop (left, top, width, height in pixels), whether to flip, what else to do.

        Jitter's factors by name in their drawn order, `autoaugment` (a seed) and `randaug`
        (operation, value, interpolation) where they are on.
        """
        crops, rest = rng.random((_ATTEMPTS, 4)), rng.random(5)
        order = rng.permutation(len(JITTER))
        left, top, crop_width, crop_height = self._box(crops, width, height)
        draw = {"left": left, "top": top, "width": crop_width, "height": crop_height}
        draw["flip"] = bool(rest[4] < self.hflip)
        for i in order:
            if strength := getattr(self, JITTER[i]):
                centre = 0.0 if JITTER[i] == "hue" else 1.0
                draw[JITTER[i]] = centre + strength * float(2 * rest[i] - 1)
        seed = int(rng.integers(2**31))
        if self.autoaugment:
            draw["autoaugment"] = seed
        if self.randaug is not None:
            draw["randaug"] = self.randaug.sample_params(rng, self.size)
        return draw

    def apply(self, image: Any, draw: dict[str, Any]) -> np.ndarray:
        """Pixels (size, size, 3) of an image after a draw; jitter in the order of its keys."""
        pixels = self.crop(image, draw)
        if draw["flip"]:
            pixels = cv2.flip(pixels, 1)
        if "autoaugment" in draw:
            pixels = _autoaugment(pixels, draw["autoaugment"])
        if "randaug" in draw:
            pixels = self.randaug.apply(pixels, draw["randaug"])
        for name, value in draw.items():
            if name in JITTER:
                pixels = getattr(pixel_ops, name)(pixels, value)
        return pixels

    def crop(self, image: Any, draw: dict[str, Any]) -> np.ndarray:
        """Pixels (size, size, 3) of a draw's box alone."""
        left, top = draw["left"], draw["top"]
        box = (left, top, left + draw["width"], top + draw["height"])
        return images.image(image).resized(box, (self.size, self.size), self.interpolation)

    def __call__(self, image: Any, rng: np.random.Generator) -> np.ndarray:
        """Pixels (size, size, 3) of an image, resized, after a draw of `rng`."""
        image = self.resize.image(image)
        return self.apply(image, self.sample_params(rng, image.width, image.height))

    def sweep(self, count: int = 5) -> dict[str, list[Any]]:
        """For every operation in use, draws from its mildest to its strongest value.

        The rest of each draw is neutral (whole image, no flip, no jitter), so a row of images
        shows one operation alone. Keys name the operation, values are draws without crop box for
        jitter and with `area` (share of the image) for crop; RandAugment's operations stand at
        magnitudes from 0 to 10.
        """
        rows: dict[str, list[Any]] = {}
        if self.crop_scale != (1.0, 1.0):
            rows["crop"] = [{"area": a} for a in np.linspace(*self.crop_scale[::-1], count)]
        if self.crop_ratio[0] != self.crop_ratio[1]:
            logs = np.linspace(*np.log(self.crop_ratio), count)
            area = sum(self.crop_scale) / 2
            rows["aspect"] = [{"area": area, "ratio": math.exp(x)} for x in logs]
        if self.hflip:
            rows["flip"] = [{"flip": False}, {"flip": True}]
        for name in JITTER:
            if strength := getattr(self, name):
                centre = 0.0 if name == "hue" else 1.0
                values = np.linspace(centre - strength, centre + strength, count)
                rows[name] = [{name: float(v)} for v in values]
        if self.randaug is not None:
            magnitudes = np.linspace(0, 10, count).tolist()
            for name in self.randaug.levels:
                drawn = [self.randaug.at(name, m, self.size) for m in magnitudes]
                rows[f"randaug\n{name}"] = [{"randaug": [one]} for one in drawn]
        return rows

    def at(self, image: Any, setting: dict[str, Any]) -> np.ndarray:
        """Pixels (size, size, 3) of an image under one entry of `sweep`."""
        image = self.resize.image(image)
        width, height = image.width, image.height
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
class EvalTransform:
    """Short side to `resize`, then the centre `size` x `size` pixels (UP's E-std: 256 and 224).

    `resize` is not below `size`.
    """

    __test__ = False  # pytest: no test class

    size: int
    resize: int
    interpolation: str = "bilinear"
    on_device = False  # nothing is left to do there

    def shape(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of what comes out."""
        return self.size, self.size

    def __call__(self, image: Any, rng: Any = None) -> np.ndarray:
        """Pixels (size, size, 3) of an image, as TrainTransform takes it.

        Computed as torchvision's Resize and CenterCrop on a Pillow image, but for what the crop
        would throw away.
        """
        image, size = images.image(image), self.size
        width, height = image.width, image.height
        short = min(width, height)
        wide, high = int(self.resize * width / short), int(self.resize * height / short)
        left, top = round((wide - size) / 2), round((high - size) / 2)
        by, down_by = width / wide, height / high
        box = (left * by, top * down_by, (left + size) * by, (top + size) * down_by)
        return image.resized(box, (size, size), self.interpolation, exact=True)


def describe(draw: dict[str, Any]) -> str:
    """What a draw does beside cropping, in a few words: "flip, rotate -21°, posterize 2 bits"."""
    short = {"degrees": "°", "bits": " bits", "pixels": " px", "of the side": " px"}
    words = ["flip"] if draw.get("flip") else []
    words += ["autoaugment"] if "autoaugment" in draw else []
    for name, value, _ in draw.get("randaug", []):
        words.append(name if value is None else f"{name} {value:.3g}{short.get(_UNITS[name], '')}")
    words += [f"{name} {draw[name]:.2f}" for name in draw if name in JITTER]
    return ", ".join(words)


# ---- a batch, on the device


@dataclass(frozen=True)
class RandomErasing:
    """Up to `count` boxes of an image filled with noise, after normalisation.

    Zhong et al., arXiv 1708.04896: a box covers 2 to 33 % of the area (divided by the number of
    boxes), its height over width is drawn evenly on a log scale from 0.3 to 1 / 0.3. Mode "pixel"
    fills every pixel from N(0, 1), "rand" every channel with one value, "const" with 0, the mean.
    """

    probability: float = 0.25
    mode: str = "pixel"
    count: int = 1
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: float = 0.3

    def sample_params(
        self, rng: np.random.Generator, images: int, size: int
    ) -> dict[str, np.ndarray]:
        """`boxes` (images, count, 4) as left, top, right, bottom in pixels, `seeds` (images,).

        A box of zeros is none: the image was not chosen, or ten attempts found no box that is
        smaller than the image.
        """
        chosen = rng.random(images) < self.probability
        number = rng.integers(1, self.count + 1, images)
        seeds = rng.integers(2**62, size=images)
        u = rng.random((4, images, self.count, _ATTEMPTS))
        area = self.area[0] + (self.area[1] - self.area[0]) * u[0]
        area *= size * size / number[:, None, None]
        aspect = np.exp(math.log(self.ratio) * (1 - 2 * u[1]))
        height = np.rint(np.sqrt(area * aspect)).astype(int)
        width = np.rint(np.sqrt(area / aspect)).astype(int)
        left = (u[2] * (size - width + 1)).astype(int)
        top = (u[3] * (size - height + 1)).astype(int)
        fits = (height < size) & (width < size)
        boxes = np.stack([left, top, left + width, top + height], -1)
        boxes = np.take_along_axis(boxes, fits.argmax(2)[..., None, None], 2)[:, :, 0]
        used = chosen[:, None] & fits.any(2) & (np.arange(self.count) < number[:, None])
        return {"boxes": boxes * used[..., None], "seeds": seeds}

    def apply(self, images: torch.Tensor, boxes: np.ndarray, seeds: np.ndarray) -> torch.Tensor:
        """The normalised images (n, 3, size, size), changed in place."""
        generator = torch.Generator(images.device)
        for i in np.flatnonzero(boxes.any((1, 2))).tolist():
            generator.manual_seed(int(seeds[i]))
            for left, top, right, bottom in boxes[i].tolist():
                shape = (3, bottom - top, right - left) if self.mode == "pixel" else (3, 1, 1)
                patch = images[i, :, top:bottom, left:right]
                if self.mode == "const":
                    patch.zero_()
                elif patch.numel():
                    patch.copy_(torch.randn(shape, generator=generator, device=images.device))
        return images


@dataclass(frozen=True)
class MixupCutmix:
    """Mixup or CutMix of every image with a partner; labels are mixed by the same share.

    Zhang et al., arXiv 1710.09412: x = lam * x_i + (1 - lam) * x_j, lam from Beta(alpha, alpha).
    Yun et al., arXiv 1905.04899: a box of x_j whose sides are sqrt(1 - lam) of the image's, its
    centre anywhere, cut off at the border, after which lam is the share of x_i that remains. With
    both alphas above 0, CutMix comes with probability `switch_prob`. One draw serves the whole
    step, or every image with `per_sample`; with probability 1 - `prob` it mixes nothing.

    Partners are neighbours in the step: 2k and 2k + 1 take from each other. The order of a step is
    random, so this is as good as any pairing, and it is the same for any number of processes.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    switch_prob: float = 0.5
    per_sample: bool = False
    prob: float = 1.0

    def sample_params(
        self, rng: np.random.Generator, images: int, size: int
    ) -> dict[str, np.ndarray]:
        """`lam` (images,), the share of its own that an image keeps, and `boxes` (images, 4).

        Boxes are left, top, right, bottom in pixels; all zero where Mixup was drawn.
        """
        n = images if self.per_sample else 1
        cut = rng.random(n) < (self.switch_prob if self.mixup_alpha else 1.0)
        cut &= self.cutmix_alpha > 0
        mixed = rng.beta(self.mixup_alpha, self.mixup_alpha, n) if self.mixup_alpha else np.ones(n)
        if self.cutmix_alpha:
            mixed = np.where(cut, rng.beta(self.cutmix_alpha, self.cutmix_alpha, n), mixed)
        side = (size * np.sqrt(1 - mixed)).astype(int)
        centre = rng.integers(size, size=(2, n))
        low = np.clip(centre - side // 2, 0, size)
        high = np.clip(centre + (side + 1) // 2, 0, size)
        boxes = np.stack([*low, *high], 1) * cut[:, None]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        lam = np.where(cut, 1 - area / (size * size), mixed)
        if self.prob < 1:  # the last draw, so that the others do not depend on it
            on = rng.random(n) < self.prob
            lam, boxes = np.where(on, lam, 1.0), boxes * on[:, None]
        repeats = images // n
        return {"lam": lam.repeat(repeats), "boxes": boxes.repeat(repeats, 0)}

    def apply(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        places: np.ndarray,
        lam: np.ndarray,
        boxes: np.ndarray,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images (n, 3, size, size) and soft labels (n, classes) from soft labels.

        `places` (n,) says where in the step each image stands; one whose partner is not there
        (the last of an odd step) stays as it is.
        """
        device = images.device
        partner = torch.from_numpy(_partners(places)).to(device, non_blocking=True)
        share = torch.from_numpy(lam.astype(np.float32)).to(device, non_blocking=True)[:, None]
        targets = torch.lerp(targets[partner], targets, share.to(targets.dtype))
        kept = share[:, :, None, None]
        if boxes.any():
            left, top, right, bottom = (
                torch.from_numpy(boxes).to(device, non_blocking=True).T[..., None, None, None]
            )
            at = torch.arange(images.shape[-1], device=device)
            row, column = at[None, None, :, None], at[None, None, None, :]
            inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
            cut = (right > left) & (bottom > top)
            kept = torch.where(cut, (~inside).float(), kept)
        return torch.lerp(images[partner], images, kept.to(images.dtype)), targets


def _partners(places: np.ndarray) -> np.ndarray:
    """For every place of a part the position of its partner, its own where that is not there."""
    position = {place: i for i, place in enumerate(places.tolist())}
    return np.array([position.get(p ^ 1, i) for i, p in enumerate(places.tolist())], np.int64)
