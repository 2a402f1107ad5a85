"""Sweeps: a recipe with several values of some options, every combination a run.

A sweep is a folder with sweep.yaml (axes and base recipe) and an ordinary run folder for each
combination, named after what varies. The same call skips finished runs and resumes the others.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from workbench import ROOT, data, params_files, runs, training
from workbench.evaluation import comparison
from workbench.recipe import FIELDS, Recipe, RecipeError, runtime_only


def sweep(recipe: Recipe, axes: Mapping[str, Iterable]) -> Iterator[dict[str, Any]]:
    """Trains every combination of the values of `axes` and yields a row as each run ends.

    Rows: run (name of the folder), the options of `axes`, state, top1 (percent, None if it failed),
    message. A run that fails does not end the sweep. The runs share this process and, where the
    options of the data are equal, the data set. One option beside the seed gives top1.png too.

    Ctrl-C stops with a checkpoint: the last row is "stopped". Raises RecipeError before the first
    run, with all combinations that are refused, and RunError for a folder with another sweep.
    """
    recipes, folder = combinations(recipe, axes), folder_of(recipe, axes)
    values = {key: [getattr(one, key) for one in recipes] for key in axes}
    values = {k: [v for i, v in enumerate(vs) if v not in vs[:i]] for k, vs in values.items()}
    _write_sweep_file(folder, recipe, values)
    datasets = {}  # the last one
    for one in recipes:
        row = _train(one, datasets)
        yield {"run": one.folder.name, **{key: getattr(one, key) for key in axes}, **row}
        if row["state"] == "stopped":
            return
    _write_figure(folder)


def _train(recipe: Recipe, datasets: dict[str, data.Dataset]) -> dict[str, Any]:
    run = runs.Run(recipe.folder)
    row = {"state": "failed", "top1": None}
    # Options of the data stand before those of the model.
    key = json.dumps([getattr(recipe, option) for option in FIELDS[: FIELDS.index("model")]])
    try:
        if key not in datasets:
            datasets.clear()
            datasets[key] = data.load_dataset(recipe)
        for _ in training.fit(recipe, run, dataset=datasets[key]):
            pass
    except KeyboardInterrupt:
        return row | {"state": "stopped", "message": "stopped by Ctrl-C"}
    except (ValueError, RuntimeError, OSError) as error:
        return row | {"message": f"{type(error).__name__}: {error}"}
    top1 = [None, *run.metrics().reindex(columns=["top1"]).top1.dropna()][-1]
    return {"top1": top1} | {key: run.status()[key] for key in ("state", "message")}


def combinations(recipe: Recipe, axes: Mapping[str, Iterable]) -> list[Recipe]:
    """The recipes of a sweep; values are overrides. RecipeError names every refused combination."""
    found = {}
    refused = {f"{key}: does not change the weights": [] for key in runtime_only & {*axes}}
    for chosen in itertools.product(*axes.values()):
        overrides = dict(zip(axes, chosen, strict=True))
        try:
            one = recipe.replace(**overrides)
            words = [f"{key}={getattr(one, key)}" for key in axes if key != "seed"]
            name = re.sub(r"[^\w.,+=-]+", "-", "_".join(words))[:200] or recipe.name
            one = one.replace(name=name, runs_dir=str(folder_of(recipe, axes)))
            if one.folder in found:
                raise RecipeError([f"{one.folder.name} is there twice"])
            found[one.folder] = one
        except RecipeError as error:
            for problem in error.problems:
                text = " ".join(f"{key}={value}" for key, value in overrides.items())
                refused.setdefault(problem, []).append(text)
    problems = [f"{problem} [{'; '.join(texts)}]" for problem, texts in refused.items()]
    if problems or not (axes and found):
        raise RecipeError(problems or ["name options and values, such as lr=0.03,0.1"], "sweep")
    return list(found.values())


def parse_axes(texts: Iterable[str]) -> dict[str, list[str]]:
    """The axes in words: lr=0.03,0.1 and seed=0-2 and crop_scale=[0.2,1],[0.5,1]."""
    axes: dict[str, list[str]] = {}
    for key, equals, values in (text.partition("=") for text in texts):
        if not equals or key in axes:
            raise RecipeError([f"{key}: wanted OPTION=VALUE,VALUE,... once"], "sweep")
        axes[key] = [part.strip() for part in re.findall(r"\[[^\]]*\]|[^,]+", values)]
        kind = key in FIELDS and Recipe.model_fields[key].annotation
        bounds = re.fullmatch(r"(\d+)-(\d+)", values)
        if bounds and int in (kind, *get_args(kind)):
            axes[key] = [str(value) for value in range(int(bounds[1]), int(bounds[2]) + 1)]
    return axes


def folder_of(recipe: Recipe, axes: Iterable[str]) -> Path:
    """The folder of a sweep over these options; the seed and the values do not matter."""
    options = "".join(f"-{key}" for key in axes if key != "seed")
    return ROOT / recipe.runs_dir / f"{recipe.name}-sweep{options}"


def _write_sweep_file(folder: Path, recipe: Recipe, axes: Mapping[str, list]) -> None:
    if (folder / "sweep.yaml").exists():
        there = read_sweep_file(folder)[1]
        keys = [k for k in FIELDS if k not in runtime_only and k not in axes]
        if other := [key for key in keys if getattr(there, key) != getattr(recipe, key)]:
            raise runs.RunError(
                f"{folder} has a sweep of another recipe ({other} differ); rename this one"
            )
    lines = [f"  {key}: {params_files.dump(values)}" for key, values in axes.items()]
    lines = ["axes:", *lines, "recipe:", *(f"  {x}" for x in recipe.yaml(FIELDS).splitlines())]
    folder.mkdir(parents=True, exist_ok=True)
    with runs.atomic_write(folder / "sweep.yaml") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_sweep_file(folder: str | Path) -> tuple[dict[str, list], Recipe]:
    """The values of the options that a sweep varies, and its base recipe. Raises RunError."""
    try:
        content = params_files.parse_written(Path(folder, "sweep.yaml").read_text(encoding="utf-8"))
        return content["axes"], Recipe(**content["recipe"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise runs.RunError(f"{folder} is no readable sweep: {error}") from None


def finished(folder: str | Path) -> list[Path]:
    """The finished runs of a sweep in the order of the values, for comparison.compare."""
    axes, place = read_sweep_file(folder)[0], {}
    for run in runs.finished(folder):
        pairs = [(run.recipe()[key], values) for key, values in axes.items()]
        if all(value in values for value, values in pairs):
            place[run.path] = [values.index(value) for value, values in pairs]
    return sorted(place, key=place.get)


def _write_figure(folder: Path) -> None:
    from workbench.ui import plots

    keys, paths = [k for k in read_sweep_file(folder)[0] if k != "seed"], finished(folder)
    if len(keys) == 1 and paths:
        plots.top1_by_option(comparison.compare(paths), keys[0]).write(folder / "top1.png")
