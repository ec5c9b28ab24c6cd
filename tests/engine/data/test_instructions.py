"""Rows of JSONL files as tokens, and which of them are learnt."""

import json

import pytest

from anabranch.data.chats import ChatTemplate
from anabranch.data.instructions import example_of, read_examples

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)
CHAT = [("user", "hi"), ("assistant", "ho"), ("user", "x"), ("assistant", "y")]
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]


def read(row, tokenizer):
    """(all text, what is learnt of it) of a row."""
    chat = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    example = example_of(row, tokenizer, chat)
    learnt = [token for token, wanted in zip(example.ids, example.learnt, strict=True) if wanted]
    return tokenizer.decode(example.ids), tokenizer.decode(learnt)


@pytest.mark.parametrize(
    ("row", "whole", "learnt"),
    [
        ({"prompt": "2 + 2 = ", "completion": "4 é"}, "2 + 2 = 4 é<eos>", "4 é<eos>"),
        ({"prompt": "2 + 2 = ", "completion": "4", "system": "Add"}, "Add\n\n2 + 2 = 4<eos>", "4<eos>"),
        ({"prompt": "a", "completion": ""}, "a<eos>", "<eos>"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "Add\n\n1 12<eos>", "2<eos>"),
        ({"instruction": "Add", "input": None, "output": "2"}, "Add2<eos>", "2<eos>"),
        ({"instruction": "Add", "output": "2", "text": "Add: 2", "id": 7}, "Add2<eos>", "2<eos>"),
        ({"text": "abc", "source": None}, "abc<eos>", "abc<eos>"),
        ({"text": "abc<eos>"}, "abc<eos>", "abc<eos>"),
    ],
)
def test_without_a_template_texts_are_joined(words, row, whole, learnt):
    assert read(row, words()) == (whole, learnt)
    with_bos, of_it = read(row, words(bos=True))
    assert with_bos == "<bos>" + whole
    assert of_it.removeprefix("<bos>") == learnt


@pytest.mark.parametrize(
    ("row", "whole", "learnt"),
    [
        ({"messages": MESSAGES}, "<user>hi<end><assistant>ho<end><user>x<end><assistant>y<end>", "ho<end>y<end>"),
        ({"messages": MESSAGES[:3]}, "<user>hi<end><assistant>ho<end>", "ho<end>"),
        ({"prompt": "a", "completion": "b", "system": ""}, "<user>a<end><assistant>b<end>", "b<end>"),
        (
            {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
            "<user>hi<end><assistant>ho<end><user>x<end><assistant>y<end>",
            "y<end>",
        ),
        (
            {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}, MESSAGES[2], {**MESSAGES[3], "weight": 1}]},
            "<user>hi<end><assistant>ho<end><user>x<end><assistant>y<end>",
            "y<end>",
        ),
        (
            {"instruction": "a", "input": "b", "output": "c", "system": "s"},
            "<system>s<end><user>a\n\nb<end><assistant>c<end>",
            "c<end>",
        ),
        (
            {
                "id": "1",
                "system": "s",
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            },
            "<system>s<end><user>a<end><assistant>b<end>",
            "b<end>",
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"role": "user", "content": "a"}, MESSAGES[1]]},
            "<system>s<end><user>a<end><assistant>ho<end>",
            "ho<end>",
        ),
    ],
)
@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_everything_else_becomes_a_chat_where_there_is_a_template(words, template, row, whole, learnt):
    assert read(row, words(template)) == (whole, learnt)


def test_plain_text_is_no_chat(words):
    assert read({"text": "<user>a<end>"}, words(TEMPLATE, bos=True))[0] == "<bos><user>a<end><eos>"


def test_a_token_that_spans_the_border_of_a_turn_is_learnt(words):
    """Tokens of the text up to an answer need not be the first tokens of the whole text, which is what is learnt."""
    template = "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    tokenizer = words(template, merges=("Ċh", "oĊ", "Ċu"))
    example = example_of({"messages": MESSAGES}, tokenizer, ChatTemplate(tokenizer))
    pieces = [(tokenizer.decode([token]), learnt) for token, learnt in zip(example.ids, example.learnt, strict=True)]
    text = "user:\nhi\nassistant:\nho\nuser:\nx\nassistant:\ny\n"
    assert "".join(piece for piece, _ in pieces) == text
    assert ("\nh", True) in pieces  # ":\n" and "ho" share it
    assert ("o\n", True) in pieces
    assert "".join(piece for piece, learnt in pieces if learnt) == "\nho\ny\n"
    before = tokenizer("user:\nhi\nassistant:\n", add_special_tokens=False)["input_ids"]
    assert example.ids[: len(before)] != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: Expecting"),
        ("[" * 10**5, "line 2: maximum recursion"),
        ("[1]", "line 2: needs a JSON object, got list"),
        ('{"question": "a"}', "line 2: needs the keys of one of .*'text'.* got ..question"),
        (
            '{"messages": [], "prompt": "", "completion": ""}',
            "line 2: needs the keys of one of .* got ..completion', 'messages",
        ),
        ('{"prompt": 3, "completion": "a"}', "line 2: prompt must be a list"),
        ('{"prompt": "a", "completion": null}', "line 2: completion must be a text, got NoneType"),
        ('{"text": "\\ud800"}', "line 2: .*surrogates not allowed"),
        ('{"messages": []}', "line 2: messages must be a list of at least one"),
        ('{"messages": [{"role": "user"}]}', "line 2: each message needs a role and a content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: nothing to learn: no assistant"),
        ('{"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}', "line 2: tool_calls of a message"),
        ('{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}', "line 2: the weight of a message must"),
        (
            '{"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": ""}]}',
            "line 2: .*no tools",
        ),
        ('{"conversations": [{"from": "gtp", "value": "a"}]}', "line 2: a message must be from one of .* got 'gtp'"),
        ('{"text": "a", "tools": [1]}', "line 2: tools is not supported"),
        ('{"text": ""}', "line 2: nothing to learn"),
    ],
)
def test_a_bad_row_is_named_by_its_file_and_line(words, tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl, " + message):
        list(read_examples([path], words(TEMPLATE)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "good"}\n\n{"text": "\xff"}\n', r"line 3: .*utf-8"),
        (b"", "has no examples: it is empty"),
        (b"\n \r\n", "has no examples: it is empty"),
        ('{"text": "a"}'.encode("utf-16"), "is UTF-16; only UTF-8 is read"),
        (b' [{"text": "a"}]', "JSON array; needs an object a line, as `jq"),
        (None, "there is no file"),
    ],
)
def test_a_bad_file_is_named(words, tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_examples([path], words()))


def test_chats_need_a_template(words):
    for row in ({"messages": MESSAGES}, {"prompt": MESSAGES[:1], "completion": MESSAGES[1:2]}):
        with pytest.raises(ValueError, match="has no chat template"):
            read(row, words())


def test_files_are_read_in_order_and_in_many_hands_writing(words, tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    second.write_text(json.dumps({"text": "three"}), encoding="utf-8")
    tokenizer = words()
    found = [tokenizer.decode(example.ids) for example in read_examples([first, second, first], tokenizer)]
    assert found == ["one<eos>", "two<eos>", "three<eos>", "one<eos>", "two<eos>"]
