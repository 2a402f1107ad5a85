"""Where in an image the evidence for a class lies: Grad-CAM of any network that keeps places.

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
    """No map can be had of this model or for these classes; the text says what would do."""


def grad_cam(
    model: nn.Module, images: Tensor, targets: Tensor | Sequence[int], layer: str = ""
) -> np.ndarray:
    """Maps (n, H, W), float32, 0 to 1, of what speaks for the class `targets[i]` of `images[i]`.

    `images` are normalised floats (n, 3, H, W) on the model's device. What the module `layer` gives
    is weighted by channel with the mean gradient of the class's logit, summed, cut below 0, resized
    bilinearly and divided by its maximum; a map of zeros stays one. Selvaraju et al., arXiv
    1610.02391, section 3. By default `layer` is the last of `layers`. Mode, gradients and weights
    of the model stay as they were. Raises ExplainError, or ModelError for an unknown module.
    """
    from captum.attr import LayerGradCam  # here, because it takes pyplot along

    if not isinstance(targets, Tensor):
        targets = torch.from_numpy(np.array(targets, np.int64))
    targets = targets.to(images.device, torch.long)
    if images.ndim != 4 or targets.shape != images.shape[:1]:
        raise ExplainError(
            f"images {tuple(images.shape)} and targets {tuple(targets.shape)} do not belong "
            "together; wanted (n, 3, H, W) and a class number for each"
        )
    if not len(images):
        return np.zeros((0, *images.shape[2:]), np.float32)
    found, classes = _find(model, images, layer)
    if not 0 <= targets.min() <= targets.max() < classes:
        raise ExplainError(
            f"targets {targets.min()} to {targets.max()}, and the model has the classes 0 to "
            f"{classes - 1}; take numbers of its classes"
        )
    kind = type(_inner(model)[1]).__name__
    if not found:
        raise ExplainError(f"the answer of {kind} rests on no places of a map, so it has none")
    name = layer or list(found)[-1]
    if name not in found:
        raise ExplainError(
            f"module {name} of {kind} gives no map whose places the answer rests on; "
            f"take {', '.join(list(found)[-4:])}"
        )
    maps = nn.Identity()  # what captum listens to: (n, c, h, w), however the module lays it out

    def through(module: nn.Module, given: tuple, out: Tensor) -> Tensor:
        return found[name].back(out, maps(found[name].maps(out)))

    with _still(model):
        hook = models.module(model, name).register_forward_hook(through)
        try:
            cam = LayerGradCam(model, maps).attribute(images, targets, relu_attributions=True)
        finally:
            hook.remove()
    cam = F.interpolate(cam.detach().float(), images.shape[2:], mode="bilinear")[:, 0]
    most = cam.amax((1, 2), keepdim=True)
    return (cam / torch.where(most > 0, most, 1)).cpu().numpy()


def layers(model: nn.Module, images: Tensor) -> list[str]:
    """The names of modules that grad_cam takes without being asked, in the order they work.

    They are children of the model, or children of those: stages and blocks, not the branches
    inside one. Each gives a map of more than one place, as (n, c, h, w), (n, h, w, c) or tokens
    (n, prefix + h * w, c), and the answer depends on its places. So what comes after the pooling
    is not among them, nor the last block of a transformer that reads its class token alone, where
    every gradient is zero: there the last is the block before.
    """
    return list(_find(model, images)[0])


class _Layout(NamedTuple):
    """How a module lays out its map."""

    tokens: bool  # (n, prefix + h * w, c)
    last: bool  # channels last: (n, h, w, c)
    prefix: int
    size: tuple[int, int]

    def maps(self, out: Tensor) -> Tensor:
        """What the module gave, as (n, c, h, w)."""
        if self.tokens:
            return out[:, self.prefix :].unflatten(1, self.size).permute(0, 3, 1, 2)
        return out.permute(0, 3, 1, 2) if self.last else out

    def back(self, out: Tensor, maps: Tensor) -> Tensor:
        """The maps as the module gave them, with the tokens that stand for no place."""
        if self.tokens:
            return torch.cat([out[:, : self.prefix], maps.flatten(2).mT], 1)
        return maps.permute(0, 2, 3, 1) if self.last else maps


def _find(model: nn.Module, images: Tensor, layer: str = "") -> tuple[dict[str, _Layout], int]:
    """The layouts of `layers`, and of `layer` if it has one, in order; and the number of classes.

    One forward and backward of an image of noise.
    """
    start, inner = _inner(model)
    names = [name for name, _ in inner.named_modules() if name.count(".") < 2]
    names = {f"{start}{name}".rstrip(".") for name in names} - {""}
    if layer:
        models.module(model, layer)
    noise = torch.randn(1, *images.shape[1:], generator=torch.Generator().manual_seed(0))
    said: dict[str, tuple[_Layout | None, Tensor]] = {}

    def note(name: str, module: nn.Module, given: tuple, out: object) -> None:
        said.pop(name, None)  # a module that works twice stands at its second place
        if isinstance(out, Tensor) and out.requires_grad:
            said[name] = _layout(out, inner, images), out

    with _still(model), torch.enable_grad():
        hooks = [
            models.module(model, name).register_forward_hook(functools.partial(note, name))
            for name in names | ({layer} - {""})
        ]
        try:
            logits = model(noise.to(images).requires_grad_())
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ExplainError(f"{type(model).__name__} gives no logits (n, classes)")
        # What works inside a module that gives no map, a head that pools, is no stage.
        heads = {name for name, (layout, _) in said.items() if not layout} - {start[:-1]}
        kept = {
            name: (layout, out)
            for name, (layout, out) in said.items()
            if layout and (name == layer or name.rpartition(".")[0] not in heads)
        }
        outs = [out for _, out in kept.values()]
        grads = torch.autograd.grad(logits.max(), outs, allow_unused=True) if outs else []
    pairs = zip(kept.items(), grads, strict=True)
    found = {
        name: layout
        for (name, (layout, _)), grad in pairs
        if grad is not None and layout.maps(grad).any()
    }
    return found, logits.shape[1]


def _layout(out: Tensor, model: nn.Module, images: Tensor) -> _Layout | None:
    """How a module's output is a map of the image: its height to width are the image's."""
    height, width = images.shape[2:]
    unlike = lambda h, w: abs(math.log(h / w * width / height))  # noqa: E731
    if out.ndim == 4:
        first, second = out.shape[2:], out.shape[1:3]
        last = unlike(*second) < unlike(*first) or (
            unlike(*second) == unlike(*first) and getattr(model, "output_fmt", "") == "NHWC"
        )
        size = tuple(second if last else first)
        # Sides are rounded at every stride, so a small map of an oblong image may be off by one.
        if math.prod(size) > 1 and unlike(*size) <= math.log(1 + 1 / min(size)):
            return _Layout(False, last, 0, size)
    if out.ndim == 3:
        for prefix in (getattr(model, "num_prefix_tokens", 0), 0):
            places = out.shape[1] - prefix
            h = max(1, round(math.sqrt(max(0, places) * height / width)))
            if places > 1 and places % h == 0 and unlike(h, places // h) <= math.log(1 + 1 / h):
                return _Layout(True, False, prefix, (h, places // h))
    return None


def _inner(model: nn.Module) -> tuple[str, nn.Module]:
    """The model inside what only wraps it, behind the beginning of its modules' names."""
    start = ""
    while len(parts := list(model.named_children())) == 1:
        name, model = parts[0]
        start += f"{name}."
    return start, model


@contextlib.contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradient of a weight: a graph begins where one is asked for."""
    learning = [p for p in model.parameters() if p.requires_grad]
    with models.eval_mode(model):
        try:
            for p in learning:
                p.requires_grad_(False)
            yield
        finally:
            for p in learning:
                p.requires_grad_(True)
