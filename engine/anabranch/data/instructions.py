"""Texts to learn from, a JSON object a line: chats, pairs or plain text, as tokens with a mark on those to learn.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}    the assistant's words
    {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}        the same, as ShareGPT
    {"prompt": "…", "completion": "…"}       two texts, or two lists of messages               the completion
    {"instruction": "…", "input": "…", "output": "…"}   (`input` may be missing)               the output
    {"text": "…"}                                                                              everything

All but the last may have a "system" text. A message with "weight": 0 is not learnt. Other keys, such as an id, are left
alone, but for those that would change what the model is to see (REFUSED).

Pairs become a chat of two where the tokenizer has a chat template; without one they are joined as they are. Such a text
and plain text get what the tokenizer puts before a text, and its end of text behind. What of a chat is learnt,
`anabranch.data.chats` says; messages behind the last answer are left out.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.data.chats import ASSISTANT, ChatTemplate, Spans

MOST_BYTES = 64 << 20  # of a line
FORMATS = {  # keys that make a row one of these
    "messages": {"messages"},
    "conversations": {"conversations"},
    "prompt and completion": {"prompt", "completion"},
    "instruction and output": {"instruction", "output"},
}
SPEAKERS = {"human": "user", "gpt": ASSISTANT, "user": "user", ASSISTANT: ASSISTANT, "system": "system"}
REFUSED = ("tools", "functions", "tool_calls", "function_call", "history", "images", "videos", "audios")


@dataclass(frozen=True, slots=True)
class Example:
    """ids and, for each, whether the model is to learn to say it."""

    ids: list[int]
    learnt: list[bool]


def read_examples(paths: Sequence[Path], tokenizer: Any) -> Iterator[Example]:
    """All examples of files, one after another; one line is held at a time. `tokenizer`: a PreTrainedTokenizerFast.

    Raises ValueError, with the file and the number of the line, for what is no JSON object of these shapes and for
    examples with nothing to learn; and for a file without any.
    """
    chat = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        number = 0
        for number, line in _lines(path):
            try:
                yield example_of(json.loads(line.decode("utf-8")), tokenizer, chat)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
        if not number:
            raise ValueError(f"{path} has no examples: it is empty")


def example_of(row: Any, tokenizer: Any, chat: ChatTemplate | None) -> Example:
    """One row as tokens; ValueError says what it lacks."""
    if not isinstance(row, dict):
        raise ValueError(f"needs a JSON object, got {type(row).__name__}")
    refused = [key for key in REFUSED if row.get(key)]
    if refused:
        raise ValueError(f"{refused[0]} is not supported")
    formats = [name for name, keys in FORMATS.items() if keys <= row.keys()]
    if not formats and "text" in row:  # beside others it repeats them
        return _tokens(_text(row, "text"), None, tokenizer, chat=False)
    if len(formats) != 1:
        raise ValueError(f"needs the keys of one of {[*FORMATS, 'text']}, got {sorted(row)}")
    messages = _messages(row, formats[0])
    if row.get("system"):
        messages = [{"role": "system", "content": _text(row, "system")}, *messages]
    spoken = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not spoken:
        raise ValueError("nothing to learn: no assistant speaks")
    messages = messages[: spoken[-1] + 1]
    if chat is not None:
        text, spans = chat.write([{k: v for k, v in message.items() if k != "weight"} for message in messages])
        return _tokens(text, _wanted(spans, [messages[index] for index in spoken]), tokenizer, chat=True)
    if formats[0] in ("messages", "conversations") or not isinstance(row.get("prompt", ""), str):
        raise ValueError("the tokenizer has no chat template; give prompt and completion as texts, or text")
    *asked, answer = [message["content"] for message in messages]
    prompt = "\n\n".join(asked)
    return _tokens(prompt + answer, [(len(prompt), len(prompt + answer))], tokenizer, chat=False)


def _messages(row: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """The conversation of a row."""
    if kind == "instruction and output":
        asked, extra = _text(row, "instruction"), _text(row, "input") if row.get("input") else ""
        return _pair(f"{asked}\n\n{extra}" if extra else asked, _text(row, "output"))
    if kind != "prompt and completion":
        return _conversation(row, kind)
    if isinstance(row["prompt"], str):
        return _pair(_text(row, "prompt"), _text(row, "completion"))
    before = [{**message, "weight": 0} for message in _conversation(row, "prompt")]
    return before + _conversation(row, "completion")


def _pair(prompt: str, completion: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": completion}]


def _conversation(row: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = row[key]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list of at least one message")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        speaker = message["from"]
        if speaker not in SPEAKERS:
            raise ValueError(f"a message must be from one of {list(SPEAKERS)}, got {speaker!r}")
        return {"role": SPEAKERS[speaker], "content": _text(message, "value")}
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError("each message needs a role and a content, or from and value")
    refused = [key for key in REFUSED if message.get(key)]
    if refused:
        raise ValueError(f"{refused[0]} of a message is not supported")
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"the weight of a message must be 0 or 1, got {message['weight']!r}")
    return {**message, "role": _text(message, "role"), "content": _text(message, "content")}


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} must be a text, got {type(row[key]).__name__}")
    text: str = row[key]
    text.encode()  # JSON can write half a surrogate pair, which no tokenizer takes
    return text


def _wanted(spans: Spans, answers: Sequence[Mapping[str, Any]]) -> Spans:
    """The spans of answers whose weight is not 0."""
    wanted = [bool(answer.get("weight", 1)) for answer in answers]
    if all(wanted):
        return spans
    if len(spans) != len(answers):
        raise ValueError("weights of messages need a chat template that marks each answer once")
    return [span for span, learnt in zip(spans, wanted, strict=True) if learnt]


def _tokens(text: str, spans: Spans | None, tokenizer: Any, *, chat: bool) -> Example:
    """Tokens of a text; learnt are those that have a character in a span, all without spans, and the end of text."""
    encoded = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    if spans is None:
        learnt = [True] * len(ids)
    else:
        learnt = [
            any(start < last and first < end for first, last in spans) for start, end in encoded["offset_mapping"]
        ]
    end = tokenizer.eos_token_id
    if not chat and end is not None and text:
        if not ids or ids[-1] != end:
            ids.append(end)
            learnt.append(True)
        learnt[-1] = True
    if not any(learnt[1:]):  # the first token is never predicted
        raise ValueError("nothing to learn: an empty text")
    return Example(ids, learnt)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, and their numbers."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MOST_BYTES + 1):
            number += 1
            if number == 1:
                line = _first(path, line)
            if len(line) > MOST_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {MOST_BYTES} bytes")
            if line.strip():
                yield number, line


def _first(path: Path, line: bytes) -> bytes:
    """The first line without a byte order mark; ValueError if it says that the file is of another kind."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16; only UTF-8 is read")
    line = line.removeprefix(b"\xef\xbb\xbf")
    if line.lstrip().startswith(b"["):
        raise ValueError(f"{path} is a JSON array; needs an object a line, as `jq -c '.[]' {path.name}` writes it")
    return line
