"""A request to stop: SIGTERM, or Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from quantune.distributed.outcome import LaunchFolder
from quantune.errors import EXIT_FAILURE, InterruptedRun

BEFORE_THE_FIRST_STEP = "stopped before training began; nothing had to be saved, the same command begins where this did"


class StopRequest:
    """Remembers a request to stop until the step in progress is done; before there is anything to save it stops at
    once."""

    def __init__(self, report: Callable[[str], None] = lambda text: None) -> None:
        self.signal: int | None = None
        self.training = False
        """Whether there is something to save, so that a request waits for the step in progress."""
        self._report = report

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked a second time: stop at once
        self.signal = number
        if not self.training:
            folder = LaunchFolder.from_environment()
            if folder is not None and not folder.asked_to_stop():  # the launcher ends what is left of an attempt
                sys.exit(EXIT_FAILURE)
            raise InterruptedRun(BEFORE_THE_FIRST_STEP)
        if number == signal.SIGINT:
            self._report("stopping after this step, and saving; Ctrl-C again aborts at once")

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over SIGTERM and SIGINT while the context is open."""
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
