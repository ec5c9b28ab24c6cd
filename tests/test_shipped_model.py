"""The model in the package: small, whole, and good at Python it has never seen."""

import json
import random
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from anabranch.data.stream import held_out_windows
from anabranch.models.transformer import DenseAttend, Transformer
from anabranch.models.weights import load_model
from anabranch.train.corpus import BOS, EOS, VOCAB_SIZE
from anabranch.train.lm import bits_per_byte

FOLDER = Path(str(files("anabranch"))) / "assets" / "pystdlib-diffqkv"

# Written for this test: library-like Python that is in no one's standard library.
UNSEEN = b'''"""Counting of pebbles in buckets."""

import os
import sys
from collections import OrderedDict

__all__ = ["PebbleCounter", "count_pebbles"]


class PebbleCounter(object):
    """Count the pebbles that were put into each bucket.

    The optional argument names is a list of strings.
    """

    def __init__(self, names=None, default=0):
        if names is None:
            names = []
        self.names = names
        self.default = default
        self._counts = OrderedDict()

    def add(self, name, value=1):
        """Add value pebbles to the bucket called name."""
        if not isinstance(name, str):
            raise TypeError("name must be a string, not %r" % type(name))
        try:
            self._counts[name] += value
        except KeyError:
            self._counts[name] = self.default + value
        return self._counts[name]

    def __len__(self):
        return len(self._counts)


def count_pebbles(path, encoding="utf-8"):
    """Return a counter for the file at path."""
    result = PebbleCounter()
    with open(path, "r", encoding=encoding) as f:
        for line in f:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            result.add(line)
    return result


if __name__ == "__main__":
    for arg in sys.argv[1:]:
        print(os.path.basename(arg), len(count_pebbles(arg)))
'''


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load_model(FOLDER, dtype=torch.float32)


def bits(model: Transformer, text: bytes) -> float:
    """Bits per byte of a text as a file of its own."""
    return bits_per_byte(model, *held_out_windows(torch.tensor([BOS, *text]), model.config.max_position))


def greedy(model: Transformer, prompt: str, n: int) -> str:
    tokens = list(prompt.encode())
    with torch.no_grad():
        for _ in range(n):
            hidden = model(torch.tensor(tokens), torch.arange(len(tokens)), DenseAttend(1))
            tokens.append(int(model.logits(hidden[-1:])[0, :256].argmax()))
    return bytes(tokens[len(prompt.encode()) :]).decode(errors="replace")


def test_the_weights_fit_into_four_megabytes():
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_500_000


def test_it_is_a_diffqkv_model_of_bytes(model):
    config = model.config
    assert config.family == "sigma"
    assert config.k_heads < config.v_heads < config.q_heads
    assert config.q_intermediate_size is not None
    assert (config.vocab_size, config.bos_id, config.eos_ids) == (VOCAB_SIZE, BOS, (EOS,))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_its_tokenizer_gives_bytes():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert tokenizer("def f():\n    é")["input_ids"] == list("def f():\n    é".encode())


def test_its_report_names_text_recipe_and_result():
    report = json.loads((FOLDER / "training.json").read_text())
    assert report["stopped"] is None
    assert report["steps"] == report["recipe"]["steps"]
    assert len(report["corpus"]["sha256"]) == 64
    assert report["command"].startswith("anabranch train-lm --out ")
    log = [json.loads(line) for line in (FOLDER / "loss.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == report["steps"]
    assert (FOLDER / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_rounding_to_bfloat16_cost_nothing_that_shows():
    report = json.loads((FOLDER / "training.json").read_text())
    assert abs(report["stored_bits_per_byte"] - report["held_out_bits_per_byte"]) < 0.01


def test_it_predicts_python_it_has_not_seen(model):
    assert bits(model, UNSEEN) < 1.7  # 1.39 when it was made; zlib needs 3.5, a uniform guess 8


def test_it_prefers_words_in_the_order_of_python(model):
    words = UNSEEN.split(b" ")
    random.Random(0).shuffle(words)
    assert bits(model, b" ".join(words)) > bits(model, UNSEEN) + 0.7  # 2.85 against 1.39 when it was made


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("class Reader:\n    def ", r"\w+\(self.*\):\n {8}\S"),
        ("    raise ", r"[A-Z]\w+(Error|Exception)\("),
        ("try:\n    import ", r"[a-z]\w+\n"),
    ],
)
def test_its_likeliest_continuation_is_python(model, prompt, expected):
    continuation = greedy(model, prompt, 60)
    assert re.match(expected, continuation), continuation
