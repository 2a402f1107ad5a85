"""CSV, TSV and Parquet with a header give the batches of the same images in class folders."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, write_list
from test_archives import archived

from workbench import data, runs, training
from workbench.augmentation import TrainTransform
from workbench.data import DataError
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


FORMS = {
    "imagenet": lambda folder: lists(folder, "imagenet"),
    "custom_cls": lambda folder: lists(folder, "custom_cls"),
    "csv": written,
    "tsv": lambda folder: written(folder, "tsv"),
    "parquet": lambda folder: written(folder, "parquet"),
    "parquet with bytes": lambda folder: without_roots(folder, "binary"),
    "parquet of Hugging Face": lambda folder: with_bytes(folder, "struct"),
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
        ("file,label\na/0.png,0\nb/0.png,1.5\n", {}, "numbers \\('0'\\) and texts \\('1.5'\\)"),
        ("file,label\na/0.png,0\nb/0.png,-1\nc/0.png,1\n",
         {"val_fraction": 0.0, "val_list": "v.csv"}, "labels outside 0 to 1"),
        ("file,label\n" + TWO, {"val_fraction": 0.0, "val_list": "v.csv"},
         "labels \\['z'\\] are not in the training tables, which have \\['x', 'y'\\]"),
        ("file,label,file_,file_\na/0.png,x,1,2\n", {}, "two columns 'file_'"),
        ("file,label\n../train/a/0.png,x\n/b/1.png,y\n", {"val_fraction": 0.0, "val_list": "w.csv"},
         "entries outside their root"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_one_sentence(image_folder, text, options, says):
    write_list(image_folder / "names.txt", "x", "z")
    write_list(image_folder / "v.csv", "file,label", "a/0.png," + ("z" if "x" in text else "0"))
    write_list(image_folder / "w.csv", "file,label", "a/1.png,x")
    with pytest.raises(DataError, match=says) as error:
        table(image_folder, text, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


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


@pytest.mark.parametrize(
    "options, says",
    [
        ({"fold": "1/5", "group_column": "site"}, "'site' is not in the tables.*\\['patient'\\]"),
        ({"fold": "1/30", "group_column": "patient"}, "has 19 values and 0 empty fields; 1/30"),
        ({"fold": "2/3", "train_list": "few.csv"}, "every image of classes \\[1\\]; they"),
    ],
)  # fmt: skip
def test_folds_that_cannot_be_made_are_refused(image_folder, options, says):
    rows = ["file,label,patient", "0.png,x,0", "1.png,x,1", "2.png,x,2", "3.png,y,3"]
    write_list(image_folder / "few.csv", *rows)
    with pytest.raises(DataError, match=says):
        for i in range(1, 4):  # one of them has the only image of y
            fold = f"{i}/3" if "few.csv" in options.values() else options["fold"]
            opened(image_folder, **{"train_list": many(image_folder), **options, "fold": fold})


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "2", "a/b", "-1/5", "2/5 "])
def test_what_is_no_fold_is_refused(fold):
    with pytest.raises(RecipeError, match="fold: "):
        Recipe(dataset="files", data_dir="x", fold=fold)
    with pytest.raises(RecipeError, match="fold: validation images are given already"):
        Recipe(dataset="files", data_dir="x", fold="2/5", val_fraction=0.2)
