"""The job of a run: job.json in its folder, and what the queue says about it.

`workbench submit` creates job.json: `job` and `index` of an array of Slurm, or `host`, `process`
and `started` of a process. A job adds `node`, `requeues`, `step` at its start and `stalled`, a
process `worker` and `worker_started`. A file CANCEL beside it says: do not start it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from workbench import ROOT, locks
from workbench.runs import Run, RunError, atomic_write, follow

STARTS = 3  # of Slurm without a new step; then a run is not requeued any more
# "12|3|PENDING||0|Priority|"
FORMAT = "ArrayJobID:|,ArrayTaskID:|,State:|,NodeList:|,RestartCnt:|,Reason:|"


class Job(NamedTuple):
    """The job of a run; `state` is queued, running, cancelled, ended, or "" if unknown here."""

    name: str  # "job 12_3", "process 47 on host"
    state: str
    node: str | None = None
    requeues: int = 0
    reason: str = ""  # why it is queued, in Slurm's words


def read(path: Path) -> dict[str, Any]:
    """job.json of a run folder; empty if there is none."""
    try:
        return dict(json.loads((path / "job.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def write(path: Path, **values: Any) -> None:
    """Replaces values in job.json."""
    with atomic_write(path / "job.json") as temporary:
        temporary.write_text(json.dumps(read(path) | values, indent=2) + "\n")


def of_runs(paths: Iterable[Path]) -> dict[Path, Job]:
    """The jobs of runs that are not finished, from one squeue; read a run's state after that."""
    found = {p: job for p in paths if (job := read(p)) and Run(p).status()["state"] != "finished"}
    queue = _queue({job["job"] for job in found.values() if "job" in job})
    return {path: _job(job, (path / "CANCEL").exists(), queue) for path, job in found.items()}


def _queue(jobs: set[str]) -> dict[tuple, list[str]] | None:
    """State, nodes, requeues and reason by job and array index; None if squeue cannot say."""
    command = ["squeue", "--noheader", "--array", "--Format", FORMAT, "--jobs", ",".join(jobs)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30) if jobs else None
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done and done.returncode and "Invalid job id" not in done.stderr:  # it ended long ago
        return None
    rows = (line.split("|") for line in done.stdout.splitlines()) if done else ()
    return {(job, index): rest[:4] for job, index, *rest in rows}


def _job(job: dict[str, Any], cancelled: bool, queue: dict[tuple, list[str]] | None) -> Job:
    ended, node, requeues = "cancelled" if cancelled else "ended", job.get("node"), 0
    if "job" in job:
        name, requeues = f"job {job['job']}_{job['index']}", job.get("requeues", 0)
        if queue is None:  # then the lock alone says that it runs
            return Job(name, ended if cancelled else "" if node else "queued", node, requeues)
        found = queue.get((job["job"], str(job["index"])), ["COMPLETING", node, requeues, ""])
        state = {"PENDING": "queued", "REQUEUED": "queued", "COMPLETING": ended}
        return Job(name, state.get(found[0], "running"), found[1], int(found[2]), found[3])
    worker = "worker" in job
    state = ended if cancelled else "" if worker else "queued"
    if job["host"] == socket.gethostname():
        alive = is_alive(job, "worker" if worker else "process")
        state = "running" if worker and alive else state if alive else ended
    return Job(f"process {job['process']} on {job['host']}", state, job["host"])


def is_alive(job: dict[str, Any], key: str) -> bool:
    """Whether "worker" or "process" has not ended; a later process of its number is another one."""
    since = job["worker_started" if key == "worker" else "started"]
    return bool(since) and locks.started(job[key]) == since


def state(known: str, job: Job | None) -> str:
    """The state of a run with a job, from that of Run.status: also queued or cancelled."""
    if job is None or known in ("running", "finished"):
        return known
    if job.state == "ended" and known == "new":
        return "interrupted"
    live = job.state in ("queued", "running") or (job.state == "cancelled" and known != "failed")
    return job.state if live else known


def start(path: Path) -> None:
    """In a job of Slurm: writes into job.json where it runs, and from which step."""
    env, step = os.environ, Run(path).status()["step"]
    found = {"job": env["SLURM_ARRAY_JOB_ID"], "index": int(env["SLURM_ARRAY_TASK_ID"])}
    requeues = int(env.get("SLURM_RESTART_COUNT", 0))
    write(path, **found, node=env["SLURMD_NODENAME"], requeues=requeues, step=step)


def requeue(path: Path) -> str | None:
    """Why a run that was stopped is not requeued; None if it is, which job.json says then."""
    status, job = Run(path).status(), read(path)
    stalled = 0 if status["step"] > job["step"] else job.get("stalled", 0) + 1
    if (path / "CANCEL").exists() or "STOP file" in status["message"]:
        return f"{path} was stopped by a user; submit it again to resume it"
    if stalled >= STARTS:
        return f"{path} made no step in {stalled} starts; its time limit may be too short"
    write(path, stalled=stalled, node=None, requeues=job["requeues"] + 1)
    return None


def cancel(paths: Iterable[Path]) -> list[str]:
    """Cancels the jobs of runs; a sentence about each. Raises RunError if scancel fails."""
    found, ids, said = of_runs(paths := [*paths]), [], []
    for path in paths:
        if path not in found or found[path].state not in ("", "queued", "running"):
            known = state(Run(path).status()["state"], found.get(path))
            said.append(f"{path} is {known}, nothing to cancel")
            continue
        (path / "CANCEL").touch()  # before job.json is read: the worker writes that, then looks
        if "job" in (job := read(path)):
            ids.append(f"{job['job']}_{job['index']}")
        elif job["host"] != socket.gethostname():
            (path / "STOP").touch()
        elif "worker" in job and is_alive(job, "worker"):
            os.kill(job["worker"], signal.SIGTERM)
        said.append(f"{path}: cancelled, {found[path].name}")
    done = subprocess.run(["scancel", *ids], capture_output=True, text=True) if ids else None
    if done and done.returncode:
        raise RunError(f"scancel {' '.join(ids)} failed: {done.stderr.strip()}")
    return said


def run_folders(path: Path) -> list[Path]:
    """The run folder of this name, or those of a sweep: here, in the root folder or in its runs/.

    Raises RunError where there is none.
    """
    for folder in (path.absolute(), ROOT / path, ROOT / "runs" / path):
        if (folder / "recipe.yaml").exists():
            return [folder]
        if below := sorted(one.parent for one in folder.glob("*/recipe.yaml")):
            return below
    raise RunError(f"{path} is no folder of a run or sweep; `workbench runs` lists them")


def wait_and_follow(run: Run, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """The rows of runs.follow, also of a run that is queued or requeued; STOP cancels it then."""
    while True:
        yield from follow(run, stop=stop)
        job = of_runs([run.path]).get(run.path)
        if stop.is_set() or job is None or job.state not in ("queued", "running"):
            return
        if job.state == "queued" and run.file("STOP").exists():
            cancel([run.path])
            run.file("STOP").unlink(missing_ok=True)
        stop.wait(5 if "job" in read(run.path) else 0.5)


if __name__ == "__main__":  # for slurm.sh: start or requeue, and a run folder
    sys.exit({"start": start, "requeue": requeue}[sys.argv[1]](Path(sys.argv[2])))
