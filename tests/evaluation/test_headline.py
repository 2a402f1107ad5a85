"""The sentence on a run against statsmodels, scipy and counts of its predictions."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import IMAGES, run_folder
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from workbench import evaluation
from workbench.runs import Run


def correct(path) -> pd.Series:
    frame = pd.read_parquet(path / "predictions.parquet")
    return frame.class1 == frame.label


def predict(path, right: list[bool], **columns) -> None:
    """Replaces the predictions of a run folder: the label where `right`, else the next class."""
    label = np.arange(len(right)) % 4
    class1 = (label + ~np.array(right)) % 4
    frame = pd.DataFrame({"weights": "raw", "file": [str(i) for i in range(len(right))], "list": 0})
    frame = frame.assign(row=range(len(right)), label=label, class1=class1, class2=0, p1=0.9)
    frame.assign(**columns).to_parquet(path / "predictions.parquet")


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?(?:e-\d+)?", text.replace(",", ""))]


def test_top1_has_wilsons_interval_and_the_number_of_images(tmp_path):
    path = run_folder(tmp_path, "a", top1=0.97, n=1200, epochs=2)
    sentence = evaluation.headline(Run(path))
    low, high = proportion_confint(correct(path).sum(), 1200, method="wilson")
    top1 = f"Top-1 **{100 * correct(path).mean():.1f} %**"
    interval = f"(95 % interval {100 * low:.1f} to {100 * high:.1f}, 1,200 images)"
    assert sentence.startswith(f"{top1} {interval}; best class ")
    assert sentence.endswith(").") and "seed" not in sentence


def test_best_and_worst_class_are_those_of_the_counts_and_ties_are_counted(tmp_path):
    path = run_folder(tmp_path, "a", epochs=2)
    right = [True] * 40
    for wrong in (1, 5, 2):  # ant 10 of 10, bee 8, cat 9, dog 10
        right[wrong] = False
    predict(path, right)
    words = "best class ant and 1 more (100.0 %), worst class bee (80.0 % of 10 images)"
    assert words in evaluation.headline(Run(path))
    predict(path, [True] * 3)  # no image of dog
    assert "class" not in evaluation.headline(Run(path))


@pytest.mark.parametrize("gained, judged", [(3, "not significant"), (20, "significant for these")])
def test_two_runs_are_compared_by_mcnemars_test(tmp_path, gained, judged):
    alone, distilled = (
        run_folder(tmp_path, name, epochs=2, lr=lr) for name, lr in (("alone", 0.1), ("b", 0.2))
    )
    rank = np.arange(IMAGES)
    predict(alone, list(rank >= gained + 30))
    predict(distilled, list((rank >= 30) & (rank < IMAGES - 2)))
    sentence = evaluation.headline(Run(distilled), Run(alone))
    p = mcnemar([[0, 2], [gained, 0]], exact=True).pvalue
    points = 100 * (gained - 2) / IMAGES
    text = sentence.partition("images); ")[2].rpartition("; ")[2]
    assert text.startswith(f"{points:.1f} points above alone-seed0 (95 % interval ")
    assert numbers(text)[-1] == pytest.approx(p, rel=0.4) and judged in text
    turned = evaluation.headline(Run(alone), Run(distilled)).rpartition("; ")[2]
    assert turned == text.replace("above alone", "below b")


def test_a_run_is_compared_with_the_other_seeds_of_its_recipe(tmp_path):
    first = run_folder(tmp_path, "a", 0, top1=0.8, epochs=2)
    run_folder(tmp_path, "other", 1, top1=0.9, epochs=2, lr=0.3)
    second = run_folder(tmp_path, "a", 1, top1=0.82, epochs=2)
    points = 100 * (correct(second).mean() - correct(first).mean())
    sentence = evaluation.headline(Run(second))
    assert (
        f"{points:.1f} points above seed 0 (95 % interval" in sentence and "other" not in sentence
    )

    third = run_folder(tmp_path, "a", 2, top1=0.81, epochs=2)
    worse = run_folder(tmp_path, "a", 3, top1=0.5, epochs=2)
    mean = np.mean([correct(path).mean() for path in (first, second, third)])
    sentence = evaluation.headline(Run(worse))
    points = 100 * (mean - correct(worse).mean())
    assert f"{points:.1f} points below the mean of seeds 0, 1, 2 (95 % interval" in sentence
    assert sentence.endswith("more than seeds differ.")
    shutil.rmtree(worse)
    assert evaluation.headline(Run(third)).endswith("within what seeds differ.")


def test_cautions_of_a_comparison_are_said_and_a_damaged_neighbour_is_left_out(tmp_path):
    long = Run(run_folder(tmp_path, "long", epochs=9))
    leak = run_folder(tmp_path, "leak", epochs=2)
    facts = {**Run(leak).environment(), "trained_on_validation": ["weights saw 3 images"]}
    (leak / "environment.json").write_text(json.dumps(facts))
    sentence = evaluation.headline(Run(leak), long)
    assert "epochs 9" in sentence and "weights saw 3 images" in sentence
    for seed in (1, 2):
        run_folder(tmp_path, "long", seed, epochs=9)
    (tmp_path / "long-seed1" / "predictions.parquet").write_bytes(b"damaged")
    assert "above seed 2 (" in (text := evaluation.headline(long)) or "below seed 2 (" in text


def test_runs_of_other_images_or_that_have_not_finished_are_no_other_seeds(tmp_path):
    path = run_folder(tmp_path, "a", 0, epochs=2)
    alone = evaluation.headline(Run(path))
    for seed, (file, fact) in enumerate(
        [("environment.json", {"val_data": "x"}), ("status.json", {"state": "running"})], 1
    ):
        other = run_folder(tmp_path, "a", seed, epochs=2)
        (other / file).write_text(json.dumps({**json.loads((other / file).read_text()), **fact}))
    assert evaluation.headline(Run(path)) == alone


def test_a_stopped_run_says_after_how_many_epochs_and_is_not_compared(tmp_path):
    path, other = (run_folder(tmp_path, "a", seed, epochs=9) for seed in (0, 1))
    assert "after 2 of 9 epochs (95 %" in evaluation.headline(Run(other))
    (path / "status.json").write_text(json.dumps({"state": "stopped"}))
    sentence = evaluation.headline(Run(path), Run(other))
    assert "after 2 of 9 epochs" in sentence and "seed" not in sentence


@pytest.mark.parametrize("state", ["running", "failed", "stopped"])
def test_before_a_result_the_sentence_says_so(tmp_path, state):
    run = Run(run_folder(tmp_path, "a", epochs=2))
    with run.writing():  # of a live process
        run.set_status(state, step=3, steps=9)
        if state == "stopped":
            run.file("predictions.parquet").unlink()
        assert evaluation.headline(run) == f"No result yet: a-seed0 is {state} at step 3 of 9."
    assert evaluation.headline(Run(tmp_path / "none")) == "No result yet: none is new."


def test_ema_weights_are_named_and_count_unless_clearly_worse(tmp_path):
    path = run_folder(tmp_path, "a", epochs=2, ema_decay=0.9)
    raw = pd.read_parquet(path / "predictions.parquet")
    ema = raw.assign(weights="ema", class1=raw.label)
    pd.concat([raw, ema]).to_parquet(path / "predictions.parquet")
    metrics = pd.DataFrame({"epoch": [2], "step": [4], "top1": [80.0], "val_images": [IMAGES]})
    metrics.assign(ema_top1=100.0).to_csv(path / "metrics.csv", index=False)
    assert "**100.0 %** (95 % interval 99.0 to 100.0, 400 images, EMA weights)" in (
        evaluation.headline(Run(path))
    )
    metrics.assign(ema_top1=20.0).to_csv(path / "metrics.csv", index=False)
    sentence = evaluation.headline(Run(path))
    assert f"**{100 * correct(path)[:IMAGES].mean():.1f} %**" in sentence and "EMA" not in sentence
