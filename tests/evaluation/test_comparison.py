"""Comparisons of run folders: groups, verdicts, cautions, what changed between recipes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import IMAGES, JUDGED, run_folder
from sklearn.metrics import confusion_matrix

from workbench import evaluation, training
from workbench.evaluation import comparison, metrics
from workbench.evaluation.comparison import ComparisonError, compare
from workbench.evaluation.recipe_diff import recipe_difference
from workbench.evaluation.statistics import Difference, difference, top1_interval
from workbench.evaluation.verdict import Verdict
from workbench.recipe import Recipe
from workbench.runs import Run


def edit_json(path: Path, name: str, **values) -> None:
    file = path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_predictions(path: Path, change) -> None:
    frame = pd.read_parquet(path / "predictions.parquet")
    change(frame).to_parquet(path / "predictions.parquet", index=False)


def test_top1_by_the_columns_of_a_table_has_the_intervals_of_the_whole(six):
    cameras = np.where(np.arange(IMAGES) % 3 == 0, "left", "right")
    with_columns = lambda f: f.assign(camera=cameras, number=np.arange(IMAGES), site=None)
    assert compare(six).by_column().empty
    for path in six:
        edit_predictions(path, with_columns)
    found = compare(six)
    table = found.by_column()
    assert table[["column", "value", "recipe"]].drop_duplicates().to_numpy().tolist()[:4] == [
        [column, value, name]
        for column, value in (("camera", "left"), ("camera", "right"))
        for name in ("plain", "better")
    ]
    assert set(table.column) == {"camera", "site"}  # of numbers there are more than 20
    for row in table[table.column == "camera"].itertuples():
        correct = found.group(row.recipe).correct[:, cameras == row.value]
        assert row.images == correct.shape[1] and row.top1 == pytest.approx(100 * correct.mean())
        assert (row.low, row.high) == top1_interval(correct)
    one = compare(six[:1]).by_column().set_index("value").loc[["left", "right"]]
    ours = metrics.by_column(Run(six[0]).predictions(), "camera")
    for name in ("images", "top1", "low", "high"):
        assert one[name].tolist() == pytest.approx(ours[name].tolist())


@pytest.fixture
def six(tmp_path) -> list[Path]:
    """Three seeds of a recipe, three of a better one."""
    return [
        *(run_folder(tmp_path, "plain", s) for s in range(3)),
        *(run_folder(tmp_path, "better", s, top1=0.9, lr=0.2, hflip=0.5) for s in range(3)),
    ]


def members(result: comparison.Comparison) -> list[tuple[str, list[str]]]:
    return [(group.name, [run.name for run in group.runs]) for group in result.groups]


# ---- groups and table


def test_the_table_has_a_row_per_recipe_with_its_seeds(six):
    table = compare(six).table.set_index("recipe")
    assert table.index.tolist() == ["plain", "better"]
    for name, paths in (("plain", six[:3]), ("better", six[3:])):
        frames = [Run(p).predictions("raw") for p in paths]
        correct = np.stack([f.class1 == f.label for f in frames])
        row, top1 = table.loc[name], 100 * correct.mean(1)
        assert (row.top1, row.sd) == pytest.approx((np.mean(top1), np.std(top1, ddof=1)))
        assert (row.low, row.high) == top1_interval(correct)
        assert (row.interval, row.seeds, row.images) == ("seeds and images", 3, IMAGES)
        assert row.top5 == 100.0 and row.minutes == 1.0 and row["img/s"] == 300.0
    assert table.differs.tolist() == ["", "lr 0.2 (0.1), hflip 0.5 (0.0)"]


def test_recipes_are_grouped_by_options_not_by_name(tmp_path):
    one = run_folder(tmp_path / "x", "name", 0)
    same = run_folder(tmp_path / "y", "another", 1)
    other = run_folder(tmp_path / "z", "name", 0, lr=0.2)
    expected = [("name", ["name-seed0", "another-seed1"]), ("name-seed0", ["name-seed0"])]
    assert members(compare([one, same, other])) == expected


def test_a_seed_counts_once_and_repetitions_are_named(tmp_path):
    first, again = (run_folder(tmp_path / side, "name", 0) for side in "xy")
    assert compare([first, first]).cautions == []
    result = compare([first, again])
    assert members(result) == [("name", ["name-seed0"])]
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
    assert members(result) == [("a", [finished.name])]
    [caution] = [c for c in result.cautions if "left out" in c]
    assert caution.startswith("stopped is left out") and "has not finished (stopped)" in caution


def test_folders_may_be_moved_and_names_are_complete(six, tmp_path, monkeypatch):
    name = "ümläut 漢字 | " + "long " * 30
    paths = [*six, run_folder(tmp_path, name, 0, lr=0.3)]
    (tmp_path / "moved").mkdir()
    moved = [shutil.move(path, tmp_path / "moved" / path.name) for path in paths]
    monkeypatch.chdir(tmp_path)
    result = compare(moved)
    assert result.verdicts[0].significant and result.table.recipe[2] == name
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
    assert recipe_difference(old, old) == {}, "values of an older version are no error"


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
    [single] = compare([six[0], six[3]]).verdicts
    assert "one run each on 400 images" in str(single)
    assert str(single).endswith("two runs, train more seeds to compare the recipes")


def runs_of(*top1: float, n: int) -> np.ndarray:
    """Runs that are correct on the first images, (runs, n)."""
    return np.stack([np.arange(n) < share * n for share in top1])


def test_a_difference_that_is_not_significant_is_small_large_or_undecided():
    small = difference(runs_of(0.9, 0.9, n=5000), runs_of(0.9, 0.9002, n=5000))
    bound = max(-small.low, small.high)
    text = f"b and a are within {bound:.2f} points: +0.01 (95 % interval -"
    assert bound < 1 and str(Verdict("b", "a", small)).startswith(text)
    large = str(Verdict("b", "a", difference(runs_of(0.9, 0.9, n=10), runs_of(0.6, n=10), 10)))
    text = "a large but not significant difference between b and a: -30.00 points (95 %"
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
    for verdict in verdicts:
        d = verdict.difference
        assert verdict.significant == (verdict.name == "collapsed") == (not d.low <= 0 <= d.high)
        assert -100 <= d.low < d.high <= 100 and " adjusted for 10 comparisons" in str(verdict)
    assert len(verdicts) == 10 and str(verdict).startswith("collapsed is worse than good by 8")


def test_a_p_is_not_rounded_across_its_level_and_a_bound_where_it_underflows():
    for p in (0.0496, 0.0503):
        d = Difference(1.0, 0.1, 1.9, p, (1, 1), 500, 2.0, p)
        assert f"p {p}," in str(Verdict("b", "a", d))
    a, b = np.array([[1, 0, 0]], bool), np.array([[1, 1, 0]], bool)
    d = difference(a, b, 3, np.array([2000, 6000, 2000]))
    text = "p < 1e-16, < 3e-16 adjusted for 3 comparisons,"
    assert text in str(Verdict("b", "a", d))


# ---- what is refused, what is a caution


def test_other_images_classes_or_labels_are_refused(six):
    text = "better-seed0 was validated on other images than plain-seed0: "
    edit_json(six[3], "environment.json", val_data="w")
    with pytest.raises(ComparisonError, match=f"{text}the fingerprints"):
        compare(six)
    for classes in (JUDGED[::-1], JUDGED[:3]):
        edit_json(six[3], "environment.json", val_data="v", classes=classes)
        with pytest.raises(ComparisonError, match=f"{text}the classes or their order"):
            compare(six)
    edit_json(six[3], "environment.json", classes=JUDGED)
    edit_predictions(six[3], lambda f: f.assign(label=(f.label + 1) % 4))
    with pytest.raises(ComparisonError, match=f"{text}0 of 400 have the same file and label"):
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
    assert "better-seed1: 3 images left out that other runs lack" in result.cautions
    edit_predictions(six[2], lambda f: f.iloc[:300])
    with pytest.raises(ComparisonError, match="plain-seed2 .*: 300 of 400 have the same file"):
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
    result = compare([first, other])
    assert str(result.verdicts[0]).startswith("preliminary, not all runs are finished: ")
    assert result.table.epochs.tolist() == ["2 of 8", "2 of 20"]
    assert result.sentences()[1:] == [
        "caution: other-seed0 is stopped, evaluated at epoch 2 of 20",
        "caution: other has image_size 64, plain 32",
        "caution: other has val_resize 72, plain 32",
        "caution: other has epochs 20, plain 8",
        "caution: other and plain have different training images",
    ]


def test_runs_with_other_training_images_are_no_seeds_of_one_recipe(tmp_path):
    """As with data_dir, in which an option may stay the same and the images differ."""
    clean = [run_folder(tmp_path, "clean", seed, top1=0.9) for seed in (0, 1)]
    noisy = [run_folder(tmp_path, "noisy", seed, top1=0.5) for seed in (0, 1, 2)]
    for folder in noisy:
        edit_json(folder, "environment.json", data="e")
    result = compare([*clean, *noisy])
    assert {g.name: len(g.runs) for g in result.groups} == {"clean": 2, "noisy": 3}
    assert str(result.verdicts[0]).startswith("noisy is worse than clean by 37.96 points")
    assert result.cautions == ["noisy and clean have different training images"]


def test_a_comparison_of_raw_weights_says_that_ema_decay_does_not_change_them(tmp_path):
    folders = [
        run_folder(tmp_path, name, ema_decay=decay) for name, decay in (("a", 0.9), ("b", None))
    ]
    [caution] = compare(folders).cautions
    assert caution.startswith("b and a differ in ema_decay, which does not change the raw weights")
    with_ema = lambda f: pd.concat([f, f.assign(weights="ema")])
    edit_predictions(folders[0], with_ema)
    assert not any("ema_decay" in text for text in compare(folders, weights="ema").cautions)


def test_an_unfinished_run_is_named_with_the_epoch_of_its_predictions(tmp_path):
    path = run_folder(tmp_path, "sparse", eval_every=2)
    edit_json(path, "status.json", state="stopped")
    with (path / "metrics.csv").open("a") as file:
        file.write("3,6,\n")  # epoch, step, and no validation
    result = compare([path])
    assert result.cautions == ["sparse-seed0 is stopped, evaluated at epoch 2 of 8"]
    assert result.table.epochs.tolist() == ["2 of 8"]


def test_of_equal_trials_of_optuna_the_best_is_seldom_significantly_better(tmp_path):
    """The first of them was chosen for its top-1, so that every pair was compared."""
    rng, significant = np.random.default_rng(0), 0
    folders = [run_folder(tmp_path, f"trial{i:02d}", lr=0.01 * (i + 1)) for i in range(20)]
    (tmp_path / "study.log").touch()
    frame = pd.read_parquet(folders[0] / "predictions.parquet")
    for _ in range(40):
        easy, sides = rng.random(IMAGES) < 0.9, []
        for folder in folders:
            right = np.where(rng.random(IMAGES) < 0.85, easy, rng.random(IMAGES) < 0.9)
            wrong_class = frame.label.where(right, (frame.label + 1) % 4)
            frame.assign(class1=wrong_class).to_parquet(folder / "predictions.parquet", index=False)
            sides.append((-right.mean(), folder))
        verdicts = compare([folder for _, folder in sorted(sides)]).verdicts
        assert verdicts[0].difference.comparisons == 190
        significant += any(verdict.significant for verdict in verdicts)
    assert significant <= 4


def test_ema_weights_are_taken_where_a_run_has_them(six):
    edit_predictions(six[3], lambda f: pd.concat([f, f.assign(weights="ema", class1=f.label)]))
    assert compare(six[3:4]).table.top1[0] < 100
    result = compare(six[2:4], weights="ema")
    assert result.group("better").top1[0] == 100
    text = "raw weights of plain-seed2 are compared: there are no EMA weights"
    assert text in result.cautions
    with pytest.raises(ComparisonError, match="allowed are raw and ema"):
        compare(six, weights="best")


def test_runs_that_cannot_be_compared_are_named(six, tmp_path):
    (six[0] / "predictions.parquet").unlink()
    (six[1] / "predictions.parquet").write_bytes(b"PAR1 half")
    (six[2] / "environment.json").unlink()
    for paths, options, message in [
        ([], {}, "no run to compare"),
        ([tmp_path / "nowhere"], {}, "nowhere is no readable run"),
        (six, {}, "plain-seed0 has no predictions.*leave .*plain-seed0 out"),
        (six[1:], {}, "leave .*plain-seed1 out"),
        (six[2:], {}, "leave .*plain-seed2 out"),
        (six[3:], {"baseline": "x"}, "no recipe 'x' here; there are better"),
    ]:
        with pytest.raises(ComparisonError, match=message):
            compare(paths, **options)


# ---- what changed


def test_flips_and_classes_and_confusions_and_agreement_of_two_runs(tmp_path):
    """Eight images; b loses the second and gains the fifth and sixth."""
    paths = [run_folder(tmp_path, "a", 0, n=8), run_folder(tmp_path, "b", 0, n=8, lr=0.2)]
    predicted = ([0, 1, 2, 3, 3, 3, 3, 3], [0, 2, 2, 3, 0, 1, 3, 3])
    for path, classes in zip(paths, np.int32(predicted), strict=True):
        edit_predictions(path, lambda f, c=classes: f.assign(label=np.arange(8) % 4, class1=c))
    two = compare(paths)
    flips = two.flips("b")
    assert flips.file.tolist() == ["1.png", "4.png", "5.png"]
    assert flips.before.tolist() == [1, 3, 3] and flips.after.tolist() == [2, 0, 1]
    assert flips.change.tolist() == [-1, 1, 1]
    table = two.by_class().set_index("class")
    assert table.a.tolist() == [50, 50, 50, 100] and table.b.tolist() == [100, 50, 50, 100]
    assert table.images.tolist() == [2, 2, 2, 2]
    expected = pd.DataFrame(0.0, JUDGED, JUDGED)
    expected.loc["ant", "ant"], expected.loc["ant", "dog"] = 1, -1
    expected.loc["bee", "cat"], expected.loc["bee", "dog"] = 1, -1
    pd.testing.assert_frame_equal(two.confusion("b"), expected)
    assert two.agreement().to_numpy().tolist() == [[100, 62.5], [62.5, 100]]


def test_the_change_of_confusions_is_that_of_scikit_learn(tmp_path):
    rng, names, paths = np.random.default_rng(0), [f"class {i}" for i in range(12)], []
    label = rng.integers(0, 12, 900)
    for name, seed, lr in (("a", 0, 0.1), ("a", 1, 0.1), ("b", 0, 0.2)):
        paths.append(run_folder(tmp_path, name, seed, n=900, lr=lr))
        guess = np.where(rng.random(900) < 0.7, label, rng.integers(0, 12, 900))
        edit_predictions(paths[-1], lambda f, g=guess: f.assign(label=label, class1=np.int32(g)))
        edit_json(paths[-1], "environment.json", classes=names)
    result = compare(paths)
    old, new = (
        np.mean([confusion_matrix(f.label, f.class1) for f in g.predictions], axis=0)
        for g in result.groups
    )
    np.testing.assert_allclose(result.confusion("b"), new - old, atol=1e-12)
    totals = abs(new - old).sum(0) + abs(new - old).sum(1)
    most = sorted(np.argsort(-totals, kind="stable")[:8])
    part = result.confusion("b", most=8)
    np.testing.assert_allclose(part, (new - old)[np.ix_(most, most)], atol=1e-12)
    assert part.index.tolist() == [names[k] for k in most] and part.attrs["classes"] == 12


def test_the_majority_of_the_runs_decides_the_prediction_of_a_recipe(six):
    result = compare(six)
    frames = [Run(p).predictions("raw").class1.to_numpy() for p in six[:3]]
    votes = [np.bincount([f[i] for f in frames], minlength=4).argmax() for i in range(IMAGES)]
    assert result.group("plain").majority.tolist() == votes
    flips = result.flips("better")
    assert flips.change.abs().is_monotonic_decreasing
    assert (flips.change == flips.correct_after - flips.correct_before).all()


def test_curves_go_by_epoch_step_or_minutes(tmp_path):
    path = run_folder(tmp_path, "a")
    (path / "metrics.csv").write_text("epoch,step,top1\n1,10,50.0\n2,20,\n3,30,70.0\n")
    (path / "steps.csv").write_text(
        "step,seconds,lr,loss\n10,60.0,0.1,2.0\n20,120.0,0.1,1.0\n30,300.0,0.1,0.5\n"
    )
    groups = compare([path]).groups
    at = lambda *words: [list(part) for part in comparison.curves(groups, *words)[0][1:]]
    assert at() == [[1, 3], [50, 70]]
    assert at("top-1", "step") == [[10, 30], [50, 70]]
    assert at("top-1", "minutes") == [[1, 5], [50, 70]]
    assert at("loss by step", "epoch") == [[1, 2, 3], [2, 1, 0.5]]
    assert comparison.curves(groups, "top-1, EMA") == []


def test_every_measure_of_a_training_is_there(tmp_path):
    recipe = Recipe(runs_dir=str(tmp_path), train_fraction=0.1, epochs=1, workers=0, ema_decay=0.9)
    list(training.fit(recipe, Run(recipe.folder)))
    groups = compare([recipe.folder]).groups
    for measure in comparison.MEASURES:
        for by in comparison.AXES:
            [(name, x, y)] = comparison.curves(groups, measure, by)
            assert name == recipe.name and len(x) == len(y) > 0 and np.isfinite(x).all()


def test_custom_metrics_are_columns_with_the_mean_over_seeds_empty_without(tmp_path):
    folders = [
        run_folder(tmp_path, "plain"),
        *(run_folder(tmp_path, "own", s, lr=0.2) for s in (0, 1)),
    ]
    for seed, folder in enumerate(folders[1:]):
        file = folder / "metrics.csv"
        pd.read_csv(file).assign(worst=[1.0, 3.0 + seed], ema_worst=9.0).to_csv(file, index=False)
    table = comparison.compare(folders).table
    assert table.worst.isna().tolist() == [True, False] and table.worst[1] == 3.5
    assert "ema_worst" not in table and " | 3.50 |" in comparison.markdown(table)


def test_a_custom_metric_with_the_name_of_another_column_replaces_nothing(tmp_path):
    folder = run_folder(tmp_path, "own")
    plain = comparison.compare([folder]).table
    file, own = folder / "metrics.csv", ["low", "ece", "minutes"]
    pd.read_csv(file).assign(**dict.fromkeys(own, 77.0)).to_csv(file, index=False)
    table = comparison.compare([folder]).table
    pd.testing.assert_frame_equal(table[plain.columns], plain)
    assert (table[[f"{name}_" for name in own]] == 77).all(axis=None)


@pytest.mark.parametrize("missing", [2, 100], ids=["repeated", "not repeated"])
def test_repeated_images_are_compared_unless_a_run_lacks_an_image(tmp_path, missing):
    folders = [run_folder(tmp_path, name, lr=lr) for name, lr in (("plain", 0.1), ("new", 0.2))]
    for folder in folders:
        edit_predictions(folder, lambda frame: pd.concat([frame, frame.head(5)]))
    assert compare(folders).groups[0].correct.shape == (1, IMAGES + 5)
    edit_predictions(folders[1], lambda frame: frame.reset_index(drop=True).drop(index=missing))
    with pytest.raises(ComparisonError, match="other images than .*list each image once"):
        compare(folders)


def test_validation_images_that_are_there_twice_are_a_caution_said_once(tmp_path):
    folders = [run_folder(tmp_path, "plain", seed) for seed in (0, 1)]
    assert not compare(folders).cautions
    for folder in folders:
        edit_json(folder, "environment.json", val_images=1200, val_repeats=40)
    edit_json(folders[0], "environment.json", train_val_duplicates=3)
    of = "of the 1,200 validation images are"
    assert [text.partition(";")[0] for text in compare(folders).cautions] == [
        f"3 {of} in training too, so top-1 is too high",
        f"40 {of} repeated, so intervals are too narrow",
    ]
    assert evaluation.headline(Run(folders[1])).count("are repeated, so intervals are") == 1


@pytest.mark.parametrize(
    "first, other",
    [
        ({"initial_weights": "a" * 12}, {"initial_weights": "b" * 12}),
        ({"teachers": [{"digest": "a" * 12}]}, {"teachers": [{"digest": "b" * 12}]}),
    ],
)
def test_runs_from_a_replaced_file_are_no_seeds_of_one_recipe(tmp_path, first, other):
    folders = [run_folder(tmp_path, "plain", seed) for seed in (0, 1)]
    for folder, facts in zip(folders, (first, other), strict=True):
        edit_json(folder, "environment.json", **facts)
    result = compare(folders)
    assert [len(group.runs) for group in result.groups] == [1, 1]
    assert any("may have had, other weights of a teacher" in text for text in result.cautions)
    edit_json(folders[1], "environment.json", **first)
    assert [len(group.runs) for group in compare(folders).groups] == [2]
