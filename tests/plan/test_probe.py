"""The file of `commopt probe`, and what the command refuses."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from launchers import commopt_here
from probe_file import probe_file, script

from commopt.errors import ConfigError
from commopt.plan.probe import Probe, read_probe
from commopt.report.probed import show

CALLS = [[1024, 0.002, 0.5], [1_000_000, 0.24, 0.1]]
FOUND = probe_file(
    CALLS,
    {
        "dense": {"exchange": [[1_000_000, 0.001]], "step": [[1_000_000, 0.005]]},
        "loco": {"exchange": [[1_000_000, 0.01]], "step": [[1_000_000, 0.005]]},
    },
    slots=2,
    cores_per_rank=0.5,
    rates={"a": 12.5e6, "b": None},
    pairs=[
        {"from": "a", "to": "b", "latency_s": 0.001, "bytes_per_s": 12e6},
        {"from": "b", "to": "a", "latency_s": 0.001, "bytes_per_s": 11e6},
    ],
    together={"a": 12e6, "b": 11e6},
    script=script(),
)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    probe = Probe.model_validate(FOUND)
    probe.write(tmp_path / "probe.json")
    assert read_probe(tmp_path / "probe.json") == probe
    assert json.loads((tmp_path / "probe.json").read_text()) == FOUND
    with pytest.raises(ConfigError, match=r"^--out .*none/probe.json: cannot be written: no such file or directory$"):
        probe.write(tmp_path / "none/probe.json")


def changed(**changes: Any) -> str:
    return json.dumps(FOUND | changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file; make it: commopt probe CLUSTER.yaml --out probe.json"),
        (changed()[:-9], "is not JSON, or cut off; measure again: commopt probe CLUSTER.yaml"),
        ("[" * 5000, "is not JSON, or cut off; measure again: commopt probe CLUSTER.yaml"),
        ('{"nodes": 4}', "was not written by commopt probe; measure again: commopt probe CLUSTER.yaml"),
        (
            changed(schema=7),
            "schema 7 is of another version of commopt, and this one reads 1; measure again: commopt pro",
        ),
        (changed(slots=0), "slots: 0 is too small; write 1 or more"),
        (changed(copy_bytes_per_s=float("nan")), "copy_bytes_per_s: nan is not a finite number; write one"),
        (changed(together={"a": 1e6, "c": 1e6}), "together: no node 'c'; known: a, b"),
        (changed(exchanges={"all_reduce": CALLS, "all_gather": CALLS}), "exchanges.all_to_all: is missing; write it"),
        (changed(rats={}), "rats: unknown key; did you mean 'rates'?"),
    ],
)
def test_a_broken_or_foreign_file_gets_one_line(
    text: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("probe.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_probe("probe.json")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"probe.json: {said}")


def test_the_summary_compares_exchanges_with_the_slowest_link() -> None:
    told = StringIO()
    show(Probe.model_validate(FOUND), told)
    lines = [line.split() for line in told.getvalue().splitlines()]
    rows = {cells[0]: cells for cells in reversed(lines) if cells}
    assert rows["a"] == ["a", "-", "b", "1.00", "ms", "96", "Mbit/s", "88", "Mbit/s", "100", "Mbit/s"]
    # two slots, each of which sends 1 MB of an all-reduce and half a MB of an all-to-all, in 0.24 s over 11 MB/s
    assert rows["all_reduce"][-2:] == ["76%", "10%"]
    assert rows["all_to_all"][-2:] == ["38%", "10%"]
    assert rows["loco"] == ["loco", "10.0", "ms", "10.0x", "5.00", "ms"]
    assert "1,000 parameters in 2 buckets, exchanged during backward" in told.getvalue()


@pytest.mark.parametrize(
    ("nodes", "words", "message"),
    [
        (1, [], "cluster.yaml: nodes: one node has no link to measure; write two or more"),
        (2, ["--out", "."], "--out .: is a folder; write the name of a file"),
        (
            2,
            ["--out", "none/probe.json"],
            "--out none/probe.json: folder none does not exist; make it, or write another",
        ),
        (2, ["--methods", "dense,dense"], "--methods: duplicate method 'dense'"),
        (2, ["--methods", "dnse"], "unknown method 'dnse'; did you mean 'dense'?"),
        (2, ["--methods", "noloco"], "--methods: noloco exchanges parameters only now and then"),
        (2, ["--", "trian.py"], "trian.py: no such file"),
        (2, ["--node", "node7"], "--node node7: has no effect where this machine runs all nodes; leave it out"),
    ],
)
def test_a_mistake_gets_one_line_before_anything_starts(
    nodes: int, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cluster.yaml").write_text(f"nodes: {nodes}\nemulate: none\n")
    code, _, errors = commopt_here("probe", "cluster.yaml", *words)
    assert code == 2
    assert errors.startswith(f"commopt: {message}")
    assert len(errors.splitlines()) == 1
