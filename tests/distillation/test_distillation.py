"""Distillation against plain loops: teachers, adapters, exact resume, and the logit cache.

The teacher was trained at 24 pixels with another normalisation than its students.
"""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import socket
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, in_float64, save_noise
from helpers import assert_same_tensors, fork_server, train
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import _builder
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from workbench import data, distillation, models, runs, training
from workbench.distillation import Distillation, DistillationError
from workbench.distillation import losses as kd_losses
from workbench.distillation.student import create_adapter
from workbench.evaluation import inference
from workbench.models import ModelError
from workbench.recipe import Recipe, input_options
from workbench.runs import RunError
from workbench.training import TrainingError, build

CPU = torch.device("cpu")
DIGITS = [str(i) for i in range(10)]
STEPS = 6  # an epoch: 324 images, 60 at a time, the last 24


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty logit cache for every test."""
    monkeypatch.setattr(distillation.logit_cache, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "teachers"


OWN = {"image_size": 24, "val_resize": 24, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.35]}


@pytest.fixture(scope="module")
def school(tmp_path_factory) -> Path:
    """runs/teacher-seed0, a run with EMA, and wide.safetensors, a resnet10t nobody trained."""
    folder = tmp_path_factory.mktemp("school")
    options = {
        "train_fraction": 0.25,
        "epochs": 3,
        "lr": 0.05,
        "ema_decay": 0.5,
        "workers": 0,
        **OWN,
    }
    train(Recipe(name="teacher", runs_dir=str(folder / "runs"), eval_every=3, **options))
    save_file(models.create("resnet10t", 10, seed=7).state_dict(), folder / "wide.safetensors")
    return folder


def pupil(school: Path, folder: Path, teachers: str = "run", **changes) -> Recipe:
    """Two epochs of six steps on real digits. `teachers` are run, wide or both."""
    sources = {"run": school / "runs" / "teacher-seed0", "wide": school / "wide.safetensors"}
    names = {"run": "", "wide": "resnet10t"}
    options = {
        "train_fraction": 0.25,
        "epochs": 2,
        "batch_size": 60,
        "crop_scale": [0.5, 1.0],
        "hflip": 0.5,
        "lr": 0.05,
        "nesterov": True,
        "weight_decay": 1e-3,
        "eval_every": 2,
        "log_every": 1,
        "image_size": 16,
        "val_resize": 16,
        "workers": 0,
        "runs_dir": str(folder),
        "teacher": [str(sources[t]) for t in teachers.split()],
        "teacher_model": [names[t] for t in teachers.split()] if "wide" in teachers else [],
        "kd_loss": ["kl"],
        "temperature": 4.0,
    }
    options |= changes
    if not set(options["kd_loss"]) & {"kl", "dkd", "dist"}:
        del options["temperature"]
    return Recipe(**options)


MODULES = {  # with the wide teacher: equal shapes there are none
    "distill_pairs": ["logits", "layer1 -> layer1", "global_pool -> global_pool"],
    "kd_loss": ["kl", "l2", "l2_normalized"],
}
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_per_sample": True, "erase_prob": 0.5}


def student_of(recipe: Recipe, **options) -> Distillation:
    """The recipe's distillation, its student at its initial weights."""
    model = training.create_model(recipe, 10).train()
    return Distillation(recipe, model, DIGITS, CPU, **options)


def batches_of(recipe: Recipe, steps: range) -> list[tuple[torch.Tensor, torch.Tensor, data.Batch]]:
    """Images and targets as the student gets them, and the batch they were made of."""
    content = data.load_dataset(recipe)
    prepare = training.DeviceTransform(recipe, 10, CPU)
    reader = data.train_loader(
        content.train,
        training.train_transform(recipe),
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        steps=steps,
        micro_batch_size=recipe.micro_batch_size,
        drop_last=recipe.drop_last,
        repeated_aug=recipe.repeated_aug,
        class_balanced_sampling=recipe.class_balanced_sampling,
    )
    return [(*prepare(batch), batch) for batch in reader]


def opened(school: Path) -> nn.Module:
    """The teacher of the run, put together by hand."""
    model = models.create("test_resnet", 10)
    model.load_state_dict(runs.Run(school / "runs/teacher-seed0").load_checkpoint()["ema"])
    return model.eval()


def wide(school: Path) -> nn.Module:
    model = models.create("resnet10t", 10)
    model.load_state_dict(load_file(school / "wide.safetensors"))
    return model.eval()


def assert_same_run(one: runs.Run, other: runs.Run):
    """Weights, EMA, adapters, every momentum, every row: the same bits."""
    first, second = one.load_checkpoint(), other.load_checkpoint()
    for part in ("model", "ema", "adapters"):
        assert (first[part] is None) == (second[part] is None)
        assert_same_tensors(first[part] or {}, second[part] or {})
    moments = [
        {(i, k): v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
        for state in (first, second)
    ]
    learns = len(list(models.create("test_resnet", 10).parameters())) + len(first["adapters"])
    assert len(moments[0]) == learns  # a momentum for every one of them
    assert_same_tensors(*moments)
    assert one.file("metrics.csv").read_bytes() == other.file("metrics.csv").read_bytes()
    ignore = ["seconds", "data_wait", *(f"{x}images_per_second" for x in ("", "loader_", "model_"))]
    pd.testing.assert_frame_equal(
        one.steps().drop(columns=ignore), other.steps().drop(columns=ignore), check_exact=True
    )
    pd.testing.assert_frame_equal(one.predictions(), other.predictions(), check_exact=True)


# ---- teachers


def weights_file(folder: Path, kind: str, state: dict) -> Path:
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "t.safetensors")
        return folder / "t.safetensors"
    torch.save({"model": state} if kind == "model" else state, folder / "t.pt")
    return folder / "t.pt"


@pytest.mark.parametrize("kind", ["safetensors", "plain", "model"])
def test_weights_file_is_opened_with_the_students_inputs(school, tmp_path, kind):
    theirs = opened(school)
    path = weights_file(tmp_path, kind, theirs.state_dict())
    recipe = pupil(school, tmp_path, teacher=[str(path)], teacher_model=["test_resnet"])
    (teacher,) = distillation.open_teachers(recipe, DIGITS)
    assert_same_tensors(dict(teacher.model.state_dict()), with_counters(teacher, theirs))
    assert (teacher.image_size, teacher.mean, teacher.std) == (16, recipe.mean, recipe.std)
    assert teacher.top1 is None
    images = batches_of(recipe, range(1))[0][0]
    assert teacher.preprocess(images, recipe.mean, recipe.std) is images
    answer = student_of(recipe).teacher_outputs(images)[0].logits
    torch.testing.assert_close(answer, theirs(images), rtol=1e-5, atol=1e-5)  # another layout


def with_counters(teacher, model: nn.Module) -> dict:
    """A model's tensors, with the counters of batches that a teacher has no use for."""
    own = teacher.model.state_dict()
    return {k: own[k] if "num_batches" in k else v for k, v in model.state_dict().items()}


def test_run_folder_is_opened_with_its_ema_weights_and_image_size(school, tmp_path):
    (teacher,) = distillation.open_teachers(pupil(school, tmp_path), DIGITS)
    assert_same_tensors(dict(teacher.model.state_dict()), with_counters(teacher, opened(school)))
    assert (teacher.image_size, teacher.mean, teacher.std) == (24, OWN["mean"], OWN["std"])
    run = runs.Run(school / "runs/teacher-seed0")
    assert teacher.top1 == run.metrics().ema_top1.iloc[-1] > 50
    assert teacher.measured == run.choose_weights()[1]
    assert (teacher.loss, teacher.smoothing, teacher.weight) == ("ce", 0.0, 1.0)
    assert teacher.state == "finished"


def test_run_of_a_resnet_variant_keeps_its_flags(school, tmp_path):
    options = dict(
        model="resnet18", deep_stem=True, avg_down=True, train_fraction=0.05, batch_size=13
    )
    recipe = Recipe(name="deep", runs_dir=str(tmp_path), epochs=1, workers=0, **options)
    run = train(recipe)
    recipe = pupil(school, tmp_path, teacher=[str(run.path)])
    (teacher,) = distillation.open_teachers(recipe, DIGITS)
    weights = run.load_checkpoint()["model"]
    assert teacher.model.state_dict().keys() == weights.keys()
    assert torch.equal(teacher.model.conv1[0].weight, weights["conv1.0.weight"])


def test_timm_name_is_opened_with_the_published_weights(school, tmp_path, monkeypatch):
    published = models.create("resnet10t", 1000, seed=3)
    asked = []
    monkeypatch.setattr(
        _builder,
        "load_state_dict_from_hf",
        lambda name, **_: asked.append(name) or dict(published.state_dict()),
    )
    recipe = pupil(school, tmp_path, teacher=["resnet10t.c3_in1k"], mean=[0.1] * 3, std=[0.9] * 3)
    (teacher,) = distillation.open_teachers(recipe, [str(i) for i in range(1000)])
    assert asked == ["timm/resnet10t.c3_in1k"]
    assert_same_tensors(dict(teacher.model.state_dict()), dict(published.state_dict()))
    assert teacher.image_size == 176  # as timm publishes it; the rest is ImageNet's
    assert (teacher.mean, teacher.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_each_teacher_has_its_weight_size_and_normalisation(school, tmp_path):
    own = {
        "teacher_weight": [0.25, 3.0],
        "teacher_image_size": [48, 16],
        "teacher_mean": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        "teacher_std": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
    }
    found = distillation.open_teachers(pupil(school, tmp_path, "run wide", **own), DIGITS)
    assert [t.weight for t in found] == [0.25, 3.0]
    assert [t.image_size for t in found] == [48, 16]
    assert [t.mean for t in found] == [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    assert [t.std for t in found] == [[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]]
    assert [t.name for t in found] == ["test_resnet", "resnet10t"]
    one = {key: values[: len(values) // 2] for key, values in own.items()}
    found = distillation.open_teachers(pupil(school, tmp_path, "run wide", **one), DIGITS)
    assert {(t.weight, t.image_size, *t.mean, *t.std) for t in found} == {
        (0.25, 48, 0.1, 0.2, 0.3, 0.9, 0.8, 0.7)
    }


def pil_resize(images: np.ndarray, size: int) -> torch.Tensor:
    """Pillow's bilinear resize, antialiased, of float planes (n, 3, h, w)."""
    planes = [
        Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR)
        for plane in images.reshape(-1, *images.shape[2:]).astype(np.float32)
    ]
    return torch.from_numpy(np.stack(planes)).reshape(*images.shape[:2], size, size)


@pytest.mark.parametrize("size", [20, 32, 45])
def test_preprocess_equals_normalising_and_resizing_the_raw_image(size):
    raw = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    recipe = Recipe(mean=[0.1, 0.5, 0.9], std=[0.2, 0.3, 0.4])
    images = training.Normalize(recipe, CPU)(torch.from_numpy(raw))
    mean, std = [0.6, 0.5, 0.25], [1.0, 0.5, 0.3]
    teacher = distillation.Teacher("t", "t", nn.Identity(), size, mean, std)
    wanted = (raw / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    seen = teacher.preprocess(images, recipe.mean, recipe.std)
    torch.testing.assert_close(seen, pil_resize(wanted, size), rtol=1e-4, atol=1e-4)
    mix = 0.3 * images + 0.7 * images.flip(0)  # what is mixed stays the same mix
    torch.testing.assert_close(
        teacher.preprocess(mix, recipe.mean, recipe.std),
        0.3 * seen + 0.7 * seen.flip(0),
        rtol=1e-4,
        atol=1e-5,
    )
    # One option that differs is enough.
    for m, s in ((recipe.mean, std), (mean, recipe.std)):
        teacher = distillation.Teacher("t", "t", nn.Identity(), 32, m, s)
        wanted = (raw / 255 - np.reshape(m, (3, 1, 1))) / np.reshape(s, (3, 1, 1))
        torch.testing.assert_close(
            teacher.preprocess(images, recipe.mean, recipe.std),
            torch.from_numpy(wanted).float(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_teacher_adapter_is_a_model_of_the_students_images(school, tmp_path):
    recipe = pupil(school, tmp_path)
    kd = student_of(recipe)
    images = batches_of(recipe, range(1))[0][0]
    seeing = distillation.TeacherAdapter(kd.teachers[0], recipe)
    assert torch.equal(seeing(images), kd.teacher_outputs(images)[0].logits)
    assert seeing(images).shape == (60, 10)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_teachers_are_frozen_in_eval_mode_and_the_precision_of_the_run(
    school, tmp_path, precision, monkeypatch
):
    heard, kept = [], []

    def listening(recipe, classes):
        found = open_teachers(recipe, classes)
        for teacher in found:
            kept.append((teacher.model, {k: v.clone() for k, v in state(teacher).items()}))
            teacher.model.conv1.register_forward_hook(
                lambda module, given, out: heard.append(
                    (out.dtype, out.requires_grad, module.training, torch.is_grad_enabled())
                )
            )
        return found

    state = lambda teacher: teacher.model.state_dict()
    open_teachers = distillation.open_teachers
    monkeypatch.setattr(distillation.student, "open_teachers", listening)
    train(pupil(school, tmp_path, "run wide", precision=precision, epochs=1, eval_every=1))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    heard.reverse()
    assert set(heard[: 2 * STEPS]) == {(dtype, False, False, False)}
    assert len(heard) == 2 * STEPS
    assert len(kept) == 2
    for model, before in kept:
        assert_same_tensors(dict(model.state_dict()), before)
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_environment_has_the_teachers_and_digests_of_their_weights(school, tmp_path):
    run = train(pupil(school, tmp_path, "run wide", epochs=1, eval_every=1))
    first, second = run.environment()["teachers"]
    assert first["source"] == str(school / "runs" / "teacher-seed0")
    assert (first["model"], first["image_size"]) == ("test_resnet", 24)
    assert (second["model"], second["image_size"]) == ("resnet10t", 16)
    assert first["parameters"] == sum(p.numel() for p in opened(school).parameters())
    assert first["top1"] > 50 and second["top1"] is None
    assert len(first["digest"]) == len(second["digest"]) == 12
    assert first["digest"] != second["digest"]


# ---- a step


def by_hand_view(images: torch.Tensor, recipe: Recipe, size: int, mean, std) -> torch.Tensor:
    column = lambda values: torch.tensor(values)[:, None, None]
    pixels = images * column(recipe.std) + column(recipe.mean)
    return TF.resize((pixels - column(mean)) / column(std), [size, size], antialias=True)


def by_hand_kl(t: float):
    return lambda s, z, labels: (
        t * t * F.kl_div((s / t).log_softmax(1), (z / t).softmax(1), reduction="batchmean")
    )


def by_hand_l2(s, z, labels):
    return ((s - z) ** 2).mean()


def by_hand_l2_normalized(s, z, labels):
    return (2 - 2 * F.cosine_similarity(s.flatten(1), z.flatten(1))).mean()


@contextlib.contextmanager
def hooked(model: nn.Module, names: list[str]):
    """What modules gave before anything changed it in place."""
    said = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(
            lambda module, given, out, n=n: said.update({n: out.clone()})
        )
        for n in names
        if n != "logits"
    ]
    yield said
    for hook in hooks:
        hook.remove()


# name -> teachers, options, (student's, teacher's, which teacher, weight, loss), share of the ramp
LOOPS = {
    "logits": (
        "run",
        dict(teacher_weight=[0.5], kd_weight=[3.0], task_weight=0.3, temperature=4.0),
        [("logits", "logits", 0, 1.5, by_hand_kl(4.0))],
        lambda step: 1.0,
    ),
    "the teacher alone, slowly": (
        "run",
        dict(task_weight=0.0, kd_warmup_epochs=0.5, temperature=1.0),
        [("logits", "logits", 0, 1.0, by_hand_kl(1.0))],
        lambda step: min(1.0, step / 3),
    ),
    "two teachers of mixed images": (
        "run wide",
        dict(teacher_weight=[1.0, 0.5], kd_loss=["dkd"], dkd_beta=2.0, temperature=2.0, **MIXED),
        [
            (
                "logits",
                "logits",
                k,
                weight,
                lambda s, z, labels: kd_losses.dkd(s, z, labels, 2.0, 2.0),
            )
            for k, weight in ((0, 1.0), (1, 0.5))
        ],
        lambda step: 1.0,
    ),
    "two mimics": (
        "run",
        dict(
            distill_pairs=["logits", "logits -> logits"],
            kd_loss=["kl", "l2"],
            kd_weight=[1.0, 0.1],
            temperature=2.0,
            micro_batch_size=16,
        ),
        [
            ("logits", "logits", 0, 1.0, by_hand_kl(2.0)),
            ("logits", "logits", 0, 0.1, by_hand_l2),
        ],
        lambda step: 1.0,
    ),
    "modules of two teachers": (
        "run wide",
        dict(
            teacher_image_size=[16],
            teacher_weight=[2.0, 1.0],
            distill_pairs=[
                "logits -> teacher1:logits",
                "bn1 -> teacher1:bn1",  # what comes next works in place
                "layer1 -> teacher2:layer1",
                "global_pool -> teacher2:global_pool",
            ],
            kd_loss=["kl", "l2", "l2", "l2_normalized"],
            kd_weight=[1.0, 0.5, 0.3, 0.7],
            clip_grad_norm=0.5,
        ),
        [
            ("logits", "logits", 0, 2.0, by_hand_kl(4.0)),
            ("bn1", "bn1", 0, 1.0, by_hand_l2),
            ("layer1", "layer1", 1, 0.3, by_hand_l2),
            ("global_pool", "global_pool", 1, 0.7, by_hand_l2_normalized),
        ],
        lambda step: 1.0,
    ),
}


QUICK = {"logits"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c not in QUICK else []) for c in LOOPS]
)
def test_distillation_equals_a_plain_loop(school, tmp_path, float64, case):
    """The same batches through textbook PyTorch give the same losses and weights."""
    teachers, options, pairs, share = LOOPS[case]
    how = dict(epochs=1, eval_every=1, precision="fp32", lr=0.01)
    recipe = pupil(school, tmp_path, teachers, **how, **options)
    run = train(recipe)

    size = 16 if recipe.teacher_image_size else 24
    views = [
        (opened(school), size, OWN["mean"], OWN["std"]),
        (wide(school), 16, recipe.mean, recipe.std),
    ]
    model = training.create_model(recipe, 10).to(memory_format=torch.channels_last).train()
    adapters = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for i, (ours, _, k, _, _) in enumerate(pairs):
            if k == 1 and ours == "layer1":
                adapters[i] = nn.Conv2d(32, 64, 1)
            if k == 1 and ours == "global_pool":
                adapters[i] = nn.Linear(96, 512)
    adapters_start = {
        f"{i}.{k}": v.clone() for i, a in adapters.items() for k, v in a.state_dict().items()
    }
    start = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = [*model.parameters(), *(p for a in adapters.values() for p in a.parameters())]
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)

    steps, rows = recipe.epochs * STEPS, []
    task = taught = 0.0
    for images, targets, batch in batches_of(recipe, range(steps)):
        # cosine, half a period over all steps
        optimizer.param_groups[0]["lr"] = 0.005 * (1 + np.cos(np.pi * batch.step / steps))
        with hooked(model, [ours for ours, *_ in pairs]) as ours:
            ours["logits"] = model(images)
        part = len(images) / batch.global_size  # of the step, where it comes in parts
        mean = F.cross_entropy(ours["logits"], targets)
        compared = 0.0
        for i, (name, their_name, k, weight, loss) in enumerate(pairs):
            teacher, *view = views[k]
            with torch.no_grad(), hooked(teacher, [their_name]) as theirs:
                theirs["logits"] = teacher(by_hand_view(images, recipe, *view))
            adapted = adapters.get(i, nn.Identity())(ours[name])
            compared = compared + weight * loss(adapted, theirs[their_name], targets)
        (part * (recipe.task_weight * mean + share(batch.step) * compared)).backward()
        task, taught = task + part * mean.item(), taught + part * compared.item()
        if batch.is_last:
            rows.append((task, taught))
            task = taught = 0.0
            if recipe.clip_grad_norm:
                nn.utils.clip_grad_norm_(parameters, recipe.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    table = run.steps()
    apart = table[["task_loss", "kd_loss"]]
    np.testing.assert_allclose(apart, rows, rtol=1e-10)
    ramp = np.array([share(step) for step in range(steps)])
    whole = recipe.task_weight * table.task_loss + ramp * table.kd_loss
    np.testing.assert_allclose(table.loss, whole, rtol=1e-12)
    metrics = run.metrics()
    images = np.array([60] * 5 + [24])
    for column in ("task_loss", "kd_loss", "loss"):
        epochs = table[column].to_numpy().reshape(-1, STEPS) @ images / 324
        np.testing.assert_allclose(metrics[f"train_{column}"], epochs, rtol=1e-12)
    state = run.load_checkpoint()
    assert_near(state["model"], model.state_dict(), start)
    wanted = {f"{i}.{k}": v for i, a in adapters.items() for k, v in a.state_dict().items()}
    assert_near(state["adapters"], wanted, adapters_start)


def assert_near(ours, theirs, start):
    """Equal in float64 but for the order of sums, relative to the way from the start.

    Six steps make up to 3e-13 of it.
    """
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        way = (value - start[name]).abs().max().item()
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-9 * way, msg=name)


def test_teacher_gets_the_students_batch_mixed_and_erased(school, tmp_path, monkeypatch):
    seen = {"student": [], "teacher": []}
    path = weights_file(tmp_path, "plain", opened(school).state_dict())

    def listening(make, who):
        def made(*args):
            found = make(*args)
            model = found if who == "student" else found[0].model
            model.register_forward_pre_hook(
                lambda module, given: (
                    seen[who].append(given[0].clone())
                    if module.training == (who == "student") and len(given[0]) > 1
                    else None
                )
            )
            return found

        return made

    for place, name, who in (
        (training.build, "create_model", "student"),
        (distillation.student, "open_teachers", "teacher"),
    ):
        monkeypatch.setattr(place, name, listening(getattr(place, name), who))
    files = {"teacher": [str(path)], "teacher_model": ["test_resnet"]}
    recipe = pupil(school, tmp_path, epochs=1, eval_every=1, **files, **MIXED)
    train(recipe)
    wanted = [images for images, _, _ in batches_of(recipe, range(STEPS))]
    assert len(seen["student"]) == len(seen["teacher"]) == STEPS
    for ours, theirs, images in zip(seen["student"], seen["teacher"], wanted, strict=True):
        assert torch.equal(ours, images) and torch.equal(theirs, images)
    plain = [i for i, _, _ in batches_of(recipe.replace(erase_prob=0.0), range(STEPS))]
    unmixed = recipe.replace(mixup_alpha=0.0, cutmix_alpha=0.0, mix_per_sample=False)
    plain += [i for i, _, _ in batches_of(unmixed, range(STEPS))]
    assert not any(torch.equal(a, b) for a, b in zip(wanted * 2, plain, strict=True))


def test_student_that_equals_its_teacher_learns_nothing(school, tmp_path):
    """Without batch statistics, which differ between training and evaluation."""
    weights = models.create("test_convnext", 10, seed=1).state_dict()
    save_file(weights, tmp_path / "t.safetensors")
    options = dict(teacher=[str(tmp_path / "t.safetensors")], teacher_model=["test_convnext"])
    options |= dict(model="test_convnext", image_size=32, val_resize=32, precision="fp32")
    options |= dict(task_weight=0.0, weight_decay=0.0)
    same = train(pupil(school, tmp_path, weights=str(tmp_path / "t.safetensors"), **options))
    assert same.steps().kd_loss.abs().max() < 1e-6
    for name, value in same.load_checkpoint()["model"].items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-4, msg=name)
    other = train(pupil(school, tmp_path / "other", **options))
    assert other.steps().kd_loss[0] > 1e-3
    assert other.steps().kd_loss.iloc[-2] < other.steps().kd_loss[0]


@pytest.mark.parametrize(
    "options",
    [
        dict(task_weight=0.0, kd_warmup_epochs=1.0),
        dict(teacher_weight=[2.0], teacher_image_size=[48], teacher_mean=[0.5] * 3),
        dict(
            teacher_std=[0.5] * 3, cache_teacher_logits=True, kd_weight=[2.0], label_smoothing=0.1
        ),
        dict(distill_pairs=["logits", "fc -> fc"], kd_loss=["dkd", "l2"], dkd_beta=2.0, lr=0.01),
        dict(teacher_model=["resnet18"]),
    ],
)
def test_without_teacher_removes_all_distillation_options(school, tmp_path, options):
    plain = {k: v for k, v in options.items() if k in ("lr", "label_smoothing")}
    recipe = pupil(school, tmp_path, name="kd", **options)
    alone = distillation.without_teacher(recipe)
    assert alone.name == "kd_alone"
    fields = pupil(school, tmp_path).non_default()
    base = Recipe(
        **{
            k: v
            for k, v in fields.items()
            if not k.startswith(("teach", "distill_pairs", "kd_", "temp"))
        }
    )
    assert alone.fingerprint == base.replace(**plain).fingerprint != recipe.fingerprint


# ---- features


def test_adapters_exist_only_where_channels_differ(school, tmp_path):
    adapters = student_of(pupil(school, tmp_path, "wide", **MODULES)).student.adapters
    shapes = {name: tuple(module.weight.shape) for name, module in adapters.named_children()}
    assert shapes == {"1": (64, 32, 1, 1), "2": (512, 96)}  # by the index of the pair
    assert isinstance(adapters["1"], nn.Conv2d) and isinstance(adapters["2"], nn.Linear)
    same = dict(
        distill_pairs=["layer1 -> layer1", "fc -> fc"], kd_loss=["l2"], teacher_image_size=[16]
    )
    assert len(student_of(pupil(school, tmp_path, **same)).student.adapters) == 0


def test_adapter_of_channels_last_maps_is_linear():
    """Swin's maps are (h, w, C)."""
    pair = distillation.DistillPair("layers.3", "layers.3", 0, 1.0, None)
    adapter = create_adapter(pair, (7, 7, 768), (7, 7, 1024))
    assert isinstance(adapter, nn.Linear) and adapter.weight.shape == (1024, 768)
    assert adapter(torch.zeros(2, 7, 7, 768)).shape == (2, 7, 7, 1024)


def test_adapters_follow_the_seed_and_keep_the_generator(school, tmp_path):
    torch.manual_seed(5)
    after = torch.rand(1)
    torch.manual_seed(5)
    first = student_of(pupil(school, tmp_path, "wide", **MODULES)).student.adapters
    assert torch.equal(torch.rand(1), after)
    again = student_of(pupil(school, tmp_path, "wide", **MODULES)).student.adapters
    other = student_of(pupil(school, tmp_path, "wide", seed=1, **MODULES)).student.adapters
    assert_same_tensors(dict(first.state_dict()), dict(again.state_dict()))
    assert not torch.equal(first["1"].weight, other["1"].weight)


def test_adapters_are_trained_but_not_part_of_the_model(school, tmp_path, monkeypatch):
    evaluated, made = [], []
    predict, create = inference.predict, training.create_model

    def watching(network, *args):
        evaluated.append(sum(len(m._forward_hooks) for m in network.modules()))
        return predict(network, *args)

    monkeypatch.setattr(inference, "predict", watching)
    for place in (build, training):
        monkeypatch.setattr(place, "create_model", lambda *a: made.append(create(*a)) or made[-1])
    recipe = pupil(school, tmp_path, "wide", ema_decay=0.9, **MODULES)
    run = train(recipe)
    state, names = run.load_checkpoint(), create(recipe, 10).state_dict().keys()
    assert state["model"].keys() == state["ema"].keys() == names
    assert load_file(run.file("best.safetensors")).keys() == names
    before = student_of(recipe).student.adapters.state_dict()
    assert state["adapters"].keys() == before.keys()
    assert all(not torch.equal(state["adapters"][k], before[k]) for k in before)
    assert evaluated == [0, 0]  # raw and EMA
    assert len(made) == 2 and not any(m._forward_hooks for m in made[0].modules())


def test_hooks_are_removed_even_if_a_forward_fails(school, tmp_path):
    kd = student_of(pupil(school, tmp_path, "wide", **MODULES))
    networks = (kd.student, kd.teachers[0].model)
    images = torch.zeros(2, 3, 16, 16)
    features = kd.teacher_outputs(images)[0].features
    assert {n: tuple(f.shape) for n, f in features.items()} == {
        "layer1": (2, 64, 4, 4),
        "global_pool": (2, 512),
    }
    assert not any(f.requires_grad for f in features.values())
    _, features = kd.student(images)
    assert {i: tuple(f.shape) for i, f in features.items()} == {1: (2, 64, 4, 4), 2: (2, 512)}
    for call in (kd.teacher_outputs, kd.student):
        with pytest.raises(RuntimeError):
            call(torch.zeros(2, 5, 16, 16))
    assert not any(m._forward_hooks for net in networks for m in net.modules())


def test_adapters_of_a_frozen_student_are_trained(school, tmp_path):
    """head_only_epochs and freeze go by modules of the model; adapters always learn."""
    options = dict(head_only_epochs=1, freeze=["conv1", "bn1"], **MODULES)
    recipe = pupil(school, tmp_path, "wide", **options)
    run = runs.Run(recipe.folder)
    with contextlib.closing(training.fit(recipe, run)) as rows:
        next(row for row in rows if row["kind"] == "epoch")
    state, start = run.load_checkpoint(), student_of(recipe).student
    changed = {
        k for k, v in start.model.state_dict().items() if not torch.equal(v, state["model"][k])
    }
    assert changed == {"fc.weight", "fc.bias"}
    adapters = start.adapters.state_dict()
    assert not any(torch.equal(state["adapters"][k], v) for k, v in adapters.items())
    list(training.fit(recipe, run))
    weights = run.load_checkpoint()["model"]
    assert torch.equal(weights["conv1.0.weight"], state["model"]["conv1.0.weight"])
    assert not torch.equal(
        weights["layer1.0.conv1.weight"], state["model"]["layer1.0.conv1.weight"]
    )


def test_adapters_that_are_not_finite_are_never_saved(school, tmp_path, monkeypatch):
    recipe = pupil(school, tmp_path, "wide", **MODULES)
    run, made = runs.Run(recipe.folder), []
    create = training.create_optimizer
    monkeypatch.setattr(
        "workbench.training.state.create_optimizer", lambda *a: made.append(a[2]) or create(*a)
    )
    rows = training.fit(recipe, run)
    next(rows)
    with torch.no_grad():
        made[0]["2"].bias[0] = float("inf")
    with pytest.raises(TrainingError, match="the loss is nan at step 0"):
        rows.close()
    assert not run.file("last.pt").exists()


# ---- stop and resume


def _train_in_child(options, cache):
    torch.set_num_threads(1)
    distillation.logit_cache.CACHE = Path(cache)
    recipe = Recipe(**options)
    for _ in training.fit(recipe, runs.Run(recipe.folder)):
        time.sleep(0.02)  # the process that waits to kill this one may be slow


def child(recipe: Recipe, cache: Path):
    process = fork_server.Process(
        target=_train_in_child, args=(recipe.model_dump(), str(cache.parent))
    )
    process.start()
    return process


def stood_at(run: runs.Run) -> int:
    try:
        lines = run.file("steps.csv").read_bytes().split(b"\n")[1:-1]
    except OSError:
        return 0
    return int(lines[-1].split(b",")[0]) if lines else 0


STOPPED = {
    "features": (0.0, "SIGKILL", "wide", dict(ema_decay=0.9, **MODULES), [False]),
    "cache": (0.0, "SIGKILL", "run", dict(ema_decay=0.9, **MIXED), [True]),
    "cache now and then": (10.0, "SIGTERM", "run", dict(micro_batch_size=10), [True, False]),
    "two teachers": (10.0, "STOP", "run wide", dict(kd_loss=["dist"], dropout=0.2), [False]),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c != "cache" else []) for c in STOPPED]
)
def test_stopped_distillation_resumes_bit_for_bit(school, tmp_path, cache, case):
    minutes, how, teachers, options, cached = STOPPED[case]
    options = {"epochs": 3, "eval_every": 1, "checkpoint_minutes": minutes, **options}
    undisturbed = train(pupil(school, tmp_path / "undisturbed", teachers, **options))
    rng, stops, workers = random.Random(case), 0, [0, 2]
    for attempt in range(9):
        recipe = pupil(
            school,
            tmp_path / "disturbed",
            teachers,
            workers=workers[attempt % 2],
            cache_teacher_logits=cached[attempt % len(cached)],
            **options,
        )
        run = runs.Run(recipe.folder)
        process = child(recipe, cache)
        target = stood_at(run) + rng.randint(1, 4)
        if attempt >= 3 or target > 14:  # of 18: too near the end to be sure of being in time
            target = 10**9
        while process.is_alive() and stood_at(run) < target:
            time.sleep(0.01)
        if not process.is_alive():
            break
        time.sleep(0.05 * rng.random())  # anywhere in a step
        if how == "STOP":
            run.file("STOP").touch()
        else:
            os.kill(process.pid, getattr(signal, how))
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if how == "SIGKILL" else 0)
        stops += 1
    process.join(60)
    assert process.exitcode == 0
    assert stops >= 2
    assert run.status()["state"] == "finished"
    assert_same_run(undisturbed, run)
    assert cache.exists() == any(cached)


def test_changed_teachers_are_refused_on_resume(school, tmp_path):
    path = weights_file(tmp_path, "plain", opened(school).state_dict())
    files = dict(teacher=[str(path)], teacher_model=["test_resnet"])
    recipe = pupil(school, tmp_path / "runs", **files)
    run = runs.Run(recipe.folder)
    with contextlib.closing(training.fit(recipe, run)) as rows:
        next(rows)
    before = run.file("last.pt").read_bytes()
    changed = models.create("test_resnet", 10, seed=2).state_dict()
    weights_file(tmp_path, "plain", changed)
    with pytest.raises(RunError) as error:
        train(recipe)
    words = ["changed since", run.environment()["teachers"][0]["digest"], "put it back"]
    assert all(word in str(error.value) for word in [*words, str(path), "another name"])
    assert run.file("last.pt").read_bytes() == before
    weights_file(tmp_path, "plain", opened(school).state_dict())
    assert_same_run(train(recipe.replace(runs_dir=str(tmp_path / "new"))), train(recipe))


def test_plain_run_can_be_continued_with_a_teacher(school, tmp_path):
    plain = distillation.without_teacher(pupil(school, tmp_path, epochs=1, eval_every=1))
    run = train(plain)
    recipe = pupil(school, tmp_path, name="then", resume_from=str(run.path))
    rows = list(training.fit(recipe, runs.Run(recipe.folder)))
    assert rows[0]["step"] == STEPS + 1 and rows[0]["kd_loss"] > 0
    features = pupil(school, tmp_path, "wide", name="no", resume_from=str(run.path), **MODULES)
    with pytest.raises(RunError, match="last.pt does not fit this recipe"):
        train(features)


# ---- two processes


def _train_in_team(rank, port, options, cache):
    in_float64()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _train_in_child(options, cache)


WITHOUT_BATCH_STATISTICS = {
    "model": "test_convnext",
    "image_size": 32,
    "val_resize": 32,
    "precision": "fp32",
    "batch_size": 46,  # the last step has two images: none for the second process
    "lr": 0.01,
    "nesterov": False,
    "epochs": 1,
    "eval_every": 1,
}


@pytest.mark.parametrize(
    "options",
    [
        dict(cache_teacher_logits=True, **MIXED),
        dict(
            teachers="wide",
            distill_pairs=["logits", "stem -> conv1", "head.flatten -> global_pool"],
            kd_loss=["kl", "l2", "l2"],
            teacher_image_size=[16],
            task_weight=0.5,
            kd_warmup_epochs=1.0,
        ),
    ],
    ids=["logits", "modules"],
)
def test_two_processes_equal_one(school, tmp_path, float64, cache, options):
    options = {**WITHOUT_BATCH_STATISTICS, **options}
    one = train(pupil(school, tmp_path / "one", **{**options, "cache_teacher_logits": False}))
    recipe = pupil(school, tmp_path / "two", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = [
        fork_server.Process(
            target=_train_in_team, args=(rank, port, recipe.model_dump(), str(cache.parent))
        )
        for rank in range(2)
    ]
    for process in team:
        process.start()
    for process in team:
        process.join(120)
    assert [process.exitcode for process in team] == [0, 0]
    two = runs.Run(recipe.folder)
    assert two.environment()["processes"] == 2
    for column in ("loss", "task_loss", "kd_loss"):
        np.testing.assert_allclose(one.steps()[column], two.steps()[column], rtol=1e-10)
    first, second = one.load_checkpoint(), two.load_checkpoint()
    for part in ("model", "adapters"):
        assert first[part].keys() == second[part].keys()
        for name in first[part]:
            allowed = 1e-10 * first[part][name].abs().max().item()
            torch.testing.assert_close(
                first[part][name], second[part][name], rtol=0, atol=allowed, msg=name
            )
    assert len(second["adapters"]) == (4 if "distill_pairs" in options else 0)
    if recipe.cache_teacher_logits:  # both wrote into one file, and every row is there
        sizes = [path.stat().st_size for path in cache.glob("*/epoch-*.rows")]
        assert sizes == [324 * 44]


# ---- logit cache


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(micro_batch_size=16, ema_decay=0.9, **MIXED), marks=pytest.mark.slow),
        dict(repeated_aug=2, class_balanced_sampling=1.0, kd_loss=["dist"], train_fraction=0.1),
        pytest.param(
            dict(
                teachers="run wide", teacher_weight=[1.0, 0.2], drop_last=True, train_fraction=0.1
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mixed parts", "repeated, balanced", "two teachers"],
)
def test_cached_logits_give_the_same_run(school, tmp_path, cache, options, monkeypatch):
    asked = train(pupil(school, tmp_path / "asked", **options))
    kept = train(pupil(school, tmp_path / "kept", cache_teacher_logits=True, **options))
    assert_same_run(asked, kept)
    images = asked.metrics().images.sum()
    assert kept.environment()["teacher_logits"] == {"requests": images, "hits": 0}
    (folder,) = cache.iterdir()
    words = f"teacher logits are cached in {folder}: 0 of 2 epochs"
    assert words in kept.environment()["teacher_cache"]
    monkeypatch.setattr(distillation.Teacher, "preprocess", None)  # nobody looks at an image
    read = train(pupil(school, tmp_path / "read", cache_teacher_logits=True, **options))
    assert_same_run(asked, read)
    assert read.environment()["teacher_logits"] == {"requests": images, "hits": images}
    assert f"{folder}: 2 of 2 epochs" in read.environment()["teacher_cache"]
    assert "teacher_cache" not in asked.environment()


@pytest.mark.slow
def test_another_student_reads_the_same_cache(school, tmp_path, cache, monkeypatch):
    train(pupil(school, tmp_path, cache_teacher_logits=True))
    other = dict(model="test_byobnet", lr=0.01, nesterov=False, optimizer="adamw", loss="bce")
    other |= dict(kd_loss=["dist"], temperature=2.0, kd_weight=[2.0], teacher_weight=[3.0])
    other |= dict(epochs=3, eval_every=3, task_weight=0.5, name="other", dropout=0.2, ema_decay=0.9)
    run = train(pupil(school, tmp_path, cache_teacher_logits=True, **other))
    assert len(list(cache.iterdir())) == 1
    assert ": 2 of 3 epochs" in run.environment()["teacher_cache"]
    answers = run.environment()["teacher_logits"]
    assert answers == {"requests": 3 * 324, "hits": 2 * 324}
    asked = train(pupil(school, tmp_path / "asked", **other))
    first, second = run.load_checkpoint()["model"], asked.load_checkpoint()["model"]
    assert_same_tensors(first, second)


def test_two_runs_may_fill_one_cache_at_once(school, tmp_path, cache):
    asked = train(pupil(school, tmp_path / "asked"))
    recipes = [pupil(school, tmp_path / str(i), cache_teacher_logits=True) for i in range(2)]
    team = [child(recipe, cache) for recipe in recipes]
    for process in team:
        process.join(120)
    assert [process.exitcode for process in team] == [0, 0]
    for recipe in recipes:
        assert_same_run(asked, runs.Run(recipe.folder))
    (folder,) = cache.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        "epoch-00000.rows",
        "epoch-00001.rows",
        "recipe.json",
    ]


class Desk:
    """Two epochs of real batches, the teacher's logits, and the batches it has to compute.

    130 images an epoch, 32 at a time, the last 2.
    """

    def __init__(self, recipe: Recipe, kd: Distillation, batches: list, true: list, monkeypatch):
        self.recipe, self.kd, self.monkeypatch = recipe, kd, monkeypatch
        self.batches, self.true = list(batches), list(true)

    @staticmethod
    def of(recipe: Recipe) -> tuple:
        kd, batches = student_of(recipe), batches_of(recipe, range(10))
        return recipe, kd, batches, [kd_logits(kd, batch) for batch in batches]

    def opened(self, recipe: Recipe | None = None, **settings) -> None:
        """As at the start of a run."""
        self.kd.recipe = recipe or self.recipe
        self.said = self.kd.open_logit_cache(
            5, **{"data": "digits", "precision": "fp32", **settings}
        )

    def go(self, **settings) -> list[int]:
        """The batches the teacher computed; all logits are as without a cache."""
        self.opened(**settings)
        asked, got = [], []
        view = distillation.Teacher.preprocess
        with self.monkeypatch.context() as patch:
            patch.setattr(
                distillation.Teacher, "preprocess", lambda *a: asked.append(len(got)) or view(*a)
            )
            for batch in self.batches:
                got.append(kd_logits(self.kd, batch))
        assert all(torch.equal(a, b) for a, b in zip(got, self.true, strict=True))
        self.read = self.kd.logit_cache.hits
        assert self.kd.logit_cache.requests == sum(
            len(b[0]) for b in self.batches if not b[2].failures
        )
        return asked


def kd_logits(kd: Distillation, batch) -> torch.Tensor:
    return torch.cat([answer.logits for answer in kd.teacher_outputs(batch[0], batch[2])], 1)


FEW = {"cache_teacher_logits": True, "batch_size": 32, "train_fraction": 0.1}


@pytest.fixture(scope="module")
def furniture(school, tmp_path_factory) -> tuple:
    return Desk.of(pupil(school, tmp_path_factory.mktemp("desk"), **FEW))


@pytest.fixture
def desk(furniture, monkeypatch) -> Desk:
    monkeypatch.setattr(furniture[1], "logit_cache", None)
    return Desk(*furniture, monkeypatch)


ROW = 44  # bytes: ten logits and their checksum


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def changed(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


DAMAGE = {  # -> the batches asked again, of 0 to 4 in the first epoch, 5 to 9 in the second
    "a bit of a logit": (
        lambda first, second: changed(first, lambda c: flip(c, 70 * ROW + 1)),
        [2],
    ),
    "a bit of a checksum": (
        lambda first, second: changed(first, lambda c: flip(c, 129 * ROW + 43)),
        [4],
    ),
    "half a row": (
        lambda first, second: changed(
            first, lambda c: c[: 40 * ROW + 20] + bytes(24) + c[41 * ROW :]
        ),
        [1],
    ),
    "a cut inside a row": (
        lambda first, second: changed(first, lambda c: c[: 70 * ROW + 9]),
        [2, 3, 4],
    ),
    "a file that is gone": (lambda first, second: second.unlink(), [5, 6, 7, 8, 9]),
    "noise": (
        lambda first, second: changed(first, lambda c: random.Random(0).randbytes(len(c))),
        [0, 1, 2, 3, 4],
    ),
    "zeros": (lambda first, second: changed(first, lambda c: bytes(len(c))), [0, 1, 2, 3, 4]),
    "rows of other places": (
        lambda first, second: changed(first, lambda c: c[ROW : 33 * ROW] + c[:ROW] + c[33 * ROW :]),
        [0, 1],
    ),
    "another epoch": (lambda first, second: shutil.copy(second, first), [0, 1, 2, 3, 4]),
    "more after the end": (lambda first, second: changed(first, lambda c: c + b"more"), []),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_rows_are_detected_and_written_again(desk, cache, damage):
    assert desk.go() == list(range(10)) and desk.read == 0
    assert desk.go() == [] and desk.read == 2 * 130
    harm, wanted = DAMAGE[damage]
    harm(*sorted(cache.glob("*/*.rows")))
    assert desk.go() == wanted
    assert desk.read == 2 * 130 - sum(len(desk.batches[i][0]) for i in wanted)
    assert desk.go() == []


def test_rows_of_another_cache_are_detected(desk, cache):
    desk.go()
    desk.opened(data="other digits")
    first, second = sorted(cache.iterdir(), key=lambda p: len(list(p.iterdir())))
    for rows in second.glob("*.rows"):
        shutil.copy(rows, first)
    assert desk.go(data="other digits") == list(range(10))


def test_cache_leaves_no_file_open(desk, cache):
    before = len(os.listdir("/proc/self/fd"))
    desk.go()
    desk.go()
    assert len(os.listdir("/proc/self/fd")) == before


def test_batches_with_failed_images_are_not_cached(desk):
    images, targets, batch = desk.batches[0]
    desk.batches[0] = (images, targets, batch._replace(failures=[(0, "broken", "cut")]))
    assert desk.go() == list(range(10))
    assert desk.go() == [0]
    desk.batches[0] = (images, targets, batch)
    assert desk.go() == [0]
    assert desk.go() == []


def test_images_without_a_batch_are_not_cached(desk):
    desk.opened()
    (answer,) = desk.kd.teacher_outputs(desk.batches[0][0])
    assert torch.equal(answer.logits, desk.true[0])
    assert desk.kd.logit_cache.requests == 0


# Every option is in one of these; a teacher is shown what those of the batch say.
OF_THE_BATCH = """
  train_fraction class_balanced_sampling train_resize image_size interpolation mean std batch_size
 micro_batch_size
 drop_last repeated_aug augment_on_device crop_scale crop_ratio hflip brightness contrast
 saturation hue autoaugment
 randaug_n randaug_m randaug_std randaug_increasing randaug_variant mixup_alpha cutmix_alpha
 switch_prob mix_per_sample mix_prob erase_prob erase_mode erase_count seed channels_last
""".split()
IN_THE_DATA = """
 dataset data_dir train_list train_root val_list val_root val_fraction class_names num_classes
 allow_outside_root verify_data
""".split()
IN_THE_TEACHER = """
 teacher teacher_model teacher_image_size teacher_mean teacher_std
""".split()
OF_THE_STUDENT = """
 name val_image_size val_resize model deep_stem avg_down drop_path dropout pretrained weights
 allow_partial_weights freeze epochs optimizer lr momentum nesterov weight_decay
 decay_norm_and_bias trust_clip
 always_adapt schedule milestones lr_step_epochs gamma power lr_min pct_start cosine_epochs
 lr_per_epoch warmup warmup_epochs warmup_steps warmup_start_factor layer_decay head_only_epochs
 clip_grad_norm ema_decay loss
 bce_threshold bce_sum bce_shift label_smoothing up_smoothing teacher_weight distill_pairs kd_loss
 kd_weight temperature dkd_beta kd_warmup_epochs task_weight cache_teacher_logits resume_from
 cache cache_dir auto_resume eval_every checkpoint_minutes log_every device precision compile
 workers runs_dir
""".split()


def another(recipe: Recipe, key: str):
    """Another value of an option, of its kind; whether the recipe makes sense is no matter here."""
    value = getattr(recipe, key)
    match value:
        case bool():
            return not value
        case int() | float():
            return type(value)(0.7 * value + 0.1 if isinstance(value, float) else 2 * value + 2)
        case str():
            return {"interpolation": "bicubic", "erase_mode": "rand"}.get(key, "timm")
        case [float(), *_]:
            return [0.7 * v + 0.1 for v in value]
        case None:
            return 4
    return [3] if key == "milestones" else ["other"]


def test_every_option_is_in_one_group():
    parts = [OF_THE_BATCH, IN_THE_DATA, IN_THE_TEACHER, OF_THE_STUDENT]
    assert sorted(sum(parts, [])) == sorted(Recipe.model_fields)
    assert input_options == set(OF_THE_BATCH)


@pytest.fixture(scope="module")
def everything(school, tmp_path_factory):
    """A recipe with all that draws on, its distillation, and the images of two steps."""
    colours = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, autoaugment=True)
    recipe = pupil(
        school, tmp_path_factory.mktemp("runs"), **colours, **MIXED, randaug_n=2,
        train_fraction=0.05,
        batch_size=16, verify_data=True,
    )  # fmt: skip
    return recipe, student_of(recipe), [i for i, _, _ in batches_of(recipe, range(0, 10, 5))]


@pytest.mark.parametrize("key", OF_THE_STUDENT)
def test_option_of_the_student_changes_neither_batches_nor_the_folder(key, everything, cache):
    recipe, kd, before = everything
    changed = recipe.model_copy(update={key: another(recipe, key)})
    assert getattr(changed, key) != getattr(recipe, key)
    images = [i for i, _, _ in batches_of(changed, range(0, 10, 5))]
    assert all(torch.equal(a, b) for a, b in zip(before, images, strict=True))
    assert folder_of(kd, recipe) == folder_of(kd, changed)


def folder_of(kd: Distillation, recipe: Recipe, **settings) -> Path:
    kd.recipe = recipe
    kd.open_logit_cache(5, **{"data": "digits", **settings})
    return kd.logit_cache.folder


@pytest.mark.parametrize("key", OF_THE_BATCH)
def test_option_of_the_batch_has_another_folder(key, everything, cache):
    recipe, kd, _ = everything
    changed = recipe.model_copy(update={key: another(recipe, key)})
    assert folder_of(kd, recipe) == folder_of(kd, recipe) != folder_of(kd, changed)


@pytest.mark.parametrize("key", ["data", "precision", "processes", "threads", "torch", "device"])
def test_other_settingshave_another_folder(key, everything, cache):
    recipe, kd, _ = everything
    assert folder_of(kd, recipe, **{key: "this"}) != folder_of(kd, recipe, **{key: "that"})


@pytest.mark.parametrize(
    "options",
    [
        dict(teacher_image_size=[40]),
        dict(teacher_mean=[0.1, 0.2, 0.3]),
        dict(teacher_std=[0.1, 0.2, 0.3]),
        dict(teachers="run wide"),
        dict(teachers="wide"),
        dict(teacher_model=["test_resnet"]),
    ],
    ids=str,
)
def test_another_teacher_or_input_of_it_has_another_folder(school, tmp_path, cache, options):
    if "teacher_model" in options:  # the same model with other weights
        state = models.create("test_resnet", 10).state_dict()
        options = {**options, "teacher": [str(weights_file(tmp_path, "plain", state))]}
        options |= {f"teacher_{k}": OWN[k] for k in ("mean", "std")} | {"teacher_image_size": [24]}
    for recipe in (pupil(school, tmp_path), pupil(school, tmp_path, **options)):
        student_of(recipe).open_logit_cache(5)
    assert len(list(cache.iterdir())) == 2


def test_moved_teacher_has_the_same_folder(school, tmp_path, cache):
    shutil.copytree(school / "runs" / "teacher-seed0", tmp_path / "moved")
    for options in ({}, dict(teacher=[str(tmp_path / "moved")])):
        student_of(pupil(school, tmp_path, **options)).open_logit_cache(5)
    assert len(list(cache.iterdir())) == 1


def test_settingsof_a_run_are_those_of_its_environment(school, tmp_path, cache):
    run = train(pupil(school, tmp_path, epochs=1, eval_every=1, cache_teacher_logits=True))
    values = json.loads(next(cache.glob("*/recipe.json")).read_text())
    environment = run.environment()
    for key in "data precision processes threads torch torchvision timm numpy pillow".split():
        assert values[key] == environment[key]
    assert values["device"] == environment["device"] and len(values["code"]) == 12
    assert values["teachers"][0]["digest"] == environment["teachers"][0]["digest"]


Usage = namedtuple("usage", "total used free")


def test_too_small_disk_is_refused_before_training(school, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1_500_000_000))
    recipe = pupil(school, tmp_path, epochs=100_000, cache_teacher_logits=True, train_fraction=1.0)
    with pytest.raises(DistillationError) as error:
        train(recipe)
    # 22 steps of 60 for 1297 images, 44 bytes each
    assert "needs 5.81 GB for 132,000,000 images in 100000 epochs" in str(error.value)
    assert "has 1.50 GB; set cache_teacher_logits: false, or WORKBENCH_CACHE" in str(error.value)
    assert not runs.Run(recipe.folder).file("last.pt").exists()
    assert runs.Run(recipe.folder).status()["state"] == "failed"


def test_cached_epochs_need_no_more_space(desk, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 14_500))
    desk.recipe = desk.recipe.replace(epochs=2)
    with pytest.raises(DistillationError, match="0.00 GB for 320 images in 2 epochs"):
        desk.opened()  # 14,080 bytes
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 14_080 / 0.95 + 1))
        desk.go()
        assert desk.said.endswith(": 0 of 2 epochs, 0 MB to write")
    desk.opened()
    assert ": 2 of 2 epochs" in desk.said


@pytest.mark.parametrize("failure", ["fromfile", "mkdir"])
def test_unreadable_files_are_computed_again_and_an_unwritable_folder_is_refused(
    desk, failure, monkeypatch
):
    desk.go()

    def fails(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if failure == "fromfile":
            patch.setattr(np, "fromfile", fails)
            assert desk.go() == list(range(10))
        else:
            patch.setattr(Path, "mkdir", fails)
            with pytest.raises(DistillationError, match="cannot be written to .*WORKBENCH_CACHE"):
                desk.opened()
    assert desk.go() == []


def test_micro_batches_find_their_rows_in_any_order(school, tmp_path, monkeypatch):
    desk = Desk(*Desk.of(pupil(school, tmp_path, micro_batch_size=7, **FEW)), monkeypatch)
    assert desk.go() == list(range(len(desk.batches))) and len(desk.batches) > 40
    desk.batches, desk.true = desk.batches[::-1], desk.true[::-1]
    images, targets, batch = desk.batches[0]
    desk.batches[0] = (images.flip(0), targets, batch._replace(positions=batch.positions.flip(0)))
    desk.true[0] = desk.true[0].flip(0)
    assert desk.go() == []
    # Every other pair of rows, as a process of two has them.
    pairs = [i for i in range(7) if i // 2 % 2]
    images, targets, batch = desk.batches[-1]
    own = batch._replace(positions=batch.positions[pairs])
    desk.batches, desk.true = [(images[pairs], targets[pairs], own)], [desk.true[-1][pairs]]
    assert desk.go() == []
    assert desk.go(data="new") == [0] and desk.go(data="new") == []


def test_full_disk_ends_the_run_which_resumes_without_the_cache(school, tmp_path, cache):
    undisturbed = train(pupil(school, tmp_path / "undisturbed", cache_teacher_logits=True))
    (folder,) = cache.iterdir()
    (folder / "epoch-00001.rows").unlink()
    (folder / "epoch-00001.rows").symlink_to("/dev/full")
    recipe = pupil(school, tmp_path / "full", cache_teacher_logits=True, checkpoint_minutes=0.0)
    with pytest.raises(DistillationError) as error:
        train(recipe)
    text = str(error.value)
    assert "cannot be written" in text and "No space left on device" in text
    assert "set cache_teacher_logits: false" in text and "same command" in text
    run = runs.Run(recipe.folder)
    assert run.status()["state"] == "failed" and run.status()["message"].endswith(text)
    assert run.load_checkpoint()["progress"]["step"] == STEPS
    without = recipe.replace(cache_teacher_logits=False)
    assert without.fingerprint == recipe.fingerprint
    assert_same_run(undisturbed, train(without))


# ---- refused teachers


@pytest.fixture(scope="module")
def abc(tmp_path_factory) -> Path:
    """Images of three classes, a run that learnt them, and its weights in two files."""
    world = tmp_path_factory.mktemp("abc")
    for side, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (world / side / name).mkdir(parents=True)
            for i in range(count):
                save_noise(world / side / name / f"{i}.png", seed=[label, i, side == "val"])
    run = train(Recipe(name="teacher", **three(world)))
    shutil.copy(run.file("best.safetensors"), world / "t.safetensors")
    torch.save(load_file(world / "t.safetensors"), world / "t.pt")
    return world


def three(world: Path) -> dict:
    options = {"dataset": "files", "data_dir": str(world), "runs_dir": str(world / "runs")}
    options |= {"image_size": 32, "val_resize": 32, "epochs": 1, "batch_size": 6, "lr": 0.01}
    return options | {"workers": 0}


def named(world: Path, classes) -> dict:
    """The teacher's run, trained for other classes."""
    path = world / "runs" / "teacher-seed0" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "classes": classes}))
    return dict(teacher="runs/teacher-seed0")


def filed(world: Path, change=None, model: str = "test_resnet", **options) -> dict:
    """A weights file with its tensors changed."""
    tensors = load_file(world / "t.safetensors")
    if change:
        change(tensors)
    save_file(tensors, world / "t.safetensors")
    return dict(teacher="t.safetensors", teacher_model=model, **options)


def grown_from(world: Path, model: str, said: str, **options) -> dict:
    """A file of one model that is said to be of another."""
    save_file(models.create(model, 3, **options).state_dict(), world / "t.safetensors")
    return dict(teacher="t.safetensors", teacher_model=said)


def without(world: Path, name: str, text: str | None = None, **options) -> dict:
    path = world / name
    path.unlink() if text is None else path.write_text(text)
    return dict(teacher="runs/teacher-seed0", **options)


def grown(world: Path, classes: int) -> dict:
    save_file(models.create("test_resnet", classes).state_dict(), world / "t.safetensors")
    return dict(teacher="t.safetensors", teacher_model="test_resnet")


def relearnt(world: Path, model: str, **options) -> dict:
    """The teacher's run, as if it had trained another model."""
    path, run = world / "runs" / "teacher-seed0", runs.Run(world / "runs" / "teacher-seed0")
    text = (path / "recipe.yaml").read_text().replace('"test_resnet"', f'"{model}"')
    (path / "recipe.yaml").write_text(text)
    weights = models.create(model, 3, image_size=32).state_dict()
    torch.save({**run.load_checkpoint(), "model": weights}, path / "last.pt")
    return dict(teacher="runs/teacher-seed0", **options)


def modules(*pairs: str, **options) -> dict:
    return dict(teacher="runs/teacher-seed0", distill_pairs=list(pairs), kd_loss=["l2"], **options)


KD, ME, RE = DistillationError, ModelError, RunError
NAMES = "trained on 3 classes {}, the student's data have 3: ['a', 'b', 'c']; both need the same"

WRONG = {
    # of other classes
    "other names": (lambda w: named(w, ["x", "y", "z"]), KD, [NAMES.format(["x", "y", "z"])]),
    "another order": (lambda w: named(w, ["b", "a", "c"]), KD, [NAMES.format(["b", "a", "c"])]),
    "a file's": (
        lambda w: grown(w, 5),
        KD,
        ["t.safetensors does not fit test_resnet with 3 classes", "file has (5, 96), model (3, 96)",
         "name that run"],
    ),
    "timm's": (
        lambda w: dict(teacher="test_resnet"),
        KD,
        ["test_resnet has 1000 classes and the data have 3", "pretrained: true"],
    ),
    # not there, or no teacher
    "no such file": (
        lambda w: dict(teacher="gone.pt", teacher_model="test_resnet"), KD,
        ["gone.pt is no file"],
    ),
    "no such name": (
        lambda w: dict(teacher="test_resnett"), KD,
        ["'test_resnett' is neither a run folder nor a weights file, and timm has no model"],
    ),
    "no such tag": (
        lambda w: dict(teacher="resnet50.none"), KD,
        ["timm has no weights of resnet50.none"],
    ),
    "no published weights": (
        lambda w: dict(teacher="resnet200"), KD,
        ["timm has no weights of resnet200; name a weights file or a run"],
    ),
    "no run": (lambda w: dict(teacher="train"), RE, ["train is no readable run"]),
    "a run that says little": (
        lambda w: without(w, "runs/teacher-seed0/recipe.yaml", "model: test_resnet\n"), KD,
        ["its recipe.yaml has no 'image_size'"],
    ),
    "a run without weights": (
        lambda w: without(w, "runs/teacher-seed0/last.pt")
        | without(w, "runs/teacher-seed0/best.safetensors"),
        ME,
        ["no run folder with weights: neither last.pt nor best.safetensors"],
    ),
    # no weights of that model
    "another model": (
        lambda w: filed(w, model="resnet10t"), KD,
        ["t.safetensors does not fit resnet10t", "re-initialised"],
    ),
    "a smaller model": (
        lambda w: grown_from(w, "resnet34", "resnet18"), KD,
        ["t.safetensors does not fit resnet18", "80 in the file ignored: layer1.2"],
    ),
    "a layer too many": (
        lambda w: filed(w, lambda t: t.update({"layer5.weight": t["fc.weight"].clone()})), KD,
        ["does not fit test_resnet", "1 in the file ignored: layer5.weight"],
    ),
    "a transformer of other images": (
        lambda w: grown_from(w, "test_vit", "test_vit", image_size=160), KD,
        ["at 32 pixels", "pos_embed (file has (1, 101, 64), model (1, 5, 64))",
         "correct teacher_model or teacher_image_size"],
    ),
    "a file of the run, of other classes": (
        lambda w: named(w, ["x", "y", "z"]) | dict(teacher="runs/teacher-seed0/best.safetensors",
                                                  teacher_model="test_resnet"), KD,
        ["does not fit test_resnet with 3 classes", "(the file's classes are others)"],
    ),
    "a tensor missing": (
        lambda w: filed(w, lambda t: t.pop("layer2.0.bn1.bias")), KD,
        ["does not fit test_resnet", "1 re-initialised: layer2.0.bn1.bias (not in the"],
    ),
    "a file without its model": (
        lambda w: dict(teacher="t.pt"), KD,
        ["t.pt is a weights file; set its teacher_model"],
    ),
    "a run with a model": (
        lambda w: dict(teacher="runs/teacher-seed0", teacher_model="test_resnet"), KD,
        ["'test_resnet' names the model of a weights file", "teacher-seed0 is no file"],
    ),
    "timm with a model": (
        lambda w: dict(teacher="resnet18", teacher_model="resnet18"), KD,
        ["names the model of a weights file, and resnet18 is no file"],
    ),
    "images it cannot take": (
        lambda w: relearnt(w, "test_vit_relpos", teacher_image_size=48), ME,
        ["test_vit_relpos does not take teacher_image_size 48", "Input height (48)",
         "set it to 32"],
    ),
    "images too small": (
        lambda w: relearnt(w, "test_convnext", teacher_image_size=16), ME,
        ["test_convnext does not take teacher_image_size 16 (", "set it to 32"],
    ),
    # modules
    "no module of the student": (
        lambda w: modules("layer44 -> layer4"), KD,
        ["distill_pairs ['layer44 -> layer4']: ResNet has no module 'layer44'; near: layer4"],
    ),
    "no module of the teacher": (
        lambda w: modules("layer4 -> layer5"), KD,
        ["layer4 -> layer5", "ResNet has no module 'layer5'", "layer4"],
    ),
    "a module that is not used": (
        lambda w: modules("blocks.0.attn.attn_drop -> layer4", model="test_vit"), KD,
        ["blocks.0.attn.attn_drop -> layer4: one of the layers is not used"],
    ),
    "other sizes": (
        lambda w: modules("layer1 -> layer2"), KD,
        ["layer1 -> layer2: the student's (32, 8, 8) and the teacher's (48, 4, 4) differ in more",
         "another teacher_image_size", "global_pool"],
    ),
    "a vector and a map": (
        lambda w: modules("global_pool -> layer4"), KD,
        ["the student's (96,) and the teacher's (96, 1, 1)"],
    ),
    "a cache of images nobody read": (
        lambda w: dict(teacher="runs/teacher-seed0", cache_teacher_logits=True, verify_data=False),
        KD,
        ["verify_data: false"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_unusable_teacher_is_refused_before_the_first_step(abc, tmp_path, case):
    make, kind, words = WRONG[case]
    world = Path(shutil.copytree(abc, tmp_path / "abc"))
    options = three(world) | make(world)
    place = world / options["teacher"]
    if place.exists() or place.suffix == ".pt":
        options["teacher"] = str(place)
    recipe = Recipe(**{"kd_loss": ["kl"], **options})
    run = runs.Run(recipe.folder)
    with pytest.raises(kind) as error:
        next(training.fit(recipe, run))
    text = str(error.value).replace(f"{world}/", "")
    assert type(error.value) is kind
    for word in words:
        assert word in text
    assert not run.file("last.pt").exists() and not run.steps().size
    assert run.status()["state"] == "failed"
    assert run.status()["message"].startswith(kind.__name__)


class TwoOutputs(nn.Module):
    """`twice` returns two tensors, `unused` is never called."""

    def __init__(self):
        super().__init__()
        self.twice, self.fc, self.unused = nn.Identity(), nn.Linear(3, 10), nn.Identity()
        self.twice.forward = lambda images: (images, images)

    def forward(self, images):
        return self.fc(self.twice(images)[0].mean((2, 3)))


@pytest.mark.parametrize("layer", ["twice", "unused"])
def test_layer_without_one_tensor_cannot_be_compared(school, tmp_path, layer):
    recipe = pupil(school, tmp_path, distill_pairs=[f"{layer} -> fc"], kd_loss=["l2"])
    with pytest.raises(DistillationError, match=f"{layer} -> fc: .* not return a tensor"):
        Distillation(recipe, TwoOutputs(), DIGITS, CPU)
