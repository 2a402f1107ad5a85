"""Bytes and files of tar shards, on a disk or in an object store, or an error that names a shard.

    [content] = read(["s3://bucket/train/00000.tar::1536+1042:cat/0.jpg"])

obstore's threads do not survive a fork, so every process has a child of its own that uses it.
"""

import atexit
import contextlib
import functools
import os
import pickle
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import urlsplit

LABELS = ("cls", "json", "txt")  # members of a WebDataset sample that may have its label
REQUESTS = 16  # at once, of every process
ATTEMPTS = 10  # of each request, with waits of 0.25, 0.5, ... to 30 seconds: two minutes in all
BLOCK = 2**16  # bytes; of larger members a listing reads the headers alone
_PLACE = re.compile(r"(.+?)::(\d+)\+(\d+):.*", re.DOTALL)
_MISSING = "is missing; put it back, or index the shards again"
_FINAL = {  # errors after which nothing is tried again
    "FileNotFoundError": _MISSING,
    "NotFoundError": _MISSING,
    "PreconditionError": "has changed since it was indexed; put it back, or index the shards again",
}


class StoreError(OSError):
    """A shard is missing, has changed or cannot be read; the text names it and what to do."""


class Shard(NamedTuple):
    """What a shard has to be for its index to hold."""

    size: int
    version: str  # ETag of an object, time of the last change of a file


Members = list[tuple[str, int, int, bytes]]  # name, offset, size and, of LABELS, the content
known: dict[str, Shard] = {}  # by path or URL, the shards of every index that was opened


def is_remote(path: str) -> bool:
    return "://" in path


def read(places: Iterable[str]) -> Iterator[bytes | None]:
    """The bytes at these places (see image_files), read at once; None where no shard is named.

    Raises StoreError where a shard is not the one that was indexed, or does not answer.
    """
    found = []
    for place in places:
        part = _PLACE.fullmatch(place)
        mine = part and (part[1] in known or is_remote(part[1]))
        found.append((part[1], int(part[2]), int(part[3]), known.get(part[1])) if mine else None)
    remote = each("read", [one for one in found if one and is_remote(one[0])])
    for one in found:
        yield one and (next(remote) if is_remote(one[0]) else _answer("read", one))


def check(shards: dict[str, Shard]) -> None:
    """Raises StoreError where a shard is missing or has changed since it was indexed."""
    for (url, shard), now in zip(shards.items(), each("look", shards), strict=True):
        _compare(url, shard, now)


# ---- one request


def _read(url: str, start: int, size: int, shard: Shard | None) -> bytes:
    if not is_remote(url):
        with open(url, "rb", buffering=0) as file:
            _compare(url, shard, _of_file(os.fstat(file.fileno())))
            content = os.pread(file.fileno(), size, start)
    else:
        options = {"range": (start, start + max(1, size))}  # there is no empty range
        if shard and shard.version.startswith('"'):
            options["if_match"] = shard.version
        found = _obstore().get(*_store(url), options=options)
        _compare(url, shard, _of_object(found.meta))
        content = bytes(found.bytes())[:size]
    if len(content) != size:
        raise OSError(f"{len(content)} bytes came, not {size}")
    return content


def _compare(url: str, before: Shard | None, now: Shard) -> None:
    if before and before != now:
        text = f"{before.size:,} bytes, {before.version}; now {now.size:,} bytes, {now.version}"
        text = f"shard {url} has changed since it was indexed ({text}); put it back, or index the"
        raise StoreError(f"{text} shards again for a run with another name")


def _look(url: str) -> Shard:
    if is_remote(url):
        return _of_object(_obstore().head(*_store(url)))
    return _of_file(os.stat(url))


def _of_file(found: os.stat_result) -> Shard:
    return Shard(found.st_size, str(found.st_mtime_ns))


def _of_object(found: dict[str, Any]) -> Shard:
    return Shard(found["size"], found["e_tag"] or found["last_modified"].isoformat())


def _list(url: str) -> tuple[Shard, Members]:
    shard, found = _look(url), []
    if is_remote(url):
        reader = _obstore().open_reader(*_store(url), buffer_size=BLOCK)
        as_bytes = lambda size: bytes(reader.read(size))
        file = SimpleNamespace(read=as_bytes, seek=reader.seek, tell=reader.tell)
    else:
        file = open(url, "rb")
    with contextlib.closing(reader if is_remote(url) else file):
        try:
            tar = tarfile.open(fileobj=file, mode="r:", errors="strict")
            for info in tar:
                if info.isreg() and not info.issparse():
                    is_label = info.name.rpartition(".")[2] in LABELS
                    content = tar.extractfile(info).read() if is_label else b""
                    found.append((info.name, info.offset_data, info.size, content))
                elif not info.isdir():
                    raise tarfile.ReadError(f"{info.name!r} is a link")
            file.seek(tar.offset)  # at a damaged header tarfile ends without an error
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"it ends at {tar.offset:,} of {shard.size:,} bytes")
        except (tarfile.TarError, UnicodeError) as error:
            text = f"is truncated, compressed or no plain tar ({error}); copy or pack it again"
            raise StoreError(f"shard {url} {text}") from None
    _compare(url, shard, _look(url))
    return shard, found


def _below(url: str) -> list[str]:
    """The URLs of all objects below the folder that a pattern begins with."""
    store, path = _store(url)
    folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0]
    chunks = _obstore().list(store, folder or None)
    return [url.removesuffix(path) + one["path"] for chunk in chunks for one in chunk]


def _obstore() -> Any:
    try:
        import obstore.store
    except ImportError:
        raise StoreError("object stores need obstore: pip install 'workbench[s3]'") from None
    return obstore


def _store(url: str) -> tuple[Any, str]:
    scheme, host, path = urlsplit(url)[:3]
    return _bucket(f"{scheme}://{host}"), path.lstrip("/")


@functools.cache
def _bucket(url: str) -> Any:
    options = {"timeout": "30s", "connect_timeout": "10s", "allow_http": True}
    return _obstore().store.from_url(url, client_options=options, retry_config={"max_retries": 2})


def _answer(name: str, item: Any) -> Any:
    """The result of a request, which is repeated while that may help. Raises StoreError."""
    item = (item,) if isinstance(item, str) else item
    for attempt in range(ATTEMPTS):
        try:
            return {"read": _read, "look": _look, "list": _list, "below": _below}[name](*item)
        except Exception as error:
            ours = type(error).__module__ == "obstore.exceptions"
            if isinstance(error, StoreError) or not (ours or isinstance(error, OSError)):
                raise
            kind, text = type(error).__name__, str(error).partition("\n")[0]
        if kind in _FINAL:
            raise StoreError(f"shard {item[0]} {_FINAL[kind]}")
        if attempt + 1 < ATTEMPTS:  # processes that failed together do not come back together
            time.sleep(min(30.0, 0.25 * 2**attempt) * (1 + os.getpid() % 16 / 16))
    text = f"cannot be read in {ATTEMPTS} attempts ({text}); the same command resumes"
    raise StoreError(f"shard {item[0]} {text}")


# ---- the child

_lock, _state = threading.Lock(), {"child": None, "env": None, "pid": 0}


def each(name: str, items: Iterable) -> Iterator[Any]:
    """Results in order of concurrent requests: "look" (Shard) or "list" of URLs, "below" of one.

    Raises the first StoreError.
    """
    if not (items := list(items)):
        return
    with _lock:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if (env, os.getpid()) != (_state["env"], _state["pid"]):
            _end_child()
            command = [sys.executable, "-c", f"from {__name__} import serve; serve({ATTEMPTS})"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": env}
            # Ctrl-C is for the process that asks.
            child = subprocess.Popen(command, start_new_session=True, **pipes)
            _state.update(child=child, env=env, pid=os.getpid())
        child = _state["child"]
        try:
            pickle.dump((name, items), child.stdin)
            child.stdin.flush()
            for _ in items:
                if isinstance(result := pickle.load(child.stdout), StoreError):
                    raise result
                yield result
        except BaseException:  # results that nobody reads must not stay in the pipe
            _end_child()
            raise


@atexit.register
def _end_child() -> None:
    if _state["child"] and _state["pid"] == os.getpid():
        _state["child"].kill()
        _state["child"].communicate()
    _state.update(child=None, env=None)


def serve(attempts: int) -> None:
    """Answers (name, items) on standard input with a result for each; ends with its parent."""
    global ATTEMPTS
    ATTEMPTS = attempts

    def result(name: str, item: Any) -> Any:
        try:
            return _answer(name, item)
        except StoreError as error:
            return error

    with contextlib.suppress(EOFError, BrokenPipeError), ThreadPoolExecutor(REQUESTS) as pool:
        while True:
            name, items = pickle.load(sys.stdin.buffer)
            for answer in pool.map(functools.partial(result, name), items):
                pickle.dump(answer, sys.stdout.buffer)
                sys.stdout.buffer.flush()
