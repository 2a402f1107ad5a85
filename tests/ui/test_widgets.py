"""Widgets: training views, interactive views, the recipe editor."""

import asyncio
import base64
import io
import socket
import subprocess
import sys
import threading
import time
from xml.etree import ElementTree

import ipywidgets
import numpy as np
import pytest
from PIL import Image

from workbench import cluster, progress, runs, training
from workbench.recipe import Recipe
from workbench.ui import image_grids, widgets
from workbench.ui.recipe_editor import RecipeEditor
from workbench.ui.run_picker import RunPicker

IMAGES = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)]


def png_of(view: widgets.View) -> bytes:
    shown, metadata = view._repr_mimebundle_()
    png = base64.b64decode(shown["image/png"])
    assert metadata == {"image/png": {"width": Image.open(io.BytesIO(png)).width // 2}}
    return png


def test_an_interactive_view_follows_its_controls_and_has_a_static_image(monkeypatch):
    seen = []

    def draw(level, name):
        seen.append((level, name))
        if level == 1:
            raise ValueError("no <such> level")
        return image_grids.grid(IMAGES[: level + 1], heading=name)

    slider = ipywidgets.IntSlider(0, 0, 4)
    view = widgets.InteractiveView(draw, level=slider, name=ipywidgets.Text("x"))
    before = view.image.value
    slider.set_state({"value": 3})  # what a browser sends
    assert seen == [(0, "x"), (3, "x")]
    assert png_of(view) == view.image.value != before
    assert view.image.width == str(Image.open(io.BytesIO(view.image.value)).width // 2)
    slider.value = 1
    assert "ValueError: no &lt;such&gt; level" in view.text.value and not view.image.value
    slider.value = 2
    assert view.text.value == ""
    # Readers prefer a widget, and without its front end show nothing: headless there is none.
    widget = "application/vnd.jupyter.widget-view+json"
    assert widget not in view._repr_mimebundle_()[0]
    monkeypatch.setattr(widgets, "watched", lambda: "jupyter")
    assert png_of(view) == view.image.value and widget in view._repr_mimebundle_()[0]


def test_no_widget_replaces_a_method_of_ipywidgets():
    """Such a method would fail in a browser only."""
    for kind in (widgets.InteractiveView, widgets.TrainingView, RecipeEditor, RunPicker):
        methods = {name for name in vars(kind) if callable(getattr(kind, name))}
        assert methods & set(dir(ipywidgets.VBox)) == {"__init__"}, kind


STEP = {"kind": "step", "step": 10, "steps": 40, "epoch": 1, "lr": 0.1, "loss": 1.25,
        "seconds": 100.0, "images_per_second": 320.0, "data_wait": 0.25}  # fmt: skip
EPOCH = {"kind": "epoch", "epoch": 1, "step": 10, "steps": 40, "lr": 0.1, "train_loss": 1.3,
         "train_top1": 50.0, "val_loss": 1.1, "top1": 61.5, "top5": 90.0,
         "val_images": 500}  # fmt: skip


def started(run: runs.Run, **environment) -> runs.Run:
    """The run with an environment."""
    known = {"train_images": 9, "val_images": 3, "classes": ["a", "b"], "device": "CPU"}
    with run.writing():
        run.write_json(
            "environment.json", {**known, "precision": "fp32", "start": "seed", **environment}
        )
    return run


# ---- printed progress


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """Progress of a run in a batch job."""
    monkeypatch.setattr(widgets, "watched", lambda: "batch")
    return widgets.Progress(started(runs.Run(tmp_path)))


def test_in_a_batch_job_an_epoch_is_one_line_without_a_bar(printed, capsys):
    printed.show(STEP)
    printed.show(EPOCH)
    out, err = capsys.readouterr()
    first, epoch = out.splitlines()
    assert err == "" and first == (
        "9 training and 3 validation images, 2 classes; CPU, fp32; start: seed"
    )
    assert epoch.startswith("epoch   1") and "top-1 61.50 (n=500)" in epoch
    assert "distillation" not in epoch


def test_a_distillation_shows_its_teachers_cache_and_both_losses(printed, capsys):
    teachers = [
        {"source": f"runs/t{i}", "model": "resnet18", "image_size": 48 + i, "digest": f"abc{i}"}
        for i in range(2)
    ]
    started(printed.run, teachers=teachers, teacher_cache="teacher logits are cached")
    printed.show({**EPOCH, "train_task_loss": 0.8, "train_kd_loss": 0.25})
    *lines, epoch = capsys.readouterr().out.splitlines()[1:]
    assert lines == [
        "teacher: runs/t0, resnet18, 48 pixels, weights abc0",
        "teacher: runs/t1, resnet18, 49 pixels, weights abc1",
        "teacher logits are cached",
    ]
    assert "train loss 1.3000 (task 0.8000, distillation 0.2500) top-1 50.00" in epoch


def test_a_long_epoch_prints_a_line_a_minute(printed, capsys):
    printed.show(STEP)
    printed.printed_at -= 61
    printed.show(STEP)
    printed.show(STEP)
    [line] = capsys.readouterr().out.splitlines()[1:]
    speed = "loss 1.250, 320 img/s, 25% waiting for data"
    assert line == f"epoch 1, step 10 of 40: {speed}, 25%, 0:01:40 elapsed, 0:05:00 left"


def test_a_terminal_gets_a_bar_with_loss_speed_and_waiting(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(widgets, "watched", lambda: "terminal")
    view = widgets.Progress(runs.Run(tmp_path / "mine"))
    view.show(STEP)
    view.bar.refresh()
    view.show(EPOCH)
    view.close()
    err = capsys.readouterr().err
    assert "mine" in err and "10/40" in err
    assert "loss 1.250, 320 img/s, 25% waiting for data" in err


def test_a_long_task_prints_a_line_a_minute_in_a_batch_job(capsys):
    with progress.bar(400, "reading images", "img") as bar:
        bar.update(10)
        assert capsys.readouterr().out == ""
        bar.start, bar.printed_at = bar.start - 100, bar.printed_at - 61
        bar.update(90)
    assert capsys.readouterr().out == "reading images: 100 of 400 img, about 5 min left\n"


# ---- the view of a training


def test_a_training_view_shows_step_speed_memory_and_what_was_left_out(tmp_path):
    run = started(runs.Run(tmp_path), train_val_duplicates=1)
    with run.writing():
        run.append("quarantine.csv", {"side": "train", "file": "x.png", "step": -1})
    view = widgets.TrainingView(run)
    view.show(EPOCH)
    view.show(STEP)
    view.refresh()
    start, line = view.start.value, view.line.value
    assert ">9 training and 3 validation images, 2 classes" in start
    assert "<br>1 image left out, named in quarantine.csv" in start
    assert "<br>1 of the 3 validation images are in training too, so top-1 is too high;" in start
    assert "step 10 of 40: loss 1.250, 320 img/s, 25% waiting for data" in line
    assert "GB of memory" in line
    assert view.time.value == "25%, 0:01:40 elapsed, 0:05:00 left"
    assert (view.bar.value, view.bar.max) == (10, 40)
    assert png_of(view) == view.curves.value


def until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def trained(recipe: Recipe, view: widgets.TrainingView) -> threading.Thread:
    """A thread that trains a recipe and shows it, at its second step or later."""
    rows = training.fit(recipe, view.run, stop=view.stop)
    thread = threading.Thread(target=view.consume, args=[rows])
    thread.start()
    until(lambda: view.refresh() or view.bar.value >= 2)
    return thread


@pytest.fixture
def long(tmp_path) -> Recipe:
    return Recipe(epochs=500, workers=0, train_fraction=0.1, log_every=1, runs_dir=str(tmp_path))


def test_a_paused_training_says_so_in_every_view_and_each_of_them_resumes_it(long):
    run = runs.Run(long.folder)
    view, other = widgets.TrainingView(run), widgets.TrainingView(run, run.writer())
    thread = trained(long, view)
    assert not view.pausing.disabled
    view.pausing.click()
    until(lambda: run.status()["message"].startswith("paused"))
    for shown in (view, other):
        shown.show({**STEP, "step": 2, "steps": 999})
        shown.refresh()
        assert shown.pausing.description == "Resume"
        assert shown.line.value.startswith(f"paused after step {run.status()['step']} of")
    step = view.bar.value
    other.pausing.click()
    until(lambda: view.refresh() or view.bar.value > step)
    assert view.pausing.description == "Pause" and "img/s" in view.line.value
    view.stopping.click()
    thread.join(60)
    assert view.stopping.disabled and view.pausing.disabled


def test_the_stop_button_ends_a_training_that_can_be_resumed(long):
    run = runs.Run(long.folder)
    view = widgets.TrainingView(run)
    thread = trained(long, view)
    view.stopping.click()
    thread.join(60)
    assert run.status()["state"] == "stopped" and run.file("last.pt").exists()
    step, steps = run.status()["step"], run.status()["steps"]
    assert view.line.value == f"stopped at step {step} of {steps}; run the cell again to resume"
    assert view.bar.bar_style == "warning"
    assert next(iter(training.fit(long, run)))["step"] == step + 1


def test_after_an_early_stop_the_view_says_why_it_ended(tmp_path):
    recipe = Recipe(epochs=9, early_stopping=1, lr=1e-9, workers=0, train_fraction=0.1,
                    runs_dir=str(tmp_path))  # fmt: skip
    view = widgets.TrainingView(runs.Run(recipe.folder))
    view.consume(training.fit(recipe, view.run))
    epochs = len(view.run.metrics())
    assert 2 <= epochs < 9 and view.bar.bar_style == "success"
    text = f"after {epochs} epochs of 9, stopped early after 1 evaluation without a higher top-1"
    assert view.line.value.startswith("finished: top-1 ") and view.line.value.endswith(text)


def table(shown: str) -> list[list[str]]:
    """The cells of an HTML table by row."""
    return [[cell.text or "" for cell in row] for row in ElementTree.fromstring(shown).iter("tr")]


def test_the_table_of_epochs_has_the_last_ones_and_marks_the_best(tmp_path):
    run = started(runs.Run(tmp_path))
    for epoch in range(1, 21):
        top1 = {2: 80.0, 5: 80.0}.get(epoch, 50.0 + epoch)
        row = {"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch, "train_top1": 1.0,
               "val_loss": None if epoch == 19 else 0.5, "top1": top1, "recall": 0.25}  # fmt: skip
        run.append("metrics.csv", row | {"ema_top1": 60.0, "ema_recall": 0.5})
        run.append("steps.csv", {"step": 10 * epoch, "loss": 1.0, "seconds": 2.5 * epoch})
    titles, *rows = table(widgets.TrainingView(run).epochs.value)
    assert titles[:7] == "epoch,train loss,val loss,top-1 (%),EMA top-1 (%),recall,seconds".split(
        ","
    )
    assert [row[0] for row in rows] == ["2", *map(str, range(6, 21))], "the last and the best"
    assert [row[-1] for row in rows] == ["best", *[""] * 15], "the first one of two"
    assert rows[-1][:7] == ["20", "0.0500", "0.5000", "70.00", "60.00", "0.25", "2.5"]
    assert rows[-2][2] == "", "not evaluated"


# ---- a run of another process


@pytest.fixture
def elsewhere(long):
    """A run that another process trains."""
    code = "import sys; from workbench import runs, training; from workbench.recipe import Recipe; "
    code += (
        "recipe = Recipe(**eval(sys.argv[1])); list(training.fit(recipe, runs.Run(recipe.folder)))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, repr(long.model_dump())])
    run = runs.Run(long.folder)
    until(lambda: len(run.steps()) >= 2, 60)
    yield run
    process.kill()
    process.wait()


def followed(call, monkeypatch) -> tuple[widgets.TrainingView, threading.Thread]:
    """The view that a call of a notebook displays, and the thread it runs in."""
    shown: list[widgets.TrainingView] = []
    monkeypatch.setattr(widgets, "watched", lambda: "jupyter")
    monkeypatch.setattr(widgets, "display", shown.append)
    thread = threading.Thread(target=lambda: asyncio.run(call))
    thread.start()
    until(lambda: shown and shown[0].bar.value >= 2 and shown[0].start.value)
    return shown[0], thread


@pytest.mark.slow
def test_train_follows_a_run_that_another_process_trains_pauses_and_stops_it(
    elsewhere, long, monkeypatch
):
    view, thread = followed(widgets.train(long, elsewhere), monkeypatch)
    assert f"trained by {elsewhere.writer()}" in view.start.value
    view.pausing.click()
    until(lambda: view.line.value.startswith("paused after step"))
    assert view.pausing.description == "Resume" and elsewhere.locked()
    step = len(elsewhere.steps())
    view.pausing.click()
    until(lambda: view.bar.value > step)
    view.stopping.click()
    thread.join(60)
    assert elsewhere.status()["state"] == "stopped"
    assert "stopped by the STOP file" in view.line.value


@pytest.mark.slow
def test_train_follows_a_run_that_waits_for_its_job(tmp_path, capsys):
    options = {"train_fraction": 0.1, "epochs": 2, "workers": 0, "runs_dir": str(tmp_path)}
    recipe = Recipe(name="job", **options)
    run = runs.Run(recipe.folder)
    cluster.submit(recipe, local=1)
    asyncio.run(widgets.train(recipe, run))
    assert run.status()["state"] == "finished" and "epoch   2" in capsys.readouterr().out
    until(lambda: "finished: top-1" in (run.path / "job-1.log").read_text())  # it was trained there


@pytest.mark.slow
def test_interrupt_ends_the_following_and_not_the_training(elsewhere, monkeypatch):
    view, thread = followed(widgets.watch(elsewhere), monkeypatch)
    view.stop.set()  # as Interrupt does
    thread.join(60)
    assert "no longer followed; process" in view.line.value and view.pausing.disabled
    assert not elsewhere.file("STOP").exists() and elsewhere.locked()


def test_a_folder_that_is_no_run_cannot_be_watched(tmp_path):
    for run in (runs.Run(tmp_path / "gone"), "runs/no-such-run-seed0"):
        with pytest.raises(runs.RunError, match="is no run folder; `workbench runs` lists them"):
            asyncio.run(widgets.watch(run))


def test_a_run_of_another_recipe_is_not_followed(long, monkeypatch):
    run = runs.Run(long.folder)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    with run.writing():
        long.to_yaml(run.file("recipe.yaml"))
        monkeypatch.undo()
        with pytest.raises(runs.RunError, match="has a run of another recipe .lr: 0.1 there"):
            asyncio.run(widgets.train(long.replace(lr=0.2), run))


def test_an_error_of_the_training_reaches_the_cell(tmp_path):
    def rows():
        yield STEP
        raise training.TrainingError("the loss is nan")

    with pytest.raises(training.TrainingError, match="the loss is nan"):
        asyncio.run(widgets.TrainingView(runs.Run(tmp_path)).show_all(rows()))


def test_interrupt_waits_for_the_step_and_ends_normally(tmp_path):
    view, ended = widgets.TrainingView(runs.Run(tmp_path)), []

    def rows():
        while not view.stop.is_set():
            time.sleep(0.01)
            yield STEP
        ended.append("with a checkpoint")

    async def interrupted():
        cell = asyncio.ensure_future(view.show_all(rows()))
        await asyncio.sleep(0.3)
        cell.cancel()
        await cell

    asyncio.run(interrupted())
    assert ended == ["with a checkpoint"]
