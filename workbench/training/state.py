"""What a checkpoint contains: model, average, distillation, optimizer, and how far they are."""

import contextlib
import copy
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from workbench import data, distillation, models, runs
from workbench.data import Batch
from workbench.recipe import Recipe
from workbench.schedule import TrainingError, lr_schedule
from workbench.training.distributed import DistContext, autocast
from workbench.training.losses import class_weights, loss_function
from workbench.training.meter import Loss, Meter
from workbench.training.optim import create_optimizer, ema_update

MIN_SCALE = 1e-4  # of the loss in fp16, as fairseq's min-loss-scale


class TrainState:
    """A training between two steps, and how it makes the next one.

    Raises DistillationError, ModelError or TrainingError.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, dataset: data.Dataset, dist: DistContext):
        self.recipe, self.dist = recipe, dist
        images = len(dataset.train)
        self.steps_per_epoch = data.steps_per_epoch(images, recipe.batch_size, recipe.drop_last)
        if self.steps_per_epoch == 0:
            raise TrainingError(
                f"batch_size {recipe.batch_size} is larger than the {images} training images, and "
                "drop_last: true leaves no batch; lower batch_size"
            )
        if recipe.sync_batch_norm and dist.device.type != "cuda":
            raise TrainingError("sync_batch_norm: torch has it for GPUs only; leave it out here")
        self.sync_batch_norm = recipe.sync_batch_norm and dist.world > 1
        if self.sync_batch_norm:  # by timm, since torch's function drops timm's activations
            model = convert_sync_batchnorm(model)
        set_trainable(model, recipe.freeze)
        norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self._norms = [norm for norm in norms if norm.track_running_stats]
        self.has_batch_norm = any(norm.training for norm in self._norms)
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = model.to(dist.device, memory_format=layout)
        if dist.device.type == "cuda":  # initialised by now; of this run, not of one before
            torch.cuda.reset_peak_memory_stats(dist.device)
        self.ema, self.networks = None, {"raw": self.model}
        if recipe.ema_decay:
            self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
            self.networks["ema"] = self.ema
        self.distiller, self.student, self.adapters = None, self.model, None
        if recipe.teacher:
            self.distiller = distillation.Distillation(
                recipe, self.model, dataset.classes, dist.device
            )
            self.student = self.distiller.student
            self.adapters = self.distiller.student.adapters
        self.optimizer = create_optimizer(recipe, self.model, self.adapters)
        self.meter = Meter(recipe, dist)
        self.step, self.lr = 0, 0.0
        self.best = -1.0  # top-1 of the best evaluation, percent
        self.worse = 0  # evaluations since then
        self.pending = False  # whether the epoch of the last step has not been validated yet
        self._forward: nn.Module | None = None  # the student, under DDP and torch.compile
        self._head_only: bool | None = None
        self.lr_at = lr_schedule(recipe, self.steps_per_epoch)
        weight = class_weights(recipe, dataset.train.label.to_numpy(), dataset.classes)
        self._criterion = loss_function(recipe, None if weight is None else weight.to(dist.device))
        self._scaler = torch.amp.GradScaler(dist.device.type, enabled=recipe.precision == "fp16")

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The epoch of the last step, from 1."""
        return -(-self.step // self.steps_per_epoch)

    @property
    def finished(self) -> bool:
        return (self.step >= self.steps and not self.pending) or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        return self.recipe.early_stopping is not None and self.worse >= self.recipe.early_stopping

    # ---- a step

    def begin_step(self) -> None:
        """Sets what is trained, the learning rate, and the seed of dropout and drop path."""
        head_only = self.step < self.recipe.head_only_epochs * self.steps_per_epoch
        if head_only is not self._head_only:
            self._head_only = head_only
            head = [models.module(self.model, name[:-1]) for name in models.heads(self.model)]
            set_trainable(self.model, self.recipe.freeze, head if head_only else None)
            self._forward = self.dist.ddp(self.student)
            if self.recipe.compile:  # a kernel for each shape: the same ones after a resume
                self._forward = torch.compile(self._forward, dynamic=False)
        self.lr = self.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group.get("lr_scale", 1.0)
        seed = data.step_seed(self.recipe.seed, self.step, self.dist.rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
        if self.dist.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def sync_if(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Averages gradients over processes in the last part of a step."""
        if self.dist.group is None or is_last:
            return contextlib.nullcontext()
        return self._forward.no_sync()

    def loss(self, images: torch.Tensor, targets: torch.Tensor, batch: Batch) -> Loss:
        """Forward of the student, and of the teachers where there are some."""
        kd = self.distiller
        # One image left of a part whose others could not be read has no batch statistics.
        single = self.has_batch_norm and len(images) == 1 and not self.sync_batch_norm
        mode = models.eval_mode(self.model) if single else contextlib.nullcontext()
        with mode, autocast(self.recipe.precision, self.dist.device):
            logits, features = self._forward(images) if kd else (self._forward(images), {})
            teacher_outputs = kd.teacher_outputs(images, batch) if kd else None
        logits = logits.float()
        total = task = self._criterion(logits, targets).sum()
        kd_loss = total.new_zeros(())
        if kd:
            kd_loss = kd.loss(logits, features, teacher_outputs, targets) * len(images)
            ramp_steps = round(self.recipe.kd_warmup_epochs * self.steps_per_epoch)
            ramp = min(1.0, self.step / ramp_steps) if ramp_steps else 1.0
            total = self.recipe.task_weight * task + ramp * kd_loss
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        return Loss(total, task, kd_loss, (logits.argmax(1) == labels).sum())

    def zero_loss(self) -> torch.Tensor:
        """A zero that depends on every weight, for a process without an image in a small batch."""
        size = self.recipe.image_size
        if self.sync_batch_norm and self.has_batch_norm:  # the others wait for statistics
            raise TrainingError("sync_batch_norm: a process has no image that it can read")
        with models.eval_mode(self.student):  # leaves the batch-norm statistics alone
            outputs = self._forward(torch.zeros(1, 3, size, size, device=self.dist.device))
            logits, features = outputs if self.distiller else (outputs, {})
            return sum(out.float().sum() for out in (logits, *features.values())) * 0.0

    def backward(self, total: torch.Tensor) -> None:
        """Gradients of a part of the step, multiplied by the scale of fp16."""
        # What is computed again must not count twice in the statistics of batch norm.
        norms = self._norms if self.recipe.grad_checkpointing else ()
        kept = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        self._scaler.scale(total).backward()
        for norm, norm.momentum, count in kept:
            norm.num_batches_tracked.copy_(count)

    def optimizer_step(self) -> None:
        """Clips, steps, averages the weights and counts.

        In fp16 a step with infinite gradients changes neither the weights nor their average; the
        next loss is scaled less. Raises TrainingError when that does not help.
        """
        scaler, before = self._scaler, self._scaler.get_scale()
        if scaler.is_enabled():
            scaler.unscale_(self.optimizer)
        if self.recipe.clip_grad_norm and self.recipe.optimizer != "lamb":
            nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.clip_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        skipped = scaler.get_scale() < before
        if skipped and before < MIN_SCALE:
            raise TrainingError(
                f"precision fp16: the gradients of step {self.step} are not finite at any scale; "
                "try a smaller lr, a longer warm-up, or precision: fp32, under another name"
            )
        if self.ema is not None and not skipped:
            ema_update(self.ema, self.model, self.recipe.ema_decay)
        self.step += 1

    def is_finite(self) -> bool:
        """Whether all weights and batch-norm statistics are."""
        finite = [torch.isfinite(value).all() for value in self.student.state_dict().values()]
        return bool(torch.stack(finite).all())  # waits for a GPU once

    # ---- checkpoints

    def buffers(self) -> dict[str, dict[str, torch.Tensor]]:
        """By network what each process has of its own: batch-norm statistics of its images."""
        return {
            name: {k: b.cpu() for k, b in network.named_buffers() if b.is_floating_point()}
            for name, network in self.networks.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "adapters": self.adapters.state_dict() if self.distiller else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "progress": {key: getattr(self, key) for key in ("step", "best", "worse", "pending")}
            | self.meter.state_dict(),
            "steps_per_epoch": self.steps_per_epoch,
        }

    def load_state_dict(self, checkpoint: dict[str, Any], same_recipe: bool = True) -> None:
        """Raises RunError for a checkpoint that does not fit the recipe.

        Of another recipe, the optimizer keeps its own options: weight decay, momentum, betas.
        """
        try:
            if (there := checkpoint["steps_per_epoch"]) != self.steps_per_epoch:
                raise ValueError(f"an epoch had {there} steps, now {self.steps_per_epoch}")
            self.model.load_state_dict(checkpoint["model"])
            if self.ema is not None:
                self.ema.load_state_dict(checkpoint["ema"] or checkpoint["model"])
            for name, own in dict(checkpoint.get("buffers", {}).get(self.dist.rank, {})).items():
                if name in self.networks:
                    self.networks[name].load_state_dict(own, strict=False)
            if self.distiller:
                self.adapters.load_state_dict(checkpoint.get("adapters") or {})
            groups = self.optimizer.param_groups
            options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            for group, own in zip(self.optimizer.param_groups, options, strict=True):
                group.update({} if same_recipe else own)
            if scaler := checkpoint.get("scaler"):
                self._scaler.load_state_dict(scaler)
            progress = checkpoint["progress"]
            self.step = progress["step"]
            if same_recipe:  # else of another folder, maybe of other images
                self.best, self.worse = progress["best"], progress.get("worse", 0)
            self.pending = same_recipe and progress.get("pending", False)
            self.lr = self.lr_at(max(0, self.step - 1))  # for the row of a pending epoch
            self.meter.load_state_dict(progress)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise runs.RunError(
                f"last.pt does not fit this recipe ({str(error).splitlines()[0]}); use `weights` "
                "to start from another model's weights, or another name to start again"
            ) from None
        if self.step > self.steps:
            raise runs.RunError(
                f"last.pt is at step {self.step}, this recipe ends at {self.steps}; use `weights`"
            )


def set_trainable(model: nn.Module, freeze: list[str], only: list[nn.Module] | None = None) -> None:
    """Training mode and gradients for all modules but those named, or for the modules `only`.

    The others keep their weights and batch-norm statistics. Raises TrainingError if none is left.
    """
    model.train(only is None).requires_grad_(only is None)
    for module in only or ():
        module.train().requires_grad_(True)
    for name in freeze:
        models.module(model, name).eval().requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("freeze leaves nothing to train; name fewer modules")
