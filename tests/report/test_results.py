from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from outer_runs import STORM, STORM_FAULTS, outer_run
from synthetic_runs import DENSE, FP16, ONEBIT, Edit, Plan, change, results_of, run_of, short, write_run

from commopt.cluster.spec import load_cluster
from commopt.report.document import Cluster, Environment, Results
from commopt.report.page import results_json
from commopt.report.results import collect


def test_the_document_survives_a_round_trip(tmp_path: Path) -> None:
    results = results_of([outer_run(tmp_path, STORM, STORM_FAULTS), run_of(tmp_path, short(DENSE))])
    assert Results.model_validate_json(results_json(results)) == results
    document = json.loads(results_json(results), parse_constant=pytest.fail)  # no NaN and no infinity
    assert (document["schema"], len(document["runs"][0]["faults"])) == (1, 4)


def test_every_field_of_the_json_is_described() -> None:
    document = Results.model_json_schema(by_alias=True)
    undescribed = [
        f"{name}.{key}"
        for name, model in {"Results": document, **document["$defs"]}.items()
        for key, field in model["properties"].items()
        if not field.get("description")
    ]
    assert undescribed == []


def test_speed_is_of_the_steady_phase_and_speedups_are_over_dense(tmp_path: Path) -> None:
    results = results_of([run_of(tmp_path, plan) for plan in (short(DENSE), short(FP16), ONEBIT)])
    assert [run.speedup_vs_dense for run in results.runs] == pytest.approx([1.0, 1.24 / 0.65, 1.24 / 0.131], rel=0.05)
    run = results.runs[2]
    assert (run.warmup_steps, run.window_steps) == (24, 276)
    assert run.step_s == pytest.approx(0.131, rel=0.02)
    assert run.wall_s == pytest.approx(24 * 1.24 + 276 * 0.131, rel=0.02)
    assert run.seconds[-1] == pytest.approx(sum(run.step_seconds))
    assert run.payload_bytes_per_step == pytest.approx(0.19e6)


def test_without_dense_there_is_no_speedup_and_what_ran_twice_has_two_names(tmp_path: Path) -> None:
    run = run_of(tmp_path, short(ONEBIT))
    results = results_of([run, run])
    assert results.dense is None
    assert [(run.name, run.speedup_vs_dense) for run in results.runs] == [
        ("onebit_adam", None),
        ("onebit_adam (2)", None),
    ]


@pytest.mark.parametrize(
    "garbage",
    [b"\xff\x00\n", b"[1, 2]\n", b'{"kind": "step"}\n', b'{"kind": "dance"}\n', b"null\n", b'{"kind": "en',
     b'{"kind": "start", "at_s": 0, "steps": null}', b'{"kind": "start", "at_s": 0, "world_size": null}'],
)  # fmt: skip
def test_what_is_garbled_or_torn_is_counted_and_left_out(garbage: bytes, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", short(DENSE))
    for rank, lost in ((0, 0), (1, 700)):
        path = folder / f"rank{rank}.jsonl"
        path.write_bytes(path.read_bytes()[: -lost or None] + garbage)
    run = collect(folder)
    assert str(run.failure).startswith("rank 1 stopped after ")
    assert run.notices[0] == ("2 lines were cut off or garbled in the record of ranks 0, 1, and left out")
    assert (run.status, run.steps) == ("failed", 40)


def test_a_run_that_the_launcher_failed_is_failed_with_or_without_a_record(tmp_path: Path) -> None:
    told = ["the logs are incomplete"]
    run = collect(write_run(tmp_path / "r", short(DENSE)), failure="node1 did not end in time", told=told)
    assert (run.status, run.failure, run.notices) == ("failed", "node1 did not end in time", told)
    run = collect(tmp_path / "nowhere", method="topk", options={"density": 0.01}, failure="rank 0 was killed")
    assert (run.method, run.options, run.steps) == ("topk", {"density": 0.01}, 0)
    assert run.failure == "rank 0 was killed; no rank wrote a record; the program has to call commopt.attach"


NO_SPEED = ["no step was past the method's warm-up, so there is no speed in the steady phase"]
STARTED_AGAIN = ["ranks 0, 1, 2, 3 were started again from the first step; only the last start is shown"]
LOSSES = ({"loss": 3.0, "tokens": 300}, {"loss": 1.0, "tokens": 100})
NO_COUNT: dict[str, Any] = {"nic_tx_bytes_per_step": None, "nic_over_model": None, "nodes": []}


def edited(edit: Edit, plan: Plan = DENSE, /, **expected: Any) -> Any:
    """A run with edited lines, and some of its fields."""
    return short(plan), {"edit": edit}, expected


@pytest.mark.parametrize(
    ("plan", "how", "expected"),
    [
        edited(change("step", lambda rank, _: {"seconds": 0.3 if rank == 2 else 0.1}), step_s=0.3, step_mean_s=0.15),
        edited(lambda rank, lines: [] if rank == 3 else lines, status="failed", failure="rank 3 wrote no record",
               steps=40, payload_bytes_per_step=None, rounds=None, ended_early=[], progress=[], faults=[]),
        edited(change("step", lambda *_: {"steady": False}), ONEBIT, status="finished", step_s=None, wait_share=None,
               warmup_steps=None, notices=NO_SPEED),
        edited(lambda _, lines: [*lines[:20], *lines], steps=40, notices=STARTED_AGAIN),
        edited(change("validation", lambda rank, _: LOSSES[rank > 0]), val_loss=2.0),  # weighted by tokens
        (short(DENSE), {"nic": False}, {"payload_bytes_per_step": 6.1e6, **NO_COUNT}),
        (replace(short(DENSE), ranks=1, payload_bytes=0.0), {}, {"payload_bytes_per_step": 0.0, "defects": []}),
    ],
    ids=("the slowest rank gives the step time", "without a rank the others are shown", "without a steady step",
         "started again", "uneven validation", "without interfaces", "one rank alone"),
)  # fmt: skip
def test_a_run_is_what_its_ranks_wrote(plan: Plan, how: Any, expected: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(tmp_path, plan, **how)
    for key, value in expected.items():
        assert getattr(run, key) == (pytest.approx(value) if isinstance(value, float) else value), key


def test_a_loss_that_is_not_finite_on_one_rank_is_not_finite(tmp_path: Path) -> None:
    diverge = change("step", lambda rank, line: {"loss": None} if rank == 1 and line["step"] >= 30 else {})
    run = run_of(tmp_path, short(DENSE), edit=diverge)
    assert run.train_loss.index(None) == 30
    assert run.train_loss.count(None) == 10
    assert "NaN" not in results_json(results_of([run]))


def test_counts_that_disagree_are_a_defect(tmp_path: Path) -> None:
    run = run_of(tmp_path, short(DENSE), overcount=1.08)
    assert run.nic_over_model == pytest.approx(1.08)
    assert not any(node.ok for node in run.nodes)
    assert "8.0% more bytes left node" in run.defects[0]
    assert "dense all_reduce bucket0" in run.defects[0]
    assert len(run.defects) == 2


def test_ranks_of_one_node_share_its_interface(tmp_path: Path) -> None:
    run = run_of(tmp_path, short(DENSE), edit=change("start", lambda rank, _: {"node": f"node{rank // 2}"}))
    assert [node.node for node in run.nodes] == ["node0", "node1"]
    assert run.nodes[0].payload_bytes == pytest.approx(6.1e6 * 40)  # of the two ranks, one sends to the other node


def test_the_environment_names_no_machine_and_no_path() -> None:
    text = Environment.here().model_dump_json()
    assert socket.gethostname() not in text
    assert os.path.expanduser("~") not in text


CLUSTERS = sorted((Path(__file__).parents[2] / "configs" / "clusters").glob("*.yaml"))


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_clusters_yaml_is_described_without_hosts(path: Path) -> None:
    spec = load_cluster(path)
    cluster = Cluster.from_spec(spec, emulation="netns", notices=["a notice"])
    assert [(node.name, node.ranks) for node in cluster.nodes] == [(node.name, spec.slots) for node in spec.nodes]
    assert [node.rate for node in cluster.nodes] == [spec.link(index).rate for index in range(len(spec.nodes))]
    assert not [node.host for node in spec.nodes if node.host and node.host in cluster.model_dump_json()]
