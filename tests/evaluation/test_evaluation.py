"""The predictions table and its numbers against torch and scikit-learn."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from torch import nn

from workbench import data, evaluation
from workbench.augmentation import EvalTransform
from workbench.data import Batch
from workbench.evaluation import inference
from workbench.recipe import Recipe
from workbench.ui import plots

CPU = torch.device("cpu")


class Recorded(nn.Module):
    """A model whose logits for image i are row i of a table; an image holds its own number."""

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
    parts = rows.split(size)
    return [
        Batch(p[:, None, None, None].expand(-1, 3, 2, 2), labels[p], p, p, 0, True, len(p), [])
        for p in parts
    ]


def predicted(logits: torch.Tensor, labels: torch.Tensor, **options):
    return inference.predict(Recorded(logits), batches(labels, **options), torch.Tensor.float, CPU)


@pytest.fixture(params=[2, 3, 5, 12], ids="{} classes".format)
def logits_labels(request):
    generator = torch.Generator().manual_seed(request.param)
    logits = torch.randn(100, request.param, generator=generator) * 2
    return logits, torch.randint(request.param, (100,), generator=generator)


def test_ranks_and_probabilities_are_torchs_topk(logits_labels):
    logits, labels = logits_labels
    frame = predicted(logits, labels)
    k = min(5, logits.shape[1])
    best = torch.softmax(logits.double(), 1).topk(k)
    ranks = [f"class{i + 1}" for i in range(k)]
    np.testing.assert_array_equal(frame[ranks], best.indices)
    np.testing.assert_allclose(frame[[f"p{i + 1}" for i in range(k)]], best.values, rtol=1e-5)
    assert f"class{k + 1}" not in frame and f"p{k + 1}" not in frame
    np.testing.assert_array_equal(frame.label, labels)
    chosen = torch.softmax(logits.double(), 1)[torch.arange(100), labels]
    np.testing.assert_allclose(frame.p_label, chosen, rtol=1e-5)


def test_the_summary_is_scikit_learns(logits_labels):
    logits, labels = logits_labels
    summary = evaluation.summary(predicted(logits, labels))
    scores, classes = torch.softmax(logits.double(), 1).numpy(), list(range(logits.shape[1]))
    if len(classes) > 2:
        for k in (1, 5):
            if k < len(classes):
                wanted = 100 * top_k_accuracy_score(labels, scores, k=k, labels=classes)
                assert summary[f"top{k}"] == pytest.approx(wanted)
    if len(classes) <= 5:
        assert summary["top5"] == 100
    assert summary["top1"] == pytest.approx(
        100 * (scores.argmax(1) == labels.numpy()).mean(), abs=1e-9
    )
    assert summary["val_loss"] == pytest.approx(log_loss(labels, scores, labels=classes), rel=1e-5)
    assert summary["val_images"] == 100


def test_the_loss_is_torchs_cross_entropy_without_smoothing(logits_labels):
    logits, labels = logits_labels
    wanted = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    np.testing.assert_allclose(predicted(logits, labels).loss, wanted, rtol=1e-5, atol=1e-6)


def test_the_confusion_is_scikit_learns(logits_labels):
    logits, labels = logits_labels
    classes = [f"class {i}" for i in range(logits.shape[1])]
    table = evaluation.confusion(predicted(logits, labels), classes)
    wanted = confusion_matrix(labels, logits.argmax(1), labels=range(len(classes)))
    np.testing.assert_array_equal(table, wanted)
    assert list(table.index) == list(table.columns) == classes


def test_the_table_is_in_the_order_of_the_frame_however_the_batches_came(logits_labels):
    logits, labels = logits_labels
    straight, mixed = predicted(logits, labels), predicted(logits, labels, size=9, shuffle=True)
    assert straight.row.tolist() == list(range(100))
    for column in straight.columns:
        np.testing.assert_array_equal(mixed[column], straight[column])


def test_equal_logits_are_ranked_by_class_number():
    frame = predicted(torch.zeros(4, 9), torch.tensor([0, 1, 5, 8]))
    assert frame.filter(regex="^class").to_numpy().tolist() == [[0, 1, 2, 3, 4]] * 4
    assert evaluation.summary(frame) == {
        "top1": 25.0,
        "top5": 50.0,
        "val_loss": pytest.approx(np.log(9)),
        "val_images": 4,
    }


def test_extreme_logits_have_a_finite_loss():
    frame = predicted(torch.tensor([[1e4, -1e4], [-1e4, 1e4]]), torch.tensor([0, 0]))
    assert frame.loss.tolist() == [0.0, 20_000.0] and frame.p1.tolist() == [1.0, 1.0]


def test_per_class_counts_hits_and_the_most_frequent_mistake():
    label = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    answer = torch.tensor([0, 2, 2, 1, 1, 1, 0])
    table = evaluation.per_class(
        predicted(nn.functional.one_hot(answer, 4) * 9.0, label), ["a", "b", "c", "d"]
    )
    assert table["class"].tolist() == ["a", "b", "c", "d"]
    assert table.images.tolist() == [4, 2, 0, 1]
    np.testing.assert_array_equal(table.top1, [25.0, 100.0, np.nan, 0.0])
    assert table["mistaken for"].tolist() == ["c", "", "", "a"]


def guesses(classes: int, images: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, images)
    answer = np.where(rng.random(images) < 0.5, label, rng.integers(0, classes, images))
    return pd.DataFrame({"label": label, "class1": answer.astype(np.int32)})


@pytest.mark.parametrize("classes, images", [(3, 400), (5, 20), (40, 600)])
def test_per_class_follows_from_scikit_learns_confusion(classes, images):
    frame, names = guesses(classes, images), [f"class {i}" for i in range(classes)]
    table = evaluation.per_class(frame, names)
    counts = confusion_matrix(frame.label, frame.class1, labels=range(classes))
    assert table.images.tolist() == counts.sum(1).tolist()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(table.top1, 100 * np.diag(counts) / counts.sum(1))
    wrong = counts - np.diag(np.diag(counts))
    mistakes = [names[row.argmax()] if row.any() else "" for row in wrong]
    assert table["mistaken for"].tolist() == mistakes


def test_ten_thousand_classes_take_memory_for_the_images_and_classes_alone():
    frame, names = guesses(10_450, 20_000), [f"class {i}" for i in range(10_450)]
    tracemalloc.start()
    table = evaluation.per_class(frame, names)
    part = evaluation.confusion(frame, names, most=30)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # a table of all pairs has 874e6 bytes
    assert table.images.sum() == 20_000 and part.shape == (30, 30)
    of = np.array([names.index(name) for name in part.index])
    counts = confusion_matrix(frame.label, frame.class1, labels=of)
    np.testing.assert_array_equal(part, counts)


def test_the_classes_confused_most_are_the_ones_with_most_mistakes():
    frame, names = guesses(12, 900), [f"class {i}" for i in range(12)]
    whole, part = (evaluation.confusion(frame, names, most=most) for most in (None, 4))
    wrong = whole.to_numpy() - np.diag(np.diag(whole))
    most = sorted(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:4])
    np.testing.assert_array_equal(part, whole.iloc[most, most])
    one, two = (plots.confusion(table, most=4).axes[0] for table in (whole, part))
    assert one.get_title() == two.get_title() == "the 4 of 12 classes confused most"
    np.testing.assert_array_equal(one.images[0].get_array(), two.images[0].get_array())


def test_mistakes_are_the_wrong_answers_most_confident_first():
    logits = torch.tensor([[3.0, 0], [2, 0], [9, 0], [0, 9], [5, 0]])
    worst = evaluation.mistakes(predicted(logits, torch.tensor([1, 1, 0, 1, 1])), count=2)
    assert worst.row.tolist() == [4, 0]
    assert (worst.label != worst.class1).all()


def test_images_that_failed_have_no_row_and_are_named():
    labels = torch.tensor([0, 1, 0, 1])
    given = batches(labels, size=2)
    given[1] = given[1]._replace(
        images=given[1].images[:1],
        labels=labels[2:3],
        indices=torch.tensor([2]),
        failures=[(3, "truncated", "12 bytes")],
    )
    frame = inference.predict(Recorded(torch.eye(4)), given, torch.Tensor.float, CPU)
    assert frame.row.tolist() == [0, 1, 2]
    assert frame.attrs["failures"] == [(3, "truncated", "12 bytes")]
    empty = [b._replace(images=b.images[:0], indices=b.indices[:0]) for b in given]
    with pytest.raises(ValueError, match="no image of the validation list"):
        inference.predict(Recorded(torch.eye(4)), empty, torch.Tensor.float, CPU)


@pytest.mark.parametrize("training", [True, False])
def test_predicting_leaves_the_model_as_it_was_and_counts_its_progress(training):
    model, seen = Recorded(torch.eye(8)).train(training), []
    inference.predict(
        model, batches(torch.arange(8), size=3), torch.Tensor.float, CPU, progress=seen.append
    )
    assert model.training is training and seen == [3, 3, 2]
    assert model.logits.grad is None and torch.equal(model.logits, torch.eye(8))


def test_predictions_of_real_images_are_the_models_own_answers(image_folder):
    frame = data.load_dataset(Recipe(dataset="files", data_dir=str(image_folder))).val
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, len(CLASSES)))
    transform = EvalTransform(16, 20)
    table = inference.predict(
        model,
        data.eval_loader(frame, transform, batch_size=4),
        lambda images: images.float() / 255,
        CPU,
    )
    [whole] = data.eval_loader(frame, transform, batch_size=100)
    with torch.no_grad():
        answers = model(whole.images.float() / 255).argmax(1)
    assert table.class1.tolist() == answers.tolist()
    assert table.label.tolist() == frame.label.tolist()


def test_predicting_leaves_the_parts_in_the_modes_they_were_in():
    """A frozen norm must not wake because somebody validated."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.Flatten(), nn.Linear(12, 4))
    model.train()[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = batches(torch.arange(4), size=2)
    first, second = (inference.predict(model, given, torch.Tensor.float, CPU) for _ in range(2))
    assert [part.training for part in model] == [False, True, True, True] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert first.equals(second)  # without dropout


# ---- one model beside another


def answers(label: list[int], answer: list[int], files: str = "abcdefgh") -> pd.DataFrame:
    names = list(files[: len(label)])
    return pd.DataFrame({"file": names, "list": 0, "label": label, "class1": answer})


@pytest.fixture
def three() -> dict[str, pd.DataFrame]:
    """Three models on 200 images of five classes, the last of which has none."""
    rng = np.random.default_rng(0)
    label = rng.integers(4, size=200)
    wrong = lambda share: np.where(rng.random(200) < share, rng.integers(5, size=200), label)
    files = [f"{i}.png" for i in range(200)]
    return {
        name: pd.DataFrame({"file": files, "list": 0, "label": label, "class1": wrong(share)})
        for name, share in (("alone", 0.6), ("distilled", 0.4), ("teacher", 0.5))
    }


def test_models_side_by_side_are_counted_class_by_class(three):
    table = evaluation.side_by_side(three, list("abcde"))
    assert table.columns.tolist() == ["class", "images", "alone", "distilled", "teacher"]
    assert table["class"].tolist() == list("abcde")
    for number, row in enumerate(table.itertuples()):
        for name in three:
            pairs = list(zip(three[name].label, three[name].class1, strict=True))
            mine = [answer for label, answer in pairs if label == number]
            assert row.images == len(mine)
            share = 100 * sum(a == number for a in mine) / len(mine) if mine else float("nan")
            np.testing.assert_allclose(getattr(row, name), share)


@pytest.mark.parametrize("other", ["xb", "ba", "a"])
def test_predictions_of_other_images_do_not_stand_side_by_side(other):
    one = answers([0, 1], [0, 1], "ab")
    two = answers([0, 1][: len(other)], [0, 1][: len(other)], other)
    with pytest.raises(ValueError, match="of different images"):
        evaluation.side_by_side({"one": one, "two": two}, ["x", "y"])


def test_what_a_student_says_where_its_teacher_is_wrong_is_counted(three):
    ours, theirs = three["distilled"], three["teacher"]
    told = {"same": 0, "other": 0, "right": 0}
    for i in range(200):
        if theirs.class1[i] != theirs.label[i]:
            if ours.class1[i] == theirs.class1[i]:
                told["same"] += 1
            elif ours.class1[i] == ours.label[i]:
                told["right"] += 1
            else:
                told["other"] += 1
    wrong = sum(told.values())
    assert min(told.values()) > 0
    found = evaluation.shared_teacher_errors(ours, theirs)
    assert found == {"wrong": wrong} | {k: pytest.approx(100 * v / wrong) for k, v in told.items()}
    assert found["same"] + found["other"] + found["right"] == pytest.approx(100)


def test_a_teacher_is_its_own_best_pupil_and_one_without_a_mistake_lends_none(three):
    teacher = three["teacher"]
    assert evaluation.shared_teacher_errors(teacher, teacher)["same"] == 100
    found = evaluation.shared_teacher_errors(teacher, teacher.assign(class1=teacher.label))
    assert found["wrong"] == 0 and np.isnan([found[k] for k in ("same", "other", "right")]).all()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc to count open files in")
def test_an_evaluation_keeps_no_file_of_the_loaders_open(image_folder):
    """A batch from another process lies in shared memory: a file for as long as it lives."""
    content = data.load_dataset(
        Recipe(dataset="files", data_dir=str(image_folder), image_size=16, val_resize=16)
    )
    many = pd.concat([content.train] * 10, ignore_index=True)
    seen = []

    def count(_: int) -> None:
        seen.append(len(os.listdir("/proc/self/fd")))

    batches = data.eval_loader(many, EvalTransform(16, 16), batch_size=2, workers=1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    inference.predict(model, batches, lambda x: x.float(), torch.device("cpu"), count)
    assert len(seen) == 90 and max(seen[45:]) <= max(seen[:20]) + 5
