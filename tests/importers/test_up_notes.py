"""Notes on what UP does not do as written, and on what a recipe does not reproduce."""

import re

import pytest
from up_files import (
    BCE,
    CROP_FLIP,
    FINDINGS,
    KD_NEW,
    KD_OLD,
    KWARGS,
    MIXUP,
    SGD,
    config,
    cosine,
    edited,
    read,
    said,
    told,
    unwarmed,
)

from workbench.importers.united_perception import DEFECT, MISSING, NOTHING, TAKEN, loads

KINDS = {"TAKEN": TAKEN, "MISSING": MISSING, "DEFECT": DEFECT, "NOTHING": NOTHING}


@pytest.mark.parametrize(
    "name, where, words",
    [
        ("resnet50D", f"{KWARGS}.warmup_iter", ["62,560 steps", "99.94", "from 0.4 to 0.2002 "]),
        ("resnet50D", "trainer.lr_scheduler.warmup_iter", ["99.9 of 200", "6,256 to 6,260"]),
        ("resnet50D", "net[0].type", ["no whole ResNet-D", "deep_stem"]),
        ("strikes 300e", f"{KWARGS}.T_max", ["5.9", "e-06", "not at 1e-06", "here at 5.9"]),
        ("swin", f"{KWARGS}.T_max", ["2.19", "e-05", "here at 2.19"]),
        ("convnext", f"{KWARGS}.warmup_iter", ["from 0.004 to 0.0039"]),
        ("mobilenet as it is", f"{KWARGS}.T_max", ["312,500 epochs", "0.39999938", "here at "]),
        ("mobilenet as it is", "iter_base", ["`runtime` only"]),
        ("mobilenet as it is", "fp16", ["fp32"]),
        ("regnet", f"{KWARGS}.T_max", ["125,000 epochs", "0.7999987"]),
        ("downstream strikes", "cutmix_mixup.type", ["does not know it"]),
        ("kd bag of tricks", "mimic", ["mimic_name, mimic_type", "L2 loss of normalised logits"]),
        ("bag of tricks", "net[2].kwargs.cls_loss.kwargs.smooth_ratio", ["1 - 0.1 / classes"]),
        ("swin", "trainer.optimizer.pconfig.linear_b.nodecay", ["ignores it inside a group"]),
        ("softmax eql", "trainer.lr_scheduler.type", ["yolov5"]),
        ("plain", "pil_color_jitter.type", []),
        ("plain", "net[2].kwargs.cls_loss.kwargs.smooth_ratio", []),
    ],
)
def test_defect_of_a_family_is_noted_in_numbers(name, where, words):
    text = said(read(name), where)
    assert all(word in text for word in words) and bool(text) == bool(words)


@pytest.mark.parametrize(
    "slots, where, words",
    [
        ({"scheduler": cosine(3130, 0.25, 200, 0.0), "length": "max_epoch: 200", "batch": 2048,
          "optimizer": SGD.format(0.8, 0.1)}, f"{KWARGS}.warmup_iter", ["from 0.8 to 0.79877"]),
        ({"scheduler": cosine(200_000, 0.25, 100, 0.0, 200_000), "batch": 1024},
         "trainer.lr_scheduler.warmup_iter", ["200,000 of 125,200 steps never reaches lr"]),
        ({"scheduler": cosine(0, 0.25, 100, 0.0, 5000), "batch": 1024}, f"{KWARGS}.warmup_iter",
         ["5000, but the warm-up takes 0 steps", "from 0.4 to 0.39829"]),
        ({"scheduler": cosine(3130, 0.25, 100, 0.0, 5, "CosineLREpochScheduler")},
         f"{KWARGS}.warm_epoch", ["0.16 epochs", "from 0.4 to 0.39754"]),
        ({"scheduler": unwarmed("MultiStepLR", "milestones: [30, 120]")}, f"{KWARGS}.milestones",
         ["[120]", "100 epochs"]),
        ({"scheduler": unwarmed("ReduceLROnPlateau", "")}, "trainer.lr_scheduler.type",
         ["without a metric"]),
        ({"scheduler": unwarmed("CosineAnnealingLR", "")}, f"{KWARGS}.T_max", ["TypeError"]),
        ({"scheduler": ""}, "lr_scheduler", ["KeyError"]),
        ({"optimizer": "{type: AdamW, kwargs: {lr: 0.1, momentum: 0.9}}"},
         "trainer.optimizer.kwargs.momentum", ["AdamW does not take it", "TypeError"]),
        ({"optimizer": "{type: SGD, kwargs: {lr: 0.1, nesterov: true}}"},
         "trainer.optimizer.kwargs.nesterov", ["without momentum"]),
        ({"optimizer": "{type: AdamW, kwargs: {lr: 0.1}, pconfig: {linear: {weight_decay: 0}}}"},
         "trainer.optimizer.pconfig.linear", ["no group linear", "KeyError"]),
        ({"optimizer": "{type: AdamW, kwargs: {}}"}, "trainer.optimizer.kwargs", ["no lr"]),
        ({"optimizer": SGD.format("1e-3", 0)}, "trainer.optimizer.kwargs.lr", ["'1e-3' is text"]),
        ({"loss": BCE}, "net[2].kwargs.cls_loss.kwargs.bias", ["not mixed", "mean over classes"]),
        ({"train": "''", "train_dir": "''"}, "dataset.train.dataset.kwargs.meta_file", ["empty"]),
        ({"runtime": "  random_seed: 100000"}, "runtime.random_seed", ["65,536"]),
        ({"runtime": "  device: cpu"}, "runtime.device", ["needs CUDA"]),
        ({"batch_fn": MIXUP, "extra": KD_OLD}, "mimic", ["only with runtime.runner.type kd"]),
        ({"extra": KD_NEW.replace("kd_loss", "kl_loss")}, "mimic.cfgs.loss.type",
         ["softmax(ReLU(logits))", "Hinton's is kl"]),
    ],
)  # fmt: skip
def test_defect_is_noted(slots, where, words):
    text = said(loads(config(**slots)), where)
    assert all(word in text for word in words) and bool(text) == bool(words)


@pytest.mark.parametrize("case", FINDINGS["differences"], ids=lambda case: case["new"])
def test_difference_is_noted(case):
    kind, where, words = case["note"]
    assert words in said(loads(edited((case["old"], case["new"]))), where, KINDS[kind])


@pytest.mark.parametrize(
    "more, where, words",
    [
        ("ema_type: exp", "ema.ema_type", "1 - exp"),
        ("kwargs: {decay: 0.99, inner_T: 5}", "ema.kwargs.inner_T", "every step here"),
        ("kwargs: {decay: 0.99, warmup: 10}", "ema.kwargs.warmup", "lower at first"),
    ],
)
def test_other_forms_of_ema_are_noted(more, where, words):
    assert words in said(loads(f"ema: {{enable: true, {more}}}"), where, MISSING)
    plain = "ema: {enable: true, ema_type: linear, kwargs: {decay: 0.9, inner_T: 1, warmup: 1}}"
    assert said(loads(plain), where, MISSING) == ""


def test_resize_to_height_and_width_is_noted():
    text = "torch_resize: {type: torch_resize, kwargs: {size: [256, 256]}}"
    found = loads(text)
    assert "this height and width whatever" in said(found, "torch_resize.kwargs.size", MISSING)
    found = loads(text.replace("[256, 256]", "256"))
    assert told(found, MISSING) == ""


def test_repeated_randaugment_is_noted():
    both = "*random_augmentation, *plain"
    text = config(transformer=f"{CROP_FLIP}, {both}, *to_tensor, *normalize").replace(
        "auto_augmentation:", "plain: &plain {type: torch_random_augmentation, kwargs: {n: 1,"
        " m: 5}}\nauto_augmentation:")  # fmt: skip
    found = loads(text)
    where = "dataset.train.dataset.kwargs.transformer"
    assert "every torch_random_augmentation; only the last" in said(found, where, MISSING)
    assert found.recipe.randaug_n == 1


KWARGS_OF_CLS = "type: cls\n      kwargs:\n"
WITHOUT_OPTION = [  # (in the configuration, where, at its default, as a file may have it)
    (KWARGS_OF_CLS, "dataset.train.dataset.kwargs.label_mapping", "[0, 0]", "[0, 5]"),
    (KWARGS_OF_CLS, "dataset.train.dataset.kwargs.multilabel", "false", "true"),
    ("kwargs: {num_classes: *num_classes, ", "net[1].kwargs.classifier_cfg", "{type: linear}",
     "{type: norm_linear}"),
    ("kwargs: {smooth_ratio: 0.1, ", "net[2].kwargs.cls_loss.kwargs.loss_weight", "1.0", "0.5"),
    ("kwargs: {lr: 0.01, ", "trainer.optimizer.kwargs.betas", "[0.9, 0.999]", "[0.9, 0.95]"),
    ("kwargs: {lr: 0.01, ", "trainer.optimizer.kwargs.eps", "0.000001", "0.1"),
    ("kwargs: {lr: 0.01, ", "trainer.optimizer.kwargs.bias_correction", "true", "false"),
    ("kwargs: {lr: 0.01, ", "trainer.optimizer.kwargs.grad_averaging", "true", "false"),
    ("kwargs: {lr: 0.4, ", "trainer.optimizer.kwargs.dampening", "0", "0.1"),
    ("kwargs: {probability: 0.25, ", "rand_erase.kwargs.min_count", "1", "2"),
    ("kwargs: {probability: 0.25, ", "rand_erase.kwargs.min_aspect", "0.3", "0.5"),
    ("kwargs: {probability: 0.25, ", "rand_erase.kwargs.max_area", "", "0.5"),
    ("runtime:\n", "runtime.sync_bn", "false", "true"),
    ("runtime:\n", "runtime.special_bn_init", "false", "true"),
    ("runtime:\n", "runtime.runner", "{type: base}", "{type: sparse}"),
    ("runtime:\n", "runtime.runner", "{type: base}", "{type: quant}"),
    ("out_layers: [4]\n", "net[0].kwargs.initializer", "{method: msra}", "{method: xavier}"),
]  # fmt: skip


@pytest.mark.parametrize("usual", [True, False])
@pytest.mark.parametrize("before, where, default, other", WITHOUT_OPTION)
def test_value_without_option_is_noted_unless_default(before, where, default, other, usual):
    text = config(transformer=f"{CROP_FLIP}, *to_tensor, *normalize, *rand_erase")
    text = text.replace("probability: 0.25}", "probability: 0.25, mode: pixel}")
    text = text.replace("      initializer: {method: msra}\n", "")
    if "betas" in where or "eps" in where or where.endswith(("correction", "averaging")):
        text = config(optimizer="{type: LAMB, kwargs: {lr: 0.01, weight_decay: 0.1}}")
    assert text.count(before) >= 1
    line = f"{where.rpartition('.')[2]}: {default if usual else other}"
    indent = re.search(r"\n( *)\S", text[text.index(before) + len(before) - 1 :])
    more = f"{indent[1]}{line}\n" if before.endswith("\n") else f"{line}, "
    found = loads(text.replace(before, before + more, 1))
    notes = [n for n in found.notes if n.where.startswith(where) and n.kind == MISSING]
    assert bool(notes) != usual, told(found, MISSING)
    assert usual or "not reproduced" in notes[0].text


def test_resize_and_centre_crop_in_training_are_noted():
    found = loads(config(transformer="*torch_resize, *torch_center_crop, *to_tensor, *normalize"))
    for name in ("torch_resize", "torch_center_crop"):
        assert "crops at random" in said(found, name, MISSING)


def test_two_interpolations_are_noted():
    found = loads(config(crop=", interpolation: bicubic"))
    assert found.recipe.interpolation == "bicubic"
    assert "one option serves both" in said(found, "torch_resize", MISSING)


def test_misplaced_key_has_no_nearest():
    found = loads(config(scheduler=unwarmed("StepLR", "step_size: 9, max_epoch: 5")))
    assert said(found, f"{KWARGS}.max_epoch", MISSING) == "not known here; left out"


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
