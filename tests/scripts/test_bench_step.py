"""What scripts/bench/step.py says about numbers that it has stored, and what it refuses; nothing here is timed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from script import module

from commopt.record.lines import RankRecord

bench, says = module("step"), module("step_results")
emulated, sheets, store = module("emulated"), module("sheets"), module("store")
module("building")  # which step.py imports when it needs it


def cell(method: str = "ef_sign", cluster: str = "50mbit", **other: Any) -> dict[str, Any]:
    """A stored cell: 100 ms a step, and 500 kB each way on a link of 6.25 MB/s, which are 80 ms."""
    counts = {f"node{n}": {"sent": 400e3, "received": 400e3} for n in range(4)}
    counts["node2"]["received"] = 500e3
    return {
        "name": f"{cluster}-1m-{method}",
        "cluster": cluster,
        "model": "1m",
        "method": method,
        "rate": None if cluster == "unshaped" else cluster,
        "status": "finished",
        "failure": None,
        "parameters": 1_065_344,
        "step_s": 0.1,
        "step_mean_s": other.get("step_s", 0.1),
        "compute_s": 0.05,
        "interface_bytes": counts,
        "payload_bytes": 390e3,
        "wall_s": 20.0,
        "others_cores": 0.0,
        "environment": {"cpu_count": 2},
        **other,
    }


def two(method: str = "ef_sign", **other: Any) -> dict[str, Any]:
    """A stored cell of two nodes with a core each."""
    return cell(method, **{"cluster": "two-50mbit", "rate": "50mbit", "nodes": 2, **other})


def failed(method: str, why: str) -> dict[str, Any]:
    nothing: dict[str, Any] = dict.fromkeys(("step_s", "step_mean_s", "compute_s", "payload_bytes", "parameters"))
    return cell(method, status="failed", failure=why, interface_bytes={}, **nothing)


def drawn(results: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> str:
    report = says.report(results)
    sheets.show(report.sheets, report.remarks)
    return capsys.readouterr().out


def row(text: str, method: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [method]]
    return line.split()[1:]


def test_the_floor_is_of_the_busiest_node_and_direction() -> None:
    assert says.floor_s(cell()) == pytest.approx(0.08)
    assert says.ratio_to_floor(cell()) == pytest.approx(0.1 / 0.08)
    assert says.ratio_to_floor(cell(compute_s=0.09)) == pytest.approx(0.1 / 0.09)  # compute takes longer
    assert says.floor_s(cell(cluster="unshaped")) is None
    assert says.floor_s(cell(interface_bytes={})) is None
    assert says.floor_s(cell(interface_bytes={"node0": {"sent": None, "received": None}})) is None


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (two(), (1.15, False)),
        (two(step_s=0.09), (1.15, True)),
        (two(cluster="two-1gbit", rate="1gbit", step_s=0.05), (1.15, True)),
        (cell(), None),  # whose ranks share cores
        (two("dense"), None),
        (two("torch_fp16"), None),
        (two("a_method_of_tomorrow", step_s=0.09), (1.15, True)),
        (two(rate=None, step_s=0.11), (1.15, True)),
        (two("dense", rate=None, step_s=0.14), (1.15, False)),
        (failed("ef_sign", "it died"), None),
    ],
)
def test_targets(result: dict[str, Any], expected: tuple[float, bool] | None) -> None:
    assert says.verdict(result, cell("torch_ddp")) == expected
    if result["rate"] is None:
        assert says.verdict(result, None) is None


def test_the_table_shows_each_cell_and_marks_the_peers(capsys: pytest.CaptureFixture[str]) -> None:
    results = [cell(), cell("torch_ddp", step_s=0.2), failed("torch_powersgd", "sizes differ: 3264 vs 768")]
    text = drawn(results, capsys)
    assert "4 nodes, 50mbit, GPT of 1.07 M parameters" in text
    assert " ".join(row(text, "ef_sign")) == "100 50.0 80.0 1.25 0.50 500 kB 390 kB"
    assert " ".join(row(text, "torch_ddp")) == "* 200 50.0 80.0 2.50 1.00 500 kB 390 kB"
    assert row(text, "torch_powersgd") == ["*", "failed"]
    assert "50mbit-1m-torch_powersgd failed: sizes differ: 3264 vs 768" in text
    assert "4 ranks shared 2 cores" in text
    assert row(drawn([two(others_cores=0.7)], capsys), "ef_sign")[-3:] == ["1.15", "missed", "?"]  # in doubt


def test_the_overview_has_a_column_for_each_cluster_and_a_ratio_for_each_step() -> None:
    unshaped: dict[str, Any] = {"cluster": "two-unshaped", "rate": None, "step_s": 0.06}
    cells = [two(), two(**unshaped), two("torch_ddp", **{**unshaped, "step_s": 0.12}), two("dense", step_s=None)]
    (sheet,) = says.overview(cells)
    assert sheet.title.startswith("2 nodes with a core each, GPT of 1.07 M parameters")
    assert list(sheet.headings) == ["method", "50mbit", "unshaped, over DDP"]
    assert sheet.rows == [
        ["`ef_sign`", "100, 1.25", "60.0, 0.50"],
        ["`torch_ddp`", "", "120, 1.00"],
        ["`dense`", "failed", ""],
    ]


def test_one_table_for_each_cluster_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    text = drawn([cell(), cell(cluster="unshaped"), cell(model="5m", parameters=4_900_000)], capsys)
    titles = [line.split(", GPT")[0].strip() for line in text.splitlines() if ", GPT" in line]
    assert titles == ["4 nodes, 50mbit", "4 nodes, unshaped", "4 nodes, 50mbit"]


def test_what_spoils_a_number_is_told() -> None:
    drifted = cell("dgc", events=["replicas have drifted apart: no details (all ranks)"])
    lines = says.remarks([drifted, cell(others_cores=0.7), cell("fp16", step_mean_s=0.2), cell("dense", step_s=None)])
    assert any("up to 0.7 cores" in line and line.endswith(": 50mbit-1m-ef_sign") for line in lines)
    assert "~ 50mbit-1m-fp16: its steps are not alike, and take 200 ms on average" in lines
    assert "50mbit-1m-dgc: replicas have drifted apart: no details (all ranks)" in lines
    assert "50mbit-1m-dense: no step was past the method's warm-up" in lines
    assert not any("cores meanwhile" in line for line in says.remarks([cell()]))
    assert says.outcome(cell(others_cores=None)) == "100 ms a step, 1.25 x max(compute, floor)"
    assert says.outcome(cell(others_cores=1.0)).endswith("other programs on 1.0 cores")
    assert says.outcome(failed("ef_sign", "it died")) == "failed: it died"


def test_bytes_of_a_window_are_per_step_and_each_way() -> None:
    ranks = {rank: RankRecord(rank, {"node": f"node{rank}"}) for rank in (0, 1)}
    traffic = {"payload_bytes": 0.0, "by_peer": {}, "by_operation": []}
    step = {"kind": "step", "loss": 1.0, "seconds": 0.1, "wait_s": 0.0, "tokens": 1, "steady": True, "at_s": 0.0}
    counters = {"kind": "counters", "at_s": 0.0}
    for record, sent, received in zip(ranks.values(), (200, 80), (40, 210), strict=True):
        lines: list[dict[str, Any]] = [
            {**counters, "name": "begin", "traffic": {**traffic, "nic_rx_bytes": 50}, "nic_tx_bytes": 100},
            {**step, "step": 0},
            {**step, "step": 1},
            {
                **counters,
                "name": "end",
                "traffic": {**traffic, "nic_rx_bytes": 50 + received},
                "nic_tx_bytes": 100 + sent,
            },
        ]
        for line in lines:
            record.feed(json.dumps(line).encode())
    assert not any(record.unreadable_lines for record in ranks.values())
    # 280 bytes were sent, and those who received 250 of them saw fewer headers
    assert bench.interface_bytes(ranks) == {
        "node0": {"sent": 100.0, "received": pytest.approx(22.4)},
        "node1": {"sent": 40.0, "received": pytest.approx(117.6)},
    }
    assert bench.interface_bytes({**ranks, 1: RankRecord(1)}) == {}


@pytest.mark.parametrize("method", bench.all_methods())
def test_every_method_can_be_made_and_has_steady_steps(method: str) -> None:
    settings = bench.settings_of(bench.Cell("50mbit", "1m", method))
    words = bench.program_words(bench.Cell("50mbit", "1m", method), settings)
    assert 15 <= settings["steps"] <= 40
    assert words[1:] == [method, json.dumps(settings)]


def test_the_peers_are_those_that_the_program_knows() -> None:
    assert set(module("step_peers").PEERS) == set(says.PEERS)


def test_a_stall_is_noticed_and_progress_is_none(tmp_path: Path) -> None:
    watchdog, record = bench.Watchdog(tmp_path, 10.0), tmp_path / "rank0.jsonl"
    for second in (5, 14, 23):
        record.write_text("x" * second)
        watchdog(second)
    watchdog(33.0)
    with pytest.raises(bench.StalledError, match="no rank got on for 10 s"):
        watchdog(33.5)


def test_last_words_name_the_cause_before_what_followed(tmp_path: Path) -> None:
    (tmp_path / "node0.log").write_text("terminate called\n  what():  Connection closed by peer [10.77.0.2]\n")
    (tmp_path / "node1.log").write_text("step 1\nterminate called\n  what():  sizes differ\n")
    assert bench.last_words(tmp_path) == ["sizes differ", "Connection closed by peer [10.77.0.2]"]


def test_a_method_that_cannot_be_made_or_has_a_long_warm_up_is_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "OPTIONS", {"ef_sign": {"block_size": 7}, "onebit_adam": {"freeze_step": 5000}})
    assert bench.makeable(["dense", "ef_sign", "onebit_adam", "torch_ddp"]) == ["dense", "torch_ddp"]
    refused, long = capsys.readouterr().out.splitlines()
    assert refused.startswith("left out: method ef_sign: block_size: 7 is out of range")
    assert long.startswith("left out: method onebit_adam: is steady after 5000 steps only; give it OPTIONS")


def test_stored_cells_are_drawn_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    settings = bench.settings_of(bench.Cell("50mbit", "1m", "ef_sign"))
    store.Store(tmp_path / "cells.jsonl").put("50mbit-1m-ef_sign", settings, cell())
    place = ["--results", str(tmp_path / "cells.jsonl"), "--json", str(tmp_path / "all.json")]
    place += ["--clusters", "50mbit", "--models", "1m"]
    bench.run(bench.parser().parse_args([*place, "--methods", "ef_sign"]))
    text = capsys.readouterr().out
    assert text.startswith("0 cells to measure, 1 are stored already (--redo measures them again)")
    assert row(text, "ef_sign")[3] == "1.25"
    assert [table["rows"][0][0] for table in json.loads((tmp_path / "all.json").read_text())["tables"]] == ["ef_sign"]
    bench.run(bench.parser().parse_args([*place, "--table"]))
    assert row(capsys.readouterr().out, "ef_sign")[3] == "1.25"


def test_a_cell_stored_with_other_settings_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[dict[str, Any]] = []
    monkeypatch.setattr(emulated, "run_child", plans.append)
    cells = [bench.Cell(cluster, "1m", "ef_sign") for cluster in ("50mbit", "unshaped")]
    for one in cells:
        settings = {**bench.settings_of(one), "steps": 3}
        store.Store(tmp_path / "cells.jsonl").put(one.name, settings, cell(cluster=one.cluster))
    bench.sweep(cells, tmp_path / "cells.jsonl")
    assert [[entry["cell"]["cluster"] for entry in plan["cells"]] for plan in plans] == [["50mbit"], ["unshaped"]]
    assert [(plan["done"], plan["total"]) for plan in plans] == [(0, 2), (1, 2)]
