"""Replacing the mean over ranks: exact, gathered, or in two compressed phases."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from commopt import kernels
from commopt.bucket import Bucket, ParameterIndex, Parts
from commopt.compress.base import Compressor, element_indices
from commopt.errors import CheckpointError, ConfigError, check_option
from commopt.feedback import ErrorFeedback, first_bad_parameter
from commopt.groups.base import Group

State = dict[Literal["shared", "local"], dict[str, Tensor]]


class Aggregator(ABC):
    """Overwrites a bucket with an estimate of its mean over ranks.

    max_norm: clip gradients to this global L2 norm. It needs all buckets of a step at once, so it is used with overlap=False.
    grad_scaler: the `torch.amp.GradScaler` that scaled the loss; residuals and momentum are kept in unscaled units.
    """

    name = "aggregator"
    needs_float32 = True
    is_linear = False  # whether scaled gradients may be exchanged as they are: no state depends on their scale
    index: ParameterIndex

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

    @abstractmethod
    def aggregate(self, bucket: Bucket, group: Group) -> None:
        """Overwrite bucket.flat, or set bucket.void and leave all state as it was."""

    def exchange(self, buckets: Sequence[Bucket], group: Group) -> None:
        """Aggregate all buckets of one step, clipped to `max_norm` first.

        Local gradients are clipped by one norm for all ranks, the root mean square of the ranks' norms: an upper
        bound of the norm of the mean, which nobody knows before the exchange.
        """
        if self.max_norm is not None:
            squares = _squares(buckets)
            group.all_reduce(squares)
            clip_joint_norm_(buckets, self.max_norm, squares / group.size)
        for bucket in buckets:
            group.traffic.bucket = bucket.label
            self.aggregate(bucket, group)

    @property
    def warmup_steps(self) -> int:
        """Steps before `is_steady`, as far as they are known beforehand."""
        return 0

    @property
    def is_steady(self) -> bool:
        """Whether steps are what they will be from now on: no warm-up phase is left."""
        return True

    def state_views(self, name: str) -> list[Tensor]:
        """Every tensor of state on this rank that an exchange of the parameter `name` changes, as views."""
        return []

    @property
    def state_form(self) -> str:
        """What the layout of `comm_state` depends on beside the model; a checkpoint of another form is refused."""
        return ""

    def comm_state(self) -> State:
        """What a checkpoint must hold: `shared` is equal on all ranks, `local` is this rank's own."""
        return {"shared": {}, "local": {}}

    def load_comm_state(self, state: State) -> None:
        """Continue bit for bit from the `comm_state` that this rank of a world of this size saved."""

    def load_resharded(self, states: Iterable[State]) -> None:
        """Continue from the states of all ranks, in order, of a world of another size: nothing that was still to be sent is lost."""


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
        if _is_finite(mean):
            bucket.flat.copy_(mean)
        else:
            bucket.void = _first_bad(self.index, bucket.with_flat(mean))

    def exchange(self, buckets: Sequence[Bucket], group: Group) -> None:
        """Clips by the norm of the mean: the exchange is linear, so this is the clipping of gradients before it."""
        for bucket in buckets:
            group.traffic.bucket = bucket.label
            self.aggregate(bucket, group)
        if self.max_norm is not None:
            scale = 1.0 if self.grad_scaler is None else float(self.grad_scaler.get_scale())
            clip_joint_norm_([bucket for bucket in buckets if bucket.void is None], self.max_norm * scale)


class _Compressed(Aggregator):
    """What the two compressed forms share: worker residuals, the cached cut of each bucket, and their checkpoint."""

    def __init__(self, compressor: Compressor, *, max_norm: float | None = None, grad_scaler: Any = None) -> None:
        super().__init__(max_norm=max_norm, grad_scaler=grad_scaler)
        self.compressor = compressor

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        self.device = named_parameters[0][1].device
        kernels.warm_up(self.device)  # now, and not in the first step that compresses
        self.table = self.compressor.table(self.index, group.size)
        self.worker = ErrorFeedback(self.compressor, self.index.total, self.device)
        self._parts: dict[tuple[tuple[str, ...], tuple[int, ...]], Parts] = {}

    def parts(self, bucket: Bucket) -> Parts:
        """The bucket's blocks by owner, cut once for each bucket layout."""
        key = (bucket.names, bucket.starts)
        if len(self._parts) > 64:
            self._parts.clear()
        if key not in self._parts:
            self._parts[key] = self.table.parts(bucket)
        return self._parts[key]

    @property
    def state_form(self) -> str:
        return str(self.compressor)

    def state_views(self, name: str) -> list[Tensor]:
        return [self.index.view(self.worker.residual, name)]

    def comm_state(self) -> State:
        return {"shared": {}, "local": {"worker_residual": self.worker.residual}}

    def load_comm_state(self, state: State) -> None:
        _load(self.worker.residual, state["local"], "worker_residual")

    def load_resharded(self, states: Iterable[State]) -> None:
        """Every new rank takes the mean of what the old ranks still had to send: the update depends on residuals only through it."""
        count, total = 0, torch.zeros_like(self.worker.residual)
        for state in states:
            total += state["local"]["worker_residual"].to(total.device)
            count += 1
        self.worker.residual.copy_(total / count)

    def _void(self, bucket: Bucket, first_bad: int) -> None:
        bucket.void = self.index.names[first_bad]


class GatherMean(_Compressed):
    """The mean of every rank's compressed bucket, by all-gather: (N-1) payloads, for codecs that cannot be summed on the way."""

    name = "gather_mean"

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if group.size == 1:
            return _check_alone(self, bucket)
        blocks = self.table.all_of(bucket)
        own = self.worker.compress(bucket.flat, [blocks])
        gathered = group.all_gather(own[0])
        first_bad = first_bad_parameter(gathered)
        if first_bad >= 0:
            self.worker.undo(bucket.flat, own, [blocks])
            return self._void(bucket, first_bad)
        bucket.flat.zero_()
        for payload in gathered:
            self.compressor.decompress_(payload.tensors[1:], blocks, bucket.flat, alpha=1 / group.size, add=True)
        return None


class TwoWayMean(_Compressed):
    """The compressed mean of compressed buckets: all-to-all to each block's owner, which averages, compresses and sends it to all.

    arXiv:2102.02888, Figure 3, and DoubleSqueeze (arXiv:1905.05957): both sides keep what they could not send.
    Conserved exactly but for rounding: sum over steps of mean inputs = sum of outputs + mean worker residual +
    server residuals. Payload: 2(N-1)/N compressed buckets. `server` compresses the answers; the workers' compressor if None.
    """

    name = "two_way_mean"

    def __init__(
        self,
        compressor: Compressor,
        server: Compressor | None = None,
        *,
        max_norm: float | None = None,
        grad_scaler: Any = None,
    ) -> None:
        super().__init__(compressor, max_norm=max_norm, grad_scaler=grad_scaler)
        self.server_compressor = server or compressor

    def bind(self, named_parameters: Sequence[tuple[str, Tensor]], group: Group) -> None:
        super().bind(named_parameters, group)
        self.rank = group.rank
        self.server = ErrorFeedback(self.server_compressor, self.table.served_elements(group.rank), self.device)

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        if group.size == 1:
            return _check_alone(self, bucket)
        parts = self.parts(bucket)
        served = parts.served[group.rank]
        sent = self.worker.compress(bucket.flat, parts.by_owner)
        received = group.all_to_all(sent)
        first_bad = first_bad_parameter(received)
        if first_bad < 0:
            mean = bucket.flat.new_zeros(served.elements)
            for payload in received:  # in rank order: float sums depend on it
                self.compressor.decompress_(payload.tensors[1:], served, mean, alpha=1 / group.size, add=True)
            answer = self.server.compress(mean, [served])
            layouts = [((torch.int32, 1), *self.server_compressor.layout(blocks)) for blocks in parts.served]
            answers = group.all_gather(answer[0], layouts)
            first_bad = first_bad_parameter(answers)
            if first_bad < 0:
                for blocks, payload in zip(parts.by_owner, answers, strict=True):
                    self.server_compressor.decompress_(payload.tensors[1:], blocks, bucket.flat)
                return None
            self.server.undo(mean, answer, [served])
        self.worker.undo(bucket.flat, sent, parts.by_owner)
        return self._void(bucket, first_bad)

    @property
    def state_form(self) -> str:
        return f"{self.compressor}, {self.server_compressor}"

    def state_views(self, name: str) -> list[Tensor]:
        mine = self.table.served_by(self.rank)
        of_name = mine.parameters == self.index.position[name]
        served = [
            self.server.residual[h : h + n] for h, n in zip(mine.homes[of_name], mine.lengths[of_name], strict=True)
        ]
        return super().state_views(name) + served

    def comm_state(self) -> State:
        state = super().comm_state()
        state["local"]["server_residual"] = self.server.residual
        return state

    def load_comm_state(self, state: State) -> None:
        super().load_comm_state(state)
        _load(self.server.residual, state["local"], "server_residual")

    def load_resharded(self, states: Iterable[State]) -> None:
        every = list(states)
        super().load_resharded(every)
        old = self.compressor.table(self.index, len(every))
        for rank, state in enumerate(every):
            blocks = old.at_home(rank)
            places = element_indices(blocks.starts, blocks.lengths, self.worker.residual.device)
            self.worker.residual[places] += state["local"]["server_residual"].to(places.device)
        self.server.residual.zero_()


def _check_alone(aggregator: Aggregator, bucket: Bucket) -> None:
    """One rank is its own mean, and still does not let a NaN through."""
    if not _is_finite(bucket.flat):
        bucket.void = _first_bad(aggregator.index, bucket)


def _first_bad(index: ParameterIndex, bucket: Bucket) -> str:
    """The first parameter in registration order with a NaN or an inf."""
    return min(
        (name for name, x in bucket.views() if not bool(x.isfinite().all())), key=lambda name: index.position[name]
    )


def _is_finite(x: Tensor) -> bool:
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


def _load(target: Tensor, source: Mapping[str, Tensor], key: str) -> None:
    if key not in source or source[key].shape != target.shape:
        found = tuple(source[key].shape) if key in source else "nothing"
        raise CheckpointError(
            f"{key}: expected a tensor of shape {tuple(target.shape)}, found {found}; is it another model or world size?"
        )
    target.copy_(source[key])
