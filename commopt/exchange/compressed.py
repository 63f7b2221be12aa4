"""The mean of compressed buckets: gathered, or in two phases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Compressor, element_indices
from commopt.compress.feedback import ErrorFeedback, first_bad_parameter
from commopt.errors import ConfigError, check_flag, check_option
from commopt.exchange.mean import Aggregator, State, check_alone, first_bad, is_finite, load_tensor
from commopt.groups.base import Group
from commopt.wire import noise
from commopt.wire.bucket import Blocks, Bucket, Parts


class Compressed(Aggregator):
    """What the two forms share: worker residuals, the cached cut of each bucket, parameters that stay dense, the checkpoint.

    error_feedback: keep what a message left out, and add it to the next one.
    residual_bits: 32, 16 (bfloat16) or 8 bits for each element of the residuals.
    residual_decay: the residual's factor from step to step, above 0 to 1.
    reset_every: forget the residuals after so many exchanges; never if None.
    dense_1d: average parameters with fewer than two dimensions exactly.
    seed: of stochastic rounding.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        error_feedback: bool = True,
        residual_bits: int = 32,
        residual_decay: float = 1.0,
        reset_every: int | None = None,
        dense_1d: bool = False,
        seed: int = 0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(max_norm=max_norm, grad_scaler=grad_scaler)
        check_flag("error_feedback", error_feedback)
        check_flag("dense_1d", dense_1d)
        check_option("residual_bits", residual_bits, lambda x: x in (8, 16, 32), "8, 16 or 32")
        check_option("residual_decay", residual_decay, lambda x: 0 < x <= 1, "a number above 0, at most 1")
        is_count = "a whole number from 1, or leave it out"
        check_option(
            "reset_every", 1 if reset_every is None else reset_every, lambda x: isinstance(x, int) and x >= 1, is_count
        )
        check_option("seed", seed, lambda x: isinstance(x, int), "a whole number")
        if not error_feedback and (residual_bits, residual_decay, reset_every) != (32, 1.0, None):
            raise ConfigError(
                "residual_bits, residual_decay and reset_every have no effect with error_feedback: false; leave them out"
            )
        self.compressor, self.seed = compressor, seed
        self.residual_bits = residual_bits if error_feedback else 0
        self.residual_decay, self.reset_every, self.dense_1d = residual_decay, reset_every, dense_1d

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        self.device = named_parameters[0][1].device
        kernels.warm_up(self.device)  # now, and not in the first step that compresses
        self.dense_names = frozenset(name for name, p in named_parameters if self.stays_dense(name, p))
        self.table = self.compressor.table(self.index, group.size, self.dense_names)
        self.worker = self.feedback(self.compressor, self.index.total, self.table.everything)
        self._cut: dict[Any, Any] = {}

    def stays_dense(self, name: str, p: Tensor) -> bool:
        """Whether a parameter is averaged exactly."""
        return self.dense_1d and p.dim() < 2

    def feedback(self, compressor: Compressor, elements: int, blocks: Blocks) -> ErrorFeedback:
        """A residual for one side, kept as the options say."""
        bits, decay = self.residual_bits, self.residual_decay
        return ErrorFeedback(compressor, elements, self.device, bits=bits, decay=decay, blocks=blocks)

    def parts(self, bucket: Bucket) -> Parts:
        """The bucket's blocks by owner, cut once for each bucket layout."""
        parts: Parts = self._once(bucket, self.table.parts)
        return parts

    def blocks(self, bucket: Bucket) -> Blocks:
        """All blocks of the bucket, cut once for each bucket layout."""
        blocks: Blocks = self._once(bucket, self.table.all_of)
        return blocks

    def _once(self, bucket: Bucket, cut: Callable[[Bucket], Any]) -> Any:
        key = (cut.__name__, bucket.names, bucket.starts)
        if len(self._cut) > 64:
            self._cut.clear()
        if key not in self._cut:
            self._cut[key] = cut(bucket)
        return self._cut[key]

    def keyed(self, blocks: Blocks, compressor: Compressor, purpose: str = "worker") -> Blocks:
        """The blocks with this exchange's random keys, where the codec or the residual needs them."""
        if not compressor.is_stochastic and self.residual_bits != 8:
            return blocks
        counts = self.exchanges.numpy()[blocks.parameters]
        rank = 0 if compressor.shares_keys else self.rank
        return blocks.with_keys(noise.keys(self.seed, purpose, rank, counts, blocks.homes))

    def forget(self, feedback: ErrorFeedback, parts: Sequence[Blocks]) -> None:
        """Clear the residual of parameters whose time has come by `reset_every`."""
        if self.reset_every is None or not self.residual_bits:
            return
        counts = self.exchanges.numpy()
        for blocks in parts:
            due = counts[blocks.parameters]
            due = np.flatnonzero((due > 0) & (due % self.reset_every == 0))
            if len(due):
                feedback.clear(blocks.only(due))

    def average_dense(self, bucket: Bucket, group: Group) -> bool:
        """Average the parameters that are not compressed, exactly; False where that made the bucket void."""
        views = [(name, x) for name, x in bucket.views() if name in self.dense_names]
        if not views:
            return True
        dense = Bucket.of(views)
        dense.flat /= group.size
        group.all_reduce(dense.flat)
        if not is_finite(dense.flat):
            bucket.void = first_bad(self.index, dense)
            return False
        for (_, x), (_, mean) in zip(views, dense.views(), strict=True):
            x.copy_(mean)
        return True

    @property
    def state_form(self) -> str:
        return (
            f"{self.compressor}, residual in {self.residual_bits} bits"
            if self.residual_bits != 32
            else str(self.compressor)
        )

    def state_views(self, name: str) -> list[Tensor]:
        k = self.index.position[name]
        residual = self.worker.views(int(self.index.offsets[k]), self.index.numels[k])
        return super().state_views(name) + residual

    def comm_state(self) -> State:
        state = super().comm_state()
        state["local"] |= self.worker.state("worker_residual")
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        for key, x in self.worker.state("worker_residual").items():
            load_tensor(x, state["local"], key)

    def load_resharded(self, states: Iterable[State]) -> None:
        """Every new rank takes the mean of what the old ranks still had to send: the update depends on residuals only through it."""
        every = list(states)
        super().load_resharded(every)
        if self.residual_bits:
            self._set_worker_residual(self._mean_residual(every))

    def _mean_residual(self, every: Sequence[State]) -> Tensor:
        """(total,) f32"""
        total = torch.zeros(self.index.total, device=self.device)
        table = self.compressor.table(self.index, len(every), self.dense_names)
        places = element_indices(table.everything.homes, table.everything.lengths, self.device)
        for state in every:
            total[places] += self.worker.dense(state["local"], "worker_residual", table.everything)
        return total / len(every)

    def _set_worker_residual(self, total: Tensor) -> None:
        blocks = self.keyed(self.table.everything, self.compressor, "load")
        self.worker.set_values(total[element_indices(blocks.homes, blocks.lengths, self.device)], blocks)

    def _void(self, bucket: Bucket, bad: int) -> None:
        bucket.void = self.index.names[bad]


class GatherMean(Compressed):
    """The mean of every rank's compressed bucket, by all-gather: (N-1) payloads, for codecs that cannot be summed on the way."""

    name = "gather_mean"

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if group.size == 1:
            return check_alone(self, bucket)
        blocks = self.keyed(self.blocks(bucket), self.compressor)
        if not self.average_dense(bucket, group) or not len(blocks):
            return None
        self.forget(self.worker, [blocks])
        own = self.worker.compress(bucket.flat, [blocks])
        gathered = group.all_gather_ragged(own[0]) if self.compressor.is_ragged else group.all_gather(own[0])
        bad = first_bad_parameter(gathered)
        if bad >= 0:
            self.worker.undo(bucket.flat, own, [blocks])
            return self._void(bucket, bad)
        dense = [(x, x.clone()) for name, x in bucket.views() if name in self.dense_names]
        bucket.flat.zero_()
        for payload in gathered:
            self.compressor.decompress_(payload.tensors[1:], blocks, bucket.flat, alpha=1 / group.size, add=True)
        for x, mean in dense:
            x.copy_(mean)
        return None

    def bytes_per_parameter(self, ranks: int) -> float:
        return (ranks - 1) * self.compressor.bytes_per_element(ranks)


class TwoWayMean(Compressed):
    """The compressed mean of compressed buckets: all-to-all to each block's owner, which averages, compresses and sends it to all.

    arXiv:2102.02888, Figure 3, and DoubleSqueeze (arXiv:1905.05957): both sides keep what they could not send.
    Conserved exactly but for rounding: sum over steps of mean inputs = sum of outputs + mean worker residual +
    server residuals. Payload: 2(N-1)/N compressed buckets. `server` compresses the answers; the workers' compressor if None.

    factors: (P,) f32 of 1-bit LAMB (arXiv:2104.06069): each parameter is multiplied by its own before it is compressed, and
    divided by it afterwards; None for all 1. The residuals are in multiplied units.
    """

    name = "two_way_mean"

    def __init__(self, compressor: Compressor, server: Compressor | None = None, **options: Any) -> None:
        super().__init__(compressor, **options)
        self.server_compressor = server or compressor
        if self.compressor.is_ragged or self.server_compressor.is_ragged:
            raise ConfigError(f"{compressor}: its messages have no length known beforehand, which two phases need")
        if self.compressor.shared_scale != self.server_compressor.shared_scale:
            raise ConfigError(
                f"{compressor} and {self.server_compressor} cut parameters differently; use a scale per block"
            )
        self.merges_buckets = getattr(compressor, "merges_buckets", False)
        self.factors: Tensor | None = None

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        served = self.table.served_by(group.rank)
        self.server = self.feedback(self.server_compressor, served.elements, served)

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if group.size == 1:
            return check_alone(self, bucket)
        if not self.average_dense(bucket, group):
            return None
        parts = self.parts(bucket)
        if not any(len(blocks) for blocks in parts.by_owner):
            return None
        by_owner = [self.keyed(blocks, self.compressor) for blocks in parts.by_owner]
        served, answered = self._served(parts, by_owner)
        self._multiply(bucket)
        self.forget(self.worker, by_owner)
        self.forget(self.server, [answered])
        sent = self.worker.compress(bucket.flat, by_owner)
        received = group.all_to_all(sent)
        bad = first_bad_parameter(received)
        if bad < 0:
            mean = bucket.flat.new_zeros(served.elements)
            for payload in received:  # in rank order: float sums depend on it
                self.compressor.decompress_(payload.tensors[1:], served, mean, alpha=1 / group.size, add=True)
            answer = self.server.compress(mean, [answered])
            layouts = [((torch.int32, 1), *self.server_compressor.layout(blocks)) for blocks in parts.served]
            answers = group.all_gather(answer[0], layouts)
            bad = first_bad_parameter(answers)
            if bad < 0:
                for blocks, payload in zip(parts.by_owner, answers, strict=True):
                    if self.server_compressor.shares_keys:
                        blocks = self.keyed(blocks, self.server_compressor, "server")
                    self.server_compressor.decompress_(payload.tensors[1:], blocks, bucket.flat)
                return self._multiply(bucket, inverse=True)
            self.server.undo(mean, answer, [answered])
        self.worker.undo(bucket.flat, sent, by_owner)
        return self._void(bucket, bad)

    def _served(self, parts: Parts, by_owner: Sequence[Blocks]) -> tuple[Blocks, Blocks]:
        """What this rank serves: with the keys that the workers had, and with those of its answer."""
        served = parts.served[self.rank]
        answered = self.keyed(served, self.server_compressor, "server")
        if self.server_compressor.shares_keys:
            keys = self.keyed(parts.by_owner[self.rank], self.server_compressor, "server").keys
            answered = answered.with_keys(keys)
        return (served.with_keys(by_owner[self.rank].keys) if self.compressor.shares_keys else served), answered

    def _multiply(self, bucket: Bucket, *, inverse: bool = False) -> None:
        if self.factors is None:
            return
        for name, x in bucket.views():
            if name not in self.dense_names:
                factor = self.factors[self.index.position[name]]
                x.div_(factor) if inverse else x.mul_(factor)

    def bytes_per_parameter(self, ranks: int) -> float:
        both = self.compressor.bytes_per_element(ranks) + self.server_compressor.bytes_per_element(ranks)
        return (ranks - 1) / ranks * both

    @property
    def state_form(self) -> str:
        return f"{super().state_form}, {self.server_compressor}"

    def state_views(self, name: str) -> list[Tensor]:
        mine = self.table.served_by(self.rank)
        own = mine.only(np.flatnonzero(mine.parameters == self.index.position[name]))
        served = [
            view
            for h, n in zip(own.homes.tolist(), own.lengths.tolist(), strict=True)
            for view in self.server.views(h, n)
        ]
        return super().state_views(name) + served

    def comm_state(self) -> State:
        state = super().comm_state()
        state["local"] |= self.server.state("server_residual")
        if self.factors is not None:
            state["shared"]["factors"] = self.factors
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        for key, x in self.server.state("server_residual").items():
            load_tensor(x, state["local"], key)
        self._load_factors(state)

    def load_resharded(self, states: Iterable[State]) -> None:
        every = list(states)
        super().load_resharded(every)
        self._load_factors(every[0])
        if not self.residual_bits:
            return
        total = self._mean_residual(every)
        old = self.compressor.table(self.index, len(every), self.dense_names)
        for rank, state in enumerate(every):
            blocks, served = old.at_home(rank), old.served_by(rank)
            places = element_indices(blocks.starts, blocks.lengths, self.device)
            total[places] += self.server.dense(state["local"], "server_residual", served)
        self._set_worker_residual(total)
        self.server.residual.zero_()

    def _load_factors(self, state: State) -> None:
        stored = state["shared"].get("factors")
        self.factors = None if stored is None else stored.clone().to(self.device)
