"""Differences between the exported formats of a network and PyTorch."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench import counted, data, shard_store
from workbench.augmentation import EvalTransform
from workbench.evaluation import statistics
from workbench.export.archive import FORMATS, ExportError
from workbench.export.onnx import Network, Runner
from workbench.progress import bar

TIE = 1e-3  # logits: with a smaller margin the two classes are a tie
LOSSY = ("int8", "with_preprocessing")  # formats that round differently from PyTorch


def compare_formats(
    runners: Mapping[str, Runner],
    network: Network,
    batches: Iterable[data.Batch],
    total: int,
    seconds: float = 1.0,
    with_preprocessing: Callable[[list[int]], list[np.ndarray]] | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The parity report and the flips of all formats over a validation set of `total` images.

    The first format is the reference. The report has for each one: top1 in percent, flips (other
    predictions), ties (flips with a margin below TIE), max_abs_diff and mean difference of the
    logits, the paired difference of top-1 in points with its 95 % interval, McNemar's p, and the
    latency. Columns of the flips: row, label, format, before, after, margin (logits of the
    reference). `with_preprocessing` returns the logits of the decoded image of each of some rows.
    """
    parts = []
    with bar(total, "parity", "img") as progress:
        for batch in batches:
            progress.update(len(batch.images) + len(batch.failures))
            if not len(batch.images):
                continue
            inputs = network.to_input(batch.images)
            logits = {name: run(inputs) for name, run in runners.items()}
            if with_preprocessing:
                each = with_preprocessing(batch.indices.tolist())
                logits["with_preprocessing"] = np.concatenate(each)
            reference = next(iter(logits.values()))
            parts += [_differences(name, logits[name], reference, batch) for name in logits]
    if not parts:
        raise ExportError("no validation image could be read")
    table = pd.concat(parts, ignore_index=True)
    formats = {}
    for name, rows in table.groupby("format", sort=False):
        flips = rows[rows.before != rows.after]
        before, after = ((rows[k] == rows.label).to_numpy()[None] for k in ("before", "after"))
        difference = statistics.difference(before, after)
        formats[name] = {
            "top1": 100 * float(after.mean()),
            "flips": len(flips),
            "ties": int((flips.margin < TIE).sum()),
            "max_abs_diff": float(rows["max"].max()),
            "mean": float(rows["mean"].mean()),
            "difference": {key: getattr(difference, key) for key in ("points", "low", "high")},
            "p": difference.p,
            "latency": latency(runners[name], network, seconds) if name in runners else {},
        }
    flips = table[table.before != table.after].drop(columns=["max", "mean"])
    return {"images": len(rows), "formats": formats}, flips.reset_index(drop=True)


def _differences(
    name: str, logits: np.ndarray, reference: np.ndarray, batch: data.Batch
) -> pd.DataFrame:
    if not np.isfinite(logits).all():
        raise ExportError(f"the logits of {name} have NaN or infinity")
    difference, index = np.abs(logits - reference), np.arange(len(logits))
    before, after = reference.argmax(1), logits.argmax(1)
    columns = {"row": batch.indices.numpy().copy(), "label": batch.labels.numpy().copy()}
    columns |= {"format": name, "before": before, "after": after}
    columns["margin"] = (reference[index, before] - reference[index, after]).astype(float)
    columns |= {"max": difference.max(1), "mean": difference.mean(1, dtype=np.float64)}
    return pd.DataFrame(columns)


def latency(run: Runner, network: Network, seconds: float = 1.0) -> dict[str, Any]:
    """Milliseconds per call at batch sizes 1 and 32: median and p95 over about `seconds` each.

    Nothing is measured with 0 seconds.
    """
    found = {}
    for batch in (1, 32) if seconds else ():
        inputs = network.to_input(network.noise(batch))
        run(inputs)
        times: list[float] = []
        while len(times) < 5 or (sum(times) < seconds and len(times) < 200):
            start = time.perf_counter()
            run(inputs)
            times.append(time.perf_counter() - start)
        median, p95 = np.quantile(times, [0.5, 0.95]) * 1000
        found[str(batch)] = {"median": float(median), "p95": float(p95), "calls": len(times)}
    return found


def compare_script(
    files: Mapping[str, bytes],
    sample: pd.DataFrame,
    transform: EvalTransform,
    network: Network,
    runners: Mapping[str, Runner],
) -> dict[str, Any]:
    """For each ONNX format, how far the probabilities printed by predict.py differ from ours.

    `files` has predict.py, meta.json and the networks. `max_abs_diff` is 1 if an image fails only
    there. Raises ExportError if the script crashes.
    """
    [batch] = data.eval_loader(sample, transform, batch_size=len(sample))
    paths, inputs = sample.path.iloc[batch.indices.numpy()].tolist(), network.to_input(batch.images)
    classes, report = json.loads(files["meta.json"])["classes"], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        for i, content in enumerate(shard_store.read(paths)):
            if content is not None:  # in a shard, which the script may not reach
                paths[i] = f"{folder}/{i}.image"
                Path(paths[i]).write_bytes(content)
        for name in (name for name in ("onnx", "int8") if FORMATS[name] in files):
            command = [sys.executable, f"{folder}/predict.py", FORMATS[name], *paths]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            lines = [line.rsplit("\t", 2)[1:] for line in done.stdout.split("\n")[:-1]]
            if len(lines) != len(paths):
                raise ExportError(f"predict.py of the package crashes: {done.stderr}")
            score = torch.from_numpy(runners[name](inputs)).softmax(1).tolist()
            # Of the printed class: ties may be ranked differently; two classes may have one name.
            differences = [
                min(abs(float(p) - q) for q, n in zip(row, classes, strict=True) if n == label)
                if label
                else 1.0
                for row, (label, p) in zip(score, lines, strict=True)
            ]
            report[name] = {"images": len(paths), "max_abs_diff": max(differences, default=0.0)}
    return report


def problems(report: Mapping[str, Any]) -> list[str]:
    """Reasons in a parity report not to write the package, a sentence each."""
    found = []
    for name, entry in report["formats"].items():
        flips = entry["flips"] - entry["ties"]
        if name not in LOSSY and flips:
            found.append(
                f"{name} has other predictions than torch for {counted(flips, 'image')} beyond ties"
            )
    for name, entry in report["script"].items():
        if (difference := entry["max_abs_diff"]) > TIE:
            found.append(f"probabilities of predict.py with {name} differ by {difference:.2g}")
    return found


def over_budget(report: Mapping[str, Any], int8_points: float) -> dict[str, str]:
    """LOSSY formats whose interval shows a loss above `int8_points`, and a sentence each."""
    found = {}
    for name in LOSSY:
        loss = report["formats"].get(name, {}).get("difference")
        if loss and loss["high"] < -int8_points:
            points, low, high = (-loss[key] for key in ("points", "high", "low"))
            interval = f"95 % interval {low:.2f} to {high:.2f}"
            found[name] = f"{name} loses {points:.2f} points ({interval}), allowed is {int8_points}"
    return found


def table(report: Mapping[str, Any]) -> pd.DataFrame:
    """A parity report with a row for each format; points are its top-1 minus torch's."""
    rows = {}
    for name, entry in report["formats"].items():
        rows[name] = {k: entry[k] for k in ("top1", "flips", "ties", "max_abs_diff", "mean")}
        rows[name] |= {"points": entry["difference"]["points"], "p": entry["p"]}
        rows[name] |= {f"ms, batch {b}": ms["median"] for b, ms in entry["latency"].items()}
        rows[name]["MB"] = report["bytes"].get(FORMATS.get(name), float("nan")) / 1e6
    return pd.DataFrame.from_dict(rows, "index")
