"""What a training writes into its run folder; rank 0 alone writes."""

import time
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

from workbench import counted, data, runs, shard_store
from workbench.schedule import TrainingError
from workbench.training.environment import peak_memory
from workbench.training.inputs import sampler_options
from workbench.training.meter import Row
from workbench.training.state import TrainState


class RunWriter:
    """Rows, checkpoints, status and the quarantine of a run."""

    def __init__(
        self, run: runs.Run, state: TrainState, dataset: data.Dataset, environment: dict[str, Any]
    ):
        self.run, self.state, self.dataset, self.environment = run, state, dataset, environment
        self.is_main = state.dist.is_main
        self.saved_at, self.saved_step = time.monotonic(), -1
        known = run.quarantine().reindex(columns=["side", "file"])
        self._quarantined = set(known.itertuples(index=False, name=None))  # here (side, row)
        if self.is_main and not state.recipe.resume_from:
            self._warn_of_lost_epochs()

    def _warn_of_lost_epochs(self) -> None:
        state = self.state
        trained = state.step // state.steps_per_epoch - state.pending
        if (found := len(self.run.metrics())) < trained:
            text = f"has {found} of {trained} epochs: last.pt is newer, as on storage that uploads"
            warnings.warn(
                f"{self.run.file('metrics.csv')} {text} each file by itself", stacklevel=3
            )

    def step_row(self) -> Row:
        """Writes and returns a row of steps.csv."""
        state = self.state
        row = {"step": state.step, "epoch": state.epoch, "lr": state.lr}
        return self._append("steps.csv", "step", row | state.meter.step_row())

    def epoch_row(self, validation: Row) -> Row:
        """Writes and returns a row of metrics.csv."""
        state = self.state
        row = {"epoch": state.epoch, "step": state.step, "lr": state.lr}
        return self._append("metrics.csv", "epoch", row | state.meter.epoch_row() | validation)

    def _append(self, file: str, kind: str, row: Row) -> Row:
        if self.is_main:
            self.run.append(file, row)
        return {"kind": kind, "steps": self.state.steps, **row}

    def read(self, side: str, batches: Iterator[data.Batch]) -> Iterator[data.Batch | None]:
        """Batches, and None after the last; what one process cannot read ends all of them."""
        while True:
            batch = error = None
            try:
                if (batch := next(batches, None)) is not None:
                    self.quarantine(side, batch.failures)
            except (data.DataError, shard_store.StoreError) as found:
                error = found
            self.state.dist.agree(error)
            yield batch

    def quarantine(self, side: str, failures: list[tuple[int, str, str]]) -> None:
        """Names images that cannot be read now; they are left out. DataError above one in five."""
        frame = getattr(self.dataset, side)
        for row, reason, detail in failures:
            image = frame.iloc[row]
            if not self._quarantined & {(side, row), (side, image.file)}:
                self._quarantined.add((side, row))
                entry = {"side": side, "file": image.file, "label": int(image.label)}
                entry |= {"reason": reason, "detail": detail, "step": self.state.step}
                self.run.append("quarantine.csv", entry)
                count = sum(known == side for known, _ in self._quarantined)
                if count * self.state.dist.world > 0.2 * len(frame):  # as verified images
                    text = f"{side}: {count} of {len(frame)} images cannot be read, last"
                    raise data.DataError(f"{text} {image.path!r} ({reason}: {detail})")

    # ---- losses and weights that are not finite

    def settle(self) -> None:
        """Adds up the losses of the steps so far. Raises TrainingError if one is not finite."""
        if first := self.state.meter.settle(self.state.step):
            self._fail(*first)

    def check_finite(self) -> None:
        """Raises TrainingError if a weight or a batch-norm statistic is not finite."""
        if not self.state.is_finite():
            self._fail(self.state.step - 1, float("nan"))

    def _fail(self, step: int, loss: float) -> NoReturn:
        """Names the images of the step. Weights are invalid from this step: nothing is saved."""
        train, options = self.dataset.train, sampler_options(self.state.recipe)
        batch = train.iloc[data.Sampler(train.label, **options).rows(step)[0]]
        if self.is_main:
            self.run.save_frame("nonfinite.csv", batch[["file", "label"]].assign(step=step))
        first = ", ".join(repr(f) for f in batch.file.head(3))
        raise TrainingError(
            f"the loss is {loss} at step {step}; nonfinite.csv lists its "
            f"{counted(len(batch), 'image')} ({first}, ...). Nothing was saved since the last "
            "checkpoint. Most often lr is too high or the warm-up too short; try a smaller lr, "
            "clip_grad_norm, or precision: fp32, under another name"
        )

    # ---- checkpoints and status

    def checkpoint_due(self) -> bool:
        return time.monotonic() - self.saved_at >= 60 * self.state.recipe.checkpoint_minutes

    def save(self, alone: bool = False) -> None:
        """Writes last.pt and environment.json. Raises TrainingError if weights are not finite.

        Every process takes part, unless rank 0 is `alone`.
        """
        state = self.state
        own = {} if alone or state.dist.group is None else state.buffers()
        buffers = state.dist.gather_objects(own) if own else []
        if self.is_main:
            self.check_finite()
            by_rank = dict(enumerate(buffers))
            self.run.save_checkpoint(state.state_dict() | {"buffers": by_rank})
            if state.distiller and (cache := state.distiller.logit_cache):
                counts = {"requests": cache.requests, "hits": cache.hits}
                self.environment["teacher_logits"] = counts
            used = {"seconds": round(state.meter.seconds, 3), **peak_memory(state.dist.device)}
            self.run.write_json("environment.json", self.environment | used)
            self.run.set_status("running", step=state.step, steps=state.steps)
        self.saved_at, self.saved_step = time.monotonic(), state.step

    def say_paused(self, paused: bool) -> None:
        """Puts into status.json that the training waits, or that it goes on."""
        if self.is_main:
            text = f"paused after step {self.state.step} of {self.state.steps}; "
            text += f"it goes on when {self.run.file('PAUSE')} is removed"
            self.run.set_status("running", message=text if paused else "")

    def close(self, reason: str | None) -> None:
        """Marks the run as finished, or as stopped for a reason."""
        if not self.is_main:
            return
        state, status = self.state, "stopped"
        message = (
            f"stopped by {reason or 'another process'} after step {state.step} of {state.steps} "
            f"(epoch {state.epoch}); the same command resumes it"
        )
        if state.finished:
            last, status = self.run.metrics().iloc[-1], "finished"
            ema = f", EMA {last.ema_top1:.2f} %" if "ema_top1" in last else ""
            message = (
                f"finished: top-1 {last.top1:.2f} %{ema} of "
                f"{counted(int(last.val_images), 'validation image')} after "
                f"{counted(state.epoch, 'epoch')}"
            )
            if state.stopped_early:
                times = counted(state.worse, "evaluation")
                message += f" of {state.recipe.epochs}, stopped early after {times} without a "
                message += "higher top-1"
        notes = [*state.metrics.failed.values(), *self.environment["trained_on_validation"]]
        message = "; ".join([message, *notes])
        self.run.remove_requests()
        self.run.set_status(status, step=state.step, steps=state.steps, message=message)
