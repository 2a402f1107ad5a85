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

IMAGES = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)]


def test_an_interactive_view_follows_its_controls_and_has_a_static_image(monkeypatch):
    seen = []

    def draw(level, name):
        seen.append((level, name))
        return image_grids.grid(IMAGES[: level + 1], heading=name)

    slider = ipywidgets.IntSlider(0, 0, 4)
    view = widgets.InteractiveView(draw, level=slider, name=ipywidgets.Text("x"))
    before = view.image.value
    slider.set_state({"value": 3})  # what a browser sends
    assert seen == [(0, "x"), (3, "x")]
    assert view.image.value != before
    bundle = view._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert base64.b64decode(data["image/png"]) == view.image.value
    # Readers prefer a widget, and without its front end show nothing: headless there is none.
    assert "application/vnd.jupyter.widget-view+json" not in data
    monkeypatch.setattr(widgets, "watched", lambda: "jupyter")
    data = view._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == view.image.value
    assert "application/vnd.jupyter.widget-view+json" in data


def test_a_view_shows_an_error_and_recovers():
    def draw(level):
        if level == 1:
            raise ValueError("no <such> level")
        return image_grids.grid(IMAGES[:1])

    slider = ipywidgets.IntSlider(0, 0, 2)
    view = widgets.InteractiveView(draw, level=slider)
    slider.value = 1
    assert "ValueError: no &lt;such&gt; level" in view.text.value
    slider.value = 2
    assert view.text.value == ""


STEP = {"kind": "step", "step": 10, "steps": 40, "epoch": 1, "lr": 0.1, "loss": 1.25,
        "seconds": 100.0, "images_per_second": 320.0, "data_wait": 0.25}  # fmt: skip
EPOCH = {"kind": "epoch", "epoch": 1, "step": 10, "steps": 40, "lr": 0.1, "train_loss": 1.3,
         "train_top1": 50.0, "val_loss": 1.1, "top1": 61.5, "top5": 90.0,
         "val_images": 500}  # fmt: skip


def start(run: runs.Run, **environment) -> None:
    """Writes the environment of a run."""
    known = {"train_images": 9, "val_images": 3, "classes": ["a", "b"], "device": "CPU"}
    with run.writing():
        run.write_json(
            "environment.json", {**known, "precision": "fp32", "start": "seed", **environment}
        )


def test_in_a_batch_job_an_epoch_is_one_line_without_a_bar(tmp_path, capsys):
    view = widgets.Progress(runs.Run(tmp_path), viewer="batch")
    view.show(STEP)
    view.show(EPOCH)
    said = capsys.readouterr()
    assert said.err == ""
    first, epoch = said.out.splitlines()
    assert "40 steps" in first  # how the training starts, once
    assert epoch.startswith("epoch   1") and "top-1 61.50 (n=500)" in epoch


def test_a_training_view_lists_what_was_left_out(tmp_path):
    run = runs.Run(tmp_path)
    start(run, train_val_duplicates=1)
    with run.writing():
        run.append("quarantine.csv", {"side": "train", "file": "x.png", "step": -1})
    view = widgets.TrainingView(run)
    view.show(STEP)
    view.show(EPOCH)
    out = view.start.value
    assert out.startswith("9 training and 3 validation images, 2 classes")
    assert "<br>1 images left out, named in quarantine.csv" in out
    assert "<br>1 validation images are in training too" in out


def test_a_training_view_shows_step_speed_waiting_and_memory(tmp_path):
    view = widgets.TrainingView(runs.Run(tmp_path))
    view.show(STEP)
    said = view.line.value
    assert "step 10 of 40: loss 1.250, 320 img/s, 25% waiting for data" in said
    assert "GB of memory" in said and "about 5 min left" in said
    assert (view.bar.value, view.bar.max) == (10, 40)
    bundle = view._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert base64.b64decode(data["image/png"]) == view.curves.value


class Gate:
    """Rows that come when they are let through, and what was done with them."""

    def __init__(self, count: int = 3):
        self.count, self.given, self.closed = count, 0, False

    def __iter__(self):
        try:
            for i in range(1, self.count + 1):
                self.given = i
                yield {**STEP, "step": i}
        finally:
            self.closed = True


def until(true, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_pause_waits(tmp_path):
    view, rows = widgets.TrainingView(runs.Run(tmp_path)), Gate(5)
    view.pausing.click()
    thread = threading.Thread(target=view.consume, args=[rows])
    thread.start()
    until(lambda: rows.given == 1)
    time.sleep(0.2)
    assert rows.given == 1, "no row while paused"
    view.pausing.click()
    thread.join(20)
    assert rows.given == 5 and rows.closed
    assert view.stopping.disabled and view.pausing.disabled


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


def test_stop_button_of_another_processs_run_writes_a_stop_file(tmp_path):
    run = runs.Run(tmp_path)
    view = widgets.TrainingView(run, own_process=False)
    view.stopping.click()
    assert run.stop_requested() and view.pausing.disabled


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


def test_a_distillation_names_its_teachers_and_cache(tmp_path, capsys):
    run = runs.Run(tmp_path)
    teachers = [
        {"source": f"runs/t{i}", "model": "resnet18", "image_size": 48 + i, "digest": f"abc{i}"}
        for i in range(2)
    ]
    start(run, teachers=teachers, teacher_cache="teachers' answers are kept, 3 MB, here")
    widgets.Progress(run, viewer="batch").show(STEP)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "teacher: runs/t0, resnet18, 48 pixels, weights abc0",
        "teacher: runs/t1, resnet18, 49 pixels, weights abc1",
        "teachers' answers are kept, 3 MB, here",
    ]


def test_without_a_teacher_none_is_mentioned(tmp_path, capsys):
    run = runs.Run(tmp_path)
    start(run)
    view = widgets.Progress(run, viewer="batch")
    view.show(STEP)
    view.show(EPOCH)
    out = capsys.readouterr().out
    assert "teacher" not in out and "distillation" not in out


def test_an_epoch_of_a_distillation_has_both_losses(tmp_path, capsys):
    view = widgets.Progress(runs.Run(tmp_path), viewer="batch")
    view.show({**EPOCH, "train_task_loss": 0.8, "train_kd_loss": 0.25})
    epoch = capsys.readouterr().out.splitlines()[-1]
    assert "train loss 1.3000 (task 0.8000, distillation 0.2500) top-1 50.00" in epoch


def test_a_long_epoch_prints_the_time_left(tmp_path, capsys):
    view = widgets.Progress(runs.Run(tmp_path), viewer="batch")
    view.printed_at -= 61
    view.show(STEP)
    assert "step 10/40  loss 1.2500  320 img/s  about 5 min left" in capsys.readouterr().out


def test_a_terminal_gets_a_bar_with_loss_speed_and_waiting(tmp_path, capsys):
    view = widgets.Progress(runs.Run(tmp_path / "mine"), viewer="terminal")
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


# ---- controls


def test_there_is_a_control_for_every_augmentation_option():
    fields = list(Recipe.model_fields)
    assert views.AUGMENTATION == fields[fields.index("crop_scale") : fields.index("teacher")]


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_untouched_controls_are_the_recipe(path):
    recipe = Recipe.from_yaml(path)
    assert RecipeEditor(recipe, views.AUGMENTATION).result == recipe


@pytest.mark.parametrize("name", views.AUGMENTATION)
def test_both_ends_of_every_control_are_allowed(name):
    recipe = Recipe(randaug_n=2, mixup_alpha=0.2, cutmix_alpha=1.0, erase_prob=0.5, name="x")
    options = RecipeEditor(recipe, views.AUGMENTATION)
    control = options.controls[name]
    if isinstance(control, ipywidgets.Checkbox):
        ends = [True, False]
    elif isinstance(control, ipywidgets.Dropdown):
        ends = control.options
    else:
        ends = [control.min, control.max]
        if isinstance(control, ipywidgets.FloatRangeSlider):
            ends = [(end, end) for end in ends]
    for end in ends:
        control.value = end
        assert options.problem == "" and options.result is not None
        value = getattr(options.result, name)
        assert value == (list(end) if isinstance(end, tuple) else end)
        assert type(value) is type(getattr(recipe, name))


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
    options = RecipeEditor(Recipe(randaug_n=2), views.AUGMENTATION)
    m, n = options.controls["randaug_m"], options.controls["randaug_n"]
    m.value = 9.0
    assert not m.disabled and options.result.randaug_m == 9
    n.value = 0
    assert m.disabled and options.result.randaug_m == 7.0 and options.problem == ""
    n.value = 1
    assert not m.disabled and options.result.randaug_m == 9


def test_errors_of_the_recipe_are_shown_in_the_editor_and_its_views():
    options = RecipeEditor(Recipe(batch_size=1), views.AUGMENTATION)
    view = widgets.InteractiveView(lambda recipe: [f"hflip {recipe.hflip}"], options)
    assert "hflip 0.0" in view.text.value
    options.controls["mixup_alpha"].value = 0.2
    assert options.result is None and "no other to mix with" in options.note.value
    assert "no other to mix with" in view.text.value
    options.controls["mixup_alpha"].value = 0.0
    options.controls["hflip"].value = 0.25
    assert options.problem == "" and "hflip 0.25" in view.text.value


def test_copy_sends_the_lines_to_the_browser():
    options = RecipeEditor(Recipe(), views.AUGMENTATION)
    assert options.script.outputs == ()
    options.copy.click()
    [output] = options.script.outputs
    assert "hflip: 0.0" in output["data"]["application/javascript"]
    assert options.copy.description == "Copied"
    options.controls["hflip"].value = 0.5
    assert options.copy.description == "Copy"


# ---- unused options


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_unused_options_are_those_that_a_recipe_refuses(path):
    recipe = Recipe.from_yaml(path)
    unused = inactive_options(recipe.model_dump())
    other = {"randaug_m": 3.0, "kd_loss": ["kl"], "erase_count": 3, "milestones": [1],
             "gamma": 0.5, "momentum": 0.5, "nesterov": True, "switch_prob": 0.1,
             "warmup_start_factor": 0.5, "deep_stem": True, "temperature": 2.0}  # fmt: skip
    for name, value in other.items():
        if value == getattr(recipe, name):
            continue
        try:
            recipe.replace(**{name: value})
            refused = ""
        except RecipeError as error:
            refused = str(error)
        assert (f"{name}: {value!r} has no effect" in refused) == (name in unused)
