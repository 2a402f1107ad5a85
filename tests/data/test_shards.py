"""Tar shards are read in place by an index, or refused by name."""

import itertools
import json
import os
import pickle
import re
import socket
import tarfile
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import save_noise
from helpers import train
from shard_helpers import Ranges, pack, served

from workbench import data, shard_store
from workbench.augmentation import EvalTransform, TrainTransform
from workbench.data import DataError, images, sampler
from workbench.recipe import Recipe
from workbench.shard_cache import ShardCache
from workbench.shard_store import StoreError, StoreUnavailable
from workbench.training import setup


@pytest.fixture
def png(tmp_path):
    """The bytes of different images."""
    return lambda seed: save_noise(tmp_path / "x.png", seed).read_bytes()


def index(folder, *sources, name="train") -> str:
    return data.write_index(list(map(str, sources)), folder / f"{name}.arrow", progress=False)


def load(folder, **options) -> data.Dataset:
    lists = {"train_list": "train.arrow", "val_list": "train.arrow", **options}
    return data.load_dataset(Recipe(dataset="files", data_dir=str(folder), **lists))


def samples(png, labels, end="cls", start=0) -> dict[str, bytes]:
    files = {}
    for i, label in enumerate(labels, start):
        files |= {f"{i:03d}.png": png(i), f"{i:03d}.{end}": label}
    return files


def test_every_entry_of_an_index_has_the_bytes_and_the_label_of_its_sample(tmp_path, png):
    """Read with Python's tarfile by name, not by offset."""
    for n in range(3):
        pack(tmp_path / f"{n:05d}.tar", samples(png, [b"1\n", b"0", b"12"] * 2, start=6 * n))
    text = index(tmp_path, tmp_path / "{00000..00001}.tar", tmp_path / "0000[2-9].tar")
    assert text.endswith("train.arrow: 18 images of 3 classes in 3 shards")
    train = load(tmp_path).train
    assert train.file.tolist() == [f"{i:03d}.png" for i in range(18)]
    assert train.label.tolist() == [1, 0, 12] * 6 and train.label.dtype == np.int8
    for row in train.itertuples():
        with tarfile.open(row.path.partition("::")[0]) as tar:
            wanted = tar.extractfile(row.file).read()
        assert next(shard_store.read([row.path])) == wanted
        assert (images.open(row.path).pixels() == images.open(row.path, wanted).pixels()).all()


@pytest.mark.parametrize(
    "files, classes, labels",
    [
        ({"a.jpg": b"x", "a.txt": b"cat", "b.jpg": b"x", "b.txt": b" ant\n"},
         ["ant", "cat"], [1, 0]),
        ({"a.jpg": b"x", "a.json": b'{"label": 1}',
          "b.jpg": b"x", "b.json": b'{"cls": 0, "label": 7}'}, ["0", "1"], [1, 0]),
        ({"a.jpg": b"x", "a.cls": b"1", "a.txt": b"a caption", "a.seg.png": b"x",
          "b.jpg": b"x", "b.cls": b"0"}, ["0", "1"], [1, 0]),
        ({"./cat/1.jpg": b"x", "./cat/2.x.jpg": b"x", "./ant/1.jpg": b"x", "./ant/._1.jpg": b"x"},
         ["ant", "cat"], [1, 1, 0]),
        ({"train/7/a.jpg": b"x", "train/7/in/b.jpg": b"x", "train/11/a.jpg": b"x"},
         ["11", "7"], [1, 1, 0]),
        # in any case, with a byte order mark, and no label file without an image of its name
        ({"A.PNG": b"x", "A.CLS": b"1", "b.Png": b"x", "b.Json": b'{"cls": 0}'},
         ["0", "1"], [1, 0]),
        ({"a.png": b"x", "a.json": b'{"label": 1.0}', "a.txt": b"a caption",
          "b.png": b"x", "b.json": b'{"label": 0}'}, ["0", "1"], [1, 0]),
        ({"a.png": b"x", "a.cls": b"\xef\xbb\xbf1", "b.png": b"x", "b.txt": b"0"},
         ["0", "1"], [1, 0]),
        ({"cat/1.png": b"x", "cat/README.txt": b"!", "ant/1.png": b"x", "meta.json": b"{}"},
         ["ant", "cat"], [1, 0]),
    ],
)  # fmt: skip
def test_labels_are_from_members_of_the_sample_or_from_class_folders(
    tmp_path, files, classes, labels
):
    index(tmp_path, pack(tmp_path / "a.tar", files))
    found = load(tmp_path)
    assert found.classes == classes and found.train.label.tolist() == labels


def test_labels_of_validation_follow_the_classes_of_training(tmp_path):
    index(tmp_path, pack(tmp_path / "a.tar", {f"{c}/1.jpg": b"x" for c in "abc"}))
    index(tmp_path, pack(tmp_path / "b.tar", {"c/2.jpg": b"x", "b/2.jpg": b"x"}), name="val")
    assert load(tmp_path, val_list="val.arrow").val.label.tolist() == [2, 1]
    (tmp_path / "names.txt").write_text("c\na\nb\n")
    named = load(tmp_path, val_list="val.arrow", class_names="names.txt")
    assert named.train.label.tolist() == [1, 2, 0] and named.val.label.tolist() == [0, 2]
    index(tmp_path, pack(tmp_path / "c.tar", {"d/2.jpg": b"x"}), name="val")
    with pytest.raises(DataError, match=r"has \['d'\], not in training"):
        load(tmp_path, val_list="val.arrow")


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"x"}, "'b.jpg' has no label"),
        ({"a.jpg": b"x"}, "'a.jpg' has no label"),
        ({"a.jpg": b"x", "a.json": b"[1]"}, "'a.jpg' has no label"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "'a.jpg' and 'a.png' have one key"),
        ({"a.jpg": b"x", "a.cls": b"1", "b.cls": b"1"}, "'b' has a label and no image"),
        ({"a.md": b"x"}, "has no images"),
        ({"a.jpg": b"x", "a.txt": b"cat", "b.jpg": b"x", "b.txt": b"7"}, "'cat' is no number"),
    ],
)  # fmt: skip
def test_samples_that_would_be_read_wrongly_are_refused_by_name(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        index(tmp_path, pack(tmp_path / "a.tar", files))
    assert not (tmp_path / "train.arrow").exists()


def dotted(name: str, end: str = "cls") -> dict[str, bytes]:
    return {f"{name}.png": b"x", f"{name}.{end}": b"1"}


@pytest.mark.parametrize(
    "files, message",
    [
        ({**dotted("a"), **dotted("b.1"), **dotted("d")}, "'b.1.png' has a key that ends"),
        ({**dotted("b.1"), **dotted("c.1")}, "'b.1.png' has a key that ends"),
        ({**dotted("a"), **dotted("a.1")}, "'a.1.png' has a key that ends"),
        (dotted("b.1", "txt"), "'b.1.png' has a key that ends"),
        ({**dotted("a"), "b.1.cls": b"1"}, "'b.1' has a label and no image"),
        ({"a.jpg": b"x", "a.json": b'{"label": null}', "a.txt": b"a caption"},
         r"'a.jpg' has no label \(None\)"),
        ({"a.jpg": b"x", "a.json": b'{"label": 1.5}', "a.txt": b"1"}, r"no label \(1.5\)"),
        ({"a.jpg": b"x", "a.cls": b" ", "a.txt": b"a caption"}, r"no label \(' '\)"),
        ({"a.jpg": b"x", "a.json": b'{"label": "\\ud800"}'}, "no label .*surrogates not allowed"),
        ({"a.jpg": b"x", "a.json": b"[" * 10**5}, "no label .RecursionError"),
        ({f"{side}/{c}/1.png": b"x" for side in ("train", "val") for c in "ab"},
         r"folders \['train', 'val'\] are splits, not classes"),
    ],
)  # fmt: skip
def test_samples_are_refused_rather_than_left_out_or_labelled_by_chance(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        index(tmp_path, pack(tmp_path / "a.tar", files))


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_class_folders_of_an_index_have_the_images_of_those_of_an_archive(tmp_path, png, scheme):
    files = {"cat/0": png(0), "cat/1.png": png(1), "ant/2.x": png(2), "ant/in/3": png(3),
             "ant/notes.md": b"no image", "cat/4": b"", "README": png(5)}  # fmt: skip
    shard = pack(tmp_path / "train.tar", files)
    index(tmp_path, f"{scheme}{shard}")
    options = {"train_list": [], "val_list": [], "train_root": "train.tar", "val_root": "train.tar"}
    wanted, found = load(tmp_path, **options), load(tmp_path)
    labels = [dict(zip(data.train.file, data.train.label, strict=True)) for data in (wanted, found)]
    assert labels[0] == labels[1] and len(labels[0]) == 4 and found.classes == ["ant", "cat"]


def test_shards_of_class_folders_and_of_label_files_are_not_mixed(tmp_path):
    pack(tmp_path / "a.tar", {"cat/1.png": b"x", "dog/1.png": b"x"})
    pack(tmp_path / "b.tar", {"2.png": b"x", "2.txt": b"cat"})
    with pytest.raises(DataError, match="some shards have class folders, and others label files"):
        index(tmp_path, tmp_path / "*.tar")


def test_a_class_of_validation_with_folders_in_it_is_that_class(tmp_path, png):
    """As class folders are read from an archive."""
    train = [f"cat/{name}" for name in ("dog/1", "cat/1")] + ["dog/dog/1"]
    for side, names in (("train", train), ("val", ["cat/dog/2", "cat/cat/5"])):
        for around in ("", f"{side}/"):
            files = {f"{around}{name}.png": png(i) for i, name in enumerate(names)}
            shard = pack(tmp_path / f"{side}{len(around)}.tar", files)
            index(tmp_path, shard, name=f"{side}{bool(around):d}")
    for around in "01":
        found = load(tmp_path, train_list=f"train{around}.arrow", val_list=f"val{around}.arrow")
        assert found.classes == ["cat", "dog"] and found.train.label.tolist() == [0, 0, 1]
        assert found.val.label.tolist() == [0, 0]
    roots = {"train_root": "train0.tar", "val_root": "val0.tar", "train_list": [], "val_list": []}
    assert load(tmp_path, **roots).val.label.tolist() == [0, 0]
    (tmp_path / "names.txt").write_text("dog\ncat")
    (tmp_path / "train.txt").write_text("x.png 0\ny.png 1\n")
    (tmp_path / "train").mkdir()
    named = {"train_list": "train.txt", "class_names": "names.txt", "val_list": "val0.arrow"}
    assert load(tmp_path, **named).val.label.tolist() == [1, 1]


# ---- labels that are numbers, and labels that are names

NUMBERS, NAMES = ("index of numbers", "list"), ("index of names", "index of folders", "folders")


def side(folder, png, name: str, kind: str, labels: list[int]) -> dict:
    """The options for one side of this kind, whose labels are numbers or these of ant, bee, cat."""
    named, files = [("ant", "bee", "cat")[label] for label in labels], {}
    for i, label in enumerate(labels):
        end, text = ("txt", named[i]) if kind == "index of names" else ("cls", str(label))
        own = {f"{i}.png": png(i), f"{i}.{end}": text.encode()}
        files |= {f"{named[i]}/{i}.png": png(i)} if "folders" in kind else own
    if "index" in kind:
        index(folder, pack(folder / f"{name}.tar", files), name=name)
        return {f"{name}_list": f"{name}.arrow"}
    for file, content in files.items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_bytes(content)
    rows = [f"{i}.png {label}\n" for i, label in enumerate(labels)]
    (folder / f"{name}.txt").write_text("".join(rows))
    return {f"{name}_list": f"{name}.txt" if kind == "list" else []}


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("first", ["numbers", "names"])
def test_numbers_and_names_are_matched_by_a_file_of_class_names_alone(
    tmp_path, png, numbers, names, first
):
    kinds = (numbers, names) if first == "numbers" else (names, numbers)
    sides = dict(zip(("train", "val"), kinds, strict=True))
    labels = {"train": [2, 0, 1], "val": [1, 2]}
    options = {}
    for name, kind in sides.items():
        options |= side(tmp_path, png, name, kind, labels[name])
    both = r"{} has numbers as labels and the other side has names, \['\w+', '\w+'"
    with pytest.raises(DataError, match=both.format("train" if first == "numbers" else "val")):
        load(tmp_path, **options)
    classes = ["cat", "ant", "bee"]
    (tmp_path / "names.txt").write_text("\n".join(classes))
    found = load(tmp_path, **options, class_names="names.txt")
    assert found.classes == classes
    for name, frame in (("train", found.train), ("val", found.val)):
        by_name = [classes.index(("ant", "bee", "cat")[label]) for label in labels[name]]
        ours = [frame.label[frame.file.str.endswith(f"{i}.png")].item() for i in range(len(frame))]
        assert ours == (labels[name] if sides[name] in NUMBERS else by_name)
    (tmp_path / "names.txt").write_text("cat\nant\nbee\nant")
    with pytest.raises(DataError, match="class_names has 'ant' twice|class folders differ"):
        load(tmp_path, **options, class_names="names.txt")
    (tmp_path / "names.txt").write_text("ant\nbee")
    with pytest.raises(
        DataError, match="labels outside 0 to 1|class folders differ|not in .*class_names"
    ):
        load(tmp_path, **options, class_names="names.txt")


@pytest.mark.parametrize(
    "train, val", [*itertools.product(NUMBERS, NUMBERS), *itertools.product(NAMES, NAMES)]
)
def test_sides_of_one_kind_of_labels_need_no_class_names(tmp_path, png, train, val):
    options = side(tmp_path, png, "train", train, [2, 0, 1])
    found = load(tmp_path, **options, **side(tmp_path, png, "val", val, [1, 2]))
    assert sorted(found.val.label) == [1, 2] and sorted(found.train.label) == [0, 1, 2]
    assert found.classes == (["0", "1", "2"] if val in NUMBERS else ["ant", "bee", "cat"])


# ---- shards and their names


def test_a_key_in_two_shards_is_refused_with_both_places(tmp_path):
    for name in "ab":
        pack(tmp_path / f"{name}.tar", {"k.jpg": b"x", "k.cls": b"1"})
    with pytest.raises(DataError, match="'k.jpg' is there twice: .*a.tar::.*b.tar::"):
        index(tmp_path, tmp_path / "*.tar")


def test_compressed_truncated_damaged_linked_and_missing_shards_are_refused_by_name(tmp_path, png):
    whole = pack(tmp_path / "whole.tar", samples(png, [b"1", b"0"])).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        header, end = tar.getmembers()[2].offset, tar.offset
    places = {"member": 1000, "boundary": header, "header": header + 100, "end": end, "no": 0}
    cut = {name: whole[:place] for name, place in places.items()}
    damaged = bytearray(whole)
    damaged[header + 148] ^= 1  # the checksum of a later header
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "whole.tar", "a.jpg")
    with tarfile.open(tmp_path / "linked.tar", "w") as tar:
        (link := tarfile.TarInfo("b.jpg")).type = tarfile.SYMTYPE
        tar.addfile(link)
    for name, content in {**cut, "damaged": bytes(damaged)}.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    for name in (*cut, "damaged", "packed", "linked"):
        with pytest.raises(
            StoreError, match=f"{name}.tar is truncated, compressed or no plain tar"
        ):
            index(tmp_path, tmp_path / f"{name}.tar")
    with pytest.raises(StoreError, match="gone.tar is missing"):
        index(tmp_path, tmp_path / "gone.tar")
    with pytest.raises(DataError, match="no shard has the name"):
        index(tmp_path, tmp_path / "z*.tar")
    with pytest.raises(DataError, match="name it NAME.arrow"):
        data.write_index([str(tmp_path / "whole.tar")], tmp_path / "train.parquet")


@pytest.mark.parametrize(
    "kind, says",
    [
        (tarfile.FIFOTYPE, "no file"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.SYMTYPE, "a link"),
    ],
)
def test_a_member_that_is_no_plain_file_is_refused_as_what_it_is(tmp_path, kind, says):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        (member := tarfile.TarInfo("b.jpg")).type = kind
        member.linkname = "c.jpg" * (says == "a link")
        tar.addfile(member)
    with pytest.raises(StoreError, match=f"'b.jpg' is {says}"):
        index(tmp_path, tmp_path / "a.tar")


def test_a_name_that_is_no_utf8_is_refused_as_such(tmp_path):
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        tar.addfile(tarfile.TarInfo("caf\u00e9/1.jpg"))
    with pytest.raises(StoreError, match=r"a.tar: b'caf\\xe9/1.jpg' is no UTF-8 name; rename it"):
        index(tmp_path, tmp_path / "a.tar")


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize(
    "pattern, names",
    [
        ("train/*.tar", ["0", "1", "n1", "n[1]"]),
        ("train/?.tar", ["0", "1"]),
        ("train?0.tar", []),
        ("*/*/?.tar", ["old/2"]),
        ("train/[01].tar", ["0", "1"]),
        ("train/n[1].tar", ["n[1]"]),  # as it is written
        ("train/{0..1}.tar", ["0", "1"]),
    ],
)
def test_wildcards_stay_within_a_folder_on_a_disk_and_in_a_store(tmp_path, scheme, pattern, names):
    for i, name in enumerate(("0", "1", "n1", "n[1]", "old/2")):
        pack(tmp_path / "in" / "train" / f"{name}.tar", {f"{i}.png": b"x", f"{i}.cls": b"1"})
    if not names:
        with pytest.raises(DataError, match="no shard has the name"):
            index(tmp_path, f"{scheme}{tmp_path}/in/{pattern}")
        return
    index(tmp_path, f"{scheme}{tmp_path}/in/{pattern}")
    found = [path.partition("::")[0] for path in load(tmp_path, num_classes=2).train.path]
    assert found == [f"{scheme}{tmp_path}/in/train/{name}.tar" for name in names]


def test_the_folder_of_an_index_is_made_before_any_shard_is_read(tmp_path):
    shard = pack(tmp_path / "a.tar", {"a/1.png": b"x", "b/1.png": b"x"})
    index(tmp_path / "no" / "dir", shard)
    assert len(load(tmp_path / "no" / "dir").train) == 2
    with pytest.raises(OSError, match="a.tar"):
        index(shard / "below", tmp_path / "gone.tar")


def test_a_pattern_for_folders_at_any_depth_is_refused_and_takes_no_part_of_them(tmp_path):
    pack(tmp_path / "in" / "0.tar", {"a/1.png": b"x"})
    for start in (f"{tmp_path}/", "s3://bucket/"):
        with pytest.raises(
            DataError, match=r"\*\* is not supported; write one \* for every folder"
        ):
            index(tmp_path, f"{start}**/*.tar")


def test_a_range_without_numbers_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"\{5..1\} is empty; write the smaller number first"):
        index(tmp_path, tmp_path / "{5..1}.tar")


@pytest.mark.parametrize("name", ["train.idx", "0.tar"])
def test_an_index_with_another_name_and_a_tar_are_no_lists(indexed, name):
    os.rename(indexed / "train.arrow", indexed / "train.idx")
    with pytest.raises(DataError, match="an index is named NAME.arrow, a tar is for train_root"):
        load(indexed, train_list=name, val_list=name)


@pytest.fixture
def indexed(tmp_path, png):
    """A folder with an index of three shards of five images."""
    for n in range(3):
        pack(tmp_path / f"{n}.tar", samples(png, [b"0", b"1", b"2", b"0", b"1"], start=5 * n))
    index(tmp_path, tmp_path / "*.tar")
    return tmp_path


OPTIONS = {"seed": 3, "batch_size": 4, "steps": range(6)}


def batches(frame, **options) -> list[data.Batch]:
    transform = TrainTransform(16, crop_scale=(0.3, 1.0), hflip=0.5)
    return list(data.train_loader(frame, transform, **OPTIONS, **options))


def test_batches_are_those_of_the_unpacked_files_for_any_number_of_workers(indexed):
    train = load(indexed).train
    for path in indexed.glob("*.tar"):
        with tarfile.open(path) as tar:
            tar.extractall(indexed / "files", filter="data")
    files = train.assign(path=[str(indexed / "files" / name) for name in train.file])
    files.attrs = {}
    wanted = batches(files)
    for workers in (0, 2):
        for ours, theirs in zip(batches(train, workers=workers), wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))


def test_a_reader_that_moves_to_another_process_has_its_shards_and_their_cache(
    indexed, monkeypatch
):
    train = load(indexed).train
    monkeypatch.setattr(shard_store, "cache", cache := ShardCache(str(indexed), 10**6))
    reader = data.loader.Reader(train, EvalTransform(16, 16), None)
    packed = pickle.dumps(reader)
    os.utime(indexed / "1.tar", ns=(1, 1))
    shard_store.known.clear()  # as in a process that was not forked
    shard_store.cache = None
    part = data.loader.Part(np.arange(7), None, np.arange(7), 0, 0, True, 7)
    assert "1.tar has changed since it was indexed" in str(pickle.loads(packed)[part].error)
    assert shard_store.cache == cache


def test_a_frame_keeps_the_versions_of_its_own_index(tmp_path, png):
    """A shard is packed again in another order, with the same size, and indexed for validation."""
    path, files = tmp_path / "a.tar", samples(png, [b"0", b"1", b"2"])
    index(tmp_path, pack(path, files))
    index(tmp_path, pack(path, dict(reversed(files.items()))), name="val")
    content = load(tmp_path, val_list="val.arrow")
    assert path.stat().st_size and content.val.label.tolist() == [2, 1, 0]
    assert batches(content.val)
    with pytest.raises(StoreError, match="a.tar has changed since it was indexed"):
        batches(content.train)


@pytest.mark.parametrize("side", ["train", "val"])
def test_a_training_without_readable_images_ends_by_name(tmp_path, png, side):
    """Files are decoded before training; of an index only the shards are looked at."""
    files = samples(png, [b"0", b"1"] * 20)
    damaged = {name: content[:60] if name > "025.png" else content for name, content in
               files.items()}  # fmt: skip
    for name in ("train", "val"):
        pack(tmp_path / f"{name}.tar", damaged if name == side else files)
        index(tmp_path, tmp_path / f"{name}.tar", name=name)
    recipe = Recipe(
        dataset="files", data_dir=str(tmp_path), train_list="train.arrow", val_list="val.arrow",
        model="test_resnet", epochs=1, batch_size=8, workers=0, runs_dir=str(tmp_path / "runs"),
    )  # fmt: skip
    with pytest.raises(DataError, match=f"{side}: 9 of 40 images cannot be read, last "):
        train(recipe)


def test_a_cache_for_shards_that_are_on_a_disk_is_refused(indexed):
    options = {"train_list": ["train.arrow"], "val_list": ["train.arrow"], "shard_cache_gb": 1.0}
    recipe = Recipe(dataset="files", data_dir=str(indexed), **options)
    with pytest.raises(DataError, match="shard_cache_gb: no shard is in an object store"):
        train(recipe.replace(runs_dir=str(indexed / "runs")))


@pytest.mark.parametrize("how", ["replaced", "longer", "missing"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_not_the_indexed_one_stops_the_batches_by_name(indexed, how, workers):
    train, shard = load(indexed).train, indexed / "1.tar"
    content = shard.read_bytes()
    shard.unlink()
    if how != "missing":
        shard.write_bytes(content + bytes(512 * (how == "longer")))
    text = "is missing" if how == "missing" else "has changed since it was indexed"
    with pytest.raises(StoreError, match=f"1.tar {text}"):
        batches(train, workers=workers)
    with pytest.raises(StoreError, match=f"1.tar {text}"):
        data.check_shards(train)


def test_an_image_that_is_damaged_in_its_shard_is_left_out_by_name_and_no_other(tmp_path, png):
    files = samples(png, [b"0", b"1", b"0", b"1"])
    files["002.png"] = files["002.png"][:200]
    index(tmp_path, pack(tmp_path / "a.tar", files))
    content = load(tmp_path)
    [batch] = data.eval_loader(content.train, EvalTransform(16, 16), batch_size=4)
    assert batch.indices.tolist() == [0, 1, 3] and batch.failures[0][0] == 2
    findings = data.check_data(content, progress=False)
    assert set(findings.file[findings.finding == "truncated"]) == {"002.png"}


def test_verification_of_an_index_checks_shards_and_leaves_its_rows(indexed):
    recipe = Recipe(dataset="files", data_dir=str(indexed), train_list="train.arrow",
                    val_list="train.arrow")  # fmt: skip
    content = data.load_dataset(recipe)
    verified, bad = setup.verified(recipe, content)
    assert verified.train is content.train and bad.empty
    os.utime(indexed / "2.tar", ns=(1, 1))
    with pytest.raises(StoreError, match="2.tar has changed"):
        setup.verified(recipe, content)
    setup.verified(recipe.replace(verify_data=False), content)


def test_the_fingerprint_of_an_index_follows_its_shards_labels_and_rows(indexed, png):
    content = load(indexed)
    again, few = load(indexed), load(indexed, train_fraction=0.5)
    assert data.fingerprint(again) == data.fingerprint(content) != data.fingerprint(few)
    pack(indexed / "1.tar", samples(png, [b"0", b"1", b"2", b"0", b"2"], start=5))
    index(indexed, indexed / "*.tar")
    assert data.fingerprint(load(indexed)) != data.fingerprint(content)


def test_an_index_is_refused_beside_other_lists_and_where_it_is_none(indexed):
    (indexed / "t.csv").write_text("file,label\na.png,1\n")
    (indexed / "val").mkdir()
    with pytest.raises(DataError, match="an index cannot be beside a table"):
        load(indexed, val_list="t.csv")
    with pytest.raises(DataError, match="an index stands alone"):
        load(indexed, train_list=["train.arrow", "train.arrow"])
    pd.DataFrame({"a": [1]}).to_feather(indexed / "other.arrow")
    (indexed / "cut.arrow").write_bytes((indexed / "train.arrow").read_bytes()[:-500])
    for name in ("other", "cut", "gone"):
        with pytest.raises(DataError, match=rf"{name}.arrow' cannot be read .* `workbench index"):
            load(indexed, train_list=f"{name}.arrow")


def test_a_tar_behind_the_end_of_another_is_refused_and_zeros_are_not(tmp_path, png):
    """`cat a.tar b.tar`: a reader that ends at the first end would leave half of the images out."""
    first, second = (
        pack(tmp_path / f"{start}.tar", samples(png, [b"0"], start=start)).read_bytes()
        for start in (0, 1)
    )
    (tmp_path / "both.tar").write_bytes(first + second)
    with pytest.raises(StoreError, match=r"both.tar .*\(there is another tar behind its end\)"):
        index(tmp_path, tmp_path / "both.tar")
    (tmp_path / "zeros.tar").write_bytes(first + bytes(3 * 2**20))
    assert "1 image of 1 class" in index(tmp_path, tmp_path / "zeros.tar")


def test_the_command_writes_an_index(indexed, command):
    done = command("index", indexed / "{0..2}.tar", "--out", indexed / "val.arrow")
    assert done.returncode == 0 and "15 images of 3 classes in 3 shards" in done.stdout
    assert len(load(indexed, val_list="val.arrow").val) == 15
    done = command("index", indexed / "9.tar", "--out", indexed / "val.arrow")
    assert done.returncode == 1 and "9.tar is missing" in done.stderr


def test_a_request_is_repeated_until_it_succeeds_and_then_the_shard_is_named(indexed, monkeypatch):
    place = load(indexed).train.path[0]
    wanted, pread = next(shard_store.read([place])), os.pread
    monkeypatch.setattr(shard_store, "SECONDS", 2.5)
    answers = [OSError(5, "Input/output error"), b"short"]

    def failing(*arguments):
        answer = answers.pop(0) if answers else pread(*arguments)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(os, "pread", failing)
    start = time.monotonic()
    assert next(shard_store.read([place])) == wanted
    assert 0.75 <= time.monotonic() - start  # twice the first wait the second time
    answers += [b"short"] * 100
    with pytest.raises(StoreUnavailable, match="0.tar does not answer for 2.5 s .* same command"):
        next(shard_store.read([place]))
    assert 96 <= len(answers) <= 98  # waits of 0.25, 0.5, 1 s, longer by up to 15/16


@pytest.mark.parametrize(
    "url, says",
    [
        ("FOLDER", "is a folder; name the tar files in it"),
        ("s4://bucket/a.tar", "s4://bucket cannot be opened (.*); see obstore's from_url"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar needs credentials, such as AWS_ACCESS_KEY_ID"),
        ("gs://bucket/*.tar", "needs credentials, .* GOOGLE_APPLICATION_CREDENTIALS for gs://"),
    ],
)
def test_what_cannot_succeed_is_not_repeated(tmp_path, command, monkeypatch, url, says):
    """Without a metadata server, as machines of a cloud have it."""
    monkeypatch.setenv("WORKBENCH_STORE_SECONDS", "1000")
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    url = str(tmp_path) if url == "FOLDER" else url
    done = command("index", url, "--out", tmp_path / "x.arrow")
    assert done.returncode == 1 and re.search(says, done.stderr), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"AWS_SECRET_ACCESS_KEY": "s"}])
def test_an_image_cannot_be_read_without_credentials_which_is_said_soon(monkeypatch, given):
    """After a few seconds, in which a machine of a cloud may get them."""
    monkeypatch.setenv("WORKBENCH_STORE_SECONDS", "1000")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match="needs credentials, such as AWS_ACCESS_KEY_ID"):
        next(shard_store.read(["s3://bucket/a.tar::512+10:a.png"]))


def test_a_store_that_is_down_takes_one_wait_however_many_shards_there_are(
    tmp_path, command, monkeypatch
):
    with socket.socket() as nobody:  # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/{{0..299}}.tar"
        monkeypatch.setenv("WORKBENCH_STORE_SECONDS", "3")  # of the process that reads
        start = time.monotonic()
        done = command("index", url, "--out", tmp_path / "x.arrow")
    assert done.returncode == 3 and "/0.tar does not answer for 3 s" in done.stderr
    assert time.monotonic() - start < 30  # 300 shards, 16 at a time: 57 s


def test_shards_of_a_web_server_are_read_by_name_whatever_is_in_it(tmp_path, png):
    """A fragment or query is part of a key: without it another shard would be read."""
    names = ["a.tar", "a#1.tar", "a&b=1.tar", "a b%20.tar"]
    for n, name in enumerate(names):
        pack(tmp_path / name, samples(png, [b"0", b"1"], start=2 * n))
    with served(tmp_path) as url:
        for n, name in enumerate(names):
            index(tmp_path, f"{url}/{name}")
            train = load(tmp_path).train
            assert train.file.tolist() == [f"{2 * n:03d}.png", f"{2 * n + 1:03d}.png"]
            assert list(shard_store.read(train.path)) == [png(2 * n), png(2 * n + 1)]
            data.check_shards(train)
        os.utime(tmp_path / names[-1], (1, 1))
        with pytest.raises(StoreError, match="has changed since it was indexed"):
            list(shard_store.read(train.path))
    with served(tmp_path) as url:
        with pytest.raises(StoreError, match="a server that lists no files; name the shards"):
            index(tmp_path, f"{url}/*.tar")


def test_an_index_needs_a_few_requests_for_a_shard(tmp_path, png, monkeypatch):
    pack(tmp_path / "a.tar", samples(png, [b"0"] * 200))
    asked = []
    monkeypatch.setattr(Ranges, "log_request", lambda *words: asked.append(words))
    with served(tmp_path) as url:
        index(tmp_path, f"{url}/a.tar")
    size = (tmp_path / "a.tar").stat().st_size
    assert len(asked) <= 5 + size / 2**20


# ---- an order without a permutation


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 4097, 100_003])
def test_the_computed_order_is_a_bijection_of_every_size(count):
    for seed, epoch in ((0, 0), (0, 1), (2**32 - 1, 7)):
        rows = sampler.permuted(np.arange(count), count, seed, epoch)
        assert (np.sort(rows) == np.arange(count)).all()


def test_computed_orders_differ_by_seed_and_epoch_and_any_part_is_that_of_the_whole():
    orders = [sampler.permuted(np.arange(500), 500, seed, e) for seed in range(3) for e in range(3)]
    assert len({order.tobytes() for order in orders}) == 9
    part = np.array([499, 3, 77])
    assert (sampler.permuted(part, 500, 2, 2) == orders[-1][part]).all()


def chi_square(orders: np.ndarray) -> float:
    """Of how often each row stands at each position; about (n - 1)^2 for random orders (k, n)."""
    count = orders.shape[1]
    at = np.ravel_multi_index(
        (np.broadcast_to(np.arange(count), orders.shape), orders), (count,) * 2
    )
    seen, expected = np.bincount(at.ravel(), minlength=count**2), len(orders) / count
    return ((seen - expected) ** 2 / expected).sum()


@pytest.mark.parametrize("count", [23, 64])
def test_positions_and_pairs_of_computed_orders_are_as_uniform_as_numpys(count):
    """Five standard deviations of the statistic; with 3 rounds instead of 8 it is far outside."""
    every = np.arange(count)
    ours = np.array([sampler.permuted(every, count, seed, 1) for seed in range(4000)])
    numpys = np.array([np.random.default_rng(seed).permutation(count) for seed in range(4000)])
    freedom = (count - 1) ** 2
    for orders in (ours, numpys):
        assert abs(chi_square(orders) - freedom) < 5 * np.sqrt(2 * freedom)
        # A neighbour is as far ahead as in a random order: each distance equally often.
        steps = np.bincount((np.diff(orders) % count).ravel(), minlength=count)[1:]
        statistic = ((steps - steps.mean()) ** 2 / steps.mean()).sum()
        assert abs(statistic - (count - 2)) < 6 * np.sqrt(2 * count)


@pytest.mark.parametrize("copies, batch_size", [(1, 7), (3, 12), (3, 16), (4, 5)])
def test_a_large_set_uses_what_a_small_one_uses_at_every_position(monkeypatch, copies, batch_size):
    """Against the same places of an order that is stored."""
    count = 101
    order = sampler.permuted(np.arange(count), count, 5, 0)
    monkeypatch.setattr(sampler, "epoch_permutation", lambda seed, epoch, n: order)
    options = {"seed": 5, "batch_size": batch_size, "repeated_aug": copies}
    stored = data.Sampler(range(count), **options)
    wanted = [stored.rows(step) for step in range(stored.steps_per_epoch)]
    monkeypatch.setattr(sampler, "LARGE", 100)
    computed = data.Sampler(range(count), **options)
    for step, (rows, number) in enumerate(wanted):
        ours = computed.rows(step)
        assert (ours[0] == rows).all() and (ours[1] == number).all()


def test_a_billion_images_have_an_order_without_an_array_of_them():
    large = data.Sampler(range(10**9), seed=1, batch_size=4096)
    steps = [large.rows(step)[0] for step in (0, 1, large.steps_per_epoch - 1)]
    rows = np.concatenate(steps)
    assert len(np.unique(rows)) == len(rows) and 0 <= rows.min() and rows.max() < 10**9
    assert abs(rows.mean() / 10**9 - 0.5) < 0.02 and not large._epochs
    with pytest.raises(DataError, match="class_balanced_sampling: 1,000,000,000 images are over"):
        data.Sampler(range(10**9), seed=1, batch_size=4096, class_balanced_sampling=1.0)


def test_orders_that_earlier_runs_used_are_not_computed():
    """ImageNet-1k has 1,281,167 images, and its runs can still be repeated and resumed."""
    assert sampler.LARGE >= 4_000_000
    few = data.Sampler(range(1_281_167), seed=0, batch_size=8)
    order = data.epoch_permutation(0, 0, 1_281_167)
    assert (few.rows(0)[0] == order[:8]).all()


def test_an_index_says_what_its_shards_were(indexed):
    import pyarrow as pa

    schema = pa.ipc.open_file(str(indexed / "train.arrow")).schema
    meta = json.loads(schema.metadata[b"workbench.index"])
    for url, (size, version) in meta["shards"].items():
        assert os.stat(url).st_size == size and str(os.stat(url).st_mtime_ns) == version
    assert schema.names == ["file", "label", "path"]
