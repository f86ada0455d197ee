"""A request to stop: SIGTERM, or Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from types import FrameType

from quantune.distributed.outcome import LaunchFolder
from quantune.errors import EXIT_DIED, InterruptedRun


class Phase(Enum):
    """What a request to stop finds the run doing."""

    IMPORTING = "importing"
    """Modules are half imported anywhere in here: the request is remembered."""
    LOADING = "loading"
    """There is nothing to save: the run stops at once."""
    TRAINING = "training"
    """The request is remembered until the step in progress is done and saved."""


BEFORE_THE_FIRST_STEP = "stopped before training began; nothing had to be saved, the same command begins where this did"


class StopRequest:
    """Remembers a request to stop for as long as it can't be followed."""

    def __init__(self, report: Callable[[str], None] = lambda text: None) -> None:
        self.signal: int | None = None
        self._interrupted = False
        self._phase = Phase.IMPORTING
        self._report = report

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    def enter(self, phase: Phase) -> None:
        """Say what is done from here on.

        Raises:
            InterruptedRun: asked to stop meanwhile, with nothing to save.
        """
        self._phase = phase
        if phase is Phase.LOADING and self.asked:
            self._stop()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked a second time: stop at once
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.signal = number
        if self._phase is Phase.LOADING:
            self._stop()
        if number == signal.SIGINT:
            when = "after this step, and saving" if self._phase is Phase.TRAINING else "before training"
            self._report(f"stopping {when}; Ctrl-C again aborts at once")

    def _stop(self) -> None:
        folder = LaunchFolder.from_environment()
        if folder is not None and not folder.asked_to_stop():
            if folder.lost_one():
                sys.exit(EXIT_DIED)  # the launcher ends what is left of an attempt in which a process died
            folder.ask_to_stop(signal.SIGTERM)  # the others of this machine would wait for this one
        raise InterruptedRun(BEFORE_THE_FIRST_STEP)

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take over SIGTERM and SIGINT while the context is open."""
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
