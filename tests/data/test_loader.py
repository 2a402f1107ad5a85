"""Batches depend on the recipe and the step alone; failures of workers end in a clear error."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
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


def opened(image_folder: Path) -> data.Dataset:
    return data.load_dataset(Recipe(dataset="files", data_dir=str(image_folder)))


@pytest.fixture
def frame(image_folder: Path) -> pd.DataFrame:
    """Eighteen training images, the last of them alone in its class."""
    frame = opened(image_folder).train
    frame.loc[17, "label"] = 9
    return frame


def assert_same(ours: list[data.Batch], theirs: list[data.Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        assert a[4:-1] == b[4:-1]  # but for the seconds


def taken(frame, steps=range(0, 8), transform=TRAIN, **options) -> list[data.Batch]:
    return list(
        data.train_loader(
            frame, transform, **{"seed": 3, "batch_size": 5, "steps": steps, **options}
        )
    )


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


# torch warns that four workers are more than a small machine has cores; that is the point here
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("how", [{}, {"micro_batch_size": 2}, BALANCED])
@pytest.mark.parametrize("workers, start", [(0, 1), (0, 6), (1, 0), (4, 3)])
def test_batches_are_the_same_bytes_for_any_workers_and_from_any_step(frame, how, workers, start):
    rest = [batch for batch in taken(frame, **how) if batch.step >= start]
    assert_same(taken(frame, range(start, 8), workers=workers, **how), rest)


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_epoch_uses_each_image_once(frame, drop_last):
    steps = 3 if drop_last else 4
    got = taken(frame, range(steps * 3), drop_last=drop_last)
    for epoch in range(3):
        rows = torch.cat([b.indices for b in got[epoch * steps : (epoch + 1) * steps]]).tolist()
        assert len(set(rows)) == len(rows) == (15 if drop_last else 18)


@pytest.mark.parametrize("how", [{}, BALANCED])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [None, 1, 2, 3, 4])
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
        for part in [part.positions.tolist() for part in parts] if micro in (None, 2, 4) else ():
            assert all(p ^ 1 in part or p ^ 1 >= whole.global_size for p in part)


def test_a_rank_without_a_row_gets_an_empty_part(frame):
    ranks = [taken(frame, range(3, 4), rank=r, world=5, micro_batch_size=1) for r in range(5)]
    assert [[len(part.images) for part in own] for own in ranks] == [[1, 1], [1], [0], [0], [0]]
    empty = ranks[4][0]
    assert empty.images.shape == (0, 3, 16, 16) and empty.labels.shape == (0,)
    assert empty.global_size == 3 and empty.is_last and empty.step == 3


def test_repeated_augmentation_uses_a_third_of_the_images_three_times_differently(frame):
    got = taken(frame, range(12), batch_size=6, repeated_aug=3)  # 3 steps an epoch
    for epoch in range(4):
        steps = got[3 * epoch : 3 * epoch + 3]
        rows = np.concatenate([batch.indices.numpy() for batch in steps])
        first = data.epoch_permutation(3, epoch, 18)[:6]
        assert sorted(rows.tolist()) == sorted([*first.tolist()] * 3)
        for batch in steps:
            for row in set(batch.indices.tolist()):
                copies = batch.images[batch.indices == row]
                assert len(copies) == len(torch.unique(copies, dim=0)) == 3  # in one batch


@pytest.mark.parametrize("world", [1, 2, 5, 9])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_validation_has_each_row_once_in_the_order_of_the_frame(image_folder, world, batch_size):
    frame, seen = opened(image_folder).val, []
    for rank in range(world):
        got = list(data.eval_loader(frame, TEST, batch_size=batch_size, rank=rank, world=world))
        rows = [i for batch in got for i in batch.indices.tolist()]
        assert rows == list(range(6))[rank::world]
        assert all(len(batch.images) <= batch_size for batch in got)
        for batch in got:
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
def test_an_image_that_breaks_later_is_left_out_and_named_never_swapped(image_folder, workers):
    frame = opened(image_folder).train
    whole = {int(i): p for b in taken(frame, range(4)) for i, p in zip(b.indices, b.images)}  # noqa: B905
    Path(frame.path[7]).write_bytes(b"broken")
    got = taken(frame, range(4), workers=workers)
    assert [f[:2] for b in got for f in b.failures] == [(7, "undecodable")]
    seen = {int(i): p for b in got for i, p in zip(b.indices, b.images, strict=True)}
    assert set(seen) == set(range(18)) - {7}
    assert all(torch.equal(seen[i], whole[i]) for i in seen)
    assert sum(b.global_size for b in got) == 18


# ---- worker processes


FEW_FILES = r"""
import os, resource, sys
from workbench import data
from workbench.augmentation import EvalTransform
from workbench.recipe import Recipe

frame = data.load_dataset(Recipe()).val
now = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (now + 20, now + 20))
try:
    for batch in data.eval_loader(frame, EvalTransform(8, 8), batch_size=2, workers=2):
        batch.images.sum()
        kept = [batch] + globals().get("kept", [])  # each holds its files open
except data.DataError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files here")
def test_too_many_open_files_are_a_clear_error():
    command = [sys.executable, "-W", "ignore", "-c", FEW_FILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    told = [line for line in done.stderr.splitlines() if line.startswith("too many open files: ")]
    assert done.returncode == 1 and len(told) == 1 and "ulimit -n" in told[0], done.stderr


SMALL_MEMORY = r"""
import sys
from workbench import data
from workbench.augmentation import EvalTransform
from workbench.recipe import Recipe

frame = data.load_dataset(Recipe()).val
try:
    for batch in data.eval_loader(frame, EvalTransform(64, 64), batch_size=128, workers=2):
        batch.images.sum()
except data.DataError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("size", ["1m", pytest.param("40k", marks=pytest.mark.slow)])
# of the second, a batch and a semaphore
def test_too_little_shared_memory_is_a_clear_error(size):
    """A namespace of its own has a /dev/shm of this size, as a container may have."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*alone, mount], capture_output=True).returncode
    ):
        pytest.skip("this machine permits no mount in a namespace of one's own")
    command = [*alone, f'{mount} && exec "$0" "$@"', sys.executable, "-W", "ignore"]
    done = subprocess.run(
        [*command, "-c", SMALL_MEMORY], capture_output=True, text=True, timeout=180
    )
    [told] = done.stderr.splitlines()
    assert done.returncode == 1
    assert told.startswith("shared memory (/dev/shm) is full") and "workers to 0" in told


@pytest.mark.parametrize(
    "error, cause, words",
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), None, "ulimit -n"),
        ("DataLoader worker (pid 7) exited unexpectedly with exit code 24.", None, "ulimit"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "with exit code 24.", "ulimit"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "with exit code 28.", "--shm-size"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is", None, "cache was cut"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "signal: Bus error.", "cache was cut"),
        ("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details", None, None),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None, None),
        (EOFError("Ran out of input"), None, None),
    ],
)  # fmt: skip
def test_errors_of_crashed_workers_are_explained(error, cause, words):
    """In torch's words; of any other error nothing is said."""
    error = RuntimeError(error) if isinstance(error, str) else error
    error.__cause__ = RuntimeError(cause) if cause else None
    assert (
        (data.explain_worker_crash(error) is None)
        if words is None
        else (words in str(data.explain_worker_crash(error)))
    )


@pytest.mark.parametrize(
    "code, words", [(errno.EMFILE, "ulimit -n"), (errno.ENOSPC, "shm-size"), (1, None)]
)
def test_a_worker_that_ends_while_it_hands_over_a_batch_is_explained_by_its_exit_code(
    frame, code, words, monkeypatch
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
        next(data.eval_loader(frame, TEST, batch_size=2, workers=1))


def test_a_worker_ends_at_sigterm_of_its_parent_only(image_folder):
    """A scheduler's SIGTERM reaches every process; the main one decides when loaders end."""
    reader = data.train_loader(
        opened(image_folder).train, TRAIN, seed=0, batch_size=2, steps=range(1000), workers=1
    )
    next(reader)
    [loader] = multiprocessing.active_children()
    subprocess.run([sys.executable, "-c", f"import os; os.kill({loader.pid}, 15)"], check=True)
    loader.join(0.5)
    assert loader.is_alive() and next(reader).step == 1
    os.kill(loader.pid, signal.SIGTERM)
    loader.join(20)
    assert loader.exitcode == 0
    reader.close()
