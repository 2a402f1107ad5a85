"""Distillation: teachers, what they see, what of student and teacher is compared.

    kd = Distillation(recipe, model, classes, device)      # everything is checked here
    logits, features = kd.student(images)                  # the model, and what its modules said
    outputs = kd.teacher_outputs(images, batch)            # the teachers', without gradients
    loss = kd.loss(logits, features, outputs, targets)      # 0-d, mean over the images

Hinton, Vinyals, Dean, arXiv 1503.02531. A teacher sees the very batch of the student, augmented and
mixed, at its own size and normalisation: Beyer et al., "a good teacher is patient and
consistent", arXiv 2106.05237, section 3.
"""

import contextlib
import difflib
import functools
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench import CACHE, ROOT, models, runs
from workbench.distillation import losses as kd_losses
from workbench.recipe import input_options
from workbench.recipe_checks import one_each, parse_pair


class DistillationError(ValueError):
    """A teacher or a mimic cannot be had as asked; the text says what was found and allowed."""


# ---- teachers


@dataclass
class Teacher:
    """A frozen model and how it wants its images."""

    source: str  # as the recipe names it
    name: str  # of the timm model
    model: nn.Module = field(repr=False)
    image_size: int  # pixels
    mean: list[float]  # RGB, 0 to 1
    std: list[float]
    weight: float = 1.0
    loss: str | None = None  # ce or bce, where its training is known
    smoothing: float | None = None  # of its labels
    top1: float | None = None  # percent, where its own run says so
    measured: str = ""  # of both kinds of weights of its own run
    state: str = "finished"  # of its own run
    digest: str = ""  # of all its tensors

    def __str__(self) -> str:
        own = "" if self.top1 is None else f", top-1 {self.top1:.2f} % in its own run"
        own += f" ({self.measured})" if self.measured else ""
        own += "" if self.state == "finished" else f", which is {self.state}"
        return f"{self.source}: {self.name} at {self.image_size} pixels{own}"

    def view(self, images: Tensor, mean: list[float], std: list[float]) -> Tensor:
        """Normalised images (n, 3, h, w) of the student as this teacher wants them.

        Linear, so a mix of images stays the same mix.
        """
        if (mean, std) != (self.mean, self.std):
            ours, theirs = (
                _constant(tuple(m), tuple(s), images.device, images.dtype)
                for m, s in ((mean, std), (self.mean, self.std))
            )
            images = (images * ours[1] + (ours[0] - theirs[0])) / theirs[1]
        if images.shape[2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return images


@functools.cache  # copied to a GPU once: every copy would make the step wait
def _constant(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    return torch.tensor([mean, std], device=device, dtype=dtype).reshape(2, 1, 3, 1, 1)


def open_teachers(recipe: Any, classes: list[str]) -> list[Teacher]:
    """The recipe's teachers with their weights, frozen, on the CPU.

    Raises DistillationError, or ModelError for weights that cannot be read, that belong to another
    model, hold nan, or end in other classes.
    """
    count = len(recipe.teacher)
    options = {
        "name": recipe.teacher_model or [""] * count,
        "weight": one_each(recipe.teacher_weight, count),
        "image_size": one_each(recipe.teacher_image_size or [None], count),
        "mean": _threes(recipe.teacher_mean, count),
        "std": _threes(recipe.teacher_std, count),
    }
    own = [
        dict(zip(options, values, strict=True)) for values in zip(*options.values(), strict=True)
    ]
    return [
        _open(recipe, source, classes, **k) for source, k in zip(recipe.teacher, own, strict=True)
    ]


def _threes(values: list[float], count: int) -> list[list[float] | None]:
    groups = [values[i : i + 3] for i in range(0, len(values), 3)]
    return one_each(groups or [None], count)


def _open(
    recipe: Any,
    source: str,
    classes: list[str],
    *,
    name: str,
    weight: float,
    image_size: int | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Teacher:
    path = ROOT / Path(source).expanduser()
    known, options = {key: getattr(recipe, key) for key in ("image_size", "mean", "std")}, {}
    if name and not path.exists() and not timm.is_model(source):
        raise DistillationError(f"teacher {source}: there is no such file, {path}")
    if name and not path.is_file():
        kind = "a run folder" if path.is_dir() else "a timm model"
        raise DistillationError(
            f"teacher_model {name!r} is for weights files and {source} is {kind}; leave it out, or "
            "'' among several"
        )
    if path.is_dir():
        name, known, options = _of_run(path, source, classes)
    elif path.exists():
        if not name:
            raise DistillationError(
                f"teacher {source} is a weights file; say which model it is of in teacher_model"
            )
        known |= models.run_pixels(path)
    else:
        name, known, options = _of_timm(source, classes)
    size = known["image_size"] if path.is_dir() else image_size or known["image_size"]
    teacher = models.create(name, len(classes), image_size=size, **options)
    if path.exists():
        _fill(teacher, source, name, classes)
    chosen = {"image_size": image_size, "mean": mean, "std": std}
    known |= {key: value for key, value in chosen.items() if value is not None}
    teacher.eval().requires_grad_(False)
    return Teacher(source, name, teacher, weight=weight, digest=_digest(teacher), **known)


def _of_run(path: Path, source: str, classes: list[str]) -> tuple[str, dict, dict]:
    """timm's name, how it wants its images, and options of models.create."""
    run = runs.Run(path)
    theirs = models.run_classes(path)
    if not models.same_classes(theirs, classes):
        raise DistillationError(
            f"teacher {source} was trained for {len(theirs)} classes {_few(theirs)}, the student's "
            f"data have {len(classes)}: {_few(classes)}; both need the same, in the same order"
        )
    r = run.recipe()
    try:
        known = {key: r[key] for key in ("image_size", "mean", "std", "loss")}
        known |= {"smoothing": r["label_smoothing"], "state": run.status()["state"]}
        name, options = r["model"], {key: r[key] for key in ("deep_stem", "avg_down")}
    except KeyError as error:
        raise DistillationError(f"teacher {source}: recipe.yaml names no {error}") from None
    metrics = run.metrics()
    if len(metrics):
        kind, known["measured"] = run.choose_weights()  # as models.load does
        last = metrics.iloc[-1]
        top1 = last.get("ema_top1" if kind == "ema" else "top1", last.get("top1"))
        known["top1"] = None if top1 is None or np.isnan(top1) else float(top1)
    return name, known, options


def _of_timm(source: str, classes: list[str]) -> tuple[str, dict, dict]:
    if not timm.is_model(source):
        near = difflib.get_close_matches(source, timm.list_models(), n=3, cutoff=0.5)
        raise DistillationError(
            f"teacher {source!r} is neither a run folder, a weights file nor a timm model"
            + (f"; near: {', '.join(near)}" if near else "")
        )
    try:
        published = timm.get_pretrained_cfg(source)
    except RuntimeError as error:  # the part behind the dot is of no weights
        tags = timm.list_pretrained(f"{source.partition('.')[0]}.*")
        raise DistillationError(f"teacher {source!r}: {error} Known: {_few(tags)}") from None
    if published is None or not (published.hf_hub_id or published.url or published.file):
        raise DistillationError(f"timm publishes no weights of {source}; name a file or a run")
    if published.num_classes != len(classes):
        raise DistillationError(
            f"teacher {source} ends in {published.num_classes} classes and the data have "
            f"{len(classes)}; train it on them first (pretrained: true) and name that run"
        )
    known = {key: list(getattr(published, key)) for key in ("mean", "std")}
    return source, known | {"image_size": published.input_size[-1]}, {"pretrained": True}


def _fill(teacher: nn.Module, source: str, name: str, classes: list[str]) -> None:
    """Loads a teacher's weights, all of them: one that is partly at its initial values is none."""
    # What is missing or too much is refused here.
    loaded = models.load(teacher, source, classes=classes, force=True)
    head = models.heads(teacher)
    body = {
        tensor: why for tensor, why in loaded.reinitialised.items() if not tensor.startswith(head)
    }
    if any(loaded.loaded.values()):
        raise DistillationError(
            f"teacher {source} was trained at another image size ({loaded}); set "
            "teacher_image_size to that of its training"
        )
    if body:
        raise DistillationError(f"teacher {source} is incomplete, or not of {name}: {loaded}")
    if loaded.ignored:
        raise DistillationError(
            f"teacher {source} is of a larger model than {name}: {loaded}; name its own model"
        )
    if loaded.reinitialised:
        raise DistillationError(
            f"teacher {source} does not end in the {len(classes)} classes of the data "
            f"({next(iter(loaded.reinitialised.values()))}); train it on them first (weights: "
            f"{source}) and "
            "name that run"
        )


def _digest(model: nn.Module) -> str:
    """Twelve hex digits over all tensors."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:12]


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


class TeacherAdapter(nn.Module):
    """A teacher as a model of the student's normalised images: (n, 3, h, w) to logits (n, C)."""

    def __init__(self, teacher: Teacher, recipe: Any):
        super().__init__()
        self.teacher, self.model = teacher, teacher.model
        self.mean, self.std = recipe.mean, recipe.std

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.teacher.view(images, self.mean, self.std))


def without_teacher(recipe: Any) -> Any:
    """The recipe without its teachers, as `<name>_alone`: what the student reaches by itself."""
    ours = (
        "teacher",
        "distill_pairs",
        "kd_",
        "temperature",
        "dkd_beta",
        "task_weight",
        "cache_teacher_logits",
    )
    fields = type(recipe).model_fields.items()
    default = {key: field.default for key, field in fields if key.startswith(ours)}
    return recipe.replace(name=f"{recipe.name}_alone", **default)


# ---- what is compared


class TeacherOutput(NamedTuple):
    """What one teacher says about a batch, without gradients."""

    logits: Tensor  # (n, C)
    features: dict[str, Tensor]  # by module


class DistillPair(NamedTuple):
    """One comparison of a module, or the logits, of the student with one teacher's."""

    ours: str
    theirs: str
    teacher: int  # place in the list
    weight: float
    between: Any  # (student's, teacher's, labels) -> 0-d

    def __str__(self) -> str:
        return f"mimic {self.ours} -> {self.theirs}"


class Student(nn.Module):
    """The model with its adapters, which are no part of it.

    An adapter is a learned 1x1 convolution (maps) or linear layer (vectors, tokens, maps with the
    channels last) where the channels differ, FitNets, arXiv 1412.6550, section 2.2.
    """

    def __init__(
        self, model: nn.Module, pairs: list[DistillPair], adapters: list[nn.Module | None]
    ):
        super().__init__()
        self.model, self.pairs = model, pairs
        kept = {str(i): a for i, a in enumerate(adapters) if a is not None}
        self.adapters = nn.ModuleDict(kept)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits (n, C) of the model, and adapted features by the number of the pair."""
        with _listening(self.model, {p.ours for p in self.pairs if p.ours != "logits"}) as said:
            logits = self.model(images)
        features = {}
        for i, pair in enumerate(self.pairs):
            if pair.ours != "logits":
                features[i] = said[pair.ours]
                if str(i) in self.adapters:
                    features[i] = self.adapters[str(i)](features[i])
        return logits, features


@contextlib.contextmanager
def _listening(model: nn.Module, names: set[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules give in the forwards inside, by name.

    Hooked only that long, for copies of the model (EMA); cloned, for modules that work in place.
    """
    said: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, given: Any, out: Any) -> None:
        said[name] = out.clone() if isinstance(out, Tensor) else out

    parts = {name: model.get_submodule(name) for name in sorted(names)}
    hooks = [m.register_forward_hook(functools.partial(note, n)) for n, m in parts.items()]
    try:
        yield said
    finally:
        for hook in hooks:
            hook.remove()


class Distillation:
    """A student and its teachers, each tried on a blank image. DistillationError, ModelError."""

    def __init__(self, recipe: Any, model: nn.Module, classes: list[str], device: torch.device):
        self.recipe, self.device = recipe, device
        self.classes = len(classes)
        self.teachers = open_teachers(recipe, classes)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        for teacher in self.teachers:
            teacher.model.to(device, memory_format=layout)
            _try(teacher, device, bool(recipe.teacher_image_size))
        self.pairs = _pairs(recipe, self.teachers)
        self.student = Student(model, self.pairs, self._adapters(model)).to(device)
        self.wanted = [
            {p.theirs for p in self.pairs if p.teacher == k and p.theirs != "logits"}
            for k in range(len(self.teachers))
        ]
        self.kept: TeacherLogitCache | None = None  # set by keep

    def _adapters(self, model: nn.Module) -> list[nn.Module | None]:
        if all(pair.ours == "logits" for pair in self.pairs):
            return [None] * len(self.pairs)
        ours = _shapes(model, self.recipe.image_size)
        theirs = [_shapes(t.model, t.image_size) for t in self.teachers]
        adapters: list[nn.Module | None] = [None] * len(self.pairs)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.recipe.seed)
            for i, pair in enumerate(self.pairs):
                if pair.ours == "logits":
                    continue
                teacher = self.teachers[pair.teacher]
                _check_module(pair, "student", model, pair.ours)
                _check_module(pair, f"teacher {teacher.source}", teacher.model, pair.theirs)
                adapters[i] = _adapter(pair, ours, theirs[pair.teacher], self.teachers)
        return adapters

    @torch.no_grad()
    def teacher_outputs(self, images: Tensor, batch: Any = None) -> list[TeacherOutput]:
        """Every teacher's answer to the student's images (n, 3, h, w), normalised and mixed.

        With `keep` the logits of a batch that were kept are read, others are kept.
        """
        if self.kept is not None and batch is not None and not batch.failures:
            found = self.kept.read(batch)
            if found is None:
                answers = self._ask(images)
                logits = torch.cat([a.logits for a in answers], 1)
                self.kept.write(batch, logits.to(torch.float32))
                return answers
            return [
                TeacherOutput(logits.to(self.device), {}) for logits in found.split(self.classes, 1)
            ]
        return self._ask(images)

    def _ask(self, images: Tensor) -> list[TeacherOutput]:
        answers = []
        for teacher, names in zip(self.teachers, self.wanted, strict=True):
            with _listening(teacher.model, names) as features:
                seen = teacher.view(images, self.recipe.mean, self.recipe.std)
                answers.append(TeacherOutput(teacher.model(seen), features))
        return answers

    def loss(
        self,
        logits: Tensor,
        features: dict[int, Tensor],
        outputs: list[TeacherOutput],
        labels: Tensor,
    ) -> Tensor:
        """Sum over pairs of kd_weight * teacher_weight * loss, 0-d; soft labels are (n, C)."""
        total = logits.new_zeros((), dtype=torch.float32)
        for i, pair in enumerate(self.pairs):
            answer = outputs[pair.teacher]
            if pair.ours == "logits":
                ours, theirs = logits, answer.logits
            else:
                ours, theirs = features[i], answer.features[pair.theirs]
            total = total + pair.weight * pair.between(ours.float(), theirs.float(), labels)
        return total

    def record(self) -> list[dict[str, Any]]:
        """A dict per teacher for environment.json."""
        return [
            {"source": t.source, "model": t.name, "image_size": t.image_size, "digest": t.digest}
            | {"parameters": sum(p.numel() for p in t.model.parameters()), "top1": t.top1}
            for t in self.teachers
        ]

    def keep(self, steps_per_epoch: int, **circumstances: Any) -> str:
        """Keeps logits on disk from here on; returns a sentence: where, and what is there already.

        `circumstances` are what, beside recipe and teachers, the answers depend on: the data, the
        precision, the device. Raises DistillationError when the disk has no room.
        """
        if not self.recipe.verify_data:
            unread = (
                "cache_teacher_logits needs the images' bytes, which verify_data: false never reads"
            )
            raise DistillationError(f"{unread}; leave out one of the two")
        keys = ("name", "image_size", "mean", "std", "digest")
        teachers = [{key: getattr(teacher, key) for key in keys} for teacher in self.teachers]
        recipe = self.recipe.model_dump(include=set(input_options))
        values = {**circumstances, "teachers": teachers, **recipe}
        size = self.recipe.batch_size
        self.kept = TeacherLogitCache(values, steps_per_epoch, size, len(teachers) * self.classes)
        return self.kept.prepare(self.recipe.epochs)


def _try(teacher: Teacher, device: torch.device, asked: bool) -> None:
    """Raises DistillationError where a teacher cannot take images of its size."""
    size = teacher.image_size
    try:
        with torch.no_grad():
            teacher.model(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        way_out = "take another teacher_image_size, or none" if asked else "set teacher_image_size"
        raise DistillationError(
            f"teacher {teacher.source}, a {teacher.name}, cannot take images of {size} pixels "
            f"({str(error)[:200] or type(error).__name__}); {way_out}"
        ) from None


def _pairs(recipe: Any, teachers: list[Teacher]) -> list[DistillPair]:
    pairs = []
    count = len(recipe.distill_pairs)
    kinds, weights = one_each(recipe.kd_loss, count), one_each(recipe.kd_weight, count)
    for text, kind, weight in zip(recipe.distill_pairs, kinds, weights, strict=True):
        ours, theirs, number = parse_pair(text)
        between = kd_losses.between(kind, recipe.temperature, recipe.dkd_beta)
        for k, teacher in enumerate(teachers):
            if number in (None, k + 1):
                pairs.append(DistillPair(ours, theirs, k, weight * teacher.weight, between))
    return pairs


@torch.no_grad()
def _shapes(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of what every module gives for an image; () for no tensor."""
    names = {name for name, _ in model.named_modules() if name}
    blank = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)
    with models.eval_mode(model), _listening(model, names) as said:
        model(blank)
    return {n: tuple(o.shape[1:]) if isinstance(o, Tensor) else () for n, o in said.items()}


def _check_module(pair: DistillPair, whose: str, model: nn.Module, name: str) -> None:
    try:
        models.module(model, name)
    except models.ModelError as error:
        raise DistillationError(f"{pair}: {whose}: {error}") from None


def _adapter(
    pair: DistillPair,
    ours: dict[str, tuple[int, ...]],
    theirs: dict[str, tuple[int, ...]],
    teachers: list[Teacher],
) -> nn.Module | None:
    """None where the shapes are the same, a layer where only the channels differ."""
    for whose, name, shapes in (("student", pair.ours, ours), ("teacher", pair.theirs, theirs)):
        if not shapes.get(name):
            why = f"{name} of the {whose} gives no tensor, or is not used"
            raise DistillationError(f"{pair}: {why}; name another, such as layer4")
    mine, wanted = ours[pair.ours], theirs[pair.theirs]
    if mine == wanted:
        return None
    if len(mine) == len(wanted) == 3 and mine[1:] == wanted[1:]:
        return nn.Conv2d(mine[0], wanted[0], 1)
    if len(mine) == len(wanted) and mine[:-1] == wanted[:-1]:  # vectors, tokens, Swin's maps
        return nn.Linear(mine[-1], wanted[-1])
    place = slice(1, None) if len(mine) == 3 else slice(-1)  # all but the channels
    fits = [n for n, s in theirs.items() if len(s) == len(mine) and s[place] == mine[place]]
    own = [n for n in fits if "." not in n] or fits
    fitting = f"Of the same size at the teacher: {_few(own)}. " if own else ""
    given, needed = (" x ".join(map(str, shape)) for shape in (mine, wanted))
    raise DistillationError(
        f"{pair}: the student gives {given} and the teacher {needed}; an adapter changes channels, "
        f"not height and width. {fitting}Or give it another teacher_image_size (now "
        f"{teachers[pair.teacher].image_size}), or compare global_pool"
    )


# ---- answers kept on disk


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """A TeacherLogitCache's values, those of its teachers as "teacher digest", "teacher std"."""
    teachers = values.get("teachers", [])
    keys = sorted({key for teacher in teachers for key in teacher})
    flat = {f"teacher {key}": [teacher.get(key) for teacher in teachers] for key in keys}
    return flat | {key: value for key, value in values.items() if key != "teachers"}


class TeacherLogitCache:
    """Logits of all teachers by (epoch, place in it), a file per epoch, below the cache folder.

    A row has a CRC-32, so damaged or foreign rows are seen and asked again. Rows of one place are
    the same bytes whoever writes them: two runs may fill one folder.
    """

    def __init__(self, values: dict[str, Any], steps_per_epoch: int, batch_size: int, columns: int):
        text = json.dumps(values, sort_keys=True)
        self.values = json.loads(text)
        self.folder = CACHE / "teachers" / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.steps_per_epoch, self.batch_size = steps_per_epoch, batch_size
        self.row_bytes = 4 * columns + 4
        self.hits = self.requests = 0  # images, since the start

    def prepare(self, epochs: int) -> str:
        """Makes the folder; returns a sentence about it. Raises DistillationError: no room."""
        others = self._others()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with runs.atomic_write(self.folder / "recipe.json") as temporary:
                temporary.write_text(json.dumps(self.values, indent=1))
        except OSError as error:
            raise self._failure(error) from None
        there = [f for f in (self._file(e) for e in range(epochs)) if f.exists()]
        used = sum(f.stat().st_blocks * 512 for f in there)
        rows = epochs * self.steps_per_epoch * self.batch_size
        need = max(0, rows * self.row_bytes - used)
        free = shutil.disk_usage(self.folder).free
        if need > 0.95 * free:
            raise DistillationError(
                f"cache_teacher_logits needs {need / 1e9:,.2f} GB for {rows:,} images in {epochs} "
                f"epochs, and {self.folder} has {free / 1e9:,.2f} GB; set cache_teacher_logits: "
                "false, or "
                "WORKBENCH_CACHE to another disk"
            )
        if there:
            many = f"{len(there)} of {epochs} epochs"
            return f"teachers' answers kept already are read, of {many}, {self.folder}"
        return f"teachers' answers are kept, {need / 1e6:,.0f} MB, {self.folder}{others}"

    def _others(self) -> str:
        """What differs where the same teachers, or such models for the same data, were kept."""
        found: list[list[str]] = []
        ours, missing = _flat(self.values), object()
        for path in self.folder.parent.glob("*/recipe.json"):
            try:
                values = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if not isinstance(values, dict) or path.parent == self.folder:
                continue
            theirs = _flat(values)
            keys = sorted(theirs.keys() | ours.keys())
            differ = [k for k in keys if theirs.get(k, missing) != ours.get(k, missing)]
            if "teacher name" not in differ and not {"teacher digest", "data"} <= set(differ):
                now = [f"{k} {theirs.get(k)!r:.40} (now {ours.get(k)!r:.40})" for k in differ]
                found.append(now)
        nearest = ", ".join(min(found, key=len, default=[]))
        return f"; what was kept before is NOT used, it was made with {nearest}" if found else ""

    def _file(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:05d}.rows"

    def _span(self, batch: Any) -> tuple[int, np.ndarray]:
        """The epoch of a batch, and the rows of its images in it."""
        epoch, slot = divmod(batch.step, self.steps_per_epoch)
        return epoch, slot * self.batch_size + batch.positions.numpy()

    def read(self, batch: Any) -> Tensor | None:
        """float32 (n, teachers * C) of a batch, None when a row is not there or damaged."""
        epoch, rows = self._span(batch)
        self.requests += len(rows)
        low, high = int(rows.min()), int(rows.max()) + 1
        try:
            with open(os.open(self._file(epoch), os.O_RDONLY), "rb") as file:
                size, start = (high - low) * self.row_bytes, low * self.row_bytes
                data = os.pread(file.fileno(), size, start)
        except OSError:
            return None
        if len(data) != size:
            return None
        block = np.frombuffer(data, np.uint8).reshape(-1, self.row_bytes)[rows - low]
        values = np.ascontiguousarray(block[:, :-4])
        if block.tobytes() != b"".join(self._rows(values, epoch, rows)):
            return None
        self.hits += len(rows)
        return torch.from_numpy(values).view(torch.float32)

    def write(self, batch: Any, logits: Tensor) -> None:
        """Keeps (n, teachers * C) of a batch. Raises DistillationError when the disk refuses."""
        epoch, rows = self._span(batch)
        values = logits.cpu().contiguous().view(torch.uint8).numpy()
        parts = self._rows(values, epoch, rows)
        flags = os.O_WRONLY | os.O_CREAT
        try:
            with open(os.open(self._file(epoch), flags, 0o644), "wb") as file:
                # One write where rows follow each other, as they do in a single process.
                ends = np.flatnonzero(np.diff(rows) != 1) + 1
                for run in np.split(np.arange(len(rows)), ends):
                    data = b"".join(parts[i] for i in run)
                    start = int(rows[run[0]]) * self.row_bytes
                    if os.pwrite(file.fileno(), data, start) != len(data):
                        raise OSError("the disk took half of it")
        except OSError as error:
            raise self._failure(error) from None

    def _rows(self, values: np.ndarray, epoch: int, rows: np.ndarray) -> list[bytes]:
        """Values with the CRC-32 of them and their place: another epoch's or folder's differ."""
        found = []
        for row, value in zip(rows, values, strict=True):
            place = zlib.crc32(f"{self.folder.name} {epoch} {row}".encode())
            found.append(value.tobytes() + zlib.crc32(value, place).to_bytes(4, "little"))
        return found

    def _failure(self, error: OSError) -> DistillationError:
        return DistillationError(
            f"the teachers' answers were not kept in {self.folder} ({error.strerror or error}); "
            "set cache_teacher_logits: false, or WORKBENCH_CACHE to another disk; the same command "
            "goes on"
        )
