"""Deep Gradient Compression."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import Parameter

from commopt import kernels
from commopt.compress.options import ValueBits
from commopt.compress.sparse import TopK
from commopt.errors import AttachError, ConfigError
from commopt.exchange.gather import GatherMean
from commopt.groups.base import Group
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import Flag, Fraction, Number, Share, Wanted, Whole
from commopt.wire.bucket import Blocks, Bucket, Int64Array, ParameterIndex, alike, kept
from commopt.wire.residual import Accumulated
from commopt.wire.shards import local
from commopt.wire.state import State

Densities = Annotated[tuple[Share, ...], Wanted("a list of numbers above 0, at most 1, as in [0.25, 0.0625]")]
MOMENTUM = 0.9  # the paper's


@options
class DGCOptions(NoOptions):
    density: Share = 0.001
    momentum: Fraction | None = None
    nesterov: Flag = False
    warmup_steps: Annotated[Whole, Field(ge=0)] = 0
    warmup_epochs: Annotated[Number, Field(ge=0)] = 0.0
    steps_per_epoch: Annotated[Whole, Field(ge=0)] = 0
    warmup_densities: Densities = (0.25, 0.0625, 0.015625, 0.004)
    decay_momentum: Flag = False
    masking: Flag = True
    value_bits: ValueBits = 16
    dense_1d: Flag = True

    def __post_init__(self) -> None:
        if self.warmup_epochs and (self.warmup_steps or not self.steps_per_epoch):
            raise ConfigError(
                f"warmup_epochs: {self.warmup_epochs!r} goes with steps_per_epoch, and without warmup_steps; write both, or "
                "warmup_steps"
            )
        if self.steps_per_epoch and not self.warmup_epochs:
            raise ConfigError(
                f"steps_per_epoch: {self.steps_per_epoch!r} has no effect without warmup_epochs; leave it out"
            )
        for key in ("nesterov", "decay_momentum"):
            if getattr(self, key) and self.momentum == 0:
                raise ConfigError(f"{key}: true has no effect with momentum: 0; leave it out")


class DGC(GradientMethod, GatherMean):
    """Send the largest accumulated momentum updates, such as one in a thousand, and accumulate the rest until it is large.

    Lin et al. 2018, arXiv:1712.01887, Algorithms 1 and 2. Momentum is applied before the choice, and restarts at the
    elements that were sent:
        g_i <- clip(g_i, max_norm sqrt(N));  u_i <- momentum u_i + g_i;  v_i <- v_i + u_i
        q_i = top_k(v_i);  v_i <- v_i - q_i;  u_i <- 0 where q_i is not;  y = mean q_i
    With nesterov, u_i <- momentum (u_i + g_i), v_i <- v_i + u_i + g_i. With `max_norm` in `attach`, each rank clips by
    its own norm, without communication. The paper clips gradients divided by N to max_norm N^(-1/2), which is the
    same. During the warm-up the density falls in steps of equal length, as in the paper from 25 % by a factor of four.
    Differs from the released code: the choice is exact (a sampled threshold leaves candidates, see `TopK`), zeros do
    not count as sent, and at density 1 the momentum is that of the mean. SGD must have no momentum of its own, and its
    weight_decay acts on the weights, outside the accumulators. The released code gives it momentum, which makes it
    1 / (1 - momentum) times as strong, 10 times at 0.9 (`decay_momentum`). Any other optimizer, such as AdamW, averages
    what arrives by itself: the momentum before the choice is then 0, which is Gradient Dropping (Aji and Heafield 2017,
    arXiv:1704.05021).
    Sends (N-1) x density x (value_bits/8 + places) bytes per parameter and step: 3.5 bytes an entry at density 0.1 %
    in 16 bits.
    State: u and v, 8 bytes per parameter, in place of SGD's momentum of 4.
    Use it for the smallest messages of all gradient methods, on long runs: at 0.1 % an element waits up to 1,000
    steps.
    Not for short runs, nor for very many ranks: what arrives grows with N, and breaks even with dense at about N =
    2,300 at 0.1 %.

    density: the share of elements that is sent after the warm-up, above 0, at most 1; 1 is dense SGD with momentum.
    momentum, nesterov: of this method, before the choice; by default 0.9 with SGD, and none with other optimizers.
    warmup_steps: the steps over which the warm-up's densities are applied; or warmup_epochs with steps_per_epoch.
    warmup_densities: the densities of the warm-up; those not above `density` are left out.
    decay_momentum: weight decay has momentum too: d <- momentum d + weight_decay x;  x <- x - lr (y + d). 4 bytes of
        state more per parameter.
    masking: restart the momentum of what was sent (momentum factor masking).
    value_bits: 32, 16, 8 or 1 for each value; what rounding loses stays in v.
    dense_1d: average parameters with fewer than two dimensions exactly, and apply their momentum afterwards.
    """

    name = "dgc"
    Options = DGCOptions
    options: DGCOptions
    warmup_option = "warmup_steps"
    clips_alone = True
    may_be_clipped = False  # what has waited in v for many steps comes out at once
    state_form = name
    warmup_steps = 0
    is_exact = False

    def set_up(self) -> None:
        o = self.options
        self.choice = TopK(density=o.density, value_bits=o.value_bits)
        GatherMean.__init__(self, self.choice, dense_1d=o.dense_1d)
        steps = o.warmup_steps or math.ceil(o.warmup_epochs * o.steps_per_epoch)
        self.densities = [d for d in o.warmup_densities if d > o.density] if steps else []
        self.warmup_steps = steps if self.densities else 0
        self.is_exact = o.density == 1
        self.momentum = MOMENTUM if o.momentum is None else o.momentum

    def declare(self) -> list[State]:
        sizes = zip(self.index.names, self.index.numels, self.own_index.numels, strict=True)
        whole = self.ranks == 1 or self.is_exact  # momentum is applied to the mean, which all ranks have
        numels = tuple(n if whole or name in self.dense_names else own for name, n, own in sizes)
        u = State("velocity", index=ParameterIndex(self.index.names, numels), held="rank", on_resize="mean")
        decay = [State("decay")] if self.options.decay_momentum else []
        return [u, *decay, *super().declare()]  # v is the residual

    def follow(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> None:
        names = {id(p): name for name, p in parameters.items()}
        groups = [(k, p) for k, group in enumerate(optimizer.param_groups) for p in group["params"] if id(p) in names]
        self._optimizer, self._decaying = optimizer, {names[id(p)]: (k, p) for k, p in groups}

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        given, kind = self.options.momentum, type(optimizer).__name__
        if not isinstance(optimizer, torch.optim.SGD):
            if given or self.options.nesterov or self.options.decay_momentum:
                raise AttachError(
                    f"dgc applies its momentum (momentum: {self.momentum}) before it chooses, and {kind} would apply its own on top: "
                    f"leave momentum, nesterov and decay_momentum out with {kind}, or give it torch.optim.SGD without momentum"
                )
        elif any(group["momentum"] for group in optimizer.param_groups):
            raise AttachError(
                f"dgc applies momentum itself, before it chooses (momentum: {self.momentum}): use torch.optim.SGD without momentum"
            )
        if given is None:
            self.momentum = MOMENTUM if isinstance(optimizer, torch.optim.SGD) else 0.0

    def density(self, exchanges: int) -> float:
        """The share of a parameter's elements that is sent once it has been exchanged so many times."""
        stage = exchanges * len(self.densities) // max(1, self.warmup_steps)
        return self.densities[stage] if stage < len(self.densities) else float(self.options.density)

    def exchange(self, bucket: Bucket, group: Group) -> None:
        if self.is_exact and group.size > 1:
            self.average_(bucket, group)
        else:
            super().exchange(bucket, group)

    def exchange_blocks(self, bucket: Bucket, blocks: Blocks, group: Group) -> None:
        views = self.compressed_views(bucket)
        velocities = self.parts_of("velocity", [name for name, _ in views])
        is_there, given = kernels.has_triton(self.device), None
        if is_there:  # kernels accumulate while they choose, and the velocity changes at the end
            moved = torch.empty_like(bucket.flat) if self.options.nesterov else bucket.flat
        else:
            moved = self._accumulate_(velocities, bucket, views)
        stages = []
        for codec, part in self._stages(blocks):
            self.worker.compressor = codec
            if is_there:
                homes, velocity = self._velocity_homes(part), self.state["velocity"]
                given = Accumulated(self.worker.residual, velocity, homes, moved, self.momentum)
            own = self.worker.compress(bucket.flat, [part], moved=given)
            stages.append((codec, part, given, own, group.all_gather(own[0])))
        bad = self.first_bad_in([payload for *_, gathered in stages for payload in gathered])
        if self.is_void(bucket, bad, group):
            for codec, part, _, own, _ in stages:
                self.worker.compressor = codec
                self.worker.undo(bucket.flat, own, [part])
            return
        alpha, cleared = 1 / group.size, group.rank if self.options.masking else -1
        for codec, part, given, _, gathered in stages:
            if given is not None:
                codec.decoded(gathered, part, self.device).settle_(bucket.flat, given, alpha=alpha, cleared=cleared)
            elif self.options.masking:
                codec.forget_sent_(gathered[group.rank], part, moved)  # u <- 0 where q is not
        if is_there:
            return
        torch._foreach_copy_(velocities, [u for _, u in self.compressed_views(bucket.with_flat(moved))])
        for codec, part, _, _, gathered in stages:
            codec.add_up_(gathered, part, bucket.flat, alpha=alpha)

    def _velocity_homes(self, blocks: Blocks) -> Int64Array:
        """(B,) where blocks begin in the velocity, which has all of what stays dense."""
        shift = self._layout(self._declared["velocity"]).offsets - self.own_index.offsets
        if not shift.any():
            return blocks.homes
        return kept(blocks.tables, "velocity", (blocks.homes,), lambda: blocks.homes + shift[blocks.parameters])

    def receive(self, bucket: Bucket) -> None:
        """Apply momentum to exact means, which had none before the exchange, and to weight decay."""
        is_whole = self.ranks == 1 or self.is_exact
        if views := [(name, x) for name, x in bucket.views() if is_whole or name in self.dense_names]:
            velocities = self.parts_of("velocity", [name for name, _ in views])
            moved = bucket.with_flat(self._accumulate_(velocities, bucket, views))
            torch._foreach_copy_(velocities, [u for name, u in moved.views() if is_whole or name in self.dense_names])
        gs = dict(bucket.views())
        decaying = [name for name in bucket.names if self.options.decay_momentum and name in self._decaying]
        for decay, names in alike(decaying, self._decay_of).items():
            ds, held = self.parts_of("decay", names), [self._decaying[name][1] for name in names]
            # the optimizer adds the last term, weight_decay x
            torch._foreach_add_([gs[name] for name in names], ds, alpha=self.momentum)
            torch._foreach_mul_(ds, self.momentum)
            torch._foreach_add_(ds, [local(p).reshape(-1) for p in held], alpha=decay)

    def _decay_of(self, name: str) -> float:
        return float(self._optimizer.param_groups[self._decaying[name][0]]["weight_decay"])

    def _accumulate_(self, u: list[Tensor], bucket: Bucket, views: list[tuple[str, Tensor]]) -> Tensor:
        """Let views of a bucket be what is added to v; returns a flat tensor that has the new u at their places."""
        g = [x for _, x in views]
        if not self.options.nesterov:
            torch._foreach_add_(g, u, alpha=self.momentum)  # u <- momentum u + g
            return bucket.flat
        moved, names = bucket.flat.clone(), {name for name, _ in views}
        new = [x for name, x in bucket.with_flat(moved).views() if name in names]
        torch._foreach_add_(new, u)
        torch._foreach_mul_(new, self.momentum)  # u <- momentum (u + g)
        torch._foreach_add_(g, new)
        return moved

    def _stages(self, blocks: Blocks) -> list[tuple[TopK, Blocks]]:
        """The blocks by the density of their codec; all have one, unless some parameters were left out of earlier steps."""
        densities = np.asarray([self.density(count) for count in self.exchanges.tolist()])[blocks.parameters]
        if len(densities) and (densities == densities[0]).all():  # these very blocks, of which there are tables
            return [(replace(self.choice, density=float(densities[0])), blocks)]
        return [
            (replace(self.choice, density=density), blocks.only(np.flatnonzero(densities == density)))
            for density in np.unique(densities).tolist()
        ]

    def bytes_per_parameter(self, ranks: int) -> float:
        return 8 * (ranks - 1) / ranks if self.is_exact else super().bytes_per_parameter(ranks)
