"""GPT-2's alphabet of bytes."""

from anabranch.common.byte_alphabet import byte_alphabet


def test_the_alphabet_is_gpt2s():
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert (alphabet[ord("a")], alphabet[ord(" ")], alphabet[ord("\n")], alphabet[0]) == ("a", "Ġ", "Ċ", "Ā")
