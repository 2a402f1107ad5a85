"""United Perception's classification recipes as notebooks, overnight runs, fair comparisons."""

import os
import re
from pathlib import Path

__version__ = "0.1.0"

# Before torch loads its OpenMP: threads that wait spinning take the cores from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _read_srun() -> None:
    """Gives a process of an srun step with several tasks the variables that torchrun would give it.

    Those that are set win. A script of sbatch has SLURM_NTASKS and SLURM_PROCID too, but no step.
    """
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) == 1 or {"RANK", "WORLD_SIZE"} & {*env}:
        return
    found = {"RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"]}
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])  # 2(x3),1
    tasks = [count for count, times in runs for _ in range(int(times or 1))]
    found |= {
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[int(env["SLURM_NODEID"])],
    }
    hosts = re.match(r"(\[[^]]*\]|[^,])+", env["SLURM_STEP_NODELIST"])[0]  # n[1-2,7] of n[1-2,7],m
    found["MASTER_ADDR"] = re.sub(r"\[(\d+)[^]]*\]", r"\1", hosts)
    step = 100 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])
    found["MASTER_PORT"] = str(10_000 + step % 20_000)  # below those that Linux gives to clients
    os.environ.update(found | {key: env[key] for key in found if key in env})


_read_srun()


def _root() -> Path:
    """The folder relative paths start from: Jupyter and papermill begin in different ones."""
    if chosen := os.environ.get("WORKBENCH_ROOT"):
        return Path(chosen).expanduser().resolve()
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "params").is_dir() else Path.cwd()


ROOT = _root()
CACHE = Path(
    os.environ.get("WORKBENCH_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "workbench"
)


def from_root(path: Path) -> str:
    """A path as commands take it in the root folder."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "1,200 images", "2 classes"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")
