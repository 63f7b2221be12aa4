from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from synthetic_runs import DENSE, ONEBIT, Plan, lines, short

from commopt.report.live import Follower, Live


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
