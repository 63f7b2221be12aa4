from __future__ import annotations

import math
from pathlib import Path

import pytest
from outer_runs import Absence, OuterPlan, outer_run, write_outer
from synthetic_runs import DENSE, Lines, change, run_of, short

from commopt.report.results import collect

GONE = OuterPlan(absences={2: Absence(after=25)})


def test_rounds_are_merged_over_ranks(tmp_path: Path) -> None:
    rounds = outer_run(tmp_path, OuterPlan(missed=[(1, 2), (1, 4), (3, 0)])).rounds
    assert rounds is not None
    assert (rounds.rounds, rounds.missed) == (6, 3)
    assert [(rank.rounds, rank.missed) for rank in rounds.by_rank] == [(6, 0), (6, 2), (6, 0), (6, 1)]
    assert rounds.by_rank[1].missed_at_s == pytest.approx([3.0, 5.0])
    assert rounds.by_rank[1].alone == 2
    assert rounds.blocked_s == pytest.approx(0.01)
    assert rounds.blocked_share == pytest.approx(6 * 0.01 / 6)
    assert rounds.exchange_s == pytest.approx((21 * 0.2 + 3 * 0.5) / 24)
    assert rounds.bytes_per_step == pytest.approx(4e5)


def test_the_worst_rank_is_the_one_that_stands_still_longest(tmp_path: Path) -> None:
    edit = change("round", lambda rank, line: {"blocked_s": 0.05 if rank == 3 else line["blocked_s"]})
    rounds = outer_run(tmp_path, OuterPlan(), edit=edit).rounds
    assert rounds is not None
    assert (rounds.blocked_s, rounds.blocked_worst_s) == pytest.approx((0.02, 0.05))


def test_the_spread_of_a_round_is_the_root_mean_square_of_the_estimates(tmp_path: Path) -> None:
    estimates: list[list[float | None]] = [[0.3, 0.1], [0.4, None]]
    edit = change("round", lambda rank, line: {"spread": estimates[rank][line["round"]]})
    rounds = outer_run(tmp_path, OuterPlan(ranks=2, steps=20), edit=edit).rounds
    assert rounds is not None
    assert [point.step for point in rounds.spread] == [10, 20]
    assert [point.at_s for point in rounds.spread] == pytest.approx([1.0, 2.0])
    assert [point.spread for point in rounds.spread] == pytest.approx([math.sqrt(0.125), 0.1])
    assert rounds.spread_end == pytest.approx(0.1)


def test_without_a_window_the_payload_is_that_of_the_rounds(tmp_path: Path) -> None:
    run = outer_run(tmp_path, OuterPlan())
    assert (run.window_steps, run.payload_bytes_per_step) == pytest.approx((0, 4e5))
    assert run.notices == []


def test_a_run_goes_on_without_a_rank_that_leaves_or_never_wrote(tmp_path: Path) -> None:
    folder = write_outer(tmp_path, GONE)
    (folder / "rank1.jsonl").unlink()
    run = collect(folder)
    assert (run.status, run.failure) == ("finished", None)
    assert [(each.rank, each.steps) for each in run.ended_early] == [(1, 0), (2, 25)]
    assert "rank 2 ended early, after 25 of 60 steps; the others went on without it" in run.notices


def test_a_run_is_failed_if_the_launcher_says_so_or_no_rank_finished(tmp_path: Path) -> None:
    told = outer_run(tmp_path, GONE, failure="node2 ended with code 1")
    assert told.failure == "node2 ended with code 1; rank 2 stopped after 25 of 60 steps"
    ended = outer_run(tmp_path, OuterPlan(absences={rank: Absence(after=30 + rank) for rank in range(4)}))
    assert (told.status, ended.status, len(ended.ended_early)) == ("failed", "failed", 4)


def test_validation_is_that_of_the_ranks_that_finished_and_each_ones_own(tmp_path: Path) -> None:
    own = {"kind": "validation", "at_s": 6.0, "step": 60, "loss": 9.0, "tokens": 65536}
    run = outer_run(tmp_path, OuterPlan(), edit=lambda rank, lines: [*lines[:-2], own] if rank == 3 else lines)
    assert run.val_loss == pytest.approx((2.4 + 2.41 + 2.42) / 3)
    assert [each.rank for each in run.validation_by_rank] == [0, 1, 2, 3]
    assert [each.loss for each in run.validation_by_rank] == pytest.approx([2.4, 2.41, 2.42, 9.0])


def test_a_returned_rank_validates_beside_the_others(tmp_path: Path) -> None:
    run = outer_run(tmp_path, OuterPlan(absences={2: Absence(after=25, back_s=7.5, resumed_at=45)}))
    assert [validation.after_steps for validation in run.validations] == [60]
    assert run.val_loss == pytest.approx(2.415)
    assert any("rank 2 was started again after step 25, and went on at step 45" in notice for notice in run.notices)
    assert run.ended_early == []


def test_a_step_that_is_done_again_counts_once(tmp_path: Path) -> None:
    run = outer_run(tmp_path, OuterPlan(absences={2: Absence(after=25, back_s=7.5, resumed_at=20)}))
    assert (run.steps, run.status) == (60, "finished")
    assert run.tokens == (4 * 60 + 5) * 4096
    assert [part.steps[0] for part in run.progress[2].parts] == [1, 21]


def test_progress_is_thinned_and_keeps_the_pauses(tmp_path: Path) -> None:
    run = outer_run(tmp_path, OuterPlan(steps=3000, start_s=0.5, stops={(1, 1234): 5.0}))
    part = run.progress[1].parts[0]
    assert len(part.steps) < 220
    assert (part.steps[0], part.steps[-1]) == (1, 3000)
    pause = part.steps.index(1234)
    assert part.steps[pause + 1] == 1235
    assert part.at_s[pause] == pytest.approx(0.5 + 123.4)
    assert part.at_s[pause + 1] - part.at_s[pause] == pytest.approx(5.1)


def test_a_node_that_did_fewer_steps_is_counted_per_its_own(tmp_path: Path) -> None:
    def late(rank: int, lines: Lines) -> Lines:
        quarter = change("counters", lambda _, line: {"nic_tx_bytes": line["nic_tx_bytes"] // 4})(rank, lines)
        return [line for line in quarter if line["kind"] != "step" or line["step"] >= 30] if rank == 1 else lines

    run, whole = run_of(tmp_path, short(DENSE), edit=late), run_of(tmp_path / "all", short(DENSE))
    assert run.nic_tx_bytes_per_step == pytest.approx(whole.nic_tx_bytes_per_step)


def test_the_wall_clock_runs_until_the_last_rank_is_done(tmp_path: Path) -> None:
    run = outer_run(tmp_path, OuterPlan(start_s=0.5, absences={2: Absence(after=25, back_s=20.0, resumed_at=0)}))
    assert run.wall_s == pytest.approx(20.0 + 6.0)
