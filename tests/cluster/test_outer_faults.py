"""End to end: real processes, two on each emulated machine; the first machine dies and comes back while the others train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launchers import PROGRAMS, finish, processes, start

RUN = """
name: faults
cluster: cluster.yaml
program: {program}
arguments: {{steps: 400}}
methods:
  noloco: {{every: 10, timeout_s: 8}}
faults:
  - {{at_step: 40, kill: node0}}
  - {{at_step: 80, cut: [node1, node2], for_s: 4}}
  - {{at_step: 110, restart: node0}}
"""


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("namespaces")
def test_survivors_end_their_steps_and_the_first_node_comes_back_to_them(tmp_path: Path, mark: str) -> None:
    (tmp_path / "cluster.yaml").write_text("nodes: 3\nslots: 2\nlinks: {rate: 50mbit}\n")
    run_file, out = tmp_path / "run.yaml", tmp_path / mark
    run_file.write_text(RUN.format(program=PROGRAMS / "paced_training.py"))
    words = ["-m", "commopt", "run", str(run_file), "--out", str(out), "--emulate", "netns"]
    code, output, errors = finish(start(words, tmp_path), 150)
    assert code == 0, output + errors
    (run,) = json.loads((out / "results.json").read_text())["runs"]
    assert run["status"] == "finished"
    losses = [entry["loss"] for entry in run["validation_by_rank"]]
    assert [entry["after_steps"] for entry in run["validation_by_rank"]] == [400] * 6
    assert max(losses) < 1.05 * min(losses)  # untrained ones are at 1.7
    lines = [
        [json.loads(line) for line in (out / "record" / "noloco" / f"rank{rank}.jsonl").read_text().splitlines()]
        for rank in range(6)
    ]
    steps = [[line for line in record if line["kind"] == "step"] for record in lines]
    for rank in (2, 3, 4, 5):
        assert [line["step"] for line in steps[rank]] == list(range(400)), f"rank {rank} was restarted"
        longest_s = max(line["seconds"] for line in steps[rank])
        assert longest_s < 8 + 4, f"rank {rank} stopped for {longest_s:.1f} s; timeout_s is 8, and machines may be busy"
        assert any(line["kind"] == "round" and line["missed"] for line in lines[rank])
    for rank in (0, 1):
        seen = [line["step"] for line in steps[rank]]
        assert len(seen) == len(set(seen)), "a step's data was used twice"
        caught_up = [line for line in lines[rank] if line["kind"] == "event" and line["event"] == "caught up"]
        assert len(caught_up) == 1
        assert seen[-1] == 399
        assert 110 <= caught_up[0]["fields"]["step"] < 400
    assert processes(mark) == []
