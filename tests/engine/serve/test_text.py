import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from anabranch.serve.text import TextStream


def byte_level():
    """GPT-2's kind: tokens are bytes, one in its alphabet each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ä", "½"), ("Ġ", "a"), ("b", "c")]  # the first one ends inside a character
    vocab = {c: i for i, c in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback():
    """Llama 2's kind: a space is part of the word after it, unknown characters fall apart into bytes."""
    words = ["<unk>", "▁", "a", "b", "▁a", "▁ab", "ab", ".", "é"]
    vocab = {c: i for i, c in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(
        models.BPE(vocab, [("a", "b"), ("▁", "ab"), ("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}
texts = st.text(st.sampled_from("ab .é€你😀👍🏽\n"), min_size=1, max_size=60)
KINDS = pytest.mark.parametrize("kind", TOKENIZERS)


def decode(kind):
    return lambda ids: TOKENIZERS[kind].decode(ids)


def stream_of(kind, ids, at, stops=(), keep=False):
    return TextStream(decode(kind), ids[:at], stops, keep=keep)


@KINDS
@given(texts, st.data())
def test_pieces_are_whole_characters_and_make_up_the_text(kind, text, data):
    ids = TOKENIZERS[kind].encode(text).ids
    at = data.draw(st.integers(0, len(ids)))
    stream, pieces = stream_of(kind, ids, at), []
    for token in ids[at:]:
        assert stream.feed([token]) is None
        pieces.append(stream.release())
        assert "\ufffd" not in pieces[-1]
    assert stream.release(final=True) == ""
    assert "".join(pieces) == stream.text
    before = TOKENIZERS[kind].decode(ids[:at]).rstrip("\ufffd")
    assert TOKENIZERS[kind].decode(ids) == text
    assert text.endswith(stream.text)
    if kind == "byte-level":  # the other tokenizer decodes a broken character and those beside it to U+FFFD
        assert before + stream.text == text


@KINDS
@given(texts, st.data())
def test_the_division_into_calls_does_not_matter(kind, text, data):
    ids = TOKENIZERS[kind].encode(text).ids
    ids = ids[: data.draw(st.integers(1, len(ids)))]  # the last character may be broken off
    at = data.draw(st.integers(0, len(ids)))
    whole = stream_of(kind, ids, at)
    whole.feed(ids[at:])
    parts, start = stream_of(kind, ids, at), at
    while start < len(ids):
        end = data.draw(st.integers(start + 1, len(ids)))
        parts.feed(ids[start:end])
        start = end
    assert parts.text == whole.text


@given(
    st.lists(st.sampled_from("é€😀"), min_size=1, max_size=400), st.integers(1, 9), st.randoms(use_true_random=False)
)
def test_bytes_that_are_no_text_do_not_break_what_follows(characters, step, random):
    tokenizer = TOKENIZERS["byte-level"]
    junk = [random.choice(tokenizer.encode(character).ids) for character in characters]
    ids = junk + tokenizer.encode("abc").ids
    stream, pieces = TextStream(decode("byte-level"), []), []
    for start in range(0, len(ids), step):
        stream.feed(ids[start : start + step])
        pieces.append(stream.release())
    assert "".join(pieces) == stream.text
    assert stream.text.endswith("abc")


@given(
    texts, st.lists(st.text(st.sampled_from("ab .é"), min_size=1, max_size=4), min_size=1, max_size=3), st.booleans()
)
def test_a_stop_text_ends_the_output_and_never_leaks(text, stops, keep):
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode(text).ids
    stream, shown, found = stream_of("byte-level", ids, 0, stops, keep), "", None
    for token in ids:
        found = stream.feed([token])
        shown += stream.release(final=found is not None)
        if found is not None:
            break
        assert not any(stop in shown for stop in stops)
    shown += stream.release(final=True)
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert found is None
        assert shown == stream.text == text
    else:
        end, start, stop = min(ends)
        assert found == stop
        assert shown == stream.text == text[: end if keep else start]


@given(texts, st.text(st.sampled_from("ab é"), min_size=1, max_size=3))
def test_feeding_all_at_once_finds_the_same_stop(text, stop):
    ids = TOKENIZERS["byte-level"].encode(text).ids
    stream = stream_of("byte-level", ids, 0, [stop])
    assert (stream.feed(ids) is not None) == (stop in text)
    assert stream.text == text.split(stop)[0]


def test_only_what_may_become_a_stop_is_held_back():
    tokenizer = TOKENIZERS["byte-level"]
    stream = stream_of("byte-level", [], 0, ["abba"])
    shown = []
    for character in "aabab.":
        stream.feed(tokenizer.encode(character).ids)
        shown.append(stream.release())
    assert shown == ["", "a", "", "ab", "", "ab."]


def test_a_stop_text_before_the_minimum_length_is_ordinary():
    tokenizer = TOKENIZERS["byte-level"]
    stream = stream_of("byte-level", [], 0, ["ab"])
    assert stream.feed(tokenizer.encode("ab").ids, watch=False) is None
    assert stream.feed(tokenizer.encode("b").ids) is None  # nor does it help to make one
    assert stream.feed(tokenizer.encode("ab").ids) == "ab"
    assert stream.text == "abb"


def test_a_word_after_the_prompt_keeps_its_space():
    tokenizer = TOKENIZERS["byte-fallback"]
    prompt, word = tokenizer.encode("a b").ids, tokenizer.encode("ab").ids
    alone, after = TextStream(tokenizer.decode, []), TextStream(tokenizer.decode, prompt)
    alone.feed(word)
    after.feed(word)
    assert (alone.text, after.text) == ("ab", " ab")
