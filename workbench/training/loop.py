"""Training as a generator: the caller has the loop, and may plot, log or leave it.

for row in fit(recipe, runs.Run(recipe.folder)):
    print(row)                   # kind "step" every log_every steps, "epoch" at its end
"""

import contextlib
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from workbench import data, models, parts, runs, shard_store
from workbench.recipe import Recipe
from workbench.schedule import TrainingError
from workbench.training.build import build_initial_model
from workbench.training.distributed import DistContext
from workbench.training.dry_run import check_bf16
from workbench.training.inputs import DeviceTransform, build_pixel_caches, train_batches
from workbench.training.meter import Row
from workbench.training.run_writer import RunWriter
from workbench.training.setup import is_finished, set_up
from workbench.training.state import TrainState
from workbench.training.stop_request import CONTINUE, PAUSE, SAVE, STOP, StopRequest
from workbench.training.validation import end_epoch

_live: "weakref.WeakValueDictionary[str, Iterator[Row]]" = weakref.WeakValueDictionary()


def fit(
    recipe: Recipe,
    run: runs.Run,
    *,
    dataset: data.Dataset | Callable | None = None,
    stop: threading.Event | None = None,
    **custom: Any,
) -> Iterator[Row]:
    """Trains a recipe into a run folder and yields flat rows; resumes the run of the folder.

    The same function runs on a CPU, a GPU and, started by torchrun or srun, on many; rank 0 yields.

    Step rows: kind, step, steps, epoch, lr, loss (mean since the last row), seconds (training time
    so far), images_per_second, data_wait (share of the time), loader_images_per_second (of the
    loaders while they work), model_images_per_second (without the waiting). Epoch rows: kind,
    steps and the columns of metrics.csv: epoch, step, lr, train_loss, train_top1, images, val_loss,
    top1, top5, val_images, and ema_val_loss, ema_top1, ema_top5 with an EMA; validation is None in
    epochs without. With a teacher also task_loss and kd_loss (train_task_loss, train_kd_loss), each
    before its weight; loss = task_weight * task_loss + ramp * kd_loss.

    Starts from the first of these that applies: the folder's last.pt (auto_resume), `resume_from`,
    `weights` or `pretrained`, weights initialised from the seed. A finished run yields nothing. A
    step depends on the recipe, its number and the weights alone, so a killed run resumes bit for
    bit (on a CPU, with the same number of threads).

    Ctrl-C, SIGTERM, a STOP file in the folder, `stop` and leaving the loop end it at the next
    step: last.pt is written, the state is "stopped", and fit returns. A second Ctrl-C interrupts
    at once. While there is a PAUSE file fit waits after a step, with last.pt written.

    `dataset` is a Dataset, which saves reading the lists again, or a custom part as those in
    `custom`: the user's own loss, loss_args and so on (workbench.parts). Raises RunError,
    DataError, ModelError, PartError, DistillationError or TrainingError, mostly before a step.
    """
    if callable(dataset):
        dataset, custom["dataset"] = None, dataset
    recipe, key = parts.pin(recipe, **custom), str(run.path.resolve())
    if previous := _live.get(key):  # a loop over this run that an error left open in this process
        try:
            previous.close()
        except ValueError:  # it is executing
            raise TrainingError(f"{run.path} is being trained by another thread") from None
    rows = _live[key] = _fit(recipe, run, dataset, stop or threading.Event())
    return rows


def _fit(
    recipe: Recipe, run: runs.Run, dataset: data.Dataset | None, stop: threading.Event
) -> Iterator[Row]:
    with (
        DistContext.from_env(recipe) as dist,
        run.writing() if dist.is_main else contextlib.nullcontext(),
    ):
        if dist.any(dist.is_main and is_finished(recipe, run, dataset)):
            return
        try:
            yield from _train(recipe, run, dataset, dist, stop)
        except (Exception, KeyboardInterrupt) as error:
            explained = data.explain_worker_crash(error) or error
            if dist.is_main:
                _record_failure(run, explained)
            if explained is error:
                raise
            raise explained from None


def _train(
    recipe: Recipe,
    run: runs.Run,
    dataset: data.Dataset | None,
    dist: DistContext,
    stop: threading.Event,
) -> Iterator[Row]:
    if recipe.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise TrainingError("compile needs a C++ compiler: install g++, or name it in CXX")
    state, writer = set_up(recipe, run, dataset, dist)
    meter, dataset, action = state.meter, writer.dataset, CONTINUE
    prepare = DeviceTransform(recipe, len(dataset.classes), dist.device)
    train_cache = val_cache = None
    if recipe.cache:  # last, since it may take hours
        with dist.main_first():
            train_cache, val_cache = build_pixel_caches(recipe, dataset.train, dataset.val)
        writer.environment["cache_mb"] = round((train_cache.bytes + val_cache.bytes) / 1e6, 3)
    batches = train_batches(
        recipe,
        dataset,
        range(state.step, state.steps),
        micro_batch_size=recipe.micro_batch_size,
        workers=meter.workers,
        cached=train_cache,
        **dist.loader_options,
    )
    meter.start_clock()
    writer.saved_at = time.monotonic()
    taken = writer.read("train", batches)
    with (
        contextlib.closing(batches),  # ends the loader's processes
        StopRequest(run if dist.is_main else None, stop) as stopping,
        _saved_on_leaving(writer),
    ):
        while action < STOP and not state.finished:
            if is_step := not state.pending:  # else a validation was interrupted
                train_step(state, taken, prepare)
            epoch_ends = state.step % state.steps_per_epoch == 0
            row_due = epoch_ends or state.step % recipe.log_every == 0
            save_due = epoch_ends or writer.checkpoint_due()
            action = dist.max(max(stopping.action(), SAVE if save_due else CONTINUE))
            if not row_due and action == CONTINUE:
                continue

            writer.settle()  # raises if a loss is not finite
            meter.lap()
            rows = [writer.step_row()] if row_due and is_step else []
            if epoch_ends:
                writer.check_finite()
                rows += end_epoch(writer, val_cache, stopping)
                action = STOP if state.pending else action
            if action != CONTINUE:
                writer.save()
            if dist.is_main:  # last, so that nothing is lost when the caller leaves the loop here
                yield from rows
            if action == PAUSE and not state.finished:
                action = wait_while_paused(writer, stopping)
            meter.start_clock(new_window=row_due)
        with dist.main_first():  # the others' exit codes are that of status.json
            writer.close(stopping.reason())


def wait_while_paused(writer: RunWriter, stopping: StopRequest) -> int:
    """Returns the action after a pause, in every process at once: CONTINUE or STOP."""
    writer.say_paused(True)
    action = PAUSE
    while action == PAUSE:
        time.sleep(0.1)
        action = writer.state.dist.max(stopping.action())
    writer.say_paused(False)
    return action


def train_step(state: TrainState, batches: Iterator[data.Batch], prepare: DeviceTransform) -> None:
    """One optimizer step: read, forward, backward, clip, update, average."""
    state.begin_step()
    for batch in state.meter.timed(batches):
        with state.sync_if(batch.is_last):
            if len(batch.labels):
                images, targets = prepare(batch)
                loss = state.loss(images, targets, batch)
                state.meter.add(loss)  # stays on the device
                total = loss.total
            else:
                total = state.zero_loss()
            # The mean over the step's images; DDP divides by the number of processes.
            state.backward(total * (state.dist.world / batch.global_size))
    state.optimizer_step()


def lr_range_test(
    recipe: Recipe, dataset: data.Dataset | None = None, *, steps: int = 100
) -> pd.DataFrame:
    """The learning-rate range test (Smith, arXiv 1506.01186): step, loss, smoothed_loss and lr.

    lr grows exponentially from a thousandth to a hundred times that of the recipe. The test ends
    where smoothed_loss, ewm(alpha=0.1).mean(), is four times its lowest value, or the loss is not
    finite. No run folder is read or written.
    """
    recipe = parts.pin(recipe).replace(compile=False, head_only_epochs=0)
    dataset = dataset or data.load_dataset(recipe)
    with DistContext.from_env(recipe) as dist:
        model, _ = build_initial_model(recipe, dataset.classes)
        models.checkpoint_gradients(model, recipe.grad_checkpointing)
        state = TrainState(recipe, model, dataset, dist)
        check_bf16(state)
        state.lr_at = lambda step: recipe.lr * 10 ** (5 * step / max(1, steps - 1) - 3)
        prepare = DeviceTransform(recipe, len(dataset.classes), dist.device)
        loading = dist.loader_options | {"workers": state.meter.workers}
        loading["micro_batch_size"] = recipe.micro_batch_size
        batches = train_batches(recipe, dataset, range(steps), **loading)
        losses, smoothed = [], pd.Series()
        # A TrainingError is a loss that is not finite in fp16.
        with contextlib.closing(batches), contextlib.suppress(TrainingError):
            while len(losses) < steps and not (smoothed > 4 * smoothed.min()).tail(1).any():
                state.meter.start_clock()
                train_step(state, batches, prepare)
                if state.meter.settle(state.step):
                    break
                losses.append(state.meter.step_row()["loss"])
                smoothed = pd.Series(losses).ewm(alpha=0.1).mean()
    table = pd.DataFrame({"step": range(len(losses)), "loss": losses, "smoothed_loss": smoothed})
    return table.assign(lr=table.step.map(state.lr_at))


@contextlib.contextmanager
def _saved_on_leaving(writer: RunWriter) -> Iterator[None]:
    """Writes a checkpoint when the caller leaves the loop, or a step gets no images from a shard.

    Where the step has several parts it may have begun: the last checkpoint remains.
    """
    state = writer.state
    try:
        yield
    except shard_store.StoreError:
        whole = not state.recipe.micro_batch_size or state.pending  # in validation
        if whole and state.step not in (0, writer.saved_step):
            writer.settle()
            state.meter.lap()
            writer.save()
        raise
    except GeneratorExit:
        if writer.saved_step != writer.state.step:
            writer.save(alone=True)
        writer.close("leaving the loop")
        raise


def _record_failure(run: runs.Run, error: BaseException) -> None:
    state, message = "failed", f"{type(error).__name__}: {error}"[:2000]
    if isinstance(error, shard_store.StoreUnavailable):
        state = "stopped"
    if isinstance(error, KeyboardInterrupt):
        state, message = "stopped", "stopped by Ctrl-C, at once; the same command resumes it"
    for _ in range(2):  # meanwhile torch may raise for another loader process
        with contextlib.suppress(Exception):  # a full disk must not hide the error itself
            run.set_status(state, message=message)
            break
