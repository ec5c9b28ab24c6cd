"""Texts of four kinds: they are drawn once, no example stands in two parts, and what is missing is named."""

import gzip
import json

import pytest

from anabranch.tune import texts
from anabranch.tune.texts import CHARACTERS, PARTS, SOURCES, write_texts

WHOLE = sum(PARTS.values())


def lines_of(name, number):
    """One record of a source, as its authors publish it."""
    return {
        "ag-news/test.csv.gz": f'"1","Title {number}","Some ""news"", item {number}"\n',
        "banking77/train.csv.gz": f'"Where is\nmy card {number}?",card_arrival\n',
        "gsm8k/train.jsonl.gz": json.dumps({"question": f"{number} + 1?", "answer": f"#### {number + 1}"}) + "\n",
        "tinyshakespeare/input.txt.gz": f"First Citizen:\nSpeech {number} {'of many words ' * 20}\n\nHo!\n\n",
    }[name]


@pytest.fixture
def folder(tmp_path):
    for name in SOURCES:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True)
        head = "text,category\n" if name.startswith("banking") else ""
        path.write_bytes(gzip.compress((head + "".join(lines_of(name, n) for n in range(WHOLE))).encode()))
    return tmp_path / "data"


def examples(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_kind_has_its_share_of_every_part_and_no_text_stands_in_two(folder, tmp_path):
    write_texts(folder, tmp_path)
    drawn = {part: examples(tmp_path / f"{part}.jsonl") for part in PARTS}
    assert {part: len(some) for part, some in drawn.items()} == {part: 4 * count for part, count in PARTS.items()}
    whole = [text for some in drawn.values() for text in some]
    assert len(set(whole)) == len(whole) == 4 * WHOLE
    assert max(map(len, whole)) == CHARACTERS  # of speeches
    for part, some in drawn.items():
        for kind, sign in enumerate(("Title", "intent: card_arrival", "####", "First Citizen")):
            assert all(sign in text for text in some[kind * PARTS[part] : (kind + 1) * PARTS[part]])


def test_the_same_data_makes_the_same_files(folder, tmp_path):
    for name in ("one", "two"):
        write_texts(folder, tmp_path / name)
    for part in PARTS:
        assert (tmp_path / "one" / f"{part}.jsonl").read_bytes() == (tmp_path / "two" / f"{part}.jsonl").read_bytes()


def test_what_is_missing_is_named(folder, tmp_path):
    (folder / "gsm8k" / "train.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"has no gsm8k/train\.jsonl\.gz"):
        write_texts(folder, tmp_path)


def test_too_few_texts_are_too_few(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PARTS", {**PARTS, "train": PARTS["train"] + 1})
    with pytest.raises(ValueError, match=f"holds {WHOLE} different texts, {WHOLE + 1} are needed"):
        write_texts(folder, tmp_path)


def test_the_real_data_sets_have_enough(data, tmp_path):
    write_texts(data("ag-news").parent, tmp_path)
    assert len(examples(tmp_path / "train.jsonl")) == 4 * PARTS["train"]
