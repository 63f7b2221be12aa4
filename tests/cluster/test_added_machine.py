"""A machine joins a running job, from the command that its user types: its file lists one machine more than the others'."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from launchers import PROGRAMS, finish, read_until, start

from commopt.cluster.machine import free_ports

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs all of 127.0.0.0/8")


def listing(folder: Path, names: str, port: int) -> Path:
    """A cluster's file of these machines, each an address of this one."""
    path = folder / f"{names}.yaml"
    nodes = ", ".join(f"{{name: {name}, host: 127.0.1.{1 + 'abc'.index(name)}}}" for name in names)
    path.write_text(f"nodes: [{nodes}]\nrendezvous: {{port: {port}}}\n")
    return path


def rounds_with(machine: int, seen: dict[str, Any]) -> Sequence[int]:
    return [number for number, members, _ in seen["rounds"] if machine in members and len(members) > 1]


def test_a_third_machine_joins_two_that_train(tmp_path: Path, mark: str) -> None:
    (port,) = free_ports(1)

    def launch(names: str, node: str) -> Any:
        words = ["-m", "commopt", "launch", str(listing(tmp_path, names, port)), "--independent", "--node", node, "--"]
        words += [str(PROGRAMS / "joined_training.py"), mark, str(tmp_path)]
        return start(words, tmp_path, COMMOPT_SECRET="a secret of 16 bytes, or longer")

    started = [launch("ab", "a"), launch("ab", "b")]
    told = [read_until(one.stdout, "has made 20 steps\n") for one in started]
    started.append(launch("abc", "c"))
    told.append("")
    seen = []
    for rank, process in enumerate(started):
        code, output, errors = finish(process)
        assert code == 0, output + errors
        told[rank] += output
        seen.append(json.loads(output.splitlines()[-1]))
    a, b, c = seen
    added = [re.findall(r"rank \d: rank 2 .*was added .* from round (\d+) on", text) for text in told[:2]]
    assert added[0] == added[1] != []
    first = int(added[0][0])
    assert (a["ranks"], b["ranks"], c["ranks"]) == (3, 3, 3)
    for one in (a, b):
        assert one["steps"] == list(range(len(one["steps"]))), "it was restarted, or has skipped steps"
        assert not any(is_missed for _, _, is_missed in one["rounds"][:first])
        assert all(number >= first for number in rounds_with(2, one))
    assert 20 <= c["begun_at"] == c["steps"][0]
    assert c["rounds"][0][0] == first
    assert len(rounds_with(2, c)) >= 3
    assert set(rounds_with(2, c)) <= {*rounds_with(2, a), *rounds_with(2, b)}
    assert c["losses"][0] < 0.7 * a["losses"][0], "it began with parameters of its own"
    assert max(one["losses"][-1] for one in seen) < 0.3 * a["losses"][0]
