"""AdaLoRA: all layers start with more ranks than the budget has, and the least important are masked along the way.

arXiv 2303.10512 (ICLR 2023). A rank is a triplet (column of P, number in L, row of Q) of something like an SVD:

    dW = (alpha / r0) P L Q       P^T P = Q Q^T = I by a penalty, L diagonal
    I = |w dL/dw| of each number;  S = beta1 S + (1 - beta1) I,  U = beta2 U + (1 - beta2) |I - S|,  s = S U
    score of a triplet:  s(l_i) + mean_j s(P_ji) + mean_j s(Q_ij)
    budget b(t):  r0 M before `warmup`;  r M + (r0 - r) M (1 - (t - warmup) / (T - warmup - final))^3;  r M in the end

Every `interval` steps the l_i outside the b(t) best triplets of all layers become zero. They still get gradients and
may come back, until `final` steps before the end; then the mask stays.

From the paper       all of the above, also that L starts at zero and that r0 is half as much again as r.
From its code        the scale (by PEFT, alpha / (r0 + 1e-5)), P and Q normal with deviation 0.02.
Reconstructed here   of triplets with equal scores the earlier one stays, so that the budget is met exactly.
Shared               low_rank.py: the branch is x (L Q)^T P^T of all r0 ranks, and the penalty is TriAdapt's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anabranch.adapters.low_rank import low_rank, orthogonality
from anabranch.adapters.packed import Packed, without_router
from anabranch_kernels.rank_lora.op import Adapter, table_of

PARTS = ("a", "e", "b")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaLoraSettings:
    """Of all adapted layers together.

    initial     r0, ranks of every layer at the start
    target      r, mean of the ranks that remain: the budget is target * layers
    warmup      steps before the budget falls
    final       steps at the end in which the mask stays
    interval    steps between masks
    steps       of the whole training
    alpha       dW is scaled by alpha / initial
    beta1       of the moving average of sensitivities
    beta2       of the moving average of their uncertainties
    orthogonality  weight of the penalty, the mean over all P and Q of ||Q Q^T - I||_F
    """

    initial: int = 12
    target: int = 8
    warmup: int = 0
    final: int = 0
    interval: int = 1
    steps: int
    alpha: float = 16.0
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.target <= self.initial:
            raise ValueError(f"need 1 <= target <= initial, got {self.target} and {self.initial}")
        if self.interval < 1 or self.warmup < 0 or self.final < 0 or self.warmup >= self.steps - self.final:
            raise ValueError(f"need interval >= 1, warmup >= 0, final >= 0 and warmup + final < steps, got {self}")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1) or not self.orthogonality >= 0:
            raise ValueError(f"need betas between 0 and 1 and orthogonality of at least 0, got {self}")


class AdaLora(nn.Module):
    """The branch beside one linear layer.

    a      [r0, inputs]   Q
    e      [r0, 1]        the diagonal of L
    b      [r0, outputs]  P, stored by rank
    alive  [r0] bool      which the last mask kept; `sensitivity_*` and `uncertainty_*` are the moving averages
    """

    alive: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        settings: AdaLoraSettings,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings

        def normal(width: int) -> nn.Parameter:
            values = torch.empty(settings.initial, width, device=device).normal_(std=0.02, generator=generator)
            return nn.Parameter(values.to(dtype))

        self.a, self.b = normal(inputs), normal(outputs)
        self.e = nn.Parameter(torch.zeros(settings.initial, 1, dtype=dtype, device=device))
        self.register_buffer("alive", torch.ones(settings.initial, dtype=torch.bool, device=device))
        for part in PARTS:
            for average in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{average}_{part}", torch.zeros_like(getattr(self, part).detach()))
        self._place()

    def _place(self) -> None:
        self._table = table_of([Adapter(first_rank=0, ranks=self.settings.initial, scale=self.scale)], self.a.device)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place()
        return self

    @property
    def rank(self) -> int:
        return int(self.alive.sum())

    @property
    def scale(self) -> float:
        return self.settings.alpha / (self.settings.initial + 1e-5)

    def forward(self, x: Tensor, adapter_of: Tensor | None = None) -> Tensor:
        """x [..., inputs], adapter_of [tokens] int32: 0 for tokens that take part, -1 for padding; all do if None."""
        return low_rank(x, (self.e * self.a).to(x.dtype), self.b.to(x.dtype), self._table, adapter_of)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the branch adds to the weight [outputs, inputs]."""
        return self.scale * self.b.T @ (self.e * self.a)

    @staticmethod
    def shapes(inputs: int, outputs: int, settings: AdaLoraSettings) -> dict[str, list[int]]:
        """Of the tensors in its state dict."""
        r0 = settings.initial
        trained = {"a": [r0, inputs], "e": [r0, 1], "b": [r0, outputs]}
        averages = {f"{kind}_{part}": trained[part] for part in PARTS for kind in ("sensitivity", "uncertainty")}
        return {**trained, "alive": [r0], **averages}

    @torch.no_grad()
    def packed(self) -> Packed:
        """As the op reads it, for inference: a plain LoRA of the ranks that live."""
        return without_router((self.e * self.a)[self.alive], self.b[self.alive], self.scale)

    @torch.no_grad()
    def observe(self) -> None:
        """Take the gradients of this step into the moving averages."""
        s = self.settings
        for part in PARTS:
            weight = self.get_parameter(part)
            assert weight.grad is not None
            sensitivity, uncertainty = (self.get_buffer(f"{kind}_{part}") for kind in ("sensitivity", "uncertainty"))
            now = (weight * weight.grad).abs_()
            sensitivity.lerp_(now, 1 - s.beta1)
            uncertainty.lerp_(now.sub_(sensitivity).abs_(), 1 - s.beta2)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """[r0] of the triplets."""
        means = [
            (self.get_buffer(f"sensitivity_{part}") * self.get_buffer(f"uncertainty_{part}")).mean(1) for part in PARTS
        ]
        return torch.stack(means).sum(0)

    @torch.no_grad()
    def mask(self) -> None:
        """Zero in L what is not alive."""
        self.e[~self.alive] = 0.0


class Pruning:
    """Which triplets stay; call `look` after every optimiser step, while the gradients are still there."""

    def __init__(self, settings: AdaLoraSettings, layers: Mapping[str, AdaLora]) -> None:
        self.settings, self.layers = settings, layers

    @property
    def total(self) -> int:
        return sum(layer.rank for layer in self.layers.values())

    def budget(self, step: int) -> int:
        """Triplets of all layers together that may stay at this step."""
        s, layers = self.settings, len(self.layers)
        if step <= s.warmup:
            return s.initial * layers
        left = max(0.0, 1 - (step - s.warmup) / (s.steps - s.final - s.warmup))
        return int((s.initial - s.target) * layers * left**3 + s.target * layers)

    def look(self, step: int) -> list[str]:
        """Observe the gradients, and mask when it is due; returns the layers whose rank changed. Steps count from 1."""
        s = self.settings
        last = s.steps - s.final
        if step < last:
            for layer in self.layers.values():
                layer.observe()
        due = step == last or (s.warmup < step < last and step % s.interval == 0)
        changed = self.keep(self.budget(step)) if due else []
        if due or step > last:
            for layer in self.layers.values():
                layer.mask()
        return changed

    @torch.no_grad()
    def keep(self, budget: int) -> list[str]:
        """Let the `budget` best triplets of all layers live, and no others; returns the layers whose rank changed."""
        best = torch.cat([layer.scores() for layer in self.layers.values()]).sort(descending=True, stable=True).indices
        alive = torch.zeros(len(best), dtype=torch.bool, device=best.device)
        alive[best[:budget]] = True
        before = [layer.rank for layer in self.layers.values()]
        for layer, part in zip(self.layers.values(), alive.split(self.settings.initial), strict=True):
            layer.alive.copy_(part)
        return [name for (name, layer), rank in zip(self.layers.items(), before, strict=True) if layer.rank != rank]

    def penalty(self) -> Tensor | None:
        """The weighed penalty of all layers' P and Q; None without one."""
        weight = self.settings.orthogonality
        return weight * orthogonality((layer.a, layer.b) for layer in self.layers.values()) if weight else None
