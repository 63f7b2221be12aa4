"""Save and resume a training, residuals included, at the same number of ranks or at another.

One folder per checkpoint, written by torch.distributed.checkpoint: model, optimizer and what is equal on all ranks
once, each rank's own residuals and random state under its rank. What is no tensor is read with weights_only=True. All
ranks must see the same folder.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from commopt.errors import CheckpointError
from commopt.exchange.mean import State
from commopt.groups import Group, LocalGroup, PacedGroup, TorchGroup
from commopt.run.base import Attachment
from commopt.run.outer import OuterAttachment

_FORMAT = 1
T = TypeVar("T")

_log = logging.getLogger(__name__)


def save(
    folder: str | Path, attachment: Attachment | OuterAttachment, *, extra: Mapping[str, Any] | None = None
) -> None:
    """Write everything that training needs to go on bit for bit; all ranks call it, between steps.

    extra: anything that `torch.load(weights_only=True)` takes: numbers, texts, dicts, lists, tensors; a learning-rate
    scheduler's state_dict. That of rank 0 is kept. The folder is replaced as a whole, after everything has been written:
    a crash or a full disk leaves the one that was there. Raises CheckpointError, on all ranks alike.

    Under an outer method each rank writes a folder of its own, `folder/rank3`, whatever the others do; a round that is under way is
    waited for, and kept. Ranks that save after the same step go on together bit for bit.
    """
    folder = attachment.checkpoint_folder(Path(folder))
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    group = attachment.group
    process_group = _process_group(group)

    def prepare() -> dict[str, Tensor]:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file")
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
        return _everything(attachment, extra or {})

    def replace() -> None:
        if group.rank == 0:
            if folder.exists():  # if not, the old one may be all there is
                shutil.rmtree(old, ignore_errors=True)
                os.replace(folder, old)
            os.replace(partial, folder)
            shutil.rmtree(old, ignore_errors=True)

    try:
        tensors = _together(group, prepare)
        _together(group, lambda: _write(tensors, partial, process_group))
        _together(group, replace)
    except CheckpointError as error:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        kept = f"; {folder} is as it was" if folder.is_dir() else ""
        raise CheckpointError(f"{folder}: the checkpoint could not be written: {error}{kept}") from error


def _together(group: Group, part: Callable[[], T]) -> T:
    """Do one part on every rank. Raises CheckpointError on all of them if any failed, so that none waits for another."""
    result, failure = None, None
    try:
        result = part()
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        failure = error
    count = torch.tensor([failure is not None], dtype=torch.int32)
    group.all_reduce(count)
    if failure is not None:
        raise CheckpointError(_first_line(failure)) from failure
    if int(count):
        raise CheckpointError(f"{int(count)} other ranks failed; they say why")
    return cast(T, result)


def load(folder: str | Path, attachment: Attachment | OuterAttachment) -> dict[str, Any]:
    """Continue from a checkpoint, after `attach`; returns the `extra` that was saved with it.

    At the same number of ranks training goes on bit for bit. At another, every rank takes the mean of what the old ranks still
    had to send, so that none of it is lost. Raises CheckpointError, before anything is changed, if it does not belong here.
    Under an outer method call it before `join`; a rank that has no checkpoint joins without, and catches up.
    """
    folder = attachment.checkpoint_folder(Path(folder))
    group = attachment.group
    _process_group(group)
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.is_dir():
        _log.warning("%s: is missing, as after a job that was killed between two renames; %s is loaded", folder, old)
        folder = old
    reader = FileSystemReader(folder)
    try:
        stored = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"{folder}: there is no complete checkpoint here: {_first_line(error)}") from error
    meta = _unpickled(_read(folder, stored, ["meta"])["meta"])
    model = _read(folder, stored, [key for key in stored if key.startswith("model/")])
    _check(folder, meta, model, attachment)
    optimizer = _read(folder, stored, [key for key in stored if key.startswith("optimizer/")])
    with torch.no_grad():
        attachment.model.load_state_dict({key.removeprefix("model/"): x for key, x in model.items()})
    attachment.optimizer.load_state_dict(_optimizer_state(meta["optimizer"], optimizer))
    if meta["ranks"] == group.size:
        attachment.load_comm_state(_comm_state(folder, stored, group.rank))
        torch.set_rng_state(_read(folder, stored, [f"rng/{group.rank}"])[f"rng/{group.rank}"])
        attachment.resume_bucket_layout(meta["buckets"])
    elif isinstance(attachment, Attachment):
        attachment.method.load_resharded(_comm_state(folder, stored, rank) for rank in range(meta["ranks"]))
    attachment.steps = int(meta["steps"])
    return cast(dict[str, Any], meta["extra"])


def _everything(attachment: Attachment | OuterAttachment, extra: Mapping[str, Any]) -> dict[str, Tensor]:
    rank, state = attachment.group.rank, attachment.comm_state()
    tensors = {f"model/{name}": x for name, x in attachment.model.state_dict().items()}
    optimizer, flat = _flattened(attachment.optimizer.state_dict())
    tensors.update({f"optimizer/{key}": x for key, x in flat.items()})
    tensors.update({f"shared/{key}": x for key, x in state["shared"].items()})
    tensors.update({f"local/{rank}/{key}": x for key, x in state["local"].items()})
    tensors[f"rng/{rank}"] = torch.get_rng_state()
    meta = {
        "format": _FORMAT,
        "ranks": attachment.group.size,
        "method": attachment.method.name,
        "form": attachment.method.state_form,
        "optimizer_type": type(attachment.optimizer).__name__,
        "steps": attachment.steps,
        "parameters": [[name, list(p.shape)] for name, p in attachment.parameters.items()],
        "buckets": attachment.bucket_layout(),
        "optimizer": optimizer,
        "extra": dict(extra),
    }
    tensors["meta"] = _pickled(meta)
    return tensors


def _pickled(meta: Mapping[str, Any]) -> Tensor:
    """Bytes that torch.load takes with weights_only=True. Raises CheckpointError for what it would refuse."""
    buffer = io.BytesIO()
    torch.save(meta, buffer)
    packed = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    try:
        _unpickled(packed)
    except Exception as error:
        raise CheckpointError(
            f"extra must be what torch.load(weights_only=True) takes: {_first_line(error)}"
        ) from error
    return packed


def _unpickled(packed: Tensor) -> dict[str, Any]:
    return cast(dict[str, Any], torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True))


def _flattened(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state_dict with {"tensor": key} in the places of its tensors, and those tensors."""
    tensors: dict[str, Tensor] = {}
    entries: dict[int, Any] = {}
    for index, entry in state["state"].items():
        entries[index] = {}
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
                value = {"tensor": f"{index}/{key}"}
            entries[index][key] = value
    return {"state": entries, "param_groups": state["param_groups"]}, tensors


def _optimizer_state(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    def value(x: Any) -> Any:
        return tensors[f"optimizer/{x['tensor']}"] if isinstance(x, dict) and "tensor" in x else x

    state = {index: {key: value(x) for key, x in entry.items()} for index, entry in described["state"].items()}
    return {"state": state, "param_groups": described["param_groups"]}


def _check(
    folder: Path, meta: Mapping[str, Any], model: Mapping[str, Tensor], attachment: Attachment | OuterAttachment
) -> None:
    """Raise CheckpointError unless all that was saved has its place here."""
    if meta["format"] != _FORMAT:
        raise CheckpointError(f"{folder}: format {meta['format']} is not the {_FORMAT} that this version reads")
    own_optimizer = type(attachment.optimizer).__name__
    for what, saved, own in (
        ("under", meta["method"], attachment.method.name),
        ("with the optimizer", meta["optimizer_type"], own_optimizer),
        ("with", meta["form"], attachment.method.state_form),
    ):
        if saved != own:
            raise CheckpointError(f"{folder}: was saved {what} {saved}, not {own}")
    here = [[name, list(p.shape)] for name, p in attachment.parameters.items()]
    tensors = [[key.removeprefix("model/"), list(x.shape)] for key, x in sorted(model.items())]
    own_tensors = [[key, list(x.shape)] for key, x in sorted(attachment.model.state_dict().items())]
    for saved, own in (*_pairs(meta["parameters"], here), *_pairs(tensors, own_tensors)):
        if saved != own:
            raise CheckpointError(
                f"{folder}: is of another model: it has {_described(saved)} where this one has {_described(own)}"
            )
    sizes = [
        [len(group["params"]) for group in one]
        for one in (meta["optimizer"]["param_groups"], attachment.optimizer.param_groups)
    ]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"{folder}: its optimizer has parameter groups of {sizes[0]} parameters, this one of {sizes[1]}"
        )


def _pairs(a: list[Any], b: list[Any]) -> Iterator[tuple[Any, Any]]:
    for k in range(max(len(a), len(b))):
        yield a[k] if k < len(a) else None, b[k] if k < len(b) else None


def _described(parameter: Any) -> str:
    return "nothing" if parameter is None else f"{parameter[0]} of shape {tuple(parameter[1])}"


def _comm_state(folder: Path, stored: Mapping[str, Any], rank: int) -> State:
    shared, local = "shared/", f"local/{rank}/"
    tensors = _read(folder, stored, [key for key in stored if key.startswith((shared, local))])
    return {
        "shared": {key.removeprefix(shared): x for key, x in tensors.items() if key.startswith(shared)},
        "local": {key.removeprefix(local): x for key, x in tensors.items() if key.startswith(local)},
    }


def _read(folder: Path, stored: Mapping[str, Any], keys: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Any] = {}
    for key in keys:
        kind = stored.get(key)
        if not isinstance(kind, TensorStorageMetadata):
            raise CheckpointError(f"{folder}: {key} is missing")
        tensors[key] = torch.empty(kind.size, dtype=kind.properties.dtype)
    if tensors:
        with _alone():
            state_dict_loader.load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors


def _write(tensors: dict[str, Tensor], folder: Path, process_group: dist.ProcessGroup | None) -> None:
    writer = FileSystemWriter(folder)
    state = cast(dict[str, Any], tensors)
    if process_group is None:
        with _alone():
            state_dict_saver.save(state, storage_writer=writer, no_dist=True)
    else:
        state_dict_saver.save(state, storage_writer=writer, process_group=process_group)


@contextmanager
def _alone() -> Iterator[None]:
    """One process reads or writes, as intended, without torch's warning that it does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process")
        yield


def _process_group(group: Group) -> dist.ProcessGroup | None:
    inner = group.inner if isinstance(group, PacedGroup) else group
    if isinstance(inner, LocalGroup):
        return None
    if not isinstance(inner, TorchGroup):
        raise CheckpointError(
            f"checkpoints are written by the ranks of a torch.distributed job, not of a {type(inner).__name__}"
        )
    return inner.process_group


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
