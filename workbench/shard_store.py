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
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LABELS = ("cls", "json", "txt")  # members of a WebDataset sample that may have its label
REQUESTS = 16  # at once, of every process
SECONDS = float(os.environ.get("WORKBENCH_STORE_SECONDS") or 120)  # for which requests are repeated
BLOCK = 2**20  # bytes at a time for a listing; of larger members it reads the headers alone
_PLACE = re.compile(r"(.+?)::(\d+)\+(\d+):.*", re.DOTALL)
_CHANGED = "has changed since it was indexed; put it back, or index the shards again"
_MISSING = "is missing"
_NO_KEYS = (
    "needs credentials, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or GOOGLE_APPLICATION_CREDENTIALS for gs://; AWS_SKIP_SIGNATURE=true and "
    "GOOGLE_SKIP_SIGNATURE=true are for public buckets"
)
_NO_PARTS = "is on a server that gives no parts of a file"
_NO_CERTIFICATE = "set SSL_CERT_FILE to a file with the certificates of authorities to trust"
# What is not repeated, by the class of an error or a pattern in its text
_FINAL = {
    "PreconditionError": _CHANGED,
    "HEAD .* code: 405": "is on a server that does not answer HEAD requests",  # a NotFoundError too
    "NotFoundError": _MISSING,
    "FileNotFoundError": _MISSING,
    "IsADirectoryError": "is a folder; name the tar files in it, as in FOLDER/*.tar",
    "PermissionError": "may not be read by this user",
    "PermissionDeniedError": "may not be read with these credentials (403), or is missing",
    "UnauthenticatedError": _NO_KEYS,
    "NotSupportedError": _NO_PARTS,
    "InvalidPathError": "has a name that obstore refuses, such as one with //",
    "NoSuchBucket": "is in a bucket that does not exist",
    "PROPFIND (response|.* code: (4|501))": (
        "is on a server that lists no files; name the shards, as in {00000..00009}.tar"
    ),
    "169.254.169.254": _NO_KEYS,  # where a machine of a cloud asks for credentials
    "non-partial response": f"{_NO_PARTS}, or is stored with Content-Encoding: gzip",
    "Header missing": "comes without size or ETag, as one stored with Content-Encoding: gzip does",
    "neither ETag": "is on a server that does not say when or whether a file changed",
    r"InvalidCertificate\(\s*(Not|Exp)": "is on a server with a certificate for other names or days",
    r"InvalidCertificate\(": f"is on a server with a certificate not trusted; {_NO_CERTIFICATE}",
    "InvalidContentType": "is on a server that answers without TLS; write http://",
    "following redirect": "is redirected from https:// to http://, or without end",
}


class StoreError(OSError):
    """A shard is missing, has changed or cannot be read; the text names it and what to do."""


class StoreUnavailable(StoreError):
    """A store did not answer; a run can be resumed when it does again."""


Shard = tuple[int, str]  # size, and ETag of an object or time of the last change of a file
_answered: set[bool] = set()  # not empty once a request of this process succeeded
_said = [-60.0]  # when this process said that it tries again
known: dict[str, Shard] = {}  # by path or URL, the shards of every index that was opened
cache: Any = None  # shard_cache.ShardCache of the training in this process


def read(
    places: Iterable[str], shards: Mapping[str, Shard] | None = None
) -> Iterator[bytes | None]:
    """The bytes at these places (see image_files), read at once; None where no shard is named.

    `shards` are those of the index, by default of the last one that was opened with a URL. Raises
    StoreError where a shard is not the one that was indexed, or does not answer.
    """
    found, shards = [], shards or known
    for part in map(_PLACE.fullmatch, places):
        mine = part and (part[1] in shards or "://" in part[1])
        found.append((part[1], int(part[2]), int(part[3]), shards.get(part[1])) if mine else None)
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
            content = one and _answer("read", threading.Event(), one)
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
        now, content = _shard(found.meta), bytes(found.bytes()) if size else b""
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
    if not (found["e_tag"] or found["last_modified"].timestamp()):  # obstore puts in 1970
        raise OSError("neither ETag nor Last-Modified")
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
                    is_label = info.name.rpartition(".")[2].lower() in LABELS
                    content = tar.extractfile(info).read() if is_label else b""
                    found.append((info.name, info.offset_data, info.size, content))
                elif not info.isdir():
                    kind = "sparse" if info.issparse() else "a link" if info.linkname else "no file"
                    raise tarfile.ReadError(f"{info.name!r} is {kind}")
            archive.seek(tar.offset)  # at a damaged header tarfile ends without an error
            if archive.read(512) != bytes(512):
                raise tarfile.ReadError(f"it ends at {tar.offset:,} of {shard[0]:,} bytes")
            if any(part.strip(b"\0") for part in iter(lambda: archive.read(BLOCK), b"")):
                raise tarfile.ReadError("there is another tar behind its end")
        except UnicodeDecodeError as error:
            raise StoreError(f"shard {url}: {error.object!r} is no UTF-8 name; rename it") from None
        except tarfile.TarError as error:
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
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    return _bucket(f"{scheme}://{host}"), path.lstrip("/")


@functools.cache
def _bucket(url: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError:
        raise StoreError("object stores need obstore: pip install 'workbench[s3]'") from None
    options = {"timeout": "30s", "connect_timeout": "10s"}
    options["allow_http"] = not url.startswith("https:")  # nor after a redirect
    try:
        return from_url(url, client_options=options, retry_config={"max_retries": 0})
    except Exception as error:  # an unknown scheme, or an option that is missing
        text = str(error).partition("\n")[0]
        wrong = f"cannot be opened ({text}); see obstore's from_url"
        wrong = f"cannot be opened: {_NO_CERTIFICATE}" if "No CA cert" in str(error) else wrong
        raise StoreError(f"{url} {_NO_KEYS if 'AccessKey' in text else wrong}") from None


def _answer(name: str, stop: threading.Event, item: Any) -> Any:
    """The result of a request, which is repeated while that may help, or a StoreError."""
    item = (item,) if isinstance(item, str) else item
    end, wait = time.monotonic() + SECONDS, 0.25
    while True:
        try:
            found = {"read": _read, "look": _look, "list": _list, "below": _below}[name](*item)
            _answered.add(True)
            return found
        except StoreError as error:
            return error
        except Exception as error:
            kind, text = type(error), str(error)
            if not (isinstance(error, OSError) or kind.__module__ == "obstore.exceptions"):
                raise
        for sign, meaning in _FINAL.items():
            # Where they were found before, credentials may be out of reach for a while.
            early = name == "read" and (_answered or time.monotonic() < end - SECONDS + 10)
            if sign == kind.__name__ or (re.search(sign, text) and not early):
                advice = "; put it back, or index the shards again" * (name in ("read", "look"))
                advice += "; names stand here as they are, a space not as %20" * ("%" in item[0])
                return StoreError(f"shard {item[0]} {meaning}" + advice * (meaning == _MISSING))
        text = ": ".join(text.splitlines()[:1] + re.findall('(?:error|message): "(.+)"', text)[-1:])
        if wait == 8.0 and time.monotonic() - _said[0] > 60:
            _said[0] = time.monotonic()
            print(f"shard {item[0]}: {text}; trying again", file=sys.stderr)
        # Processes that failed together do not come back together.
        pause = wait * (1 + os.getpid() % 16 / 16)
        if time.monotonic() + pause > end or stop.wait(pause):
            text = f"does not answer for {SECONDS:g} s ({text})"
            return StoreUnavailable(f"shard {item[0]} {text}; the same command resumes")
        wait = min(30.0, 2 * wait)


def each(name: str, items: Iterable) -> Iterator[Any]:
    """Results in order of concurrent requests: "look" (Shard) or "list" of URLs, "below" of one.

    Raises the first StoreError.
    """
    if not (items := list(items)):
        return
    if multiprocessing.current_process().daemon:  # as the loaders' workers, which fork no process
        results = _answers(name, items)
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


def _answers(name: str, items: list) -> Iterator[Any]:
    """Results up to the first StoreError, with which the other requests end."""
    stop = threading.Event()
    results = _pool().map(functools.partial(_answer, name, stop), items)
    try:
        for result in results:
            yield result
            if isinstance(result, StoreError):
                return
    finally:
        stop.set()
        results.close()  # those that wait are not made


def answer_all() -> None:
    """Writes the results for the (name, items) on standard input; ends with its parent."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    name, items = pickle.load(sys.stdin.buffer)
    pickle.dump([*_answers(name, items)], sys.stdout.buffer)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    with contextlib.suppress(ImportError):  # threads that import it at once can get half of it
        import obstore.store  # noqa: F401
    return ThreadPoolExecutor(REQUESTS)
