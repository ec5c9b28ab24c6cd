"""Robust rules in the mean's place: what each makes of models written down, and of rounds."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.aggregate.mixes import bucketing
from anabranch.aggregate.settings import MIXES, RULES, AggregateMethod
from anabranch.federated.method import FedAvg, Replies
from anabranch.federated.methods.robust import Robust
from anabranch.federated.rounds import run_round

SIZES = (5, 2, 4)


def cloud(m, D=11, seed=0):
    return torch.randn(m, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def aggregated(robust, models, counts=None, base=None, round=0, sizes=None, clients=None):
    """The model [D] after a round of models [m, D]."""
    m, D = models.shape
    base = torch.zeros(D) if base is None else base
    counts = torch.full((m,), 5) if counts is None else torch.tensor(counts)
    clients = torch.arange(m) if clients is None else torch.tensor(clients)
    lengths = (models - base).double().square().sum(1, keepdim=True)
    replies = Replies(clients, counts, models[:, None], models.mean(0)[None], lengths, {})
    state = {"sizes": torch.tensor(sizes or [D]), "history": torch.zeros(10, D)}
    return robust.aggregate({"model": base[None], **state}, replies, round)["model"][0]


def rule(name, **options):
    extra = {key: options.pop(key) for key in ("weighted", "per_tensor") if key in options}
    return Robust(method=AggregateMethod(rule=name, **options), **extra)


def near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# What is known of results.


def test_trimming_nothing_is_the_mean():
    near(aggregated(rule("trimmed-mean", f=0), cloud(7)), cloud(7).mean(0))
    near(aggregated(rule("distance-trimmed-mean", f=0), cloud(7)), cloud(7).mean(0))


@pytest.mark.parametrize("name", ["coordinate-median", "lower-median", "geometric-median", "medoid", "mean"])
def test_of_one_client_it_is_its_model(name):
    near(aggregated(rule(name), cloud(1), base=cloud(1, seed=9)[0]), cloud(1)[0], atol=1e-6)


@pytest.mark.parametrize("m", [4, 5])
def test_of_the_middle_two_the_mean_or_the_lower(m):
    models = cloud(m, seed=3)
    assert torch.equal(aggregated(rule("lower-median"), models), models.median(0).values)
    near(aggregated(rule("coordinate-median"), models), models.quantile(0.5, 0), atol=1e-6)


@settings(max_examples=12)
@given(st.permutations([-2.0, -1.5, 0.25, 3.0, 10.0]), st.integers(0, 99))
def test_a_geometric_median_of_points_on_a_line_is_their_median(places, seed):
    line, base = cloud(2, seed=seed)
    models = base + torch.tensor(places)[:, None] * line
    near(aggregated(rule("geometric-median"), models, base=base), base + 0.25 * line)


@settings(max_examples=12)
@given(st.integers(0, 99))
def test_where_most_clients_agree_the_geometric_median_is_theirs(seed):
    models = cloud(7, seed=seed)
    models[2:6] = models[1]
    assert torch.equal(aggregated(rule("geometric-median"), models, base=cloud(1, seed=5)[0]), models[1])
    few = aggregated(rule("geometric-median"), models[:4], counts=[30, 1, 1, 1])  # most samples, not most clients
    assert torch.equal(few, models[0])
    assert torch.equal(
        aggregated(rule("geometric-median", weighted=False), models[:4], counts=[30, 1, 1, 1]), models[1]
    )


EQUIVARIANT = {
    "mean": {},
    "geometric-median": {},
    "krum": {"f": 2},
    "distance-trimmed-mean": {"f": 2},
}


@settings(max_examples=12)
@given(st.sampled_from([*EQUIVARIANT, "coordinate-median", "trimmed-mean"]), st.integers(0, 99))
def test_it_moves_with_the_models(name, seed):
    options = EQUIVARIANT.get(name, {"f": 2} if name == "trimmed-mean" else {})
    models, shift = cloud(7, seed=seed), cloud(1, seed=seed + 1)[0]
    near(aggregated(rule(name, **options), models + shift), aggregated(rule(name, **options), models) + shift)


@settings(max_examples=12)
@given(st.sampled_from(sorted(EQUIVARIANT)), st.integers(0, 99))
def test_it_turns_with_the_models(name, seed):
    turn = torch.linalg.qr(cloud(11, seed=seed).double())[0].float()
    models, robust = cloud(7, seed=seed + 1), rule(name, **EQUIVARIANT[name])
    near(aggregated(robust, models @ turn), aggregated(robust, models) @ turn)


@pytest.mark.parametrize("far", [1e2, 1e6])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("geometric-median", {}),
        ("coordinate-median", {}),
        ("lower-median", {}),
        ("trimmed-mean", {"f": 4}),
        ("krum", {"f": 3}),
        ("distance-trimmed-mean", {"f": 4}),
    ],
)
def test_a_minority_cannot_drag_it_away(name, options, far):
    bad = options.get("f", 4)
    models = cloud(9)
    models[:bad] = far
    assert aggregated(rule(name, **options), models).norm() < 8 * cloud(9)[bad:].norm(dim=1).max()
    assert aggregated(rule("mean"), models).norm() > 30


@pytest.mark.parametrize("options", [{"f": 2}, {"f": 0, "neighbours": 8}])
def test_krum_returns_a_model_it_was_sent(options):
    models = cloud(9, seed=4)
    chosen = aggregated(rule("krum", **options), models, base=cloud(1, seed=6)[0])
    apart = (models[:, None].double() - models).square().sum(2).sort(1).values
    scores = apart[:, 1 : 1 + options.get("neighbours", 9 - options["f"] - 2)].sum(1)
    assert torch.equal(chosen, models[scores.argmin()])
    if options["f"] == 0:  # over all others: the one nearest to the mean
        assert torch.equal(chosen, models[(models - models.mean(0)).norm(dim=1).argmin()])


@settings(max_examples=12)
@given(st.sampled_from(["geometric-median", "coordinate-median", "krum", "mean"]), st.integers(0, 99))
def test_each_tensor_alone(name, seed):
    options = {"f": 2} if name == "krum" else {}
    models, base = cloud(7, seed=seed), cloud(1, seed=seed + 1)[0]
    by_tensor = aggregated(rule(name, per_tensor=True, **options), models, base=base, sizes=SIZES)
    alone = [
        aggregated(rule(name, **options), part.contiguous(), base=at)
        for part, at in zip(models.split(SIZES, 1), base.split(SIZES), strict=True)
    ]
    near(by_tensor, torch.cat(alone), atol=1e-6)


def test_what_clients_own_weighs_only_where_the_rule_takes_weights():
    models, counts = cloud(4), [1, 2, 3, 10]
    near(aggregated(rule("mean"), models, counts), torch.tensor(counts) / 16 @ models)
    near(aggregated(rule("mean", weighted=False), models, counts), models.mean(0))
    near(aggregated(rule("coordinate-median"), models, counts), models.quantile(0.5, 0))


def test_buckets_are_drawn_anew_every_round():
    models = cloud(6)
    results = [
        aggregated(rule("coordinate-median", pre=("bucketing",), bucket=2, seed=4), models, round=round)
        for round in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    seed = (4 * 0x9E3779B1 + 1) % 2**32
    rows = bucketing(torch.eye(6, dtype=torch.float64), 2, torch.Generator().manual_seed(seed))
    near(results[2], (rows.float() @ models).median(0).values)


def test_a_trusted_client_is_known_by_its_number():
    models = cloud(4)
    nearest = rule("nearest-neighbours", f=1, own=8)
    order = (models - models[2]).norm(dim=1).argsort()[:3]
    near(aggregated(nearest, models, clients=[1, 5, 8, 9]), models[order].mean(0))
    with pytest.raises(ValueError, match="client 8, whom nearest-neighbours trusts"):
        aggregated(nearest, models, clients=[1, 5, 7, 9])


def test_models_that_are_not_finite_are_named_by_their_clients():
    models = cloud(4)
    models[1, 3] = torch.nan
    with pytest.raises(ValueError, match=r"clients \[5\] are not finite"):
        aggregated(rule("geometric-median"), models, clients=[1, 5, 7, 9])


def test_weights_are_the_clients_own():
    with pytest.raises(ValueError, match="leave out the method's weights"):
        Robust(method=AggregateMethod(rule="mean", weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match="per_tensor"):
        rule("foolsgold", per_tensor=True)


# In rounds.


def options_of(*names):
    values = {"f": 0, "radius": 0.5, "own": 2, "root": 2, "bucket": 2, "clip": 0.5}
    taken = {option for name in names for option in (*RULES.get(name, ()), *MIXES.get(name, ()))}
    return {name: value for name, value in values.items() if name in taken}


@pytest.mark.parametrize(
    "method",
    [AggregateMethod(rule=name, **options_of(name)) for name in RULES]
    + [AggregateMethod(rule="mean", pre=(name,), **options_of(name)) for name in MIXES],
    ids=lambda method: method.title,
)
def test_any_method_runs_alone_and_together(method, found_small, same_alone_and_together):
    same_alone_and_together(Robust(method=method), rounds=2)
    federation = found_small(Robust(method=method))
    first = federation.server["model"]
    run_round(federation)
    assert federation.server["model"].isfinite().all()
    assert not torch.equal(federation.server["model"], first)


def test_the_mean_is_fedavg(trained):
    near(trained(Robust(method=AggregateMethod(rule="mean"))), trained(FedAvg()), atol=1e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traitor(Robust):
    """Client 2, who owns half of all samples, sends its update the wrong way round and fivefold."""

    def end(self, visit, rows):
        return torch.where(visit.clients[:, None] == 2, 6 * visit.received - 5 * rows, rows)


def test_foolsgold_remembers_clients_that_were_away(found_small):
    federation = found_small(Robust(method=AggregateMethod(rule="foolsgold")), share=0.5)
    expected = torch.zeros_like(federation.server["history"])
    for _ in range(4):
        base = federation.server["model"]
        replies = run_round(federation)
        expected[replies.clients] += replies.models[:, 0] - base[0]
        near(federation.server["history"], expected, atol=1e-6)
    assert (expected.norm(dim=1) > 0).sum() > 2


def test_a_median_of_weights_outvotes_a_traitor_of_few_samples(found_small):
    def after(method, counts_matter):
        federation = found_small(Traitor(method=method, weighted=counts_matter))
        first = federation.server["model"]
        honest = found_small(FedAvg()).server["model"]
        assert torch.equal(first, honest)
        replies = run_round(federation)
        right = replies.models[[0, 1, 3], 0].mean(0) - first[0]
        return torch.cosine_similarity(federation.server["model"][0] - first[0], right, dim=0)

    assert after(AggregateMethod(rule="mean"), True) < 0
    assert after(AggregateMethod(rule="geometric-median"), False) > 0.5
