"""Sweeps: the runs are those of separate trainings, in any order of kills and restarts."""

import os
import random
import signal
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
from workbench.sweep import (
    combinations,
    finished,
    folder_of,
    in_processes,
    notes,
    parse_axes,
    read_sweep_file,
    sweep,
)
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
        (["loss_args={a: 1, b: 2},{a: 2}"], {"loss_args": ["{a: 1, b: 2}", "{a: 2}"]}),
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


def test_notes_name_the_combinations_that_share_them(recipe):
    recipe = recipe.replace(randaug_n=2, randaug_m=9.0).replace(randaug_n=1)
    found = combinations(recipe, {"randaug_n": [0, 2], "lr": [0.1, 0.2], "seed": [0, 1]})
    [note] = notes(recipe, found)
    assert "randaug_m" in note and note.endswith("[randaug_n=0_lr=0.1; randaug_n=0_lr=0.2]")
    assert notes(recipe, combinations(recipe, {"lr": [0.1, 0.2]})) == []


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
        assert run.file("summary.png").exists()
    before = runs.Run(folder / rows[0]["run"]).file("last.pt").stat().st_mtime_ns
    assert list(sweep(recipe, AXES)) == rows  # nothing is trained again
    assert runs.Run(folder / rows[0]["run"]).file("last.pt").stat().st_mtime_ns == before
    axes, base = read_sweep_file(folder)
    assert axes == {"lr": [0.05, 0.2], "seed": [0, 1]} and base == recipe
    table = comparison.compare(finished(folder)).table
    assert table.recipe.tolist() == ["lr=0.05", "lr=0.2"] and table.seeds.tolist() == [2, 2]
    assert table.top1[0] == pytest.approx((rows[0]["top1"] + rows[1]["top1"]) / 2)
    assert (folder / "top1.png").read_bytes()[:4] == b"\x89PNG"
    written = pd.read_csv(folder / "table.csv")
    assert written.lr.tolist() == [0.05, 0.2] and written.top1.tolist() == table.top1.tolist()
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


def test_two_options_are_a_map_with_means_and_seeds():
    options = [("lr", 0.1, 16, 90.0, 3), ("lr", 0.03, 16, 80.0, 2), ("lr", 0.1, 8, 70.0, 3)]
    table = pd.DataFrame([{"top1": top1, "seeds": seeds} for *_, top1, seeds in options])
    groups = [SimpleNamespace(recipe={"lr": lr, "batch_size": n}) for _, lr, n, *_ in options]
    found = SimpleNamespace(table=table, groups=groups)
    ax = plots.top1_by_two_options(found, "lr", "batch_size").axes[0]
    names = [[label.get_text() for label in axis.get_ticklabels()] for axis in (ax.yaxis, ax.xaxis)]
    assert names == [["0.1", "0.03"], ["16", "8"]] and ax.get_ylabel() == "lr"
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts == {(0, 0): "90.00\n3 seeds", (1, 0): "70.00\n3 seeds", (0, 1): "80.00\n2 seeds"}


# ---- several processes


def square(number: int) -> dict:
    """A task; of some numbers the process kills itself, or prints."""
    print("task", number, flush=True)
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"state": "finished", "square": number**2, "process": os.getpid()}


@pytest.mark.slow
def test_a_killed_process_is_one_failed_row_and_the_others_go_on(tmp_path):
    rows = dict(in_processes(square, range(6), 2, tmp_path / "log"))
    died = rows.pop(1)
    assert died["state"] == "failed" and "exit code -9" in died["message"]
    assert {n: row["square"] for n, row in rows.items()} == {0: 0, 2: 4, 3: 9, 4: 16, 5: 25}
    assert len({row["process"] for row in rows.values()} | {os.getpid()}) == 6
    assert sorted((tmp_path / "log").read_text().split("task ")) == [
        "",
        *(f"{n}\n" for n in range(6)),
    ]


@pytest.mark.slow
def test_runs_in_two_processes_are_those_of_one_with_the_same_threads(recipe, one_thread):
    rows = sorted(sweep(recipe.replace(workers=1), AXES, jobs=2), key=lambda row: row["run"])
    apart = list(sweep(recipe.replace(name="apart"), AXES))
    assert rows == apart and [row["state"] for row in rows] == ["finished"] * 4
    for row in rows:
        files = [folder_of(recipe.replace(name=name), AXES) / row["run"] / "metrics.csv"
                 for name in ("small", "apart")]  # fmt: skip
        assert files[0].read_bytes() == files[1].read_bytes()


def test_ctrl_c_between_two_runs_is_exit_code_3(recipe, tmp_path, monkeypatch, command):
    recipe.to_yaml(tmp_path / "small.yaml")
    words = "sweep", tmp_path / "small.yaml", "seed=0,1"
    read = runs.Run.metrics

    def interrupted(run):
        if run.path.name.endswith("seed0") and run.status()["state"] == "finished":
            os.kill(os.getpid(), signal.SIGINT)
        return read(run)

    monkeypatch.setattr(runs.Run, "metrics", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    done = command(*words)
    assert done.returncode == 3 and "stopped; the same command resumes" in done.stdout
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_runs_with_checkpoints(recipe, tmp_path, jobs, number):
    recipe = recipe.replace(epochs=40)
    recipe.to_yaml(tmp_path / "small.yaml")
    words = [sys.executable, "-m", "workbench", "sweep", tmp_path / "small.yaml", "seed=0-2"]
    found = [runs.Run(folder_of(recipe, []) / f"small-seed{seed}") for seed in range(jobs)]
    pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([*words, "--jobs", str(jobs)], **pipes) as process:
        while not all(run.file("metrics.csv").exists() for run in found):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        out, _ = process.communicate(timeout=100)
    assert process.returncode == 3 and "the same command resumes" in out
    for run in found:
        assert run.status()["state"] == "stopped" and run.file("last.pt").exists()
        assert run.load_checkpoint()["progress"]["step"] == run.status()["step"] > 0
    assert len(list(folder_of(recipe, []).glob("*/recipe.yaml"))) == jobs  # no other has begun


# ---- values that Optuna suggests

SPACE = {"lr": ["0.01:0.5:log"], "epochs": ["2:3"], "nesterov": [False, True]}


@pytest.mark.parametrize(
    "axes, says",
    [
        ({"lr": ["0.3:0.1"]}, "lr=.*wanted a list, LOW:HIGH or LOW:HIGH:log"),
        ({"lr": ["0:0.1:log"]}, "lr=.*wanted a list, LOW:HIGH or LOW:HIGH:log"),
        ({"lr": ["0.1:0.3:ln"]}, "lr=.*wanted a list, LOW:HIGH or LOW:HIGH:log"),
        ({"lr": ["-1:0.3"]}, r"lr: -1.0: input should be greater than 0.*\[lr=-1.0\]"),
        ({"lrr": ["0.1:0.3"]}, "lrr: no such option; the nearest is 'lr'"),
    ],
)
def test_refused_ranges(recipe, tmp_path, axes, says):
    with pytest.raises(RecipeError, match=says):
        next(sweep(recipe, axes, trials=2))
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_of_ema_decay_compares_ema_weights_and_has_no_trials(recipe, tmp_path):
    axes = {"ema_decay": [0.5, 0.98]}
    assert {row["state"] for row in sweep(recipe, axes)} == {"finished"}
    folder = folder_of(recipe, axes)
    ema = [runs.Run(path).metrics().ema_top1.iloc[-1] for path in finished(folder)]
    assert pd.read_csv(folder / "table.csv").top1.tolist() == pytest.approx(ema)
    assert len({*ema}) == 2
    with pytest.raises(RecipeError, match="ema_decay: Optuna maximises top-1 of raw weights"):
        next(sweep(recipe, axes, trials=2))


def test_trials_without_optuna_say_what_to_install(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RecipeError, match="pip install optuna"):
        next(sweep(recipe, {"lr": ["0.1:0.3"]}, trials=2))


def study_of(recipe, axes):
    """The study in the folder of a sweep."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(folder_of(recipe, axes) / "study.log"))
    return optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))


def test_trials_are_runs_with_suggested_values_and_none_is_repeated(recipe):
    rows = list(sweep(recipe, SPACE, trials=3))
    assert len({row["run"] for row in rows}) == 3
    study = study_of(recipe, SPACE)
    assert [trial.value for trial in study.trials] == [row["top1"] for row in rows]
    for row, trial in zip(rows, study.trials, strict=True):
        run = runs.Run(folder_of(recipe, SPACE) / row["run"])
        values = run.recipe()
        assert values["lr"] == row["lr"] == float(f"{trial.params['lr']:.4g}")
        assert 0.01 <= values["lr"] <= 0.5 and values["epochs"] in (2, 3)
        assert run.metrics().top1.iloc[-1] == row["top1"]
    assert list(sweep(recipe, SPACE, trials=3)) == []  # nothing is left
    [fourth] = sweep(recipe, SPACE, trials=4)
    assert fourth["run"] not in {row["run"] for row in rows}
    best = finished(folder_of(recipe, SPACE))
    top1 = [runs.Run(path).metrics().top1.iloc[-1] for path in best]
    assert len(best) == 4 and top1 == sorted(top1, reverse=True)
    with pytest.raises(runs.RunError, match="another recipe.*'lr'"):
        next(sweep(recipe, {**SPACE, "lr": ["0.01:1:log"]}, trials=3))
    with pytest.raises(runs.RunError, match="another recipe.*'lr'"):
        next(sweep(recipe, {**SPACE, "lr": [0.1], "epochs": [2]}))


def test_a_run_below_the_median_is_pruned_and_keeps_its_folder(recipe, monkeypatch):
    import optuna

    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda: pruner)
    axes = {"lr": [0.1, 1e-6], "train_fraction": [0.5]}
    order = iter([0.1, 1e-6])
    choose = lambda self, study, trial, name, kind: next(order) if name == "lr" else kind.choices[0]
    monkeypatch.setattr(optuna.samplers.TPESampler, "sample_relative", lambda *_: {})
    monkeypatch.setattr(
        optuna.samplers.TPESampler, "sample_independent", lambda *args: str(choose(*args))
    )
    good, bad = sweep(recipe.replace(epochs=3), axes, trials=2)
    assert (good["state"], bad["state"]) == ("finished", "pruned")
    run = runs.Run(folder_of(recipe, axes) / bad["run"])
    status = run.status()
    assert status["state"] == "stopped" and status["message"].startswith("stopped: pruned after")
    assert len(run.metrics()) == 1 and run.load_checkpoint()["progress"]["step"] == status["step"]
    states = [trial.state.name for trial in study_of(recipe, axes).trials]
    assert states == ["COMPLETE", "PRUNED"]


@pytest.mark.slow
def test_a_killed_study_goes_on_as_if_it_had_not_been(recipe, tmp_path):
    axes = {"lr": ["0.01:0.5:log"]}
    whole = list(sweep(recipe.replace(name="whole"), axes, trials=5))
    recipe.to_yaml(tmp_path / "small.yaml")
    words = "sweep", tmp_path / "small.yaml", "lr=0.01:0.5:log", "--trials", "5"
    command = [sys.executable, "-m", "workbench", *words]
    rng, folder = random.Random(1), folder_of(recipe, axes)
    for kill in range(3):
        with subprocess.Popen(command, cwd=ROOT) as process:
            while len(list(folder.glob("*/metrics.csv"))) <= kill and process.poll() is None:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 2))
            process.kill()
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    values = lambda one: [trial.params["lr"] for trial in study_of(one, axes).trials]
    assert values(recipe) == values(recipe.replace(name="whole"))
    for row in whole:
        one, other = (folder_of(recipe.replace(name=name), axes) / row["run"] / "metrics.csv"
                      for name in ("small", "whole"))  # fmt: skip
        assert one.read_bytes() == other.read_bytes()


def test_two_processes_share_a_study(recipe):
    axes = {"lr": ["0.01:0.5:log"]}
    rows = list(sweep(recipe, axes, jobs=2, trials=4))
    assert [row["state"] for row in rows] == ["finished"] * 4
    study = study_of(recipe, axes)
    assert sorted(trial.user_attrs["number"] for trial in study.trials) == [0, 1, 2, 3]
    assert len({trial.params["lr"] for trial in study.trials}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "times"), [(1, 10), (2, 4)])
def test_a_sweep_that_is_killed_again_and_again_ends_with_the_same_results(tmp_path, jobs, times):
    axes = {"lr": [0.03, 0.1, 0.3], "seed": range(3)}
    options = {"train_fraction": 0.3, "epochs": 4, "checkpoint_minutes": 0.0, "workers": 0}
    params, tables = tmp_path / "small.yaml", []
    for kills in (0, times):
        recipe = Recipe(name="small", runs_dir=str(tmp_path / str(kills)), **options)
        recipe.to_yaml(params)
        words = [sys.executable, "-m", "workbench", "sweep", params, "lr=0.03,0.1,0.3", "seed=0-2"]
        words += ["--jobs", str(jobs)]
        rng, folder, before = random.Random(0), folder_of(recipe, axes), 0
        for _ in range(kills):
            with subprocess.Popen(words, cwd=ROOT) as process:
                written = before  # bytes of all steps.csv
                while written <= before and process.poll() is None:  # until it has made a step
                    time.sleep(0.05)
                    written = sum(file.stat().st_size for file in folder.glob("*/steps.csv"))
                time.sleep(rng.uniform(0, 0.5))
                assert process.poll() is None  # there are runs left to kill
                process.kill()
            time.sleep(0.2 * jobs)  # its processes end
            before = sum(file.stat().st_size for file in folder.glob("*/steps.csv"))
        assert subprocess.run(words, cwd=ROOT).returncode == 0
        files = sorted(folder.glob("*/metrics.csv"))
        tables.append({file.parent.name: file.read_bytes() for file in files})
    assert len(tables[0]) == 9 and tables[0] == tables[1]
