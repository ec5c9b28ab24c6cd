"""A tokenizer of bytes, as many tests of texts need it."""

from collections.abc import Callable, Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def words() -> Callable[..., PreTrainedTokenizerFast]:
    """`words(template, added=("<|im_end|>",), merges=("Ċh",), bos=True)`: bytes, merged pairs, and special tokens.

    <eos> ends a text. With `bos`, <bos> is put before one, as Llama's tokenizers do.
    """

    def make(
        template: str | None = None, added: Sequence[str] = (), merges: Sequence[str] = (), bos: bool = False
    ) -> PreTrainedTokenizerFast:
        alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *merges]
        pairs = [(merged[0], merged[1]) for merged in merges]
        backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, pairs))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(text, special=True) for text in ("<eos>", "<bos>", *added)])
        if bos:
            begin = [("<bos>", backend.token_to_id("<bos>"))]
            backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=begin)
        made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
        made.chat_template = template
        return made

    return make
