"""What scripts/bench/outer.py trains, in which order, and what it says about losses that it has stored."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from script import BENCH, module

from commopt.methods import METHODS

Store, sheets = module("store").Store, module("sheets")
cells = module("outer_cells")
training, says = module("outer_training"), module("outer_results")


class Shelf:
    """Results by cell, and a `find` that reads them."""

    def __init__(self, protocol: Any, entries: Any) -> None:
        self.protocol, self.entries, self.found = protocol, entries, dict[str, dict[str, Any]]()

    def find(self, cell: Any) -> dict[str, Any] | None:
        return self.found.get(cell.name)

    def train(self, loss: Callable[[Any], float | None]) -> list[str]:
        """Train what the protocol wants, one at a time, and return the names in order."""
        order = []
        while (cell := next(self.protocol.wanted(self.entries, self.find), None)) is not None:
            value = loss(cell)
            self.found[cell.name] = {
                "loss": value,
                "losses": [value] * cell.ranks,
                "averaged_loss": value,
                "curve": [(80, value, value), (800, value, value)],
                "spreads": [(779, 0.04), (780, 0.01), (799, 0.04), (800, 0.02)],
                "spread_estimate": 0.03,
                "bytes": 0.2,
                "missed": 0,
                "seconds": 30.0,
                "cpu_seconds": 20.0,
            }
            order.append(cell.name)
        return order


def bowl(best: float, **worse_by: float) -> Callable[[Any], float]:
    """A loss that is least at one rate, and worse by so many percent for the labels named."""

    def loss(cell: Any) -> float:
        percent = worse_by.get(cell.entry.label, 0.0)
        return float(2.0 + abs(math.log2(cell.rate / best)) + 0.01 * cell.seed) * (1 + percent / 100)

    return loss


def test_every_entry_can_be_trained_and_every_outer_method_has_one() -> None:
    assert {entry.label: cells.why_not(entry) for entry in cells.ENTRIES} == dict.fromkeys(cells.BY_LABEL)
    outer = {name for name, method in METHODS.items() if method.kind == "outer"}
    assert {entry.method for entry in cells.ENTRIES} == {"dense", *outer}


def test_what_is_compared_differs_in_the_method_alone() -> None:
    compared = [cells.settings_of(cells.Cell(e, 4, 1e-3, 1), cells.Task()) for e in cells.ENTRIES if not e.is_extra]
    for settings in compared:
        assert {**settings, "method": "", "options": {}} == {**compared[0], "method": "", "options": {}}
    assert {settings["options"]["every"] for settings in compared if settings["method"] != "dense"} == {20}


def test_periods_and_overlaps_follow_the_task() -> None:
    task = replace(cells.Task(), every=10)
    assert cells.BY_LABEL["noloco_delay"].options_of(task) == {"every": 10, "delay": 5}
    assert cells.BY_LABEL["diloco_rare"].options_of(task)["every"] == 20
    assert cells.BY_LABEL["choco"].options_of(task) == {}


def test_rates_come_first_then_seeds_then_more_replicas_then_extras() -> None:
    entries = [cells.BY_LABEL[label] for label in ("dense", "diloco", "diloco_heavy", "noloco", "noloco_lr1")]
    order = Shelf(cells.Protocol(), entries).train(bowl(3e-3))
    first = [f"4-dense-{rate:g}-1" for rate in cells.RATES]
    first += [f"4-{label}-{rate:g}-1" for rate in cells.RATES for label in ("diloco", "diloco_heavy", "noloco")]
    assert order[:12] == first
    assert order[12:14] == ["4-dense-0.003-2", "4-dense-0.003-3"]
    assert order[-2:] == ["16-noloco-0.003-1", "4-noloco_lr1-0.003-1"]
    assert [name for name in order if name.startswith("8-")] == [f"8-{e.label}-0.003-1" for e in entries[:-1]]


def test_one_rate_for_all_outer_methods_is_chosen_by_their_mean() -> None:
    entries, protocol = [cells.BY_LABEL[label] for label in ("diloco", "diloco_heavy", "noloco")], cells.Protocol()
    shelf = Shelf(protocol, entries)

    def loss(cell: Any) -> float:  # the others like a lower rate, but noloco minds more
        weight, best = (0.5, 6e-3) if cell.entry.label == "noloco" else (0.1, 1.5e-3)
        return 2.0 + weight * abs(math.log2(cell.rate / best))

    order = shelf.train(loss)
    assert protocol.best_rate("outer", shelf.find) == 6e-3
    assert "4-noloco-0.012-1" in order  # beyond the edge
    assert not protocol.is_at_edge("outer", shelf.find)
    assert protocol.best_rate("dense", shelf.find) is None


@pytest.fixture
def tiny() -> Any:
    sizes = {"layers": 1, "heads": 1, "width": 8, "context": 16, "batch": 2}
    return replace(cells.Task(), sizes=sizes, steps=12, every=4, held_out=4)


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth() -> None:
    task = asdict(cells.Task())
    rates = [training.rate_at(step, task) for step in range(task["steps"])]
    assert rates[:2] == [1 / 80, 2 / 80]
    assert (rates[79], max(rates)) == (1.0, 1.0)
    assert rates[80 + 360] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(x > y for x, y in itertools.pairwise(rates[80:]))


def test_spread_is_the_rms_distance_from_the_mean_over_its_norm() -> None:
    replicas = [torch.tensor([3.0, 4.0]), torch.tensor([3.0, 10.0]), torch.tensor([3.0, 1.0])]
    assert training.spread_of(replicas) == pytest.approx(math.sqrt((1 + 25 + 16) / 3) / math.hypot(3, 5))


def test_replicas_are_apart_between_rounds_and_agree_after_one(tiny: Any) -> None:
    made = training.run_cell(cells.settings_of(cells.Cell(cells.BY_LABEL["diloco_heavy"], 3, 1e-2, 1), tiny))
    spreads = dict(made["spreads"])
    assert list(spreads) == [3, 4, 7, 8, 11, 12]
    assert all((spread > 1e-3) == (step % 4 == 3) for step, spread in spreads.items())
    assert made["losses"] == [made["averaged_loss"]] * 3
    assert made["curve"][-1][:2] == (12, pytest.approx(made["loss"]))
    assert made["missed"] == 0
    sketches = 2 * 2048 / made["parameters"] / 12  # to two peers, at the first round only: one is due in ten steps
    assert made["bytes"] == pytest.approx(8 * 2 / 3 / 4 + sketches, rel=0.05)
    json.dumps(made, allow_nan=False)


def test_the_loss_of_the_mean_replica_is_what_a_final_average_ends_with(tiny: Any) -> None:
    without = training.run_cell(cells.settings_of(cells.Cell(cells.BY_LABEL["noloco"], 4, 1e-2, 1), tiny))
    averaging = cells.Entry("x", "noloco", {"final_average": True})
    made, again = (training.run_cell(cells.settings_of(cells.Cell(averaging, 4, 1e-2, 1), tiny)) for _ in range(2))
    assert made["losses"] == again["losses"]
    assert without["loss"] != pytest.approx(without["averaged_loss"], abs=1e-6)
    assert made["losses"] == pytest.approx([without["averaged_loss"]] * 4, abs=1e-6)


def test_dense_trains_one_replica_on_the_mean_gradient(tiny: Any) -> None:
    settings = cells.settings_of(cells.Cell(cells.BY_LABEL["dense"], 2, 1e-2, 1), tiny)
    made = training.run_cell(settings)
    problem = training.gpt(**tiny.sizes)
    torch.manual_seed(1)
    model = problem.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    data = [torch.Generator().manual_seed(1000 + rank) for rank in range(2)]
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 1e-2 * training.rate_at(step, asdict(tiny))
        optimizer.zero_grad()
        for generator in data:
            (model(*problem.draw(generator)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert made["loss"] == pytest.approx(training.validation(model, problem, 4), rel=1e-4)
    assert [spread for _, spread in made["spreads"]] == [0.0] * 6
    assert made["spread_estimate"] is None


@pytest.fixture
def shelf() -> Shelf:
    """Everything trained; NoLoCo 0.6 % worse than the paper's DiLoCo, and 1.4 % worse than the heavy-ball one."""
    made = Shelf(cells.Protocol(), cells.ENTRIES)
    made.train(bowl(3e-3, diloco=10.0, diloco_heavy=9.13, noloco=10.66))
    return made


@pytest.fixture
def results(shelf: Shelf) -> Any:
    return says.Results(shelf.protocol, shelf.find, shelf.entries, cells.Task())


def test_noloco_is_held_against_each_diloco_with_as_many_replicas(results: Any) -> None:
    rows = says.judged(results).rows
    assert [row[:5] for row in rows[:2]] == [
        ["4", "noloco", "diloco", "3", "+0.60 ± 0.00"],
        ["4", "noloco", "diloco_heavy", "3", "+1.40 ± 0.00"],
    ]
    assert [row[-1] for row in rows if row[1] == "noloco"] == ["1 % met", "1 % missed"] * 3
    assert [row[:3] for row in rows if row[1] != "noloco"][:1] == [["4", "noloco_m0.3", "diloco"]]
    assert says.verdict(results) == (  # about the paper's settings
        "NoLoCo within 1 % of DiLoCo: 3 of 6 met; missed against diloco_heavy on 4 replicas, "
        "diloco_heavy on 8 replicas, diloco_heavy on 16 replicas."
    )


def test_losses_are_paired_by_seed() -> None:
    dense, noloco = cells.BY_LABEL["dense"], cells.BY_LABEL["noloco"]
    own = says.Row(noloco, 4, {1: {"loss": 2.2}, 2: {"loss": 3.0}, 3: {"loss": 9.0}})
    other = says.Row(dense, 4, {1: {"loss": 2.0}, 2: {"loss": 2.5}})
    assert own.over(other) == pytest.approx([10.0, 20.0])
    assert own.over(None) == []


def test_tables_name_losses_spreads_and_machine_time(results: Any, shelf: Shelf) -> None:
    report = results.report()
    text = sheets.markdown(report.sheets, report.remarks)
    assert "| 4 | noloco | pairs, lr 0.7, momentum 0.5 (its paper's) | 2.2353 ± 0.0111 | +10.66 ± 0.00 |" in text
    assert "| 4.00 | 2.00 | 0.0000 | 0.2 |" in text
    assert "| dense | 0.003  chosen | dense 2.0100 |" in text
    assert "over the true one: 0.75 (from 0.75 to 0.75)" in text
    count = len(shelf.found)
    assert f"{count} trainings took {says.seconds_text(20 * count)} of processor time" in text
    assert "Not trained yet" not in text


def test_what_is_missing_and_a_rate_at_the_edge_are_said(shelf: Shelf) -> None:
    del shelf.found["16-noloco-0.003-1"], shelf.found["4-noloco_int8-0.003-1"]
    results = says.Results(shelf.protocol, shelf.find, shelf.entries, cells.Task())
    assert "Not trained yet: 16-noloco-0.003-1, 4-noloco_int8-0.003-1." in results.remarks()
    assert {row[0] for row in says.judged(results).rows if row[1] == "noloco"} == {"4", "8"}
    alone = Shelf(cells.Protocol(), [cells.BY_LABEL["dense"]])
    alone.train(bowl(1.0))
    results = says.Results(alone.protocol, alone.find, alone.entries, cells.Task())
    assert "The best learning rate of dense, 0.012, is the last one tried on its side." in results.remarks()


def test_the_figure_is_drawn(results: Any, tmp_path: Path) -> None:
    says.draw_figure(results, tmp_path / "made.png")
    assert (tmp_path / "made.png").stat().st_size > 10_000


def test_spread_that_falls_with_the_rate_correlates_with_it() -> None:
    task = cells.Task()
    spreads = [(step, 0.05 * training.rate_at(step, asdict(task))) for step in (119, 120, 399, 400, 799, 800)]
    assert says.correlation(spreads, task) == pytest.approx(1.0)
    assert says.correlation(spreads[:4], task) is None


def test_a_quick_look_trains_stores_and_shows(tmp_path: Path) -> None:
    command = ["python", str(BENCH / "outer.py"), "--quick", "--only", "dense", "--jobs", "1"]
    command += ["--results", str(tmp_path / "cells.jsonl")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=110, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.jsonl"]
    assert Store(tmp_path / "cells.jsonl").names == ["4-dense-0.003-1"]
    assert "4-dense-0.003-1" in made.stdout
    assert "Validation loss at equal tokens" in made.stdout
