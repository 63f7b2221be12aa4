"""The pictures: loss against steps and seconds, bytes per step, and where a step's time goes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from commopt.report.results import Results, RunResult
from commopt.report.words import bytes_text, milliseconds, times_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PAPER = "#1b1f24", "#d5dae0", "#ffffff"
QUIET = "#5b6570"
DENSE_COLOUR = "#7a828c"
METHOD_COLOURS = ("#e08a00", "#0072b2", "#00926a", "#c4569a", "#c84a0c", "#3f9fd8", "#8a7a00")  # after Okabe and Ito
DARK = {  # the same roles on a dark page
    INK: "#e6e9ed",
    FAINT: "#3a414a",
    PAPER: "#15181c",
    QUIET: "#a3adb8",
    DENSE_COLOUR: "#9aa3ad",
    "#e08a00": "#f0a830",
    "#0072b2": "#56b4e9",
    "#00926a": "#2fc79b",
    "#c4569a": "#e08fc4",
    "#c84a0c": "#f07a3c",
    "#3f9fd8": "#8fd0f5",
    "#8a7a00": "#d8c840",
}
WIDTH_IN, DPI = 8.0, 200
FONT_POINTS = 11.0


def colours(results: Results) -> dict[str, str]:
    """A colour for each run's name; dense is grey, since the others are compared with it."""
    others = [run.name for run in results.runs if run.method != "dense"]
    chosen = {name: METHOD_COLOURS[index % len(METHOD_COLOURS)] for index, name in enumerate(others)}
    return {run.name: chosen.get(run.name, DENSE_COLOUR) for run in results.runs}


def loss_against_steps(results: Results) -> Figure:
    """The training loss along the steps: where methods are alike, their lines coincide."""
    figure, axes = _figure("Training loss against steps", 4.4)
    lines = {run.name: [float(step + 1) for step in range(run.steps)] for run in results.runs}
    ends = _draw_losses(axes, results, lines)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, max((run.steps for run in results.runs), default=1) or 1)
    _name_at_the_right(axes, ends)
    return figure


def loss_against_seconds(results: Results) -> Figure:
    """The same losses along the clock: how long each method takes to get there."""
    figure, axes = _figure("The same losses against training time", 4.4)
    ends = _draw_losses(axes, results, {run.name: run.seconds for run in results.runs})
    longest = max((run.seconds[-1] for run in results.runs if run.seconds), default=1.0)
    scale, unit = (60.0, "minutes") if longest >= 600 else (1.0, "seconds")
    axes.set_xlabel(f"training time, {unit} (sum of the step times)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:g}")
    if scale == 60.0:
        from matplotlib.ticker import MultipleLocator

        axes.xaxis.set_major_locator(MultipleLocator(60.0 * _round_step(longest / 60 / 6)))
    axes.set_xlim(0, longest * 1.02)
    _name_below(axes, ends, lambda x: f"{x / scale:.{0 if x >= 10 * scale else 1}f} {unit[:3] if scale > 1 else 's'}")
    return figure


def bytes_per_step(results: Results) -> Figure:
    """Payload and bytes on the wire per step, on a log scale."""
    runs = results.runs
    figure, axes = _figure("Bytes per step in the steady phase (log scale)", 1.5 + 0.62 * max(1, len(runs)))
    chosen = colours(results)
    known = [n for run in runs for n in (run.payload_bytes_per_step, run.nic_tx_bytes_per_step) if n]
    if not known:
        return _say_nothing(axes, "no bytes were counted")
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(min(known)) - 0.1), 10 ** (math.log10(max(known)) + 0.1))
    for row, run in enumerate(runs):
        payload, wire = run.payload_bytes_per_step, run.nic_tx_bytes_per_step
        for nbytes, marker, offset, size in ((payload, "o", -0.17, 7), (wire, "D", 0.17, 6)):
            if nbytes:
                axes.plot([axes.get_xlim()[0], nbytes], [row + offset] * 2, color=chosen[run.name], lw=1.6, alpha=0.45)
                filled = chosen[run.name] if marker == "o" else PAPER
                axes.plot(
                    nbytes, row + offset, marker, ms=size, mfc=filled, mec=chosen[run.name], mew=1.8, clip_on=False
                )
        texts = _beside([("payload", payload, row - 0.17), ("wire", wire, row + 0.17)])
        for text, y in texts:
            axes.annotate(
                text, (1, y), xycoords=("axes fraction", "data"), xytext=(10, 0), textcoords="offset points", va="center",
                fontsize=FONT_POINTS - 1.5, color=INK if "payload" in text else QUIET, annotation_clip=False,
            )  # fmt: skip
        if not texts:
            axes.text(axes.get_xlim()[0] * 1.1, row, "not counted", va="center", color=QUIET)
    _rows(axes, runs)
    axes.xaxis.set_major_formatter(lambda value, _: bytes_text(value).replace(".0", ""))
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(which="minor", colors=QUIET, length=2)
    _legend(
        axes, [("payload, one rank", {"marker": "o", "mfc": QUIET}), ("on the wire, busiest node", {"marker": "D"})]
    )
    return figure


def step_time(results: Results) -> Figure:
    """A steady step: computing, waiting for the network, and what is neither."""
    runs = results.runs
    figure, axes = _figure("A step in the steady phase, in milliseconds", 1.5 + 0.52 * max(1, len(runs)))
    chosen = colours(results)
    longest = max((run.step_s or 0.0 for run in runs), default=0.0)
    if longest == 0.0:
        return _say_nothing(axes, "no run has a step in a steady phase")
    for row, run in enumerate(runs):
        if run.step_s is None:
            axes.text(longest * 0.01, row, "no steady phase", va="center", color=QUIET)
            continue
        left = 0.0
        for seconds, style in zip(step_parts(run), ("compute", "rest", "wait"), strict=True):
            fill = {"compute": chosen[run.name], "rest": _mix(chosen[run.name], 0.45), "wait": PAPER}[style]
            axes.barh(
                row, seconds, left=left, height=0.56, color=fill, edgecolor=chosen[run.name], lw=1.2,
                hatch="////" if style == "wait" else None,
            )  # fmt: skip
            left += seconds
        dense = results.dense
        times = "" if dense is None or run is dense else _times(run.speedup_vs_dense)
        text = f"{milliseconds(run.step_s)} ms" + (("\n" if left > 0.7 * longest else "  ") + times if times else "")
        axes.annotate(
            text, (left, row), xytext=(7, 0), textcoords="offset points", va="center", color=INK, annotation_clip=False
        )
    axes.set_xlim(0, longest * 1.01)
    _rows(axes, runs)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * 1e3:g}")
    _legend(axes, [("computing", 1.0), ("compressing and the rest", 0.45), ("waiting for the network", None)])
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


def png(figure: Figure) -> bytes:
    """The picture on white, 1,600 pixels wide."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def svg(figure: Figure, label: str) -> str:
    """The picture as an <svg> element for a page that names its colours `--c1b1f24`, so that it follows light and dark."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": label, "svg.id": None}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text)
    text = text.replace("xlink:href", "href")
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)  # ids are of the page, which holds several pictures
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    for colour in DARK:
        text = text.replace(colour, f"var(--c{colour[1:]})")
    return text.strip()


def _figure(title: str, height_in: float) -> tuple[Figure, Axes]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": FONT_POINTS, "axes.edgecolor": QUIET, "hatch.linewidth": 1.0}):
        figure = Figure(figsize=(WIDTH_IN, height_in), facecolor=PAPER)
        right = 0.82
        axes = figure.add_axes((0.085, 0.62 / height_in, right - 0.085, 1 - 1.1 / height_in), facecolor="none")
    figure.text(
        0.012, 1 - 0.13 / height_in, title, ha="left", va="top", fontsize=FONT_POINTS + 3, fontweight="bold", color=INK
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET, labelcolor=INK, labelsize=FONT_POINTS - 1, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(True, color=FAINT, lw=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _rows(axes: Axes, runs: Sequence[RunResult]) -> None:
    """One row per run, the first on top, named at the left."""
    axes.set_ylim(len(runs) - 0.45, -0.55)
    axes.set_yticks(range(len(runs)), [run.name + (" (failed)" if run.status == "failed" else "") for run in runs])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    longest = max(len(label.get_text()) for label in axes.get_yticklabels())
    left = (0.25 + longest * (FONT_POINTS - 1) * 0.62 / 72) / WIDTH_IN
    box = axes.get_position()
    axes.set_position((left, box.y0, 0.82 - left, box.height))


def _legend(axes: Axes, entries: Sequence[tuple[str, float | dict[str, str] | None]]) -> None:
    """What the marks mean, under the picture: a marker, or a bar that is solid, pale, or hatched where None."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = []
    for label, look in entries:
        if isinstance(look, dict):
            style = {"mfc": "none", **look}
            handles.append(
                Line2D([], [], ls="", ms=7, mec=QUIET, mew=1.6, label=label, marker=style["marker"], mfc=style["mfc"])
            )
        else:
            hatch, fill = ("////", "none") if look is None else (None, _mix(QUIET, look))
            handles.append(Patch(facecolor=fill, edgecolor=QUIET, hatch=hatch, label=label))
    axes.figure.legend(
        handles=handles, loc="lower left", ncol=len(handles), frameon=False, fontsize=FONT_POINTS - 1,
        bbox_to_anchor=(axes.get_position().x0, 0), borderpad=0.2, handletextpad=0.5, labelcolor=INK, borderaxespad=0.3,
    )  # fmt: skip


def _say_nothing(axes: Axes, text: str) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=QUIET)
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _draw_losses(axes: Axes, results: Results, along: dict[str, list[float]]) -> list[tuple[str, str, float, float]]:
    """Every run's loss, as measured behind and smoothed in front; returns (name, colour, x, y) of each line's end."""
    chosen = colours(results)
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
        ends.append((run.name + _trouble(run), chosen[run.name], x[end], y[end]))
    if not ends:
        _say_nothing(axes, "no step with a finite loss")
        return []
    axes.set_ylabel("training loss")
    _leave_out_spikes(axes, results)
    return ends


def _trouble(run: RunResult) -> str:
    if None in run.train_loss:
        return "\nloss not finite"
    return f"\nstopped at {run.steps}/{run.steps_planned}" if run.status == "failed" else ""


def _leave_out_spikes(axes: Axes, results: Results) -> None:
    """Let the axis end at the highest start of a run, so that one diverging step does not flatten all lines."""
    finite = [loss for run in results.runs for loss in run.train_loss if loss is not None]
    starts = [next(loss for loss in run.train_loss if loss is not None) for run in results.runs if any(run.train_loss)]
    low, high = min(finite), max(starts)
    if high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _name_at_the_right(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Name each line beside its end, moved apart where ends are close; one that ends early is named above its end."""
    x_max = axes.get_xlim()[1]
    early = sorted((end for end in ends if end[2] < 0.85 * x_max), key=lambda end: end[2])
    late = [end for end in ends if end[2] >= 0.85 * x_max]
    widest = max((_width_points(line) for end in late for line in end[0].splitlines()), default=0.0)
    box = axes.get_position()
    right = min(0.82, 1 - (widest + 34) / (72 * WIDTH_IN))
    axes.set_position((box.x0, box.y0, right - box.x0, box.height))
    style: dict[str, Any] = {
        "fontsize": FONT_POINTS - 0.5,
        "fontweight": "bold",
        "annotation_clip": False,
        "linespacing": 1.1,
    }
    low, high = axes.get_ylim()
    for (name, colour, x, y), at in zip(*_moved_apart(late, (high - low) * 0.062, low), strict=True):
        axes.annotate(
            "", (x, y), xytext=(1.035, at), textcoords=("axes fraction", "data"), annotation_clip=False,
            arrowprops=_leader(colour),
        )  # fmt: skip
        axes.annotate(
            name, (1.04, at), xycoords=("axes fraction", "data"), color=colour, va="center_baseline", **style
        )  # fmt: skip
    for level, (name, colour, x, y) in enumerate(reversed(early)):
        axes.annotate(
            name.replace("\n", ": "), (x, y), xytext=(14, 20 + 18 * level), textcoords="offset points", color=colour,
            va="bottom", arrowprops=_leader(colour), **style,
        )  # fmt: skip


def _moved_apart(
    ends: Sequence[tuple[str, str, float, float]], gap: float, low: float
) -> tuple[list[tuple[str, str, float, float]], list[float]]:
    """The ends from the lowest up, and where their names go: as near as `gap` for each line of text allows."""
    ordered = sorted(ends, key=lambda end: end[3])
    half = [gap * (1 + name.count("\n")) / 2 for name, _, _, _ in ordered]
    placed: list[float] = []
    for index, (_, _, _, y) in enumerate(ordered):
        placed.append(y if not placed else max(y, placed[-1] + half[index - 1] + half[index]))
    shift = sum(at - end[3] for at, end in zip(placed, ordered, strict=True)) / max(1, len(placed))
    shift = min(shift, placed[0] - half[0] - low) if placed else 0.0
    return ordered, [at - shift for at in placed]


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
        width = (_width_points(text) + 8) / points_per_x
        fits = x + width < x_max * 1.24
        left, right = (x, x + width) if fits else (x - width, x)
        level = next((i for i, start in enumerate(taken) if right < start), len(taken))
        taken = [min(left if i == level else x, start) for i, start in enumerate(taken[: level + 1])] + taken[
            level + 1 :
        ]
        taken += [left] if level == len(taken) else []
        axes.annotate("", (x, y), xytext=(x, low - step * (level + 0.9)), arrowprops=_leader(colour))
        axes.annotate(
            text, (x, low - step * (level + 0.75)), xytext=(4 if fits else -4, 0), textcoords="offset points", color=colour,
            ha="left" if fits else "right", va="center", fontsize=FONT_POINTS - 0.5, fontweight="bold",
            annotation_clip=False, zorder=40, bbox={"fc": PAPER, "ec": "none", "pad": 0.8},
        )  # fmt: skip
    axes.set_ylim(low - step * (len(taken) + 0.45), high)


def _width_points(text: str) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, prop=FontProperties(weight="bold", size=FONT_POINTS - 0.5)).get_extents().width)


def _leader(colour: str) -> dict[str, Any]:
    return {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 0, "shrinkB": 3}


def _beside(values: Sequence[tuple[str, float | None, float]]) -> list[tuple[str, float]]:
    return [(f"{bytes_text(nbytes)} {what}", y) for what, nbytes, y in values if nbytes]


def _times(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{times_text(ratio)} faster" if ratio >= 1.03 else f"{times_text(1 / ratio)} slower" if ratio < 0.97 else ""


def _mix(colour: str, share: float) -> str:
    """The colour, paler: `share` of it over nothing, so that it suits a light and a dark page."""
    return f"{colour}{round(share * 255):02x}"


def _round_step(value: float) -> float:
    """The next of 1, 2, 5, 10, ... from `value` on."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)
