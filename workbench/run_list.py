"""The runs of a folder as rows: state and last figures, for `workbench runs` and the run table."""

import contextlib
import csv
import io
import time
from pathlib import Path
from typing import Any

from workbench import jobs
from workbench.runs import Run, first_line

COLUMNS = "run state model dataset seed epoch epochs top1 ema_top1 top5 n train_loss minutes"


def rows(root: str | Path = "runs", sweeps: bool = False) -> list[dict[str, Any]]:
    """`row` of each run folder below `root`, newest first, and of those of sweeps if asked."""
    patterns = ["*/recipe.yaml", *["*/*/recipe.yaml"] * sweeps]
    # Since Python 3.12 glob yields dangling links as well.
    found = [p.parent for pattern in patterns for p in Path(root).glob(pattern) if p.exists()]
    known = jobs.of_runs(found)
    read = [row(p, known.get(p)) | {"run": str(p.relative_to(root))} for p in sorted(found)]
    return sorted(read, key=lambda row: row["updated"] or "", reverse=True)


def row(path: Path, job: jobs.Job | None = None) -> dict[str, Any]:
    """State and last figures of a run folder, None if unknown; "unreadable" instead of an error.

    `text` is the state in words, such as "requeued once, running on n3, step 1 of 9".
    """
    run, columns = Run(path), [*COLUMNS.split(), "device", "updated", "message"]
    row = dict.fromkeys(columns) | {"run": path.name}
    try:
        written = time.localtime(run.file("recipe.yaml").stat().st_mtime)
        row["updated"] = time.strftime("%Y-%m-%dT%H:%M:%S%z", written)
        status, recipe, environment = run.status(), run.recipe(), run.environment()
        last = {}  # values of the columns: not every epoch is evaluated
        for line in csv.DictReader(io.StringIO(run.text("metrics.csv"))):
            last |= {k: float(v) for k, v in line.items() if v}
        row |= {k: recipe.get(k) for k in ("model", "dataset", "seed", "epochs")}
        row |= {k: last.get(k) for k in ("top1", "top5", "ema_top1", "train_loss")}
        row |= {"epoch": int(last.get("epoch", 0)), "minutes": environment.get("seconds", 0) / 60}
        row["n"] = int(last["val_images"]) if "val_images" in last else None
        row["device"] = environment.get("device")
        row |= {k: status[k] for k in ("state", "message", "updated") if k in status}
        row["state"] = jobs.state(status["state"], job)
        row["text"] = row["state"]
        if job and job.requeues and row["state"] in ("queued", "running"):
            times = {1: "once", 2: "twice"}.get(job.requeues, f"{job.requeues} times")
            row["text"] = f"requeued {times}, {row['state']}"
        if job and row["state"] == "queued" and job.reason not in ("", "None"):
            row["text"] += f" ({job.reason})"
        if job and job.node and row["state"] == "running":
            row["text"] += f" on {job.node}"
        if status["state"] == "running":
            step = max(status["step"], _last_step(run))
            row["text"] += f", step {step} of {status['steps'] or '?'}"
    except Exception as error:
        row |= dict.fromkeys(("state", "text"), "unreadable") | {"message": first_line(error)}
    return row


def _last_step(run: Run) -> int:
    """Of steps.csv, which has more of them than status.json."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(run.file("steps.csv").read_bytes().split(b"\n")[-2].split(b",")[0])
    return 0


def table(found: list[dict[str, Any]]) -> list[str]:
    """Rows as aligned lines, the first with the names of the columns."""
    found = [row | {"state": row["text"]} for row in found]
    shown = [column for column in (*COLUMNS.split(), "updated") if column != "train_loss"]
    columns = [column for column in shown if any(row[column] is not None for row in found)]
    text = lambda v: "-" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v)
    lines = [columns, *([text(row[c]) for c in columns] for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [" ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    failed = [
        row for row in found
        if row["state"] in ("failed", "unreadable") or "Unavailable" in (row["message"] or "")
    ]  # fmt: skip
    return lines + [f"{row['run']}: {row['message']}" for row in failed[:5]]
