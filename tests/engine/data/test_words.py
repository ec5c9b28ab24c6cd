"""Words become the same numbers everywhere."""

import zlib

from hypothesis import given
from hypothesis import strategies as st

from anabranch.data.words import LONGEST, WORDS, word_ids


def test_case_and_marks_do_not_matter_and_ends_are_zero():
    ids = word_ids(["I can't pay!", "i CAN'T... (pay)", "pay", ""])
    assert ids.tolist()[0] == ids.tolist()[1]
    assert ids.shape == (4, 3)
    assert ids[2].tolist() == [ids[0, 2], 0, 0]
    assert ids[3].tolist() == [0, 0, 0]
    assert ids[2, 0] == 1 + zlib.crc32(b"pay") % (WORDS - 1)


def test_only_the_first_words_count():
    assert word_ids(["word " * 100]).shape == (1, LONGEST)
    assert word_ids(["a b c d"], longest=2).tolist() == word_ids(["a b"]).tolist()


@given(st.lists(st.text(max_size=30), max_size=5))
def test_any_text_has_numbers(texts):
    ids = word_ids(texts)
    assert len(ids) == len(texts)
    assert bool(((ids >= 0) & (ids < WORDS)).all())
