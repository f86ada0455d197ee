"""Which keys of a recipe may change while a run is interrupted."""

import typing

import attrs
import pytest

from quantune.errors import InputError, ResumeError
from quantune.recipe.changes import EFFECTS, compare, require_allowable, require_allowed
from quantune.recipe.schema import QuantizationConfig, Recipe

WRITTEN = {
    "model": {"base": "/bases/small"},
    "quantization": {"backend": "bnb", "skip": [], "group_size": 64},
    "adapter": {"r": 4, "start_from": "/adapters/one"},
    "data": {"train": [{"path": "/data/a.jsonl", "format": "chat"}], "max_length": 64},
    "training": {"epochs": 2, "micro_batch_size": "auto", "learning_rate": 1e-3},
    "distributed": {"threads": "auto"},
}
RESOLVED = {
    **WRITTEN,
    "training": {"max_steps": 20, "warmup_steps": 1, "micro_batch_size": 4, "learning_rate": 1e-3},
    "distributed": {"threads": 2},
}


def keys(cls, where=""):
    """Every key of a table of the recipe, as the classes say."""
    for field in attrs.fields(attrs.resolve_types(cls)):
        key = f"{where}.{field.name}" if where else field.name
        inner = [kind for kind in (field.type, *typing.get_args(field.type)) if attrs.has(kind)]
        if inner:
            yield from keys(inner[0], key)
        else:
            yield key


def with_(document, **tables):
    return {**document, **{name: {**document.get(name, {}), **table} for name, table in tables.items()}}


def compared(written=WRITTEN, resolved=RESOLVED):
    return compare(WRITTEN, RESOLVED, written, resolved)


def changed(**tables):
    """The changes of a recipe in which a person wrote other values."""
    return compared(with_(WRITTEN, **tables), with_(RESOLVED, **tables)).changes


def require(changes, *allow, earlier=()):
    require_allowed(changes, allow, earlier=earlier, what="step-00000004")


def test_every_key_has_a_class_and_every_class_a_key():
    assert set(keys(Recipe)) == EFFECTS.keys()
    assert {"quantization.options", "data.train.path", "model.special_tokens.bos_token"} <= EFFECTS.keys()


def test_a_new_key_without_a_class_is_noticed():
    @attrs.frozen
    class Grown(QuantizationConfig):
        novel: int = 1

    assert set(keys(Grown, "quantization")) - EFFECTS.keys() == {"quantization.novel"}


def test_what_did_not_change_is_no_change():
    assert compared().changes == compared().resolved_otherwise == ()


@pytest.mark.parametrize(
    ("tables", "key", "effect"),
    [
        ({"adapter": {"r": 8}}, "adapter.r", "never"),
        ({"quantization": {"group_size": 32}}, "quantization.group_size", "never"),
        ({"quantization": {"backend": "torchao"}}, "quantization.backend", "never"),
        ({"training": {"seed": 1}}, "training.seed", "never"),
        ({"training": {"unheard_of": 1}}, "training.unheard_of", "never"),
        ({"training": {"learning_rate": 1e-4}}, "training.learning_rate", "allowed"),
        ({"training": {"micro_batch_size": 2}}, "training.micro_batch_size", "allowed"),
        ({"data": {"train": [{"path": "/data/b.jsonl", "format": "chat"}]}}, "data.train[0].path", "harmless"),
        ({"checkpoint": {"keep": 9}}, "checkpoint.keep", "harmless"),
        ({"model": {"base": "/moved/small"}}, "model.base", "harmless"),
        ({"model": {"base": "org/other"}}, "model.base", "never"),
        ({"adapter": {"start_from": "/moved/one"}}, "adapter.start_from", "harmless"),
    ],
)
def test_a_changed_key_is_of_the_class_of_the_table(tables, key, effect):
    (change,) = changed(**tables)
    assert (change.key, change.effect) == (key, effect)


def test_quantizing_at_all_is_a_change_that_no_run_survives():
    whole = {name: table for name, table in WRITTEN.items() if name != "quantization"}
    changes = compare(whole, whole, WRITTEN, WRITTEN).changes
    assert {change.key for change in changes} == {
        "quantization.backend",
        "quantization.skip",
        "quantization.group_size",
    }
    assert {change.effect for change in changes} == {"never"}


def test_writing_out_what_auto_had_come_to_is_no_change():
    assert compared(with_(WRITTEN, training={"micro_batch_size": 4})).changes == ()


def test_what_another_machine_resolves_differently_is_told_apart_from_a_change():
    found = compared(resolved=with_(RESOLVED, training={"micro_batch_size": 2}, distributed={"threads": 8}))
    assert found.changes == ()
    assert [str(change) for change in found.resolved_otherwise] == [
        "training.micro_batch_size was 4, is 2",
        "distributed.threads was 2, is 8",
    ]


def test_more_epochs_are_one_change_and_not_also_one_of_what_follows_from_them():
    longer = with_(RESOLVED, training={"max_steps": 40, "warmup_steps": 2})
    found = compared(with_(WRITTEN, training={"epochs": 4}), longer)
    assert [(change.key, change.before, change.now) for change in found.changes] == [("training.epochs", 2, 4)]
    assert found.resolved_otherwise == ()


def test_epochs_said_in_steps_are_a_change_only_if_there_are_more_of_them():
    steps = {name: value for name, value in WRITTEN["training"].items() if name != "epochs"} | {"max_steps": 20}
    assert compared({**WRITTEN, "training": steps}).changes == ()
    fewer = compared({**WRITTEN, "training": {**steps, "max_steps": 9}}, with_(RESOLVED, training={"max_steps": 9}))
    assert [change.key for change in fewer.changes] == ["training.max_steps"]


def test_a_refusal_lists_every_change_with_its_class_and_the_way_out():
    changes = changed(
        adapter={"r": 8}, training={"learning_rate": 1e-4}, data={"max_length": 65}, checkpoint={"keep": 3}
    )
    with pytest.raises(ResumeError) as caught:
        require(changes)
    assert str(caught.value).splitlines() == [
        "step-00000004 can't be resumed with the recipe as it is now:",
        "  adapter.r was 4, is 8  (a run can't go on with another one: put it back)",
        "  data.max_length was 64, is 65  (the run goes on, and is not the one that was begun: "
        "--allow-change data.max_length)",
        "  training.learning_rate was 0.001, is 0.0001  (the run goes on, and is not the one that was begun: "
        "--allow-change training.learning_rate)",
        "  checkpoint.keep was not set, is 3  (harmless)",
        "put adapter.r back and give --resume --allow-change data.max_length --allow-change training.learning_rate, "
        "or start again with --overwrite",
    ]
    assert caught.value.exit_code == 2


def test_harmless_changes_need_nothing_and_others_the_flag():
    require(changed(checkpoint={"keep": 3}))
    rate = changed(training={"learning_rate": 1e-4})
    require(rate, "training.learning_rate")
    with pytest.raises(ResumeError, match=r"\ngive --resume --allow-change training.learning_rate, or start again"):
        require(rate)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("adapter.r", "a run can't go on with another adapter.r"),
        ("training.learning_rat", r"found none \(did you mean training.learning_rate\?\)"),
        ("quantization.options", "a run can't go on with another"),
    ],
)
def test_what_can_not_be_allowed_is_refused(key, message):
    with pytest.raises(InputError, match=message):
        require_allowable([key])


def test_allowing_what_did_not_change_is_a_mistake_unless_it_changed_earlier_in_the_run():
    with pytest.raises(InputError, match="--allow-change training.max_steps: expected a key that changed"):
        require((), "training.max_steps")
    require((), "training.max_steps", earlier=("training.max_steps",))
