"""Which roles and which end tokens are targets, token by token, on templates of several shapes."""

import pytest
from test_templates import ALPACA, CHATML, FORGETFUL, GEMMA, LLAMA_2, LLAMA_3, MISTRAL, THINKING

from quantune.data.formats import Conversation, PlainText
from quantune.data.tokenization import tokenize
from quantune.errors import DataError
from quantune.recipe.chat_templates import template_path

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "user\nsays"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": " user"},
    {"role": "assistant", "content": "user"},
]
MARKED = template_path("chatml").read_text(encoding="utf-8")


def runs(tokenizer, template, messages=MESSAGES, **options):
    """The text of each run of targets."""
    tokenizer.chat_template = template
    sample = tokenize(Conversation(messages=messages), tokenizer, where="row", **options)
    assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    marks = [
        tokenizer.decode([token]) if target else "\0"
        for token, target in zip(sample.input_ids, sample.is_target, strict=True)
    ]
    return [run for run in "".join(marks).split("\0") if run]


ANSWERS = {
    CHATML: ["the answer", "user"],
    LLAMA_2: [" the answer ", " user "],
    LLAMA_3: ["the answer", "user"],
    GEMMA: ["the answer", "user"],
    MISTRAL: ["the answer", "user"],
    ALPACA: ["the answer", "user"],
    MARKED: ["the answer", "user"],
}
names = ["chatml", "llama 2", "llama 3", "gemma", "mistral", "alpaca", "chatml with marks"]
every_template = pytest.mark.parametrize("template", ANSWERS, ids=names)


def end_of(template):
    return "<|im_end|>" if template == MARKED else "<end>"


@every_template
def test_end_tokens_of_the_answers_are_targets_by_default_and_none_with_none(tokenizer, template):
    first, second = ANSWERS[template]
    end = end_of(template)
    assert runs(tokenizer, template, train_on_eos="turn") == [first + end, second + end]
    assert runs(tokenizer, template, train_on_eos="none") == [first, second]


@every_template
def test_with_last_only_the_last_end_token_is_a_target(tokenizer, template):
    first, second = ANSWERS[template]
    assert runs(tokenizer, template, train_on_eos="last") == [first, second + end_of(template)]


ENDS_OF_OTHERS = {CHATML: 3, LLAMA_2: 0, LLAMA_3: 3, GEMMA: 3, MISTRAL: 0, ALPACA: 0, MARKED: 3}
"""How many system and user turns the template ends with its end token."""


@every_template
def test_with_all_the_end_tokens_of_untrained_turns_are_targets_too(tokenizer, template):
    first, second = ANSWERS[template]
    end = end_of(template)
    found = runs(tokenizer, template, train_on_eos="all")
    assert [run for run in found if run != end] == [first + end, second + end]
    assert found.count(end) == ENDS_OF_OTHERS[template]


def test_the_last_end_token_may_be_a_question_s(tokenizer):
    assert runs(tokenizer, CHATML, MESSAGES[1:4], train_on_eos="last") == ["the answer", "<end>"]


@every_template
def test_what_a_user_says_is_found_where_the_header_says_the_same(tokenizer, template):
    end = end_of(template) if ENDS_OF_OTHERS[template] else ""
    second = "user" if template in (LLAMA_2, LLAMA_3, GEMMA) else " user"  # these trim
    assert runs(tokenizer, template, loss_on=("user",)) == ["user\nsays" + end, second + end]


@every_template
def test_what_the_system_message_says_can_be_learned(tokenizer, template):
    end = end_of(template) if ENDS_OF_OTHERS[template] else ""
    assert runs(tokenizer, template, loss_on=("system",)) == ["be brief" + end]


def test_several_roles_are_learned_together(tokenizer):
    expected = ["be brief<end>", "the answer<end>", "user<end>"]
    assert runs(tokenizer, CHATML, loss_on=("assistant", "system")) == expected
    without = ["be brief", "the answer", "user"]
    assert runs(tokenizer, CHATML, loss_on=("assistant", "system"), train_on_eos="none") == without


def test_listing_the_assistant_is_the_default(tokenizer):
    assert runs(tokenizer, LLAMA_2, loss_on=("assistant",)) == runs(tokenizer, LLAMA_2)


def test_an_end_token_that_somebody_writes_is_text(tokenizer):
    messages = [{"role": "user", "content": "q<end>"}, {"role": "assistant", "content": "a<end>b"}]
    assert runs(tokenizer, CHATML, messages, train_on_eos="none") == ["a<end>b"]
    assert runs(tokenizer, CHATML, messages, train_on_eos="all") == ["<end>", "a<end>b<end>"]
    assert runs(tokenizer, CHATML, messages, loss_on=("user",)) == ["q<end><end>"]


def test_an_empty_answer_without_its_end_token_has_no_target(tokenizer):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]
    for template in ANSWERS:
        if template != LLAMA_2:  # which says a space
            assert runs(tokenizer, template, messages, train_on_eos="none") == []


def test_a_role_of_a_template_that_rewrites_answers_can_be_learned(tokenizer):
    assert runs(tokenizer, THINKING, loss_on=("user",)) == ["user\nsays<end>", " user<end>"]


TWICE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}{{ messages[0].content }}"
READING = "{% for m in messages %}{{ m.role }}: {% if 'brief' in m.content %}!{% endif %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template", [TWICE, READING, FORGETFUL], ids=["twice", "reads", "forgets"])
def test_a_turn_that_can_not_be_found_is_refused(tokenizer, template):
    with pytest.raises(DataError, match=r"row: can't tell which tokens message 0 \(system\) says: .*loss_on = \"assis"):
        runs(tokenizer, template, loss_on=("system",))


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("assistant", "yes<end>"), (("user",), "Q: x\nA: "), (("user", "assistant"), "Q: x\nA: yes<end>")],
)
def test_a_plain_prompt_is_the_user_s_and_the_response_the_assistant_s(tokenizer, loss_on, expected):
    sample = tokenize(PlainText(prompt="Q: x\nA: ", response="yes"), tokenizer, where="row", loss_on=loss_on)
    learned = sample.input_ids[sample.is_target]
    assert tokenizer.decode(learned) == (expected if loss_on == "assistant" or "user" not in loss_on else expected[1:])
