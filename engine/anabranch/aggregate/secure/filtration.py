"""Which clients' logits enter a sum, decided by short hashes of them: quality-aware filtration, SVAFD-style.

    CAL_i [C, C]   row c: mean of softmax(z / temperature) over the public samples of class c, of length one
    h_i            signs of random projections of each row (locality-sensitive hashing), from a public seed
    s_ij           cos(pi * share of differing bits): about the cosine between two clients' rows
    q_i            median of s_ij over j
    kept           q_i >= med(q) - kappa * 1.4826 * MAD(q)
    accepted       kept, and in the groups of enough others: a group is the `group` kept clients most like one
    weight         round(most_weight * q_i), at least one

Stated of arXiv 2505.13319 by others   averages of logits by class, hashes of them, personal groups, followers.
Reconstructed here                     every formula above; the paper's own text was not at hand.

Which class a sample belongs to is best public: its label, or what most clients said of it before. Where each client
goes by its own predictions, an attack that agrees with itself is not seen: reordered logits (FDLA) have a peak in the
class that they predict, like honest ones.

Measured   scikit-learn's digits, 20 clients of 67 digits each, 449 public ones, defaults, four seeds; share of clients
           excluded, the honest of a round without attack first, then hostile ones, 4 of 20 (in brackets 8 of 20):

  skew  classes by  honest   FDLA         PCFDLA .5    sign flip    free rider
  0     own words   .07      .00 (.06)    1.0 (.50)    1.0 (.69)    1.0 (1.0)
  0     labels      .09      1.0 (1.0)    1.0 (1.0)    1.0 (1.0)    1.0 (1.0)
  0.3   own words   .14      .06 (.03)    .50 (.00)    1.0 (.31)    1.0 (1.0)
  0.3   labels      .09      1.0 (1.0)    1.0 (1.0)    1.0 (1.0)    1.0 (1.0)
  0.6   own words   .04      .00 (.03)    .00 (.00)    .50 (.31)    1.0 (1.0)
  0.6   labels      .01      .88 (.25)    .75 (.06)    1.0 (.62)    .75 (.00)

           A skew of 0.6 makes 60 % of a client's digits nearly of one kind: honest clients then differ as much as
           hostile ones. Asking for a quarter of those kept as followers excluded 26 to 30 % of honest clients even
           without skew, so 5 % are asked for.

What is seen of a client is its hash. It must be committed to before any is revealed, or a poisoner copies a good one;
and a client may hash good logits and send others. Bits tell angles between clients' averages; `randomised_response`
blurs them. With one seed for many rounds the same logits would tell more bits each time: a seed is for one round.
"""

import math
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import shake_256
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

OF_NORMAL = 1.4826  # standard deviations of a normal law in one median absolute deviation
TERMS = 8  # uniform numbers that are summed for one of a nearly normal law


@dataclass(frozen=True, slots=True, kw_only=True)
class Filtration:
    """classes      C
    bits         per class in a hash
    temperature  of the softmax
    kappa        standard deviations below the median that a client may lie
    group        clients in an intimacy group; None for half of those kept
    followers    share of those kept in whose groups a client must be to be accepted
    most_weight  largest integer weight
    epsilon      of randomised response, for each bit by itself; None for none
    """

    classes: int
    bits: int = 52
    temperature: float = 1.0
    kappa: float = 3.0
    group: int | None = None
    followers: float = 0.05
    most_weight: int = 1
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.classes < 2 or self.bits < 1 or self.most_weight < 1 or (self.group is not None and self.group < 1):
            raise ValueError(
                "need classes >= 2, bits, most_weight and group >= 1, got "
                f"{self.classes}, {self.bits}, {self.most_weight}, {self.group}"
            )
        if not 0 <= self.followers <= 1:
            raise ValueError(f"need followers in [0, 1], got {self.followers}")
        if not (self.temperature > 0 and self.kappa > 0 and (self.epsilon is None or self.epsilon > 0)):
            raise ValueError(
                f"temperature, kappa and epsilon must be positive, got {self.temperature}, {self.kappa}, {self.epsilon}"
            )

    @property
    def flip(self) -> float:
        """Probability with which a bit is told wrongly."""
        return 0.0 if self.epsilon is None else 1 / (1 + math.exp(self.epsilon))


class Hash(NamedTuple):
    """bits [C, b] bool, and which classes the client has samples of, present [C] bool; bits of others are False."""

    bits: Tensor
    present: Tensor


class Verdict(NamedTuple):
    """Of N clients: quality [N] float64, kept [N] bool, votes [N] of followers, accepted [N] bool, weights [N] integers
    (zero where not accepted), groups: indices of each kept client's most similar kept ones."""

    quality: Tensor
    kept: Tensor
    groups: dict[int, tuple[int, ...]]
    votes: Tensor
    accepted: Tensor
    weights: Tensor


def class_average_logits(logits: Tensor, temperature: float, assigned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """CAL [C, C] float64, each row of length one or zero, and which rows there are [C] bool.

    logits    [M, C]  of M public samples
    assigned  [M]     class of each, as all clients have it; None for the client's own predictions

    Raises ValueError for logits that are not finite.
    """
    if logits.ndim != 2 or not bool(torch.isfinite(logits).all()):
        raise ValueError(f"logits must be [M, C] and finite, got {list(logits.shape)}")
    M, C = logits.shape
    whose = logits.argmax(1) if assigned is None else assigned
    if whose.shape != (M,) or (M and not 0 <= int(whose.min()) <= int(whose.max()) < C):
        raise ValueError(f"assigned must be [{M}] classes in 0..{C - 1}, got {list(whose.shape)}")
    sums = torch.zeros(C, C, dtype=torch.float64)
    sums.index_add_(0, whose, (logits.double() / temperature).softmax(1))
    return torch.nn.functional.normalize(sums, dim=1), whose.bincount(minlength=C) > 0


def projections(seed: bytes, settings: Filtration) -> Tensor:
    """[C, b, C] float64: nearly normal numbers that everybody draws alike, being sums of integers from SHAKE-256."""
    C, b = settings.classes, settings.bits
    drawn = shake_256(b"anabranch/filtration/v1" + len(seed).to_bytes(8, "big") + seed).digest(C * b * C * TERMS * 2)
    uniform = np.frombuffer(drawn, "<u2").reshape(C, b, C, TERMS).astype(np.int64)
    return torch.from_numpy(2 * uniform.sum(-1) - TERMS * 0xFFFF).double()


def hash_logits(
    logits: Tensor,
    seed: bytes,
    settings: Filtration,
    assigned: Tensor | None = None,
    *,
    random: Callable[[int], bytes] = secrets.token_bytes,
) -> Hash:
    """A client's hash of its logits [M, C]; told truly, or by randomised response where epsilon is set.

    random   n -> n random bytes, secret to the client
    """
    if logits.shape[1:] != (settings.classes,):
        raise ValueError(f"logits must be [M, {settings.classes}], got {list(logits.shape)}")
    averages, present = class_average_logits(logits, settings.temperature, assigned)
    bits = (projections(seed, settings) @ averages[:, :, None])[:, :, 0] > 0
    if settings.epsilon is not None:
        bits = randomised_response(bits, settings.flip, random)
    return Hash(bits & present[:, None], present)


def randomised_response(bits: Tensor, flip: float, random: Callable[[int], bytes] = secrets.token_bytes) -> Tensor:
    """Each bit turned with probability `flip`, 1 / (1 + e^epsilon): a bit is then told with e^epsilon to one."""
    drawn = np.frombuffer(random(4 * bits.numel()), "<u4").reshape(bits.shape)
    return bits ^ torch.from_numpy(drawn < flip * 2**32)


def encode(hash: Hash) -> bytes:
    """The bits of a hash, then those of `present`, eight to a byte: what is committed to and revealed."""
    return np.packbits(np.concatenate([hash.bits.numpy().ravel(), hash.present.numpy()])).tobytes()


def encoded_bytes(settings: Filtration) -> int:
    """Of what `encode` makes."""
    return -(-settings.classes * (settings.bits + 1) // 8)


def decode(message: bytes, settings: Filtration) -> Hash:
    """The hash that was encoded. Raises ValueError unless these bytes are what `encode` makes of one."""
    C, b = settings.classes, settings.bits
    size = encoded_bytes(settings)
    if len(message) != size:
        raise ValueError(f"a hash of {C} times {b} bits takes {size} bytes, got {len(message)}")
    flat = np.unpackbits(np.frombuffer(message, np.uint8)).astype(bool)
    found = Hash(torch.from_numpy(flat[: C * b].reshape(C, b)), torch.from_numpy(flat[C * b : C * (b + 1)]))
    if encode(Hash(found.bits & found.present[:, None], found.present)) != message:
        raise ValueError("a hash has bits of classes that it lacks, or bits after its end")
    return found


def similarities(hashes: Sequence[Hash], settings: Filtration) -> Tensor:
    """s [N, N] float64 in [-1, 1], by the classes that both have; 0 for clients without a common class."""
    bits = torch.stack([hash.bits for hash in hashes]).double()
    present = torch.stack([hash.present for hash in hashes]).double()
    common = settings.bits * (present @ present.T)
    ones = bits.sum(2)  # [N, C]
    differ = ones @ present.T + present @ ones.T - 2 * torch.einsum("icb,jcb->ij", bits, bits)
    turned = 2 * settings.flip * (1 - settings.flip)  # two bits of which one was told wrongly
    differ = ((differ - common * turned) / (1 - 2 * turned)).clamp_min(0).minimum(common)
    cosines = (math.pi * differ / common.clamp_min(1)).cos()
    cosines = (cosines * 2**40).round() / 2**40  # two machines' cosines may differ in the last bit, verdicts may not
    return torch.where(common > 0, cosines, 0.0)


def judge(hashes: Sequence[Hash], settings: Filtration) -> Verdict:
    """Who is accepted, with which weight: the same for everybody who sees the same hashes. Needs three clients."""
    N = len(hashes)
    if N < 3:
        raise ValueError(f"a median of others takes three clients, got {N}")
    s = similarities(hashes, settings)
    others = s[~torch.eye(N, dtype=torch.bool)].view(N, N - 1)
    quality = others.quantile(0.5, dim=1)
    kept = within(quality, settings.kappa)
    members = kept.nonzero()[:, 0].tolist()
    size = settings.group or max(1, len(members) // 2)
    groups = {i: tuple(_most_similar(s[i], [j for j in members if j != i], size)) for i in members}
    votes = torch.zeros(N, dtype=torch.int64)
    for group in groups.values():
        votes[list(group)] += 1
    accepted = kept & (votes >= settings.followers * len(members))
    weights = (settings.most_weight * quality.clamp_min(0)).round().long().clamp(1, settings.most_weight)
    return Verdict(quality, kept, groups, votes, accepted, torch.where(accepted, weights, 0))


def within(quality: Tensor, kappa: float) -> Tensor:
    """[N] bool: at most kappa robust standard deviations below the median."""
    middle = quality.quantile(0.5)
    spread = OF_NORMAL * (quality - middle).abs().quantile(0.5)
    return quality >= middle - kappa * spread - 1e-12  # equal up to rounding is not below


def check_released(sets: Sequence[Collection[int]], privacy: int) -> None:
    """Refuse sets of clients whose sums, released in one round, would tell too much about some of them by difference.

    privacy   T clients may collude; two others must remain in whatever can be computed by subtraction

    Each set has at least T + 2 members. Of any two that overlap, each has none that the other lacks, or at least T + 2.
    Sums of more than two overlapping sets are not looked at; one set, or a partition, gives rise to none.

    Raises ValueError that names the sets.
    """
    least = privacy + 2
    found = [frozenset(members) for members in sets]
    for members in found:
        if len(members) < least:
            raise ValueError(f"a released set needs T + 2 = {least} members, got {sorted(members)}")
    for one, other in combinations(found, 2):
        if not one & other:
            continue
        for part in (one - other, other - one):
            if 0 < len(part) < least:
                raise ValueError(
                    f"sums over {sorted(one)} and {sorted(other)} differ by {sorted(part)}, fewer than T + 2 = {least}"
                )


def _most_similar(row: Tensor, others: list[int], size: int) -> list[int]:
    """Of these clients the `size` most similar; the first ones of equals."""
    return sorted(others, key=lambda j: (-row[j].item(), j))[:size]
