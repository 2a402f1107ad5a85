"""What a teacher brings on the embedded digits: students with and without it, the same budget.

    python benchmarks/distillation.py [--seeds 5]

Claim: over 5 seeds the mean of the distilled students is no lower than that of the students alone.
Printed are top-1 of both as mean and standard deviation, the gain, and a paired t-test over seeds
(a seed's two students see the same images in the same order). The teacher is
params/digits_teacher.yaml, the student params/digits_distillation.yaml; a few minutes on a CPU.
"""

import argparse
import os
import tempfile
from pathlib import Path


def main() -> None:
    """Trains all students; exits with an error where the claim does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WORKBENCH_CACHE"] = folder  # before the import, which reads it once
        _run(Path(folder), options.seeds)


def _run(folder: Path, seeds: int) -> None:
    import numpy as np
    from scipy import stats

    from workbench import ROOT, distillation, runs, training
    from workbench.recipe import Recipe

    def top1(recipe: Recipe) -> float:
        run = runs.Run(recipe.folder)
        for _ in training.fit(recipe, run):
            pass
        return float(run.metrics().top1.iloc[-1])

    shared = {"runs_dir": str(folder / "runs")}
    teacher = Recipe.from_yaml(ROOT / "params" / "digits_teacher.yaml", **shared)
    print(f"teacher: {top1(teacher):.2f} %", flush=True)
    student = Recipe.from_yaml(ROOT / "params" / "digits_distillation.yaml", **shared)
    student = student.replace(teacher=[str(teacher.folder)])
    alone, taught = [], []
    for seed in range(seeds):
        one = student.replace(seed=seed)
        alone.append(top1(distillation.without_teacher(one)))
        taught.append(top1(one))
        print(f"seed {seed}: alone {alone[-1]:.2f} %, distilled {taught[-1]:.2f} %", flush=True)
    for name, values in (("alone", alone), ("distilled", taught)):
        print(f"{name}: {np.mean(values):.2f} +- {np.std(values, ddof=1):.2f} %, {seeds} seeds")
    gain = float(np.mean(taught) - np.mean(alone))
    p = float(stats.ttest_rel(taught, alone).pvalue)
    print(f"gain {gain:+.2f} points, paired t-test p {p:.2g}")
    if gain < 0:
        raise SystemExit("the claim does not hold")


if __name__ == "__main__":
    main()
