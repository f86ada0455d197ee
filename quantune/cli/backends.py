"""`quantune backends`: what can quantize here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import attrs
import typer
from rich.markup import escape

from quantune.backends import registry
from quantune.backends.discovery import plain
from quantune.cli import compare
from quantune.cli.console import err, out, table
from quantune.errors import InputError

if TYPE_CHECKING:
    from quantune.backends.inspection import Checked

app = typer.Typer(help="What can quantize here, what cannot, and why.", no_args_is_help=True)

COLORS = {"available": "green", "works": "green", "broken": "red"}
LONGEST_TIMEOUT = 86_400
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def root() -> None:
    """What can quantize here, what cannot, and why."""


@app.command("list")
def list_backends(as_json: Json = False) -> None:
    """List the installed backends; imports no third party's code."""
    rows = [registry.status(found) for found in registry.find()]
    if as_json:
        out.print_json(json.dumps([row.as_dict() for row in rows]))
        return
    shown = table("backend", "package", "bits per weight", "devices", "status")
    for row in rows:
        shown.add_row(
            escape(row.name),
            escape(f"{row.package} {row.version}"),
            _bits(row.bits_per_weight),
            ", ".join(row.devices) or "-",
            _status(row.status),
        )
    out.print(shown)
    for row in rows:
        _explain(row.name, row.status, row.reason, row.install or row.hint)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A backend that `quantune backends list` shows.")],
    as_json: Json = False,
) -> None:
    """Show a backend's options and what to write into a recipe; imports its description, not its tensor code."""
    from quantune.backends.options import options_in_words, snippet

    found = registry.named(name)
    description = registry.load_description(found)
    probe = registry.probe_of(description)
    options = options_in_words(description.options)
    recipe = snippet(description)
    status = "available" if probe.available else "unavailable"
    devices = {dtype: list(probe.devices_of.get(dtype, probe.devices)) for dtype in description.weight_dtypes}
    if as_json:
        document = {
            "name": found.name,
            "package": found.package,
            "version": found.version,
            "summary": description.summary,
            "status": status,
            "reason": probe.reason,
            "install": probe.install,
            "weight_dtypes": description.weight_dtypes,
            "bits_per_weight": dict(description.bits_per_weight),
            "devices": probe.devices,
            "devices_of": devices,
            "options": [attrs.asdict(option) for option in options],
            "recipe": recipe,
        }
        out.print_json(json.dumps(document))
        return
    out.print(f"[bold]{escape(found.name)}[/]  {escape(plain(description.summary))}")
    out.print(f"{escape(f'{found.package} {found.version}')}, {_status(status, probe.reason, probe.install)}")
    formats = table("weight_dtype" if description.weight_dtypes else "format", ">bits per weight", "devices")
    for dtype in description.weight_dtypes or (found.name,):
        bits = description.bits_per_weight.get(dtype)
        where = ", ".join(devices.get(dtype, probe.devices)) or "-"
        formats.add_row(escape(plain(dtype, 40)), "-" if bits is None else f"{bits:.2f}", escape(plain(where)))
    out.print(formats)
    keys = table("option", "type", "default", "meaning")
    for option in options:
        default = "[bold]required[/]" if option.required else escape(option.default or "-")
        keys.add_row(f"[cyan]{escape(option.key)}[/]", escape(option.type), default, escape(option.doc))
    if options:
        out.print(keys)
    else:
        out.print("It has no options.\n")
    out.print(recipe, markup=False, end="")


@app.command("check")
def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Backends to check; all installed ones by default.")
    ] = None,
    as_json: Json = False,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds that a backend may take, importing torch included.")
    ] = 120.0,
) -> None:
    """Try backends out: import, probe and load each in a process of its own, pack a random weight and dequantize it.

    Bits per weight are those of a weight of 4096 x 4096. Exit code 1 if a backend is broken: it can't be imported or
    used, crashes, hangs, or gives back something else than it packed. One that lacks something on this machine (a
    package, a GPU) is unavailable, not broken, and does not change the exit code.
    """
    from quantune.backends import inspection

    if not 1 <= timeout <= LONGEST_TIMEOUT:
        raise InputError(f"expected 1 to {LONGEST_TIMEOUT:,} seconds for --timeout, found {timeout}")
    chosen = [registry.named(name) for name in dict.fromkeys(names)] if names else registry.find()
    results = []
    for found in chosen:
        with err.status(f"checking {escape(found.name)}"):
            results.append(inspection.check(found, timeout))
    if as_json:
        out.print_json(json.dumps([result.as_dict() for result in results]))
    else:
        _print_checked(results)
    if any(result.status == "broken" for result in results):
        raise typer.Exit(1)


def _print_checked(results: Sequence[Checked]) -> None:
    shown = table("backend", "format", "device", ">bits", ">error", ">pack ms", ">dequant ms")
    for result in results:
        name = escape(result.name)
        for trip in result.round_trips:
            bits = f"{trip.bits_per_weight:.2f}"
            if trip.declared is not None and abs(trip.declared - trip.bits_per_weight) > 0.01:
                bits += f" [yellow](declared {trip.declared:.2f})[/]"
            times = (f"{1000 * seconds:.1f}" for seconds in (trip.pack_seconds, trip.dequantize_seconds))
            dtype, device = escape(plain(trip.weight_dtype, 40)), escape(plain(trip.device, 20))
            shown.add_row(name, dtype, device, bits, f"{100 * trip.relative_error:.2f}%", *times)
            name = ""
    if shown.row_count:
        out.print(shown)
    for result in results:
        whose = f"[dim]({escape(f'{result.package} {result.version}')})[/]"
        out.print(f"{escape(result.name)} {whose} {_status(result.status, result.reason, result.install)}")


def _explain(name: str, status: str, reason: str | None, way_out: str | None) -> None:
    """A sentence under the table, where there is something to say; a reason is too long for a column."""
    if reason or (way_out and status == "installed"):
        out.print(f"{escape(name)} is {_status(status, reason, way_out)}")


def _status(status: str, reason: str | None = None, way_out: str | None = None) -> str:
    """A status in its color, with what explains it and what to do."""
    color = COLORS.get(status, "yellow")
    more = (f": {plain(reason)}" if reason else "") + (f" ({plain(way_out)})" if way_out else "")
    return f"[{color}]{escape(status)}[/]{escape(more)}"


def _bits(bits_per_weight: Mapping[str, float]) -> str:
    return " · ".join(f"{escape(name)} {bits:.2f}" for name, bits in bits_per_weight.items()) or "-"


app.command("compare")(compare.compare)
