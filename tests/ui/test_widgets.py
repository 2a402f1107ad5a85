"""Widgets: training views, interactive views, the recipe editor."""

import asyncio
import base64
import threading
import time

import ipywidgets
import numpy as np
import pytest

from workbench import ROOT, progress, runs, training
from workbench.recipe import Recipe, RecipeError, inactive_options
from workbench.ui import image_grids, views, widgets
from workbench.ui.recipe_editor import RecipeEditor
from workbench.ui.run_picker import RunPicker

IMAGES = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)]


def png_of(view: widgets.View) -> bytes:
    return base64.b64decode(view._repr_mimebundle_()["image/png"])


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
    slider.value = 1
    assert "ValueError: no &lt;such&gt; level" in view.text.value and not view.image.value
    slider.value = 2
    assert view.text.value == ""
    # Readers prefer a widget, and without its front end show nothing: headless there is none.
    widget = "application/vnd.jupyter.widget-view+json"
    assert widget not in view._repr_mimebundle_()
    monkeypatch.setattr(widgets, "watched", lambda: "jupyter")
    assert png_of(view) == view.image.value and widget in view._repr_mimebundle_()


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
    assert line == f"epoch 1, step 10 of 40: {speed}, about 5 min left"


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
    start, line = view.start.value, view.line.value
    assert start.startswith("9 training and 3 validation images, 2 classes")
    assert "<br>1 image left out, named in quarantine.csv" in start
    assert "<br>in training too: 1 validation image;" in start
    assert "step 10 of 40: loss 1.250, 320 img/s, 25% waiting for data" in line
    assert "GB of memory" in line and "about 5 min left" in line
    assert (view.bar.value, view.bar.max) == (10, 40)
    assert png_of(view) == view.curves.value


def until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_pause_waits(tmp_path):
    view, given = widgets.TrainingView(runs.Run(tmp_path)), []

    def rows():
        for i in range(1, 6):
            given.append(i)
            yield {**STEP, "step": i}

    view.pausing.click()
    thread = threading.Thread(target=view.consume, args=[rows()])
    thread.start()
    until(lambda: given)
    time.sleep(0.2)
    assert given == [1], "no row while paused"
    view.pausing.click()
    thread.join(20)
    assert len(given) == 5 and view.stopping.disabled and view.pausing.disabled


def test_the_stop_button_ends_a_training_that_can_be_resumed(tmp_path):
    recipe = Recipe(epochs=500, workers=0, train_fraction=0.1, log_every=1, runs_dir=str(tmp_path))
    run = runs.Run(recipe.folder)
    view = widgets.TrainingView(run)
    rows = training.fit(recipe, run, stop=view.stop)
    thread = threading.Thread(target=view.consume, args=[rows])
    thread.start()
    until(lambda: view.bar.value >= 2)
    view.stopping.click()
    thread.join(60)
    assert run.status()["state"] == "stopped" and run.file("last.pt").exists()
    assert "the same command resumes it" in view.line.value
    step = run.status()["step"]
    assert next(iter(training.fit(recipe, run)))["step"] == step + 1


def test_the_stop_button_of_another_processs_run_writes_a_stop_file(tmp_path):
    run = runs.Run(tmp_path)
    view = widgets.TrainingView(run, own_process=False)
    view.stopping.click()
    assert run.file("STOP").exists() and view.pausing.disabled


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


# ---- controls


def editor(**options) -> RecipeEditor:
    return RecipeEditor(Recipe(**options), views.AUGMENTATION)


def test_there_is_a_control_for_every_augmentation_option():
    fields = list(Recipe.model_fields)
    assert views.AUGMENTATION == fields[fields.index("crop_scale") : fields.index("teacher")]


OTHER = {"randaug_m": 3.0, "kd_loss": ["kl"], "erase_count": 3, "milestones": [1], "gamma": 0.5,
         "momentum": 0.5, "switch_prob": 0.1, "deep_stem": True, "temperature": 2.0}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_untouched_controls_are_the_recipe_and_inactive_options_are_refused_by_it(path):
    recipe = Recipe.from_yaml(path)
    assert RecipeEditor(recipe, views.AUGMENTATION).result == recipe
    inactive, refused = inactive_options(recipe.model_dump()), ""
    for name in [name for name, value in OTHER.items() if value != getattr(recipe, name)]:
        try:
            recipe.replace(**{name: OTHER[name]})
        except RecipeError as error:
            refused = str(error)
        assert (f"{name}: {OTHER[name]!r} has no effect" in refused) == (name in inactive)


@pytest.mark.parametrize("name", views.AUGMENTATION)
def test_both_ends_of_every_control_are_allowed(name):
    options = editor(randaug_n=2, mixup_alpha=0.2, cutmix_alpha=1.0, erase_prob=0.5)
    control = options.controls[name]
    ends = [getattr(control, "min", False), getattr(control, "max", True)]
    if isinstance(control, ipywidgets.FloatRangeSlider):
        ends = [(end, end) for end in ends]
    for end in getattr(control, "options", ends):
        control.value = end
        assert options.problem == "" and options.result is not None
        value = getattr(options.result, name)
        assert value == (list(end) if isinstance(end, tuple) else end)
        assert type(value) is type(getattr(Recipe(), name))


def test_a_browser_that_moves_a_slider_to_its_nearest_step_changes_nothing():
    recipe = Recipe(crop_scale=[0.083, 1.0], hflip=0.123, randaug_n=1, randaug_std=0.555)
    options = RecipeEditor(recipe, views.AUGMENTATION)
    options.controls["crop_ratio"].set_state({"value": [0.75, 1.33]})
    options.controls["crop_scale"].set_state({"value": [0.08, 1.0]})
    options.controls["hflip"].set_state({"value": 0.12})
    options.controls["randaug_std"].set_state({"value": 0.56})
    assert options.result == recipe
    options.controls["crop_ratio"].set_state({"value": [0.75, 1.35]})
    assert options.result.crop_ratio == [0.75, 1.35]


def test_the_lines_to_copy_are_the_options_with_an_effect(tmp_path):
    recipe = Recipe(name="mine", hflip=0.5, lr=0.2)
    options = RecipeEditor(recipe, views.AUGMENTATION)
    options.controls["randaug_n"].value = 2
    options.controls["crop_scale"].value = (0.3, 1.0)
    options.controls["brightness"].value = 0.1 + 0.2  # as a slider of steps adds up
    assert "brightness: 0.3  # factor" in options.yaml.value
    assert "switch_prob" not in options.yaml.value
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nlr: 0.2\n" + options.yaml.value)
    assert Recipe.from_yaml(file) == options.result
    assert options.result == recipe.replace(randaug_n=2, crop_scale=[0.3, 1.0], brightness=0.3)
    paper = options._repr_mimebundle_()["text/html"]
    assert paper.startswith("<pre>crop_scale: [0.3, 1.0]")


def test_an_option_without_effect_is_disabled_and_keeps_its_value():
    options = editor(randaug_n=2)
    m, n = options.controls["randaug_m"], options.controls["randaug_n"]
    m.value = 9.0
    assert not m.disabled and options.result.randaug_m == 9
    n.value = 0
    assert m.disabled and options.result.randaug_m == 7.0 and options.problem == ""
    n.value = 1
    assert not m.disabled and options.result.randaug_m == 9


def test_errors_of_the_recipe_are_shown_in_the_editor_and_its_views():
    options = editor(batch_size=1)
    view = widgets.InteractiveView(lambda recipe: [f"hflip {recipe.hflip}"], options)
    assert "hflip 0.0" in view.text.value
    options.controls["mixup_alpha"].value = 0.2
    assert options.result is None and "no other to mix with" in options.note.value
    assert "no other to mix with" in view.text.value
    options.controls["mixup_alpha"].value = 0.0
    options.controls["hflip"].value = 0.25
    assert options.problem == "" and "hflip 0.25" in view.text.value


def test_copy_sends_the_lines_to_the_browser():
    options = editor()
    assert options.script.outputs == ()
    options.copy.click()
    [output] = options.script.outputs
    assert "hflip: 0.0" in output["data"]["application/javascript"]
    assert options.copy.description == "Copied"
    options.controls["hflip"].value = 0.5
    assert options.copy.description == "Copy"
