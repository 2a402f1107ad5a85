"""Sweeps: a recipe with several values of some options, every combination a run.

A sweep is a folder with sweep.yaml (axes and base recipe) and an ordinary run folder for each
combination, named after what varies. The same call skips finished runs and resumes the others.
"""

import collections
import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, get_args

from workbench import ROOT, data, evaluation, locks, params_files, parts, runs, training
from workbench.evaluation import comparison
from workbench.recipe import FIELDS, Recipe, RecipeError, runtime_only
from workbench.training.meter import Row


def sweep(
    recipe: Recipe, axes: Mapping[str, Iterable], *, jobs: int = 1, trials: int = 0
) -> Iterator[Row]:
    """Trains every combination of the values of `axes` and yields a row as each run ends.

    Rows: run (name of the folder), the options of `axes`, state, top1 (percent, None if it failed),
    message. A run that fails does not end the sweep. `jobs` runs share the cores or GPUs; another
    number of threads changes the last bits. At the end there are table.csv and, with one or two
    options beside the seed, top1.png; with all of fold=1/5,...,5/5 instead out_of_fold.parquet
    (evaluation.out_of_fold). With `trials` Optuna suggests the values of that many runs from lists
    and ranges in words, ["0.001:0.3:log"]; it ends runs below the median as "pruned".

    Ctrl-C stops with checkpoints: the last rows are "stopped"; between two runs it is raised.
    Raises RecipeError before the first run, with all combinations that are refused, and RunError
    for a folder with another sweep.
    """
    if jobs > 1:
        recipe = recipe.replace(workers=training.pick_workers(recipe.workers, jobs))
    axes = {key: [*values] for key, values in axes.items()}
    if trials and "ema_decay" in axes:
        text = "Optuna maximises top-1 of raw weights, which it leaves equal; sweep without trials"
        raise RecipeError([f"ema_decay: {text}"], "sweep")
    kinds = {key: _distribution(key, axes[key]) for key in axes if trials}
    ends = {key: getattr(k, "choices", None) or (k.low, k.high) for key, k in kinds.items()}
    recipes, folder = combinations(recipe, ends or axes), folder_of(recipe, axes)
    pinned = recipes if trials else [parts.pin(one) for one in recipes]
    values = {key: [getattr(one, key) for one in pinned] for key in axes}
    values = {k: [v for i, v in enumerate(vs) if v not in vs[:i]] for k, vs in values.items()}
    names = [] if trials else [one.folder.name for one in recipes]
    _write_sweep_file(folder, recipe, axes if trials else values, names)
    tasks, run = recipes, functools.partial(train_run, datasets={})  # of each process the last one
    if trials:
        tasks, run = range(trials), functools.partial(_next_trial, recipe, kinds, trials, {})
    found = ((task, row) for task in tasks if (row := run(task)))
    if jobs > 1:
        found = in_processes(run, tasks, jobs, folder / "jobs.log")
    states = set()
    for task, row in found:
        chosen = {} if trials else {key: getattr(task, key) for key in axes}
        yield {"run": task if trials else task.folder.name, **chosen, "top1": None, **row}
        states.add(row["state"])
        if row["state"] == "stopped" and jobs == 1:
            return
    if "fold" in axes and states == {"finished"} and not missing_folds(values):
        with runs.atomic_write(folder / "out_of_fold.parquet") as temporary:
            table = evaluation.out_of_fold(finished(folder), compared_weights(axes))
            table.to_parquet(temporary, index=False)
    elif "fold" not in axes and "stopped" not in states:
        _write_report(folder)


def train_run(
    recipe: Recipe, datasets: dict[str, data.Dataset], prune: Callable[[Row], str] = lambda row: ""
) -> Row:
    """Trains a run, with the data set of the run before; `prune` of an epoch row may end it."""
    from workbench.ui import summary  # matplotlib

    run, pruned = runs.Run(recipe.folder), ""
    before = run.status()["state"]
    row = {"run": recipe.folder.name, "state": "failed", "top1": None}
    # Options of the data stand before those of the model.
    key = json.dumps([getattr(recipe, option) for option in FIELDS[: FIELDS.index("model")]])
    try:
        if key not in datasets:
            datasets.clear()
            datasets[key] = data.load_dataset(recipe)
        for one in (rows := training.fit(recipe, run, dataset=datasets[key])):
            if one["kind"] == "epoch" and (pruned := prune(one)):
                rows.close()
                with run.writing():
                    run.set_status("stopped", message=f"stopped: pruned {pruned}")
    except KeyboardInterrupt:
        return row | {"state": "stopped", "message": "stopped by Ctrl-C"}
    except (ValueError, RuntimeError, OSError) as error:
        return row | {"message": f"{type(error).__name__}: {error}"}
    if before != "finished":
        summary.write(run)
    top1 = [None, *run.metrics().reindex(columns=["top1"]).top1.dropna()][-1]
    row |= {"top1": top1} | {key: run.status()[key] for key in ("state", "message")}
    return row | {"state": "pruned"} if pruned else row


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


def notes(recipe: Recipe, recipes: Iterable[Recipe]) -> list[str]:
    """What the values of a sweep changed beside themselves, with the runs that share it."""
    found: dict[str, dict[str, None]] = {}
    for name, text in ((one.name, t) for one in recipes for t in one.notes[len(recipe.notes) :]):
        found.setdefault(text, {})[name] = None
    return [f"{text} [{'; '.join(names)}]" for text, names in found.items()]


def parse_axes(texts: Iterable[str]) -> dict[str, list[str]]:
    """The axes in words: lr=0.03,0.1 and seed=0-2 and crop_scale=[0.2,1],[0.5,1]."""
    axes: dict[str, list[str]] = {}
    for key, equals, values in (text.partition("=") for text in texts):
        if not equals or key in axes:
            raise RecipeError([f"{key}: wanted OPTION=VALUE,VALUE,... once"], "sweep")
        axes[key] = [part.strip() for part in re.findall(r"\[[^\]]*\]|\{[^}]*\}|[^,]+", values)]
        kind = key in FIELDS and Recipe.model_fields[key].annotation
        bounds = re.fullmatch(r"(\d+)-(\d+)", values)
        if bounds and int in (kind, *get_args(kind)):
            axes[key] = [str(value) for value in range(int(bounds[1]), int(bounds[2]) + 1)]
    return axes


def folder_of(recipe: Recipe, axes: Iterable[str]) -> Path:
    """The folder of a sweep over these options; the seed and the values do not matter."""
    options = "".join(f"-{key}" for key in axes if key != "seed")
    return ROOT / recipe.runs_dir / f"{recipe.name}-sweep{options}"


def _write_sweep_file(
    folder: Path, recipe: Recipe, axes: Mapping[str, list], names: list[str]
) -> None:
    if (folder / "sweep.yaml").exists():
        former, there = read_sweep_file(folder)
        keys = [k for k in FIELDS if k not in runtime_only and k not in axes]
        other = [key for key in keys if getattr(there, key) != getattr(recipe, key)]
        if (folder / "study.log").exists():
            other += [key for key in axes if axes[key] != former.get(key)]
        if other:
            raise runs.RunError(
                f"{folder} has a sweep of another recipe ({other} differ); rename this one"
            )
    lines = [f"  {key}: {params_files.dump(values)}" for key, values in axes.items()]
    lines = ["axes:", *lines, "recipe:", *(f"  {x}" for x in recipe.yaml(FIELDS).splitlines())]
    lines.append(f"runs: {params_files.dump(names)}")  # in their order: what is not there waits
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


def missing_folds(axes: Mapping[str, Iterable]) -> str:
    """Why the folds of a sweep give no table of out-of-fold predictions; "" if they do."""
    folds = [*axes["fold"]]
    counts = sorted({int(fold.partition("/")[2] or 1) for fold in folds})
    missing = [f"{i + 1}/{k}" for k in counts for i in range(k) if f"{i + 1}/{k}" not in folds]
    if not missing and len(counts) == 1:
        return ""
    which = f"missing: {', '.join(missing)}" if len(counts) == 1 else f"given: {', '.join(folds)}"
    text = f"no out-of-fold table: it needs all folds of one partition ({which})"
    return f"{text}; sweep over all of them, finished runs are not trained again"


def fold_report(folder: Path, axes: Mapping[str, Iterable]) -> str:
    """Top-1 of the out-of-fold predictions of a sweep by recipe, or why there are none."""
    if text := missing_folds(axes):
        return text
    table = evaluation.out_of_fold(finished(folder), compared_weights(axes))
    table = evaluation.by_column(table, "recipe")
    return f"out of fold:\n{table.to_string(float_format='{:.2f}'.format)}"


def finished(folder: str | Path) -> list[Path]:
    """The finished runs of a sweep in the order of the values; those of Optuna's by top-1."""
    axes, place = read_sweep_file(folder)[0], {}
    for run in runs.finished(folder):
        pairs = [(run.recipe()[key], values) for key, values in axes.items()]
        if Path(folder, "study.log").exists():
            place[run.path] = [-run.metrics().top1.iloc[-1]]
        elif all(value in values for value, values in pairs):
            place[run.path] = [values.index(value) for value, values in pairs]
    return sorted(place, key=place.get)


def compared_weights(axes: Iterable[str]) -> str:
    """What a sweep compares: ema where it varies ema_decay, which leaves raw weights equal."""
    return "ema" if "ema_decay" in axes else "raw"


def _write_report(folder: Path) -> None:
    from workbench.ui import plots

    keys, paths = [k for k in read_sweep_file(folder)[0] if k != "seed"], finished(folder)
    if not paths:
        return
    found = comparison.compare(paths, weights=compared_weights(keys))
    values = {key: [group.recipe[key] for group in found.groups] for key in keys}
    found.table.assign(**values).to_csv(folder / "table.csv", index=False)
    if 1 <= len(keys) <= 2 - (folder / "study.log").exists():
        draw = plots.top1_by_option if len(keys) == 1 else plots.top1_by_two_options
        draw(found, *keys).write(folder / "top1.png")


# ---- several processes, and trials of Optuna


def in_processes(
    function: Callable[[Any], Row | None], tasks: Iterable[Any], jobs: int, log: Path
) -> Iterator[tuple[Any, Row]]:
    """(task, row) as `function(task)` returns rows in `jobs` processes, which print to `log`.

    Every task has a process, forked from a fresh interpreter. One that dies is a row "failed".
    Ctrl-C sends SIGTERM to all and yields the rows they still give, or rows "stopped"; a second one
    kills them. They end with the loop and with this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["workbench.sweep"])
    waiting, stopped = collections.deque(tasks), False
    busy: dict[Connection, tuple[int, Any, Any]] = {}  # number, process, task
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                number = min({*range(jobs)} - {n for n, _, _ in busy.values()})
                ours, theirs = context.Pipe(duplex=False)
                how = theirs, number, jobs, log, dict(os.environ)
                process = context.Process(target=_work, args=(function, waiting[0], *how))
                process.start()
                theirs.close()
                busy[ours] = number, process, waiting.popleft()
            try:
                ready = wait(busy)
            except KeyboardInterrupt:
                for _, process, _ in busy.values():
                    (process.kill if stopped else process.terminate)()
                stopped, waiting = True, ()
                continue
            for connection in ready:
                _, process, task = busy.pop(connection)
                try:
                    row = connection.recv()
                except EOFError:
                    process.join()
                    text = f"its process died (exit code {process.exitcode}, see {log})"
                    row = {"state": "stopped" if stopped else "failed", "message": text}
                if row:
                    yield task, row
    finally:
        for action in (multiprocessing.Process.terminate, multiprocessing.Process.join):
            for _, process, _ in busy.values():
                action(process)


def _work(
    function: Callable, task: Any, answer: Connection, number: int, jobs: int, log: Path, env: dict
) -> None:
    import torch

    os.environ.update(env)  # as it is now
    multiprocessing.set_start_method(None, force=True)  # of loaders: the default
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for the parent
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    gpus = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", gpus).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    end = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=end, daemon=True).start()
    answer.send(function(task))


def _distribution(option: str, values: list) -> Any:
    """Optuna's distribution of a list, or of one text low:high or low:high:log."""
    kind = option in FIELDS and Recipe.model_fields[option].annotation
    try:
        from optuna import distributions as of

        low, *high = str(values[0]).split(":")
        if len(values) > 1 or not high:
            return of.CategoricalDistribution([str(value) for value in values])
        log = {(): False, ("log",): True}[tuple(high[1:])]
        if int in (kind, *get_args(kind)):
            return of.IntDistribution(int(low), int(high[0]), log=log)
        return of.FloatDistribution(float(low), float(high[0]), log=log)
    except (ImportError, ValueError, KeyError, IndexError) as error:
        wanted = "a list, LOW:HIGH or LOW:HIGH:log, and Optuna (pip install optuna)"
        raise RecipeError([f"{option}={values}: wanted {wanted}: {error}"], "sweep") from None


def _next_trial(recipe: Recipe, kinds: dict, count: int, datasets: dict, task: int) -> Row | None:
    """The row of the first of `count` trials that is neither finished nor in another process."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = folder_of(recipe, kinds)
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
    storage, pruner = optuna.storages.JournalStorage(backend), optuna.pruners.MedianPruner()
    how = {"study_name": "sweep", "direction": "maximize", "load_if_exists": True}
    study = optuna.create_study(storage=storage, pruner=pruner, **how)
    for number in range(count):
        with locks.owning(folder / f".trial{number}") as owner:
            known = {t.user_attrs.get("number"): t for t in study.get_trials(deepcopy=False)}
            old = known.get(number)
            if not owner.ours or (old and old.state.is_finished()):
                continue
            # From the seed and the finished trials: a killed study goes on as it would have.
            study.sampler = optuna.samplers.TPESampler(seed=1000 * recipe.seed + number)
            # The process of a trial that is there has ended.
            trial = optuna.trial.Trial(study, old._trial_id) if old else study.ask(kinds)
            trial.set_user_attr("number", number)
            row = _train_trial(recipe, trial, old.intermediate_values if old else {}, datasets)
            if row["state"] == "finished":
                study.tell(trial, row["top1"])
            elif row["state"] != "stopped":  # a failed run counts as a pruned one
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return row


def _train_trial(recipe: Recipe, trial: Any, reported: Mapping[int, float], datasets: dict) -> Row:
    def prune(row: Row) -> str:
        if row["top1"] is None or row["step"] == row["steps"]:
            return ""
        if row["epoch"] not in reported:
            trial.report(row["top1"], row["epoch"])
        text = f"after epoch {row['epoch']}: top-1 {row['top1']:.2f} % is below the median"
        return text if trial.should_prune() else ""

    short = lambda value: float(f"{value:.4g}") if isinstance(value, float) else value
    values = {key: short(value) for key, value in trial.params.items()}
    try:
        [one] = combinations(recipe, {key: [value] for key, value in values.items()})
    except RecipeError as error:
        return {**values, "state": "failed", "message": str(error)}
    return values | train_run(one, datasets, prune)
