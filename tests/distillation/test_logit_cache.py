"""Cached teacher logits: the same bits as without a cache, or computed again."""

import errno
import json
import random
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from distillation_helpers import (
    MIXED,
    STEPS,
    batches_of,
    child,
    distillation_of,
    student_recipe,
)
from helpers import assert_same_run, train

from workbench import distillation, models, runs
from workbench.distillation import Distillation, DistillationError
from workbench.recipe import Recipe, input_options

pytestmark = pytest.mark.usefixtures("one_thread", "logit_cache")
CACHED = {"cache_teacher_logits": True}


@pytest.mark.parametrize(
    "teachers, options",
    [
        pytest.param(
            "run", dict(micro_batch_size=16, ema_decay=0.9, **MIXED), marks=pytest.mark.slow
        ),
        ("run", dict(repeated_aug=2, class_balanced_sampling=1.0, kd_loss=["dist"])),
        pytest.param("run wide", dict(drop_last=True, train_fraction=0.1), marks=pytest.mark.slow),
    ],
    ids=["mixed parts", "repeated, balanced", "two teachers"],
)
def test_cached_logits_give_the_same_run(
    sources, tmp_path, logit_cache, teachers, options, monkeypatch
):
    plain = train(student_recipe(sources, tmp_path / "plain", teachers, **options))
    images = plain.metrics().images.sum()
    assert "teacher_cache" not in plain.environment()
    for name, epochs, hits in (("first", 0, 0), ("second", 2, images)):
        run = train(student_recipe(sources, tmp_path / name, teachers, **options, **CACHED))
        assert_same_run(plain, run)
        [folder] = logit_cache.iterdir()
        facts = run.environment()
        assert facts["teacher_logits"] == {"requests": images, "hits": hits}
        assert facts["teacher_cache"].endswith(f"cached in {folder}: {epochs} of 2 epochs")
        monkeypatch.setattr(distillation.Teacher, "preprocess", None)  # no teacher runs again


@pytest.mark.slow
def test_another_student_reads_the_same_cache(sources, tmp_path, logit_cache):
    train(student_recipe(sources, tmp_path, **CACHED))
    other = dict(model="test_byobnet", lr=0.01, nesterov=False, optimizer="adamw", loss="bce")
    other |= dict(kd_loss=["dist"], temperature=2.0, kd_weight=[2.0], teacher_weight=[3.0])
    other |= dict(epochs=3, eval_every=3, task_weight=0.5, name="other", dropout=0.2, ema_decay=0.9)
    run = train(student_recipe(sources, tmp_path, **CACHED, **other))
    assert len(list(logit_cache.iterdir())) == 1
    assert run.environment()["teacher_logits"] == {"requests": 3 * 324, "hits": 2 * 324}
    assert_same_run(run, train(student_recipe(sources, tmp_path / "plain", **other)))


def test_two_runs_may_fill_one_cache_at_once(sources, tmp_path, logit_cache):
    plain = train(student_recipe(sources, tmp_path / "plain"))
    recipes = [student_recipe(sources, tmp_path / str(i), **CACHED) for i in range(2)]
    processes = [child(recipe, logit_cache) for recipe in recipes]
    for process, recipe in zip(processes, recipes, strict=True):
        process.join(120)
        assert process.exitcode == 0
        assert_same_run(plain, runs.Run(recipe.folder))
    [folder] = logit_cache.iterdir()
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["epoch-00000.rows", "epoch-00001.rows", "recipe.json"]


# ---- single batches


class Batches:
    """Two epochs of batches: 130 images each, 32 at a time, the last 2; with their logits."""

    def __init__(self, recipe: Recipe):
        self.kd, self.batches = distillation_of(recipe), batches_of(recipe, range(10))
        self.logits = [logits_of(self.kd, batch) for batch in self.batches]

    def computed(self, batches=None, logits=None, **settings) -> list[int]:
        """Which batches the teacher computes; all logits are as without a cache."""
        self.kd.open_logit_cache(5, **{"data": "digits", **settings})
        computed, found, batches = [], [], batches or self.batches
        preprocess = distillation.Teacher.preprocess
        with pytest.MonkeyPatch.context() as patch:
            count = lambda *args: computed.append(len(found)) or preprocess(*args)
            patch.setattr(distillation.Teacher, "preprocess", count)
            for batch in batches:
                found.append(logits_of(self.kd, batch))
        wanted = logits or self.logits
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        return computed


def logits_of(kd: Distillation, batch) -> torch.Tensor:
    return torch.cat([outputs["logits"] for outputs in kd.teacher_outputs(batch[0], batch[2])], 1)


FEW = {"cache_teacher_logits": True, "batch_size": 32, "train_fraction": 0.1}
ALL = list(range(10))


@pytest.fixture(scope="module")
def few(sources, tmp_path_factory) -> Batches:
    return Batches(student_recipe(sources, tmp_path_factory.mktemp("few"), **FEW))


ROW = 44  # bytes: ten logits and their checksum


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGE = {  # name -> change of the first epoch's file, batches that are computed again
    "a bit of a logit": (lambda c: flip(c, 70 * ROW + 1), [2]),
    "a bit of a checksum": (lambda c: flip(c, 129 * ROW + 43), [4]),
    "half a row": (lambda c: c[: 40 * ROW + 20] + bytes(24) + c[41 * ROW :], [1]),
    "a cut inside a row": (lambda c: c[: 70 * ROW + 9], [2, 3, 4]),
    "noise": (lambda c: random.Random(0).randbytes(len(c)), [0, 1, 2, 3, 4]),
    "zeros": (lambda c: bytes(len(c)), [0, 1, 2, 3, 4]),
    "rows in other places": (lambda c: c[ROW : 33 * ROW] + c[:ROW] + c[33 * ROW :], [0, 1]),
    "more after the end": (lambda c: c + b"more", []),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_rows_are_detected_and_written_again(few, logit_cache, damage):
    assert few.computed() == ALL and few.kd.logit_cache.hits == 0
    assert few.computed() == [] and few.kd.logit_cache.hits == 2 * 130
    change, wanted = DAMAGE[damage]
    path = min(logit_cache.glob("*/*.rows"))
    path.write_bytes(change(path.read_bytes()))
    assert few.computed() == wanted
    assert few.computed() == []


def test_rows_of_another_epoch_or_cache_are_detected(few, logit_cache):
    few.computed()
    first, second = sorted(logit_cache.glob("*/*.rows"))
    shutil.copy(second, first)
    assert few.computed() == [0, 1, 2, 3, 4]
    few.kd.open_logit_cache(5, data="other digits")
    for path in (first, second):
        shutil.copy(path, few.kd.logit_cache.folder)
    assert few.computed(data="other digits") == ALL


def test_batches_with_failed_images_and_images_alone_are_not_cached(few):
    images, targets, batch = few.batches[0]
    failed = (images, targets, batch._replace(failures=[(0, "broken", "cut")]))
    assert few.computed([failed, *few.batches[1:]]) == ALL
    assert few.computed([failed, *few.batches[1:]]) == [0]
    requests = few.kd.logit_cache.requests
    [outputs] = few.kd.teacher_outputs(images)
    assert torch.equal(outputs["logits"], few.logits[0])
    assert few.kd.logit_cache.requests == requests
    assert few.computed() == [0] and few.computed() == []


def test_micro_batches_find_their_rows_in_any_order(sources, tmp_path):
    few = Batches(student_recipe(sources, tmp_path, micro_batch_size=7, **FEW))
    assert few.computed() == list(range(len(few.batches))) and len(few.batches) > 40
    images, targets, batch = few.batches[-1]
    flipped = (images.flip(0), targets, batch._replace(positions=batch.positions.flip(0)))
    backwards = [flipped, *few.batches[-2::-1]]
    assert few.computed(backwards, [few.logits[-1].flip(0), *few.logits[-2::-1]]) == []
    # Every other pair of rows, as a process of two has them.
    pairs = [i for i in range(7) if i // 2 % 2]
    images, targets, batch = few.batches[0]
    own = [(images[pairs], targets[pairs], batch._replace(positions=batch.positions[pairs]))]
    for settings, computed in (({}, []), ({"data": "new"}, [0]), ({"data": "new"}, [])):
        assert few.computed(own, [few.logits[0][pairs]], **settings) == computed


def test_unreadable_files_are_computed_again(few, monkeypatch):
    def fails(*args, **options):
        raise OSError(errno.EIO, "Input/output error")

    few.computed()
    with monkeypatch.context() as patch:
        patch.setattr(np, "fromfile", fails)
        assert few.computed() == ALL
    assert few.computed() == []


# ---- what a cache is valid for

OF_THE_DATA = """dataset data_dir train_list train_root val_list val_root val_fraction class_names
 num_classes allow_outside_root verify_data file_column label_column fold group_column""".split()
OF_THE_TEACHER = "teacher teacher_model teacher_image_size teacher_mean teacher_std".split()
OTHERS = sorted({*Recipe.model_fields} - input_options - {*OF_THE_DATA, *OF_THE_TEACHER})


def another(recipe: Recipe, key: str):
    """Another value of an option, of its type, whether the recipe makes sense or not."""
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
        case dict():
            return {"other": 1}
    return [3] if key == "milestones" else ["other"]


def folder_of(kd: Distillation, recipe: Recipe, **settings) -> Path:
    kd.recipe = recipe
    kd.open_logit_cache(5, **{"data": "digits", **settings})
    return kd.logit_cache.folder


@pytest.fixture(scope="module")
def everything(sources, tmp_path_factory):
    """A recipe with every augmentation, its distillation, and the images of two steps."""
    options = dict(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, autoaugment=True, **MIXED)
    options |= dict(randaug_n=2, train_fraction=0.05, batch_size=16)
    recipe = student_recipe(sources, tmp_path_factory.mktemp("runs"), **options)
    return recipe, distillation_of(recipe), [i for i, *_ in batches_of(recipe, range(0, 10, 5))]


@pytest.mark.parametrize("key", OTHERS)
def test_other_options_change_neither_batches_nor_the_folder(key, everything):
    recipe, kd, before = everything
    changed = recipe.model_copy(update={key: another(recipe, key)})
    assert getattr(changed, key) != getattr(recipe, key)
    images = [i for i, *_ in batches_of(changed, range(0, 10, 5))]
    assert all(torch.equal(a, b) for a, b in zip(before, images, strict=True))
    assert folder_of(kd, recipe) == folder_of(kd, changed)


@pytest.mark.parametrize("key", sorted(input_options))
def test_options_of_the_batch_have_another_folder(key, everything):
    recipe, kd, _ = everything
    changed = recipe.model_copy(update={key: another(recipe, key)})
    assert folder_of(kd, recipe) == folder_of(kd, recipe) != folder_of(kd, changed)


def test_other_data_precision_or_versions_have_another_folder(everything):
    recipe, kd, _ = everything
    keys = ["data", "precision", "processes", "threads", "torch", "device"]
    folders = {folder_of(kd, recipe, **{key: "other"}) for key in keys}
    assert len(folders | {folder_of(kd, recipe)}) == 7


@pytest.mark.parametrize("key", ["image_size", "mean", "std"])
def test_another_input_of_a_teacher_has_another_folder(key, sources, tmp_path, logit_cache):
    other = {f"teacher_{key}": [40] if key == "image_size" else [0.1, 0.2, 0.3]}
    for options in ({}, other):
        distillation_of(student_recipe(sources, tmp_path, **options)).open_logit_cache(5)
    assert len(list(logit_cache.iterdir())) == 2


def test_other_weights_have_another_folder_and_moved_ones_the_same(sources, tmp_path, logit_cache):
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.pt"
    shutil.copy(sources["wide"], moved)
    torch.save(models.create("resnet10t", 10, seed=1).state_dict(), other)
    for path, folders in ((sources["wide"], 1), (moved, 1), (other, 2)):
        recipe = student_recipe(sources, tmp_path, "wide", teacher=[str(path)])
        distillation_of(recipe).open_logit_cache(5)
        assert len(list(logit_cache.iterdir())) == folders
    distillation_of(student_recipe(sources, tmp_path, "wide run")).open_logit_cache(5)
    assert len(list(logit_cache.iterdir())) == 3


def test_settings_of_a_run_are_those_of_its_environment(sources, tmp_path, logit_cache):
    run = train(student_recipe(sources, tmp_path, epochs=1, eval_every=1, **CACHED))
    values = json.loads(next(logit_cache.glob("*/recipe.json")).read_text())
    facts = run.environment()
    keys = "data precision processes threads device torch torchvision timm numpy pillow".split()
    keys += ["opencv", "simplejpeg"]  # they decide pixels
    assert torch.backends.cpu.get_cpu_capability() in values["device"]  # and this, sums
    assert {key: values[key] for key in keys} == {key: facts[key] for key in keys}
    assert len(values["code"]) == 12
    assert values["teachers"][0]["digest"] == facts["teachers"][0]["digest"]


# ---- disks without space

Usage = namedtuple("usage", "total used free")


def test_too_small_disk_is_refused_before_training(sources, tmp_path, monkeypatch, few):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 14_079))
    recipe = student_recipe(sources, tmp_path, **CACHED)
    with pytest.raises(DistillationError, match="need 0.00 GB.*WORKBENCH_CACHE"):
        train(recipe)
    assert runs.Run(recipe.folder).status()["state"] == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 14_080))
        few.kd.recipe = few.kd.recipe.replace(epochs=2)
        few.computed()
    assert few.computed() == []  # cached epochs need no more space


def test_full_disk_ends_the_run_which_resumes_without_the_cache(sources, tmp_path, logit_cache):
    undisturbed = train(student_recipe(sources, tmp_path / "undisturbed", **CACHED))
    path = logit_cache / next(logit_cache.iterdir()) / "epoch-00001.rows"
    path.unlink()
    path.symlink_to("/dev/full")
    recipe = student_recipe(sources, tmp_path / "full", checkpoint_minutes=0.0, **CACHED)
    with pytest.raises(DistillationError, match="No space left .* cache_teacher_logits: false"):
        train(recipe)
    run = runs.Run(recipe.folder)
    assert run.status()["state"] == "failed"
    assert run.load_checkpoint()["progress"]["step"] == STEPS
    without = recipe.replace(cache_teacher_logits=False)
    assert without.fingerprint == recipe.fingerprint
    assert_same_run(undisturbed, train(without))
