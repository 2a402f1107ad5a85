"""Figures and widgets: labelled, drawn without a screen, quiet where nobody looks."""

import asyncio
import base64
import io
import struct
import threading
import time

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from workbench import evaluation, progress, runs, schedule, training
from workbench.recipe import Recipe
from workbench.ui import plots, widgets


def predictions(count=60, classes=4):
    rng = np.random.default_rng(0)
    p = np.sort(rng.dirichlet(np.ones(classes), count), axis=1)[:, ::-1]
    ranked = np.argsort(rng.random((count, classes)), axis=1)
    frame = pd.DataFrame({"row": range(count), "label": rng.integers(classes, size=count)})
    for i in range(classes):
        frame[f"class{i + 1}"], frame[f"p{i + 1}"] = ranked[:, i], p[:, i]
    return frame


def tables(epochs=3):
    steps = pd.DataFrame(
        {"step": range(1, 10 * epochs + 1), "loss": np.linspace(2, 1, 10 * epochs)}
    )
    metrics = pd.DataFrame(
        {
            "epoch": range(1, epochs + 1),
            "step": [10 * e for e in range(1, epochs + 1)],
            "train_loss": 1.5,
            "val_loss": 1.4,
            "train_top1": 50.0,
            "top1": 60.0,
        }
    )
    return steps, metrics


def distilled(epochs=3):
    """The tables of a distillation: as above, and both losses before their weights."""
    steps, metrics = tables(epochs)
    falling = np.linspace(1, 0.5, epochs)
    return steps, metrics.assign(train_task_loss=falling, train_kd_loss=falling / 2)


BY_CLASS = pd.DataFrame(
    {
        "class": ["ant", "bee", "cat", "dog"],
        "images": [10, 20, 30, 0],
        "before": [50.0, 60.0, 70.0, np.nan],
        "after": [80.0, 60.0, 30.0, np.nan],
    }
)
CLASSES = ["ant", "bee", "cat", "dog"]
ANSWER = pd.DataFrame({"class": CLASSES, "p": np.array([0.9, 0.08, 0.02, 0.0], np.float32)})
CONFUSION = evaluation.confusion(predictions(), CLASSES)
LISTS = pd.DataFrame({"label": [0, 1, 1, 2]})
IMAGES = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)]
COSINE = schedule.Cosine(0.4, 100, warmup=schedule.Warmup(10, 0.1))

FIGURES = {
    "grid": lambda: plots.grid(IMAGES, list("abcde"), columns=3, heading="five"),
    "empty grid": lambda: plots.grid([], []),
    "image_rows": lambda: plots.image_rows({"crop": (IMAGES, "abcde"), "flip": (IMAGES[:2], "ab")}),
    "one lr": lambda: plots.lr_curves({"cosine": (COSINE, 100, 10)}),
    "two lrs": lambda: plots.lr_curves({"a": (COSINE, 100, 10), "b": (COSINE, 100, 5)}),
    "answer": lambda: plots.answer(IMAGES[0], ANSWER),
    "curves": lambda: plots.curves(*tables()),
    "curves of nothing": lambda: plots.curves(pd.DataFrame(), pd.DataFrame()),
    "curves of a first epoch": lambda: plots.curves(tables()[0].head(4), pd.DataFrame()),
    "counts": lambda: plots.class_counts(LISTS, LISTS, CLASSES),
    "counts of many": lambda: plots.class_counts(LISTS, LISTS, [str(i) for i in range(300)]),
    "confusion": lambda: plots.confusion(CONFUSION),
    "confusion of many": lambda: plots.confusion(CONFUSION, most=2),
    "per class": lambda: plots.per_class(evaluation.per_class(predictions(), CLASSES)),
    "curves of a distillation": lambda: plots.curves(*distilled()),
    "top-1 of two": lambda: plots.top1_curves({"a": tables()[1], "b": tables(2)[1]}),
    "top-1 of many": lambda: plots.top1_curves({f"run {i}": tables()[1] for i in range(20)}),
    "top-1 of none": lambda: plots.top1_curves({}),
    "top-1 of a run without an epoch": lambda: plots.top1_curves({"a": pd.DataFrame()}),
    "changes": lambda: plots.changes(BY_CLASS, ["before", "after"]),
    "changes of few": lambda: plots.changes(BY_CLASS, ["before", "after"], most=1),
    "no changes": lambda: plots.changes(BY_CLASS, ["after", "after"]),
    "changes of nothing": lambda: plots.changes(BY_CLASS.tail(1), ["before", "after"]),
}


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_shows_itself_and_fits_a_page(name):
    width, height = size(FIGURES[name]()._repr_png_())
    assert 50 < width <= 1300 and 50 < height <= 1300


@pytest.mark.parametrize("name", [n for n in FIGURES if "grid" not in n and n != "image_rows"])
def test_every_axis_says_what_it_measures(name):
    for ax in FIGURES[name]().axes:
        if not ax.axison:  # an image
            continue
        assert ax.get_ylabel() and (ax.get_xlabel() or "share" in ax.get_ylabel())


@pytest.mark.parametrize("lines", [1, 6])
@pytest.mark.parametrize("count", [0, 1, 24])
@pytest.mark.parametrize(
    "heading", ["", "35 mistakes taken over from the teacher, below each the label"]
)
def test_neither_a_title_nor_the_heading_of_a_grid_is_cut_off_or_written_over(
    lines, count, heading
):
    titles = ["\n".join(["0.62 cat"] * lines)] * count
    figure = plots.grid((IMAGES * 5)[:count], titles, heading=heading)
    ink = np.asarray(Image.open(io.BytesIO(figure.png())).convert("L")) < 128
    assert ink.any() == bool(heading or count)
    edge = np.concatenate([ink[0], ink[:, 0], ink[:, -1]])
    assert not edge.any()
    rows = np.flatnonzero(ink.any(1))
    if heading and count:  # a white line parts the heading from the titles
        assert (np.diff(rows[: rows.searchsorted(40)]) > 1).any()


def test_curves_show_the_numbers_of_the_tables():
    steps, metrics = tables()
    left, right = plots.curves(steps, metrics).axes
    lines = {line.get_label(): line.get_xydata() for line in right.lines}
    np.testing.assert_array_equal(lines["validation"], [[1, 60], [2, 60], [3, 60]])
    np.testing.assert_allclose(left.lines[0].get_xdata(), steps.step / 10)


def test_a_distillation_shows_both_losses_beside_their_sum():
    steps, metrics = distilled()
    left, right = plots.curves(steps, metrics).axes
    lines = {line.get_label(): line.get_xydata() for line in left.lines}
    for label, column in (
        ("training, labels", "train_task_loss"),
        ("training, teacher (its unit)", "train_kd_loss"),
        ("training, epoch", "train_loss"),
    ):
        np.testing.assert_array_equal(lines[label], metrics[["epoch", column]])
    assert len({(line.get_color(), line.get_linestyle()) for line in left.lines}) == len(lines)
    assert left.get_ylabel() == "loss (nats)"
    plain = plots.curves(*tables()).axes[0]
    assert not [line for line in plain.lines if "teacher" in line.get_label()]
    assert [line.get_label() for line in right.lines] == [
        "training (augmented images)",
        "validation",
    ]


def test_epochs_are_counted_in_whole_numbers():
    for figure in (plots.curves(*tables(2)), plots.top1_curves({"a": tables(2)[1]})):
        for ax in figure.axes:
            assert all(tick == int(tick) for tick in ax.get_xticks())


def test_top1_curves_say_the_last_value_of_each_and_skip_epochs_without_one():
    metrics = tables(4)[1].assign(top1=[10.0, np.nan, 30.0, np.nan])
    axis = plots.top1_curves({"mine": metrics, "other": tables(2)[1]}).axes[0]
    mine, other = axis.lines
    np.testing.assert_array_equal(mine.get_xydata(), [[1, 10], [3, 30]])
    np.testing.assert_array_equal(other.get_xydata(), [[1, 60], [2, 60]])
    texts = [text.get_text() for text in axis.get_legend().get_texts()]
    assert texts == ["mine: 30.00 %", "other: 60.00 %"]
    assert axis.get_ylabel() == "validation top-1 (%)"


def test_twenty_runs_are_told_apart_beside_their_curves():
    figure = FIGURES["top-1 of many"]()
    [axis] = figure.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 20
    figure.png()  # lays it out
    boxes = [box.get_window_extent() for box in (axis, axis.get_legend())]
    assert boxes[1].x0 >= boxes[0].x1  # the legend hides no line


def test_changes_go_from_the_largest_gain_to_the_largest_loss_and_say_both_ends():
    axis = FIGURES["changes"]().axes[0]
    assert [bar.get_width() for bar in axis.patches] == [30, 0, -40]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["ant", "bee", "cat"]
    texts = [text.get_text().strip() for text in axis.texts]
    assert texts == ["50.0 to 80.0 % of 10", "60.0 to 60.0 % of 20", "70.0 to 30.0 % of 30"]
    assert axis.get_xlabel() == "top-1 of after less that of before (points)"
    gain, loss = axis.patches[0].get_facecolor(), axis.patches[2].get_facecolor()
    assert gain != loss


def test_of_many_classes_those_that_changed_most_are_kept_and_it_is_said():
    axis = FIGURES["changes of few"]().axes[0]
    assert [bar.get_width() for bar in axis.patches] == [-40]
    assert axis.get_title() == "the 1 of 4 classes that changed most"


def test_the_figures_beside_the_bars_lie_inside_the_axis():
    for before, after in ([0.0, 100.0], [100.0, 0.0], [50.0, 51.0], [50.0, 50.0]):
        table = BY_CLASS.head(2).assign(before=before, after=after)
        figure = plots.changes(table, ["before", "after"])
        figure.png()
        [axis] = figure.axes
        inside = axis.get_window_extent()
        for text in axis.texts:
            box = text.get_window_extent()
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1, (before, after)


def test_an_lr_curve_reaches_the_peak_and_both_ends():
    line = plots.lr_curves({"cosine": (COSINE, 100, 10)}).axes[0].lines[0]
    assert line.get_ydata().max() == pytest.approx(0.4)
    assert line.get_xdata()[-1] == pytest.approx(9.9)
    assert line.get_ydata()[0] == pytest.approx(0.04)


def test_schedules_of_one_shape_share_a_line_that_names_them_all():
    half = schedule.Cosine(
        0.2, 100, warmup=schedule.Warmup(10, 0.1)
    )  # the same shape at another peak
    schedules = {
        "a": (COSINE, 100, 10),
        "b": (half, 100, 5),
        "other": (schedule.MultiStep(0.4, (50,)), 100, 10),
    }
    axis = plots.lr_curves(schedules).axes[0]
    assert [line.get_label() for line in axis.lines] == ["a, b", "other"]
    assert max(line.get_ydata().max() for line in axis.lines) == pytest.approx(1.0)


def test_a_label_is_a_name_or_the_shares_of_a_mix():
    assert plots.label_text(1, CLASSES) == CLASSES[1]
    assert plots.label_text(torch.tensor(2), CLASSES) == CLASSES[2]
    assert plots.label_text(torch.tensor([0.0, 1.0, 0.0, 0.0]), CLASSES) == CLASSES[1]
    mixed = plots.label_text(torch.tensor([0.38, 0.0, 0.62, 0.0]), CLASSES)
    assert mixed == f"0.62 {CLASSES[2]}\n0.38 {CLASSES[0]}"
    hardly = plots.label_text(torch.tensor([0.002, 0.998, 0.0, 0.0]), CLASSES)
    assert hardly == f"0.998 {CLASSES[1]}\n0.002 {CLASSES[0]}"


def test_what_a_teacher_says_is_its_likeliest_classes_without_those_that_read_nothing():
    shares = torch.tensor([0.1, 0.004, 0.6, 0.296])
    assert plots.label_text(shares, CLASSES) == "0.60 cat\n0.30 dog\n0.10 ant"
    assert plots.label_text(shares, CLASSES, most=2) == "0.60 cat\n0.30 dog"
    thousand = torch.full((1000,), 0.0009)
    thousand[7] = 0.0109
    told = plots.label_text(thousand, [f"c{i}" for i in range(1000)], most=3).split("\n")
    assert told[0] == "0.011 c7" and len(told) == 3  # not 0.01 and twice 0.00


def test_colours_differ_in_lightness_too():
    """Okabe and Ito's palette; a check that nobody swaps in two shades that print alike."""
    lights = []
    for colour in plots.COLOURS:
        r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        lights.append(0.299 * r + 0.587 * g + 0.114 * b)
    assert len(set(plots.COLOURS)) == 7
    assert abs(lights[0] - lights[1]) > 10


# ---- widgets


def test_an_explorer_redraws_when_a_control_moves_and_carries_its_image_on_paper(monkeypatch):
    seen = []

    def draw(level, name):
        seen.append((level, name))
        return plots.grid(IMAGES[: level + 1], heading=name)

    slider = ipywidgets.IntSlider(0, 0, 4)
    explorer = widgets.InteractiveView(draw, level=slider, name=ipywidgets.Text("x"))
    before = explorer._image.value
    slider.set_state({"value": 3})  # what a browser sends
    assert seen == [(0, "x"), (3, "x")]
    assert explorer._image.value != before
    bundle = explorer._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert base64.b64decode(data["image/png"]) == explorer._image.value
    # Readers prefer a widget, and without its front end show nothing: headless there is none.
    assert "application/vnd.jupyter.widget-view+json" not in data
    monkeypatch.setattr(widgets, "watched", lambda: "jupyter")
    data = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == explorer._image.value
    assert "application/vnd.jupyter.widget-view+json" in data


def test_an_explorer_says_what_went_wrong_and_recovers():
    def draw(level):
        if level == 1:
            raise ValueError("no <such> level")
        return plots.grid(IMAGES[:1])

    slider = ipywidgets.IntSlider(0, 0, 2)
    explorer = widgets.InteractiveView(draw, level=slider)
    slider.value = 1
    assert "ValueError: no &lt;such&gt; level" in explorer._text.value
    slider.value = 2
    assert explorer._text.value == ""


STEP = {
    "kind": "step",
    "step": 10,
    "steps": 40,
    "epoch": 1,
    "lr": 0.1,
    "loss": 1.25,
    "seconds": 100.0,
    "images_per_second": 320.0,
    "data_wait": 0.25,
}
EPOCH = {
    "kind": "epoch",
    "epoch": 1,
    "step": 10,
    "steps": 40,
    "lr": 0.1,
    "train_loss": 1.3,
    "train_top1": 50.0,
    "val_loss": 1.1,
    "top1": 61.5,
    "top5": 90.0,
    "val_images": 500,
}


def test_where_nobody_looks_an_epoch_is_one_line_and_no_bar(tmp_path, capsys):
    view = widgets.Progress(runs.Run(tmp_path), viewer="batch")
    view.show(STEP)
    view.show(EPOCH)
    said = capsys.readouterr()
    assert said.err == ""
    first, epoch = said.out.splitlines()
    assert "40 steps" in first  # how the training starts, once
    assert epoch.startswith("epoch   1") and "top-1 61.50 (n=500)" in epoch


def test_in_jupyter_it_is_said_too_what_was_left_out(tmp_path):
    run = runs.Run(tmp_path)
    record = {"train_images": 9, "val_images": 3, "classes": ["a", "b"], "device": "CPU"}
    with run.writing():
        run.write_json(
            "environment.json",
            {**record, "precision": "fp32", "start": "seed", "train_val_duplicates": 1},
        )
        run.append("quarantine.csv", {"side": "train", "file": "x.png", "step": -1})
    view = widgets.Live(run)
    view.show(STEP)
    view.show(EPOCH)
    out = view.start.value
    assert out.startswith("9 training and 3 validation images, 2 classes")
    assert "<br>1 images left out, named in quarantine.csv" in out
    assert "<br>1 validation images are in training too" in out


def test_a_live_view_says_step_speed_waiting_and_memory(tmp_path):
    view = widgets.Live(runs.Run(tmp_path))
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


def test_pause_waits_and_stop_ends_the_waiting(tmp_path):
    view, rows = widgets.Live(runs.Run(tmp_path)), Gate(5)
    view.pausing.click()
    thread = threading.Thread(target=view._take, args=[rows])
    thread.start()
    until(lambda: rows.given == 1)
    time.sleep(0.2)
    assert rows.given == 1, "nobody asks for the next row"
    view.pausing.click()
    thread.join(20)
    assert rows.given == 5 and rows.closed
    assert view.stopping.disabled and view.pausing.disabled


def test_the_stop_button_ends_a_training_that_can_go_on(tmp_path):
    recipe = Recipe(epochs=500, workers=0, train_fraction=0.1, log_every=1, runs_dir=str(tmp_path))
    run = runs.Run(recipe.folder)
    view = widgets.Live(run)
    rows = training.fit(recipe, run, stop=view.stop)
    thread = threading.Thread(target=view._take, args=[rows])
    thread.start()
    until(lambda: view.bar.value >= 2)
    view.stopping.click()
    thread.join(60)
    assert run.status()["state"] == "stopped" and run.file("last.pt").exists()
    assert "the same command resumes it" in view.line.value
    step = run.status()["step"]
    assert next(iter(training.fit(recipe, run)))["step"] == step + 1


def test_stop_leaves_a_run_elsewhere_its_file(tmp_path):
    run = runs.Run(tmp_path)
    view = widgets.Live(run, elsewhere=True)
    view.stopping.click()
    assert run.stop_requested() and view.pausing.disabled
    view.stopping.click()


def test_an_error_of_the_training_reaches_the_cell(tmp_path):
    def rows():
        yield STEP
        raise training.TrainingError("the loss is nan")

    with pytest.raises(training.TrainingError, match="the loss is nan"):
        asyncio.run(widgets.Live(runs.Run(tmp_path)).see(rows()))


def test_interrupt_waits_for_the_step_and_ends_normally(tmp_path):
    view, ended = widgets.Live(runs.Run(tmp_path)), []

    def rows():
        while not view.stop.is_set():
            time.sleep(0.01)
            yield STEP
        ended.append("with a checkpoint")

    async def interrupted():
        cell = asyncio.ensure_future(view.see(rows()))
        await asyncio.sleep(0.3)
        cell.cancel()
        await cell

    asyncio.run(interrupted())
    assert ended == ["with a checkpoint"]


def started(run, **more) -> None:
    record = {"train_images": 9, "val_images": 3, "classes": ["a", "b"], "device": "CPU"}
    with run.writing():
        run.write_json("environment.json", {**record, "precision": "fp32", "start": "seed", **more})


def test_probabilities_have_one_unit_however_small_they_are():
    table = pd.DataFrame({"class": ["a", "b", "c"], "p": [0.999, 5e-4, 9e-7]})
    figure = plots.answer(IMAGES[0], table)
    texts = [text.get_text().strip() for text in figure.axes[1].texts]
    assert texts == ["99.9 %", "0.05 %", "9e-05 %"]


def test_a_distillation_names_its_teachers_and_what_is_kept_of_their_answers(tmp_path, capsys):
    run = runs.Run(tmp_path)
    teachers = [
        {"source": f"runs/t{i}", "model": "resnet18", "image_size": 48 + i, "digest": f"abc{i}"}
        for i in range(2)
    ]
    started(run, teachers=teachers, teacher_cache="teachers' answers are kept, 3 MB, here")
    widgets.Progress(run, viewer="batch").show(STEP)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "teacher: runs/t0, resnet18, 48 pixels, weights abc0",
        "teacher: runs/t1, resnet18, 49 pixels, weights abc1",
        "teachers' answers are kept, 3 MB, here",
    ]


def test_without_a_teacher_nobody_speaks_of_one(tmp_path, capsys):
    run = runs.Run(tmp_path)
    started(run)
    view = widgets.Progress(run, viewer="batch")
    view.show(STEP)
    view.show(EPOCH)
    out = capsys.readouterr().out
    assert "teacher" not in out and "mimic" not in out


def test_an_epoch_of_a_distillation_says_both_losses(tmp_path, capsys):
    view = widgets.Progress(runs.Run(tmp_path), viewer="batch")
    view.show({**EPOCH, "train_task_loss": 0.8, "train_kd_loss": 0.25})
    epoch = capsys.readouterr().out.splitlines()[-1]
    assert "train loss 1.3000 (task 0.8000, mimic 0.2500) top-1 50.00" in epoch


def test_a_long_epoch_says_the_time_left(tmp_path, capsys):
    view = widgets.Progress(runs.Run(tmp_path), viewer="batch")
    view.said -= 61
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


def test_a_long_look_at_images_is_a_line_a_minute_where_nobody_watches(capsys):
    with progress.bar(400, "reading images", "img") as bar:
        bar.update(10)
        assert capsys.readouterr().out == ""
        bar.start, bar.said = bar.start - 100, bar.said - 61
        bar.update(90)
    assert capsys.readouterr().out == "reading images: 100 of 400 img, about 5 min left\n"
