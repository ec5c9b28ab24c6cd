"""Rows of a JSONL file as tokens, and which of them are learnt."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from anabranch.data.instructions import example_of, read_examples

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)


def tokenizer(template=None):
    """Bytes, and <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    made.chat_template = template
    return made


def learnt(example, words):
    """The text to learn, piece by piece."""
    return words.decode([token for token, wanted in zip(example.ids, example.learnt, strict=True) if wanted])


def whole(example, words):
    return words.decode(example.ids)


def test_a_pair_is_joined_and_its_completion_learnt():
    words = tokenizer()
    example = example_of({"prompt": "2 + 2 = ", "completion": "4 é"}, words)
    assert whole(example, words) == "2 + 2 = 4 é<eos>"
    assert learnt(example, words) == "4 é<eos>"


def test_instructions_take_their_input():
    words = tokenizer()
    example = example_of({"instruction": "Add", "input": "1 1", "output": "2"}, words)
    assert whole(example, words) == "Add\n\n1 12<eos>"
    assert learnt(example, words) == "2<eos>"
    assert learnt(example_of({"instruction": "Add", "output": "2"}, words), words) == "2<eos>"


def test_of_plain_text_everything_is_learnt():
    words = tokenizer()
    assert learnt(example_of({"text": "abc"}, words), words) == "abc<eos>"


def test_of_a_chat_assistants_turns_are_learnt_with_their_end():
    words = tokenizer(TEMPLATE)
    chat = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
    ]  # fmt: skip
    example = example_of({"messages": chat}, words)
    assert whole(example, words) == "<user>hi<end><assistant>ho<end><user>x<end><assistant>y<end>"
    assert learnt(example, words) == "ho<end>y<end>"


def test_a_pair_becomes_a_chat_where_there_is_a_template():
    words = tokenizer(TEMPLATE)
    example = example_of({"prompt": "a", "completion": "b"}, words)
    assert whole(example, words) == "<user>a<end><assistant>b<end>"
    assert learnt(example, words) == "b<end>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: Expecting"),
        ("[1]", "line 2: needs a JSON object, got list"),
        ('{"question": "a"}', "line 2: needs the keys .* got ..question"),
        ('{"prompt": 3, "completion": "a"}', "line 2: prompt must be a text, got int"),
        ('{"messages": []}', "line 2: messages must be a list of at least one"),
        ('{"messages": [{"role": "user"}]}', "line 2: each message needs a role and a content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: nothing to learn"),
        ('{"text": ""}', "line 2: nothing to learn"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    template = TEMPLATE if "messages" in line else None
    with pytest.raises(ValueError, match=message):
        read_examples(path, tokenizer(template))


def test_bytes_that_are_no_text_are_named_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 3: .*utf-8"):
        read_examples(path, tokenizer())


def test_chats_need_a_template_that_leaves_earlier_turns_alone():
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="has no chat template"):
        example_of(chat, tokenizer())
    counting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="changes earlier turns"):
        example_of(chat, tokenizer(counting))


def test_a_file_is_read_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("one", "two")), encoding="utf-8")
    words = tokenizer()
    assert [whole(example, words) for example in read_examples(path, words)] == ["one<eos>", "two<eos>"]
    with pytest.raises(ValueError, match="there is no file"):
        read_examples(tmp_path / "none.jsonl", words)
