"""Grad-CAM: where in an image a network finds evidence for a class.

maps = grad_cam(model, images, targets)     # (n, H, W) float32, 0 to 1
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench import models


class ExplainError(ValueError):
    """The model has no feature map for Grad-CAM, or the targets are not among its classes."""


def grad_cam(
    model: nn.Module, images: Tensor, targets: Tensor | Sequence[int], layer: str = ""
) -> np.ndarray:
    """Maps (n, H, W), float32, 0 to 1, of the evidence in `images[i]` for the class `targets[i]`.

    `images` are normalised floats (n, 3, H, W) on the model's device. Each channel of the output of
    the module `layer`, by default the last of `layers`, is weighted with the mean gradient of the
    class's logit; their sum is clipped at 0, resized bilinearly and divided by its maximum, unless
    that is 0. Selvaraju et al., arXiv 1610.02391, section 3. Mode, gradients and weights of the
    model are unchanged. Raises ExplainError, or ModelError for an unknown module.
    """
    if not isinstance(targets, Tensor):
        targets = torch.from_numpy(np.array(targets, np.int64))
    targets = targets.to(images.device, torch.long)
    if images.ndim != 4 or targets.shape != images.shape[:1]:
        raise ExplainError(
            f"images {tuple(images.shape)} and targets {tuple(targets.shape)}; expected "
            "(n, 3, H, W) and one class number per image"
        )
    if not len(images):
        return np.zeros((0, *images.shape[2:]), np.float32)
    layouts, classes = _feature_maps(model, images, layer)
    if not 0 <= targets.min() <= targets.max() < classes:
        raise ExplainError(
            f"targets {targets.min()} to {targets.max()}; the model has classes 0 to {classes - 1}"
        )
    kind = type(_unwrap(model)[1]).__name__
    if not layouts:
        raise ExplainError(f"the prediction of {kind} depends on no feature map")
    name = layer or list(layouts)[-1]
    if name not in layouts:
        raise ExplainError(
            f"module {name} of {kind} has no feature map that the prediction depends on; "
            f"take {', '.join(list(layouts)[-4:])}"
        )
    outputs = []

    def record(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1].clone()  # the next module may work in place

    with _frozen(model), torch.enable_grad():
        hook = models.module(model, name).register_forward_hook(record)
        try:
            logits = model(images).gather(1, targets[:, None])
        finally:
            hook.remove()
        [gradients] = torch.autograd.grad(logits.sum(), outputs[-1])
    maps, gradients = (layouts[name].channels_first(x) for x in (outputs[-1], gradients))
    cam = (gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    cam = F.interpolate(cam.detach().float(), images.shape[2:], mode="bilinear")[:, 0]
    maximum = cam.amax((1, 2), keepdim=True)
    return (cam / torch.where(maximum > 0, maximum, 1)).cpu().numpy()


def layers(model: nn.Module, images: Tensor) -> list[str]:
    """The names of modules with a feature map that the prediction depends on, in forward order.

    Only children of the model and their children: stages and blocks. A feature map has more than
    one position, as (n, c, h, w), (n, h, w, c) or tokens (n, prefix + h * w, c). Modules after the
    pooling are left out, and the last block of a transformer that uses only its class token, where
    all gradients of positions are 0.
    """
    return list(_feature_maps(model, images)[0])


class _Layout(NamedTuple):
    """The layout of a feature map."""

    size: tuple[int, int]
    channels_last: bool = False
    prefix: int | None = None  # for tokens: the number of those before the positions

    def channels_first(self, output: Tensor) -> Tensor:
        """The feature map as (n, c, h, w)."""
        if self.prefix is not None:
            output = output[:, self.prefix :].unflatten(1, self.size)
        return output.permute(0, 3, 1, 2) if self.channels_last else output


def _feature_maps(
    model: nn.Module, images: Tensor, layer: str = ""
) -> tuple[dict[str, _Layout], int]:
    """The layouts of `layers` and of `layer`, in forward order; and the number of classes.

    One forward and backward pass of an image of noise.
    """
    prefix, inner = _unwrap(model)
    names = [name for name, _ in inner.named_modules() if name.count(".") < 2]
    names = {f"{prefix}{name}".rstrip(".") for name in names} | {layer}
    outputs: dict[str, tuple[_Layout | None, Tensor]] = {}

    def record(name: str, module: nn.Module, args: tuple, output: object) -> None:
        outputs.pop(name, None)  # a module that is called twice counts at its last call
        if isinstance(output, Tensor) and output.requires_grad:
            outputs[name] = _layout(output, inner, images), output

    noise = torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    with _frozen(model), torch.enable_grad(), contextlib.ExitStack() as hooks:
        for name in names - {""}:
            hook = functools.partial(record, name)
            hooks.callback(models.module(model, name).register_forward_hook(hook).remove)
        logits = model(noise.to(images).requires_grad_())
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ExplainError(f"{type(model).__name__} gives no logits (n, classes)")
        # The children of a module without a feature map, such as a pooling head, are no stages.
        heads = {name for name, (layout, _) in outputs.items() if not layout} - {prefix[:-1]}
        kept = {
            name: (layout, output)
            for name, (layout, output) in outputs.items()
            if layout and (name == layer or name.rpartition(".")[0] not in heads)
        }
        inputs = [output for _, output in kept.values()]
        gradients = torch.autograd.grad(logits.max(), inputs, allow_unused=True) if inputs else []
    layouts = {
        name: layout
        for (name, (layout, _)), gradient in zip(kept.items(), gradients, strict=True)
        if gradient is not None and layout.channels_first(gradient).any()
    }
    return layouts, logits.shape[1]


def _layout(output: Tensor, model: nn.Module, images: Tensor) -> _Layout | None:
    """The layout of an output whose height to width is that of the image; None for others."""
    height, width = images.shape[2:]
    mismatch = lambda h, w: abs(math.log(h / w * width / height))
    off_by_one = lambda side: math.log(1 + 1 / side)  # sides are rounded at every stride
    if output.ndim == 4:
        first, last = tuple(output.shape[2:]), tuple(output.shape[1:3])
        channels_last = mismatch(*last) < mismatch(*first)
        if mismatch(*last) == mismatch(*first):
            channels_last = getattr(model, "output_fmt", "") == "NHWC"
        size = last if channels_last else first
        if math.prod(size) > 1 and mismatch(*size) <= off_by_one(min(size)):
            return _Layout(size, channels_last)
    if output.ndim == 3:
        for prefix in (getattr(model, "num_prefix_tokens", 0), 0):
            positions = output.shape[1] - prefix
            h = max(1, round(math.sqrt(max(0, positions) * height / width)))
            w = positions // h
            if positions > 1 and h * w == positions and mismatch(h, w) <= off_by_one(h):
                return _Layout((h, w), channels_last=True, prefix=prefix)
    return None


def _unwrap(model: nn.Module) -> tuple[str, nn.Module]:
    """The model inside wrappers with a single child, and the prefix of its modules' names."""
    prefix = ""
    while len(children := list(model.named_children())) == 1:
        name, model = children[0]
        prefix += f"{name}."
    return prefix, model


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of weights."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    with models.eval_mode(model):
        try:
            for p in trainable:
                p.requires_grad_(False)
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)
