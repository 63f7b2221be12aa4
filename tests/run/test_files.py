"""The files of a checkpoint: tensors and JSON come back bit for bit, and damaged files are refused."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from storage_rig import bits, errors, loaded, make_file, make_folder, make_loop, refused, saved
from torch import Tensor

from commopt.errors import CheckpointError
from commopt.groups import LocalGroup
from commopt.run.checkpoint import Content, open_checkpoint, save

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool, torch.complex64),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    nbytes = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    content = draw(st.binary(min_size=nbytes, max_size=nbytes))
    if dtype == torch.bool:
        content = bytes(one & 1 for one in content)
    flat = torch.tensor(list(content), dtype=torch.uint8).view(dtype)  # any bits: nan with payloads, -0.0, subnormals
    return flat.view(shape)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NAMED = st.dictionaries(TEXT, tensors(), max_size=4)


@given(NAMED, NAMED)
def test_everything_comes_back_bit_for_bit(shared: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save(folder, Content(shared, own, {"names": [*shared]}), LocalGroup())
        stored = open_checkpoint(folder, LocalGroup())
    assert (bits(stored.shared), bits(stored.own[0])) == (bits(shared), bits(own))
    assert stored.manifest.meta == {"names": [*shared]}


def test_views_are_saved_as_copies_and_other_programs_can_read_them(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(3, 4)
    views = {"x": x, "again": x, "turned": x.T, "every": x[:, ::2], "spread": x[0, 0].expand(5)}
    views |= {"conj": torch.tensor([1 + 2j]).conj(), "parameter": torch.nn.Parameter(x[1])}
    save(tmp_path / "c", Content(views, {}, {}), LocalGroup())
    stored = open_checkpoint(tmp_path / "c", LocalGroup())
    assert bits(stored.shared) == bits(views) == bits(load_file(tmp_path / "c" / "shared.safetensors"))
    stored.shared["x"].zero_()  # the others have memory of their own
    assert bits({"": stored.shared["again"]}) == bits({"": x})


def test_a_flipped_bit_is_found_in_every_byte(tmp_path: Path) -> None:
    for path in saved(tmp_path / "c").iterdir():
        good = path.read_bytes()
        for k in range(0, 8 * len(good), 7):  # every byte, and each of its bits in turn
            bad = bytearray(good)
            bad[k // 8] ^= 1 << k % 8
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match=path.name):
                open_checkpoint(tmp_path / "c", LocalGroup())
        path.write_bytes(good)
    assert loaded(tmp_path / "c") == 1


def test_every_other_length_is_found(tmp_path: Path) -> None:
    for path in saved(tmp_path / "c").iterdir():
        good = path.read_bytes()
        for bad in (*(good[:n] for n in range(0, len(good), 97)), good[:-1], good + b"\0", good + good):
            path.write_bytes(bad)
            assert str(path) in refused(tmp_path / "c")
        path.unlink()
        assert "manifest.json" in refused(tmp_path / "c") or f"{path}: is missing" in refused(tmp_path / "c")
        path.write_bytes(good)


class Bomb:
    def __reduce__(self) -> Any:
        return (os.abort, ())


@pytest.mark.parametrize("name", [".metadata", "commopt_rank0.pt", "../c_rank0.pt"])
def test_a_checkpoint_of_0_1_is_named_and_not_unpickled(tmp_path: Path, name: str) -> None:
    path = Path(os.path.normpath(tmp_path / "c" / name))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(Bomb()))
    assert "was saved by commopt 0.1, which this version cannot read: resume it with 0.1" in refused(tmp_path / "c")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    said = f"{tmp_path}/c: no such folder; check the path, or start without a checkpoint"
    assert refused(tmp_path / "c") == said
    make_file(tmp_path / "file")
    assert "file: is not a folder" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "empty: is an empty folder" in refused(tmp_path / "empty")
    make_folder(tmp_path / "other")
    assert "other: has no manifest.json" in refused(tmp_path / "other")
    make_loop(tmp_path / "loop")
    assert "loop: is not a folder" in refused(tmp_path / "loop")


def test_files_that_are_no_files_or_cannot_be_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "c") / "shared.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "shared.safetensors: is a symlink" in refused(tmp_path / "c")
    path.unlink()
    os.mkfifo(path)
    assert "shared.safetensors: is not a file" in refused(tmp_path / "c")
    real = os.open

    def closed(name: Any, *args: Any, **kwargs: Any) -> int:
        if Path(name) == path:  # root may read everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "open", closed)
    assert "shared.safetensors: cannot be read: permission denied" in refused(tmp_path / "c")


DEEP = '{"a": ' * 100_000 + "1" + "}" * 100_000
HOSTILE: dict[str, Callable[[str], str]] = {
    "is not the manifest of a commopt": lambda text: text.replace("commopt checkpoint", "another checkpoint"),
    "is of format 3": lambda text: text.replace('"version": 2', '"version": 3'),
    "is not valid: ": lambda text: text[:-1],
    "is not valid: maximum recursion": lambda text: text.replace('"meta": {', f'"meta": {{"deep": {DEEP}, '),
    "digits": lambda text: text.replace('"bytes": ', '"bytes": ' + "9" * 5000),
    "files.rank0.safetensors.bytes: ": lambda text: text.replace('"bytes": ', '"bytes": -'),
    "files.rank0.safetensors.sha256: ": lambda text: text.replace('"sha256": ', '"sha256": true, "x": '),
    "meta: ": lambda text: text.replace('"meta": {', '"meta": 3, "x": {'),
    "ranks: ": lambda text: text.replace('"ranks": 1', '"ranks": 0'),
    "of 1000000000 ranks": lambda text: text.replace('"ranks": 1', '"ranks": 1000000000'),
    "files: Value error, [": lambda text: text.replace('"rank0.safetensors"', '"../rank0.safetensors"'),
    "surrogate|decode": lambda text: text.replace('"value"', '"\udcff"'),
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_a_manifest_with_the_right_checksum_is_checked_all_the_same(tmp_path: Path, reason: str) -> None:
    path = saved(tmp_path / "c") / "manifest.json"
    good = path.read_text().split(", ", 1)[1]
    bad = HOSTILE[reason](good).encode(errors="surrogateescape")
    assert bad != good.encode()
    path.write_bytes(b'{"sha256": "%s", ' % hashlib.sha256(bad).hexdigest().encode() + bad)
    text = refused(tmp_path / "c")
    assert text.startswith(str(path))
    assert any(part in text for part in reason.split("|")), text


@pytest.mark.parametrize(
    ("name", "x", "reason"),
    [
        ("w", torch.ones(2, dtype=torch.complex128), "w: safetensors cannot store torch.complex128"),
        ("w", torch.eye(2).to_sparse(), "w: only whole, dense tensors"),
        ("w", torch.empty(2, device="meta"), "w: only whole, dense tensors"),
        ("\udcff", torch.ones(1), "cannot be a tensor's name"),
    ],
)
def test_tensors_that_cannot_be_saved_are_named(tmp_path: Path, name: str, x: Any, reason: str) -> None:
    saved(tmp_path / "c")
    (text,) = errors(1, lambda group: save(tmp_path / "c", Content({}, {"fine": torch.ones(1), name: x}, {}), group))
    assert reason in text
    assert loaded(tmp_path / "c") == 1
    assert os.listdir(tmp_path) == ["c"]
