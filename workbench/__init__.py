"""United Perception's classification recipes as notebooks, overnight runs, fair comparisons."""

import os
from pathlib import Path

__version__ = "0.1.0"

# Before torch loads its OpenMP: threads that wait spinning take the cores from other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
