"""A method in a script without any wrapper: the exchange happens at the optimizer's step."""

import os
import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from commopt.gossip.loop import OuterMethod
from commopt.groups import Group, LocalGroup, Peers, SimGroup, World
from commopt.run import checks
from commopt.run.agree import meeting_group
from commopt.run.every_step import EveryStepRun
from commopt.run.machine import Machine
from commopt.run.outer import OuterRun
from commopt.run.run import Run, broadcast_
from commopt.wire.bucket import Bucket


class PlainRun(EveryStepRun):
    """Averages when the optimizer steps; gradients accumulate freely until then."""

    bucket_bytes = 25 << 20  # the most that is exchanged at once

    def __init__(self, model: Module, checked: checks.Checked, group: Group) -> None:
        super().__init__(model, checked, group)
        self._has_new_gradients = False
        # the gradients of the last step, and their versions
        self._applied: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._handles += checks.refuse_ddp(model, self.method.name, self.optimizer)
        for p in self.parameters.values():
            hook = p.register_post_accumulate_grad_hook(self._note_backward)  # type: ignore[no-untyped-call]
            self._handles.append(hook)
        broadcast_((*model.parameters(), *model.buffers()), group.broadcast)

    def _after_step(self, *_: Any) -> None:
        super()._after_step()
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        self._applied = {name: (weakref.ref(grad), grad._version) for name, grad in grads.items()}

    def exchange_gradients(self) -> None:
        """Average the gradients now; `optimizer.step()` does it otherwise."""
        start = time.perf_counter()
        buckets = self._buckets(self._used_anywhere())
        with torch.no_grad():
            self.exchange(buckets)
            for bucket in buckets:
                for name, x in bucket.views():
                    p = self.parameters[name]
                    if p.grad is None:
                        p.grad = torch.empty_like(p)
                    p.grad.copy_(x.view_as(p))
        self.note_gradients()
        self._has_new_gradients = False
        self.waited_s += time.perf_counter() - start

    def _note_backward(self, p: Tensor) -> None:
        self._has_new_gradients = True
        self.note_backward()

    def _used_anywhere(self) -> list[str]:
        """Parameters that have a gradient on some rank; the others are left alone. Sends 4 bytes for each parameter.

        Raises GroupError, on all ranks, if some of them step a second time by gradients that they have applied already.
        """
        if self.group.size == 1:
            return [name for name, p in self.parameters.items() if p.grad is not None]
        flags = torch.tensor([p.grad is not None for p in self.parameters.values()], dtype=torch.int32)
        flags[0] += int(self._repeats()) << 16  # beyond the count of ranks
        flags = flags.to(next(iter(self.parameters.values())).device)
        self.group.traffic.bucket = "which parameters are used"
        self.group.all_reduce(flags)
        if 0 < int(flags[0]) >> 16 < self.group.size:
            self._refuse_uneven("steps by gradients that are applied already", int(self._repeats()))
        return [name for name, count in zip(self.parameters, flags.tolist(), strict=True) if count & 0xFFFF]

    def _repeats(self) -> bool:
        """Whether no gradient has changed since the last step."""
        if self._has_new_gradients or not self._applied:
            return False
        grads = [(self.parameters[name].grad, ref(), version) for name, (ref, version) in self._applied.items()]
        return all(grad is not None and grad is old and grad._version == version for grad, old, version in grads)

    def _buckets(self, names: list[str]) -> list[Bucket]:
        parts: list[list[tuple[str, Tensor]]] = []
        nbytes = 0
        for name in names:
            p = self.parameters[name]
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            nbytes += grad.nbytes
            if not parts or nbytes > self.bucket_bytes or parts[-1][0][1].dtype != grad.dtype:
                parts.append([])
                nbytes = grad.nbytes
            parts[-1].append((name, grad))
        return [Bucket.of(part, f"bucket {k}") for k, part in enumerate(parts)]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        if (self._has_new_gradients or not self._exchanged) and not checks.has_closure(args, kwargs):
            self.exchange_gradients()
        super()._before_step(optimizer, args, kwargs)


def attach(model: Module, request: checks.Request) -> Run:
    """Average gradients at `optimizer.step()`, or parameters every N steps; all ranks start with the same parameters and buffers."""
    group = request.group
    # members that come and go compare their configurations when they join
    is_simulated = isinstance(group.between if isinstance(group, World) else group, SimGroup)
    has_peers = isinstance(group, Peers) or (group is None and "COMMOPT_PEERS" in os.environ)
    meets_later = has_peers or (is_simulated and checks.is_outer(request.method))
    meeting = meeting_group(group)
    facts = {
        "overlap without backward": request.overlap and "a model that is not wrapped in DDP",
        "plain scaler": request.grad_scaler is not None and meeting.size > 1,
    }
    checked = checks.check_request("plain", model, request, LocalGroup() if meets_later else meeting, lambda _: facts)
    return start(model, checked)


def start(model: Module, checked: checks.Checked) -> Run:
    """The run of a request that has been checked."""
    group = checked.request.group
    if isinstance(checked.method, OuterMethod):
        peers, inside = checks.connect_machines(group)
        return OuterRun(model, checked, peers, Machine(inside), averages=inside is not None)
    return PlainRun(model, checked, group if isinstance(group, Group) else checks.connect(method=checked.method))
