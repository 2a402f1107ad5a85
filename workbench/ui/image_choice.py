"""The choice of an image in a notebook: of a training list, or a file of the user's."""

import html
import io
from typing import Any, NamedTuple

import ipywidgets
import traitlets

from workbench import data, image_files
from workbench.data import images

# A FileUpload takes no dropped files, and its input is not in the page. Its click() opens the
# dialog of the input; for the length of one click it passes on the files instead.
DROP_SCRIPT = """
if (!window.workbenchDrop) {
  window.workbenchDrop = true;
  const button = event => event.dataTransfer?.types.includes('Files') &&
    event.target.closest?.('.workbench-drop')?.querySelector('.widget-upload');
  const stop = event => { event.preventDefault(); event.stopPropagation(); };
  document.addEventListener('dragover', event => button(event) && stop(event), true);
  document.addEventListener('drop', event => {
    const upload = button(event), click = HTMLInputElement.prototype.click;
    if (!upload) return;
    stop(event);
    HTMLInputElement.prototype.click = function () {
      this.files = event.dataTransfer.files;
      this.dispatchEvent(new Event('change'));
    };
    try { upload.click(); } finally { HTMLInputElement.prototype.click = click; }
  }, true);
}
"""


def accept_drops(box: ipywidgets.Box) -> None:
    """Lets files be dropped anywhere on a box that has a FileUpload in it."""
    script = {"output_type": "display_data", "metadata": {}}
    script["data"] = {"application/javascript": DROP_SCRIPT}
    layout = {"height": "0px", "margin": "0px", "overflow": "hidden"}  # an Output has a padding
    unseen = ipywidgets.Output(outputs=(script,), layout=layout)
    box.add_class("workbench-drop")
    box.children = [*box.children, unseen]


class Choice(NamedTuple):
    """A decoded image, its row in the training list or 0, its name, and an image to mix it with."""

    image: images.Pixels
    row: int
    name: str
    other: images.Pixels


class ImageChoice(ipywidgets.HBox):
    """A slider over a training list, and an upload of a file that stays at its own size.

    `value` is a Choice, decoded once. The image to mix with is the next one of the list. A file
    that cannot be read leaves the value and is named beside the controls.
    """

    value = traitlets.Any()

    def __init__(self, content: data.Dataset):
        self._content = content
        last = len(content.train) - 1
        narrow = {"layout": {"width": "190px", "flex": "none"}}
        narrow["style"] = {"description_width": "initial"}
        self.row = ipywidgets.IntSlider(0, 0, last, description="image", **narrow)
        text = "your own: click or drop"
        self.upload = ipywidgets.FileUpload(
            accept="image/*", description=text, layout={"width": "210px", "flex": "none"}
        )
        self.message = ipywidgets.HTML()
        self.row.observe(self._from_list, names="value")
        self.upload.observe(self._from_file, names="value")
        super().__init__([self.row, self.upload, self.message], layout={"flex_flow": "row wrap"})
        self._from_list()

    def _from_list(self, _: Any = None) -> None:
        row, train = self.row.value, self._content.train
        name = f"{train.file[row]}, class {self._content.classes[train.label[row]]}"
        self._say("")
        self.upload.value = ()
        self.value = Choice(self._listed(row), row, name, self._listed(row + 1))

    def _listed(self, row: int) -> images.Pixels:
        paths = self._content.train.path
        return images.Pixels(images.open(paths[row % len(paths)]).pixels())

    def _from_file(self, _: Any = None) -> None:
        if not self.upload.value:
            return
        name, content = self.upload.value[0].name, bytes(self.upload.value[0].content)
        try:
            read = lambda: image_files.decode(io.BytesIO(content))
            pixels = images.Pixels(image_files.with_reason("", read))
        except images.ImageError as error:
            self._say(f"{name}: {error}")
            return
        self._say("")
        self.value = Choice(pixels, 0, name, self._listed(1))

    def _say(self, text: str) -> None:
        self.message.value = html.escape(text)
        self.message.layout.display = None if text else "none"  # without an empty line
