"""Options that timm, torch and torchvision define: the same as theirs, exact after a resume."""

import io
import os
import signal

import pandas as pd
import pytest
import timm
import timm.optim
import torch
from helpers import assert_same_run, assert_same_tensors, fork_server, train
from safetensors import safe_open
from torch.nn import functional as F
from training_helpers import left_after, small

from workbench import counted, data, models, runs, training
from workbench.recipe import Recipe, RecipeError
from workbench.training.distributed import DistContext
from workbench.training.state import TrainState

HANDFUL = ["adan", "lion", "muon", "adamp", "nadamw", "rmsproptf"]
UNUSABLE = ("adahessian", "kron", "bnb", "fused")
USABLE = [name for name in timm.optim.list_optimizers() if not name.startswith(UNUSABLE)]


def adan(**args) -> dict:
    return {"optimizer": "adan", "nesterov": False, "lr": 0.003, "optimizer_args": args}


def train_and_die(options, step: int):
    """Kills its own process, as kill -9 does, after a step."""
    recipe = Recipe(**options)
    for row in training.fit(recipe, runs.Run(recipe.folder)):
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)


def check_resume(folder, undisturbed: runs.Run | None = None, **options) -> runs.Run:
    """Trains `small` without a stop and left in the middle of an epoch: the same bits."""
    undisturbed = undisturbed or train(small(folder / "undisturbed", **options))
    recipe = small(folder / "left", **options)
    left_after(recipe, 15)
    assert_same_run(undisturbed, train(recipe))
    return undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("options", [*({**adan(), "optimizer": name} for name in HANDFUL)], ids=str)
def test_a_killed_run_ends_bit_for_bit_as_the_undisturbed_one(tmp_path, options):
    undisturbed = train(small(tmp_path / "undisturbed", **options))
    recipe = small(tmp_path / "killed", checkpoint_minutes=0.0, **options)
    for step in (5, 17):
        child = fork_server.Process(target=train_and_die, args=(recipe.model_dump(), step))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert_same_run(undisturbed, train(recipe))


# ---- optimizers


def step(model, optimizer, seed: int) -> None:
    """A step at a learning rate of its own, as the schedule sets it."""
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group.get("lr_scale", 1.0) / (1 + seed)
    F.cross_entropy(model(images), torch.arange(8)).backward()
    optimizer.step()
    optimizer.zero_grad()


def network():
    return models.create("test_resnet", 10, seed=0).train()


@pytest.mark.parametrize("name", [*HANDFUL, "adafactorbv", "lambw"])
def test_an_optimizer_is_timms_with_timms_groups(name):
    args = {"eps": 1e-6} if name not in ("lion", "adafactorbv") else {}
    recipe = Recipe(
        optimizer=name, optimizer_args=args, weight_decay=0.05, decay_norm_and_bias=False,
        layer_decay=0.8, lr=0.01, clip_grad_norm=0.5 if name == "lambw" else None,
    )  # fmt: skip
    if name == "lambw":
        args = {"eps": 1e-6, "max_grad_norm": 0.5}
    ours, theirs = network(), network()
    training.check_optimizer(recipe)
    one = training.create_optimizer(recipe, ours)
    other = timm.optim.create_optimizer_v2(
        theirs, name, lr=0.01, weight_decay=0.05, layer_decay=0.8, **args
    )
    for seed in range(3):
        step(ours, one, seed)
        step(theirs, other, seed)
    # Groups in another order add up gradients of a multi-tensor step in another order.
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    changed = [
        n for n, p in ours.named_parameters() if not torch.equal(p, network().get_parameter(n))
    ]
    assert len(changed) == len(list(ours.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", USABLE)
def test_the_state_of_every_optimizer_of_timm_resumes_exactly(name):
    recipe = Recipe(optimizer=name, weight_decay=0.05, decay_norm_and_bias=False, lr=0.01)
    training.check_optimizer(recipe)
    model = network()
    optimizer = training.create_optimizer(recipe, model)
    for seed in range(6):
        if seed == 3:
            torch.save([model.state_dict(), optimizer.state_dict()], file := io.BytesIO())
        step(model, optimizer, seed)
    file.seek(0)
    resumed, weights, state = network(), *torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    optimizer = training.create_optimizer(recipe, resumed)
    optimizer.load_state_dict(state)
    for seed in range(3, 6):
        step(resumed, optimizer, seed)
    assert_same_tensors(model.state_dict(), resumed.state_dict())


def test_arguments_reach_the_optimizer_and_change_the_training(tmp_path):
    run = train(small(tmp_path, epochs=1, **adan(betas=[0.9, 0.8, 0.7]), warmup_epochs=0.0))
    [group, *_] = run.load_checkpoint()["optimizer"]["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.8, 0.7)
    other = train(small(tmp_path / "b", epochs=1, **adan(), warmup_epochs=0.0))
    assert other.steps().loss.tolist() != run.steps().loss.tolist()
    ours = {"optimizer": "adamw", "optimizer_args": {"betas": [0.5, 0.6], "eps": 1e-3}}
    group = training.create_optimizer(Recipe(**ours), network()).param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.5, 0.6), 1e-3)


def test_muon_resumes_exactly(tmp_path):
    check_resume(tmp_path, optimizer="muon", nesterov=False, lr=0.003)


@pytest.mark.parametrize(
    "name, args, text",
    [
        ("adm", {}, "'adm' is not in timm.optim; the nearest is 'adam'"),
        ("AdamW", {}, "the nearest is 'adamw'"),
        ("zzzzqqqq", {}, "it has sgd, adamw, lamb, adabelief"),
        ("adahessian", {}, "needs second derivatives"),
        ("kronw", {}, "random numbers that a checkpoint does not contain"),
        ("bnbadam8bit", {}, "needs bitsandbytes"),
        ("fusedsgd", {}, "needs apex"),
        ("adan", {"beta": 0.9}, "takes no 'beta' here; the nearest is 'betas'"),
        ("adan", {"betas": [0.9, 0.99]}, r"betas of adan is \[0.9, 0.99\]; give a value such as"),
        ("adan", {"betas": 0.9}, "give a value such as"),
        ("lion", {"betas": [0.9, 1.5]}, "Invalid beta"),
        ("adamp", {"delta": "x"}, "delta of adamp is 'x'"),
        ("adamw", {"amsgrad": 1}, "give a value such as False"),
        ("adamw", {"lr": 0.1}, "lr is an option of the recipe; it takes betas, eps"),
        ("sgd", {"momentum": 0.8}, "momentum is an option of the recipe"),
        ("lamb", {"eps": -1}, "eps is -1"),
        ("muon", {"conv_mode": "flat"}, "Invalid conv_mode"),
        ("muon", {"ns_steps": 2.5}, "fails"),
    ],
)  # fmt: skip
def test_a_wrong_optimizer_is_refused_before_anything_is_read(tmp_path, name, args, text):
    recipe = Recipe(
        optimizer=name, optimizer_args=args, dataset="files", data_dir="/missing",
        runs_dir=str(tmp_path),
    )  # fmt: skip
    with pytest.raises(training.TrainingError, match=text):
        train(recipe)


# ---- fp16


FP16 = {"precision": "fp16"}
INITIAL_SCALE = 2.0**16  # torch.amp.GradScaler


@pytest.mark.parametrize("options", [FP16, {**FP16, **adan()}], ids=["sgd", "adan"])
def test_fp16_resumes_exactly_with_its_scale(tmp_path, options):
    run = check_resume(tmp_path, **options)
    scaler = run.load_checkpoint()["scaler"]
    assert 1 < scaler["scale"] <= INITIAL_SCALE  # lower after infinite gradients
    assert scaler["scale"] < INITIAL_SCALE or scaler["_growth_tracker"] > 0


def test_fp16_learns_as_fp32(tmp_path):
    half = train(small(tmp_path / "half", **FP16))
    full = train(small(tmp_path / "full", precision="fp32"))
    assert half.steps().loss[0] == pytest.approx(full.steps().loss[0], rel=1e-3)
    assert half.steps().loss.mean() == pytest.approx(full.steps().loss.mean(), rel=0.05)
    assert half.steps().loss.tolist() != full.steps().loss.tolist()


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "lamb", "nesterov": False}], ids=str)
def test_fp16_clips_the_gradients_without_their_scale_and_skips_infinite_ones(tmp_path, optimizer):
    recipe = small(tmp_path, epochs=1, warmup_epochs=0.0, **optimizer)
    with torch.random.fork_rng():
        plain, scaled = (state_of(recipe.replace(precision=p)) for p in ("fp32", "fp16"))
    for state, factor in ((plain, 1.0), (scaled, scaled._scaler.get_scale())):
        state.begin_step()
        state.backward(sum(p.sum() for p in state.model.parameters()) * 10)
        gradient = next(state.model.parameters()).grad.flatten()[0].item()
        assert gradient == pytest.approx(10 * factor)
        state.optimizer_step()
    assert_same_tensors(plain.model.state_dict(), scaled.model.state_dict())
    before = {k: v.clone() for k, v in scaled.state_dict()["ema"].items()}
    weights = {k: v.clone() for k, v in scaled.model.state_dict().items()}
    scaled.backward(sum(p.sum() for p in scaled.model.parameters()) * 1e38)
    scaled.optimizer_step()
    assert_same_tensors(weights, scaled.model.state_dict())
    assert_same_tensors(before, scaled.ema.state_dict())
    assert (scaled.step, scaled._scaler.get_scale()) == (2, 2.0**15)


def state_of(recipe: Recipe) -> TrainState:
    model = training.create_model(recipe, 10)
    return TrainState(recipe, model, data.load_dataset(recipe), DistContext(torch.device("cpu")))


def test_gradients_that_are_infinite_at_any_scale_end_the_run(tmp_path):
    state = state_of(small(tmp_path, **FP16))
    with pytest.raises(training.TrainingError, match="fp16: the gradients of step 3. are not fini"):
        for _ in range(40):
            state.begin_step()
            state.backward(next(state.model.parameters()).sum() * float("nan"))
            state.optimizer_step()


# ---- gradient checkpointing


@pytest.mark.parametrize("options", [{}, adan()], ids=["sgd", "adan"])
def test_recomputed_activations_change_neither_losses_nor_statistics(tmp_path, options):
    plain = train(small(tmp_path / "plain", **options))
    again = train(small(tmp_path / "again", grad_checkpointing=True, **options))
    assert again.steps().loss.tolist() == pytest.approx(plain.steps().loss.tolist(), rel=1e-5)
    ours, theirs = (run.load_checkpoint()["model"] for run in (again, plain))
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5)


def test_activations_are_recomputed(tmp_path):
    state = state_of(small(tmp_path, grad_checkpointing=True))
    models.checkpoint_gradients(state.model, True)
    calls = []
    block = next(state.model.layer1.children())
    block.register_forward_pre_hook(lambda *_: calls.append(2))
    state.begin_step()
    state.backward(state.model(torch.randn(4, 3, 32, 32)).sum())
    assert calls.count(2) == 2


def test_a_model_without_gradient_checkpointing_is_refused():
    with torch.device("meta"):
        model = timm.create_model("selecsls42")
    with pytest.raises(models.ModelError, match="SelecSls has no gradient checkpointing"):
        models.checkpoint_gradients(model, True)


# ---- a learning rate of the classifier


def test_the_classifier_learns_at_its_own_rate(tmp_path):
    recipe = small(tmp_path, head_lr_scale=10.0, layer_decay=0.5, lr=0.01)
    model = network()
    rate = {
        id(p): group["lr_scale"]
        for group in training.create_optimizer(recipe, model).param_groups
        for p in group["params"]
    }
    alone = training.lr_scales(model, 0.5)
    for name, p in model.named_parameters():
        assert rate[id(p)] == alone[name] * (10.0 if name.startswith("fc.") else 1.0)
    check_resume(tmp_path, head_lr_scale=10.0, head_only_epochs=1)


# ---- focal loss and class weights


FOCAL = {"loss": "focal", "focal_gamma": 1.5, "class_weights": "balanced", "mixup_alpha": 0.2}


def test_a_weighted_focal_loss_trains_and_resumes_exactly(tmp_path):
    run = check_resume(tmp_path, **FOCAL)
    assert run.metrics().train_loss.is_monotonic_decreasing


def test_a_class_of_more_weight_is_predicted_more_often(tmp_path):
    weights = [1.0] * 9 + [30.0]
    ours = train(small(tmp_path / "nine", class_weights=weights)).predictions()
    plain = train(small(tmp_path / "plain")).predictions()
    assert (ours.class1 == 9).sum() > 1.5 * (plain.class1 == 9).sum()


# ---- policies of torchvision and early stopping


@pytest.mark.parametrize("policy", ["trivialaugment", "augmix"])
def test_a_policy_changes_the_training_and_resumes_exactly(tmp_path, policy):
    run = check_resume(tmp_path, autoaugment=policy)
    plain = train(small(tmp_path / "plain"))
    assert run.steps().loss[0] != plain.steps().loss[0]


def first_stop(top1: list[float], patience: int) -> int:
    """The epoch after which `patience` evaluations in a row were not above the best before."""
    for epoch in range(1, len(top1) + 1):
        best = max(range(epoch), key=lambda i: (top1[i], -i))
        if epoch - 1 - best >= patience:
            return epoch
    return len(top1)


EARLY = {"lr": 0.8, "schedule": "constant", "epochs": 12, "warmup_epochs": 0.0, "ema_decay": None}


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_ends_where_the_metrics_of_a_whole_run_say(tmp_path, patience):
    whole = train(small(tmp_path / "whole", **EARLY))
    epochs = first_stop(whole.metrics().top1.tolist(), patience)
    assert epochs < 12 or patience == 2  # by the bits of the processor
    early = check_resume(tmp_path, early_stopping=patience, **EARLY)
    pd.testing.assert_frame_equal(early.metrics(), whole.metrics()[:epochs])
    status = early.status()
    assert status["state"] == "finished" and f"after {epochs} epochs" in status["message"]
    assert f"after {counted(patience, 'evaluation')} without" in status["message"]
    best = early.metrics().top1.max()
    with safe_open(early.file("best.safetensors"), "pt") as file:
        assert float(file.metadata()["top1"]) == best
    assert not list(
        training.fit(small(tmp_path / "undisturbed", early_stopping=patience, **EARLY), early)
    )


def test_a_run_that_stopped_early_continues_under_another_name(tmp_path):
    first = train(small(tmp_path, early_stopping=1, **EARLY))
    more = small(tmp_path, name="more", resume_from=str(first.path), **EARLY)
    assert len(train(more).metrics()) > 0
    assert runs.Run(more.folder).metrics().epoch.iloc[-1] == 12


def test_a_resume_from_counts_evaluations_against_its_own_best(tmp_path):
    """The images of validation may be others, and best.safetensors is in the other folder."""
    first = train(small(tmp_path / "first"))
    checkpoint = first.load_checkpoint()
    checkpoint["progress"]["best"] = 100.0
    with first.writing():
        first.save_checkpoint(checkpoint)
    more = small(tmp_path, epochs=5, resume_from=str(first.path), early_stopping=1)
    run = train(more)
    epochs = run.metrics().epoch.tolist()
    assert len(epochs) == 2 and run.file("best.safetensors").exists()
    top1 = run.metrics()[["top1", "ema_top1"]].to_numpy().max()
    with safe_open(run.file("best.safetensors"), "pt") as file:
        assert float(file.metadata()["top1"]) == top1


@pytest.mark.parametrize("value", [0, -1, 1.5, "two", True])
def test_a_wrong_patience_is_refused(value):
    with pytest.raises(RecipeError, match="early_stopping"):
        Recipe(early_stopping=value)
