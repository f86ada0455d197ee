"""The audit of a run's history passes what happened and fails what was doctored."""

import json

import pytest

from quantune.checkpoint.audit import audit
from quantune.checkpoint.history import History
from quantune.data.order import step_indices
from quantune.errors import QuantuneError, RunFolderError

ORDER = {"batch_size": 3, "samples": 7, "seed": 5, "shuffle": True}


def attempt(number, resumed=None, **more):
    common = {"process": 1, "host": "here", "processes": 1, "versions": {}, "steps": 6}
    return {"event": "attempt", "number": number, "resumed": resumed, **common, **ORDER, **more}


def steps(first, last):
    order = ORDER.values()
    samples = {step: step_indices(step - 1, *order) for step in range(first, last + 1)}
    return [{"event": "step", "step": step, "samples": s, "digest": str(s)} for step, s in samples.items()]


def saved(step):
    return [{"event": "saving", "step": step}, {"event": "checkpoint", "step": step}]


def sound():
    """Killed after step 5, gone on from the checkpoint of step 4, asked to stop at once, finished."""
    return [
        attempt(1),
        *steps(1, 2),
        *saved(2),
        *steps(3, 4),
        *saved(4),
        *steps(5, 5),
        attempt(2, resumed=4),
        {"event": "interrupted", "step": 4},
        attempt(3, resumed=4),
        *steps(5, 6),
        *saved(6),
        {"event": "evaluation", "step": 6},
        {"event": "finished", "step": 6},
    ]


def only(rows, event, nth=0):
    """The index of the nth row of an event."""
    return [index for index, row in enumerate(rows) if row["event"] == event][nth]


def test_what_happened_is_sound_and_told_by_attempt():
    verdict = audit(sound())
    assert verdict.sound, verdict.problems
    assert (verdict.steps, verdict.total, verdict.done_again) == (6, 6, 1)
    assert [(a.resumed, a.last, a.checkpoints, a.end) for a in verdict.attempts] == [
        (None, 5, (2, 4), "died"),
        (4, 4, (), "interrupted"),
        (4, 6, (6,), "finished"),
    ]


@pytest.mark.parametrize("cut", range(1, len(sound())))
def test_a_run_that_died_at_any_event_is_sound_so_far(cut):
    assert audit(sound()[:cut]).sound


def dropped(rows):
    del rows[only(rows, "step", 2)]


def repeated(rows):
    rows.insert(only(rows, "step", 2), dict(rows[only(rows, "step", 1)]))


def reordered(rows):
    first, second = only(rows, "step", 0), only(rows, "step", 1)
    rows[first], rows[second] = rows[second], rows[first]


def wrong_samples(rows):
    row = rows[only(rows, "step", 3)]
    row["samples"] = [*row["samples"][1:], row["samples"][0]]


def other_tokens(rows):
    rows[only(rows, "step", 5)]["digest"] = "another"  # step 5, done again


def never_committed(rows):
    rows[only(rows, "attempt", 1)]["resumed"] = 3


def committed_and_never_captured(rows):
    del rows[only(rows, "saving", 1)]


def captured_elsewhere(rows):
    rows[only(rows, "saving", 1)]["step"] = 3


def finished_early(rows):
    del rows[only(rows, "step", 6)]
    rows[only(rows, "finished")]["step"] = 5


def on_after_the_end(rows):
    rows += steps(7, 7)


def another_order(rows):
    rows[only(rows, "attempt", 2)]["seed"] = 6


def an_attempt_left_out(rows):
    del rows[only(rows, "attempt", 1)]


def committed_twice(rows):
    rows.insert(only(rows, "attempt", 1), {"event": "checkpoint", "step": 2})


def gone_on_from_what_was_lost(rows):
    """Step 6 was saved by attempt 3, attempt 4 went back to step 4: what attempt 5 goes on from is nowhere."""
    rows.pop()
    rows += [attempt(4, resumed=4), *steps(5, 5), attempt(5, resumed=6)]


def without_samples(rows):
    del rows[only(rows, "step", 1)]["samples"]


def unheard_of(rows):
    rows.insert(3, {"event": "miracle"})


def headless(rows):
    del rows[0]


@pytest.mark.parametrize(
    ("doctor", "problem"),
    [
        (dropped, "expected step 3 in attempt 1, found step 4"),
        (repeated, "expected step 3 in attempt 1, found step 2"),
        (reordered, "expected step 1 in attempt 1, found step 2"),
        (wrong_samples, "step 4 of attempt 1 had samples"),
        (other_tokens, "the samples of step 5 of attempt 3 are not what they were"),
        (never_committed, "went on from step 3, of which no checkpoint was committed"),
        (committed_and_never_captured, "its state was not being written"),
        (captured_elsewhere, "saving of step 3 comes after step 4"),
        (finished_early, "the run finished after step 5 of 6"),
        (on_after_the_end, "comes after attempt 3 had finished"),
        (another_order, "attempt 3 has another order of samples"),
        (an_attempt_left_out, "interrupted of step 4 comes after step 5"),
        (committed_twice, "checkpoint of step 2 was committed, and its state was not being written"),
        (gone_on_from_what_was_lost, "attempt 5 went on from step 6, of which no checkpoint was committed"),
        (without_samples, "lacks what such an event has"),
        (unheard_of, "'miracle' is no event of a run"),
        (headless, "step of step 1 comes before any attempt"),
        (list.clear, "there is no attempt in it"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_doctored_history_is_not_sound(doctor, problem):
    rows = sound()
    doctor(rows)
    verdict = audit(rows)
    assert not verdict.sound and problem in "\n".join(verdict.problems)


def test_a_checkpoint_whose_commit_no_one_lived_to_tell_of_is_found():
    rows = [attempt(1), *steps(1, 2), {"event": "saving", "step": 2}, attempt(2, resumed=2), *steps(3, 6)]
    assert audit(rows).sound
    assert not audit([row for row in rows if row["event"] != "saving"]).sound


@pytest.fixture
def history(tmp_path):
    """The history of a sound run, written."""
    made = History(tmp_path / "history.jsonl")
    for row in sound():
        made.append(**row)
    return made


def test_what_is_written_is_read_again(history):
    assert history.rows() == sound()
    assert History(history.path.with_name("none")).rows() == []


@pytest.mark.parametrize("left", range(1, 60, 7))
def test_a_line_that_was_half_written_is_no_event_and_the_next_attempt_goes_on_below(history, left):
    whole = history.path.read_bytes()
    history.path.write_bytes(whole + json.dumps(steps(7, 7)[0]).encode()[:left])
    assert history.rows() == sound()
    history.append(**attempt(4, resumed=6))
    assert history.rows() == [*sound(), attempt(4, resumed=6)]


def test_a_line_that_is_spoilt_in_the_middle_is_named(history):
    lines = history.path.read_text().splitlines()
    lines[2] = lines[2][:-5]
    history.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RunFolderError, match=r"history.jsonl:3: expected a JSON object with an event"):
        history.rows()


def test_a_history_that_can_not_be_written_says_so(tmp_path):
    with pytest.raises(QuantuneError, match="can't be written: No space left on device. What is saved is untouched"):
        History(type(tmp_path)("/dev/full")).append("step", step=1)
