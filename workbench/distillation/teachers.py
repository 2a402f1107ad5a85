"""Teachers of a distillation: frozen models with their image size and normalisation."""

import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench import ROOT, models, runs
from workbench.recipe import Recipe
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
    measured: str = ""  # top-1 of its raw and EMA weights
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
    options = zip(
        recipe.teacher,
        recipe.teacher_model or [""] * count,
        one_each(recipe.teacher_weight, count),
        one_each(recipe.teacher_image_size or [None], count),
        _triples(recipe.teacher_mean, count),
        _triples(recipe.teacher_std, count),
        strict=True,
    )
    teachers = []
    for source, name, weight, *inputs in options:
        pairs = zip(("image_size", "mean", "std"), inputs, strict=True)
        given = {key: value for key, value in pairs if value is not None}
        teachers.append(_open(recipe, classes, source, name, weight, given))
    return teachers


def _triples(values: list[float], count: int) -> list[list[float] | None]:
    return one_each([values[i : i + 3] for i in range(0, len(values), 3)] or [None], count)


def _open(
    recipe: Recipe, classes: list[str], source: str, name: str, weight: float, given: dict[str, Any]
) -> Teacher:
    """A teacher; `given` are its image_size, mean and std as far as the recipe sets them."""
    path = ROOT / Path(source).expanduser()
    if name and not path.is_file():
        raise DistillationError(
            f"teacher_model {name!r} names the model of a weights file, and {source} is no file; "
            "use '' for run folders and timm models"
        )
    options: dict[str, Any] = {}
    if path.is_dir():
        name, facts, options = _read_run(path, source, classes)
    elif path.exists():
        if not name:
            raise DistillationError(f"teacher {source} is a weights file; set its teacher_model")
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
                f"pixels ({loaded}); correct teacher_model or teacher_image_size, or fine-tune it "
                "on these classes and name that run"
            )
    model.eval().requires_grad_(False)
    models.check_size(model, facts["image_size"], "teacher_image_size", trained_size)
    return Teacher(source, name, model, weight=weight, digest=_digest(model), **facts)


def _read_run(path: Path, source: str, classes: list[str]) -> tuple[str, dict, dict]:
    """Name, facts for Teacher, and options of models.create of the teacher in a run folder."""
    run = runs.Run(path)
    trained = models.run_classes(path)
    if not models.same_classes(trained, classes):
        raise DistillationError(
            f"teacher {source} was trained on {len(trained)} classes {trained[:4]}, the student's "
            f"data have {len(classes)}: {classes[:4]}; both need the same classes in the same order"
        )
    recipe = run.recipe()
    try:
        facts = {key: recipe[key] for key in ("image_size", "mean", "std", "loss")}
        facts |= {"smoothing": recipe["label_smoothing"], "state": run.status()["state"]}
        name, options = recipe["model"], {key: recipe[key] for key in ("deep_stem", "avg_down")}
    except KeyError as error:
        raise DistillationError(f"teacher {source}: its recipe.yaml has no {error}") from None
    metrics = run.metrics()
    if len(metrics):
        kind, facts["measured"] = run.choose_weights()  # the same choice as models.load
        last = metrics.iloc[-1]
        top1 = last.get("ema_top1" if kind == "ema" else "top1", last.get("top1"))
        facts["top1"] = None if top1 is None or np.isnan(top1) else float(top1)
    return name, facts, options


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
    size = config.input_size[-1]
    return {"mean": list(config.mean), "std": list(config.std), "image_size": size}


def _digest(model: nn.Module) -> str:
    """12 hex digits over the names and values of all tensors."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


def without_teacher(recipe: Recipe) -> Recipe:
    """The recipe without distillation, named `<name>_alone`: the student's baseline."""
    prefixes = ("teacher", "distill_pairs", "kd_", "temperature", "dkd_beta", "task_weight")
    prefixes += ("cache_teacher_logits",)
    fields = type(recipe).model_fields.items()
    defaults = {key: field.default for key, field in fields if key.startswith(prefixes)}
    return recipe.replace(name=f"{recipe.name}_alone", **defaults)
