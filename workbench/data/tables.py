"""Tables of images: CSV, TSV, Parquet, and folders of Hugging Face's `Dataset.save_to_disk`.

The column of files has paths below the root, or, but for CSV, the bytes of the images or a struct
of bytes and path. Other columns stay in the frame. A ClassLabel gives the names of the classes.
"""

import csv
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet as pq

from workbench import CACHE, parts
from workbench.data.archives import cache_file
from workbench.data.dataset import DataError
from workbench.data.lists import located, read_list
from workbench.parts import PartError
from workbench.recipe import Recipe
from workbench.recipe_checks import TABLE_SUFFIXES

FILE_COLUMNS = "file filename file_name path image image_path img".split()
LABEL_COLUMNS = "label class target class_name".split()
# Columns of frames, predictions and quarantine.csv; a table's own column gets an underscore.
_OURS = re.compile(
    "file|label|path|list|outside|bytes|width|height|digest|problem|detail|side|reason|step|"
    r"weights|row|loss|run|recipe|p_label|class\d+|p\d+"
)


def is_table(path: str | Path) -> bool:
    """Whether a list is a table: a file, by its suffix, or a folder of save_to_disk."""
    return str(path).lower().endswith(TABLE_SUFFIXES) or Path(path, "dataset_info.json").exists()


def own_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of a frame that come from a table."""
    return [name for name in frame.columns if not _OURS.fullmatch(name)]


def read(
    path: Path, root: Path, number: int = 0, file_column: str = "", label_column: str = ""
) -> pd.DataFrame:
    """The rows of one table, or list; without names of columns only the obvious ones are taken.

    Returns the columns of a Dataset, labels as text, and the table's other columns (text in CSV; no
    nested ones), with an underscore where a frame has the name: width_; attrs["classes"] are the
    names of a ClassLabel, or None. Raises DataError.
    """
    if not is_table(path):
        return read_list(path, root, number)
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        shards = _shards(path) if path.is_dir() else []
        streams = [pa.ipc.open_stream(pa.memory_map(str(shard))) for shard in shards]
        table = pa.concat_tables(s.read_all() for s in streams) if shards else None
        table = table if shards or is_parquet else _read_csv(path)
        schema = pq.read_schema(path) if is_parquet else table.schema
        names = schema.names
        file_column = _column(path, names, "file_column", file_column, FILE_COLUMNS)
        label_column = _column(path, names, "label_column", label_column, LABEL_COLUMNS)
        stored = _has_bytes((field := schema.field(file_column)).type)
        wanted = {one.name for one in schema if _is_plain(one.type)} | {label_column}
        columns = [n for n in names if n in wanted or n == file_column and not stored]
        others = [n for n in names if n not in columns]
        table = pq.read_table(path, columns=columns) if is_parquet else table.drop_columns(others)
        if not len(table):
            raise DataError(f"table {str(path)!r} has no rows")
        labels = _texts(path, table, label_column)
        if stored:
            places = _places(path, shards or [_unpacked(path, field)], file_column)
            frame = pd.DataFrame(places, columns=["file", "path"])
            frame = frame.assign(label=labels.to_pandas(), list=number, outside=False)
        else:
            frame = located(_texts(path, table, file_column), labels, root, number)
    except (OSError, pa.ArrowException, csv.Error, UnicodeError, json.JSONDecodeError) as error:
        text = str(error).partition("\n")[0] + "; save it as UTF-8" * ("UTF" in str(error).upper())
        raise DataError(f"table {str(path)!r} cannot be read: {text}") from None
    frame["label"] = [normalize("NFC", label.strip()) for label in frame.label]
    if names := _class_names(schema, label_column):
        if unknown := sorted({*frame.label} - {*names}):
            text = f"label {unknown[0]} is none of the {len(names)} classes; leave these rows out"
            raise DataError(f"table {str(path)!r}: {text}")
        frame["label"] = frame.label.map(names)
    others = table.to_pandas().drop(columns=[file_column, label_column], errors="ignore")
    others = others.rename(columns=lambda n: f"{n}_" if _OURS.fullmatch(n) else n)
    if twice := sorted(others.columns[others.columns.duplicated()]):
        raise DataError(f"table {str(path)!r} has two columns {twice[0]!r}; rename one")
    frame = pd.concat([frame, others], axis=1)
    frame.attrs["classes"] = [*names.values()]
    return frame


def joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """The rows of all. Raises DataError for a column that is text in one and numbers in another."""
    frame = pd.concat(tables, ignore_index=True)
    for name in own_columns(frame):
        if pd.api.types.infer_dtype(frame[name], skipna=True).startswith("mixed"):
            text = "is text in one table (of a CSV file always) and not in another"
            raise DataError(f"column {name!r} {text}; store the tables in the same form")
    return frame


def _read_csv(path: Path) -> pa.Table:
    """Every column as text, so that 007 stays what it is."""
    tab = path.suffix.lower() == ".tsv"
    parse = pa.csv.ParseOptions(delimiter="\t" if tab else ",", newlines_in_values=True)
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=parse.delimiter), [])
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    return pa.csv.read_csv(path, parse_options=parse, convert_options=convert)


def _column(path: Path, names: list[str], option: str, given: str, usual: list[str]) -> str:
    """The given column, or the only one with a usual name. Raises DataError."""
    found = [name for name in names if (name == given if given else name.lower() in usual)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} columns" if found else "no column"
    what += f" {given or '/'.join(usual)}; set {option} to one of {names}"
    what += {".csv": ", its first row between commas", ".tsv": ", between tabs"}.get(
        path.suffix, ""
    )
    raise DataError(f"table {str(path)!r} has {what}")


def _texts(path: Path, table: pa.Table, column: str) -> pa.Array:
    """A column as text. Raises DataError for an empty field, or where it is no text or number."""
    values = table[column].combine_chunks()
    usable = _is_plain(values.type) and not pa.types.is_floating(values.type)
    texts = values.cast(pa.large_string()) if usable else pa.nulls(len(values), pa.large_string())
    blank = pc.or_(pc.equal(pc.utf8_trim_whitespace(texts), ""), pc.match_substring(texts, "\0"))
    blank = pc.fill_null(blank, True)
    if (row := pc.index(blank, True).as_py()) >= 0:
        text = f"row {row + 1} has no text or whole number in {column!r} ({values.type})"
        raise DataError(f"table {str(path)!r}: {text}")
    return texts


def _is_plain(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return not (pa.types.is_nested(kind) or pa.types.is_null(kind) or _has_bytes(kind))


def _class_names(schema: pa.Schema, column: str) -> dict[str, str]:
    """The names of a ClassLabel by their numbers; the number follows a name of several classes."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", "{}"))
    names = about.get("info", {}).get("features", {}).get(column, {}).get("names") or []
    names = [normalize("NFC", name) for name in names]
    counts = Counter(names)  # ImageNet-1k has "crane" twice, a bird and a machine
    return {str(i): f"{n} ({i})" if counts[n] > 1 else n for i, n in enumerate(names)}


# ---- images stored in a table


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _unpacked(path: Path, field: pa.Field) -> Path:
    """The images of a Parquet file as an Arrow stream in CACHE/tables, written once.

    Row groups are compressed, and training reads single images in any order.
    """
    store = cache_file("tables", path.resolve(), field.name).with_suffix(".arrow")
    if not store.exists():
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store.parent) as temporary:
            made = Path(temporary, store.name)
            with pa.ipc.new_stream(str(made), pa.schema([field])) as stream:
                for batch in pq.ParquetFile(path).iter_batches(64, columns=[field.name]):
                    stream.write(batch)
            os.replace(made, store)
    return store


def _shards(path: Path) -> list[Path]:
    """The Arrow streams of a saved data set."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_data_files") or not state.get("_data_files"):
        text = "has no rows, or a selection by an old version of datasets; save it again"
        raise DataError(f"table {str(path)!r} {text}")
    return [path / file["filename"] for file in state["_data_files"]]


def _places(path: Path, shards: list[Path], column: str) -> Iterator[tuple[str, str]]:
    """Name and place (see image_files) of the images in Arrow streams."""
    row = 0
    for shard in shards:
        whole = pa.memory_map(str(shard)).read_buffer()
        for batch in filter(len, pa.ipc.open_stream(whole)):
            values, names = batch.column(column), [""] * len(batch)
            if pa.types.is_struct(values.type):
                if values.type.get_field_index("path") >= 0:
                    names = values.field("path").to_pylist()
                values = values.field("bytes")
            _, ends, content = values.buffers()
            size = np.int64 if pa.types.is_large_binary(values.type) else np.int32
            ends = np.frombuffer(ends, size)[: len(names) + 1].astype(np.int64)
            ends += content.address - whole.address if content else 0
            if (ends[1:] == ends[:-1]).any() or not 0 <= ends[0] < ends[-1] <= whole.size:
                text = f"row {row + np.argmax(ends[1:] == ends[:-1]) + 1} has no {column!r}"
                raise DataError(f"table {str(path)!r}: {text}, or is compressed")
            for name, first, end in zip(names, ends[:-1], ends[1:], strict=True):
                name = f"{row:08d}/{os.path.basename(name or 'image')}"
                yield name, f"{shard}::{first}+{end - first}:{name}"
                row += 1


def from_part(recipe: Recipe, root: Path, folder: Path) -> dict[str, Path]:
    """The frames of a custom dataset by side, as Parquet files in CACHE. Raises PartError."""
    function = parts.load("dataset", recipe.dataset, folder, **recipe.dataset_args)
    given = parts.run("dataset", recipe.dataset, function, root)
    split, found = recipe.fold or recipe.val_fraction, {}
    try:
        sides = [("train", given)] if split else zip(("train", "val"), given, strict=True)
        for side, frame in sides:
            paths = [k for k in frame if any(isinstance(v, Path) for v in frame[k].head(1))]
            content = frame.assign(**{k: frame[k].map(str) for k in paths}).to_parquet(index=False)
            # Named after its content, so that images stored in it are copied once.
            digest = hashlib.sha256(content).hexdigest()[:16]
            found[side] = CACHE / "tables" / f"{side}-{digest}.parquet"
            if not found[side].exists():
                found[side].parent.mkdir(parents=True, exist_ok=True)
                temporary = found[side].with_suffix(f".{os.getpid()}")
                temporary.write_bytes(content)
                os.replace(temporary, found[side])
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        wanted = "one DataFrame, which fold or val_fraction splits" if split else "(train, val)"
        text = f"gives {type(given).__name__}; it must give {wanted}: {error}"
        raise PartError(f"dataset {recipe.dataset!r} {text}") from None
    return found


# ---- labels


def number_labels(frames: Mapping[str, pd.DataFrame], names: list[str] | None) -> list[str] | None:
    """Puts class numbers in place of the labels of all sides; returns the class names of texts.

    Whole numbers that are no names stay as they are, and None is returned; 007 is text. Texts
    follow `names`, else those of training, sorted as class folders are. Raises DataError.
    """
    every = pd.concat([frame[["path", "label"]] for frame in frames.values()]).astype(str)
    several = every.drop_duplicates().groupby("path", sort=False).label.agg(list)
    for path, labels in several[several.str.len() > 1].items():
        raise DataError(f"{path!r} has the labels {labels[:4]}; an image has one, fix the tables")
    given, names = names, names or frames["train"].attrs.get("classes")
    texts, known = sorted(set(every.label)), names or sorted({*frames["train"].label.astype(str)})
    numbers = [text for text in texts if re.fullmatch(r"-?\d{1,9}", text)]
    if numbers and not names and (others := sorted({*texts} - {*numbers})):
        both = f"labels are numbers ({numbers[0]!r}) and texts ({others[0]!r})"
        raise DataError(f"{both}; write all of them as names, or set class_names")
    padded = any(text != str(int(text)) for text in numbers)
    by_name = padded or len(numbers) < len(texts) or {*texts} <= {*(names or ())}
    if extra := sorted({*texts} - {*(known if by_name or not names else texts)}):
        where = "class_names" if given else "the training tables"
        raise DataError(f"labels {extra[:8]} are not in {where}, which have {known[:8]}")
    index = {text: i for i, text in enumerate(known)} if by_name else {n: int(n) for n in numbers}
    for frame in frames.values():
        frame["label"] = frame.label.astype(str).map(index).astype(np.int64)
        frame.attrs = {}
    return known if by_name else None
