"""What makes a run the run it is, written into each of its checkpoints and compared when it goes on."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import attrs

from quantune.checkpoint.fingerprint import differences
from quantune.errors import CheckpointError, ResumeError
from quantune.recipe import changes

TOKENS = "the tokens of the training data"
"""Its name among the fingerprints."""
SHOWN = 3
"""Differences that a sentence lists."""


@attrs.frozen(kw_only=True)
class Identity:
    """What makes a run the run it is. JSON values."""

    written: dict[str, Any]
    """The recipe as it was given."""
    resolved: dict[str, Any]
    """The recipe with every `auto` and every length decided."""
    fingerprints: dict[str, Any]
    """What is not the recipe and must be the same: tokens, files of the base, packed weights."""
    sources: dict[str, str]
    """sha256 of the data files: which one changed, when the tokens did."""
    environment: dict[str, Any]
    """What may round otherwise: versions, machine."""
    processes: int
    """The world size."""
    allowed: tuple[str, ...] = ()
    """Keys of the recipe that changed since the run was begun, as `--allow-change` allowed."""

    def to_json(self) -> dict[str, Any]:
        """As it is written; reading it back gives an equal one."""
        return json.loads(json.dumps(attrs.asdict(self)))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Identity:
        """What `to_json` gave.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            return cls(**{**document, "allowed": tuple(document["allowed"])})
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"expected what a run is made of, found something else: {error}") from error


def go_on(before: Identity, now: Identity, *, allow: Collection[str], what: str) -> tuple[Identity, list[str]]:
    """Require that the run `before` can go on as `now`.

    Fingerprints that `now` does not have yet are left to `require_same`.

    Args:
        allow: keys of the recipe that may change.
        what: what the run goes on from.

    Returns:
        `now` with the changes that were allowed in all, and a sentence on each thing that is not as it was.

    Raises:
        ResumeError: the recipe, data or base changed so that it can't, or not without being allowed to.
        InputError: see `quantune.recipe.changes.require_allowed`.
    """
    plain = Identity.from_json(now.to_json())
    compared = changes.compare(before.written, before.resolved, plain.written, plain.resolved)
    changes.require_allowed(compared.changes, allow, earlier=before.allowed, what=what)
    known = {key: value for key, value in before.fingerprints.items() if key in now.fingerprints}
    require_same(attrs.evolve(before, fingerprints=known), plain, what=what)
    used = [change for change in compared.changes if change.effect == "allowed"]
    sentences = [f"{change}, as --allow-change says: this is not the run that was begun any more" for change in used]
    # with another number of processes the same batch is divided otherwise, of which a sentence of its own tells
    otherwise = compared.resolved_otherwise if before.processes == now.processes else ()
    sentences += [
        f"{change} on this machine, where nobody changed it: sums are rounded otherwise than in the run that was begun"
        for change in otherwise
    ]
    elsewhere = differences(before.environment, plain.environment)
    if elsewhere:
        sentences.append(f"{_some(elsewhere)}: the run goes on, and may not end with the same bytes")
    if before.processes != now.processes:
        sentences.append(_another_world(before, now, what))
    return attrs.evolve(now, allowed=tuple(dict.fromkeys((*before.allowed, *(c.flag for c in used))))), sentences


def require_same(before: Identity, now: Identity, *, what: str) -> None:
    """Require that all fingerprints are the same.

    Raises:
        ResumeError: naming those that changed, came or went; for the data, the files that changed.
    """
    then, here = before.fingerprints, now.to_json()["fingerprints"]
    changed = [key for key in {**then, **here} if then.get(key) != here.get(key)]
    if not changed:
        return
    details = differences(*({key: side[key] for key in changed if key in side} for side in (then, here)))
    if TOKENS in changed:
        details = (differences(before.sources, now.sources) or _read_otherwise(before, now)) + details
    raise ResumeError(
        f"{what} can't be resumed, the run would not be the same: {', '.join(changed)} changed since it was written "
        f"({_some(details)}). Put it back, or start again with --overwrite"
    )


def _read_otherwise(before: Identity, now: Identity) -> list[str]:
    """How the same data files are read otherwise than before."""
    sides = []
    for identity in (before, now):
        data = dict(identity.resolved.get("data", {}))
        sources = {f"train[{index}]": source for index, source in enumerate(data.pop("train", ()))}
        sides.append({**{key: value for key, value in data.items() if not key.startswith("eval")}, **sources})
    return differences(*sides, where="data")


def _another_world(before: Identity, now: Identity, what: str) -> str:
    dropout = now.resolved.get("adapter", {}).get("dropout")
    restarts = " The random numbers of dropout begin anew from seed, step and rank." if dropout else ""
    return (
        f"{what} was written by {_processes(before.processes)}, and this run has {now.processes}. The batches "
        f"and their order are the same.{restarts} Sums over processes are rounded in another order, so the run "
        "does not end with the same bytes"
    )


def _processes(count: int) -> str:
    return f"{count} process{'' if count == 1 else 'es'}"


def _some(items: list[str]) -> str:
    more = len(items) - SHOWN
    return "; ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
