"""Whether a recipe's teachers are of use to its student, measured by running them."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench import data, distillation, models, schedule, training
from workbench.doctor.rules import Finding
from workbench.doctor.throughput import median_seconds
from workbench.progress import bar
from workbench.recipe import Recipe
from workbench.recipe_checks import losses_with_temperature

Batches = Iterator[tuple[Tensor, Tensor]]  # images on the device, labels or soft labels
Arrays = tuple[np.ndarray, ...]
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0  # range of best_temperature


def teacher_report(
    recipe: Recipe,
    content: data.Dataset,
    *,
    max_images: int = 2048,
    max_val_images: int | None = None,
) -> pd.DataFrame:
    """Runs the recipe's teachers on training crops and validation images; a row per teacher.

    Crops are the first `max_images` training images, augmented and mixed; `max_val_images` limits
    the validation list to evenly spaced images. Columns are those of `_row`, and step_share, the
    share of the time of a step; all shares are from 0 to 100. Raises DistillationError or
    ModelError.
    """
    device = training.pick_device(recipe.device)
    student, _ = training.build_initial_model(recipe, content.classes)
    if recipe.resume_from:
        student.load_state_dict(training.resumed_state(recipe)["model"])
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    student.to(device, memory_format=layout)
    kd = distillation.Distillation(recipe, student, content.classes, device)
    teachers = [(distillation.TeacherAdapter(t, recipe), recipe.precision) for t in kd.teachers]
    step = math.ceil(len(content.val) / (max_val_images or len(content.val)))
    val = content.val.iloc[::step].reset_index(drop=True)
    total = min(max_images, len(content.train)) + len(val)
    with bar(total, "running the teachers", "img") as progress, models.eval_mode(student):
        crops = _crops(recipe, content, device, max_images)
        targets, *crop_logits = _logits(teachers, crops, progress)
        batches = _validation_batches(recipe, val, device)
        labels, start, *val_logits = _logits([(student, "fp32"), *teachers], batches, progress)
    rows = [
        _row(teacher, (targets, crop), (labels, z, start.argmax(1)))
        for teacher, crop, z in zip(kd.teachers, crop_logits, val_logits, strict=True)
    ]
    first = next(_crops(recipe, content, device, 1))
    shares = 100 * np.array(step_shares(recipe, kd, *first))
    return pd.DataFrame(rows).assign(step_share=shares)


def _crops(recipe: Recipe, content: data.Dataset, device: torch.device, count: int) -> Batches:
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


def _validation_batches(recipe: Recipe, val: pd.DataFrame, device: torch.device) -> Batches:
    normalize, transform = training.Normalize(recipe, device), training.eval_transform(recipe)
    workers = training.eval_workers(training.pick_workers(recipe.workers), val)
    for batch in data.eval_loader(val, transform, batch_size=64, workers=workers):
        if len(batch.labels):
            yield normalize(batch.images.to(device)), batch.labels


@torch.no_grad()
def _logits(
    networks: list[tuple[nn.Module, str]], batches: Batches, progress: Any
) -> list[np.ndarray]:
    """Labels (n,), then logits (n, C) of each network in its precision."""
    parts = []
    for images, labels in batches:
        hard = labels if labels.ndim == 1 else labels.argmax(1)
        parts.append([hard.cpu().numpy()])
        for network, precision in networks:
            with training.autocast(precision, images.device):
                parts[-1].append(network(images).float().cpu().numpy())
        progress.update(len(images))
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


def _row(teacher: distillation.Teacher, crops: Arrays, val: Arrays) -> dict[str, Any]:
    """A row of the report, from targets and logits of the crops, and labels, logits and the
    initial student's predictions of the validation images.
    """
    (targets, crop), (labels, z, start) = crops, val
    offset = float((z.mean(1) / z.std(1).clip(1e-9)).mean())
    log_p = F.log_softmax(torch.from_numpy(crop).double(), 1)
    percent = lambda hits: 100 * float(hits.mean())
    return {
        "teacher": teacher.source,
        "model": teacher.name,
        "parameters": sum(p.numel() for p in teacher.model.parameters()),
        "own_top1": math.nan if teacher.top1 is None else teacher.top1,  # in its run
        "val_top1": percent(z.argmax(1) == labels),  # at the student's image size
        "val_images": len(labels),
        "crops_top1": percent(crop.argmax(1) == targets),  # of the larger share of a mixed label
        "crops": len(targets),
        "entropy": float(-(log_p.exp() * log_p).sum(1).mean()),  # of the softmax of crops, nats
        "offset": offset,  # mean logit, in standard deviations of an image's logits
        # Trained with binary cross-entropy: by its run, or else a clearly negative offset.
        "bce": teacher.loss == "bce" if teacher.loss else offset < -0.2,
        "temperature": best_temperature(z, labels),
        "agreement": percent(z.argmax(1) == start),  # with the initial student
        "start_top1": percent(start == labels),  # of the initial student
        "smoothing": teacher.smoothing,
        "state": teacher.state,  # of its run
    }


def best_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T of the smallest mean cross-entropy of softmax(logits / T), within 2 %, 0.05 to 20.

    Guo et al., arXiv 1706.04599, section 4.2.
    """
    z, y = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    grid = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 301)
    return float(grid[np.argmin([F.cross_entropy(z / t, y).item() for t in grid])])


def step_shares(
    recipe: Recipe, kd: distillation.Distillation, images: Tensor, targets: Tensor
) -> list[float]:
    """The share of the time of a step (forward and backward) that each teacher takes."""
    device, criterion = images.device, training.loss_function(recipe)

    def forward(network: nn.Module) -> Any:
        with training.autocast(recipe.precision, device):
            return network(images)

    def student_step() -> None:
        with models.eval_mode(kd.student):  # leaves batch-norm statistics unchanged
            logits, _ = forward(kd.student)
        criterion(logits.float(), targets).sum().backward()
        kd.student.zero_grad(set_to_none=True)

    with torch.no_grad():
        adapters = [distillation.TeacherAdapter(teacher, recipe) for teacher in kd.teachers]
        seconds = [median_seconds(lambda a=a: forward(a), device) for a in adapters]
    total = median_seconds(student_step, device) + sum(seconds)
    return [part / total for part in seconds]


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
    losses, report = set(recipe.kd_loss), "the report above"
    if row.bce:
        text = f"was probably trained with binary cross-entropy (mean logit {row.offset:+.2f} sd)"
        source = "the mean logit; arXiv 2110.00476; arXiv 1706.04599"
        if losses & {*losses_with_temperature} - {"kl_standardized_logits"}:
            yield f"{text}: {_temperature_advice(recipe.temperature, row.temperature)}", source
        if "up_kl" in losses:
            text += "; up_kl ignores negative logits: use kl or kl_standardized_logits"
            yield text, source
    if row.state != "finished":
        yield f"its run is {row.state}; finish its training first", "its run folder"
    if (row.smoothing or 0) > 0 and losses & {"kl", "ce", "up_kl", "dkd"}:
        text = f"label smoothing {row.smoothing:g} removed information about the wrong classes"
        yield text, "arXiv 1906.02629, section 5"
    if row.start_top1 >= row.val_top1:
        text = f"top-1 {row.val_top1:.2f} % is not above the initial student's"
        yield f"{text} {row.start_top1:.2f} %", report
    if row.crops_top1 < 0.6 * row.val_top1:
        text = f"top-1 is only {row.crops_top1:.1f} % of the student's crops and mixes; use milder"
        yield f"{text} augmentation", f"{report}; arXiv 2106.05237, section 3"
    if (lost := row.own_top1 - row.val_top1) > 5:
        text = f"loses {lost:.1f} points at the student's image size; use a larger image_size"
        yield f"{text} or teacher_image_size", report


def _temperature_advice(given: float, best: float) -> str:
    if not MIN_TEMPERATURE < best < MAX_TEMPERATURE:
        return "these images do not tell its best temperature; use kl_standardized_logits"
    if abs(math.log(best)) > math.log(1.2):
        return f"use temperature {given * best:.2g} instead of {given:g}, or kl_standardized_logits"
    return f"this does no harm here, its best temperature is {best:.2f}"
