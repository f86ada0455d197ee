"""Which tokens are targets: what the assistant says, up to and including the end token, and nothing else."""

import re

import numpy as np
import pytest
from tokenizers import processors

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


def without_marks(template):
    return re.sub(r"{%-? *(end)?generation *-?%}", "", template)


def test_the_template_s_own_generation_marks_and_its_prefixes_give_the_same_mask(tokenizer):
    own = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True)
    marked = sample_of(CHAT, tokenizer)
    tokenizer.chat_template = without_marks(tokenizer.chat_template)
    by_prefix = sample_of(CHAT, tokenizer)
    for sample in (marked, by_prefix):
        assert sample.input_ids.tolist() == own["input_ids"]
        assert sample.is_target.astype(int).tolist() == own["assistant_masks"]
        assert sample.prompt_length == marked.prompt_length


@pytest.mark.parametrize(
    "marked",
    [
        "{% generation %}{{ m.content }}{% endgeneration %}<end>\n",
        "{% generation %}{{ m.content }}<end>\n{% endgeneration %}",
    ],
)
def test_marks_that_leave_the_end_token_out_or_take_more_in_are_put_right(tokenizer, marked):
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        + marked.replace("\n", "{{ '\\n' }}")
        + "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert targets(sample_of(CHAT, tokenizer), tokenizer) == "first answer<end>  second answer<end>"


def test_an_end_token_that_only_later_turns_bring_is_a_target(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<end><assistant>{% endif %}"
    )
    assert targets(sample_of(CHAT, tokenizer), tokenizer) == "first answer<end>  second answer"


def test_characters_of_several_tokens_are_targets_as_a_whole(tokenizer):
    messages = [{"role": "user", "content": "😀"}, {"role": "assistant", "content": "🚀 \u00e9"}]
    for template in (tokenizer.chat_template, without_marks(tokenizer.chat_template)):
        tokenizer.chat_template = template
        assert targets(sample_of(messages, tokenizer), tokenizer) == "🚀 \u00e9<end>"


def test_a_token_that_joins_a_space_and_the_answer_belongs_to_the_answer(tokenizer):
    marked = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
        "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for template in (marked, without_marks(marked)):
        tokenizer.chat_template = template
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer"}]
        assert targets(sample_of(messages, tokenizer), tokenizer) == " the answer<end>"


def test_loss_on_all_leaves_only_the_first_token_out(tokenizer):
    sample = sample_of(CHAT, tokenizer, "all")
    assert not sample.is_target[0] and sample.is_target[1:].all()


def test_the_prompt_is_what_a_user_would_send(tokenizer):
    sample = sample_of(CHAT, tokenizer)
    expected = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert sample.input_ids[: sample.prompt_length].tolist() == expected
    assert sample.reference == "  second answer"
    one = sample_of(CHAT[1:3], tokenizer)
    assert prompt_ids(tokenizer, Conversation(messages=CHAT[1:2])) == one.input_ids[: one.prompt_length].tolist()


def test_a_template_without_an_end_token_masks_the_content(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert targets(sample_of(CHAT, tokenizer), tokenizer) == "first answersecond answer"


REWRITING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.last %}{{ m.content }}{% else %}...{% endif %}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_them(tokenizer):
    tokenizer.chat_template = REWRITING
    assert targets(sample_of(CHAT, tokenizer), tokenizer) == "...<end>  second answer<end>"
    tokenizer.chat_template = without_marks(REWRITING)
    assert targets(sample_of(CHAT[:3], tokenizer), tokenizer) == "first answer<end>"
    with pytest.raises(DataError, match="row: can't tell which .* renders a turn differently .*{% generation %}"):
        sample_of(CHAT, tokenizer)


def test_a_template_that_rewrites_earlier_turns_can_be_trained_on_as_a_whole(tokenizer):
    tokenizer.chat_template = without_marks(REWRITING)
    assert sample_of(CHAT, tokenizer, "all").is_target[1:].all()


def test_a_conversation_that_the_assistant_begins_needs_marks(tokenizer):
    assert targets(sample_of(CHAT[2:], tokenizer), tokenizer) == "first answer<end>  second answer<end>"
    tokenizer.chat_template = without_marks(tokenizer.chat_template)
    with pytest.raises(DataError, match="row: can't tell .* the conversation begins with the assistant"):
        sample_of(CHAT[2:], tokenizer)


def test_a_tokenizer_without_offsets_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="where its tokens stand in the text"):
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


def test_the_tokenizer_s_own_first_token_is_kept_and_its_end_token_not_doubled(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <end>", special_tokens=[("<bos>", tokenizer.bos_token_id), ("<end>", tokenizer.eos_token_id)]
    )
    plain = tokenize(PlainText(prompt="", response="text"), tokenizer, where="row", loss_on="assistant")
    assert tokenizer.decode(plain.input_ids) == "<bos>text<end>"
    answered = tokenize(PlainText(prompt="q", response="r"), tokenizer, where="row", loss_on="assistant")
    assert tokenizer.decode(answered.input_ids) == "<bos>qr<end>"
    assert tokenizer.decode(sample_of(CHAT[1:3], tokenizer).input_ids).count("<bos>") == 1
    tokenizer.chat_template = None
    assert tokenizer.decode(prompt_ids(tokenizer, PlainText(prompt="q", response=""))) == "<bos>q"
