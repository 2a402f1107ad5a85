"""Distillation against plain loops: teachers, adapters, exact resume, several processes.

The teacher was trained at 24 pixels with another normalisation than its students.
"""

import contextlib
import os
import random
import signal
import socket
import time

import numpy as np
import pytest
import timm
import torch
from conftest import in_float64
from distillation_helpers import (
    CPU,
    DIGITS,
    MIXED,
    STEPS,
    batches_of,
    child,
    distillation_of,
    load_teacher,
    student_recipe,
    train_in_child,
)
from helpers import TEACHER, assert_same_run, assert_same_tensors, fork_server, last_step, train
from PIL import Image
from safetensors.torch import load_file
from timm.models import _builder
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from workbench import distillation, models, runs, training
from workbench.distillation import DistillationError
from workbench.distillation import losses as kd_losses
from workbench.distillation.student import DistillPair, create_adapter
from workbench.evaluation import inference
from workbench.recipe import Recipe
from workbench.runs import RunError
from workbench.training import TrainingError, build

pytestmark = pytest.mark.usefixtures("one_thread", "logit_cache")

MODULES = {  # pairs of the student with the wide teacher, whose channels differ
    "distill_pairs": ["logits", "layer1 -> layer1", "global_pool -> global_pool"],
    "kd_loss": ["kl", "l2", "l2_normalized"],
}


# ---- teachers


def same_weights(teacher: distillation.Teacher, model: nn.Module) -> bool:
    """Whether all tensors are equal, except the counters of batches."""
    pairs = zip(teacher.model.state_dict().items(), model.state_dict().values(), strict=True)
    return all("num_batches" in name or torch.equal(a, b) for (name, a), b in pairs)


def test_weights_file_is_opened_with_the_students_inputs(sources, tmp_path):
    model = load_teacher(sources, "wide")
    recipe = student_recipe(sources, tmp_path, "wide")
    kd = distillation_of(recipe)
    [teacher] = kd.teachers
    assert same_weights(teacher, model) and teacher.top1 is None
    assert (teacher.image_size, teacher.mean, teacher.std) == (16, recipe.mean, recipe.std)
    images = batches_of(recipe, range(1))[0][0]
    assert teacher.preprocess(images, recipe.mean, recipe.std) is images
    logits = kd.teacher_outputs(images)[0]["logits"]
    torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)  # another layout


def test_run_folder_is_opened_with_its_ema_weights_and_image_size(sources, tmp_path):
    [teacher] = distillation.open_teachers(student_recipe(sources, tmp_path), DIGITS)
    assert same_weights(teacher, load_teacher(sources, "run"))
    assert (teacher.image_size, teacher.mean, teacher.std) == (24, TEACHER["mean"], TEACHER["std"])
    assert teacher.top1 == runs.Run(sources["run"]).metrics().ema_top1.iloc[-1] > 50
    assert (teacher.loss, teacher.smoothing, teacher.weight) == ("ce", 0.0, 1.0)
    assert teacher.state == "finished"


def test_run_of_a_resnet_variant_has_its_flags(sources, tmp_path):
    options = dict(model="resnet18", deep_stem=True, avg_down=True, train_fraction=0.05)
    recipe = Recipe(runs_dir=str(tmp_path), epochs=1, workers=0, batch_size=13, **options)
    run = train(recipe)
    recipe = student_recipe(sources, tmp_path, teacher=[str(run.path)])
    [teacher] = distillation.open_teachers(recipe, DIGITS)
    assert teacher.model.state_dict().keys() == run.load_checkpoint()["model"].keys()


def test_timm_name_is_opened_with_the_published_weights(sources, tmp_path, monkeypatch):
    published, requests = models.create("resnet10t", 1000, seed=3), []
    monkeypatch.setattr(
        _builder,
        "load_state_dict_from_hf",
        lambda name, **_: requests.append(name) or dict(published.state_dict()),
    )
    recipe = student_recipe(sources, tmp_path, teacher=["resnet10t.c3_in1k"], mean=[0.1] * 3)
    [teacher] = distillation.open_teachers(recipe, [str(i) for i in range(1000)])
    assert requests == ["timm/resnet10t.c3_in1k"] and same_weights(teacher, published)
    assert teacher.image_size == 176  # as timm publishes it; the rest is ImageNet's
    assert (teacher.mean, teacher.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("names", ["label_names", "label_descriptions"])
def test_timm_teacher_is_refused_for_imagenets_classes_in_another_order(
    sources, tmp_path, monkeypatch, names
):
    """Such as that of the numbers of the challenge's development kit, or of the alphabet."""
    published = models.create("resnet10t", 1000)
    monkeypatch.setattr(
        _builder, "load_state_dict_from_hf", lambda *_, **__: published.state_dict()
    )
    recipe = student_recipe(sources, tmp_path, teacher=["resnet10t.c3_in1k"])
    classes = getattr(timm.data.ImageNetInfo("imagenet-1k"), names)()
    distillation.open_teachers(recipe, classes)
    with pytest.raises(DistillationError, match=f"another order, from '{classes[7]}' on"):
        distillation.open_teachers(recipe, classes[7:] + classes[:7])


def test_each_teacher_has_its_weight_size_and_normalisation(sources, tmp_path):
    each = {
        "teacher_weight": [0.25, 3.0],
        "teacher_image_size": [48, 16],
        "teacher_mean": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        "teacher_std": [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
    }
    first = (0.25, 48, [0.1, 0.2, 0.3], [0.9, 0.8, 0.7])
    second = (3.0, 16, [0.4, 0.5, 0.6], [0.6, 0.5, 0.4])
    one = {key: values[: len(values) // 2] for key, values in each.items()}
    for options, wanted in ((each, [first, second]), (one, [first, first])):
        recipe = student_recipe(sources, tmp_path, "run wide", **options)
        found = distillation.open_teachers(recipe, DIGITS)
        assert [(t.weight, t.image_size, t.mean, t.std) for t in found] == wanted
    assert [t.name for t in found] == ["test_resnet", "resnet10t"]


def pil_resize(images: np.ndarray, size: int) -> torch.Tensor:
    """Pillow's bilinear resize, antialiased, of float planes (n, 3, h, w)."""
    planes = [
        Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR)
        for plane in images.reshape(-1, *images.shape[2:]).astype(np.float32)
    ]
    return torch.from_numpy(np.stack(planes)).reshape(*images.shape[:2], size, size)


@pytest.mark.parametrize("size", [20, 32, 45])
@pytest.mark.parametrize("differs", ["both", "mean", "std"])
def test_preprocess_equals_normalising_and_resizing_the_raw_image(size, differs):
    raw = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
    recipe = Recipe(mean=[0.1, 0.5, 0.9], std=[0.2, 0.3, 0.4])
    images = training.Normalize(recipe, CPU)(torch.from_numpy(raw))
    mean = recipe.mean if differs == "std" else [0.6, 0.5, 0.25]
    std = recipe.std if differs == "mean" else [1.0, 0.5, 0.3]
    teacher = distillation.Teacher("t", "t", nn.Identity(), size, mean, std)
    view = lambda images: teacher.preprocess(images, recipe.mean, recipe.std)
    wanted = (raw / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    torch.testing.assert_close(view(images), pil_resize(wanted, size), rtol=1e-4, atol=1e-4)
    mix = 0.3 * images + 0.7 * images.flip(0)  # stays the same mix
    mixed = 0.3 * view(images) + 0.7 * view(images).flip(0)
    torch.testing.assert_close(view(mix), mixed, rtol=1e-4, atol=1e-5)


def test_teacher_adapter_is_a_model_of_the_students_images(sources, tmp_path):
    recipe = student_recipe(sources, tmp_path)
    kd, images = distillation_of(recipe), batches_of(recipe, range(1))[0][0]
    logits = distillation.TeacherAdapter(kd.teachers[0], recipe)(images)
    assert torch.equal(logits, kd.teacher_outputs(images)[0]["logits"])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_teachers_are_frozen_in_eval_mode_and_the_precision_of_the_run(
    sources, tmp_path, precision, monkeypatch
):
    teachers, before, forwards = [], [], []

    def observed(*args):
        teachers.extend(open_teachers(*args))
        for model in (t.model for t in teachers):
            before.append({k: v.clone() for k, v in model.state_dict().items()})
            model.conv1.register_forward_hook(
                lambda module, given, out: forwards.append(
                    (out.dtype, out.requires_grad, module.training, torch.is_grad_enabled())
                )
            )
        return teachers

    open_teachers = distillation.open_teachers
    monkeypatch.setattr(distillation.student, "open_teachers", observed)
    options = {"precision": precision, "epochs": 1, "eval_every": 1}
    options |= {"image_size": 64, "val_resize": 64}  # a CPU computes smaller ones in fp32 alone
    run = train(student_recipe(sources, tmp_path, "run wide", **options))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert forwards == [(dtype, False, False, False)] * (2 * STEPS)
    for teacher, tensors in zip(teachers, before, strict=True):
        assert_same_tensors(teacher.model.state_dict(), tensors)
        assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())
    records = run.environment()["teachers"]
    assert records == [teacher.record() for teacher in teachers]
    assert records[0]["digest"] != records[1]["digest"] and len(records[0]["digest"]) == 12


# ---- a step


def view_by_hand(images: torch.Tensor, recipe: Recipe, size: int, mean, std) -> torch.Tensor:
    column = lambda values: torch.tensor(values)[:, None, None]
    pixels = images * column(recipe.std) + column(recipe.mean)
    return TF.resize((pixels - column(mean)) / column(std), [size, size], antialias=True)


def kl_by_hand(t: float):
    return lambda s, z, labels: (
        t * t * F.kl_div((s / t).log_softmax(1), (z / t).softmax(1), reduction="batchmean")
    )


def l2_by_hand(s, z, labels):
    return ((s - z) ** 2).mean()


def l2_normalized_by_hand(s, z, labels):
    return (2 - 2 * F.cosine_similarity(s.flatten(1), z.flatten(1))).mean()


def dkd(s, z, labels):
    return kd_losses.dkd(s, z, labels, 2.0, 2.0)


@contextlib.contextmanager
def hooked(model: nn.Module, names: list[str]):
    """Outputs of modules before anything changes them in place."""
    outputs = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(
            lambda module, given, out, n=n: outputs.update({n: out.clone()})
        )
        for n in names
        if n != "logits"
    ]
    yield outputs
    for hook in hooks:
        hook.remove()


# name -> teachers, options, (student's, teacher's, which teacher, weight, loss), steps of the ramp
LOOPS = {
    "logits": (
        "run",
        dict(teacher_weight=[0.5], kd_weight=[3.0], task_weight=0.3, kd_warmup_epochs=0.5),
        [("logits", "logits", 0, 1.5, kl_by_hand(4.0))],
        3,
    ),
    "two teachers of mixed and erased images": (
        "run wide",
        dict(teacher_weight=[1.0, 0.5], kd_loss=["dkd"], dkd_beta=2.0, temperature=2.0, **MIXED),
        [("logits", "logits", 0, 1.0, dkd), ("logits", "logits", 1, 0.5, dkd)],
        0,
    ),
    "modules of two teachers": (
        "run wide",
        dict(
            teacher_image_size=[16],
            teacher_weight=[2.0, 1.0],
            distill_pairs=[
                "logits -> teacher1:logits",
                "bn1 -> teacher1:bn1",  # the next layer works in place
                "layer1 -> teacher2:layer1",
                "global_pool -> teacher2:global_pool",
            ],
            kd_loss=["kl", "l2", "l2", "l2_normalized"],
            kd_weight=[1.0, 0.5, 0.3, 0.7],
            clip_grad_norm=0.5,
            micro_batch_size=16,
        ),
        [
            ("logits", "logits", 0, 2.0, kl_by_hand(4.0)),
            ("bn1", "bn1", 0, 1.0, l2_by_hand),
            ("layer1", "layer1", 1, 0.3, l2_by_hand),
            ("global_pool", "global_pool", 1, 0.7, l2_normalized_by_hand),
        ],
        0,
    ),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if "modules" in c else []) for c in LOOPS]
)
def test_distillation_equals_a_plain_loop(sources, tmp_path, float64, case):
    """The same batches through textbook PyTorch give the same losses and weights.

    Student and teacher get the same images, mixed and erased.
    """
    teachers, options, pairs, ramp = LOOPS[case]
    share = lambda step: min(1.0, step / ramp) if ramp else 1.0
    options = {"epochs": 1, "eval_every": 1, "precision": "fp32", "lr": 0.01, **options}
    recipe = student_recipe(sources, tmp_path, teachers, **options)
    run = train(recipe)

    views = [
        (
            load_teacher(sources, "run"),
            16 if "modules" in case else 24,
            TEACHER["mean"],
            TEACHER["std"],
        ),
        (load_teacher(sources, "wide"), 16, recipe.mean, recipe.std),
    ]
    model = training.create_model(recipe, 10).to(memory_format=torch.channels_last).train()
    adapters = nn.ModuleDict()
    if "modules" in case:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapters.update({"2": nn.Conv2d(32, 64, 1), "3": nn.Linear(96, 512)})
    student = nn.ModuleDict({"model": model, "adapters": adapters})
    start = {k: v.clone() for k, v in student.state_dict().items()}
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    rows = []
    task = kd = 0.0
    for images, targets, batch in batches_of(recipe, range(STEPS)):
        # cosine, half a period over all steps
        optimizer.param_groups[0]["lr"] = 0.005 * (1 + np.cos(np.pi * batch.step / STEPS))
        with hooked(model, [ours for ours, *_ in pairs]) as ours:
            ours["logits"] = model(images)
        part = len(images) / batch.global_size  # of the step, where it comes in parts
        mean = F.cross_entropy(ours["logits"], targets)
        compared = 0.0
        for i, (name, their_name, k, weight, loss) in enumerate(pairs):
            teacher, *view = views[k]
            with torch.no_grad(), hooked(teacher, [their_name]) as theirs:
                theirs["logits"] = teacher(view_by_hand(images, recipe, *view))
            adapted = adapters[str(i)](ours[name]) if str(i) in adapters else ours[name]
            compared = compared + weight * loss(adapted, theirs[their_name], targets)
        (part * (recipe.task_weight * mean + share(batch.step) * compared)).backward()
        task, kd = task + part * mean.item(), kd + part * compared.item()
        if batch.is_last:
            rows.append((task, kd))
            task = kd = 0.0
            if recipe.clip_grad_norm:
                nn.utils.clip_grad_norm_(student.parameters(), recipe.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    table, metrics = run.steps(), run.metrics()
    np.testing.assert_allclose(table[["task_loss", "kd_loss"]], rows, rtol=1e-10)
    ramp = np.array([share(step) for step in range(STEPS)])
    whole = recipe.task_weight * table.task_loss + ramp * table.kd_loss
    np.testing.assert_allclose(table.loss, whole, rtol=1e-12)
    images = np.array([60] * 5 + [24])
    for column in ("task_loss", "kd_loss", "loss"):
        mean = table[column] @ images / 324
        np.testing.assert_allclose(metrics[f"train_{column}"], mean, rtol=1e-12)
    state = run.load_checkpoint()
    ours = {f"{p}.{k}": v for p in ("model", "adapters") for k, v in state[p].items()}
    assert ours.keys() == start.keys()
    for name, value in student.state_dict().items():
        # Equal but for the order of sums, relative to the distance from the start.
        allowed = 1e-9 * (value - start[name]).abs().max().item()
        torch.testing.assert_close(ours[name], value, rtol=0, atol=allowed, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        dict(task_weight=0.0, kd_warmup_epochs=1.0, teacher_weight=[2.0], teacher_image_size=[48]),
        dict(teacher_mean=[0.5] * 3, teacher_std=[0.5] * 3, cache_teacher_logits=True),
        dict(distill_pairs=["logits", "fc -> fc"], kd_loss=["dkd", "l2"], dkd_beta=2.0),
        dict(teacher_model=["resnet18"], kd_weight=[2.0]),
    ],
)
def test_without_teacher_removes_all_distillation_options(sources, tmp_path, options):
    recipe = student_recipe(sources, tmp_path, name="kd", weight_decay=0.1, **options)
    alone = distillation.without_teacher(recipe)
    assert alone.name == "kd_alone" and alone.weight_decay == 0.1
    fields = alone.non_default()
    assert not [k for k in fields if k.startswith(("teach", "distill_pairs", "kd_", "temp", "dkd"))]
    assert fields.keys() <= recipe.non_default().keys() and alone.task_weight == 1.0


# ---- features


def test_adapters_exist_only_where_channels_differ(sources, tmp_path):
    kd = distillation_of(student_recipe(sources, tmp_path, "wide", **MODULES))
    adapters = kd.student.adapters
    shapes = {name: tuple(module.weight.shape) for name, module in adapters.named_children()}
    assert shapes == {"1": (64, 32, 1, 1), "2": (512, 96)}  # by the index of the pair
    assert isinstance(adapters["1"], nn.Conv2d) and isinstance(adapters["2"], nn.Linear)
    same = dict(distill_pairs=["layer1 -> layer1", "fc -> fc"], kd_loss=["l2"])
    recipe = student_recipe(sources, tmp_path, teacher_image_size=[16], **same)
    assert len(distillation_of(recipe).student.adapters) == 0
    pair = DistillPair("layers.3", "layers.3", 0, 1.0, None)
    adapter = create_adapter(pair, (7, 7, 768), (7, 7, 1024))  # Swin's maps are (h, w, C)
    assert isinstance(adapter, nn.Linear) and adapter.weight.shape == (1024, 768)


def test_adapters_follow_the_seed_and_keep_the_generator(sources, tmp_path):
    state = torch.get_rng_state()
    recipes = (student_recipe(sources, tmp_path, "wide", seed=s, **MODULES) for s in (0, 0, 1))
    first, again, other = (distillation_of(recipe).student.adapters for recipe in recipes)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_tensors(first.state_dict(), again.state_dict())
    assert not torch.equal(first["1"].weight, other["1"].weight)


def test_adapters_are_trained_but_not_part_of_the_model(sources, tmp_path, monkeypatch):
    hooks, created = [], []
    predict, create = inference.predict, training.create_model

    def observed(network, *args):
        hooks.append(sum(len(m._forward_hooks) for m in network.modules()))
        return predict(network, *args)

    monkeypatch.setattr(inference, "predict", observed)
    monkeypatch.setattr(build, "create_model", lambda *a: created.append(create(*a)) or created[-1])
    recipe = student_recipe(sources, tmp_path, "wide", ema_decay=0.9, **MODULES)
    run = train(recipe)
    state, names = run.load_checkpoint(), create(recipe, 10).state_dict().keys()
    assert state["model"].keys() == state["ema"].keys() == names
    assert load_file(run.file("best.safetensors")).keys() == names
    before = distillation_of(recipe).student.adapters.state_dict()
    assert state["adapters"].keys() == before.keys()
    assert all(not torch.equal(state["adapters"][k], before[k]) for k in before)
    assert hooks == [0, 0]  # raw and EMA
    assert not any(m._forward_hooks for m in created[0].modules())


def test_hooks_are_removed_even_if_a_forward_fails(sources, tmp_path):
    kd = distillation_of(student_recipe(sources, tmp_path, "wide", **MODULES))
    images = torch.zeros(2, 3, 16, 16)
    [outputs] = kd.teacher_outputs(images)
    shapes = {name: tuple(f.shape) for name, f in outputs.items()}
    assert shapes == {"layer1": (2, 64, 4, 4), "global_pool": (2, 512), "logits": (2, 10)}
    assert not any(output.requires_grad for output in outputs.values())
    _, features = kd.student(images)
    assert {i: tuple(f.shape) for i, f in features.items()} == {1: (2, 64, 4, 4), 2: (2, 512)}
    for network, call in ((kd.teachers[0].model, kd.teacher_outputs), (kd.student, kd.student)):
        with pytest.raises(RuntimeError):
            call(torch.zeros(2, 5, 16, 16))
        assert not any(m._forward_hooks for m in network.modules())


def test_adapters_of_a_frozen_student_are_trained(sources, tmp_path):
    """head_only_epochs and freeze name modules of the model; adapters are always trained."""
    options = dict(head_only_epochs=1, freeze=["conv1", "bn1"], **MODULES)
    recipe = student_recipe(sources, tmp_path, "wide", **options)
    run = runs.Run(recipe.folder)
    with contextlib.closing(training.fit(recipe, run)) as rows:
        next(row for row in rows if row["kind"] == "epoch")
    state, start = run.load_checkpoint(), distillation_of(recipe).student
    first = start.model.state_dict()
    changed = {k for k, v in first.items() if not torch.equal(v, state["model"][k])}
    assert changed == {"fc.weight", "fc.bias"}
    adapters = start.adapters.state_dict()
    assert not any(torch.equal(state["adapters"][k], v) for k, v in adapters.items())
    list(training.fit(recipe, run))
    weights = run.load_checkpoint()["model"]
    assert torch.equal(weights["conv1.0.weight"], first["conv1.0.weight"])
    assert not torch.equal(weights["layer1.0.conv1.weight"], first["layer1.0.conv1.weight"])


def test_adapters_that_are_not_finite_are_never_saved(sources, tmp_path, monkeypatch):
    recipe = student_recipe(sources, tmp_path, "wide", **MODULES)
    run, adapters = runs.Run(recipe.folder), []
    create = training.create_optimizer
    monkeypatch.setattr(
        "workbench.training.state.create_optimizer",
        lambda *a: adapters.append(a[2]) or create(*a),
    )
    rows = training.fit(recipe, run)
    next(rows)
    with torch.no_grad():
        adapters[0]["2"].bias[0] = float("inf")
    with pytest.raises(TrainingError, match="the loss is nan at step 0"):
        rows.close()
    assert not run.file("last.pt").exists()


# ---- stop and resume


PARTS = dict(micro_batch_size=10, kd_loss=["dist"], dropout=0.2)
STOPPED = {  # minutes between checkpoints, signal, teachers, options, cache of the attempts
    "features": (0.0, "SIGKILL", "wide", dict(ema_decay=0.9, **MODULES), [False]),
    "cache": (0.0, "SIGKILL", "run", dict(ema_decay=0.9, **MIXED), [True]),
    "cache now and then": (10.0, "SIGTERM", "run wide", PARTS, [True, False]),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c != "cache" else []) for c in STOPPED]
)
def test_stopped_distillation_resumes_bit_for_bit(sources, tmp_path, logit_cache, case):
    minutes, how, teachers, options, cached = STOPPED[case]
    options = {"epochs": 3, "eval_every": 1, "checkpoint_minutes": minutes, **options}
    undisturbed = train(student_recipe(sources, tmp_path / "undisturbed", teachers, **options))
    rng, stops = random.Random(case), 0
    for attempt in range(9):
        options |= {"workers": 2 * (attempt % 2)}
        options |= {"cache_teacher_logits": cached[attempt % len(cached)]}
        recipe = student_recipe(sources, tmp_path / "stopped", teachers, **options)
        run = runs.Run(recipe.folder)
        process = child(recipe, logit_cache)
        target = last_step(run) + rng.randint(1, 4)
        if attempt >= 3 or target > 14:  # of 18: too near the end to be sure of being in time
            target = 10**9
        while process.is_alive() and last_step(run) < target:
            time.sleep(0.01)
        if not process.is_alive():
            break
        time.sleep(0.05 * rng.random())  # anywhere in a step
        os.kill(process.pid, getattr(signal, how))
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if how == "SIGKILL" else 0)
        stops += 1
    process.join(60)
    assert process.exitcode == 0 and stops >= 2
    assert run.status()["state"] == "finished"
    assert_same_run(undisturbed, run)
    assert logit_cache.exists() == any(cached)


def test_changed_teachers_are_refused_on_resume(sources, tmp_path):
    path, weights = tmp_path / "t.pt", load_teacher(sources, "run").state_dict()
    torch.save(weights, path)
    files = dict(teacher=[str(path)], teacher_model=["test_resnet"])
    recipe = student_recipe(sources, tmp_path / "runs", **files)
    run = runs.Run(recipe.folder)
    with contextlib.closing(training.fit(recipe, run)) as rows:
        next(rows)
    before = run.file("last.pt").read_bytes()
    torch.save(models.create("test_resnet", 10, seed=2).state_dict(), path)
    digest = run.environment()["teachers"][0]["digest"]
    with pytest.raises(RunError, match=f"{path} changed since .*{digest}.* put it back"):
        train(recipe)
    assert run.file("last.pt").read_bytes() == before
    torch.save(weights, path)
    assert_same_run(train(recipe.replace(runs_dir=str(tmp_path / "new"))), train(recipe))


def test_plain_run_can_be_continued_with_a_teacher(sources, tmp_path):
    recipe = student_recipe(sources, tmp_path, epochs=1, eval_every=1)
    plain = train(distillation.without_teacher(recipe))
    recipe = student_recipe(sources, tmp_path, name="then", resume_from=str(plain.path))
    rows = list(training.fit(recipe, runs.Run(recipe.folder)))
    assert rows[0]["step"] == STEPS + 1 and rows[0]["kd_loss"] > 0
    options = {"name": "features", "resume_from": str(plain.path), **MODULES}
    with pytest.raises(RunError, match="last.pt does not fit this recipe"):
        train(student_recipe(sources, tmp_path, "wide", **options))


# ---- two processes


def train_in_group(rank, port, options, cache):
    in_float64()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train_in_child(options, cache)


@pytest.mark.parametrize(
    "teachers, options",
    [
        ("run", dict(cache_teacher_logits=True, **MIXED)),
        (
            "wide",
            dict(
                distill_pairs=["logits", "stem -> conv1", "head.flatten -> global_pool"],
                kd_loss=["kl", "l2", "l2"],
                teacher_image_size=[16],
                task_weight=0.5,
                kd_warmup_epochs=1.0,
            ),
        ),
    ],
    ids=["logits", "modules"],
)
def test_two_processes_equal_one(sources, tmp_path, float64, logit_cache, teachers, options):
    # Without batch statistics; the last step has two images, none for the second process.
    options |= dict(model="test_convnext", image_size=32, val_resize=32, precision="fp32")
    options |= dict(batch_size=46, lr=0.01, nesterov=False, epochs=1, eval_every=1)
    alone = {**options, "cache_teacher_logits": False}
    one = train(student_recipe(sources, tmp_path / "one", teachers, **alone))
    recipe = student_recipe(sources, tmp_path / "two", teachers, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [
        fork_server.Process(
            target=train_in_group, args=(rank, port, recipe.model_dump(), str(logit_cache.parent))
        )
        for rank in range(2)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(120)
    assert [process.exitcode for process in group] == [0, 0]
    two = runs.Run(recipe.folder)
    assert two.environment()["processes"] == 2
    for column in ("loss", "task_loss", "kd_loss"):
        np.testing.assert_allclose(one.steps()[column], two.steps()[column], rtol=1e-10)
    first, second = one.load_checkpoint(), two.load_checkpoint()
    for part in ("model", "adapters"):
        assert first[part].keys() == second[part].keys()
        for name, value in first[part].items():
            allowed = 1e-10 * value.abs().max().item()
            torch.testing.assert_close(second[part][name], value, rtol=0, atol=allowed, msg=name)
    assert len(second["adapters"]) == (4 if "distill_pairs" in options else 0)
    if recipe.cache_teacher_logits:  # both wrote into one file, and every row is there
        sizes = [path.stat().st_size for path in logit_cache.glob("*/epoch-*.rows")]
        assert sizes == [324 * 44]
