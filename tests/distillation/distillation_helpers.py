"""What the tests of distillation share: teachers, recipes of their students, batches."""

import time
from pathlib import Path

import torch
from helpers import fork_server
from safetensors.torch import load_file
from torch import nn

from workbench import data, distillation, models, runs, training
from workbench.distillation import Distillation
from workbench.recipe import Recipe

CPU = torch.device("cpu")
DIGITS = [str(i) for i in range(10)]
STEPS = 6  # an epoch: 324 images, 60 at a time, the last 24
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mix_per_sample": True, "erase_prob": 0.5}


def student_recipe(sources: dict[str, str], folder: Path, teachers="run", **changes) -> Recipe:
    """Two epochs of six steps on digits; `teachers` are run, wide or both."""
    names = {"run": "", "wide": "resnet10t"}
    options = {
        "train_fraction": 0.25,
        "epochs": 2,
        "batch_size": 60,
        "crop_scale": [0.5, 1.0],
        "hflip": 0.5,
        "lr": 0.05,
        "nesterov": True,
        "weight_decay": 1e-3,
        "eval_every": 2,
        "log_every": 1,
        "image_size": 16,
        "val_resize": 16,
        "workers": 0,
        "runs_dir": str(folder),
        "teacher": [sources[t] for t in teachers.split()],
        "teacher_model": [names[t] for t in teachers.split()] if "wide" in teachers else [],
        "kd_loss": ["kl"],
        "temperature": 4.0,
        **changes,
    }
    if not set(options["kd_loss"]) & {"kl", "dkd", "dist"}:
        del options["temperature"]
    return Recipe(**options)


def distillation_of(recipe: Recipe) -> Distillation:
    """The recipe's distillation, its student at its initial weights."""
    return Distillation(recipe, training.create_model(recipe, 10).train(), DIGITS, CPU)


def batches_of(recipe: Recipe, steps: range) -> list[tuple[torch.Tensor, torch.Tensor, data.Batch]]:
    """Images and targets as the student gets them, and the batch they were made of."""
    prepare = training.DeviceTransform(recipe, 10, CPU)
    loader = data.train_loader(
        data.load_dataset(recipe).train,
        training.train_transform(recipe),
        **training.sampler_options(recipe),
        steps=steps,
        micro_batch_size=recipe.micro_batch_size,
    )
    return [(*prepare(batch), batch) for batch in loader]


def load_teacher(sources: dict[str, str], name: str) -> nn.Module:
    """The model of a teacher, without workbench.distillation."""
    if name == "wide":
        model, state = models.create("resnet10t", 10), load_file(sources["wide"])
    else:
        model = models.create("test_resnet", 10)
        state = runs.Run(sources["run"]).load_checkpoint()["ema"]
    model.load_state_dict(state)
    return model.eval()


def train_in_child(options: dict, cache: str) -> None:
    torch.set_num_threads(1)
    distillation.logit_cache.CACHE = Path(cache)
    recipe = Recipe(**options)
    for _ in training.fit(recipe, runs.Run(recipe.folder)):
        time.sleep(0.02)  # the process that waits to kill this one may be slow


def child(recipe: Recipe, cache: Path):
    """A started process that trains the recipe."""
    args = (recipe.model_dump(), str(cache.parent))
    process = fork_server.Process(target=train_in_child, args=args)
    process.start()
    return process
