"""The files of a checkpoint: tensors as safetensors, JSON in a manifest with the size and the SHA-256 of every file.

Nested state, in checkpoints and in messages, is JSON and named tensors. Nothing is unpickled. Each file is read once, and what is
returned comes from the bytes that were verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors.torch import load as load_tensors
from torch import Tensor

from commopt.errors import CheckpointError
from commopt.groups import Group

MANIFEST, SHARED, OWN = "manifest.json", "shared.safetensors", "rank{}.safetensors"
LOCK = "manifest.lock"  # the name of a manifest before it is locked
NAME = re.compile(r"manifest\.(json|lock)|shared\.safetensors|rank[0-9]+\.safetensors")
_VERSION = 2  # commopt 0.1 wrote other formats
# how a manifest begins; the checksum is that of all bytes after it
_HEAD = re.compile(rb'\{"sha256": "([0-9a-f]{64})", ("format": "commopt checkpoint", "version": ([0-9]{1,9}), )')
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_SMALL = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL", torch.complex64: "C64"}
_SIGNED = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}
_UNSIGNED = {torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"}
_DTYPES = _FLOATS | _SMALL | _SIGNED | _UNSIGNED
_READ: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "dict": dict, "float": float, "bytes": bytes.fromhex}
_KINDS = ("tensor", *_READ)  # an object with one such key alone is of that type
_JSON = "json"


class File(BaseModel, strict=True):
    """A file in a manifest."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Manifest(BaseModel, strict=True):
    """One save: its files, its JSON, and how many ranks saved, in all and on each machine."""

    token: str
    files: dict[str, File]
    meta: dict[str, Any]
    ranks: Annotated[int, Field(ge=1)]
    per_machine: Annotated[int, Field(ge=1)] = 1

    def fits(self, group: Group) -> bool:
        """Whether as many ranks saved, on as many machines."""
        return (self.ranks, self.per_machine) == (group.size, group.per_machine)

    @model_validator(mode="after")
    def _check_files(self) -> Manifest:
        is_whole = len(self.files) == self.ranks + 1  # first, as `ranks` may be huge
        if not is_whole or set(self.files) != {SHARED, *(OWN.format(rank) for rank in range(self.ranks))}:
            raise ValueError(f"{[*self.files]} are not those of {self.ranks} ranks")
        if self.ranks % self.per_machine:
            raise ValueError(f"{self.ranks} ranks are not {self.per_machine} on each machine")
        return self


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, with its name, for a tensor that safetensors cannot store."""
    for name, x in tensors.items():
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise CheckpointError(f"{name!r:.60} cannot be a tensor's name in safetensors; use another text")
        if x.layout != torch.strided or x.is_nested or x.is_meta or hasattr(x, "to_local"):
            raise CheckpointError(f"{name}: only whole, dense tensors can be saved; gather it, or call to_dense()")
        if x.dtype not in _DTYPES:
            raise CheckpointError(f"{name}: safetensors cannot store {x.dtype}; save it in another dtype")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, and sync it to the disk."""
    text = json.dumps(manifest.model_dump(), allow_nan=False).encode()[1:]
    text = b'"format": "commopt checkpoint", "version": %d, ' % _VERSION + text
    write(folder / MANIFEST, [b'{"sha256": "%s", ' % hashlib.sha256(text).hexdigest().encode(), text])


def read_manifest(folder: Path) -> tuple[str, Manifest]:
    """The checksum and the content of a manifest. Raises CheckpointError for a folder that is not a checkpoint."""
    path = folder / MANIFEST
    check_0_1(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder; give the folder of a checkpoint")
    if not os.path.lexists(path):
        what = "has no manifest.json" if os.listdir(folder) else "is an empty folder"
        raise CheckpointError(f"{folder}: {what}, so it is not a checkpoint of commopt; give another folder")
    data = _read(path, None)
    head = _HEAD.match(data)
    if not head:
        raise CheckpointError(f"{path}: is not the manifest of a commopt checkpoint; take another checkpoint")
    digest = head[1].decode()
    if hashlib.sha256(data[head.start(2) :]).hexdigest() != digest:
        raise CheckpointError(f"{path}: is damaged: its SHA-256 is not the one that it names; take another checkpoint")
    if int(head[3]) != _VERSION:
        raise CheckpointError(
            f"{path}: is of format {int(head[3])}, and this version reads {_VERSION}; load it with the commopt that saved it"
        )
    try:
        return digest, Manifest.model_validate(json.loads(data.decode()))
    except (ValueError, RecursionError) as error:
        what = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc'])) or 'files'}: {first['msg']}"
        raise CheckpointError(f"{path}: is not valid: {what}; take another checkpoint") from error


def read_tensors(path: Path, file: File) -> dict[str, Tensor]:
    """The tensors of a file. Raises CheckpointError if it does not match its manifest."""
    data = _read(path, file.bytes)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise CheckpointError(
            f"{path}: is damaged, or of another save: its SHA-256 is not the manifest's; take another checkpoint"
        )
    try:
        return load_tensors(data)
    except Exception as error:
        raise CheckpointError(f"{path}: is not a safetensors file that this version reads: {error}") from error


def check_0_1(folder: Path) -> None:
    """Raise CheckpointError for what commopt 0.1 saved: a folder of torch.distributed.checkpoint, or one file per rank."""
    marks = (folder / ".metadata", folder / "commopt_rank0.pt", folder.with_name(f"{folder.name}_rank0.pt"))
    if not os.path.lexists(folder / MANIFEST) and any(map(os.path.lexists, marks)):
        raise CheckpointError(
            f"{folder}: was saved by commopt 0.1, which this version cannot read: resume it with 0.1, or start from its model"
        )


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint's files, the manifest last, and the folder unless it holds anything else."""
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(folder), key=lambda name: name == MANIFEST):
            if NAME.fullmatch(name):
                os.unlink(folder / name)
        os.rmdir(folder)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk."""
    with contextlib.suppress(OSError):  # some file systems sync no folders
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def split(value: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """JSON that stands for `value`, and its tensors by name. Raises CheckpointError, with the place, for values of other types.

    Takes numbers, texts, None, lists, tuples, dicts with texts or numbers as keys, bytes, and tensors.
    """
    tensors: dict[str, Tensor] = {}

    def walk(x: Any, place: str) -> Any:
        if isinstance(x, Tensor):
            name = f"{prefix}{place}"
            while name in tensors:  # keys may have a slash in them, or be 1 and "1"
                name += "'"
            tensors[name] = x.detach()
            return {"tensor": name}
        if x is None or isinstance(x, str | int):
            return x
        if isinstance(x, float):
            return float(x) if math.isfinite(x) else {"float": repr(float(x))}
        if hasattr(x, "item") and getattr(x, "shape", None) == ():  # a numpy scalar
            return walk(x.item(), place)
        if isinstance(x, bytes):
            return {"bytes": x.hex()}
        if isinstance(x, list | tuple):
            items = [walk(one, f"{place}/{k}") for k, one in enumerate(x)]
            return {"tuple": items} if isinstance(x, tuple) else items
        if isinstance(x, Mapping):
            if all(isinstance(key, str) for key in x) and not (len(x) == 1 and next(iter(x)) in _KINDS):
                return {key: walk(one, f"{place}/{key}") for key, one in x.items()}
            return {"dict": [[walk(key, place), walk(one, f"{place}/{key}")] for key, one in x.items()]}
        raise CheckpointError(
            f"{place or 'this'}: {type(x).__name__} cannot be stored; use numbers, texts, lists, dicts and tensors"
        )

    return walk(value, ""), tensors


def join(described: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split` was given. Raises CheckpointError for a tensor that is missing."""
    if isinstance(described, list):
        return [join(one, tensors) for one in described]
    if not isinstance(described, dict):
        return described
    if len(described) == 1:
        ((kind, inside),) = described.items()
        if kind == "tensor":
            if inside not in tensors:
                raise CheckpointError(f"{inside}: this tensor is missing")
            return tensors[inside]
        if kind in _READ:
            return _READ[kind](join(inside, tensors))
    return {key: join(one, tensors) for key, one in described.items()}


def pack(value: Any) -> Tensor:
    """(n,) u8: a nested value as one safetensors file."""
    described, tensors = split(value)
    stored = {f"t{name}": x for name, x in tensors.items()}
    stored[_JSON] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    return torch.frombuffer(bytearray().join(pieces_of(stored)), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """What `pack` was given. Raises CheckpointError for bytes that it did not make."""
    try:
        stored = load_tensors(packed.numpy().tobytes())
        described = json.loads(stored[_JSON].numpy().tobytes())
        return join(described, {name[1:]: x for name, x in stored.items()})
    except Exception as error:
        raise CheckpointError(f"not a packed state: {error}") from error


def pieces_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, tensor by tensor: memory holds one copy of one tensor. Widest elements first, so that all are aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    start = 0
    for name, x in ordered:
        stop = start + x.numel() * x.element_size()
        header[name] = {"dtype": _DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, x in ordered:
        flat = x.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data  # (bytes,) u8


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> File:
    """Write a file, and sync it to the disk."""
    digest, nbytes = hashlib.sha256(), 0
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(file, "wb", buffering=0):
            for piece in pieces:
                digest.update(piece)
                nbytes += len(piece)
                left = memoryview(piece)
                while left:
                    left = left[os.write(file, left) :]
            os.fsync(file)
    except OSError as error:
        error.filename = str(path)  # which a full disk does not name
        raise
    return File(bytes=nbytes, sha256=digest.hexdigest())


def _read(path: Path, nbytes: int | None) -> bytes:
    """All bytes of a regular file, of this length if it is known."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe without a writer would block
        with open(file, "rb") as stream:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{path}: is not a file; take another checkpoint")
            if nbytes not in (None, found.st_size):
                what = f"has {found.st_size} bytes, not the {nbytes} of its manifest"
                raise CheckpointError(f"{path}: {what}; take another checkpoint")
            return stream.read(found.st_size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing; take another checkpoint") from None
    except OSError as error:
        what = "is a symlink" if path.is_symlink() else f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise CheckpointError(f"{path}: {what}; give the folder and the files that were saved") from None
