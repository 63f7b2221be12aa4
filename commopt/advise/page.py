"""Advice as a table, a picture and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from commopt.advise.advice import OUTER, Advice, Row, to_json
from commopt.plan.model import predict
from commopt.record.words import bytes_text, rate_text, seconds_text, times_text
from commopt.report import drawing
from commopt.report.page import template, write_all
from commopt.report.table import columns_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("advice.json", "advice.html", "advice.png")
HEADINGS = (
    ("method", "", "a method's name; the one to take is bold"),
    ("step", "likely", "an optimizer step, on average after any warm-up"),
    ("step", "from, to", "between what limits it may lie"),
    ("gain", "", "dense's step over this one"),
    ("sent per", "machine, step", "what a machine's network card sends in a step, on average"),
    ("memory", "per rank", "what the method keeps on a rank beside the model and the optimizer"),
    ("loss", "worse by", "the largest increase over the uncompressed parent's loss among the small trainings measured"),
)
TARGET_HEADING = (
    "link for",
    "{:.0%}",
    "the least rate of each machine's link at which computation is this share of a step",
)
MEASURE = (
    "to measure instead: commopt probe CLUSTER.yaml -- train.py, then commopt advise CLUSTER.yaml --probe probe.json"
)
DRAWN = 6  # methods of which one may be taken
SPAN = 100.0  # times the user's rate to each side


def headings(advice: Advice) -> list[tuple[str, str, str]]:
    """Two lines and the meaning of each column."""
    if advice.target is None:
        return list(HEADINGS)
    first, second, meaning = TARGET_HEADING
    return [*HEADINGS, (first, second.format(advice.target), meaning)]


def cells(advice: Advice) -> list[list[str]]:
    """A row of texts per method, the fastest first, dense on top."""
    return [_cells(row, advice) for row in ordered(advice)]


def ordered(advice: Advice) -> list[Row]:
    """Dense, then the others, the fastest first."""
    others = sorted((row for row in advice.rows if row is not advice.dense), key=lambda row: row.likely.step_s)
    return [advice.dense, *others]


def _cells(row: Row, advice: Advice) -> list[str]:
    worst = max((one.worse_percent for one in row.profile.quality), default=None)
    texts = [
        row.name,
        seconds_text(row.likely.step_s),
        f"{seconds_text(row.low_s)}, {seconds_text(row.high_s)}",
        "" if row is advice.dense else times_text(row.gain),
        bytes_text(row.likely.bytes_per_machine),
        bytes_text(row.state_bytes) if row.state_bytes > 0 else "0",
        "" if row is advice.dense else "?" if worst is None else f"{worst:+.1f} %",
    ]
    if advice.target is not None:
        texts.append("none" if row.needed_bytes_per_s is None else rate_text(row.needed_bytes_per_s))
    return texts


def what(advice: Advice) -> str:
    """The question in a sentence."""
    setting, cluster = advice.setting, advice.cluster
    per = f" of {setting.slots} ranks" if setting.slots > 1 else ""
    return (
        f"{setting.parameters:,} parameters on {setting.machines} machines{per} ({cluster.name}), links of "
        f"{rate_text(cluster.bytes_per_s)}; a step computes for {seconds_text(setting.compute_s)}."
    )


def show(advice: Advice, out: TextIO) -> None:
    """Print the table and the verdict; in a terminal, the method to take is bold."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=out, width=None if out.isatty() else 1000, highlight=False)
    every = zip(ordered(advice), cells(advice), strict=True)
    rows = [[Text(text, "bold" if row is advice.best else "") for text in texts] for row, texts in every]
    console.print(Text(what(advice)))
    console.print("", columns_of([f"{first}\n{second}" for first, second, _ in headings(advice)], rows), "", sep="\n")
    for text in advice.assumptions:
        console.print(Text(f"assumed: {text}", "dim"))
    if advice.assumptions:
        console.print(Text(MEASURE, "dim"), "", sep="\n")
    console.print(Text(advice.verdict, "bold"))
    for note in advice.notes:
        console.print(Text(note))
    if advice.helps:
        console.print()
        console.print(Text(code(advice)))
        console.print(Text(f"or in a run's file: {yaml(advice)}"))


def code(advice: Advice) -> str:
    """The line of Python."""
    return f'run = commopt.attach(model, "{advice.best.name}", optimizer)'


def yaml(advice: Advice) -> str:
    """The line of a run's file."""
    name = advice.best.name
    return f"method: {name}" if name.isidentifier() else f'method: "{name}"'


def drawn(advice: Advice) -> list[Row]:
    """What the picture shows: dense, the methods of which one may be taken, and the two fastest outer methods."""
    wanted = [advice.dense, advice.best]
    wanted += [row for row in ordered(advice) if row.name in advice.named][:DRAWN]
    wanted += [row for row in ordered(advice) if row.name in OUTER][:2]
    return list({row.name: row for row in wanted}.values())


def picture(advice: Advice) -> Figure:
    """Step time against the rate of the links, for the best methods, with the user's link marked."""
    figure, (axes,) = drawing.new_figure("A step against the rate of the links", 4.2)
    own = advice.cluster.bytes_per_s * 8
    centre = own if math.isfinite(own) else 1e10
    low, high = max(1e5, centre / SPAN), min(4e12, centre * SPAN)
    rates = [low * (high / low) ** (k / 60) for k in range(61)]
    rows = drawn(advice)
    chosen = drawing.colours([(row.name, row.name.partition("(")[0]) for row in rows])
    settings = [advice.at_rate(rate / 8) for rate in rates]
    ends = []
    axes.set_xscale("log")
    axes.set_yscale("log")
    for row in rows:
        steps = [predict(row.profile, setting).step_s for setting in settings]
        is_named = row is advice.best
        axes.plot(rates, steps, color=chosen[row.name], lw=3.0 if is_named else 1.7, zorder=3 if is_named else 2)
        ends.append((row.name, chosen[row.name], steps[0]))
    axes.axhline(advice.setting.compute_s, color=drawing.QUIET, lw=1.1, ls=":")
    drawing.note(
        axes, "computation alone", (high, advice.setting.compute_s), (-4, -12), drawing.QUIET, fontsize=9.5, ha="right"
    )
    if math.isfinite(own):
        axes.axvline(own, color=drawing.INK, lw=1.1, zorder=1)
        top = axes.get_ylim()[1]
        drawing.note(axes, f"yours: {rate_text(own / 8)}", (own, top), (5, -10), drawing.INK, fontsize=10)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=advice.setting.compute_s / 2)
    axes.set_xlabel("rate of each machine's link, log scale")
    axes.set_ylabel("step, log scale")
    axes.xaxis.set_major_formatter(lambda value, _: rate_text(value / 8))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{1e3 * value:g} ms")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.tick_params(which="minor", colors=drawing.QUIET, length=2)
    drawing.name_lines(axes, ends)
    return figure


def page(advice: Advice, figure: Figure) -> str:
    """The HTML page: the picture is inline, and there is no script."""
    rows = ordered(advice)
    shades = drawing.colours([(row.name, row.name.partition("(")[0]) for row in drawn(advice)])
    return template("advice.html").render(
        advice=advice,
        what=what(advice),
        headings=headings(advice),
        meanings=[(" ".join(filter(None, (a, b))), meaning) for a, b, meaning in headings(advice)],
        rows=list(zip(rows, cells(advice), strict=True)),
        colours={row.name: shades.get(row.name, drawing.FAINT) for row in rows},
        picture=drawing.svg(figure, "Step time against the rate of the links"),
        code=code(advice),
        yaml=yaml(advice),
        measure=MEASURE,
        palette=drawing.DARK,
    )


def write(advice: Advice, out_dir: Path) -> Sequence[Path]:
    """Write advice.json, advice.html and advice.png in a folder. Raises LaunchError for a file that cannot be written."""
    figure = picture(advice)
    contents = {
        "advice.json": (json.dumps(to_json(advice), indent=1) + "\n").encode(),
        "advice.html": page(advice, figure).encode(),
        "advice.png": drawing.png(figure),
    }
    return write_all(out_dir, contents)
