"""A folder that several ranks save to: replaced as a whole or not at all, whatever crashes, disks and other jobs do."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from storage_rig import content, errors, loaded, make_file, make_folder, make_loop, saved, snapshot

from commopt.errors import CheckpointError
from commopt.groups import Group, LocalGroup, SimWorld
from commopt.run.agree import together
from commopt.run.checkpoint import open_checkpoint, save


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_number_of_ranks_can_load(tmp_path: Path, ranks: int) -> None:
    saved(tmp_path / "c", ranks=3)

    def load(group: Group) -> list[float]:
        stored = open_checkpoint(tmp_path / "c", group)
        own = [group.rank] if ranks == 3 else range(stored.manifest.ranks)
        assert stored.manifest.ranks == 3
        assert stored.shared["w"].tolist() == [[1, 1], [1, 1]]
        return [stored.own[rank]["residual"][0].item() for rank in own]

    assert SimWorld[list[float]](ranks).run(load) == ([[1], [2], [3]] if ranks == 3 else [[1, 2, 3]] * ranks)


@pytest.mark.parametrize("name", ["manifest.json", "shared.safetensors", "rank0.safetensors", "rank1.safetensors"])
def test_files_of_two_saves_do_not_mix(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "a", 1.0, ranks=2)
    saved(tmp_path / "b", 2.0, ranks=2)
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    told = errors(2, lambda group: open_checkpoint(tmp_path / "a", group))
    assert told[0] == told[1]
    assert "of another save" in told[0]


def test_damage_on_one_rank_raises_on_all_and_names_the_rank(tmp_path: Path) -> None:
    saved(tmp_path / "c", ranks=3)
    path = tmp_path / "c" / "rank1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for text in errors(3, lambda group: open_checkpoint(tmp_path / "c", group)):
        assert text.startswith(f"rank 1: {path}: has ")


def test_ranks_that_see_different_saves_raise_on_all(tmp_path: Path) -> None:
    for k in range(2):
        saved(tmp_path / f"c{k}", 1.0, ranks=3)  # the same content
    for text in errors(3, lambda group: open_checkpoint(tmp_path / f"c{group.rank // 2}", group)):
        assert "rank 2 sees another manifest.json than rank 0" in text


def test_a_folder_for_each_rank_does_not_save(tmp_path: Path) -> None:
    told = errors(2, lambda group: save(tmp_path / f"c{group.rank}" / "c", content(1.0, group.rank), group))
    assert all("rank 1: " in text and "no such file" in text for text in told)
    assert [path for path in tmp_path.rglob("*") if path.name != "c0"] == []


MUTATING = ("mkdir", "open", "write", "fsync", "replace", "unlink", "rmdir")


class Death:
    """From call k on, nothing that the process asks of the file system happens any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.calls = at, 0
        for name in MUTATING:
            monkeypatch.setattr(os, name, self.mortal(getattr(os, name)))

    def mortal(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls > self.at:
                raise InterruptedError(errno.EINTR, "killed")
            return real(*args, **kwargs)

        return call


def test_a_job_killed_at_any_moment_leaves_a_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outcomes = []
    for k in range(200):
        folder = saved(tmp_path / str(k) / "c", 1.0)
        with pytest.MonkeyPatch.context() as monkeypatch:
            death = Death(monkeypatch, k)
            try:
                save(folder, content(2.0), LocalGroup())
            except CheckpointError:
                assert death.calls > k
        outcomes.append((loaded(folder), folder.exists()))
        assert loaded(saved(folder, 3.0)) == 3
        left = [path for path in folder.parent.iterdir() if path != folder]
        assert all(set(os.listdir(path)) <= {"manifest.lock"} for path in left), k  # killed before it held its lock
        if death.calls <= k:
            break
    assert outcomes[-1] == (2, True)
    assert [value for value, _ in outcomes] == sorted(value for value, _ in outcomes)
    assert outcomes.count((1, False)) == 1  # between the two renames
    assert "is loaded" in caplog.text


@pytest.mark.parametrize("k", range(8))
def test_a_full_disk_raises_and_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    folder = saved(tmp_path / "c", ranks=3)
    real, calls = os.write, iter(range(1000))

    def full(file: int, data: Any) -> int:
        if next(calls) == k:
            real(file, data[:1])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "write", full)
    for text in errors(3, lambda group: save(folder, content(2.0, group.rank), group)):
        assert text.startswith(f"{folder}: the checkpoint was not saved: rank ")
        assert text.endswith(": no space left on device")
    assert snapshot(tmp_path) == before


def make_foreign_manifest(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").write_text('{"format": "mine"}')


def make_guest(place: Path) -> None:
    saved(place)
    (place / "notes.txt").write_text("precious")


def make_damaged(place: Path) -> None:
    path = saved(place) / "manifest.json"
    path.write_bytes(path.read_bytes()[:-9])


def make_link_to_file(place: Path) -> None:
    (place.parent / "file").write_text("precious")
    place.symlink_to("file")


@pytest.mark.parametrize(
    "make", [make_file, make_folder, make_foreign_manifest, make_guest, make_damaged, make_link_to_file, make_loop]
)
def test_what_is_no_checkpoint_is_never_touched(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "c")
    for kind in ("partial", "old"):  # at names like ours
        make_foreign_manifest(tmp_path / f"d.commopt-0123456789abcdef.{kind}")
        (tmp_path / f"d.commopt-0123456789abcdef.{kind}" / "rank0.safetensors").write_text("precious")
        (tmp_path / f"d.commopt-fedcba9876543210.{kind}").symlink_to("/")
    before = snapshot(tmp_path)
    for text in errors(3, lambda group: save(tmp_path / "c", content(2.0, group.rank), group)):
        assert str(tmp_path / "c") in text
    assert snapshot(tmp_path) == before
    saved(tmp_path / "d")
    saved(tmp_path / "d", 2.0)
    assert {name: x for name, x in snapshot(tmp_path).items() if name.split("/")[0] != "d"} == before


def test_a_symlink_is_followed_by_every_save_and_load(tmp_path: Path) -> None:
    (tmp_path / "c").symlink_to(Path("scratch", "target"))
    for value in (1.0, 2.0):
        assert loaded(saved(tmp_path / "c", value)) == value
    assert (tmp_path / "c").is_symlink()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["target"]


def test_jobs_that_save_to_one_place_do_not_mix(tmp_path: Path) -> None:
    saved(tmp_path / "c", 0.0)
    seen: list[float] = []

    def job(value: float) -> None:
        for _ in range(15):
            save(tmp_path / "c", content(value), LocalGroup())
            seen.append(loaded(tmp_path / "c"))

    jobs = [threading.Thread(target=job, args=(float(k),)) for k in range(1, 4)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join()
    assert len(seen) == 45
    assert os.listdir(tmp_path) == ["c"]


def test_a_checkpoint_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "c", 1.0)
    opened: list[Any] = []
    real = os.open

    def late(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("c/rank0.safetensors") and not opened:
            opened.append(path)
            saved(tmp_path / "c", 2.0)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", late)
    assert loaded(tmp_path / "c") == 2


def test_what_fails_on_one_rank_fails_on_all_with_its_reason() -> None:
    def part(group: Group) -> int:
        if group.rank == 1:
            raise LookupError("\n first line \udcff\nsecond line")
        return group.rank

    for text in errors(3, lambda group: together(group, lambda: part(group))):
        assert text == "rank 1: LookupError: first line \udcff"
    assert SimWorld[int](3).run(lambda group: together(group, lambda: group.rank)) == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        together(LocalGroup(), lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
