"""Spellings of older tools, rewritten to the canonical form before structuring; every rewriting is a warning.

`config_kwargs` under `[quantization]` held the arguments of transformers' `Mxfp4Config` and `FineGrainedFP8Config`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs

from quantune.recipe.positions import Path
from quantune.recipe.structure import Finding, describe

KWARGS: Path = ("quantization", "config_kwargs")
WITH_KWARGS = ("mxfp4", "fp8")
"""The backends whose older spelling had `config_kwargs`."""
WITHOUT_KWARGS = ("bnb", "torchao")
"""Backends of quantune that have options of their own instead; a plugin may have an option of that name."""


@attrs.frozen(kw_only=True)
class Rewritten:
    """A document in the canonical form."""

    document: dict[str, Any]
    warnings: list[Finding] = attrs.field(factory=list)
    """What was rewritten, and how to write it now."""
    findings: list[Finding] = attrs.field(factory=list)
    """What can't be rewritten."""


def rewrite(document: dict[str, Any]) -> Rewritten:
    """Rewrite a parsed recipe; the document that is given stays as it is."""
    table = document.get("quantization")
    if not isinstance(table, dict) or "config_kwargs" not in table:
        return Rewritten(document=document)
    backend, given = table.get("backend"), table["config_kwargs"]
    if backend in WITHOUT_KWARGS:
        message = f'config_kwargs has no meaning for backend "{backend}"'
        return _refused(
            document, Finding(code="QT021", path=KWARGS, message=message, hint="write its options directly")
        )
    if backend not in WITH_KWARGS:
        return Rewritten(document=document)
    if not isinstance(given, dict):
        message = f"expected a table, found {describe(given)}"
        return _refused(document, Finding(code="QT013", path=KWARGS, message=message))
    made: dict[str, Any] = {}
    findings: list[Finding] = []
    for key, value in given.items():
        if key not in _KWARGS:
            hint = f"understood are: {', '.join(_KWARGS)}"
            findings.append(Finding(code="QT012", path=(*KWARGS, key), message=f'unknown key "{key}"', hint=hint))
            continue
        for result in _KWARGS[key](str(backend), value, table):
            if isinstance(result, Finding):
                findings.append(result)
            else:
                made.update([result])
    rest = {name: value for name, value in table.items() if name != "config_kwargs"}
    now = ", ".join(f"{name} = {_toml(value)}" for name, value in made.items()) or "nothing: that is how it is anyway"
    warning = Finding(code="QT040", path=KWARGS, message="config_kwargs is DEPRECATED", hint=f"write {now}")
    return Rewritten(
        document={**document, "quantization": {**rest, **made}},
        warnings=[] if findings else [warning],
        findings=findings,
    )


Result = Finding | tuple[str, Any]


def _modules_to_not_convert(backend: str, value: Any, table: dict[str, Any]) -> Iterable[Result]:
    if value is None:
        return
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        yield _wrong("modules_to_not_convert", "QT013", f"expected a list of strings, found {describe(value)}")
        return
    skip = table.get("skip", [])
    if isinstance(skip, list):
        yield "skip", [*skip, *(name for name in value if name not in skip)]


def _dequantize(backend: str, value: Any, table: dict[str, Any]) -> Iterable[Result]:
    if value is True:
        yield _wrong(
            "dequantize",
            "QT021",
            "dequantize = true would train on the base in full precision",
            "leave [quantization] out to do that; with it, weights stay packed",
        )
    elif value is not False and value is not None:
        yield _wrong("dequantize", "QT013", f"expected true or false, found {describe(value)}")


def _weight_block_size(backend: str, value: Any, table: dict[str, Any]) -> Iterable[Result]:
    if backend == "mxfp4":
        yield _wrong("weight_block_size", "QT021", 'weight_block_size has no meaning for backend "mxfp4"', "its is 32")
    elif value is not None and table.get("block_size", value) != value:
        message = f"weight_block_size = {value} and block_size = {table['block_size']} say different things"
        yield _wrong("weight_block_size", "QT020", message, "remove config_kwargs")
    elif value is not None:
        yield "block_size", value


_KWARGS: dict[str, Callable[[str, Any, dict[str, Any]], Iterable[Result]]] = {
    "dequantize": _dequantize,
    "modules_to_not_convert": _modules_to_not_convert,
    "weight_block_size": _weight_block_size,
}


def _wrong(key: str, code: str, message: str, hint: str | None = None) -> Finding:
    return Finding(code=code, path=(*KWARGS, key), message=message, hint=hint)


def _refused(document: dict[str, Any], finding: Finding) -> Rewritten:
    table = {key: value for key, value in document["quantization"].items() if key != "config_kwargs"}
    return Rewritten(document={**document, "quantization": table}, findings=[finding])


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml(one) for one in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
