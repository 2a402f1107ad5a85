"""What a data set is: two frames of images with their labels, and the class names."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc


class DataError(ValueError):
    """Lists or folders cannot be used; the text names the lines or files and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Training and validation frames, and the class names by label, in NFC.

    Frames have the columns file, label, path, list (the number of the list that has the entry) and
    outside (of its root). skipped: (side, file, reason) of files and folders that are not used.
    """

    train: pd.DataFrame
    val: pd.DataFrame
    classes: list[str]
    skipped: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """Training images of every class, 0 for a class without any."""
        return np.bincount(self.train.label, minlength=len(self.classes)).tolist()


def fingerprint(data: Dataset) -> str:
    """Twelve hex digits over files, labels and bytes if verified, of an index sizes in bytes."""
    parts = []
    for frame in (data.train, data.val):
        if "index" in frame.attrs:
            parts += _index_digests(frame)
            continue
        digest = frame.digest if "digest" in frame else [""] * len(frame)
        parts += map("|".join, zip(frame.file, frame.label.astype(str), digest, strict=True))
    return text_digest("\n".join(parts))[:12]


def val_fingerprint(val: pd.DataFrame) -> str:
    """`fingerprint` of the validation images alone."""
    return fingerprint(Dataset(val.iloc[:0], val, []))


def _index_digests(frame: pd.DataFrame) -> Iterator[str]:
    """A digest of size, name and label of every 100,000 rows: an index may not fit in memory."""
    for start in range(0, len(frame), 100_000):
        rows = frame.iloc[start : start + 100_000]
        places = pc.replace_substring_regex(pa.array(rows.path), r"(?s)^.+?::\d+", "")
        yield text_digest("\n".join([*places.to_pylist(), *map(str, rows.label)]))


def text_digest(text: str) -> str:
    """SHA-256 of a text that may hold names of files that are not UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
