"""Notebooks in a real Chromium, by JupyterLab and Voila: run them, touch their controls, look.

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
from playwright.sync_api import Page, sync_playwright

from workbench import ROOT, runs, training
from workbench.recipe import Recipe

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.slow,
]

SETTINGS = {  # no news, and every cell drawn whether it is in sight or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False,
                                        "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},
}  # fmt: skip
ICONS = "https://cdn.jsdelivr.net/npm/@fortawesome/"
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update""".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A root of its own: notebooks, params, and made-up runs of three recipes."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copytree(ROOT / "params", root / "params")
    for name, top1, lr in (("plain", 0.7, 0.1), ("other", 0.72, 0.2), ("better", 0.9, 0.3)):
        for seed in range(2):
            run_folder(root / "runs", name, seed, top1=top1, lr=lr)
            time.sleep(0.01)  # so that one is newer than the other
    return root


@contextlib.contextmanager
def is_voila(root: Path, port: int, ready: str, *command: str) -> Iterator[None]:
    """A Jupyter server with a home of its own, on loopback, ended by its process id."""
    home = root / "home"
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    places |= {f"JUPYTER_{kind.upper()}_DIR": kind for kind in ("config", "data", "runtime")}
    environment = {key: str(home / name) for key, name in places.items()}
    environment |= {"IPYTHONDIR": str(home / "ipython"), "WORKBENCH_ROOT": str(root)}
    with open(root / f"{command[0]}.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command], env=os.environ | environment, stdout=log, stderr=log,
            cwd=root,
        )  # fmt: skip
    try:
        _until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}"), 60, OSError)
        yield
    finally:
        server.terminate()  # both servers end their kernels then
        try:
            server.wait(30)
        finally:
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
    with is_voila(root, port, "/api/status?token=secret", *command):
        yield f"http://127.0.0.1:{port}{{}}?token=secret"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    """A page that fails the test when it throws, or reaches for another host."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    ours = ("data:", "blob:", "http://127.0.0.1:", "ws://127.0.0.1:", ICONS)
    page.on("request", lambda asked: asked.url.startswith(ours) or problems.append(asked.url))
    # Voila's template asks for icons there; without them the page is whole.
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
    """Opens a notebook and lets it run all its cells."""
    page.goto(lab.format(f"/lab/tree/notebooks/{name}") + "&reset", timeout=60_000)
    connect(page)
    page.evaluate(RUN_ALL)


def connect(page: Page) -> None:
    page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget",
                           timeout=60_000)  # fmt: skip
    # "Idle" is shown before the kernel is connected, and run-all would do nothing.
    _until(lambda: page.evaluate(CONNECTED), 60, Exception)


def all_done(page: Page, seconds: float = 180) -> None:
    """Waits until every code cell has run, without an error."""
    cells = _until(
        lambda: (now := page.evaluate(CELLS)) and all(c["count"] for c in now) and now
        or [c for c in now if c["errors"]], seconds
    )  # fmt: skip
    assert [c for c in cells if c["errors"]] == []


def cell(page: Page, name: str):
    """The cell of that id, scrolled to."""
    ids = [c["id"] for c in page.evaluate(CELLS)]
    found = page.locator(".jp-CodeCell").nth(ids.index(name))
    found.scroll_into_view_if_needed()
    return found


def noise_image(page: Page, name: str) -> str:
    """Where the image of a cell's view comes from: another one for every image."""
    image = cell(page, name).locator("img.widget-image:visible").first
    image.wait_for(state="visible")
    return image.get_attribute("src")


def redrawn(page: Page, name: str, before: str) -> str:
    return _until(lambda: (now := noise_image(page, name)) != before and now, 30)


def test_the_comparison_follows_what_is_picked_and_what_is_moved(page, lab, root):
    open_and_run(page, lab, "05_compare.ipynb")
    all_done(page)
    assert "better is better than plain by" in cell(page, "verdict").inner_text()
    assert "other" not in cell(page, "table").inner_text(), "neither newest nor its baseline"
    curves, intervals = noise_image(page, "curves"), noise_image(page, "intervals")

    handle = cell(page, "curves").locator(".noUi-handle")
    handle.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    curves = redrawn(page, "curves", curves)
    assert noise_image(page, "intervals") == intervals, "only what was moved is drawn again"
    measure = cell(page, "curves").get_by_label("measure")
    measure.select_option("speed")
    curves = redrawn(page, "curves", curves)

    shown = cell(page, "picker").locator("select[multiple]")
    names = ["better-seed0", "plain-seed0"]
    labels = [text for text in shown.locator("option").all_inner_texts() if any(
        name in text for name in names)]  # fmt: skip
    assert len(labels) == 2
    shown.select_option(label=labels)
    redrawn(page, "curves", curves)
    redrawn(page, "intervals", intervals)
    verdict = cell(page, "verdict")
    _until(lambda: "one run each on 400 images" in verdict.inner_text(), 30)

    # A run that goes on training is followed without a touch.
    run = runs.Run(root / "runs" / "plain-seed0")
    with run.writing():
        run.set_status("running", step=4)
        _until(lambda: "plain-seed0 is running" in verdict.inner_text(), 30)
        run.set_status("finished")


def test_a_knob_of_the_augmentations_draws_another_image_and_its_value_is_copied(page, lab):
    open_and_run(page, lab, "01_augmentation.ipynb")
    all_done(page)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    before = noise_image(page, "try")
    options = cell(page, "try")
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

    # Grey where it would change nothing; its neighbour brings it back.
    magnitude = options.locator(".widget-hslider", has_text="randaug_m").locator(".noUi-target")
    assert magnitude.get_attribute("disabled") is not None
    slider("randaug_n").focus()
    page.keyboard.press("End")
    _until(lambda: magnitude.get_attribute("disabled") is None, 30)
    # United Perception's form moves an image of 32 pixels out of itself.
    _until(lambda: "leaves little or nothing of" in options.inner_text(), 30)
    before = noise_image(page, "try")
    options.get_by_text("what the model eats", exact=True).click()
    redrawn(page, "try", before)


def live(root: Path, **options: object) -> None:
    """The notebook 02 as live.ipynb, changed to train for long and write below live/."""
    notebook = (root / "notebooks" / "02_baseline.ipynb").read_text(encoding="utf-8")
    for name, value in {
        "runs_dir": "live",
        "epochs": 500,
        "workers": 0,
        "log_every": 1,
        **options,
    }.items():
        notebook, count = re.subn(
            rf'(?m)^(    "{name} = ).*?(  #)', lambda found, v=value: (
                found[1] + json.dumps(json.dumps(v))[1:-1] + found[2]), notebook)  # fmt: skip
        assert count == 1
    (root / "notebooks" / "live.ipynb").write_text(notebook, encoding="utf-8")


def step(page: Page) -> int | None:
    """The step that the live view of a training names."""
    text = cell(page, "training").inner_text()
    match = re.search(r"step (\d+) of ([\d,]+): loss .* img/s.* GB of memory", text)
    return int(match[1]) if match else None


def stands_still(page: Page) -> int:
    """The step at which a training waits, once its number did not change for two seconds."""
    return _until(lambda: (at := step(page)) and time.sleep(2) or step(page) == at and at, 30)


def test_a_training_is_paused_three_times_and_stopped_in_one_page(page, lab, root):
    live(root, name="paused")
    open_and_run(page, lab, "live.ipynb")
    _until(lambda: step(page), 120)
    view = cell(page, "training")
    for _ in range(3):
        view.get_by_role("button", name="Pause").click()
        paused = stands_still(page)
        view.get_by_role("button", name="Resume").click()
        assert _until(lambda at=paused: step(page) > at, 30)
    view.get_by_role("button", name="Stop").click()
    run = runs.Run(root / "live" / "paused-seed0")
    _until(lambda: run.status()["state"] == "stopped", 60)
    assert _until(lambda: f"after step {run.status()['step']} of" in view.inner_text(), 30)


def test_a_control_is_followed_at_every_move_while_a_training_runs(page, lab, root):
    code = """
import ipywidgets
from workbench import runs
from workbench.ui import widgets
from workbench.recipe import Recipe
widgets.InteractiveView(lambda value: [f"it is {value}"], value=ipywidgets.IntSlider(0, 0, 9))
""", f"""
recipe = Recipe(epochs=500, workers=0, log_every=1, runs_dir={str(root / "live")!r}, name="beside")
await widgets.train(recipe, runs.Run(recipe.folder))
"""  # fmt: skip
    notebook = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(text, id=name)
        for name, text in zip(("slider", "training"), code, strict=True)
    ])  # fmt: skip
    # Without it JupyterLab asks which kernel to start.
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, root / "notebooks" / "beside.ipynb")
    open_and_run(page, lab, "beside.ipynb")
    _until(lambda: step(page), 120)
    for value in range(1, 5):
        cell(page, "slider").locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        assert _until(lambda v=value: f"it is {v}" in cell(page, "slider").inner_text(), 30)
    cell(page, "training").get_by_role("button", name="Stop").click()
    _until(lambda: runs.Run(root / "live" / "beside-seed0").status()["state"] == "stopped", 60)
    cell(page, "slider").locator(".noUi-handle").focus()
    page.keyboard.press("Home")
    assert _until(lambda: "it is 0" in cell(page, "slider").inner_text(), 30)


def test_a_training_is_seen_again_in_another_tab_stopped_and_goes_on(page, lab, root):
    live(root)
    open_and_run(page, lab, "live.ipynb")
    view = lambda: cell(page, "training")
    first = _until(lambda: step(page), 120)
    _until(lambda: step(page) > first, 30)
    curves = noise_image(page, "training")
    redrawn(page, "training", curves)

    view().get_by_role("button", name="Pause").click()
    paused = stands_still(page)
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    _until(lambda: "widget-view" in (root / "notebooks" / "live.ipynb").read_text("utf-8"), 30)
    page.goto("about:blank")
    page.goto(lab.format("/lab/tree/notebooks/live.ipynb"), timeout=60_000)
    _until(lambda: step(page) == paused, 60, Exception)
    view().get_by_role("button", name="Resume").click()
    _until(lambda: step(page) > paused, 30)

    view().get_by_role("button", name="Stop").click()
    run = runs.Run(root / "live" / "baseline-seed0")
    _until(lambda: run.status()["state"] == "stopped", 60)
    stopped = run.status()["step"]
    assert paused < stopped < run.status()["steps"]
    _until(lambda: f"after step {stopped} of" in view().inner_text(), 30)
    rows = training.fit(Recipe.from_yaml(run.file("recipe.yaml")), runs.Run(run.path))
    row = next(rows)
    rows.close()
    assert row["step"] > stopped and row["step"] - stopped <= 10


def test_voila_serves_the_comparison_as_a_page(page, root):
    port = free_port()
    command = ["voila", "--no-browser", "--Voila.ip=127.0.0.1", f"--port={port}"]
    with is_voila(root, port, "/voila/static/voila.js", *command, "notebooks/05_compare.ipynb"):
        page.goto(f"http://127.0.0.1:{port}", timeout=90_000)
        text = lambda: page.locator("body").inner_text()
        _until(lambda: "better is better than plain by" in text(), 60)
        images = page.locator("img.widget-image:visible")
        before = _until(lambda: images.first.get_attribute("src"), 30)
        shown = page.locator("select[multiple]")
        labels = [t for t in shown.locator("option").all_inner_texts() if "seed0" in t]
        assert len(labels) == 3
        shown.select_option(label=labels)
        _until(lambda: "one run each on 400 images" in text(), 30)
        _until(lambda: images.first.get_attribute("src") != before, 30)
        page.get_by_label("folder").fill(str(root / "written"))
        page.keyboard.press("Enter")
        _until(lambda: "or this is a page" in text(), 30)
        assert not (root / "written").exists(), "who looks at a page does not write"
