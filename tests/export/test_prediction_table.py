"""A table that was interrupted at any moment is resumed and ends with the same bytes."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import train
from prediction_helpers import IN_PHOTOS, Colours, make_photos

from workbench import data, locks
from workbench.data import toy
from workbench.export import PredictionError, open_source, predict_to_file
from workbench.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["workbench.export", "prediction_helpers", "pytest", "helpers"])


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path / "photos")


def leftovers(folder: Path) -> list[str]:
    """Temporary files beside an output."""
    return [p.name for p in folder.iterdir() if ".partial" in p.name or p.name.startswith(".out")]


# ---- killed processes


def _write_until_killed(source, inputs, out, ready, options):
    torch.set_num_threads(1)
    if isinstance(source, Path):
        source = open_source(source)
        source.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    ready.set()
    predict_to_file(source, inputs, out, **options)


def _start(source, inputs, out, **options):
    ready = _server.Event()
    process = _server.Process(
        target=_write_until_killed, args=(source, inputs, out, ready, options)
    )
    process.start()
    assert ready.wait(60)
    return process


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_repeatedly_a_run_gives_the_same_table(tmp_path, kills):
    recipe = Recipe(
        name="digits", train_fraction=0.1, epochs=1, batch_size=32, image_size=16, val_resize=16,
        model="test_resnet", workers=0, device="cpu", precision="fp32", runs_dir=str(tmp_path),
    )  # fmt: skip
    run, inputs = train(recipe).path, [toy.embedded("digits") / "val", tmp_path / "bad.png"]
    (tmp_path / "bad.png").write_bytes(b"no image")
    expected, out, options = tmp_path / "expected.csv", tmp_path / "out.csv", {"batch_size": 16}
    counts = predict_to_file(run, inputs, expected, **options)
    assert counts == {"": 500, "undecodable": 1}
    partial = tmp_path / "out.csv.partial"
    lines = lambda: partial.read_bytes().count(b"\n") if partial.exists() else 0
    moments, progress = random.Random(0), [0]
    for i in range(kills):
        process = _start(run, inputs, out, workers=int(i == 1), **options)
        while i % 3 and lines() <= progress[-1] + 16:  # mostly after one more batch
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not out.exists()
        progress.append(lines())
    assert len(set(progress)) > kills // 2 and progress[-1] > 30
    predict_to_file(run, inputs, out, **options)
    assert out.read_bytes() == expected.read_bytes() and leftovers(tmp_path) == []


def _die_at(number, half, inputs, out, options, counter):
    """Ends by SIGKILL before its numbered system call, or after half of a write.

    A negative counter means that the call was a write.
    """
    for name in ("write", "fsync", "replace", "unlink", "ftruncate", "mkdir"):
        call = getattr(os, name)

        def counted(*arguments, _call=call, _write=name == "write", **words):
            counter.value += 1
            if counter.value == number:
                if half and _write:
                    _call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                counter.value = -1 if _write else 1
                os.kill(os.getpid(), signal.SIGKILL)
            return _call(*arguments, **words)

        setattr(os, name, counted)
    data.available_cpus = lambda: 1  # the same order of calls every time
    predict_to_file(Colours(), inputs, out, **options)


@pytest.mark.parametrize(
    "suffix", [".csv", *(pytest.param(x, marks=pytest.mark.slow) for x in (".jsonl", ".parquet"))]
)
def test_killed_before_every_system_call_it_gives_the_same_table(photos, tmp_path, suffix):
    inputs = [photos / "0.png", photos / "below"]

    def contents(folder):
        files = (p for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}

    def place(name):
        folder = tmp_path / name
        folder.mkdir()
        return folder / f"out{suffix}", {"batch_size": 2, "top": 2, "annotate_dir": folder / "a"}

    out, options = place("expected")
    predict_to_file(Colours(), inputs, out, **options)
    expected = contents(out.parent)
    assert len(expected) == 4
    number, half, halves, code = 1, False, 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        out, options = place(f"{number}{half}")
        counter = _server.Value("i", 0)
        arguments = (number, half, inputs, out, options, counter)
        process = _server.Process(target=_die_at, args=arguments)
        process.start()
        process.join()
        code = process.exitcode
        if code != 0:
            predict_to_file(Colours(), inputs, out, **options)
        assert contents(out.parent) == expected, (number, half)
        # A write is killed twice: before it and after half of it.
        half = counter.value == -1 and not half
        halves, number = halves + half, number + (not half)
    assert code == 0 and number > 15 and halves == 3  # the header and two batches


def test_a_filesystem_without_flock_is_refused_since_a_second_writer_would_not_be(
    photos, tmp_path, monkeypatch
):
    def no_flock(handle, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    with pytest.raises(PredictionError, match="no flock on this filesystem; choose another folder"):
        predict_to_file(Colours(), [photos], tmp_path / "out.csv")
    assert leftovers(tmp_path) == []


def test_a_second_writer_is_refused(photos, tmp_path):
    out = tmp_path / "out.csv"
    process = _start(Colours(pause=1.0), [photos], out, batch_size=1)
    try:
        while not (tmp_path / "out.csv.partial").exists():
            time.sleep(0.01)
        time.sleep(0.05)
        with pytest.raises(PredictionError, match="is being written by another process"):
            predict_to_file(Colours(), [photos], out, batch_size=1)
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    predict_to_file(Colours(), [photos], out, batch_size=1)
    assert pd.read_csv(out).file.tolist() == IN_PHOTOS


# ---- other files in the way


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("nowhere/out.csv", {}, "was not written"),
        ("out.xlsx", {}, "its suffix must be .csv, .jsonl, .parquet"),
        ("out.csv", {"top": 0}, "top is 0"),
        ("out.csv", {"batch_size": -1}, "batch_size -1"),
        ("file.csv", {}, "exists and is not replaced"),
        ("link.csv", {}, "exists and is not replaced"),
    ],
)
def test_bad_arguments_are_refused_before_the_work(photos, tmp_path, out, options, message):
    (tmp_path / "file.csv").write_text("mine")
    (tmp_path / "link.csv").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PredictionError, match=message):
        predict_to_file(Colours(pytest.fail), [photos], tmp_path / out, **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file.csv").read_text() == "mine"


def test_a_table_finished_by_another_process_meanwhile_is_kept(photos, tmp_path, monkeypatch):
    out, locking = tmp_path / "out.csv", locks.locking

    def late(path):
        out.write_text("theirs")
        return locking(path)

    monkeypatch.setattr(locks, "locking", late)
    with pytest.raises(PredictionError, match="exists and is not replaced"):
        predict_to_file(Colours(), [photos], out)
    assert out.read_text() == "theirs" and leftovers(tmp_path) == []


def test_a_file_created_meanwhile_is_not_replaced_and_predictions_are_saved(photos, tmp_path):
    out, calls = tmp_path / "out.csv", []
    for source in (Colours(lambda _: out.write_text("mine")), Colours()):
        with pytest.raises(PredictionError, match="exists and is not replaced"):
            predict_to_file(source, [photos], out, batch_size=4)
        assert out.read_text() == "mine"
    out.unlink()
    predict_to_file(Colours(calls.append), [photos], out, batch_size=4)
    assert pd.read_csv(out).file.tolist() == IN_PHOTOS and not calls


@pytest.mark.parametrize("text", [b"my notes", b'{"a": 1}\n', b"[1]\n"])
def test_another_file_named_partial_is_not_changed(photos, tmp_path, text):
    partial = tmp_path / "out.csv.partial"
    partial.write_bytes(text)
    with pytest.raises(PredictionError, match="is of a call with other .* delete it"):
        predict_to_file(Colours(), [photos], tmp_path / "out.csv")
    assert partial.read_bytes() == text


# ---- resuming


class _Stop(Exception):
    pass


def interrupted(photos: Path, out: Path, batches: int = 1) -> bytes:
    """A call that is interrupted after some batches of 4; the content of its partial file."""
    calls = []

    def stop(count):
        calls.append(count)
        if len(calls) > batches:
            raise _Stop

    with contextlib.suppress(_Stop):
        predict_to_file(Colours(stop), [photos], out, batch_size=4)
    return out.with_name(f"{out.name}.partial").read_bytes()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"top": 2}, "top"),
        ({"batch_size": 3}, "batch_size"),
        ({"source": Colours(fingerprint="others")}, "weights"),
        ({"annotate_dir": "shown"}, "annotate_dir"),
        ({"inputs": ["more", "photos"]}, "inputs"),
    ],
)
def test_other_arguments_are_named_and_nothing_is_changed(
    photos, tmp_path, monkeypatch, change, name
):
    monkeypatch.chdir(tmp_path)
    before = interrupted(photos, tmp_path / "out.csv")
    make_photos(tmp_path / "more")
    options = {"source": Colours(), "inputs": [photos], "batch_size": 4, **change}
    with pytest.raises(PredictionError, match=f"with other {name}; use the same arguments"):
        predict_to_file(out="out.csv", **options)
    assert (tmp_path / "out.csv.partial").read_bytes() == before
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text + b'{"file": "4.p',
        lambda text: text + text.splitlines(keepends=True)[-1],
        lambda text: text + b'{"file": "4.png"}\n' + b"\0" * 4096,
        lambda text: text + b"\xff\n" * 3,
        lambda text: text[:-5],
        lambda text: text.replace(b'"1.png"', b'"7.png"'),
        lambda text: text.splitlines(keepends=True)[0],
        lambda text: text.splitlines(keepends=True)[0][:-20],
    ],
)
def test_a_damaged_end_is_predicted_again(photos, tmp_path, damage):
    out, expected = tmp_path / "out.csv", tmp_path / "expected.csv"
    predict_to_file(Colours(), [photos], expected, batch_size=4)
    partial = tmp_path / "out.csv.partial"
    partial.write_bytes(damage(interrupted(photos, out)))
    predict_to_file(Colours(), [photos], out, batch_size=4)
    assert out.read_bytes() == expected.read_bytes() and leftovers(tmp_path) == []


def test_complete_batches_are_not_predicted_again(photos, tmp_path):
    calls = []
    interrupted(photos, tmp_path / "out.csv", batches=2)
    predict_to_file(Colours(calls.append), [photos], tmp_path / "out.csv", batch_size=4)
    assert calls == [1]


@pytest.mark.parametrize("replaced, calls", [(9, 1), (6, 2), (0, 3)])
def test_images_that_changed_since_are_predicted_again(photos, tmp_path, replaced, calls):
    out, expected = tmp_path / "out.jsonl", tmp_path / "expected.jsonl"
    interrupted(photos, out, batches=2)  # 8 of 9 images
    if replaced < 9:
        path = photos / IN_PHOTOS[replaced]
        before = path.stat()
        content = (photos / IN_PHOTOS[replaced + 1]).read_bytes()
        path.write_bytes(content.ljust(before.st_size, b"\0"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as cp -p leaves it
    counts = []
    predict_to_file(Colours(counts.append), [photos], out, batch_size=4)
    predict_to_file(Colours(), [photos], expected, batch_size=4)
    assert len(counts) == calls and out.read_bytes() == expected.read_bytes()


def test_a_batch_is_synced_before_the_next_one(photos, tmp_path, monkeypatch):
    events, fsync = [], os.fsync

    def synced(handle):
        fsync(handle)
        name = os.readlink(f"/proc/self/fd/{handle}")
        if name.endswith(".partial"):
            events.append(os.fstat(handle).st_size == os.path.getsize(name) > 0 and "synced")

    monkeypatch.setattr(os, "fsync", synced)
    source = Colours(lambda _: events.append("predicted"))
    predict_to_file(source, [photos], tmp_path / "out.csv", batch_size=4)
    assert events == ["synced", *["predicted", "synced"] * 3]


def _write_with_small_files(photos, out, limit, options):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        predict_to_file(Colours(), [photos], out, **options)
    except PredictionError as error:
        sys.exit(3 if "was not written" in str(error) else 4)


# In bytes: no header, half a batch, an image, the second batch, the table itself is the larger.
@pytest.mark.parametrize("limit", [0, 50, 1300, 1500])
def test_on_a_full_disk_it_is_an_error_and_resumes_later(photos, tmp_path, limit):
    out, expected = tmp_path / "full" / "out.jsonl", tmp_path / "expected.jsonl"
    out.parent.mkdir()
    predict_to_file(Colours(), [photos], expected, batch_size=4)
    options = {"batch_size": 4, "annotate_dir": out.parent / "shown"}
    process = _server.Process(target=_write_with_small_files, args=(photos, out, limit, options))
    process.start()
    process.join()
    assert process.exitcode == 3 and not out.exists()
    predict_to_file(Colours(), [photos], out, **options)
    assert out.read_bytes() == expected.read_bytes() and leftovers(out.parent) == []
    assert len(list((out.parent / "shown").rglob("*.*"))) == 9


def test_a_partial_write_is_continued(photos, tmp_path, monkeypatch):
    out, expected = tmp_path / "out.jsonl", tmp_path / "expected.jsonl"
    predict_to_file(Colours(), [photos], expected)
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, text: write(handle, text[:100]))
    predict_to_file(Colours(), [photos], out)
    assert out.read_bytes() == expected.read_bytes()
