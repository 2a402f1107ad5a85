"""Charts of tables. Every function returns a Figure and shows nothing."""

import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from PIL import Image

from workbench.evaluation.comparison import Comparison
from workbench.evaluation.statistics import wilson_percent
from workbench.ui import axes
from workbench.ui.axes import COLOURS
from workbench.ui.figure import DPI, POINTS, Chart, Figure, styled, text_width


@styled()
def probabilities(predicted: Mapping[str, tuple[Image.Image, pd.DataFrame]]) -> Figure:
    """By file name an image beside its classes with their probabilities (export.predict_image)."""
    tallest = max(len(table) for _, table in predicted.values())
    figure = Chart(7, (0.9 + 0.3 * max(4, tallest)) * len(predicted))
    grid = figure.subplots(len(predicted), 2, width_ratios=[1, 1.6], squeeze=False)
    for (left, right), (name, (image, table)) in zip(grid, predicted.items(), strict=True):
        left.imshow(np.asarray(image))
        left.set_axis_off()
        left.set_title(axes.short(name))
        texts = [f"{100 * p:.1f} %" if p >= 0.001 else f"{100 * p:.1g} %" for p in table.p]
        axes.bars(right, table["class"], 100 * table.p, texts, "probability (%)")
        right.set_xlim(0, 100)
    return figure


@styled()
def distances(table: pd.DataFrame) -> Figure:
    """Histograms of views.distances: the area of the crop, the change of the image."""
    figure = Chart()
    left, right = figure.subplots(1, 2, sharey=True)
    left.hist(100 * table.area, np.linspace(0, 100, 21), color=COLOURS[0])
    axes.label(left, "share of the image inside the crop (%)", "samples")
    largest = max(1.0, table[["change", "reference_distance"]].to_numpy().max())
    right.hist(table.change, np.linspace(0, largest, 21), color=COLOURS[0])
    reference = table.reference_distance.median()
    right.axvline(reference, ls="--", color=COLOURS[1], label="another image, median")
    axes.label(right, "change: RMS over pixels (0 to 255)", "samples")
    beyond = 100 * (table.change > table.reference_distance).mean()
    right.set_title(f"{beyond:.0f} % of the samples differ more than another image")
    axes.legend(right)
    return figure


# ---- training


@styled()
def lr_curves(schedules: Mapping[str, tuple[Callable[[int], float], int, int]]) -> Figure:
    """Learning rate by epoch of schedules (function, steps, steps per epoch).

    Several schedules are shown relative to their peaks and lengths, each shape in its own axes.
    """
    many = len(schedules) > 1
    shapes: dict[bytes, tuple[np.ndarray, np.ndarray, list[str]]] = {}
    for name, (lr_at, steps, steps_per_epoch) in schedules.items():
        at = np.unique(np.linspace(0, steps - 1, min(steps, 2000)).astype(int))
        x, y = at / steps_per_epoch, np.array([lr_at(int(step)) for step in at])
        if many:
            x, y = 100 * at / max(1, steps - 1), y / y.max()
        shape = np.interp(np.linspace(0, 100, 200), x, y).round(2).tobytes()
        shapes.setdefault(shape, (x, y, []))[2].append(axes.short(name, 150))
    columns = min(4, len(shapes))
    figure = Chart(height=max(3.2, 1.3 * -(-len(shapes) // columns)))
    panels = figure.subplots(-(-len(shapes) // 4), columns, sharex=True, sharey=True, squeeze=False)
    for ax in panels.flat[len(shapes) :]:
        ax.set_axis_off()
    for ax, (x, y, names) in zip(panels.flat, shapes.values(), strict=False):
        ax.plot(x, y, color=COLOURS[0])
        axes.label(ax, "" if many else "epoch", "" if many else "lr")
        if many:
            ax.set_title(textwrap.fill(", ".join(names), 32), fontsize=POINTS)
    if many:
        figure.supxlabel("share of the training (%)", fontsize=POINTS)
        figure.supylabel("lr, share of its peak", fontsize=POINTS)
    return figure


def lr_range(table: pd.DataFrame, lr: float) -> Figure:
    """The table of training.lr_range_test; a vertical line at the recipe's lr."""
    lines = [(key, table.lr.to_numpy(), table[key].to_numpy()) for key in ("loss", "smoothed_loss")]
    figure = overlay(lines, "lr (vertical line: of the recipe)", "training loss")
    figure.axes[0].set_xscale("log")
    figure.axes[0].axvline(lr, ls="--", color=COLOURS[6])
    return figure


@styled()
def curves(steps: pd.DataFrame, metrics: pd.DataFrame, steps_per_epoch: int = 0) -> Figure:
    """Loss by step and epoch, and top-1 by epoch; the tables may be empty.

    `steps_per_epoch` places the steps of a first epoch that has not ended.
    """
    figure = Chart()
    draw_curves(*figure.subplots(1, 2), steps, metrics, steps_per_epoch)
    return figure


@styled()
def live_curves(steps: pd.DataFrame, metrics: pd.DataFrame, steps_per_epoch: int = 0) -> Figure:
    """`curves` one above the other, to stand beside a table of epochs."""
    figure = Chart(4, 4.6)
    draw_curves(*figure.subplots(2, 1, sharex=True), steps, metrics, steps_per_epoch)
    return figure


def draw_curves(
    left: Axes, right: Axes, steps: pd.DataFrame, metrics: pd.DataFrame, steps_per_epoch: int = 0
) -> None:
    """The axes of `curves`: loss, and top-1."""
    if len(steps):
        ended = metrics.step.iloc[-1] / metrics.epoch.iloc[-1] if len(metrics) else 0
        x = steps.step / (ended or steps_per_epoch or steps.step.iloc[-1])
        left.plot(x, steps.loss, "-", color=COLOURS[5], lw=1, label="training, steps")
    lines = [  # axes, column, label, format, colour
        (left, "train_loss", "training, epoch", "-", 0),
        (left, "train_task_loss", "training, labels", ":", 3),  # before the loss weights
        (left, "train_kd_loss", "training, teacher (its unit)", ":", 4),
        (left, "val_loss", "validation", "--", 1),
        (left, "ema_val_loss", "validation, EMA", ":", 2),
        (right, "train_top1", "training (augmented images)", "--", 5),
        (right, "top1", "validation", "-", 1),
        (right, "ema_top1", "validation, EMA", ":", 2),
    ]
    for ax, column, label, style, colour in lines:
        if column in metrics:
            rows = metrics.dropna(subset=[column])
            points = {"marker": "." if len(rows) < 60 else None, "color": COLOURS[colour]}
            ax.plot(rows.epoch, rows[column], style, label=label, **points)
    for ax, name in ((left, "loss (nats)"), (right, "top-1 (%)")):
        axes.label(ax, "epoch", name)
        axes.limit(ax, name)
        axes.legend(ax, "no epoch yet")


def top1_curves(metrics: Mapping[str, pd.DataFrame], weights: str = "raw") -> Figure:
    """Validation top-1 by epoch, a line per name; `weights` ema takes EMA where a run has it."""
    lines = []
    for name, table in metrics.items():
        column = "ema_top1" if weights == "ema" and "ema_top1" in table else "top1"
        rows = table.reindex(columns=["epoch", column]).dropna()
        last = f"{rows[column].iloc[-1]:.2f} %" if len(rows) else "no epoch yet"
        last += ", EMA" * (column == "ema_top1")
        lines.append((f"{name}: {last}", rows.epoch.to_numpy(), rows[column].to_numpy()))
    return overlay(lines, "epoch", "validation top-1 (%)")


# ---- comparison


@styled()
def overlay(
    lines: Sequence[tuple[str, np.ndarray, np.ndarray]],
    xlabel: str,
    ylabel: str,
    smoothing: float = 0.0,
    order: Sequence[str] = (),
) -> Figure:
    """Lines (name, x, y), one colour and legend entry per name: the seeds of a recipe share one.

    `smoothing` is the weight of the past in an exponential mean; the raw line stays, pale, unless
    there are more than axes.MOST lines. Of more than axes.MOST names only the first one and those
    that end highest and lowest have a colour. Names of `order`, with or without a line, are first.
    """
    runs = [name for name, _, _ in lines]
    names, place = list(dict.fromkeys(runs)), [*dict.fromkeys([*order, *runs])].index
    labels = {name: axes.short(name) for name in _foremost(lines, names)}
    labels |= {
        name: f"{labels[name]} ({k} seeds)" for name in labels if (k := runs.count(name)) > 1
    }
    others = f"{len(names) - len(labels)} others"
    room = 60 + max(map(text_width, [others, *labels.values()]))  # of the legend
    figure = Chart(9, 3.6, layout=None)  # constrained layout draws twice, too slow for a slider
    figure.subplots_adjust(left=0.08, right=1 - room / (9 * DPI), bottom=0.14, top=0.97)
    ax = figure.subplots()
    grey = {"color": "#bbbbbb", "zorder": 1}
    for name, x, y in lines:
        style = axes.style(place(name)) if name in labels else grey
        x, y, most = np.asarray(x), np.asarray(y), max(100, 3000 // len(lines))
        if smoothing > 0 and len(lines) <= axes.MOST:
            ax.plot(*axes.thinned(x, y, most), lw=0.8, alpha=0.3, **style)
        if smoothing > 0:
            y = pd.Series(y).ewm(alpha=1 - smoothing).mean().to_numpy()
        ax.plot(*axes.thinned(x, y, most), marker="." if len(x) < 60 else None, **style)
    for name, label in labels.items():
        ax.plot([], [], label=label, **axes.style(place(name)))
    if len(labels) < len(names):
        ax.plot([], [], label=others, **grey)
    axes.label(ax, xlabel, ylabel)
    axes.limit(ax, ylabel)
    axes.legend(ax, "no run has this measure", beside=True)
    return figure


def _foremost(lines: Sequence[tuple[str, np.ndarray, np.ndarray]], names: list[str]) -> list[str]:
    """At most axes.MOST names: the first one, then those whose lines end highest and lowest."""
    if len(names) <= axes.MOST:
        return names
    ends = pd.Series({name: y[-1] for name, _, y in lines if len(y)}).drop(
        names[0], errors="ignore"
    )
    ends = ends.sort_values(ascending=False, kind="stable").index
    return [names[0], *ends[: axes.MOST // 2 - 1], *ends[-(axes.MOST // 2 - 1) :]]


@styled()
def intervals(table: pd.DataFrame, top1: Mapping[str, Sequence[float]]) -> Figure:
    """Mean top-1 with its interval for every row of a comparison's table; ticks are the runs."""
    figure = Chart(9, 0.7 + 0.24 * len(table))
    ax = figure.subplots()
    for i, row in enumerate(table.itertuples()):
        colour, runs = axes.style(i)["color"], top1[row.recipe]
        axes.interval(ax, i, row.top1, row.low, row.high, colour)
        ax.plot(runs, [i] * len(runs), "|", color=colour, ms=9)
    over = [f"over {n} seeds" if n > 1 else "one run: over images" for n in table.seeds]
    texts = [f"{value:.2f} %, {text}" for value, text in zip(table.top1, over, strict=True)]
    axes.rows(ax, list(table.recipe), texts, 300)
    axes.label(ax, "top-1 (%), 95 % interval", "recipe", grid="x")
    every = [*table.low, *table.high, *(run for runs in top1.values() for run in runs)]
    axes.percent_limits(ax, every)
    return figure


@styled()
def top1_by_option(found: Comparison, option: str) -> Figure:
    """Mean top-1 of compared recipes, with its interval, against the values of an option."""
    table, values = found.table, [group.recipe[option] for group in found.groups]
    numeric = all(type(value) in (int, float) for value in values)
    ax = (figure := Chart(6)).subplots()
    x = np.array(values if numeric else range(len(values)))
    bars = np.abs(table[["low", "high"]].to_numpy().T - table.top1.to_numpy())
    ax.errorbar(x, table.top1, bars, fmt="o", capsize=4, color=COLOURS[0])
    if numeric and 0 < x.min() * 8 < x.max():
        ax.set_xscale("log")
        ax.minorticks_off()
    names = [axes.short(str(value)) for value in values]
    ax.set_xticks(x, names, rotation=90 if sum(map(text_width, names)) > 400 else 0)
    axes.label(ax, option, "top-1 (%), 95 % interval", grid="y")
    return figure


@styled()
def top1_by_two_options(found: Comparison, down: str, across: str) -> Figure:
    """Mean top-1 of compared recipes, and their seeds, as a map over two options."""
    keys = {key: [str(group.recipe[key]) for group in found.groups] for key in (down, across)}
    table = found.table.assign(**keys).pivot_table(["top1", "seeds"], down, across, sort=False)
    ax = (figure := Chart(2.5 + 1.1 * table.top1.shape[1], 1.5 + 0.6 * len(table))).subplots()
    cells = table.top1.map("{:.2f}\n".format) + table.seeds.map("{:.0f} seeds".format)
    cells = cells.where(table.top1.notna(), "")
    text = lambda i, j: cells.iloc[i, j]
    axes.heat_map(ax, table.top1, text, "top-1 (%)", aspect="auto", cmap="cividis")
    axes.label(ax, across, down, grid="")
    return figure


@styled()
def agreement(table: pd.DataFrame) -> Figure:
    """The table of Comparison.agreement: the diagonal, always 100, has no colour."""
    size, margin = _heat_map_size(table)
    ax = (figure := Chart(size + margin, size + margin - 0.6)).subplots()
    label = "same prediction (% of the images)"
    values, text = _off_diagonal(table), lambda i, j: f"{table.iloc[i, j]:.1f}"
    top = min(100.0, np.floor(np.nanmax(values, initial=0)) + 1)
    ends = {"vmin": min(top - 1, np.floor(np.nanmin(values, initial=100))), "vmax": top}
    axes.heat_map(ax, values, text, label, cmap="cividis", **ends)
    return figure


@styled()
def reliability(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Top-1 by confidence, a line per name; a calibrated network is on the diagonal."""
    lines = [
        (name, 100 * table.confidence.to_numpy(), 100 * table.top1.to_numpy())
        for name, table in tables.items()
    ]
    diagonal = ("calibrated", np.array([0.0, 100.0]), np.array([0.0, 100.0]))
    xlabel = "confidence: probability of the prediction (%)"
    figure = overlay([*lines, diagonal], xlabel, "correct (%)")
    figure.axes[0].set(xlim=(0, 100), ylim=(0, 100))
    return figure


# ---- classes


@styled()
def class_counts(train: pd.DataFrame, val: pd.DataFrame, classes: Sequence[str]) -> Figure:
    """Images per class; over 40 classes sorted by count, without names."""
    names = [axes.short(name, axes.NAME) for name in classes]
    long = sum(map(text_width, names)) + 12 * len(names) > 700
    ax = (figure := Chart(height=2.6 + 0.8 * long)).subplots()
    counts = [np.bincount(frame.label, minlength=len(classes)) for frame in (train, val)]
    many, x = len(classes) > 40, np.arange(len(classes))
    order = np.argsort(-counts[0], kind="stable") if many else x
    for i, (count, name) in enumerate(zip(counts, ("training", "validation"), strict=True)):
        label = f"{name}, {count.sum():,} images"
        ax.bar(x + 0.4 * i - 0.2, count[order], 0.4, color=COLOURS[i], label=label)
    if not many:
        ax.set_xticks(x, names, rotation=90 if long else 0)
    sorted_by = f"{len(classes)} classes, by images in training"
    axes.label(ax, sorted_by if many else "class", "images", grid="")
    ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


@styled()
def confusion(table: pd.DataFrame) -> Figure:
    """The table of evaluation.confusion as shares of the true class, and the largest mistakes.

    The colours are of the mistakes alone: the correct predictions would hide them.
    """
    images = np.maximum(1, np.array(table.attrs["images"], int))
    shares, wrong = 100 * table.div(images, axis=0), _off_diagonal(table)
    text = lambda i, j: f"{shares.iloc[i, j]:.3g}" if table.iloc[i, j] else ""
    of = lambda i, j: f"{table.iloc[i, j]:,} of {images[i]:,}"
    top = max(1.0, np.nanmax(_off_diagonal(shares), initial=0))
    heat = {"label": "mistakes (% of the true class)", "cmap": "Oranges", "vmin": 0, "vmax": top}
    return _class_matrix(_off_diagonal(shares), text, wrong, of, "confused", **heat)


@styled()
def confusion_change(table: pd.DataFrame) -> Figure:
    """The table of Comparison.confusion: by how many images each confusion changed."""
    text = lambda i, j: f"{table.iloc[i, j]:+.2g}" if table.iloc[i, j] else ""
    top = max(1.0, np.nanmax(_off_diagonal(table.abs()), initial=0))
    heat = {"label": "images more (fewer below 0)", "cmap": "PuOr_r", "vmin": -top, "vmax": top}
    return _class_matrix(table, text, _off_diagonal(table), text, "changed", **heat)


def _heat_map_size(table: pd.DataFrame) -> tuple[float, float]:
    """Inches of a square table as a heat map, and of its names and colour bar."""
    widest = max(text_width(axes.short(name, axes.NAME)) for name in table.index)
    return min(3.8, max(2.2, 0.36 * len(table))), 1.3 + widest / DPI


def _off_diagonal(table: pd.DataFrame) -> pd.DataFrame:
    """The table with NaN in its diagonal."""
    return table.where(~np.eye(len(table), dtype=bool))


def _class_matrix(
    values: pd.DataFrame,
    text: Callable[[int, int], str],
    mistakes: pd.DataFrame,
    mistake_text: Callable[[int, int], str],
    what: str,
    **heat: str | float,
) -> Figure:
    """`values` as a heat map; beside it the largest of `mistakes` as bars, in images."""
    amounts = np.nan_to_num(mistakes.to_numpy(float))
    order = np.argsort(-np.abs(amounts), axis=None, kind="stable")[:12]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, amounts.shape), strict=True)]
    pairs = [pair for pair in pairs if amounts[pair]]
    names = [" \u2192 ".join(axes.short(values.index[k], 80) for k in pair) for pair in pairs]
    size, margin = _heat_map_size(values)
    beside = 2.2 + max(map(text_width, ["", *names])) / DPI
    figure = Chart(size + margin + beside, max(size + margin, 1 + 0.2 * len(pairs)))
    left, right = figure.subplots(1, 2, width_ratios=[size, 1.4])
    axes.heat_map(left, values, text, **heat)
    axes.label(left, "predicted", "true", grid="")
    classes = values.attrs.get("classes", 0)
    if len(values) < classes:
        left.set_title(f"the {len(values)} of {classes} classes {what} most")
    texts = [mistake_text(*pair) for pair in pairs]
    colours = [matplotlib.colormaps[heat["cmap"]](share) for share in (0.75, 0.25)]
    if not pairs:
        right.set_axis_off()
        right.set_title(f"no class is {what}")
        return figure
    axes.bars(right, names, [amounts[pair] for pair in pairs], texts, "images", colours)
    axes.label(right, "images", "true \u2192 predicted", grid="x")
    return figure


@styled()
def per_class(table: pd.DataFrame, most: int = 30) -> Figure:
    """Top-1 of the weakest classes of evaluation.per_class, with the most frequent mistake."""
    figure = Chart(9, 0.7 + 0.2 * min(most, table.top1.notna().sum()))
    draw_classes(figure.subplots(), table, most)
    return figure


def draw_classes(ax: Axes, table: pd.DataFrame, most: int) -> None:
    """The axes of `per_class`: points with Wilson's 95 % intervals, the weakest class on top."""
    part = table.dropna(subset=["top1"]).sort_values("top1", kind="stable").head(most)
    bounds = [wilson_percent(p, n) for n, p in zip(part.images, part.top1, strict=True)]
    for i, (top1, (low, high)) in enumerate(zip(part.top1, bounds, strict=True)):
        axes.interval(ax, i, top1, low, high, COLOURS[0])
    texts = [
        f"{top1:.1f} % of {images:,}" + (f", mistaken for {axes.short(wrong)}" if wrong else "")
        for _, images, top1, wrong in part.itertuples(index=False)
    ]
    axes.rows(ax, list(part["class"]), texts)
    axes.label(ax, "top-1 (%), 95 % interval", "class", grid="x")
    axes.percent_limits(ax, [bound for pair in bounds for bound in pair] or [0, 100])


@styled()
def changes(table: pd.DataFrame, names: Sequence[str], most: int = 30) -> Figure:
    """The largest changes of top-1 by class between two columns of evaluation.side_by_side."""
    before, after = names
    change = (table[after] - table[before]).dropna()
    change = change.sort_values(key=abs, ascending=False, kind="stable").head(most)
    change = change.sort_values(ascending=False, kind="stable")
    part = table.loc[change.index]
    ax = (figure := Chart(9, 0.9 + 0.2 * len(part))).subplots()
    numbers = zip(part[before], part[after], part.images, strict=True)
    texts = [f"{old:.1f} to {new:.1f} % of {images:,}" for old, new, images in numbers]
    xlabel = f"top-1 of {axes.short(after)} minus that of {axes.short(before)} (points)"
    axes.bars(ax, part["class"], change, texts, xlabel)
    ax.axvline(0, color="black", lw=0.8)
    low, high = min(0.0, change.min()), max(0.0, change.max())
    ax.set_xlim(min(1.05 * low, -1.5), max(1.05 * high, 1.5))  # small changes do not fill the axes
    if len(part) < len(table):
        ax.set_title(f"the {len(part)} of {len(table)} classes that changed most")
    return figure
