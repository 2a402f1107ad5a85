"""The commands: what they print, and the exit code a script decides by."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from conftest import run_folder
from typer.testing import CliRunner

from workbench import ROOT, runs, training
from workbench import __main__ as command
from workbench.evaluation import comparison


def invoke(*words):
    return CliRunner().invoke(command.app, [str(word) for word in words])


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "small.yaml"
    options = {"name": "small", "train_fraction": 0.1, "epochs": 2, "workers": 0}
    path.write_text(json.dumps({**options, "runs_dir": str(tmp_path / "runs")}))
    return path


def test_train_says_how_it_ended_and_where(params, tmp_path):
    done = invoke("train", params)
    assert done.exit_code == 0, done.output
    run = runs.Run(tmp_path / "runs" / "small-seed0")
    lines = done.output.splitlines()
    assert lines[0].startswith("130 training and 500 validation images, 10 classes; ")
    assert lines[0].endswith("start: initialised from seed 0")
    assert [line.split()[:2] for line in lines if line.startswith("epoch")] == [
        ["epoch", "1"],
        ["epoch", "2"],
    ]
    assert f"top-1 {run.metrics().top1.iloc[-1]:.2f} %" in done.output
    assert lines[-1] == f"run folder: {run.path}"

    again = invoke("train", params)
    assert again.exit_code == 0
    assert "nothing to do: finished" in again.output and "epoch   1" not in again.output


def test_train_judges_a_teacher_before_it_teaches_but_not_again_on_a_resume(params, tmp_path):
    assert invoke("train", params).exit_code == 0
    source = tmp_path / "runs" / "small-seed0"
    words = ("-p", "name=taught", "-p", f"teacher={source}", "-p", "kd_loss=kl")
    done = invoke("train", params, *words)
    assert done.exit_code == 0, done.output
    said = done.output.index(f"teacher {source}, test_resnet, 0.4 million parameters: top-1 ")
    assert said < done.output.index("epoch   1")
    assert "of 500 validation images at the student's size" in done.output
    assert "million parameters" not in invoke("train", params, *words).output


def test_the_doctor_speaks_of_the_data_or_of_the_sizes_it_is_told(params):
    done = invoke("doctor", params, "-p", "hflip=0.5")
    assert done.exit_code == 0, done.output
    assert "of 130 images" in done.output and "in the smallest" in done.output
    assert "warning: hflip 0.5 mirrors digits" in done.output
    told = invoke("doctor", params, "--images", 1281167, "--classes", 1000)
    assert "of 1,281,167 images" in told.output and "0.1 % top-1" in told.output


def test_an_overridden_knob_reaches_the_run(params, tmp_path):
    assert invoke("train", params, "-p", "lr=5e-3", "--set", "seed=7").exit_code == 0
    recipe = runs.Run(tmp_path / "runs" / "small-seed7").recipe()
    assert recipe["lr"] == 0.005


def test_ctrl_c_before_the_first_step_is_a_stop_and_no_failure(params, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.training.setup.build_pixel_caches", interrupted)
    words = ("-p", "cache=true", "-p", f"cache_dir={tmp_path / 'kept'}")
    done = invoke("train", params, *words)
    assert done.exit_code == 3, done.output
    assert "stopped by Ctrl-C, at once; the same command resumes it" in done.output
    assert runs.Run(tmp_path / "runs" / "small-seed0").status()["state"] == "stopped"
    monkeypatch.undo()
    assert invoke("train", params, *words).exit_code == 0


def test_a_stopped_training_has_an_exit_code_of_its_own(params, tmp_path, monkeypatch):
    fit = training.fit

    def stopped_at_once(recipe, run, **options):
        for row in fit(recipe, run, **options):
            run.file("STOP").touch()
            yield row

    monkeypatch.setattr(training, "fit", stopped_at_once)
    done = invoke("train", params)
    assert done.exit_code == command.STOPPED
    assert "stopped by the STOP file" in done.output


def test_an_override_without_a_value_is_refused(params):
    with pytest.raises(ValueError, match="-p lr: wanted OPTION=VALUE"):
        CliRunner().invoke(command.app, ["train", str(params), "-p", "lr"], catch_exceptions=False)


def test_what_a_person_can_mend_is_a_message_not_a_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["workbench", "train", str(tmp_path / "missing.yaml")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert "missing.yaml" in str(ended.value) and "cannot be read" in str(ended.value)


def test_check_data_of_sound_images_says_so(params):
    done = invoke("check-data", params)
    assert done.exit_code == 0
    assert "every image can be read" in done.output


def test_check_data_lists_findings_and_writes_them_all(image_folder, tmp_path):
    (image_folder / "train" / "a" / "0.png").write_bytes(b"no image")
    path, out = tmp_path / "mine.yaml", tmp_path / "findings.csv"
    path.write_text(json.dumps({"dataset": "files", "data_dir": str(image_folder)}))
    done = invoke("check-data", path, "--out", out)
    assert done.exit_code == 1
    assert "undecodable, train: 1" in done.output
    assert pd.read_csv(out).file.tolist() == ["a/0.png"]


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
    said = done.output.splitlines()[-1]
    assert f"- {said}\n" in out["markdown"].read_text()
    turned = invoke("compare", *folders, "--baseline", "slow")
    assert "small and slow" in turned.output or "small is " in turned.output


def test_a_comparison_that_cannot_be_made_is_a_message(params, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["workbench", "compare", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert str(ended.value.code).startswith("ComparisonError: ")


def test_runs_lists_the_runs_or_says_that_there_are_none(params, tmp_path):
    assert "no runs in" in invoke("runs", tmp_path / "runs").output
    invoke("train", params)
    listed = invoke("runs", tmp_path / "runs")
    assert "small-seed0" in listed.output and "finished" in listed.output


def test_compare_leaves_out_what_was_not_evaluated_and_asks_for_the_folder_first(tmp_path):
    kept, early = run_folder(tmp_path, "kept"), run_folder(tmp_path, "early", lr=0.3)
    (early / "predictions.parquet").unlink()
    done = invoke("compare", kept, early)
    assert done.exit_code == 0 and f"{early} is left out: it was not evaluated yet" in done.output
    assert "one recipe, kept: nothing to compare it with" in done.output
    with pytest.raises(comparison.ComparisonError, match="there is no folder .*; make it first"):
        raise invoke("compare", kept, "--csv", tmp_path / "no" / "table.csv").exception


def test_a_notebook_that_takes_no_recipe_is_refused(params):
    done = invoke("notebook", ROOT / "notebooks" / "05_compare.ipynb", params)
    assert isinstance(done.exception, runs.RunError) and "takes no recipe" in str(done.exception)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_notebook_that_fails_speaks_of_a_checkpoint_only_where_one_is(
    params, tmp_path, monkeypatch, checkpoint
):
    def papermill(*_, **__):
        run = runs.Run(tmp_path / "runs" / "small-seed0")
        with run.writing():
            run.set_status("failed")
        if checkpoint:
            run.file("last.pt").touch()
        return subprocess.CompletedProcess((), 1)

    monkeypatch.setattr(command.subprocess, "run", papermill)
    done = invoke("notebook", ROOT / "notebooks" / "02_baseline.ipynb", params)
    assert done.exit_code == 1
    assert ("from the last checkpoint" in done.stderr) == checkpoint
