"""The pictures: loss against steps and seconds, bytes per step, and where a step's time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from commopt.record.words import bytes_text, milliseconds, seconds_text, times_text
from commopt.report import drawing
from commopt.report.document import Results, RunResult
from commopt.report.drawing import FONT_POINTS, INK, PAPER, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_against_steps(results: Results) -> Figure:
    """The training loss along the steps: where methods are alike, their lines coincide."""
    figure, (axes,) = drawing.new_figure("Training loss against steps", 4.4)
    _draw_losses(axes, results, {run.name: [float(step + 1) for step in range(run.steps)] for run in results.runs})
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max((run.steps for run in results.runs), default=1) or 1)
    return figure


def loss_against_seconds(results: Results) -> Figure:
    """The same losses along the clock: how long each method takes to get there."""
    figure, (axes,) = drawing.new_figure("The same losses against training time", 4.4)
    took = {run.name: f"\n{seconds_text(run.seconds[-1])}" for run in results.runs if run.seconds}
    _draw_losses(axes, results, {run.name: run.seconds for run in results.runs}, took)
    longest = max((run.seconds[-1] for run in results.runs if run.seconds), default=1.0)
    axes.set_xlabel(f"training time, {drawing.count_time(axes, longest)} (sum of the step times)")
    axes.set_xlim(0, longest * 1.02)
    return figure


def bytes_per_step(results: Results) -> Figure:
    """Payload and bytes on the wire per step, on a log scale."""
    runs = results.runs
    figure, (axes,) = drawing.new_figure(
        "Bytes per step in the steady phase (log scale)", 1.5 + 0.62 * max(1, len(runs))
    )
    chosen = drawing.colours(results)
    known = [n for run in runs for n in (run.payload_bytes_per_step, run.nic_tx_bytes_per_step) if n]
    if not known:
        drawing.say_nothing(axes, "no bytes were counted")
        return figure
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(min(known)) - 0.1), 10 ** (math.log10(max(known)) + 0.1))
    for row, run in enumerate(runs):
        payload, wire = run.payload_bytes_per_step, run.nic_tx_bytes_per_step
        looks = (("payload", payload, "o", -0.17, 7), ("wire", wire, "D", 0.17, 6))
        for what, nbytes, marker, offset, size in looks:
            if not nbytes:
                continue
            axes.plot([axes.get_xlim()[0], nbytes], [row + offset] * 2, color=chosen[run.name], lw=1.6, alpha=0.45)
            filled = chosen[run.name] if marker == "o" else PAPER
            axes.plot(nbytes, row + offset, marker, ms=size, mfc=filled, mec=chosen[run.name], mew=1.8, clip_on=False)
            ink = INK if what == "payload" else QUIET
            style = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": FONT_POINTS - 1.5}
            drawing.note(axes, f"{bytes_text(nbytes)} {what}", (1, row + offset), (10, 0), ink, **style)
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
    chosen = drawing.colours(results)
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
    """Mean over a window of a fortieth of the values; a value that is not finite leaves a gap of its own."""
    half = max(0, len(values) // 80)
    out = []
    for index, value in enumerate(values):
        near = [v for v in values[max(0, index - half) : index + half + 1] if v is not None]
        out.append(math.nan if value is None else sum(near) / len(near))
    return out


def _rows(axes: Axes, runs: Sequence[RunResult]) -> None:
    """One row per run, the first on top, named at the left."""
    axes.set_ylim(len(runs) - 0.45, -0.55)
    names = [run.name + (" (failed)" if run.status == "failed" else "") for run in runs]
    drawing.name_lanes(axes, range(len(runs)), names)


def _draw_losses(
    axes: Axes, results: Results, along: Mapping[str, Sequence[float]], took: Mapping[str, str] | None = None
) -> None:
    """Every run's loss, as measured behind and smoothed in front; took: what is said with its name."""
    chosen = drawing.colours(results)
    ends = []
    for order, run in enumerate(results.runs):
        x, y = along[run.name], smooth(run.train_loss)
        finite = [index for index, value in enumerate(y) if math.isfinite(value)]
        if not finite:
            continue
        raw = [math.nan if loss is None else loss for loss in run.train_loss]
        dense = run.method == "dense"
        axes.plot(x, raw, color=chosen[run.name], lw=0.6, alpha=0.3, zorder=2)
        axes.plot(x, y, color=chosen[run.name], lw=3.6 if dense else 1.8, alpha=0.75 if dense else 1, zorder=3 + order)
        end = finite[-1]
        marker = "X" if end < len(y) - 1 or run.status == "failed" else "o"
        axes.plot(x[end], y[end], marker, ms=7, color=chosen[run.name], mec=PAPER, zorder=30, clip_on=False)
        trouble = f"\nstopped at {run.steps}/{run.steps_planned}" if run.status == "failed" else ""
        trouble = "\nloss not finite" if None in run.train_loss else trouble
        ends.append((run.name + trouble + (took or {}).get(run.name, ""), chosen[run.name], y[end]))
    if not ends:
        drawing.say_nothing(axes, "no step with a finite loss")
        return
    axes.set_ylabel("training loss")
    starts = [next(loss for loss in run.train_loss if loss is not None) for run in results.runs if any(run.train_loss)]
    low, high = min(loss for run in results.runs for loss in run.train_loss if loss is not None), max(starts)
    if high > low:  # the axis ends at the highest start of a run, so that one diverging step does not flatten all lines
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    drawing.name_lines(axes, ends)
