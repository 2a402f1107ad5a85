"""CSV, TSV and Parquet with a header give the batches of the same images in class folders."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch
from conftest import CLASSES, write_list
from helpers import assert_same_run, train
from test_archives import archived

from workbench import data, runs, training
from workbench.augmentation import TrainTransform
from workbench.data import DataError, tables
from workbench.image_files import stored_in
from workbench.recipe import Recipe, RecipeError

NAMES = {"a": "cat", "b": "ant", "c": "bee"}  # sorted in another order than the folders
ROWS = {"train": 6, "val": 2}


def opened(folder: Path, **options) -> data.Dataset:
    return data.load_dataset(Recipe(dataset="files", data_dir=str(folder), **options))


def written(folder: Path, suffix: str = "csv", **extra) -> dict:
    """Tables of train and val in the order of the class folders, and the options that name them."""
    for side, count in ROWS.items():
        files = [f"{c}/{i}.png" for c in CLASSES for i in range(count)]
        frame = pd.DataFrame({"image": files, "label": [f[0] for f in files]})
        save(folder / f"{side}.{suffix}", frame.assign(**extra))
    return dict(train_list=f"train.{suffix}", val_list=f"val.{suffix}")


def save(path: Path, frame: pd.DataFrame) -> None:
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)


def table(folder: Path, text: str, **options) -> data.Dataset:
    """Training rows of a CSV file; validation is split off."""
    (folder / "t.csv").write_text(text, encoding="utf-8")
    return opened(folder, train_list="t.csv", **{"val_fraction": 0.5, **options})


def with_bytes(folder: Path, form: str) -> dict:
    options = written(folder, "parquet")
    for side in ROWS:
        path = folder / f"{side}.parquet"
        frame = pd.read_parquet(path)
        raw = [(folder / side / file).read_bytes() for file in frame.image]
        pairs = [{"bytes": b, "path": Path(f).name} for b, f in zip(raw, frame.image, strict=True)]
        save(path, frame.assign(image=raw if form == "binary" else pairs))
    return options


def lists(folder: Path, form: str) -> dict:
    for side, count in ROWS.items():
        rows = [(f"{c}/{i}.png", n) for n, c in enumerate(CLASSES) for i in range(count)]
        if form == "custom_cls":
            rows = [json.dumps({"filename": file, "label": label}) for file, label in rows]
        else:
            rows = [f"{file} {label}" for file, label in rows]
        write_list(folder / f"{side}.txt", *rows)
    return dict(train_list="train.txt", val_list="val.txt")


def without_roots(folder: Path, form: str) -> dict:
    options = with_bytes(folder, form)
    for side in ROWS:
        (folder / side).rename(folder.parent / f"{folder.name}-{side}")
    return options


def features(classes=CLASSES) -> dict:
    label = {"names": [*classes], "_type": "ClassLabel"}
    return {"image": {"_type": "Image"}, "label": label, "camera": {"_type": "Value"}}


def stream(path: Path, rows: list[dict], classes=CLASSES) -> None:
    """An Arrow stream as Hugging Face's library writes it."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    fields = [("image", image), ("label", pa.int64()), ("camera", pa.string())]
    about = json.dumps({"info": {"features": features(classes)}})
    schema = pa.schema(fields).with_metadata({"huggingface": about})
    with pa.ipc.new_stream(path, schema) as out:
        for start in range(0, len(rows), 4):
            out.write_table(pa.Table.from_pylist(rows[start : start + 4], schema))


def imitated(folder: Path, rows: list[dict], classes=CLASSES) -> None:
    """The folder of Dataset.save_to_disk, in two shards, without the library."""
    folder.mkdir()
    for i, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        stream(folder / f"{i}.arrow", part, classes)
    state = {"_data_files": [{"filename": f"{i}.arrow"} for i in range(2)]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features(classes)}))


def by_their_library(folder: Path, rows: list[dict], classes=CLASSES) -> None:
    import datasets

    datasets.disable_progress_bars()
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[*classes])}
    kinds["camera"] = datasets.Value("string")
    columns = {key: [row[key] for row in rows] for key in kinds}
    found = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    found.save_to_disk(folder, num_shards=2)


def saved(folder: Path, save, classes=CLASSES) -> dict:
    """train and val as saved data sets in place of the class folders."""
    for side in ROWS:
        rows = [
            {"image": {"bytes": file.read_bytes(), "path": file.name},
             "label": classes.index(file.parent.name), "camera": file.stem}
            for file in sorted((folder / side).glob("*/*"))
        ]  # fmt: skip
        shutil.rmtree(folder / side)
        save(folder / side, rows, classes)
    return {}


FORMS = {
    "imagenet": lambda folder: lists(folder, "imagenet"),
    "custom_cls": lambda folder: lists(folder, "custom_cls"),
    "csv": written,
    "tsv": lambda folder: written(folder, "tsv"),
    "parquet": lambda folder: written(folder, "parquet"),
    "parquet with bytes": lambda folder: without_roots(folder, "binary"),
    "parquet of Hugging Face": lambda folder: with_bytes(folder, "struct"),
    "Arrow streams": lambda folder: saved(folder, imitated),
    "Hugging Face": lambda folder: saved(folder, by_their_library),
    "zip": lambda folder: archived(folder, "zip"),
    "tar": lambda folder: archived(folder, "tar"),
    "csv and zip": lambda folder: written(folder) | archived(folder, "zip"),
}


def batches(found: data.Dataset, **options) -> list[data.Batch]:
    transform = TrainTransform(16, hflip=0.5, brightness=0.4)
    return list(data.train_loader(found.train, transform, seed=3, batch_size=5, **options))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_images_gives_the_batches_of_class_folders(image_folder, form):
    folders = opened(image_folder)
    expected = batches(folders, steps=range(8)), data.verify_images(folders.val, progress=False)
    found = opened(image_folder, **FORMS[form](image_folder))
    pairs = zip(expected[0], batches(found, steps=range(8)), strict=True)
    for a, b in pairs:
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    assert len(found.val) == len(folders.val) == 6
    assert found.val.label.tolist() == folders.val.label.tolist()
    if form in ("zip", "tar"):
        assert data.fingerprint(found) == data.fingerprint(folders)
    if form not in ("imagenet", "custom_cls"):
        assert found.classes == folders.classes
    verified = data.verify_images(found.val, progress=False)
    assert verified.digest.tolist() == expected[1].digest.tolist()


def test_text_labels_are_sorted_as_class_folders_are(image_folder):
    text = "path,label\n" + "".join(f"{c}/{i}.png,{NAMES[c]}\n" for c in "abc" for i in (0, 1))
    found = table(image_folder, text)
    assert found.classes == ["ant", "bee", "cat"]
    assert found.train.set_index("file").label.to_dict() == {
        f: {"a": 2, "b": 0, "c": 1}[f[0]] for f in found.train.file
    }
    write_list(image_folder / "names.txt", "cat", "dog", "bee", "ant")
    found = table(image_folder, text, class_names="names.txt")
    assert found.classes == ["cat", "dog", "bee", "ant"]
    assert {f[0]: int(n) for f, n in zip(found.train.file, found.train.label, strict=True)} == {
        "a": 0, "b": 3, "c": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "labels, names, classes, numbers",
    [
        (["2", "0"], None, ["0", "1", "2"], [2, 0]),  # numbers stay numbers
        (["007", "010"], None, ["007", "010"], [0, 1]),
        (["010", "7"], None, ["010", "7"], [0, 1]),
        (["20", "10"], ["20", "10"], ["20", "10"], [0, 1]),
        (["0", "1"], ["1", "0"], ["1", "0"], [1, 0]),
        (["1", "0"], ["x", "y"], ["x", "y"], [1, 0]),
        (["e\u0301", "a, b"], None, ["a, b", "é"], [1, 0]),  # NFC; a quoted comma
    ],
)
def test_numbers_stay_numbers_and_ids_stay_text(image_folder, labels, names, classes, numbers):
    if names:
        write_list(image_folder / "names.txt", *names)
    rows = [f'{c}/{i}.png,"{n}"\n' for c, n in zip("ab", labels, strict=True) for i in (0, 1)]
    options = {"class_names": "names.txt"} if names else {}
    found = table(image_folder, "file,label\n" + "".join(rows), **options)
    assert found.classes == classes
    assert [found.train.label[found.train.file.str[0] == c].iloc[0] for c in "ab"] == numbers


def test_columns_of_any_name_are_read_and_the_others_are_kept(image_folder):
    rows = [f"00{i},{c}/{i}.png,{NAMES[c]},{i}" for c in "abc" for i in range(4)]
    text = "\ufeff" + "\r\n".join(["site,Bild Pfad,diagnosis,width", *rows])
    with pytest.raises(DataError, match="no column file/filename.*set file_column to one of.*Bild"):
        table(image_folder, text)
    found = table(image_folder, text, file_column="Bild Pfad", label_column="diagnosis")
    assert found.classes == ["ant", "bee", "cat"] and len(found.train) + len(found.val) == 12
    for frame in (found.train, found.val):
        assert frame.site.tolist() == [f"00{Path(file).stem}" for file in frame.file]
        assert frame.width_.tolist() == [Path(file).stem for file in frame.file]


def test_other_columns_of_parquet_keep_their_types(image_folder):
    options = written(image_folder, "parquet", age=41, at=pd.Timestamp("2026-01-02"))
    found = opened(image_folder, **options)
    assert found.train.age.tolist() == [41] * 18 and found.train.at[0, "at"].year == 2026


TWO = "a/0.png,x\na/1.png,x\nb/0.png,y\nb/1.png,y\n"


@pytest.mark.parametrize(
    "text, options, says",
    [
        ("", {}, "cannot be read"),
        ("file,label\n", {}, "has no rows"),
        ("file,kind\n" + TWO, {}, "no column label/class/.*set label_column to one of .*kind"),
        ("file,path,label\na,b,c\n", {}, "2 columns file/.*set file_column to one of"),
        ("file,label\n" + TWO, {"label_column": "kind"}, "no column kind; .*\\['file', 'label'\\]"),
        ("file,label\na/0.png\n", {}, "cannot be read: .*Expected 2 columns, got 1"),
        ("file,label\na/0.png,\n", {}, "row 1 has no text or whole number in 'label'"),
        ("file,label\n" + TWO + "c/0.png,3\n", {}, "labels are numbers \\('3'\\) and texts \\('x'"),
        ("file,label\n" + TWO + "b/1.png,x\n", {}, "b/1.png' has the labels \\['y', 'x'\\]"),
        ("file,label\n" + TWO, {"class_names": "names.txt"}, "\\['y'\\] are not in class_names"),
        ("file,label\n" + TWO, {"class_names": "twice.txt"}, "class_names has 'x' twice, and the"),
        ("file,label\na/0.png,0\nb/0.png,1.5\n", {}, "numbers \\('0'\\) and texts \\('1.5'\\)"),
        ("file,label\na/0.png,0\nb/0.png,-1\nc/0.png,1\n",
         {"val_fraction": 0.0, "val_list": "v.csv"}, "labels outside 0 to 1"),
        ("file,label\n" + TWO, {"val_fraction": 0.0, "val_list": "v.csv"},
         "labels \\['z'\\] are not in the training tables, which have \\['x', 'y'\\]"),
        ("file,label,file_,file_\na/0.png,x,1,2\n", {}, "two columns 'file_'"),
        ("file,label\n../train/a/0.png,x\n/b/1.png,y\n", {"val_fraction": 0.0, "val_list": "w.csv"},
         "entries outside their root"),
        (TWO, {}, "no column file/.*set file_column to one of .*'a/0.png', 'x'\\], its first row"),
        ("file;label\na/0.png;x\n", {}, "one of \\['file;label'\\], its first row between commas"),
        ("file,label\n,x\n", {}, "row 1 has no text or whole number in 'file'"),
        ("file,label\na/0\0.png,x\n", {}, "row 1 has no text or whole number in 'file'"),
        ("file,label,label\na/0.png,x,y\n", {}, "2 columns label/.*set label_column to one of"),
        ('file,label\n"a/0.png,x\n', {}, "cannot be read: "),
        ("file,label\na/0.png,x\nb/0.png,y\n", {}, "have one image; val_fraction cannot split"),
        ("file,label\n" + TWO, {"label_column": "label", "val_fraction": 0.0, "fold": "1/2",
         "group_column": "site"}, "group_column 'site' is not in the tables"),
        ("file,label,g\n" + TWO.replace("\n", ",1\n"), {"val_fraction": 0.0, "fold": "1/2",
         "group_column": "g"}, "has 1 value and 0 empty fields; 1/2 needs 2 values"),
        ("file,label,g\n" + TWO.replace("\n", ",\n"), {"val_fraction": 0.0, "fold": "1/2",
         "group_column": "g"}, "has 0 values and 4 empty fields"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_one_sentence(image_folder, text, options, says):
    write_list(image_folder / "names.txt", "x", "z")
    write_list(image_folder / "twice.txt", "x", "y", "x")
    write_list(image_folder / "v.csv", "file,label", "a/0.png," + ("z" if "x" in text else "0"))
    write_list(image_folder / "w.csv", "file,label", "a/1.png,x")
    with pytest.raises(DataError, match=says) as error:
        table(image_folder, text, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("rows", [0, 3000])  # in the first bytes, and far behind them
def test_another_encoding_is_named(image_folder, encoding, rows):
    text = "file,label\n" + "a/0.png,x\n" * rows + "a/1.png,é\n"
    (image_folder / "t.csv").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match="t.csv' cannot be read: .*; save it as UTF-8$") as error:
        opened(image_folder, train_list="t.csv", val_fraction=0.5)
    assert "\n" not in str(error.value)


def test_labels_with_spaces_around_them_and_rows_that_are_there_twice(image_folder):
    found = table(image_folder, "file,label\n" + TWO + "b/0.png, y \na/2.png,x\n")
    assert found.classes == ["x", "y"] and len(found.train) + len(found.val) == 6
    rows = data.check_data(found, progress=False)
    assert {*rows.finding} & {"duplicate", "in train and validation"}


def test_a_few_missing_images_are_listed_and_many_are_an_error(image_folder):
    rows = "".join(f"{c}/{i}.png,{c}\n" for c in "abc" for i in range(6))
    for missing, refused in ((1, False), (9, True)):
        lost = "".join(f"a/lost{i}.png,a\n" for i in range(missing))
        frame = table(image_folder, "file,label\n" + rows + lost, val_fraction=0.0, fold="1/2")
        frame = data.verify_images(pd.concat([frame.train, frame.val]), progress=False)
        if refused:
            with pytest.raises(
                DataError, match="9 of 27 images cannot be read, .*missing: no such"
            ):
                data.drop_corrupt(frame, "train")
        else:
            kept, left_out = data.drop_corrupt(frame, "train")
            assert len(kept) == 18 and left_out.file.tolist() == ["a/lost0.png"]


def test_stored_bytes_that_are_no_image_are_named(image_folder):
    options = with_bytes(image_folder, "binary")
    frame = pd.read_parquet(image_folder / "train.parquet")
    frame.at[4, "image"] = b"no image"
    save(image_folder / "train.parquet", frame)
    found = data.verify_images(opened(image_folder, **options).train, progress=False)
    assert found.problem.tolist() == [""] * 4 + ["undecodable"] + [""] * 13


def test_a_parquet_file_that_is_cut_short_or_without_an_image_is_named(image_folder):
    options = with_bytes(image_folder, "binary")
    path = image_folder / "train.parquet"
    frame, raw = pd.read_parquet(path), path.read_bytes()
    path.write_bytes(raw[:-20])
    with pytest.raises(DataError, match="train.parquet' cannot be read: "):
        opened(image_folder, **options)
    frame.loc[4, "image"] = None
    save(path, frame)
    with pytest.raises(DataError, match="row 5 has no 'image'"):
        opened(image_folder, **options)
    save(path, frame.assign(label=[0.5] * 18))
    with pytest.raises(DataError, match="no text or whole number in 'label' \\(double\\)"):
        opened(image_folder, **options)


def test_the_options_of_columns_need_a_table():
    with pytest.raises(RecipeError, match="file_column: like label_column.* needs a table"):
        Recipe(dataset="files", data_dir="x", file_column="a", train_list="a.txt")


def test_columns_land_in_the_predictions(image_folder, tmp_path):
    options = written(image_folder, camera="left", classes_seen=3)
    recipe = Recipe(dataset="files", data_dir=str(image_folder), runs_dir=str(tmp_path), epochs=1,
                    workers=0, device="cpu", **options)  # fmt: skip
    for _ in training.fit(recipe, run := runs.Run(recipe.folder)):
        pass
    frame = run.predictions()
    assert frame.camera.tolist() == ["left"] * 6 and frame.classes_seen.tolist() == ["3"] * 6
    assert frame.filter(regex=re.compile(r"^class\d+$")).shape == (6, 3)


# ---- data sets saved by Hugging Face's library


@pytest.mark.parametrize("save", [imitated, by_their_library])
def test_a_saved_data_set_is_read_where_it_is_with_its_class_names_and_columns(image_folder, save):
    options = saved(image_folder, save, ("c", "a", "b"))
    found = opened(image_folder, **options)
    assert (
        found.classes == ["c", "a", "b"]
        and found.train.label.tolist() == [1] * 6 + [2] * 6 + [0] * 6
    )
    assert found.train.camera.tolist() == [str(i) for i in range(6)] * 3
    assert found.train.file[7] == "00000007/1.png" and found.train.file.is_unique
    assert {Path(stored_in(path)[0]).parent for path in found.train.path} == {
        image_folder / "train"
    }
    (image_folder / "val").rename(image_folder / "test")
    with pytest.raises(DataError, match="val_root .*'test', 'train'"):
        opened(image_folder)
    assert len(opened(image_folder, val_root="test").val) == 6
    alone = opened(image_folder / "train", train_root=".", fold="1/3", group_column="camera")
    assert len(alone.train) == 12 and set(alone.val.camera) & set(alone.train.camera) == set()


@pytest.mark.slow
def test_a_run_on_a_saved_data_set_resumes_and_is_cached_exactly(image_folder, tmp_path):
    saved(image_folder, imitated)
    options = dict(dataset="files", data_dir=str(image_folder), runs_dir=str(tmp_path), epochs=3,
                   batch_size=6, log_every=1, device="cpu", hflip=0.5, workers=0)  # fmt: skip
    plain = train(Recipe(name="plain", **options))
    assert plain.predictions().camera.tolist() == ["0", "1"] * 3
    cache = dict(cache=True, cache_dir=str(tmp_path / "cache"), workers=2)
    assert_same_run(plain, train(Recipe(name="cached", **options | cache)))
    stopped = Recipe(name="stopped", **options)
    for row in training.fit(stopped, runs.Run(stopped.folder)):
        if row["step"] == 4:
            runs.Run(stopped.folder).file("STOP").touch()
    assert runs.Run(stopped.folder).status()["state"] == "stopped"
    assert_same_run(plain, train(stopped))


def test_two_classes_of_a_saved_data_set_with_one_name_stay_two(image_folder):
    """As "crane" of ImageNet-1k: labels are numbers there."""
    for side in ROWS:
        rows = [{"image": {"bytes": b"x", "path": None}, "label": i % 4} for i in range(12)]
        shutil.rmtree(image_folder / side)
        imitated(image_folder / side, rows, ("a", "crane", "b", "crane"))
    found = opened(image_folder)
    assert found.classes == ["a", "crane (1)", "b", "crane (3)"]
    assert found.counts == [3, 3, 3, 3] and found.val.label.tolist() == [0, 1, 2, 3] * 3


def test_classes_of_a_validation_split_in_another_order_are_matched_by_name(image_folder):
    saved(image_folder, imitated)
    rows = [{"image": {"bytes": b"x", "path": None}, "label": i, "camera": ""} for i in range(3)]
    shutil.rmtree(image_folder / "val")
    imitated(image_folder / "val", rows, ("b", "c", "a"))
    found = opened(image_folder)
    assert found.classes == [*CLASSES] and found.val.label.tolist() == [1, 2, 0]
    assert found.val.file.tolist() == ["00000000/image", "00000001/image", "00000002/image"]


def test_parquet_files_of_the_hub_have_class_names(image_folder):
    saved(image_folder, imitated, ("c", "a", "b"))
    for side in ROWS:
        with pa.ipc.open_stream(image_folder / side / "0.arrow") as source:
            pq.write_table(source.read_all(), image_folder / f"{side}.parquet")
    found = opened(image_folder, train_list="train.parquet", val_list="val.parquet")
    assert found.classes == ["c", "a", "b"] and set(found.train.label) == {1, 2}
    found = opened(image_folder, train_list="train.parquet", val_root="val")
    assert found.classes == ["c", "a", "b"] and set(found.val.label) == {0, 1, 2}


def changed(folder: Path, name: str) -> None:
    """A saved data set with something wrong."""
    train = folder / "train"
    row = {"image": {"bytes": b"x", "path": None}, "label": 0, "camera": ""}
    bad = {"unlabelled": row | {"label": -1}, "no image": row | {"image": {"bytes": None}}}
    if name in bad:
        stream(train / "1.arrow", [row, bad[name]])
    elif name == "cut short":
        raw = (train / "1.arrow").read_bytes()
        (train / "1.arrow").write_bytes(raw[: len(raw) // 2])
    elif name == "compressed":
        with pa.ipc.open_stream(train / "1.arrow") as source:
            table = source.read_all()
        (train / "1.arrow").unlink()  # the table is a memory map of it
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(train / "1.arrow", table.schema, options=options) as out:
            out.write_table(table)
    elif name == "lost":
        (train / "1.arrow").unlink()
    elif name == "not JSON":
        (train / "state.json").write_text("{")
    else:
        state = {"no rows": {}, "selection": {"_data_files": [1], "_indices_data_files": [1]}}
        (train / "state.json").write_text(json.dumps(state[name]))


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("unlabelled", {}, "label -1 is none of the 3 classes; leave these rows out"),
        ("no image", {}, "row 11 has no 'image', or is compressed"),
        ("compressed", {}, "row 10 has no 'image', or is compressed"),
        ("cut short", {}, "cannot be read: "),
        ("lost", {}, "cannot be read: .*No such file"),
        ("not JSON", {}, "cannot be read: "),
        ("no rows", {}, "has no rows, or a selection by an old version of datasets; save it"),
        ("selection", {}, "has no rows, or a selection by an old version of datasets; save it"),
        (None, {"label_column": "kind"}, "no column kind; set label_column to one of .*'camera'"),
        (None, {"data_dir": "cifar10"}, r"load_dataset\('cifar10'\).save_to_disk\(FOLDER\)"),
        (None, {"data_dir": "some/name"}, r"load_dataset\('some/name'\).save_to_disk\(FOLDER\)"),
        (None, {"data_dir": "hf://datasets/a/b"}, r"load_dataset\('hf://datasets/a/b'\).save"),
        (None, {"data_dir": "train", "label_column": "x"}, "data_dir .*train' is no folder; "),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_saved_data_set_is_one_sentence(image_folder, name, options, says):
    saved(image_folder, imitated)
    if name:
        changed(image_folder, name)
    with pytest.raises(DataError, match=says) as error:
        data.load_dataset(Recipe(dataset="files", **{"data_dir": str(image_folder), **options}))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_name_of_the_hub_as_dataset_says_what_to_do():
    with pytest.raises(RecipeError, match=r"dataset: 'cifar10'.*load_dataset\(x\)\.save_to_disk"):
        Recipe(dataset="cifar10")


def test_columns_of_class_folders_are_refused(image_folder):
    with pytest.raises(DataError, match="file_column and label_column are for tables"):
        opened(image_folder, label_column="kind")


# ---- folds


def many(folder: Path) -> str:
    """A table of images that need not exist: 47, 23 and 11 of three classes, 20 patients."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["x", "y", "z"], [47, 23, 11])
    frame = pd.DataFrame({"file": [f"{i}.png" for i in range(81)], "label": labels})
    frame["patient"] = rng.integers(0, 20, 81)
    frame.sample(frac=1, random_state=1).to_csv(folder / "all.csv", index=False)
    return "all.csv"


@pytest.mark.parametrize("grouped", [False, True])
def test_folds_are_a_partition_with_the_classes_of_the_whole(image_folder, grouped):
    options = dict(train_list=many(image_folder), **{"group_column": "patient"} if grouped else {})
    folds = [opened(image_folder, fold=f"{i}/5", seed=i, **options) for i in range(1, 6)]
    everything = folds[0].train.file.tolist() + folds[0].val.file.tolist()
    assert sorted(file for fold in folds for file in fold.val.file) == sorted(everything)
    counts = np.array([np.bincount(fold.val.label, minlength=3) for fold in folds])
    for fold in folds:
        assert sorted([*fold.train.file, *fold.val.file]) == sorted(everything)
        assert fold.classes == ["x", "y", "z"]
        if grouped:
            assert not set(fold.train.patient) & set(fold.val.patient)
    if not grouped:  # as scikit-learn's StratifiedKFold
        assert (np.ptp(counts, axis=0) <= 1).all() and np.ptp(counts.sum(1)) <= 1
    else:  # nearer to equal than patients dealt in turn
        table = pd.concat([folds[0].train, folds[0].val])
        dealt = pd.crosstab(table.patient.astype(int) % 5, table.label).to_numpy()
        assert counts.std(0).sum() < dealt.std(0).sum()


def test_a_fold_does_not_depend_on_the_order_of_the_rows_or_on_copies(image_folder):
    options = dict(train_list=many(image_folder), fold="2/4")
    before = set(opened(image_folder, **options).val.file)
    frame = pd.read_csv(image_folder / "all.csv").sort_values("file")
    pd.concat([frame, frame.head(30)]).to_csv(image_folder / "all.csv", index=False)
    found = opened(image_folder, **options)
    assert set(found.val.file) == before and not before & set(found.train.file)


def test_a_group_is_one_whatever_white_space_and_accents_its_value_has(image_folder):
    frame = pd.read_csv(image_folder / many(image_folder))
    options = dict(train_list="all.csv", fold="2/3", group_column="patient")

    def fold(spellings):
        names = [spellings[i % len(spellings)].format(p) for i, p in enumerate(frame.patient)]
        frame.assign(patient=names).to_csv(image_folder / "all.csv", index=False)
        return opened(image_folder, **options).val.file.tolist()

    assert fold(["é{}"]) == fold(["é{}", " é{}", "é{}\t", "e\N{COMBINING ACUTE ACCENT}{}"])
    for spellings in (["{}", "{}.0"], ["{}", "00{}"]):
        with pytest.raises(DataError, match="has '[0.]+' and '0[.0]*', one number in two forms"):
            fold(spellings)


def test_a_file_with_two_spellings_of_its_path_is_in_one_fold(image_folder):
    names = [f"{c}/{i}.png" for c in CLASSES for i in range(6)]
    rows = [f"{start}{name},{name[0]}" for name in names for start in ("", "./")]
    write_list(image_folder / "t.csv", "file,label", *rows)
    for i in (1, 2, 3):
        found = opened(image_folder / "train", train_list="../t.csv", train_root=".", fold=f"{i}/3")
        train, val = ({Path(p).resolve() for p in f.path} for f in (found.train, found.val))
        assert len(val) == 6 and not train & val


@pytest.mark.parametrize(
    "options, says",
    [
        ({"fold": "1/5", "group_column": "site"}, "'site' is not in the tables.*\\['patient'\\]"),
        ({"fold": "1/30", "group_column": "patient"}, "has 19 values and 0 empty fields; 1/30"),
        ({"fold": "2/3", "train_list": "few.csv"}, "all images of classes \\[1\\]; they"),
        ({"fold": "1/2", "train_list": "twice.csv", "group_column": "patient"},
         "has two values for '1.png'"),
    ],
)  # fmt: skip
def test_folds_that_cannot_be_made_are_refused(image_folder, options, says):
    rows = ["file,label,patient", "0.png,x,0", "1.png,x,1", "2.png,x,2", "3.png,y,3"]
    write_list(image_folder / "few.csv", *rows)
    write_list(image_folder / "twice.csv", *rows, "1.png,x,0")
    with pytest.raises(DataError, match=says):
        for i in range(1, 4):  # one of them has the only image of y
            fold = f"{i}/3" if "few.csv" in options.values() else options["fold"]
            opened(image_folder, **{"train_list": many(image_folder), **options, "fold": fold})


@pytest.mark.parametrize("most", [40, 60])
def test_one_group_may_be_larger_than_a_fold(image_folder, most):
    """Its fold is large; no group is split, no image is lost, and no fold is empty."""
    frame = pd.read_csv(image_folder / many(image_folder))
    frame["patient"] = np.where(np.arange(81) < most, 0, np.arange(81))
    frame.to_csv(image_folder / "all.csv", index=False)
    options = dict(train_list="all.csv", group_column="patient")
    sizes = []
    for i in range(1, 4):
        found = opened(image_folder, fold=f"{i}/3", **options)
        assert not {*found.train.patient} & {*found.val.patient}
        sizes.append(len(found.val))
    assert sum(sizes) == 81 and min(sizes) > 0 and max(sizes) >= most


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "2", "a/b", "-1/5", "2/5 "])
def test_what_is_no_fold_is_refused(fold):
    with pytest.raises(RecipeError, match="fold: "):
        Recipe(dataset="files", data_dir="x", fold=fold)
    with pytest.raises(RecipeError, match="fold: validation images are given already"):
        Recipe(dataset="files", data_dir="x", fold="2/5", val_fraction=0.2)


def test_a_column_of_text_here_and_numbers_there_is_refused(tmp_path):
    frame = pd.DataFrame({"file": ["a.png", "b.png"], "label": ["x", "y"], "camera": [1, 2]})
    frame.to_csv(tmp_path / "one.csv", index=False)
    frame.to_parquet(tmp_path / "two.parquet")
    read = [tables.read(tmp_path / name, tmp_path) for name in ("one.csv", "two.parquet")]
    with pytest.raises(DataError, match="column 'camera' is text in one table"):
        tables.joined(read)
