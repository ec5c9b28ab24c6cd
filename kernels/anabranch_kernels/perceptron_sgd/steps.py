"""Perceptrons that take their steps together, one at a time, with losses that are computed elsewhere. CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu
from .op import check_rows


class PerceptronSteps:
    """The rows of N perceptrons while they are trained, in the kernel's own order; see `perceptron_sgd` for the rest.

    rows, velocity  [N, D] float32     as they are now; `finish` writes into them
    widths          (F, hidden..., C)  as of `perceptron_sgd`
    batch           samples of a step, at most

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """

    def __init__(
        self, rows: Tensor, velocity: Tensor, *, widths: Sequence[int], batch: int, isa: str | None = None
    ) -> None:
        check_rows(rows, velocity, widths, batch)
        if rows.device.type != "cpu":
            raise ValueError(f"steps are taken on the CPU, got rows on {rows.device}")
        self.widths, self.batch = tuple(widths), batch
        self._rows, self._velocity = rows, velocity
        self._steps, self._states = cpu.load_steps(rows, velocity, widths, batch, isa)
        self._seen = 0, 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What they say of x [M, B, F] float32: logits [N, B, C] and features [N, B, d], which the last layer reads.

        N is a multiple of M: perceptron i is shown x[i % M]. Without hidden layers the features are x's.
        """
        N, (F, *hidden, C) = len(self._rows), self.widths
        B = x.shape[1] if x.ndim == 3 else 0
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[-1] != F or not 0 < B <= self.batch:
            raise ValueError(
                f"x must be [M, 1 to {self.batch}, {F}] float32 on the CPU, got {list(x.shape)} {x.dtype} on {x.device}"
            )
        if not len(x) or N % len(x):
            raise ValueError(f"{N} perceptrons cannot be shown {len(x)} batches evenly")
        x = x.contiguous()
        logits = x.new_empty(N, B, C)
        features = x.new_empty(N, B, hidden[-1]) if hidden else x.repeat(N // len(x), 1, 1)
        self._seen = len(x), B
        self._steps.forward(
            x.data_ptr(), len(x), B, logits.data_ptr(), features.data_ptr() if hidden else 0, torch.get_num_threads()
        )
        return logits, features

    def step(
        self,
        logits: Tensor,
        features: Tensor | None,
        live: Tensor,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        """Go down the slopes [N, B, C] of the latest logits and, if a loss looks at them, [N, B, d] of the features.

        live [M] bool: a perceptron whose entry is false stays as it is. Raises ValueError for other shapes or dtypes.
        """
        (M, B), N, (*_, d, C) = self._seen, len(self._rows), self.widths
        for name, slopes, width in (("logits", logits, C), ("features", features, d)):
            if slopes is not None and (slopes.shape != (N, B, width) or slopes.dtype != torch.float32):
                raise ValueError(
                    f"slopes of {name} must be {[N, B, width]} float32, got {list(slopes.shape)} {slopes.dtype}"
                )
        if live.shape != (M,) or live.dtype != torch.bool:
            raise ValueError(f"live must be {[M]} bool, got {list(live.shape)} {live.dtype}")
        logits, live = logits.contiguous(), live.contiguous()
        features = None if features is None or len(self.widths) == 2 else features.contiguous()
        self._steps.step(
            (lr, momentum, weight_decay), logits.data_ptr(), 0 if features is None else features.data_ptr(),
            live.data_ptr(), M, B, torch.get_num_threads(),
        )  # fmt: skip

    def finish(self) -> None:
        """Bring rows and velocity up to the latest step."""
        self._steps.unload(self._rows.data_ptr(), self._velocity.data_ptr(), torch.get_num_threads())
