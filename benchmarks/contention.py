"""Two trainings at once on one CPU, and one alone: as workbench sets OpenMP, and as it begins.

The latter has a thread for each core, and threads that wait spin.

    python benchmarks/contention.py [--rounds 3] [--epochs 6]

Images per second of each training of digits_baseline, from the last rows of its steps.csv; the
settings take turns, medians over rounds. Other work on the machine is in the figures.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent.parent
SETTINGS = ("as workbench sets it", "as OpenMP begins")


def trainings(count: int, setting: str, folder: Path, epochs: int) -> list[float]:
    """Images per second of `count` trainings that run at the same time."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    env |= {"PYTHONPATH": str(HERE)}
    code = "from workbench.__main__ import main; main()"
    if setting == "as OpenMP begins":  # torch loads it before workbench could set anything
        code = f"import torch; {code}"
        env["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    words = ["train", str(HERE / "params/digits_baseline.yaml"), "-p", f"epochs={epochs}"]
    words += ["-p", "precision=fp32", "-p", "log_every=5", "-p", f"runs_dir={folder}"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words, "-p", f"name=t{i}"],
            env=env,
            stdout=subprocess.DEVNULL,
        )
        for i in range(count)
    ]
    if any(process.wait() for process in started):
        raise SystemExit("a training failed")
    rates = []
    for i in range(count):
        rows = pd.read_csv(folder / f"t{i}-seed0" / "steps.csv")
        rates.append(float(rows.images_per_second.tail(len(rows) // 2).median()))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    seen: dict[tuple[int, str], list[float]] = {}
    for _ in range(options.rounds):
        for count in (1, 2):
            for name in SETTINGS:
                with tempfile.TemporaryDirectory() as folder:
                    rates = trainings(count, name, Path(folder), options.epochs)
                seen.setdefault((count, name), []).append(sum(rates) / count)
                print(count, name, [round(rate) for rate in rates], flush=True)
    for (count, name), rates in seen.items():
        print(f"{count} at once, {name}: {statistics.median(rates):,.0f} img/s each")


if __name__ == "__main__":
    main()
