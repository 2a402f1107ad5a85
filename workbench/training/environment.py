"""environment.json: where, with which versions and on which data a training ran."""

import hashlib
import platform
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import timm
import torch
import torchvision

from workbench import ROOT, __version__, data, models
from workbench.data.shards import versions
from workbench.training.distributed import pick_precision
from workbench.training.state import TrainState


def environment(state: TrainState, dataset: data.Dataset) -> dict[str, Any]:
    """environment.json, but for start, teachers, seconds and memory; nothing that names a user."""
    recipe, dist, train, val = state.recipe, state.dist, dataset.train, dataset.val
    cuda = dist.device.type == "cuda"
    downscaled, key = None, "digest" if "digest" in train and "digest" in val else "path"
    if key == "digest" and recipe.train_resize:
        downscaled = int((train[["width", "height"]].min(axis=1) > recipe.train_resize).sum())
    # Of an index with millions of rows no path is looked up where the shards are others.
    apart = "index" in train.attrs and {*versions(train)}.isdisjoint(versions(val))
    return {
        "workbench": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "opencv": cv2.__version__,
        "simplejpeg": metadata.version("simplejpeg"),
        "platform": platform.platform(terse=True),
        "device": torch.cuda.get_device_name(dist.device) if cuda else processor(),
        "precision": pick_precision(recipe.precision, dist.device),
        "processes": dist.world,
        "distributed": torch.distributed.get_backend() if dist.group else None,
        "workers": state.meter.workers,
        "threads": torch.get_num_threads(),
        "parameters": models.parameters(state.model),
        "train_images": len(train),
        "val_images": len(val),
        "classes": dataset.classes,
        "data": data.fingerprint(dataset),
        "val_data": data.val_fingerprint(val),
        "shards": data.version_digests((train, val)),
        "recipe": recipe.fingerprint,
        "steps_per_epoch": state.steps_per_epoch,
        "downscaled": downscaled,
        "train_val_duplicates": 0 if apart else int(val[key].isin(train[key]).sum()),
        "val_repeats": int(val[key].duplicated().sum()),
        "failed_metrics": state.metrics.failed,  # the dict itself, which validation fills
        "skipped_files": data.describe_skipped(dataset.skipped),
        "empty_classes": [c for c, n in zip(dataset.classes, dataset.counts, strict=True) if not n],
    }


def processor() -> str:
    """The name of this machine's CPU, its cores, and the instructions of torch's kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {data.available_cpus()} cores, {capability}"


def _commit() -> str:
    """The checkout's commit, with "+changes" if files differ from it; empty outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--dirty=+changes"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def code_digest() -> str:
    """Twelve hex digits over the code that decides the inputs and outputs of a teacher."""
    root = Path(__file__).parents[1]
    files = [root / name for name in ("image_files.py", "models.py", "training/inputs.py")]
    folders = [root / name for name in ("augmentation", "data", "distillation")]
    files += sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory in MB: of this process since its start, of the GPU in this training."""
    unit = 1024 if platform.system() == "Linux" else 1024**2  # macOS counts bytes
    peak = {"peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)}
    if device.type == "cuda":
        peak["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    return peak
