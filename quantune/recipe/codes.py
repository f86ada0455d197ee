"""The stable codes of problems with a recipe: what each means, an example that causes it, and the same corrected."""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Code:
    """What `quantune explain` says about one code."""

    title: str
    """One sentence."""
    explanation: str
    """Why it is a problem, and what to do, in a few sentences."""
    example: str | None = None
    """Lines of a recipe that cause it; where it takes a file, `note` says what does."""
    corrected: str | None = None
    """The same lines as they should be."""
    note: str | None = None
    """What stands in for an example."""


CODES: dict[str, Code] = {
    # The text ---------------------------------------------------------------------------------------------------------
    "QT001": Code(
        title="The recipe can't be read.",
        explanation="There is no such file, it is a folder, reading it is not permitted, or it is not UTF-8 text. A "
        "file of a similar name in the same folder is suggested.",
        note="`quantune check recpe.toml`, where the file is called `recipe.toml`.",
    ),
    "QT002": Code(
        title="The recipe is not valid TOML.",
        explanation="The line and column are where the TOML parser gave up; the mistake is there or right before it. "
        "Strings need quotes, a key takes one equals sign, and no key or table may be written twice.",
        example="[adapter]\nr == 8",
        corrected="[adapter]\nr = 8",
    ),
    "QT003": Code(
        title="A --set override can't be understood.",
        explanation="An override is `section.key=value`, the value written as in TOML; what is no TOML is taken for a "
        "string. Elements of a list have an index from 0. An override changes or adds a key, and can't reach into a "
        "value that is no table, or past the end of a list.",
        note="`--set adapter` lacks its value: `--set adapter.r=8`. `--set data.train.limit=5` lacks its index: "
        "`--set data.train[0].limit=5`.",
    ),
    # One value --------------------------------------------------------------------------------------------------------
    "QT010": Code(
        title="A required key is missing.",
        explanation="The key has no default that would be right for everyone. What it expects is said beside it; "
        "docs/recipe.md says what it means.",
        example='[model]\nrevision = "main"',
        corrected='[model]\nbase = "org/model"\nrevision = "main"',
    ),
    "QT011": Code(
        title="A section is unknown.",
        explanation="Nothing that a recipe says is ignored, so a section that does not exist is an error. It may be "
        "misspelled, or belong to another tool: `quantune migrate` translates the YAML of some.",
        example="[trainig]\nmax_steps = 100",
        corrected="[training]\nmax_steps = 100",
    ),
    "QT012": Code(
        title="A key is unknown.",
        explanation="Nothing that a recipe says is ignored, so a key that does not exist is an error: a misspelled one "
        "would leave its default in place without a word. Under `[quantization]` the keys are quantune's own and those "
        "of the chosen backend, which `quantune backends show NAME` lists.",
        example="[adapter]\nrank = 8",
        corrected="[adapter]\nr = 8",
    ),
    "QT013": Code(
        title="A value has the wrong type.",
        explanation='Values are never converted: `"8"` is no number and `8.0` no whole number, though a whole number '
        "is fine where a number is expected. Where only certain values are known, any other is of the wrong type too, "
        "and the closest one is suggested.",
        example='[training]\nlearning_rate = "2e-4"',
        corrected="[training]\nlearning_rate = 2e-4",
    ),
    "QT014": Code(
        title="A value is out of range.",
        explanation="The value is of the right type, and nothing could be done with it: a rank of 0, a dropout of 1, "
        "an empty name. The message says which values are fine.",
        example="[adapter]\nr = 0",
        corrected="[adapter]\nr = 8",
    ),
    "QT015": Code(
        title="A backend is unknown or can't be used.",
        explanation="No installed package brings a backend of this name, or the one that does is broken, was written "
        "for another version of the protocol, or is claimed twice. `quantune backends list` shows what there is, and "
        "why something can't be used.",
        example='[quantization]\nbackend = "bitsandbytes"',
        corrected='[quantization]\nbackend = "bnb"',
    ),
    "QT016": Code(
        title="An option does not fit the backend, or its other options.",
        explanation="The option belongs to another backend, or means nothing beside the chosen weight dtype, or takes "
        "other values there. Nothing is rounded or replaced by a default: a group size of 0 is an error as well.",
        example='[quantization]\nbackend = "torchao"\nweight_dtype = "fp8"\ngroup_size = 64',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int4"\ngroup_size = 64',
    ),
    # Several values ---------------------------------------------------------------------------------------------------
    "QT020": Code(
        title="Two keys say different things about the same matter.",
        explanation="Each key is right by itself, and only one of the two can be meant. quantune never chooses: "
        "whichever it took, the other would be ignored without a word. Remove one, or make them agree.",
        example="[training]\nmax_steps = 100\nepochs = 3",
        corrected="[training]\nepochs = 3",
    ),
    "QT021": Code(
        title="A key has no meaning beside another one.",
        explanation="What the key sets does not exist with what another key chose, so it would be ignored. Remove it, "
        "or choose otherwise.",
        example="[adapter]\nloftq_iterations = 3",
        corrected='[adapter]\ninit = "loftq"\nloftq_iterations = 3\n\n[quantization]\nbackend = "bnb"',
    ),
    "QT022": Code(
        title="Something was asked for that needs another key.",
        explanation="What was asked for can't happen as long as the other key is missing, such as an evaluation "
        "without data to evaluate on. Add the other key, or take the wish back.",
        example="[evaluation]\nevery_steps = 50",
        corrected='[evaluation]\nevery_steps = 50\n\n[[data.eval]]\npath = "eval.jsonl"\nformat = "chat"',
    ),
    "QT030": Code(
        title="A file that the recipe names does not exist or can't be used.",
        explanation="Files are looked at before anything is loaded. Paths of what is read are relative to the recipe's "
        "folder. A model must be in the transformers format with safetensors, since a pickle can run code when it is "
        "opened; a data file must not be empty.",
        note='`[[data.train]] path = "train.jsonl"`, and there is no `train.jsonl` beside the recipe.',
    ),
    "QT040": Code(
        title="A spelling is deprecated; it is understood as the warning says.",
        explanation="Spellings of older tools are rewritten to the canonical form before anything else, and the "
        "warning shows what was made of each. The recipe runs as it is; writing the new spelling makes the warning go. "
        "Old and new spellings may stand side by side as long as they agree.",
        example='adapter = "qlora"',
        corrected='[adapter]\ntype = "lora"\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
    ),
    # Spellings of older tools that contradict each other --------------------------------------------------------------
    "QT100": Code(
        title="Two spellings of the quantization say different things.",
        explanation="A base is stored in one format, and two keys name two: `[quantization]` and "
        "`model_quantization_config`, say, or `bnb_config_kwargs` and a switch. Older tools let one of them win. Keep "
        "one, best `[quantization]`.",
        example='model_quantization_config = {torchao = {weight_dtype = "int4"}}\n\n'
        '[quantization]\nbackend = "torchao"\nweight_dtype = "int8"',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int8"',
    ),
    "QT101": Code(
        title="qlora beside another format than bnb's nf4.",
        explanation="`qlora` is LoRA on a base that bitsandbytes stores in 4-bit NormalFloat, and something else names "
        "another format. LoRA on any format is `[adapter]` with `[quantization]`.",
        example='adapter = "qlora"\nmodel_quantization_config = {backend = "torchao", weight_dtype = "int4"}',
        corrected='[adapter]\n\n[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
    ),
    "QT102": Code(
        title="qlora with load_in_8bit.",
        explanation="`qlora` stores the base in 4 bits. LoRA on 8 bits is `[adapter]` with bnb's int8.",
        example='adapter = "qlora"\nload_in_8bit = true',
        corrected='[adapter]\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
    ),
    "QT103": Code(
        title="qlora with load_in_4bit = false.",
        explanation="`qlora` stores the base in 4 bits, which `load_in_4bit = false` forbids. Leave it out, or train "
        "plain LoRA.",
        example='adapter = "qlora"\nload_in_4bit = false',
        corrected='[adapter]\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
    ),
    "QT104": Code(
        title="load_in_4bit and load_in_8bit together.",
        explanation="A base is stored in 4 bits or in 8.",
        example="load_in_4bit = true\nload_in_8bit = true",
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
    ),
    "QT105": Code(
        title="bnb in 4 bits with load_in_4bit = false.",
        explanation="The table stores the base in 4 bits, which `load_in_4bit = false` forbids. Leave the switch out, "
        "or the table.",
        example='load_in_4bit = false\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
    ),
    "QT106": Code(
        title="bnb in 4 bits with load_in_8bit.",
        explanation="The table stores the base in 4 bits (without a `weight_dtype` in nf4), and `load_in_8bit` in 8.",
        example='load_in_8bit = true\n\n[quantization]\nbackend = "bnb"',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
    ),
    "QT107": Code(
        title="bnb's int8 with load_in_8bit = false.",
        explanation="The table stores the base in 8 bits, which `load_in_8bit = false` forbids. Leave the switch out, "
        "or the table.",
        example='load_in_8bit = false\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
    ),
    "QT108": Code(
        title="bnb's int8 with load_in_4bit.",
        explanation="The table stores the base in 8 bits, and `load_in_4bit` in 4.",
        example='load_in_4bit = true\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
    ),
    "QT109": Code(
        title="load_in_4bit or load_in_8bit beside a backend that is not bnb.",
        explanation="The switches are bitsandbytes', and the table names another backend. Which bits it has is said by "
        "its own `weight_dtype`.",
        example='load_in_4bit = true\n\n[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
    ),
    "QT110": Code(
        title="gptq can't be trained on.",
        explanation="`gptq` says that the base is a GPTQ checkpoint, whose weights are packed already. quantune packs "
        "the unquantized base itself, or takes over checkpoints of a backend's own format.",
        example='adapter = "lora"\ngptq = true',
        corrected='[adapter]\n\n[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
    ),
    "QT111": Code(
        title="qat is not what quantune does.",
        explanation="Quantization-aware training changes the weights themselves so that they bear rounding. A "
        "quantized base is frozen; the adapter is trained over its packed weights, and so learns around the rounding.",
        example='qat = {weight_dtype = "int4"}',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
    ),
    "QT112": Code(
        title="quantization is a block of post-training quantization.",
        explanation="In other tools `quantization` says how to quantize a model after training. In a recipe it is how "
        "the base is stored in training, and names its `backend`.",
        example='[quantization]\nweight_dtype = "int8"\nactivation_dtype = "int8"',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int8"',
    ),
    "QT113": Code(
        title="fp8 training is not what quantune does.",
        explanation="At the top level of a config `fp8` asks for matrix products in fp8. quantune stores weights in "
        "fp8 and computes in the compute dtype, `[training] precision`.",
        example="fp8 = true",
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "fp8"',
    ),
    "QT114": Code(
        title="relora is not what quantune does.",
        explanation="ReLoRA merges the adapter into the base in turns. A quantized base would have to be packed anew "
        "each time, and would change by more than the adapter. A larger rank reaches further.",
        example="relora = true",
        corrected="[adapter]\nr = 128",
    ),
    "QT115": Code(
        title="merge_lora in a training config.",
        explanation="A quantized base can't hold the merged weights, so merging is no part of training: the run saves "
        "the adapter in PEFT's format by itself.",
        example='merge_lora = true\n\n[quantization]\nbackend = "bnb"',
        corrected='[quantization]\nbackend = "bnb"',
    ),
    "QT116": Code(
        title="An older spelling of the quantization names no backend.",
        explanation="`model_quantization_config` and `peft` hold a backend with its options, `{backend = ..., ...}` or "
        "`{torchao = {...}}`. Without one nothing is said, and older tools then trained on the unquantized base.",
        example='model_quantization_config = {weight_dtype = "int4"}',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
    ),
    "QT117": Code(
        title="An older spelling of the quantization names several backends.",
        explanation="A base is stored in one format. In `[quantization]` there is one `backend`, so that several can't "
        "be named at all.",
        example='model_quantization_config = {torchao = {weight_dtype = "int4"}, bnb = {weight_dtype = "nf4"}}',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
    ),
    "QT118": Code(
        title="model_quantization_config_kwargs without the class it belongs to.",
        explanation="They are arguments of the class that `model_quantization_config` names as a string. Alone, or "
        "beside the form with a table, older tools ignored them.",
        example='model_quantization_config_kwargs = {modules_to_not_convert = ["lm_head"]}',
        corrected='[quantization]\nbackend = "mxfp4"\nskip = ["lm_head"]',
    ),
    "QT119": Code(
        title="quantize_moe_experts without a quantization.",
        explanation="Experts are packed as the rest of the base is, and nothing says how. With `[quantization]` they "
        "are packed too; `experts = false` keeps them in full precision.",
        example="quantize_moe_experts = true",
        corrected='[quantization]\nbackend = "bnb"\nexperts = true',
    ),
    # What goes with what ----------------------------------------------------------------------------------------------
    "QT120": Code(
        title="A quantized base without an adapter.",
        explanation="A quantized base is frozen, so without an adapter there is nothing to train. Training packed "
        "weights themselves is not what quantune does.",
        example='[model]\nbase = "builtin:mini"\n\n[quantization]\nbackend = "bnb"\n\n[[data.train]]\n'
        'path = "train.jsonl"\nformat = "chat"',
        corrected='[model]\nbase = "builtin:mini"\n\n[quantization]\nbackend = "bnb"\n\n[adapter]\n\n[[data.train]]\n'
        'path = "train.jsonl"\nformat = "chat"',
    ),
    "QT121": Code(
        title="dropout with target_parameters.",
        explanation="An adapter on the weights of experts is added to the weights, not to what goes through them, so "
        "it has no inputs of its own that could be dropped. PEFT refuses it too.",
        example='[adapter]\ntarget_parameters = ["mlp.experts.down_proj"]\ndropout = 0.1',
        corrected='[adapter]\ntarget_parameters = ["mlp.experts.down_proj"]',
    ),
    "QT122": Code(
        title="The base is already quantized, in another format than [quantization].",
        explanation="Weights that are packed already can't be packed in another format without losing twice. Without "
        "`[quantization]` a checkpoint in the format of a built-in backend (mxfp4, fp8) is taken over as it is, bit "
        "for bit. For any other format choose the unquantized base, which `[quantization]` packs.",
        note='`[model] base = "openai/gpt-oss-20b"`, whose weights are MXFP4, with `[quantization] backend = "bnb"`.',
    ),
    "QT123": Code(
        title="The base is already quantized, in a format that no backend takes over.",
        explanation="A checkpoint of this method (awq, gptq, bitsandbytes, ...) holds its weights in a layout that no "
        "backend here reads. Choose the unquantized base, usually published beside it, and pack that with "
        "`[quantization]`.",
        note='A base whose `config.json` holds `"quantization_config": {"quant_method": "awq"}`.',
    ),
    "QT124": Code(
        title="Settings of one backend where another one is used, or none.",
        explanation="`bnb_config_kwargs` are arguments of bitsandbytes' config class, and the base is not stored with "
        'backend "bnb". They would be ignored.',
        example="bnb_config_kwargs = {bnb_4bit_use_double_quant = false}\n\n"
        '[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
        corrected='[quantization]\nbackend = "bnb"\ndouble_quant = false',
    ),
    "QT125": Code(
        title="An initialization that needs unquantized weights, over a base that is already quantized.",
        explanation="`pissa`, `olora` and `loftq` take the adapter's share out of each weight before it is packed. In "
        "a checkpoint that is already quantized the weights are packed. Use another initialization, or the unquantized "
        "base.",
        note='`[model] base = "openai/gpt-oss-20b"` with `[adapter] init = "pissa"`.',
    ),
    # The base's configuration -----------------------------------------------------------------------------------------
    "QT180": Code(
        title="A value of the base's config.json can't be replaced.",
        explanation="The checkpoint, or a key of the recipe that does more than set the value, decides it. The message "
        "says which.",
        example='[model]\nbase = "builtin:mini"\nconfig = {vocab_size = 4096}',
        corrected='[model]\nbase = "builtin:mini"\npad_vocabulary_to_multiple_of = 4096',
    ),
}
