"""Charts of tables. Every function returns a Figure and shows nothing.

Colours are those of Okabe and Ito, distinct with any colour vision; line styles differ as well.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from PIL import Image

from workbench.evaluation.comparison import Comparison
from workbench.ui.figure import Figure

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":"]


def _style(i: int) -> dict[str, str]:
    """Colour and line style of the i-th name, the same in all figures."""
    style = STYLES[i // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": style}


def _short(name: str) -> str:
    """A name for a legend: of a long one start and end; `$` starts no formula."""
    name = name if len(name) <= 40 else f"{name[:19]}...{name[-19:]}"
    return name.replace("$", r"\$")


def _label(ax: Axes, x: str, y: str, grid: str = "both") -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if x == "epoch":
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if grid:
        ax.grid(alpha=0.3, axis=grid)


def _legend(ax: Axes, empty: str = "", beside: bool = False, size: int = 8) -> None:
    """A legend, beside the axes if wanted; without lines the text `empty`."""
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if beside else {}
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=size, frameon=False, **place)
    else:
        ax.text(0.5, 0.5, empty, ha="center", transform=ax.transAxes)


def probabilities(image: Image.Image, table: pd.DataFrame) -> Figure:
    """An image beside its predicted classes with their probabilities (export.predict_image)."""
    figure = Figure(7, 0.9 + 0.3 * max(4, len(table)))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
    left.imshow(np.asarray(image))
    left.set_axis_off()
    texts = [f"{100 * p:.1f} %" if p >= 0.001 else f"{100 * p:.1g} %" for p in table.p]
    _class_bars(right, table["class"], 100 * table.p, texts, "probability (%)")
    right.set_xlim(0, 100)
    return figure


def _class_bars(
    ax: Axes, classes: Sequence[str], values: pd.Series, texts: Sequence[str], xlabel: str
) -> None:
    """A horizontal bar per class, the first on top, with a text at its end: inside from 60 on."""
    ax.barh(range(len(values)), values, color=[COLOURS[int(value < 0)] for value in values])
    for i, (value, text) in enumerate(zip(values, texts, strict=True)):
        side = "right" if value < 0 or value > 60 else "left"
        ink = "white" if value > 60 else "black"
        ax.text(value, i, f" {text} ", va="center", ha=side, fontsize=7, color=ink)
    ax.set_yticks(range(len(values)), map(_short, classes), fontsize=8)
    _label(ax, xlabel, "class", grid="")
    ax.invert_yaxis()


def distances(table: pd.DataFrame) -> Figure:
    """Histograms of views.distances: the area of the crop, the change of the image."""
    figure = Figure()
    left, right = figure.subplots(1, 2, sharey=True)
    left.hist(100 * table.area, np.linspace(0, 100, 21), color=COLOURS[0])
    _label(left, "share of the image inside the crop (%)", "samples")
    largest = max(1.0, table[["change", "reference_distance"]].to_numpy().max())
    right.hist(table.change, np.linspace(0, largest, 21), color=COLOURS[0])
    reference = table.reference_distance.median()
    right.axvline(reference, ls="--", color=COLOURS[1], label="another image, median")
    _label(right, "change: RMS over pixels (0 to 255)", "samples")
    beyond = 100 * (table.change > table.reference_distance).mean()
    right.set_title(f"{beyond:.0f} % of the samples differ more than another image", fontsize=9)
    _legend(right)
    return figure


# ---- training


def lr_curves(schedules: Mapping[str, tuple[Callable[[int], float], int, int]]) -> Figure:
    """Learning rate by epoch of schedules (function, steps, steps per epoch).

    Several schedules are shown relative to their peaks and lengths; those of one shape share a
    line.
    """
    many = len(schedules) > 1
    shapes: dict[bytes, tuple[np.ndarray, np.ndarray, list[str]]] = {}
    for name, (lr_at, steps, steps_per_epoch) in schedules.items():
        at = np.unique(np.linspace(0, steps - 1, min(steps, 2000)).astype(int))
        x, y = at / steps_per_epoch, np.array([lr_at(int(step)) for step in at])
        if many:
            x, y = 100 * at / max(1, steps - 1), y / y.max()
        shape = np.interp(np.linspace(0, 100, 200), x, y).round(2).tobytes()
        shapes.setdefault(shape, (x, y, []))[2].append(name)
    figure = Figure(height=max(3.2, 0.6 + 0.16 * len(schedules)))
    ax = figure.subplots()
    for i, (x, y, names) in enumerate(shapes.values()):
        ax.plot(x, y, label="\n".join(names), **_style(i))
    if many:
        _label(ax, "share of the training (%)", "lr, share of its peak")
        _legend(ax, beside=True, size=7)
    else:
        _label(ax, "epoch", "lr")
    return figure


def lr_range(table: pd.DataFrame, lr: float) -> Figure:
    """The table of training.lr_range_test; a vertical line at the recipe's lr."""
    lines = [(key, table.lr.to_numpy(), table[key].to_numpy()) for key in ("loss", "smoothed_loss")]
    figure = overlay(lines, "lr (vertical line: of the recipe)", "training loss")
    figure.axes[0].set_xscale("log")
    figure.axes[0].axvline(lr, ls="--", color=COLOURS[6])
    return figure


def curves(steps: pd.DataFrame, metrics: pd.DataFrame) -> Figure:
    """Loss by step and epoch, and top-1 by epoch; the tables may be empty."""
    figure = Figure()
    left, right = figure.subplots(1, 2)
    if len(steps):
        last = metrics if len(metrics) else steps.assign(epoch=1)
        x = steps.step / max(1.0, float(last.step.iloc[-1]) / last.epoch.iloc[-1])
        left.plot(x, steps.loss, "-", color=COLOURS[5], lw=1, label="training, steps")
    lines = [  # axes, column, label, format, colour
        (left, "train_loss", "training, epoch", ".-", 0),
        (left, "train_task_loss", "training, labels", ".:", 3),  # before the loss weights
        (left, "train_kd_loss", "training, teacher (its unit)", ".:", 4),
        (left, "val_loss", "validation", ".--", 1),
        (left, "ema_val_loss", "validation, EMA", ".:", 2),
        (right, "train_top1", "training (augmented images)", ".--", 5),
        (right, "top1", "validation", ".-", 1),
        (right, "ema_top1", "validation, EMA", ".:", 2),
    ]
    for ax, column, label, style, colour in lines:
        if column in metrics:
            rows = metrics.dropna(subset=[column])
            ax.plot(rows.epoch, rows[column], style, color=COLOURS[colour], label=label)
    for ax, name in ((left, "loss (nats)"), (right, "top-1 (%)")):
        _label(ax, "epoch", name)
        _legend(ax, "no epoch yet")
    if len(steps):
        left.set_ylim(0, max(1e-3, float(np.nanpercentile(steps.loss, 99)) * 1.1))
    return figure


def top1_curves(metrics: Mapping[str, pd.DataFrame], weights: str = "raw") -> Figure:
    """Validation top-1 by epoch, a line per name; `weights` ema takes EMA where a run has it."""
    lines = []
    for name, table in metrics.items():
        column = "ema_top1" if weights == "ema" and "ema_top1" in table else "top1"
        rows = table.reindex(columns=["epoch", column]).dropna()
        last = f"{rows[column].iloc[-1]:.2f} %" if len(rows) else "no epoch yet"
        lines.append((f"{name}: {last}", rows.epoch.to_numpy(), rows[column].to_numpy()))
    return overlay(lines, "epoch", "validation top-1 (%)")


# ---- comparison


def overlay(
    lines: Sequence[tuple[str, np.ndarray, np.ndarray]],
    xlabel: str,
    ylabel: str,
    smoothing: float = 0.0,
) -> Figure:
    """(name, x, y) as lines; those of one name share colour, style and legend.

    `smoothing` is the weight of an exponential mean, drawn over the pale line.
    """
    figure = Figure(9, 3.6, layout=None)  # constrained layout draws twice, too slow for a slider
    figure.subplots_adjust(left=0.08, right=0.7, bottom=0.14, top=0.97)
    ax = figure.subplots()
    names = list(dict.fromkeys(name for name, _, _ in lines))
    for name, x, y in lines:
        style = _style(names.index(name))
        if smoothing > 0:
            ax.plot(*_thinned(x, y), lw=0.8, alpha=0.3, **style)
            y = pd.Series(y).ewm(alpha=1 - smoothing).mean().to_numpy()
        ax.plot(*_thinned(x, y), lw=1.4, marker="." if len(x) < 60 else None, **style)
    for i, name in enumerate(names):
        runs = sum(other == name for other, _, _ in lines)
        ax.plot([], [], label=_short(name) + (f" ({runs} seeds)" if runs > 1 else ""), **_style(i))
    _label(ax, xlabel, ylabel)
    _legend(ax, "no run has this measure", beside=True)
    return figure


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means over equal stretches."""
    every = -(-len(x) // most)
    if every < 2:
        return x, y
    starts = np.arange(0, len(x), every)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def intervals(table: pd.DataFrame, top1: Mapping[str, Sequence[float]]) -> Figure:
    """Mean top-1 with its interval for every row of a comparison's table; ticks are the runs."""
    figure = Figure(9, 0.9 + 0.34 * len(table))
    ax = figure.subplots()
    for i, row in enumerate(table.itertuples()):
        colour, runs = _style(i)["color"], top1[row.recipe]
        ax.plot([row.low, row.high], [i, i], color=colour, lw=2)
        ax.plot(runs, [i] * len(runs), "|", color=colour, ms=9)
        ax.plot([row.top1], [i], "o", color=colour)
        over = f"over {row.seeds} seeds" if row.seeds > 1 else "one run: over images"
        text = f"  {row.top1:.2f} %, {over}"
        ax.text(max(row.high, *runs), i, text, va="center", fontsize=8)
    ax.set_yticks(range(len(table)), [_short(name) for name in table.recipe], fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.35, y=0.15)
    _label(ax, "top-1 (%), 95 % interval", "recipe", grid="x")
    return figure


def top1_by_option(found: Comparison, option: str) -> Figure:
    """Mean top-1 of compared recipes, with its interval, against the values of an option."""
    table, values = found.table, [group.recipe[option] for group in found.groups]
    numeric = all(type(value) in (int, float) for value in values)
    ax = (figure := Figure(6)).subplots()
    x = np.array(values if numeric else range(len(values)))
    bars = np.abs(table[["low", "high"]].to_numpy().T - table.top1.to_numpy())
    ax.errorbar(x, table.top1, bars, fmt="o", capsize=4, color=COLOURS[0])
    if numeric and 0 < x.min() * 8 < x.max():
        ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(x, [_short(str(value)) for value in values])
    _label(ax, option, "top-1 (%), 95 % interval", grid="y")
    return figure


def top1_by_two_options(found: Comparison, down: str, across: str) -> Figure:
    """Mean top-1 of compared recipes, and their seeds, as a map over two options."""
    keys = {key: [str(group.recipe[key]) for group in found.groups] for key in (down, across)}
    table = found.table.assign(**keys).pivot_table(["top1", "seeds"], down, across, sort=False)
    top1, seeds = table.top1, table.seeds.to_numpy()
    ax = (figure := Figure(2.5 + 1.1 * top1.shape[1], 1.5 + 0.6 * len(top1))).subplots()
    figure.colorbar(image := ax.imshow(top1, cmap="cividis", aspect="auto"), label="top-1 (%)")
    for (i, j), value in np.ndenumerate(top1):
        if value == value:  # there are runs
            style = {"color": "black" if image.norm(value) > 0.55 else "white", "fontsize": 8}
            text = f"{value:.2f}\n{seeds[i, j]:.0f} seeds"
            ax.text(j, i, text, ha="center", va="center", **style)
    ax.set_xticks(range(top1.shape[1]), map(_short, top1.columns))
    ax.set_yticks(range(len(top1)), map(_short, top1.index))
    _label(ax, across, down, grid="")
    return figure


def reliability(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Top-1 by confidence, a line per name; a calibrated network is on the diagonal."""
    lines = [
        (name, 100 * table.confidence.to_numpy(), 100 * table.top1.to_numpy())
        for name, table in tables.items()
    ]
    diagonal = ("calibrated", np.array([0.0, 100.0]), np.array([0.0, 100.0]))
    xlabel = "confidence: probability of the prediction (%)"
    return overlay([*lines, diagonal], xlabel, "top-1 (%)")


# ---- classes


def class_counts(train: pd.DataFrame, val: pd.DataFrame, classes: Sequence[str]) -> Figure:
    """Images per class; over 40 classes sorted by count, without names."""
    figure = Figure(height=2.6)
    ax = figure.subplots()
    counts = [np.bincount(frame.label, minlength=len(classes)) for frame in (train, val)]
    many, x = len(classes) > 40, np.arange(len(classes))
    order = np.argsort(-counts[0], kind="stable") if many else x
    for i, (count, name) in enumerate(zip(counts, ("training", "validation"), strict=True)):
        label = f"{name}, {count.sum():,} images"
        ax.bar(x + 0.4 * i - 0.2, count[order], 0.4, color=COLOURS[i], label=label)
    if not many:
        long = sum(map(len, classes)) + 2 * len(classes) > 90
        ax.set_xticks(x, classes, rotation=90 if long else 0, fontsize=8)
    sorted_by = f"{len(classes)} classes, by images in training"
    _label(ax, sorted_by if many else "class", "images", grid="")
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def confusion(table: pd.DataFrame) -> Figure:
    """The table of evaluation.confusion, coloured by the share of the true class."""
    images = np.array(table.attrs["images"])[:, None]
    shares = 100 * table.to_numpy() / np.maximum(1, images)
    title, label = "classes confused most", "share of the true class (%)"
    colours = {"cmap": "cividis", "vmin": 0, "vmax": 100}
    return _class_matrix(table, shares, shares <= 55, title, label, "{}", **colours)


def confusion_change(table: pd.DataFrame) -> Figure:
    """The table of Comparison.confusion: by how many images each confusion changed."""
    largest = max(1.0, float(table.abs().to_numpy().max()))
    title, label = "classes that changed most", "images more (fewer below 0)"
    dark = table.abs().to_numpy() > 0.7 * largest
    colours = {"cmap": "PuOr_r", "vmin": -largest, "vmax": largest}
    return _class_matrix(table, table, dark, title, label, "{:+.3g}", **colours)


def _class_matrix(
    table: pd.DataFrame,
    values: np.ndarray | pd.DataFrame,
    dark: np.ndarray,
    title: str,
    label: str,
    text: str,
    **colours: str | float,
) -> Figure:
    """`values` as colours; up to 20 classes also the table as text, white on `dark` cells."""
    size = min(9.0, 2.2 + 0.3 * len(table))
    figure = Figure(size + 1.2, size)
    ax = figure.subplots()
    figure.colorbar(ax.imshow(values, **colours), ax=ax, label=label, shrink=0.8)
    for (i, j), count in np.ndenumerate(table.to_numpy()) if len(table) <= 20 else ():
        if count:
            ink, at = "white" if dark[i, j] else "black", {"ha": "center", "va": "center"}
            ax.text(j, i, text.format(count), fontsize=7, color=ink, **at)
    ax.set_xticks(range(len(table)), table.columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(table)), table.index, fontsize=8)
    _label(ax, "predicted", "true", grid="")
    if len(table) < (classes := table.attrs.get("classes", 0)):
        ax.set_title(f"the {len(table)} of {classes} {title}", fontsize=9)
    return figure


def per_class(table: pd.DataFrame, most: int = 30) -> Figure:
    """Top-1 of the weakest classes of evaluation.per_class, with the most frequent mistake."""
    part = table.dropna(subset=["top1"]).sort_values("top1", kind="stable").head(most)
    figure = Figure(8, 0.8 + 0.22 * len(part))
    ax = figure.subplots()
    texts = [
        f"{top1:.1f} % of {images}" + (f", mistaken for {wrong}" if wrong else "")
        for _, images, top1, wrong in part.itertuples(index=False)
    ]
    _class_bars(ax, part["class"], part.top1, texts, "top-1 (%)")
    ax.set_xlim(0, 100)
    return figure


def changes(table: pd.DataFrame, names: Sequence[str], most: int = 30) -> Figure:
    """The largest changes of top-1 by class between two columns of evaluation.side_by_side."""
    before, after = names
    change = (table[after] - table[before]).dropna()
    change = change.sort_values(key=abs, ascending=False, kind="stable").head(most)
    change = change.sort_values(ascending=False, kind="stable")
    part = table.loc[change.index]
    figure = Figure(8, 0.9 + 0.22 * len(part))
    ax = figure.subplots()
    numbers = zip(part[before], part[after], part.images, strict=True)
    texts = [f"{old:.1f} to {new:.1f} % of {images}" for old, new, images in numbers]
    xlabel = f"top-1 of {after} minus that of {before} (points)"
    _class_bars(ax, part["class"], change, texts, xlabel)
    ax.axvline(0, color="black", lw=0.8)
    ax.margins(x=0.4)
    if change.abs().max() < 1:  # small changes are not scaled to the width of the figure
        ax.set_xlim(-1.5, 1.5)
    if len(part) < len(table):
        ax.set_title(f"the {len(part)} of {len(table)} classes that changed most", fontsize=9)
    return figure
