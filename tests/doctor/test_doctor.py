"""The doctor's numbers against slow arithmetic, its warnings on cue."""

import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import timm
import torch
from helpers import assert_same_tensors, train

from workbench import ROOT, data, distillation, doctor, models, training
from workbench.data import images
from workbench.recipe import Recipe

IMAGENET = {"images": 1_281_167, "classes": 1000}
KNOWN = {  # a large training that nothing speaks against
    "dataset": "files",
    "image_size": 224,
    "val_resize": 256,
    "model": "resnet50",
    "epochs": 200,
    "batch_size": 1024,
    "lr": 0.4,
    "weight_decay": 1e-4,
    "warmup_epochs": 5.0,
}
LAMB = {**KNOWN, "batch_size": 2048, "optimizer": "lamb", "lr": 0.005, "weight_decay": 0.02,
        "clip_grad_norm": 1.0}  # fmt: skip


def said(kind: str, size: dict = IMAGENET, **options) -> str:
    findings = doctor.examine(Recipe(**options), **size)
    return "\n".join(f.text for f in findings if f.kind == kind)


def test_a_sound_recipe_is_warned_of_nothing():
    assert said("warning", **KNOWN) == ""
    assert said("warning", **LAMB) == ""


def test_facts_hold_the_steps_and_the_rates_of_the_schedule():
    facts = said("fact", **KNOWN)
    rate = training.lr_schedule(Recipe(**KNOWN), 1252)
    assert "1,252 steps an epoch of 1,281,167 images, 250,400 steps in all" in facts
    assert "the last step of an epoch has 143 images instead of 1,024" in facts  # 1281167 % 1024
    assert f"over 6,260 steps (5 of 200 epochs), is {rate(125_200):.3g} half way" in facts
    assert f"{rate(250_399):.3g} in the last step" in facts
    assert "1,281 images a class on average; guessing gives 0.1 % top-1" in facts


def test_counts_name_the_smallest_and_the_largest_class():
    findings = doctor.examine(Recipe(), images=60, classes=3, counts=[10, 20, 30])
    assert "20 images a class on average, 10 in the smallest and 30 in the largest" in str(
        [f.text for f in findings]
    )


def test_the_half_life_of_an_average_is_what_halving_it_takes():
    facts = said("fact", **KNOWN, ema_decay=0.9999)
    steps = 0
    weight = 1.0
    while weight > 0.5:
        weight *= 0.9999
        steps += 1
    assert abs(steps - 6931) <= 1 and "younger than 6,931 steps (5.54 epochs of 200)" in facts


def test_a_shrinking_that_shrinks_nothing_is_warned_of():
    assert said("warning", {**IMAGENET, "downscaled": 1}, **KNOWN, train_resize=256) == ""
    text = said("warning", {**IMAGENET, "downscaled": 0}, **KNOWN, train_resize=256)
    assert text == "train_resize 256 shrinks none of 1,281,167 training images; leave it out"


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize(
    "options, slow",
    [
        ({}, lambda c: math.sqrt((1 - 1 / c) ** 2 + (c - 1) / c**2)),
        (dict(label_smoothing=0.1), lambda c: 0.9 * math.sqrt(1 - 1 / c)),
        (dict(loss="bce"), lambda c: 0.5 * math.sqrt(c) / c),
        (dict(loss="bce", bce_sum=True), lambda c: 0.5 * math.sqrt(c)),
        (
            dict(loss="bce", bce_sum=True, bce_shift=True),
            lambda c: math.sqrt((c / (c + 1)) ** 2 + (c - 1) / (c + 1) ** 2),
        ),
    ],
)
def test_the_gradient_of_a_fresh_image_is_the_formulas(options, slow, classes):
    assert doctor.gradient_scale(Recipe(**options), classes) == pytest.approx(slow(classes))


@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.1}, {"loss": "bce"}, {"loss": "bce", "bce_sum": True},
    {"loss": "bce", "bce_sum": True, "bce_shift": True, "label_smoothing": 0.1},
    {"loss": "bce", "bce_threshold": 0.2, "label_smoothing": 0.1},
], ids=str)  # fmt: skip
def test_the_gradient_of_a_fresh_model_is_autograds(options, classes):
    recipe = Recipe(**options)
    logits = torch.zeros(1, classes, dtype=torch.float64, requires_grad=True)
    training.loss_function(recipe)(logits, torch.zeros(1, dtype=torch.int64)).sum().backward()
    wanted = logits.grad.norm().item()
    assert doctor.gradient_scale(recipe, classes) == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_weight_decay_alone_halves_a_weight_in_the_epochs_it_says():
    options = {"epochs": 200, "batch_size": 100, "schedule": "constant"}
    for optimizer in ({"momentum": 0.0}, {"momentum": 0.9}, {"optimizer": "adamw"}):
        recipe = Recipe(**options, **optimizer, lr=0.01, weight_decay=0.05)
        [fact] = [
            f.text for f in doctor.examine(recipe, images=1000, classes=10) if "decay" in f.text
        ]
        epochs = float(fact.split(" in ")[1].split()[0])
        weight = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(weight.weight)
        optimizer = training.create_optimizer(recipe, weight)
        for _ in range(round(10 * epochs)):
            for p in weight.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert weight.weight.item() == pytest.approx(0.5, abs=0.02)


def test_mixing_says_its_shares():
    assert "Of all steps 70% Mixup (alpha 0.1) and 30% CutMix (alpha 1)" in said(
        "fact", **KNOWN, mixup_alpha=0.1, cutmix_alpha=1.0, switch_prob=0.3
    )
    one = said("fact", **KNOWN, cutmix_alpha=1.0, mix_per_sample=True)
    assert "Of all images 100% CutMix" in one and "Mixup" not in one
    assert "Of all steps 25% CutMix" in said("fact", **KNOWN, cutmix_alpha=1.0, mix_prob=0.25)


STRIKES = dict(loss="bce", bce_threshold=0.2, mixup_alpha=0.1, cutmix_alpha=1.0)
WARNED = [
    # (words of the warning, a recipe that earns it, what takes it away again)
    ("68.25", {**LAMB, **STRIKES, "model": "resnet18", "epochs": 100}, {"model": "resnet50"}),
    ("0.005 to 0.008 is", {**LAMB, "lr": 0.04}, {"lr": 0.008}),
    ("0.0018 to 0.008 is", {**LAMB, "batch_size": 256, "lr": 0.0005}, {"lr": 0.002}),
    ("0.01 to 0.016 is", {**LAMB, "batch_size": 8192, "lr": 0.005}, {"lr": 0.012}),
    ("without clip_grad_norm", {**LAMB, "clip_grad_norm": None}, {"clip_grad_norm": 1.0}),
    ("linear rule says 0.4", {**KNOWN, "lr": 4.0}, {"lr": 0.8}),
    ("linear rule says 3.2", {**KNOWN, "batch_size": 8192}, {"lr": 3.2}),
    ("no warm-up", {**KNOWN, "warmup_epochs": 0.0}, {"warmup_steps": 1000}),
    ("6,256", {**KNOWN, "warmup_epochs": 0.0, "warmup_steps": 62_560}, {"warmup_steps": 6256}),
    ("half-life of 6,931 steps of 25,040", {**KNOWN, "epochs": 20, "ema_decay": 0.9999},
     {"ema_decay": 0.999}),
    ("bce_sum, a larger lr", {**KNOWN, "loss": "bce"}, {"bce_sum": True, "bce_shift": True}),
    ("ask for longer training", {**KNOWN, "epochs": 90, "mixup_alpha": 0.2}, {"epochs": 200}),
    (
        "to 0.222",
        {**LAMB, "loss": "bce", "bce_threshold": 0.2, "label_smoothing": 0.1},
        {"label_smoothing": 0.0},
    ),
    ("covers 3/4 of their pixels", {**KNOWN, "image_size": 64, "randaug_n": 2},
     {"randaug_variant": "timm"}),
    ("is another or none", {"dataset": "letters", "hflip": 0.5}, {"hflip": 0.0}),
    ("its error rises below 16", {**KNOWN, "micro_batch_size": 8}, {"micro_batch_size": 32}),
    ("reach beyond the last epoch", {**KNOWN, "warmup_epochs": 20.0, "cosine_epochs": 200.0},
     {"cosine_epochs": None}),
    ("dist to 74.5", {**KNOWN, "teacher": "a", "kd_loss": "kl", "cutmix_alpha": 1.0},
     {"kd_loss": "dist"}),
    ("ce on a strong recipe", {**KNOWN, "teacher": "a",
     "distill_pairs": ["layer4 -> layer4", "logits"],
     "kd_loss": ["l2", "ce"], "randaug_n": 2}, {"randaug_n": 0}),
    ("over the 8 images of a forward", {**KNOWN, "teacher": "a", "kd_loss": "dist",
     "micro_batch_size": 8}, {"kd_loss": "kl"}),
    ("a tenth or a hundredth", {**KNOWN, "lr": 0.5, "weights": "a.pt"}, {"lr": 0.04}),
    ("[0.5, 0.5, 0.5] where its weights", {**KNOWN, "model": "vit_tiny_patch16_224",
     "pretrained": True, "lr": 0.01}, {"mean": [0.5] * 3, "std": [0.5] * 3}),
    ("these start at random", {**KNOWN, "freeze": ["conv1"]}, {"pretrained": True}),
    ("these start at random", {**KNOWN, "head_only_epochs": 5}, {"weights": "a.pt", "lr": 0.01}),
]  # fmt: skip


@pytest.mark.parametrize("words, options, cure", WARNED)
def test_a_trap_is_named_with_its_evidence_and_gone_with_its_cure(words, options, cure):
    warned = [f for f in doctor.examine(Recipe(**options), **IMAGENET) if f.kind == "warning"]
    [finding] = [f for f in warned if words in f.text]
    assert finding.source and str(finding).startswith("warning: ")
    assert words not in said("warning", **{**options, **cure})


def test_every_rule_has_a_recipe_that_earns_it():
    assert len(doctor._EVIDENCE) <= len(WARNED)
    for rule, _ in doctor._EVIDENCE:
        earned = [rule(Recipe(**options), 1252, 1252 * options.get("epochs", 8), 1000)
                  for _, options, _ in WARNED]  # fmt: skip
        assert any(earned), rule.__name__


def test_a_run_that_goes_on_starts_neither_at_random_nor_from_other_weights():
    onward = {**KNOWN, "resume_from": "runs/before", "freeze": ["conv1"], "lr": 0.5}
    assert said("warning", **onward) == ""


def test_a_distillation_of_modules_alone_is_not_warned_of_its_logits():
    modules = {"distill_pairs": ["layer4 -> layer4"], "kd_loss": "l2", "cutmix_alpha": 1.0}
    assert said("warning", **KNOWN, teacher="a", **modules) == ""


def test_a_fine_tuning_is_not_measured_by_the_rates_of_training_from_scratch():
    assert said("warning", **{**KNOWN, "lr": 0.001, "warmup_epochs": 0.0, "weights": "a.pt"}) == ""


def test_the_shipped_small_recipes_are_not_warned_of_their_own_rates():
    for path in (ROOT / "params").glob("*_strikes.yaml"):
        found = doctor.examine(Recipe.from_yaml(path), images=50_000, classes=10)
        assert not [f for f in found if "LAMB with" in f.text], path


def test_below_64_images_a_step_neither_rule_of_lr_is_held_against_a_recipe():
    """There the linear rule asks for less than what works, from scratch and from weights."""
    size = {"images": 2028, "classes": 26}
    path = ROOT / "params" / "letters_downstream.yaml"
    assert "a start from scratch takes" not in said(
        "warning", size, **Recipe.from_yaml(path).non_default()
    )
    few = {**KNOWN, "batch_size": 32, "lr": 0.5}
    assert "lr 0.5" not in said("warning", **few) + said("warning", **few, weights="a.pt")


def test_a_model_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(models.ModelError, match="resnet18"):
        doctor.examine(Recipe(model="resnet18q"), images=1000, classes=10)


def test_a_batch_larger_than_the_list_is_refused_in_words():
    with pytest.raises(training.TrainingError, match="above 20 images"):
        doctor.examine(Recipe(drop_last=True), images=20, classes=10)


# ---- teachers, judged by running them


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
    return recipe, content, doctor.teachers(recipe, content, max_images=100, progress=False)


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


def test_a_teachers_figures_on_the_validation_list_are_those_of_a_plain_loop(judged, slow):
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
def test_a_teachers_figures_on_the_crops_are_those_of_the_images_that_train(judged, taught):
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


def test_binary_cross_entropy_shows_in_the_mean_logit_of_a_teacher(judged, taught, tmp_path):
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
    bare = doctor.teachers(recipe, content, max_images=32, progress=False)
    assert bare.bce.tolist() == [False, True]
    assert bare.own_top1.isna().all() and bare.smoothing.isna().all()
    np.testing.assert_allclose(bare.val_top1, report.val_top1)
    assert "in its own run" not in str(doctor.about_teachers(recipe, bare)[0])


def nll(log_t: float, z: np.ndarray, y: np.ndarray) -> float:
    scaled = z / math.exp(log_t)
    return float(np.mean(scipy.special.logsumexp(scaled, axis=1) - scaled[np.arange(len(y)), y]))


def optimal(z: np.ndarray, y: np.ndarray) -> float:
    found = scipy.optimize.minimize_scalar(
        nll, bounds=(math.log(0.05), math.log(20)), args=(z, y), method="bounded"
    )
    return math.exp(found.x)


def test_the_best_temperature_is_scipys(judged, slow):
    _, content, report = judged
    label = content.val.label.to_numpy()
    for found, z in zip(report.temperature, slow.values(), strict=True):
        assert found == pytest.approx(optimal(z, label), rel=0.025)


@pytest.mark.parametrize("times", [0.3, 1.0, 2.0, 6.0])
def test_logits_that_are_a_multiple_of_honest_ones_have_that_temperature(times):
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(4000, 7)) * 2
    chosen = [rng.choice(7, p=scipy.special.softmax(row)) for row in honest]
    labels = np.array(chosen)
    found = doctor.best_temperature(honest * times, labels)
    assert found == pytest.approx(times, rel=0.1)
    assert found == pytest.approx(optimal(honest * times, labels), rel=0.021)


def test_answers_that_are_all_right_or_no_better_than_guessing_end_at_the_bounds():
    sure = np.eye(5)
    assert doctor.best_temperature(sure, np.arange(5)) == pytest.approx(0.05)
    assert doctor.best_temperature(sure, np.arange(5)[::-1].copy()) == pytest.approx(20)


def test_the_report_leaves_student_teachers_and_every_stream_of_chance_alone(taught, monkeypatch):
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
    doctor.teachers(recipe, content, max_images=32, progress=False)
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


def test_a_step_is_shared_out_by_the_seconds_that_each_takes(taught, monkeypatch):
    """By a clock that only the forwards move: three seconds, one, and four for the student."""
    clock = [0.0]
    monkeypatch.setattr(models.time, "perf_counter", lambda: clock[0])
    recipe = student(taught)
    kd = distillation.Distillation(
        recipe, training.create_model(recipe, 10), [str(i) for i in range(10)], torch.device("cpu")
    )
    for network, seconds in zip((*(t.model for t in kd.teachers), kd.student), (3, 1, 4),
                                strict=True):  # fmt: skip
        network.register_forward_hook(lambda *_, s=seconds: clock.__setitem__(0, clock[0] + s))
    images, labels = torch.zeros(2, 3, 32, 32), torch.tensor([1, 2])
    assert doctor._step_shares(recipe, kd, images, labels, False) == pytest.approx([3 / 8, 1 / 8])


def test_the_measured_shares_leave_the_student_its_own(judged):
    shares = judged[2].step_share
    assert (shares > 0).all() and shares.sum() < 100


def test_a_start_from_the_teachers_own_weights_agrees_with_it_and_gains_nothing(taught):
    recipe = student({"ce": taught["ce"]}, weights=taught["ce"])
    content = data.load_dataset(recipe)
    report = doctor.teachers(recipe, content, max_images=32, progress=False)
    assert report.agreement.tolist() == [100.0]
    assert report.start_top1.tolist() == report.val_top1.tolist()
    told = "\n".join(map(str, doctor.about_teachers(recipe, report)))
    assert f"start has top-1 {report.val_top1[0]:.2f} % already, the teacher" in told


def test_a_student_that_resumes_is_judged_where_it_stands(taught):
    recipe = student({"ce": taught["ce"]}, resume_from=taught["ce"])
    content = data.load_dataset(recipe)
    report = doctor.teachers(recipe, content, max_images=32, progress=False)
    assert report.agreement.tolist() == [100.0]


def test_a_part_of_the_validation_list_is_taken_evenly(judged, slow):
    recipe, content, whole = judged
    report = doctor.teachers(recipe, content, max_images=32, max_val_images=100, progress=False)
    assert report.val_images.tolist() == [100, 100]
    for row, source in zip(report.itertuples(), slow, strict=True):
        right = slow[source].argmax(1)[::5] == content.val.label[::5]
        assert row.val_top1 == pytest.approx(100 * right.mean())


def test_a_teacher_is_told_in_a_sentence_with_its_figures(judged):
    recipe, _, report = judged
    facts = [f.text for f in doctor.about_teachers(recipe, report) if f.kind == "fact"]
    assert len(facts) == 2
    for text, row in zip(facts, report.itertuples(), strict=True):
        assert text.startswith(f"teacher {row.teacher}, test_resnet, 0.4 million parameters: ")
        assert f"top-1 {row.val_top1:.2f} % of 500 validation images" in text
        assert f"({row.own_top1:.2f} % in its own run)" in text
        assert f"{row.crops_top1:.1f} % of 128 training crops and mixes" in text
        assert f"entropy is {row.entropy:.2f} nats" in text
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
    ("temperature 8 would do to it what 4", {"bce": True, "temperature": 2.0}, {}, {"bce": False}),
    ("honest temperature is 1.10", {"bce": True}, {}, {"kd_loss": "kl_standardized_logits"}),
    ("mean logit -1.53 standard", {"bce": True, "offset": -1.53}, {},
     {"distill_pairs": "layer4 -> layer4", "kd_loss": "l2"}),
    ("these images do not say; take kl_standardized_logits", {"bce": True, "temperature": 0.05}, {},
     {"kd_loss": "kl_standardized_logits"}),
    ("these images do not say", {"bce": True, "temperature": 20.0}, {}, {"bce": False}),
    ("up_kl cuts every logit below 0", {"bce": True}, {"kd_loss": "up_kl", "temperature": 1.0},
     {"kd_loss": "kl_standardized_logits"}),
    ("its run is stopped", {"state": "stopped"}, {}, {"state": "finished"}),
    ("label smoothing 0.1", {"smoothing": 0.1}, {}, {"smoothing": 0.0}),
    ("label smoothing 0.1", {"smoothing": 0.1}, {"kd_loss": "dkd"}, {"kd_loss": "dist"}),
    ("start has top-1 79.00 % already, the teacher 79.00", {"start_top1": 79.0}, {},
     {"start_top1": 78.9}),
    ("knows 47.0 % of the student's crops", {"crops_top1": 47.0}, {}, {"crops_top1": 47.5}),
    ("loses 5.5 points", {"own_top1": 84.5}, {}, {"own_top1": 84.0}),
]  # fmt: skip


def about(row: dict, options: dict) -> list[doctor.Finding]:
    found = doctor.about_teachers(Recipe(**options), pd.DataFrame([{**GOOD, **row}]))
    return [finding for finding in found if finding.kind == "warning"]


@pytest.mark.parametrize(
    "options", [KL, {"teacher": "a"}, {**KL, "kd_loss": "kl_standardized_logits"}]
)
def test_a_sound_teacher_is_warned_of_nothing(options):
    assert about({}, options) == []
    assert about({"own_top1": math.nan, "smoothing": None}, options) == []


@pytest.mark.parametrize("words, row, options, cure", OF_TEACHERS)
def test_a_teacher_of_no_use_is_named_with_the_evidence_and_the_cure_helps(
    words, row, options, cure
):
    [finding] = about(row, {**KL, **options})
    assert words in finding.text and finding.text.startswith("teacher runs/t: ")
    assert finding.source and str(finding).endswith(f"[{finding.source}]")
    tempered = {} if cure.get("kd_loss") != "l2" else {"temperature": 1.0}
    cured = {k: v for k, v in cure.items() if k in GOOD and k not in Recipe.model_fields}
    others = {k: v for k, v in cure.items() if k not in cured}
    assert about({**row, **cured}, {**KL, **options, **others, **tempered}) == []


def test_every_rule_about_teachers_has_a_row_that_earns_it():
    for rule, _ in doctor._TEACHER_EVIDENCE:
        assert any(
            rule(Recipe(**{**KL, **options}), SimpleNamespace(**{**GOOD, **row}))
            for _, row, options, _ in OF_TEACHERS
        ), rule.__name__


# ---- what augmentation leaves of an image


@pytest.mark.parametrize("form, size", [("up", 32), ("up", 224), ("timm", 32)])
def test_an_image_is_lost_where_it_is_moved_further_than_its_side(form, size):
    """By the draws alone: one operation of magnitude 7 moves by 70 pixels, or by 45 % of 0.7."""
    options = {"randaug_n": 1, "randaug_m": 7.0, "randaug_std": 0.0, "randaug_variant": form}
    options |= {"image_size": size, "val_resize": size}
    recipe = Recipe(**options)
    transform = training.train_transform(recipe)
    drawn = [
        transform.sample_params(np.random.default_rng(i), size, size)["randaug"] for i in range(200)
    ]
    moved = [
        any(op.startswith("translate") and abs(value) >= 0.75 * size for op, value, *_ in ops)
        for ops in drawn
    ]
    assert doctor.lost_share(recipe) == np.mean(moved)
    told = said("warning", **options)
    assert ("covers 3/4 of their pixels" in told) == (form == "up" and size == 32)
    assert (np.mean(moved) > 0.03) == (form == "up" and size == 32)


def test_what_augmentation_leaves_can_be_asked_of_a_recipe_alone():
    up = Recipe(randaug_n=2, randaug_variant="up")
    assert "one colour covers 3/4" in doctor.nothing_left(up, draws=50)
    assert doctor.nothing_left(up.replace(randaug_variant="timm"), draws=50) == ""


def test_a_crop_of_one_pixel_leaves_one_colour_and_the_advice_fits():
    told = said("warning", crop_scale=[0.001, 0.002])
    assert "covers 3/4 of their pixels" in told and "randaug_variant" not in told


def test_without_data_the_doctor_measures_only_what_a_recipe_gives_reason_for():
    worth = doctor.worth_measuring
    assert not worth(Recipe()) and not worth(Recipe(randaug_n=2, randaug_variant="timm"))
    assert worth(Recipe(weights="runs/a-seed0")) and worth(
        Recipe(randaug_n=2, randaug_variant="up")
    )
    large = {"image_size": 224, "val_resize": 256}
    assert not worth(Recipe(randaug_n=2, randaug_variant="up", **large))


def test_an_average_longer_than_the_training_is_warned_of():
    told = said("warning", {"images": 164 * 32, "classes": 10}, epochs=1, batch_size=32,
                ema_decay=0.9999)  # fmt: skip
    assert "EMA with decay 0.9999 has a half-life of 6,931 steps of 164" in told
