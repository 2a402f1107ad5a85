"""The optimizer, its parameter groups, and the average of the weights."""

import torch
from timm.models import group_parameters
from torch import nn

from workbench import models
from workbench.recipe import Recipe
from workbench.training.lamb import LAMB


def create_optimizer(
    recipe: Recipe, model: nn.Module, adapters: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer over what is not frozen, and over the adapters of distillation.

    The training sets the lr of a group to that of the schedule times its lr_scale.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = lr_scales(model, recipe.layer_decay)
    if adapters is not None:
        named += [(f"adapters.{name}", p) for name, p in adapters.named_parameters()]
    # Named by timm's models: position embeddings, class tokens, bias tables.
    spared = getattr(model, "no_weight_decay", set)()
    # Parameters that are trained later have groups of their own: torch's fused SGD wants all
    # momenta of a group to be initialised in the same step.
    head = models.heads(model) if recipe.head_only_epochs else ("",)
    parts: dict[tuple[bool, bool, float], list] = {}
    for name, p in named:
        free = not recipe.decay_norm_and_bias and (
            p.ndim <= 1 or any(part in name for part in spared)
        )
        first = name.startswith((*head, "adapters."))
        parts.setdefault((free, first, scales.get(name, 1.0)), []).append(p)
    groups = [
        {"params": kept, "lr_scale": scale, **({"weight_decay": 0.0} if free else {})}
        for (free, _, scale), kept in sorted(parts.items(), key=lambda part: part[0][0])
    ]
    shared = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    match recipe.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups, **shared, fused=fused)
        case "lamb":  # clips inside its step
            return LAMB(
                groups,
                **shared,
                max_grad_norm=recipe.clip_grad_norm,
                trust_clip=recipe.trust_clip,
                always_adapt=recipe.always_adapt,
            )
    return torch.optim.SGD(
        groups, **shared, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=fused
    )


def lr_scales(model: nn.Module, layer_decay: float | None) -> dict[str, float]:
    """The share of lr by parameter: layer_decay to the power of the layers above it.

    Layers are timm's; the classifier is the last. Bao et al., BEiT, arXiv 2106.08254, appendix.
    """
    if layer_decay is None:
        return {}
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    top = max(layers.values())
    return {name: layer_decay ** (top - layer) for name, layer in layers.items()}


def ema_update(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model, norm statistics included, counters copied.

    Constant decay from the first step on, as UP's `linear` EMA with its default warmup.
    """
    averaged, current = [], []
    for kept, value in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.is_floating_point():
            averaged.append(kept)
            current.append(value)
        else:
            kept.copy_(value)
    torch._foreach_lerp_(averaged, current, 1 - decay)
