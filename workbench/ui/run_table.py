"""The run table: the runs of a folder and of its sweeps, to sort, filter, group and select."""

import asyncio
import contextlib
import html
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import pandas as pd
import traitlets

from workbench import from_root, jobs, params_files, run_list, runs
from workbench.evaluation.recipe_diff import differing_options
from workbench.evaluation.statistics import wilson_percent
from workbench.progress import watched
from workbench.recipe import defaults
from workbench.ui.tables import html_table
from workbench.ui.widgets import Source

PERIOD = 2  # seconds between two looks at the folder
QUEUE_PERIOD = 10  # the same for the queue of a cluster, while nothing changes in the folder
WIDTH = 40  # characters of the value of an option
COLUMNS = [  # of every run; those that are the same for all runs of a folder are options
    {"title": "recipe", "group": True},
    {"title": "seed", "number": True},
    {
        "title": "top-1 (%), 95 % interval",
        "number": True,
        "help": "of raw weights; Wilson's interval",
    },
    {"title": "epochs", "number": True},
    {"title": "minutes", "number": True},
    {"title": "state"},
    {"title": "date", "help": "of the last change"},
]
SWEEP = {"title": "sweep", "group": True}  # where there is one
FILES = "recipe.yaml status.json metrics.csv steps.csv predictions.parquet job.json CANCEL".split()
Cell = tuple[str, str | float | None] | tuple[str, str | float | None, str]  # text, sort key, tip


class Table(anywidget.AnyWidget):
    """Rows in the browser; what the user selects, sorts and filters there are traits here."""

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    columns = traitlets.List().tag(sync=True)
    rows = traitlets.List().tag(sync=True)  # key, live (on top), cells
    colours = traitlets.Dict().tag(sync=True)  # of the mark, by key
    selected = traitlets.List(traitlets.Unicode()).tag(sync=True)  # keys
    pinned = traitlets.List(traitlets.Unicode()).tag(sync=True)
    search = traitlets.Unicode().tag(sync=True)
    filters = traitlets.Dict().tag(sync=True)  # text by title of the column
    order = traitlets.List(["date", -1]).tag(sync=True)  # title, 1 or -1
    group = traitlets.Unicode().tag(sync=True)  # title


class RunTable(Source):
    """The runs of a folder and of the sweeps in it; `selected` are those picked in the browser.

    Runs that are running or wait in a running sweep are on top. In Jupyter the folder is read every
    two seconds; selection, order and search stay. The static representation is the table. `names`
    are selected first, each a folder in `folder`.
    """

    def __init__(self, folder: str | Path, names: Sequence[str] = ()):
        self.folder, self._read = Path(folder), {}
        self._jobs, self._asked = {}, (0.0, {})  # of the queue: when, and what the folder had
        self.table, self.note = Table(), ipywidgets.HTML()
        self.refresh()
        self.table.selected = list(names)
        super().__init__([self.table, self.note])
        self._loop = self._soon = None
        if watched() == "jupyter":
            with contextlib.suppress(RuntimeError):  # no event loop, so no front end either
                self._loop = asyncio.get_running_loop()
                self._watching = self._loop.create_task(self._watch())

    def key(self, run: runs.Run) -> str:
        """Its folder below that of the table."""
        return run.path.relative_to(self.folder).as_posix()

    @property
    def selected(self) -> list[runs.Run]:
        """The selected runs that exist, that evaluated last at the end."""
        chosen = [key for key in reversed(self._read) if key in self.table.selected]
        return [runs.Run(self.folder / key) for key in chosen]

    def evaluated(self) -> list[runs.Run]:
        """The readable runs that have predictions, newest first."""
        found = [key for key, one in self._read.items() if one["evaluated"]]
        return [runs.Run(self.folder / key) for key in found]

    def refresh(self, _: Any = None) -> None:
        """Reads the folder; unchanged runs are not read again."""
        paths = [*self.folder.glob("*/recipe.yaml"), *self.folder.glob("*/*/recipe.yaml")]
        read, stamps = {}, {}
        for path in sorted(path.parent for path in paths):
            with contextlib.suppress(OSError):  # it was just removed
                stamps[path] = _stamp(path)
        if stamps != self._asked[1] or time.monotonic() > self._asked[0] + QUEUE_PERIOD:
            self._jobs, self._asked = jobs.of_runs(stamps), (time.monotonic(), stamps)
        for path in stamps:
            with contextlib.suppress(OSError, runs.RunError):
                key, stamp = path.relative_to(self.folder).as_posix(), dict(stamps[path])
                stamp["job"] = self._jobs.get(path)
                known = self._read.get(key, {})
                read[key] = known if known.get("stamp") == stamp else _read_run(path, stamp)
        self._read = dict(sorted(read.items(), key=lambda one: one[1]["time"], reverse=True))
        listed = self._read | self._queued()
        self._show(listed)
        count = sum(one["evaluated"] for one in self._read.values())
        hint = "" if self._read else "; make demo trains one"
        others = f"{len(listed) - count} others{hint}"
        text = f"{count} evaluated runs in {from_root(self.folder)}, {others}"
        self.note.value = html.escape(text)

    def _show(self, listed: dict[str, dict[str, Any]]) -> None:
        recipes = {key: one["recipe"] for key, one in listed.items() if one["recipe"]}
        differing = differing_options([*recipes.values()]) if recipes else {}
        differing = {k: v for k, v in differing.items() if k not in ("name", "epochs")}
        values = dict(zip(recipes, zip(*differing.values(), strict=True), strict=False))
        columns = COLUMNS + [SWEEP] * any("/" in key for key in listed)
        rows = []
        for key, one in listed.items():
            texts = values.get(key, [""] * len(differing))
            options = [(text[:WIDTH], _number(text), text) for text in texts]
            cells = _cells(key, one)[: len(columns)] + options
            rows.append({"key": key, "live": one["live"], "cells": cells})
        with self.table.hold_sync():
            self.table.columns = columns + [{"title": o, "option": True} for o in differing]
            self.table.rows = rows
            for name in ("selected", "pinned"):
                kept = [key for key in getattr(self.table, name) if key in listed]
                setattr(self.table, name, kept)

    def _queued(self) -> dict[str, dict[str, Any]]:
        """What the sweeps have not started yet, of those in which a run is training."""
        found = {}
        for folder in sorted({Path(key).parent for key, one in self._read.items() if one["live"]}):
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                text = (self.folder / folder / "sweep.yaml").read_text(encoding="utf-8")
                for name in params_files.parse_written(text).get("runs", ()):
                    recipe, _, seed = name.rpartition("-seed")
                    facts = {"state": "queued", "seed": int(seed), "name": recipe}
                    found[(folder / name).as_posix()] = _NOTHING | facts
        return {key: facts for key, facts in found.items() if key not in self._read}

    async def _watch(self) -> None:
        while self.comm is not None:  # until it is closed
            await asyncio.sleep(PERIOD)
            before = self._stamps()
            try:
                self.refresh()
                if before != self._stamps():
                    self._follow()
            except Exception as error:  # a task has no cell to raise in; the next look may succeed
                text = f"{type(error).__name__}: {error}; the table is not up to date"
                self.note.value = html.escape(text)

    def _stamps(self) -> list[dict[str, int]]:
        """Of the selected runs; their steps change nothing in a comparison."""
        chosen = (self._read[key]["stamp"] for key in self._read if key in self.table.selected)
        return [stamp | {"steps.csv": 0} for stamp in chosen]

    def _follow_soon(self, _: Any = None) -> None:
        """After several clicks follows once."""
        if self._soon:
            self._soon.cancel()
        if self._loop:
            self._soon = self._loop.call_later(0.15, self._follow)
        else:
            self._follow()

    def _follow(self) -> None:
        """Called when a selected run has new results or another state."""

    def static_repr(self) -> dict[str, str]:
        titles = [column["title"] for column in self.table.columns]
        rows = [
            ["\u2713" * (row["key"] in self.table.selected), *(cell[0] for cell in row["cells"])]
            for row in sorted(self.table.rows, key=lambda row: not row["live"])
        ]
        frame = pd.DataFrame(rows, columns=["selected", *titles])
        right = [column["title"] for column in COLUMNS if column.get("number")]
        return {"text/html": html_table(frame, right) + self.note.value}


_NOTHING = dict.fromkeys("seed top1 n epoch epochs minutes updated recipe message".split())
_NOTHING |= {"live": True, "evaluated": False, "text": "queued"}


def _stamp(path: Path) -> dict[str, Any]:
    """Differs when a run has a new row, predictions or state, or its process has ended."""
    files = {name: path / name for name in FILES}
    times = {name: f.stat().st_mtime_ns if f.exists() else 0 for name, f in files.items()}
    return {**times, "locked": runs.Run(path).locked()}


def _read_run(path: Path, stamp: dict[str, Any]) -> dict[str, Any]:
    """run_list.row, and what a row of the table has beside it."""
    one, run = _NOTHING | run_list.row(path, stamp["job"]), runs.Run(path)
    evaluated = stamp["predictions.parquet"]
    one |= {"stamp": stamp, "time": evaluated or stamp["recipe.yaml"], "name": path.name}
    live = one["state"] in ("queued", "running") or (stamp["locked"] and one["state"] == "new")
    one |= {"live": live, "evaluated": evaluated > 0 and one["state"] != "unreadable"}
    if one["state"] != "unreadable":
        one["recipe"] = defaults() | run.recipe()
        one["name"] = str(one["recipe"]["name"])
    return one


def _cells(key: str, one: dict[str, Any]) -> list[Cell]:
    """Of COLUMNS and SWEEP."""
    top1, interval = one["top1"], ""
    if top1 is not None and one["n"]:
        interval = "  [{:.1f}, {:.1f}]".format(*wilson_percent(top1, one["n"]))
    state, sweep = one["text"], key.rpartition("/")[0]
    return [
        (one["name"], one["name"], key),
        ("" if one["seed"] is None else str(one["seed"]), one["seed"]),
        ("" if top1 is None else f"{top1:.2f}{interval}", top1),
        ("" if one["epochs"] is None else f"{one['epoch']} of {one['epochs']}", one["epoch"]),
        ("" if one["minutes"] is None else f"{one['minutes']:.1f}", one["minutes"]),
        (state, state, one["message"] or ""),
        ((one["updated"] or "")[:16].replace("T", " "), one["updated"]),
        (sweep, sweep),
    ]


def _number(text: str) -> float | str:
    """What a column is sorted by."""
    with contextlib.suppress(ValueError):
        return float(text)
    return text
