"""User CPU seconds of the commands that need no network, beside another checkout.

    python benchmarks/startup.py [--old CHECKOUT] [--rounds 5]

Turns in one run; medians. Each command runs as a process of its own, in each checkout.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "tests"))
from conftest import run_folder  # noqa: E402

SIZES = ["--images", "1281167", "--classes", "1000"]


def commands(folder: Path) -> dict[str, list[str]]:
    """The commands by what the table calls them; `options` was once called `options`."""
    found = [run_folder(folder, name, lr=lr) for name, lr in (("one", 0.1), ("two", 0.3))]
    params = "params/resnet50_a3_100e.yaml"
    return {
        "--help": ["--help"],
        "options": ["options"],
        "runs": ["runs", str(folder)],
        "doctor, sizes given": ["doctor", params, *SIZES],
        "doctor, no data": ["doctor", params],
        "compare, two runs": ["compare", *map(str, found)],
    }


def user_seconds(checkout: Path, words: list[str]) -> float:
    """User CPU seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(
        [sys.executable, "-m", "workbench", *words],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, help="another checkout to measure beside this one")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    checkouts = {"now": HERE} | ({"old": options.old.resolve()} if options.old else {})
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for name, words in commands(Path(folder)).items():
            seconds = {key: [] for key in checkouts}
            for _ in range(options.rounds):
                for key, checkout in checkouts.items():
                    seconds[key].append(user_seconds(checkout, words))
            rows[name] = {key: round(statistics.median(s), 2) for key, s in seconds.items()}
    print(pd.DataFrame(rows).T.to_string())
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
