"""Statistics against scipy, statsmodels and simulations."""

import importlib.util

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import xlogy
from statsmodels.stats import contingency_tables
from statsmodels.stats.multitest import multipletests

from workbench import ROOT
from workbench.evaluation.statistics import (
    VarianceComponents,
    difference,
    holm,
    mcnemar,
    tango,
    top1_interval,
)


def sample_runs(rng, runs: int, p: np.ndarray, seed_sd: float = 0.0) -> np.ndarray:
    """Correct or not, (runs, images); a seed moves all logits by a normal of sd `seed_sd`."""
    logit = np.log(p / (1 - p)) + rng.normal(0, seed_sd, (runs, 1))
    return rng.random((runs, len(p))) < 1 / (1 + np.exp(-logit))


def probabilities(rng, count: int) -> np.ndarray:
    """Of images to be classified correctly: most are easy."""
    return rng.beta(4, 1, count).clip(0.01, 0.99)


def two_runs(only_a: int, only_b: int, both: int, neither: int, comparisons: int = 1):
    """The difference of two runs from counts of images."""
    a, b = np.array([[1, 0, 1, 0]], bool), np.array([[0, 1, 1, 0]], bool)
    return difference(a, b, comparisons, np.array([only_a, only_b, both, neither]))


# ---- one run each


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (3, 12), (40, 61), (500, 400)])
def test_mcnemar_is_that_of_statsmodels(only_a, only_b):
    table = [[100, only_a], [only_b, 20]]
    expected = 1.0
    if only_a + only_b:
        expected = contingency_tables.mcnemar(table, exact=True).pvalue
    assert mcnemar(only_a, only_b) == pytest.approx(min(1.0, expected))


@pytest.mark.parametrize("only_a, only_b, n", [(3, 12, 100), (0, 4, 50), (40, 61, 500), (0, 0, 80)])
@pytest.mark.parametrize("level", [0.95, 0.995])
def test_tango_inverts_a_score_test_with_a_numeric_maximum(only_a, only_b, n, level):
    rest = n - only_a - only_b

    def score(d: float) -> float:
        """For P(only b) - P(only a) = d, with P(only a) of maximum likelihood."""
        loss = lambda q: (
            -(xlogy(only_a, q) + xlogy(only_b, q + d) + xlogy(rest, max(1 - 2 * q - d, 0.0)))
        )
        bounds = (max(0.0, -d), (1 - d) / 2)
        q = optimize.minimize_scalar(loss, bounds=bounds, options={"xatol": 1e-13}).x
        return (only_b - only_a - n * d) / np.sqrt(n * (2 * q + d - d**2))

    low, high = tango(only_a, only_b, n, level)
    z = stats.norm.isf((1 - level) / 2)
    assert (score(low / 100), score(high / 100)) == pytest.approx((z, -z), rel=1e-3)


@pytest.mark.parametrize("comparisons", [1, 10])
def test_the_difference_of_two_runs_is_mcnemars_and_tangos_and_they_agree_about_0(comparisons):
    for only_a in range(0, 30, 7):
        for only_b in range(0, 45, 2):
            d = two_runs(only_a, only_b, 300, 100, comparisons)
            assert (d.low <= 0 <= d.high) == (d.adjusted >= 0.05), (only_a, only_b)
            low, high = tango(only_a, only_b, d.images, 1 - 0.05 / comparisons)
            assert d.low in (low, min(low, 0.0)) and d.high in (high, max(high, 0.0))
            assert d.p == mcnemar(only_a, only_b) and d.detectable > 0
            assert d.points == pytest.approx(100 * (only_b - only_a) / d.images)
    assert d.seeds == (1, 1) and d.seeds_needed(0.5) is None


# ---- several runs


def test_two_runs_with_equal_top1_by_chance_are_no_proof():
    """Two runs with the same top-1 and one that is 0.8 points better, unsure about 40 images."""
    a, b = np.ones((2, 500), bool), np.ones((1, 500), bool)
    a[0, :20] = a[1, 20:40] = b[0, 12:28] = False
    d = difference(a, b)
    assert d.points == pytest.approx(0.8)
    assert d.low < 0 < d.high and 0.3 < d.p < 1
    of_images = 1.5 * 20 / 500**2  # the mean of p (1 - p) / n, of two runs and of one
    assert (d.high - d.low) / 2 > 196 * np.sqrt(of_images)


def expected_p(a: np.ndarray, b: np.ndarray) -> float:
    """The method of VarianceComponents as a sum over quantiles of the prior."""
    n = a.shape[1]
    several = [r for r in (a, b) if len(r) > 1]
    df = sum(len(r) - 1 for r in several)
    squares = sum((len(r) - 1) * (100 * r.mean(1)).var(ddof=1) for r in several)
    disagreement = sum((len(r) - 1) * (r.var(0, ddof=1).sum() + 0.25) for r in several)
    per_image = 1e4 * disagreement / df / n / (n + 1)
    share = 1 / len(a) + 1 / len(b)
    gap = b.mean(0) - a.mean(0)
    fixed = max(1e4 * (n * gap.var() + 1) / n / (n + 1), per_image * share)
    prior = stats.halfcauchy(scale=0.3)  # from 0.003 to 300 points
    sd = prior.ppf(np.linspace(*prior.cdf([0.003, 300]), 100_000))
    likelihood = stats.chi2(df).pdf(squares / (per_image + sd**2)) / (per_image + sd**2)
    tail = 2 * stats.norm.sf(abs(100 * gap.mean()) / np.sqrt(fixed + share * sd**2))
    return np.average(tail, weights=likelihood)


@pytest.mark.parametrize("runs_a, runs_b", [(2, 1), (2, 2), (1, 3), (3, 3), (5, 2)])
@pytest.mark.parametrize("seed_sd", [0.0, 0.4])
def test_p_is_an_integral_over_the_seeds_variance(runs_a, runs_b, seed_sd):
    rng = np.random.default_rng([runs_a, runs_b])
    p = probabilities(rng, 800)
    a, b = sample_runs(rng, runs_a, p, seed_sd), sample_runs(rng, runs_b, p, seed_sd)
    b |= rng.random(800) < 0.1
    assert difference(a, b).p == pytest.approx(expected_p(a, b), rel=1e-3)


@pytest.mark.parametrize("comparisons", [1, 9])
@pytest.mark.parametrize("runs", [(2, 1), (2, 2), (3, 3)])
def test_the_interval_excludes_0_exactly_where_the_adjusted_p_is_below_5_percent(runs, comparisons):
    rng, significant = np.random.default_rng(6), set()
    for gain in np.linspace(0, 0.3, 60):
        p = probabilities(rng, 500)
        a, b = sample_runs(rng, runs[0], p), sample_runs(rng, runs[1], p)
        b |= rng.random(500) < gain
        d = difference(a, b, comparisons)
        assert d.adjusted == min(1, comparisons * d.p)
        assert (d.low <= 0 <= d.high) == (d.adjusted >= 0.05)
        significant.add(d.adjusted < 0.05)
    assert significant == {True, False}


def test_the_interaction_is_that_of_a_simulation():
    rng, estimates, counts = np.random.default_rng(3), [], np.ones(1000, int)
    for _ in range(200):
        kind = rng.random(1000) < 0.5
        a = sample_runs(rng, 3, np.where(kind, 0.9, 0.7))
        b = sample_runs(rng, 3, np.where(kind, 0.7, 0.9))
        estimates.append(VarianceComponents.estimate(a, b, counts).interaction)
    assert np.mean(estimates) == pytest.approx(1e4 * 0.2**2 / 1000, rel=0.05)


@pytest.mark.parametrize("n, sd, runs", [(500, 0.1, (2, 1)), (10_000, 0.3, (2, 2))])
def test_type_1_error_coverage_and_power_are_those_of_the_benchmark(n, sd, runs):
    """The claims of benchmarks/verdict.py with bounds for 400 comparisons instead of 10,000."""
    spec = importlib.util.spec_from_file_location("verdict", ROOT / "benchmarks" / "verdict.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rng = np.random.default_rng([n, *runs])
    points = 3 * bench.standard_error(n, sd, (1, 1))
    null = bench.cell(rng, n, runs, sd, 0.0, 400)
    there = bench.cell(rng, n, runs, sd, points, 400)
    assert null["found"] <= 0.08 and there["covered"] >= 0.92
    assert null["broken"] == there["broken"] == 0
    assert there["found"] >= 0.7 and there["old found"] < 0.45


def test_the_detectable_difference_is_significant_in_four_of_five_cases():
    rng, p = np.random.default_rng(7), np.full(1000, 0.8)
    both = lambda gain: difference(sample_runs(rng, 3, p), sample_runs(rng, 3, p + gain))
    detectable = both(0.0).detectable
    significant = [both(detectable / 100).adjusted < 0.05 for _ in range(300)]
    assert 0.7 <= np.mean(significant) <= 0.95


def test_the_seeds_needed_detect_the_difference():
    rng = np.random.default_rng(8)
    p = np.full(4000, 0.9)
    same = lambda k: difference(sample_runs(rng, k, p), sample_runs(rng, k, p))
    needed = same(3).seeds_needed(0.5)
    assert 3 < needed < 60
    assert same(needed).detectable <= 0.55 and same(needed // 2).detectable > 0.5
    kind = rng.random(4000) < 0.5  # each half suits one recipe: more seeds do not help
    a = sample_runs(rng, 3, np.where(kind, 0.9, 0.5))
    b = sample_runs(rng, 3, np.where(kind, 0.5, 0.9))
    assert difference(a, b).seeds_needed(0.5) is None


@pytest.mark.parametrize("runs", [(1, 1), (2, 1), (2, 2)])
def test_runs_that_agree_on_every_image_still_have_an_interval(runs):
    a, b = (np.ones((k, 50), bool) for k in runs)
    d = difference(a, b)
    assert (d.points, d.p) == (0, 1) and d.low < 0 < d.high and d.detectable > 0
    d = difference(a, ~b)
    assert d.points == -100 and 0 < d.p < 1e-4
    assert d.low == -100 < d.high < -50


# ---- one recipe, several comparisons


def test_the_interval_of_a_recipe_covers_other_seeds_and_images():
    rng, covered = np.random.default_rng(9), 0
    for _ in range(400):
        low, high = top1_interval(sample_runs(rng, 2, probabilities(rng, 500), 0.05))
        covered += low <= 80 <= high
        assert 0 <= low < high <= 100
    assert covered / 400 >= 0.92


def test_the_interval_of_one_run_is_wilsons_and_two_equal_seeds_have_one():
    correct = np.zeros((2, 100), bool)
    correct[0, :90], correct[1, 5:95] = True, True
    low, high = top1_interval(correct)
    assert 50 < low < 87 and 93 < high <= 100
    wilson = stats.binomtest(90, 100).proportion_ci(method="wilson")
    assert top1_interval(correct[:1]) == pytest.approx((100 * wilson.low, 100 * wilson.high))
    low, high = top1_interval(np.ones((3, 100), bool))
    assert low < high == 100


@pytest.mark.parametrize("images, p", [(10, 0.85), (20, 0.95), (40, 0.9)])
def test_the_interval_of_a_recipe_covers_with_few_images_too(images, p):
    rng, covered = np.random.default_rng(4), 0
    for _ in range(400):
        easy, own = rng.random(images) < p, rng.random((3, images)) < p
        low, high = top1_interval(np.where(rng.random(images) < 0.9, easy, own))
        covered += low <= 100 * p <= high
    assert covered / 400 >= 0.93


def test_seeds_that_agree_on_every_image_have_no_narrower_interval_than_one_of_them():
    for right in (0, 7, 10):
        correct = np.tile(np.arange(10) < right, (3, 1))
        (low, high), (one_low, one_high) = top1_interval(correct), top1_interval(correct[:1])
        assert low <= one_low and high >= one_high


def test_holm_is_that_of_statsmodels():
    p = np.random.default_rng(0).random(9) / 10
    assert holm(p) == pytest.approx(list(multipletests(p, method="holm")[1]))


def test_an_interval_of_a_difference_significant_by_holm_ends_beside_0():
    """Holm's p of the larger of two is that p itself, where the smaller is significant."""
    strong, weak = two_runs(10, 60, 300, 30, 2), two_runs(20, 36, 300, 44, 2)
    assert strong.p < 0.001 and 0.025 < weak.p < 0.05
    assert weak.low < 0 < weak.high and weak.adjusted == 2 * weak.p  # alone: Bonferroni's
    _, adjusted = holm([strong.p, weak.p])
    changed = weak.with_adjusted(adjusted)
    assert adjusted == weak.p
    assert (changed.low, changed.high) == (50 / 400, weak.high)
