"""Images of object stores on a disk of this machine: a sparse file for each shard.

    shard_store.cache = shard_cache.opened(folder, 200 * 10**9, shards)

An image lies where it lies in its shard. The end of the tar header before it, which nobody reads
here, is replaced by size and checksum. So every process finds an image as soon as it is written,
and one that was written in part or damaged is read from the store again. Nothing is removed to make
room for another image of the same run: in a new order every epoch, all are equally likely to be
next, and the last ones used are no better to keep than the first.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from workbench.shard_store import Shard, StoreError

_HEAD = struct.Struct("<Q24s")  # size and checksum
_PAGE = 4096  # bytes, the unit in which a disk stores a sparse file
_TABLES = 2 * _PAGE  # what a file system may write later, to find the pages of a file


class ShardCache(NamedTuple):
    """A folder with at most `limit` bytes of images, for any number of processes of a machine."""

    folder: str
    limit: int

    def get(self, url: str, start: int, size: int, shard: Shard) -> bytes | None:
        """These bytes of this version of a shard, None if they are not here."""
        try:
            with open(self._path(url, shard), "rb", buffering=0) as file:
                found = os.pread(file.fileno(), _HEAD.size + size, start - _HEAD.size)
        except OSError:
            return None
        content = found[_HEAD.size :]
        return content if found[: _HEAD.size] == _head(content) and len(content) == size else None

    def put(self, url: str, start: int, size: int, shard: Shard, content: bytes) -> None:
        """Writes these bytes if there is room; on a full disk warns and leaves them out."""
        first, path = start - _HEAD.size, self._path(url, shard)
        space = ((start + size) // _PAGE - first // _PAGE + 1) * _PAGE + 16  # in those tables
        space += 0 if os.path.exists(path) else _TABLES
        try:
            with self._locked() as used:
                before = int(os.pread(used, 20, 0) or 0)
                if before + space > self.limit or self.get(url, start, size, shard) is not None:
                    return
                _write(used, before + space)
                file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
                try:
                    os.pwrite(file, _head(content) + content, first)
                finally:
                    os.close(file)
        except OSError as error:
            text = f"shard_cache_gb: {self.folder} cannot be written ({error.strerror})"
            warnings.warn(f"{text}; images are read from the store", stacklevel=2)

    def _path(self, url: str, shard: Shard) -> str:
        return os.path.join(self.folder, _name(url, shard))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The descriptor of a file with the bytes in use, of this process alone."""
        file = os.open(os.path.join(self.folder, "shards.bytes"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def opened(folder: Path, limit: int, shards: Mapping[str, Shard]) -> ShardCache:
    """A cache with room for these shards, up to the limit; others go, the oldest use first.

    Raises StoreError where the folder cannot be written, or its disk has less room.
    """
    cache = ShardCache(str(folder), limit)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with cache._locked() as file:
            mine = {_name(url, shard) for url, shard in shards.items()}
            found = sorted(folder.glob("*.shard"), key=lambda path: path.stat().st_mtime)
            space = {path: path.stat().st_blocks * 512 + _TABLES for path in found}
            used = sum(space.values())
            to_come = sum(size for size, _ in shards.values())
            to_come -= sum(space[path] for path in found if path.name in mine)
            for path in sorted(found, key=lambda path: path.name in mine):
                room = 0 if path.name in mine else max(0, to_come)
                if used + room > limit:
                    path.unlink()
                    used -= space[path]
                elif path.name in mine:
                    os.utime(path)
            _write(file, used)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        text = f"shard_cache_gb: the cache in {folder} cannot be used ({error.strerror})"
        raise StoreError(f"{text}; name a folder on a disk of this machine in cache_dir") from None
    if (needed := min(limit - used, max(0, to_come))) > free:
        text = f"{needed / 1e9:.1f} GB more are to come, and {folder} has {free / 1e9:.1f} free"
        raise StoreError(f"shard_cache_gb: {text}; lower it, or name another folder in cache_dir")
    return cache


def _write(file: int, used: int) -> None:
    os.pwrite(file, b"%020d" % used, 0)


def _head(content: bytes) -> bytes:
    return _HEAD.pack(len(content), hashlib.sha256(content).digest()[:24])


@functools.lru_cache(100_000)
def _name(url: str, shard: Shard) -> str:
    text = repr((url, *shard)).encode()
    return f"{hashlib.blake2b(text, digest_size=20).hexdigest()}.shard"
