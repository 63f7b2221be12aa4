"""End to end: real processes, two on each emulated machine; the first machine dies and comes back while the others train on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from launchers import PROGRAMS, finish, processes, start

RUN = """
name: faults
cluster: cluster.yaml
program: {program}
arguments: {{steps: 200, layers: 1, heads: 1, width: 16, context: 16, corpus: {corpus}, validation-batches: 4}}
optimizer: {{name: adam, lr: 0.01}}
methods:
  noloco: {{every: 10, timeout_s: 8}}
faults:
  - {{at_step: 20, kill: node0}}
  - {{at_step: 40, cut: [node1, node2], for_s: 2}}
  - {{at_step: 55, restart: node0}}
"""


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("namespaces")
def test_survivors_end_their_steps_and_the_first_node_comes_back_to_them(tmp_path: Path, mark: str) -> None:
    (tmp_path / "cluster.yaml").write_text("nodes: 3\nslots: 2\nlinks: {rate: 50mbit}\n")
    run_file, out = tmp_path / "run.yaml", tmp_path / mark
    text = tmp_path / "text"
    text.write_bytes(bytes(random.Random(1).choices(range(16), k=100_000)))  # no loss gets below ln 16
    run_file.write_text(RUN.format(program=PROGRAMS / "paced_training.py", corpus=text))
    words = ["-m", "commopt", "run", str(run_file), "--out", str(out), "--emulate", "netns"]
    code, output, errors = finish(start(words, tmp_path), 150)
    assert code == 0, output + errors
    (run,) = json.loads((out / "results.json").read_text())["runs"]
    assert run["status"] == "finished"
    losses = [entry["loss"] for entry in run["validation_by_rank"]]
    assert [entry["after_steps"] for entry in run["validation_by_rank"]] == [200] * 6
    assert max(losses) < 3  # untrained ones are at 5.6
    lines = [
        [json.loads(line) for line in (out / "record" / "noloco" / f"rank{rank}.jsonl").read_text().splitlines()]
        for rank in range(6)
    ]
    steps = [[line for line in record if line["kind"] == "step"] for record in lines]
    for rank in (2, 3, 4, 5):
        assert [line["step"] for line in steps[rank]] == list(range(200)), f"rank {rank} was restarted"
        longest_s = max(line["seconds"] for line in steps[rank])
        assert longest_s < 8 + 4, f"rank {rank} stopped for {longest_s:.1f} s; timeout_s is 8, and machines may be busy"
        assert any(line["kind"] == "round" and line["missed"] for line in lines[rank])
    for rank in (0, 1):
        seen = [line["step"] for line in steps[rank]]
        assert len(seen) == len(set(seen)), "a step's data was used twice"
        caught_up = [line for line in lines[rank] if line["kind"] == "event" and line["event"] == "caught up"]
        assert len(caught_up) == 1
        assert seen[-1] == 199
        assert 55 <= caught_up[0]["fields"]["step"] < 200
    assert processes(mark) == []
