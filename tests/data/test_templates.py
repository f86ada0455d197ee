"""Chat templates of the shapes that models come with: the mask is right, or the template is refused."""

import re

import pytest
from tokenizers import pre_tokenizers, processors

from quantune.data.formats import Conversation
from quantune.data.tokenization import tokenize
from quantune.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + '<end>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '<bos>[INST] ' }}"
    "{% if loop.first and system %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' <end>' }}{% endif %}"
    "{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{% set content = '<' + m['role'] + '>\n\n' + m['content'] | trim + '<end>' %}"
    "{% if loop.first %}{% set content = '<bos>' + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = m['role'] %}{% endif %}{{ '[' + role + ']\n' + m['content'] | trim + '<end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[model]\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<bos>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<end>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '### Response:\n' + m['content'] + '<end>\n\n' }}"
    "{% else %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '(think)\n\n(/think)\n\n' }}{% endif %}{{ m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages[-2:] %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
COUNTING = (
    "{{ messages | length }}{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

ONE = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": " first\nanswer \n"}]
TWO = [*ONE, {"role": "user", "content": "two?"}, {"role": "assistant", "content": "first"}]
SYSTEM = [{"role": "system", "content": "first answer"}, *TWO]


def sample_of(messages, tokenizer, template, loss_on="assistant"):
    tokenizer.chat_template = template
    return tokenize(Conversation(messages=messages), tokenizer, where="row", loss_on=loss_on)


def targets(sample, tokenizer):
    """The text of each run of targets."""
    runs, previous = [], -2
    for index in sample.is_target.nonzero()[0].tolist():
        if index != previous + 1:
            runs.append([])
        runs[-1].append(sample.input_ids[index])
        previous = index
    return [tokenizer.decode(run) for run in runs]


AS_WRITTEN, TRIMMED = " first\nanswer \n<end>", "first\nanswer<end>"


@pytest.mark.parametrize(
    ("template", "first", "second"),
    [
        (CHATML, AS_WRITTEN, "first<end>"),
        (LLAMA_2, " first\nanswer <end>", " first <end>"),
        (LLAMA_3, TRIMMED, "first<end>"),
        (GEMMA, TRIMMED, "first<end>"),
        (MISTRAL, AS_WRITTEN, "first<end>"),
        (ALPACA, AS_WRITTEN, "first<end>"),
    ],
    ids=["chatml", "llama-2", "llama-3", "gemma", "mistral", "alpaca"],
)
@pytest.mark.parametrize("trim_offsets", [None, False, True])
def test_the_answers_with_their_end_tokens_and_nothing_else_are_targets(
    tokenizer, template, first, second, trim_offsets
):
    if trim_offsets is not None:  # such tokenizers give a token of spaces alone no width
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    assert targets(sample_of(ONE, tokenizer, template), tokenizer) == [first]
    for messages in (TWO, SYSTEM):
        sample = sample_of(messages, tokenizer, template)
        assert targets(sample, tokenizer) == [first, second]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer.decode(sample.input_ids) == rendered
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert sample.input_ids[: sample.prompt_length].tolist() == prompt
        assert sample.reference == "first"


def test_the_prefix_of_a_llama_3_answer_is_masked_though_it_says_the_same(tokenizer):
    messages = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": "yes"}]
    sample = sample_of(messages, tokenizer, LLAMA_3)
    assert targets(sample, tokenizer) == ["yes<end>"]
    assert sample.is_target.nonzero()[0].tolist() == list(range(sample.prompt_length, len(sample.input_ids)))


@pytest.mark.parametrize("template", [THINKING, FORGETFUL, COUNTING], ids=["thinking", "forgetful", "counting"])
def test_a_template_that_rewrites_history_is_refused_and_never_masked_wrongly(tokenizer, template):
    with pytest.raises(DataError, match=r"row: can't tell which tokens the assistant says.*loss_on = \"all\""):
        sample_of(TWO, tokenizer, template)
    assert sample_of(TWO, tokenizer, template, "all").is_target[1:].all()


def test_an_empty_answer_is_its_end_token(tokenizer):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]
    for template in (CHATML, LLAMA_3):
        assert targets(sample_of(messages, tokenizer, template), tokenizer) == ["<end>"]


def test_an_answer_that_names_the_end_token_is_a_target_to_its_end(tokenizer):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<end>b"}]
    assert targets(sample_of(messages, tokenizer, CHATML), tokenizer) == ["a<end>b<end>"]


def test_a_question_that_quotes_a_whole_turn_is_no_target(tokenizer):
    messages = [
        {"role": "user", "content": "<assistant>\nfirst<end>\n<assistant>\n"},
        {"role": "assistant", "content": "first"},
    ]
    sample = sample_of(messages, tokenizer, CHATML)
    assert targets(sample, tokenizer) == ["first<end>"]
    assert sample.is_target.nonzero()[0][0] == sample.prompt_length


def test_a_tool_s_turn_is_no_target(tokenizer):
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "done"},
    ]
    assert targets(sample_of(messages, tokenizer, CHATML), tokenizer) == ["call<end>", "done<end>"]


def test_two_answers_in_a_row_are_targets_without_the_header_between_them(tokenizer):
    messages = [*ONE, {"role": "assistant", "content": "more"}]
    assert targets(sample_of(messages, tokenizer, CHATML), tokenizer) == [AS_WRITTEN, "more<end>"]


def test_a_conversation_that_ends_with_a_question_keeps_its_answers(tokenizer):
    messages = [*ONE, {"role": "user", "content": "two?"}]
    sample = sample_of(messages, tokenizer, CHATML)
    assert targets(sample, tokenizer) == [AS_WRITTEN]
    assert sample.reference == ONE[1]["content"]


def test_a_tokenizer_that_adds_a_space_before_words_gives_the_same_mask(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    said = [re.sub(r"^ | (?=<end>)", "", text) for text in targets(sample_of(TWO, tokenizer, LLAMA_3), tokenizer)]
    assert said == [TRIMMED, "first<end>"]
