"""A widget that edits options of a recipe."""

import html
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import ipywidgets
import numpy as np
from IPython.display import Javascript

from workbench import ROOT
from workbench.recipe import Recipe, RecipeError, inactive_options
from workbench.ui import image_grids
from workbench.ui.widgets import Source, View

COPY_SCRIPT = """
const text = TEXT, fallback = () => {
  const area = document.createElement('textarea');
  area.value = text; document.body.appendChild(area); area.select();
  document.execCommand('copy'); area.remove();
};
navigator.clipboard ? navigator.clipboard.writeText(text).catch(fallback) : fallback();
"""
# A number typed beside a slider would count after Enter alone: ipywidgets waits for an event that
# does not bubble.
TYPED_SCRIPT = """
if (!window.workbenchTyped) {
  window.workbenchTyped = true;
  document.addEventListener('focusout', event => event.target.matches?.('.widget-readout') &&
    event.target.dispatchEvent(new FocusEvent('blur', { bubbles: true })));
}
"""
# Ranges of sliders for options without limits, or with limits beyond useful values.
RANGES = {"crop_scale": (0.01, 1.0), "crop_ratio": (0.25, 4.0), "randaug_n": (0, 6)}
RANGES |= {"randaug_std": (0.0, 3.0), "mixup_alpha": (0.0, 2.0), "cutmix_alpha": (0.0, 2.0)}


# Greyed out by ipywidgets are the handle of a slider and a text, but not its description. Its
# titles of closed groups have a contrast of 4.2 to 4.4. Ranges need more than 72px.
STYLE = """<style>.workbench-inactive { opacity: 0.45; }
.jupyter-widget-Collapse-contents { --jp-widgets-inline-width-tiny: 84px; }
.jupyter-widgets .jupyter-widget-Collapse-header { color: var(--jp-ui-font-color1); }</style>"""
WIDTH = 322  # CSS pixels
PRE = "white-space: pre-wrap; word-break: normal; overflow-wrap: anywhere"  # breaks at spaces
SAVE = "Save as params file"


class RecipeEditor(Source):
    """Controls for options of a recipe in groups; `result` is the edited recipe.

    An option without effect is greyed out, with the reason, and left out. The values are shown as
    lines of a params file, which can be copied or saved; the static representation is these lines.
    """

    def __init__(self, recipe: Recipe, groups: Mapping[str, Sequence[str]]):
        self._recipe, self._resetting = recipe, False
        names = [name for group in groups.values() for name in group]
        self.controls = {name: _control(name, getattr(recipe, name)) for name in names}
        self._initial = {name: control.value for name, control in self.controls.items()}
        self.reasons = {group: ipywidgets.HTML() for group in groups}
        self.groups = groups
        self.yaml = ipywidgets.Textarea(rows=14, layout={"width": "auto"}, disabled=True)
        self.reset = _button("Reset", "the values of the recipe", self._reset)
        self.copy = _button("Copy", "the options as lines of a params file", self._copy)
        self.save = _button(SAVE, "writes the file named here", self._save)
        self.train = _button("Train this", "writes the file, shows the command", self._train)
        path = f"params/{recipe.name}_edited.yaml"
        self.path = ipywidgets.Text(path, description="file", layout={"width": "auto"})
        self.script, self.note, self.message = (
            ipywidgets.Output(),
            ipywidgets.HTML(),
            ipywidgets.HTML(),
        )
        self.script.append_display_data(Javascript(TYPED_SCRIPT))
        for control in [*self.controls.values(), self.path]:
            control.observe(self._update, names="value")
        pages = [
            ipywidgets.VBox([self.reasons[group], *(self.controls[name] for name in names)])
            for group, names in groups.items()
        ]
        titles = [*groups, "lines of a params file"]
        pages = ipywidgets.Accordion([*pages, self.yaml], titles=titles, selected_index=0)
        buttons = [self.reset, self.copy, self.save, self.train]
        grid = ipywidgets.GridBox(buttons, layout={"grid_template_columns": "repeat(2, 1fr)"})
        style = ipywidgets.HTML(STYLE, layout={"display": "none"})
        super().__init__([pages, self.note, self.path, grid, self.message, self.script, style])
        self._update()

    def _update(self, _: Any = None) -> None:
        if self._resetting:
            return
        values = {name: self._value(name) for name in self.controls}
        unused = inactive_options(self._recipe.model_dump() | values)
        self._show_inactive(unused)
        values = {name: value for name, value in values.items() if name not in unused}
        others = {k: v for k, v in self._recipe.non_default().items() if k not in self.controls}
        self.copy.description, self.save.description = "Copy", SAVE
        self.message.value = ""
        try:
            result = Recipe(**others, **values)
            self.problem, self.yaml.value = "", result.yaml(values)
        except RecipeError as error:
            self.problem, result = "; ".join(error.problems), None
        self.note.value = html.escape(self.problem)
        self.save.disabled = self.train.disabled = result is None
        self.result = result

    def _show_inactive(self, reasons: Mapping[str, str]) -> None:
        for name, control in self.controls.items():
            why, control.disabled = reasons.get(name), name in reasons
            help = Recipe.model_fields[name].description
            control.tooltip = f"no effect, since {why}; {help}" if why else help
            (control.add_class if why else control.remove_class)("workbench-inactive")
        for group, names in self.groups.items():
            by_reason: dict[str, list[str]] = {}
            for name in names:
                if name in reasons:
                    by_reason.setdefault(reasons[name], []).append(name)
            lines = [f"No effect, since {why}: {', '.join(of)}" for why, of in by_reason.items()]
            text = "<br>".join(map(html.escape, lines))
            self.reasons[group].value = f"<div style='line-height: 1.3'>{text}</div>" * bool(text)

    def _reset(self, _: Any = None) -> None:
        self._resetting = True  # one update for all
        for name, value in self._initial.items():
            self.controls[name].value = value
        self._resetting = False
        self._update()

    def _save(self, _: Any = None) -> bool:
        """Writes the params file, over another only at the second click; whether it is there."""
        path = self.path.value.strip()
        try:
            if (file := ROOT / path).suffix != ".yaml":
                raise ValueError(f"the file is {path!r}; give a name that ends in .yaml")
            recipe = self.result.replace(name=file.stem)
            text = f"# {self._recipe.name}, edited in 01_augmentation\n"
            text += recipe.yaml(recipe.non_default())
            other = file.exists() and file.read_text(encoding="utf-8") != text
            if other and self.save.description != "Overwrite":
                self.save.description = "Overwrite"
                self.message.value = f"{html.escape(path)} exists; Overwrite replaces it."
                return False
            file.write_text(text, encoding="utf-8")
        except (OSError, ValueError) as error:  # also no name of a run, no UTF-8
            self.message.value = html.escape(f"not written: {error}")
            return False
        self.save.description, self.message.value = SAVE, html.escape(f"{path} is written.")
        return True

    def _train(self, _: Any = None) -> None:
        """Writes the file and shows the commands that train it."""
        if self._save():
            path, one = shlex.quote(self.path.value.strip()), self.result
            commands = f"workbench train {path}\n\npapermill notebooks/02_baseline.ipynb out.ipynb"
            commands = html.escape(f"{commands} -k python3 -f {path}")
            what = f"{one.model} on {one.data_dir or one.dataset} at {one.image_size} pixels"
            what += f", {one.epochs} epochs"
            text = f"<pre style='{PRE}'>{commands}</pre>Either trains {html.escape(what)}"
            text = f"{self.message.value} {text}; the file or -p sets other data."
            self.message.value = f"<div style='line-height: 1.3'>{text}</div>"

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


def _button(text: str, tooltip: str, work: Callable[[Any], Any]) -> ipywidgets.Button:
    button = ipywidgets.Button(description=text, tooltip=tooltip, layout={"width": "auto"})
    button.on_click(work)
    return button


def _control(name: str, value: Any) -> ipywidgets.ValueWidget:
    """The control for an option's type, with the range of its field or RANGES."""
    field = Recipe.model_fields[name]
    common = {"description": name, "tooltip": field.description, "layout": {"width": "auto"}}
    common |= {"style": {"description_width": "112px"}, "value": value}
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


class Beside(View):
    """Views in two columns, the second below the first in a narrow window.

    The static representation has those of all, one below the other.
    """

    def __init__(self, left: Sequence[View], right: Sequence[View]):
        self._views = [*left, *right]
        widths = WIDTH, image_grids.NARROW + 4
        columns = [
            ipywidgets.VBox(views, layout={"width": f"{width}px"})
            for views, width in zip((left, right), widths, strict=True)
        ]
        super().__init__(columns, layout={"flex_flow": "row wrap"})

    def static_repr(self) -> dict[str, str]:
        return {"text/html": "".join(map(_static_html, self._views))}


def _static_html(view: View) -> str:
    [(kind, content)] = view.static_repr().items()
    if kind == "text/html":
        return content
    width = f" width={view.image.width}" if view.image.width else ""
    return f'<img src="data:{kind};base64,{content}"{width}>'
