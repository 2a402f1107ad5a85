"""Parameter groups: learning rate and weight decay of every parameter."""

import math

import pytest
import torch
from helpers import train
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from training_helpers import STRIKES, left_after, small

from workbench import data, models, training
from workbench.recipe import Recipe
from workbench.training import TrainingError


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize(
    "name", ["test_resnet", "vit_tiny_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224"]
)
def test_learning_rates_and_decay_are_timms(name, layer_decay, decay_norm_and_bias):
    with torch.device("meta"):
        model = models.create(name, 10)
    # Of timm's own: position embeddings, class tokens and bias tables, besides norms and biases.
    undecayed = () if decay_norm_and_bias else getattr(model, "no_weight_decay", set)()
    how = {"no_weight_decay_list": undecayed, "weight_decay_exclude_1d": not decay_norm_and_bias}
    if layer_decay:
        theirs = param_groups_layer_decay(model, 0.05, layer_decay=layer_decay, **how)
    else:
        theirs = param_groups_weight_decay(model, 0.05, **how)
    recipe = Recipe(
        model=name, optimizer="adamw", layer_decay=layer_decay, weight_decay=0.05,
        decay_norm_and_bias=decay_norm_and_bias,
    )  # fmt: skip
    ours = training.create_optimizer(recipe, model).param_groups
    by_parameter = [
        {id(p): (g.get("lr_scale", 1.0), g["weight_decay"]) for g in groups for p in g["params"]}
        for groups in (ours, theirs)
    ]
    assert by_parameter[0] == by_parameter[1]
    assert len(by_parameter[0]) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["caformer_s18", "poolformer_s12", "pit_ti_224", "csatv2"])
def test_layer_decay_is_refused_for_a_model_whose_layers_timm_does_not_name(name):
    with torch.device("meta"):
        model = models.create(name, 10)
    kind = type(model).__name__
    with pytest.raises(TrainingError, match=f"^layer_decay: timm does not name the .*{kind}; leav"):
        training.lr_scales(model, 0.7)
    assert training.lr_scales(model, None) == {}


def test_layer_decay_is_refused_before_an_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "verify_images", None)
    recipe = small(tmp_path, model="poolformer_s12", image_size=32, val_resize=32, layer_decay=0.7)
    with pytest.raises(TrainingError, match="layer_decay"):
        train(recipe)


def test_frozen_layers_do_not_change_the_learning_rates_of_the_others():
    model = training.create_model(recipe := Recipe(layer_decay=0.5), 10)
    before = training.lr_scales(model, 0.5)
    model.layer4.requires_grad_(False)
    groups = training.create_optimizer(recipe, model).param_groups
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    assert {n: scale[id(p)] for n, p in model.named_parameters() if id(p) in scale} == {
        n: s for n, s in before.items() if not n.startswith("layer4.")
    }


def test_every_group_learns_at_the_schedules_rate_times_its_scale(tmp_path):
    recipe = small(tmp_path, layer_decay=0.5, decay_norm_and_bias=False, lr=0.04, warmup_epochs=0.0)
    groups = param_groups_layer_decay(training.create_model(recipe, 10), layer_decay=0.5)
    scales = {group["lr_scale"] for group in groups}
    for step in (1, 8):
        run = left_after(recipe, step)
        rate = 0.02 * (1 + math.cos(math.pi * (step - 1) / 33))  # cosine
        used = {group["lr"] for group in run.load_checkpoint()["optimizer"]["param_groups"]}
        assert sorted(used) == pytest.approx([rate * s for s in sorted(scales)], rel=1e-12)
        assert run.steps().lr.iloc[-1] == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("norm", [1.0, None])
def test_lamb_clips_inside_its_step(tmp_path, norm):
    recipe = small(tmp_path, **STRIKES, clip_grad_norm=norm, trust_clip=True)
    optimizer = training.create_optimizer(recipe, training.create_model(recipe, 10))
    assert optimizer.max_grad_norm == norm and optimizer.param_groups[0]["trust_clip"]
