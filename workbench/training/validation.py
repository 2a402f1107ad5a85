"""Validation at the end of an epoch, and of any model outside of a training."""

import contextlib
import copy
import itertools
from collections.abc import Iterator

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from workbench import data, evaluation
from workbench.data import pixel_cache, tables
from workbench.evaluation import inference
from workbench.progress import bar
from workbench.recipe import Recipe
from workbench.training.distributed import DistContext, pick_workers
from workbench.training.inputs import DeviceTransform, Normalize, eval_transform, train_batches
from workbench.training.meter import Row
from workbench.training.run_writer import RunWriter
from workbench.training.state import TrainState
from workbench.training.stop_request import STOP, Stopped, StopRequest


def end_epoch(
    writer: RunWriter, cache: pixel_cache.Cache | None, stopping: StopRequest
) -> list[Row]:
    """The row of an epoch after its last step, validated where that is due.

    Empty if a stop was requested before the end of it: then `state.pending` stays True.
    """
    state = writer.state
    state.pending, columns = True, no_validation(state)
    if state.epoch % state.recipe.eval_every == 0 or state.step == state.steps:
        try:
            columns = validate(writer, cache, stopping)
        except Stopped:
            return []
    state.pending = False
    row = writer.epoch_row(columns)
    state.meter.lap()
    return [row]


def validate(writer: RunWriter, cache: pixel_cache.Cache | None, stopping: StopRequest) -> Row:
    """Evaluates raw and EMA weights on the validation list; returns the columns of metrics.csv.

    Writes predictions.parquet, and best.safetensors if the top-1 is the best so far. Raises Stopped
    in every process at the same batch.
    """
    state, val = writer.state, writer.dataset.val
    recipe, dist = state.recipe, state.dist
    normalize, frames, columns = Normalize(recipe, dist.device), [], no_validation(state)
    batch_size = max(64, min(256, recipe.micro_batch_size or recipe.batch_size))
    for weights, network in state.networks.items():
        dist.average_buffers(network)
        batches = data.eval_loader(
            val,
            eval_transform(recipe),
            batch_size=batch_size,
            workers=eval_workers(state.meter.workers, val, cached=cache is not None),
            cached=cache,
            **dist.loader_options,
        )
        most = -(-len(val) // (dist.world * batch_size))  # batches of rank 0, which has the most
        with contextlib.closing(batches):
            taken = _taken(itertools.islice(writer.read("val", batches), most), dist, stopping)
            frame = inference.predict(network, taken, normalize, dist.device)
        del frame.attrs["failures"]
        frame = name_rows(dist.gather(frame), val)
        prefix = "ema_" if weights == "ema" else ""
        found = {prefix + key: value for key, value in evaluation.summary(frame).items()}
        columns |= {key: value for key, value in found.items() if key in columns}
        columns |= {prefix + key: value for key, value in state.metrics(frame).items()}
        frame.insert(0, "weights", weights)
        frames.append(frame)
    if dist.is_main:
        writer.run.save_frame("predictions.parquet", pd.concat(frames, ignore_index=True))
        top1 = {"raw": columns["top1"], "ema": columns.get("ema_top1", -1.0)}
        best = max(state.networks, key=lambda weights: (top1[weights], weights))  # raw, if equal
        state.worse += 1
        if top1[best] > state.best:
            state.best, state.worse = top1[best], 0
            metadata = {"weights": best, "top1": state.best, "step": state.step}
            tensors = state.networks[best].state_dict()
            writer.run.save_weights("best.safetensors", tensors, metadata)
    state.worse = dist.max(state.worse if dist.is_main else 0)
    return columns


def _taken(
    batches: Iterator[data.Batch | None], dist: DistContext, stopping: StopRequest
) -> Iterator[data.Batch]:
    """The batches of this process; raises Stopped in all of them at the same one."""
    for batch in batches:
        if dist.max(stopping.action()) == STOP:
            raise Stopped
        if batch is not None:
            yield batch


def no_validation(state: TrainState) -> Row:
    """The columns of an epoch without validation."""
    columns = ["val_loss", "top1", "top5", "val_images"]
    columns += ["ema_val_loss", "ema_top1", "ema_top5"] * bool(state.ema)
    prefixes = ["", "ema_"] if state.ema else [""]
    columns += [prefix + name for prefix in prefixes for name in state.metrics.names]
    return dict.fromkeys(columns)


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


def initial_loss(recipe: Recipe, dataset: data.Dataset, model: nn.Module) -> float:
    """The cross-entropy of a model on up to 64 images of step 0, neither erased nor mixed.

    Near ln(classes) for a model at its initial weights.
    """
    device = next(model.parameters()).device
    prepare = DeviceTransform(recipe, len(dataset.classes), device)
    prepare.erase = prepare.mix = None
    inputs, labels = prepare(next(train_batches(recipe, dataset, range(1), micro_batch_size=64)))
    with torch.no_grad():
        logits = copy.deepcopy(model).train()(inputs)
    return F.cross_entropy(logits.float(), labels).item()


def eval_workers(workers: int, val: pd.DataFrame, cached: bool = False) -> int:
    """Loader processes for an evaluation; none where starting them takes longer than reading."""
    large = not cached and "width" in val and (val.width * val.height).sum() > 1e8
    return workers if large or len(val) > 2000 else 0


def name_rows(frame: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    """A frame of predictions with file and list before its columns, and those of a table after."""
    for name in tables.own_columns(val):
        frame[name] = val[name].to_numpy()[frame.row]
    frame.insert(0, "list", val.list.to_numpy()[frame.row])
    frame.insert(0, "file", val.file.to_numpy()[frame.row])
    return frame
