"""What a checkpoint contains: model, average, distillation, optimizer, and how far they are."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from workbench import data, distillation, models, runs
from workbench.data import Batch
from workbench.recipe import Recipe
from workbench.schedule import TrainingError, lr_schedule
from workbench.training.distributed import DistContext
from workbench.training.environment import pick_precision
from workbench.training.losses import loss_function
from workbench.training.meter import Meter
from workbench.training.optim import create_optimizer, ema_update


class Loss(NamedTuple):
    """Sums over the images of a part, 0-d tensors."""

    total: torch.Tensor
    task: torch.Tensor  # against the labels
    kd: torch.Tensor  # against the teachers
    correct: torch.Tensor


def kd_ramp(recipe: Recipe, steps_per_epoch: int) -> Callable[[int], float]:
    """The factor of the distillation loss at a step, from 0: rises linearly to 1."""
    steps = round(recipe.kd_warmup_epochs * steps_per_epoch)
    return lambda step: min(1.0, step / steps) if steps else 1.0


def set_trainable(
    model: nn.Module, frozen: list[nn.Module], only: list[nn.Module] | None = None
) -> None:
    """Training mode and gradients for all modules but `frozen`, or for the modules `only`.

    The others keep their weights and batch-norm statistics. Raises TrainingError if none is left.
    """
    model.train(only is None).requires_grad_(only is None)
    for module in only or ():
        module.train().requires_grad_(True)
    for module in frozen:
        module.eval().requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("freeze leaves nothing to train; name fewer modules")


@dataclass
class TrainState:
    """A training between two steps, and how it makes the next one."""

    recipe: Recipe
    dist: DistContext
    model: nn.Module
    ema: nn.Module | None
    distiller: distillation.Distillation | None
    optimizer: torch.optim.Optimizer
    steps_per_epoch: int
    step: int = 0
    seconds: float = 0.0  # of training so far
    best: float = -1.0  # top-1 of the best evaluation, percent
    _ddp: nn.Module | None = field(default=None, repr=False)
    _head_only: bool | None = None

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        model: nn.Module,
        classes: list[str],
        steps_per_epoch: int,
        dist: DistContext,
    ) -> "TrainState":
        """The state before step 0. Raises DistillationError, ModelError or TrainingError."""
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        model.to(dist.device, memory_format=layout)
        ema = copy.deepcopy(model).eval().requires_grad_(False) if recipe.ema_decay else None
        distiller = None
        if recipe.teacher:
            distiller = distillation.Distillation(recipe, model, classes, dist.device)
        adapters = distiller.student.adapters if distiller else None
        optimizer = create_optimizer(recipe, model, adapters)
        return cls(recipe, dist, model, ema, distiller, optimizer, steps_per_epoch)

    def __post_init__(self) -> None:
        self.student = self.distiller.student if self.distiller else self.model
        self.networks = {"raw": self.model, **({"ema": self.ema} if self.ema else {})}
        self.frozen = [models.module(self.model, name) for name in self.recipe.freeze]
        self.has_batch_norm = has_trained_batch_norm(self.model)
        self._lr = lr_schedule(self.recipe, self.steps_per_epoch)
        self._ramp = kd_ramp(self.recipe, self.steps_per_epoch)
        self._criterion = loss_function(self.recipe)
        self._bf16 = pick_precision(self.recipe.precision, self.dist.device) == "bf16"

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The epoch of the last step, from 1."""
        return -(-self.step // self.steps_per_epoch)

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    # ---- a step

    def begin_step(self) -> float:
        """Sets what is trained, the lr, which it returns, and the seed of dropout and drop path."""
        head_only = self.step < self.recipe.head_only_epochs * self.steps_per_epoch
        if head_only is not self._head_only:
            self._head_only = head_only
            head = [models.module(self.model, name[:-1]) for name in models.heads(self.model)]
            set_trainable(self.model, self.frozen, head if head_only else None)
            self._ddp = self.dist.ddp(self.student)
            if self.recipe.compile:  # a kernel for each shape: the same ones after a resume
                self._ddp = torch.compile(self._ddp, dynamic=False)
        lr = self._lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        seed = data.step_seed(self.recipe.seed, self.step, self.dist.rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
        if self.dist.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return lr

    def sync_if(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Averages gradients over processes in the last part of a step."""
        if self.dist.group is None or is_last:
            return contextlib.nullcontext()
        return self._ddp.no_sync()

    def loss(self, images: torch.Tensor, targets: torch.Tensor, batch: Batch) -> Loss:
        """Forward of the student, and of the teachers where there are some."""
        count = len(images)
        device, kd = self.dist.device.type, self.distiller
        # One image left of a part whose others could not be read has no batch statistics.
        alone = self.has_batch_norm and count == 1
        mode = models.eval_mode(self.model) if alone else contextlib.nullcontext()
        with mode, torch.autocast(device, torch.bfloat16, enabled=self._bf16):
            logits, features = self._ddp(images) if kd else (self._ddp(images), {})
            teacher_outputs = kd.teacher_outputs(images, batch) if kd else None
        logits = logits.float()
        total = task = self._criterion(logits, targets).sum()
        kd_loss = total.new_zeros(())
        if kd:
            kd_loss = kd.loss(logits, features, teacher_outputs, targets) * count
            total = self.recipe.task_weight * task + self._ramp(self.step) * kd_loss
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        correct = (logits.detach().argmax(1) == labels).sum()
        return Loss(total, task.detach(), kd_loss.detach(), correct)

    def zero_loss(self) -> torch.Tensor:
        """A zero that depends on every weight, for a process without an image in a small batch."""
        size = self.recipe.image_size
        with models.eval_mode(self.student):  # leaves the batch-norm statistics alone
            outputs = self._ddp(torch.zeros(1, 3, size, size, device=self.dist.device))
            logits, features = outputs if isinstance(outputs, tuple) else (outputs, {})
            return sum(out.float().sum() for out in (logits, *features.values())) * 0.0

    def optimizer_step(self) -> None:
        """Clips, steps, averages the weights and counts."""
        if self.recipe.clip_grad_norm and self.recipe.optimizer != "lamb":
            nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            ema_update(self.ema, self.model, self.recipe.ema_decay)
        self.step += 1

    def is_finite(self) -> bool:
        """Whether all weights and batch-norm statistics are."""
        return all(torch.isfinite(v).all() for v in self.student.state_dict().values())

    # ---- checkpoints

    def state_dict(self, meter: Meter) -> dict[str, Any]:
        progress = {"step": self.step, "seconds": self.seconds, "best": self.best}
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "adapters": self.distiller.student.adapters.state_dict() if self.distiller else None,
            "optimizer": self.optimizer.state_dict(),
            "progress": progress | meter.state_dict(),
            "steps_per_epoch": self.steps_per_epoch,
        }

    def restore(self, checkpoint: dict[str, Any], meter: Meter) -> None:
        """Raises RunError for a checkpoint that does not fit the recipe."""
        try:
            if checkpoint["steps_per_epoch"] != self.steps_per_epoch:
                raise ValueError(
                    f"an epoch had {checkpoint['steps_per_epoch']} steps, now "
                    f"{self.steps_per_epoch}"
                )
            self.model.load_state_dict(checkpoint["model"])
            if self.ema is not None:
                self.ema.load_state_dict(checkpoint["ema"] or checkpoint["model"])
            if self.distiller:
                self.distiller.student.adapters.load_state_dict(checkpoint.get("adapters") or {})
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            progress = checkpoint["progress"]
            self.step, self.seconds = progress["step"], progress["seconds"]
            self.best = progress["best"]
            meter.load_state_dict(progress)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise runs.RunError(
                f"last.pt does not fit this recipe ({str(error).splitlines()[0]}); use `weights` "
                "to start from another model's weights, or another name to start again"
            ) from None
        if self.step > self.steps:
            raise runs.RunError(
                f"last.pt is at step {self.step}, this recipe ends at {self.steps}; use `weights`"
            )


def has_trained_batch_norm(model: nn.Module) -> bool:
    """Whether any batch norm is in training mode."""
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(norm.training for norm in norms)
