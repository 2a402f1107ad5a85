"""What a training measures: losses, accuracy and speed, by row and by epoch."""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from workbench.data import Batch
from workbench.recipe import Recipe
from workbench.training.distributed import DistContext, pick_workers

Row = dict[str, Any]
EPOCH = ("loss_sum", "task_sum", "kd_sum", "correct", "images")
WINDOW = ("window_sum", "window_task", "window_kd", "window_steps")  # since the last row
FORMER = {"kd_sum": "mimic_sum", "window_kd": "window_mimic"}  # in checkpoints of version 0.1


class Loss(NamedTuple):
    """Sums over the images of a part of a step, 0-d tensors."""

    total: torch.Tensor
    task: torch.Tensor  # against the labels
    kd: torch.Tensor  # against the teachers
    correct: torch.Tensor


class Meter:
    """Sums of losses and correct predictions: over the epoch, and since the last step row (window).

    Losses stay on the device until `settle`: reading one at every step would stall a GPU.
    """

    def __init__(self, recipe: Recipe, dist: DistContext):
        self.dist, self.teacher = dist, bool(recipe.teacher)
        self.workers = pick_workers(recipe.workers, dist.local_world)
        self.seconds = 0.0  # of training so far
        self.sums: dict[str, float] = dict.fromkeys((*EPOCH, *WINDOW), 0)
        self._images: list[int] = []  # of every step that is not settled, in this process
        self._losses: list[torch.Tensor] = []  # (4,) of every part of these steps
        self._steps: list[int] = []  # of every part, the index of its step

    def state_dict(self) -> Row:
        return {"seconds": self.seconds, **self.sums}

    def load_state_dict(self, state: Row) -> None:
        self.seconds = state["seconds"]
        self.sums = {k: state[k] if k in state else state[FORMER[k]] for k in self.sums}

    def start_clock(self, new_window: bool = True) -> None:
        """Before the first step, and after a pause in which no step ran."""
        self._lap = time.monotonic()
        if new_window:
            self._window_start = self.seconds
            self._waited = self._loading = 0.0  # seconds
            self._read = self._seen = 0  # images of this process, and of all

    def lap(self) -> None:
        """Adds the time since the last lap or start to `seconds`."""
        start, self._lap = self._lap, time.monotonic()
        self.seconds += self._lap - start

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The parts of one step; measures the time that reading takes, and waiting for it."""
        is_last = True
        while True:
            start = time.monotonic()
            batch = next(batches)  # may raise, and then there is no step
            self._images += [0] if is_last else []
            is_last = batch.is_last
            self._waited += time.monotonic() - start
            self._loading += batch.seconds
            self._images[-1] += len(batch.labels)
            yield batch
            if is_last:
                self._read += self._images[-1]
                self._seen += batch.global_size
                return

    def add(self, loss: Loss) -> None:
        """The losses of a part of the step."""
        self._losses.append(torch.stack([value.detach() for value in loss]))
        self._steps.append(len(self._images) - 1)

    def settle(self, step: int) -> tuple[int, float] | None:
        """Adds up the steps before `step`; returns the first with a loss that is not finite."""
        sums = torch.zeros(len(self._images), 5, dtype=torch.float64)
        sums[:, 4] = torch.tensor(self._images)
        if self._losses:
            losses = torch.stack(self._losses).cpu().double()
            sums[:, :4].index_add_(0, torch.tensor(self._steps), losses)
        first, totals = step - len(sums), self.dist.sum(sums)
        self._images, self._losses, self._steps = [], [], []
        for number, (loss, task, kd, correct, images) in enumerate(totals.tolist(), first):
            if not math.isfinite(loss):
                return number, loss
            means = [total / max(1, images) for total in (loss, task, kd)]
            added = [loss, task, kd, round(correct), round(images), *means, 1]
            for key, value in zip(self.sums, added, strict=True):
                self.sums[key] += value
        return None

    def step_row(self) -> Row:
        """Losses and speeds for steps.csv; the means of losses are over the steps of the window."""
        loss, task, kd, steps = self._take(WINDOW)
        passed = self.seconds - self._window_start
        rate = lambda count, seconds: round(count / max(1e-9, seconds), 1)
        read = self._read * self.dist.world * max(1, self.workers)
        return {
            "loss": loss / steps,
            **self._both("", task, kd, steps),
            "seconds": round(self.seconds, 3),
            "images_per_second": rate(self._seen, passed),
            "data_wait": round(self._waited / max(1e-9, passed), 3),
            "loader_images_per_second": rate(read, self._loading),
            "model_images_per_second": rate(self._seen, passed - self._waited),
        }

    def epoch_row(self) -> Row:
        """The training columns of a row of metrics.csv."""
        loss, task, kd, correct, images = self._take(EPOCH)
        return {
            "train_loss": loss / max(1, images),
            **self._both("train_", task, kd, images),
            "train_top1": 100 * correct / max(1, images),
            "images": images,
        }

    def _take(self, keys: tuple[str, ...]) -> list[float]:
        """The sums, which start again at 0."""
        taken = [self.sums[key] for key in keys]
        self.sums |= dict.fromkeys(keys, 0)
        return taken

    def _both(self, prefix: str, task: float, kd: float, count: float) -> Row:
        """With a teacher both losses, each before its weight in the sum."""
        means = {f"{prefix}task_loss": task / max(1, count), f"{prefix}kd_loss": kd / max(1, count)}
        return means if self.teacher else {}
