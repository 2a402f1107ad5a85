"""Jobs without Slurm: what is written, what is refused, detached processes, and the examples."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import run_folder
from helpers import last_step, train

from workbench import ROOT, cluster, jobs, locks, run_list, runs, sweep
from workbench.recipe import Recipe
from workbench.ui.run_table import RunTable

EXAMPLES = ROOT / "params" / "cluster"


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    options = {"train_fraction": 0.1, "epochs": 2, "workers": 0, "runs_dir": str(tmp_path)}
    return Recipe(name="small", **options)


@pytest.fixture
def params(recipe, tmp_path) -> Path:
    recipe.to_yaml(tmp_path / "small.yaml")
    return tmp_path / "small.yaml"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Programs in the place of Slurm's: each prints the text it is given, and notes its words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def program(name: str, text: str, code: int = 0) -> None:
        lines = ["#!/bin/sh", f'echo "{name} $@ $SQUEUE_STATES" >> {folder}/called']
        lines += [f"printf '{text}'" if code == 0 else f"echo '{text}' >&2", f"exit {code}"]
        (folder / name).write_text("\n".join(lines) + "\n")
        (folder / name).chmod(0o755)

    program.called = lambda: (folder / "called").read_text().splitlines()
    return program


def shown(folder: Path) -> dict[str, str]:
    """The column state of `workbench runs`, by run."""
    found = run_list.rows(folder, sweeps=True)
    return {row["run"]: row["text"] for row in found}


def queue(folder: Path, *rows: str) -> str:
    """What squeue prints about jobs whose script is in a folder."""
    return "".join(f"{row}|{folder}/job-1.sh|\\n" for row in rows)


def until(true, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)
    return found


# ---- what submit writes


def test_a_dry_run_writes_list_and_script_to_edit_and_starts_nothing(params, command):
    words = "--nodes 2 --gpus 4 --time 4:00:00 --partition main --dry-run --sbatch".split()
    done = command("submit", params, "lr=0.03,0.1", "seed=0-2", *words, "--account=x --mem=32G")
    assert done.returncode == 0 and not list(params.parent.rglob("job.json"))
    *script, last = done.stdout.splitlines()
    folder = params.parent / "small-sweep-lr"
    assert last == f"6 runs in {folder}/job-1.txt; to start: sbatch --parsable {folder}/job-1.sh"
    assert (folder / "job-1.sh").read_text().splitlines() == script
    tasks = [Path(line) for line in (folder / "job-1.txt").read_text().splitlines()]
    assert len({*tasks}) == 6 and all((path / "recipe.yaml").exists() for path in tasks)
    options = [word for line in script if line.startswith("#SBATCH") for word in line.split()[1:]]
    asked = {"--array=0-5", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--mem=32G"}
    assert asked | {"--time=4:00:00", "--partition=main", "--signal=TERM@120"} <= set(options)
    assert options[-2:] == ["--account=x", "--mem=32G"]  # of two that contradict the last counts
    subprocess.run(["bash", "-n"], input=done.stdout.rpartition("6 runs")[0], text=True, check=True)
    local = command("submit", params, "seed=0,1", "--local", 2, "--dry-run").stdout
    assert "2 runs" in local and "workbench.cluster" in local
    refused = command("submit", params, "--local", 1, "--nodes", 2, "--gpus", 0).stderr
    assert refused.endswith("--nodes --gpus of Slurm and --local exclude each other; keep one")
    assert not list(params.parent.rglob("job.json"))


def test_without_sbatch_one_sentence_says_what_to_do(params, command, slurm):
    done = command("submit", params)
    assert done.returncode == 1
    assert done.stderr == (
        "RunError: there is no sbatch on this machine; --local 1 trains without Slurm"
    )
    assert list(params.parent.glob("small*")) == [params]


def test_the_folder_of_a_run_has_all_that_trains_it_and_it_is_submitted_once(recipe, slurm):
    slurm("sbatch", "12")
    axes = {"lr": [0.05, 0.2], "seed": [0, 1]}
    train(recipe.replace(name="lr=0.05", lr=0.05, runs_dir=f"{recipe.runs_dir}/small-sweep-lr"))
    text = cluster.submit(recipe, axes, gpus=0)
    folder = recipe.folder.parent / "small-sweep-lr"
    said = "3 runs (1 finished, queued or running)"
    assert text == f"{said} in {folder}/job-1.txt: job 12"
    tasks = [Path(line) for line in (folder / "job-1.txt").read_text().splitlines()]
    assert [path.name for path in tasks] == ["lr=0.05-seed1", "lr=0.2-seed0", "lr=0.2-seed1"]
    for index, path in enumerate(tasks):
        one = Recipe.from_yaml(path / "recipe.yaml")
        assert one.folder == path and one.notes == ()
        assert (one.lr, one.seed) == ([0.05, 0.2, 0.2][index], [1, 0, 1][index])
        job = json.loads((path / "job.json").read_text())
        assert (job["job"], job["index"]) == ("12", index)
        assert abs(job["submitted"] - time.time()) < 60
    slurm("squeue", queue(folder, *(f"12|{i}|PENDING||0|" for i in range(3))))
    assert cluster.submit(recipe, axes, gpus=0) == "0 runs (4 finished, queued or running)"
    slurm("squeue", queue(folder, "12|0|PENDING||0|"))  # the others were cancelled
    assert "2 runs" in cluster.submit(recipe, axes, gpus=0)
    assert (folder / "job-2.txt").exists()
    assert len((folder / "job-1.txt").read_text().splitlines()) == 3  # of the job that waits


def test_a_folder_of_another_recipe_and_a_failing_sbatch_are_refused(recipe, slurm):
    train(recipe)
    slurm("sbatch", "sbatch: error: invalid partition specified: no", 1)
    with pytest.raises(runs.RunError, match="small-seed0 has a run of another recipe"):
        cluster.submit(recipe.replace(lr=0.3), gpus=0)
    with pytest.raises(runs.RunError, match="sbatch failed: .*invalid partition specified"):
        cluster.submit(recipe.replace(name="other"), gpus=0)
    assert shown(recipe.folder.parent)["other-seed0"] == "new"


def test_two_submits_at_once_into_a_folder_have_a_list_each(recipe, slurm):
    slurm("sbatch", "12")
    (folder := recipe.folder.parent / "small-sweep").mkdir()
    (folder / "job-1 (copy).txt").touch()  # of a file manager
    with ThreadPoolExecutor() as pool:
        submit = lambda seeds: cluster.submit(recipe, {"seed": seeds}, gpus=0)
        texts = [*pool.map(submit, [[0, 1], [2, 3], [4, 5]])]
    assert all(text.startswith("2 runs in ") for text in texts)
    lists = [(folder / f"job-{number}.txt").read_text().splitlines() for number in (1, 2, 3)]
    assert {*sum(lists, [])} == {str(folder / f"small-seed{seed}") for seed in range(6)}


def test_of_two_submits_of_a_run_at_once_the_second_finds_it_queued(recipe, slurm):
    slurm("sbatch", "12")
    slurm("squeue", queue(recipe.folder, "12|0|PENDING||0|"))
    with ThreadPoolExecutor() as pool:
        texts = [*pool.map(lambda _: cluster.submit(recipe, gpus=0), range(3))]
    assert sorted(text.split(" in ")[0] for text in texts) == [
        *["0 runs (1 finished, queued or running)"] * 2,
        "1 run",
    ]
    assert sum(call.startswith("sbatch") for call in slurm.called()) == 1


def test_another_recipe_of_a_queued_run_is_refused_until_it_is_cancelled(recipe, slurm):
    slurm("sbatch", "12")
    other = recipe.replace(epochs=20)
    cluster.submit(recipe, gpus=0)
    slurm("squeue", queue(recipe.folder, "12|0|PENDING||0|"))
    text = f"another recipe is queued as job 12_0; first call: workbench cancel {recipe.folder}"
    with pytest.raises(runs.RunError, match=text):
        cluster.submit(other, gpus=0)
    assert "0 runs" in cluster.submit(recipe.replace(log_every=7), gpus=0)  # of the run time only
    slurm("scancel", "")
    jobs.cancel([recipe.folder])
    slurm("squeue", "")
    assert cluster.submit(other, gpus=0).startswith("1 run in ")
    assert runs.Run(recipe.folder).recipe()["epochs"] == 20


@pytest.mark.parametrize("printed", ["Welcome to node 3\\n78\\n", "78;main\\n", "78"])
def test_the_number_of_a_job_is_the_last_that_sbatch_prints(recipe, slurm, printed):
    slurm("sbatch", printed)
    assert cluster.submit(recipe, gpus=0).endswith(": job 78")
    assert jobs.read(recipe.folder)["job"] == "78"


def test_what_sbatch_prints_without_a_number_is_shown(recipe, slurm):
    slurm("sbatch", "done")
    with pytest.raises(runs.RunError, match="sbatch printed no job number but 'done'"):
        cluster.submit(recipe, gpus=0)


def test_a_part_is_the_one_that_was_submitted(recipe, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_TRUST_CODE", "1")
    slurm("sbatch", "3")
    losses = tmp_path / "losses.py"
    losses.write_text("def ones(logits, targets):\n    return 0 * logits.sum(1) + 1\n")
    one = recipe.replace(loss=f"{losses}:ones")
    cluster.submit(one, gpus=0)
    losses.write_text("raise RuntimeError('another file')\n")
    run = train(Recipe.from_yaml(one.folder / "recipe.yaml"))
    assert run.metrics().train_loss.tolist() == [1.0, 1.0]


# ---- what is shown


@pytest.mark.parametrize(
    "row, status, job, text",
    [
        ("12|3|PENDING||0|", None, {}, "queued"),
        ("12|3|PENDING||2|", "stopped", {}, "requeued twice, queued"),
        ("12|3|PENDING||1|", "running", {"node": "n3"}, "requeued once, queued"),
        ("12|3|RUNNING|n3|0|", None, {"node": "n3"}, "running on n3"),
        ("12|3|RUNNING|n[3-4]|3|", "stopped", {}, "requeued 3 times, running on n[3-4]"),
        ("12|3|RUNNING|n3|0|", "finished", {}, "finished"),
        ("12|3|COMPLETING|n3|0|", "failed", {}, "failed"),
        ("12|2|RUNNING|n3|0|", None, {}, "interrupted"),  # another of the array
        ("12|3|SUSPENDED|n3|0|", None, {}, "running on n3"),
        ("12|3|REQUEUE_HOLD||1|", "stopped", {}, "requeued once, queued"),
        ("12|3|COMPLETED|n3|0|", "stopped", {}, "stopped"),
        ("12|3|CANCELLED|n3|0|", None, {}, "interrupted"),
        ("12|3|PENDING||x|", None, {}, "queued"),
        ("12|3|PENDING|||", None, {}, "queued"),
        ("", None, {"node": "n3"}, "interrupted"),
        ("", "running", {"node": "n3"}, "interrupted"),
        ("", "stopped", {}, "stopped"),
        (None, None, {}, "unknown"),  # no squeue
        (None, None, {"node": "n3"}, "unknown"),
        (None, "stopped", {"node": None, "requeues": 1}, "unknown"),
        (None, "running", {"node": "n3"}, "interrupted"),
        (None, "stopped", {"node": "n3"}, "stopped"),
    ],
)
def test_states_of_a_run_with_a_job(recipe, slurm, row, status, job, text):
    run = runs.Run(recipe.folder)
    with run.writing():
        recipe.to_yaml(run.file("recipe.yaml"))
        run.write_json("job.json", {"job": "12", "index": 3, "requeues": 0, **job})
        if status:
            run.set_status(status, step=5, steps=9)
    if row is None:
        slurm("squeue", "slurm_load_jobs error: Unable to contact slurm controller", 1)
    else:
        slurm("squeue", queue(recipe.folder, row))
    assert shown(recipe.folder.parent) == {"small-seed0": text}
    [row] = RunTable(recipe.folder.parent).table.rows
    assert row["cells"][5][0] == text
    assert row["live"] == ("queued" in text or "running" in text)
    run.file("CANCEL").touch()
    slurm("squeue", "")
    kept = "finished" if status == "finished" else "failed" if status == "failed" else "cancelled"
    assert shown(recipe.folder.parent) == {"small-seed0": kept}


def test_a_run_that_is_written_is_running_whatever_the_queue_says(recipe, slurm):
    slurm("squeue", "slurm_load_jobs error: Invalid job id specified", 1)
    run = runs.Run(recipe.folder)
    with run.writing():
        recipe.to_yaml(run.file("recipe.yaml"))
        run.write_json("job.json", {"job": "12", "index": 3, "node": "n3", "requeues": 0})
        run.set_status("running", step=120, steps=900)
        assert shown(recipe.folder.parent)["small-seed0"] == "running on n3, step 120 of 900"
    assert shown(recipe.folder.parent)["small-seed0"] == "interrupted"


@pytest.mark.parametrize(
    "text",
    [
        '{"worker": 1}',
        '{"job": "12"}',
        '{"job": 12, "index": 0}',
        '{"job": null, "index": 0}',
        '{"job": "all", "index": 0}',
        '{"job": "12", "index": 0, "requeues": "no"}',
        '{"host": "here", "process": null}',
        '{"host": "HERE", "process": 1, "worker": 1}',
        "[1]",
        "{",
    ],
)
def test_a_job_json_that_names_no_job_ends_no_command(recipe, slurm, text):
    slurm("sbatch", "13")
    slurm("squeue", "")
    path = run_folder(recipe.folder.parent, "small", 0)
    (path / "status.json").unlink()
    (path / "job.json").write_text(text.replace("HERE", socket.gethostname()))
    assert shown(recipe.folder.parent)[path.name] in ("new", "interrupted")
    [said] = jobs.cancel([path])
    assert said.endswith("nothing to cancel")
    (path / "last.pt").unlink(missing_ok=True)
    assert cluster.submit(recipe, gpus=0).endswith(": job 13")


def test_a_number_in_job_json_and_a_line_that_is_no_row_of_squeue_are_read(recipe, slurm):
    recipe.folder.mkdir()
    (recipe.folder / "job.json").write_text('{"job": 12, "index": 0}')
    slurm("squeue", "squeue: a warning\\n" + queue(recipe.folder, "12|0|RUNNING|n1|0|"))
    assert jobs.of_runs([recipe.folder])[recipe.folder][:3] == ("job 12_0", "running", "n1")


def test_what_users_set_for_squeue_does_not_change_the_states(recipe, slurm, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "all-of-them")
    recipe.folder.mkdir()
    jobs.write(recipe.folder, job="12", index=0)
    slurm("squeue", "")
    jobs.of_runs([recipe.folder])
    [call] = slurm.called()
    assert "all-of-them" not in call


def test_without_squeue_nothing_is_claimed_submitted_or_cancelled(recipe, slurm):
    recipe.folder.mkdir()
    recipe.to_yaml(recipe.folder / "recipe.yaml")
    jobs.write(recipe.folder, job="12", index=0)
    slurm("sbatch", "13")
    text = cluster.submit(recipe, gpus=0)
    assert text.startswith("0 runs (1 unknown: `workbench cancel`")
    with pytest.raises(runs.RunError, match="job 12_0: squeue does not answer, nothing was cancel"):
        jobs.cancel([recipe.folder])
    assert not (recipe.folder / "CANCEL").exists()


def test_where_scancel_fails_the_run_is_not_marked_as_cancelled(recipe, slurm):
    recipe.folder.mkdir()
    jobs.write(recipe.folder, job="12", index=3, step=0, requeues=0)
    slurm("squeue", queue(recipe.folder, "12|3|RUNNING|n1|0|"))
    slurm("scancel", "scancel: error: Kill job error", 1)
    with pytest.raises(runs.RunError, match="scancel 12_3 failed: scancel: error: Kill job"):
        jobs.cancel([recipe.folder])
    assert jobs.requeue(recipe.folder) is None  # at its time limit


def test_a_job_of_the_same_number_with_another_script_is_not_cancelled(recipe, slurm):
    recipe.folder.mkdir()
    jobs.write(recipe.folder, job="12", index=0)
    slurm("scancel", "")
    for script in ("/of/another/cluster/small-seed0", "(null)"):
        slurm("squeue", queue(script, "12|0|RUNNING|n1|0|"))
        assert jobs.cancel([recipe.folder]) == [
            f"{recipe.folder} is interrupted, nothing to cancel"
        ]
    assert not any(call.startswith("scancel") for call in slurm.called())


def test_a_listing_asks_squeue_once_and_only_about_runs_that_are_not_finished(tmp_path, slurm):
    slurm("squeue", "")
    for seed in range(4):
        path = run_folder(tmp_path / "runs", "many", seed)
        (path / "job.json").write_text(json.dumps({"job": str(seed), "index": 0}))
        if seed < 2:
            (path / "status.json").unlink()
    shown(tmp_path / "runs")
    [call] = slurm.called()
    assert set(call.split()[-1].split(",")) == {"0", "1"}


def test_following_a_queued_run_waits_and_a_stop_file_cancels_it(recipe, slurm):
    class Waiting(threading.Event):
        waits = 0

        def wait(self, timeout=None):
            self.waits += 1
            run.file("STOP").touch() if self.waits == 1 else slurm("squeue", "")
            return False

    run, stop = runs.Run(recipe.folder), Waiting()
    run.path.mkdir(parents=True)
    jobs.write(run.path, job="12", index=3, requeues=0)
    slurm("squeue", queue(run.path, "12|3|PENDING||0|"))
    slurm("scancel", "")
    assert list(jobs.wait_and_follow(run, stop)) == [] and stop.waits == 2
    assert "scancel 12_3" in map(str.strip, slurm.called())
    assert run.file("CANCEL").exists() and not run.file("STOP").exists()


def test_three_starts_without_a_step_are_not_followed_by_a_fourth(recipe, monkeypatch):
    run = runs.Run(recipe.folder)
    numbers = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURMD_NODENAME": "n3"}
    for key, value in numbers.items():
        monkeypatch.setenv(key, value)
    steps = iter([0, 4, 4, 9, 9, 9, 9])  # after each start

    def stopped_and_requeued(number: int) -> str | None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(number))
        jobs.start(run.path)
        assert jobs.read(run.path)["node"] == "n3"
        with run.writing():
            run.set_status("stopped", step=next(steps), message="stopped by SIGTERM")
        return jobs.requeue(run.path)

    run.path.mkdir(parents=True)
    answers = [stopped_and_requeued(number) for number in range(7)]
    assert answers[:6] == [None] * 6 and "no step in 3 starts" in answers[6]
    assert jobs.read(run.path)["requeues"] == 6


def test_a_job_that_did_not_write_its_start_is_requeued_too(recipe):
    run = runs.Run(recipe.folder)
    with run.writing():
        run.set_status("stopped", step=0, message="stopped by SIGTERM")
    jobs.write(run.path, job="12", index=3)
    answers = [jobs.requeue(run.path) for _ in range(3)]
    assert answers[:2] == [None] * 2 and "no step in 3 starts" in answers[2]
    assert jobs.read(run.path)["requeues"] == 2
    run.file("job.json").unlink()
    assert jobs.requeue(run.path) is None


def test_training_a_run_that_is_queued_names_its_job_once(recipe, params, command):
    recipe.folder.mkdir()
    jobs.write(recipe.folder, host="another-host", process=5, started="7")
    done = command("train", params, "-p", "model=no_such_model")
    said = "note: process 5 on another-host of this run is unknown: workbench cancel "
    assert done.stdout.count("note: process") == 1 and f"{said}{recipe.folder}\n" in done.stdout
    recipe.folder.joinpath("job.json").unlink()
    assert "note" not in command("train", params, "-p", "model=no_such_model").stdout


# ---- processes of this machine


@pytest.mark.slow
def test_a_detached_process_trains_a_list_and_each_run_is_cancelled_alone(params, recipe, slurm):
    words = ["submit", params, "seed=0-3", "-p", "epochs=400", "--local", "2"]
    command = [sys.executable, "-m", "workbench", *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as terminal:
        assert terminal.wait() == 0
        session = terminal.pid
    folder = params.parent / "small-sweep"
    found = [runs.Run(folder / f"small-seed{seed}") for seed in range(4)]
    job = jobs.read(found[0].path)
    process = psutil.Process(job["process"])
    assert os.getsid(process.pid) == process.pid != session
    states = lambda: list(dict(sorted(shown(folder).items())).values())
    assert states() == ["queued"] * 4
    until(lambda: last_step(found[0]) and last_step(found[1]))
    where = f"running on {socket.gethostname()}, step "
    assert all(text.startswith(where) for text in states()[:2]) and states()[2:] == ["queued"] * 2
    said = jobs.cancel([found[0].path, found[2].path])
    assert [text.partition(": ")[2].split(",")[0] for text in said] == ["cancelled"] * 2
    until(lambda: last_step(found[3]))
    assert states()[0] == states()[2] == "cancelled"
    assert all(text.startswith(where) for text in (states()[1], states()[3]))
    assert found[0].load_checkpoint()["progress"]["step"] == found[0].status()["step"] > 0
    assert "nothing to cancel" in jobs.cancel([found[0].path])[0]
    process.send_signal(signal.SIGTERM)  # as when the machine is shut down
    until(lambda: not jobs.is_alive(job, "process"))
    assert states() == ["cancelled", "stopped", "cancelled", "stopped"]


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_no_run_queued_or_running(params, recipe):
    assert "process" in cluster.submit(recipe.replace(epochs=400), {"seed": range(2)}, local=1)
    first, second = (params.parent / "small-sweep" / f"small-seed{seed}" for seed in range(2))
    until(lambda: last_step(runs.Run(first)))
    psutil.Process(jobs.read(first)["process"]).kill()
    until(lambda: not runs.Run(first).locked())
    states = {"small-seed0": "interrupted", "small-seed1": "interrupted"}
    assert shown(params.parent / "small-sweep") == states


@pytest.fixture
def in_this_process(monkeypatch):
    """The runs of a list are trained one after the other, without processes."""
    monkeypatch.setattr(sweep, "in_processes", lambda f, tasks, *_: ((t, f(t)) for t in tasks))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_a_worker_that_is_faster_than_submit_writes_all_that_cancel_needs(recipe, in_this_process):
    run, other = runs.Run(recipe.folder), recipe.folder / "job-1.txt"
    run.path.mkdir()
    recipe.to_yaml(run.file("recipe.yaml"))
    other.write_text(f"{run.path}\n")
    cluster.run_tasks(other, 1)
    assert run.status()["state"] == "finished"
    here = {"host": socket.gethostname(), "process": os.getpid(), "worker": os.getpid()}
    times = dict.fromkeys(("started", "worker_started"), locks.started(os.getpid()))
    assert jobs.read(run.path) == here | times


def test_a_second_list_with_a_run_leaves_the_job_of_the_first_to_be_cancelled(
    recipe, in_this_process
):
    run = runs.Run(recipe.folder)
    with subprocess.Popen(["sleep", "60"]) as first, run.writing():
        recipe.to_yaml(run.file("recipe.yaml"))
        job = {"host": socket.gethostname(), "process": os.getpid(), "worker": first.pid}
        job |= {"started": locks.started(os.getpid()), "worker_started": locks.started(first.pid)}
        jobs.write(run.path, **job)
        run.file("job-2.txt").write_text(f"{run.path}\n")
        cluster.run_tasks(run.file("job-2.txt"), 1)
        assert jobs.read(run.path) == job
        assert jobs.cancel([run.path]) == [
            f"{run.path}: cancelled, process {os.getpid()} on {socket.gethostname()}"
        ]
        assert first.wait(10) == -signal.SIGTERM


def test_a_list_on_another_host_is_unknown_and_its_runs_are_free_once_cancelled(recipe):
    recipe.folder.mkdir()
    recipe.to_yaml(recipe.folder / "recipe.yaml")
    jobs.write(recipe.folder, host="another-host", process=5, started="7")
    submit = lambda: cluster.submit(recipe, local=1, dry_run=True)
    for worker in ({}, {"worker": 6, "worker_started": "8"}):
        jobs.write(recipe.folder, **worker)
        assert shown(recipe.folder.parent) == {"small-seed0": "unknown"}
        assert submit().startswith("0 runs (1 unknown: ")
    said = "cancelled, process 5 on another-host"
    assert jobs.cancel([recipe.folder]) == [f"{recipe.folder}: {said}"]
    assert shown(recipe.folder.parent) == {"small-seed0": "cancelled"}
    assert submit().startswith("1 run in ")


def test_a_process_of_the_same_number_that_started_later_is_not_signalled(recipe):
    with subprocess.Popen(["sleep", "60"]) as other:
        run = runs.Run(recipe.folder)
        run.path.mkdir(parents=True)
        here = {"host": socket.gethostname(), "process": os.getpid()}
        here |= {"started": locks.started(os.getpid()), "worker": other.pid}
        jobs.write(run.path, **here, worker_started=locks.started(other.pid))
        assert jobs.of_runs([run.path])[run.path].state == "running"
        jobs.write(run.path, worker_started=str(int(locks.started(other.pid)) - 1))
        assert jobs.of_runs([run.path])[run.path].state == "ended"
        assert "nothing to cancel" in jobs.cancel([run.path])[0]
        assert other.poll() is None
        jobs.write(run.path, worker_started=locks.started(other.pid))
        assert "cancelled" in jobs.cancel([run.path])[0]
        assert other.wait(10) == -signal.SIGTERM


# ---- the examples


def command_of(text: str) -> tuple[str, dict[str, str]]:
    """Params file and overrides of the first `workbench train` in a shell command."""
    words = shlex.split(text.partition("workbench train ")[2].partition(";")[0])
    assert words[1::2] == ["-p"] * (len(words) // 2)
    return words[0], dict(word.split("=", 1) for word in words[2::2])


def assert_trains(text: str, seed: str) -> None:
    path, overrides = command_of(text)
    overrides["seed"] = overrides["seed"].replace(seed, "4")
    assert Recipe.from_yaml(ROOT / path, **overrides).folder == Path("/runs/digits_baseline-seed4")


def test_the_example_for_kubernetes_retries_what_was_stopped_and_not_what_failed():
    """As the documentation of Job, batch/v1, says."""
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    known = {"action", "onExitCodes", "onPodConditions"}
    rules = spec["podFailurePolicy"]["rules"]
    assert all(rule.keys() <= known and len(rule) == 2 for rule in rules)
    codes = {rule["action"]: rule["onExitCodes"] for rule in rules if "onExitCodes" in rule}
    assert codes["Ignore"] == {"operator": "In", "values": [3, 143]}
    assert codes["FailIndex"]["values"] == [1] and "backoffLimitPerIndex" in spec  # it needs that
    [container] = pod["containers"]
    assert_trains(container["command"][-1], "$JOB_COMPLETION_INDEX")
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert mounts == volumes.keys()
    [memory] = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    assert volumes[memory] == {"emptyDir": {"medium": "Memory"}}


def test_the_example_for_skypilot_recovers_what_was_stopped():
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text(encoding="utf-8"))
    recovery = task["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [3, 143]}
    assert_trains(task["run"], "$SEED")


def test_the_example_for_ray_trains_again_after_exit_code_3_and_not_after_1(tmp_path, monkeypatch):
    jobs_of_ray: list[dict] = []
    client = types.SimpleNamespace(submit_job=lambda **job: jobs_of_ray.append(job))
    module = types.SimpleNamespace(JobSubmissionClient=lambda address: client)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(job_submission=module))
    monkeypatch.setitem(sys.modules, "ray.job_submission", module)
    exec(compile((EXAMPLES / "ray_jobs.py").read_text(encoding="utf-8"), "ray_jobs", "exec"), {})
    assert len({job["entrypoint"] for job in jobs_of_ray}) == 5
    assert all(job["runtime_env"] == {"working_dir": "."} for job in jobs_of_ray)
    assert not any("submission_id" in job for job in jobs_of_ray)  # so that it can run again
    assert_trains(jobs_of_ray[4]["entrypoint"], "4")
    python = tmp_path / "python"
    code = f'$(sed -n "$(wc -l < {tmp_path}/starts)p" {tmp_path}/codes)'
    python.write_text(f"#!/bin/sh\necho >> {tmp_path}/starts\nexit {code}\n")
    python.chmod(0o755)
    for codes in ([3, 3, 0], [3, 1]):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "starts").write_text("")
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(jobs_of_ray[0]["entrypoint"], shell=True, env=environment)
        assert done.returncode == codes[-1]
        assert (tmp_path / "starts").read_text().count("\n") == len(codes)
