"""Bytes and files of tar shards, on a disk or in an object store, or an error that names a shard.

    [content] = read(["s3://bucket/train/00000.tar::1536+1042:cat/0.jpg"])

obstore's threads do not survive a fork, so that the loaders' workers alone use it themselves; for
another process a child reads.
"""

import contextlib
import functools
import io
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

LABELS = ("cls", "json", "txt")  # members of a WebDataset sample that may have its label
REQUESTS = 16  # at once, of every process
# Of each request, with waits of 0.25, 0.5, ... to 30 seconds: two minutes in all
ATTEMPTS = int(os.environ.get("WORKBENCH_STORE_ATTEMPTS") or 10)
BLOCK = 2**20  # bytes at a time for a listing; of larger members it reads the headers alone
_PLACE = re.compile(r"(.+?)::(\d+)\+(\d+):.*", re.DOTALL)
_CHANGED = "has changed since it was indexed; put it back, or index the shards again"
_MISSING = "is missing; put it back, or index the shards again"
_FINAL = {"PreconditionError": _CHANGED, "NotFoundError": _MISSING, "FileNotFoundError": _MISSING}


class StoreError(OSError):
    """A shard is missing, has changed or cannot be read; the text names it and what to do."""


class StoreUnavailable(StoreError):
    """A store did not answer; a run can be resumed when it does again."""


Shard = tuple[int, str]  # size, and ETag of an object or time of the last change of a file
known: dict[str, Shard] = {}  # by path or URL, the shards of every index that was opened
cache: Any = None  # shard_cache.ShardCache of the training in this process


def read(places: Iterable[str]) -> Iterator[bytes | None]:
    """The bytes at these places (see image_files), read at once; None where no shard is named.

    Raises StoreError where a shard is not the one that was indexed, or does not answer.
    """
    found = []
    for part in map(_PLACE.fullmatch, places):
        mine = part and (part[1] in known or "://" in part[1])
        found.append((part[1], int(part[2]), int(part[3]), known.get(part[1])) if mine else None)
    remote = [one for one in found if one and "://" in one[0]]
    kept = {one: cache.get(*one) for one in remote if cache and one[3]}
    answers = each("read", [one for one in remote if kept.get(one) is None])
    for one in found:
        if one and "://" in one[0]:
            content = kept.get(one)
            if content is None:
                content = next(answers)
                if one in kept:
                    cache.put(*one, content)
        else:
            content = one and _answer("read", one)
        if isinstance(content, StoreError):
            raise content
        yield content


# ---- one request


def _read(url: str, start: int, size: int, shard: Shard | None) -> bytes:
    if "://" in url:
        options = {"range": (start, start + max(1, size))}  # there is no empty range
        if shard and shard[1].startswith('"'):
            options["if_match"] = shard[1]
        store, path = _store(url)
        found = store.get(path, options=options)
        now, content = _shard(found.meta), bytes(found.bytes())[:size]
    else:
        with open(url, "rb", buffering=0) as file:
            now = _shard(os.fstat(file.fileno()))
            content = os.pread(file.fileno(), size, start)
    compare(url, shard, now)
    if len(content) != size:
        raise OSError(f"{len(content)} bytes came, not {size}")
    return content


def compare(url: str, before: Shard | None, now: Shard) -> None:
    if before and before != now:
        raise StoreError(f"shard {url} {_CHANGED} (size and version {before}, now {now})")


def _shard(found: Any) -> Shard:
    if isinstance(found, os.stat_result):
        return found.st_size, str(found.st_mtime_ns)
    return found["size"], found["e_tag"] or found["last_modified"].isoformat()


def _look(url: str) -> Shard:
    store, path = _store(url) if "://" in url else (None, "")
    return _shard(store.head(path) if store else os.stat(url))


def _list(url: str) -> tuple[Shard, list[tuple[str, int, int, bytes]]]:
    """A shard, and name, offset and size of its files; of LABELS the content too."""
    shard, found = _look(url), []
    if "://" in url:
        archive = io.BufferedReader(_Object(url, shard), BLOCK)
    else:
        archive = open(url, "rb")
    with contextlib.closing(archive):
        try:
            tar = tarfile.open(fileobj=archive, mode="r:", errors="strict")
            for info in tar:
                if info.isreg() and not info.issparse():
                    is_label = info.name.rpartition(".")[2] in LABELS
                    content = tar.extractfile(info).read() if is_label else b""
                    found.append((info.name, info.offset_data, info.size, content))
                elif not info.isdir():
                    raise tarfile.ReadError(f"{info.name!r} is a link")
            archive.seek(tar.offset)  # at a damaged header tarfile ends without an error
            if archive.read(512) != bytes(512):
                raise tarfile.ReadError(f"it ends at {tar.offset:,} of {shard[0]:,} bytes")
        except (tarfile.TarError, UnicodeError) as error:
            text = f"is truncated, compressed or no plain tar ({error}); copy or pack it again"
            raise StoreError(f"shard {url} {text}") from None
    compare(url, shard, _look(url))
    return shard, found


class _Object(io.RawIOBase):
    """An object as a file to read."""

    def __init__(self, url: str, shard: Shard):
        self.url, self.shard, self.place = url, shard, 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = offset + (0, self.place, self.shard[0])[whence]
        return self.place

    def readinto(self, buffer: memoryview) -> int:
        size = max(0, min(len(buffer), self.shard[0] - self.place))
        buffer[:size] = _read(self.url, self.place, size, self.shard) if size else b""
        self.place += size
        return size


def _below(url: str) -> list[str]:
    """The URLs of all objects below the folder that a pattern begins with."""
    store, path = _store(url)
    folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    chunks = store.list(folder or None)
    return [url.removesuffix(path) + one["path"] for chunk in chunks for one in chunk]


def _store(url: str) -> tuple[Any, str]:
    scheme, host, path = urlsplit(url)[:3]
    return _bucket(f"{scheme}://{host}"), path.lstrip("/")


@functools.cache
def _bucket(url: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError:
        raise StoreError("object stores need obstore: pip install 'workbench[s3]'") from None
    options = {"timeout": "30s", "connect_timeout": "10s", "allow_http": True}
    return from_url(url, client_options=options, retry_config={"max_retries": 2})


def _answer(name: str, item: Any) -> Any:
    """The result of a request, which is repeated while that may help, or a StoreError."""
    item = (item,) if isinstance(item, str) else item
    for attempt in range(ATTEMPTS):
        try:
            return {"read": _read, "look": _look, "list": _list, "below": _below}[name](*item)
        except StoreError as error:
            return error
        except Exception as error:
            kind, text = type(error), str(error).partition("\n")[0]
            if not (isinstance(error, OSError) or kind.__module__ == "obstore.exceptions"):
                raise
        if kind.__name__ in _FINAL:
            return StoreError(f"shard {item[0]} {_FINAL[kind.__name__]}")
        if attempt + 1 < ATTEMPTS:  # processes that failed together do not come back together
            time.sleep(min(30.0, 0.25 * 2**attempt) * (1 + os.getpid() % 16 / 16))
    text = f"cannot be read in {ATTEMPTS} attempts ({text}); the same command resumes"
    return StoreUnavailable(f"shard {item[0]} {text}")


def each(name: str, items: Iterable) -> Iterator[Any]:
    """Results in order of concurrent requests: "look" (Shard) or "list" of URLs, "below" of one.

    Raises the first StoreError.
    """
    if not (items := list(items)):
        return
    if multiprocessing.current_process().daemon:  # as the loaders' workers, which fork no process
        results = _pool().map(functools.partial(_answer, name), items)
    else:
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", f"from {__name__} import answer_all; answer_all()"]
        options = {"input": pickle.dumps((name, items)), "env": {**os.environ, **path}}
        done = subprocess.run(command, stdout=subprocess.PIPE, start_new_session=True, **options)
        if done.returncode:
            raise StoreError("the process that reads shards failed; see its message above")
        results = pickle.loads(done.stdout)
    for result in results:
        if isinstance(result, StoreError):
            raise result
        yield result


def answer_all() -> None:
    """Writes the results for the (name, items) on standard input."""
    name, items = pickle.load(sys.stdin.buffer)
    pickle.dump([*_pool().map(functools.partial(_answer, name), items)], sys.stdout.buffer)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    with contextlib.suppress(ImportError):  # threads that import it at once can get half of it
        import obstore.store  # noqa: F401
    return ThreadPoolExecutor(REQUESTS)
