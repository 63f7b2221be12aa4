from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from outer_runs import Absence, OuterPlan, fault, outer_run, write_outer
from synthetic_runs import DENSE, Lines, short, write_run

from commopt.report.results import collect

KILL = fault("kill", ["node2"], at_step=25, at_s=2.55)
RESTART = fault("restart", ["node2"], at_step=50, at_s=6.0)
RETURNED = Absence(after=25, back_s=7.5, resumed_at=45)


def test_a_fault_is_told_with_its_ranks_and_its_end(tmp_path: Path) -> None:
    cut: dict[str, Any] = {"at_step": 30, "for_s": 2}
    lines = [
        fault("cut", ["node0", "node1"], at_s=3.0, **cut),
        fault("slow", ["node3"], at_step=35, at_s=3.5, factor=5),
        fault("cut", ["node0", "node1"], at_s=5.0, phase="end", **cut),
    ]
    first, second = outer_run(tmp_path, OuterPlan(), lines).faults
    assert (first.kind, first.nodes, first.ranks, first.at_step) == ("cut", ["node0", "node1"], [0, 1], 30)
    assert (first.at_s, first.end_s, first.for_s, first.factor) == (3.0, 5.0, 2.0, None)
    assert (second.kind, second.end_s, second.for_s, second.factor) == ("slow", None, None, 5.0)


def test_times_count_from_the_first_ranks_start(tmp_path: Path) -> None:
    folder = write_outer(tmp_path / "r", OuterPlan(start_s=0.5), [KILL])
    (folder / "rank0.jsonl").unlink()
    assert collect(folder).faults[0].at_s == pytest.approx(2.05)


@pytest.mark.parametrize(
    ("plan", "line", "stop"),
    [
        (OuterPlan(stops={(1, 27): 3.0, (3, 10): 1.0}, absences={2: Absence(after=25)}), KILL, (1, 3.1)),
        (OuterPlan(absences={1: Absence(after=30), 2: Absence(after=25)}), KILL, (1, 3.0)),  # to the end
        (
            OuterPlan(stops={(3, 27): 5.0, (1, 27): 0.2}),  # the nodes that a fault is done to are no survivors
            fault("hang", ["node3"], at_step=25, at_s=2.55, for_s=5),
            (1, 0.3),
        ),
        (  # of a cut, both sides survive
            OuterPlan(stops={(1, 30): 2.0}),
            fault("cut", ["node0", "node1"], at_step=30, at_s=3.0),
            (1, 2.1),
        ),
    ],
)
def test_a_fault_costs_the_survivors_longest_stop(
    plan: OuterPlan, line: Any, stop: tuple[int, float], tmp_path: Path
) -> None:
    cost = outer_run(tmp_path, plan, [line]).faults[0].cost
    assert (cost.stopped_rank, cost.longest_stop_s) == pytest.approx(stop)
    assert cost.median_step_s == pytest.approx(0.1)
    assert (cost.back_after_s, cost.back_at_step) == (None, None)


def test_a_stop_counts_for_the_time_of_a_fault_only(tmp_path: Path) -> None:
    plan = OuterPlan(stops={(0, 30): 4.0}, absences={2: Absence(after=25)})  # from 3.0 s to 7.1 s
    lines = [KILL, fault("hang", ["node3"], at_step=40, at_s=4.0, for_s=1)]
    first, second = outer_run(tmp_path, plan, lines).faults
    assert first.cost.longest_stop_s == pytest.approx(1.0)
    assert second.cost.longest_stop_s == pytest.approx(3.1)


def test_the_dead_are_not_counted_under_later_faults(tmp_path: Path) -> None:
    plan = OuterPlan(absences={2: RETURNED})
    lines = [KILL, fault("slow", ["node3"], at_step=30, at_s=3.0, factor=2), RESTART]
    lines += [fault("hang", ["node3"], at_step=55, at_s=6.5, for_s=1)]  # while rank 2 is not yet back
    assert [f.cost.longest_stop_s for f in outer_run(tmp_path, plan, lines).faults] == pytest.approx(
        [0.1, 0.1, 0.0, 0.1], abs=1e-3
    )


def test_a_validation_between_two_steps_is_no_stop(tmp_path: Path) -> None:
    def validating(_: int, lines: Lines) -> Lines:
        k = next((k for k, line in enumerate(lines) if line.get("step") == 40), len(lines))
        after = [{**line, "at_s": line["at_s"] + 5.0} for line in lines[k:]]
        validation = {"kind": "validation", "step": 39, "loss": 2.0, "tokens": 1}
        return [*lines[:k], *({**validation, "at_s": line["at_s"] - 0.1} for line in after[:1]), *after]

    plan = OuterPlan(ranks=3, absences={2: Absence(after=25)})
    cost = outer_run(tmp_path, plan, [KILL], edit=validating).faults[0].cost
    assert cost.longest_stop_s == pytest.approx(0.1, abs=1e-3)


def test_missed_rounds_belong_to_the_fault_before_them(tmp_path: Path) -> None:
    plan = OuterPlan(missed=[(0, 1), (0, 2), (1, 3), (1, 4), (3, 5)], absences={2: RETURNED})  # at 2, 3, 4, 5 and 6 s
    first, second = outer_run(tmp_path, plan, [KILL, fault("slow", ["node3"], at_step=45, at_s=4.5, factor=2)]).faults
    assert [(each.rank, each.rounds) for each in first.cost.missed] == [(0, 1), (1, 1)]
    assert [(each.rank, each.rounds) for each in second.cost.missed] == [(1, 1), (3, 1)]


@pytest.mark.parametrize(("absence", "back"), [(RETURNED, (1.6, 45)), (Absence(after=25), (None, None))])
def test_a_restart_says_when_and_where_the_rank_steps_again(absence: Absence, back: Any, tmp_path: Path) -> None:
    kill, restart = outer_run(tmp_path, OuterPlan(absences={2: absence}), [KILL, RESTART]).faults
    assert (restart.cost.back_after_s, restart.cost.back_at_step) == pytest.approx(back)
    assert kill.cost.back_after_s is None


@pytest.mark.parametrize(
    "torn",
    [b'{"kind": "kill", "no', b"[]", b"null", b'{"kind": "kill"}', json.dumps({**KILL, "phase": "middle"}).encode(),
     json.dumps({**KILL, "nodes": "node2"}).encode(), json.dumps({**KILL, "epoch_s": float("nan")}).encode()],
)  # fmt: skip
def test_a_torn_line_of_the_launcher_is_left_out_and_said(torn: bytes, tmp_path: Path) -> None:
    folder = write_outer(tmp_path / "r", OuterPlan(), [RESTART])
    with (folder / "faults.jsonl").open("ab") as file:
        file.write(torn)
    run = collect(folder)
    assert [f.kind for f in run.faults] == ["restart"]
    assert "1 line was cut off or garbled in faults.jsonl, and left out" in run.notices


def test_faults_of_a_run_without_rounds_are_told_too(tmp_path: Path) -> None:
    plan = OuterPlan(method="dense", every=1000, absences={rank: Absence(after=26) for rank in range(4)})
    run = outer_run(tmp_path, plan, [KILL], failure="node2 was killed at step 25")
    assert run.rounds is None
    assert (run.faults[0].ranks, len(run.progress)) == ([2], 4)


def test_byte_counts_are_not_compared_under_faults(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", short(DENSE), overcount=1.5)
    assert collect(folder).defects
    (folder / "faults.jsonl").write_text(json.dumps(KILL) + "\n")
    run = collect(folder)
    assert (run.defects, run.nodes, run.nic_over_model) == ([], [], None)
    assert run.nic_tx_bytes_per_step == pytest.approx(1.5 * 6.33e6, rel=0.05)
