"""Processes that srun starts: what they read of its variables, and how they stop."""

import signal
import subprocess
import sys
import time

import pytest
from helpers import KEYS, assert_same_run, clean, codes, free_port, on_one_node, started
from training_helpers import NO_NOISE, small

from workbench import runs

SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SBATCH |= {"SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "1(x2)", "SLURM_JOB_NODELIST": "n[1-2]"}
SRUN = SBATCH | {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
SRUN |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "n[1-2]"}
SRUN |= {"SLURM_NODEID": "1"}


def read(**variables: str) -> list[str]:
    """What a process with these variables has in KEYS after `import workbench`; "-" for none."""
    code = f"import os, workbench; print(*(os.environ.get(k, '-') for k in {KEYS}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=clean(**variables), capture_output=True, check=True)
    return done.stdout.decode().split()


def test_a_process_of_srun_has_the_variables_of_torchrun():
    assert read(**SRUN) == ["1", "2", "0", "1", "n1", "10703"]


def test_one_process_waits_for_no_other_in_a_script_of_sbatch_and_in_a_step_of_one_task():
    """As Slurm 22.05 sets them: a script has numbers of tasks and of the process, but no step."""
    assert read(**SBATCH) == ["-"] * 6
    assert read(**SRUN | {"SLURM_STEP_NUM_TASKS": "1"}) == ["-"] * 6


def test_variables_that_are_set_win_and_those_of_torchrun_together():
    given = SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    assert read(**given) == ["1", "2", "0", "1", "here", "1234"]
    assert read(**SRUN, RANK="5", WORLD_SIZE="8") == ["5", "8", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    "nodes, tasks, node, first, local_world",
    [
        ("n[1-2,7],m3", "2(x3),1", "3", "n1", "1"),
        ("gpu-[007,009-010]", "4(x2),3", "1", "gpu-007", "4"),
        ("a.cluster,b.cluster", "1,2", "1", "a.cluster", "2"),
        ("rack[2-3]n[4-5]", "8(x4)", "0", "rack2n4", "8"),
        ("login", "16", "0", "login", "16"),
    ],
)
def test_the_first_host_and_the_processes_of_a_node_are_read_from_lists(
    nodes, tasks, node, first, local_world
):
    variables = {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": tasks}
    found = read(**SRUN | variables | {"SLURM_NODEID": node})
    assert (found[4], found[3]) == (first, local_world)


def on_two_nodes(recipe) -> list[subprocess.Popen]:
    """A process on each of two nodes, started by srun; both are this machine."""
    port = free_port()
    own = lambda rank: {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "MASTER_PORT": port}
    nodes = {"SLURM_STEP_NODELIST": "localhost,other"}
    return [started(recipe, rank, **SRUN | nodes | own(rank)) for rank in range(2)]


@pytest.mark.slow
def test_sigterm_ends_every_process_of_srun_with_3_and_two_nodes_give_what_one_gives(tmp_path):
    """Bit for bit, after a resume: the processes take the same batches in the same order."""
    options = {**NO_NOISE, "batch_size": 32, "epochs": 4, "workers": 1, "log_every": 1}
    options["ema_decay"] = 0.9
    recipe = small(tmp_path, name="two_nodes", **options)
    run = runs.Run(recipe.folder)
    processes = on_two_nodes(recipe)
    end = time.monotonic() + 100
    while len(run.text("steps.csv").splitlines()) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    assert codes(processes) == [3, 3]
    status = run.status()
    assert status["state"] == "stopped" and "stopped by SIGTERM" in status["message"]
    assert 4 <= status["step"] < status["steps"]
    assert codes(on_two_nodes(recipe)) == [0, 0]

    other = small(tmp_path, name="one_node", **options)
    assert codes(on_one_node(other)) == [0, 0]
    assert run.environment()["processes"] == 2
    assert_same_run(run, runs.Run(other.folder))


TERM_IN_VALIDATION = """
import os, signal
from workbench.evaluation import inference
predict, seen = inference.predict, []
def interrupted(network, batches, *rest):
    def counted():
        for batch in batches:
            seen.append(batch)
            if len(seen) == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch
    return predict(network, counted(), *rest)
inference.predict = interrupted
"""


@pytest.mark.slow
def test_sigterm_of_one_process_in_validation_stops_all_and_validation_is_repeated(tmp_path):
    options = {**NO_NOISE, "batch_size": 32, "epochs": 2, "ema_decay": 0.9}
    recipe = small(tmp_path, name="stopped", **options)
    assert codes(on_one_node(recipe, TERM_IN_VALIDATION)) == [3, 3]
    run = runs.Run(recipe.folder)
    assert run.status()["step"] == run.status()["steps"] // 2 and run.metrics().empty
    assert codes(on_one_node(recipe)) == [0, 0]
    other = small(tmp_path, name="whole", **options)
    assert codes(on_one_node(other)) == [0, 0]
    assert_same_run(run, runs.Run(other.folder))
