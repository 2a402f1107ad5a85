"""Class folders inside of a .zip or .tar, which is read where it is.

A path has the place of an image, so that any process reads it without a list of the archive:
archive.tar::1536+1042:cat/0.png, archive.zip::z812+1042:cat/0.png (see image_files).
"""

import contextlib
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path
from unicodedata import normalize

from PIL import Image

from workbench import CACHE, image_files
from workbench.data import images
from workbench.data.dataset import DataError, text_digest

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
_JUNK = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of a data set, by its name."""
    return name.startswith(".") or name.lower() in _JUNK


def is_image(name: str, path: str, content: bytes | None = None) -> bool:
    """Whether a file is an image by its suffix, or by its content where Pillow knows it."""
    if os.path.splitext(name)[1].lower() in images.SUFFIXES:
        return True
    try:
        with io.BytesIO(content) if content else image_files.opened(path) as file, Image.open(file):
            return True
    except Exception:  # damaged files make decoders raise nearly anything
        return False


def cache_file(folder: str, path: Path, more: str = "") -> Path:
    """Where what is read from a file is kept until its size or time changes: CACHE/folder/..."""
    found = path.stat()
    key = f"{path}|{more}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}"
    return CACHE / folder / text_digest(key)[:24]


def members(path: str | Path) -> dict[str, str]:
    """The paths of the files in an archive by their names, in NFC; "" for folders, as name/.

    Of several members with one name the last counts, as in unpacking. A listing is kept in
    CACHE/archives until the archive changes. Raises DataError.
    """
    try:
        store = cache_file("archives", Path(path))
        with contextlib.suppress(OSError, ValueError):
            return json.loads(store.read_text())
        found = [(os.path.normpath(n.lstrip("/")), place) for n, place in _members(str(path))]
    except (OSError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        text = str(error).partition("\n")[0]
        raise DataError(
            f"{str(path)!r} is neither a folder nor a readable .zip or uncompressed .tar ({text}); "
            "unpack it, or pack it again"
        ) from None
    listed = {normalize("NFC", f if place else f"{f}/"): place for f, place in found if f != "."}
    with contextlib.suppress(OSError):  # it is listed again
        store.parent.mkdir(parents=True, exist_ok=True)
        (temporary := store.with_suffix(f".{os.getpid()}")).write_text(json.dumps(listed))
        os.replace(temporary, store)
    return listed


def _members(path: str) -> Iterator[tuple[str, str]]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.flag_bits & 1 or info.compress_type not in (0, zipfile.ZIP_DEFLATED):
                    raise zipfile.BadZipFile(f"{info.filename!r} is encrypted, or not deflated")
                place = f"{path}::z{info.header_offset}+{info.compress_size}:{info.filename}"
                yield info.filename, "" if info.is_dir() else place
        return
    with tarfile.open(path, "r:", errors="strict") as archive:  # names in UTF-8
        for info in archive:
            if info.isdir() or info.isreg() and not info.issparse():  # links have no bytes
                place = f"{path}::{info.offset_data}+{info.size}:{info.name}"
                yield info.name, "" if info.isdir() else place


def class_images(
    path: Path, classes: Collection[str]
) -> tuple[set[str], list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Class folders of an archive; name, class folder and path of their images; what is skipped.

    The images are in the order of the unpacked folders. One folder around all others is left out,
    unless it is one of `classes`.
    """
    found, skipped = members(path), []
    parts = {name: name.split("/") for name in found}
    shown = [name for name in found if not any(map(is_hidden, parts[name]))]
    tops, around = {parts[name][0] for name in shown}, ""
    if len(tops) == 1 and not tops & set(classes):
        if all(len(parts[name]) > 2 or not found[name] for name in shown):
            around = f"{tops.pop()}/"
    folders, rows = set(), []
    # In a folder its files come first, then the folders below it.
    for name in sorted(found, key=lambda n: [(True, p) for p in parts[n][:-1]] + [(False, n)]):
        file, place = name.removeprefix(around), found[name]
        folder, is_below, base = file.partition("/")
        if any(map(is_hidden, parts[name])):
            skipped.append((file, "hidden"))
        elif place and not (is_below and is_image(base, place)):
            skipped.append((file, "no image" if is_below else "in no class folder"))
        elif file:
            folders.add(folder)
            rows += [(file, folder, place)] if place else []
    return folders, rows, skipped
