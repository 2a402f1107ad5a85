"""Lists become frames, frames become batches that depend on the recipe and the step alone."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, save_noise, write_list
from PIL import Image

from workbench import __main__ as command
from workbench import data
from workbench.augmentation import EvalTransform, TrainTransform
from workbench.data import DataError, images
from workbench.recipe import Recipe

TRAIN = TrainTransform(16, hflip=0.5, brightness=0.4)
TEST = EvalTransform(16, 20)


def opened(image_folder: Path, **options) -> data.Dataset:
    return data.load_dataset(Recipe(dataset="files", data_dir=str(image_folder), **options))


def listed(tmp_path: Path, *rows: str) -> pd.DataFrame:
    return data.read_list(write_list(tmp_path / "list.txt", *rows), tmp_path)


# ---- lists


@pytest.mark.parametrize(
    "row, file, label",
    [
        ("a/0.png 17", "a/0.png", 17),
        ("a/with some spaces.jpg 3", "a/with some spaces.jpg", 3),
        ("a/2 3.jpg 4", "a/2 3.jpg", 4),
        ("a/two  spaces.jpg  4", "a/two  spaces.jpg ", 4),
        ("ä/猫 1.png 0", "ä/猫 1.png", 0),
        ("a/0.png 007", "a/0.png", 7),
        ("a/0.png -1", "a/0.png", -1),
        ('{"filename": "a/0.png", "label": 17}', "a/0.png", 17),
        ('{"filename": "a b/ä 猫.png", "label": 3}', "a b/ä 猫.png", 3),
        ('{"filename": "a/0.png", "label": "3"}', "a/0.png", 3),
        ('{"filename": "a/0.png", "label": [5]}', "a/0.png", 5),
        ('{"filename": "a/0.png", "label": ["5"]}', "a/0.png", 5),
        ('{"label": 1, "extra": {"x": []}, "filename": "a 7"}', "a 7", 1),
        ('{"filename": "\\u732b.png", "label": 1}', "猫.png", 1),
    ],
)
def test_a_row_of_either_format_is_read_as_the_reference_says(tmp_path, row, file, label):
    frame = listed(tmp_path, row)
    assert (frame.file[0], frame.label[0]) == (file, label)
    assert frame.path[0] == str(tmp_path / file) and frame.label.dtype == np.int64


@pytest.mark.parametrize("lines", [["a 1", "b 2"], ['{"filename": "a", "label": 1}'] * 2])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_windows_line_ends_a_bom_and_blank_lines_do_not_matter(tmp_path, lines, end, mark):
    plain = listed(tmp_path, *lines)
    text = mark + end + lines[0] + end + "   " + end + end + lines[1]  # no end of the last line
    (tmp_path / "list.txt").write_bytes(text.encode("utf-8"))
    pd.testing.assert_frame_equal(data.read_list(tmp_path / "list.txt", tmp_path), plain)


def test_only_a_newline_ends_a_row(tmp_path):
    odd = "a\u2028b\x0c\x85c.png"
    assert listed(tmp_path, f"{odd} 3").file.tolist() == [odd]


@pytest.mark.parametrize(
    "row, says",
    [
        ("a/0.png", "is not `path label`"),
        ("17", "is not `path label`"),
        (" 17", "is not `path label`"),
        ("a/0.png\t17", "tab"),
        ("a/0.png 1.5", "'1.5' is no whole number"),
        ("a/0.png cat", "'cat' is no whole number"),
        ("a/0.png ", "no whole number"),
        ("a/0.png 99999999999999999999", "no whole number"),
        ("a\x00.png 1", "zero byte"),
        ('{"filename": "a.png"}', "wanted"),
        ('{"filename": "a.png", "label": [1, 2]}', "2 labels"),
        ('{"filename": "a.png", "label": []}', "0 labels"),
        ('{"filename": "a.png", "label": 1.5}', "1.5"),
        ('{"filename": "a.png", "label": true}', "True"),
        ('{"filename": "a.png", "label": null}', "None"),
        ('{"filename": "", "label": 1}', "no file name"),
        ('{"filename": 5, "label": 1}', "no file name"),
        ('{"filename": "a.png", "label": 1', "JSON"),
        ('{"filename": "a.png", "label": 1} {}', "JSON"),
    ],
)
def test_a_bad_row_is_quoted_with_its_line(tmp_path, row, says):
    good = '{"filename": "a", "label": 0}' if row.startswith("{") else "a 0"
    with pytest.raises(DataError, match=f"(?s)list.txt.*line 2: .*{says}"):
        listed(tmp_path, good, row)


def test_many_bad_rows_are_counted_not_all_quoted(tmp_path):
    with pytest.raises(DataError) as caught:
        listed(tmp_path, *["bad"] * 20)
    assert str(caught.value).count("\n  line ") == 5 and "and 15 more" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf", b"caf\xe9.jpg 1\n"])
def test_a_list_without_readable_rows_is_an_error(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match="is empty|cannot be read"):
        data.read_list(tmp_path / "list.txt", tmp_path)
    with pytest.raises(DataError, match="is not there"):
        data.read_list(tmp_path / "none.txt", tmp_path)


@pytest.mark.parametrize(
    "file, outside",
    [
        ("a/0.png", False),
        ("./a/../b/0.png", False),
        ("..a/0.png", False),
        ("../0.png", True),
        ("a/../../x/0.png", True),
        ("/etc/passwd", True),
        ("../root2/0.png", True),
    ],
)
@pytest.mark.parametrize("root", ["absolute", "relative", "."])
def test_entries_that_leave_their_root_are_marked(tmp_path, monkeypatch, file, outside, root):
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path / "root" if root == "." else tmp_path)
    root = {"absolute": tmp_path / "root", "relative": "root", ".": "."}[root]
    frame = data.read_list(write_list(tmp_path / "list.txt", f"{file} 0"), root)
    assert frame.outside.tolist() == [outside]


def test_an_absolute_entry_inside_its_root_is_at_home(tmp_path):
    frame = listed(tmp_path, f"{tmp_path}/a.png 0")
    assert not frame.outside[0] and frame.path[0] == f"{tmp_path}/a.png"


def line_by_line(path: Path, root: Path) -> pd.DataFrame:
    """A slow reference for lists without faults."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith('{"'):
            entry = json.loads(line)
            file, label = entry["filename"], entry["label"]
            label = label[0] if isinstance(label, list) else label
        elif line.strip():
            file, _, label = line.rpartition(" ")
        else:
            continue
        inside = os.path.abspath(root / file).startswith(f"{root}/")
        rows.append((file, int(label), os.path.join(root, file), 0, not inside))
    return pd.DataFrame(rows, columns=["file", "label", "path", "list", "outside"])


ODD = ["a b/c  d.png", "猫/1.png", "../x.png", "/etc/x.png", "a/../b.png", "a/..b/c.png", "./a",
       "a/.", "/x/../y", "a//b.png", ".", "..", "/", "猫", "a.", "\u00a0x", "0x1f", "{a",
       "é.png"]  # fmt: skip


@pytest.mark.parametrize("odd", [[], *([name] for name in ODD), ODD])
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_list_is_read_as_line_by_line(tmp_path, form, odd):
    files = [*(f"n{i % 7}/image {i}.JPEG" for i in range(40)), *odd, f"{tmp_path}/inside.png"]
    labels = np.random.default_rng(0).permutation(len(files)).tolist()
    if form == "text":
        rows = [f"{file} {label}" for file, label in zip(files, labels, strict=True)]
    else:
        pairs = zip(files, labels, strict=True)
        rows = [json.dumps({"filename": file, "label": label, "x": [1]}) for file, label in pairs]
    path = write_list(tmp_path / "list.txt", *rows, "", "")
    frame = data.read_list(path, tmp_path)
    pd.testing.assert_frame_equal(frame, line_by_line(path, tmp_path))


@pytest.mark.parametrize(
    "row, label",
    [
        ("a +5", 5), ("a ٣", 3), ('{"filename": "a", "label": [4]}', 4),
        ('{"filename": "a", "label": "6"}', 6), ('{"filename": " a", "label": -2}', -2),
    ],
)  # fmt: skip
def test_an_unusual_row_changes_no_other(tmp_path, row, label):
    form = '{{"filename": "n/{0}.png", "label": {0}}}' if row.startswith("{") else "n/{0}.png {0}"
    rows = [form.format(i) for i in range(20)]
    alone, mixed = listed(tmp_path, *rows), listed(tmp_path, *rows[:9], row, *rows[9:])
    assert mixed.label.tolist() == [*range(9), label, *range(9, 20)]
    pd.testing.assert_frame_equal(mixed.drop(index=9).reset_index(drop=True), alone)


@pytest.mark.parametrize(
    "row",
    ["a 0x1f", "a 0000000001", "\u00a0 1",
     '{"filename": "a", "label": 1} {"filename": "b", "label": 2}',
     '{"filename": "\\u0000", "label": 1}', '{"filename": "\\ud800", "label": 1}',
     '{"filename": "a", "label": 1e0}', '{"filename": "a", "label": 9999999999}'],
)  # fmt: skip
def test_what_the_fast_reader_would_take_is_refused_all_the_same(tmp_path, row):
    good = '{"filename": "n/a.png", "label": 0}' if row.startswith("{") else "n/a.png 0"
    with pytest.raises(DataError, match="line 2: "):
        listed(tmp_path, good, row, good)


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_of_a_plain_list_is_read_in_python(tmp_path, monkeypatch, form):
    """Ten times as fast that way: a trace counts the calls."""
    rows = [(f"n{i % 10}/{i}.jpg", i % 10) for i in range(5000)]
    line = '{{"filename": "{}", "label": {}}}' if form == "json" else "{} {}"
    path = write_list(tmp_path / "list.txt", *(line.format(*row) for row in rows))
    data.read_list(path, tmp_path)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    frame = data.read_list(path, tmp_path)
    sys.setprofile(None)
    assert len(frame) == 5000 and calls < 5000


CAFE, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # NFC and NFD


def test_accents_are_compared_in_one_form_and_found_on_the_disk_in_the_other(tmp_path):
    for side, name in (("train", CAFE), ("val", DECOMPOSED)):
        for folder in (name, "tea"):
            (tmp_path / side / folder).mkdir(parents=True)
            save_noise(tmp_path / side / folder / f"{name}.png", len(side))
    found = opened(tmp_path)
    assert found.classes == [CAFE, "tea"] and found.val.label.tolist() == [0, 1]
    assert found.train.file.tolist() == found.val.file.tolist()
    assert all(os.path.exists(path) for path in [*found.train.path, *found.val.path])
    for name in (CAFE, DECOMPOSED):
        write_list(tmp_path / "list.txt", f"{name}/{name}.png 0", f"tea/{name}.png 1")
        for side in ("train", "val"):
            frame = data.read_list(tmp_path / "list.txt", tmp_path / side)
            assert frame.file.tolist() == found.val.file.tolist()
            assert (data.verify_images(frame, cache=False, progress=False).problem == "").all()


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


# ---- a recipe's data


def test_class_folders_are_labelled_in_alphabetical_order(image_folder):
    found = opened(image_folder)
    assert found.classes == list(CLASSES)
    assert len(found.train) == 18 and len(found.val) == 6
    for frame, side in ((found.train, "train"), (found.val, "val")):
        assert [CLASSES[label] for label in frame.label] == [f[0] for f in frame.file]
        assert frame.path.tolist() == [str(image_folder / side / f) for f in frame.file]


def test_only_visible_images_of_class_folders_count(image_folder):
    extra = image_folder / "train" / "a" / "deeper" / "still"
    extra.mkdir(parents=True)
    save_noise(extra / "upper.JPEG", 1)
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (image_folder / "train" / "a" / name).write_bytes(b"x")
    (image_folder / "train" / "loose.png").write_bytes(b"x")
    (image_folder / "train" / ".git").mkdir()
    (image_folder / "train" / "a" / ".thumbnails").mkdir()
    for hidden in ("train/.git", "train/a/.thumbnails"):
        shutil.copy(image_folder / "train/a/0.png", image_folder / hidden / "0.png")
    found = opened(image_folder)
    assert len(found.train) == 19 and found.classes == list(CLASSES)
    assert "a/deeper/still/upper.JPEG" in set(found.train.file)


def test_a_class_missing_in_validation_keeps_the_labels_of_training(image_folder):
    shutil.rmtree(image_folder / "val" / "b")
    found = opened(image_folder)
    assert sorted(set(found.val.label)) == [0, 2]


def test_a_class_only_in_validation_is_an_error(image_folder):
    (image_folder / "train" / "b").rename(image_folder / "train" / "x")
    with pytest.raises(DataError, match=r"\['b'\] of validation"):
        opened(image_folder)


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_a_file_name_that_is_no_text_is_read_or_named_in_an_error(image_folder):
    shutil.copy(
        image_folder / "train/a/0.png", os.fsencode(image_folder / "train" / "a") + b"/caf\xe9.png"
    )
    try:
        frame = opened(image_folder).train
    except DataError as error:
        assert "caf" in str(error)
    else:
        assert len(frame) == 19 and (data.verify_images(frame).problem == "").all()


def test_lists_may_have_roots_of_their_own(image_folder):
    first = write_list(image_folder / "one.txt", *[f"a/{i}.png 0" for i in range(6)])
    second = write_list(image_folder / "two.txt", *[f"{i}.png 1" for i in range(6)])
    val = write_list(image_folder / "val.txt", "a/0.png 0", "b/0.png 1")
    found = opened(
        image_folder,
        train_list=[first.name, second.name],
        train_root=["train", "train/b"],
        val_list=val.name,
    )
    assert found.classes == ["0", "1"]
    assert found.train.list.tolist() == [0] * 6 + [1] * 6
    assert all(Path(path).exists() for path in [*found.train.path, *found.val.path])
    assert found.train.path[6] == str(image_folder / "train/b/0.png")
    again = opened(
        image_folder, train_list=[first.name, first.name], train_root="train", val_list=val.name
    )
    assert again.train.path[6] == again.train.path[0]


def with_lists(image_folder: Path) -> dict:
    for side, count in (("train", 6), ("val", 2)):
        rows = [f"{c}/{i}.png {n}" for n, c in enumerate(CLASSES) for i in range(count)]
        write_list(image_folder / f"{side}.txt", *rows)
    return dict(train_list="train.txt", val_list="val.txt")


def test_class_names_come_from_a_file_and_must_be_as_many_as_the_classes(image_folder):
    options = with_lists(image_folder)
    (image_folder / "names.txt").write_bytes("\ufeffApfel\r\nBirne gelb\r\n猫\r\n\r\n".encode())
    assert opened(image_folder, class_names="names.txt", **options).classes == [
        "Apfel",
        "Birne gelb",
        "猫",
    ]
    with pytest.raises(DataError, match="num_classes is 5 but there are 3"):
        opened(image_folder, class_names="names.txt", num_classes=5, **options)
    write_list(image_folder / "names.txt", "only", "two")
    with pytest.raises(DataError, match="label"):
        opened(image_folder, class_names="names.txt", **options)
    with pytest.raises(DataError, match="none.txt.*cannot be read"):
        opened(image_folder, class_names="none.txt", **options)
    with pytest.raises(DataError, match="class folders differ"):
        opened(image_folder, class_names="names.txt")


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
        assert [found.classes[label] for label in frame.label] == [
            file.split("/")[0] for file in frame.file
        ]


def test_a_list_whose_folders_are_classes_of_another_label_is_refused(image_folder):
    renamed(image_folder, "1", "10", "2")
    for side in ("train", "val"):  # labels in the order of the sorted folders
        rows = [f"{c}/{i}.png {n}" for n, c in enumerate(("1", "10", "2")) for i in range(2)]
        write_list(image_folder / f"{side}.txt", *rows)
    write_list(image_folder / "names.txt", "1", "2", "10")
    lists = dict(train_list="train.txt", val_list="val.txt", class_names="names.txt")
    with pytest.raises(DataError, match="train: .*'10' have label 1, and class 1 is '2'"):
        opened(image_folder, **lists)
    with pytest.raises(DataError, match="val: .*'10' have label 1"):  # folders beside a list
        opened(image_folder, **{**lists, "train_list": []})
    write_list(image_folder / "names.txt", "1", "10", "2")
    assert opened(image_folder, **lists).classes == ["1", "10", "2"]
    write_list(image_folder / "names.txt", "one", "ten", "two")  # names that no folder has
    assert opened(image_folder, **lists).classes == ["one", "ten", "two"]


@pytest.mark.parametrize("below", ["photos", "2024/photos"])
def test_folders_between_class_and_image_do_not_hide_another_order(image_folder, below):
    renamed(image_folder, "1", "10", "2")
    for side in ("train", "val"):
        for name in ("1", "10", "2"):
            (image_folder / side / name).rename(image_folder / side / "moving")
            (image_folder / side / name / below).parent.mkdir(parents=True)
            (image_folder / side / "moving").rename(image_folder / side / name / below)
        rows = [f"{c}/{below}/{i}.png {n}" for n, c in enumerate(("1", "10", "2")) for i in (0, 1)]
        write_list(image_folder / f"{side}.txt", *rows)
    write_list(image_folder / "names.txt", "1", "2", "10")
    lists = dict(train_list="train.txt", val_list="val.txt", class_names="names.txt")
    with pytest.raises(DataError, match="train: .*'10' have label 1, and class 1 is '2'"):
        opened(image_folder, **lists)


def test_a_wrong_label_here_and_there_is_no_other_order(image_folder):
    options = with_lists(image_folder)
    rows = (image_folder / "train.txt").read_text().replace("a/0.png 0", "a/0.png 2").splitlines()
    write_list(image_folder / "train.txt", *rows)
    write_list(image_folder / "names.txt", *CLASSES)
    assert opened(image_folder, class_names="names.txt", **options).train.label[0] == 2


def test_a_blank_line_among_class_names_is_refused(image_folder):
    write_list(image_folder / "names.txt", "cat", "", "dog")
    with pytest.raises(DataError, match="line 2 is blank"):
        opened(image_folder, class_names="names.txt", **with_lists(image_folder))


FORMATS = {"a.jp2": "JPEG2000", "b.mpo": "JPEG", "c.heic": "PNG", "d": "WEBP", "e.image": "GIF"}


def test_what_decodes_is_read_whatever_its_suffix_and_the_rest_is_named(image_folder):
    for side in ("train", "val"):
        for i, (name, form) in enumerate(FORMATS.items()):
            image = Image.open(save_noise(image_folder / "noise.png", [i, side == "val"]))
            image.save(image_folder / side / "a" / name, form)
    (image_folder / "noise.png").unlink()
    junk = {".DS_Store": "hidden", "Thumbs.db": "no image", "notes.json": "no image"}
    for name in junk:
        (image_folder / "train/a" / name).write_bytes(b"{}")
    (image_folder / "train/.git").mkdir()
    (image_folder / "train/list.txt").touch()
    found = opened(image_folder)
    assert set(FORMATS) < {Path(file).name for file in found.train.file}
    assert (data.verify_images(found.train, cache=False, progress=False).problem == "").all()
    named = {file: why for side, file, why in found.skipped if side == "train"}
    assert named == {**{f"a/{name}": why for name, why in junk.items()},
                     ".git": "hidden", "list.txt": "in no class folder"}  # fmt: skip
    assert data.describe_skipped(found.skipped).startswith("5 files or folders passed over: ")
    rows = findings(image_folder)
    assert set(rows.file[rows.finding == "passed over"]) == set(named)


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_a_name_that_is_no_text_is_named_in_text(image_folder):
    Path(os.fsdecode(os.fsencode(image_folder / "train/a") + b"/caf\xe9.txt")).touch()
    found = opened(image_folder)
    assert found.skipped == [("train", "a/caf\\udce9.txt", "no image")]
    assert "caf" in data.describe_skipped(found.skipped).encode().decode()


def test_a_folder_that_cannot_be_listed_is_named(image_folder, monkeypatch):
    (image_folder / "train/a/closed").mkdir()
    scan = os.scandir

    def closed(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert opened(image_folder).skipped == [("train", "a/closed", "unreadable: Permission denied")]


@pytest.mark.parametrize(
    "link, target", [("a/loop", "."), ("a/up", ".."), ("a/other", "../b"), ("a/far", "../../val/c"),
                     ("all", "."), ("alias", "a"), ("z", "b"), ("above", "..")]
)  # fmt: skip
def test_a_link_to_a_folder_brings_no_image_twice_or_under_another_class(
    image_folder, link, target
):
    before = opened(image_folder)
    (image_folder / "train" / link).symlink_to(target)
    found = opened(image_folder)
    assert found.classes == before.classes
    pd.testing.assert_frame_equal(found.train, before.train)
    assert [(side, file) for side, file, _ in found.skipped] == [("train", link)]


def test_data_dir_and_roots_are_found_in_the_other_form_of_their_accents(image_folder):
    before = opened(image_folder)
    place = image_folder.parent / "caf\u00e9"
    shutil.copytree(image_folder, place)
    (place / "train").rename(place / "m\u00e1s")
    found = opened(image_folder.parent / "cafe\u0301", train_root="ma\u0301s")
    pd.testing.assert_frame_equal(
        found.train.drop(columns="path"), before.train.drop(columns="path")
    )


@pytest.mark.parametrize("roots", [["train", "train"], ["train", "again"]])
def test_a_root_given_twice_is_read_once(image_folder, roots):
    before = opened(image_folder)
    (image_folder / "again").symlink_to("train")
    found = opened(image_folder, train_root=roots)
    pd.testing.assert_frame_equal(found.train, before.train)
    again = "a folder that is read already"
    assert found.skipped == [("train", name, again) for name in CLASSES]


def test_a_pipe_named_as_an_image_is_not_waited_for(image_folder):
    os.mkfifo(image_folder / "train" / "a" / "pipe.png")
    recipe = Recipe(dataset="files", data_dir=str(image_folder))
    found = data.check_data(recipe, cache=False, progress=False)
    assert found[["finding", "file", "detail"]].values.tolist() == [
        ["unreadable", "a/pipe.png", "no regular file"]
    ]


def test_class_folders_and_images_may_be_links(image_folder, tmp_path):
    before = opened(image_folder)
    (image_folder / "train/a").rename(tmp_path / "elsewhere")
    (image_folder / "train/a").symlink_to(tmp_path / "elsewhere")
    image = image_folder / "train/b/0.png"
    image.rename(tmp_path / "image.png")
    image.symlink_to(tmp_path / "image.png")
    found = opened(image_folder)
    pd.testing.assert_frame_equal(found.train, before.train)
    assert found.skipped == []


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Test", "extra")])
def test_folders_of_splits_are_no_classes(image_folder, names):
    for name, old in zip(names, ("train", "val", "train"), strict=False):
        shutil.copytree(image_folder / old, image_folder / "root" / name)
    with pytest.raises(DataError, match="are splits, not classes"):
        opened(image_folder, train_root="root", val_fraction=0.5)


def test_what_an_archiver_leaves_is_no_class(image_folder):
    shutil.copytree(image_folder / "train/a", image_folder / "train/__MACOSX/a")
    found = opened(image_folder)
    assert found.classes == list(CLASSES) and len(found.train) == 18
    assert found.skipped == [("train", "__MACOSX", "hidden")]


@pytest.mark.parametrize("lists", [False, True])
def test_one_class_is_an_error_of_the_data(image_folder, lists):
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


def test_entries_outside_their_root_are_refused_unless_meant(image_folder):
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
        (dict(train_list="none.txt"), "none.txt' is not there"),
    ],
)
def test_a_wrong_place_says_what_is_there(image_folder, options, says):
    with pytest.raises(DataError, match=f"(?s){says}"):
        opened(image_folder, **options)
    with pytest.raises(DataError, match="no folder; set data_dir"):
        opened(image_folder / "none")
    with pytest.raises(DataError, match="data_dir is missing"):
        data.load_dataset(Recipe(dataset="files"))


def test_folders_without_images_are_an_error(tmp_path):
    for side in ("train", "val"):
        (tmp_path / side / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no images in class folders"):
        opened(tmp_path)


def names(frame: pd.DataFrame) -> set[str]:
    return set(frame.file)


def many(per_class: int, classes: int = 4) -> pd.DataFrame:
    rows = [(f"{c}/{i:05d}.png", c) for c in range(classes) for i in range(per_class)]
    return pd.DataFrame(rows, columns=["file", "label"])


def test_a_smaller_fraction_lies_inside_a_larger_one():
    frame = many(250)
    shares = {f: data.subset(frame, f) for f in (0.1, 0.3, 0.31, 1.0)}
    assert [len(s) for s in shares.values()] == [100, 300, 310, 1000]
    assert names(shares[0.1]) < names(shares[0.3]) < names(shares[0.31]) < names(shares[1.0])
    for share in shares.values():
        assert share.file.is_monotonic_increasing  # in the order of the list
    # drawn at random, not cut off at the front: every class is there
    assert shares[0.1].label.value_counts().between(10, 45).all()


def test_fraction_shortens_training_only(image_folder):
    found = opened(image_folder, train_fraction=0.5)
    assert len(found.train) == 9 and len(found.val) == 6


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 0.5])
def test_val_fraction_takes_its_share_of_every_class(share):
    frame = many(40)
    train, val = data.stratified_split(frame, share)
    assert (val.label.value_counts() == max(1, round(40 * share))).all()
    assert not names(train) & names(val) and names(train) | names(val) == names(frame)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.99])
@pytest.mark.parametrize("per_class", [2, 3, 5])
def test_val_fraction_leaves_every_class_a_image_to_train_on(share, per_class):
    train, val = data.stratified_split(many(per_class), share)
    assert set(train.label) == set(val.label) == set(range(4))


def test_val_fraction_is_the_same_in_any_order_and_stable_when_images_are_added():
    frame = many(50)
    _, val = data.stratified_split(frame, 0.2)
    shuffled = frame.sample(frac=1, random_state=1)
    assert names(data.stratified_split(shuffled, 0.2)[1]) == names(val)
    _, grown = data.stratified_split(many(55), 0.2)
    assert len(names(val) & names(grown)) >= 0.85 * len(val)


def test_val_fraction_needs_two_images_of_a_class(image_folder):
    frame = pd.concat([many(5), pd.DataFrame({"file": ["x"], "label": [9]})])
    with pytest.raises(DataError, match=r"\[9\] have one image"):
        data.stratified_split(frame, 0.2)
    found = opened(image_folder, val_fraction=0.34)
    assert len(found.val) == 6 and len(found.train) == 12
    assert all("/train/" in path for path in found.val.path)


# ---- order and draws


def test_an_order_is_a_permutation_that_differs_by_seed_and_epoch():
    orders = [
        tuple(data.epoch_permutation(seed, epoch, 200)) for seed in range(4) for epoch in range(4)
    ]
    assert all(sorted(o) == list(range(200)) for o in orders)
    assert len(set(orders)) == 16
    assert tuple(data.epoch_permutation(3, 2, 200)) == orders[14]


def test_every_place_of_the_order_is_equally_likely():
    from scipy import stats

    first = [int(data.epoch_permutation(0, epoch, 10)[0]) for epoch in range(1000)]
    assert stats.chisquare(np.bincount(first, minlength=10)).pvalue > 1e-3


def test_streams_are_functions_of_their_names_and_never_overlap():
    asked = [
        (seed, purpose, epoch, index)
        for seed in (0, 1, 2**32 - 1)
        for purpose in (data.ORDER, data.DRAW, data.STEP)
        for epoch in (0, 1)
        for index in (0, 1, 10**6)
    ]
    heads = [tuple(data.rng_for(*names).integers(0, 2**63, 4)) for names in asked]
    assert len(set(heads)) == len(asked)
    assert tuple(data.rng_for(*asked[7]).integers(0, 2**63, 4)) == heads[7]
    long = data.rng_for(0, data.DRAW, 0, 0).integers(0, 2**63, 10_000)
    assert not set(long) & set(data.rng_for(0, data.DRAW, 0, 1).integers(0, 2**63, 10_000))


def test_step_seeds_differ_by_seed_step_and_rank():
    seeds = {data.step_seed(s, t, r) for s in range(3) for t in range(50) for r in range(3)}
    assert len(seeds) == 450 and all(0 <= s < 2**64 for s in seeds)


@pytest.mark.parametrize(
    "count, batch_size, drop_last, steps",
    [(10, 5, False, 2), (11, 5, False, 3), (11, 5, True, 2), (4, 5, False, 1), (4, 5, True, 0)],
)
def test_steps_per_epoch_keep_or_drop_the_incomplete_batch(count, batch_size, drop_last, steps):
    assert data.steps_per_epoch(count, batch_size, drop_last) == steps
    sampler = data.Sampler(range(count), seed=0, batch_size=batch_size, drop_last=drop_last)
    assert sampler.steps_per_epoch == steps


@pytest.mark.parametrize(
    "count, seed, batch_size, drop_last, copies, balance, digest",
    [
        (18, 3, 5, False, 1, 0.0, "3372de7ce1daccf4"),
        (18, 3, 5, True, 1, 0.0, "6c5a86b3abf03f05"),
        (1297, 0, 64, False, 1, 0.0, "39fa72d84ff33996"),
        (1297, 0, 64, False, 3, 0.0, "43f35e3225c4eff9"),
        (1000, 2**32 - 1, 256, True, 4, 0.0, "b1ff815abc481249"),
        (1000, 3, 256, False, 1, 0.5, "6f1b346c42375586"),
        (1000, 3, 256, False, 3, 1.0, "9cf95b6544245e28"),
    ],
)
def test_the_rows_of_a_step_never_change(
    count, seed, batch_size, drop_last, copies, balance, digest
):
    """Golden: with other rows or draws an earlier run could not be repeated or taken up again."""
    sampler = data.Sampler(
        np.arange(count) ** 2 % 13,
        seed=seed,
        batch_size=batch_size,
        drop_last=drop_last,
        repeated_aug=copies,
        class_balanced_sampling=balance,
    )
    parts = [a for step in range(3 * sampler.steps_per_epoch) for a in sampler.rows(step)]
    text = b"".join(a.astype("<i8").tobytes() for a in parts)
    assert hashlib.sha256(text).hexdigest()[:16] == digest
    purposes = (data.ORDER, data.DRAW, data.STEP, data.ERASE, data.MIX, data.BALANCE)
    assert purposes == tuple(range(6))


def test_a_sampler_makes_the_order_of_an_epoch_once_and_keeps_two(monkeypatch):
    made, order = [], data.epoch_permutation
    monkeypatch.setattr(
        data, "epoch_permutation", lambda *names: (made.append(names[1]), order(*names))[1]
    )
    sampler = data.Sampler(np.arange(20), seed=0, batch_size=5)
    for step in (0, 4, 1, 5, 2, 6, 3, 7):
        sampler.rows(step)
    assert made == [0, 1]
    for step in (8, 7, 9, 4):
        sampler.rows(step)
    assert made == [0, 1, 2]
    assert sampler.rows(0)[0].tolist() == order(0, 0, 20)[:5].tolist() and made == [0, 1, 2, 0]


@pytest.mark.parametrize("balance", [0.0, 0.5])
@pytest.mark.parametrize("copies", [1, 3])
def test_rows_are_whole_numbers_that_nobody_can_write_over(balance, copies):
    how = dict(seed=0, batch_size=5, repeated_aug=copies, class_balanced_sampling=balance)
    for part in data.Sampler([0, 0, 0, 1, 1, 1, 1], **how).rows(1):
        assert part.dtype == np.int64 and part.shape == (2,) and not part.flags.writeable


# ---- batches


def same(ours: data.Batch, theirs: data.Batch) -> bool:
    tensors = "images labels indices positions".split()
    return all(torch.equal(getattr(ours, t), getattr(theirs, t)) for t in tensors) and (
        (ours.step, ours.is_last, ours.global_size, ours.failures)
        == (theirs.step, theirs.is_last, theirs.global_size, theirs.failures)
    )


def taken(frame, steps=range(0, 8), transform=TRAIN, **options) -> list[data.Batch]:
    return list(
        data.train_loader(
            frame, transform, **{"seed": 3, "batch_size": 5, "steps": steps, **options}
        )
    )


def test_a_batch_holds_the_images_the_order_names_under_their_own_draws(image_folder):
    frame = opened(image_folder).train
    for batch in taken(frame):
        epoch, slot = divmod(batch.step, 4)
        rows = data.epoch_permutation(3, epoch, 18)[slot * 5 : slot * 5 + 5]
        assert batch.indices.tolist() == rows.tolist()
        assert batch.labels.tolist() == frame.label[rows].tolist()
        assert batch.global_size == len(rows) and batch.is_last and batch.failures == []
        assert batch.images.dtype == torch.uint8 and batch.images.shape[1:] == (3, 16, 16)
        for row, shown in zip(rows, batch.images, strict=True):
            with Image.open(frame.path[row]) as image:
                wanted = TRAIN(image.convert("RGB"), data.rng_for(3, data.DRAW, epoch, int(row)))
            np.testing.assert_array_equal(shown.permute(1, 2, 0), np.asarray(wanted))


# torch warns that four workers are more than a small machine has cores; that is the point here
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_batches_are_the_same_bytes_for_any_number_of_workers(
    image_folder, workers, micro_batch_size
):
    frame = opened(image_folder).train
    alone = taken(frame, micro_batch_size=micro_batch_size)
    helped = taken(frame, micro_batch_size=micro_batch_size, workers=workers)
    assert len(alone) == len(helped) == (8 if micro_batch_size is None else 22)
    assert all(map(same, alone, helped))


@pytest.mark.parametrize("start", [1, 3, 4, 6])
def test_batches_from_the_middle_are_those_of_the_whole(image_folder, start):
    frame = opened(image_folder).train
    assert all(map(same, taken(frame)[start:], taken(frame, range(start, 8))))
    assert len(taken(frame, range(start, 8))) == 8 - start


@pytest.mark.parametrize("drop_last", [False, True])
def test_every_epoch_uses_each_image_once(image_folder, drop_last):
    frame = opened(image_folder).train
    steps = 3 if drop_last else 4
    got = taken(frame, range(steps * 3), drop_last=drop_last)
    for epoch in range(3):
        rows = torch.cat([b.indices for b in got[epoch * steps : (epoch + 1) * steps]]).tolist()
        assert len(set(rows)) == len(rows) == (15 if drop_last else 18)


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 9])
def test_parts_of_a_step_add_up_to_it(image_folder, micro):
    frame = opened(image_folder).train
    parts = taken(frame, micro_batch_size=micro)
    for whole in taken(frame):
        own = [p for p in parts if p.step == whole.step]
        assert torch.equal(torch.cat([p.images for p in own]), whole.images)
        assert torch.equal(torch.cat([p.labels for p in own]), whole.labels)
        assert all(len(p.images) <= micro and p.global_size == whole.global_size for p in own)
        assert [p.is_last for p in own] == [False] * (len(own) - 1) + [True]


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_every_step_out_between_them(image_folder, world):
    frame = opened(image_folder).train
    ranks = [taken(frame, rank=rank, world=world) for rank in range(world)]
    for whole, *own in zip(taken(frame), *ranks, strict=True):
        rows = sorted(i for part in own for i in part.indices.tolist())
        assert rows == sorted(whole.indices.tolist())
        image = {int(i): p for i, p in zip(whole.indices, whole.images, strict=True)}
        for part in own:
            assert part.global_size == whole.global_size and part.is_last
            for i, seen in zip(part.indices, part.images, strict=True):
                assert torch.equal(seen, image[int(i)])
        sizes = [len(part.images) for part in own]
        assert max(sizes) - min(sizes) <= 2  # pairs stay together


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("micro", [None, 2, 4])
def test_pairs_of_a_step_come_in_one_part_and_every_place_once(image_folder, world, micro):
    frame = opened(image_folder).train
    for whole in taken(frame):
        steps = range(whole.step, whole.step + 1)
        parts = [
            part.positions.tolist()
            for rank in range(world)
            for part in taken(frame, steps, rank=rank, world=world, micro_batch_size=micro)
        ]
        assert sorted(p for part in parts for p in part) == list(range(whole.global_size))
        for part in parts:
            assert all(p ^ 1 in part or p ^ 1 >= whole.global_size for p in part)


def test_a_rank_without_a_row_gets_an_empty_part(image_folder):
    frame = opened(image_folder).train
    ranks = [taken(frame, range(3, 4), rank=r, world=5, micro_batch_size=1) for r in range(5)]
    assert [[len(part.images) for part in own] for own in ranks] == [[1, 1], [1], [0], [0], [0]]
    empty = ranks[4][0]
    assert empty.images.shape == (0, 3, 16, 16) and empty.labels.shape == (0,)
    assert empty.global_size == 3 and empty.is_last and empty.step == 3


# ---- repeated augmentation


def test_repeated_augmentation_shows_a_share_of_the_images_several_times_differently(image_folder):
    frame = opened(image_folder).train
    got = taken(frame, range(12), batch_size=6, repeated_aug=3)  # 18 image_folder, 3 steps an epoch
    for epoch in range(4):
        steps = got[3 * epoch : 3 * epoch + 3]
        rows = np.concatenate([batch.indices.numpy() for batch in steps])
        assert np.unique(rows, return_counts=True)[1].tolist() == [3] * 6
        assert sorted(set(rows.tolist())) == sorted(
            data.epoch_permutation(3, epoch, 18)[:6].tolist()
        )
        for batch in steps:
            _, counts = np.unique(batch.indices, return_counts=True)
            assert counts.tolist() == [3, 3]  # copies meet in one batch
            for row in set(batch.indices.tolist()):
                copies = batch.images[batch.indices == row]
                assert len(torch.unique(copies, dim=0)) == 3  # each drawn again
    assert len({tuple(data.epoch_permutation(3, e, 18)[:6]) for e in range(4)}) == 4


@pytest.mark.parametrize("count, batch_size, copies", [(18, 6, 3), (40, 16, 4), (23, 7, 2)])
def test_neighbours_among_repeated_images_are_different_ones(count, batch_size, copies):
    rows, number = data.repeat(np.arange(count), batch_size, copies)
    assert len(rows) == len(number) == count and set(number) <= set(range(copies))
    for start in range(0, count, batch_size):
        step = rows[start : start + batch_size]
        assert all(step[i] != step[i + 1] for i in range(0, len(step) - 1, 2))
    drawn = list(zip(rows.tolist(), number.tolist(), strict=True))
    assert len(set(drawn)) == len(drawn)  # no draw comes twice


def test_one_copy_is_no_repetition():
    rows = np.random.default_rng(0).permutation(20)
    same_rows, number = data.repeat(rows, 6, 1)
    assert (same_rows == rows).all() and not number.any()


def test_the_streams_of_copies_purposes_and_places_are_different():
    keys = [(p, e, i, c) for p in range(6) for e in range(3) for i in range(3) for c in range(3)]
    drawn = [data.rng_for(1, *key).random(4).tobytes() for key in keys]
    assert len(set(drawn)) == len(keys)


@pytest.mark.parametrize("world", [1, 2, 5, 9])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_validation_covers_each_row_once_for_any_world(image_folder, world, batch_size):
    frame = opened(image_folder).val
    got = [
        batch
        for rank in range(world)
        for batch in data.eval_loader(frame, TEST, batch_size=batch_size, rank=rank, world=world)
    ]
    assert sorted(i for batch in got for i in batch.indices.tolist()) == list(range(6))
    assert all(len(batch.images) <= batch_size for batch in got)
    for batch in got:
        for i, seen in zip(batch.indices.tolist(), batch.images, strict=True):
            wanted = TEST(images.decode(frame.path[i]))
            np.testing.assert_array_equal(seen.permute(1, 2, 0), np.asarray(wanted))
            assert batch.labels[batch.indices.tolist().index(i)] == frame.label[i]


def test_validation_comes_in_the_order_of_the_frame(image_folder):
    frame = opened(image_folder).val
    got = list(data.eval_loader(frame, TEST, batch_size=4, workers=1))
    assert torch.cat([b.indices for b in got]).tolist() == list(range(6))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_leave_the_global_random_numbers_alone(image_folder, workers):
    frame = opened(image_folder).train
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    taken(frame, workers=workers)
    list(data.eval_loader(frame, TEST, batch_size=4, workers=workers))
    assert torch.equal(torch.get_rng_state(), torch_before)
    now = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_before, now, strict=True))


def test_batches_do_not_depend_on_the_global_random_numbers(image_folder):
    frame = opened(image_folder).train
    first = taken(frame, range(2))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert all(map(same, first, taken(frame, range(2))))


def test_another_seed_gives_other_images_and_other_draws(image_folder):
    frame = opened(image_folder).train
    ours, theirs = taken(frame, range(4), seed=0), taken(frame, range(4), seed=1)
    assert [b.indices.tolist() for b in ours] != [b.indices.tolist() for b in theirs]
    image = {int(i): p for b in ours for i, p in zip(b.indices, b.images, strict=True)}
    other = {int(i): p for b in theirs for i, p in zip(b.indices, b.images, strict=True)}
    assert sum(torch.equal(image[i], other[i]) for i in range(18)) <= 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_breaks_later_is_left_out_and_named_never_swapped(image_folder, workers):
    frame = opened(image_folder).train
    whole = {int(i): p for b in taken(frame, range(4)) for i, p in zip(b.indices, b.images)}  # noqa: B905
    Path(frame.path[7]).write_bytes(b"broken")
    got = taken(frame, range(4), workers=workers)
    assert [f[:2] for b in got for f in b.failures] == [(7, "undecodable")]
    seen = {int(i): p for b in got for i, p in zip(b.indices, b.images, strict=True)}
    assert set(seen) == set(range(18)) - {7}
    assert all(torch.equal(seen[i], whole[i]) for i in seen)
    assert sum(b.global_size for b in got) == 18


FEW_FILES = r"""
import os, resource, sys
from workbench import data
from workbench.augmentation import EvalTransform
from workbench.recipe import Recipe

frame = data.load_dataset(Recipe()).val
now = len(os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (now + 20, now + 20))
try:
    for batch in data.eval_loader(frame, EvalTransform(8, 8), batch_size=2, workers=2):
        batch.images.sum()
        kept = [batch] + globals().get("kept", [])  # each holds its files open
except data.DataError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files here")
def test_too_many_open_files_end_in_a_sentence_and_the_loaders_with_it():
    command = [sys.executable, "-W", "ignore", "-c", FEW_FILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    told = [line for line in done.stderr.splitlines() if line.startswith("too many open files: ")]
    assert done.returncode == 1 and len(told) == 1 and "ulimit -n" in told[0], done.stderr


SMALL_MEMORY = r"""
import sys
from workbench import data
from workbench.augmentation import EvalTransform
from workbench.recipe import Recipe

frame = data.load_dataset(Recipe()).val
try:
    for batch in data.eval_loader(frame, EvalTransform(64, 64), batch_size=128, workers=2):
        batch.images.sum()
except data.DataError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("size", ["1m", pytest.param("40k", marks=pytest.mark.slow)])
# of the second, a batch and a semaphore
def test_too_little_shared_memory_ends_in_a_sentence(size):
    """A namespace of its own has a /dev/shm of this size, as a container may have."""
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    alone = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*alone, mount], capture_output=True).returncode
    ):
        pytest.skip("this machine permits no mount in a namespace of one's own")
    command = [*alone, f'{mount} && exec "$0" "$@"', sys.executable, "-W", "ignore"]
    done = subprocess.run(
        [*command, "-c", SMALL_MEMORY], capture_output=True, text=True, timeout=60
    )
    [told] = done.stderr.splitlines()
    assert done.returncode == 1
    assert told.startswith("shared memory (/dev/shm) is full") and "workers to 0" in told


@pytest.mark.parametrize(
    "error, cause, words",
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), None, "ulimit -n"),
        ("DataLoader worker (pid 7) exited unexpectedly with exit code 24.", None, "ulimit"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "with exit code 24.", "ulimit"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "with exit code 28.", "--shm-size"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is", None, "cache was cut"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "signal: Bus error.", "cache was cut"),
        ("DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details", None, None),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None, None),
        (EOFError("Ran out of input"), None, None),
    ],
)  # fmt: skip
def test_an_error_that_comes_of_the_loaders_says_what_became_of_them(error, cause, words):
    """In torch's words; of any other error nothing is said."""
    error = RuntimeError(error) if isinstance(error, str) else error
    error.__cause__ = RuntimeError(cause) if cause else None
    assert (
        (data.explain_worker_crash(error) is None)
        if words is None
        else (words in str(data.explain_worker_crash(error)))
    )


@pytest.mark.parametrize("code, words", [(errno.EMFILE, "ulimit -n"), (errno.ENOSPC, "shm-size"),
                                         (1, None)])  # fmt: skip
def test_a_loader_that_ends_while_it_hands_a_batch_over_is_told_by_its_exit_code(
    code, words, monkeypatch
):
    """Where torch's own error was lost: raised in a destructor, Python ignores it."""

    class Reader:
        def __init__(self, *_, **__):
            ended = multiprocessing.get_context("fork").Process(target=os._exit, args=(code,))
            ended.start()
            self._workers = [ended]

        def __iter__(self):
            return self

        def __next__(self):
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    monkeypatch.setattr(data, "DataLoader", Reader)
    with pytest.raises(data.DataError if words else ConnectionResetError, match=words):
        next(data._loader(None, [0], 1, False))


def test_a_loader_ends_for_its_parent_and_for_nobody_else(image_folder):
    """A scheduler's SIGTERM reaches every process; the main one decides when loaders end."""
    reader = data.train_loader(
        opened(image_folder).train, TRAIN, seed=0, batch_size=2, steps=range(1000), workers=1
    )
    next(reader)
    [loader] = multiprocessing.active_children()
    subprocess.run([sys.executable, "-c", f"import os; os.kill({loader.pid}, 15)"], check=True)
    loader.join(0.5)
    assert loader.is_alive() and next(reader).step == 1
    os.kill(loader.pid, signal.SIGTERM)
    loader.join(20)
    assert loader.exitcode == 0
    reader.close()


# ---- class balance


RARE = {0: 40, 3: 12, 4: 5, 9: 2, 70: 1}  # images of a label; 60 in all, labels with gaps


def labelled(sizes: dict[int, int]) -> np.ndarray:
    """Labels in no order."""
    labels = np.repeat(list(sizes), list(sizes.values()))
    return np.random.default_rng(5).permutation(labels)


def drawn(labels, epochs=range(1), **options) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and copies of whole epochs."""
    sampler = data.Sampler(labels, **{"seed": 3, "batch_size": 7, **options})
    count = sampler.steps_per_epoch
    for epoch in epochs:
        parts = [sampler.rows(step) for step in range(epoch * count, (epoch + 1) * count)]
        rows, copies = map(np.concatenate, zip(*parts, strict=True))
        yield rows, copies


def shown(labels, rows: np.ndarray) -> dict[int, int]:
    """How many images of each label come."""
    return dict(
        zip(*(a.tolist() for a in np.unique(labels[rows], return_counts=True)), strict=True)
    )


def test_full_balance_shows_every_class_equally_often():
    labels = labelled(RARE)
    for rows, _ in drawn(labels, range(5), class_balanced_sampling=1.0):
        assert shown(labels, rows) == dict.fromkeys(RARE, 12)


def test_half_a_balance_shows_classes_by_the_square_root_of_their_images():
    labels = labelled({0: 1, 1: 4, 2: 9, 3: 16, 4: 30})  # 60 in all
    rows, _ = next(drawn(labels, class_balanced_sampling=0.5))
    root = np.sqrt([1, 4, 9, 16, 30])
    assert np.abs(list(shown(labels, rows).values()) - 60 * root / root.sum()).max() < 1
    labels = labelled({2: 1, 3: 4, 5: 9, 7: 16})  # 30 in all, the roots add up to 10
    for rows, _ in drawn(labels, range(5), class_balanced_sampling=0.5):
        assert shown(labels, rows) == {2: 3, 3: 6, 5: 9, 7: 12}


@pytest.mark.parametrize("balance", [0.0, 1e-9])
def test_no_balance_shows_every_image_once(balance):
    labels = labelled(RARE)
    for epoch, (rows, copies) in enumerate(
        drawn(labels, range(3), class_balanced_sampling=balance)
    ):
        assert sorted(rows) == list(range(60)) and not copies.any()
        assert balance or rows.tolist() == data.epoch_permutation(3, epoch, 60).tolist()


@pytest.mark.parametrize("balance", [0.1, 0.25, 0.5, 0.77, 1.0])
@pytest.mark.parametrize(
    "sizes",
    [
        RARE,
        {5: 17},
        {0: 1, 1: 1, 2: 1},
        {0: 1, 1: 99},
        {i: 1 + i * i % 23 for i in range(50)},
        {i: 3 for i in range(31)},
    ],
    ids=["rare", "one class", "single images", "one of a hundred", "many", "equal"],
)
def test_an_epoch_has_its_length_every_class_and_images_as_often_as_their_class_mates(
    sizes, balance
):
    labels = labelled(sizes)
    weights = {c: n ** (1 - balance) for c, n in sizes.items()}
    for rows, copies in drawn(labels, range(3), class_balanced_sampling=balance):
        assert len(rows) == len(copies) == len(labels)
        times = np.bincount(rows, minlength=len(labels))
        for c, weight in weights.items():
            own = times[labels == c]
            assert own.sum() > 0 and own.max() - own.min() <= 1
            assert abs(own.sum() - len(labels) * weight / sum(weights.values())) < 1
        for row in range(len(labels)):  # each time under a copy of its own
            assert sorted(copies[rows == row]) == list(range(times[row]))


@pytest.mark.parametrize(
    "shares, whole",
    [
        ([1.5, 2.3, 0.2], [2, 2, 0]),
        ([0.4, 2.8, 2.8], [0, 3, 3]),
        ([0.7, 0.6, 0.6, 0.1], None),
        ([4.0, 1.0], [4, 1]),
        ([2.99999999999, 1.00000000001], [3, 1]),
        ([5.00000000001, 0.99999999999], [5, 1]),
        ([0.99999999999] * 3, [1, 1, 1]),
        ([7.0], [7]),
        ([], []),
    ],
)
def test_the_largest_remainders_are_rounded_up(shares, whole):
    got = data.apportion(np.array(shares), np.random.default_rng(0)).tolist()
    assert got == whole or whole is None and got in ([1, 1, 0, 0], [1, 0, 1, 0])


def test_equal_remainders_are_rounded_up_equally_often_however_the_machine_rounds():
    from scipy import stats

    rng = np.random.default_rng(0)
    shares = np.array([1.25, 0.25 + 1e-12, 3.25 - 1e-12, 7.25])
    more = sum(data.apportion(shares, rng) - np.floor(shares) for _ in range(2000))
    assert stats.chisquare(more).pvalue > 1e-3 and more.sum() == 2000


def test_what_cannot_be_divided_goes_to_every_class_in_turn():
    from scipy import stats

    labels = labelled({0: 7, 1: 2, 2: 2})
    epochs = [
        shown(labels, rows) for rows, _ in drawn(labels, range(2000), class_balanced_sampling=1.0)
    ]
    assert all(sorted(epoch.values()) == [3, 4, 4] for epoch in epochs)
    fewer = np.bincount([min(epoch, key=epoch.get) for epoch in epochs], minlength=3)
    assert stats.chisquare(fewer).pvalue > 1e-3


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_over_many_epochs_each_image_of_a_class_comes_equally_often(balance):
    from scipy import stats

    labels = labelled(RARE)
    epochs = drawn(labels, range(2000), class_balanced_sampling=balance)
    times = np.stack([np.bincount(rows, minlength=60) for rows, _ in epochs])
    for label in (0, 3, 4, 9):
        own = times[:, labels == label]
        size = own.shape[1]
        more = (
            own.sum(axis=1) % size
        )  # that many, none twice, so they spread less than a chi-square
        spread = (more * (size - more) / (size * (size - 1))).sum()
        if spread:
            square = ((own.sum(axis=0) - own.sum() / size) ** 2).sum() / spread
            assert 1e-3 < stats.chi2.sf(square, size - 1) < 1 - 1e-3
        else:
            assert len(set(own.ravel().tolist())) == 1


def test_every_place_of_a_balanced_epoch_is_equally_likely_for_every_class():
    from scipy import stats

    labels = labelled(RARE)
    epochs = [labels[rows] for rows, _ in drawn(labels, range(1000), class_balanced_sampling=1.0)]
    for place in (0, 30, 59):
        counts = np.unique([epoch[place] for epoch in epochs], return_counts=True)[1]
        assert len(counts) == 5 and stats.chisquare(counts).pvalue > 1e-3


def test_a_balanced_order_differs_by_seed_and_epoch_and_not_by_the_way_it_is_asked():
    labels = labelled(RARE)
    how = dict(class_balanced_sampling=0.5)
    orders = [tuple(r) for s in range(4) for r, _ in drawn(labels, range(4), seed=s, **how)]
    assert len(set(orders)) == 16
    chosen = {tuple(sorted(rows)) for rows in orders}
    assert len(chosen) == 16  # not only the places are drawn again
    for size in (1, 8, 60, 100):
        rows = [tuple(rows) for rows, _ in drawn(labels, range(4), batch_size=size, **how)]
        assert rows == orders[12:]
    sampler = data.Sampler(pd.Series(labels), seed=3, batch_size=7, **how)
    sampler = pickle.loads(pickle.dumps(sampler))  # as a worker that is not forked gets it
    for step in (35, 2, 17, 8, 0):
        part = slice(step % 9 * 7, step % 9 * 7 + 7)
        assert tuple(sampler.rows(step)[0]) == orders[12 + step // 9][part]


def test_names_and_gaps_of_labels_do_not_matter():
    labels = labelled(RARE)
    dense = np.searchsorted(sorted(RARE), labels)
    epochs = [drawn(of, range(3), class_balanced_sampling=0.7) for of in (labels, dense, dense - 2)]
    for first, *others in zip(*epochs, strict=True):
        assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("batch_size", [7, 60, 61])
def test_a_balanced_epoch_drops_its_incomplete_batch_and_nothing_else(batch_size):
    labels = labelled(RARE)
    sampler, dropping = (
        data.Sampler(
            labels, seed=0, batch_size=batch_size, class_balanced_sampling=1.0, drop_last=drop
        )
        for drop in (False, True)
    )
    assert dropping.steps_per_epoch == 60 // batch_size
    steps = sampler.steps_per_epoch
    assert sum(len(sampler.rows(step)[0]) for step in range(steps)) == 60
    for step in range(dropping.steps_per_epoch):
        # the second epoch too, where steps of the two are no longer numbered alike
        for ours, theirs in ((step, step), (steps + step, dropping.steps_per_epoch + step)):
            assert np.array_equal(sampler.rows(ours), dropping.rows(theirs))
            assert len(dropping.rows(theirs)[0]) == batch_size


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [7, 12, 100])
@pytest.mark.parametrize("balance", [0.3, 1.0])
def test_balance_and_repetition_together_show_no_draw_twice(copies, batch_size, balance):
    labels = labelled(RARE)
    how = dict(repeated_aug=copies, batch_size=batch_size, class_balanced_sampling=balance)
    for rows, number in drawn(labels, range(10), **how):
        assert len(rows) == 60
        assert len(set(zip(rows.tolist(), number.tolist(), strict=True))) == 60
        size = max(1, batch_size // copies)
        for start in range(0, 60 - size * copies + 1, size * copies):  # each chunk comes in turns
            whole = slice(start, start + size * copies)
            turns, draws = rows[whole].reshape(copies, -1), number[whole].reshape(copies, -1)
            assert (turns == turns[0]).all() and (draws - draws[0] == np.c_[:copies]).all()
            assert (draws[0] % copies == 0).all()


def test_under_repetition_the_classes_come_equally_often_on_average():
    labels = labelled(RARE)
    epochs = drawn(labels, range(1000), repeated_aug=3, class_balanced_sampling=1.0)
    total = sum(np.array([shown(labels, rows).get(c, 0) for c in RARE]) for rows, _ in epochs)
    assert total.sum() == 60_000 and np.abs(total / 12_000 - 1).max() < 0.03


def test_a_class_so_rare_that_its_draws_run_out_is_an_error_that_names_it():
    most = {7: 1, 8: 2**17 - 1}
    rows, copies = next(drawn(labelled(most), class_balanced_sampling=1.0, batch_size=2**17))
    assert copies.max() == 2**16 - 1 and (labelled(most)[rows] == 7).sum() == 2**16
    last, before = (data.rng_for(0, data.DRAW, 0, 0, c).random() for c in (2**16 - 1, 2**16 - 2))
    assert last != before
    more = labelled({7: 1, 8: 2**17})
    with pytest.raises(
        DataError, match="label 7 has 1 of 131,073 .* each 65,537 times.* 65,536 in"
    ):
        data.Sampler(more, seed=0, batch_size=8, class_balanced_sampling=1.0)
    with pytest.raises(DataError, match="label 7 .* each 65,536 times an epoch in 2 copies"):
        data.Sampler(
            labelled(most), seed=0, batch_size=8, class_balanced_sampling=1.0, repeated_aug=2
        )
    with pytest.raises(DataError, match="7 has 2 of 262,145 .* each 65,537 times"):  # one of them
        data.Sampler(
            labelled({7: 2, 8: 2**18 - 1}), seed=0, batch_size=8, class_balanced_sampling=1.0
        )
    half = labelled({7: 1, 8: 2**16 - 1})
    data.Sampler(half, seed=0, batch_size=8, class_balanced_sampling=1.0, repeated_aug=2)
    data.Sampler(more, seed=0, batch_size=8, class_balanced_sampling=0.9)
    data.Sampler(more, seed=0, batch_size=8)


@pytest.fixture
def uneven(image_folder: Path) -> pd.DataFrame:
    """Six image_folder of one class, two of another and one of a third."""
    return opened(image_folder).train.iloc[[0, 1, 2, 3, 4, 5, 6, 7, 12]].reset_index(drop=True)


def test_a_balanced_batch_holds_images_under_the_draws_of_their_copies(uneven):
    sampler = data.Sampler(uneven.label, seed=3, batch_size=5, class_balanced_sampling=1.0)
    got = taken(uneven, range(6), class_balanced_sampling=1.0)
    for batch in got:
        rows, copies = sampler.rows(batch.step)
        assert batch.indices.tolist() == rows.tolist() and batch.global_size == len(rows)
        assert batch.labels.tolist() == uneven.label[rows].tolist()
        for row, copy, image in zip(rows, copies, batch.images, strict=True):
            rng = data.rng_for(3, data.DRAW, batch.step // 2, int(row), int(copy))
            wanted = TRAIN(images.decode(uneven.path[row]), rng)
            np.testing.assert_array_equal(image.permute(1, 2, 0), np.asarray(wanted))
    for first, second in zip(got[::2], got[1::2], strict=True):
        labels, rows = (
            torch.cat([getattr(b, t) for b in (first, second)]) for t in ("labels", "indices")
        )
        assert torch.bincount(labels).tolist() == [3, 3, 3]
        seen = torch.cat([first.images, second.images])[rows == 8]
        assert len(torch.unique(seen, dim=0)) == 3  # one image three times, each drawn again


# torch warns that two workers are more than a small machine has cores; that is the point here
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_balanced_batches_are_the_same_bytes_for_any_workers_and_from_any_step(
    uneven, copies, workers, start
):
    how = dict(class_balanced_sampling=0.8, repeated_aug=copies, batch_size=4)
    whole = taken(uneven, range(8), **how)
    assert [len(batch.images) for batch in whole[:3]] == [4, 4, 1]
    got = taken(uneven, range(start, 8), workers=workers, **how)
    assert len(got) == 8 - start and all(map(same, whole[start:], got))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [None, 2])
def test_processes_share_balanced_steps_out_between_them(uneven, world, micro):
    how = dict(class_balanced_sampling=1.0, repeated_aug=2)
    for whole in taken(uneven, range(6), **how):
        parts = [
            part
            for rank in range(world)
            for part in taken(
                uneven,
                range(whole.step, whole.step + 1),
                rank=rank,
                world=world,
                micro_batch_size=micro,
                **how,
            )
        ]
        places, rows, pixels = (
            torch.cat([getattr(part, t) for part in parts])
            for t in ("positions", "indices", "images")
        )
        assert sorted(places.tolist()) == list(range(whole.global_size))
        back = torch.argsort(places)
        assert torch.equal(rows[back], whole.indices) and torch.equal(pixels[back], whole.images)


# ---- examining


def findings(image_folder: Path, strict: bool = False, **options) -> pd.DataFrame:
    recipe = Recipe(dataset="files", data_dir=str(image_folder), **options)
    return data.check_data(recipe, cache=False, progress=False)


def test_sound_data_has_no_findings(image_folder):
    table = findings(image_folder)
    assert len(table) == 0
    assert list(table.columns) == ["finding", "side", "file", "label", "detail"]


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


def test_the_same_bytes_in_training_and_validation_are_found_in_class_folders(image_folder):
    shutil.copy(image_folder / "train/b/2.png", image_folder / "val/c/leak.png")
    [row] = findings(image_folder).itertuples()
    assert (row.finding, row.side, row.file) == ("in train and validation", "val", "c/leak.png")
    assert "b/2.png" in row.detail


def test_facts_are_those_of_the_files(image_folder):
    frame = opened(image_folder).train
    facts = data.verify_images(frame, cache=False, progress=False)
    assert facts.bytes.tolist() == [os.path.getsize(p) for p in frame.path]
    assert set(zip(facts.width, facts.height, strict=True)) == {(40, 32)}
    assert facts.digest.nunique() == 18 and (facts.problem == "").all()
    pd.testing.assert_frame_equal(facts[frame.columns], frame)


def test_a_second_look_reads_no_image_again(image_folder, monkeypatch):
    frame = opened(image_folder).train
    first = data.verify_images(frame, progress=False)
    monkeypatch.setattr(images, "open", lambda path: pytest.fail(f"{path} was read again"))
    pd.testing.assert_frame_equal(data.verify_images(frame, progress=False), first)


def test_a_changed_file_is_read_again_and_only_that(image_folder, monkeypatch):
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


def test_a_mended_file_is_seen_mended(image_folder):
    frame = opened(image_folder).train
    path = Path(frame.path[2])
    good, stat = path.read_bytes(), path.stat()
    path.write_bytes(b"x" * len(good))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data.verify_images(frame, progress=False).problem[2] == "undecodable"
    path.write_bytes(good)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data.verify_images(frame, progress=False).problem[2] == ""


def test_a_damaged_cache_costs_time_and_nothing_else(image_folder):
    frame = opened(image_folder).train
    stores = set((data.CACHE / "facts").glob("*"))
    first = data.verify_images(frame, progress=False)
    [store] = set((data.CACHE / "facts").glob("*")) - stores
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


def test_a_set_that_is_mostly_unreadable_is_an_error_not_a_quarantine(image_folder):
    frame = opened(image_folder).train
    for path in frame.path[:4]:
        os.unlink(path)
    with pytest.raises(DataError, match="4 of 18.*check-data"):
        data.drop_corrupt(data.verify_images(frame, progress=False), "train")


def test_the_fingerprint_follows_files_labels_and_bytes(image_folder):
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


# ---- the embedded sets


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load_dataset(Recipe())


@pytest.fixture(scope="module")
def letters() -> data.Dataset:
    return data.load_dataset(Recipe(dataset="letters"))


def test_digits_are_all_of_sklearns_split_once(digits):
    assert (len(digits.train), len(digits.val)) == (1297, 500)
    assert (digits.val.label.value_counts() == 50).all() and len(digits.classes) == 10
    place = [int(Path(f).stem) for f in [*digits.train.file, *digits.val.file]]
    assert sorted(place) == list(range(1797))


def test_digits_are_sklearns_pixels(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for frame in (digits.train, digits.val):
        for row in frame.itertuples():
            i = int(Path(row.file).stem)
            with Image.open(row.path) as image:
                pixels = np.asarray(image)
            np.testing.assert_array_equal(np.round(pixels * (16 / 255)), bunch.images[i])
            assert row.label == bunch.target[i]


def test_the_split_of_the_digits_never_changes(digits):
    """Golden: a changed split would make every earlier run incomparable."""
    assert sorted(digits.val.file)[:4] == [
        "0/0030.png",
        "0/0150.png",
        "0/0185.png",
        "0/0229.png",
    ]
    assert data.fingerprint(digits) == "e5d75a8b87ae"


def test_letters_have_26_classes_on_both_sides_and_no_font_in_common(letters):
    for frame in (letters.train, letters.val):
        assert sorted(set(frame.label)) == list(range(26))
        assert frame.label.value_counts().nunique() == 1
        assert [f[0] for f in frame.file] == [letters.classes[label] for label in frame.label]
    fonts = [set(f.file.str.extract(r"/(.+)-\d+-[ul]")[0]) for f in (letters.train, letters.val)]
    assert all(fonts) and not fonts[0] & fonts[1]
    families = [{name.split("-")[0] for name in side} for side in fonts]
    assert not families[0] & families[1]


@pytest.mark.parametrize("dataset", ["digits", "letters"])
def test_the_embedded_sets_are_sound_and_nothing_leaks(dataset):
    assert len(data.check_data(Recipe(dataset=dataset), progress=False)) == 0


def test_letters_are_drawn_dark_on_light_and_inside_the_image(letters):
    for row in letters.val.iloc[::40].itertuples():
        pixels = np.asarray(images.decode(row.path))
        assert pixels.shape == (32, 32, 3) and pixels.min() < 80
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert border.mean() > 240


def test_an_embedded_set_is_lists_and_files_like_any_other(digits):
    root = data.digits()
    as_files = data.load_dataset(
        Recipe(
            dataset="files",
            data_dir=str(root),
            train_list="meta/train.txt",
            val_list="meta/val.txt",
            class_names="classes.txt",
        )
    )
    pd.testing.assert_frame_equal(as_files.train, digits.train)
    assert as_files.classes == digits.classes


def test_json_and_plain_lists_give_the_same_frame(image_folder):
    rows = [(f"{c}/{i}.png", n) for n, c in enumerate(CLASSES) for i in range(6)]
    plain = write_list(image_folder / "plain.txt", *[f"{f} {n}" for f, n in rows])
    lines = [json.dumps({"filename": f, "label": n}) for f, n in rows]
    other = write_list(image_folder / "lines.json", *lines)
    pd.testing.assert_frame_equal(
        data.read_list(plain, image_folder / "train"), data.read_list(other, image_folder / "train")
    )


def test_streams_are_the_stream_of_each_place_without_a_trace_of_the_one_before():
    streams = data.Streams(7)
    for place in [(data.DRAW, 3, 17, 0), (data.DRAW, 3, 17, 2), (data.MIX, 0, 2**40, 9)]:
        a, b = streams(*place), data.rng_for(7, *place)
        for draw in (
            lambda rng: rng.random(3),
            lambda rng: rng.permutation(5),
            lambda rng: rng.integers(7, dtype=np.int32),  # leaves half a number behind
            lambda rng: rng.standard_normal(4),
        ):
            np.testing.assert_array_equal(draw(a), draw(b))


def test_counts_have_every_class_also_one_without_training_images(image_folder):
    (image_folder / "train" / "aa").mkdir()
    found = opened(image_folder)
    assert found.classes == ["a", "aa", "b", "c"] and found.counts == [6, 0, 6, 6]


def test_check_data_says_where_an_image_of_both_sides_has_another_label(image_folder):
    shutil.copy(image_folder / "train" / "a" / "0.png", image_folder / "val" / "b" / "again.png")
    recipe = Recipe(dataset="files", data_dir=str(image_folder))
    found = data.check_data(recipe, cache=False, progress=False)
    [detail] = found[found.finding == "in train and validation"].detail
    assert detail == "in training as a/0.png, labelled 0 there"


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
