"""Figures as functions: tables and images in, a figure out, nothing shown or kept.

Colours are Okabe and Ito's, told apart with any colour vision; lines differ in style as well.
"""

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colors, ticker
from matplotlib.figure import Figure as _Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from PIL import Image

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":"]
DPI = 90  # of a figure saved as pixels


class Figure(_Figure):
    """A matplotlib figure that a notebook shows by itself, white in dark themes too."""

    def __init__(self, width: float = 9, height: float = 3.2, layout: str | None = "constrained"):
        super().__init__(figsize=(width, height), layout=layout, facecolor="white")

    def png(self) -> bytes:
        """The figure as a PNG file."""
        buffer = io.BytesIO()
        self._save(buffer, "png")
        return buffer.getvalue()

    def write(self, path: str | Path) -> None:
        """Writes the figure to a file; its suffix decides: .png, .svg or .pdf."""
        self._save(path, Path(path).suffix[1:])

    def _save(self, where: Any, form: str) -> None:
        with _any_script():
            fast = {"pil_kwargs": {"compress_level": 1}} if form == "png" else {}
            self.savefig(where, format=form, dpi=DPI, **fast)

    def _repr_png_(self) -> bytes:
        return self.png()


@contextlib.contextmanager
def _any_script() -> Iterator[None]:
    """Names in any script; a box stands for what the font lacks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def grid(
    images: Sequence[Any],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 8,
    heading: str = "",
) -> Figure:
    """Images (PIL or height x width x 3) in rows of `columns`, a title above each.

    Few images stand at the left of a figure that is as wide as its heading.
    """
    titles = titles or [""] * len(images)
    columns = max(1, math.ceil(7 * len(heading) / CELL), min(columns, len(images)))
    lines = max((title.count("\n") + 1 for title in titles if title), default=0)
    above, words = 25 if heading else 0, 4 + LINE * lines
    line = words + SIDE + 4
    rows = -(-len(images) // columns)
    sheet = _Sheet(CELL * columns, above + max(1, rows) * line, heading)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        left, top = CELL * (i % columns), above + line * (i // columns) + words
        sheet.put(image, title, left, top)
    return sheet.figure()


def answer(image: Any, table: pd.DataFrame) -> Figure:
    """An image beside the best classes for it, with their probabilities: prediction.one's."""
    figure = Figure(7, 0.9 + 0.3 * max(4, len(table)))
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
    left.imshow(np.asarray(image))
    left.set_axis_off()
    right.barh(range(len(table)), 100 * table.p, color=COLOURS[0])
    for i, p in enumerate(table.p):
        text = f" {100 * p:.1f} % " if p >= 0.001 else f" {100 * p:.1g} % "
        right.text(100 * p, i, text, va="center", ha="right" if p > 0.8 else "left", fontsize=8,
                   color="white" if p > 0.8 else "black")  # fmt: skip
    right.set_yticks(range(len(table)), [_short(name, 24) for name in table["class"]], fontsize=8)
    right.invert_yaxis()
    right.set_xlim(0, 100)
    right.set_xlabel("probability (%)")
    right.set_ylabel("class")
    return figure


def label_text(target: Any, classes: Sequence[str], most: int | None = None) -> str:
    """A class number as its name; a soft label as its shares, a line each: "0.62 cat".

    Shares that would read 0.00 are left out, and those behind the `most` largest.
    """
    if np.ndim(target) == 0:
        return classes[int(target)]
    shares = np.asarray(target)
    if shares.max() >= 0.9995:
        return classes[int(shares.argmax())]
    digits = 2 if 0.1 <= shares.max() < 0.995 else 3
    mixed = [i for i in np.argsort(-shares)[:most] if shares[i] >= 0.5 * 0.1**digits]
    return "\n".join(f"{shares[i]:.{digits}f} {classes[i]}" for i in mixed)


def image_rows(
    rows: Mapping[str, tuple[Sequence[Any], Sequence[str]]], heading: str = "", columns: int = 1
) -> Figure:
    """One row of (images, titles) for every name, each as long as it needs to be.

    With `columns` above 1 that many rows stand side by side.
    """
    most = max(len(images) for images, _ in rows.values())
    margin = 12 + 7 * max(len(part) for name in rows for part in name.split("\n"))
    lines = max(title.count("\n") + 1 for _, titles in rows.values() for title in titles)
    above, words = 25 if heading else 0, 4 + LINE * lines
    line = words + SIDE + 4
    width, height = margin + CELL * most, above + line * -(-len(rows) // columns)
    sheet = _Sheet(max(columns * width, 7 * len(heading)), height, heading)
    for i, (name, (images, titles)) in enumerate(rows.items()):
        left, top = width * (i % columns) + margin, above + line * (i // columns) + words
        sheet.words.append((left - 6, top + SIDE / 2, name, 9, "right", "center"))
        for k, (image, title) in enumerate(zip(images, titles, strict=True)):
            sheet.put(image, title, left + CELL * k, top)
    return sheet.figure()


def tinted(image: Any, weight: np.ndarray) -> np.ndarray:
    """An image's brightness in blue where `weight` (h, w) is 0, in orange where it is 1.

    uint8 (h, w, 3). Both are told apart with any colour vision, black and white parts take
    colour as well, and the image can still be read: its light and dark stay.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    light = np.asarray(image.convert("L"), np.float32)[..., None] / 255
    weight = np.asarray(weight, np.float32)[..., None]
    dark, bright = (
        (1 - weight) * np.array(colors.to_rgb(cold)) + weight * np.array(colors.to_rgb(warm))
        for cold, warm in (("#0d1a4d", "#803300"), ("#cce6ff", "#ffe673"))
    )
    return (255 * (dark + (bright - dark) * light)).round().astype(np.uint8)


CELL, SIDE, LINE = 104, 96, 13  # pixels at DPI: an image's place, its longer side, a title's line


class _Sheet:
    """Images and words at places in pixels from the top left, drawn as one image.

    An Axes for each image would take most of a second, while a slider waits.
    """

    def __init__(self, width: int, height: int, heading: str = ""):
        self.canvas = np.full((height, width, 3), 255, np.uint8)
        self.words: list[tuple[float, float, str, float, str, str]] = []
        if heading:
            self.words.append((width / 2, 5, heading, 10, "center", "top"))

    def put(self, image: Any, title: str, left: int, top: int) -> None:
        """An image below its title in a place of CELL pixels, as large as SIDE allows."""
        image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        scale = SIDE / max(image.size)
        size = [max(1, round(scale * side)) for side in image.size]
        kind = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
        pixels = np.asarray(image.convert("RGB").resize(size, kind))
        left += (CELL - size[0]) // 2
        self.canvas[top : top + size[1], left : left + size[0]] = pixels
        title, points = _fitting(title)
        self.words.append((left + size[0] / 2, top - 3, title, points, "center", "bottom"))

    def figure(self) -> Figure:
        height, width, _ = self.canvas.shape
        figure = Figure(width / DPI, height / DPI, layout=None)
        ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        ax.set_axis_off()
        place = (0, width, height, 0)
        ax.imshow(self.canvas, extent=place, aspect="auto", interpolation="nearest")
        for x, y, text, points, across, along in self.words:
            ax.text(x, y, text.replace("$", r"\$"), fontsize=points, ha=across, va=along)
        return figure


@functools.lru_cache(4096)
def _fitting(title: str) -> tuple[str, float]:
    """A title and its size in points, 8 to 5, so that it stays within CELL; else cut short."""
    lines, font, room = title.split("\n"), FontProperties(size=8), CELL - 10
    with _any_script():
        widths = [text_to_path.get_text_width_height_descent(t, font, False)[0] for t in lines]
    points = 8 * room / max(room, max(widths) * DPI / 72)
    if points < 5:
        half = max(4, int(max(map(len, lines)) * points / 10) - 1)
        cut = lambda line: line if len(line) <= 2 * half + 3 else f"{line[:half]}...{line[-half:]}"
        lines, points = list(map(cut, lines)), 5.0
    return "\n".join(lines), points


def distances(table: pd.DataFrame) -> Figure:
    """Histograms of views.distances: how much of the image a draw keeps, how far it goes."""
    figure = Figure()
    left, right = figure.subplots(1, 2, sharey=True)
    left.hist(100 * table.area, np.linspace(0, 100, 21), color=COLOURS[0])
    left.set_xlabel("share of the image inside the crop (%)")
    left.set_ylabel("draws")
    most = max(1.0, table[["change", "reference_distance"]].to_numpy().max())
    right.hist(table.change, np.linspace(0, most, 21), color=COLOURS[0])
    right.axvline(
        table.reference_distance.median(),
        ls="--",
        color=COLOURS[1],
        label="another image, median",
    )
    right.set_xlabel("change: RMS over pixels (0 to 255)")
    right.set_ylabel("draws")
    beyond = 100 * (table.change > table.reference_distance).mean()
    right.set_title(f"{beyond:.0f} % of the draws go farther than another image", fontsize=9)
    for ax in (left, right):
        ax.grid(alpha=0.3)
    right.legend(fontsize=8, frameon=False)
    return figure


def lr_curves(
    schedules: Mapping[str, tuple[Callable[[int], float], int, int]], *, log: bool = False
) -> Figure:
    """Learning rate over epochs; each schedule comes with (its function, steps, steps per epoch).

    With several schedules the rates are shares of their peaks over shares of the training, so
    that shapes can be compared; schedules of one shape share a line and its label.
    """
    many = len(schedules) > 1
    shapes: dict[bytes, tuple[np.ndarray, np.ndarray, list[str]]] = {}
    for name, (rate, steps, per_epoch) in schedules.items():
        at = np.unique(np.linspace(0, steps - 1, min(steps, 2000)).astype(int))
        values = np.array([rate(int(step)) for step in at])
        x = at / max(1, steps - 1) * 100 if many else at / per_epoch
        y = values / values.max() if many else values
        key = np.interp(np.linspace(0, 100, 200), x, y).round(2).tobytes() if many else b""
        shapes.setdefault(key, (x, y, []))[2].append(name)
    figure = Figure(
        height=max(3.2, 0.6 + 0.16 * sum(-(-len(n) // 2) for _, _, n in shapes.values()))
    )
    ax = figure.subplots()
    for i, (x, y, names) in enumerate(shapes.values()):
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        label = "\n".join(", ".join(names[k : k + 2]) for k in range(0, len(names), 2))
        ax.plot(x, y, style, color=COLOURS[i % len(COLOURS)], label=label)
    ax.set_xlabel("share of the training (%)" if many else "epoch")
    ax.set_ylabel("lr, share of its peak" if many else "lr")
    if log:
        ax.set_yscale("log")
    if many:
        ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.grid(alpha=0.3)
    return figure


def curves(steps: pd.DataFrame, metrics: pd.DataFrame) -> Figure:
    """Loss by step and epoch at the left, top-1 by epoch at the right; empty tables give axes."""
    figure = Figure()
    left, right = figure.subplots(1, 2)
    if len(steps):
        per_epoch = _steps_per_epoch(steps, metrics)
        left.plot(
            steps.step / per_epoch, steps.loss, "-", color=COLOURS[5], lw=1, label="training, steps"
        )
    if len(metrics):
        left.plot(
            metrics.epoch, metrics.train_loss, ".-", color=COLOURS[0], label="training, epoch"
        )
        right.plot(
            metrics.epoch,
            metrics.train_top1,
            ".--",
            color=COLOURS[5],
            label="training (augmented images)",
        )
        apart = {
            "train_task_loss": "training, labels",
            "train_kd_loss": "training, teacher (its unit)",
        }
        for column, colour in zip(apart, (COLOURS[3], COLOURS[4]), strict=True):
            if column in metrics:  # a distillation: both losses before their weights
                left.plot(metrics.epoch, metrics[column], ".:", color=colour, label=apart[column])
        seen = metrics.dropna(subset=["top1"])
        left.plot(seen.epoch, seen.val_loss, ".--", color=COLOURS[1], label="validation")
        right.plot(seen.epoch, seen.top1, ".-", color=COLOURS[1], label="validation")
        if "ema_top1" in metrics:
            left.plot(
                seen.epoch, seen.ema_val_loss, ".:", color=COLOURS[2], label="validation, EMA"
            )
            right.plot(seen.epoch, seen.ema_top1, ".:", color=COLOURS[2], label="validation, EMA")
    for ax, name in ((left, "loss (nats)"), (right, "top-1 (%)")):
        _epochs(ax)
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)
        else:
            ax.text(0.5, 0.5, "no epoch yet", ha="center", transform=ax.transAxes)
    if len(steps):
        left.set_ylim(0, max(1e-3, float(np.nanpercentile(steps.loss, 99)) * 1.1))
    return figure


def top1_curves(metrics: Mapping[str, pd.DataFrame], weights: str = "raw") -> Figure:
    """Validation top-1 by epoch, a line per name, its last value in the legend.

    With `weights` ema that of averaged weights, where a run kept them.
    """
    figure = Figure(9 if len(metrics) > 4 else 6.5)
    ax = figure.subplots()
    for i, (name, table) in enumerate(metrics.items()):
        column = "ema_top1" if weights == "ema" and "ema_top1" in table else "top1"
        seen = table.reindex(columns=["epoch", column]).dropna().rename(columns={column: "top1"})
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        label = f"{name}: {seen.top1.iloc[-1]:.2f} %" if len(seen) else f"{name}: no epoch yet"
        ax.plot(
            seen.epoch, seen.top1, style, marker=".", color=COLOURS[i % len(COLOURS)], label=label
        )
    _epochs(ax)
    ax.set_ylabel("validation top-1 (%)")
    ax.grid(alpha=0.3)
    if len(metrics) > 4:
        ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    elif metrics:
        ax.legend(fontsize=8, frameon=False)
    else:
        ax.text(0.5, 0.5, "no run yet", ha="center", transform=ax.transAxes)
    return figure


def overlay(
    lines: Sequence[tuple[str, np.ndarray, np.ndarray]],
    xlabel: str,
    ylabel: str,
    smoothing: float = 0.0,
) -> Figure:
    """(name, x, y) as lines; those of one name share a colour, a style and a place in the legend.

    With `smoothing` above 0 an exponential mean of that weight is drawn over the pale line. Lines
    of more than 400 points are means over equal stretches: more a screen does not show.
    """
    figure = Figure(9, 3.6, layout=None)  # the other draws everything twice, while a slider waits
    figure.subplots_adjust(left=0.08, right=0.7, bottom=0.14, top=0.97)
    ax = figure.subplots()
    names = list(dict.fromkeys(name for name, _, _ in lines))
    for name, x, y in lines:
        look = _look(names.index(name))
        if smoothing > 0:
            ax.plot(*_thinned(x, y), lw=0.8, alpha=0.3, **look)
            y = pd.Series(y).ewm(alpha=1 - smoothing).mean().to_numpy()
        ax.plot(*_thinned(x, y), lw=1.4, marker="." if len(x) < 60 else None, **look)
    for i, name in enumerate(names):
        runs = sum(other == name for other, _, _ in lines)
        ax.plot([], [], label=_short(name) + (f" ({runs} seeds)" if runs > 1 else ""), **_look(i))
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.3)
    if names:
        ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    else:
        ax.text(0.5, 0.5, "none of these runs has it", ha="center", transform=ax.transAxes)
    return figure


def _thinned(x: np.ndarray, y: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    every = -(-len(x) // most)
    if every < 2:
        return x, y
    starts = np.arange(0, len(x), every)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def intervals(table: pd.DataFrame, top1: Mapping[str, Sequence[float]]) -> Figure:
    """Top-1 with its interval, a row per recipe of comparison's table; small dots are the runs."""
    figure = Figure(9, 0.9 + 0.34 * len(table))
    ax = figure.subplots()
    for i, row in enumerate(table.itertuples()):
        colour = _look(i)["color"]
        ax.plot([row.low, row.high], [i, i], color=colour, lw=2)
        ax.plot(top1[row.recipe], [i] * len(top1[row.recipe]), "|", color=colour, ms=9)
        ax.plot([row.top1], [i], "o", color=colour)
        text = f" {row.top1:.2f} %, over {row.seeds} seeds" if row.seeds > 1 else (
            f" {row.top1:.2f} %, one run: over images")  # fmt: skip
        ax.text(max(row.high, *top1[row.recipe]), i, f" {text}", va="center", fontsize=8)
    ax.set_yticks(range(len(table)), [_short(name) for name in table.recipe], fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.35, y=0.15)
    ax.set_xlabel("top-1 (%), 95 % interval")
    ax.set_ylabel("recipe")
    ax.grid(alpha=0.3, axis="x")
    return figure


def reliability(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Share of right answers by confidence, a line per name; on the diagonal both are the same."""
    figure = Figure(6.5, 3.8)
    ax = figure.subplots()
    ax.plot([0, 100], [0, 100], ":", color="grey", label="as sure as it is right")
    for i, (name, table) in enumerate(tables.items()):
        ax.plot(
            100 * table.confidence, 100 * table.top1, marker=".", label=_short(name), **_look(i)
        )
    ax.set_xlabel("confidence: probability of the answer (%)")
    ax.set_ylabel("right answers (%)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _look(i: int) -> dict[str, str]:
    """Colour and style of the i-th name, the same in every figure of a comparison."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": STYLES[i // len(COLOURS) % len(STYLES)],
    }


def _short(name: str, most: int = 40) -> str:
    """A name for a legend: of a long one begin and end; `$` is no formula."""
    half = most // 2 - 1
    name = name if len(name) <= most else f"{name[:half]}...{name[-half:]}"
    return name.replace("$", r"\$")


def _epochs(ax: Any) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))


def _steps_per_epoch(steps: pd.DataFrame, metrics: pd.DataFrame) -> float:
    if len(metrics):
        return metrics.step.iloc[-1] / metrics.epoch.iloc[-1]
    return max(1.0, float(steps.step.iloc[-1]))


def class_counts(train: pd.DataFrame, val: pd.DataFrame, classes: Sequence[str]) -> Figure:
    """Images per class on both sides; over 40 classes sorted by count, without names."""
    figure = Figure(height=2.6)
    ax = figure.subplots()
    counts = [
        f.label.value_counts().reindex(range(len(classes)), fill_value=0) for f in (train, val)
    ]
    order = np.arange(len(classes))
    if len(classes) > 40:
        order = np.argsort(-counts[0].to_numpy(), kind="stable")
    for i, (count, name) in enumerate(zip(counts, ("training", "validation"), strict=True)):
        x = np.arange(len(classes)) + 0.4 * i - 0.2
        label = f"{name}, {count.sum():,} images"
        ax.bar(x, count.to_numpy()[order], 0.4, color=COLOURS[i], label=label)
    if len(classes) <= 40:
        ax.set_xticks(
            range(len(classes)), classes, rotation=90 if _long(classes) else 0, fontsize=8
        )
        ax.set_xlabel("class")
    else:
        ax.set_xlabel(f"{len(classes)} classes, by images in training")
    ax.set_ylabel("images")
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _long(names: Sequence[str]) -> bool:
    return sum(map(len, names)) + 2 * len(names) > 90


def confusion(table: pd.DataFrame, most: int = 30) -> Figure:
    """Counts of predicted against true classes; of more than `most`, those confused most."""
    wrong = table.to_numpy() - np.diag(np.diag(table))
    keep = np.arange(len(table))
    if len(table) > most:
        keep = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:most])
    part = table.iloc[keep, keep]
    size = min(9.0, 2.2 + 0.28 * len(part))
    figure = Figure(size + 1.2, size)
    ax = figure.subplots()
    images = np.array(table.attrs.get("images", table.sum(axis=1)))[keep, None]
    shares = part.to_numpy() / np.maximum(1, images)
    shown = ax.imshow(100 * shares, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(shown, ax=ax, label="share of the true class (%)", shrink=0.8)
    ax.set_xticks(range(len(part)), part.columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(part)), part.index, fontsize=8)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    if len(part) <= 15:
        for (i, j), count in np.ndenumerate(part.to_numpy()):
            if count:
                ink = "black" if shares[i, j] > 0.55 else "white"
                ax.text(j, i, count, ha="center", va="center", fontsize=8, color=ink)
    if len(part) < (of := table.attrs.get("classes", len(table))):
        ax.set_title(f"the {len(part)} of {of} classes confused most", fontsize=9)
    return figure


def confusion_change(part: pd.DataFrame) -> Figure:
    """By how many images each confusion changed: Comparison.confusion's table."""
    size = min(9.0, 2.2 + 0.32 * len(part))
    figure = Figure(size + 1.2, size)
    ax = figure.subplots()
    largest = max(1.0, float(part.abs().to_numpy().max()))
    shown = ax.imshow(part, cmap="PuOr_r", vmin=-largest, vmax=largest)
    figure.colorbar(shown, ax=ax, label="images more (fewer below 0)", shrink=0.8)
    ax.set_xticks(range(len(part)), part.columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(part)), part.index, fontsize=8)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    for (i, j), count in np.ndenumerate(part.to_numpy()):
        if count:
            ink = "white" if abs(count) > 0.7 * largest else "black"
            ax.text(j, i, f"{count:+.3g}", ha="center", va="center", fontsize=7, color=ink)
    if len(part) < (classes := part.attrs.get("classes", 0)):
        ax.set_title(f"the {len(part)} of {classes} classes that changed most", fontsize=9)
    return figure


def per_class(table: pd.DataFrame, most: int = 30) -> Figure:
    """Top-1 of the weakest classes, worst first, with their most frequent mistake."""
    part = table.dropna(subset=["top1"]).sort_values("top1", kind="stable").head(most)
    figure = Figure(8, 0.8 + 0.22 * len(part))
    ax = figure.subplots()
    ax.barh(range(len(part)), part.top1, color=COLOURS[0])
    ax.set_yticks(range(len(part)), part["class"], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("top-1 (%)")
    ax.set_ylabel("class")
    ax.xaxis.set_major_locator(ticker.MultipleLocator(10))
    for i, (top1, images, wrong) in enumerate(
        zip(part.top1, part.images, part["mistaken for"], strict=True)
    ):
        text = f"{top1:.1f} % of {images}" + (f", taken for {wrong}" if wrong else "")
        inside = top1 > 60
        ax.text(
            top1 - 1 if inside else top1 + 1,
            i,
            text,
            va="center",
            ha="right" if inside else "left",
            fontsize=7,
            color="white" if inside else "black",
        )
    return figure


def changes(table: pd.DataFrame, names: Sequence[str], most: int = 30) -> Figure:
    """What each class gained from one column of top-1 to the other, largest changes only.

    The table is evaluation.side_by_side's; `names` are its two columns, before and after.
    """
    change = (table[names[1]] - table[names[0]]).dropna()
    kept = change.abs().sort_values(ascending=False, kind="stable").head(most).index
    part = table.loc[change[kept].sort_values(ascending=False, kind="stable").index]
    change = change[part.index]
    figure = Figure(8, 0.9 + 0.22 * len(part))
    ax = figure.subplots()
    ax.barh(range(len(part)), change, color=[COLOURS[0] if c >= 0 else COLOURS[1] for c in change])
    ax.set_yticks(range(len(part)), part["class"], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="black", lw=0.8)
    ax.margins(x=0.4)
    if change.abs().max() < 1:  # nothing happened: not to be blown up to the width of the figure
        ax.set_xlim(-1.5, 1.5)
    ax.set_xlabel(f"top-1 of {names[1]} less that of {names[0]} (points)")
    ax.set_ylabel("class")
    rows = zip(change, part[names[0]], part[names[1]], part.images, strict=True)
    for i, (points, before, after, images) in enumerate(rows):
        text = f" {before:.1f} to {after:.1f} % of {images} "
        ax.text(points, i, text, va="center", ha="left" if points >= 0 else "right", fontsize=7)
    if len(part) < len(table):
        ax.set_title(f"the {len(part)} of {len(table)} classes that changed most", fontsize=9)
    return figure
