"""EF21: ranks send how their gradient differs from what the others already know of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.compress import make_compressor
from commopt.compress.base import Compressor, element_indices
from commopt.compress.feedback import ErrorFeedback, first_bad_parameter
from commopt.errors import AttachError, ConfigError, check_option
from commopt.exchange.compressed import Compressed
from commopt.exchange.mean import State, check_alone, first_bad, is_finite, load_tensor
from commopt.groups.base import Group
from commopt.wire.bucket import Blocks, Bucket
from commopt.wire.payload import Payload


class EF21(Compressed):
    """Send the compressed difference between a moving average of the gradient and the estimate of it that all ranks have.

    Richtarik et al. 2021, arXiv:2106.05203, Algorithm 2 (EF21), and Fatkhullin et al. 2023, arXiv:2305.15155, Algorithm 1
    (EF21-SGDM, which needs no large batches):
        v_i <- (1 - eta) v_i + eta g_i
        c_i = C(v_i - h_i);  h_i <- h_i + c_i;  h <- h + mean c_i
    and h is handed to the optimizer. With `server` the answer is compressed in the same way, after EF21-BC
    (arXiv:2110.03294): the rank that keeps h sends C_s(h - w), all add it to w, and w is handed to the optimizer.
    EF21-BC does that to the parameters, which only the optimizer has; here it is done to h.
    h_i starts as this rank's first gradient, which travels uncompressed, so that h is the mean of h_i from the start; from then on
    every rank adds the same messages to h, in rank order, or none where one of them is void.
    Sends (N-1) x C bytes per parameter and step, C being what the compressor needs for one, after a first step with the exact mean;
    with `server` (N-1)/N x (C + C_s).
    State: h_i and h, 4 bytes per parameter each, and 4 for v_i where eta is below 1; with `server` 4/N more.
    Use it where the compressor is harsh and ranks see different data: it needs no bounded gradients, and no residual piles up.
    Not for signs without `server` on many ranks, where an all-gather costs more than the exact mean; nor without eta in small batches.

    compressor: a name ("sign", "top_k", ...), or {"compressor": name, option: value}, best a contraction; `ef21(top_k)` names it.
    eta: weight of the new gradient in v_i, above 0 to 1 (default 0.1): 1 is EF21. Below 1 the optimizer must
        have no momentum of its own; its rate is then 1 / (1 - momentum) times that of SGD with momentum.
    server: how answers are compressed; none travel if left out, because every rank gets every message.
    refresh_every: send v_i uncompressed again after so many exchanges, which also removes what rounding has added up in h; never if None.
    dense_1d: average parameters with fewer than two dimensions (biases, norms) exactly.
    seed: of stochastic rounding.
    """

    name = "ef21"
    positional = ("compressor", "server")

    def __init__(
        self,
        *,
        compressor: str | Mapping[str, Any] = "sign",
        eta: float = 0.1,
        server: str | Mapping[str, Any] | None = None,
        refresh_every: int | None = None,
        dense_1d: bool = False,
        seed: int = 0,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        check_option("eta", eta, lambda x: 0 < x <= 1, "a number above 0, at most 1")
        is_count = "a whole number from 1, or leave it out"
        check_option(
            "refresh_every",
            1 if refresh_every is None else refresh_every,
            lambda x: isinstance(x, int) and x >= 1,
            is_count,
        )
        worker = make_compressor(compressor)
        self.server_compressor = None if server is None else make_compressor(server, "server")
        if self.server_compressor is not None:
            _check_two_ways(worker, self.server_compressor)
        super().__init__(
            worker, error_feedback=False, dense_1d=dense_1d, seed=seed, max_norm=max_norm, grad_scaler=grad_scaler
        )
        self.eta, self.refresh_every = eta, refresh_every
        self.merges_buckets = getattr(worker, "merges_buckets", False)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self.eta < 1 and any(group.get("momentum") for group in optimizer.param_groups):
            raise AttachError(
                f"ef21 has the momentum itself (eta: {self.eta}), and a second one makes it swing: give it "
                f"{type(optimizer).__name__} without momentum, or write eta: 1"
            )

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        n = self.index.total
        self.known = torch.zeros(n, device=self.device)  # h_i: what the others know of v_i
        self.estimate = torch.zeros(n, device=self.device)  # h, or with a server w: the same on all ranks
        self.average = torch.zeros(n if self.eta < 1 else 0, device=self.device)  # v_i
        served = self.table.served_elements(group.rank) if self.server_compressor else 0
        self.served = torch.zeros(served, device=self.device)  # h of the blocks that this rank serves
        if self.server_compressor:
            self.answerer = ErrorFeedback(self.server_compressor, 0, self.device, bits=0)

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        v = bucket  # v_i takes the place of g_i
        for name, x in v.views():
            if self.eta < 1 and self._count(name):
                torch.lerp(self.index.view(self.average, name), x, self.eta, out=x)
        if group.size == 1:
            check_alone(self, bucket)
        else:
            self._exchange(v, group)
        if bucket.void is None:
            self._keep("average", v)
            if group.size > 1:
                for name, x in bucket.views():
                    x.copy_(self.index.view(self.estimate, name))

    def _exchange(self, v: Bucket, group: Group) -> None:
        """Bring h_i and h up to date with v_i, or set v.void."""
        whole = {name for name, _ in v.views() if self._is_whole(name)}
        exact = None
        if whole:
            exact = Bucket.of([(name, x / group.size) for name, x in v.views() if name in whole])
            group.all_reduce(exact.flat)
            if not is_finite(exact.flat):
                v.void = first_bad(self.index, exact)
                return None
        if len(whole) < len(v.names):
            difference = v.with_flat(v.flat.clone())
            for name, x in difference.views():
                x -= self.index.view(self.known, name)  # v_i - h_i
            exchange = self._two_ways if self.server_compressor else self._one_way
            bad = exchange(difference, whole, group)
            if bad >= 0:
                return self._void(v, bad)
        if exact is not None:
            self._keep("known", v, whole)
            self._keep("estimate", exact)
            self._serve(exact)
        return None

    def _one_way(self, difference: Bucket, whole: set[str], group: Group) -> int:
        """h_i <- h_i + c_i;  h <- h + mean c_i. The first bad parameter, or -1; then nothing has changed."""
        blocks = self._coded(self.keyed(self.blocks(difference), self.compressor), whole)
        if not len(blocks):
            return -1
        own = self.worker.compress(difference.flat, [blocks])[0]
        messages = group.all_gather_ragged(own) if self.compressor.is_ragged else group.all_gather(own)
        bad = first_bad_parameter(messages)
        if bad < 0:
            at_home = _placed(blocks, blocks.homes)
            self._decode(own, at_home, self.known)
            for message in messages:  # in rank order: float sums depend on it
                self._decode(message, at_home, self.estimate, 1 / group.size)
        return bad

    def _two_ways(self, difference: Bucket, whole: set[str], group: Group) -> int:
        """h_i <- h_i + c_i;  h <- h + mean c_i;  w <- w + C_s(h - w), each block by the rank that serves it."""
        assert self.server_compressor is not None
        parts = self.parts(difference)
        by_owner = [self._coded(self.keyed(blocks, self.compressor), whole) for blocks in parts.by_owner]
        served = [self._coded(blocks, whole) for blocks in parts.served]
        if not any(len(blocks) for blocks in by_owner):
            return -1
        own = self.worker.compress(difference.flat, by_owner)
        received = group.all_to_all(own)
        bad = first_bad_parameter(received)
        if bad >= 0:
            return bad
        mine, rank = self.keyed(served[group.rank], self.server_compressor, "server"), group.rank
        mine = _placed(mine, np.cumsum(mine.lengths) - mine.lengths)
        served_places = element_indices(mine.homes, mine.lengths, self.device)
        h = self.served[served_places]
        for message in received:  # in rank order
            self._decode(message, mine, h, 1 / group.size)
        w = self.estimate[element_indices(by_owner[rank].homes, mine.lengths, self.device)]
        answer = self.answerer.compress(h - w, [mine])[0]
        layouts = [((torch.int32, 1), *self.server_compressor.layout(blocks)) for blocks in served]
        answers = group.all_gather(answer, layouts)
        bad = first_bad_parameter(answers)
        if bad < 0:
            self.served[served_places] = h
            for message, reply, blocks in zip(own, answers, by_owner, strict=True):
                at_home = _placed(blocks, blocks.homes)
                self._decode(message, at_home, self.known)
                self.server_compressor.decompress_(reply.tensors[1:], at_home, self.estimate, add=True)
        return bad

    def _decode(self, message: Payload, blocks: Blocks, out: Tensor, alpha: float = 1.0) -> None:
        self.compressor.decompress_(message.tensors[1:], blocks, out, alpha=alpha, add=True)

    def _count(self, name: str) -> int:
        return int(self.exchanges[self.index.position[name]])

    def _is_whole(self, name: str) -> bool:
        """Whether v_i of this parameter travels uncompressed in this exchange."""
        count = self._count(name)
        return count == 0 or name in self.dense_names or bool(self.refresh_every and count % self.refresh_every == 0)

    def _coded(self, blocks: Blocks, whole: set[str]) -> Blocks:
        """The blocks whose differences are sent."""
        if not whole:
            return blocks
        names = self.index.names
        return blocks.only(np.asarray([b for b, p in enumerate(blocks.parameters) if names[p] not in whole], np.int64))

    def _keep(self, state: str, bucket: Bucket, names: set[str] | None = None) -> None:
        """Copy a bucket into a flat tensor of state, where that is kept at all."""
        flat = getattr(self, state)
        if len(flat):
            for name, x in bucket.views():
                if names is None or name in names:
                    self.index.view(flat, name).copy_(x)

    def _serve(self, exact: Bucket) -> None:
        """Take an exact mean into h of the blocks that this rank serves."""
        if self.server_compressor and not self.dense_names.issuperset(exact.names):
            parts = self.parts(exact)
            blocks, served = parts.by_owner[self.rank], parts.served[self.rank]
            values = exact.flat[element_indices(blocks.starts, blocks.lengths, self.device)]
            self.served[element_indices(served.homes, served.lengths, self.device)] = values

    @property
    def is_steady(self) -> bool:
        return bool(self.exchanges.any())

    @property
    def warmup_steps(self) -> int:
        return 1

    def bytes_per_parameter(self, ranks: int) -> float:
        whole = 1 / self.refresh_every if self.refresh_every else 0.0
        worker = self.compressor.bytes_per_element(ranks)
        coded = (ranks - 1) * worker
        if self.server_compressor:
            coded = (ranks - 1) / ranks * (worker + self.server_compressor.bytes_per_element(ranks))
        return whole * 8 * (ranks - 1) / ranks + (1 - whole) * coded

    @property
    def state_form(self) -> str:
        return f"{super().state_form}, {self.server_compressor}, {'gradient' if self.eta == 1 else 'average'}"

    def state_views(self, name: str) -> list[Tensor]:
        views = [self.index.view(x, name) for x in (self.known, self.estimate, self.average) if len(x)]
        if self.server_compressor:
            mine = self.table.served_by(self.rank)
            own = mine.only(np.flatnonzero(mine.parameters == self.index.position[name]))
            views += [self.served[h : h + n] for h, n in zip(own.homes.tolist(), own.lengths.tolist(), strict=True)]
        return super().state_views(name) + views

    def comm_state(self) -> State:
        state = super().comm_state()
        state["shared"]["estimate"] = self.estimate
        state["local"] |= {"known": self.known, "average": self.average, "served": self.served}
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        load_tensor(self.estimate, state["shared"], "estimate")
        for key in ("known", "average", "served"):
            load_tensor(getattr(self, key), state["local"], key)

    def load_resharded(self, states: Iterable[State]) -> None:
        """Every new rank takes h for its h_i, of which h is then the mean again, and the mean of the old ranks' v_i."""
        every = list(states)
        super().load_resharded(every)
        load_tensor(self.estimate, every[0]["shared"], "estimate")
        self.known.copy_(self.estimate)
        if self.server_compressor:
            old = self.compressor.table(self.index, len(every), self.dense_names)
            for rank, state in enumerate(every):
                self.known[_home_places(old.at_home(rank), self.device)] = state["local"]["served"].to(self.device)
            self.served.copy_(self.known[_home_places(self.table.at_home(self.rank), self.device)])
        self.average.copy_(torch.stack([state["local"]["average"] for state in every]).mean(0))


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


def _placed(blocks: Blocks, starts: Any) -> Blocks:
    """The same blocks of a tensor in which they begin elsewhere."""
    return Blocks(starts, blocks.homes, blocks.lengths, blocks.parameters, blocks.groups, blocks.keys)


def _home_places(blocks: Blocks, device: torch.device) -> Tensor:
    return element_indices(blocks.homes, blocks.lengths, device)
