"""From a recipe and a run folder to a training at its first step, with everything checked."""

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from workbench import ROOT, data, models, parts, runs
from workbench.recipe import Recipe, runtime_only
from workbench.recipe_checks import is_part
from workbench.schedule import TrainingError
from workbench.training.build import build_initial_model, create_model
from workbench.training.distributed import DistContext, is_main
from workbench.training.dry_run import dry_run
from workbench.training.environment import code_digest, environment
from workbench.training.inputs import open_shard_cache
from workbench.training.optim import check_optimizer, lr_scales
from workbench.training.run_writer import RunWriter
from workbench.training.state import TrainState

# Options that decide which images are validated.
SPLIT = "train_list train_root val_list val_root val_fraction fold group_column".split()

# What decides the last bits of a teacher's logits.
LOGIT_KEYS = "data precision processes threads device torch torchvision timm numpy".split()
LOGIT_KEYS += ["pillow", "opencv", "simplejpeg"]


def set_up(
    recipe: Recipe, run: runs.Run, dataset: data.Dataset | None, dist: DistContext
) -> tuple[TrainState, RunWriter]:
    """Checks recipe, data and run folder, loads the model, and writes the first files.

    Raises RunError, DataError, ModelError, DistillationError or TrainingError.
    """
    check_optimizer(recipe)
    dataset = dataset or data.load_dataset(recipe)
    # The model first: whether it can be trained is known before every image is read.
    checkpoint, source = run.load_checkpoint(), run
    if checkpoint is None and recipe.resume_from:
        checkpoint, source = resumed_state(recipe), runs.Run(ROOT / recipe.resume_from)
    if checkpoint is None:
        model, report = build_initial_model(recipe, dataset.classes)
    else:  # the files of `weights` may be gone
        _check_classes(source, dataset)
        model, report = create_model(recipe, len(dataset.classes)), None
    models.checkpoint_gradients(model, recipe.grad_checkpointing)
    lr_scales(model, recipe.layer_decay)  # refuses a model without layers
    with dist.main_first():  # the others find what rank 0 cached
        dataset, quarantined = verified(recipe, dataset)
    state = TrainState(recipe, model, dataset, dist)
    _check_batch_norm(state, len(dataset.train))
    state.metrics = dry_run(state, dataset).resumed(run)
    start = f"initialised from seed {recipe.seed}" if report is None else str(report)
    if checkpoint is not None:
        state.load_state_dict(checkpoint, same_recipe=source is run)
        start = f"resumes after step {state.step}"
        if source is not run:
            start += f" of {recipe.resume_from}"
            if state.finished:
                raise runs.RunError(
                    f"resume_from {recipe.resume_from!r} is at step {state.step}, and this recipe "
                    f"ends at {state.steps}; use `weights`, or more epochs"
                )
    digest = report.digest if report else source.environment().get("initial_weights", "")
    facts = environment(state, dataset) | {"start": start, "initial_weights": digest}
    known = run.environment().get("trained_on_validation", []) if source is run else []
    facts["trained_on_validation"] = trained_on_validation(recipe, dataset) or known
    if state.distiller:
        facts["teachers"] = state.distiller.record()
        if recipe.cache_teacher_logits:
            same = {key: facts[key] for key in LOGIT_KEYS} | {"code": code_digest()}
            facts["teacher_cache"] = state.distiller.open_logit_cache(state.steps_per_epoch, **same)
    with dist.main_first():  # the others read the quarantine that rank 0 truncates
        if dist.is_main:
            if checkpoint is not None:
                _check_unchanged(run, facts)
            run.truncate_after(state.step)
            with run.atomic_write("recipe.yaml") as temporary:
                recipe.to_yaml(temporary)
            parts.save(recipe, run.path)
            if not run.file("quarantine.csv").exists():
                run.save_frame("quarantine.csv", quarantined)
            if report is not None:
                run.save_frame("weights_report.csv", report.table())
            run.write_json("environment.json", {**facts, "seconds": state.meter.seconds})
            run.set_status("running", step=state.step, steps=state.steps, message="")
    return state, RunWriter(run, state, dataset, facts)


def resumed_state(recipe: Recipe) -> dict[str, Any]:
    """The checkpoint of `resume_from`. Raises RunError if there is none, or of other optimizers."""
    source = runs.Run(ROOT / recipe.resume_from)
    if (checkpoint := source.load_checkpoint()) is None:
        raise runs.RunError(f"resume_from {recipe.resume_from!r} has no last.pt")
    there, here = source.recipe()["optimizer"], recipe.optimizer
    if there != here and not (is_part(there) or is_part(here)):
        raise runs.RunError(
            f"resume_from {recipe.resume_from!r} was trained with {there}, whose state is not that "
            f"of {here}; use `weights`, which starts with a new optimizer"
        )
    return checkpoint


def trained_on_validation(recipe: Recipe, dataset: data.Dataset) -> list[str]:
    """Sentences on the runs that a recipe starts or distils from that trained on its validation.

    Runs of the same data with other lists, fold or val_fraction, and what these started from, by
    the paths in their lists as they are now. A run of other data is not looked at.
    """
    start = lambda one: [*filter(None, [one.weights, one.resume_from]), *one.teacher]
    base = lambda one: (one.dataset, one.dataset_args, ROOT / Path(one.data_dir).expanduser())
    split = lambda one: [getattr(one, key) for key in SPLIT]
    paths = lambda frame: {*frame.path.map(os.path.normpath)}
    found, sources, known = [], start(recipe), set()
    while sources:
        folder = ROOT / Path(source := sources.pop(0)).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        if folder in known or not (folder / "recipe.yaml").exists():
            continue
        known.add(folder)
        with contextlib.suppress(runs.RunError, ValueError, OSError):  # it or its images are gone
            there = Recipe(**runs.Run(folder).recipe())
            sources += start(there)
            if base(there) == base(recipe) and split(there) != split(recipe):
                theirs = paths(data.load_dataset(there, folder=folder).train)
                if count := len(theirs & paths(dataset.val)):
                    found.append(
                        f"{source} was trained on {count:,} of the {len(dataset.val):,} validation "
                        "images, so top-1 is too high; use a run with the same lists and fold"
                    )
    return found


def verified(recipe: Recipe, dataset: data.Dataset) -> tuple[data.Dataset, pd.DataFrame]:
    """The dataset without the images that cannot be read, and those; every image is read once.

    Opens the cache of shards.
    """
    sides = {"train": dataset.train, "val": dataset.val}
    bad = [pd.DataFrame(columns=["side", "file", "label", "reason", "detail", "step"])]
    for side, frame in sides.items() if recipe.verify_data else ():
        if "index" in frame.attrs:  # of an index the shards are checked
            data.check_shards(frame)
            continue
        frame = data.verify_images(frame, progress=is_main())
        sides[side], found = data.drop_corrupt(frame, side)
        bad.append(found)
    open_shard_cache(recipe, dataset)
    return replace(dataset, **sides), pd.concat(bad[1:] or bad)


def _check_batch_norm(state: TrainState, images: int) -> None:
    """Raises TrainingError if any forward of an epoch would have one image, or would wait."""
    recipe, world = state.recipe, state.dist.world
    if not state.has_batch_norm:
        return
    full = min(images, recipe.batch_size)
    last = full if recipe.drop_last else images % recipe.batch_size or full
    parts = [[len(data.own_places(n, rank, world)) for rank in range(world)] for n in (full, last)]
    forwards = [{-(-own // (recipe.micro_batch_size or full)) for own in part} for part in parts]
    if recipe.sync_batch_norm and max(map(len, forwards)) > 1:
        text = "needs as many forwards in every process; set drop_last, or another micro_batch_size"
        raise TrainingError(f"sync_batch_norm {text}")
    for own in {*parts[0], *parts[1]} - {0}:
        micro = recipe.micro_batch_size or own
        if (own % micro or micro) == 1:
            raise TrainingError(
                "a forward would have one image, which batch norm cannot normalise "
                f"({images} images, batch_size {recipe.batch_size}, micro_batch_size "
                f"{recipe.micro_batch_size}); set drop_last: true and batch_size to 2 or "
                "more, with no micro_batch_size or one that is 2 or more and divides it"
            )


# ---- the run folder


def is_finished(recipe: Recipe, run: runs.Run, dataset: data.Dataset | None) -> bool:
    """Whether nothing is left to train.

    Raises RunError if the folder has a run of another recipe, or a finished run on other images.
    """
    run.remove_requests()
    if not run.file("last.pt").exists():
        return False
    if not recipe.auto_resume:
        raise runs.RunError(
            f"{run.path} has a run already and auto_resume is false; give this one another name"
        )
    check_same_recipe(recipe, run)
    if run.status()["state"] != "finished":
        return False
    try:
        dataset, _ = verified(recipe, dataset or data.load_dataset(recipe))
    except (data.DataError, OSError):
        return True  # the images are gone; the run is finished all the same
    _check_classes(run, dataset)
    shards = data.version_digests((dataset.train, dataset.val))
    _check_unchanged(run, {"data": data.fingerprint(dataset), "shards": shards})
    return True


def check_same_recipe(recipe: Recipe, run: runs.Run) -> None:
    """Raises RunError if the folder has a run of another recipe."""
    if not run.file("recipe.yaml").exists():
        return
    there, here = run.recipe(), recipe.model_dump(exclude=set(runtime_only))
    pairs = {key: (there[key], here[key]) for key in here if key in there}
    failed = run.environment().get("failed_metrics", ())
    # A new metric, or another one for one that failed, changes no weight.
    if {*there.get("metrics", ())} - {*failed} <= {*recipe.metrics}:
        pairs.pop("metrics", None)
    different = [f"{k}: {a!r} there, {b!r} here" for k, (a, b) in pairs.items() if a != b]
    if different:
        raise runs.RunError(
            f"{run.path} has a run of another recipe ({'; '.join(different)}); give this one "
            f"another name and, to continue from there, resume_from: {run.path}"
        )


def _check_classes(run: runs.Run, dataset: data.Dataset) -> None:
    """Raises RunError or TrainingError if a run was trained for other classes or labels."""
    there, here = models.run_classes(run.path), dataset.classes
    if not models.same_classes(there, here):
        pairs = [f"{a!r} there, {b!r} here" for a, b in zip(there, here, strict=False) if a != b]
        raise runs.RunError(
            f"{run.path} was trained on {len(there)} classes, which are not the {len(here)} of the "
            f"data in the same order: {'; '.join(pairs[:5])}; restore the classes, or give this "
            "run another name and start from `weights`"
        )
    try:
        before = run.predictions().drop_duplicates(["list", "file"])  # raw and EMA
        both = dataset.val.merge(before, on=["list", "file"], suffixes=("", "_there"))
    except (runs.RunError, OSError, ValueError, KeyError):
        return  # no table of predictions
    moved = both.label != both.label_there
    share = moved.groupby(both.label_there).transform("mean")  # of the images of a class
    other = both[moved & (share > 0.5)]  # a few corrected labels are no other classes
    if len(other):
        raise TrainingError(
            f"{len(other):,} of {len(both):,} validation images have another label than in "
            f"{run.path}, first {other.file.iloc[0]!r}; put the labels back, or start from "
            "`weights`"
        )


def _check_unchanged(run: runs.Run, now: dict[str, Any]) -> None:
    """Raises RunError if the data or the weights of a teacher changed since the run was started."""
    before = run.environment()
    digests = [("the data", before.get("data", now["data"]), now["data"])]
    for urls, tags in before.get("shards", {}).items():
        digests.append(("a shard in the object store", tags, now["shards"].get(urls, tags)))
    for old, teacher in zip(before.get("teachers", []), now.get("teachers", []), strict=False):
        digests.append((f"the teacher {teacher['source']}", old["digest"], teacher["digest"]))
    for what, old, new in digests:
        if old != new:
            raise runs.RunError(
                f"{what} changed since {run.path} was started ({old}, now {new}); put it back, or "
                "give this run another name"
            )
