"""Training: exact after any interruption, the plain loop it stands for, clear when it ends."""

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
from helpers import assert_same_run, fork_server, train
from torch.nn import functional as F

from workbench import augmentation, data, models, runs, training
from workbench.recipe import Recipe


def small(folder, **changes) -> Recipe:
    """Eleven steps an epoch on real digits, with everything on that could leak state."""
    options = {
        "train_fraction": 0.25,
        "epochs": 3,
        "image_size": 16,
        "val_resize": 16,
        "crop_scale": [0.5, 1.0],
        "hflip": 0.5,
        "brightness": 0.4,
        "hue": 0.1,
        "dropout": 0.2,
        "drop_path": 0.1,
        "ema_decay": 0.9,
        "label_smoothing": 0.1,
        "nesterov": True,
        "weight_decay": 1e-3,
        "warmup_epochs": 1.0,
        "clip_grad_norm": 1.0,
        "log_every": 1,
        "workers": 0,
        "runs_dir": str(folder),
    }
    return Recipe(**{**options, **changes})


# What ResNet strikes back adds, and whatever else draws random numbers.
STRIKES = {
    "optimizer": "lamb",
    "nesterov": False,
    "lr": 0.005,
    "weight_decay": 0.02,
    "loss": "bce",
    "bce_sum": True,
    "bce_shift": True,
    "randaug_n": 2,
    "autoaugment": True,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "mix_per_sample": True,
    "erase_prob": 0.5,
    "repeated_aug": 2,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> runs.Run:
    """The run of `small` that nothing stops."""
    return train(small(tmp_path_factory.mktemp("undisturbed")))


def _train_in_child(options):
    train(Recipe(**options))


def stood_at(run: runs.Run) -> int:
    try:
        lines = run.file("steps.csv").read_bytes().split(b"\n")[1:-1]
    except OSError:
        return 0
    return int(lines[-1].split(b",")[0]) if lines else 0


@pytest.mark.parametrize(
    ("checkpoint_minutes", "how", "options"),
    [
        # a checkpoint after every step: resumes in the middle of epochs
        pytest.param(0.0, "SIGKILL", {}, marks=pytest.mark.slow),
        # checkpoints at the ends of epochs: whole steps are done again
        pytest.param(10.0, "SIGKILL", {}, marks=pytest.mark.slow),
        pytest.param(0.0, "SIGKILL", STRIKES, marks=pytest.mark.slow),
        pytest.param(
            0.0, "SIGKILL", {"augment_on_device": True, "randaug_n": 2}, marks=pytest.mark.slow
        ),
        pytest.param(10.0, "SIGTERM", STRIKES, marks=pytest.mark.slow),
        pytest.param(10.0, "STOP", {}, marks=pytest.mark.slow),
    ],
)
def test_a_run_stopped_anywhere_ends_bit_for_bit_as_the_undisturbed_one(
    tmp_path, undisturbed, checkpoint_minutes, how, options
):
    if options:
        undisturbed = train(small(tmp_path / "undisturbed", **options))
    rng = random.Random(f"{checkpoint_minutes} {how}")
    stops, workers = 0, [0, 2, 1]
    for attempt in range(12):
        recipe = small(
            tmp_path / "disturbed",
            checkpoint_minutes=checkpoint_minutes,
            workers=workers[attempt % 3],  # another number after every resume
            cache=attempt % 2 == 1,  # and with a cache or without
            **options,
        )
        run = runs.Run(recipe.folder)
        child = fork_server.Process(target=_train_in_child, args=(recipe.model_dump(),))
        child.start()
        target = stood_at(run) + rng.randint(1, 6)
        if attempt >= 4 or target > 28:  # of 33: too near the end to be sure of being in time
            target = 10**9
        while child.is_alive() and stood_at(run) < target:
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
    assert child.exitcode == 0
    assert stops >= 3
    assert run.status()["state"] == "finished"
    assert_same_run(undisturbed, run)


def test_a_cache_changes_no_bit_of_a_run_and_is_used(tmp_path, image_folder, monkeypatch):
    """Images of 40 x 32 pixels, shrunk to 24 first."""
    options = {
        "dataset": "files", "data_dir": str(image_folder), "train_fraction": 1.0, "image_size": 16,
        "val_resize": 20, "train_resize": 24, "batch_size": 6, "precision": "fp32",
    }  # fmt: skip
    plain = train(small(tmp_path / "plain", **options))
    kept = {"cache": True, "cache_dir": str(tmp_path / "kept")}
    built = train(small(tmp_path / "built", **options, **kept))
    assert_same_run(plain, built)
    parts = list((tmp_path / "kept").glob("[!.]*"))
    assert len(parts) == 2  # a part each
    taken = sum(part.stat().st_size for part in parts)
    assert built.environment()["cache_mb"] == round(taken / 1e6, 3)
    assert "cache_mb" not in plain.environment() and plain.environment()["downscaled"] == 18

    read, look = [], data.images.open
    noting = lambda path: (read.append(path), look(path))[1]
    monkeypatch.setattr(data.images, "open", noting)
    recipe = small(tmp_path / "read", **options, **kept)
    assert_same_run(plain, train(recipe))
    assert len(read) == 2  # the first image of each part, to compare
    assert recipe.fingerprint == recipe.replace(cache=False, cache_dir="").fingerprint


def test_large_validation_images_are_read_by_loaders_and_few_small_ones_are_not():
    def chosen(count, side, cached=None):
        return training.eval_workers(
            3, pd.DataFrame({"width": [side] * count, "height": side}), cached
        )

    assert chosen(2000, 32) == 0 and chosen(2001, 32) == 3
    assert chosen(500, 400) == 0 and chosen(700, 400) == 3
    assert chosen(700, 400, cached=object()) == 0
    assert training.eval_workers(3, pd.DataFrame({"file": ["a"] * 700})) == 0


def test_leaving_the_loop_keeps_the_step_and_the_next_loop_goes_on(tmp_path, undisturbed):
    recipe = small(tmp_path / "left")
    run = runs.Run(recipe.folder)
    for limit in (4, 11, 17):  # inside an epoch, at the end of one, inside the next
        for row in training.fit(recipe, run):
            if row["kind"] == "step" and row["step"] == limit:
                break
        del row
        assert run.status()["state"] in ("stopped", "running")
    rows = list(training.fit(recipe, run))
    assert rows[0]["step"] == 18
    assert_same_run(undisturbed, run)


@pytest.mark.slow
def test_a_compiled_run_resumes_exactly(tmp_path):
    """A resume compiles the same kernels again, for the same shapes."""
    whole = train(small(tmp_path / "whole", compile=True))
    recipe = small(tmp_path / "left", compile=True)
    run = runs.Run(recipe.folder)
    for limit in (4, 17):  # inside the first epoch, inside the second
        for row in training.fit(recipe, run):
            if row["kind"] == "step" and row["step"] == limit:
                break
        del row
    list(training.fit(recipe, run))
    assert_same_run(whole, run)


def test_compile_without_a_compiler_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(training.TrainingError, match="needs a C.. compiler"):
        train(small(tmp_path, compile=True))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, STRIKES], ids=["plain", "strikes"])
def test_a_compiled_model_learns_as_the_eager_one(tmp_path, options):
    """Without dropout, whose random numbers a compiled kernel draws in another order."""
    options = {**options, "dropout": 0.0, "drop_path": 0.0, "epochs": 1, "warmup_epochs": 0.5}
    eager, compiled = (
        train(small(tmp_path / str(flag), **options, compile=flag)) for flag in (False, True)
    )
    first, second = (run.steps().loss for run in (eager, compiled))
    np.testing.assert_allclose(second[:3], first[:3], rtol=1e-4)
    np.testing.assert_allclose(second, first, rtol=2e-2)


def test_an_error_in_the_loops_body_does_not_lock_the_run_for_the_next_try(tmp_path):
    recipe = small(tmp_path)
    run = runs.Run(recipe.folder)
    rows = training.fit(recipe, run)
    with pytest.raises(ZeroDivisionError):
        for row in rows:
            row["step"] / 0
    kept_alive_by_a_traceback = rows
    assert list(training.fit(recipe, run))[-1]["step"] == 33
    assert kept_alive_by_a_traceback is not None


def test_a_finished_run_started_again_says_so_and_does_not_train(tmp_path):
    recipe = small(tmp_path, epochs=1, warmup_epochs=0.0)
    run = train(recipe)
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    assert list(training.fit(recipe, run)) == []
    assert run.status()["message"].startswith("finished")
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before


def test_ctrl_c_ends_at_the_next_step_and_the_process_lives(tmp_path):
    recipe = small(tmp_path)
    run = runs.Run(recipe.folder)
    handler = signal.getsignal(signal.SIGINT)
    rows = []
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
    assert run.status()["state"] == "stopped"
    assert run.status()["step"] == 4


def test_fit_is_the_plain_loop_it_stands_for(tmp_path, float64):
    """The same batches through textbook PyTorch give the same weights, up to rounding."""
    recipe = small(
        tmp_path,
        epochs=2,
        dropout=0.0,
        drop_path=0.0,
        ema_decay=None,
        clip_grad_norm=None,
        precision="fp32",
        warmup_epochs=0.0,
    )
    run = train(recipe)

    content = data.load_dataset(recipe)
    model = training.create_model(recipe, 10).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True
    )
    steps = 2 * 11
    mean, std = torch.tensor(recipe.mean) * 255, torch.tensor(recipe.std) * 255
    for batch in data.train_loader(
        content.train,
        training.train_transform(recipe),
        seed=0,
        batch_size=32,
        steps=range(steps),
    ):
        # cosine, half a period over all steps
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + np.cos(np.pi * batch.step / steps))
        images = (batch.images.float() - mean[:, None, None]) / std[:, None, None]
        logits = model(images.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits, batch.labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_near(run.load_checkpoint()["model"], model.state_dict())


def assert_near(ours, theirs, within=1e-10):
    """Equal in float64 but for the order of sums, relative to each tensor's largest element.

    22 steps make up to 3e-14 of it.
    """
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        allowed = within * value.abs().max().item()
        torch.testing.assert_close(ours[name], value, rtol=0, atol=allowed, msg=name)


def test_the_strikes_are_the_plain_loop_with_timms_lamb_and_timms_loss(tmp_path, float64):
    """Mixed and erased images as DeviceTransform gives them; the rest from timm and torch."""
    options = {**STRIKES, "bce_shift": False, "bce_threshold": 0.2}
    recipe = small(
        tmp_path,
        **options,
        epochs=1,
        dropout=0.0,
        drop_path=0.0,
        ema_decay=None,
        precision="fp32",
        warmup_epochs=0.0,
        label_smoothing=0.0,
    )
    run = train(recipe)
    content = data.load_dataset(recipe)
    model = training.create_model(recipe, 10).to(memory_format=torch.channels_last).train()
    optimizer = timm.optim.Lamb(model.parameters(), weight_decay=0.02, max_grad_norm=1.0)
    loss = timm.loss.BinaryCrossEntropy(0.0, target_threshold=0.2, sum_classes=True)
    prepare = training.DeviceTransform(recipe, 10, torch.device("cpu"))
    for batch in data.train_loader(
        content.train,
        training.train_transform(recipe),
        seed=0,
        batch_size=32,
        repeated_aug=2,
        steps=range(11),
    ):
        optimizer.param_groups[0]["lr"] = 0.0025 * (1 + np.cos(np.pi * batch.step / 11))
        images, targets = prepare(batch)
        loss(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_near(run.load_checkpoint()["model"], model.state_dict())


def test_ema_is_timms_with_the_same_decay():
    model = models.create("test_resnet", 10, seed=1)
    theirs = timm.utils.ModelEmaV3(model, decay=0.9, use_warmup=False)
    theirs.update(model)  # its first update copies, ours starts as a copy
    ours = models.create("test_resnet", 10, seed=1)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.randn(value.shape, generator=generator))
                else:
                    value.add_(1)
        training.ema_update(ours, model, 0.9)
        theirs.update(model)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.module.state_dict()[name], msg=name)


NO_BATCH_STATISTICS = {
    "model": "test_vit",
    "precision": "fp32",
    "dropout": 0.0,
    "drop_path": 0.0,
    "epochs": 1,
    "warmup_epochs": 0.0,
    "lr": 0.01,
}


@pytest.mark.parametrize("options", [{}, STRIKES], ids=["plain", "strikes"])
def test_accumulated_parts_make_the_same_step_as_one_batch(tmp_path, float64, options):
    options = {**options, **NO_BATCH_STATISTICS, "lr": options.get("lr", 0.01)}
    whole = train(small(tmp_path / "whole", **options))
    parts = train(
        small(tmp_path / "parts", micro_batch_size=6 if "loss" in options else 5, **options)
    )
    np.testing.assert_allclose(whole.steps().loss, parts.steps().loss, rtol=1e-12)
    assert_near(parts.load_checkpoint()["model"], whole.load_checkpoint()["model"])


@pytest.mark.parametrize("options", [{}, STRIKES], ids=["plain", "strikes"])
@pytest.mark.slow  # of quick ones there is one each in test_distillation and test_transfer
def test_two_processes_follow_the_batches_of_one(tmp_path, float64, options):
    """torchrun with gloo; 324 images at 64 a step leave a last batch of 4, or 2 each."""
    options = {**options, **NO_BATCH_STATISTICS, "lr": options.get("lr", 0.01), "batch_size": 64}
    one = train(small(tmp_path / "one", **options))
    recipe = small(tmp_path / "two", **options)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    script = tmp_path / "train.py"  # as -m workbench, in float64
    script.write_text("from conftest import in_float64\nfrom workbench.__main__ import main\n\n"
                      "in_float64()\nmain()\n")  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", str(script), "train", str(tmp_path / "recipe.yaml")]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    two = runs.Run(recipe.folder)
    assert two.environment()["processes"] == 2
    np.testing.assert_allclose(one.steps().loss, two.steps().loss, rtol=1e-12)
    assert (one.metrics().images == two.metrics().images).all()
    assert_near(two.load_checkpoint()["model"], one.load_checkpoint()["model"])
    ours, theirs = one.predictions("raw"), two.predictions("raw")
    assert (ours.file == theirs.file).all()  # every validation image once, in order
    np.testing.assert_allclose(ours.p_label, theirs.p_label, rtol=1e-6)  # kept in float32


# ---- the batch on the device


def prepared(options: dict, **how) -> list:
    """Batches of two steps and what DeviceTransform makes of each part."""
    recipe = Recipe(train_fraction=0.05, batch_size=24, crop_scale=[0.5, 1.0], **options)
    frame = data.load_dataset(recipe).train
    transform, device = training.train_transform(recipe), torch.device("cpu")
    how = {"seed": 0, "batch_size": 24, "steps": range(2), **how}
    prepare = training.DeviceTransform(recipe, 10, device)
    return [(batch, *prepare(batch)) for batch in data.train_loader(frame, transform, **how)]


ERASE_AND_MIX = {"erase_prob": 0.5, "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_per_sample": True}


@pytest.mark.parametrize(
    "how",
    [[{"micro_batch_size": 4}], [{"rank": r, "world": 3} for r in range(3)], [{"workers": 1}]],
    ids=["parts", "processes", "worker"],
)
def test_erasing_and_mixing_do_not_depend_on_how_a_step_is_shared_out(how):
    whole = {b.step: (images, targets) for b, images, targets in prepared(ERASE_AND_MIX)}
    count = 0
    for options in how:
        for batch, images, targets in prepared(ERASE_AND_MIX, **options):
            wanted_images, wanted_targets = whole[batch.step]
            assert torch.equal(images, wanted_images[batch.positions])
            assert torch.equal(targets, wanted_targets[batch.positions])
            count += len(images)
    assert count == 48


ALL_DRAWN = {"hflip": 0.5, "randaug_n": 2, "brightness": 0.4, "saturation": 0.4, "hue": 0.1}


@pytest.mark.parametrize("form", ["up", "timm"])
def test_augmenting_on_the_device_is_what_the_loaders_do(form):
    """The same draws by other code, which rounds otherwise."""
    there = prepared({**ALL_DRAWN, "randaug_variant": form, "augment_on_device": True})
    here = prepared({**ALL_DRAWN, "randaug_variant": form})
    normalize = training.Normalize(Recipe(), torch.device("cpu"))
    for (batch, ours, _), (_, theirs, _) in zip(there, here, strict=True):
        assert len(batch.aug_params) == 24 and {"flip", "randaug"} <= set(batch.aug_params[0])
        apart = (normalize.undo(ours).int() - normalize.undo(theirs).int()).abs().float()
        assert apart.mean() < 2.5 and apart.mean((1, 2, 3)).median() < 1


@pytest.mark.parametrize(
    "how",
    [[{"micro_batch_size": 4}], [{"rank": r, "world": 3} for r in range(3)], [{"workers": 1}]],
    ids=["parts", "processes", "worker"],
)
def test_augmenting_on_the_device_does_not_depend_on_how_a_step_is_shared_out(how):
    changes = {**ALL_DRAWN, **ERASE_AND_MIX, "augment_on_device": True}
    whole = {b.step: images for b, images, _ in prepared(changes)}
    for options in how:
        for batch, images, _ in prepared(changes, **options):
            assert torch.equal(images, whole[batch.step][batch.positions])


def test_images_are_normalised_then_erased_then_mixed():
    """An erased box of 0 is the mean colour, and a neighbour's box comes through the mix."""
    plain = prepared({})[0]
    erased = prepared({"erase_prob": 1.0, "erase_mode": "const"})[0]
    both = prepared({"erase_prob": 1.0, "erase_mode": "const", "mixup_alpha": 0.8})[0]
    boxes = erased[1] != plain[1]
    assert not erased[1][boxes].any() and 0.01 < boxes.float().mean() < 0.4
    lam = data.rng_for(0, data.MIX, 0)
    lam = augmentation.MixupCutmix(0.8).sample_params(lam, 24, 32)["lam"][0]
    neighbour = erased[1].view(12, 2, 3, 32, 32).flip(1).reshape(24, 3, 32, 32)
    torch.testing.assert_close(both[1], (lam * erased[1] + (1 - lam) * neighbour).float())


def test_targets_are_class_numbers_until_something_mixes_them():
    batch, _, targets = prepared({"erase_prob": 0.5})[0]
    assert torch.equal(targets, batch.labels)
    batch, _, targets = prepared(ERASE_AND_MIX)[0]
    assert targets.shape == (24, 10) and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(24))


def test_the_images_that_are_shown_are_those_of_the_first_step():
    recipe = Recipe(**ERASE_AND_MIX, batch_size=64, randaug_n=2)
    content = data.load_dataset(recipe)
    images, targets = training.preview_batch(recipe, content, 24)
    reader = data.train_loader(
        content.train, training.train_transform(recipe), seed=0, batch_size=64, steps=range(1)
    )
    prepare = training.DeviceTransform(recipe, 10, torch.device("cpu"))
    whole, soft = prepare(next(reader))
    assert torch.equal(images, whole[:24]) and torch.equal(targets, soft[:24])


def test_undoing_the_normalisation_gives_the_pixels_back():
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    normalize = training.Normalize(Recipe(), torch.device("cpu"))
    assert torch.equal(normalize.undo(normalize(pixels)), pixels.permute(0, 2, 3, 1))


def test_every_step_draws_anew():
    first, second = ({x.item() for x in t.unique()} for _, _, t in prepared({"mixup_alpha": 0.8}))
    assert first & second == {0.0, 1.0}  # 1 where neighbours share their class


def test_a_warmup_of_more_steps_than_the_training_is_refused(tmp_path):
    recipe = small(tmp_path, warmup_epochs=0.0, warmup_steps=33)
    with pytest.raises(training.TrainingError, match="33 steps and the whole training 33"):
        train(recipe)


def test_no_decay_leaves_norms_and_biases_alone():
    recipe = Recipe(weight_decay=0.5, decay_norm_and_bias=False, lr=0.1)
    model = training.create_model(recipe, 10)
    before = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = training.create_optimizer(recipe, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if value.ndim > 1 else 1.0
        torch.testing.assert_close(value, before[name] * factor, msg=name)


def test_no_decay_spares_the_tables_a_model_names():
    recipe = Recipe(model="test_vit", image_size=160, val_resize=160, weight_decay=0.5,
                    decay_norm_and_bias=False)  # fmt: skip
    model = training.create_model(recipe, 10)
    spared = {id(p) for p in training.create_optimizer(recipe, model).param_groups[1]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in spared}
    assert {"pos_embed", "cls_token"} & names == model.no_weight_decay() & set(
        dict(model.named_parameters())
    )
    assert all(p.ndim <= 1 or n in model.no_weight_decay() for n, p in model.named_parameters()
               if n in names)  # fmt: skip


def test_lamb_clips_once_and_inside_its_step(tmp_path):
    recipe = small(tmp_path, **STRIKES)
    optimizer = training.create_optimizer(recipe, training.create_model(recipe, 10))
    assert optimizer.max_grad_norm == recipe.clip_grad_norm == 1.0
    free = training.create_optimizer(
        recipe.replace(clip_grad_norm=None, trust_clip=True), training.create_model(recipe, 10)
    )
    assert free.max_grad_norm is None and free.param_groups[0]["trust_clip"]


def test_raw_and_ema_weights_are_both_evaluated_and_differ(tmp_path):
    run = train(small(tmp_path, epochs=1, warmup_epochs=0.0))
    predictions = run.predictions()
    assert set(predictions.weights) == {"raw", "ema"}
    for weights, column in (("raw", "top1"), ("ema", "ema_top1")):
        part = predictions[predictions.weights == weights]
        assert len(part) == 500
        share = 100 * (part.label == part.class1).mean()
        assert share == pytest.approx(run.metrics()[column].iloc[-1])
    assert not np.allclose(run.predictions("raw").p1, run.predictions("ema").p1)


def test_best_weights_are_those_of_the_best_validated_epoch(tmp_path):
    run = train(small(tmp_path))
    from safetensors import safe_open

    with safe_open(run.file("best.safetensors"), "pt") as file:
        best = file.metadata()
    metrics = run.metrics()
    assert float(best["top1"]) == max(metrics.top1.max(), metrics.ema_top1.max())


def test_the_global_seed_before_training_changes_nothing(tmp_path):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  the very thing that must not matter
    one = train(small(tmp_path / "one", epochs=1, warmup_epochs=0.0))
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert_same_run(one, train(small(tmp_path / "two", epochs=1, warmup_epochs=0.0)))


def test_another_seed_is_another_training(tmp_path):
    one = train(small(tmp_path, epochs=1, warmup_epochs=0.0))
    two = train(small(tmp_path, epochs=1, warmup_epochs=0.0, seed=1))
    assert one.path != two.path
    assert one.steps().loss[0] != two.steps().loss[0]


def test_validation_runs_when_it_was_asked_for_and_at_the_end(tmp_path):
    metrics = train(small(tmp_path, epochs=5, eval_every=2)).metrics()
    assert metrics.top1.notna().tolist() == [False, True, False, True, True]


def test_the_record_says_what_trained_where_on_what(tmp_path):
    recipe = small(tmp_path, epochs=1, warmup_epochs=0.0)
    run = train(recipe)
    environment = json.loads(run.file("environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["train_images"] == 324
    assert environment["seconds"] > 0
    assert environment["recipe"] == recipe.fingerprint
    assert Recipe.from_yaml(run.file("recipe.yaml")) == recipe


def test_the_rows_that_are_yielded_are_the_rows_that_are_written(tmp_path):
    recipe = small(tmp_path, epochs=2)
    run = runs.Run(recipe.folder)
    rows = list(training.fit(recipe, run))
    for kind, written in (("step", run.steps()), ("epoch", run.metrics())):
        yielded = pd.DataFrame([r for r in rows if r["kind"] == kind])
        pd.testing.assert_frame_equal(
            yielded.drop(columns=["kind", "steps"]), written, check_dtype=False, check_exact=True
        )


def test_a_finished_run_says_when_its_images_have_changed_since(image_folder):
    recipe = Recipe(dataset="files", data_dir=str(image_folder),
                    runs_dir=str(image_folder / "runs"),
                    epochs=1, batch_size=6, workers=0)  # fmt: skip
    run = runs.Run(recipe.folder)
    list(training.fit(recipe, run))
    assert list(training.fit(recipe, run)) == []
    extra = image_folder / "train" / "a" / "extra.png"
    shutil.copy(image_folder / "train" / "b" / "0.png", extra)
    with pytest.raises(runs.RunError, match="have changed since: 19 for training .* 18 and 6 then"):
        list(training.fit(recipe, run))
    assert run.status()["state"] == "finished"
    extra.unlink()
    assert list(training.fit(recipe, run)) == []
    shutil.rmtree(image_folder / "val")
    assert list(training.fit(recipe, run)) == [], "a run whose image_folder are gone stays finished"
