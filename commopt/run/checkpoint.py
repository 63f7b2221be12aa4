"""Save and resume a training, residuals included, at the same number of ranks or at another.

One format for all: `run.save` writes model, optimizer and the method's state; the checkpoints of a framework, which keeps model and
optimizer itself, carry a block of the same form with the method's state beside its own files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from commopt.errors import CheckpointError
from commopt.run import storage
from commopt.run.pack import join, split
from commopt.run.storage import Content, Stored, together
from commopt.wire.state import Saved

if TYPE_CHECKING:
    from commopt.run.run import Run

_BLOCK = "commopt"  # the folder of a block, in the folder of a framework's checkpoint


def save(folder: str | Path, run: Run, *, extra: Mapping[str, object] | None = None) -> None:
    """What `Run.save` does."""
    content = together(run.group, lambda: _content(run, extra or {}, with_training=True))
    storage.save(run.checkpoint_folder(Path(folder)), content, run.group)


def load(folder: str | Path, run: Run) -> dict[str, Any]:
    """What `Run.load` does."""
    return take_over(run, open_for(run, run.checkpoint_folder(Path(folder)), with_training=True))


def save_block(folder: str | Path, run: Run) -> None:
    """Add the method's state to the checkpoint that a framework writes into `folder`; all ranks call it.

    Under an outer method each rank's block holds its replica too.
    """
    content = together(run.group, lambda: _content(run, {}, with_training=run.is_replica))
    storage.save(run.block_folder(Path(folder) / _BLOCK), content, run.group)


def read_block(folder: str | Path, run: Run) -> Callable[[], None]:
    """Verify the block of a framework's checkpoint; returns what takes it over, once the framework has loaded its part."""
    stored = open_for(run, run.block_folder(Path(folder) / _BLOCK), with_training=run.is_replica)

    def go_on() -> None:
        take_over(run, stored)

    return go_on


def has_block(folder: str | Path) -> bool:
    """Whether a framework's checkpoint carries a block."""
    return (Path(folder) / _BLOCK).is_dir()


def open_for(run: Run, place: Path, *, with_training: bool) -> Stored:
    """A verified checkpoint that belongs to this run. Raises CheckpointError, on all ranks, if it does not."""
    stored = storage.open_checkpoint(place, run.group)
    together(run.group, lambda: _check(place, stored, run, with_training=with_training))
    return stored


def take_over(run: Run, stored: Stored) -> dict[str, Any]:
    """Continue from a checkpoint that has been checked; returns its `extra`."""
    meta, tensors, rank, group = stored.meta, stored.shared(), run.group.rank, run.group
    with torch.no_grad():
        if "model" in meta:
            run.model.load_state_dict(join(meta["model"], tensors))
            run.optimizer.load_state_dict(join(meta["optimizer"], tensors))
        if stored.ranks == group.size:
            run.load_saved(_saved(stored, rank))
            if "rng" in stored.own(rank):
                torch.set_rng_state(stored.own(rank)["rng"])
            run.resume_bucket_layout(meta["buckets"])
        else:
            run.method.resize([_saved(stored, k) for k in range(stored.ranks)])
    run.steps = int(meta["steps"])
    extra: dict[str, Any] = join(meta["extra"], tensors)
    return extra


def _content(run: Run, extra: Mapping[str, object], *, with_training: bool) -> Content:
    saved, shared = run.saved(), dict[str, Tensor]()
    meta: dict[str, Any] = {
        "method": run.method.name,
        "form": run.method.state_form,
        "steps": run.steps,
        "parameters": _parameters(run),
        "buckets": run.bucket_layout(),
    }
    described: dict[str, Any] = {"extra": dict(extra)}
    own = {f"method/{key}": x for key, x in saved["rank"].items()}
    if with_training:
        meta["optimizer_type"] = type(run.replaced).__name__
        described |= {"model": dict(run.model.state_dict()), "optimizer": run.optimizer_state()}
        own["rng"] = torch.get_rng_state()
    for key, value in described.items():
        meta[key], tensors = split(value, key)
        shared |= tensors
    shared |= {f"method/{key}": x for key, x in saved["shared"].items()}
    return Content(shared, own, meta)


def _saved(stored: Stored, rank: int) -> Saved:
    def of_method(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix("method/"): x for key, x in tensors.items() if key.startswith("method/")}

    return {"shared": of_method(stored.shared()), "rank": of_method(stored.own(rank))}


def _check(folder: Path, stored: Stored, run: Run, *, with_training: bool) -> None:
    """Raise CheckpointError unless all that was saved has its place here."""
    meta = stored.meta
    known = ("method", "form", "steps", "parameters", "buckets", "extra")
    for key in (*known, *(("model", "optimizer", "optimizer_type") if with_training else ())):
        if key not in meta:
            what = "a checkpoint of run.save" if with_training else "a block of a framework's checkpoint"
            raise CheckpointError(f"{folder}: holds no {key}, so it is not {what}")
    if run.is_replica and stored.ranks != 1:
        raise CheckpointError(
            f"{folder}: was saved by {stored.ranks} ranks together; {run.method.name} saves each alone"
        )
    for what, saved, own in (
        ("under", meta["method"], run.method.name),
        ("with the optimizer", meta.get("optimizer_type"), type(run.replaced).__name__ if with_training else None),
        ("with", meta["form"], run.method.state_form),
    ):
        if saved != own:
            raise CheckpointError(f"{folder}: was saved {what} {saved or 'no options'}, not {own or 'none'}")
    pairs: list[tuple[Any, Any]] = [*zip_longest(meta["parameters"], _parameters(run))]
    if with_training:
        pairs += zip_longest(_shapes(join(meta["model"], stored.shared())), _shapes(run.model.state_dict()))
    for theirs, ours in pairs:
        if theirs != ours:
            raise CheckpointError(
                f"{folder}: is of another model: it has {_described(theirs)} where this one has {_described(ours)}"
            )
    if with_training:
        groups = join(meta["optimizer"], stored.shared())["param_groups"]
        sizes = [[len(group["params"]) for group in one] for one in (groups, run.optimizer.param_groups)]
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                f"{folder}: its optimizer has parameter groups of {sizes[0]} parameters, this one of {sizes[1]}"
            )
    if stored.ranks == run.group.size:
        run.check_saved(_saved(stored, run.group.rank))


def _shapes(state: Mapping[str, Any]) -> list[list[Any]]:
    return [[key, list(x.shape) if isinstance(x, Tensor) else []] for key, x in sorted(state.items())]


def _parameters(run: Run) -> list[list[Any]]:
    return [[name, list(p.shape)] for name, p in run.parameters.items()]


def _described(parameter: Any) -> str:
    return "nothing" if parameter is None else f"{parameter[0]} of shape {tuple(parameter[1])}"
