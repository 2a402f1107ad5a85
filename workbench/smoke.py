"""A rehearsal of a recipe: two steps, one evaluation, one checkpoint and one export."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator

from workbench import data, export, runs, training
from workbench.recipe import Recipe


def smoke_test(recipe: Recipe) -> Iterator[str]:
    """Trains two steps on a few images in a temporary folder and exports; a line for each part.

    Everything is that of the recipe, except the batch on a CPU, which is 4 images, and `compile`,
    `resume_from` and caches, which are not tried. Raises what training and export raise.
    """
    start = time.monotonic()
    dataset = data.load_dataset(recipe)
    on_cpu = training.pick_device(recipe.device).type == "cpu"
    batch = max(2, min(4 if on_cpu else recipe.batch_size, len(dataset.train) // 2))
    evenly = lambda f, n: f.iloc[:: max(1, len(f) // n)][:n].reset_index(drop=True)
    train, val = evenly(dataset.train, 2 * batch), evenly(dataset.val, 16)
    few = dataclasses.replace(dataset, train=train, val=val)
    yield f"{len(train)} training and {len(val)} validation images"
    with tempfile.TemporaryDirectory(prefix="workbench-smoke-") as folder:
        small = recipe.replace(
            name="smoke", runs_dir=folder, epochs=1, batch_size=batch, log_every=1, resume_from="",
            repeated_aug=min(recipe.repeated_aug, batch), warmup_steps=0, compile=False,
            cache=False, cache_teacher_logits=False,
        )  # fmt: skip
        *steps, row = training.fit(small, runs.Run(small.folder), dataset=few)
        losses = ", ".join(f"{step['loss']:.3f}" for step in steps)
        yield f"{len(steps)} steps, losses {losses}, validation {row['val_loss']:.3f}"
        file = export.package(small.folder, folder, dataset=few, seconds=0)
        yield f"a package of {file.stat().st_size / 1e6:.1f} MB"
    yield f"the smoke test passed in {time.monotonic() - start:.1f} s; its folder is removed"
