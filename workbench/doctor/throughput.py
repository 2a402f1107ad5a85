"""What limits the speed of a training: the loader or the model, and what would help.

speed = throughput.measure(recipe, content)   # before: each alone, a few seconds
speed.verdict(recipe)                         # "... the loader is the limit; a cache ..."
throughput.seen(run.steps(), device)          # afterwards: both together, from steps.csv
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench import data, models, training
from workbench.data import images
from workbench.recipe import Recipe


@dataclass(frozen=True)
class Speed:
    """Images per second of one loader core and of the model.

    `model` is forward, backward and optimizer step, without teachers, mixing and EMA.
    """

    files: float  # of one core that reads files
    cached: float  # of one core that reads a cache in memory
    model: float
    device: str
    cores: int
    loaders: int  # cores that load
    threads: int  # of the model on a CPU

    def together(self, one_core: float) -> float:
        """Images per second of a training whose loader has `one_core` per core.

        The slower side decides. On a CPU both share the cores.
        """
        slower = min(one_core * self.loaders, self.model)
        if self.device != "cpu":
            return slower
        core_seconds = 1 / one_core + min(self.threads, self.cores) / self.model  # per image
        return min(slower, self.cores / core_seconds)

    def table(self) -> pd.DataFrame:
        """Images per second of the loader, the model, and (calculated) both together."""
        loader = f"loader, {self.loaders} of {self.cores} cores"
        rows = {
            f"{loader}, from files": self.files * self.loaders,
            f"{loader}, from a cache": self.cached * self.loaders,
            f"model, on the {self.device.replace('cuda', 'gpu')}": self.model,
            "both, from files (calculated)": self.together(self.files),
            "both, from a cache (calculated)": self.together(self.cached),
        }
        return pd.DataFrame({"images_per_second": rows}).round()

    def verdict(self, recipe: Recipe) -> str:
        """One sentence: what limits this recipe here, and what would help."""
        one_core, source = (self.cached, "a cache") if recipe.cache else (self.files, "files")
        both, loader = self.together(one_core), one_core * self.loaders
        cpu = self.device == "cpu"
        limit = _limit(loader, self.model, both / (one_core * self.cores) if cpu else 0.0)
        gain = self.together(self.cached) / both
        advice = "; more cores, or fewer operations per image, would help"
        if "the model" in limit:
            advice = ""
        elif not recipe.cache and gain > 1.15:
            advice = f"; a cache (cache: true) would give about {gain:.1f}x"
        elif not cpu and self.loaders < self.cores:
            advice = "; more workers would help"
        elif not cpu and not recipe.augment_on_device:
            advice = "; augment_on_device: true would relieve the cores"
        return (
            f"{self.loaders} of {self.cores} cores load {loader:,.0f} img/s from {source}, the "
            f"model takes {self.model:,.0f}: {limit}{advice}."
        )


def _limit(loader: float, model: float, share: float) -> str:
    """The slower side, from images per second; `share` is the part of the CPU used for loading."""
    if loader < model or share > 0.5:
        return "the loader is the limit"
    if share <= 0.13:  # without loading a training is at most 1.15 times as fast
        return "the model is the limit; faster loading would change little"
    return f"the model is the limit; faster loading would give at most {1 / (1 - share):.1f}x"


def seen(steps: pd.DataFrame, device: str) -> str:
    """One sentence from the rows of a training (steps.csv): medians over its second half.

    `device` is "cpu", "cuda" or "mps".
    """
    columns = ["images_per_second", "data_wait", "loader_images_per_second"]
    columns += ["model_images_per_second"]
    if len(steps) < 4 or not set(columns) <= set(steps):
        return "Too few rows to tell what limits the speed; lower log_every for more."
    both, waiting, loader, model = steps[columns].tail((len(steps) + 1) // 2).median()
    share = min(0.99, both / loader) if device == "cpu" else 0.0
    return (
        f"{both:,.0f} img/s: the loaders worked {min(1, both / loader):.0%} of the time at "
        f"{loader:,.0f}, the model {1 - waiting:.0%} at {model:,.0f}: "
        f"{_limit(loader, model, share)}."
    )


def measure(recipe: Recipe, content: data.Dataset, seconds: float = 4.0) -> Speed:
    """Measures loader and model alone for a share of `seconds` each. Raises ModelError."""
    device = training.pick_device(recipe.device)
    files, cached = _loader_speed(recipe, content, seconds / 4)
    model = _model_speed(recipe, content, device, seconds / 2)
    cores = data.available_cpus()
    loaders = max(1, min(training.pick_workers(recipe.workers), cores))
    return Speed(files, cached, model, device.type, cores, loaders, torch.get_num_threads())


class _MemoryCache:
    """A pixel cache without a disk."""

    def __init__(self, pixels: list[np.ndarray]):
        self.image = [images.Pixels(array) for array in pixels].__getitem__


def _loader_speed(recipe: Recipe, content: data.Dataset, seconds: float) -> tuple[float, float]:
    """Images per second of one core, from files and from a cache in memory."""
    transform = training.train_transform(recipe)
    chosen = data.epoch_permutation(recipe.seed, 0, len(content.train))[:512]
    frame = content.train.iloc[chosen].reset_index(drop=True)

    def speed(frame: pd.DataFrame, cache: _MemoryCache | None = None) -> float:
        count = spent = 0.0
        options: dict[str, Any] = {"batch_size": min(16, len(frame)), "cached": cache}
        for batch in data.train_loader(
            frame, transform, seed=recipe.seed, steps=range(1000), **options
        ):
            if batch.step:  # the first one warms up
                count, spent = count + len(batch.images), spent + batch.seconds
            if spent > seconds:
                break
        return count / spent if count else float("nan")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    try:
        files = speed(frame)
        pixels = []
        for path in frame.path.head(64):
            with contextlib.suppress(images.ImageError):  # training quarantines it
                pixels.append(transform.resize(images.open(path)))
            if sum(p.nbytes for p in pixels) > 2e8:
                break
        if not pixels:
            return files, float("nan")
        return files, speed(frame.head(len(pixels)), _MemoryCache(pixels))
    finally:
        torch.set_num_threads(threads)


def _model_speed(
    recipe: Recipe, content: data.Dataset, device: torch.device, seconds: float
) -> float:
    """Images per second of forward, backward and optimizer step, by the median step."""
    size = min(recipe.micro_batch_size or recipe.batch_size, 256)
    classes = len(content.classes)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    criterion = training.loss_function(recipe)
    bf16 = training.pick_precision(recipe.precision, device) == "bf16"

    def steps(model: torch.nn.Module) -> Iterator[None]:
        optimizer = training.create_optimizer(recipe, model)
        batch = torch.randn(size, 3, recipe.image_size, recipe.image_size, device=device)
        batch = batch.contiguous(memory_format=layout)
        targets = torch.arange(size, device=device) % classes
        while True:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(batch)
            criterion(logits.float(), targets).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = training.create_model(recipe, classes).train().to(device, memory_format=layout)
        # Batch norm cannot normalise a single image in training mode.
        with models.eval_mode(model) if size == 1 else contextlib.nullcontext():
            return size / _median_seconds(steps(model), seconds)


def _median_seconds(steps: Iterator[None], seconds: float) -> float:
    """The median duration of steps during `seconds`; two steps warm up."""
    times, start = [], time.perf_counter()
    before = start
    for _ in steps:
        now = time.perf_counter()
        times.append(now - before)
        if len(times) > 2 and now - start > seconds:
            break
        before = time.perf_counter()
    return statistics.median(times[2:])
