"""The pictures of outer rounds and of faults: how far apart the replicas are, and how far each rank came when."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from commopt.record.words import spread_text
from commopt.report import drawing
from commopt.report.document import Progress, ProgressPart, Results, RunResult
from commopt.report.drawing import FAINT, FONT_POINTS, INK, PAPER, QUIET, WIDTH_IN
from commopt.report.outer_table import fault_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LANES_IN = 4.5  # of all ranks of a run together, if they would be higher at LANE_IN each
LANE_IN, LEVEL_IN = 0.46, 0.21
NAMED_LANES = 16
PICTURE_NAMES = ("spread", "faults")
STOP_STEPS, STOP_SHARE = 4.0, 0.02  # what is drawn as a stop: so many median steps, and so much of the width


def outer_pictures(results: Results) -> dict[str, Callable[[Results], Figure]]:
    """The pictures that there is something for, by the names of their files."""
    chosen: dict[str, Callable[[Results], Figure]] = {}
    if any(run.rounds and any(point.spread > 0 for point in run.rounds.spread) for run in results.runs):
        chosen["spread"] = spread_against_steps
    if any(run.faults for run in results.runs):
        chosen["faults"] = progress_under_faults
    return chosen


def spread_against_steps(results: Results) -> Figure:
    """The distance between the replicas along the steps, on a log scale."""
    figure, axes = drawing.new_figure("How far apart the replicas are (log scale)", 3.8)
    chosen, ends = drawing.colours(results), []
    for run in results.runs:
        points = [(point.step, point.spread) for point in run.rounds.spread if point.spread > 0] if run.rounds else []
        if not points:
            continue
        x, y = [float(step) for step, _ in points], [spread for _, spread in points]
        marker = "o" if len(points) <= 60 else ""
        axes.plot(x, y, marker=marker, ms=3, lw=1.6, color=chosen[run.name], zorder=3)
        axes.plot(x[-1], y[-1], "o", ms=7, color=chosen[run.name], mec=PAPER, zorder=30, clip_on=False)
        ends.append((f"{run.name}\n{spread_text(y[-1])}", chosen[run.name], x[-1], y[-1]))
    axes.set_yscale("log")

    def is_shown(value: float) -> bool:
        """Name 2 and 5 between powers of ten where the axis has hardly a power of ten."""
        low, high = axes.get_ylim()
        return high / low < 50 and round(value / 10.0 ** math.floor(math.log10(value) + 1e-9)) in (2, 5)

    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if is_shown(value) else "")
    axes.tick_params(which="minor", colors=QUIET, labelcolor=INK, labelsize=FONT_POINTS - 1, length=2)
    axes.set_ylabel("spread")
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max(run.steps for run in results.runs) or 1)
    drawing.name_at_the_right(axes, ends)
    box = axes.get_position()
    axes.set_position((0.105, box.y0, box.x1 - 0.105, box.height))
    return figure


def progress_under_faults(results: Results) -> Figure:
    """How far each rank came when, and when which fault began and ended."""
    from matplotlib.ticker import MultipleLocator

    runs = [run for run in results.runs if run.faults]
    longest = max((len(_lane_name(rank)) for run in runs for rank in run.progress), default=6)
    left = (0.25 + longest * (FONT_POINTS - 1) * 0.6 / 72) / WIDTH_IN
    width = 0.885 - left
    names = [[drawing.width_points(fault_text(fault)) + 8 for fault in run.faults] for run in runs]
    end_s = _axis_end_s(runs, names, width)
    points_per_s = width * WIDTH_IN * 72 / end_s
    levels = [
        name_levels([fault.at_s * points_per_s for fault in run.faults], widths)
        for run, widths in zip(runs, names, strict=True)
    ]
    heights = [
        (min(LANE_IN * max(1, len(run.progress)), LANES_IN), (0.62 if k else 0.34) + LEVEL_IN * (1 + max(run_levels)))
        for k, (run, run_levels) in enumerate(zip(runs, levels, strict=True))
    ]
    height_in = 0.42 + sum(lanes + above for lanes, above in heights) + 0.95
    figure, axes = drawing.new_figure("How far each rank came, under faults", max(height_in, 2.0))
    scale, unit = (60.0, "minutes") if end_s >= 600 else (1.0, "seconds")
    chosen, top_in = drawing.colours(results), height_in - 0.42
    for index, (run, run_levels, (lanes_in, above_in)) in enumerate(zip(runs, levels, heights, strict=True)):
        top_in -= above_in
        box = (left, (top_in - lanes_in) / height_in, width, lanes_in / height_in)
        if index:
            axes = figure.add_axes(box, facecolor="none")
            drawing.dress(axes)
        axes.set_position(box)
        axes.set_xlim(0, end_s)
        _draw_lanes(axes, run, chosen[run.name])
        _mark_faults(axes, run, run_levels)
        offset = (0, (above_in - (0.28 if index else 0)) * 72 - 16)
        style = {"xycoords": "axes fraction", "fontweight": "bold", "fontsize": FONT_POINTS}
        drawing.note(axes, run.name, (0, 1), offset, chosen[run.name], **style)
        axes.xaxis.set_major_locator(MultipleLocator(scale * drawing.round_step(end_s / scale / 8)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:g}")
        top_in -= lanes_in
    axes.set_xlabel(f"{unit} since the first rank started; dotted: a fault was undone; grey: those it was done to")
    drawing.legend(axes, [("steps done", 0.3), ("standing still", None), ("round missed", "x")])
    return figure


def _lane_name(rank: Progress) -> str:
    return f"{rank.node}, rank {rank.rank}" if rank.node != f"node{rank.rank}" else f"rank {rank.rank}"


def _draw_lanes(axes: Axes, run: RunResult, colour: str) -> None:
    """One lane per rank: its steps as a rising area, its stops hatched, and how far it came at the right."""
    planned = max([run.steps_planned, 1, *(part.steps[-1] for rank in run.progress for part in rank.parts)])
    missed = {rank.rank: rank.missed_at_s for rank in run.rounds.by_rank} if run.rounds else {}
    shortest_s = STOP_SHARE * axes.get_xlim()[1]
    for lane, rank in enumerate(run.progress):
        for number, part in enumerate(rank.parts):
            floor, heights = lane + 0.42, [lane + 0.42 - 0.84 * steps / planned for steps in part.steps]
            axes.fill_between(part.at_s, heights, floor, color=drawing.mix(colour, 0.3), lw=0, zorder=2)
            axes.plot(part.at_s, heights, color=colour, lw=1.5, zorder=3)
            for begin, end in _stops(part, shortest_s):
                axes.fill_between(
                    [begin, end], lane - 0.42, floor, facecolor="none", edgecolor=colour, hatch="////", lw=0
                )
            is_end = rank.ended and number == len(rank.parts) - 1
            marker = "o" if is_end else "X"
            axes.plot(part.at_s[-1], heights[-1], marker, ms=6, color=colour, mec=PAPER, zorder=5, clip_on=False)
        times = [at_s for at_s in missed.get(rank.rank, []) if at_s <= axes.get_xlim()[1]]
        axes.plot(times, [lane] * len(times), "x", ms=5.5, mew=1.6, color=INK, zorder=6)
        if rank.parts and len(run.progress) <= NAMED_LANES:
            style = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": FONT_POINTS - 1.5}
            drawing.note(axes, f"{rank.parts[-1].steps[-1]} steps", (1, lane), (9, 0), INK, **style)
    lanes = max(1, len(run.progress))
    named = range(0, len(run.progress), math.ceil(lanes / NAMED_LANES))
    axes.set_ylim(lanes - 0.5, -0.5)
    drawing.name_lanes(axes, named, [_lane_name(run.progress[lane]) for lane in named])


def _stops(part: ProgressPart, shortest_s: float) -> list[tuple[float, float]]:
    """Where a rank stood still between one step and the next."""
    pairs = list(zip(part.at_s, part.at_s[1:], part.steps, part.steps[1:], strict=False))
    if not pairs:
        return []
    usual_s = median((after - before) / (to - done) for before, after, done, to in pairs)
    return [
        (before, after)
        for before, after, done, to in pairs
        if to == done + 1 and after - before > max(STOP_STEPS * usual_s, shortest_s)
    ]


def name_levels(starts: Sequence[float], widths: Sequence[float]) -> list[int]:
    """How high above the lanes the name at each start stands, so that it passes above the lines of those it reaches.

    A line comes up from each start, in order, to its name, which runs to the right of it.
    """
    levels = [0] * len(starts)
    for k in reversed(range(len(starts))):
        reached = [levels[j] for j in range(k + 1, len(starts)) if starts[j] < starts[k] + widths[k]]
        levels[k] = 1 + max(reached, default=-1)
    return levels


def _axis_end_s(runs: Sequence[RunResult], names: Sequence[Sequence[float]], width: float) -> float:
    """Where the axis ends: after the last step and fault, and so that the names of faults near the end stay in the picture."""
    last = [part.at_s[-1] for run in runs for rank in run.progress for part in rank.parts if part.at_s]
    end_s = max([*last, *(fault.at_s for run in runs for fault in run.faults)]) * 1.02 or 1.0
    frame, margin = width * WIDTH_IN * 72, 0.1 * WIDTH_IN * 72
    for run, widths in zip(runs, names, strict=True):
        for fault, name in zip(run.faults, widths, strict=True):
            end_s = max(end_s, fault.at_s * min(frame / max(frame + margin - name, 1.0), 2.0))
    return end_s


def _mark_faults(axes: Axes, run: RunResult, levels: Sequence[int]) -> None:
    """A line where each fault began, with its name, a dotted one where it ended, and a shade over those it was done to."""
    last = len(run.progress) - 0.5
    lanes = {rank.rank: lane for lane, rank in enumerate(run.progress)}
    right_s = axes.get_xlim()[1]
    for fault, level in zip(run.faults, levels, strict=True):
        until_s = fault.end_s if fault.end_s is not None else right_s
        if fault.kind in ("cut", "slow", "hang"):
            for rank in fault.ranks:
                axes.fill_between(
                    [fault.at_s, until_s], lanes[rank] - 0.5, lanes[rank] + 0.5, color=FAINT, lw=0, zorder=0.5
                )
        if fault.end_s is not None and fault.end_s <= right_s:
            axes.plot([fault.end_s] * 2, [-0.5, last], ":", color=INK, lw=1.1, zorder=4)
        axes.plot([fault.at_s] * 2, [-0.5, last], "-", color=INK, lw=1.1, zorder=4)
        top, lift = (fault.at_s, -0.5), 5 + LEVEL_IN * 72 * level
        line = {"arrowstyle": "-", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
        drawing.note(axes, "", top, (0, lift + 7), INK, arrowprops=line)
        drawing.note(axes, fault_text(fault), top, (4, lift), INK, fontsize=FONT_POINTS - 1.5)
