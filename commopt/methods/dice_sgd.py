"""DiceSGD: private gradients whose clipping has no bias, because what is cut off is sent later."""

import math
import os
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from commopt.errors import ConfigError, GradientsChanged, check_option
from commopt.groups.base import Group
from commopt.method import GradientMethod, NoOptions, options
from commopt.options import Count, Number, Positive, Whole
from commopt.wire import noise
from commopt.wire.bucket import Bucket
from commopt.wire.state import State

_SLICE = 2**14  # pairs of normal numbers
Loss = Callable[[Any, Any], Tensor]
FromZero = Annotated[Number, Field(ge=0)]


@options
class DiceSGDOptions(NoOptions):
    clip_norm: Positive = 1.0
    error_norm: FromZero | None = None
    noise_multiplier: FromZero = 1.0
    samples_per_rank: Count = 1
    noise_seed: Whole | None = None


class DiceSGD(GradientMethod):
    """Send clipped gradients with noise, and what clipping cut off in later steps: differential privacy without clipping bias.

    Zhang et al. 2024, arXiv:2311.14632, Algorithm 1, with an error e_i on each of N ranks, and clip(x, C) = x min(1, C
    / ||x||_2):
        v_i = (1/b) sum_j clip(g_ij, C1) + clip(e_i, C2/B)
        g = mean_i (v_i + w_i),  w_i ~ Normal(0, N sigma^2),  sigma = noise_multiplier 2 (C1 + C2) / B
        e_i <- e_i + (1/b) sum_j g_ij - v_i
    A rank has b samples, and a step has B = N b. The paper writes clip(e, C2); its code divides C2 by B, as here. The
    accounting does not follow the paper's theorem, which assumes bounded gradients and gains from subsampling. It is a
    bound without assumptions. Given all outputs so far, the parameters are known. Replacing one sample then moves g by
    at most 2 C1/B through its gradient, and by 2 C2/B through all the errors that it ever entered. Each step is thus a
    Gaussian mechanism of noise_multiplier, and steps compose exactly (Dong et al. 2022, arXiv:1905.02383). Subsampling
    gains nothing, because the error contains every sample. The bound holds if the choice of samples does not depend on
    them, and no sample comes twice in a step. Trust: somebody who sees the parameters, or all sums that were ever sent
    to compute them, learns no more than epsilon says. Ranks trust each other. The bound does not cover losses,
    BatchNorm's statistics, or the fact that a NaN left out a step. Noise comes from the operating system and cannot be
    reproduced. It is rounded to float32, which does not protect against attacks on the lowest bits.
    Sends 2(N-1)/N x 4 bytes per parameter and step: it protects data and does not compress.
    State: 4 bytes per parameter.
    Use it if the data is confidential and the bias of clipping is visible. Try error_norm 0 first. At epsilon 8 on
    digits (launch/private_digits.py, 5 seeds), 92.9 % were right with error_norm 0, 93.1 % with 0.25 and 92.1 % with
    1, where noise outweighs bias.
    Not for less noise than DP-SGD with subsampling needs. Not for models in which BatchNorm mixes samples.

    clip_norm: C1, the largest L2 norm of one sample's gradient.
    error_norm: C2, the largest norm of the error that is sent, in the units of clip_norm. It defaults to clip_norm; 0
        is DP-SGD.
    noise_multiplier: sigma in units of the sensitivity; `noise_multiplier_for` finds the one for a target epsilon.
    samples_per_rank: b, for which gradients come from `backward`. With 1, the gradient of this rank's whole backward
        is clipped, and the protected unit is everything in that backward.
    noise_seed: draw noise that can be reproduced. For tests only: anybody who knows the seed can subtract the noise.
    """

    name = "dice_sgd"
    Options = DiceSGDOptions
    options: DiceSGDOptions
    merges_buckets = True  # norms are those of the whole gradient
    takes_max_norm = False  # it clips by itself
    can_be_cut = False  # it clips by the norm of a whole gradient
    states: ClassVar[tuple[State, ...]] = (
        State("error", held="rank", on_resize="mean"),
        State("releases", of="run", dtype=torch.int64),  # how often noisy sums have been sent; void steps count too
    )

    def set_up(self) -> None:
        o = self.options
        self.error_norm = o.clip_norm if o.error_norm is None else o.error_norm

    def bound(self) -> None:
        super().bound()
        self.cut = torch.zeros_like(self.state["error"])  # what `backward` cut off in this step
        self.samples = 0  # that `backward` has seen in this step

    @property
    def sensitivity(self) -> float:
        """How far one sample, replaced by another, can move what a step sends, in L2: 2 (C1 + C2) / B."""
        return 2 * (self.options.clip_norm + self.error_norm) / (self.ranks * self.options.samples_per_rank)

    def epsilon(self, delta: float) -> float:
        """The epsilon that all steps so far have spent for this delta. Needs dp-accounting: pip install 'dp-accounting<1'"""
        check_option("delta", delta, lambda x: 0 < x < 1, "a number above 0, below 1")
        steps = int(self.state["releases"])
        if not steps:
            return 0.0
        return float(_accounting().get_epsilon_gaussian(self.options.noise_multiplier / math.sqrt(steps), delta))

    def backward(
        self, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, *, chunk: int | None = None
    ) -> Tensor:
        """Write the mean of clipped per-sample gradients into p.grad, and keep what was cut off; instead of loss.backward().

        loss(model(x), y) is called with batches of one sample. `chunk` samples are differentiated at once, all if None. Can be called
        several times in a step, for at most samples_per_rank samples; the mean is over samples_per_rank. Returns the mean loss, which
        is not private. For models without a wrapper (`frameworks.plain`).
        """
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.samples += len(inputs)
        if self.samples > self.options.samples_per_rank or set(named) != set(self.index.names):
            raise GradientsChanged(
                f"dice_sgd: {self.samples} samples in a step of a model with {len(named)} parameters; it is bound to "
                f"samples_per_rank: {self.options.samples_per_rank} and {len(self.index.names)} parameters"
            )
        if self.samples == len(inputs):  # the first call in this step
            self.cut.zero_()
            for p in named.values():
                p.grad = torch.zeros_like(p)
        fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        fixed |= dict(model.named_buffers())

        def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return loss(functional_call(model, (parameters, fixed), (x.unsqueeze(0),)), y.unsqueeze(0))

        each = vmap(grad_and_value(one), in_dims=(None, 0, 0), randomness="different")
        losses = [torch.zeros(0, dtype=torch.float32, device=inputs.device)]
        size = chunk or max(1, len(inputs))
        for x, y in zip(torch.split(inputs, size), torch.split(targets, size), strict=True):
            if len(x):
                gradients, values = each({name: p.detach() for name, p in named.items()}, x, y)
                losses.append(values.detach())
                self._add_clipped(named, gradients)
        return torch.cat(losses).mean()

    @torch.no_grad()
    def _add_clipped(self, named: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> None:
        """gradients: (samples, *shape) for each parameter"""
        squares = torch.stack([g.flatten(1).double().square().sum(1) for g in gradients.values()]).sum(0)  # (samples,)
        kept = _factor(squares.sqrt(), self.options.clip_norm).to(next(iter(gradients.values())).dtype)
        for name, g in gradients.items():
            flat, p = g.flatten(1), named[name]
            assert p.grad is not None
            p.grad += (kept @ flat / self.options.samples_per_rank).view_as(p)
            self.index.view(self.cut, name).add_((1 - kept) @ flat / self.options.samples_per_rank)

    def exchange(self, bucket: Bucket, group: Group) -> None:
        clipped, cut = self._clipped(bucket)
        error = self._views(self.state["error"], bucket)
        largest = self.error_norm / (group.size * self.options.samples_per_rank)  # C2/B
        sent = error * _factor(error.norm(dtype=torch.float64), largest)
        sigma = self.options.noise_multiplier * self.sensitivity
        noisy = self._noise(bucket).mul_(math.sqrt(group.size) * sigma)
        mean = bucket.with_flat(noisy.add_(clipped + sent))  # v_i + w_i
        self.average_(mean, group)
        self.samples = 0
        self.state["releases"] += 1
        bucket.void = mean.void
        if mean.void is None:
            for name, x in bucket.with_flat(error.sub_(sent).add_(cut)).views():  # e_i + mean_j g_ij - v_i
                self.part("error", name).copy_(x)
            bucket.flat.copy_(mean.flat)

    def _clipped(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """(n,) (1/b) sum_j clip(g_ij, C1), and (n,) what clipping cut off of the mean."""
        norm = bucket.flat.norm(dtype=torch.float64)
        if self.samples:
            if bool(norm > 1.001 * self.options.clip_norm):
                raise GradientsChanged(
                    f"dice_sgd: gradients have a norm of {float(norm):.3g} after clipping to {self.options.clip_norm:.3g}: something was "
                    "added to them after method.backward(...), which private training must not do"
                )
            return bucket.flat, self._views(self.cut, bucket)
        if self.options.samples_per_rank > 1:
            raise GradientsChanged(
                f"dice_sgd: samples_per_rank is {self.options.samples_per_rank}, but these gradients are not per sample: call "
                "method.backward(model, loss, inputs, targets) instead of loss.backward(), or write samples_per_rank: 1 to protect "
                "each rank's whole batch as one"
            )
        clipped = bucket.flat * _factor(norm, self.options.clip_norm)
        return clipped, bucket.flat - clipped

    def _views(self, flat: Tensor, bucket: Bucket) -> Tensor:
        """(n,) the parts of a flat tensor of all parameters that the bucket has, in its order."""
        return torch.cat([self.index.view(flat, name) for name in bucket.names])

    def _noise(self, bucket: Bucket) -> Tensor:
        """(n,) f32 standard normal, of this rank alone, by Box and Muller; pairs are drawn a slice at a time, which stays in the cache."""
        out = np.empty(len(bucket.flat), np.float32)
        for (name, x), first in zip(bucket.views(), bucket.starts, strict=True):
            n, words = len(x), self._words(name)
            half = -(-n // 2)
            for a in range(0, half, _SLICE):
                z = min(a + _SLICE, half)
                radius, angle = (
                    np.sqrt(-2 * np.log(_uniform(words(a, z - a)))),
                    2 * np.pi * _uniform(words(half + a, z - a)),
                )
                out[first + a : first + z] = radius * np.cos(angle)
                rest = min(half + z, n) - half - a  # one less in the last slice of an odd number
                out[first + half + a : first + half + a + rest] = (radius * np.sin(angle))[:rest]
        return torch.from_numpy(out).to(bucket.flat.device)

    def _words(self, name: str) -> Callable[[int, int], NDArray[np.uint64]]:
        """What gives (count,) u64 random words from the first one on; those of the operating system never come twice."""
        if self.options.noise_seed is None:
            return lambda first, count: np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
        k = self.index.position[name]
        counts, place = self.exchanges.numpy()[k : k + 1], self.index.offsets[k : k + 1]
        keys = noise.keys(self.options.noise_seed, "privacy", self.rank, counts, place)

        def drawn(first: int, count: int) -> NDArray[np.uint64]:
            moved = keys + np.asarray([first], np.uint64) * np.uint64(noise.GOLDEN)
            return noise.bits(moved, np.asarray([count], dtype=np.int64))

        return drawn

    def bytes_per_parameter(self, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * 4


def noise_multiplier_for(epsilon: float, delta: float, steps: int) -> float:
    """The least noise_multiplier whose `steps` steps spend at most epsilon for this delta. Needs dp-accounting."""
    check_option("epsilon", epsilon, lambda x: 0 < x < math.inf, "a number above 0")
    check_option("delta", delta, lambda x: 0 < x < 1, "a number above 0, below 1")
    check_option("steps", steps, lambda x: x >= 1, "a whole number from 1")
    return float(_accounting().get_sigma_gaussian(epsilon, delta)) * math.sqrt(steps)


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise ConfigError("epsilon needs dp-accounting: pip install 'dp-accounting<1'") from None
    return dp_accounting


def _factor(norm: Tensor, largest: float) -> Tensor:
    """What to multiply with so that no norm is above `largest`; 0 if it is not finite, so that only the bad elements stay bad."""
    return torch.where(norm.isfinite(), (largest / norm.clamp(min=1e-300)).clamp(max=1.0), 0.0)


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """(n,) f64 in (0, 1)"""
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
