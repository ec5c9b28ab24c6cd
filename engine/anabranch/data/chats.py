"""A conversation as a chat template writes it, and which of that text its assistant says.

Templates rewrite what they are given: they trim, drop thoughts of earlier turns, refuse a system's words, add a date.
So the text is written whole, once, and what is learnt is found in it; nothing is tokenized in pieces.

    {% generation %} … {% endgeneration %}   in a template, as transformers defines it: what is within is learnt
    without these                            the conversation is written once more with a sign in place of each answer:
                                             what stays the same is the template's, what lies between is an answer

An answer then begins behind the generation prompt, which is all that a server puts before it, and takes its end mark
with it: what the template puts behind the last answer, without white space behind one of the tokenizer's own tokens.
"""

import os
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

ASSISTANT = "assistant"
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
DAY = date(2024, 7, 26)  # for templates that write today's date: a run must not depend on the day it is resumed
SIGN = re.compile("\ue000(\\d+)\ue001")  # of characters that no text has: they are for private use

Message = Mapping[str, Any]
Spans = list[tuple[int, int]]  # of characters: first, behind the last


class ChatTemplate:
    """The chat template of a tokenizer (a PreTrainedTokenizerFast); ValueError if it has none."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        template = tokenizer.get_chat_template()
        self._template = CLOCK.sub(lambda call: f'"{DAY.strftime(call[2])}"', template)
        self._marked = MARKS.search(template) is not None
        self._names = tokenizer.special_tokens_map  # bos_token and the like, which templates use
        self._tokens = tuple(tokenizer.get_added_vocab())

    def write(self, messages: Sequence[Message]) -> tuple[str, Spans]:
        """The text of messages, each with a role and a content, and what is learnt: one span for each answer.

        Where the template marks what is generated, its marks are the spans. Raises ValueError for what the template
        refuses, and where answers cannot be found in its text.
        """
        text, marks = self._render(messages)
        return text, marks if self._marked else self._answers(messages, text)

    def _render(self, messages: Sequence[Message], *, ask: bool = False) -> tuple[str, Spans]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                [list(messages)], chat_template=self._template, add_generation_prompt=ask,
                return_assistant_tokens_mask=self._marked, **self._names,
            )  # fmt: skip
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        return texts[0], marks[0] if marks else []

    @cached_property
    def _prompt(self) -> str:
        """What asks for an answer; empty where the template has no such thing."""
        asked = [{"role": "user", "content": "?"}]
        (before, _), (after, _) = self._render(asked), self._render(asked, ask=True)
        return after[len(before) :] if after.startswith(before) else ""

    def _answers(self, messages: Sequence[Message], text: str) -> Spans:
        answers = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        signs = [
            {**message, "content": f"\ue000{index}\ue001"} if index in answers else message
            for index, message in enumerate(messages)
        ]
        written, _ = self._render(signs)
        pieces = SIGN.split(written)[::2]
        lost = ValueError(
            "the chat template drops, moves or repeats answers, so what is to be learnt cannot be told; mark it in the "
            "template with {% generation %} and {% endgeneration %}"
        )
        if SIGN.findall(written) != [str(index) for index in answers]:
            raise lost
        behind = [""] * len(pieces)  # what the template puts between its generation prompt and an answer
        for index, piece in enumerate(pieces[:-1]):
            at = piece.rfind(self._prompt)
            if at >= 0:
                end = at + len(self._prompt)
                pieces[index], behind[index] = piece[:end], piece[end:]
        if not text.startswith(pieces[0]):
            raise lost
        spans, at = [], len(pieces[0])
        for index, answer in enumerate(answers):
            piece, content = pieces[index + 1], messages[answer]["content"]
            expected = [at + len(behind[index]) + len(said) for said in (content, content.strip())]
            if index + 1 == len(answers):
                expected = [len(text) - len(piece)]
            end = next((end for end in expected if text.startswith(piece, end)), text.find(piece, at))
            if end < at:
                raise lost
            spans.append((at, end + self._end_mark(piece, pieces[-1])))
            at = end + len(piece)
        if at != len(text):
            raise lost
        return spans

    def _end_mark(self, piece: str, last: str) -> int:
        """How much of what follows an answer ends it, given what follows the last answer."""
        shared = os.path.commonprefix([piece, last])  # noqa: RUF071  (of any texts)
        if shared.rstrip().endswith(self._tokens):
            return len(shared.rstrip())
        token = next((token for token in self._tokens if piece.startswith(token)), None)
        return len(shared if token is None else token)
