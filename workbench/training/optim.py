"""The optimizer, its parameter groups, and the average of the weights."""

import difflib
import inspect
import io
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.models import group_parameters
from torch import nn

from workbench import models, parts
from workbench.parts import PartError
from workbench.recipe import Recipe
from workbench.recipe_checks import is_part
from workbench.schedule import TrainingError
from workbench.training.lamb import LAMB

# Arguments of optimizers that options of the recipe set, or that are not for a training here.
_TAKEN = set("params lr adamw_lr weight_decay max_grad_norm".split())
_TAKEN |= set("fused foreach capturable differentiable maximize verbose".split())
_OPTIONS = {"sgd": {"momentum", "nesterov"}, "lamb": {"trust_clip", "always_adapt"}}
# What of timm.optim cannot be used, and why.
_REFUSED = {
    "adahessian": "needs second derivatives, which a step here does not compute",
    "kron": "draws random numbers that a checkpoint does not contain, so no run could resume",
    "bnb": "needs bitsandbytes and a GPU; its resume is not tested",
    "fused": "needs apex and a GPU; its resume is not tested",
}


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
    classifier = models.heads(model)
    head = classifier if recipe.head_only_epochs else ("",)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, p in named:
        no_decay = not recipe.decay_norm_and_bias and (
            p.ndim <= 1 or any(part in name for part in undecayed)
        )
        scale = scales.get(name, 1.0) * (recipe.head_lr_scale if name.startswith(classifier) else 1)
        key = no_decay, name.startswith((*head, "adapters.")), scale
        groups.setdefault(key, []).append(p)
    decayed_first = sorted(groups.items(), key=lambda group: group[0][0])
    params = [
        {"params": ps, "lr_scale": scale, "weight_decay": 0.0 if no_decay else recipe.weight_decay}
        for (no_decay, _, scale), ps in decayed_first
    ]
    return _optimizer(recipe, params, next(model.parameters()).device)


def _optimizer(
    recipe: Recipe, params: list[dict[str, Any]], device: torch.device
) -> torch.optim.Optimizer:
    args = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.optimizer_args.items()}
    args["lr"] = recipe.lr
    if is_part(recipe.optimizer):
        made = parts.load("optimizer", recipe.optimizer, **args)(params)
        if all("lr_scale" in group for group in getattr(made, "param_groups", [{}])):
            return made
        raise TypeError("it must give a torch.optim.Optimizer of the groups it is given")
    fused = {"fused": device.type in ("cpu", "cuda")}
    match recipe.optimizer:
        case "adamw":
            return torch.optim.AdamW(params, **args, **fused)
        case "lamb":  # clips inside its step
            options = recipe.model_dump(include=_OPTIONS["lamb"])
            return LAMB(params, max_grad_norm=recipe.clip_grad_norm, **options, **args)
        case "sgd":
            options = recipe.model_dump(include=_OPTIONS["sgd"])
            return torch.optim.SGD(params, **options, **args, **fused)
    if "max_grad_norm" in _signature(recipe.optimizer):  # its default clips
        args["max_grad_norm"] = recipe.clip_grad_norm
    # Each group has its own weight decay.
    return timm.optim.create_optimizer_v2(params, opt=recipe.optimizer, weight_decay=0.0, **args)


def check_optimizer(recipe: Recipe) -> None:
    """Raises TrainingError for a name or argument the optimizer does not take, or PartError."""
    name = recipe.optimizer
    if is_part(name):
        return _try_steps(recipe)
    if name in ("sgd", "adamw", "lamb") and not recipe.optimizer_args:
        return
    names = ["sgd", "adamw", "lamb", *timm.optim.list_optimizers()]
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
        names = [n for n in names if not n.startswith(tuple(_REFUSED))]
        hint = f"the nearest is {near[0]!r}" if near else f"it has {', '.join(names)}"
        raise TrainingError(f"optimizer {name!r} is not in timm.optim; {hint}")
    if why := [text for start, text in _REFUSED.items() if name.startswith(start)]:
        raise TrainingError(f"optimizer {name} {why[0]}; use another one, such as adamw")
    known = _arguments(name)
    for key, value in recipe.optimizer_args.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"the nearest is {near[0]!r}; " if near else ""
            if key in Recipe.model_fields:
                hint = f"{key} is an option of the recipe; "
            raise TrainingError(
                f"optimizer_args: {name} takes no {key!r} here; {hint}it takes {', '.join(known)}"
            )
        if _kind(value) != _kind(known[key]) and known[key] is not None:
            raise TrainingError(
                f"optimizer_args: {key} of {name} is {value!r}; give a value such as {known[key]!r}"
            )
    _try_steps(recipe)


def _try_steps(recipe: Recipe) -> None:
    """Raises TrainingError or PartError if steps of small weights fail; takes milliseconds."""
    if is_part(name := recipe.optimizer):
        parts.load("optimizer", name)
        run = lambda *how: parts.run("optimizer", name, _third_step, recipe, *how)
        plain = run(0.1)
        faults = [
            ("makes weights infinite or nan", not torch.isfinite(plain).all()),
            ("leaves a group of weights unchanged", (plain == 0.5).all(1).any()),
            ("ignores the lr of its groups", torch.equal(plain, run(0.05))),
            ("ignores the weight_decay of its groups", recipe.weight_decay and torch.equal(*plain)),
            ("steps differently after a resume", not torch.equal(plain, run(0.1, True))),
        ]
        if found := [text for text, is_so in faults if is_so]:
            raise PartError(f"optimizer {name!r} {found[0]}; workbench.parts has the contract")
        return
    what = f"optimizer {name} with optimizer_args {recipe.optimizer_args}"
    try:
        weights = _third_step(recipe, recipe.lr)
    except Exception as error:  # of any type: what an optimizer does with a wrong argument
        text = " ".join(str(error).split())[:200]
        raise TrainingError(f"{what} fails: {text}") from None
    if not torch.isfinite(weights).all():
        raise TrainingError(f"{what} makes weights infinite")


def _third_step(recipe: Recipe, lr: float, resume: bool = False) -> torch.Tensor:
    """Weights (2, n) without and with decay; with `resume` the state is saved and loaded before."""
    weights = [nn.Parameter(torch.full(shape, 0.5)) for shape in ((4,), (4, 3), (4, 3, 3, 3)) * 2]
    split = (weights[:3], 0.0), (weights[3:], 0.1)
    groups = lambda: [{"params": ps, "weight_decay": w, "lr_scale": 1.0} for ps, w in split]
    optimizer = _optimizer(recipe, groups(), torch.device("cpu"))
    for step in range(3):
        if resume and step == 2:
            torch.save(optimizer.state_dict(), saved := io.BytesIO())
            state = torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
            optimizer = _optimizer(recipe, groups(), torch.device("cpu"))
            optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for weight in weights:
            weight.grad = torch.linspace(-1, 1 + step, weight.numel()).reshape(weight.shape)
        optimizer.step()
    return nn.utils.parameters_to_vector(weights).detach().reshape(2, -1)


def _arguments(name: str) -> dict[str, Any]:
    """The arguments of an optimizer that no option of the recipe sets, with their defaults."""
    taken, known = _TAKEN | _OPTIONS.get(name, set()), _signature(name)
    return {k: v for k, v in known.items() if k not in taken and not isinstance(v, torch.dtype)}


def _signature(name: str) -> dict[str, Any]:
    ours: dict[str, Callable] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lamb": LAMB}
    kind = ours.get(name) or timm.optim.get_optimizer_class(name, bind_defaults=False)
    defaults = {} if name in ours else timm.optim.get_optimizer_info(name).defaults or {}
    return {k: p.default for k, p in inspect.signature(kind).parameters.items()} | defaults


def _kind(value: Any) -> Any:
    """What an argument must have in common with its default: the type, and the length of a list."""
    if isinstance(value, list | tuple):
        return len(value)
    return float if type(value) is int else type(value)


def lr_scales(model: nn.Module, layer_decay: float | None) -> dict[str, float]:
    """The share of lr by parameter: layer_decay to the power of the layers above it.

    Layers are timm's; the classifier is the last. Bao et al., BEiT, arXiv 2106.08254, appendix.
    Raises TrainingError for a model whose layers timm does not name.
    """
    if layer_decay is None:
        return {}
    if not hasattr(model, "group_matcher"):
        name = type(model).__name__
        raise TrainingError(f"layer_decay: timm does not name the layers of {name}; leave it out")
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
