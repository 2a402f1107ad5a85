"""Training as a generator: the caller keeps the loop, plots, logs, stops by leaving it.

    run = runs.Run(recipe.folder)
    for row in fit(recipe, run):
        print(row)                   # kind "step" every log_every steps, "epoch" at its end

The same function runs on a CPU, on one GPU and, started by torchrun, on many; rank 0 yields. A
step depends on the recipe, its number and the weights alone, so a killed run goes on bit for bit
(on a CPU, with the same number of threads).
"""

import contextlib
import copy
import datetime
import functools
import hashlib
import math
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
import torch.distributed as dist
from timm.models import group_parameters
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from workbench import (
    CACHE,
    ROOT,
    augmentation,
    batched,
    cache,
    data,
    distillation,
    evaluation,
    losses,
    models,
    runs,
)
from workbench.lamb import LAMB
from workbench.progress import bar
from workbench.schedule import TrainingError, lr_schedule

# ---- what a recipe means, as values a notebook can look at before it trains


def train_transform(recipe: Any) -> augmentation.TrainTransform:
    """The recipe's training transform."""
    return augmentation.TrainTransform(
        size=recipe.image_size,
        crop_scale=tuple(recipe.crop_scale),
        crop_ratio=tuple(recipe.crop_ratio),
        interpolation=recipe.interpolation,
        flip=recipe.flip,
        brightness=recipe.brightness,
        contrast=recipe.contrast,
        saturation=recipe.saturation,
        hue=recipe.hue,
        autoaugment=recipe.autoaugment,
        randaug=_randaug(recipe) if recipe.randaug_n else None,
        shrink=augmentation.Shrink(recipe.train_resize, recipe.interpolation),
        on_device=recipe.augment_on_device,
    )


def _randaug(recipe: Any) -> augmentation.RandAugment:
    increasing = recipe.randaug_increasing
    kind = augmentation.RandAugmentIncreasing if increasing else augmentation.RandAugment
    if recipe.randaug_form == "timm":
        return kind.timm(recipe.randaug_n, recipe.randaug_m, recipe.randaug_std, recipe.mean)
    return kind(recipe.randaug_n, recipe.randaug_m, recipe.randaug_std)


def draw_order(recipe: Any) -> dict[str, Any]:
    """Which images a step shows, as arguments of data.batches and data.Sampler."""
    names = "seed batch_size drop_last repeated_aug class_balance".split()
    return {name: getattr(recipe, name) for name in names}


def test_transform(recipe: Any) -> augmentation.TestTransform:
    """The recipe's validation transform."""
    size = recipe.val_image_size or recipe.image_size
    return augmentation.TestTransform(size, recipe.val_resize, recipe.interpolation)


test_transform.__test__ = False  # pytest: no test


def keep(
    recipe: Any, train: pd.DataFrame, val: pd.DataFrame, progress: bool = True
) -> tuple[cache.Cache, cache.Cache]:
    """The caches of examined frames, complete: training pictures as the crop finds them, and
    validation pictures as the model does. Raises CacheError.
    """
    folder = ROOT / Path(recipe.cache_dir).expanduser() if recipe.cache_dir else CACHE / "pictures"
    caches = (
        cache.Cache(train, train_transform(recipe).shrink, folder),
        cache.Cache(val, test_transform(recipe), folder),
    )
    cache.build(*caches, progress=progress)
    return caches


def mimic_ramp(recipe: Any, steps_per_epoch: int) -> Callable[[int], float]:
    """The share of the mimic loss at a step, counted from 0: grows evenly from 0 to 1."""
    climb = round(recipe.mimic_warmup_epochs * steps_per_epoch)
    return lambda step: min(1.0, step / climb) if climb else 1.0


def loss_function(recipe: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(logits (n, classes), targets (n,) or soft (n, classes)) -> losses (n,) of training."""
    if recipe.loss == "bce":
        return functools.partial(
            losses.binary_cross_entropy,
            smoothing=recipe.label_smoothing,
            threshold=recipe.bce_threshold,
            sum_classes=recipe.bce_sum,
            shift=recipe.bce_shift,
        )
    return functools.partial(
        losses.cross_entropy, smoothing=recipe.label_smoothing, up_smoothing=recipe.up_smoothing
    )


def create_model(recipe: Any, num_classes: int) -> nn.Module:
    """The recipe's model at its seed's initial weights. Raises ModelError, also for its sizes."""
    options = {"drop_path": recipe.drop_path, "dropout": recipe.dropout, "seed": recipe.seed}
    model = models.create(recipe.model, num_classes, **_form(recipe), **options)
    models.check_size(model, recipe.image_size, "image_size", model.default_cfg["input_size"][-1])
    if recipe.val_image_size:
        models.check_size(model, recipe.val_image_size, "val_image_size", recipe.image_size)
    return model


def trained(
    recipe: Any, run: runs.Run, num_classes: int, weights: str = ""
) -> tuple[nn.Module, str, str]:
    """The recipe's model as a run left it, in evaluation mode; raw or ema; the file it is from.

    Of the last checkpoint, without one of the best validated epoch; kind is Run.choose_weights's
    where the run keeps both. Raises RunError, also for nan, or weights that do not fit.
    """
    state = run.load_checkpoint()
    if state is not None and not isinstance(state, dict):
        raise runs.RunError(f"{run.file('last.pt')} holds no checkpoint of a training")
    if state is not None:
        file, kept = "last.pt", {"raw": state.get("model"), "ema": state.get("ema")}
    elif run.file("best.safetensors").exists():
        file = "best.safetensors"
        kind, tensors = run.load_weights(file)
        kept = {"raw": None, "ema": None, kind: tensors}
    else:
        raise runs.RunError(f"{run.path} holds no weights yet (last.pt); train it first")
    only = "ema" if kept["ema"] else "raw"
    kind = run.choose_weights(weights)[0] if all(kept.values()) else weights or only
    if not kept.get(kind):
        have = " and ".join(name for name, tensors in kept.items() if tensors) or "none"
        raise runs.RunError(f"{run.file(file)} keeps no {kind} weights; it has {have}")
    model = create_model(recipe, num_classes)
    try:
        model.load_state_dict(kept[kind])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise runs.RunError(
            f"{run.file(file)} does not fit recipe.yaml and environment.json, {recipe.model} with "
            f"{num_classes} classes: {' '.join(str(error).split())[:300]}"
        ) from None
    for name, values in model.state_dict().items():
        if not torch.isfinite(values).all():
            raise runs.RunError(f"{run.file(file)}: {name} holds nan or infinity")
    return model.eval(), kind, file


def _form(recipe: Any) -> dict[str, Any]:
    return {key: getattr(recipe, key) for key in ("image_size", "deep_stem", "avg_down")}


def starting_model(recipe: Any, classes: list[str]) -> tuple[nn.Module, models.Loaded | None]:
    """The recipe's model where its training starts, and what became of every tensor on the way.

    From `weights` or timm's published ones (`pretrained`); from the seed alone the second is None.
    Raises ModelError.
    """
    model = create_model(recipe, len(classes))
    if recipe.weights:
        force = recipe.force_weights
        loaded = models.load(model, recipe.weights, classes=classes, force=force)
    elif recipe.pretrained:
        loaded = models.load_published(model, recipe.model, **_form(recipe))
    else:
        return model, None
    loaded.note = other_normalization(recipe)
    return model, loaded


def other_normalization(recipe: Any) -> str:
    """Where mean and std are not those with which the starting weights were trained; else empty."""
    ours = theirs = {"mean": recipe.mean, "std": recipe.std}
    if source := recipe.weights or recipe.resume_from:
        theirs = models.run_pixels(ROOT / Path(source).expanduser()) or ours
    elif recipe.pretrained and (published := timm.get_pretrained_cfg(recipe.model)):
        theirs = {key: list(getattr(published, key)) for key in ours}
    told = "{} is {}, and {} where its weights were trained"
    differ = [told.format(k, ours[k], theirs[k]) for k in ours if ours[k] != theirs[k]]
    return " and ".join(differ)


def create_optimizer(
    recipe: Any, model: nn.Module, adapters: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer over what is not frozen, and over a mimic's adapters.

    Its lr is set anew before every step, to that of the schedule times a group's lr_scale.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = lr_scales(model, recipe.layer_decay)
    if adapters is not None:
        named += [(f"adapters.{name}", p) for name, p in adapters.named_parameters()]
    # What timm's models themselves name: position embeddings, class tokens, bias tables.
    spared = getattr(model, "no_weight_decay", set)()
    # What begins later, after probing, has a group of its own: torch's fused SGD wants the momenta
    # of a group to begin together.
    head = models.heads(model) if recipe.probe_epochs else ("",)
    parts: dict[tuple[bool, bool, float], list] = {}
    for name, p in named:
        free = not recipe.decay_all and (p.ndim <= 1 or any(part in name for part in spared))
        first = name.startswith((*head, "adapters."))
        parts.setdefault((free, first, scales.get(name, 1.0)), []).append(p)
    groups = [
        {"params": kept, "lr_scale": scale, **({"weight_decay": 0.0} if free else {})}
        for (free, _, scale), kept in sorted(parts.items(), key=lambda part: part[0][0])
    ]
    shared = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    match recipe.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, **shared, fused=fused)
        case "lamb":  # clips inside its step
            return LAMB(
                groups,
                **shared,
                max_grad_norm=recipe.clip_grad_norm,
                trust_clip=recipe.trust_clip,
                always_adapt=recipe.always_adapt,
            )
    return torch.optim.SGD(
        groups, **shared, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=fused
    )


def lr_scales(model: nn.Module, layer_decay: float | None) -> dict[str, float]:
    """The share of lr by parameter: layer_decay to the power of the layers above it.

    Layers are timm's; the classifier is the last. Bao et al., BEiT, arXiv 2106.08254, appendix.
    """
    if layer_decay is None:
        return {}
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    top = max(layers.values())
    return {name: layer_decay ** (top - layer) for name, layer in layers.items()}


class Normalize:
    """uint8 (n, 3, h, w) on a device -> float32, mean subtracted, divided by std (0-1 scale)."""

    def __init__(self, recipe: Any, device: torch.device):
        shape = (1, 3, 1, 1)
        self.mean = torch.tensor(recipe.mean, device=device).mul(255).reshape(shape)
        self.std = torch.tensor(recipe.std, device=device).mul(255).reshape(shape)
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().sub_(self.mean).div_(self.std).contiguous(memory_format=self.layout)

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images back as uint8 (n, h, w, 3), for looking at."""
        shown = (images * self.std + self.mean).clamp(0, 255)
        return shown.round().byte().permute(0, 2, 3, 1)


class DeviceTransform:
    """A training batch as the model sees it: normalised, erased, mixed, on the device.

    With `augment_on_device` first flipped and so on, as drawn for each picture. Erasing and mixing
    are drawn for the whole step from (seed, step), and each process takes what belongs to its own
    pictures.
    """

    def __init__(self, recipe: Any, classes: int, device: torch.device):
        self.seed, self.size = recipe.seed, recipe.image_size
        self.classes, self.device = classes, device
        self.normalize = Normalize(recipe, device)
        randaug = train_transform(recipe).randaug
        self.fill = randaug.fill if randaug else (0, 0, 0)
        self.erase = self.mix = None
        if recipe.erase_prob:
            self.erase = augmentation.Erase(
                recipe.erase_prob, recipe.erase_mode, recipe.erase_count
            )
        if recipe.mixup_alpha or recipe.cutmix_alpha:
            alphas = recipe.mixup_alpha, recipe.cutmix_alpha
            self.mix = augmentation.Mix(
                *alphas, recipe.switch_prob, recipe.mix_per_sample, recipe.mix_prob
            )

    def __call__(self, batch: data.Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 images (n, 3, h, w) and targets: class numbers (n,), or soft labels (n, C)."""
        images = batch.images.to(self.device, non_blocking=True)
        if batch.draws is not None:
            images = batched.apply(images, batch.draws, self.fill)
        images = self.normalize(images)
        targets = batch.labels.to(self.device, non_blocking=True)
        places = batch.places.numpy()
        if self.erase:
            drawn = self._own(self.erase, data.ERASE, batch, places)
            images = self.erase.apply(images, **drawn)
        if self.mix:
            drawn = self._own(self.mix, data.MIX, batch, places)
            targets = losses.soft(targets, self.classes)
            images, targets = self.mix.apply(images, targets, places, **drawn)
        return images, targets

    def _own(
        self, operation: Any, purpose: int, batch: data.Batch, places: np.ndarray
    ) -> dict[str, np.ndarray]:
        rng = data.stream(self.seed, purpose, batch.step)
        drawn = operation.draw(rng, batch.total, self.size)
        return {key: values[places] for key, values in drawn.items()}


def pick_device(name: str) -> torch.device:
    """The torch device for a recipe's `device`; under torchrun each process has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError("device is cuda, but torch sees no GPU; set device: auto or cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if name == "mps" and not torch.backends.mps.is_available():
        raise TrainingError("device is mps, but torch sees none; set device: auto or cpu")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16: `auto` takes bf16 where the processor computes in it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return "bf16" if any(getattr(torch.cpu, p, bool)() for p in probes) else "fp32"
    return "fp32"


def pick_workers(workers: int | None, world: int = 1) -> int:
    """Loader processes on this machine for one training process."""
    return workers if workers is not None else max(1, min(8, data.cores() // world))


def ema_update(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, norm statistics included, counters copied.

    Constant decay from the first step on, as UP's `linear` EMA with its default warmup.
    """
    averaged, current = [], []
    for kept, value in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            averaged.append(kept)
            current.append(value)
        else:
            kept.copy_(value)
    torch._foreach_lerp_(averaged, current, 1 - decay)


# ---- fit

_live: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()


def fit(
    recipe: Any,
    run: runs.Run,
    *,
    prepared: data.Data | None = None,
    stop: threading.Event | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains a recipe into a run folder, yielding flat rows; goes on where the folder stopped.

    Step rows: kind, step, steps, epoch, lr, loss (mean since the last row), seconds (training time
    so far), images_per_second, data_wait (share of the time), loader_images_per_second (what the
    loaders give while they work), model_images_per_second (the rest of a step without the waiting;
    on a CPU both beside each other). Epoch rows: kind and the columns of
    metrics.csv: epoch, step, lr, train_loss, train_top1, images, val_loss, top1, top5, val_images,
    and ema_val_loss, ema_top1, ema_top5 where EMA is on; validation is None in epochs without. With
    a teacher also task_loss and mimic_loss (train_task_loss, train_mimic_loss), each before its
    weight and ramp; loss = task_weight * task_loss + ramp * mimic_loss.

    Starting point, first that applies: the folder's last.pt (auto_resume), `resume_from`,
    `weights` or `pretrained`, initial weights from the seed. A finished run yields nothing.

    Ctrl-C, SIGTERM, a STOP file in the folder, `stop` and leaving the loop end it at the next
    step: last.pt is written, the state is "stopped", and fit returns normally. A second Ctrl-C
    interrupts at once. `prepared` saves reading the lists again. Raises RunError, DataError,
    ModelError, DistillationError or TrainingError, mostly before the first step.
    """
    key = str(run.path.resolve())
    previous = _live.get(key)
    if previous is not None:  # a loop over this run that an error left open in this process
        try:
            previous.close()
        except ValueError:
            raise TrainingError(
                f"{run.path} is being trained by another thread; stop that first"
            ) from None
    rows = _fit(recipe, run, prepared, stop or threading.Event())
    _live[key] = rows
    return rows


def _fit(
    recipe: Any, run: runs.Run, prepared: data.Data | None, stop: threading.Event
) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(_Team.of(recipe))
        if team.first:
            stack.enter_context(run.writing())
            already = _check_folder(recipe, run)
            if already:
                _check_pictures(recipe, run, prepared)
        if team.any(team.first and already):
            return
        asked = _Asked(run if team.first else None, stop)
        try:
            yield from _train(recipe, run, prepared, team, asked)
        except GeneratorExit:
            raise
        except BaseException as error:
            told = data.lost(error) or error
            state, message = "failed", f"{type(told).__name__}: {told}"[:2000]
            if isinstance(error, KeyboardInterrupt):
                state, message = "stopped", "stopped by Ctrl-C, at once; the same command goes on"
            for _ in range(2 if team.first else 0):  # torch may speak of another loader meanwhile
                with contextlib.suppress(Exception):  # a full disk must not hide the real error
                    run.set_status(state, message=message)
                    break
            if told is error:
                raise
            raise told from None


def _check_folder(recipe: Any, run: runs.Run) -> bool:
    """Whether the run is finished; raises RunError when the folder holds something else."""
    from workbench.recipe import PLACE

    run.clear_stop()
    has_work = run.file("last.pt").exists()
    if has_work and not recipe.auto_resume:
        raise runs.RunError(
            f"{run.path} holds a run and auto_resume is false; give this one another name"
        )
    if has_work and run.file("recipe.yaml").exists():
        there, here = run.recipe(), recipe.model_dump()
        differ = [
            f"{k}: {there.get(k)!r} there, {here[k]!r} here"
            for k in here
            if k not in PLACE and k in there and there[k] != here[k]
        ]
        if differ:
            raise runs.RunError(
                f"{run.path} holds a run of another recipe ({'; '.join(differ)}); give this one "
                f"another name and, to go on from there, resume_from: {run.path}"
            )
    return has_work and run.status()["state"] == "finished"


def _check_pictures(recipe: Any, run: runs.Run, prepared: data.Data | None) -> None:
    """Raises RunError where a finished run was trained on other pictures than are there now."""
    before = run.environment()
    try:
        content = prepared or data.open_data(recipe)
        train, val = content.train, content.val
        if recipe.verify_data:
            train, val = (data.sound(data.examine(f), s)[0] for f, s in ((train, ""), (val, "")))
    except (data.DataError, OSError):
        return  # the pictures are gone; the run is finished all the same
    _check_classes(run, content)
    now = data.fingerprint(data.Data(train, val, content.classes))
    if before.get("data", now) != now:
        raise runs.RunError(
            f"{run.path} is finished, and the pictures have changed since: {len(train):,} for "
            f"training and {len(val):,} for validation now, {before.get('train_images')} and "
            f"{before.get('val_images')} then, or others; give this run another name"
        )


def _check_classes(run: runs.Run, content: data.Data) -> None:
    """Raises RunError or TrainingError where a run was trained for other classes or labels."""
    theirs, ours = models.run_classes(run.path), content.classes
    if not models.same_classes(theirs, ours):
        pairs = [f"{a!r} there, {b!r} here" for a, b in zip(theirs, ours, strict=False) if a != b]
        raise runs.RunError(
            f"{run.path} was trained for {len(theirs)} classes and the data have {len(ours)}, or "
            f"others in another order: {'; '.join(pairs[:5])}; put them back, or give this run "
            "another name and start from `weights`"
        )
    with contextlib.suppress(runs.RunError, OSError, ValueError, KeyError):  # without a table
        both = content.val.merge(run.predictions(), on=["list", "file"], suffixes=("", "_there"))
        moved = both.label != both.label_there
        share = moved.groupby(both.label_there).transform("mean")  # of the images of a class
        other = both[moved & (share > 0.5)]  # a few corrected labels are no other classes
        if other.empty:
            return
        raise TrainingError(
            f"{moved.sum():,} of {len(both):,} validation images have another label than in "
            f"{run.path}, first {other.file.iloc[0]!r}: {other.label_there.iloc[0]} there, "
            f"{other.label.iloc[0]} here; put the labels back, or start from `weights`"
        )


@dataclass
class _Progress:
    """What a checkpoint holds beside weights and optimizer, and what an epoch adds up."""

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0
    # Of the epoch so far, summed over pictures, and of the steps since the last row.
    loss_sum: float = 0.0
    task_sum: float = 0.0
    mimic_sum: float = 0.0
    correct: int = 0
    images: int = 0
    window_sum: float = 0.0
    window_task: float = 0.0
    window_mimic: float = 0.0
    window_steps: int = 0


def _train(
    recipe: Any, run: runs.Run, prepared: data.Data | None, team: "_Team", asked: "_Asked"
) -> Iterator[dict[str, Any]]:
    device = team.device
    precision = pick_precision(recipe.precision, device)
    workers = pick_workers(recipe.workers, team.local_world)
    compilers = [os.environ.get("CXX", "g++")]  # C++ on a CPU; Triton takes a C compiler on a GPU
    compilers += [os.environ.get("CC", "gcc"), "clang"] if device.type != "cpu" else []
    if recipe.compile and not any(map(shutil.which, compilers)):
        raise TrainingError(
            f"compile: torch.compile needs a C++ compiler and found no {compilers[0]}; install "
            "one, name it in the environment variable CXX, or set compile to false"
        )

    content = prepared or data.open_data(recipe)
    # The model first: whether it can train is known before every image is read.
    state = run.load_checkpoint()
    borrowed = state is None
    if state is None and recipe.resume_from:
        state = resumed_state(recipe)
    if state is not None:
        _check_classes(runs.Run(ROOT / recipe.resume_from) if borrowed else run, content)
    started = None
    if state is None:  # else weights need not even be there any more
        model, started = starting_model(recipe, content.classes)
    else:
        model = create_model(recipe, len(content.classes))

    # Data: lists, every picture read once (cached), the unreadable set aside by name.
    train, val, quarantined = content.train, content.val, []
    if recipe.verify_data:
        if not team.first:
            team.any(False)  # the first process reads and remembers, the others look it up
        train, bad = data.sound(data.examine(train, progress=team.first), "train")
        val, bad_val = data.sound(data.examine(val, progress=team.first), "val")
        quarantined = [bad, bad_val]
        if team.first:
            team.any(False)
    steps_per_epoch = data.steps_per_epoch(len(train), recipe.batch_size, recipe.drop_last)
    if steps_per_epoch == 0:
        raise TrainingError(
            f"batch_size {recipe.batch_size} is above the {len(train)} training pictures and "
            "drop_last leaves none; lower batch_size"
        )
    steps = recipe.epochs * steps_per_epoch

    said = f"drawn from seed {recipe.seed}" if started is None else str(started)
    frozen = [models.module(model, name) for name in recipe.freeze]
    _wake(model, frozen)
    batch_norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    norms = any(m.training for m in batch_norms)
    if norms and _smallest_part(len(train), recipe, team.world) == 1:
        raise TrainingError(
            "a forward would hold one image, which batch norm cannot normalise "
            f"({len(train)} images, batch_size {recipe.batch_size}, micro_batch_size "
            f"{recipe.micro_batch_size}); set drop_last: true and batch_size to 2 or more, with no "
            "micro_batch_size or one that is 2 or more and divides it"
        )
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    ema = copy.deepcopy(model).eval().requires_grad_(False) if recipe.ema_decay else None
    kd = None
    if recipe.teacher:
        kd = distillation.Distillation(recipe, model, content.classes, device)
    adapters = kd.student.adapters if kd else None
    optimizer = create_optimizer(recipe, model, adapters)
    progress = _Progress()
    if state is not None:
        _restore(state, model, ema, adapters, optimizer, progress, steps, steps_per_epoch)
        said = f"goes on after step {progress.step}"
        said += f" of {recipe.resume_from}" if borrowed else ""
        if borrowed and progress.step == steps:
            raise runs.RunError(
                f"resume_from {recipe.resume_from!r} stands at step {steps}, and this recipe "
                f"ends at {steps}; use `weights`, or more epochs"
            )
    student = kd.student if kd else model
    rate, ramp = lr_schedule(recipe, steps_per_epoch), mimic_ramp(recipe, steps_per_epoch)
    normalize = Normalize(recipe, device)
    prepare = DeviceTransform(recipe, len(content.classes), device)
    criterion = loss_function(recipe)
    autocast = lambda: torch.autocast(  # noqa: E731
        device.type, torch.bfloat16, enabled=precision == "bf16"
    )

    trained = set(train.label)
    environment = {
        **_environment(device),
        "precision": precision,
        "processes": team.world,
        "distributed": dist.get_backend() if team.side else None,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "parameters": models.parameters(model),
        "train_images": len(train),
        "val_images": len(val),
        "classes": content.classes,
        "data": data.fingerprint(data.Data(train, val, content.classes)),
        "val_data": data.fingerprint(data.Data(train.iloc[:0], val, content.classes)),
        "recipe": recipe.fingerprint,
        "steps_per_epoch": steps_per_epoch,
        "shrunk": int((train[["width", "height"]].min(axis=1) > recipe.train_resize).sum())
        if recipe.train_resize and recipe.verify_data
        else None,
        "in_both": int(val.digest.isin(train.digest).sum()) if recipe.verify_data else None,
        "passed_over": data.passed_over(content.passed),
        "without_pictures": [c for i, c in enumerate(content.classes) if i not in trained],
        "start": said,
    }
    if kd:
        environment["teachers"] = kd.record()
        if recipe.cache_teacher:
            same = "data precision processes threads torch torchvision timm numpy pillow device"
            environment["teacher_cache"] = kd.keep(
                steps_per_epoch, **{k: environment[k] for k in same.split()}, code=_code()
            )
    if team.first:
        before = run.environment()
        if state is not None and before.get("data", environment["data"]) != environment["data"]:
            raise runs.RunError(
                f"the data changed since {run.path} was started (fingerprint {before['data']}, now "
                f"{environment['data']}); put the pictures back, or give this run another name"
            )
        if state is not None and kd:
            _same_teachers(run, before, environment)
        run.rewind(progress.step)
        with run.replacing("recipe.yaml") as temporary:
            recipe.write(temporary)
        if not run.file("quarantine.csv").exists():
            columns = ["side", "file", "label", "reason", "detail", "step"]
            run.save_frame("quarantine.csv", _concat([pd.DataFrame(columns=columns), *quarantined]))
        if started is not None:
            run.save_frame("start.csv", started.table())
        run.write_json("environment.json", {**environment, "seconds": progress.seconds})
        run.set_status("running", step=progress.step, steps=steps, message="")

    def finite() -> None:
        """Raises TrainingError when a weight or a norm's statistic is not."""
        if not all(torch.isfinite(v).all() for v in student.state_dict().values()):
            _not_finite(run if team.first else None, train, recipe, progress.step - 1, float("nan"))

    def checkpoint() -> None:
        if not team.first:
            return
        finite()
        run.save_checkpoint(
            {
                "model": model.state_dict(),
                "ema": ema.state_dict() if ema else None,
                "adapters": adapters.state_dict() if kd else None,
                "optimizer": optimizer.state_dict(),
                "progress": dict(vars(progress)),
                "steps_per_epoch": steps_per_epoch,
            }
        )
        if kd and kd.kept:
            environment["teacher_answers"] = {"asked": kd.kept.asked, "read": kd.kept.found}
        run.write_json("environment.json", {**environment, **_usage(device, progress.seconds)})
        run.set_status("running", step=progress.step, steps=steps)

    def validate() -> dict[str, Any]:
        """The validation columns; predictions.parquet and best.safetensors on the way."""
        for network in (model, ema) if ema else (model,):
            team.average_buffers(network)
        frames, columns = {}, {}
        for weights, network in {"raw": model, **({"ema": ema} if ema else {})}.items():
            batches = data.eval_batches(
                val,
                test_transform(recipe),
                batch_size=max(64, min(256, recipe.micro_batch_size or recipe.batch_size)),
                rank=team.rank,
                world=team.world,
                workers=_eval_workers(workers, val, cached_val),
                pin_memory=device.type == "cuda",
                cached=cached_val,
            )
            own = evaluation.predict(network, batches, normalize, device)
            _quarantine(run, "val", val, own.attrs.pop("failures"), named_val, progress.step)
            frames[weights] = team.gather(own)
            result = evaluation.summary(frames[weights])
            prefix = "ema_" if weights == "ema" else ""
            columns |= {f"{prefix}{k}": v for k, v in result.items() if k != "val_images"}
            columns["val_images"] = result["val_images"]
        if team.first:
            for weights, frame in frames.items():
                _named(frame, val).insert(0, "weights", weights)
            run.save_frame("predictions.parquet", _concat(frames.values()))
            top1, network = max(
                [(columns["top1"], "raw")] + ([(columns["ema_top1"], "ema")] if ema else [])
            )
            if top1 > progress.best:
                progress.best = top1
                chosen = ema if network == "ema" else model
                metadata = {"weights": network, "top1": top1, "step": progress.step}
                run.save_weights("best.safetensors", chosen.state_dict(), metadata)
        return columns

    cached = cached_val = None
    if recipe.cache:  # after all that is checked, since it may take hours
        if not team.first:
            team.any(False)
        cached, cached_val = keep(recipe, train, val, progress=team.first)
        environment["cache_mb"] = round((cached.bytes + cached_val.bytes) / 1e6, 3)
        if team.first:
            team.any(False)
    reader = data.batches(
        train,
        train_transform(recipe),
        **draw_order(recipe),
        steps=range(progress.step, steps),
        micro_batch_size=recipe.micro_batch_size,
        rank=team.rank,
        world=team.world,
        workers=workers,
        pin_memory=device.type == "cuda",
        cached=cached,
    )

    # Losses stay on the device until a row is due: asking for one earlier would stall a GPU.
    # Per step: loss summed over pictures and correct answers of each part in turn, pictures read.
    pending: list[tuple[list[torch.Tensor], int]] = []
    seen = waited = loading = own = 0.0
    known = run.quarantine().reindex(columns=["side", "file"])
    named, named_val = (
        set(np.flatnonzero(f.file.isin(known.file[known.side == side])).tolist())
        for side, f in (("train", train), ("val", val))
    )
    mark = clock = saved = time.monotonic()
    saved_step = -1

    def settle() -> None:
        """Adds the pending steps to the sums. Raises TrainingError when a loss is not finite."""
        if not pending:
            return
        flat = [value.double() for parts, _ in pending for value in parts]
        fetched = iter(torch.stack(flat).tolist() if flat else ())
        sums = []
        for parts, read in pending:
            columns = [[next(fetched) for _ in range(4)] for _ in range(len(parts) // 4)]
            sums.append([sum(column) for column in zip(*columns, strict=True)] or [0.0] * 4)
            sums[-1].append(read)
        values = team.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        first = progress.step - len(pending)
        for step, (loss, task, taught, correct, images) in enumerate(values, first):
            if not math.isfinite(loss):
                _not_finite(run if team.first else None, train, recipe, step, loss)
            progress.window_sum += loss / max(1, images)
            progress.window_task += task / max(1, images)
            progress.window_mimic += taught / max(1, images)
            progress.window_steps += 1
            progress.loss_sum += loss
            progress.task_sum += task
            progress.mimic_sum += taught
            progress.correct += round(correct)
            progress.images += round(images)
        pending.clear()

    def apart(prefix: str, task: float, taught: float, count: int) -> dict[str, float]:
        """With a teacher both losses, each before its weight in the sum."""
        means = {f"{prefix}task_loss": task, f"{prefix}mimic_loss": taught}
        return {key: total / max(1, count) for key, total in means.items()} if kd else {}

    wrapped, probing = None, None
    asked.listen()  # from here on Ctrl-C waits for the step; before, it interrupts at once
    try:
        while progress.step < steps:
            # One optimizer step: read, forward, backward, clip, update, average.
            step = progress.step
            if probing is not (probe := step < recipe.probe_epochs * steps_per_epoch):
                probing = probe
                head = [models.module(model, name[:-1]) for name in models.heads(model)]
                _wake(model, frozen, head if probe else None)
                wrapped = team.wrap(student)  # gradients are shared for what learns from here on
                if recipe.compile:  # a kernel per shape: the same ones before and after a resume
                    wrapped = torch.compile(wrapped, dynamic=False)
            lr = rate(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            _seed(device, data.step_seed(recipe.seed, step, team.rank))  # dropout, drop path
            parts: list[torch.Tensor] = []
            read = 0
            last = False
            while not last:
                before = time.monotonic()
                batch = next(reader)
                waited += time.monotonic() - before
                loading += batch.seconds
                own += len(batch.labels)
                last = batch.last
                _quarantine(run, "train", train, batch.failures, named, step)
                count = len(batch.labels)
                with wrapped.no_sync() if team.side and not last else _nothing:
                    if count:
                        images, targets = prepare(batch)
                        alone = norms and count == 1  # the others of its part vanished
                        with models.evaluating(model) if alone else _nothing, autocast():
                            logits, features = wrapped(images) if kd else (wrapped(images), {})
                            lesson = kd.lesson(images, batch) if kd else None
                        logits = logits.float()
                        loss = task = criterion(logits, targets).sum()
                        taught = loss.new_zeros(())
                        if kd:
                            taught = kd.loss(logits, features, lesson, targets) * count
                            loss = recipe.task_weight * task + ramp(step) * taught
                        wanted = targets if targets.ndim == 1 else targets.argmax(1)
                        correct = (logits.detach().argmax(1) == wanted).sum()
                        parts += [loss.detach(), task.detach(), taught.detach(), correct]
                        read += count
                    else:  # no picture for this process in a small last batch: gradients of zero
                        loss = _zero(wrapped, student, recipe, device)
                    # The mean over the step's pictures; DDP divides by the number of processes.
                    (loss * (team.world / batch.total)).backward()
            if recipe.clip_grad_norm and recipe.optimizer != "lamb":
                nn.utils.clip_grad_norm_(student.parameters(), recipe.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema_update(ema, model, recipe.ema_decay)
            pending.append((parts, read))
            seen += batch.total
            progress.step = step = step + 1

            # Bookkeeping: now and then a row, at the end of an epoch validation, then the
            # checkpoint. Rows are handed out last, so whoever leaves the loop there loses nothing.
            epoch, epoch_ends = -(-step // steps_per_epoch), step % steps_per_epoch == 0
            row_due = epoch_ends or step % recipe.log_every == 0
            save_due = epoch_ends or time.monotonic() - saved >= 60 * recipe.checkpoint_minutes
            code = team.max(2 if asked.reason() else 1 if save_due else 0)
            if not (row_due or code):
                continue
            settle()
            now = time.monotonic()
            progress.seconds += now - clock
            clock = now
            rows = []
            if row_due:
                row = {
                    "step": step,
                    "epoch": epoch,
                    "lr": lr,
                    "loss": progress.window_sum / progress.window_steps,
                    **apart("", progress.window_task, progress.window_mimic, progress.window_steps),
                    "seconds": round(progress.seconds, 3),
                    "images_per_second": round(seen / max(1e-9, now - mark), 1),
                    "data_wait": round(waited / max(1e-9, now - mark), 3),
                    "loader_images_per_second": round(
                        own * team.world * max(1, workers) / max(1e-9, loading), 1
                    ),
                    "model_images_per_second": round(seen / max(1e-9, now - mark - waited), 1),
                }
                rows.append(("steps.csv", {"kind": "step", "steps": steps, **row}))
                progress.window_sum, progress.window_steps = 0.0, 0
                progress.window_task = progress.window_mimic = 0.0
                seen = waited = loading = own = 0.0
            if epoch_ends:
                finite()
                row = {
                    "epoch": epoch,
                    "step": step,
                    "lr": lr,
                    "train_loss": progress.loss_sum / max(1, progress.images),
                    **apart("train_", progress.task_sum, progress.mimic_sum, progress.images),
                    "train_top1": 100 * progress.correct / max(1, progress.images),
                    "images": progress.images,
                    **_no_validation(ema is not None),
                }
                if epoch % recipe.val_every == 0 or step == steps:
                    row |= validate()
                rows.append(("metrics.csv", {"kind": "epoch", "steps": steps, **row}))
                progress.loss_sum = progress.task_sum = progress.mimic_sum = 0.0
                progress.correct = progress.images = 0
                progress.seconds += time.monotonic() - clock
            if team.first:
                for name, row in rows:
                    run.append(name, {k: v for k, v in row.items() if k not in ("kind", "steps")})
            if code:
                checkpoint()
                saved, saved_step = time.monotonic(), step
            if team.first:
                for _, row in rows:
                    yield row
            if code == 2 and step < steps:
                if team.first:
                    _stopped(run, asked.reason(), step, steps, epoch)
                return
            clock = time.monotonic()
            mark = clock if row_due else mark
        if team.first:
            _finished(run, steps, recipe)
    except GeneratorExit:
        if team.first:
            if saved_step != progress.step:
                checkpoint()
            if progress.step < steps:
                epoch = -(-progress.step // steps_per_epoch)
                _stopped(run, "leaving the loop", progress.step, steps, epoch)
            else:
                _finished(run, steps, recipe)
        raise
    finally:
        asked.leave()
        reader = None  # ends the loader's processes, also while a traceback holds this frame


_nothing = contextlib.nullcontext()


def _seed(device: torch.device, seed: int) -> None:
    """Seeds what a model draws from; torch.manual_seed would cost a millisecond without a GPU."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _smallest_part(count: int, recipe: Any, world: int) -> int:
    """The fewest pictures any forward of an epoch gets."""
    last = recipe.batch_size if recipe.drop_last else count % recipe.batch_size or recipe.batch_size
    sizes = []
    for total in {min(count, recipe.batch_size), last}:
        for own in {len(data.own_places(total, rank, world)) for rank in range(world)} - {0}:
            sizes.append(own % (recipe.micro_batch_size or own) or recipe.micro_batch_size or own)
    return min(sizes)


def _wake(model: nn.Module, frozen: list[nn.Module], only: list[nn.Module] | None = None) -> None:
    """Training mode and gradients for all but what is frozen; for the parts `only` where given.

    What sleeps keeps its weights and its norms' statistics.
    """
    model.train(only is None).requires_grad_(only is None)
    for part in only or ():
        part.train().requires_grad_(True)
    for part in frozen:
        part.eval().requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("freeze leaves nothing to train; name fewer modules")


def _zero(wrapped: nn.Module, student: nn.Module, recipe: Any, device: torch.device):
    """A zero that depends on every weight, without touching the norms' running statistics."""
    with models.evaluating(student):
        blank = torch.zeros(1, 3, recipe.image_size, recipe.image_size, device=device)
        given = wrapped(blank)
        logits, features = given if isinstance(given, tuple) else (given, {})
        return sum(out.float().sum() for out in (logits, *features.values())) * 0.0


def resumed_state(recipe: Any) -> dict[str, Any]:
    """The checkpoint of the recipe's `resume_from`. Raises RunError when there is none."""
    state = runs.Run(ROOT / recipe.resume_from).load_checkpoint()
    if state is None:
        raise runs.RunError(f"resume_from {recipe.resume_from!r} has no last.pt")
    return state


def _no_validation(ema: bool) -> dict[str, Any]:
    columns = ["val_loss", "top1", "top5", "val_images"]
    return dict.fromkeys(columns + (["ema_val_loss", "ema_top1", "ema_top5"] if ema else []))


def _concat(frames: Any) -> Any:
    return pd.concat([f for f in frames if len(f)] or list(frames)[:1], ignore_index=True)


def _restore(
    state: dict[str, Any],
    model: nn.Module,
    ema: nn.Module | None,
    adapters: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    progress: _Progress,
    steps: int,
    steps_per_epoch: int,
) -> None:
    try:
        if state["steps_per_epoch"] != steps_per_epoch:
            raise ValueError(
                f"an epoch had {state['steps_per_epoch']} steps, now {steps_per_epoch}"
            )
        model.load_state_dict(state["model"])
        if ema is not None:
            ema.load_state_dict(state["ema"] if state["ema"] is not None else state["model"])
        if adapters is not None:
            adapters.load_state_dict(state.get("adapters") or {})
        optimizer.load_state_dict(state["optimizer"])
        vars(progress).update(state["progress"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise runs.RunError(
            f"last.pt does not fit this recipe ({str(error).splitlines()[0]}); use `weights` to "
            "start from another model's weights, or another name to start anew"
        ) from None
    if progress.step > steps:
        raise runs.RunError(
            f"last.pt stands at step {progress.step}, this recipe ends at {steps}; use `weights`"
        )


def _same_teachers(run: runs.Run, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises RunError when a teacher's weights are no longer those the run began with."""
    theirs = [teacher["digest"] for teacher in before.get("teachers", now["teachers"])]
    for teacher, digest in zip(now["teachers"], theirs, strict=False):
        if teacher["digest"] != digest:
            raise runs.RunError(
                f"the teacher {teacher['source']} changed since {run.path} was started (weights "
                f"{digest}, now {teacher['digest']}); put it back, or give this run another name"
            )


def _quarantine(
    run: runs.Run, side: str, frame: Any, failures: list, named: set[int], step: int
) -> None:
    """A picture that was sound before training and is not now: left out, named, never swapped."""
    for row, reason, detail in failures:
        if row in named:
            continue
        named.add(row)
        file, label = frame.file.iloc[row], int(frame.label.iloc[row])
        entry = {"side": side, "file": file, "label": label, "reason": reason, "detail": detail}
        run.append("quarantine.csv", {**entry, "step": step})


def _not_finite(run: runs.Run | None, train: Any, recipe: Any, step: int, loss: float) -> None:
    """Names the step and its pictures. The weights are spoilt from there on: nothing is saved."""
    rows, _ = data.Sampler(train.label, **draw_order(recipe)).rows(step)
    batch = train.iloc[rows]
    if run is not None:
        run.save_frame("nonfinite.csv", batch[["file", "label"]].assign(step=step))
    first = ", ".join(repr(f) for f in batch.file.head(3))
    raise TrainingError(
        f"the loss is {loss} at step {step}; its {len(batch)} pictures ({first}, ...) are listed "
        "in nonfinite.csv. Nothing was saved since the last checkpoint. Most often lr is too high "
        "or the warm-up too short; try a smaller lr, clip_grad_norm, or precision: fp32, under "
        "another name"
    )


def _stopped(run: runs.Run, why: str | None, step: int, steps: int, epoch: int) -> None:
    message = (
        f"stopped by {why or 'another process'} after step {step} of {steps} (epoch {epoch}); "
        "the same command goes on from there"
    )
    run.clear_stop()
    run.set_status("stopped", step=step, steps=steps, message=message)


def _finished(run: runs.Run, steps: int, recipe: Any) -> None:
    run.clear_stop()
    metrics = run.metrics().iloc[-1]
    ema = f", EMA {metrics.ema_top1:.2f} %" if "ema_top1" in metrics else ""
    message = (
        f"finished: top-1 {metrics.top1:.2f} %{ema} of {int(metrics.val_images)} validation "
        f"pictures after {recipe.epochs} epochs"
    )
    run.set_status("finished", step=steps, steps=steps, message=message)


def is_first() -> bool:
    """Whether this process is the one that writes and speaks, under torchrun or alone."""
    return int(os.environ.get("RANK", 0)) == 0


def first_pictures(
    recipe: Any, content: data.Data, count: int = 24
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first pictures of step 0 as the model sees them: DeviceTransform's images and targets.

    `count` is even, so that no picture misses the partner it is mixed with.
    """
    batch = next(
        data.batches(
            content.train,
            train_transform(recipe),
            **draw_order(recipe),
            steps=range(1),
            micro_batch_size=count,
        )
    )
    return DeviceTransform(recipe, len(content.classes), torch.device("cpu"))(batch)


def predictions(recipe: Any, content: data.Data, model: nn.Module) -> pd.DataFrame:
    """A row per validation picture as a run keeps it, from any model of the recipe's pictures.

    evaluation.predict's columns with file and list before them; the model stays on its device.
    """
    device = next(model.parameters()).device
    transform, workers = test_transform(recipe), pick_workers(recipe.workers)
    batches = data.eval_batches(
        content.val, transform, batch_size=64, workers=_eval_workers(workers, content.val)
    )
    with bar(len(content.val), "validation", "img") as shown:
        normalize = Normalize(recipe, device)
        frame = evaluation.predict(model, batches, normalize, device, shown.update)
    return _named(frame, content.val)


def _eval_workers(workers: int, val: pd.DataFrame, cached: Any = None) -> int:
    """Loader processes for an evaluation; none where starting them takes longer than reading."""
    large = cached is None and "width" in val and (val.width * val.height).sum() > 1e8
    return workers if large or len(val) > 2000 else 0


def _named(frame: pd.DataFrame, val: pd.DataFrame) -> pd.DataFrame:
    frame.insert(0, "list", val.list.to_numpy()[frame.row])
    frame.insert(0, "file", val.file.to_numpy()[frame.row])
    return frame


def first_loss(recipe: Any, content: data.Data, model: nn.Module, pictures: int = 64) -> float:
    """The cross-entropy of the model on the first pictures of step 0, neither erased nor mixed.

    Near log(classes) for a fresh model.
    """
    batch = next(
        data.batches(
            content.train,
            replace(train_transform(recipe), on_device=False),
            seed=recipe.seed,
            batch_size=min(pictures, len(content.train)),
            steps=range(1),
        )
    )
    device = next(model.parameters()).device
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        logits = model(Normalize(recipe, device)(batch.images.to(device)))
    return F.cross_entropy(logits.float(), batch.labels.to(device)).item()


# ---- who asks for a stop


class _Asked:
    """Notices Ctrl-C, SIGTERM, the STOP file and an event, without interrupting a step."""

    def __init__(self, run: runs.Run | None, event: threading.Event):
        self.run, self.event = run, event
        self.signal: str | None = None
        self.next_look = 0.0
        self.file = False
        self.old: dict[int, Any] = {}

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old[number] = signal.signal(number, self._noted)

    def leave(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _noted(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:  # the second Ctrl-C means now
            raise KeyboardInterrupt
        self.signal = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"

    def reason(self) -> str | None:
        """What asked for a stop, None when nothing did."""
        if self.signal:
            return self.signal
        if self.event.is_set():
            return "the stop event"
        if self.run is not None and (start := time.monotonic()) >= self.next_look:
            self.file = self.run.stop_requested()
            end = time.monotonic()
            self.next_look = end + 50 * (end - start)  # at most 2 % of the time, on any disk
        return "the STOP file" if self.file else None


# ---- one process or many


class _Team:
    """The processes torchrun started, or this one alone. Small things are agreed over gloo."""

    def __init__(self, device: torch.device, rank: int, world: int, local_world: int):
        self.device, self.rank, self.world, self.local_world = device, rank, world, local_world
        self.first = rank == 0
        self.side: Any = None

    @classmethod
    @contextlib.contextmanager
    def of(cls, recipe: Any) -> Iterator["_Team"]:
        device = pick_device(recipe.device)
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not dist.is_torchelastic_launched():
            yield cls(device, 0, 1, 1)
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            team = cls(device, dist.get_rank(), dist.get_world_size(), local_world)
            if team.world > 1 and 2 * team.world > recipe.batch_size:
                raise TrainingError(
                    f"batch_size {recipe.batch_size} cannot be shared by {team.world} processes; "
                    "each takes two pictures or more"
                )
            # A first look at a million pictures takes its time; the others wait for it here.
            team.side = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
            yield team
        finally:
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.side is None:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # its successor would overwrite buffers at the start
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def max(self, code: int) -> int:
        """The largest of all processes' codes: they stop and save at the same step."""
        if self.side is None:
            return code
        value = torch.tensor(code)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.side)
        return int(value)

    def any(self, flag: bool) -> bool:
        return bool(self.max(int(flag)))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes of a CPU tensor."""
        if self.side is not None:
            dist.all_reduce(values, group=self.side)
        return values

    def average_buffers(self, model: nn.Module) -> None:
        """Norm statistics: each process saw its own pictures, the mean stands for all.

        Of frozen ones, the same everywhere, the mean in float64 is what they are, to the bit.
        """
        if self.side is None:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                mean = buffer.double()
                dist.all_reduce(mean)
                buffer.copy_(mean / self.world)

    def gather(self, frame: Any) -> Any:
        """All processes' rows, in the order of the validation list."""
        if self.side is None:
            return frame
        frames: list[Any] = [None] * self.world
        dist.all_gather_object(frames, frame, group=self.side)
        return _concat(frames).sort_values("row", ignore_index=True)


# ---- the record


def _environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and device; nothing that would name a user."""
    import PIL
    import timm
    import torchvision

    from workbench import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "workbench": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "platform": platform.platform(terse=True),
        "device": name,
    }


def processor() -> str:
    """The name of this machine's CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {data.cores()} cores"


def _commit() -> str:
    """The checkout's commit, with "+changes" when files differ from it; empty outside of git."""
    try:
        call = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return call("rev-parse", "HEAD") + (
            "+changes" if call("status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return ""


def _code() -> str:
    """Twelve hex digits over our own code that decides what a teacher is shown."""
    names = "augmentation batched data distillation images operations".split()
    text = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(text).hexdigest()[:12]


def _usage(device: torch.device, seconds: float) -> dict[str, Any]:
    import resource

    usage = {"seconds": round(seconds, 3)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    usage["peak_memory_mb"] = round(peak / (1024 if platform.system() == "Linux" else 1024**2))
    if device.type == "cuda":
        usage["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    return usage
