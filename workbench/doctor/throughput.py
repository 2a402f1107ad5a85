"""What limits a training: the loader, the model, and what a cache or more cores would change.

    speed = meter.measure(recipe, content)   # before: each alone on this machine, a few seconds
    speed.verdict(recipe)                    # "... the loader is the limit; a cache would give 2x"
    meter.seen(run.steps(), device)          # afterwards: what the run's own rows say

The rows of a training (steps.csv) hold both as they are beside each other, sharing the cores.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from workbench import data, models, training
from workbench.data import images


@dataclass(frozen=True)
class Speed:
    """Images per second: of one core that reads files, of one that reads a cache, of the model.

    `cached` has the images in memory: it is what a cache gives whose disk keeps up. `model` is
    forward, backward and optimizer step on the recipe's device, on a CPU with all its cores;
    `teachers`, mixing and EMA are not in it.
    """

    files: float
    cached: float
    model: float
    device: str
    cores: int
    loaders: int  # cores that load: as many as there are processes for it, and cores
    threads: int  # of the model, on a CPU

    def together(self, one_core: float) -> float:
        """Images per second of a training whose loader gives `one_core` per core.

        The slower side decides. On a CPU both also take their time from the same cores.
        """
        slower = min(one_core * self.loaders, self.model)
        if self.device != "cpu":
            return slower
        seconds = 1 / one_core + min(self.threads, self.cores) / self.model  # of a core, an image
        return min(slower, self.cores / seconds)

    def table(self) -> pd.DataFrame:
        """Images per second: a row for the loader, the model, and, calculated, both together."""
        loader = f"loader, {self.loaders} of {self.cores} cores"
        rows = {
            f"{loader}, from files": self.files * self.loaders,
            f"{loader}, from a cache": self.cached * self.loaders,
            f"model, on the {self.device.replace('cuda', 'gpu')}": self.model,
            "both, from files (calculated)": self.together(self.files),
            "both, from a cache (calculated)": self.together(self.cached),
        }
        return pd.DataFrame({"images_per_second": rows}).round()

    def verdict(self, recipe: Any) -> str:
        """One sentence: what limits this recipe here, and what would help."""
        one_core = self.cached if recipe.cache else self.files
        now, loader = self.together(one_core), one_core * self.loaders
        share = now / (one_core * self.cores) if self.device == "cpu" else 0.0
        limit = _limit(loader, self.model, share)
        text = (
            f"{self.loaders} of {self.cores} cores load {loader:,.0f} img/s from "
            f"{'a cache' if recipe.cache else 'files'}, the model takes {self.model:,.0f}: {limit}"
        )
        if "the model" in limit:
            return f"{text}."
        if not recipe.cache and (gain := self.together(self.cached) / now) > 1.15:
            return f"{text}; a cache (cache: true) would give about {gain:.1f}x."
        if self.device != "cpu" and self.loaders < self.cores:
            return f"{text}; more workers would help."
        if self.device != "cpu" and not recipe.augment_on_device:
            return f"{text}; augment_on_device: true would leave the cores less to do."
        return f"{text}; more cores, or fewer operations on an image, would help."


def _limit(loader: float, model: float, share: float) -> str:
    """The slower side, from images per second: the one rule before and after a training.

    `share` is the part of the CPU that loading takes from the model, 0 where that is on a device.
    """
    if loader < model or share > 0.5:
        return "the loader is the limit"
    if share <= 0.13:  # without it a training is at most 1.15 times as fast
        return "the model is the limit; faster loading would change little"
    return f"the model is the limit; faster loading would give at most {1 / (1 - share):.1f}x"


def seen(steps: pd.DataFrame, device: str) -> str:
    """One sentence from the rows of a training (steps.csv): medians over the second half of it.

    `device` is what it ran on, "cpu", "cuda" or "mps".
    """
    columns = ["images_per_second", "data_wait", "loader_images_per_second"]
    columns += ["model_images_per_second"]
    if len(steps) < 4 or not set(columns) <= set(steps):
        return "Too few rows to tell what limits the speed; log_every sets how many there are."
    both, waiting, loader, model = steps[columns].tail((len(steps) + 1) // 2).median()
    text = (
        f"{both:,.0f} img/s: the loaders worked {min(1, both / loader):.0%} of the time and gave "
        f"{loader:,.0f} meanwhile, the model {1 - waiting:.0%} and took {model:,.0f}"
    )
    share = min(0.99, both / loader) if device == "cpu" else 0.0  # of the cores, which they share
    return f"{text}: {_limit(loader, model, share)}."


def measure(recipe: Any, content: data.Dataset, seconds: float = 4.0) -> Speed:
    """Loader and model alone, each measured for a share of `seconds` on the first images.

    Raises ModelError as training does.
    """
    device = training.pick_device(recipe.device)
    workers = training.pick_workers(recipe.workers)
    files, cached = _loader(recipe, content, seconds / 4)
    return Speed(
        files,
        cached,
        _model(recipe, content, device, seconds / 2),
        device.type,
        data.available_cpus(),
        max(1, min(workers, data.available_cpus())),
        torch.get_num_threads(),
    )


class _Memory:
    """Images by row as a cache gives them, without the disk."""

    def __init__(self, cached: dict[int, images.Pixels]):
        self.image = cached.__getitem__


def _loader(recipe: Any, content: data.Dataset, seconds: float) -> tuple[float, float]:
    """Images per second of one core, from files and from what a cache holds of them."""
    transform = training.train_transform(recipe)
    chosen = data.epoch_permutation(recipe.seed, 0, len(content.train))[:512]
    frame = content.train.iloc[chosen].reset_index(drop=True)

    def rate(cached: Any = None) -> float:
        count = spent = 0.0
        how = {"batch_size": min(16, len(frame)), "steps": range(1000), "cached": cached}
        for batch in data.train_loader(frame, transform, seed=recipe.seed, **how):
            if batch.step:  # the first one warms up
                count, spent = count + len(batch.images), spent + batch.seconds
            if spent > seconds:
                break
        return count / spent if count else float("nan")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's process
    try:
        files = rate()
        cached, held = {}, 0
        for row, path in enumerate(frame.path):
            try:
                pixels = transform.resize(images.open(path))
            except images.ImageError:  # training sets it aside by name
                continue
            cached[len(cached)] = images.Pixels(pixels)
            held += pixels.nbytes
            if held > 2e8 or row >= 63:
                break
        frame = frame.head(len(cached))
        return files, rate(_Memory(cached)) if len(frame) else float("nan")
    finally:
        torch.set_num_threads(threads)


def _model(recipe: Any, content: data.Dataset, device: torch.device, seconds: float) -> float:
    """Images per second of forward, backward and step, by the median step."""
    size = min(recipe.micro_batch_size or recipe.batch_size, 256)
    classes = len(content.classes)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    criterion = training.loss_function(recipe)
    bf16 = training.pick_precision(recipe.precision, device) == "bf16"

    def steps(model: torch.nn.Module) -> Iterator[None]:
        optimizer = training.create_optimizer(recipe, model)
        images = torch.randn(size, 3, recipe.image_size, recipe.image_size, device=device)
        images = images.contiguous(memory_format=layout)
        targets = torch.arange(size, device=device) % classes
        while True:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(images)
            criterion(logits.float(), targets).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            yield

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = training.create_model(recipe, classes).train().to(device, memory_format=layout)
        # Norms cannot see one image alone.
        with models.eval_mode(model) if size == 1 else contextlib.nullcontext():
            return size * _rate(steps(model), seconds)


def _rate(turns: Iterator[None], seconds: float) -> float:
    """Turns per second by the median of what they take, for `seconds`; two warm up."""
    spent, start = [], time.perf_counter()
    before = start
    for _ in turns:
        now = time.perf_counter()
        spent.append(now - before)
        if len(spent) > 2 and now - start > seconds:
            break
        before = time.perf_counter()
    return 1 / statistics.median(spent[2:])
