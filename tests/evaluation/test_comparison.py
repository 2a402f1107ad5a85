"""Comparison: statistics against scipy, statsmodels and simulation; runs that are not alike."""

import importlib.util
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import IMAGES, JUDGED, run_folder
from scipy import optimize, stats
from scipy.special import xlogy
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from workbench import ROOT
from workbench.evaluation import comparison
from workbench.evaluation.comparison import (
    ComparisonError,
    Spread,
    Verdict,
    compare,
    difference,
    holm,
)
from workbench.runs import Run


def answers(rng, runs: int, p: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Right or wrong of runs (runs, images) whose seeds move every image's logit a little."""
    logit = np.log(p / (1 - p)) + rng.normal(0, shift, (runs, 1))
    return rng.random((runs, len(p))) < 1 / (1 + np.exp(-logit))


def easy(rng, count: int) -> np.ndarray:
    """Probabilities to be right: most count are easy, some hard, as in real lists."""
    return rng.beta(4, 1, count).clip(0.01, 0.99)


# ---- one run against one


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (3, 12), (40, 61), (500, 400)])
def test_the_exact_p_is_statsmodels(only_a, only_b):
    table = [[100, only_a], [only_b, 20]]
    expected = mcnemar(table, exact=True).pvalue if only_a + only_b else 1.0
    assert comparison.mcnemar(only_a, only_b) == pytest.approx(min(1.0, expected))


def two_runs(only_a: int, only_b: int, both: int, neither: int, comparisons: int = 1):
    """The difference of two runs from counts of images."""
    a, b = np.array([[1, 0, 1, 0]], bool), np.array([[0, 1, 1, 0]], bool)
    return difference(a, b, comparisons, np.array([only_a, only_b, both, neither]))


@pytest.mark.parametrize("only_a, only_b, n", [(3, 12, 100), (0, 4, 50), (40, 61, 500), (0, 0, 80)])
@pytest.mark.parametrize("level", [0.95, 0.995])
def test_the_ends_of_tangos_interval_are_where_a_score_test_with_a_numeric_maximum_rejects(
    only_a, only_b, n, level
):
    rest = n - only_a - only_b

    def score(d: float) -> float:
        """Of P(only b) - P(only a) = d, with P(only a) where the likelihood is greatest."""
        loss = lambda q: (
            -(xlogy(only_a, q) + xlogy(only_b, q + d) + xlogy(rest, max(1 - 2 * q - d, 0.0)))
        )
        bounds = (max(0.0, -d), (1 - d) / 2)
        q = optimize.minimize_scalar(loss, bounds=bounds, options={"xatol": 1e-13}).x
        return (only_b - only_a - n * d) / np.sqrt(n * (2 * q + d - d**2))

    low, high = comparison.tango(only_a, only_b, n, level)
    z = stats.norm.isf((1 - level) / 2)
    assert (score(low / 100), score(high / 100)) == pytest.approx((z, -z), rel=1e-3)


@pytest.mark.parametrize("comparisons", [1, 3, 10, 100])
def test_for_two_runs_interval_and_exact_test_never_contradict_each_other(comparisons):
    for only_a in range(0, 30, 7):
        for only_b in range(0, 45, 2):
            d = two_runs(only_a, only_b, 300, 100, comparisons)
            assert (d.low <= 0 <= d.high) == (d.adjusted >= 0.05), (only_a, only_b)
            assert -100 <= d.low < d.high <= 100 and d.low <= d.points <= d.high
            assert 0 < d.p <= 1 and d.detectable > 0


def test_the_interval_of_two_runs_holds_in_95_of_100_lists():
    rng, covered = np.random.default_rng(0), 0
    for only_a, only_b, rest in rng.multinomial(2000, [0.04, 0.06, 0.9], 400):
        d = two_runs(only_a, only_b, rest, 0)
        covered += d.low <= 2 <= d.high
    assert 0.93 <= covered / 400 <= 0.98


def test_the_difference_of_two_runs_is_of_these_images():
    a = np.array([[1, 1, 0, 0, 1, 0, 1, 1]], bool)
    b = np.array([[1, 0, 1, 1, 1, 1, 1, 0]], bool)
    d = difference(a, b)
    assert d.points == pytest.approx(12.5) and d.p == comparison.mcnemar(2, 3)
    assert (d.low, d.high) == comparison.tango(2, 3, 8)
    assert d.seeds == (1, 1) and d.images == 8 and d.seeds_wanted(0.5) is None


def test_a_p_that_underflows_is_shown_as_a_bound():
    d = two_runs(0, 6000, 2000, 2000)
    assert d.p == 1e-16 and "p < 1e-16," in str(Verdict("b", "a", d))
    d = two_runs(0, 6000, 2000, 2000, comparisons=3)
    assert "p < 1e-16, < 3e-16 adjusted for 3 comparisons," in str(Verdict("b", "a", d))


# ---- recipes, several runs each


def test_two_runs_that_agree_by_luck_prove_nothing():
    """Two runs with the same top-1 and one that is 0.8 points better, unsure about 40 images."""
    a, b = np.ones((2, 500), bool), np.ones((1, 500), bool)
    a[0, :20] = a[1, 20:40] = b[0, 12:28] = False
    d = difference(a, b)
    assert d.points == pytest.approx(0.8)
    assert d.low < 0 < d.high and 0.3 < d.p < 1
    of_images = 1.5 * 20 / 500**2  # the mean of p (1 - p) / n, of two runs and of one
    assert (d.high - d.low) / 2 > 196 * np.sqrt(of_images)


def expected_p(a: np.ndarray, b: np.ndarray) -> float:
    """The method of `Spread` as a sum over quantiles of the prior of the seeds' deviation."""
    n = a.shape[1]
    several = [r for r in (a, b) if len(r) > 1]
    df = sum(len(r) - 1 for r in several)
    squares = sum((len(r) - 1) * (100 * r.mean(1)).var(ddof=1) for r in several)
    luck = sum((len(r) - 1) * (r.var(0, ddof=1).sum() + 0.25) for r in several)
    floor = 1e4 * luck / df / n / (n + 1)
    share = 1 / len(a) + 1 / len(b)
    gap = b.mean(0) - a.mean(0)
    fixed = max(1e4 * (n * gap.var() + 1) / n / (n + 1), floor * share)
    prior = stats.halfcauchy(scale=0.3)  # from 0.003 to 300 points
    sd = prior.ppf(np.linspace(*prior.cdf([0.003, 300]), 100_000))
    likely = stats.chi2(df).pdf(squares / (floor + sd**2)) / (floor + sd**2)
    tail = 2 * stats.norm.sf(abs(100 * gap.mean()) / np.sqrt(fixed + share * sd**2))
    return np.average(tail, weights=likely)


@pytest.mark.parametrize("runs_a, runs_b", [(2, 1), (2, 2), (1, 3), (3, 3), (5, 2)])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_p_is_an_integral_over_the_seeds_variance(runs_a, runs_b, shift):
    rng = np.random.default_rng([runs_a, runs_b])
    p = easy(rng, 800)
    a, b = answers(rng, runs_a, p, shift), answers(rng, runs_b, p, shift)
    b |= rng.random(800) < 0.1
    assert difference(a, b).p == pytest.approx(expected_p(a, b), rel=1e-3)


@pytest.mark.parametrize("comparisons", [1, 9])
@pytest.mark.parametrize("runs", [(2, 1), (2, 2), (3, 3)])
def test_the_interval_leaves_out_0_exactly_where_the_adjusted_p_is_below_5_percent(
    runs, comparisons
):
    rng, seen = np.random.default_rng(6), set()
    for gain in np.linspace(0, 0.3, 60):
        p = easy(rng, 500)
        a, b = answers(rng, runs[0], p), answers(rng, runs[1], p)
        b |= rng.random(500) < gain
        d = difference(a, b, comparisons)
        assert d.adjusted == min(1, comparisons * d.p)
        assert (d.low <= 0 <= d.high) == (d.adjusted >= 0.05)
        seen.add(d.adjusted < 0.05)
    assert seen == {True, False}


def test_the_share_of_the_images_is_what_a_simulation_knows():
    """Images that suit one recipe: their variance is known, runs' luck is taken out of it."""
    rng, found, every = np.random.default_rng(3), [], np.ones(1000, int)
    for _ in range(200):
        suits = rng.random(1000) < 0.5
        a = answers(rng, 3, np.where(suits, 0.9, 0.7))
        b = answers(rng, 3, np.where(suits, 0.7, 0.9))
        found.append(Spread.of(a, b, every).images)
    assert np.mean(found) == pytest.approx(1e4 * 0.2**2 / 1000, rel=0.05)


def simulation():
    """benchmarks/verdict.py as a module."""
    spec = importlib.util.spec_from_file_location("verdict", ROOT / "benchmarks" / "verdict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("n, sd, runs", [(500, 0.1, (2, 1)), (10_000, 0.3, (2, 2))])
def test_a_verdict_is_rarely_wrong_and_finds_what_is_there_with_few_runs(n, sd, runs):
    """The benchmark's claims with bounds for 400 comparisons instead of 10,000."""
    bench, rng = simulation(), np.random.default_rng([n, *runs])
    points = 3 * bench.standard_error(n, sd, (1, 1))
    null = bench.cell(rng, n, runs, sd, 0.0, 400)
    there = bench.cell(rng, n, runs, sd, points, 400)
    assert null["found"] <= 0.08 and there["covered"] >= 0.92
    assert null["broken"] == there["broken"] == 0
    assert there["found"] >= 0.7 and there["old found"] < 0.45


def test_the_interval_of_five_seeds_holds_for_other_images():
    """Half the images suit b, a quarter suit a, and every trial draws other ones."""
    rng, covered = np.random.default_rng(5), 0
    kinds = np.array([[0.7, 0.9], [0.9, 0.7], [0.8, 0.8]])
    truth = 100 * (0.5 * 0.2 - 0.25 * 0.2)
    for _ in range(600):
        p = kinds[rng.choice(3, IMAGES, p=[0.5, 0.25, 0.25])]
        d = difference(answers(rng, 5, p[:, 0]), answers(rng, 5, p[:, 1]))
        covered += d.low <= truth <= d.high
    assert covered / 600 >= 0.93


def test_what_is_called_detectable_is_found_in_four_of_five_cases():
    rng, p = np.random.default_rng(7), np.full(1000, 0.8)
    reach = np.mean([difference(answers(rng, 3, p), answers(rng, 3, p)).detectable] * 20)
    found = [difference(answers(rng, 3, p), answers(rng, 3, p + reach / 100)) for _ in range(300)]
    assert 0.7 <= np.mean([d.adjusted < 0.05 for d in found]) <= 0.95


def test_as_many_seeds_as_wanted_detect_the_difference():
    rng = np.random.default_rng(8)
    p = np.full(4000, 0.9)
    wanted = difference(answers(rng, 3, p), answers(rng, 3, p)).seeds_wanted(0.5)
    assert 3 < wanted < 60
    then = lambda k: difference(answers(rng, k, p), answers(rng, k, p)).detectable
    assert then(wanted) <= 0.55 and then(wanted // 2) > 0.5
    suits = answers(rng, 1, np.full(4000, 0.5))[0]  # images that suit one recipe: seeds do not help
    a, b = answers(rng, 3, np.where(suits, 0.9, 0.5)), answers(rng, 3, np.where(suits, 0.5, 0.9))
    assert difference(a, b).seeds_wanted(0.5) is None


@pytest.mark.parametrize("runs", [(1, 1), (2, 1), (2, 2)])
def test_runs_that_agree_on_every_image_have_an_interval_all_the_same(runs):
    a, b = (np.ones((k, 50), bool) for k in runs)
    d = difference(a, b)
    assert (d.points, d.p) == (0, 1) and d.low < 0 < d.high and d.detectable > 0
    d = difference(a, ~b)
    assert d.points == -100 and 0 < d.p < 1e-4
    assert d.low == -100 < d.high < -50


def test_the_interval_of_a_recipe_holds_for_other_seeds_and_images():
    rng, covered = np.random.default_rng(9), 0
    for _ in range(400):
        low, high = comparison.top1_interval(answers(rng, 2, easy(rng, 500), 0.05))
        covered += low <= 80 <= high
        assert 0 <= low < high <= 100
    assert covered / 400 >= 0.92


def test_two_seeds_with_the_same_top1_have_an_interval_and_one_run_has_wilsons():
    right = np.zeros((2, 100), bool)
    right[0, :90], right[1, 5:95] = True, True
    low, high = comparison.top1_interval(right)
    assert 50 < low < 87 and 93 < high <= 100
    wilson = stats.binomtest(90, 100).proportion_ci(method="wilson")
    assert comparison.top1_interval(right[:1]) == pytest.approx(
        (100 * wilson.low, 100 * wilson.high)
    )
    low, high = comparison.top1_interval(np.ones((3, 100), bool))
    assert low < high == 100


# ---- calibration


def spoken(rng, n: int) -> pd.DataFrame:
    p1 = rng.uniform(0.26, 1, n).astype(np.float32)
    label = rng.integers(0, 4, n)
    right = rng.random(n) < p1**2
    return pd.DataFrame(
        {"p1": p1, "label": label, "class1": np.where(right, label, (label + 1) % 4)}
    )


def test_the_reliability_diagram_is_scikit_learns():
    frame = spoken(np.random.default_rng(7), 3000)
    top1, confidence = calibration_curve(frame.class1 == frame.label, frame.p1, n_bins=15)
    table = comparison.reliability(frame)
    assert table.top1.to_numpy() == pytest.approx(top1)
    assert table.confidence.to_numpy() == pytest.approx(confidence)
    assert table.images.sum() == 3000


def test_the_calibration_error_is_a_loop_over_bins():
    frame = spoken(np.random.default_rng(8), 500)
    total = 0.0
    for i in range(15):
        inside = frame[(frame.p1 > i / 15) & (frame.p1 <= (i + 1) / 15)]
        if len(inside):
            right = (inside.class1 == inside.label).mean()
            total += len(inside) / 500 * abs(right - inside.p1.mean())
    assert comparison.calibration_error(frame) == pytest.approx(total, abs=1e-6)
    sure = frame.assign(p1=1.0, class1=frame.label)
    assert comparison.calibration_error(sure) == 0.0


# ---- run folders


def changed(path: Path, name: str, **values) -> None:
    file = path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def six(tmp_path) -> list[Path]:
    """Three seeds of a recipe, three of a better one."""
    return [
        *(run_folder(tmp_path, "plain", s) for s in range(3)),
        *(run_folder(tmp_path, "better", s, top1=0.9, lr=0.2, hflip=0.5) for s in range(3)),
    ]


def test_a_row_per_recipe_with_the_seeds_in_it(six):
    found = compare(six)
    table = found.table.set_index("recipe")
    assert table.index.tolist() == ["plain", "better"]
    for name, paths in (("plain", six[:3]), ("better", six[3:])):
        frames = [Run(p).predictions("raw") for p in paths]
        top1 = [100 * (f.class1 == f.label).mean() for f in frames]
        row = table.loc[name]
        assert (row.top1, row.sd) == pytest.approx((np.mean(top1), np.std(top1, ddof=1)))
        right = np.stack([f.class1 == f.label for f in frames])
        assert (row.low, row.high) == comparison.top1_interval(right)
        assert (row.interval, row.seeds, row.images) == ("seeds and images", 3, IMAGES)
        assert row.top5 == 100.0 and row.minutes == 1.0 and row["img/s"] == 300.0
    assert table.differs.tolist() == ["", "lr 0.2 (0.1), hflip 0.5 (0.0)"]


def test_the_interval_of_one_run_is_over_images(six):
    row = compare(six[:1]).table.iloc[0]
    right = round(row.top1 * IMAGES / 100)
    expected = stats.binomtest(right, IMAGES).proportion_ci(method="wilson")
    assert (row.low / 100, row.high / 100) == pytest.approx(tuple(expected))
    assert row.interval == "images" and np.isnan(row.sd)


def test_a_verdict_is_one_sentence_either_way(six):
    found = compare(six)
    [verdict] = found.verdicts
    d = verdict.found
    assert verdict.real and d.seeds == (3, 3)
    said = f"better is better than plain by {d.points:.2f} points (95 % interval {d.low:.2f} to"
    assert str(verdict).startswith(said) and "3 seeds each, 400 images)" in str(verdict)
    [turned] = compare(six, against="better").verdicts
    said = f"plain is worse than better by {d.points:.2f} points (95 % interval {d.low:.2f} to"
    assert str(turned).startswith(said)


def shares(*right: float, n: int) -> np.ndarray:
    """Runs that are right on the first images, (runs, n)."""
    return np.stack([np.arange(n) < share * n for share in right])


def test_unproven_is_small_large_or_undecided():
    small = difference(shares(0.9, 0.9, n=5000), shares(0.9, 0.9002, n=5000))
    reach = max(-small.low, small.high)
    said = f"b and a are within {reach:.2f} points: +0.01 (95 % interval -"
    assert reach < 1 and str(Verdict("b", "a", small)).startswith(said)
    large = difference(shares(0.9, 0.9, n=10), shares(0.6, n=10), 10)
    said = (
        "a large difference that is not proven: b is worse than a by 30.00 points (95 % interval -"
    )
    assert str(Verdict("b", "a", large)).startswith(said)
    assert "1 seed of b and 2 of a, 10 images)" in str(Verdict("b", "a", large))
    unclear = difference(shares(0.9, 0.9, n=400), shares(0.9, 0.895, n=400), 10)
    text = str(Verdict("b", "a", unclear))
    assert text.startswith("undecided between b and a: -0.25 points (95 % interval -")
    assert f"a difference of {unclear.detectable:.2f} would have shown; " in text
    assert not any("no difference" in str(Verdict("b", "a", d)) for d in (small, large, unclear))


def test_a_recipe_84_points_worse_is_worse_among_ten_comparisons(tmp_path):
    paths = [run_folder(tmp_path, "good", s, top1=0.9) for s in range(2)]
    paths += [
        run_folder(tmp_path, f"r{i}", s, top1=0.9, lr=0.2 + i) for i in range(9) for s in (0, 1)
    ]
    paths += [run_folder(tmp_path, "collapsed", s, top1=0.06, lr=50.0) for s in range(2)]
    found = compare(paths)
    assert len(found.verdicts) == 10
    for verdict in found.verdicts:
        d = verdict.found
        assert verdict.real == (verdict.name == "collapsed") == (not d.low <= 0 <= d.high)
        assert -100 <= d.low < d.high <= 100 and " adjusted for 10 comparisons" in str(verdict)
    assert str(verdict).startswith("collapsed is worse than good by 8")


def test_one_run_each_speaks_of_these_runs_alone(six):
    [verdict] = compare([six[0], six[3]]).verdicts
    assert "one run each on 400 images" in str(verdict)
    assert str(verdict).endswith("another seed of each shows the recipes")


def test_several_comparisons_show_the_raw_p_and_statsmodels_holm_adjusted_one(six, tmp_path):
    third = [run_folder(tmp_path, "third", s, top1=0.81, lr=0.3) for s in range(3)]
    found = compare([*six, *third])
    alone = [compare([*six[:3], *its]).verdicts[0] for its in (six[3:], third)]
    assert [v.found.p for v in found.verdicts] == [v.found.p for v in alone]
    adjusted = multipletests([v.found.p for v in alone], method="holm")[1]
    assert [v.found.adjusted for v in found.verdicts] == pytest.approx(list(adjusted))
    for one, both in zip(alone, found.verdicts, strict=True):
        assert both.found.low < one.found.low < one.found.high < both.found.high
        assert (
            f"{both.found.adjusted:.1g} adjusted for 2 comp" in str(both)
            or both.found.adjusted > 0.09
        )


def test_where_holm_finds_what_its_wider_interval_does_not_the_interval_ends_beside_0():
    """Holm's p of the larger of two is that p itself, where the smaller is significant."""
    strong, weak = two_runs(10, 60, 300, 30, 2), two_runs(20, 36, 300, 44, 2)
    assert strong.p < 0.001 and 0.025 < weak.p < 0.05
    assert weak.low < 0 < weak.high and weak.adjusted == 2 * weak.p  # alone: Bonferroni's
    _, adjusted = holm([strong.p, weak.p])
    found = weak.with_adjusted(adjusted)
    assert adjusted == weak.p
    assert (found.low, found.high) == (50 / 400, weak.high)
    assert Verdict("b", "a", found).real


def test_recipes_are_told_apart_by_their_knobs_not_their_names(tmp_path):
    one = run_folder(tmp_path / "x", "name", 0)
    same = run_folder(tmp_path / "y", "another", 1)
    other = run_folder(tmp_path / "z", "name", 0, lr=0.2)
    found = compare([one, same, other])
    assert [(g.name, g.seeds) for g in found.groups] == [("name", [0, 1]), ("name-seed0", [0])]


def test_the_same_seed_twice_counts_once_and_is_said(tmp_path):
    paths = [run_folder(tmp_path / side, "name", 0) for side in "xy"]
    found = compare(paths)
    assert [g.seeds for g in found.groups] == [[0]]
    assert any("left out: it is name-seed0 again" in flag for flag in found.flags)
    assert compare([paths[0], paths[0]]).flags == []


# ---- not like with like


def test_other_images_are_refused(six):
    changed(six[3], "environment.json", val_data="w")
    with pytest.raises(ComparisonError, match="better-seed0 was validated on other images"):
        compare(six)


def test_other_classes_are_refused(six):
    for classes, words in ((JUDGED[::-1], "classes of other names or in another order"),
                           (JUDGED[:3], "3 classes and 4;")):  # fmt: skip
        changed(six[3], "environment.json", classes=classes)
        with pytest.raises(ComparisonError, match=f"better-seed0 and plain-seed0 have {words}"):
            compare(six)


def rewritten(path: Path, change) -> None:
    frame = pd.read_parquet(path / "predictions.parquet")
    change(frame).to_parquet(path / "predictions.parquet", index=False)


def test_other_labels_of_the_same_files_are_refused(six):
    rewritten(six[4], lambda f: f.assign(label=(f.label + 1) % 4))
    with pytest.raises(ComparisonError, match="400 have the same name, 0 the same label too"):
        compare(six)


def test_another_order_of_the_images_changes_nothing(six):
    before = compare(six)
    rewritten(six[1], lambda f: f.sample(frac=1, random_state=0))
    after = compare(six)
    assert before.flags == after.flags == []
    pd.testing.assert_frame_equal(before.table, after.table)
    assert str(before.verdicts[0]) == str(after.verdicts[0])
    assert np.array_equal(before.groups[0].right, after.groups[0].right)


def test_a_few_images_that_one_run_lacks_are_left_out_and_said(six):
    rewritten(six[2], lambda f: f.iloc[:-3])
    found = compare(six)
    assert (found.table.images == IMAGES - 3).all()
    assert "plain-seed0: 3 images are left out that others do not have" in found.flags
    rewritten(six[2], lambda f: f.iloc[:300])
    with pytest.raises(ComparisonError, match="of 300 and 400 files 300 have the same name"):
        compare(six)


def test_a_run_of_an_older_version_is_compared_and_said(six):
    """No fingerprint of its validation list, fewer options, one list."""
    environment = json.loads((six[3] / "environment.json").read_text())
    del environment["val_data"]
    (six[3] / "environment.json").write_text(json.dumps(environment))
    text = (six[3] / "recipe.yaml").read_text().splitlines(keepends=True)
    (six[3] / "recipe.yaml").write_text("".join(t for t in text if not t.startswith("probe_epo")))
    rewritten(six[3], lambda f: f.drop(columns="list"))
    found = compare(six)
    assert [len(g.runs) for g in found.groups] == [3, 3]
    assert any("known by their names alone" in flag for flag in found.flags)


def test_what_is_not_alike_is_flagged(tmp_path):
    first = run_folder(tmp_path, "plain", 0)
    other = run_folder(tmp_path, "other", 0, image_size=64, val_resize=72, epochs=20)
    changed(other, "status.json", state="stopped")
    changed(other, "environment.json", data="e")
    found = compare([first, other])
    flags = "\n".join(found.flags)
    assert "sees validation images otherwise than plain: image_size 64 against 32" in flags
    assert "val_resize 72 against 32" in flags
    assert "other was trained for 20 epochs, plain for 8" in flags
    assert "other-seed0 is stopped, judged at epoch 2 of 20" in flags
    assert "the training images differ" in flags
    assert all(line.startswith("not like with like: ") for line in found.sentences()[1:])


def test_averaged_weights_are_taken_where_they_are_and_the_mixture_is_said(six):
    rewritten(six[3], lambda f: pd.concat([f, f.assign(weights="ema", class1=f.label)]))
    assert compare(six[3:4]).table.top1[0] < 100
    found = compare(six, weights="ema")
    assert found.group("better").top1[0] == 100
    assert any("averaged weights (EMA) against raw" in flag for flag in found.flags)
    with pytest.raises(ComparisonError, match="allowed are raw and ema"):
        compare(six, weights="best")


def test_runs_that_cannot_be_compared_say_so_by_name(six, tmp_path):
    with pytest.raises(ComparisonError, match="no run to compare"):
        compare([])
    with pytest.raises(ComparisonError, match="nowhere is no run folder; name some"):
        compare([tmp_path / "nowhere"])
    (six[0] / "predictions.parquet").unlink()
    with pytest.raises(ComparisonError, match="plain-seed0 has no predictions.*leave it out"):
        compare(six)
    (six[1] / "predictions.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ComparisonError, match="plain-seed1.*leave it out"):
        compare(six[1:])
    with pytest.raises(ComparisonError, match="no recipe 'x' here; there are better"):
        compare(six[3:], against="x")


def test_what_is_usable_is_found_and_the_rest_is_said_why(six, tmp_path):
    (six[0] / "predictions.parquet").unlink()
    (six[1] / "recipe.yaml").write_text("{")
    (tmp_path / "half").mkdir()
    (tmp_path / "a file").touch()
    usable, left_out = comparison.usable(tmp_path)
    assert {run.path for run in usable} == set(six[2:])
    assert left_out == {"plain-seed0": "finished, not evaluated yet"} | {
        "plain-seed1": left_out["plain-seed1"]
    }
    assert "no readable run" in left_out["plain-seed1"]
    assert comparison.usable(tmp_path / "nowhere") == ([], {})


def test_names_of_any_kind_are_told_in_full(tmp_path):
    name = "ümläut 漢字 | " + "long " * 30
    found = compare([run_folder(tmp_path, name, 0), run_folder(tmp_path, "plain", 0, lr=0.2)])
    assert found.table.recipe[0] == name
    assert name.replace("|", "\\|") in comparison.markdown(found.table)


# ---- what changed


@pytest.fixture
def two(tmp_path) -> comparison.Comparison:
    """Eight images; b loses the second and gains the fifth and sixth."""
    paths = [run_folder(tmp_path, "a", 0, n=8), run_folder(tmp_path, "b", 0, n=8, lr=0.2)]
    label = np.arange(8) % 4
    said = {0: [0, 1, 2, 3, 3, 3, 3, 3], 1: [0, 2, 2, 3, 0, 1, 3, 3]}
    for k, path in enumerate(paths):
        rewritten(path, lambda f, k=k: f.assign(label=label, class1=np.int32(said[k])))
    return compare(paths)


def test_flips_are_the_images_that_change_sides(two):
    flips = two.flips("b", "a")
    assert flips.file.tolist() == ["1.png", "4.png", "5.png"]
    assert flips.before.tolist() == [1, 3, 3] and flips.after.tolist() == [2, 0, 1]
    assert flips.change.tolist() == [-1, 1, 1]


def test_classes_gain_and_lose_by_themselves(two):
    table = two.by_class().set_index("class")
    assert table.a.tolist() == [50, 50, 50, 100] and table.b.tolist() == [100, 50, 50, 100]
    assert table.images.tolist() == [2, 2, 2, 2]


def test_the_difference_of_confusions_is_per_run(two):
    table = two.confusion("b", "a")
    expected = pd.DataFrame(0.0, JUDGED, JUDGED)
    expected.loc["ant", "ant"], expected.loc["ant", "dog"] = 1, -1
    expected.loc["bee", "cat"], expected.loc["bee", "dog"] = 1, -1
    pd.testing.assert_frame_equal(table, expected)


@pytest.mark.parametrize("classes, images", [(12, 900), (10_450, 20_000)])
def test_the_confusions_of_the_classes_that_changed_most_take_no_table_of_all(classes, images):
    rng, names = np.random.default_rng(0), [f"class {i}" for i in range(classes)]
    label, groups = rng.integers(0, classes, images), []
    for name, runs in (("a", 2), ("b", 3)):
        guess = [np.where(rng.random(images) < 0.7, label, rng.integers(0, classes, images))
                 for _ in range(runs)]  # fmt: skip
        frames = [pd.DataFrame({"label": label, "class1": k.astype(np.int32)}) for k in guess]
        right = np.stack([k == label for k in guess])
        groups.append(comparison.Group(name, [None] * runs, {}, frames, right, [*range(runs)]))
    found = comparison.Comparison(groups, [], [], pd.DataFrame({"label": label}), names)
    tracemalloc.start()
    part = found.confusion("b", "a", most=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # a table of all pairs of 10,450 classes has 874e6 bytes
    assert part.shape == (8, 8) and part.attrs["classes"] == classes
    of = [names.index(name) for name in part.index]
    old, new = (sum(confusion_matrix(f.label, f.class1, labels=of) for f in g.predictions)
                / len(g.runs) for g in groups)  # fmt: skip
    np.testing.assert_allclose(part, new - old, atol=1e-12)
    if classes == 12:
        whole = abs(found.confusion("b", "a").to_numpy())
        most = np.argsort(-(whole.sum(0) + whole.sum(1)), kind="stable")[:8]
        assert of == sorted(most)


def test_agreement_is_the_share_of_equal_answers(two):
    table = two.agreement()
    assert table.loc["a-seed0", "a-seed0"] == 100
    assert table.loc["a-seed0", "b-seed0"] == table.loc["b-seed0", "a-seed0"] == 62.5


def test_most_runs_decide_the_answer_of_a_recipe(six):
    found = compare(six)
    group = found.group("plain")
    frames = [Run(p).predictions("raw").class1.to_numpy() for p in six[:3]]
    votes = [np.bincount([f[i] for f in frames], minlength=4).argmax() for i in range(IMAGES)]
    assert group.answers.tolist() == votes
    flips = found.flips("better", "plain")
    assert flips.change.abs().is_monotonic_decreasing
    assert (flips.change == flips.right_after - flips.right_before).all()


def test_a_comparison_needs_nothing_but_the_folders(six, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    moved.mkdir()
    there = [shutil.move(path, moved / path.name) for path in six]
    monkeypatch.chdir(tmp_path)
    assert compare(there).verdicts[0].real


# ---- what a verdict must not hide


def test_a_run_still_to_go_on_is_said_first_and_in_the_table(tmp_path):
    a, b = run_folder(tmp_path, "a", top1=0.7), run_folder(tmp_path, "b", top1=0.9, lr=0.2)
    assert not str(compare([a, b]).verdicts[0]).startswith("so far")
    (b / "status.json").write_text(json.dumps({"state": "stopped"}))
    found = compare([a, b])
    assert str(found.verdicts[0]).startswith("so far, before the end of every run: b is better")
    assert found.table.epochs.tolist() == [8, "2 of 8"]


@pytest.mark.parametrize("finished_first", [True, False])
def test_of_two_runs_of_one_seed_the_finished_one_is_compared(tmp_path, finished_first):
    finished = run_folder(tmp_path / "x", "a", top1=0.9)
    stopped = run_folder(tmp_path / "y", "a", top1=0.5)
    stopped = stopped.rename(tmp_path / "y" / "stopped")
    (stopped / "status.json").write_text(json.dumps({"state": "stopped"}))
    found = compare([finished, stopped] if finished_first else [stopped, finished])
    assert [run.path for group in found.groups for run in group.runs] == [finished]
    [flag] = [f for f in found.flags if "left out" in f]
    assert flag.startswith("stopped is left out") and "has not finished (stopped)" in flag
    assert "machine" not in flag


@pytest.mark.parametrize("p, text", [(0.0496, "0.0496"), (0.0503, "0.0503"), (0.0454, "0.0454")])
def test_a_p_beside_the_level_keeps_its_side(p, text):
    found = comparison.Difference(1.0, 0.1, 1.9, p, (1, 1), 500, 2.0, p)
    assert f"p {text}," in str(comparison.Verdict("b", "a", found))


def test_the_same_run_again_with_other_answers_is_said(tmp_path):
    first = run_folder(tmp_path / "x", "a")
    again = run_folder(tmp_path / "y", "a")
    [flag] = [f for f in compare([first, again]).flags if "left out" in f]
    assert flag.endswith("again, with the same seed")
    frame = pd.read_parquet(again / "predictions.parquet")
    frame.loc[0, "class1"] = 3
    frame.to_parquet(again / "predictions.parquet", index=False)
    [flag] = [f for f in compare([first, again]).sentences() if "left out" in f]
    assert "other predictions" in flag and not flag.startswith("not like with like")


def test_an_average_that_nobody_kept_is_said(tmp_path):
    found = compare([run_folder(tmp_path, "a")], weights="ema")
    assert "raw weights are compared: no run kept an average (EMA)" in found.sentences()
