"""The commands: what they print, and their exit codes."""

import json
import sys

import pandas as pd
import pytest
from conftest import run_folder
from typer.testing import CliRunner

from workbench import ROOT, runs, training
from workbench import __main__ as command
from workbench.evaluation import comparison
from workbench.recipe import Recipe


def invoke(*words):
    return CliRunner().invoke(command.app, [str(word) for word in words])


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "small.yaml"
    options = {"name": "small", "train_fraction": 0.1, "epochs": 2, "workers": 0}
    path.write_text(json.dumps({**options, "runs_dir": str(tmp_path / "runs")}))
    return path


def test_train_prints_data_epochs_result_and_run_folder(params, tmp_path):
    done = invoke("train", params)
    assert done.exit_code == 0, done.output
    run = runs.Run(tmp_path / "runs" / "small-seed0")
    lines = done.output.splitlines()
    assert lines[0].startswith("130 training and 500 validation images, 10 classes; ")
    assert lines[0].endswith("start: initialised from seed 0")
    epochs = [line.split()[1] for line in lines if line.startswith("epoch")]
    assert epochs == ["1", "2"]
    assert f"top-1 {run.metrics().top1.iloc[-1]:.2f} %" in done.output
    assert lines[-1] == f"run folder: {run.path}"
    assert 50_000 < run.file("summary.png").stat().st_size < 300_000
    assert "no runs in" in invoke("runs", tmp_path / "empty").output
    listed = invoke("runs", tmp_path / "runs").output
    assert "small-seed0" in listed and "finished" in listed

    again = invoke("train", params)
    assert again.exit_code == 0
    assert "nothing to do: finished" in again.output and "epoch   1" not in again.output


def test_train_judges_a_teacher_before_the_first_epoch_but_not_on_a_resume(params, tmp_path):
    assert invoke("train", params).exit_code == 0
    source = tmp_path / "runs" / "small-seed0"
    words = ("-p", "name=student", "-p", f"teacher={source}", "-p", "kd_loss=kl")
    done = invoke("train", params, *words)
    assert done.exit_code == 0, done.output
    judged = done.output.index(f"teacher {source}, test_resnet, 0.4 million parameters: top-1 ")
    assert judged < done.output.index("epoch   1")
    assert "of 500 validation images at the student's size" in done.output
    assert "million parameters" not in invoke("train", params, *words).output


def test_doctor_reads_the_data_or_takes_its_sizes(params):
    done = invoke("doctor", params, "-p", "hflip=0.5")
    assert done.exit_code == 0, done.output
    assert "of 130 images" in done.output and "in the smallest" in done.output
    assert "warning: hflip 0.5 mirrors digits" in done.output
    given = invoke("doctor", params, "--images", 1281167, "--classes", 1000)
    assert "of 1,281,167 images" in given.output and "0.1 % top-1" in given.output


def test_an_override_reaches_the_run(params, tmp_path):
    assert invoke("train", params, "-p", "lr=5e-3", "--set", "seed=7").exit_code == 0
    assert runs.Run(tmp_path / "runs" / "small-seed7").recipe()["lr"] == 0.005
    with pytest.raises(ValueError, match="-p lr: wanted OPTION=VALUE"):
        raise invoke("train", params, "-p", "lr").exception


def test_ctrl_c_before_the_first_step_is_a_stop_and_not_a_failure(params, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.training.loop.build_pixel_caches", interrupted)
    words = ("-p", "cache=true", "-p", f"cache_dir={tmp_path / 'cache'}")
    done = invoke("train", params, *words)
    assert done.exit_code == command.STOPPED == 3, done.output
    assert "stopped by Ctrl-C, at once; the same command resumes it" in done.output
    assert runs.Run(tmp_path / "runs" / "small-seed0").status()["state"] == "stopped"
    monkeypatch.undo()
    assert invoke("train", params, *words).exit_code == 0


def test_a_stopped_training_has_its_exit_code(params, monkeypatch):
    fit = training.fit

    def stopped_at_once(recipe, run, **options):
        for row in fit(recipe, run, **options):
            run.file("STOP").touch()
            yield row

    monkeypatch.setattr(training, "fit", stopped_at_once)
    done = invoke("train", params)
    assert done.exit_code == command.STOPPED
    assert "stopped by the STOP file" in done.output


@pytest.mark.parametrize(
    "words, says",
    [
        (["train", "missing.yaml"], "missing.yaml: 1 problem"),
        (["compare", "nowhere"], "ComparisonError: "),
    ],
)
def test_an_error_of_the_package_is_a_message_without_a_traceback(
    monkeypatch, tmp_path, words, says
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["workbench", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert str(ended.value.code).startswith(says)


def test_check_data_lists_findings_and_writes_them_all(params, image_folder, tmp_path):
    done = invoke("check-data", params)
    assert done.exit_code == 0 and "every image can be read" in done.output
    for name in ("0.png", "c\r.png"):
        (image_folder / "train" / "a" / name).write_bytes(b"no image")
    path, out = tmp_path / "mine.yaml", tmp_path / "findings.csv"
    path.write_text(json.dumps({"dataset": "files", "data_dir": str(image_folder)}))
    done = invoke("check-data", path, "--out", out)
    assert done.exit_code == 1
    assert "undecodable, train: 2" in done.output and "a/0.png" in done.output
    assert pd.read_csv(out).file.tolist() == ["a/0.png", "a/c\r.png"]


def test_compare_prints_table_and_verdict_and_writes_them(params, tmp_path):
    for words in ((), ("-p", "lr=0.05", "-p", "name=slow")):
        assert invoke("train", params, *words).exit_code == 0
    folders = [tmp_path / "runs" / f"{name}-seed0" for name in ("small", "slow")]
    out = {kind: tmp_path / f"table.{kind}" for kind in ("csv", "markdown")}
    files = [word for kind, path in out.items() for word in (f"--{kind}", path)]
    done = invoke("compare", *folders, *files)
    assert done.exit_code == 0, done.output
    assert "slow and small" in done.output or "slow is " in done.output
    table = pd.read_csv(out["csv"])
    for run, row in zip(map(runs.Run, folders), table.itertuples(), strict=True):
        assert row.top1 == pytest.approx(run.metrics().top1.iloc[-1])
        assert row.top5 == pytest.approx(run.metrics().top5.iloc[-1])
        assert row.images == 500
    assert table.differs[1] == "lr 0.05 (0.1)"
    assert f"- {done.output.splitlines()[-1]}\n" in out["markdown"].read_text()
    turned = invoke("compare", *folders, "--baseline", "slow")
    assert "small and slow" in turned.output or "small is " in turned.output


def test_compare_leaves_out_runs_without_predictions(tmp_path):
    evaluated, early = run_folder(tmp_path, "evaluated"), run_folder(tmp_path, "early", lr=0.3)
    (early / "predictions.parquet").unlink()
    done = invoke("compare", evaluated, early)
    assert done.exit_code == 0 and f"{early} is left out: it was not evaluated yet" in done.output
    assert "one recipe, evaluated: nothing to compare it with" in done.output
    assert isinstance(invoke("compare", early).exception, comparison.ComparisonError)


def test_a_notebook_that_takes_no_recipe_is_refused(params):
    done = invoke("notebook", ROOT / "notebooks" / "05_compare.ipynb", params)
    assert isinstance(done.exception, runs.RunError) and "takes no recipe" in str(done.exception)


def test_options_prints_every_option():
    assert invoke("options").output == Recipe.parameters_cell() + "\n"


def test_migrate_renames_options_and_values_and_leaves_comments(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("# flip: as it is\nflip: 0.5  # flip\nmimic_loss: [kl_standardized]\n")
    done = invoke("migrate", path)
    assert "2 changes" in done.output and "line 2: flip: 0.5" in done.output
    new = "# flip: as it is\nhflip: 0.5  # flip\nkd_loss: [kl_standardized_logits]\n"
    assert path.read_text() == new
    assert "0 changes" in invoke("migrate", path).output and path.read_text() == new


@pytest.mark.parametrize(
    "old, new",
    [
        ("mimic: []\n", {}),
        ("mimic_loss: [ ]  # none\n", {}),
        ("teacher: [t]\nmimic_loss:\n  # of logits\n  - kl_standardized\n",
         {"teacher": ["t"], "kd_loss": ["kl_standardized_logits"]}),
    ],
)  # fmt: skip
def test_a_migrated_file_is_valid(tmp_path, old, new):
    path = tmp_path / "old.yaml"
    path.write_text(old + "step_epochs: 2\nschedule: step\n")
    invoke("migrate", path)
    assert Recipe.from_yaml(path) == Recipe(schedule="step", lr_step_epochs=2, **new)


def test_migrate_tells_what_it_cannot_correct(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("flip: 0.5\nmimic: [3 -> 4]\n")
    done = invoke("migrate", path)
    assert done.exit_code == 1 and "2 changes" in done.output
    assert "old.yaml: 1 problem\n  - distill_pairs" in str(done.exception)
