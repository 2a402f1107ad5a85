"""The tar file of a package: which files are in it, reading and writing."""

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from workbench import runs

FORMATS = {
    "onnx": "model.onnx",
    "int8": "model_int8.onnx",
    "with_preprocessing": "model_with_preprocessing.onnx",
    "torch_export": "model.pt2",
}
REQUIRED = (  # the other formats are optional
    "model.onnx meta.json parameters.json category_param.json parity.json SHA256SUMS predict.py "
    "recipe.yaml README.md flips.csv"
).split()

# Names in packages of format 1 -> present names
FORMER_FILES = {"model_whole.onnx": FORMATS["with_preprocessing"]}
FORMER_KEYS = {
    "forms": "formats",
    "form": "format",
    "largest": "max_abs_diff",
    "pictures": "images",
    "whole": "with_preprocessing",
    "program": "torch_export",
    **FORMER_FILES,
}


class ExportError(RuntimeError):
    """A run cannot be exported, or an exported network differs from it."""


class PackageError(ValueError):
    """A package is invalid, for one or more reasons."""

    def __init__(self, path: str | Path, *problems: str):
        super().__init__("\n  - ".join([f"{path} is not a valid package", *problems]))


def read_tar(path: str | Path) -> dict[str, bytes]:
    """The files of a package, complete and as in SHA256SUMS. Raises PackageError.

    Reads an uncompressed tar of regular files with known names into memory and unpacks nothing.
    """
    files: dict[str, bytes] = {}
    known = {*REQUIRED, *FORMATS.values(), *FORMER_FILES}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):  # nor sparse
                    raise ValueError(f"{member.name!r} is not a regular file")
                if member.name in files or member.name not in known:
                    raise ValueError(f"{member.name!r} is not a file of a package, or is repeated")
                files[member.name] = tar.extractfile(member).read()
    except (OSError, tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise PackageError(path, f"it cannot be read: {error}") from None
    if missing := [f"{name} is missing" for name in REQUIRED if name not in files]:
        raise PackageError(path, *missing)
    listed = files["SHA256SUMS"].decode(errors="replace").splitlines()
    if different := {line[66:] for line in {*listed} ^ {*checksums(files)}}:  # 64 digits, 2 spaces
        raise PackageError(path, f"changed or damaged, by SHA256SUMS: {sorted(different)}")
    return {FORMER_FILES.get(name, name): content for name, content in files.items()}


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """Writes files and their SHA256SUMS atomically; returns the path."""
    sums = "".join(f"{line}\n" for line in checksums(files)).encode()
    with runs.atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
        for name, content in {**files, "SHA256SUMS": sums}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), int(time.time())
            tar.addfile(member, io.BytesIO(content))
    return path


def checksums(files: Mapping[str, bytes]) -> list[str]:
    """The lines of SHA256SUMS, in the format of sha256sum."""
    names = [name for name in files if name != "SHA256SUMS"]
    return [f"{hashlib.sha256(files[name]).hexdigest()}  {name}" for name in names]


def read_report(path: str | Path) -> dict[str, Any]:
    """parity.json of a package. Raises PackageError, ValueError if it is no JSON."""
    return _present_names(json.loads(read_tar(path)["parity.json"]))


def read_flips(files: Mapping[str, bytes]) -> pd.DataFrame:
    """flips.csv of a package: a row for each prediction that differs from that of PyTorch."""
    flips = pd.read_csv(io.BytesIO(files["flips.csv"])).rename(columns=FORMER_KEYS)
    return flips.assign(format=flips.format.replace(FORMER_KEYS))


def _present_names(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {FORMER_KEYS.get(key, key): _present_names(item) for key, item in value.items()}
