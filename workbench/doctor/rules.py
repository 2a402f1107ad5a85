"""Facts and warnings about a recipe, computed before training.

torch and pandas are imported inside functions: a recipe is examined without them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from workbench import counted, schedule
from workbench.recipe import Recipe
from workbench.recipe_checks import is_part, mixes, on_logits, one_each

Warnings = Iterator[tuple[str, str]]  # text, source
SMALL_MODELS = ("resnet10", "resnet14", "resnet18", "test_", "mobilenet", "regnetx_002")
BATCH_NORM_MODELS = ("resnet", "regnet", "mobilenet", "efficientnet")


class Finding(NamedTuple):
    """A sentence about a recipe; `source` is the evidence of a warning, empty for a fact."""

    kind: str  # "fact" or "warning"
    text: str
    source: str = ""

    def __str__(self) -> str:
        return f"warning: {self.text} [{self.source}]" if self.source else self.text


def examine(
    recipe: Recipe,
    *,
    images: int,
    classes: int,
    counts: Sequence[int] | None = None,
    downscaled: int | None = None,
    measured: bool = True,
) -> list[Finding]:
    """Facts, then warnings, for `images` training images in `classes` classes.

    `counts` are the images per class, `downscaled` the number of images that train_resize makes
    smaller, if known. `measured` includes the warnings that apply the augmentation and look up the
    weights, which takes seconds. Raises TrainingError if no step is possible, DataError for fewer
    than two classes, ModelError for an unknown model.
    """
    if not is_part(recipe.model):
        _check_name(recipe.model)
    if recipe.optimizer_args or recipe.optimizer not in ("sgd", "adamw", "lamb"):
        from workbench import training  # slow to import

        training.check_optimizer(recipe)
    if classes < 2:
        from workbench import data

        raise data.DataError(f"found {counted(classes, 'class')}; a classifier needs two or more")
    per_epoch = schedule.steps_per_epoch(images, recipe.batch_size, recipe.drop_last)
    if per_epoch == 0:
        raise schedule.TrainingError(
            f"batch_size {recipe.batch_size} exceeds the {counted(images, 'image')}: drop_last "
            "leaves no batch"
        )
    warnings = [
        *_optimizer_warnings(recipe, classes),
        *_schedule_warnings(recipe, per_epoch),
        *_loss_and_data_warnings(recipe, classes),
        *_distillation_warnings(recipe),
        *(_measured_warnings(recipe) if measured else ()),
    ]
    per_class = f"{images / classes:,.0f} images a class on average"
    if counts is not None:
        per_class += f", {min(counts):,} in the smallest and {max(counts):,} in the largest"
        if empty := list(counts).count(0):
            have = "has" if empty == 1 else "have"
            text = f"{empty:,} of {classes:,} classes {have} no training image"
            warnings.append((f"{text}; see workbench check-data", "the data"))
    if downscaled == 0:
        text = f"train_resize {recipe.train_resize} shrinks none of {images:,} training images"
        warnings.append((f"{text}; leave it out", "image sizes"))
    guessing = f"{per_class}; guessing gives {100 / classes:.3g} % top-1."
    facts = [guessing, *_facts(recipe, images, classes, per_epoch)]
    found = [("fact", text, "") for text in facts] + [("warning", *both) for both in warnings]
    return [Finding(*finding) for finding in found]


def _check_name(name: str) -> None:
    """Raises ModelError for a model timm does not have; imports timm only for unknown names."""
    definition = f"@register_model\ndef {name.partition('.')[0]}("
    files = (Path(importlib.util.find_spec("timm").origin).parent / "models").glob("*.py")
    if not any(definition in path.read_text(encoding="utf-8") for path in files):
        from workbench import models

        models.check_name(name)


def gradient_scale(recipe: Recipe, classes: int) -> float:
    """Norm of the gradient of the loss at the logits of an untrained model, for one image.

    Logits are near 0, so the gradient is softmax(0) or sigmoid(0) less the target; for plain
    cross-entropy the norm is sqrt(1 - 1 / classes).
    """
    smooth, predicted, factor = recipe.label_smoothing / classes, 1 / classes, 1.0
    target, others = 1 - recipe.label_smoothing + smooth, smooth
    if recipe.loss == "bce":
        predicted = 1 / (1 + classes) if recipe.bce_shift else 0.5
        factor = 1.0 if recipe.bce_sum else 1 / classes
        if recipe.bce_threshold is not None:
            target, others = (float(t > recipe.bce_threshold) for t in (target, others))
    return factor * math.hypot(predicted - target, math.sqrt(classes - 1) * (predicted - others))


def _from_scratch(recipe: Recipe) -> bool:
    return not (recipe.weights or recipe.pretrained or recipe.resume_from)


def _half_life(recipe: Recipe) -> float:
    """Of the EMA, in steps."""
    return math.log(0.5) / math.log(recipe.ema_decay)


def _facts(recipe: Recipe, images: int, classes: int, per_epoch: int) -> Iterator[str]:
    steps = recipe.epochs * per_epoch
    text = f"{counted(per_epoch, 'step')} an epoch of {counted(images, 'image')}, "
    text += f"{counted(steps, 'step')} in all"
    if (rest := images % recipe.batch_size) and not recipe.drop_last:
        last = "the last" if per_epoch > 1 else "that"
        text += f"; {last} step of an epoch has {counted(rest, 'image')} instead of "
        text += f"{recipe.batch_size:,}"
    yield f"{text}."
    if (times := recipe.repeated_aug) > 1:
        yield f"An epoch uses 1 / {times} of the images, each {times} times."
    text = "Several processes (torchrun, srun) take the same batches in the same order; of 4, each "
    text += f"has its own workers and {recipe.batch_size / 4:,g} of {recipe.batch_size:,} images, "
    yield f"{text}batch norm the statistics of {'all' if recipe.sync_batch_norm else 'these'}."
    lr_at = schedule.lr_schedule(recipe, per_epoch)
    text = f"lr starts at its peak of {recipe.lr:g}"
    if warmup := schedule.warmup_steps(recipe, per_epoch):
        text = f"lr rises from {lr_at(0):.3g} to its peak of {recipe.lr:g} over "
        text += f"{counted(warmup, 'step')} ({warmup / per_epoch:.3g} of "
        text += f"{counted(recipe.epochs, 'epoch')})"
    middle, last = lr_at(steps // 2), lr_at(steps - 1)
    yield f"{text}, is {middle:.3g} half way and {last:.3g} in the last step."
    if recipe.ema_decay is not None:
        half = _half_life(recipe)
        text = f"EMA: half of it is younger than {half:,.0f} steps, {half / per_epoch:.3g} epochs"
        yield f"{text}; the initial weights have {recipe.ema_decay**steps:.2g} of it at the end."


# ---- warnings


def _optimizer_warnings(recipe: Recipe, classes: int) -> Warnings:
    size, from_scratch = recipe.batch_size, _from_scratch(recipe)
    lr = f"lr {recipe.lr:g} at batch_size {size:,}"
    if recipe.optimizer == "lamb":
        # Below 2,048 the rule is no upper bound: the unscaled 0.008 was best on CIFAR-10 at 128.
        root = math.sqrt(size / 2048)
        low, high = 0.005 * root, 0.008 * max(1.0, root)
        if from_scratch and not low / 1.6 <= recipe.lr <= high * 1.6:
            text = f"LAMB with {lr}: try {low:.2g} to {high:.2g}"
            yield text, "arXiv 2110.00476, table 2: 0.005 to 0.008 at 2,048; arXiv 1904.00962"
        if recipe.clip_grad_norm is None:
            text = "LAMB without clip_grad_norm: published recipes clip at 1.0"
            yield text, "max_grad_norm in timm's and United Perception's LAMB"
    if recipe.optimizer != "sgd":
        return
    linear = 0.1 * size / 256
    if recipe.momentum >= 0.8 and size >= 64:
        if from_scratch and not linear / 4 <= recipe.lr <= linear * 4:
            text = f"SGD with {lr}: the linear rule gives {linear:.2g}"
            yield text, "arXiv 1706.02677, section 2.1: 0.1 for 256 images"
        if not from_scratch and not recipe.resume_from and recipe.lr > linear:
            text = f"{lr} with pre-trained weights is as high as from scratch; use a tenth or less"
            yield text, "United Perception's page on downstream tasks: 0.1 or 0.01 of it"
    if (scale := gradient_scale(recipe, classes)) < 0.3:
        text = f"the gradient of the loss has norm {scale:.2g}: use bce_sum, a larger lr, or lamb"
        yield text, f"the formula: a mean over {classes:,} classes; timm's bce_sum and UP's bias"


def _schedule_warnings(recipe: Recipe, per_epoch: int) -> Warnings:
    steps, warmup = recipe.epochs * per_epoch, schedule.warmup_steps(recipe, per_epoch)
    large = recipe.batch_size >= 1024 and _from_scratch(recipe)
    if warmup == 0 and recipe.schedule != "one_cycle" and large:
        text = f"no warm-up at batch_size {recipe.batch_size:,}: use one of about 5 epochs"
        yield text, "arXiv 1706.02677, section 2.2: large batches diverge or lose accuracy"
    if warmup > 0.2 * steps:
        text = f"the warm-up takes {warmup:,} of {steps:,} steps; published recipes take 1 to 7 %"
        yield text, "arXiv 1706.02677; arXiv 2110.00476"
    if recipe.ema_decay is not None and (half := _half_life(recipe)) > 0.1 * steps:
        decay = 1 - math.log(2) / (0.05 * steps)
        advice = f"use {decay:.4g}" if decay > 0 else "leave it out"
        text = f"EMA {recipe.ema_decay:g} has a half-life of {half:,.0f} of {steps:,} steps"
        yield f"{text}; {advice}", "half-life ln 0.5 / ln decay; timm issue 281"
    last = schedule.lr_schedule(recipe, per_epoch)(steps - 1)
    if recipe.cosine_epochs is not None and last > recipe.lr_min + 0.005 * recipe.lr:
        text = f"cosine_epochs {recipe.cosine_epochs:g} end after the last epoch"
        yield f"{text}: lr ends at {last / recipe.lr:.1%} of its peak", "UP's lr_helper.py"


def _loss_and_data_warnings(recipe: Recipe, classes: int) -> Warnings:
    smoothing, threshold = recipe.label_smoothing, recipe.bce_threshold
    from_scratch = _from_scratch(recipe)
    mixed = mixes(recipe) and from_scratch
    small = recipe.epochs <= 100 and recipe.model.startswith(SMALL_MODELS)
    if mixed and small and recipe.loss == "bce":
        yield (
            f"strikes in {recipe.epochs} epochs on a small network: ResNet-18 reached 68.25 on "
            "ImageNet in 100 epochs, 70.63 in 300, 71.50 in 600, and 69.75 by plain training",
            "timm's results-imagenet.csv, resnet18.{a3,a2,a1,tv}_in1k at 224 pixels",
        )
    if mixed and recipe.epochs < 100:
        text = f"mixing in {recipe.epochs} epochs: mixed images need longer training"
        yield text, "arXiv 1812.01187, section 5: 200 epochs instead of 120"
    if threshold is not None and smoothing > 0 and smoothing / classes < threshold:
        least = (threshold - smoothing / classes) / (1 - smoothing)
        yield (
            f"with bce_threshold {threshold:g} every target is 0 or 1: label_smoothing only "
            f"changes the least share of a mixed label that counts, to {least:.3f}",
            "the formula; timm thresholds after smoothing",
        )
    if recipe.hflip > 0 and recipe.dataset in ("digits", "letters"):
        text = f"hflip {recipe.hflip:g} mirrors {recipe.dataset}, which changes their class"
        yield text, "b and d, 2 and its mirror image"
    size = recipe.micro_batch_size or recipe.batch_size
    if size < 16 and recipe.model.startswith(BATCH_NORM_MODELS):
        text = f"batch norm gets {size} images at a time; the error rises below 16"
        yield text, "arXiv 1803.08494, figure 1"
    if (recipe.freeze or recipe.head_only_epochs) and from_scratch:
        text = "freeze and head_only_epochs leave random weights untrained; use weights, pretrained"
        yield text, "United Perception freezes pre-trained layers"


def _distillation_warnings(recipe: Recipe) -> Warnings:
    if not recipe.teacher:
        return
    losses = one_each(recipe.kd_loss, len(recipe.distill_pairs))
    pairs = zip(recipe.distill_pairs, losses, strict=True)
    plain = [loss for pair, loss in pairs if on_logits(pair) and loss in ("kl", "ce", "up_kl")]
    if plain and (recipe.randaug_n > 0 or recipe.autoaugment or recipe.cutmix_alpha > 0):
        yield (
            f"kd_loss {plain[0]} with strong augmentation: it took ResNet-18 from 73.4 without a "
            "teacher to 72.6, and dist to 74.5",
            "arXiv 2205.10536, table 3, and its code's README",
        )
    size = min(recipe.micro_batch_size or recipe.batch_size, recipe.batch_size)
    if "dist" in recipe.kd_loss and size < 16:
        text = f"dist correlates classes over the {size} images of a forward; use 16 or more, or kl"
        yield text, "the formula: arXiv 2205.10536, eq. 10"


def _measured_warnings(recipe: Recipe) -> Warnings:
    if text := nothing_left(recipe):
        yield text, "200 samples of this recipe's augmentation of an image of noise"
    from workbench import training

    if text := training.other_normalization(recipe):
        yield text, "its run's recipe; timm's pretrained_cfg"


def nothing_left(recipe: Recipe, draws: int = 200) -> str:
    """A warning if augmentation destroys 1 % of the images or more, otherwise empty."""
    share = lost_share(recipe, draws)
    up = recipe.randaug_n and recipe.randaug_variant == "up"
    timm = ", or use randaug_variant: timm" if up else ""
    text = f"one colour covers 3/4 or more of {share:.0%} of the training images after augmentation"
    return f"{text}; make it milder{timm}" if share >= 0.01 else ""


def lost_share(recipe: Recipe, draws: int = 200) -> float:
    """The share of noise images of which one colour covers 3/4 after augmentation."""
    jitter = recipe.randaug_n or recipe.autoaugment or recipe.brightness or recipe.contrast
    if not jitter and recipe.crop_scale[0] * recipe.image_size**2 > 4:  # pixels
        return 0.0
    import numpy as np

    from workbench import training

    size = recipe.image_size
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    transform = replace(training.train_transform(recipe), on_device=False)
    pixels = (transform(noise, np.random.default_rng(i)).reshape(-1, 3) for i in range(draws))
    counts = [np.bincount((p >> 3) @ np.array([1024, 32, 1])).max() for p in pixels]
    return float(np.mean(np.array(counts) > 0.75 * size**2))


def worth_measuring(recipe: Recipe) -> bool:
    """Whether `measured` may find something in a recipe without its data."""
    # UP's RandAugment moves an image by up to 10 randaug_m pixels, maybe its whole side.
    far = recipe.randaug_variant == "up" and 10 * recipe.randaug_m >= recipe.image_size
    return not _from_scratch(recipe) or (recipe.randaug_n > 0 and far)
