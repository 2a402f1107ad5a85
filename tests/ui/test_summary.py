"""summary.png of a finished run."""

import asyncio
import io
import json

import numpy as np
import pandas as pd
import pytest
from conftest import run_folder
from matplotlib.text import Text
from PIL import Image
from scipy.stats import binomtest

from workbench import data, run_list, runs, training
from workbench.evaluation import comparison, per_class
from workbench.recipe import Recipe
from workbench.ui import summary, widgets


@pytest.fixture
def run(tmp_path) -> runs.Run:
    """A finished run whose images are not there."""
    found = runs.Run(run_folder(tmp_path, "mine"))
    epochs = {"epoch": [1, 2], "step": [40, 80], "lr": 0.1, "train_loss": [2.0, 1.0]}
    top1 = {"val_loss": 1.0, "train_top1": 70.0, "top1": [50.0, 80.0], "val_images": 400}
    pd.DataFrame(epochs | top1).to_csv(found.file("metrics.csv"), index=False)
    steps = pd.DataFrame({"step": [20, 40, 60, 80], "lr": 0.1, "loss": [2.0, 1.5, 1.2, 1.0]})
    steps.to_csv(found.file("steps.csv"), index=False)
    return found


def with_images(run: runs.Run, recipe: Recipe) -> runs.Run:
    """The run with predictions of the recipe's validation images, half of them wrong."""
    content = data.load_dataset(recipe)
    frame = content.val[["list", "file", "label"]].assign(weights="raw", p1=np.float32(0.9))
    classes = len(content.classes)
    frame["class1"] = (frame.label + np.arange(len(frame)) % 2) % classes
    frame.to_parquet(run.file("predictions.parquet"), index=False)
    recipe.to_yaml(run.file("recipe.yaml"))
    run.file("environment.json").write_text(json.dumps({"classes": content.classes}))
    return run


def size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


def test_it_has_a_strip_of_mistakes_if_the_images_are_there(run):
    without = size(summary.figure(run).png())
    complete = size(summary.figure(with_images(run, Recipe())).png())
    assert without[0] == complete[0] == 2 * 832
    assert complete[1] - without[1] > 2 * 96


def test_its_headline_has_wilsons_interval_and_classes_their_most_frequent_mistake(
    run, monkeypatch
):
    seen = set()
    monkeypatch.setattr(Text, "draw", lambda text, renderer: seen.add(text.get_text()))
    summary.figure(run)
    frame = run.predictions()
    right = int((frame.class1 == frame.label).sum())
    interval = binomtest(right, 400).proportion_ci(method="wilson")
    low, high = 100 * interval.low, 100 * interval.high
    text = f"(95 % interval {low:.1f} to {high:.1f}, 400 images)"
    assert any(line.startswith("mine-seed0: ") and text in line for line in seen)
    for row in per_class(frame, ["ant", "bee", "cat", "dog"]).itertuples():
        assert f"{row.top1:.1f} % of 100, mistaken for {row[4]}" in seen


def test_a_failure_is_a_warning_and_leaves_no_file(run, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "atomic_write", full)
        with pytest.warns(UserWarning, match=r"mine-seed0: no summary.png \(OSError: .*No space"):
            summary.write(run)
    run.file("predictions.parquet").unlink()
    with pytest.warns(UserWarning, match="it was not evaluated yet"):
        summary.write(run)
    assert not list(run.path.glob("*summary*"))


def test_an_unfinished_run_has_none(run):
    run.file("status.json").write_text(json.dumps({"state": "stopped"}))
    summary.write(run)
    assert not run.file("summary.png").exists()


def test_it_changes_neither_list_nor_comparison_and_is_written_anew(run):
    listed, compared = run_list.rows(run.path.parent), comparison.compare([run.path]).table
    run.file("summary.png").write_bytes(b"of a run with fewer epochs")
    summary.write(run)
    assert size(run.file("summary.png").read_bytes())[0] == 2 * 832
    assert run_list.rows(run.path.parent) == listed
    assert comparison.compare([run.path]).table.equals(compared)


@pytest.mark.parametrize("watched", ["batch", "jupyter"])
def test_a_cell_that_trains_writes_it_and_one_that_finds_a_finished_run_does_not(
    run, watched, monkeypatch
):
    def fit(*args, **options):
        with run.writing():
            run.set_status("finished")
        yield from ()

    monkeypatch.setattr(widgets, "watched", lambda: watched)
    monkeypatch.setattr(training, "fit", fit)
    asyncio.run(widgets.train(Recipe(), run))
    assert not run.file("summary.png").exists()
    with run.writing():
        run.set_status("running")
    asyncio.run(widgets.train(Recipe(), run))
    assert run.file("summary.png").exists()
