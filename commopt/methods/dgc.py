"""Deep Gradient Compression."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.compress.feedback import first_bad_parameter
from commopt.compress.sparse import TopK
from commopt.errors import AttachError, ConfigError, check_flag, check_option
from commopt.exchange.compressed import GatherMean
from commopt.exchange.mean import Mean, State, check_alone, clip_joint_norm_, load_tensor
from commopt.groups.base import Group
from commopt.wire.bucket import Blocks, Bucket


class DGC(GatherMean):
    """Send the largest accumulated momentum updates, one in a thousand, and keep the rest growing until it is large.

    Lin et al. 2018, arXiv:1712.01887, Algorithms 1 and 2. Momentum is taken before the choice, and restarts where an element was sent:
        g_i <- clip(g_i, max_norm sqrt(N));  u_i <- momentum u_i + g_i;  v_i <- v_i + u_i
        q_i = top_k(v_i);  v_i <- v_i - q_i;  u_i <- 0 where q_i is not;  y = mean q_i
    with nesterov u_i <- momentum (u_i + g_i), v_i <- v_i + u_i + g_i. Each rank clips by its own norm, without communication: what the
    paper has for gradients divided by N, max_norm N^(-1/2). During the warm-up the density falls in steps of equal length, as in the paper
    from 25 % by a factor of four. Unlike the released code the choice is exact (a sampled threshold leaves candidates, see `TopK`),
    zeros do not count as sent, and at density 1 the momentum is that of the mean.
    The optimizer must be SGD without momentum; its weight_decay acts on the weights, outside the accumulators.
    Sends (N-1) x density x (value_bits/8 + places) bytes per parameter and step: 3.5 bytes an entry at density 0.1 % in 16 bits.
    State: u and v, 8 bytes per parameter, in place of SGD's momentum of 4.
    Use it for the smallest messages of all gradient methods, on long runs: at 0.1 % an element waits up to 1,000 steps.
    Not for short runs, nor for very many ranks: what arrives grows with N, and breaks even with dense at about N = 2,300 at 0.1 %.

    density: the share of elements that travels after the warm-up, above 0, at most 1; 1 is dense SGD with momentum.
    momentum, nesterov: of this method, before the choice.
    warmup_steps: over how many steps the densities of the warm-up are gone through; or warmup_epochs with steps_per_epoch.
    warmup_densities: those of the warm-up; the ones not above `density` are left out.
    masking: restart the momentum of what was sent (momentum factor masking).
    value_bits: 32, 16, 8 or 1 for each value; what rounding loses stays in v.
    dense_1d: average parameters with fewer than two dimensions exactly, and take their momentum afterwards.
    max_norm: as above; None for no clipping.
    """

    name = "dgc"
    warmup_option = "warmup_steps"

    def __init__(
        self,
        *,
        density: float = 0.001,
        momentum: float = 0.9,
        nesterov: bool = False,
        warmup_steps: int = 0,
        warmup_epochs: float = 0,
        steps_per_epoch: int = 0,
        warmup_densities: Sequence[float] = (0.25, 0.0625, 0.015625, 0.004),
        masking: bool = True,
        value_bits: int = 16,
        dense_1d: bool = True,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(
            TopK(density=density, value_bits=value_bits), dense_1d=dense_1d, max_norm=max_norm, grad_scaler=grad_scaler
        )
        check_option("momentum", momentum, lambda x: 0 <= x < 1, "a number from 0 to below 1")
        check_flag("nesterov", nesterov)
        check_flag("masking", masking)
        whole = "a whole number of at least 0"
        check_option("warmup_steps", warmup_steps, lambda x: isinstance(x, int) and x >= 0, whole)
        check_option("warmup_epochs", warmup_epochs, lambda x: 0 <= x < math.inf, "a number of at least 0")
        check_option("steps_per_epoch", steps_per_epoch, lambda x: isinstance(x, int) and x >= 0, whole)
        fractions = "a list of numbers above 0, at most 1, as in [0.25, 0.0625]"
        check_option("warmup_densities", warmup_densities, lambda x: all(0 < d <= 1 for d in x), fractions)
        if warmup_epochs and (warmup_steps or not steps_per_epoch):
            raise ConfigError(
                f"warmup_epochs: {warmup_epochs!r} goes with steps_per_epoch, and without warmup_steps; write both, or warmup_steps"
            )
        if steps_per_epoch and not warmup_epochs:
            raise ConfigError(f"steps_per_epoch: {steps_per_epoch!r} has no effect without warmup_epochs; leave it out")
        if nesterov and not momentum:
            raise ConfigError("nesterov: true has no effect with momentum: 0; leave it out")
        self.momentum, self.nesterov, self.masking = momentum, nesterov, masking
        self._warmup_steps = warmup_steps or math.ceil(warmup_epochs * steps_per_epoch)
        self.densities = [d for d in warmup_densities if d > density] if self._warmup_steps else []
        self.density, self.value_bits, self._exactly = density, value_bits, Mean()
        self.made_of = (self._exactly,)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        is_sgd = isinstance(optimizer, torch.optim.SGD)
        if not is_sgd or any(group["momentum"] for group in optimizer.param_groups):
            raise AttachError(
                f"dgc has the momentum itself, before it chooses (momentum: {self.momentum}): give it torch.optim.SGD without "
                f"momentum, not {type(optimizer).__name__}{' with one' if is_sgd else ''}"
            )

    @property
    def warmup_steps(self) -> int:
        return self._warmup_steps if self.densities else 0

    @property
    def is_steady(self) -> bool:
        return int(self.exchanges.max()) >= self.warmup_steps

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        self.velocity = torch.zeros(self.index.total, device=self.device)  # u; v is the residual

    def codec(self, exchanges: int) -> TopK:
        """The choice that a parameter makes after so many exchanges."""
        stage = exchanges * len(self.densities) // max(1, self.warmup_steps)
        density = self.densities[stage] if stage < len(self.densities) else self.density
        return TopK(density=density, value_bits=self.value_bits)

    def clip_local_(self, buckets: Sequence[Bucket], max_norm: float, group: Group) -> None:
        clip_joint_norm_(buckets, max_norm * math.sqrt(group.size))

    @property
    def is_exact(self) -> bool:
        return self.density == 1

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if group.size == 1:
            return check_alone(self, bucket)
        if self.density == 1:
            return self._exactly.aggregate(bucket, group)
        blocks = self.blocks(bucket)
        if not self.average_dense(bucket, group) or not len(blocks):
            return None
        moved, grown = torch.zeros_like(bucket.flat), torch.zeros_like(bucket.flat)
        for (name, g), (_, u), (_, x) in zip(
            bucket.views(), bucket.with_flat(moved).views(), bucket.with_flat(grown).views(), strict=True
        ):
            if name not in self.dense_names:
                self._accumulate(self.index.view(self.velocity, name), g, u, x)
        stages = []
        for codec, part in self._stages(blocks):
            self.worker.compressor = codec
            own = self.worker.compress(grown, [part])
            stages.append((codec, part, own, group.all_gather(own[0])))
        bad = first_bad_parameter([payload for *_, gathered in stages for payload in gathered])
        if bad >= 0:
            for codec, part, own, _ in stages:
                self.worker.compressor = codec
                self.worker.undo(grown, own, [part])
            return self._void(bucket, bad)
        sent = torch.zeros_like(grown)
        for name, x in bucket.views():
            if name not in self.dense_names:
                x.zero_()
        for codec, part, own, gathered in stages:
            codec.decompress_(own[0].tensors[1:], part, sent)
            for payload in gathered:  # in rank order: float sums depend on it
                codec.decompress_(payload.tensors[1:], part, bucket.flat, alpha=1 / group.size, add=True)
        if self.masking:
            moved.mul_(sent.eq(0))  # u <- 0 where q is not
        for name, u in bucket.with_flat(moved).views():
            if name not in self.dense_names:
                self.index.view(self.velocity, name).copy_(u)
        return None

    def receive(self, bucket: Bucket) -> None:
        """Take the momentum of exact means, which had none before the exchange."""
        for name, x in bucket.views():
            if self.ranks == 1 or self.density == 1 or name in self.dense_names:
                u = self.index.view(self.velocity, name)
                self._accumulate(u, x, u, x)

    def _accumulate(self, u: Tensor, g: Tensor, u_out: Tensor, x_out: Tensor) -> None:
        """u_out and x_out, what v grows by; may be u and g themselves."""
        if self.nesterov:
            torch.add(u, g, out=u_out).mul_(self.momentum)  # u <- momentum (u + g)
            torch.add(u_out, g, out=x_out)
        else:
            torch.add(g, u, alpha=self.momentum, out=u_out)  # u <- momentum u + g
            x_out.copy_(u_out)

    def _stages(self, blocks: Blocks) -> list[tuple[TopK, Blocks]]:
        """The blocks by the choice that is made of them; one part, unless some parameters were left out of earlier steps."""
        counts = self.exchanges.numpy()[blocks.parameters]
        codecs = {int(count): self.codec(int(count)) for count in np.unique(counts)}
        if len(set(codecs.values())) == 1:
            return [(next(iter(codecs.values())), blocks)]
        of_block = np.asarray([codecs[int(count)].density for count in counts])
        return [
            (TopK(density=density, value_bits=self.value_bits), blocks.only(np.flatnonzero(of_block == density)))
            for density in sorted(set(of_block.tolist()))
        ]

    def bytes_per_parameter(self, ranks: int) -> float:
        return 8 * (ranks - 1) / ranks if self.density == 1 else super().bytes_per_parameter(ranks)

    @property
    def state_form(self) -> str:
        return self.name

    def state_views(self, name: str) -> list[Tensor]:
        return [*super().state_views(name), self.index.view(self.velocity, name)]

    def comm_state(self) -> State:
        state = super().comm_state()
        state["local"]["velocity"] = self.velocity
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        load_tensor(self.velocity, state["local"], "velocity")

    def load_resharded(self, states: Iterable[State]) -> None:
        every = list(states)
        super().load_resharded(every)
        self.velocity.copy_(torch.stack([state["local"]["velocity"] for state in every]).mean(0))
