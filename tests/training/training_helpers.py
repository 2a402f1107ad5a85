"""Recipes on the embedded digits that the tests of training share."""

from workbench import runs, training
from workbench.recipe import Recipe

# What ResNet strikes back adds, and whatever else samples random numbers.
STRIKES = {
    "optimizer": "lamb", "nesterov": False, "lr": 0.005, "weight_decay": 0.02, "loss": "bce",
    "bce_sum": True, "bce_shift": True, "randaug_n": 2, "autoaugment": True, "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0, "mix_per_sample": True, "erase_prob": 0.5, "repeated_aug": 2,
}  # fmt: skip
NO_NOISE = {"dropout": 0.0, "drop_path": 0.0}


def small(folder, **changes) -> Recipe:
    """Eleven steps an epoch on digits, with every option on that could leak state."""
    options = {
        "train_fraction": 0.25, "epochs": 3, "image_size": 16, "val_resize": 16,
        "crop_scale": [0.5, 1.0], "hflip": 0.5, "brightness": 0.4, "hue": 0.1, "dropout": 0.2,
        "drop_path": 0.1, "ema_decay": 0.9, "label_smoothing": 0.1, "nesterov": True,
        "weight_decay": 1e-3, "warmup_epochs": 1.0, "clip_grad_norm": 1.0, "log_every": 1,
        "workers": 0, "runs_dir": str(folder),
    }  # fmt: skip
    return Recipe(**{**options, **changes})


def left_after(recipe: Recipe, step: int) -> runs.Run:
    """The run of a training whose loop is left after a step."""
    run = runs.Run(recipe.folder)
    rows = training.fit(recipe, run)
    for row in rows:
        if row["step"] == step:
            break
    rows.close()
    return run


def assert_near(ours, theirs, within=1e-10):
    """Equal in float64 but for the order of sums, relative to each tensor's largest element.

    22 steps make up to 3e-14 of it.
    """
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        allowed = within * value.abs().max().item()
        assert (ours[name] - value).abs().max() <= allowed, name
