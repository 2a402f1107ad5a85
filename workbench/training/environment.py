"""Device, precision and loader processes of a training, and the record of where it ran."""

import hashlib
import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision

from workbench import ROOT, __version__, data
from workbench.recipe import Recipe
from workbench.schedule import TrainingError


def pick_device(name: str) -> torch.device:
    """The torch device for a recipe's `device`; under torchrun each process has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError("device is cuda, but torch finds no GPU; set device: auto or cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if name == "mps" and not torch.backends.mps.is_available():
        raise TrainingError("device is mps, but torch finds none; set device: auto or cpu")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16: `auto` takes bf16 where the processor computes in it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return "bf16" if any(getattr(torch.cpu, p, bool)() for p in probes) else "fp32"
    return "fp32"


def pick_workers(workers: int | None, world: int = 1) -> int:
    """Loader processes for one of `world` training processes on this machine."""
    return workers if workers is not None else max(1, min(8, data.available_cpus() // world))


def check_compiler(recipe: Recipe) -> None:
    """Raises TrainingError where `compile` finds no compiler: C++ on a CPU, C on a GPU."""
    names = [os.environ.get("CXX", "g++"), os.environ.get("CC", "gcc"), "clang"]
    if pick_device(recipe.device).type == "cpu":
        names = names[:1]
    if recipe.compile and not any(map(shutil.which, names)):
        raise TrainingError(
            f"compile: torch.compile needs a C++ compiler and found no {names[0]}; install one, "
            "name it in the environment variable CXX, or set compile to false"
        )


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, commit and device; nothing that would name a user."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "workbench": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "platform": platform.platform(terse=True),
        "device": name,
    }


def processor() -> str:
    """The name of this machine's CPU, and the number of cores."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {data.available_cpus()} cores"


def _commit() -> str:
    """The checkout's commit, with "+changes" if files differ from it; empty outside of git."""
    git = ["git", "-C", str(ROOT)]
    run = lambda *words: subprocess.run(
        [*git, *words], capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()
    try:
        changes = run("status", "--porcelain", "-uno")
        return run("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def code_digest() -> str:
    """Twelve hex digits over the code that decides what a teacher is shown."""
    folders = (
        Path(__file__).parents[1] / name for name in ("augmentation", "data", "distillation")
    )
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def usage(device: torch.device, seconds: float) -> dict[str, Any]:
    """Seconds of training and peak memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {
        "seconds": round(seconds, 3),
        "peak_memory_mb": round(peak / (1024 if platform.system() == "Linux" else 1024**2)),
    }
    if device.type == "cuda":
        found["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    return found
