"""Cases of field_coding: encoding, sums of shares, projections and rejection, beside NumPy's integers and galois.

Peers that are a hundred times slower get fewer columns; what is compared is products (or words) per second. The parts
that all contenders of a case have computed are equal to the last bit, or nothing is timed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.bench.machine import Machine
from anabranch.bench.timing import interleave, timed
from anabranch_kernels.field_coding import cpu
from anabranch_kernels.field_coding.code import Code, encoding_matrix
from anabranch_kernels.field_coding.op import (
    BABYBEAR,
    F50,
    GOLDILOCKS,
    M31,
    Field,
    accept,
    encode,
    matrix_of,
    multiply,
)
from anabranch_kernels.memory import prefer_huge_pages

Step = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One contender: its step returns the first columns (or words) of the result, by `products` products (or words)."""

    name: str
    step: Step
    products: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldCase:
    """Contenders of one problem; the first is ours as it is called, with all columns."""

    name: str
    ways: tuple[Way, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldSample:
    """Times of one contender."""

    case: str
    contender: str
    products: int
    seconds: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Products per second."""
        return self.products / median(self.seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldReport:
    """The table of `anabranch bench field-coding`; `absent` names the peers that did not run, and why."""

    title: str
    machine: Machine
    samples: tuple[FieldSample, ...]
    absent: tuple[str, ...] = ()

    @property
    def header(self) -> tuple[str, ...]:
        return ("case", "contender", "ms", "p10 … p90", "G/s", "ours / its rate")

    def rows(self) -> list[tuple[str, ...]]:
        """One row per sample; rates are compared with the first contender of the same case."""
        first: dict[str, FieldSample] = {}
        for sample in self.samples:
            first.setdefault(sample.case, sample)
        return [_row(sample, first[sample.case]) for sample in self.samples]

    def notes(self) -> list[str]:
        """What stands under the table."""
        return [
            self.machine.sentence(),
            "G/s: 1e9 products a second, of words for accept; a transform counts the products that the matrix would "
            "take; NumPy, galois and plain C++ compute fewer columns",
            *(f"not run: {peer}" for peer in self.absent),
        ]

    def numbers(self) -> dict[str, Any]:
        """Every number, each time included."""
        return {**asdict(self), "samples": [{**asdict(one), "rate": one.rate} for one in self.samples]}


def cases(*, quick: bool) -> tuple[list[FieldCase], list[str]]:
    """All cases, and the peers that are absent."""
    galois, absent = _galois()
    sizes = [(32, 24, 64), (128, 96, 32), (5, 3, 9)] if quick else [(32, 24, 262144), (128, 96, 65536), (128, 96, 4096)]
    made = [_encode(field, *size, galois) for field in (BABYBEAR, GOLDILOCKS, F50) for size in sizes]
    made.append(_encode(M31, *sizes[0], galois))
    made += [_sums(BABYBEAR, 24, 100 if quick else 1_000_000), _projections(BABYBEAR, 32, 400 if quick else 250_000)]
    made += [_accept(field, 1000 if quick else 4_000_000) for field in (BABYBEAR, GOLDILOCKS)]
    return made, absent


def measure(case: FieldCase, *, repeats: int) -> list[FieldSample]:
    """Compare all results, then time them in turns."""
    expected = case.ways[0].step()
    for way in case.ways[1:]:
        result = way.step()
        if not torch.equal(result, expected[..., : result.shape[-1]]):
            raise ValueError(f"{case.name}: {way.name} differs from {case.ways[0].name}")
    times = interleave([timed(way.step) for way in case.ways], repeats=repeats, warmup=1)
    return [
        FieldSample(case=case.name, contender=way.name, products=way.products, seconds=tuple(seconds))
        for way, seconds in zip(case.ways, times, strict=True)
    ]


def _encode(field: Field, N: int, U: int, L: int, galois: Any) -> FieldCase:
    code = Code(field=field, clients=N, blocks=U - U // 3, privacy=U // 3)
    values = _elements(field, U, L)
    matrix = matrix_of(encoding_matrix(code), field, values.device)
    products = N * U * L
    ways = [Way(name="anabranch", step=lambda: encode(values, code), products=products)]
    for isa in reversed(cpu.ISAS):
        few = L if isa != "generic" else min(L, 16384)
        part, share = values[:, :few], products // L * few
        ways.append(Way(name=f"dense {isa}", step=_call(cpu.multiply, matrix, part, field.name, isa), products=share))
        if code.has_transform:
            sizes = (N, code.order, code.coset_order, field.name, isa)
            ways.append(Way(name=f"transform {isa}", step=_call(cpu.transform, part, *sizes), products=share))
    if field.bytes == 4:
        some = min(L, 3_000_000 // (N * U))
        part, share = values[:, :some], products // L * some
        ways.append(Way(name="numpy int64 %", step=_call(_numpy, matrix, part, field.p), products=share))
        if galois is not None:
            ways.append(Way(name="galois", step=_in_galois(galois, field, matrix, part), products=share))
    return FieldCase(name=f"encode {field.name} N={N} U={U} L={L}", ways=tuple(ways))


def _sums(field: Field, U: int, L: int) -> FieldCase:
    weights, shares = _elements(field, 1, U), _elements(field, U, L)
    return _product_case(f"weighted sum {field.name} of {U} shares L={L}", field, weights, shares)


def _projections(field: Field, M: int, L: int) -> FieldCase:
    shares, rho = _elements(field, M, L), _elements(field, 4, L)
    return _product_case(f"4 projections {field.name} of {M} shares L={L}", field, shares, rho.T)


def _product_case(name: str, field: Field, matrix: Tensor, x: Tensor) -> FieldCase:
    products = matrix.shape[0] * x.numel()
    ways = [Way(name="anabranch", step=_call(multiply, matrix, x, field), products=products)]
    for isa in cpu.ISAS[-2::-1]:
        ways.append(Way(name=isa, step=_call(cpu.multiply, matrix, x, field.name, isa), products=products))
    ways.append(Way(name="numpy int64 %", step=_call(_numpy, matrix, x, field.p), products=products))
    return FieldCase(name=name, ways=tuple(ways))


def _accept(field: Field, words: int) -> FieldCase:
    stream = torch.randint(
        0, 256, (words * field.bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )

    words_as = np.dtype(np.uint32 if field.bytes == 4 else np.uint64)

    def in_numpy() -> Tensor:
        drawn = np.bitwise_and(stream.numpy().view(words_as), words_as.type((1 << field.bits) - 1))
        return torch.from_numpy(drawn[drawn < field.p].view(np.int32 if field.bytes == 4 else np.int64))

    ways = [Way(name="anabranch", step=lambda: accept(stream, field), products=words)]
    for isa in cpu.ISAS[-2::-1]:
        ways.append(Way(name=isa, step=_call(cpu.accept, stream, field.name, isa), products=words))
    ways.append(Way(name="numpy", step=in_numpy, products=words))
    return FieldCase(name=f"accept {field.name} {words} words", ways=tuple(ways))


def _elements(field: Field, *shape: int) -> Tensor:
    out = prefer_huge_pages(torch.empty(shape, dtype=field.dtype))
    out.copy_(torch.randint(0, min(field.p, 2**62), shape, generator=torch.Generator().manual_seed(2)))
    return out


def _call(function: Callable[..., Tensor], *arguments: Any) -> Step:
    return lambda: function(*arguments)


def _numpy(matrix: Tensor, x: Tensor, p: int) -> Tensor:
    """What int64 allows: each product is reduced before it is added."""
    left, right = matrix.numpy().astype(np.int64), x.numpy().astype(np.int64)
    if right.shape[1] < left.shape[0]:
        return torch.from_numpy(np.stack([(left * column % p).sum(1) % p for column in right.T], 1).astype(np.int32))
    total = np.zeros((left.shape[0], right.shape[1]), dtype=np.int64)
    for column, row in zip(left.T, right, strict=True):
        total += column[:, None] * row % p
    return torch.from_numpy((total % p).astype(np.int32))


def _galois() -> tuple[Any, list[str]]:
    try:
        import galois
    except ImportError:
        return None, ["galois is not installed (pip install galois)"]
    return galois, []


def _in_galois(galois: Any, field: Field, matrix: Tensor, x: Tensor) -> Step:
    numbers = galois.GF(field.p, primitive_element=field.generator, verify=False)
    left, right = numbers(matrix.numpy().astype(np.int64)), numbers(x.numpy().astype(np.int64))
    return lambda: torch.from_numpy(np.asarray(left @ right).astype(np.int32))


def _row(sample: FieldSample, first: FieldSample) -> tuple[str, ...]:
    seconds = sorted(sample.seconds)
    low, high = (seconds[round(share * (len(seconds) - 1))] for share in (0.1, 0.9))
    return (
        sample.case,
        sample.contender,
        f"{median(seconds) * 1e3:.3f}",
        f"{low * 1e3:.3f} … {high * 1e3:.3f}",
        f"{sample.rate / 1e9:.3f}",
        f"{first.rate / sample.rate:.2f}",
    )
