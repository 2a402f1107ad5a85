"""Notebook 01 in a real Chromium at 1400 x 900: layout, sharpness, controls, a dropped file.

SCREENSHOTS=FOLDER keeps what was seen.
"""

import base64
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page
from test_browser import _until as until
from test_browser import (  # noqa: F401 (fixtures and marks are used by their names)
    browser,
    cell,
    image_of,
    lab,
    open_and_run,
    pytestmark,
    redrawn,
    root,
    wait_for_all_cells,
)

from workbench.recipe import Recipe

SCREENSHOTS = os.environ.get("SCREENSHOTS", "")
WIDTH, HEIGHT = 1400, 900


@pytest.fixture(scope="module", params=[1, 2], ids=lambda scale: f"scale-{scale}")
def page(request, browser, lab) -> Iterator[Page]:  # noqa: F811
    """A page at a device scale in which 01 was run; it fails its last test on an error."""
    size = {"width": WIDTH, "height": HEIGHT}
    page = browser.new_page(viewport=size, device_scale_factor=request.param)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    ours = ("data:", "blob:", "http://127.0.0.1:", "ws://127.0.0.1:")
    page.on("request", lambda sent: sent.url.startswith(ours) or problems.append(sent.url))
    open_and_run(page, lab, "01_augmentation.ipynb")
    wait_for_all_cells(page)
    page.scale = request.param
    yield page
    page.close()
    assert problems == []


def look(page: Page, name: str) -> None:
    """Scrolls to the controls and keeps a screenshot where one is asked for."""
    place = cell(page, "try").locator(".jp-Cell-outputWrapper")
    place.evaluate("element => element.scrollIntoView()")
    page.mouse.move(5, 5)  # no tooltip
    if SCREENSHOTS:
        page.wait_for_timeout(500)
        page.screenshot(path=Path(SCREENSHOTS, f"{name}-{page.scale}.png"))


def button(page: Page, name: str) -> Locator:
    return cell(page, "try").get_by_role("button", name=name, exact=True)


def group(page: Page, title: str) -> None:
    """Opens a group of options."""
    headers = cell(page, "try").locator(".jupyter-widget-Collapse-header")
    header = headers.filter(has_text=title)
    if "jupyter-widget-Collapse-open" not in header.evaluate("e => e.parentElement.className"):
        header.click()


def slider(page: Page, name: str) -> Locator:
    """The first handle of an option's slider."""
    row = cell(page, "try").locator(".widget-hslider").filter(has_text=re.compile(rf"^{name}"))
    return row.locator(".noUi-handle").first


def move(page: Page, name: str, key: str) -> str:
    """Moves a slider and waits for another figure."""
    before = image_of(page, "try")
    slider(page, name).focus()
    page.keyboard.press(key)
    return redrawn(page, "try", before)


def figure(page: Page) -> Image.Image:
    """The pixels of the figure beside the controls."""
    fetched = """async source => {
      const bytes = new Uint8Array(await (await fetch(source)).arrayBuffer());
      return btoa(Array.from(bytes, b => String.fromCharCode(b)).join(''));
    }"""
    content = page.evaluate(fetched, image_of(page, "try"))
    return Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")


GROUPS = ("crop and colour", "RandAugment", "mixing and erasing", "lines of a params file")


def test_controls_and_figure_are_seen_together_whichever_group_is_open(page):
    button(page, "Reset").click()
    for title in GROUPS:
        group(page, title)
        look(page, title.replace(" ", "_"))
        view = cell(page, "try").locator("img.widget-image:visible").first
        parts = [view, button(page, "Train this"), cell(page, "try").locator(".widget-upload")]
        for part in parts:
            box = part.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= WIDTH
            assert box["y"] >= 0 and box["y"] + box["height"] <= HEIGHT, (title, box)
        left, right = parts[1].bounding_box(), parts[0].bounding_box()
        assert left["x"] + left["width"] <= right["x"], "beside each other"


def test_with_every_operation_on_the_figure_is_still_in_the_window(page):
    group(page, "crop and colour")
    for name in ("hflip", "brightness", "contrast"):
        move(page, name, "PageUp")
    group(page, "RandAugment")
    move(page, "randaug_n", "PageUp")
    group(page, "mixing and erasing")
    for name in ("mixup_alpha", "cutmix_alpha", "erase_prob"):
        move(page, name, "End")
    look(page, "everything")
    box = cell(page, "try").locator("img.widget-image:visible").first.bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= HEIGHT - 30  # the status bar
    for view in ("operations", "RandAugment", "model inputs", "samples"):
        before = image_of(page, "try")
        button(page, view).click()
        redrawn(page, "try", before)
        look(page, f"view_{view}".replace(" ", "_"))
    button(page, "Reset").click()


def test_every_image_has_its_own_pixels_for_each_pixel_of_a_sharp_screen(page):
    sizes = """() => [...document.querySelectorAll('.jp-OutputArea img')]
      .filter(image => image.width && image.naturalWidth > 100)
      .map(image => [image.getBoundingClientRect().width, image.naturalWidth])"""
    cell(page, "try")
    found = page.evaluate(sizes)
    assert len(found) >= 7
    assert all(width == pytest.approx(pixels / 2, rel=0.02) for width, pixels in found)


def test_a_slider_moved_twice_changes_the_figure_and_reset_restores_it(page):
    button(page, "Reset").click()
    group(page, "crop and colour")
    plain = figure(page).tobytes()
    move(page, "brightness", "End")
    bright = figure(page).tobytes()
    move(page, "brightness", "PageDown")
    assert plain != bright and figure(page).tobytes() not in (plain, bright)
    before = image_of(page, "try")
    button(page, "Reset").click()
    redrawn(page, "try", before)
    until(lambda: figure(page).tobytes() == plain, 10)


def test_a_number_typed_beside_a_slider_counts_when_the_field_is_left(page):
    button(page, "Reset").click()
    group(page, "crop and colour")
    before = image_of(page, "try")
    readout = slider(page, "brightness").locator("xpath=ancestor::*[contains(@class, 'hslider')]")
    readout.locator(".widget-readout").fill("0.37")
    page.keyboard.press("Tab")
    redrawn(page, "try", before)
    group(page, "lines of a params file")
    assert "brightness: 0.37" in cell(page, "try").locator("textarea").input_value()
    button(page, "Reset").click()


def test_a_greyed_out_slider_gives_its_reason_and_another_option_enables_it(page):
    button(page, "Reset").click()
    group(page, "RandAugment")
    row = cell(page, "try").locator(".widget-hslider").filter(has_text="randaug_m")
    tooltip = row.locator(".widget-label").first.get_attribute("title")
    assert tooltip.startswith("no effect, since randaug_n is 0")
    assert float(row.evaluate("e => getComputedStyle(e).opacity")) < 0.6
    assert "No effect, since randaug_n is 0: randaug_m" in cell(page, "try").inner_text()
    slider(page, "randaug_n").focus()
    page.keyboard.press("PageUp")
    until(lambda: float(row.evaluate("e => getComputedStyle(e).opacity")) == 1, 30)
    button(page, "Reset").click()


DROP = """([name, content]) => {
  const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], name, {type: 'image/png'}));
  const target = document.querySelector('.workbench-drop img.widget-image');
  for (const kind of ['dragenter', 'dragover', 'drop'])
    if (target.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true,
        cancelable: true})) && kind !== 'dragenter') return kind + ' is not accepted';
  return '';
}"""


def test_a_file_dropped_on_the_figure_is_shown_at_its_own_size(page):
    button(page, "Reset").click()
    file = io.BytesIO()
    Image.new("RGB", (700, 350), (20, 60, 200)).save(file, "png")
    content = base64.b64encode(file.getvalue()).decode()
    before = image_of(page, "try")
    assert page.evaluate(DROP, ["mine.png", content]) == ""
    redrawn(page, "try", before)
    look(page, "dropped")
    shown = figure(page)
    blue = shown.getpixel((200, 150))
    assert abs(blue[0] - 20) < 12 and abs(blue[2] - 200) < 12
    colours = [shown.getpixel((x, 150))[2] > 150 for x in range(400)]
    # The original fills the upper left quarter in its own ratio of 2 to 1.
    rows = [shown.getpixel((200, y))[0] < 60 < shown.getpixel((200, y))[2] for y in range(60, 500)]
    assert sum(colours) / sum(rows[:300]) == pytest.approx(2, rel=0.05)

    before = image_of(page, "try")
    assert page.evaluate(DROP, ["notes.png", base64.b64encode(b"text").decode()]) == ""
    until(lambda: "notes.png" in cell(page, "try").inner_text(), 30)
    assert image_of(page, "try") == before


def test_the_edited_recipe_is_saved_and_its_command_shown(page, root):  # noqa: F811
    button(page, "Reset").click()
    group(page, "crop and colour")
    move(page, "hflip", "End")
    path = root / "params" / f"from_browser_{page.scale}.yaml"
    cell(page, "try").get_by_label("file").fill(f"params/{path.name}")
    button(page, "Train this").click()
    until(lambda: f"workbench train params/{path.name}" in cell(page, "try").inner_text(), 30)
    look(page, "saved")
    assert Recipe.from_yaml(path).hflip == 1.0
    move(page, "hflip", "Home")
    button(page, "Save as params file").click()
    button(page, "Overwrite").wait_for()
    assert Recipe.from_yaml(path).hflip == 1.0
    button(page, "Overwrite").click()
    until(lambda: Recipe.from_yaml(path).hflip == 0.0, 30)
