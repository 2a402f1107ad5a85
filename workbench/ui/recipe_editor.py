"""A widget that edits options of a recipe."""

import html
import json
from collections.abc import Sequence
from typing import Any, get_args

import ipywidgets
import numpy as np
from IPython.display import Javascript

from workbench.recipe import Recipe, RecipeError, inactive_options
from workbench.ui.widgets import Source

COPY_SCRIPT = """
const text = TEXT, fallback = () => {
  const area = document.createElement('textarea');
  area.value = text; document.body.appendChild(area); area.select();
  document.execCommand('copy'); area.remove();
};
navigator.clipboard ? navigator.clipboard.writeText(text).catch(fallback) : fallback();
"""
# Ranges of sliders for options without limits, or with limits beyond useful values.
RANGES = {"crop_scale": (0.01, 1.0), "crop_ratio": (0.25, 4.0), "randaug_n": (0, 6)}
RANGES |= {"randaug_std": (0.0, 3.0), "mixup_alpha": (0.0, 2.0), "cutmix_alpha": (0.0, 2.0)}


class RecipeEditor(Source):
    """Controls for options of a recipe; `result` is the edited recipe.

    An option without effect is disabled and left out. The values are shown as lines of a params
    file, with a button that copies them; the static representation is these lines.
    """

    def __init__(self, recipe: Recipe, names: Sequence[str]):
        self._recipe = recipe
        self.controls = {name: _control(name, getattr(recipe, name)) for name in names}
        self._initial = {name: control.value for name, control in self.controls.items()}
        self.yaml = ipywidgets.Textarea(rows=8, layout={"width": "880px"}, disabled=True)
        self.copy = ipywidgets.Button(description="Copy", tooltip="as lines of a params file")
        self.script, self.note = ipywidgets.Output(), ipywidgets.HTML()
        self.copy.on_click(self._copy)
        for control in self.controls.values():
            control.observe(self._update, names="value")
        columns = {"grid_template_columns": "repeat(2, 440px)"}
        controls = ipywidgets.GridBox([*self.controls.values()], layout=columns)
        super().__init__([controls, self.note, self.yaml, self.copy, self.script])
        self._update()

    def _update(self, _: Any = None) -> None:
        values = {name: self._value(name) for name in self.controls}
        unused = inactive_options(self._recipe.model_dump() | values)
        for name, control in self.controls.items():
            control.disabled = name in unused
        values = {name: value for name, value in values.items() if name not in unused}
        others = {k: v for k, v in self._recipe.non_default().items() if k not in self.controls}
        try:
            result = Recipe(**others, **values)
            self.problem, self.yaml.value, self.copy.description = "", result.yaml(values), "Copy"
        except RecipeError as error:
            self.problem, result = "; ".join(error.problems), None
        self.note.value = html.escape(self.problem)
        self.result = result

    def _value(self, name: str) -> Any:
        """The recipe's own value unless the control was moved; sliders are rounded.

        A browser moves a slider to the nearest step by itself, such as 4/3 to 1.33.
        """
        control, initial = self.controls[name], self._initial[name]
        value, step = control.value, getattr(control, "step", 0)
        if value == initial or step and np.allclose(value, initial, rtol=0, atol=0.51 * step):
            return getattr(self._recipe, name)
        if not isinstance(value, float | tuple):
            return value
        rounded = [float(f"{x:.12g}") for x in np.atleast_1d(value)]
        return rounded if isinstance(value, tuple) else rounded[0]

    def _copy(self, _: Any = None) -> None:
        """Runs a script in the browser, the only place with a clipboard."""
        self.script.outputs = ()
        script = COPY_SCRIPT.replace("TEXT", json.dumps(self.yaml.value))
        self.script.append_display_data(Javascript(script))
        self.copy.description = "Copied"

    def static_repr(self) -> dict[str, str]:
        return {"text/html": f"<pre>{html.escape(self.yaml.value or self.problem)}</pre>"}


def _control(name: str, value: Any) -> ipywidgets.ValueWidget:
    """The control for an option's type, with the range of its field or RANGES."""
    field = Recipe.model_fields[name]
    common = {"description": name, "tooltip": field.description, "layout": {"width": "430px"}}
    common |= {"style": {"description_width": "140px"}, "value": value}
    if isinstance(value, bool):
        return ipywidgets.Checkbox(**common)
    if isinstance(value, str):
        return ipywidgets.Dropdown(options=get_args(field.annotation), **common)
    limits = (getattr(m, at) for at in ("ge", "le") for m in field.metadata if hasattr(m, at))
    low, high = RANGES.get(name) or limits
    low, high = min(low, *np.atleast_1d(value)), max(high, *np.atleast_1d(value))
    if isinstance(value, int):
        return ipywidgets.IntSlider(min=int(low), max=int(high), **common)
    slider = ipywidgets.FloatRangeSlider if isinstance(value, list) else ipywidgets.FloatSlider
    return slider(min=low, max=high, step=0.1 if high > 4 else 0.01, **common)
