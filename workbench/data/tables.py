"""Tables of images: CSV, TSV and Parquet with a header, a row per image.

The column of files has paths below the root; in Parquet it may have the bytes of the images
instead, or Hugging Face's struct of bytes and path. Other columns stay in the frame.
"""

import csv
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from workbench import CACHE
from workbench.data.archives import members
from workbench.data.dataset import DataError, text_digest
from workbench.data.lists import located, read_list
from workbench.recipe_checks import TABLE_SUFFIXES

FILE_COLUMNS = "file filename file_name path image image_path".split()
LABEL_COLUMNS = "label class target class_name".split()
# Columns of frames, predictions and quarantine.csv; a table's own column gets an underscore.
_OURS = re.compile(
    "file|label|path|list|outside|bytes|width|height|digest|problem|detail|side|reason|step|"
    r"weights|row|loss|p_label|class\d+|p\d+"
)


def is_table(path: str | Path) -> bool:
    """Whether a list is a table, by its suffix."""
    return str(path).lower().endswith(TABLE_SUFFIXES)


def own_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of a frame that come from a table."""
    return [name for name in frame.columns if not _OURS.fullmatch(name)]


def read(
    path: Path, root: Path, number: int = 0, file_column: str = "", label_column: str = ""
) -> pd.DataFrame:
    """The rows of one table, or list; without names of columns only the obvious ones are taken.

    Returns the columns of a Dataset, labels as text, and the table's other columns (text in CSV; no
    nested ones), with an underscore where a frame has the name: width_. Raises DataError.
    """
    if not is_table(path):
        return read_list(path, root, number)
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        schema = pq.read_schema(path) if is_parquet else None
        table = None if is_parquet else _read_csv(path)
        names = (schema or table.schema).names
        file_column = _column(path, names, "file_column", file_column, FILE_COLUMNS)
        label_column = _column(path, names, "label_column", label_column, LABEL_COLUMNS)
        stored = is_parquet and _has_bytes(schema.field(file_column).type)
        if is_parquet:
            wanted = {field.name for field in schema if _is_plain(field.type)} | {label_column}
            wanted = wanted if stored else wanted | {file_column}
            table = pq.read_table(path, columns=[name for name in names if name in wanted])
        if not len(table):
            raise DataError(f"table {str(path)!r} has no rows")
        labels = _texts(path, table, label_column)
        if stored:
            frame = _stored_images(path, file_column, labels, number)
        else:
            frame = located(_texts(path, table, file_column), labels, root, number)
    except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError) as error:
        text = str(error).partition("\n")[0]
        raise DataError(f"table {str(path)!r} cannot be read: {text}") from None
    frame["label"] = [normalize("NFC", label) for label in frame.label]
    others = table.to_pandas().drop(columns=[file_column, label_column], errors="ignore")
    others = others.rename(columns=lambda n: f"{n}_" if _OURS.fullmatch(n) else n)
    if twice := sorted(others.columns[others.columns.duplicated()]):
        raise DataError(f"table {str(path)!r} has two columns {twice[0]!r}; rename one")
    return pd.concat([frame, others], axis=1)


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
    raise DataError(f"table {str(path)!r} has {what}")


def _texts(path: Path, table: pa.Table, column: str) -> pa.Array:
    """A column as text. Raises DataError for an empty field, or where it is no text or number."""
    values = table[column].combine_chunks()
    usable = _is_plain(values.type) and not pa.types.is_floating(values.type)
    texts = values.cast(pa.large_string()) if usable else pa.nulls(len(values), pa.large_string())
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)
    if (row := pc.index(blank, True).as_py()) >= 0:
        text = f"row {row + 1} has no text or whole number in {column!r} ({values.type})"
        raise DataError(f"table {str(path)!r}: {text}")
    return texts


def _is_plain(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return not (pa.types.is_nested(kind) or pa.types.is_null(kind) or _has_bytes(kind))


# ---- images stored in a table


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _stored_images(path: Path, column: str, labels: pa.Array, number: int) -> pd.DataFrame:
    """The frame of images whose bytes are in a column; they are copied to CACHE/tables once.

    Row groups are compressed, and training reads single images in any order.
    """
    found = path.stat()
    key = f"{path.resolve()}|{column}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}"
    store = CACHE / "tables" / f"{text_digest(key)[:24]}.zip"
    if not store.exists():
        store.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=store.parent) as temporary:
            made = Path(temporary, store.name)
            with zipfile.ZipFile(made, "w") as archive, pq.ParquetFile(path) as source:
                for row, (content, name) in enumerate(_contents(source, column)):
                    if not content:
                        raise DataError(f"table {str(path)!r}: row {row + 1} has no {column!r}")
                    archive.writestr(f"{row:08d}/{os.path.basename(name)}", content)
            os.replace(made, store)
    places = members(store)
    columns = {"file": list(places), "label": labels.to_pandas(), "path": list(places.values())}
    return pd.DataFrame(columns).assign(list=number, outside=False)


def _contents(source: pq.ParquetFile, column: str) -> Iterator[tuple[bytes | None, str]]:
    for batch in source.iter_batches(64, columns=[column]):
        for value in batch.column(0).to_pylist():
            value = value if isinstance(value, dict) else {"bytes": value}
            yield value["bytes"], value.get("path") or "image"


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
    texts, known = sorted(set(every.label)), names or sorted({*frames["train"].label.astype(str)})
    numbers = [text for text in texts if re.fullmatch(r"-?\d{1,9}", text)]
    if numbers and not names and (others := sorted({*texts} - {*numbers})):
        both = f"labels are numbers ({numbers[0]!r}) and texts ({others[0]!r})"
        raise DataError(f"{both}; write all of them as names, or set class_names")
    padded = any(text != str(int(text)) for text in numbers)
    by_name = padded or len(numbers) < len(texts) or {*texts} <= {*(names or ())}
    if extra := sorted({*texts} - {*(known if by_name or not names else texts)}):
        where = "class_names" if names else "the training tables"
        raise DataError(f"labels {extra[:8]} are not in {where}, which have {known[:8]}")
    index = {text: i for i, text in enumerate(known)} if by_name else {n: int(n) for n in numbers}
    for frame in frames.values():
        frame["label"] = frame.label.astype(str).map(index).astype(np.int64)
    return known if by_name else None
