"""A widget that picks runs of a folder and compares them."""

import asyncio
import contextlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd

from workbench import runs
from workbench.evaluation import comparison
from workbench.evaluation.comparison import ComparisonError
from workbench.progress import watched
from workbench.ui.widgets import Source

FOLLOWED = ("metrics.csv", "predictions.parquet", "status.json")  # files that change in training
FIRST = ("the first", "")
ONE_RECIPE = "There is one recipe; pick runs of another to compare it with."


class RunPicker(Source):
    """A list of the evaluated runs of a folder, newest first; a search word narrows it.

    `result` is the Comparison of the picked runs. `recipe` is a control that InteractiveViews can
    share: the recipe to show against the baseline. In Jupyter the folder is read every two seconds,
    so that a run in training is followed. The static representation is the list.

    Without `names` all seeds of the newest finished recipe and of its baseline are picked, see
    comparison.newest_pair; `unfinished` considers unfinished runs too. Raises ComparisonError for
    an unknown name.
    """

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
        self._stamp, self._updating = self.stamp(), False
        self.search = ipywidgets.Text(description="search", placeholder="part of a name")
        self.runs = ipywidgets.SelectMultiple(
            description="runs", rows=12, layout={"width": "720px"}, tooltip="hold Ctrl for several"
        )
        options = [FIRST, *([(baseline, baseline)] if baseline else [])]
        self.baseline = ipywidgets.Dropdown(options=options, value=baseline, description="baseline")
        kinds = ["raw", "ema"]
        self.weights = ipywidgets.Dropdown(options=kinds, value=weights, description="weights")
        self.recipe = ipywidgets.Dropdown(description="recipe")
        self.note = ipywidgets.HTML()
        super().__init__([self.search, self.runs, self.baseline, self.weights, self.note])
        usable = self.refresh()
        if missing := sorted(set(names) - {run.path.name for run in usable}):
            missing = ", ".join(missing)
            raise ComparisonError(f"{folder} has no evaluated run {missing}; see workbench runs")
        done = [r for r in usable if unfinished or r.status()["state"] == "finished"]
        pair = comparison.newest_pair(done, baseline)
        self.runs.value = tuple(names) or tuple(run.path.name for run in pair)
        self._compare_picked()
        self.search.observe(self.refresh, names="value")
        for control in (self.runs, self.baseline, self.weights):
            control.observe(self._compare_picked, names="value")
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
        hint = "" if usable else "; make demo trains one"
        lines = [f"{len(usable)} evaluated runs in {self.folder}, {len(left_out)} left out{hint}"]
        lines += [f"left out: {name} ({reason})" for name, reason in left_out.items()][:5]
        self.note.value = "<br>".join(map(html.escape, lines))
        return usable

    def _label(self, run: runs.Run) -> str:
        state = run.status()["state"].replace("running", "\u25cf training")
        rows = run.metrics().reindex(columns=["epoch", "top1"])
        top1 = rows.top1.dropna().tail(1)
        text = f"{top1.item():6.2f} %" if len(top1) else "     - %"
        return f"{text}  {run.path.name}  ({state}, epoch {rows.epoch.max():.0f})"

    def _compare_picked(self, _: Any = None) -> None:
        if self._updating:
            return
        newest_first = [name for _, name in self.runs.options if name in self.runs.value]
        folders = [self.folder / name for name in reversed(newest_first)]
        weights, baseline = self.weights.value, self.baseline.value
        try:
            result = comparison.compare(folders, weights=weights, baseline=baseline)
        except (ComparisonError, OSError) as error:
            self.problem, self.result = str(error), None
            return
        names = [group.name for group in result.groups]
        self._updating = True
        self.baseline.options = [FIRST, *zip(names, names, strict=True)]
        self.baseline.value = baseline
        self._updating = False
        shown, others = self.recipe.value, names[1:]
        self.recipe.tooltip = "" if others else ONE_RECIPE
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
                self._compare_picked()

    def static_repr(self) -> dict[str, str]:
        rows = [("\u2713" * (name in self.runs.value), text) for text, name in self.runs.options]
        table = pd.DataFrame(rows, columns=["picked", "run"])
        return {"text/html": table.to_html(index=False, border=0) + self.note.value}
