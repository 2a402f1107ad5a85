"""UP's mimic blocks as options of distillation."""

import pytest
import timm
from up_files import KD, KD_NEW, config, read, refused, said

from workbench.importers.united_perception import DEFECT, MISSING, NOTHING, Found, loads
from workbench.recipe import Recipe

MIMIC = """
mimic:
  {}
  teacher: {{mimic_name: {}, teacher_weight: t.pth}}
  student: {{mimic_name: {}}}
"""
LOGITS = "[head.classifier]"


def distilled(job: str = "loss_weight: 1.0", ours: str = LOGITS, theirs: str = "", more: str = ""):
    """(what is found in a mimic block, the options of distillation without the teacher's name)"""
    found = loads(MIMIC.format(job, theirs or ours, ours) + more, gpus=2, train_images=12_800)
    parts = ("distill_", "kd_", "teacher_", "temperature", "task_weight")
    options = {k: v for k, v in found.recipe.non_default().items() if k.startswith(parts)}
    return found, options


def cfgs(kind: str, kwargs: str = "") -> str:
    return f"cfgs: {{loss: {{type: {kind}, kwargs: {{{kwargs}}}}}}}"


def missing(found: Found) -> str:
    """What is not reproduced, beside the network of the teacher."""
    return "\n".join(n.text for n in found.notes if n.kind == MISSING and n.where != "teacher[0]")


@pytest.mark.parametrize(
    "job, loss, note",
    [
        # the last version: cfgs, an L2 loss without them
        ("loss_weight: 1.0", "l2_normalized", ""),
        (cfgs("kl_loss"), "up_kl", ""),
        (cfgs("kd_loss"), "kl", ""),
        (cfgs("l2_loss", "feat_norm: true, batch_mean: true"), "l2_normalized", ""),
        (cfgs("l2_loss", "feat_norm: false"), "l2_normalized", "False is not reproduced"),
        (cfgs("gkd_loss"), "kl", "no counterpart of gkd; kl is taken"),
        (cfgs("kl_loss", "norm: l2"), "up_kl", "a softmax is compared"),
        ("cfgs: {kd: {type: kd_loss}}", "l2_normalized", "not supported"),
        # the page's, a KL unless it says otherwise
        ("mimic_name: a", "up_kl", ""),
        ("mimic_type: kl\n  mimic_norm: true", "up_kl", ""),
        ("mimic_type: kd", "kl", ""),
        ("mimic_type: l2", "l2_normalized", ""),
        ("mimic_ins_type: DeFeat", "l2_normalized", "for detection"),
    ],
)
def test_mimic_loss(job, loss, note):
    found, options = distilled(job)
    assert found.recipe.teacher == ["t.pth"] and options == {"kd_loss": [loss]}
    assert (note in missing(found)) if note else missing(found) == ""
    old = job.startswith(("mimic_name", "mimic_type"))
    assert ("L2 loss of normalised logits" in said(found, "mimic")) == old


def test_weights_multiply_and_are_divided_by_pairs():
    job = cfgs("kd_loss", "T: 2, loss_weight: 3.0") + "\n  loss_weight: 0.5"
    assert distilled(job)[1] == {"kd_loss": ["kl"], "kd_weight": [1.5], "temperature": 2.0}
    ours = "[backbone.layer3, backbone.layer4, head.classifier]"
    assert distilled("loss_weight: 3.0", ours)[1] == {
        "distill_pairs": ["layer3 -> layer3", "layer4 -> layer4", "logits"],
        "kd_loss": ["l2_normalized"] * 3,
        "kd_weight": [1.0] * 3,
    }


@pytest.mark.parametrize(
    "ours, theirs, pair, told",
    [
        ("head.classifier", LOGITS, "logits", False),
        ("[backbone.layer4]", "[backbone.layer3]", "layer4 -> layer3", False),
        ("[neck_adapt.conv.0.0]", "[backbone.layer4]", "neck_adapt.conv.0.0 -> layer4", True),
        ("[backbone.layer4]", "[backbone.layers.3]", "layer4 -> layers.3", True),
    ],
)
def test_module_names(ours, theirs, pair, told):
    found, _ = distilled(ours=ours, theirs=theirs)
    assert found.recipe.distill_pairs == [pair]
    assert ("adapter comes by itself" in missing(found)) == told


def test_feature_pairs_use_l2():
    found, options = distilled(cfgs("kd_loss", "T: 4"), "[backbone.layer4, head.classifier]")
    assert options["kd_loss"] == ["l2_normalized", "kl"] and options["temperature"] == 4
    assert "kl compares logits" in said(found, "mimic.cfgs.loss.type", MISSING)


@pytest.mark.parametrize(
    "job, ours, theirs, words",
    [
        (cfgs("kd_loss", "T: 0"), LOGITS, LOGITS, "line 3: mimic.cfgs.loss.kwargs.T is 0"),
        ("loss_weight: 1.0", "[backbone.layer3, head.classifier]", LOGITS, "are no pairs"),
        ("loss_weight: 1.0", "[]", "[]", "are no pairs"),
        ("task_loss: false", "[backbone.layer4]", "[backbone.layer4]", "nothing would train"),
    ],
)
def test_invalid_mimic_is_refused(job, ours, theirs, words):
    assert words in refused(MIMIC.format(job, theirs, ours))


@pytest.mark.parametrize(
    "kind, flags, model, told",
    [
        ("resnet152", "", "resnet152", False),
        ("resnet152", "deep_stem: true, avg_down: true", "resnet152d", False),
        ("resnet152", "avg_down: true", "resnet152", True),
        ("resnet101_D", "deep_stem: true", "resnet101d", False),
        ("regnety_6400m", "", "regnety_064", False),
        ("cswin_tiny", "", "cswin_tiny", True),
    ],
)
def test_teacher_model(kind, flags, model, told):
    net = f"teacher:\n  - {{name: backbone, type: {kind}, kwargs: {{{flags}}}}}\n"
    found, options = distilled(more=net)
    assert options["teacher_model"] == [model] and timm.is_model(model) != (model == "cswin_tiny")
    assert any("timm has no" in n.text for n in found.notes if n.kind == MISSING) == told
    assert "here they are trained" not in found.summary()


def test_teacher_without_weights():
    text = config(extra=KD_NEW.replace(", teacher_weight: teacher.pth", ""))
    found = loads(text.replace("task_names: cls", "runner: {type: kd}"), gpus=16)
    assert found.recipe == read("kd").recipe.replace(teacher=["name-the-teacher"])
    assert "random weights" in said(found, "mimic.teacher", MISSING)


def test_only_one_teacher_is_taken():
    found = loads(KD + "num_classes: 7\n")
    assert found.recipe == Recipe() and "not supported" in said(found, "teacher[0]", MISSING)
    second = "  teacher1: {mimic_name: [head.classifier], teacher_weight: y.pth}\n"
    found, _ = distilled(
        more=second + KD.replace("teacher:", "teacher1:").replace("resnet152", "x")
    )
    assert found.recipe.teacher == ["t.pth"]
    for where in ("mimic.teacher1", "teacher1[0]"):
        assert "not supported" in said(found, where, MISSING)


def test_mimic_warmup_is_in_epochs():
    more = "dataset: {batch_sampler: {kwargs: {batch_size: 64}}}\ntrainer: {max_epoch: 9}\n"
    assert distilled("warm_up_iters: 400", more=more)[0].recipe.kd_warmup_epochs == 4.0
    assert distilled("warm_up_iters: -1", more=more)[0].recipe.kd_warmup_epochs == 0
    found, _ = distilled("warm_up_iters: 400")
    assert found.recipe.kd_warmup_epochs == 0
    assert "not supported" in said(found, "mimic.warm_up_iters", MISSING)


def test_without_task_loss():
    found, options = distilled("task_loss: false", more="net: [{kwargs: {cls_loss: {type: bce}}}]")
    assert options["task_weight"] == 0 and found.recipe.loss == "ce"
    assert "task_weight is 0" in said(found, "net[0].kwargs.cls_loss.type", NOTHING)


def test_student_weights():
    text = MIMIC.format("loss_weight: 1.0", LOGITS, f"{LOGITS}, student_weight: s.pth")
    assert loads(text).recipe.weights == "s.pth"
    found = loads(text + "saver: {pretrain_model: p.pth}")
    assert found.recipe.weights == "p.pth"
    assert "saver.pretrain_model" in said(found, "mimic.student.student_weight", NOTHING)


def test_mimic_needs_its_runner():
    words = "only with runtime.runner.type kd"
    assert words in said(loads(config(extra=KD_NEW)), "mimic", DEFECT)
    assert said(read("kd"), "mimic") == said(read("plain"), "mimic") == ""


def test_a_warmup_in_steps_is_as_long_where_the_last_batch_is_dropped():
    text = config(extra=KD_NEW).replace("num_workers: 4", "num_workers: 4\n        drop_last: true")
    for images, steps in ((2040, 31), (2048, 32)):
        recipe = loads(text, gpus=1, train_images=images).recipe
        assert recipe.drop_last and recipe.kd_warmup_epochs * steps == pytest.approx(1000)
