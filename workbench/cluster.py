"""Runs in jobs: an array of Slurm, or a detached process on this machine."""

import collections
import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workbench import ROOT, counted, jobs, locks, parts, runs, sweep, training
from workbench.recipe import Recipe
from workbench.training.meter import Row


def submit(
    recipe: Recipe,
    axes: Mapping[str, Iterable] | None = None,
    *,
    local: int = 0,
    dry_run: bool = False,
    **slurm: Any,
) -> str:
    """Starts jobs for the runs of a sweep over `axes`, or for one run, and returns what it did.

    With `local` a process of this machine that survives the kernel trains that many runs at once,
    otherwise an array of Slurm all of them (`job_script`). Finished, queued and running runs are
    left out. Writes recipe.yaml and job.json into each run folder; the list of them and the script
    into the folder of the sweep, or the run. With `dry_run` only returns script and command.

    Raises RecipeError, and RunError where a folder has another run, or sbatch is missing or fails.
    """
    recipes = [parts.pin(one) for one in (sweep.combinations(recipe, axes) if axes else [recipe])]
    folder = sweep.folder_of(recipe, axes) if axes else recipe.folder
    found, states = jobs.of_runs(one.folder for one in recipes), collections.defaultdict(list)
    for one in recipes:
        state = jobs.state((run := runs.Run(one.folder)).status()["state"], found.get(run.path))
        states[state if state in ("finished", "queued", "running") else ""].append(one)
        if run.file("last.pt").exists():
            training.check_same_recipe(one, run)
    left = states.pop("", [])
    out = "left out: " * bool(states) + ", ".join(f"{len(states[s])} {s}" for s in states)
    out += "\n" * bool(states and left)
    number = 1 + max((int(p.stem[4:]) for p in folder.glob("job-*.txt")), default=0)
    tasks, script = (folder / f"job-{number}.{kind}" for kind in ("txt", "sh"))
    text = "" if local else job_script(tasks, recipe.name, len(left), **slurm)
    command = ["sbatch", "--parsable", str(script)]
    if local:
        command = [sys.executable, "-m", "workbench.cluster", str(tasks), str(local)]
    if dry_run or not left:
        return out + f"{text}{counted(len(left), 'run')}: {shlex.join(command)}" * bool(left)
    if not local and not shutil.which("sbatch"):
        raise runs.RunError("there is no sbatch on this machine; --local 1 trains without Slurm")
    if axes:
        sweep.write_sweep_file(folder, recipe, axes, recipes)
    for one in left:
        _prepare(one)
    tasks.write_text("".join(f"{one.folder}\n" for one in left))
    if text:
        script.write_text(text)
    name, job = (_detach if local else _sbatch)(command, tasks)
    for index, one in enumerate(left):  # "x": the job itself may have been faster
        with contextlib.suppress(FileExistsError), open(one.folder / "job.json", "x") as file:
            json.dump({"submitted": time.time(), "index": index, **job}, file, indent=2)
    return f"{out}{counted(len(left), 'run')} in {folder}: {name}"


def job_script(tasks: Path, name: str, count: int, *, gpus: int = 1, **options: Any) -> str:
    """A script for `count` tasks, from slurm.sh: `gpus` processes per node, or one on the CPU.

    `options` are nodes, time, partition and so on; `sbatch` are others in words, which count most.
    """
    last = [words] if (words := options.pop("sbatch", "")) else []
    output = str(tasks.with_suffix("")).replace("%", "%%")
    values = {"job-name": shlex.quote(name), "array": f"0-{count - 1}", "nodes": 1}
    values |= {"output": f'"{output}_%a.log"', "ntasks-per-node": max(1, gpus)}
    values |= {"gpus-per-node": gpus, **options}
    words = [f"--{key}={value}" for key, value in values.items() if value] + last
    trust = "export WORKBENCH_TRUST_CODE=1\n" * ("WORKBENCH_TRUST_CODE" in os.environ)
    text = Path(__file__).with_name("slurm.sh").read_text(encoding="utf-8")
    text = text.replace("@DIRECTIVES@", "\n".join(f"#SBATCH {one}" for one in words))
    text, script = text.replace("@TRUST@\n", trust), tasks.with_suffix(".sh")
    known = {"TASKS": tasks, "SCRIPT": script, "PYTHON": sys.executable, "ROOT": ROOT}
    for key, value in known.items():
        text = text.replace(f"@{key}@", shlex.quote(str(value)))
    return text


def _prepare(recipe: Recipe) -> None:
    """Writes what `workbench train FOLDER/recipe.yaml` needs, and removes an old job."""
    run = runs.Run(recipe.folder)
    with run.writing():
        with run.atomic_write("recipe.yaml") as temporary:
            recipe.to_yaml(temporary)
        parts.save(recipe, run.path)
        for name in ("job.json", "CANCEL"):
            run.file(name).unlink(missing_ok=True)


def _sbatch(command: list[str], tasks: Path) -> tuple[str, dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise runs.RunError(f"sbatch failed: {done.stderr.strip()}; see {command[-1]}")
    job = done.stdout.strip().partition(";")[0]
    return f"job {job}, {command[-1]}", {"job": job}


def _detach(command: list[str], tasks: Path) -> tuple[str, dict[str, Any]]:
    env = os.environ | {"WORKBENCH_ROOT": str(ROOT)}
    with open(tasks.with_suffix(".log"), "ab") as out:
        how = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "cwd": ROOT, "env": env}
        process = subprocess.Popen(command, start_new_session=True, **how)
    process.returncode = 0  # nobody waits for it
    job = {"host": socket.gethostname(), "process": process.pid}
    return f"process {process.pid}, {out.name}", job | {"started": locks.started(process.pid)}


def run_tasks(tasks: Path, count: int) -> None:
    """Trains the runs of a list of folders, `count` at a time."""
    paths = [Path(line) for line in tasks.read_text().splitlines()]
    train, log = functools.partial(_train_task, count), tasks.with_suffix(".log")
    for path, row in sweep.in_processes(train, paths, count, log):
        print(f"{path.name}: {row['message']}", flush=True)
    if (tasks.parent / "sweep.yaml").exists():
        sweep.write_report(tasks.parent)


def _train_task(count: int, path: Path) -> Row:
    jobs.write(path, worker=os.getpid(), worker_started=locks.started(os.getpid()))
    if (path / "CANCEL").exists():
        return {"state": "stopped", "message": "cancelled"}
    recipe = Recipe.from_yaml(path / "recipe.yaml")
    return sweep.train_run(recipe.replace(workers=training.pick_workers(recipe.workers, count)), {})


if __name__ == "__main__":  # a task list and a number of processes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_tasks(Path(sys.argv[1]), int(sys.argv[2]))
