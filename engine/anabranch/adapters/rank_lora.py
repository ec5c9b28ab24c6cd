"""LoRA, mixtures of LoRA experts and SMoRA in one layer: ranks in blocks, of which each token picks some.

SMoRA, arXiv 2501.15103 (KDD 2026). One pair A, B of r ranks; block g of q ranks is an expert; a router scores blocks
for each token and the k best take part, weighted by their gates:

    y = W0 x + scale * sum over picked blocks g of  gate_g  B[:, g] A[g, :] x

q = 1 is SMoRA, q = r / E a mixture of E experts of rank q (MoE-LoRA), no router is LoRA.

From the paper       the equivalence of the three, the softmax gate, balancing without an auxiliary loss.
From its code        the sigmoid gate, whose biased scores are also the weights; u = 1e-5; initial values.
Reconstructed here   the router has one row a block (the code repeats it and lets the copies drift apart); counts are
                     summed over all processes; tokens of padding count nowhere.
Shared               the op anabranch_kernels.rank_lora.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anabranch.adapters.packed import Packed
from anabranch_kernels.rank_lora.op import Adapter, rank_lora, table_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoraSettings:
    """Of each adapted layer.

    ranks     r, all of them
    chosen    blocks that a token picks; None for plain LoRA, in which every token has every rank
    block     q: ranks in a block
    gate      "softmax_topk", "sigmoid_renorm" or "sigmoid_renorm_unbiased" (see the op)
    alpha     the branch's scale: alpha / ranks for LoRA; alpha where gates sum to one
    balance   u: how far a step moves a block's bias towards equal counts; 0 for none
    """

    ranks: int
    chosen: int | None = None
    block: int = 1
    gate: str = "sigmoid_renorm_unbiased"
    alpha: float = 16.0
    balance: float = 1e-4

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.block < 1 or self.ranks % self.block:
            raise ValueError(f"ranks must be a positive multiple of block, got {self.ranks} and {self.block}")
        if self.balance < 0:
            raise ValueError(f"balance must not be negative, got {self.balance}")
        self.place()

    def place(self) -> Adapter:
        """As the op reads it, the layer's own tensors holding nothing else. ValueError for what cannot be."""
        if self.chosen is None:
            return Adapter(first_rank=0, ranks=self.ranks, scale=self.alpha / self.ranks)
        return Adapter(
            first_rank=0, ranks=self.ranks, rows=self.ranks // self.block, chosen=self.chosen, gate=self.gate,
            scale=self.alpha,
        )  # fmt: skip


class RankLora(nn.Module):
    """The branch beside one linear layer, [..., inputs] -> [..., outputs]; exactly zero before it is trained.

    a       [r, inputs]     uniform within 1 / sqrt(inputs)
    b       [r, outputs]    B stored by rank; zero
    router  [r / q, inputs]  as `a`; no rows for plain LoRA
    bias    [r / q]          float32, a buffer: no gradient, no weight decay; moved by `rebalance`
    counts  [r / q]          tokens that picked each block since the last `rebalance`, in training only
    """

    bias: Tensor
    counts: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        settings: RankLoraSettings,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        place = settings.place()

        def uniform(rows: int) -> nn.Parameter:
            bound = inputs**-0.5
            values = torch.empty(rows, inputs, device=device).uniform_(-bound, bound, generator=generator)
            return nn.Parameter(values.to(dtype))

        self.a = uniform(settings.ranks)
        self.b = nn.Parameter(torch.zeros(settings.ranks, outputs, dtype=dtype, device=device))
        self.router = uniform(place.rows)
        self.register_buffer("bias", torch.zeros(place.rows, device=device))
        self.register_buffer("counts", torch.zeros(place.rows, dtype=torch.int64, device=device), persistent=False)
        self._table = table_of([place], device)

    def forward(self, x: Tensor, adapter_of: Tensor | None = None) -> Tensor:
        """x [..., inputs], adapter_of [tokens] int32: 0 for tokens that take part, -1 for padding; all do if None."""
        rows = x.reshape(-1, x.shape[-1])
        if adapter_of is None:
            adapter_of = torch.zeros(len(rows), dtype=torch.int32, device=x.device)
        a, b, router = (weight.to(x.dtype) for weight in (self.a, self.b, self.router))  # trained in float32, perhaps
        routed = rank_lora(rows, a, b, router, self.bias, self._table, adapter_of)
        if self.training:
            self.counts += routed.counts
        return routed.y.view(*x.shape[:-1], -1)

    @staticmethod
    def shapes(inputs: int, outputs: int, settings: RankLoraSettings) -> dict[str, list[int]]:
        """Of the tensors in its state dict."""
        r, rows = settings.ranks, settings.place().rows
        return {"a": [r, inputs], "b": [r, outputs], "router": [rows, inputs], "bias": [rows]}

    def packed(self) -> Packed:
        """As the op reads it, for inference."""
        return Packed(self.settings.place(), self.a.detach(), self.b.detach(), self.router.detach(), self.bias)

    @torch.no_grad()
    def rebalance(self) -> Tensor:
        """Once after each optimiser step: a block picked less than the mean gains u, one picked more loses u.

        Counts are summed over all processes of torch.distributed, so that the bias stays the same on each.
        Returns them, [r / q] int64, and begins to count anew.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)
        picked = self.counts.double()
        self.bias += self.settings.balance * torch.sign(picked.mean() - picked).float() if len(picked) else 0.0
        counted = self.counts.clone()
        self.counts.zero_()
        return counted

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What plain LoRA adds to the weight [outputs, inputs]. ValueError where gates depend on x."""
        if self.settings.chosen is not None:
            raise ValueError("gates depend on each token, so this adapter cannot be merged into the weight")
        return self.settings.place().scale * self.b.T @ self.a

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.bias = self.bias.float()
        self._table = table_of([self.settings.place()], self.a.device)
        return self
