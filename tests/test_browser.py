"""Notebooks in a real JupyterLab and a real Chromium: run them, touch their controls, look again.

Needs Chromium (Debian: apt-get install chromium) and Playwright's driver, which pip brings.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import run_folder
from playwright.sync_api import Page, sync_playwright

from workbench import ROOT, runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

SETTINGS = {  # no news, and every cell drawn whether it is in sight or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False,
                                        "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},
}  # fmt: skip
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


@pytest.fixture(scope="module")
def lab(root) -> Iterator[str]:
    """The address of a JupyterLab on loopback, `{}` where a path goes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = root / "home"
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}
    places |= {f"JUPYTER_{kind.upper()}_DIR": kind for kind in ("config", "data", "runtime")}
    environment = {key: str(home / name) for key, name in places.items()}
    environment |= {"IPYTHONDIR": str(home / "ipython"), "WORKBENCH_ROOT": str(root)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=secret"]
    command += [f"--ServerApp.root_dir={root}", "--ServerApp.allow_root=True"]
    command += ["--LabApp.news_url=", "--LabApp.extension_manager=readonly"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += ["--expose-app-in-browser"]
    at = f"http://127.0.0.1:{port}{{}}?token=secret"
    with open(root / "lab.log", "wb") as log:
        server = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
    try:
        _until(lambda: urllib.request.urlopen(at.format("/api/status")), 60, OSError)
        yield at
    finally:
        try:
            ask = urllib.request.Request(at.format("/api/shutdown"), method="POST")
            urllib.request.urlopen(ask).close()
            server.wait(30)
        finally:
            server.kill()
            server.wait()


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
    page.on("request", lambda asked: "//127.0.0.1:" in asked.url or "://" not in asked.url
            or asked.url.startswith(("data:", "blob:")) or problems.append(asked.url))  # fmt: skip
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


def run_all(page: Page, lab: str, name: str, seconds: float = 180) -> None:
    """Opens a notebook and runs it; every code cell has run without an error afterwards."""
    page.goto(lab.format(f"/lab/tree/notebooks/{name}") + "&reset", timeout=60_000)
    page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget",
                           timeout=60_000)  # fmt: skip
    # "Idle" is shown before the kernel is connected, and run-all would do nothing.
    _until(lambda: page.evaluate(CONNECTED), 60, Exception)
    page.evaluate(RUN_ALL)
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


def picture(page: Page, name: str) -> str:
    """Where the picture of a cell's view comes from: another one for every picture."""
    image = cell(page, name).locator("img.widget-image").first
    image.wait_for(state="visible")
    return image.get_attribute("src")


def redrawn(page: Page, name: str, before: str) -> str:
    return _until(lambda: (now := picture(page, name)) != before and now, 30)


def test_the_comparison_follows_what_is_picked_and_what_is_moved(page, lab, root):
    run_all(page, lab, "05_compare.ipynb")
    assert "better is better than plain by" in cell(page, "verdict").inner_text()
    assert "other" in cell(page, "table").inner_text()
    curves, intervals = picture(page, "curves"), picture(page, "intervals")

    handle = cell(page, "curves").locator(".noUi-handle")
    handle.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    curves = redrawn(page, "curves", curves)
    assert picture(page, "intervals") == intervals, "only what was moved is drawn again"
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
    _until(lambda: "one run each on 400 pictures" in verdict.inner_text(), 30)
    assert "other" not in cell(page, "table").inner_text()

    # A run that goes on training is followed without a touch.
    run = runs.Run(root / "runs" / "plain-seed0")
    with run.writing():
        run.set_status("running", step=4)
        _until(lambda: "plain-seed0 is running" in verdict.inner_text(), 30)
        run.set_status("finished")


def test_a_slider_of_the_augmentations_draws_another_picture(page, lab):
    run_all(page, lab, "01_augmentation.ipynb")
    before = picture(page, "magnitude")
    handle = cell(page, "magnitude").locator(".noUi-handle").nth(1)
    handle.focus()
    page.keyboard.press("End")
    stronger = redrawn(page, "magnitude", before)
    page.keyboard.press("Home")
    redrawn(page, "magnitude", stronger)
