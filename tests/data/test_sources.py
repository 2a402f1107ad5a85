"""A recipe's lists, class folders and splits."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import CLASSES, save_noise, write_list
from PIL import Image

from workbench import data
from workbench.data import DataError, sources
from workbench.recipe import Recipe


def opened(image_folder: Path, **options) -> data.Dataset:
    options = {"data_dir": str(image_folder), **options}
    return data.load_dataset(Recipe(dataset="files", **options))


def assert_readable(frame: pd.DataFrame) -> None:
    assert (data.verify_images(frame, cache=False, progress=False).problem == "").all()


def test_class_folders_are_labelled_in_alphabetical_order_with_and_without_images(image_folder):
    (image_folder / "train" / "aa").mkdir()
    shutil.rmtree(image_folder / "val" / "b")
    found = opened(image_folder)
    assert found.classes == ["a", "aa", "b", "c"] and found.counts == [6, 0, 6, 6]
    assert len(found.val) == 4
    for frame, side in ((found.train, "train"), (found.val, "val")):
        assert [found.classes[label] for label in frame.label] == [f[0] for f in frame.file]
        assert frame.path.tolist() == [str(image_folder / side / f) for f in frame.file]


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_a_file_name_that_is_not_utf8_is_read_or_named(image_folder):
    folder = os.fsencode(image_folder / "train/a")
    Path(os.fsdecode(folder + b"/caf\xe9.txt")).touch()
    found = opened(image_folder)
    assert found.skipped == [("train", "a/caf\\udce9.txt", "no image")]
    shutil.copy(image_folder / "train/a/0.png", folder + b"/caf\xe9.png")
    with pytest.raises(DataError, match="caf.*is no UTF-8 file name"):
        opened(image_folder)


def test_lists_may_have_roots_of_their_own(image_folder):
    write_list(image_folder / "one.txt", *[f"a/{i}.png 0" for i in range(6)])
    write_list(image_folder / "two.txt", *[f"{i}.png 1" for i in range(6)])
    write_list(image_folder / "val.txt", "a/0.png 0", "b/0.png 1")
    lists = dict(train_list=["one.txt", "two.txt"], val_list="val.txt")
    found = opened(image_folder, train_root=["train", "train/b"], **lists)
    assert found.classes == ["0", "1"] and found.train.list.tolist() == [0] * 6 + [1] * 6
    assert all(Path(path).exists() for path in [*found.train.path, *found.val.path])
    assert found.train.path[6] == str(image_folder / "train/b/0.png")
    same = opened(image_folder, train_root="train", **{**lists, "train_list": ["one.txt"] * 2})
    assert same.train.path[6] == same.train.path[0]


def with_lists(image_folder: Path) -> dict:
    for side, count in (("train", 6), ("val", 2)):
        rows = [f"{c}/{i}.png {n}" for n, c in enumerate(CLASSES) for i in range(count)]
        write_list(image_folder / f"{side}.txt", *rows)
    return dict(train_list="train.txt", val_list="val.txt")


@pytest.mark.parametrize(
    "names, options, says",
    [
        ("a b c", {"num_classes": 5}, "num_classes is 5 but there are 3"),
        (None, {}, "names.txt.*cannot be read"),
        ("a  c", {}, "line 2 is blank"),
        ("a b", {}, "labels outside 0 to 1"),
        ("x y", {"train_list": [], "val_list": []}, "class folders differ"),
    ],
)
def test_class_names_are_read_from_a_file_and_must_match(image_folder, names, options, says):
    lists = {**with_lists(image_folder), "class_names": "names.txt"}
    (image_folder / "names.txt").write_bytes("\ufeffApfel\r\nBirne gelb\r\n猫\r\n\r\n".encode())
    assert opened(image_folder, **lists).classes == ["Apfel", "Birne gelb", "猫"]
    (image_folder / "names.txt").unlink()
    if names:
        write_list(image_folder / "names.txt", *names.split(" "))
    with pytest.raises(DataError, match=says):
        opened(image_folder, **{**lists, **options})


def renamed(image_folder: Path, *names: str) -> None:
    for side in ("train", "val"):
        for old, new in zip(CLASSES, names, strict=True):
            (image_folder / side / old).rename(image_folder / side / new)


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.34}])
def test_labels_of_class_folders_follow_the_file_of_names(image_folder, options):
    renamed(image_folder, "1", "10", "2")
    write_list(image_folder / "names.txt", "1", "2", "10")
    found = opened(image_folder, class_names="names.txt", **options)
    assert found.classes == ["1", "2", "10"]
    for frame in (found.train, found.val):
        folders = [file.split("/")[0] for file in frame.file]
        assert [found.classes[label] for label in frame.label] == folders


@pytest.mark.parametrize("below", ["", "2024/photos/"])
def test_a_list_with_class_folders_in_another_order_is_refused(image_folder, below):
    renamed(image_folder, "1", "10", "2")
    for side in ("train", "val"):  # labels in the order of the sorted folders
        rows = [f"{c}/{below}{i}.png {n}" for n, c in enumerate(("1", "10", "2")) for i in (0, 1)]
        write_list(image_folder / f"{side}.txt", *rows)
    write_list(image_folder / "names.txt", "1", "2", "10")
    lists = dict(train_list="train.txt", val_list="val.txt", class_names="names.txt")
    with pytest.raises(DataError, match="train: .*'10' have label 1, and class 1 is '2'"):
        opened(image_folder, **lists)
    with pytest.raises(DataError, match="val: .*'10' have label 1"):  # folders and a list
        opened(image_folder, **{**lists, "train_list": []})
    for names in (["1", "10", "2"], ["one", "ten", "two"]):  # the second are no folders
        write_list(image_folder / "names.txt", *names)
        assert opened(image_folder, **lists).classes == names


def test_single_wrong_labels_are_no_other_order(image_folder):
    options = with_lists(image_folder)
    rows = (image_folder / "train.txt").read_text().replace("a/0.png 0", "a/0.png 2").splitlines()
    write_list(image_folder / "train.txt", *rows)
    write_list(image_folder / "names.txt", *CLASSES)
    assert opened(image_folder, class_names="names.txt", **options).train.label[0] == 2


FORMATS = {"a.jp2": "JPEG2000", "b.mpo": "JPEG", "c.heic": "PNG", "d": "WEBP", "e.image": "GIF"}


def test_images_with_any_suffix_are_read_and_other_files_are_named(image_folder):
    train = image_folder / "train"
    for i, (name, form) in enumerate(FORMATS.items()):
        image = Image.open(save_noise(image_folder / "noise.png", [i, 1]))
        image.save(train / "a" / name, form)
    junk = {".DS_Store": "hidden", "Thumbs.db": "no image", "notes.json": "no image"}
    for name in junk:
        (train / "a" / name).write_bytes(b"{}")
    for folder in (".git", "__MACOSX", "a/.thumbnails", "a/deeper"):
        (train / folder).mkdir()
        shutil.copy(train / "a/0.png", train / folder / "UPPER.PNG")
    (train / "list.txt").touch()
    found = opened(image_folder)
    assert {*FORMATS, "UPPER.PNG"} < {Path(file).name for file in found.train.file}
    assert found.classes == list(CLASSES) and len(found.train) == 18 + len(FORMATS) + 1
    assert_readable(found.train)
    hidden = dict.fromkeys((".git", "__MACOSX", "a/.thumbnails"), "hidden")
    assert {file: why for _, file, why in found.skipped} == {
        **{f"a/{name}": why for name, why in junk.items()}, **hidden,
        "list.txt": "in no class folder",
    }  # fmt: skip
    assert data.describe_skipped(found.skipped).startswith("7 files or folders skipped: ")


def test_a_folder_that_cannot_be_listed_is_named(image_folder, unlistable):
    (image_folder / "train/a/closed").mkdir()
    unlistable("closed")
    assert opened(image_folder).skipped == [("train", "a/closed", "unreadable: Permission denied")]


@pytest.mark.parametrize(
    "link, target", [("a/loop", "."), ("a/up", ".."), ("a/other", "../b"), ("a/far", "../../val/c"),
                     ("all", "."), ("alias", "a"), ("z", "b"), ("above", "..")]
)  # fmt: skip
def test_a_link_to_a_folder_adds_no_image(image_folder, link, target):
    before = opened(image_folder)
    (image_folder / "train" / link).symlink_to(target)
    found = opened(image_folder)
    assert found.classes == before.classes
    pd.testing.assert_frame_equal(found.train, before.train)
    assert [(side, file) for side, file, _ in found.skipped] == [("train", link)]


@pytest.mark.parametrize("roots", [["train", "train"], ["train", "again"]])
def test_a_root_given_twice_is_read_once(image_folder, roots):
    before = opened(image_folder)
    (image_folder / "again").symlink_to("train")
    found = opened(image_folder, train_root=roots)
    pd.testing.assert_frame_equal(found.train, before.train)
    again = "a folder that is read already"
    assert found.skipped == [("train", name, again) for name in CLASSES]


def test_class_folders_and_images_may_be_links(image_folder, tmp_path):
    before = opened(image_folder)
    for path, target in (("train/a", "elsewhere"), ("train/b/0.png", "image.png")):
        (image_folder / path).rename(tmp_path / target)
        (image_folder / path).symlink_to(tmp_path / target)
    found = opened(image_folder)
    pd.testing.assert_frame_equal(found.train, before.train)
    assert found.skipped == []


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Test", "extra")])
def test_folders_of_splits_are_no_classes(image_folder, names):
    for name, old in zip(names, ("train", "val", "train"), strict=False):
        shutil.copytree(image_folder / old, image_folder / "root" / name)
    with pytest.raises(DataError, match="are splits, not classes"):
        opened(image_folder, train_root="root", val_fraction=0.5)


@pytest.mark.parametrize("lists", [False, True])
def test_one_class_is_an_error(image_folder, lists):
    options = with_lists(image_folder) if lists else {}
    for side in ("train", "val"):
        write_list(image_folder / f"{side}.txt", "a/0.png 0", "a/1.png 0")
        for name in ("b", "c"):
            shutil.rmtree(image_folder / side / name)
    with pytest.raises(DataError, match="one class"):
        opened(image_folder, **options)


def test_the_number_of_classes_is_counted_or_given(image_folder):
    options = with_lists(image_folder)
    assert opened(image_folder, **options).classes == ["0", "1", "2"]
    assert len(opened(image_folder, num_classes=10, **options).classes) == 10
    with pytest.raises(DataError, match=r"labels outside 0 to 1.*'c/0.png'"):
        opened(image_folder, num_classes=2, **options)
    write_list(image_folder / "train.txt", "a/0.png 0", "b/0.png 200000")
    with pytest.raises(DataError, match="label 200000 of 'b/0.png' makes more classes than"):
        opened(image_folder, **options)


def test_entries_outside_their_root_are_refused_unless_allowed(image_folder):
    write_list(image_folder / "train.txt", "../val/a/0.png 0", "b/0.png 1")
    write_list(image_folder / "val.txt", "a/0.png 0")
    options = dict(train_list="train.txt", val_list="val.txt")
    with pytest.raises(DataError, match="allow_outside_root"):
        opened(image_folder, **options)
    assert len(opened(image_folder, allow_outside_root=True, **options).train) == 2


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(train_root="training"), r"training' is no folder.*'train', 'val'"),
        (dict(val_root="validation"), "val_fraction"),
        (dict(train_root="empty"), "no images in class folders"),
        (dict(val_root="extra"), r"\['x'\] of validation"),
        (dict(train_list="none.txt"), "none.txt' cannot be read"),
        (dict(data_dir="/none"), "no folder; set data_dir"),
        (dict(data_dir=""), "data_dir is missing"),
    ],
)
def test_missing_folders_lists_and_classes_are_named(image_folder, options, says):
    (image_folder / "empty/a").mkdir(parents=True)
    (image_folder / "extra").mkdir()
    shutil.copytree(image_folder / "val/a", image_folder / "extra/x")
    with pytest.raises(DataError, match=says):
        opened(image_folder, **options)


# ---- accents, in composed and decomposed form (NFC, NFD)


CAFE, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # NFC and NFD


def test_accents_are_compared_in_one_form_and_found_on_the_disk_in_the_other(tmp_path):
    for side, name in (("tr\u00e4in", CAFE), ("val", DECOMPOSED)):
        for folder in (name, "tea"):
            (tmp_path / CAFE / side / folder).mkdir(parents=True)
            save_noise(tmp_path / CAFE / side / folder / f"{name}.png", len(side))
    found = opened(tmp_path / DECOMPOSED, train_root="tra\u0308in")
    assert found.classes == [CAFE, "tea"] and found.val.label.tolist() == [0, 1]
    assert found.train.file.tolist() == found.val.file.tolist()
    assert all(os.path.exists(path) for path in [*found.train.path, *found.val.path])
    for name in (CAFE, DECOMPOSED):
        write_list(tmp_path / "list.txt", f"{name}/{name}.png 0", f"tea/{name}.png 1")
        for side in ("tr\u00e4in", "val"):
            frame = data.read_list(tmp_path / "list.txt", tmp_path / CAFE / side)
            assert frame.file.tolist() == found.val.file.tolist()
            assert_readable(frame)


def test_folders_of_one_name_in_two_forms_are_one_class(tmp_path):
    for i, name in enumerate((CAFE, DECOMPOSED, "tea")):
        for side in ("train", "val"):
            (tmp_path / side / name).mkdir(parents=True)
            save_noise(tmp_path / side / name / f"{i}.png", [i, side == "val"])
    write_list(tmp_path / "names.txt", "tea", DECOMPOSED)
    assert opened(tmp_path).train.label.tolist() == [0, 0, 1]
    found = opened(tmp_path, class_names="names.txt")
    assert found.classes == ["tea", CAFE]
    assert dict(zip(found.train.file, found.train.label, strict=True))[f"{CAFE}/0.png"] == 1


# ---- shares


def names(frame: pd.DataFrame) -> set[str]:
    return set(frame.file)


def many(per_class: int, classes: int = 4) -> pd.DataFrame:
    rows = [(f"{c}/{i:05d}.png", c) for c in range(classes) for i in range(per_class)]
    return pd.DataFrame(rows, columns=["file", "label"]).assign(path=lambda f: f.file)


def test_a_smaller_fraction_is_a_random_subset_of_a_larger_one(image_folder):
    frame = many(250)
    shares = {f: sources.subset(frame, f) for f in (0.1, 0.3, 0.31, 1.0)}
    assert [len(s) for s in shares.values()] == [100, 300, 310, 1000]
    assert names(shares[0.1]) < names(shares[0.3]) < names(shares[0.31]) < names(shares[1.0])
    for share in shares.values():
        assert share.file.is_monotonic_increasing  # in the order of the list
    assert shares[0.1].label.value_counts().between(10, 45).all()
    found = opened(image_folder, train_fraction=0.5)
    assert len(found.train) == 9 and len(found.val) == 6


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("per_class", [2, 3, 5, 40])
def test_val_fraction_takes_its_share_of_every_class(share, per_class):
    frame = many(per_class)
    train, val = sources.stratified_split(frame, share)
    count = min(max(1, round(per_class * share)), per_class - 1)
    assert (val.label.value_counts() == count).all() and set(train.label) == set(range(4))
    assert not names(train) & names(val) and names(train) | names(val) == names(frame)


def test_val_fraction_is_the_same_in_any_order_and_stable_when_images_are_added():
    frame = many(50)
    _, val = sources.stratified_split(frame, 0.2)
    shuffled = frame.sample(frac=1, random_state=1)
    assert names(sources.stratified_split(shuffled, 0.2)[1]) == names(val)
    _, grown = sources.stratified_split(many(55), 0.2)
    assert len(names(val) & names(grown)) >= 0.85 * len(val)


def test_val_fraction_has_all_lines_of_a_file_on_one_side_and_splits_files():
    """A list may repeat the images of rare classes."""
    once, frame = many(10), pd.concat([many(10)] * 3, ignore_index=True)
    train, val = sources.stratified_split(frame, 0.25)
    assert not names(train) & names(val) and len(train) + len(val) == len(frame)
    assert names(val) == names(sources.stratified_split(once, 0.25)[1])
    twice = pd.concat([once, pd.DataFrame({"file": "x", "label": 9, "path": "x"}, index=[0, 1])])
    with pytest.raises(DataError, match=r"\[9\] have one image"):
        sources.stratified_split(twice, 0.25)


def test_val_fraction_needs_two_images_of_a_class(image_folder):
    frame = pd.concat([many(5), pd.DataFrame({"file": ["x"], "label": [9], "path": ["x"]})])
    with pytest.raises(DataError, match=r"\[9\] have one image"):
        sources.stratified_split(frame, 0.2)
    found = opened(image_folder, val_fraction=0.34)
    assert len(found.val) == 6 and len(found.train) == 12
    assert all("/train/" in path for path in found.val.path)
