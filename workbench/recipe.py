"""A recipe: every option of a training run, typed and checked.

    recipe = Recipe.from_yaml("params/resnet50_100e.yaml", data_dir="/data/imagenet", seed=1)

A params file, the parameters cell of a notebook and the command line set the same flat options.
What is not set is off; the default sizes fit the embedded digits, so `Recipe()` trains. Importing
this module imports neither torch nor pandas.
"""

import ast
import difflib
import hashlib
import json
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError, ValidationInfo, field_validator

from workbench import ROOT, params_files
from workbench.options import Options
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
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {text}" for text in problems))


FIELDS = list(Options.model_fields)


class Recipe(Options):
    """Options that are valid together. Raises RecipeError, never a pydantic error."""

    def __init__(self, /, **values: Any):
        unknown = [key for key in values if key not in FIELDS]
        problems = [f"{key}: {_unknown(key, n)}" for n, key in enumerate(unknown)]
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

        Raises RecipeError for a file that is missing, is not a flat mapping or has a bad option.
        """
        return cls._named(str(path), {**read_params(path), **overrides})

    @classmethod
    def from_namespace(cls, namespace: Mapping[str, Any]) -> "Recipe":
        """The recipe in a notebook's `globals()`, or in any mapping of plain values.

        In a notebook, every name assigned in the cells that begin with `# Parameters` counts (the
        tagged cell, and the one papermill injects), so a misspelt parameter is found; other
        variables are ignored.
        """
        cells = [text for text in namespace.get("In") or [] if text.startswith("# Parameters")]
        if not cells:
            values = {
                k: v
                for k, v in namespace.items()
                if (not k.startswith("_") and _plain(v))
                or (k in FIELDS and not isinstance(v, types.ModuleType))
            }
            return cls._named("parameters", values)
        # Of a cell that was corrected and run again, the last text counts.
        cells = {text.partition("\n")[0]: text for text in cells}.values()
        names = [name for cell in cells for name in _assigned(cell)]
        return cls._named("parameters", {name: namespace[name] for name in names})

    @classmethod
    def _named(cls, source: str, values: Mapping[str, Any]) -> "Recipe":
        try:
            return cls(**values)
        except RecipeError as error:
            raise RecipeError(error.problems, source) from None

    def replace(self, **changes: Any) -> "Recipe":
        """This recipe with other values, checked again."""
        return Recipe(**{**self.non_default(), **changes})

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
        dumped = ((k, params_files.dump(getattr(self, k))) for k in keys)
        return "".join(f"{k}: {text}  # {fields[k].description}\n" for k, text in dumped)

    @classmethod
    def parameters_cell(cls) -> str:
        """The source of the notebooks' parameters cell: every default, one a line."""
        lines = ["# Parameters: every option with its default; papermill overrides them."]
        for key, field in cls.model_fields.items():
            default = json.dumps(field.default) if field.annotation is str else repr(field.default)
            lines.append(f"{key} = {default}  # {field.description}")
        return "\n".join(lines)

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


def inactive_options(values: Mapping[str, Any]) -> set[str]:
    """Options that have no effect with these values, whatever they are set to."""
    recipe = types.SimpleNamespace(**{**defaults(), **values})
    return {key for key in FIELDS if unmet_needs(metadata(key)["needs"], recipe)}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a run folder of any version, under their present names."""
    new = {RENAMED.get(key, key): value for key, value in values.items()}
    if isinstance(losses := new.get("kd_loss"), list):
        new["kd_loss"] = [RENAMED_VALUES.get(name, name) for name in losses]
    return new


def read_params(path: str | Path) -> dict[str, Any]:
    """The flat mapping of a params file.

    Raises RecipeError naming the line of a syntax error, a repeated key, or what came instead of
    a mapping.
    """
    try:
        return params_files.read(path, TEXT)
    except ValueError as error:
        raise RecipeError([str(error)], str(path)) from None


def _unknown(key: str, number: int) -> str:
    """Why there is no such option, and which one may be meant."""
    if key in RENAMED:
        return f"renamed to {RENAMED[key]!r}; `workbench migrate FILE` rewrites a params file"
    if number >= 20:  # each takes a millisecond
        return "no such option"
    names = {name: name for name in FIELDS}
    names |= {other: name for name in FIELDS for other in metadata(name)["aka"]}
    close = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
    hint = f"the nearest is {names[close[0]]!r}" if close else "`workbench options` lists all"
    return f"no such option; {hint}"


def _coerced(value: Any, annotation: Any) -> Any:
    """YAML 1.1 and the command line give `3e-4`, `true` or `[1, 2]` as text: the value it means."""
    kinds = [*get_args(annotation), annotation]
    text = value.strip().lower() if isinstance(value, str) else None
    if text in ("none", "null") and type(None) in kinds:
        return None
    if get_origin(annotation) is list:
        if text and text.startswith("["):
            try:  # items of text options stay as they are written
                value = params_files.parse_list(value, as_text=annotation == list[str])
            except ValueError:
                return value
        value = list(value) if isinstance(value, list | tuple) else [value]
        return [_coerced(item, kinds[0]) for item in value]
    if text in ("true", "false") and bool in kinds:
        return text == "true"
    if text is not None and (int in kinds or float in kinds):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and int in kinds and value.is_integer():
        return int(value)
    if annotation is str and type(value) is int:  # papermill's -p makes a number of 20261126
        return str(value)
    return value


def _sentence(key: str, given: Any, item: Mapping[str, Any]) -> str:
    """What was given and what is allowed, from one pydantic error."""
    text = item["msg"][0].lower() + item["msg"][1:]
    if item["type"] == "string_type":
        text += "; put it in quotes, or use -r instead of papermill's -p"
    where = (
        f" at position {item['loc'][1]}" if len(item["loc"]) > 1 and item["loc"][1] != key else ""
    )
    return f"{given!r}{where}: {text} ({Recipe.model_fields[key].description})"


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)


def _assigned(source: str) -> list[str]:
    targets = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            targets += [name.id for name in node.targets if isinstance(name, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            targets.append(node.target.id)
    return list(dict.fromkeys(targets))
