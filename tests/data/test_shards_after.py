"""What comes before and after training treats an index of shards as it treats files."""

import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, save_noise
from helpers import assert_same_run, codes, on_one_node, train
from shard_helpers import pack

from workbench import data, export, shard_store
from workbench.data import images
from workbench.evaluation.comparison import ComparisonError, compare
from workbench.recipe import Recipe
from workbench.runs import Run
from workbench.shard_store import StoreError
from workbench.smoke import smoke_test

SIDES = {"train": 6, "val": 2}  # images of a class


def pack_sides(folder: Path, changed: int = -1) -> Path:
    """Two shards of class folders a side, and indexes of them; one validation image may differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for side, count in SIDES.items():
        files = {}
        for k, name in enumerate(CLASSES):
            for i in range(count):
                seed = [k, i + 100 * (i == changed and side == "val"), side == "val"]
                image = save_noise(folder / "x.png", seed)
                files[f"{name}/{side}{i}.png"] = image.read_bytes()
        for n in range(2):
            some = {name: files[name] for name in sorted(files)[n::2]}
            pack(folder / side / f"{n}.tar", some)
        index(folder, side)
    return folder


def index(folder: Path, side: str) -> None:
    data.write_index([str(folder / side / "*.tar")], folder / f"{side}.arrow", progress=False)


def recipe(folder: Path, **options) -> Recipe:
    return Recipe(**{
        "dataset": "files", "data_dir": str(folder), "train_list": ["train.arrow"],
        "val_list": ["val.arrow"], "model": "test_resnet", "epochs": 1, "batch_size": 6,
        "image_size": 16, "val_resize": 16, "crop_scale": [0.5, 1.0], "workers": 0, "lr": 0.01,
        "device": "cpu", "name": "index", "runs_dir": str(folder / "runs"), **options,
    })  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    return train(recipe(pack_sides(tmp_path_factory.mktemp("trained"))))


@pytest.fixture
def shards(trained, tmp_path) -> Path:
    """The shards and the run at another place, with other times of change and other indexes."""
    copied = shutil.copytree(trained.path.parents[1], tmp_path / "copy", copy_function=shutil.copy)
    for path in copied.glob("*/*.tar"):
        os.utime(path, ns=(1, 10**9))
    for side in SIDES:
        index(copied, side)
    return copied


# ---- which images these are


def test_an_index_of_the_same_shards_elsewhere_has_the_same_fingerprint(trained, shards, tmp_path):
    here, there = (data.load_dataset(recipe(f)) for f in (trained.path.parents[1], shards))
    assert here.val.path[0] != there.val.path[0]
    assert data.fingerprint(here) == data.fingerprint(there) == trained.environment()["data"]
    wanted = data.val_fingerprint(here.val)
    assert data.val_fingerprint(there.val) == wanted == trained.environment()["val_data"]
    assert data.val_fingerprint(there.val[:3]) != wanted
    label = there.val.label.to_numpy().copy()
    label[0] += 1
    others = [there.val.assign(label=label), data.load_dataset(recipe(pack_sides(shards, 1))).val]
    others.append(there.val.iloc[::-1])
    assert wanted not in [data.val_fingerprint(val) for val in others]


def test_runs_on_the_same_shards_in_two_places_are_compared(trained, shards):
    moved = train(recipe(shards, name="moved", lr=0.1, runs_dir=str(shards / "others")))
    assert len(compare([trained.path, moved.path]).images) == 6
    other = recipe(pack_sides(shards / "new", changed=1), name="other")
    with pytest.raises(ComparisonError, match="other images"):
        compare([trained.path, train(other).path])


def test_a_resume_still_refuses_a_shard_that_was_replaced(shards):
    again = recipe(shards)
    assert Run(again.folder).status()["state"] == "finished"
    path = shards / "val" / "1.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    longer = again.replace(name="longer", resume_from=str(again.folder), epochs=2)
    with pytest.raises(StoreError, match="1.tar has changed since it was indexed"):
        train(longer)


# Of two processes the second meets this when it reads a side of the data for the nth time.
MEETS = """
import os
from workbench import shard_store
read, seen = shard_store.read, []
def lost(places):
    raise shard_store.StoreUnavailable("shard 0.tar does not answer")
def broken(places):
    return iter([b"x"] * len(places))
def meets(places, *rest):
    places = [*places]
    seen.extend(places[:1] if "/{side}/" in places[0] else [])
    is_due = os.environ["RANK"] == "1" and len(seen) == {n}
    return {what}(places) if is_due else read(places, *rest)
shard_store.read = meets
"""


@pytest.mark.slow
@pytest.mark.parametrize(("side", "n", "step"), [("train", 5, 4), ("val", 2, 6)])
def test_a_store_that_one_process_loses_ends_all_of_them_with_a_checkpoint(tmp_path, side, n, step):
    there = {"runs_dir": str(tmp_path), "epochs": 3}
    folder = pack_sides(tmp_path)
    runs = {name: recipe(folder, name=name, **there) for name in ("lost", "whole")}
    assert codes(on_one_node(runs["lost"], MEETS.format(side=side, n=n, what="lost"))) == [3, 3]
    run = Run(runs["lost"].folder)
    status = run.status()
    assert (status["state"], status["step"], status["steps"]) == ("stopped", step, 9)
    assert status["message"] == "StoreUnavailable: shard 0.tar does not answer"
    assert run.load_checkpoint()["progress"]["step"] == step
    for one in runs.values():
        assert codes(on_one_node(one)) == [0, 0]
    assert_same_run(run, Run(runs["whole"].folder))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["train", "val"])
def test_images_that_one_process_cannot_read_end_all_of_them_with_the_reason(tmp_path, side):
    one = recipe(pack_sides(tmp_path), runs_dir=str(tmp_path))
    assert codes(on_one_node(one, MEETS.format(side=side, n=1, what="broken"))) == [1, 1]
    status, broken = Run(one.folder).status(), Run(one.folder).quarantine()
    assert status["state"] == "failed" and "images cannot be read" in status["message"]
    assert status["message"].startswith(f"DataError: {side}: ")
    assert set(broken.side) == {side} and set(broken.reason) == {"undecodable"}


# ---- export


@pytest.mark.parametrize(
    "options", [{}, {"verify_data": False}, {"val_list": [], "val_fraction": 0.3}]
)
def test_a_run_of_an_index_is_exported_and_measured(trained, shards, options, tmp_path):
    run = train(recipe(shards, name="another", **options)) if options else trained
    package = export.package(run.path, tmp_path, seconds=0)
    report, last = export.read_report(package), run.metrics().iloc[-1]
    assert report["images"] == report["script"]["onnx"]["images"] == last.val_images
    assert report["formats"]["onnx"]["top1"] == pytest.approx(last.top1)
    if not options:  # on the shards in another place
        lists = {"train_list": ["train.arrow"], "val_list": ["val.arrow"]}
        assert export.measure(package, 0, data_dir=str(shards), **lists)["problems"] == []


def test_an_export_refuses_validation_images_and_shards_that_changed(shards, tmp_path):
    run = Run(recipe(shards).folder)
    os.utime(shards / "val" / "1.tar", ns=(5, 5))
    with pytest.raises(StoreError, match="1.tar has changed since it was indexed"):
        export.package(run.path, tmp_path, data_dir=str(shards))
    pack_sides(shards, changed=1)
    with pytest.raises(export.ExportError, match="the validation images have changed since"):
        export.package(run.path, tmp_path, data_dir=str(shards))


def test_a_smoke_test_of_an_index_passes(shards):
    *_, size, end = smoke_test(recipe(shards))
    assert "a package of" in size and "the smoke test passed" in end


# ---- many images of a store


@pytest.fixture
def stored(shards, monkeypatch):
    """The data set with its shards in a store that reads the local ones, and its requests."""
    requests, root = [], str(shards)

    def each(name, items):
        requests.append([name, *items])
        for url, start, size, _ in requests[-1][1:]:
            content = Path(url.replace("s3://shards", root)).read_bytes()
            yield content[start : start + size]

    monkeypatch.setattr(shard_store, "each", each)
    content = data.load_dataset(recipe(shards))
    move = lambda frame: frame.assign(path=frame.path.str.replace(root, "s3://shards"))
    return replace(content, train=move(content.train), val=move(content.val)), requests


def test_the_images_of_a_store_are_checked_with_a_request_for_many(stored, shards):
    content, requests = stored
    files = data.verify_images(content.train, progress=False)
    assert [len(one) - 1 for one in requests] == [18]
    requests.clear()
    many = content.train.iloc[np.arange(250) % 18].reset_index(drop=True)
    assert len(data.verify_images(many, progress=False)) == 250
    assert sum(len(one) - 1 for one in requests) == 250 and len(requests) <= 4
    local = data.verify_images(data.load_dataset(recipe(shards)).train, progress=False)
    assert files.digest.tolist() == local.digest.tolist()
    assert (files.problem == "").all() and (files.width == 40).all()


def test_a_store_that_does_not_answer_is_no_finding_about_images(stored, monkeypatch):
    content, _ = stored

    def each(name, items):
        raise shard_store.StoreUnavailable("shard s3://shards/train/0.tar cannot be read")
        yield

    monkeypatch.setattr(shard_store, "each", each)
    with pytest.raises(StoreError, match="s3://shards/train/0.tar cannot be read"):
        data.check_data(content, progress=False)
    for read in (images.open, images.decode):
        with pytest.raises(StoreError, match="s3://shards/train/0.tar cannot be read"):
            read(content.train.path[0])


def test_a_local_shard_that_changed_is_no_finding_about_images(shards, command):
    path = recipe(shards).to_yaml(shards / "r.yaml") or shards / "r.yaml"
    done = command("check-data", path)
    assert done.returncode == 0 and "every image can be read" in done.stdout
    shutil.copy(shards / "val" / "0.tar", shards / "val" / "1.tar")
    done = command("check-data", path)
    assert done.returncode == 1 and "1.tar has changed since it was indexed" in done.stderr


def test_predict_takes_an_index_as_a_list_of_its_images(shards, tmp_path, command):
    run, out = recipe(shards).folder, tmp_path / "out.csv"
    done = command(
        "predict", run, shards / "val.arrow", "--out", out, "--annotate-dir", tmp_path / "a"
    )
    assert done.returncode == 0 and "6 images: 6 predictions" in done.stdout
    for path in (shards / "val").glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "files", filter="data")
    found, wanted = pd.read_csv(out), export.predict(run, [tmp_path / "files"])
    found = found.sort_values("file", ignore_index=True)
    assert found.file.tolist() == wanted.file.tolist()
    assert found.class1.tolist() == wanted.class1.tolist()
    assert found.p1.to_numpy() == pytest.approx(wanted.p1.to_numpy(), abs=1e-5)
    assert {path.name for path in (tmp_path / "a").rglob("*.png")} == {"val0.png", "val1.png"}
    (tmp_path / "no.arrow").write_bytes(b"x")
    done = command("predict", run, tmp_path / "no.arrow", "--out", tmp_path / "no.csv")
    assert done.returncode == 1 and "`workbench index" in done.stderr


def test_figures_of_many_images_ask_the_store_once(stored, trained):
    from workbench import evaluation
    from workbench.ui import views

    content, requests = stored
    worst = evaluation.mistakes(trained.predictions(), 4)
    table = worst.merge(content.val[["list", "file", "path"]], on=["list", "file"])
    views.mistakes(table, recipe(Path(".")), content.classes)
    views.distances(recipe(Path(".")), content, 4, 1)
    assert [len(one) - 1 for one in requests] == [len(table), 4] and len(table)
