"""Figures and tables of images: augmentation, model inputs, changed predictions, Grad-CAM."""

from collections.abc import Mapping, Sequence
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
from workbench.ui import image_grids
from workbench.ui.figure import Figure

AUGMENTATION = """
crop_scale crop_ratio hflip brightness contrast saturation hue autoaugment
randaug_n randaug_m randaug_std randaug_increasing randaug_variant
mixup_alpha cutmix_alpha switch_prob mix_per_sample mix_prob erase_prob erase_mode erase_count
""".split()  # options that these figures show


def augmentation_grid(
    recipe: Recipe, image: Image.Image, row: int = 0, first_epoch: int = 0, *, heading: str = ""
) -> Figure:
    """An image as in validation, then as training sees it in 19 epochs.

    The same samples as in training, which depend on seed, epoch and `row` of the training list.
    Titles are the sampled parameters except those of the crop.
    """
    transform = training.train_transform(recipe)
    views, titles = [training.eval_transform(recipe)(image)], ["validation"]
    image = transform.resize.image(image)
    for epoch in range(first_epoch, first_epoch + 19):
        rng = data.rng_for(recipe.seed, data.DRAW, epoch, row)
        params = transform.sample_params(rng, image.width, image.height)
        views.append(transform.apply(image, params))
        text = augmentation.describe(params).replace(", ", "\n")
        titles.append(f"epoch {epoch + 1}\n{text}".strip())
    return image_grids.grid(views, titles, columns=10, heading=heading)


def sweep(recipe: Recipe, image: Image.Image, heading: str = "") -> Figure | pd.DataFrame:
    """Crop, flip and jitter from weakest to strongest, one at a time; a table if all are off."""
    transform = training.train_transform(recipe)
    rows = _sweep_rows(transform, image, randaug=False)
    if not rows:
        return pd.DataFrame({heading or "operations": ["crop, flip and jitter are off"]})
    return image_grids.image_rows(rows, heading)


def magnitudes(recipe: Recipe, image: Image.Image) -> Figure:
    """The operations of the recipe's RandAugment variant at magnitudes 0, 2.5, 5, 7.5 and 10.

    Those with two directions in the positive one.
    """
    transform = training.train_transform(recipe.replace(randaug_n=recipe.randaug_n or 2))
    rows = _sweep_rows(transform, image, randaug=True)
    heading = f"magnitude 0 to 10, variant {transform.randaug.variant}, positive direction"
    return image_grids.image_rows(rows, heading, columns=2)


def _sweep_rows(
    transform: augmentation.TrainTransform, image: Image.Image, randaug: bool
) -> dict[str, tuple[list[Image.Image], list[str]]]:
    """Images and titles by operation, those of RandAugment or the others."""
    values = lambda setting: " ".join(f"{k} {v:.2g}" for k, v in setting.items() if k != "randaug")
    rows = {}
    for name, settings in transform.sweep().items():
        if name.startswith("randaug") == randaug:
            titles = [augmentation.describe(setting) or values(setting) for setting in settings]
            views = [transform.at(image, setting) for setting in settings]
            rows[name.removeprefix("randaug\n")] = views, titles
    return rows


def magnitude_table(recipe: Recipe) -> pd.DataFrame:
    """The value of every RandAugment operation at the recipe's magnitude, in both variants."""
    m, std = recipe.randaug_m, recipe.randaug_std
    variants = {
        "up": augmentation.RandAugmentIncreasing(m=m),
        "timm": augmentation.RandAugmentIncreasing.timm(2, m, std, tuple(recipe.mean)),
    }
    tables = {name: pd.DataFrame(variant.table()) for name, variant in variants.items()}
    table = pd.concat(tables, axis="columns").rename(columns={"value": f"at magnitude {m:g}"})
    return table.astype(object).where(table.notna(), "")


def model_inputs(recipe: Recipe, content: data.Dataset) -> Figure:
    """The first images of step 0 after augmentation, erasing and mixing, with their labels.

    Normalisation is undone. The heading has mean and standard deviation of the tensors: near 0 and
    1 if the recipe's `mean` and `std` fit.
    """
    tensors, targets = training.preview_batch(recipe, content)
    views = training.Normalize(recipe, tensors.device).undo(tensors)
    heading = f"{tuple(tensors.shape)}, mean {tensors.mean():.2f}, std {tensors.std():.2f}"
    titles = [image_grids.label_text(target, content.classes) for target in targets]
    return image_grids.grid(views, titles, columns=12, heading=heading)


def distances(
    recipe: Recipe, content: data.Dataset, count: int = 12, per_image: int = 25
) -> pd.DataFrame:
    """How much augmentation changes images: file, epoch, area, change, reference_distance.

    Of the first `count` training images in `per_image` epochs. `area` is the share of the image
    inside the crop, 0 to 1; `change` the root mean square difference to the whole image at the
    same size, 0 to 255; `reference_distance` that of the whole image to the next one.
    """
    transform = training.train_transform(recipe)
    table = content.train.head(count)
    opened = [transform.resize.image(images.open(path)) for path in table.path]
    whole = [transform.at(image, {}) for image in opened]
    rows = []
    for row, (file, image) in enumerate(zip(table.file, opened, strict=True)):
        reference = _rms(whole[row], whole[(row + 1) % len(whole)])
        for epoch in range(per_image):
            rng = data.rng_for(recipe.seed, data.DRAW, epoch, row)
            params = transform.sample_params(rng, image.width, image.height)
            area = params["width"] * params["height"] / (image.width * image.height)
            change = _rms(transform.apply(image, params), whole[row])
            rows.append((file, epoch, area, change, reference))
    return pd.DataFrame(rows, columns=["file", "epoch", "area", "change", "reference_distance"])


def _rms(a: Image.Image, b: Image.Image) -> float:
    difference = np.asarray(a, np.float32) - np.asarray(b, np.float32)
    return float(np.sqrt(np.mean(difference**2)))


def flips(
    result: comparison.Comparison, name: str, side: str = "gained", of: str = ""
) -> Figure | pd.DataFrame:
    """The images that the recipe `name` gained or lost against the first, most runs first.

    `of` is part of a class name. Titles are the majority predictions before and after, with the
    share of correct runs where they disagree, and the label. A table if the images are missing.
    """
    table = result.flips(name)
    classes = [k for k, class_name in enumerate(result.classes) if of.lower() in class_name.lower()]
    table = table[((table.change > 0) == (side == "gained")) & table.label.isin(classes)]
    heading = f"{side}: {len(table):,} of {len(result.images):,} images"
    return _changed_images(table, result.groups[0].recipe, result.classes, heading)


def other_predictions(
    flips: pd.DataFrame, name: str, recipe: Recipe, classes: Sequence[str]
) -> Figure | pd.DataFrame:
    """The images for which one format of an exported network predicts another class than torch.

    `flips` is flips.csv of a package. A table if there are none, or the images are missing.
    """
    table = flips[flips.format == name]
    heading = f"{name}: {len(table):,} other predictions"
    return _changed_images(table, recipe.model_dump(), classes, heading)


def _changed_images(
    table: pd.DataFrame, recipe: Mapping[str, Any], classes: Sequence[str], heading: str
) -> Figure | pd.DataFrame:
    """The first rows of file, list, before, after and label as images of the validation list."""
    rows = table.head(24)
    try:
        recipe = Recipe(**recipe)
        val = data.load_dataset(recipe).val[["list", "file", "path"]]
        found = rows.merge(val, on=["list", "file"])
        transform = training.eval_transform(recipe)
        views = [transform(images.decode(path)) for path in found.path]
    except (ValueError, OSError, RuntimeError):  # moved, or a recipe of an older version
        return rows
    titles = []
    for row in found.to_dict("records"):
        before, after = (_prediction_text(row, side, classes) for side in ("before", "after"))
        titles.append(f"{before}\nto {after}\nis {classes[row['label']]}")
    return image_grids.grid(views, titles, columns=12, heading=heading) if views else rows


def _prediction_text(row: Mapping[str, Any], side: str, classes: Sequence[str]) -> str:
    share = row.get(f"correct_{side}", 0.0)
    return classes[row[side]] + (f" ({share:.0%} correct)" if 0 < share < 1 else "")


def grad_cam_grid(
    recipe: Recipe,
    paths: Sequence[str],
    classes: Sequence[str],
    targets: Mapping[str, tuple[nn.Module, Sequence[int]]],
    heading: str = "",
) -> Figure:
    """A row per image: the image, and for each of `targets` the Grad-CAM of its class.

    `targets` has by name a model and a class number per image; titles are the class and its
    probability. Orange is evidence for the class. A model without a map has a sentence in the
    heading instead.
    """
    transform = training.eval_transform(recipe)
    views = [transform(images.decode(path)) for path in paths]
    rows = [([view], [""]) for view in views]
    notes = [heading] if heading else []
    for name, (model, numbers) in targets.items() if rows else ():
        device = next(model.parameters()).device
        batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).to(device)
        batch, numbers = training.Normalize(recipe, device)(batch), np.array(numbers)
        try:
            maps = grad_cam.grad_cam(model, batch, numbers)
        except grad_cam.ExplainError as error:
            notes.append(f"{name}: {error}")
            continue
        with models.eval_mode(model), torch.no_grad():
            p = model(batch).float().softmax(1).cpu().numpy()
        for (cells, titles), cam, k, shares in zip(rows, maps, numbers, p, strict=True):
            cells.append(image_grids.tinted(cells[0], cam))
            titles.append(f"{name} {classes[k]}: {shares[k]:.2f}")
    if not rows or len(rows[0][0]) == 1:
        return image_grids.grid([], heading="; ".join(notes))
    numbered = {str(i): row for i, row in enumerate(rows, 1)}
    return image_grids.image_rows(numbered, "; ".join(notes), columns=min(3, len(rows)))
