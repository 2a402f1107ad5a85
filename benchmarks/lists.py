"""Time and peak memory of opening a list of a million entries, as text and as JSON lines.

python benchmarks/lists.py [--entries 1000000] [--rounds 3] [--old CHECKOUT]

Every figure comes from a process of its own, and is the best of the rounds. With --old the code of
another checkout takes turns with this one. Memory is what the peak of the process grows by.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def write(folder: Path, entries: int) -> None:
    """The same entries in both formats, named as ImageNet's files, in 1,000 classes."""
    rows = [(f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG", i % 1000) for i in range(entries)]
    (folder / "text.txt").write_text("".join(f"{file} {label}\n" for file, label in rows))
    lines = (json.dumps({"filename": file, "label": label}) for file, label in rows)
    (folder / "json.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "val.txt").write_text("".join(f"{i}.JPEG {i}\n" for i in range(1000)))


def measure(folder: Path, kind: str) -> None:
    """Opens one list, and prints seconds, MiB and the number of entries as JSON."""
    import resource
    import time

    from workbench import data
    from workbench.recipe import Recipe

    lists = {"train_list": f"{kind}.txt", "train_root": ".", "val_list": "val.txt", "val_root": "."}
    recipe = Recipe(dataset="files", data_dir=str(folder), **lists)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, start = peak(), time.perf_counter()
    content = data.load_dataset(recipe)
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, peak() - before, len(content.train)]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--entries", type=int, default=1_000_000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--old", type=Path, help="another checkout to measure beside this one")
    options.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.measure:
        measure(Path(chosen.measure[0]), chosen.measure[1])
        return
    places = {"old": chosen.old, "new": HERE} if chosen.old else {"new": HERE}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), chosen.entries)
        for kind in ("text", "json"):
            seen = {name: [] for name in places}
            for _ in range(chosen.rounds):
                for name, place in places.items():
                    command = [sys.executable, __file__, "--measure", folder, kind]
                    environment = {**os.environ, "PYTHONPATH": str(place.resolve())}
                    done = subprocess.run(
                        command, env=environment, check=True, capture_output=True, text=True
                    )
                    seen[name].append(json.loads(done.stdout))
            for name, figures in seen.items():
                seconds, memory = min(f[0] for f in figures), min(f[1] for f in figures)
                print(f"{kind}, {name}: {seconds:.2f} s, {memory:.0f} MiB", flush=True)
            if chosen.old:
                time, memory = (
                    min(f[i] for f in seen["old"]) / min(f[i] for f in seen["new"]) for i in (0, 1)
                )
                print(f"{kind}: {time:.1f} times as fast, {1 / memory:.2f} of the memory")


if __name__ == "__main__":
    main()
