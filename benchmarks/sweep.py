"""Wall time of a sweep of nine runs over that of nine `workbench train` calls.

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
    """Prints both times and their ratio."""
    params, epochs = "params/digits_baseline.yaml", (sys.argv[1:] or ["2"])[0]
    with tempfile.TemporaryDirectory() as folder:
        common = ["-p", f"epochs={epochs}", "-p", f"runs_dir={folder}"]
        seconds("train", params, *common, "-p", "name=warm")  # the data are verified once
        swept = seconds("sweep", params, "lr=0.03,0.1,0.3", "seed=0-2", *common)
        alone = sum(
            seconds(
                "train", params, *common, "-p", f"name=lr{lr}", "-p", f"lr={lr}", "-p", f"seed={k}"
            )
            for lr in (0.03, 0.1, 0.3)
            for k in range(3)
        )
    print(f"sweep {swept:.1f} s, nine trainings {alone:.1f} s, ratio {swept / alone:.2f}")


if __name__ == "__main__":
    main()
