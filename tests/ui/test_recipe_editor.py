"""The recipe editor, the choice of an image, and the photographs of 01."""

import html
import io
import socket
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
from PIL import Image

from workbench import ROOT
from workbench.data import images
from workbench.recipe import Recipe, RecipeError, inactive_options
from workbench.ui import image_choice, image_grids, photographs, recipe_editor, views, widgets
from workbench.ui.recipe_editor import RecipeEditor

NAMES = [name for group in views.AUGMENTATION.values() for name in group]


def editor(**options) -> RecipeEditor:
    return RecipeEditor(Recipe(**options), views.AUGMENTATION)


def test_there_is_a_control_for_every_augmentation_option():
    fields = list(Recipe.model_fields)
    assert NAMES == fields[fields.index("crop_scale") : fields.index("teacher")]


OTHER = {"randaug_m": 3.0, "kd_loss": ["kl"], "erase_count": 3, "milestones": [1], "gamma": 0.5,
         "momentum": 0.5, "switch_prob": 0.1, "deep_stem": True, "temperature": 2.0}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_untouched_controls_are_the_recipe_and_inactive_options_are_refused_by_it(path):
    recipe = Recipe.from_yaml(path)
    assert RecipeEditor(recipe, views.AUGMENTATION).result == recipe
    inactive, refused = inactive_options(recipe.model_dump()), ""
    for name in [name for name, value in OTHER.items() if value != getattr(recipe, name)]:
        try:
            recipe.replace(**{name: OTHER[name]})
        except RecipeError as error:
            refused = str(error)
        assert (f"{name}: {OTHER[name]!r} has no effect" in refused) == (name in inactive)


@pytest.mark.parametrize("name", NAMES)
def test_both_ends_of_every_control_are_allowed(name):
    options = editor(randaug_n=2, mixup_alpha=0.2, cutmix_alpha=1.0, erase_prob=0.5)
    control = options.controls[name]
    ends = [getattr(control, "min", False), getattr(control, "max", True)]
    if isinstance(control, ipywidgets.FloatRangeSlider):
        ends = [(end, end) for end in ends]
    for end in getattr(control, "options", ends):
        control.value = end
        assert options.problem == "" and options.result is not None
        value = getattr(options.result, name)
        assert value == (list(end) if isinstance(end, tuple) else end)
        assert type(value) is type(getattr(Recipe(), name))


def test_a_browser_that_moves_a_slider_to_its_nearest_step_changes_nothing():
    recipe = Recipe(crop_scale=[0.083, 1.0], hflip=0.123, randaug_n=1, randaug_std=0.555)
    options = RecipeEditor(recipe, views.AUGMENTATION)
    options.controls["crop_ratio"].set_state({"value": [0.75, 1.33]})
    options.controls["crop_scale"].set_state({"value": [0.08, 1.0]})
    options.controls["hflip"].set_state({"value": 0.12})
    options.controls["randaug_std"].set_state({"value": 0.56})
    assert options.result == recipe
    options.controls["crop_ratio"].set_state({"value": [0.75, 1.35]})
    assert options.result.crop_ratio == [0.75, 1.35]


def test_the_lines_to_copy_are_the_options_with_an_effect(tmp_path):
    recipe = Recipe(name="mine", hflip=0.5, lr=0.2)
    options = RecipeEditor(recipe, views.AUGMENTATION)
    options.controls["randaug_n"].value = 2
    options.controls["crop_scale"].value = (0.3, 1.0)
    options.controls["brightness"].value = 0.1 + 0.2  # as a slider of steps adds up
    assert "brightness: 0.3  # factor" in options.yaml.value
    assert "switch_prob" not in options.yaml.value
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nlr: 0.2\n" + options.yaml.value)
    assert Recipe.from_yaml(file) == options.result
    assert options.result == recipe.replace(randaug_n=2, crop_scale=[0.3, 1.0], brightness=0.3)
    paper = options._repr_mimebundle_()["text/html"]
    assert paper.startswith("<pre>crop_scale: [0.3, 1.0]")


def test_an_option_without_effect_is_disabled_and_keeps_its_value():
    options = editor(randaug_n=2)
    m, n = options.controls["randaug_m"], options.controls["randaug_n"]
    m.value = 9.0
    assert not m.disabled and options.result.randaug_m == 9
    n.value = 0
    assert m.disabled and options.result.randaug_m == 7.0 and options.problem == ""
    n.value = 1
    assert not m.disabled and options.result.randaug_m == 9


def test_errors_of_the_recipe_are_shown_in_the_editor_and_its_views():
    options = editor(batch_size=1)
    view = widgets.InteractiveView(lambda recipe: [f"hflip {recipe.hflip}"], options)
    assert "hflip 0.0" in view.text.value
    options.controls["mixup_alpha"].value = 0.2
    assert options.result is None and "no other to mix with" in options.note.value
    assert "no other to mix with" in view.text.value
    options.controls["mixup_alpha"].value = 0.0
    options.controls["hflip"].value = 0.25
    assert options.problem == "" and "hflip 0.25" in view.text.value


def test_copy_sends_the_lines_to_the_browser():
    options = editor()
    assert "hflip" not in str(options.script.outputs)
    options.copy.click()
    [output] = options.script.outputs
    assert "hflip: 0.0" in output["data"]["application/javascript"]
    assert options.copy.description == "Copied"
    options.controls["hflip"].value = 0.5
    assert options.copy.description == "Copy"


def test_a_greyed_out_control_says_which_option_is_the_reason():
    options = editor(mixup_alpha=0.2)
    switch, group = options.controls["switch_prob"], options.reasons["mixing and erasing"]
    assert switch.tooltip.startswith("no effect, since cutmix_alpha is 0.0")
    assert "No effect, since cutmix_alpha is 0.0: switch_prob" in group.value
    assert "No effect, since erase_prob is 0.0: erase_mode, erase_count" in group.value
    greyed = {k for k, v in options.controls.items() if "workbench-inactive" in v._dom_classes}
    assert greyed == {k for k, v in options.controls.items() if v.disabled} >= {"switch_prob"}
    options.controls["cutmix_alpha"].value = 1.0
    options.controls["erase_prob"].value = 0.5
    assert group.value == "" and "workbench-inactive" not in switch._dom_classes
    assert switch.tooltip == Recipe.model_fields["switch_prob"].description


def test_reset_restores_the_recipe_in_one_update():
    recipe = Recipe(hflip=0.5, crop_scale=[0.083, 1.0], randaug_n=2)
    options = RecipeEditor(recipe, views.AUGMENTATION)
    for name, value in {"hflip": 0.1, "crop_scale": (0.5, 0.6), "randaug_n": 0}.items():
        options.controls[name].value = value
    assert options.result != recipe
    results = []
    options.observe(lambda change: results.append(change.new), names="result")
    options.reset.click()
    assert results == [recipe] and options.controls["crop_scale"].value == (0.083, 1.0)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty project folder with params/."""
    monkeypatch.setattr(recipe_editor, "ROOT", tmp_path)
    (tmp_path / "params").mkdir()
    return tmp_path


def test_a_saved_params_file_is_the_edited_recipe_under_the_name_of_the_file(project):
    options = editor(name="mine", lr=0.2, dataset="letters")
    options.controls["hflip"].value = 0.5
    options.save.click()
    assert options.message.value == "params/mine_edited.yaml is written."
    saved = Recipe.from_yaml(project / "params" / "mine_edited.yaml")
    assert saved == options.result.replace(name="mine_edited") and saved.hflip == 0.5
    assert options.result.name == "mine"


def test_another_file_is_replaced_only_by_a_second_click(project):
    file = project / "params" / "kept.yaml"
    file.write_text("name: kept\n")
    options = editor()
    options.path.value = "params/kept.yaml"
    for click in (options.save.click, options.train.click):
        click()
        assert file.read_text() == "name: kept\n"
        assert options.save.description == "Overwrite" and "exists" in options.message.value
        options.controls["hflip"].value += 0.25  # another recipe: asked again
        assert options.save.description == "Save as params file"
    options.save.click()
    options.save.click()
    assert Recipe.from_yaml(file).hflip == 0.5
    options.save.click()
    assert "is written" in options.message.value, "the same text needs no question"


@pytest.mark.parametrize("path", ["", "nowhere/x.yaml", "params", "params/x.py", "params/...yaml"])
def test_a_file_that_cannot_be_written_is_a_message(project, path):
    options = editor()
    options.path.value = path
    options.train.click()
    assert options.message.value.startswith("not written: ")
    assert list((project / "params").iterdir()) == []


def test_train_this_writes_the_file_and_shows_commands_that_train_it(project):
    options = editor(epochs=3)
    options.path.value = "params/my file.yaml"
    options.controls["hflip"].value = 0.25
    options.train.click()
    text = html.unescape(options.message.value)
    assert Recipe.from_yaml(project / "params" / "my file.yaml").hflip == 0.25
    assert "workbench train 'params/my file.yaml'" in text
    command = "papermill notebooks/02_baseline.ipynb out.ipynb -k python3 -f 'params/my file.yaml'"
    assert command in text and "test_resnet on digits at 32 pixels, 3 epochs" in text


def test_nothing_is_saved_of_a_recipe_with_an_error(project):
    options = editor(batch_size=1)
    options.controls["mixup_alpha"].value = 0.2
    assert options.result is None and options.save.disabled and options.train.disabled


def test_beside_each_other_both_have_a_static_representation():
    options = editor(hflip=0.5)
    draw = lambda one: image_grids.grid([np.zeros((300, 300, 3), np.uint8)], [str(one.hflip)])
    view = widgets.InteractiveView(draw, options)
    lines = widgets.InteractiveView(lambda one: [f"hflip {one.hflip}"], options)
    static = recipe_editor.Beside([options, lines], [view])._repr_mimebundle_()["text/html"]
    assert "<pre>crop_scale" in static and "<li>hflip 0.5</li>" in static
    assert '<img src="data:image/jpeg;base64,' in static
    assert f"width={image_grids.CELL}>" in static


# ---- images


def test_photographs_are_there_without_a_network(monkeypatch):
    def refused(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    content, sizes = photographs.default_images(Recipe(randaug_n=2, seed=3))
    assert sizes == {"image_size": 224, "val_resize": 256}
    found = {row.file: images.open(row.path) for row in content.train.itertuples()}
    shapes = {file: (one.width, one.height) for file, one in found.items()}
    assert shapes == {
        "china.jpg": (640, 427), "flower.jpg": (640, 427), "grace_hopper.jpg": (512, 600),
    }  # fmt: skip
    assert all(one.pixels().std(2).mean() > 10 for one in found.values()), "in colour"
    assert len(content.train) == 24 and content.counts == [8, 8, 8]
    recipe = Recipe(mixup_alpha=0.2, **sizes)
    assert len(views.model_inputs(recipe, content).cells) == 24


@pytest.mark.parametrize("named", [{"lr": 0.2}, {"name": "mine"}, {"dataset": "letters"}])
def test_a_recipe_that_sets_more_than_augmentation_is_shown_on_its_own_data(named):
    content, sizes = photographs.default_images(Recipe(hflip=0.5, **named))
    assert sizes == {} and content.train.file[0].endswith(".png")
    baseline = Recipe.from_yaml(ROOT / "params" / "digits_baseline.yaml")
    assert len(photographs.default_images(baseline)[0].train) == 1297


def png(size: tuple[int, int], colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


def uploaded(choice: image_choice.ImageChoice, name: str, content: bytes) -> None:
    """What a browser sends for a chosen or dropped file."""
    one = {"name": name, "type": "", "size": len(content), "content": memoryview(content)}
    choice.upload.set_state({"value": [{**one, "last_modified": 0}]})


def test_an_uploaded_image_keeps_its_size_and_the_list_is_one_move_away():
    content = photographs.photographs()
    choice = image_choice.ImageChoice(content)
    view = widgets.InteractiveView(
        lambda at: views.augmentation_grid(Recipe(), at.image, at.row, heading=at.name), at=choice
    )
    listed = view.image.value
    assert choice.value.name == "china.jpg, class temple" and choice.value.other.height == 427
    uploaded(choice, "mine.png", png((301, 200), "red"))
    image = choice.value.image
    assert (image.width, image.height) == (301, 200) and choice.value.name == "mine.png"
    assert (image.pixels() == (255, 0, 0)).all() and view.image.value != listed
    choice.row.value = 1
    assert choice.value.name == "flower.jpg, class flower" and choice.upload.value == ()
    uploaded(choice, "mine.png", png((301, 200), "red"))
    assert choice.value.name == "mine.png", "the same file again"


def test_a_file_that_is_no_image_is_named_and_the_former_image_stays():
    choice = image_choice.ImageChoice(photographs.photographs())
    before = choice.value
    uploaded(choice, "notes<1>.txt", b"no image")
    assert "notes&lt;1&gt;.txt" in choice.message.value and "image format" in choice.message.value
    assert choice.value is before
    choice.row.value = 2
    assert choice.message.value == ""
