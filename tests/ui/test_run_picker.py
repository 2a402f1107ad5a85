"""The run picker, the views that follow it, and the comparison notebook on real runs."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import run_folder
from helpers import train

from workbench import ROOT, runs
from workbench.evaluation import comparison
from workbench.evaluation.comparison import ComparisonError
from workbench.recipe import Recipe
from workbench.ui import plots, run_table
from workbench.ui.run_picker import RunPicker
from workbench.ui.widgets import InteractiveView, View


def aged(path: Path, seconds: float) -> Path:
    """Makes the predictions of a run this old."""
    at = time.time() - seconds
    os.utime(path / "predictions.parquet", (at, at))
    return path


@pytest.fixture
def root(tmp_path):
    """Two seeds of three recipes; the first is the oldest."""
    for i, (name, top1, lr) in enumerate([("a", 0.7, 0.1), ("b", 0.8, 0.2), ("c", 0.9, 0.3)]):
        for seed in range(2):
            aged(run_folder(tmp_path, name, seed, top1=top1, lr=lr), 1000 - 10 * (2 * i + seed))
    return tmp_path


def html_of(view: View) -> str:
    return view._repr_mimebundle_().get("text/html", "")


def every(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def names_of(picker: RunPicker) -> list[str]:
    return [group.name for group in picker.result.groups]


def keys_of(picker: RunPicker) -> set[str]:
    return {row["key"] for row in picker.table.rows}


def edit_json(path: Path, name: str, **values) -> None:
    file = path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---- what is picked


def test_all_seeds_of_the_newest_recipe_and_of_its_baseline_are_picked(root):
    """Of recipes that differ in equally many options the oldest is the baseline."""
    for seed in range(2, 12):
        aged(run_folder(root, "a", seed, lr=0.1), 2000 + seed)
        aged(run_folder(root, "c", seed, lr=0.3), 5)
    edit_json(aged(run_folder(root, "elsewhere"), 5000), "environment.json", val_data="w")
    picker = RunPicker(root)
    assert names_of(picker) == ["a", "c"] and picker.result.table.seeds.tolist() == [12, 12]
    assert "elsewhere-seed0" in keys_of(picker) - {*picker.table.selected}


def test_the_baseline_differs_in_the_fewest_options_unless_it_is_named(root):
    aged(run_folder(root, "new", lr=0.2, hflip=0.5), 10)  # of b in one option, of a and c in two
    assert names_of(RunPicker(root)) == ["b", "new"]
    assert names_of(RunPicker(root, baseline="c")) == ["c", "new"]


def test_unfinished_runs_are_picked_only_with_the_option_or_by_name(root):
    edit_json(aged(run_folder(root, "c", 2, lr=0.3), 5), "status.json", state="stopped")
    edit_json(aged(run_folder(root, "d", lr=0.4), 1), "status.json", state="interrupted")
    picker = RunPicker(root)
    assert set(picker.table.selected) == {"a-seed0", "a-seed1", "c-seed0", "c-seed1"}
    assert "d-seed0" in keys_of(picker)
    assert names_of(RunPicker(root, unfinished=True)) == ["a", "d"]
    assert names_of(RunPicker(root, ["c-seed2", "d-seed0"])) == ["c", "d"]
    with pytest.raises(ComparisonError, match="no evaluated run e-seed0; see workbench runs"):
        RunPicker(root, ["a-seed0", "e-seed0"])


# ---- what follows


def test_views_follow_the_picked_runs(root):
    picker, drawn = RunPicker(root, every(root)), []
    view = InteractiveView(lambda result: drawn.append(len(result.groups)) or result.table, picker)
    before = html_of(view)
    picker.table.selected = ["b-seed0", "a-seed0"]
    assert drawn[0] == 3 and drawn[-1] == 2
    assert html_of(view) != before and "InteractiveView" not in html_of(view)
    picker.baseline.value = "b"
    assert names_of(picker) == ["b", "a"]
    picker.table.selected = []
    assert picker.result is None and "no run to compare" in html_of(view)
    picker.table.selected = ["c-seed0", "a-seed0"]
    assert "no recipe &#x27;b&#x27; here" in html_of(view)
    picker.baseline.value = ""
    assert names_of(picker) == ["a", "c"]
    (root / "a-seed0" / "predictions.parquet").write_bytes(b"PAR1")
    picker.table.selected = ["b-seed0", "a-seed0"]
    assert "a-seed0 out, or train it further" in html_of(view)


def test_a_run_without_predictions_may_be_selected_and_is_not_compared(root):
    picker = RunPicker(root, ["a-seed0", "b-seed0"])
    before = picker.result
    (root / "c-seed0" / "predictions.parquet").unlink()
    picker.refresh()
    picker.table.selected = [*picker.table.selected, "c-seed0"]
    assert names_of(picker) == ["a", "b"] and picker.result is not before


def test_the_marks_of_the_table_have_the_colours_of_the_recipes_in_figures(root):
    picker = RunPicker(root, ["a-seed0", "b-seed0", "b-seed1"], baseline="b")
    blue, orange = plots.COLOURS[:2]
    assert picker.table.colours == {"b-seed0": blue, "b-seed1": blue, "a-seed0": orange}
    lines = plots.intervals(picker.result.table, {g.name: g.top1 for g in picker.result.groups})
    assert [line.get_color() for line in lines.axes[0].lines[::3]] == [blue, orange]
    picker.table.selected = []
    assert picker.table.colours == {}


def test_views_share_the_recipe_control_and_one_recipe_is_no_error(root):
    picker, drawn = RunPicker(root, every(root)), {}
    draw = lambda key: lambda result, name: drawn.__setitem__(key, name) or result.sentences()
    views = [InteractiveView(draw(key), picker, name=picker.recipe) for key in ("one", "two")]
    assert picker.recipe.options == ("b", "c") and drawn == {"one": "c", "two": "c"}
    picker.recipe.value = "b"
    assert drawn == {"one": "b", "two": "b"}
    picker.table.selected = ["c-seed0", "b-seed0", "a-seed0"]
    assert picker.recipe.value == "b", "the choice stays"
    drawn.clear()
    picker.table.selected = ["a-seed0", "a-seed1"]
    assert "There is one recipe" in html_of(views[0]) and "Error" not in html_of(views[0])
    assert drawn == {}
    picker.table.selected = ["a-seed0", "c-seed0"]
    assert drawn == {"one": "c", "two": "c"} and "one recipe" not in html_of(views[0])


def test_a_comparison_follows_the_selected_runs_and_no_others(root, monkeypatch):
    monkeypatch.setattr(run_table, "PERIOD", 0.01)
    monkeypatch.setattr(run_table, "watched", lambda: "jupyter")

    async def changed(name: str, **row) -> bool:
        picker = RunPicker(root, ["a-seed0", "b-seed0"])
        before, run = picker.result, runs.Run(root / name)
        with run.writing():
            run.append("metrics.csv", {"epoch": 3, "step": 6, **row})
        for _ in range(200):
            await asyncio.sleep(0.01)
            [shown] = [r["cells"][3][0] for r in picker.table.rows if r["key"] == name]
            if shown.startswith("3 of"):
                break
        picker.close()
        assert shown.startswith("3 of")
        return picker.result is not before

    assert asyncio.run(changed("a-seed0", top1=90.0))
    assert not asyncio.run(changed("c-seed0", top1=90.0))


@pytest.mark.parametrize("kind", ["empty", "missing", "half"])
def test_a_folder_without_a_run_is_a_message_in_every_view(tmp_path, kind):
    folder = tmp_path / "runs"
    if kind != "missing":
        folder.mkdir()
    if kind == "half":
        run_folder(folder, "half").joinpath("predictions.parquet").unlink()
        (folder / "odd").mkdir()
        (folder / "odd" / "recipe.yaml").write_text("{")
    picker = RunPicker(folder)
    assert picker.result is None and "0 evaluated runs in" in html_of(picker)
    assert "no run to compare" in html_of(InteractiveView(lambda result: result.table, picker))
    if kind == "half":
        assert "unreadable" in html_of(picker)


# ---- the notebook


@pytest.mark.slow
def test_the_notebook_compares_real_runs_headless_and_writes_what_it_shows(tmp_path):
    shared = {"train_fraction": 0.25, "epochs": 2, "workers": 0, "runs_dir": str(tmp_path / "runs")}
    recipes = [
        Recipe(name=name, seed=seed, lr=lr, **shared)
        for name, lr in (("steady", 0.001), ("quick", 0.1))
        for seed in range(2)
    ]
    found = comparison.compare([train(recipe).path for recipe in recipes])
    output, place = tmp_path / "out.ipynb", tmp_path / "export"
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "05_compare.ipynb")]
    command += [str(output), "-k", "python3", "--no-progress-bar"]
    command += ["-p", "runs_dir", shared["runs_dir"], "-p", "export_dir", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = {}
    for cell in nbformat.read(output, as_version=4).cells:
        for out in cell.get("outputs", []):
            assert out.get("name") != "stderr", out
            assert not [kind for kind in out.get("data", {}) if "widget" in kind], cell.id
            if "data" in out:
                shown[cell.id] = out.data
    [verdict] = found.sentences()
    assert verdict in shown["verdict"]["text/html"]
    assert f"{found.table.top1[1]:.2f}" in shown["table"]["text/html"]
    assert ">top-1 (%)</th>" in shown["table"]["text/html"]
    options = re.findall(r"<t[hd] [^>]*>(.*?)</t[hd]>", shown["options"]["text/html"])
    assert options == ["option", "steady", "quick", "lr", "0.001", "0.1"]
    for figure in "intervals curves classes flips confusion reliability agreement".split():
        assert "image/png" in shown[figure], figure
    assert "--jp-error-color1" not in str(shown), "no view ended in an error"
    written = pd.read_csv(place / "table.csv")
    assert written.recipe.tolist() == ["steady", "quick"]
    assert written.top1.tolist() == pytest.approx(found.table.top1.tolist())
    assert f"- {verdict}" in (place / "table.md").read_text()
    figures = {f"{n}.{k}" for n in ("top1", "curves", "reliability") for k in ("png", "svg")}
    assert figures < {path.name for path in place.iterdir()}


def test_the_notebook_splits_top1_by_the_columns_of_a_table_where_there_are_some(root):
    cells = nbformat.read(ROOT / "notebooks" / "05_compare.ipynb", as_version=4).cells
    names: dict[str, object] = {}
    for cell in cells:
        if cell.id in ("imports", "picker"):
            exec(cell.source.removesuffix("\npicker"), names)
        elif cell.id == "parameters":
            exec(cell.source.replace('runs_dir = "runs"', f"runs_dir = {str(root)!r}"), names)
        elif cell.id == "columns":
            define, _, view = cell.source.rpartition("\n\n\n")
            exec(define, names)
            view = eval(view, names)
    assert "<table" not in html_of(view) and "color" not in html_of(view)
    for path in root.iterdir():
        frame = pd.read_parquet(path / "predictions.parquet")
        frame.assign(camera=frame.row % 2).to_parquet(path / "predictions.parquet")
    names["picker"].table.selected = ["a-seed0", "b-seed0", "b-seed1"]
    assert ">camera</td>" in html_of(view) and ">b</td>" in html_of(view)


def test_the_notebook_without_a_run_shows_what_to_do_and_raises_nothing(tmp_path):
    names: dict[str, object] = {}
    for cell in nbformat.read(ROOT / "notebooks" / "05_compare.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            source = cell.source.replace('runs_dir = "runs"', f"runs_dir = {str(tmp_path)!r}")
            exec(source, names)
    assert "make demo trains one" in html_of(names["picker"])
