"""Cases of TriAdaptLoRA: a training step beside LoRA and what was released, and the look that decides who grows.

All contenders of a step hold the same A and B, with C and L the identity, so that they compute the same; the learning
rate is zero, so that they still do in the next step. What they read, compute and write is that of any other step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.attach import attach
from anabranch.adapters.rank_lora import RankLora, RankLoraSettings
from anabranch.adapters.triadapt import Growth, TriAdapt, TriAdaptSettings
from anabranch.bench.timing import Case, Contender

INTERVAL = 50  # steps between two looks of ours, and between two masks of AdaLoRA
Step = Callable[[], Tensor]


class Nothing(nn.Module):
    """A layer whose weight is zero and costs nothing: what is left is the branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)


class Stack(nn.Module):
    """Linear layers one after another, each beside what it reads."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(len(weight), len(weight), bias=False) for weight in weights)
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Dense(nn.Module):
    """The released form of the branch: dW [outputs, inputs] is made in every forward, from lists of blocks."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale, (half, rest) = base, scale, (len(a) // 2, len(a) - len(a) // 2)
        self.a = nn.ParameterList(part.clone() for part in a.split([half, rest]))
        self.b = nn.ParameterList(part.T.clone() for part in b.split([half, rest]))
        whole = torch.eye(len(a))
        self.lower = nn.ParameterList([whole[:half, :half].clone(), whole[half:].clone()])
        self.upper = nn.ParameterList([torch.zeros(half, half), torch.zeros(len(a), rest)])

    def forward(self, x: Tensor) -> Tensor:
        r = self.upper[1].shape[0]
        lower = torch.cat([nn.functional.pad(part, (0, r - part.shape[1])) for part in self.lower])
        upper = torch.cat([nn.functional.pad(part, (0, 0, 0, r - part.shape[0])) for part in self.upper], 1)
        delta = self.scale * torch.cat(list(self.b), 1) @ (lower + upper) @ torch.cat(list(self.a))
        out: Tensor = self.base(x)
        return out + nn.functional.linear(x, delta)


def training_step(T: int, *, width: int, ranks: int, layers: int, base: bool) -> tuple[Case, list[str]]:
    """Forward, backward and AdamW of T tokens through `layers` adapted layers [width, width], float32.

    base   with the layers' own products, forward and to the input; without them the branches are left

    Beside it LoRA of the same rank, here and by PEFT, the form that makes dW, and the branch of PEFT's AdaLoRA; the
    second value names those that are not installed.
    """
    random = torch.Generator().manual_seed(T)
    weights = [torch.randn(width, width, generator=random) * width**-0.5 for _ in range(layers)]
    pairs = [[torch.randn(ranks, width, generator=random) * width**-0.5 for _ in "AB"] for _ in range(layers)]
    x, target = (torch.randn(T, width, generator=random) for _ in range(2))
    made: dict[str, nn.Module] = {
        "anabranch TriAdapt": _ours(weights, pairs, ranks, base, "triadapt"),
        "anabranch LoRA": _ours(weights, pairs, ranks, base, "lora"),
        "dW made in every forward": _dense(weights, pairs, base),
    }
    absent = []
    try:
        made |= {f"PEFT {name}": _peft(weights, pairs, ranks, base, name) for name in ("LoRA", "AdaLoRA")}
    except ImportError:
        absent.append("PEFT: not installed")
    products = 4 * width if base else 0
    flops = T * layers * width * (products + 12 * ranks)
    read_bytes = 4 * layers * (2 * width * width * base + 4 * ranks * width)
    case = Case(
        name=f"{'step' if base else 'step, branches alone'} n={T} d={width} r={ranks} layers={layers}",
        contenders=tuple(
            Contender(name=name, step=_step(model, x, target), read_bytes=read_bytes, flops=flops)
            for name, model in made.items()
        ),
    )
    return case, absent


def scoring(*, width: int, ranks: int, layers: int) -> tuple[Case, list[str]]:
    """What choosing the ranks costs in INTERVAL steps: one look of ours; AdaLoRA watches every gradient, masks once.

    The time reported is that of one step. The methods choose differently, so their scores are not compared.
    """
    random = torch.Generator().manual_seed(0)
    weights = [torch.empty(width, width).normal_(generator=random) for _ in range(layers)]
    pairs = [[torch.empty(ranks, width).normal_(generator=random) for _ in "AB"] for _ in range(layers)]
    model = _ours(weights, pairs, ranks, False, "triadapt")
    found = {name: one for name, one in model.named_modules() if isinstance(one, TriAdapt)}
    for one in found.values():
        one.upper.data[:ranks, :ranks].normal_(generator=random)
    # A budget that is never reached, while no layer has room: every look does all its work, and nothing changes.
    growth = Growth(TriAdaptSettings(initial=ranks, reference=4 * ranks + 1, interval=INTERVAL, steps=1 << 30), found)
    for one in found.values():
        one.grow(len(one.a) - one.rank)

    def ours() -> Tensor:
        growth.look(INTERVAL)
        return torch.stack([one.seen for one in found.values()])

    contenders = [("anabranch TriAdapt", ours, ranks * ranks)]
    try:
        theirs: Any = _peft(weights, pairs, ranks, False, "AdaLoRA")
    except ImportError:
        return _scores(contenders, width, ranks, layers), ["PEFT: not installed"]
    allocator = theirs.rankallocator
    for name, p in theirs.model.named_parameters():
        if "lora_" in name:
            p.grad = torch.randn(p.shape, generator=random)

    def watched() -> Tensor:
        for _ in range(INTERVAL):
            allocator.update_ipt(theirs.model)
        pattern = allocator.mask_to_budget(theirs.model, layers * ranks - layers)
        return torch.tensor([float(sum(mask)) for mask in pattern.values()])

    contenders.append(("PEFT AdaLoRA", watched, 2 * ranks * width))
    return _scores(contenders, width, ranks, layers), []


def _scores(contenders: list[tuple[str, Step, int]], width: int, ranks: int, layers: int) -> Case:
    return Case(
        name=f"choice of ranks d={width} r={ranks} layers={layers}, every {INTERVAL} steps",
        calls=INTERVAL,
        contenders=tuple(
            Contender(
                name=name, step=step, read_bytes=4 * numbers * layers, flops=numbers * layers, tolerance=float("inf")
            )
            for name, step, numbers in contenders
        ),
    )


def _step(model: nn.Module, x: Tensor, target: Tensor) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    optimiser = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, foreach=True)
    x = x.clone().requires_grad_()

    def step() -> Tensor:
        out: Tensor = model(x)
        out.backward(target)
        optimiser.step()
        optimiser.zero_grad()
        x.grad = None
        return out.detach()

    return step


def _ours(weights: list[Tensor], pairs: list[list[Tensor]], ranks: int, base: bool, method: str) -> nn.Module:
    model = Stack(weights)
    settings: Mapping[str, Any] = {
        "triadapt": TriAdaptSettings(initial=ranks, reference=ranks, alpha=ranks, steps=1),
        "lora": RankLoraSettings(ranks=ranks, alpha=ranks),
    }
    kind: Any = {"triadapt": TriAdapt, "lora": RankLora}[method]
    adapters = attach(model, lambda name, inputs, outputs: kind(inputs, outputs, settings[method]))
    for adapter, (a, b) in zip(adapters.values(), pairs, strict=True):
        adapter.a.data[:ranks], adapter.b.data[:ranks] = a, b
    if not base:
        for adapted in model.layers:
            adapted.base = Nothing(weights[0].shape[0])
    return model


def _dense(weights: list[Tensor], pairs: list[list[Tensor]], base: bool) -> nn.Module:
    model = Stack(weights).requires_grad_(False)
    for index, (layer, (a, b)) in enumerate(zip(model.layers, pairs, strict=True)):
        model.layers[index] = Dense(layer if base else Nothing(len(weights[0])), a, b, scale=1.0)
    return model


def _peft(weights: list[Tensor], pairs: list[list[Tensor]], ranks: int, base: bool, method: str) -> nn.Module:
    import peft

    names = [str(index) for index in range(len(weights))]
    if method == "LoRA":
        config = peft.LoraConfig(r=ranks, lora_alpha=ranks, target_modules=names)
    else:
        config = peft.AdaLoraConfig(
            init_r=ranks, target_r=max(1, ranks - 1), lora_alpha=ranks, target_modules=names, total_step=1 << 30
        )
    model: Any = peft.get_peft_model(Stack(weights), config)
    for layer, (a, b) in zip(model.base_model.model.layers, pairs, strict=True):
        for part, value in (("lora_A", a), ("lora_B", b.T.contiguous())):
            held = getattr(layer, part)["default"]
            getattr(held, "weight", held).data = value.clone()
        if method == "AdaLoRA":
            layer.lora_E["default"].data.fill_(1.0)
        if not base:
            layer.base_layer = Nothing(weights[0].shape[0])
    tuner: nn.Module = model.base_model
    return tuner
