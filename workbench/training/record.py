"""What a training writes into its run folder; rank 0 alone writes."""

import time
from typing import Any, NoReturn

import numpy as np

from workbench import data, runs
from workbench.recipe import Recipe
from workbench.schedule import TrainingError
from workbench.training.distributed import DistContext
from workbench.training.environment import usage
from workbench.training.inputs import sampler_options
from workbench.training.meter import Meter, NotFinite, Row
from workbench.training.state import TrainState


class Record:
    """Rows, checkpoints, status and the quarantine of a run."""

    def __init__(
        self, run: runs.Run, dist: DistContext, dataset: data.Dataset, environment: dict[str, Any]
    ):
        self.run, self.dist, self.dataset, self.environment = run, dist, dataset, environment
        self.saved_at, self.saved_step = time.monotonic(), -1
        known = run.quarantine().reindex(columns=["side", "file"])
        self._quarantined = {
            side: set(np.flatnonzero(f.file.isin(known.file[known.side == side])).tolist())
            for side, f in (("train", dataset.train), ("val", dataset.val))
        }

    # ---- rows

    def step_row(self, meter: Meter, state: TrainState, lr: float) -> Row:
        """Writes and returns a row of steps.csv."""
        row = {"step": state.step, "epoch": state.epoch, "lr": lr, **meter.step_row(state.seconds)}
        meter.reset_window()
        return self._append("steps.csv", "step", state, row)

    def epoch_row(self, meter: Meter, state: TrainState, lr: float, validation: Row) -> Row:
        """Writes and returns a row of metrics.csv."""
        where = {"epoch": state.epoch, "step": state.step, "lr": lr}
        row = {**where, **meter.epoch_row(), **validation}
        meter.reset_epoch()
        return self._append("metrics.csv", "epoch", state, row)

    def _append(self, file: str, kind: str, state: TrainState, row: Row) -> Row:
        if self.dist.is_main:
            self.run.append(file, row)
        return {"kind": kind, "steps": state.steps, **row}

    def quarantine(self, side: str, failures: list[tuple[int, str, str]], step: int) -> None:
        """Names images that were readable before training and are not now; they are left out."""
        frame = getattr(self.dataset, side)
        for row, reason, detail in failures:
            if row in self._quarantined[side]:
                continue
            self._quarantined[side].add(row)
            file, label = frame.file.iloc[row], int(frame.label.iloc[row])
            entry = {"side": side, "file": file, "label": label, "reason": reason}
            self.run.append("quarantine.csv", {**entry, "detail": detail, "step": step})

    # ---- losses and weights that are not finite

    def settle(self, meter: Meter, state: TrainState) -> None:
        """Adds the pending losses. Raises TrainingError if one is not finite."""
        try:
            meter.settle(state.step)
        except NotFinite as error:
            self._fail(state.recipe, error.step, error.loss)

    def check_finite(self, state: TrainState) -> None:
        """Raises TrainingError if a weight or a batch-norm statistic is not finite."""
        if not state.is_finite():
            self._fail(state.recipe, state.step - 1, float("nan"))

    def _fail(self, recipe: Recipe, step: int, loss: float) -> NoReturn:
        """Names the images of the step. Weights are invalid from this step: nothing is saved."""
        train = self.dataset.train
        rows, _ = data.Sampler(train.label, **sampler_options(recipe)).rows(step)
        batch = train.iloc[rows]
        if self.dist.is_main:
            self.run.save_frame("nonfinite.csv", batch[["file", "label"]].assign(step=step))
        first = ", ".join(repr(f) for f in batch.file.head(3))
        raise TrainingError(
            f"the loss is {loss} at step {step}; its {len(batch)} images ({first}, ...) are listed "
            "in nonfinite.csv. Nothing was saved since the last checkpoint. Most often lr is too "
            "high or the warm-up too short; try a smaller lr, clip_grad_norm, or precision: fp32, "
            "under another name"
        )

    # ---- checkpoints and status

    def checkpoint_due(self, minutes: float) -> bool:
        return time.monotonic() - self.saved_at >= 60 * minutes

    def save(self, state: TrainState, meter: Meter) -> None:
        """Writes last.pt and environment.json. Raises TrainingError if weights are not finite."""
        if self.dist.is_main:
            self.check_finite(state)
            self.run.save_checkpoint(state.state_dict(meter))
            if state.distiller and (cache := state.distiller.logit_cache):
                counts = {"requests": cache.requests, "hits": cache.hits}
                self.environment["teacher_logits"] = counts
            used = usage(self.dist.device, state.seconds)
            self.run.write_json("environment.json", {**self.environment, **used})
            self.run.set_status("running", step=state.step, steps=state.steps)
        self.saved_at, self.saved_step = time.monotonic(), state.step

    def mark_stopped(self, state: TrainState, reason: str | None) -> None:
        message = (
            f"stopped by {reason or 'another process'} after step {state.step} of {state.steps} "
            f"(epoch {state.epoch}); the same command resumes it"
        )
        self._mark(state, "stopped", message)

    def mark_finished(self, state: TrainState) -> None:
        if not self.dist.is_main:
            return
        metrics = self.run.metrics().iloc[-1]
        ema = f", EMA {metrics.ema_top1:.2f} %" if "ema_top1" in metrics else ""
        message = (
            f"finished: top-1 {metrics.top1:.2f} %{ema} of {int(metrics.val_images)} validation "
            f"images after {state.recipe.epochs} epochs"
        )
        self._mark(state, "finished", message)

    def _mark(self, state: TrainState, status: str, message: str) -> None:
        if self.dist.is_main:
            self.run.clear_stop()
            self.run.set_status(status, step=state.step, steps=state.steps, message=message)
