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
    if adapters is not None:
        named += [(f"adapters.{name}", p) for name, p in adapters.named_parameters()]
    scales = lr_scales(model, recipe.layer_decay)
    # Named by timm's models: position embeddings, class tokens, bias tables.
    undecayed = getattr(model, "no_weight_decay", set)()
    # Parameters that are trained later are in other groups: torch's fused SGD needs all momenta
    # of a group to be initialised in the same step.
    head = models.heads(model) if recipe.head_only_epochs else ("",)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, p in named:
        no_decay = not recipe.decay_norm_and_bias and (
            p.ndim <= 1 or any(part in name for part in undecayed)
        )
        key = no_decay, name.startswith((*head, "adapters.")), scales.get(name, 1.0)
        groups.setdefault(key, []).append(p)
    decayed_first = sorted(groups.items(), key=lambda group: group[0][0])
    params = [
        {"params": ps, "lr_scale": scale, "weight_decay": 0.0 if no_decay else recipe.weight_decay}
        for (no_decay, _, scale), ps in decayed_first
    ]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    match recipe.optimizer:
        case "adamw":
            return torch.optim.AdamW(params, lr=recipe.lr, fused=fused)
        case "lamb":  # clips inside its step
            return LAMB(
                params,
                lr=recipe.lr,
                max_grad_norm=recipe.clip_grad_norm,
                trust_clip=recipe.trust_clip,
                always_adapt=recipe.always_adapt,
            )
    sgd = {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
    return torch.optim.SGD(params, lr=recipe.lr, **sgd, fused=fused)


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
    for average, value in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        if average.is_floating_point():
            averaged.append(average)
            current.append(value)
        else:
            average.copy_(value)
    torch._foreach_lerp_(averaged, current, 1 - decay)
