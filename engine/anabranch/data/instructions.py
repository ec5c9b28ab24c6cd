"""Texts to learn from, a JSON object a line: pairs, chats or plain text, as tokens with a mark on those to learn.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}    assistants' words
    {"prompt": "…", "completion": "…"}                                                         the completion
    {"instruction": "…", "input": "…", "output": "…"}   (`input` may be missing)               the output
    {"text": "…"}                                                                              everything

Pairs become a chat of two where the tokenizer has a chat template, and are joined as they are otherwise, with the end
of text behind. Of a chat, learnt is what the template adds for an assistant's turn, its end mark included.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20  # of a line


@dataclass(frozen=True, slots=True)
class Example:
    """ids and, for each, whether the model is to learn to say it."""

    ids: list[int]
    learnt: list[bool]


def read_examples(path: Path, tokenizer: Any) -> list[Example]:
    """All examples of a file, in order. `tokenizer` is a PreTrainedTokenizerFast.

    Raises ValueError, with the number of the line, for what is no JSON object of these shapes and for examples with
    nothing to learn.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return [_numbered(path, number, line, tokenizer) for number, line in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_BYTES + 1):
            number += 1
            if len(line) > MOST_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {MOST_BYTES} bytes")
            if line.strip():
                yield number, line


def _numbered(path: Path, number: int, line: bytes, tokenizer: Any) -> Example:
    try:
        return example_of(json.loads(line), tokenizer)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def example_of(row: Any, tokenizer: Any) -> Example:
    """One row as tokens; ValueError says what it lacks."""
    if not isinstance(row, dict):
        raise ValueError(f"needs a JSON object, got {type(row).__name__}")
    keys = row.keys()
    spans: Spans | None
    if keys == {"text"}:
        text, spans = _texts(row, "text")[0], None
    elif keys == {"messages"}:
        text, spans = _chat(_messages(row["messages"]), tokenizer)
    elif keys == {"prompt", "completion"}:
        prompt, completion = _texts(row, "prompt", "completion")
        text, spans = _pair(prompt, completion, tokenizer)
    elif keys in ({"instruction", "output"}, {"instruction", "input", "output"}):
        asked, output = _texts(row, "instruction", "output")
        extra = _texts(row, "input")[0] if "input" in keys else ""
        text, spans = _pair(f"{asked}\n\n{extra}" if extra else asked, output, tokenizer)
    else:
        raise ValueError(
            f"needs the keys messages, or prompt and completion, or instruction, output and maybe input, or text; "
            f"got {sorted(keys)}"
        )
    return _tokens(text, spans, tokenizer)


Spans = list[tuple[int, int]]  # of characters to learn


def _texts(row: Mapping[str, Any], *keys: str) -> list[str]:
    wrong = [key for key in keys if not isinstance(row[key], str)]
    if wrong:
        raise ValueError(f"{wrong[0]} must be a text, got {type(row[wrong[0]]).__name__}")
    return [row[key] for key in keys]


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list of at least one message")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError("each message needs a role and a content")
        _texts(message, "role", "content")
    return value


def _pair(prompt: str, completion: str, tokenizer: Any) -> tuple[str, Spans]:
    if tokenizer.chat_template:
        return _chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}], tokenizer)
    text = prompt + completion
    return text, [(len(prompt), len(text))]


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[str, Spans]:
    """The template's text, and what each assistant's turn adds to the text that asks for it."""
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; give prompt and completion, or text")
    spans = []
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise ValueError("the chat template changes earlier turns, so what is to be learnt cannot be told")
        spans.append((len(before), len(after)))
    return text, spans


def _tokens(text: str, spans: Spans | None, tokenizer: Any) -> Example:
    """Tokens of a text; learnt are those that end within a span, and an end of text that is put behind."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if spans is None:
        learnt = [True] * len(ids)
    else:
        learnt = [any(first < end <= last for first, last in spans) for _, end in encoded["offset_mapping"]]
    end = tokenizer.eos_token_id
    if end is not None and (not ids or ids[-1] != end) and not tokenizer.chat_template:
        ids.append(end)
        learnt.append(True)
    if not any(learnt[1:]):  # the first token is never predicted
        raise ValueError("nothing to learn: no assistant, or an empty text")
    return Example(ids, learnt)
