"""What the augmentation notebook shows is what training does; its controls make a recipe."""

import math

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_noise
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from workbench import ROOT, data, training
from workbench.data import images
from workbench.evaluation import comparison
from workbench.recipe import Recipe, RecipeError, inactive_options
from workbench.ui import plots, views, widgets

STRONG = Recipe(
    crop_scale=[0.3, 1.0], hflip=0.5, brightness=0.4, hue=0.1, randaug_n=2, randaug_variant="timm"
)


def shown(figure: plots.Figure) -> np.ndarray:
    """The pixels of a figure of images, as they are before any saving."""
    return figure.axes[0].images[0].get_array()


def cell(figure: plots.Figure, i: int, columns: int, size: int = 32) -> np.ndarray:
    """The i-th image of a grid at its own size: SIDE is a multiple of it."""
    canvas, factor, words = shown(figure), plots.SIDE // size, figure.axes[0].texts
    heading = words[0].get_fontsize() > 8
    above, rows = 25 * heading, math.ceil((len(words) - heading) / columns)
    line = (canvas.shape[0] - above) // rows
    bottom = above + line * (i // columns + 1) - 4
    left = plots.CELL * (i % columns) + (plots.CELL - plots.SIDE) // 2
    return canvas[bottom - plots.SIDE : bottom, left : left + plots.SIDE][::factor, ::factor]


def texts(figure: plots.Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load_dataset(Recipe())


# ---- figures


def test_the_draws_shown_are_those_of_the_training(digits):
    row, columns = 5, 10
    figure = views.augmentation_grid(STRONG, images.decode(digits.train.path[row]), row)
    steps = data.steps_per_epoch(len(digits.train), 100)
    for epoch in range(2):
        loader = data.train_loader(
            digits.train,
            training.train_transform(STRONG),
            seed=STRONG.seed,
            batch_size=100,
            steps=range(epoch * steps, (epoch + 1) * steps),
        )
        [eaten] = [b.images[b.indices == row] for b in loader if row in b.indices]
        image = eaten[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(cell(figure, epoch + 1, columns), image)
    whole = training.eval_transform(STRONG)(images.decode(digits.train.path[row]))
    np.testing.assert_array_equal(cell(figure, 0, columns), whole)
    later = views.augmentation_grid(
        STRONG, images.decode(digits.train.path[row]), row, first_epoch=1
    )
    np.testing.assert_array_equal(cell(later, 1, columns), cell(figure, 2, columns))
    assert texts(figure)[0] == "validation" and texts(figure)[2].startswith("epoch 2")


def test_the_same_seed_draws_the_same_image_and_another_seed_another(tmp_path):
    image = images.decode(save_noise(tmp_path / "mine.jpg", 1, (90, 60)))
    one, again = (shown(views.augmentation_grid(STRONG, image)) for _ in range(2))
    other = shown(views.augmentation_grid(STRONG.replace(seed=1), image))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_the_draws_are_of_the_shrunk_image_as_in_training(tmp_path):
    image = images.decode(save_noise(tmp_path / "mine.jpg", 1, (180, 120)))
    recipe = Recipe(train_resize=40, crop_scale=[0.3, 1.0], hflip=0.5)
    figure = views.augmentation_grid(recipe, image, 3)
    wanted = training.train_transform(recipe)(image, data.rng_for(0, data.DRAW, 0, 3))
    np.testing.assert_array_equal(cell(figure, 1, 10), wanted)


def test_a_grid_shows_small_images_pixel_by_pixel_and_keeps_the_shape_of_others():
    small = np.arange(64 * 3, dtype=np.uint8).reshape(8, 8, 3)
    figure = plots.grid([small] * 3, ["a", "b\nc", ""], columns=2)
    for i in range(3):
        np.testing.assert_array_equal(cell(figure, i, 2, 8), small)
    wide = np.zeros((50, 400, 3), np.uint8)
    dark = (shown(plots.grid([wide])) == 0).all(2)
    assert dark.any(1).sum() == plots.SIDE / 8 and dark.any(0).sum() == plots.SIDE
    blue = Image.new("RGBA", (300, 300), "#0000ff")
    assert (shown(plots.grid([blue])) == (0, 0, 255)).all(2).sum() == plots.SIDE**2


def test_strengths_leave_randaugment_out_and_say_when_there_is_nothing(digits):
    image = images.decode(digits.train.path[0])
    names = {"crop", "aspect", "flip", "brightness", "hue"}
    assert names == {text for text in texts(views.sweep(STRONG, image)) if text in
                     {*names, "contrast", "saturation", "rotate"}} - {"flip 0"}  # fmt: skip
    nothing = views.sweep(Recipe(crop_ratio=[1.0, 1.0]), image, "plain")
    assert nothing.to_dict("list") == {"plain": ["crop, flip and jitter are off"]}


@pytest.mark.parametrize("form", ["up", "timm"])
def test_every_operation_of_randaugment_has_a_row_even_when_it_is_off(form, digits):
    image = images.decode(digits.train.path[0])
    recipe = Recipe(randaug_n=1, randaug_variant=form, crop_scale=[0.1, 1.0])
    figure = views.magnitudes(recipe, image)
    operations = views.magnitude_table(recipe)[form]["operation"].tolist()
    labels = [t.get_text() for t in figure.axes[0].texts if t.get_ha() == "right"]
    assert labels == operations and len(labels) == 15
    assert f"{form}'s form" in texts(figure)[0]
    off = views.magnitudes(Recipe(), image)
    assert len([t for t in off.axes[0].texts if t.get_ha() == "right"]) == 15


def test_what_the_model_eats_is_the_first_step_and_names_its_mean(digits):
    recipe = STRONG.replace(erase_prob=1.0, mixup_alpha=0.8)
    figure = views.eaten(recipe, digits)
    tensors, targets = training.preview_batch(recipe, digits, 24)
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    for i in range(24):
        pixels = (tensors[i].permute(1, 2, 0) * std + mean) * 255
        difference = cell(figure, i, 12) - pixels.clamp(0, 255).numpy()
        assert np.abs(difference).max() <= 0.51
    heading = f"(24, 3, 32, 32), mean {tensors.mean():.2f}, std {tensors.std():.2f}"
    assert texts(figure)[0] == heading
    assert texts(figure)[1] == plots.label_text(targets[0], digits.classes)


def test_what_an_exported_network_answers_otherwise_is_shown_by_form(digits):
    val = digits.val.iloc[[3, 7]]
    flips = pd.DataFrame({"file": val.file, "list": val.list, "form": ["int8", "onnx"],
                          "before": [1, 2], "after": [4, 5], "label": [1, 2]})  # fmt: skip
    figure = views.other_answers(flips, "int8", Recipe(), digits.classes)
    assert texts(figure) == ["int8: 1 other answers", "1\nto 4\nis 1"]
    see = training.eval_transform(Recipe())
    np.testing.assert_array_equal(cell(figure, 0, 1), see(images.decode(val.path.iloc[0])))
    none = views.other_answers(flips, "program", Recipe(), digits.classes)
    assert isinstance(none, pd.DataFrame) and none.empty


# ---- how far


def test_draws_that_change_nothing_go_nowhere(digits):
    table = views.distances(Recipe(crop_ratio=[1.0, 1.0]), digits, 3, 2)
    assert table.area.tolist() == [1] * 6 and table.change.tolist() == [0] * 6
    assert (table.reference_distance > 10).all() and table.epoch.tolist() == [0, 1] * 3


def test_the_distance_is_the_root_mean_square_over_pixels(digits):
    recipe = Recipe(crop_ratio=[1.0, 1.0], hflip=1.0)
    table = views.distances(recipe, digits, 3, 1)
    resize = lambda p: images.decode(p).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    whole = [np.asarray(resize(path), float) for path in digits.train.path[:3]]
    for i, row in enumerate(table.itertuples()):
        total, other = 0.0, 0.0
        for y in range(32):
            for x in range(32):
                for c in range(3):
                    total += (whole[i][y, 31 - x, c] - whole[i][y, x, c]) ** 2
                    other += (whole[(i + 1) % 3][y, x, c] - whole[i][y, x, c]) ** 2
        # OpenCV's resize and Pillow's round a level apart here and there
        assert row.change == pytest.approx(math.sqrt(total / 3072), rel=2e-3)
        assert row.reference_distance == pytest.approx(math.sqrt(other / 3072), rel=2e-3)
        assert row.file == digits.train.file[i]


def test_the_area_is_that_of_the_crop(image_folder):
    recipe = Recipe(dataset="files", data_dir=str(image_folder), crop_scale=[0.25, 0.25])
    table = views.distances(recipe, data.load_dataset(recipe), 4, 10)
    assert len(table) == 40 and table.area.to_numpy() == pytest.approx(0.25, abs=0.03)


def test_the_histograms_hold_every_draw_and_say_how_many_go_far():
    table = pd.DataFrame(
        {
            "area": [0.1, 0.5, 1.0, 1.0],
            "change": [0.0, 30, 60, 255],
            "reference_distance": [50.0] * 4,
        }
    )
    left, right = plots.distances(table).axes
    for ax in (left, right):
        assert sum(bar.get_height() for bar in ax.patches) == 4
        assert ax.get_ylabel() == "draws" and "(" in ax.get_xlabel()
    assert right.get_title() == "50 % of the draws go farther than another image"
    assert list(right.lines[0].get_xdata()) == [50, 50]
    plots.distances(
        table.assign(change=0.0, reference_distance=0.0)
    ).png()  # one image, drawn as it is


# ---- controls


def test_there_is_a_control_for_every_knob_of_augmentation():
    fields = list(Recipe.model_fields)
    assert views.AUGMENTATION == fields[fields.index("crop_scale") : fields.index("teacher")]


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_untouched_controls_are_the_recipe(path):
    recipe = Recipe.from_yaml(path)
    assert widgets.RecipeEditor(recipe, views.AUGMENTATION).found == recipe


@pytest.mark.parametrize("name", views.AUGMENTATION)
def test_both_ends_of_every_control_are_allowed(name):
    recipe = Recipe(randaug_n=2, mixup_alpha=0.2, cutmix_alpha=1.0, erase_prob=0.5, name="x")
    options = widgets.RecipeEditor(recipe, views.AUGMENTATION)
    control = options.controls[name]
    if isinstance(control, ipywidgets.Checkbox):
        ends = [True, False]
    elif isinstance(control, ipywidgets.Dropdown):
        ends = control.options
    else:
        ends = [control.min, control.max]
        if isinstance(control, ipywidgets.FloatRangeSlider):
            ends = [(end, end) for end in ends]
    for end in ends:
        control.value = end
        assert options.problem == "" and options.found is not None
        value = getattr(options.found, name)
        assert value == (list(end) if isinstance(end, tuple) else end)
        assert type(value) is type(getattr(recipe, name))


def test_a_browser_that_moves_a_slider_to_its_nearest_step_changes_nothing():
    recipe = Recipe(crop_scale=[0.083, 1.0], hflip=0.123, randaug_n=1, randaug_std=0.555)
    options = widgets.RecipeEditor(recipe, views.AUGMENTATION)
    options.controls["crop_ratio"].set_state({"value": [0.75, 1.33]})
    options.controls["crop_scale"].set_state({"value": [0.08, 1.0]})
    options.controls["hflip"].set_state({"value": 0.12})
    options.controls["randaug_std"].set_state({"value": 0.56})
    assert options.found == recipe
    options.controls["crop_ratio"].set_state({"value": [0.75, 1.35]})
    assert options.found.crop_ratio == [0.75, 1.35]


def test_the_lines_to_copy_are_the_knobs_that_count(tmp_path):
    recipe = Recipe(name="mine", hflip=0.5, lr=0.2)
    options = widgets.RecipeEditor(recipe, views.AUGMENTATION)
    options.controls["randaug_n"].value = 2
    options.controls["crop_scale"].value = (0.3, 1.0)
    options.controls["brightness"].value = 0.1 + 0.2  # as a slider of steps adds up
    assert "brightness: 0.3  # factor" in options.yaml.value
    assert "switch_prob" not in options.yaml.value
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nlr: 0.2\n" + options.yaml.value)
    assert Recipe.from_yaml(file) == options.found
    assert options.found == recipe.replace(randaug_n=2, crop_scale=[0.3, 1.0], brightness=0.3)
    paper = options._repr_mimebundle_()["text/html"]
    assert paper.startswith("<pre>crop_scale: [0.3, 1.0]")


def test_a_knob_without_effect_is_grey_and_comes_back():
    options = widgets.RecipeEditor(Recipe(randaug_n=2), views.AUGMENTATION)
    m, n = options.controls["randaug_m"], options.controls["randaug_n"]
    m.value = 9.0
    assert not m.disabled and options.found.randaug_m == 9
    n.value = 0
    assert m.disabled and options.found.randaug_m == 7.0 and options.problem == ""
    n.value = 1
    assert not m.disabled and options.found.randaug_m == 9


def test_what_a_recipe_refuses_is_said_and_the_view_below_says_it_too():
    options = widgets.RecipeEditor(Recipe(batch_size=1), views.AUGMENTATION)
    view = widgets.InteractiveView(lambda recipe: [f"hflip {recipe.hflip}"], options)
    assert "hflip 0.0" in view._text.value
    options.controls["mixup_alpha"].value = 0.2
    assert options.found is None and "no other to mix with" in options.note.value
    assert "no other to mix with" in view._text.value
    options.controls["mixup_alpha"].value = 0.0
    options.controls["hflip"].value = 0.25
    assert options.problem == "" and "hflip 0.25" in view._text.value


def test_copy_sends_the_lines_to_the_browser_and_nothing_before():
    options = widgets.RecipeEditor(Recipe(), views.AUGMENTATION)
    assert options._copied.outputs == ()
    options.copy.click()
    [output] = options._copied.outputs
    assert "hflip: 0.0" in output["data"]["application/javascript"]
    assert options.copy.description == "Copied"
    options.controls["hflip"].value = 0.5
    assert options.copy.description == "Copy"


# ---- options that are idle


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_what_has_no_effect_is_what_a_recipe_refuses_to_be_set(path):
    recipe = Recipe.from_yaml(path)
    idle = inactive_options(recipe.model_dump())
    other = {"randaug_m": 3.0, "kd_loss": ["kl"], "erase_count": 3, "milestones": [1],
             "gamma": 0.5, "momentum": 0.5, "nesterov": True, "switch_prob": 0.1,
             "warmup_start_factor": 0.5, "deep_stem": True, "temperature": 2.0}  # fmt: skip
    for name, value in other.items():
        if value == getattr(recipe, name):
            continue
        try:
            recipe.replace(**{name: value})
            refused = ""
        except RecipeError as error:
            refused = str(error)
        assert (f"{name}: {value!r} has no effect" in refused) == (name in idle)


def test_two_recipes_do_not_differ_in_what_neither_uses():
    plain, mixed = Recipe(), Recipe(mixup_alpha=0.2, optimizer="adamw", lr=0.001)
    told = comparison.recipe_difference(plain.model_dump(), mixed.model_dump())
    assert told == {  # momentum stands at its default, and is idle with adamw
        "optimizer": "optimizer adamw (sgd)",
        "lr": "lr 0.001 (0.1)",
        "mixup_alpha": "mixup_alpha 0.2 (0.0)",
    }
    other = Recipe(mixup_alpha=0.2, mix_per_sample=True, momentum=0.8)
    told = comparison.recipe_difference(plain.model_dump(), other.model_dump())
    assert told["mix_per_sample"] == "mix_per_sample True (idle)"
    assert told["momentum"] == "momentum 0.8 (0.9)"
    assert comparison.recipe_difference(plain.model_dump(), plain.model_dump()) == {}


def test_values_of_an_older_version_are_no_error():
    old = Recipe().model_dump() | {"kd_loss": None, "batch_size": "many", "erase_prob": None}
    assert "temperature" in inactive_options(old)
    assert comparison.recipe_difference(old, old) == {}


def test_titles_stay_above_their_own_images():
    names = [
        "cat", "Jaguar XK XKR 2012", "BMW 3 Series Wagon 2012", "$x$ " + 40 * "W",
        "0.62 Rolls-Royce Phantom Drophead Coupe Convertible 2012\n0.38 cat", "中文名字",
    ]  # fmt: skip
    figure = plots.grid([np.zeros((8, 8, 3), np.uint8)] * len(names), names, columns=6)
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = figure.axes[0].texts
    assert texts[0].get_fontsize() == 8 > texts[1].get_fontsize() > texts[2].get_fontsize() > 5
    assert [text.get_text() for text in texts][:3] == names[:3]
    assert texts[4].get_text() == "0.62 Rolls-R...ertible 2012\n0.38 cat"
    with plots._any_script():
        for text in texts:
            width = text.get_window_extent(renderer).width / figure.dpi * plots.DPI
            assert width < plots.CELL and text.get_fontsize() >= 5
