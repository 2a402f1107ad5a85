"""Training and validation images of a recipe, up to the tensors that a model takes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench import CACHE, ROOT, augmentation, data, parts, shard_store
from workbench.augmentation import device_ops
from workbench.data import pixel_cache
from workbench.recipe import Recipe
from workbench.training import losses
from workbench.training.distributed import is_main

Random = augmentation.RandomErasing | augmentation.MixupCutmix


def train_transform(recipe: Recipe) -> augmentation.TrainTransform:
    """The recipe's training transform."""
    randaug = None
    if recipe.randaug_n:
        increasing = recipe.randaug_increasing
        kind = augmentation.RandAugmentIncreasing if increasing else augmentation.RandAugment
        strength = recipe.randaug_n, recipe.randaug_m, recipe.randaug_std
        timm = recipe.randaug_variant == "timm"
        randaug = kind.timm(*strength, recipe.mean) if timm else kind(*strength)
    custom = None
    if recipe.transform:
        custom = parts.load("transform", recipe.transform, **recipe.transform_args)
    names = set("interpolation hflip brightness contrast saturation hue autoaugment".split())
    return augmentation.TrainTransform(
        size=recipe.image_size,
        crop_scale=tuple(recipe.crop_scale),
        crop_ratio=tuple(recipe.crop_ratio),
        randaug=randaug,
        resize=augmentation.ResizeShortSide(recipe.train_resize, recipe.interpolation),
        on_device=recipe.augment_on_device,
        custom=custom,
        **recipe.model_dump(include=names),
    )


def eval_transform(recipe: Recipe) -> augmentation.EvalTransform:
    """The recipe's validation transform."""
    size = recipe.val_image_size or recipe.image_size
    return augmentation.EvalTransform(size, recipe.val_resize, recipe.interpolation)


def sampler_options(recipe: Recipe) -> dict[str, Any]:
    """Which images a step uses, as arguments of data.train_loader and data.Sampler."""
    names = "seed batch_size drop_last repeated_aug class_balanced_sampling"
    return recipe.model_dump(include=set(names.split()))


def build_pixel_caches(
    recipe: Recipe, train: pd.DataFrame, val: pd.DataFrame
) -> tuple[pixel_cache.Cache, pixel_cache.Cache]:
    """Complete caches of verified frames: training images before the crop, validation images as
    the model takes them. Raises CacheError.
    """
    if "digest" not in train or "digest" not in val:
        text = "cache: true needs images that were read before, and an index checks shards alone"
        raise pixel_cache.CacheError(f"{text}; set cache: false")
    folder = _cache_folder(recipe, "pixels")
    caches = (
        pixel_cache.Cache(train, train_transform(recipe).resize, folder),
        pixel_cache.Cache(val, eval_transform(recipe), folder),
    )
    pixel_cache.build(*caches, progress=is_main())
    return caches


def open_shard_cache(recipe: Recipe, dataset: data.Dataset) -> None:
    """Opens the cache of images from object stores, or none; says where. Raises StoreError."""
    shard_store.cache = None
    if recipe.shard_cache_gb:
        frames, limit = (dataset.train, dataset.val), round(recipe.shard_cache_gb * 1e9)
        text = data.open_cache(frames, _cache_folder(recipe, "shards"), limit)
        if is_main():
            print(text)


def _cache_folder(recipe: Recipe, name: str) -> Path:
    return ROOT / Path(recipe.cache_dir).expanduser() if recipe.cache_dir else CACHE / name


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

    With `augment_on_device` each image is augmented first, by its own parameters. Parameters of
    erasing and mixing are sampled for the whole step from (seed, step); each process uses those of
    its own images.
    """

    def __init__(self, recipe: Recipe, classes: int, device: torch.device):
        self.seed, self.size = recipe.seed, recipe.image_size
        self.classes, self.device = classes, device
        self.normalize = Normalize(recipe, device)
        randaug = train_transform(recipe).randaug
        self.fill = randaug.fill if randaug else (0, 0, 0)
        self.erase = self.mix = None
        if recipe.erase_prob:
            erase = recipe.erase_prob, recipe.erase_mode, recipe.erase_count
            self.erase = augmentation.RandomErasing(*erase)
        if recipe.mixup_alpha or recipe.cutmix_alpha:
            mix = recipe.switch_prob, recipe.mix_per_sample, recipe.mix_prob
            self.mix = augmentation.MixupCutmix(recipe.mixup_alpha, recipe.cutmix_alpha, *mix)

    def __call__(self, batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 images (n, 3, h, w) and targets: class numbers (n,), or soft labels (n, C)."""
        images = batch.images.to(self.device, non_blocking=True)
        if batch.aug_params is not None:
            images = device_ops.apply(images, batch.aug_params, self.fill)
        images = self.normalize(images)
        targets = batch.labels.to(self.device, non_blocking=True)
        positions = batch.positions.numpy()
        if self.erase:
            images = self.erase.apply(images, **self._params(self.erase, data.ERASE, batch))
        if self.mix:
            params = self._params(self.mix, data.MIX, batch)
            targets = losses.soft(targets, self.classes)
            images, targets = self.mix.apply(images, targets, positions, **params)
        return images, targets

    def _params(self, operation: Random, purpose: int, batch: data.Batch) -> dict[str, np.ndarray]:
        rng = data.rng_for(self.seed, purpose, batch.step)
        params = operation.sample_params(rng, batch.global_size, self.size)
        return {key: values[batch.positions.numpy()] for key, values in params.items()}


def train_batches(
    recipe: Recipe, dataset: data.Dataset, steps: range, **loading: Any
) -> Iterator[data.Batch]:
    """The recipe's training batches; `loading` is passed on to data.train_loader."""
    transform, options = train_transform(recipe), sampler_options(recipe)
    return data.train_loader(dataset.train, transform, steps=steps, **options, **loading)


def preview_batch(
    recipe: Recipe, dataset: data.Dataset, count: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeviceTransform's images and targets for the first images of step 0.

    `count` is even, so that each image has the partner it is mixed with.
    """
    batch = next(train_batches(recipe, dataset, range(1), micro_batch_size=count))
    return DeviceTransform(recipe, len(dataset.classes), torch.device("cpu"))(batch)
