"""Every params file loads, says where it is from, and means what its source means."""

import re
import shlex

import pytest
import yaml

from workbench import ROOT, data, training
from workbench.recipe import Recipe

PARAMS = sorted((ROOT / "params").glob("*.yaml"))
IMAGENET = 1_281_167  # pictures in the training list of ImageNet-1k
RESNETS = {"resnet18": 70.32, "resnet34": 74.14, "resnet50": 76.76}  # top-1 in UP's table

each = pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.stem)


def header(path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def field(path, name: str) -> str:
    """What the header says after `# Name:`, continued lines included."""
    text = "\n".join(line.removeprefix("#") for line in header(path))
    return re.search(rf"^ {name}:(.*(?:\n {{10}}.*)*)", text, re.M).group(1).strip()


def test_there_are_the_recipes_of_the_issue():
    names = "resnet18_100e resnet34_100e resnet50_100e digits_baseline cifar10_baseline"
    assert {*names.split(), "tiny_imagenet_baseline"} <= {path.stem for path in PARAMS}


@each
def test_a_header_names_its_file_source_run_and_expectation(path):
    lines = header(path)
    assert re.match(rf"# {re.escape(path.name)}: \S", lines[0])
    keys = [m.group(1) for line in lines if (m := re.match(r"# ([A-Z]\w+): ", line))]
    assert keys == ["Source", "Run", "Expect"]
    assert all(field(path, key) for key in keys)


@each
def test_every_knob_exists_and_the_recipe_is_valid(path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(written) <= set(Recipe.model_fields)
    recipe = Recipe.read(path)
    for key, value in written.items():
        assert getattr(recipe, key) in (value, [value]), key  # a lone text is a list of one


@each
def test_other_readers_of_yaml_see_the_same_values(path):
    """papermill -f uses PyYAML as it is: a number it reads as text is no number there."""
    recipe, written = Recipe.read(path), yaml.safe_load(path.read_text(encoding="utf-8"))
    assert Recipe.collect(written) == recipe
    for key, value in written.items():
        if isinstance(getattr(recipe, key), float | int):
            assert isinstance(value, float | int), key


@each
def test_a_recipe_is_named_after_its_file(path):
    assert Recipe.read(path).name == path.stem


@each
def test_a_run_line_is_a_command_of_this_repository(path):
    line = field(path, "Run").splitlines()[0]
    if line.startswith("make "):
        assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)
        assert f"params/{path.name}" in (ROOT / "Makefile").read_text()
        return
    words = shlex.split(line)
    assert words[0] == "papermill" and (ROOT / words[1]).exists()
    assert words[words.index("-f") + 1] == f"params/{path.name}"
    for flag, knob in zip(words, words[1:], strict=False):
        assert flag != "-p" or knob in Recipe.model_fields


@each
def test_data_dir_belongs_to_the_machine_and_not_into_a_recipe(path):
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not {"data_dir", "runs_dir", "device", "workers", "seed"} & set(written)


# ---- United Perception, configs/cls/resnet/res{18,34,50}.yaml


def imagenet(model: str) -> Recipe:
    return Recipe.read(ROOT / "params" / f"{model}_100e.yaml", data_dir="ImageNet")


@pytest.mark.parametrize("model", RESNETS)
def test_the_plain_recipes_hold_the_references_values(model):
    recipe = imagenet(model)
    wanted = dict(
        model=model,
        epochs=100,
        batch_size=1024,
        drop_last=False,
        optimizer="sgd",
        nesterov=True,
        momentum=0.9,
        lr=0.4,
        weight_decay=1e-4,
        decay_all=True,
        schedule="multistep",
        milestones=[30, 60, 90],
        gamma=0.1,
        warmup_ratio=0.25,
        label_smoothing=0.1,
        ema_decay=None,
        image_size=224,
        val_resize=256,
        val_image_size=None,
        interpolation="bilinear",
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
        crop_scale=[0.08, 1.0],
        crop_ratio=[pytest.approx(3 / 4), pytest.approx(4 / 3)],
        flip=0.5,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
        hue=0.1,
        drop_path=0.0,
        deep_stem=False,
        avg_down=False,
        pretrained=False,
    )
    assert {key: getattr(recipe, key) for key in wanted} == wanted


@pytest.mark.parametrize("model", RESNETS)
def test_the_plain_recipes_train_at_the_references_rates(model):
    recipe = imagenet(model)
    steps = data.steps_per_epoch(IMAGENET, recipe.batch_size, recipe.drop_last)
    assert steps == 1252 and recipe.epochs * steps == 125_200
    rate = training.lr_schedule(recipe, steps)
    exactly = {0: 0.1, 37_559: 0.4, 37_560: 0.04, 75_119: 0.04, 75_120: 0.004, 125_199: 0.0004}
    for step, wanted in exactly.items():
        assert rate(step) == pytest.approx(wanted, rel=1e-9), step
    # UP warms up for 2,500 steps; whole epochs make it 2,504
    for step in range(0, 2600, 50):
        reference = 0.1 + 0.3 * min(1, step / 2499)
        assert rate(step) == pytest.approx(reference, rel=2e-3), step
    assert rate(2503) == pytest.approx(0.4) and rate(2504) == 0.4


@pytest.mark.parametrize("model, top1", RESNETS.items())
def test_the_plain_recipes_expect_the_published_top1(model, top1):
    assert f"top-1 {top1}" in field(ROOT / "params" / f"{model}_100e.yaml", "Expect")


def test_the_plain_recipes_differ_in_the_model_alone():
    recipes = [imagenet(model).changed() for model in RESNETS]
    for recipe in recipes:
        del recipe["model"], recipe["name"]
    assert recipes[0] == recipes[1] == recipes[2]


def test_the_recipe_means_torchvisions_transform():
    recipe = imagenet("resnet50")
    train, test = training.train_transform(recipe), training.test_transform(recipe)
    assert (train.size, train.crop_scale, train.flip) == (224, (0.08, 1.0), 0.5)
    jitter = (train.brightness, train.contrast, train.saturation, train.hue)
    assert jitter == (0.2, 0.2, 0.2, 0.1)
    assert (test.size, test.resize, test.interpolation) == (224, 256, "bilinear")
