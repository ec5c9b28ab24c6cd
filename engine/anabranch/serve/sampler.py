"""From logits to tokens, each request by its own rules and its own random numbers.

Order of work, as in vLLM: logprobs of the untouched logits; allowed tokens, bias, minimum length, penalties, structured
output; then the largest logit for greedy requests, and for the others temperature, min_p, top_k, top_p and one draw.
A token that one of them forbids has the logit -inf, which none of the others can raise.

A draw takes one float64 uniform from the request's own generator (on the CPU, whatever the device) and inverts the
cumulative distribution in the order of the vocabulary. Every step works on rows alone, so a request's tokens do not
depend on its batch.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anabranch.serve.choose import NO_TOKEN, argmax, choose
from anabranch.serve.grammar import Matcher
from anabranch.serve.request import SamplingParams

DEAD_END = (
    "no token may follow: what the form of the output allows is forbidden by allowed_token_ids or min_tokens, or the "
    "tokenizer cannot write it"
)
UNIFORMS = 64  # drawn at once: a call costs 5 us, however many it draws
Candidate = tuple[int, float, int]  # token, natural logarithm of its probability, rank from 1


class Seen:
    """Distinct tokens of a request's prompt and output, and how often each is in the output."""

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self.size = len(distinct)
        self.ids = np.fromiter(distinct, np.int64, self.size)
        self.counts = np.zeros(self.size, np.float32)
        self._index = {token: index for index, token in enumerate(distinct)}

    def add(self, token: int) -> None:
        index = self._index.setdefault(token, self.size)
        if index == self.size:
            if self.size == len(self.ids):
                self.ids = np.concatenate([self.ids, np.zeros_like(self.ids)])
                self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
            self.ids[index] = token
            self.size += 1
        self.counts[index] += 1


class Draw:
    """One sample's rules and state: its generator, what it has seen, how many tokens it has, its place in a grammar."""

    __slots__ = ("_generator", "_seed", "_uniforms", "matcher", "params", "produced", "seen", "stop_ids")

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        seed: int,
        matcher: Matcher | None = None,
    ) -> None:
        self.params = params
        self.matcher = matcher
        self.stop_ids = list(stop_ids)
        self.produced = 0
        self.seen = Seen(prompt) if _penalised(params) else None
        self._seed = seed
        self._generator: torch.Generator | None = None  # 5 KB each: not made for requests that only wait
        self._uniforms: list[float] = []

    def uniform(self) -> float:
        """The generator's next number in [0, 1), float64."""
        if not self._uniforms:
            if self._generator is None:
                self._generator = torch.Generator().manual_seed(self._seed)
            block = torch.rand(UNIFORMS, dtype=torch.float64, generator=self._generator)
            self._uniforms = block.tolist()[::-1]
        return self._uniforms.pop()


def _penalised(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1.0, 0.0, 0.0)


class Sampler:
    """Chooses the next token of every row. Remembers the tensors made from the last batch's parameters."""

    def __init__(self) -> None:
        self._plan: Plan | None = None

    def __call__(self, logits: Tensor, draws: list[Draw]) -> tuple[list[int], dict[int, list[Candidate]]]:
        """logits [n, vocab] float32, overwritten; one Draw per row, which moves on by one token.

        Returns a token per row (NO_TOKEN if a row has no distribution, or its matcher a problem) and, for the rows that
        ask for logprobs, the chosen token and then the most probable ones.
        """
        plan = self._plan
        if plan is None or plan.draws != draws:
            plan = self._plan = Plan(draws, logits)
        if plan.plain:
            return argmax(logits), {}
        raw = logits[plan.logged] if plan.logged else None
        plan.edit(logits)
        tokens = argmax(logits) if len(plan.random) < len(draws) else [NO_TOKEN] * len(draws)
        for row, token in zip(plan.random, plan.draw(logits), strict=True):
            tokens[row] = token
        if plan.structured:
            plan.follow(logits, tokens)
        for row in plan.counting:
            draws[row].produced += 1
            seen = draws[row].seen
            if seen is not None:
                seen.add(tokens[row])
        if raw is None:
            return tokens, {}
        chosen = [max(tokens[row], 0) for row in plan.logged]
        counts = [draws[row].params.logprobs or 0 for row in plan.logged]
        return tokens, dict(zip(plan.logged, top_logprobs(raw, chosen, counts), strict=True))


class Plan:
    """What a batch needs, and its parameters as tensors; made again only when the batch changes."""

    def __init__(self, draws: list[Draw], logits: Tensor) -> None:
        self.draws = list(draws)
        params = [draw.params for draw in draws]
        rows = range(len(draws))
        self.logged = [row for row in rows if params[row].logprobs is not None]
        self.random = [row for row in rows if not params[row].greedy]
        self.penalised = [row for row in rows if draws[row].seen is not None]
        self.delayed = [row for row in rows if params[row].min_tokens > 0 and draws[row].stop_ids]
        self.counting = sorted({*self.penalised, *self.delayed})
        self.structured = [(row, matcher) for row in rows if (matcher := draws[row].matcher) is not None]
        biases = [(row, token, bias) for row in rows for token, bias in (params[row].logit_bias or {}).items()]
        limited = [row for row in rows if params[row].allowed_token_ids is not None]
        self.plain = not (self.logged or self.random or self.counting or biases or limited or self.structured)

        def make(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        def column(name: str, chosen: list[int]) -> Tensor:
            return make([getattr(params[row], name) for row in chosen])[:, None]

        self.bias = None
        if biases:
            where_row, where_token, values = zip(*biases, strict=True)
            self.bias = make(where_row, torch.int64), make(where_token, torch.int64), make(values)
        self.forbidden = None
        if limited:
            self.forbidden = torch.ones(len(limited), logits.shape[1], dtype=torch.bool, device=logits.device)
            for index, row in enumerate(limited):
                self.forbidden[index, list(params[row].allowed_token_ids or ())] = False
            self.limited = make(limited, torch.int64)
        if self.structured:
            self.constrained = make([row for row, _ in self.structured], torch.int64)
        if self.penalised:
            self.repetition = column("repetition_penalty", self.penalised)
            self.frequency = column("frequency_penalty", self.penalised)
            self.presence = column("presence_penalty", self.penalised)
        if self.random:
            self.temperature = column("temperature", self.random)
            self.rules = [params[row] for row in self.random]

    def edit(self, logits: Tensor) -> None:
        """Change the logits in place: allowed tokens, bias, minimum length, penalties, structured output."""
        if self.forbidden is not None:
            logits[self.limited] = logits[self.limited].masked_fill(self.forbidden, -math.inf)
        if self.bias is not None:
            where_row, where_token, values = self.bias
            logits.index_put_((where_row, where_token), values, accumulate=True)
        for row in self.delayed:
            if self.draws[row].produced < self.draws[row].params.min_tokens:
                logits[row, self.draws[row].stop_ids] = -math.inf
        if self.penalised:
            self._penalise(logits)
        if self.structured:
            self._constrain(logits)

    def _penalise(self, logits: Tensor) -> None:
        seen = [draw.seen for row in self.penalised if (draw := self.draws[row]).seen is not None]
        width = max(s.size for s in seen)
        ids = np.empty((len(seen), width), np.int64)
        counts = np.empty((len(seen), width), np.float32)
        for index, s in enumerate(seen):
            ids[index, : s.size], counts[index, : s.size] = s.ids[: s.size], s.counts[: s.size]
            ids[index, s.size :], counts[index, s.size :] = s.ids[0], s.counts[0]  # written twice, the same both times
        where = torch.tensor(self.penalised, device=logits.device)[:, None], torch.from_numpy(ids).to(logits.device)
        times = torch.from_numpy(counts).to(logits.device)
        values = logits[where]
        values = torch.where(values > 0, values / self.repetition, values * self.repetition)
        logits[where] = values - self.frequency * times - self.presence * (times > 0)

    def _constrain(self, logits: Tensor) -> None:
        bits = np.zeros((len(self.structured), max(matcher.row_bytes for _, matcher in self.structured)), np.uint8)
        for index, (row, matcher) in enumerate(self.structured):  # on a GPU, while the model still computes
            matcher.fill(bits[index], self.draws[row].stop_ids)
        highest = ceilings(bits, logits.shape[1], logits.device)
        if len(self.structured) == len(self.draws):
            torch.minimum(logits, highest, out=logits)
        else:
            logits[self.constrained] = logits[self.constrained].minimum(highest)

    def follow(self, logits: Tensor, tokens: list[int]) -> None:
        """Move the matchers on by the chosen tokens, and take back a token that was chosen where all are forbidden."""
        chosen = torch.tensor([max(tokens[row], 0) for row, _ in self.structured], device=logits.device)
        scores = logits[self.constrained, chosen].tolist()
        for (row, matcher), score in zip(self.structured, scores, strict=True):
            if tokens[row] == NO_TOKEN:
                if bool((logits[row] == -math.inf).all()):  # otherwise a NaN: not the grammar's fault
                    matcher.stop(DEAD_END)
            elif score == -math.inf:
                matcher.stop(DEAD_END)
            elif tokens[row] not in self.draws[row].stop_ids:
                matcher.accept(tokens[row])
            if matcher.problem is not None:
                tokens[row] = NO_TOKEN

    def draw(self, logits: Tensor) -> list[int]:
        """One token for each random row."""
        if not self.random:
            return []
        return choose(self.probabilities(logits), self.rules, [self.draws[row].uniform() for row in self.random])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of the random rows, at their temperatures: [m, V]."""
        mine = logits if len(self.random) == len(self.draws) else logits[self.random]
        return (mine / self.temperature).softmax(-1)


def ceilings(bits: NDArray[np.uint8], count: int, device: torch.device) -> Tensor:
    """inf where a bit is 1, -inf where it is 0: bits [m, bytes], lowest first -> [m, count] float32.

    The smaller of a logit and its ceiling, for a row of 50 000 with every other token forbidden at random, takes 30 us
    with the making of the ceiling; masked_fill, which branches, takes 170 us.
    """
    if device.type == "cpu":  # NumPy's is vectorised: 5 us against 140 us
        unpacked = torch.from_numpy(np.unpackbits(bits, axis=1, count=count, bitorder="little"))
    else:
        unpacked = unpack(torch.from_numpy(bits).to(device), count)
    return (unpacked.float() - 0.5) * math.inf


def unpack(bits: Tensor, count: int) -> Tensor:
    """np.unpackbits of each row's first `count` bits, lowest first, on the tensor's device: [m, count] bool."""
    powers = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] & powers) != 0).flatten(1)[:, :count]


def top_logprobs(logits: Tensor, chosen: list[int], counts: list[int]) -> list[list[Candidate]]:
    """For each row of logits [m, V] the chosen token, then the `counts` most probable ones (-1 for all).

    A rank counts the tokens that are at least as probable. The chosen token is not repeated.
    """
    V = logits.shape[1]
    counts = [V if count == -1 else min(count, V) for count in counts]
    logprobs = logits.log_softmax(-1)
    mine = logprobs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])
    ranks = (logprobs >= mine).sum(-1).tolist()
    values, ids = (x.tolist() for x in logprobs.topk(max(counts)))
    return [
        [(token, own, rank)]
        + [(ids[row][i], values[row][i], i + 1) for i in range(counts[row]) if ids[row][i] != token]
        for row, (token, own, rank) in enumerate(zip(chosen, mine[:, 0].tolist(), ranks, strict=True))
    ]
