"""The report on teachers against plain loops, scipy, and a fixed clock."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import timm
import torch
from helpers import assert_same_tensors, train

from workbench import data, distillation, training
from workbench.data import images
from workbench.doctor import teachers, throughput
from workbench.doctor.teachers import best_temperature, teacher_findings, teacher_report
from workbench.recipe import Recipe

SMALL = {"image_size": 16, "val_resize": 16, "workers": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread) -> dict[str, str]:
    """Run folders of two short trainings on digits: cross-entropy and binary cross-entropy."""
    short = {"train_fraction": 0.4, "epochs": 4, "eval_every": 4, "lr": 0.05, "nesterov": True}
    short |= {"runs_dir": str(tmp_path_factory.mktemp("teachers")), **SMALL}
    losses = {"ce": {}, "bce": {"loss": "bce", "bce_sum": True, "label_smoothing": 0.1}}
    return {n: str(train(Recipe(name=n, **short, **k)).path) for n, k in losses.items()}


def student(trained: dict[str, str], **changes) -> Recipe:
    options = {"train_fraction": 0.2, "seed": 1, "crop_scale": [0.5, 1.0], "mixup_alpha": 0.2}
    options |= {"precision": "fp32", "teacher": list(trained.values()), **SMALL, **changes}
    return Recipe(**options)


@pytest.fixture(scope="module")
def reported(trained) -> tuple[Recipe, data.Dataset, pd.DataFrame]:
    recipe = student(trained)
    content = data.load_dataset(recipe)
    return recipe, content, teacher_report(recipe, content, max_images=100)


def model_of(source: str) -> torch.nn.Module:
    """The model of a run, through timm and torch alone."""
    model = timm.create_model("test_resnet", num_classes=10).eval()
    model.load_state_dict(torch.load(f"{source}/last.pt", weights_only=True)["model"])
    return model


@torch.no_grad()
def one_by_one(model: torch.nn.Module, content: data.Dataset) -> np.ndarray:
    """Logits of the validation images, each read, resized and normalised by itself."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (Recipe().mean, Recipe().std))
    rows = []
    for path in content.val.path:
        image = images.decode(path)
        image = image.resize((16, 16), images.Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        rows.append(model(((values - mean) / std)[None])[0].numpy())
    return np.stack(rows).astype(np.float64)


@pytest.fixture(scope="module")
def slow(reported, trained) -> dict[str, np.ndarray]:
    """Every teacher's logits of the validation images."""
    return {source: one_by_one(model_of(source), reported[1]) for source in trained.values()}


def test_validation_columns_equal_a_plain_loop(reported, slow):
    recipe, content, report = reported
    label = content.val.label.to_numpy()
    fresh = one_by_one(training.create_model(recipe, 10).eval(), content).argmax(1)
    assert report.teacher.tolist() == list(slow)
    for row, (source, z) in zip(report.itertuples(), slow.items(), strict=True):
        assert row.val_top1 == pytest.approx(100 * np.mean(z.argmax(1) == label))
        assert row.val_images == 500
        assert row.own_top1 == pytest.approx(row.val_top1, abs=0.5)  # there in bf16, maybe
        offsets = [np.mean(image) / np.std(image) for image in z]
        assert row.offset == pytest.approx(np.mean(offsets), abs=1e-3)
        assert row.agreement == pytest.approx(100 * np.mean(z.argmax(1) == fresh))
        assert row.start_top1 == pytest.approx(100 * np.mean(fresh == label))
        assert row.parameters == sum(p.numel() for p in model_of(source).parameters())


@torch.no_grad()
def test_crop_columns_are_of_the_images_that_train(reported, trained):
    """Four batches of 32 are the first that hold 100 images."""
    recipe, content, report = reported
    reader = data.train_loader(
        content.train, training.train_transform(recipe), seed=1, batch_size=32, steps=range(4)
    )
    prepare = training.DeviceTransform(recipe, 10, torch.device("cpu"))
    shown, soft = (torch.cat(t) for t in zip(*map(prepare, reader), strict=True))
    assert ((soft > 0).sum(1) == 2).any()  # mixed, so the larger share counts
    for row, source in zip(report.itertuples(), trained.values(), strict=True):
        z = model_of(source)(shown).double().numpy()
        assert row.crops == 128
        assert row.crops_top1 == pytest.approx(100 * np.mean(z.argmax(1) == soft.argmax(1).numpy()))
        entropies = scipy.stats.entropy(scipy.special.softmax(z, axis=1), axis=1)
        assert row.entropy == pytest.approx(entropies.mean(), rel=1e-3)


def test_bce_is_known_from_the_run_or_the_mean_logit(reported, trained, tmp_path):
    """A weights file has no run: its offset decides."""
    _, content, report = reported
    ce, bce = report.offset
    assert abs(ce) < 0.1 and bce < -0.5
    assert report.bce.tolist() == [False, True] and report.smoothing.tolist() == [0.0, 0.1]
    files = {}
    for name, source in trained.items():
        files[name] = str(tmp_path / f"{name}.safetensors")
        shutil.copy(f"{source}/best.safetensors", files[name])
    recipe = student(files, teacher_model=["test_resnet"] * 2)
    bare = teacher_report(recipe, content, max_images=32)
    assert bare.bce.tolist() == [False, True]
    assert bare.own_top1.isna().all() and bare.smoothing.isna().all()
    np.testing.assert_allclose(bare.val_top1, report.val_top1)
    assert "in its own run" not in str(teacher_findings(recipe, bare)[0])


def optimal(z: np.ndarray, y: np.ndarray) -> float:
    """The best temperature, by scipy."""

    def loss(log_t: float) -> float:
        return -scipy.special.log_softmax(z / math.exp(log_t), 1)[np.arange(len(y)), y].mean()

    bounds = (math.log(0.05), math.log(20))
    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x)


def test_best_temperature_equals_scipy(reported, slow):
    _, content, report = reported
    label = content.val.label.to_numpy()
    for found, z in zip(report.temperature, slow.values(), strict=True):
        assert found == pytest.approx(optimal(z, label), rel=0.025)


@pytest.mark.parametrize("scale", [0.3, 6.0])
def test_best_temperature_of_scaled_calibrated_logits_is_the_scale(scale):
    rng = np.random.default_rng(0)
    calibrated = rng.normal(size=(4000, 7)) * 2
    labels = np.array([rng.choice(7, p=scipy.special.softmax(row)) for row in calibrated])
    assert best_temperature(calibrated * scale, labels) == pytest.approx(scale, rel=0.1)


def test_best_temperature_ends_at_its_bounds():
    sure = np.eye(5)
    assert best_temperature(sure, np.arange(5)) == pytest.approx(0.05)
    assert best_temperature(sure, np.arange(5)[::-1].copy()) == pytest.approx(20)


def test_report_changes_no_weights_modes_or_generators(trained, monkeypatch):
    created, create = [], distillation.Distillation
    observed = lambda *args: created.append(create(*args)) or created[-1]
    monkeypatch.setattr(distillation, "Distillation", observed)
    options = {"dropout": 0.3, "drop_path": 0.2, "distill_pairs": ["logits", "layer4 -> layer4"]}
    recipe = student(trained, **options, kd_loss=["kl", "l2"])
    content = data.load_dataset(recipe)
    state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    teacher_report(recipe, content, max_images=32)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    [kd] = created
    fresh = create(recipe, training.create_model(recipe, 10), content.classes, kd.device)
    networks = [[k.student, *(t.model for t in k.teachers)] for k in (kd, fresh)]
    for ours, theirs in zip(*networks, strict=True):
        assert_same_tensors(ours.state_dict(), theirs.state_dict())
        assert all(p.grad is None for p in ours.parameters())
    assert all(part.training for part in kd.student.modules())


def test_step_shares_follow_the_seconds_of_each_forward(trained, monkeypatch):
    """By a clock that only the forwards move: three seconds, one, and four for the student."""
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    recipe = student(trained)
    kd = distillation.Distillation(
        recipe, training.create_model(recipe, 10), [str(i) for i in range(10)], torch.device("cpu")
    )
    for network, seconds in zip((*(t.model for t in kd.teachers), kd.student), (3, 1, 4),
                                strict=True):  # fmt: skip
        network.register_forward_hook(lambda *_, s=seconds: clock.__setitem__(0, clock[0] + s))
    images, labels = torch.zeros(2, 3, 32, 32), torch.tensor([1, 2])
    assert teachers.step_shares(recipe, kd, images, labels) == pytest.approx([3 / 8, 1 / 8])


@pytest.mark.parametrize("option", ["weights", "resume_from"])
def test_student_with_the_teachers_weights_agrees_with_it(trained, option):
    recipe = student({"ce": trained["ce"]}, **{option: trained["ce"]})
    report = teacher_report(recipe, data.load_dataset(recipe), max_images=32)
    assert report.agreement.tolist() == [100.0]
    assert report.start_top1.tolist() == report.val_top1.tolist()


def test_max_val_images_are_evenly_spaced(reported, slow):
    recipe, content, whole = reported
    report = teacher_report(recipe, content, max_images=32, max_val_images=100)
    assert report.val_images.tolist() == [100, 100]
    for row, source in zip(report.itertuples(), slow, strict=True):
        right = slow[source].argmax(1)[::5] == content.val.label[::5]
        assert row.val_top1 == pytest.approx(100 * right.mean())


def test_fact_has_the_columns_of_the_report(reported):
    recipe, _, report = reported
    facts = [f.text for f in teacher_findings(recipe, report) if f.kind == "fact"]
    for text, row in zip(facts, report.itertuples(), strict=True):
        for words in (
            f"teacher {row.teacher}, test_resnet, 0.4 million parameters: ",
            f"top-1 {row.val_top1:.2f} % of 500 validation images",
            f"({row.own_top1:.2f} % in its own run)",
            f"{row.crops_top1:.1f} % of 128 training crops and mixes",
            f"entropy of {row.entropy:.2f} nats",
            f"agrees with it on {row.agreement:.1f} %",
        ):
            assert words in text


GOOD = {
    "teacher": "runs/t", "model": "resnet50", "parameters": 25_000_000, "own_top1": 80.0,
    "val_top1": 79.0, "val_images": 50_000, "crops_top1": 70.0, "crops": 2048, "entropy": 1.1,
    "offset": -0.01, "bce": False, "temperature": 1.1, "agreement": 0.1, "start_top1": 0.1,
    "step_share": 30.0, "smoothing": 0.0, "state": "finished",
}  # fmt: skip
KL = {"teacher": "a", "kd_loss": "kl", "temperature": 4.0}
OF_TEACHERS = [
    # (words, row, options, a row or options that take the warning away)
    ("use temperature 8 instead of 4", {"bce": True, "temperature": 2.0}, {}, {"bce": False}),
    ("its best temperature is 1.10", {"bce": True}, {}, {"kd_loss": "kl_standardized_logits"}),
    ("mean logit -1.53 sd", {"bce": True, "offset": -1.53}, {},
     {"distill_pairs": "layer4 -> layer4", "kd_loss": "l2"}),
    ("these images do not tell its best temperature; use", {"bce": True, "temperature": 0.05}, {},
     {"kd_loss": "kl_standardized_logits"}),
    ("up_kl ignores negative logits", {"bce": True}, {"kd_loss": "up_kl", "temperature": 1.0},
     {"kd_loss": "kl_standardized_logits"}),
    ("its run is stopped", {"state": "stopped"}, {}, {"state": "finished"}),
    ("label smoothing 0.1", {"smoothing": 0.1}, {}, {"smoothing": 0.0}),
    ("label smoothing 0.1", {"smoothing": 0.1}, {"kd_loss": "dkd"}, {"kd_loss": "dist"}),
    ("top-1 79.00 % is not above the initial student's 79.00 %", {"start_top1": 79.0}, {},
     {"start_top1": 78.9}),
    ("top-1 is only 47.0 % of the student's crops", {"crops_top1": 47.0}, {}, {"crops_top1": 47.5}),
    ("loses 5.5 points", {"own_top1": 84.5}, {}, {"own_top1": 84.0}),
]  # fmt: skip


def warnings(row: dict, options: dict) -> list:
    report = pd.DataFrame([{**GOOD, **row}])
    return [f for f in teacher_findings(Recipe(**options), report) if f.kind == "warning"]


@pytest.mark.parametrize("options", [KL, {"teacher": "a"}])
def test_good_teacher_has_no_warning(options):
    assert warnings({}, options) == []
    assert warnings({"own_top1": math.nan, "smoothing": None}, options) == []


@pytest.mark.parametrize("words, row, options, cure", OF_TEACHERS)
def test_warning_names_its_evidence_and_disappears_with_its_cure(words, row, options, cure):
    [finding] = warnings(row, {**KL, **options})
    assert words in finding.text and finding.text.startswith("teacher runs/t: ")
    assert finding.source and str(finding).endswith(f"[{finding.source}]")
    if cure.keys() & {"kd_loss", "distill_pairs"}:
        cured = {**KL, **options, **cure} | ({"temperature": 1.0} if "l2" in cure.values() else {})
        assert warnings(row, cured) == []
    else:
        assert warnings({**row, **cure}, {**KL, **options}) == []


def test_teachers_run_in_the_precision_of_the_recipe(trained, reported):
    _, content, exact = reported
    for precision in ("bf16", "fp16"):
        report = teacher_report(student(trained, precision=precision), content, max_images=100)
        assert (report.entropy != exact.entropy).all()
        assert report.entropy.to_numpy() == pytest.approx(exact.entropy.to_numpy(), rel=0.02)
