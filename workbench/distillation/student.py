"""The student of a distillation, and the comparison of its layers with its teachers'."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench import models, parts
from workbench.data import Batch
from workbench.distillation.logit_cache import TeacherLogitCache
from workbench.distillation.losses import Loss, create_loss
from workbench.distillation.teachers import DistillationError, Teacher, open_teachers
from workbench.recipe import Recipe, input_options
from workbench.recipe_checks import is_part, one_each, parse_pair

Outputs = dict[str, Tensor]  # layer -> output; "logits" -> (n, C)


class DistillPair(NamedTuple):
    """A layer of the student, or its logits, that is compared with one of a teacher."""

    student_layer: str
    teacher_layer: str
    teacher: int  # index of the teacher
    weight: float
    loss: Loss

    def __str__(self) -> str:
        return f"distill_pairs {self.student_layer} -> {self.teacher_layer}"


class Student(nn.Module):
    """The model with its adapters; adapters are trained, but are not part of the model.

    An adapter is a 1x1 convolution (maps) or a linear layer (vectors, tokens, channels-last maps)
    that changes the number of channels: FitNets, arXiv 1412.6550, section 2.2.
    """

    def __init__(self, model: nn.Module, pairs: list[DistillPair]):
        super().__init__()
        self.model = model
        self.layers = {
            i: pair.student_layer for i, pair in enumerate(pairs) if pair.student_layer != "logits"
        }
        self.adapters = nn.ModuleDict()  # by index of the pair

    def forward(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits (n, C) of the model, and adapted features by index of the pair."""
        with _layer_outputs(self.model, set(self.layers.values())) as outputs:
            logits = self.model(images)
        features = {i: outputs.get(layer) for i, layer in self.layers.items()}
        for i, adapter in self.adapters.items():
            features[int(i)] = adapter(features[int(i)])
        return logits, features


@contextlib.contextmanager
def _layer_outputs(model: nn.Module, layers: set[str]) -> Iterator[Outputs]:
    """A dict that forwards inside fill with the outputs of the named layers.

    Hooks are removed afterwards, since copies of the model (EMA) would inherit them. Outputs are
    cloned, because the next layer may work in place.
    """
    outputs: Outputs = {}

    def save(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        outputs[name] = output.clone() if isinstance(output, Tensor) else output

    with contextlib.ExitStack() as hooks:
        for name in layers:
            module, hook = models.module(model, name), functools.partial(save, name)
            hooks.enter_context(module.register_forward_hook(hook))
        yield outputs


class Distillation:
    """A student and its teachers on a device.

    Raises DistillationError or ModelError for teachers, layers and shapes that cannot be used.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, classes: list[str], device: torch.device):
        self.recipe, self.device, self.num_classes = recipe, device, len(classes)
        self.teachers = open_teachers(recipe, classes)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        for teacher in self.teachers:
            teacher.model.to(device, memory_format=layout)
        self.pairs = _create_pairs(recipe, self.teachers)
        self.logit_cache: TeacherLogitCache | None = None
        self.student = Student(model, self.pairs)
        if self.student.layers:
            self._create_adapters()

    def _create_adapters(self) -> None:
        """Adapters where the outputs for a blank image differ, drawn from the recipe's seed."""
        size = self.recipe.image_size
        blank = torch.zeros(1, 3, size, size, device=self.device)
        with models.eval_mode(self.student), torch.no_grad():
            _, features = self.student(blank)
        outputs = self.teacher_outputs(blank)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.recipe.seed)
            for i, student in features.items():
                pair = self.pairs[i]
                teacher = outputs[pair.teacher].get(pair.teacher_layer)
                if not (isinstance(student, Tensor) and isinstance(teacher, Tensor)):
                    raise DistillationError(
                        f"{pair}: a layer is not used or does not return one tensor; name another"
                    )
                if student.shape != teacher.shape:
                    adapter = create_adapter(pair, student.shape[1:], teacher.shape[1:])
                    self.student.adapters[str(i)] = adapter.to(self.device)

    @torch.no_grad()
    def teacher_outputs(self, images: Tensor, batch: Batch | None = None) -> list[Outputs]:
        """Outputs of every teacher for the student's images (n, 3, h, w), normalised and mixed.

        With an open logit cache, the logits of `batch` are read from it, or computed and written.
        """
        cache = None if batch is None or batch.failures else self.logit_cache
        if cache is not None and (cached := cache.read(batch)) is not None:
            if self.device.type == "cuda":
                cached = cached.pin_memory()
            cached = cached.to(self.device, non_blocking=True)
            return [{"logits": part} for part in cached.split(self.num_classes, 1)]
        outputs = []
        for k, teacher in enumerate(self.teachers):
            layers = {pair.teacher_layer for pair in self.pairs if pair.teacher == k} - {"logits"}
            with _layer_outputs(teacher.model, layers) as features:
                inputs = teacher.preprocess(images, self.recipe.mean, self.recipe.std)
                features["logits"] = teacher.model(inputs)
            outputs.append(features)
        if cache is not None:
            cache.write(batch, torch.cat([o["logits"] for o in outputs], 1).to(torch.float32))
        return outputs

    def loss(
        self, logits: Tensor, features: dict[int, Tensor], outputs: list[Outputs], labels: Tensor
    ) -> Tensor:
        """Sum over pairs of kd_weight * teacher_weight * loss, 0-d; soft labels are (n, C)."""
        total = logits.new_zeros((), dtype=torch.float32)
        for i, pair in enumerate(self.pairs):
            student = features.get(i, logits)
            teacher = outputs[pair.teacher][pair.teacher_layer]
            total = total + pair.weight * pair.loss(student.float(), teacher.float(), labels)
        return total

    def record(self) -> list[dict[str, Any]]:
        """A dict per teacher for environment.json."""
        return [teacher.record() for teacher in self.teachers]

    def open_logit_cache(self, steps_per_epoch: int, **settings: Any) -> str:
        """Caches teacher logits on disk from now on; returns a sentence about the cache.

        `settings` is everything besides recipe and teachers that the logits depend on: the data,
        the precision, the device. Raises DistillationError if the disk has too little space.
        """
        if not self.recipe.verify_data:
            raise DistillationError(
                "cache_teacher_logits identifies images by their bytes, which verify_data: false "
                "does not read; leave out one of the two"
            )
        keys = ("name", "image_size", "mean", "std", "digest")
        teachers = [{key: getattr(teacher, key) for key in keys} for teacher in self.teachers]
        settings |= {"teachers": teachers, **self.recipe.model_dump(include=set(input_options))}
        columns, size = len(teachers) * self.num_classes, self.recipe.batch_size
        self.logit_cache = TeacherLogitCache(settings, steps_per_epoch, size, columns)
        return self.logit_cache.prepare(self.recipe.epochs)


def _create_pairs(recipe: Recipe, teachers: list[Teacher]) -> list[DistillPair]:
    pairs, count = [], len(recipe.distill_pairs)
    names, weights = one_each(recipe.kd_loss, count), one_each(recipe.kd_weight, count)
    for text, name, weight in zip(recipe.distill_pairs, names, weights, strict=True):
        student, layer, number = parse_pair(text)
        own = parts.load("kd_loss", name, **recipe.kd_loss_args) if is_part(name) else None
        loss = own or create_loss(name, recipe.temperature, recipe.dkd_beta)
        for k, teacher in enumerate(teachers):
            if number in (None, k + 1):
                pairs.append(DistillPair(student, layer, k, weight * teacher.weight, loss))
    return pairs


def create_adapter(pair: DistillPair, student: Sequence[int], teacher: Sequence[int]) -> nn.Module:
    """A layer that changes the channels of student outputs to the teacher's."""
    if len(student) == len(teacher) == 3 and student[1:] == teacher[1:]:
        return nn.Conv2d(student[0], teacher[0], 1)
    if len(student) == len(teacher) and student[:-1] == teacher[:-1]:  # Swin's maps, tokens
        return nn.Linear(student[-1], teacher[-1])
    raise DistillationError(
        f"{pair}: the student's {tuple(student)} and the teacher's {tuple(teacher)} differ in more "
        "than channels; use layers of equal size, another teacher_image_size, or global_pool"
    )
