"""Sweeps: the runs are those of separate trainings, in any order of kills and restarts."""

import random
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
from helpers import train

from workbench import ROOT, runs, training
from workbench.evaluation import comparison
from workbench.recipe import Recipe, RecipeError
from workbench.sweep import combinations, finished, folder_of, parse_axes, read_sweep_file, sweep
from workbench.ui import plots

AXES = {"lr": [0.05, 0.2], "seed": range(2)}


@pytest.fixture
def recipe(tmp_path):
    options = {"train_fraction": 0.1, "epochs": 2, "workers": 0, "runs_dir": str(tmp_path)}
    return Recipe(name="small", **options)


@pytest.mark.parametrize(
    "words, axes",
    [
        (["lr=0.03,0.1", "seed=0-2"], {"lr": ["0.03", "0.1"], "seed": ["0", "1", "2"]}),
        (["crop_scale=[0.2,1.0],[0.5,1.0]"], {"crop_scale": ["[0.2,1.0]", "[0.5,1.0]"]}),
        (["weights=a-1,b", "epochs=2,4"], {"weights": ["a-1", "b"], "epochs": ["2", "4"]}),
        (["weights=1-2"], {"weights": ["1-2"]}),  # a range of an option of whole numbers only
    ],
)
def test_axes_are_parsed(words, axes):
    assert parse_axes(words) == axes


@pytest.mark.parametrize(
    "axes, says",
    [
        ({}, "name options and values"),
        ({"lr": []}, "name options and values"),
        ({"lrr": [1]}, "lrr: no such option; the nearest is 'lr'"),
        ({"workers": [0, 1]}, "workers: does not change the weights"),
        ({"lr": ["0.1", 0.1]}, r"lr=0.1-seed0 is there twice \[lr=0.1\]"),
        ({"lr": [0.1, -1, -2], "seed": [0, 1]},
         r"lr: -1.* \[lr=-1 seed=0; lr=-1 seed=1\]\n.*lr: -2.* \[lr=-2 seed=0; lr=-2 seed=1\]"),
        ({"randaug_n": [0, 1], "randaug_m": [3.0]}, r"no effect.*\[randaug_n=0 randaug_m=3.0\]"),
    ],
)  # fmt: skip
def test_refused_combinations_are_all_named_before_the_first_run(recipe, tmp_path, axes, says):
    with pytest.raises(RecipeError, match=says):
        next(sweep(recipe, axes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["lr", "lr=1 lr=2"])
def test_axes_without_values_or_twice_are_refused(words):
    with pytest.raises(RecipeError, match="lr: wanted OPTION=VALUE"):
        parse_axes(words.split())


def test_a_value_is_an_override_and_names_the_folder(recipe):
    recipe = recipe.replace(randaug_n=2, randaug_m=9.0)
    off, on = combinations(recipe, {"randaug_n": [0, 2]})
    assert off.randaug_m == 7.0 and "randaug_m" in off.notes[0] and on.randaug_m == 9.0
    [one] = combinations(recipe, {"weights": ["runs/x y"], "crop_scale": [[0.5, 1]], "seed": [3]})
    assert one.folder.name == "weights=runs-x-y_crop_scale=-0.5,-1.0--seed3"


def test_the_runs_of_a_sweep_are_those_of_separate_trainings(recipe):
    rows = list(sweep(recipe, AXES))
    assert [(row["lr"], row["seed"]) for row in rows] == [
        (a, b) for a in AXES["lr"] for b in (0, 1)
    ]
    folder = folder_of(recipe, AXES)
    for row in rows:
        alone = train(recipe.replace(name=f"lr{row['lr']}", lr=row["lr"], seed=row["seed"]))
        run = runs.Run(folder / row["run"])
        assert run.file("metrics.csv").read_bytes() == alone.file("metrics.csv").read_bytes()
        assert row["top1"] == run.metrics().top1.iloc[-1] and row["state"] == "finished"
    before = runs.Run(folder / rows[0]["run"]).file("last.pt").stat().st_mtime_ns
    assert list(sweep(recipe, AXES)) == rows  # nothing is trained again
    assert runs.Run(folder / rows[0]["run"]).file("last.pt").stat().st_mtime_ns == before
    axes, base = read_sweep_file(folder)
    assert axes == {"lr": [0.05, 0.2], "seed": [0, 1]} and base == recipe
    table = comparison.compare(finished(folder)).table
    assert table.recipe.tolist() == ["lr=0.05", "lr=0.2"] and table.seeds.tolist() == [2, 2]
    assert table.top1[0] == pytest.approx((rows[0]["top1"] + rows[1]["top1"]) / 2)
    assert (folder / "top1.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(runs.RunError, match=r"sweep of another recipe \(\['hflip'\] differ\)"):
        next(sweep(recipe.replace(hflip=0.5), AXES))


def test_a_run_that_fails_does_not_end_the_sweep(recipe):
    rows = list(sweep(recipe, {"lr": [1e30, 0.1]}))
    assert [row["state"] for row in rows] == ["failed", "finished"]
    assert rows[0]["message"].startswith("TrainingError: the loss is") and rows[0]["top1"] is None
    assert [path.name for path in finished(folder_of(recipe, ["lr"]))] == ["lr=0.1-seed0"]


def test_a_stop_ends_the_sweep_and_the_next_call_resumes(recipe, monkeypatch):
    fit = training.fit

    def stopped(recipe, run, **options):
        for row in fit(recipe, run, **options):
            run.file("STOP").touch()
            yield row

    monkeypatch.setattr(training, "fit", stopped)
    assert [row["state"] for row in sweep(recipe, AXES)] == ["stopped"]
    monkeypatch.undo()
    assert [row["state"] for row in sweep(recipe, AXES)] == ["finished"] * 4


def test_the_figure_of_a_sweep_has_means_and_intervals():
    table = pd.DataFrame({"top1": [90.0, 80.0], "low": [88.0, 79.0], "high": [91.0, 82.0]})
    groups = [
        SimpleNamespace(recipe=r) for r in ({"lr": 0.3, "model": "a"}, {"lr": 0.03, "model": "b"})
    ]
    found = SimpleNamespace(table=table, groups=groups)
    [ax] = plots.top1_by_option(found, "lr").axes
    assert ax.get_xscale() == "log"
    assert ax.lines[0].get_xydata().tolist() == [[0.3, 90.0], [0.03, 80.0]]
    assert [line.get_ydata().tolist() for line in ax.lines[1:3]] == [[88.0, 79.0], [91.0, 82.0]]
    assert plots.top1_by_option(found, "model").axes[0].get_xscale() == "linear"


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_ends_with_the_same_results(tmp_path):
    axes = {"lr": [0.03, 0.1, 0.3], "seed": range(3)}
    options = {"train_fraction": 0.3, "epochs": 3, "checkpoint_minutes": 0.0, "workers": 0}
    params, tables = tmp_path / "small.yaml", []
    for kills in (0, 6):
        recipe = Recipe(name="small", runs_dir=str(tmp_path / str(kills)), **options)
        recipe.to_yaml(params)
        words = [sys.executable, "-m", "workbench", "sweep", params, "lr=0.03,0.1,0.3", "seed=0-2"]
        rng, code = random.Random(0), None
        for kill in range(kills):
            seen = time.monotonic()
            with subprocess.Popen(words, cwd=ROOT) as process:
                while not folder_of(recipe, axes).exists() and process.poll() is None:
                    time.sleep(0.1)
                started = time.monotonic() - seen
                time.sleep(rng.uniform(0, 4) + (kill > 0) * started)
                process.kill()
        code = subprocess.run(words, cwd=ROOT).returncode
        assert code == 0
        files = sorted(folder_of(recipe, axes).glob("*/metrics.csv"))
        tables.append({file.parent.name: file.read_bytes() for file in files})
    assert len(tables[0]) == 9 and tables[0] == tables[1]
