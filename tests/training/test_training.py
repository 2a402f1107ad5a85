"""Training: exact after any interruption, equal to the plain loop, and clear when it ends."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm.loss
import timm.optim
import timm.utils
import torch
from helpers import assert_same_run, fork_server, last_step, train
from safetensors import safe_open
from torch.nn import functional as F
from training_helpers import NO_NOISE, STRIKES, assert_near, left_after, small

from workbench import data, models, runs, training
from workbench.recipe import Recipe
from workbench.training.distributed import DistContext
from workbench.training.run_writer import RunWriter
from workbench.training.state import TrainState

ONE_EPOCH = {"epochs": 1, "warmup_epochs": 0.0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> runs.Run:
    """The run of `small` that nothing stops."""
    return train(small(tmp_path_factory.mktemp("undisturbed")))


# ---- exact resume


def _train_in_child(options):
    train(Recipe(**options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint_minutes", "how", "options"),
    [
        (0.0, "SIGKILL", {}),  # a checkpoint after every step: resumes in the middle of epochs
        (10.0, "SIGKILL", {}),  # checkpoints at the ends of epochs: whole steps are done again
        (0.0, "SIGKILL", STRIKES),
        (0.0, "SIGKILL", {"augment_on_device": True, "randaug_n": 2}),
        (10.0, "SIGTERM", STRIKES),
        (10.0, "STOP", {}),
    ],
)
def test_a_run_stopped_anywhere_ends_bit_for_bit_as_the_undisturbed_one(
    tmp_path, undisturbed, checkpoint_minutes, how, options
):
    if options:
        undisturbed = train(small(tmp_path / "undisturbed", **options))
    rng = random.Random(f"{checkpoint_minutes} {how}")
    stops = 0
    for attempt in range(12):
        recipe = small(
            tmp_path / "disturbed",
            checkpoint_minutes=checkpoint_minutes,
            workers=[0, 2, 1][attempt % 3],  # another number after every resume
            cache=attempt % 2 == 1,  # and with a cache or without
            **options,
        )
        run = runs.Run(recipe.folder)
        child = fork_server.Process(target=_train_in_child, args=(recipe.model_dump(),))
        child.start()
        target = last_step(run) + rng.randint(1, 6)
        if attempt >= 4 or target > 28:  # of 33: too near the end to be sure of being in time
            target = 10**9
        while child.is_alive() and last_step(run) < target:
            time.sleep(0.002)
        if not child.is_alive():
            break
        if how == "STOP":
            run.file("STOP").touch()
        else:
            os.kill(child.pid, getattr(signal, how))
        child.join(60)
        assert child.exitcode == (-signal.SIGKILL if how == "SIGKILL" else 0)
        assert run.status()["state"] == ("interrupted" if how == "SIGKILL" else "stopped")
        stops += 1
    child.join(60)
    assert child.exitcode == 0 and stops >= 3
    assert run.status()["state"] == "finished"
    assert_same_run(undisturbed, run)


def test_leaving_the_loop_saves_the_step_and_the_next_loop_resumes(tmp_path, undisturbed):
    recipe = small(tmp_path / "left")
    for limit in (4, 11, 17):  # inside an epoch, at the end of one, inside the next
        assert left_after(recipe, limit).status()["state"] == "stopped"
    run = runs.Run(recipe.folder)
    assert next(iter(training.fit(recipe, run)))["step"] == 18
    assert_same_run(undisturbed, train(recipe))


def test_a_resume_warns_of_epochs_that_metrics_csv_has_lost(tmp_path):
    """As on storage that uploads each file by itself, where last.pt may be newer."""
    recipe = small(tmp_path)
    run = left_after(recipe, 24)
    lines = run.text("metrics.csv").splitlines(keepends=True)
    run.file("metrics.csv").write_text("".join(lines[:-1]))
    with pytest.warns(UserWarning, match=r"metrics.csv has 1 of 2 epochs: last.pt is newer"):
        next(iter(training.fit(recipe, run)))


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path):
    """A resume compiles the same kernels again, for the same shapes."""
    recipe = small(tmp_path / "left", compile=True)
    for limit in (4, 17):  # inside the first epoch, inside the second
        left_after(recipe, limit)
    assert_same_run(train(small(tmp_path / "whole", compile=True)), train(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, STRIKES], ids=["plain", "strikes"])
def test_a_compiled_model_learns_as_the_eager_one(tmp_path, options):
    """Without dropout, whose random numbers a compiled kernel samples in another order."""
    options = {**options, **NO_NOISE, "epochs": 1, "warmup_epochs": 0.5}
    eager, compiled = (
        train(small(tmp_path / str(flag), **options, compile=flag)).steps().loss
        for flag in (False, True)
    )
    np.testing.assert_allclose(compiled[:3], eager[:3], rtol=1e-4)
    np.testing.assert_allclose(compiled, eager, rtol=2e-2)


def test_a_cache_changes_no_bit_of_a_run_and_is_used(tmp_path, image_folder, monkeypatch):
    """Images of 40 x 32 pixels, reduced to 24 first."""
    options = {
        "dataset": "files", "data_dir": str(image_folder), "train_fraction": 1.0, "image_size": 16,
        "val_resize": 20, "train_resize": 24, "batch_size": 6, "precision": "fp32",
    }  # fmt: skip
    cache = {"cache": True, "cache_dir": str(tmp_path / "cache")}
    plain = train(small(tmp_path / "plain", **options))
    built = train(small(tmp_path / "built", **options, **cache))
    assert_same_run(plain, built)
    size = sum(part.stat().st_size for part in (tmp_path / "cache").glob("*.pixels"))
    assert built.environment()["cache_mb"] == round(size / 1e6, 3)
    assert "cache_mb" not in plain.environment() and plain.environment()["downscaled"] == 18

    read, open_image = [], data.images.open
    monkeypatch.setattr(
        data.images, "open", lambda path, *more: (read.append(path), open_image(path, *more))[1]
    )
    recipe = small(tmp_path / "read", **options, **cache)
    assert_same_run(plain, train(recipe))
    assert len(read) == 2  # the first image of each side, to compare
    assert recipe.fingerprint == recipe.replace(cache=False, cache_dir="").fingerprint


def test_what_freed_memory_held_changes_no_bit(tmp_path, undisturbed):
    """oneDNN leaves gradients of bf16 uninitialised; `auto` computed in it on some CPUs."""
    recipe = small(tmp_path)
    run = runs.Run(recipe.folder)
    for _ in training.fit(recipe, run):
        sizes = (64, 1024, 20_000, 80_000, 200_000)
        freed = [torch.full((n,), torch.nan) for n in sizes for _ in range(4)]
        del freed
    assert_same_run(undisturbed, run)


def test_bf16_on_a_cpu_is_refused_where_weights_meet_nothing_but_padding(tmp_path):
    """The last stage of test_resnet: 3 pixels with stride 2, on 2 and, at 64 pixels, on 4."""
    options = {"precision": "bf16", "device": "cpu", **ONE_EPOCH}
    with pytest.raises(training.TrainingError, match="kernel of 3 pixels and an input of 2; use"):
        train(small(tmp_path / "small", **options))
    larger = {"image_size": 64, "val_resize": 64, "train_fraction": 0.06}
    assert len(train(small(tmp_path / "larger", **larger, **options)).metrics()) == 1


def test_auto_computes_in_fp32_on_a_cpu_that_has_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert training.pick_precision("auto", torch.device("cpu")) == "fp32"


def test_the_global_seed_changes_nothing_and_the_recipes_seed_everything(tmp_path):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the very thing that must not matter
        results.append(train(small(tmp_path / str(seed), **ONE_EPOCH)))
    assert_same_run(*results)
    other = train(small(tmp_path / "1", **ONE_EPOCH, seed=1))
    assert other.path != results[0].path
    assert other.steps().loss[0] != results[0].steps().loss[0]


# ---- the same as the plain loop


def plain_loop(recipe: Recipe, model, optimizer, loss, prepare, **options) -> None:
    """Textbook PyTorch: a cosine over all steps of the recipe."""
    train_list, steps = data.load_dataset(recipe).train, recipe.epochs * 11
    batches = data.train_loader(
        train_list, training.train_transform(recipe), seed=0, batch_size=32, steps=range(steps),
        **options,
    )  # fmt: skip
    for batch in batches:
        lr = recipe.lr / 2 * (1 + np.cos(np.pi * batch.step / steps))
        optimizer.param_groups[0]["lr"] = lr
        images, targets = prepare(batch)
        loss(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()


PLAIN = {**NO_NOISE, "ema_decay": None, "precision": "fp32", "warmup_epochs": 0.0}


def test_fit_is_the_plain_loop(tmp_path, float64):
    """The same batches through textbook PyTorch give the same weights, up to rounding."""
    recipe = small(tmp_path, **PLAIN, epochs=2, clip_grad_norm=None)
    model = training.create_model(recipe, 10).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True
    )
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (recipe.mean, recipe.std))

    def prepare(batch):
        images = (batch.images.float() - mean) / std
        return images.contiguous(memory_format=torch.channels_last), batch.labels

    plain_loop(
        recipe, model, optimizer, lambda x, t: F.cross_entropy(x, t, label_smoothing=0.1), prepare
    )
    assert_near(train(recipe).load_checkpoint()["model"], model.state_dict())


def test_strikes_are_the_plain_loop_with_timms_lamb_and_timms_loss(tmp_path, float64):
    """Mixed and erased images are those of DeviceTransform; the rest is from timm and torch."""
    options = {**STRIKES, **PLAIN, "bce_shift": False, "bce_threshold": 0.2}
    recipe = small(tmp_path, **options, epochs=1, label_smoothing=0.0)
    model = training.create_model(recipe, 10).to(memory_format=torch.channels_last).train()
    optimizer = timm.optim.Lamb(model.parameters(), weight_decay=0.02, max_grad_norm=1.0)
    loss = timm.loss.BinaryCrossEntropy(0.0, target_threshold=0.2, sum_classes=True)
    prepare = training.DeviceTransform(recipe, 10, torch.device("cpu"))
    plain_loop(recipe, model, optimizer, loss, prepare, repeated_aug=2)
    assert_near(train(recipe).load_checkpoint()["model"], model.state_dict())


def test_ema_is_timms_with_the_same_decay():
    model, ours = (models.create("test_resnet", 10, seed=1) for _ in range(2))
    theirs = timm.utils.ModelEmaV3(model, decay=0.9, use_warmup=False)
    theirs.update(model)  # its first update copies, ours starts as a copy
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for value in model.state_dict().values():
            value += torch.randn(value.shape, generator=generator).to(value.dtype)
        training.ema_update(ours, model, 0.9)
        theirs.update(model)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.module.state_dict()[name], msg=name)


# A model without batch statistics.
VIT = {**NO_NOISE, **ONE_EPOCH, "model": "test_vit", "precision": "fp32", "lr": 0.01}


@pytest.mark.parametrize(
    "options, size", [({}, 5), ({**STRIKES, "lr": 0.005}, 6)], ids=["plain", "strikes"]
)
def test_accumulated_parts_make_the_same_step_as_one_batch(tmp_path, float64, options, size):
    options = {**VIT, **options}
    whole = train(small(tmp_path / "whole", **options))
    parts = train(small(tmp_path / "parts", micro_batch_size=size, **options))
    np.testing.assert_allclose(whole.steps().loss, parts.steps().loss, rtol=1e-12)
    assert_near(parts.load_checkpoint()["model"], whole.load_checkpoint()["model"])


@pytest.mark.parametrize("options", [{}, STRIKES], ids=["plain", "strikes"])
@pytest.mark.slow  # of quick ones there is one each in test_distillation and test_transfer
def test_two_processes_follow_the_batches_of_one(tmp_path, float64, options):
    """torchrun with gloo; 324 images at 64 a step leave a last batch of 4, or 2 each."""
    options = {**VIT, **options, "batch_size": 64}
    one = train(small(tmp_path / "one", **options))
    recipe = small(tmp_path / "two", **options)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    script = tmp_path / "train.py"  # as -m workbench, in float64
    script.write_text("from conftest import in_float64\nfrom workbench.__main__ import main\n\n"
                      "in_float64()\nmain()\n")  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", str(script), "train", str(tmp_path / "recipe.yaml")]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    two = runs.Run(recipe.folder)
    assert two.environment()["processes"] == 2
    np.testing.assert_allclose(one.steps().loss, two.steps().loss, rtol=1e-12)
    assert (one.metrics().images == two.metrics().images).all()
    assert_near(two.load_checkpoint()["model"], one.load_checkpoint()["model"])
    ours, theirs = one.predictions("raw"), two.predictions("raw")
    assert (ours.file == theirs.file).all()  # every validation image once, in order
    np.testing.assert_allclose(ours.p_label, theirs.p_label, rtol=1e-6)  # saved in float32


# ---- how a training ends


def test_an_error_in_the_loops_body_does_not_lock_the_run_for_the_next_try(tmp_path):
    recipe = small(tmp_path)
    run = runs.Run(recipe.folder)
    rows = training.fit(recipe, run)  # stays alive, as in a notebook's traceback
    with pytest.raises(ZeroDivisionError):
        for row in rows:
            row["step"] / 0
    assert list(training.fit(recipe, run))[-1]["step"] == 33
    assert rows is not None


def test_ctrl_c_ends_at_the_next_step_and_the_process_lives(tmp_path):
    recipe = small(tmp_path)
    run, rows = runs.Run(recipe.folder), []
    handler = signal.getsignal(signal.SIGINT)
    for row in training.fit(recipe, run):
        rows.append(row)
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
    assert rows[-1]["step"] == 6
    assert "Ctrl-C" in run.status()["message"]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_stop_event_ends_a_training_in_a_thread(tmp_path):
    recipe, stop = small(tmp_path), threading.Event()
    run = runs.Run(recipe.folder)

    def loop():
        for row in training.fit(recipe, run, stop=stop):
            if row["step"] == 3:
                stop.set()

    thread = threading.Thread(target=loop)
    thread.start()
    thread.join(60)
    assert run.status()["state"] == "stopped" and run.status()["step"] == 4


def test_a_finished_run_trains_no_more_and_its_images_must_be_the_same(image_folder):
    places = {"data_dir": str(image_folder), "runs_dir": str(image_folder / "runs")}
    run = train(recipe := Recipe(dataset="files", **places, epochs=1, batch_size=6, workers=0))
    assert run.status()["message"].startswith("finished")
    written = lambda: {p.name: p.read_bytes() for p in run.path.iterdir() if p.stem != "lock"}
    before = written()
    assert list(training.fit(recipe, run)) == []
    assert written() == before
    extra = image_folder / "train" / "a" / "extra.png"
    shutil.copy(image_folder / "train" / "b" / "0.png", extra)
    with pytest.raises(runs.RunError, match="the data changed since"):
        train(recipe)
    assert run.status()["state"] == "finished"
    extra.unlink()
    shutil.rmtree(image_folder / "val")
    assert list(training.fit(recipe, run)) == [], "without its images a run stays finished"


def test_a_warmup_of_more_steps_than_the_training_is_refused(tmp_path):
    with pytest.raises(training.TrainingError, match="33 steps and the whole training 33"):
        train(small(tmp_path, warmup_epochs=0.0, warmup_steps=33))


# ---- what is recorded


def test_raw_and_ema_weights_are_both_evaluated_and_the_best_are_saved(undisturbed):
    predictions, metrics = undisturbed.predictions(), undisturbed.metrics()
    assert set(predictions.weights) == {"raw", "ema"}
    for weights, column in (("raw", "top1"), ("ema", "ema_top1")):
        part = predictions[predictions.weights == weights]
        assert len(part) == 500
        share = 100 * (part.label == part.class1).mean()
        assert share == pytest.approx(metrics[column].iloc[-1])
    assert not np.allclose(undisturbed.predictions("raw").p1, undisturbed.predictions("ema").p1)
    with safe_open(undisturbed.file("best.safetensors"), "pt") as file:
        assert float(file.metadata()["top1"]) == metrics[["top1", "ema_top1"]].max(axis=None)


def test_validation_runs_every_eval_every_epochs_and_at_the_end(tmp_path):
    metrics = train(small(tmp_path, epochs=5, eval_every=2)).metrics()
    assert metrics.top1.notna().tolist() == [False, True, False, True, True]


def test_the_record_names_recipe_versions_and_data(undisturbed):
    environment = json.loads(undisturbed.file("environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["train_images"] == 324
    assert environment["seconds"] > 0
    recipe = Recipe.from_yaml(undisturbed.file("recipe.yaml"))
    assert recipe == small(undisturbed.path.parent)
    assert environment["recipe"] == recipe.fingerprint


def test_the_rows_that_are_yielded_are_the_rows_that_are_written(tmp_path):
    recipe = small(tmp_path, epochs=2)
    run = runs.Run(recipe.folder)
    rows = list(training.fit(recipe, run))
    for kind, written in (("step", run.steps()), ("epoch", run.metrics())):
        yielded = pd.DataFrame([r for r in rows if r["kind"] == kind])
        pd.testing.assert_frame_equal(
            yielded.drop(columns=["kind", "steps"]), written, check_dtype=False, check_exact=True
        )


def test_large_validation_images_are_read_by_loaders_and_few_small_ones_are_not():
    def workers(count, side, cached=False):
        frame = pd.DataFrame({"width": [side] * count, "height": side})
        return training.eval_workers(3, frame, cached)

    assert workers(2000, 32) == 0 and workers(2001, 32) == 3
    assert workers(500, 400) == 0 and workers(700, 400) == 3
    assert workers(700, 400, cached=True) == 0
    assert training.eval_workers(3, pd.DataFrame({"file": ["a"] * 700})) == 0


def test_compile_without_a_compiler_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(training.TrainingError, match="needs a C.. compiler"):
        train(small(tmp_path, compile=True))


def test_two_images_of_one_file_name_are_both_quarantined(tmp_path):
    """Lists of different folders may share file names."""
    recipe, run = small(tmp_path), runs.Run(tmp_path / "run")
    dataset = data.load_dataset(recipe)
    dataset.val.loc[:1, "file"] = "same.png"
    state = TrainState(
        recipe, training.create_model(recipe, 10), dataset, DistContext(torch.device("cpu"))
    )
    with run.writing():
        writer = RunWriter(run, state, dataset, {})
        for _ in range(2):
            writer.quarantine("val", [(0, "missing", ""), (1, "missing", "")])
    assert run.quarantine().file.tolist() == ["same.png"] * 2
