"""What is alive in a notebook: views that show what a plain function also returns."""

import base64
import html
import time
from collections.abc import Callable
from typing import Any

import ipywidgets
from IPython.display import display
from tqdm.auto import tqdm

from workbench import plots, runs
from workbench.progress import watched


class Progress:
    """Shows the rows of a training as they come.

    In Jupyter a bar and curves that redraw; in a terminal a bar and a line per epoch; where nobody
    looks a flushed line per epoch, and per minute inside a long one.
    """

    def __init__(self, run: runs.Run, viewer: str | None = None):
        self.run = run
        self.viewer = viewer or watched()
        self.bar: tqdm | None = None
        self.image: Any = None
        self.started = False
        self.drawn = self.said = time.monotonic()

    def show(self, row: dict[str, Any]) -> None:
        """Takes one row of `training.fit` or `runs.follow`."""
        if not self.started:
            self.started = True
            self._say(_start_line(self.run, row))
        if self.viewer != "nobody":
            self._move_bar(row)
        now = time.monotonic()
        if row["kind"] == "epoch" and self.viewer != "jupyter":  # there the curves say it
            self._say(_epoch_line(row))
            self.said = now
        elif self.viewer == "nobody" and now - self.said > 60:
            self._say(_step_line(row))
            self.said = now
        if self.viewer == "jupyter" and (row["kind"] == "epoch" or now - self.drawn > 5):
            self._draw()
            self.drawn = time.monotonic()

    def close(self) -> None:
        """Ends the bar and says how the run stands."""
        if self.bar is not None:
            self.bar.close()
        status = self.run.status()
        before = "" if self.started else "nothing to do: "
        print(before + (status["message"] or f"{self.run.path} is {status['state']}"))

    def _move_bar(self, row: dict[str, Any]) -> None:
        if self.bar is None:
            self.bar = tqdm(total=row.get("steps"), initial=0, unit="step", desc=self.run.path.name)
            self.bar.n = self.bar.initial = max(0, row["step"] - 1)
        self.bar.update(row["step"] - self.bar.n)
        if row["kind"] == "step":
            self.bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {row['images_per_second']:.0f} img/s, "
                f"{row['data_wait']:.0%} waiting for data",
                refresh=False,
            )

    def _say(self, text: str) -> None:
        if self.viewer == "terminal":
            tqdm.write(text)
        else:
            print(text, flush=True)

    def _draw(self) -> None:
        picture = plots.curves(self.run.steps(), self.run.metrics()).png()
        if self.image is None:
            self.image = ipywidgets.Image(value=picture, format="png", layout={"width": "810px"})
            display(self.image)
        else:
            self.image.value = picture


def _start_line(run: runs.Run, row: dict[str, Any]) -> str:
    """What trains on what from where; what was left out; what the validation list shares."""
    e = run.environment()
    if not e:
        return f"{run.path}: {row['steps']} steps"
    line = f"{e['train_images']:,} training and {e['val_images']:,} validation pictures, "
    line += f"{len(e['classes'])} classes; {e['device']}, {e['precision']}; start: {e['start']}"
    for teacher in e.get("teachers", []):
        line += f"\nteacher: {teacher['source']}, {teacher['model']}, "
        line += f"{teacher['image_size']} pixels, weights {teacher['digest']}"
    if e.get("teacher_cache"):
        line += f"\n{e['teacher_cache']}"
    if left_out := len(run.quarantine()):
        line += f"\n{left_out:,} pictures left out, named in quarantine.csv"
    if e.get("in_both"):
        line += f"\n{e['in_both']:,} validation pictures are in training too; workbench check-data"
    if e.get("without_pictures"):
        line += f"\nclasses without a training picture: {e['without_pictures'][:8]}"
    return line


def _epoch_line(row: dict[str, Any]) -> str:
    text = f"epoch {row['epoch']:3d}  step {row['step']}/{row['steps']}  lr {row['lr']:.4g}  "
    text += f"train loss {row['train_loss']:.4f}"
    if "train_mimic_loss" in row:
        text += f" (task {row['train_task_loss']:.4f}, mimic {row['train_mimic_loss']:.4f})"
    text += f" top-1 {row['train_top1']:.2f}"
    if row["top1"] is not None:
        text += f"  val loss {row['val_loss']:.4f} top-1 {row['top1']:.2f} (n={row['val_images']})"
    if row.get("ema_top1") is not None:
        text += f"  EMA top-1 {row['ema_top1']:.2f}"
    return text


def _step_line(row: dict[str, Any]) -> str:
    left = (row["steps"] - row["step"]) * row["seconds"] / max(1, row["step"])
    return (
        f"step {row['step']}/{row['steps']}  loss {row['loss']:.4f}  "
        f"{row['images_per_second']:.0f} img/s  about {left / 60:.0f} min left"
    )


class Explorer(ipywidgets.VBox):
    """Controls above the figure they choose; on paper (papermill, GitHub) the figure alone.

    `draw` takes the controls' values by name and returns a plots.Figure. The figure is one Image
    that is replaced, without ipywidgets' Output, whose messages can leave a headless run waiting.
    """

    def __init__(self, draw: Callable[..., plots.Figure], **controls: ipywidgets.ValueWidget):
        self._draw, self._controls = draw, controls
        self._image = ipywidgets.Image(format="png")
        self._error = ipywidgets.HTML()
        for control in controls.values():
            control.observe(self._redraw, names="value")
        self._redraw()
        super().__init__([*controls.values(), self._error, self._image])

    def _redraw(self, _: Any = None) -> None:
        try:
            figure = self._draw(**{name: c.value for name, c in self._controls.items()})
            self._image.value, self._error.value = figure.png(), ""
        except Exception as error:  # a widget's callback has nobody else to tell
            text = html.escape(f"{type(error).__name__}: {error}")
            self._error.value = f"<b style='color:#D55E00'>{text}</b>"

    def _repr_mimebundle_(self, **keywords: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**keywords)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["image/png"] = base64.b64encode(self._image.value).decode()
        return bundle
