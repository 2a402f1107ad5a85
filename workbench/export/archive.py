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
REQUIRED = (  # all but model.onnx are descriptions; the other FORMATS are optional
    "model.onnx meta.json parameters.json category_param.json parity.json SHA256SUMS predict.py "
    "recipe.yaml README.md flips.csv"
).split()
MAX_BYTES = 4 * 2**30

# Packages of format 1 use these names.
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
    """A package is invalid; `problems` has one line for each reason."""

    def __init__(self, path: str | Path, problems: list[str]):
        self.problems = problems
        super().__init__(
            f"{path} is not a valid package\n" + "\n".join(f"  - {p}" for p in problems)
        )


def read_tar(path: Path) -> dict[str, bytes]:
    """The contents of a package by file name. Raises PackageError.

    Reads an uncompressed tar of regular files with known names into memory and unpacks nothing.
    """
    files: dict[str, bytes] = {}
    known = {*REQUIRED, *FORMATS.values(), *FORMER_FILES}
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PackageError(path, [f"over {MAX_BYTES:,} bytes"])
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    raise PackageError(path, [f"{name[:100]!r} is not a regular file"])
                if name in files:
                    raise PackageError(path, [f"{name!r} occurs twice"])
                if name not in known:
                    raise PackageError(path, [f"{name[:100]!r} is not a file of a package"])
                files[name] = tar.extractfile(member).read()
                if len(files[name]) != member.size:
                    raise PackageError(path, [f"{name} is truncated"])
    except PackageError:
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise PackageError(path, [f"it cannot be read as a tar file: {error}"]) from None
    return files


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """Writes files and their SHA256SUMS atomically; returns the path. Raises ExportError."""
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    try:
        with runs.atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
            for name, content in {**files, "SHA256SUMS": sums.encode()}.items():
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(content), int(time.time())
                tar.addfile(member, io.BytesIO(content))
    except OSError as error:
        raise ExportError(f"{path} was not written: {error.strerror}") from None
    return path


def hash_problems(files: Mapping[str, bytes]) -> list[str]:
    """Differences between the files and SHA256SUMS (the format of `sha256sum -c`)."""
    lines = files["SHA256SUMS"].decode(errors="replace").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    problems = [f"{name[:100]!r} of SHA256SUMS is missing" for name in expected.keys() - files]
    for name, content in files.items():
        if name != "SHA256SUMS" and expected.get(name) != hashlib.sha256(content).hexdigest():
            problems.append(f"{name} does not match SHA256SUMS: it was changed or damaged")
    return problems


def read_report(path: str | Path) -> dict[str, Any]:
    """parity.json of a package, or the report of a failed export. Raises PackageError."""
    path = Path(path)
    is_json = path.suffix == ".json"
    content = path.read_bytes() if is_json else read_tar(path).get("parity.json", b"")
    try:
        return dict(_current_names(json.loads(content)))
    except ValueError as error:
        raise PackageError(path, [f"parity.json: {error}"]) from None


def read_flips(files: Mapping[str, bytes]) -> pd.DataFrame:
    """flips.csv of a package: a row for each prediction that differs from that of PyTorch."""
    flips = pd.read_csv(io.BytesIO(files["flips.csv"])).rename(columns=FORMER_KEYS)
    return flips.assign(format=flips.format.replace(FORMER_KEYS))


def _current_names(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {FORMER_KEYS.get(key, key): _current_names(item) for key, item in value.items()}
