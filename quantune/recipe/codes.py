"""The stable codes of recipe problems: what each one means, a recipe that has it, and the same recipe put right."""

from __future__ import annotations

import difflib
import re

import attrs

from quantune.errors import InputError


@attrs.frozen(kw_only=True)
class Code:
    """What `quantune explain` and docs/errors.md tell of a code."""

    name: str
    """The code itself, e.g. `QT012`; it never changes its meaning."""
    title: str
    """What is wrong, in a sentence."""
    explanation: str
    """Why that is a problem and what to do, in a few sentences."""
    example: str
    """A part of a recipe, or a command (`$ quantune ...`), that has this problem and no other."""
    corrected: str
    """The example put right."""


CODES = (
    Code(
        name="QT001",
        title="The recipe can't be read.",
        explanation="There is no such file, it is a folder, it may not be read, or it is not UTF-8 text. Paths on the "
        "command line are relative to the current directory.",
        example="$ quantune check recipe.tml",
        corrected="$ quantune check recipe.toml",
    ),
    Code(
        name="QT002",
        title="The recipe is not valid TOML.",
        explanation="The text breaks a rule of TOML at the place shown, so nothing after it can be understood. Most "
        "often it is a string without quotes, a key or table that is written twice, or a bracket that is not closed. "
        "Booleans are true and false, in small letters.",
        example="[adapter]\ntargets = all-linear",
        corrected='[adapter]\ntargets = "all-linear"',
    ),
    Code(
        name="QT003",
        title="A --set override can't be understood.",
        explanation="An override is section.key=value: the path of a key with dots between its parts (data.train[0] "
        "is the first of several tables), and a value as in TOML. Text needs no quotes.",
        example="$ quantune check recipe.toml --set max_steps=50",
        corrected="$ quantune check recipe.toml --set training.max_steps=50",
    ),
    Code(
        name="QT010",
        title="A required key is missing.",
        explanation="A recipe needs [model] with a base, [adapter] (the header alone takes every default), and at "
        "least one [[data.train]] with its format. Tables that have a required key of their own say so when they are "
        "there.",
        example='[[data.train]]\npath = "train.jsonl"',
        corrected='[[data.train]]\npath = "train.jsonl"\nformat = "chat"',
    ),
    Code(
        name="QT011",
        title="A section is unknown.",
        explanation="Nothing in a recipe is ignored, so a table or a key at the top that quantune does not know is an "
        "error and not a setting without effect. A key may stand at the top because its table's header is missing or "
        "comes after it.",
        example="[trainer]\nmax_steps = 50",
        corrected="[training]\nmax_steps = 50",
    ),
    Code(
        name="QT012",
        title="A key is unknown.",
        explanation="Nothing in a recipe is ignored: a key that the table does not have is a mistake in its name, "
        "belongs to another table, or comes from another tool. docs/recipe.md lists every key; quantune backends show "
        "NAME lists the options of a backend.",
        example="[adapter]\nrank = 8",
        corrected="[adapter]\nr = 8",
    ),
    Code(
        name="QT013",
        title="A value has the wrong type.",
        explanation='The key takes values of another kind, and none is converted in silence: the text "8" is not '
        "the number 8, and 1 is not true. Where a key takes one of several words, any other word is of the wrong type "
        "too.",
        example='[adapter]\nr = "8"',
        corrected="[adapter]\nr = 8",
    ),
    Code(
        name="QT014",
        title="A value is out of range.",
        explanation="The value is of the right kind, but can't be meant: a rank of 0, a dropout of 1, an empty name, "
        "a data file of a type that can't be read. The message says what is accepted.",
        example="[adapter]\ndropout = 1.0",
        corrected="[adapter]\ndropout = 0.1",
    ),
    Code(
        name="QT015",
        title="A backend is unknown or can't be used.",
        explanation="The backend is none of the built-in ones and no installed package brings it, or that package "
        "can't be used with this version. quantune backends list shows all of them, what each needs, and how to "
        "install it.",
        example='[quantization]\nbackend = "bitsandbytes"',
        corrected='[quantization]\nbackend = "bnb"',
    ),
    Code(
        name="QT016",
        title="An option does not fit the backend's other options.",
        explanation="Each backend has its own options, and some belong to one of its formats alone. An option that "
        "would have no effect, or a value that the chosen format can't have, is refused.",
        example='[quantization]\nbackend = "bnb"\nweight_dtype = "int8"\nblock_size = 64',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"\nblock_size = 64',
    ),
    Code(
        name="QT020",
        title="Two keys say different things about the same matter.",
        explanation="Both keys decide the same thing, and quantune does not choose between them. Remove the one that "
        "is not meant, or make them agree.",
        example="[training]\nmax_steps = 100\nepochs = 3",
        corrected="[training]\nepochs = 3",
    ),
    Code(
        name="QT021",
        title="A key has no meaning beside another one.",
        explanation="The key would have no effect with what another key says, so the recipe would promise something "
        "that does not happen. Remove it, or change the other key.",
        example="[adapter]\nloftq_iterations = 5",
        corrected='[adapter]\ninit = "loftq"\nloftq_iterations = 5\n\n[quantization]\nbackend = "bnb"',
    ),
    Code(
        name="QT022",
        title="Something was asked for that needs another key.",
        explanation="What the key asks for can't be done with what the recipe has: an evaluation without data to "
        "evaluate on, an initialization that makes up for packing where nothing is packed. The message says what to "
        "add.",
        example="[evaluation]\nevery_steps = 50",
        corrected='[evaluation]\nevery_steps = 50\n\n[[data.eval]]\npath = "eval.jsonl"\nformat = "chat"',
    ),
    Code(
        name="QT030",
        title="A file that the recipe names does not exist or can't be used.",
        explanation="Files and folders are looked at before anything is loaded: data that is missing or empty, a base "
        "without config.json or safetensors, an adapter that is none. Paths of what is read are relative to the "
        "recipe's folder. A hub id is not looked up before the run.",
        example='[[data.train]]\npath = "trian.jsonl"\nformat = "chat"',
        corrected='[[data.train]]\npath = "train.jsonl"\nformat = "chat"',
    ),
    Code(
        name="QT040",
        title="A spelling is deprecated; it is understood as the warning says.",
        explanation="An older tool's or version's spelling was rewritten to the one of today. The run is the same; "
        "write it as the warning shows, since the old spelling may become an error one day.",
        example='[quantization]\nbackend = "mxfp4"\nconfig_kwargs = {modules_to_not_convert = ["lm_head"]}',
        corrected='[quantization]\nbackend = "mxfp4"\nskip = ["lm_head"]',
    ),
    Code(
        name="QT150",
        title="The base is already quantized in another way.",
        explanation="The checkpoint's config.json says that its weights are quantized, and quantizing them once more "
        "would lose what they still hold. A checkpoint in MXFP4 or in FP8 blocks is taken over bit for bit, with the "
        "backend of that name or without [quantization]. Of any other format (AWQ, GPTQ, bitsandbytes, ...) the "
        "unquantized base is needed, which its model card usually names.",
        example='[model]\nbase = "models/llama-awq"\n\n[quantization]\nbackend = "bnb"',
        corrected='[model]\nbase = "models/llama"\n\n[quantization]\nbackend = "bnb"',
    ),
    Code(
        name="QT180",
        title="A value of the base's config.json can't be replaced.",
        explanation="[model] config replaces values of the base's configuration. Some of them describe the weights of "
        "the checkpoint and can't be otherwise, and some have a key of their own in the recipe, which does all that "
        "belongs to it.",
        example="[model.config]\nvocab_size = 32064",
        corrected="[model]\npad_vocabulary_to_multiple_of = 64",
    ),
)

_BY_NAME = {code.name: code for code in CODES}


def find_code(name: str) -> Code:
    """The code that `name` means: `QT012`, `qt012` or `12`.

    Raises:
        InputError: there is none of that name.
    """
    wanted = name.strip().upper()
    number = re.fullmatch("(?:QT)?0*([0-9]{1,3})", wanted)
    code = _BY_NAME.get(f"QT{int(number[1]):03}" if number else wanted)
    if code is None:
        close = difflib.get_close_matches(wanted, _BY_NAME, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else "quantune explain lists them"
        raise InputError(f"expected a code such as QT012, found {name!r}; {hint}")
    return code
