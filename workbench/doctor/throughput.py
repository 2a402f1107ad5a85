"""What limits the speed of a training: the loader or the model, and what would help.

speed = throughput.measure(recipe, content)   # before: each alone, a few seconds
speed.verdict(recipe)                         # "... the loader is the limit; a cache ..."
throughput.seen(run.steps(), device)          # afterwards: both together, from steps.csv
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pandas as pd
import torch

from workbench import data, models, shard_store, training
from workbench.data import images
from workbench.recipe import Recipe

COLUMNS = "images_per_second data_wait loader_images_per_second model_images_per_second".split()


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
        rows = {f"model, on the {self.device.replace('cuda', 'gpu')}": self.model}
        for source, speed in (("files", self.files), ("a cache", self.cached)):
            loader = f"loader, {self.loaders} of {self.cores} cores, from {source}"
            rows |= {loader: speed * self.loaders}
            rows |= {f"both, from {source} (calculated)": self.together(speed)}
        return pd.DataFrame({"images_per_second": rows}).round()

    def verdict(self, recipe: Recipe) -> str:
        """What limits this recipe here, and what would help."""
        one_core, source = (self.cached, "a cache") if recipe.cache else (self.files, "files")
        both, loader = self.together(one_core), one_core * self.loaders
        share = both / (one_core * self.cores) if self.device == "cpu" else 0.0
        limit, gain = _limit(loader, self.model, share), self.together(self.cached) / both
        if "the loader" in limit and not recipe.cache and gain > 1.15:
            limit += f"; a cache (cache: true) would give about {gain:.1f}x"
        elif "the loader" in limit:
            more = "cores" if self.device == "cpu" else "workers, augment_on_device"
            limit += f"; more {more} or fewer operations per image would help"
        return (
            f"Alone, the loader reads {loader:,.0f} images/s from {source} on {self.loaders} of "
            f"{self.cores} cores, and the model trains on {self.model:,.0f}: {limit}."
        )


def _limit(loader: float, model: float, share: float) -> str:
    """The slower side, from images per second; `share` is the part of the CPU used for loading."""
    if loader < model or share > 0.5:
        return "the loader is the limit"
    if share <= 0.13:  # without loading a training is at most 1.15 times as fast
        return "the model is the limit; faster loading would change little"
    return f"the model is the limit; faster loading would give at most {1 / (1 - share):.1f}x"


def seen(steps: pd.DataFrame, device: str) -> str:
    """What limited a training, from its steps.csv: medians over the second half of the rows.

    `device` is "cpu", "cuda" or "mps".
    """
    if len(steps) < 4 or not set(COLUMNS) <= set(steps):
        return "Too few rows to tell what limits the speed; lower log_every for more."
    both, waiting, loader, model = steps[COLUMNS].tail((len(steps) + 1) // 2).median()
    share = min(0.99, both / loader) if device == "cpu" else 0.0
    return (
        f"The training ran at {both:,.0f} images/s. The loader can read {loader:,.0f} images/s, "
        f"the model can train on {model:,.0f} and waited for images {waiting:.0%} of the time: "
        f"{_limit(loader, model, share)}."
    )


def measure(recipe: Recipe, content: data.Dataset, seconds: float = 4.0) -> Speed:
    """Measures loader and model alone for a share of `seconds` each. Raises ModelError."""
    device, threads = training.pick_device(recipe.device), torch.get_num_threads()
    cores = data.available_cpus()
    loaders = max(1, min(training.pick_workers(recipe.workers), cores))
    torch.set_num_threads(1)  # as in a loader process
    try:
        files, cached = _loader_speed(recipe, content.train, seconds / 4)
    finally:
        torch.set_num_threads(threads)
    model = _model_speed(recipe, len(content.classes), device, seconds / 2)
    return Speed(files, cached, model, device.type, cores, loaders, threads)


def _loader_speed(recipe: Recipe, train: pd.DataFrame, seconds: float) -> tuple[float, float]:
    """Images per second of one core, from files and from a cache in memory."""
    transform = training.train_transform(recipe)
    frame = train.iloc[data.epoch_permutation(recipe.seed, 0, len(train))[:512]]
    frame = frame.reset_index(drop=True)

    def speed(frame: pd.DataFrame, cache: SimpleNamespace | None = None) -> float:
        count = spent = 0.0
        options = {"seed": recipe.seed, "batch_size": min(16, len(frame)), "cached": cache}
        for batch in data.train_loader(frame, transform, steps=range(1000), **options):
            if batch.step:  # the first one warms up
                count, spent = count + len(batch.images), spent + batch.seconds
            if spent > seconds:
                break
        return count / spent if count else float("nan")

    files, pixels = speed(frame), []
    paths = frame.path.head(16).tolist()
    for path, content in zip(paths, shard_store.read(paths), strict=True):
        with contextlib.suppress(images.ImageError):  # training quarantines it
            pixels.append(images.Pixels(transform.resize(images.open(path, content))))
    in_memory = SimpleNamespace(image=pixels.__getitem__)  # a pixel cache without a disk
    cached = speed(frame.head(len(pixels)), in_memory) if pixels else float("nan")
    return files, cached


def _model_speed(recipe: Recipe, classes: int, device: torch.device, seconds: float) -> float:
    """Images per second of forward, backward and optimizer step, by the median step."""
    size = min(recipe.micro_batch_size or recipe.batch_size, 256)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    criterion = training.loss_function(recipe)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = training.create_model(recipe, classes).train().to(device, memory_format=layout)
        optimizer = training.create_optimizer(recipe, model)
        batch = torch.randn(size, 3, recipe.image_size, recipe.image_size, device=device)
        batch = batch.contiguous(memory_format=layout)
        targets = torch.arange(size, device=device) % classes

        def step() -> None:
            with training.autocast(recipe.precision, device):
                logits = model(batch)
            criterion(logits.float(), targets).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # Batch norm cannot normalise a single image in training mode.
        with models.eval_mode(model) if size == 1 else contextlib.nullcontext():
            return size / median_seconds(step, device, seconds)


def median_seconds(work: Callable[[], None], device: torch.device, seconds: float = 0.0) -> float:
    """Median duration of at least three calls, for `seconds`; two calls before warm up."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
