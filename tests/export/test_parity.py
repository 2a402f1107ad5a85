"""The parity report counts what a plain loop counts."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from workbench import data, export
from workbench.evaluation import statistics
from workbench.export import parity
from workbench.export.onnx import Network
from workbench.recipe import Recipe


def batches_of(label: np.ndarray, size: int = 7) -> list[data.Batch]:
    """Batches of images whose first pixel is the row."""
    found = []
    for start in range(0, len(label), size):
        rows = torch.arange(start, min(start + size, len(label)))
        images = torch.zeros(len(rows), 3, 8, 8, dtype=torch.uint8)
        images[:, 0, 0, 0] = rows
        labels = torch.from_numpy(label[start : start + size])
        found.append(data.Batch(images, labels, rows, rows, 0, True, len(rows), []))
    return found


def lookup(logits: np.ndarray):
    rows = lambda images: images[:, 0, 0, 0].numpy().astype(int) % len(logits)
    return lambda images: logits[rows(images)].astype(np.float32)


def test_flips_ties_and_differences_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    n, classes = 100, 4
    label = rng.integers(0, classes, n)
    first = rng.normal(0, 2, (n, classes)).astype(np.float32)
    first[np.arange(n), label] += 2
    other = first + rng.normal(0, 0.5, first.shape).astype(np.float32)
    first[3], other[3] = [1.0, 1.0005, 0, 0], [1.0005, 1.0, 0, 0]  # a tie
    network = Network(nn.Flatten(), export.preprocess(Recipe(image_size=8, val_resize=8), True))
    runners = {"torch": lookup(first), "onnx": lookup(first), "int8": lookup(other)}
    report, flips = parity.compare_formats(runners, network, batches_of(label), n, seconds=0.001)
    expected, ties, only_a, only_b, total = [], 0, 0, 0, 0.0
    for i in range(n):
        before = max(range(classes), key=lambda k, i=i: first[i][k])
        after = max(range(classes), key=lambda k, i=i: other[i][k])
        if before != after:
            expected.append((i, int(label[i]), "int8", before, after))
            ties += first[i][before] - first[i][after] < 1e-3
        only_a += before == label[i] != after
        only_b += after == label[i] != before
        total += sum(abs(float(other[i][k]) - float(first[i][k])) for k in range(classes))
    rows = flips[["row", "label", "format", "before", "after"]].itertuples(index=False, name=None)
    assert sorted(rows) == expected and len(expected) > 5 and ties >= 1
    same = report["formats"]["onnx"]
    assert same["flips"] == 0 and same["max_abs_diff"] == 0 and report["images"] == n
    entry = report["formats"]["int8"]
    assert (entry["flips"], entry["ties"]) == (len(expected), ties)
    assert entry["max_abs_diff"] == pytest.approx(np.abs(other - first).max())
    assert entry["mean"] == pytest.approx(total / first.size, rel=1e-5)
    assert entry["difference"]["points"] == pytest.approx(100 * (only_b - only_a) / n)
    assert entry["p"] == pytest.approx(scipy.stats.binomtest(only_a, only_a + only_b).pvalue)
    assert entry["difference"]["low"] <= entry["difference"]["points"]
    assert entry["difference"]["points"] <= entry["difference"]["high"]


@pytest.mark.parametrize("name", ["onnx", "torch_export", *parity.LOSSY])
@pytest.mark.parametrize(("flips", "ties"), [(0, 0), (3, 3), (3, 2)])
def test_flips_beyond_ties_are_a_problem_of_exact_formats(name, flips, ties):
    formats = {"torch": {"flips": 0, "ties": 0}, name: {"flips": flips, "ties": ties}}
    problems = parity.problems({"formats": formats, "script": {}})
    exact = name not in ("int8", "with_preprocessing")
    assert len(problems) == (exact and flips > ties)
    assert all(f"{name} has other predictions than torch for 1 image beyond" in p for p in problems)


@pytest.mark.parametrize("name", parity.LOSSY)
@pytest.mark.parametrize(
    ("lost", "won", "n", "refused"),
    [(3, 0, 500, False), (25, 0, 500, True), (90, 10, 10_000, True), (60, 40, 10_000, False)],
)
def test_a_lossy_format_is_over_budget_if_its_interval_is(name, lost, won, n, refused):
    """By the normal interval of a paired difference: 100 / n * (d +- 1.96 * sqrt(lost + won))."""
    before, after = np.ones((2, 1, n), bool)
    after[0, :lost] = False
    before[0, lost : lost + won] = False
    d = statistics.difference(before, after)
    entry = {"difference": {"points": d.points, "low": d.low, "high": d.high}}
    assert (100 / n * (won - lost + 1.96 * np.sqrt(lost + won)) < -0.5) == refused
    found = parity.over_budget({"formats": {name: entry}}, 0.5)
    sentence = f"{name} loses {100 * (lost - won) / n:.2f} points (95 % interval"
    assert found[name].startswith(sentence) if refused else found == {}
