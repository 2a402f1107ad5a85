"""What a kept teacher saves: a distillation that reads its answers beside one that asks.

    python benchmarks/teacher_cache.py [--device cuda] [--rounds 3]

Claim: where the teacher dominates a step (here ResNet-34 at 64 pixels beside a tiny student at 32),
reading gives at least 1.5 times the speed, and the same student bit for bit. The embedded digits;
in every round one training asks, then one reads what the first round kept.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

CLAIM = 1.5


def main() -> None:
    """Prints seconds of both and the ratio; exits with an error where the claim does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WORKBENCH_CACHE"] = folder  # before the import, which reads it once
        _run(Path(folder), options)


def _run(folder: Path, options: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from workbench import models, runs, training
    from workbench.recipe import Recipe

    save_file(models.create("resnet34", 10).state_dict(), folder / "teacher.safetensors")
    shared = {
        "teacher": str(folder / "teacher.safetensors"),
        "teacher_model": "resnet34",
        "teacher_image_size": 64,
        "kd_loss": "kl",
        "temperature": 4.0,
        "crop_scale": [0.5, 1.0],
        "epochs": 1,
        "workers": 0,
        "device": options.device,
        "runs_dir": str(folder / "runs"),
    }

    def train(name: str, **recipe_options) -> tuple[float, bytes, float]:
        recipe = Recipe(name=name, **shared, **recipe_options)
        run = runs.Run(recipe.folder)
        start = time.perf_counter()
        for _ in training.fit(recipe, run):
            pass
        whole = time.perf_counter() - start
        # Training time alone: both start, validate and write the same.
        return run.steps().seconds.iloc[-1], run.file("metrics.csv").read_bytes(), whole

    train("first", cache_teacher_logits=True)
    asked, read, ends = [], [], set()
    for i in range(options.rounds):
        for times, recipe_options in ((asked, {}), (read, {"cache_teacher_logits": True})):
            seconds, metrics, whole = train(
                f"{len(times)}{bool(recipe_options)}{i}", **recipe_options
            )
            times.append((seconds, whole))
            ends.add(metrics)
    ratios = [a[0] / r[0] for a, r in zip(asked, read, strict=True)]
    wholes = [a[1] / r[1] for a, r in zip(asked, read, strict=True)]
    ratio = statistics.median(ratios)
    print(f"asking {statistics.median(a[0] for a in asked):.2f} s, ", end="")
    print(f"reading {statistics.median(r[0] for r in read):.2f} s of training, {options.device}")
    print(
        f"speed ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), claim {CLAIM}; ", end=""
    )
    print(f"with start and validation {statistics.median(wholes):.2f}")
    same = len(ends) == 1
    print(f"the same metrics to the last digit: {same}")
    if ratio < CLAIM or (options.device == "cpu" and not same):
        raise SystemExit("the claim does not hold")


if __name__ == "__main__":
    main()
