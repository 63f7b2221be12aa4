"""An outer method in a training script: its rounds follow the optimizer's steps, and machines may leave and rejoin."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from commopt.errors import AttachError, CheckpointError, GroupError
from commopt.exchange.base import is_finite
from commopt.exchange.two_level import own_share, put_together
from commopt.gossip.loop import Exchanged, OuterMethod, Round
from commopt.gossip.spread import Spread, spread_of
from commopt.groups.peers import PeerGroup, Peers, call_roll
from commopt.record.recorder import RoundReport
from commopt.run.checks import Checked, refuse_ddp
from commopt.run.machine import Machine
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


@dataclass
class _Pending:
    round: Round
    x: Tensor  # the parameters of the round, as it began
    begun_at: int  # optimizer steps done then
    wait: Callable[[], tuple[Exchanged, float]]
    blocked_s: float
    sent: float


class OuterRun(Run):
    """A run of an outer method. A machine is a replica, which may leave and rejoin; it may have one rank, or several.

    Each rank exchanges its share with the ranks of its number on the other machines, its peers. Whether a round counts, which
    machine to catch up from and when, a machine's ranks decide together.

    spread: the last estimate of the replicas' distance from their mean. averages: whether gradients have to be averaged inside the
        machine, which no framework does.
    """

    method: OuterMethod

    def __init__(self, model: Module, checked: Checked, peers: Peers, machine: Machine, averages: bool = False) -> None:
        super().__init__(model, checked, machine.ranks)  # nothing here needs all ranks of the job at once
        method, n = self.method, machine.ranks.size
        self.peers, self.max_norm, self.configuration = peers, checked.request.max_norm, checked.configuration
        self.machine, self.averages = machine, averages
        self.rank, self.ranks, self.per_machine = peers.rank * n + machine.ranks.rank, peers.size * n, n
        self.replica, self.traffic = peers.rank, peers.traffic
        peers.traffic.ranks = range(machine.ranks.rank, self.ranks, n)
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
        index = method.cut_out.whole
        nothing = torch.empty(1, dtype=torch.float32).expand(index.total)
        self._form = Bucket(nothing, index.names, tuple(index.offsets[:-1].tolist()))
        starts = stretches_of(p for _, p in named)[:, 0] + torch.from_numpy(method.cut_out.starts)
        self.stretches = torch.stack([starts, torch.tensor(method.index.numels)], 1)  # (P, 2) i64: of this rank's share
        self.is_sharded = any(hasattr(p, "to_local") for p in self.parameters.values())
        self._sketch = Spread(method.index.total, peers.rank)
        is_alone = machine.ranks.size == 1 or averages  # else DDP may be around the model
        self._attached(*(refuse_ddp(model, method.name, self.optimizer) if is_alone else ()))

    # -- the training script's side

    def join(self, *, wait_s: float = 60.0, **stateful: HasState) -> int:
        self._members.stateful, self._has_joined = stateful, True
        self._members.join(wait_s)
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
            exchanged, _ = pending.wait()
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
            wait = partial(lambda known: (known, 0.0), exchanged)
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
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_norm)
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
            self._end_round(self._pending.pop(0))
        round = self.method.round_after(self.steps)
        if round is not None and self.peers.size > 1:
            self._members.note_who_is_up()
            if self._members.follow():
                return
            self._begin_round(round)

    def _begin_round(self, round: Round) -> None:
        begun_s = self.peers.seconds
        flat = self.flat()
        x = flat[round.part].clone()
        if not self.machine.every(is_finite(x))[0]:
            self._members.recover()
            return
        if self._sketch.is_due(self.steps):
            self.spread = spread_of(self.machine.total(self._sketch.exchange(self.peers, flat, self.steps)))

        def job() -> tuple[Exchanged, float]:
            exchanged = self.method.exchange(x, round)
            return exchanged, self.peers.seconds - begun_s

        sent = self.peers.traffic.payload_bytes
        wait = self.peers.start(job)
        self._pending.append(_Pending(round, x, self.steps, wait, self.peers.seconds - begun_s, sent))
        if self.method.delay == 0:
            self._end_round(self._pending.pop(0))

    def _end_round(self, pending: _Pending) -> None:
        begun_s = self.peers.seconds
        exchanged, exchange_s = pending.wait()
        if not self._are_agreed(exchanged.members):
            exchanged = dataclasses.replace(self.method.alone(pending.x, pending.round, exchanged), is_missed=True)
        with torch.no_grad():
            new = self.method.apply(pending.x, pending.round, exchanged)
            if new is not pending.x or self.group.size > 1:  # set_flat gathers: all ranks of a machine must call it
                flat = self.flat()
                if self.steps == pending.begun_at:
                    flat[pending.round.part] = new
                else:
                    flat[pending.round.part] += new - pending.x  # keeps what inner steps have added since
                self.set_flat(flat)
        blocked_s = pending.blocked_s + self.peers.seconds - begun_s
        self.waited_s += blocked_s
        nbytes = self.peers.traffic.payload_bytes - pending.sent
        round, members, missed = pending.round.number, list(exchanged.members), exchanged.is_missed
        self.reports.append(RoundReport(self.steps, round, members, missed, blocked_s, exchange_s, nbytes, self.spread))

    def flat(self) -> Tensor:
        """(elements,) f32 on the CPU: this rank's share of the parameters in registration order, and of the averaged optimizer state."""
        everything = torch.cat([x.reshape(-1).to("cpu", torch.float32) for x in self.averaged()])
        if self.machine.copies.size == 1:
            return everything
        return own_share(self._form.with_flat(everything), self.method.cut_out).flat

    def set_flat(self, flat: Tensor) -> None:
        """Overwrite parameters and averaged state by tensors of the form of `flat`, of all copies."""
        own, copies = self._form.with_flat(flat), self.machine.copies
        if copies.size > 1:
            own = put_together(own, self._form, self.method.cut_out, copies)
        with torch.no_grad():
            for target, (_, x) in zip(self.averaged(), own.views(), strict=True):
                target.copy_(x.view_as(target))

    def _average_gradients(self) -> None:
        """Replace each gradient that a rank of the machine has by the mean over its ranks."""
        is_unused = self.machine.every(*(p.grad is None for p in self.parameters.values()))
        for p in [p for p, is_none in zip(self.parameters.values(), is_unused, strict=True) if not is_none]:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = grad.copy_(self.machine.total(grad.detach().cpu()) / self.group.size)

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

    def _are_agreed(self, members: Sequence[int]) -> bool:
        """Whether the ranks of this machine have exchanged with the same machines."""
        told = self.machine.told(*(int(one in members) for one in range(self.peers.size)))
        return all(one == told[0] for one in told)

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
        if self._are_agreed(ranks) and ranks and not has_diverged:
            if len(ranks) > 1:
                self.set_flat(flat.div_(len(ranks)))
            self.events.append(("final average", {"ranks": ranks, "step": self.steps}))
