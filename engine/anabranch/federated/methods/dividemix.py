"""DivideMix: two networks, each telling the other which labels to believe; the rest is learned as if unlabelled.
arXiv 2002.07394

    w_i   the probability, by the other network's losses, that label i is clean; before each epoch
    g_w   the mean of a network's predictions of two views of a sample
    target of i = sharpen(w_i y_i + (1 - w_i) g_own)  if w_i > threshold (labelled), else sharpen((g_1 + g_2) / 2)
    MixUp over both views of a batch: x' = m x_i + (1 - m) x_j, t' likewise,  m = max(l, 1 - l),  l ~ Beta(b, b)
    L = mean over labelled i of CE(z', t') + u_t mean over unlabelled i of |p' - t'|^2 / C + sum_c log(1 / (C p_c)) / C

sharpen(p) = p^(1/T) / sum p^(1/T); p_c the mean prediction of the batch; u_t rises from 0 to `unlabelled` in `ramp`
rounds after the warm-up of plain cross-entropy.

From the paper       all of the above.
From FNBench         arXiv 2505.06684: 24 rounds of warm-up of 120, the settings.
Reconstructed here   time counts rounds. An epoch shows each sample once, whichever part it is in; the code's batches
                     hold as many unlabelled as labelled samples, and an epoch ends with the labelled ones. Both
                     networks of a client step at once. Views are augment.py's; guesses are made in evaluation.
Deviations           weight decay is the schedule's, FNBench's code has none. A part that is empty adds nothing (its
                     code fails). Of texts, not the ids but the latents are mixed.
Shared               labels/mixtures.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.federated.augment import augment
from anabranch.federated.method import FedAvg, Visit, cross_entropy
from anabranch.federated.methods.coteaching import peers
from anabranch.federated.packed import Batch
from anabranch.federated.streams import Purpose
from anabranch.labels.mixtures import clean_posteriors
from anabranch.labels.selection import mean_of
from anabranch.labels.softmax import log_softmax, softmax

SMALLEST = 1e-12  # a class that is never predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class DivideMix(FedAvg):
    """warm_up      rounds of cross-entropy, before anything is divided
    threshold    probability above which a label is kept
    temperature  T
    beta         b, a whole number
    unlabelled   weight of the unlabelled samples in the end
    ramp         rounds until then
    """

    networks: ClassVar[int] = 2

    warm_up: int = 24
    threshold: float = 0.5
    temperature: float = 0.5
    beta: int = 4
    unlabelled: float = 25.0
    ramp: int = 16

    def __post_init__(self) -> None:
        if min(self.warm_up, self.unlabelled, self.ramp) < 0 or not 0 <= self.threshold <= 1:
            raise ValueError(
                f"need warm_up, unlabelled, ramp >= 0 and threshold in [0, 1], got {self.warm_up}, {self.unlabelled}, "
                f"{self.ramp}, {self.threshold}"
            )
        if not self.temperature > 0 or self.beta < 1:
            raise ValueError(f"need temperature > 0 and beta >= 1, got {self.temperature} and {self.beta}")

    def begin_epoch(self, visit: Visit, rows: Tensor, epoch: int) -> None:
        if visit.round >= self.warm_up:
            losses = cross_entropy(visit.review(rows)[0], visit.data.y)
            visit.notes["clean"] = peers(clean_posteriors(losses, visit.data.real.repeat(2, 1)))

    def loss(self, visit: Visit, rows: Tensor, batch: Batch) -> Tensor:
        if visit.round < self.warm_up:
            return FedAvg.loss(self, visit, rows, batch)
        views = (augment(batch.x, visit.streams, batch.number, view) for view in (1, 2))
        x = torch.stack(list(views), 2).flatten(1, 2)  # [N, 2 B, ...]: both views of a sample side by side
        clean = visit.notes["clean"].gather(1, batch.which.repeat(2, 1))
        target = self._targets(visit, rows, x, batch.y, clean).repeat_interleave(2, 1)
        real = batch.real.repeat(2, 1).repeat_interleave(2, 1)
        labelled = (clean > self.threshold).repeat_interleave(2, 1) & real
        share, partner = self._mix(visit, batch, real)
        logits = mixed_logits(visit, rows, x, share, partner)
        log_p, target = log_softmax(logits), mixed(target, share, partner)
        p = log_p.exp()
        wrong = -(target * log_p).sum(-1) * mean_of(labelled)
        apart = (p - target).square().mean(-1) * mean_of(real & ~labelled)
        shown = (p * mean_of(real)[..., None]).sum(1).clamp_min(SMALLEST)
        uneven = -(shown * visit.network.classes).log().mean(-1)
        return wrong.sum(1) + self._weight(visit.round) * apart.sum(1) + uneven

    def _weight(self, round: int) -> float:
        since = round - self.warm_up
        return self.unlabelled * min(1.0, since / self.ramp) if self.ramp else self.unlabelled

    def _targets(self, visit: Visit, rows: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> Tensor:
        """[2 N, B, C]: what each network is to say of x [N, 2 B, ...], labels y [N, B] clean with [2 N, B]."""
        with torch.no_grad():
            own = softmax(visit.see(rows, x, training=False).logits).unflatten(1, (-1, 2)).mean(2)
        one_hot = F.one_hot(y, visit.network.classes).repeat(2, 1, 1)
        refined = torch.lerp(own, one_hot.float(), clean[..., None])
        guessed = (own + peers(own)) / 2
        sharp = torch.where(clean[..., None] > self.threshold, refined, guessed) ** (1 / self.temperature)
        return sharp / sharp.sum(-1, keepdim=True)

    def _mix(self, visit: Visit, batch: Batch, real: Tensor) -> tuple[Tensor, Tensor]:
        """Share [2 N, 1] that a sample keeps, and partner [2 N, 2 B] that it gets the rest from."""
        streams, B = visit.streams, batch.y.shape[1]
        draws = streams.uniform(2 * (2 * self.beta - 1), Purpose.METHOD, batch.number).view(-1, 2, 2 * self.beta - 1)
        l = draws.sort(2).values[..., self.beta - 1].T.reshape(-1, 1)  # the middle of 2 b - 1 numbers is Beta(b, b)
        words = streams.words(4 * B, Purpose.MIX, batch.number).view(-1, 2 * B, 2).permute(2, 0, 1).flatten(0, 1)
        partner = words.masked_fill(~real, 1 << 32).argsort(dim=1, stable=True)
        return torch.maximum(l, 1 - l), partner


def mixed(values: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """values [2 N, M, ...] with `share` [2 N, 1] of their own and the rest their partners' [2 N, M]."""
    theirs = values[torch.arange(len(values))[:, None], partner]
    return torch.lerp(theirs, values, share.view(-1, *[1] * (values.ndim - 1)))


def mixed_logits(visit: Visit, rows: Tensor, x: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """[2 N, M, C]: of samples x [N, M, ...], each mixed with its partner for both networks."""
    x = x.repeat(2, *[1] * (x.ndim - 1))
    if x.is_floating_point():
        return visit.see(rows, mixed(x, share, partner)).logits
    assert not visit.network.batch_statistics  # of networks for texts
    views = visit.network.layout.views(rows)
    latent, _ = visit.network.encode(views, x, training=True)
    return visit.network.decode(views, mixed(latent, share, partner), training=True)[0]
