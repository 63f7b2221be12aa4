from __future__ import annotations

import json
from pathlib import Path

import pytest
from outer_runs import Absence, OuterPlan, outer_lines
from synthetic_runs import EPOCH_S, Lines

from commopt.record.lines import RankRecord
from commopt.record.recorder import Recorder, RoundReport
from commopt.report.results import collect

RETURNED = OuterPlan(absences={2: Absence(after=25, back_s=7.5, resumed_at=45)})


def fed(lines: Lines) -> RankRecord:
    record = RankRecord(2)
    for line in lines:
        record.feed(json.dumps(line).encode())
    return record


def test_a_round_is_written_and_read_again(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.start(method="noloco", options={}, parameters=1, steps=1)
    costs = {"blocked_s": 0.01, "exchange_s": 0.6, "nbytes": 3.5e6}
    recorder.round(RoundReport(step=49, round=3, members=[0, 2], missed=False, **costs, spread=0.013))
    recorder.round(RoundReport(step=99, round=4, members=[0], missed=True, **costs, spread=float("nan")))
    recorder.end()
    first, second = RankRecord.read(tmp_path / "rank0.jsonl").rounds
    assert (first.step, first.round, first.members, first.missed) == (49, 3, [0, 2], False)
    assert (first.blocked_s, first.exchange_s, first.nbytes, first.spread) == (0.01, 0.6, 3.5e6, 0.013)
    assert (second.members, second.missed, second.spread) == ([0], True, None)


def test_a_rank_that_returns_goes_on_with_its_record_and_its_clock() -> None:
    lines = outer_lines(RETURNED, 2)
    just_back = fed(lines[: 1 + max(k for k, line in enumerate(lines) if line["kind"] == "start")])
    assert (just_back.steps_done, [done[-1:] for _, done in just_back.parts()]) == (45, [[25], []])
    record = fed(lines)
    assert len(record.steps) == 25 + 15
    assert [line.round for line in record.rounds] == [0, 1, 4, 5]
    assert record.steps_done == 60
    assert record.validations[-1].steps == 60
    assert (record.starts, record.ended) == (1, True)
    assert record.epoch_s == EPOCH_S
    assert (record.steps[25].at_s, record.last_s) == pytest.approx((7.6, 9.0))


def test_a_clock_that_was_set_back_does_not_turn_time_back() -> None:
    back = {EPOCH_S + 7.5: EPOCH_S - 3600}
    lines = [{**line, "epoch_s": back.get(line.get("epoch_s", 0.0), EPOCH_S)} for line in outer_lines(RETURNED, 2)]
    assert fed(lines).steps[25].at_s == pytest.approx(2.5 + 0.1)


def test_a_start_that_resumes_at_nothing_starts_afresh() -> None:
    lines = outer_lines(OuterPlan(absences={2: Absence(after=25, back_s=7.5, resumed_at=0)}), 2)
    record = fed(lines)
    assert (len(record.steps), len(record.rounds), record.starts) == (60, 6, 2)
    assert record.steps[0].at_s == pytest.approx(0.1)


def test_bytes_of_the_process_that_ended_are_not_those_of_the_next() -> None:
    lines = outer_lines(RETURNED, 2)
    counted = {"payload_bytes": 1e9, "by_peer": {}, "by_operation": []}
    begin = {"kind": "counters", "at_s": 0.0, "name": "begin", "traffic": counted, "nic_tx_bytes": None}
    lines.insert(1, begin)
    lines.insert(len(lines) - 1, {**begin, "name": "end", "traffic": {**counted, "payload_bytes": 5.0}})
    assert fed(lines).window() is None


@pytest.mark.parametrize("key", ["members", "missed", "spread", "nbytes", "round"])
def test_a_round_that_lacks_something_is_counted_as_unreadable(key: str) -> None:
    lines = outer_lines(OuterPlan(steps=10), 2)
    del next(line for line in lines if line["kind"] == "round")[key]
    record = fed(lines)
    assert (record.unreadable_lines, record.rounds) == (1, [])


def test_a_line_that_the_kill_tore_does_not_take_the_next_start_with_it(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in outer_lines(RETURNED, 0)[:20]) + '{"kind": "st')
    recorder = Recorder(tmp_path)
    recorder.start(method="noloco", options={}, parameters=1, steps=60, resumed_at=30)
    recorder.end()
    record = RankRecord.read(path)
    assert (record.unreadable_lines, [at for _, at in record.begins[1:]]) == (1, [30])


def test_without_a_launcher_rounds_are_told_beside_steps(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(None)
    recorder.start(method="noloco", options={}, parameters=1, steps=40)
    for step in range(40):
        recorder.step(step=step, loss=1.0, seconds=0.1, wait_s=0.0, tokens=1, steady=True)
        costs = {"blocked_s": 0.0, "exchange_s": 0.0, "nbytes": 1.0}
        recorder.round(RoundReport(step, step, [0], missed=step in (5, 6), **costs, spread=0.0131))
    recorder.end()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 22
    assert said[2].endswith(", spread 0.013")
    assert "missed" not in said[2]
    assert [line.split(":")[0] for line in said if line.endswith("spread 0.013, 2 rounds missed")] == ["step 7"]


def test_a_first_start_may_resume_a_training_of_another_record(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.start(method="dense", options={}, parameters=1, steps=12, resumed_at=10)
    for step in (10, 11):
        recorder.step(step=step, loss=1.0, seconds=0.1, wait_s=0.0, tokens=1, steady=True)
    recorder.validation(step=12, loss=1.0, tokens=1)
    recorder.end()
    run = collect(tmp_path)
    assert (run.status, run.steps, run.validations[0].after_steps) == ("finished", 2, 12)


def test_a_rank_that_left_steps_out_is_as_far_as_its_last_step() -> None:
    lines = [line for line in outer_lines(OuterPlan(), 2) if not 20 <= line.get("step", 0) < 41]
    record = fed(lines)
    assert (len(record.steps), record.steps_done, record.validations[-1].steps) == (39, 60, 60)
    (steps, done), = record.parts()  # fmt: skip
    assert (len(steps), done[18:22]) == (39, [19, 20, 42, 43])


def test_steps_that_are_numbered_oddly_are_counted() -> None:
    lines = [{**line, "step": 7} if line["kind"] == "step" else line for line in outer_lines(OuterPlan(), 2)]
    assert fed(lines).steps_done == 60
