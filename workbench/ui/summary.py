"""The summary of a run as one image: curves, headline, worst classes, worst images."""

import io
import textwrap
import warnings

import pandas as pd
from PIL import Image

from workbench import data, evaluation, runs
from workbench.recipe import Recipe
from workbench.ui import axes, image_grids, plots, views
from workbench.ui.figure import DPI, POINTS, Chart, Figure, Sheet, styled


def write(run: runs.Run) -> None:
    """Writes summary.png into the folder of a finished run; a failure of it is a warning."""
    if run.status()["state"] != "finished":
        return
    try:
        with runs.atomic_write(run.file("summary.png")) as temporary:
            temporary.write_bytes(figure(run).png())
    except Exception as error:  # a full disk, an older run: the training itself is complete
        warnings.warn(f"{run.path}: no summary.png ({type(error).__name__}: {error})", stacklevel=2)


@styled()
def figure(run: runs.Run) -> Figure:
    """Loss, top-1 and lr by epoch, the weakest classes and the most confident mistakes of a run.

    The images are left out if they cannot be read. Raises RunError for a run that was not
    evaluated.
    """
    weights, _ = run.choose_weights()
    predictions, classes = run.predictions(weights), run.environment()["classes"]
    by_class = evaluation.per_class(predictions, classes)
    rows = 0.6 + 0.2 * min(10, by_class.top1.notna().sum())
    chart = Chart(image_grids.WIDTH / DPI, 3.4 + rows)
    upper, lower = chart.subfigures(2, 1, height_ratios=[3.4, rows])
    upper.suptitle(_headline(run), fontsize=POINTS + 1, x=0.01, ha="left")
    loss, top1, lr = upper.subplots(1, 3)
    steps, metrics = run.steps(), run.metrics()
    plots.draw_curves(loss, top1, steps, metrics)
    rates, last = metrics if steps.empty else steps, metrics.iloc[-1]
    lr.plot(rates.step * (last.epoch / last.step), rates.lr, color=axes.COLOURS[0])
    axes.label(lr, "epoch", "lr")
    plots.draw_classes(lower.subplots(), by_class, 10)
    above = Image.open(io.BytesIO(chart.png())).convert("RGB")
    mistakes = _mistakes(run, predictions, classes)
    if not mistakes:
        return Sheet(above)
    whole = Image.new("RGB", (above.width, above.height + mistakes.height), "white")
    whole.paste(above)
    whole.paste(mistakes, (0, above.height))
    return Sheet(whole)


def _headline(run: runs.Run) -> str:
    """The name of the run and its headline, in lines that fit the figure."""
    text = f"{run.path.name}: {evaluation.headline(run).replace('**', '')}"
    return textwrap.fill(text, 150).replace("$", r"\$")


def _mistakes(run: runs.Run, predictions: pd.DataFrame, classes: list[str]) -> Image.Image | None:
    """The wrong predictions with the highest confidence; None without images or mistakes."""
    worst = evaluation.mistakes(predictions, 8)
    if worst.empty:
        return None
    try:
        recipe = Recipe(**run.recipe())
        val = data.load_dataset(recipe).val[["list", "file", "path"]]
        return views.mistakes(worst.merge(val), recipe, classes, columns=8).image
    except Exception:  # moved, another machine, or a recipe of an older version
        return None
