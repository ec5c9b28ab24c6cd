import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from anabranch.serve.choose import NO_TOKEN, argmax, choose_batch, choose_rows
from anabranch.serve.request import SamplingParams
from anabranch.serve.sampler import Draw, Plan, Sampler, top_logprobs


def draw(params, prompt=(0,), stop_ids=(), seed=0, output=()):
    made = Draw(params, list(prompt), list(stop_ids), seed)
    for token in output:
        made.produced += 1
        if made.seen is not None:
            made.seen.add(token)
    return made


GRID = (np.arange(400) + 0.5) / 400
VERSIONS = [choose_rows, choose_batch]


def chosen_at(version, logits, draws, uniforms):
    """The token of each row at each uniform number: an int array [rows, uniforms]."""
    plan = Plan(draws, logits)
    logits = logits.clone()
    plan.edit(logits)
    p = plan.probabilities(logits)
    repeated = p.repeat_interleave(len(uniforms), 0)
    rules = [d.params for d in draws for _ in uniforms]
    return np.array(version(repeated, rules, list(uniforms) * len(draws))).reshape(len(draws), -1)


def agrees(tokens, want, uniforms, slack=1e-5):
    """Whether the tokens chosen at these uniform numbers invert `want`, up to numbers this close to a boundary."""
    ends = want.cumsum()
    expected = ends.searchsorted(np.asarray(uniforms), "right")
    clear = np.abs(ends[:, None] - uniforms).min(0) > slack  # float32 softmax
    return bool((tokens == expected)[clear].all() and (want[tokens] > 0).all())


def brute_force(logits, params, prompt, output):
    """The distribution of one row, in float64 and Python, straight from the definitions."""
    z = [float(x) for x in logits]
    if params.allowed_token_ids is not None:
        z = [x if token in params.allowed_token_ids else -math.inf for token, x in enumerate(z)]
    for token, bias in (params.logit_bias or {}).items():
        z[token] += bias
    for token in set(prompt) | set(output):
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token in set(output):
        z[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    z = np.array(z) / params.temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        p[p < p[order[min(params.top_k, len(p)) - 1]]] = 0
    p /= p.sum()
    if params.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        last = order[before < params.top_p][-1]
        p[p < p[last]] = 0
    return p / p.sum()


tokens = st.lists(st.integers(0, 39), max_size=12)


@st.composite
def rules(draw_from):
    return SamplingParams(
        temperature=draw_from(st.floats(0.1, 3)),
        top_k=draw_from(st.sampled_from([0, -1, 1, 2, 5, 39, 40, 1000])),
        top_p=draw_from(st.sampled_from([1.0, 0.05, 0.3, 0.5, 0.9, 0.999])),
        min_p=draw_from(st.sampled_from([0.0, 0.0, 0.01, 0.2, 1.0])),
        repetition_penalty=draw_from(st.sampled_from([1.0, 1.3, 0.7])),
        frequency_penalty=draw_from(st.sampled_from([0.0, 0.5, -1.0])),
        presence_penalty=draw_from(st.sampled_from([0.0, 0.25, -2.0])),
        logit_bias=draw_from(st.none() | st.dictionaries(st.integers(0, 39), st.floats(-5, 5), max_size=4)),
        allowed_token_ids=draw_from(st.none() | st.lists(st.integers(0, 39), min_size=1, max_size=8)),
    )


def nudged(params, factor):
    return replace(params, top_p=min(1.0, params.top_p * factor), min_p=min(1.0, params.min_p * factor))


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(rules(), tokens.filter(len), tokens), min_size=1, max_size=4), st.integers(0, 10**6))
def test_every_row_has_the_distribution_of_its_own_rules(version, cases, seed):
    logits = 2 * torch.randn(len(cases), 40, generator=torch.Generator().manual_seed(seed))
    draws = [draw(params, prompt, (), 0, output) for params, prompt, output in cases]
    got = chosen_at(version, logits, draws, GRID)
    for row, (params, prompt, output) in enumerate(cases):
        # float32 softmax: a threshold of top_p or min_p may fall between two roundings of one probability
        near = [brute_force(logits[row], nudged(params, 1 + by), prompt, output) for by in (0, -1e-6, 1e-6)]
        assert any(agrees(got[row], want, GRID) for want in near)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 0.9999])
def test_wide_and_narrow_nuclei(version, spread, top_p):
    logits = spread * torch.randn(1, 2000, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(top_p=top_p)
    got = chosen_at(version, logits, [draw(params)], GRID)
    near = [brute_force(logits[0], nudged(params, 1 + by), (), ()) for by in (0, -1e-6, 1e-6)]
    assert any(agrees(got[0], want, GRID) for want in near)


@pytest.mark.parametrize("version", VERSIONS)
def test_ties_at_the_edge_are_kept_whatever_their_order(version):
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.6)):
        assert set(chosen_at(version, logits, [draw(params)], GRID)[0]) == {0, 1, 2, 4}


CASES = {
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=2.0),
    "top-k": SamplingParams(top_k=5),
    "top-p": SamplingParams(top_p=0.7),
    "min-p": SamplingParams(min_p=0.1),
    "all": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, presence_penalty=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_follow_the_distribution(name):
    params, N, V = CASES[name], 10_000, 1300  # enough for segments, the last one not full
    logits = 1.5 * torch.randn(V, generator=torch.Generator().manual_seed(2))
    want = brute_force(logits, params, [1], ())
    draws = [draw(params, [1], seed=seed) for seed in range(N)]
    got = np.bincount(Sampler()(logits.expand(N, V).clone(), draws)[0], minlength=V)
    assert got[want == 0].sum() == 0
    common = want * N >= 5
    rest = [got[~common].sum()], [max(want[~common].sum() * N, 1e-9)]
    observed, expected = np.append(got[common], rest[0]), np.append(want[common] * N, rest[1])
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01  # fixed seeds: no flake


def test_successive_draws_of_one_generator_are_independent():
    logits, V, N = torch.zeros(1, 4), 4, 6_000
    one, sampler = [draw(SamplingParams(), seed=7)], Sampler()
    series = [sampler(logits.clone(), one)[0][0] for _ in range(N)]
    pairs = np.bincount([V * a + b for a, b in zip(series[::2], series[1::2], strict=True)], minlength=V * V)
    assert chisquare(pairs).pvalue > 0.01


@settings(max_examples=25, deadline=None)
@given(st.lists(rules(), min_size=1, max_size=6), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_a_requests_tokens_do_not_depend_on_its_batch(params, seed, order):
    V, steps = 40, 6
    logits = 2 * torch.randn(steps, len(params), V, generator=torch.Generator().manual_seed(seed))

    def alone(row):
        sampler, one = Sampler(), [draw(params[row], [row], seed=row)]
        return [sampler(logits[step, row : row + 1].clone(), one)[0][0] for step in range(steps)]

    draws = [draw(p, [row], seed=row) for row, p in enumerate(params)]
    together, sampler = [[] for _ in params], Sampler()
    for step in range(steps):  # the batch is shuffled and thinned at every step; who is left out catches up alone
        rows = order.sample(range(len(params)), len(params))
        cut = order.randrange(1, len(rows) + 1)
        for group in (rows[:cut], *([row] for row in rows[cut:])):
            found, _ = sampler(logits[step, group].clone(), [draws[row] for row in group])
            for row, token in zip(group, found, strict=True):
                together[row].append(token)
    assert together == [alone(row) for row in range(len(params))]


def test_greedy_takes_the_first_largest_and_edits_apply():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    sampler = Sampler()
    for params, want in (
        (SamplingParams(temperature=0), 1),
        (SamplingParams(temperature=1e-6), 1),
        (SamplingParams(temperature=0, logit_bias={3: 2.5}), 3),
        (SamplingParams(temperature=0, allowed_token_ids=[0, 3]), 3),
        (SamplingParams(temperature=0, repetition_penalty=4.0), 2),  # token 1 is in the prompt
    ):
        assert sampler(logits.clone(), [draw(params, [1])])[0] == [want]


def test_penalties_follow_the_output():
    logits = torch.tensor([[0.0, 3.0, 2.5, 1.0]])
    sampler = Sampler()
    frequency = [draw(SamplingParams(temperature=0, frequency_penalty=1.0), [1])]
    assert [sampler(logits.clone(), frequency)[0][0] for _ in range(6)] == [1, 2, 1, 2, 1, 3]
    presence = [draw(SamplingParams(temperature=0, presence_penalty=1.0), [1])]
    assert [sampler(logits.clone(), presence)[0][0] for _ in range(4)] == [1, 2, 1, 1]


def test_no_stop_before_the_minimum():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    one, sampler = [draw(SamplingParams(temperature=0, min_tokens=2), stop_ids=[1, 2])], Sampler()
    assert [sampler(logits.clone(), one)[0][0] for _ in range(3)] == [3, 3, 1]


def test_mixed_batches_keep_rows_apart():
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 5.0], [1.0, 0.0, 0.0]])
    draws = [
        draw(SamplingParams(temperature=0)),
        draw(SamplingParams(top_k=1)),
        draw(SamplingParams(temperature=0, logprobs=1)),
        draw(SamplingParams(allowed_token_ids=[2])),
    ]
    found, logprobs = Sampler()(logits.clone(), draws)
    assert found == [0, 1, 2, 2]
    assert list(logprobs) == [2]


def test_a_row_of_nan_has_no_token_and_harms_no_other():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    logits[1, 3] = logits[2, 4] = math.nan
    draws = [draw(SamplingParams(temperature=0 if row < 2 else 1, seed=row), seed=row) for row in range(4)]
    clean = Sampler()(logits.nan_to_num(0.0), draws)[0]
    again = [draw(d.params, seed=row) for row, d in enumerate(draws)]
    found = Sampler()(logits.clone(), again)[0]
    assert found[1:3] == [NO_TOKEN, NO_TOKEN]
    assert (found[0], found[3]) == (clean[0], clean[3])
    assert argmax(logits)[1:3] == [NO_TOKEN, NO_TOKEN]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("V", [1, 127, 1024, 1025, 1152, 3000])
def test_inversion_hits_both_ends_and_never_a_weight_of_zero(version, V):
    generator = torch.Generator().manual_seed(V)
    p = torch.rand(300, V, generator=generator) * (torch.rand(300, V, generator=generator) < 0.1)
    p[:, V // 2] += 1e-30  # no row is empty
    shares = p.double().cumsum(-1) / p.double().sum(-1, keepdim=True)
    for uniforms in ([0.0] * 300, [1 - 2**-53] * 300, torch.rand(300, generator=generator).double().tolist()):
        for row, token in enumerate(version(p, [SamplingParams()] * 300, uniforms)):
            assert p[row, token] > 0
            assert shares[row, token] >= uniforms[row] - 1e-12
            assert token == 0 or shares[row, token - 1] <= uniforms[row] + 1e-12


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=3, top_p=0.5, min_p=0.1)])
def test_a_row_of_nan_has_no_token(version, params):
    p = torch.tensor([[math.nan] * 5, [0.2] * 5])
    found = version(p, [params] * 2, [0.5, 0.5])
    assert found == [NO_TOKEN, 2]


@pytest.mark.parametrize("count", [0, 1, 5, -1])
def test_logprobs_are_of_the_untouched_distribution(count):
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))
    want = logits.double().log_softmax(-1)
    params = SamplingParams(temperature=0, logprobs=count, logit_bias={7: 100.0})
    found, logprobs = Sampler()(logits.clone(), [draw(params)] * 3)
    assert found == [7, 7, 7]
    for row in range(3):
        (token, value, rank), *rest = logprobs[row]
        assert token == 7
        assert value == pytest.approx(want[row, 7].item(), abs=1e-6)
        assert rank == int((logits[row] >= logits[row, 7]).sum())
        order = want[row].argsort(descending=True).tolist()[: 12 if count == -1 else count]
        assert [t for t, _, _ in rest] == [t for t in order if t != 7]
        for t, value, rank in rest:
            assert value == pytest.approx(want[row, t].item(), abs=1e-6)
            assert rank == order.index(t) + 1


def test_top_logprobs_with_different_counts():
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    first, second = top_logprobs(logits, [0, 0], [2, 0])
    assert [token for token, _, _ in first] == [0, 2, 1]
    assert [(token, rank) for token, _, rank in second] == [(0, 1)]
