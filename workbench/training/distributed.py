"""Devices, precision and processes of a training: those of torchrun or srun, or one."""

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from workbench import data
from workbench.recipe import Recipe
from workbench.schedule import TrainingError


def pick_device(name: str) -> torch.device:
    """The torch device for a recipe's `device`; of several processes each has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in available and not available[name]():
        raise TrainingError(f"device is {name}, but torch finds none; set device: auto or cpu")
    visible = max(1, torch.cuda.device_count())  # its own alone, with srun --gpus-per-task=1
    index = int(os.environ.get("LOCAL_RANK", 0)) % visible if name == "cuda" else None
    return torch.device(name, index)


def pick_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16: `auto` takes bf16 on a GPU that computes in it.

    Not on a CPU: oneDNN 3.12 (torch 2.14) takes gradients of bf16 kernels larger than their input,
    such as 3 x 3 with stride 2 on 1 x 1, partly from uninitialised memory.
    """
    if name != "auto":
        return name
    cuda = device.type == "cuda"
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def autocast(name: str, device: torch.device) -> torch.autocast:
    """The context of a forward in a recipe's `precision`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(pick_precision(name, device))
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def pick_workers(workers: int | None, world: int = 1) -> int:
    """Loader processes for one of `world` training processes on this machine."""
    return workers if workers is not None else max(1, min(16, data.available_cpus() // world))


def is_main() -> bool:
    """Whether this process writes and prints, of several or alone."""
    return int(os.environ.get("RANK", 0)) == 0


class DistContext:
    """Rank, world size, device and collective operations; all of them no-ops for one process."""

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1, local_world: int = 1):
        self.device, self.rank, self.world, self.local_world = device, rank, world, local_world
        self.is_main = rank == 0
        self.group: torch.distributed.ProcessGroup | None = None  # gloo, for values on the CPU

    @classmethod
    @contextlib.contextmanager
    def from_env(cls, recipe: Recipe) -> Iterator["DistContext"]:
        """Raises TrainingError where the batch is too small for the number of processes."""
        device, world = pick_device(recipe.device), int(os.environ.get("WORLD_SIZE", 1))
        if world == 1 and not torch.distributed.is_torchelastic_launched():
            yield cls(device)
            return
        if 2 * world > max(2, recipe.batch_size):
            raise TrainingError(
                f"batch_size {recipe.batch_size} is too small for {world} processes; each takes at "
                "least two images"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            context = cls(device, torch.distributed.get_rank(), world, local_world)
            # Verifying a million images takes its time; the other processes wait in this group.
            timeout = datetime.timedelta(days=1)
            context.group = torch.distributed.new_group(backend="gloo", timeout=timeout)
            yield context
        finally:
            torch.distributed.destroy_process_group()

    @property
    def loader_options(self) -> dict[str, Any]:
        """Arguments of data.train_loader and data.eval_loader: this process's share of a batch."""
        pin_memory = self.device.type == "cuda"
        return {"rank": self.rank, "world": self.world, "pin_memory": pin_memory}

    def ddp(self, model: nn.Module) -> nn.Module:
        """The model with averaged gradients."""
        if self.group is None:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # its successor would overwrite buffers at the start
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def max(self, value: int) -> int:
        """The largest value of all processes."""
        if self.group is None:
            return value
        tensor = torch.tensor(value)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(tensor)

    def any(self, flag: bool) -> bool:
        return bool(self.max(int(flag)))

    def agree(self, error: Exception | None) -> None:
        """Raises the error that a process has in all of them."""
        if self.any(error is not None):
            raise next(found for found in self.gather_objects(error) if found)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 does what is inside first; the others find what it cached."""
        if not self.is_main:
            self.any(False)
        yield
        if self.is_main:
            self.any(False)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes of a CPU tensor."""
        if self.group is not None:
            torch.distributed.all_reduce(values, group=self.group)
        return values

    def average_buffers(self, model: nn.Module) -> None:
        """Replaces batch-norm statistics by their mean over processes.

        In float64, so that frozen ones, the same in every process, stay the same bit for bit.
        """
        if self.group is None:
            return
        for buffer in model.buffers():
            if buffer.is_floating_point():
                mean = buffer.double()
                torch.distributed.all_reduce(mean)
                buffer.copy_(mean / self.world)

    def gather_objects(self, value: Any) -> list:
        """The values of all processes, by rank."""
        values = [value] * self.world
        if self.group is not None:
            torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of all processes, in the order of the validation list."""
        if self.group is None:
            return frame
        frames = self.gather_objects(frame)
        frames = [f for f in frames if len(f)] or frames[:1]
        return pd.concat(frames, ignore_index=True).sort_values("row", ignore_index=True)
