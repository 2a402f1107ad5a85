"""Comparisons of run folders: groups, verdicts, cautions, what changed between recipes."""

import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import IMAGES, JUDGED, run_folder
from scipy import stats
from sklearn.metrics import confusion_matrix

from workbench import training
from workbench.evaluation import comparison
from workbench.evaluation.comparison import ComparisonError, compare
from workbench.evaluation.recipe_diff import recipe_difference
from workbench.evaluation.statistics import Difference, difference, top1_interval
from workbench.evaluation.verdict import Verdict
from workbench.recipe import Recipe, inactive_options
from workbench.runs import Run


def edit_json(path: Path, name: str, **values) -> None:
    file = path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_predictions(path: Path, change) -> None:
    frame = pd.read_parquet(path / "predictions.parquet")
    change(frame).to_parquet(path / "predictions.parquet", index=False)


@pytest.fixture
def six(tmp_path) -> list[Path]:
    """Three seeds of a recipe, three of a better one."""
    return [
        *(run_folder(tmp_path, "plain", s) for s in range(3)),
        *(run_folder(tmp_path, "better", s, top1=0.9, lr=0.2, hflip=0.5) for s in range(3)),
    ]


# ---- groups and table


def test_the_table_has_a_row_per_recipe_with_its_seeds(six):
    table = compare(six).table.set_index("recipe")
    assert table.index.tolist() == ["plain", "better"]
    for name, paths in (("plain", six[:3]), ("better", six[3:])):
        frames = [Run(p).predictions("raw") for p in paths]
        top1 = [100 * (f.class1 == f.label).mean() for f in frames]
        row = table.loc[name]
        assert (row.top1, row.sd) == pytest.approx((np.mean(top1), np.std(top1, ddof=1)))
        correct = np.stack([f.class1 == f.label for f in frames])
        assert (row.low, row.high) == top1_interval(correct)
        assert (row.interval, row.seeds, row.images) == ("seeds and images", 3, IMAGES)
        assert row.top5 == 100.0 and row.minutes == 1.0 and row["img/s"] == 300.0
    assert table.differs.tolist() == ["", "lr 0.2 (0.1), hflip 0.5 (0.0)"]


def test_the_interval_of_one_run_is_over_images(six):
    row = compare(six[:1]).table.iloc[0]
    expected = stats.binomtest(round(row.top1 * IMAGES / 100), IMAGES)
    expected = expected.proportion_ci(method="wilson")
    assert (row.low / 100, row.high / 100) == pytest.approx(tuple(expected))
    assert row.interval == "images" and np.isnan(row.sd)


def test_recipes_are_grouped_by_options_not_by_name(tmp_path):
    one = run_folder(tmp_path / "x", "name", 0)
    same = run_folder(tmp_path / "y", "another", 1)
    other = run_folder(tmp_path / "z", "name", 0, lr=0.2)
    groups = compare([one, same, other]).groups
    assert [(g.name, g.seeds) for g in groups] == [("name", [0, 1]), ("name-seed0", [0])]


def test_a_seed_counts_once_and_repetitions_are_named(tmp_path):
    first, again = (run_folder(tmp_path / side, "name", 0) for side in "xy")
    assert compare([first, first]).cautions == []
    result = compare([first, again])
    assert [g.seeds for g in result.groups] == [[0]]
    [caution] = result.cautions
    assert caution.endswith("is left out: it is name-seed0 again, with the same seed")
    edit_predictions(again, lambda f: f.assign(class1=f.class1.where(f.index > 0, 3)))
    assert "other predictions" in compare([first, again]).cautions[0]


@pytest.mark.parametrize("finished_first", [True, False])
def test_of_two_runs_of_a_seed_the_finished_one_is_compared(tmp_path, finished_first):
    finished = run_folder(tmp_path / "x", "a", top1=0.9)
    stopped = run_folder(tmp_path / "y", "a", top1=0.5).rename(tmp_path / "y" / "stopped")
    edit_json(stopped, "status.json", state="stopped")
    result = compare([finished, stopped] if finished_first else [stopped, finished])
    assert [run.name for group in result.groups for run in group.runs] == [finished.name]
    [caution] = [c for c in result.cautions if "left out" in c]
    assert caution.startswith("stopped is left out") and "has not finished (stopped)" in caution
    assert "machine" not in caution


def test_a_comparison_needs_only_the_folders(six, tmp_path, monkeypatch):
    (tmp_path / "moved").mkdir()
    moved = [shutil.move(path, tmp_path / "moved" / path.name) for path in six]
    monkeypatch.chdir(tmp_path)
    assert compare(moved).verdicts[0].significant


def test_long_and_unusual_names_are_complete(tmp_path):
    name = "ümläut 漢字 | " + "long " * 30
    result = compare([run_folder(tmp_path, name, 0), run_folder(tmp_path, "plain", 0, lr=0.2)])
    assert result.table.recipe[0] == name
    assert name.replace("|", "\\|") in comparison.markdown(result.table)


def test_differences_leave_out_options_without_effect():
    plain, mixed = Recipe(), Recipe(mixup_alpha=0.2, optimizer="adamw", lr=0.001)
    assert recipe_difference(plain.model_dump(), mixed.model_dump()) == {
        "optimizer": "optimizer adamw (sgd)",
        "lr": "lr 0.001 (0.1)",
        "mixup_alpha": "mixup_alpha 0.2 (0.0)",
    }  # momentum is at its default, and unused with adamw
    other = Recipe(mixup_alpha=0.2, mix_per_sample=True, momentum=0.8)
    different = recipe_difference(plain.model_dump(), other.model_dump())
    assert different["mix_per_sample"] == "mix_per_sample True (unused)"
    assert different["momentum"] == "momentum 0.8 (0.9)"
    old = plain.model_dump() | {"kd_loss": None, "batch_size": "many", "erase_prob": None}
    assert "temperature" in inactive_options(old), "values of an older version are no error"
    assert recipe_difference(old, old) == {}


# ---- verdicts


def test_a_verdict_is_a_sentence_from_either_side(six):
    [verdict] = compare(six).verdicts
    d = verdict.difference
    assert verdict.significant and d.seeds == (3, 3)
    text = f"better is better than plain by {d.points:.2f} points (95 % interval {d.low:.2f} to"
    assert str(verdict).startswith(text) and "3 seeds each, 400 images)" in str(verdict)
    [turned] = compare(six, baseline="better").verdicts
    text = f"plain is worse than better by {d.points:.2f} points (95 % interval {d.low:.2f} to"
    assert str(turned).startswith(text)


def runs_of(*top1: float, n: int) -> np.ndarray:
    """Runs that are correct on the first images, (runs, n)."""
    return np.stack([np.arange(n) < share * n for share in top1])


def test_a_difference_that_is_not_significant_is_small_large_or_undecided():
    small = difference(runs_of(0.9, 0.9, n=5000), runs_of(0.9, 0.9002, n=5000))
    bound = max(-small.low, small.high)
    text = f"b and a are within {bound:.2f} points: +0.01 (95 % interval -"
    assert bound < 1 and str(Verdict("b", "a", small)).startswith(text)
    large = str(Verdict("b", "a", difference(runs_of(0.9, 0.9, n=10), runs_of(0.6, n=10), 10)))
    text = "a large difference that is not proven: b is worse than a by 30.00 points (95 % interval"
    assert large.startswith(text) and "1 seed of b and 2 of a, 10 images)" in large
    d = difference(runs_of(0.9, 0.9, n=400), runs_of(0.9, 0.895, n=400), 10)
    unclear = str(Verdict("b", "a", d))
    assert unclear.startswith("undecided between b and a: -0.25 points (95 % interval -")
    assert f"a difference of {d.detectable:.2f} would have shown; " in unclear


def test_one_of_ten_recipes_that_collapsed_is_significantly_worse(tmp_path):
    paths = [run_folder(tmp_path, "good", s, top1=0.9) for s in range(2)]
    for i in range(9):
        paths += [run_folder(tmp_path, f"r{i}", s, top1=0.9, lr=0.2 + i) for s in range(2)]
    paths += [run_folder(tmp_path, "collapsed", s, top1=0.06, lr=50.0) for s in range(2)]
    verdicts = compare(paths).verdicts
    assert len(verdicts) == 10
    for verdict in verdicts:
        d = verdict.difference
        assert verdict.significant == (verdict.name == "collapsed") == (not d.low <= 0 <= d.high)
        assert -100 <= d.low < d.high <= 100 and " adjusted for 10 comparisons" in str(verdict)
    assert str(verdict).startswith("collapsed is worse than good by 8")


def test_a_verdict_of_one_run_each_is_about_these_runs(six):
    [verdict] = compare([six[0], six[3]]).verdicts
    assert "one run each on 400 images" in str(verdict)
    assert str(verdict).endswith("this holds for these two runs, train more seeds to compare the "
                                 "recipes")  # fmt: skip


def test_several_comparisons_show_raw_and_adjusted_p_and_have_wider_intervals(six, tmp_path):
    third = [run_folder(tmp_path, "third", s, top1=0.81, lr=0.3) for s in range(3)]
    verdicts = compare([*six, *third]).verdicts
    alone = [compare([*six[:3], *its]).verdicts[0] for its in (six[3:], third)]
    assert [v.difference.p for v in verdicts] == [v.difference.p for v in alone]
    for one, both in zip(alone, verdicts, strict=True):
        narrow, wide = one.difference, both.difference
        assert wide.low < narrow.low < narrow.high < wide.high
        assert f"{wide.adjusted:.1g} adjusted for 2 comp" in str(both) or wide.adjusted > 0.09


@pytest.mark.parametrize("p", [0.0496, 0.0503, 0.0454])
def test_a_p_near_the_level_is_not_rounded_across_it(p):
    d = Difference(1.0, 0.1, 1.9, p, (1, 1), 500, 2.0, p)
    assert f"p {p}," in str(Verdict("b", "a", d))


def test_a_p_that_underflows_is_a_bound():
    a, b = np.array([[1, 0, 0]], bool), np.array([[1, 1, 0]], bool)
    verdict = lambda n: str(Verdict("b", "a", difference(a, b, n, np.array([2000, 6000, 2000]))))
    assert "p < 1e-16," in verdict(1)
    assert "p < 1e-16, < 3e-16 adjusted for 3 comparisons," in verdict(3)


def test_a_verdict_on_unfinished_runs_is_preliminary(tmp_path):
    a, b = run_folder(tmp_path, "a", top1=0.7), run_folder(tmp_path, "b", top1=0.9, lr=0.2)
    assert not str(compare([a, b]).verdicts[0]).startswith("preliminary")
    edit_json(b, "status.json", state="stopped")
    result = compare([a, b])
    text = "preliminary, not all runs are finished: b is better"
    assert str(result.verdicts[0]).startswith(text)
    assert result.table.epochs.tolist() == [8, "2 of 8"]


# ---- what is refused, what is a caution


def test_other_images_classes_or_labels_are_refused(six):
    edit_json(six[3], "environment.json", val_data="w")
    with pytest.raises(ComparisonError, match="better-seed0 was validated on other images"):
        compare(six)
    for classes in (JUDGED[::-1], JUDGED[:3]):
        edit_json(six[3], "environment.json", val_data="v", classes=classes)
        words = rf"better-seed0 and plain-seed0 have different classes \({len(classes)} and 4\)"
        with pytest.raises(ComparisonError, match=words):
            compare(six)
    edit_json(six[3], "environment.json", classes=JUDGED)
    edit_predictions(six[4], lambda f: f.assign(label=(f.label + 1) % 4))
    with pytest.raises(ComparisonError, match="400 have the same name, 0 the same label too"):
        compare(six)


def test_the_order_of_the_images_does_not_matter(six):
    before = compare(six)
    edit_predictions(six[1], lambda f: f.sample(frac=1, random_state=0))
    after = compare(six)
    assert before.cautions == after.cautions == []
    pd.testing.assert_frame_equal(before.table, after.table)
    assert before.sentences() == after.sentences()
    assert np.array_equal(before.groups[0].correct, after.groups[0].correct)


def test_a_few_images_that_one_run_lacks_are_left_out(six):
    edit_predictions(six[2], lambda f: f.iloc[:-3])
    result = compare(six)
    assert (result.table.images == IMAGES - 3).all()
    assert "plain-seed0: 3 images are left out that other runs lack" in result.cautions
    edit_predictions(six[2], lambda f: f.iloc[:300])
    with pytest.raises(ComparisonError, match="of 300 and 400 files 300 have the same name"):
        compare(six)


def test_a_run_of_an_older_version_is_compared_with_a_caution(six):
    """No fingerprint of its validation list, fewer options, one list."""
    environment = json.loads((six[3] / "environment.json").read_text())
    del environment["val_data"]
    (six[3] / "environment.json").write_text(json.dumps(environment))
    lines = (six[3] / "recipe.yaml").read_text().splitlines(keepends=True)
    (six[3] / "recipe.yaml").write_text("".join(x for x in lines if "head_only" not in x))
    edit_predictions(six[3], lambda f: f.drop(columns="list"))
    result = compare(six)
    assert [len(g.runs) for g in result.groups] == [3, 3]
    assert any("matched by name only" in caution for caution in result.cautions)


def test_unequal_conditions_are_cautions(tmp_path):
    first = run_folder(tmp_path, "plain", 0)
    other = run_folder(tmp_path, "other", 0, image_size=64, val_resize=72, epochs=20)
    edit_json(other, "status.json", state="stopped")
    edit_json(other, "environment.json", data="e")
    assert compare([first, other]).sentences()[1:] == [
        "caution: other-seed0 is stopped, evaluated at epoch 2 of 20",
        "caution: other has image_size 64, plain 32",
        "caution: other has val_resize 72, plain 32",
        "caution: other has epochs 20, plain 8",
        "caution: the training images differ between runs",
    ]


def test_ema_weights_are_taken_where_a_run_has_them(six):
    text = "caution: raw weights are compared: no run has EMA weights"
    assert text in compare(six[:1], weights="ema").sentences()
    edit_predictions(six[3], lambda f: pd.concat([f, f.assign(weights="ema", class1=f.label)]))
    assert compare(six[3:4]).table.top1[0] < 100
    result = compare(six, weights="ema")
    assert result.group("better").top1[0] == 100
    assert any("EMA weights are compared with raw" in caution for caution in result.cautions)
    with pytest.raises(ComparisonError, match="allowed are raw and ema"):
        compare(six, weights="best")


def test_runs_that_cannot_be_compared_are_named(six, tmp_path):
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
        compare(six[3:], baseline="x")


def test_usable_runs_are_listed_and_others_have_a_reason(six, tmp_path):
    (six[0] / "predictions.parquet").unlink()
    (six[1] / "recipe.yaml").write_text("{")
    (tmp_path / "half").mkdir()
    (tmp_path / "a file").touch()
    usable, left_out = comparison.usable(tmp_path)
    assert {run.path for run in usable} == set(six[2:])
    assert left_out.pop("plain-seed0") == "finished, not evaluated yet"
    assert list(left_out) == ["plain-seed1"] and "no readable run" in left_out["plain-seed1"]
    assert comparison.usable(tmp_path / "nowhere") == ([], {})


# ---- what changed


@pytest.fixture
def two(tmp_path) -> comparison.Comparison:
    """Eight images; b loses the second and gains the fifth and sixth."""
    paths = [run_folder(tmp_path, "a", 0, n=8), run_folder(tmp_path, "b", 0, n=8, lr=0.2)]
    predicted = ([0, 1, 2, 3, 3, 3, 3, 3], [0, 2, 2, 3, 0, 1, 3, 3])
    for path, classes in zip(paths, np.int32(predicted), strict=True):
        edit_predictions(path, lambda f, c=classes: f.assign(label=np.arange(8) % 4, class1=c))
    return compare(paths)


def test_flips_and_classes_and_confusions_and_agreement_of_two_runs(two):
    flips = two.flips("b", "a")
    assert flips.file.tolist() == ["1.png", "4.png", "5.png"]
    assert flips.before.tolist() == [1, 3, 3] and flips.after.tolist() == [2, 0, 1]
    assert flips.change.tolist() == [-1, 1, 1]
    table = two.by_class().set_index("class")
    assert table.a.tolist() == [50, 50, 50, 100] and table.b.tolist() == [100, 50, 50, 100]
    assert table.images.tolist() == [2, 2, 2, 2]
    expected = pd.DataFrame(0.0, JUDGED, JUDGED)
    expected.loc["ant", "ant"], expected.loc["ant", "dog"] = 1, -1
    expected.loc["bee", "cat"], expected.loc["bee", "dog"] = 1, -1
    pd.testing.assert_frame_equal(two.confusion("b", "a"), expected)
    table = two.agreement()
    assert table.loc["a-seed0", "a-seed0"] == 100
    assert table.loc["a-seed0", "b-seed0"] == table.loc["b-seed0", "a-seed0"] == 62.5


@pytest.mark.parametrize("classes, images", [(12, 900), (10_450, 20_000)])
def test_the_change_of_confusions_is_scikit_learns_without_a_table_of_all_classes(
    tmp_path, classes, images
):
    rng, names, paths = np.random.default_rng(0), [f"class {i}" for i in range(classes)], []
    label = rng.integers(0, classes, images)
    for name, seeds, lr in (("a", 2, 0.1), ("b", 3, 0.2)):
        for seed in range(seeds):
            paths.append(run_folder(tmp_path, name, seed, n=images, lr=lr))
            guess = np.where(rng.random(images) < 0.7, label, rng.integers(0, classes, images))
            guess = guess.astype(np.int32)
            edit_predictions(paths[-1], lambda f, g=guess: f.assign(label=label, class1=g))
            edit_json(paths[-1], "environment.json", classes=names)
    result = compare(paths)
    tracemalloc.start()
    part = result.confusion("b", "a", most=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # a table of all pairs of 10,450 classes has 874e6 bytes
    assert part.shape == (8, 8) and part.attrs["classes"] == classes
    kept = [names.index(name) for name in part.index]
    old, new = (
        np.mean([confusion_matrix(f.label, f.class1, labels=kept) for f in g.predictions], axis=0)
        for g in result.groups
    )
    np.testing.assert_allclose(part, new - old, atol=1e-12)
    if classes == 12:
        whole = abs(result.confusion("b", "a").to_numpy())
        most = np.argsort(-(whole.sum(0) + whole.sum(1)), kind="stable")[:8]
        assert kept == sorted(most)


def test_the_majority_of_the_runs_decides_the_prediction_of_a_recipe(six):
    result = compare(six)
    frames = [Run(p).predictions("raw").class1.to_numpy() for p in six[:3]]
    votes = [np.bincount([f[i] for f in frames], minlength=4).argmax() for i in range(IMAGES)]
    assert result.group("plain").majority.tolist() == votes
    flips = result.flips("better", "plain")
    assert flips.change.abs().is_monotonic_decreasing
    assert (flips.change == flips.correct_after - flips.correct_before).all()


def test_curves_go_by_epoch_step_or_minutes(tmp_path):
    [group] = comparison.compare([run_folder(tmp_path, "a")]).groups
    group.runs[0].run.file("metrics.csv").write_text(
        "epoch,step,top1\n1,10,50.0\n2,20,\n3,30,70.0\n"
    )
    group.runs[0].run.file("steps.csv").write_text(
        "step,seconds,lr,loss\n10,60.0,0.1,2.0\n20,120.0,0.1,1.0\n30,300.0,0.1,0.5\n"
    )
    at = lambda *words: [list(part) for part in comparison.curves([group], *words)[0][1:]]
    assert at() == [[1, 3], [50, 70]]
    assert at("top-1", "step") == [[10, 30], [50, 70]]
    assert at("top-1", "minutes") == [[1, 5], [50, 70]]
    assert at("loss by step", "epoch") == [[1, 2, 3], [2, 1, 0.5]]
    assert comparison.curves([group], "top-1, EMA") == []


def test_every_measure_of_a_training_is_there(tmp_path):
    recipe = Recipe(runs_dir=str(tmp_path), train_fraction=0.1, epochs=1, workers=0, ema_decay=0.9)
    list(training.fit(recipe, Run(recipe.folder)))
    [group] = comparison.compare([recipe.folder]).groups
    for measure in comparison.MEASURES:
        for by in comparison.AXES:
            [(name, x, y)] = comparison.curves([group], measure, by)
            assert name == recipe.name and len(x) == len(y) > 0 and np.isfinite(x).all()
