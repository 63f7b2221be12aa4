"""Method state of another world: what a machine's ranks had for themselves is put together, averaged over machines, and cut anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commopt.errors import CheckpointError
from commopt.groups import LocalGroup
from commopt.method import EveryStep, Method
from commopt.wire.bucket import ParameterIndex, Share
from commopt.wire.shards import local, shard_start
from commopt.wire.state import Held, Saved

if TYPE_CHECKING:
    from commopt.run.run import Run

Layouts = Mapping[str, ParameterIndex]


def resize(run: Run, every: Sequence[Saved], had: int) -> None:
    """Continue from what all ranks of another world saved, machine after machine; had: ranks of each of its machines."""
    has, method = run.group.per_machine, run.method
    if not isinstance(method, EveryStep) or has == had == 1:
        method.resize(every)
        return
    old, new, machine = len(every) // had, run.group.size // has, run.group.rank // has
    needed = [machine] if old == new else range(old)  # as many machines as before continue from their own states
    whole = [every[k] if had == 1 else _put_together(run, every[k * had : (k + 1) * had], k, old) for k in needed]
    target = method if has == 1 else _twin(run, machine, new)
    if old == new:
        target.load(whole[0])
    else:
        target.resize(whole)
    if target is not method:
        layouts = [_twin(run, machine, new, has, k).layouts() for k in range(has)]
        method.load(_cut(target, layouts, run.group.rank % has, method.saved()))


def _twin(run: Run, rank: int, ranks: int, per_machine: int = 1, number: int = 0) -> EveryStep:
    """The run's method as it would be on another rank of another world."""
    twin = type(run.method)(**run.method.given)
    assert isinstance(twin, EveryStep)
    group, served = LocalGroup(), list(run.parameters.items())
    group.rank, group.size = rank, ranks
    twin.follow(run.replaced, run.parameters)
    share = None
    if per_machine > 1:
        share = Share.cut(ParameterIndex.of(served), per_machine, number, lambda numel: twin.pieces(numel, ranks))
    twin.bind(served, group, share=share)
    return twin


def _put_together(run: Run, parts: Sequence[Saved], machine: int, machines: int) -> Saved:
    """What one rank would have saved for a machine whose ranks saved these."""
    whole = _twin(run, machine, machines)
    every = [_twin(run, machine, machines, len(parts), k).layouts() for k in range(len(parts))]
    both = [{**part["shared"], **part["rank"]} for part in parts]

    def stretches(key: str, name: str, numel: int) -> list[Tensor]:
        some = [layouts[key].view(own[key], name) for layouts, own in zip(every, both, strict=True)]
        return some[:1] if len(some[0]) == numel else some  # one that is not cut is the same on all ranks

    return _laid_out(both[0], whole.layouts(), stretches, whole.saved())


def _cut(whole: EveryStep, every: Sequence[Layouts], number: int, form: Saved) -> Saved:
    """What the rank of this number has of a machine's state, of which the ranks have stretches that lie like `every`."""
    saved, layouts = whole.saved(), whole.layouts()
    states = {**saved["shared"], **saved["rank"]}

    def stretches(key: str, name: str, numel: int) -> list[Tensor]:
        sizes = [one[key].size(name) for one in every]
        start = 0 if sizes[number] == numel else sum(sizes[:number])
        return [layouts[key].view(states[key], name)[start : start + sizes[number]]]

    return _laid_out(states, layouts, stretches, form)


def _laid_out(
    states: Mapping[str, Tensor], layouts: Layouts, stretches: Callable[[str, str, int], list[Tensor]], form: Saved
) -> Saved:
    """States held as in `form`; those with a layout are made of the stretches of each parameter: stretches(key, name, numel)."""
    held_as: dict[str, Held] = {key: held for held, tensors in form.items() for key in tensors}
    saved: Saved = {"shared": {}, "rank": {}}
    for key, x in states.items():
        if key in layouts:
            parameters = zip(layouts[key].names, layouts[key].numels, strict=True)
            x = torch.cat([part for name, numel in parameters for part in stretches(key, name, numel)])
        saved[held_as.get(key, "rank")][key] = x
    return saved


def recut(
    method: Method, every: Sequence[Mapping[str, Tensor]], numels: Mapping[str, int], stretches: Tensor
) -> dict[str, Tensor]:
    """This rank's part of the method's state, from those of ranks that had other parts of one replica: put together, and cut anew.

    numels: the elements of whole parameters. stretches: (P, 2) where this rank's part of each begins, and its elements; `every` has theirs.
    A number that differed between those ranks keeps the value that it has here. Raises CheckpointError for state of elements that is
    not laid out by parameters, as a server's residual.
    """
    layouts, saved = method.layouts(), method.saved()
    found = {**saved["shared"], **saved["rank"]}
    for key, target in found.items():
        sources = [own[key] for own in every if key in own]
        if key in layouts and layouts[key].total == int(stretches[:, 1].sum()):
            x = found[key] = torch.empty_like(target)
            for k, (name, numel) in enumerate(numels.items()):
                whole = torch.zeros(numel, dtype=target.dtype)
                for own, source in zip(every, sources, strict=True):
                    before, (start, n) = int(own["stretches"][:k, 1].sum()), own["stretches"][k].tolist()
                    whole[start : start + n] = source[before : before + n]
                start, n = stretches[k].tolist()
                layouts[key].view(x, name).copy_(whole[start : start + n])
        elif sources and all(torch.equal(one, sources[0]) for one in sources):
            found[key] = sources[0]
        elif key in layouts:
            raise CheckpointError(f"{key}: this state continues only on as many ranks in each replica")
    return found


def stretches_of(tensors: Iterable[Tensor]) -> Tensor:
    """(P, 2) i64: where in each parameter this rank's shard begins, and its elements."""
    return torch.tensor([[shard_start(x), local(x).numel()] for x in tensors])


def recut_training(run: Run, every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """This rank's shards of the states of model and optimizer, of which each of `every` rank had others.

    Raises CheckpointError for parameters that are not sharded by rows.
    """

    def cut(x: Any, parts: Sequence[Any]) -> Any:
        first = parts[0]
        if not isinstance(first, Tensor) or first.dim() != x.dim() or first.shape == local(x).shape:
            return first
        start, own = shard_start(x), local(x)
        if start < 0:
            raise CheckpointError("parameters that are not sharded by rows continue only on as many ranks")
        whole = torch.cat([part.flatten() for part in parts])[: x.numel()]  # several replicas have it several times
        return whole[start : start + own.numel()].view(own.shape)

    model, optimizer = every[0]["model"], every[0]["optimizer"]
    own = run.model.state_dict()
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    state = {
        k: {key: cut(parameters[int(k)], [one["optimizer"]["state"][k][key] for one in every]) for key in one}
        for k, one in optimizer["state"].items()
    }
    cut_model = {key: cut(own[key], [one["model"][key] for one in every]) for key in model}
    return {"model": cut_model, "optimizer": {**optimizer, "state": state}}
