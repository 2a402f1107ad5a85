"""Looks at pictures: each returns a figure or a table, for notebooks, widgets and tests."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import nn

from workbench import augmentation, comparison, data, explain, images, models, plots, training
from workbench.recipe import Recipe

AUGMENTATION = """
crop_scale crop_ratio flip brightness contrast saturation hue autoaugment
randaug_n randaug_m randaug_std randaug_increasing randaug_form
mixup_alpha cutmix_alpha switch_prob mix_per_sample mix_prob erase_prob erase_mode erase_count
""".split()  # the knobs of what these figures show


def draws(
    recipe: Recipe,
    picture: Image.Image,
    row: int = 0,
    first_epoch: int = 0,
    *,
    count: int = 20,
    heading: str = "",
) -> plots.Figure:
    """The picture of a row of the training list as validation sees it, then as training does.

    In each of `count - 1` epochs from `first_epoch`, with what was drawn beside the crop. A draw
    depends on (seed, epoch, row) alone: these are the ones the training makes.
    """
    transform = training.train_transform(recipe)
    pictures, titles = [training.test_transform(recipe)(picture)], ["validation"]
    picture = transform.shrink.picture(picture)
    for epoch in range(first_epoch, first_epoch + count - 1):
        draw = transform.draw(_rng(recipe, epoch, row), picture.width, picture.height)
        pictures.append(transform.apply(picture, draw))
        words = augmentation.describe(draw).replace(", ", "\n")
        titles.append(f"epoch {epoch + 1}\n{words}".strip())
    return plots.grid(pictures, titles, columns=10, heading=heading)


def _rng(recipe: Recipe, epoch: int, row: int) -> np.random.Generator:
    return data.stream(recipe.seed, data.DRAW, epoch, row)


def strengths(
    recipe: Recipe, picture: Image.Image, heading: str = ""
) -> plots.Figure | pd.DataFrame:
    """Crop, flip and jitter, each alone, mildest to strongest; a table that says so if all are off.

    RandAugment's operations are `magnitudes`, AutoAugment's have no strength.
    """
    transform = training.train_transform(recipe)
    rows = {
        name: _strip(transform, picture, settings)
        for name, settings in transform.strengths().items()
        if not name.startswith("randaug")
    }
    if not rows:
        return pd.DataFrame({heading or "operations": ["crop, flip and jitter are off"]})
    return plots.strips(rows, heading)


def magnitudes(recipe: Recipe, picture: Image.Image) -> plots.Figure:
    """RandAugment's 15 operations at magnitudes 0, 2.5, 5, 7.5 and 10, in the recipe's form.

    Those with two directions on their positive side. With randaug_n at 0, as if it were 2.
    """
    transform = training.train_transform(recipe.replace(randaug_n=recipe.randaug_n or 2))
    transform = replace(transform, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    rows = {
        name.removeprefix("randaug\n"): _strip(transform, picture, settings)
        for name, settings in transform.strengths().items()
        if name.startswith("randaug")
    }
    form = transform.randaug.form
    return plots.strips(rows, f"magnitude 0 to 10, {form}'s form, positive side", columns=2)


def _strip(
    transform: augmentation.TrainTransform, picture: Image.Image, settings: Sequence[Mapping]
) -> tuple[list[Image.Image], list[str]]:
    titles = [
        augmentation.describe(setting)
        or " ".join(f"{k} {v:.2g}" for k, v in setting.items() if k != "randaug")
        for setting in settings
    ]
    return [transform.at(picture, setting) for setting in settings], titles


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


def eaten(recipe: Recipe, content: data.Data, count: int = 24) -> plots.Figure:
    """The first pictures of step 0 as tensors, the normalisation undone, above them their labels.

    After erasing and mixing, with the shares of a mixed label. Mean and standard deviation of the
    tensors in the heading say whether `mean` and `std` fit: near 0 and near 1.
    """
    tensors, targets = training.first_pictures(recipe, content, count)
    pictures = training.Normalize(recipe, tensors.device).undo(tensors)
    heading = f"{tuple(tensors.shape)}, mean {tensors.mean():.2f}, std {tensors.std():.2f}"
    texts = [plots.label_text(target, content.classes) for target in targets]
    return plots.grid(pictures, texts, columns=12, heading=heading)


def distances(
    recipe: Recipe, content: data.Data, pictures: int = 12, per_picture: int = 25
) -> pd.DataFrame:
    """How far from the picture its draws go: file, epoch, area, change and yardstick of each draw.

    For the first `pictures` of the training list in `per_picture` epochs. `area` is the share of
    the picture inside the crop, 0 to 1. `change` is the root mean square of the difference to the
    whole picture at the same size, 0 to 255; `yardstick` is that of the whole
    picture to the next one: a draw beyond it is farther from its picture than another picture is.
    """
    transform, whole = training.train_transform(recipe), []
    table = content.train.head(pictures)
    opened = [transform.shrink.picture(images.open(path)) for path in table.path]
    for picture in opened:
        whole.append(_levels(transform.at(picture, {})))
    rows = []
    for row, (file, picture) in enumerate(zip(table.file, opened, strict=True)):
        yardstick = _rms(whole[row], whole[(row + 1) % len(whole)])
        for epoch in range(per_picture):
            draw = transform.draw(_rng(recipe, epoch, row), picture.width, picture.height)
            area = draw["width"] * draw["height"] / (picture.width * picture.height)
            change = _rms(_levels(transform.apply(picture, draw)), whole[row])
            rows.append((file, epoch, area, change, yardstick))
    return pd.DataFrame(rows, columns=["file", "epoch", "area", "change", "yardstick"])


def _levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float32)


def _rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def flips(
    found: comparison.Comparison, name: str, side: str = "gained", of: str = ""
) -> plots.Figure | pd.DataFrame:
    """The pictures that changed sides from the first recipe to `name`, most runs first.

    `side` is gained or lost, `of` part of a class's name. Above each are the predictions before and
    after, with the share of the runs that are right where they disagree, and its label; a table,
    where the pictures themselves are not at hand.
    """
    first = found.groups[0]
    table = found.flips(name, first.name)
    table = table[(table.change > 0) == (side == "gained")]
    named = [k for k, name in enumerate(found.classes) if of.lower() in name.lower()]
    table = table[table.label.isin(named)]
    heading = f"{side}: {len(table):,} of {len(found.pictures):,} pictures"
    return _changed(table, first.recipe, found.classes, heading)


def other_answers(
    flips: pd.DataFrame, form: str, recipe: Recipe, classes: Sequence[str]
) -> plots.Figure | pd.DataFrame:
    """The pictures that one form of an exported network answers otherwise than torch.

    `flips` is flips.csv of a package. A table, where there are none or no pictures at hand.
    """
    table = flips[flips.form == form]
    heading = f"{form}: {len(table):,} other answers"
    return _changed(table, recipe.model_dump(), classes, heading)


def _changed(
    table: pd.DataFrame, recipe: Mapping, classes: Sequence[str], heading: str
) -> plots.Figure | pd.DataFrame:
    """The first rows of file, list, before, after and label as pictures of a validation list."""
    shown = table.head(24)
    try:
        recipe = Recipe(**recipe)
        places = data.open_data(recipe).val[["list", "file", "path"]]
        shown = shown.merge(places, on=["list", "file"])
        see = training.test_transform(recipe)
        pictures = [see(images.decode(path)) for path in shown.path]
    except (ValueError, OSError, RuntimeError):  # moved, or a recipe of an older version
        pictures = []
    if not pictures:
        return table.head(24)
    texts = [
        f"{_told(row, 'before', classes)}\nto {_told(row, 'after', classes)}\n"
        f"is {classes[row.label]}"
        for row in shown.itertuples()
    ]
    return plots.grid(pictures, texts, columns=12, heading=heading)


def _told(row: Any, side: str, classes: Sequence[str]) -> str:
    """The class most runs predict, and how many are right where not all agree."""
    share = getattr(row, f"right_{side}", 0.0)
    return classes[getattr(row, side)] + (f" ({share:.0%} right)" if 0 < share < 1 else "")


def explained(
    recipe: Recipe,
    paths: Sequence[str],
    classes: Sequence[str],
    asked: Mapping[str, tuple[nn.Module, Sequence[int]]],
    heading: str = "",
) -> plots.Figure:
    """A strip for each picture: itself, and where each of `asked` finds evidence for its class.

    `asked` is by name a model of the recipe's normalised pictures and a class number a picture;
    above its Grad-CAM (explain.grad_cam) stand the class and the probability it has there. Orange
    speaks for the class, blue does not. A model without a map has no column, and a sentence in the
    heading; without any map the heading is all there is.
    """
    see = training.test_transform(recipe)
    pictures = [see(images.decode(path)) for path in paths]
    rows = [([picture], [""]) for picture in pictures]
    notes = [heading] if heading else []
    stack = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    for name, (model, targets) in asked.items() if stack else ():
        device, targets = next(model.parameters()).device, np.array(targets, np.int64)
        batch = training.Normalize(recipe, device)(torch.stack(stack).to(device))
        try:
            maps = explain.grad_cam(model, batch, targets)
        except explain.ExplainError as error:
            notes.append(f"{name}: {error}")
            continue
        with models.evaluating(model), torch.no_grad():
            p = model(batch).float().softmax(1).cpu().numpy()
        for row, cam, k, share in zip(rows, maps, targets, p, strict=True):
            row[0].append(plots.tinted(row[0][0], cam))
            row[1].append(f"{name} {classes[k]}: {share[k]:.2f}")
    if not rows or len(rows[0][0]) == 1:
        return plots.grid([], heading="; ".join(notes))
    numbered = {str(i): row for i, row in enumerate(rows, 1)}
    return plots.strips(numbered, "; ".join(notes), columns=min(3, len(rows)))
