"""EF21: ranks send how their gradient differs from the estimate that the others already have."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Compressor
from commopt.compress.feedback import ErrorFeedback, Kept, first_bad_parameter
from commopt.compress.options import Codec
from commopt.errors import AttachError, ConfigError
from commopt.exchange.compressed import Compressed
from commopt.groups.base import Group
from commopt.kernels.reference.runs import element_indices
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import Count, Flag, Share, Whole
from commopt.wire.bucket import Blocks, Bucket, once_per_layout
from commopt.wire.payload import Payload
from commopt.wire.residual import Moved
from commopt.wire.state import Saved, State


@options
class EF21Options(NoOptions):
    compressor: Codec = "sign"  # type: ignore[assignment]  # a name, until it is validated
    eta: Share = 0.1
    server: Codec | None = None
    refresh_every: Count | None = None
    dense_1d: Flag = False
    seed: Whole = 0


class EF21(GradientMethod, Compressed):
    """Send the compressed difference between a moving average of the gradient and the estimate of it that all ranks have.

    Richtarik et al. 2021, arXiv:2106.05203, Algorithm 2 (EF21), and Fatkhullin et al. 2023, arXiv:2305.15155,
    Algorithm 1 (EF21-SGDM, which needs no large batches):
        v_i <- (1 - eta) v_i + eta g_i
        c_i = C(v_i - h_i);  h_i <- h_i + c_i;  h <- h + mean c_i
    The optimizer then gets h. With `server`, the answer is compressed in the same way, after EF21-BC
    (arXiv:2110.03294). The rank that keeps h sends C_s(h - w), all ranks add it to w, and the optimizer gets w.
    EF21-BC compresses the parameters, which only the optimizer has; here h is compressed instead. h_i starts as this
    rank's first gradient, which is sent uncompressed, so h is the mean of h_i from the start. From then on, every rank
    adds the same messages to h, in rank order, or none if one of them is void.
    Sends (N-1) x C bytes per parameter and step, where C is the compressor's bytes per parameter, after a first step
    with the exact mean. With `server` it sends (N-1)/N x (C + C_s).
    State: h_i and h, 4 bytes per parameter each, and 4 for v_i if eta is below 1; with `server` 4/N more.
    Use it if compression is strong and ranks see different data. It does not need bounded gradients, and residuals do
    not accumulate.
    Not for signs without `server` on many ranks, because an all-gather then costs more than the exact mean. Not
    without eta in small batches.

    compressor: a name ("sign", "top_k", ...), or {"compressor": name, option: value}, best a contraction;
        `ef21(top_k)` names it.
    eta: weight of the new gradient in v_i, above 0 to 1 (default 0.1): 1 is EF21. Below 1, the optimizer must have no
        momentum of its own; its rate is then 1 / (1 - momentum) times that of SGD with momentum.
    server: how answers are compressed. If left out, no answers are sent, because every rank gets every message.
    refresh_every: send v_i uncompressed again after this many exchanges; never if None. This also removes accumulated
        rounding errors from h.
    dense_1d: average parameters with fewer than two dimensions (biases, norms) exactly.
    seed: of stochastic rounding.
    """

    name = "ef21"
    positional = ("compressor", "server")
    Options = EF21Options
    options: EF21Options
    warmup_steps = 1

    def set_up(self) -> None:
        o = self.options
        if o.server is not None:
            _check_two_ways(o.compressor, o.server)
        Compressed.__init__(self, o.compressor, Kept(0), dense_1d=o.dense_1d, seed=o.seed)
        self.server_compressor = o.server
        self.merges_buckets = getattr(o.compressor, "merges_buckets", False)

    def declare(self) -> list[State]:
        own = [
            State("known", held="rank", on_resize="own"),  # h_i: what the others know of v_i
            State("estimate", is_cut=True),  # h, or with a server w: the same on all ranks
        ]
        if self.options.eta < 1:
            own.append(State("average", held="rank", on_resize="mean"))  # v_i
        if self.server_compressor is not None:  # h of the blocks served here
            index = self.index_of(self.served, self.served.lengths)
            own.append(State("served", index=index, held="rank", on_resize="own"))
        return [*own, *super().declare()]

    def bound(self) -> None:
        super().bound()
        if self.server_compressor is not None:
            self.answerer = ErrorFeedback(self.server_compressor, self.kept, self.served, self.device)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self.options.eta < 1 and any(group.get("momentum") for group in optimizer.param_groups):
            raise AttachError(
                f"ef21 applies momentum itself (eta: {self.options.eta}), and oscillates with a second one: give it "
                f"{type(optimizer).__name__} without momentum, or write eta: 1"
            )

    def exchange(self, bucket: Bucket, group: Group) -> None:
        v = bucket  # v_i takes the place of g_i
        if kernels.has_triton(self.device) and group.size > 1 and not any(map(self._is_refreshed, v.names)):
            return self._exchange_in_passes(v, group)
        for name, x in v.views():
            if self.options.eta < 1 and self._count(name):
                torch.lerp(self.part("average", name), x, self.options.eta, out=x)
        if group.size == 1:
            self.exchange_alone(bucket, group)
        else:
            self._bring_up_to_date(v, group)
        if bucket.void is None:
            for name, x in bucket.views():
                if "average" in self.state:
                    self.part("average", name).copy_(x)
                if group.size > 1:
                    x.copy_(self.part("estimate", name))
        return None

    def _exchange_in_passes(self, v: Bucket, group: Group) -> None:
        """The same on a GPU, in a pass before the messages and one after them."""
        from commopt.kernels.cuda import estimates

        average, blocks, eta = self.state.get("average"), self._parameters(v), self.options.eta
        moved, known = Moved(self.state["known"], average, eta), self.state["known"]
        is_fused = self.dense_names.isdisjoint(v.names) and self.compressor.takes(moved, contracts=self.kept.contracts)
        if is_fused:
            self._bring_up_to_date(v, group, v.flat, moved)
        else:
            self._bring_up_to_date(v, group, estimates.difference(v.flat, average, known, blocks, eta))
        if v.void is None:
            estimates.settle_(v.flat, average, self.state["estimate"], blocks, eta if is_fused else None)

    @once_per_layout
    def _parameters(self, bucket: Bucket) -> Blocks:
        """A block for each parameter of a bucket."""
        numbers = np.asarray([self.index.position[name] for name in bucket.names])
        starts, lengths = np.asarray(bucket.starts), np.asarray(self.index.numels)[numbers]
        return Blocks(starts, self.index.offsets[numbers], lengths, numbers, numbers)

    def _bring_up_to_date(
        self, v: Bucket, group: Group, difference: Tensor | None = None, moved: Moved | Tensor | None = None
    ) -> None:
        """Bring h_i and h up to date with v_i, or set v.void. difference: v_i - h_i, or what `moved` makes that of."""
        whole = {name for name in v.names if self._is_whole(name)}
        exact = None
        if whole:
            exact = Bucket.of([(name, x) for name, x in v.views() if name in whole])
            if not self.average_(exact, group):
                v.void = exact.void
                return
        if len(whole) < len(v.names):
            if difference is None:  # v_i + (-h_i): the codec adds them up, and leaves there what nobody needs
                difference, moved = v.flat, torch.empty_like(v.flat)
                for name, x in v.with_flat(moved).views():
                    torch.neg(self.part("known", name), out=x)
            (self._two_ways if self.server_compressor else self._one_way)(v, difference, moved, whole, group)
        if exact is not None and v.void is None:
            self._keep("known", v, whole)
            self._keep("estimate", exact)
            self._serve(exact)

    def _one_way(
        self, v: Bucket, difference: Tensor, moved: Moved | Tensor | None, whole: set[str], group: Group
    ) -> None:
        """h_i <- h_i + c_i;  h <- h + mean c_i. Nothing changes if that is void."""
        blocks = self._coded(self.keyed(self.table.all_of(v), self.compressor), whole)
        own, messages, bad = self.gathered(difference, _beside(blocks, moved), group, moved)
        if not self.is_void(v, bad, group):
            at_home = blocks.having(starts=blocks.homes)
            self._decode([own], [at_home], self.state["known"])
            self._decode(messages, [at_home] * group.size, self.state["estimate"], 1 / group.size)

    def _two_ways(
        self, v: Bucket, difference: Tensor, moved: Moved | Tensor | None, whole: set[str], group: Group
    ) -> None:
        """h_i <- h_i + c_i;  h <- h + mean c_i;  w <- w + C_s(h - w), each block by the rank that serves it."""
        assert self.server_compressor is not None
        parts = self.table.parts(v)
        by_owner = [self._coded(self.keyed(blocks, self.compressor), whole) for blocks in parts.by_owner]
        served = [self._coded(blocks, whole) for blocks in parts.served]
        own = self.worker.compress(difference, [_beside(blocks, moved) for blocks in by_owner], moved=moved)
        received = group.all_to_all(own)
        # a GPU is asked once, at the end: until then, answers carry on what the messages say
        is_late = kernels.has_triton(self.device)
        if not is_late and self.is_void(v, first_bad_parameter(received), group):
            return
        mine = self.keyed(served[group.rank], self.server_compressor, "server")
        if not self.dense_names.issuperset(whole):
            mine = mine.having(starts=np.cumsum(mine.lengths) - mine.lengths)
        h = self._taken("served", mine)
        self._decode(received, [mine] * group.size, h, 1 / group.size)
        answer = self.answerer.compress(
            self._beyond(h, by_owner[group.rank], mine), [mine], received if is_late else ()
        )[0]
        layouts = [((torch.int32, 1), *self.server_compressor.layout(blocks)) for blocks in served]
        answers = group.all_gather(answer, layouts)
        if not self.is_void(v, first_bad_parameter(answers), group):
            self._put(h, "served", mine)
            at_home = [blocks.having(starts=blocks.homes) for blocks in by_owner]
            self._decode(own, at_home, self.state["known"])
            self.server_compressor.decompress_payloads_(answers, at_home, self.state["estimate"], add=True)

    def _decode(self, messages: Sequence[Payload], parts: Sequence[Blocks], out: Tensor, alpha: float = 1.0) -> None:
        self.compressor.decompress_payloads_(messages, parts, out, alpha=alpha, add=True)

    def _taken(self, key: str, blocks: Blocks) -> Tensor:
        """(elements,) f32: some blocks of the state, end to end."""
        if kernels.has_triton(self.device):
            from commopt.kernels.cuda import estimates

            return estimates.take(self.state[key], blocks)
        return self.state[key][self._homes(blocks)]

    def _beyond(self, h: Tensor, blocks: Blocks, served: Blocks) -> Tensor:
        """h - w of the blocks that this rank serves."""
        if kernels.has_triton(self.device):
            from commopt.kernels.cuda import estimates

            return estimates.difference(h, None, self.state["estimate"], blocks.having(starts=served.starts))
        return h - self.state["estimate"][self._homes(blocks)]

    def _put(self, values: Tensor, key: str, blocks: Blocks) -> None:
        if kernels.has_triton(self.device):
            from commopt.kernels.cuda import estimates

            return estimates.put_(values, self.state[key], blocks)
        self.state[key][self._homes(blocks)] = values
        return None

    def _homes(self, blocks: Blocks) -> Tensor:
        return element_indices(blocks.homes, blocks.lengths, self.device)

    def _count(self, name: str) -> int:
        return int(self.exchanges[self.index.position[name]])

    def _is_whole(self, name: str) -> bool:
        """Whether v_i of this parameter is sent uncompressed in this exchange."""
        return name in self.dense_names or self._is_refreshed(name)

    def _is_refreshed(self, name: str) -> bool:
        """Whether it is in this exchange, and not in all of them."""
        count, every = self._count(name), self.options.refresh_every
        return count == 0 or (every is not None and count % every == 0)

    def _coded(self, blocks: Blocks, whole: set[str]) -> Blocks:
        """The blocks whose differences are sent."""
        if self.dense_names.issuperset(whole):  # which have no blocks
            return blocks
        names = self.index.names
        return blocks.only(np.asarray([b for b, p in enumerate(blocks.parameters) if names[p] not in whole], np.int64))

    def _keep(self, key: str, bucket: Bucket, names: set[str] | None = None) -> None:
        """Copy a bucket, or some of its parameters, into the state `key`."""
        pairs = [(self.part(key, name), x) for name, x in bucket.views() if names is None or name in names]
        torch._foreach_copy_([own for own, _ in pairs], [x for _, x in pairs])

    def _serve(self, exact: Bucket) -> None:
        """Copy an exact mean into h of the blocks that this rank serves."""
        if self.server_compressor and not self.dense_names.issuperset(exact.names):
            parts = self.table.parts(exact)
            blocks, served = parts.by_owner[self.rank], parts.served[self.rank]
            values = exact.flat[element_indices(blocks.starts, blocks.lengths, self.device)]
            self.state["served"][self._homes(served)] = values

    def bytes_per_parameter(self, ranks: int) -> float:
        whole = 1 / self.options.refresh_every if self.options.refresh_every else 0.0
        worker = self.compressor.bytes_per_element(ranks)
        coded = (ranks - 1) * worker
        if self.server_compressor:
            coded = (ranks - 1) / ranks * (worker + self.server_compressor.bytes_per_element(ranks))
        return whole * 8 * (ranks - 1) / ranks + (1 - whole) * coded

    @property
    def state_form(self) -> str:
        kind = "gradient" if self.options.eta == 1 else "average"
        return f"{super().state_form}, {self.server_compressor}, {kind}"

    def resize(self, every: Sequence[Saved]) -> None:
        """Every new rank takes h for its h_i, of which h is then the mean again, and the mean of the old ranks' v_i."""
        super().resize(every)
        known = self.state["known"]
        known.copy_(self.state["estimate"])
        if self.server_compressor:
            old = self.compressor.table(self.index, len(every), self.dense_names)
            for rank, saved in enumerate(every):
                known[self._homes(old.at_home(rank))] = saved["rank"]["served"].to(self.device)
            self.state["served"].copy_(known[self._homes(self.table.at_home(self.rank))])


def _beside(blocks: Blocks, moved: Moved | Tensor | None) -> Blocks:
    """The blocks as they lie in a tensor that is laid out like the bucket, if what goes with the values is one."""
    return blocks.having(homes=blocks.starts) if isinstance(moved, Tensor) else blocks


def _check_two_ways(worker: Compressor, server: Compressor) -> None:
    for codec in (worker, server):
        if codec.is_ragged:
            raise ConfigError(
                f"server: {codec} has no length known beforehand, which two phases need; leave server out"
            )
        if codec.shares_keys:
            raise ConfigError(
                f"server: {codec} draws the same places on all ranks, which two phases do not; leave server out"
            )
    if worker.shared_scale != server.shared_scale:
        raise ConfigError(f"server: {worker} and {server} cut parameters differently; use a scale per block")
