"""Options and notes of single values: taken, not reproduced, or not done by UP as written."""

import numpy as np
import pytest
import timm
import torch
from up_files import (
    BCE,
    FINDINGS,
    KD_NEW,
    KWARGS,
    LAMB,
    SGD,
    VALUES,
    changed,
    config,
    cosine,
    edited,
    read,
    said,
    told,
    unwarmed,
)

from workbench import augmentation
from workbench.importers import up_blocks
from workbench.importers.united_perception import DEFECT, MISSING, NOTHING, TAKEN, loads
from workbench.recipe import Recipe

KINDS = {"TAKEN": TAKEN, "MISSING": MISSING, "DEFECT": DEFECT, "NOTHING": NOTHING}


@pytest.mark.parametrize(
    "name, where, words",
    [
        ("resnet50D", f"{KWARGS}.T_max", ["62,560 steps", "99.94", "from 0.4 to 0.2002 "]),
        ("resnet50D", "trainer.lr_scheduler.warmup_iter", ["62,560 of 125,200", "99.9 epochs"]),
        ("resnet50D", "net[0].type", ["no whole ResNet-D", "deep_stem"]),
        ("strikes 300e", f"{KWARGS}.T_max", ["5.9", "e-06", "not at 1e-06", "here at 5.9"]),
        ("convnext", f"{KWARGS}.T_max", ["from 0.004 to 0.0039"]),
        ("mobilenet as it is", f"{KWARGS}.T_max", ["0.39999938", "here at "]),
        ("mobilenet as it is", "iter_base", ["`runtime` only"]),
        ("downstream strikes", "cutmix_mixup.type", ["does not know it"]),
        ("kd bag of tricks", "mimic", ["mimic_name, mimic_type", "L2 loss of normalised logits"]),
        ("swin", "trainer.optimizer.pconfig.linear_b.nodecay", ["ignores it inside a group"]),
        ("softmax eql", "trainer.lr_scheduler.type", ["yolov5"]),
        ("plain", "random_augmentation", ["in no transformer list and no batch_fn"]),
        ("plain", "pil_color_jitter", []),
    ],
)
def test_defect_of_a_family_is_noted_in_numbers(name, where, words):
    text = said(read(name), where)
    assert all(word in text for word in words) and bool(text) == bool(words)


@pytest.mark.parametrize(
    "slots, where, words",
    [
        ({"scheduler": cosine(3130, 0.25, 200, 0.0), "length": "max_epoch: 200", "batch": 2048,
          "optimizer": SGD.format(0.8, 0.1)}, f"{KWARGS}.T_max", ["from 0.8 to 0.79877"]),
        ({"scheduler": cosine(200_000, 0.25, 100, 0.0, 200_000), "batch": 1024},
         "trainer.lr_scheduler.warmup_iter", ["200,000 of 125,200 steps"]),
        ({"scheduler": cosine(3130, 0.25, 100, 0.0, 5, "CosineLREpochScheduler")},
         f"{KWARGS}.T_max", ["0.16 epochs", "from 0.4 to 0.39754"]),
        ({"scheduler": unwarmed("MultiStepLR", "milestones: [30, 120]")}, f"{KWARGS}.milestones",
         ["[120]", "100 epochs"]),
        ({"scheduler": unwarmed("ReduceLROnPlateau", "")}, "trainer.lr_scheduler.type",
         ["without a metric"]),
        ({"optimizer": SGD.format("1e-3", 0)}, "trainer.optimizer.kwargs.lr", ["'1e-3' is text"]),
        ({"loss": BCE}, "net[2].kwargs.cls_loss.kwargs.bias", ["not mixed", "mean over classes"]),
        ({"loss": "{type: bce, kwargs: {}}"}, "net[2].kwargs.cls_loss.kwargs.bias", ["the mean"]),
        ({"train": "''"}, "dataset.train.dataset.kwargs.meta_file", ["empty"]),
        ({"runtime": "  random_seed: 100000"}, "runtime.random_seed", ["65,536"]),
        ({"extra": KD_NEW.replace("kd_loss", "kl_loss")}, "mimic.cfgs.loss.type",
         ["softmax(ReLU(logits))", "Hinton's is kl"]),
    ],
)  # fmt: skip
def test_defect_is_noted(slots, where, words):
    text = said(loads(config(**slots)), where)
    assert text and all(word in text for word in words)


@pytest.mark.parametrize("case", FINDINGS["differences"], ids=lambda case: case["new"])
def test_difference_is_noted(case):
    kind, where, words = case["note"]
    assert words in said(loads(edited((case["old"], case["new"]))), where, KINDS[kind])


@pytest.mark.parametrize("case", FINDINGS["findings"], ids=lambda case: case["text"])
def test_finding_is_noted(case):
    kind, where, words = case["note"]
    found, options = loads(case["text"], gpus=8), case["recipe"]
    assert {k: v for k, v in found.recipe.model_dump().items() if k in options} == options
    assert words in said(found, where, KINDS[kind]), told(found, MISSING, DEFECT, NOTHING)


@pytest.mark.parametrize("case", FINDINGS["none"], ids=lambda case: case["text"])
def test_equal_behaviour_has_no_finding(case):
    found, options = loads(case["text"]), case["recipe"]
    assert told(found, MISSING, DEFECT) == ""
    assert {k: v for k, v in found.recipe.model_dump().items() if k in options} == options


def test_resize_and_centre_crop_in_training_are_noted():
    found = loads(config(transformer="*torch_resize, *torch_center_crop, *to_tensor, *normalize"))
    for i in range(2):
        where = f"dataset.train.dataset.kwargs.transformer[{i}]"
        assert "not supported here" in said(found, where, MISSING)


def test_two_interpolations_are_noted():
    found = loads(config(crop=", interpolation: bicubic"))
    assert found.recipe.interpolation == "bicubic"
    assert "gives way to interpolation 'bicubic'" in said(found, "torch_resize.type", MISSING)


def test_all_models_exist_in_timm():
    names = set(up_blocks.MODELS.values())
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
        ("/data//l/a.txt", "/data/p", "/data", ["l/a.txt"], ["p"]),
        ("/data/a.txt", "/data", "/data", ["a.txt"], ["."]),
        ("[/d/a.txt, /d/x/b.txt]", "[/d/p, /d/x//q/]", "/d", ["a.txt", "x/b.txt"], ["p", "x/q"]),
        ("/data/a.txt", "images", "", ["/data/a.txt"], ["images"]),
    ]:
        recipe = loads(text.format(files, roots)).recipe
        assert (recipe.data_dir, recipe.train_list, recipe.train_root) == (base, lists, below)


@pytest.mark.parametrize("most, wanted", [(5.0, 1.0), (0.5, 0.5)])
def test_lamb_clips_to_the_smaller_of_two_norms(most, wanted):
    hook = f"  - {{type: grad_clipper, kwargs: {{mode: pre_defined, max_norm: {most}}}}}"
    assert changed(config(optimizer=LAMB(0.01), extra=hook))["clip_grad_norm"] == wanted


@pytest.mark.parametrize(
    "groups, decayed",
    [
        ("{bn_b: {weight_decay: 0.0}}", False),
        ("{bn_b: {type: bias, kwargs: {weight_decay: 0}}, ln_w: {weight_decay: 0.0}}", False),
        ("{nodecay: [bias, relative_position_bias_table]}", False),
        ("{bn_b: {weight_decay: 0.1}}", True),
        ("{bn_b: {weight_decay: 0.0, lr: 0.1}}", True),
        ("{bn_w: {weight_decay: 0.0}, linear_w: {weight_decay: 0.0}}", True),
        ("{nodecay: [layer4, bias]}", True),
        ("{bn_b: {weight_decay: 0.0}, layer_decay: {type: vit_base, value: 0.8}}", True),
        ("[{ln_w: {weight_decay: 0.0}}]", True),
    ],
)
def test_groups_without_decay_become_decay_norm_and_bias(groups, decayed):
    text = f"optimizer: {{type: AdamW, kwargs: {{lr: 1, weight_decay: 0.1}}, pconfig: {groups}}}"
    found = loads(text)
    assert found.recipe.decay_norm_and_bias is decayed
    assert ("not supported" in told(found, MISSING)) is decayed


def test_max_iter_wins_over_max_epoch():
    sampler = "dataset: {batch_sampler: {kwargs: {batch_size: 100}}}\n"
    text = "trainer: {max_epoch: 10, max_iter: 3000}\n"
    found = loads(sampler + text, train_images=100_000)
    assert found.recipe.epochs == 3
    assert "not supported" in said(found, "trainer.max_epoch", MISSING)
    found = loads(sampler + text, train_images=200_000)  # 1.5 epochs
    assert found.recipe.epochs == 2
    assert "3,000 steps are 1.50 epochs of 2,000" in said(found, "trainer.max_iter", MISSING)
    assert "not supported" in said(loads(text), "trainer.max_iter", MISSING)


@pytest.mark.parametrize(
    "mixup, cutmix, switch, cut, mixed",  # shares of the batches, as UP draws them
    [
        (0, 1.0, 0.3, 0.3, 0.0),
        (0.8, 0, 0.3, 0.0, 0.7),
        (0.8, 1.0, 0.3, 0.3, 0.7),
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


def test_fraction_of_the_list_shortens_epochs():
    text = edited(
        ("type: cls\n      kwargs:\n", "type: cls\n      kwargs:\n        fraction: 0.5\n"),
        ("max_epoch: 100", "max_iter: 25030"),
    )
    found = loads(text, gpus=8)
    assert found.recipe.epochs == 20 and "1,252 steps an epoch" in told(found, TAKEN)
