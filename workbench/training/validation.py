"""Validation at the end of an epoch, and of any model outside of a training."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from workbench import data, evaluation
from workbench.data import pixel_cache
from workbench.evaluation import inference
from workbench.progress import bar
from workbench.recipe import Recipe
from workbench.training.distributed import DistContext
from workbench.training.environment import pick_workers
from workbench.training.inputs import Normalize, eval_transform, train_transform
from workbench.training.meter import Row
from workbench.training.record import Record
from workbench.training.state import TrainState


class Validation:
    """Evaluates raw and EMA weights on the validation list."""

    def __init__(
        self,
        recipe: Recipe,
        val: pd.DataFrame,
        dist: DistContext,
        workers: int,
        cache: pixel_cache.Cache | None,
    ):
        self.recipe, self.val, self.dist, self.cache = recipe, val, dist, cache
        self.workers = eval_workers(workers, val, cached=cache is not None)
        self.normalize = Normalize(recipe, dist.device)

    def __call__(self, state: TrainState, record: Record) -> Row:
        """The validation columns; writes predictions.parquet, and best.safetensors if better."""
        for network in state.networks.values():
            self.dist.average_buffers(network)
        frames, columns = {}, self.empty(state)
        for weights, network in state.networks.items():
            own = inference.predict(network, self._batches(), self.normalize, self.dist.device)
            record.quarantine("val", own.attrs.pop("failures"), state.step)
            frames[weights] = self.dist.gather(own)
            result = evaluation.summary(frames[weights])
            prefix = "ema_" if weights == "ema" else ""
            columns |= {f"{prefix}{k}": v for k, v in result.items() if k != "val_images"}
            columns["val_images"] = result["val_images"]
        if self.dist.is_main:
            for weights, frame in frames.items():
                name_rows(frame, self.val).insert(0, "weights", weights)
            predictions = pd.concat(frames.values(), ignore_index=True)
            record.run.save_frame("predictions.parquet", predictions)
            self._save_if_best(state, record, columns)
        return columns

    def empty(self, state: TrainState) -> Row:
        """The columns of an epoch without validation."""
        columns = ["val_loss", "top1", "top5", "val_images"]
        columns += ["ema_val_loss", "ema_top1", "ema_top5"] if state.ema else []
        return dict.fromkeys(columns)

    def _batches(self) -> Iterator[data.Batch]:
        size = self.recipe.micro_batch_size or self.recipe.batch_size
        return data.eval_loader(
            self.val,
            eval_transform(self.recipe),
            batch_size=max(64, min(256, size)),
            rank=self.dist.rank,
            world=self.dist.world,
            workers=self.workers,
            pin_memory=self.dist.device.type == "cuda",
            cached=self.cache,
        )

    def _save_if_best(self, state: TrainState, record: Record, columns: Row) -> None:
        top1 = {"raw": columns["top1"]} | ({"ema": columns["ema_top1"]} if state.ema else {})
        weights = max(top1, key=lambda kind: (top1[kind], kind))  # raw if both are equal
        if top1[weights] > state.best:
            state.best = top1[weights]
            metadata = {"weights": weights, "top1": state.best, "step": state.step}
            tensors = state.networks[weights].state_dict()
            record.run.save_weights("best.safetensors", tensors, metadata)


def predictions(recipe: Recipe, dataset: data.Dataset, model: nn.Module) -> pd.DataFrame:
    """inference.predict's columns for the validation list, with file and list before them.

    The model takes the recipe's images and stays on its device.
    """
    device = next(model.parameters()).device
    workers = eval_workers(pick_workers(recipe.workers), dataset.val)
    batches = data.eval_loader(dataset.val, eval_transform(recipe), batch_size=64, workers=workers)
    with bar(len(dataset.val), "validation", "img") as shown:
        normalize = Normalize(recipe, device)
        frame = inference.predict(model, batches, normalize, device, shown.update)
    return name_rows(frame, dataset.val)


def initial_loss(
    recipe: Recipe, dataset: data.Dataset, model: nn.Module, images: int = 64
) -> float:
    """The cross-entropy of a model on the first images of step 0, neither erased nor mixed.

    Near ln(classes) for a model at its initial weights.
    """
    loader = data.train_loader(
        dataset.train,
        replace(train_transform(recipe), on_device=False),
        seed=recipe.seed,
        batch_size=min(images, len(dataset.train)),
        steps=range(1),
    )
    batch, device = next(loader), next(model.parameters()).device
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        logits = model(Normalize(recipe, device)(batch.images.to(device)))
    return F.cross_entropy(logits.float(), batch.labels.to(device)).item()


def eval_workers(workers: int, val: pd.DataFrame, cached: bool = False) -> int:
    """Loader processes for an evaluation; none where starting them takes longer than reading."""
    large = not cached and "width" in val and (val.width * val.height).sum() > 1e8
    return workers if large or len(val) > 2000 else 0


def name_rows(frame: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    """A frame of predictions with the columns file and list before the others."""
    frame.insert(0, "list", val.list.to_numpy()[frame.row])
    frame.insert(0, "file", val.file.to_numpy()[frame.row])
    return frame
