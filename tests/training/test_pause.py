"""A PAUSE file: training waits after a step, can be stopped there, and goes on bit for bit."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import assert_same_run, fork_server, last_step, train
from training_helpers import small

from workbench import runs, training
from workbench.evaluation import inference
from workbench.recipe import Recipe


def until(true, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def pause(run: runs.Run) -> int:
    """Pauses a training; returns the step after which it waits."""
    run.file("PAUSE").touch()
    until(lambda: run.status()["message"].startswith("paused after step"))
    return run.status()["step"]


@pytest.fixture
def thread(tmp_path):
    """A run that a thread of this process trains."""
    recipe = small(tmp_path / "runs")
    run = runs.Run(recipe.folder)
    training_thread = threading.Thread(target=train, args=[recipe])
    training_thread.start()
    until(lambda: last_step(run) >= 2)
    yield run
    training_thread.join(60)
    assert not training_thread.is_alive()


def test_a_paused_training_keeps_its_lock_and_step_and_ends_as_the_undisturbed_one(
    thread, tmp_path
):
    step = pause(thread)
    assert thread.load_checkpoint()["progress"]["step"] == step == last_step(thread)
    time.sleep(0.5)
    assert last_step(thread) == step and thread.locked()
    assert thread.status()["state"] == "running"
    assert str(thread.file("PAUSE")) in thread.status()["message"]
    thread.file("PAUSE").unlink()
    until(lambda: last_step(thread) > step)
    assert thread.status()["message"] == "" or thread.status()["state"] == "finished"
    until(lambda: thread.status()["state"] == "finished")
    assert_same_run(train(small(tmp_path / "undisturbed")), thread)


def test_a_pause_is_no_training_time(thread):
    step, start = pause(thread), time.monotonic()
    time.sleep(1)
    thread.file("PAUSE").unlink()
    until(lambda: thread.status()["state"] == "finished")
    passed, seconds = time.monotonic() - start, thread.steps().set_index("step").seconds
    assert seconds.iloc[-1] - seconds[step] < passed - 0.9


def test_a_stop_file_ends_a_paused_training_and_the_next_start_does_not_wait(thread):
    step = pause(thread)
    thread.file("STOP").touch()
    until(lambda: thread.status()["state"] == "stopped")
    assert thread.status()["step"] == step
    assert "stopped by the STOP file" in thread.status()["message"]
    until(lambda: not thread.locked())
    assert not thread.file("PAUSE").exists()
    thread.file("PAUSE").touch()  # of a user who did not see that it had ended
    train(Recipe(**thread.recipe()))
    assert thread.status()["state"] == "finished"


def _train_in_child(options):
    train(Recipe(**options))


@pytest.mark.slow
def test_sigterm_ends_a_paused_training(tmp_path):
    recipe = small(tmp_path)
    run = runs.Run(recipe.folder)
    child = fork_server.Process(target=_train_in_child, args=(recipe.model_dump(),))
    child.start()
    until(lambda: last_step(run) >= 2)
    step = pause(run)
    os.kill(child.pid, signal.SIGTERM)
    child.join(60)
    assert child.exitcode == 0 and run.status()["step"] == step
    assert "stopped by SIGTERM" in run.status()["message"]
    assert next(iter(training.fit(recipe, run)))["step"] == step + 1


@pytest.mark.slow
def test_all_processes_of_a_training_pause_and_go_on(tmp_path):
    """While one waits alone the others are busy in a collective operation."""
    recipe = small(tmp_path, epochs=20, batch_size=64, device="cpu")
    recipe.to_yaml(tmp_path / "params.yaml")
    run = runs.Run(recipe.folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "workbench", "train", str(tmp_path / "params.yaml")]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until(lambda: last_step(run) >= 2, 120)
    step = pause(run)
    time.sleep(1)
    assert last_step(run) == step and child.poll() is None
    run.file("PAUSE").unlink()
    until(lambda: last_step(run) > step)
    pause(run)
    run.file("STOP").touch()
    text, _ = child.communicate(timeout=60)
    assert run.status()["state"] == "stopped", text


@pytest.mark.parametrize("at", [3, 10, 38])
def test_a_stop_in_validation_is_at_its_next_batch_and_validation_is_repeated(
    tmp_path, monkeypatch, at
):
    """Of the raw weights of the first epoch, its EMA weights, and those of the last epoch."""
    predict, stop, seen = inference.predict, threading.Event(), []

    def stopped(network, batches, *rest):
        def counted():
            for batch in batches:
                seen.append(batch)
                if len(seen) == at:
                    stop.set()
                yield batch

        return predict(network, counted(), *rest)

    monkeypatch.setattr(inference, "predict", stopped)
    recipe = small(tmp_path / "stopped")
    run = runs.Run(recipe.folder)
    assert [row["kind"] for row in training.fit(recipe, run, stop=stop)][-1] == "step"
    epoch = -(-at // 16)  # of eight batches for each network
    assert run.status()["state"] == "stopped" and run.status()["step"] == 11 * epoch
    assert len(run.metrics()) == epoch - 1 and last_step(run) == 11 * epoch
    monkeypatch.undo()
    assert_same_run(train(recipe), train(small(tmp_path / "whole")))
