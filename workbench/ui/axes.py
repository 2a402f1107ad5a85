"""Parts of charts: colours, labels, legends, limits, rows and heat maps.

Colours are those of Okabe and Ito, distinct with any colour vision; line styles differ as well.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox, TransformedBbox

from workbench.ui.figure import shortened, text_width

MOST = 8  # names in a legend
NAME = 100  # CSS pixels of a name beside a heat map
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = ["-", "--", "-.", ":"]


def style(i: int) -> dict[str, str]:
    """Colour and line style of the i-th name, the same in all figures."""
    dashes = STYLES[i // len(COLOURS) % len(STYLES)]
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": dashes}


def short(name: object, width: float = 180) -> str:
    """A name of at most `width` CSS pixels: of a long one start and end; `$` starts no formula."""
    return shortened(str(name), width).replace("$", r"\$")


def label(ax: Axes, x: str, y: str, grid: str = "both") -> None:
    ax.set_xlabel(short(x, 400))
    ax.set_ylabel(short(y, 260))
    if x == "epoch":
        ax.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        ax.set_xlim(0, max(1, ax.get_xlim()[1]))
    if grid:
        ax.grid(axis=grid)


def legend(ax: Axes, empty: str = "", beside: bool = False) -> None:
    """A legend, beside the axes if wanted; without lines the text `empty`."""
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if beside else {}
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**place)
    else:
        ax.text(0.5, 0.5, empty, ha="center", transform=ax.transAxes)
        ax.set_yticks([])


def limit(ax: Axes, measure: str) -> None:
    """Limits of y that show the late values of a top-1 or a loss; an arrow names a value beyond.

    Late is the second half of a line. Top-1 ends at 100 at most, and begins three times the range
    of late values below them, unless all takes less than twice the room. A loss leaves out what is
    more than four times its upper quartile.
    """
    lines = [np.asarray(line.get_ydata(), float) for line in ax.lines]
    lines = [y[np.isfinite(y)] for y in lines if np.isfinite(y).any()]
    if not lines or not ("top-" in measure or "loss" in measure):
        return
    every, late = np.concatenate(lines), np.concatenate([y[len(y) // 2 :] for y in lines])
    first, last = ([y[i] for y in lines] for i in (0, -1))
    low, high = bottom, top = every.min(), every.max()
    if "loss" in measure:
        top = every[every <= 4 * np.quantile(every, 0.75)].max()
    else:
        usual = min(*last, np.quantile(late, 0.1)), max(*last, np.quantile(late, 0.9))
        lowest = usual[0] - 3 * max(usual[1] - usual[0], 0.5)
        bottom = lowest if top - low > 2 * (top - lowest) else low
    room = max(0.06 * (top - bottom), 0.5 if "top-" in measure else 0.005 * top)
    bottom, top = max(0.0, bottom - room), top + room
    ax.set_ylim(bottom, min(top, 100) if "top-" in measure else top)
    room = TransformedBbox(Bbox([[-0.05, 0], [1.05, 1.05 if high <= top else 1]]), ax.transAxes)
    for line in ax.lines:
        line.set_clip_box(room)  # a point at 100 % is whole
    for value, arrow, y, side in ((low, "\u2193", 0.01, "bottom"), (high, "\u2191", 0.99, "top")):
        if not bottom <= value <= top:
            text = f"{arrow} {'first' if value in first else 'one'} value {value:.3g}"
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            ax.text(0.02, y, text, va=side, transform=ax.transAxes, bbox=box)


def rows(ax: Axes, names: Sequence[str], texts: Sequence[str], width: float = 180) -> None:
    """Names at the left of rows, the first on top, and texts at their right."""
    ax.set_yticks(range(len(names)), [short(name, width) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    for i, text in enumerate(texts):
        place = {"transform": ax.get_yaxis_transform(), "va": "center"}
        ax.text(1.01, i, text.replace("$", r"\$"), **place)


def bars(
    ax: Axes,
    classes: Sequence[str],
    values: Sequence[float],
    texts: Sequence[str],
    xlabel: str,
    colours: Sequence[str] = (COLOURS[0], COLOURS[1]),
) -> None:
    """A horizontal bar per class, the first on top, with a text at the right of the axes.

    `colours` are those of positive and negative values.
    """
    ax.barh(range(len(values)), values, 0.6, color=[colours[int(value < 0)] for value in values])
    rows(ax, classes, texts)
    label(ax, xlabel, "class", grid="x")


def thinned(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means over equal stretches."""
    every = -(-len(x) // min(most, 400))
    if every < 2:
        return x, y
    starts = np.arange(0, len(x), every)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def interval(ax: Axes, y: float, value: float, low: float, high: float, colour: str) -> None:
    ax.plot([low, high], [y, y], color=colour, lw=2)
    ax.plot([value], [y], "o", color=colour, clip_on=False)


def percent_limits(ax: Axes, values: Sequence[float]) -> None:
    """Limits of x around percentages, at least a point apart and never beyond 0 and 100."""
    room = max(0.05 * (max(values) - min(values)), 0.5)
    ax.set_xlim(max(0, min(values) - room), min(100, max(values) + room))


def heat_map(
    ax: Axes,
    values: pd.DataFrame,
    text: Callable[[int, int], str],
    label: str,
    **colours: str | float,
) -> None:
    """A table as colours, with a text in each cell of at most 20 rows; NaN is pale grey."""
    image = ax.imshow(values, **colours)
    ax.set_facecolor("#eeeeee")
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8)
    dark = image.to_rgba(values.to_numpy(float))[..., :3] @ [0.3, 0.6, 0.1] < 0.5
    for i, j in np.argwhere(dark >= 0) if len(values) <= 20 else ():
        ink = "white" if dark[i, j] and values.iloc[i, j] == values.iloc[i, j] else "black"
        if words := text(i, j):
            ax.text(j, i, words, ha="center", va="center", color=ink)
    for axis, names in ((ax.xaxis, values.columns), (ax.yaxis, values.index)):
        every = -(-len(names) // 32)
        axis.set_ticks(range(0, len(names), every), [short(name, NAME) for name in names[::every]])
    if max(text_width(short(name, NAME)) for name in values.columns) > 24:
        ax.tick_params("x", rotation=90)
