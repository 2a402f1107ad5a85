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
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import run_folder
from helpers import last_step, train

from workbench import ROOT, cluster, jobs, locks, run_list, runs
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
        lines = ["#!/bin/sh", f'echo "{name} $@" >> {folder}/called']
        lines += [f"printf '{text}'" if code == 0 else f"echo '{text}' >&2", f"exit {code}"]
        (folder / name).write_text("\n".join(lines) + "\n")
        (folder / name).chmod(0o755)

    program.called = lambda: (folder / "called").read_text().splitlines()
    return program


def shown(folder: Path) -> dict[str, str]:
    """The column state of `workbench runs`, by run."""
    found = run_list.rows(folder, sweeps=True)
    return {row["run"]: row["text"] for row in found}


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
    slurm("squeue", "".join(f"12|{i}|PENDING||0|\\n" for i in range(3)))
    assert cluster.submit(recipe, axes, gpus=0) == "0 runs (4 finished, queued or running)"
    slurm("squeue", "12|0|PENDING||0|\\n")  # the others were cancelled
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
    "queue, status, job, text",
    [
        ("12|3|PENDING||0|", None, {}, "queued"),
        ("12|3|PENDING||2|", "stopped", {}, "requeued twice, queued"),
        ("12|3|PENDING||1|", "running", {"node": "n3"}, "requeued once, queued"),
        ("12|3|RUNNING|n3|0|", None, {"node": "n3"}, "running on n3"),
        ("12|3|RUNNING|n[3-4]|3|", "stopped", {}, "requeued 3 times, running on n[3-4]"),
        ("12|3|RUNNING|n3|0|", "finished", {}, "finished"),
        ("12|3|COMPLETING|n3|0|", "failed", {}, "failed"),
        ("12|2|RUNNING|n3|0|", None, {}, "interrupted"),  # another of the array
        ("", None, {"node": "n3"}, "interrupted"),
        ("", "running", {"node": "n3"}, "interrupted"),
        ("", "stopped", {}, "stopped"),
        (None, None, {}, "queued"),  # no squeue
        (None, None, {"node": None, "requeues": 1}, "requeued once, queued"),
        (None, "running", {"node": "n3"}, "interrupted"),
        (None, "stopped", {"node": "n3"}, "stopped"),
    ],
)
def test_states_of_a_run_with_a_job(recipe, slurm, queue, status, job, text):
    run = runs.Run(recipe.folder)
    with run.writing():
        recipe.to_yaml(run.file("recipe.yaml"))
        run.write_json("job.json", {"job": "12", "index": 3, "requeues": 0, **job})
        if status:
            run.set_status(status, step=5, steps=9)
    if queue is None:
        slurm("squeue", "slurm_load_jobs error: Unable to contact slurm controller", 1)
    else:
        slurm("squeue", queue)
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
    slurm("squeue", "12|3|PENDING||0|")
    slurm("scancel", "")
    assert list(jobs.wait_and_follow(run, stop)) == [] and stop.waits == 2
    assert "scancel 12_3" in slurm.called()
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
    assert mounts == {volume["name"] for volume in pod["volumes"]}


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
    assert len({job["submission_id"] for job in jobs_of_ray}) == 5
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
