"""The views of a comparison: figures, the picker that they follow, the notebook on real runs."""

import json
import os
import subprocess
import sys
import time

import ipywidgets
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import IMAGES, JUDGED, run_folder, save_noise

from workbench import ROOT, data, runs, training
from workbench.evaluation import comparison
from workbench.evaluation.comparison import ComparisonError
from workbench.recipe import Recipe
from workbench.ui import plots, views, widgets


@pytest.fixture
def root(tmp_path):
    """Two seeds of three recipes; the first is the oldest."""
    for i, (name, top1, lr) in enumerate([("a", 0.7, 0.1), ("b", 0.8, 0.2), ("c", 0.9, 0.3)]):
        for seed in range(2):
            path = run_folder(tmp_path, name, seed, top1=top1, lr=lr)
            at = time.time() - 1000 + 10 * (2 * i + seed)
            os.utime(path / "predictions.parquet", (at, at))
    return tmp_path


def html_of(view) -> str:
    bundle = view._repr_mimebundle_()
    return (bundle[0] if isinstance(bundle, tuple) else bundle).get("text/html", "")


def every(root) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def names_of(picker) -> list[str]:
    return [group.name for group in picker.found.groups]


# ---- figures


def texts(ax) -> list[str]:
    return [text.get_text().strip() for text in ax.texts]


def test_intervals_show_mean_runs_and_the_interval(root):
    found = comparison.compare(sorted(root.iterdir()))
    figure = plots.intervals(found.table, {g.name: g.top1 for g in found.groups})
    [ax] = figure.axes
    row, lines = found.table.iloc[0], ax.lines[:3]
    assert list(lines[0].get_xdata()) == [row.low, row.high]
    assert np.array_equal(lines[1].get_xdata(), found.groups[0].top1)
    assert list(lines[2].get_xdata()) == [row.top1]
    assert texts(ax)[0] == f"{row.top1:.2f} %, over 2 seeds"
    assert ax.get_xlabel() == "top-1 (%), 95 % interval"
    colours = [ax.lines[3 * i].get_color() for i in range(3)]
    curves = plots.overlay(comparison.curves(found.groups), "epoch", "top-1 (%)").axes[0]
    legend = [line.get_color() for line in curves.lines if line.get_label()[0] != "_"]
    assert legend == colours == plots.COLOURS[:3], "one colour for a recipe everywhere"


def test_seeds_share_a_line_in_the_legend_and_smoothing_keeps_the_raw_one_pale():
    x = np.arange(100.0)
    noisy = np.where(x % 2, 1.0, -1.0)
    lines = [("a", x, noisy), ("a", x, noisy), ("b", x, x)]
    [ax] = plots.overlay(lines, "step", "loss (nats)", smoothing=0.9).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a (2 seeds)", "b"]
    pale, smooth = ax.lines[:2]
    assert pale.get_alpha() == 0.3 and np.array_equal(pale.get_ydata(), noisy)
    expected, mean, weight = [], 0.0, 0.0
    for value in noisy:
        mean, weight = 0.9 * mean + value, 0.9 * weight + 1
        expected.append(mean / weight)
    assert smooth.get_ydata() == pytest.approx(expected)
    [ax] = plots.overlay([], "step", "loss (nats)").axes
    assert texts(ax) == ["none of these runs has it"]


def test_curves_go_by_epoch_step_or_minutes(root):
    [group] = comparison.compare([root / "a-seed0"]).groups
    group.runs[0].file("metrics.csv").write_text("epoch,step,top1\n1,10,50.0\n2,20,\n3,30,70.0\n")
    group.runs[0].file("steps.csv").write_text(
        "step,seconds,lr,loss\n10,60.0,0.1,2.0\n20,120.0,0.1,1.0\n30,300.0,0.1,0.5\n"
    )
    at = lambda *words: [list(part) for part in comparison.curves([group], *words)[0][1:]]
    assert at() == [[1, 3], [50, 70]]
    assert at("top-1", "step") == [[10, 30], [50, 70]]
    assert at("top-1", "minutes") == [[1, 5], [50, 70]]
    assert at("loss by step", "epoch") == [[1, 2, 3], [2, 1, 0.5]]
    assert comparison.curves([group], "top-1, EMA") == []


def test_every_measure_of_a_training_is_there(tmp_path):
    recipe = Recipe(runs_dir=str(tmp_path), train_fraction=0.1, epochs=1, workers=0, ema_decay=0.9)
    list(training.fit(recipe, runs.Run(recipe.folder)))
    [group] = comparison.compare([recipe.folder]).groups
    for measure in comparison.MEASURES:
        for by in comparison.AXES:
            [(name, x, y)] = comparison.curves([group], measure, by)
            assert name == recipe.name and len(x) == len(y) > 0 and np.isfinite(x).all()


def test_the_reliability_figure_is_the_table_in_percent():
    table = pd.DataFrame({"confidence": [0.3, 0.9], "top1": [0.5, 0.8], "images": [3, 4]})
    [ax] = plots.reliability({"a": table}).axes
    assert ax.lines[1].get_xdata() == pytest.approx([30, 90])
    assert ax.lines[1].get_ydata() == pytest.approx([50, 80])


def test_the_change_of_a_confusion_shows_the_classes_that_changed_most():
    table = pd.DataFrame([[-5.0, 5.0], [0.0, 0.0]], ["7", "21"], ["7", "21"])
    table.attrs["classes"] = 30
    [ax, _] = plots.confusion_change(table).axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["7", "21"]
    assert texts(ax) == ["-5", "+5"] and "2 of 30 classes" in ax.get_title()


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_and_with_dollars_are_drawn_without_a_warning(tmp_path):
    lines = [("漢字 $x$ " + "long " * 30, np.arange(3.0), np.arange(3.0))]
    figure = plots.overlay(lines, "epoch", "top-1 (%)")
    assert figure.png().startswith(b"\x89PNG")
    for kind, begin in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        figure.write(tmp_path / f"figure.{kind}")
        assert (tmp_path / f"figure.{kind}").read_bytes().startswith(begin)


# ---- the picker


def aged(path, seconds: float):
    """The run's predictions as old as that."""
    at = time.time() - seconds
    os.utime(path / "predictions.parquet", (at, at))
    return path


def changed(path, name: str, **values) -> None:
    file = path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_the_newest_recipe_and_its_baseline_are_picked_oldest_first(root):
    """Of recipes that differ in equally many options the oldest is the baseline."""
    elsewhere = aged(run_folder(root, "elsewhere"), 5000)
    changed(elsewhere, "environment.json", val_data="w")
    picker = widgets.RunPicker(root)
    assert names_of(picker) == ["a", "c"]
    assert "elsewhere-seed0" in dict(map(reversed, picker.runs.options))
    assert "elsewhere-seed0" not in picker.runs.value


def test_the_baseline_differs_in_the_fewest_options_unless_it_is_named(root):
    aged(run_folder(root, "new", lr=0.2, hflip=0.5), 10)  # of b in one option, of a and c in two
    assert names_of(widgets.RunPicker(root)) == ["b", "new"]
    assert names_of(widgets.RunPicker(root, against="c")) == ["c", "new"]


def test_no_seed_is_dropped(root):
    for seed in range(2, 12):
        aged(run_folder(root, "a", seed, n=IMAGES, lr=0.1), 2000 + seed)
        aged(run_folder(root, "c", seed, n=IMAGES, lr=0.3), 5)
    assert widgets.RunPicker(root).found.table.seeds.tolist() == [12, 12]


def test_unfinished_runs_are_left_out_unless_asked_for_or_named(root):
    changed(aged(run_folder(root, "c", 2, lr=0.3), 5), "status.json", state="stopped")
    changed(aged(run_folder(root, "d", lr=0.4), 1), "status.json", state="interrupted")
    picker = widgets.RunPicker(root)
    assert set(picker.runs.value) == {"a-seed0", "a-seed1", "c-seed0", "c-seed1"}
    assert "d-seed0" in dict(map(reversed, picker.runs.options))
    assert names_of(widgets.RunPicker(root, unfinished=True)) == ["a", "d"]
    assert names_of(widgets.RunPicker(root, ["c-seed2", "d-seed0"])) == ["c", "d"]


def test_picking_other_runs_redraws_what_follows(root):
    picker, drawn = widgets.RunPicker(root, every(root)), []
    view = widgets.InteractiveView(
        lambda found: drawn.append(len(found.groups)) or found.table, picker
    )
    before = html_of(view)
    picker.runs.value = ("b-seed0", "a-seed0")
    assert drawn[0] == 3 and drawn[-1] == 2
    assert html_of(view) != before and "InteractiveView" not in html_of(view)
    picker.against.value = "b"
    assert names_of(picker) == ["b", "a"]
    picker.runs.value = ()
    assert picker.found is None and "no run to compare" in html_of(view)
    picker.runs.value = ("c-seed0", "a-seed0")
    assert "no recipe &#x27;b&#x27; here" in html_of(view)
    picker.against.value = ""
    assert names_of(picker) == ["a", "c"]


def test_a_word_narrows_the_list_and_keeps_what_is_picked(root):
    picker = widgets.RunPicker(root, ["a-seed0", "b-seed0"])
    picker.search.value = "C-"
    shown = [name for _, name in picker.runs.options]
    assert sorted(shown) == ["a-seed0", "b-seed0", "c-seed0", "c-seed1"]
    assert set(picker.runs.value) == {"a-seed0", "b-seed0"} and names_of(picker) == ["a", "b"]


def test_the_recipe_that_is_looked_at_is_shared_by_the_views(root):
    picker, said = widgets.RunPicker(root, every(root)), {}
    note = lambda key: lambda found, name: said.__setitem__(key, name) or found.sentences()
    for key in ("one", "two"):
        widgets.InteractiveView(note(key), picker, name=picker.recipe)
    assert picker.recipe.options == ("b", "c") and said == {"one": "c", "two": "c"}
    picker.recipe.value = "b"
    assert said == {"one": "b", "two": "b"}
    picker.runs.value = ("c-seed0", "b-seed0", "a-seed0")
    assert picker.recipe.value == "b", "what is looked at stays"


def test_a_single_recipe_has_nothing_to_compare_with_and_is_no_error(root):
    picker, asked = widgets.RunPicker(root, ["a-seed0", "a-seed1"]), []
    view = widgets.InteractiveView(
        lambda found, name: asked.append(name) or [], picker, name=picker.recipe
    )
    assert "There is one recipe" in html_of(view) and "Error" not in html_of(view)
    assert asked == []
    picker.runs.value = ("a-seed0", "b-seed0")
    assert asked[-1] == "b"


def test_the_epoch_of_a_run_that_continues_another_is_that_of_both(root):
    metrics = pd.DataFrame({"epoch": [5, 6], "step": [10, 12], "top1": [50.0, 80.0]})
    metrics.to_csv(root / "a-seed0" / "metrics.csv", index=False)
    label = dict(map(reversed, widgets.RunPicker(root).runs.options))["a-seed0"]
    assert label.endswith("(finished, epoch 6)")


def test_a_run_in_training_is_marked_and_followed(root):
    run = runs.Run(root / "a-seed0")
    picker = widgets.RunPicker(root)
    with run.writing():
        run.set_status("running")
        picker.refresh()
        label = dict(map(reversed, picker.runs.options))["a-seed0"]
        assert "\u25cf training" in label and "epoch 2" in label
        run.append("metrics.csv", {"epoch": 3, "step": 6, "top1": 90.0})
        stamp = widgets._stamp(root)
        assert stamp != picker._stamp
        picker.refresh()
        assert "90.00 %" in dict(map(reversed, picker.runs.options))["a-seed0"]
        assert "epoch 3" in dict(map(reversed, picker.runs.options))["a-seed0"]


def test_names_that_are_not_there_are_an_error_with_the_way_out(root):
    with pytest.raises(ComparisonError, match="no evaluated run d-seed0; see workbench runs"):
        widgets.RunPicker(root, ["a-seed0", "d-seed0"])


@pytest.mark.parametrize("kind", ["empty", "missing", "half"])
def test_a_folder_without_a_run_says_so_in_every_view(tmp_path, kind):
    folder = tmp_path / "runs"
    if kind != "missing":
        folder.mkdir()
    if kind == "half":
        run_folder(folder, "half").joinpath("predictions.parquet").unlink()
        (folder / "odd").mkdir()
        (folder / "odd" / "recipe.yaml").write_text("[]")
    picker = widgets.RunPicker(folder)
    assert picker.found is None and "0 evaluated runs in" in html_of(picker)
    assert "no run to compare" in html_of(
        widgets.InteractiveView(lambda found: found.table, picker)
    )
    if kind == "half":
        assert "left out: half-seed0 (finished, not evaluated yet)" in html_of(picker)
        assert "left out: odd" in html_of(picker)


def test_a_run_that_breaks_while_it_is_picked_is_told_not_thrown(root):
    picker = widgets.RunPicker(root, every(root))
    view = widgets.InteractiveView(lambda found: found.table, picker)
    (root / "a-seed0" / "predictions.parquet").write_bytes(b"PAR1")
    picker.runs.value = ("b-seed0", "a-seed0")
    assert "a-seed0" in html_of(view) and "leave it out" in html_of(view)


def test_an_image_gained_by_some_runs_says_how_many_are_right(tmp_path, monkeypatch):
    """The class that most runs predict may be right before and after."""
    paths = []
    for name, seeds in (("a", [(0, 1), (1, 0)]), ("b", [(0, 1), (0, 1)])):
        for seed, predicted in enumerate(seeds):
            path = run_folder(tmp_path, name, seed, n=2, lr=0.1 if name == "a" else 0.2)
            frame = pd.read_parquet(path / "predictions.parquet")
            frame["label"], frame["class1"] = [0, 1], np.array(predicted, np.int32)
            frame.to_parquet(path / "predictions.parquet", index=False)
            paths.append(path)
    titles, place = [], save_noise(tmp_path / "0.png", 0)
    val = pd.DataFrame({"list": 0, "file": ["0.png", "1.png"], "path": str(place)})
    monkeypatch.setattr(data, "load_dataset", lambda recipe: data.Dataset(None, val, JUDGED))
    monkeypatch.setattr(plots, "grid", lambda images, texts, **_: titles.extend(texts))
    views.flips(comparison.compare(paths), "b", "gained")
    zero, one = JUDGED[:2]
    assert titles == [f"{zero} (50% right)\nto {zero}\nis {zero}",
                      f"{zero} (50% right)\nto {one}\nis {one}"]  # fmt: skip


def test_no_image_gained_is_a_table_of_none(tmp_path):
    paths = [run_folder(tmp_path, name, n=12, lr=lr) for name, lr in (("a", 0.1), ("b", 0.2))]
    frame = pd.read_parquet(paths[0] / "predictions.parquet")
    frame.to_parquet(paths[1] / "predictions.parquet", index=False)
    found = comparison.compare(paths)
    for side in ("gained", "lost"):
        shown = views.flips(found, "b", side)
        assert isinstance(shown, pd.DataFrame) and shown.empty and "file" in shown


def test_sixty_runs_are_listed_and_compared(tmp_path):
    for seed in range(60):
        run_folder(tmp_path, "many", seed, n=12)
    picker = widgets.RunPicker(tmp_path)
    assert len(picker.runs.options) == len(picker.runs.value) == 60
    assert picker.found.table.seeds.tolist() == [60]


def test_an_explorer_shows_figure_table_or_sentences():
    for drawn, kind in (
        (plots.Figure(), "image/png"),
        (pd.DataFrame({"a": [1.234]}), "text/html"),
        (["<b>", "two"], "text/html"),
    ):
        view = widgets.InteractiveView(lambda x, drawn=drawn: drawn, x=ipywidgets.IntSlider())
        bundle = view._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        assert [k for k in data if k in ("image/png", "text/html")] == [kind]
        assert (view._image.layout.display == "none") == (kind == "text/html")
    assert "&lt;b&gt;" in html_of(view)


# ---- the notebook


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two seeds each of two recipes on the digits."""
    folder = tmp_path_factory.mktemp("trained")
    shared = {"train_fraction": 0.25, "epochs": 2, "workers": 0, "runs_dir": str(folder)}
    for name, options in (("steady", {"lr": 0.001}), ("quick", {"lr": 0.1})):
        for seed in range(2):
            recipe = Recipe(name=name, seed=seed, **shared, **options)
            list(training.fit(recipe, runs.Run(recipe.folder)))
    return folder


@pytest.mark.slow
def test_the_notebook_compares_real_runs_headless_and_writes_what_it_shows(trained, tmp_path):
    output, place = tmp_path / "out.ipynb", tmp_path / "export"
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "05_compare.ipynb")]
    command += [str(output), "-k", "python3", "--no-progress-bar"]
    done = subprocess.run(
        [*command, "-p", "runs_dir", str(trained), "-p", "export_dir", str(place)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shown = {}
    for cell in nbformat.read(output, as_version=4).cells:
        for out in cell.get("outputs", []):
            assert out.get("name") != "stderr", out
            assert not [kind for kind in out.get("data", {}) if "widget" in kind], cell.id
            if "data" in out:
                shown[cell.id] = out.data
    found = comparison.compare(
        [trained / f"{name}-seed{s}" for name in ("steady", "quick") for s in range(2)]
    )
    [verdict] = found.sentences()
    assert verdict in shown["verdict"]["text/html"]
    assert f"{found.table.top1[1]:.2f}" in shown["table"]["text/html"]
    assert "lr 0.1 (0.001)" in shown["table"]["text/html"]
    for figure in ("intervals", "curves", "classes", "flips", "confusion", "reliability"):
        assert "image/png" in shown[figure], figure
    assert "steady-seed1" in shown["agreement"]["text/html"]
    assert "color:#D55E00" not in str(shown), "no view ended in an error"
    written = pd.read_csv(place / "table.csv")
    assert written.recipe.tolist() == ["steady", "quick"]
    assert written.top1.tolist() == pytest.approx(found.table.top1.tolist())
    assert f"- {verdict}" in (place / "table.md").read_text()
    figures = {f"{n}.{k}" for n in ("top1", "curves", "reliability") for k in ("png", "svg")}
    assert figures < {path.name for path in place.iterdir()}


def test_the_notebook_without_a_run_says_what_to_do_and_raises_nothing(tmp_path):
    names: dict[str, object] = {}
    for cell in nbformat.read(ROOT / "notebooks" / "05_compare.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            source = cell.source.replace('runs_dir = "runs"', f"runs_dir = {str(tmp_path)!r}")
            exec(source, names)
    assert "make demo trains one" in html_of(names["picker"])


def test_images_of_the_simulated_runs_number_what_they_say(root):
    assert len(comparison.compare(root.iterdir()).images) == IMAGES
