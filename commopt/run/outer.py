"""An outer method in a training script: its rounds follow the optimizer's steps, and machines may leave and rejoin."""

import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from commopt.errors import AttachError, CheckpointError, GroupError
from commopt.exchange.base import is_finite
from commopt.exchange.clip import clip_gradients_
from commopt.exchange.two_level import put_together
from commopt.gossip.loop import Exchanged, OuterMethod, Round
from commopt.gossip.spread import Spread, spread_of
from commopt.groups.peers import PeerGroup, Peers, call_roll
from commopt.groups.staging import SideStaging
from commopt.methods import is_launched
from commopt.record.recorder import RoundReport
from commopt.run.checks import Checked, refuse_ddp
from commopt.run.machine import Machine, give_back_memory
from commopt.run.members import Members
from commopt.run.reshare import recut, stretches_of
from commopt.run.run import HasState, Run
from commopt.wire.bucket import Bucket
from commopt.wire.payload import is_sound
from commopt.wire.shards import local
from commopt.wire.state import Saved

_log = logging.getLogger(__name__)
_ROOM_BYTES = 1 << 26
_PASSES = 10_000  # of `range` at one step, more than anybody accumulates
# of a round, the seconds it took, and a sketch that is still to be sent
_Result = tuple[Exchanged, float, Tensor | None]


@dataclass
class _Pending:
    round: Round
    x: Tensor  # the parameters of the round, as it began; on the host, and there once `wait` has returned
    begun_at: int  # optimizer steps done then
    wait: Callable[[], _Result]
    blocked_s: float
    sent: float
    has_sketch: bool = False  # which is sent when the round ends


class OuterRun(Run):
    """A run of an outer method. A machine is a replica, which may leave and rejoin; it may have one rank, or several.

    Each rank exchanges its share with the ranks of its number on the other machines, its peers. Whether a round counts, which
    machine to catch up from and when, a machine's ranks decide together.

    The method and its state are on the host. From a GPU a round's parameters are copied there as one flat tensor, and what is applied
    is copied back, both on a side stream. With `delay`, nothing waits for the first copy but the exchange, in the background: whether
    the parameters were finite is then known, and replicas' sketches are sent, when the round ends.

    spread: the last estimate of the replicas' distance from their mean. averages: whether gradients have to be averaged inside the
        machine, which no framework does.
    """

    method: OuterMethod

    def __init__(self, model: Module, checked: Checked, peers: Peers, machine: Machine, averages: bool = False) -> None:
        super().__init__(model, checked, machine.ranks)  # nothing here needs all ranks of the job at once
        method, n = self.method, machine.ranks.size
        self.peers, self.max_norm, self.configuration = peers, checked.request.max_norm, checked.configuration
        self.machine, self.averages = machine, averages
        self.rank, self.per_machine = peers.rank * n + machine.ranks.rank, n
        self.replica, self.traffic = peers.rank, peers.traffic
        fixed = f"the topology of {method.name} is fixed; end all members, and start them with the longer list"
        peers.fixed_because = None if method.can_grow else fixed
        self.ranks, peers.traffic.ranks = peers.size * n, range(machine.ranks.rank, sys.maxsize, n)
        self.spread: float | None = None
        self._is_off = self._has_joined = False
        self._pending: list[_Pending] = []
        self._members = Members(self)
        peers.traffic.method, peers.is_used = method.name, True
        # unread are at most a few rounds' messages and another rank's state, optimizer and all
        peers.room_bytes = _ROOM_BYTES + 16 * sum(
            x.numel() * max(4, x.itemsize) for x in (*model.parameters(), *model.buffers())
        )
        named = [*self.parameters.items()]
        named += [(f"{name}:{key}", p) for key in method.averaged_state for name, p in self.parameters.items()]
        self.numels = {name: p.numel() for name, p in named}
        held = [(name, local(p)) for name, p in named]
        method.bind(held, peers, numels=list(self.numels.values()), copies=(machine.copies.rank, machine.copies.size))
        self.staging = SideStaging(next(iter(self.parameters.values())).device)
        # whether a round begins before its parameters are on the host
        self._is_ahead = self.staging.is_async and method.delay > 0
        starts = stretches_of(p for _, p in named)[:, 0] + torch.from_numpy(method.cut_out.starts)
        self.stretches = torch.stack([starts, torch.tensor(method.index.numels)], 1)  # (P, 2) i64: of this rank's share
        self.is_sharded = any(hasattr(p, "to_local") for p in self.parameters.values())
        self._sketch = Spread(method.index.total, peers.rank)
        is_alone = machine.ranks.size == 1 or averages  # else DDP may be around the model
        self._attached(*(refuse_ddp(model, method.name, self.optimizer) if is_alone else ()))
        if is_launched():  # the script may have been written for a method that joins nothing
            self._handles.append(model.register_forward_pre_hook(self._join_once))

    def _join_once(self, *_: object) -> None:
        if not self._has_joined:
            self.join()

    # -- the training script's side

    def join(self, *, step: int | None = None, wait_s: float = 60.0, **stateful: HasState) -> int:
        has_state = self.steps > 0
        super().join(step=step)
        self._members.stateful, self._has_joined = stateful, True
        self._members.join(wait_s, has_state=has_state)
        if not self._pending:
            self.method.ready(self.steps // self.method.every * self.method.fragments)
        self.peers.announce(self.steps)
        return self.steps

    def range(self, stop: int) -> Iterator[int]:
        """The steps that are left to do; a rank that fell far behind skips some to catch up."""
        if not self._has_joined:
            self.join()
        self._log.plan(stop)
        last, passes = -1, 0
        while self.steps < stop:
            passes = passes + 1 if self.steps == last else 1
            if passes > _PASSES:
                raise AttachError(
                    f"{_PASSES} passes through range without an optimizer step: it counts steps, and not batches; to accumulate "
                    "gradients, loop over the batches of a step inside, or count batches yourself"
                )
            last = self.steps
            yield last

    def finish(self) -> None:
        """End rounds under way, and with `final_average` average the replicas that are still up; call it after the last step."""
        self.end_rounds()
        if self.method.options.final_average and self.peers.size > 1 and not self._is_off:
            self._average_once()
        super().finish()
        self.peers.announce(self.steps, is_training=False)

    def close(self) -> None:
        super().close()
        self.peers.close()
        self.peers.is_used = False

    def _silenced(self) -> dict[str, Any]:
        return {"_is_off": True}

    def grow(self, machines: int) -> None:
        """Deal with so many machines from now on; those added are drawn for rounds later."""
        self.peers.size, self.ranks = machines, machines * self.per_machine

    def quiet(self) -> None:
        """Wait until everything sent has been acknowledged, so that counted bytes and those on the interface match."""
        end_s = self.peers.seconds + 10.0
        while not self.peers.is_quiet() and self.peers.seconds < end_s:
            self.peers.sleep(0.01)

    # -- checkpoints

    is_replica = True

    def saved(self) -> Saved:
        """The method's state, and the rounds under way, which are waited for."""
        saved = self.method.saved()
        own = {**saved["shared"], **saved["rank"], "stretches": self.stretches}
        for k, pending in enumerate(self._pending):
            exchanged, _, _ = pending.wait()
            when = [pending.round.number, pending.round.fragment, pending.begun_at, int(exchanged.is_missed)]
            own[f"round {k}"] = torch.tensor([*when, *exchanged.members])
            own[f"round {k} x"] = pending.x
            own |= {f"round {k} value {key}": x for key, x in exchanged.values.items()}
        return {"shared": {}, "rank": own}

    def load_saved(self, saved: Saved) -> None:
        super().load_saved(saved)
        own, self._pending = saved["rank"], []
        while (key := f"round {len(self._pending)}") in own:
            number, fragment, begun_at, is_missed, *members = own[key].tolist()
            prefix = f"{key} value "
            values = {name.removeprefix(prefix): x.clone() for name, x in own.items() if name.startswith(prefix)}
            exchanged = Exchanged(tuple(members), bool(is_missed), values)
            round = Round(number, self.method.fragment_parts[fragment], fragment)
            x, sent = own[f"{key} x"].clone(), self.peers.traffic.payload_bytes
            wait = partial(lambda known: (known, 0.0, None), exchanged)
            self._pending.append(_Pending(round, x, begun_at, wait, 0.0, sent))

    def resized(self, every: Sequence[Saved], per_machine: int) -> Callable[[], object]:
        if any(key.startswith("round ") for key in every[0]["rank"]):
            raise CheckpointError(
                f"{self.method.name}: this was saved while a round was under way, which continues only on machines of {len(every)} "
                "ranks; save right after a round was applied"
            )
        own = recut(self.method, [saved["rank"] for saved in every], self.numels, self.stretches)
        return lambda: self.method.load({"shared": own, "rank": own})

    # -- rounds

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any = (), kwargs: Any = None) -> None:
        super()._before_step(optimizer, args, kwargs)
        if self._has_joined and not self._is_off:
            self._members.before_step()
        if self.averages:
            self._average_gradients()
        if self.max_norm is not None:
            self._norm = clip_gradients_(self.parameters.values(), self.max_norm)
        self.method.before_step(self.optimizer)

    def _after_step(self, *_: Any) -> None:
        if self._is_off:
            return
        if not self._has_joined:
            raise AttachError(
                f"{self.method.name}: call run.join() before the first step, or loop over run.range(steps); Lightning's strategy and "
                "the Trainer's callback do that themselves"
            )
        self.steps += 1
        self.peers.announce(self.steps)
        while self._pending and self.steps - self._pending[0].begun_at >= self.method.delay:
            if not self._end_round(self._pending.pop(0)):
                return
        round = self.method.round_after(self.steps)
        if round is None or self.peers.size == 1 or self._members.before_round(round.number):
            return
        if self.peers.rank < self.peers.size_at(round.number) > 1:  # else it was added, and is not drawn yet
            self._begin_round(round)

    def _begin_round(self, round: Round) -> None:
        begun_s, is_ahead = self.peers.seconds, self._is_ahead
        give_back_memory()  # a round takes more than a step
        is_due = self._sketch.is_due(self.steps) and not any(one.has_sketch for one in self._pending)
        is_whole = is_due or self.method.fragments == 1  # a sketch is of everything
        fragment = None if is_whole else round.fragment
        copied, arrive = self.staging.to_host(self._values(fragment), f"fragment {fragment}")
        x = copied[round.part] if is_whole else copied
        if not is_ahead:
            arrive()
            if not self.machine.every(is_finite(x))[0]:
                self._members.recover()
                return
        if is_due:
            self._sketch.begin(self.steps)
            if not is_ahead:
                self._estimate_spread(self._sketch.sketch(copied), self.steps)

        def job() -> _Result:
            sketch, can_send = None, True
            if is_ahead:
                arrive()
                sketch, can_send = self._sketch.sketch(copied) if is_due else None, is_finite(x)
            exchanged = self.method.exchange(x, round) if can_send else Exchanged((), is_missed=True)
            return exchanged, self.peers.seconds - begun_s, sketch

        sent = self.peers.traffic.payload_bytes
        wait = self.peers.start(job)
        blocked_s = self.peers.seconds - begun_s
        self.waited_s += blocked_s
        self._pending.append(_Pending(round, x, self.steps, wait, blocked_s, sent, has_sketch=is_ahead and is_due))
        if self.method.delay == 0:
            self._end_round(self._pending.pop(0))

    def _end_round(self, pending: _Pending) -> bool:
        """Apply a round's result; False if its parameters were not finite, so that this machine took over another one's."""
        begun_s = self.peers.seconds
        exchanged, exchange_s, sketch = pending.wait()
        told = self._told(exchanged.members)
        if not all(map(any, told)):
            self._members.recover()
            return False
        if any(one != told[0] for one in told) or (exchanged.is_missed and not exchanged.values):
            # without a delay the exchange may have overwritten it, and the parameters are still what they were
            x = pending.x if self.method.delay else self._values(pending.round.fragment).cpu()
            exchanged = dataclasses.replace(self.method.alone(x, pending.round, exchanged), is_missed=True)
        with torch.no_grad():
            new = self.method.apply(pending.x, pending.round, exchanged)
            if new is not pending.x or self.group.size > 1:  # _write gathers: all ranks of a machine must call it
                is_change = self.steps != pending.begun_at  # keeps what inner steps have added since
                new = torch.sub(new, pending.x, out=pending.x) if is_change else new
                self._write(new, pending.round.fragment, adds=is_change)
        ending_s = self.peers.seconds - begun_s
        self.waited_s += ending_s
        blocked_s = pending.blocked_s + ending_s
        nbytes = self.peers.traffic.payload_bytes - pending.sent
        if sketch is not None:
            self._estimate_spread(sketch, pending.begun_at)
        round, members, missed = pending.round.number, list(exchanged.members), exchanged.is_missed
        self.reports.append(RoundReport(self.steps, round, members, missed, blocked_s, exchange_s, nbytes, self.spread))
        return True

    def _estimate_spread(self, sketch: Tensor, step: int) -> None:
        self.spread = spread_of(self.machine.total(self._sketch.exchange(self.peers, sketch, step)))

    def flat(self) -> Tensor:
        """(elements,) f32 on the CPU: this rank's share of the parameters in registration order, and of the averaged optimizer state."""
        return self._values().cpu()

    def _values(self, fragment: int | None = None) -> Tensor:
        """(elements,) f32 on the parameters' device: `flat`, or a fragment of it."""
        cut, which = self.method.cut_out, self._parameters_of(fragment)
        pairs = zip(cut.index.names[which], self.averaged()[which], strict=True)
        return torch.cat([cut.of(x.reshape(-1), name).float() for name, x in pairs])

    def _write(self, values: Tensor, fragment: int | None = None, *, adds: bool = False) -> None:
        """Overwrite parameters and averaged state by a tensor of the form of `flat`, or of a fragment of it, of all copies; or add it."""
        whole, which, copies = self.method.cut_out.whole, self._parameters_of(fragment), self.machine.copies
        numels = whole.numels[which]
        if copies.size > 1:
            starts = tuple(itertools.accumulate(numels[:-1], initial=0))
            form = Bucket(values.new_empty(1).expand(sum(numels)), whole.names[which], starts)
            values = put_together(form.with_flat(values), form, self.method.cut_out, copies).flat
        with torch.no_grad():
            parts = torch.split(self.staging.to_device(values), list(numels))
            for target, x in zip(self.averaged()[which], parts, strict=True):
                (target.add_ if adds else target.copy_)(x.view_as(target))

    def _parameters_of(self, fragment: int | None) -> slice:
        """The numbers of a fragment's parameters, or of all."""
        return slice(None) if fragment is None else self.method.fragment_parameters[fragment]

    @torch.no_grad()
    def _average_gradients(self) -> None:
        """Replace each gradient that a rank of the machine has by the mean over its ranks; from a GPU they go to the host at once."""
        is_unused, ranks = self.machine.every(*(p.grad is None for p in self.parameters.values())), self.group.size
        used = [p for p, is_none in zip(self.parameters.values(), is_unused, strict=True) if not is_none]
        for p in used:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in used if p.grad is not None]
        if self.staging.device.type == "cpu":
            for grad in grads:
                grad.copy_(self.machine.total(grad.detach()) / ranks)
        elif grads:
            flat, arrive = self.staging.to_host(torch.cat([grad.reshape(-1) for grad in grads]), "gradients")
            arrive()
            means = self.staging.to_device(self.machine.total(flat).div_(ranks))
            for grad, mean in zip(grads, torch.split(means, [p.numel() for p in used]), strict=True):
                grad.copy_(mean.view_as(grad))

    def averaged(self) -> list[Tensor]:
        states = [self._state(p, key) for key in self.method.averaged_state for p in self.parameters.values()]
        return [local(x) for x in (*self.parameters.values(), *states)]

    def _state(self, p: Tensor, key: str) -> Tensor:
        state = self.optimizer.state.get(p, {})
        if not state:
            return torch.zeros_like(p)
        known = {name: x for name, x in state.items() if isinstance(x, Tensor) and x.shape == p.shape}
        if key not in known:
            raise AttachError(
                f"average_state: {type(self.optimizer).__name__} has no {key!r} for each parameter; it has {', '.join(known) or 'none'}"
            )
        return known[key]

    def _told(self, members: Sequence[int]) -> list[list[int]]:
        """For each rank of this machine, which machines it has exchanged with, as a flag for each."""
        return self.machine.told(*(int(one in members) for one in range(self.peers.size)))

    def end_rounds(self) -> None:
        """Wait for the rounds under way, and apply them."""
        while self._pending:
            self._end_round(self._pending.pop(0))

    def forget_rounds(self) -> None:
        """Wait for the rounds under way, and do not apply them."""
        while self._pending:
            self._pending.pop(0).wait()

    def _average_once(self) -> None:
        timeout_s, flat = self.method.timeout_s, self.flat()
        has_diverged, ranks = not self.machine.every(is_finite(flat))[0], list[int]()
        if has_diverged:
            self.events.append(("parameters not finite", {"step": self.steps}))
        try:
            card = torch.tensor([self.steps, int(has_diverged)])  # a diverged rank answers too: others may wait for it
            roll = call_roll(self.peers, "final", 0, card, timeout_s)
            ranks = [rank for rank in roll.members if not roll.cards[rank][1]]
            if not has_diverged:
                PeerGroup(self.peers, ranks, "final", 0, timeout_s).all_reduce(flat)
                if not is_sound(flat):
                    raise GroupError("what came of it is not finite")
        except GroupError as error:
            ranks = []
            _log.warning("rank %d ends without the final average: %s", self.rank, error)
        told = self._told(ranks)
        if all(one == told[0] for one in told) and ranks and not has_diverged:
            if len(ranks) > 1:
                self._write(flat.div_(len(ranks)))
            self.events.append(("final average", {"ranks": ranks, "step": self.steps}))
