"""Small checkpoints, their contents, and obstacles at their paths."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commopt.errors import CheckpointError
from commopt.groups import Group, LocalGroup, SimWorld
from commopt.run.checkpoint import Content, open_checkpoint, save


def content(value: float, rank: int = 0) -> Content:
    own = {"residual": torch.full((3,), value + rank, dtype=torch.bfloat16)}
    return Content({"w": torch.full((2, 2), value)}, own, {"value": value})


def saved(folder: Path, value: float = 1.0, ranks: int = 1) -> Path:
    SimWorld[None](ranks).run(lambda group: save(folder, content(value, group.rank), group))
    return folder


def loaded(folder: Path) -> float:
    """What was saved, once all parts agree on it."""
    stored = open_checkpoint(folder, LocalGroup())
    values = {stored.manifest.meta["value"], *stored.shared["w"].view(-1).tolist(), *stored.own[0]["residual"].tolist()}
    (value,) = values
    return float(value)


def bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {
        name: (x.dtype, x.shape, x.resolve_conj().contiguous().view(-1).view(torch.uint8).tolist())
        for name, x in tensors.items()
    }


def errors(ranks: int, part: Callable[[Group], Any]) -> list[str]:
    """What each rank raises."""

    def one(group: Group) -> str:
        with pytest.raises(CheckpointError) as caught:
            part(group)
        return str(caught.value)

    return SimWorld[str](ranks).run(one)


def refused(folder: Path) -> str:
    return errors(1, lambda group: open_checkpoint(folder, group))[0]


def snapshot(folder: Path) -> dict[str, Any]:
    """Every entry below a folder, with its bytes or its link's target."""
    entries = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {
        name: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for name, path in entries.items()
    }


def make_file(place: Path) -> None:
    place.write_text("precious")


def make_folder(place: Path) -> None:
    place.mkdir()
    (place / "precious").write_text("precious")


def make_loop(place: Path) -> None:
    place.symlink_to(place.name)
