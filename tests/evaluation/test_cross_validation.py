"""Out-of-fold predictions: every image once, by the run that did not train on it."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import write_list
from helpers import train

from workbench import data, evaluation, runs, training
from workbench.evaluation.comparison import ComparisonError
from workbench.recipe import Recipe, RecipeError
from workbench.sweep import fold_report, folder_of, sweep
from workbench.ui import widgets

FOLDS = [f"{i}/3" for i in (1, 2, 3)]


@pytest.fixture
def recipe(image_folder, tmp_path):
    rows = [f"{c}/{i}.png,{c},cam{i % 2},x" for c in "abc" for i in range(6)]
    write_list(image_folder / "t.csv", "file,label,camera,run", *rows)
    return Recipe(name="cv", dataset="files", data_dir=str(image_folder), train_list="t.csv",
                  epochs=1, workers=0, device="cpu", runs_dir=str(tmp_path / "runs"))  # fmt: skip


def test_a_sweep_over_folds_ends_with_all_predictions_in_one_table(recipe):
    axes = {"fold": FOLDS, "seed": [0, 1]}
    rows = list(sweep(recipe, axes))
    assert {row["state"] for row in rows} == {"finished"} and len(rows) == 6
    folder = folder_of(recipe, axes)
    table = pd.read_parquet(folder / "out_of_fold.parquet")
    assert (
        table.groupby("recipe").file.agg(["size", "nunique"]).to_numpy().tolist() == [[18, 18]] * 2
    )
    assert set(table.recipe) == {"seed=0", "seed=1"} and set(table.run_) == {"x"}
    for row in rows:
        run = runs.Run(folder / row["run"])
        ours = table[table.run == row["run"]].reset_index(drop=True)
        pd.testing.assert_frame_equal(ours.drop(columns=["run", "recipe"]), run.predictions())
        val = data.load_dataset(recipe.replace(fold=row["fold"])).val
        assert ours.file.tolist() == val.file.tolist()
    shares = evaluation.by_column(table[table.recipe == "seed=1"], "camera")
    assert shares.images.tolist() == [9, 9] and shares.index.tolist() == ["cam0", "cam1"]
    one = evaluation.out_of_fold(folder / row["run"] for row in rows if row["seed"] == 1)
    assert set(one.recipe) == {"all"} and len(one) == 18


def test_a_sweep_over_folds_and_ema_decay_joins_the_ema_weights_which_alone_differ(recipe):
    axes = {"fold": FOLDS, "ema_decay": [0.01, 0.999]}
    recipe = recipe.replace(lr=0.1)
    assert {row["state"] for row in sweep(recipe, axes)} == {"finished"}
    folder = folder_of(recipe, axes)
    table = pd.read_parquet(folder / "out_of_fold.parquet")
    assert set(table.weights) == {"ema"}
    losses = [rows.loss.to_numpy() for _, rows in table.groupby("recipe")]
    assert len(losses) == 2 and not np.allclose(*losses)
    top1 = table.assign(right=table.class1 == table.label).groupby("recipe").right.mean()
    for name, share in top1.items():
        assert re.search(rf"{name} +18 +{100 * share:.2f} ", fold_report(folder, axes))


def test_weights_and_teachers_of_another_fold_are_warned_of(recipe, tmp_path, command):
    def written(**options) -> str:
        """A run folder as far as it is read here."""
        run = recipe.replace(name=f"run{len([*tmp_path.iterdir()])}", **options)
        (tmp_path / run.name).mkdir()
        run.to_yaml(tmp_path / run.name / "recipe.yaml")
        return str(tmp_path / run.name)

    def texts(**options) -> list[str]:
        one = recipe.replace(**options)
        return training.trained_on_validation(one, data.load_dataset(one))

    first = written(fold="1/3")
    again = written(fold="1/3", weights=first)
    [text] = texts(fold="2/3", weights=first)
    assert text.startswith(f"{first} was trained on 6 of the 6 validation images")
    file = f"{first}/best.safetensors"
    for start in ({"resume_from": first}, {"teacher": [first]}, {"weights": file}):
        assert texts(fold="1/3", **start) == [] and len(texts(fold="2/3", **start)) == 1
    assert len(texts(fold="2/3", teacher=[again])) == 2  # it has started from the first
    # Images are held out by hash: those of a third are among those of a half.
    third = written(val_fraction=0.34)
    assert "on 3 of the 9 val" in texts(val_fraction=0.5, weights=third)[0]
    assert texts(val_fraction=0.2, weights=third) == texts(fold="1/3", weights="nowhere") == []
    recipe.replace(fold="2/3", resume_from=first).to_yaml(tmp_path / "params.yaml")
    assert f"warning: {text} [its" in command("doctor", tmp_path / "params.yaml").stdout


def test_a_run_from_weights_of_another_fold_says_so_at_its_start_and_end(recipe, capsys):
    first = train(recipe.replace(fold="1/3"))
    second = recipe.replace(name="second", fold="2/3", weights=str(first.path))
    progress = widgets.Progress(run := runs.Run(second.folder))
    for row in training.fit(second, run):
        progress.show(row)
    [text] = run.environment()["trained_on_validation"]
    assert first.status()["message"].endswith("images after 1 epoch")
    assert run.status()["message"].endswith(f"after 1 epoch; {text}")
    assert f"\n{text}\n" in capsys.readouterr().out


def test_folds_of_the_embedded_sets_are_of_their_training_images():
    whole = data.load_dataset(Recipe()).train
    parts = [data.load_dataset(Recipe(fold=fold)) for fold in FOLDS]
    assert sorted(f for part in parts for f in part.val.file) == sorted(whole.file)
    for part in parts:
        assert len(part.train) + len(part.val) == len(whole) == 1297
        assert np.ptp(part.val.label.value_counts()) <= np.ptp(whole.label.value_counts()) / 3 + 1
    with pytest.raises(RecipeError, match="group_column: 'x' has no effect, since dataset"):
        Recipe(fold="1/3", group_column="x")


@pytest.mark.parametrize(
    "change, says",
    [
        (
            "a fold is missing",
            r"all: there are the folds \['1/3', '2/3'\]; each, .* is needed once",
        ),
        ("a fold is there twice", r"the folds \['1/3', '1/3', '2/3', '3/3'\]"),
        ("other numbers of folds", r"the folds \['1/2', '1/3', '2/3'\]"),
        ("no folds", r"the folds \[''\]"),
        ("an image is missing", "17 predictions are of 17 images, some missing or there twice"),
        ("an image is there twice", "18 predictions are of 17 images, some missing or there twice"),
        ("other images", "18 predictions are of 18 images, some missing or there twice"),
        ("nothing", "there is no run of a fold"),
    ],
)
def test_folds_that_are_no_partition_are_refused_in_a_sentence(recipe, tmp_path, change, says):
    made = [stand_in(tmp_path / f"{i}", recipe.replace(fold=f), i) for i, f in enumerate(FOLDS)]
    assert len(evaluation.out_of_fold(made)) == 18
    if change == "a fold is missing":
        made.pop()
    elif change == "a fold is there twice":
        made.append(stand_in(tmp_path / "again", recipe.replace(fold="1/3"), 0))
    elif change == "other numbers of folds":
        made[2] = stand_in(tmp_path / "half", recipe.replace(fold="1/2"), 0)
    elif change == "no folds":
        made = [stand_in(tmp_path / "none", recipe, 0)]
    elif change == "nothing":
        made = []
    else:
        frame = pd.read_parquet(made[1] / "predictions.parquet")
        if change == "an image is missing":
            frame = frame.iloc[1:]
        elif change == "an image is there twice":
            frame.loc[0, "file"] = "0.png"  # of the first fold
        else:
            facts = json.loads((made[1] / "environment.json").read_text())
            (made[1] / "environment.json").write_text(json.dumps(facts | {"train_images": 13}))
        frame.to_parquet(made[1] / "predictions.parquet")
    with pytest.raises(ComparisonError, match=says) as error:
        evaluation.out_of_fold(made)
    assert "\n" not in str(error.value)


def stand_in(path, recipe: Recipe, part: int):
    """A run folder with predictions of six of 18 images."""
    path.mkdir()
    recipe.to_yaml(path / "recipe.yaml")
    facts = {"classes": ["a", "b", "c"], "train_images": 12, "val_images": 6}
    (path / "environment.json").write_text(json.dumps(facts))
    frame = pd.DataFrame({"file": [f"{i}.png" for i in range(6 * part, 6 * part + 6)], "list": 0})
    frame.assign(weights="raw", label=0, class1=0).to_parquet(path / "predictions.parquet")
    return path


@pytest.mark.parametrize(
    "folds, says", [("1/3,2/3", "missing: 3/3"), ("1/2,2/2,1/3", "given: 1/2, 2/2, 1/3")]
)
def test_a_sweep_over_some_folds_ends_well_and_names_the_missing_ones(
    recipe, tmp_path, command, folds, says
):
    recipe.to_yaml(params := tmp_path / "cv.yaml")
    done = command("sweep", params, f"fold={folds}")
    assert done.returncode == 0 and says in done.stdout
    assert not (folder_of(recipe, ["fold"]) / "out_of_fold.parquet").exists()


def test_the_command_prints_top1_by_fold_and_recipe(command, tmp_path):
    params = tmp_path / "cv.yaml"
    Recipe(name="cv", train_fraction=0.05, epochs=1, workers=0, device="cpu",
           runs_dir=str(tmp_path)).to_yaml(params)  # fmt: skip
    done = command("sweep", params, "fold=1/2,2/2")
    assert done.returncode == 0, done.stderr
    assert "fold=1-2-seed0" in done.stdout and "all 1297" in " ".join(done.stdout.split())
