"""Members of an outer run: how a machine starts with the others, catches up with them, and lets others catch up."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from commopt.errors import AttachError, CheckpointError, GroupError
from commopt.exchange.base import is_finite
from commopt.groups.peers import Letter, PeerGroup, Progress, call_roll, merged, size_at
from commopt.record.recorder import Recorder
from commopt.run.agree import Configuration, difference, digest, listed
from commopt.run.files import pack, unpack
from commopt.run.machine import load_localized, localized
from commopt.run.run import broadcast_
from commopt.wire.payload import Payload, is_sound

if TYPE_CHECKING:
    from commopt.run.outer import OuterRun

_log = logging.getLogger(__name__)
_TELL_S = 3.0  # in which all members hear from which round a new one takes part: they send something every second


class Members:
    """Everything between one rank and its peers but the rounds, for an `OuterRun`. All ranks of a machine make the same calls."""

    def __init__(self, training: OuterRun) -> None:
        self._training, self._peers, self._machine = training, training.peers, training.machine
        self.stateful: dict[str, Any] = {}  # what else a rank takes over with the training, by name: see `HasState`
        self._asked = 0
        self._asks: dict[int, Letter] = {}  # peers that want this rank's state
        self._schedule: dict[str, Any] | None = None  # taken over inside a step, for the next one on
        self._was_up, self._unseen = set(training.peers.others), set[int]()  # the second: added, and not up yet
        self._round_s: float | None = None  # when the last round began
        self._turned_away: set[int] = set()

    def join(self, wait_s: float, *, has_state: bool = False) -> None:
        """Start with the others, or catch up with them if they train already; see `OuterRun.join`.

        has_state: the method's state has been loaded. A member whose list is longer than the others' has to catch up: it was added.
        """
        training, peers = self._training, self._peers
        end_s, must_catch_up = peers.seconds + wait_s, peers.returns and training.steps == 0
        peers.announce(training.steps, is_training=False)
        while True:
            if self.catch_up(in_step=False):
                return
            missing = [peer for peer in peers.others if not peers.is_up(peer)]
            known = [one.sizes for peer in peers.others if (one := peers.progress(peer)) and one.sizes]
            is_first = all(size_at(sizes, 0) >= peers.size_at(0) for sizes in known)
            has_time = peers.seconds < end_s
            no = {} if has_time else dict.fromkeys(peers.unheard, "it does not reach this one; is the port open here?")
            no = {peer: why for peer, why in sorted({**no, **peers.refusals}.items()) if peer in missing}
            is_alone = bool(no) and len(missing) == peers.size - 1 and (len(no) == len(missing) or not has_time)
            is_complete, is_first, is_let_in, has_time = self._machine.every(
                not missing, is_first, not is_alone, has_time
            )
            if not is_let_in:
                told = "; ".join(f"{peers.name_of(peer)}: {why}" for peer, why in no.items())
                raise GroupError(
                    f"rank {training.rank} is not let in: {told or 'another rank of its machine was turned away'}"
                )
            must_catch_up |= not is_first
            if (is_complete and not must_catch_up) or not has_time:
                break
            peers.sleep(0.05)
        if must_catch_up:
            why = "was restarted" if peers.returns else "has a longer list of members than its peers"
            raise GroupError(
                f"rank {training.rank} {why}, and found no peer that trains to catch up from; resume from a checkpoint"
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
                peers.sizes = self._progress(donor).sizes or peers.sizes
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
        wish = torch.cat([torch.tensor([int(tensors)]), self._mark])
        peers.send(donor, "ask", self._asked, Payload.of(wish))
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
            found = {**unpack(opened[2]), **(unpack(state) if tensors and nbytes else {})}
            found["configuration"] = {
                key: str(value) for key, value in dict(json.loads(found["configuration"])).items()
            }
            stored = found
        return stored if machine.every(stored is not None)[0] else None

    def before_step(self) -> None:
        """Load a schedule that was taken over in the last step, answer peers that asked for this rank's state, and add members."""
        self._settle()  # so that parameters, optimizer and schedule all belong to the same step
        training, machine, peers = self._training, self._machine, self._peers
        asks = peers.drain("ask")
        self._asks |= {peer: one for peer, one in asks if one.payload.opened((torch.int64, 5))}
        if not self._asks and machine.ranks.size == 1 and peers.known == peers.size:
            return
        asked = [self._asks[peer].sequence if peer in self._asks else 0 for peer in range(peers.size)]
        told = machine.told(*asked, peers.known)
        due = [peer for peer, n in enumerate(asked) if n and all(one[peer] == n for one in told)]
        if peers.fixed_because is None and (known := min(one[-1] for one in told)) > peers.size:
            self._unseen.update(range(peers.size, known))
            training.grow(known)
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
        wish, is_alike = letter.payload.tensors[0], torch.equal(letter.payload.tensors[0][1:], self._mark)
        if not is_alike and peer not in self._turned_away:
            self._turned_away.add(peer)
            self._say(peer, "is turned away, as its configuration differs; it prints how")
        if bool(wish[0]) and is_alike:
            own["method"] = training.method.tensors()
            states = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
            state = pack(localized(states))
            part, nbytes = machine.part(state) if machine.are_alike(state) else state, state.numel()
        payload = Payload.of(torch.tensor([training.steps, nbytes]), part, pack(own))
        self._peers.send(peer, "state", letter.sequence, payload, expires_s=120.0)
        fields = {"rank": peer, "step": training.steps, "nbytes": payload.nbytes}
        if is_alike:
            training.events.append(("helped to catch up", fields))

    def before_round(self, number: int) -> bool:
        """Note who is up, and who is drawn from in which rounds; skip steps if this rank fell far behind, and return whether it did."""
        steps = self._steps()
        self._note_who_is_up(number)
        self._note_sizes(number, steps)
        return self._follow(steps)

    def _follow(self, steps: Sequence[int]) -> bool:
        """Skip steps to catch up with the others if this rank fell far behind; whether it did.

        No parameters are sent for that. Under DiLoCo this rank adopts what the others share in the next round if most are ahead. If
        only some are, such as after a partition in which they were faster, theirs and its own are averaged then.
        """
        training, method = self._training, self._training.method
        limit = method.max_lag * method.every
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

    def _note_who_is_up(self, number: int) -> None:
        """Record peers that were lost or came back since the last round, and say so."""
        peers = self._peers
        up = {peer for peer in peers.others if peers.is_up(peer)}
        for peer in sorted(self._was_up - up):
            is_expected = not peers.last_progress(peer).is_training  # it has finished
            told = f"is not answering since round {number}; training continues without it"
            self._note("peer lost", peer, "" if is_expected else told)
        for peer in sorted(up - self._was_up - self._unseen):
            self._note("peer back", peer, f"is back at round {number}")
        self._was_up, self._unseen = up, self._unseen - up

    def _note_sizes(self, number: int, steps: Sequence[int]) -> None:
        """Agree from which round on added members are drawn; `steps`: of all peers that train, as the machine's ranks know it.

        The lowest of those drawn from decides it once an added member trains: at least two rounds and _TELL_S ahead, so that all know
        by then. All pass on what they know. If two have decided, the later round counts; who hears it too late misses rounds.
        """
        peers, method, begun_s = self._peers, self._training.method, self._round_s
        self._round_s = peers.seconds
        heard = [self._progress(peer).sizes for peer in peers.others if steps[peer] >= 0]
        decided = [one for sizes in heard for one in sizes if one[0] > 0]  # not what a member's own list has
        sizes, near = merged(peers.sizes, tuple(decided)), self._training.steps - method.max_lag * method.every
        last, lower = sizes[-1][1], steps[: min(peers.rank, peers.size_at(number))]
        is_due = max(steps[last:], default=-1) >= max(0, near)  # one that has caught up
        if begun_s is not None and max(lower, default=-1) < 0 and is_due:
            ahead = (max(steps) - self._training.steps) // method.every * method.fragments
            in_time = math.ceil(_TELL_S / max(self._round_s - begun_s, 1e-3))
            sizes = merged(sizes, ((number + ahead + 2 + in_time, peers.size),))
        members, round = max((n, first) for n, first in self._machine.told(*reversed(sizes[-1])))
        if members > peers.size:
            return  # this rank has heard of their round before it has heard of them
        for peer in range(peers.sizes[-1][1], members):
            told = f"was added to the members, and takes part from round {round} on"
            self._note("peer added", peer, told, round=round)
        peers.sizes = merged(sizes, ((round, members),))

    @property
    def _mark(self) -> torch.Tensor:
        """(4,) i64: what is equal only for equal configurations."""
        return torch.frombuffer(bytearray(digest(self._training.configuration)), dtype=torch.int64)

    def _note(self, kind: str, peer: int, told: str, **fields: Any) -> None:
        """Record an event with a peer, and log what is told of it, if a launcher that asked for a record won't show the event."""
        self._training.events.append((kind, {"rank": peer, "step": self._training.steps, **fields}))
        if told and not Recorder.is_wanted():
            self._say(peer, told)

    def _say(self, peer: int, told: str) -> None:
        if self._machine.ranks.rank == 0:
            _log.warning("rank %d: %s %s", self._training.rank, self._peers.name_of(peer), told)

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
            card = torch.cat([torch.tensor([training.steps]), self._mark])
            roll = call_roll(peers, "start", 0, card, wait_s)
            every = {peers.rank: training.configuration}
            if any(not torch.equal(roll.cards[rank][1:], self._mark) for rank in roll.members):
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
