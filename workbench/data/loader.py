"""Batches that depend on the recipe and the step alone.

    for batch in train_loader(data.train, transform, seed=0, batch_size=256, steps=range(0, 1000)):
        batch.images                          # uint8 (batch, 3, size, size)

Batches are the same bytes for any number of workers, and from any step on.
"""

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing import queues
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from workbench import shard_store
from workbench.data import images, shards
from workbench.data.dataset import DataError
from workbench.data.pixel_cache import Cache
from workbench.data.sampler import DRAW, Sampler, Streams


class Batch(NamedTuple):
    """One process's part of one step."""

    images: torch.Tensor  # uint8 (n, 3, size, size), channels last in memory
    labels: torch.Tensor  # int64 (n,)
    indices: torch.Tensor  # int64 (n,), rows of the frame
    positions: torch.Tensor  # int64 (n,), of each image in the whole step
    step: int
    is_last: bool  # whether the process's part of the step ends here
    global_size: int  # images in the whole step, over all parts and processes
    failures: list[tuple[int, str, str]]  # (row, reason, detail) of images that were left out
    aug_params: list[dict] | None = None  # of each image, what is left for the device
    error: shard_store.StoreError | None = None  # of a shard, which says nothing about the images
    seconds: float = 0.0  # to read and transform them, in the process that did


class Part(NamedTuple):
    """What a worker reads for one Batch."""

    rows: np.ndarray  # of the frame
    copies: np.ndarray | None  # of the rows; None in validation, where nothing is random
    positions: np.ndarray  # in the step
    step: int
    epoch: int
    is_last: bool
    global_size: int


class Transform(Protocol):
    """What the loaders need of augmentation.TrainTransform and EvalTransform."""

    size: int
    on_device: bool

    def __call__(self, image: images.AnyImage, rng: np.random.Generator | None) -> np.ndarray: ...


def own_places(total: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """The positions in a step of `total` images that process `rank` of `world` reads.

    Every world-th pair of neighbours: pairs, which are mixed with each other, stay together.
    """
    positions = np.arange(total)
    return positions[positions // 2 % world == rank]


def train_loader(
    frame: pd.DataFrame,
    transform: Transform,
    *,
    steps: range,
    micro_batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    cached: Cache | None = None,
    **sampling: Any,
) -> Iterator[Batch]:
    """Training batches of these steps, in order; `sampling` are the options of `Sampler`.

    Process `rank` of `world` gets the rows of `own_places`, in parts of at most `micro_batch_size`,
    and a part of no images where a small last batch has none for it. `cached` is a
    pixel_cache.Cache of the frame with transform.resize; it changes no byte.
    """
    sampler = Sampler(frame.label.to_numpy(), **sampling)
    parts = _train_parts(sampler, steps, micro_batch_size, rank, world)
    return _load(Reader(frame, transform, cached, sampler.seed), parts, workers, pin_memory)


def _train_parts(
    sampler: Sampler, steps: range, micro_batch_size: int | None, rank: int, world: int
) -> Iterator[Part]:
    for step in steps:
        rows, copies = sampler.rows(step)
        own = own_places(len(rows), rank, world)
        size = micro_batch_size or max(1, len(own))
        for start in range(0, max(1, len(own)), size):
            at, is_last = own[start : start + size], start + size >= len(own)
            epoch = step // sampler.steps_per_epoch
            yield Part(rows[at], copies[at], at, step, epoch, is_last, len(rows))


def eval_loader(
    frame: pd.DataFrame,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    cached: Cache | None = None,
) -> Iterator[Batch]:
    """Every world-th row from `rank` on, in the order of the frame, each once.

    `cached` is a pixel_cache.Cache of the frame with this transform; it changes no byte.
    """
    rows = np.arange(len(frame))[rank::world]
    chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    parts = (Part(chunk, None, np.arange(len(chunk)), 0, 0, True, len(chunk)) for chunk in chunks)
    return _load(Reader(frame, transform, cached), parts, workers, pin_memory)


class Reader(TorchDataset):
    """Reads parts of steps into batches.

    Every worker has one: paths are one array, which for an index is a file mapped into memory.
    """

    def __init__(
        self, frame: pd.DataFrame, transform: Transform, cached: Cache | None, seed: int = 0
    ):
        is_text = frame.path.dtype != object  # object for names that are not UTF-8
        self.paths = pa.array(frame.path if is_text else [os.fsencode(p) for p in frame.path])
        self.labels = frame.label.to_numpy()
        self.transform, self.cached, self.seed = transform, cached, seed
        # These go to a process that is not forked. The index may have been made again since.
        self.shards, self.kept = shards.versions(frame), shard_store.cache

    def path(self, row: int) -> str:
        return os.fsdecode(self.paths[row].as_py())

    def __getitem__(self, part: Part) -> Batch:
        """The rows that can be read, transformed with the random numbers of (epoch, row, copy)."""
        start, streams, rng = time.perf_counter(), Streams(self.seed), None
        decoded, params, used, failures, failed = [], [], [], [], None
        paths = [self.path(row) for row in part.rows.tolist()] if self.cached is None else []
        shard_store.cache = self.kept
        contents = shard_store.read(paths, self.shards)
        for i, row in enumerate(part.rows.tolist()):
            if part.copies is not None:
                rng = streams(DRAW, part.epoch, row, int(part.copies[i]))
            try:
                pixels, left = self.pixels(row, rng, next(contents, None))
            except shard_store.StoreError as error:
                failed = error
                break
            except images.ImageError as error:
                failures.append((row, error.reason, error.detail))
                continue
            decoded.append(pixels)
            params.append(left)
            used.append(i)
        size = self.transform.size
        stacked = np.stack(decoded) if decoded else np.zeros((0, size, size, 3), np.uint8)
        rows, positions = (a[used].astype(np.int64) for a in (part.rows, part.positions))
        return Batch(
            torch.from_numpy(stacked).permute(0, 3, 1, 2),
            *map(torch.from_numpy, (self.labels[rows].astype(np.int64), rows, positions)),
            part.step,
            part.is_last,
            part.global_size,
            failures,
            params if self.transform.on_device else None,
            failed,
            time.perf_counter() - start,
        )

    def pixels(
        self, row: int, rng: np.random.Generator | None, content: bytes | None = None
    ) -> tuple[np.ndarray, dict | None]:
        """The pixels (size, size, 3) of a row, and what is left for the device."""
        if self.cached is None:
            image = images.open(self.path(row), content)
        else:
            image = self.cached.image(row)
            if rng is None:  # the cache has the result of validation
                return image.pixels(), None
        if not self.transform.on_device:
            return self.transform(image, rng), None
        image = self.transform.resize.image(image)
        params = self.transform.sample_params(rng, image.width, image.height)
        return self.transform.crop(image, params), params


# ---- worker processes

_NO_SHARED_MEMORY = (
    "shared memory (/dev/shm) is full: make it larger (docker run --shm-size) or set workers to 0; "
    "or a file of the cache was cut short while it was read: run the same command again"
)
_TOO_MANY_FILES = "too many open files: raise the limit (ulimit -n) or lower workers"


def _load(reader: Reader, parts: Iterator[Part], workers: int, pin_memory: bool) -> Iterator[Batch]:
    loader = explained = None
    try:
        loader = iter(
            DataLoader(
                reader,
                batch_size=None,
                sampler=parts,
                num_workers=workers,
                collate_fn=_identity,
                pin_memory=pin_memory,
                worker_init_fn=_init_worker,
                generator=torch.Generator(),  # leaves the global one unchanged
            )
        )
        for batch in loader:
            if batch.error:
                raise batch.error
            yield batch
    except EOFError:  # a worker without a free file descriptor cannot hand over a batch
        explained = DataError(_TOO_MANY_FILES)
    except (OSError, RuntimeError) as error:
        explained = explain_worker_crash(error)
        if isinstance(error, ConnectionError):  # a worker ended while it handed over a batch
            for worker in getattr(loader, "_workers", []):
                explained = explained or explain_worker_crash(_end_of(worker))
        if explained is None:
            raise
    finally:
        loader = None  # ends its processes, also while a traceback refers to this frame
    if explained:
        raise explained


def _end_of(worker: multiprocessing.Process) -> RuntimeError:
    """An error with the exit code of a worker that is about to end."""
    try:
        worker.join(5)  # seconds
    except RuntimeError as error:  # torch's handler of SIGCHLD raises it, within join as well
        return error
    return RuntimeError(f"exit code {worker.exitcode}.")


def explain_worker_crash(error: BaseException) -> DataError | None:
    """A clear error where `error` comes from a worker that ended; torch raises it anywhere."""
    text = f"{error} {error.__cause__}"
    if os.strerror(errno.EMFILE) in text or f"exit code {errno.EMFILE}." in text:
        return DataError(_TOO_MANY_FILES)
    if "Bus error" in text or f"exit code {errno.ENOSPC}." in text:
        return DataError(_NO_SHARED_MEMORY)
    return None


def _identity(batch: Batch) -> Batch:
    return batch


def _init_worker(_: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group; the main process decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_for, args=(parent.pid,), daemon=True).start()
    else:  # macOS
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A worker ends with a main process that was killed: it holds memory, and the run's lock.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    # Otherwise the main process would wait for a batch that could not be handed over.
    queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: _exit_with(error))
    sys.excepthook = lambda kind, error, trace: _exit_with(error)


def _exit_for(parent: int) -> None:
    """Ends this process at a SIGTERM of its parent, and of no other process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _exit_with(error: BaseException) -> NoReturn:
    """Ends this process with an exit code that `explain_worker_crash` knows."""
    full = os.strerror(errno.ENOSPC)
    text = str(error).replace("allocate shared memory", full)  # torch 2.11 names another errno
    for code in (errno.EMFILE, errno.ENOSPC):
        if os.strerror(code) in text:
            os._exit(code)
    traceback.print_exception(error)
    os._exit(1)
