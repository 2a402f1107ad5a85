"""Values of UP's configurations as options of a recipe."""

import numpy as np
import pytest
import timm
import torch
from up_files import EMA, KWARGS, LAMB, VALUES, changed, config, edited, said, told

from workbench import augmentation
from workbench.importers import up_model
from workbench.importers.united_perception import DEFECT, MISSING, NOTHING, TAKEN, loads
from workbench.recipe import Recipe


def test_all_models_exist_in_timm():
    names = set(up_model.MODELS.values())
    assert len(names) > 40 and all(timm.is_model(name) for name in names)


@pytest.mark.parametrize("name, options, model", VALUES["models"])
def test_backbone_has_timms_name(name, options, model):
    assert changed(config(backbone=name, options=options))["model"] == model
    assert timm.is_model(model)


@pytest.mark.parametrize(
    "name, options",
    [
        ("cswin_tiny", ""),
        ("mobilenet_v2", "scale: 2.0"),
        ("swin_tiny", "window_size: 12"),
        ("swin_huge", "embed_dim: 320"),
    ],
)
def test_backbone_unknown_to_timm_keeps_its_name(name, options):
    found = loads(config(backbone=name, options=options))
    assert found.recipe.model == name and "timm has no" in said(found, "net[0].type", MISSING)


@pytest.mark.parametrize("case", VALUES["values"], ids=lambda case: case["new"])
def test_value_becomes_an_option(case):
    plain = loads(config(), gpus=4).recipe.model_dump()
    got = loads(edited((case["old"], case["new"])), gpus=4).recipe.model_dump()
    changes = {k: v for k, v in got.items() if v != plain[k]}
    assert changes == {k: v for k, v in case["recipe"].items() if v != plain[k]}


def test_absolute_paths_share_data_dir():
    text = "dataset: {{kwargs: {{meta_file: {}, image_reader: {{kwargs: {{image_dir: {}}}}}}}}}"
    for files, roots, base, lists, below in [
        ("/data/l/a.txt", "''", "/data/l", ["a.txt"], ["train"]),
        ("/data/a.txt", "/data", "/data", ["a.txt"], ["."]),
        ("[/d/a.txt, /d/x/b.txt]", "[/d/p, /d/x//q/]", "/d", ["a.txt", "x/b.txt"], ["p", "x/q"]),
        ("/data/a.txt", "/", "", ["/data/a.txt"], ["/"]),
        ("//data/a.txt", "images", "", ["/data/a.txt"], ["images"]),
    ]:
        recipe = loads(text.format(files, roots)).recipe
        assert (recipe.data_dir, recipe.train_list, recipe.train_root) == (base, lists, below)


@pytest.mark.parametrize("most, wanted", [(5.0, 1.0), (0.5, 0.5)])
def test_lamb_clips_to_the_smaller_of_two_norms(most, wanted):
    hook = f"  - {{type: grad_clipper, kwargs: {{max_norm: {most}}}}}"
    assert changed(config(optimizer=LAMB(0.01), extra=hook))["clip_grad_norm"] == wanted


@pytest.mark.parametrize(
    "groups, decay_norm_and_bias",
    [
        ("pconfig: {bn_b: {weight_decay: 0.0}}", False),
        ("pconfig: {bn_b: {kwargs: {weight_decay: 0}}}", False),
        ("pconfig: {nodecay: [bias]}", False),
        ("kwargs: {lr: 1, pconfig: [{ln_w: {weight_decay: 0.0}}]}", False),
        ("special_param_group: [{key: bias, weight_decay: 0.0}]", False),
        ("pconfig: {bn_b: {weight_decay: 0.1}}", True),
        ("pconfig: {bn_b: {lr: 0.1}}", True),
        ("pconfig: {linear_w: {weight_decay: 0.0}, layer_decay: {value: 0.8}}", True),
        ("special_param_group: [{key: head, lr: 0.1}]", True),
    ],
)
def test_groups_without_decay_become_decay_norm_and_bias(groups, decay_norm_and_bias):
    more = "" if groups.startswith("kwargs") else "kwargs: {lr: 1, weight_decay: 0.1}, "
    found = loads(f"optimizer: {{type: AdamW, {more}{groups}}}")
    assert found.recipe.decay_norm_and_bias is decay_norm_and_bias
    told = [n for n in found.notes if n.kind == MISSING and "see decay_norm_and_bias" in n.text]
    assert bool(told) is decay_norm_and_bias


def test_disabled_ema_is_off():
    found = loads(EMA.format(0.99).replace("true", "false"))
    assert found.recipe == Recipe() and said(found, "ema", NOTHING) == "enable is false"


@pytest.mark.parametrize(
    "layers, freeze",
    [("[]", []), ("[0]", ["conv1", "bn1"]), ("[0, 1, 3]", ["conv1", "bn1", "layer1", "layer3"])],
)
def test_frozen_layers_are_modules_of_a_resnet(layers, freeze):
    found = loads(config(options=f"frozen_layers: {layers}"))
    assert found.recipe.freeze == freeze
    assert said(found, "net[0].kwargs.frozen_layers", MISSING) == ""
    found = loads(config(backbone="swin_tiny", options=f"frozen_layers: {layers}"))
    assert bool(said(found, "net[0].kwargs.frozen_layers", MISSING)) == bool(freeze)


def test_layer_decay_takes_its_own_lr():
    text = "optimizer: {type: AdamW, kwargs: {lr: 0.001}, pconfig: {layer_decay:"
    text += " {type: vit_base, value: 0.65, base_lr: 0.002}}}"
    found = loads(text)
    assert (found.recipe.layer_decay, found.recipe.lr) == (0.65, 0.002)
    assert said(found, "optimizer.pconfig.layer_decay.type") == ""
    found = loads(text.replace("vit_base", "swin"))
    assert "vit_base alone" in said(found, "optimizer.pconfig.layer_decay.type")


def test_max_iter_wins_over_max_epoch():
    sampler = "dataset: {batch_sampler: {kwargs: {batch_size: 100}}}\n"
    text = "trainer: {max_epoch: 10, max_iter: 3000}\n"
    found = loads(sampler + text, train_images=100_000)
    assert found.recipe.epochs == 3
    assert "max_iter" in said(found, "trainer.max_epoch")
    found = loads(sampler + text, train_images=200_000)  # 1.5 epochs
    assert found.recipe.epochs == 2
    assert "3,000 steps are 1.50 epochs of 2,000" in said(found, "trainer.max_iter", MISSING)
    assert "set epochs" in said(loads(text), "trainer.max_iter", MISSING)


@pytest.mark.parametrize(
    "mixup, cutmix, switch, cut, mixed",  # shares of the batches, as UP draws them
    [
        (0, 1.0, 0.3, 0.3, 0.0),
        (0.8, 0, 0.3, 0.0, 0.7),
        (0.8, 1.0, 0.3, 0.3, 0.7),
        (0, 1.0, 1, 1, 0),
    ],
)
def test_mixing_with_one_alpha_0(mixup, cutmix, switch, cut, mixed):
    kwargs = f"mixup_alpha: {mixup}, cutmix_alpha: {cutmix}, switch_prob: {switch}"
    found = changed(f"a: {{type: batch_cutmixup, kwargs: {{{kwargs}}}}}")
    recipe = Recipe(**found)
    mix = augmentation.MixupCutmix(
        recipe.mixup_alpha, recipe.cutmix_alpha, recipe.switch_prob, prob=recipe.mix_prob
    )
    draws = [mix.sample_params(np.random.default_rng(seed), 2, 224) for seed in range(1000)]
    boxes = np.mean([bool(d["boxes"].any()) for d in draws])
    others = np.mean([not d["boxes"].any() and d["lam"][0] < 1 for d in draws])
    assert boxes == pytest.approx(cut, abs=0.05) and others == pytest.approx(mixed, abs=0.05)


def backbone(kind: str, kwargs: str = ""):
    return loads(f"net: [{{name: backbone, type: {kind}, kwargs: {{{kwargs}}}}}]")


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_swin_is_identified_by_timms_shape(size):
    model = f"swin_{size}_patch4_window7_224"
    with torch.device("meta"):
        stages = timm.create_model(model).layers
    width, depths = stages[0].dim, [len(stage.blocks) for stage in stages]
    heads = [stage.blocks[0].attn.num_heads for stage in stages]
    found = backbone(
        f"swin_{size}",
        f"embed_dim: {width}, depths: {depths}, num_heads: {heads}, drop_path_rate: 0.3",
    )
    assert (found.recipe.model, found.recipe.drop_path) == (model, 0.3)
    assert told(found, MISSING, DEFECT) == ""


@pytest.mark.parametrize("kind", ["vit_b16_224", "deit_small"])
def test_vit_dropout_is_noted(kind):
    found = backbone(kind)
    assert found.recipe.drop_path == 0.1 and found.recipe.dropout == 0
    for words in ("attention dropout", "0.1", "drop path", "not reproduced"):
        assert words in said(found, "net[0].type", MISSING)
    found = backbone(kind, "drop_path: 0.3, attention_dropout: 0.2")
    assert found.recipe.drop_path == 0.3
    assert "left out" in said(found, "net[0].kwargs.attention_dropout", MISSING)


@pytest.mark.parametrize("kind", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"])
def test_batch_norms_frozen_by_up_are_noted(kind):
    where = "net[0].kwargs.normalize"
    assert "freezes every batch norm" in said(backbone(kind), where)
    assert said(backbone(kind, "normalize: {type: solo_bn}"), where) == ""
    assert said(backbone("convnext_tiny"), where) == ""


def test_class_balanced_sampler_and_drop_path():
    found = loads(edited(("type: dist,", "type: class_balance,")))
    assert found.recipe.class_balanced_sampling == 1.0 and told(found, MISSING) == ""
    found = backbone("convnext_tiny", "drop_path: 0.3")
    assert found.recipe.drop_path == 0.3 and told(found, MISSING) == ""


def test_fraction_of_the_list_shortens_epochs():
    text = edited(
        ("type: cls\n      kwargs:\n", "type: cls\n      kwargs:\n        fraction: 0.5\n"),
        ("max_epoch: 100", "max_iter: 25030"),
        ("milestones: [30, 60, 90]", "milestones: [4, 15]"),
        ("warmup_iter: 2500", "warmup_iter: 6260"),
    )
    found = loads(text, gpus=8)
    assert found.recipe.epochs == 20 and "1,252 steps an epoch" in told(found, TAKEN)
    assert found.recipe.milestones == [15]  # the warm-up is 5 epochs
    assert "[4] inside the warm-up" in said(found, f"{KWARGS}.milestones")
