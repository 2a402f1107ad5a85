"""Decoded pixels of a list of images on disk, after the first step of a transform.

    cache = pixel_cache.Cache(frame, form, folder)    # a verified frame
    pixel_cache.build(cache)                          # what is missing, with a progress bar
    cache.image(row)                                  # images.Pixels of form(images.open(path))

A cache gives the bytes that reading the images would give, only sooner. About PART images are in a
file, which is named by the hash of the form and of every image's digest: a stale file is never
opened, and a build resumes where another was killed. A part ends where an image's digest says so;
an image that is added, removed or changed affects its own part only.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch

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
        self._checked = torch.zeros(len(frame), dtype=torch.uint8).share_memory_()
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._warned: set[int] = set()

    def __len__(self) -> int:
        return len(self._bytes)

    @property
    def bytes(self) -> int:
        """Size of all parts on disk."""
        return sum(map(self.size, range(len(self.files))))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}}  # every process maps for itself

    def rows(self, part: int) -> range:
        """The rows of the frame in a part."""
        return range(*self._bounds[part : part + 2].tolist())

    def size(self, part: int) -> int:
        """Size of a part on disk: pixels, a CRC-32 for each image, and one of these checksums."""
        rows = self.rows(part)
        return int(self._bytes[rows].sum()) + 4 * len(rows) + 4

    def image(self, row: int) -> images.Pixels:
        """The pixels of a row of the frame.

        Its checksum is compared at the first use. From a corrupt or missing part the image is read
        from its file; a corrupt part is deleted, so that the next build replaces it. Raises
        ImageError where the file cannot be read, or is not the one that was cached.
        """
        part = self._part[row].item()
        if part not in self._maps:
            try:
                self._maps[part] = self._map(part)
            except (OSError, RuntimeError):
                self._warn(part, "is missing or cut short; its images are read from their files")
                return images.Pixels(self._decode(row))
        stored, checksums = self._maps[part]
        start, (width, height) = self._starts[row].item(), self._shapes[row].tolist()
        pixels = stored[start : start + 3 * width * height].reshape(height, width, 3)
        if not self._checked[row]:
            checksum = checksums[row - self._bounds[part]]
            if zlib.crc32(pixels) != checksum:
                pixels = self._decode(row)
                if zlib.crc32(pixels) != checksum:
                    raise images.ImageError("unreadable", "not the image that was cached")
                self._warn(part, "is corrupt; it is deleted, and built again by the next run")
                with contextlib.suppress(OSError):  # a read-only disk
                    self.files[part].unlink(missing_ok=True)
            else:
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
                for pixels, crc in pool.map(self._read, rows[start : start + IN_FLIGHT]):
                    file.write(pixels)
                    checksums.append(crc)
                    count()
            table = np.array(checksums, np.uint32).tobytes()
            file.write(table + _checksum(table))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.files[part])

    def _read(self, row: int) -> tuple[np.ndarray, int]:
        path = self.paths[row]
        try:
            pixels = self._decode(row)
            if file_digest(path) != self._digests[row]:
                raise images.ImageError("unreadable", "not the file that was verified")
        except (images.ImageError, OSError) as error:
            raise CacheError(
                f"{path} cannot be cached, {error}; it has changed since it was verified, start "
                "again to verify it again"
            ) from None
        return pixels, zlib.crc32(pixels)

    def _decode(self, row: int) -> np.ndarray:
        pixels = np.ascontiguousarray(self.form(images.open(self.paths[row])))
        if pixels.shape[1::-1] != tuple(self._shapes[row]):
            raise images.ImageError("unreadable", "of another size than when it was verified")
        return pixels

    def _map(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        # torch's map needs no open file, of which there may be thousands.
        size, rows = self.size(part), self.rows(part)
        stored = torch.from_file(str(self.files[part]), False, size, dtype=torch.uint8).numpy()
        return stored, stored[int(self._bytes[rows].sum()) : -4].view(np.uint32)

    def _warn(self, part: int, what: str) -> None:
        if part not in self._warned:  # once, not for each of its images
            self._warned.add(part)
            print(f"cache: {self.files[part]} {what}", file=sys.stderr)


def build(*caches: Cache, progress: bool = True) -> None:
    """Builds the missing and corrupt parts of caches in one folder; a second process waits.

    With `progress` prints the size, the folder, and how much was built. Raises CacheError where the
    disk is too small for all of it, before anything is written, or an image cannot be read.
    """
    folder, needed, start = caches[0].folder, 0, time.monotonic()
    if _missing(caches, progress):
        with _clear_errors(folder), _locked(folder):
            missing = _missing(caches, False)  # another process may have built them
            needed = sum(cache.size(part) for cache, part in missing)
            free = shutil.disk_usage(folder).free
            if needed > free:
                raise CacheError(
                    f"the cache takes {_gb(needed)} more in {folder}, where {_gb(free)} are free; "
                    "name another folder in cache_dir, set or lower train_resize, or set cache: "
                    "false"
                )
            total = sum(len(cache.rows(part)) for cache, part in missing)
            with (
                counter(total, f"caching, {_gb(needed)}", "img", progress) as count,
                images.quiet(),
                ThreadPoolExecutor(max(2, available_cpus())) as pool,
            ):
                for cache, part in missing:
                    cache.write(part, pool, count)
    if progress:
        print(_summary(caches, needed, time.monotonic() - start), flush=True)


def part_ends(digests: np.ndarray) -> np.ndarray:
    """Whether a part ends after each image, by that image alone."""
    return np.array([int(digest, 16) % PART == 0 for digest in digests], bool)


def _missing(caches: tuple[Cache, ...], progress: bool) -> list[tuple[Cache, int]]:
    parts = [(cache, part) for cache in caches for part in range(len(cache.files))]
    found = []
    with counter(len(parts), "checking the cache", "part", progress) as count:
        for cache, part in parts:
            if not cache.is_complete(part):
                found.append((cache, part))
            count()
    return found


def _summary(caches: tuple[Cache, ...], built: int, seconds: float) -> str:
    folder, own = caches[0].folder, {path for cache in caches for path in cache.files}
    text = f"cache: {_gb(sum(cache.bytes for cache in caches))} in {folder}, "
    text += f"{_gb(built)} of it built in {seconds:.0f} s" if built else "all of it was there"
    others = 0
    with contextlib.suppress(OSError):  # files may be deleted meanwhile
        others = sum(path.stat().st_size for path in folder.glob("*.pixels") if path not in own)
    return text + (f"; {_gb(others)} there are of other lists or options" if others else "")


@contextlib.contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"{folder} is full; complete parts stay there. Make room, name another folder in "
                "cache_dir, or set cache: false"
            ) from None
        why = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise CacheError(
            f"cannot write {folder}: {why}; name another folder in cache_dir"
        ) from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def _gb(count: int) -> str:
    unit, size = ("GB", 1e9) if count >= 1e8 else ("MB", 1e6) if count >= 1e5 else ("kB", 1e3)
    return f"{count / size:,.1f} {unit}"
