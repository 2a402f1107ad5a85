"""Training as a generator: the caller has the loop, and may plot, log or leave it.

    run = runs.Run(recipe.folder)
    for row in fit(recipe, run):
        print(row)                   # kind "step" every log_every steps, "epoch" at its end

The same function runs on a CPU, on one GPU and, started by torchrun, on many; rank 0 yields. A
step depends on the recipe, its number and the weights alone, so a killed run resumes bit for bit
(on a CPU, with the same number of threads).
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator

from workbench import data, runs
from workbench.data import pixel_cache
from workbench.recipe import Recipe
from workbench.schedule import TrainingError
from workbench.training.distributed import DistContext
from workbench.training.inputs import DeviceTransform, sampler_options, train_transform
from workbench.training.meter import Meter, Row
from workbench.training.record import Record
from workbench.training.setup import (
    Setup,
    check_folder,
    check_images_unchanged,
    pixel_caches,
    set_up,
)
from workbench.training.state import TrainState
from workbench.training.stopping import StopRequest
from workbench.training.validation import Validation

_live: "weakref.WeakValueDictionary[str, Iterator[Row]]" = weakref.WeakValueDictionary()


def fit(
    recipe: Recipe,
    run: runs.Run,
    *,
    dataset: data.Dataset | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Row]:
    """Trains a recipe into a run folder and yields flat rows; resumes what the folder began.

    Step rows: kind, step, steps, epoch, lr, loss (mean since the last row), seconds (training time
    so far), images_per_second, data_wait (share of the time), loader_images_per_second (of the
    loaders while they work), model_images_per_second (without the waiting). Epoch rows: kind,
    steps and the columns of metrics.csv: epoch, step, lr, train_loss, train_top1, images, val_loss,
    top1, top5, val_images, and ema_val_loss, ema_top1, ema_top5 with an EMA; validation is None in
    epochs without. With a teacher also task_loss and kd_loss (train_task_loss, train_kd_loss), each
    before its weight; loss = task_weight * task_loss + ramp * kd_loss.

    Starts from the first of these that applies: the folder's last.pt (auto_resume), `resume_from`,
    `weights` or `pretrained`, weights initialised from the seed. A finished run yields nothing.

    Ctrl-C, SIGTERM, a STOP file in the folder, `stop` and leaving the loop end it at the next
    step: last.pt is written, the state is "stopped", and fit returns. A second Ctrl-C interrupts
    at once. `dataset` saves reading the lists again. Raises RunError, DataError, ModelError,
    DistillationError or TrainingError, mostly before the first step.
    """
    key = str(run.path.resolve())
    previous = _live.get(key)
    if previous is not None:  # a loop over this run that an error left open in this process
        try:
            previous.close()
        except ValueError:
            raise TrainingError(
                f"{run.path} is being trained by another thread; stop that first"
            ) from None
    rows = _fit(recipe, run, dataset, stop or threading.Event())
    _live[key] = rows
    return rows


def _fit(
    recipe: Recipe, run: runs.Run, dataset: data.Dataset | None, stop: threading.Event
) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        dist = stack.enter_context(DistContext.from_env(recipe))
        finished = False
        if dist.is_main:
            stack.enter_context(run.writing())
            finished = check_folder(recipe, run)
            if finished:
                check_images_unchanged(recipe, run, dataset)
        if dist.any(finished):
            return
        stopping = StopRequest(run if dist.is_main else None, stop)
        try:
            yield from _train(recipe, run, dataset, dist, stopping)
        except GeneratorExit:
            raise
        except BaseException as error:
            explained = data.explain_worker_crash(error) or error
            if dist.is_main:
                _record_failure(run, explained)
            if explained is error:
                raise
            raise explained from None


def _record_failure(run: runs.Run, error: BaseException) -> None:
    state, message = "failed", f"{type(error).__name__}: {error}"[:2000]
    if isinstance(error, KeyboardInterrupt):
        state, message = "stopped", "stopped by Ctrl-C, at once; the same command resumes it"
    for _ in range(2):  # meanwhile torch may raise for another loader process
        with contextlib.suppress(Exception):  # a full disk must not hide the error itself
            run.set_status(state, message=message)
            break


def _train(
    recipe: Recipe,
    run: runs.Run,
    dataset: data.Dataset | None,
    dist: DistContext,
    stopping: StopRequest,
) -> Iterator[Row]:
    setup = set_up(recipe, run, dataset, dist)
    state, meter, dataset = setup.state, setup.meter, setup.dataset
    train_cache, val_cache = pixel_caches(setup)
    record = Record(run, dist, dataset, setup.environment)
    prepare = DeviceTransform(recipe, len(dataset.classes), dist.device)
    validate = Validation(recipe, dataset.val, dist, setup.workers, val_cache)
    batches = _batches(setup, train_cache)
    meter.start_clock()
    stopping.listen()  # from here on Ctrl-C waits for the step; before, it interrupts at once
    try:
        while not state.finished:
            lr = train_step(state, meter, batches, prepare, record)
            epoch_ends = state.step % state.steps_per_epoch == 0
            row_due = epoch_ends or state.step % recipe.log_every == 0
            save_due = epoch_ends or record.checkpoint_due(recipe.checkpoint_minutes)
            code = dist.max(2 if stopping.reason() else 1 if save_due else 0)
            if not (row_due or code):
                continue

            record.settle(meter, state)
            state.seconds += meter.lap()
            rows = []
            if row_due:
                rows.append(record.step_row(meter, state, lr))
            if epoch_ends:
                record.check_finite(state)
                evaluate = state.epoch % recipe.eval_every == 0 or state.finished
                columns = validate(state, record) if evaluate else validate.empty(state)
                rows.append(record.epoch_row(meter, state, lr, columns))
                state.seconds += meter.lap()
            if code:
                record.save(state, meter)
            if dist.is_main:  # last, so that nothing is lost when the caller leaves the loop here
                yield from rows
            if code == 2 and not state.finished:
                record.mark_stopped(state, stopping.reason())
                return
            meter.start_clock(new_window=row_due)
        record.mark_finished(state)
    except GeneratorExit:
        if record.saved_step != state.step:
            record.save(state, meter)
        if state.finished:
            record.mark_finished(state)
        else:
            record.mark_stopped(state, "leaving the loop")
        raise
    finally:
        stopping.close()
        batches.close()  # ends the loader's processes


def _batches(setup: Setup, cache: pixel_cache.Cache | None) -> Iterator[data.Batch]:
    state = setup.state
    return data.train_loader(
        setup.dataset.train,
        train_transform(state.recipe),
        **sampler_options(state.recipe),
        steps=range(state.step, state.steps),
        micro_batch_size=state.recipe.micro_batch_size,
        rank=state.dist.rank,
        world=state.dist.world,
        workers=setup.workers,
        pin_memory=state.dist.device.type == "cuda",
        cached=cache,
    )


def train_step(
    state: TrainState,
    meter: Meter,
    batches: Iterator[data.Batch],
    prepare: DeviceTransform,
    record: Record,
) -> float:
    """One optimizer step: read, forward, backward, clip, update, average. Returns its lr."""
    lr = state.begin_step()
    parts, count = [], 0
    for batch in meter.timed(batches):
        record.quarantine("train", batch.failures, state.step)
        with state.sync_if(batch.is_last):
            if len(batch.labels):
                images, targets = prepare(batch)
                loss = state.loss(images, targets, batch)
                total = loss.total
                parts += [total.detach(), loss.task, loss.kd, loss.correct]
                count += len(batch.labels)
            else:
                total = state.zero_loss()
            # The mean over the step's images; DDP divides by the number of processes.
            (total * (state.dist.world / batch.global_size)).backward()
    state.optimizer_step()
    meter.add(parts, count)  # stays on the device
    return lr
