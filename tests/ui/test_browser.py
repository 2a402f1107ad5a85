"""Notebooks in a real Chromium, by JupyterLab and Voila: run them and move their controls.

Needs Chromium (Debian: apt-get install chromium) and Playwright's driver, which pip brings.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import run_folder
from playwright.sync_api import Locator, Page, sync_playwright

from workbench import ROOT, runs, training
from workbench.recipe import Recipe
from workbench.ui import run_table

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.slow,
]

NOTIFICATIONS = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
SETTINGS = {
    "apputils-extension/notification": NOTIFICATIONS,
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are rendered
}
ICONS = "https://cdn.jsdelivr.net/npm/@fortawesome/"
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update""".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A root folder with notebooks, params, and made-up runs of three recipes."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copytree(ROOT / "params", root / "params")
    for name, top1, lr in (("plain", 0.7, 0.1), ("other", 0.72, 0.2), ("better", 0.9, 0.3)):
        for seed in range(2):
            run_folder(root / "runs", name, seed, top1=top1, lr=lr)
            time.sleep(0.01)  # so that one is newer than the other
    return root


@contextlib.contextmanager
def jupyter_server(root: Path, port: int, ready: str, *command: str) -> Iterator[None]:
    """A Jupyter server with its own configuration, on loopback, ended by its process id."""
    home = root / "home"
    folders = {f"JUPYTER_{kind.upper()}_DIR": kind for kind in ("config", "data", "runtime")}
    folders |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    folders |= {"IPYTHONDIR": "ipython"}
    environment = {key: str(home / name) for key, name in folders.items()}
    environment = {**os.environ, **environment, "WORKBENCH_ROOT": str(root)}
    environment["PYTHONPATH"] = str(ROOT)  # the package that is tested
    with open(root / f"{command[0]}.log", "wb") as log:
        command = [sys.executable, "-m", *command]
        options = {"env": environment, "stdout": log, "stderr": log, "cwd": root}
        server = subprocess.Popen(command, **options)
    try:
        _until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}"), 60, OSError)
        yield
    finally:
        server.terminate()  # both servers end their kernels then
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        server.kill()
        server.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def lab(root) -> Iterator[str]:
    """The address of a JupyterLab on loopback, `{}` where a path goes."""
    for name, values in SETTINGS.items():
        file = root / "home" / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    port = free_port()
    command = ["jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=secret"]
    command += [f"--ServerApp.root_dir={root}", "--ServerApp.allow_root=True"]
    command += ["--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += ["--expose-app-in-browser"]
    with jupyter_server(root, port, "/api/status?token=secret", *command):
        yield f"http://127.0.0.1:{port}{{}}?token=secret"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """A page that fails the test on an error or a request to another host."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    ours = ("data:", "blob:", "http://127.0.0.1:", "ws://127.0.0.1:", ICONS)
    page.on("request", lambda sent: sent.url.startswith(ours) or problems.append(sent.url))
    # Voila's template requests icons there; the page is complete without them.
    page.route(f"{ICONS}**", lambda route: route.abort())
    yield page
    page.close()
    assert problems == []


def _until(true, seconds: float, ignored: type[Exception] = TimeoutError):
    """What `true` returns, once it is truthy."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := true():
                return found
        except ignored:
            pass
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


CONNECTED = """async () => {
  const panel = window.jupyterapp.shell.currentWidget;
  if (!panel || !panel.context) return false;
  await panel.context.ready;
  await panel.sessionContext.ready;
  return !!(await panel.sessionContext.session.kernel.info);
}"""
RUN_ALL = "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
CELLS = """() => window.jupyterapp.shell.currentWidget.content.widgets
  .filter(cell => cell.model.type === 'code')
  .map(cell => ({id: cell.model.id, count: cell.model.executionCount,
                 busy: cell.model.executionState === 'running',
                 errors: cell.model.outputs.toJSON().filter(o => o.output_type === 'error')
                   .map(o => o.ename + ': ' + o.evalue)}))"""


def open_and_run(page: Page, lab: str, name: str) -> None:
    """Opens a notebook and starts all its cells."""
    page.goto(lab.format(f"/lab/tree/notebooks/{name}") + "&reset", timeout=60_000)
    opened = "() => window.jupyterapp && window.jupyterapp.shell.currentWidget"
    page.wait_for_function(opened, timeout=60_000)
    # "Idle" is shown before the kernel is connected, and run-all would do nothing.
    _until(lambda: page.evaluate(CONNECTED), 60, Exception)
    page.evaluate(RUN_ALL)


def wait_for_all_cells(page: Page, seconds: float = 180) -> None:
    """Raises for a cell with an error."""

    def done() -> bool:
        cells = page.evaluate(CELLS)
        assert [c for c in cells if c["errors"]] == []
        return all(c["count"] for c in cells)

    _until(done, seconds)


def cell(page: Page, name: str) -> Locator:
    """The cell of that id, scrolled to."""
    ids = [c["id"] for c in page.evaluate(CELLS)]
    found = page.locator(".jp-CodeCell").nth(ids.index(name))
    found.scroll_into_view_if_needed()
    return found


def image_of(page: Page, name: str) -> str:
    """The source of the image of a cell's view; it differs for every image."""
    image = cell(page, name).locator("img.widget-image:visible").first
    image.wait_for(state="visible")
    return image.get_attribute("src")


def redrawn(page: Page, name: str, before: str) -> str:
    return _until(lambda: (now := image_of(page, name)) != before and now, 30)


def test_the_comparison_follows_the_picked_runs_and_moved_controls(page, lab, root):
    open_and_run(page, lab, "05_compare.ipynb")
    wait_for_all_cells(page)
    assert "better is better than plain by" in cell(page, "verdict").inner_text()
    assert "other" not in cell(page, "table").inner_text(), "neither newest nor its baseline"
    curves, intervals = image_of(page, "curves"), image_of(page, "intervals")

    handle = cell(page, "curves").locator(".noUi-handle")
    handle.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    curves = redrawn(page, "curves", curves)
    assert image_of(page, "intervals") == intervals, "only what was moved is drawn again"
    measure = cell(page, "curves").get_by_label("measure")
    measure.select_option("speed")
    curves = redrawn(page, "curves", curves)

    table = cell(page, "picker").locator(".workbench-runs")
    for name in ("better-seed1", "plain-seed1"):
        row(table, name).click()
    redrawn(page, "curves", curves)
    redrawn(page, "intervals", intervals)
    verdict = cell(page, "verdict")
    _until(lambda: "one run each on 400 images" in verdict.inner_text(), 30)

    # A run in training is followed without an action of the user.
    run = runs.Run(root / "runs" / "plain-seed0")
    with run.writing():
        run.set_status("running", step=4)
        _until(lambda: "plain-seed0 is running" in verdict.inner_text(), 30)
        run.set_status("finished")


def row(table: Locator | Page, name: str) -> Locator:
    """The row of a run in a run table."""
    return table.locator(f"tr[data-key='{name}'] td").nth(1)


def names_in(table: Locator) -> list[str]:
    rows = table.locator("tbody tr[data-key]").all()
    return [shown.get_attribute("data-key") for shown in rows]


def test_the_run_table_is_sorted_filtered_grouped_and_pinned_by_clicks(page, lab):
    open_and_run(page, lab, "05_compare.ipynb")
    wait_for_all_cells(page)
    table = cell(page, "picker").locator(".workbench-runs")
    verdict = cell(page, "verdict")
    count = lambda: table.locator(".bar > span").inner_text()
    _until(lambda: count() == "6 of 6 runs shown, 4 selected", 30)
    sort = lambda title: table.get_by_role("button", name=title, exact=False).click()
    sort("recipe")
    recipes = [name.split("-")[0] for name in names_in(table)]
    assert recipes == sorted(recipes)
    sort("recipe")
    assert [name.split("-")[0] for name in names_in(table)] == sorted(recipes, reverse=True)

    table.get_by_label("filter lr").fill("<0.25")
    assert count() == "4 of 6 runs shown, 4 selected, 2 of them not shown"
    table.get_by_label("search").fill("other seed1")
    assert names_in(table) == ["other-seed1"]
    row(table, "other-seed1").click()
    _until(lambda: "other" in verdict.inner_text(), 30)
    assert table.get_by_label("search").input_value() == "other seed1"
    table.get_by_label("search").fill("")
    table.get_by_label("filter lr").fill("")

    table.get_by_label("pin other-seed0").click()
    assert names_in(table)[0] == "other-seed0" and count().endswith("6 selected")
    table.get_by_label("select all shown").click()
    assert count() == "6 of 6 runs shown, 1 selected", "what is pinned stays selected"
    _until(lambda: "one recipe, other" in verdict.inner_text(), 30)
    table.get_by_label("group by").select_option("recipe")
    assert table.locator("tr.group").all_inner_texts()[0].strip() == "plain: 2 runs"
    table.get_by_label("select all of plain").click()
    _until(lambda: "other" in (text := verdict.inner_text()) and "plain" in text, 30)
    row(table, "better-seed0").click()
    row(table, "better-seed1").click(modifiers=["Shift"])
    assert count() == "6 of 6 runs shown, 5 selected"
    # Quick clicks are followed once, with all of them; marks have the colours of the recipes.
    _until(lambda: "better is better than plain" in verdict.inner_text(), 30)
    colour = "e => getComputedStyle(e).backgroundColor"
    marks = [row(table, f"plain-seed{i}").locator(".mark").evaluate(colour) for i in range(2)]
    assert marks == ["rgb(0, 114, 178)"] * 2


def test_numbers_and_texts_of_a_column_are_sorted_apart_and_a_bound_is_of_numbers(page):
    texts = ["0.9999", "None", "0.99", "unused", "0.00001", "0.995", "None"]
    rows = [
        {"key": f"{i}", "live": False, "cells": [[text, float(text) if text[0] == "0" else text]]}
        for i, text in enumerate(texts)
    ]
    traits = {"columns": [{"title": "ema", "option": True}], "rows": rows, "order": ["ema", 1]}
    traits |= {"selected": [], "pinned": [], "colours": {}, "search": "", "group": ""}
    script = Path(run_table.__file__).with_suffix(".js").read_text()
    page.evaluate(
        """async ([script, traits]) => {
          const module = await import("data:text/javascript," + encodeURIComponent(script));
          const set = values => Object.assign(traits, values), nothing = () => {};
          const model = { get: name => traits[name], set, save_changes: nothing, on: nothing };
          module.default.render({ model, el: document.body });
        }""",
        [script, traits | {"filters": {"ema": ""}}],
    )
    shown = lambda: page.locator("tbody td:nth-child(2)").all_inner_texts()
    numbers, words = ["0.00001", "0.99", "0.995", "0.9999"], ["None", "None", "unused"]
    assert shown() == numbers + words
    page.get_by_role("button", name="ema").click()
    assert shown() == words[::-1] + numbers[::-1]
    for bound, expected in ((">0.99", ["0.9999", "0.995"]), ("< 1e-3", ["0.00001"])):
        page.get_by_label("filter ema").fill(bound)
        assert shown() == expected


def test_a_run_of_another_process_is_on_top_from_its_first_step_and_followed(page, lab, root):
    open_and_run(page, lab, "05_compare.ipynb")
    wait_for_all_cells(page)
    table = cell(page, "picker").locator(".workbench-runs")
    for _ in range(2):  # all, then none: the others were evaluated on other images
        table.get_by_label("select all shown").click()
    search = table.get_by_label("search")
    search.press_sequentially("se")
    words = ["name=there", "train_fraction=0.25", "epochs=200", "workers=0", "log_every=1"]
    command = [sys.executable, "-m", "workbench", "train", "params/digits_baseline.yaml"]
    command += [part for word in words for part in ("-p", word)]
    environment = {**os.environ, "WORKBENCH_ROOT": str(root)}
    with open(root / "train.log", "wb") as log:
        options = {"env": environment, "stdout": log, "stderr": log, "cwd": root}
        process = subprocess.Popen(command, **options)
    try:
        _until(lambda: names_in(table)[0] == "there-seed0", 90)
        there = table.locator("tr[data-key='there-seed0']")
        at = lambda: re.search(r"running, step (\d+) of", there.inner_text())
        first = _until(at, 60)
        _until(lambda: (now := at()) and int(now[1]) > int(first[1]), 60)
        search.press_sequentially("ed0")
        assert search.input_value() == "seed0", "updates left text and cursor"
        row(table, "there-seed0").click()
        _until(lambda: "there-seed0 is running" in cell(page, "verdict").inner_text(), 60)
        curves = image_of(page, "curves")
        redrawn(page, "curves", curves)
    finally:
        (root / "runs" / "there-seed0" / "STOP").touch()
        process.wait(60)
    _until(lambda: "stopped" in there.inner_text(), 30)
    assert names_in(table)[0] == "there-seed0", "the newest, and no longer because it is running"
    shutil.rmtree(root / "runs" / "there-seed0")


def test_parts_written_in_cells_train_and_are_compared(page, lab, root):
    path = root / "notebooks" / "07_custom_parts.ipynb"
    notebook = nbformat.read(path, as_version=4)
    [parameters] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source += "\nruns_dir, epochs, seeds, device = 'own', 1, [0], 'cpu'"
    nbformat.write(notebook, path)
    open_and_run(page, lab, path.name)
    wait_for_all_cells(page, 300)
    assert "worst_class_top1" in cell(page, "compare").inner_text()
    run = runs.Run(root / "own" / "parts_focal-seed0")
    assert run.status()["state"] == "finished"
    assert run.recipe()["loss"].startswith("notebook:focal@")


def test_a_control_of_an_augmentation_changes_the_image_and_its_value_is_copied(page, lab):
    open_and_run(page, lab, "01_augmentation.ipynb")
    wait_for_all_cells(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    before = image_of(page, "try")
    options = cell(page, "try")
    group = lambda title: options.locator(".jupyter-widget-Collapse-header").get_by_text(title)
    slider = lambda name: options.locator(".widget-hslider", has_text=name).locator(".noUi-handle")
    slider("brightness").focus()
    page.keyboard.press("End")
    brighter = redrawn(page, "try", before)
    lines = options.locator("textarea")
    _until(lambda: "brightness: 1.0  #" in lines.input_value(), 30)
    options.get_by_text("Copy", exact=True).click()
    options.get_by_text("Copied", exact=True).wait_for()
    copied = lambda: page.evaluate("() => navigator.clipboard.readText()")
    _until(lambda: copied() == lines.input_value(), 30)
    slider("brightness").focus()
    page.keyboard.press("Home")
    assert redrawn(page, "try", brighter)

    # Disabled where it has no effect; another option enables it.
    group("RandAugment").click()
    magnitude = options.locator(".widget-hslider", has_text="randaug_m").locator(".noUi-target")
    assert magnitude.get_attribute("disabled") is not None
    slider("randaug_n").focus()
    page.keyboard.press("End")
    _until(lambda: magnitude.get_attribute("disabled") is None, 30)
    # Six operations at the highest magnitude leave nothing of some images.
    slider("randaug_m").focus()
    page.keyboard.press("End")
    _until(lambda: "one colour covers" in options.inner_text(), 30)
    before = image_of(page, "try")
    options.get_by_text("model inputs", exact=True).click()
    redrawn(page, "try", before)


def live(root: Path) -> None:
    """Writes the notebook 02 as live.ipynb, changed to train for long below live/."""
    text = (root / "notebooks" / "02_baseline.ipynb").read_text(encoding="utf-8")
    options = {"runs_dir": "live", "epochs": 500, "workers": 0, "log_every": 1}
    for option, value in options.items():
        escaped = json.dumps(json.dumps(value))[1:-1]
        text, count = re.subn(rf'(?m)^(    "{option} = ).*?(  #)', rf"\g<1>{escaped}\2", text)
        assert count == 1
    (root / "notebooks" / "live.ipynb").write_text(text, encoding="utf-8")


def step(page: Page) -> int | None:
    """The step that the view of a training shows."""
    text = cell(page, "training").inner_text()
    match = re.search(r"step (\d+) of ([\d,]+): loss .* img/s.* GB of memory", text)
    return int(match[1]) if match else None


def paused_step(page: Page) -> int:
    """The step after which a training waits."""
    text = lambda: cell(page, "training").inner_text()
    return int(_until(lambda: re.search(r"paused after step (\d+) of", text()), 30)[1])


def test_a_training_is_paused_three_times_beside_a_control_that_its_view_follows(page, lab, root):
    code = {"slider": """
import ipywidgets
from workbench import runs
from workbench.ui import widgets
from workbench.recipe import Recipe
widgets.InteractiveView(lambda value: [f"it is {value}"], value=ipywidgets.IntSlider(0, 0, 9))
""", "training": f"""
recipe = Recipe(epochs=500, workers=0, log_every=1, runs_dir={str(root / "live")!r}, name="beside")
await widgets.train(recipe, runs.Run(recipe.folder))
"""}  # fmt: skip
    new_cell = nbformat.v4.new_code_cell
    notebook = nbformat.v4.new_notebook(cells=[new_cell(code[name], id=name) for name in code])
    # Without it JupyterLab shows a dialog to choose the kernel.
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, root / "notebooks" / "beside.ipynb")
    open_and_run(page, lab, "beside.ipynb")
    _until(lambda: step(page), 120)

    def move(key: str, value: int) -> None:
        cell(page, "slider").locator(".noUi-handle").focus()
        page.keyboard.press(key)
        _until(lambda: f"it is {value}" in cell(page, "slider").inner_text(), 30)

    view = cell(page, "training")
    for value in range(1, 4):
        move("ArrowRight", value)
        view.get_by_role("button", name="Pause").click()
        paused = paused_step(page)
        view.get_by_role("button", name="Resume").click()
        assert _until(lambda at=paused: (step(page) or 0) > at, 30)
    view.get_by_role("button", name="Stop").click()
    run = runs.Run(root / "live" / "beside-seed0")
    _until(lambda: run.status()["state"] == "stopped", 60)
    assert _until(lambda: f"stopped at step {run.status()['step']} of" in view.inner_text(), 30)
    move("Home", 0)


def test_a_training_is_shown_again_in_another_tab_stopped_and_resumed(page, lab, root):
    live(root)
    open_and_run(page, lab, "live.ipynb")
    view = lambda: cell(page, "training")
    first = _until(lambda: step(page), 120)
    _until(lambda: step(page) > first, 30)
    curves = image_of(page, "training")
    redrawn(page, "training", curves)

    view().get_by_role("button", name="Pause").click()
    paused = paused_step(page)
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    _until(lambda: "widget-view" in (root / "notebooks" / "live.ipynb").read_text("utf-8"), 30)
    page.goto("about:blank")
    page.goto(lab.format("/lab/tree/notebooks/live.ipynb"), timeout=60_000)
    _until(lambda: paused_step(page) == paused, 60, Exception)
    view().get_by_role("button", name="Resume").click()
    _until(lambda: (step(page) or 0) > paused, 30)

    view().get_by_role("button", name="Stop").click()
    run = runs.Run(root / "live" / "baseline-seed0")
    _until(lambda: run.status()["state"] == "stopped", 60)
    stopped = run.status()["step"]
    assert paused < stopped < run.status()["steps"]
    _until(lambda: f"stopped at step {stopped} of" in view().inner_text(), 30)
    rows = training.fit(Recipe.from_yaml(run.file("recipe.yaml")), runs.Run(run.path))
    row = next(rows)
    rows.close()
    assert row["step"] > stopped and row["step"] - stopped <= 10


# A slow connection: each message of the page is sent late, in order.
LATE = """const send = WebSocket.prototype.send;
WebSocket.prototype.send = function (message) { setTimeout(() => send.call(this, message), 1200); };
"""


@pytest.mark.parametrize("late", [False, True])
def test_a_page_that_is_saved_and_reloaded_during_a_training_shows_and_stops_it(
    page, lab, root, late
):
    live(root)
    if late:
        page.add_init_script(LATE)
    open_and_run(page, lab, "live.ipynb")
    stop = lambda: cell(page, "training").get_by_role("button", name="Stop")
    first = _until(lambda: step(page), 120)
    stop().click()
    wait_for_all_cells(page)
    cell(page, "training").locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    _until(lambda: (step(page) or 0) > first, 60)
    for _ in range(3):
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        page.reload()
        shown = _until(lambda: step(page), 60, Exception)
        _until(lambda at=shown: (step(page) or 0) > at, 30)
    stop().click()
    _until(lambda: "stopped at step" in cell(page, "training").inner_text(), 60)
    assert runs.Run(root / "live" / "baseline-seed0").status()["state"] == "stopped"


def test_voila_serves_the_comparison_as_a_page(page, root):
    port = free_port()
    command = ["voila", "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}"]
    command += ["notebooks/05_compare.ipynb"]
    with jupyter_server(root, port, "/voila/static/voila.js", *command):
        page.goto(f"http://127.0.0.1:{port}", timeout=90_000)
        text = lambda: page.locator("body").inner_text()
        _until(lambda: "better is better than plain by" in text(), 60)
        images = page.locator("img.widget-image:visible")
        before = _until(lambda: images.first.get_attribute("src"), 30)
        for name in ("better-seed1", "plain-seed1"):
            row(page, name).click()
        _until(lambda: "one run each on 400 images" in text(), 30)
        _until(lambda: images.first.get_attribute("src") != before, 30)
        page.get_by_label("folder").fill(str(root / "written"))
        page.keyboard.press("Enter")
        _until(lambda: "or this is a page" in text(), 30)
        assert not (root / "written").exists(), "a page of Voila is read-only"
