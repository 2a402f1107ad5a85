"""The images of a list as pixels on disk: what they are after the step that needs a whole file.

    kept = cache.Cache(frame, form, folder)    # an examined frame
    cache.build(kept)                          # what is missing, with a bar
    kept.image(row)                          # images.Pixels of form(images.open(path))

A cache changes nothing but time: whoever reads it gets the bytes that reading the file would give.
Parts of about PART images are files named after what is in them: the form and the digest of every
image. So a stale part is one that nobody asks for, and a build goes on where another was killed,
or beside one that is running. A part ends where an image's digest says so: an image that comes,
goes or changes concerns the part that it lies in, and no other.
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
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.data import available_cpus, file_digest, images
from workbench.progress import bar

PART = 1000  # images in a file, on average; what a build loses when it is killed


class CacheError(RuntimeError):
    """A cache cannot be built; the text says what it needs and the way out."""


def build(*caches: "Cache", progress: bool = True) -> None:
    """Builds the parts that are missing or damaged, beside other processes that do the same.

    Says with `progress` how large they are, where, and how much of that was there. Of a part that
    is there the first image is decoded again: a library that computes other pixels than the one
    before makes other parts. Raises CacheError where the disk is too small for all of it, before
    anything is written, or an image cannot be read.
    """
    parts = sum(len(cache.files) for cache in caches)
    with _counted(parts, "looking at the cache", "part", progress) as count:
        missing = [(cache, part) for cache in caches for part in cache.missing(count)]
    needed: dict[Path, int] = {cache.folder: 0 for cache in caches}
    for cache, part in missing:
        needed[cache.folder] += cache.size(part)
    for folder, size in needed.items():
        if size:
            _check_room(folder, size)
    start = time.monotonic()
    if missing:
        _build(missing, needed, progress)
    for folder, size in needed.items() if progress else ():
        print(_said(folder, caches, size, time.monotonic() - start), flush=True)


def _build(missing: list[tuple["Cache", int]], needed: dict[Path, int], progress: bool) -> None:
    total = sum(len(cache.rows(part)) for cache, part in missing)
    text = f"caching, {_gb(sum(needed.values()))}"
    with (
        _counted(total, text, "img", progress) as count,
        images.quiet(),
        ThreadPoolExecutor(max(2, available_cpus())) as pool,
    ):
        while missing:
            others = [one for one in missing if not one[0].write(one[1], pool, count)]
            if others == missing:  # another process is at them
                time.sleep(0.2)
            missing = others


@contextlib.contextmanager
def _counted(total: int, text: str, unit: str, progress: bool) -> Iterator[Callable[[], Any]]:
    """A bar to count on, or nothing to see."""
    if not progress:
        yield lambda: None
        return
    with bar(total, text, unit) as shown:
        yield shown.update


def _said(folder: Path, caches: tuple["Cache", ...], built: int, seconds: float) -> str:
    own = {path for cache in caches for path in cache.files}
    size = sum(cache.bytes for cache in caches if cache.folder == folder)
    text = f"cache: {_gb(size)} in {folder}, "
    text += f"{_gb(built)} of it built in {seconds:.0f} s" if built else "all of it was there"
    others = 0
    with contextlib.suppress(OSError):  # somebody clears up
        others = sum(path.stat().st_size for path in folder.glob("*.pixels") if path not in own)
    return text + (f"; {_gb(others)} there are of other lists or options" if others else "")


class Cache:
    """Pixels by row of the frame, mapped into memory.

    `frame` is one that data.verify_images has read. `form` makes pixels (h, w, 3) of an image;
    `form.shape(width, height)` says which (w, h), and its repr all that they depend on. Whoever
    cuts a file short that a process has mapped ends that process; the next one builds it again.
    """

    def __init__(self, frame: pd.DataFrame, form: Any, folder: str | Path):
        self.form, self.folder = form, Path(folder)
        self.paths = frame.path.to_numpy(object)
        self._digests = frame.digest.to_numpy(object)
        sizes = zip(frame.width.tolist(), frame.height.tolist(), strict=True)
        self._shapes = np.array([form.shape(*size) for size in sizes], np.int64).reshape(-1, 2)
        self._bytes = 3 * self._shapes.prod(1)
        new = np.append(True, _ends(self._digests)[:-1])[: len(frame)]  # a part begins here
        self._part = np.cumsum(new) - 1
        self._bounds = np.append(np.flatnonzero(new), len(frame))  # where parts begin, and the end
        before = np.cumsum(self._bytes) - self._bytes
        self._starts = before - before[self._bounds[self._part]]  # within the part
        parts = np.split(self._digests, self._bounds[:-1])[1:]
        names = (f"{form!r} {' '.join(part)}" for part in parts)
        self.files = [  # of the parts
            self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.pixels"
            for name in names
        ]
        # Which images were compared with their sum; shared by the loader's processes.
        self._flags = torch.zeros(len(frame), dtype=torch.uint8).share_memory_()
        self._seen = self._flags.numpy()
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._complained: set[int] = set()  # of these parts

    def __len__(self) -> int:
        return len(self._bytes)

    @property
    def bytes(self) -> int:
        """What all of it takes on disk."""
        return sum(map(self.size, range(len(self.files))))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}, "_seen": None}  # a process maps for itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._seen = self._flags.numpy()

    def image(self, row: int) -> images.Pixels:
        """The pixels of a row of the frame.

        Compared with their sum when first asked for; where that differs, they are read again from
        the image and mended on disk. Raises ImageError where that cannot be read any more.
        """
        part = self._part[row]
        if part not in self._maps:
            try:
                self._maps[part] = self._map(part)
            except (OSError, RuntimeError):  # gone, or cut short, since it was built
                self._complain(part, "is gone or cut short; its images are read from their files")
                return images.Pixels(self._made(row))
        stored, sums = self._maps[part]
        width, height = self._shapes[row].tolist()
        start = self._starts[row].item()
        pixels = stored[start : start + 3 * width * height].reshape(height, width, 3)
        if not self._seen[row]:
            wanted = sums[row - self._bounds[part]]
            if zlib.crc32(pixels) == wanted:
                self._seen[row] = 1
            else:
                pixels = self._mended(row, wanted)
        return images.Pixels(pixels)

    # ---- building

    def missing(self, count: Callable[[], Any] = lambda: None) -> list[int]:
        """The parts that are not there, not whole, or not what reading an image gives now.

        Counts the parts as it looks at them.
        """
        found = []
        for part in range(len(self.files)):
            if not self._holds(part):
                found.append(part)
            count()
        return found

    def rows(self, part: int) -> range:
        """The rows of the frame in a part."""
        return range(*self._bounds[part : part + 2].tolist())

    def size(self, part: int) -> int:
        """What a part takes on disk, in bytes."""
        rows = self.rows(part)
        return int(self._bytes[rows].sum()) + 4 * len(rows) + 4

    def write(self, part: int, pool: ThreadPoolExecutor, count: Callable[[], Any]) -> bool:
        """Puts a part in its place, whole; False where another process is writing it.

        Raises CacheError.
        """
        begun, rows = self.files[part].with_suffix(".part"), self.rows(part)
        with _told(self.folder), _held(begun) as file:
            if file is None:
                return False
            if self._holds(part):  # another process was faster
                begun.unlink(missing_ok=True)
                for _ in rows:
                    count()
                return True
            os.truncate(file, 0)
            tasks = [pool.submit(self._write, file, row) for row in rows]
            try:
                sums = np.zeros(len(rows), np.uint32)
                for i, task in enumerate(tasks):
                    sums[i] = task.result()
                    count()
            finally:  # a thread still at it would write into whatever has the number next
                for task in tasks:
                    task.cancel()
                wait(tasks)
            _write(file, sums.tobytes() + _sum(sums), int(self._bytes[rows].sum()))
            os.fsync(file)
            os.replace(begun, self.files[part])
        return True

    def _write(self, file: int, row: int) -> int:
        path = self.paths[row]
        try:
            pixels = self._made(row)
            if file_digest(path) != self._digests[row]:
                raise images.ImageError("unreadable", "not the file that was examined")
        except (images.ImageError, OSError) as error:
            raise CacheError(
                f"{path} cannot be cached, {error}; it could be read when it was examined. Start "
                "again, and it is looked at again"
            ) from None
        _write(file, pixels, self._starts[row].item())
        return zlib.crc32(pixels)

    def _made(self, row: int) -> np.ndarray:
        pixels = np.ascontiguousarray(self.form(images.open(self.paths[row])))
        width, height = self._shapes[row].tolist()
        if pixels.shape != (height, width, 3):
            raise images.ImageError("unreadable", "of another size than when it was examined")
        return pixels

    def _mended(self, row: int, wanted: int) -> np.ndarray:
        pixels = self._made(row)
        if zlib.crc32(pixels) != wanted:
            raise images.ImageError("unreadable", "not the image that was cached; start again")
        self._complain(self._part[row], "is damaged; what differs is made again from the images")
        with contextlib.suppress(OSError):  # a disk that is read only is no reason to stop
            descriptor = os.open(self.files[self._part[row]], os.O_WRONLY)
            try:
                _write(descriptor, pixels, self._starts[row].item())
            finally:
                os.close(descriptor)
        return pixels

    def _complain(self, part: int, what: str) -> None:
        if part not in self._complained:  # once, not for each of its images
            self._complained.add(part)
            print(f"cache: {self.files[part]} {what}", file=sys.stderr)

    # ---- parts

    def _holds(self, part: int) -> bool:
        """Whether a part is there with all its bytes, and its first image is as made now."""
        rows = self.rows(part)
        try:
            with self.files[part].open("rb") as file:
                table = os.pread(file.fileno(), 4 * len(rows) + 5, int(self._bytes[rows].sum()))
        except OSError:
            return False
        if len(table) != 4 * len(rows) + 4 or table[-4:] != _sum(table[:-4]):
            return False
        try:
            return zlib.crc32(self._made(rows[0])) == np.frombuffer(table, np.uint32)[0]
        except images.ImageError:
            return False

    def _map(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        # torch's map keeps no file open, of which there may be thousands; nobody writes to it.
        size = self.size(part)
        stored = torch.from_file(str(self.files[part]), False, size, dtype=torch.uint8).numpy()
        rows = self.rows(part)
        return stored, stored[int(self._bytes[rows].sum()) :][: 4 * len(rows)].view(np.uint32)


def _ends(digests: np.ndarray) -> np.ndarray:
    """Whether a part ends after each image, by that image alone."""
    return np.array([int(digest, 16) % PART == 0 for digest in digests], bool)


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheError(
                f"{folder} is full; what is cached so far stays there. Make room, name another "
                "folder in cache_dir, or set cache: false"
            ) from None
        why = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise CacheError(
            f"cannot write {folder}: {why}; name another folder in cache_dir"
        ) from None


def _check_room(folder: Path, needed: int) -> None:
    with _told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"the cache takes {_gb(needed)} more in {folder}, where {_gb(free)} are free; name "
            "another folder in cache_dir, set or lower train_resize, or set cache: false"
        )


@contextlib.contextmanager
def _held(path: Path) -> Iterator[int | None]:
    """A file opened for this process alone, None where another has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, its holder may have renamed it.
            alone = os.path.samestat(os.stat(path), os.fstat(file))
        except (BlockingIOError, FileNotFoundError):
            alone = False
        yield file if alone else None
    finally:
        os.close(file)


def _write(file: int, content: Any, start: int) -> None:
    content = memoryview(content).cast("B")
    while content:
        written = os.pwrite(file, content, start)
        content, start = content[written:], start + written


def _sum(content: Any) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def _gb(count: int) -> str:
    unit, size = ("GB", 1e9) if count >= 1e8 else ("MB", 1e6) if count >= 1e5 else ("kB", 1e3)
    return f"{count / size:,.1f} {unit}"
