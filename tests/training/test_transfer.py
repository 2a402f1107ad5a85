"""Starting points, frozen parts, probing, layer decay, balance: what they keep and what they move.

Real transfer: from a few epochs on the embedded digits to the embedded letters.
"""

import copy
import math
import os
import shutil
import signal
import socket
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import in_float64, save_noise
from helpers import assert_same_run, assert_same_tensors, fork_server, train
from safetensors.torch import load_file, save_file
from timm.optim import param_groups_layer_decay

from workbench import data, distillation, export, models, runs, training
from workbench.export import prediction
from workbench.recipe import Recipe
from workbench.training import build, optim, setup, state
from workbench.training.distributed import DistContext

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> runs.Run:
    """A training on all digits, as short as it may be and still know them."""
    folder = tmp_path_factory.mktemp("digits")
    options = {"epochs": 3, "nesterov": True, "crop_scale": [0.6, 1.0], "eval_every": 3}
    run = train(Recipe(name="digits", workers=0, runs_dir=str(folder), **options))
    assert run.metrics().top1.iloc[-1] > 90
    return run


def letters(folder, **changes) -> Recipe:
    """Seven steps an epoch on real letters, validated at the end; all on that could leak state."""
    options = {
        "name": "letters",
        "dataset": "letters",
        "train_fraction": 0.1,
        "epochs": 2,
        "lr": 0.05,
        "nesterov": True,
        "weight_decay": 1e-2,
        "dropout": 0.2,
        "drop_path": 0.1,
        "ema_decay": 0.8,
        "log_every": 1,
        "workers": 0,
        "runs_dir": str(folder),
    }
    options = {**options, **changes}
    return Recipe(**{"eval_every": options["epochs"], **options})


STEPS = 7  # of an epoch: 203 images by 32
SGD = {"eval_every": 1}
ADAMW = {"optimizer": "adamw", "nesterov": False, "lr": 0.003}
LAMB = {"optimizer": "lamb", "nesterov": False, "lr": 0.01}
CLASSIFIER = {"fc.weight", "fc.bias"}
NORMS = [  # of test_resnet
    *("conv1.1", "conv1.4", "bn1", "layer1.0.bn1", "layer1.0.bn2"),
    *("layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.2"),
    *("layer3.0.bn1", "layer3.0.bn2", "layer3.0.bn3", "layer3.0.downsample.2"),
    *("layer4.0.bn1", "layer4.0.bn2", "layer4.0.downsample.2"),
]


def below(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def counts_not(name: str) -> bool:
    """Whether a tensor is other than a norm's count of batches, which starts at 0 everywhere."""
    return not name.endswith("num_batches_tracked")


def left_after(recipe: Recipe, step: int) -> runs.Run:
    """The run of a training that was left after a step."""
    run = runs.Run(recipe.folder)
    rows = training.fit(recipe, run)
    for row in rows:
        if row["step"] == step:
            break
    rows.close()
    return run


def begun_with(source: runs.Run) -> dict[str, torch.Tensor]:
    """What a training that starts from a run holds before its first step, but for the head."""
    tensors = source.load_checkpoint()["model"]
    return {k: v if counts_not(k) else torch.zeros_like(v) for k, v in tensors.items()}


@pytest.fixture
def made(monkeypatch) -> list:
    """The models that fit makes, to look at while they learn."""
    create, kept = build.create_model, []
    spy = lambda *given: kept.append(create(*given)) or kept[-1]
    for module in (build, setup):
        monkeypatch.setattr(module, "create_model", spy)
    return kept


# ---- where a training starts


def test_without_a_word_about_it_a_training_starts_from_its_seed(tmp_path):
    run = left_after(letters(tmp_path, seed=3), 1)
    assert run.environment()["start"] == "initialised from seed 3"
    assert not run.file("weights_report.csv").exists()


def test_weights_of_a_run_are_taken_told_and_listed_tensor_by_tensor(tmp_path, digits):
    run = left_after(letters(tmp_path, weights=str(digits.path)), 1)
    told = run.environment()["start"]
    theirs = load_file(digits.file("best.safetensors"))
    body = [k for k in theirs if k not in CLASSIFIER and counts_not(k)]
    assert f"{digits.path}/last.pt [model]: {len(body)} tensors loaded; 2 re-initialised" in told
    assert "fc.weight (file has (10, 96), model (26, 96))" in told
    table = pd.read_csv(run.file("weights_report.csv"), keep_default_na=False)
    assert table.columns.tolist() == ["tensor", "status", "why"]
    fate = dict(zip(table.tensor, table.status, strict=True))
    assert len(fate) == len(table)
    assert fate == dict.fromkeys(body, "loaded") | dict.fromkeys(CLASSIFIER, "re-initialised")
    assert (table.why != "").tolist() == (table.status != "loaded").tolist()


def test_every_tensor_of_model_and_file_stands_in_the_list_once(tmp_path, digits):
    tensors = load_file(digits.file("best.safetensors"))
    del tensors["layer1.0.conv1.weight"]
    tensors["bn1.weight"] = torch.ones(3)
    tensors["extra.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "odd.safetensors")
    recipe = letters(tmp_path, weights=str(tmp_path / "odd.safetensors"))
    table = pd.read_csv(left_after(recipe, 1).file("weights_report.csv"), keep_default_na=False)
    own = set(training.create_model(recipe, 26).state_dict())
    wanted = {k for k in own | set(tensors) if counts_not(k)}
    assert sorted(table.tensor) == sorted(wanted)
    fates = table.set_index("tensor")
    assert fates.loc["layer1.0.conv1.weight"].tolist() == ["re-initialised", "not in the file"]
    assert fates.loc["bn1.weight"].tolist() == ["re-initialised", "file has (3,), model (32,)"]
    assert fates.loc["extra.weight"].tolist() == ["ignored", "not in the model"]
    assert Counter(table.status) == {"re-initialised": 4, "ignored": 1, "loaded": len(wanted) - 5}


def test_a_folder_that_holds_a_training_goes_on_whatever_the_weights_became(tmp_path, digits):
    shutil.copytree(digits.path, tmp_path / "source")
    recipe = letters(tmp_path, weights=str(tmp_path / "source"), epochs=1)
    run = left_after(recipe, 3)
    listed = run.file("weights_report.csv").read_bytes()
    shutil.rmtree(tmp_path / "source")
    list(training.fit(recipe, run))
    assert run.environment()["start"] == "resumes after step 3"
    assert (
        run.status()["state"] == "finished"
        and run.file("weights_report.csv").read_bytes() == listed
    )


def test_resume_from_is_taken_once_and_afterwards_the_folder_itself(tmp_path):
    first = left_after(letters(tmp_path, name="first"), 4)
    recipe = letters(tmp_path, name="second", resume_from=str(first.path))
    run = left_after(recipe, 6)
    assert run.environment()["start"] == f"resumes after step 4 of {first.path}"
    assert run.steps().step.tolist() == [5, 6]
    shutil.rmtree(first.path)
    assert next(iter(training.fit(recipe, run)))["step"] == 7
    assert run.environment()["start"] == "resumes after step 6"


def test_published_weights_are_taken_and_told(tmp_path, digits, monkeypatch):
    """timm's own loader, fed from a file where it would ask the network."""
    file, create = digits.file("best.safetensors"), timm.create_model
    overlay = {"file": str(file), "num_classes": 10, "classifier": "fc"}
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: create(*a, pretrained_cfg_overlay=overlay, **k)
    )
    body = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    run = left_after(letters(tmp_path, pretrained=True, freeze=body), 2)
    listed = pd.read_csv(run.file("weights_report.csv"), keep_default_na=False)
    told = run.environment()["start"]
    assert told.startswith("timm's published weights of test_resnet: ")
    assert "2 re-initialised: fc.weight (file has (10, 96), model (26, 96))" in told
    assert set(listed.tensor[listed.status == "re-initialised"]) == CLASSIFIER
    assert set(listed.tensor[listed.status == "loaded"]) == {
        k for k in load_file(file) if k not in CLASSIFIER and counts_not(k)
    }
    ours, theirs = run.load_checkpoint()["model"], load_file(file)
    kept = [k for k in theirs if below(k, body) and counts_not(k)]
    assert kept and not [k for k in kept if not torch.equal(ours[k], theirs[k])]


def test_a_run_from_published_weights_goes_on_without_asking_for_them_again(
    tmp_path, digits, monkeypatch
):
    create = timm.create_model
    overlay = {"file": str(digits.file("best.safetensors")), "num_classes": 10, "classifier": "fc"}
    fed = lambda *a, **k: create(*a, pretrained_cfg_overlay=overlay, **k)
    monkeypatch.setattr(timm, "create_model", fed)
    recipe = letters(tmp_path, pretrained=True, epochs=1)
    run = left_after(recipe, 3)

    def offline(*a, pretrained=False, **k):
        assert not pretrained, "last.pt is all that a resume needs"
        return create(*a, **k)

    monkeypatch.setattr(timm, "create_model", offline)
    list(training.fit(recipe, run))
    assert run.environment()["start"] == "resumes after step 3"
    assert run.status()["state"] == "finished"


TINY = {
    "dataset": "files",
    "image_size": 16,
    "val_resize": 16,
    "batch_size": 6,
    "lr": 0.01,
    "precision": "fp32",
    "log_every": 1,
    "workers": 0,
}


@pytest.fixture
def abc(image_folder, tmp_path) -> tuple[Recipe, runs.Run]:
    """A training on three class folders, and its recipe."""
    recipe = Recipe(
        name="abc", data_dir=str(image_folder), runs_dir=str(tmp_path), **TINY, epochs=1
    )
    return recipe, train(recipe)


def test_a_classifier_of_the_same_classes_is_kept_and_of_others_made_anew(abc, image_folder, made):
    recipe, source = abc
    theirs = source.load_checkpoint()["model"]
    for old, new in (("a", "x"), ("b", "y"), ("c", "z")):  # the same files under other names
        for part in ("train", "val"):
            shutil.copytree(image_folder / part / old, image_folder / f"{part}2" / new)
    same = recipe.replace(name="same", weights=str(source.path), lr=1e-12)
    others = same.replace(name="others", train_root=["train2"], val_root=["val2"])
    told = {r.name: train(r).environment()["start"] for r in (same, others)}
    assert "re-initialised" not in told["same"]
    assert "2 re-initialised: fc.weight (the file's classes are others)" in told["others"]
    fresh = training.create_model(others, 3).fc.weight
    torch.testing.assert_close(made[0].fc.weight.detach(), theirs["fc.weight"])
    torch.testing.assert_close(made[1].fc.weight, fresh)
    assert not torch.allclose(fresh, theirs["fc.weight"])


def part_of(digits: runs.Run, path: Path, *modules: str) -> Path:
    tensors = load_file(digits.file("best.safetensors"))
    save_file({k: v for k, v in tensors.items() if below(k, list(modules))}, path)
    return path


def test_weights_of_less_than_half_the_model_are_refused_unless_forced(tmp_path, digits):
    file = part_of(digits, tmp_path / "part.safetensors", "conv1", "layer1", "fc")
    with pytest.raises(models.ModelError, match="of another model.*allow_partial_weights: true"):
        train(letters(tmp_path, weights=str(file)))
    recipe = letters(tmp_path, name="forced", weights=str(file), allow_partial_weights=True,
                     freeze=["conv1", "layer1"])  # fmt: skip
    ours = left_after(recipe, 1).load_checkpoint()["model"]
    theirs = {k: v for k, v in load_file(file).items() if k not in CLASSIFIER and counts_not(k)}
    assert_same_tensors({k: ours[k] for k in theirs}, theirs)


@pytest.mark.parametrize("forced", [False, True])
def test_weights_that_hold_nan_are_refused_forced_or_not(tmp_path, digits, forced):
    tensors = load_file(digits.file("best.safetensors"))
    tensors["layer3.0.conv2.weight"].view(-1)[5] = math.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    recipe = letters(
        tmp_path, weights=str(tmp_path / "nan.safetensors"), allow_partial_weights=forced
    )
    with pytest.raises(models.ModelError, match="layer3.0.conv2.weight holds nan"):
        train(recipe)


# ---- freeze


@pytest.mark.parametrize("optimizer", [SGD, ADAMW, LAMB], ids=["sgd", "adamw", "lamb"])
def test_frozen_parts_keep_every_bit_and_the_others_move(tmp_path, digits, made, optimizer):
    freeze = ["conv1", "layer1", "layer3.0.bn1"]
    recipe = letters(tmp_path, weights=str(digits.path), freeze=freeze, **optimizer)
    run, start = runs.Run(recipe.folder), begun_with(digits)
    for row in training.fit(recipe, run):  # between steps, and after each validation
        [model] = made
        modes = {name: part.training for name, part in model.named_modules()}
        assert modes == {n: not below(f"{n}.", freeze) for n in modes}, row["kind"]
        silent = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert silent == {n for n, _ in model.named_parameters() if below(n, freeze)}
        assert all(p.grad is None for n, p in model.named_parameters() if n in silent)
    state = run.load_checkpoint()
    learnt = [n for n, _ in made[0].named_parameters() if not below(n, freeze)]
    assert len(state["optimizer"]["state"]) == len(learnt)
    for weights in ("model", "ema"):
        for name, value in state[weights].items():
            if below(name, freeze):
                assert torch.equal(value, start[name]), f"{name} moved"
            elif name not in CLASSIFIER:
                assert not torch.equal(value, start[name]), f"{name} did not move"


def test_what_is_frozen_is_counted_out_of_the_parameters_on_record(tmp_path, digits):
    whole = left_after(letters(tmp_path, name="whole"), 1).environment()["parameters"]
    recipe = letters(tmp_path, weights=str(digits.path), freeze=["layer4"])
    frozen = sum(p.numel() for p in training.create_model(recipe, 26).layer4.parameters())
    assert left_after(recipe, 1).environment()["parameters"] == whole - frozen > 0


def test_a_module_that_is_not_there_is_named_with_the_nearest_ones(tmp_path):
    with pytest.raises(models.ModelError, match="no module 'layer11'; near: .*layer1"):
        train(letters(tmp_path, freeze=["conv1", "layer11"]))


@pytest.mark.parametrize(
    "options",
    [
        {"freeze": ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]},
        {"freeze": ["fc"], "head_only_epochs": 1},
    ],
)
def test_nothing_left_to_learn_is_an_error_before_the_first_step(tmp_path, options):
    recipe = letters(tmp_path, **options)
    with pytest.raises(training.TrainingError, match="freeze leaves nothing to train"):
        train(recipe)
    assert runs.Run(recipe.folder).steps().empty


@pytest.mark.parametrize("world", [3, 5, 7])
def test_the_mean_over_processes_of_a_frozen_norm_is_what_each_of_them_holds(monkeypatch, world):
    """Sums of equal numbers, divided again, are off by a last bit when rounded in between."""

    def all_reduce(value, *how, **more):
        own = value.clone()
        for _ in range(world - 1):
            value += own

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    norm = torch.nn.BatchNorm2d(1000)
    generator = torch.Generator().manual_seed(0)
    norm.running_mean.normal_(generator=generator)
    norm.running_var.uniform_(generator=generator)
    before = copy.deepcopy(norm.state_dict())
    context = DistContext(torch.device("cpu"), 0, world, world)
    context.group = object()
    context.average_buffers(norm)
    assert_same_tensors(norm.state_dict(), before)


# ---- probing


@pytest.mark.parametrize(
    ("model", "classifier", "options"),
    [("test_resnet", "fc", ADAMW), ("test_convnext", "head.fc", LAMB)],
)
def test_while_it_probes_the_classifier_alone_learns_and_then_everything(
    tmp_path, model, classifier, options
):
    recipe = letters(tmp_path, model=model, epochs=3, head_only_epochs=1, **options)
    start = training.create_model(recipe, 26).state_dict()
    body = [k for k in start if not below(k, [classifier])]
    probed = left_after(recipe, STEPS).load_checkpoint()
    for weights in ("model", "ema"):
        assert_same_tensors({k: probed[weights][k] for k in body}, {k: start[k] for k in body})
        assert not torch.equal(
            probed[weights][f"{classifier}.weight"], start[f"{classifier}.weight"]
        )
    ages = [s["step"].item() for s in probed["optimizer"]["state"].values()]
    assert ages == [STEPS] * 2  # of the classifier's weight and bias; nothing else has a state

    later = left_after(recipe, 2 * STEPS).load_checkpoint()
    still = [k for k in body if torch.equal(later["model"][k], start[k])]
    assert not still
    ages = Counter(s["step"].item() for s in later["optimizer"]["state"].values())
    count = len(list(training.create_model(recipe, 26).parameters()))
    assert ages == {2 * STEPS: 2, STEPS: count - 2}


def test_a_probe_sees_the_body_as_it_is_evaluated(tmp_path, digits, made):
    """No batch statistics and no drop path: the features of a linear probe are fixed."""
    recipe = letters(tmp_path, weights=str(digits.path), head_only_epochs=1, freeze=["layer1"])
    for row in training.fit(recipe, runs.Run(recipe.folder)):
        modes = {name: part.training for name, part in made[0].named_modules()}
        if row["step"] <= STEPS:
            assert {name for name, mode in modes.items() if mode} == {"fc"}
    assert {name for name, mode in modes.items() if not mode} == {
        name for name in modes if below(f"{name}.", ["layer1"])
    }


EVERYTHING = {
    **ADAMW,
    "freeze": ["layer1", "bn1"],
    "layer_decay": 0.7,
    "decay_norm_and_bias": False,
    "class_balanced_sampling": 0.5,
    "clip_grad_norm": 1.0,
}


def _die_after(options, step):
    torch.set_num_threads(1)
    recipe = Recipe(**options)
    for row in training.fit(recipe, runs.Run(recipe.folder)):
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("options", "deaths"),
    [
        # A checkpoint after every step: killed before, at and right after the switch.
        pytest.param(
            {"checkpoint_minutes": 0.0},
            {4: 4, STEPS: STEPS, STEPS + 1: STEPS + 1},
            marks=pytest.mark.slow,
        ),  # fmt: skip
        ({"checkpoint_minutes": 0.0, **EVERYTHING}, {STEPS: STEPS, STEPS + 2: STEPS + 2}),
        # Checkpoints at the ends of epochs: steps of the probe, and the switch, are done again.
        ({"checkpoint_minutes": 10.0, **EVERYTHING}, {5: 0, STEPS + 3: STEPS}),
        pytest.param(
            {"checkpoint_minutes": 10.0, **LAMB}, {STEPS + 3: STEPS}, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "everything", "again", "lamb"],
)
def test_a_probe_killed_anywhere_ends_bit_for_bit_as_the_undisturbed_one(
    tmp_path, digits, options, deaths
):
    options = {"epochs": 3, "head_only_epochs": 1, "weights": str(digits.path), **options}
    undisturbed = train(letters(tmp_path / "undisturbed", **options))
    recipe = letters(tmp_path / "disturbed", **options)
    run = runs.Run(recipe.folder)
    for step, kept in deaths.items():
        child = fork_server.Process(target=_die_after, args=(recipe.model_dump(), step))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL and run.status()["state"] == "interrupted"
        state = run.load_checkpoint()
        assert (state["progress"]["step"] if state else 0) == kept
    list(training.fit(recipe, run))
    assert run.status()["state"] == "finished"
    assert_same_run(undisturbed, run)


def _one_of_two(options, rank, port):
    """What torchrun tells a process, told to one that has imported everything."""
    told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in told.items()})
    torch.set_num_threads(1)
    in_float64()
    train(Recipe(**options))


def test_two_processes_probe_freeze_and_balance_as_one_does(tmp_path, digits, float64):
    """Over gloo; frozen norms see no batch, so that halves of it make the same steps."""
    options = {
        **EVERYTHING,
        "freeze": [*NORMS, "layer2"],
        "head_only_epochs": 1,
        "precision": "fp32",
    }
    options |= {"dropout": 0.0, "drop_path": 0.0, "weights": str(digits.path)}
    one = train(letters(tmp_path / "one", **options))
    recipe = letters(tmp_path / "two", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = [fork_server.Process(target=_one_of_two, args=(recipe.model_dump(), rank, port))
            for rank in range(2)]  # fmt: skip
    for process in team:
        process.start()
    for process in team:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in team] == [0, 0]
    two, start = runs.Run(recipe.folder), begun_with(digits)
    assert two.environment()["processes"] == 2
    np.testing.assert_allclose(one.steps().loss, two.steps().loss, rtol=1e-10)
    first, second = one.load_checkpoint(), two.load_checkpoint()
    for weights in ("model", "ema"):
        for name, value in first[weights].items():
            if below(name, options["freeze"]):
                assert torch.equal(second[weights][name], start[name].to(value.dtype)), name
            else:
                allowed = 1e-9 * value.abs().max().item()
                torch.testing.assert_close(second[weights][name], value, rtol=0, atol=allowed)
    states = [{i: s["step"].item() for i, s in c["optimizer"]["state"].items()}
              for c in (first, second)]  # fmt: skip
    assert states[0] == states[1] and set(states[0].values()) == {STEPS, 2 * STEPS}


# ---- layer decay


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize(
    "name", ["test_resnet", "resnet18", "resnet50", "vit_tiny_patch16_224", "convnext_tiny",
             "swin_tiny_patch4_window7_224", "mobilenetv3_small_100"],
)  # fmt: skip
def test_shares_of_lr_and_decay_are_timms(name, decay_norm_and_bias):
    recipe = Recipe(
        model=name,
        optimizer="adamw",
        layer_decay=0.7,
        weight_decay=0.05,
        decay_norm_and_bias=decay_norm_and_bias,
    )
    with torch.device("meta"):
        model = models.create(name, 10)
    spared = () if decay_norm_and_bias else getattr(model, "no_weight_decay", set)()
    theirs = param_groups_layer_decay(
        model, 0.05, spared, layer_decay=0.7, weight_decay_exclude_1d=not decay_norm_and_bias
    )
    ours = training.create_optimizer(recipe, model).param_groups
    told = [
        {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        for groups in (ours, theirs)
    ]
    assert told[0] == told[1] and len(told[0]) == len(list(model.parameters()))
    shares = {share for share, _ in told[0].values()}
    assert max(shares) == 1 and len(shares) > 4


def test_frozen_layers_leave_the_shares_of_the_others_as_they_are():
    recipe = Recipe(layer_decay=0.5)
    model = training.create_model(recipe, 10)
    before = training.lr_scales(model, 0.5)
    model.layer4.requires_grad_(False)
    groups = training.create_optimizer(recipe, model).param_groups
    share = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert {n: share[id(p)] for n, p in model.named_parameters() if id(p) in share} == {
        n: s for n, s in before.items() if not n.startswith("layer4.")
    }


def test_every_group_learns_at_the_schedules_rate_times_its_share(tmp_path, monkeypatch):
    create, kept = optim.create_optimizer, []
    spy = lambda *given: kept.append(create(*given)) or kept[-1]
    monkeypatch.setattr(state, "create_optimizer", spy)
    recipe = letters(tmp_path, layer_decay=0.5, decay_norm_and_bias=False, lr=0.04)
    model = training.create_model(recipe, 26)
    timms = param_groups_layer_decay(model, layer_decay=0.5)
    shares = sorted({group["lr_scale"] for group in timms})
    for row in training.fit(recipe, runs.Run(recipe.folder)):
        rate = 0.02 * (1 + math.cos(math.pi * (row["step"] - 1) / (2 * STEPS)))  # cosine
        used = sorted({group["lr"] for group in kept[0].param_groups})
        assert used == pytest.approx([rate * share for share in shares], rel=1e-12)
        assert row["lr"] == pytest.approx(rate, rel=1e-12)


def test_a_first_step_goes_as_far_as_the_share_says(tmp_path, digits):
    """Plain SGD: the way of every tensor is its share of the way without layer_decay."""
    plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "precision": "fp32"}
    plain |= {"schedule": "constant", "weights": str(digits.path)}
    start = {k: v for k, v in digits.load_checkpoint()["model"].items() if k not in CLASSIFIER}
    ends = [
        left_after(letters(tmp_path / str(d), layer_decay=d, **plain), 1).load_checkpoint()["model"]
        for d in (None, 0.5)
    ]
    model = timm.create_model("test_resnet", num_classes=26)
    names = {id(p): n for n, p in model.named_parameters()}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for name in {names[id(p)] for p in group["params"]} - CLASSIFIER:
            ways = [end[name] - start[name] for end in ends]
            assert ways[0].abs().max() > 1e-5
            torch.testing.assert_close(ways[1], ways[0] * group["lr_scale"], rtol=1e-3, atol=2e-7)


# ---- balanced classes in a training


@pytest.fixture
def unequal(tmp_path) -> Recipe:
    """Twelve, four and two images of three classes to train on."""
    for part, counts in (("train", (12, 4, 2)), ("val", (2, 2, 2))):
        for name, count in zip("abc", counts, strict=True):
            folder = tmp_path / "unequal" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                save_noise(folder / f"{i}.png", seed=[ord(name), i, part == "val"])
    places = {"data_dir": str(tmp_path / "unequal"), "runs_dir": str(tmp_path)}
    return Recipe(**TINY, **places, epochs=3, class_balanced_sampling=1.0)


@pytest.fixture
def given(monkeypatch) -> dict[int, list[int]]:
    """The rows of the images that a training was given, by step."""
    batches, seen = data.train_loader, {}

    def spy(*arguments, **how):
        for batch in batches(*arguments, **how):
            seen.setdefault(batch.step, []).extend(batch.indices.tolist())
            yield batch

    monkeypatch.setattr(data, "train_loader", spy)
    return seen


def test_a_balanced_training_sees_every_class_equally_often(unequal, given):
    train(unequal)
    labels = data.load_dataset(unequal).train.label.to_numpy()
    for epoch in range(3):
        shown = [row for step in range(3 * epoch, 3 * epoch + 3) for row in given[step]]
        assert Counter(labels[shown].tolist()) == {0: 6, 1: 6, 2: 6}


def test_balance_changes_the_steps_and_nothing_on_record_but_the_recipe(unequal):
    balanced, plain = (
        train(unequal.replace(name=f"b{b}", class_balanced_sampling=b)) for b in (1.0, 0.0)
    )
    ours, theirs = balanced.environment(), plain.environment()
    changing = {"recipe", "seconds", "peak_memory_mb"}
    assert {k for k in ours | theirs if ours.get(k) != theirs.get(k)} <= changing
    assert ours["recipe"] != theirs["recipe"]
    assert balanced.metrics().images.tolist() == plain.metrics().images.tolist() == [18] * 3
    assert balanced.steps().loss.tolist() != plain.steps().loss.tolist()
    assert_same_run_without_ema(balanced, train(unequal.replace(name="again")))


def assert_same_run_without_ema(one: runs.Run, other: runs.Run):
    assert_same_tensors(*(run.load_checkpoint()["model"] for run in (one, other)))
    assert one.file("metrics.csv").read_bytes() == other.file("metrics.csv").read_bytes()


def test_the_images_of_a_loss_that_is_not_finite_are_those_that_were_shown(unequal, given):
    recipe = unequal.replace(lr=1e30)
    with pytest.raises(training.TrainingError, match="the loss is"):
        train(recipe)
    spoilt = pd.read_csv(runs.Run(recipe.folder).file("nonfinite.csv"))
    files = data.load_dataset(recipe).train.file
    [step] = set(spoilt.step)
    assert spoilt.file.tolist() == files[given[step]].tolist()


# ---- what it is for


@pytest.mark.slow
def test_from_digits_to_letters_beats_a_start_from_scratch_at_the_same_budget(tmp_path, digits):
    """Two epochs on 1,014 letters; the start from scratch takes the better of two rates.

    It lay 4 to 12 points ahead for three seeds in both precisions.
    """
    options = {"train_fraction": 0.5, "weight_decay": 0.0}
    options |= {"dropout": 0.0, "drop_path": 0.0, "ema_decay": None}
    scratch = [
        train(letters(tmp_path, name=f"scratch{lr}", lr=lr, **options)).metrics().top1.iloc[-1]
        for lr in (0.1, 0.2)
    ]
    moved = train(letters(tmp_path, lr=0.1, weights=str(digits.path), **options)).metrics()
    assert moved.top1.iloc[-1] > max(scratch)


# ---- which weights of a run


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> runs.Run:
    """A run whose EMA has hardly left the initial weights, as far below the raw ones."""
    options = {"epochs": 2, "nesterov": True, "ema_decay": 0.9999, "workers": 0, "eval_every": 2}
    run = train(Recipe(name="late", runs_dir=str(tmp_path_factory.mktemp("late")), **options))
    measured = run.metrics().iloc[-1]
    assert measured.top1 - measured.ema_top1 > 30
    return run


def figures(run: runs.Run) -> str:
    last = run.metrics().iloc[-1]
    return f"top-1 raw {last.top1:.2f} %, EMA {last.ema_top1:.2f} %"


def is_raw(model: torch.nn.Module, run: runs.Run) -> bool:
    tensors = run.load_checkpoint()["model"]
    return all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items() if counts_not(k))


DIGITS = [str(i) for i in range(10)]


@pytest.mark.parametrize("file", ["", "last.pt"])
def test_weights_of_a_run_are_the_raw_ones_where_its_average_is_far_worse(tmp_path, late, file):
    recipe = Recipe(name="on", runs_dir=str(tmp_path), weights=str(late.path / file), lr=0.01)
    model, started = training.build_initial_model(recipe, DIGITS)
    assert is_raw(model, late) and f"[model, {figures(late)}]" in str(started)


def test_export_and_predict_take_the_raw_weights_too_and_respect_a_choice(late):
    assert is_raw(export.trained_model(late)[2], late)
    source = prediction.open_source(late.path)
    assert is_raw(source.model, late)
    assert str(source).endswith(f"last.pt, raw weights ({figures(late)}), 10 classes")
    assert not is_raw(export.trained_model(late, "ema")[2], late)
    assert f"ema weights ({figures(late)})" in str(prediction.open_source(late.path, "ema"))


def test_a_teacher_is_the_better_of_its_weights_with_its_own_figure(tmp_path, late):
    recipe = Recipe(teacher=[str(late.path)], kd_loss=["kl"], runs_dir=str(tmp_path))
    [teacher] = distillation.open_teachers(recipe, DIGITS)
    assert is_raw(teacher.model, late) and teacher.top1 == late.metrics().top1.iloc[-1]
    assert figures(late) in str(teacher)


@pytest.mark.parametrize(
    "raw, ema, images, taken",
    [
        (99.4, 10.0, 500, "raw"),
        (90.0, 92.0, 500, "ema"),
        (90.0, 89.0, 500, "ema"),  # 5 of 500 images may be luck
        (90.0, 89.0, 50_000, "raw"),  # 500 of 50,000 are not
        (100.0, 0.0, 3, "raw"),
        (100.0, 100.0, 3, "ema"),
        (None, None, None, "raw"),  # a run that began and was not validated yet
    ],
)
def test_an_average_is_taken_unless_it_is_worse_beyond_luck(tmp_path, raw, ema, images, taken):
    row = {"epoch": [1], "top1": [raw], "ema_top1": [ema], "val_images": [images]}
    pd.DataFrame(row).to_csv(tmp_path / "metrics.csv", index=False)
    pd.DataFrame({"step": [1]}).to_csv(tmp_path / "steps.csv", index=False)
    assert runs.Run(tmp_path).choose_weights()[0] == taken
    assert runs.Run(tmp_path).choose_weights("ema")[0] == "ema"
    if raw is not None and 0 < ema < raw < 100:
        p, q = raw / 100, ema / 100  # the same by simulation of two independent lists
        drawn = np.random.default_rng(0).binomial(images, [p, q], (20_000, 2)) / images
        assert (taken == "raw") == (p - q > 2 * (drawn[:, 0] - drawn[:, 1]).std())


# ---- normalised as the weights were trained


def test_another_normalisation_than_that_of_the_weights_is_said_with_both(tmp_path, digits):
    other = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    for source in (digits.path, digits.file("best.safetensors")):
        recipe = letters(tmp_path, weights=str(source), **other)
        told = str(training.build_initial_model(recipe, [str(i) for i in range(26)])[1])
        for key, value in other.items():
            assert f"{key} is {value}, and {digits.recipe()[key]} where its weights" in told
    assert training.other_normalization(letters(tmp_path, weights=str(digits.path))) == ""
    onward = letters(tmp_path, resume_from=str(digits.path), **other)
    assert "mean is [0.0, 0.0, 0.0]" in training.other_normalization(onward)


def test_published_weights_are_normalised_as_timm_says(tmp_path):
    recipe = letters(tmp_path, model="vit_tiny_patch16_224", pretrained=True)
    published = timm.get_pretrained_cfg(recipe.model)
    told = training.other_normalization(recipe)
    assert f"{recipe.mean}, and {list(published.mean)}" in told
    fitting = recipe.replace(mean=list(published.mean), std=list(published.std))
    assert training.other_normalization(fitting) == ""


def test_a_weights_file_in_a_run_folder_teaches_at_the_normalisation_of_its_run(tmp_path, digits):
    options = {"teacher_model": ["test_resnet"], "kd_loss": ["kl"], "runs_dir": str(tmp_path)}
    source = str(digits.file("best.safetensors"))
    recipe = Recipe(teacher=[source], mean=[0.1] * 3, std=[0.9] * 3, **options)
    [teacher] = distillation.open_teachers(recipe, DIGITS)
    assert (teacher.mean, teacher.std) == (digits.recipe()["mean"], digits.recipe()["std"])


# ---- sizes, of images and of batches


def test_a_validation_size_the_model_does_not_take_is_told_before_the_first_step(
    tmp_path, image_folder
):
    places = {"data_dir": str(image_folder), "runs_dir": str(tmp_path)}
    sizes = {"image_size": 32, "val_image_size": 48, "val_resize": 48}
    recipe = Recipe(**TINY | sizes, **places, model="test_vit_relpos")
    with pytest.raises(models.ModelError, match="test_vit_relpos does not take val_image_size 48"):
        train(recipe)
    assert runs.Run(recipe.folder).steps().empty


SINGLE = [  # 18 images: what leaves a forward with one of them, and what the advice makes of it
    ({"batch_size": 1}, {"batch_size": 2}),
    ({"batch_size": 17}, {}),
    ({"batch_size": 6, "micro_batch_size": 1}, {"micro_batch_size": 2}),
    ({"batch_size": 4, "micro_batch_size": 3}, {"micro_batch_size": 2}),
    ({"batch_size": 5, "micro_batch_size": 2}, {"micro_batch_size": None}),
]


@pytest.mark.parametrize("options, advice", SINGLE)
def test_the_advice_against_forwards_of_one_image_helps(tmp_path, image_folder, options, advice):
    places = {"data_dir": str(image_folder), "runs_dir": str(tmp_path)}
    recipe = Recipe(**TINY | options, **places, epochs=1)
    with pytest.raises(training.TrainingError) as caught:
        train(recipe)
    told = str(caught.value)
    assert "set drop_last: true and batch_size to 2 or more" in told
    assert "no micro_batch_size or one that is 2 or more and divides it" in told
    run = train(recipe.replace(**advice, drop_last=True))
    assert run.status()["state"] == "finished"


def test_frozen_norms_take_a_single_image(tmp_path, image_folder):
    places = {"data_dir": str(image_folder), "runs_dir": str(tmp_path)}
    run = train(Recipe(**TINY | {"batch_size": 1}, **places, epochs=1, freeze=NORMS))
    assert run.status()["state"] == "finished"
