"""The report on teachers against plain loops, scipy, and a fixed clock."""

import math
import random
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
from workbench.doctor import teachers
from workbench.doctor.teachers import best_temperature, teacher_findings, teacher_report
from workbench.recipe import Recipe

SMALL = {"image_size": 16, "val_resize": 16}


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> dict[str, str]:
    """Run folders of two short trainings on digits: cross-entropy and binary cross-entropy."""
    folder, threads = tmp_path_factory.mktemp("teachers"), torch.get_num_threads()
    torch.set_num_threads(1)
    short = {"train_fraction": 0.4, "epochs": 4, "eval_every": 4, "lr": 0.05, "nesterov": True,
             "workers": 0, "runs_dir": str(folder), **SMALL}  # fmt: skip
    losses = {"ce": {}, "bce": {"loss": "bce", "bce_sum": True, "label_smoothing": 0.1}}
    found = {n: str(train(Recipe(name=n, **short, **k)).path) for n, k in losses.items()}
    torch.set_num_threads(threads)
    return found


def student(taught: dict[str, str], **changes) -> Recipe:
    options = {
        "train_fraction": 0.2,
        "seed": 1,
        "crop_scale": [0.5, 1.0],
        "mixup_alpha": 0.2,
        "precision": "fp32",
        "workers": 0,
        "teacher": list(taught.values()),
        **SMALL,
    }
    return Recipe(**{**options, **changes})


@pytest.fixture(scope="module")
def judged(taught) -> tuple[Recipe, data.Dataset, pd.DataFrame]:
    recipe = student(taught)
    content = data.load_dataset(recipe)
    return recipe, content, teacher_report(recipe, content, max_images=100, progress=False)


def plain(source: str) -> torch.nn.Module:
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
def slow(judged, taught) -> dict[str, np.ndarray]:
    """Every teacher's logits of the validation images."""
    return {source: one_by_one(plain(source), judged[1]) for source in taught.values()}


def test_validation_columns_equal_a_plain_loop(judged, slow):
    recipe, content, report = judged
    label = content.val.label.to_numpy()
    fresh = one_by_one(training.create_model(recipe, 10).eval(), content).argmax(1)
    assert report.teacher.tolist() == list(slow)
    for row, (source, z) in zip(report.itertuples(), slow.items(), strict=True):
        hits = sum(int(list(z[i]).index(max(z[i])) == label[i]) for i in range(len(label)))
        assert row.val_top1 == pytest.approx(100 * hits / 500) and row.val_images == 500
        assert row.own_top1 == pytest.approx(row.val_top1, abs=0.5)  # there in bf16, maybe
        offsets = [np.mean(image) / np.std(image) for image in z]
        assert row.offset == pytest.approx(np.mean(offsets), abs=1e-3)
        assert row.agreement == pytest.approx(100 * np.mean(z.argmax(1) == fresh))
        assert row.start_top1 == pytest.approx(100 * np.mean(fresh == label))
        assert row.parameters == sum(p.numel() for p in plain(source).parameters())


@torch.no_grad()
def test_crop_columns_are_of_the_images_that_train(judged, taught):
    """Four batches of 32 are the first that hold 100 images."""
    recipe, content, report = judged
    reader = data.train_loader(
        content.train, training.train_transform(recipe), seed=1, batch_size=32, steps=range(4)
    )
    prepare = training.DeviceTransform(recipe, 10, torch.device("cpu"))
    shown, soft = (torch.cat(t) for t in zip(*map(prepare, reader), strict=True))
    assert ((soft > 0).sum(1) == 2).any()  # mixed, so the larger share counts
    for row, source in zip(report.itertuples(), taught.values(), strict=True):
        z = plain(source)(shown).double().numpy()
        assert row.crops == 128
        assert row.crops_top1 == pytest.approx(100 * np.mean(z.argmax(1) == soft.argmax(1).numpy()))
        entropies = scipy.stats.entropy(scipy.special.softmax(z, axis=1), axis=1)
        assert row.entropy == pytest.approx(entropies.mean(), rel=1e-3)


def test_bce_is_known_from_the_run_or_the_mean_logit(judged, taught, tmp_path):
    """Told by its run; of a bare file of weights by the offset alone."""
    _, content, report = judged
    ce, bce = report.offset
    assert abs(ce) < 0.1 and bce < -0.5
    assert report.bce.tolist() == [False, True] and report.smoothing.tolist() == [0.0, 0.1]
    files = {}
    for name, source in taught.items():
        files[name] = str(tmp_path / f"{name}.safetensors")
        shutil.copy(f"{source}/best.safetensors", files[name])
    recipe = student(files, teacher_model=["test_resnet"] * 2)
    bare = teacher_report(recipe, content, max_images=32, progress=False)
    assert bare.bce.tolist() == [False, True]
    assert bare.own_top1.isna().all() and bare.smoothing.isna().all()
    np.testing.assert_allclose(bare.val_top1, report.val_top1)
    assert "in its own run" not in str(teacher_findings(recipe, bare)[0])


def nll(log_t: float, z: np.ndarray, y: np.ndarray) -> float:
    scaled = z / math.exp(log_t)
    return float(np.mean(scipy.special.logsumexp(scaled, axis=1) - scaled[np.arange(len(y)), y]))


def optimal(z: np.ndarray, y: np.ndarray) -> float:
    found = scipy.optimize.minimize_scalar(
        nll, bounds=(math.log(0.05), math.log(20)), args=(z, y), method="bounded"
    )
    return math.exp(found.x)


def test_best_temperature_equals_scipy(judged, slow):
    _, content, report = judged
    label = content.val.label.to_numpy()
    for found, z in zip(report.temperature, slow.values(), strict=True):
        assert found == pytest.approx(optimal(z, label), rel=0.025)


@pytest.mark.parametrize("times", [0.3, 1.0, 2.0, 6.0])
def test_best_temperature_of_scaled_calibrated_logits_is_the_scale(times):
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(4000, 7)) * 2
    chosen = [rng.choice(7, p=scipy.special.softmax(row)) for row in honest]
    labels = np.array(chosen)
    found = best_temperature(honest * times, labels)
    assert found == pytest.approx(times, rel=0.1)
    assert found == pytest.approx(optimal(honest * times, labels), rel=0.021)


def test_best_temperature_ends_at_its_bounds():
    sure = np.eye(5)
    assert best_temperature(sure, np.arange(5)) == pytest.approx(0.05)
    assert best_temperature(sure, np.arange(5)[::-1].copy()) == pytest.approx(20)


def test_report_changes_no_weights_modes_or_generators(taught, monkeypatch):
    made = []

    class Kept(distillation.Distillation):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(distillation, "Distillation", Kept)
    options = {"dropout": 0.3, "drop_path": 0.2, "distill_pairs": ["logits", "layer4 -> layer4"]}
    recipe = student(taught, **options, kd_loss=["kl", "l2"])
    content = data.load_dataset(recipe)
    streams = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    teacher_report(recipe, content, max_images=32, progress=False)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1] == streams[1]).all()  # noqa: NPY002
    assert random.getstate() == streams[2]
    [kd] = made
    assert_same_tensors(
        kd.student.model.state_dict(), training.create_model(recipe, 10).state_dict()
    )
    for teacher, source in zip(kd.teachers, taught.values(), strict=True):
        theirs = plain(source).state_dict()
        for name, value in teacher.model.state_dict().items():  # counts of batches start at 0
            assert torch.equal(value, theirs[name] * (not name.endswith("batches_tracked"))), name
    assert all(part.training for part in kd.student.modules())
    networks = (kd.student, *(t.model for t in kd.teachers))
    assert not [p for network in networks for p in network.parameters() if p.grad is not None]


def test_step_shares_follow_the_seconds_of_each_forward(taught, monkeypatch):
    """By a clock that only the forwards move: three seconds, one, and four for the student."""
    clock = [0.0]
    monkeypatch.setattr(teachers.time, "perf_counter", lambda: clock[0])
    recipe = student(taught)
    kd = distillation.Distillation(
        recipe, training.create_model(recipe, 10), [str(i) for i in range(10)], torch.device("cpu")
    )
    for network, seconds in zip((*(t.model for t in kd.teachers), kd.student), (3, 1, 4),
                                strict=True):  # fmt: skip
        network.register_forward_hook(lambda *_, s=seconds: clock.__setitem__(0, clock[0] + s))
    images, labels = torch.zeros(2, 3, 32, 32), torch.tensor([1, 2])
    assert teachers.step_shares(recipe, kd, images, labels, False) == pytest.approx([3 / 8, 1 / 8])


def test_step_shares_leave_time_for_the_student(judged):
    shares = judged[2].step_share
    assert (shares > 0).all() and shares.sum() < 100


@pytest.mark.parametrize("option", ["weights", "resume_from"])
def test_student_with_the_teachers_weights_agrees_with_it(taught, option):
    recipe = student({"ce": taught["ce"]}, **{option: taught["ce"]})
    report = teacher_report(recipe, data.load_dataset(recipe), max_images=32, progress=False)
    assert report.agreement.tolist() == [100.0]
    assert report.start_top1.tolist() == report.val_top1.tolist()
    text = "\n".join(map(str, teacher_findings(recipe, report)))
    assert f"initial student has top-1 {report.val_top1[0]:.2f} % already, the teacher" in text


def test_max_val_images_are_evenly_spaced(judged, slow):
    recipe, content, whole = judged
    report = teacher_report(recipe, content, max_images=32, max_val_images=100, progress=False)
    assert report.val_images.tolist() == [100, 100]
    for row, source in zip(report.itertuples(), slow, strict=True):
        right = slow[source].argmax(1)[::5] == content.val.label[::5]
        assert row.val_top1 == pytest.approx(100 * right.mean())


def test_fact_has_the_columns_of_the_report(judged):
    recipe, _, report = judged
    facts = [f.text for f in teacher_findings(recipe, report) if f.kind == "fact"]
    assert len(facts) == 2
    for text, row in zip(facts, report.itertuples(), strict=True):
        assert text.startswith(f"teacher {row.teacher}, test_resnet, 0.4 million parameters: ")
        assert f"top-1 {row.val_top1:.2f} % of 500 validation images" in text
        assert f"({row.own_top1:.2f} % in its own run)" in text
        assert f"{row.crops_top1:.1f} % of 128 training crops and mixes" in text
        assert f"entropy of {row.entropy:.2f} nats" in text
        assert f"agrees with it on {row.agreement:.1f} %" in text


GOOD = {
    "teacher": "runs/t",
    "model": "resnet50",
    "parameters": 25_000_000,
    "own_top1": 80.0,
    "val_top1": 79.0,
    "val_images": 50_000,
    "crops_top1": 70.0,
    "crops": 2048,
    "entropy": 1.1,
    "offset": -0.01,
    "bce": False,
    "temperature": 1.1,
    "agreement": 0.1,
    "start_top1": 0.1,
    "step_share": 30.0,
    "smoothing": 0.0,
    "state": "finished",
}
KL = {"teacher": "a", "kd_loss": "kl", "temperature": 4.0}
OF_TEACHERS = [
    # (words, row, options, a row or options that take the warning away)
    ("use temperature 8 instead of 4", {"bce": True, "temperature": 2.0}, {}, {"bce": False}),
    ("its best temperature is 1.10", {"bce": True}, {}, {"kd_loss": "kl_standardized_logits"}),
    ("mean logit -1.53 sd", {"bce": True, "offset": -1.53}, {},
     {"distill_pairs": "layer4 -> layer4", "kd_loss": "l2"}),
    ("these images do not tell its best temperature; use", {"bce": True, "temperature": 0.05}, {},
     {"kd_loss": "kl_standardized_logits"}),
    ("do not tell its best temperature", {"bce": True, "temperature": 20.0}, {}, {"bce": False}),
    ("up_kl ignores negative logits", {"bce": True}, {"kd_loss": "up_kl", "temperature": 1.0},
     {"kd_loss": "kl_standardized_logits"}),
    ("its run is stopped", {"state": "stopped"}, {}, {"state": "finished"}),
    ("label smoothing 0.1", {"smoothing": 0.1}, {}, {"smoothing": 0.0}),
    ("label smoothing 0.1", {"smoothing": 0.1}, {"kd_loss": "dkd"}, {"kd_loss": "dist"}),
    ("initial student has top-1 79.00 % already, the teacher 79.00", {"start_top1": 79.0}, {},
     {"start_top1": 78.9}),
    ("top-1 is 47.0 % of the student's crops", {"crops_top1": 47.0}, {}, {"crops_top1": 47.5}),
    ("loses 5.5 points", {"own_top1": 84.5}, {}, {"own_top1": 84.0}),
]  # fmt: skip


def about(row: dict, options: dict) -> list:
    found = teacher_findings(Recipe(**options), pd.DataFrame([{**GOOD, **row}]))
    return [finding for finding in found if finding.kind == "warning"]


@pytest.mark.parametrize(
    "options", [KL, {"teacher": "a"}, {**KL, "kd_loss": "kl_standardized_logits"}]
)
def test_good_teacher_has_no_warning(options):
    assert about({}, options) == []
    assert about({"own_top1": math.nan, "smoothing": None}, options) == []


@pytest.mark.parametrize("words, row, options, cure", OF_TEACHERS)
def test_warning_names_its_evidence_and_disappears_with_its_cure(words, row, options, cure):
    [finding] = about(row, {**KL, **options})
    assert words in finding.text and finding.text.startswith("teacher runs/t: ")
    assert finding.source and str(finding).endswith(f"[{finding.source}]")
    tempered = {} if cure.get("kd_loss") != "l2" else {"temperature": 1.0}
    cured = {k: v for k, v in cure.items() if k in GOOD and k not in Recipe.model_fields}
    others = {k: v for k, v in cure.items() if k not in cured}
    assert about({**row, **cured}, {**KL, **options, **others, **tempered}) == []
