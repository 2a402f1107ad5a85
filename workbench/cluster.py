"""Runs in jobs: an array of Slurm, or a detached process on this machine."""

import contextlib
import functools
import itertools
import json
import os
import re
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
from workbench.recipe import Recipe, fingerprint
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
    otherwise an array of Slurm all of them (`job_script`). Finished, queued and running ones are
    left out. The list of run folders and the script are written into the folder of the sweep, or of
    the run; with `dry_run` nothing more is done. Raises RecipeError, and RunError for a folder of
    another run, or if sbatch fails.
    """
    if not (local or dry_run or shutil.which("sbatch")):
        raise runs.RunError("there is no sbatch on this machine; --local 1 trains without Slurm")
    recipes = [parts.pin(one) for one in (sweep.combinations(recipe, axes) if axes else [recipe])]
    folder = sweep.folder_of(recipe, axes) if axes else recipe.folder
    folder.mkdir(parents=True, exist_ok=True)
    with locks.owning(folder / ".submit", wait=True):  # until others see these runs as queued
        left, count = _left(recipes)
        if not left:
            return count
        numbers = (folder / f"job-{number}.txt" for number in itertools.count(1))
        tasks = next(path for path in numbers if not path.exists())
        for one in left:
            with (run := runs.Run(one.folder)).writing():
                with run.atomic_write("recipe.yaml") as temporary:
                    one.to_yaml(temporary)
                parts.save(one, run.path)
                for name in ("job.json", "CANCEL"):
                    run.file(name).unlink(missing_ok=True)
        tasks.write_text("".join(f"{one.folder}\n" for one in left))
        text, command = "", [sys.executable, "-m", "workbench.cluster", str(tasks), str(local)]
        if not local:
            command = ["sbatch", "--parsable", str(script := tasks.with_suffix(".sh"))]
            script.write_text(text := job_script(tasks, recipe.name, len(left), **slurm))
        if dry_run:
            return f"{text}{count} in {tasks}; to start: {shlex.join(command)}"
        job = _detach(command, tasks) if local else _sbatch(command, script)
        for index, one in enumerate(left):  # "x": the job itself may have been faster
            with contextlib.suppress(FileExistsError), open(one.folder / "job.json", "x") as file:
                json.dump({"submitted": time.time(), "index": index, **job}, file, indent=2)
    name = f"process {job['process']} on {job['host']}" if local else f"job {job['job']}"
    return f"{count} in {tasks}: {name}"


def _left(recipes: list[Recipe]) -> tuple[list[Recipe], str]:
    """The recipes to train, and in words how many. Raises RunError for a run of another recipe."""
    found, left, unknown = jobs.of_runs(one.folder for one in recipes), [], 0
    for one in recipes:
        known, job = (run := runs.Run(one.folder)).status()["state"], found.get(one.folder)
        state = jobs.state(known, job)
        if run.file("last.pt").exists() or known == "running":
            training.check_same_recipe(one, run)
        elif state in jobs.LIVE and fingerprint(run.recipe()) != one.fingerprint:
            text = f"another recipe is {state} as {job.name}"
            raise runs.RunError(f"{run.path}: {text}; first call: workbench cancel {run.path}")
        unknown += state == "unknown"
        left += [one] if state not in ("finished", *jobs.LIVE) else []
    count, others = counted(len(left), "run"), len(recipes) - len(left) - unknown
    count += f" ({others} finished, queued or running)" if others else ""
    return left, count + f" ({unknown} unknown: `workbench cancel` frees them)" * bool(unknown)


def notes(recipe: Recipe, time: str) -> list[str]:
    """What looks wrong on this machine, and may be right on a node."""
    found = []
    if re.fullmatch(r"(0+:)?0*[12](:\d+)?", time):
        text = f"--time {time} leaves few steps: the training is stopped 120 s before the limit"
        found.append(f"{text}, or as --signal in --sbatch says")
    folder = ROOT / Path(recipe.data_dir).expanduser()
    if recipe.dataset == "files" and not folder.exists():
        found.append(f"there is no data_dir {str(folder)!r} on this machine")
    return found


def job_script(tasks: Path, name: str, count: int, *, gpus: int = 1, **options: Any) -> str:
    """The job script, from slurm.sh: `gpus` processes per node, or one on the CPU.

    `options` are nodes, time, partition; `sbatch` are others in words, of which the last counts.
    """
    last, output = options.pop("sbatch", ""), str(tasks.with_suffix("")).replace("%", "%%")
    values = {"job-name": shlex.quote(name), "array": f"0-{count - 1}", "nodes": 1}
    values |= {"output": f'"{output}_%a.log"', "ntasks-per-node": max(1, gpus)}
    values |= {"gpus-per-node": gpus, **options}
    words = [f"#SBATCH --{key}={value}" for key, value in values.items() if value]
    text = Path(__file__).with_name("slurm.sh").read_text(encoding="utf-8")
    text = text.replace("@DIRECTIVES@", "\n".join(words + [f"#SBATCH {last}"] * bool(last)))
    known = {"SCRIPT": tasks.with_suffix(".sh"), "PYTHON": sys.executable, "ROOT": ROOT}
    for key, value in {"TASKS": tasks, **known}.items():
        text = text.replace(f"@{key}@", shlex.quote(str(value)))
    return text


def _sbatch(command: list[str], script: Path) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise runs.RunError(f"sbatch failed: {done.stderr.strip()}; see {script}")
    if not (number := re.search(r"(\d+)(;\S*)?\s*$", done.stdout)):  # at the end, "12;cluster"
        raise runs.RunError(f"sbatch printed no job number but {done.stdout!r}; see {script}")
    return {"job": number[1]}


def _detach(command: list[str], tasks: Path) -> dict[str, Any]:
    with open(tasks.with_suffix(".log"), "ab") as out:
        how = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "cwd": ROOT}
        process = subprocess.Popen(command, start_new_session=True, **how)
    process.returncode = 0  # nobody waits for it
    return _facts(process.pid)


def _facts(process: int) -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": process, "started": locks.started(process)}


def _train_task(count: int, job: dict[str, Any], path: Path) -> Row:
    if (run := runs.Run(path)).locked():  # whose job.json stays
        return {"state": "stopped", "message": f"{path} is being written by {run.writer()}"}
    jobs.write(path, **job, worker=os.getpid(), worker_started=locks.started(os.getpid()))
    if (path / "CANCEL").exists():
        return {"state": "stopped", "message": "cancelled"}
    recipe = Recipe.from_yaml(path / "recipe.yaml")
    return sweep.train_run(recipe.replace(workers=training.pick_workers(recipe.workers, count)), {})


def run_tasks(tasks: Path, count: int) -> None:
    """Trains the runs of a list of folders, `count` at a time; SIGTERM stops them all."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    paths = map(Path, tasks.read_text().splitlines())
    train = functools.partial(_train_task, count, _facts(os.getpid()))
    for path, row in sweep.in_processes(train, paths, count, tasks.with_suffix(".log")):
        print(f"{path.name}: {row['message']}", flush=True)
        if row["state"] == "failed" and (run := runs.Run(path)).status()["state"] == "new":
            with contextlib.suppress(runs.RunError), run.writing():  # another process may have it
                run.set_status("failed", message=row["message"])


if __name__ == "__main__":  # a task list, and how many at a time
    run_tasks(Path(sys.argv[1]), int(sys.argv[2]))
