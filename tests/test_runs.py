"""The run folder: complete after a kill, closed to a second writer, open to readers."""

import contextlib
import json
import math
import multiprocessing
import os
import resource
import signal
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from helpers import assert_same_tensors, fork_server

from workbench import runs, training
from workbench.recipe import Recipe
from workbench.run_list import COLUMNS, rows
from workbench.runs import Run, RunError, atomic_write, finished, follow, unused_name

pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def child(function, *arguments):
    """A process that is ready (it set the event it got last), killed at the end."""
    ready = fork_server.Event()
    process = fork_server.Process(target=function, args=(*arguments, ready))
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def small(image_folder: Path, folder: Path, **changes) -> Recipe:
    """Three epochs of three steps on the image_folder; validated after the second and the third."""
    options = {"dataset": "files", "data_dir": str(image_folder), "runs_dir": str(folder)}
    options |= {"image_size": 16, "val_resize": 16, "epochs": 3, "batch_size": 6, "eval_every": 2}
    options |= {"hflip": 0.5, "log_every": 1, "device": "cpu", "precision": "fp32", "workers": 0}
    return Recipe(**{**options, **changes})


def train(recipe: Recipe, epochs: int | None = None) -> list[dict]:
    """The rows of a training, stopped after some epochs."""
    rows = []
    with contextlib.closing(training.fit(recipe, Run(recipe.folder))) as loop:
        for row in loop:
            rows.append(row)
            if row["kind"] == "epoch" and row["epoch"] == epochs:
                break
    return rows


# ---- one writer


def _hold(path, ready):
    with Run(path).writing() as run:
        run.set_status("running", step=3)
        ready.set()
        time.sleep(600)


def test_a_second_writer_is_refused_and_told_the_first(tmp_path):
    run = Run(tmp_path / "run")
    with child(_hold, run.path) as holder:
        assert run.locked()
        with pytest.raises(RunError, match=f"being written by process {holder.pid} on .*STOP"):
            with run.writing():
                pytest.fail("two writers")
        with pytest.raises(RunError, match=f"process {holder.pid} "):
            list(training.fit(Recipe(), run))
    with run.writing(), pytest.raises(RunError, match=f"process {os.getpid()} "):
        with Run(run.path).writing():  # in the same process
            pytest.fail("two writers")


def test_the_lock_ends_with_its_process(tmp_path):
    run = Run(tmp_path / "run")
    with child(_hold, run.path) as holder:
        assert run.status()["state"] == "running"
        kill(holder)
        assert not run.locked()
        assert (run.status()["state"], run.status()["step"]) == ("interrupted", 3)
        with run.writing():
            assert run.locked()
    assert not run.locked()


def _train_with_workers(options, ready):
    multiprocessing.set_start_method("fork", force=True)  # Python's choice in a fresh process
    for _ in training.fit(recipe := Recipe(**options), Run(recipe.folder)):
        ready.set()


def test_the_lock_ends_with_a_training_that_had_workers(image_folder, tmp_path):
    """The workers are processes too, and outlive a killed parent by seconds."""
    recipe = small(image_folder, tmp_path, epochs=10_000, eval_every=10_000, workers=2)
    run = Run(recipe.folder)
    with child(_train_with_workers, recipe.model_dump()) as trainer:
        kill(trainer)
        with run.writing():
            assert run.steps().step.iloc[0] == 1


def test_a_reader_does_not_keep_a_writer_out(tmp_path):
    run, done, written = Run(tmp_path), threading.Event(), 0
    with run.writing():
        pass

    def look():
        while not done.is_set():
            run.locked()

    watchers = [threading.Thread(target=look) for _ in range(2)]
    try:
        for watcher in watchers:
            watcher.start()
        for _ in range(200):
            with Run(tmp_path).writing():
                written += 1
    finally:
        done.set()
        for watcher in watchers:
            watcher.join()
    assert written == 200


def test_only_the_holder_of_the_lock_replaces_files(tmp_path):
    with pytest.raises(RunError, match="run.writing"):
        Run(tmp_path).write_json("status.json", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file/run", "file", "/proc/run"])
def test_a_folder_that_cannot_be_created_is_an_error(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write .*choose another runs_dir"):
        with Run(tmp_path / path).writing():
            pytest.fail("wrote there")


# ---- files are complete or unchanged

NAMES = (
    "recipe.yaml environment.json status.json metrics.csv steps.csv quarantine.csv "
    "predictions.parquet nonfinite.csv last.pt best.safetensors"
).split()


def _write_half_of_everything(path, ready):
    with Run(path).writing() as run, contextlib.ExitStack() as stack:
        for name in NAMES:
            stack.enter_context(atomic_write(run.file(name))).write_bytes(b"half")
        ready.set()
        time.sleep(600)


def test_a_writer_killed_while_replacing_leaves_the_old_files(tmp_path):
    """The next writer removes what it left over."""
    for name in NAMES:
        (tmp_path / name).write_bytes(b"whole")
    (tmp_path / ".mine.txt").touch()
    with child(_write_half_of_everything, tmp_path) as writer:
        kill(writer)
    assert {(tmp_path / name).read_bytes() for name in NAMES} == {b"whole"}
    assert len(list(tmp_path.glob(".*"))) == len(NAMES) + 1
    with Run(tmp_path).writing():
        pass
    wanted = sorted([*NAMES, "lock", "lock.2", ".mine.txt"])
    assert sorted(p.name for p in tmp_path.iterdir()) == wanted


def _save_slowly(path, ready):
    class Slow:
        def __reduce__(self):
            ready.set()
            time.sleep(600)

    with Run(path).writing() as run:
        run.save_checkpoint({"step": torch.tensor(2), "slow": Slow()})


def test_a_writer_killed_while_saving_leaves_the_previous_checkpoint(tmp_path):
    run = Run(tmp_path)
    with run.writing():
        run.save_checkpoint({"step": torch.tensor(1)})
    with child(_save_slowly, tmp_path) as writer:
        kill(writer)
    assert run.load_checkpoint() == {"step": torch.tensor(1)}


class Unpicklable:
    def __reduce__(self):
        raise ZeroDivisionError


def test_a_writer_that_raises_leaves_the_old_file_and_nothing_else(tmp_path):
    run = Run(tmp_path)
    with run.writing():
        run.save_checkpoint({"step": 1})
        before = sorted(p.name for p in tmp_path.iterdir())
        with pytest.raises(ZeroDivisionError):
            run.save_checkpoint({"step": Unpicklable()})
        with pytest.raises(ZeroDivisionError), atomic_write(run.file("last.pt")) as temporary:
            temporary.write_bytes(b"half")
            raise ZeroDivisionError
    assert run.load_checkpoint() == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_reader_never_meets_half_a_file(tmp_path):
    run, seen, done = Run(tmp_path), set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(run.status()["state"])

    with run.writing():
        run.set_status("stopped", step=0, message="x" * 100_000)
        reader = threading.Thread(target=read)
        reader.start()
        for step in range(100):
            run.set_status("stopped", step=step)
        done.set()
        reader.join()
    assert seen == {"stopped"}


def test_the_umask_decides_who_may_read(tmp_path):
    mask = os.umask(0o022)
    try:
        with Run(tmp_path).writing() as run:
            run.write_json("status.json", {})
            run.save_weights("best.safetensors", {"weight": torch.zeros(2)}, {})
    finally:
        os.umask(mask)
    for name in ("status.json", "best.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o644


def test_a_status_keeps_the_values_that_are_not_given(tmp_path):
    with Run(tmp_path).writing() as run:
        run.set_status("running", step=3, steps=9, message="é")
        run.set_status("stopped", step=4)
        wanted = {"state": "stopped", "step": 4, "steps": 9, "message": "é"}
        assert run.status() | wanted == run.status()


@pytest.mark.parametrize("content", [b"", b"null", b"\xff\xfe"])
def test_an_unreadable_status_is_a_state_and_not_an_error(tmp_path, content):
    (tmp_path / "status.json").write_bytes(content)
    assert Run(tmp_path).status()["state"] == "unreadable"


def test_a_missing_run_reads_as_new(tmp_path):
    run = Run(tmp_path / "nowhere")
    assert run.status()["state"] == "new"
    assert run.metrics().empty and run.steps().empty and run.quarantine().empty
    assert run.environment() == {} and run.load_checkpoint() is None
    with pytest.raises(RunError, match="no readable run"):
        run.recipe()
    with pytest.raises(RunError, match="no predictions"):
        run.predictions()
    assert not run.path.exists()


# ---- tables


@pytest.fixture
def writer(tmp_path):
    with Run(tmp_path / "run").writing() as run:
        yield run


def test_the_header_is_written_once_also_after_a_restart(writer):
    writer.append("metrics.csv", {"step": 1, "loss": 0.5})
    writer.append("metrics.csv", {"loss": 0.25, "step": 2})  # another order, the same columns
    Run(writer.path).append("metrics.csv", {"step": 3, "loss": None})
    assert writer.file("metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n3,\n"


def test_floats_are_read_as_they_were_written(writer):
    powers = np.arange(-1000, 1000).clip(-300, 300)
    values = (np.random.default_rng(0).standard_normal(2000) * 10.0**powers).tolist()
    values += [0.1 + 0.2, math.pi, 5e-324, 1.7976931348623157e308, -0.0]
    for step, value in enumerate(values):
        writer.append("steps.csv", {"step": step, "loss": value})
    texts = writer.file("steps.csv").read_text().split()[1:]
    assert [float(text.split(",")[1]) for text in texts] == values
    assert writer.steps().loss.tolist() == values


def test_names_with_commas_quotes_and_line_ends_are_read_as_they_were_written(writer):
    names = ["a,b.png", 'a"b.png', "a\nb.png", "größe 猫.png", "a\u2028b.png", "late.png"]
    for step, name in enumerate(names):
        writer.append("quarantine.csv", {"file": name, "step": step})
    writer.truncate_after(4)
    assert writer.quarantine().file.tolist() == names[:5]


def test_a_new_column_is_empty_in_the_rows_before_and_a_missing_one_in_those_after(writer):
    rows = [{"step": 1, "name": "a,b"}, {"step": 2, "top1": 0.1, "name": "c"}, {"step": 3}]
    for row in rows:
        writer.append("metrics.csv", row)
    assert writer.file("metrics.csv").read_text() == 'step,name,top1\n1,"a,b",\n2,c,0.1\n3,,\n'
    pd.testing.assert_frame_equal(writer.metrics(), pd.DataFrame(rows))


@pytest.mark.parametrize("half", ["3,0", "3,0.125,", "step,lo"])
def test_half_a_last_line_is_ignored_and_removed_by_truncate_after(writer, half):
    path = writer.file("steps.csv")
    whole = "" if half.startswith("step") else "step,loss\n1,0.5\n2,0.25\n"
    path.write_text(whole + half)
    assert len(writer.steps()) == (2 if whole else 0)
    writer.truncate_after(10)
    writer.append("steps.csv", {"step": 3, "loss": 0.125})
    assert path.read_text() == (whole or "step,loss\n") + "3,0.125\n"


def test_truncate_after_leaves_the_bytes_of_the_rows_up_to_the_step(writer):
    texts = {}
    for name in runs.TABLES:
        for step in range(-1, 6):
            writer.append(name, {"file": "a b", "step": step, "loss": step / 3})
        text = writer.file(name).read_text()
        texts[name] = "".join(text.splitlines(keepends=True)[:5])  # the header, -1, 0, 1, 2
    for _ in range(2):
        writer.truncate_after(2)
        assert {name: writer.file(name).read_text() for name in texts} == texts
    writer.truncate_after(-2)
    assert not any(writer.file(name).exists() for name in texts)


# ---- a table of runs


def table(root: Path) -> pd.DataFrame:
    return pd.DataFrame(rows(root), columns=[*COLUMNS.split(), "device", "updated"])


def made(root: Path, name: str, *, day: int = 1, epochs: int = 8, **environment) -> Path:
    """A finished run folder with all that the table reads."""
    path = root / name
    path.mkdir(parents=True)
    recipe = Recipe(epochs=epochs)
    recipe.to_yaml(path / "recipe.yaml")
    updated = f"2026-01-{day:02}T00:00:00+0000"
    status = {"state": "finished", "step": 9, "steps": 9, "message": "", "updated": updated}
    (path / "status.json").write_text(json.dumps(status))
    facts = {"seconds": 120.0, "device": "cpu", "recipe": recipe.fingerprint, **environment}
    (path / "environment.json").write_text(json.dumps(facts))
    row = {"epoch": 8, "step": 9, "train_loss": 0.5, "top1": 90.0, "top5": 99.0, "val_images": 500}
    pd.DataFrame([row]).to_csv(path / "metrics.csv", index=False)
    touched = time.mktime(time.strptime(updated[:19], "%Y-%m-%dT%H:%M:%S"))
    for file in path.iterdir():
        os.utime(file, (touched, touched))
    return path


@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_a_folder_without_runs_has_no_rows(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert rows(tmp_path / name) == []


def test_a_row_has_the_facts_of_the_folder(tmp_path):
    made(tmp_path, "good-seed0")
    (row,) = rows(tmp_path)
    wanted = {"run": "good-seed0", "state": "finished", "model": "test_resnet", "top1": 90.0}
    wanted |= {"epoch": 8, "epochs": 8, "n": 500, "minutes": 2.0, "device": "cpu"}
    assert row | wanted == row


def test_a_row_has_the_last_evaluation_where_not_every_epoch_has_one(tmp_path):
    run = Run(made(tmp_path, "good-seed0"))
    with run.writing():
        run.append("metrics.csv", {"epoch": 9, "step": 10, "train_loss": 0.4, "top1": None})
    (row,) = rows(tmp_path)
    assert (row["epoch"], row["train_loss"], row["top1"], row["n"]) == (9, 0.4, 90.0, 500)


DAMAGE = {
    "recipe.yaml cut": ("recipe.yaml", lambda p: p.write_text("lr: [0.1, ")),
    "recipe.yaml a list": ("recipe.yaml", lambda p: p.write_text("[1, 2]")),
    "recipe.yaml not text": ("recipe.yaml", lambda p: p.write_bytes(b"\xff\xfe\x00")),
    "recipe.yaml a folder": ("recipe.yaml", lambda p: p.unlink() or p.mkdir()),
    "environment.json cut": ("environment.json", lambda p: p.write_text('{"seconds": 1')),
    "environment.json a list": ("environment.json", lambda p: p.write_text("[1]")),
    "environment.json of text": ("environment.json", lambda p: p.write_text('{"seconds": "a"}')),
    "status.json null": ("status.json", lambda p: p.write_text("null")),
    "metrics.csv not text": ("metrics.csv", lambda p: p.write_bytes(b"\xff\n\xfe\n")),
    "metrics.csv of words": ("metrics.csv", lambda p: p.write_text("epoch,step\nx,y\n")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_has_a_row_and_hides_no_other(tmp_path, kind):
    name, damage = DAMAGE[kind]
    made(tmp_path, "newest", day=3)
    path = made(tmp_path, "damaged", day=2) / name
    made(tmp_path, "oldest", day=1)
    touched = path.stat().st_mtime
    damage(path)
    os.utime(path, (touched, touched))
    frame = table(tmp_path)
    assert frame.run.tolist() == ["newest", "damaged", "oldest"]
    assert frame.state.tolist() == ["finished", "unreadable", "finished"]


def test_a_run_before_its_first_epoch_is_listed_and_a_folder_without_recipe_is_not(tmp_path):
    begun = made(tmp_path, "begun")
    for name in ("metrics.csv", "environment.json", "status.json"):
        (begun / name).unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "recipe.yaml").symlink_to("nowhere")
    (row,) = rows(tmp_path)
    assert (row["run"], row["state"], row["epoch"]) == ("begun", "new", 0)


# ---- finished runs of the same recipe or the same images

SAME = Recipe(epochs=3).fingerprint


def named(found: list[Run]) -> list[str]:
    return [run.path.name for run in found]


def test_finished_runs_are_found_by_their_environment(tmp_path):
    for name, epochs, digest in [("b", 3, "12"), ("a", 3, "12"), ("c", 3, "34"), ("d", 4, "12")]:
        made(tmp_path, name, epochs=epochs, data=digest)
    assert named(finished(tmp_path, recipe=SAME)) == ["a", "b", "c"]
    assert named(finished(tmp_path, recipe=SAME, data="12")) == ["a", "b"]
    assert named(finished(tmp_path, data="34")) == ["c"]
    assert finished(tmp_path, recipe="other") == finished(tmp_path / "nowhere") == []
    assert len(finished(tmp_path)) == 4


@pytest.mark.parametrize("kind", ["environment.json cut", "status.json null", "stopped"])
def test_damaged_and_unfinished_runs_are_not_finished_runs(tmp_path, kind):
    made(tmp_path, "good", epochs=3)
    stop = ("status.json", lambda p: p.write_text('{"state": "stopped"}'))
    name, damage = DAMAGE.get(kind, stop)
    damage(made(tmp_path, "damaged", epochs=3) / name)
    assert named(finished(tmp_path, recipe=SAME)) == ["good"]


def test_an_unused_name_has_no_run_of_another_recipe(tmp_path):
    recipe = Recipe(name="demo", runs_dir=str(tmp_path))
    assert unused_name(recipe) == recipe
    for name, epochs in (("demo-seed0", 3), ("demo_2-seed0", 4)):
        path = made(tmp_path, name, epochs=epochs)
        # without a checkpoint there is nothing to lose
        assert unused_name(recipe) == recipe.replace(name=name.removesuffix("-seed0"))
        (path / "last.pt").touch()
        assert unused_name(recipe.replace(epochs=epochs)).folder == path
    assert unused_name(recipe).name == "demo_2_2"


def test_finished_reads_what_training_writes(image_folder, tmp_path):
    """The same recipe under another name is found; another seed is another recipe."""
    recipe = small(image_folder, tmp_path, epochs=1, eval_every=1)
    train(recipe)
    again = recipe.replace(name="again")
    assert named(finished(tmp_path, recipe=again.fingerprint)) == ["baseline-seed0"]
    assert finished(tmp_path, recipe=recipe.replace(seed=1).fingerprint) == []
    known = Run(recipe.folder).environment()["data"]
    (image_folder / "val" / "a" / "0.png").unlink()
    train(again)
    assert named(finished(tmp_path, data=known)) == ["baseline-seed0"]
    assert len(finished(tmp_path, recipe=recipe.fingerprint)) == 2


# ---- follow


def parted(rows) -> dict[str, list[dict]]:
    """The rows by kind; an epoch's row may come before that of its last step."""
    parts: dict[str, list[dict]] = {"step": [], "epoch": []}
    for row in rows:
        parts[row["kind"]].append({k: v for k, v in row.items() if k not in ("kind", "steps")})
    return parts


def collected(rows) -> tuple[list[dict], threading.Thread]:
    """A list that a thread fills with the rows; the test continues even if they never end."""
    seen: list[dict] = []
    thread = threading.Thread(target=lambda: [seen.append(row) for row in rows], daemon=True)
    thread.start()
    return seen, thread


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def ended(thread: threading.Thread) -> bool:
    thread.join(60)
    return not thread.is_alive()


def test_following_a_finished_run_gives_the_rows_of_fit(image_folder, tmp_path):
    recipe = small(image_folder, tmp_path / "runs")
    rows = train(recipe)
    assert [row["kind"] for row in rows].count("epoch") == 3
    assert parted(rows)["epoch"][0]["top1"] is None
    followed, thread = collected(follow(Run(recipe.folder)))
    assert ended(thread)
    assert parted(followed) == parted(rows)
    assert [row["step"] for row in followed] == [row["step"] for row in rows]


def test_following_a_live_run_gives_the_rows_of_fit_and_ends_with_it(image_folder, tmp_path):
    recipe = small(image_folder, tmp_path / "runs", epochs=6)
    run = Run(recipe.folder)
    rows, trainer = collected(training.fit(recipe, run))
    until(run.locked)
    followed, follower = collected(follow(run, poll=0.005))
    until(lambda: len(followed) >= 4 or not trainer.is_alive())
    assert trainer.is_alive()  # they come while the run is written
    assert ended(trainer) and ended(follower)
    assert len(rows) == 24
    assert parted(followed) == parted(rows)


def test_following_a_truncated_run_gives_the_rows_written_again(tmp_path):
    with Run(tmp_path).writing() as run:
        for step in range(1, 6):
            run.append("steps.csv", {"step": step, "loss": 1.0})
        seen, follower = collected(follow(run, poll=0.5))
        until(lambda: [row["step"] for row in seen] == [1, 2, 3, 4, 5])
        run.truncate_after(2)
        for step in (3, 4):  # both between two polls: the file is as long as before or shorter
            run.append("steps.csv", {"step": step, "loss": 2.0})
        until(lambda: seen[-1]["loss"] == 2.0 and seen[-1]["step"] == 4)
    assert ended(follower)
    assert [row["step"] for row in seen if row["loss"] == 2.0] == [3, 4]


def test_following_a_run_without_a_writer_ends_at_once(tmp_path):
    seen, follower = collected(follow(Run(tmp_path / "nowhere"), poll=60))
    assert ended(follower) and seen == []


# ---- a full disk


@pytest.fixture
def undisturbed(image_folder, tmp_path) -> Run:
    recipe = small(image_folder, tmp_path / "undisturbed")
    train(recipe)
    return Run(recipe.folder)


@contextlib.contextmanager
def loses_nothing(recipe: Recipe):
    """After one epoch and then a failure, the checkpoint and the rows of that epoch are there."""
    train(recipe, epochs=1)
    run = Run(recipe.folder)
    before = {name: run.file(name).read_bytes() for name in ("last.pt", "metrics.csv")}
    yield run
    assert run.file("last.pt").read_bytes() == before["last.pt"]
    assert run.load_checkpoint()["progress"]["step"] == 3
    assert run.file("metrics.csv").read_bytes().startswith(before["metrics.csv"])
    assert not [p for p in run.path.iterdir() if p.name.startswith(".")]


def assert_reaches_the_same_end(recipe: Recipe, undisturbed: Run):
    train(recipe)
    run = Run(recipe.folder)
    assert run.status()["state"] == "finished"
    assert_same_tensors(run.load_checkpoint()["model"], undisturbed.load_checkpoint()["model"])
    best = [safetensors.torch.load_file(r.file("best.safetensors")) for r in (run, undisturbed)]
    assert_same_tensors(*best)
    assert run.file("metrics.csv").read_bytes() == undisturbed.file("metrics.csv").read_bytes()


def limited(function, *arguments) -> list:
    """What a child process with a limit for the size of files sends."""
    receiver, sender = fork_server.Pipe(duplex=False)
    process = fork_server.Process(target=function, args=(*arguments, sender))
    process.start()
    sender.close()
    assert receiver.poll(60)
    answer = receiver.recv()
    process.join()
    return answer


def _limit_files(limit: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def _train_with_small_files(options, limit, connection):
    torch.set_num_threads(1)
    _limit_files(limit)
    try:
        train(Recipe(**options))
    except Exception as error:
        connection.send((type(error).__name__, str(error)))
    else:
        connection.send(("none", ""))


# The largest file that the system takes, in bytes, and the first file that is larger.
@pytest.mark.parametrize(
    ("limit", "file"),
    [(0, ""), (1000, "recipe.yaml"), (100_000, "best.safetensors"), (2_000_000, "last.pt")],
)
def test_a_file_that_does_not_fit_fails_the_run_and_loses_nothing(
    image_folder, tmp_path, undisturbed, limit, file
):
    recipe = small(image_folder, tmp_path / "runs")
    with loses_nothing(recipe) as run:
        if file == "last.pt":
            assert undisturbed.file("best.safetensors").stat().st_size < limit
            assert run.file("last.pt").stat().st_size > limit
        error, message = limited(_train_with_small_files, recipe.model_dump(), limit)
        assert error == "RunError" and file in message, f"{error}: {message}"
        assert "MB free there" in message and "resumes from the last checkpoint" in message
    if limit > 1000:  # there is room for the status
        assert run.status()["state"] == "failed"
        assert "was not written" in run.status()["message"]
    assert_reaches_the_same_end(recipe, undisturbed)


def _append_with_small_files(path, limit, connection):
    with Run(path).writing() as run:
        _limit_files(limit)
        for step in range(1, 1000):
            try:
                run.append("steps.csv", {"step": step, "loss": 1 / 3})
            except RunError as error:
                connection.send((step, str(error)))
                return


def test_a_line_that_does_not_fit_is_an_error_and_the_lines_before_are_read(tmp_path):
    step, message = limited(_append_with_small_files, tmp_path, 500)
    assert "steps.csv was not written" in message
    run = Run(tmp_path)
    assert run.file("steps.csv").stat().st_size == 500  # half a line is there
    assert run.steps().step.tolist() == list(range(1, step))
    with run.writing():
        run.truncate_after(10**9)
        run.append("steps.csv", {"step": step, "loss": 1 / 3})
    assert run.steps().step.tolist() == list(range(1, step + 1))
