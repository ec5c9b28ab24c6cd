"""Texts as numbers of words, without a vocabulary to learn or to store.

A word's number is its CRC-32 modulo the size of the table, so it is the same on every machine, for clients that never
saw each other's texts, and for words that nobody has seen. Words that share a number (of 2381 in BANKING77 44 % do) are
told apart by the words around them. Number 0 is "no word".
"""

import re
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.data.labelled import Labelled, split

WORDS = 4096  # numbers, 0 included
LONGEST = 64  # words of a text that count
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def word_ids(texts: Sequence[str], *, longest: int = LONGEST) -> Tensor:
    """[M, L] int64: numbers of the first words of each text in lower case, 0 beyond its end; L of the longest."""
    numbers = [[_number(word) for word in _WORD.findall(text.lower())[:longest]] for text in texts]
    ids = torch.zeros(len(texts), max(1, *map(len, numbers), 1), dtype=torch.int64)
    for row, one in zip(ids, numbers, strict=True):
        row[: len(one)] = torch.tensor(one, dtype=torch.int64)
    return ids


def labelled_texts(name: str, texts: Sequence[str], labels: Tensor, count: int, names: Sequence[str]) -> Labelled:
    """Texts of which the first `count` are to learn from; for 0, a quarter is the test."""
    ids = word_ids(texts)
    if not count:
        return Labelled(name=name, kind="text", **split(ids, labels)._asdict(), names=names)
    (x, test_x), (y, test_y) = ids.tensor_split([count]), labels.tensor_split([count])
    return Labelled(name=name, kind="text", x=x, y=y, test_x=test_x, test_y=test_y, names=names)


def _number(word: str) -> int:
    return 1 + zlib.crc32(word.encode()) % (WORDS - 1)
