"""`commopt probe` on paced nodes, with a small script."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers import all_have_ended, finish, read_until, start

from commopt.plan.probe import read_probe

SCRIPT = """
import sys, commopt, torch
from commopt.groups import connect

connect()
model = commopt.wrap(torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 1)), "dense")
run = commopt.attach(model, "dense", torch.optim.SGD(model.parameters(), lr=0.1))
while len(sys.argv) == 2:  # until probe ends it
    model(torch.ones(4, 40)).sum().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
raise ValueError("no data")
"""


def test_links_exchanges_methods_and_a_script_are_measured(write: Callable[[str], Path], mark: str) -> None:
    cluster = write("nodes: 2\nlinks: {rate: 80mbit, delay: 2ms, nodes: {node1: {rate: 40mbit, delay: 5ms}}}")
    cluster.with_name("train.py").write_text(SCRIPT)
    words = ["-m", "commopt", "probe", str(cluster), "--emulate", "paced", "--methods", "dense,ef_sign", "--out"]
    process = start([*words, "p.json", "--", "train.py", mark], cluster.parent, cwd=cluster.parent)
    code, output, errors = finish(process)
    assert code == 0, errors
    assert errors.splitlines()[-1] == f"commopt: wrote p.json; next: commopt advise {cluster} --probe p.json"
    probe = read_probe(cluster.with_name("p.json"))
    assert (probe.nodes, probe.slots, probe.emulated, probe.device) == (["node0", "node1"], 1, True, "cpu")
    assert probe.rates == {"node0": 10e6, "node1": 5e6}
    rates = {f"{pair.source} {pair.to}": pair.bytes_per_s for pair in probe.pairs}
    assert rates == pytest.approx({"node0 node1": 5e6, "node1 node0": 5e6})  # node1 takes no more
    assert probe.together == pytest.approx({"node0": 5e6, "node1": 5e6})
    assert [pair.latency_s >= least_s for pair, least_s in zip(probe.pairs, (2e-3, 5e-3), strict=True)] == [True, True]
    for points in probe.exchanges.values():
        sizes, seconds, _ = zip(*points, strict=True)
        assert list(sizes) == sorted(sizes)
        assert min(seconds) > 5e-3
    nbytes, seconds_of_it, _ = probe.exchanges["all_reduce"][-1]
    assert seconds_of_it >= nbytes / 5e6  # what the slower link takes
    assert list(probe.codecs) == ["dense", "ef_sign"]
    timed = [[n for n, _ in points] for costs in probe.codecs.values() for points in (costs.exchange, costs.step)]
    assert timed == [[2101]] * 4  # the script's own parameters
    assert set(probe.profiles) == {"dense", "ef_sign"}
    assert probe.script is not None
    assert (probe.script.parameters, probe.script.buckets, probe.script.overlap) == (2101, [2101], True)
    assert probe.script.compute_s > 0
    assert "node0 - node1" in output
    all_have_ended(mark)


def test_a_script_that_fails_and_ctrl_c_leave_nothing_behind(write: Callable[[str], Path], mark: str) -> None:
    cluster = write("nodes: 2\nemulate: none")
    cluster.with_name("train.py").write_text(SCRIPT)
    words = ["-m", "commopt", "probe", str(cluster), "--methods", "dense"]
    code, _, errors = finish(start([*words, "--", "train.py", mark, "fail"], cluster.parent, cwd=cluster.parent))
    assert code == 1
    assert "failed: ValueError: no data; all output is in " in errors.splitlines()[-1]
    all_have_ended(mark)
    scratch = cluster.parent / "scratch"
    scratch.mkdir()
    process = start([*words, "--", "train.py", mark], scratch, cwd=cluster.parent)
    read_until(process.stderr, "without communication")
    process.send_signal(2)
    code, _, errors = finish(process)
    assert (code, errors.splitlines()[-1]) == (130, "commopt: interrupted by Ctrl-C; all that was started has ended")
    all_have_ended(mark)
    assert os.listdir(scratch) == []
    assert not cluster.with_name("probe.json").exists()
