"""Trainings and files of the user in JupyterLab: followed, paused, reopened, dropped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from helpers import train
from PIL import Image
from playwright.sync_api import Page
from test_browser import _until as until
from test_browser import (
    browser,
    cell,
    image_of,
    lab,
    open_and_run,
    page,
    pytestmark,
    step,
    wait_for_all_cells,
)

from workbench import ROOT, jobs, runs
from workbench.recipe import Recipe

__all__ = ["browser", "lab", "page", "pytestmark"]  # fixtures of pytest
SHOTS = os.environ.get("SCREENSHOTS", "")  # a folder that keeps what the tests see


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A root folder with the notebook 06 and a finished run."""
    root = tmp_path_factory.mktemp("lab")
    (root / "notebooks").mkdir()
    for seed in range(2):
        train(Recipe(name="small", seed=seed, epochs=1, workers=0, runs_dir=str(root / "runs")))
    notebook = nbformat.read(ROOT / "notebooks" / "06_deploy.ipynb", as_version=4)
    wanted = {"imports", "parameters", "run", "checks", "package", "try"}
    notebook.cells = [c for c in notebook.cells if c.id in wanted]
    by_id = {c.id: c for c in notebook.cells}
    by_id["parameters"].source += "\nint8, int8_points = False, 0.5"
    lines = "recipe = Recipe(**chosen.recipe())\npackage = export.load(path)\n"
    by_id["try"].source = lines + by_id["try"].source
    nbformat.write(notebook, root / "notebooks" / "deploy.ipynb")
    return root


def long(root: Path, name: str) -> Recipe:
    options = {"epochs": 500, "workers": 0, "log_every": 1, "ema_decay": 0.9}
    return Recipe(name=name, runs_dir=str(root / "live"), **options)


@contextlib.contextmanager
def terminal(recipe: Recipe, folder: Path) -> Iterator[subprocess.Popen]:
    """`workbench train` of a recipe in another process."""
    recipe.to_yaml(folder / f"{recipe.name}.yaml")
    command = [sys.executable, "-m", "workbench", "train", str(folder / f"{recipe.name}.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def write_notebook(root: Path, name: str, code: str) -> None:
    """A notebook with one cell, named training."""
    imports = "from workbench import runs\nfrom workbench.recipe import Recipe\n"
    imports += "from workbench.ui import widgets\n"
    new_cell = nbformat.v4.new_code_cell(imports + code, id="training")
    notebook = nbformat.v4.new_notebook(cells=[new_cell])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, root / "notebooks" / name)


def shot(page: Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS, f"{name}.png"))


def training_code(recipe: Recipe) -> str:
    code = f"recipe = Recipe(**{recipe.non_default()!r})\nrun = runs.Run(recipe.folder)\n"
    return code + "await widgets.train(recipe, run)"


def test_a_run_in_a_terminal_is_followed_paused_resumed_and_stopped(page, lab, root):
    recipe = long(root, "terminal")
    run = runs.Run(recipe.folder)
    with terminal(recipe, root) as process:
        until(lambda: len(run.metrics()) >= 2, 120)
        write_notebook(root, "follow.ipynb", training_code(recipe))
        open_and_run(page, lab, "follow.ipynb")
        view = lambda: cell(page, "training")
        text = lambda: view().inner_text()
        until(lambda: "trained by process" in text() and "elapsed" in text(), 120)
        assert str(process.pid) in text()
        shown = until(lambda: view().locator("tbody tr").all_inner_texts(), 30)
        assert "best" in " ".join(shown)
        shot(page, "followed")

        view().get_by_role("button", name="Pause").click()
        until(lambda: "paused after step" in text(), 30)
        paused = run.status()["step"]
        assert f"paused after step {paused} of" in text() and run.locked()
        shot(page, "paused")
        view().get_by_role("button", name="Resume").click()
        until(lambda: len(run.steps()) > paused and "img/s" in text(), 30)
        view().get_by_role("button", name="Stop").click()
        assert process.wait(60) == 3
        until(lambda: f"stopped by the STOP file after step {run.status()['step']}" in text(), 30)
        shot(page, "stopped")


def test_a_page_that_is_opened_again_shows_the_progress(page, lab, root):
    recipe = long(root, "reopened")
    write_notebook(root, "again.ipynb", training_code(recipe))
    open_and_run(page, lab, "again.ipynb")
    text = lambda: cell(page, "training").inner_text()
    first = until(lambda: step(page), 120)
    until(lambda: cell(page, "training").locator("tbody tr").count() >= 2, 60)
    page.goto("about:blank")  # saved by the view alone: JupyterLab saves after two minutes
    page.goto(lab.format("/lab/tree/notebooks/again.ipynb"), timeout=60_000)
    until(lambda: step(page) > first, 60, Exception)
    again = step(page)
    until(lambda: step(page) > again, 30)
    assert "elapsed" in text() and "top-1 (%)" in text()
    assert image_of(page, "training")
    shot(page, "reopened")
    cell(page, "training").get_by_role("button", name="Stop").click()
    until(lambda: "run the cell again to resume" in text(), 60)
    assert runs.Run(recipe.folder).status()["state"] == "stopped"
    shot(page, "stopped here")


def test_a_submitted_run_outlives_its_notebook_and_another_one_follows_and_stops_it(
    page, lab, root
):
    recipe = long(root, "submitted")
    run = runs.Run(recipe.folder)
    code = f"recipe = Recipe(**{recipe.non_default()!r})\nfrom workbench import cluster\n"
    write_notebook(root, "submit.ipynb", code + "print(cluster.submit(recipe, local=1))")
    open_and_run(page, lab, "submit.ipynb")
    until(lambda: "1 run in" in cell(page, "training").inner_text(), 120)
    job = jobs.read(run.path)
    page.goto("about:blank")
    kernels = lab.format("/api/kernels")
    for kernel in json.loads(urllib.request.urlopen(kernels).read()):
        address = lab.format(f"/api/kernels/{kernel['id']}")
        urllib.request.urlopen(urllib.request.Request(address, method="DELETE"))
    until(lambda: json.loads(urllib.request.urlopen(kernels).read()) == [], 30)

    code = f"await widgets.watch(runs.Run({str(run.path)!r}))"
    write_notebook(root, "attach.ipynb", code)
    open_and_run(page, lab, "attach.ipynb")  # perhaps before the first step
    text = lambda: cell(page, "training").inner_text()
    # The list of runs, or from the first step on the process that trains this one.
    writers = lambda: (job["process"], jobs.read(run.path).get("worker"))
    until(lambda: any(f"process {one} on" in text() for one in writers()), 60)
    until(lambda: "img/s" in text() and len(run.metrics()) >= 1, 120)
    assert jobs.is_alive(job, "process")
    assert jobs.of_runs([run.path])[run.path].state == "running"
    shot(page, "attached")
    cell(page, "training").get_by_role("button", name="Stop").click()
    until(lambda: not jobs.is_alive(job, "process"), 60)
    until(lambda: f"stopped by the STOP file after step {run.status()['step']}" in text(), 30)
    assert run.status()["state"] == "stopped" and run.file("last.pt").exists()


def test_two_files_are_dropped_on_06_and_one_is_no_image(page, lab, root, tmp_path):
    open_and_run(page, lab, "deploy.ipynb")
    wait_for_all_cells(page)
    choice = cell(page, "run").locator("select")
    options = choice.locator("option").all_inner_texts()
    assert len(options) == 2 and all("top-1" in text and "seed" in text for text in options)
    shot(page, "choice")
    before = image_of(page, "try")
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "ramp.png")
    content = (tmp_path / "ramp.png").read_bytes()
    dropped = page.evaluate_handle(
        """bytes => { const files = new DataTransfer();
        files.items.add(new File([new Uint8Array(bytes)], 'ramp.png', {type: 'image/png'}));
        files.items.add(new File(['a list'], 'notes.txt', {type: 'text/plain'}));
        return files; }""",
        list(content),
    )
    cell(page, "try").locator(".widget-upload").dispatch_event("drop", {"dataTransfer": dropped})
    until(lambda: "notes.txt cannot be read as an image" in cell(page, "try").inner_text(), 60)
    assert until(lambda: (now := image_of(page, "try")) != before and now, 30)
    shot(page, "dropped")
