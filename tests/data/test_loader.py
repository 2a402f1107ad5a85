"""Batches depend on the recipe and the step alone; failures of workers end in a clear error."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from workbench import data
from workbench.augmentation import EvalTransform, TrainTransform
from workbench.data import images, loader
from workbench.recipe import Recipe

TRAIN = TrainTransform(16, hflip=0.5, brightness=0.4)
TEST = EvalTransform(16, 20)
BALANCED = dict(class_balanced_sampling=0.8, repeated_aug=2, batch_size=4)


@pytest.fixture
def content(image_folder: Path) -> data.Dataset:
    return data.load_dataset(Recipe(dataset="files", data_dir=str(image_folder)))


@pytest.fixture
def frame(content) -> pd.DataFrame:
    """Eighteen training images, the last of them alone in its class."""
    content.train.loc[17, "label"] = 9
    return content.train


def assert_same(ours: list[data.Batch], theirs: list[data.Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        assert a[4:-1] == b[4:-1]  # but for the seconds


def taken(frame, steps=range(0, 8), **options) -> list[data.Batch]:
    options = {"seed": 3, "batch_size": 5, **options}
    return list(data.train_loader(frame, TRAIN, steps=steps, **options))


@pytest.mark.parametrize("how", [{}, {"class_balanced_sampling": 1.0}, BALANCED])
def test_a_batch_has_the_rows_of_the_sampler_with_the_random_numbers_of_their_copies(frame, how):
    sampler = data.Sampler(frame.label, **{"seed": 3, "batch_size": 5, **how})
    for batch in taken(frame, **how):
        rows, copies = sampler.rows(batch.step)
        assert batch.indices.tolist() == rows.tolist()
        assert batch.labels.tolist() == frame.label[rows].tolist()
        assert batch.global_size == len(rows) and batch.is_last and batch.failures == []
        assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (3, 16, 16)
        epoch = batch.step // sampler.steps_per_epoch
        for row, copy, image in zip(rows, copies, batch.images, strict=True):
            rng = data.rng_for(3, data.DRAW, epoch, int(row), int(copy))
            wanted = TRAIN(images.decode(frame.path[row]), rng)
            np.testing.assert_array_equal(image.permute(1, 2, 0), wanted)


# torch warns that four workers are more than a small machine has cores, which is intended here
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 2}, BALANCED])
@pytest.mark.parametrize("workers, start", [(0, 1), (0, 6), (1, 0), (4, 3)])
def test_batches_are_the_same_bytes_for_any_workers_and_from_any_step(frame, how, workers, start):
    rest = [batch for batch in taken(frame, **how) if batch.step >= start]
    assert_same(taken(frame, range(start, 8), workers=workers, **how), rest)


@pytest.mark.parametrize("how", [{}, BALANCED])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [None, 1, 2, 3])
def test_parts_of_all_ranks_add_up_to_the_step(frame, world, micro, how):
    ranks = [taken(frame, rank=r, world=world, micro_batch_size=micro, **how) for r in range(world)]
    for whole in taken(frame, **how):
        parts = [[part for part in own if part.step == whole.step] for own in ranks]
        sizes = [sum(len(part.images) for part in own) for own in parts]
        assert max(sizes) - min(sizes) <= 2  # pairs stay together
        for own in parts:
            assert [part.is_last for part in own] == [False] * (len(own) - 1) + [True]
            assert all(part.global_size == whole.global_size for part in own)
            assert all(len(part.images) <= (micro or 5) for part in own)
        parts = sum(parts, [])
        back = torch.argsort(torch.cat([part.positions for part in parts]))
        for name in ("positions", "indices", "labels", "images"):
            joined = torch.cat([getattr(part, name) for part in parts])[back]
            assert torch.equal(joined, getattr(whole, name))
        for part in [part.positions.tolist() for part in parts] if micro in (None, 2) else ():
            assert all(p ^ 1 in part or p ^ 1 >= whole.global_size for p in part)


@pytest.mark.parametrize("world", [1, 2, 9])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_validation_has_each_row_once_in_the_order_of_the_frame(content, world, batch_size):
    frame, seen = content.val, []
    for rank in range(world):
        got = list(data.eval_loader(frame, TEST, batch_size=batch_size, rank=rank, world=world))
        rows = [i for batch in got for i in batch.indices.tolist()]
        assert rows == list(range(6))[rank::world]
        for batch in got:
            assert len(batch.images) <= batch_size
            assert batch.labels.tolist() == frame.label[batch.indices.numpy()].tolist()
            for i, image in zip(batch.indices.tolist(), batch.images, strict=True):
                wanted = TEST(images.decode(frame.path[i]))
                np.testing.assert_array_equal(image.permute(1, 2, 0), wanted)
        seen += rows
    assert sorted(seen) == list(range(6))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_neither_change_nor_use_the_global_random_numbers(frame, workers):
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    first = taken(frame, range(2), workers=workers)
    list(data.eval_loader(frame, TEST, batch_size=4, workers=workers))
    assert torch.equal(torch.get_rng_state(), torch_before)
    now = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_before, now, strict=True))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert_same(first, taken(frame, range(2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_is_left_out_and_named_never_replaced(frame, workers):
    def by_row(batches: list[data.Batch]) -> dict[int, torch.Tensor]:
        return {int(i): p for b in batches for i, p in zip(b.indices, b.images, strict=True)}

    whole = by_row(taken(frame, range(4)))
    Path(frame.path[7]).write_bytes(b"broken")
    got = taken(frame, range(4), workers=workers)
    assert [f[:2] for b in got for f in b.failures] == [(7, "undecodable")]
    seen = by_row(got)
    assert set(seen) == set(range(18)) - {7}
    assert all(torch.equal(seen[i], whole[i]) for i in seen)
    assert sum(b.global_size for b in got) == 18


# ---- worker processes

READ = r"""
import os, resource, sys
from workbench import data
from workbench.augmentation import EvalTransform
from workbench.recipe import Recipe

size, batch_size, files, held = (int(word) for word in sys.argv[1:])
frame, batches = data.load_dataset(Recipe()).val, []
if files:
    now = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + files, now + files))
loader = data.eval_loader(frame, EvalTransform(size, size), batch_size=batch_size, workers=2)
try:
    for batch in loader:
        batch.images.sum()
        batches += [batch] * held  # each has open files
except data.DataError as error:
    sys.exit(str(error))
"""


def read(*arguments: int, within: tuple[str, ...] = ()) -> list[str]:
    command = [*within, sys.executable, "-W", "ignore", "-c", READ, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1, done.stderr
    return done.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files here")
def test_too_many_open_files_are_a_clear_error():
    printed = read(8, 2, 20, 1)
    [line] = [line for line in printed if line.startswith("too many open files: ")]
    assert "ulimit -n" in line


class EndsLate(EvalTransform):
    """A transform whose worker ends without a free file descriptor, after half a second."""

    def __call__(self, image, rng=None):
        time.sleep(0.5)
        os._exit(errno.EMFILE)


def test_a_worker_that_ends_after_its_connection_is_a_clear_error(frame, monkeypatch):
    """The handler of SIGCHLD raises while the main process waits for the worker's exit code."""
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter

    def reset(self, timeout=0):
        raise ConnectionResetError

    monkeypatch.setattr(iterator, "_try_get_data", reset)
    with pytest.raises(data.DataError, match="too many open files"):
        list(data.eval_loader(frame, EndsLate(8, 8), batch_size=2, workers=1))


def test_too_little_shared_memory_is_a_clear_error():
    """In a namespace with a small /dev/shm, as a container may have."""
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    alone = ("unshare", "--map-root-user", "--mount", "sh", "-c")
    if (
        not shutil.which("unshare")
        or subprocess.run([*alone, mount], capture_output=True).returncode
    ):
        pytest.skip("this machine permits no mount in a namespace")
    [line] = read(64, 128, 0, 0, within=(*alone, f'{mount} && exec "$0" "$@"'))
    assert line.startswith("shared memory (/dev/shm) is full") and "workers to 0" in line


@pytest.mark.parametrize(
    "error, cause, words",
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), None, "ulimit -n"),
        ("DataLoader worker (pid 7) exited unexpectedly with exit code 24.", None, "ulimit"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "with exit code 28.", "--shm-size"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is", None, "cache was cut"),
        ("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details", None, None),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None, None),
    ],
)
def test_errors_of_crashed_workers_are_explained_and_no_others(error, cause, words):
    error = RuntimeError(error) if isinstance(error, str) else error
    error.__cause__ = RuntimeError(cause) if cause else None
    explained = data.explain_worker_crash(error)
    assert explained is None if words is None else words in str(explained)


@pytest.mark.parametrize(
    "code, words", [(errno.EMFILE, "ulimit -n"), (errno.ENOSPC, "shm-size"), (1, None)]
)
def test_a_worker_that_ends_while_it_hands_over_a_batch_is_explained_by_its_exit_code(
    content, code, words, monkeypatch
):
    """torch's own error may be lost: raised in a destructor, Python ignores it."""

    class Broken:
        def __init__(self, *_, **__):
            ended = multiprocessing.get_context("fork").Process(target=os._exit, args=(code,))
            ended.start()
            self._workers = [ended]

        def __iter__(self):
            return self

        def __next__(self):
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    monkeypatch.setattr(loader, "DataLoader", Broken)
    with pytest.raises(data.DataError if words else ConnectionResetError, match=words):
        next(data.eval_loader(content.val, TEST, batch_size=2, workers=1))


def test_a_worker_ends_at_sigterm_of_its_parent_only(content):
    """A scheduler's SIGTERM reaches every process; the main one decides when loaders end."""
    how = dict(seed=0, batch_size=2, steps=range(1000), workers=1)
    reader = data.train_loader(content.train, TRAIN, **how)
    next(reader)
    [worker] = multiprocessing.active_children()
    subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, 15)"], check=True)
    worker.join(0.5)
    assert worker.is_alive() and next(reader).step == 1
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(20)
    assert worker.exitcode == 0
    reader.close()
