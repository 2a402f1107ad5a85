"""From a recipe and a run folder to a training at its first step, with everything checked."""

from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from workbench import ROOT, data, models, runs
from workbench.data import pixel_cache
from workbench.recipe import Recipe, runtime_only
from workbench.schedule import TrainingError
from workbench.training.build import build_initial_model, create_model
from workbench.training.distributed import DistContext
from workbench.training.environment import (
    check_compiler,
    code_digest,
    environment,
    pick_precision,
    pick_workers,
)
from workbench.training.inputs import build_pixel_caches
from workbench.training.meter import Meter
from workbench.training.state import TrainState, has_trained_batch_norm, set_trainable


@dataclass
class Setup:
    """A training before its next step."""

    state: TrainState
    meter: Meter
    dataset: data.Dataset  # verified
    workers: int
    environment: dict[str, Any]


def set_up(recipe: Recipe, run: runs.Run, dataset: data.Dataset | None, dist: DistContext) -> Setup:
    """Checks recipe, data and run folder, loads the model, and writes the start of the record.

    Raises RunError, DataError, ModelError, DistillationError or TrainingError.
    """
    check_compiler(recipe)
    dataset = dataset or data.load_dataset(recipe)
    # The model first: whether it can be trained is known before every image is read.
    checkpoint, resumed_from = _checkpoint(recipe, run, dataset)
    report = None
    if checkpoint is None:
        model, report = build_initial_model(recipe, dataset.classes)
    else:  # the files of `weights` may be gone
        model = create_model(recipe, len(dataset.classes))
    dataset, quarantined = verified(recipe, dataset, dist)
    steps_per_epoch = _steps_per_epoch(recipe, len(dataset.train))
    set_trainable(model, [models.module(model, name) for name in recipe.freeze])
    if has_trained_batch_norm(model):
        _check_batch_norm(recipe, len(dataset.train), dist.world)

    state = TrainState.create(recipe, model, dataset.classes, steps_per_epoch, dist)
    workers = pick_workers(recipe.workers, dist.local_world)
    meter = Meter(dist, workers, teacher=bool(recipe.teacher))
    start = f"initialised from seed {recipe.seed}" if report is None else str(report)
    if checkpoint is not None:
        state.restore(checkpoint, meter)
        start = f"resumes after step {state.step}"
        if resumed_from:
            start += f" of {resumed_from}"
            _check_steps_left(recipe, state)
    facts = _environment(recipe, dataset, state, workers) | {"start": start}
    if state.distiller:
        _add_teachers(facts, state)
    if dist.is_main:
        if checkpoint is not None:
            _check_unchanged(run, facts)
        _begin(run, recipe, state, facts, quarantined, report)
    return Setup(state, meter, dataset, workers, facts)


# ---- the run folder


def check_folder(recipe: Recipe, run: runs.Run) -> bool:
    """Whether the run is finished. Raises RunError if the folder has a run of another recipe."""
    run.clear_stop()
    started = run.file("last.pt").exists()
    if started and not recipe.auto_resume:
        raise runs.RunError(
            f"{run.path} has a run already and auto_resume is false; give this one another name"
        )
    if started and run.file("recipe.yaml").exists():
        there, here = run.recipe(), recipe.model_dump()
        different = [
            f"{k}: {there.get(k)!r} there, {here[k]!r} here"
            for k in here
            if k not in runtime_only and k in there and there[k] != here[k]
        ]
        if different:
            raise runs.RunError(
                f"{run.path} has a run of another recipe ({'; '.join(different)}); give this one "
                f"another name and, to continue from there, resume_from: {run.path}"
            )
    return started and run.status()["state"] == "finished"


def check_images_unchanged(recipe: Recipe, run: runs.Run, dataset: data.Dataset | None) -> None:
    """Raises RunError if a finished run was trained on other images than are there now."""
    before = run.environment()
    try:
        dataset, _ = verified(recipe, dataset or data.load_dataset(recipe), None)
    except (data.DataError, OSError):
        return  # the images are gone; the run is finished all the same
    _check_classes(run, dataset)
    now = data.fingerprint(dataset)
    if before.get("data", now) != now:
        raise runs.RunError(
            f"{run.path} is finished, and the images have changed since: {len(dataset.train):,} "
            f"for training and {len(dataset.val):,} for validation now, "
            f"{before.get('train_images')} and {before.get('val_images')} then, or others; give "
            "this run another name"
        )


def _check_classes(run: runs.Run, dataset: data.Dataset) -> None:
    """Raises RunError or TrainingError if a run was trained for other classes or labels."""
    there, here = models.run_classes(run.path), dataset.classes
    if not models.same_classes(there, here):
        pairs = [f"{a!r} there, {b!r} here" for a, b in zip(there, here, strict=False) if a != b]
        raise runs.RunError(
            f"{run.path} was trained for {len(there)} classes and the data have {len(here)}, or "
            f"others in another order: {'; '.join(pairs[:5])}; put them back, or give this run "
            "another name and start from `weights`"
        )
    try:
        both = dataset.val.merge(run.predictions(), on=["list", "file"], suffixes=("", "_there"))
    except (runs.RunError, OSError, ValueError, KeyError):
        return  # no table of predictions
    moved = both.label != both.label_there
    share = moved.groupby(both.label_there).transform("mean")  # of the images of a class
    other = both[moved & (share > 0.5)]  # a few corrected labels are no other classes
    if len(other):
        raise TrainingError(
            f"{moved.sum():,} of {len(both):,} validation images have another label than in "
            f"{run.path}, first {other.file.iloc[0]!r}: {other.label_there.iloc[0]} there, "
            f"{other.label.iloc[0]} here; put the labels back, or start from `weights`"
        )


def _checkpoint(
    recipe: Recipe, run: runs.Run, dataset: data.Dataset
) -> tuple[dict[str, Any] | None, str]:
    """The checkpoint to continue from, and `resume_from` if it is that run's."""
    checkpoint, source = run.load_checkpoint(), ""
    if checkpoint is None and recipe.resume_from:
        checkpoint, source = resumed_state(recipe), recipe.resume_from
    if checkpoint is not None:
        _check_classes(runs.Run(ROOT / source) if source else run, dataset)
    return checkpoint, source


def resumed_state(recipe: Recipe) -> dict[str, Any]:
    """The checkpoint of the recipe's `resume_from`. Raises RunError when there is none."""
    checkpoint = runs.Run(ROOT / recipe.resume_from).load_checkpoint()
    if checkpoint is None:
        raise runs.RunError(f"resume_from {recipe.resume_from!r} has no last.pt")
    return checkpoint


def _check_steps_left(recipe: Recipe, state: TrainState) -> None:
    if state.finished:
        raise runs.RunError(
            f"resume_from {recipe.resume_from!r} is at step {state.step}, and this recipe "
            f"ends at {state.steps}; use `weights`, or more epochs"
        )


def _check_unchanged(run: runs.Run, facts: dict[str, Any]) -> None:
    """Raises RunError if the data or a teacher changed since the run was started."""
    before = run.environment()
    if before.get("data", facts["data"]) != facts["data"]:
        raise runs.RunError(
            f"the data changed since {run.path} was started (fingerprint {before['data']}, now "
            f"{facts['data']}); put the images back, or give this run another name"
        )
    teachers = facts.get("teachers", [])
    for teacher, old in zip(teachers, before.get("teachers", teachers), strict=False):
        if teacher["digest"] != old["digest"]:
            raise runs.RunError(
                f"the teacher {teacher['source']} changed since {run.path} was started (weights "
                f"{old['digest']}, now {teacher['digest']}); put it back, or give this run "
                "another name"
            )


def _begin(
    run: runs.Run,
    recipe: Recipe,
    state: TrainState,
    facts: dict[str, Any],
    quarantined: list[pd.DataFrame],
    report: models.Loaded | None,
) -> None:
    run.truncate_after(state.step)
    with run.atomic_write("recipe.yaml") as temporary:
        recipe.to_yaml(temporary)
    if not run.file("quarantine.csv").exists():
        columns = ["side", "file", "label", "reason", "detail", "step"]
        frames = [frame for frame in quarantined if len(frame)] or [pd.DataFrame(columns=columns)]
        run.save_frame("quarantine.csv", pd.concat(frames, ignore_index=True))
    if report is not None:
        run.save_frame("weights_report.csv", report.table())
    run.write_json("environment.json", {**facts, "seconds": state.seconds})
    run.set_status("running", step=state.step, steps=state.steps, message="")


# ---- data


def verified(
    recipe: Recipe, dataset: data.Dataset, dist: DistContext | None
) -> tuple[data.Dataset, list[pd.DataFrame]]:
    """The dataset without the images that cannot be read, and those; every image is read once.

    Rank 0 reads first, the others find what it remembers. Without `dist` there is no progress bar.
    """
    if not recipe.verify_data:
        return dataset, []
    if dist is not None:
        with dist.main_first():
            return _verified(dataset, progress=dist.is_main)
    return _verified(dataset, progress=True)


def _verified(dataset: data.Dataset, progress: bool) -> tuple[data.Dataset, list[pd.DataFrame]]:
    train, bad = data.drop_corrupt(data.verify_images(dataset.train, progress=progress), "train")
    val, bad_val = data.drop_corrupt(data.verify_images(dataset.val, progress=progress), "val")
    return replace(dataset, train=train, val=val), [bad, bad_val]


def _steps_per_epoch(recipe: Recipe, images: int) -> int:
    steps = data.steps_per_epoch(images, recipe.batch_size, recipe.drop_last)
    if steps == 0:
        raise TrainingError(
            f"batch_size {recipe.batch_size} is above the {images} training images and "
            "drop_last leaves none; lower batch_size"
        )
    return steps


def _check_batch_norm(recipe: Recipe, images: int, world: int) -> None:
    """Raises TrainingError if any forward of an epoch would have one image."""
    last = images % recipe.batch_size or recipe.batch_size
    last = recipe.batch_size if recipe.drop_last else last
    for total in {min(images, recipe.batch_size), last}:
        for own in {len(data.own_places(total, rank, world)) for rank in range(world)} - {0}:
            micro = recipe.micro_batch_size or own
            if (own % micro or micro) == 1:
                raise TrainingError(
                    "a forward would have one image, which batch norm cannot normalise "
                    f"({images} images, batch_size {recipe.batch_size}, micro_batch_size "
                    f"{recipe.micro_batch_size}); set drop_last: true and batch_size to 2 or "
                    "more, with no micro_batch_size or one that is 2 or more and divides it"
                )


def pixel_caches(setup: Setup) -> tuple[pixel_cache.Cache | None, pixel_cache.Cache | None]:
    """Those of training and validation images; built last, since it may take hours."""
    state, dataset = setup.state, setup.dataset
    if not state.recipe.cache:
        return None, None
    dist = state.dist
    with dist.main_first():
        caches = build_pixel_caches(state.recipe, dataset.train, dataset.val, dist.is_main)
        setup.environment["cache_mb"] = round(sum(c.bytes for c in caches) / 1e6, 3)
    return caches


# ---- the record


def _environment(
    recipe: Recipe, dataset: data.Dataset, state: TrainState, workers: int
) -> dict[str, Any]:
    """environment.json, but for teachers, seconds and memory."""
    train, val = dataset.train, dataset.val
    trained = set(train.label)
    verify = recipe.verify_data
    downscaled = None
    if recipe.train_resize and verify:
        downscaled = int((train[["width", "height"]].min(axis=1) > recipe.train_resize).sum())
    return {
        **environment(state.dist.device),
        "precision": pick_precision(recipe.precision, state.dist.device),
        "processes": state.dist.world,
        "distributed": state.dist.backend,
        "workers": workers,
        "threads": torch.get_num_threads(),
        "parameters": models.parameters(state.model),
        "train_images": len(train),
        "val_images": len(val),
        "classes": dataset.classes,
        "data": data.fingerprint(dataset),
        "val_data": data.fingerprint(replace(dataset, train=train.iloc[:0])),
        "recipe": recipe.fingerprint,
        "steps_per_epoch": state.steps_per_epoch,
        "downscaled": downscaled,
        "train_val_duplicates": int(val.digest.isin(train.digest).sum()) if verify else None,
        "skipped_files": data.describe_skipped(dataset.skipped),
        "empty_classes": [c for i, c in enumerate(dataset.classes) if i not in trained],
    }


def _add_teachers(facts: dict[str, Any], state: TrainState) -> None:
    """Adds the teachers to environment.json, and opens the cache of their logits."""
    facts["teachers"] = state.distiller.record()
    if state.recipe.cache_teacher_logits:
        keys = "data precision processes threads torch torchvision timm numpy pillow device"
        same = {key: facts[key] for key in keys.split()}
        facts["teacher_cache"] = state.distiller.open_logit_cache(
            state.steps_per_epoch, **same, code=code_digest()
        )
