"""From a structured output to the tokens that may come next, by llguidance. Everything here runs on the CPU.

    Grammars   of an engine: its vocabulary as bytes, and the specifications compiled last
    Grammar    one compiled specification; it never changes, so any thread may take matchers from it
    Matcher    one sample's place in a grammar: fills a row of bits, one per token, and moves on with the chosen token

The end of a grammar is a token of its own that no model has. So the model's end tokens are never text, and a row allows
them (and the request's stop_token_ids) exactly when the grammar may end.

Compiling a specification from outside is bounded by its length and by LEXER_FUEL, without which the first step of
(((a{1000}){1000}){1000}) took 1.5 s and 300 MB: with it, 60 ms. The first row is part of compiling, for much of the
work is only done then; no compiled state is shared between samples, so one cannot use up another's limits.
"""

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.serve.structured import Kind, StructuredOutput

END = "<|end of grammar|>"
WHITESPACE = r"( |\n[ \t]{0,16})"  # between tokens of JSON: any amount would let a model go on for ever
LEXER_FUEL = 100_000
LEXER_STATES = 50_000  # of one sample, at 1 to 2 KB
KEPT = 32  # compiled specifications of an engine
MESSAGE = 400  # characters of the compiler's message that are shown


class Grammars:
    """Compiles specifications for one tokenizer and remembers the last KEPT of them. Threads may share it.

    tokenizer   a `tokenizers.Tokenizer`; only its `to_str` is used
    vocab_size  of the model's scores, which may have more or fewer columns than the tokenizer has tokens
    end_ids     the model's end tokens
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = tuple(end_ids)
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[tuple[Kind, str], Grammar] = OrderedDict()
        self._building, self._lock = Lock(), Lock()

    def compile(self, structured: StructuredOutput) -> "Grammar":
        """The grammar of a specification. ValueError if there is none, ImportError without llguidance.

        Milliseconds the first time, and for the slowest known (2200 properties, none required) 0.6 s, in which other
        threads go on. The very first call also reads the vocabulary: 0.4 s for 50 000 tokens, in which they wait.
        """
        source = structured.source
        with self._lock:
            if source in self._compiled:
                self._compiled.move_to_end(source)
                return self._compiled[source]
        with self._building:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self._tokenizer, self._vocab_size, self._end_ids)
        grammar = Grammar(self._vocabulary, *source)
        with self._lock:
            self._compiled[source] = grammar
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return grammar


class Vocabulary:
    """A tokenizer's tokens as bytes, for llguidance, and the ids that are never text."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Sequence[int]) -> None:
        llguidance = _llguidance()
        from tokenizers import Tokenizer

        extended = Tokenizer.from_str(tokenizer.to_str())
        extended.add_special_tokens([END])
        end = extended.token_to_id(END)
        assert end is not None  # it was just added
        self.table = llguidance.LLTokenizer(extended.to_str(), eos_token=[end])
        self.never_text = (*end_ids, end)
        self.filled_bytes = _words(self.table.vocab_size)  # what llguidance writes, in words of 4 bytes
        self.row_bytes = max(self.filled_bytes, _words(vocab_size))


class Grammar:
    """A compiled specification."""

    def __init__(self, vocabulary: Vocabulary, kind: Kind, text: str) -> None:
        llguidance = _llguidance()
        limits = llguidance.LLParserLimits(
            initial_lexer_fuel=LEXER_FUEL, max_lexer_states=LEXER_STATES, verbose_errors=False
        )
        self.vocabulary = vocabulary
        self._start = llguidance.LLMatcher(vocabulary.table, _source(kind, text), log_level=0, limits=limits)
        if not self._start.is_error():
            first = Matcher(self, self._start)
            row = np.zeros(vocabulary.row_bytes, np.uint8)
            first.fill(row, ())
            if first.problem is None and not row.any():
                raise ValueError(f"this {kind} allows no text that is not empty")
        if self._start.is_error():
            raise ValueError(f"this {kind} cannot be used: {_message(self._start)}")

    def matcher(self) -> "Matcher":
        """A new sample's place, at the start."""
        return Matcher(self, None)

    def start(self) -> Any:
        """A state of llguidance's, to be advanced by one sample."""
        return self._start.deep_copy()


class Matcher:
    """One sample's place in a grammar. `problem` says what went wrong, if anything did."""

    __slots__ = ("_grammar", "_state", "problem")

    def __init__(self, grammar: Grammar, state: Any | None) -> None:
        self._grammar = grammar
        self._state: Any = state  # None until the sample first runs: many may wait
        self.problem: str | None = None

    @property
    def row_bytes(self) -> int:
        return self._grammar.vocabulary.row_bytes

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return self._state is not None and bool(self._state.is_stopped())

    def fill(self, row: NDArray[np.uint8], stop_ids: Iterable[int]) -> None:
        """Set bit i % 8 of byte i // 8 for each token i that may come next; row [row_bytes] comes as zeros.

        stop_ids are among them when the grammar may end. With a problem nothing is.
        """
        if self._state is None:
            self._state = self._grammar.start()
        vocabulary = self._grammar.vocabulary
        self._state.unsafe_compute_mask_ptr(row.ctypes.data, vocabulary.filled_bytes)
        if self._state.is_error():
            self.stop(f"the structured output cannot go on: {_message(self._state)}")
            row[:] = 0
            return
        for token in vocabulary.never_text:
            row[token >> 3] &= ~np.uint8(1 << (token & 7))
        if self._state.is_accepting():
            for token in stop_ids:
                row[token >> 3] |= np.uint8(1 << (token & 7))

    def accept(self, token: int) -> None:
        """Move on by a token that the last row allowed."""
        if not self._state.consume_token(token):
            self.stop(f"the structured output cannot go on: {_message(self._state)}")

    def stop(self, problem: str) -> None:
        """Say what went wrong, unless something already has."""
        self.problem = self.problem or problem


def _words(bits: int) -> int:
    """Bytes of so many bits, a multiple of 4."""
    return (bits + 31) // 32 * 4


def _source(kind: Kind, text: str) -> str:
    """The specification as llguidance reads it."""
    matcher = _llguidance().LLMatcher
    if kind == "json_schema":
        return str(matcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE}))
    if kind == "regex":
        return str(matcher.grammar_from_regex(text))
    if kind == "choice":  # an upper-case name is one lexeme: as rules, more than 2000 alternatives are refused
        text = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(one) for one in json.loads(text))
    return json.dumps({"grammars": [{"lark_grammar": text}]})  # a text that is JSON would be taken for such a list


def _message(matcher: Any) -> str:
    text = " ".join(str(matcher.get_error()).replace("<non-verbose/>", "").split())
    if text == "NoExtensionBias":
        return "no token can follow"
    return text if len(text) <= MESSAGE else text[:MESSAGE] + " …"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError("structured output needs llguidance: pip install 'anabranch[structured]'") from None
    return llguidance
