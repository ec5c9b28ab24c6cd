"""The filter's arithmetic beside loops; who it excludes, honest clients first; what it refuses."""

import math
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from anabranch.aggregate.secure import filtration
from anabranch.aggregate.secure.filtration import Filtration, Hash, hash_logits, judge
from anabranch.federated import attacks

DIGITS = Filtration(classes=10)
KNOWN = [-171638.0, -33990.0, -193954.0]  # 2 sum - 8 (2^16 - 1) of eight numbers each, by hashlib and int alone


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hashes(N=7, *, C=4, b=9, seed=0):
    """Random hashes that lack some classes."""
    random = torch.Generator().manual_seed(seed)
    present = torch.rand(N, C, generator=random) < 0.8
    bits = (torch.rand(N, C, b, generator=random) < 0.5) & present[:, :, None]
    return [Hash(*each) for each in zip(bits, present, strict=True)]


@given(st.integers(1, 40), st.integers(2, 6), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 999))
def test_class_averages(M, C, temperature, seed):
    z = drawn(M, C, seed=seed)
    assigned = torch.randint(C, (M,), generator=torch.Generator().manual_seed(seed))
    for whose in (None, assigned):
        averages, present = filtration.class_average_logits(z, temperature, whose)
        for c in range(C):
            rows = [z[m] for m in range(M) if (z[m].argmax() if whose is None else whose[m]) == c]
            assert bool(present[c]) == bool(rows)
            mean = sum((row.double() / temperature).softmax(0) for row in rows) if rows else torch.zeros(C).double()
            assert_close(averages[c], mean / mean.norm() if rows else mean)


def test_everybody_draws_the_same_projections():
    """Known values: a client with another version of everything must get these."""
    numbers = filtration.projections(b"round 1", DIGITS)
    assert numbers.shape == (10, 52, 10)
    assert numbers[0, 0, :3].tolist() == KNOWN
    assert not numbers.equal(filtration.projections(b"round 2", DIGITS))
    normal = numbers.flatten() / numbers.std()
    assert normal.mean().abs() < 0.05
    assert (normal.abs() < 1).double().mean() == pytest.approx(0.683, abs=0.02)
    assert (normal.abs() < 2).double().mean() == pytest.approx(0.954, abs=0.01)


@pytest.mark.parametrize("angle", [0.2, 0.7, 1.4])
def test_bits_differ_by_the_angle(angle):
    """Probability angle / pi for each; 2000 bits, so 0.011 is one standard deviation at most, 0.05 more than four."""
    settings = Filtration(classes=2, bits=1000)
    rows = filtration.projections(b"seed", settings)
    near = torch.eye(2).double()
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]).double()
    both = [(rows @ each[:, :, None])[:, :, 0] > 0 for each in (near, near @ turn)]
    s = filtration.similarities([Hash(bits, torch.ones(2, dtype=torch.bool)) for bits in both], settings)
    assert s[0, 1].arccos() / math.pi == pytest.approx(angle / math.pi, abs=0.05)


@given(st.integers(0, 999))
def test_similarities_by_a_loop(seed):
    given_ = hashes(seed=seed)
    for settings in (Filtration(classes=4, bits=9), Filtration(classes=4, bits=9, epsilon=1.0)):
        s = filtration.similarities(given_, settings)
        f0 = settings.flip
        f = 2 * f0 * (1 - f0)
        for i, one in enumerate(given_):
            for j, other in enumerate(given_):
                common = [c for c in range(4) if one.present[c] and other.present[c]]
                H, m = sum(int((one.bits[c] ^ other.bits[c]).sum()) for c in common), 9 * len(common)
                wanted = math.cos(math.pi * min(max((H - m * f) / (1 - 2 * f), 0), m) / m) if m else 0.0
                assert s[i, j] == pytest.approx(wanted, abs=1e-12)


def test_randomised_response_is_corrected():
    """20000 bits, told wrongly with 1 / (1 + e). One standard deviation of the share found is 0.0165 at most: its
    bits differ with f = 0.39 or 0.61, 0.0035 of 20000, magnified by 1 / (1 - 2f) = 4.7."""
    settings = Filtration(classes=10, bits=2000, epsilon=1.0)
    bits = drawn(2, 10, 2000) > 0
    bits[1, :, 400:] = bits[0, :, 400:]
    true = (bits[0] ^ bits[1]).double().mean()
    random = Random(3).randbytes
    told = [filtration.randomised_response(each, settings.flip, random) for each in bits]
    assert (told[0] ^ bits[0]).double().mean() == pytest.approx(1 / (1 + math.e), abs=0.012)
    s = filtration.similarities([Hash(each, torch.ones(10, dtype=torch.bool)) for each in told], settings)
    assert s[0, 1].arccos() / math.pi == pytest.approx(true.item(), abs=0.06)
    assert not filtration.randomised_response(bits[0], 0.3).equal(filtration.randomised_response(bits[0], 0.3))


@given(st.integers(0, 999))
def test_hashes_survive_the_wire(seed):
    settings = Filtration(classes=4, bits=9)
    for hash in hashes(seed=seed):
        back = filtration.decode(filtration.encode(hash), settings)
        assert back.bits.equal(hash.bits)
        assert back.present.equal(hash.present)


def test_other_bytes_are_refused():
    settings = Filtration(classes=4, bits=9)
    good = filtration.encode(Hash(torch.ones(4, 9, dtype=torch.bool), torch.ones(4, dtype=torch.bool)))
    assert len(good) == 5
    for bad in (b"", good + b"\0", good[:-1]):
        with pytest.raises(ValueError, match="takes 5 bytes"):
            filtration.decode(bad, settings)
    lacking = Hash(torch.ones(4, 9, dtype=torch.bool), torch.tensor([True, True, True, False]))
    with pytest.raises(ValueError, match="classes that it lacks"):
        filtration.decode(filtration.encode(lacking), settings)
    with pytest.raises(ValueError, match="after its end"):
        filtration.decode(b"\xff", Filtration(classes=2, bits=2))


def test_a_verdict_by_hand():
    """Five clients in a row, each one bit of ten from the next, and one that says the opposite of the third."""
    settings = Filtration(classes=2, bits=5, group=2, followers=0.25, most_weight=10)
    rows = torch.zeros(6, 10, dtype=torch.bool)
    for i in range(5):
        rows[i, :i] = True
    rows[5] = ~rows[2]
    verdict = judge([Hash(row.view(2, 5), torch.ones(2, dtype=torch.bool)) for row in rows], settings)
    c = [math.cos(math.pi * k / 10) for k in range(11)]
    assert_close(verdict.quality, torch.tensor([c[3], c[2], c[2], c[2], c[3], c[9]]).double())
    assert verdict.kept.tolist() == [True] * 5 + [False]
    assert verdict.groups == {0: (1, 2), 1: (0, 2), 2: (1, 3), 3: (2, 4), 4: (3, 2)}
    assert verdict.votes.tolist() == [1, 2, 4, 2, 1, 0]
    assert verdict.accepted.tolist() == [False, True, True, True, False, False]  # 5 / 4 followers are asked for
    assert verdict.weights.tolist() == [0, 8, 8, 8, 0, 0]  # 10 cos(0.2 pi) = 8.09


@pytest.fixture(scope="module")
def fleets(trained_alone):
    return {(seed, skew): trained_alone(20, skew=skew, seed=seed) for skew in (0.0, 0.3) for seed in (0, 1)}


ATTACKS = {
    "FDLA": attacks.logits_reordered,
    "PCFDLA": lambda z: attacks.logits_peaked(z, peak=0.5),
    "sign flip": torch.neg,
    "free rider": attacks.logits_unknowing,
}


def verdict(z, assigned, seed, settings=DIGITS):
    return judge([hash_logits(each, bytes([seed]), settings, assigned) for each in z], settings)


@pytest.mark.parametrize("public", [True, False])
def test_few_honest_clients_are_excluded(public, fleets):
    """Of 80 clients in four fleets one in seven at most; asking for a quarter as followers excludes one in five."""
    excluded = {0.05: 0, 0.25: 0}
    for share in excluded:
        for (seed, _), (z, y) in fleets.items():
            found = verdict(z, y if public else None, seed, Filtration(classes=10, followers=share))
            excluded[share] += int((~found.accepted).sum())
    assert excluded[0.05] <= 80 / 7
    assert excluded[0.25] >= 80 / 5


@pytest.mark.parametrize("f", [4, 8])
@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_logits_are_found_by_public_classes(attack, f, fleets):
    for (seed, _), (z, y) in fleets.items():
        found = verdict(torch.cat([ATTACKS[attack](z[:f]), z[f:]]), y, seed)
        assert not found.accepted[:f].any()
        assert found.accepted[f:].double().mean() > 0.8


def test_reordered_logits_are_not_found_by_ones_own_words(fleets):
    """The limit that the module names."""
    z, _ = fleets[0, 0.0]
    found = verdict(torch.cat([attacks.logits_reordered(z[:4]), z[4:]]), None, 0)
    assert found.accepted[:4].sum() >= 3


def test_blurred_hashes_still_tell_who_flips_the_sign(fleets):
    settings = Filtration(classes=10, bits=200, epsilon=2.0)
    z, y = fleets[0, 0.0]
    random = Random(5).randbytes
    told = [hash_logits(each, b"x", settings, y, random=random) for each in torch.cat([-z[:4], z[4:]])]
    found = judge(told, settings)
    assert not found.accepted[:4].any()
    assert found.kept[4:].double().mean() > 0.8


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ([{0, 1, 2}], r"T \+ 2 = 4 members, got \[0, 1, 2\]"),
        ([set(range(8)), set(range(7))], r"differ by \[7\], fewer"),
        ([set(range(8)), set(range(1, 9))], r"differ by \[0\], fewer"),
        ([set(range(8)), set(range(8, 16)), set(range(3, 20))], r"differ by \[0, 1, 2\]"),
    ],
)
def test_sets_that_say_too_much(sets, words):
    with pytest.raises(ValueError, match=words):
        filtration.check_released(sets, 2)


def test_sets_that_may_be_released():
    for sets in (
        [],
        [range(4)],
        [range(8), range(8)],
        [range(8), range(4)],
        [range(8), range(4, 12)],
        [range(a, b) for a, b in pairwise((0, 4, 9, 20))],
    ):
        filtration.check_released(sets, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"classes": 1}, "classes >= 2"),
        ({"classes": 3, "bits": 0}, "need classes"),
        ({"classes": 3, "group": 0}, "group >= 1"),
        ({"classes": 3, "kappa": 0.0}, "must be positive, got 1.0, 0.0"),
        ({"classes": 3, "epsilon": -1.0}, "must be positive"),
        ({"classes": 3, "followers": 1.5}, r"followers in \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Filtration(**settings)


def test_bad_logits_are_named():
    for z, assigned, words in (
        (torch.full((3, 10), torch.nan), None, "finite, got"),
        (torch.zeros(3, 9), None, r"must be \[M, 10\], got \[3, 9\]"),
        (torch.zeros(3, 10), torch.tensor([0, 1, 10]), r"classes in 0\.\.9"),
        (torch.zeros(3, 10), torch.tensor([0, 1]), r"assigned must be \[3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            hash_logits(z, b"", DIGITS, assigned)
    with pytest.raises(ValueError, match="takes three clients, got 2"):
        judge([hash_logits(drawn(5, 10), b"", DIGITS)] * 2, DIGITS)
