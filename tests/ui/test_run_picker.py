"""The run picker, the views that follow it, and the comparison notebook on real runs."""

import json
import os
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
from conftest import IMAGES, run_folder

from workbench import ROOT, runs, training
from workbench.evaluation import comparison
from workbench.evaluation.comparison import ComparisonError
from workbench.recipe import Recipe
from workbench.ui.run_picker import RunPicker
from workbench.ui.widgets import InteractiveView


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
    return [group.name for group in picker.result.groups]


# ---- the picker


def aged(path, seconds: float):
    """The run's predictions as old as that."""
    at = time.time() - seconds
    os.utime(path / "predictions.parquet", (at, at))
    return path


def changed(path, name: str, **values) -> None:
    file = path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_the_newest_recipe_and_its_baseline_are_picked(root):
    """Of recipes that differ in equally many options the oldest is the baseline."""
    elsewhere = aged(run_folder(root, "elsewhere"), 5000)
    changed(elsewhere, "environment.json", val_data="w")
    picker = RunPicker(root)
    assert names_of(picker) == ["a", "c"]
    assert "elsewhere-seed0" in dict(map(reversed, picker.runs.options))
    assert "elsewhere-seed0" not in picker.runs.value


def test_the_baseline_differs_in_the_fewest_options_unless_it_is_named(root):
    aged(run_folder(root, "new", lr=0.2, hflip=0.5), 10)  # of b in one option, of a and c in two
    assert names_of(RunPicker(root)) == ["b", "new"]
    assert names_of(RunPicker(root, baseline="c")) == ["c", "new"]


def test_all_seeds_are_picked(root):
    for seed in range(2, 12):
        aged(run_folder(root, "a", seed, n=IMAGES, lr=0.1), 2000 + seed)
        aged(run_folder(root, "c", seed, n=IMAGES, lr=0.3), 5)
    assert RunPicker(root).result.table.seeds.tolist() == [12, 12]


def test_unfinished_runs_are_left_out_unless_asked_for_or_named(root):
    changed(aged(run_folder(root, "c", 2, lr=0.3), 5), "status.json", state="stopped")
    changed(aged(run_folder(root, "d", lr=0.4), 1), "status.json", state="interrupted")
    picker = RunPicker(root)
    assert set(picker.runs.value) == {"a-seed0", "a-seed1", "c-seed0", "c-seed1"}
    assert "d-seed0" in dict(map(reversed, picker.runs.options))
    assert names_of(RunPicker(root, unfinished=True)) == ["a", "d"]
    assert names_of(RunPicker(root, ["c-seed2", "d-seed0"])) == ["c", "d"]


def test_views_follow_the_picked_runs(root):
    picker, drawn = RunPicker(root, every(root)), []
    view = InteractiveView(lambda result: drawn.append(len(result.groups)) or result.table, picker)
    before = html_of(view)
    picker.runs.value = ("b-seed0", "a-seed0")
    assert drawn[0] == 3 and drawn[-1] == 2
    assert html_of(view) != before and "InteractiveView" not in html_of(view)
    picker.baseline.value = "b"
    assert names_of(picker) == ["b", "a"]
    picker.runs.value = ()
    assert picker.result is None and "no run to compare" in html_of(view)
    picker.runs.value = ("c-seed0", "a-seed0")
    assert "no recipe &#x27;b&#x27; here" in html_of(view)
    picker.baseline.value = ""
    assert names_of(picker) == ["a", "c"]


def test_a_word_narrows_the_list_and_keeps_picked_runs(root):
    picker = RunPicker(root, ["a-seed0", "b-seed0"])
    picker.search.value = "C-"
    shown = [name for _, name in picker.runs.options]
    assert sorted(shown) == ["a-seed0", "b-seed0", "c-seed0", "c-seed1"]
    assert set(picker.runs.value) == {"a-seed0", "b-seed0"} and names_of(picker) == ["a", "b"]


def test_views_share_the_recipe_control(root):
    picker, said = RunPicker(root, every(root)), {}
    note = lambda key: lambda found, name: said.__setitem__(key, name) or found.sentences()
    for key in ("one", "two"):
        InteractiveView(note(key), picker, name=picker.recipe)
    assert picker.recipe.options == ("b", "c") and said == {"one": "c", "two": "c"}
    picker.recipe.value = "b"
    assert said == {"one": "b", "two": "b"}
    picker.runs.value = ("c-seed0", "b-seed0", "a-seed0")
    assert picker.recipe.value == "b", "the choice stays"


def test_a_single_recipe_is_no_error(root):
    picker, asked = RunPicker(root, ["a-seed0", "a-seed1"]), []
    view = InteractiveView(lambda found, name: asked.append(name) or [], picker, name=picker.recipe)
    assert "There is one recipe" in html_of(view) and "Error" not in html_of(view)
    assert asked == []
    picker.runs.value = ("a-seed0", "b-seed0")
    assert asked[-1] == "b"


def test_the_epoch_of_a_run_that_continues_another_is_that_of_both(root):
    metrics = pd.DataFrame({"epoch": [5, 6], "step": [10, 12], "top1": [50.0, 80.0]})
    metrics.to_csv(root / "a-seed0" / "metrics.csv", index=False)
    label = dict(map(reversed, RunPicker(root).runs.options))["a-seed0"]
    assert label.endswith("(finished, epoch 6)")


def test_a_run_in_training_is_marked_and_followed(root):
    run = runs.Run(root / "a-seed0")
    picker = RunPicker(root)
    before = picker.stamp()
    with run.writing():
        run.set_status("running")
        picker.refresh()
        label = dict(map(reversed, picker.runs.options))["a-seed0"]
        assert "\u25cf training" in label and "epoch 2" in label
        run.append("metrics.csv", {"epoch": 3, "step": 6, "top1": 90.0})
        assert picker.stamp() != before
        picker.refresh()
        assert "90.00 %" in dict(map(reversed, picker.runs.options))["a-seed0"]
        assert "epoch 3" in dict(map(reversed, picker.runs.options))["a-seed0"]


def test_unknown_names_are_refused(root):
    with pytest.raises(ComparisonError, match="no evaluated run d-seed0; see workbench runs"):
        RunPicker(root, ["a-seed0", "d-seed0"])


@pytest.mark.parametrize("kind", ["empty", "missing", "half"])
def test_a_folder_without_a_run_is_a_message_in_every_view(tmp_path, kind):
    folder = tmp_path / "runs"
    if kind != "missing":
        folder.mkdir()
    if kind == "half":
        run_folder(folder, "half").joinpath("predictions.parquet").unlink()
        (folder / "odd").mkdir()
        (folder / "odd" / "recipe.yaml").write_text("[]")
    picker = RunPicker(folder)
    assert picker.result is None and "0 evaluated runs in" in html_of(picker)
    assert "no run to compare" in html_of(InteractiveView(lambda result: result.table, picker))
    if kind == "half":
        assert "left out: half-seed0 (finished, not evaluated yet)" in html_of(picker)
        assert "left out: odd" in html_of(picker)


def test_a_run_that_becomes_unreadable_is_a_message(root):
    picker = RunPicker(root, every(root))
    view = InteractiveView(lambda result: result.table, picker)
    (root / "a-seed0" / "predictions.parquet").write_bytes(b"PAR1")
    picker.runs.value = ("b-seed0", "a-seed0")
    assert "a-seed0" in html_of(view) and "leave it out" in html_of(view)


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
