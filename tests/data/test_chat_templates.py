"""The templates that come with quantune: what they render, and which tokens of it are targets."""

import pytest

from quantune.data.formats import Conversation
from quantune.data.tokenization import prompt_ids, tokenize
from quantune.errors import DataError
from quantune.recipe.chat_templates import NAMES, template_path

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "second"},
]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
QWEN = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
HEAD, TURN = "<|start_header_id|>", "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"

RENDERED = {
    "alpaca": (
        "<bos>be brief\n\n### Instruction:\none?\n\n### Response:\nfirst<end>\n\n"
        "### Instruction:\ntwo?\n\n### Response:\nsecond<end>\n\n"
    ),
    "chatml": (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
        "<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\nsecond<|im_end|>\n"
    ),
    "command_r": (
        f"<bos><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>be brief{TURN}<|USER_TOKEN|>one?{TURN}<|CHATBOT_TOKEN|>first"
        f"{TURN}<|USER_TOKEN|>two?{TURN}<|CHATBOT_TOKEN|>second<|END_OF_TURN_TOKEN|>"
    ),
    "deepseek_v3": ("<bos>be brief<｜User｜>one?<｜Assistant｜>first<end><｜User｜>two?<｜Assistant｜>second<end>"),
    "gemma": (
        "<bos><start_of_turn>user\nbe brief\n\none?<end_of_turn>\n<start_of_turn>model\nfirst<end_of_turn>\n"
        "<start_of_turn>user\ntwo?<end_of_turn>\n<start_of_turn>model\nsecond<end_of_turn>\n"
    ),
    "llama2": (
        "<bos>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\none? [/INST] first <end><bos>[INST] two? [/INST] second <end>"
    ),
    "llama3": (
        f"<bos>{HEAD}system<|end_header_id|>\n\nbe brief<|eot_id|>{HEAD}user<|end_header_id|>\n\none?<|eot_id|>"
        f"{HEAD}assistant<|end_header_id|>\n\nfirst<|eot_id|>{HEAD}user<|end_header_id|>\n\ntwo?<|eot_id|>"
        f"{HEAD}assistant<|end_header_id|>\n\nsecond<|eot_id|>"
    ),
    "llama4": (
        "<bos><|header_start|>system<|header_end|>\n\nbe brief<|eot|><|header_start|>user<|header_end|>\n\none?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nfirst<|eot|><|header_start|>user<|header_end|>\n\ntwo?<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nsecond<|eot|>"
    ),
    "mistral": "<bos>[INST] be brief\n\none? [/INST] first<end>[INST] two? [/INST] second<end>",
    "mistral_tekken": "<bos>[INST]be brief\n\none?[/INST]first<end>[INST]two?[/INST]second<end>",
    "mistral_v3": "<bos>[INST] be brief\n\none?[/INST] first<end>[INST] two?[/INST] second<end>",
    "mistral_v7": "<bos>[SYSTEM_PROMPT]be brief[/SYSTEM_PROMPT][INST]one?[/INST]first<end>[INST]two?[/INST]second<end>",
    "phi3": (
        "<|system|>\nbe brief<|end|>\n<|user|>\none?<|end|>\n<|assistant|>\nfirst<|end|>\n"
        "<|user|>\ntwo?<|end|>\n<|assistant|>\nsecond<|end|>\n"
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>be brief<|im_end|><|im_start|>user<|im_sep|>one?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>first<|im_end|><|im_start|>user<|im_sep|>two?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>second<|im_end|>"
    ),
    "qwen2_5": (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
        "<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\nsecond<|im_end|>\n"
    ),
    "vicuna": "<bos>be brief USER: one? ASSISTANT: first<end>USER: two? ASSISTANT: second<end>",
    "zephyr": (
        "<|system|>\nbe brief<end>\n<|user|>\none?<end>\n<|assistant|>\nfirst<end>\n"
        "<|user|>\ntwo?<end>\n<|assistant|>\nsecond<end>\n"
    ),
}
"""What each template makes of MESSAGES, where the tokenizer's first token is <bos> and its end token <end>."""
ENDS = {
    "chatml": "<|im_end|>",
    "command_r": "<|END_OF_TURN_TOKEN|>",
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "llama4": "<|eot|>",
    "phi3": "<|end|>",
    "phi4": "<|im_end|>",
    "qwen2_5": "<|im_end|>",
    "llama2": " <end>",
}
LEADING_SPACE = {"llama2", "mistral", "mistral_v3", "vicuna"}


@pytest.fixture
def with_template(tokenizer):
    """The tokenizer with a template by name."""

    def use(name):
        tokenizer.chat_template = template_path(name).read_text(encoding="utf-8")
        return tokenizer

    return use


def test_every_template_is_tested():
    assert set(NAMES) == set(RENDERED)


@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_is_rendered_in_the_public_format(with_template, name):
    tokenizer = with_template(name)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == RENDERED[name]
    without = tokenizer.apply_chat_template(MESSAGES[1:3], tokenize=False)
    default = {"qwen2_5": QWEN, "vicuna": VICUNA}.get(name, "")
    assert default in without and "be brief" not in without and "None" not in without


@pytest.mark.parametrize("name", NAMES)
def test_the_targets_are_the_answers_and_their_end_tokens(with_template, name):
    tokenizer = with_template(name)
    sample = tokenize(Conversation(messages=MESSAGES), tokenizer, where="row")
    end, space = ENDS.get(name, "<end>"), " " if name in LEADING_SPACE else ""
    assert tokenizer.decode(sample.input_ids[sample.is_target]) == f"{space}first{end}{space}second{end}"


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_for_an_answer_is_how_its_sample_begins(with_template, name):
    tokenizer = with_template(name)
    sample = tokenize(Conversation(messages=MESSAGES), tokenizer, where="row")
    asked = prompt_ids(tokenizer, Conversation(messages=MESSAGES[:-1]))
    assert sample.input_ids[: len(asked)].tolist() == asked and sample.prompt_length == len(asked)
    assert sample.is_target[len(asked)]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_can_not_show_is_refused(with_template, name):
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function"}]}
    for message in (call, {"role": "developer", "content": "x"}):
        with pytest.raises(DataError, match="the chat template refuses the messages: this template has"):
            tokenize(Conversation(messages=[*MESSAGES[1:2], message]), with_template(name), where="row")


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama4"])
def test_templates_with_a_role_for_tools_show_their_results(with_template, name):
    tokenizer = with_template(name)
    messages = [*MESSAGES[:3], {"role": "tool", "content": "42"}, MESSAGES[-1]]
    sample = tokenize(Conversation(messages=messages), tokenizer, where="row", loss_on=("tool",))
    assert tokenizer.decode(sample.input_ids[sample.is_target]) == f"42{ENDS[name]}"
