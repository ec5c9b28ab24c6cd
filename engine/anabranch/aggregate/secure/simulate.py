"""Rounds of all parties in one process, with a clock: how long each step takes each side, and how many bytes it sends.

Some clients fall silent and some lie, as asked for; the sum is compared with that of plain integers every time.
"""

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from anabranch.aggregate.secure import messages as m
from anabranch.aggregate.secure.client import Client, Round
from anabranch.aggregate.secure.keys import Identity
from anabranch.aggregate.secure.local import meet, run_round
from anabranch.aggregate.secure.outcome import Outcome, elements_of
from anabranch.aggregate.secure.parameters import Mode, Parameters, Proof
from anabranch.aggregate.secure.proof import challenge, locate, project
from anabranch.aggregate.secure.server import Server
from anabranch.aggregate.secure.wire import Part
from anabranch_kernels.field_coding.op import FIELDS, FixedPoint, decode, encode

Step = Literal["share", "check", "agree", "sum", "project", "verify"]
STEPS: tuple[Step, ...] = ("share", "check", "agree", "sum", "project", "verify")
Done = TypeVar("Done")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is simulated.

    clients   N
    length    l, numbers in a vector
    drop      D clients that say nothing from step `drop_at` on
    corrupt   E clients that add up wrong shares
    blocks    K; None for the most that the rest allows, up to N / 2
    privacy   T; None for N / 4
    rounds    are timed one by one
    """

    clients: int
    length: int
    drop: int = 0
    corrupt: int = 0
    blocks: int | None = None
    privacy: int | None = None
    mode: Mode = "direct"
    proof: Proof = "V2"
    field: str = "babybear"
    drop_at: Step = "sum"
    rounds: int = 3
    clip: float = 1.0
    fraction_bits: int = 16

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.field not in FIELDS:
            raise ValueError(f"unknown field {self.field!r}; choose one of {sorted(FIELDS)}")

    def sizes(self) -> tuple[int, int]:
        """K and T."""
        T = max(1, self.clients // 4) if self.privacy is None else self.privacy
        most = self.clients - self.drop - T - 2 * self.corrupt
        return max(1, min(most, self.clients // 2)) if self.blocks is None else self.blocks, T


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One step of one round: seconds and bytes of a client (the median of them) and of the server."""

    name: Step
    client_s: float
    slowest_client_s: float
    server_receive_s: float  # all clients' messages: signatures and digests checked
    server_s: float  # what the server then does
    bytes_up: int  # by one client
    bytes_down: int  # to one client


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Medians over the rounds.

    location_s   of finding wrong sums, a part of the server's step `sum`
    decode_s     of decoding alone, the other large part
    verified     share of a client's time that is spent on the proof
    """

    settings: Settings
    blocks: int
    privacy: int
    phases: tuple[Phase, ...]
    location_s: float
    decode_s: float
    accepted: tuple[int, ...]
    wrong: tuple[int, ...]
    exact: bool

    @property
    def client_s(self) -> float:
        """Of one client in one round."""
        return sum(phase.client_s for phase in self.phases)

    @property
    def server_s(self) -> float:
        """Of the server for the sum and its proof: steps `sum`, `project` and what follows."""
        return sum(phase.server_s for phase in self.phases if phase.name in ("sum", "project"))

    @property
    def verified(self) -> float:
        return sum(phase.client_s for phase in self.phases if phase.name in ("project", "verify")) / self.client_s

    def numbers(self) -> dict[str, Any]:
        """Everything, for JSON."""
        totals = {"client_s": self.client_s, "server_sum_and_proof_s": self.server_s, "verification": self.verified}
        return {**asdict(self), **totals}


class _Liar(Client):
    """Adds one to the first element of the share it counts first."""

    def _sum(self, now: Round, quorum: m.Quorum) -> bytes | None:
        if now.view is not None:
            first = self._rows[now.view.accepted[0]]
            first[0] = (int(first[0]) + 1) % (self._parameters.field.p // 2)
        return super()._sum(now, quorum)


class _Watch:
    """Seconds and bytes of each step of one round. A step begins with a client's work and ends with the server's."""

    def __init__(self) -> None:
        self.step = 0
        self.seconds: dict[str, list[list[float]]] = {
            what: [[] for _ in STEPS] for what in ("client", "receive", "advance")
        }
        self.bytes: dict[bool, list[list[int]]] = {to_server: [[] for _ in STEPS] for to_server in (True, False)}

    def __call__(self, what: str, work: Callable[[], Done]) -> Done:
        start = time.perf_counter()
        done = work()
        self.seconds[what][self.step].append(time.perf_counter() - start)
        self.step += what == "advance"
        return done

    def phases(self) -> Iterator[Phase]:
        for k, step in enumerate(STEPS):
            client = self.seconds["client"][k]
            if client:
                yield Phase(
                    name=step,
                    client_s=median(client),
                    slowest_client_s=max(client),
                    server_receive_s=sum(self.seconds["receive"][k]),
                    server_s=sum(self.seconds["advance"][k]),
                    bytes_up=int(median(self.bytes[True][k] or [0])),
                    bytes_down=int(median(self.bytes[False][k] or [0])),
                )


def simulate(settings: Settings, progress: Callable[[str], None] = lambda line: None) -> Report:
    """Run the rounds; raises ValueError if the sizes cannot hold and ProtocolError if a round fails."""
    identities = [Identity() for _ in range(settings.clients + 1)]
    parameters = parameters_of(settings, identities)
    key = secrets.token_bytes(32) if settings.proof == "V1" else None
    liars = range(settings.corrupt)
    silent = range(settings.clients - settings.drop, settings.clients)
    progress("meeting")
    clients = {
        i: (_Liar if i in liars else Client)(parameters, i, identities[i], group_key=key)
        for i in range(settings.clients)
    }
    server = Server(parameters, identities[-1])
    meet(server, clients)
    random = torch.Generator().manual_seed(0)
    vectors = {i: torch.randn(settings.length, generator=random) * settings.clip / 3 for i in clients}
    watches, exact = [], True
    for number in range(1, settings.rounds + 1):
        progress(f"round {number} of {settings.rounds}")
        watch = _Watch()

        def wire(client: int, to_server: bool, message: Part, watch: _Watch = watch) -> Part | None:
            watch.bytes[to_server][watch.step].append(len(message))
            gone = client in silent and watch.step >= STEPS.index(settings.drop_at)
            return None if gone and to_server else message

        run_round(server, clients, number, vectors, wire, watch)
        watches.append(tuple(watch.phases()))
        outcomes = [server.outcome, *(client.outcome for client in clients.values())]
        exact = exact and _is_exact([one for one in outcomes if one is not None], vectors, parameters)
    assert server.outcome is not None
    location_s, decode_s = _location(parameters)
    return Report(
        settings=settings,
        blocks=parameters.blocks,
        privacy=parameters.privacy,
        phases=tuple(_median(same) for same in zip(*watches, strict=True)),
        location_s=location_s,
        decode_s=decode_s,
        accepted=server.outcome.accepted,
        wrong=server.outcome.wrong,
        exact=exact,
    )


def parameters_of(settings: Settings, identities: list[Identity]) -> Parameters:
    """Of these clients and the server, whose identity is the last."""
    K, T = settings.sizes()
    return Parameters(
        session=secrets.token_bytes(32),
        identities=tuple(one.public for one in identities[:-1]),
        server=identities[-1].public,
        length=settings.length,
        fixed_point=FixedPoint(clip=settings.clip, fraction_bits=settings.fraction_bits),
        blocks=K,
        privacy=T,
        errors=settings.corrupt,
        dropouts=settings.drop,
        field=FIELDS[settings.field],
        mode=settings.mode,
        proof=settings.proof,
    )


def _is_exact(outcomes: list[Outcome], vectors: dict[int, Tensor], parameters: Parameters) -> bool:
    """Whether all have the sum of the integers, which fits 64 bits."""
    fixed = parameters.fixed_point
    total = torch.zeros(parameters.length, dtype=torch.int64)
    for i in outcomes[0].accepted:
        clipped = vectors[i].double().clamp(-fixed.clip, fixed.clip)
        total += (clipped * 2.0**fixed.fraction_bits).round().long()
    mean = total.double() / (len(outcomes[0].accepted) * 2.0**fixed.fraction_bits)
    elements = elements_of(total, parameters.field)
    return all(torch.equal(one.sum, elements) and torch.equal(one.mean(parameters), mean) for one in outcomes)


def _location(parameters: Parameters, repeats: int = 5) -> tuple[float, float]:
    """Seconds to find that E of N - D sums are wrong, and to decode K + T of them, by themselves."""
    p, code = parameters, parameters.code
    values = torch.randint(0, 2**31 - 2**27, (code.threshold, p.share_length)).to(p.field.dtype)
    members = list(range(p.clients - p.dropouts))
    sums = encode(values, code)[: len(members)].contiguous()
    sums[: p.errors, 0] ^= 1
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        start = time.perf_counter()
        wrong = locate(code, members, project(sums, challenge(secrets.token_bytes(32), p), p), p.errors)
        between = time.perf_counter()
        decode(sums[p.errors : p.errors + code.threshold], members[p.errors : p.errors + code.threshold], code)
        seconds[1].append(time.perf_counter() - between)
        seconds[0].append(between - start)
        assert wrong == tuple(range(p.errors))
    return median(seconds[0]), median(seconds[1])


def _median(same: tuple[Phase, ...]) -> Phase:
    """Of one step in all rounds."""
    numbers = {
        name: median(getattr(one, name) for one in same) for name in Phase.__dataclass_fields__ if name != "name"
    }
    sizes = {name: int(value) for name, value in numbers.items() if name.startswith("bytes")}
    return Phase(name=same[0].name, **{**numbers, **sizes})
