from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from outer_runs import Absence, OuterPlan, outer_lines
from synthetic_runs import DENSE, ONEBIT, Plan, lines, short

from commopt.record.live import Follower, Live


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(live: Live, folder: Path, plan: Plan, *, until: int | None = None, failure: str | None = None) -> None:
    """Write a run's lines as four ranks would, with a tick after each."""
    folder.mkdir()
    live.begin(plan.method, folder)
    live.tick()
    for row in list(zip(*(lines(plan, rank) for rank in range(plan.ranks)), strict=True))[:until]:
        for rank, line in enumerate(row):
            append(folder, rank, line)
        live.tick()
    live.end(failure)


def append(folder: Path, rank: int, line: dict[str, Any]) -> None:
    with (folder / f"rank{rank}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_plain_lines_come_at_the_start_every_tenth_and_the_end(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        play(live, tmp_path / "r", short(DENSE, 100))
    said = out.getvalue().splitlines()
    assert len(said) == 11
    assert said[0] == "dense: starting"
    assert said[1].startswith("dense: step 10/100, loss ")
    assert "ms/step" in said[1]
    assert "% waiting" in said[1]
    assert said[-1].startswith("dense: finished 100 steps in ")


def test_plain_output_has_no_control_characters(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        play(live, tmp_path / "r", short(DENSE))
        live.note("[bold]a notice[/bold]")
    assert all(character == "\n" or character.isprintable() for character in out.getvalue())
    assert "[bold]a notice[/bold]" in out.getvalue()


def test_a_failed_run_says_how_far_it_came_and_why(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        play(live, tmp_path / "r", short(DENSE), until=20, failure="rank 2 was killed by signal 9")
    assert "dense: failed after 18 of 40 steps" in out.getvalue().splitlines()[-1]
    assert out.getvalue().endswith("rank 2 was killed by signal 9\n")


def test_leaving_early_ends_the_line(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        live.begin("dense", tmp_path)
    assert "failed after 0 of ? steps" in out.getvalue()


def test_a_terminal_gets_one_bar_per_run(tmp_path: Path) -> None:
    out = Terminal()
    with Live(out) as live:
        play(live, tmp_path / "a", short(DENSE))
        play(live, tmp_path / "b", short(ONEBIT), until=20, failure="rank 2 was killed by signal 9")
    last = out.getvalue().rsplit("dense", 1)[1]
    assert "40/40" in last
    assert "onebit_adam failed: rank 2 was killed by signal 9" in out.getvalue()


def test_half_a_line_waits_for_its_rest(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    start, begin, step = (json.dumps(line) + "\n" for line in lines(short(DENSE), 0)[:3])
    path = tmp_path / "rank0.jsonl"
    path.write_text(start + begin + step[:10])
    follower.poll()
    assert (follower.steps, follower.steps_planned) == (0, 40)
    path.write_text(start + begin + step)
    follower.poll()
    assert follower.steps == 1
    assert follower.records[0].unreadable_lines == 0


def test_bytes_per_step_come_from_the_interface_or_from_the_count(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    start, _, *steps = lines(short(DENSE), 0)[:8]
    append(tmp_path, 0, start)
    for index, step in enumerate(steps):
        append(tmp_path, 0, {**step, "payload_bytes": 100.0 * index})
    follower.poll()
    assert follower.bytes_per_step == 100.0
    append(tmp_path, 0, {**steps[0], "nic_tx_bytes": 1000})
    append(tmp_path, 0, {**steps[1], "nic_tx_bytes": 1107})
    follower.poll()
    assert follower.bytes_per_step == 107.0


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    append(tmp_path, 0, lines(short(DENSE), 0)[0])
    append(tmp_path, 0, {**lines(short(DENSE), 0)[2], "loss": None})
    follower.poll()
    assert follower.facts()[0] == "loss not finite"


def replay(live: Live, folder: Path, plan: OuterPlan) -> None:
    """Write the lines of all ranks in the order of their times, with a tick after each."""
    folder.mkdir()
    live.begin(plan.method, folder)
    for rank in range(plan.ranks):
        append(folder, rank, outer_lines(plan, rank)[0])
    rest = [(line["at_s"], rank, line) for rank in range(plan.ranks) for line in outer_lines(plan, rank)[1:]]
    for _, rank, line in sorted(rest, key=lambda each: each[:2]):
        append(folder, rank, line)
        live.tick()
    live.end(None)


def test_a_run_whose_ranks_may_leave_is_as_far_as_the_furthest(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        replay(live, tmp_path / "r", OuterPlan(absences={2: Absence(after=15)}, missed=[(0, 3), (1, 4)]))
    said = out.getvalue().splitlines()
    assert said[-2].startswith("noloco: step 54/60")
    assert "missed 2" in said[-2]
    assert "spread 0.0" in said[-2]
    assert said[-1].startswith("noloco: finished 60 steps in ")


def test_before_the_first_round_the_slowest_rank_counts(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    for rank, length in enumerate((9, 4)):
        for line in outer_lines(OuterPlan(), rank)[:length]:
            append(tmp_path, rank, line)
    follower.poll()
    assert follower.steps == 3


def test_a_rank_that_fell_silent_has_no_say_in_the_loss(tmp_path: Path) -> None:
    plan = OuterPlan(ranks=2, steps=200)
    for rank, length in enumerate((220, 60)):  # rank 1 is silent for the last 14 s
        for line in outer_lines(plan, rank)[:length]:
            append(tmp_path, rank, line)
    follower = Follower(tmp_path)
    follower.poll()
    assert follower.loss == follower.records[0].steps[-1].loss


def test_events_of_outer_runs_are_told_once(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        live.begin("noloco", tmp_path)
        for line in outer_lines(OuterPlan(steps=10), 2)[:-2]:
            append(tmp_path, 2, line)
        append(tmp_path, 2, {"kind": "event", "at_s": 1.0, "event": "caught up", "fields": {"step": 8}})
        live.tick()
        live.tick()
        for lost in range(30):
            append(tmp_path, 2, {"kind": "event", "at_s": 1.0, "event": "peer lost", "fields": {"peer": lost}})
        live.tick()
    said = out.getvalue().splitlines()
    assert said.count("noloco: rank 2: caught up, step 8") == 1
    assert sum("peer lost" in line for line in said) == 19
    assert said.count("noloco: more events are in the report") == 1


def test_what_several_ranks_tell_is_one_line(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        live.begin("noloco", tmp_path)
        for rank in (0, 1, 3):
            for line in outer_lines(OuterPlan(steps=10), rank)[:-2]:
                append(tmp_path, rank, line)
            lost = {"kind": "event", "at_s": 1.0, "event": "peer lost", "fields": {"rank": 2, "step": 10}}
            append(tmp_path, rank, lost)
            append(tmp_path, rank, {**lost, "event": "final average"})
        live.tick()
    assert [line for line in out.getvalue().splitlines() if "rank 2" in line] == [
        "noloco: ranks 0, 1, 3: peer lost, rank 2, step 10"
    ]
