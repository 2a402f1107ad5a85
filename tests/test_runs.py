"""The run folder: whole after any death of its writer, closed to a second one, open to readers."""

import contextlib
import json
import math
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from workbench import runs, training
from workbench.recipe import Recipe
from workbench.runs import COLUMNS, Run, RunError, atomic_write, finished, follow, rows, unused_name

# Children are forked in milliseconds from a process that has imported everything.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["workbench.training", "workbench.recipe"])


pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def child(function, *arguments):
    """A process that is ready (it set the event it got last), killed at the end."""
    ready = _server.Event()
    process = _server.Process(target=function, args=(*arguments, ready))
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


def small(image_folder: Path, folder: Path, **changes) -> Recipe:
    """Three epochs of three steps on the image_folder; validated after the second and the third."""
    options = {
        "dataset": "files",
        "data_dir": str(image_folder),
        "image_size": 16,
        "val_resize": 16,
        "epochs": 3,
        "batch_size": 6,
        "eval_every": 2,
        "hflip": 0.5,
        "log_every": 1,
        "device": "cpu",
        "precision": "fp32",
        "workers": 0,
        "runs_dir": str(folder),
    }
    return Recipe(**{**options, **changes})


def train(recipe: Recipe, epochs: int | None = None) -> list[dict]:
    """The rows of a training, left after some epochs."""
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


def test_a_second_writer_is_refused_by_the_name_of_the_first(tmp_path):
    run = Run(tmp_path / "run")
    with child(_hold, run.path) as holder:
        assert run.locked()
        with pytest.raises(RunError, match=f"being written by process {holder.pid} on .*STOP"):
            with run.writing():
                pytest.fail("two writers")
        with pytest.raises(RunError, match=f"process {holder.pid} "):
            list(training.fit(Recipe(), run))


def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    with Run(tmp_path).writing():
        with pytest.raises(RunError, match=f"process {os.getpid()} "):
            with Run(tmp_path).writing():
                pytest.fail("two writers")


def test_the_lock_dies_with_its_process(tmp_path):
    run = Run(tmp_path / "run")
    with child(_hold, run.path) as holder:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        assert not run.locked()
        with run.writing():
            assert run.locked()
    assert not run.locked()


def _train_with_workers(options, ready):
    multiprocessing.set_start_method("fork", force=True)  # Python's choice in a process of its own
    for _ in training.fit(recipe := Recipe(**options), Run(recipe.folder)):
        ready.set()


def test_the_lock_dies_with_a_training_that_had_workers(image_folder, tmp_path):
    """The workers are processes too, and outlive a killed parent by seconds."""
    recipe = small(image_folder, tmp_path, epochs=10_000, eval_every=10_000, workers=2)
    run = Run(recipe.folder)
    with child(_train_with_workers, recipe.model_dump()) as trainer:
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.join()
        with run.writing():
            assert run.steps().step.iloc[0] == 1


def test_running_with_a_dead_writer_reads_interrupted(tmp_path):
    run = Run(tmp_path / "run")
    with child(_hold, run.path) as holder:
        assert run.status()["state"] == "running"
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    assert run.status()["state"] == "interrupted"
    assert run.status()["step"] == 3


def test_whoever_looks_at_a_run_does_not_keep_its_writer_out(tmp_path):
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


def test_files_are_replaced_by_the_holder_of_the_lock_alone(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(RunError, match="run.writing"):
        run.write_json("status.json", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file/run", "file", "/proc/run", "closed/run"])
def test_a_folder_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path, path):
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir(mode=0o500)
    if path == "closed/run" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    with pytest.raises(RunError, match="cannot write .*choose another runs_dir"):
        with Run(tmp_path / path).writing():
            pytest.fail("wrote there")


# ---- whole or not at all

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


def test_a_writer_killed_while_replacing_leaves_the_old_files_and_its_leftovers_go(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_bytes(b"whole")
    (tmp_path / ".mine.txt").touch()
    with child(_write_half_of_everything, tmp_path) as writer:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    assert {(tmp_path / name).read_bytes() for name in NAMES} == {b"whole"}
    assert len(list(tmp_path.glob(".*"))) == len(NAMES) + 1
    with Run(tmp_path).writing():
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*NAMES, "lock", ".mine.txt"])


def _save_slowly(path, ready):
    class Slow:
        def __reduce__(self):
            ready.set()
            time.sleep(600)

    with Run(path).writing() as run:
        run.save_checkpoint({"step": torch.tensor(2), "slow": Slow()})


def test_a_writer_killed_while_saving_leaves_the_checkpoint_before(tmp_path):
    run = Run(tmp_path)
    with run.writing():
        run.save_checkpoint({"step": torch.tensor(1)})
    with child(_save_slowly, tmp_path) as writer:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
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


def test_what_is_written_may_be_read_by_whom_the_umask_lets(tmp_path):
    mask = os.umask(0o022)
    try:
        with Run(tmp_path).writing() as run:
            run.write_json("status.json", {})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "status.json").stat().st_mode) == 0o644


def test_a_status_keeps_what_is_not_named(tmp_path):
    with Run(tmp_path).writing() as run:
        run.set_status("running", step=3, steps=9, message="é")
        run.set_status("stopped", step=4)
        assert run.status() | {"updated": ""} == {
            "state": "stopped",
            "step": 4,
            "steps": 9,
            "message": "é",
            "updated": "",
        }


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b'"running"'])
def test_a_status_that_cannot_be_read_is_a_state_and_no_error(tmp_path, content):
    (tmp_path / "status.json").write_bytes(content)
    assert Run(tmp_path).status()["state"] == "unreadable"


def test_a_run_that_is_not_there_reads_as_new(tmp_path):
    run = Run(tmp_path / "nowhere")
    assert run.status()["state"] == "new"
    assert run.metrics().empty and run.steps().empty and run.quarantine().empty
    assert run.environment() == {}
    assert run.load_checkpoint() is None
    with pytest.raises(RunError, match="no readable run"):
        run.recipe()
    with pytest.raises(RunError, match="no predictions"):
        run.predictions()
    assert not run.path.exists()


# ---- tables by line


@pytest.fixture
def writer(tmp_path):
    with Run(tmp_path / "run").writing() as run:
        yield run


def test_the_header_stands_once_also_over_a_restart(writer):
    writer.append("metrics.csv", {"step": 1, "loss": 0.5})
    writer.append("metrics.csv", {"loss": 0.25, "step": 2})  # another order, the same columns
    again = Run(writer.path)
    again.append("metrics.csv", {"step": 3, "loss": None})
    assert writer.file("metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n3,\n"


def test_floats_come_back_as_they_were_given(writer):
    values = np.random.default_rng(0).standard_normal(2000) * 10.0 ** np.arange(-1000, 1000).clip(
        -300, 300
    )
    values = [*values.tolist(), 0.1 + 0.2, math.pi, 5e-324, 1.7976931348623157e308, -0.0]
    for step, value in enumerate(values):
        writer.append("steps.csv", {"step": step, "loss": value})
    texts = writer.file("steps.csv").read_text().split()[1:]
    assert [float(text.split(",")[1]) for text in texts] == values
    assert writer.steps().loss.tolist() == values


def test_names_with_commas_quotes_and_line_ends_come_back(writer):
    names = ["a,b.png", 'a"b.png', "a\nb.png", "größe 猫.png", "a\u2028b.png", "late.png"]
    for step, name in enumerate(names):
        writer.append("quarantine.csv", {"file": name, "step": step})
    writer.truncate_after(4)
    assert writer.quarantine().file.tolist() == names[:5]


def test_other_columns_are_refused_and_the_table_stays(writer):
    writer.append("metrics.csv", {"step": 1, "loss": 0.5})
    before = writer.file("metrics.csv").read_bytes()
    for row in ({"step": 2}, {"step": 2, "loss": 0.1, "top1": 3.0}, {"step": 2, "top1": 3.0}):
        with pytest.raises(RunError, match="metrics.csv.*under columns"):
            writer.append("metrics.csv", row)
    assert writer.file("metrics.csv").read_bytes() == before


@pytest.mark.parametrize("half", ["3,0", "3", "3,0.125,", "step,lo"])
def test_half_a_last_line_is_passed_over_by_readers_and_dropped_by_rewind(writer, half):
    path = writer.file("steps.csv")
    whole = "" if half.startswith("step") else "step,loss\n1,0.5\n2,0.25\n"
    path.write_text(whole + half)
    assert len(writer.steps()) == (2 if whole else 0)
    writer.truncate_after(10)
    writer.append("steps.csv", {"step": 3, "loss": 0.125})
    lines = (whole or "step,loss\n") + "3,0.125\n"
    assert path.read_text() == lines


def test_rewind_keeps_the_rows_up_to_the_step_to_the_byte(writer):
    for name in ("metrics.csv", "steps.csv", "quarantine.csv"):
        for step in range(-1, 6):
            writer.append(name, {"file": "a b", "step": step, "loss": step / 3})
    kept = {}
    for name in ("metrics.csv", "steps.csv", "quarantine.csv"):
        text = writer.file(name).read_text()
        kept[name] = "".join(text.splitlines(keepends=True)[:5])  # the header, -1, 0, 1, 2
    writer.truncate_after(2)
    assert {name: writer.file(name).read_text() for name in kept} == kept
    writer.truncate_after(2)
    assert {name: writer.file(name).read_text() for name in kept} == kept
    writer.truncate_after(-2)
    assert not any(writer.file(name).exists() for name in kept)


# ---- a table of runs


def table(root: Path) -> pd.DataFrame:
    return pd.DataFrame(rows(root), columns=[*COLUMNS.split(), "device", "updated"])


def made(root: Path, name: str, *, updated="2026-01-01T00:00:00+0000", **metrics) -> Path:
    """A run folder with all that the table reads."""
    path = root / name
    path.mkdir(parents=True)
    Recipe().to_yaml(path / "recipe.yaml")
    status = {"state": "finished", "step": 9, "steps": 9, "message": "", "updated": updated}
    (path / "status.json").write_text(json.dumps(status))
    (path / "environment.json").write_text(json.dumps({"seconds": 120.0, "device": "cpu"}))
    row = {"epoch": 8, "step": 9, "train_loss": 0.5, "top1": 90.0, "top5": 99.0, "val_images": 500}
    pd.DataFrame([row | metrics]).to_csv(path / "metrics.csv", index=False)
    touched = time.mktime(time.strptime(updated[:19], "%Y-%m-%dT%H:%M:%S"))
    for file in path.iterdir():
        os.utime(file, (touched, touched))
    return path


@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_no_runs_are_an_empty_table_with_its_columns(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    frame = table(tmp_path / name)
    assert frame.empty
    assert {"run", "state", "top1", "minutes"} <= set(frame.columns)


def test_a_row_says_what_the_folder_says(tmp_path):
    made(tmp_path, "good-seed0")
    (row,) = table(tmp_path).to_dict("records")
    wanted = {"run": "good-seed0", "state": "finished", "model": "test_resnet", "top1": 90.0}
    wanted |= {"epoch": 8, "epochs": 8, "n": 500, "minutes": 2.0, "device": "cpu"}
    assert {key: row[key] for key in wanted} == wanted


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


def turn_into_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = {
    "recipe.yaml cut": ("recipe.yaml", lambda p: p.write_text("lr: [0.1, ")),
    "recipe.yaml no mapping": ("recipe.yaml", lambda p: p.write_text("[1, 2]")),
    "recipe.yaml no text": ("recipe.yaml", lambda p: p.write_bytes(b"\xff\xfe\x00")),
    "recipe.yaml a folder": ("recipe.yaml", turn_into_folder),
    "environment.json cut": ("environment.json", lambda p: p.write_text('{"seconds": 1')),
    "environment.json no mapping": ("environment.json", lambda p: p.write_text("[1]")),
    "environment.json of text": ("environment.json", lambda p: p.write_text('{"seconds": "a"}')),
    "status.json cut": ("status.json", lambda p: p.write_text("{")),
    "status.json null": ("status.json", lambda p: p.write_text("null")),
    "metrics.csv no text": ("metrics.csv", lambda p: p.write_bytes(b"\xff\n\xfe\n")),
    "metrics.csv of other shape": ("metrics.csv", lambda p: p.write_text("a\n1,2,3\n1\n")),
    "metrics.csv of words": ("metrics.csv", lambda p: p.write_text("epoch,step\nx,y\n")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_gets_a_row_and_hides_no_other(tmp_path, kind):
    made(tmp_path, "good")
    name, damage = DAMAGE[kind]
    damage(made(tmp_path, "damaged") / name)
    frame = table(tmp_path).set_index("run")
    assert set(frame.index) == {"good", "damaged"}
    assert frame.state["good"] == "finished"
    if kind != "metrics.csv of other shape":  # which pandas reads as something
        assert frame.state["damaged"] == "unreadable"


def test_a_recipe_that_is_a_link_to_nowhere_hides_no_other_run(tmp_path):
    made(tmp_path, "good")
    link_to_nowhere(made(tmp_path, "damaged") / "recipe.yaml")
    assert "good" in set(table(tmp_path).run)


def test_a_run_without_its_first_epoch_is_listed_and_a_folder_without_recipe_is_not(tmp_path):
    begun = made(tmp_path, "begun")
    for name in ("metrics.csv", "environment.json", "status.json"):
        (begun / name).unlink()
    (tmp_path / "notes").mkdir()
    (row,) = table(tmp_path).to_dict("records")
    assert (row["run"], row["state"], row["epoch"]) == ("begun", "new", 0)


def test_names_of_any_letters_and_length_are_listed_as_they_are(tmp_path):
    names = ["größe 猫 🐈-seed0", "x" * 255, "a,b;c'd\"e", "-rf", "a\nb", "[brackets]*"]
    for name in names:
        made(tmp_path, name)
    assert set(table(tmp_path).run) == set(names)


def test_fifty_runs_stand_newest_first(tmp_path):
    order = np.random.default_rng(0).permutation(50)
    for day in order:
        made(tmp_path, f"run{day}", updated=f"2026-{1 + day // 28:02}-{1 + day % 28:02}T12:00:00")
    assert table(tmp_path).run.tolist() == [f"run{day}" for day in reversed(range(50))]


@pytest.mark.parametrize("name", ["status.json", "recipe.yaml", "environment.json"])
def test_a_damaged_run_stands_in_its_place_in_time(tmp_path, name):
    made(tmp_path, "newest", updated="2026-03-01T00:00:00+0000")
    path = made(tmp_path, "damaged", updated="2026-02-01T00:00:00+0000") / name
    made(tmp_path, "oldest", updated="2026-01-01T00:00:00+0000")
    touched = path.stat().st_mtime
    path.write_text("{")
    os.utime(path, (touched, touched))
    assert table(tmp_path).run.tolist() == ["newest", "damaged", "oldest"]


def test_a_run_without_a_status_stands_in_its_place_in_time(tmp_path):
    made(tmp_path, "newest", updated="2026-03-01T00:00:00+0000")
    (made(tmp_path, "begun", updated="2026-02-01T00:00:00+0000") / "status.json").unlink()
    made(tmp_path, "oldest", updated="2026-01-01T00:00:00+0000")
    assert table(tmp_path).run.tolist() == ["newest", "begun", "oldest"]


# ---- finished runs of the same recipe, of the same images


def ended(root: Path, name: str, state="finished", epochs: int = 3, **environment) -> Path:
    path = made(root, name)
    if epochs:
        Recipe(epochs=epochs).to_yaml(path / "recipe.yaml")
        environment["recipe"] = Recipe(epochs=epochs).fingerprint
    status = json.loads((path / "status.json").read_text())
    (path / "status.json").write_text(json.dumps({**status, "state": state}))
    (path / "environment.json").write_text(json.dumps(environment))
    return path


SAME = Recipe(epochs=3).fingerprint


def named(found: list[Run]) -> list[str]:
    return [run.path.name for run in found]


def test_finished_runs_are_found_by_what_their_record_says(tmp_path):
    ended(tmp_path, "b-seed0", data="123")
    ended(tmp_path, "a-seed0", data="123")
    ended(tmp_path, "c-seed0", data="456")
    ended(tmp_path, "d-seed0", epochs=4, data="123")
    ended(tmp_path, "e-seed0", epochs=0)
    assert named(finished(tmp_path, recipe=SAME)) == ["a-seed0", "b-seed0", "c-seed0"]
    assert named(finished(tmp_path, recipe=SAME, data="123")) == ["a-seed0", "b-seed0"]
    assert named(finished(tmp_path, data="456")) == ["c-seed0"]
    assert finished(tmp_path, recipe="other") == []
    assert len(finished(tmp_path)) == 5
    assert finished(tmp_path / "nowhere", recipe=SAME) == []


def test_a_name_is_free_or_holds_a_run_of_the_same_recipe(tmp_path):
    recipe = Recipe(name="demo", runs_dir=str(tmp_path))
    assert unused_name(recipe) == recipe
    for name, epochs in (("demo-seed0", 3), ("demo_2-seed0", 4)):
        path = ended(tmp_path, name, epochs=epochs)
        assert unused_name(recipe) == recipe.replace(name=name.removesuffix("-seed0")), "no work"
        (path / "last.pt").touch()
        assert unused_name(recipe.replace(epochs=epochs)).folder == path
    assert unused_name(recipe).name == "demo_2_2"


@pytest.mark.parametrize("state", ["running", "stopped", "failed", "new"])
def test_a_run_that_did_not_end_is_no_finished_one(tmp_path, state):
    ended(tmp_path, "a-seed0", state=state)
    assert finished(tmp_path, recipe=SAME) == []


@pytest.mark.parametrize("kind", [k for k in DAMAGE if k.startswith(("environment", "status"))])
def test_a_damaged_run_is_passed_over_and_hides_no_other(tmp_path, kind):
    ended(tmp_path, "good")
    name, damage = DAMAGE[kind]
    damage(ended(tmp_path, "damaged") / name)
    assert named(finished(tmp_path, recipe=SAME)) == ["good"]


def test_the_record_that_is_asked_is_the_one_that_training_writes(image_folder, tmp_path):
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
    """The rows by kind; whether an epoch's row comes before its last step's is left open."""
    return {
        kind: [
            {k: v for k, v in row.items() if k not in ("kind", "steps")}
            for row in rows
            if row["kind"] == kind
        ]
        for kind in ("step", "epoch")
    }


def collected(rows) -> tuple[list[dict], threading.Thread]:
    """A list that grows while a thread draws the rows; the test goes on also if they never end."""
    seen: list[dict] = []
    thread = threading.Thread(target=lambda: [seen.append(row) for row in rows], daemon=True)
    thread.start()
    return seen, thread


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_following_a_finished_run_gives_the_rows_that_fit_gave(image_folder, tmp_path):
    recipe = small(image_folder, tmp_path / "runs")
    rows = train(recipe)
    assert [row["kind"] for row in rows].count("epoch") == 3
    assert parted(rows)["epoch"][0]["top1"] is None
    followed, thread = collected(follow(Run(recipe.folder)))
    thread.join(20)
    assert not thread.is_alive()
    assert parted(followed) == parted(rows)
    assert [row["step"] for row in followed] == [row["step"] for row in rows]


def test_following_a_live_run_gives_the_rows_that_fit_gives_and_ends_with_it(
    image_folder, tmp_path
):
    recipe = small(image_folder, tmp_path / "runs", epochs=6)
    run = Run(recipe.folder)
    rows, trainer = collected(training.fit(recipe, run))
    until(run.locked)
    followed, follower = collected(follow(run, poll=0.005))
    until(lambda: len(followed) >= 4 or not trainer.is_alive())
    assert trainer.is_alive()  # they come while the run is written
    trainer.join(60)
    follower.join(20)
    assert not follower.is_alive()
    assert len(rows) == 24
    assert parted(followed) == parted(rows)


def test_following_a_run_that_is_wound_back_gives_the_rows_written_anew(tmp_path):
    with Run(tmp_path).writing() as run:
        for step in range(1, 6):
            run.append("steps.csv", {"step": step, "loss": 1.0})
        seen, follower = collected(follow(run, poll=0.5))
        until(lambda: [row["step"] for row in seen] == [1, 2, 3, 4, 5])
        run.truncate_after(2)
        for step in (3, 4):  # both between two looks, so the file is shorter but not short
            run.append("steps.csv", {"step": step, "loss": 2.0})
        until(lambda: seen[-1]["loss"] == 2.0 and seen[-1]["step"] == 4)
    follower.join(20)
    assert not follower.is_alive()
    assert [row["step"] for row in seen if row["loss"] == 2.0] == [3, 4]


def test_following_a_run_that_nobody_writes_ends_at_once(tmp_path):
    seen, follower = collected(follow(Run(tmp_path / "nowhere"), poll=60))
    follower.join(20)
    assert seen == [] and not follower.is_alive()


# ---- a full disk


@pytest.fixture
def undisturbed(image_folder, tmp_path) -> Run:
    recipe = small(image_folder, tmp_path / "undisturbed")
    train(recipe)
    return Run(recipe.folder)


def assert_goes_on_to_the_same_end(recipe: Recipe, undisturbed: Run):
    run = Run(recipe.folder)
    train(recipe)
    assert run.status()["state"] == "finished"
    for read in (
        lambda r: r.load_checkpoint()["model"],
        lambda r: safetensors.torch.load_file(r.file("best.safetensors")),
    ):
        ours, theirs = read(run), read(undisturbed)
        assert ours.keys() == theirs.keys()
        assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert run.file("metrics.csv").read_bytes() == undisturbed.file("metrics.csv").read_bytes()


def _train_with_small_files(options, limit, connection):
    torch.set_num_threads(1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        train(Recipe(**options))
    except Exception as error:
        connection.send((type(error).__name__, str(error)))
    else:
        connection.send(("none", ""))


# The largest file that the system takes, in bytes, and the first one that is larger.
@pytest.mark.parametrize(
    ("limit", "file"),
    [
        (0, "lock"),
        (1000, "recipe.yaml"),
        (100_000, "best.safetensors"),
        (2_000_000, "last.pt"),
    ],
)
def test_a_file_that_does_not_fit_fails_the_run_and_costs_nothing(
    image_folder, tmp_path, undisturbed, limit, file
):
    recipe = small(image_folder, tmp_path / "runs")
    train(recipe, epochs=1)
    run = Run(recipe.folder)
    if file == "last.pt":
        assert undisturbed.file("best.safetensors").stat().st_size < limit
        assert run.file("last.pt").stat().st_size > limit
    kept = {name: run.file(name).read_bytes() for name in ("last.pt", "metrics.csv")}
    receiver, sender = _server.Pipe(duplex=False)
    process = _server.Process(
        target=_train_with_small_files, args=(recipe.model_dump(), limit, sender)
    )
    process.start()
    sender.close()
    assert receiver.poll(60)
    error, message = receiver.recv()
    process.join()
    assert error == "RunError", f"{error}: {message}"
    assert file in message or file == "lock"
    assert run.file("last.pt").read_bytes() == kept["last.pt"]
    assert run.load_checkpoint()["progress"]["step"] == 3
    assert run.file("metrics.csv").read_bytes().startswith(kept["metrics.csv"])
    assert not [p for p in run.path.iterdir() if p.name.startswith(".")]
    if limit > 1000:  # there is room for the status
        assert run.status()["state"] == "failed"
        assert "was not written" in run.status()["message"]
    assert_goes_on_to_the_same_end(recipe, undisturbed)


def _append_with_small_files(path, limit, connection):
    with Run(path).writing() as run:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        for step in range(1, 1000):
            try:
                run.append("steps.csv", {"step": step, "loss": 1 / 3})
            except RunError as error:
                connection.send((step, str(error)))
                return


def test_a_line_that_does_not_fit_is_an_error_and_the_lines_before_are_read(tmp_path):
    receiver, sender = _server.Pipe(duplex=False)
    process = _server.Process(target=_append_with_small_files, args=(tmp_path, 500, sender))
    process.start()
    sender.close()
    assert receiver.poll(60)
    step, message = receiver.recv()
    process.join()
    assert "steps.csv" in message and "free disk space" in message
    run = Run(tmp_path)
    assert run.file("steps.csv").stat().st_size == 500  # half a line is there
    assert run.steps().step.tolist() == list(range(1, step))
    with run.writing():
        run.truncate_after(10**9)
        run.append("steps.csv", {"step": step, "loss": 1 / 3})
    assert run.steps().step.tolist() == list(range(1, step + 1))


@pytest.fixture
def disk(tmp_path):
    """A file system in memory: its folder, and a function that sets its size in bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.decode().strip()}")

    def resize(size):
        words = ["mount", "-o", f"remount,size={size}", str(folder)]
        subprocess.run(words, check=True, capture_output=True)

    try:
        yield folder, resize
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


@pytest.mark.parametrize("room", [0, 200_000])
def test_a_full_disk_fails_the_run_and_costs_nothing(image_folder, undisturbed, disk, room):
    folder, resize = disk
    recipe = small(image_folder, folder / "runs")
    train(recipe, epochs=1)
    run = Run(recipe.folder)
    kept = {name: run.file(name).read_bytes() for name in ("last.pt", "metrics.csv")}
    space = os.statvfs(folder)
    resize((space.f_blocks - space.f_bfree) * space.f_frsize + room)
    with pytest.raises(RunError, match="MB free there.*resumes from the last checkpoint"):
        train(recipe)
    assert run.file("last.pt").read_bytes() == kept["last.pt"]
    assert run.load_checkpoint()["progress"]["step"] == 3
    assert run.file("metrics.csv").read_bytes() == kept["metrics.csv"]
    assert not [p for p in run.path.iterdir() if p.name.startswith(".")]
    resize(64_000_000)
    assert_goes_on_to_the_same_end(recipe, undisturbed)


def test_states_are_those_that_a_run_can_be_in(image_folder, tmp_path):
    recipe = small(image_folder, tmp_path, epochs=2)
    run, states = Run(recipe.folder), []
    states.append(run.status()["state"])
    train(recipe, epochs=1)
    states.append(run.status()["state"])
    for _ in training.fit(recipe, run):
        states.append(run.status()["state"])
    states.append(run.status()["state"])
    assert states == ["new", "stopped", *["running"] * (len(states) - 3), "finished"]
    assert set(states) <= set(runs.STATES)
