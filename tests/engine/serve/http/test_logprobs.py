"""Log-probabilities in both APIs' forms, on a vocabulary of bytes."""

import math

import pytest

from anabranch.serve.http.logprobs import CompletionLogprobs, chat_logprobs
from anabranch.serve.http.token_texts import TokenTexts
from anabranch.serve.request import Logprob


@pytest.fixture(scope="module")
def texts(offline):
    return TokenTexts(offline.engine.tokenizer)


def position(*candidates):
    """The chosen token first, as the engine gives it."""
    return {token: Logprob(value, rank, None) for token, value, rank in candidates}


def test_offsets_count_characters_across_parts(texts):
    tokens = list("aé€b".encode())
    writer = CompletionLogprobs(texts, skip_special_tokens=True)
    logs = [position((token, -1.0, 1)) for token in tokens]
    first, second = writer.show(tokens[:4], logs[:4]), writer.show(tokens[4:], logs[4:])
    assert first["text_offset"] + second["text_offset"] == [0, 1, 1, 2, 2, 2, 3]
    assert first["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xe2"]


@pytest.mark.parametrize(("skip", "offsets"), [(True, [0, 0, 1]), (False, [0, 9, 10])])
def test_special_tokens_take_no_place_where_they_are_not_shown(texts, skip, offsets):
    writer = CompletionLogprobs(texts, skip_special_tokens=skip)
    shown = writer.show([256, 97, 98], [None, position((97, -1.0, 1)), position((98, -2.0, 1))])
    assert shown["text_offset"] == offsets
    assert shown["token_logprobs"] == [None, -1.0, -2.0]
    assert shown["top_logprobs"] == [None, {"a": -1.0}, {"b": -2.0}]


def test_of_two_tokens_with_one_name_the_more_probable_is_shown():
    same = TokenTexts(None)
    same.name = lambda token: "x"
    shown = CompletionLogprobs(same, skip_special_tokens=True).show([1], [position((1, -5.0, 2), (2, -1.0, 1))])
    assert shown["top_logprobs"] == [{"x": -1.0}]


def test_json_has_no_infinity(texts):
    shown = CompletionLogprobs(texts, skip_special_tokens=True).show([97], [position((97, -math.inf, 258))])
    assert shown["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize("top", [0, 1, 2])
def test_chats_list_exactly_as_many_as_asked_the_best_first(texts, top):
    found = chat_logprobs(texts, [97], [position((97, -3.0, 9), (98, -1.0, 1), (99, -2.0, 2))], top)
    (content,) = found["content"]
    assert (content["token"], content["logprob"], content["bytes"]) == ("a", -3.0, [97])
    assert [one["token"] for one in content["top_logprobs"]] == ["b", "c"][:top]
