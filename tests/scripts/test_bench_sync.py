"""What scripts/bench/sync.py simulates, and what it says about seconds that it has stored; nothing here is timed."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pool import Pool
from script import BENCH, module

bench, says, simulation = module("sync"), module("sync_results"), module("sync_simulation")


@settings(max_examples=20, derandomize=True)
@given(spread=st.floats(0.01, 2.5))
def test_a_swap_takes_what_equation_7_says(spread: float) -> None:
    drawn = simulation.swap_times(np.random.default_rng(1), spread, 100_000)
    assert abs(drawn.mean() - simulation.swap_mean(spread)) < 4 * drawn.std() / math.sqrt(drawn.size)


@pytest.mark.parametrize("nodes", [2, 4, 16, 1024])
def test_without_spread_a_tree_takes_all_its_levels_twice(nodes: int) -> None:
    for times in (simulation.tree_times, simulation.binomial_times):
        assert times(np.random.default_rng(1), nodes, 0.0, 3) == pytest.approx(2 * math.log2(nodes))


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.5])
def test_a_tree_of_two_leaves_costs_a_pair_average(spread: float) -> None:
    assert simulation.message_point(2, spread, runs=100_000, seed=1)["ratio"] == pytest.approx(1, abs=0.02)


# Another program's simulation of the same model, 400 runs; its last value for 1,024 nodes is where the paper's figure ends.
TREES = {
    16: (4.0, 4.5, 5.2, 6.0, 6.4, 6.8),
    1024: (10.0, 12.4, 17.1, 23.6, 31.3, 38.9),
}
WAITS = {4: (1.06, 1.05, 1.04, 1.02), 1024: (1.76, 1.43, 1.29, 1.20)}


@pytest.mark.parametrize(("nodes", "expected"), TREES.items())
def test_a_tree_costs_as_many_pair_averages_as_in_figure_5a(nodes: int, expected: tuple[float, ...]) -> None:
    found = [simulation.message_point(nodes, spread, runs=400, seed=1) for spread in simulation.SPREADS]
    for point, ratio in zip(found, expected, strict=True):
        assert abs(point["ratio"] - ratio) < 4 * math.sqrt(2) * point["standard_error"] + 0.05


@pytest.mark.parametrize(("nodes", "expected"), WAITS.items())
def test_waiting_for_all_costs_as_much_as_in_figure_5b(nodes: int, expected: tuple[float, ...]) -> None:
    for inner, ratio in zip(simulation.INNER_STEPS[:3], expected, strict=False):
        found = simulation.blocking_point(nodes, inner, 100, replicas=1024, seed=1)["ratio"]
        assert found - 1 == pytest.approx(ratio - 1, rel=0.1, abs=0.01)


def test_two_nodes_wait_for_each_other_in_any_case() -> None:
    assert simulation.blocking_ratios(2, 5, 20, runs=3, seed=1) == pytest.approx(1)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), nodes=st.sampled_from([4, 6, 16]), inner=st.integers(1, 5), outer=st.integers(1, 9))
def test_a_barrier_of_all_is_never_faster_than_one_of_pairs(seed: int, nodes: int, inner: int, outer: int) -> None:
    assert (simulation.blocking_ratios(nodes, inner, outer, runs=2, seed=seed) >= 1 - 1e-12).all()


def test_a_tree_of_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="6 nodes"):
        simulation.tree_times(np.random.default_rng(1), 6, 0.5, 1)


def means(group: dist.ProcessGroup, mean_s: float) -> tuple[list[float], list[float]]:
    """The tree's mean of ranks' own numbers on rank r of 3 or 5, and the swap's of ranks 0 and 1."""
    exchange = module("sync_exchange")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    messages = exchange.Messages(rank, mean_s=mean_s, spread=1.0)
    x = torch.full((4,), float(rank), dtype=torch.float64)
    exchange.tree_mean_(x, torch.empty_like(x), rank, world, messages)
    tree = x[1:].tolist()  # the first element is when the message was sent
    x.fill_(rank)
    if rank < 2:
        exchange.swap_mean_(x, torch.empty_like(x), 1 - rank, messages)
    return tree, x[1:].tolist()


@pytest.mark.parametrize("mean_s", [0.0, 1e-3])
def test_tree_and_swap_end_with_the_mean_on_all_ranks(mean_s: float, pool: Pool) -> None:
    for ranks in (2, 3, 5):
        answers = pool.run(ranks, means, mean_s)
        assert [tree for tree, _ in answers] == [[(ranks - 1) / 2] * 3] * ranks
        assert [swap for _, swap in answers[:2]] == [[0.5] * 3] * 2


def cell(*, mean_s: float = 0.0) -> dict[str, Any]:
    """Two repetitions on four nodes, in milliseconds: pairs (0, 1), (2, 3), and then (0, 2), (1, 3)."""
    seconds: dict[str, tuple[list[float], ...]] = {
        "swap": ([40, 50], [44, 60], [20, 30], [16, 40]),
        "tree": ([100, 90], [80, 220], [128, 100], [120, 100]),
        "ring": ([64, 55], [60, 60], [60, 82.5], [60, 60]),
    }
    partners = ([1, 2], [0, 3], [3, 0], [2, 1])
    ranks = [
        {"seconds": {name: [ms / 1e3 for ms in own[r]] for name, own in seconds.items()}, "partners": partners[r]}
        for r in range(4)
    ]
    given_ = {"nodes": 4, "elements": 62_500, "repeats": 2, "rate": "50mbit", "mean_s": mean_s, "spread": 0.0}
    return {"name": "4-250kB", "settings": given_, "ranks": ranks, "others_cores": 0.3, "congestion_control": "bbr"}


def test_a_swap_ends_when_both_of_a_pair_have_done_and_a_tree_when_all_have() -> None:
    found = says.exchange_seconds(cell())
    assert found["swap"] * 1e3 == pytest.approx(np.array([[44, 20], [50, 60]]))
    assert found["tree"][:, 0] * 1e3 == pytest.approx([128, 220])
    assert found["ring"][:, 0] * 1e3 == pytest.approx([64, 82.5])
    assert says.ratios(cell(), "tree") == pytest.approx([4, 4])  # within a repetition
    assert says.ratios(cell(), "ring") == pytest.approx([2, 1.5])


def test_with_drawn_times_the_means_are_compared() -> None:
    ratio, error = says.mean_ratio(cell(mean_s=0.03))
    assert ratio == pytest.approx(174 / 43.5)
    tree, swap = np.array([128, 220]), np.array([44, 20, 50, 60])
    relative = (tree.std(ddof=1) / 174) ** 2 / 2 + (swap.std(ddof=1) / 43.5) ** 2 / 4
    assert error == pytest.approx(4 * math.sqrt(relative))


def test_expected_ratios_are_those_of_the_bytes_and_of_the_same_tree() -> None:
    assert [says.expected_ratio("tree", nodes) for nodes in (4, 8)] == [4, 6]
    assert [says.expected_ratio("ring", nodes) for nodes in (4, 8)] == [1.5, 1.75]
    assert says.expected_delayed_ratio(8, 0.0) == pytest.approx(6)
    simulated = 2 * simulation.message_point(16, 1.0, runs=20_000, seed=2)["binomial_ratio"]
    assert says.expected_delayed_ratio(16, 1.0) == pytest.approx(simulated, rel=0.02)


def test_the_tables_show_medians_expectations_and_busy_neighbours() -> None:
    linked, delayed = says.sheets(None, [cell(), cell(mean_s=0.03)])
    (row,) = linked.rows
    assert dict(zip(linked.headings, row, strict=True))["tree / swap"] == "4.00 (4.00-4.00)"
    assert row[0:2] == ["4", "250 kB"]
    assert row[-1] == "0.30!"
    assert delayed.rows[0][5].startswith("4.00 ± ")
    assert all(len(line.split("|")) == len(linked.headings) + 2 for line in linked.markdown().splitlines()[2:])


def test_all_cells_and_the_simulation_are_stored() -> None:
    simulated, cells = bench.known(bench.STORED)
    assert simulated["settings"] == bench.settings(quick=False, seed=bench.SEED)
    assert [found["name"] for found in cells] == [one.name for one in bench.CELLS]


def test_what_is_stored_is_what_is_simulated() -> None:
    simulated, _ = bench.known(bench.STORED)
    asked = {"nodes": 4, "inner_steps": 10, "outer_steps": 250}
    (stored,) = (point for point in simulated["blocking"] if asked.items() <= point.items())
    replicas = simulated["settings"]["replicas"]
    found = simulation.blocking_point(4, 10, 250, replicas=replicas, seed=bench.SEED)
    assert found == {**stored, "ratio": pytest.approx(stored["ratio"], rel=1e-9)}
    (stored,) = (point for point in simulated["message"] if point["nodes"] == 16 and point["spread"] == 1.0)
    found = simulation.message_point(16, 1.0, runs=simulated["settings"]["runs"], seed=bench.SEED)
    assert found["ratio"] == pytest.approx(stored["ratio"], rel=1e-9)


def test_quick_simulates_both_panels_and_stores_nothing(tmp_path: Path) -> None:
    words = ["--quick", "--results", str(tmp_path / "cells.jsonl"), "--json", str(tmp_path / "all.json")]
    done = subprocess.run(["python", str(BENCH / "sync.py"), *words], capture_output=True, text=True, check=True)
    tables = json.loads((tmp_path / "all.json").read_text())["tables"]
    assert [(len(one["rows"]), len(one["headings"]) - 1) for one in (tables[0], tables[-1])] == [(4, 6), (4, 4)]
    assert "figure 5A" in done.stdout
    assert not (tmp_path / "cells.jsonl").exists()
