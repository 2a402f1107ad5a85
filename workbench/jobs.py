"""The job of a run: job.json in its folder, and what the queue says about it.

`workbench submit` creates job.json: `job` and `index` of an array of Slurm, or `host`, `process`
and `started` of a process. A job adds `node`, `requeues`, `step` at its start and `stalled`, a
process `worker` and `worker_started`. A file CANCEL beside it says: do not start it.
"""

import contextlib
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
# "12|3|PENDING||0|Priority|/data/runs/small-sweep/job-1.sh|"
FORMAT = "ArrayJobID:|,ArrayTaskID:|,State:|,NodeList:|,RestartCnt:|,Reason:|,Command:|"
QUEUED = "PENDING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT".split()
RUNNING = "RUNNING CONFIGURING POWER_UP_NODE RESIZING SIGNALING STOPPED SUSPENDED".split()
LIVE = ("queued", "running", "unknown")  # states of a run that another job must not train


class Job(NamedTuple):
    """The job of a run; `state` is queued, running, cancelled, ended, or "" or "unknown"."""

    name: str  # "job 12_3", "process 47 on host"
    state: str  # "": it has started, and the lock says more; "unknown": also whether it has started
    node: str | None = None
    requeues: int = 0
    reason: str = ""  # why it is queued, in Slurm's words


def read(path: Path) -> dict[str, Any]:
    """job.json of a run folder; empty if there is none, or it does not name a job."""
    try:
        job = dict(json.loads((path / "job.json").read_text()))
        if "job" in job:
            return job | {"job": str(int(job["job"])), "index": int(job["index"])}
        return job | {"host": str(job["host"]), "process": int(job["process"])}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def write(path: Path, **values: Any) -> None:
    """Replaces values in job.json."""
    with atomic_write(path / "job.json") as temporary:
        temporary.write_text(json.dumps(read(path) | values, indent=2) + "\n")


def of_runs(paths: Iterable[Path]) -> dict[Path, Job]:
    """The jobs of runs that are not finished, from one squeue; read a run's state after that."""
    found = {p: job for p in paths if (job := read(p)) and Run(p).status()["state"] != "finished"}
    queue = _queue({job["job"] for job in found.values() if "job" in job})
    return {path: _job(path, job, queue) for path, job in found.items()}


def _slurm(*command: str, timeout: int = 10) -> subprocess.CompletedProcess | None:
    """A command without the user's defaults, such as SQUEUE_STATES; None if it does not answer."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SCANCEL_"))}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
    return None


def _queue(jobs: set[str]) -> dict[tuple, list[str]] | None:
    """State, nodes, requeues and reason by job, array index and folder of the job script.

    None if squeue cannot say. The folder tells jobs of the same number on other clusters apart.
    """
    if not jobs:
        return {}
    done = _slurm("squeue", "--noheader", "--array", "--Format", FORMAT, "--jobs", ",".join(jobs))
    if not done or (done.returncode and "Invalid job id" not in done.stderr):  # it ended long ago
        return None
    rows = [row for line in done.stdout.splitlines() if len(row := line.split("|", 6)) == 7]
    return {(*row[:2], os.path.realpath(os.path.dirname(row[6]))): row[2:6] for row in rows}


def _job(path: Path, job: dict[str, Any], queue: dict[tuple, list[str]] | None) -> Job:
    cancelled, node, worker = (path / "CANCEL").exists(), job.get("node"), "worker" in job
    ended = "cancelled" if cancelled else "ended"
    state = ended if cancelled else "" if node or worker else "unknown"
    if "job" in job:
        name, requeues = f"job {job['job']}_{job['index']}", job.get("requeues", 0)
        if queue is None:
            return Job(name, state, node, requeues)
        keys = [(job["job"], str(job["index"]), os.path.realpath(p)) for p in (path, path.parent)]
        found = next((queue[key] for key in keys if key in queue), ["", node, str(requeues), ""])
        state = "queued" if found[0] in QUEUED else "running" if found[0] in RUNNING else ended
        return Job(name, state, found[1], int(found[2]) if found[2].isdecimal() else 0, found[3])
    if job["host"] == socket.gethostname():
        alive = is_alive(job, "worker" if worker else "process")
        state = "running" if worker and alive else "queued" if alive and not cancelled else ended
    return Job(f"process {job['process']} on {job['host']}", state, job["host"])


def is_alive(job: dict[str, Any], key: str) -> bool:
    """Whether "worker" or "process" has not ended; a later process of its number is another one."""
    since = job.get("worker_started" if key == "worker" else "started")
    return bool(since) and locks.started(job[key]) == since


def state(known: str, job: Job | None) -> str:
    """The state of a run with a job, from that of Run.status: also queued, cancelled or unknown."""
    if job is None or known in ("running", "finished"):
        return known
    if known == "new" and job.state in ("ended", ""):
        return "interrupted" if job.state else "unknown"
    live = job.state in LIVE or (job.state == "cancelled" and known != "failed")
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
    stalled = 0 if status["step"] > job.get("step", 0) else job.get("stalled", 0) + 1
    if (path / "CANCEL").exists() or "STOP file" in status["message"]:
        return f"{path} was stopped by a user; submit it again to resume it"
    if stalled >= STARTS:
        return f"{path} made no step in {stalled} starts; its time limit may be too short"
    requeues = job.get("requeues", 0) + 1
    write(path, stalled=stalled, node=None, step=status["step"], requeues=requeues)
    return None


def cancel(paths: Iterable[Path]) -> list[str]:
    """Cancels the jobs of runs; a sentence about each. Raises RunError if Slurm does not do it."""
    found, ids, said = of_runs(paths := [*paths]), {}, []
    unsure = [job.name for job in found.values() if job.state in ("", "unknown")]
    if names := [name for name in unsure if name.startswith("job ")]:
        why = "squeue does not answer, nothing was cancelled; try again where it does"
        raise RunError(f"{', '.join(names)}: {why}, or remove job.json if that cluster is gone")
    for path in paths:
        if path not in found or found[path].state not in ("", *LIVE):
            known = state(Run(path).status()["state"], found.get(path))
            said.append(f"{path} is {known}, nothing to cancel")
            continue
        (path / "CANCEL").touch()  # before job.json is read: the worker writes that, then looks
        if "job" in (job := read(path)):
            ids[f"{job['job']}_{job['index']}"] = path
        elif job["host"] != socket.gethostname():
            (path / "STOP").touch()
        elif "worker" in job and is_alive(job, "worker"):
            os.kill(job["worker"], signal.SIGTERM)
        said.append(f"{path}: cancelled, {found[path].name}")
    if ids and not ((done := _slurm("scancel", *ids, timeout=60)) and done.returncode == 0):
        for path in ids.values():
            (path / "CANCEL").unlink(missing_ok=True)
        why = done.stderr.strip() if done else "it does not answer"
        raise RunError(f"scancel {' '.join(ids)} failed: {why}")
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
        if stop.is_set() or job is None or job.state not in LIVE:
            return
        if job.state != "running" and run.file("STOP").exists():
            cancel([run.path])
            run.file("STOP").unlink(missing_ok=True)
        stop.wait(5 if "job" in read(run.path) else 0.5)


if __name__ == "__main__":  # for slurm.sh: start or requeue, and a run folder
    sys.exit({"start": start, "requeue": requeue}[sys.argv[1]](Path(sys.argv[2])))
