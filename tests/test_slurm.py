"""Runs submitted to a real Slurm with two nodes: what is shown, stopped, requeued and killed."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import assert_same_run, last_step
from slurm_helpers import WHY_NOT, slurm

from workbench import ROOT, cluster, jobs, run_list, runs
from workbench.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]
CPU = {"gpus": 0, "sbatch": "--mem=5000"}  # one run on a node at a time


@pytest.fixture(scope="module")
def daemons():
    """The cluster; this process and its children use it, and train with one thread."""
    with slurm() as found, pytest.MonkeyPatch.context() as patch:
        for key, value in {**found.environment, "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(key, value)
        yield found


@pytest.fixture
def nodes(daemons):
    """The cluster; at the end no job is left, and a node that was killed is started."""
    yield daemons
    daemons.call("scancel", "--user=root")
    daemons.wait_for(lambda: not queue(daemons), 60)
    for node in {"n1", "n2"} - daemons.daemons.keys():
        daemons.start_node(node)
    daemons.wait_for(daemons.is_idle, 60)


def small(tmp_path: Path, name: str, **options) -> Recipe:
    options = {"train_fraction": 0.1, "epochs": 2, "workers": 0} | options
    return Recipe(name=name, runs_dir=str(tmp_path), **options)


def submit(recipe: Recipe, axes=None, **slurm) -> str:
    return cluster.submit(recipe, axes, **CPU | slurm)


def shown(folder: Path) -> dict[str, str]:
    """The column state of `workbench runs` by run, without Slurm's reason."""
    found = run_list.rows(folder, sweeps=True)
    return {row["run"]: row["text"].partition(" (")[0] for row in found}


def queue(nodes) -> dict[str, tuple[str, str]]:
    """State and node by job and index, as Slurm says."""
    lines = nodes.call("squeue", "-hr", "-o", "%F_%K %T %N").splitlines()
    return {job: (state, *node) for job, state, *node in map(str.split, lines)}


def test_runs_are_listed_as_they_are_at_every_moment_of_an_array(nodes, tmp_path):
    recipe = small(tmp_path, "six")
    axes = {"lr": [0.05, 0.2], "seed": [0, 1, 2]}
    assert submit(recipe, axes).startswith("6 runs in ")
    paths = [f"six-sweep-lr/lr={lr}-seed{seed}" for lr in axes["lr"] for seed in axes["seed"]]
    seen: dict[str, list[str]] = {path: [] for path in paths}
    [job] = {jobs.read(tmp_path / path)["job"] for path in paths}
    end = time.monotonic() + 200
    while not all(states[-1:] == ["finished"] for states in seen.values()):
        assert time.monotonic() < end
        before, states, after = queue(nodes), shown(tmp_path), queue(nodes)
        for index, path in enumerate(paths):
            text, told = states[path], before.get(f"{job}_{index}")
            if told == after.get(f"{job}_{index}"):
                if told and told[0] == "PENDING":
                    assert text == "queued"
                elif told and told[0] == "RUNNING":
                    assert text.split(",")[0] in (f"running on {told[1]}", "finished")
                elif not told:
                    assert text == "finished"
            if [text.split(",")[0]] != seen[path][-1:]:
                seen[path].append(text.split(",")[0])
    where = {states[-2] for states in seen.values()}
    assert where == {"running on n1", "running on n2"}
    for states in seen.values():
        assert states in (["queued", states[-2], "finished"], [states[-2], "finished"])
    assert sum(states[0] == "queued" for states in seen.values()) >= 4  # two nodes, six runs
    assert submit(recipe, axes) == "0 runs (6 finished, queued or running)"


def test_a_run_at_its_time_limit_is_requeued_and_resumes_at_the_exact_step(nodes, tmp_path):
    recipe = small(
        tmp_path / "cut", "long", epochs=15, eval_every=5, train_fraction=0.3, log_every=1
    )
    alone = recipe.replace(runs_dir=str(tmp_path / "whole"))
    alone.to_yaml(tmp_path / "whole.yaml")
    # Slurm looks every 30 s whether the signal is due, which it may send 60 s early
    submit(recipe, time="1", sbatch="--signal=TERM@20")
    words = [sys.executable, "-m", "workbench", "train", str(tmp_path / "whole.yaml")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL) as reference:
        run, seen = runs.Run(recipe.folder), []
        end = time.monotonic() + 280
        while (now := shown(tmp_path / "cut")["long-seed0"]) != "finished":
            assert time.monotonic() < end, (seen, *tmp_path.glob("cut/*/*.log"))
            seen += [now] if [now] != seen[-1:] else []
            if last_step(run) and not any("requeued" in text for text in seen):
                run.file("PAUSE").touch()  # until the signal comes, on the fastest machine too
            time.sleep(0.5)
        assert reference.wait() == 0
    assert "requeued once, queued" in seen
    assert any(text.startswith("requeued once, running on n") for text in seen)
    assert not {"failed", "interrupted", "new"} & set(seen)
    log = (recipe.folder / "job-1_0.log").read_text()
    assert "stopped by SIGTERM after step" in log
    assert_same_run(run, runs.Run(alone.folder))


def test_cancelled_runs_stop_with_a_checkpoint_and_are_not_requeued(nodes, tmp_path):
    recipe = small(tmp_path, "many", epochs=500)
    submit(recipe, {"seed": range(6)})
    folder = tmp_path / "many-sweep"
    paths = [folder / f"many-seed{seed}" for seed in range(6)]
    nodes.wait_for(lambda: all(last_step(runs.Run(path)) for path in paths[:2]), 60)
    words = "cancel", paths[0], paths[2]
    done = subprocess.run(
        [sys.executable, "-m", "workbench", *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("cancelled, job") == 2, done.stderr
    job = jobs.read(paths[0])["job"]
    nodes.call("scancel", f"{job}_1", f"{job}_3")  # what knows nothing of run folders
    gone = {f"{job}_{index}" for index in range(4)}
    nodes.wait_for(lambda: not gone & set(queue(nodes)), 60)
    states = shown(folder)
    assert states["many-seed0"] == states["many-seed2"] == "cancelled"
    assert states["many-seed1"] == "stopped" and states["many-seed3"] == "interrupted"
    for path in paths[:2]:
        run = runs.Run(path)
        assert run.load_checkpoint()["progress"]["step"] == run.status()["step"] > 0
    jobs.cancel(paths)
    nodes.wait_for(lambda: not queue(nodes), 60)
    time.sleep(8)  # a requeued job would be back
    assert not queue(nodes)
    assert set(shown(folder).values()) <= {"cancelled", "stopped", "interrupted"}
    assert submit(recipe, {"seed": [0]}).startswith("1 run in ")  # it resumes
    assert shown(folder)["many-seed0"].split(",")[0] in ("queued", "running on n1", "running on n2")


def test_a_stop_file_ends_a_run_without_a_requeue(nodes, tmp_path, monkeypatch):
    recipe = small(tmp_path, "halt", epochs=500)
    submit(recipe)
    run = runs.Run(recipe.folder)
    nodes.wait_for(lambda: last_step(run), 60)
    run.file("STOP").touch()
    nodes.wait_for(lambda: run.status()["state"] == "stopped", 60)
    nodes.wait_for(lambda: not queue(nodes), 60)
    monkeypatch.setenv("SQUEUE_STATES", "all")
    assert shown(tmp_path)["halt-seed0"] == "stopped"
    assert "was stopped by a user" in (recipe.folder / "job-1_0.log").read_text()


def test_a_run_whose_node_dies_is_requeued_and_never_shown_as_running_for_ever(nodes, tmp_path):
    recipe = small(tmp_path, "power", epochs=60, checkpoint_minutes=0.02)
    submit(recipe)
    run = runs.Run(recipe.folder)
    nodes.wait_for(lambda: last_step(run) and run.file("last.pt").exists(), 60)
    where = jobs.read(run.path)["node"]
    assert shown(tmp_path)["power-seed0"].startswith(f"running on {where}, step ")
    nodes.kill_node(where)
    nodes.wait_for(lambda: not run.locked())
    nodes.wait_for(lambda: shown(tmp_path)["power-seed0"] == "requeued once, queued", 120)
    other = {"n1": "n2", "n2": "n1"}[where]
    text = f"requeued once, running on {other}"
    nodes.wait_for(lambda: shown(tmp_path)["power-seed0"].startswith(text), 60)
    nodes.wait_for(lambda: shown(tmp_path)["power-seed0"] == "finished", 120)


def test_without_squeue_job_json_and_the_lock_say_what_is_known(nodes, tmp_path, monkeypatch):
    recipe = small(tmp_path, "apart", epochs=500)
    submit(recipe, {"seed": range(3)})
    folder = tmp_path / "apart-sweep"
    first = runs.Run(folder / "apart-seed0")
    nodes.wait_for(lambda: last_step(first), 60)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    states = shown(folder)
    assert states["apart-seed0"].startswith("running on n") and states["apart-seed2"] == "unknown"
    monkeypatch.undo()


@pytest.mark.parametrize("gpus", [0, 2])
def test_two_nodes_give_what_the_processes_of_one_node_give(nodes, tmp_path, monkeypatch, gpus):
    """Bit for bit, with the batch-norm statistics that each process has of its own images."""
    with socket.socket() as free:  # node names resolve on a real cluster
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    options = {"epochs": 3, "batch_size": 32, "log_every": 1, "ema_decay": 0.9}
    pair, alone = (small(tmp_path / name, "ddp", **options) for name in ("pair", "alone"))
    submit(pair, nodes=2, gpus=gpus)  # Slurm counts GPUs, and the processes train on the CPU
    nodes.wait_for(lambda: shown(tmp_path / "pair")["ddp-seed0"].startswith("running"), 60)
    [told] = queue(nodes).values()
    assert told == ("RUNNING", "n[1-2]")
    granted = "gres:gpu:2" in nodes.call("scontrol", "show", "job", jobs.read(pair.folder)["job"])
    assert granted == bool(gpus)
    nodes.wait_for(lambda: shown(tmp_path / "pair")["ddp-seed0"] == "finished", 120)
    alone.to_yaml(tmp_path / "alone.yaml")
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(2 * max(1, gpus)),
    ]
    words += ["-m", "workbench", "train", str(tmp_path / "alone.yaml")]
    subprocess.run([*words], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    assert runs.Run(pair.folder).environment()["processes"] == 2 * max(1, gpus)
    assert_same_run(*(runs.Run(one.folder) for one in (pair, alone)))
