"""Tokenizers of model folders, by transformers; only those it runs on the `tokenizers` library."""

from pathlib import Path
from typing import Any

SOURCES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")  # what it can convert


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's tokenizer (a `PreTrainedTokenizerFast`), or None if it has none.

    A `tokenizer.json` is taken as it is; AutoTokenizer, which imports every model it knows (seconds), is only asked to
    convert older formats.
    """
    if (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    if not any((folder / name).is_file() for name in SOURCES):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) does not run on the tokenizers library; save it "
            "once as tokenizer.json"
        )
    return tokenizer
