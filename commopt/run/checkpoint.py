"""Save and resume a training, residuals included, at the same number of ranks or at another.

One format for all: `run.save` writes model, optimizer and the method's state. A framework saves model and optimizer itself; its
checkpoint carries a block of the same format with the method's state. A checkpoint is one folder with tensors and JSON of all ranks.
It is replaced as a whole, and verified before anything is returned:

    manifest.json        JSON, a token of this save, the size and SHA-256 of each file, and of the manifest itself
    shared.safetensors   what all ranks share
    rank0.safetensors    what only rank 0 has; one file per rank

All ranks must see the same folder. A symlink to it is followed, when saving and when loading.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from commopt.errors import CheckpointError
from commopt.groups import Group
from commopt.run import files
from commopt.run.agree import meeting_group, met, together
from commopt.run.files import MANIFEST, OWN, SHARED, Manifest, join, split
from commopt.run.machine import load_localized, localized
from commopt.run.reshare import recut_training
from commopt.run.stand_in import StandIn
from commopt.wire.state import Saved

if TYPE_CHECKING:
    from commopt.run.run import Run

_BLOCK = "commopt"  # the folder of a block, in the folder of a framework's checkpoint
_HEAD = b'{"sha256": "'  # how a manifest begins; one that is being written may be shorter
_TRIES = 8  # if other jobs save to the same place at the same moment
T = TypeVar("T")

_log = logging.getLogger(__name__)


def save_run(folder: Path, run: Run, extra: Mapping[str, object], *, with_training: bool = True) -> None:
    """What `Run.save` does; without `with_training` only the method's state is saved."""
    place = _place(folder, run, with_training)
    content = together(run.savers, lambda: _content(run, extra, with_training=with_training))
    save(place, content, run.savers)


def save_block(folder: Path, run: Run) -> None:
    """Add the method's state, and replicas that differ, to the checkpoint that a framework writes into `folder`; all ranks call it."""
    together(meeting_group(None), lambda: save_run(folder / _BLOCK, run, {}, with_training=run.is_replica))


def read_block(folder: Path, run: Run) -> Callable[[], object]:
    """Verify the block of a framework's checkpoint; returns what loads it, once the framework has loaded its part.

    Raises CheckpointError on all ranks of the job, even if each has a block of its own.
    """

    def look() -> None:
        if not has_block(folder):
            raise CheckpointError(
                f"{folder}: holds no state of {run.method.name}: it was saved without a method, or moved without its state; "
                "take another checkpoint, or start again from its model alone"
            )

    meeting = meeting_group(None)
    together(meeting, look)
    return together(meeting, lambda: open_run(folder / _BLOCK, run, with_training=run.is_replica))


def has_block(folder: Path) -> bool:
    """Whether a framework's checkpoint carries a block."""
    return (folder / _BLOCK).is_dir()


def _place(folder: Path, run: Run, with_training: bool) -> Path:
    """This rank's folder: all ranks write one checkpoint together, unless each has a replica of its own."""
    if with_training and run.saved_by:
        raise CheckpointError(f"{folder}: {run.saved_by}")
    return folder / f"rank{run.replica}" if run.is_replica else folder


def open_run(folder: Path, run: Run, *, with_training: bool = True) -> Callable[[], dict[str, Any]]:
    """Verify a checkpoint, and that it belongs to this run; returns what continues from it, and returns its `extra`.

    Raises CheckpointError, on all ranks, if it does not.
    """
    place = _place(folder, run, with_training)
    stored = open_checkpoint(place, run.savers)

    def check() -> Callable[[], object]:
        for problem in _problems(stored, run, with_training):
            raise CheckpointError(f"{place}: {problem}")
        manifest = stored.manifest
        if not manifest.fits(run.savers):
            return run.resized([_saved(stored, k) for k in range(manifest.ranks)], manifest.per_machine)
        own = _saved(stored, run.savers.rank)
        run.check_saved(own)
        return partial(run.load_saved, own)

    return partial(_take_over, run, stored, together(run.savers, check))


@torch.no_grad()
def _take_over(run: Run, stored: Stored, load_state: Callable[[], object]) -> dict[str, Any]:
    meta, fits, rank = stored.manifest.meta, stored.manifest.fits(run.savers), run.savers.rank
    if "model" in meta:
        every = [_training(stored, k) for k in stored.own]
        load_localized(run.model, run.optimizer, every[0] if fits else recut_training(run, every))
    load_state()
    if fits:
        if "rng" in stored.own[rank]:
            torch.set_rng_state(stored.own[rank]["rng"])
        run.resume_bucket_layout(meta["buckets"])
    run.steps, run.lacks_state = int(meta["steps"]), False
    return dict(join(meta["extra"], stored.shared))


def _content(run: Run, extra: Mapping[str, object], *, with_training: bool) -> Content:
    saved, shared = run.saved(), dict[str, Tensor]()
    meta: dict[str, Any] = {
        "method": run.method.name,
        "form": run.method.state_form,
        "steps": run.steps,
        "parameters": _shapes(run.parameters),
        "buckets": run.bucket_layout(),
        "is_sharded": run.is_sharded,
    }
    described: dict[str, Any] = {"extra": dict(extra)}
    if run.is_sharded:
        saved = {"shared": {}, "rank": {**saved["shared"], **saved["rank"]}}
    own = {f"method/{key}": x for key, x in saved["rank"].items()}
    if with_training:
        meta["optimizer_type"] = type(run.replaced).__name__
        optimizer = run.optimizer.state_dict()
        if isinstance(run.optimizer, StandIn):
            optimizer["state"] = {}  # the method's own state has it already
        described |= {"model": dict(run.model.state_dict()), "optimizer": optimizer}
        own["rng"] = torch.get_rng_state()
    for key, value in described.items():
        is_own = run.is_sharded and key != "extra"
        meta[key], tensors = split(localized(value) if is_own else value, key)
        (own if is_own else shared).update(tensors)
    shared |= {f"method/{key}": x for key, x in saved["shared"].items()}
    return Content(shared, own, meta)


def _training(stored: Stored, rank: int) -> dict[str, Any]:
    """The states of model and optimizer, as a rank has saved them."""
    tensors = {**stored.shared, **stored.own[rank]}
    return {key: join(stored.manifest.meta[key], tensors) for key in ("model", "optimizer")}


def _saved(stored: Stored, rank: int) -> Saved:
    """The method's state as a rank had it, all of it in both parts: what ranks share may be in either."""
    tensors = {**stored.shared, **stored.own[rank]}
    state = {key.removeprefix("method/"): x for key, x in tensors.items() if key.startswith("method/")}
    return {"shared": state, "rank": state}


def _problems(stored: Stored, run: Run, with_training: bool) -> Iterator[str]:
    """Why a checkpoint does not belong to this run."""
    meta = stored.manifest.meta
    if with_training and "model" not in meta:
        yield "holds no model, so it is not a checkpoint of run.save"
    for what, saved, own in (
        ("under", meta["method"], run.method.name),
        ("with the optimizer", meta.get("optimizer_type"), type(run.replaced).__name__ if with_training else None),
        ("with", meta["form"], run.method.state_form),
    ):
        if saved != own:
            yield f"was saved {what} {saved or 'no options'}, not {own or 'none'}"
    pairs: list[tuple[Any, Any]] = [*zip_longest(meta["parameters"], _shapes(run.parameters))]
    if with_training:
        training = _training(stored, min(stored.own))
        states = training["model"], localized(run.model.state_dict())
        if stored.manifest.fits(run.savers) or not (meta["is_sharded"] or run.is_sharded):
            pairs += zip_longest(*(sorted(_shapes(state)) for state in states))
    for theirs, ours in pairs:
        if theirs != ours:
            yield f"is of another model: it has {_described(theirs)} where this one has {_described(ours)}"
    if with_training:
        groups = training["optimizer"]["param_groups"], run.optimizer.param_groups
        sizes, own_sizes = ([len(group["params"]) for group in one] for one in groups)
        if sizes != own_sizes:
            yield f"its optimizer has parameter groups of {sizes} parameters, this one of {own_sizes}"


def _shapes(state: Mapping[str, Any]) -> list[list[Any]]:
    return [[key, list(x.shape) if isinstance(x, Tensor) else []] for key, x in state.items()]


def _described(parameter: Any) -> str:
    return "nothing" if parameter is None else f"{parameter[0]} of shape {tuple(parameter[1])}"


# -- the folder


class Content(NamedTuple):
    """What one rank saves. Of `shared` and `meta`, which is JSON, rank 0's are kept."""

    shared: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    meta: dict[str, Any]


class Stored(NamedTuple):
    """A save that has been verified: its manifest, and the tensors that this rank needs of it."""

    manifest: Manifest
    shared: dict[str, Tensor]
    own: dict[int, dict[str, Tensor]]  # of each rank that saved, if another number loads; else of this rank alone


def save(folder: str | Path, content: Content, group: Group) -> None:
    """Write the content of every rank; all ranks call it. A rank that saves alone passes a LocalGroup.

    The folder is replaced as a whole, after everything has been written: a crash or a full disk leaves the previous checkpoint as it
    was. Raises CheckpointError, on all ranks, if it cannot be written, or if the folder is neither empty nor a checkpoint.
    """
    is_first = group.rank == 0
    mine = {OWN.format(group.rank): content.own} | ({SHARED: content.shared} if is_first else {})

    def prepare() -> tuple[Path, str]:
        place = Path(os.path.realpath(folder))
        for tensors in mine.values():
            files.check_tensors(tensors)
        return place, _begin(place, at_end) if is_first else ""

    def write() -> tuple[None, Any]:
        return None, {name: files.write(partial / name, files.pieces_of(x)).model_dump() for name, x in mine.items()}

    def finish() -> None:
        written = {name: files.File(**file) for one in told for name, file in one.items()}
        for name, file in written.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != file.bytes:
                raise CheckpointError(f"rank 0 does not see {name} as it was written; give all ranks one shared folder")
        manifest = Manifest(
            token=token, files=written, meta=content.meta, ranks=group.size, per_machine=group.per_machine
        )
        files.write_manifest(partial, manifest)
        files.sync_folder(partial)
        _swap(partial, place)
        for old in _siblings(place, "old"):
            with contextlib.suppress(CheckpointError, OSError):
                if not old.with_suffix(".partial").exists():  # else its job is about to replace the checkpoint
                    _check_place(old)
                    files.remove_folder(old)

    with contextlib.ExitStack() as at_end:
        try:
            place, (token, *_) = met(group, prepare)
            partial = _beside(place, token, "partial")
            _, told = met(group, write)
            together(group, lambda: finish() if is_first else None)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: the checkpoint was not saved: {error}") from error


def open_checkpoint(folder: str | Path, group: Group) -> Stored:
    """Read and verify what this rank needs; all ranks call it, and get it once all of them have verified the same save.

    A rank needs the shared tensors and its own; if another number of ranks saved, those of each of them. It gets the bytes that were
    verified, whatever another job writes meanwhile. Raises CheckpointError, on all ranks.
    """

    def read() -> tuple[Stored, str]:
        target, tried = Path(os.path.realpath(folder)), list[str]()
        while True:
            place, digest, manifest = _steady(lambda: _found(target))
            owners = [group.rank] if manifest.fits(group) else range(manifest.ranks)
            names = [SHARED, *map(OWN.format, owners)]
            try:
                shared, *own = (files.read_tensors(place / name, manifest.files[name]) for name in names)
            except CheckpointError:
                # another job may just have replaced it
                if tried.count(digest) > (0 if place == target else _TRIES):
                    raise
                tried.append(digest)
            else:
                if place != target and group.rank == 0:
                    _log.warning("%s is missing: a job was killed while it replaced it; %s is loaded", target, place)
                return Stored(manifest, shared, dict(zip(owners, own, strict=True))), digest

    stored, digests = met(group, read)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise CheckpointError(
                f"{folder}: rank {rank} sees another {MANIFEST} than rank 0; give all ranks one shared folder, and load while no job "
                "saves there"
            )
    return stored


def _begin(place: Path, at_end: contextlib.ExitStack) -> str:
    """Make the folder that is written to, with a manifest that is locked while this job lives; return the token in its name."""
    _steady(lambda: _check_place(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    for left_over in _siblings(place, "partial"):
        with contextlib.suppress(OSError), open(left_over / MANIFEST, "r+b") as manifest:
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its job lives
            if _HEAD.startswith(manifest.read(len(_HEAD))):
                files.remove_folder(left_over)
    token = secrets.token_hex(8)
    partial = _beside(place, token, "partial")
    partial.mkdir()
    at_end.callback(files.remove_folder, partial)  # finds nothing once it has been renamed
    lock = os.open(partial / files.LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    at_end.callback(os.close, lock)
    with contextlib.suppress(OSError):  # this file system has no locks: no other job will remove the folder either
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.replace(partial / files.LOCK, partial / MANIFEST)  # so that it never exists without its lock
    return token


def _swap(partial: Path, place: Path) -> None:
    """Put the new folder in its place; if several jobs save there, the last one wins."""
    old = partial.with_suffix(".old")
    for _ in range(_TRIES):
        _steady(lambda: _check_place(place))
        if os.path.lexists(place):
            files.remove_folder(old)  # of the last try, if another job was faster
            with contextlib.suppress(FileNotFoundError):
                os.replace(place, old)
        try:
            os.replace(partial, place)
            break
        except OSError as error:
            with contextlib.suppress(OSError):
                os.replace(old, place)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    else:
        raise CheckpointError("other jobs save to the same place; give each a folder of its own")
    files.sync_folder(place.parent)


def _check_place(place: Path) -> None:
    if not os.path.lexists(place) or (place.is_dir() and not os.listdir(place)):
        return
    known = files.read_manifest(place)[1].files
    foreign = sorted(set(os.listdir(place)) - {MANIFEST, *known})
    if foreign:
        raise CheckpointError(f"{place}: holds {foreign[0]!r:.60}, which is not part of a checkpoint; move it out")


def _beside(place: Path, token: str, kind: str) -> Path:
    return place.with_name(f"{place.name}.commopt-{token}.{kind}")


def _siblings(place: Path, kind: str) -> list[Path]:
    name = re.compile(rf"{re.escape(place.name)}\.commopt-[0-9a-f]{{16}}\.{kind}")
    entries = list(os.scandir(place.parent)) if place.parent.is_dir() else []
    return [Path(one.path) for one in entries if name.fullmatch(one.name) and one.is_dir(follow_symlinks=False)]


def _steady(look: Callable[[], T]) -> T:
    """Return `look()`; try again if it fails, because another job may replace the folder meanwhile."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(CheckpointError, OSError):
            return look()
    return look()


def _found(place: Path) -> tuple[Path, str, Manifest]:
    """The folder and its manifest; or the old folder, if a job was killed between two renames."""
    if os.path.lexists(place):
        return place, *files.read_manifest(place)
    olds: list[tuple[int, Path]] = []
    for old in _siblings(place, "old"):
        with contextlib.suppress(CheckpointError, OSError):
            files.read_manifest(old)
            olds.append(((old / MANIFEST).stat().st_mtime_ns, old))
    if not olds:
        files.check_0_1(place)
        raise CheckpointError(f"{place}: no such folder; check the path, or start without a checkpoint")
    return max(olds)[1], *files.read_manifest(max(olds)[1])
