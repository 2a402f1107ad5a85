"""Decoded pixels of images on disk, after the first step of a transform.

`build` writes the missing files of a Cache, `Cache.image(row)` has the pixels of
form(images.open(path)). A part is a file with about PART images, named by the hash of the form and
of every image's digest: a stale file is never opened, and a build resumes where another was killed.
A part ends where an image's digest says so; an image that is added, removed or changed affects its
own part only.
"""

import contextlib
import hashlib
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

from workbench import counted, image_files, locks
from workbench.data import images
from workbench.data.verify import available_cpus, counter, file_digest

PART = 1000  # images in a file, on average; what a build loses when it is killed
IN_FLIGHT = 32  # images that are decoded before they are written


class CacheError(RuntimeError):
    """A cache cannot be built; the text says what it needs and what to do."""


class Form(Protocol):
    """A step of a transform; its repr has everything that the pixels depend on."""

    def shape(self, width: int, height: int) -> tuple[int, int]: ...

    def __call__(self, image: images.AnyImage) -> np.ndarray: ...


class Cache:
    """Pixels by row of a frame of `verify_images`, mapped into memory.

    A file that is cut short while a process has it mapped ends that process.
    """

    def __init__(self, frame: pd.DataFrame, form: Form, folder: str | Path):
        self.form, self.folder = form, Path(folder)
        self.paths = frame.path.to_numpy(object)
        self._digests = frame.digest.to_numpy(object)
        sizes = zip(frame.width.tolist(), frame.height.tolist(), strict=True)
        self._shapes = np.array([form.shape(*size) for size in sizes], np.int64).reshape(-1, 2)
        self._bytes = 3 * self._shapes.prod(1)
        begins = np.append(True, part_ends(self._digests)[:-1])[: len(frame)]
        self._part = np.cumsum(begins) - 1  # of every row
        self._bounds = np.append(np.flatnonzero(begins), len(frame))  # rows where parts begin
        before = np.cumsum(self._bytes) - self._bytes
        self._starts = before - before[self._bounds[self._part]]  # bytes within the part
        parts = np.split(self._digests, self._bounds[:-1])[1:]
        names = (hashlib.sha256(f"{form!r} {' '.join(part)}".encode()) for part in parts)
        self.files = [self.folder / f"{name.hexdigest()[:32]}.pixels" for name in names]
        # Rows whose checksum was compared, shared by the workers.
        self._shared = torch.zeros(len(frame), dtype=torch.uint8).share_memory_()
        self._checked = self._shared.numpy()  # is indexed in a hundredth of the time
        self._maps: dict[int, tuple[np.ndarray, np.ndarray] | None] = {}  # None: not usable

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}, "_checked": None}  # every process maps for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._checked = self._shared.numpy()

    def rows(self, part: int) -> range:
        """The rows of the frame in a part."""
        return range(*self._bounds[part : part + 2].tolist())

    def size(self, part: int) -> int:
        """Bytes of a part on disk: pixels, a CRC-32 for each image, and one of these checksums."""
        rows = self.rows(part)
        return int(self._bytes[rows].sum()) + 4 * len(rows) + 4

    @property
    def bytes(self) -> int:
        """Size of all parts on disk."""
        return sum(map(self.size, range(len(self.files))))

    def image(self, row: int) -> images.Pixels:
        """The pixels of a row of the frame.

        Its checksum is compared at the first use. Images of a missing or corrupt part are read from
        their files; a corrupt part is deleted, so that the next build replaces it. Raises
        ImageError where such a file cannot be read, or is not the one that was verified.
        """
        part = self._part[row].item()
        if part not in self._maps:
            try:
                self._maps[part] = self._map(part)
            except (OSError, RuntimeError):
                self._drop(part, "is missing or cut short")
        if self._maps[part] is None:
            return images.Pixels(self._read(row))
        stored, checksums = self._maps[part]
        start, (width, height) = self._starts[row].item(), self._shapes[row].tolist()
        pixels = stored[start : start + 3 * width * height].reshape(height, width, 3)
        if not self._checked[row]:
            if zlib.crc32(pixels) != checksums[row - self._bounds[part]]:
                self._drop(part, "is corrupt and deleted")
                with contextlib.suppress(OSError):  # a read-only disk
                    self.files[part].unlink()
                return self.image(row)
            self._checked[row] = 1
        return images.Pixels(pixels)

    def is_complete(self, part: int) -> bool:
        """Whether a part has all its bytes, and its first image is the one decoded now.

        With another version of a library the decoded pixels may differ.
        """
        rows = self.rows(part)
        try:
            with self.files[part].open("rb") as file:
                file.seek(int(self._bytes[rows].sum()))
                table = file.read(4 * len(rows) + 5)
            if len(table) != 4 * len(rows) + 4 or table[-4:] != _checksum(table[:-4]):
                return False
            return zlib.crc32(self._decode(rows[0])) == np.frombuffer(table, np.uint32)[0]
        except (OSError, images.ImageError):
            return False

    def write(self, part: int, pool: ThreadPoolExecutor, count: Callable[[], object]) -> None:
        """Writes a part and renames it when it is complete. Raises CacheError, OSError."""
        rows, checksums = self.rows(part), []
        temporary = self.files[part].with_suffix(".part")
        with temporary.open("wb") as file:
            for start in range(0, len(rows), IN_FLIGHT):
                for pixels, crc in pool.map(self._entry, rows[start : start + IN_FLIGHT]):
                    file.write(pixels)
                    checksums.append(crc)
                    count()
            table = np.array(checksums, np.uint32).tobytes()
            file.write(table + _checksum(table))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.files[part])

    def _entry(self, row: int) -> tuple[np.ndarray, int]:
        """What a part has of an image: its pixels and their checksum."""
        try:
            pixels = self._read(row)
        except images.ImageError as error:
            raise CacheError(f"{self.paths[row]} cannot be cached, {error}; start again") from None
        return pixels, zlib.crc32(pixels)

    def _read(self, row: int) -> np.ndarray:
        """The pixels from the image's file, which is the one that was verified."""
        path = self.paths[row]
        pixels = self._decode(row)
        if image_files.with_reason(path, lambda: file_digest(path)) != self._digests[row]:
            raise images.ImageError("unreadable", "it has changed since it was verified")
        return pixels

    def _decode(self, row: int) -> np.ndarray:
        return np.ascontiguousarray(self.form(images.open(self.paths[row])))

    def _map(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        # torch's map needs no open file, of which there may be thousands.
        size, rows = self.size(part), self.rows(part)
        stored = torch.from_file(str(self.files[part]), False, size, dtype=torch.uint8).numpy()
        return stored, stored[int(self._bytes[rows].sum()) : -4].view(np.uint32)

    def _drop(self, part: int, why: str) -> None:
        self._maps[part] = None
        text = f"cache: {self.files[part]} {why}; its images are read from their files"
        print(text, file=sys.stderr)


def build(*caches: Cache, progress: bool = True) -> None:
    """Builds the missing and corrupt parts of caches in one folder; a second process waits.

    Raises CacheError where the disk is too small for all of it, before anything is written, where
    it cannot be written, or an image cannot be read.
    """
    folder = caches[0].folder
    try:
        if missing := _missing(caches):
            folder.mkdir(parents=True, exist_ok=True)
            with locks.owning(folder / ".lock", wait=True):
                missing = _missing(caches)  # another process may have built them
                _build(folder, missing, progress)
    except OSError as error:
        raise CacheError(
            f"cannot write the cache in {folder}: {error.strerror}; complete parts stay there; "
            "make room, or name another folder in cache_dir"
        ) from None
    if progress:
        count = sum(len(cache.files) for cache in caches)
        print(f"cache: {counted(count, 'file')} in {folder}, {len(missing):,} of them new")


def _missing(caches: tuple[Cache, ...]) -> list[tuple[Cache, int]]:
    parts = [(cache, part) for cache in caches for part in range(len(cache.files))]
    return [(cache, part) for cache, part in parts if not cache.is_complete(part)]


def _build(folder: Path, missing: list[tuple[Cache, int]], progress: bool) -> None:
    needed = sum(cache.size(part) for cache, part in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"the cache takes {needed / 1e9:.2f} GB more in {folder}, where {free / 1e9:.2f} are "
            "free; name another folder in cache_dir, lower train_resize, or set cache: false"
        )
    total = sum(len(cache.rows(part)) for cache, part in missing)
    with (
        counter(total, "caching", "img", progress) as count,
        ThreadPoolExecutor(max(2, available_cpus())) as pool,
    ):
        for cache, part in missing:
            cache.write(part, pool, count)


def part_ends(digests: np.ndarray) -> np.ndarray:
    """Whether a part ends after each image, by that image alone."""
    return np.array([int(digest, 16) % PART == 0 for digest in digests], bool)


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")
