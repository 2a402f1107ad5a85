"""What holds on a GPU: no wait between rows, exact resume, NCCL, export.

WORKBENCH_TEST_DEVICE=cuda pytest -m gpu; without it conftest.py hides the GPU, and these are
skipped. WORKBENCH_TEST_DEVICE=cpu runs those that need no CUDA on the CPU, to test the tests.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import train

from workbench import data, export, runs, training
from workbench.recipe import Recipe

DEVICE = os.environ.get("WORKBENCH_TEST_DEVICE", "cuda")  # see conftest.py
CUDA = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not CUDA, reason="needs WORKBENCH_TEST_DEVICE=cuda"),
]
STRIKES = {
    "optimizer": "lamb", "lr": 0.008, "weight_decay": 0.02, "clip_grad_norm": 1.0, "loss": "bce",
    "bce_sum": True, "bce_shift": True, "crop_scale": [0.6, 1.0], "randaug_n": 2,
    "randaug_variant": "timm", "mixup_alpha": 0.1, "cutmix_alpha": 1.0, "erase_prob": 0.25,
    "ema_decay": 0.98,
}  # fmt: skip
ADAMW = {"optimizer": "adamw", "lr": 0.001, "clip_grad_norm": 1.0, "ema_decay": 0.9}
# A fresh process, as `workbench train`, with deterministic kernels on request.
TRAIN = """
import sys, torch
from workbench import runs, training
from workbench.recipe import Recipe
if sys.argv[2] == "deterministic":
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
recipe = Recipe.from_yaml(sys.argv[1])
for row in training.fit(recipe, runs.Run(recipe.folder)):
    print(row["step"], flush=True)
"""


@pytest.fixture
def record(request):
    """Writes a measured value for gpu_check.py, also if a later test is stopped."""

    def write(name, value):
        if file := os.environ.get("WORKBENCH_TEST_RESULTS"):
            row = {"part": "tests", "test": request.node.name, name: value}
            with open(file, "a") as results:
                results.write(json.dumps(row) + "\n")

    return write


def recipe_for(folder, **options) -> Recipe:
    workers = 2 if DEVICE == "cuda" else 0
    defaults = {"epochs": 3, "workers": workers, "device": DEVICE, "runs_dir": str(folder)}
    return Recipe(**{**defaults, **options})


def start(recipe: Recipe, file, mode: str) -> subprocess.Popen:
    recipe.to_yaml(file)
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-c", TRAIN, str(file), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def strikes(tmp_path_factory) -> runs.Run:
    return train(recipe_for(tmp_path_factory.mktemp("strikes"), name="strikes", **STRIKES))


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA reports synchronisation")
@pytest.mark.parametrize("options", [{}, STRIKES, ADAMW], ids=["plain", "strikes", "adamw"])
def test_no_step_between_two_rows_waits_for_the_device(tmp_path, monkeypatch, options):
    """From the batch of one step to the batch of the next, nothing may synchronise."""
    batches = data.train_loader

    def watched(*arguments, **settings):
        for batch in batches(*arguments, **settings):
            due = (batch.step + 1) % 10 == 0  # a row of steps.csv reads the sums of ten steps
            torch.cuda.set_sync_debug_mode("default" if due else "error")
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(data, "train_loader", watched)
    recipe = recipe_for(tmp_path, log_every=10, epochs=2, checkpoint_minutes=60.0, **options)
    rows = training.fit(recipe, runs.Run(recipe.folder))
    try:
        assert [row["step"] for row in itertools.islice(rows, 4)] == [10, 20, 30, 40]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        rows.close()


def test_strikes_learns(strikes):
    metrics = strikes.metrics()
    precision = training.pick_precision("auto", torch.device(DEVICE))
    assert strikes.environment()["precision"] == precision
    assert metrics.top1.iloc[-1] > 60 and metrics.ema_top1.iloc[-1] > 60


def test_a_student_learns_from_features_and_from_cached_logits(strikes, tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.distillation.logit_cache.CACHE", tmp_path / "cache")
    teacher = {"teacher": [str(strikes.path)], "mixup_alpha": 0.1}
    pairs = {"distill_pairs": ["layer4 -> layer4"], "kd_loss": ["l2_normalized"]}
    features = train(recipe_for(tmp_path, name="features", **pairs, **teacher))
    assert features.metrics().top1.iloc[-1] > 60
    logits = {"kd_loss": ["kl"], "temperature": 4.0, "cache_teacher_logits": True, "epochs": 1}
    first, again = (
        train(recipe_for(tmp_path, name=name, **logits, **teacher)) for name in ("first", "again")
    )
    found = again.environment()["teacher_logits"]
    assert found["hits"] == found["requests"] > 0
    np.testing.assert_allclose(first.steps().loss[:3], again.steps().loss[:3], rtol=1e-2)


# A CPU has deterministic kernels alone.
@pytest.mark.parametrize("mode", ["deterministic", "default"][: 2 if DEVICE == "cuda" else 1])
def test_a_killed_run_resumes(tmp_path, record, mode):
    """The largest difference of a weight is recorded; deterministic kernels leave none."""
    options = {"checkpoint_minutes": 0.0, "log_every": 1, "epochs": 2, "train_fraction": 0.25}
    options |= {"batch_size": 32, **STRIKES}  # 22 steps
    whole = recipe_for(tmp_path / "whole", **options)
    killed = recipe_for(tmp_path / "killed", **options)
    with (
        start(whole, tmp_path / "whole.yaml", mode) as undisturbed,
        start(killed, tmp_path / "killed.yaml", mode) as process,
    ):
        for line in process.stdout:
            if int(line) >= 6:  # in the middle of the first epoch
                process.send_signal(signal.SIGKILL)
                break
        undisturbed.communicate()
    assert process.returncode == -signal.SIGKILL and undisturbed.returncode == 0
    with start(killed, tmp_path / "killed.yaml", mode) as process:
        assert process.communicate()[0] and process.returncode == 0
    one, other = runs.Run(whole.folder), runs.Run(killed.folder)
    ours, theirs = one.load_checkpoint()["model"], other.load_checkpoint()["model"]
    largest = max(float((ours[k].float() - theirs[k].float()).abs().max()) for k in ours)
    record("largest_difference", largest)
    equal = one.file("metrics.csv").read_bytes() == other.file("metrics.csv").read_bytes()
    record("metrics_equal", equal)
    if mode == "deterministic" or DEVICE == "cpu":
        assert largest == 0 and equal
    else:
        assert abs(one.metrics().top1.iloc[-1] - other.metrics().top1.iloc[-1]) < 5


def test_one_process_under_torchrun_trains_as_one_without(tmp_path, record):
    """NCCL on a GPU, gloo on a CPU; the process group exists even for one process."""
    options = {"epochs": 1, "log_every": 10, "precision": "fp32", "train_fraction": 0.5}
    plain = train(recipe_for(tmp_path / "plain", **options))
    recipe = recipe_for(tmp_path / "torchrun", **options)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
               "--local-addr=127.0.0.1"]  # fmt: skip
    start = time.monotonic()
    done = subprocess.run(
        [*command, "-m", "workbench", "train", str(tmp_path / "recipe.yaml")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record("seconds", round(time.monotonic() - start, 1))
    run = runs.Run(recipe.folder)
    assert run.environment()["distributed"] == ("nccl" if DEVICE == "cuda" else "gloo")
    np.testing.assert_allclose(plain.steps().loss, run.steps().loss, rtol=2e-2)


def test_a_package_predicts_as_the_run_did(strikes, tmp_path, record):
    """The report compares with torch on the CPU; the run's own top-1 was measured on the device."""
    package = export.package(strikes.path, tmp_path, weights="raw", seconds=0.02)
    onnx = export.read_report(package)["formats"]["onnx"]
    record("flips", onnx["flips"])
    record("largest_difference", onnx["max_abs_diff"])
    assert onnx["flips"] == onnx["ties"]
    assert abs(onnx["top1"] - strikes.metrics().top1.iloc[-1]) <= 0.4  # of 500: bf16 and fp32
