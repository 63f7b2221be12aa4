"""Members of an outer run: how a machine starts with the others, catches up with them, and lets others catch up."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from commopt.errors import AttachError, CheckpointError, GroupError
from commopt.exchange.base import is_finite
from commopt.groups.peers import Letter, PeerGroup, Progress, call_roll
from commopt.run.agree import Configuration, difference, digest, listed
from commopt.run.files import pack, unpack
from commopt.run.machine import load_localized, localized
from commopt.run.run import broadcast_
from commopt.wire.payload import Payload, is_sound

if TYPE_CHECKING:
    from commopt.run.outer import OuterRun

_log = logging.getLogger(__name__)


class Members:
    """Everything between one rank and its peers but the rounds, for an `OuterRun`. All ranks of a machine make the same calls."""

    def __init__(self, training: OuterRun) -> None:
        self._training, self._peers, self._machine = training, training.peers, training.machine
        self.stateful: dict[str, Any] = {}  # what else a rank takes over with the training, by name: see `HasState`
        self._asked = 0
        self._asks: dict[int, Letter] = {}  # peers that want this rank's state
        self._schedule: dict[str, Any] | None = None  # taken over inside a step, for the next one on
        self._was_up = set(training.peers.others)

    def join(self, wait_s: float, *, has_state: bool = False) -> None:
        """Start with the others, or catch up with them if they train already; see `OuterRun.join`.

        has_state: the method's state has been loaded.
        """
        training, peers = self._training, self._peers
        end_s, must_catch_up = peers.seconds + wait_s, peers.returns and training.steps == 0
        peers.announce(training.steps, is_training=False)
        while True:
            if self.catch_up(in_step=False):
                return
            missing = [peer for peer in peers.others if not peers.is_up(peer)]
            is_complete, has_time = self._machine.every(not missing, peers.seconds < end_s)
            if (is_complete and not must_catch_up) or not has_time:
                break
            peers.sleep(0.05)
        if must_catch_up:
            raise GroupError(
                f"rank {training.rank} was restarted, and found no peer that trains to catch up from; resume from a checkpoint"
            )
        if missing:
            _log.warning("rank %d starts without %s, which did not come", training.rank, listed(missing))
        self._start_together(wait_s, has_state)

    def catch_up(self, *, tensors: bool = True, in_step: bool = True, donors: Sequence[int] | None = None) -> bool:
        """Take over a live peer's state; whether one answered. Without `tensors`, its step and schedule only.

        in_step: an optimizer step is just ending; the script's own schedule will step too before the next one begins.
        donors: peers to ask, the most advanced first; all that train if None.
        """
        training, peers, begun_s = self._training, self._peers, self._peers.seconds
        steps = self._steps()
        asked = [peer for peer in peers.others if steps[peer] >= 0] if donors is None else list(donors)
        for donor in sorted(asked, key=lambda peer: (-steps[peer], peer)):
            stored = self._ask(donor, tensors=tensors)
            if stored is None:
                continue
            before = training.steps
            self._check_alike({donor: stored["configuration"], peers.rank: training.configuration})
            if not self._machine.every(self._fits(stored))[0]:
                _log.warning("rank %d: what rank %d sent is not the state of this training", training.rank, donor)
                continue
            self._take_over(stored)
            if not in_step:
                self._settle()
            kind = "caught up" if tensors else "went on with the others"
            fields = {"from": donor, "left_out": training.steps - before, "step": training.steps}
            training.events.append((kind, {**fields, "seconds": round(peers.seconds - begun_s, 3)}))
            _log.info("rank %d %s at step %d, from rank %d", training.rank, kind, training.steps, donor)
            break
        else:
            donor = None
        training.waited_s += peers.seconds - begun_s if in_step else 0.0
        return donor is not None

    def _ask(self, donor: int, *, tensors: bool) -> dict[str, Any] | None:
        """A peer's state, of which each rank of the machine has fetched a part; None if any of them got no answer in time."""
        peers, machine, self._asked = self._peers, self._machine, self._asked + 1
        peers.send(donor, "ask", self._asked, Payload.of(torch.tensor([int(tensors)])))
        timeout_s = self._training.method.timeout_s
        end_s = peers.seconds + (max(60.0, 3 * timeout_s) if tensors else timeout_s)
        letter = None
        while letter is None and self._progress(donor).is_training and peers.seconds < end_s:
            letter = peers.receive(donor, "state", self._asked, 1.0)
        blob = (torch.uint8, None)
        opened = None if letter is None else letter.payload.opened((torch.int64, 2), blob, blob)
        step, nbytes = (-1, 0) if opened is None else opened[0].tolist()
        answers = machine.told(step, 0 if opened is None else machine.kind_of(opened[1].numel(), nbytes))
        if opened is None or step < 0 or answers[0][1] == 0 or any(one != answers[0] for one in answers):
            return None
        stored: dict[str, Any] | None = None
        with contextlib.suppress(CheckpointError, LookupError, TypeError, ValueError):
            state = opened[1] if opened[1].numel() == nbytes else machine.whole(opened[1], nbytes)
            found = {**unpack(opened[2]), **(unpack(state) if tensors else {})}
            found["configuration"] = {
                key: str(value) for key, value in dict(json.loads(found["configuration"])).items()
            }
            stored = found
        return stored if machine.every(stored is not None)[0] else None

    def before_step(self) -> None:
        """Load a schedule that was taken over in the last step, and answer peers that asked for this rank's state."""
        self._settle()  # so that parameters, optimizer and schedule all belong to the same step
        training, machine = self._training, self._machine
        asks = self._peers.drain("ask")
        self._asks |= {peer: letter for peer, letter in asks if letter.payload.opened((torch.int64, 1))}
        if not self._asks and machine.ranks.size == 1:
            return
        asked = [self._asks[peer].sequence if peer in self._asks else 0 for peer in range(self._peers.size)]
        told = machine.told(*asked)
        due = [peer for peer, n in enumerate(asked) if n and all(one[peer] == n for one in told)]
        # one that is not finite has nothing to give, and will soon have to ask
        has_state = bool(due) and machine.every(is_finite(training.flat()))[0]
        for peer in due:
            letter = self._asks.pop(peer)
            if has_state:
                self._answer(peer, letter)

    def _answer(self, peer: int, letter: Letter) -> None:
        """Send what this rank has; of what all copies in its machine have, a part."""
        training, machine = self._training, self._machine
        stateful = {key: value.state_dict() for key, value in self.stateful.items()}
        groups = [{k: x for k, x in group.items() if k != "params"} for group in training.optimizer.param_groups]
        own: dict[str, Any] = {"steps": training.steps, "stateful": stateful, "groups": groups}
        own["configuration"] = json.dumps(training.configuration)
        part, nbytes = torch.empty(0, dtype=torch.uint8), 0
        if bool(letter.payload.tensors[0][0]):
            own["method"] = training.method.tensors()
            states = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
            state = pack(localized(states))
            part, nbytes = machine.part(state) if machine.are_alike(state) else state, state.numel()
        payload = Payload.of(torch.tensor([training.steps, nbytes]), part, pack(own))
        self._peers.send(peer, "state", letter.sequence, payload, expires_s=120.0)
        fields = {"rank": peer, "step": training.steps, "nbytes": payload.nbytes}
        training.events.append(("helped to catch up", fields))

    def follow(self) -> bool:
        """Skip steps to catch up with the others if this rank fell far behind; whether it did.

        No parameters are sent for that. Under DiLoCo this rank adopts what the others share in the next round if most are ahead. If
        only some are, such as after a partition in which they were faster, theirs and its own are averaged then.
        """
        training, method = self._training, self._training.method
        limit = method.max_lag * method.every
        steps = self._steps()
        active = [peer for peer in self._peers.others if steps[peer] >= 0]
        ahead = [peer for peer in active if steps[peer] - training.steps >= limit]
        if not ahead:
            return False
        training.end_rounds()
        if not self.catch_up(tensors=False, donors=ahead):
            return False
        if 2 * len(ahead) <= len(active):
            method.skipped_to(training.steps)
        method.ready(training.steps // method.every * method.fragments)
        return True

    def recover(self) -> None:
        """Take over another replica: this one holds a NaN or an inf, and must not spread it."""
        training, rank = self._training, self._training.rank
        _log.warning("rank %d: its parameters are not finite after step %d", rank, training.steps)
        training.events.append(("parameters not finite", {"step": training.steps}))
        if not self.catch_up():
            raise GroupError(
                f"rank {rank}: parameters that are not finite after step {training.steps}, and no peer to take others over from"
            )

    def note_who_is_up(self) -> None:
        """Record peers that were lost or came back since the last call."""
        training = self._training
        up = {peer for peer in self._peers.others if self._peers.is_up(peer)}
        for kind, ranks in (("peer lost", self._was_up - up), ("peer back", up - self._was_up)):
            training.events += [(kind, {"rank": peer, "step": training.steps}) for peer in sorted(ranks)]
        self._was_up = up

    def _fits(self, stored: Mapping[str, Any]) -> bool:
        """Whether this rank can go on from what a peer has sent: it has the same tensors, and sound parameters."""
        training, groups = self._training, stored.get("groups")
        if type(stored.get("steps")) is not int or not isinstance(stored.get("stateful"), dict):
            return False
        if not isinstance(groups, list) or [*map(type, groups)] != [dict] * len(training.optimizer.param_groups):
            return False
        if "model" not in stored:
            return True
        both = {"model": localized(training.model.state_dict()), "method": training.method.tensors()}
        if any(_forms(stored.get(key)) != _forms(own) for key, own in both.items()):
            return False
        named = [stored["model"].get(name) for name, _ in training.model.named_parameters()]
        return all(is_sound(x) for x in (*named, *stored["method"].values()) if isinstance(x, torch.Tensor))

    def _take_over(self, stored: dict[str, Any]) -> None:
        training = self._training
        if "model" in stored:
            training.forget_rounds()
            load_localized(training.model, training.optimizer, stored)
            training.method.begin(training.flat())
            for key, x in training.method.tensors().items():
                x.copy_(stored["method"][key])
        training.steps = int(stored["steps"])
        self._schedule = {key: stored[key] for key in ("stateful", "groups")}

    def _settle(self) -> None:
        """Load the schedule that was taken over, and the learning rates and other settings that it made."""
        if self._schedule is None:
            return
        for key, value in self._schedule["stateful"].items():
            if key in self.stateful:
                self.stateful[key].load_state_dict(value)
        groups = self._training.optimizer.param_groups
        for group, given in zip(groups, self._schedule["groups"], strict=True):
            group.update(given)
        self._schedule = None

    def _start_together(self, wait_s: float, has_state: bool) -> None:
        """Start all members with the parameters and buffers of the lowest rank, except if a job resumes, whose replicas differ."""
        training, peers, machine = self._training, self._peers, self._machine
        tensors = (*training.model.parameters(), *training.model.buffers())
        if training.averages and training.steps == 0:
            broadcast_(tensors, machine.ranks.broadcast, "cpu")
        if peers.size > 1:
            words = torch.frombuffer(bytearray(digest(training.configuration)), dtype=torch.int64)
            card = torch.cat([torch.tensor([training.steps]), words])
            roll = call_roll(peers, "start", 0, card, wait_s)
            every = {peers.rank: training.configuration}
            if any(not torch.equal(roll.cards[rank][1:], words) for rank in roll.members):
                group = PeerGroup(peers, roll.members, "differ", 0, max(wait_s, 60.0))
                texts = group.tell(json.dumps(training.configuration))
                every = dict(zip(group.members, map(json.loads, texts), strict=True))
            self._check_alike(every)
            told = machine.told(max(int(roll.cards[rank][0]) for rank in roll.members), int(len(roll.members) > 1))
            furthest = max(step for step, _ in told)
            if training.steps < furthest:
                self._catch_up_at_start(furthest, wait_s)
                return
            if furthest == 0 and all(has_others for _, has_others in told):
                try:
                    group = PeerGroup(peers, roll.members, "start", 0, max(wait_s, 60.0))
                    machine.exchange_(tensors, group.broadcast)
                except GroupError as error:
                    _log.warning("rank %d starts with parameters of its own: %s", training.rank, error)
        if not has_state:
            training.method.begin(training.flat())

    def _check_alike(self, configurations: Mapping[int, Configuration]) -> None:
        """Raise AttachError on all ranks of the machine if the configurations of peers differ from this one's, or did for any rank."""
        are_alike = len({digest(one) for one in configurations.values()}) == 1
        if not self._machine.every(are_alike)[0]:
            own, rank = self._training.group, self._training.rank
            other = (
                f"rank {rank}: another rank of this machine has a configuration that differs from its peers'; see there"
            )
            ranks = {machine * own.size + own.rank: one for machine, one in configurations.items()}
            raise AttachError(other if are_alike else difference(ranks))

    def _catch_up_at_start(self, step: int, wait_s: float) -> None:
        peers, end_s = self._peers, self._peers.seconds + max(wait_s, 60.0)
        while not self.catch_up(in_step=False):
            if not self._machine.every(peers.seconds < end_s)[0]:
                raise GroupError(
                    f"rank {self._training.rank} resumes at step {self._training.steps}, others said {step}, and none of those trains"
                )
            peers.sleep(0.1)

    def _steps(self) -> list[int]:
        """The steps of all peers, as the machine's first rank knows them; -1 for those that do not train as some rank sees it."""
        known = [self._progress(peer) for peer in range(self._peers.size)]
        told = self._machine.told(*(one.step if one.is_training else -1 for one in known))
        return [steps[0] if min(steps) >= 0 else -1 for steps in zip(*told, strict=True)]

    def _progress(self, peer: int) -> Progress:
        return self._peers.progress(peer) or Progress()


def _forms(tensors: Any) -> dict[str, Any]:
    """The dtype and shape of each tensor in a state; empty for what is not one."""
    items = tensors.items() if isinstance(tensors, Mapping) else ()
    return {name: (x.dtype, x.shape) for name, x in items if isinstance(x, torch.Tensor)}
