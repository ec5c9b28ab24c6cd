"""Low-rank adapters whose ranks are experts: every token picks its ranks, every token may have another adapter.

    y_t = scale * sum over ranks i that t picked of  gate_t(i) <A_i, x_t> B_i        (SMoRA, arXiv 2501.15103)

Ranks are picked in blocks of q: q = 1 is SMoRA, q = r / E a mixture of E small adapters, and plain LoRA is the case
without a router, in which every token has all ranks and every gate is one. Between these is one number.

    z = p + bias, p = sigmoid(x W^T) or x W^T: one score for each block; the k best are picked, ties by the lower index
    "softmax_topk"             gate = softmax of the picked z                            the paper's form
    "sigmoid_renorm"           gate = z / sum of the picked z, z at least 2^-20          what the authors released
    "sigmoid_renorm_unbiased"  gate = p / sum of the picked p; the bias only steers      recommended

Forward and backward are two ops; a torch.autograd.Function ties them together when a gradient is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import define
from ..tensors import described, sum_dtype
from . import cpu, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GATES = ("constant", "softmax_topk", "sigmoid_renorm", "sigmoid_renorm_unbiased")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Where one adapter lies in the tensors that hold all, and how its tokens choose.

    first_rank, ranks   its rows of `a` and `b`
    first_row, rows     its rows of `router` and `bias`: `rows` blocks of ranks / rows ranks; 0 rows for "constant"
    chosen              blocks that a token picks
    gate                one of GATES
    scale               of the branch: alpha / r for LoRA; alpha where gates sum to one
    """

    first_rank: int
    ranks: int
    first_row: int = 0
    rows: int = 0
    chosen: int = 0
    gate: str = "constant"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {GATES}, got {self.gate!r}")
        if self.ranks < 0 or self.first_rank < 0 or self.first_row < 0:
            raise ValueError(f"places and numbers of ranks must not be negative, got {self}")
        if self.gate == "constant":
            if self.rows or self.chosen:
                raise ValueError(f"a constant gate has no router, got rows={self.rows}, chosen={self.chosen}")
        elif not 1 <= self.chosen <= self.rows or self.ranks % self.rows:
            raise ValueError(
                f"need 1 <= chosen <= rows and ranks a multiple of rows, got chosen={self.chosen}, rows={self.rows}, "
                f"ranks={self.ranks}"
            )

    @property
    def active(self) -> int:
        """Ranks that a token uses."""
        return self.ranks if self.gate == "constant" else self.chosen * (self.ranks // self.rows)


class Table(NamedTuple):
    """Adapters as the kernels read them.

    places   [A, 6] int32    first_rank, ranks, first_row, rows, chosen, index into GATES
    scales   [A]    float32
    chosen   most blocks that a token of any of them picks
    active   most ranks that a token of any of them uses
    rows     most blocks of any of them
    ranks    most ranks of any of them
    """

    places: Tensor
    scales: Tensor
    chosen: int
    active: int
    rows: int
    ranks: int


def table_of(adapters: Sequence[Adapter], device: torch.device | str = "cpu") -> Table:
    places = [[a.first_rank, a.ranks, a.first_row, a.rows, a.chosen, GATES.index(a.gate)] for a in adapters]
    return Table(
        torch.tensor(places, dtype=torch.int32, device=device).reshape(len(adapters), 6),
        torch.tensor([a.scale for a in adapters], dtype=torch.float32, device=device),
        max((a.chosen for a in adapters), default=0),
        max((a.active for a in adapters), default=0),
        max((a.rows for a in adapters), default=0),
        max((a.ranks for a in adapters), default=0),
    )


class Routed(NamedTuple):
    """What the branch adds to each token, and how tokens chose.

    y        [T, O]            dtype of x; zero for tokens without an adapter
    counts   [G] int64         tokens that picked each block of the routers
    picked   [T, C] int32      blocks that each token picked, within its adapter, rising; -1 where it picked fewer
    gates    [T, C] float32    of these
    """

    y: Tensor
    counts: Tensor
    picked: Tensor
    gates: Tensor


_forward = define(
    "rank_lora_forward(Tensor x, Tensor a, Tensor b, Tensor router, Tensor bias, Tensor places, Tensor scales, "
    "Tensor adapter_of, int chosen, int active, int rows, int ranks) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.rank_lora_forward,
    cpu=cpu.rank_lora_forward,
    cuda=lambda *arguments: import_module(".gpu", __package__).rank_lora_forward(*arguments),
    fake=lambda x, a, b, router, bias, places, scales, adapter_of, chosen, active, rows, ranks: (
        x.new_empty(x.shape[0], b.shape[1]),
        x.new_empty(router.shape[0], dtype=torch.int64),
        x.new_empty(x.shape[0], chosen, dtype=torch.int32),
        x.new_empty(x.shape[0], chosen, dtype=sum_dtype(x)),
        x.new_empty(x.shape[0], active, dtype=sum_dtype(x)),
    ),
)

_add = define(
    "rank_lora_add(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor router, Tensor bias, Tensor places, "
    "Tensor scales, Tensor adapter_of, int chosen, int active, int rows, int ranks) -> ()",
    reference=reference.add_rank_lora,
    cpu=cpu.add_rank_lora,
    cuda=lambda *arguments: import_module(".gpu", __package__).add_rank_lora(*arguments),
    fake=lambda *arguments: None,
)

_add_fused = define(
    "rank_lora_add_fused(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor router, Tensor bias, Tensor places, "
    "Tensor scales, Tensor adapter_of, int[] parts, int chosen, int active, int rows, int ranks) -> ()",
    reference=reference.add_fused_rank_lora,
    cpu=cpu.add_fused_rank_lora,
    cuda=lambda *arguments: import_module(".gpu", __package__).add_fused_rank_lora(*arguments),
    fake=lambda *arguments: None,
)

_backward = define(
    "rank_lora_backward(Tensor grad, Tensor x, Tensor a, Tensor b, Tensor router, Tensor bias, Tensor places, "
    "Tensor scales, Tensor adapter_of, Tensor picked, Tensor gates, Tensor h, int rows, int ranks) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.rank_lora_backward,
    cpu=cpu.rank_lora_backward,
    cuda=lambda *arguments: import_module(".gpu", __package__).rank_lora_backward(*arguments),
    fake=lambda grad, x, a, b, router, *rest: tuple(t.new_empty(t.shape) for t in (x, a, b, router)),
)


class _RankLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, table: Table, adapter_of: Tensor
    ) -> tuple[Tensor, ...]:
        places, scales, *sizes = table
        y, counts, picked, gates, h = _forward(x, a, b, router, bias, places, scales, adapter_of, *sizes)
        ctx.sizes = table.rows, table.ranks
        ctx.save_for_backward(x, a, b, router, bias, places, scales, adapter_of, picked, gates, h)
        ctx.mark_non_differentiable(counts, picked, gates)
        return y, counts, picked, gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        return (*_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.sizes), None, None, None)


_differentiable: Callable[..., tuple[Tensor, ...]] = _RankLora.apply


def rank_lora(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    router: Tensor,
    bias: Tensor,
    table: Table,
    adapter_of: Tensor,
) -> Routed:
    """What the adapters of a linear layer add to its output.

    x           [T, D]         float64, float32, bfloat16 or float16
    a           [R, D]         dtype of x: rows of A of all adapters, one after another in any order
    b           [R, O]         dtype of x: columns of B, stored by rank
    router      [G, D]         dtype of x
    bias        [G] float32    added to the scores of blocks; balances the load and has no gradient
    table       Table          where each adapter lies (table_of)
    adapter_of  [T] int32      of each token; -1 for none
    returns     Routed; y is differentiable once in x, a, b and router

    Scores are computed in float32 (float64 for float64 x). A padding token is one without an adapter: it counts
    nowhere. Results do not depend on the order of tokens, and backward sums in a fixed order.
    Raises ValueError for shapes, dtypes and devices that do not fit.
    """
    _check(x, a, b, router, bias, table, adapter_of)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, a, b, router)):
        return Routed(*_differentiable(x, a, b, router, bias, table, adapter_of))
    return Routed(*_forward(x, a, b, router, bias, table.places, table.scales, adapter_of, *table[2:])[:4])


def add_rank_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, table: Table, adapter_of: Tensor
) -> None:
    """Add what the adapters of a linear layer say to its output y [T, O], in place; for inference, no gradient.

    y   dtype of x; rows may lie apart, so it may be some columns of a wider output. Rows of tokens without an adapter
        are not touched

    All else as in `rank_lora`.
    """
    _check(x, a, b, router, bias, table, adapter_of)
    if y.shape != (x.shape[0], b.shape[1]) or y.dtype != x.dtype or y.device != x.device:
        raise ValueError(f"y must be [{x.shape[0]}, {b.shape[1]}] {x.dtype} on {x.device}, got {described(y)}")
    _add(y, x, a, b, router, bias, table.places, table.scales, adapter_of, *table[2:])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FusedAdapters:
    """Adapters of a matrix product that computes P linear layers of one x at once, as a model stores q, k and v.

    a               [P, R, D]
    b               [R, O]            columns of B by rank, those of all layers side by side as in the product
    router          [P, G, D]
    bias            [P, G] float32
    places, scales  [P, A, 6], [P, A]  tables of each layer (see Table); an adapter without ranks there says nothing
    parts           three numbers for each layer that some adapter has: its index, its first column, the one after it
    sizes           chosen, active, rows and ranks as in Table, over all layers

    All of a, b and router have one dtype and one device and lie row by row. They are checked here, once, so that
    a call costs little; tables and weights may change in place as long as the sizes hold. ValueError for what does not
    fit.
    """

    a: Tensor
    b: Tensor
    router: Tensor
    bias: Tensor
    places: Tensor
    scales: Tensor
    parts: tuple[int, ...]
    sizes: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        if self.a.ndim != 3 or self.a.dtype not in DTYPES:
            raise ValueError(f"a must be [P, R, D] in one of {list(DTYPES)}, got {described(self.a)}")
        P, R, D = self.a.shape
        G, A, O = self.router.shape[1], self.places.shape[1], self.b.shape[-1]
        for name, shape, dtype in (
            ("a", (P, R, D), self.a.dtype),
            ("b", (R, O), self.a.dtype),
            ("router", (P, G, D), self.a.dtype),
            ("bias", (P, G), torch.float32),
            ("places", (P, A, 6), torch.int32),
            ("scales", (P, A), torch.float32),
        ):
            tensor: Tensor = getattr(self, name)
            fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == self.a.device
            if not fits or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be {list(shape)} {dtype} on {self.a.device}, contiguous, got {described(tensor)}"
                )
        wrong = len(self.parts) % 3 or [
            part for part in _triples(self.parts) if not (0 <= part[0] < P and 0 <= part[1] < part[2] <= O)
        ]
        if wrong:
            raise ValueError(f"parts must be (index below {P}, columns within {O}) one after another, got {self.parts}")

    def add_to(self, y: Tensor, x: Tensor, adapter_of: Tensor) -> None:
        """Add what the adapters say of x [T, D] to the product's output y [T, O], in place; no gradient.

        adapter_of  [T] int32      of each token; -1 for none

        The same as `add_rank_lora` for each layer in turn. Raises ValueError for what does not fit.
        """
        T = len(x)
        if (
            x.shape != (T, self.a.shape[2]) or y.shape != (T, self.b.shape[1]) or adapter_of.shape != (T,)
            or not x.dtype == y.dtype == self.a.dtype or adapter_of.dtype != torch.int32
            or not x.device == y.device == adapter_of.device == self.a.device
        ):  # fmt: skip
            raise ValueError(
                f"x must be [T, {self.a.shape[2]}], y [T, {self.b.shape[1]}], both {self.a.dtype}, and adapter_of "
                f"[T] int32, on {self.a.device}; got {described(x)}, {described(y)}, {described(adapter_of)}"
            )
        _add_fused(
            y, x, self.a, self.b, self.router, self.bias, self.places, self.scales, adapter_of, self.parts, *self.sizes
        )


def _triples(parts: Sequence[int]) -> list[Sequence[int]]:
    return [parts[at : at + 3] for at in range(0, len(parts), 3)]


def _check(x: Tensor, a: Tensor, b: Tensor, router: Tensor, bias: Tensor, table: Table, adapter_of: Tensor) -> None:
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x must be [T, D] in one of {list(DTYPES)}, got {described(x)}")
    T, D = x.shape
    for name, tensor, shape, dtype in (
        ("a", a, (a.shape[0], D), x.dtype),
        ("b", b, (a.shape[0], b.shape[-1]), x.dtype),
        ("router", router, (router.shape[0], D), x.dtype),
        ("bias", bias, (router.shape[0],), torch.float32),
        ("adapter_of", adapter_of, (T,), torch.int32),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(f"{name} must be {list(shape)} {dtype} on {x.device}, got {described(tensor)}")
