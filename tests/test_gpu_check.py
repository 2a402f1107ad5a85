"""The script that checks a GPU runs through without one, and reports every part."""

import json
import subprocess
import sys

import pytest

from workbench import ROOT


@pytest.mark.slow
def test_every_part_reports_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--minutes", "6", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    states = {row["part"]: row["state"] for row in rows if "state" in row}
    parts = ["machine", "tests", "papermill", "step_loop", "lamb", "loaders", "cifar"]
    assert states == dict.fromkeys(parts, "done")
    assert {row["part"] for row in rows if "state" not in row} == set(parts)
    results = [row["result"] for row in rows if "result" in row]
    assert "passed" in results and not {"failed", "error"} & set(results)
    report = (tmp_path / "gpu_check.md").read_text()
    assert all(f"## {part}: done" in report for part in parts)
    assert (tmp_path / "02_baseline.ipynb").exists()
