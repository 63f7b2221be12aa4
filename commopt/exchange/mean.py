"""Replacing the mean over ranks: what every method does, and the exact mean."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from commopt.errors import CheckpointError, ConfigError, check_option
from commopt.groups.base import Group
from commopt.wire.bucket import Bucket, ParameterIndex

State = dict[Literal["shared", "local"], dict[str, Tensor]]


class Aggregator(ABC):
    """Overwrites a bucket with an estimate of its mean over ranks.

    max_norm: clip gradients to this global L2 norm. It needs all buckets of a step at once, so it is used with overlap=False.
    grad_scaler: the `torch.amp.GradScaler` that scaled the loss; residuals and momentum are kept in unscaled units.
    """

    name = "aggregator"
    positional: ClassVar[tuple[str, ...]] = ()  # the options that `name(a, b)` in a configuration stands for
    warmup_option = "freeze_step"  # what a message about a warm-up that is too long says to lower
    needs_float32 = True
    is_linear = False  # whether scaled gradients may be exchanged as they are: no state depends on their scale
    merges_buckets = False  # whether all buckets of a step travel as one, in registration order
    seed = 0
    index: ParameterIndex
    made_of: tuple[Aggregator, ...] = ()  # aggregators that this one exchanges through: bound, saved and loaded with it
    exchanges: Tensor  # (P,) i64: how often each parameter has been exchanged; void buckets do not count

    def __init__(self, *, max_norm: float | None = None, grad_scaler: Any = None) -> None:
        if max_norm is not None:
            check_option("max_norm", max_norm, lambda x: x > 0, "a number above 0, or leave it out")
        if grad_scaler is not None and not hasattr(grad_scaler, "get_scale"):
            raise ConfigError(
                f"grad_scaler: {type(grad_scaler).__name__} has no get_scale(); pass the torch.amp.GradScaler itself"
            )
        self.max_norm, self.grad_scaler = max_norm, grad_scaler

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        """Allocate this rank's state for the trainable parameters, in registration order; called once, at attach."""
        self.index = ParameterIndex.of(named_parameters)
        self.rank, self.ranks = group.rank, group.size
        self.exchanges = torch.zeros(len(self.index.names), dtype=torch.int64)
        for part in self.made_of:
            part.bind(named_parameters, group)
            part.exchanges = self.exchanges

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise AttachError where this optimizer would undo what the method does (momentum twice, say)."""

    @abstractmethod
    def aggregate(self, bucket: Bucket, group: Group) -> None:
        """Overwrite bucket.flat, or set bucket.void and leave all state as it was."""

    def receive(self, bucket: Bucket) -> None:
        """Take a good bucket's result into the state that `step` reads; what an update method does after `aggregate`."""

    @property
    def is_exact(self) -> bool:
        """Whether the next exchange yields the mean of the gradients themselves, so that clipping it clips their norm."""
        return False

    @property
    def needs_all_buckets(self) -> bool:
        """Whether a step's buckets must come together: DDP then exchanges after backward (overlap=False)."""
        return self.max_norm is not None or self.merges_buckets

    def exchange(self, buckets: Sequence[Bucket], group: Group) -> None:
        """Aggregate some buckets of one step, all of them if `needs_all_buckets`, and receive what is good.

        With max_norm the mean is clipped where the exchange is exact. Otherwise local gradients are clipped first, by
        one norm for all ranks, the root mean square of the ranks' norms: an upper bound of the norm of the mean, which
        nobody knows before the exchange.
        """
        is_exact = self.is_exact
        if self.max_norm is not None and not is_exact:
            self.clip_local_(buckets, self.max_norm, group)
        if self.merges_buckets:
            self._aggregate_as_one(buckets, group)
        else:
            for bucket in buckets:
                group.traffic.bucket = bucket.label
                self.aggregate(bucket, group)
        good = [bucket for bucket in buckets if bucket.void is None]
        if self.max_norm is not None and is_exact:
            is_scaled = self.grad_scaler is not None and self.is_linear
            clip_joint_norm_(good, self.max_norm * (float(self.grad_scaler.get_scale()) if is_scaled else 1.0))
        for bucket in good:
            self.receive(bucket)
            self.exchanges[[self.index.position[name] for name in bucket.names]] += 1

    def clip_local_(self, buckets: Sequence[Bucket], max_norm: float, group: Group) -> None:
        """Clip gradients before they are exchanged."""
        squares = _squares(buckets)
        group.all_reduce(squares)
        clip_joint_norm_(buckets, max_norm, squares / group.size)

    def _aggregate_as_one(self, buckets: Sequence[Bucket], group: Group) -> None:
        views = dict(view for bucket in buckets for view in bucket.views())
        names = sorted(views, key=lambda name: self.index.position[name])
        merged = Bucket.of([(name, views[name]) for name in names])
        group.traffic.bucket = merged.label
        self.aggregate(merged, group)
        for bucket in buckets:
            bucket.void = merged.void
        if merged.void is None:
            for name, x in merged.views():
                views[name].copy_(x)

    @property
    def warmup_steps(self) -> int:
        """Steps before `is_steady`, as far as they are known beforehand."""
        return 0

    @property
    def is_steady(self) -> bool:
        """Whether steps are what they will be from now on: no warm-up phase is left."""
        return True

    @property
    def is_local(self) -> bool:
        """Whether the next step exchanges nothing: a local step. `exchange` then sets `void` where this rank alone left a NaN out."""
        return False

    @property
    def is_synchronised(self) -> bool:
        """Whether replicas hold the same parameters after the last step; false between the exchanges of local steps."""
        return True

    def synchronise(self, group: Group) -> None:
        """Make replicas equal now, where local steps have moved them apart; all ranks call it, between steps."""

    def bytes_per_parameter(self, ranks: int) -> float:
        """What one rank sends per parameter and step once `is_steady`, for large matrices; the formula, not a measurement."""
        raise NotImplementedError(f"{self.name} does not say what it sends")

    def state_views(self, name: str) -> list[Tensor]:
        """Every tensor of state on this rank that an exchange of the parameter `name` changes, as views."""
        k = self.index.position[name]
        return [self.exchanges[k : k + 1], *(view for part in self.made_of for view in part.state_views(name))]

    @property
    def state_form(self) -> str:
        """What the layout of `comm_state` depends on beside the model; a checkpoint of another form is refused."""
        return ""

    def comm_state(self) -> State:
        """What a checkpoint must hold: `shared` is equal on all ranks, `local` is this rank's own."""
        state: State = {"shared": {"exchanges": self.exchanges}, "local": {}}
        for part in self.made_of:
            own = part.comm_state()
            state["shared"] |= own["shared"]
            state["local"] |= own["local"]
        return state

    def load_comm_state(self, state: State) -> None:
        """Continue bit for bit from the `comm_state` that this rank of a world of this size saved."""
        load_tensor(self.exchanges, state["shared"], "exchanges")
        for part in self.made_of:
            part.load_comm_state(state)

    def load_resharded(self, states: Iterable[State]) -> None:
        """Continue from the states of all ranks, in order, of a world of another size: nothing that was still to be sent is lost."""
        every = list(states)
        load_tensor(self.exchanges, every[0]["shared"], "exchanges")
        for part in self.made_of:
            part.load_resharded(every)


class Mean(Aggregator):
    """The exact mean by a ring all-reduce in the bucket's dtype, or in `wire_dtype`.

    With a half precision `wire_dtype` values are divided by N, cast, summed in that dtype and cast back, as PyTorch's
    fp16_compress_hook does. Payload: 2(N-1)/N elements.
    """

    name = "mean"
    is_linear = True

    def __init__(
        self, *, wire_dtype: torch.dtype | None = None, max_norm: float | None = None, grad_scaler: Any = None
    ) -> None:
        super().__init__(max_norm=max_norm, grad_scaler=grad_scaler)
        self.wire_dtype = wire_dtype
        self.needs_float32 = False

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        mean = (bucket.flat / group.size).to(self.wire_dtype or bucket.flat.dtype)
        group.all_reduce(mean)
        if is_finite(mean):
            bucket.flat.copy_(mean)
        else:
            bucket.void = first_bad(self.index, bucket.with_flat(mean))

    @property
    def is_exact(self) -> bool:
        return True

    def bytes_per_parameter(self, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * (self.wire_dtype or torch.float32).itemsize


def check_alone(aggregator: Aggregator, bucket: Bucket) -> None:
    """One rank is its own mean, and still does not let a NaN through."""
    if not is_finite(bucket.flat):
        bucket.void = first_bad(aggregator.index, bucket)


def first_bad(index: ParameterIndex, bucket: Bucket) -> str:
    """The first parameter in registration order with a NaN or an inf."""
    return min(
        (name for name, x in bucket.views() if not bool(x.isfinite().all())), key=lambda name: index.position[name]
    )


def is_finite(x: Tensor) -> bool:
    """Whether no element is a NaN or an inf; one pass, and a second one only where the sum overflows."""
    return math.isfinite(float(x.sum(dtype=torch.float32))) or bool(x.isfinite().all())


def _squares(buckets: Sequence[Bucket]) -> Tensor:
    """(buckets,) f64: each bucket's squared L2 norm."""
    norms = [
        torch.linalg.vector_norm(bucket.flat, dtype=torch.promote_types(bucket.flat.dtype, torch.float32))
        for bucket in buckets
    ]
    squares = torch.stack(norms).double().square() if norms else torch.zeros(0, dtype=torch.float64)
    if bool(squares.isfinite().all()):
        return squares
    # squares beyond float32 are of huge gradients, which need clipping most, or of NaN
    return torch.stack([torch.linalg.vector_norm(bucket.flat, dtype=torch.float64) for bucket in buckets]).square()


def clip_joint_norm_(buckets: Sequence[Bucket], max_norm: float, squares: Tensor | None = None) -> None:
    """Scale buckets to a joint norm of at most max_norm, as torch's clip_grad_norm_ does; one that will be void has no say."""
    squares = _squares(buckets) if squares is None else squares
    norm = float(squares[squares.isfinite()].sum().sqrt())
    scale = min(1.0, max_norm / (norm + 1e-6))
    if scale < 1.0:
        for bucket in buckets:
            bucket.flat.mul_(scale)


def load_tensor(target: Tensor, source: Mapping[str, Tensor], key: str) -> None:
    """Copy source[key] into a tensor of state. Raises CheckpointError where it is missing or of another shape."""
    if key not in source or source[key].shape != target.shape:
        found = tuple(source[key].shape) if key in source else "nothing"
        raise CheckpointError(
            f"{key}: expected a tensor of shape {tuple(target.shape)}, found {found}; is it another model or world size?"
        )
    target.copy_(source[key])


def load_mean(target: Tensor, states: Sequence[State], key: str) -> None:
    """Overwrite a tensor by the mean of what all ranks of another world held under this key. Raises CheckpointError as `load_tensor`."""
    own, total = torch.empty_like(target), torch.zeros_like(target)
    for state in states:
        load_tensor(own, state["local"], key)
        total += own
    target.copy_(total / len(states))
