"""The table of predictions and its metrics against torch and scikit-learn."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from statsmodels.stats.proportion import proportion_confint
from torch import nn

from workbench import data, evaluation
from workbench.augmentation import EvalTransform
from workbench.data import Batch
from workbench.evaluation.inference import predict
from workbench.recipe import Recipe

CPU = torch.device("cpu")


class Table(nn.Module):
    """A model whose logits for image i are row i of a table; an image contains its number."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.logits[images[:, 0, 0, 0].long()]


def batches(labels: torch.Tensor, size: int = 7, shuffle: bool = False) -> list[Batch]:
    rows = torch.arange(len(labels))
    if shuffle:
        rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    return [
        Batch(p[:, None, None, None].expand(-1, 3, 2, 2), labels[p], p, p, 0, True, len(p), [])
        for p in rows.split(size)
    ]


def predictions(logits: torch.Tensor, labels: torch.Tensor, **options) -> pd.DataFrame:
    return predict(Table(logits), batches(labels, **options), torch.Tensor.float, CPU)


@pytest.fixture(params=[2, 5, 12], ids="{} classes".format)
def logits_labels(request):
    generator = torch.Generator().manual_seed(request.param)
    logits = torch.randn(100, request.param, generator=generator) * 2
    return logits, torch.randint(request.param, (100,), generator=generator)


# ---- predict


def test_ranks_probabilities_and_loss_are_torchs_in_the_order_of_the_list(logits_labels):
    logits, labels = logits_labels
    frame = predictions(logits, labels)
    k = min(5, logits.shape[1])
    best = torch.softmax(logits.double(), 1).topk(k)
    np.testing.assert_array_equal(frame[[f"class{i + 1}" for i in range(k)]], best.indices)
    np.testing.assert_allclose(frame[[f"p{i + 1}" for i in range(k)]], best.values, rtol=1e-5)
    assert f"class{k + 1}" not in frame and f"p{k + 1}" not in frame
    np.testing.assert_array_equal(frame.label, labels)
    p_label = torch.softmax(logits.double(), 1)[torch.arange(100), labels]
    np.testing.assert_allclose(frame.p_label, p_label, rtol=1e-5)
    loss = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    np.testing.assert_allclose(frame.loss, loss, rtol=1e-5, atol=1e-6)
    assert frame.row.tolist() == list(range(100))
    pd.testing.assert_frame_equal(frame, predictions(logits, labels, size=9, shuffle=True))


def test_equal_logits_are_ranked_by_class_number_and_extreme_ones_have_a_finite_loss():
    frame = predictions(torch.zeros(4, 9), torch.tensor([0, 1, 5, 8]))
    assert frame.filter(regex="^class").to_numpy().tolist() == [[0, 1, 2, 3, 4]] * 4
    frame = predictions(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]), torch.tensor([0, 0]))
    assert frame.loss.tolist() == [0.0, 20_000.0] and frame.p1.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("classes", [2, 7])
def test_an_image_with_logits_of_nan_counts_as_wrong_whatever_its_label(classes):
    labels = torch.arange(2 * classes) % classes
    logits = 9.0 * nn.functional.one_hot(labels, classes)
    logits[:classes, -1] = torch.nan  # one image of every class
    frame = predictions(logits, labels)
    assert (frame.class1 == frame.label).tolist() == [False] * classes + [True] * classes
    found = evaluation.summary(frame)
    assert found["top1"] == 50 and found["top5"] == (50 if classes > 5 else 100)
    assert np.isnan(found["val_loss"]) and frame.p1.isna().sum() == classes
    right = frame[classes:]
    assert evaluation.calibration_error(frame) == pytest.approx(
        evaluation.calibration_error(right) / 2
    )


def test_images_that_failed_have_no_row_and_are_listed():
    labels = torch.tensor([0, 1, 0, 1])
    first, second = batches(labels, size=2)
    failures = [(3, "truncated", "12 bytes")]
    second = second._replace(images=second.images[:1], labels=labels[2:3],
                             indices=torch.tensor([2]), failures=failures)  # fmt: skip
    frame = predict(Table(torch.eye(4)), [first, second], torch.Tensor.float, CPU)
    assert frame.row.tolist() == [0, 1, 2] and frame.attrs["failures"] == failures
    empty = [b._replace(images=b.images[:0], indices=b.indices[:0]) for b in (first, second)]
    with pytest.raises(ValueError, match="no image of the validation list"):
        predict(Table(torch.eye(4)), empty, torch.Tensor.float, CPU)


def test_predict_restores_modes_and_state_and_reports_progress():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.Flatten(), nn.Linear(12, 4))
    model.train()[0].eval()  # a frozen norm
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given, seen = batches(torch.arange(8) % 4, size=3), []
    first, second = (predict(model, given, torch.Tensor.float, CPU, seen.append) for _ in range(2))
    assert [part.training for part in model] == [False, True, True, True] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and seen == [3, 3, 2] * 2
    assert first.equals(second)  # without dropout


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to count open files in")
def test_predict_keeps_no_shared_memory_of_the_loader_open(image_folder):
    recipe = Recipe(dataset="files", data_dir=str(image_folder), image_size=16, val_resize=16)
    many = pd.concat([data.load_dataset(recipe).train] * 10, ignore_index=True)
    open_files = []
    count = lambda _: open_files.append(len(os.listdir("/proc/self/fd")))
    loader = data.eval_loader(many, EvalTransform(16, 16), batch_size=2, workers=1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    predict(model, loader, torch.Tensor.float, CPU, count)
    assert len(open_files) == 90 and max(open_files[45:]) <= max(open_files[:20]) + 5


# ---- metrics


def test_the_summary_is_that_of_scikit_learn(logits_labels):
    logits, labels = logits_labels
    scores, classes = torch.softmax(logits.double(), 1).numpy(), list(range(logits.shape[1]))
    top5 = 100.0
    if len(classes) > 5:
        top5 = 100 * top_k_accuracy_score(labels, scores, k=5, labels=classes)
    assert evaluation.summary(predictions(logits, labels)) == {
        "top1": pytest.approx(100 * (scores.argmax(1) == labels.numpy()).mean(), abs=1e-9),
        "top5": pytest.approx(top5),
        "val_loss": pytest.approx(log_loss(labels, scores, labels=classes), rel=1e-5),
        "val_images": 100,
    }


def test_mistakes_are_sorted_by_confidence():
    logits = torch.tensor([[3.0, 0], [2, 0], [9, 0], [0, 9], [5, 0]])
    worst = evaluation.mistakes(predictions(logits, torch.tensor([1, 1, 0, 1, 1])), count=2)
    assert worst.row.tolist() == [4, 0] and (worst.label != worst.class1).all()


def guesses(classes: int, images: int) -> tuple[pd.DataFrame, list[str]]:
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, images)
    class1 = np.where(rng.random(images) < 0.5, label, rng.integers(0, classes, images))
    frame = pd.DataFrame({"label": label, "class1": class1.astype(np.int32)})
    return frame, [f"class {i}" for i in range(classes)]


@pytest.mark.parametrize("classes, images", [(3, 400), (40, 60)])
def test_confusion_and_classes_are_those_of_scikit_learn(classes, images):
    """With 60 images some classes have none: their top-1 is nan."""
    frame, names = guesses(classes, images)
    counts = confusion_matrix(frame.label, frame.class1, labels=range(classes))
    confusion = evaluation.confusion(frame, names)
    np.testing.assert_array_equal(confusion, counts)
    assert list(confusion.index) == list(confusion.columns) == names
    table = evaluation.per_class(frame, names)
    assert table["class"].tolist() == names and table.images.tolist() == counts.sum(1).tolist()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(table.top1, 100 * np.diag(counts) / counts.sum(1))
    wrong = counts - np.diag(np.diag(counts))
    mistakes = [names[row.argmax()] if row.any() else "" for row in wrong]
    assert table["mistaken for"].tolist() == mistakes
    most = sorted(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:4])
    part = evaluation.confusion(frame, names, most=4)
    np.testing.assert_array_equal(part, counts[np.ix_(most, most)])
    assert part.attrs == {"classes": classes, "images": counts.sum(1)[most].tolist()}


def test_ten_thousand_classes_need_no_table_of_all_pairs():
    frame, names = guesses(10_450, 20_000)
    tracemalloc.start()
    table = evaluation.per_class(frame, names)
    part = evaluation.confusion(frame, names, most=30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # a table of all pairs has 874e6 bytes
    assert table.images.sum() == 20_000 and part.shape == (30, 30)
    kept = [names.index(name) for name in part.index]
    np.testing.assert_array_equal(part, confusion_matrix(frame.label, frame.class1, labels=kept))


def test_reliability_is_that_of_scikit_learn_and_the_calibration_error_a_loop_over_bins():
    rng, total = np.random.default_rng(0), 0.0
    p1, label = rng.uniform(0.26, 1, 3000).astype(np.float32), rng.integers(0, 4, 3000)
    class1 = np.where(rng.random(3000) < p1**2, label, (label + 1) % 4)
    frame = pd.DataFrame({"p1": p1, "label": label, "class1": class1})
    top1, confidence = calibration_curve(class1 == label, p1, n_bins=15)
    table = evaluation.reliability(frame)
    assert table.top1.to_numpy() == pytest.approx(top1)
    assert table.confidence.to_numpy() == pytest.approx(confidence)
    assert table.images.sum() == 3000
    for i in range(15):
        inside = frame[(p1 > i / 15) & (p1 <= (i + 1) / 15)]
        if len(inside):
            gap = abs((inside.class1 == inside.label).mean() - inside.p1.mean())
            total += len(inside) / 3000 * gap
    assert evaluation.calibration_error(frame) == pytest.approx(total, abs=1e-6)


# ---- several models


def test_models_side_by_side_are_counted_class_by_class():
    (one, names), (two, _) = guesses(5, 60), guesses(5, 60)
    two["class1"] = np.roll(one.class1, 1)
    models = {
        name: frame.assign(list=0, file=[f"{i}.png" for i in range(60)])
        for name, frame in (("one", one), ("two", two))
    }
    table = evaluation.side_by_side(models, names)
    assert table.columns.tolist() == ["class", "images", "one", "two"]
    for name, frame in models.items():
        expected = 100 * (frame.class1 == frame.label).groupby(frame.label).mean()
        np.testing.assert_allclose(table[name], expected.reindex(range(5)))
    with pytest.raises(ValueError, match="of different images"):
        evaluation.side_by_side(models | {"two": models["two"][::-1]}, names)


def test_shared_teacher_errors_are_counted():
    teacher = pd.DataFrame({"label": [0, 0, 0, 0, 0], "class1": [0, 1, 1, 1, 2]})
    student = teacher.assign(class1=[1, 1, 1, 2, 0])
    shares = {"same": 50, "other": 25, "correct": 25}
    assert evaluation.shared_teacher_errors(student, teacher) == {"wrong": 4} | shares
    errors = evaluation.shared_teacher_errors(teacher, teacher.assign(class1=teacher.label))
    assert errors.pop("wrong") == 0 and np.isnan([*errors.values()]).all()


def test_top1_by_the_values_of_a_column_has_the_interval_of_statsmodels():
    camera = np.array(["left"] * 30 + ["right"] * 10 + [None] * 2, object)
    label, predicted = np.zeros(42, int), np.repeat([0, 1, 0, 1], [24, 6, 10, 2])
    frame = pd.DataFrame({"label": label, "class1": predicted, "camera": camera})
    table = evaluation.by_column(frame, "camera")
    assert table.images.tolist() == [30, 10, 2] and table.top1.tolist() == [80.0, 100.0, 0.0]
    for row, correct in zip(table.itertuples(), (24, 10, 0), strict=True):
        expected = proportion_confint(correct, row.images, method="wilson")
        assert (row.low / 100, row.high / 100) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="no column 'site'; these predictions have .*'camera'"):
        evaluation.by_column(frame, "site")
