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
    """A part of a recipe, a YAML (`# old.yaml`) or a command (`$ quantune ...`) that has this problem and no other."""
    corrected: str
    """The example put right."""


WHOLE_YAML = """\
# old.yaml
base_model: org/model
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: org/data
    type: alpaca
sequence_len: 1024
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
learning_rate: 0.0002
output_dir: ./out
"""
"""A YAML that `quantune migrate` translates."""

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
        name="QT100",
        title="Two spellings say different things about how the base is stored.",
        explanation="A key of an older config and [quantization], or two older keys, name different formats or "
        "settings. Both places are shown, and neither wins. Keep one, best [quantization]; older keys have settings "
        "that they imply where they leave them out, such as groups of 128 for torchao's int4.",
        example='peft = {backend = "bnb"}\n\n[quantization]\nbackend = "torchao"\nweight_dtype = "int8"',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int8"',
    ),
    Code(
        name="QT101",
        title="qlora stands beside another quantization than bnb's 4 bits.",
        explanation="QLoRA is a LoRA adapter on a base in bitsandbytes' NF4, so the word says how the base is stored "
        "as well. Over any other format the adapter is lora.",
        example='adapter = "qlora"\n\n[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
        corrected='[adapter]\ntype = "lora"\n\n[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
    ),
    Code(
        name="QT102",
        title="qlora stands beside load_in_8bit.",
        explanation="QLoRA means a base in 4 bits, and load_in_8bit one in 8. Say which is meant with [quantization].",
        example='adapter = "qlora"\nload_in_8bit = true',
        corrected='[adapter]\ntype = "lora"\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
    ),
    Code(
        name="QT103",
        title="qlora stands beside load_in_4bit = false.",
        explanation="QLoRA means a base in 4 bits, and load_in_4bit = false rules that out. To train on the base in "
        "full precision leave [quantization] out, with an adapter of the type lora.",
        example='adapter = "qlora"\nload_in_4bit = false',
        corrected='[adapter]\ntype = "lora"',
    ),
    Code(
        name="QT104",
        title="load_in_4bit and load_in_8bit are both true.",
        explanation="A base is stored in one format. Write [quantization] with the one that is meant.",
        example="load_in_4bit = true\nload_in_8bit = true",
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
    ),
    Code(
        name="QT105",
        title="bnb in 4 bits stands beside load_in_4bit = false.",
        explanation="The table asks for 4 bits and the switch rules them out. Leave the switch out; or leave out the "
        "table, to train on the base in full precision.",
        example='load_in_4bit = false\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
    ),
    Code(
        name="QT106",
        title="bnb in 4 bits stands beside load_in_8bit = true.",
        explanation="The table asks for 4 bits and the switch for 8. Leave the switch out and let weight_dtype say "
        "which.",
        example='load_in_8bit = true\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "nf4"',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
    ),
    Code(
        name="QT107",
        title="bnb in 8 bits stands beside load_in_8bit = false.",
        explanation="The table asks for 8 bits and the switch rules them out. Leave the switch out; or leave out the "
        "table, to train on the base in full precision.",
        example='load_in_8bit = false\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
    ),
    Code(
        name="QT108",
        title="bnb in 8 bits stands beside load_in_4bit = true.",
        explanation="The table asks for 8 bits and the switch for 4. Leave the switch out and let weight_dtype say "
        "which.",
        example='load_in_4bit = true\n\n[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "int8"',
    ),
    Code(
        name="QT109",
        title="Another backend than bnb stands beside load_in_4bit or load_in_8bit.",
        explanation="The two switches load a base with bitsandbytes, and the table names another backend. Leave the "
        "switches out; the table says all there is to say.",
        example='load_in_4bit = true\n\n[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
    ),
    Code(
        name="QT110",
        title="gptq asks to train on a GPTQ checkpoint.",
        explanation="quantune packs an unquantized base by itself and does not take GPTQ's weights over. Choose the "
        "unquantized base with [quantization], and remove the key.",
        example='gptq = true\n\n[quantization]\nbackend = "bnb"',
        corrected='[quantization]\nbackend = "bnb"',
    ),
    Code(
        name="QT111",
        title="qat is another tool's quantization-aware training.",
        explanation="A table of that name at the top of a recipe names a format of its own. In quantune [quantization] "
        "names the format, and [training.qat] trains for it: what is trained computes as it will when it is packed. "
        "Write that, and remove the table.",
        example='[qat]\nweight_dtype = "int4"\n\n[quantization]\nbackend = "bnb"',
        corrected='[quantization]\nbackend = "bnb"\n\n[training.qat]',
    ),
    Code(
        name="QT112",
        title="quantization is another tool's post-training quantization.",
        explanation="A table of that name without a backend, with keys such as activation_dtype, is what other tools "
        "do to a model after training. In quantune [quantization] says how the base is stored while it is trained on. "
        "Remove the block, or write the backend that is meant.",
        example='load_in_4bit = true\n\n[quantization]\nweight_dtype = "int4"\nactivation_dtype = "int8"',
        corrected='[quantization]\nbackend = "bnb"',
    ),
    Code(
        name="QT113",
        title="fp8 asks for fp8 arithmetic in training.",
        explanation="Packed weights are dequantized and multiplied in the compute dtype, so that fp8 arithmetic has "
        "no part in it. To store the base in fp8 write a backend that has the format.",
        example='fp8 = true\n\n[quantization]\nbackend = "bnb"',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "fp8"',
    ),
    Code(
        name="QT114",
        title="relora asks for ReLoRA.",
        explanation="ReLoRA merges the adapter into the base again and again. Packed weights would have to be packed "
        "anew each time and lose more each time, and quantune does not do it. A larger rank reaches further too.",
        example='relora = true\n\n[quantization]\nbackend = "bnb"',
        corrected='[quantization]\nbackend = "bnb"\n\n[adapter]\nr = 64',
    ),
    Code(
        name="QT115",
        title="merge_lora asks to merge the adapter when training ends.",
        explanation="A run saves the adapter by itself, and quantune merge RUN merges it into the base afterwards and "
        "shows that the merged model answers as base and adapter do. Remove the key.",
        example='merge_lora = true\n\n[quantization]\nbackend = "bnb"',
        corrected='[quantization]\nbackend = "bnb"',
    ),
    Code(
        name="QT116",
        title="An older table of the quantization names no backend.",
        explanation="peft = {...} and model_quantization_config = {...} say how the base is stored, and without a "
        "backend they say nothing that could be done. Other tools ignored such a table and trained on the unquantized "
        "base. Write [quantization] with the backend that is meant.",
        example='peft = {weight_dtype = "int4"}',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
    ),
    Code(
        name="QT117",
        title="An older table of the quantization names several backends.",
        explanation="A base is stored in one format by one backend. Write [quantization] with the one that is meant; "
        "it takes exactly one by its form.",
        example='model_quantization_config = {torchao = {weight_dtype = "int4"}, bnb = {}}',
        corrected='[quantization]\nbackend = "torchao"\nweight_dtype = "int4"',
    ),
    Code(
        name="QT118",
        title="model_quantization_config_kwargs belongs to no class.",
        explanation="The key holds the arguments of the class that model_quantization_config names (Mxfp4Config or "
        "FineGrainedFP8Config), and no class is named. Other tools ignored it. Write the options under "
        "[quantization].",
        example='model_quantization_config_kwargs = {modules_to_not_convert = ["lm_head"]}',
        corrected='[quantization]\nbackend = "mxfp4"\nskip = ["lm_head"]',
    ),
    Code(
        name="QT119",
        title="quantize_moe_experts stands where nothing is quantized.",
        explanation="The key packs fused experts as the rest of the base is packed, and the recipe does not say how. "
        "With [quantization] experts are packed, unless its experts = false keeps them in full precision.",
        example="quantize_moe_experts = true",
        corrected='[quantization]\nbackend = "bnb"',
    ),
    Code(
        name="QT120",
        title="A quantized base has no adapter.",
        explanation="A quantized base is frozen: without an adapter there would be nothing to train. Add [adapter]; "
        "the header alone takes every default.",
        example='[model]\nbase = "builtin:mini"\n\n[quantization]\nbackend = "bnb"\n\n'
        '[[data.train]]\npath = "train.jsonl"\nformat = "chat"',
        corrected='[model]\nbase = "builtin:mini"\n\n[quantization]\nbackend = "bnb"\n\n'
        '[adapter]\n\n[[data.train]]\npath = "train.jsonl"\nformat = "chat"',
    ),
    Code(
        name="QT121",
        title="Dropout stands beside target_parameters.",
        explanation="An adapter on the weights of experts is added to those weights, not to what goes through them, "
        "so it has no inputs of its own that could be dropped. PEFT refuses it too. Train without dropout, or leave "
        "the experts out.",
        example='[adapter]\ntarget_parameters = ["mlp.experts.down_proj"]\ndropout = 0.1',
        corrected='[adapter]\ntarget_parameters = ["mlp.experts.down_proj"]',
    ),
    Code(
        name="QT122",
        title="The base is already quantized in another way than the recipe says.",
        explanation="The checkpoint's config.json says that its weights are quantized, and packing them once more "
        "would lose what they still hold. A checkpoint in MXFP4, in FP8 blocks, of bitsandbytes or of torchao is taken "
        "over bit for bit, with the backend of that format or without [quantization]. For any other format the "
        "unquantized base is needed, which its model card usually names.",
        example='[model]\nbase = "models/llama-awq"\n\n[quantization]\nbackend = "bnb"',
        corrected='[model]\nbase = "models/llama"\n\n[quantization]\nbackend = "bnb"',
    ),
    Code(
        name="QT123",
        title="The base is already quantized in a way that can't be trained on.",
        explanation="Without [quantization] the base stays as it is, and no backend trains on weights in this format. "
        "Choose the unquantized base, which the model card usually names, and let [quantization] pack it.",
        example='[model]\nbase = "models/llama-awq"',
        corrected='[model]\nbase = "models/llama"\n\n[quantization]\nbackend = "bnb"',
    ),
    Code(
        name="QT124",
        title="Settings of one backend stand beside another backend, or beside none.",
        explanation="An older key such as bnb_config_kwargs has settings that belong to one backend, and the base is "
        "not stored by that backend. They would have no effect. Leave them out, or name the backend that they are of.",
        example='bnb_config_kwargs = {bnb_4bit_quant_type = "fp4"}\n\n[quantization]\nbackend = "mxfp4"',
        corrected='[quantization]\nbackend = "bnb"\nweight_dtype = "fp4"',
    ),
    Code(
        name="QT125",
        title="The adapter's initialization changes a base that is already quantized.",
        explanation="PiSSA, OLoRA and LoftQ take a share out of the base's weights before they are packed, or measure "
        "what packing loses. The weights of this checkpoint are packed already. Use another initialization, or the "
        "unquantized base.",
        example='[model]\nbase = "models/llama-fp8"\n\n[adapter]\ninit = "pissa"',
        corrected='[model]\nbase = "models/llama-fp8"\n\n[adapter]\ninit = "default"',
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
    Code(
        name="QT200",
        title="A YAML can't be read.",
        explanation="quantune migrate reads YAML 1.1 as PyYAML's safe loader does: plain values, aliases, merge keys; "
        "at most 1 MiB of text, 100 levels deep and 100,000 values with every alias written out. Tags that make Python "
        "objects are refused.",
        example="# old.yaml\nbase_model: !!python/name:os.system",
        corrected="# old.yaml\nbase_model: org/model",
    ),
    Code(
        name="QT201",
        title="A YAML has a key twice.",
        explanation="YAML readers keep the last of two values without a word, so that one of them was never in effect. "
        "Both lines are shown: remove one.",
        example="# old.yaml\nlora_r: 8\nlora_alpha: 16\nlora_r: 16",
        corrected="# old.yaml\nlora_alpha: 16\nlora_r: 16",
    ),
    Code(
        name="QT204",
        title="A YAML lacks what a recipe needs.",
        explanation="A recipe names a base, an adapter with its targets, and training data. Without an adapter the "
        "YAML asks for full fine-tuning, which quantune does not do.",
        example="# old.yaml\nadapter:\nlearning_rate: 0.0002",
        corrected="# old.yaml\nadapter: lora\nlora_target_linear: true\nlearning_rate: 0.0002",
    ),
    Code(
        name="QT205",
        title="A YAML belongs to a tool whose configs aren't translated yet.",
        explanation="quantune migrate translates axolotl's keys. A YAML of LlamaFactory or torchtune is recognised by "
        "its keys and left alone, for half a translation would be worse than none. quantune init writes a recipe "
        "to begin with.",
        example="# old.yaml\nmodel_name_or_path: org/model\nstage: sft\nfinetuning_type: lora\ntemplate: llama3\n",
        corrected=WHOLE_YAML,
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
