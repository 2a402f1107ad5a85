"""Charts and image grids: labelled, complete, drawn without a screen."""

import io
import struct

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_folder
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from workbench import evaluation, schedule
from workbench.evaluation import comparison
from workbench.ui import image_grids, plots
from workbench.ui.figure import DPI, Figure, missing_glyphs_allowed

CLASSES = ["ant", "bee", "cat", "dog"]
IMAGES = [np.full((8, 8, 3), 40 * i, np.uint8) for i in range(5)]
COSINE = schedule.Cosine(0.4, 100, warmup=schedule.Warmup(10, 0.1))
BY_CLASS = pd.DataFrame({"class": CLASSES, "images": [10, 20, 30, 0],
                         "before": [50.0, 60.0, 70.0, np.nan],
                         "after": [80.0, 60.0, 30.0, np.nan]})  # fmt: skip
LISTS = pd.DataFrame({"label": [0, 1, 1, 2]})
PREDICTIONS = pd.DataFrame({"label": np.arange(60) % 4, "class1": np.arange(60) % 7 % 4})
TABLE = pd.DataFrame({"class": CLASSES, "p": [0.999, 0.08, 5e-4, 9e-7]})
STEPS = pd.DataFrame({"step": np.arange(1, 31), "loss": np.linspace(2, 1, 30)})
METRICS = pd.DataFrame({"epoch": [1, 2, 3], "step": [10, 20, 30], "train_loss": 1.5,
                        "val_loss": 1.4, "train_top1": 50.0, "top1": 60.0})  # fmt: skip
DISTILLED = METRICS.assign(train_task_loss=[1, 0.8, 0.5], train_kd_loss=[0.5, 0.4, 0.2])
EMPTY = pd.DataFrame()
FIGURES = {
    "one lr": lambda: plots.lr_curves({"cosine": (COSINE, 100, 10)}),
    "probabilities": lambda: plots.probabilities(Image.fromarray(IMAGES[0]), TABLE),
    "curves": lambda: plots.curves(STEPS, METRICS),
    "curves of nothing": lambda: plots.curves(EMPTY, EMPTY),
    "curves of a first epoch": lambda: plots.curves(STEPS.head(4), EMPTY),
    "curves of a distillation": lambda: plots.curves(STEPS, DISTILLED),
    "counts": lambda: plots.class_counts(LISTS, LISTS, CLASSES),
    "counts of many": lambda: plots.class_counts(LISTS, LISTS, [str(i) for i in range(300)]),
    "per class": lambda: plots.per_class(evaluation.per_class(PREDICTIONS, CLASSES)),
    "top-1 of many": lambda: plots.top1_curves({f"run {i}": METRICS for i in range(20)}),
    "top-1 of none": lambda: plots.top1_curves({}),
    "changes of nothing": lambda: plots.changes(BY_CLASS.tail(1), ["before", "after"]),
}


def texts(ax: Axes) -> list[str]:
    return [text.get_text().strip() for text in ax.texts]


def lines(ax: Axes) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in ax.lines}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_fits_a_page_and_all_axes_are_labelled(name):
    figure = FIGURES[name]()
    png = figure._repr_png_()
    assert png.startswith(b"\x89PNG")
    assert all(50 < side <= 1300 for side in struct.unpack(">II", png[16:24]))
    for ax in figure.axes:
        if ax.axison:  # no image
            assert ax.get_ylabel() and ax.get_xlabel()


@pytest.mark.filterwarnings("error")
def test_figures_are_written_with_names_in_any_script_and_dollars(tmp_path):
    figure = plots.overlay([("漢字 $x$ " + "long " * 30, np.arange(3.0), np.arange(3.0))], "x", "y")
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        figure.write(tmp_path / f"figure.{kind}")
        assert (tmp_path / f"figure.{kind}").read_bytes().startswith(start)


def test_the_first_colours_differ_in_lightness_too():
    """As Okabe and Ito's palette does, for print."""
    channels = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in plots.COLOURS]
    lightness = np.array(channels) @ [0.299, 0.587, 0.114]
    assert len(set(plots.COLOURS)) == 7 and abs(lightness[0] - lightness[1]) > 10


# ---- training


def test_curves_show_the_tables():
    left, right = FIGURES["curves"]().axes
    np.testing.assert_array_equal(lines(right)["validation"], [[1, 60], [2, 60], [3, 60]])
    np.testing.assert_allclose(left.lines[0].get_xdata(), STEPS.step / 10)
    assert list(lines(right)) == ["training (augmented images)", "validation"]
    assert all(tick == int(tick) for ax in (left, right) for tick in ax.get_xticks())
    left, _ = FIGURES["curves of a distillation"]().axes
    for label, column in (("training, labels", "train_task_loss"),
                          ("training, teacher (its unit)", "train_kd_loss"),
                          ("training, epoch", "train_loss")):  # fmt: skip
        np.testing.assert_array_equal(lines(left)[label], DISTILLED[["epoch", column]])
    assert len({(x.get_color(), x.get_linestyle()) for x in left.lines}) == len(left.lines)


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_top1_curves_show_the_last_value_and_skip_epochs_without_one():
    metrics = pd.DataFrame({"epoch": [1, 2, 3], "top1": [10.0, np.nan, 30.0], "ema_top1": 70.0})
    [ax] = plots.top1_curves({"mine": metrics, "other": METRICS, "new": EMPTY}).axes
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[1, 10], [3, 30]])
    assert legend(ax) == ["mine: 30.00 %", "other: 60.00 %", "new: no epoch yet"]
    assert legend(plots.top1_curves({"mine": metrics}, "ema").axes[0]) == ["mine: 70.00 %"]


def test_twenty_runs_are_distinct_beside_their_legend():
    figure = FIGURES["top-1 of many"]()
    [ax] = figure.axes
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 20
    figure.png()  # computes the layout
    box = ax.get_legend().get_window_extent()
    assert box.x0 >= ax.get_window_extent().x1 and box.height < figure.bbox.height


def test_an_lr_curve_has_the_values_of_its_schedule_and_equal_shapes_share_a_line():
    line = FIGURES["one lr"]().axes[0].lines[0]
    assert line.get_ydata().max() == pytest.approx(0.4)
    assert line.get_xdata()[-1] == pytest.approx(9.9)
    assert line.get_ydata()[0] == pytest.approx(0.04)
    half = schedule.Cosine(0.2, 100, warmup=schedule.Warmup(10, 0.1))
    other = (schedule.MultiStep(0.4, (50,)), 100, 10)
    ax = plots.lr_curves({"a": (COSINE, 100, 10), "b": (half, 100, 5), "other": other}).axes[0]
    assert list(lines(ax)) == ["a\nb", "other"]
    assert max(line.get_ydata().max() for line in ax.lines) == pytest.approx(1.0)


# ---- classes


def test_changes_are_sorted_and_show_both_values():
    ax = plots.changes(BY_CLASS, ["before", "after"]).axes[0]
    assert [bar.get_width() for bar in ax.patches] == [30, 0, -40]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["ant", "bee", "cat"]
    expected = ["50.0 to 80.0 % of 10", "60.0 to 60.0 % of 20", "70.0 to 30.0 % of 30"]
    assert texts(ax) == expected
    assert ax.get_xlabel() == "top-1 of after minus that of before (points)"
    assert ax.patches[0].get_facecolor() != ax.patches[2].get_facecolor()
    few = plots.changes(BY_CLASS, ["before", "after"], most=1).axes[0]
    assert [bar.get_width() for bar in few.patches] == [-40]
    assert few.get_title() == "the 1 of 4 classes that changed most"


@pytest.mark.parametrize("before, after", [(0.0, 100.0), (100.0, 0.0), (50.0, 51.0), (50.0, 50.0)])
def test_texts_of_bars_are_inside_the_axes(before, after):
    table = BY_CLASS.head(2).assign(before=[before, after], after=[after, before])
    figure = plots.changes(table, ["before", "after"])
    figure.png()
    [ax] = figure.axes
    inside = ax.get_window_extent()
    for box in [text.get_window_extent() for text in ax.texts]:
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1


def test_probabilities_have_one_unit_however_small_they_are():
    assert texts(FIGURES["probabilities"]().axes[1]) == ["99.9 %", "8.0 %", "0.05 %", "9e-05 %"]


def test_confusions_show_counts_and_how_many_classes_there_are():
    table = evaluation.confusion(PREDICTIONS, CLASSES, most=2)
    [ax, _] = plots.confusion(table).axes
    assert ax.get_title() == "the 2 of 4 classes confused most"
    assert [int(text) for text in texts(ax)] == [n for n in table.to_numpy().ravel() if n]
    table = pd.DataFrame([[-5.0, 5.0], [0.0, 0.0]], ["7", "21"], ["7", "21"])
    table.attrs["classes"] = 30
    [ax, _] = plots.confusion_change(table).axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["7", "21"]
    assert texts(ax) == ["-5", "+5"] and "2 of 30 classes" in ax.get_title()


# ---- comparison


def test_intervals_show_mean_runs_and_interval_in_the_colours_of_the_curves(tmp_path):
    paths = [
        run_folder(tmp_path, n, seed, lr=lr) for n, lr in (("a", 1), ("b", 2)) for seed in (0, 1)
    ]
    result = comparison.compare(paths)
    [ax] = plots.intervals(result.table, {g.name: g.top1 for g in result.groups}).axes
    row = result.table.iloc[0]
    assert list(ax.lines[0].get_xdata()) == [row.low, row.high]
    assert np.array_equal(ax.lines[1].get_xdata(), result.groups[0].top1)
    assert list(ax.lines[2].get_xdata()) == [row.top1]
    assert texts(ax)[0] == f"{row.top1:.2f} %, over 2 seeds"
    curves = plots.overlay(comparison.curves(result.groups), "epoch", "top-1 (%)").axes[0]
    colours = [line.get_color() for line in curves.lines if line.get_label()[0] != "_"]
    assert colours == [line.get_color() for line in ax.lines[::3]] == plots.COLOURS[:2]


def test_seeds_share_a_legend_entry_and_smoothing_is_an_exponential_mean():
    x = np.arange(100.0)
    noisy = np.where(x % 2, 1.0, -1.0)
    runs = [("a", x, noisy), ("a", x, noisy), ("b", x, x)]
    [ax] = plots.overlay(runs, "step", "loss (nats)", smoothing=0.9).axes
    assert legend(ax) == ["a (2 seeds)", "b"]
    pale, smooth = ax.lines[:2]
    assert pale.get_alpha() == 0.3 and np.array_equal(pale.get_ydata(), noisy)
    expected, mean, weight = [], 0.0, 0.0
    for value in noisy:
        mean, weight = 0.9 * mean + value, 0.9 * weight + 1
        expected.append(mean / weight)
    assert smooth.get_ydata() == pytest.approx(expected)
    assert texts(plots.overlay([], "step", "loss (nats)").axes[0]) == ["no run has this measure"]


def test_reliability_and_distances_show_their_tables():
    table = pd.DataFrame({"confidence": [0.3, 0.9], "top1": [0.5, 0.8], "images": [3, 4]})
    [ax] = plots.reliability({"a": table}).axes
    assert ax.lines[0].get_xydata() == pytest.approx(np.array([[30, 50], [90, 80]]))
    table = pd.DataFrame({"area": [0.1, 0.5, 1.0, 1.0], "change": [0.0, 30, 60, 255],
                          "reference_distance": [50.0] * 4})  # fmt: skip
    left, right = plots.distances(table).axes
    for ax in (left, right):
        assert sum(bar.get_height() for bar in ax.patches) == 4
        assert ax.get_ylabel() == "samples" and "(" in ax.get_xlabel()
    assert right.get_title() == "50 % of the samples differ more than another image"
    assert list(right.lines[0].get_xdata()) == [50, 50]
    plots.distances(table.assign(change=0.0, reference_distance=0.0)).png()


# ---- image grids


def pixels(figure: Figure) -> np.ndarray:
    return figure.axes[0].images[0].get_array()


@pytest.mark.parametrize("title_lines", [1, 6])
@pytest.mark.parametrize("count", [0, 24])
@pytest.mark.parametrize("heading", ["", "35 mistakes of the teacher, below each the label"])
def test_titles_and_heading_of_a_grid_are_complete_and_apart(title_lines, count, heading):
    titles = ["\n".join(["0.62 cat"] * title_lines)] * count
    figure = image_grids.grid((IMAGES * 5)[:count], titles, heading=heading)
    ink = np.asarray(Image.open(io.BytesIO(figure.png())).convert("L")) < 128
    assert ink.any() == bool(heading or count)
    assert not (ink[0].any() or ink[:, 0].any() or ink[:, -1].any())
    rows = np.flatnonzero(ink.any(1))
    if heading and count:  # a white line between heading and titles
        assert (np.diff(rows[: rows.searchsorted(40)]) > 1).any()


def test_images_keep_their_shape_and_are_as_large_as_a_cell():
    wide = (pixels(image_grids.grid([np.zeros((50, 400, 3), np.uint8)])) == 0).all(2)
    assert wide.any(1).sum() == image_grids.SIDE / 8 and wide.any(0).sum() == image_grids.SIDE
    blue = pixels(image_grids.grid([Image.new("RGBA", (300, 300), "#0000ff")]))
    assert (blue == (0, 0, 255)).all(2).sum() == image_grids.SIDE**2
    heading = "a sentence as long as that of a model which has no map, and then some more of it"
    sheet = pixels(image_grids.image_rows({"1": (IMAGES[:1], "a")}, heading))
    assert sheet.shape[1] >= 6.5 * len(heading)


def test_titles_fit_their_cells():
    names = [
        "cat", "Jaguar XK XKR 2012", "BMW 3 Series Wagon 2012", "$x$ " + 40 * "W",
        "0.62 Rolls-Royce Phantom Drophead Coupe Convertible 2012\n0.38 cat", "中文名字",
    ]  # fmt: skip
    figure = image_grids.grid([IMAGES[0]] * len(names), names, columns=6)
    renderer = FigureCanvasAgg(figure).get_renderer()
    titles = figure.axes[0].texts
    assert titles[0].get_fontsize() == 8 > titles[1].get_fontsize() > titles[2].get_fontsize() > 5
    assert [title.get_text() for title in titles][:3] == names[:3]
    assert titles[4].get_text() == "0.62 Rolls-R...ertible 2012\n0.38 cat"
    with missing_glyphs_allowed():
        for title in titles:
            width = title.get_window_extent(renderer).width / figure.dpi * DPI
            assert width < image_grids.CELL and title.get_fontsize() >= 5


def test_a_label_is_a_name_or_the_shares_of_a_mix():
    label = lambda target, **options: image_grids.label_text(target, CLASSES, **options)
    assert label(1) == "bee" and label(torch.tensor(2)) == "cat"
    assert label(torch.tensor([0.0, 1.0, 0.0, 0.0])) == "bee"
    assert label(torch.tensor([0.38, 0.0, 0.62, 0.0])) == "0.62 cat\n0.38 ant"
    assert label(torch.tensor([0.002, 0.998, 0.0, 0.0])) == "0.998 bee\n0.002 ant"
    shares = torch.tensor([0.1, 0.004, 0.6, 0.296])
    assert label(shares) == "0.60 cat\n0.30 dog\n0.10 ant"
    assert label(shares, most=2) == "0.60 cat\n0.30 dog"
    assert label(torch.tensor([0.0009, 0.0109, 0.0009, 0.0]), most=2) == "0.011 bee\n0.001 ant"


def test_a_tinted_image_keeps_its_brightness_and_shows_the_map_even_in_black():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, 2).repeat(2, 0)
    tinted = image_grids.tinted(ramp, np.stack([np.zeros(256), np.ones(256)]))
    assert tinted.dtype == np.uint8 and tinted.shape == (2, 256, 3)
    bright = np.asarray(Image.fromarray(tinted).convert("L")).astype(int)
    assert (np.diff(bright, axis=1) >= 0).all() and (np.ptp(bright, axis=1) > 140).all()
    red, blue = tinted[..., 0].astype(int), tinted[..., 2].astype(int)
    assert (blue[0] - red[0] >= 50).all() and (red[1] - blue[1] >= 50).all()
    middle = image_grids.tinted(ramp, np.full((2, 256), 0.5)).astype(int)
    assert np.abs(middle[0] - tinted.astype(int).mean(0)).max() <= 1
