"""The check of every image, what `check-data` reports, and the cache of facts."""

import os
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import CLASSES, save_noise, write_list
from PIL import Image

from workbench import CACHE, data
from workbench import __main__ as command
from workbench.data import DataError, images
from workbench.recipe import Recipe


def opened(image_folder: Path) -> data.Dataset:
    return data.load_dataset(Recipe(dataset="files", data_dir=str(image_folder)))


def findings(image_folder: Path, **options) -> pd.DataFrame:
    recipe = Recipe(dataset="files", data_dir=str(image_folder), **options)
    return data.check_data(recipe, cache=False, progress=False)


def test_valid_data_has_no_findings(image_folder):
    table = findings(image_folder)
    assert len(table) == 0
    assert list(table.columns) == ["finding", "side", "file", "label", "detail"]


def test_a_pipe_named_as_an_image_does_not_block(image_folder):
    os.mkfifo(image_folder / "train" / "a" / "pipe.png")
    rows = findings(image_folder)[["finding", "file", "detail"]].values.tolist()
    assert rows == [["unreadable", "a/pipe.png", "no regular file"]]


def with_lists(image_folder: Path) -> dict:
    for side, count in (("train", 6), ("val", 2)):
        rows = [f"{c}/{i}.png {n}" for n, c in enumerate(CLASSES) for i in range(count)]
        write_list(image_folder / f"{side}.txt", *rows)
    return dict(train_list="train.txt", val_list="val.txt")


def test_the_report_has_a_row_for_every_kind_of_fault(image_folder):
    options = with_lists(image_folder)
    train, val = image_folder / "train", image_folder / "val"
    (train / "a/0.png").unlink()
    (train / "a/1.png").write_bytes(b"no image")
    jpeg = save_noise(train / "cut.jpg", 1, (64, 64))
    jpeg.write_bytes(jpeg.read_bytes()[:-100])
    Image.new("RGB", (3, 3)).save(train / "tiny.png")
    shutil.copy(train / "a/3.png", train / "again.png")
    shutil.copy(train / "a/3.png", train / "other.png")
    shutil.copy(train / "b/4.png", val / "known.png")
    with open(image_folder / "train.txt", "a") as file:
        file.write("cut.jpg 0\ntiny.png 0\nagain.png 0\nother.png 2\na/5.png 4\n../val/b/1.png 1\n")
    with open(image_folder / "val.txt", "a") as file:
        file.write("known.png 1\n")
    rows = findings(image_folder, num_classes=4, **options)
    seen = {(r.finding, r.side, r.file, r.label) for r in rows.itertuples()}
    assert seen == {
        ("missing", "train", "a/0.png", 0),
        ("undecodable", "train", "a/1.png", 0),
        ("truncated", "train", "cut.jpg", 0),
        ("too small", "train", "tiny.png", 0),
        ("duplicate", "train", "again.png", 0),
        ("duplicate", "train", "other.png", 2),
        ("duplicate", "train", "a/5.png", 4),
        ("label out of range", "train", "a/5.png", 4),
        ("outside root", "train", "../val/b/1.png", 1),
        ("class without images", "train", "", 3),
        ("class without images", "val", "", 3),
        ("in train and validation", "val", "known.png", 1),
        ("in train and validation", "val", "b/1.png", 1),
    }
    detail = rows.set_index(["finding", "file"]).detail
    assert detail["duplicate", "again.png"] == "of a/3.png"
    assert detail["duplicate", "other.png"] == "of a/3.png, labelled 0 there"
    assert "b/4.png" in detail["in train and validation", "known.png"]
    assert all(rows.detail.str.len() > 0)


def test_a_leak_names_the_file_and_label_in_training(image_folder):
    shutil.copy(image_folder / "train" / "a" / "0.png", image_folder / "val" / "b" / "again.png")
    [row] = findings(image_folder).itertuples()
    assert (row.finding, row.side, row.file) == ("in train and validation", "val", "b/again.png")
    assert row.detail == "in training as a/0.png, labelled 0 there"


def test_a_hidden_file_is_named_by_check_data_and_is_no_fault(
    image_folder, tmp_path, monkeypatch, capsys
):
    (image_folder / "train" / "a" / ".DS_Store").touch()
    Recipe(dataset="files", data_dir=str(image_folder)).to_yaml(tmp_path / "recipe.yaml")
    monkeypatch.setattr(sys, "argv", ["workbench", "check-data", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert "a/.DS_Store  hidden" in capsys.readouterr().out


def test_facts_are_those_of_the_files(image_folder):
    frame = opened(image_folder).train
    facts = data.verify_images(frame, cache=False, progress=False)
    assert facts.bytes.tolist() == [os.path.getsize(p) for p in frame.path]
    assert set(zip(facts.width, facts.height, strict=True)) == {(40, 32)}
    assert facts.digest.nunique() == 18 and (facts.problem == "").all()
    pd.testing.assert_frame_equal(facts[frame.columns], frame)


def test_verified_images_are_not_read_again(image_folder, monkeypatch):
    frame = opened(image_folder).train
    first = data.verify_images(frame, progress=False)
    monkeypatch.setattr(images, "open", lambda path: pytest.fail(f"{path} was read again"))
    pd.testing.assert_frame_equal(data.verify_images(frame, progress=False), first)


def test_only_a_changed_file_is_read_again(image_folder, monkeypatch):
    frame = opened(image_folder).train
    data.verify_images(frame, progress=False)
    save_noise(Path(frame.path[4]), seed=99, size=(50, 60))
    read, look = [], images.open
    monkeypatch.setattr(images, "open", lambda path: (read.append(path), look(path))[1])
    facts = data.verify_images(frame, progress=False)
    assert read == [frame.path[4]] and (facts.width[4], facts.height[4]) == (50, 60)
    read.clear()
    Path(frame.path[5]).unlink()
    assert data.verify_images(frame, progress=False).problem[5] == "missing"


def test_a_repaired_file_is_valid_again(image_folder):
    frame = opened(image_folder).train
    path = Path(frame.path[2])
    good, stat = path.read_bytes(), path.stat()
    path.write_bytes(b"x" * len(good))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data.verify_images(frame, progress=False).problem[2] == "undecodable"
    path.write_bytes(good)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data.verify_images(frame, progress=False).problem[2] == ""


def test_with_a_corrupt_cache_images_are_read_again(image_folder):
    frame = opened(image_folder).train
    stores = set((CACHE / "facts").glob("*"))
    first = data.verify_images(frame, progress=False)
    [store] = set((CACHE / "facts").glob("*")) - stores
    for damage in (b"", b"PAR1 nonsense", store.read_bytes()[:200]):
        store.write_bytes(damage)
        pd.testing.assert_frame_equal(data.verify_images(frame, progress=False), first)
    pd.DataFrame({"path": ["x"]}).to_parquet(store)
    pd.testing.assert_frame_equal(data.verify_images(frame, progress=False), first)


def test_unreadable_images_are_quarantined_by_name(image_folder):
    Path(image_folder / "train/b/1.png").write_bytes(b"broken")
    frame = data.verify_images(opened(image_folder).train, progress=False)
    kept, quarantine = data.drop_corrupt(frame, "train")
    assert len(kept) == 17 and "b/1.png" not in set(kept.file)
    [row] = quarantine.itertuples()
    assert (row.side, row.file, row.label, row.reason) == ("train", "b/1.png", 1, "undecodable")


def test_more_than_a_fifth_unreadable_is_an_error(image_folder):
    frame = opened(image_folder).train
    for path in frame.path[:4]:
        os.unlink(path)
    with pytest.raises(DataError, match="4 of 18.*check-data"):
        data.drop_corrupt(data.verify_images(frame, progress=False), "train")


def test_the_fingerprint_depends_on_files_labels_and_bytes(image_folder):
    def one() -> str:
        found = opened(image_folder)
        sides = [data.verify_images(f, progress=False) for f in (found.train, found.val)]
        return data.fingerprint(data.Dataset(*sides, found.classes))

    first = one()
    assert one() == first
    save_noise(image_folder / "val/a/0.png", seed=77)
    second = one()
    (image_folder / "val/a/0.png").rename(image_folder / "val/b/9.png")
    assert len({first, second, one()}) == 3
