"""Locks: one writer at a time, also where flock does not reach other machines.

flock ends with its process, but some shared filesystems lack it (Lustre: ENOSYS), and others keep
it on each machine (NFS with local_lock). `owning` adds a file that all machines see: `<path>.<n>`.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 10.0  # between two changes of the owner file's modification time
STALE_SECONDS = 60.0  # without a change: the owner is dead

_open: set[int] = set()  # file descriptors; loader processes must not hold the lock
os.register_at_fork(after_in_child=lambda: [os.close(_open.pop()) for _ in [*_open]])


def _flock(handle: int, kind: int) -> bool | None:
    """Whether the lock was free; None where the filesystem has no flock."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:  # ENOSYS, ENOLCK, EOPNOTSUPP
        return False if isinstance(error, BlockingIOError) else None
    return True


@contextlib.contextmanager
def locking(path: Path, wait: float = 0.4) -> Iterator[tuple[int, bool | None]]:
    """A file descriptor, and whether this process got the flock; None where there is no flock.

    The file is created if missing; the lock ends with the context, or with the process. Other
    machines may not see it. It is retried for `wait` seconds: readers hold it for a moment.
    """
    handle, end = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic() + wait
    _open.add(handle)
    try:
        while (ours := _flock(handle, fcntl.LOCK_EX)) is False and time.monotonic() < end:
            time.sleep(0.02)
        yield handle, ours
    finally:
        if handle in _open:  # not in a forked process
            _open.remove(handle)
            os.close(handle)


class Owner:
    """The file `<path>.<n>`, which names the process that has the lock of `path`.

    A process that wants the lock reads the highest number n. If that owner has released it, is
    known to be dead, or did not change the file's modification time for STALE_SECONDS by the clock
    of the waiting process, `<path>.<n + 1>` is created, exclusively. A process that then finds a
    higher number removes its file and starts again; otherwise it removes the lower ones and owns
    the lock.

    The file with the highest number is never removed, so numbers only grow: one who looked long ago
    either cannot create n + 1, or finds a higher number afterwards. An owner's file is gone before
    the next one writes, so an owner that was suspended learns from `lost` that it is none any more.
    What it writes just after asking, if it is suspended in between for so long, is not prevented.
    """

    def __init__(self, path: Path):
        self.path, self.ours, self._file = path, False, path
        self._this, self._released = _this(), threading.Event()

    def claim(self, flock: bool | None, wait: bool) -> None:
        """Takes the lock, unless another process has a heartbeat."""
        say = lambda text: print(f"{self.path}: {text}", file=sys.stderr, flush=True)
        seen, since = None, 0.0
        while not self.ours:
            now, last = time.monotonic(), _last(self.path)  # in this order: it may be suspended
            number, owner, _ = last
            if number and not _has_ended(owner, flock):
                if seen not in (None, last) and not wait:
                    return
                if seen is None:
                    say(f"waits up to {STALE_SECONDS:.0f} s for a heartbeat of {_name(owner)}")
                if seen != last:
                    seen, since = last, time.monotonic()
                if now - since < STALE_SECONDS:
                    time.sleep(HEARTBEAT_SECONDS / 20)
                    continue
                say(f"taken over from {_name(owner)}, which had none for {STALE_SECONDS:.0f} s")
            self._create(number + 1)
        threading.Thread(target=self._beat, daemon=True).start()

    def _create(self, number: int) -> None:
        self._file = self.path.with_name(f"{self.path.name}.{number}")
        try:
            with open(self._file, "x") as file:
                file.write(json.dumps(self._this))
                file.flush()
                os.fsync(file.fileno())  # so that other machines can read it
        except FileExistsError:  # another process was faster; the listing here may be old
            return time.sleep(0.02)
        except OSError:  # a full disk
            self._file.unlink(missing_ok=True)
            raise
        self.ours = max(numbers := _numbers(self.path), default=0) == number
        for obsolete in {*numbers} - {number} if self.ours else {number}:
            self._file.with_suffix(f".{obsolete}").unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def name(self) -> str:
        """ "process 12 on host"."""
        number, owner, _ = _last(self.path)
        if number and "released" not in owner:
            return _name(owner)
        return self.path.read_text(errors="replace") or _name({})  # of an older version

    def lost(self) -> str:
        """Why the lock is no longer this process's; "" if it is. Raises OSError."""
        try:
            if self._file.read_text() == json.dumps(self._this):
                return ""
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # NFS: removed elsewhere
                raise
        return f"{self.name()} has taken over its lock while this process was suspended"

    def release(self) -> None:
        """Ends the heartbeat; the file stays, and says that the lock is released."""
        self._released.set()
        with contextlib.suppress(OSError):  # the folder was removed
            if self.ours and self._this["process"] == os.getpid() and not self.lost():
                with self._file.open("r+") as file:  # never empty, should this be killed
                    file.write(json.dumps(self._this | {"released": time.ctime()}))


@contextlib.contextmanager
def owning(path: Path, wait: bool = False) -> Iterator[Owner]:
    """The lock of `path`, which this process has if `ours`. Raises OSError.

    If its last owner was on another machine and did not release it, this takes a heartbeat, or
    STALE_SECONDS; with `wait`, until the lock is free.
    """
    with locking(path, float("inf") if wait else 0.4) as (_, flock):
        owner = Owner(path)
        try:
            if flock is not False:
                owner.claim(flock, wait)
            yield owner
        finally:
            owner.release()


def is_owned(path: Path) -> bool:
    """Whether a process, here or on another machine, has the lock of `path`; answers at once.

    Needs no write permission. Clocks of other machines may differ by STALE_SECONDS.
    """
    flock = None
    with contextlib.suppress(OSError), open(path, "rb") as file:
        flock = _flock(file.fileno(), fcntl.LOCK_SH)
    number, owner, changed = _last(path)
    recent = abs(time.time() - changed) < 2 * STALE_SECONDS
    return flock is False or (number > 0 and recent and not _has_ended(owner, flock))


def this_process() -> str:
    """What Owner.name and Run.writer return for this process."""
    return _name(_this())


def _name(owner: dict[str, Any]) -> str:
    job = f" (job {owner['job']})" if owner.get("job") else ""
    return f"process {owner['process']} on {owner['host']}{job}" if owner else "another process"


def _this() -> dict[str, Any]:
    machine = ""
    with contextlib.suppress(OSError):  # Linux; numbers of processes differ by namespace
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine += f" {os.readlink('/proc/self/ns/pid')}"
    here = {"host": socket.gethostname(), "machine": machine, "job": os.getenv("SLURM_JOB_ID")}
    return {"process": os.getpid(), "started": started(os.getpid())} | here


def started(process: int) -> str:
    """Clock ticks from boot to the start of a process; "" if it has ended, or not on Linux."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""


def _has_ended(owner: dict[str, Any], flock: bool | None) -> bool:
    """Whether an owner has released the lock, or was on this machine and is known to be dead."""
    here = _this()
    if "released" in owner or any(owner.get(key) != here[key] for key in ("host", "machine")):
        return "released" in owner
    return bool(flock) or started(owner["process"]) != owner["started"]


def _numbers(path: Path) -> list[int]:
    """Of the owner files, if there is such a folder."""
    names = [other.name.rpartition(".") for other in path.parent.glob(f"{path.name}.*")]
    return [int(n) for name, _, n in names if name == path.name and n.isdecimal()]


def _last(path: Path) -> tuple[int, dict[str, Any], float]:
    """Number, content and modification time of the last owner file; number 0 if there is none."""
    number = 0
    for _ in range(20):  # the next owner may just remove it
        with contextlib.suppress(OSError, ValueError):
            if not (number := max(_numbers(path), default=0)):
                break
            with open(path.with_name(f"{path.name}.{number}"), "rb") as file:
                changed = os.fstat(file.fileno()).st_mtime  # NFS asks the server when opening
                return number, json.loads(file.read()), changed
        time.sleep(0.005)
    return number, {}, 0.0
