"""Charts and image grids: labelled, complete, drawn without a screen."""

import base64
import io
import struct

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_folder
from matplotlib.axes import Axes
from PIL import Image

from workbench import evaluation, schedule
from workbench.evaluation import comparison
from workbench.ui import image_grids, plots
from workbench.ui.figure import SCALE, Sheet, text_width

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
    "probabilities": lambda: plots.probabilities({"a.png": (Image.fromarray(IMAGES[0]), TABLE)}),
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
    png, metadata = figure.png(), figure._repr_mimebundle_()[1]["image/png"]
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG") and metadata == {"width": width / 2}
    assert 50 < width / 2 <= image_grids.WIDTH and 50 < height / 2 <= 1300
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
    [ax] = plots.top1_curves({"mine": metrics, "other": METRICS}, "ema").axes
    assert legend(ax) == ["mine: 70.00 %, EMA", "other: 60.00 %"]


def test_of_twenty_runs_the_first_the_best_and_the_worst_have_names_and_colours():
    ends = {f"run {i}": METRICS.assign(top1=50.0 + (7 * i + 10) % 20) for i in range(20)}
    figure = plots.top1_curves(ends)
    [ax] = figure.axes
    best = sorted(ends, key=lambda name: -ends[name].top1.iloc[-1])
    named = {name.split(":")[0] for name in legend(ax)}
    assert named == {"run 0", *best[:3], *best[-3:], "13 others"} and len(legend(ax)) == 8
    styles = [(line.get_color(), line.get_linestyle()) for line in ax.lines[:20]]
    assert len(set(styles)) == 8 and styles.count(("#bbbbbb", "-")) == 13


def test_an_lr_curve_has_the_values_of_its_schedule_and_equal_shapes_share_a_line():
    line = FIGURES["one lr"]().axes[0].lines[0]
    assert line.get_ydata().max() == pytest.approx(0.4)
    assert line.get_xdata()[-1] == pytest.approx(9.9)
    assert line.get_ydata()[0] == pytest.approx(0.04)
    half = schedule.Cosine(0.2, 100, warmup=schedule.Warmup(10, 0.1))
    other = (schedule.MultiStep(0.4, (50,)), 100, 10)
    figure = plots.lr_curves({"a": (COSINE, 100, 10), "b": (half, 100, 5), "other": other})
    assert [ax.get_title() for ax in figure.axes] == ["a, b", "other"]
    assert [ax.lines[0].get_ydata().max() for ax in figure.axes] == pytest.approx([1.0, 1.0])


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


def test_probabilities_have_one_unit_however_small_they_are():
    assert texts(FIGURES["probabilities"]().axes[1]) == ["99.9 %", "8.0 %", "0.05 %", "9e-05 %"]


def test_a_confusion_has_shares_of_the_true_class_and_lists_the_largest_mistakes():
    table = pd.DataFrame([[90, 8, 2], [0, 10, 0], [1, 0, 4]], CLASSES[:3], CLASSES[:3])
    table.attrs = {"classes": 4, "images": [100, 10, 5]}
    matrix, pairs, bar = plots.confusion(table).axes
    assert texts(matrix) == ["90", "8", "2", "100", "20", "80"]
    assert matrix.get_title() == "the 3 of 4 classes confused most"
    assert [tick.get_text() for tick in pairs.get_yticklabels()] == [
        "ant \u2192 bee", "ant \u2192 cat", "cat \u2192 ant"
    ]  # fmt: skip
    assert texts(pairs) == ["8 of 100", "2 of 100", "1 of 5"]
    assert [bar.get_width() for bar in pairs.patches] == [8, 2, 1]
    # The colours range over the mistakes, of which the largest share is 1 of 5.
    assert bar.get_ylim() == (0, 20) and matrix.images[0].get_array().mask[0, 0]


def test_a_perfect_confusion_says_so():
    table = evaluation.confusion(PREDICTIONS.assign(class1=PREDICTIONS.label), CLASSES)
    assert plots.confusion(table).axes[1].get_title() == "no class is confused"


def test_a_change_of_confusions_names_classes_and_signs():
    table = pd.DataFrame([[-5.0, 5.0], [0.0, 0.0]], ["7", "21"], ["7", "21"])
    table.attrs["classes"] = 30
    matrix, pairs, _ = plots.confusion_change(table).axes
    assert [t.get_text() for t in matrix.get_xticklabels()] == ["7", "21"]
    assert texts(matrix) == ["-5", "+5"] and "2 of 30 classes" in matrix.get_title()
    assert texts(pairs) == ["+5"]


def test_agreement_has_the_colours_of_different_runs():
    table = pd.DataFrame([[100, 97.2], [97.2, 100]], ["a", "b"], ["a", "b"])
    ax, bar = plots.agreement(table).axes
    assert texts(ax) == ["100.0", "97.2", "97.2", "100.0"] and bar.get_ylim() == (97, 98)
    for equal in (100.0, 97.0):
        low, high = plots.agreement(table * 0 + equal).axes[1].get_ylim()
        assert low <= equal <= high <= 100 and high - low == 1


# ---- comparison


def test_intervals_show_mean_runs_and_interval_in_the_colours_of_the_curves(tmp_path):
    paths = [
        run_folder(tmp_path, n, seed, lr=lr) for n, lr in (("a", 1), ("b", 2)) for seed in (0, 1)
    ]
    result = comparison.compare(paths)
    [ax] = plots.intervals(result.table, {g.name: g.top1 for g in result.groups}).axes
    row = result.table.iloc[0]
    assert list(ax.lines[0].get_xdata()) == [row.low, row.high]
    assert list(ax.lines[1].get_xdata()) == [row.top1]
    assert np.array_equal(ax.lines[2].get_xdata(), result.groups[0].top1)
    assert texts(ax)[0] == f"{row.top1:.2f} %, over 2 seeds"
    curves = plots.overlay(comparison.curves(result.groups), "epoch", "top-1 (%)").axes[0]
    colours = [line.get_color() for line in curves.lines if line.get_label()[0] != "_"]
    assert colours == [line.get_color() for line in ax.lines[::3]] == plots.COLOURS[:2]


def test_a_recipe_has_its_colour_also_where_the_one_before_it_lacks_the_measure():
    lines = [("b", np.arange(3.0), np.arange(3.0))]
    [ax] = plots.overlay(lines, "epoch", "top-1 (%)", order=["a", "b"]).axes
    assert legend(ax) == ["b"] and {line.get_color() for line in ax.lines} == {plots.COLOURS[1]}


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


def pixels(sheet: Sheet) -> np.ndarray:
    return np.asarray(sheet.image)


@pytest.mark.parametrize("title_lines", [1, 6])
@pytest.mark.parametrize("count", [0, 24])
@pytest.mark.parametrize("heading", ["", "35 mistakes of the teacher, below each the label"])
def test_titles_and_heading_of_a_grid_are_complete_and_apart(title_lines, count, heading):
    titles = ["\n".join(["0.62 cat"] * title_lines)] * count
    sheet = image_grids.grid((IMAGES * 5)[:count], titles, heading=heading)
    ink = np.asarray(Image.open(io.BytesIO(sheet.png())).convert("L")) < 128
    assert ink.any() == bool(heading or count)
    assert not (ink[0].any() or ink[:, 0].any() or ink[:, -1].any())
    rows = np.flatnonzero(ink.any(1))
    if heading and count:  # a white line between heading and titles
        assert (np.diff(rows[: rows.searchsorted(80)]) > 1).any()
    assert sheet.texts == [heading] * bool(heading)
    assert [title for title, _ in sheet.cells] == titles


def test_images_keep_their_shape_and_have_two_pixels_for_each_of_a_cell():
    side = SCALE * (image_grids.CELL - image_grids.GAP)
    wide = (pixels(image_grids.grid([np.zeros((50, 400, 3), np.uint8)])) == 0).all(2)
    assert wide.any(1).sum() == side / 8 and wide.any(0).sum() == side
    blue = pixels(image_grids.grid([Image.new("RGBA", (300, 300), "#0000ff")]))
    assert (blue == (0, 0, 255)).all(2).sum() == side**2


def test_a_sheet_is_no_wider_than_a_notebook_and_wraps_its_heading():
    sheet = image_grids.grid(IMAGES * 5, columns=24, heading="a sentence of a model " * 20)
    assert sheet.image.width <= SCALE * image_grids.WIDTH and "\n" in sheet.texts[0]
    rows = {str(i): (IMAGES, [""] * 5) for i in range(4)}
    side_by_side = image_grids.image_rows(rows, columns=3).image
    assert side_by_side.width <= SCALE * image_grids.WIDTH


def test_an_original_is_twice_as_large_and_photographs_are_displayed_as_a_jpeg():
    image = np.full((250, 400, 3), (200, 30, 60), np.uint8)
    sheet = image_grids.grid([image] * 7, ["one"] * 7, columns=6, original=(image, "all"))
    files, sizes = sheet._repr_mimebundle_()
    opened = Image.open(io.BytesIO(base64.b64decode(files["image/jpeg"])))
    assert opened.width == 2 * sizes["image/jpeg"]["width"] == 2 * image_grids.NARROW
    boxes = [box for _, box in sheet.cells]
    for left, top, right, bottom in boxes:
        assert (right - left) / (bottom - top) == pytest.approx(400 / 250, rel=0.02)
        inside = np.asarray(opened).astype(int)[top + 2 : bottom - 2, left + 2 : right - 2]
        assert np.abs(inside - (200, 30, 60)).max() <= 6
    assert boxes[0][2] - boxes[0][0] > 2 * (boxes[1][2] - boxes[1][0])


def test_small_images_are_displayed_as_squares_of_their_exact_colours():
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    sheet = image_grids.grid([noise])
    file = base64.b64decode(sheet._repr_mimebundle_()[0]["image/png"])
    [(_, box)] = sheet.cells
    drawn = np.asarray(Image.open(io.BytesIO(file)).crop(box))
    np.testing.assert_array_equal(drawn, noise.repeat(6, 0).repeat(6, 1))


@pytest.mark.parametrize(
    "title", ["translate_x -100 px", "a" * 60, "several words " * 9, "宝" * 30]
)
def test_no_title_is_wider_than_its_image(title):
    black = [np.zeros((8, 8, 3), np.uint8)] * 5
    narrow = image_grids.image_rows({"": (black, [title] * 5)}, columns=2, width=800)
    for sheet in (image_grids.grid(black, [title] * 5), narrow):
        dark = np.flatnonzero((pixels(sheet) < 128).all(2).any(0))
        first, last = sheet.cells[0][1], sheet.cells[-1][1]
        assert first[0] - 1 <= dark.min() and dark.max() <= last[2]


def test_a_title_ends_after_the_most_lines():
    sheet = image_grids.grid(IMAGES[:1], ["\n".join("abcdefgh")], most_lines=6)
    assert sheet.cells[0][0] == "a\nb\nc\nd\ne\nf …"


def test_titles_have_one_size_and_fit_their_cells():
    names = [
        "cat", "Jaguar XK XKR 2012", "BMW 3 Series Wagon 2012", "$x$ " + 40 * "W",
        "0.62 Rolls-Royce Phantom Drophead Coupe Convertible 2012\n0.38 cat", "中文名字",
    ]  # fmt: skip
    titles = [title for title, _ in image_grids.grid([IMAGES[0]] * 6, names, columns=6).cells]
    assert titles[:3] == ["cat", "Jaguar XK XKR\n2012", "BMW 3 Series\nWagon 2012"]
    assert titles[4] == "0.62 Rolls-Royce\nPhantom...le 2012\n0.38 cat"
    assert max(map(text_width, titles)) < image_grids.CELL


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
