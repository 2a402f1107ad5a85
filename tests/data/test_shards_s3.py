"""Training from shards in an object store gives what files give, whatever the store does."""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import boto3
import pytest
from helpers import assert_same_tensors, last_step, train
from shard_helpers import certificate, google, pack_list

from workbench import data, export, runs, shard_store
from workbench.data import toy
from workbench.evaluation.comparison import compare
from workbench.recipe import Recipe

pytestmark = pytest.mark.slow
SIDES = {"train": 6, "val": 3}  # shards
TRAINING = {
    "train_fraction": 0.25, "epochs": 2, "image_size": 16, "val_resize": 16,
    "crop_scale": [0.5, 1.0], "hflip": 0.5, "brightness": 0.4, "ema_decay": 0.9,
    "lr": 0.05, "log_every": 1, "workers": 2,
}  # fmt: skip


@contextlib.contextmanager
def started(*words):
    """The URL of shard_server.py with these words."""
    command = [sys.executable, str(Path(__file__).with_name("shard_server.py")), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server():
    """The URL of an S3 server with a bucket, of this module alone."""
    with started() as url:
        yield url


@pytest.fixture
def store(server, monkeypatch):
    """The environment of the server's clients; returns its URL."""
    options = {"ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}
    for name, value in {**options, "ENDPOINT_URL": server}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield server
    faults(server, 0)


@functools.cache
def client(server: str):
    """The client of the SDK, which is not the one that the package uses."""
    return boto3.client("s3", endpoint_url=server)


def put(server: str, path: str, content: bytes) -> None:
    bucket, _, key = path.partition("/")
    client(server).put_object(Bucket=bucket, Key=key, Body=content)


def requests(server: str) -> int:
    """How many ranges the server has been asked for."""
    with urllib.request.urlopen(f"{server}/ranges") as answer:
        return json.load(answer)


def faults(server: str, count: int | str = "") -> dict:
    """Lets the server damage this many requests; returns how many it has damaged."""
    with urllib.request.urlopen(f"{server}/faults{f'?{count}' if count != '' else ''}") as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with the digits as shards, in the order of their lists, and indexes of them."""
    folder, files = tmp_path_factory.mktemp("shards"), toy.embedded("digits")
    for side, count in SIDES.items():
        listed = files / "meta" / f"{side}.txt"
        made = pack_list(listed, files / side, folder / side, count)
        data.write_index(made and [str(path) for path in made], folder / f"local_{side}.arrow")
    return folder


def upload(server: str, folder: Path, bucket: str) -> None:
    """Puts the shards into a bucket, and writes indexes of it: BUCKET_train.arrow."""
    client(server).create_bucket(Bucket=bucket)
    for side, count in SIDES.items():
        for path in sorted((folder / side).iterdir()):
            put(server, f"{bucket}/{side}/{path.name}", path.read_bytes())
        source = f"s3://{bucket}/{side}/{{00000..{count - 1:05d}}}.tar"
        data.write_index([source], folder / f"{bucket}_{side}.arrow", progress=False)


def recipe(folder: Path, kind: str, runs_dir: Path, **options) -> Recipe:
    """A short training from files (kind "files"), or of the indexes of this name."""
    lists = {f"{side}_list": [str(folder / f"{kind}_{side}.arrow")] for side in SIDES}
    where = toy.as_files("digits") if kind == "files" else lists
    options = {**TRAINING, "name": kind, "runs_dir": str(runs_dir), **where, **options}
    return Recipe(dataset="files", **options)


def weights(run: runs.Run) -> dict:
    return run.load_checkpoint()["model"]


@pytest.fixture(scope="module")
def from_files(shards, tmp_path_factory) -> runs.Run:
    return train(recipe(shards, "files", tmp_path_factory.mktemp("files")))


def batches(options: Recipe) -> list:
    from workbench import training

    content = data.load_dataset(options)
    found = training.inputs.train_batches(options, content, range(12), workers=2)
    return [(batch.images, batch.labels, batch.indices) for batch in found]


def test_batches_and_weights_from_local_shards_and_from_s3_are_those_of_files(
    shards, store, from_files, tmp_path
):
    upload(store, shards, "same")
    wanted = batches(recipe(shards, "files", tmp_path))
    for kind in ("local", "same"):
        options = recipe(shards, kind, tmp_path)
        for ours, theirs in zip(batches(options), wanted, strict=True):
            assert all(map(lambda a, b: a.equal(b), ours, theirs)), kind
        run = train(options)
        assert_same_tensors(weights(run), weights(from_files))
        assert run.metrics().equals(from_files.metrics())
        assert (
            run.predictions()
            .drop(columns="file")
            .equals(from_files.predictions().drop(columns="file"))
        )


def test_two_hundred_faults_of_the_store_lose_and_swap_nothing(shards, store, from_files, tmp_path):
    upload(store, shards, "faulty")
    before = sum(faults(store, 200).values())
    run = train(recipe(shards, "faulty", tmp_path))
    found = faults(store, 0)
    assert sum(found.values()) - before == 200 and min(found.values()) >= 50
    assert_same_tensors(weights(run), weights(from_files))
    assert run.metrics().equals(from_files.metrics()) and run.quarantine().empty


@pytest.mark.parametrize("scheme", ["gs", "https"])
def test_google_cloud_and_https_give_what_files_give_whatever_the_server_damages(
    shards, from_files, tmp_path, monkeypatch, scheme
):
    for side in SIDES:
        shutil.copytree(shards / side, tmp_path / "b" / side)
    pem = [str(certificate(tmp_path))] if scheme == "https" else []
    if pem:
        monkeypatch.setenv("SSL_CERT_FILE", *pem)
    with started(str(tmp_path), *pem) as server:
        url = f"{server}/b" if pem else google(monkeypatch, server)
        for side, count in SIDES.items():
            names = f"{{00000..{count - 1:05d}}}" if pem else "*"
            source = f"{url}/{side}/{names}.tar"
            data.write_index([source], tmp_path / f"{scheme}_{side}.arrow", progress=False)
        options = recipe(tmp_path, scheme, tmp_path)
        wanted = batches(recipe(shards, "files", tmp_path))
        for ours, theirs in zip(batches(options), wanted, strict=True):
            assert all(map(lambda a, b: a.equal(b), ours, theirs))
        faults(server, 40)
        run = train(options)
        damaged = faults(server, 0)
    assert sum(damaged.values()) == 40 and min(damaged.values()) == 10
    assert_same_tensors(weights(run), weights(from_files))
    assert run.metrics().equals(from_files.metrics()) and run.quarantine().empty


@pytest.mark.parametrize("gigabytes", [1.0, 0.0004])
def test_a_cache_gives_the_same_weights_and_asks_the_store_for_no_image_twice(
    shards, store, from_files, tmp_path, gigabytes
):
    bucket = f"kept-{gigabytes}"
    upload(store, shards, bucket)
    cache = {"shard_cache_gb": gigabytes, "cache_dir": str(tmp_path / "cache")}
    for name in ("first", "second"):
        before = requests(store)
        run = train(recipe(shards, bucket, tmp_path, name=name, **cache))
        asked = requests(store) - before
        assert_same_tensors(weights(run), weights(from_files))
        assert run.metrics().equals(from_files.metrics())
        images = 324 + 500  # training and validation
        if name == "second":
            assert (asked == 0) == (gigabytes == 1)  # or those there was no room for
        elif gigabytes == 1:  # two processes may ask for one image at a time
            assert images <= asked < images + 50
    os.sync()
    space = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").glob("*.shard"))
    assert 0.5 * min(gigabytes, 0.001) * 1e9 < space <= gigabytes * 1e9


def start(options: Recipe, folder: Path, **env) -> subprocess.Popen:
    options.to_yaml(folder / "recipe.yaml")
    command = [sys.executable, "-m", "workbench", "train", str(folder / "recipe.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_run_from_s3_that_is_killed_resumes_to_the_same_weights(shards, store, tmp_path):
    upload(store, shards, "killed")
    ended = {}
    for name, kill in (("whole", False), ("killed", True)):
        cache = {"shard_cache_gb": 1.0, "cache_dir": str(tmp_path / name / "cache")}
        options = recipe(shards, "killed", tmp_path / name, checkpoint_minutes=0.0, **cache)
        (tmp_path / name).mkdir()
        run = runs.Run(options.folder)
        if kill:
            with start(options, tmp_path / name) as process:
                while process.poll() is None and last_step(run) < 8:
                    time.sleep(0.02)
                process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
        with start(options, tmp_path / name) as process:
            text = process.communicate(timeout=300)[0]
        assert process.returncode == 0, text
        ended[name] = weights(run)
    assert_same_tensors(ended["killed"], ended["whole"])


def test_a_shard_that_is_replaced_by_one_of_its_size_stops_training_and_a_resume(
    shards, store, tmp_path
):
    upload(store, shards, "replaced")
    path = shards / "train" / "00003.tar"
    other = path.read_bytes()
    other = other[:600] + bytes([other[600] ^ 1]) + other[601:]
    options = recipe(shards, "replaced", tmp_path, epochs=3)
    run, replaced = runs.Run(options.folder), False
    with pytest.raises(shard_store.StoreError, match="00003.tar has changed since it was indexed"):
        from workbench import training

        for row in training.fit(options, run):
            if row["step"] >= 4 and not replaced:
                put(store, "replaced/train/00003.tar", other)
                replaced = True
    stopped = run.load_checkpoint()["progress"]["step"]
    assert stopped >= 4 and run.status()["state"] == "failed" and run.quarantine().empty
    with pytest.raises(shard_store.StoreError, match="s3://replaced/train/00003.tar has changed"):
        train(options)
    put(store, "replaced/train/00003.tar", path.read_bytes())
    resumed = train(options)
    whole = train(recipe(shards, "local", tmp_path, epochs=3))
    assert_same_tensors(weights(resumed), weights(whole))
    assert resumed.metrics().equals(whole.metrics())
    # Indexed again, it has the names, labels and sizes of before: its ETag tells.
    put(store, "replaced/train/00003.tar", other)
    data.write_index(["s3://replaced/train/*.tar"], shards / "replaced_train.arrow", progress=False)
    with pytest.raises(runs.RunError, match="a shard in the object store changed since"):
        train(options)
    new = train(options.replace(name="new"))
    assert new.environment()["data"] == run.environment()["data"]
    assert any("a shard was replaced" in text for text in compare([run.path, new.path]).cautions)


def test_a_store_that_stops_answering_ends_the_run_with_a_checkpoint(
    shards, store, tmp_path, monkeypatch
):
    upload(store, shards, "silent")
    monkeypatch.setattr(shard_store, "SECONDS", 2)  # in the workers, which are forked
    options = recipe(shards, "silent", tmp_path, batch_size=16)  # more steps than are read ahead
    run = runs.Run(options.folder)
    from workbench import training

    silent = r"silent/train/\d+.tar does not answer for 2 s"
    with pytest.raises(shard_store.StoreUnavailable, match=silent):
        for row in training.fit(options, run):
            if row["step"] == 4:
                faults(store, 10**9)
    faults(store, 0)
    assert run.load_checkpoint()["progress"]["step"] >= 4 and run.status()["state"] == "stopped"
    resumed, whole = train(options), train(recipe(shards, "local", tmp_path, batch_size=16))
    assert_same_tensors(weights(resumed), weights(whole))
    assert resumed.metrics().equals(whole.metrics())


def test_a_run_from_s3_is_exported_checked_and_predicts_like_one_of_local_shards(
    shards, store, tmp_path, command, monkeypatch
):
    upload(store, shards, "exported")
    options = {kind: recipe(shards, kind, tmp_path) for kind in ("exported", "local")}
    found = {kind: train(one) for kind, one in options.items()}
    assert len(compare([run.path for run in found.values()]).images) == 500
    reports, tables = {}, {}
    for kind, run in found.items():
        package = export.package(run.path, tmp_path, with_preprocessing=True, seconds=0)
        reports[kind] = export.read_report(package)
        done = command("predict", package, shards / f"{kind}_val.arrow",
                       "--out", tmp_path / f"{kind}.csv")  # fmt: skip
        assert "500 images: 500 predictions" in done.stdout, done.stderr
        tables[kind] = (tmp_path / f"{kind}.csv").read_bytes()
    assert reports["exported"] == reports["local"] and tables["exported"] == tables["local"]
    assert set(reports["local"]["formats"]) == {"torch", "onnx", "with_preprocessing"}
    options["exported"].to_yaml(tmp_path / "recipe.yaml")
    before = requests(store)
    done = command("check-data", tmp_path / "recipe.yaml")
    assert done.returncode == 0 and requests(store) - before == 324 + 500
    monkeypatch.setenv("WORKBENCH_STORE_SECONDS", "2")
    faults(store, 10**9)
    done = command("check-data", tmp_path / "recipe.yaml")
    assert done.returncode == 3 and "0.tar does not answer for 2 s" in done.stderr


def test_a_missing_shard_is_named_before_the_first_step(shards, store, tmp_path):
    upload(store, shards, "missing")
    client(store).delete_object(Bucket="missing", Key="val/00001.tar")
    options = recipe(shards, "missing", tmp_path)
    with pytest.raises(shard_store.StoreError, match="s3://missing/val/00001.tar is missing"):
        train(options)


def test_what_is_not_in_the_store_or_not_allowed_is_said_at_once(shards, store, tmp_path):
    upload(store, shards, "there")
    out = tmp_path / "x.arrow"
    for url, says in (
        ("s3://nowhere/*.tar", "is in a bucket that does not exist"),
        ("s3://there/train/{0..3}.tar", "s3://there/train/0.tar is missing"),
        ("s3://there/*/none-*.tar", "no shard has the name"),
    ):
        with pytest.raises((shard_store.StoreError, data.DataError), match=re.escape(says)):
            data.write_index([url], out)


def test_a_training_that_loses_its_store_ends_with_exit_code_3(shards, store, tmp_path):
    upload(store, shards, "lost")
    options = recipe(shards, "lost", tmp_path, batch_size=16, workers=1, epochs=20)
    with start(options, tmp_path, WORKBENCH_STORE_SECONDS="2") as process:
        while process.poll() is None and last_step(runs.Run(options.folder)) < 3:
            time.sleep(0.02)
        faults(store, 10**9)
        text = process.communicate(timeout=100)[0]
    assert process.returncode == 3, text
    assert "does not answer for 2 s" in text and "Traceback" not in text
