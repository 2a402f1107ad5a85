"""A run folder of version 62fdd70, whose options and columns had other names, still opens.

tests/earlier_run is a distillation of two epochs by that version, without its weights.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from workbench import export, runs, training
from workbench.evaluation import comparison
from workbench.recipe import RENAMED, RENAMED_COLUMNS, Recipe, runtime_only

FOLDER = Path(__file__).parent / "earlier_run"


@pytest.fixture
def earlier(tmp_path: Path) -> runs.Run:
    """A copy with a checkpoint as that version wrote it."""
    run = runs.Run(shutil.copytree(FOLDER, tmp_path / "student-seed0"))
    model = training.create_model(Recipe(**run.recipe()), 10)
    sums = "loss_sum task_sum mimic_sum window_sum window_task window_mimic".split()
    counts = dict.fromkeys("correct images window_steps".split(), 0)
    progress = {"step": 10, "seconds": 1.0, "best": 10.0, **dict.fromkeys(sums, 0.0), **counts}
    state = {"model": model.state_dict(), "ema": model.state_dict(), "adapters": {}}
    state |= {"optimizer": {}, "progress": progress, "steps_per_epoch": 5}
    torch.save(state, run.file("last.pt"))
    return run


def test_the_folder_has_former_names():
    text = (FOLDER / "recipe.yaml").read_text()
    assert all(f"\n{name}: " in text for name in RENAMED)
    columns = pd.read_csv(FOLDER / "metrics.csv").columns
    assert set(RENAMED_COLUMNS) & set(columns) == {"train_mimic_loss"}


def test_its_recipe_has_the_present_names(earlier):
    recipe = Recipe(**earlier.recipe())
    assert recipe.non_default() == {
        "name": "student", "train_fraction": 0.1, "epochs": 2, "weight_decay": 0.0001,
        "decay_norm_and_bias": False, "warmup_epochs": 0.5, "warmup_start_factor": 0.1,
        "ema_decay": 0.9, "hflip": 0.1, "teacher": ["runs/teacher-seed0"],
        "distill_pairs": ["logits", "layer4 -> layer4"],
        "kd_loss": ["kl_standardized_logits", "l2_normalized"], "kd_weight": [1.0, 0.5],
        "temperature": 2.0, "workers": 0, "log_every": 2,
    }  # fmt: skip
    assert "train_kd_loss" in earlier.metrics() and "kd_loss" in earlier.steps()
    facts = earlier.environment()
    assert facts["train_val_duplicates"] == 0 and facts["empty_classes"] == []


def test_its_recipe_is_the_same_to_a_resume_and_to_unused_name(earlier):
    recipe = Recipe(**{**earlier.recipe(), "runs_dir": str(earlier.path.parent)})
    assert runs.unused_name(recipe) == recipe
    here = recipe.model_dump()
    assert all(here[k] == v for k, v in earlier.recipe().items() if k not in runtime_only)


def test_compare_reads_it(earlier):
    other = runs.Run(shutil.copytree(earlier.path, earlier.path.parent / "again-seed0"))
    text = other.file("recipe.yaml").read_text()
    other.file("recipe.yaml").write_text(text.replace("\nflip: 0.1 ", "\nflip: 0.2 "))
    found = comparison.compare([earlier.path, other.path])
    assert len(found.table) == 2 and "hflip 0.2 (0.1)" in found.table.differs.tolist()


def test_its_model_is_loaded_and_predicts(earlier, image_folder):
    model, kind, file = training.load_run_model(Recipe(**earlier.recipe()), earlier, 10)
    assert (kind, file) == ("ema", "last.pt") and not model.training
    out = earlier.path.parent / "predictions.csv"
    export.predict_to_file(export.open_source(earlier.path), [image_folder / "val"], out)
    assert len(pd.read_csv(out)) == 6


def test_a_run_of_that_version_resumes(tmp_path):
    """From a checkpoint with the former names of the sums of an epoch."""
    recipe = Recipe(
        train_fraction=0.1, epochs=2, workers=0, log_every=1, checkpoint_minutes=0.0,
        runs_dir=str(tmp_path),
    )  # fmt: skip
    whole = runs.Run(recipe.replace(name="whole").folder)
    list(training.fit(recipe.replace(name="whole"), whole))
    run = runs.Run(recipe.folder)
    for row in training.fit(recipe, run):
        if row["step"] == 3:
            break
    state = torch.load(run.file("last.pt"), weights_only=True)
    progress = state["progress"]
    for new, old in (("kd_sum", "mimic_sum"), ("window_kd", "window_mimic")):
        progress[old] = progress.pop(new)
    torch.save(state, run.file("last.pt"))
    text = run.file("recipe.yaml").read_text()
    for old, new in RENAMED.items():
        text = text.replace(f"\n{new}: ", f"\n{old}: ")
    run.file("recipe.yaml").write_text(text)
    facts = json.loads(run.file("environment.json").read_text())
    facts["in_both"] = facts.pop("train_val_duplicates")
    run.file("environment.json").write_text(json.dumps(facts))
    list(training.fit(recipe, run))
    assert run.file("metrics.csv").read_bytes() == whole.file("metrics.csv").read_bytes()
