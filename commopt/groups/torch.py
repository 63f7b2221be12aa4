"""A group over torch.distributed: Gloo for tensors on the CPU, NCCL for tensors on GPUs."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from commopt.errors import GroupError
from commopt.groups.base import BufferGroup, Traffic
from commopt.groups.staging import Staging

_log = logging.getLogger(__name__)
AT_ONCE_BYTES = 1 << 16  # that several ranks may be sending to one: 10 ms at 50 Mbit/s, a latency's worth
TAG = 0xC0  # apart from sends of the user's in the same process group
SOON = timedelta(seconds=60)  # until it is said for whom a rank waits
_told: dict[str, int] = {}  # by process group: calls of `tell` in this process so far


class TorchGroup(BufferGroup):
    """The ranks of a torch.distributed process group; the default group if None is given.

    Raises GroupError if torch.distributed has not been initialised, or an exchange fails.
    """

    _make: Callable[[], dist.ProcessGroup] | None = None  # makes it anew, if `close` has ended it

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise GroupError("torch.distributed is not initialised; call torch.distributed.init_process_group first")
        self._process_group: Any = process_group or dist.group.WORLD  # None once it has ended
        self.rank = dist.get_rank(self.process_group)
        self.size = dist.get_world_size(self.process_group)
        self.traffic = Traffic()
        self.device = device_of(self.process_group)
        self._staging = Staging()

    @property
    def process_group(self) -> dist.ProcessGroup:
        if self._process_group is None and self._make is not None:
            self._process_group = self._make()  # such as to save after the end
        own: dist.ProcessGroup = self._process_group
        return own

    @property
    def is_spread(self) -> bool:
        return super().is_spread or os.environ.get("LOCAL_WORLD_SIZE") == "1"

    @classmethod
    def like(
        cls,
        process_group: dist.ProcessGroup | None = None,
        parts: Sequence[Sequence[int]] | None = None,
        backend: str | None = None,
    ) -> TorchGroup:
        """A group over a new process group of the same ranks, so its calls never mix with others.

        parts: of the process group's ranks, by their numbers in it, of which this rank gets its own; the same on all of them.
        backend: its own if None. Raises GroupError if torch could not bring the ranks of a sub-group together.
        """
        parent = process_group or dist.group.WORLD
        ranks = dist.get_process_group_ranks(parent)
        everyone = len(ranks) == dist.get_world_size()
        if not everyone:
            _check_group_counts(parent)
        kind: Any = {
            "timeout": _timeout(parent),
            "backend": backend or dist.get_backend(parent),
            "group_desc": "commopt",
        }

        def make() -> dist.ProcessGroup:
            own: Any = None
            for part in parts or [range(len(ranks))]:
                members = [ranks[k] for k in part]
                if everyone or dist.get_rank() in members:  # all ranks of a job make each group, or only its members
                    one = dist.new_group(members, **kind) if everyone else group_of(members, **kind)
                    own = one if dist.get_rank() in members else own
            return cast(dist.ProcessGroup, own)

        group = cls(make())
        if everyone:  # torch gives a later group the name of a sub-group that has ended, which the store remembers
            group._make = make
        return group

    def all_reduce(self, x: Tensor) -> None:
        self._count("all_reduce", x.nbytes)
        with self._in_place("all_reduce", x) as here:
            dist.all_reduce(here, group=self.process_group)

    def broadcast(self, x: Tensor, src: int = 0) -> None:
        self._count("broadcast", x.nbytes, root=src)
        with self._in_place("broadcast", x) as here:
            dist.broadcast(here, group=self.process_group, group_src=src)

    def tell(self, text: str) -> list[str]:
        """Goes through the job's store, so that ranks that are at different collectives get an error and do not hang."""
        if self.size == 1:
            return [text]
        ranks = dist.get_process_group_ranks(self.process_group)
        place = f"commopt {self.process_group.group_name} {hash(tuple(ranks)):x}"
        _told[place] = _told.get(place, 0) + 1
        store = dist.distributed_c10d._get_default_store()  # new if a job starts again, when processes may not be
        if (count := store.add(f"{place} of {self.rank}", 1)) > _told[place]:
            raise GroupError(
                f"rank {ranks[self.rank]} was here before, in a process that this one replaces: torch.distributed cannot take one rank "
                "back, so restart all of them; with an outer method, start them by commopt launch --independent, and a rank can return"
            )
        keys = [f"{place} {count} {rank}" for rank in range(self.size)]
        store.set(keys[self.rank], text)
        in_all = _timeout(self.process_group) or dist.default_pg_timeout
        for patience in (min(SOON, in_all), in_all):
            try:
                store.wait(keys, patience)
                break
            except RuntimeError as error:
                missing = ranks
                with suppress(RuntimeError):  # the store's own rank is gone
                    missing = [rank for rank, key in zip(ranks, keys, strict=True) if not store.check([key])]
                said = (
                    f"rank {ranks[self.rank]} has waited {patience.total_seconds():g} s for rank {', '.join(map(str, missing)) or '?'}: "
                    "all ranks must call attach, save and load, and equally often; if that rank failed before, its output says why"
                )
                if patience == in_all:
                    raise GroupError(said) from error
                _log.warning(said)
        return [store.get(key).decode() for key in keys]

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, dtype=torch.float32, device=self.device))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        own = self._process_group
        if self._make is not None and own in dist.distributed_c10d._world.pg_map:  # its owner may have ended the job
            dist.destroy_process_group(own)
            self._process_group = None  # its threads end with it, and not when the garbage of a DDP model is collected

    def _gather(self, own: Tensor) -> Tensor:
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        with self._received("all_gather", own, self.size * len(own)) as (here, out):
            if self.size == 2 and self._is_on_gloo(own):  # two ranks' ring, of the same bytes
                self._send_in_turn([here, here], torch.split(out, [len(own)] * 2))
            else:
                gather(out, here, group=self.process_group)
        return self._back(out, own)

    def _exchange(self, operation: str, send: Tensor, send_sizes: list[int], sizes: list[int]) -> Tensor:
        with self._received(operation, send, sum(sizes)) as (here, out):
            if self._is_on_gloo(send):
                self._send_in_turn(torch.split(here, send_sizes), torch.split(out, sizes))
            else:
                dist.all_to_all_single(out, here, sizes, send_sizes, group=self.process_group)
        return self._back(out, send)

    def _send_in_turn(self, parts: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Send parts[j] to rank j, and fill out[j] from it, so that both directions of all links are busy. Empty ones are not sent.

        A rank tells a sender over their connection that it is ready, and Gloo's sender waits for that. Behind data of its own for
        that rank it would be late, so each receive is started before the send to the same rank. A rank lets the next one send if the
        one before is done, or their messages are small: several senders to one rank are not equally fast, and others' links idle.
        """
        out[self.rank].copy_(parts[self.rank])
        receives, sends, ahead = deque[tuple[Any, int]](), list[Any](), 0
        for step in range(1, self.size):
            source, to = (self.rank - step) % self.size, (self.rank + step) % self.size
            while receives and ahead + len(out[source]) > AT_ONCE_BYTES:
                work, nbytes = receives.popleft()
                work.wait()
                ahead -= nbytes
            if nbytes := len(out[source]):
                receives.append((dist.irecv(out[source], group=self.process_group, group_src=source, tag=TAG), nbytes))
                ahead += nbytes
            if len(parts[to]):
                sends.append(dist.isend(parts[to], group=self.process_group, group_dst=to, tag=TAG))
        for work in [*(work for work, _ in receives), *sends]:
            work.wait()

    def _is_on_gloo(self, x: Tensor) -> bool:
        """Whether a tensor travels from the host's memory, by a collective of Gloo that leaves half of a link idle."""
        return "cpu" in (x.device.type, self.device.type)

    def _is_staged(self, x: Tensor) -> bool:
        """Whether a tensor goes through the host, for Gloo, which supports few collectives on GPU tensors."""
        return self.device.type == "cpu" and x.device.type != "cpu"

    @contextmanager
    def _received(self, operation: str, own: Tensor, numel: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What to send, and (numel,) what to receive into."""
        is_staged = self._is_staged(own)
        here = self._staging.to_host(own, "sent") if is_staged else own
        with self._named(operation):
            yield here, self._staging.empty("received", own, numel) if is_staged else own.new_empty(numel)

    def _back(self, out: Tensor, own: Tensor) -> Tensor:
        if out.device == own.device:
            return out
        return self._staging.to_device_(own.new_empty(len(out)), "received", out)

    @contextmanager
    def _in_place(self, operation: str, x: Tensor) -> Iterator[Tensor]:
        here = self._staging.to_host(x, "sent") if self._is_staged(x) else x
        with self._named(operation):
            yield here
        if here is not x:
            self._staging.to_device_(x, "sent", here)

    @contextmanager
    def _named(self, operation: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise GroupError(
                f"{operation} failed on rank {self.rank} of {self.size}; if another rank ended or is stuck, its output says why: {error}"
            ) from error


def device_of(process_group: dist.ProcessGroup) -> torch.device:
    """The GPU, if NCCL carries the tensors there; else the CPU, and what is elsewhere is staged. See torch's BackendConfig."""
    by_device = dist.get_backend_config(process_group).split(",")  # such as cpu:gloo,cuda:nccl
    return torch.device("cuda" if "cuda:nccl" in by_device else "cpu")


def initialise(backend: str) -> None:
    """Initialise torch.distributed from the launcher's environment variables, unless that is done."""
    if not dist.is_initialized():
        dist.init_process_group(backend)


def group_of(members: Sequence[int], **kind: Any) -> dist.ProcessGroup:
    """A process group of some ranks of the job, made by these alone. kind: further arguments of torch's `new_group`.

    From torch 2.14 on, the name of such a group contains a counter, which is increased on its members only. The next group that
    all ranks make would be named by it too, and members and others would wait for each other. So the counter is put back.
    """
    world: Any = dist.distributed_c10d._world
    count, world.group_count = world.group_count, -len(world.pg_names)  # which torch 2.13 names it by
    try:
        return cast(dist.ProcessGroup, dist.new_group(members, use_local_synchronization=True, **kind))
    finally:
        world.group_count = count


def _check_group_counts(parent: dist.ProcessGroup | None) -> None:
    """Raise GroupError if ranks are in different numbers of groups, from which the new group's name is made: they would hang."""
    counts: list[int | None] = [None] * dist.get_world_size(parent)
    dist.all_gather_object(counts, len(dist.distributed_c10d._world.pg_names), group=parent)
    if len(set(counts)) > 1:
        raise GroupError(
            "the ranks of this process group are in different numbers of process groups, and torch cannot make another one "
            "of them alone; let all ranks of the job call torch.distributed.new_group, and pass group=TorchGroup(that group)"
        )


def _timeout(process_group: Any) -> timedelta | None:
    """The timeout of a process group's calls; None, for torch's default, if it does not tell."""
    options = getattr(process_group._get_backend(device_of(process_group)), "options", None)
    return getattr(options, "_timeout", None)
