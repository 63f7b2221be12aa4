"""What sync.py has stored, as tables, a page and a figure: figure 5 simulated, and exchanges timed on emulated nodes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from command import Report
from emulated import BUSY_CORES
from numpy.typing import NDArray
from sheets import Sheet, figure
from sync_simulation import binomial_times, swap_mean

from commopt.plan.links import parse_rate, wire_bytes
from commopt.record.words import bytes_text, milliseconds
from commopt.report import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]  # a stored cell
Seconds = NDArray[np.float64]

# What the paper says of its own figure: 5A ends near 40, and 5B shows about 20 %.
PAPER_MESSAGES = {"nodes": 1024, "spread": 2.5, "ratio": 40.0}
PAPER_BLOCKING = {"nodes": 1024, "inner_steps": 100, "ratio": 1.20}
EXPECTED_RUNS = 100_000


def report(simulation: Result | None, cells: Sequence[Result]) -> Report:
    """All that is stored, as tables and a figure."""
    draw = None if simulation is None else lambda file: draw_figure(simulation, file)
    return Report(sheets(simulation, cells), draw=draw)


def sheets(simulation: Result | None, cells: Sequence[Result]) -> list[Sheet]:
    """Every table that something is known of."""
    made = simulated_sheets(simulation) if simulation is not None else []
    linked = [cell for cell in cells if not cell["settings"]["mean_s"]]
    delayed = [cell for cell in cells if cell["settings"]["mean_s"]]
    return [*made, *([linked_sheet(linked)] if linked else []), *([delayed_sheet(delayed)] if delayed else [])]


# ---- simulated -------------------------------------------------------------------------------------------------------


def simulated_sheets(simulation: Result) -> list[Sheet]:
    settings, messages = simulation["settings"], simulation["message"]
    runs = f"{settings['runs']:,} runs"
    swaps = [
        [f"{point['spread']:g}", f"{point['equation']:.3f}", f"{point['drawn']:.3f} ± {point['standard_error']:.3f}"]
        for point in simulation["swap"]
    ]
    made = [
        Sheet(
            f"Simulated, figure 5A: all-reduce over a tree / two swaps of a pair, {runs}, ± standard error",
            ["nodes", *(f"std / mean {spread:g}" for spread in settings["spreads"])],
            grid(messages, "spread", lambda point: f"{point['ratio']:.1f} ± {point['standard_error']:.1f}"),
        ),
        Sheet(
            f"Simulated: the same over a binomial tree, where a parent sends itself nothing, {runs}",
            ["nodes", *(f"std / mean {spread:g}" for spread in settings["spreads"])],
            grid(messages, "spread", lambda point: f"{point['binomial_ratio']:.1f}"),
        ),
        Sheet("Simulated: a pair's swap, in means of a message", ["std / mean", "equation 7", "drawn"], swaps),
    ]
    for outer in settings["outer_steps"]:
        own = [point for point in simulation["blocking"] if point["outer_steps"] == outer]
        title = (
            f"Simulated, figure 5B: time with a barrier of all / of random pairs, {outer} outer steps, free messages"
        )
        headings = ["nodes", *(f"{inner} inner steps" for inner in settings["inner_steps"])]
        made.append(Sheet(title, headings, grid(own, "inner_steps", lambda point: f"{point['ratio']:.2f}")))
    return made


def grid(points: Sequence[Result], column: str, say: Any) -> list[list[str]]:
    """A row for each number of nodes, and a column for each value of `column`, as they come."""
    return [
        [f"{nodes:,}", *(say(point) for point in points if point["nodes"] == nodes)]
        for nodes in dict.fromkeys(point["nodes"] for point in points)
    ]


# ---- measured --------------------------------------------------------------------------------------------------------


def exchange_seconds(cell: Result) -> dict[str, Seconds]:
    """Seconds of each exchange: `swap` until both of a pair have done, (repeats, pairs); others until all have, (repeats, 1)."""
    ranks = cell["ranks"]
    by_rank = {name: np.array([rank["seconds"][name] for rank in ranks]) for name in ranks[0]["seconds"]}
    partners = np.array([rank["partners"] for rank in ranks])  # (ranks, repeats)
    columns = np.arange(partners.shape[1])
    swaps = [
        np.maximum(by_rank["swap"][:, k], by_rank["swap"][partners[:, k], k])[partners[:, k] > np.arange(len(ranks))]
        for k in columns
    ]
    return {name: times.max(axis=0)[:, None] for name, times in by_rank.items()} | {"swap": np.array(swaps)}


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(cell: Result, name: str) -> list[float]:
    """An exchange over the pairs' mean swap, within each repetition."""
    seconds = exchange_seconds(cell)
    return [float(ratio) for ratio in seconds[name][:, 0] / seconds["swap"].mean(axis=1)]


def mean_ratio(cell: Result) -> tuple[float, float]:
    """The tree's mean over the swaps' mean, as figure 5A has it, and its standard error."""
    seconds = exchange_seconds(cell)
    relative = sum(float(s.var(ddof=1)) / s.size / float(s.mean()) ** 2 for s in (seconds["tree"], seconds["swap"]))
    ratio = float(seconds["tree"].mean() / seconds["swap"].mean())
    return ratio, ratio * math.sqrt(relative)


def expected_ratio(name: str, nodes: int) -> float:
    """An exchange over a swap, if only the bytes of a link count: the tree's 2 log2 n whole messages in a row, or the ring's parts."""
    return 2 * math.log2(nodes) if name == "tree" else 2 * (nodes - 1) / nodes


def expected_delayed_ratio(nodes: int, spread: float) -> float:
    """What the simulation of the same binomial tree says, over E max."""
    times = binomial_times(np.random.default_rng([nodes, round(100 * spread)]), nodes, spread, EXPECTED_RUNS)
    return float(times.mean()) / swap_mean(spread)


def with_quartiles(values: Sequence[float]) -> str:
    low, middle, high = quartiles(values)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def linked_sheet(cells: Sequence[Result]) -> Sheet:
    headings = [
        "nodes", "message", "link's floor, ms", "swap, ms", "tree, ms", "Gloo ring, ms", "tree / swap", "expected",
        "tree / two swaps", "ring / swap", "expected", "others' cores",
    ]  # fmt: skip
    rows = []
    for cell in cells:
        settings, seconds = cell["settings"], exchange_seconds(cell)
        nodes, nbytes = settings["nodes"], settings["elements"] * 4
        medians = [milliseconds(float(np.median(seconds[name]))) for name in ("swap", "tree", "ring")]
        trees = ratios(cell, "tree")
        floor_ms = milliseconds(wire_bytes(nbytes) / parse_rate(settings["rate"]))
        row = [f"{nodes}", bytes_text(nbytes), floor_ms, *medians]
        row += [with_quartiles(trees), f"{expected_ratio('tree', nodes):.2f}", f"{statistics.median(trees) / 2:.2f}"]
        row += [with_quartiles(ratios(cell, "ring")), f"{expected_ratio('ring', nodes):.2f}", others(cell)]
        rows.append(row)
    rates = ", ".join(dict.fromkeys(cell["settings"]["rate"] for cell in cells))
    repeats = " or ".join(dict.fromkeys(str(cell["settings"]["repeats"]) for cell in cells))
    control = ", ".join(dict.fromkeys(cell["congestion_control"] for cell in cells))
    title = f"Measured on emulated nodes, links of {rates}, TCP {control}: medians of {repeats} repetitions (quartiles)"
    return Sheet(title, headings, rows)


def delayed_sheet(cells: Sequence[Result]) -> Sheet:
    headings = [
        "nodes", "std / mean", "repetitions", "swap, ms", "tree, ms", "tree / swap", "expected", "tree / two swaps",
        "others' cores",
    ]  # fmt: skip
    rows = []
    for cell in cells:
        settings, seconds = cell["settings"], exchange_seconds(cell)
        ratio, error = mean_ratio(cell)
        means = [milliseconds(float(seconds[name].mean())) for name in ("swap", "tree")]
        expected = expected_delayed_ratio(settings["nodes"], settings["spread"])
        row = [f"{settings['nodes']}", f"{settings['spread']:g}", f"{settings['repeats']}", *means]
        rows.append([*row, f"{ratio:.2f} ± {error:.2f}", f"{expected:.2f}", f"{ratio / 2:.2f}", others(cell)])
    mean_ms = ", ".join(dict.fromkeys(milliseconds(cell["settings"]["mean_s"]) for cell in cells))
    title = f"Measured, with artificial message times of {mean_ms} ms on average, drawn for each message: means ± standard error"
    return Sheet(title, headings, rows)


def others(cell: Result) -> str:
    """How many cores other programs used meanwhile."""
    cores = cell["others_cores"]
    return "-" if cores is None else f"{cores:.2f}" + "!" * (cores > BUSY_CORES)


# ---- the figure ------------------------------------------------------------------------------------------------------

COLOURS = ("#6aa9dc", "#4a90cc", "#2678bd", "#0b5a9e", "#08306b")  # few nodes to many
PAPER_COLOUR = "#c84a0c"


def draw_figure(simulation: Result, file: Path) -> None:
    """Figure 5, both panels, with what the paper says of them as marks."""
    with figure(file, "Figure 5 of the NoLoCo paper, simulated", 8.4, 2) as (upper, lower):
        draw_lines(upper, simulation["message"], "spread", PAPER_MESSAGES, "the paper: near 40", (-8, 4))
        drawing.entitle(upper, "5A: a tree all-reduce over a pair's average")
        upper.set_xlabel("std / mean of a message's time, log-normal")
        upper.set_ylabel("ratio of mean times, log scale")
        upper.set_yscale("log", base=2)
        upper.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        last = max(simulation["settings"]["outer_steps"])
        blocking = [point for point in simulation["blocking"] if point["outer_steps"] == last]
        draw_lines(lower, blocking, "inner_steps", PAPER_BLOCKING, "the paper: about 20 %", (4, 22))
        drawing.entitle(lower, "5B: a barrier of all over one of random pairs, free messages")
        lower.set_xlabel("inner steps per outer step")
        lower.set_ylabel("ratio of training times")
        lower.set_ylim(bottom=1)


def draw_lines(
    ax: Axes, points: Sequence[Result], column: str, paper: Result, said: str, offset: tuple[float, float]
) -> None:
    """A line for each number of nodes, named at its end, and the paper's mark with its words at an offset in points."""
    names = list(dict.fromkeys(point["nodes"] for point in points))
    for nodes, colour in zip(names, COLOURS, strict=False):
        own = [point for point in points if point["nodes"] == nodes]
        x, y = [point[column] for point in own], [point["ratio"] for point in own]
        ax.plot(x, y, "o-", color=colour, lw=1.8, markersize=4)
        drawing.note(ax, f"{nodes:,} nodes", (x[-1], y[-1]), (9, 0), colour, va="center", fontweight="bold")
    mark = (paper[column], paper["ratio"])
    ax.plot(*mark, "x", color=PAPER_COLOUR, markersize=10, markeredgewidth=2.2, zorder=5)
    drawing.note(ax, said, mark, offset, PAPER_COLOUR, ha="right", fontweight="bold")
    ax.set_xticks(sorted({point[column] for point in points}))
