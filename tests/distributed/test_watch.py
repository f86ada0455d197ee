"""Ranks watching each other, and ending with one voice."""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
from ranks import on_ranks

from quantune.distributed import watch, worker
from quantune.distributed.outcome import FOLDER, LaunchFolder
from quantune.distributed.watch import EXCHANGES, Board, Failure, Watch, _waits, find_hang
from quantune.distributed.world import joined
from quantune.errors import EXIT_BUG, EXIT_DIED, EXIT_RESUMABLE, DistributedError, InterruptedRun

CPU = torch.device("cpu")
MINUTE = timedelta(seconds=60)
NON_FINITE = Failure(rank=1, exit_code=4, final=True)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Seconds become tenths; ranks are forked and have them too."""
    for module, names in (
        (watch, ("INTERVAL", "STALE", "GRACE")),
        (worker, ("DEFERENCE", "SECONDS_TO_HEAR", "SECONDS_TO_LEARN")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name) / 10)


def _claims(world):
    with joined(world, CPU, MINUTE):
        board = Board(world, 10)
        first = board.claim(Failure(rank=world.rank, exit_code=world.rank, final=True))
        return first, board.first()


def test_the_first_failure_is_the_same_one_to_all():
    found = {first for pair in on_ranks(3, _claims) for first in pair}
    assert len(found) == 1


def _watched(world, behave):
    """What the watch of this rank says while it behaves so."""
    said, heard = [], threading.Event()

    def note(what, board):
        said.append(getattr(what, "sentence", what))
        heard.set()

    with Watch(world, 1.0, hung=note, ended=note) as watching, joined(world, CPU, MINUTE):
        watching.beat("training, after step 3", 1.0)
        behave(world, heard)
    return said


def _sleep_on_rank_1(world, heard):
    if world.rank == 1:
        time.sleep(3)
    world.any(False)


def test_a_rank_that_the_others_wait_for_is_named_with_where_it_is():
    said = [sentence for rank in on_ranks(3, _watched, _sleep_on_rank_1) for sentence in rank]
    assert said
    for sentence in said:
        assert re.match(r"rank 1 \(process \d+ on \S+\) has been at .* while training, after step 3, and the", sentence)


def _stop_rank_1(world, heard):
    if world.rank == 1:
        board = Board(world, 10)
        while "training" not in (board.records()[1] or {}).get("doing", ""):
            time.sleep(0.01)
        rank, pid = os.getpid(), os.fork()
        if not pid:  # wakes it up again, so that the test ends
            time.sleep(3)
            os.kill(rank, signal.SIGCONT)
            os._exit(0)
        os.kill(rank, signal.SIGSTOP)
        os.waitpid(pid, 0)
    world.any(False)


def test_a_rank_that_has_stopped_altogether_is_named():
    said = on_ranks(2, _watched, _stop_rank_1)[0]
    assert re.match(
        r"rank 1 \(process \d+ on \S+\) has stopped altogether, last seen at .* while training, after", said[0]
    )


def _work_slowly(world, heard):
    for _ in range(8):
        time.sleep(0.3)
        world.any(False)


def test_ranks_that_make_progress_are_left_alone():
    assert on_ranks(2, _watched, _work_slowly) == [[], []]


def _fail_on_rank_1(world, heard):
    if world.rank == 1:
        Board(world, 10).claim(NON_FINITE)
    else:
        heard.wait(10)
    world.any(False)


def test_a_rank_that_waits_hears_of_anothers_failure():
    assert on_ranks(2, _watched, _fail_on_rank_1)[0][0] == NON_FINITE


def _attempts(world):
    board, found = Board(world, 10, host=True), []
    for number in (0, 2, 1, 3):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        found.append(board.superseded())
    return found


def test_an_attempt_knows_that_another_machine_has_begun_a_later_one():
    assert on_ranks(1, _attempts) == [[False, False, True, False]]


def _end(world, errors, folder):
    """Exit code and what is said when a rank ends with (an error, its exit code), or waits for the others."""
    if folder is not None:
        os.environ[FOLDER] = str(folder)
    said = []
    with joined(world, CPU, MINUTE):
        pass
    error, code = errors[world.rank]
    codes = {type(error): code, DistributedError: EXIT_DIED}
    return worker.end(error, lambda meant: (codes[type(meant)], said.append)), said


LOST = RuntimeError("gloo: Connection closed by peer"), EXIT_BUG
BUG = ValueError("foreseen by nobody"), EXIT_BUG
STOPPED = InterruptedRun("stopped and saved"), EXIT_RESUMABLE


def test_an_exception_on_one_rank_is_said_once_with_its_rank():
    assert on_ranks(3, _end, (LOST, BUG, LOST), None) == [(70, []), (70, ["rank 1: "]), (70, [])]


def test_what_all_ranks_find_is_said_by_rank_0():
    assert on_ranks(3, _end, (STOPPED,) * 3, None) == [(75, [""]), (75, []), (75, [])]


def test_quantunes_launcher_is_told_what_is_not_to_be_started_again(tmp_path):
    assert on_ranks(2, _end, (LOST, BUG), tmp_path) == [(0, []), (0, ["rank 1: "])]
    assert LaunchFolder(tmp_path).outcome() == EXIT_BUG


def test_a_rank_that_was_killed_is_left_to_quantunes_launcher(tmp_path):
    folder = LaunchFolder(tmp_path)
    folder.launch()
    killed = multiprocessing.get_context("fork").Process(target=folder.enter, args=(2,))
    killed.start()
    killed.join()
    assert on_ranks(2, _end, (LOST, LOST), tmp_path) == [(7, []), (7, [])]
    assert folder.outcome() is None


@pytest.mark.parametrize("launched_by_quantune", [True, False])
def test_a_connection_that_was_lost_for_an_unknown_reason_is_said_by_rank_0(tmp_path, launched_by_quantune):
    folder = tmp_path if launched_by_quantune else None
    assert on_ranks(2, _end, (LOST, LOST), folder) == [(7, [""]), (7, [])]


def test_processes_that_do_not_meet_are_an_error_that_is_said(tmp_path):
    error = DistributedError("expected 2 processes to meet"), EXIT_DIED
    assert on_ranks(2, _end, (error, error), tmp_path) == [(7, [""]), (7, [])]
    assert LaunchFolder(tmp_path).outcome() is None  # it may do better the next time


def _meets(world):
    """Rank 1 does not come."""
    if world.rank:
        return None
    try:
        with joined(world, CPU, timedelta(seconds=1)):
            pass
    except DistributedError as error:
        return str(error)


def test_a_rank_that_does_not_come_is_waited_for_so_long():
    said, _ = on_ranks(2, _meets)
    assert re.match(r"expected 2 processes to meet at 127.0.0.1:\d+ within 1 seconds, they did not: ", said)


def test_where_names_the_innermost_line_of_quantune_and_what_it_called():
    places = []

    class Told:
        def write(self, text):
            places.append(watch.where(sys._getframe()))

        def flush(self):
            pass

    voice, stderr = worker.Voice(terminal=2), sys.stderr
    try:
        sys.stderr = Told()
        voice.note("something")
    finally:
        sys.stderr = stderr
    assert re.fullmatch(r"quantune/distributed/worker.py:\d+ \(in write\)", places[0])


def record(**others):
    """What a rank says of itself."""
    said = {"time": 1.0, "collectives": 5, "doing": "training", "seconds": 61.0, "where": "quantune/x.py:1"}
    return {**said, "waits": True, "process": 4242, "host": "here", **others}


LATER = {"time": 2.0}


@pytest.mark.parametrize(
    ("now", "blamed"),
    [
        pytest.param([record(**LATER), None], "rank 1 has not come to meet the others", id="absent"),
        pytest.param([record(**LATER), record()], "rank 1 (process 4242 on here) has stopped altogether", id="stopped"),
        pytest.param(
            [record(**LATER), record(**LATER, collectives=4, where="quantune/y.py:7")],
            "rank 1 (process 4242 on here) has been at quantune/y.py:7 for 61 seconds while training",
            id="behind",
        ),
        pytest.param(
            [record(**LATER, waits=False), record(**LATER)],
            "rank 0 (process 4242 on here) has been at quantune/x.py:1",
            id="in no exchange while the other is",
        ),
        pytest.param(
            [record(**LATER), record(**LATER)], "no rank has made progress for 61 seconds", id="all in one exchange"
        ),
    ],
)
def test_who_is_waited_for_follows_from_what_all_ranks_say(now, blamed):
    assert find_hang([record(), record()], now).sentence.startswith(blamed)


def test_an_exchange_is_seen_however_deep_the_stack_is():
    names = {}
    exec(compile("def exchange(done): done.wait()", f"{EXCHANGES}/c10d.py", "exec"), names)

    def deep(done, depth):
        return deep(done, depth - 1) if depth else names["exchange"](done)

    done = threading.Event()
    thread = threading.Thread(target=deep, args=(done, 40), daemon=True)
    thread.start()
    try:
        while not _waits(sys._current_frames().get(thread.ident)):
            assert thread.is_alive()
            time.sleep(0.01)
        assert not _waits(sys._getframe())
    finally:
        done.set()
        thread.join()
