"""Wall time of a sweep of nine runs over that of nine `workbench train` calls; the claim is 0.6.

python benchmarks/sweep.py [EPOCHS]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def seconds(*words: str) -> float:
    """How long a command takes."""
    start = time.monotonic()
    command = [sys.executable, "-m", "workbench", *words]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def main() -> None:
    """Prints the times and their ratios; exit code 1 if the smaller ratio is above 0.6."""
    params, epochs = "params/digits_baseline.yaml", (sys.argv[1:] or ["2"])[0]
    with tempfile.TemporaryDirectory() as folder:
        common = [params, "-p", f"epochs={epochs}", "-p", f"runs_dir={folder}"]
        seconds("train", *common, "-p", "name=warm")  # the data are verified once
        alone = sum(
            seconds("train", *common, "-p", f"name=lr{lr}", "-p", f"lr={lr}", "-p", f"seed={seed}")
            for lr in (0.03, 0.1, 0.3)
            for seed in range(3)
        )
        print(f"nine trainings {alone:.1f} s")
        ratios = []
        for jobs in ("1", "2"):
            words = "lr=0.03,0.1,0.3", "seed=0-2", "-p", f"name=jobs{jobs}", "--jobs", jobs
            swept = seconds("sweep", *common, *words)
            ratios.append(swept / alone)
            print(f"sweep, --jobs {jobs}: {swept:.1f} s, ratio {ratios[-1]:.2f}")
    sys.exit(int(min(ratios) > 0.6))


if __name__ == "__main__":
    main()
