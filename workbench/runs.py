"""The run folder: what a training writes, in files that pandas reads; `Run` lists them.

Files are replaced atomically (temporary file, fsync, rename) or appended to by line. An exclusive
lock keeps a second writer out, on this and on other machines; see `locks`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from workbench import locks, params_files
from workbench.recipe import RENAMED_COLUMNS, RENAMED_FACTS, Recipe, fingerprint, renamed

if TYPE_CHECKING:  # imported where needed, so that `workbench runs` starts without pandas
    import pandas as pd

TABLES = ("metrics.csv", "steps.csv", "quarantine.csv")
REQUESTS = ("STOP", "PAUSE")  # files of others in a run folder, the first counts most


class RunError(RuntimeError):
    """A run folder cannot be used; the text says why and what to do."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; at the end, fsynced and renamed to it, or removed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.touch(exist_ok=False)
    try:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some libraries write 0600
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Run:
    """One run folder. Creating a Run reads nothing; `writing` creates and locks the folder.

    recipe.yaml          every option
    environment.json     versions, commit, device, seconds, memory, data fingerprint
    metrics.csv          a row per epoch; the same bytes after a kill and resume
    steps.csv            a row per log_every steps, with speed
    predictions.parquet  a row per validation image and set of weights (raw, ema)
    quarantine.csv       images that could not be read, if there are any
    weights_report.csv   a row per tensor, if it started from other weights
    status.json          running, stopped, finished or failed, and the step
    last.pt              the checkpoint a resume starts from
    best.safetensors     weights of the best validated epoch (chosen on that list)
    summary.png          curves, weakest classes and worst images of a finished run
    STOP, PAUSE          created by a user or a widget: training stops at the next step, or waits
                         there until the file is removed
    lock, lock.<n>       the lock of the writer, and who the n-th writer is: host, process, job
    job.json, CANCEL     of `workbench submit` and `workbench cancel`; see jobs
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._owner: locks.Owner | None = None  # of the lock, inside `writing`

    def file(self, name: str) -> Path:
        """The path of a file of the folder, whether it exists or not."""
        return self.path / name

    # ---- reading: works on running, finished, stopped and damaged runs

    def status(self) -> dict[str, Any]:
        """state, step, steps, message; a running run whose writer has died is interrupted."""
        status = {"state": "new", "step": 0, "steps": None, "message": ""}
        try:
            if self.file("status.json").exists():
                status |= json.loads(self.file("status.json").read_text())
        except (OSError, ValueError, TypeError) as error:
            return status | {"state": "unreadable", "message": str(error)}
        if status["state"] == "running" and not self.locked():
            status["state"] = "interrupted"
        return status

    def has_results(self, finished: bool = False) -> bool:
        """Whether it was evaluated, or is `finished`; prints "nothing to show yet" if not."""
        status = self.status()
        evaluated = self.file("predictions.parquet").exists()
        if (status["state"] == "finished") if finished else evaluated:
            return True
        print(f"nothing to show yet: {status['message'] or f'{self.path} is ' + status['state']}")
        return False

    def recipe(self) -> dict[str, Any]:
        """The options in recipe.yaml."""
        try:
            text = self.file("recipe.yaml").read_text(encoding="utf-8")
            return renamed(params_files.parse_written(text) or {})
        except (OSError, ValueError, AttributeError) as error:
            raise RunError(f"{self.path} is no readable run: {error}") from None

    def environment(self) -> dict[str, Any]:
        """environment.json; empty if there is none."""
        path = self.file("environment.json")
        try:
            facts = dict(json.loads(path.read_text())) if path.exists() else {}
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}); move it away to continue") from None
        return {RENAMED_FACTS.get(key, key): value for key, value in facts.items()}

    def metrics(self) -> pd.DataFrame:
        """A row per finished epoch, empty before the first."""
        return _parsed(self.text("metrics.csv"))

    def steps(self) -> pd.DataFrame:
        """A row per log_every steps, empty before the first."""
        return _parsed(self.text("steps.csv"))

    def quarantine(self) -> pd.DataFrame:
        """The images that could not be read: side, file, label, reason, detail, step."""
        return _parsed(self.text("quarantine.csv"))

    def choose_weights(self, asked: str = "") -> tuple[str, str]:
        """ "raw" or "ema", and a text with the last top-1 of both.

        `asked` if it names one. Otherwise ema, unless its top-1 was below that of raw by more than
        two standard errors of a difference of proportions, or nothing was validated yet.
        """
        rows = self.metrics().reindex(columns=["top1", "ema_top1", "val_images"]).dropna()
        if rows.empty:
            return asked or ("ema" if self.steps().empty else "raw"), ""
        raw, ema, images = rows.iloc[-1]
        worse = raw - ema > 2 * math.sqrt((raw * (100 - raw) + ema * (100 - ema)) / images)
        return asked or ("raw" if worse else "ema"), f"top-1 raw {raw:.2f} %, EMA {ema:.2f} %"

    def predictions(self, weights: str | None = None) -> pd.DataFrame:
        """A row per validation image of the last evaluation; `weights` picks raw or ema."""
        import pandas as pd

        path = self.file("predictions.parquet")
        if not path.exists():
            raise RunError(f"{self.path} has no predictions; it was not evaluated yet")
        frame = pd.read_parquet(path)
        return frame if weights is None else frame[frame.weights == weights].reset_index(drop=True)

    def text(self, name: str) -> str:
        """The complete lines of a table: a killed writer may leave half a line."""
        try:
            text = self.file(name).read_bytes().decode()  # with the line ends as they are
        except OSError:
            return ""
        return text[: text.rfind("\n") + 1]

    # ---- writing: one process at a time

    def locked(self) -> bool:
        """Whether some process, here or on another machine, is writing this run."""
        return locks.is_owned(self.file("lock"))

    def writer(self) -> str:
        """The process that is writing this run, "process 12 on host"; "" if none is."""
        return locks.Owner(self.file("lock")).name() if self.locked() else ""

    def remove_requests(self) -> None:
        """Removes the files that ask a training to stop or to pause."""
        self._check_lock()
        for name in REQUESTS:
            self.file(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Run]:
        """Creates and locks the folder. Raises RunError if another process has locked it.

        Where that was on another machine, it may take locks.STALE_SECONDS to know that it is dead.
        """
        lock = self.file("lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.touch()
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error}; choose another runs_dir") from None
        with contextlib.ExitStack() as stack:
            with self._errors(lock.name):
                owner = stack.enter_context(locks.owning(lock))
            if not owner.ours:
                stop = f"wait for it, or stop it with: touch {self.file('STOP')}"
                raise RunError(f"{self.path} is being written by {owner.name()}; {stop}")
            self._owner = owner
            try:
                self._check_lock()
                for leftover in self.path.glob(".*.*.????????"):  # of a writer that was killed
                    leftover.unlink(missing_ok=True)
                yield self
            finally:
                self._owner = None

    def _check_lock(self) -> None:
        """Raises RunError if another process has taken over the lock."""
        if self._owner and (why := self._owner.lost()):
            raise RunError(f"{self.path}: {why}; nothing more is written here")

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Replaces a JSON file."""
        with self.atomic_write(name) as temporary:
            temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")

    def set_status(self, state: str, **values: Any) -> None:
        """Replaces status.json; values that are not given stay."""
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.write_json("status.json", {**self.status(), **values, "state": state, "updated": now})

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Adds a line to a CSV file in one write; a new column is empty in the rows before.

        Floats are written as their shortest exact text, None as an empty field.
        """
        with self._errors(name), open(self.file(name), "a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            columns = next(csv.reader(file), None)
            if new := [key for key in row if columns and key not in columns]:
                header, *rows = csv.reader(io.StringIO(self.text(name), newline=""))
                self._replace_rows(name, [header + new, *(r + [""] * len(new) for r in rows)])
                return self.append(name, row)
            writer = csv.DictWriter(file, columns or list(row), lineterminator="\n")
            if columns is None:
                writer.writeheader()
            writer.writerow(row)

    def _replace_rows(self, name: str, rows: list[list[str]]) -> None:
        with self.atomic_write(name) as path, path.open("w", encoding="utf-8", newline="") as out:
            csv.writer(out, lineterminator="\n").writerows(rows)

    def truncate_after(self, step: int) -> None:
        """Removes the rows after `step` from the tables, and damaged ones."""
        self._check_lock()
        for name in TABLES:
            if not self.file(name).exists():
                continue
            header, *rows = list(csv.reader(io.StringIO(self.text(name), newline=""))) or [[]]
            header = [RENAMED_COLUMNS.get(column, column) for column in header]
            at = header.index("step") if "step" in header else len(header)
            rows = [r for r in rows if r[at:] and r[at].lstrip("-").isdigit()]
            rows = [r for r in rows if int(r[at]) <= step]
            if not rows:
                self.file(name).unlink()
                continue
            self._replace_rows(name, [header, *rows])

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replaces last.pt; the tables are synced first."""
        import torch

        for name in TABLES:
            if self.file(name).exists():
                _fsync(self.file(name))
        with self.atomic_write("last.pt") as temporary:
            torch.save(dict(state), temporary)

    def load_checkpoint(self, map_location: Any = "cpu") -> dict[str, Any] | None:
        """The checkpoint, None if there is none. Never runs code from the file."""
        import torch

        path = self.file("last.pt")
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:
            raise RunError(f"{path} cannot be read ({first_line(error)}); move it away") from None

    def save_weights(self, name: str, tensors: Mapping[str, Any], metadata: Mapping) -> None:
        """Replaces a safetensors file; metadata values become text."""
        from safetensors.torch import save_file

        contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        with self.atomic_write(name) as temporary:
            save_file(contiguous, temporary, {k: str(v) for k, v in metadata.items()})

    def load_weights(self, name: str) -> tuple[str, dict[str, Any]]:
        """ "raw" or "ema", and the tensors by name."""
        try:
            with safe_open(self.file(name), "pt") as file:
                kind = (file.metadata() or {}).get("weights", "raw")
                return kind, {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.file(name)} cannot be read ({error})") from None

    def save_frame(self, name: str, frame: pd.DataFrame) -> None:
        """Replaces a parquet or CSV file."""
        write = frame.to_parquet if name.endswith(".parquet") else frame.to_csv
        with self.atomic_write(name) as temporary:
            write(temporary, index=False)

    @contextlib.contextmanager
    def atomic_write(self, name: str) -> Iterator[Path]:
        """A temporary path that replaces a file at the end. Raises RunError."""
        if self._owner is None:
            raise RunError(f"{self.path}: write inside `with run.writing():`")
        with self._errors(name), atomic_write(self.file(name)) as temporary:
            yield temporary
            self._check_lock()  # last: a checkpoint takes its time

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turns what may be a full disk into RunError; the lock is checked first."""
        try:
            self._check_lock()
            yield
        except RunError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(self.path).free / 1e6 if self.path.exists() else 0.0
            raise RunError(
                f"{self.path}: {name} was not written ({first_line(error)}; {free:,.0f} MB "
                "free there); the same command resumes from the last checkpoint"
            ) from error


def first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}"


def _parsed(text: str) -> pd.DataFrame:
    import pandas as pd

    frame = pd.read_csv(io.StringIO(text)) if text else pd.DataFrame()
    return frame.rename(columns=RENAMED_COLUMNS)


def finished(root: str | Path, **environment: Any) -> list[Run]:
    """The finished runs below `root` whose environment.json has these values, sorted by name.

    `recipe` is a recipe's fingerprint, which is independent of its name, `data` that of the images.
    """
    wanted = {**environment, "state": "finished"}
    found, recipe = [], wanted.pop("recipe", None)
    for path in sorted(Path(root).glob("*/environment.json")):
        run = Run(path.parent)
        with contextlib.suppress(RunError):
            known = {**run.environment(), "state": run.status()["state"]}
            if wanted.items() <= known.items() and recipe in (None, fingerprint(run.recipe())):
                found.append(run)
    return found


def unused_name(recipe: Recipe) -> Recipe:
    """The recipe, with _2 appended to its name while that folder has a run of another recipe."""
    run = Run(recipe.folder)
    if not run.file("last.pt").exists() or fingerprint(run.recipe()) == recipe.fingerprint:
        return recipe
    return unused_name(recipe.replace(name=f"{recipe.name}_2"))


def follow(
    run: Run, poll: float = 0.5, stop: threading.Event | None = None
) -> Iterator[dict[str, Any]]:
    """The rows `training.fit` yields, read from the files of a run in any process.

    Yields the existing rows, then new ones as they are written; returns when the run ends, or
    after `stop`, which ends the following alone.
    """
    stop = stop or threading.Event()
    seen: dict[str, list[str]] = {"steps.csv": [], "metrics.csv": []}  # lines yielded
    while True:
        live = run.locked()  # first, so that rows written before the end are read below
        rows = []
        for name, kind in (("steps.csv", "step"), ("metrics.csv", "epoch")):
            text = run.text(name)
            lines = text.splitlines()
            # After a resume the lines from some point on are others: those are new.
            known = max(1, len(os.path.commonprefix([seen[name], lines])))
            seen[name] = lines
            if len(lines) > known:
                new = _parsed(text).iloc[known - 1 :].astype(object)
                new = new.where(new.notna(), None)
                steps = {"kind": kind, "steps": run.status()["steps"]}
                rows += [steps | row for row in new.to_dict("records")]
        yield from sorted(rows, key=lambda row: row["step"])
        if not live or stop.wait(poll):
            return
