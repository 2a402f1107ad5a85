"""Figures and tables of images: augmentation, model inputs, changed predictions, Grad-CAM."""

from collections.abc import Iterable, Mapping, Sequence
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

AUGMENTATION = {
    "crop and colour": "crop_scale crop_ratio hflip brightness contrast saturation hue".split(),
    "RandAugment": """
        autoaugment randaug_n randaug_m randaug_std randaug_increasing randaug_variant
    """.split(),
    "mixing and erasing": """
        mixup_alpha cutmix_alpha switch_prob mix_per_sample mix_prob
        erase_prob erase_mode erase_count
    """.split(),
}  # options that these figures show, by group


def augmentation_grid(
    recipe: Recipe,
    image: images.AnyImage,
    row: int = 0,
    first_epoch: int = 0,
    *,
    other: images.AnyImage | None = None,
    heading: str = "",
) -> Figure:
    """An image, as validation takes it, and as the model takes it in 19 epochs of training.

    Crop, flip and colours are those of training, which depend on seed, epoch and `row` of the
    training list. Erasing and mixing with `other` (None: with the image itself) are sampled as for
    a step of these two. Titles are the sampled parameters except those of the crop, and the share
    of the image in its label where it is mixed.
    """
    transform = training.train_transform(recipe)
    original, validated = _original(image), training.eval_transform(recipe)(image)
    pair = [transform.resize.image(one) for one in (image, image if other is None else other)]
    views: tuple[list, list] = ([], [])
    heads, texts, epochs = [], [], range(first_epoch, first_epoch + 19)
    for epoch in epochs:
        for i, one in enumerate(pair):  # the other is the next row
            rng = data.rng_for(recipe.seed, data.DRAW, epoch, row + i)
            params = transform.sample_params(rng, one.width, one.height)
            if i == 0:
                heads.append(f"epoch {epoch + 1}{', flip' * params['flip']}")
                words = augmentation.describe({**params, "flip": False})
                texts.append(words.replace(", ", "\n"))
            if i == 0 or recipe.mixup_alpha or recipe.cutmix_alpha:
                views[i].append(transform.apply(one, params))
    shown, notes = _as_inputs(recipe, *views, epochs)
    lines = zip(heads, notes, texts, strict=True)
    titles = ["\n".join(filter(None, some)) for some in lines]
    shown, titles = [validated, *shown], ["validation", *titles]
    options = {"heading": heading, "original": original, "most_lines": 5}  # fits a window
    return image_grids.grid(shown, titles, columns=6, **options)


def _original(image: images.AnyImage) -> image_grids.Cell:
    pixels = images.image(image).pixels()
    return pixels, f"original, {pixels.shape[1]} x {pixels.shape[0]}"


def _as_inputs(
    recipe: Recipe, views: list[np.ndarray], others: list[np.ndarray], steps: Iterable[int]
) -> tuple[list[np.ndarray], list[str]]:
    """Views erased and mixed with the others, and notes on their shares; `steps` are seeds."""
    mixes = recipe.mixup_alpha or recipe.cutmix_alpha
    if not mixes and not recipe.erase_prob:
        return views, [""] * len(views)
    transform = training.DeviceTransform(recipe, 2, torch.device("cpu"))
    two, shown, notes = torch.arange(2), [], []
    for view, other, step in zip(views, others if mixes else views, steps, strict=True):
        batch = data.Batch(_tensor([view, other]), two, two, two, step, True, 2, [])
        tensors, targets = transform(batch)
        shown.append(transform.normalize.undo(tensors[:1])[0].numpy())
        share = float(targets[0, 0]) if mixes else 1.0
        notes.append(f"label {share:.2f}" if share < 0.9995 else "")
    return shown, notes


def _tensor(views: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 (n, 3, h, w) of arrays (h, w, 3)."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def sweep(
    recipe: Recipe,
    image: images.AnyImage,
    heading: str = "",
    other: images.AnyImage | None = None,
) -> Figure | pd.DataFrame:
    """Crop, flip, jitter, mixing with `other` and erasing: lowest, middle and highest value.

    One at a time; a table if all are off.
    """
    transform = training.train_transform(recipe)
    found = _sweep_rows(transform, image, randaug=False)
    some = lambda row: row[:: len(row) // 2]  # 3 of 5, both of 2
    rows = {name: (some(shown), some(titles)) for name, (shown, titles) in found.items()}
    pair = (transform.at(one, {}) for one in (image, image if other is None else other))
    rows |= _mixing_rows(recipe, *pair)
    if not rows:
        return pd.DataFrame({heading or "operations": ["crop, flip and jitter are off"]})
    columns = 1 + (len(rows) > 4)
    return image_grids.image_rows(rows, heading, columns, image_grids.NARROW)


def _mixing_rows(
    recipe: Recipe, image: np.ndarray, other: np.ndarray
) -> dict[str, tuple[list[np.ndarray], list[str]]]:
    """Mixup and CutMix with shares of 1, 3/4 and 1/2, erasing of 2, 18 and 33 % of the area."""
    transform = training.DeviceTransform(recipe, 2, torch.device("cpu"))
    pair, size = transform.normalize(_tensor([image, other])), recipe.image_size
    rows: dict[str, tuple[list[np.ndarray], list[str]]] = {}

    def add(name: str, tensors: torch.Tensor, title: str) -> None:
        shown, titles = rows.setdefault(name, ([], []))
        shown.append(transform.normalize.undo(tensors[:1])[0].numpy())
        titles.append(title)

    def box(area: float) -> list[int]:
        side = round(size * area**0.5)
        return [low := (size - side) // 2, low, low + side, low + side]

    for share in (1.0, 0.75, 0.5):
        for name, boxed in (("mixup", False), ("cutmix", True)):
            if getattr(recipe, f"{name}_alpha"):
                boxes = np.array([box(1 - share) if boxed else [0] * 4] * 2)
                lam = np.full(2, share)
                mixed, _ = transform.mix.apply(pair, torch.eye(2), np.arange(2), lam, boxes)
                add(name, mixed, f"label {share:.2f}")
    for area in np.linspace(*transform.erase.area, 3) if transform.erase else ():
        erased = transform.erase.apply(pair.clone(), np.array([[box(area)]] * 2), np.arange(2))
        add("erasing", erased, f"{area:.0%} of the area")
    return rows


def operations(
    recipe: Recipe, image: images.AnyImage, other: images.AnyImage | None = None
) -> Figure:
    """The operations of the recipe's RandAugment variant at magnitude `randaug_m`.

    In the positive direction, from the whole image, and erased and mixed as the recipe says.
    """
    recipe = recipe.replace(randaug_n=recipe.randaug_n or 2)
    transform = training.train_transform(recipe)
    kind = transform.randaug
    steps = [kind.at(name, recipe.randaug_m, recipe.image_size) for name in kind.levels]
    settings = [{"randaug": [step]} for step in steps]
    views = [transform.at(image, setting) for setting in settings]
    others = [transform.at(image if other is None else other, {})] * len(views)
    shown, notes = _as_inputs(recipe, views, others, range(len(views)))
    titles = [augmentation.describe(s).replace(" ", "\n", 1) for s in settings]
    titles = [f"{title}\n{note}".strip() for title, note in zip(titles, notes, strict=True)]
    heading = f"each operation alone at magnitude {recipe.randaug_m:g}, variant {kind.variant}"
    whole, size = _original(image)
    shown, titles = [whole, *shown], [size, *titles]
    return image_grids.grid(shown, titles, columns=6, heading=heading)


def magnitudes(recipe: Recipe, image: images.AnyImage) -> Figure:
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
    views = training.Normalize(recipe, tensors.device).undo(tensors).numpy()
    heading = f"{tuple(tensors.shape)}, mean {tensors.mean():.2f}, std {tensors.std():.2f}"
    titles = [image_grids.label_text(target, content.classes) for target in targets]
    return image_grids.grid(views, titles, columns=6, heading=heading, most_lines=5)


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
    opened = [transform.resize.image(image) for image in images.open_all(table.path)]
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


def mistakes(
    table: pd.DataFrame, recipe: Recipe, classes: Sequence[str], heading: str = "", columns: int = 8
) -> Figure:
    """Images of evaluation.mistakes, as validation takes them: prediction, probability and label.

    The table has their `path` too, of the validation list.
    """
    transform = training.eval_transform(recipe)
    titles = [f"{classes[r.class1]} {r.p1:.0%}\nis {classes[r.label]}" for r in table.itertuples()]
    heading = heading or "the most confident mistakes: prediction, probability, below it the label"
    shown = [transform(image) for image in images.open_all(table.path)]
    return image_grids.grid(shown, titles, columns=columns, heading=heading)


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
        views = [transform(image) for image in images.open_all(found.path)]
    except (ValueError, OSError, RuntimeError):  # moved, or a recipe of an older version
        return rows
    titles = []
    for row in found.to_dict("records"):
        before, after = (classes[row[side]] for side in ("before", "after"))
        shares = [row.get(f"correct_{side}", 0.0) for side in ("before", "after")]
        lines = [f"{before} \u2192 {after}"] if before != after else []
        if any(0 < share < 1 for share in shares):  # runs of one recipe disagree
            lines.append("right {:.0%} \u2192 {:.0%}".format(*shares))
        titles.append("\n".join([*lines, f"is {classes[row['label']]}"]))
    return image_grids.grid(views, titles, columns=12, heading=heading) if views else rows


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
    views = [transform(image) for image in images.open_all(paths)]
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
    return image_grids.image_rows(numbered, "; ".join(notes), columns=min(2, len(rows)))
