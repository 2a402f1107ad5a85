"""Comparison: statistics against scipy, statsmodels and simulation; runs that are not alike."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import JUDGED, PICTURES, run_folder
from scipy import stats
from sklearn.calibration import calibration_curve
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower

from workbench import comparison
from workbench.comparison import ComparisonError, Spread, compare, difference
from workbench.runs import Run


def answers(rng, runs: int, p: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """Right or wrong of runs (runs, pictures) whose seeds move every picture's logit a little."""
    logit = np.log(p / (1 - p)) + rng.normal(0, shift, (runs, 1))
    return rng.random((runs, len(p))) < 1 / (1 + np.exp(-logit))


def easy(rng, pictures: int) -> np.ndarray:
    """Probabilities to be right: most pictures are easy, some hard, as in real lists."""
    return rng.beta(4, 1, pictures).clip(0.01, 0.99)


# ---- one run against one


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (3, 12), (40, 61), (500, 400)])
def test_the_exact_p_is_statsmodels(only_a, only_b):
    table = [[100, only_a], [only_b, 20]]
    expected = mcnemar(table, exact=True).pvalue if only_a + only_b else 1.0
    assert comparison.mcnemar(only_a, only_b) == pytest.approx(min(1.0, expected))


def test_the_bootstrap_is_that_of_whole_lists():
    """A slow one that draws pictures, not counts."""
    rng = np.random.default_rng(0)
    values = np.repeat([-1, 1, 0], [30, 55, 915])
    drawn = 100 * values[rng.integers(0, 1000, (10_000, 1000))].mean(1)
    low, high = comparison.bootstrap(30, 55, 1000)
    assert low == pytest.approx(np.quantile(drawn, 0.025), abs=0.1)
    assert high == pytest.approx(np.quantile(drawn, 0.975), abs=0.1)
    assert comparison.bootstrap(0, 0, 10) == (0.0, 0.0)


def test_two_runs_without_a_difference_are_told_apart_in_one_case_of_twenty():
    """Issue: over 2,000 simulated pairs the 5 % test rejects between 3.5 and 6.5 %."""
    rng, rejected, covered = np.random.default_rng(1), 0, 0
    for _ in range(2000):
        p = easy(rng, 10_000)
        a, b = answers(rng, 1, p), answers(rng, 1, p)
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        rejected += comparison.mcnemar(only_a, only_b) < 0.05
        low, high = comparison.bootstrap(only_a, only_b, 10_000)
        covered += low <= 0 <= high
    assert 0.035 <= rejected / 2000 <= 0.065
    assert 0.935 <= covered / 2000 <= 0.965


def test_the_difference_of_two_runs_is_of_these_pictures():
    a = np.array([[1, 1, 0, 0, 1, 0, 1, 1]], bool)
    b = np.array([[1, 0, 1, 1, 1, 1, 1, 0]], bool)
    d = difference(a, b)
    assert d.points == pytest.approx(12.5) and d.p == comparison.mcnemar(2, 3)
    assert (d.low, d.high) == comparison.bootstrap(2, 3, 8)
    assert d.detectable == pytest.approx(100 * np.sqrt(5) / 8 * (1.959964 + 0.841621), rel=1e-5)
    assert d.seeds == (1, 1) and d.pictures == 8 and d.seeds_wanted(0.5) is None


# ---- recipes, several runs each


def test_where_all_luck_is_of_runs_it_is_welchs_test():
    """Whole runs shifted, no picture of its own: the pictures have no part in it."""
    rng = np.random.default_rng(2)
    p = np.full(2000, 0.8)
    for ka, kb in ((3, 3), (4, 6)):
        a, b = answers(rng, ka, p, 0.3), answers(rng, kb, p, 0.1)
        spread = Spread.of(a, b)
        alone = Spread(spread.a, spread.b, 0.0, spread.df_pictures)
        expected = stats.ttest_ind(100 * b.mean(1), 100 * a.mean(1), equal_var=False)
        error, df = alone.error(ka, kb)
        assert df == pytest.approx(expected.df)
        assert 100 * (b.mean() - a.mean()) / error == pytest.approx(expected.statistic)
        if spread.pictures == 0:
            d, interval = difference(a, b), expected.confidence_interval()
            assert (d.p, d.low, d.high) == pytest.approx((expected.pvalue, *interval))


def test_the_share_of_the_pictures_is_what_a_simulation_knows():
    """Pictures that suit one recipe: their variance is known, runs' luck is taken out of it."""
    rng, found = np.random.default_rng(3), []
    for _ in range(200):
        suits = rng.random(1000) < 0.5
        a = answers(rng, 3, np.where(suits, 0.9, 0.7))
        b = answers(rng, 3, np.where(suits, 0.7, 0.9))
        found.append(Spread.of(a, b).pictures)
    assert np.mean(found) == pytest.approx(1e4 * 0.2**2 / 1000, rel=0.05)


@pytest.mark.parametrize("runs_a, runs_b, least", [(3, 3, 0.02), (5, 5, 0.035), (3, 5, 0.025)])
def test_recipes_without_a_difference_are_told_apart_in_no_more_than_one_case_of_twenty(
    runs_a, runs_b, least
):
    """Welch's test is known to be shy with three runs, never bold."""
    rng, rejected = np.random.default_rng(4), 0
    for _ in range(2000):
        p = easy(rng, PICTURES)
        d = difference(answers(rng, runs_a, p, 0.05), answers(rng, runs_b, p, 0.05))
        rejected += d.p < 0.05
    assert least <= rejected / 2000 <= 0.065


def test_the_interval_of_five_seeds_holds_for_other_pictures_in_95_of_100():
    """Half the pictures suit b, a quarter suit a, and every trial draws other ones."""
    rng, covered = np.random.default_rng(5), 0
    kinds = np.array([[0.7, 0.9], [0.9, 0.7], [0.8, 0.8]])
    truth = 100 * (0.5 * 0.2 - 0.25 * 0.2)
    for _ in range(2000):
        p = kinds[rng.choice(3, PICTURES, p=[0.5, 0.25, 0.25])]
        d = difference(answers(rng, 5, p[:, 0]), answers(rng, 5, p[:, 1]))
        covered += d.low <= truth <= d.high
    assert 0.935 <= covered / 2000 <= 0.965


def test_one_run_against_several_takes_their_variance():
    rng = np.random.default_rng(6)
    p = np.full(1000, 0.8)
    a, b = answers(rng, 1, p, 0.2), answers(rng, 4, p, 0.2)
    spread = Spread.of(a, b)
    assert spread.a == spread.b == pytest.approx((100 * b.mean(1)).var(ddof=1))
    error, df = Spread(spread.a, spread.b, 0.0, 999).error(1, 4)
    assert error == pytest.approx(np.sqrt(spread.b * 1.25)) and df == pytest.approx(3)
    with pytest.raises(ComparisonError, match="nothing about other seeds"):
        Spread.of(a, a)


@pytest.mark.parametrize("runs", [2, 3, 5, 20])
def test_what_could_be_seen_is_statsmodels_power(runs):
    spread = Spread(0.36, 0.36, 0.0, 9999)
    found = comparison._detectable(*spread.error(runs, runs))
    expected = TTestIndPower().solve_power(None, runs, 0.05, 0.8) * 0.6
    assert found == pytest.approx(expected, rel=1e-3)


def test_the_seeds_wanted_are_the_least_that_do():
    spread = Spread(0.36, 0.36, 0.0, 9999)
    wanted = spread.seeds_wanted(0.5)
    error = lambda k: comparison._detectable(*spread.error(k, k))
    assert error(wanted) <= 0.5 < error(wanted - 1)
    assert wanted == np.ceil(TTestIndPower().solve_power(0.5 / 0.6, None, 0.05, 0.8))
    assert Spread(0.36, 0.36, 0.2, 499).seeds_wanted(0.5) is None, "the pictures are too few"
    assert Spread(0.0, 0.0, 0.0, 499).seeds_wanted(0.5) == 2


def test_equal_runs_have_no_difference_and_no_spread():
    a = np.ones((2, 10), bool)
    assert difference(a, a).p == 1.0
    d = difference(a, ~a)
    assert (d.points, d.p, d.low, d.high) == (-100.0, 0.0, -100.0, -100.0)


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03], [0.5], [0.2, 0.2, 0.9, 0.001], []])
def test_holm_is_statsmodels(p):
    expected = multipletests(p, method="holm")[1] if p else []
    assert comparison.holm(p) == pytest.approx(list(expected))


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
    assert table.pictures.sum() == 3000


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
        *(run_folder(tmp_path, "better", s, top1=0.9, lr=0.2, flip=0.5) for s in range(3)),
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
        interval = stats.ttest_1samp(top1, 0).confidence_interval()
        assert (row.low, row.high) == pytest.approx(tuple(interval))
        assert (row.interval, row.seeds, row.pictures) == ("seeds", 3, PICTURES)
        assert row.top5 == 100.0 and row.minutes == 1.0 and row["img/s"] == 300.0
    assert table.differs.tolist() == ["", "lr 0.2 (0.1), flip 0.5 (0.0)"]


def test_the_interval_of_one_run_is_over_pictures(six):
    row = compare(six[:1]).table.iloc[0]
    right = round(row.top1 * PICTURES / 100)
    expected = stats.binomtest(right, PICTURES).proportion_ci(method="wilson")
    assert (row.low / 100, row.high / 100) == pytest.approx(tuple(expected))
    assert row.interval == "pictures" and np.isnan(row.sd)


def test_a_verdict_is_one_sentence_either_way(six, tmp_path):
    found = compare(six)
    [verdict] = found.verdicts
    d = verdict.found
    assert verdict.real and d.seeds == (3, 3)
    said = f"better is better than plain by {d.points:.2f} points (95 % interval {d.low:.2f} to"
    assert str(verdict).startswith(said) and "3 seeds, 400 pictures)" in str(verdict)
    [turned] = compare(six, against="better").verdicts
    said = f"plain is worse than better by {d.points:.2f} points (95 % interval {d.low:.2f} to"
    assert str(turned).startswith(said)
    alike = [*six[:3], *(run_folder(tmp_path, "alike", s, lr=0.3) for s in range(3))]
    [none] = compare(alike).verdicts
    assert not none.real
    assert str(none).startswith("no difference between alike and plain that these runs can show: ")
    assert f"a difference of {none.found.detectable:.2f} would have shown" in str(none)
    assert "0.5 points" in str(none)


def test_one_run_each_speaks_of_these_runs_alone(six):
    [verdict] = compare([six[0], six[3]]).verdicts
    assert "one run each on 400 pictures" in str(verdict)
    assert str(verdict).endswith("another seed of each shows the recipes")


def test_several_questions_have_holms_p(six, tmp_path):
    third = [run_folder(tmp_path, "third", s, top1=0.81, lr=0.3) for s in range(3)]
    found = compare([*six, *third])
    raw = [v.found.p for v in found.verdicts]
    assert [v.p for v in found.verdicts] == pytest.approx(comparison.holm(raw))
    assert all("for 2 questions" in str(v) for v in found.verdicts)


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


def test_other_pictures_are_refused(six):
    changed(six[3], "environment.json", val_data="w")
    with pytest.raises(ComparisonError, match="better-seed0 was validated on other pictures"):
        compare(six)


def test_other_classes_are_refused(six):
    changed(six[3], "environment.json", classes=JUDGED[::-1])
    with pytest.raises(ComparisonError, match="classes in another order|others in another order"):
        compare(six)


def rewritten(path: Path, change) -> None:
    frame = pd.read_parquet(path / "predictions.parquet")
    change(frame).to_parquet(path / "predictions.parquet", index=False)


def test_other_labels_of_the_same_files_are_refused(six):
    rewritten(six[4], lambda f: f.assign(label=(f.label + 1) % 4))
    with pytest.raises(ComparisonError, match="400 have the same name, 0 the same label too"):
        compare(six)


def test_another_order_of_the_pictures_changes_nothing(six):
    before = compare(six)
    rewritten(six[1], lambda f: f.sample(frac=1, random_state=0))
    after = compare(six)
    assert before.flags == after.flags == []
    pd.testing.assert_frame_equal(before.table, after.table)
    assert str(before.verdicts[0]) == str(after.verdicts[0])
    assert np.array_equal(before.groups[0].right, after.groups[0].right)


def test_a_few_pictures_that_one_run_lacks_are_left_out_and_said(six):
    rewritten(six[2], lambda f: f.iloc[:-3])
    found = compare(six)
    assert (found.table.pictures == PICTURES - 3).all()
    assert "plain-seed0: 3 pictures are left out that others do not have" in found.flags
    rewritten(six[2], lambda f: f.iloc[:300])
    with pytest.raises(ComparisonError, match="of 300 and 400 files 300 have the same name"):
        compare(six)


def test_a_run_of_an_older_version_is_compared_and_said(six):
    """No fingerprint of its validation list, fewer knobs, one list."""
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
    assert "sees validation pictures otherwise than plain: image_size 64 against 32" in flags
    assert "val_resize 72 against 32" in flags
    assert "other was trained for 20 epochs, plain for 8" in flags
    assert "other-seed0 is stopped, judged at epoch 2 of 20" in flags
    assert "the training pictures differ" in flags
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
    """Eight pictures; b loses the second and gains the fifth and sixth."""
    paths = [run_folder(tmp_path, "a", 0, n=8), run_folder(tmp_path, "b", 0, n=8, lr=0.2)]
    label = np.arange(8) % 4
    said = {0: [0, 1, 2, 3, 3, 3, 3, 3], 1: [0, 2, 2, 3, 0, 1, 3, 3]}
    for k, path in enumerate(paths):
        rewritten(path, lambda f, k=k: f.assign(label=label, class1=np.int32(said[k])))
    return compare(paths)


def test_flips_are_the_pictures_that_change_sides(two):
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


def test_agreement_is_the_share_of_equal_answers(two):
    table = two.agreement()
    assert table.loc["a-seed0", "a-seed0"] == 100
    assert table.loc["a-seed0", "b-seed0"] == table.loc["b-seed0", "a-seed0"] == 62.5


def test_most_runs_decide_the_answer_of_a_recipe(six):
    found = compare(six)
    group = found.group("plain")
    frames = [Run(p).predictions("raw").class1.to_numpy() for p in six[:3]]
    votes = [np.bincount([f[i] for f in frames], minlength=4).argmax() for i in range(PICTURES)]
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


def test_where_bootstrap_and_test_part_it_is_called_borderline():
    right = np.zeros((1, 500), bool)
    other = right.copy()
    other[0, :9], right[0, 100:102] = True, True  # 9 against 2: p 0.065
    found = comparison.difference(right, other)
    assert found.low > 0 and 0.05 < found.p < 0.07
    assert "borderline" in str(comparison.Verdict("b", "a", found, found.p, 1))
    clear = comparison.difference(right, right)
    assert "borderline" not in str(comparison.Verdict("b", "a", clear, clear.p, 1))


def test_the_same_run_again_with_other_answers_is_said(tmp_path):
    first = run_folder(tmp_path / "x", "a")
    again = run_folder(tmp_path / "y", "a")
    [flag] = [f for f in compare([first, again]).flags if "left out" in f]
    assert flag.endswith("again, with the same seed")
    frame = pd.read_parquet(again / "predictions.parquet")
    frame.loc[0, "class1"] = 3
    frame.to_parquet(again / "predictions.parquet", index=False)
    [flag] = [f for f in compare([first, again]).sentences() if "left out" in f]
    assert "other answers" in flag and not flag.startswith("not like with like")


def test_an_average_that_nobody_kept_is_said(tmp_path):
    found = compare([run_folder(tmp_path, "a")], weights="ema")
    assert "raw weights are compared: no run kept an average (EMA)" in found.flags
