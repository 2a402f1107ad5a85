"""What a training says while it runs: lines, and a table of its epochs."""

import datetime
import sys
from typing import Any

import numpy as np
import pandas as pd
import psutil

from workbench import counted, evaluation
from workbench.runs import Run
from workbench.ui.tables import html_table

Row = dict[str, Any]  # of training.fit


def memory() -> str:
    text = f"{psutil.Process().memory_info().rss / 1e9:.1f} GB of memory"
    torch = sys.modules.get("torch")  # not where another process trains
    if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
        text += f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU"
    return text


def time_text(row: Row) -> str:
    """Share of the steps, training time so far, and what the others take at the same speed."""
    done, steps = row["step"], row["steps"] or row["step"]
    left = (steps - done) * row["seconds"] / done
    clock = lambda seconds: datetime.timedelta(seconds=round(seconds))
    return f"{done / steps:.0%}, {clock(row['seconds'])} elapsed, {clock(left)} left"


def step_text(row: Row) -> str:
    return f"epoch {row['epoch']}, step {row['step']} of {row['steps']}: {speed_text(row)}"


def speed_text(row: Row) -> str:
    speed = f"{row['images_per_second']:.0f} img/s, {row['data_wait']:.0%} waiting for data"
    return f"loss {row['loss']:.3f}, {speed}"


def start_text(run: Run, steps: int) -> str:
    """Lines on the data, the device and the initial weights of a run."""
    e = run.environment()
    if not e:
        return f"{run.path}: {counted(steps, 'step')}"
    images = f"{e['train_images']:,} training and {counted(e['val_images'], 'validation image')}"
    device = f"{e['device']}, {e['precision']}"
    lines = [f"{images}, {len(e['classes'])} classes; {device}; start: {e['start']}"]
    for t in e.get("teachers", []):
        size = f"{t['image_size']} pixels"
        lines.append(f"teacher: {t['source']}, {t['model']}, {size}, weights {t['digest']}")
    lines += [e[key] for key in ("teacher_cache", "skipped_files") if e.get(key)]
    if left_out := len(run.quarantine()):
        lines.append(f"{counted(left_out, 'image')} left out, named in quarantine.csv")
    lines += [*evaluation.image_cautions(e), *e.get("trained_on_validation", [])]
    if e.get("empty_classes"):
        lines.append(f"classes without a training image: {e['empty_classes'][:8]}")
    return "\n".join(lines)


def epoch_text(row: Row) -> str:
    text = f"epoch {row['epoch']:3d}  step {row['step']}/{row['steps']}  lr {row['lr']:.4g}  "
    text += f"train loss {row['train_loss']:.4f}"
    if "train_kd_loss" in row:
        text += f" (task {row['train_task_loss']:.4f}, distillation {row['train_kd_loss']:.4f})"
    text += f" top-1 {row['train_top1']:.2f}"
    if row["top1"] is not None:
        text += f"  val loss {row['val_loss']:.4f} top-1 {row['top1']:.2f} (n={row['val_images']})"
    if row.get("ema_top1") is not None:
        text += f"  EMA top-1 {row['ema_top1']:.2f}"
    own = [name for name in evaluation.custom_metrics(row) if row[name] is not None]
    return text + "".join(f"  {name} {row[name]:.4g}" for name in own)


def end_text(run: Run) -> str:
    status = run.status()
    return status["message"] or f"{run.path} is {status['state']}"


def epochs_html(metrics: pd.DataFrame, steps: pd.DataFrame, most: int = 15) -> str:
    """A table of the last epochs and, marked, the first one with the highest top-1."""
    if metrics.empty:
        return ""
    seconds = steps.reindex(columns=["step", "seconds"]).set_index("step").seconds
    seconds = seconds.reindex(metrics.step).to_numpy()
    first = 0.0 if metrics.epoch.iloc[0] == 1 else float("nan")
    table = metrics.assign(seconds=np.diff(seconds, prepend=first))
    columns = {
        "epoch": ("epoch", "{:.0f}"), "train_loss": ("train loss", "{:.4f}"),
        "val_loss": ("val loss", "{:.4f}"), "top1": ("top-1 (%)", "{:.2f}"),
        "ema_top1": ("EMA top-1 (%)", "{:.2f}"),
        **{name: (name, "{:.4g}") for name in evaluation.custom_metrics(metrics)},
        "seconds": ("seconds", "{:.1f}"),
    }  # fmt: skip
    top1 = table.filter(regex=r"^(ema_)?top1$").max(axis=1)
    best = top1.idxmax() if top1.notna().any() else None
    chosen = table.index.isin([*table.index[-most:], best])
    texts = pd.DataFrame({
        title: table[name].map(text.format, na_action="ignore")
        for name, (title, text) in columns.items() if name in table
    })  # fmt: skip
    texts[""] = ["best" if i == best else "" for i in table.index]
    shown = html_table(texts[chosen].reset_index(drop=True), right=list(texts.columns[:-1]))
    return f"<div style='font-size: 90%'>{shown}</div>"
