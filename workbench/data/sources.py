"""The images and labels that a recipe names: lists, class folders or an embedded set.

No image is decoded; files without a known suffix are opened to find out whether they are images.
"""

import decimal
import hashlib
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from workbench import ROOT, counted
from workbench.data import archives, shards, tables, toy
from workbench.data.dataset import DataError, Dataset
from workbench.data.lists import is_utf8, on_disk
from workbench.parts import PartError
from workbench.recipe import Recipe
from workbench.recipe_checks import is_part


def load_dataset(recipe: Recipe, *, strict: bool = True, folder: Path | None = None) -> Dataset:
    """The images of a recipe, after checks of entries, labels and roots.

    Raises DataError; PartError for a custom dataset, which may be in a run's `folder`. `strict`
    off allows entries outside of their root and labels out of range, for `check_data` to list.
    """
    try:
        return _load(recipe, strict, folder or recipe.folder)
    except DataError as error:
        if not is_part(recipe.dataset):
            raise
        raise PartError(f"dataset {recipe.dataset!r}: {error}") from None


def _load(recipe: Recipe, strict: bool, folder: Path) -> Dataset:
    if recipe.dataset != "files" and not is_part(recipe.dataset):
        recipe = recipe.model_copy(update=toy.as_files(recipe.dataset))
    sources = _sources(recipe, folder)
    frames, folders, skipped = _read(recipe, sources)
    names = _label(recipe, sources, frames, folders)
    if is_part(recipe.dataset):  # code may name any file
        frames = {side: frame.assign(outside=False) for side, frame in frames.items()}
    if recipe.fold:
        frames["train"], frames["val"] = k_fold(frames["train"], recipe.fold, recipe.group_column)
    if recipe.val_fraction:
        frames["train"], frames["val"] = stratified_split(frames["train"], recipe.val_fraction)
    count = _count_classes(recipe, frames, names)
    for side, frame in frames.items() if strict else ():
        _check_entries(side, frame, count, recipe.allow_outside_root)
    if recipe.train_fraction < 1:
        frames["train"] = subset(frames["train"], recipe.train_fraction)
    names = names or [str(i) for i in range(count)]
    return Dataset(frames["train"], frames["val"], names, skipped)


Sources = dict[str, tuple[list[Path], list[Path]]]  # lists and roots by side
Folders = dict[str, list[str] | None]  # by side, the class names of its labels; None for numbers


def _read(
    recipe: Recipe, sources: Sources
) -> tuple[dict[str, pd.DataFrame], Folders, list[tuple[str, str, str]]]:
    """The entries by side, class folders if there are some, and what is skipped."""
    frames: dict[str, pd.DataFrame] = {}
    folders, skipped = {}, []
    columns = recipe.file_column, recipe.label_column
    for side, (lists, roots) in sources.items():
        names = folders["train"] or _class_names(recipe, None) if folders else None
        if any(map(shards.is_index, lists)):
            if len(lists) > 1:
                raise DataError(f"{side}_list: an index stands alone; index all shards in one")
            frames[side], folders[side] = shards.open_index(lists[0], names)
        elif lists:
            pairs = enumerate(zip(lists, roots, strict=True))
            parts = [tables.read(path, root, i, *columns) for i, (path, root) in pairs]
            frames[side], folders[side] = tables.joined(parts), None
        else:
            frames[side], folders[side], left = read_folders(roots, names)
            skipped += [(side, *entry) for entry in left]
    return frames, folders, skipped


def _label(
    recipe: Recipe, sources: Sources, frames: dict[str, pd.DataFrame], folders: Folders
) -> list[str] | None:
    """The class names, if there are some; changes the labels of `frames` to their order."""
    names, by_name = _class_names(recipe, folders["train"]) or folders.get("val"), None
    if any(tables.is_table(path) for lists, _ in sources.values() for path in lists):
        listed = {side: frames[side] for side, (lists, _) in sources.items() if lists}
        if any("index" in frame.attrs for frame in listed.values()):
            raise DataError("train_list and val_list: an index cannot be beside a table")
        by_name = tables.number_labels(listed, names)
        names = by_name or names
    elif recipe.file_column or recipe.label_column:
        raise DataError("file_column and label_column are for tables, and there is none")
    twice = [name for name, n in Counter(names or ()).items() if n > 1]
    if twice and (by_name or any(folders.values())):
        raise DataError(f"class_names has {twice[0]!r} twice, and the labels are names; change one")
    for side, classes in folders.items():
        if classes is None and names and not by_name:
            if not recipe.class_names:
                text = f"{side} has numbers as labels and the other side has names, {names[:8]}"
                raise DataError(f"{text}; set class_names, a file of the names in their order")
            _check_names(side, frames[side], names)
        elif classes and names != classes:  # labels follow the file of class names
            index = {name: i for i, name in enumerate(names)}
            frames[side]["label"] = np.array([index[f] for f in classes])[frames[side].label]
    return names


def _sources(recipe: Recipe, folder: Path) -> Sources:
    """Lists and roots by side; validation is missing where it is split off training."""
    if is_part(recipe.dataset):
        root = _in_data_dir(recipe, "")
        return {side: ([p], [root]) for side, p in tables.from_part(recipe, root, folder).items()}
    paths = (recipe.train_list or recipe.train_root) + (recipe.val_list or recipe.val_root)
    if not recipe.data_dir and not all(Path(path).is_absolute() for path in paths):
        raise DataError("data_dir is missing; dataset: files needs the folder of the images")
    base = _in_data_dir(recipe, "")
    if not base.is_dir():
        text = "set data_dir to that of the images"
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?|\w+://.*", recipe.data_dir):
            text += f"; of the Hub: load_dataset({recipe.data_dir!r}).save_to_disk(FOLDER) makes it"
        raise DataError(f"data_dir {str(base)!r} is no folder; {text}")
    sources = {}
    for side in ("train",) if recipe.val_fraction or recipe.fold else ("train", "val"):
        lists, roots = (
            [_in_data_dir(recipe, path) for path in getattr(recipe, f"{side}_{kind}")]
            for kind in ("list", "root")
        )
        lists = roots if not lists and any(map(tables.is_table, roots)) else lists
        stored = lists and all(re.search("(?i)[.](parquet|arrow|idx|tar)$", str(p)) for p in lists)
        if missing := [str(root) for root in roots if not root.exists() and not stored]:
            have = sorted(path.name for path in base.iterdir() if path.is_dir())[:8]
            raise DataError(
                f"{side}_root {missing[0]!r} is no folder or archive; data_dir holds {have}; "
                "without validation images set val_fraction"
            )
        sources[side] = (lists, roots * len(lists) if len(roots) == 1 and lists else roots)
    return sources


def _in_data_dir(recipe: Recipe, path: str) -> Path:
    return Path(on_disk(str(ROOT / Path(recipe.data_dir).expanduser() / path)))


def _class_names(recipe: Recipe, folders: list[str] | None) -> list[str] | None:
    """The names in the file of class names, else those of the class folders."""
    if not recipe.class_names:
        return folders
    path = _in_data_dir(recipe, recipe.class_names)
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class_names {str(path)!r} cannot be read: {error}") from None
    names = [unicodedata.normalize("NFC", name.strip()) for name in text.splitlines()]
    if "" in names:
        raise DataError(f"class_names {str(path)!r}: line {names.index('') + 1} is blank")
    if folders is not None and sorted(names) != sorted(folders):
        raise DataError(f"class_names {str(path)!r} and the class folders differ; leave it out")
    return names


def _check_names(side: str, frame: pd.DataFrame, names: list[str]) -> None:
    """Raises DataError where most entries below a folder with a class's name have another label."""
    some = frame.iloc[:: len(frame) // 100_000 + 1]
    classes = set(names)
    innermost = lambda file: next((p for p in file.split("/")[-2::-1] if p in classes), None)
    shares = some.label.groupby(some.file.map(innermost)).value_counts(normalize=True)
    for (folder, label), share in shares.items():
        if share > 0.5 and 0 <= label < len(names) and names[label] != folder:
            raise DataError(
                f"{side}: entries in folder {folder!r} have label {label}, and class {label} is "
                f"{names[label]!r}; put the class names in the order of the labels"
            )


def _count_classes(recipe: Recipe, frames: dict[str, pd.DataFrame], names: list[str] | None) -> int:
    """The number of classes: given, or counted in names or labels. Raises DataError."""
    top = max(frames.values(), key=lambda frame: frame.label.max())
    count = recipe.num_classes or (len(names) if names else int(top.label.max()) + 1)
    if count > sum(map(len, frames.values())) and not (recipe.num_classes or names):
        raise DataError(
            f"label {count - 1} of {top.file[top.label.idxmax()]!r} makes more classes than there "
            "are images; fix the list or set num_classes"
        )
    if count < 2:
        raise DataError(
            "there is one class, and a classifier needs two or more; train_root needs a folder per "
            "class, a list needs labels from 0 on"
        )
    if names and len(names) != count:
        raise DataError(f"num_classes is {count} but there are {len(names)} class names")
    return count


def _check_entries(side: str, frame: pd.DataFrame, classes: int, allow_outside_root: bool) -> None:
    wrong = frame[~frame.label.between(0, classes - 1)]
    if len(wrong):
        raise DataError(
            f"{side}: labels outside 0 to {classes - 1}: {len(wrong)}, first "
            f"{wrong.iloc[0].label} for {wrong.iloc[0].file!r}; labels count from 0"
        )
    out = frame[frame.outside]
    if len(out) and not allow_outside_root:
        raise DataError(
            f"{side}: entries outside their root: {len(out)}, first {out.iloc[0].file!r}; fix the "
            "list or set allow_outside_root: true"
        )


# ---- class folders


def read_folders(
    roots: Sequence[str | Path], classes: list[str] | None = None
) -> tuple[pd.DataFrame, list[str], list[tuple[str, str]]]:
    """Images in class folders (root/<class>/**), the sorted class names, and what is skipped.

    A root may be an archive of class folders. With `classes` (those of training) labels follow
    them, and other folder names are an error.
    """
    rows: list[tuple[str, str, str, int]] = []
    skipped: list[tuple[str, str]] = []
    names, seen = set(), set()
    for number, root in enumerate(map(Path, roots)):
        if root.is_file():
            inside, found, left = archives.class_images(root, classes or ())
            rows += [(*image, number) for image in found]
            names |= inside
            skipped += left
            continue
        top = root.resolve()
        for folder in sorted(root.iterdir()):
            real = folder.resolve()
            nested = real.is_relative_to(top) or top.is_relative_to(real)
            if archives.is_hidden(folder.name):
                skipped.append((folder.name, "hidden"))
            elif not folder.is_dir():
                skipped.append((folder.name, "in no class folder"))
            elif real in seen or folder.is_symlink() and nested:
                skipped.append((folder.name, "a folder that is read already"))
            else:
                seen.add(real)
                names.add(name := unicodedata.normalize("NFC", folder.name))
                files, left = image_files(str(folder), str(root))
                skipped += left
                rows += [(_entry(file, root), name, file, number) for file in files]
    if len(splits := sorted(n for n in names if n.lower() in archives.SPLITS)) > 1:
        raise DataError(f"folders {splits} are splits, not classes; name them train_root, val_root")
    if not rows:
        raise DataError(
            f"no images in class folders below {[str(root) for root in roots]}; wanted "
            "<root>/<class name>/<image>, or a list file in train_list and val_list"
        )
    if extra := sorted(names - set(names if classes is None else classes)):
        raise DataError(f"folders {extra[:8]} of validation are not in training or class_names")
    classes = sorted(names) if classes is None else classes
    skipped = [(name.encode("utf-8", "backslashreplace").decode(), why) for name, why in skipped]
    frame = pd.DataFrame(rows, columns=["file", "label", "path", "list"])
    label = {name: i for i, name in enumerate(classes)}
    return frame.assign(label=frame.label.map(label), outside=False), classes, skipped


def image_files(top: str, root: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Paths of the images below a folder; what is skipped, named from `root`, and why.

    A file is an image by its suffix (images.SUFFIXES), or by its content where Pillow knows it.
    Hidden files are skipped, and links to folders, so that each folder is read once.
    """
    found: list[str] = []
    skipped: list[tuple[str, str]] = []
    skip = lambda path, why: skipped.append((os.path.relpath(path, root), why))
    on_error = lambda error: skip(error.filename, f"unreadable: {error.strerror}")
    for folder, below, files in os.walk(top, onerror=on_error):
        entries, folders = sorted(below + files), set(below)
        below.clear()  # os.walk goes on into what is put back
        for name in entries:
            path = os.path.join(folder, name)
            if archives.is_hidden(name):
                skip(path, "hidden")
            elif name in folders and os.path.islink(path):
                skip(path, "a link to a folder")
            elif name in folders:
                below.append(name)
            elif archives.is_image(name, path):
                found.append(path)
            else:
                skip(path, "no image")
    return found, skipped


def describe_skipped(skipped: Sequence[tuple]) -> str:
    """A sentence that counts and names skipped files: tuples that end in file and reason."""
    if not skipped:
        return ""
    named = ", ".join(f"{file} ({why})" for *_, file, why in skipped[:5])
    more = f" and {len(skipped) - 5:,} more" if len(skipped) > 5 else ""
    what = "file or folder" if len(skipped) == 1 else "files or folders"
    return f"{len(skipped):,} {what} skipped: {named}{more}"


def _entry(path: str, root: Path) -> str:
    """The name of a file in a frame. Raises DataError."""
    if not is_utf8(path):
        raise DataError(f"{os.fsencode(path)!r} is no UTF-8 file name; rename it")
    return unicodedata.normalize("NFC", os.path.relpath(path, root))


# ---- shares

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def stratified_split(frame: pd.DataFrame, share: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frame without, and only with, a fixed share of every class (at least one image).

    The images are chosen by hashes of their names, so a folder that grows keeps most of its split.
    """
    rows = frame.drop_duplicates(["label", "path"])  # all entries of a file are on one side
    position = _hashes(rows.file).groupby(rows.label).rank(method="first")
    size = rows.groupby("label").label.transform("size")
    if single := sorted(set(rows.label[size < 2])):
        raise DataError(f"classes {single[:8]} have one image; val_fraction cannot split them")
    chosen = position <= np.clip((size * share).round(), 1, size - 1)
    held_out = frame.path.isin(rows.path[chosen])
    return frame[~held_out].reset_index(drop=True), frame[held_out].reset_index(drop=True)


def k_fold(frame: pd.DataFrame, fold: str, group_column: str = "") -> list[pd.DataFrame]:
    """The frame without, and only with, fold "i/k" of a partition stratified by label.

    It depends on names and labels alone; a file, or a value of `group_column`, is in one fold.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second

    number, count = map(int, fold.split("/"))
    rows = frame.assign(_hash=_hashes(frame.file)).sort_values(["label", "_hash"])
    files = pd.factorize(rows.path.map(os.path.normpath))[0]
    chosen = files % count == number - 1
    if group_column:
        groups = _groups(frame.loc[rows.index], group_column)
        pairs = pd.DataFrame({"file": files, "group": groups}).drop_duplicates()
        if (twice := pairs.file.duplicated()).any():
            text = f"has two values for {rows.file.iloc[twice.idxmax()]!r}; give it one"
            raise DataError(f"group_column {group_column!r} {text}")
        if groups.min() < 0 or groups.max() < count - 1:
            text = f"has {counted(groups.max() + 1, 'value')} and "
            text += counted((groups < 0).sum(), "empty field")
            raise DataError(f"group_column {group_column!r} {text}; {fold} needs {count} values")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a class with fewer images than folds
            folds = [*StratifiedGroupKFold(count).split(groups, rows.label, groups)]
        chosen = np.isin(np.arange(len(rows)), folds[number - 1][1])
    is_val = pd.Series(chosen, rows.index).reindex(frame.index)
    sides = [frame[side].reset_index(drop=True) for side in (~is_val, is_val)]
    if missing := sorted({*frame.label} - {*sides[0].label}):
        text = f"contains all images of classes {missing[:8]}"
        raise DataError(f"fold {fold} {text}; they need more images or groups")
    return sides


def _groups(rows: pd.DataFrame, column: str) -> np.ndarray:
    """The number of each row's group, -1 for an empty field; texts are stripped, as labels are.

    Raises DataError for numbers in two forms: 7 and 007 may be one patient or two.
    """
    if column not in (own := tables.own_columns(rows)):
        raise DataError(f"group_column {column!r} is not in the tables, which have {own}")
    strip = lambda v: unicodedata.normalize("NFC", v.strip()) if isinstance(v, str) else v
    values = rows[column].astype(object).map(strip).replace("", None)
    seen: dict[decimal.Decimal, str] = {}
    for text in sorted(v for v in {*values} if isinstance(v, str) and _NUMBER.fullmatch(v)):
        if (other := seen.setdefault(decimal.Decimal(text), text)) != text:
            both = f"has {other!r} and {text!r}, one number in two forms"
            raise DataError(f"group_column {column!r} {both}; write it as one, or as two names")
    return pd.factorize(values)[0]


def _hashes(files: pd.Series) -> pd.Series:
    return files.map(lambda f: hashlib.sha256(f.encode("utf-8", "surrogateescape")).digest())


def subset(frame: pd.DataFrame, fraction: float) -> pd.DataFrame:
    """A fixed share of the rows in their order; a smaller share is a subset of a larger one."""
    count = max(1, round(len(frame) * fraction))
    chosen = np.random.default_rng(0).permutation(len(frame))[:count]
    return frame.iloc[np.sort(chosen)].reset_index(drop=True)
