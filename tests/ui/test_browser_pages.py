"""All seven notebooks in a real Chromium: widths of images, contrast of text, screenshots.

NOTEBOOK_SCREENSHOTS=FOLDER keeps the screenshots, of runs of ten epochs (`make screenshots`).
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
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
    pytestmark,
    redrawn,
    wait_for_all_cells,
)

from workbench import ROOT, data
from workbench.recipe import Recipe

__all__ = ["browser", "lab", "pytestmark"]  # fixtures of pytest
FOLDER = os.environ.get("NOTEBOOK_SCREENSHOTS", "")
EPOCHS, SHARE = (10, 1.0) if FOLDER else (2, 0.3)
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
AUGMENTED = {  # of ResNet strikes back
    "crop_scale": [0.08, 1.0], "hflip": 0.5, "randaug_n": 2, "randaug_m": 7.0,
    "mixup_alpha": 0.1, "cutmix_alpha": 1.0,
}  # fmt: skip
IMAGES = {name: 7 for name in NOTEBOOKS} | {"06_deploy": 1, "07_custom_parts": 0}  # at least
WIDTH = 1300
MEASURE = Path(__file__).with_name("pages.js").read_text(encoding="utf-8")


def recipe(file: str, runs_dir: str, **options) -> Recipe:
    """A recipe of params/ whose runs are in a folder below the root."""
    options = {"workers": 0, "runs_dir": runs_dir, "train_fraction": SHARE, **options}
    return Recipe.from_yaml(ROOT / "params" / f"{file}.yaml", **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A root folder with runs of three recipes and a teacher, and notebooks that use them."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copytree(ROOT / "params", root / "params")
    for name in ("digits_baseline", "digits_bag_of_tricks", "digits_strikes"):
        for seed in range(2):
            train(recipe(name, str(root / "runs"), seed=seed, epochs=EPOCHS))
    train(recipe("digits_teacher", str(root / "single"), epochs=EPOCHS))
    train(recipe("letters_downstream", str(root / "single"), name="letters_scratch", weights=""))
    teacher, weights = (str(root / run) for run in ("single/digits_teacher-seed0", BASELINE))
    custom = {"runs_dir": "custom", "epochs": EPOCHS, "device": "cpu"}
    single = {
        "02_baseline": recipe("digits_baseline", "single", epochs=EPOCHS),
        "03_distillation": recipe("digits_distillation", "single", teacher=teacher),
        "04_downstream": recipe("letters_downstream", "single", weights=weights),
    }
    options = {name: one.non_default() for name, one in single.items()}
    options |= {"01_augmentation": AUGMENTED, "07_custom_parts": custom}
    options["05_compare"] = {"names": sorted(path.name for path in (root / "runs").iterdir())}
    for name, values in options.items():
        path = root / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        [parameters] = [c for c in notebook.cells if c.id == "parameters"]
        parameters.source += "".join(f"\n{key} = {value!r}" for key, value in values.items())
        nbformat.write(notebook, path)
    return root


BASELINE = "runs/digits_baseline-seed0"
DROP = """files => { const data = new DataTransfer();
for (const [name, bytes] of files)
  data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
return data; }"""


def drop(page: Page, tmp_path: Path) -> None:
    """Drops four handwritten digits on the last cell of 06."""
    before, files = image_of(page, "try"), []
    for row in data.load_dataset(Recipe()).val.iloc[:30:9].itertuples():
        files.append([f"a_{row.label}.png", list(Path(row.path).read_bytes())])
    dropped = page.evaluate_handle(DROP, files)
    cell(page, "try").locator(".widget-upload").dispatch_event("drop", {"dataTransfer": dropped})
    redrawn(page, "try", before)


@pytest.fixture(scope="module", params=NOTEBOOKS)
def opened(request, browser, lab, tmp_path_factory) -> Iterator[Page]:  # noqa: F811
    """A page in which a notebook was run; it fails its last test on an error."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(error.stack))
    open_and_run(page, lab, f"{request.param}.ipynb")
    wait_for_all_cells(page, 300)
    if request.param == "06_deploy":
        drop(page, tmp_path_factory.mktemp("dropped"))
    page.name = request.param
    yield page
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()
    assert problems == []


def theme(page: Page, name: str) -> None:
    """Changes the theme, and waits for its colours."""
    change = "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
    page.evaluate(change, f"JupyterLab {name}")
    dark = "() => getComputedStyle(document.body).getPropertyValue('--jp-layout-color0')"
    until(lambda: page.evaluate(dark).strip() == ("#111" if name == "Dark" else "white"), 30)


@pytest.mark.parametrize("scale", [1, 2])
def test_images_have_two_pixels_for_a_css_pixel_and_no_text_is_cut_off(opened, scale):
    """The page that ran at scale 1 is shown at the other scale."""
    window = {"width": WIDTH, "height": 1000, "deviceScaleFactor": scale, "mobile": False}
    session = opened.context.new_cdp_session(opened)
    session.send("Emulation.setDeviceMetricsOverride", window)
    found = opened.evaluate(MEASURE)
    session.detach()
    assert found["scale"] == scale
    assert len(found["images"]) >= IMAGES[opened.name]
    for image in found["images"]:
        for css, pixels in zip(image["size"], image["pixels"], strict=True):
            assert css == pytest.approx(pixels / 2, rel=0.02), image
        assert image["inside"], image
    assert [text for text in found["texts"] if text["cut"]] == []


READOUTS = """() => [...document.querySelectorAll('.widget-readout')]
  .filter(box => box.clientWidth).map(box => {
    const range = document.createRange();
    range.selectNodeContents(box);
    return [box.textContent, box.clientWidth - range.getBoundingClientRect().width];
  })"""


def test_no_output_scrolls_inside_the_page_beside_the_file_browser(opened):
    """But the run table and a text area. Readouts of sliders keep clear of their boxes."""
    before = opened.viewport_size
    opened.set_viewport_size({"width": 1400, "height": 900})
    opened.wait_for_timeout(500)
    assert opened.locator(".jp-FileBrowser").is_visible()
    scrolls = opened.evaluate(MEASURE)["scrolls"]
    readouts = opened.evaluate(READOUTS)
    opened.set_viewport_size(before)
    assert scrolls == []
    assert [readout for readout in readouts if readout[1] < 8] == []
    if opened.name == "01_augmentation":
        assert [text for text, _ in readouts if " – " in text], "of ranges"


@pytest.mark.parametrize("name", ["Light", "Dark"])
def test_text_has_a_contrast_of_at_least_4_5(opened, name):
    """WCAG 2.2, 1.4.3, which excepts disabled controls, here but a textarea that is to be read."""
    theme(opened, name)
    opened.wait_for_timeout(300)  # transitions of colours
    texts = opened.evaluate(MEASURE)["texts"]
    assert len(texts) > 10
    for header in opened.locator(".jupyter-widget-Collapse-header").all():
        header.click()  # of all groups, one after the other
        texts += opened.evaluate(MEASURE)["texts"]
    if opened.name == "05_compare":
        every = cell(opened, "picker").get_by_label("select all shown")
        every.click()  # without runs: the reason instead of results
        until(lambda: "points" not in cell(opened, "verdict").inner_text(), 30)
        texts += opened.evaluate(MEASURE)["texts"]
        every.click()
        until(lambda: "points" in cell(opened, "verdict").inner_text(), 30)
    assert [text for text in texts if text["ratio"] < 4.5 and not text["off"]] == []


SHOWN = {  # cells of a screenshot
    "01_augmentation": "figures-prose try",
    "02_baseline": "result-prose result curves mistakes-prose confusion",
    "03_distillation": "result-prose result both-curves gains-prose gains",
    "04_downstream": "rivals-prose rivals result-prose result per-class",
    "05_compare": "picker-prose picker verdict table intervals",
    "06_deploy": "run-prose run try-prose try",
    "07_custom_parts": "loss-prose loss compare-prose compare metrics",
}
ARRANGE = """([ids, code]) => {
  const { content } = window.jupyterapp.shell.currentWidget;
  for (const cell of content.widgets) {
    cell.node.style.display = ids.includes(cell.model.id) ? '' : 'none';
    const input = cell.model.type === 'code' && cell.node.querySelector('.jp-Cell-inputWrapper');
    if (input && !code) input.style.display = 'none';
  }
  const shown = content.widgets.filter(cell => ids.includes(cell.model.id));
  shown[0].node.scrollIntoView();
  document.activeElement.blur();
  const edges = [shown[0], shown.at(-1)].map(cell => cell.node.getBoundingClientRect());
  return edges[1].bottom - edges[0].top;
}"""


def test_a_screenshot_shows_the_main_result(opened, tmp_path):
    theme(opened, "Light")
    toggle = "() => { window.jupyterapp.commands.execute('application:toggle-left-area'); }"
    opened.evaluate(toggle)
    if opened.name == "01_augmentation":
        opened.locator(".jupyter-widget-Collapse-header", has_text="RandAugment").click()
    arranged = [SHOWN[opened.name].split(), opened.name == "07_custom_parts"]
    for _ in range(3):  # JupyterLab lays the page out again after a change of theme or size
        opened.wait_for_timeout(700)
        height = round(opened.evaluate(ARRANGE, arranged)) + 150
        opened.set_viewport_size({"width": WIDTH, "height": height})
    opened.mouse.move(5, 5)  # no tooltip
    opened.wait_for_timeout(700)
    opened.screenshot(path=tmp_path / "page.png")
    image = Image.open(tmp_path / "page.png").convert("RGB")
    suffix = "jpg" if opened.name == "01_augmentation" else "png"  # photographs
    file = Path(FOLDER or tmp_path, f"{opened.name}.{suffix}")
    (image if suffix == "jpg" else image.quantize(128)).save(file, optimize=True)
    assert file.stat().st_size < 300_000
    shades = np.asarray(image.convert("L"))
    assert shades.shape == (height, WIDTH) and height > 500
    assert len(np.unique(shades[100:-50])) > 50, "more than empty cells"


PAGE = """
<body style="margin: 0; background: white"><div class="jp-Cell-outputArea">
<div class="jp-OutputArea-child"><div class="jp-OutputArea-output" style="width: 300px">
<p style="color: #767676">one</p><p style="color: #777">two</p>
<div style="opacity: 0.5"><p style="color: black">three</p></div>
<div style="background: black"><p style="color: rgb(255 255 255 / 50%)">four</p></div>
<button disabled style="color: #aaa">five</button>
<p style="overflow: hidden; white-space: nowrap">CUT</p><input placeholder="CUT" size="5">
<div style="overflow: auto; height: 1em" class="long"><div style="height: 2em"></div></div>
<div style="overflow: auto; height: 1em"><div style="height: 1em"></div></div>
</div></div></div><script>
const widgets = [{ model: { id: "x" }, node: document.body }];
window.jupyterapp = { shell: { currentWidget: { content: { widgets } } } };
</script>"""


def test_the_measurement_agrees_with_published_contrasts_and_finds_cut_text_and_scrolling(browser):  # noqa: F811
    """#767676 on white has 4.54, #777 has 4.48; black at one half is #808080, with 3.95."""
    page = browser.new_page()
    page.set_content(PAGE.replace("CUT", 30 * "long "))
    found = page.evaluate(MEASURE)
    page.close()
    texts = found["texts"]
    assert [element["class"] for element in found["scrolls"]] == ["long"]
    assert [text["cut"] for text in texts] == [False] * 5 + [True] * 2
    ratios = [text["ratio"] for text in texts[:4]]
    assert ratios == pytest.approx([4.54, 4.48, 3.95, 5.32], rel=0.01)  # not rounded to 8 bits
    assert [text["off"] for text in texts[:5]] == [False] * 4 + [True]
