"""Exported networks compute what torch, Pillow and integer arithmetic compute."""

import numpy as np
import onnx
import pytest
import timm
import torch
from helpers import noise_image
from onnx.reference import ReferenceEvaluator
from torch import nn

from workbench import export, training
from workbench.export import ExportError
from workbench.export.onnx import (
    Network,
    onnx_runner,
    to_onnx,
    to_onnx_with_preprocessing,
    to_torch_export,
)
from workbench.recipe import Recipe


def network_of(model: nn.Module, uint8_input: bool = False, **options) -> Network:
    return Network(model, export.preprocess(Recipe(**options), uint8_input)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    "test_resnet resnet18 resnet50d mobilenetv3_large_100 convnext_tiny vit_small_patch16_224 "
    "swin_tiny_patch4_window7_224".split(),
)
def test_onnx_logits_equal_torch_at_any_batch_size(name):
    size, model = 224 if "224" in name else 64, timm.create_model(name, num_classes=10).eval()
    network = network_of(model, image_size=size, val_resize=size)
    run = onnx_runner(export.to_onnx(network))
    for batch in (1, 5):
        data = network.to_input(network.noise(batch))
        with torch.no_grad():
            expected = model(data).numpy()
        assert np.abs(run(data) - expected).max() <= 1e-4 * max(1, np.abs(expected).max())


@pytest.mark.slow
def test_uint8_input_is_normalised_inside_the_network():
    model = timm.create_model("test_resnet", num_classes=10).eval()
    network = network_of(model, uint8_input=True)
    noise = network.noise(3)
    assert network.to_input(noise).dtype == torch.uint8
    with torch.no_grad():
        expected = model(training.Normalize(Recipe(), torch.device("cpu"))(noise)).numpy()
    np.testing.assert_allclose(onnx_runner(export.to_onnx(network))(noise), expected, atol=1e-4)


@pytest.mark.parametrize(
    "interpolation", ["bilinear", pytest.param("bicubic", marks=pytest.mark.slow)]
)
def test_preprocessing_in_onnx_equals_pillow_to_one_grey_level(interpolation):
    recipe = Recipe(image_size=24, val_resize=27, interpolation=interpolation)
    network = Network(nn.Flatten(), export.preprocess(recipe, uint8_input=True)).eval()
    run = onnx_runner(to_onnx_with_preprocessing(network))
    transform = training.eval_transform(recipe)
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (recipe.mean, recipe.std))
    for size in [(90, 60), (60, 90), (27, 27), (28, 27), (29, 27), (29, 31), (400, 33), (9, 8)]:
        image = noise_image(*size)
        expected = np.asarray(transform(image), float).transpose(2, 0, 1)
        logits = run(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
        difference = np.abs((logits.reshape(3, 24, 24) * std + mean) * 255 - expected)
        assert difference.max() < 1.01 and difference.mean() < 0.4, size


def test_the_score_is_the_softmax_of_the_logits():
    score, logits = network_of(nn.Flatten())(torch.randn(4, 3, 2, 2))
    torch.testing.assert_close(score, torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))


@pytest.mark.parametrize("to_file", [to_onnx, to_torch_export])
def test_an_exported_file_names_no_path_of_this_machine(to_file):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    content = to_file(network_of(model))
    assert len(content) > 100_000 and b".py" not in content and b"site-packages" not in content


def test_int8_equals_integer_arithmetic_also_for_large_products():
    """Compared with onnx's numpy evaluator: weights of one sign and bright images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    for part in (model[0], model[3]):
        nn.init.uniform_(part.weight, 0.8, 1.0)
    network = network_of(model, image_size=8, val_resize=8, mean=[0, 0, 0], std=[1, 1, 1])
    data = network.to_input(torch.randint(200, 256, (16, 3, 8, 8), dtype=torch.uint8)).numpy()
    content, _ = export.to_int8(export.to_onnx(network), [data])
    _, expected = ReferenceEvaluator(onnx.load_from_string(content)).run(None, {"data": data})
    step = np.unique(np.diff(np.unique(expected.ravel()))).min()  # of the quantised logits
    difference = onnx_runner(content)(torch.from_numpy(data)) - expected
    assert np.abs(difference).max() <= 1.01 * step
    assert np.abs(expected - network(torch.from_numpy(data))[1].detach().numpy()).max() < 5 * step


def test_networks_that_a_format_cannot_express_are_refused():
    with pytest.raises(ExportError, match="lanczos cannot be exported to ONNX"):
        to_onnx_with_preprocessing(network_of(nn.Flatten(), interpolation="lanczos"))
    network = network_of(nn.Sequential(nn.AvgPool2d(32), nn.Flatten()))
    with pytest.raises(ExportError, match="no node computes in int8"):
        export.to_int8(export.to_onnx(network), [network.to_input(network.noise(2)).numpy()])
