"""TriAdaptLoRA: each adapted matrix has its own rank, and ranks grow during training under one budget.

arXiv 2501.08008. An r x r matrix C between A and B is kept as a lower and an upper triangular part, so that a further
rank appends a row block to one, a column block to the other, and changes nothing that is there:

    dW = (alpha / r) B (Lo + Up) A          N_m = ||Lo_m + Up_m||_F / size,   I_m = N_m now - N_m at the last look
    every `interval` steps after `warmup`:   the n layers with the largest I_m gain q ranks each
    n = floor((R_max - R) c) "linear", floor((R_max - R)^c) "power", or constant;  c = share of the steps done

From the paper       the two triangles, importance by the normalised Frobenius norm, the growth rules, the budget.
From its code        q = half the reference rank, alpha over the current rank.
Reconstructed here   initial values: A normal, C the identity, B zero, which keeps the output at each growth and lets
                     gradients through (with all three zero, as published, nothing could learn); the identity is left
                     out of the norm; n is cut so that the budget holds; ties go to the earlier layer.
Shared               low_rank.py computes x (C A)^T B^T, and the penalty that keeps rows of A and of B orthonormal.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from anabranch.adapters.low_rank import low_rank, orthogonality
from anabranch.adapters.packed import Packed, without_router
from anabranch_kernels.rank_lora.op import Adapter, table_of

MODELS = ("linear", "power", "constant")
NORMS = ("rank", "blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class TriAdaptSettings:
    """Of all adapted layers together.

    initial     rank of every layer at the start
    reference   mean rank at the end: the budget is reference * layers
    step        q: ranks that a layer gains at a time; half the reference if None
    capacity    most ranks of one layer; 4 * reference if None
    model       "linear", "power" or "constant": how many layers grow at a look
    most        layers that grow at a look of the "constant" model
    warmup      steps before the first look
    interval    steps between looks
    steps       of the whole training
    alpha       dW is scaled by alpha / r, or by alpha / reference with keep_scale, which leaves old ranks as they are
    norm        importance is divided by the "rank" or by the number of "blocks"
    orthogonality  weight of the penalty, the mean over all A and B of ||A A^T - I||_F; 0 for none
    """

    initial: int = 1
    reference: int = 8
    step: int | None = None
    capacity: int | None = None
    model: str = "linear"
    most: int = 1
    warmup: int = 0
    interval: int = 100
    steps: int
    alpha: float = 16.0
    keep_scale: bool = True
    norm: str = "rank"
    orthogonality: float = 0.0

    def __post_init__(self) -> None:
        if self.model not in MODELS or self.norm not in NORMS:
            raise ValueError(f"model must be one of {MODELS} and norm of {NORMS}, got {self.model!r}, {self.norm!r}")
        if not 1 <= self.initial <= self.reference <= self.most_ranks:
            raise ValueError(
                f"need 1 <= initial <= reference <= capacity, got {self.initial}, {self.reference}, {self.most_ranks}"
            )
        if self.gained < 1 or self.most < 1 or self.interval < 1 or self.warmup < 0 or self.steps <= self.warmup:
            raise ValueError(f"need step, most and interval of at least 1 and 0 <= warmup < steps, got {self}")
        if not self.orthogonality >= 0:
            raise ValueError(f"orthogonality must not be negative, got {self.orthogonality}")

    @property
    def gained(self) -> int:
        return max(1, self.reference // 2) if self.step is None else self.step

    @property
    def most_ranks(self) -> int:
        return 4 * self.reference if self.capacity is None else self.capacity


class _Fold(torch.autograd.Function):
    """C A and the living rows of B as one node of the graph; built from slices, products and masks it has twenty."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, lower: Tensor, upper: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
        C = _centre(lower, upper, below)
        ctx.save_for_backward(a, C, below)
        return C @ a[: len(C)], b[: len(C)].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, mixed: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
        a, C, below = ctx.saved_tensors
        rank, capacity = len(C), len(a)
        da, db = a.new_empty(a.shape), b.new_empty(capacity, b.shape[1])
        torch.mm(C.T, mixed, out=da[:rank])
        db[:rank] = b
        da[rank:].zero_()
        db[rank:].zero_()
        dC = mixed @ a[:rank].T
        lower, upper = (C.new_zeros(capacity, capacity) for _ in range(2))
        torch.mul(dC, below, out=lower[:rank, :rank])
        torch.mul(dC, below.T, out=upper[:rank, :rank])
        return da, db, lower, upper, None


_fold: Callable[..., tuple[Tensor, Tensor]] = _Fold.apply


def _centre(lower: Tensor, upper: Tensor, below: Tensor) -> Tensor:
    """C [rank, rank]: Lo where `below` is one, on and below the diagonal of blocks, and Up on and above it."""
    alive = slice(0, len(below))
    return torch.addcmul(lower[alive, alive] * below, upper[alive, alive], below.T)


class TriAdapt(nn.Module):
    """The branch beside one linear layer. Its buffers hold `capacity` ranks, of which `rank` are alive.

    a [capacity, inputs], b [capacity, outputs], lower and upper [capacity, capacity]; what is not alive stays zero and
    gets no gradient, so an optimiser's moments of old entries do not change when the rank grows.
    """

    blocks: Tensor
    seen: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        settings: TriAdaptSettings,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.rank = settings, 0
        self._seed = int(
            torch.randint(2**31, (), generator=generator, device=device)
        )  # a resumed run grows the same ranks
        capacity = settings.most_ranks
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        self.a, self.b = nn.Parameter(zeros(capacity, inputs)), nn.Parameter(zeros(capacity, outputs))
        self.lower, self.upper = (nn.Parameter(zeros(capacity, capacity)) for _ in range(2))
        # The growth step at which each rank came; a rank that is not alive has none.
        self.register_buffer("blocks", torch.full((capacity,), -1, device=device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64, device=device))  # importance, last look
        self.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
            lambda module, _: module.count()
        )
        self.grow(settings.initial)
        self.seen.copy_(self.importance())

    @torch.no_grad()
    def grow(self, ranks: int) -> None:
        """Append ranks, at most up to the capacity: A normal, the diagonal of Lo one, B zero."""
        if ranks < 1 or self.rank + ranks > len(self.a):
            raise ValueError(f"cannot grow by {ranks}: rank {self.rank} of at most {len(self.a)}")
        new = slice(self.rank, self.rank + ranks)
        random = torch.Generator().manual_seed(self._seed + self.rank)
        self.a[new] = (0.02 * torch.randn(ranks, self.a.shape[1], generator=random)).to(self.a)
        self.lower[new, new].fill_diagonal_(1.0)
        self.blocks[new] = int(self.blocks.max()) + 1
        self.count()

    def count(self) -> None:
        """The rank, and what follows from it, from the blocks that there are."""
        self.rank = int((self.blocks >= 0).sum())
        came = self.blocks[: self.rank]
        self._below = (came[:, None] >= came[None, :]).to(self.lower.dtype)
        self._table = table_of([Adapter(first_rank=0, ranks=self.rank, scale=self.scale)], self.a.device)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.count()
        return self

    @property
    def scale(self) -> float:
        return self.settings.alpha / (self.settings.reference if self.settings.keep_scale else self.rank)

    def centre(self) -> Tensor:
        """C [rank, rank]."""
        return _centre(self.lower, self.upper, self._below)

    def forward(self, x: Tensor, adapter_of: Tensor | None = None) -> Tensor:
        mixed, b = _fold(self.a, self.b, self.lower, self.upper, self._below)
        return low_rank(x, mixed.to(x.dtype), b.to(x.dtype), self._table, adapter_of)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The living rows of A and of B."""
        return self.a[: self.rank], self.b[: self.rank]

    @staticmethod
    def shapes(inputs: int, outputs: int, settings: TriAdaptSettings) -> dict[str, list[int]]:
        """Of the tensors in its state dict."""
        most = settings.most_ranks
        square, once = [most, most], {"blocks": [most], "seen": list[int]()}
        return {"a": [most, inputs], "b": [most, outputs], "lower": square, "upper": square, **once}

    @torch.no_grad()
    def packed(self) -> Packed:
        """As the op reads it, for inference: with C in A, a plain LoRA of its present rank."""
        a, b = _fold(self.a, self.b, self.lower, self.upper, self._below)
        return without_router(a, b.clone(), self.scale)  # without the room to grow

    @torch.no_grad()
    def importance(self) -> Tensor:
        """||C - I||_F over the rank, or over the number of blocks; a float32 scalar on the layer's device."""
        C = self.centre().float()
        size = self.rank if self.settings.norm == "rank" else self.blocks.max() + 1
        C.diagonal().sub_(1.0)
        norm: Tensor = C.norm()
        return norm / size

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the branch adds to the weight [outputs, inputs]."""
        return self.scale * self.b[: self.rank].T @ (self.centre() @ self.a[: self.rank])


class Growth:
    """Who grows and when; call `look` after every optimiser step."""

    def __init__(self, settings: TriAdaptSettings, layers: Mapping[str, TriAdapt]) -> None:
        self.settings, self.layers = settings, layers

    @property
    def budget(self) -> int:
        return self.settings.reference * len(self.layers)

    @property
    def total(self) -> int:
        return sum(layer.rank for layer in self.layers.values())

    def wanted(self, step: int) -> int:
        """Layers that may grow at this step."""
        s = self.settings
        left, share = self.budget - self.total, (step - s.warmup) / (s.steps - s.warmup)
        if s.model == "constant":
            count = s.most
        else:
            count = int(left * share) if s.model == "linear" else int(max(left, 1) ** share)
        return min(max(count, 1), len(self.layers))

    def look(self, step: int) -> list[str]:
        """Grow the layers whose importance rose most since the last look; returns their names. Steps count from 1."""
        s = self.settings
        if step <= s.warmup or (step - s.warmup) % s.interval or self.total >= self.budget:
            return []
        rise = dict(zip(self.layers, self.rise().tolist(), strict=True))  # one wait for the device
        order = sorted(rise, key=lambda name: -rise[name])  # stable: ties go to the earlier layer
        grown = []
        for name in order[: self.wanted(step)]:
            layer = self.layers[name]
            ranks = min(s.gained, self.budget - self.total, len(layer.a) - layer.rank)
            if ranks < 1:
                continue
            layer.grow(ranks)
            grown.append(name)
        return grown

    def rise(self) -> Tensor:
        """[layers] by how much the importance of each rose since it was asked for last."""
        levels = torch.stack([layer.importance().double() for layer in self.layers.values()])
        seen = [layer.seen for layer in self.layers.values()]
        rise = levels - torch.stack(seen)
        for before, level in zip(seen, levels, strict=True):
            before.copy_(level)
        return rise

    def penalty(self) -> Tensor | None:
        """The weighed penalty of all layers' A and B; None without one."""
        weight = self.settings.orthogonality
        return weight * orthogonality(layer.pair() for layer in self.layers.values()) if weight else None
