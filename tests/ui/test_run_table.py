"""The run table: what a row has, what is on top, what stays when the folder changes."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import run_folder
from statsmodels.stats.proportion import proportion_confint

from workbench import run_list, runs, sweep
from workbench.recipe import Recipe
from workbench.ui import widgets
from workbench.ui.run_table import RunTable


@pytest.fixture
def root(tmp_path) -> Path:
    """Runs of two recipes, and a sweep of two values and two seeds of which one has run."""
    for name, seed, lr in (("plain", 0, 0.1), ("plain", 1, 0.1), ("better", 0, 0.3)):
        run_folder(tmp_path, name, seed, lr=lr)
    recipe = Recipe(name="tune", runs_dir=str(tmp_path))
    rows = sweep.sweep(recipe, {"lr": [0.2, 0.4], "seed": [0, 1]})
    with pytest.MonkeyPatch.context() as patch:  # the first row is that of a run that failed
        patch.setattr(sweep.training, "fit", lambda *_, **__: iter([]))
        next(rows)
    folder = tmp_path / "tune-sweep-lr"
    shutil.move(run_folder(tmp_path, "lr=0.2", 0, lr=0.2), folder / "lr=0.2-seed0")
    return tmp_path


def shown(table: RunTable) -> pd.DataFrame:
    """The texts of the table by key, rows on top first."""
    rows = sorted(table.table.rows, key=lambda row: not row["live"])
    titles = [column["title"] for column in table.table.columns]
    texts = [[cell[0] for cell in row["cells"]] for row in rows]
    return pd.DataFrame(texts, columns=titles, index=[row["key"] for row in rows])


def test_a_row_has_the_results_of_a_run_and_the_options_that_differ(root):
    path = root / "better-seed0"
    row = {"epoch": [1, 2], "step": [2, 4], "top1": [50.0, 81.0], "val_images": [400, 400]}
    pd.DataFrame(row).to_csv(path / "metrics.csv", index=False)
    table = shown(RunTable(root))
    low, high = proportion_confint(324, 400, method="wilson")
    assert table.loc["better-seed0", "top-1 (%), 95 % interval"] == (
        f"81.00  [{100 * low:.1f}, {100 * high:.1f}]"
    )
    facts = {"recipe": "better", "seed": "0", "minutes": "1.0", "state": "finished", "lr": "0.3"}
    assert table.loc["better-seed0", list(facts)].to_dict() == facts
    assert table.loc["better-seed0", "epochs"] == f"2 of {Recipe().epochs}"
    assert table.columns[-1] == "lr", "no option that is the same for all, and no name"
    assert table.loc["tune-sweep-lr/lr=0.2-seed0", ["sweep", "lr"]].tolist() == [
        "tune-sweep-lr", "0.2"
    ]  # fmt: skip


def test_a_run_is_on_top_from_its_first_step_with_the_runs_that_wait_for_it(root):
    run = runs.Run(root / "tune-sweep-lr" / "lr=0.2-seed1")
    table = RunTable(root)
    assert not any(row["live"] for row in table.table.rows), "a sweep that ended has no queue"
    with run.writing():
        Recipe(name="lr=0.2", lr=0.2, seed=1).to_yaml(run.file("recipe.yaml"))
        run.set_status("running", step=0, steps=40)
        table.refresh()
        assert shown(table).iloc[0].state == "running, step 0 of 40"
        run.append("steps.csv", {"step": 10, "loss": 2.3})
        table.refresh()
        top = shown(table).iloc[:3]
        assert top.state.tolist() == ["running, step 10 of 40", "queued", "queued"]
        assert [Path(key).name for key in top.index] == [
            "lr=0.2-seed1", "lr=0.4-seed0", "lr=0.4-seed1"
        ]  # fmt: skip
        assert top.recipe.tolist() == ["lr=0.2", "lr=0.4", "lr=0.4"]
    table.refresh()
    assert not any(row["live"] for row in table.table.rows)
    assert "interrupted" in shown(table).state.tolist()


def test_what_the_user_chose_stays_when_the_folder_changes(root):
    table = RunTable(root)
    asked = {"search": "e", "order": ["seed", 1], "group": "recipe", "filters": {"lr": ">0.1"}}
    keys = ["better-seed0", "plain-seed1"]
    table.table.set_state({**asked, "selected": keys, "pinned": ["plain-seed1"]})
    run_folder(root, "new")
    shutil.rmtree(root / "plain-seed1")
    table.refresh()
    assert {key: getattr(table.table, key) for key in asked} == asked
    assert table.table.selected == ["better-seed0"] and table.table.pinned == []
    assert [run.path for run in table.selected] == [root / "better-seed0"]
    assert "new-seed0" in shown(table).index


def test_only_what_changed_is_read_again(root, monkeypatch):
    table, read = RunTable(root), []
    original = run_list.row
    monkeypatch.setattr(run_list, "row", lambda path, job: read.append(path.name) or original(path))
    table.refresh()
    assert read == []
    run = runs.Run(root / "plain-seed0")
    with run.writing():
        run.set_status("finished", message="again")
    table.refresh()
    assert read == ["plain-seed0"]


def test_runs_returns_the_table_of_a_folder(root, monkeypatch):
    monkeypatch.setattr(widgets, "ROOT", root.parent)
    table = widgets.runs(root.name)
    assert table.selected == [] and len(table.table.rows) == 4
    table.table.selected = ["tune-sweep-lr/lr=0.2-seed0", "plain-seed0"]
    assert {run.recipe()["lr"] for run in table.selected} == {0.1, 0.2}
    assert all(type(run) is runs.Run for run in table.selected)


def test_a_damaged_run_is_a_row_that_says_why(root):
    (root / "plain-seed1" / "recipe.yaml").write_text("{")
    status = root / "plain-seed0" / "status.json"
    status.write_text(json.dumps({"state": "finished", "message": "<b>done</b>"}))
    table = RunTable(root)
    [row] = [row for row in table.table.rows if row["key"] == "plain-seed1"]
    assert row["cells"][5][0] == "unreadable" and "no readable run" in row["cells"][5][2]
    assert "plain-seed1" not in {run.path.name for run in table.evaluated()}
    text = table._repr_mimebundle_()["text/html"]
    assert "unreadable" in text and "<td style='text-align:right" in text
