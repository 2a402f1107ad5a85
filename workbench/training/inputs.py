"""Training and validation images as a recipe asks for them, up to the tensors a model takes."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench import CACHE, ROOT, augmentation, data
from workbench.augmentation import device_ops
from workbench.data import pixel_cache
from workbench.recipe import Recipe
from workbench.training import losses


def train_transform(recipe: Recipe) -> augmentation.TrainTransform:
    """The recipe's training transform."""
    return augmentation.TrainTransform(
        size=recipe.image_size,
        crop_scale=tuple(recipe.crop_scale),
        crop_ratio=tuple(recipe.crop_ratio),
        interpolation=recipe.interpolation,
        hflip=recipe.hflip,
        brightness=recipe.brightness,
        contrast=recipe.contrast,
        saturation=recipe.saturation,
        hue=recipe.hue,
        autoaugment=recipe.autoaugment,
        randaug=_randaug(recipe) if recipe.randaug_n else None,
        resize=augmentation.ResizeShortSide(recipe.train_resize, recipe.interpolation),
        on_device=recipe.augment_on_device,
    )


def _randaug(recipe: Recipe) -> augmentation.RandAugment:
    increasing = recipe.randaug_increasing
    kind = augmentation.RandAugmentIncreasing if increasing else augmentation.RandAugment
    if recipe.randaug_variant == "timm":
        return kind.timm(recipe.randaug_n, recipe.randaug_m, recipe.randaug_std, recipe.mean)
    return kind(recipe.randaug_n, recipe.randaug_m, recipe.randaug_std)


def sampler_options(recipe: Recipe) -> dict[str, Any]:
    """Which images a step shows, as arguments of data.train_loader and data.Sampler."""
    names = "seed batch_size drop_last repeated_aug class_balanced_sampling".split()
    return {name: getattr(recipe, name) for name in names}


def eval_transform(recipe: Recipe) -> augmentation.EvalTransform:
    """The recipe's validation transform."""
    size = recipe.val_image_size or recipe.image_size
    return augmentation.EvalTransform(size, recipe.val_resize, recipe.interpolation)


def build_pixel_caches(
    recipe: Recipe, train: pd.DataFrame, val: pd.DataFrame, progress: bool = True
) -> tuple[pixel_cache.Cache, pixel_cache.Cache]:
    """Complete caches of verified frames: training images before the crop, validation images as
    the model takes them. Raises CacheError.
    """
    folder = ROOT / Path(recipe.cache_dir).expanduser() if recipe.cache_dir else CACHE / "pixels"
    caches = (
        pixel_cache.Cache(train, train_transform(recipe).resize, folder),
        pixel_cache.Cache(val, eval_transform(recipe), folder),
    )
    pixel_cache.build(*caches, progress=progress)
    return caches


class Normalize:
    """uint8 (n, 3, h, w) on a device -> float32, mean subtracted, divided by std (0-1 scale)."""

    def __init__(self, recipe: Recipe, device: torch.device):
        shape = (1, 3, 1, 1)
        self.mean = torch.tensor(recipe.mean, device=device).mul(255).reshape(shape)
        self.std = torch.tensor(recipe.std, device=device).mul(255).reshape(shape)
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=self.layout)

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images back as uint8 (n, h, w, 3), for display."""
        shown = (images * self.std + self.mean).clamp(0, 255)
        return shown.round().byte().permute(0, 2, 3, 1)


class DeviceTransform:
    """A training batch as the model takes it: normalised, erased and mixed, on the device.

    With `augment_on_device` it is first flipped and so on with the parameters of each image.
    Parameters of erasing and mixing are sampled for the whole step from (seed, step); each process
    takes those of its own images.
    """

    def __init__(self, recipe: Recipe, classes: int, device: torch.device):
        self.seed, self.size = recipe.seed, recipe.image_size
        self.classes, self.device = classes, device
        self.normalize = Normalize(recipe, device)
        randaug = train_transform(recipe).randaug
        self.fill = randaug.fill if randaug else (0, 0, 0)
        self.erase = self.mix = None
        if recipe.erase_prob:
            self.erase = augmentation.RandomErasing(
                recipe.erase_prob, recipe.erase_mode, recipe.erase_count
            )
        if recipe.mixup_alpha or recipe.cutmix_alpha:
            alphas = recipe.mixup_alpha, recipe.cutmix_alpha
            self.mix = augmentation.MixupCutmix(
                *alphas, recipe.switch_prob, recipe.mix_per_sample, recipe.mix_prob
            )

    def __call__(self, batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 images (n, 3, h, w) and targets: class numbers (n,), or soft labels (n, C)."""
        images = batch.images.to(self.device, non_blocking=True)
        if batch.aug_params is not None:
            images = device_ops.apply(images, batch.aug_params, self.fill)
        images = self.normalize(images)
        targets = batch.labels.to(self.device, non_blocking=True)
        places = batch.positions.numpy()
        if self.erase:
            drawn = self._own(self.erase, data.ERASE, batch, places)
            images = self.erase.apply(images, **drawn)
        if self.mix:
            drawn = self._own(self.mix, data.MIX, batch, places)
            targets = losses.soft(targets, self.classes)
            images, targets = self.mix.apply(images, targets, places, **drawn)
        return images, targets

    def _own(
        self, operation: Any, purpose: int, batch: data.Batch, places: np.ndarray
    ) -> dict[str, np.ndarray]:
        rng = data.rng_for(self.seed, purpose, batch.step)
        drawn = operation.sample_params(rng, batch.global_size, self.size)
        return {key: values[places] for key, values in drawn.items()}


def preview_batch(
    recipe: Recipe, dataset: data.Dataset, count: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeviceTransform's images and targets for the first images of step 0.

    `count` is even, so that each image has the partner it is mixed with.
    """
    loader = data.train_loader(
        dataset.train,
        train_transform(recipe),
        **sampler_options(recipe),
        steps=range(1),
        micro_batch_size=count,
    )
    return DeviceTransform(recipe, len(dataset.classes), torch.device("cpu"))(next(loader))
