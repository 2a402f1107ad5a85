"""Texts are inside the figure and apart, limits fit the data, legends are short."""

import base64
import itertools
import struct

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams, style
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from workbench import ROOT, data, evaluation, training
from workbench.recipe import Recipe
from workbench.ui import plots
from workbench.ui.figure import Chart

LONG = [f"resnet50_bag_of_tricks_with_a_long_name_{i}_W" for i in range(24)]
CLASSES = [f"class {i} with a name as long as those of Cars" for i in range(100)]


def metrics(epochs: int, top1: float = 98.0, first_loss: float = 2.0) -> pd.DataFrame:
    """Curves that approach `top1` and a loss of 0.5."""
    epoch = np.arange(1, epochs + 1)
    rise = np.exp(-(epoch - 1) / max(1, epochs / 8))
    loss = np.where(epoch == 1, first_loss, 0.5 + rise)
    columns = {"epoch": epoch, "step": 40 * epoch, "train_loss": loss, "val_loss": loss}
    return pd.DataFrame({**columns, "train_top1": top1 - 5 - 80 * rise, "top1": top1 - 80 * rise})


def steps(epochs: int) -> pd.DataFrame:
    step = np.arange(10, 40 * epochs + 1, 10)
    return pd.DataFrame({"step": step, "loss": 0.5 + np.exp(-step / 100)})


def intervals(names: list[str], top1: float, half: float) -> Chart:
    values = {"top1": top1, "low": top1 - half, "high": min(100.0, top1 + half), "seeds": 1}
    return plots.intervals(pd.DataFrame({"recipe": names, **values}), {n: [top1] for n in names})


def predictions(classes: int) -> pd.DataFrame:
    rng, label = np.random.default_rng(0), np.arange(20 * classes) % classes
    wrong = rng.integers(0, classes, len(label))
    return pd.DataFrame(
        {"label": label, "class1": np.where(rng.random(len(label)) < 0.1, wrong, label)}
    )


def lines(names: list[str], epochs: int = 30):
    tables = [metrics(epochs, 96 + 3 * i / len(names)) for i in range(len(names))]
    pairs = zip(names, tables, strict=True)
    return [(name, table.epoch.to_numpy(), table.top1.to_numpy()) for name, table in pairs]


def agreement(names: list[str]) -> pd.DataFrame:
    return pd.DataFrame(97.0, names, names)


def schedules() -> dict:
    recipes = [Recipe.from_yaml(path) for path in sorted((ROOT / "params").glob("*_100e.yaml"))]
    per_epoch = lambda recipe: data.steps_per_epoch(1_281_167, recipe.batch_size)
    one = lambda r, n: (training.lr_schedule(r, n), n * r.epochs, n)
    return {recipe.name: one(recipe, per_epoch(recipe)) for recipe in recipes}


CHANGES = pd.DataFrame({"class": CLASSES[:30], "images": 50, LONG[0]: 0.0, LONG[1]: 100.0})
FIGURES = {
    "curves of 1 epoch": lambda: plots.curves(steps(1), metrics(1)),
    "curves of 300 epochs": lambda: plots.curves(steps(300), metrics(300)),
    "curves before the first epoch": lambda: plots.curves(steps(1).head(2), pd.DataFrame(), 40),
    "curves from a loss of 1000": lambda: plots.curves(steps(30), metrics(30, first_loss=1000)),
    "top-1 of 12 recipes": lambda: plots.overlay(lines(LONG[:12] * 2), "epoch", "top-1 (%)"),
    "top-1 of 1 epoch": lambda: plots.overlay(lines(LONG[:3], 1), "epoch", "top-1 (%)"),
    "top-1 of 300 epochs": lambda: plots.top1_curves({LONG[0]: metrics(300)}),
    "1 recipe": lambda: intervals(["one"], 97.5, 1),
    "12 equal recipes": lambda: intervals(LONG[:12], 97.5, 0),
    "12 perfect recipes": lambda: intervals(LONG[:12], 100, 0),
    "confusion of 10": lambda: plots.confusion(evaluation.confusion(predictions(10), CLASSES[:10])),
    "confusion of 100": lambda: plots.confusion(evaluation.confusion(predictions(100), CLASSES)),
    "30 confused of 100": lambda: plots.confusion(
        evaluation.confusion(predictions(100), CLASSES, most=30)
    ),
    "changed confusions": lambda: plots.confusion_change(
        evaluation.confusion(predictions(100), CLASSES, most=20)
    ),
    "10 classes": lambda: plots.per_class(evaluation.per_class(predictions(10), CLASSES[:10])),
    "100 classes": lambda: plots.per_class(evaluation.per_class(predictions(100), CLASSES)),
    "changes from 0 to 100": lambda: plots.changes(CHANGES, [LONG[0], LONG[1]]),
    "changes from 100 to 0": lambda: plots.changes(CHANGES, [LONG[1], LONG[0]]),
    "agreement of 2": lambda: plots.agreement(agreement(["a-seed0", "a-seed1"])),
    "agreement of 24": lambda: plots.agreement(agreement(LONG)),
    "counts of 40": lambda: plots.class_counts(predictions(40), predictions(40), CLASSES[:40]),
    "counts of 10": lambda: plots.class_counts(predictions(10), predictions(10), CLASSES[:10]),
    "schedules": lambda: plots.lr_curves(schedules()),
}


def drawn_texts(figure: Chart, monkeypatch) -> dict[Text, Bbox]:
    """The bounding boxes in pixels of the texts that are drawn: not of ticks beyond the limits."""
    drawn, draw = {}, Text.draw

    def record(text, renderer):
        if text.get_text().strip() and isinstance(renderer, RendererAgg):
            drawn[text] = text.get_window_extent(renderer)
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", record)
    figure.png()
    return drawn


@pytest.mark.filterwarnings("error")  # constrained layout warns where axes have no room left
@pytest.mark.parametrize("name", FIGURES)
def test_texts_have_one_size_are_inside_the_figure_and_apart(name, monkeypatch):
    figure = FIGURES[name]()
    texts = drawn_texts(figure, monkeypatch)
    assert len(texts) > 3 and {text.get_fontsize() for text in texts} <= {8.0, 9.0}
    for text, box in texts.items():
        assert box.x0 > -1 and box.y0 > -1, text
        assert box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1, text
    for (text, box), (other, beside) in itertools.combinations(texts.items(), 2):
        wide = min(box.x1, beside.x1) - max(box.x0, beside.x0)
        high = min(box.y1, beside.y1) - max(box.y0, beside.y0)
        assert wide < 4 or high < 6, (text, other)  # a box is larger than its ink
    for ax in figure.axes:
        assert ax.get_window_extent().width > 100 or ax.get_label() == "<colorbar>"


# ---- limits


def limits_of(top1: dict[str, np.ndarray]) -> tuple[float, float]:
    tables = [(name, np.arange(1.0, len(y) + 1), y) for name, y in top1.items()]
    return plots.overlay(tables, "epoch", "validation top-1 (%)").axes[0].get_ylim()


def test_runs_of_97_8_and_98_6_percent_are_apart_and_no_axis_passes_100():
    rise = np.exp(-np.arange(30) / 4)
    low, high = limits_of({"a": 97.8 - 80 * rise, "b": 98.6 - 80 * rise})
    assert low > 85 and high < 100 and 0.8 / (high - low) > 0.05
    assert limits_of({"a": np.minimum(100, 90 + np.arange(20.0))})[1] == 100
    assert limits_of({"a": np.array([42.0])}) == (41.5, 42.5)
    low, high = limits_of({"a": np.array([50.0, 60, 70])})  # little is gained: all is shown
    assert low < 50 and high > 70


@pytest.mark.parametrize("first_loss", [12.3, np.nan])
def test_a_first_loss_off_the_scale_is_named_at_the_edge(first_loss):
    left, right = plots.curves(steps(30), metrics(30, first_loss=first_loss)).axes
    assert left.get_ylim()[1] < 3 and right.get_ylim()[1] <= 100
    notes = [text.get_text() for text in left.texts]
    assert notes == ([] if np.isnan(first_loss) else ["\u2191 first value 12.3"])
    assert [text.get_text() for text in right.texts] == ["\u2193 first value 13"]


def test_the_steps_of_a_running_epoch_are_at_their_share_of_it():
    running = pd.DataFrame({"step": [10, 20, 50], "loss": 1.0})
    x = lambda table, **more: plots.curves(running, table, **more).axes[0].lines[0].get_xdata()
    assert x(pd.DataFrame(), steps_per_epoch=40) == pytest.approx([0.25, 0.5, 1.25])
    assert x(metrics(1)) == pytest.approx([0.25, 0.5, 1.25])


# ---- style


def test_the_style_of_a_notebook_changes_no_figure_and_stays_as_it_is():
    draw = lambda: plots.curves(steps(3), metrics(3)).png()
    plain = draw()
    with style.context(["dark_background", {"font.size": 30, "savefig.bbox": "tight"}]):
        assert draw() == plain and rcParams["font.size"] == 30


@pytest.mark.parametrize("width", [3, 7.013, 8.9999, 10.4])
def test_a_png_has_two_pixels_for_each_css_pixel(width):
    files, sizes = Chart(width, 2)._repr_mimebundle_()
    png, metadata = base64.b64decode(files["image/png"]), sizes["image/png"]
    assert struct.unpack(">I", png[16:20])[0] == 2 * metadata["width"] == 2 * round(90 * width)
