"""The keys of older tools that say how the base is stored, read as claims.

They are understood at the head of a recipe, where those tools have them, and inside `[model]`, `[quantization]` and
`[adapter]`, where a recipe would have them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import attrs

from quantune.recipe.legacy import arguments
from quantune.recipe.legacy.arguments import Arguments
from quantune.recipe.legacy.claims import BACKENDS, Claim, toml, whole_table
from quantune.recipe.positions import Path
from quantune.recipe.structure import Finding, describe

SECTIONS = ("model", "quantization", "adapter")
"""Tables in which an old key may stand as well."""
TABLE, TABLE_KWARGS = "model_quantization_config", "model_quantization_config_kwargs"
KEYS = (TABLE, TABLE_KWARGS, "peft", "bnb_config_kwargs", "load_in_4bit", "load_in_8bit", "quantize_moe_experts")
CONFIG_CLASSES = {"Mxfp4Config": "mxfp4", "FineGrainedFP8Config": "fp8"}
OTHER_CLASSES = {"BitsAndBytesConfig": "bnb", "TorchAoConfig": "torchao", "HqqConfig": "hqq"}
"""Other config classes of transformers whose formats quantune has under a name of its own."""


@attrs.define(kw_only=True)
class Reading:
    """What the old keys of a document say."""

    claims: list[Claim] = attrs.field(factory=list)
    warnings: list[Finding] = attrs.field(factory=list)
    """Old keys that claim nothing about the table."""
    findings: list[Finding] = attrs.field(factory=list)
    precisions: list[tuple[str, Path]] = attrs.field(factory=list)
    """Each `[training] precision`, and the key that says so."""


@attrs.frozen(kw_only=True)
class Old:
    """An old key of a document, with its value."""

    path: Path
    value: Any

    @property
    def written(self) -> str:
        """The key as people know it."""
        *tables, key = [str(part) for part in self.path]
        table = f"[{tables[0]}] " if len(tables) == 1 and tables[0] in SECTIONS else "".join(f"{t}." for t in tables)
        short = isinstance(self.value, bool | int | float | str)
        return f"{table}{key} = {toml(self.value)}" if short else f"{table}{key}"


def old_keys(document: dict[str, Any]) -> dict[str, list[Old]]:
    """The old keys there are, by name, wherever they stand; those without a value (YAML's null) are left out."""
    found: dict[str, list[Old]] = {key: [] for key in KEYS}
    for path, table in _places(document):
        for key in KEYS:
            if table.get(key) is not None:
                found[key].append(Old(path=(*path, key), value=table[key]))
    for held in found["bnb_config_kwargs"]:
        for key in arguments.SWITCHES:
            if isinstance(held.value, dict) and held.value.get(key) is not None:
                found[key].append(Old(path=(*held.path, key), value=held.value[key]))
    return found


def without_old_keys(document: dict[str, Any]) -> dict[str, Any]:
    """The document without them; a `[quantization]` that held nothing else goes with them."""
    rest = {key: value for key, value in document.items() if key not in KEYS}
    for path, table in _places(document):
        if path and any(key in table for key in KEYS):
            rest[str(path[0])] = {key: value for key, value in table.items() if key not in KEYS}
    if not rest.get("quantization", True) and document["quantization"]:
        del rest["quantization"]
    return rest


def _places(document: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    yield (), document
    for section in SECTIONS:
        table = document.get(section)
        # the keys of a plugin's table are the plugin's
        if isinstance(table, dict) and not (section == "quantization" and _is_of_a_plugin(table)):
            yield (section,), table


def _is_of_a_plugin(table: dict[str, Any]) -> bool:
    return isinstance(table.get("backend"), str) and table["backend"] not in BACKENDS


def read(found: dict[str, list[Old]]) -> Reading:
    """The claims of the old keys, in an order that is not the document's; without those of `[adapter]`."""
    reading = Reading()
    for old in found[TABLE]:
        _read_table(old, reading)
    for old in found["peft"]:
        _read_peft(old, reading)
    for old in found[TABLE_KWARGS]:
        _read_table_kwargs(old, found[TABLE], reading)
    quant_type = None
    for old in found["bnb_config_kwargs"]:
        made = arguments.of_bitsandbytes(old.path, old.value)
        quant_type = made.says.get("weight_dtype", quant_type)
        add_arguments(old, made, reading, backend="bnb")
    for key, dtype in (("load_in_4bit", quant_type or "nf4"), ("load_in_8bit", "int8")):
        for old in found[key]:
            _read_switch(old, dtype, reading)
    for old in found["quantize_moe_experts"]:
        flag = _flag(old, reading)
        if flag is not None:
            claim = Claim(form="part", path=old.path, written=old.written, says={"experts": flag})
            reading.claims.append(claim)
    return reading


def read_adapter(document: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Add what the adapter's old spellings say; the document with `[adapter]` as a table."""
    value = document.get("adapter")
    path: Path = ("adapter",)
    rest = {key: held for key, held in document.items() if key != "adapter"}
    if value is None or value == "":
        return rest
    if isinstance(value, dict):
        path = ("adapter", "type")
        if value.get("type") != "qlora":
            return document
        table, kind = {**value, "type": "lora"}, "qlora"
    elif value in ("lora", "qlora"):
        table, kind = {"type": "lora"}, value
    elif isinstance(value, str):
        close = difflib.get_close_matches(value, ("lora", "qlora"), n=1)
        hint = f'did you mean "{close[0]}"?' if close else "quantune trains LoRA adapters: write [adapter]"
        hint = "write [adapter] use_dora = true" if value == "dora" else hint
        message = f'expected a table, "lora" or "qlora", found {describe(value)}'
        reading.findings.append(Finding(code="QT013", path=path, message=message, hint=hint))
        return {**rest, "adapter": {}}
    else:
        return document
    written = f"adapter = {toml(kind)}" if len(path) == 1 else f"[adapter] type = {toml(kind)}"
    if kind == "lora":
        reading.warnings.append(deprecated(path, written, 'write [adapter] type = "lora"'))
    else:
        dtypes = [claim.says["weight_dtype"] for claim in reading.claims if _is_quant_type(claim)]
        says = {"backend": "bnb", "weight_dtype": dtypes[-1] if dtypes else "nf4"}
        reading.claims.append(Claim(form="qlora", path=path, written=written, says=says))
    return {**rest, "adapter": table}


def deprecated(path: Path, written: str, now: str) -> Finding:
    """The warning about an old key."""
    return Finding(code="QT040", path=path, message=f"{written} is DEPRECATED", hint=now)


def add_arguments(old: Old, made: Arguments, reading: Reading, *, backend: str) -> None:
    """Add what a table of arguments says about the table of `backend`, which another key names."""
    reading.findings += made.findings
    if made.precision is not None:
        reading.precisions.append((made.precision, made.places["precision"]))
    if made.findings:
        return
    precision = () if made.precision is None else (f"write [training] precision = {toml(made.precision)}",)
    reading.claims.append(
        Claim(
            form="part",
            path=old.path,
            written=old.written,
            says=made.says,
            places=made.places,
            also=(*precision, *made.notes),
            needs=backend if made.places or made.notes else None,
        )
    )


def _is_quant_type(claim: Claim) -> bool:
    return claim.form == "part" and "weight_dtype" in claim.says


def _read_switch(old: Old, dtype: str, reading: Reading) -> None:
    flag = _flag(old, reading)
    if flag is None:
        return
    form: Any = "4bit" if old.path[-1] == "load_in_4bit" else "8bit"
    if flag:
        says = {"backend": "bnb", "weight_dtype": dtype}
        reading.claims.append(Claim(form=form, path=old.path, written=old.written, says=says))
    else:
        denies = ("nf4", "fp4") if form == "4bit" else ("int8",)
        reading.claims.append(Claim(form=form, path=old.path, written=old.written, denies=denies))


def _flag(old: Old, reading: Reading) -> bool | None:
    """true or false, as a string in any case too."""
    value = old.value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if isinstance(value, bool):
        return value
    message = f"expected true or false, found {describe(value)}"
    reading.findings.append(Finding(code="QT013", path=old.path, message=message))
    return None


def _read_table(old: Old, reading: Reading) -> None:
    if isinstance(old.value, str):
        if old.value in CONFIG_CLASSES:
            says = {"backend": CONFIG_CLASSES[old.value]}
            reading.claims.append(Claim(form="table", path=old.path, written=old.written, says=says))
        else:
            reading.findings.append(_unknown_class(old))
    elif not isinstance(old.value, dict):
        names = " or ".join(f'"{name}"' for name in CONFIG_CLASSES)
        message = f"expected {names}, or a table, found {describe(old.value)}"
        reading.findings.append(Finding(code="QT013", path=old.path, message=message))
    elif old.value.get("backend") is not None:
        _read_flat(old, old.path, old.value, reading)
    else:
        _read_nested(old, reading)


def _read_nested(old: Old, reading: Reading) -> None:
    """`{torchao = {weight_dtype = "int4"}}`: the backend as the key of its options."""
    given = {key: value for key, value in old.value.items() if value is not None} or old.value
    named = [key for key, value in given.items() if isinstance(value, dict) or value is None or key in BACKENDS]
    strays = sorted(str(key) for key in given if key not in named)
    if len(named) > 1:
        first, second = sorted(map(str, named))[:2]
        several = _several_backends(old, sorted(map(str, named)), (*old.path, second), (*old.path, first))
        reading.findings.append(several)
    elif strays and named and named[0] in BACKENDS and isinstance(given[named[0]], dict):
        message = f"{', '.join(strays)} {'stands' if len(strays) == 1 else 'stand'} beside {named[0]}'s table"
        hint = f"move it in: {old.path[-1]} = {{{named[0]} = {{..., {strays[0]} = {toml(given[strays[0]])}}}}}"
        reading.findings.append(Finding(code="QT116", path=(*old.path, strays[0]), message=message, hint=hint))
    elif not named or strays:
        found = ", ".join(sorted(map(str, given))) or "nothing"
        message = f"{old.written} names no backend: expected one with its options as a table, found {found}"
        hint = "write [quantization] backend = ... with the options beside it"
        reading.findings.append(Finding(code="QT116", path=old.path, message=message, hint=hint))
    elif not isinstance(given[named[0]], dict | None):
        message = f"expected a table, found {describe(given[named[0]])}"
        reading.findings.append(Finding(code="QT013", path=(*old.path, named[0]), message=message))
    else:
        options = given[named[0]] or {}
        if options.get("backend", named[0]) != named[0]:
            both = sorted([str(named[0]), str(options["backend"])])
            at = (*old.path, named[0])
            reading.findings.append(_several_backends(old, both, (*at, "backend"), at))
        else:
            _read_flat(old, (*old.path, named[0]), {**options, "backend": named[0]}, reading)


def _several_backends(old: Old, names: list[str], path: Path, other: Path) -> Finding:
    message = f"{old.written} names several backends: {', '.join(names)}"
    hint = "a base is stored in one format: write [quantization] with the backend that was meant"
    return Finding(code="QT117", path=path, message=message, hint=hint, other=other, other_label="another backend")


def _read_peft(old: Old, reading: Reading) -> None:
    if not isinstance(old.value, dict):
        message = f"expected a table, found {describe(old.value)}"
        reading.findings.append(Finding(code="QT013", path=old.path, message=message))
    elif old.value.get("backend") is None:
        found = ", ".join(sorted(map(str, old.value))) or "nothing"
        hint = "write [quantization] backend = ..., weight_dtype = ..."
        if "loftq_config" in old.value:
            hint = 'LoftQ is [adapter] init = "loftq" with loftq_iterations, beside [quantization]'
        message = f"{old.written} names no backend: expected backend and weight_dtype, found {found}"
        reading.findings.append(Finding(code="QT116", path=old.path, message=message, hint=hint))
    else:
        _read_flat(old, old.path, old.value, reading)


def _read_flat(old: Old, path: Path, given: dict[str, Any], reading: Reading) -> None:
    """`{backend = "torchao", weight_dtype = "int4"}`: what `[quantization]` looks like."""
    backend = given["backend"]
    own = ("config_kwargs",) if backend in BACKENDS else ()  # a plugin's keys are the plugin's
    table = {key: value for key, value in given.items() if value is not None and key not in own}
    others = sorted(str(key) for key, value in table.items() if key in BACKENDS and isinstance(value, dict))
    if others:
        named = sorted({*others, str(backend)})
        reading.findings.append(_several_backends(old, named, (*path, others[0]), (*path, "backend")))
        return
    if backend in CONFIG_CLASSES.values() and table.get("weight_dtype") == backend:
        del table["weight_dtype"]  # there is one format, and this says which
    places = {key: (*path, key) for key in table if not (key == "backend" and path != old.path)}
    if "backend" not in places:
        places["backend"] = path
    claim = whole_table(table, old.path, old.written)
    reading.claims.append(attrs.evolve(claim, places=places))
    read_config_kwargs(Old(path=(*path, "config_kwargs"), value=given.get("config_kwargs")), backend, reading)


def read_config_kwargs(old: Old, backend: Any, reading: Reading) -> None:
    """The arguments of a config class, in the table that names the backend."""
    if old.value is None:
        return
    if backend in CONFIG_CLASSES.values():
        add_arguments(old, arguments.of_config(old.path, backend, old.value), reading, backend=backend)
    elif backend in BACKENDS:
        message = f'config_kwargs has no meaning for backend "{backend}"'
        finding = Finding(code="QT021", path=old.path, message=message, hint="write its options directly")
        reading.findings.append(finding)


def _read_table_kwargs(old: Old, tables: list[Old], reading: Reading) -> None:
    if old.value == {}:
        reading.warnings.append(deprecated(old.path, old.written, "leave it out: it says nothing"))
        return
    named = [table for table in tables if isinstance(table.value, str)]
    if not named:
        message = f"{TABLE_KWARGS} holds the arguments of the class that {TABLE} names, and "
        message += f"{TABLE} names none" if tables else f"there is no {TABLE}"
        hint = "write them as options under [quantization] backend = ..."
        other = tables[0].path if tables else None
        reading.findings.append(Finding(code="QT118", path=old.path, message=message, hint=hint, other=other))
        return
    backend = CONFIG_CLASSES.get(named[0].value)
    if backend is not None:  # or it is a finding already
        add_arguments(old, arguments.of_config(old.path, backend, old.value), reading, backend=backend)


def _unknown_class(old: Old) -> Finding:
    names = " or ".join(f'"{name}"' for name in CONFIG_CLASSES)
    message = f"expected {names}, or a table, found {describe(old.value)}"
    close = difflib.get_close_matches(old.value, CONFIG_CLASSES, n=1)
    if old.value in OTHER_CLASSES:
        hint = f'write [quantization] backend = "{OTHER_CLASSES[old.value]}"'
    else:
        hint = f'did you mean "{close[0]}"?' if close else "write [quantization] backend = ..."
    return Finding(code="QT013", path=old.path, message=message, hint=hint)
