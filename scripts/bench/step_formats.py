"""Public wire formats that no package sends on a CPU and Gloo, re-implemented from their sources, as optimizers for step.py.

What each rank sends, and in how many calls, is what the public code sends; so are its error feedback and its own arithmetic. None
exchanges during backward, as none of the sources does. Where an optimizer differs from the source, it says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from commopt.groups.base import Traffic
from commopt.optim import make_optimizer
from commopt.plan.links import schedule

Settings = Mapping[str, Any]


class Wire:
    """Collectives of torch.distributed, as the public codes call them, counted; inside `cut` nothing is sent."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.traffic, self.is_cut = Traffic(), False

    def all_reduce(self, x: Tensor) -> None:
        """Replace x by the sum over ranks."""
        if not self.is_cut:
            dist.all_reduce(x)
            self.traffic.record("all_reduce", schedule("all_reduce", x.nbytes, self.rank, self.size))

    def all_gather(self, *tensors: Tensor) -> list[list[Tensor]]:
        """What every rank has, by tensor and rank; the calls for several tensors are under way together."""
        gathered = [[x.clone() for _ in range(self.size)] for x in tensors]
        if not self.is_cut:
            calls = [dist.all_gather(every, x, async_op=True) for every, x in zip(gathered, tensors, strict=True)]
            for call, x in zip(calls, tensors, strict=True):
                call.wait()
                self.traffic.record("all_gather", schedule("all_gather", x.nbytes, self.rank, self.size))
        return gathered

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """parts: for each rank, u8. sizes: of what comes from each. Returns what came, by rank."""
        received = torch.zeros(sum(sizes), dtype=torch.uint8)
        if not self.is_cut:
            sent_sizes = [part.numel() for part in parts]
            dist.all_to_all_single(received, torch.cat(list(parts)), list(sizes), sent_sizes)
            sent = {rank: float(n) for rank, n in enumerate(sent_sizes) if rank != self.rank}
            self.traffic.record("all_to_all", sent)
        return list(torch.split(received, list(sizes)))

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Send nothing, to time arithmetic without the network."""
        self.is_cut = True
        yield
        self.is_cut = False


class Format:
    """An optimizer that exchanges in `step`."""

    def __init__(self, gpt: nn.Module, settings: Settings, wire: Wire) -> None:
        self.parameters, self.wire, self.lr = list(gpt.parameters()), wire, settings["optimizer"]["lr"]
        self.options, self.wanted = settings["options"], settings["optimizer"]

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        raise NotImplementedError


def grad_of(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


# ---- DeepSpeed's 1-bit Adam ------------------------------------------------------------------------------------------


class OneBitAdam(Format):
    """DeepSpeed 0.19.6's 1-bit Adam and its compressed_allreduce, which needs CuPy: one call and one scale for all parameters.

    They are flat as DeepSpeed's FP16_Optimizer makes them; in float32 the source calls once for each parameter, which is slower.
    Differs: moments are corrected for their bias, which the source does not do. Its warm-up lasts for thousands of steps; after ten
    the frozen variance would be far too small. The source's momentum mask, which users have to give, covers the elements of a
    variance below RARE of the mean: bytes that the warm-up has hardly seen, from which training diverges otherwise. The first
    step, which the source drops, counts.
    """

    RARE = 1e-4

    def __init__(self, gpt: nn.Module, settings: Settings, wire: Wire) -> None:
        super().__init__(gpt, settings, wire)
        self.freeze_step, self.steps = int(self.options["freeze_step"]), 0
        self.beta1, self.beta2 = self.wanted.get("betas", (0.9, 0.999))
        self.decay, unit = self.wanted.get("weight_decay", 0.01), math.lcm(wire.size, 8) * wire.size
        self.numels = [p.numel() for p in self.parameters]
        self.m, self.v = torch.zeros(sum(self.numels)), torch.zeros(sum(self.numels))
        padded = -(-sum(self.numels) // unit) * unit
        self.errors = torch.zeros(padded), torch.zeros(padded // wire.size)

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        g = torch.cat([grad_of(p).view(-1) for p in self.parameters])  # (P,)
        if self.steps <= self.freeze_step:
            self.wire.all_reduce(g)
            g.div_(self.wire.size)
            self.v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
        self.m.mul_(self.beta1).add_(g, alpha=1 - self.beta1)
        if self.steps > self.freeze_step:
            self.m.copy_(self.compressed(self.m, *self.errors)).mul_(self.v > self.RARE * self.v.mean())
        first = 1 - self.beta1**self.steps
        second = 1 - self.beta2 ** min(self.steps, self.freeze_step)
        update = (self.m / first) / ((self.v / second).sqrt_() + 1e-8)
        for p, change in zip(self.parameters, torch.split(update, self.numels), strict=True):
            p.add_(change.view_as(p).add(p, alpha=self.decay), alpha=-self.lr)

    def compressed(self, m: Tensor, worker_error: Tensor, server_error: Tensor) -> Tensor:
        """The mean of m (n,) over ranks: signs and a scale to each owner, and signs and a scale from each."""
        wire, n = self.wire, m.numel()
        buffer = torch.nn.functional.pad(m, (0, worker_error.numel() - n)).add_(worker_error)
        packed, scale = self.signs(buffer, worker_error)
        own = packed.numel() // wire.size
        signs = wire.all_to_all(torch.split(packed, own), [own] * wire.size)
        (scales,) = wire.all_gather(scale)
        mean = sum(unpacked(bits) * scale for bits, scale in zip(signs, scales, strict=True)) / wire.size
        packed, scale = self.signs(mean.add_(server_error), server_error)  # type: ignore[union-attr]
        (signs,), (scales,) = wire.all_gather(packed), wire.all_gather(scale)
        return torch.cat([unpacked(bits) * scale for bits, scale in zip(signs, scales, strict=True)])[:n]

    def signs(self, x: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Packed signs of x, its root mean square (1,), and into `error` what they leave out."""
        scale = x.norm().div_(math.sqrt(x.numel())).view(1)
        is_positive = x >= 0
        error.copy_(x - scale * (is_positive.float() * 2 - 1))
        return torch.from_numpy(np.packbits(is_positive.numpy())), scale


def unpacked(bits: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy())).float().mul_(2).sub_(1)


# ---- GRACE's top-k ---------------------------------------------------------------------------------------------------


class GraceTopK(Format):
    """GRACE's TopKCompressor with ResidualMemory and Allgather: for each parameter, float32 values, and then indices of 64 bits."""

    def __init__(self, gpt: nn.Module, settings: Settings, wire: Wire) -> None:
        super().__init__(gpt, settings, wire)
        self.residuals = [torch.zeros(p.numel()) for p in self.parameters]
        self.optimizer = make_optimizer(self.wanted, self.parameters)

    @torch.no_grad()
    def step(self) -> None:
        for p, residual in zip(self.parameters, self.residuals, strict=True):
            x = grad_of(p).view(-1) + residual
            indices = x.abs().topk(max(1, int(x.numel() * self.options["compress_ratio"]))).indices
            values = x[indices]
            residual.copy_(x).scatter_(0, indices, 0.0)
            (every_value,) = self.wire.all_gather(values)
            (every_index,) = self.wire.all_gather(indices)
            dense = [torch.zeros_like(x).scatter_(0, i, v) for i, v in zip(every_index, every_value, strict=True)]
            grad_of(p).copy_((torch.stack(dense).sum(0) / self.wire.size).view_as(p))
        self.optimizer.step()


# ---- Distributed Lion ------------------------------------------------------------------------------------------------


class PublicLion(Format):
    """The public Distributed Lion: each rank gathers every rank's signs. Eight signs are packed into 64 bits, as in the source."""

    def __init__(self, gpt: nn.Module, settings: Settings, wire: Wire) -> None:
        super().__init__(gpt, settings, wire)
        self.moments = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        places = torch.arange(8)
        for p, m in zip(self.parameters, self.moments, strict=True):
            votes = (m * 0.9).add_(grad_of(p), alpha=0.1).view(-1) > 0
            padded = torch.nn.functional.pad(votes, (0, -votes.numel() % 8)).view(-1, 8)
            packed = (padded.byte() << places).sum(-1)  # i64: torch.sum widens
            (every,) = self.wire.all_gather(packed)
            ballots = torch.stack([((one.unsqueeze(-1) >> places) % 2 == 1).view(-1)[: p.numel()] for one in every])
            won = torch.mode(ballots, dim=0).values
            p.add_((won * 2 - 1).view_as(p), alpha=-self.lr)
            m.mul_(0.99).add_(grad_of(p), alpha=0.01)


# ---- DeMo ------------------------------------------------------------------------------------------------------------


class PublicDeMo(Format):
    """The public DeMo: of each chunk of 64 (by 64) cosines of the momentum the largest 32, as float32 and indices of 64 bits."""

    DECAY, TOP_K, CHUNK = 0.999, 32, 64

    def __init__(self, gpt: nn.Module, settings: Settings, wire: Wire) -> None:
        super().__init__(gpt, settings, wire)
        self.deltas = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        for p, delta in zip(self.parameters, self.deltas, strict=True):
            delta.mul_(self.DECAY).add_(grad_of(p), alpha=self.lr)
            x = self.encoded(delta)  # (chunks, elements of a chunk)
            indices = x.abs().topk(min(self.TOP_K, x.shape[1]), sorted=False).indices
            values = x.gather(1, indices)
            delta.sub_(self.decoded(torch.zeros_like(x).scatter_(1, indices, values), p.shape))
            every_index, every_value = self.wire.all_gather(indices, values)
            mean = torch.zeros_like(x).scatter_reduce_(
                1, torch.cat(every_index, 1), torch.cat(every_value, 1), "mean", include_self=False
            )
            p.add_(self.decoded(mean, p.shape).sign_(), alpha=-self.lr)

    def encoded(self, x: Tensor) -> Tensor:
        h, w = self.chunk_of(x.shape)
        blocks = x.reshape(-1, h, x.shape[-1] // w, w).transpose(1, 2)
        return (cosines(h) @ blocks @ cosines(w).T).flatten(0, 1).flatten(1)

    def decoded(self, x: Tensor, shape: torch.Size) -> Tensor:
        h, w = self.chunk_of(shape)
        blocks = cosines(h).T @ x.view(-1, shape[-1] // w, h, w) @ cosines(w)
        return blocks.transpose(1, 2).reshape(shape)

    def chunk_of(self, shape: torch.Size) -> tuple[int, int]:
        sizes = [max(n for n in range(1, min(size, self.CHUNK) + 1) if size % n == 0) for size in shape]
        return (sizes[0], sizes[1]) if len(sizes) == 2 else (1, sizes[0])


@cache
def cosines(n: int) -> Tensor:
    """The orthonormal DCT-II as a matrix (n, n)."""
    k, x = torch.arange(n).double().unsqueeze(1), torch.arange(n)
    basis = torch.cos(math.pi * (2 * x + 1) * k / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis.float()


# ---- Hivemind's 8 bits -----------------------------------------------------------------------------------------------


class Hivemind8Bit(Format):
    """Hivemind's butterfly of gradients with Uniform8BitQuantization: parameters to their owners, and what the mean differs by back.

    Differs: through Gloo and not libp2p, which is slower, and parameters are not averaged on top of gradients.
    """

    HEADER = 8 + 4 * 256  # the length of the codebook, and the codebook

    def __init__(self, gpt: nn.Module, settings: Settings, wire: Wire) -> None:
        super().__init__(gpt, settings, wire)
        self.optimizer = make_optimizer(self.wanted, self.parameters)
        ends = np.cumsum([p.numel() for p in self.parameters])
        owners = [min(wire.size - 1, int((end - 1) * wire.size // ends[-1])) for end in ends]
        self.owned = [
            [p for p, owner in zip(self.parameters, owners, strict=True) if owner == r] for r in range(wire.size)
        ]

    @torch.no_grad()
    def step(self) -> None:
        wire, mine = self.wire, self.owned[self.wire.rank]
        sizes = [sum(self.HEADER + p.numel() for p in owned) for owned in self.owned]
        others = [rank for rank in range(wire.size) if rank != wire.rank]
        sent = [self.encoded([grad_of(p) for p in owned]) for owned in self.owned]
        sent[wire.rank] = sent[wire.rank][:0]
        back = [0 if rank == wire.rank else sizes[wire.rank] for rank in range(wire.size)]
        came = wire.all_to_all(sent, back)
        if not wire.is_cut:
            gradients = {rank: self.decoded(came[rank], mine) for rank in others}
            gradients[wire.rank] = [grad_of(p) for p in mine]
            means = [torch.stack(parts).mean(0) for parts in zip(*gradients.values(), strict=True)]
            differences = {
                rank: [mean - own for mean, own in zip(means, gradients[rank], strict=True)] for rank in others
            }
            answers = [self.encoded(differences[r]) if r in differences else came[r][:0] for r in range(wire.size)]
            came = wire.all_to_all(answers, [part.numel() for part in sent])
            for rank in others:
                for p, difference in zip(self.owned[rank], self.decoded(came[rank], self.owned[rank]), strict=True):
                    grad_of(p).add_(difference)
            for p, mean in zip(mine, means, strict=True):
                grad_of(p).copy_(mean)
        self.optimizer.step()

    def encoded(self, tensors: Sequence[Tensor]) -> Tensor:
        """A codebook of 256 and a byte for each element, tensor after tensor."""
        parts = []
        for x in tensors:
            flat = x.reshape(-1)
            centred = flat - flat.mean()
            scale = 6 * centred.norm() / math.sqrt(max(1, flat.numel() - 1)) / 256
            places = (centred / scale.clamp_min(1e-30)).round_().add_(128).clamp_(0, 255).byte()
            counts = torch.bincount(places, minlength=256).clamp_min_(1)
            codebook = torch.zeros(256).scatter_add_(0, places.long(), flat) / counts
            parts += [torch.tensor([256]).view(torch.uint8), codebook.view(torch.uint8), places]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)

    def decoded(self, message: Tensor, owned: Sequence[nn.Parameter]) -> list[Tensor]:
        tensors = []
        for p, part in zip(owned, torch.split(message, [self.HEADER + p.numel() for p in owned]), strict=True):
            codebook = part[8 : self.HEADER].clone().view(torch.float32)
            tensors.append(codebook[part[self.HEADER :].long()].view_as(p))
        return tensors


FORMATS: Mapping[str, Callable[[nn.Module, Settings, Wire], Format]] = {
    "deepspeed_onebit_adam": OneBitAdam,
    "grace_top_k": GraceTopK,
    "public_lion": PublicLion,
    "public_demo": PublicDeMo,
    "hivemind_8bit": Hivemind8Bit,
}
