"""What a training measures: losses, accuracy and speed, by row and by epoch."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from workbench.data import Batch
from workbench.training.distributed import DistContext

Row = dict[str, Any]
SAVED = (
    "loss_sum task_sum kd_sum correct images window_sum window_task window_kd window_steps".split()
)
FORMER = {"kd_sum": "mimic_sum", "window_kd": "window_mimic"}  # in checkpoints of version 0.1


class NotFinite(ArithmeticError):
    """A loss is nan or infinite: `step`, and the `loss`."""

    def __init__(self, step: int, loss: float):
        self.step, self.loss = step, loss


class Meter:
    """Sums of losses and correct predictions over the epoch, and since the last row (window).

    Losses stay on the device until `settle`: reading one at every step would stall a GPU.
    """

    def __init__(self, dist: DistContext, workers: int, teacher: bool):
        self.dist, self.workers, self.teacher = dist, workers, teacher
        self.reset_epoch()
        self.reset_window()
        # A list of (loss, task loss, distillation loss, correct) of its parts, and its images.
        self._pending: list[tuple[list[torch.Tensor], int]] = []
        self.start_clock()

    def reset_epoch(self) -> None:
        self.loss_sum = self.task_sum = self.kd_sum = 0.0
        self.correct = self.images = 0

    def reset_window(self) -> None:
        """After a row of steps.csv; the means of losses are over steps, the speed over time."""
        self.window_sum = self.window_task = self.window_kd = 0.0
        self.window_steps = 0
        self._seen = self._waited = self._loading = self._own = 0.0

    def start_clock(self, new_window: bool = True) -> None:
        """After a pause in which no step ran."""
        self._lap_start = time.monotonic()
        if new_window:
            self._window_start = self._lap_start

    def lap(self) -> float:
        """Seconds since the last lap or start."""
        start, self._lap_start = self._lap_start, time.monotonic()
        return self._lap_start - start

    def state_dict(self) -> Row:
        return {key: getattr(self, key) for key in SAVED}

    def load_state_dict(self, state: Row) -> None:
        for key in SAVED:
            setattr(self, key, state[key] if key in state else state[FORMER[key]])

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The parts of one step, with the time that reading takes and waiting for it."""
        while True:
            start = time.monotonic()
            batch = next(batches)
            self._waited += time.monotonic() - start
            self._loading += batch.seconds
            self._own += len(batch.labels)
            yield batch
            if batch.is_last:
                self._seen += batch.global_size
                return

    def add(self, parts: list[torch.Tensor], images: int) -> None:
        """A step: four 0-d tensors for each of its parts, and the images that were read."""
        self._pending.append((parts, images))

    def settle(self, step: int) -> None:
        """Adds the steps before `step` that are not added yet. Raises NotFinite."""
        if not self._pending:
            return
        flat = [value.double() for parts, _ in self._pending for value in parts]
        fetched = iter(torch.stack(flat).tolist() if flat else ())
        sums = []
        for parts, images in self._pending:
            columns = [[next(fetched) for _ in range(4)] for _ in range(len(parts) // 4)]
            sums.append([sum(column) for column in zip(*columns, strict=True)] or [0.0] * 4)
            sums[-1].append(images)
        first = step - len(self._pending)
        self._pending.clear()
        values = self.dist.sum(torch.tensor(sums, dtype=torch.float64)).tolist()
        for number, (loss, task, kd, correct, images) in enumerate(values, first):
            if not math.isfinite(loss):
                raise NotFinite(number, loss)
            self.window_sum += loss / max(1, images)
            self.window_task += task / max(1, images)
            self.window_kd += kd / max(1, images)
            self.window_steps += 1
            self.loss_sum += loss
            self.task_sum += task
            self.kd_sum += kd
            self.correct += round(correct)
            self.images += round(images)

    def step_row(self, seconds: float) -> Row:
        """Losses and speeds of a row of steps.csv, after `seconds` of training in all."""
        passed = time.monotonic() - self._window_start
        rate = lambda count, seconds: round(count / max(1e-9, seconds), 1)
        own = self._own * self.dist.world * max(1, self.workers)
        return {
            "loss": self.window_sum / self.window_steps,
            **self._both("", self.window_task, self.window_kd, self.window_steps),
            "seconds": round(seconds, 3),
            "images_per_second": rate(self._seen, passed),
            "data_wait": round(self._waited / max(1e-9, passed), 3),
            "loader_images_per_second": rate(own, self._loading),
            "model_images_per_second": rate(self._seen, passed - self._waited),
        }

    def epoch_row(self) -> Row:
        """The training columns of a row of metrics.csv."""
        return {
            "train_loss": self.loss_sum / max(1, self.images),
            **self._both("train_", self.task_sum, self.kd_sum, self.images),
            "train_top1": 100 * self.correct / max(1, self.images),
            "images": self.images,
        }

    def _both(self, prefix: str, task: float, kd: float, count: int) -> Row:
        """With a teacher both losses, each before its weight in the sum."""
        means = {f"{prefix}task_loss": task, f"{prefix}kd_loss": kd}
        return {key: total / max(1, count) for key, total in means.items() if self.teacher}
