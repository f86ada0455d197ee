"""What quantune's launcher and its workers tell each other."""

import multiprocessing
import os
import signal
import time

import pytest

from quantune.distributed.outcome import FOLDER, LaunchFolder
from quantune.distributed.stopping import Phase, StopRequest
from quantune.errors import EXIT_DIED, InterruptedRun


@pytest.fixture
def folder(tmp_path):
    made = LaunchFolder(tmp_path)
    made.launch()
    return made


def test_the_first_worker_that_knows_how_the_run_ended_is_believed(folder):
    assert folder.outcome() is None
    folder.settle(75)
    folder.settle(70)
    assert folder.outcome() == 75 and not list(folder.path.glob("outcome-*"))


def test_a_process_that_quantune_did_not_launch_has_no_launch_folder(folder):
    assert LaunchFolder.from_environment({}) is None
    assert LaunchFolder.from_environment({FOLDER: str(folder.path)}) == folder


def test_a_request_to_stop_reaches_workers_that_run_and_those_that_are_still_to_come(folder):
    worker = multiprocessing.get_context("fork").Process(target=_wait_as_worker, args=(folder,))
    worker.start()
    while not list(folder.processes()):
        time.sleep(0.01)
    folder.ask_to_stop(signal.SIGTERM)
    worker.join(timeout=10)
    assert worker.exitcode == -signal.SIGTERM and folder.asked_to_stop()


def _wait_as_worker(folder):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    folder.enter(0)
    time.sleep(60)


def test_signalling_workers_that_are_gone_is_no_error(folder):
    assert not folder.lost_one()
    gone = _gone(folder)
    assert list(folder.processes()) == [gone] and folder.lost_one()
    folder.signal(signal.SIGTERM)


def test_workers_of_an_earlier_attempt_are_not_missed(folder, monkeypatch):
    _gone(folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not folder.lost_one()


def _gone(folder):
    """The process id of a worker that has begun and died."""
    gone = multiprocessing.get_context("fork").Process(target=folder.enter, args=(1,))
    gone.start()
    gone.join()
    return gone.pid


def test_a_request_while_modules_are_imported_is_followed_after_it():
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(InterruptedRun, match="before training began"):
            stop.enter(Phase.LOADING)


def test_a_request_while_the_base_is_loaded_stops_at_once():
    with StopRequest().listening() as stop:
        stop.enter(Phase.LOADING)
        with pytest.raises(InterruptedRun, match="before training began"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_request_in_a_step_waits_for_it_and_a_second_ctrl_c_does_not():
    said = []
    with StopRequest(said.append).listening() as stop:
        stop.enter(Phase.TRAINING)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and "Ctrl-C again aborts" in said[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_left_of_an_attempt_ends_silently_and_is_not_taken_for_a_request(folder, monkeypatch):
    """The launcher ends the other workers with SIGTERM when one has died."""
    monkeypatch.setenv(FOLDER, str(folder.path))
    _gone(folder)
    with StopRequest().listening() as stop:
        stop.enter(Phase.LOADING)
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == EXIT_DIED
    folder.ask_to_stop(signal.SIGTERM)
    with StopRequest().listening() as stop:
        stop.enter(Phase.LOADING)
        with pytest.raises(InterruptedRun):
            os.kill(os.getpid(), signal.SIGTERM)


def test_only_workers_of_this_launcher_are_ended_for_hanging(folder):
    folder.end_hung(os.getpid())  # not one of them
    assert not folder.hung(os.getpid())
