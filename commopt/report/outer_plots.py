"""The pictures of outer rounds and of faults: how far apart the replicas are, and how far each rank came when."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

from commopt.record.words import spread_text
from commopt.report import drawing
from commopt.report.document import Progress, ProgressPart, Results, RunResult
from commopt.report.drawing import FAINT, FONT_POINTS, INK, PAPER, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LANES_IN = 4.5  # of all ranks of a run together, if they would be higher at LANE_IN each
LANE_IN, LEVEL_IN = 0.46, 0.21
NAMED_LANES = 16
STOP_STEPS, STOP_SHARE = 4.0, 0.02  # what is drawn as a stop: so many median steps, and so much of the width


def spread_against_steps(results: Results) -> Figure:
    """The distance between the replicas along the steps, on a log scale."""
    figure, (axes,) = drawing.new_figure("How far apart the replicas are (log scale)", 3.8)
    chosen, ends = drawing.colours(results), []
    for run in results.runs:
        points = [(point.step, point.spread) for point in run.rounds.spread if point.spread > 0] if run.rounds else []
        if not points:
            continue
        x, y = [float(step) for step, _ in points], [spread for _, spread in points]
        marker = "o" if len(points) <= 60 else ""
        axes.plot(x, y, marker=marker, ms=3, lw=1.6, color=chosen[run.name], zorder=3)
        axes.plot(x[-1], y[-1], "o", ms=7, color=chosen[run.name], mec=PAPER, zorder=30, clip_on=False)
        ends.append((f"{run.name}\n{spread_text(y[-1])}", chosen[run.name], y[-1]))
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
    drawing.name_lines(axes, ends)
    return figure


def progress_under_faults(results: Results) -> Figure:
    """How far each rank came when, and when which fault began and ended."""
    runs = [run for run in results.runs if run.faults]
    heights = [min(LANE_IN * max(1, len(run.progress)), LANES_IN) for run in runs]
    names_in = sum(0.4 + LEVEL_IN * len(run.faults) for run in runs)
    figure, frames = drawing.new_figure("How far each rank came, under faults", 1.2 + sum(heights) + names_in, heights)
    last = [part.at_s[-1] for run in runs for rank in run.progress for part in rank.parts]
    end_s = max([*last, *(fault.at_s for run in runs for fault in run.faults)]) * 1.02 or 1.0
    chosen, unit = drawing.colours(results), ""
    for axes, run in zip(frames, runs, strict=True):
        axes.set_xlim(0, end_s)
        unit = drawing.count_time(axes, end_s)
        _draw_lanes(axes, run, chosen[run.name])
        _mark_faults(axes, run)
        named = axes.set_title(run.name, loc="left", pad=10 + LEVEL_IN * 72 * len(run.faults))
        named.set(fontweight="bold", fontsize=FONT_POINTS, color=chosen[run.name])
    frames[-1].set_xlabel(
        f"{unit} since the first rank started; dotted: a fault was undone; grey: those it was done to"
    )
    drawing.legend(frames[-1], [("steps done", 0.3), ("standing still", None), ("round missed", "x")])
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


def _mark_faults(axes: Axes, run: RunResult) -> None:
    """A line where each fault began, with its name, a dotted one where it ended, and a shade over those it was done to.

    The names stand above each other, the first one highest, so that no line runs through one.
    """
    last = len(run.progress) - 0.5
    lanes = {rank.rank: lane for lane, rank in enumerate(run.progress)}
    right_s = axes.get_xlim()[1]
    for level, fault in enumerate(reversed(run.faults)):
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
        drawing.note(axes, str(fault), top, (4, lift), INK, fontsize=FONT_POINTS - 1.5)
