"""The controls of 06: which run is exported, and a user's image files."""

import io

import numpy as np
import pytest
from conftest import run_folder
from helpers import train
from PIL import Image

from workbench import export, runs
from workbench.evaluation.statistics import wilson
from workbench.recipe import Recipe
from workbench.ui import deploy, widgets


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def finished(folder, name: str, top1: float, **columns) -> runs.Run:
    path = run_folder(folder, name, 3)
    for file in ("metrics.csv", "status.json"):
        (path / file).unlink(missing_ok=True)
    with runs.Run(path).writing() as run:
        row = {"epoch": 1, "step": 9, "top1": top1, "val_images": 200, **columns}
        run.append("metrics.csv", row)
        run.set_status("finished", message=f"finished: top-1 {top1} %")
    (path / "last.pt").touch()
    return run


def test_the_choice_lists_finished_runs_best_first_with_their_figures(tmp_path):
    newest = finished(tmp_path / "runs", "low", 70.0)
    finished(tmp_path / "runs", "ema", 60.0, ema_top1=95.0)
    finished(tmp_path / "runs", "high", 90.0)
    finished(tmp_path / "runs", "gone", 99.0).file("last.pt").unlink()
    with finished(tmp_path / "runs", "broken", 99.0).writing() as run:
        run.set_status("stopped")
    choice = deploy.run_choice(tmp_path / "runs", newest.path)
    labels = [label for label, _ in choice.options]
    assert [label.split(":")[0] for label in labels] == ["ema-seed3", "high-seed3", "low-seed3"]
    low, high = (100 * bound for bound in wilson(190, 200))
    assert f": top-1 95.00 % ({low:.1f} to {high:.1f}), seed 3, 20" in labels[0]
    assert choice.value == str(newest.path)
    view = widgets.InteractiveView(deploy.run_facts, run=choice)
    assert "finished: top-1 70.0 %" in view.text.value
    choice.index = 0
    assert "the ema weights are exported by default: top-1 95.00 %" in view.text.value
    assert "text/html" in view._repr_mimebundle_(), "headless"


def test_a_run_of_another_folder_is_selected_and_listed_first(tmp_path):
    finished(tmp_path / "runs", "high", 90.0)
    other = finished(tmp_path / "other", "low", 70.0)
    choice = deploy.run_choice(tmp_path / "runs", other.path)
    assert choice.index == 0 and choice.value == str(other.path) and len(choice.options) == 2


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    recipe = Recipe(epochs=1, train_fraction=0.25, workers=0, runs_dir=folder)
    return export.open_source(train(recipe).path)


def test_files_that_are_no_images_are_named_and_the_others_predicted(source):
    files = {"a.png": png(20), "notes.txt": b"shopping list", "none.png": b"", "b.png": png(50)}
    problems, figure = deploy.predictions(source, files)
    assert [text.split(" (")[0] for text in problems] == [
        "notes.txt cannot be read as an image", "none.png cannot be read as an image"
    ]  # fmt: skip
    assert [ax.get_title() for ax in figure.axes[::2]] == ["a.png", "b.png"]
    expected = export.predict_image(source, Image.open(io.BytesIO(files["b.png"])))
    shown = [tick.get_text() for tick in figure.axes[3].get_yticklabels()]
    assert shown == expected["class"].tolist()
    view = widgets.InteractiveView(lambda: deploy.predictions(source, files))
    assert "notes.txt cannot be read" in view.text.value and view.image.value


def test_without_an_image_there_is_no_figure_and_of_many_the_first_are_shown(source):
    problems, figure = deploy.predictions(source, {"notes.txt": b"shopping list"})
    assert figure is None and len(problems) == 1
    problems, figure = deploy.predictions(source, {f"{i}.png": png(9) for i in range(20)})
    assert len(figure.axes) == 32 and problems[0].startswith("the first 16 of 20 files")


def test_runs_of_a_sweep_are_listed_with_its_name(tmp_path):
    best = finished(tmp_path / "runs" / "digits-sweep", "lr=0.3", 90.0)
    (best.path.parent / "sweep.yaml").write_text("axes: {}\n")
    other = finished(tmp_path / "runs", "low", 70.0)
    choice = deploy.run_choice(tmp_path / "runs", other.path)
    labels = [label.split(":")[0] for label, _ in choice.options]
    assert labels == ["digits-sweep/lr=0.3-seed3", "low-seed3"]


def test_a_package_of_a_sweeps_run_gets_a_name_that_a_file_may_have():
    assert export.default_name("lr=0.3_seed 1") == "lr-0.3_seed-1"
    assert export.default_name("digits_baseline-2.b") == "digits_baseline-2.b"
