"""What is learnt of a conversation: an assistant's words and their end, whatever the template does around them.

The templates are small, each with what makes one family of published ones hard.
"""

import pytest

from anabranch.data.chats import ChatTemplate

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # its own marks, as SmolLM3 has them
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # thoughts: dropped in turns before the last question, put in, empty, after it
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set said = m.content %}"
    "{% set thought = '' %}{% if m.role == 'assistant' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{% endif %}{{ said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA3 = (  # headers, trimmed contents, a system's turn with today's date that is always there
    "{{ bos_token }}{% set first = messages[0] %}{{ '<|start|>system<|end|>\n\nToday Date: ' }}"
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}{% if first.role == 'system' %}"
    "{{ '\n\n' + first.content | trim }}{% set messages = messages[1:] %}{% endif %}{{ '<|eot|>' }}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (  # no generation prompt; the system's words go into the last question, wherever that is
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}"
    "{% endif %}{% if m.role == 'user' %}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ '[INST]' + (system if m == asked[-1] else '') + m.content + '[/INST]' }}{% else %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (  # no system; the assistant has another name
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<turn>' + role + '\n' + m.content | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
HARMONY = (  # the last answer ends otherwise than those before
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
PLAIN = (  # no special tokens at all
    "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
THINKING = (  # the generation prompt begins a thought, which turns before the last do not have
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
SPECIAL = (
    "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<|message|>", "<|return|>", "[INST]", "[/INST]",
    "<turn>", "</turn>",
)  # fmt: skip


def talk(*contents, system=None):
    """Turns of a user and an assistant."""
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


@pytest.fixture
def answers(words):
    """The pieces that are learnt of a conversation."""

    def found(template, messages):
        text, spans = ChatTemplate(words(template, SPECIAL)).write(messages)
        return [text[first:last] for first, last in spans]

    return found


LONG = talk("a", "b", "c", "d")
THOUGHT = "<think>\n\n</think>\n\n"
CASES = {  # what an answer becomes, before the last and as the last
    CHATML: ("{}<|im_end|>", "{}<|im_end|>"),
    MARKED: ("{}<|im_end|>", "{}<|im_end|>"),
    QWEN3: ("{}<|im_end|>", THOUGHT + "{}<|im_end|>"),
    LLAMA3: ("{}<|eot|>", "{}<|eot|>"),
    MISTRAL: ("{}<eos>", "{}<eos>"),
    GEMMA: ("{}</turn>", "{}</turn>"),
    HARMONY: ("<|message|>{}<|end|>", "<|message|>{}<|return|>"),
    PLAIN: ("{}\n", "{}\n"),
    THINKING: ("{}<|im_end|>", THOUGHT.removeprefix("<think>\n") + "{}<|im_end|>"),
}
TRIMMING = (LLAMA3, GEMMA)


@pytest.mark.parametrize("template", CASES)
@pytest.mark.parametrize(
    "contents",
    [
        ("a", "b", "c", "d"),
        ("a", "b"),
        ("a", "", "c", ""),
        ("a", " b\n", "c", "d\n\n"),
        ("a", "a", "a", "a"),
        ("assistant", "User: a", "Assistant: ", "assistant"),
        ("<think>", "Assistant: ", "<think>", "\n"),
        ("<|im_end|>", "</turn>", "<eos>", "<|eot|>"),
        tuple("abcdefghij"),
    ],
)
def test_every_answer_is_learnt_with_its_end_and_nothing_else(answers, template, contents):
    before, last = CASES[template]
    said = [text.strip() if template in TRIMMING else text for text in contents[1::2]]
    wanted = [*map(before.format, said[:-1]), last.format(said[-1])]
    assert answers(template, talk(*contents)) == wanted
    if template is not GEMMA:
        assert answers(template, talk(*contents, system="be kind")) == wanted


def test_thoughts_are_learnt_where_the_template_keeps_them(answers):
    thought = "<think>\nhm\n</think>\n\n"
    said = answers(QWEN3, talk("a", thought + "b", "c", thought + "d"))
    assert said == ["b<|im_end|>", thought + "d<|im_end|>"]
    assert answers(QWEN3, talk("a", thought + "b")) == [thought + "b<|im_end|>"]


@pytest.mark.parametrize(("template", "reason"), [(GEMMA, "System role not supported"), (MISTRAL, "must alternate")])
def test_what_a_template_refuses_is_said(answers, template, reason):
    messages = talk("a", "b", system="s") if template is GEMMA else [*talk("a", "b"), *talk("c", "d")[1:]]
    with pytest.raises(ValueError, match=f"the chat template refuses this conversation: .*{reason}"):
        answers(template, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_answers_that_cannot_be_found_are_refused(answers, template):
    with pytest.raises(ValueError, match="drops, moves or repeats answers"):
        answers(template, LONG)


def test_a_template_may_rewrite_answers(answers):
    assert answers("{% for m in messages %}<{{ m.content | upper }}>{% endfor %}", LONG) == ["B>", "D>"]


def test_a_run_does_not_depend_on_the_day(words):
    text, _ = ChatTemplate(words(LLAMA3, SPECIAL)).write(LONG)
    assert "Today Date: 26 Jul 2024<|eot|>" in text


def test_a_tokenizer_without_a_template_is_refused(words):
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate(words())
