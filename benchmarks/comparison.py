"""How long a comparison takes to open, and a slider of it to draw.

    python benchmarks/comparison.py [--rounds 5]

Claims: 20 runs (4 recipes, 5 seeds) with 10,000 predictions each are found, compared and tabled
within 2 s; moving the smoothing of their curves gives a new picture within 300 ms; medians. The
runs are made up, in the files and of the sizes that training leaves; imports do not count.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

OPENS, DRAWS = 2.0, 0.3  # seconds


def main() -> None:
    """Prints both medians; exits with an error where a claim does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder))
        _run(Path(folder), options.rounds)


def _make(root: Path, pictures: int = 10_000, classes: int = 100) -> None:
    import numpy as np
    import pandas as pd

    from workbench.recipe import Recipe

    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, pictures)
    for i in range(20):
        recipe = Recipe(name=f"recipe{i // 5}", seed=i % 5, lr=0.1 + 0.01 * (i // 5))
        path = root / f"{recipe.name}-seed{recipe.seed}"
        path.mkdir()
        recipe.write(path / "recipe.yaml")
        right = rng.random(pictures) < 0.8
        frame = pd.DataFrame({"weights": "raw", "file": [f"{n:05d}.jpg" for n in range(pictures)]})
        frame["list"], frame["row"], frame["label"] = 0, np.arange(pictures), label
        for k in range(5):
            frame[f"class{k + 1}"] = ((label + k + ~right) % classes).astype(np.int32)
            frame[f"p{k + 1}"] = rng.uniform(0, 1, pictures).astype(np.float32)
        frame["p_label"] = frame["loss"] = frame.p1
        frame.to_parquet(path / "predictions.parquet", index=False)
        known = {"classes": [str(c) for c in range(classes)], "val_data": "v", "seconds": 60.0}
        (path / "environment.json").write_text(json.dumps(known))
        (path / "status.json").write_text(json.dumps({"state": "finished"}))
        epochs = pd.DataFrame({"epoch": range(1, 101), "step": range(100, 10_100, 100)})
        epochs.assign(top1=rng.uniform(50, 80, 100)).to_csv(path / "metrics.csv", index=False)
        steps = pd.DataFrame({"step": range(10, 10_010, 10), "seconds": range(1000)})
        steps.assign(loss=rng.uniform(0, 5, 1000), images_per_second=400.0).to_csv(
            path / "steps.csv", index=False
        )


def _run(root: Path, rounds: int) -> None:
    import ipywidgets

    from workbench import comparison, plots, widgets

    def opened() -> widgets.Picker:
        picker = widgets.Picker(root)
        assert len(picker.found.table) == 4 and len(picker.found.sentences()) == 3
        return picker

    picker = opened()  # the first one warms up
    smoothing = ipywidgets.FloatSlider(value=0, min=0, max=0.95, step=0.05)
    draw = lambda found, smoothing: plots.overlay(
        comparison.curves(found.groups, "loss by step"), "epoch", "loss (nats)", smoothing
    )
    view = widgets.Explorer(draw, picker, smoothing=smoothing)
    before = view._image.value

    def moved() -> None:
        nonlocal before
        smoothing.value = 0.5 if smoothing.value != 0.5 else 0.9
        assert view._image.value != before
        before = view._image.value

    opens, draws = _median(opened, rounds), _median(moved, rounds)
    print(f"20 runs of 10,000 predictions open in {opens:.2f} s, claim {OPENS}")
    print(f"a slider of their 20 curves draws in {1000 * draws:.0f} ms, claim {1000 * DRAWS:.0f}")
    if opens > OPENS or draws > DRAWS:
        raise SystemExit("a claim does not hold")


def _median(work: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
