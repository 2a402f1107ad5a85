"""Progress of long tasks: a bar in Jupyter and terminals, a line a minute in batch jobs."""

import contextlib
import os
import sys
import time

import psutil
from IPython import get_ipython
from tqdm.auto import tqdm


def watched() -> str:
    """Where output goes: "jupyter", "terminal" or "batch" (papermill, a pipe, a batch queue)."""
    if hasattr(get_ipython(), "kernel"):
        # papermill and nbconvert start the kernel themselves, JupyterLab's server does otherwise.
        parents = [" ".join(p.cmdline()[:4]) for p in psutil.Process().parents()[:2]]
        words = ("papermill", "nbconvert", "workbench notebook")
        return "batch" if any(w in s for s in parents for w in words) else "jupyter"
    return "terminal" if sys.stderr.isatty() else "batch"


def is_voila() -> bool:
    """Whether Voila shows this notebook as a page to others."""
    return os.environ.get("SERVER_SOFTWARE", "").startswith("voila")


class Lines:
    """Prints a line a minute with the time left; has the part of tqdm that is used here."""

    def __init__(self, total: int, desc: str, unit: str):
        self.total, self.desc, self.unit, self.n = total, desc, unit, 0
        self.start = self.printed_at = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.n += count
        now = time.monotonic()
        if now - self.printed_at > 60:
            self.printed_at = now
            left = (now - self.start) / self.n * (self.total - self.n) / 60
            count, total = f"{self.n:,}", f"{self.total:,} {self.unit}"
            print(f"{self.desc}: {count} of {total}, about {left:.0f} min left", flush=True)


def bar(total: int, desc: str, unit: str) -> contextlib.AbstractContextManager:
    """A context with update(count): a bar that appears after two seconds, or Lines."""
    if watched() == "batch":
        return contextlib.nullcontext(Lines(total, desc, unit))
    return tqdm(total=total, desc=desc, unit=unit, delay=2)
