"""What the ranks' signs add up to: one bit up, the majority or the count down. A third form beside gathering and the two-way mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from commopt import kernels
from commopt.compress.feedback import HEADER, first_bad_parameter
from commopt.errors import AttachError
from commopt.exchange.base import Exchange, first_bad
from commopt.groups.base import Group
from commopt.kernels.reference.votes import count_votes
from commopt.wire import noise
from commopt.wire.bucket import Blocks, BlockTable, Bucket, Int64Array, ParameterIndex
from commopt.wire.payload import Bundle, Layout, Payload, gathered_bytes, in_a_row, row_of

_MOST_RANKS = 255  # a count is a byte while it is unpacked


class SignVote(Exchange):
    """Replace each element by the sign that most ranks hold ("majority"), or by the mean of the ranks' signs ("average").

    Liu et al. 2024, arXiv:2404.00438, Algorithm 1 (MaVo, Avg). Each rank sends one bit per element to the block's owner, which
    counts them, and sends every rank one bit (majority) or the count in ceil(log2(N+1)) bits (average).

    A bit has no room for sign(0) = 0, and a fixed side would make ties and unused elements drift. So a tie of an even vote takes
    a coin that all ranks share, and a rank whose value is zero votes by a coin of its own. Coins depend on the element's place and on
    how often its parameter has been exchanged, for any buckets, and every second toss is the opposite of the one before it: an
    element that no rank has an opinion on never is further from where it began than one step, and where only some
    ranks have none, the others are heard.

    Sends (N-1)/N x (1 + 1)/8 bytes per element, or (N-1)/N x (1 + ceil(log2(N+1)))/8. State: none.

    is_majority: vote, or average. seed: of the coins.
    One rank alone takes the sign, of which sign(0) = 0.
    """

    def __init__(self, *, is_majority: bool, seed: int = 0) -> None:
        self.is_majority, self.seed = is_majority, seed

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().lay_out(named_parameters, group)
        if group.size > _MOST_RANKS and not self.is_majority:
            raise AttachError(f"vote: 'average' counts up to {_MOST_RANKS} ranks, not {group.size}; write 'majority'")
        self._table = BlockTable.cut(self.index, group.size, self.pieces, shared_scale=False).of_share(self.share)
        self._width = 1 if self.is_majority else group.size.bit_length()  # bits of an answer
        top = 1 if self.is_majority else group.size
        counts = torch.arange(2**self._width, dtype=torch.float32, device=self.device)
        self._values = (2 * counts - top) / top  # (2^width,) what a count stands for

    def bound(self) -> None:
        super().bound()
        if not kernels.has_triton(self.device):  # else a step would wait for them
            x = torch.ones(8, dtype=torch.float32, device=self.device)
            row = torch.zeros(4 + self._width, dtype=torch.uint8, device=self.device)
            blocks = BlockTable.cut(ParameterIndex(("x",), (8,)), 1, self.pieces, shared_scale=False).everything
            tossed, kernel = (
                (noise.words(self.seed, "try", 0, np.zeros(1, np.int64)), np.zeros(1, np.uint8)),
                self._kernels,
            )
            kernel.pack_votes_(x, [blocks], tossed, row, (0,))
            kernel.unpack_counts_(row, (0,), self._width, [blocks], self._values, x)
            if self.is_majority:
                kernel.toss_(blocks, tossed, row)

    def exchange(self, bucket: Bucket, group: Group) -> None:
        self.vote(bucket.flat, bucket.flat, bucket, group)

    def vote(self, x: Tensor, out: Tensor, bucket: Bucket, group: Group) -> bool:
        """out <- the vote on the signs of x; False, with bucket.void set, where x has a NaN or an inf on any rank.

        x, out: laid out as bucket.flat is; they may be one tensor, which a void vote leaves as it was.
        """
        if group.size == 1:
            if not self.is_void(bucket, first_bad(self.index, bucket.with_flat(x)), group):
                torch.sign(x, out=out)
            return bucket.void is None
        answers = self.poll(x, bucket, group)
        if answers is not None:
            self.read_(answers, bucket, out)
        return answers is not None

    def poll(
        self, x: Tensor, bucket: Bucket, group: Group, blended: tuple[Tensor, float] | None = None
    ) -> list[Payload] | None:
        """The first part of `vote`, of two ranks or more: the answers, or None if the vote is void.

        blended: a state of elements and a weight: the vote is on s + weight (x - s).
        """
        by_owner = self._table.parts(bucket).by_owner
        ballots = in_a_row([(*HEADER, (torch.uint8, blocks.sign_bytes)) for blocks in by_owner], x.device)
        self._cast(x, by_owner, ballots, group.rank, blended)
        received = group.all_to_all(ballots)
        if self.is_void(bucket, first_bad_parameter(received), group):
            return None
        layouts = [((torch.uint8, self._width * blocks.sign_bytes),) for blocks in by_owner]
        answer = self._count(received, by_owner[group.rank], layouts, group.rank)
        return group.all_gather(answer, layouts)

    def read_(
        self,
        answers: Sequence[Payload],
        bucket: Bucket,
        out: Tensor,
        also: Tensor | None = None,
        followed: tuple[Tensor, float] | None = None,
    ) -> None:
        """The second part of `vote`: out <- the answers to the first one; also: another tensor that gets them.

        followed: a state of elements and a weight, s <- s + weight (out - s) before.
        """
        by_owner = self._table.parts(bucket).by_owner
        if kernels.has_triton(self.device):
            if followed is not None:
                state, weight = followed
                index = self.index if self.share is None else self.share.index
                ms = [index.view(state, name) for name in bucket.names]
                torch._foreach_lerp_(ms, [x for _, x in bucket.with_flat(out).views()], weight)
            self._kernels.unpack_all_(answers, by_owner, self._width, self._values, out, also)
            return
        row, at = row_of(answers)
        self._kernels.unpack_counts_(row, at, self._width, by_owner, self._values, out, also, *(followed or ()))

    def bytes_per_parameter(self, ranks: int) -> float:
        return (ranks - 1) / ranks * (1 + (1 if self.is_majority else ranks.bit_length())) / 8

    @property
    def _kernels(self) -> Any:
        return kernels.of("votes", self.device)

    def _cast(
        self,
        x: Tensor,
        by_owner: Sequence[Blocks],
        ballots: Bundle,
        rank: int,
        blended: tuple[Tensor, float] | None = None,
    ) -> None:
        """For each owner: the index of the first parameter with a NaN or an inf, or -1, and a bit per element."""
        if kernels.has_triton(self.device):
            from commopt.kernels.cuda import headers

            first = headers.noted_in(ballots)
            tossed = [self._tossed("zero", rank, blocks) for blocks in by_owner]
            self._kernels.pack_all_(x, ballots, [blocks for blocks, _ in tossed], tossed[0][1], first, blended)
            headers.write_(first, ballots)
            return
        row, at = ballots.row, ballots.at
        bad = self._kernels.pack_votes_(x, by_owner, self._flipped("zero", rank), row, at, *(blended or ()))
        ballots.head_all_(bad)

    def _count(self, received: Sequence[Payload], blocks: Blocks, layouts: Sequence[Layout], rank: int) -> Payload:
        """The answer for the blocks that this rank serves, from every rank's bits."""
        needs_coin = self.is_majority and len(received) % 2 == 0  # one more voter decides ties
        if kernels.has_triton(self.device):
            answer = in_a_row([layouts[rank]], self.device, room=gathered_bytes(layouts))[0]
            own, flips = self._tossed("tie", 0, blocks) if needs_coin else (blocks, None)
            self._kernels.count_all_(received, own, flips, self._width, answer.tensors[0])
            return answer
        rows = [payload.tensors[1] for payload in received]
        if not self.is_majority:
            return Payload.of(torch.cat(count_votes(rows, self._width)))
        if needs_coin:
            rows = [*rows, torch.empty_like(rows[0])]
            self._kernels.toss_(blocks, self._flipped("tie", 0), rows[-1])
        width, needed = len(rows).bit_length(), len(rows) // 2 + 1
        return Payload.of(count_votes(rows, width, 2 ** (width - 1) - needed)[-1])  # the top bit is: as many as needed

    def _tossed(self, purpose: str, rank: int, blocks: Blocks) -> tuple[Blocks, Int64Array]:
        """The blocks with what kernels draw their keys by, and 1 where it is the second toss with this key, of one or all parameters."""
        counts = self.exchanges.numpy()
        own = counts[blocks.own_parameters]
        if len(own) and (own == own[0]).all():
            counts = own[:1]
        return blocks.having(words=noise.words(self.seed, purpose, rank, counts // 2)), counts % 2

    def _flipped(self, purpose: str, rank: int) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """What kernels on a CPU draw coins by, one word for all parameters or (P,), and likewise 255 where they are turned over."""
        counts = self.exchanges.numpy()
        counts = counts[:1] if (counts == counts[0]).all() else counts
        return noise.words(self.seed, purpose, rank, counts // 2), (counts % 2 * 255).astype(np.uint8)
