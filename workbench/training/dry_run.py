"""One batch through the custom parts of a recipe, before the first step."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench import data, parts
from workbench.evaluation import inference
from workbench.parts import PartError
from workbench.recipe_checks import is_part
from workbench.training.inputs import DeviceTransform, Normalize, eval_transform, train_batches
from workbench.training.state import TrainState

IMAGES = 4


class Metrics:
    """The custom metrics of a recipe, as one function of a table of predictions."""

    def __init__(self, references: list[str], example: pd.DataFrame | None = None):
        self.functions = {name: parts.load("metrics", name) for name in references}
        self.names: list[str] = list(self(example)) if references else []

    def __call__(self, predictions: pd.DataFrame) -> dict[str, float]:
        """The numbers by name. Raises PartError."""
        found: dict[str, float] = {}
        for reference, function in self.functions.items():
            values = _run("metrics", reference, function, predictions.copy())
            if not isinstance(values, dict) or not all(
                isinstance(key, str) and np.isscalar(value) and not isinstance(value, str)
                for key, value in values.items()
            ):
                must = "it must give {name: number}"
                raise PartError(f"metrics {reference!r} gives {values!r}; {must}")
            found |= {key: float(value) for key, value in values.items()}
        return found


def dry_run(state: TrainState, dataset: data.Dataset) -> Metrics:
    """Checks shapes, types and random numbers of the custom parts. Raises PartError."""
    recipe = state.recipe
    if recipe.transform:
        _check_transform(state)
    if is_part(recipe.loss):
        _check_loss(state, dataset)
    if not recipe.metrics:
        return Metrics([])
    val = dataset.val.head(IMAGES)
    batches = data.eval_loader(val, eval_transform(recipe), batch_size=IMAGES)
    device = state.dist.device
    frame = inference.predict(state.model, batches, Normalize(recipe, device), device)
    return Metrics(recipe.metrics, frame.join(val[["file", "list"]], on="row"))


def _check_transform(state: TrainState) -> None:
    recipe, size = state.recipe, state.recipe.image_size
    function = parts.load("transform", recipe.transform, **recipe.transform_args)
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    first, again = (
        _run("transform", recipe.transform, function, image.copy(), np.random.default_rng(1))
        for _ in range(2)
    )
    if not isinstance(first, np.ndarray) or first.shape != image.shape or first.dtype != np.uint8:
        got = f"{first.dtype} {first.shape}" if isinstance(first, np.ndarray) else type(first)
        raise PartError(
            f"transform {recipe.transform!r} gives {got} for a uint8 image {image.shape}; it must "
            "give an array of the same type and shape"
        )
    if not np.array_equal(first, again):
        raise PartError(
            f"transform {recipe.transform!r} gives two images for one state of the generator; "
            "draw all random numbers from the generator it is given"
        )


def _check_loss(state: TrainState, dataset: data.Dataset) -> None:
    recipe, device = state.recipe, state.dist.device
    batch = next(train_batches(recipe, dataset, range(1), micro_batch_size=IMAGES))
    _, targets = DeviceTransform(recipe, len(dataset.classes), device)(batch)
    logits = torch.randn(len(targets), len(dataset.classes), generator=torch.Generator())
    logits = logits.to(device).requires_grad_()
    function = parts.load("loss", recipe.loss, **recipe.loss_args)
    losses = _run("loss", recipe.loss, function, logits, targets)
    name = f"loss {recipe.loss!r}"
    if not isinstance(losses, torch.Tensor) or losses.shape != targets.shape[:1]:
        got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise PartError(
            f"{name} gives {got} for {len(targets)} images; it must give one value per image "
            f"({len(targets)},), not their mean"
        )
    if not losses.requires_grad or not torch.isfinite(losses).all():
        raise PartError(f"{name} gives {losses.tolist()}; it must be finite and differentiable")


def _run(option: str, reference: str, function: Callable, *arguments: Any) -> Any:
    """What a part gives. Raises PartError where it fails, or draws from a global generator."""
    before = _generators()
    try:
        found = function(*arguments)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise PartError(f"{option} {reference!r} failed: {text}") from error
    if _generators() != before:
        raise PartError(
            f"{option} {reference!r} draws from a global random generator, so no run could resume; "
            "only a transform may be random, by the generator it is given"
        )
    return found


def _generators() -> tuple:
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tobytes(), numpy[2], bytes(torch.get_rng_state().numpy())
