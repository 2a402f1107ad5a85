"""The runs of a folder as rows: state and last figures, for `workbench runs` and the run table."""

import csv
import io
import time
from pathlib import Path
from typing import Any

from workbench.runs import Run, first_line

COLUMNS = "run state model dataset seed epoch epochs top1 ema_top1 top5 n train_loss minutes"


def rows(root: str | Path = "runs") -> list[dict[str, Any]]:
    """`row` of each run folder below `root`, newest first."""
    # Since Python 3.12 glob yields dangling links as well.
    found = filter(Path.exists, sorted(Path(root).glob("*/recipe.yaml")))
    return sorted(
        (row(p.parent) for p in found), key=lambda row: row["updated"] or "", reverse=True
    )


def row(path: Path) -> dict[str, Any]:
    """State and last figures of a run folder, None if unknown; "unreadable" instead of an error."""
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
    except Exception as error:
        row |= {"state": "unreadable", "message": first_line(error)}
    return row
