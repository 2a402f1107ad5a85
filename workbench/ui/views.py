"""Looks at images: each returns a figure or a table, for notebooks, widgets and tests."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from workbench import augmentation, data, models, training
from workbench.data import images
from workbench.evaluation import comparison, grad_cam
from workbench.recipe import Recipe
from workbench.ui import plots

AUGMENTATION = """
crop_scale crop_ratio hflip brightness contrast saturation hue autoaugment
randaug_n randaug_m randaug_std randaug_increasing randaug_variant
mixup_alpha cutmix_alpha switch_prob mix_per_sample mix_prob erase_prob erase_mode erase_count
""".split()  # the options of what these figures show


def augmentation_grid(
    recipe: Recipe,
    image: Image.Image,
    row: int = 0,
    first_epoch: int = 0,
    *,
    count: int = 20,
    heading: str = "",
) -> plots.Figure:
    """The image of a row of the training list as validation sees it, then as training does.

    In each of `count - 1` epochs from `first_epoch`, with what was drawn beside the crop. A draw
    depends on (seed, epoch, row) alone: these are the ones the training makes.
    """
    transform = training.train_transform(recipe)
    images, titles = [training.eval_transform(recipe)(image)], ["validation"]
    image = transform.resize.image(image)
    for epoch in range(first_epoch, first_epoch + count - 1):
        draw = transform.sample_params(_rng(recipe, epoch, row), image.width, image.height)
        images.append(transform.apply(image, draw))
        words = augmentation.describe(draw).replace(", ", "\n")
        titles.append(f"epoch {epoch + 1}\n{words}".strip())
    return plots.grid(images, titles, columns=10, heading=heading)


def _rng(recipe: Recipe, epoch: int, row: int) -> np.random.Generator:
    return data.rng_for(recipe.seed, data.DRAW, epoch, row)


def sweep(recipe: Recipe, image: Image.Image, heading: str = "") -> plots.Figure | pd.DataFrame:
    """Crop, flip and jitter, each alone, mildest to strongest; a table that says so if all are off.

    RandAugment's operations are `magnitudes`, AutoAugment's have no strength.
    """
    transform = training.train_transform(recipe)
    rows = {
        name: _strip(transform, image, settings)
        for name, settings in transform.sweep().items()
        if not name.startswith("randaug")
    }
    if not rows:
        return pd.DataFrame({heading or "operations": ["crop, flip and jitter are off"]})
    return plots.image_rows(rows, heading)


def magnitudes(recipe: Recipe, image: Image.Image) -> plots.Figure:
    """RandAugment's 15 operations at magnitudes 0, 2.5, 5, 7.5 and 10, in the recipe's form.

    Those with two directions on their positive side. With randaug_n at 0, as if it were 2.
    """
    transform = training.train_transform(recipe.replace(randaug_n=recipe.randaug_n or 2))
    transform = replace(transform, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    rows = {
        name.removeprefix("randaug\n"): _strip(transform, image, settings)
        for name, settings in transform.sweep().items()
        if name.startswith("randaug")
    }
    form = transform.randaug.variant
    return plots.image_rows(rows, f"magnitude 0 to 10, {form}'s form, positive side", columns=2)


def _strip(
    transform: augmentation.TrainTransform, image: Image.Image, settings: Sequence[Mapping]
) -> tuple[list[Image.Image], list[str]]:
    titles = [
        augmentation.describe(setting)
        or " ".join(f"{k} {v:.2g}" for k, v in setting.items() if k != "randaug")
        for setting in settings
    ]
    return [transform.at(image, setting) for setting in settings], titles


def magnitude_table(recipe: Recipe) -> pd.DataFrame:
    """What randaug_m stands for: the value of every operation, in both forms, with its unit."""
    m, std = recipe.randaug_m, recipe.randaug_std
    forms = {
        "up": augmentation.RandAugmentIncreasing(m=m),
        "timm": augmentation.RandAugmentIncreasing.timm(2, m, std, tuple(recipe.mean)),
    }
    value = {"value": f"at magnitude {m:g}"}
    tables = {
        name: pd.DataFrame(form.table()).rename(columns=value) for name, form in forms.items()
    }
    table = pd.concat(tables, axis="columns").astype(object)
    return table.where(table.notna(), "")


def eaten(recipe: Recipe, content: data.Dataset, count: int = 24) -> plots.Figure:
    """The first images of step 0 as tensors, the normalisation undone, above them their labels.

    After erasing and mixing, with the shares of a mixed label. Mean and standard deviation of the
    tensors in the heading say whether `mean` and `std` fit: near 0 and near 1.
    """
    tensors, targets = training.preview_batch(recipe, content, count)
    images = training.Normalize(recipe, tensors.device).undo(tensors)
    heading = f"{tuple(tensors.shape)}, mean {tensors.mean():.2f}, std {tensors.std():.2f}"
    texts = [plots.label_text(target, content.classes) for target in targets]
    return plots.grid(images, texts, columns=12, heading=heading)


def distances(
    recipe: Recipe, content: data.Dataset, count: int = 12, per_image: int = 25
) -> pd.DataFrame:
    """How far augmentation changes images: file, epoch, area, change and reference_distance.

    For the first `count` of the training list in `per_image` epochs. `area` is the share of
    the image inside the crop, 0 to 1. `change` is the root mean square of the difference to the
    whole image at the same size, 0 to 255; `reference_distance` is that of the whole
    image to the next one: a draw beyond it is farther from its image than another image is.
    """
    transform, whole = training.train_transform(recipe), []
    table = content.train.head(count)
    opened = [transform.resize.image(images.open(path)) for path in table.path]
    for image in opened:
        whole.append(_levels(transform.at(image, {})))
    rows = []
    for row, (file, image) in enumerate(zip(table.file, opened, strict=True)):
        reference_distance = _rms(whole[row], whole[(row + 1) % len(whole)])
        for epoch in range(per_image):
            draw = transform.sample_params(_rng(recipe, epoch, row), image.width, image.height)
            area = draw["width"] * draw["height"] / (image.width * image.height)
            change = _rms(_levels(transform.apply(image, draw)), whole[row])
            rows.append((file, epoch, area, change, reference_distance))
    return pd.DataFrame(rows, columns=["file", "epoch", "area", "change", "reference_distance"])


def _levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def flips(
    found: comparison.Comparison, name: str, side: str = "gained", of: str = ""
) -> plots.Figure | pd.DataFrame:
    """The images that changed sides from the first recipe to `name`, most runs first.

    `side` is gained or lost, `of` part of a class's name. Above each are the predictions before and
    after, with the share of the runs that are right where they disagree, and its label; a table,
    where the images themselves are not at hand.
    """
    first = found.groups[0]
    table = found.flips(name, first.name)
    table = table[(table.change > 0) == (side == "gained")]
    named = [k for k, name in enumerate(found.classes) if of.lower() in name.lower()]
    table = table[table.label.isin(named)]
    heading = f"{side}: {len(table):,} of {len(found.images):,} images"
    return _changed(table, first.recipe, found.classes, heading)


def other_answers(
    flips: pd.DataFrame, form: str, recipe: Recipe, classes: Sequence[str]
) -> plots.Figure | pd.DataFrame:
    """The images that one form of an exported network answers otherwise than torch.

    `flips` is flips.csv of a package. A table, where there are none or no images at hand.
    """
    table = flips[flips.form == form]
    heading = f"{form}: {len(table):,} other answers"
    return _changed(table, recipe.model_dump(), classes, heading)


def _changed(
    table: pd.DataFrame, recipe: Mapping, classes: Sequence[str], heading: str
) -> plots.Figure | pd.DataFrame:
    """The first rows of file, list, before, after and label as images of a validation list."""
    shown = table.head(24)
    try:
        recipe = Recipe(**recipe)
        places = data.load_dataset(recipe).val[["list", "file", "path"]]
        shown = shown.merge(places, on=["list", "file"])
        see = training.eval_transform(recipe)
        shown_images = [see(images.decode(path)) for path in shown.path]
    except (ValueError, OSError, RuntimeError):  # moved, or a recipe of an older version
        shown_images = []
    if not shown_images:
        return table.head(24)
    texts = [
        f"{_told(row, 'before', classes)}\nto {_told(row, 'after', classes)}\n"
        f"is {classes[row.label]}"
        for row in shown.itertuples()
    ]
    return plots.grid(shown_images, texts, columns=12, heading=heading)


def _told(row: Any, side: str, classes: Sequence[str]) -> str:
    """The class most runs predict, and how many are right where not all agree."""
    share = getattr(row, f"right_{side}", 0.0)
    return classes[getattr(row, side)] + (f" ({share:.0%} right)" if 0 < share < 1 else "")


def grad_cam_grid(
    recipe: Recipe,
    paths: Sequence[str],
    classes: Sequence[str],
    asked: Mapping[str, tuple[nn.Module, Sequence[int]]],
    heading: str = "",
) -> plots.Figure:
    """A strip for each image: itself, and where each of `asked` finds evidence for its class.

    `asked` is by name a model of the recipe's normalised images and a class number an image;
    above its Grad-CAM (grad_cam.grad_cam) stand the class and the probability it has there. Orange
    speaks for the class, blue does not. A model without a map has no column, and a sentence in the
    heading; without any map the heading is all there is.
    """
    see = training.eval_transform(recipe)
    shown_images = [see(images.decode(path)) for path in paths]
    rows = [([image], [""]) for image in shown_images]
    notes = [heading] if heading else []
    stack = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in shown_images]
    for name, (model, targets) in asked.items() if stack else ():
        device, targets = next(model.parameters()).device, np.array(targets, np.int64)
        batch = training.Normalize(recipe, device)(torch.stack(stack).to(device))
        try:
            maps = grad_cam.grad_cam(model, batch, targets)
        except grad_cam.ExplainError as error:
            notes.append(f"{name}: {error}")
            continue
        with models.eval_mode(model), torch.no_grad():
            p = model(batch).float().softmax(1).cpu().numpy()
        for row, cam, k, share in zip(rows, maps, targets, p, strict=True):
            row[0].append(plots.tinted(row[0][0], cam))
            row[1].append(f"{name} {classes[k]}: {share[k]:.2f}")
    if not rows or len(rows[0][0]) == 1:
        return plots.grid([], heading="; ".join(notes))
    numbered = {str(i): row for i, row in enumerate(rows, 1)}
    return plots.image_rows(numbered, "; ".join(notes), columns=min(3, len(rows)))
