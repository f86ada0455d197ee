"""A run goes on as the run it was, or says what is different."""

import attrs
import pytest

from quantune.checkpoint.identity import TOKENS, Identity, go_on, require_same
from quantune.errors import CheckpointError, InputError, ResumeError

RECIPE = {"adapter": {"r": 8, "dropout": 0.1, "targets": ("q_proj",)}, "training": {"max_grad_norm": float("inf")}}
RUN = Identity(
    written=RECIPE,
    resolved=RECIPE,
    fingerprints={TOKENS: "abc", "the packed weights": "123"},
    sources={"a.jsonl of data.train[0]": "sha256 1", "b.jsonl of data.train[1]": "sha256 2"},
    environment={"versions": {"torch": "2.12"}},
    processes=2,
)


def read_back(identity):
    return Identity.from_json(identity.to_json())


def on(now, allow=(), before=RUN):
    return go_on(read_back(before), now, allow=allow, what="step-00000004")


def with_recipe(**tables):
    made = {name: {**RECIPE[name], **tables.get(name, {})} for name in RECIPE}
    return attrs.evolve(RUN, written=made, resolved=made)


def test_what_did_not_change_goes_on_without_a_word():
    assert on(RUN) == (RUN, [])
    require_same(read_back(RUN), RUN, what="step-00000004")


def test_what_is_read_back_is_what_was_written():
    assert read_back(read_back(RUN)) == read_back(RUN)
    with pytest.raises(CheckpointError, match="expected what a run is made of"):
        Identity.from_json({"written": {}})


@pytest.mark.parametrize(
    ("prints", "named"),
    [
        ({TOKENS: "abc", "the packed weights": "xyz"}, "the packed weights changed since"),
        ({TOKENS: "abc"}, "the packed weights changed since"),
        ({**RUN.fingerprints, "the revision of the base": "1"}, "the revision of the base changed since"),
    ],
)
def test_a_fingerprint_that_changed_came_or_went_is_named(prints, named):
    with pytest.raises(ResumeError, match=named) as caught:
        require_same(RUN, attrs.evolve(RUN, fingerprints=prints), what="step-00000004")
    assert caught.value.exit_code == 2


def test_before_the_base_is_loaded_only_what_is_known_is_compared():
    early = attrs.evolve(RUN, fingerprints={TOKENS: "abc"})
    assert on(early) == (early, [])
    with pytest.raises(ResumeError, match="the tokens of the training data changed since"):
        on(attrs.evolve(RUN, fingerprints={TOKENS: "other"}))


def test_tokens_that_changed_name_the_file_that_did():
    now = attrs.evolve(
        RUN, fingerprints={TOKENS: "other"}, sources={**RUN.sources, "b.jsonl of data.train[1]": "sha256 9"}
    )
    with pytest.raises(ResumeError, match=r"\(b.jsonl of data.train\[1\] was sha256 2, is sha256 9; the tokens"):
        on(now)


def test_tokens_that_changed_name_the_key_that_reads_the_same_files_otherwise():
    def reading(limit):
        return {**RECIPE, "data": {"max_length": 8, "train": [{"path": "a.jsonl", "limit": limit}]}}

    before = attrs.evolve(RUN, resolved=reading(9))
    now = attrs.evolve(RUN, resolved=reading(5), fingerprints={**RUN.fingerprints, TOKENS: "other"})
    with pytest.raises(ResumeError, match=r"\(data.train\[0\].limit was 9, is 5; the tokens"):
        require_same(before, now, what="step-00000004")


def test_a_file_that_changed_without_changing_the_tokens_is_none_of_our_business():
    now = attrs.evolve(RUN, sources={"moved.jsonl of data.train[0]": "sha256 3"})
    assert on(now) == (now, [])


def test_other_versions_are_warned_of():
    now = attrs.evolve(RUN, environment={"versions": {"torch": "2.13"}})
    assert on(now)[1] == ["versions.torch was 2.12, is 2.13: the run goes on, and may not end with the same bytes"]


def test_another_world_size_is_warned_of_with_what_restarts():
    (sentence,) = on(attrs.evolve(RUN, processes=3))[1]
    assert "was written by 2 processes, and this run has 3" in sentence and "dropout begin anew" in sentence
    without = with_recipe(adapter={"dropout": 0.0})
    (sentence,) = on(attrs.evolve(without, processes=3), before=without)[1]
    assert "dropout" not in sentence and "rounded in another order" in sentence


def test_a_change_that_was_allowed_is_remembered_and_not_asked_for_again():
    changed = with_recipe(adapter={"dropout": 0.0})
    going_on, sentences = on(changed, allow=["adapter.dropout"])
    assert going_on.allowed == ("adapter.dropout",) and "not the run that was begun any more" in sentences[0]
    again, sentences = on(changed, allow=["adapter.dropout"], before=going_on)
    assert again.allowed == ("adapter.dropout",) and sentences == []
    with pytest.raises(InputError, match="expected a key that changed"):
        on(RUN, allow=["adapter.dropout"])
