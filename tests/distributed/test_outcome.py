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
    folder = LaunchFolder(tmp_path)
    folder.launch()
    return folder


def test_the_first_worker_that_knows_how_the_run_ended_is_believed(folder):
    assert folder.outcome() is None
    folder.settle(75)
    folder.settle(70)
    assert folder.outcome() == 75
    assert {path.name for path in folder.path.iterdir()} == {"launcher", "outcome.json"}


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
    folder.enter(0)
    time.sleep(60)


def test_signalling_workers_that_are_gone_is_no_error(folder):
    gone = multiprocessing.get_context("fork").Process(target=folder.enter, args=(3,))
    gone.start()
    gone.join()
    assert list(folder.processes()) == [gone.pid]
    folder.signal(signal.SIGTERM)
    assert folder.lost_one()


def asked_to_stop():
    """Ask this process to stop, as a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # handlers run between two lines of Python


def test_a_request_while_modules_are_imported_is_followed_afterwards():
    with StopRequest().listening() as stop:
        asked_to_stop()
        assert stop.asked
        with pytest.raises(InterruptedRun, match="before training began"):
            stop.enter(Phase.LOADING)


def test_a_request_while_the_base_is_loaded_stops_at_once():
    with StopRequest().listening() as stop:
        stop.enter(Phase.LOADING)
        with pytest.raises(InterruptedRun, match="before training began"):
            asked_to_stop()


def test_a_request_in_a_step_waits_for_it_and_a_second_ctrl_c_does_not():
    said = []
    with StopRequest(said.append).listening() as stop:
        stop.enter(Phase.TRAINING)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and "Ctrl-C again aborts" in said[0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


def test_a_worker_that_is_asked_to_stop_alone_passes_it_on(folder, monkeypatch):
    monkeypatch.setenv(FOLDER, str(folder.path))
    with StopRequest().listening() as stop:
        stop.enter(Phase.LOADING)
        with pytest.raises(InterruptedRun):
            asked_to_stop()
    assert folder.asked_to_stop()


def test_what_is_left_of_an_attempt_ends_silently_and_is_not_taken_for_a_request(folder, monkeypatch):
    """The launcher ends the other workers with SIGTERM when one has died."""
    monkeypatch.setenv(FOLDER, str(folder.path))
    gone = multiprocessing.get_context("fork").Process(target=folder.enter, args=(1,))
    gone.start()
    gone.join()
    with StopRequest().listening() as stop:
        stop.enter(Phase.LOADING)
        with pytest.raises(SystemExit) as ended:
            asked_to_stop()
    assert ended.value.code == EXIT_DIED and not folder.asked_to_stop()
