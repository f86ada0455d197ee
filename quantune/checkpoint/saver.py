"""Writing checkpoints while training goes on.

What is saved is captured between two steps; a thread of rank 0 writes, flushes and commits it. The thread is waited for
before the next save and at the end, where all ranks learn whether it succeeded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

import attrs

from quantune.checkpoint.state import TrainingState, write_state
from quantune.checkpoint.store import WRITER, CheckpointStore
from quantune.distributed.world import World
from quantune.errors import CheckpointError, QuantuneError


@attrs.define
class _Save:
    """A checkpoint on its way to the disk."""

    step: int
    thread: threading.Thread = attrs.field(init=False)
    error: Exception | None = None
    """Why it is not committed; final once the thread has ended."""


@attrs.define(kw_only=True, eq=False)
class Saver:
    """Commits checkpoints, one at a time. A context: what is being written when it is left is waited for, unless it is
    left because the run is aborted.
    """

    store: CheckpointStore
    """Where they go."""
    keep: int
    """How many to keep."""
    committed: Callable[[int], None]
    """Told of each step whose checkpoint is committed, on rank 0, by the thread that trains."""
    lost: Callable[[str], None]
    """Told, on rank 0, of a checkpoint that could not be written when the run ends for another reason."""
    prepare: Callable[[], None] = lambda: None
    """Called by the writing thread before it writes."""
    world: World = attrs.field(factory=World)
    _save: _Save | None = attrs.field(init=False, default=None)

    def save(self, step: int, take: Callable[[], TrainingState | None]) -> None:
        """Begin to write the checkpoint of `step`, whose state `take` captures once the one before it is committed. All
        ranks call this; the state is rank 0's.

        Raises:
            CheckpointError: the one before it failed, or capturing this one, on all ranks.
        """
        self.finish()
        state = take()
        if state is not None:
            self._save = save = _Save(step)
            # a daemon: an aborted run does not wait for it, and what it leaves then is no checkpoint
            save.thread = threading.Thread(target=self._write, args=(save, state), name=WRITER, daemon=True)
            save.thread.start()

    def failed(self) -> bool:
        """Whether the checkpoint that this rank was writing has failed. Waits for nothing, and tells of one that is
        committed by now.
        """
        if self._save is None or self._save.thread.is_alive():
            return False
        if self._save.error is None:
            self._announce()
            return False
        return True

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. All ranks call this.

        Raises:
            CheckpointError: it could not be written, on all ranks; nothing of it is published.
        """
        error = self._join()
        reason = self.world.broadcast(None if error is None else str(error))
        if reason is not None:
            self._save = None
            raise CheckpointError(reason) from error
        self._announce()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            return
        reason = self._join()  # the other ranks may be anywhere: they are not asked
        if reason is None:
            self._announce()
        elif self._save is not None:
            self.lost(str(reason))

    def _join(self) -> Exception | None:
        if self._save is None:
            return None
        self._save.thread.join()
        return self._save.error

    def _announce(self) -> None:
        if self._save is not None:
            step, self._save = self._save.step, None
            self.committed(step)

    def _write(self, save: _Save, state: TrainingState) -> None:
        try:
            self.prepare()
            self.store.save(save.step, lambda folder: write_state(folder, state))
            self.store.prune(self.keep)
        except QuantuneError as error:
            save.error = error
        except OSError as error:
            save.error = CheckpointError(
                f"the checkpoint of step {save.step} could not be written: {error}. What was saved before is "
                "untouched; put that right and resume"
            )
        except Exception as error:  # a thread's exception would be lost: `finish` raises it
            save.error = CheckpointError(f"the checkpoint of step {save.step} could not be written: {error!r}")
            save.error.__cause__ = error
