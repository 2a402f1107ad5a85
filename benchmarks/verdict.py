"""How often the verdict of a comparison is wrong, and what it finds: 10,000 simulated comparisons.

    python benchmarks/verdict.py [--comparisons 1000] [--out table.md]

A recipe has a probability to classify an image correctly. It depends on the difficulty of the image
(a beta distribution, mean 0.8), on an interaction of recipe and image (normal, in logits) and on
the seed (all images shifted together, by `sd` points of top-1). Images are drawn for each
comparison and shared by its runs, so that a true difference is one over all images and all seeds.
Seeds of sd 1.0 are beyond the prior of `statistics.VarianceComponents`: shown, not claimed.

Columns: type I error without a difference; coverage of the 95 % interval where there is one; power
for a difference of 3 standard errors of one run against one, the same for all numbers of runs; and
power for 3 standard errors of the difference of just these runs, of which no test of level 5 %
that treats both signs alike finds more than 85.1 %, not even with known variances. `old` is what
commit 62fdd70 computed: Welch's t on the variance between runs.

Claims, for sd 0, 0.1 and 0.3: type I error at most 6 %, coverage at least 94 %, p never 0, no
interval of width 0 or outside -100 to 100; power at least 80 % with 2 + 2 runs and 95 % with 3 + 3.
Some 45 minutes of one core beside other work.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from scipy import special, stats

from workbench.evaluation import statistics

SIZES, SEED_SDS = (500, 2000, 10_000), (0.0, 0.1, 0.3, 1.0)
RUNS = ((2, 1), (2, 2), (3, 1), (3, 3), (5, 5))
POWER = {(2, 2): 0.8, (3, 3): 0.95}
BATCH = 100


def population(levels: int = 20, kinds: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of both recipes by kind of image, and the share of the images that is of the kind."""
    p = stats.beta(1.2, 0.3).ppf((np.arange(levels) + 0.5) / levels).clip(1e-4, 1 - 1e-4)
    x, share = np.polynomial.hermite_e.hermegauss(kinds)
    a = np.repeat(special.logit(p), kinds)
    return a, a + np.tile(1.2 * x, levels), np.tile(share / share.sum(), levels) / levels


A, B, SHARE = population()


def mean(logit: np.ndarray) -> float:
    """Top-1 in points."""
    return 100 * float(SHARE @ special.expit(logit))


def shifted(points: float) -> np.ndarray:
    """Logits of the second recipe where it is better than the first by so many points."""
    low, high = -10.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(B + middle) - mean(A) < points else (low, middle)
    return B + low


def variances(b: np.ndarray) -> tuple[float, float, float]:
    """Per-image variances of a run of each recipe and that of the interaction, points^2, n = 1."""
    one = lambda logit: 1e4 * float(SHARE @ (special.expit(logit) * special.expit(-logit)))
    gap = special.expit(b) - special.expit(A)
    return one(A), one(b), 1e4 * float(SHARE @ gap**2 - (SHARE @ gap) ** 2)


def standard_error(n: int, sd: float, runs: tuple[int, int]) -> float:
    """The true one of the difference, in points, where there is none."""
    a, b, both = variances(shifted(0.0))
    return float(np.sqrt((a / n + sd**2) / runs[0] + (b / n + sd**2) / runs[1] + both / n))


def answers(runs: int) -> np.ndarray:
    """Every pattern of correct and incorrect that runs give to an image, (runs, patterns)."""
    return np.array(list(itertools.product((False, True), repeat=runs))).T


def pattern_shares(rng, logit: np.ndarray, runs: int, sd: float, size: int) -> np.ndarray:
    """The probability of each pattern by kind of image, (size, kinds, patterns)."""
    slope = 100 * float(SHARE @ (special.expit(logit) * special.expit(-logit)))
    found = np.ones((size, len(logit), 1))
    for _ in range(runs):
        p = special.expit(logit + rng.normal(0, sd / slope, (size, 1)))[:, :, None]
        found = (found[..., None] * np.stack([1 - p, p], -1)).reshape(size, len(logit), -1)
    return found


def drawn(rng, n: int, runs: tuple[int, int], sd: float, b: np.ndarray, size: int) -> np.ndarray:
    """How many of n images have each pattern of both recipes, (size, patterns of a, of b)."""
    ours = pattern_shares(rng, A, runs[0], sd, size) * SHARE[:, None]
    joint = ours.swapaxes(1, 2) @ pattern_shares(rng, b, runs[1], sd, size)
    flat = joint.reshape(size, -1)
    return rng.multinomial(n, flat / flat.sum(1, keepdims=True)).reshape(joint.shape)


def old_method(counts: np.ndarray, runs: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Points, standard errors and degrees of freedom of commit 62fdd70, by comparison."""
    n, sides, luck, between = counts[0].sum(), [], [], []
    for k, axis in ((runs[0], 2), (runs[1], 1)):
        right, its = answers(k).astype(float), counts.sum(axis)
        share = right.mean(0)
        top1 = 100 * its @ right.T / n
        sides.append(top1.mean(1))
        if k > 1:
            between.append(top1.var(1, ddof=1))
            luck.append(1e4 * its @ (share * (1 - share)) / n * k / (k - 1))
    gap = answers(runs[1]).mean(0)[None] - answers(runs[0]).mean(0)[:, None]
    first, second = ((counts * gap**power).sum((1, 2)) / n for power in (1, 2))
    whole = 1e4 * (second - first**2) * n / (n - 1)
    images = np.maximum(0, whole - luck[0] / runs[0] - luck[-1] / runs[1]) / n
    if min(runs) > 1:
        parts = [(v / k, k - 1) for v, k in zip(between, runs, strict=True)]
    else:
        parts = [(between[0] * (1 / runs[0] + 1 / runs[1]), sum(runs) - 2)]
    variance = images + sum(v for v, _ in parts)
    if min(runs) > 2:
        parts.append((images, n - 1))
    weights = sum(v**2 / df for v, df in parts)
    df = np.where(weights > 0, sum(v for v, _ in parts) ** 2 / np.maximum(weights, 1e-300), 1.0)
    return sides[1] - sides[0], np.sqrt(variance), df


def cell(rng, n: int, runs: tuple[int, int], sd: float, points: float, comparisons: int) -> dict:
    """Shares of comparisons, new and old: with p below 5 %, whose interval holds the truth."""
    b, a_right, b_right = shifted(points), answers(runs[0]), answers(runs[1])
    a_all, b_all = np.repeat(a_right, b_right.shape[1], 1), np.tile(b_right, a_right.shape[1])
    found = {
        "found": 0,
        "covered": 0,
        "old found": 0,
        "old covered": 0,
        "broken": 0,
        "old broken": 0,
    }
    for _ in range(comparisons // BATCH):
        counts = drawn(rng, n, runs, sd, b, BATCH)
        for flat in counts.reshape(BATCH, -1):
            seen = flat > 0
            d = statistics.difference(a_all[:, seen], b_all[:, seen], counts=flat[seen])
            found["found"] += d.adjusted < 0.05
            found["covered"] += d.low <= points <= d.high
            sound = 0 < d.p <= 1 and -100 <= d.low < d.high <= 100
            found["broken"] += not sound or (d.low <= 0 <= d.high) == (d.adjusted < 0.05)
        gap, error, df = old_method(counts, runs)
        half = error * stats.t.ppf(0.975, df)
        found["old found"] += int((np.abs(gap) > half).sum())
        found["old covered"] += int((np.abs(gap - points) <= half).sum())
        found["old broken"] += int((error == 0).sum())
    return {name: count / (comparisons // BATCH * BATCH) for name, count in found.items()}


def judge(n: int, sd: float, runs: tuple[int, int], comparisons: int) -> tuple[str, list[str]]:
    """A row of the table, and the claims that do not hold."""
    rng = np.random.default_rng([n, round(10 * sd), *runs])
    one, these = standard_error(n, sd, (1, 1)), standard_error(n, sd, runs)
    null = cell(rng, n, runs, sd, 0.0, comparisons)
    shift = cell(rng, n, runs, sd, 3 * one, comparisons)
    same = cell(rng, n, runs, sd, 3 * these, max(BATCH, comparisons // 10))
    failed = []
    if sd < 1:
        failed += [f"type I {null['found']:.3f}"] * (null["found"] > 0.06)
        failed += [f"coverage {shift['covered']:.3f}"] * (
            min(shift["covered"], null["covered"]) < 0.94
        )
        failed += [f"power {shift['found']:.3f}"] * (shift["found"] < POWER.get(runs, 0))
    broken = null["broken"] + shift["broken"] + same["broken"]
    failed += [f"broken {broken:.4f}"] * (broken > 0)
    of = lambda name: f"{100 * name:.1f}"
    row = [f"{n:,}", sd, f"{runs[0]} + {runs[1]}"]
    for which in ("", "old "):
        row += [of(null[f"{which}found"]), of(shift[f"{which}covered"]), of(shift[f"{which}found"])]
        row += [of(same[f"{which}found"])]
    row += [of(null["old broken"]), "; ".join(failed)]
    return "| " + " | ".join(map(str, row)) + " |", failed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comparisons", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="append the rows to this file, too")
    parser.add_argument("--sd", type=float, nargs="*", default=SEED_SDS)
    parser.add_argument("--images", type=int, nargs="*", default=SIZES)
    asked = parser.parse_args()
    columns = "type I", "coverage", "power", "power, 3 SE of these runs"
    head = ["images", "seeds' sd", "runs", *columns, *(f"old: {c}" for c in columns)]
    head += ["old: width 0", "claim missed"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    print(*lines, sep="\n", flush=True)
    failures = 0
    for n, sd, runs in itertools.product(asked.images, asked.sd, RUNS):
        row, failed = judge(n, sd, runs, asked.comparisons)
        failures += bool(failed)
        lines.append(row)
        print(row, flush=True)
        if asked.out:
            asked.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
