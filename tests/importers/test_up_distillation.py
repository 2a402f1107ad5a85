"""UP's mimic blocks as options of distillation."""

import textwrap

import pytest
import timm
from up_files import KD, KD_NEW, config, read, refused, said

from workbench.importers.united_perception import MISSING, NOTHING, TAKEN, loads
from workbench.recipe import Recipe

MIMIC = """
mimic:
  {}
  teacher: {{mimic_name: {}, teacher_weight: t.pth}}
  student: {{mimic_name: {}}}
"""


def learnt(job="loss_weight: 1.0", ours="[head.classifier]", theirs=None, more="", **options):
    """What is found in a mimic block, of one teacher that has weights."""
    text = MIMIC.format(job, theirs or ours, ours)
    return loads(text + textwrap.dedent(more), **options)


def cfgs(kind: str, kwargs: str = "") -> str:
    return f"cfgs: {{loss: {{type: {kind}, kwargs: {{{kwargs}}}}}}}"


def distils(found) -> dict:
    """The options of distillation that differ from their defaults, without the teacher's name."""
    parts = ("distill_", "kd_", "teacher_", "temperature", "task_weight")
    return {k: v for k, v in found.recipe.non_default().items() if k.startswith(parts)}


def test_no_teacher_no_distillation():
    assert distils(read("plain")) == {} and read("plain").recipe.teacher == []
    assert read("plain").deployment is None and said(read("plain"), "mimic") == ""


@pytest.mark.parametrize(
    "job, loss, note",
    [
        # the last version: cfgs, an L2 loss without them
        ("loss_weight: 1.0", "l2_normalized", ""),
        (cfgs("kl_loss"), "up_kl", ""),
        (cfgs("kd_loss"), "kl", ""),
        (cfgs("ce_loss"), "ce", ""),
        (cfgs("l2_loss"), "l2_normalized", ""),
        (cfgs("l2_loss", "feat_norm: true, batch_mean: true"), "l2_normalized", ""),
        (cfgs("l2_loss", "feat_norm: false, batch_mean: false"), "l2", ""),
        (cfgs("l2_loss", "feat_norm: false"), "l2", "images, not elements: multiply"),
        (cfgs("l2_loss", "batch_mean: false"), "l2_normalized", "elements, not images: divide"),
        (cfgs("gkd_loss"), "kl", "no counterpart of gkd_loss; kl is taken"),
        (cfgs("kdd_loss"), "kl", "the nearest is 'kd_loss'"),
        (cfgs("bce_loss"), "kl", "no counterpart of bce_loss"),
        (cfgs("kl_loss", "norm: softmax"), "up_kl", ""),
        (cfgs("kl_loss", "norm: l2"), "up_kl", "a softmax is compared"),
        # the page's, a KL unless it says otherwise
        ("mimic_name: a", "up_kl", ""),
        *[(f"mimic_type: {k}", v, "") for k, v in
          {"kl": "up_kl", "kd": "kl", "ce": "ce", "l2": "l2_normalized"}.items()],
        ("mimic_type: kl\n  mimic_norm: true", "up_kl", ""),
        ("mimic_ins_type: base", "l2_normalized", ""),
        ("mimic_ins_type: DeFeat", "l2_normalized", "for detection"),
    ],
)  # fmt: skip
def test_mimic_loss(job, loss, note):
    found = learnt(job)
    assert found.recipe.teacher == ["t.pth"] and distils(found) == {"kd_loss": [loss]}
    told = "\n".join(
        n.text for n in found.notes if n.kind == MISSING and n.where != "teacher[0].type"
    )
    assert (note in told) if note else told == ""
    old, where = "_type" in job.replace("ins_type", "") or "_name" in job, "mimic"
    assert ("L2 loss of normalised logits" in said(found, where)) == old
    for where in ("mimic.mimic_type", "mimic.cfgs.loss.type"):
        if "kl" in job and where in {n.where for n in found.notes}:
            assert "negative logits count as 0" in said(found, where)


def test_weights_multiply_and_are_divided_by_pairs():
    job = cfgs("kd_loss", "T: 2, loss_weight: 3.0") + "\n  loss_weight: 0.5"
    found = distils(learnt(job))
    assert found == {"kd_loss": ["kl"], "kd_weight": [1.5], "temperature": 2.0}
    found = learnt("loss_weight: 3.0", ours="[backbone.layer3, backbone.layer4, head.classifier]")
    assert found.recipe.distill_pairs == ["layer3 -> layer3", "layer4 -> layer4", "logits"]
    assert found.recipe.kd_weight == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "ours, theirs, mimic, told",
    [
        ("[head.classifier]", "[head.classifier]", "logits", False),
        ("head.classifier", "[head.classifier]", "logits", False),
        ("[backbone.layer4]", "[backbone.layer3]", "layer4 -> layer3", False),
        ("[backbone.layer4.1.conv2]", "[backbone.layer4]", "layer4.1.conv2 -> layer4", False),
        ("[neck_adapt.conv.0.0]", "[backbone.layer4]", "neck_adapt.conv.0.0 -> layer4", True),
        ("[backbone.layer4]", "[backbone.layers.3]", "layer4 -> layers.3", True),
        ("[backbone.layer0]", "[backbone.layer0]", "layer0 -> layer0", True),
    ],
)
def test_module_names(ours, theirs, mimic, told):
    found = learnt(ours=ours, theirs=theirs)
    assert found.recipe.distill_pairs == [mimic]
    notes = [n for n in found.notes if n.kind == MISSING and n.where.endswith("mimic_name[0]")]
    assert all("adapter comes by itself" in n.text for n in notes) and bool(notes) == told


def test_feature_pairs_use_l2():
    found = learnt(cfgs("kd_loss", "T: 4"), ours="[backbone.layer4, head.classifier]")
    assert found.recipe.kd_loss == ["l2_normalized", "kl"] and found.recipe.temperature == 4
    words = "kl compares logits; l2_normalized is taken for layer4"
    assert words in said(found, "mimic.cfgs.loss.type", MISSING)


def test_temperature():
    assert learnt(cfgs("gkd_loss", "T: 4")).recipe.temperature == 4
    text = MIMIC.format(cfgs("kd_loss", "T: 0"), "[head.classifier]", "[head.classifier]")
    assert "line 3: mimic.cfgs.loss.kwargs.T is 0; wanted a number, above 0" in refused(text)


@pytest.mark.parametrize(
    "kind, flags, model, told",
    [
        ("resnet152", "", "resnet152", False),
        ("resnet152", "deep_stem: true, avg_down: true", "resnet152d", False),
        ("resnet50", "deep_stem: true, avg_down: true", "resnet50d", False),
        ("resnet152", "deep_stem: true, avg_down: false", "resnet152", True),
        ("resnet152", "avg_down: true", "resnet152", True),
        ("resnet101_D", "deep_stem: true", "resnet101d", False),
        ("resnet101_D", "", "resnet101", True),
        ("regnety_6400m", "", "regnety_064", False),
        ("cswin_tiny", "", "cswin_tiny", True),
    ],
)
def test_teacher_model(kind, flags, model, told):
    net = (
        f"teacher:\n  - {{name: backbone, type: {kind}, kwargs: {{frozen_layers: [1], {flags}}}}}\n"
    )
    found = learnt(more=net)
    assert found.recipe.teacher_model == [model] and timm.is_model(model) != (model == "cswin_tiny")
    assert any("timm has no" in n.text for n in found.notes if n.kind == MISSING) == told
    assert found.recipe.freeze == [] and "here they are trained" not in found.summary()


def test_teacher_without_weights(tmp_path):
    text = config(extra=KD_NEW.replace(", teacher_weight: teacher.pth", ""))
    text = text.replace("task_names: cls", "runner: {type: kd}")
    found = loads(text, gpus=16)
    assert found.recipe == read("kd").recipe.replace(teacher=["name-the-teacher"])
    first = found.params().splitlines()[1:3]
    assert first[0] == f"# {MISSING}:" and "mimic.teacher: no teacher_weight" in first[1]
    assert "random weights" in said(found, "mimic.teacher", MISSING)


def test_unused_teacher_is_noted():
    text = KD + "  - {name: post_process, kwargs: {cls_loss: {type: bce}}}\n"
    found = loads(text + "num_classes: 7\nteacher_bn_mode: train\n")
    assert found.recipe == Recipe() and "no counterpart" in said(found, "teacher[2]", MISSING)
    assert "no mimic in this text uses it" in said(found, "teacher", MISSING)
    found = learnt(more=KD.replace("*num_classes", "5").replace("teacher:", "teacher_b:"))
    assert found.recipe.teacher == ["t.pth"]
    assert "no mimic in this text uses it" in said(found, "teacher_b", MISSING)


def test_several_mimic_jobs():
    text = """
mimic:
  mimic_as_jobs: true
  mimic_job0:
    loss_weight: 2.0
    warm_up_iters: 40
    teacher0: {mimic_name: [backbone.layer3, head.classifier], teacher_weight: x.pth}
    student: {mimic_name: [backbone.layer4, head.classifier]}
    cfgs: {loss: {type: kd_loss, kwargs: {T: 4}}}
  mimic_job1:
    warm_up_iters: 60
    teacher1: {mimic_name: [head.classifier], teacher_weight: y.pth, teacher_bn_mode: train}
    student: {mimic_name: [head.classifier]}
    cfgs: {loss: {type: ce_loss, kwargs: {T: 2, loss_weight: 0.5}}}
"""
    for key, model in (("teacher0", "resnet50"), ("teacher1", "resnet101")):
        text += f"{key}: [{{name: backbone, type: {model}}}]\n"
    text += "dataset: {batch_sampler: {kwargs: {batch_size: 100}}}"
    found = loads(text, train_images=1000)
    assert found.recipe.teacher == ["x.pth", "y.pth"]
    assert distils(found) == {
        "teacher_model": ["resnet50", "resnet101"],
        "distill_pairs": ["layer4 -> teacher1:layer3", "logits -> teacher1:logits",
                  "logits -> teacher2:logits"],
        "kd_loss": ["l2_normalized", "kl", "ce"],
        "kd_weight": [1.0, 1.0, 0.5],
        "temperature": 4.0,
        "kd_warmup_epochs": 4.0,
    }  # fmt: skip
    assert found.origin["teacher"].where == "mimic.mimic_job0.teacher0.teacher_weight"
    assert said(found, "mimic.mimic_job1.cfgs.loss.kwargs.T", MISSING).startswith("2; all share")
    assert said(found, "mimic.mimic_job1.warm_up_iters", MISSING).startswith("6; all share")
    where = "mimic.mimic_job1.teacher1.teacher_bn_mode"
    assert "eval mode" in said(found, where, MISSING)
    found = loads(text.replace("mode: train", "mode: eval"), train_images=1000)
    assert said(found, where, TAKEN) == "'eval'"
    for there, instead in (
        ("[backbone.layer3, head.classifier]", "[backbone.layer3]"),
        ("[head.classifier], teacher_weight: y", "[], teacher_weight: y"),
    ):
        assert "wanted pairs" in refused(text.replace(there, instead))


def test_misspelt_mimic_key_has_the_nearest():
    found = learnt("warmup_iters: 400\n  teacher_weigth: t.pth")
    assert "the nearest is 'warm_up_iters'" in said(found, "mimic.warmup_iters", MISSING)


def test_mimic_warmup_is_in_epochs():
    more = "dataset: {batch_sampler: {kwargs: {batch_size: 64}}}\ntrainer: {max_epoch: 9}\n"
    found = learnt("warm_up_iters: 400", more=more, gpus=2, train_images=12_800)
    assert found.recipe.kd_warmup_epochs == 4.0
    assert learnt("warm_up_iters: -1", more=more).recipe.kd_warmup_epochs == 0
    found = learnt("warm_up_iters: 400")
    assert found.recipe.kd_warmup_epochs == 0
    assert "set kd_warmup_epochs" in said(found, "mimic.warm_up_iters", MISSING)
    assert "never reach the whole loss (mimic.warm_up_iters)" in refused(
        MIMIC.format("warm_up_iters: 900000", "[head.classifier]", "[head.classifier]") + more
    )


def test_without_task_loss():
    found = learnt("task_loss: false", more="net: [{kwargs: {cls_loss: {type: bce}}}]")
    assert found.recipe.task_weight == 0 and found.recipe.loss == "ce"
    assert "task_weight is 0" in said(found, "net[0].kwargs.cls_loss.type", NOTHING)
    assert learnt("task_loss: true").recipe.task_weight == 1
    text = MIMIC.format("task_loss: false", "[backbone.layer4]", "[backbone.layer4]")
    assert "nothing would train the classifier (mimic.task_loss)" in refused(text)


def test_student_weights():
    student = ["[head.classifier]", "[head.classifier], student_weight: s.pth"]
    text = MIMIC.format("loss_weight: 1.0", *student)
    assert loads(text).recipe.weights == "s.pth"
    found = loads(text + "saver: {pretrain_model: p.pth}")
    assert found.recipe.weights == "p.pth"
    assert "saver.pretrain_model" in said(found, "mimic.student.student_weight", NOTHING)


def test_only_the_slot_loss_is_read():
    found = learnt("cfgs: {kd: {type: kd_loss, kwargs: {T: 4.0}}}")
    assert distils(found) == {"kd_loss": ["l2_normalized"]}
    assert "slot `loss` alone" in said(found, "mimic.cfgs.kd")
    found = learnt("cfgs: {kd: {type: ce_loss}, loss: {type: kd_loss, kwargs: {T: 4.0}}}")
    assert distils(found) == {"kd_loss": ["kl"], "temperature": 4.0}
