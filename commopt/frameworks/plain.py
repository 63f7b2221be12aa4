"""A method in a script without any wrapper: the exchange happens at the optimizer's step."""

from __future__ import annotations

import logging
import time
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.nn import Module

from commopt.choice import Choice, read_choice
from commopt.errors import AttachError, ConfigError
from commopt.exchange.mean import Aggregator
from commopt.gossip.loop import OuterLoop
from commopt.groups import Group
from commopt.groups.peers import Peers
from commopt.methods import is_outer_method
from commopt.run.agree import Configuration, agree, check_group, configuration_of, meeting_group, own_group
from commopt.run.base import (
    Attachment,
    RefusesDDP,
    check_optimizer,
    check_parameters,
    check_wrapping,
    connect,
    has_closure,
)
from commopt.run.door import made
from commopt.run.outer import OuterAttachment, attach_outer
from commopt.wire.bucket import Bucket

_log = logging.getLogger(__name__)


class PlainAttachment(Attachment):
    """Averages when the optimizer steps; gradients accumulate freely until then."""

    def __init__(
        self,
        model: Module,
        method: Aggregator,
        optimizer: torch.optim.Optimizer | None,
        group: Group,
        bucket_bytes: int,
        find_unused_parameters: bool,
    ) -> None:
        super().__init__(model, method, optimizer, group)
        self.bucket_bytes, self.find_unused_parameters = bucket_bytes, find_unused_parameters
        self._has_new_gradients = self._has_warned = False
        self._versions: dict[int, int] = {}  # of the parameters in their first backward
        self._refuses_ddp = RefusesDDP(model, method.name)
        self._handles.append(self._refuses_ddp)
        for p in self.parameters.values():
            hook = p.register_post_accumulate_grad_hook(self._note_backward)  # type: ignore[no-untyped-call]
            self._handles.append(hook)
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                flat = x.detach().contiguous().view(-1)
                group.broadcast(flat.view(torch.uint8) if flat.numel() and flat.dtype == torch.bool else flat)
                x.copy_(flat.view_as(x))

    def _after_step(self, *_: Any) -> None:
        super()._after_step()
        self._refuses_ddp.remove()

    def exchange(self) -> None:
        """Average the gradients now. `optimizer.step()` does it otherwise; call it first where something must come between."""
        start = time.perf_counter()
        used = self._used_anywhere()
        buckets = self._buckets(used)
        with torch.no_grad():
            self.run(buckets)
            for bucket in buckets:
                for name, x in bucket.views():
                    p = self.parameters[name]
                    if p.grad is None:
                        p.grad = x.view_as(p).clone()
                    else:
                        p.grad.copy_(x.view_as(p))
        self.note_versions()
        self._has_new_gradients = False
        self.waited_s += time.perf_counter() - start

    def _note_backward(self, p: Tensor) -> None:
        self._has_new_gradients = True
        if self.steps == 0 and p._version != self._versions.setdefault(id(p), p._version) and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "rank %d: parameters change, but not by the %s that %s is attached to, so that nothing is exchanged: step "
                "attachment.optimizer",
                self.group.rank,
                type(self.optimizer).__name__,
                self.method.name,
            )

    def _used_anywhere(self) -> list[str]:
        """Parameters that have a gradient on some rank; without `find_unused_parameters`, all of them."""
        if not self.find_unused_parameters or self.group.size == 1:
            return [n for n, p in self.parameters.items() if not self.find_unused_parameters or p.grad is not None]
        flags = torch.tensor([p.grad is not None for p in self.parameters.values()], dtype=torch.int32)
        flags = flags.to(next(iter(self.parameters.values())).device)
        self.group.traffic.bucket = "which parameters are used"
        self.group.all_reduce(flags)
        return [name for name, count in zip(self.parameters, flags.tolist(), strict=True) if count]

    def _buckets(self, names: list[str]) -> list[Bucket]:
        buckets: list[Bucket] = []
        pending: list[tuple[str, Tensor]] = []
        nbytes = 0
        for name in names:
            p = self.parameters[name]
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            if pending and (nbytes + grad.nbytes > self.bucket_bytes or pending[0][1].dtype != grad.dtype):
                buckets.append(Bucket.of(pending, f"bucket {len(buckets)}"))
                pending, nbytes = [], 0
            pending.append((name, grad))
            nbytes += grad.nbytes
        return [*buckets, Bucket.of(pending, f"bucket {len(buckets)}")] if pending else buckets

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if (self._has_new_gradients or not self._exchanged) and not has_closure(args, kwargs):
            self.exchange()
        super()._before_step(optimizer, args, kwargs)


@overload
def attach(
    model: Module,
    method: Aggregator,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | None = None,
    *,
    bucket_bytes: int = 25 << 20,
    find_unused_parameters: bool = True,
) -> PlainAttachment: ...
@overload
def attach(
    model: Module,
    method: OuterLoop,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | Peers | None = None,
) -> OuterAttachment: ...
@overload
def attach(
    model: Module,
    method: Choice,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | Peers | None = None,
    *,
    bucket_bytes: int | None = None,
    find_unused_parameters: bool | None = None,
) -> PlainAttachment | OuterAttachment: ...
def attach(
    model: Module,
    method: Aggregator | OuterLoop | Choice,
    optimizer: torch.optim.Optimizer | None = None,
    group: Group | Peers | None = None,
    *,
    bucket_bytes: int | None = None,
    find_unused_parameters: bool | None = None,
) -> PlainAttachment | OuterAttachment:
    """Average gradients of an unwrapped model at `optimizer.step()`, by any method and over any group.

    method: what `commopt.build` made, or takes. Parameters and buffers are first made those of rank 0. `optimizer` is the one that
    applies a gradient method's result; an update method is its own. `group` is the job's ranks unless given (a SimGroup, say);
    without torch.distributed, one rank.
    bucket_bytes: at most so much is exchanged at once. find_unused_parameters: agree in every step on which parameters have a
    gradient on any rank (P counts of 4 bytes); the others are left alone. Without it a missing gradient counts as zeros.

    An outer method (NoLoCo, DiLoCo, ...) averages parameters instead, now and then, and its ranks may come and go: see `OuterAttachment`.

    Raises AttachError if method, model and optimizer do not fit together, or ranks disagree, on every rank and before anything is changed.
    """
    if _is_outer(method):
        options = {"bucket_bytes": bucket_bytes, "find_unused_parameters": find_unused_parameters}
        return attach_outer(model, cast(OuterLoop | Choice, method), optimizer, group, without_effect=options)
    nbytes = 25 << 20 if bucket_bytes is None else bucket_bytes
    finds_unused = True if find_unused_parameters is None else find_unused_parameters
    meeting = meeting_group(group, own_group(model))

    def check() -> tuple[tuple[Aggregator, torch.optim.Optimizer], Configuration]:
        chosen = made(method, model, optimizer)
        if isinstance(group, Peers):
            raise AttachError(
                f"{chosen.name} exchanges in every step, which needs a group with all ranks; only outer methods take peers"
            )
        check_group(group)
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise AttachError("this model averages gradients itself: use integrations.ddp.attach, or pass model.module")
        check_wrapping(model)
        stepping = check_optimizer(chosen, optimizer)
        named = check_parameters(model, chosen, stepping)
        if chosen.grad_scaler is not None and meeting.size > 1:
            raise AttachError(
                "GradScaler decides on each rank alone before a plain exchange; use integrations.ddp with grad_scaler"
            )
        if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < 1:
            raise AttachError(f"bucket_bytes: {nbytes!r} is out of range; write a number of bytes above 0")
        configuration = configuration_of(
            "plain", chosen, named, stepping, model=model, bucket_bytes=nbytes, find_unused_parameters=finds_unused
        )
        return (chosen, stepping), configuration

    chosen, stepping = agree(meeting, check)
    joined = group if isinstance(group, Group) else connect()
    return PlainAttachment(model, chosen, stepping, joined, nbytes, finds_unused)


def _is_outer(method: Any) -> bool:
    if isinstance(method, Aggregator | OuterLoop):
        return isinstance(method, OuterLoop)
    try:
        return is_outer_method(read_choice(method)[0])
    except ConfigError:
        return False  # which is told where all ranks hear of it
