"""Grad-CAM: where in an image a network finds evidence for a class.

maps = grad_cam(model, images, targets)     # (n, H, W) float32, 0 to 1
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench import models


class ExplainError(ValueError):
    """The model has no feature map for Grad-CAM, or the targets do not fit the images."""


def grad_cam(
    model: nn.Module, images: Tensor, targets: Tensor | np.ndarray | Sequence[int]
) -> np.ndarray:
    """Maps (n, H, W), float32, 0 to 1, of the evidence in `images[i]` for the class `targets[i]`.

    `images` are normalised floats (n, 3, H, W) on the model's device. Each channel of the last
    feature map is weighted with the mean gradient of the class's logit; their sum is clipped at 0,
    resized bilinearly and divided by its maximum, unless that is 0. Selvaraju et al., arXiv
    1610.02391, section 3. Mode, gradients and weights of the model are unchanged. Raises
    ExplainError.
    """
    targets = torch.as_tensor(targets, dtype=torch.long, device=images.device)
    if targets.shape != images.shape[:1]:
        raise ExplainError(f"{len(images)} images, but class numbers {tuple(targets.shape)}")
    name, layout = last_feature_map(model, images)
    outputs = []

    def record(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # below the layer no graph is needed
        outputs.append(output.detach().requires_grad_())
        return outputs[-1].clone()  # the next module may work in place

    hook = model.get_submodule(name).register_forward_hook(record)
    with hook, models.eval_mode(model), torch.no_grad():
        logits = model(images).gather(1, targets[:, None])
        [gradients] = torch.autograd.grad(logits.sum(), outputs[-1])
    maps, gradients = layout.channels_first(outputs[-1]), layout.channels_first(gradients)
    cam = (gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    cam = F.interpolate(cam.detach().float(), images.shape[2:], mode="bilinear")[:, 0]
    maximum = cam.amax((1, 2), keepdim=True)
    return (cam / torch.where(maximum > 0, maximum, 1)).cpu().numpy()


class Layout(NamedTuple):
    """The layout of a feature map."""

    size: Sequence[int]
    channels_last: bool = False
    prefix: int | None = None  # for tokens: the number of those before the positions

    def channels_first(self, output: Tensor) -> Tensor:
        """The feature map as (n, c, h, w)."""
        if self.prefix is not None:
            output = output[:, self.prefix :].unflatten(1, self.size)
        return output.permute(0, 3, 1, 2) if self.channels_last else output


def last_feature_map(model: nn.Module, images: Tensor) -> tuple[str, Layout]:
    """The name and layout of the last module with a feature map that the prediction depends on.

    Only children of the model and their children are considered: stages and blocks. A feature map
    has more than one position, as (n, c, h, w), (n, h, w, c) or tokens (n, prefix + h * w, c).
    Modules after the pooling are no candidates, nor is the last block of a transformer that uses
    only its class token, where all gradients of positions are 0. Raises ExplainError.
    """
    inner, prefix = model, ""
    while len(children := list(inner.named_children())) == 1:  # a wrapper
        prefix += f"{children[0][0]}."
        inner = children[0][1]
    names = [name for name, _ in inner.named_modules() if name and name.count(".") < 2]
    outputs: dict[str, tuple[Layout | None, Tensor]] = {}

    def record(name: str, module: nn.Module, args: tuple, output: object) -> None:
        outputs.pop(name, None)  # a module that is called twice counts at its last call
        if isinstance(output, Tensor) and output.requires_grad:
            outputs[name] = _layout(output, inner, images), output

    noise = torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    with models.eval_mode(model), torch.enable_grad(), contextlib.ExitStack() as hooks:
        for name in names:
            hook = functools.partial(record, name)
            hooks.enter_context(inner.get_submodule(name).register_forward_hook(hook))
        logit = model(noise.to(images).requires_grad_()).max()
    # The children of a module without a feature map, such as a pooling head, are no stages.
    heads = {name for name, (layout, _) in outputs.items() if not layout}
    found = [
        (prefix + name, layout, output)
        for name, (layout, output) in outputs.items()
        if layout and name.rpartition(".")[0] not in heads
    ]
    inputs = [output for *_, output in found]
    gradients = torch.autograd.grad(logit, inputs, allow_unused=True) if inputs else []
    for (name, layout, _), gradient in zip(found[::-1], gradients[::-1], strict=True):
        if gradient is not None and layout.channels_first(gradient).any():
            return name, layout
    raise ExplainError("the prediction depends on no feature map")


def _layout(output: Tensor, model: nn.Module, images: Tensor) -> Layout | None:
    """The layout of an output whose height to width is that of the image; None for others."""
    height, width = images.shape[2:]
    mismatch = lambda size: abs(math.log(size[0] / size[1] * width / height))
    # Sides are rounded at every stride.
    fits = lambda size: math.prod(size) > 1 and mismatch(size) <= math.log(1 + 1 / min(size))
    if output.ndim == 4:
        first, last = output.shape[2:], output.shape[1:3]
        channels_last = mismatch(last) < mismatch(first)
        if mismatch(last) == mismatch(first):
            channels_last = getattr(model, "output_fmt", "") == "NHWC"
        size = last if channels_last else first
        return Layout(size, channels_last) if fits(size) else None
    for prefix in (getattr(model, "num_prefix_tokens", 0), 0) if output.ndim == 3 else ():
        positions = output.shape[1] - prefix
        h = max(1, round(math.sqrt(max(0, positions) * height / width)))
        size = (h, positions // h)
        if positions > 0 and math.prod(size) == positions and fits(size):
            return Layout(size, channels_last=True, prefix=prefix)
    return None
