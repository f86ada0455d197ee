"""Checks of the description: what `quantune backends list` and the recipe language read without importing torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Literal, get_args, get_origin, get_type_hints

import attrs
import pytest

from quantune.backends.description import API_VERSION, BackendDescription, Probe
from quantune.backends.discovery import NAME, claims
from quantune.backends.options import default_options
from quantune.recipe.reference import field_docs
from quantune.recipe.structure import structure
from quantune.testing.case import Case, Subject
from quantune.testing.failing import expecting_no_error, fail, require

MEASURED_ON = (4096, 4096)
BITS_TOLERANCE = 0.005
RESERVED = ("backend", "skip", "options")
_IMPORT = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
from quantune.backends.description import BackendDescription
module = importlib.import_module(sys.argv[2])
if "torch" in sys.modules:
    sys.exit("importing it")
for value in list(vars(module).values()):
    if isinstance(value, BackendDescription):
        value.probe()
if "torch" in sys.modules:
    sys.exit("probe()")
"""


class DescriptionChecks:
    """The description is complete, true, and free of torch."""

    def test_its_name_is_plain(self, case: Case) -> None:
        name = case.description.name
        require(
            isinstance(name, str) and NAME.fullmatch(name) is not None,
            f"name: expected a lower-case letter and up to 39 letters, digits, '-' and '_', as people write after "
            f"`backend =`, found {name!r}",
        )
        require(
            bool(case.description.summary.strip()), "summary: expected a line for `quantune backends list`, found none"
        )

    def test_it_is_written_for_this_version_of_the_protocol(self, case: Case) -> None:
        found = case.description.api_version
        require(
            found == API_VERSION,
            f"api_version: this quantune has version {API_VERSION} of the protocol, the description says {found}; "
            f"port the backend and set api_version = {API_VERSION}",
        )

    def test_its_options_are_a_frozen_attrs_class(self, case: Case) -> None:
        cls = _options_class(case)
        require(
            isinstance(case.options, cls),
            f"Case.options: expected an instance of {cls.__name__}, the description's options, found {case.options!r}",
        )
        for field in attrs.fields(cls):
            try:
                setattr(case.options, field.name, getattr(case.options, field.name))
            except attrs.exceptions.FrozenInstanceError:
                continue
            fail(
                f"options: {cls.__name__}.{field.name} can be set; decorate the class with @attrs.frozen(kw_only=True)"
            )

    def test_its_options_are_hashable_and_equal_by_value(self, case: Case) -> None:
        cls = _options_class(case)
        remedy = "Layouts are looked up by them: give fields tuples instead of lists and dicts."
        with expecting_no_error(f"hash({case.options!r})", remedy):
            hash(case.options)
        twin = attrs.evolve(case.options)
        require(
            twin == case.options and hash(twin) == hash(case.options),
            f"options: two instances of {cls.__name__} with the same values must be equal; leave eq to attrs",
        )

    def test_every_option_has_a_docstring(self, case: Case) -> None:
        cls = _options_class(case)
        with expecting_no_error(f"reading the source of {cls.__name__}", "Define it in a file, not in an exec."):
            docs = field_docs(cls)
        for field in attrs.fields(cls):
            require(
                bool(docs.get(field.name)),
                f"options: {cls.__name__}.{field.name} lacks the string under it that "
                "`quantune backends show` prints as its documentation",
            )
        require(bool((cls.__doc__ or "").strip()), f"options: {cls.__name__} lacks a docstring")

    def test_its_options_can_be_written_in_a_recipe(self, case: Case) -> None:
        cls = _options_class(case)
        clash = sorted({field.name for field in attrs.fields(cls)} & set(RESERVED))
        require(not clash, f"options: {', '.join(clash)} of [quantization] is quantune's own; choose another name")
        for options in (case.options, case.resolved_options()):
            table = _as_table(options)
            with expecting_no_error(f"structuring {cls.__name__} from {table}", "Use types that TOML has."):
                again, findings = structure(cls, table)
            said = "; ".join(f"{finding.where}: {finding.message}" for finding in findings)
            require(
                not findings and again == options,
                f"options: a recipe with {table} must give {options!r} back, found {said or repr(again)}. Every option "
                "needs a type that TOML can hold: str, int, float, bool, Literal, or a tuple of them; None for unset",
            )

    def test_its_options_say_what_is_wrong_and_what_the_defaults_are(self, case: Case) -> None:
        options, keys = case.options, {field.name for field in attrs.fields(_options_class(case))}
        if hasattr(options, "problems"):
            with expecting_no_error("options.problems()"):
                problems = list(options.problems())
            for problem in problems:
                require(
                    isinstance(problem, tuple)
                    and len(problem) == 2
                    and problem[0] in keys
                    and isinstance(problem[1], str),
                    f"options.problems(): expected pairs of a key of {sorted(keys)} and a message, found {problem!r}",
                )
            require(not problems, f"Case.options: {options!r} has problems by its own account: {problems}")
        if hasattr(options, "resolved"):
            with expecting_no_error("options.resolved()"):
                resolved = options.resolved()
                twice = resolved.resolved()
            require(
                type(resolved) is type(options) and twice == resolved,
                f"options.resolved(): expected {type(options).__name__} with every default written out, which resolves "
                f"to itself, found {resolved!r} and then {twice!r}",
            )
            problems = list(resolved.problems()) if hasattr(resolved, "problems") else []
            require(not problems, f"options.resolved(): the defaults it fills in have problems: {problems}")

    def test_its_weight_dtypes_are_those_of_its_options(self, case: Case) -> None:
        declared = case.description.weight_dtypes
        annotation = get_type_hints(_options_class(case)).get("weight_dtype")
        if annotation is None:
            require(
                declared == (),
                f"weight_dtypes: the options have no weight_dtype, so expected (), found {declared}; "
                "add a field weight_dtype: Literal[...] or leave weight_dtypes empty",
            )
            return
        require(
            get_origin(annotation) is Literal and get_args(annotation) == tuple(declared),
            f"weight_dtypes: expected the values of the option weight_dtype in the same order, as a Literal: "
            f"found {declared} and {annotation}",
        )

    def test_probe_says_whether_it_runs_here(self, case: Case) -> None:
        with expecting_no_error("probe()", "What is missing belongs into Probe(available=False, reason=...)."):
            probe = case.description.probe()
        require(isinstance(probe, Probe), f"probe(): expected a quantune.backends.description.Probe, found {probe!r}")
        if probe.available:
            require(bool(probe.devices), 'probe(): available, but on no devices; say devices=("cpu", "cuda") or fewer')
        else:
            require(bool(probe.reason), "probe(): not available, without a reason; say what is missing in reason=")
        unknown = sorted(set(probe.devices_of) - set(case.description.weight_dtypes))
        require(not unknown, f"probe(): devices_of names {unknown}, which weight_dtypes does not")

    def test_its_description_imports_no_torch(self, case: Case) -> None:
        for module in _modules(case.description):
            command = [
                sys.executable,
                "-c",
                _IMPORT,
                json.dumps([path for path in sys.path if path is not None]),
                module,
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            said = done.stderr.strip().splitlines()[-1:] or [""]
            require(
                done.returncode == 0,
                f"the description's module {module} must neither import torch nor fail to be imported: listing "
                f"backends and checking recipes read it. Import tensor code inside load(); found: {said[0]}"
                + (" imports torch" if said[0] in ("importing it", "probe()") else ""),
            )

    def test_its_bits_per_weight_are_those_measured(self, subject: Subject) -> None:
        description = subject.case.description
        declared = description.bits_per_weight
        if not declared:
            return
        expected = set(description.weight_dtypes or (description.name,))
        require(
            set(declared) == expected,
            f"bits_per_weight: declare all of {sorted(expected)} or none, found {sorted(declared)}",
        )
        for name, bits in declared.items():
            table = {"weight_dtype": name} if description.weight_dtypes else {}
            with expecting_no_error(f"making the default options with {table}", "Give every other option a default."):
                options = default_options(description, table.get("weight_dtype"))
            with expecting_no_error(f"inner_tensors({MEASURED_ON}, {options!r})", "A weight of 4096 x 4096 must fit."):
                layout = subject.backend.layout(MEASURED_ON, subject.weight((1, 1)).dtype, options)
            require(
                abs(layout.bits_per_weight - bits) <= BITS_TOLERANCE * bits,
                f"bits_per_weight: {name} is declared with {bits}, a weight of {MEASURED_ON} takes "
                f"{layout.bits_per_weight:.3f} with default options, scales included; declare that",
            )

    def test_its_backend_has_the_same_name(self, subject: Subject) -> None:
        name, expected = getattr(subject.backend, "name", None), subject.case.description.name
        require(name == expected, f"Backend.name: expected the description's {expected!r}, found {name!r}")


def _options_class(case: Case) -> type[Any]:
    cls = case.description.options
    require(
        isinstance(cls, type) and attrs.has(cls),
        f"options: expected a class decorated with @attrs.frozen(kw_only=True), found {cls!r}",
    )
    return cls


def _as_table(options: Any) -> dict[str, Any]:
    """The options as a recipe's TOML would hold them."""
    table = {}
    for field in attrs.fields(type(options)):
        value = getattr(options, field.name)
        if value is not None:
            table[field.name] = list(value) if isinstance(value, tuple) else value
    return table


def _modules(description: BackendDescription) -> list[str]:
    """Modules that listing backends and checking recipes import."""
    installed = [claim.value.partition(":")[0].strip() for claim in claims() if claim.name == description.name]
    modules = {*installed, description.options.__module__}
    if "__main__" in modules:
        pytest.fail("the description must be in a module of its own, not in a script", pytrace=False)
    return sorted(modules)
