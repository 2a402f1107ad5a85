"""Custom parts: a model, loss, optimizer or other function of the user's, for a built-in one.

    fit(recipe, run, loss=focal, loss_args={"gamma": 2})    # a function of a notebook or module
    loss: losses.py:focal                     # in a params file: a file, or package.module:name
    loss_args: {gamma: 2}

The contracts, with `**args` from the mapping of that name, such as loss_args:

- model: (num_classes, **args) -> nn.Module; images (n, 3, h, w) -> logits (n, C). Its classifier is
  called `fc`, or named by `default_cfg["classifier"]`.
- loss: (logits (n, C), targets, **args) -> (n,), one value per image; targets are class numbers
  (n,), or soft labels (n, C) with mixing.
- optimizer: (groups, lr, **args) -> torch.optim.Optimizer, all that it needs in its `state`. Groups
  have params, weight_decay (0 without decay_norm_and_bias) and lr_scale (of head_lr_scale and
  layer_decay); each step sets their lr to that of the schedule times lr_scale.
- kd_loss, a list: (student, teacher, targets, **args) -> 0-d, a mean; logits or features (n, ...).
- transform: (image, rng, **args) -> image; uint8 (h, w, 3), cropped and augmented, and a
  numpy.random.Generator, the only source of random numbers.
- metrics, a list: (predictions) -> {name: number}; a DataFrame as in predictions.parquet. One that
  fails in validation is nan there, with a warning.
- dataset: (data_dir, **args) -> (train, val), or one frame with fold or val_fraction. DataFrames
  as workbench.data.tables reads them: file (below data_dir) or image (bytes), label, and others.

A run folder has the source of its parts, and their SHA-256 is part of the recipe's fingerprint. A
part that is named in text runs only with --trust-code or WORKBENCH_TRUST_CODE=1.
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import random
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workbench import ROOT
from workbench.recipe import FIELDS, Recipe
from workbench.recipe_checks import PART, is_part

OPTIONS = ("dataset", "model", "optimizer", "loss", "kd_loss", "transform", "metrics")
FROM_SOURCE = re.compile(r"notebook|.*\.py").fullmatch  # else imported

# By pinned reference: what was loaded, or given to fit, in this process, and its source.
LOADED: dict[str, Callable] = {}
SOURCES: dict[str, str] = {}


class PartError(ValueError):
    """A custom part cannot be used; the message names it."""


def pin(recipe: Recipe, **given: Any) -> Recipe:
    """The recipe with the SHA-256 of its parts in their references: losses.py:focal@0123456789ab.

    `given` are functions or classes that replace what the options name, lists of them as metrics
    or kd_loss, and their arguments as model_args. Raises PartError.
    """

    def pinned(key: str, value: Any) -> Any:
        if key not in OPTIONS:
            return value
        if isinstance(value, list | tuple):
            return [pinned(key, one) for one in value]
        reference = value if isinstance(value, str) else _register(key, value)
        return _pinned(key, reference, recipe.folder)

    for key in given:
        if key.removesuffix("_args") not in OPTIONS or key not in FIELDS:
            raise PartError(f"{key} is no custom part; there are {', '.join(OPTIONS)}")
    values = {key: getattr(recipe, key) for key in OPTIONS}
    values |= {key: value for key, value in given.items() if value is not None}
    values = {key: pinned(key, value) for key, value in values.items()}
    changes = {key: value for key, value in values.items() if value != getattr(recipe, key)}
    return recipe.replace(**changes) if changes else recipe


class Part(functools.partial):
    """A loaded part with its arguments, which a process started by spawn builds again."""

    def __reduce__(self) -> tuple:
        return _unpickled, (self.origin, SOURCES[self.origin[1]], self.keywords)


def _unpickled(origin: tuple[str, str], source: str, args: dict[str, Any]) -> Part:
    SOURCES[origin[1]] = source
    return load(*origin, **args)


def load(option: str, reference: str, folder: Path | None = None, /, **args: Any) -> Part:
    """The object that a reference names, with its arguments bound.

    A pinned one is that of this process, of the run folder `folder`, or of its file if that is
    unchanged. Raises PartError, also where code is not trusted.
    """
    pinned = _pinned(option, reference, folder)
    if pinned not in LOADED:
        found = re.fullmatch(PART, pinned)
        module = _module(option, reference, found, SOURCES[pinned])
        if not callable(getattr(module, found["name"], None)):
            raise PartError(f"{option} {reference!r}: {found['where']} has no {found['name']}")
        LOADED[pinned] = getattr(module, found["name"])
    part = Part(LOADED[pinned], **args)
    part.origin = option, pinned
    return part


def run(option: str, reference: str, function: Callable, /, *arguments: Any) -> Any:
    """What a part gives. Raises PartError where it fails, or draws from a global generator."""
    import numpy as np  # only where there is a part
    import torch

    drawn = lambda: (random.getstate(), np.random.get_state(), torch.get_rng_state().numpy())  # noqa: NPY002
    before = pickle.dumps(drawn())
    try:
        found = function(*arguments)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0]
        raise PartError(f"{option} {reference!r} failed: {text}") from error
    if pickle.dumps(drawn()) != before:
        text = "only a transform may be random, by the generator it is given"
        raise PartError(f"{option} {reference!r} draws from a global random generator; {text}")
    return found


def save(recipe: Recipe, folder: Path) -> None:
    """Writes the source of every part of a pinned recipe to parts/<digest>.py of a run folder."""
    for option in OPTIONS:
        value = getattr(recipe, option)
        for reference in filter(is_part, value if isinstance(value, list) else [value]):
            path = folder / "parts" / f"{re.fullmatch(PART, reference)['digest']}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(SOURCES[_pinned(option, reference, folder)], encoding="utf-8")


def _pinned(option: str, reference: str, folder: Path | None = None) -> str:
    """The reference with its digest; its source is in SOURCES afterwards."""
    found = re.fullmatch(PART, reference)
    if not found or reference in SOURCES:
        return reference
    if os.environ.get("WORKBENCH_TRUST_CODE") != "1":
        raise PartError(
            f"{option} {reference!r} is code and was not run; if you trust it, add --trust-code "
            "(or set WORKBENCH_TRUST_CODE=1)"
        )
    where, digest = found["where"], found["digest"]
    saved = Path(folder or "", "parts", f"{digest}.py")
    is_saved = folder and digest and FROM_SOURCE(where) and saved.is_file()
    path = saved if is_saved else _file(option, reference, where)
    if where.endswith(".py"):
        where = _shown(ROOT / Path(where).expanduser())
    source = path.read_text(encoding="utf-8")
    now = _digest(source)
    if digest and digest != now:
        raise PartError(
            f"{option} {reference!r}: {path} changed since (it is {now} now); put it back, or "
            "name it without its digest, for another run"
        )
    if FROM_SOURCE(found["where"]) and (beside := _imported_from(path.parent, source)):
        text = f"imports {', '.join(beside)} from its folder, which a run would not save"
        raise PartError(f"{option} {reference!r} {text}; put it into the file, or into a package")
    pinned = f"{where}:{found['name']}@{now}"
    SOURCES[pinned] = source
    return pinned


def _imported_from(folder: Path, source: str) -> list[str]:
    """The modules in a folder that a source imports."""
    with contextlib.suppress(SyntaxError):  # is reported when it is executed
        nodes = list(ast.walk(ast.parse(source)))
        names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        tops = {name.split(".")[0] for name in names} - {"", "workbench"}
        files = lambda top: (folder / f"{top}.py", folder / top / "__init__.py")
        return sorted(top for top in tops if any(path.exists() for path in files(top)))
    return []


def _shown(path: Path) -> str:
    """A file below the checkout, or the name of another: runs and packages have no private path."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _file(option: str, reference: str, where: str) -> Path:
    if where.endswith(".py"):
        path = ROOT / Path(where).expanduser()
    else:
        try:
            spec = importlib.util.find_spec(where)
        except (ImportError, ValueError):
            spec = None
        path = Path(spec.origin) if spec and spec.has_location else Path(where)
    if not path.is_file():
        raise PartError(
            f"{option} {reference!r}: there is no {where}; name a file (losses.py:focal) or a "
            "module (package.module:focal), and not a function of a notebook that has ended"
        )
    return path


def _module(option: str, reference: str, found: re.Match, source: str) -> Any:
    name = f"workbench_part_{found['digest']}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        if not FROM_SOURCE(found["where"]):
            return importlib.import_module(found["where"])
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, None))
        sys.modules[name] = module  # dataclasses and pickle look it up
        exec(compile(source, reference, "exec"), module.__dict__)
    except Exception as error:
        sys.modules.pop(name, None)
        text = f"{type(error).__name__}: {error}"
        raise PartError(f"{option} {reference!r} cannot be imported: {text}") from error
    return module


def _register(option: str, given: Callable) -> str:
    """A reference to an object, with its source."""
    name = getattr(given, "__name__", "")
    if not name.isidentifier() or getattr(given, "__closure__", None):
        raise PartError(
            f"{option} {given!r}: give a function or class with a name, from the top level of a "
            f"notebook or module; values go to {option}_args"
        )
    module = sys.modules[given.__module__]
    if given.__module__ == "__main__" or not getattr(module, "__file__", None):
        where, source = "notebook", _cell_source(option, given)
        exec(compile(source, where, "exec"), again := {})
        before, now = (getattr(f, "__defaults__", None) for f in (given, again[name]))
        if repr(before) != repr(now):
            text = f"has the defaults {before} and would now have {now}; run its cell again"
            raise PartError(f"{option} {name} {text}")
    else:
        path = Path(module.__file__)
        where = given.__module__ if "." in given.__module__ else _shown(path)
        source = path.read_text(encoding="utf-8")
    pinned = f"{where}:{name}@{_digest(source)}"
    LOADED[pinned], SOURCES[pinned] = given, source
    return pinned


def _cell_source(option: str, given: Callable) -> str:
    """The source of a function or class of a notebook, after all that it uses there."""
    scope, lines, seen = vars(sys.modules[given.__module__]), [], set()

    def add(name: str, value: Any) -> None:
        if name in seen:
            return
        seen.add(name)
        here = getattr(value, "__module__", None)
        if inspect.ismodule(value):
            lines.append(f"import {value.__name__} as {name}")
        elif here == given.__module__ and (inspect.isfunction(value) or inspect.isclass(value)):
            source = textwrap.dedent(inspect.getsource(value))
            for used in _globals_of(source):
                if used in scope:
                    add(used, scope[used])
            lines.append(source)
        elif callable(value) and here:
            lines.append(f"from {here} import {value.__qualname__} as {name}")
        elif json.loads(json.dumps(value, default=lambda _: 0)) == value:
            lines.append(f"{name} = {value!r}")
        else:
            raise PartError(
                f"{option} {given.__name__} uses {name} of the notebook, a {type(value).__name__}; "
                f"only functions, classes, modules and plain values can be saved with a run"
            )

    try:
        add(given.__name__, given)
    except (OSError, TypeError) as error:
        raise PartError(f"{option} {given.__name__} has no source: {error}") from None
    return "\n".join(lines)


def _globals_of(source: str) -> list[str]:
    """The names that a function or class reads and does not assign."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    own = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return sorted({node.id for node in names} - own)


def _digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:12]
