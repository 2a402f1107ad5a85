"""Maps of Grad-CAM: the formula, where it listens by itself, what it leaves alone, its figure."""

import copy

import numpy as np
import pytest
import timm
import torch
from conftest import save_noise
from PIL import Image
from torch import nn
from torch.nn import functional as F

from workbench import models, training
from workbench.data import images
from workbench.evaluation import grad_cam
from workbench.recipe import Recipe
from workbench.ui import plots, views


def network(name: str, **options) -> nn.Module:
    """A timm model whose norms have seen noise, so that no layer gives zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=7, **options)
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):  # timm begins some at 0
                nn.init.uniform_(part.weight, 0.5, 1.0)
                nn.init.uniform_(part.running_mean, -0.1, 0.1)
    return model.eval()


def noise(count: int, *size: int) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def grid_of_tokens(out: torch.Tensor) -> torch.Tensor:
    """One class token, then a square of places."""
    side = round((out.shape[1] - 1) ** 0.5)
    return out[:, 1:].reshape(len(out), side, side, -1).permute(0, 3, 1, 2)


def slow_reference(model, images, targets, layer, place=lambda out: out) -> np.ndarray:
    """Section 3 of the paper, an image at a time: hook, backward, mean, weighted sum, ReLU."""
    maps = []
    for image, target in zip(images, targets, strict=True):
        said = []
        module = dict(model.named_modules())[layer]
        # The next module may write over what this one gave.
        hook = module.register_forward_hook(
            lambda module, given, out, said=said: said.append(out) or out.clone()
        )
        logit = model(image[None])[0, target]
        hook.remove()
        [gradient] = torch.autograd.grad(logit, said[-1])
        features, gradient = place(said[-1])[0], place(gradient)[0]
        cam = torch.zeros(features.shape[1:])
        for channel in range(len(features)):
            cam += gradient[channel].mean() * features[channel].detach()
        cam = F.interpolate(cam.clamp(min=0)[None, None], image.shape[1:], mode="bilinear")[0, 0]
        maps.append((cam / cam.max() if cam.max() > 0 else cam).detach().numpy())
    return np.stack(maps)


LAST = lambda out: out.permute(0, 3, 1, 2)
CASES = [  # model, side of its images, the module found, how it lays out its map
    ("resnet18", 64, "layer4", None),
    ("mobilenetv3_small_100", 96, "blocks", None),
    ("mobilenetv2_035", 64, "bn2", None),
    ("test_convnext", 64, "norm_pre", None),
    ("test_vit", 160, "blocks.4", grid_of_tokens),
    ("swin_tiny_patch4_window7_224", 224, "norm", LAST),
]


@pytest.mark.parametrize("name, side, layer, place", CASES, ids=[case[0] for case in CASES])
def test_the_map_is_the_papers_at_the_last_module_that_keeps_places(name, side, layer, place):
    small = {"depths": (1, 1, 2, 1), "embed_dim": 24} if name.startswith("swin") else {}
    model, images, targets = network(name, **small), noise(4, side, side), [0, 1, 2, 3]
    want = slow_reference(model, images, targets, layer, place or (lambda out: out))
    assert grad_cam.layers(model, images)[-1] == layer
    maps = grad_cam.grad_cam(model, images, targets)
    assert maps.dtype == np.float32 and maps.shape == (4, side, side)
    np.testing.assert_allclose(maps, want, atol=2e-5)
    assert (want.max((1, 2)) == 1).sum() >= 2, "this case would pass with zeros"
    assert not np.allclose(grad_cam.grad_cam(model, images, [1, 4, 0, 2]), maps, atol=0.1)


@pytest.mark.parametrize("layer", ["layer3", "layer4.0.conv1", "layer4.1.bn2", "layer2.0.bn1"])
def test_any_module_with_places_can_be_named_even_before_one_that_works_in_place(layer):
    model, images = network("resnet18"), noise(2, 64, 64)
    want = slow_reference(model, images, [1, 2], layer)
    np.testing.assert_allclose(grad_cam.grad_cam(model, images, [1, 2], layer), want, atol=2e-5)


def test_an_oblong_image_has_an_oblong_map():
    model, images = network("resnet18"), noise(2, 64, 160)
    want = slow_reference(model, images, [1, 2], "layer4")
    np.testing.assert_allclose(grad_cam.grad_cam(model, images, [1, 2]), want, atol=2e-5)


@pytest.mark.parametrize(
    "name, side, layer",
    [
        ("resnet10t", 32, "layer3"),  # its last stage has one place
        ("levit_128s", 224, "stages"),  # tokens, without a class token
        ("vit_tiny_patch16_224", 224, "blocks.10"),  # the last block feeds the class token alone
        ("deit_tiny_distilled_patch16_224", 224, "blocks.10"),
        ("cait_xxs24_224", 224, "blocks"),  # behind it work layers on one token
        ("densenet121", 64, "features"),
        ("regnety_002", 64, "final_conv"),
    ],
)
def test_the_module_found_is_a_stage_or_block_before_the_pooling(name, side, layer):
    assert grad_cam.layers(network(name), noise(1, side, side))[-1] == layer


def test_what_a_head_does_before_it_pools_is_no_stage():
    model = network("test_vit", global_pool="map", class_token=False)
    assert grad_cam.layers(model, noise(1, 160, 160))[-1] == "norm"
    [cam] = grad_cam.grad_cam(model, noise(1, 160, 160), [1], "attn_pool.kv")  # but may be asked
    assert cam.shape == (160, 160)


class Split(nn.Module):
    """Maps (n, 16, h, w) to what attention works on: (n, 2 heads, h * w, 8)."""

    def forward(self, maps):
        return maps.flatten(2).mT.unflatten(2, (2, 8)).transpose(1, 2)


def test_four_dimensions_without_the_shape_of_the_image_are_no_map():
    parts = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), Split(), nn.Flatten(), nn.Linear(1024, 3)]
    assert grad_cam.layers(nn.Sequential(*parts), noise(1, 16, 16)) == ["0", "1"]


def test_a_module_that_works_twice_stands_at_its_last_place():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.one, self.two = nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.fc = nn.Linear(4, 3)

        def forward(self, images):
            return self.fc(self.act(self.two(self.act(self.one(images)))).mean((2, 3)))

    assert grad_cam.layers(Twice(), noise(1, 8, 8)) == ["one", "two", "act"]


class Wrapped(nn.Module):
    """A model that is shown its images at another size."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(F.interpolate(images, (160, 160), mode="bilinear"))


def test_what_only_wraps_a_model_is_looked_through():
    convolutions = Wrapped(network("resnet10t"))
    assert grad_cam.layers(convolutions, noise(1, 40, 40))[-1] == "model.layer4"
    model, images = network("test_vit"), noise(2, 40, 40)
    assert grad_cam.layers(Wrapped(model), images)[-1] == "model.blocks.4"
    inside = grad_cam.grad_cam(model, F.interpolate(images, (160, 160), mode="bilinear"), [1, 2])
    outside = grad_cam.grad_cam(Wrapped(model), images, [1, 2])
    assert outside.shape == (2, 40, 40)
    assert np.corrcoef(inside[:, 2::4, 2::4].ravel(), outside.ravel())[0, 1] > 0.99


# ---- what it means


class Tiny(nn.Module):
    """Eight places a side, the mean of them classified."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(16, 3)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def patches(count: int, both: bool = False) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Grey noise, 32 x 32, with a patch of the class's colour: red, green, none (class 2).

    Returns images, labels, and the top left of the patch of class 0 and class 1 by image.
    """
    rng = np.random.default_rng(count)
    images = rng.normal(0, 0.1, (count, 1, 32, 32)).repeat(3, 1)
    labels = np.arange(count) % 3
    places = np.stack([rng.integers(0, 24, (count, 2)), rng.integers(0, 24, (count, 2))], 1)
    if both:  # left and right, never one over the other
        places[:, 0, 1], places[:, 1, 1] = places[:, 0, 1] % 7, 17 + places[:, 1, 1] % 7
    for image, label, place in zip(images, labels, places, strict=True):
        for colour in (0, 1) if both else {label} - {2}:
            top, left = place[colour]
            image[colour, top : top + 8, left : left + 8] += 2
    return torch.tensor(images, dtype=torch.float32), torch.tensor(labels), places


@pytest.fixture(scope="module")
def trained() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tiny()
    images, labels, _ = patches(300)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    optimizer.zero_grad(set_to_none=True)
    return model


def test_the_map_of_a_class_lies_over_its_object_where_two_stand(trained):
    images, _, places = patches(40, both=True)
    for label in (0, 1):
        maps = grad_cam.grad_cam(trained, images, [label] * len(images))
        for cam, [top, left] in zip(maps, places[:, label], strict=True):
            y, x = np.unravel_index(cam.argmax(), cam.shape)
            assert top - 2 <= y < top + 10 and left - 2 <= x < left + 10  # half a place of four


def test_what_stands_nowhere_is_seen_nowhere(trained):
    """A constant image: every place the same, but for the border, which is padded with zeros."""
    flat = torch.full((1, 3, 64, 64), 0.5)
    maps = grad_cam.grad_cam(trained, flat.expand(3, -1, -1, -1), [0, 1, 2])[:, 16:-16, 16:-16]
    assert np.ptp(maps, axis=(1, 2)) == pytest.approx(0, abs=1e-5)
    assert maps.any(), "all of them zero would be no test"


def test_a_map_of_zeros_stays_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 2))  # fmt: skip
    with torch.no_grad():
        model[0].weight.fill_(0.1)
        model[0].bias.fill_(1)
        model[4].weight.copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
    maps = grad_cam.grad_cam(model, noise(2, 8, 8), [0, 1])
    assert maps[0].max() == 1 and not maps[1].any() and np.isfinite(maps).all()


# ---- what it leaves alone, what it refuses


def test_mode_weights_gradients_hooks_and_randomness_stay_as_they_were():
    model, images = network("resnet18").train(), noise(2, 64, 64)
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]
    stream = torch.random.get_rng_state()
    with torch.no_grad():
        maps = grad_cam.grad_cam(model, images, [1, 2])
    for layer in ("", "fc"):
        with pytest.raises(grad_cam.ExplainError):
            grad_cam.grad_cam(model, images, [1, 7], layer)
    assert torch.equal(stream, torch.random.get_rng_state())
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert not any(part._forward_hooks or part._backward_hooks for part in model.modules())
    np.testing.assert_array_equal(grad_cam.grad_cam(model.eval(), images, [1, 2]), maps)


def test_no_graph_is_built_below_the_module_that_is_asked():
    """Else sixteen images at 224 would keep what a training step keeps."""
    model, seen = network("resnet18"), []
    for part in (model.layer3, model.fc):
        part.register_forward_hook(lambda module, given, out: seen.append(out.requires_grad))
    grad_cam.grad_cam(model, noise(2, 64, 64), [1, 2])
    assert seen[2:] == [False, True]  # after the look for the module, with one image


def test_a_frozen_model_and_channels_last_give_the_same_map():
    model, images = network("resnet18"), noise(2, 64, 64)
    want = grad_cam.grad_cam(model, images, torch.tensor([1, 2]))
    model.requires_grad_(False)
    np.testing.assert_array_equal(grad_cam.grad_cam(model, images, np.array([1, 2])), want)
    model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    np.testing.assert_allclose(grad_cam.grad_cam(model, images, [1, 2]), want, atol=1e-4)


def test_no_image_has_no_map():
    assert grad_cam.grad_cam(network("resnet18"), noise(0, 64, 48), []).shape == (0, 64, 48)


def test_a_network_without_places_is_refused_in_a_sentence():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    with pytest.raises(grad_cam.ExplainError, match="^the answer of Sequential rests on no places"):
        grad_cam.grad_cam(model, noise(1, 8, 8), [0])


@pytest.mark.parametrize(
    "name, layer, near",
    [("resnet18", "fc", "layer4.1, layer4$"), ("test_vit", "norm", "blocks.3, blocks.4$"),
     ("test_vit", "blocks.5", "blocks.3, blocks.4$"), ("resnet18", "global_pool", "layer4$")],
)  # fmt: skip
def test_a_module_without_places_is_refused_with_those_that_have_them(name, layer, near):
    side = 160 if name == "test_vit" else 64
    with pytest.raises(grad_cam.ExplainError, match=f"^module {layer} of .*{near}"):
        grad_cam.grad_cam(network(name), noise(1, side, side), [0], layer)


def test_an_unknown_module_is_refused_with_the_nearest():
    with pytest.raises(models.ModelError, match="no module 'layer5'; near: .*layer4"):
        grad_cam.grad_cam(network("resnet18"), noise(1, 64, 64), [0], "layer5")


@pytest.mark.parametrize("targets", [[0], [0, 7], [-1, 0], [[0, 1]]])
def test_classes_that_do_not_fit_are_refused(targets):
    with pytest.raises(grad_cam.ExplainError, match="class"):
        grad_cam.grad_cam(network("resnet18"), noise(2, 64, 64), targets)


# ---- the figure


def parts(figure: plots.Figure) -> tuple[np.ndarray, list[str]]:
    """The pixels of the sheet and its words."""
    ax = figure.axes[0]
    return ax.images[0].get_array(), [text.get_text() for text in ax.texts if text.get_text()]


@pytest.fixture
def image_files(tmp_path):
    return [save_noise(tmp_path / f"{i}.png", i, (64, 64)) for i in range(4)]


RECIPE = Recipe(image_size=48, val_resize=48, model="test_resnet")


def test_a_strip_shows_the_image_and_the_map_of_each_class_with_its_probability(image_files):
    model, names = network("resnet10t").train(), list("abcdefg")
    asked = {"answer": (model, [0, 1, 2, 3]), "label": (model, [6, 5, 4, 3])}
    sheet, words = parts(views.grad_cam_grid(RECIPE, image_files, names, asked, "four"))
    assert model.training
    shown = [training.eval_transform(RECIPE)(images.decode(path)) for path in image_files]
    batch = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in shown])
    batch = training.Normalize(RECIPE, torch.device("cpu"))(batch)
    with torch.no_grad():
        p = model.eval()(batch).softmax(1).numpy()
    want = ["four"]
    for i in range(4):
        want += [str(i + 1), f"answer {names[i]}: {p[i, i]:.2f}"]
        want += [f"label {names[6 - i]}: {p[i, 6 - i]:.2f}"]
    assert sorted(words) == sorted(want)
    # The first strip, twice as large as its image_files: 48 pixels in a place of 96.
    margin, top = 12 + 7, 25 + 4 + plots.LINE
    for k, image in enumerate(
        [np.asarray(shown[0])]
        + [plots.tinted(shown[0], grad_cam.grad_cam(model, batch[:1], [c])[0]) for c in (0, 6)]
    ):
        left = margin + plots.CELL * k + (plots.CELL - plots.SIDE) // 2
        found = sheet[top : top + plots.SIDE : 2, left : left + plots.SIDE : 2].astype(int)
        assert np.abs(found - image).max() <= 1


def test_a_model_without_a_map_has_a_sentence_in_its_place(image_files):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 3))
    names, classes = list("abcdefg"), [0, 1, 2, 1]
    sentence = "teacher: the answer of Sequential rests on no places of a map, so it has none"
    both = {"student": (network("resnet10t"), classes), "teacher": (flat, classes)}
    sheet, words = parts(views.grad_cam_grid(RECIPE, image_files, names, both, "taken over"))
    assert f"taken over; {sentence}" in words
    assert len([word for word in words if word.startswith("student ")]) == 4
    assert not [word for word in words if word.startswith("teacher ")]
    _, words = parts(views.grad_cam_grid(RECIPE, image_files, names, {"teacher": (flat, classes)}))
    assert words == [sentence]


def test_no_mistake_is_a_figure_with_its_heading():
    asked = {"answer": (network("resnet10t"), [])}
    assert parts(views.grad_cam_grid(RECIPE, [], ["a"], asked, "0 mistakes"))[1] == ["0 mistakes"]


def test_a_heading_is_never_wider_than_its_strips():
    words = "a sentence as long as that of a model which has no map, and then some more of it"
    sheet, _ = parts(plots.image_rows({"1": ([np.zeros((8, 8, 3), np.uint8)], [""])}, words))
    assert sheet.shape[1] >= 6.5 * len(words)


def test_a_tinted_image_keeps_its_light_and_dark_and_tells_the_map_apart_even_in_black():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, 2).repeat(2, 0)
    weight = np.stack([np.zeros(256), np.ones(256)])
    seen = plots.tinted(ramp, weight)
    assert seen.dtype == np.uint8 and seen.shape == (2, 256, 3)
    bright = np.asarray(Image.fromarray(seen).convert("L")).astype(int)
    assert (np.diff(bright, axis=1) >= 0).all() and (np.ptp(bright, axis=1) > 140).all()
    red, blue = seen[..., 0].astype(int), seen[..., 2].astype(int)
    assert (blue[0] - red[0] >= 50).all() and (red[1] - blue[1] >= 50).all()
    middle = plots.tinted(ramp, np.full((2, 256), 0.5)).astype(int)
    assert np.abs(middle[0] - seen.astype(int).mean(0)).max() <= 1
