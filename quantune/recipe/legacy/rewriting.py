"""From a document in any spelling to one in the canonical form, or to what contradicts what in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import attrs

from quantune.recipe.legacy.claims import BACKENDS, Claim, contradictions, table_text, toml, unified, whole_table
from quantune.recipe.legacy.foreign import FOREIGN, is_post_training_block, refusal
from quantune.recipe.legacy.reading import (
    Old,
    Reading,
    deprecated,
    old_keys,
    read,
    read_adapter,
    read_config_kwargs,
    without_old_keys,
)
from quantune.recipe.positions import Path
from quantune.recipe.structure import Finding

TABLE: Path = ("quantization",)
DROP = "drop [quantization]"
"""What a hint about the canonical form says where older keys may stand for the table."""


@attrs.frozen(kw_only=True)
class Rewritten:
    """A document in the canonical form."""

    document: dict[str, Any]
    warnings: list[Finding] = attrs.field(factory=list)
    """What was rewritten, and how to write it now."""
    findings: list[Finding] = attrs.field(factory=list)
    """What can't be rewritten."""
    sources: dict[Path, Path] = attrs.field(factory=dict)
    """Keys of the canonical form that came from elsewhere, and where from."""
    drop: str = DROP
    """How to have no `[quantization]`, in the names of the keys that are there."""

    def source(self, path: Path) -> Path:
        """Where a key of the canonical form is written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.sources:
                return self.sources[path[:length]] + path[length:]
        return path

    def placed(self, findings: Iterable[Finding]) -> list[Finding]:
        """Findings about the canonical form, at the keys as they are written."""
        return [
            attrs.evolve(
                finding,
                path=self.source(finding.path),
                hint=finding.hint and finding.hint.replace(DROP, self.drop),
                other=None if finding.other is None else self.source(finding.other),
            )
            for finding in findings
        ]


def rewrite(document: dict[str, Any]) -> Rewritten:
    """Rewrite a parsed recipe, or the keys of an older config; the document that is given stays as it is."""
    reading = read(old_keys(document))
    rest = read_adapter(without_old_keys(document), reading)
    _refuse_foreign(rest, reading)
    canonical = _read_canonical(rest, reading)
    claims = [*canonical, *reading.claims]
    disagreeing = list(contradictions(claims))
    findings = [*reading.findings, *_one_a_key(finding for finding, _ in disagreeing)]
    named = [claim for claim in claims if "backend" in claim.says]
    sources: dict[Path, Path] = {}
    if named or canonical:
        # those that contradict each other make no table, and one of them alone is good enough to look further
        first = [claim for claim in named[:1] if not claim.canonical]
        agreed = claims if len(findings) == len(reading.findings) else [*canonical, *first]
        rest["quantization"] = table = unified(agreed)
        sources.update(_sources(table, agreed))
    elif not isinstance(rest.get("quantization"), list | str | int | float):
        findings += _settings_of_nothing(claims)
    of_precision = list(_set_precision(rest, reading, sources))
    findings += of_precision
    refuted = {claim.path for _, pair in disagreeing for claim in pair}
    refuted |= {place[:-1] for finding in of_precision for place in (finding.path, finding.other) if place}
    warnings = [
        *reading.warnings,
        # how else to write what can't be meant would contradict the finding
        *(_warning(claim, canonical) for claim in reading.claims if claim.path not in refuted),
    ]
    return Rewritten(document=rest, warnings=warnings, findings=findings, sources=sources, drop=_drop(claims))


def _drop(claims: Iterable[Claim]) -> str:
    """What to do about the keys that say how the base is stored, for it to stay as it is."""
    names = [claim.name for claim in claims if claim.form != "qlora" and (claim.canonical or claim.says or claim.needs)]
    ways = [f"drop {' and '.join(names)}"] if names else []
    if any(claim.form == "qlora" for claim in claims):
        ways.append('write [adapter] type = "lora"')
    return " and ".join(ways)


def _one_a_key(findings: Iterable[Finding]) -> list[Finding]:
    """The findings, of those of one code at one key the first."""
    first: dict[tuple[str, Path], Finding] = {}
    for finding in findings:
        first.setdefault((finding.code, finding.path), finding)
    return list(first.values())


def _refuse_foreign(document: dict[str, Any], reading: Reading) -> None:
    """Take the keys of other methods out of the document, with a finding where they are switched on."""
    beside_others = any(claim.form == "table" for claim in reading.claims)
    if is_post_training_block(document, beside_others=beside_others):
        refused = {"quantization": document.pop("quantization")}
    else:
        refused = {}
    refused.update({key: document.pop(key) for key in FOREIGN if key != "quantization" and key in document})
    base = next(((claim.path, claim.written) for claim in reading.claims if "backend" in claim.says), None)
    table = document.get("quantization")
    if base is None and isinstance(table, dict) and "backend" in table:
        base = TABLE, "[quantization]"
    for key, value in refused.items():
        written = Old(path=(key,), value=value).written
        if value is False or value == {} or (isinstance(value, str) and value.strip().lower() == "false"):
            reading.warnings.append(deprecated((key,), written, "leave it out"))
        elif value is not None:
            reading.findings.append(refusal(key, written, base))


def _read_canonical(document: dict[str, Any], reading: Reading) -> list[Claim]:
    """`[quantization]` itself as a claim, its `config_kwargs` as another; none where it is no table."""
    table = document.get("quantization")
    if not isinstance(table, dict):
        return []
    if table.get("backend") in BACKENDS and "config_kwargs" in table:
        read_config_kwargs(Old(path=(*TABLE, "config_kwargs"), value=table["config_kwargs"]), table["backend"], reading)
        table = {key: value for key, value in table.items() if key != "config_kwargs"}
    claim = whole_table(table, TABLE, "[quantization]", canonical=True)
    return [attrs.evolve(claim, places={key: (*TABLE, key) for key in table})]


def _sources(table: dict[str, Any], claims: Sequence[Claim]) -> Iterator[tuple[Path, Path]]:
    """Where the keys of the table come from, and the table itself, where that is not `[quantization]`."""
    if not any(claim.canonical for claim in claims):
        yield TABLE, next(claim.path for claim in claims if "backend" in claim.says)
    for key in table:
        claim = next(claim for claim in claims if key in claim.says or (not claim.canonical and key in claim.implied))
        if not claim.canonical:
            yield (*TABLE, key), claim.place(key)


def _settings_of_nothing(claims: Sequence[Claim]) -> Iterator[Finding]:
    """Settings of a quantization where nothing is quantized."""
    for claim in claims:
        if claim.needs is not None:
            message = f'{claim.written} has settings of backend "{claim.needs}", and nothing quantizes the base with it'
            hint = f'write [quantization] backend = "{claim.needs}" with these settings, or leave them out'
            yield Finding(code="QT124", path=claim.path, message=message, hint=hint)
        if claim.says.get("experts"):
            message = f"{claim.written} packs the experts as the rest of the base is, and nothing quantizes the base"
            hint = "add [quantization], which packs the experts too, or leave it out"
            yield Finding(code="QT119", path=claim.path, message=message, hint=hint)


def _set_precision(document: dict[str, Any], reading: Reading, sources: dict[Path, Path]) -> Iterator[Finding]:
    """Write `[training] precision` where `bnb_config_kwargs` says it."""
    training = document.get("training", {})
    if not reading.precisions or not isinstance(training, dict):
        return
    other: Path = ("training", "precision")
    given, says = training.get("precision"), "that is"
    if given is None:
        given, sources[other] = reading.precisions[0]
        document["training"] = {**training, "precision": given}
        other, says = sources[other], "another one means"
    for precision, path in reading.precisions:
        if precision != given:
            message = f"{path[-1]} means [training] precision = {toml(precision)}, and {says} {toml(given)}"
            yield Finding(code="QT020", path=path, message=message, hint=f"remove {path[-1]}", other=other)


def _warning(claim: Claim, canonical: Sequence[Claim]) -> Finding:
    """How to write a claim now."""
    known = canonical[0].means if canonical else {}
    table = unified([attrs.evolve(claim, canonical=False)])
    if isinstance(known.get("skip"), list) and "skip" in table:
        table["skip"] = [*known["skip"], *(name for name in table["skip"] if name not in known["skip"])]
    advice = ['write [adapter] type = "lora"'] if claim.form == "qlora" else []
    if any(known.get(key, ...) != value for key, value in table.items()):
        advice.append(f"write [quantization] {table_text(table)}")
    elif table and not advice:
        advice.append("leave it out: [quantization] says so")
    advice += claim.also
    return deprecated(claim.path, claim.written, "; ".join(advice) or "leave it out: that is how it is anyway")
