"""TernGrad: minus one, zero or one, with a scale that all ranks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from commopt import kernels
from commopt.compress.feedback import NOTHING_KEPT, first_of
from commopt.compress.quantize import Ternary, bits_of, pack_codes_, unpack_codes
from commopt.errors import AttachError
from commopt.exchange.base import first_bad
from commopt.exchange.compressed import Compressed
from commopt.groups.base import Group
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import Flag, Names, Number, Wanted, Whole
from commopt.wire.bucket import Blocks, Bucket, Int64Array, ParameterIndex, Parts, once_per_layout
from commopt.wire.payload import Payload, in_a_row, row_of

if TYPE_CHECKING:
    from commopt.kernels.cuda.pieces import Messages

_MOST_RANKS = 127
_LEVELS: dict[str, Any] = {"kind": "levels"}


@options
class TernGradOptions(NoOptions):
    clip: Annotated[Number, Field(ge=0), Wanted("a number above 0, or 0 for no clamp")] = 2.5
    dense_1d: Flag = True
    dense: Annotated[Names, Wanted("a list of parameter names")] = ()
    seed: Whole = 0


class _Tables(NamedTuple):
    """What follows from a bucket's layout.

    parameters, dense: a block for each parameter that is compressed, and for each that is not. places: (B,) i64, which parameter each
    block of all owners is part of; firsts: where those of each owner begin; slots: what is made of places. ones: scales of sums.
    of_answers: the sums of each owner as one block, end to end.
    """

    parameters: Blocks
    dense: Blocks
    dense_names: tuple[str, ...]
    places: Tensor
    firsts: list[int]
    ones: Tensor
    of_answers: list[Blocks]
    zero: Int64Array
    slots: dict[int, Any]


class TernGrad(GradientMethod, Compressed):
    """Send each gradient element as -1, 0 or 1 at random, sum these as integers, and send the sums back.

    Wen et al. 2017, arXiv:1705.07878, Algorithm 1 with scaler sharing and layer-wise ternarising:
        g_i <- clamp(g_i, -clip sigma_i, clip sigma_i);  s = max over ranks of max|g_i|
        t_i = sign(g_i) with chance |g_i| / s, else 0;  y = s/N sum t_i
    It is unbiased except for the clamp. All ranks agree on one scale per parameter before anything is rounded. The sum
    is therefore one of integers from -N to N. It works with up to 127 ranks.
    Sends (N-1)/N x (2 + ceil(log2(2N + 1)))/8 bytes per parameter and step, and 4(N-1) per tensor.
    State: none.
    Use it if there is no memory for residuals.
    Not for the best loss: there is no error feedback, and three levels are coarse; `ef_sign` costs less.

    clip: clamp to this many standard deviations of each tensor first; 0 for no clamp.
    dense_1d: average parameters with fewer than two dimensions exactly (default).
    dense: names of further parameters to average exactly, as the paper does with the last layer.
    seed: of the rounding.
    """

    name = "terngrad"
    Options = TernGradOptions
    options: TernGradOptions

    def set_up(self) -> None:
        o = self.options
        Compressed.__init__(self, Ternary(), NOTHING_KEPT, dense_1d=o.dense_1d, seed=o.seed)

    def lay_out(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        if group.size > _MOST_RANKS:
            raise AttachError(f"terngrad sums in at most 8 bits, for up to {_MOST_RANKS} ranks, not {group.size}")
        for name in set(self.options.dense) - {name for name, _ in named_parameters}:
            raise AttachError(f"dense: the model has no trainable parameter {name!r}")
        super().lay_out(named_parameters, group)
        if not kernels.has_triton(self.device):  # a kernel that its codec has no use for
            blocks = self.compressor.table(ParameterIndex(("a",), (8,)), 1).everything
            x, one = (torch.ones(n, device=self.device, dtype=torch.float32) for n in (8, len(blocks)))
            kernels.of("quantize", self.device).spread_(x, one, blocks, x.clone())

    def pieces(self, numel: int, ranks: int) -> Sequence[int]:
        return [numel]  # which has one scale

    def stays_dense(self, name: str, p: Tensor) -> bool:
        return name in self.options.dense or super().stays_dense(name, p)

    def exchange(self, bucket: Bucket, group: Group) -> None:
        is_fused = group.size > 1 and kernels.has_triton(self.device)
        if is_fused and not self.dense_names.issuperset(bucket.names):
            self._exchange_in_passes(bucket, group)
        else:
            super().exchange(bucket, group)

    def exchange_blocks(self, bucket: Bucket, blocks: Blocks, group: Group) -> None:
        scales = self._shared_scales(bucket, group)
        if self.is_void(bucket, first_of((~scales.isfinite()).nonzero().flatten().tolist()), group):
            return
        kernel, parts = kernels.of("quantize", self.device), self.table.parts(bucket)
        sent = []
        for blocks in parts.by_owner:
            payload = Payload.allocate(self.compressor.layout(blocks)[1:], self.device)
            keyed = self.keyed(blocks, self.compressor)
            own, codes = self._of(scales, blocks), payload.tensors[0]
            kernel.compress_(bucket.flat, None, keyed, own, codes, kind="levels", bits=2, is_given=True)
            sent.append(payload)
        served = parts.served[group.rank]
        one = torch.ones(len(served), device=self.device, dtype=torch.float32)
        total = bucket.flat.new_zeros(served.elements)
        for payload in group.all_to_all(sent):
            kernel.decompress_(payload.tensors[0], one, served, total, kind="levels", bits=2, alpha=1.0, add=True)
        bits = bits_of(group.size)
        layouts = [((torch.uint8, (blocks.elements * bits + 7) // 8),) for blocks in parts.served]
        answer = Payload.allocate(layouts[group.rank], self.device)
        pack_codes_(total, bits, answer.tensors[0])
        for blocks, payload in zip(parts.by_owner, group.all_gather(answer, layouts), strict=True):
            sums = unpack_codes(payload.tensors[0], bits, blocks.elements)
            kernel.spread_(sums, self._of(scales, blocks) / group.size, blocks, bucket.flat)
        return

    def _exchange_in_passes(self, bucket: Bucket, group: Group) -> None:
        """The same on a GPU, where one launch does the work for all owners."""
        from commopt.kernels.cuda import quantize, ternary
        from commopt.kernels.cuda.residuals import Clamped

        parts, its = self.table.parts(bucket), self._tables(bucket)
        own = in_a_row([((torch.float32, len(its.parameters)),)], self.device, is_zero=False)[0]
        bounds = ternary.bounds_(bucket.flat, its.parameters, self.options.clip, own.tensors[0])
        # of all blocks, then of all parameters, and then what the dense ones add up to
        scales = bounds.new_empty(len(its.places) + len(its.parameters) + 1)
        ternary.agree_(group.all_gather(own), its.places, scales)
        dense = self._dense_mean(bucket, group, scales[-1:])
        if self.is_void(bucket, self._first_bad(its, scales[len(its.places) :].tolist(), dense), group):
            return
        sent = in_a_row([self.compressor.layout(blocks)[1:] for blocks in parts.by_owner], self.device, is_zero=False)
        keyed = [self.keyed(blocks, self.compressor) for blocks in parts.by_owner]
        messages, none = _messages(sent, keyed, scales, its.firsts), torch.empty_like(bounds, dtype=torch.int32)
        clamped, how = Clamped(bounds, its.places, its.slots), _LEVELS | {"is_given": True}
        quantize.compress_all_(bucket.flat, clamped, messages, none, bits=2, **how)
        sums = self._sums(group.all_to_all(sent), parts, its, group)
        ternary.spread_(sums, scales, group.size, parts.by_owner, bucket.flat)
        if dense is not None:
            self.put_dense_(dense, bucket)

    def _sums(self, received: Sequence[Payload], parts: Parts, its: _Tables, group: Group) -> Tensor:
        """(elements,) f32: the sums that all ranks serve, end to end; received: the codes of what this one serves."""
        from commopt.kernels.cuda import quantize

        served, bits, at = parts.served[group.rank], bits_of(group.size), [0] * group.size
        total, sums = (
            its.ones.new_empty(n) for n in (served.elements, sum(blocks.elements for blocks in parts.served))
        )
        messages = _messages(received, [served] * group.size, its.ones, at)
        quantize.decompress_all_(messages, total, bits=2, alpha=1.0, add=False, **_LEVELS)
        layouts = [((torch.uint8, (blocks.elements * bits + 7) // 8),) for blocks in parts.served]
        answer = in_a_row([layouts[group.rank]], self.device, is_zero=False)
        messages = _messages(answer, [its.of_answers[group.rank].having(starts=its.zero)], its.ones, [0])
        none, how = torch.empty_like(its.ones, dtype=torch.int32), _LEVELS | {"is_given": True}
        quantize.compress_all_(total, None, messages, none, levels=2 ** (bits - 1), bits=bits, **how)
        messages = _messages(group.all_gather(answer[0], layouts), its.of_answers, its.ones, at)
        quantize.decompress_all_(messages, sums, bits=bits, alpha=1.0, add=False, **_LEVELS)
        return sums

    def _dense_mean(self, bucket: Bucket, group: Group, total: Tensor) -> Bucket | None:
        """The exact mean of the parameters that are not compressed, if there are any; total: (1,), their sum."""
        from commopt.kernels.cuda import ternary

        its = self._tables(bucket)
        if not its.dense_names:
            return None
        starts = tuple(its.dense.homes.tolist())
        dense = Bucket(ternary.shares(bucket.flat, its.dense, group.size), its.dense_names, starts, bucket.label)
        group.all_reduce(dense.flat)
        torch.sum(dense.flat, 0, keepdim=True, out=total)
        return dense

    def _first_bad(self, its: _Tables, found: list[float], dense: Bucket | None) -> int:
        """The first parameter that is not finite, or -1; found: the scales of all, and what the dense ones add up to."""
        bad = [k for k, s in zip(its.parameters.parameters.tolist(), found, strict=False) if not math.isfinite(s)]
        if dense is not None and not math.isfinite(found[-1]):
            bad.append(first_bad(self.index, dense))
        return first_of(bad)

    def _whole(self, bucket: Bucket, is_dense: bool) -> Blocks:
        """One block for each parameter that is compressed, or that is not."""
        pairs = zip(bucket.names, bucket.starts, strict=True)
        its = [(self.index.position[name], start) for name, start in pairs if (name in self.dense_names) == is_dense]
        numbers, starts = np.asarray(its, dtype=np.int64).reshape(-1, 2).T
        return Blocks(starts, starts, np.asarray(self.index.numels, dtype=np.int64)[numbers], numbers, numbers)

    @once_per_layout
    def _tables(self, bucket: Bucket) -> _Tables:
        parameters, dense = (self._whole(bucket, is_dense) for is_dense in (False, True))
        numbers = parameters.parameters
        parts = self.table.parts(bucket)
        number_of = np.zeros(len(self.index.names), np.int64)
        number_of[numbers] = np.arange(len(numbers))
        places = number_of[np.concatenate([blocks.parameters for blocks in parts.by_owner])]
        firsts = np.cumsum([0, *(len(blocks) for blocks in parts.by_owner)])[:-1].tolist()
        elements, zero = np.asarray([blocks.elements for blocks in parts.served]), np.zeros(1, np.int64)
        ends = np.cumsum(elements)
        of_answers = [
            Blocks(end - n, zero, n, zero, zero) for end, n in zip(ends[:, None], elements[:, None], strict=True)
        ]
        ones = torch.ones(max(1, len(parts.served[self.rank])), dtype=torch.float32, device=self.device)
        dense_names = tuple(self.index.names[k] for k in dense.parameters)
        dense = dense.having(homes=np.cumsum(dense.lengths) - dense.lengths)
        return _Tables(
            parameters, dense, dense_names, torch.from_numpy(places).to(self.device), firsts, ones, of_answers, zero, {}
        )

    def _shared_scales(self, bucket: Bucket, group: Group) -> Tensor:
        """(P,) f32: the largest magnitude of each of the bucket's parameters on any rank, after clamping it in place."""
        own = torch.zeros(len(self.index.names), device=self.device, dtype=torch.float32)
        for name, g in self.compressed_views(bucket):
            if self.options.clip and g.numel() > 1:
                bound = float(self.options.clip * g.std(correction=0))  # torch clamps faster to a number
                g.clamp_(-bound, bound)
            own[self.index.position[name]] = torch.stack(torch.aminmax(g)).abs().max() if g.numel() else 0.0
        of_bucket = [self.index.position[name] for name, _ in self.compressed_views(bucket)]
        every = group.all_gather(Payload.of(own[of_bucket]))
        own[of_bucket] = torch.stack([payload.tensors[0] for payload in every]).amax(0)
        return own

    def _of(self, scales: Tensor, blocks: Blocks) -> Tensor:
        return scales[torch.from_numpy(blocks.parameters).to(self.device)]

    def bytes_per_parameter(self, ranks: int) -> float:
        return (ranks - 1) / ranks * (2 + bits_of(ranks)) / 8


def _messages(payloads: Sequence[Payload], parts: Sequence[Blocks], scales: Tensor, at: Sequence[int]) -> Messages:
    """Codes in payloads without a header, and their scales; at: where in these each message's begin."""
    from commopt.kernels.cuda.pieces import Messages

    row, places = row_of(payloads)
    return Messages(parts, scales, row, tuple(zip(at, places, strict=True)))
