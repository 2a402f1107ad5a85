"""Facts and warnings about a recipe, computed before training."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from workbench import schedule
from workbench.recipe import Recipe
from workbench.recipe_checks import mixes, on_logits, one_each

# torch and pandas are imported inside functions: a recipe is examined without them.


class Finding(NamedTuple):
    """A sentence about a recipe; `source` is the evidence of a warning, empty for a fact."""

    kind: str  # "fact" or "warning"
    text: str
    source: str = ""

    def __str__(self) -> str:
        return f"warning: {self.text} [{self.source}]" if self.source else self.text


@dataclass(frozen=True)
class Plan:
    """A recipe with the size of its data."""

    recipe: Recipe
    images: int
    classes: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def from_scratch(self) -> bool:
        return not (self.recipe.weights or self.recipe.pretrained or self.recipe.resume_from)

    @property
    def half_life(self) -> float:
        """Of the EMA, in steps."""
        return math.log(0.5) / math.log(self.recipe.ema_decay)


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
    _check_name(recipe.model)
    if classes < 2:
        from workbench import data

        raise data.DataError(f"there is {classes} class, and a classifier needs two or more")
    steps_per_epoch = schedule.steps_per_epoch(images, recipe.batch_size, recipe.drop_last)
    if steps_per_epoch == 0:
        raise schedule.TrainingError(
            f"batch_size {recipe.batch_size} is above {images} images and drop_last leaves none"
        )
    plan = Plan(recipe, images, classes, steps_per_epoch)
    warnings = [
        *_optimizer_warnings(plan),
        *_schedule_warnings(plan),
        *_loss_and_data_warnings(plan),
        *_distillation_warnings(plan),
    ]
    if measured:
        warnings += _measured_warnings(recipe)
    if counts is not None and 0 in counts:
        empty = f"{list(counts).count(0):,} of {classes:,} classes have no training image"
        warnings.append((f"{empty}; see workbench check-data", "the data"))
    if downscaled == 0:
        text = f"train_resize {recipe.train_resize} shrinks none of {images:,} training images"
        warnings.append((f"{text}; leave it out", "image sizes"))
    facts = [Finding("fact", text) for text in _facts(plan, counts)]
    return [*facts, *(Finding("warning", *warning) for warning in warnings)]


def _check_name(name: str) -> None:
    """Raises ModelError for a model timm does not have; imports timm only for unknown names."""
    folder = Path(importlib.util.find_spec("timm").origin).parent / "models"
    function = re.compile(rf"^@register_model\ndef {re.escape(name.split('.')[0])}\(", re.M)
    if not any(function.search(path.read_text(encoding="utf-8")) for path in folder.glob("*.py")):
        from workbench import models

        models.check_name(name)


def gradient_scale(recipe: Recipe, classes: int) -> float:
    """Norm of the gradient of the loss at the logits of an untrained model, for one image.

    Logits are near 0, so the gradient is softmax(0) or sigmoid(0) less the target; for plain
    cross-entropy the norm is sqrt(1 - 1 / classes).
    """
    smooth, predicted, factor = recipe.label_smoothing / classes, 1 / classes, 1.0
    targets = [1 - recipe.label_smoothing + smooth, smooth]
    if recipe.loss == "bce":
        predicted = 1 / (1 + classes) if recipe.bce_shift else 0.5
        factor = 1.0 if recipe.bce_sum else 1 / classes
        if recipe.bce_threshold is not None:
            targets = [float(target > recipe.bce_threshold) for target in targets]
    return factor * math.hypot(
        predicted - targets[0], math.sqrt(classes - 1) * (predicted - targets[1])
    )


# ---- facts


def _facts(plan: Plan, counts: Sequence[int] | None) -> Iterator[str]:
    recipe, per_epoch = plan.recipe, plan.steps_per_epoch
    text = f"{per_epoch:,} steps an epoch of {plan.images:,} images, {plan.steps:,} steps in all"
    if (rest := plan.images % recipe.batch_size) and not recipe.drop_last:
        text += f"; the last step of an epoch has {rest:,} images instead of {recipe.batch_size:,}"
    if recipe.repeated_aug > 1:
        text += f"; an epoch uses 1 / {recipe.repeated_aug} of the images, {recipe.repeated_aug} "
        text += f"times each, so each image is in {recipe.epochs / recipe.repeated_aug:.0f} epochs"
    yield f"{text}."

    text = f"{plan.images / plan.classes:,.0f} images a class on average"
    if counts is not None and len(counts):
        text += f", {min(counts):,} in the smallest and {max(counts):,} in the largest"
    yield f"{text}; guessing gives {100 / plan.classes:.3g} % top-1."

    yield _learning_rate(plan)
    scale, plain = gradient_scale(recipe, plan.classes), math.sqrt(1 - 1 / plan.classes)
    text = f"The gradient of the loss at an untrained model's logits has norm {scale:.3g} per image"
    if abs(scale / plain - 1) > 0.02:
        text += f", {scale / plain:.2g} times that of cross-entropy"
    cancels = "" if recipe.optimizer == "sgd" else f"; {recipe.optimizer} cancels constant factors"
    yield f"{text}{cancels}."

    if recipe.ema_decay is not None:
        initial = recipe.ema_decay**plan.steps
        yield (
            f"EMA: half of it is younger than {plan.half_life:,.0f} steps "
            f"({_number(plan.half_life / per_epoch)} epochs of {recipe.epochs}); the initial "
            f"weights have a share of {initial:.2g} at the end."
        )
    if recipe.weight_decay and recipe.optimizer != "lamb":
        epochs = math.log(2) / (recipe.lr * recipe.weight_decay) / per_epoch
        if recipe.optimizer == "sgd" and recipe.momentum:
            epochs *= 1 - recipe.momentum  # a constant gradient moves 1 / (1 - momentum) as far
        spared = "" if recipe.decay_norm_and_bias else "; norms and biases have none"
        yield f"Weight decay alone halves a weight in {_number(epochs)} epochs at peak lr{spared}."
    if mixes(recipe):
        yield _mixing(recipe)


def _learning_rate(plan: Plan) -> str:
    recipe, steps = plan.recipe, plan.steps
    lr_at = schedule.lr_schedule(recipe, plan.steps_per_epoch)
    text = f"lr starts at its peak of {recipe.lr:g}"
    if warmup := schedule.warmup_steps(recipe, plan.steps_per_epoch):
        text = (
            f"lr rises from {lr_at(0):.3g} to its peak of {recipe.lr:g} over {warmup:,} steps "
            f"({warmup / plan.steps_per_epoch:.3g} of {recipe.epochs} epochs)"
        )
    middle, last = lr_at(steps // 2), lr_at(steps - 1)
    return f"{text}, is {middle:.3g} half way and {last:.3g} in the last step."


def _mixing(recipe: Recipe) -> str:
    cutmix = recipe.switch_prob if recipe.mixup_alpha else 1.0
    cutmix = cutmix if recipe.cutmix_alpha else 0.0
    kinds = [
        f"{share * recipe.mix_prob:.0%} {name} (alpha {alpha:g})"
        for name, alpha, share in (
            ("Mixup", recipe.mixup_alpha, 1 - cutmix),
            ("CutMix", recipe.cutmix_alpha, cutmix),
        )
        if share
    ]
    unit = "images" if recipe.mix_per_sample else "steps"
    return f"Of all {unit} {' and '.join(kinds)}; training top-1 counts the larger label."


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---- warnings: (text, source)


def _optimizer_warnings(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, size = plan.recipe, plan.recipe.batch_size
    if recipe.optimizer == "lamb":
        # Below 2,048 the rule is no upper bound: the unscaled 0.008 was best on CIFAR-10 at 128.
        root = math.sqrt(size / 2048)
        low, high = 0.005 * root, 0.008 * max(1.0, root)
        if plan.from_scratch and not low / 1.6 <= recipe.lr <= high * 1.6:
            yield (
                f"LAMB with lr {recipe.lr:g} at batch_size {size:,}: 0.005 to 0.008 is known to "
                f"work at 2,048; try {low:.2g} to {high:.2g} here",
                "arXiv 2110.00476, table 2; arXiv 1904.00962; README, results",
            )
        if recipe.clip_grad_norm is None:
            yield (
                "LAMB without clip_grad_norm: published recipes clip at 1.0 inside LAMB",
                "timm's and United Perception's LAMB: max_grad_norm 1.0 by default",
            )
        return
    if recipe.optimizer != "sgd":
        return
    linear = 0.1 * size / 256
    if recipe.momentum >= 0.8 and size >= 64:
        if plan.from_scratch and not linear / 4 <= recipe.lr <= linear * 4:
            yield (
                f"SGD with lr {recipe.lr:g} at batch_size {size:,}: the linear rule gives "
                f"{linear:.2g}; lr is not rescaled when batch_size changes",
                "arXiv 1706.02677, section 2.1: 0.1 for 256 images",
            )
        if not plan.from_scratch and not recipe.resume_from and recipe.lr > linear:
            yield (
                f"lr {recipe.lr:g} with pre-trained weights is as high as for training from "
                f"scratch at batch_size {size:,}; use a tenth or a hundredth of the lr of "
                "pre-training",
                "United Perception's page on downstream tasks: 0.1 or 0.01 of it",
            )
    scale = gradient_scale(recipe, plan.classes)
    if scale < 0.3:
        yield (
            f"the gradient of the loss has norm {scale:.2g}, because it is the mean over "
            f"{plan.classes:,} classes, and sgd is sensitive to it: use bce_sum, a larger lr, or "
            "lamb",
            "the formula; timm's bce_sum and UP's bias exist for it",
        )


def _schedule_warnings(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, steps = plan.recipe, plan.steps
    warmup = schedule.warmup_steps(recipe, plan.steps_per_epoch)
    large = plan.from_scratch and recipe.batch_size >= 1024
    if warmup == 0 and recipe.schedule != "one_cycle" and large:
        yield (
            f"no warm-up at batch_size {recipe.batch_size:,}: large batches diverge or lose "
            "accuracy in the first epochs without one; 5 epochs are usual",
            "arXiv 1706.02677, section 2.2",
        )
    if warmup > 0.2 * steps:
        yield (
            f"the warm-up takes {warmup:,} of {steps:,} steps; published recipes take 1 to 7 %. "
            "United Perception's resnet50D file has 62,560 steps instead of about 6,256",
            "United Perception's lr_helper.py",
        )
    if recipe.ema_decay is not None and plan.half_life > 0.1 * steps:
        decay = 1 - math.log(2) / (0.05 * steps)
        advice = f"{decay:.4g} would make it 5 %" if decay > 0 else "leave it out"
        yield (
            f"EMA with decay {recipe.ema_decay:g} has a half-life of {plan.half_life:,.0f} steps "
            f"of {steps:,}, so it lags far behind; {advice}",
            "half-life ln 0.5 / ln decay; timm issue 281",
        )
    last = schedule.lr_schedule(recipe, plan.steps_per_epoch)(steps - 1)
    if recipe.cosine_epochs is not None and last > recipe.lr_min + 0.005 * recipe.lr:
        yield (
            f"cosine_epochs {recipe.cosine_epochs:g} after the warm-up end after the last epoch: "
            f"lr ends at {last:.3g}, {last / recipe.lr:.1%} of its peak",
            "United Perception's lr_helper.py",
        )


SMALL_MODELS = ("resnet10", "resnet14", "resnet18", "test_", "mobilenet", "regnetx_002")
BATCH_NORM_MODELS = ("resnet", "regnet", "mobilenet", "efficientnet")


def _loss_and_data_warnings(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, smoothing, threshold = (
        plan.recipe,
        plan.recipe.label_smoothing,
        plan.recipe.bce_threshold,
    )
    mixed = mixes(recipe) and plan.from_scratch
    small = recipe.epochs <= 100 and recipe.model.startswith(SMALL_MODELS)
    if mixed and small and recipe.loss == "bce":
        yield (
            f"strikes in {recipe.epochs} epochs on a small network: RSB's 100 epochs (A3) gave "
            "ResNet-18 68.25 on ImageNet, 300 (A2) 70.63, 600 (A1) 71.50, plain training 69.75, "
            "and United Perception's lighter form, without RandAugment, 72.78 in 300",
            "timm's results-imagenet.csv, resnet18.{a1,a2,a3,tv}_in1k at 224 pixels; UP's "
            "benchmark",
        )
    if mixed and recipe.epochs < 100:
        yield (
            f"mixing in {recipe.epochs} epochs: mixed images need longer training; Bag of Tricks "
            "trains 200 epochs instead of 120",
            "arXiv 1812.01187, section 5",
        )
    if threshold is not None and smoothing > 0 and smoothing / plan.classes < threshold:
        least = (threshold - smoothing / plan.classes) / (1 - smoothing)
        yield (
            f"label_smoothing {smoothing:g} before bce_threshold {threshold:g}: every target is 0 "
            f"or 1, so smoothing only changes the least share of a mixed label that counts, to "
            f"{least:.3f}",
            "the formula; timm thresholds after smoothing",
        )
    if recipe.hflip > 0 and recipe.dataset in ("digits", "letters"):
        yield (
            f"hflip {recipe.hflip:g} mirrors {recipe.dataset}, which changes or destroys their "
            "class",
            "b and d, 2 and its mirror image",
        )
    size = recipe.micro_batch_size or recipe.batch_size
    if size < 16 and recipe.model.startswith(BATCH_NORM_MODELS):
        yield (
            f"batch norm gets {size} images at a time; the error rises below 16",
            "arXiv 1803.08494, figure 1",
        )
    if (recipe.freeze or recipe.head_only_epochs) and plan.from_scratch:
        yield (
            "freeze and head_only_epochs leave weights untrained, and these are random; set "
            "weights or pretrained",
            "United Perception freezes pre-trained layers",
        )


def _distillation_warnings(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe = plan.recipe
    if not recipe.teacher:
        return
    losses = one_each(recipe.kd_loss, len(recipe.distill_pairs))
    pairs = zip(recipe.distill_pairs, losses, strict=True)
    plain = [loss for pair, loss in pairs if on_logits(pair) and loss in ("kl", "ce", "up_kl")]
    strong = recipe.randaug_n > 0 or recipe.autoaugment or recipe.cutmix_alpha > 0
    if plain and strong:
        yield (
            f"kd_loss {plain[0]} with strong augmentation: it took ResNet-18 from 73.4 without a "
            "teacher to 72.6, and dist to 74.5",
            "arXiv 2205.10536, table 3, and its code's README",
        )
    size = min(recipe.micro_batch_size or recipe.batch_size, recipe.batch_size)
    if "dist" in recipe.kd_loss and size < 16:
        yield (
            f"dist correlates every class over the {size} images of a forward, which is mostly "
            "noise; use 16 or more per forward and device, or kl",
            "the formula: arXiv 2205.10536, eq. 10",
        )


def _measured_warnings(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if text := nothing_left(recipe):
        yield text, "200 samples of this recipe's augmentation of an image of noise"
    from workbench import training

    if text := training.other_normalization(recipe):
        yield text, "its run's recipe; timm's pretrained_cfg"


# ---- what augmentation leaves of an image


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


def nothing_left(recipe: Recipe, draws: int = 200) -> str:
    """A warning if augmentation destroys 1 % of the images or more, otherwise empty."""
    share = lost_share(recipe, draws)
    if share < 0.01:
        return ""
    advice = ", or use randaug_variant: timm, which moves by at most 45 % of the side (up by "
    advice += "randaug_m times 10 pixels at any image_size)"
    return (
        f"augmentation leaves little or nothing of {share:.0%} of the training images: one colour "
        f"covers 3/4 of their pixels or more; make it milder{advice * _moves_out(recipe)}"
    )


def _moves_out(recipe: Recipe) -> bool:
    """Whether UP's RandAugment may move an image by its whole side: 10 randaug_m pixels."""
    far = 10 * recipe.randaug_m >= recipe.image_size
    return bool(recipe.randaug_n and recipe.randaug_variant == "up" and far)


def worth_measuring(recipe: Recipe) -> bool:
    """Whether `measured` may find something in a recipe without its data."""
    return bool(recipe.weights or recipe.pretrained or recipe.resume_from) or _moves_out(recipe)
