"""What scripts/bench/convergence.py trains, in which order, and what it says about losses that it has stored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from script import module

from commopt.methods import METHODS

bench, cells = module("convergence"), module("convergence_cells")
training, says = module("convergence_training"), module("convergence_results")
ADAM, GPT = cells.BY_LABEL["adam"], cells.TASKS["gpt"]


def result(loss: float | None, nbytes: float = 0.2) -> dict[str, Any]:
    return {
        "loss": loss,
        "steady_bytes": nbytes,
        "mean_bytes": 2 * nbytes,
        "parameters": 1000,
        "void_steps": 0,
        "replicas_are_equal": True,
    }


class Shelf:
    """Results by cell, and a `find` that reads them."""

    def __init__(self, protocol: Any) -> None:
        self.protocol, self.found = protocol, dict[str, dict[str, Any]]()

    def find(self, cell: Any) -> dict[str, Any] | None:
        return self.found.get(cell.name)

    def train(self, entry: Any, task: Any, loss: Callable[[float, int], float | None]) -> list[tuple[float, int]]:
        """Train what the protocol wants until nothing is left; (rate, seed) in order, in units of the grid's middle."""
        order = []
        while wanted := self.protocol.wanted(entry, task, self.find):
            for cell in wanted:
                order.append((cell.rate / self.protocol.middle(entry, task), cell.seed))
                self.found[cell.name] = result(loss(*order[-1]))
        return order


def bowl(best: float) -> Callable[[float, int], float]:
    return lambda rate, seed: 2.0 + abs(math.log2(rate / best)) + 0.01 * seed


def test_every_entry_can_be_trained_and_every_method_has_one_or_a_reason() -> None:
    assert {entry.label: cells.why_not(entry) for entry in cells.ENTRIES} == dict.fromkeys(cells.BY_LABEL)
    every_step = {name for name, method in METHODS.items() if method.kind != "outer"}
    assert every_step == {entry.method for entry in cells.ENTRIES} | set(cells.LEFT_OUT)


def test_every_parent_is_dense_and_trained_wherever_its_methods_are() -> None:
    for entry in cells.ENTRIES:
        parent = cells.BY_LABEL[entry.parent]
        assert parent.method == "dense"
        assert set(entry.tasks) <= set(parent.tasks)
        assert set(entry.targets) <= set(entry.tasks)


def test_what_cannot_be_made_is_named_and_skipped() -> None:
    refused = [cells.Entry("y", "onebit_adam", "adam", {"freeze_stop": 3})]
    refused += [cells.Entry("z", "two_way", "adam", {"worker": "int3"}), cells.Entry("x", "telepathy", "adam")]
    entries, said = cells.notices([*cells.ENTRIES[:1], *refused])
    assert [entry.label for entry in entries] == ["adam"]
    assert [word in line for word, line in zip(("freeze_stop", "int3"), said, strict=False)] == [True, True]
    assert said[2].startswith("x is skipped: unknown method 'telepathy'")


def test_first_the_grid_and_then_the_other_seeds_at_the_best_rate() -> None:
    shelf = Shelf(cells.Protocol())
    order = shelf.train(ADAM, GPT, bowl(1.0))
    assert order == [(0.5, 1), (1.0, 1), (2.0, 1), (1.0, 2), (1.0, 3)]


def test_the_grid_is_extended_while_its_edge_is_best_and_never_for_ever() -> None:
    up, down = Shelf(cells.Protocol()), Shelf(cells.Protocol())
    assert up.train(ADAM, GPT, bowl(4.0)) == [(0.5, 1), (1.0, 1), (2.0, 1), (4.0, 1), (8.0, 1), (4.0, 2), (4.0, 3)]
    assert not up.protocol.is_at_edge(ADAM, GPT, up.find)
    assert down.train(ADAM, GPT, bowl(1e-6))[3:] == [(0.25, 1), (0.125, 1), (0.125, 2), (0.125, 3)]
    assert down.protocol.is_at_edge(ADAM, GPT, down.find)


def test_divergence_at_some_rates_is_worst_and_at_all_rates_ends_it() -> None:
    some, every = Shelf(cells.Protocol()), Shelf(cells.Protocol())
    some.train(ADAM, GPT, lambda rate, seed: None if rate > 0.5 else 2.0 + rate)
    assert some.protocol.best_rate(ADAM, GPT, some.find) == pytest.approx(0.125 * some.protocol.middle(ADAM, GPT))
    order = every.train(ADAM, GPT, lambda rate, seed: None)
    assert len(order) == 5
    assert all(seed == 1 for _, seed in order)


def test_long_runs_wait_for_the_rate_of_the_short_ones() -> None:
    shelf, long = Shelf(cells.Protocol()), cells.TASKS["gpt_long"]
    assert shelf.protocol.wanted(ADAM, long, shelf.find) == []
    shelf.train(ADAM, GPT, bowl(2.0))
    (cell,) = shelf.protocol.wanted(ADAM, long, shelf.find)
    assert (cell.rate, cell.seed) == (2 * shelf.protocol.middle(ADAM, GPT), 1)


def test_a_label_brings_its_parent_and_a_long_run_the_task_of_its_rate() -> None:
    pairs = cells.chosen_pairs(["dgc_1pct"], [cells.TASKS["gpt_long"]], cells.ENTRIES)
    named = {(entry.label, task.name) for entry, task in pairs}
    assert named == {(label, task) for label in ("sgd", "dgc_1pct") for task in ("gpt", "gpt_long")}


def test_a_task_is_trained_as_the_command_line_has_changed_it() -> None:
    shorter = [replace(cells.TASKS[name], steps=7, seeds=(1,)) for name in cells.SHORT]
    pairs = cells.chosen_pairs(["adam"], shorter, cells.ENTRIES)
    assert [(task.name, task.steps, task.seeds) for _, task in pairs] == [("gpt", 7, (1,)), ("digits", 7, (1,))]


def test_shares_of_the_steps_become_numbers() -> None:
    cell = cells.Cell(replace(GPT, steps=50), cells.BY_LABEL["onebit_adam"], 1e-3, 1)
    settings = cells.settings_of(cell)
    assert settings["options"] == {"freeze_step": 10}
    assert settings["optimizer"] == {"name": "adam", "lr": 1e-3}
    assert json.loads(json.dumps(settings)) == settings


@pytest.fixture
def tiny() -> Any:
    return replace(
        cells.TASKS["digits"], sizes={"width": 16, "batch": 8, "noise": 0.5}, steps=60, ranks=2, decay_from=0.5
    )


def test_a_cell_learns_counts_its_bytes_and_repeats_itself(tiny: Any) -> None:
    settings = cells.settings_of(cells.Cell(tiny, cells.BY_LABEL["onebit_adam"], 1e-2, 1))
    assert settings["options"] == {"freeze_step": 12}
    first, second, other = (training.run_cell({**settings, "seed": seed}) for seed in (1, 1, 2))
    assert first["loss"] == second["loss"] != other["loss"]
    batches = [training.digits(width=16, batch=4, noise=0.5).held_out for _ in range(2)]
    assert all(x.equal(y) for one, two in zip(*batches, strict=True) for x, y in zip(one, two, strict=True))
    assert first["loss"] < 2.2 < first["curve"][0][1]
    assert [step for step, _ in first["curve"]] == list(range(3, 61, 3))
    dense, scales = 4.0, 4 * 6 / first["parameters"]
    assert first["steady_bytes"] == pytest.approx(0.125 + scales, abs=0.02)  # a bit each way for half of the elements
    assert first["mean_bytes"] == pytest.approx((12 * dense + 48 * first["steady_bytes"]) / 60)
    assert first["replicas_are_equal"] is True
    json.dumps(first, allow_nan=False)


@pytest.mark.filterwarnings("ignore:overflow")
def test_a_cell_that_diverges_is_a_result(tiny: Any) -> None:
    task = replace(tiny, steps=20)
    made = training.run_cell(cells.settings_of(cells.Cell(task, cells.BY_LABEL["sgd"], 1e20, 1)))
    assert made["loss"] is None or made["loss"] > 1e3
    json.dumps(made, allow_nan=False)


def rows(percent: float, label: str = "onebit_adam") -> list[Any]:
    """Adam at 2.0 + 0.01 seed, and a method that is worse by so many percent, a little more on odd seeds."""
    shelf, method = Shelf(cells.Protocol()), cells.BY_LABEL[label]
    shelf.train(ADAM, GPT, bowl(1.0))
    shelf.train(method, GPT, lambda rate, seed: bowl(1.0)(rate, seed) * (1 + percent / 100 + 1e-3 * (seed % 2)))
    made = [says.row_of(entry, GPT, shelf.protocol, shelf.find) for entry in (method, ADAM)]
    assert None not in made
    return made


def test_differences_are_paired_by_seed_and_judged_by_their_mean() -> None:
    good, _ = rows(0.5)
    assert good.worse_by == pytest.approx((0.6, 0.5, 0.6))
    assert good.spread == pytest.approx(0.0577, abs=1e-3)
    assert (good.target, good.is_met) == (1, True)
    bad, parent = rows(1.5)
    assert bad.is_met is False
    assert (parent.worse_by, parent.target, parent.is_met) == ((), None, None)


def test_tables_name_losses_bytes_ratios_and_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    made = rows(1.5)
    bench.present(says.report(made), bench.parser().parse_args([]), notices=["a notice"])
    text = capsys.readouterr().out
    assert "+1.57 ± 0.06" in text
    assert "30x" in text  # 6 bytes of a ring all-reduce over 0.2
    assert "1 % missed" in text
    assert "Targets: 0 of 1 met; missed: onebit_adam on gpt" in text
    assert "a notice" in text
    assert text.index("adam ") < text.index("onebit_adam")  # the parent first
    bench.present(says.report(made), bench.parser().parse_args(["--markdown"]))
    assert "| onebit_adam | adam | 2.0" in capsys.readouterr().out


def test_what_diverges_everywhere_misses_its_target_and_is_told_with_its_bytes() -> None:
    task = replace(GPT, steps=7, seeds=(1,))  # a quick look, at one rate
    shelf, method = Shelf(cells.Protocol(grid=(1.0,), extensions=0)), cells.BY_LABEL["onebit_adam"]
    assert says.row_of(method, task, shelf.protocol, shelf.find) is None
    assert shelf.train(ADAM, task, bowl(1.0)) == [(1.0, 1)]
    assert shelf.train(method, task, lambda rate, seed: None) == [(1.0, 1)]
    parent, row = (says.row_of(entry, task, shelf.protocol, shelf.find) for entry in (ADAM, method))
    assert (parent.loss, row.loss, row.is_met, row.mean_bytes) == (pytest.approx(2.01), None, False, 0.4)
    assert "diverged" in says.words_of(row)
    assert "-" not in says.words_of(row)[4:8]  # bytes and ratios are known all the same


def test_the_figure_is_drawn_with_a_method_off_its_scale(tmp_path: Path) -> None:
    says.draw_figure([*rows(0.5), *rows(80.0, "zero_one_adam")[:1]], tmp_path / "made.png")
    assert (tmp_path / "made.png").stat().st_size > 10_000


def test_labels_lie_on_no_other_label() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 6))
    ax.set(xlim=(0, 10), ylim=(0, 10))
    texts = [(5 + 0.05 * k, 5 + 0.03 * (k % 3), f"method {k}", "black") for k in range(8)]
    says.label_marks(ax, texts)
    boxes = [note.get_window_extent() for note in ax.texts if note.get_text()]
    assert len(boxes) == 8
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])
    pyplot.close(figure)
