"""The files a recipe names, looked at before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from quantune.recipe import chat_templates
from quantune.recipe.load import LoadedRecipe
from quantune.recipe.schema import QuantizationConfig, Recipe
from quantune.recipe.structure import Finding

BUILT_IN_MODELS = ("builtin:mini",)
CONVERT_PICKLES = (
    "a pickle can run code when it is opened; if you trust it, convert it once with transformers: "
    "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new) writes safetensors"
)
SHARES_OF_WEIGHTS = ("pissa", "olora", "loftq")
"""Initializations of the adapter that change the base's weights."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class FormatProblem(Protocol):
    """Why a recipe can't have a base that is already quantized."""

    @property
    def code(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def way_out(self) -> str: ...


FormatCheck = Callable[[Mapping[str, Any], QuantizationConfig | None], FormatProblem | None]


def any_format(stored: Mapping[str, Any], quantization: QuantizationConfig | None) -> None:
    """The check that finds no fault, for where `[quantization]` is not known."""


def check_files(
    loaded: LoadedRecipe,
    recipe: Recipe,
    *,
    data: bool = True,
    start: bool = True,
    format_problem: FormatCheck = any_format,
) -> None:
    """Check the files of `recipe`, which is `loaded.recipe` with absolute paths.

    Raises:
        RecipeError: files are missing, empty or not what they should be.
    """
    findings = file_findings(recipe, data=data, start=start, format_problem=format_problem)
    if findings:
        raise loaded.error(findings)


def file_findings(
    recipe: Recipe, *, data: bool = True, start: bool = True, format_problem: FormatCheck = any_format
) -> list[Finding]:
    """What is wrong with the files of a recipe with absolute paths; with `data` also with those of samples, with
    `start` with the adapter that training starts from.

    `format_problem` says what is wrong with a base that is already quantized, given what its `config.json` says of
    that, and `[quantization]`.
    """
    findings: list[Finding] = []
    rules = [("model", "base", _base), ("model", "tokenizer", _tokenizer), ("model", "chat_template", _chat_template)]
    if start:
        rules.append(("adapter", "start_from", _start_from))
    for section, key, rule in rules:
        try:
            findings += rule(recipe)
        except OSError as error:  # no permission, a name too long, a disk that fails
            message = f"{getattr(getattr(recipe, section), key)} can't be read: {error.strerror}"
            findings.append(Finding(code="QT030", path=(section, key), message=message))
    if not any(finding.path == ("model", "base") for finding in findings):
        findings += _stored_format(recipe, format_problem)
    findings += _revision(recipe)
    if data:
        findings += _data(recipe)
    return findings


def is_local(base: str) -> bool:
    """Whether a base names a folder rather than a built-in model or a hub id."""
    return base.startswith(("/", "./", "../", "~")) or base in (".", "..")


def base_problem(base: str) -> tuple[str, str | None] | None:
    """What is wrong with a base as far as files can tell, and what to do about it; a hub id is not looked up."""
    if base.startswith("builtin:"):
        known = base in BUILT_IN_MODELS
        return None if known else (f'there is no built-in model "{base}"', f"there is {', '.join(BUILT_IN_MODELS)}")
    folder = Path(base)
    if not folder.is_dir():
        return (f"there is no folder {base}", "a hub id has no leading slash or dot") if is_local(base) else None
    if not (folder / "config.json").is_file():
        return f"expected a model in the transformers format, found no config.json in {base}", None
    if not any(folder.glob("*.safetensors")):
        pickled = any(next(folder.glob(pattern), None) for pattern in PICKLES)
        found = "only pickled weights" if pickled else "no weights"
        hint = CONVERT_PICKLES if pickled else None
        return f"expected weights in *.safetensors in {base}, found {found}", hint
    return None


def _base(recipe: Recipe) -> Iterable[Finding]:
    problem = base_problem(recipe.model.base)
    if problem:
        yield Finding(code="QT030", path=("model", "base"), message=problem[0], hint=problem[1])


def stored_quantization(base: str) -> dict[str, Any] | None:
    """What the `config.json` of a local folder says of its quantization; None where it says nothing.

    Raises:
        ValueError: it can't be read, or is no JSON object; with a sentence.
    """
    path = Path(base) / "config.json"
    if base.startswith("builtin:") or not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object in {path}, found {type(config).__name__}")
    for table in (config, config.get("text_config")):  # the second of a text model within another
        stored = table.get("quantization_config") if isinstance(table, dict) else None
        if isinstance(stored, dict):
            return stored
    return None


def _revision(recipe: Recipe) -> Iterable[Finding]:
    if recipe.model.revision is not None and Path(recipe.model.base).is_absolute():
        message = "revision belongs to a hub id and has no meaning for a folder"
        yield Finding(code="QT021", path=("model", "revision"), message=message, hint="remove it")


def _stored_format(recipe: Recipe, format_problem: FormatCheck) -> Iterable[Finding]:
    try:
        stored = stored_quantization(recipe.model.base)
    except ValueError as error:
        yield Finding(code="QT030", path=("model", "base"), message=str(error))
        return
    if stored is None:
        return
    problem = format_problem(stored, recipe.quantization)
    if problem is not None:
        asked = recipe.quantization is not None
        yield Finding(
            code=problem.code,
            path=("quantization", "backend") if asked else ("model", "base"),
            message=f"[model] base = {json.dumps(recipe.model.base)} {problem.message}",
            hint=problem.way_out,
            other=("model", "base") if asked else None,
            other_label="is quantized already" if asked else "",
        )
    elif recipe.adapter.init in SHARES_OF_WEIGHTS:
        yield Finding(
            code="QT125",
            path=("adapter", "init"),
            message=f'init = "{recipe.adapter.init}" takes the adapter\'s share out of the weights before they are '
            "packed, and those of this base are packed already",
            hint='use init = "default", or choose the unquantized base',
            other=("model", "base"),
            other_label="is quantized already",
        )


def _tokenizer(recipe: Recipe) -> Iterable[Finding]:
    tokenizer = recipe.model.tokenizer
    if tokenizer is not None and is_local(tokenizer) and not Path(tokenizer).is_dir():
        yield Finding(code="QT030", path=("model", "tokenizer"), message=f"there is no folder {tokenizer}")


def _chat_template(recipe: Recipe) -> Iterable[Finding]:
    template = recipe.model.chat_template
    if template is not None and not chat_templates.template_path(template).is_file():
        message = f"there is no file {template}"
        hint = chat_templates.suggestion(template)
        yield Finding(code="QT030", path=("model", "chat_template"), message=message, hint=hint)


def _start_from(recipe: Recipe) -> Iterable[Finding]:
    if recipe.adapter.start_from is None:
        return
    folder = Path(recipe.adapter.start_from)
    where: tuple[str, ...] = ("adapter", "start_from")
    if not folder.is_dir():
        yield Finding(code="QT030", path=where, message=f"there is no folder {folder}")
        return
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            pickled = name.endswith(".safetensors") and any(next(folder.glob(kind), None) for kind in PICKLES)
            found = "only a pickled adapter" if pickled else f"no {name}"
            message = f"expected an adapter in PEFT's format, found {found} in {folder}"
            hint = "a pickle can run code when it is opened; PEFT's save_pretrained writes safetensors"
            yield Finding(code="QT030", path=where, message=message, hint=hint if pickled else None)
            return


def _data(recipe: Recipe) -> Iterable[Finding]:
    for part in ("train", "eval"):
        for index, source in enumerate(getattr(recipe.data, part)):
            problem = None if source.path is None else _data_problem(Path(source.path))
            if problem:
                yield Finding(code="QT030", path=("data", part, index, "path"), message=problem)


def _data_problem(path: Path) -> str | None:
    try:
        if path.is_dir():
            return f"expected a data file, found a folder: {path}"
        if not path.exists():
            return f"there is no file {path}"
        return f"the file is empty: {path}" if _is_blank(path) else None
    except OSError as error:
        return f"the file can't be read: {path} ({error.strerror})"


def _is_blank(path: Path) -> bool:
    """Whether a file holds nothing but whitespace."""
    with path.open("rb") as file:
        while chunk := file.read(1 << 16):
            if chunk.strip():
                return False
    return True
