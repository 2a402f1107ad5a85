"""Widgets of the notebooks. In a saved notebook each is also a static figure or table."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import html
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ipywidgets
import pandas as pd
import traitlets
from IPython import get_ipython
from IPython.display import display
from tqdm.auto import tqdm

from workbench import ROOT, jobs, locks
from workbench.progress import is_voila, watched
from workbench.recipe import Recipe
from workbench.runs import Run, RunError
from workbench.ui import plots, training_text
from workbench.ui.figure import Figure, css_width
from workbench.ui.tables import html_table
from workbench.ui.training_text import Row

if TYPE_CHECKING:  # loads torch, for seconds, which 05 does without
    from workbench import data
    from workbench.ui.run_table import RunTable

# A page that is opened again shows the saved notebook, and JupyterLab saves every two minutes: the
# view of a training that goes on would be gone.
SAVE_NOTEBOOK = """
setTimeout(() => {
  const panel = element.closest('.jp-NotebookPanel');
  panel?.querySelector('[data-jp-item-name="save"] jp-button')?.click();
}, 1000);
"""
STYLES = {"running": "info", "finished": "success", "stopped": "warning"}  # of a bar, by state


class View(ipywidgets.VBox):
    """A widget with a static representation for saved notebooks and headless runs."""

    def static_repr(self) -> dict[str, str]:
        """The static representation by MIME type."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **keywords: Any) -> Any:
        if watched() != "jupyter":  # a viewer without the widget's front end would show nothing
            shown = {"text/plain": type(self).__name__}
        else:
            shown = super()._repr_mimebundle_(**keywords)
        static = self.static_repr()
        images = {k: base64.b64decode(file) for k, file in static.items() if k.startswith("image/")}
        widths = {kind: {"width": css_width(file)} for kind, file in images.items()}
        return (shown | static, widths) if widths else shown | static


class Source(View):
    """A widget whose `result` InteractiveViews show; None for the reason in `problem`."""

    result = traitlets.Any(None, allow_none=True)
    problem = traitlets.Unicode()


def image_repr(file: bytes, format: str = "png") -> dict[str, str]:
    return {f"image/{format}": base64.b64encode(file).decode()}


class InteractiveView(View):
    """Controls above what `draw` returns for their values: a figure, a table or sentences.

    Or a pair: sentences, and a figure or None. `draw` takes the values by name; the `result` of a
    `source` comes first. The view is updated whenever a control or the source changes; the tooltip
    of a control without a value is shown instead. It has no ipywidgets Output, whose messages can
    block a headless run.
    """

    def __init__(
        self,
        draw: Callable[..., Figure | pd.DataFrame | list[str] | tuple[list[str], Figure | None]],
        source: Source | None = None,
        **controls: ipywidgets.ValueWidget,
    ):
        self._draw, self._source, self._controls = draw, source, controls
        self.image, self.text = ipywidgets.Image(format="png"), ipywidgets.HTML()
        for control in controls.values():
            control.observe(self._update, names="value")
        if source is not None:
            source.observe(self._update, names=["result", "problem"])
        _draw_later(self._update) if is_voila() else self._update()
        above = ipywidgets.Box([*controls.values()], layout={"flex_flow": "row wrap"})
        super().__init__([above, self.text, self.image])

    def _update(self, _: Any = None) -> None:
        try:
            text, image = self._content()
        except Exception as error:  # a callback of a widget has no cell to raise in
            text, image = _error_html(f"{type(error).__name__}: {error}"), b""
        self.text.value, self.image.value, self.image.width = text, image, str(css_width(image))
        self.image.layout.display = None if image else "none"

    def _content(self) -> tuple[str, bytes]:
        """HTML, and an image."""
        results = [self._source.result] if self._source else []
        if None in results:
            return _error_html(self._source.problem), b""
        for control in self._controls.values():
            if control.value is None:
                return control.tooltip, b""
        values = {name: control.value for name, control in self._controls.items()}
        shown = self._draw(*results, **values)
        text = ""
        if isinstance(shown, tuple):  # sentences and a figure, of which each may be missing
            sentences, shown = shown
            text = _to_html(sentences) if sentences else ""
            if shown is None:
                return text, b""
        if not isinstance(shown, Figure):
            return _to_html(shown), b""
        self.image.format = shown.format
        return text, shown.file()

    def static_repr(self) -> dict[str, str]:
        if not self.image.value:
            return {"text/html": self.text.value}
        return image_repr(self.image.value, self.image.format)


_waiting: list[Callable[[], None]] = []


def _draw_later(draw: Callable[[], None]) -> None:
    """Draws after the last cell, before which Voila shows nothing, in the order of the calls."""
    if not _waiting:
        InteractiveView.drawing = asyncio.get_running_loop().create_task(_draw_waiting())
    _waiting.append(draw)


async def _draw_waiting() -> None:
    count = 0
    while count < len(_waiting):  # other cells follow
        count = len(_waiting)
        await asyncio.sleep(0.5)
    while _waiting:
        _waiting.pop(0)()
        await asyncio.sleep(0.05)  # for messages of the page


def _error_html(text: str) -> str:
    return f"<b style='color:var(--jp-error-color1, #B74F00)'>{html.escape(text)}</b>"


def _to_html(shown: pd.DataFrame | list[str]) -> str:
    if isinstance(shown, pd.DataFrame):
        return html_table(shown)
    items = "".join(f"<li>{html.escape(str(line))}</li>" for line in shown)
    return f"<ul style='line-height: 1.4'>{items}</ul>" if items else ""


# ---- training


async def train(recipe: Recipe, run: Run, *, dataset: data.Dataset | None = None) -> None:
    """Trains a recipe in a cell: `await widgets.train(recipe, run)`.

    In Jupyter a TrainingView shows the progress; Interrupt does the same as its Stop button.
    Elsewhere Progress prints it. A run that another process or machine is training, or that is
    queued, is followed as by `watch`; otherwise summary.png is written. Raises what training.fit
    raises, and RunError if a followed run fails.
    """
    from workbench import parts, training
    from workbench.ui import summary

    job, before = jobs.of_runs([run.path]).get(run.path), run.status()["state"]
    writer = run.writer() or (job.name if job and job.state in ("queued", "running") else "")
    if writer in ("", locks.this_process()):
        await _show(run, lambda stop: training.fit(recipe, run, dataset=dataset, stop=stop))
        if before != "finished":
            summary.write(run)
        return
    training.check_same_recipe(parts.pin(recipe), run)
    await _show(run, lambda stop: jobs.wait_and_follow(run, stop), writer)
    training.check_same_recipe(parts.pin(recipe), run)  # recipe.yaml was missing or old before
    if run.status()["state"] in ("failed", "interrupted"):
        raise RunError(training_text.end_text(run))


async def watch(run: Run | str) -> None:
    """Follows a run that another process or machine trains: `await widgets.watch("runs/NAME")`.

    A text is a folder relative to the project. Raises RunError if it is no folder. The buttons
    leave it a STOP or PAUSE file; Interrupt ends the following alone. Waits for a run that is
    queued, which Stop cancels.
    """
    run = Run(ROOT / run) if isinstance(run, str) else run
    if not run.path.is_dir():
        raise RunError(f"{run.path} is no run folder; `workbench runs` lists them")
    job = jobs.of_runs([run.path]).get(run.path)
    writer = run.writer() or (job.name if job else "no process")
    await _show(run, lambda stop: jobs.wait_and_follow(run, stop), writer)


async def _show(
    run: Run, rows: Callable[[threading.Event], Iterable[Row]], writer: str = ""
) -> None:
    """Shows the rows that end after an event; `writer` is another process that trains the run."""
    if watched() == "jupyter":
        view = TrainingView(run, writer)
        await view.show_all(rows(view.stop))
        return
    progress = Progress(run)
    for row in rows(threading.Event()):
        progress.show(row)
    progress.close()


def runs(folder: str | Path = "runs") -> RunTable:
    """The run table of a folder, relative to the project; `.selected` is a list of Run."""
    from workbench.ui.run_table import RunTable  # which imports this module

    return RunTable(ROOT / folder)


class Progress:
    """Prints a line per epoch and, in a terminal, a bar; in a batch job a line per minute."""

    def __init__(self, run: Run):
        self.run, self.batch, self.printed_at = run, watched() == "batch", 0.0
        self.bar: tqdm | None = None  # before the first row

    def show(self, row: Row) -> None:
        """Takes one row of training.fit."""
        if self.bar is None:
            self._print(training_text.start_text(self.run, row["steps"]))
            done, name = max(0, row["step"] - 1), self.run.path.name
            options = {"initial": done, "unit": "step", "desc": name, "disable": self.batch}
            self.bar = tqdm(total=row["steps"], **options)
        self.bar.update(row["step"] - self.bar.n)
        if row["kind"] == "epoch":
            self._print(training_text.epoch_text(row))
        elif not self.batch:
            self.bar.set_postfix_str(training_text.speed_text(row), refresh=False)
        elif time.monotonic() - self.printed_at > 60:
            self._print(f"{training_text.step_text(row)}, {training_text.time_text(row)}")

    def close(self) -> None:
        """Ends the bar and prints the state of the run."""
        if self.bar is not None:
            self.bar.close()
        nothing_to_do = self.bar is None and self.run.status()["state"] == "finished"
        self._print("nothing to do: " * nothing_to_do + training_text.end_text(self.run))

    def _print(self, text: str) -> None:
        tqdm.write(text)  # above the bar
        sys.stdout.flush()
        self.printed_at = time.monotonic()


class TrainingView(View):
    """A training in progress: bar, time, latest row, curves, epochs, a Stop and a Pause button.

    All of it is widget state, which survives closing the tab. The static representation is the
    curves. Of a run that another process, `writer`, trains, Stop leaves a STOP file.
    """

    def __init__(self, run: Run, writer: str = ""):
        self.run, self.writer, self.stop = run, writer, threading.Event()
        self._rows: dict[str, Row] = {}  # the last one by kind
        self._lock, self._ended = threading.Lock(), False
        fixed = {"flex": "none"}
        self.start = ipywidgets.HTML()
        self.time = ipywidgets.HTML("waiting for the first step", layout=fixed)
        self.bar = ipywidgets.IntProgress(bar_style="info", layout={"width": "240px"})
        text = "reading the data" if run.locked() or not writer else f"waiting for {writer}"
        self.line = ipywidgets.HTML(html.escape(f"{run.path.name}: {text}"))
        self.curves = ipywidgets.Image(format="png", layout=fixed)
        self.epochs = ipywidgets.HTML(layout=fixed)
        button = functools.partial(ipywidgets.Button, layout={"width": "80px", "flex": "none"})
        tooltip = "waits after the next step, with a checkpoint"
        self.pausing = button(description="Pause", disabled=True, tooltip=tooltip)
        tooltip = "stops at the next step with a checkpoint to resume from"
        self.stopping = button(description="Stop", tooltip=tooltip)
        self.stopping.on_click(self._stop)
        self.pausing.on_click(self._pause)
        self._draw()
        wrap = {"flex_flow": "row wrap"}
        buttons = ipywidgets.HBox([self.bar, self.time, self.pausing, self.stopping], layout=wrap)
        beside = ipywidgets.HBox([self.curves, self.epochs], layout=wrap)
        script = {"output_type": "display_data", "metadata": {}}
        script["data"] = {"application/javascript": SAVE_NOTEBOOK}
        unseen = {"height": "0px", "margin": "0px", "overflow": "hidden"}  # it has a padding
        save = ipywidgets.Output(outputs=(script,), layout=unseen)
        super().__init__([self.start, buttons, self.line, beside, save])

    async def show_all(self, rows: Iterable[Row]) -> None:
        """Displays itself and shows the rows, which a thread iterates, until they end."""
        display(self)
        work = asyncio.ensure_future(asyncio.to_thread(self.consume, rows))
        kernel = getattr(get_ipython(), "kernel", None)
        try:
            with _messages(kernel) if kernel else contextlib.nullcontext():
                while not work.done():  # wakes up for a signal that another thread received
                    await asyncio.sleep(0.2)
                    await asyncio.to_thread(self.refresh)
        except asyncio.CancelledError:  # Interrupt; a second one does not wait for the step
            self.stop.set()
        await work

    def consume(self, rows: Iterable[Row]) -> None:
        """Takes rows until they end."""
        try:
            for row in rows:
                self.show(row)
        finally:
            self.refresh()
            with self._lock:
                self._ended = self.stopping.disabled = self.pausing.disabled = True
                self.bar.bar_style = STYLES.get(self.run.status()["state"], "danger")
                self._say(self._end_text())
                self._draw()

    def show(self, row: Row) -> None:
        """Takes one row of training.fit. Of a followed run there may be thousands at once."""
        self._rows[row["kind"]] = row
        self._new_epoch |= row["kind"] == "epoch"

    def refresh(self) -> None:
        """Shows the last rows, and whether the run is paused, here or by others."""
        with self._lock:
            if self._ended or not self._rows:
                return
            self.pausing.disabled = False  # from here on the training looks for the file
            row = max(self._rows.values(), key=lambda row: row["step"])
            self.bar.max, self.bar.value = row["steps"] or row["step"], row["step"]
            if not self.start.value:
                text = html.escape(self._heading()).replace("\n", "<br>")
                self.start.value = f"<div style='line-height: 1.4'>{text}</div>"
            text = "" if (last := self._rows.get("step")) is None else training_text.step_text(last)
            if last:
                self.time.value = training_text.time_text(last)
                text += "" if self.writer else f", {training_text.memory()}"
            paused = self.run.file("PAUSE").exists()
            self.pausing.description = "Resume" if paused else "Pause"
            if paused:
                message = self.run.status()["message"]
                text = message if message.startswith("paused") else "pausing after the next step"
            if not self.stopping.disabled:
                self._say(text)
            if self._new_epoch or time.monotonic() - self._drawn_at > 5:
                self._draw()

    def _heading(self) -> str:
        text = training_text.start_text(self.run, self.bar.max)
        if self.writer:
            text += (
                f"\ntrained by {self.writer}; Stop and Pause leave files in {self.run.path}, "
                "Interrupt ends this view alone"
            )
        return text

    def _pause(self, _: Any) -> None:
        if (file := self.run.file("PAUSE")).exists():
            file.unlink(missing_ok=True)
        else:
            file.touch()
        self.refresh()

    def _stop(self, _: Any) -> None:
        self.stopping.disabled = True
        self._say("stopping at the next step ...")
        if self.writer:
            self.run.file("STOP").touch()
        else:
            self.stop.set()

    def _end_text(self) -> str:
        status = self.run.status()
        if status["state"] == "running":
            return f"no longer followed; {self.writer} is still training {self.run.path}"
        if status["state"] == "stopped" and not self.writer:
            position = f"step {status['step']} of {status['steps']}"
            return f"stopped at {position}; run the cell again to resume"
        return training_text.end_text(self.run)

    def _say(self, text: str) -> None:
        self.line.value = html.escape(text)

    def _draw(self) -> None:
        self._new_epoch = False
        per_epoch = self.run.environment().get("steps_per_epoch", 0)
        metrics, steps = self.run.metrics(), self.run.steps()
        png = plots.live_curves(steps, metrics, per_epoch).png()
        self.curves.value, self.curves.width = png, str(css_width(png))
        self.epochs.value = training_text.epochs_html(metrics, steps)
        self._drawn_at = time.monotonic()

    def static_repr(self) -> dict[str, str]:
        return image_repr(self.curves.value)


@contextlib.contextmanager
def _messages(kernel: Any) -> Iterator[None]:
    """Answers messages that ipykernel delays until an async cell ends, or does not end with idle.

    A page that was opened again asks for kernel_info, and where it does not get the widgets within
    4 s, for comm_info: the view would be shown after the training. The front end sends the next
    state of a widget only after idle for the previous one: a slider would work once.
    """
    handle, cell = kernel.shell_handlers["comm_msg"], kernel.get_parent("shell")

    def publish_idle(message: dict[str, Any]) -> None:
        for state, parent in (("idle", message), ("busy", cell)):  # the cell is still running
            kernel.session.send(kernel.iopub_socket, "status", {"execution_state": state}, parent)

    def handle_and_publish(stream: Any, ident: Any, message: dict[str, Any]) -> None:
        handle(stream, ident, message)
        publish_idle(message)

    async def answer(parts: list[Any]) -> None:  # in the thread that reads the channel
        ident, signed = kernel.session.feed_identities(parts, copy=False)
        header = kernel.session.deserialize(signed, content=False, copy=False)["header"]
        if header["msg_type"] not in ("kernel_info_request", "comm_info_request"):
            await kernel.shell_channel_thread_main(parts)
            return
        message = kernel.session.deserialize(signed, copy=False)
        await kernel.shell_handlers[header["msg_type"]](kernel.shell_stream, ident, message)
        publish_idle(message)

    def receive(callback: Callable[[list[Any]], Any]) -> None:
        if thread := kernel.shell_channel_thread:
            thread.io_loop.add_callback(kernel.shell_stream.on_recv, callback, copy=False)

    kernel.shell_handlers["comm_msg"] = handle_and_publish
    receive(answer)
    try:
        yield
    finally:
        receive(kernel.shell_channel_thread_main)
        kernel.shell_handlers["comm_msg"] = handle
