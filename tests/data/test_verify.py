"""The check of every image, what `check-data` reports, and the cache of facts."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import CLASSES, save_noise, write_list
from PIL import Image

from workbench import CACHE, data
from workbench.data import DataError, images
from workbench.recipe import Recipe


@pytest.fixture
def frame(image_folder) -> pd.DataFrame:
    """Eighteen training images that are not verified yet."""
    return data.load_dataset(Recipe(dataset="files", data_dir=str(image_folder))).train


def verified(frame: pd.DataFrame) -> pd.DataFrame:
    return data.verify_images(frame, progress=False)


def findings(image_folder: Path, **options) -> pd.DataFrame:
    recipe = Recipe(dataset="files", data_dir=str(image_folder), **options)
    return data.check_data(data.load_dataset(recipe, strict=False), progress=False)


def test_valid_data_has_no_findings_and_a_pipe_does_not_block(image_folder):
    table = findings(image_folder)
    assert len(table) == 0
    assert list(table.columns) == ["finding", "side", "file", "label", "detail"]
    os.mkfifo(image_folder / "train" / "a" / "pipe.png")
    rows = findings(image_folder)[["finding", "file", "detail"]].values.tolist()
    assert rows == [["unreadable", "a/pipe.png", "no regular file"]]


def test_the_report_has_a_row_for_every_kind_of_fault(image_folder):
    train, val = image_folder / "train", image_folder / "val"
    (train / "a/0.png").unlink()
    (train / "a/1.png").write_bytes(b"no image")
    jpeg = save_noise(train / "cut.jpg", 1, (64, 64))
    jpeg.write_bytes(jpeg.read_bytes()[:-100])
    Image.new("RGB", (3, 3)).save(train / "tiny.png")
    for source, copy in (
        ("a/3", train / "again"),
        ("a/3", train / "other"),
        ("b/4", val / "known"),
    ):
        shutil.copy(train / f"{source}.png", f"{copy}.png")
    more = {"train": ["cut.jpg 0", "tiny.png 0", "again.png 0", "other.png 2", "a/5.png 4",
                      "../val/b/1.png 1"], "val": ["known.png 1"]}  # fmt: skip
    for side, count in (("train", 6), ("val", 2)):
        rows = [f"{c}/{i}.png {n}" for n, c in enumerate(CLASSES) for i in range(count)]
        write_list(image_folder / f"{side}.txt", *rows, *more[side])
    rows = findings(image_folder, num_classes=4, train_list="train.txt", val_list="val.txt")
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
    detail = rows.set_index(["finding", "file"]).sort_index().detail
    assert detail["duplicate", "again.png"] == "of a/3.png"
    assert detail["duplicate", "other.png"] == "of a/3.png, labelled 0 there"
    assert detail["in train and validation", "known.png"] == "in training as b/4.png"


def test_a_hidden_file_is_named_by_check_data_and_is_no_fault(image_folder, tmp_path, command):
    (image_folder / "train" / "a" / ".DS_Store").touch()
    Recipe(dataset="files", data_dir=str(image_folder)).to_yaml(tmp_path / "recipe.yaml")
    done = command("check-data", tmp_path / "recipe.yaml")
    assert done.returncode == 0 and "a/.DS_Store  hidden" in done.stdout


def test_facts_are_those_of_the_files_and_verified_images_are_not_read_again(frame, monkeypatch):
    facts = verified(frame)
    assert facts.bytes.tolist() == [os.path.getsize(p) for p in frame.path]
    assert set(zip(facts.width, facts.height, strict=True)) == {(40, 32)}
    assert facts.digest.nunique() == 18 and (facts.problem == "").all()
    pd.testing.assert_frame_equal(facts[frame.columns], frame)
    monkeypatch.setattr(images, "open", lambda path, *_: pytest.fail(f"{path} was read again"))
    pd.testing.assert_frame_equal(verified(frame), facts)


def test_only_a_changed_file_is_read_again(frame, monkeypatch):
    verified(frame)
    save_noise(Path(frame.path[4]), seed=99, size=(50, 60))
    read, look = [], images.open
    monkeypatch.setattr(
        images, "open", lambda path, *more: (read.append(path), look(path, *more))[1]
    )
    facts = verified(frame)
    assert read == [frame.path[4]] and (facts.width[4], facts.height[4]) == (50, 60)
    Path(frame.path[5]).unlink()
    assert verified(frame).problem[5] == "missing"


def test_a_repaired_file_is_valid_again(frame):
    path = Path(frame.path[2])
    good, stat = path.read_bytes(), path.stat()
    for content, problem in ((b"x" * len(good), "undecodable"), (good, "")):
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert verified(frame).problem[2] == problem


def test_with_a_corrupt_cache_images_are_read_again(frame):
    stores = set((CACHE / "facts").glob("*"))
    first = verified(frame)
    [store] = set((CACHE / "facts").glob("*")) - stores
    for damage in (b"", b"PAR1 nonsense", store.read_bytes()[:200]):
        store.write_bytes(damage)
        pd.testing.assert_frame_equal(verified(frame), first)
    pd.DataFrame({"path": ["x"]}).to_parquet(store)
    pd.testing.assert_frame_equal(verified(frame), first)


def test_unreadable_images_are_quarantined_by_name_up_to_a_fifth(frame):
    Path(frame.path[7]).write_bytes(b"broken")
    kept, quarantine = data.drop_corrupt(verified(frame), "train")
    assert kept.file.tolist() == [*frame.file[:7], *frame.file[8:]]
    [row] = quarantine.itertuples()
    assert (row.side, row.file, row.label, row.reason) == ("train", "b/1.png", 1, "undecodable")
    for path in frame.path[:3]:
        os.unlink(path)
    with pytest.raises(DataError, match="4 of 18.*check-data"):
        data.drop_corrupt(verified(frame), "train")


def test_the_fingerprint_depends_on_files_labels_and_bytes(frame):
    def fingerprint(frame: pd.DataFrame) -> str:
        return data.fingerprint(data.Dataset(verified(frame), verified(frame[:3]), ["a"]))

    first = fingerprint(frame)
    assert fingerprint(frame) == first
    others = {fingerprint(frame.assign(label=0)), fingerprint(frame.assign(file="x"))}
    save_noise(Path(frame.path[0]), seed=77)
    assert len({first, *others, fingerprint(frame)}) == 4
