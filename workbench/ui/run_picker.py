"""A widget that picks runs of a folder and compares them."""

import asyncio
import contextlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
import traitlets

from workbench import runs
from workbench.evaluation import comparison
from workbench.progress import watched
from workbench.ui.widgets import View

FOLLOWED = ("metrics.csv", "predictions.parquet", "status.json")  # files that change in training
FIRST = ("the first", "")


class RunPicker(View):
    """A list of the evaluated runs of a folder, newest first; a search word narrows it.

    `result` is the Comparison of the picked runs, or None with the reason in `problem`;
    InteractiveViews follow it. `recipe` is a control that they can share: the recipe to show
    against the baseline. In Jupyter the folder is read every two seconds, so that a run in training
    is followed. The static representation is the list.

    Without `names` all seeds of the newest finished recipe and of its baseline are picked, see
    comparison.newest_pair; `unfinished` considers unfinished runs too. Raises ComparisonError for
    an unknown name.
    """

    result = traitlets.Any(None, allow_none=True)
    problem = traitlets.Unicode()

    def __init__(
        self,
        folder: str | Path,
        names: Sequence[str] = (),
        *,
        baseline: str = "",
        weights: str = "raw",
        unfinished: bool = False,
    ):
        self.folder = Path(folder)
        self._labels: dict[tuple, str] = {}
        self._stamp, self._updating = self.stamp(), False
        self.search = ipywidgets.Text(description="search", placeholder="part of a name")
        self.runs = ipywidgets.SelectMultiple(
            description="runs", rows=12, layout={"width": "720px"}, tooltip="hold Ctrl for several"
        )
        options = [FIRST, *([(baseline, baseline)] if baseline else [])]
        self.baseline = ipywidgets.Dropdown(options=options, value=baseline, description="baseline")
        self.weights = ipywidgets.Dropdown(
            options=["raw", "ema"], value=weights, description="weights"
        )
        self.recipe = ipywidgets.Dropdown(description="recipe")
        self.note = ipywidgets.HTML()
        super().__init__([self.search, self.runs, self.baseline, self.weights, self.note])
        usable = self.refresh()
        if missing := sorted(set(names) - {run.path.name for run in usable}):
            raise comparison.ComparisonError(
                f"{self.folder} has no evaluated run {', '.join(missing)}; see workbench runs"
            )
        done = [r for r in usable if unfinished or r.status()["state"] == "finished"]
        pair = comparison.newest_pair(done, baseline)
        self.runs.value = tuple(names) or tuple(run.path.name for run in pair)
        self._update_result()
        self.search.observe(self.refresh, names="value")
        for control in (self.runs, self.baseline, self.weights):
            control.observe(self._update_result, names="value")
        if watched() == "jupyter":
            with contextlib.suppress(RuntimeError):  # no event loop, so no front end either
                self._watching = asyncio.get_running_loop().create_task(self._watch())

    def refresh(self, _: Any = None) -> list[runs.Run]:
        """Reads the folder and returns its evaluated runs; picked runs stay picked."""
        usable, left_out = comparison.usable(self.folder)
        word, picked = self.search.value.lower(), self.runs.value
        labels = {run.path.name: self._label(run) for run in usable}
        self._updating = True  # setting the options clears the value
        self.runs.options = [
            (label, name)
            for name, label in labels.items()
            if word in name.lower() or name in picked
        ]
        self.runs.value = tuple(name for name in picked if name in labels)
        self._updating = False
        lines = [f"{len(usable)} evaluated runs in {self.folder}"]
        lines[0] += "" if usable else "; make demo trains one"
        lines += [f"left out: {name} ({reason})" for name, reason in left_out.items()][:5]
        lines += [f"and {len(left_out) - 5} more left out"] if len(left_out) > 5 else []
        self.note.value = "<br>".join(map(html.escape, lines))
        return usable

    def _label(self, run: runs.Run) -> str:
        state, files = run.status()["state"], [run.file(name) for name in FOLLOWED]
        key = (run.path, state, *(f.stat().st_mtime_ns if f.exists() else 0 for f in files))
        if key not in self._labels:
            metrics = run.metrics()
            top1 = metrics.top1.dropna().tolist() if "top1" in metrics else []
            text = f"{top1[-1]:6.2f} %" if top1 else "     - %"
            mark = "\u25cf training" if state == "running" else state
            epoch = int(metrics.epoch.iloc[-1]) if len(metrics) else 0
            self._labels[key] = f"{text}  {run.path.name}  ({mark}, epoch {epoch})"
        return self._labels[key]

    def _update_result(self, _: Any = None) -> None:
        if self._updating:
            return
        newest_first = [name for _, name in self.runs.options if name in self.runs.value]
        folders = [self.folder / name for name in reversed(newest_first)]
        weights, baseline = self.weights.value, self.baseline.value
        try:
            result = comparison.compare(folders, weights=weights, baseline=baseline)
        except (comparison.ComparisonError, OSError) as error:
            self.problem, result = str(error), None
        else:
            first, *others = [group.name for group in result.groups]
            self._updating = True
            self.baseline.options = [FIRST, *((name, name) for name in (first, *others))]
            self.baseline.value = baseline
            self._updating = False
            shown = self.recipe.value
            self.recipe.options = others
            if others:
                self.recipe.value = shown if shown in others else others[-1]
        self.result = result

    def stamp(self) -> tuple:
        """Differs when a run of the folder has a new row, new predictions or a new state."""
        files = [file for name in FOLLOWED for file in sorted(self.folder.glob(f"*/{name}"))]
        with contextlib.suppress(OSError):
            return tuple((str(file), file.stat().st_mtime_ns) for file in files)
        return ()

    async def _watch(self) -> None:
        while self.comm is not None:  # until it is closed
            await asyncio.sleep(2)
            if (stamp := self.stamp()) != self._stamp:
                self._stamp = stamp
                self.refresh()
                self._update_result()

    def static_repr(self) -> dict[str, str]:
        rows = [("\u2713" * (name in self.runs.value), text) for text, name in self.runs.options]
        table = pd.DataFrame(rows, columns=["picked", "run"])
        return {"text/html": table.to_html(index=False, border=0) + self.note.value}
