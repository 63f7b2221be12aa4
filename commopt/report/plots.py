"""The pictures: loss, bytes and time of a step; how far apart replicas are, and how far each rank got under faults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from commopt.record.words import bytes_text, milliseconds, seconds_text, spread_text, times_text
from commopt.report import drawing
from commopt.report.document import ProgressPart, Results, RunResult
from commopt.report.drawing import FAINT, FONT_POINTS, INK, LEVEL_IN, PAPER, QUIET
from commopt.report.table import loss_above_dense

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANES_IN = 4.5  # at most, of all lanes of a run
LANE_IN = 0.46
SAME_LOSS, FASTER = 0.01, 0.9  # runs that differ only in rounding end about 1 % apart (docs/convergence.md)
ALONE = 0.65  # of the width: where the others end, for the last end's name to be at its left
FIRST_DROP = 20  # the loss axis begins at the loss after this part of the steps
NAMED_LANES = 16
BESIDE = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": FONT_POINTS - 1.5}  # the frame, at a row
STOP_STEPS, STOP_SHARE = 4.0, 0.02  # a stop is longer than this many median steps and this share of the width


def loss_against_seconds(results: Results) -> Figure:
    """The training loss along the clock: when each method ends, and how much sooner than dense the fastest one has its loss."""
    runs = [run for run in results.runs if run.seconds]
    figure, (axes,) = drawing.new_figure("Training loss against time", 4.0 + LEVEL_IN * max(0, len(runs) - 1))
    longest = max((run.seconds[-1] for run in runs), default=1.0)
    axes.set_xlabel(f"training time, {drawing.count_time(axes, longest)} (sum of the step times)")
    axes.set_xlim(0, longest * 1.02)
    ends = _draw_losses(axes, results, {run.name: run.seconds for run in results.runs})
    chosen = drawing.run_colours(results)
    _mark_gain(axes, results, ends)
    ordered = sorted((run for run in runs if run.name in ends), key=lambda run: -ends[run.name][0])
    others_s = max((ends[run.name][0] for run in ordered[1:]), default=0.0)
    for level, run in enumerate(ordered):
        has_room = level == 0 and others_s < ALONE * longest  # at its left
        text = f"{run.name}{_trouble(run, ', ')}, {seconds_text(ends[run.name][0])}"
        drawing.flag(axes, ends[run.name], level, text, chosen[run.name], is_left=has_room)
    return figure


def loss_against_steps(results: Results) -> Figure:
    """The same losses along the steps: where methods are alike, their lines coincide."""
    figure, (axes,) = drawing.new_figure("The same losses against steps", 4.0)
    ends = _draw_losses(axes, results, {r.name: [float(step + 1) for step in range(r.steps)] for r in results.runs})
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max((run.steps for run in results.runs), default=1) or 1)
    chosen = drawing.run_colours(results)
    named = [(r.name + _trouble(r, "\n"), chosen[r.name], ends[r.name][1]) for r in results.runs if r.name in ends]
    drawing.name_lines(axes, named)
    return figure


def gain(results: Results) -> tuple[RunResult, str] | None:
    """The fastest run whose loss at the end is dense's, and what it gains: `same loss (+0.3 %) in 1/3 of the time`.

    Lower is the same too, and so is less than SAME_LOSS above, as a share. None if no such run takes less than FASTER of dense's time.
    """
    dense = results.dense
    if dense is None or dense.status != "finished" or not dense.seconds:
        return None
    rivals = []
    for run in results.runs:
        above = loss_above_dense(run, dense)
        if run is not dense and run.status == "finished" and run.seconds and above is not None and above < SAME_LOSS:
            rivals.append((run.seconds[-1] / dense.seconds[-1], run, above))
    share, best, above = min(rivals, key=lambda rival: rival[0], default=(1.0, dense, 0.0))
    if share >= FASTER:
        return None
    parts = round(1 / share)
    fraction = f"1/{parts}" if abs(share * parts - 1) <= 0.04 and parts > 1 else f"{share * 100:.0f} %"
    same = "same loss" if abs(above) < 0.0005 else f"{'same' if above > 0 else 'lower'} loss ({above * 100:+.1f} %)"
    return best, f"{same} in {fraction} of the time"


def bytes_per_step(results: Results) -> Figure:
    """Payload and bytes on the wire per step, on a log scale."""
    runs = results.runs
    height_in = 1.5 + 0.62 * max(1, len(runs))
    figure, (axes,) = drawing.new_figure("Bytes per step in the steady phase (log scale)", height_in)
    chosen = drawing.run_colours(results)
    known = [n for run in runs for n in (run.payload_bytes_per_step, run.nic_tx_bytes_per_step) if n]
    if not known:
        drawing.say_nothing(axes, "no bytes were counted")
        return figure
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(min(known)) - 0.1), 10 ** (math.log10(max(known)) + 0.1))
    for row, run in enumerate(runs):
        payload, wire, colour = run.payload_bytes_per_step, run.nic_tx_bytes_per_step, chosen[run.name]
        looks = (("payload", payload, -0.17, "o", 7, colour, INK), ("wire", wire, 0.17, "D", 6, PAPER, QUIET))
        for what, nbytes, offset, marker, size, fill, ink in looks:
            if not nbytes:
                continue
            axes.plot([axes.get_xlim()[0], nbytes], [row + offset] * 2, color=colour, lw=1.6, alpha=0.45)
            axes.plot(nbytes, row + offset, marker, ms=size, mfc=fill, mec=colour, mew=1.8, clip_on=False)
            drawing.note(axes, f"{bytes_text(nbytes)} {what}", (1, row + offset), (10, 0), ink, **BESIDE)
        if not payload and not wire:
            axes.text(axes.get_xlim()[0] * 1.1, row, "not counted", va="center", color=QUIET)
    _rows(axes, runs)
    axes.xaxis.set_major_formatter(lambda value, _: bytes_text(value).replace(".0", ""))
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(which="minor", colors=QUIET, length=2)
    drawing.legend(axes, [("payload, one rank", "o"), ("on the wire, busiest node", "D")])
    return figure


def step_time(results: Results) -> Figure:
    """A steady step: computing, waiting for the network, and what is neither."""
    runs = results.runs
    figure, (axes,) = drawing.new_figure("A step in the steady phase, in milliseconds", 1.5 + 0.52 * max(1, len(runs)))
    chosen = drawing.run_colours(results)
    longest = max((run.step_s or 0.0 for run in runs), default=0.0)
    if longest == 0.0:
        drawing.say_nothing(axes, "no run has a step in a steady phase")
        return figure
    for row, run in enumerate(runs):
        if run.step_s is None:
            axes.text(longest * 0.01, row, "no steady phase", va="center", color=QUIET)
            continue
        left = 0.0
        looks = ((chosen[run.name], None), (drawing.mix(chosen[run.name], 0.45), None), (PAPER, "////"))
        for seconds, (fill, hatch) in zip(step_parts(run), looks, strict=True):
            axes.barh(row, seconds, left=left, height=0.56, color=fill, edgecolor=chosen[run.name], lw=1.2, hatch=hatch)
            left += seconds
        ratio = 1.0 if run is results.dense else run.speedup_vs_dense or 1.0
        faster = f"{times_text(max(ratio, 1 / ratio))} {'faster' if ratio > 1 else 'slower'}"
        text = f"{milliseconds(run.step_s)} ms  {faster if not 0.97 <= ratio < 1.03 else ''}"
        drawing.note(axes, text.rstrip(), (left, row), (7, 0), INK, va="center")
    axes.set_xlim(0, longest * 1.01)
    _rows(axes, runs)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * 1e3:g}")
    drawing.legend(axes, [("computing", 1.0), ("compressing and the rest", 0.45), ("waiting for the network", None)])
    return figure


def step_parts(run: RunResult) -> tuple[float, float, float]:
    """Seconds of a steady step: computing, the rest (compressing), waiting; they add up to `step_s`."""
    step_s = run.step_s or 0.0
    compute_s = min(step_s if run.compute_s is None else run.compute_s, step_s)
    wait_s = (run.wait_share or 0.0) * step_s
    if run.compute_s is None:
        return step_s - wait_s, 0.0, wait_s
    wait_s = min(wait_s, step_s - compute_s)
    return compute_s, step_s - compute_s - wait_s, wait_s


def smooth(values: Sequence[float | None]) -> list[float]:
    """Mean over a window of a sixteenth of the values, which is narrower at the beginning; None becomes NaN."""
    out = []
    for index, value in enumerate(values):
        half = min(index, len(values) // 32)
        near = [v for v in values[max(0, index - half) : index + half + 1] if v is not None]
        out.append(math.nan if value is None else sum(near) / len(near))
    return out


def _rows(axes: Axes, runs: Sequence[RunResult]) -> None:
    """One row per run, the first on top, named at the left."""
    axes.set_ylim(len(runs) - 0.45, -0.55)
    names = [run.name + (" (failed)" if run.status == "failed" else "") for run in runs]
    drawing.name_lanes(axes, range(len(runs)), names)


def _draw_losses(axes: Axes, results: Results, along: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Draw every run's loss, thin as measured and thick when smoothed. Returns where the runs' lines end."""
    chosen = drawing.run_colours(results)
    lines = {run.name: smooth(run.train_loss) for run in results.runs if any(v is not None for v in run.train_loss)}
    if not lines:
        drawing.say_nothing(axes, "no step with a finite loss")
        return {}
    known = [[value for value in line if not math.isnan(value)] for line in lines.values()]
    low, high = min(map(min, known)), max(line[len(line) // FIRST_DROP] for line in known)
    margin, ends = 0.06 * (high - low), dict[str, tuple[float, float]]()
    for order, run in enumerate(run for run in results.runs if run.name in lines):
        x, y = along[run.name], lines[run.name]
        end = max(index for index, loss in enumerate(run.train_loss) if loss is not None)
        raw = [math.nan if loss is None else loss for loss in run.train_loss]
        dense = run.method == "dense"
        axes.plot(x, raw, color=chosen[run.name], lw=0.6, alpha=0.3, zorder=2)
        axes.plot(x, y, color=chosen[run.name], lw=3.6 if dense else 1.8, alpha=0.75 if dense else 1, zorder=5 + order)
        marker = "X" if end < len(y) - 1 or run.status == "failed" else "o"
        y_end = min(y[end], high + margin) if margin > 0 else y[end]
        axes.plot(x[end], y_end, marker, ms=7, color=chosen[run.name], mec=PAPER, zorder=30, clip_on=False)
        ends[run.name] = (x[end], y_end)
    axes.set_ylabel("training loss")
    if margin > 0:  # neither the first drop nor one diverging run flattens all lines
        axes.set_ylim(low - margin, high + margin)
    return ends


def _trouble(run: RunResult, gap: str) -> str:
    """What is added to the name of a run that did not go well."""
    stopped = f"{gap}stopped at {run.steps}/{run.steps_planned}" if run.status == "failed" else ""
    return f"{gap}loss not finite" if None in run.train_loss else stopped


def _mark_gain(axes: Axes, results: Results, ends: Mapping[str, tuple[float, float]]) -> None:
    """An arrow from dense's end to that of the run of `gain`, below all lines."""
    if (found := gain(results)) is None or results.dense is None or found[0].name not in ends:
        return
    run, text = found
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.22 * (high - low), high)
    y, x, x_dense = low - 0.05 * (high - low), ends[run.name][0], ends[results.dense.name][0]
    colour = drawing.run_colours(results)[run.name]
    for name in (run.name, results.dense.name):
        axes.plot([ends[name][0]] * 2, [y - 0.03 * (high - low), ends[name][1]], ":", color=QUIET, lw=1.1, zorder=2)
    arrow = {"arrowstyle": "->", "color": colour, "lw": 2.0, "shrinkA": 0, "shrinkB": 1}
    axes.annotate("", (x, y), (x_dense, y), arrowprops=arrow, zorder=20)
    style = {"ha": "right", "va": "top", "fontweight": "bold", "fontsize": FONT_POINTS}
    drawing.note(axes, text, (x_dense, y), (-6, -5), colour, zorder=20, **style)


def spread_against_steps(results: Results) -> Figure:
    """The distance between the replicas along the steps, on a log scale."""
    figure, (axes,) = drawing.new_figure("How far apart the replicas are (log scale)", 3.8)
    chosen, ends = drawing.run_colours(results), []
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
    """Each rank's steps over time, and when each fault began and ended."""
    runs = [run for run in results.runs if run.faults]
    heights = [min(LANE_IN * max(1, len(run.progress)), LANES_IN) for run in runs]
    names_in = sum(0.4 + LEVEL_IN * len(run.faults) for run in runs)
    figure, frames = drawing.new_figure("How far each rank came, under faults", 1.2 + sum(heights) + names_in, heights)
    last = [part.at_s[-1] for run in runs for rank in run.progress for part in rank.parts]
    end_s = max([*last, *(fault.at_s for run in runs for fault in run.faults)]) * 1.02 or 1.0
    chosen, unit = drawing.run_colours(results), ""
    for axes, run in zip(frames, runs, strict=True):
        axes.set_xlim(0, end_s)
        unit = drawing.count_time(axes, end_s)
        _draw_lanes(axes, run, chosen[run.name])
        _mark_faults(axes, run)
        drawing.entitle(axes, run.name, chosen[run.name], pad=10 + LEVEL_IN * 72 * len(run.faults))
    frames[-1].set_xlabel(f"{unit} since the first rank started")
    marks: list[tuple[str, str | float | None]] = [("steps done", 0.3), ("standing still", None)]
    marks += [("hit by the fault", FAINT), ("fault undone", ":"), ("round missed", "x")]
    drawing.legend(frames[-1], marks)
    return figure


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
                axes.fill_between([begin, end], lane - 0.42, floor, fc="none", ec=colour, hatch="////", lw=0)
            marker = "o" if rank.ended and number == len(rank.parts) - 1 else "X"
            axes.plot(part.at_s[-1], heights[-1], marker, ms=6, color=colour, mec=PAPER, zorder=5, clip_on=False)
        times = [at_s for at_s in missed.get(rank.rank, []) if at_s <= axes.get_xlim()[1]]
        axes.plot(times, [lane] * len(times), "x", ms=5.5, mew=1.6, color=INK, zorder=6)
        if rank.parts and len(run.progress) <= NAMED_LANES:
            drawing.note(axes, f"{rank.parts[-1].steps[-1]} steps", (1, lane), (9, 0), INK, **BESIDE)
    lanes = max(1, len(run.progress))
    axes.set_ylim(lanes - 0.5, -0.5)
    names = [f"rank {r.rank}" if r.node == f"node{r.rank}" else f"{r.node}, rank {r.rank}" for r in run.progress]
    named = range(len(names))[:: math.ceil(lanes / NAMED_LANES)]
    drawing.name_lanes(axes, named, [names[lane] for lane in named])


def _stops(part: ProgressPart, shortest_s: float) -> list[tuple[float, float]]:
    """When a rank stood still between one step and the next: (begin, end) in seconds."""
    pairs = list(zip(part.at_s, part.at_s[1:], part.steps, part.steps[1:], strict=False))
    usual_s = median([(after - before) / (to - done) for before, after, done, to in pairs] or [0.0])
    return [
        (before, after)
        for before, after, done, to in pairs
        if to == done + 1 and after - before > max(STOP_STEPS * usual_s, shortest_s)
    ]


def _mark_faults(axes: Axes, run: RunResult) -> None:
    """A line where each fault began, with its name, a dotted one where it ended, and a shade over the ranks it hit.

    The names are stacked, the first one highest, so that no line crosses a name.
    """
    lanes = {rank.rank: lane for lane, rank in enumerate(run.progress)}
    right_s, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    for level, fault in enumerate(reversed(run.faults)):
        until_s = fault.end_s if fault.end_s is not None else right_s
        for lane in [lanes[rank] for rank in fault.ranks if fault.kind in ("cut", "slow", "hang")]:
            axes.fill_between([fault.at_s, until_s], lane - 0.5, lane + 0.5, color=FAINT, lw=0, zorder=0.5)
        if fault.end_s is not None and fault.end_s <= right_s:
            axes.plot([fault.end_s] * 2, axes.get_ylim(), ":", color=INK, lw=1.1, zorder=4)
        drawing.flag(axes, (fault.at_s, bottom), level, str(fault), INK)
