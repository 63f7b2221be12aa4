"""The pictures: loss against steps and seconds, bytes per step, and where a step's time goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from commopt.record.words import bytes_text, milliseconds, times_text
from commopt.report import drawing
from commopt.report.document import Results, RunResult
from commopt.report.drawing import FONT_POINTS, INK, PAPER, QUIET, WIDTH_IN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_against_steps(results: Results) -> Figure:
    """The training loss along the steps: where methods are alike, their lines coincide."""
    figure, axes = drawing.new_figure("Training loss against steps", 4.4)
    lines = {run.name: [float(step + 1) for step in range(run.steps)] for run in results.runs}
    ends = _draw_losses(axes, results, lines)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max((run.steps for run in results.runs), default=1) or 1)
    drawing.name_at_the_right(axes, ends)
    return figure


def loss_against_seconds(results: Results) -> Figure:
    """The same losses along the clock: how long each method takes to get there."""
    figure, axes = drawing.new_figure("The same losses against training time", 4.4)
    ends = _draw_losses(axes, results, {run.name: run.seconds for run in results.runs})
    longest = max((run.seconds[-1] for run in results.runs if run.seconds), default=1.0)
    scale, unit = (60.0, "minutes") if longest >= 600 else (1.0, "seconds")
    axes.set_xlabel(f"training time, {unit} (sum of the step times)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:g}")
    if scale == 60.0:
        from matplotlib.ticker import MultipleLocator

        axes.xaxis.set_major_locator(MultipleLocator(60.0 * drawing.round_step(longest / 60 / 6)))
    axes.set_xlim(0, longest * 1.02)
    _name_below(axes, ends, lambda x: f"{x / scale:.{0 if x >= 10 * scale else 1}f} {unit[:3] if scale > 1 else 's'}")
    return figure


def bytes_per_step(results: Results) -> Figure:
    """Payload and bytes on the wire per step, on a log scale."""
    runs = results.runs
    figure, axes = drawing.new_figure("Bytes per step in the steady phase (log scale)", 1.5 + 0.62 * max(1, len(runs)))
    chosen = drawing.colours(results)
    known = [n for run in runs for n in (run.payload_bytes_per_step, run.nic_tx_bytes_per_step) if n]
    if not known:
        return drawing.say_nothing(axes, "no bytes were counted")
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
    figure, axes = drawing.new_figure("A step in the steady phase, in milliseconds", 1.5 + 0.52 * max(1, len(runs)))
    chosen = drawing.colours(results)
    longest = max((run.step_s or 0.0 for run in runs), default=0.0)
    if longest == 0.0:
        return drawing.say_nothing(axes, "no run has a step in a steady phase")
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
        times = (
            f"{times_text(ratio)} faster"
            if ratio >= 1.03
            else f"{times_text(1 / ratio)} slower"
            if ratio < 0.97
            else ""
        )
        text = f"{milliseconds(run.step_s)} ms" + (("\n" if left > 0.7 * longest else "  ") + times if times else "")
        drawing.note(axes, text, (left, row), (7, 0), INK, va="center")
    axes.set_xlim(0, longest * 1.01)
    _rows(axes, runs)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * 1e3:g}")
    drawing.legend(axes, [("computing", 1.0), ("compressing and the rest", 0.45), ("waiting for the network", None)])
    return figure


PLOTS = {
    "loss_steps": loss_against_steps,
    "loss_seconds": loss_against_seconds,
    "bytes": bytes_per_step,
    "step_time": step_time,
}


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
    left = (0.25 + max(map(len, names)) * (FONT_POINTS - 1) * 0.62 / 72) / WIDTH_IN
    box = axes.get_position()
    axes.set_position((left, box.y0, 0.82 - left, box.height))


def _draw_losses(axes: Axes, results: Results, along: dict[str, list[float]]) -> list[tuple[str, str, float, float]]:
    """Every run's loss, as measured behind and smoothed in front; returns (name, colour, x, y) of each line's end."""
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
        ends.append((run.name + trouble, chosen[run.name], x[end], y[end]))
    if not ends:
        drawing.say_nothing(axes, "no step with a finite loss")
        return []
    axes.set_ylabel("training loss")
    starts = [next(loss for loss in run.train_loss if loss is not None) for run in results.runs if any(run.train_loss)]
    low, high = min(loss for run in results.runs for loss in run.train_loss if loss is not None), max(starts)
    if high > low:  # the axis ends at the highest start of a run, so that one diverging step does not flatten all lines
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    return ends


def _name_below(axes: Axes, ends: Sequence[tuple[str, str, float, float]], clock: Callable[[float], str]) -> None:
    """Name each line under its end, where no other line runs; a name that has no room goes a level deeper.

    A name begins at its line's end and runs to the right, and the ends are taken from the right, so that no connecting
    line crosses a name.
    """
    low, high = axes.get_ylim()
    x_max = axes.get_xlim()[1]
    points_per_x = axes.get_position().width * WIDTH_IN * 72 / x_max
    taken: list[float] = []  # from where on each level is taken
    step = (high - low) * 0.085
    for name, colour, x, y in sorted(ends, key=lambda end: -end[2]):
        text = f"{name.splitlines()[0]} {clock(x)}"
        width = (drawing.width_points(text) + 8) / points_per_x
        fits = x + width < x_max * 1.24
        left, right = (x, x + width) if fits else (x - width, x)
        level = next((i for i, start in enumerate(taken) if right < start), len(taken))
        taken = [min(left if i == level else x, start) for i, start in enumerate(taken[: level + 1])] + taken[
            level + 1 :
        ]
        taken += [left] if level == len(taken) else []
        axes.annotate("", (x, y), xytext=(x, low - step * (level + 0.9)), arrowprops=drawing.leader(colour))
        drawing.note(
            axes, text, (x, low - step * (level + 0.75)), (4 if fits else -4, 0), colour, ha="left" if fits else "right",
            va="center", fontsize=FONT_POINTS - 0.5, fontweight="bold", zorder=40,
            bbox={"fc": PAPER, "ec": "none", "pad": 0.8},
        )  # fmt: skip
    axes.set_ylim(low - step * (len(taken) + 0.45), high)
