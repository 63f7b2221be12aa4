"""Named tensors and JSON of several ranks in one folder: replaced as a whole, and verified before anything is returned.

    manifest.json        JSON, a token of this save, the size and SHA-256 of each file, and of the manifest itself
    shared.safetensors   what all ranks have in common
    rank0.safetensors    what rank 0 has for itself; one file per rank

All ranks must see the same folder. A symlink to it is followed, when saving and when loading.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from commopt.errors import CheckpointError, GroupError
from commopt.groups import Group
from commopt.groups.simulated_peers import Killed
from commopt.run import files
from commopt.run.files import MANIFEST, OWN, SHARED, Manifest

_HEAD = b'{"sha256": "'  # of a manifest, as far as it has been written
_TRIES = 8  # if other jobs save to the same place at the same moment
T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What one rank saves. Of `shared` and `meta`, which is JSON, rank 0's are kept."""

    shared: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """A save that has been verified: its JSON, and the tensors that this rank needs of it."""

    manifest: Manifest
    tensors: Mapping[str, dict[str, Tensor]]  # by file

    @property
    def ranks(self) -> int:
        """How many ranks saved."""
        return len(self.manifest.own_metas)

    @property
    def meta(self) -> dict[str, Any]:
        return self.manifest.meta

    def shared(self) -> dict[str, Tensor]:
        return self.tensors[SHARED]

    def own(self, rank: int) -> dict[str, Tensor]:
        """What a rank had for itself: any rank if another number of ranks saved than loads, else only this one."""
        return self.tensors[OWN.format(rank)]


def together(group: Group, part: Callable[[], T]) -> T:
    """Do one part on every rank. Raises CheckpointError on all ranks, with the reason, if it failed on any.

    Raises GroupError if a rank is gone.
    """
    return _met(group, lambda: (part(), None))[0]


def save(folder: str | Path, content: Content, group: Group) -> None:
    """Write what every rank hands in; all ranks call it. A rank that saves alone passes a LocalGroup.

    The folder is replaced as a whole, after everything has been written: a crash or a full disk leaves the checkpoint that was
    there. Raises CheckpointError, on all ranks, if it cannot be written, or if its place holds anything but a checkpoint; an empty
    folder is taken.
    """
    is_first = group.rank == 0
    mine = {OWN.format(group.rank): content.own} | ({SHARED: content.shared} if is_first else {})

    def prepare() -> tuple[Path, str]:
        place = Path(os.path.realpath(folder))
        for tensors in mine.values():
            files.check_tensors(tensors)
        return place, _begin(place, at_end) if is_first else ""

    def write() -> tuple[None, Any]:
        return None, {name: asdict(files.write_tensors(partial / name, x)) for name, x in mine.items()}

    def finish() -> None:
        sizes = {name: files.File(**file) for written in told for name, file in written.items()}
        _finish(partial, Manifest(token, sizes, content.meta, [{}] * group.size))
        _swap(partial, place)
        for old in _siblings(place, "old"):
            with contextlib.suppress(CheckpointError, OSError):
                if not old.with_suffix(".partial").exists():  # else its job is about to fill the place
                    _check_place(old)
                    files.remove_folder(old)

    with contextlib.ExitStack() as at_end:
        try:
            place, (token, *_) = _met(group, prepare)
            partial = _beside(place, token, "partial")
            _, told = _met(group, write)
            together(group, lambda: finish() if is_first else None)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: the checkpoint was not saved: {error}") from error


def open_checkpoint(folder: str | Path, group: Group) -> Stored:
    """Read and verify what this rank needs; all ranks call it, and get it once all of them have verified the same save.

    A rank needs what all share and its own; if another number of ranks saved, what each of those had. What is returned is what was
    verified, whatever another job writes meanwhile. Raises CheckpointError, on all ranks.
    """

    def read() -> tuple[Stored, str]:
        target, tried = Path(os.path.realpath(folder)), set[str]()
        while True:
            place, digest, manifest = _steady(lambda: _found(target))
            ranks = len(manifest.own_metas)
            names = [SHARED, *(OWN.format(k) for k in ([group.rank] if ranks == group.size else range(ranks)))]
            try:
                tensors = {name: files.read_tensors(place / name, manifest.files[name]) for name in names}
            except CheckpointError:
                if digest in tried:  # else a job that saves may just have replaced it
                    raise
                tried.add(digest)
            else:
                if place != target and group.rank == 0:
                    _log.warning("%s is missing: a job was killed while it replaced it; %s is loaded", target, place)
                return Stored(manifest, tensors), digest

    stored, digests = _met(group, read)
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise CheckpointError(
                f"{folder}: rank {rank} sees another {MANIFEST} than rank 0; give all ranks one shared folder, and load while no job "
                "saves there"
            )
    return stored


def _met(group: Group, part: Callable[[], tuple[T, Any]]) -> tuple[T, list[Any]]:
    """Do one part on every rank; return its result on this rank, and what it says on each of them, which is JSON."""
    failure: BaseException | None = None
    done: tuple[T, Any] | None = None
    try:
        done = part()
        text = json.dumps(["", done[1]])
    except (KeyboardInterrupt, SystemExit, GeneratorExit, Killed):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        failure, text = error, json.dumps([_reason(error), None])
    try:
        replies = [json.loads(reply) for reply in group.tell(text)]
    except GroupError:
        if failure is None:
            raise
        raise CheckpointError(_reason(failure)) from failure
    failed = {rank: reason for rank, (reason, _) in enumerate(replies) if reason}
    if not failed:
        return cast("tuple[T, Any]", done)[0], [said for _, said in replies]
    rank, reason = next(iter(failed.items()))
    if len(failed) == group.size and len(set(failed.values())) == 1:
        raise CheckpointError(reason) from failure
    more = f" (and {len(failed) - 1} more ranks failed)" if len(failed) > 1 else ""
    raise CheckpointError(f"rank {rank}: {reason}{more}") from failure


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}" if error.filename else error.strerror.lower()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    return lines[0] if isinstance(error, CheckpointError) else f"{type(error).__name__}: {lines[0]}"


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
    with contextlib.suppress(OSError):  # this file system has no locks: nobody else will remove the folder either
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.replace(partial / files.LOCK, partial / MANIFEST)  # so that nobody sees it without its lock
    return token


def _finish(partial: Path, manifest: Manifest) -> None:
    """Add the manifest, once all files are there."""
    for name, file in manifest.files.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != file.bytes:
            raise CheckpointError(f"rank 0 does not see {name} as it was written; give all ranks one shared folder")
    files.write_manifest(partial, manifest)
    files.sync_folder(partial)


def _swap(partial: Path, place: Path) -> None:
    """Put the new folder in its place; if several jobs save there, the last one wins."""
    old = partial.with_suffix(".old")
    for _ in range(_TRIES):
        _steady(lambda: _check_place(place))
        if os.path.lexists(place):
            files.remove_folder(old)  # of the try before this one, which another job's took the place of
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
    """Raise CheckpointError if something is there that is not ours to replace."""
    if not os.path.lexists(place) or (place.is_dir() and not os.listdir(place)):
        return
    known = files.read_manifest(place)[1].files
    foreign = sorted(set(os.listdir(place)) - {MANIFEST, *known})
    if foreign:
        raise CheckpointError(
            f"{place}: holds {files.short(foreign[0])}, which is not part of a checkpoint; move it out"
        )


def _beside(place: Path, token: str, kind: str) -> Path:
    return place.with_name(f"{place.name}.commopt-{token}.{kind}")


def _siblings(place: Path, kind: str) -> list[Path]:
    name = re.compile(rf"{re.escape(place.name)}\.commopt-[0-9a-f]{{16}}\.{kind}")
    entries = list(os.scandir(place.parent)) if place.parent.is_dir() else []
    return [Path(one.path) for one in entries if name.fullmatch(one.name) and one.is_dir(follow_symlinks=False)]


def _steady(look: Callable[[], T]) -> T:
    """What `look` sees; it looks again if it fails, because another job may replace the folder meanwhile."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(CheckpointError, OSError):
            return look()
    return look()


def _found(place: Path) -> tuple[Path, str, Manifest]:
    """The folder and its manifest; or what is left of it if a job was killed between two renames."""
    if os.path.lexists(place):
        return place, *files.read_manifest(place)
    olds: list[tuple[int, Path]] = []
    for old in _siblings(place, "old"):
        with contextlib.suppress(CheckpointError, OSError):
            files.read_manifest(old)
            olds.append(((old / MANIFEST).stat().st_mtime_ns, old))
    if not olds:
        files.check_0_1(place)
        raise CheckpointError(f"{place}: there is no such folder; check the path, or start without a checkpoint")
    return max(olds)[1], *files.read_manifest(max(olds)[1])
