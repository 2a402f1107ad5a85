"""A recipe: every option of a training run, typed and checked.

    recipe = Recipe.from_yaml("params/resnet50_100e.yaml", data_dir="/data/imagenet", seed=1)

A params file, the parameters cell of a notebook and the command line set the same flat options.
What is not set is off; the default sizes fit the embedded digits, so `Recipe()` trains. Importing
this module imports neither torch nor pandas.
"""

import ast
import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin

from pydantic import ValidationError, ValidationInfo, field_validator

from workbench import ROOT, counted, params_files
from workbench.options import Options
from workbench.overrides import resolve
from workbench.recipe_checks import conflicts, unmet_needs

# Options of earlier versions, and what they are called now: run folders with them still open.
RENAMED = {
    "flip": "hflip",
    "fraction": "train_fraction",
    "decay_all": "decay_norm_and_bias",
    "probe_epochs": "head_only_epochs",
    "mimic": "distill_pairs",
    "mimic_loss": "kd_loss",
    "mimic_weight": "kd_weight",
    "mimic_warmup_epochs": "kd_warmup_epochs",
    "cache_teacher": "cache_teacher_logits",
    "warmup_ratio": "warmup_start_factor",
    "step_epochs": "lr_step_epochs",
    "randaug_form": "randaug_variant",
    "class_balance": "class_balanced_sampling",
    "force_weights": "allow_partial_weights",
    "outside_root": "allow_outside_root",
    "val_every": "eval_every",
}
RENAMED_COLUMNS = {"mimic_loss": "kd_loss", "train_mimic_loss": "train_kd_loss"}
RENAMED_FACTS = {  # of environment.json
    "shrunk": "downscaled",
    "in_both": "train_val_duplicates",
    "passed_over": "skipped_files",
    "without_pictures": "empty_classes",
}
RENAMED_VALUES = {"kl_standardized": "kl_standardized_logits"}


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, one line for each problem."""

    def __init__(self, problems: list[str], source: str = "recipe"):
        self.problems = problems
        super().__init__(
            "\n  - ".join([f"{source}: {counted(len(problems), 'problem')}", *problems])
        )


FIELDS = list(Options.model_fields)


class Recipe(Options):
    """A valid combination of options. Raises RecipeError, never a pydantic error."""

    def __init__(self, /, **values: Any):
        problems = [f"{key}: {_unknown(key)}" for key in values if key not in FIELDS]
        known = {key: value for key, value in values.items() if key in FIELDS}
        bad: dict[str, str] = {}
        try:
            super().__init__(**known)
        except ValidationError as error:
            for item in error.errors():
                key = item["loc"][0]
                bad.setdefault(key, f"{key}: {_sentence(key, values[key], item)}")
            super().__init__(**{key: value for key, value in known.items() if key not in bad})
        problems += [*bad.values(), *conflicts(self, set(bad))]
        if problems:
            raise RecipeError(problems)

    @field_validator("*", mode="before")
    @classmethod
    def _coerce(cls, value: Any, info: ValidationInfo) -> Any:
        return _coerced(value, cls.model_fields[info.field_name].annotation)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Recipe":
        """The recipe in a params file; overrides may be text, as `-p` gives it.

        What depended on a value of the file goes back to its default, or is scaled; see `notes`.
        Raises RecipeError for a file that is missing, is not a flat mapping or has a bad option.
        """
        try:
            return cls._overridden(params_files.read(path, TEXT), overrides)
        except ValueError as error:
            raise RecipeError(getattr(error, "problems", [str(error)]), str(path)) from None

    @classmethod
    def from_namespace(cls, namespace: Mapping[str, Any]) -> "Recipe":
        """The recipe in a notebook's `globals()`, or in any mapping of plain values.

        In a notebook, every name assigned in the cells that begin with `# Parameters` counts (the
        tagged cell, and the one papermill injects), so a misspelt parameter is found; other
        variables are ignored. Injected values are overrides of the tagged cell, as in `from_yaml`.
        """
        cells = [text for text in namespace.get("In") or [] if text.startswith("# Parameters")]
        # Of a cell that was corrected and run again, the last text counts.
        cells = {text.partition("\n")[0]: text for text in cells}
        names = [name for text in cells.values() for name in _assigned(text)]
        if injected := _assigned(cells.pop("# Parameters", "")):
            tagged = {k: v for text in cells.values() for k, v in _assigned(text).items()}
            base = {k: namespace[k] for k in tagged if k in namespace and k not in injected}
            for key in tagged.keys() & injected:  # the namespace has the injected value
                with contextlib.suppress(ValueError):
                    base[key] = ast.literal_eval(tagged[key])
            return cls._overridden(base, {k: namespace[k] for k in injected if k in namespace})
        if not names:
            plain = bool | int | float | str | list | tuple | dict | None
            names = [k for k, v in namespace.items() if k[:1] != "_" and isinstance(v, plain)]
            names += FIELDS
        return cls(**{name: namespace[name] for name in names if name in namespace})

    def replace(self, **changes: Any) -> "Recipe":
        """This recipe with other values, checked again; they are overrides as in `from_yaml`."""
        recipe = self._overridden(self.non_default(), changes)
        recipe.__dict__["_notes"] = (*self.notes, *recipe.notes)
        return recipe

    @classmethod
    def _overridden(cls, base: Mapping[str, Any], overrides: Mapping[str, Any]) -> "Recipe":
        parts, kinds = [], {key: field.annotation for key, field in cls.model_fields.items()}
        for part in (base, overrides):
            known = {k: _coerced(v, kinds[k]) for k, v in part.items() if k in kinds}
            try:
                typed = Options(**known)
            except ValidationError as error:  # reported below; what depends on it is not judged
                bad = {item["loc"][0] for item in error.errors()}
                typed = Options(**(known := {k: v for k, v in known.items() if k not in bad}))
            parts.append({key: getattr(typed, key) for key in known})
        values, notes = resolve(*parts, defaults(), {key: metadata(key)["needs"] for key in FIELDS})
        changed = {key: values[key] for key in parts[0] if key not in overrides}
        recipe = cls(**{**base, **changed, **overrides})
        recipe.__dict__["_notes"] = tuple(notes)  # beside the options: no part of equality
        return recipe

    @property
    def notes(self) -> tuple[str, ...]:
        """What overrides changed beside themselves, a sentence each."""
        return self.__dict__.get("_notes", ())

    def non_default(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        return {k: v for k, v in self.model_dump().items() if v != defaults()[k]}

    def to_yaml(self, path: str | Path) -> None:
        """Writes every option with its description; `from_yaml` gives an equal recipe."""
        head = f"# workbench recipe, fingerprint {self.fingerprint}\n"
        Path(path).write_text(head + self.yaml(FIELDS), encoding="utf-8")

    def yaml(self, keys: Iterable[str]) -> str:
        """These options as lines of a params file, each with its description."""
        fields = type(self).model_fields
        dumped = ((key, params_files.dump(getattr(self, key))) for key in keys)
        return "".join(f"{key}: {text}  # {fields[key].description}\n" for key, text in dumped)

    @classmethod
    def parameters_cell(cls) -> str:
        """The source of the notebooks' parameters cell: every default, one a line."""
        lines = ["# Parameters: every option with its default; papermill overrides them."]
        for key, field in cls.model_fields.items():
            default = json.dumps(field.default) if field.annotation is str else repr(field.default)
            lines.append(f"{key} = {default}  # {field.description}")
        return "\n".join(lines)

    @classmethod
    def write_parameters_cell(cls, path: Path) -> None:
        """Replaces the parameters cell of a notebook that takes a recipe, and collapses it."""
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if "parameters" in cell["metadata"].get("tags", []) and "lr = " in str(cell["source"]):
                cell["source"] = cls.parameters_cell().splitlines(keepends=True)
                cell["metadata"]["jupyter"] = {"source_hidden": True}
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return ROOT / self.runs_dir / f"{self.name}-seed{self.seed}"

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits over every option that can change the trained weights."""
        return fingerprint(self.model_dump())


def metadata(key: str) -> dict[str, Any]:
    """aka, needs and affects of an option."""
    return Recipe.model_fields[key].json_schema_extra


# Options that never change the trained weights: a run may be resumed with other values.
runtime_only = frozenset(key for key in FIELDS if metadata(key)["affects"] == "runtime")
# Options that change what a teacher is shown, beside the images themselves.
input_options = frozenset(key for key in FIELDS if metadata(key)["affects"] == "inputs")
# Options whose values are text: a number that is given for one is text too.
TEXT = frozenset(k for k, f in Recipe.model_fields.items() if f.annotation in (str, list[str]))


def defaults() -> dict[str, Any]:
    """The default of every option."""
    return {key: field.default for key, field in Recipe.model_fields.items()}


def fingerprint(values: Mapping[str, Any]) -> str:
    """Twelve hex digits over the options that can change the trained weights."""
    decisive = {k: values.get(k, v) for k, v in defaults().items() if k not in runtime_only}
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]


def inactive_options(values: Mapping[str, Any]) -> dict[str, str]:
    """Options that have no effect with these values, whatever they are set to, with the reason."""
    recipe = SimpleNamespace(**{**defaults(), **values})
    reasons = {key: unmet_needs(metadata(key)["needs"], recipe) for key in FIELDS}
    return {key: reason for key, reason in reasons.items() if reason}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a run folder of any version, under their present names."""
    new = {RENAMED.get(key, key): value for key, value in values.items()}
    if isinstance(losses := new.get("kd_loss"), list):
        new["kd_loss"] = [RENAMED_VALUES.get(name, name) for name in losses]
    return new


def _assigned(cell: str) -> dict[str, ast.expr | None]:
    """The names that the source of a cell assigns, with the expressions of `name = value`."""
    found: dict[str, ast.expr | None] = {}
    for node in ast.walk(ast.parse(cell)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def _unknown(key: str) -> str:
    """Why there is no such option, and which one may be meant."""
    if key in RENAMED:
        return f"renamed to {RENAMED[key]!r}; `workbench migrate FILE` rewrites a params file"
    names = {other: name for name in FIELDS for other in (name, *metadata(name)["aka"])}
    close = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
    hint = f"the nearest is {names[close[0]]!r}" if close else "`workbench options` lists all"
    return f"no such option; {hint}"


def _coerced(value: Any, annotation: Any) -> Any:
    """YAML 1.1 and the command line give `3e-4`, `true` or `[1, 2]` as text: the value it means."""
    kinds = [*get_args(annotation), annotation]
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in ("none", "null") and type(None) in kinds:
        return None
    if text.startswith({list: "[", dict: "{"}.get(get_origin(annotation), "\0")):
        try:  # items of text options stay as they are written
            value = params_files.parse_flow(value, as_text=annotation == list[str])
        except ValueError:
            return value
    if get_origin(annotation) is dict:
        return _plain(value)
    if get_origin(annotation) is list:
        value = list(value) if isinstance(value, list | tuple) else [value]
        return [_coerced(item, kinds[0]) for item in value]
    if text in ("true", "false") and bool in kinds:
        return text == "true"
    if text and (int in kinds or float in kinds):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and int in kinds and value.is_integer():
        return int(value)
    if annotation is str and type(value) is int:  # papermill's -p makes a number of 20261126
        return str(value)
    return value


def _plain(value: Any) -> Any:
    """A mapping in the order of its keys, with lists for tuples and numbers for their text."""
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+(\.\d*)?[eE][-+]?\d+|inf|nan)", value):
        return float(value)  # YAML 1.1 gives 3e-4 as text
    return value


def _sentence(key: str, given: Any, item: Mapping[str, Any]) -> str:
    """What was given and what is allowed, from one pydantic error."""
    where = "".join(f" at position {at}" for at in item["loc"][1:] if isinstance(at, int))
    text = item["msg"][0].lower() + item["msg"][1:]
    return f"{given!r}{where}: {text} ({Recipe.model_fields[key].description})"
