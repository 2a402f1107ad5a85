"""train --smoke rehearses a recipe and leaves nothing behind."""

import tempfile

import pytest
from test_main import invoke

from workbench import ROOT, training
from workbench.recipe import Recipe
from workbench.smoke import smoke_test


@pytest.mark.parametrize(
    "name", ["digits_baseline", pytest.param("digits_strikes", marks=pytest.mark.slow)]
)
def test_a_smoke_test_trains_two_steps_exports_and_leaves_no_folder(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    params, runs_dir = ROOT / "params" / f"{name}.yaml", tmp_path / "runs"
    # Without workers: the names of their sockets would be too long in this temporary folder.
    done = invoke("train", params, "-p", f"runs_dir={runs_dir}", "-p", "workers=0", "--smoke")
    assert done.exit_code == 0, done.output
    assert "8 training and 16 validation images" in done.output
    assert "2 steps, losses" in done.output and "a package of" in done.output
    assert "the smoke test passed in" in done.output
    assert not runs_dir.exists() and list((tmp_path / "temporary").iterdir()) == []


def test_a_smoke_test_raises_what_the_training_would(image_folder, monkeypatch, tmp_path):
    recipe = Recipe(dataset="files", data_dir=str(image_folder), model="test_resnet",
                    weights="nowhere", runs_dir=str(tmp_path / "runs"))  # fmt: skip
    with pytest.raises(Exception, match="nowhere"):
        list(smoke_test(recipe))


def test_durations_and_what_writes_elsewhere_are_adapted(image_folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        training, "fit", lambda recipe, run, dataset: seen.append((recipe, dataset)) or 1 / 0
    )
    recipe = Recipe(dataset="files", data_dir=str(image_folder), epochs=90, schedule="multistep",
                    milestones=[30, 60], warmup_steps=500, cache=True, compile=True, batch_size=4,
                    micro_batch_size=2, repeated_aug=3, resume_from="x")  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        list(smoke_test(recipe))
    [(small, few)] = seen
    assert (len(few.train), len(few.val)) == (8, 6) and small.folder != recipe.folder
    assert few.classes == ["a", "b", "c"] and set(few.train.label) == {0, 1, 2}
    assert not (small.cache or small.compile or small.resume_from or small.warmup_steps)
    assert (small.epochs, small.schedule, small.micro_batch_size) == (1, "constant", 2)
