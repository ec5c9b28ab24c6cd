"""The tokenizer of a byte model, as files that transformers.AutoTokenizer loads.

Byte-level BPE without merges: byte b is token b, so any text in UTF-8 comes back as it was. The vocabulary is
spelled in GPT-2's alphabet, which gives each byte a printable character.
"""

import json
from pathlib import Path
from typing import Any

from anabranch.common.byte_alphabet import byte_alphabet
from anabranch.train.corpus import BOS, EOS

BOS_TEXT, EOS_TEXT = "<|begin|>", "<|end|>"


def write_tokenizer(folder: Path, *, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json of the byte tokenizer into a folder."""
    _write(folder / "tokenizer.json", _tokenizer())
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS_TEXT,
            "eos_token": EOS_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        },
    )


def _tokenizer() -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in ((BOS, BOS_TEXT), (EOS, EOS_TEXT))],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(byte_alphabet())},
            "merges": [],
        },
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
