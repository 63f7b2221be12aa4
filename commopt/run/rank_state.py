"""What a framework's checkpoint lacks of a method: each rank's own state, in a file beside the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from commopt.errors import CheckpointError
from commopt.run.agree import meeting_group
from commopt.run.outer import OuterAttachment

_FORMAT = 1
T = TypeVar("T")


def save_rank_state(folder: str | Path, attachment: Any, label: str = "commopt") -> None:
    """Write what a checkpoint of Accelerate or the Trainer lacks: this rank's residuals, under outer methods its replica too.

    All ranks call it, between steps. Raises CheckpointError, on all of them, where one could not write.
    """
    method, is_outer = attachment.method, isinstance(attachment, OuterAttachment)
    rank, ranks = _place(attachment)
    path = _path(Path(folder), label, rank)

    def write() -> None:
        content = {
            "format": _FORMAT,
            "method": method.name,
            "form": method.state_form,
            "ranks": ranks,
            "steps": attachment.steps,
            "parameters": _shapes(attachment),
            "buckets": attachment.bucket_layout(),
            "comm": attachment.comm_state(),
            "model": attachment.model.state_dict() if is_outer else None,
            "optimizer": attachment.optimizer.state_dict() if is_outer else None,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        os.replace(partial, path)
        if rank == 0:  # of a job with more ranks, that saved here before
            for other in path.parent.glob(f"{label}_rank*.pt"):
                if other.stem.removeprefix(f"{label}_rank") not in map(str, range(ranks)):
                    other.unlink()

    together(write)


def read_rank_states(folder: str | Path, attachment: Any, label: str = "commopt") -> list[dict[str, Any]]:
    """This rank's saved state, or those of all ranks where their number was another. Raises CheckpointError on all ranks alike."""
    folder, (rank, ranks) = Path(folder), _place(attachment)

    def read() -> list[dict[str, Any]]:
        own = _path(folder, label, rank)
        first = _read(own if own.exists() else _path(folder, label, 0))
        if first.get("ranks") == ranks:
            states = [first if own.exists() else _read(own)]
        else:
            states = [_read(_path(folder, label, k)) for k in range(int(first.get("ranks", 1)))]
            if isinstance(attachment, OuterAttachment):
                raise CheckpointError(
                    f"{folder}: was saved by {first.get('ranks')} ranks, not {ranks}, and under {attachment.method.name} each goes on "
                    "from its own replica"
                )
        for state in states:
            _check_state(folder, state, attachment)
        return states

    return together(read)


def load_rank_state(attachment: Any, states: list[dict[str, Any]]) -> None:
    """Take over what `read_rank_states` gave, after model and optimizer have been loaded."""
    with torch.no_grad():
        if len(states) == 1 and states[0]["ranks"] == _place(attachment)[1]:
            (state,) = states
            if state["model"] is not None:
                attachment.model.load_state_dict(state["model"])
                attachment.optimizer.load_state_dict(state["optimizer"])
            attachment.load_comm_state(state["comm"])
            attachment.resume_bucket_layout(state["buckets"])
        else:
            attachment.method.load_resharded(state["comm"] for state in states)
    attachment.steps = int(states[0]["steps"])


def _read(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: this checkpoint was saved without the method, or by fewer ranks; take another, or start "
            "anew from its model alone"
        ) from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: is not of the format {_FORMAT} that this version reads")
    return state


def _check_state(folder: Path, state: dict[str, Any], attachment: Any) -> None:
    method = attachment.method
    for what, saved, own in (
        ("under", state["method"], method.name),
        ("with", state["form"], method.state_form),
    ):
        if saved != own:
            raise CheckpointError(f"{folder}: was saved {what} {saved or 'no options'}, not {own or 'none'}")
    for saved, own in zip(state["parameters"], _shapes(attachment), strict=False):
        if saved != own:
            raise CheckpointError(f"{folder}: is of another model: it has {saved} where this one has {own}")
    if len(state["parameters"]) != len(attachment.parameters):
        raise CheckpointError(
            f"{folder}: is of another model, with {len(state['parameters'])} parameters, not {len(attachment.parameters)}"
        )


def _shapes(attachment: Any) -> list[list[Any]]:
    return [[name, list(p.shape)] for name, p in attachment.parameters.items()]


def _path(folder: Path, label: str, rank: int) -> Path:
    return folder / f"{label}_rank{rank}.pt"


def _place(attachment: Any) -> tuple[int, int]:
    where = attachment.peers if isinstance(attachment, OuterAttachment) else attachment.group
    return where.rank, where.size


def together(part: Callable[[], T]) -> T:
    """Do one part on every rank. Raises CheckpointError on all of them if any failed, so that none goes on alone."""
    group, failure, result = meeting_group(None), None, None
    try:
        result = part()
    except Exception as error:
        failure = error
    told = group.tell("" if failure is None else (str(failure) or type(failure).__name__).splitlines()[0])
    if failure is not None:
        raise failure if isinstance(failure, CheckpointError) else CheckpointError(str(failure)) from failure
    for rank, text in enumerate(told):
        if text:
            raise CheckpointError(f"rank {rank}: {text}")
    return result  # type: ignore[return-value]
