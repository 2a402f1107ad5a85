"""Teachers of a distillation: frozen models with their image size and normalisation."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench import ROOT, models, runs
from workbench.recipe import Recipe, defaults
from workbench.recipe_checks import one_each


class DistillationError(ValueError):
    """A teacher or a distillation pair that cannot be used."""


@dataclass
class Teacher:
    """A frozen model in evaluation mode."""

    source: str  # as in the recipe
    name: str  # of the timm model
    model: nn.Module = field(repr=False)
    image_size: int  # pixels
    mean: list[float]  # RGB, 0 to 1
    std: list[float]
    weight: float = 1.0
    loss: str | None = None  # ce or bce, None if unknown
    smoothing: float | None = None  # label smoothing of its training, None if unknown
    top1: float | None = None  # percent, from its run folder
    state: str = "finished"  # of its run
    digest: str = ""  # 12 hex digits over all tensors

    def preprocess(self, images: Tensor, mean: list[float], std: list[float]) -> Tensor:
        """Images (n, 3, h, w) normalised by mean and std, as this teacher expects them.

        Linear, so a mix of images stays the same mix.
        """
        if (mean, std) != (self.mean, self.std):
            student, teacher = (
                _mean_and_std(tuple(m), tuple(s), images.device, images.dtype)
                for m, s in ((mean, std), (self.mean, self.std))
            )
            images = (images * student[1] + (student[0] - teacher[0])) / teacher[1]
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images

    def record(self) -> dict[str, Any]:
        """Its entry in environment.json."""
        keys = {"source": self.source, "model": self.name, "image_size": self.image_size}
        parameters = sum(p.numel() for p in self.model.parameters())
        return keys | {"digest": self.digest, "parameters": parameters, "top1": self.top1}


@functools.cache  # one copy to a GPU: a copy per step would synchronise
def _mean_and_std(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    return torch.tensor([mean, std], device=device, dtype=dtype).reshape(2, 1, 3, 1, 1)


class TeacherAdapter(nn.Module):
    """A teacher as a model of the student's normalised images: (n, 3, h, w) to logits (n, C)."""

    def __init__(self, teacher: Teacher, recipe: Recipe):
        super().__init__()
        self.teacher, self.model = teacher, teacher.model
        self.mean, self.std = recipe.mean, recipe.std

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.teacher.preprocess(images, self.mean, self.std))


def open_teachers(recipe: Recipe, classes: list[str]) -> list[Teacher]:
    """The recipe's teachers with their weights, frozen, on the CPU.

    Raises DistillationError, or ModelError for weights that cannot be read or contain nan.
    """
    count = len(recipe.teacher)
    names = recipe.teacher_model or [""] * count
    triples = lambda values: [values[i : i + 3] for i in range(0, len(values), 3)] or [None]
    options = {
        "weight": one_each(recipe.teacher_weight, count),
        "image_size": one_each(recipe.teacher_image_size or [None], count),
        "mean": one_each(triples(recipe.teacher_mean), count),
        "std": one_each(triples(recipe.teacher_std), count),
    }
    teachers = []
    for k, source in enumerate(recipe.teacher):
        given = {key: values[k] for key, values in options.items() if values[k] is not None}
        teachers.append(_open(recipe, classes, source, names[k], given))
    return teachers


def _open(
    recipe: Recipe, classes: list[str], source: str, name: str, given: dict[str, Any]
) -> Teacher:
    """A teacher; `given` are fields of it that the recipe sets."""
    path = ROOT / Path(source).expanduser()
    if path.is_file() != bool(name):
        raise DistillationError(
            f"teacher_model {name!r} of teacher {source}: a weights file needs a timm name, run "
            "folders and timm models take ''"
        )
    options: dict[str, Any] = {}
    if path.is_dir():
        name, facts, options = _read_run(path, classes)
    elif path.exists():
        facts = {key: getattr(recipe, key) for key in ("image_size", "mean", "std")}
        facts |= models.run_pixels(path)
    else:
        name, facts, options = source, _published(source, classes), {"pretrained": True}
    trained_size = facts["image_size"]
    facts |= given
    built_size = trained_size if path.is_dir() else facts["image_size"]
    model = models.create(name, len(classes), image_size=built_size, **options)
    if path.exists():
        # force: an incomplete teacher is refused below, with a fuller message.
        loaded = models.load(model, source, classes=classes, force=True)
        if loaded.reinitialised or loaded.ignored or any(loaded.loaded.values()):
            raise DistillationError(
                f"teacher {source} does not fit {name} with {len(classes)} classes at {built_size} "
                f"pixels ({loaded}); correct teacher_model or teacher_image_size, or fine-tune it"
            )
    model.eval().requires_grad_(False)
    models.check_size(model, facts["image_size"], "teacher_image_size", trained_size)
    return Teacher(source, name, model, digest=models.digest(model.state_dict()), **facts)


def _read_run(path: Path, classes: list[str]) -> tuple[str, dict, dict]:
    """Name, facts for Teacher, and options of models.create of the teacher in a run folder."""
    run, trained = runs.Run(path), models.run_classes(path)
    if not models.same_classes(trained, classes):
        raise DistillationError(
            f"teacher {path} was trained on {len(trained)} classes {trained[:4]}, the student's "
            f"data have {len(classes)}: {classes[:4]}; both need the same classes in the same order"
        )
    recipe, metrics = run.recipe(), run.metrics()
    facts = {key: recipe[key] for key in ("image_size", "mean", "std", "loss")}
    facts |= {"smoothing": recipe["label_smoothing"], "state": run.status()["state"]}
    if len(metrics):
        last, kind = metrics.iloc[-1], run.choose_weights()[0]  # the same choice as models.load
        top1 = last.get("ema_top1" if kind == "ema" else "top1", last.get("top1"))
        facts["top1"] = None if pd.isna(top1) else float(top1)
    options = {key: recipe[key] for key in ("deep_stem", "avg_down")}
    custom = {"model_args": recipe.get("model_args"), "folder": path}
    return recipe["model"], facts, options | custom


def _published(source: str, classes: list[str]) -> dict[str, Any]:
    """image_size, mean and std of timm's published weights."""
    try:
        models.check_name(source)
    except models.ModelError as error:
        raise DistillationError(
            f"teacher {source!r} is neither a run folder nor a weights file, and {error}"
        ) from None
    if not timm.is_model_pretrained(source):
        raise DistillationError(f"timm has no weights of {source}; name a weights file or a run")
    config = timm.get_pretrained_cfg(source)
    if config.num_classes != len(classes):
        raise DistillationError(
            f"teacher {source} has {config.num_classes} classes and the data have {len(classes)}; "
            "fine-tune it on them (pretrained: true) and name that run"
        )
    imagenet = timm.data.ImageNetInfo("imagenet-1k")
    for names in (imagenet.label_names(), imagenet.label_descriptions()):
        if classes != names and sorted(classes) == sorted(names):
            raise DistillationError(
                f"teacher {source} has ImageNet's classes from {names[0]!r} on, and the data have "
                f"them in another order, from {classes[0]!r} on; sort them as synsets are"
            )
    size = config.input_size[-1]
    return {"mean": list(config.mean), "std": list(config.std), "image_size": size}


def without_teacher(recipe: Recipe) -> Recipe:
    """The recipe without distillation, named `<name>_alone`: the student's baseline."""
    prefixes = ("teacher", "distill_pairs", "kd_", "temperature", "dkd_beta", "task_weight")
    plain = {k: v for k, v in defaults().items() if k.startswith(prefixes)}
    return recipe.replace(name=f"{recipe.name}_alone", cache_teacher_logits=False, **plain)
