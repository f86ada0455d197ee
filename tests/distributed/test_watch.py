"""Ranks watching each other, and ending with one voice."""

import os
import re
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
from ranks import on_ranks

from quantune.distributed import watch, worker
from quantune.distributed.outcome import FOLDER, LaunchFolder
from quantune.distributed.watch import Board, Failure, Watch, find_hang
from quantune.distributed.world import joined
from quantune.errors import EXIT_BUG, EXIT_DIED, DistributedError, InterruptedRun

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
        said.append(what)
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
    said = [hang.sentence for rank in on_ranks(3, _watched, _sleep_on_rank_1) for hang in rank]
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
    named = r"rank 1 \(process \d+ on \S+\) has stopped altogether, last seen at \S+ while training, after step 3, and"
    assert re.match(named, said[0].sentence)


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
    """Exit code and what is said when each rank ends with an error of its own."""
    if folder is not None:
        os.environ[FOLDER] = str(folder)
        LaunchFolder(folder).enter(world.rank)
    said = []
    with joined(world, CPU, MINUTE):
        pass

    def meaning(error):
        return getattr(error, "exit_code", EXIT_BUG), lambda before: said.append(before)

    return worker.end(errors[world.rank], meaning), said


LOST = RuntimeError("gloo: Connection closed by peer")
BUG = ValueError("foreseen by nobody")
STOPPED = InterruptedRun("stopped and saved")
NOT_MET = DistributedError("expected 2 processes to meet")


@pytest.fixture
def folder(tmp_path):
    made = LaunchFolder(tmp_path)
    made.launch()  # the ranks are forked from this process
    return made


def test_an_exception_on_one_rank_is_said_once_with_its_rank():
    assert on_ranks(3, _end, (LOST, BUG, LOST), None) == [(70, []), (70, ["rank 1: "]), (70, [])]


def test_what_all_ranks_find_is_said_by_rank_0():
    assert on_ranks(3, _end, (STOPPED,) * 3, None) == [(75, [""]), (75, []), (75, [])]


def test_quantunes_launcher_is_told_what_is_not_to_be_started_again(folder):
    assert on_ranks(2, _end, (LOST, BUG), folder.path) == [(0, []), (0, ["rank 1: "])]
    assert folder.outcome() == EXIT_BUG


def test_ranks_that_do_not_meet_say_so_once_and_may_do_better_the_next_time(folder):
    assert on_ranks(2, _end, (NOT_MET, NOT_MET), folder.path) == [(EXIT_DIED, [""]), (EXIT_DIED, [])]
    assert folder.outcome() is None


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


def rank_says(**changed):
    here = {"time": 1.0, "collectives": 7, "doing": "training, after step 3", "seconds": 60.0, "where": "here"}
    return {**here, "waits": True, "process": 11, "host": "gpu1", **changed}


def test_a_rank_that_never_came_is_named():
    assert find_hang([None, None], [rank_says(), None]).sentence == "rank 1 has not come to meet the others"


def test_the_rank_that_entered_fewest_exchanges_is_waited_for():
    before = [rank_says(), rank_says(collectives=6, process=12)]
    now = [{**one, "time": 2.0} for one in before]
    assert find_hang(before, now).process == 12


def test_the_network_is_blamed_where_all_ranks_wait_in_the_same_exchange():
    before = [rank_says(), rank_says(process=12)]
    found = find_hang(before, [{**one, "time": 2.0} for one in before])
    assert found.process is None and found.sentence.startswith("no rank has made progress for 60 seconds")
