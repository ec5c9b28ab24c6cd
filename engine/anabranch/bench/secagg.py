"""Secure sums beside those of Flower's SecAgg+ primitives: the same clients, vectors and silent clients, in turns.

Flower's side does what its client mod and its workflow do between the messages, with every client a neighbour of every
other (SecAgg): key agreement, Shamir shares of the seeds, quantising, one private mask and one for each neighbour; and
at the server the sum, the seeds put together and the masks made again. It has no proof of the sum.
"""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from anabranch.aggregate.secure import simulate
from anabranch.bench.machine import Machine
from anabranch.bench.timing import interleave

CLIP, RANGE, MODULUS = 8.0, 1 << 22, 1 << 32  # of quantised numbers and of masks: Flower's defaults
FRACTION_BITS = 18  # as many steps over as wide a range
Done = TypeVar("Done")


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Seconds of one client (the median of them) and of the server once the last message is there."""

    client_s: float
    server_s: float
    all_s: float  # of the server with all messages, where there are any
    bytes_up: int
    error: float  # largest distance from the mean in float64


@dataclass(frozen=True, slots=True, kw_only=True)
class SecaggReport:
    """Both contenders' rounds."""

    machine: Machine
    clients: int
    length: int
    drop: int
    ours: tuple[Round, ...]
    flower: tuple[Round, ...]

    @property
    def title(self) -> str:
        return f"Secure sums of {self.clients} vectors of {self.length} numbers, {self.drop} clients silent in the end"

    @property
    def header(self) -> tuple[str, ...]:
        return ("side", "contender", "ms", "least … most", "MiB up", "error", "time / ours")

    def rows(self) -> list[tuple[str, ...]]:
        """One for each side and contender."""
        return [
            (
                side,
                name,
                f"{median(values) * 1e3:.1f}",
                f"{min(values) * 1e3:.1f} … {max(values) * 1e3:.1f}",
                f"{rounds[0].bytes_up / 2**20:.1f}" if side == "client" else "",
                f"{max(one.error for one in rounds):.1e}",
                f"{median(values) / median(getattr(one, of) for one in self.ours):.2f}",
            )
            for side, of in (("client", "client_s"), ("server", "server_s"), ("server, all", "all_s"))
            for name, rounds in (("ours, V2", self.ours), ("Flower SecAgg", self.flower))
            if (values := [getattr(one, of) for one in rounds])
        ]

    def notes(self) -> list[str]:
        """What stands under the table."""
        return [
            self.machine.sentence(),
            "client: median of all clients in one round; ours with signatures, sealed shares, the check of owners and "
            "the proof of the sum, keys of pairs being those of the session; Flower's with keys and without a proof",
            "server: ours decoding and proof; Flower's sum, seeds and masks",
            "server, all: with checking our clients' messages and relaying their shares; Flower's are not counted",
            f"error: from the mean in float64, {RANGE} steps over ±{CLIP:g} for both; ours is the bound of rounding to "
            "the nearest, as the sum was equal to that of the integers; Flower rounds at random",
            f"Flower's masks come from a generator seeded with 32 bits; {self.clients // 2 + 1} shares give a seed",
        ]

    def numbers(self) -> dict[str, Any]:
        """Everything that was measured."""
        return asdict(self)


def measure(*, clients: int, length: int, drop: int, repeats: int, machine: Machine) -> SecaggReport:
    """Rounds of both, in turns. Raises ImportError without flwr."""
    try:
        import flwr.common.secure_aggregation  # noqa: F401
    except ImportError as error:
        raise ImportError("bench secagg needs its peer; install it with: pip install flwr") from error
    random = torch.Generator().manual_seed(0)
    vectors = [row.numpy() for row in torch.randn(clients, length, generator=random) * (CLIP / 24)]
    ours, flower = interleave(
        [lambda: our_round(clients, length, drop), lambda: flower_round(vectors, drop)], repeats=repeats, warmup=0
    )
    return SecaggReport(
        machine=machine, clients=clients, length=length, drop=drop, ours=tuple(ours), flower=tuple(flower)
    )


def our_round(clients: int, length: int, drop: int) -> Round:
    """One simulated round in direct mode; it must be exact."""
    settings = simulate.Settings(
        clients=clients, length=length, drop=drop, rounds=1, clip=CLIP, fraction_bits=FRACTION_BITS
    )
    report = simulate.simulate(settings)
    assert report.exact
    return Round(
        client_s=report.client_s,
        server_s=report.server_s,
        all_s=sum(phase.server_s + phase.server_receive_s for phase in report.phases),
        bytes_up=sum(phase.bytes_up for phase in report.phases),
        error=2.0 ** -(FRACTION_BITS + 1),
    )


def flower_round(vectors: list[np.ndarray], drop: int) -> Round:
    """One round of SecAgg from Flower's own functions; the last `drop` clients send no masked vector."""
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
    from flwr.common.secure_aggregation.quantization import dequantize, quantize
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    from flwr.supercore.primitives import asymmetric

    N, l = len(vectors), len(vectors[0])
    threshold = N // 2 + 1
    seconds = [0.0] * N

    def timed(client: int, work: Callable[[], Done]) -> Done:
        start = time.perf_counter()
        done = work()
        seconds[client] += time.perf_counter() - start
        return done

    masking = [timed(i, asymmetric.generate_key_pairs) for i in range(N)]
    sealing = [timed(i, asymmetric.generate_key_pairs) for i in range(N)]
    seeds = [os.urandom(32) for _ in range(N)]

    def shared(i: int) -> tuple[list[bytes], list[bytes]]:
        private = asymmetric.private_key_to_bytes(masking[i][0])
        return create_shares(seeds[i], threshold, N), create_shares(private, threshold, N)

    shares = [timed(i, partial(shared, i)) for i in range(N)]

    def key_of(keys: list[Any], i: int, j: int) -> bytes:
        key: bytes = generate_shared_key(keys[i][0], keys[j][1])
        return key

    def sealed(i: int) -> list[bytes]:
        return [encrypt(key_of(sealing, i, j), shares[i][0][j] + shares[i][1][j]) for j in range(N) if j != i]

    def opened(j: int) -> None:
        for i in range(N):
            if i != j:
                decrypt(key_of(sealing, j, i), packets[i][j - (j > i)])

    packets = [timed(i, partial(sealed, i)) for i in range(N)]
    for j in range(N):
        timed(j, partial(opened, j))

    def masked(i: int) -> np.ndarray:
        (total,) = quantize([vectors[i]], CLIP, RANGE)
        total = total + pseudo_rand_gen(seeds[i], MODULUS, [(l,)])[0]
        for j in range(N):
            if j != i:
                (mask,) = pseudo_rand_gen(key_of(masking, i, j), MODULUS, [(l,)])
                total = total + mask if i > j else total - mask
        reduced: np.ndarray = total & (MODULUS - 1)
        return reduced

    alive = range(N - drop)
    sent = {i: timed(i, partial(masked, i)) for i in alive}

    start = time.perf_counter()
    total = np.zeros(l, dtype=np.int64)
    for vector in sent.values():
        total = (total + vector) & (MODULUS - 1)
    for i in range(N):
        secret = combine_shares([shares[i][0 if i in alive else 1][j] for j in alive])
        if i in alive:
            total = total - pseudo_rand_gen(secret, MODULUS, [(l,)])[0]
            continue
        key = asymmetric.bytes_to_private_key(secret)
        for j in alive:
            (mask,) = pseudo_rand_gen(generate_shared_key(key, masking[j][1]), MODULUS, [(l,)])
            total = total + mask if i > j else total - mask
    (mean,) = dequantize([total & (MODULUS - 1)], CLIP, RANGE)
    mean = (mean - (len(alive) - 1) * CLIP) / len(alive)
    server_s = time.perf_counter() - start
    error = float(np.abs(mean - np.mean([vectors[i].astype(np.float64) for i in alive], axis=0)).max())
    assert error < 2 * CLIP / RANGE, f"Flower's mean is wrong by {error}"
    kept = [seconds[i] for i in alive]
    return Round(client_s=median(kept), server_s=server_s, all_s=server_s, bytes_up=8 * l, error=error)
