"""Checks of the model and of the custom parts of a recipe, before the first step."""

import math
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from workbench import data, evaluation, models, parts, runs
from workbench.evaluation import inference
from workbench.parts import PartError
from workbench.recipe_checks import is_part
from workbench.schedule import TrainingError
from workbench.training.distributed import is_main
from workbench.training.inputs import DeviceTransform, Normalize, eval_transform, train_batches
from workbench.training.state import TrainState
from workbench.training.validation import name_rows

IMAGES = 4
FAILED = (
    "is nan in metrics.csv where it fails, and the training goes on; stop, correct the metric and "
    "resume, or call it with Run.predictions(), those of the last epoch"
)


class Metrics:
    """The custom metrics of a recipe, as one function of a table of predictions."""

    def __init__(self, references: list[str], example: pd.DataFrame | None = None):
        """Raises PartError for a metric that fails on the example."""
        self.functions = {name: parts.load("metrics", name) for name in references}
        self.owners: dict[str, str] = {}  # the metric of each name
        self.failed: dict[str, str] = {}  # by metric, how it failed first in the run
        for name in references:
            self.owners |= dict.fromkeys(self._values(name, example, self.owners), name)

    @property
    def names(self) -> list[str]:
        return [*self.owners]

    def resumed(self, run: runs.Run) -> "Metrics":
        """These, with what failed before a resume, but for a metric that was replaced since."""
        known = run.environment().get("failed_metrics", {}) if run.file("last.pt").exists() else {}
        self.failed |= {name: known[name] for name in known if name in self.functions}
        return self

    def __call__(self, predictions: pd.DataFrame) -> dict[str, float]:
        """The numbers by name; nan those of a metric that fails, with one warning in a run."""
        found: dict[str, float] = {}
        for name in self.functions:
            try:
                found |= self._values(name, predictions, found)
            except PartError as error:  # no reason to lose what was trained
                own = [key for key, owner in self.owners.items() if owner == name]
                missing = [key for key in own if key not in found]
                found |= dict.fromkeys(missing, math.nan)
                if name not in self.failed:
                    self.failed[name] = f"{error}; {', '.join(missing)} {FAILED}"
                    if is_main():
                        warnings.warn(self.failed[name], stacklevel=2)
        return found

    def _values(self, name: str, predictions: pd.DataFrame, known: Iterable) -> dict[str, float]:
        """The numbers of one metric, which has no name of `known`. Raises PartError."""
        values = parts.run("metrics", name, self.functions[name], predictions.copy())
        pairs = values.items() if isinstance(values, dict) else [(None, None)]
        if not all(isinstance(k, str) and isinstance(v, Real | np.bool_) for k, v in pairs):
            raise PartError(f"metrics {name!r} gives {values!r}; it must give {{name: number}}")
        for key in {*values} - {*evaluation.custom_metrics(values)} | {*values} & {*known}:
            text = f"gives {key!r}, another column of metrics.csv; rename it"
            raise PartError(f"metrics {name!r} {text}")
        return {key: float(value) for key, value in values.items()}


def dry_run(state: TrainState, dataset: data.Dataset) -> Metrics:
    """Checks shapes, types and random numbers of the custom parts. Raises PartError.

    TrainingError for a model that cannot be trained in bf16 on a CPU.
    """
    recipe = state.recipe
    check_bf16(state)
    if recipe.transform:
        _check_transform(state)
    if is_part(recipe.loss):
        _check_loss(state, dataset)
    if state.distiller and any(map(is_part, recipe.kd_loss)):
        _check_kd_loss(state, dataset)
    if not recipe.metrics:
        return Metrics([])
    few, val = dataset.val.head(IMAGES), dataset.val
    batches = data.eval_loader(few, eval_transform(recipe), batch_size=IMAGES)
    device = state.dist.device
    frame = inference.predict(state.model, batches, Normalize(recipe, device), device)
    # A row per image, since the names of the numbers may depend on the labels.
    rows = np.arange(len(val))
    frame = frame.iloc[rows % len(frame)].assign(row=rows, label=val.label.to_numpy())
    return Metrics(recipe.metrics, name_rows(frame.reset_index(drop=True), val))


def check_bf16(state: TrainState) -> None:
    """Raises TrainingError in bf16 on a CPU where weights of a convolution meet only padding.

    oneDNN 3.12 (torch 2.14) leaves gradients of some of them as memory was. None is wrong in fp32.
    """
    if state.recipe.precision != "bf16" or state.dist.device.type != "cpu":
        return
    found, size = [], state.recipe.image_size

    def look(conv: nn.Conv2d, given: tuple[torch.Tensor]) -> None:
        same = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        padding = same if isinstance(conv.padding, str) else conv.padding
        axes = given[0].shape[2:], conv.kernel_size, conv.stride, padding, conv.dilation
        for side, kernel, stride, pad, dilation in zip(*axes, strict=True):
            starts = np.arange(-pad, side + pad - dilation * (kernel - 1), stride)
            at = starts[:, None] + dilation * np.arange(kernel)
            if not ((at >= 0) & (at < side)).any(0).all():
                found.append(f"a kernel of {kernel} pixels and an input of {side}")

    convolutions = [m for m in state.model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [conv.register_forward_pre_hook(look) for conv in convolutions]
    with models.eval_mode(state.model), torch.no_grad():
        state.model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    if found:
        raise TrainingError(
            f"precision bf16 on a CPU: torch computes wrong gradients for {found[0]}; use "
            "precision: fp32 or larger images"
        )


def _check_transform(state: TrainState) -> None:
    recipe, size = state.recipe, state.recipe.image_size
    function = parts.load("transform", recipe.transform, **recipe.transform_args)
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    first, again = (
        parts.run("transform", recipe.transform, function, image.copy(), np.random.default_rng(1))
        for _ in range(2)
    )
    got = f"{first.dtype} {first.shape}" if isinstance(first, np.ndarray) else type(first).__name__
    name, wanted = f"transform {recipe.transform!r}", f"uint8 {image.shape}"
    if got != wanted:
        raise PartError(f"{name} gives {got} for an array {wanted}; it must give such an array")
    if not np.array_equal(first, again):
        text = "gives two images for one state of the generator; draw from no other source"
        raise PartError(f"{name} {text}")


def _check_loss(state: TrainState, dataset: data.Dataset) -> None:
    recipe, (_, targets) = state.recipe, _first_images(state, dataset)
    logits = torch.randn(len(targets), len(dataset.classes), generator=torch.Generator())
    logits = logits.to(state.dist.device).requires_grad_()
    function = parts.load("loss", recipe.loss, **recipe.loss_args)
    losses = parts.run("loss", recipe.loss, function, logits, targets)
    wanted = f"one value per image {(len(targets),)}, not their mean"
    _check_tensor(f"loss {recipe.loss!r}", losses, (len(targets),), wanted)


def _check_kd_loss(state: TrainState, dataset: data.Dataset) -> None:
    kd, (images, targets) = state.distiller, _first_images(state, dataset)
    with models.eval_mode(state.student), torch.no_grad():
        logits, features = state.student(images)
    outputs = kd.teacher_outputs(images)
    for i, pair in enumerate(kd.pairs):
        if isinstance(pair.loss, parts.Part):
            student = features.get(i, logits).float().requires_grad_()
            teacher, name = outputs[pair.teacher][pair.teacher_layer].float(), pair.loss.origin[1]
            loss = parts.run("kd_loss", name, pair.loss, student, teacher, targets)
            _check_tensor(f"kd_loss {name!r}", loss, (), "the mean over the images, 0-d")


def _first_images(state: TrainState, dataset: data.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    batch = next(train_batches(state.recipe, dataset, range(1), micro_batch_size=IMAGES))
    return DeviceTransform(state.recipe, len(dataset.classes), state.dist.device)(batch)


def _check_tensor(name: str, found: Any, shape: tuple[int, ...], wanted: str) -> None:
    got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    if got != shape:
        raise PartError(f"{name} gives {got}; it must give {wanted}")
    if not found.requires_grad or not torch.isfinite(found).all():
        raise PartError(f"{name} gives {found.tolist()}; it must be finite and differentiable")
