"""Progress for whoever looks: a bar where someone watches, a line a minute where nobody does."""

import os
import sys
import time

import psutil
from IPython import get_ipython
from tqdm.auto import tqdm


def watched() -> str:
    """Who looks: "jupyter", "terminal", or "batch" (papermill, a pipe, a batch queue)."""
    if hasattr(get_ipython(), "kernel"):
        # papermill and nbconvert start the kernel themselves; JupyterLab's parent is its server.
        starters = [" ".join(p.cmdline()[:4]) for p in psutil.Process().parents()[:2]]
        words = ("papermill", "nbconvert", "workbench notebook")
        return "batch" if any(w in s for s in starters for w in words) else "jupyter"
    return "terminal" if sys.stderr.isatty() else "batch"


def is_voila() -> bool:
    """Whether Voila shows this notebook as a page: whoever looks may not be who started it."""
    return os.environ.get("SERVER_SOFTWARE", "").startswith("voila")


class Lines:
    """The part of tqdm that is used here, as one flushed line a minute with the time left."""

    def __init__(self, total: int, desc: str, unit: str):
        self.total, self.desc, self.unit, self.n = total, desc, unit, 0
        self.start = self.said = time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        """Counts; speaks when a minute has passed since it last did."""
        self.n += count
        now = time.monotonic()
        if now - self.said > 60:
            self.said = now
            left = (now - self.start) / self.n * (self.total - self.n) / 60
            count, total = f"{self.n:,}", f"{self.total:,} {self.unit}"
            print(f"{self.desc}: {count} of {total}, about {left:.0f} min left", flush=True)


def bar(total: int, desc: str, unit: str) -> "tqdm | Lines":
    """A bar that appears after two seconds, or lines; a context with update(count)."""
    if watched() == "batch":
        return Lines(total, desc, unit)
    return tqdm(total=total, desc=desc, unit=unit, delay=2)
