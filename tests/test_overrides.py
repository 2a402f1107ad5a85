"""Overrides: what depended on the former value goes back to its default, and a note says so."""

import copy
import pickle

import pytest
from test_recipe import TAGGED, notebook, written

from workbench import ROOT
from workbench.recipe import Recipe, RecipeError, inactive_options

RANDAUG = "randaug_n: 2\nrandaug_m: 9.0\nrandaug_variant: timm\n"
STEPPED = "epochs: 90\nschedule: multistep\nmilestones: [30, 60, 80]\ngamma: 0.2\n"
KD = "teacher: [a, b]\nteacher_weight: [1.0, 2.0]\nkd_loss: kl\ntemperature: 4.0\n"
PAIRS = "teacher: a\ndistill_pairs: [logits, layer4 -> layer4]\nkd_loss: [kl, l2]\n"


@pytest.mark.parametrize(
    "file, override, changed",
    [
        (RANDAUG, {"randaug_n": "0"}, {"randaug_m": 7.0, "randaug_variant": "up"}),
        (STEPPED, {"schedule": "cosine"}, {"milestones": [], "gamma": 0.1}),
        (STEPPED + "warmup_epochs: 5\nwarmup_start_factor: 0.1\n", {"schedule": "one_cycle"},
         {"milestones": [], "gamma": 0.1, "warmup_epochs": 0.0, "warmup_start_factor": 0.0}),
        ("momentum: 0.8\nnesterov: true\n", {"optimizer": "adamw"},
         {"momentum": 0.9, "nesterov": False}),
        ("nesterov: true\n", {"momentum": 0}, {"nesterov": False}),
        (KD, {"teacher": "[]"},
         {"teacher_weight": [1.0], "kd_loss": ["dist"], "temperature": 1.0}),
        (KD, {"teacher": "c"}, {"teacher_weight": [1.0]}),
        ("image_size: 224\nval_resize: 256\n", {"image_size": 112}, {"val_resize": 128}),
        ("image_size: 32\nval_resize: 40\n", {"image_size": 64}, {"val_resize": 80}),
        (STEPPED, {"epochs": 180}, {"milestones": [60, 120, 160]}),
        ("warmup_steps: 100\n", {"epochs": 16}, {}),
        (KD, {"teacher": "[c, d]"}, {}),
        (PAIRS, {"distill_pairs": "logits"}, {"kd_loss": ["dist"]}),
        ("weights: x\nallow_partial_weights: true\n", {"pretrained": "true"},
         {"weights": "", "allow_partial_weights": False}),
        ("pretrained: true\n", {"weights": "x"}, {"pretrained": False}),
        ("warmup_epochs: 2\n", {"warmup_steps": 9}, {"warmup_epochs": 0.0}),
        ("dataset: files\nval_list: a\nval_root: b\n", {"val_fraction": 0.2},
         {"val_list": [], "val_root": ["val"]}),
        ("micro_batch_size: 16\n", {"batch_size": 8}, {"micro_batch_size": None}),
        # durations keep their share of the training where they do not fit
        ("epochs: 100\nwarmup_epochs: 5\n", {"epochs": 4}, {"warmup_epochs": 0.2}),
        ("epochs: 100\nwarmup_epochs: 5\n", {"epochs": 6}, {}),
        ("epochs: 100\nwarmup_steps: 500\n", {"epochs": 10}, {"warmup_steps": 50}),
        ("epochs: 10\nhead_only_epochs: 5\n", {"epochs": 3}, {"head_only_epochs": 1}),
        ("epochs: 10\neval_every: 5\n", {"epochs": 3}, {"eval_every": 3}),
        ("epochs: 300\ncosine_epochs: 300\n", {"epochs": 30}, {"cosine_epochs": 30.0}),
        ("epochs: 10\nteacher: a\nkd_warmup_epochs: 5\n", {"epochs": 4}, {"kd_warmup_epochs": 2.0}),
        (STEPPED, {"epochs": 9}, {"milestones": [3, 6, 8]}),
        (STEPPED, {"epochs": 1}, {"schedule": "constant", "milestones": [], "gamma": 0.1}),
        ("epochs: 90\nschedule: step\nlr_step_epochs: 30\n", {"epochs": 9}, {"lr_step_epochs": 3}),
        ("epochs: 90\nschedule: step\nlr_step_epochs: 30\n", {"epochs": 1},
         {"schedule": "constant", "lr_step_epochs": None}),
    ],
)  # fmt: skip
def test_an_override_resets_or_scales_what_depended_on_the_former_value(
    tmp_path, file, override, changed
):
    before = Recipe.from_yaml(path := written(tmp_path, file))
    recipe = Recipe.from_yaml(path, **override)
    others = {k: v for k, v in recipe.model_dump().items() if getattr(before, k) != v}
    assert {k: v for k, v in others.items() if k not in override} == changed
    [key] = override
    named = [note for note in recipe.notes if note.startswith(f"{key}={getattr(recipe, key)!r} ")]
    assert list(recipe.notes) == named and len(named) == bool(changed)
    assert all(f"{option} " in named[0] for option in changed)
    assert before.replace(**override) == recipe
    assert before.replace(**override).notes == recipe.notes


@pytest.mark.parametrize(
    "file, overrides, problem",
    [
        ("randaug_m: 9.0\n", {}, "randaug_m: 9.0 has no effect"),  # in a file
        ("randaug_m: 9.0\n", {"lr": 0.5}, "randaug_m: 9.0 has no effect"),
        (RANDAUG, {"randaug_n": 0, "randaug_m": 5}, "randaug_m: 5.0 has no effect"),
        ("", {"randaug_m": 5}, "randaug_m: 5.0 has no effect"),
        (STEPPED, {"epochs": 9, "milestones": "[30]"}, "below epochs 9"),
        (STEPPED, {"epochs": 1, "schedule": "multistep"}, "below epochs 1"),
        ("", {"epochs": 1, "warmup_epochs": 1}, "no training at lr"),
        ("weights: x\n", {"pretrained": True, "weights": "y"}, "asks for other weights"),
        ("eval_every: 10\nepochs: 8\n", {"lr": 0.5}, "eval_every: 10 has no effect"),
        (
            "image_size: 32\nval_resize: 40\n",
            {"image_size": 64, "val_resize": 40},
            "val_resize: 40 is smaller",
        ),
    ],
)
def test_contradictions_in_a_file_and_between_overrides_are_errors(
    tmp_path, file, overrides, problem
):
    with pytest.raises(RecipeError, match=problem) as caught:
        Recipe.from_yaml(written(tmp_path, file), **overrides)
    assert len(caught.value.problems) == 1


def test_a_bad_value_is_the_only_problem_beside_what_is_resolved(tmp_path):
    for overrides in ({"randaug_n": 0, "lr": "abc"}, {"randaug_n": "x"}, {"lrr": 1}):
        with pytest.raises(RecipeError) as caught:
            Recipe.from_yaml(written(tmp_path, RANDAUG), **overrides)
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_params_file_accepts_what_if_it_were_one_epoch_or_without_an_option(path):
    assert Recipe.from_yaml(path).notes == ()
    one = Recipe.from_yaml(path, epochs="1")
    assert one.warmup_epochs < 1 and one.epochs == 1
    for override in ({"schedule": "constant"}, {"teacher": "[]"}, {"randaug_n": 0},
                     {"optimizer": "adamw"}, {"erase_prob": 0}, {"weight_decay": 0}):  # fmt: skip
        recipe = Recipe.from_yaml(path, **override)
        assert inactive_options(recipe.model_dump()).keys().isdisjoint(recipe.non_default())


def test_notes_are_no_part_of_the_recipe(tmp_path):
    recipe = Recipe.from_yaml(written(tmp_path, RANDAUG), randaug_n=0)
    assert recipe.notes and recipe == Recipe() and Recipe() == recipe
    assert recipe.fingerprint == Recipe().fingerprint and recipe.model_dump() == dict(
        recipe.__class__()
    )
    assert "notes" not in repr(recipe)
    for same in (copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe)), recipe.replace(lr=0.5)):
        assert same.notes == recipe.notes


def test_a_papermill_parameter_overrides_the_tagged_cell():
    tagged = f"{TAGGED}randaug_n = 2\nrandaug_m = 9.0  # mean\n"
    recipe = Recipe.from_namespace(notebook(tagged, "# Parameters\nrandaug_n = 0\n"))
    assert recipe == Recipe() and "randaug_m 9.0 -> 7.0" in recipe.notes[0]
    both = notebook(tagged, "# Parameters\nrandaug_n = 0\nrandaug_m = 5.0\n")
    with pytest.raises(RecipeError, match=r"randaug_m: 5.0 has no effect"):
        Recipe.from_namespace(both)
    corrected = notebook(tagged, "# Parameters\nrandaug_n = 0\n", "randaug_n = 1")
    assert Recipe.from_namespace(corrected).randaug_m == 9.0
