"""Ranks watching each other: which of them failed first, and which of them hangs.

Each rank has a thread with a connection of its own to the store where the ranks met. About every second it says that
its process lives, how many collectives its main thread has entered and where that thread is. When the main thread has
made no progress for too long, the rank that has entered the fewest collectives is the one that the others wait for.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import torch.distributed as dist

from quantune.distributed.environment import attempt, meeting_point
from quantune.distributed.world import COLLECTIVES, World
from quantune.errors import EXIT_DIED

LOADING_PATIENCE = 2.0
"""How many timeouts a rank may take for what comes before training."""
INTERVAL = 1.0
"""Seconds between two records."""
STALE = 5.0
"""Seconds after which a rank whose record stays the same has stopped altogether."""
GRACE = 5.0
"""Seconds that a rank has to end by itself after another one has failed."""
PACKAGE = str(Path(__file__).parents[1])
INNERMOST = 8
"""Lines of a stack in which an exchange is looked for."""
EXCHANGES = str(Path(dist.__file__).parent)
Record = dict[str, Any]
"""What a rank says of itself: see `Watch._record`."""


@attrs.frozen(kw_only=True)
class Failure:
    """The first failure of a world."""

    rank: int
    exit_code: int
    final: bool
    """Whether it would come up again if the run were started again."""


@attrs.frozen(kw_only=True)
class Hang:
    """What the ranks wait for."""

    sentence: str
    """For the person."""
    process: int | None = None
    """The process to blame, if it is one."""
    host: str | None = None
    """Where it runs."""


class Board:
    """Where the ranks of an attempt leave word for each other.

    Args:
        timeout: seconds to wait for the store where the ranks meet.
        host: whether there is no such store and this is the process to have it.
    """

    def __init__(self, world: World, timeout: float, *, host: bool = False) -> None:
        self.world = world
        address, port = meeting_point()
        self._root = dist.TCPStore(
            address, port, is_master=host, timeout=timedelta(seconds=timeout), wait_for_workers=False
        )
        self.store = dist.PrefixStore(f"/attempt/{attempt()}/watch", self._root)

    def claim(self, failure: Failure) -> Failure:
        """Report a failure; the first one there was is returned."""
        text = json.dumps(attrs.asdict(failure))
        found = self.store.compare_set("failure", "", text)
        return Failure(**json.loads(found))

    def first(self) -> Failure | None:
        """The first failure there was."""
        return Failure(**json.loads(self.store.get("failure"))) if self.store.check(["failure"]) else None

    def superseded(self) -> bool:
        """Whether another machine's launcher has begun a later attempt: it does not tell this machine's."""
        newest = int(self._root.get("newest attempt")) if self._root.check(["newest attempt"]) else 0
        if newest < attempt():
            self._root.set("newest attempt", str(attempt()))
        return newest > attempt()

    def leave(self) -> int:
        """Say that this rank knows how the attempt ends; returns how many do."""
        return self.store.add("left", 1)

    def left(self) -> int:
        """How many ranks know how the attempt ends."""
        return self.store.add("left", 0)

    def post(self, record: Record) -> None:
        """Say how this rank is."""
        self.store.set(f"rank/{self.world.rank}", json.dumps(record))

    def records(self) -> list[Record | None]:
        """How all ranks were when they last said so, by rank."""
        keys = [f"rank/{rank}" for rank in range(self.world.size)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]


class Watch:
    """Watches the other ranks from a thread of this one.

    Args:
        timeout: seconds without progress after which a rank hangs.
        hung: is told of it, and ends this process.
        ended: is told of the first failure of another rank that this one does not end after by itself, and ends it.
        one_is_gone: whether the launcher has lost a process: over nccl this one would not notice.
    """

    def __init__(
        self,
        world: World,
        timeout: float,
        *,
        hung: Callable[[Hang, Board], None],
        ended: Callable[[Failure, Board], None],
        one_is_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self.world = world
        self.timeout = timeout
        self._hung, self._ended, self._one_is_gone = hung, ended, one_is_gone
        self._beat = time.monotonic()
        self._doing = "meeting the other ranks"
        self._patience = LOADING_PATIENCE
        self._done = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def beat(self, doing: str, patience: float) -> None:
        """The main thread got further; what it does next may take `patience` times the timeout."""
        self._beat = time.monotonic()  # first: the watch must not see the patience of what comes with the old time
        self._doing, self._patience = doing, patience

    def _run(self) -> None:
        entered = COLLECTIVES.entered
        try:
            board = Board(self.world, self.timeout * self._patience)
            while not self._done.is_set():
                board.post(self._record())
                failure = board.first()
                if failure is None and (self._one_is_gone() or board.superseded()):
                    failure = Failure(rank=self.world.rank, exit_code=EXIT_DIED, final=False)
                if failure is not None and not self._done.wait(GRACE):
                    self._ended(failure, board)
                if COLLECTIVES.entered != entered:
                    entered, self._beat = COLLECTIVES.entered, time.monotonic()
                if time.monotonic() - self._beat > self.timeout * self._patience:
                    seen = self._beat, entered
                    hang = self._find(board)
                    if not self._done.is_set() and seen == (self._beat, COLLECTIVES.entered):
                        self._hung(hang, board)
                self._done.wait(INTERVAL)
        except (dist.DistError, RuntimeError):  # the store is gone, and its process with it: the main thread finds out
            return

    def _record(self) -> Record:
        main = sys._current_frames().get(self._main or 0)
        return {
            "time": time.time(),
            "collectives": COLLECTIVES.entered,
            "doing": self._doing,
            "seconds": time.monotonic() - self._beat,
            "where": where(main),
            "waits": _waits(main),
            "process": os.getpid(),
            "host": socket.gethostname(),
        }

    def _find(self, board: Board) -> Hang:
        """Which rank the others wait for."""
        before = board.records()
        begun = time.monotonic()
        while time.monotonic() - begun < STALE and not self._done.wait(INTERVAL):
            board.post(self._record())
        return find_hang(before, board.records())


def find_hang(before: Sequence[Record | None], now: Sequence[Record | None]) -> Hang:
    """Which rank the others wait for, from what all of them said `STALE` seconds ago and say now."""
    missing = [rank for rank, record in enumerate(now) if record is None]
    if missing:
        return Hang(sentence=f"rank {missing[0]} has not come to meet the others")
    records = [record for record in now if record is not None]
    stopped = [rank for rank, record in enumerate(records) if record == before[rank]]
    fewest = min(record["collectives"] for record in records)
    behind = [rank for rank, record in enumerate(records) if record["collectives"] == fewest]
    if len(behind) == len(records):  # what they are in is not counted, or one of them has left it
        behind = [rank for rank, record in enumerate(records) if not record["waits"]]
    if not stopped and len(behind) in (0, len(records)):
        return Hang(
            sentence=f"no rank has made progress for {records[0]['seconds']:.0f} seconds while {records[0]['doing']}, "
            "all of them in the same exchange: the network between them may be gone. Rank 0 is at "
            f"{records[0]['where']}"
        )
    rank = (stopped or behind)[0]
    record = records[rank]
    what = (
        f"has stopped altogether, last seen at {record['where']}"
        if stopped
        else f"has been at {record['where']} for {record['seconds']:.0f} seconds"
    )
    return Hang(
        sentence=f"rank {rank} (process {record['process']} on {record['host']}) {what} while {record['doing']}, and "
        "the others wait for it",
        process=record["process"],
        host=record["host"],
    )


def where(frame: FrameType | None) -> str:
    """The innermost line of quantune's own code that a thread is in, and what it called from there."""
    stack = traceback.extract_stack(frame) if frame is not None else []
    for depth in range(len(stack) - 1, -1, -1):
        entry = stack[depth]
        if entry.filename.startswith(PACKAGE):
            place = f"{Path(entry.filename).relative_to(Path(PACKAGE).parent)}:{entry.lineno}"
            return place if depth + 1 == len(stack) else f"{place} (in {stack[-1].name})"
    return stack[-1].name if stack else "an unknown place"


def _waits(frame: FrameType | None) -> bool:
    """Whether a thread is in torch's exchanges between processes."""
    return any(entry.filename.startswith(EXCHANGES) for entry in traceback.extract_stack(frame, limit=INNERMOST))
