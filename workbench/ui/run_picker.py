"""A run table that compares the selected runs."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets

from workbench.evaluation import comparison
from workbench.evaluation.comparison import ComparisonError
from workbench.ui import plots
from workbench.ui.run_table import RunTable

FIRST = ("the first", "")
ONE_RECIPE = "There is one recipe; pick runs of another to compare it with."


class RunPicker(RunTable):
    """A run table whose `result` is the Comparison of the selected runs that are evaluated.

    `recipe` is a control that InteractiveViews can share: the recipe to show against the baseline.
    The marks in the table have the colours of the recipes in figures. A run in training is
    followed.

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
        options = [FIRST, *([(baseline, baseline)] if baseline else [])]
        self.baseline = ipywidgets.Dropdown(options=options, value=baseline, description="baseline")
        kinds = ["raw", "ema"]
        self.weights = ipywidgets.Dropdown(options=kinds, value=weights, description="weights")
        self.recipe = ipywidgets.Dropdown(description="recipe")
        self._updating = False
        super().__init__(folder, names)
        self.children = [*self.children, ipywidgets.HBox([self.baseline, self.weights])]
        usable = self.evaluated()
        if missing := sorted({*names} - {*map(self.key, usable)}):
            missing = ", ".join(missing)
            raise ComparisonError(f"{folder} has no evaluated run {missing}; see workbench runs")
        if not names:
            done = [r for r in usable if unfinished or r.status()["state"] == "finished"]
            pair = comparison.newest_pair(done, baseline)
            self.table.selected = [*map(self.key, pair)]
        self._follow()
        self.table.observe(self._follow_soon, names="selected")
        for control in (self.baseline, self.weights):
            control.observe(self._follow, names="value")

    def _follow(self, _: Any = None) -> None:
        if self._updating:
            return
        evaluated = {run.path for run in self.evaluated()}
        folders = [run.path for run in self.selected if run.path in evaluated]
        weights, baseline = self.weights.value, self.baseline.value
        try:
            result = comparison.compare(folders, weights=weights, baseline=baseline)
        except (ComparisonError, OSError) as error:
            self.problem, self.result, self.table.colours = str(error), None, {}
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
        colours = zip(result.groups, itertools.cycle(plots.COLOURS))
        self.table.colours = {
            self.key(run): colour for group, colour in colours for run in group.runs
        }
        self.result = result
