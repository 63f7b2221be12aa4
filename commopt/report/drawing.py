"""What all pictures share, those of the report and of scripts/bench: size, colours, frames and labels; how they become SVG and PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from commopt.report.document import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, PAPER = "#1b1f24", "#d5dae0", "#ffffff"
QUIET = "#5b6570"
DENSE_COLOUR = "#7a828c"
METHOD_COLOURS = {  # after Okabe and Ito, on a light and on a dark page
    "#e08a00": "#f0a830",
    "#0072b2": "#56b4e9",
    "#00926a": "#2fc79b",
    "#c4569a": "#e08fc4",
    "#c84a0c": "#f07a3c",
    "#3f9fd8": "#8fd0f5",
    "#8a7a00": "#d8c840",
}
DARK = {INK: "#e6e9ed", FAINT: "#3a414a", PAPER: "#15181c", QUIET: "#a3adb8", DENSE_COLOUR: "#9aa3ad"}
DARK |= METHOD_COLOURS
# in the palette's order
PREFERRED = ("fp16", "onebit_adam", "noloco", "diloco", "local_sgd", "distributed_lion", "dgc")
WIDTH_IN, DPI = 6.4, 250
FONT_POINTS = 11.0
LEVEL_IN = 0.21  # between flags


def colours(runs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """A colour for each (name, method): a method has the same one in most pictures, and dense, which others are compared with, is grey."""
    palette = list(METHOD_COLOURS)
    known = dict(zip(PREFERRED, palette, strict=True))
    chosen = {name: DENSE_COLOUR for name, method in runs if method == "dense"}
    for name, method in runs:
        if method in known and name not in chosen:
            chosen[name] = known.pop(method)
    free = cycle([colour for colour in palette if colour not in chosen.values()] or palette)
    return chosen | {name: next(free) for name, _ in runs if name not in chosen}


def run_colours(results: Results) -> dict[str, str]:
    """The colours of the runs, by their names."""
    return colours([(run.name, run.method) for run in results.runs])


def png(figure: Figure) -> bytes:
    """The picture on white, 1,600 pixels wide."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def svg(figure: Figure, label: str) -> str:
    """The picture as an <svg> element; its colours are the page's variables (`--c1b1f24`), so that it follows light and dark."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": label, "svg.id": None}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # the layout is done; a file in another format keeps it
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', text)
    text = text.replace("xlink:href", "href")
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)  # ids must be unique in a page of several pictures
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    for colour in DARK:
        text = text.replace(colour, f"var(--c{colour[1:]})")
    return text.strip()


def new_figure(title: str, height_in: float, ratios: Sequence[float] = (1.0,)) -> tuple[Figure, list[Axes]]:
    """An empty picture with its title, and a frame for each of the ratios, one below the other."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context({"font.size": FONT_POINTS, "axes.edgecolor": QUIET, "hatch.linewidth": 1.0}):
        layout = ConstrainedLayoutEngine(w_pad=0.11, h_pad=0.11)
        figure = Figure(figsize=(WIDTH_IN, height_in), facecolor=PAPER, layout=layout)
        frames = figure.subplots(len(ratios), squeeze=False, height_ratios=ratios, subplot_kw={"facecolor": "none"})
    figure.suptitle(title, x=0.014, ha="left", fontsize=FONT_POINTS + 3, fontweight="bold", color=INK)
    for axes in frames.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=QUIET, labelcolor=INK, labelsize=FONT_POINTS - 1, length=3)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.grid(True, color=FAINT, lw=0.8)
        axes.set_axisbelow(True)
    return figure, list(frames.flat)


def name_lanes(axes: Axes, places: Sequence[int], names: Sequence[str]) -> None:
    """Name lanes at the left, without an axis there."""
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def entitle(axes: Axes, text: str, ink: str = INK, pad: float = 8.0) -> None:
    """Write the title of one of several frames."""
    axes.set_title(text, loc="left", pad=pad, fontweight="bold", fontsize=FONT_POINTS, color=ink)


def flag(axes: Axes, at: tuple[float, float], level: int, text: str, ink: str, *, is_left: bool = False) -> None:
    """A line from a place up to a text above the frame; of flags from left to right, each is a level lower than the one before.

    is_left: whether the text is at the left of the line, which only the last one's may be.
    """
    place, lift = (at[0], 1.0), 5 + LEVEL_IN * 72 * level
    frame = axes.get_xaxis_transform()
    line = {"arrowstyle": "-", "color": ink, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.plot([at[0]] * 2, [at[1], axes.get_ylim()[1]], color=ink, lw=1.1, zorder=4)
    note(axes, "", place, (0, lift + 7), ink, arrowprops=line, xycoords=frame)
    style = {"fontsize": FONT_POINTS - 1, "fontweight": "normal" if ink == INK else "bold"}
    note(
        axes, text, place, (-4 if is_left else 4, lift), ink, ha="right" if is_left else "left", xycoords=frame, **style
    )


def legend(axes: Axes, entries: Sequence[tuple[str, str | float | None]], columns: int = 3) -> None:
    """Explain marks under the picture: a marker ("o" is filled), a line (":"), a shade (FAINT), or a bar's opacity (None: hatched)."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = []
    for label, look in entries:
        if look == ":":
            handles.append(Line2D([], [], ls=look, color=INK, lw=1.1, label=label))
        elif look == FAINT:
            handles.append(Patch(facecolor=FAINT, label=label))
        elif isinstance(look, str):
            fill = QUIET if look == "o" else "none"
            handles.append(Line2D([], [], ls="", ms=7, mec=QUIET, mew=1.6, label=label, marker=look, mfc=fill))
        else:
            hatch, fill = ("////", "none") if look is None else (None, mix(QUIET, look))
            handles.append(Patch(facecolor=fill, edgecolor=QUIET, hatch=hatch, label=label))
    axes.figure.legend(
        handles=handles, loc="outside lower left", ncol=columns, frameon=False, fontsize=FONT_POINTS - 1,
        borderpad=0.2, handletextpad=0.5, labelcolor=INK, borderaxespad=0.3,
    )  # fmt: skip


def name_lines(axes: Axes, ends: Sequence[tuple[str, str, float]]) -> None:
    """Name each line at the right, in its colour, sorted by the y at which it ends: (name, colour, y). Many names have a row each."""
    from matplotlib.lines import Line2D

    ordered = sorted(ends, key=lambda end: -end[2])
    gap = ", " if sum(name.count("\n") + 1 for name, *_ in ordered) > 14 else "\n"
    handles = [Line2D([], [], color=colour, lw=3, label=name.replace("\n", gap)) for name, colour, _ in ordered]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(1.01, 0.0), frameon=False, labelcolor="linecolor",
        handlelength=1.0, labelspacing=0.7, prop={"size": FONT_POINTS - 0.5, "weight": "bold"},
    )  # fmt: skip


def count_time(axes: Axes, end_s: float) -> str:
    """Scale the ticks of an axis of seconds; they count minutes if it ends at 10 minutes or later. Returns the unit."""
    from matplotlib.ticker import MultipleLocator

    scale, unit = (60.0, "minutes") if end_s >= 600 else (1.0, "seconds")
    axes.xaxis.set_major_locator(MultipleLocator(scale * round_step(end_s / scale / 9)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:g}")
    return unit


def note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], ink: str, **style: Any) -> None:
    """Write a text at an offset, in points, from a place."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", color=ink, annotation_clip=False, **style)


def say_nothing(axes: Axes, text: str) -> None:
    """Write why there is no picture, in its place."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=QUIET)


def mix(colour: str, share: float) -> str:
    """The colour at an opacity of `share`, which suits light and dark pages."""
    return f"{colour}{round(share * 255):02x}"


def round_step(value: float) -> float:
    """The smallest of 1, 2, 5, 10, ... that is at least `value`."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)
