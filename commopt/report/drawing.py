"""How every picture of the report looks: its size, colours, frame and names, and its SVG and PNG."""

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
WIDTH_IN, DPI = 8.0, 200
FONT_POINTS = 11.0


def colours(results: Results) -> dict[str, str]:
    """A colour for each run's name; dense is grey, since the others are compared with it."""
    others = [run.name for run in results.runs if run.method != "dense"]
    chosen = dict(zip(others, cycle(METHOD_COLOURS), strict=False))
    return {run.name: chosen.get(run.name, DENSE_COLOUR) for run in results.runs}


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


def new_figure(title: str, height_in: float) -> tuple[Figure, Axes]:
    """An empty picture with its title, and a frame that leaves room for names at the right."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": FONT_POINTS, "axes.edgecolor": QUIET, "hatch.linewidth": 1.0}):
        figure = Figure(figsize=(WIDTH_IN, height_in), facecolor=PAPER)
        axes = figure.add_axes((0.085, 0.62 / height_in, 0.82 - 0.085, 1 - 1.1 / height_in), facecolor="none")
    figure.text(
        0.012, 1 - 0.13 / height_in, title, ha="left", va="top", fontsize=FONT_POINTS + 3, fontweight="bold", color=INK
    )
    dress(axes)
    return figure, axes


def dress(axes: Axes) -> None:
    """Give a frame the report's colours, sizes and grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=QUIET, labelcolor=INK, labelsize=FONT_POINTS - 1, length=3)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(True, color=FAINT, lw=0.8)
    axes.set_axisbelow(True)


def name_lanes(axes: Axes, places: Sequence[int], names: Sequence[str]) -> None:
    """Name lanes at the left, without an axis there."""
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)


def legend(axes: Axes, entries: Sequence[tuple[str, str | float | None]]) -> None:
    """What the marks mean, under the picture: a marker, of which "o" is filled, or a bar: solid, pale, or hatched where None."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = []
    for label, look in entries:
        if isinstance(look, str):
            fill = QUIET if look == "o" else "none"
            handles.append(Line2D([], [], ls="", ms=7, mec=QUIET, mew=1.6, label=label, marker=look, mfc=fill))
        else:
            hatch, fill = ("////", "none") if look is None else (None, mix(QUIET, look))
            handles.append(Patch(facecolor=fill, edgecolor=QUIET, hatch=hatch, label=label))
    axes.figure.legend(
        handles=handles, loc="lower left", ncol=len(handles), frameon=False, fontsize=FONT_POINTS - 1,
        bbox_to_anchor=(axes.get_position().x0, 0), borderpad=0.2, handletextpad=0.5, labelcolor=INK, borderaxespad=0.3,
    )  # fmt: skip


def note(
    axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], colour: str, **style: Any
) -> None:
    """Write a text so many points from a place."""
    axes.annotate(text, at, xytext=offset, textcoords="offset points", color=colour, annotation_clip=False, **style)


def say_nothing(axes: Axes, text: str) -> Figure:
    """Write why there is no picture in its place."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=QUIET)
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def name_at_the_right(axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Name each line beside its end, moved apart where ends are close; one that ends early is named above its end."""
    x_max = axes.get_xlim()[1]
    early = sorted((end for end in ends if end[2] < 0.85 * x_max), key=lambda end: end[2])
    late = [end for end in ends if end[2] >= 0.85 * x_max]
    widest = max((width_points(line) for end in late for line in end[0].splitlines()), default=0.0)
    box = axes.get_position()
    right = min(0.82, 1 - (widest + 34) / (72 * WIDTH_IN))
    axes.set_position((box.x0, box.y0, right - box.x0, box.height))
    style: dict[str, Any] = {"fontsize": FONT_POINTS - 0.5, "fontweight": "bold", "linespacing": 1.1}
    axes.get_ylim()  # settles the limits
    to_frame = axes.transData + axes.transAxes.inverted()
    heights = [float(to_frame.transform((x, y))[1]) for _, _, x, y in late]
    for (name, colour, x, y), at in zip(*_moved_apart(late, heights), strict=True):
        axes.annotate(
            "", (x, y), xytext=(1.035, at), textcoords="axes fraction", annotation_clip=False, arrowprops=leader(colour)
        )
        axes.annotate(
            name,
            (1.04, at),
            xycoords="axes fraction",
            color=colour,
            va="center_baseline",
            annotation_clip=False,
            **style,
        )
    for level, (name, colour, x, y) in enumerate(reversed(early)):
        words, offset = name.replace("\n", ": "), (14, 20 + 18 * level)
        note(axes, words, (x, y), offset, colour, va="bottom", arrowprops=leader(colour), **style)


def _moved_apart(
    ends: Sequence[tuple[str, str, float, float]], heights: Sequence[float], gap: float = 0.062
) -> tuple[list[tuple[str, str, float, float]], list[float]]:
    """The ends from the lowest up, and how high their names go: as near as `gap` for each line of text allows."""
    order = sorted(range(len(ends)), key=lambda k: heights[k])
    ordered, wanted = [ends[k] for k in order], [heights[k] for k in order]
    half = [gap * (1 + name.count("\n")) / 2 for name, _, _, _ in ordered]
    placed: list[float] = []
    for index, height in enumerate(wanted):
        placed.append(height if not placed else max(height, placed[-1] + half[index - 1] + half[index]))
    shift = sum(at - height for at, height in zip(placed, wanted, strict=True)) / max(1, len(placed))
    shift = min(shift, placed[0] - half[0]) if placed else 0.0
    return ordered, [at - shift for at in placed]


def width_points(text: str) -> float:
    """How wide a name is in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, prop=FontProperties(weight="bold", size=FONT_POINTS - 0.5)).get_extents().width)


def leader(colour: str) -> dict[str, Any]:
    """The thin line from a name to what it names."""
    return {"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 0, "shrinkB": 3}


def mix(colour: str, share: float) -> str:
    """The colour, paler: `share` of it over nothing, so that it suits a light and a dark page."""
    return f"{colour}{round(share * 255):02x}"


def round_step(value: float) -> float:
    """The next of 1, 2, 5, 10, ... from `value` on."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)
