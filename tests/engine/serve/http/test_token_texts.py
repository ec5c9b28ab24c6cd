"""Tokens put together give their text, whatever kind of vocabulary cut it up."""

from string import ascii_lowercase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from anabranch.serve.http.token_texts import TokenTexts

CORPUS = ["the quick brown fox", "über den Fluß", "日本語のテキスト", "a  b   c", "👍🏽 ok"] * 4


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback():
    """As Llama 2's: words begin with U+2581, and what has no piece of its own is spelled in bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "the", *ascii_lowercase]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocab |= {"th": len(vocab)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(make):
    tokenizer = make()
    texts = TokenTexts(tokenizer)

    common, rare = st.sampled_from("the fox ü日👍🏽 \n"), st.characters(codec="utf-8", exclude_characters="▁")

    @given(st.text(common | rare, min_size=1))
    def check(text):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        whole = b"".join(texts.bytes_of(token) for token in ids)
        assert whole in (text.encode(), b" " + text.encode())  # Llama 2's words begin with a space, also the first

    check()


def test_a_word_keeps_its_space_and_a_part_of_a_character_its_bytes():
    tokenizer = byte_fallback()
    texts = TokenTexts(tokenizer)
    word, euro = tokenizer.token_to_id("▁the"), tokenizer.encode("€", add_special_tokens=False).ids[1:]
    assert (texts.name(word), texts.bytes_of(word)) == (" the", b" the")
    assert [texts.name(token) for token in euro] == ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert texts.special == {tokenizer.token_to_id("<s>")}


def test_names_tell_tokens_of_a_byte_model_apart():
    tokenizer = byte_level()
    texts = TokenTexts(tokenizer)
    names = [texts.name(token) for token in range(tokenizer.get_vocab_size())]
    assert len(set(names)) == len(names)


def test_without_a_tokenizer_ids_are_names():
    texts = TokenTexts(None)
    assert (texts.name(7), texts.bytes_of(7)) == ("token_id:7", b"")
