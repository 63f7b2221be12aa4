from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from outer_runs import Absence, OuterPlan, outer_lines
from synthetic_runs import DENSE, ONEBIT, Plan, Terminal, lines, short

import commopt.record.live as live_module
from commopt.record.board import Board
from commopt.record.live import Follower, Live


def append(folder: Path, rank: int, *written: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    with (folder / f"rank{rank}.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in written)


def play(live: Live, folder: Path, name: str, written: Iterable[tuple[int, dict[str, Any]]]) -> None:
    """Write lines of ranks, with a tick after each."""
    live.begin(name, folder)
    for rank, line in written:
        append(folder, rank, line)
        live.tick()


def in_turn(plan: Plan, until: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """The first lines of a plan's ranks, which write in turn."""
    rows = list(zip(*(lines(plan, rank) for rank in range(plan.ranks)), strict=True))[:until]
    return [(rank, line) for row in rows for rank, line in enumerate(row)]


def followed(folder: Path) -> Follower:
    follower = Follower(folder)
    follower.poll()
    return follower


def test_plain_lines_come_at_the_start_every_tenth_and_the_end(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        play(live, tmp_path, "dense", in_turn(short(DENSE, 100)))
        live.end()
        live.note("[bold]a notice[/bold]")
    *said, notice = out.getvalue().splitlines()
    assert len(said) == 11
    assert said[0] == "dense: starting"
    assert said[1].startswith("dense: step 10/100, loss ")
    assert "ms/step" in said[1]
    assert "% waiting" in said[1]
    assert said[-1].startswith("dense: finished 100 steps in ")
    assert notice == "[bold]a notice[/bold]"
    assert all(character == "\n" or character.isprintable() for character in out.getvalue())


def test_a_failed_run_says_how_far_it_came_and_why(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        play(live, tmp_path / "r", "dense", in_turn(short(DENSE), until=20))
        live.end("rank 2 was killed by signal 9")
        assert "dense: failed after 18 of 40 steps" in out.getvalue().splitlines()[-1]
        assert out.getvalue().endswith("rank 2 was killed by signal 9\n")
        live.begin("dense", tmp_path)  # and is left early
    assert "failed after 0 of ? steps" in out.getvalue()


def test_a_terminal_gets_one_row_per_run(tmp_path: Path) -> None:
    out = Terminal()
    with Live(out) as live:
        play(live, tmp_path / "a", "dense", in_turn(short(DENSE)))
        live.end()
        play(live, tmp_path / "b", "onebit_adam", in_turn(short(ONEBIT), until=20))
        live.end("rank 2 was killed by signal 9")
    last = out.getvalue().rsplit("dense", 1)[1]
    assert "40/40" in last
    assert "onebit_adam failed: rank 2 was killed by signal 9" in out.getvalue()


def test_a_board_gets_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = short(DENSE)
    with Live(io.StringIO(), Board(tmp_path / "board")) as live:
        play(live, tmp_path / "a", "dense", in_turn(plan))
        live.end()
        play(live, tmp_path / "b", "onebit_adam", in_turn(short(ONEBIT), until=20))
        append(
            tmp_path / "b",
            0,
            {**lines(short(ONEBIT), 0)[20], "nic_tx_bytes": 10},
            {**lines(short(ONEBIT), 0)[21], "nic_tx_bytes": 20},
        )
        live.end()
    dense, onebit = (EventAccumulator(str(tmp_path / "board" / name)).Reload() for name in ("dense", "onebit_adam"))
    assert [event.step for event in dense.Scalars("loss")] == list(range(40))
    first = [
        line for rank in range(plan.ranks) for line in lines(plan, rank) if line["kind"] == "step" and line["step"] == 0
    ]
    assert dense.Scalars("loss")[0].value == pytest.approx(fmean(line["loss"] for line in first))
    assert dense.Scalars("step/milliseconds")[0].value == pytest.approx(1e3 * fmean(line["seconds"] for line in first))
    assert len(onebit.Scalars("loss")) == 18
    assert [event.value for event in onebit.Scalars("step/bytes sent by its machine")] == [10.0]


def test_a_program_that_records_nothing_is_asked_about_once(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        live.begin("dense", tmp_path)
        live.tick()
        live._began_s -= 41.0
        live.tick()
        live.tick()
    asked = "dense: no step in 40 s; does the program call commopt.attach, and step run.optimizer?"
    assert out.getvalue().splitlines()[:2] == ["dense: starting", asked]
    assert out.getvalue().count("no step in") == 1


def test_a_run_of_unknown_length_without_losses_is_followed(tmp_path: Path) -> None:
    out = io.StringIO()
    written = [
        (rank, {key: x for key, x in line.items() if key != "loss"} | ({"steps": 0} if line["kind"] == "start" else {}))
        for rank, line in in_turn(short(DENSE), until=20)
    ]
    with Live(out) as live:
        play(live, tmp_path, "dense", written)
        live._began_s -= 11.0
        live.tick()
        live.tick()
        live.end()
    _, step, ended = out.getvalue().splitlines()
    assert step.startswith("dense: step 18, 1")
    assert "loss" not in step + ended
    assert ended.startswith("dense: finished 18 steps in ")


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


def test_bytes_per_step_come_from_the_interface(tmp_path: Path) -> None:
    start, _, *steps = lines(short(DENSE), 0)[:8]
    append(tmp_path, 0, start, *steps, {**steps[0], "nic_tx_bytes": 1000})
    assert followed(tmp_path).bytes_per_step is None
    append(tmp_path, 0, {**steps[1], "nic_tx_bytes": 1107})
    assert followed(tmp_path).bytes_per_step == 107.0


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    start, _, step = lines(short(DENSE), 0)[:3]
    append(tmp_path, 0, start, {**start, "steps": None}, {**step, "loss": None})  # the second start cannot be read
    assert (followed(tmp_path).facts()["loss"], followed(tmp_path).steps_planned) == ("not finite", 40)


def test_a_run_whose_ranks_may_leave_is_as_far_as_the_furthest(tmp_path: Path) -> None:
    out, plan = io.StringIO(), OuterPlan(absences={2: Absence(after=15)}, missed=[(0, 3), (1, 4)])
    each = [(rank, line) for rank in range(plan.ranks) for line in outer_lines(plan, rank)]
    with Live(out) as live:
        each.sort(key=lambda written: (written[1]["kind"] != "start", written[1]["at_s"], written[0]))
        play(live, tmp_path, "noloco", each)
        live.end()
    said = out.getvalue().splitlines()
    assert said[-2].startswith("noloco: step 54/60")
    assert "missed 2" in said[-2]
    assert "spread 0.0" in said[-2]
    assert said[-1].startswith("noloco: finished 60 steps in ")


def test_before_the_first_round_the_slowest_rank_counts(tmp_path: Path) -> None:
    for rank, length in enumerate((9, 4)):
        append(tmp_path, rank, *outer_lines(OuterPlan(), rank)[:length])
    assert followed(tmp_path).steps == 3


def test_a_silent_rank_does_not_count_in_the_loss(tmp_path: Path) -> None:
    plan = OuterPlan(ranks=2, steps=200)
    for rank, length in enumerate((220, 60)):  # rank 1 is silent for the last 14 s
        append(tmp_path, rank, *outer_lines(plan, rank)[:length])
    follower = followed(tmp_path)
    assert follower.loss == follower.records[0].steps[-1].loss


def event(kind: str, **fields: int) -> dict[str, Any]:
    return {"kind": "event", "at_s": 1.0, "event": kind, "fields": fields}


def test_events_of_outer_runs_are_told_once_and_in_one_line_for_all_ranks(tmp_path: Path) -> None:
    out = io.StringIO()
    with Live(out) as live:
        live.begin("noloco", tmp_path)
        for rank in (0, 1, 3):
            written = outer_lines(OuterPlan(steps=10), rank)[:-2]
            append(tmp_path, rank, *written, event("peer lost", rank=2, step=10), event("final average", rank=2))
        append(tmp_path, 3, event("caught up", step=8))
        live.tick()
        live.tick()
        append(tmp_path, 3, *(event("peer left", peer=lost) for lost in range(30)))
        live.tick()
    said = out.getvalue().splitlines()
    assert [line for line in said if "rank 2" in line] == ["noloco: ranks 0, 1, 3: peer lost, rank 2, step 10"]
    assert said.count("noloco: rank 3: caught up, step 8") == 1
    assert sum("peer left" in line for line in said) == 18
    assert said.count("noloco: more events are in the report") == 1


def test_without_a_terminal_a_line_comes_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    stream = io.StringIO()
    live = Live(stream)
    live.begin("dense", tmp_path)
    for _ in range(1000):
        now[0] += 0.2
        live.tick()
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["dense: starting", "dense: starting, 3 s", "dense: starting, 5 s"]
    assert 70 < len(lines) < 90
