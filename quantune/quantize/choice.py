"""Which format a checkpoint is to be packed into, from what is asked on the command line. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import attrs

from quantune.backends import registry
from quantune.backends.options import choose_dtype, default_options
from quantune.errors import BackendError, InputError
from quantune.recipe.overrides import toml_value
from quantune.recipe.schema import QuantizationConfig
from quantune.recipe.structure import structure


@attrs.frozen(kw_only=True)
class Choice:
    """A format for a checkpoint."""

    quantization: QuantizationConfig
    """As a recipe would say it, every default written out."""
    activation_dtype: str | None = None
    """What activations are rounded to where the checkpoint is used; None to leave them as they are."""

    @property
    def format(self) -> str:
        """`backend:weight_dtype`, or the backend's name where it has one format."""
        weight_dtype = getattr(self.quantization.options, "weight_dtype", None)
        return self.quantization.backend if weight_dtype is None else f"{self.quantization.backend}:{weight_dtype}"


def choose(
    backend: str,
    weight_dtype: str | None = None,
    *,
    settings: Sequence[str] = (),
    skip: Sequence[str] = (),
    activation_dtype: str | None = None,
) -> Choice:
    """The format that is asked for.

    Args:
        settings: options of the backend as `key=value`, the value as TOML writes it.

    Raises:
        BackendError: there is no such backend, it can't run here, or it does not take these options.
        InputError: a setting is none, or there are no such activations for these weights.
    """
    description = registry.describe_available(backend)
    given = _settings(settings)
    if weight_dtype is not None and "weight_dtype" in given:
        raise InputError("--weight-dtype and --set weight_dtype say the same; give one of them")
    if weight_dtype is None and "weight_dtype" not in given and _required(description.options, "weight_dtype"):
        listing = ", ".join(description.weight_dtypes)
        raise InputError(f"expected --weight-dtype for --backend {backend}: one of {listing}")
    chosen = choose_dtype(description, weight_dtype or given.pop("weight_dtype", None))
    if chosen is not None:
        given["weight_dtype"] = chosen
    options, findings = structure(description.options, given)
    problems = [
        f"{finding.where}: {finding.message.replace('unknown section', 'unknown option')}" for finding in findings
    ]
    if options is not None and hasattr(options, "problems"):
        problems += [f"{key}: {message}" for key, message in options.problems()]
    if problems or options is None:
        known = ", ".join(field.name for field in attrs.fields(description.options)) or "none"
        raise BackendError(
            f"backend {json.dumps(backend)} can't be set like this: {'; '.join(problems)}. Its options: {known}"
        )
    if activation_dtype is not None and activation_dtype not in _activation_dtypes(options):
        raise InputError(_no_such_activations(activation_dtype, backend, options))
    options = options.resolved() if hasattr(options, "resolved") else options
    quantization = QuantizationConfig(backend=backend, skip=tuple(skip), options=options)
    return Choice(quantization=quantization, activation_dtype=activation_dtype)


def _required(options: type, name: str) -> bool:
    """Whether a recipe has to set an option."""
    field = attrs.fields_dict(options).get(name)
    return field is not None and field.default is attrs.NOTHING


def _settings(settings: Sequence[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise InputError(f'--set: expected key=value, found "{setting}"; e.g. --set group_size=64')
        try:
            given[key.strip()] = toml_value(value.strip())
        except ValueError:
            raise InputError(f'--set {key.strip()}: expected a TOML value, found "{value.strip()}"') from None
    return given


def _activation_dtypes(options: Any) -> tuple[str, ...]:
    """What the reader of a format can be asked to round activations to."""
    return tuple(options.activation_dtypes()) if hasattr(options, "activation_dtypes") else ()


def _no_such_activations(asked: str, backend: str, options: Any) -> str:
    formats = [
        (description.name, default_options(description, weight_dtype))
        for description in map(registry.describe, registry.BUILT_IN)
        for weight_dtype in description.weight_dtypes or (None,)
    ]
    pairs = [
        f"--backend {name} --weight-dtype {made.weight_dtype} --activation-dtype {dtype}"
        for name, made in formats
        for dtype in _activation_dtypes(made)
    ]
    unasked = [made.activations_when_read() for _, made in formats if hasattr(made, "activations_when_read")]
    rest = [*filter(None, unasked), "other formats leave activations as they are"]
    weight_dtype = getattr(options, "weight_dtype", None)
    weights = backend if weight_dtype is None else f"{backend} {weight_dtype}"
    groups = getattr(options, "group_size", None)
    return (
        f"--activation-dtype {asked}: no reader can be asked to multiply {weights} weights"
        + ("" if groups is None else f" in groups of {groups}")
        + f" by activations rounded to it. What there is, with one scale per row: {'; '.join(pairs)}. "
        + f"{'; '.join(rest)}"
    )
