"""Measured speeds against known delays, and the sentences about them."""

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import train

from workbench import data, training
from workbench.data import images
from workbench.doctor import throughput
from workbench.doctor.throughput import Speed
from workbench.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Speed(files=100, cached=900, model=300, device="cpu", cores=2, loaders=2, threads=2)
GPU = Speed(files=600, cached=4800, model=3000, device="cuda", cores=4, loaders=4, threads=4)


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load_dataset(Recipe())


def test_gpu_speed_is_that_of_the_slower_side():
    assert GPU.together(600) == 2400 and GPU.together(4800) == 3000


def test_cpu_shares_its_cores_between_loader_and_model():
    """100 img/s per core on two cores are 5 ms an image, the model's 300 are 3.33 ms."""
    assert CPU.together(100) == pytest.approx(1000 / (5 + 1000 / 300))
    table = CPU.table().images_per_second
    assert table["both, from files (calculated)"] == 120
    assert table["loader, 2 of 2 cores, from a cache"] == 1800
    # With one thread the model leaves a core to the loaders: 10 ms and 3.33 ms of two cores.
    alone = replace(CPU, threads=1)
    assert alone.together(100) == pytest.approx(2000 / (10 + 1000 / 300))
    assert alone.together(900) == 300 and replace(alone, loaders=1).together(100) == 100


@pytest.mark.parametrize(
    "speed, options, words",
    [
        (CPU, {}, "Alone, the loader reads 200 images/s from files on 2 of 2 cores, and the model "
         "trains on 300: the loader is the limit; a cache (cache: true) would give about 2.1x."),
        (CPU, dict(cache=True), "reads 1,800 images/s from a cache on 2 of 2 cores, and the model "
         "trains on 300: the model is the limit; faster loading would give at most 1.2x."),
        (replace(CPU, cached=110), {}, "the loader is the limit; more cores or fewer operations"),
        (GPU, {}, "the loader is the limit; a cache (cache: true) would give about 1.2x."),
        (GPU, dict(cache=True), "the model is the limit; faster loading would change little."),
    ],
)  # fmt: skip
def test_verdict_names_the_limit_and_what_would_help(speed, options, words):
    assert words in speed.verdict(Recipe(**options))


def test_loader_is_measured_with_and_without_files(digits, monkeypatch):
    load = images.open
    monkeypatch.setattr(images, "open", lambda *args: (time.sleep(0.05), load(*args))[1])
    speed = throughput.measure(Recipe(hflip=0.5), digits, 1.0)
    assert 8 < speed.files < 20  # 50 ms for the file, and little besides
    assert speed.cached > 5 * speed.files
    assert speed.cores == data.available_cpus() and 1 <= speed.loaders <= speed.cores


def test_model_is_measured_by_its_step(digits, monkeypatch):
    """A model whose forward takes 0.2 s for 32 images cannot take more than 160 a second."""
    create = training.create_model

    def slow(*arguments):
        model = create(*arguments)
        model.register_forward_hook(lambda *_: time.sleep(0.2))
        return model

    monkeypatch.setattr(training, "create_model", slow)
    speed = throughput.measure(Recipe(batch_size=32), digits, 1.0)
    assert 30 < speed.model < 160


def test_measuring_keeps_generator_and_threads(digits):
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    throughput.measure(Recipe(dropout=0.5), digits, 0.2)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


@pytest.mark.parametrize("options", [dict(batch_size=1), dict(loss="bce", optimizer="lamb")])
def test_any_recipe_can_be_measured(digits, options):
    speed = throughput.measure(Recipe(**options), digits, 0.1)
    assert min(speed.files, speed.cached, speed.model) > 0


def test_training_records_loader_and_model_speed(digits, tmp_path, monkeypatch):
    """Reading a batch takes 0.4 s, training on it much less, in one process."""
    load = images.open
    monkeypatch.setattr(images, "open", lambda *args: (time.sleep(0.02), load(*args))[1])
    options = {"epochs": 1, "batch_size": 20, "workers": 0, "log_every": 2}
    few = replace(digits, train=digits.train.head(160), val=digits.val.head(20))
    run = train(Recipe(**options, runs_dir=str(tmp_path)), dataset=few)
    steps = run.steps()
    assert (steps.loader_images_per_second < 50).all()
    assert (steps.loader_images_per_second >= steps.images_per_second).all()
    together = 1 / steps.images_per_second
    apart = 1 / steps.loader_images_per_second + 1 / steps.model_images_per_second
    np.testing.assert_allclose(apart, together, rtol=0.1)  # one process does both in turn
    assert throughput.seen(steps, "cpu").endswith(": the loader is the limit.")


@pytest.mark.parametrize(
    "device, loader, waiting, ends",
    [
        ("cpu", 853, 0.07, "the loader is the limit."),
        ("cpu", 2444, 0.11, "the model is the limit; faster loading would give at most 1.3x."),
        ("cpu", 10_291, 0.11, "the model is the limit; faster loading would change little."),
        ("cuda", 853, 0.3, "the loader is the limit."),
        ("cuda", 2444, 0.11, "the model is the limit; faster loading would change little."),
    ],
)
def test_seen_names_the_slower_side(device, loader, waiting, ends):
    row = {"images_per_second": 611.0, "data_wait": waiting}
    row |= {"loader_images_per_second": loader, "model_images_per_second": 900.0}
    early = {**row, "images_per_second": 20.0}  # the start, which is left out
    text = throughput.seen(pd.DataFrame([early, early, row, row]), device)
    assert text == (
        f"The training ran at 611 images/s. The loader can read {loader:,} images/s, the model can "
        f"train on 900 and waited for images {waiting:.0%} of the time: {ends}"
    )
    for rows in ([row] * 3, [{"images_per_second": 3.0}] * 9):
        assert throughput.seen(pd.DataFrame(rows), device).startswith("Too few rows")


@pytest.mark.parametrize(
    "loader, model, threads, device, limit",
    [
        (250, 264, 2, "cpu", "loader"),
        (863, 264, 2, "cpu", "model"),
        (100, 100, 1, "cpu", "loader"),  # it takes as much of the CPU as the model or more
        (100, 100, 1, "cuda", "model"),
    ],
)
def test_verdict_and_seen_name_the_same_side(loader, model, threads, device, limit):
    speed = Speed(loader / 2, loader / 2, model, device, cores=2, loaders=2, threads=threads)
    row = {"images_per_second": speed.together(loader / 2), "data_wait": 0.09}
    row |= {"loader_images_per_second": loader, "model_images_per_second": model}
    for sentence in (speed.verdict(Recipe()), throughput.seen(pd.DataFrame([row] * 4), device)):
        assert f": the {limit} is the limit" in sentence
