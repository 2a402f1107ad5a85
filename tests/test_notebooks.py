"""Notebooks: committed clean, run through papermill, stopped and resumed in a real kernel."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.manager import start_new_kernel

from workbench import ROOT, runs, training
from workbench.recipe import Recipe

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL = {"fraction": 0.25, "epochs": 2, "crop_scale": [0.5, 1.0], "workers": 0, "log_every": 1}
STRIKES = {  # what a notebook has to show and a resume has to find again
    "optimizer": "lamb",
    "lr": 0.005,
    "loss": "bce",
    "bce_sum": True,
    "randaug_n": 2,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "erase_prob": 0.25,
    "ema_decay": 0.9,
}


def cells(path, kind="code"):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def papermill(notebook, output, *words):
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / notebook), str(output)]
    return [*command, "-k", "python3", "--no-progress-bar", "--log-output", *words]


def params_file(folder: Path, **knobs) -> Path:
    path = folder / "params.yaml"
    path.write_text(json.dumps({**SMALL, "runs_dir": str(folder / "runs"), **knobs}))
    return path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_committed_notebook_is_in_its_canonical_form(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert text.endswith("}\n")
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "**Question:**" in first.source and "papermill" in first.source
    for cell in notebook.cells:
        assert cell.id.replace("-", "").isalpha(), f"{cell.id} is no readable id"
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            ast.parse(cell.source)
            if "parameters" not in cell.metadata.get("tags", []):
                assert cell.source.count("\n") < 25, f"{cell.id} does not fit on a screen"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_parameters_cell_holds_every_knob_at_its_default(path):
    """Else the same params file would mean one thing to papermill and another to the command."""
    tagged = [c for c in cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    ours, committed = {}, {}
    exec(Recipe.cell(), ours)
    exec(tagged[0].source, committed)
    del ours["__builtins__"], committed["__builtins__"]
    assert committed == ours
    assert tagged[0].source.startswith("# Parameters")
    assert Recipe.collect({"In": ["", tagged[0].source], **committed}) == Recipe()


def test_a_misspelt_knob_ends_papermill_with_a_message_and_leaves_no_run(tmp_path):
    params = params_file(tmp_path, lerning_rate=0.5)
    done = subprocess.run(
        papermill("02_baseline.ipynb", tmp_path / "out.ipynb", "-f", str(params)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "lerning_rate: no such knob; the nearest is 'lr'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_papermill_killed_in_training_goes_on_and_ends_as_if_undisturbed(tmp_path):
    recipe = Recipe(**SMALL, **STRIKES, runs_dir=str(tmp_path / "undisturbed"))
    undisturbed = runs.Run(recipe.folder)
    list(training.fit(recipe, undisturbed))

    params = params_file(tmp_path, checkpoint_minutes=0, **STRIKES)
    command = papermill("02_baseline.ipynb", tmp_path / "out.ipynb", "-f", str(params))
    run = runs.Run(tmp_path / "runs" / "baseline-seed0")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and len(run.steps()) < 5:
        time.sleep(0.05)
    assert first.poll() is None, "the first run ended by itself"
    for process in [*psutil.Process(first.pid).children(recursive=True), psutil.Process(first.pid)]:
        process.kill()
    first.wait()
    while run.locked():
        time.sleep(0.05)
    assert run.status()["state"] == "interrupted"

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run.status()["state"] == "finished"
    assert run.file("metrics.csv").read_bytes() == undisturbed.file("metrics.csv").read_bytes()

    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    outputs = [o for c in executed.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 5, "figures stay on paper"
    text = "".join(o.get("text", "") for o in outputs)
    assert "epoch   2" in text and "finished: top-1" in text
    assert "11 steps an epoch of 324 pictures" in text and "warning: mixing in 2 epochs" in text
    assert "0%|" not in text, "a progress bar froze in the saved notebook"


def test_the_augmentation_notebook_runs_on_any_recipe(tmp_path):
    output = tmp_path / "out.ipynb"
    params = ROOT / "params" / "digits_strikes.yaml"
    done = subprocess.run(
        papermill("01_augmentation.ipynb", output, "-f", str(params)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    executed = nbformat.read(output, as_version=4)
    pictures = {
        c.id: sum("image/png" in o.get("data", {}) for o in c.outputs)
        for c in executed.cells
        if c.cell_type == "code"
    }
    assert pictures["grid"] == 3 and pictures["strengths"] == 2
    assert all(pictures[cell] == 1 for cell in ("randaugment", "eats", "mixed", "lr"))
    assert pictures["picker"] == pictures["magnitude"] == 1, "the widgets' static twins"
    [table] = [o.data["text/html"] for c in executed.cells if c.id == "randaugment"
               for o in c.outputs if "text/html" in o.get("data", {})]  # fmt: skip
    assert "solarize_add_all" in table and "of the side" in table
    assert not [
        o for c in executed.cells for o in c.get("outputs", []) if o.get("name") == "stderr"
    ]


def test_interrupt_in_a_kernel_ends_the_cell_normally_and_the_kernel_lives(tmp_path):
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        code = f"""
from workbench import runs, training
from workbench.recipe import Recipe
recipe = Recipe(epochs=500, workers=2, runs_dir={str(tmp_path)!r})
run = runs.Run(recipe.folder)
for row in training.fit(recipe, run):
    pass
print(run.status()["message"])
"""
        run = runs.Run(tmp_path / "baseline-seed0")
        client.execute(code)
        deadline = time.monotonic() + 120
        while len(run.steps()) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)
        assert reply["content"]["status"] == "ok"
        assert run.status()["state"] == "stopped"
        assert "Ctrl-C" in run.status()["message"]
        client.execute("alive = len(list(run.metrics().columns))")
        assert client.get_shell_msg(timeout=60)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
