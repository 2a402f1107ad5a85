"""Whether a recipe's teachers are of use to its student, measured by running them."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from workbench import data, distillation, models, schedule, training
from workbench.doctor.rules import Finding
from workbench.progress import bar
from workbench.recipe import Recipe
from workbench.recipe_checks import losses_with_temperature

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0  # range of best_temperature


def teacher_report(
    recipe: Recipe,
    content: data.Dataset,
    *,
    max_images: int = 2048,
    max_val_images: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Runs the recipe's teachers on training crops and validation images; a row per teacher.

    Crops are the first `max_images` training images, augmented and mixed; `max_val_images` limits
    the validation list to evenly spaced images. Columns:

    teacher, model, parameters, smoothing, state: of the teacher and its run
    own_top1, val_top1, crops_top1: in its run (or nan), of `val_images` validation images at the
        student's size, of `crops` crops (a mixed label counts by its larger share)
    entropy: mean of the softmax of the crops, nats
    offset: mean logit, in standard deviations of an image's logits
    bce: trained with binary cross-entropy, by its run or else a clearly negative offset
    temperature: see best_temperature
    agreement, start_top1: how often the initial student predicts the same, and is correct
    step_share: of the time of a step; as all shares from 0 to 100

    Raises DistillationError or ModelError.
    """
    device = training.pick_device(recipe.device)
    bf16 = training.pick_precision(recipe.precision, device) == "bf16"
    kd = _initial_distillation(recipe, content.classes, device)
    model = kd.student.model
    step = math.ceil(len(content.val) / (max_val_images or len(content.val)))
    val = content.val.iloc[::step].reset_index(drop=True)
    total = min(max_images, len(content.train)) + len(val)
    first, crops, predictions = None, [], []
    with bar(total, "running the teachers", "img") if progress else _NoBar() as shown:

        def logits(images: Tensor) -> list[np.ndarray]:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                outputs = kd.teacher_outputs(images)
            shown.update(len(images))
            return [output.logits.float().cpu().numpy() for output in outputs]

        for images, targets in _crops(recipe, content, device, max_images):
            first = first or (images, targets)
            hard = targets if targets.ndim == 1 else targets.argmax(1)
            crops.append((hard.cpu().numpy(), *logits(images)))
        with models.eval_mode(model), torch.no_grad():
            for images, labels in _validation_batches(recipe, val, device):
                start = model(images).argmax(1).cpu().numpy()
                predictions.append((labels.numpy(), start, *logits(images)))
    targets, *crop_logits = (np.concatenate(parts) for parts in zip(*crops, strict=True))
    labels, start, *val_logits = (np.concatenate(p) for p in zip(*predictions, strict=True))
    shares = step_shares(recipe, kd, *first, bf16)
    return pd.DataFrame(
        _row(teacher, crop, targets, z, labels, start) | {"step_share": 100 * share}
        for teacher, crop, z, share in zip(
            kd.teachers, crop_logits, val_logits, shares, strict=True
        )
    )


def _initial_distillation(
    recipe: Recipe, classes: list[str], device: torch.device
) -> distillation.Distillation:
    model, _ = training.build_initial_model(recipe, classes)
    if recipe.resume_from:
        model.load_state_dict(training.resumed_state(recipe)["model"])
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    return distillation.Distillation(recipe, model, classes, device)


class _NoBar(contextlib.nullcontext):
    def __enter__(self) -> "_NoBar":
        return self

    def update(self, count: int) -> None:
        pass


def _crops(
    recipe: Recipe, content: data.Dataset, device: torch.device, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training batches, augmented and mixed, until they hold `count` images."""
    steps = schedule.steps_per_epoch(len(content.train), recipe.batch_size, recipe.drop_last)
    prepare = training.DeviceTransform(recipe, len(content.classes), device)
    for batch in data.train_loader(
        content.train,
        training.train_transform(recipe),
        **training.sampler_options(recipe),
        steps=range(steps),
        micro_batch_size=min(recipe.micro_batch_size or 256, 256),
    ):
        if len(batch.labels):
            yield prepare(batch)
            count -= len(batch.labels)
            if count <= 0:
                break


def _validation_batches(
    recipe: Recipe, val: pd.DataFrame, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images on the device, and labels."""
    normalize = training.Normalize(recipe, device)
    workers = training.pick_workers(recipe.workers) if len(val) > 2000 else 0
    transform = training.eval_transform(recipe)
    for batch in data.eval_loader(val, transform, batch_size=64, workers=workers):
        if len(batch.labels):
            yield normalize(batch.images.to(device)), batch.labels


def _row(
    teacher: distillation.Teacher,
    crop: np.ndarray,
    targets: np.ndarray,
    z: np.ndarray,
    labels: np.ndarray,
    start: np.ndarray,
) -> dict[str, Any]:
    """Columns of the report from logits of the crops and of the validation images."""
    offset = float((z.mean(1) / z.std(1).clip(1e-9)).mean())
    log_p = F.log_softmax(torch.from_numpy(crop).double(), 1)
    return {
        "teacher": teacher.source,
        "model": teacher.name,
        "parameters": sum(p.numel() for p in teacher.model.parameters()),
        "own_top1": math.nan if teacher.top1 is None else teacher.top1,
        "val_top1": 100 * float((z.argmax(1) == labels).mean()),
        "val_images": len(labels),
        "crops_top1": 100 * float((crop.argmax(1) == targets).mean()),
        "crops": len(targets),
        "entropy": float(-(log_p.exp() * log_p).sum(1).mean()),
        "offset": offset,
        "bce": teacher.loss == "bce" if teacher.loss else offset < -0.2,
        "temperature": best_temperature(z, labels),
        "agreement": 100 * float((z.argmax(1) == start).mean()),
        "start_top1": 100 * float((start == labels).mean()),
        "smoothing": teacher.smoothing,
        "state": teacher.state,
    }


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T of the smallest mean cross-entropy of softmax(logits / T), within 2 %, 0.05 to 20.

    Guo et al., arXiv 1706.04599, section 4.2.
    """
    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    grid = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 301)
    return float(grid[np.argmin([F.cross_entropy(z / t, y).item() for t in grid])])


def step_shares(
    recipe: Recipe, kd: distillation.Distillation, images: Tensor, targets: Tensor, bf16: bool
) -> list[float]:
    """The share of the time of a step (forward and backward) that each teacher takes."""
    device = images.device

    def student_step() -> None:
        with models.eval_mode(kd.student):  # leaves batch-norm statistics unchanged
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits, _ = kd.student(images)
            training.loss_function(recipe)(logits.float(), targets).sum().backward()
        kd.student.zero_grad(set_to_none=True)

    def teacher_step(adapter: distillation.TeacherAdapter) -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            adapter(images)

    adapters = [distillation.TeacherAdapter(teacher, recipe) for teacher in kd.teachers]
    seconds = [_median_seconds(lambda a=a: teacher_step(a), device) for a in adapters]
    total = _median_seconds(student_step, device) + sum(seconds)
    return [part / total for part in seconds]


def _median_seconds(work: Callable[[], None], device: torch.device) -> float:
    """Median duration of three calls, after one to warm up."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    work()
    times = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ---- findings


def teacher_findings(recipe: Recipe, report: pd.DataFrame) -> list[Finding]:
    """The rows of `teacher_report` in sentences: a fact per teacher, then warnings."""
    facts = [Finding("fact", _fact(row)) for row in report.itertuples()]
    warnings = [
        Finding("warning", f"teacher {row.teacher}: {text}", source)
        for row in report.itertuples()
        for text, source in _warnings(recipe, row)
    ]
    return facts + warnings


def _fact(row: Any) -> str:
    own = "" if math.isnan(row.own_top1) else f" ({row.own_top1:.2f} % in its own run)"
    return (
        f"teacher {row.teacher}, {row.model}, {row.parameters / 1e6:.1f} million parameters: top-1 "
        f"{row.val_top1:.2f} % of {row.val_images:,} validation images at the student's size"
        f"{own}, {row.crops_top1:.1f} % of {row.crops:,} training crops and mixes, with an "
        f"entropy of {row.entropy:.2f} nats; its best softmax temperature is "
        f"{row.temperature:.2f}; the initial student agrees with it on {row.agreement:.1f} %; it "
        f"takes {row.step_share:.0f} % of a step."
    )


def _warnings(recipe: Recipe, row: Any) -> Iterator[tuple[str, str]]:
    losses = set(recipe.kd_loss)
    if row.bce:
        text = f"was probably trained with binary cross-entropy (mean logit {row.offset:+.2f} sd)"
        if losses & {*losses_with_temperature} - {"kl_standardized_logits"}:
            yield (
                f"{text}, so its softmax at temperature 1 is not calibrated: "
                f"{_temperature_advice(recipe, row)}",
                "the mean logit; arXiv 2110.00476 trains so; arXiv 1706.04599",
            )
        if "up_kl" in losses:
            yield (
                f"{text}, and up_kl ignores negative logits, which are nearly all of them: use kl "
                "with its best temperature, or kl_standardized_logits",
                "the mean logit; arXiv 2110.00476 trains so",
            )
    if row.state != "finished":
        yield f"its run is {row.state}; finish its training first", "its run folder"
    if (row.smoothing or 0) > 0 and losses & {"kl", "ce", "up_kl", "dkd"}:
        yield (
            f"was trained with label smoothing {row.smoothing:g}, which removes the information in "
            "the logits of wrong classes; train it without, or compare layers",
            "arXiv 1906.02629, section 5",
        )
    if row.start_top1 >= row.val_top1:
        yield (
            f"the initial student has top-1 {row.start_top1:.2f} % already, the teacher "
            f"{row.val_top1:.2f} %",
            "the report above",
        )
    if row.crops_top1 < 0.6 * row.val_top1:
        yield (
            f"top-1 is {row.crops_top1:.1f} % of the student's crops and mixes, but "
            f"{row.val_top1:.1f} % of the validation images: use larger crops, milder augmentation "
            "or another image size",
            "the report above; arXiv 2106.05237, section 3",
        )
    if row.own_top1 - row.val_top1 > 5:
        yield (
            f"loses {row.own_top1 - row.val_top1:.1f} points at the student's image size; use a "
            "larger image_size or another teacher_image_size",
            "the report above",
        )


def _temperature_advice(recipe: Recipe, row: Any) -> str:
    given, best = recipe.temperature, row.temperature
    if not MIN_TEMPERATURE < best < MAX_TEMPERATURE:
        return "these images do not tell its best temperature; use kl_standardized_logits"
    if abs(math.log(best)) > math.log(1.2):
        return f"use temperature {given * best:.2g} instead of {given:g}, or kl_standardized_logits"
    return f"this does no harm here, its best temperature is {best:.2f}"
