"""What is alive in a notebook: views that show what a plain function also returns."""

import asyncio
import base64
import contextlib
import html
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import ipywidgets
import numpy as np
import pandas as pd
import psutil
import torch
import traitlets
from IPython import get_ipython
from IPython.display import Javascript, display
from tqdm.auto import tqdm

from workbench import data, runs, training
from workbench.evaluation import comparison
from workbench.progress import watched
from workbench.recipe import Recipe, RecipeError, inactive_options
from workbench.ui import plots


class Progress:
    """Shows the rows of a training as they come: a bar, and a line per epoch.

    Where nobody looks there is no bar, and a flushed line per minute inside a long epoch.
    """

    def __init__(self, run: runs.Run, viewer: str | None = None):
        self.run = run
        self.viewer = viewer or watched()
        self.bar: tqdm | None = None
        self.started = False
        self.said = time.monotonic()

    def show(self, row: dict[str, Any]) -> None:
        """Takes one row of `training.fit` or `runs.follow`."""
        if not self.started:
            self.started = True
            self._say(_start_line(self.run, row))
        if self.viewer != "batch":
            self._move_bar(row)
        now = time.monotonic()
        if row["kind"] == "epoch":
            self._say(_epoch_line(row))
            self.said = now
        elif self.viewer == "batch" and now - self.said > 60:
            self._say(_step_line(row))
            self.said = now

    def close(self) -> None:
        """Ends the bar and says how the run stands."""
        if self.bar is not None:
            self.bar.close()
        status = self.run.status()
        idle = not self.started and status["state"] == "finished"
        before = "nothing to do: " if idle else ""
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


async def train(recipe: Recipe, run: runs.Run, *, dataset: data.Dataset | None = None) -> None:
    """Trains a recipe while the cell waits for it: `await widgets.train(recipe, run)`.

    In Jupyter the loop runs in a thread below a Live view, so that its buttons work; Interrupt does
    what Stop does. Elsewhere it is the plain loop with Progress. Raises what training.fit raises.
    """
    if watched() != "jupyter":
        progress = Progress(run)
        for row in training.fit(recipe, run, dataset=dataset):
            progress.show(row)
        progress.close()
        return
    view = Live(run)
    await view.see(training.fit(recipe, run, dataset=dataset, stop=view.stop))


async def watch(run: runs.Run) -> None:
    """Follows a run that another process trains, in the same view; Stop leaves it a STOP file."""
    view = Live(run, elsewhere=True)
    await view.see(runs.follow(run))


class View(ipywidgets.VBox):
    """A widget that is something else on paper, where nobody runs its front end.

    Its static twin is in the saved notebook beside it, and in its place where nobody watches: a
    reader who cannot draw the widget would show nothing.
    """

    def _static_repr(self) -> dict[str, str]:
        """The static twin, by MIME type."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **keywords: Any) -> dict[str, Any]:
        if watched() != "jupyter":
            return {"text/plain": type(self).__name__, **self._static_repr()}
        return {**super()._repr_mimebundle_(**keywords), **self._static_repr()}


class Live(View):
    """A training as it goes: a bar, the latest row, curves, a Stop and a Pause button.

    All of it is widget state, which survives closing and reopening the tab; saved it is the curves.
    """

    def __init__(self, run: runs.Run, *, elsewhere: bool = False):
        self.run, self.elsewhere, self.stop = run, elsewhere, threading.Event()
        self._drawn = 0.0
        self.start = ipywidgets.HTML()
        self.bar = ipywidgets.IntProgress(layout={"width": "400px"})
        self.line = ipywidgets.HTML(html.escape(f"{run.path.name}: reading the data"))
        self.curves = ipywidgets.Image(
            format="png", value=plots.curves(run.steps(), run.metrics()).png(), width=810
        )
        self.stopping = ipywidgets.Button(
            description="Stop", tooltip="ends it at the next step, with a checkpoint to go on from"
        )
        self.pausing = ipywidgets.Button(
            description="Pause", tooltip="waits before the next row", disabled=elsewhere
        )
        self.stopping.on_click(self._stop)
        self.pausing.on_click(self._pause)
        buttons = ipywidgets.HBox([self.bar, self.pausing, self.stopping])
        super().__init__([self.start, buttons, self.line, self.curves])

    async def see(self, rows: Iterable[dict[str, Any]]) -> None:
        """Shows itself and then the rows, which a thread asks for, until they end."""
        display(self)
        work = asyncio.ensure_future(asyncio.to_thread(self._take, rows))
        kernel = getattr(get_ipython(), "kernel", None)
        try:
            with _answered(kernel) if kernel else contextlib.nullcontext():
                while not work.done():  # awake now and then: a signal may have met another thread
                    await asyncio.sleep(0.2)
        except asyncio.CancelledError:  # Interrupt; a second one does not wait for the step
            self._stop()
        await work

    def _take(self, rows: Iterable[dict[str, Any]]) -> None:
        try:
            for row in rows:
                self.show(row)
                while self.pausing.description == "Resume" and not self._stopped():
                    time.sleep(0.05)
        finally:
            self.stopping.disabled = self.pausing.disabled = True
            status = self.run.status()
            self._say(status["message"] or f"{self.run.path} is {status['state']}")
            self._draw()

    def show(self, row: dict[str, Any]) -> None:
        """Takes one row of `training.fit` or `runs.follow`."""
        if not self.start.value:
            lines = _start_line(self.run, {"steps": self.bar.max, **row}).split("\n")
            self.start.value = "<br>".join(map(html.escape, lines))
        self.bar.max = row.get("steps") or self.run.status()["steps"] or row["step"]
        self.bar.value = row["step"]
        if row["kind"] == "step":
            self._say(
                f"epoch {row['epoch']}, step {row['step']} of {self.bar.max}: loss "
                f"{row['loss']:.3f}, {row['images_per_second']:.0f} img/s, {row['data_wait']:.0%} "
                f"waiting for data, {_memory()}, {_time_left(row, self.bar.max)} left"
            )
        if row["kind"] == "epoch" or time.monotonic() - self._drawn > 5:
            self._draw()

    def _stopped(self) -> bool:
        return self.stop.is_set() or self.run.file("STOP").exists()

    def _pause(self, _: Any) -> None:  # a Button: its clicks need no status, see _answered
        paused = self.pausing.description == "Resume"
        self.pausing.description = "Pause" if paused else "Resume"

    def _stop(self, _: Any = None) -> None:
        self.stop.set()
        self.stopping.disabled = True
        self._say("stopping at the next step ...")
        if self.elsewhere:
            self.run.file("STOP").touch()

    def _say(self, text: str) -> None:
        self.line.value = html.escape(text)

    def _draw(self) -> None:
        self.curves.value = plots.curves(self.run.steps(), self.run.metrics()).png()
        self._drawn = time.monotonic()

    def _static_repr(self) -> dict[str, str]:
        return {"image/png": base64.b64encode(self.curves.value).decode()}


@contextlib.contextmanager
def _answered(kernel: Any) -> Iterator[None]:
    """Publishes idle for the comm messages that ipykernel handles while an async cell runs.

    ipykernel itself does not, and the front end holds back the next state of a widget until it has
    seen idle for the one before: a slider would be heard once. Clicks of a Button are not states.
    """
    handle, cell = kernel.shell_handlers["comm_msg"], kernel.get_parent("shell")

    def answer(stream: Any, ident: Any, message: dict[str, Any]) -> None:
        handle(stream, ident, message)
        for state, parent in (("idle", message), ("busy", cell)):  # the cell is still running
            kernel.session.send(kernel.iopub_socket, "status", {"execution_state": state}, parent)

    kernel.shell_handlers["comm_msg"] = answer
    try:
        yield
    finally:
        kernel.shell_handlers["comm_msg"] = handle


def _memory() -> str:
    text = f"{psutil.Process().memory_info().rss / 1e9:.1f} GB of memory"
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU"
    return text


def _time_left(row: dict[str, Any], steps: int) -> str:
    left = (steps - row["step"]) * row["seconds"] / max(1, row["step"]) / 60
    return f"about {left:.0f} min"


def _start_line(run: runs.Run, row: dict[str, Any]) -> str:
    """What trains on what from where; what was left out; what the validation list shares."""
    e = run.environment()
    if not e:
        return f"{run.path}: {row['steps']} steps"
    line = f"{e['train_images']:,} training and {e['val_images']:,} validation images, "
    line += f"{len(e['classes'])} classes; {e['device']}, {e['precision']}; start: {e['start']}"
    for teacher in e.get("teachers", []):
        line += f"\nteacher: {teacher['source']}, {teacher['model']}, "
        line += f"{teacher['image_size']} pixels, weights {teacher['digest']}"
    if e.get("teacher_cache"):
        line += f"\n{e['teacher_cache']}"
    if left_out := len(run.quarantine()):
        line += f"\n{left_out:,} images left out, named in quarantine.csv"
    if e.get("skipped_files"):
        line += f"\n{e['skipped_files']}"
    if e.get("train_val_duplicates"):
        line += f"\n{e['train_val_duplicates']:,} validation images are in training too; "
        line += "workbench check-data"
    if e.get("empty_classes"):
        line += f"\nclasses without a training image: {e['empty_classes'][:8]}"
    return line


def _epoch_line(row: dict[str, Any]) -> str:
    text = f"epoch {row['epoch']:3d}  step {row['step']}/{row['steps']}  lr {row['lr']:.4g}  "
    text += f"train loss {row['train_loss']:.4f}"
    if "train_kd_loss" in row:
        text += f" (task {row['train_task_loss']:.4f}, mimic {row['train_kd_loss']:.4f})"
    text += f" top-1 {row['train_top1']:.2f}"
    if row["top1"] is not None:
        text += f"  val loss {row['val_loss']:.4f} top-1 {row['top1']:.2f} (n={row['val_images']})"
    if row.get("ema_top1") is not None:
        text += f"  EMA top-1 {row['ema_top1']:.2f}"
    return text


def _step_line(row: dict[str, Any]) -> str:
    return (
        f"step {row['step']}/{row['steps']}  loss {row['loss']:.4f}  "
        f"{row['images_per_second']:.0f} img/s  {_time_left(row, row['steps'])} left"
    )


class InteractiveView(View):
    """Controls above what they choose; on paper (papermill, GitHub) that alone.

    `draw` takes the controls' values by name and returns a plots.Figure, a DataFrame, or sentences.
    With a `source`, a Picker or Options, the first argument is what it found, and the view follows.
    It is one Image or one HTML that is replaced, without ipywidgets' Output, whose messages can
    leave a headless run waiting.
    """

    def __init__(
        self,
        draw: Callable[..., plots.Figure | pd.DataFrame | list[str]],
        source: "RunPicker | RecipeEditor | None" = None,
        **controls: ipywidgets.ValueWidget,
    ):
        self._draw, self._source, self._controls = draw, source, controls
        self._image, self._text = ipywidgets.Image(format="png"), ipywidgets.HTML()
        for control in controls.values():
            control.observe(self._redraw, names="value")
        if source is not None:
            source.observe(self._redraw, names=["found", "problem"])
        self._redraw()
        super().__init__([*controls.values(), self._text, self._image])

    def _redraw(self, _: Any = None) -> None:
        given = {name: control.value for name, control in self._controls.items()}
        if self._source is not None and self._source.found is None:
            self._complain(self._source.problem)
            return
        if None in given.values():
            self._show("There is one recipe; pick runs of another to compare it with.", b"")
            return
        found = () if self._source is None else (self._source.found,)
        try:
            shown = self._draw(*found, **given)
        except Exception as error:  # a widget's callback has nobody else to tell
            self._complain(f"{type(error).__name__}: {error}")
            return
        if isinstance(shown, plots.Figure):
            self._show("", shown.png())
        else:
            self._show(_as_html(shown), b"")

    def _complain(self, text: str) -> None:
        self._show(f"<b style='color:#D55E00'>{html.escape(text)}</b>", b"")

    def _show(self, text: str, image: bytes) -> None:
        self._text.value, self._image.value = text, image
        self._image.layout.display = None if image else "none"

    def _static_repr(self) -> dict[str, str]:
        if self._image.value:
            return {"image/png": base64.b64encode(self._image.value).decode()}
        return {"text/html": self._text.value}


def _as_html(shown: pd.DataFrame | list[str]) -> str:
    """A table, or sentences as a list; both readable in a dark theme."""
    if isinstance(shown, pd.DataFrame):
        numbered = isinstance(shown.index, pd.RangeIndex)
        return shown.to_html(float_format="{:.2f}".format, na_rep="", border=0, index=not numbered)
    items = "".join(f"<li>{html.escape(str(line))}</li>" for line in shown)
    return f"<ul style='line-height: 1.4'>{items}</ul>"


class RecipeEditor(View):
    """Controls for options of a recipe; `found` is the recipe they make, None with `problem`.

    InteractiveViews follow it. An option without effect beside the others is greyed out and left
    out. The chosen values stand below as lines for a params file, with a button that copies them;
    on paper they are all there is.
    """

    found = traitlets.Any(None, allow_none=True)
    problem = traitlets.Unicode()

    def __init__(self, recipe: Recipe, names: Sequence[str]):
        self._recipe = recipe
        self.controls = {name: _control(name, getattr(recipe, name)) for name in names}
        self._given = {name: control.value for name, control in self.controls.items()}
        self.yaml = ipywidgets.Textarea(rows=8, layout={"width": "880px"}, disabled=True)
        self.copy = ipywidgets.Button(description="Copy", tooltip="as lines of a params file")
        self._copied = ipywidgets.Output()
        self.note = ipywidgets.HTML()
        self.copy.on_click(self._copy)
        for control in self.controls.values():
            control.observe(self._judge, names="value")
        columns = ipywidgets.GridBox(
            list(self.controls.values()), layout={"grid_template_columns": "repeat(2, 440px)"}
        )
        super().__init__([columns, self.note, self.yaml, self.copy, self._copied])
        self._judge()

    def _judge(self, _: Any = None) -> None:
        chosen = {
            name: getattr(self._recipe, name) if self._untouched(name) else _value(control)
            for name, control in self.controls.items()
        }
        idle = inactive_options({**self._recipe.model_dump(), **chosen})
        for name, control in self.controls.items():
            control.disabled = name in idle
        kept = {name: value for name, value in chosen.items() if name not in idle}
        rest = {k: v for k, v in self._recipe.non_default().items() if k not in self.controls}
        try:
            found = Recipe(**rest, **kept)
        except RecipeError as error:
            self.problem, found = "; ".join(error.problems), None
        else:
            self.problem, self.yaml.value = "", found.yaml(kept)
            self.copy.description = "Copy"
        self.note.value = html.escape(self.problem)
        self.found = found

    def _untouched(self, name: str) -> bool:
        """Whether a control says what the recipe said: a browser moves 4/3 to the nearest step."""
        control, given = self.controls[name], self._given[name]
        if isinstance(control.value, float | tuple):
            return np.allclose(control.value, given, rtol=0, atol=0.51 * control.step)
        return control.value == given

    def _copy(self, _: Any = None) -> None:
        """In the browser: only there is a clipboard. Older ones copy what is selected."""
        self._copied.outputs = ()
        script = _COPY.replace("TEXT", json.dumps(self.yaml.value))
        self._copied.append_display_data(Javascript(script))
        self.copy.description = "Copied"

    def _static_repr(self) -> dict[str, str]:
        return {"text/html": f"<pre>{html.escape(self.yaml.value or self.problem)}</pre>"}


_COPY = """
const text = TEXT, old = () => {
  const area = document.createElement('textarea');
  area.value = text; document.body.appendChild(area); area.select();
  document.execCommand('copy'); area.remove();
};
navigator.clipboard ? navigator.clipboard.writeText(text).catch(old) : old();
"""

# Where a slider ends that the field leaves open, or beyond what anybody uses.
_REACH = {"crop_scale": (0.01, 1.0), "crop_ratio": (0.25, 4.0), "randaug_n": (0, 6)}
_REACH |= {"randaug_std": (0.0, 3.0), "mixup_alpha": (0.0, 2.0), "cutmix_alpha": (0.0, 2.0)}


def _control(name: str, value: Any) -> ipywidgets.ValueWidget:
    """The control for an option's type, limited to its range; value and type are kept."""
    field = Recipe.model_fields[name]
    how = {"description": name, "tooltip": field.description, "layout": {"width": "430px"}}
    how["style"] = {"description_width": "140px"}
    if isinstance(value, bool):
        return ipywidgets.Checkbox(value, **how)
    if isinstance(value, str):
        return ipywidgets.Dropdown(options=get_args(field.annotation), value=value, **how)
    ends = (getattr(m, at) for at in ("ge", "le") for m in field.metadata if hasattr(m, at))
    low, high = _REACH.get(name) or ends
    if isinstance(value, list):
        low, high = min(low, *value), max(high, *value)
        return ipywidgets.FloatRangeSlider(value=value, min=low, max=high, step=0.01, **how)
    low, high = min(low, value), max(high, value)
    if isinstance(value, int):
        return ipywidgets.IntSlider(value, low, high, **how)
    step = 0.1 if high > 4 else 0.01
    return ipywidgets.FloatSlider(value=value, min=low, max=high, step=step, **how)


def _value(control: ipywidgets.ValueWidget) -> Any:
    """A control's value as an option takes it; sliders count in steps and add their rounding."""
    value = control.value
    if isinstance(value, tuple):
        return [float(f"{x:.12g}") for x in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value


class RunPicker(View):
    """Chooses runs of a folder: newest first, those in training marked, a word narrows the list.

    `found` is what comparison.compare says of the chosen runs, None with `problem` where they
    cannot be compared; Explorers follow it. `recipe`, a control for them to share, is the one that
    is looked at closely, held against the first. In Jupyter the folder is read again every two
    seconds, so that a run in training is followed. On paper it is the table of the runs.

    Without `names` every seed of the newest finished recipe and of its baseline is chosen (see
    comparison.newest_pair); with `unfinished` runs still to go on count as well. Raises
    ComparisonError for a name that is not there.
    """

    found = traitlets.Any(None, allow_none=True)
    problem = traitlets.Unicode()

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str] = (),
        *,
        against: str = "",
        weights: str = "raw",
        unfinished: bool = False,
        viewer: str | None = None,
    ):
        self.folder = Path(folder)
        self._labels: dict[str, tuple[Any, str]] = {}
        self._stamp, self._updating = _stamp(self.folder), False
        self.search = ipywidgets.Text(description="search", placeholder="part of a name")
        self.runs = ipywidgets.SelectMultiple(
            description="runs", rows=12, layout={"width": "720px"}, tooltip="hold Ctrl for several"
        )
        first = [("the first", ""), *([(against, against)] if against else [])]
        self.against = ipywidgets.Dropdown(options=first, value=against, description="against")
        self.weights = ipywidgets.Dropdown(
            options=["raw", "ema"], value=weights, description="weights"
        )
        self.recipe = ipywidgets.Dropdown(description="recipe")
        self.note = ipywidgets.HTML()
        super().__init__([self.search, self.runs, self.against, self.weights, self.note])
        usable = self.refresh()
        if missing := sorted(set(names) - {run.path.name for run in usable}):
            raise comparison.ComparisonError(
                f"{self.folder} has no evaluated run {', '.join(missing)}; see workbench runs"
            )
        done = [r for r in usable if unfinished or r.status()["state"] == "finished"]
        pair = comparison.newest_pair(done, against)
        self.runs.value = tuple(names) or tuple(run.path.name for run in pair)
        self._judge()
        self.search.observe(self.refresh, names="value")
        for control in (self.runs, self.against, self.weights):
            control.observe(self._judge, names="value")
        if (viewer or watched()) == "jupyter":
            with contextlib.suppress(RuntimeError):  # no loop: nobody could press anything either
                self._watching = asyncio.get_running_loop().create_task(self._watch())

    def refresh(self, _: Any = None) -> list[runs.Run]:
        """Reads the folder again and returns its evaluated runs; what is chosen stays chosen."""
        usable, left_out = comparison.usable(self.folder)
        word, chosen = self.search.value.lower(), self.runs.value
        there = {run.path.name: self._label(run) for run in usable}
        self._updating = True  # a new list loses the choice for a moment
        self.runs.options = [
            (label, name) for name, label in there.items() if word in name.lower() or name in chosen
        ]
        self.runs.value = tuple(name for name in chosen if name in there)
        self._updating = False
        texts = [f"{len(usable)} evaluated runs in {self.folder}" + "; make demo trains one" * (
            not usable)]  # fmt: skip
        texts += [f"left out: {name} ({why})" for name, why in list(left_out.items())[:5]]
        texts += [f"and {len(left_out) - 5} more left out"] if len(left_out) > 5 else []
        self.note.value = "<br>".join(map(html.escape, texts))
        return usable

    def _label(self, run: runs.Run) -> str:
        state = run.status()["state"]
        stamp = [run.file(f).exists() and run.file(f).stat().st_mtime_ns for f in _FOLLOWED]
        known = self._labels.get(run.path.name)
        if known is None or known[0] != (state, stamp):
            metrics = run.metrics()
            top1 = metrics.top1.dropna().tolist() if "top1" in metrics else []
            said = f"{top1[-1]:6.2f} %" if top1 else "     - %"
            mark = "\u25cf training" if state == "running" else state
            epoch = int(metrics.epoch.iloc[-1]) if len(metrics) else 0
            label = f"{said}  {run.path.name}  ({mark}, epoch {epoch})"
            known = self._labels[run.path.name] = ((state, stamp), label)
        return known[1]

    def _judge(self, _: Any = None) -> None:
        if self._updating:
            return
        newest_first = [name for _, name in self.runs.options if name in self.runs.value]
        order = [self.folder / name for name in reversed(newest_first)]
        try:
            found = comparison.compare(
                order, weights=self.weights.value, against=self.against.value
            )
        except (comparison.ComparisonError, OSError) as error:
            self.problem, found = str(error), None
        else:
            wanted, names = self.against.value, [group.name for group in found.groups]
            self._updating = True
            self.against.options = [("the first", ""), *((name, name) for name in names)]
            self.against.value = wanted
            self._updating = False
            looked_at = self.recipe.value
            self.recipe.options = [name for name in names if name != found.groups[0].name]
            if self.recipe.options:
                kept = looked_at in self.recipe.options
                self.recipe.value = looked_at if kept else self.recipe.options[-1]
        self.found = found

    async def _watch(self) -> None:
        while self.comm is not None:  # until it is closed
            await asyncio.sleep(2)
            if (stamp := _stamp(self.folder)) != self._stamp:
                self._stamp = stamp
                self.refresh()
                self._judge()

    def _static_repr(self) -> dict[str, str]:
        chosen = self.runs.value
        rows = [("\u2713" * (name in chosen), label) for label, name in self.runs.options]
        table = pd.DataFrame(rows, columns=["picked", "run"])
        return {"text/html": table.to_html(index=False, border=0) + self.note.value}


_FOLLOWED = ("metrics.csv", "predictions.parquet", "status.json")


def _stamp(folder: Path) -> tuple:
    """Changes when a run below the folder has a new row, new predictions or a new state."""
    files = [file for name in _FOLLOWED for file in sorted(folder.glob(f"*/{name}"))]
    with contextlib.suppress(OSError):
        return tuple((str(file), file.stat().st_mtime_ns) for file in files)
    return ()
