"""The model of a recipe: as its training starts, or as a run left it."""

from pathlib import Path

import timm
import torch
from torch import nn

from workbench import ROOT, models, runs
from workbench.recipe import Recipe
from workbench.recipe_checks import is_part

ARCHITECTURE = {"image_size", "deep_stem", "avg_down", "model_args"}


def create_model(recipe: Recipe, num_classes: int, folder: Path | None = None) -> nn.Module:
    """The recipe's model at its seed's initial weights; a custom one from a run's `folder`.

    Raises ModelError, also for its sizes, and PartError.
    """
    options = {"drop_path": recipe.drop_path, "dropout": recipe.dropout, "seed": recipe.seed}
    options |= recipe.model_dump(include=ARCHITECTURE) | {"folder": folder}
    model = models.create(recipe.model, num_classes, **options)
    if not is_part(recipe.model):
        takes = model.default_cfg["input_size"][-1]
        models.check_size(model, recipe.image_size, "image_size", takes)
    if recipe.val_image_size:
        models.check_size(model, recipe.val_image_size, "val_image_size", recipe.image_size)
    return model


def load_run_model(
    recipe: Recipe, run: runs.Run, num_classes: int, weights: str = ""
) -> tuple[nn.Module, str, str]:
    """A run's model in evaluation mode; "raw" or "ema"; and the file the weights are from.

    From the last checkpoint, or from the best epoch if there is none; `Run.choose_weights` chooses
    where both kinds are saved. Raises RunError, also for nan and for weights that do not fit.
    """
    state, file = run.load_checkpoint(), "last.pt"
    if isinstance(state, dict):
        saved = {"raw": state.get("model"), "ema": state.get("ema")}
    elif state is not None:
        raise runs.RunError(f"{run.file(file)} is not a checkpoint of a training")
    elif run.file(file := "best.safetensors").exists():
        saved = dict([run.load_weights(file)])
    else:
        raise runs.RunError(f"{run.path} has no weights yet (last.pt); train it first")
    saved = {kind: tensors for kind, tensors in saved.items() if tensors}
    kind = weights or next(iter(saved), "raw")
    if len(saved) == 2:
        kind, _ = run.choose_weights(weights)
    if kind not in saved:
        have = " and ".join(saved) or "none"
        raise runs.RunError(f"{run.file(file)} has no {kind} weights, only {have}")
    model = create_model(recipe, num_classes, run.path)
    try:
        model.load_state_dict(saved[kind])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise runs.RunError(
            f"{run.file(file)} does not fit recipe.yaml and environment.json, {recipe.model} with "
            f"{num_classes} classes: {' '.join(str(error).split())[:300]}"
        ) from None
    for name, values in model.state_dict().items():
        if not torch.isfinite(values).all():
            raise runs.RunError(f"{run.file(file)}: {name} contains nan or infinity")
    return model.eval(), kind, file


def build_initial_model(
    recipe: Recipe, classes: list[str]
) -> tuple[nn.Module, models.Loaded | None]:
    """The recipe's model before its first step, and a report of the weights it starts from.

    The report is None for weights that are initialised from the seed. Raises ModelError.
    """
    model = create_model(recipe, len(classes))
    if recipe.weights:
        force = recipe.allow_partial_weights
        loaded = models.load(model, recipe.weights, classes=classes, force=force)
    elif recipe.pretrained:
        architecture = recipe.model_dump(include=ARCHITECTURE)
        loaded = models.load_published(model, recipe.model, **architecture)
    else:
        return model, None
    loaded.note = other_normalization(recipe)
    tensors = model.state_dict()
    loaded.digest = models.digest({name: tensors[name] for name in loaded.loaded})
    return model, loaded


def other_normalization(recipe: Recipe) -> str:
    """How mean and std differ from those the initial weights were trained with; "" if equal."""
    ours = theirs = {"mean": recipe.mean, "std": recipe.std}
    if source := recipe.weights or recipe.resume_from:
        theirs = models.run_pixels(ROOT / Path(source).expanduser()) or ours
    elif recipe.pretrained and (published := timm.get_pretrained_cfg(recipe.model)):
        theirs = {key: list(getattr(published, key)) for key in ours}
    text = "{} is {}, and {} where its weights were trained"
    differ = [text.format(k, ours[k], theirs[k]) for k in ours if ours[k] != theirs[k]]
    return " and ".join(differ)
