"""What a key says about how the base is stored, and what two keys can't say together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import attrs

from quantune.recipe.positions import Path
from quantune.recipe.structure import Finding

BACKENDS = ("bnb", "torchao", "mxfp4", "fp8")
"""The backends that older configs name."""
GROUP_SIZES = {"int4": 128, "nf4": 64, "nvfp4": 16, "int8": 128}
"""torchao's groups where an older config names none; in quantune those of int8 are whole rows."""
DEFAULTS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("bnb", "nf4"): {"block_size": 64, "double_quant": True},
    ("bnb", "fp4"): {"block_size": 64, "double_quant": True},
    ("torchao", "int4"): {"group_size": 128},
    ("torchao", "nf4"): {"group_size": 64, "scaler_block_size": 256},
    ("torchao", "nvfp4"): {"group_size": 16},
    ("torchao", "int8"): {"group_size": None},
    ("fp8", None): {"block_size": [128, 128]},
}
"""What `[quantization]` means by leaving keys out, by backend and weight dtype; None for what has no value."""
_ORDER = ("backend", "weight_dtype", "group_size", "scaler_block_size", "block_size", "double_quant", "skip", "experts")


@attrs.frozen(kw_only=True)
class Claim:
    """What one key says about `[quantization]`."""

    form: Literal["table", "4bit", "8bit", "qlora", "part"]
    """A whole table, one of the switches, `qlora`, or settings of a table that another key names."""
    path: Path
    """The key."""
    written: str
    """The key as people know it, e.g. `load_in_4bit = true`."""
    says: dict[str, Any] = attrs.field(factory=dict)
    """Keys of `[quantization]` and their values."""
    implied: dict[str, Any] = attrs.field(factory=dict)
    """What it means by leaving keys out; None for what has no value."""
    denies: tuple[str, ...] = ()
    """Weight dtypes of bnb that it rules out."""
    places: dict[str, Path] = attrs.field(factory=dict)
    """Where it says each of `says`, when not at `path`."""
    also: tuple[str, ...] = ()
    """What it says beside the table, as words of advice."""
    needs: str | None = None
    """The backend whose settings a part says."""
    canonical: bool = False
    """Whether it is `[quantization]` itself."""

    @property
    def means(self) -> dict[str, Any]:
        """All it says about the table, implied or not."""
        return {**self.implied, **self.says}

    @property
    def name(self) -> str:
        """The key without its value, e.g. `[model] load_in_4bit`."""
        return self.written.partition(" = ")[0]

    def place(self, key: str) -> Path:
        """Where it says `key`."""
        return self.places.get(key, self.path)


def whole_table(table: dict[str, Any], path: Path, written: str, *, canonical: bool = False) -> Claim:
    """The claim of a table that names its backend, or lacks it by mistake."""
    backend, dtype = table.get("backend"), table.get("weight_dtype")
    implied: dict[str, Any] = {}
    if backend == "bnb" and "weight_dtype" not in table:
        implied["weight_dtype"] = dtype = "nf4"
    if canonical and "backend" in table:
        named = (backend, dtype) if isinstance(backend, str) and isinstance(dtype, str | None) else None
        implied = {"experts": True, **implied, **(DEFAULTS.get(named, {}) if named is not None else {})}
        implied = {key: value for key, value in implied.items() if key not in table}
    elif backend == "torchao" and "group_size" not in table and dtype in tuple(GROUP_SIZES):
        implied["group_size"] = GROUP_SIZES[dtype]
    return Claim(form="table", path=path, written=written, says=table, implied=implied, canonical=canonical)


def contradictions(claims: Sequence[Claim]) -> Iterator[tuple[Finding, tuple[Claim, Claim]]]:
    """A finding for each two claims that contradict each other, with the two."""
    for index, later in enumerate(claims):
        for earlier in claims[:index]:
            finding = _contradiction(earlier, later)
            if finding is not None:
                yield finding, (earlier, later)


def _contradiction(one: Claim, other: Claim) -> Finding | None:
    """What is wrong with the two together, at the later one."""
    for denying, denied in ((one, other), (other, one)):
        dtype = denied.means.get("weight_dtype")
        if denied.means.get("backend") == "bnb" and dtype in denying.denies:
            message = f"{denying.written} rules out bnb {dtype}, and {denied.written} means it"
            return _finding(one, other, "weight_dtype", message)
    for part, whole in ((one, other), (other, one)):
        if part.needs is not None and isinstance(backend := whole.says.get("backend"), str) and backend != part.needs:
            return Finding(
                code="QT124",
                path=part.path,
                message=f'{part.written} has settings of backend "{part.needs}", and {_meaning(whole, "backend")}',
                hint=f'leave it out, or name backend = "{part.needs}" in {whole.name}',
                other=whole.place("backend"),
                other_label=f"says {in_short(whole)}",
            )
    both = one.means.keys() & other.means.keys() - {"skip"}
    if one.canonical and other.form == "part" and other.path[:1] == one.path:
        both -= one.implied.keys()  # what stands in the table itself completes it
    for key in sorted(both, key=_rank):
        if one.means[key] != other.means[key]:
            return _finding(one, other, key, f"{_meaning(other, key)}, and {_meaning(one, key)}")
    return None


def _finding(one: Claim, other: Claim, key: str, message: str) -> Finding:
    code = _code(one, other)
    return Finding(
        code=code,
        path=other.place(key),
        message=message,
        hint=_way_out(code, one, other),
        other=one.place(key),
        other_label=f"says {in_short(one, key)}" if one.means else f"rules out bnb {' and '.join(one.denies)}",
    )


def _meaning(claim: Claim, key: str) -> str:
    return f"{claim.written} means {in_short(claim, key)}" + ("" if key in claim.says else " by default")


def in_short(claim: Claim, key: str = "backend") -> str:
    """The format that a claim means, and what it says of `key`: `torchao int8 with group_size = 128`."""
    means = claim.means
    words = [str(means[one]) for one in ("backend", "weight_dtype") if means.get(one) is not None]
    if "backend" not in means:
        return f"{key} = {toml(means[key])}"
    if key not in ("backend", "weight_dtype"):
        words.append(f"without {key}" if means[key] is None else f"with {key} = {toml(means[key])}")
    return " ".join(words)


def _code(one: Claim, other: Claim) -> str:
    """The code of a contradiction, by what contradicts what."""
    by_form = {claim.form: claim for claim in (one, other)}
    switch = by_form.get("4bit") or by_form.get("8bit")
    if "qlora" in by_form:
        if "8bit" in by_form:
            return "QT102"
        return "QT103" if switch is not None and not switch.says else "QT101"
    if "4bit" in by_form and "8bit" in by_form:
        return "QT104"
    table = by_form.get("table")
    if switch is None or table is None:
        return "QT100"
    if "backend" in table.means and table.means["backend"] != "bnb":
        return "QT109" if switch.says else "QT100"
    if table.means.get("weight_dtype") == "int8":
        return "QT108" if switch.form == "4bit" else "QT107"
    if switch.form == "8bit":
        return "QT106"
    return "QT100" if switch.says else "QT105"


def _way_out(code: str, one: Claim, other: Claim) -> str:
    """What to do about a contradiction, in the names of the keys that are there."""
    by_form = {claim.form: claim for claim in (one, other)}
    switch, table = by_form.get("4bit") or by_form.get("8bit"), by_form.get("table")
    if code == "QT101":
        return 'qlora is lora on bnb\'s nf4; for another quantization write [adapter] type = "lora"'
    if code == "QT102":
        return 'for 8 bits write [adapter] type = "lora" and [quantization] backend = "bnb", weight_dtype = "int8"'
    if code == "QT104":
        return 'keep one: [quantization] backend = "bnb" with weight_dtype = "nf4" or "int8"'
    if switch is None or code == "QT100":
        canonical = one.canonical or other.canonical
        return "keep one of them, best [quantization]" if canonical else "keep one of them, best as [quantization]"
    if code == "QT103":
        return f'leave out {switch.name}, or write [adapter] type = "lora" to train on the base as it is'
    assert table is not None
    ways_out = {
        "QT105": f"or {table.name} to train on the base as it is",
        "QT106": f'or write weight_dtype = "int8" in {table.name}',
        "QT107": f"or {table.name} to train on the base as it is",
        "QT108": f'or write weight_dtype = "nf4" in {table.name}',
    }
    if code == "QT109":
        return f"leave out {switch.name}: it is bitsandbytes'"
    return f"leave out {switch.name}, {ways_out[code]}"


def unified(claims: Sequence[Claim]) -> dict[str, Any]:
    """The table that claims which agree come to."""
    table: dict[str, Any] = {}
    # beside [quantization], what is implied there as well is left to its defaults
    complete = any(claim.canonical and "backend" in claim.says for claim in claims)
    for claim in claims:
        for key, value in (claim.says if complete else {**claim.says, **_needed(claim)}).items():
            if key == "skip" and isinstance(value, list) and isinstance(table.get("skip", []), list):
                table[key] = [*table.get("skip", ()), *(one for one in value if one not in table.get("skip", ()))]
            else:
                table.setdefault(key, value)
    return {key: table[key] for key in sorted(table, key=_rank)}


def _needed(claim: Claim) -> dict[str, Any]:
    return {key: value for key, value in claim.implied.items() if value is not None}


def _rank(key: str) -> tuple[int, str]:
    return (_ORDER.index(key) if key in _ORDER else len(_ORDER), str(key))


def table_text(table: dict[str, Any]) -> str:
    """Keys and values as a recipe has them, on one line."""
    return ", ".join(f"{key} = {toml(value)}" for key, value in table.items())


def toml(value: Any) -> str:
    """A value as TOML; for messages, so what is no TOML is shown all the same."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(toml(one) for one in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(one)}" for key, one in value.items()) + "}"
    return f'"{value}"' if isinstance(value, str) else str(value)
