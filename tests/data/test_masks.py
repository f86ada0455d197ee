"""Which tokens are targets: what the assistant says, up to and including the end token, and nothing else."""

import numpy as np
import pytest

from quantune.data.formats import Conversation, PlainText
from quantune.data.tokenization import prompt_ids, tokenize
from quantune.errors import DataError

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "first answer"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "  second answer"},
]


def sample_of(messages, tokenizer, loss_on="assistant"):
    return tokenize(Conversation(messages=messages), tokenizer, where="row", loss_on=loss_on)


def targets(sample, tokenizer):
    return tokenizer.decode(sample.input_ids[sample.is_target])


def test_the_end_token_is_a_target_and_the_newline_after_it_is_not(tokenizer):
    sample = sample_of(CHAT[:3], tokenizer)
    assert targets(sample, tokenizer) == "first answer<end>"
    assert not sample.is_target[-1]


def test_every_answer_of_a_conversation_is_a_target(tokenizer):
    assert targets(sample_of(CHAT, tokenizer), tokenizer) == "first answer<end>  second answer<end>"


def test_the_mask_agrees_with_the_template_s_own_generation_marks(tokenizer):
    own = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    sample = sample_of(CHAT, tokenizer)
    assert sample.input_ids.tolist() == own["input_ids"]
    assert sample.is_target.astype(int).tolist() == own["assistant_masks"]


def test_loss_on_all_leaves_only_the_first_token_out(tokenizer):
    sample = sample_of(CHAT, tokenizer, "all")
    assert not sample.is_target[0] and sample.is_target[1:].sum() >= len(sample.is_target) - 2


def test_the_prompt_is_what_a_user_would_send(tokenizer):
    sample = sample_of(CHAT, tokenizer)
    expected = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert sample.input_ids[: sample.prompt_length].tolist() == expected
    assert sample.reference == "  second answer"
    one = sample_of(CHAT[1:3], tokenizer)
    assert prompt_ids(tokenizer, "one?") == one.input_ids[: one.prompt_length].tolist()


def test_a_template_without_an_end_token_masks_the_content(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert targets(sample_of(CHAT, tokenizer), tokenizer) == "first answersecond answer"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert targets(sample_of(CHAT[:3], tokenizer), tokenizer) == "first answer<end>"
    with pytest.raises(DataError, match="row: can't tell which tokens the assistant says"):
        sample_of(CHAT, tokenizer)


def test_a_template_that_refuses_the_messages_is_quoted(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row: the chat template refuses the messages: roles must alternate"):
        sample_of(CHAT, tokenizer)


def test_no_chat_template_says_what_to_do(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="chat_template, or use format"):
        sample_of(CHAT, tokenizer)


def test_a_conversation_without_an_answer_has_no_target(tokenizer):
    assert not sample_of(CHAT[:2], tokenizer).is_target.any()


def test_a_response_after_a_plain_prompt_is_the_target_with_the_end_token(tokenizer):
    sample = tokenize(PlainText(prompt="Q: x\nA: ", response="yes"), tokenizer, where="row", loss_on="assistant")
    assert targets(sample, tokenizer) == "yes<end>"
    assert tokenizer.decode(sample.input_ids[: sample.prompt_length]) == "Q: x\nA: "


def test_completion_trains_on_everything_but_the_first_token(tokenizer):
    sample = tokenize(PlainText(prompt="", response="some text"), tokenizer, where="row", loss_on="assistant")
    assert not sample.is_target[0] and sample.is_target[1:].all()
    assert sample.input_ids[-1] == tokenizer.eos_token_id
    assert sample.input_ids.dtype == np.int32
