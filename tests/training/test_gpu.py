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
from torch.nn import functional as F

from workbench import export, runs, training
from workbench.recipe import Recipe
from workbench.training import inputs

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


needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA reports synchronisation")


def assert_no_wait(recipe: Recipe, monkeypatch, **custom) -> None:
    """From the batch of one step to the batch of the next, nothing synchronises in 40 steps."""

    def watched(*arguments, **settings):
        for batch in inputs.train_batches(*arguments, **settings):
            due = (batch.step + 1) % 10 == 0  # a row of steps.csv reads the sums of ten steps
            torch.cuda.set_sync_debug_mode("default" if due else "error")
            yield batch
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr("workbench.training.loop.train_batches", watched)  # not of the dry run
    recipe = recipe.replace(log_every=10, epochs=2, checkpoint_minutes=60.0)
    rows = training.fit(recipe, runs.Run(recipe.folder), **custom)
    try:
        assert [row["step"] for row in itertools.islice(rows, 4)] == [10, 20, 30, 40]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        rows.close()


def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


@needs_cuda
@pytest.mark.parametrize("options", [{}, STRIKES, ADAMW], ids=["plain", "strikes", "adamw"])
def test_no_step_between_two_rows_waits_for_the_device(tmp_path, monkeypatch, options):
    assert_no_wait(recipe_for(tmp_path, **options), monkeypatch)


@needs_cuda
def test_no_step_with_a_custom_loss_waits_for_the_device(tmp_path, monkeypatch):
    assert_no_wait(recipe_for(tmp_path), monkeypatch, loss=cross_entropy)


@needs_cuda
@pytest.mark.parametrize("cached", [False, True], ids=["features", "cached logits"])
def test_no_step_of_a_student_waits_for_the_device(strikes, tmp_path, monkeypatch, cached):
    options = {"distill_pairs": ["layer4 -> layer4"], "kd_loss": ["l2_normalized"]}
    if cached:
        monkeypatch.setattr("workbench.distillation.logit_cache.CACHE", tmp_path / "cache")
        options = {"kd_loss": ["kl"], "cache_teacher_logits": True}
    student = recipe_for(tmp_path, teacher=[str(strikes.path)], **options)
    if cached:  # writing logits waits
        train(student.replace(name="first", epochs=2))
    assert_no_wait(student, monkeypatch)


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


# A CPU has deterministic kernels alone, and trains in fp32 where it is asked for fp16.
@pytest.mark.parametrize(
    "mode, precision",
    [("deterministic", "auto"), ("default", "auto"), ("deterministic", "fp16")][
        : 3 if DEVICE == "cuda" else 1
    ],
)
def test_a_killed_run_resumes(tmp_path, record, mode, precision):
    """The largest difference of a weight is recorded; deterministic kernels leave none."""
    options = {"checkpoint_minutes": 0.0, "log_every": 1, "epochs": 2, "train_fraction": 0.25}
    options |= {"batch_size": 32, "precision": precision, **STRIKES}  # 22 steps
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


def test_a_custom_loss_trains_as_the_one_built_in(tmp_path):
    plain = train(recipe_for(tmp_path / "plain", epochs=1, log_every=5))
    recipe = recipe_for(tmp_path / "own", epochs=1, log_every=5)
    own = train(recipe, loss=cross_entropy)
    np.testing.assert_allclose(own.steps().loss, plain.steps().loss, rtol=2e-2)


def test_gradient_checkpointing_changes_memory_alone(tmp_path, record):
    """The same first losses with a lower peak, although the run with the higher one was first."""
    model, size = ("resnet50", 224) if DEVICE == "cuda" else ("resnet18", 64)
    options = {"epochs": 1, "log_every": 2, "model": model, "train_fraction": 0.25}
    options |= {"image_size": size, "val_resize": size, "batch_size": 64}
    plain, saved = (
        train(recipe_for(tmp_path / str(on), grad_checkpointing=on, **options))
        for on in (False, True)
    )
    if DEVICE == "cuda":
        more, less = (run.environment()["peak_gpu_memory_mb"] for run in (plain, saved))
        record("MB", more)
        record("MB, checkpointing", less)
        assert less < more
    np.testing.assert_allclose(plain.steps().loss[:3], saved.steps().loss[:3], rtol=1e-2)


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


# Two processes share the GPU: by gloo, since NCCL takes one process for a GPU.
GLOO = """
import sys, torch.distributed
start = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend: start("gloo")
from workbench import runs, training
from workbench.recipe import Recipe
recipe = Recipe.from_yaml(sys.argv[1])
for _ in training.fit(recipe, runs.Run(recipe.folder)):
    pass
"""


@needs_cuda
def test_two_processes_with_synchronised_batch_norm_train_as_one(tmp_path, record, monkeypatch):
    """The losses of the first steps; without synchronisation they differ."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    (tmp_path / "gloo.py").write_text(GLOO)
    options = {"epochs": 1, "log_every": 1, "precision": "fp32", "drop_last": True}
    losses = {}
    for name, processes in (("one", 1), ("synchronised", 2), ("each its own", 2)):
        recipe = recipe_for(tmp_path, name=name, sync_batch_norm=name == "synchronised", **options)
        recipe.to_yaml(tmp_path / "recipe.yaml")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc-per-node={processes}", "--local-addr=127.0.0.1"]  # fmt: skip
        done = subprocess.run(
            [*command, str(tmp_path / "gloo.py"), str(tmp_path / "recipe.yaml")],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        losses[name] = runs.Run(recipe.folder).steps().loss.to_numpy()[:3]
    apart = {name: float(np.abs(own / losses["one"] - 1).max()) for name, own in losses.items()}
    record("largest difference of a loss", apart)
    assert apart["synchronised"] < 1e-3 < apart["each its own"]


def test_a_package_predicts_as_the_run_did(strikes, tmp_path, record):
    """The report compares with torch on the CPU; the run's own top-1 was measured on the device."""
    package = export.package(strikes.path, tmp_path, weights="raw", seconds=0.02)
    onnx = export.read_report(package)["formats"]["onnx"]
    record("flips", onnx["flips"])
    record("largest_difference", onnx["max_abs_diff"])
    assert onnx["flips"] == onnx["ties"]
    assert abs(onnx["top1"] - strikes.metrics().top1.iloc[-1]) <= 0.4  # of 500: bf16 and fp32
