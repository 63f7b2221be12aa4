"""The compressed mean of compressed buckets, in two phases."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from commopt import kernels
from commopt.compress.base import Compressor
from commopt.compress.feedback import Kept, first_bad_parameter, layouts_of
from commopt.errors import ConfigError
from commopt.exchange.compressed import Compressed
from commopt.groups.base import Group
from commopt.kernels.reference.runs import element_indices
from commopt.wire.bucket import Blocks, Bucket, Parts
from commopt.wire.payload import gathered_bytes
from commopt.wire.residual import Blended
from commopt.wire.state import Saved, State


class TwoWayMean(Compressed):
    """The compressed mean of compressed buckets: all-to-all to each block's owner, which averages, compresses and sends it to all.

    arXiv:2102.02888, Figure 3, and DoubleSqueeze (arXiv:1905.05957): both sides keep what they could not send.
    Conserved exactly but for rounding: sum over steps of mean inputs = sum of outputs + mean worker residual +
    server residuals. Payload: 2(N-1)/N compressed buckets. `server` compresses the answers; the workers' compressor if None.

    factors: (P,) f32 of 1-bit LAMB (arXiv:2104.06069): each parameter is multiplied by its own before it is compressed, and
    divided by it afterwards; None for all 1. The residuals are in multiplied units.
    blended: for signs that blend (`BlockSign.blends`), states and weights: x <- s + weight (x - s) for one or two in turn, before it is
    compressed.
    also: for these, a tensor that gets the answers, too. mask: for those on a CPU, (n,) bool; where it is False, answers are zero.
    States are laid out by the index of all parameters.
    """

    blended: tuple[tuple[Tensor, float], ...] = ()
    also: Tensor | None = None
    mask: Tensor | None = None

    def __init__(
        self,
        compressor: Compressor,
        kept: Kept | None = None,
        *,
        server: Compressor | None = None,
        dense_1d: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(compressor, kept, dense_1d=dense_1d, seed=seed)
        self.server_compressor = server or compressor
        if self.compressor.is_ragged or self.server_compressor.is_ragged:
            raise ConfigError(f"{compressor}: its messages have no length known beforehand, which two phases need")
        if self.compressor.shared_scale != self.server_compressor.shared_scale:
            raise ConfigError(
                f"{compressor} and {self.server_compressor} cut parameters differently; use a scale per block"
            )
        self.merges_buckets = getattr(compressor, "merges_buckets", False)

    def declare(self) -> list[State]:
        factors, index = State("factors", of="parameter"), self.index_of(self.served, self.served.lengths)
        return [*super().declare(), *self.residual("server_residual", self.served, index), factors]  # 0: no factors

    def bound(self) -> None:
        super().bound()
        self._factors = self.state["factors"].numpy()
        self.server = self.feedback("server_residual", self.server_compressor, self.served)

    @property
    def factors(self) -> Tensor | None:
        return self.state["factors"] if self._factors.any() else None

    @factors.setter
    def factors(self, factors: Tensor) -> None:
        self.state["factors"].copy_(factors)

    def exchange_blocks(self, bucket: Bucket, blocks: Blocks, group: Group) -> None:
        parts = self.table.parts(bucket)
        by_owner = [self.keyed(blocks, self.compressor) for blocks in parts.by_owner]
        served, answered = self._served(parts, by_owner)
        self._multiply(bucket)
        moved = Blended(self.worker.residual, states=self.blended) if self.blended else None
        sent = self.worker.compress(bucket.flat, by_owner, moved=moved)
        received = group.all_to_all(sent)
        # a GPU is asked once, at the end: until then, answers carry on what the messages say
        is_late = kernels.has_triton(self.device)
        if is_late or not self.is_void(bucket, first_bad_parameter(received), group):
            mean = bucket.flat.new_empty(served.elements)
            self.compressor.add_up_(received, served, mean, alpha=1 / group.size)
            layouts = layouts_of(self.server_compressor, parts.served)
            room = gathered_bytes(layouts)
            answer = self.server.compress(mean, [answered], received if is_late else (), room=room)
            answers = group.all_gather(answer[0], layouts)
            if not self.is_void(bucket, self.first_bad_in(answers), group):
                to = parts.by_owner
                if self.server_compressor.shares_keys:
                    to = tuple(self.keyed(blocks, self.server_compressor, "server") for blocks in to)
                self.server_compressor.decompress_payloads_(answers, to, bucket.flat, also=self.also, mask=self.mask)
                self.forget(self.worker, by_owner)
                self.forget(self.server, [answered])
                return self._multiply(bucket, inverse=True)
            self.server.undo(mean, answer, [answered])
        for state, weight in self.blended:
            for blocks in by_owner:
                kernels.of("apply", self.device).blend_(state, bucket.flat, bucket.flat, blocks, weight)
        return self.worker.undo(bucket.flat, sent, by_owner)

    def _served(self, parts: Parts, by_owner: Sequence[Blocks]) -> tuple[Blocks, Blocks]:
        """What this rank serves: with the keys that the workers had, and with those of its answer."""
        served = parts.served[self.rank]
        answered = self.keyed(served, self.server_compressor, "server")
        if self.server_compressor.shares_keys:
            keys = self.keyed(parts.by_owner[self.rank], self.server_compressor, "server").keys
            answered = answered.having(keys=keys)
        return (served.having(keys=by_owner[self.rank].keys) if self.compressor.shares_keys else served), answered

    def _multiply(self, bucket: Bucket, *, inverse: bool = False) -> None:
        factors = self.factors
        if factors is None:
            return
        for name, x in self.compressed_views(bucket):
            factor = factors[self.index.position[name]].to(x.device)
            x.div_(factor) if inverse else x.mul_(factor)

    def bytes_per_parameter(self, ranks: int) -> float:
        both = self.compressor.bytes_per_element(ranks) + self.server_compressor.bytes_per_element(ranks)
        return (ranks - 1) / ranks * both

    @property
    def state_form(self) -> str:
        return f"{super().state_form}, {self.server_compressor}"

    def unsent(self, every: Sequence[Saved]) -> Tensor:
        total = super().unsent(every)
        old = self.compressor.table(self.index, len(every), self.dense_names)
        for rank, saved in enumerate(every):
            blocks, served = old.at_home(rank), old.served_by(rank)
            places = element_indices(blocks.starts, blocks.lengths, self.device)
            total[places] += self.server.dense(saved["rank"], "server_residual", served)
        self.state["server_residual"].zero_()
        return total
