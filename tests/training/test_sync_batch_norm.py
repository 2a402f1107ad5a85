"""Batch norm over the images of all processes. The GPUs are pretended: no step is made."""

import pytest
import timm
import torch
from helpers import assert_same_tensors
from torch import nn
from training_helpers import small

from workbench import data, runs, training
from workbench.schedule import TrainingError
from workbench.training.distributed import DistContext
from workbench.training.setup import set_up
from workbench.training.state import TrainState


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.fixture
def gpus(monkeypatch):
    """Contexts of a number of processes with a GPU each, whose models stay on the CPU."""
    moved = []

    def reset(device):
        if not moved:  # as torch does before CUDA is initialised
            raise RuntimeError("Invalid device argument")

    monkeypatch.setattr(nn.Module, "to", lambda model, *_, **__: moved.append(model) or model)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    return lambda world: DistContext(torch.device("cuda", 0), world=world)


def state_of(folder, dist: DistContext, network: nn.Module, **options) -> TrainState:
    recipe = small(folder, **options)
    return TrainState(recipe, network, data.load_dataset(recipe), dist)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_every_batch_norm_is_synchronised_and_nothing_else_changes(tmp_path, gpus, name):
    """test_efficientnet has timm's norms with an activation, which torch's conversion drops."""
    make = lambda: timm.create_model(name, num_classes=10)
    plain = make()
    torch.manual_seed(0)
    for norm in norms(plain):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model = make()
    model.load_state_dict(plain.state_dict())
    state = state_of(tmp_path, gpus(2), model, model=name, sync_batch_norm=True)
    for network in (state.model, state.ema):
        assert_same_tensors(network.state_dict(), plain.state_dict())  # names too
        assert len(norms(network)) == len(norms(plain)) > 3
        assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms(network))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = state.model.eval()(images), plain.eval()(images)
    torch.testing.assert_close(ours, theirs)
    trained = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in state.model.parameters()}


def test_one_process_and_the_default_keep_the_model(tmp_path, gpus):
    for world, option in ((1, True), (2, False)):
        model = timm.create_model("test_resnet", num_classes=10)
        state = state_of(tmp_path, gpus(world), model, sync_batch_norm=option)
        assert {type(norm) for norm in norms(state.model)} == {nn.BatchNorm2d}


def test_frozen_norms_stay_in_evaluation_mode(tmp_path, gpus):
    model = timm.create_model("test_resnet", num_classes=10)
    options = {"sync_batch_norm": True, "freeze": ["conv1", "bn1"]}
    state = state_of(tmp_path, gpus(2), model, **options)
    frozen = [norm for norm in norms(state.model) if not norm.training]
    assert state.model.bn1 in frozen and len(frozen) < len(norms(state.model))
    assert not any(p.requires_grad for norm in frozen for p in norm.parameters())


def test_it_is_refused_on_a_cpu(tmp_path):
    recipe = small(tmp_path, device="cpu", sync_batch_norm=True)
    with pytest.raises(TrainingError, match="sync_batch_norm: torch has it for GPUs only"):
        next(training.fit(recipe, runs.Run(recipe.folder)))


@pytest.mark.parametrize(
    "options", [{"batch_size": 19}, {"batch_size": 50, "micro_batch_size": 24}]
)
def test_a_process_that_would_let_the_others_wait_is_found_before_the_first_step(
    tmp_path, gpus, options
):
    """Of 324 images 19 at a time the last is one image; halves of 50 are 26 and 24."""
    recipe = small(tmp_path, **options, sync_batch_norm=True)
    run = runs.Run(recipe.folder)
    with (
        run.writing(),
        pytest.raises(TrainingError, match="as many forwards in every process"),
    ):
        set_up(recipe, run, None, gpus(2))
