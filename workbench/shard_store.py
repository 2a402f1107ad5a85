"""Bytes and members of tar shards, on a disk or in an object store, or an error that names one.

    [content] = read(["s3://bucket/train/00000.tar::1536+1042:cat/0.jpg"])

obstore's threads do not survive a fork. It is used in the loaders' workers, which call `in_worker`,
and for every other process in a child of its own.
"""

import atexit
import contextlib
import functools
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import urlsplit

LABELS = ("cls", "json", "txt")  # members of a WebDataset sample that may have its label
REQUESTS = 16  # at once, in every process
ATTEMPTS = 10  # for each request, with waits of 0.25, 0.5, ... to 30 seconds: two minutes in all
BLOCK = 2**16  # bytes; members that are larger are skipped when a shard in a store is listed
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_PLACE = re.compile(r"(.+?)::(\d+)\+(\d+):.*", re.DOTALL)


class StoreError(OSError):
    """A shard is missing, has changed or cannot be read; the text names it and what to do."""


class Shard(NamedTuple):
    """What a shard has to be for its index to hold."""

    size: int
    version: str  # ETag of an object, time of the last change of a file


class Range(NamedTuple):
    url: str
    start: int
    size: int
    shard: Shard | None  # as indexed


Members = list[tuple[str, int, int, bytes]]  # name, offset, size and, of LABELS, the content
known: dict[str, Shard] = {}  # by path or URL, the shards of every index that was opened


def is_remote(path: str) -> bool:
    return "://" in path


def read(places: Iterable[str]) -> Iterator[bytes | None]:
    """The bytes at these places (see image_files), read at once; None where no shard is named.

    Raises StoreError where a shard is not the one that was indexed, or does not answer.
    """
    found: list[Range | None] = []
    for place in places:
        part = _PLACE.fullmatch(place)
        mine = part and (part[1] in known or is_remote(part[1]))
        whole = (part[1], int(part[2]), int(part[3]), known.get(part[1])) if mine else ()
        found.append(Range(*whole) if mine else None)
    remote = _each("range", [one for one in found if one and is_remote(one.url)])
    for one in found:
        yield one and (next(remote) if is_remote(one.url) else _answer(_range, one))


def look(urls: Iterable[str]) -> Iterator[Shard]:
    """Size and version of shards. Raises StoreError."""
    return _each("look", list(urls))


def members(urls: Iterable[str]) -> Iterator[tuple[Shard, Members]]:
    """Size, version and files of shards. Raises StoreError."""
    return _each("members", list(urls))


def objects(url: str) -> list[str]:
    """The URLs below the folder that a pattern begins with. Raises StoreError."""
    return next(_each("objects", [url]))


# ---- one request


def _range(item: Range) -> bytes:
    if not is_remote(item.url):
        with open(item.url, "rb", buffering=0) as file:
            now = _of_file(os.fstat(file.fileno()))
            content = os.pread(file.fileno(), item.size, item.start)
    elif item.size:
        options: dict[str, Any] = {"range": (item.start, item.start + item.size)}
        if item.shard and item.shard.version.startswith('"'):
            options["if_match"] = item.shard.version
        store, path = _store(item.url)
        found = _obstore().get(store, path, options=options)
        now, content = _of_object(found.meta), bytes(found.bytes())
    else:
        return b""
    if item.shard and item.shard != now:
        raise changed(item.url, item.shard, now)
    if len(content) != item.size:
        raise OSError(f"{len(content)} bytes came, not {item.size}")
    return content


def changed(url: str, before: Shard, now: Shard | None) -> StoreError:
    """The error for a shard that is not the one that was indexed."""
    text = "" if now is None else f", now {now.size:,} bytes, {now.version}"
    return StoreError(
        f"shard {url} has changed since it was indexed ({before.size:,} bytes, {before.version}"
        f"{text}); put it back, or index the shards again for a run with another name"
    )


def _look(url: str) -> Shard:
    if not is_remote(url):
        return _of_file(os.stat(url))
    return _of_object(_obstore().head(*_store(url)))


def _of_file(found: os.stat_result) -> Shard:
    return Shard(found.st_size, str(found.st_mtime_ns))


def _of_object(found: dict[str, Any]) -> Shard:
    return Shard(found["size"], found["e_tag"] or found["last_modified"].isoformat())


class _Blocks(io.RawIOBase):
    """A shard as a file: a request for each read."""

    def __init__(self, url: str, shard: Shard):
        self.url, self.shard, self.at = url, shard, 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = (0, self.at, self.shard.size)[whence] + offset
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        size = max(0, min(len(buffer), self.shard.size - self.at))
        buffer[:size] = _answer(_range, Range(self.url, self.at, size, self.shard))
        self.at += size
        return size


def _members(url: str) -> tuple[Shard, Members]:
    shard, found, bad = _look(url), [], None
    with io.BufferedReader(_Blocks(url, shard), BLOCK) as file:
        if file.read(6).startswith(_COMPRESSED):
            raise StoreError(f"shard {url} is compressed; images are read in place, so unpack it")
        file.seek(0)
        try:
            tar = tarfile.open(fileobj=file, mode="r:", errors="strict")
            for info in tar:
                if info.isreg() and not info.issparse():
                    is_label = info.name.rpartition(".")[2] in LABELS
                    content = tar.extractfile(info).read() if is_label else b""
                    found.append((info.name, info.offset_data, info.size, content))
                elif not info.isdir():
                    raise StoreError(f"shard {url}: {info.name!r} is a link; pack the file itself")
            file.seek(tar.offset)  # at a damaged header tarfile stops without an error
            if file.read(512) != bytes(512):
                bad = f"no end of the archive at {tar.offset:,} of {shard.size:,} bytes"
        except (tarfile.TarError, UnicodeError) as error:
            bad = str(error)
    if bad:
        raise StoreError(f"shard {url} is truncated or no tar ({bad}); copy it again")
    return shard, found


def _objects(url: str) -> list[str]:
    store, path = _store(url)
    folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    chunks = _obstore().list(store, folder or None)
    return [url.removesuffix(path) + one["path"] for chunk in chunks for one in chunk]


def _obstore() -> Any:
    try:
        import obstore
    except ImportError:
        raise StoreError("object stores need obstore: pip install 'workbench[s3]'") from None
    return obstore


def _store(url: str) -> tuple[Any, str]:
    scheme, host, path = urlsplit(url)[:3]
    return _bucket(f"{scheme}://{host}"), path.lstrip("/")


@functools.cache
def _bucket(url: str) -> Any:
    _obstore()
    from obstore.store import from_url

    options = {"timeout": "30s", "connect_timeout": "10s", "allow_http": True}
    return from_url(url, client_options=options, retry_config={"max_retries": 0})


# ---- many requests

_REQUESTS = {"range": _range, "look": _look, "members": _members, "objects": _objects}
_lock, _state = threading.Lock(), {"in_worker": False, "child": None, "env": None}


def in_worker(shards: dict[str, Shard]) -> None:
    """Tells a loader's worker the known shards, and that it forks no process."""
    known.update(shards)
    _state["in_worker"] = True


def _answer(function: Callable, item: Any) -> Any:
    """The result of a request, which is repeated while that may help. Raises StoreError."""
    url = item if isinstance(item, str) else item.url
    for attempt in range(ATTEMPTS):
        try:
            return function(item)
        except StoreError:
            raise
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__module__ != "obstore.exceptions":
                raise
            name, text = type(error).__name__, str(error).partition("\n")[0]
        if name in ("FileNotFoundError", "NotFoundError"):
            raise StoreError(f"shard {url} is missing; put it back, or index the shards again")
        if name == "PreconditionError":
            raise changed(url, item.shard, None)
        if name in ("PermissionDeniedError", "UnauthenticatedError", "PermissionError"):
            raise StoreError(f"shard {url} may not be read ({text}); check the credentials")
        if attempt + 1 < ATTEMPTS:  # processes that failed together do not come back together
            time.sleep(min(30.0, 0.25 * 2**attempt) * (1 + os.getpid() % 16 / 16))
    raise StoreError(
        f"shard {url} cannot be read in {ATTEMPTS} attempts ({text}); the same command resumes"
    )


def _result(name: str, item: Any) -> Any:
    """The result of a request, or its StoreError."""
    try:
        return _answer(_REQUESTS[name], item)
    except StoreError as error:
        return error


def _each(name: str, items: list) -> Iterator[Any]:
    """Results in order, of concurrent requests; raises the first StoreError."""
    if _state["in_worker"]:
        results = _pool().map(functools.partial(_result, name), items)
    else:
        results = _ask(name, items) if items else []
    for result in results:
        if isinstance(result, StoreError):
            raise result
        yield result


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS)


def _ask(name: str, items: list) -> list:
    """Results by the child, which starts again where the environment has changed."""
    code = f"from {__name__} import serve; serve()"
    with _lock:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if env != _state["env"]:
            _end_child()
            _state["env"], _state["child"] = env, subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=env, start_new_session=True,  # Ctrl-C is for the process that asks
            )  # fmt: skip
        child = _state["child"]
        try:
            pickle.dump((name, items), child.stdin)
            child.stdin.flush()
            return [pickle.load(child.stdout) for _ in items]
        except BaseException:  # results that nobody read must not stay in the pipe
            _end_child()
            raise


@atexit.register
def _end_child() -> None:
    if child := _state["child"]:
        _state["child"] = _state["env"] = None
        child.kill()
        child.communicate()


def serve() -> None:
    """Answers (name, items) on standard input with a result for each; ends with its parent."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            name, items = pickle.load(sys.stdin.buffer)
            for result in _pool().map(functools.partial(_result, name), items):
                pickle.dump(result, sys.stdout.buffer)
            sys.stdout.buffer.flush()
