"""One writer at a time on several hosts, without a flock that reaches all of them.

Hosts are processes with other host names; in slow tests they have their own UTS namespaces.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from workbench import ROOT, locks
from workbench.runs import Run, RunError

PROGRAM = """
import errno, fcntl, os, random, socket, sys, time
name, flock, heartbeat, stale, namespace = sys.argv[1:]
def missing(handle, kind):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = {"missing": missing, "local": lambda *_: None, "works": fcntl.flock}[flock]
if namespace == "True":
    socket.sethostname(name)
elif name:
    socket.gethostname = lambda: name
from workbench import locks
from workbench.runs import Run, RunError
locks.HEARTBEAT_SECONDS, locks.STALE_SECONDS = float(heartbeat), float(stale)

def race(path, seed):
    time.sleep(random.Random(seed).random() / 100)
    with Run(path).writing() as run:
        os.close(os.open(run.file("busy"), os.O_CREAT | os.O_EXCL))  # fails if there are two
        time.sleep(0.02)
        run.append("writers.csv", {"host": name})
        os.unlink(run.file("busy"))

def take(path):
    global run, context
    start = time.monotonic()
    context = Run(path).writing()  # held until it is closed
    run = context.__enter__()
    run.set_status("running", message=name)
    return time.monotonic() - start

def fork():
    started, starts = os.pipe()
    if process := os.fork():
        os.read(started, 1)
        return process
    os.write(starts, b"1")  # after what a fork does first: it has closed the lock
    time.sleep(600)

for line in sys.stdin:
    try:
        answer = eval(line)
    except RunError as error:
        answer = f"RunError: {error}"
    except Exception as error:
        answer = repr(error)
    print(repr(answer), flush=True)
"""


class Host:
    """A process that evaluates expressions, one a line."""

    def __init__(self, name, flock, heartbeat=0.1, stale=2.0, namespace=False):
        command = [sys.executable, "-c", PROGRAM, name, flock, str(heartbeat), str(stale)]
        command = ["unshare", "--uts"] * namespace + [*command, str(namespace)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)
        self.name, self.said = name, ""

    def start(self, text: str) -> None:
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def answer(self):
        return eval(self.process.stdout.readline())

    def do(self, text: str):
        self.start(text)
        return self.answer()

    def end(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.said += self.process.communicate()[1]


@pytest.fixture
def hosts():
    """Makes hosts; they are killed at the end."""
    with contextlib.ExitStack() as stack:

        def made(*arguments, **options):
            host = Host(*arguments, **options)
            stack.callback(host.end)
            return host

        yield made


def abandoned(path: Path, number: int) -> None:
    """A run folder whose writer on another host died long ago."""
    path.mkdir()
    owner = {"process": 7, "started": "1", "host": "gone", "machine": "gone", "job": "12"}
    (path / f"lock.{number}").write_text(json.dumps(owner))
    os.utime(path / f"lock.{number}", (1, 1))


def raced(starters: list[Host], folder: Path, races: int) -> None:
    for number in range(races):
        path = folder / str(number)
        if number % 10 == 9:
            abandoned(path, number)
        for one in starters:
            one.start(f"race({str(path)!r}, {number})")
        answers = [one.answer() for one in starters]
        lost = [answer for answer in answers if answer is not None]
        assert all(" is being written by " in answer for answer in lost), answers
        wins = len(answers) - len(lost)
        assert wins == len(Run(path).text("writers.csv").splitlines()) - 1 > 0
        files = {*os.listdir(path)} - {"lock", "writers.csv"}
        assert files == {f"lock.{wins + number * (number % 10 == 9)}"}


@pytest.mark.parametrize("flock", ["missing", "local"])
def test_of_starters_on_two_hosts_only_one_writes_at_a_time(hosts, tmp_path, flock):
    raced([hosts(name, flock, stale=1.0) for name in ("n1", "n2")], tmp_path, 10)


@pytest.mark.slow
@pytest.mark.parametrize("flock", ["missing", "local"])
def test_of_starters_in_three_namespaces_only_one_writes_at_a_time(hosts, tmp_path, flock):
    done = subprocess.run(["unshare", "--uts", "true"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no UTS namespaces here: {done.stderr}")
    raced([hosts(name, flock, namespace=True) for name in ("n1", "n2", "n3")], tmp_path, 200)


@pytest.mark.parametrize("flock", ["missing", "local"])
def test_a_live_run_of_another_host_is_running_and_closed_to_others(hosts, tmp_path, flock):
    writer, other, run = hosts("n3", flock), hosts("n4", flock), Run(tmp_path / "run")
    writer.do(f"take({str(run.path)!r})")
    name = f"process {writer.do('os.getpid()')} on n3"
    run.path.chmod(0o555)
    state = "(Run(path).status()['state'], Run(path).locked(), Run(path).writer())"
    assert other.do(state.replace("path", repr(str(run.path)))) == ("running", True, name)
    run.path.chmod(0o755)
    assert f"is being written by {name}; wait" in other.do(f"take({str(run.path)!r})")
    assert writer.do("run.append('steps.csv', {'step': 1})") is None
    writer.do("context.__exit__(None, None, None)")
    assert not run.locked() and run.status()["state"] == "interrupted"
    assert other.do(f"take({str(run.path)!r})") < 2  # at once, since the lock was released


@pytest.mark.parametrize("flock", ["missing", "local"])
def test_a_writer_killed_on_another_host_is_replaced_after_the_time_and_named(
    hosts, tmp_path, flock
):
    first, second = hosts("n1", flock), hosts("n2", flock)
    first.do(f"take({str(tmp_path)!r})")
    first.process.kill()
    assert second.do(f"take({str(tmp_path)!r})") >= 2.0
    second.end()
    name = f"process {first.process.pid} on n1"
    assert f"waits up to 2 s for a heartbeat of {name}\n" in second.said
    assert f"taken over from {name}, which had none for 2 s\n" in second.said
    assert Run(tmp_path).status()["message"] == "n2"


@pytest.mark.parametrize("flock", ["missing", "local"])
def test_a_suspended_writer_that_was_replaced_writes_nothing_more(hosts, tmp_path, flock):
    first, second = hosts("n1", flock, stale=1.0), hosts("n2", flock, stale=1.0)
    first.do(f"take({str(tmp_path)!r})")
    first.do("run.append('steps.csv', {'step': 1})")
    first.process.send_signal(signal.SIGSTOP)
    second.do(f"take({str(tmp_path)!r})")
    (tmp_path / "STOP").touch()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    first.process.send_signal(signal.SIGCONT)
    for call in (
        "run.append('steps.csv', {'step': 2})",
        "run.set_status('stopped')",
        "run.save_checkpoint({})",
        "run.truncate_after(0)",
        "run.remove_requests()",
    ):
        assert f"process {second.process.pid} on n2 has taken over" in first.do(call)
    first.do("context.__exit__(None, None, None)")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert second.do("run.append('steps.csv', {'step': 2})") is None


@pytest.mark.parametrize("flock", ["missing", "works"])
def test_a_writer_killed_on_the_same_host_is_replaced_without_waiting(hosts, tmp_path, flock):
    """Its forked processes hold no lock and have no heartbeat."""
    first, second = (hosts("", flock, stale=600) for _ in range(2))
    first.do(f"take({str(tmp_path)!r})")
    worker = first.do("fork()")
    try:
        first.process.kill()
        first.process.wait()
        assert Run(tmp_path).status()["state"] == "interrupted"
        assert second.do(f"take({str(tmp_path)!r})") < 60
    finally:
        os.kill(worker, signal.SIGKILL)
    second.end()
    assert second.said == ""


def test_a_forked_process_of_a_killed_writer_has_no_heartbeat(hosts, tmp_path):
    first, second = hosts("n1", "missing"), hosts("n2", "missing")
    first.do(f"take({str(tmp_path)!r})")
    worker = first.do("fork()")
    try:
        first.process.kill()
        assert second.do(f"take({str(tmp_path)!r})") >= 2.0
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_second_writer_of_the_same_process_is_refused_without_flock(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    run = Run(tmp_path)
    with run.writing():
        with pytest.raises(RunError, match=f"being written by process {os.getpid()} on "):
            with Run(tmp_path).writing():
                pytest.fail("two writers")
        assert run.locked()
    assert not run.locked()


def no_flock(handle, kind):
    raise OSError(errno.ENOLCK, "No locks available")


def test_the_writer_of_a_job_is_named_with_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    with Run(tmp_path).writing() as run:
        assert run.writer() == f"process {os.getpid()} on {socket.gethostname()} (job 41)"
        assert run.writer() == locks.this_process()


def test_a_run_that_an_older_version_writes_is_closed_and_opens_afterwards(tmp_path):
    """It has the lock on a file with its name, and no other file."""
    run = Run(tmp_path)
    run.file("lock").write_text("process 12 on old")
    with run.file("lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.writer() == "process 12 on old"
        with pytest.raises(RunError, match="is being written by process 12 on old; wait"):
            with run.writing():
                pytest.fail("two writers")
    assert (run.writer(), run.locked()) == ("", False)
    with run.writing():
        assert run.writer() == locks.this_process()


@pytest.mark.parametrize("text", ["", "{", "note"])
def test_an_owner_file_that_cannot_be_read_is_replaced_after_the_time(tmp_path, monkeypatch, text):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    (tmp_path / "lock.3").write_text(text)
    start = time.monotonic()
    with Run(tmp_path).writing():
        assert time.monotonic() - start > 0.5
    assert sorted(os.listdir(tmp_path)) == ["lock", "lock.4"]


def test_a_writer_whose_folder_was_removed_ends_without_another_error(tmp_path):
    with Run(tmp_path / "run").writing() as run:
        shutil.rmtree(run.path)
    assert not run.path.exists() and not run.locked()


def test_who_took_an_old_number_withdraws_and_takes_a_higher_one(tmp_path, monkeypatch):
    """Another process took two higher numbers while this one created its file."""
    sync = os.fsync

    def meanwhile(handle):
        monkeypatch.setattr(os, "fsync", sync)
        (tmp_path / "lock.6").write_text('{"process": 1, "host": "n9", "released": ""}')

    monkeypatch.setattr(os, "fsync", meanwhile)
    (tmp_path / "lock.3").write_text('{"process": 1, "host": "n9", "released": ""}')
    with Run(tmp_path).writing():
        assert sorted(os.listdir(tmp_path)) == ["lock", "lock.7"]
