"""Requests to stop or pause a training, noticed between two steps or batches of validation."""

import signal
import threading
import time
from types import FrameType
from typing import Self

from workbench import runs

CONTINUE, SAVE, PAUSE, STOP = range(4)  # of several processes the largest counts


class Stopped(Exception):
    """A stop was requested during a validation, which is repeated after a resume."""


class StopRequest:
    """Notices Ctrl-C, SIGTERM, an event, and the files STOP and PAUSE, without interrupting a step.

    Inside `with`, signals wait for the end of the step; a second Ctrl-C interrupts at once.
    """

    def __init__(self, run: runs.Run | None, event: threading.Event):
        self.run, self.event = run, event
        self.signal: str | None = None
        self._next_check = 0.0
        self._found = ""  # the file
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"

    def reason(self) -> str | None:
        """What requested a stop, None if nothing did."""
        if self.signal:
            return self.signal
        if self.event.is_set():
            return "request"
        return "the STOP file" if self._file() == "STOP" else None

    def action(self) -> int:
        """STOP, PAUSE or CONTINUE."""
        return STOP if self.reason() else PAUSE if self._file() else CONTINUE

    def _file(self) -> str:
        """STOP, PAUSE or "", as found when the folder was last read."""
        if self.run is not None and (start := time.monotonic()) >= self._next_check:
            there = [name for name in runs.REQUESTS if self.run.file(name).exists()]
            self._found, end = next(iter(there), ""), time.monotonic()
            self._next_check = end + 50 * (end - start)  # at most 2 % of the time, on any disk
        return self._found
