"""Grad-CAM: the formula, the layer found, what stays unchanged, what is refused."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from workbench.evaluation.grad_cam import ExplainError, grad_cam, last_feature_map


def network(name: str, **options) -> nn.Module:
    """A timm model with random norms, so that no layer gives zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=7, **options)
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):  # timm initialises some with 0
                nn.init.uniform_(part.weight, 0.5, 1.0)
                nn.init.uniform_(part.running_mean, -0.1, 0.1)
    return model.eval()


def noise(count: int, *size: int) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def square_tokens(output: torch.Tensor) -> torch.Tensor:
    """Tokens without the class token as (n, c, h, w)."""
    side = round((output.shape[1] - 1) ** 0.5)
    return output[:, 1:].reshape(len(output), side, side, -1).permute(0, 3, 1, 2)


def slow_reference(model, images, targets, layer, layout) -> np.ndarray:
    """Section 3 of the paper, one image at a time."""
    maps = []
    for image, target in zip(images, targets, strict=True):
        outputs = []
        # Returns a copy: the next module may work in place.
        hook = dict(model.named_modules())[layer].register_forward_hook(
            lambda module, args, output, outputs=outputs: outputs.append(output) or output.clone()
        )
        logit = model(image[None])[0, target]
        hook.remove()
        [gradient] = torch.autograd.grad(logit, outputs[-1])
        features, gradient = layout(outputs[-1])[0], layout(gradient)[0]
        cam = torch.zeros(features.shape[1:])
        for channel in range(len(features)):
            cam += gradient[channel].mean() * features[channel].detach()
        cam = F.interpolate(cam.clamp(min=0)[None, None], image.shape[1:], mode="bilinear")[0, 0]
        maps.append((cam / cam.max() if cam.max() > 0 else cam).detach().numpy())
    return np.stack(maps)


CASES = [  # model, height and width of its images, the layer found, its layout
    ("resnet18", (64, 64), "layer4", lambda output: output),
    ("resnet18", (64, 160), "layer4", lambda output: output),
    ("mobilenetv3_small_100", (96, 96), "blocks", lambda output: output),
    ("mobilenetv2_035", (64, 64), "bn2", lambda output: output),
    ("test_convnext", (64, 64), "norm_pre", lambda output: output),
    ("test_vit", (160, 160), "blocks.4", square_tokens),
    ("swin_tiny_patch4_window7_224", (224, 224), "norm", lambda x: x.permute(0, 3, 1, 2)),
]


@pytest.mark.parametrize("name, size, layer, layout", CASES, ids=[case[0] for case in CASES])
def test_the_map_is_that_of_the_paper_at_the_last_feature_map(name, size, layer, layout):
    small = {"depths": (1, 1, 2, 1), "embed_dim": 24} if name.startswith("swin") else {}
    model, images, targets = network(name, **small), noise(4, *size), [0, 1, 2, 3]
    expected = slow_reference(model, images, targets, layer, layout)
    assert last_feature_map(model, images)[0] == layer
    maps = grad_cam(model, images, targets)
    assert maps.dtype == np.float32 and maps.shape == (4, *size)
    np.testing.assert_allclose(maps, expected, atol=2e-5)
    assert (expected.max((1, 2)) == 1).sum() >= 2, "this case would pass with zeros"
    assert not np.allclose(grad_cam(model, images, [1, 4, 0, 2]), maps, atol=0.1)


@pytest.mark.parametrize(
    "name, side, options, layer",
    [
        ("resnet10t", 32, {}, "layer3"),  # its last stage has one position
        ("levit_128s", 224, {}, "stages"),  # tokens, without a class token
        ("vit_tiny_patch16_224", 224, {}, "blocks.10"),  # the last one feeds only the class token
        ("deit_tiny_distilled_patch16_224", 224, {}, "blocks.10"),
        ("cait_xxs24_224", 224, {}, "blocks"),  # followed by layers on one token
        ("densenet121", 64, {}, "features"),
        ("test_vit", 160, {"global_pool": "map", "class_token": False}, "norm"),  # no pooling head
    ],
)
def test_the_layer_found_is_a_stage_or_block_before_the_pooling(name, side, options, layer):
    assert last_feature_map(network(name, **options), noise(1, side, side))[0] == layer


class AttentionHeads(nn.Module):
    """(n, 16, h, w) to (n, 2 heads, h * w, 8)."""

    def forward(self, maps):
        return maps.flatten(2).mT.unflatten(2, (2, 8)).transpose(1, 2)


class Twice(nn.Module):
    """Calls one module twice."""

    def __init__(self):
        super().__init__()
        self.act, self.one, self.two = nn.ReLU(), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, images):
        return self.fc(self.act(self.two(self.act(self.one(images)))).mean((2, 3)))


def test_four_dimensions_need_the_shape_of_the_image_and_the_last_call_of_a_module_counts():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), AttentionHeads(), nn.Flatten(), nn.Linear(1024, 3)
    )
    assert last_feature_map(model, noise(1, 16, 16))[0] == "1"
    assert last_feature_map(Twice(), noise(1, 8, 8))[0] == "act"


class Resized(nn.Module):
    """A wrapper that resizes the images."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(F.interpolate(images, (160, 160), mode="bilinear"))


def test_the_layer_is_found_inside_a_wrapper():
    assert last_feature_map(Resized(network("resnet10t")), noise(1, 40, 40))[0] == "model.layer4"
    model, images = network("test_vit"), noise(2, 40, 40)
    inside = grad_cam(model, F.interpolate(images, (160, 160), mode="bilinear"), [1, 2])
    outside = grad_cam(Resized(model), images, [1, 2])
    assert outside.shape == (2, 40, 40)
    assert np.corrcoef(inside[:, 2::4, 2::4].ravel(), outside.ravel())[0, 1] > 0.99


def test_a_map_without_evidence_is_zero():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 2))  # fmt: skip
    with torch.no_grad():
        model[0].weight.fill_(0.1)
        model[0].bias.fill_(1)
        model[4].weight.copy_(torch.tensor([[1.0] * 4, [-1.0] * 4]))
    maps = grad_cam(model, noise(2, 8, 8), [0, 1])
    assert maps[0].max() == 1 and not maps[1].any() and np.isfinite(maps).all()


def test_mode_weights_gradients_hooks_and_random_state_are_unchanged():
    model, images = network("resnet18").train(), noise(2, 64, 64)
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]
    rng_state = torch.random.get_rng_state()
    with torch.no_grad():
        maps = grad_cam(model, images, [1, 2])
        assert not torch.is_grad_enabled()
    with pytest.raises(RuntimeError):
        grad_cam(model, images, [1, 7])
    assert torch.is_grad_enabled() and torch.equal(rng_state, torch.random.get_rng_state())
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert not any(part._forward_hooks or part._backward_hooks for part in model.modules())
    np.testing.assert_array_equal(grad_cam(model.eval(), images, [1, 2]), maps)


def test_no_graph_is_built_below_the_layer():
    """Otherwise sixteen images at 224 would need the memory of a training step."""
    model, seen = network("resnet18"), []
    for part in (model.layer3, model.fc):
        part.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    grad_cam(model, noise(2, 64, 64), [1, 2])
    assert seen[2:] == [False, True]  # after the pass with one image that finds the layer


def test_frozen_models_and_channels_last_give_the_same_map():
    model, images = network("resnet18"), noise(2, 64, 64)
    expected = grad_cam(model, images, torch.tensor([1, 2]))
    model.requires_grad_(False)
    np.testing.assert_array_equal(grad_cam(model, images, np.array([1, 2])), expected)
    model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    np.testing.assert_allclose(grad_cam(model, images, [1, 2]), expected, atol=1e-4)


def test_models_without_a_feature_map_and_targets_that_do_not_fit_are_refused():
    flat, images = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 5)), noise(2, 64, 64)
    with pytest.raises(ExplainError, match="the prediction depends on no feature map"):
        grad_cam(flat, images, [0, 1])
    for targets in ([0], [[0, 1]]):
        with pytest.raises(ExplainError, match="2 images, but class numbers"):
            grad_cam(network("resnet18"), images, targets)
