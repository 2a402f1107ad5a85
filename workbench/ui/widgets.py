"""Widgets of the notebooks. In a saved notebook each is also a static figure or table."""

import asyncio
import base64
import contextlib
import html
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ipywidgets
import pandas as pd
import psutil
import torch
import traitlets
from IPython import get_ipython
from IPython.display import display
from tqdm.auto import tqdm

from workbench import counted, data, evaluation, runs, training
from workbench.progress import watched
from workbench.recipe import Recipe
from workbench.ui import plots
from workbench.ui.figure import Figure

Row = dict[str, Any]  # of training.fit


class View(ipywidgets.VBox):
    """A widget with a static representation for saved notebooks and headless runs."""

    def static_repr(self) -> dict[str, str]:
        """The static representation by MIME type."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **keywords: Any) -> dict[str, Any]:
        if watched() != "jupyter":  # a viewer without the widget's front end would show nothing
            return {"text/plain": type(self).__name__, **self.static_repr()}
        return {**super()._repr_mimebundle_(**keywords), **self.static_repr()}


class Source(View):
    """A widget whose `result` InteractiveViews show; None for the reason in `problem`."""

    result = traitlets.Any(None, allow_none=True)
    problem = traitlets.Unicode()


def png_repr(png: bytes) -> dict[str, str]:
    return {"image/png": base64.b64encode(png).decode()}


class InteractiveView(View):
    """Controls above the figure, table or sentences that `draw` returns for their values.

    `draw` takes the values by name; the `result` of a `source` comes first. The view is updated
    whenever a control or the source changes; the tooltip of a control without a value is shown
    instead. It has no ipywidgets Output, whose messages can block a headless run.
    """

    def __init__(
        self,
        draw: Callable[..., Figure | pd.DataFrame | list[str]],
        source: Source | None = None,
        **controls: ipywidgets.ValueWidget,
    ):
        self._draw, self._source, self._controls = draw, source, controls
        self.image, self.text = ipywidgets.Image(format="png"), ipywidgets.HTML()
        for control in controls.values():
            control.observe(self._update, names="value")
        if source is not None:
            source.observe(self._update, names=["result", "problem"])
        self._update()
        super().__init__([*controls.values(), self.text, self.image])

    def _update(self, _: Any = None) -> None:
        try:
            text, image = self._content()
        except Exception as error:  # a callback of a widget has no cell to raise in
            text, image = _error_html(f"{type(error).__name__}: {error}"), b""
        self.text.value, self.image.value = text, image
        self.image.layout.display = None if image else "none"

    def _content(self) -> tuple[str, bytes]:
        """HTML, and a PNG."""
        results = [self._source.result] if self._source else []
        if None in results:
            return _error_html(self._source.problem), b""
        for control in self._controls.values():
            if control.value is None:
                return control.tooltip, b""
        values = {name: control.value for name, control in self._controls.items()}
        shown = self._draw(*results, **values)
        return ("", shown.png()) if isinstance(shown, Figure) else (_to_html(shown), b"")

    def static_repr(self) -> dict[str, str]:
        return png_repr(self.image.value) if self.image.value else {"text/html": self.text.value}


def _error_html(text: str) -> str:
    return f"<b style='color:#D55E00'>{html.escape(text)}</b>"


def _to_html(shown: pd.DataFrame | list[str]) -> str:
    if isinstance(shown, pd.DataFrame):
        index = not isinstance(shown.index, pd.RangeIndex)
        return shown.to_html(float_format="{:.2f}".format, na_rep="", border=0, index=index)
    items = "".join(f"<li>{html.escape(str(line))}</li>" for line in shown)
    return f"<ul style='line-height: 1.4'>{items}</ul>"


# ---- training


async def train(recipe: Recipe, run: runs.Run, *, dataset: data.Dataset | None = None) -> None:
    """Trains a recipe in a cell: `await widgets.train(recipe, run)`.

    In Jupyter a TrainingView shows the progress; Interrupt does the same as its Stop button.
    Elsewhere Progress prints it. Raises what training.fit raises.
    """
    if watched() == "jupyter":
        view = TrainingView(run)
        await view.show_all(training.fit(recipe, run, dataset=dataset, stop=view.stop))
        return
    progress = Progress(run)
    for row in training.fit(recipe, run, dataset=dataset):
        progress.show(row)
    progress.close()


async def watch(run: runs.Run) -> None:
    """Follows a run that another process trains; the Stop button leaves it a STOP file."""
    view = TrainingView(run, own_process=False)
    await view.show_all(runs.follow(run))


class Progress:
    """Prints a line per epoch and, in a terminal, a bar; in a batch job a line per minute."""

    def __init__(self, run: runs.Run):
        self.run, self.batch, self.printed_at = run, watched() == "batch", 0.0
        self.bar: tqdm | None = None  # before the first row

    def show(self, row: Row) -> None:
        """Takes one row of training.fit."""
        if self.bar is None:
            self._print(_start_text(self.run, row["steps"]))
            done, name = max(0, row["step"] - 1), self.run.path.name
            options = {"initial": done, "unit": "step", "desc": name, "disable": self.batch}
            self.bar = tqdm(total=row["steps"], **options)
        self.bar.update(row["step"] - self.bar.n)
        if row["kind"] == "epoch":
            self._print(_epoch_text(row))
        elif not self.batch:
            self.bar.set_postfix_str(_speed_text(row), refresh=False)
        elif time.monotonic() - self.printed_at > 60:
            self._print(_step_text(row))

    def close(self) -> None:
        """Ends the bar and prints the state of the run."""
        if self.bar is not None:
            self.bar.close()
        nothing_to_do = self.bar is None and self.run.status()["state"] == "finished"
        self._print("nothing to do: " * nothing_to_do + _end_text(self.run))

    def _print(self, text: str) -> None:
        tqdm.write(text)  # above the bar
        sys.stdout.flush()
        self.printed_at = time.monotonic()


class TrainingView(View):
    """A training in progress: a bar, the latest row, curves, a Stop and a Pause button.

    All of it is widget state, which survives closing the tab. The static representation is the
    curves. Of another process (not `own_process`) it can be stopped but not paused.
    """

    def __init__(self, run: runs.Run, *, own_process: bool = True):
        self.run, self.own_process, self.stop = run, own_process, threading.Event()
        self.start = ipywidgets.HTML()
        self.bar = ipywidgets.IntProgress(layout={"width": "400px"})
        self.line = ipywidgets.HTML(html.escape(f"{run.path.name}: reading the data"))
        self.curves = ipywidgets.Image(format="png", width=810)
        self.pausing = ipywidgets.Button(description="Pause", disabled=not own_process)
        tooltip = "stops at the next step with a checkpoint to resume from"
        self.stopping = ipywidgets.Button(description="Stop", tooltip=tooltip)
        self.stopping.on_click(self._stop)
        self.pausing.on_click(self._pause)
        self._draw()
        buttons = ipywidgets.HBox([self.bar, self.pausing, self.stopping])
        super().__init__([self.start, buttons, self.line, self.curves])

    async def show_all(self, rows: Iterable[Row]) -> None:
        """Displays itself and shows the rows, which a thread iterates, until they end."""
        display(self)
        work = asyncio.ensure_future(asyncio.to_thread(self.consume, rows))
        kernel = getattr(get_ipython(), "kernel", None)
        try:
            with _idle_messages(kernel) if kernel else contextlib.nullcontext():
                while not work.done():  # wakes up for a signal that another thread received
                    await asyncio.sleep(0.2)
        except asyncio.CancelledError:  # Interrupt; a second one does not wait for the step
            self._stop()
        await work

    def consume(self, rows: Iterable[Row]) -> None:
        """Shows rows until they end, and waits between them while paused."""
        try:
            for row in rows:
                self.show(row)
                while self.pausing.description == "Resume" and not self._stop_requested():
                    time.sleep(0.05)
        finally:
            self.stopping.disabled = self.pausing.disabled = True
            self._say(_end_text(self.run))
            self._draw()

    def show(self, row: Row) -> None:
        """Takes one row of training.fit."""
        self.bar.max, self.bar.value = row["steps"], row["step"]
        if not self.start.value:
            text = html.escape(_start_text(self.run, row["steps"]))
            self.start.value = text.replace("\n", "<br>")
        if row["kind"] == "step":
            self._say(f"{_step_text(row)}, {_memory()}")
        if row["kind"] == "epoch" or time.monotonic() - self._drawn_at > 5:
            self._draw()

    def _stop_requested(self) -> bool:
        return self.stop.is_set() or self.run.file("STOP").exists()

    def _pause(self, _: Any) -> None:
        paused = self.pausing.description == "Resume"
        self.pausing.description = "Pause" if paused else "Resume"

    def _stop(self, _: Any = None) -> None:
        self.stop.set()
        self.stopping.disabled = True
        self._say("stopping at the next step ...")
        if not self.own_process:
            self.run.file("STOP").touch()

    def _say(self, text: str) -> None:
        self.line.value = html.escape(text)

    def _draw(self) -> None:
        self.curves.value = plots.curves(self.run.steps(), self.run.metrics()).png()
        self._drawn_at = time.monotonic()

    def static_repr(self) -> dict[str, str]:
        return png_repr(self.curves.value)


@contextlib.contextmanager
def _idle_messages(kernel: Any) -> Iterator[None]:
    """Publishes idle for the comm messages that ipykernel handles while an async cell runs.

    ipykernel does not, and the front end sends the next state of a widget only after idle for the
    previous one: a slider would work once. Clicks of a Button are not states.
    """
    handle, cell = kernel.shell_handlers["comm_msg"], kernel.get_parent("shell")

    def handle_and_publish(stream: Any, ident: Any, message: dict[str, Any]) -> None:
        handle(stream, ident, message)
        for state, parent in (("idle", message), ("busy", cell)):  # the cell is still running
            kernel.session.send(kernel.iopub_socket, "status", {"execution_state": state}, parent)

    kernel.shell_handlers["comm_msg"] = handle_and_publish
    try:
        yield
    finally:
        kernel.shell_handlers["comm_msg"] = handle


def _memory() -> str:
    text = f"{psutil.Process().memory_info().rss / 1e9:.1f} GB of memory"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU"
    return text


def _step_text(row: Row) -> str:
    minutes = (row["steps"] - row["step"]) * row["seconds"] / row["step"] / 60
    position = f"epoch {row['epoch']}, step {row['step']} of {row['steps']}"
    return f"{position}: {_speed_text(row)}, about {minutes:.0f} min left"


def _speed_text(row: Row) -> str:
    speed = f"{row['images_per_second']:.0f} img/s, {row['data_wait']:.0%} waiting for data"
    return f"loss {row['loss']:.3f}, {speed}"


def _start_text(run: runs.Run, steps: int) -> str:
    """Lines on the data, the device and the initial weights of a run."""
    e = run.environment()
    if not e:
        return f"{run.path}: {counted(steps, 'step')}"
    images = f"{e['train_images']:,} training and {counted(e['val_images'], 'validation image')}"
    device = f"{e['device']}, {e['precision']}"
    lines = [f"{images}, {len(e['classes'])} classes; {device}; start: {e['start']}"]
    for t in e.get("teachers", []):
        size = f"{t['image_size']} pixels"
        lines.append(f"teacher: {t['source']}, {t['model']}, {size}, weights {t['digest']}")
    lines += [e[key] for key in ("teacher_cache", "skipped_files") if e.get(key)]
    if left_out := len(run.quarantine()):
        lines.append(f"{counted(left_out, 'image')} left out, named in quarantine.csv")
    if shared := e.get("train_val_duplicates"):
        text = counted(shared, "validation image")
        lines.append(f"in training too: {text}; see workbench check-data")
    lines += e.get("trained_on_validation", [])
    if e.get("empty_classes"):
        lines.append(f"classes without a training image: {e['empty_classes'][:8]}")
    return "\n".join(lines)


def _epoch_text(row: Row) -> str:
    text = f"epoch {row['epoch']:3d}  step {row['step']}/{row['steps']}  lr {row['lr']:.4g}  "
    text += f"train loss {row['train_loss']:.4f}"
    if "train_kd_loss" in row:
        text += f" (task {row['train_task_loss']:.4f}, distillation {row['train_kd_loss']:.4f})"
    text += f" top-1 {row['train_top1']:.2f}"
    if row["top1"] is not None:
        text += f"  val loss {row['val_loss']:.4f} top-1 {row['top1']:.2f} (n={row['val_images']})"
    if row.get("ema_top1") is not None:
        text += f"  EMA top-1 {row['ema_top1']:.2f}"
    own = [name for name in evaluation.custom_metrics(row) if row[name] is not None]
    return text + "".join(f"  {name} {row[name]:.4g}" for name in own)


def _end_text(run: runs.Run) -> str:
    status = run.status()
    return status["message"] or f"{run.path} is {status['state']}"
