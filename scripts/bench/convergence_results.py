"""What the stored cells of convergence.py say: losses against the parents', bytes, targets, tables and the figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import Report
from convergence_cells import BY_LABEL, ENTRIES, OPTIMIZERS, SHORT, TASKS, Cell, Entry, Find, Protocol, Task
from losses import finite, loss_of
from rich.text import Text
from sheets import Sheet, figure, judged

from commopt.record.words import times_text
from commopt.report import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Row:
    """An entry on a task, at its best rate."""

    entry: Entry
    task: Task
    rate: float | None  # None if it diverged at every rate
    is_at_edge: bool = False
    losses: Mapping[int, float] = field(default_factory=dict)  # by seed
    worse_by: tuple[float, ...] = ()  # percent, for each seed that the parent has too
    parameters: int = 0
    steady_bytes: float | None = None  # per parameter and step
    mean_bytes: float | None = None
    void_steps: int = 0
    has_drifted: bool = False

    @property
    def loss(self) -> float | None:
        return finite(statistics.fmean(self.losses.values())) if self.losses else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of `worse_by` over seeds."""
        return statistics.stdev(self.worse_by) if len(self.worse_by) > 1 else None

    @property
    def target(self) -> float | None:
        return self.entry.targets.get(self.task.name)

    @property
    def is_met(self) -> bool | None:
        """None if there is no target, or nothing to compare with."""
        if self.target is None or (self.rate is not None and not self.worse_by):
            return None
        return self.rate is not None and statistics.fmean(self.worse_by) <= self.target

    @property
    def dense_bytes(self) -> float:
        """What a ring all-reduce of float32 sends."""
        return 8 * (self.task.ranks - 1) / self.task.ranks


def row_of(entry: Entry, task: Task, protocol: Protocol, find: Find) -> Row | None:
    """None as long as the best rate is not known, or nothing is there of it."""
    rate = protocol.best_rate(entry, task, find)
    if rate is None:
        tried = [find(cell) for cell in protocol.choosing(entry, task, find)]
        if not protocol.tunes(entry, task) or None in tried:
            return None
        results = [result for result in tried if result is not None]
        return replace(Row(entry, task, None), **measured(results))
    parent = BY_LABEL[entry.parent]
    parent_rate = protocol.best_rate(parent, task, find)
    losses, worse_by, results = {}, [], list[Mapping[str, Any]]()
    for seed in task.seeds:
        if (result := find(Cell(task, entry, rate, seed))) is None:
            continue
        results.append(result)
        losses[seed] = loss_of(result)
        other = None if parent_rate is None else find(Cell(task, parent, parent_rate, seed))
        if other is not None and parent is not entry:
            worse_by.append(100 * (losses[seed] / loss_of(other) - 1))
    if not results:
        return None
    is_at_edge = protocol.is_at_edge(entry, task, find)
    row = Row(entry, task, rate, is_at_edge, losses, tuple(worse_by))
    return replace(row, **measured(results))


def measured(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a row says of its cells beside their losses. A void step sends less than a steady one."""
    is_whole = all(result["steady_bytes"] is not None and not result["void_steps"] for result in results)
    return {
        "parameters": results[0]["parameters"],
        "steady_bytes": statistics.fmean(result["steady_bytes"] for result in results) if is_whole else None,
        "mean_bytes": statistics.fmean(result["mean_bytes"] for result in results),
        "void_steps": sum(result["void_steps"] for result in results),
        "has_drifted": any(result["replicas_are_equal"] is False for result in results),
    }


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def compressed(dense_bytes: float, nbytes: float | None) -> str:
    return "-" if not nbytes else times_text(dense_bytes / nbytes)


HEADINGS = (
    "method", "parent", "loss", "worse by %", "bytes, steady", "ratio", "bytes, whole run", "ratio", "lr", "target",
)  # fmt: skip


def words_of(row: Row) -> list[str]:
    """A row of the table."""
    is_parent = row.entry.parent == row.entry.label
    worse = f"{statistics.fmean(row.worse_by):+.2f}" if row.worse_by else "-"
    spread = "" if row.spread is None else f" ± {row.spread:.2f}"
    verdict = "" if row.target is None else f"{row.target:g} % {VERDICTS[row.is_met]}"
    return [
        row.entry.label,
        "" if is_parent else row.entry.parent,
        "diverged" if row.loss is None else f"{row.loss:.4f}",
        "" if is_parent else worse + spread,
        number(row.steady_bytes, ".4g"),
        compressed(row.dense_bytes, row.steady_bytes),
        number(row.mean_bytes, ".4g"),
        compressed(row.dense_bytes, row.mean_bytes),
        number(row.rate, "g") + ("^" if row.is_at_edge else ""),
        verdict,
    ]


VERDICTS = {True: "met", False: "missed", None: "open"}


def title(rows: Sequence[Row]) -> str:
    task = rows[0].task
    parameters = max(row.parameters for row in rows)
    seeds = max(len(row.losses) for row in rows)
    return (
        f"{task.name}: {parameters / 1e6:.2f} M parameters, {task.ranks} ranks, {task.steps:,} steps, "
        f"{seeds} seed{'s' * (seeds != 1)}; bytes per parameter and step"
    )


def by_task(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each task, short tasks first, each method below its parent."""
    order = {entry.label: position for position, entry in enumerate(ENTRIES)}
    families = list(OPTIMIZERS)

    def place(row: Row) -> tuple[int, bool, int]:
        return families.index(row.entry.parent), row.entry.label != row.entry.parent, order[row.entry.label]

    names = [name for name in (*SHORT, *TASKS) if any(row.task.name == name for row in rows)]
    return [sorted((row for row in rows if row.task.name == name), key=place) for name in dict.fromkeys(names)]


def report(rows: Sequence[Row]) -> Report:
    """All that is stored, as tables, remarks and a figure."""
    sheets = [sheet(own) for own in by_task(rows)]
    return Report(sheets, remarks(rows), lambda file: draw_figure(rows, file))


def sheet(rows: Sequence[Row]) -> Sheet:
    made: list[list[str | Text]] = []
    for row in rows:
        label, *words, verdict = words_of(row)
        style = "dim" if row.entry.label == row.entry.parent else "bold"
        made.append([Text(label, style), *words, judged(verdict, row.is_met)])
    return Sheet(title(rows), HEADINGS, made, left=("method", "parent", "target"))


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the tables do not show, in sentences."""
    lines = []
    judged = [row for row in rows if row.target is not None]
    if judged:
        missed = [f"{row.entry.label} on {row.task.name}" for row in judged if row.is_met is False]
        undecided = [f"{row.entry.label} on {row.task.name}" for row in judged if row.is_met is None]
        met = sum(row.is_met is True for row in judged)
        lines.append(
            f"Targets: {met} of {len(judged)} met"
            + f"; missed: {', '.join(missed)}" * bool(missed)
            + f"; open: {', '.join(undecided)}" * bool(undecided)
        )
        close = [
            f"{row.entry.label} on {row.task.name}"
            for row in judged
            if row.spread and abs(statistics.fmean(row.worse_by) - row.target) < row.spread  # type: ignore[operator]
        ]
        lines += [f"Within one standard deviation of their target: {', '.join(close)}"] * bool(close)
    if any(row.is_at_edge for row in rows):
        lines.append("^ the best of the rates tried is the last one on its side")
    for row in rows:
        where = f"{row.entry.label} on {row.task.name}"
        if row.void_steps:
            lines.append(f"{where}: {row.void_steps} void steps, in which some gradient was not finite")
        if row.has_drifted:
            lines.append(f"{where}: THE REPLICAS HAVE DRIFTED APART")
        if len(row.losses) < len(row.task.seeds) and row.rate is not None:
            lines.append(f"{where}: {len(row.losses)} of {len(row.task.seeds)} seeds so far")
    return lines


# ---- the figure ------------------------------------------------------------------------------------------------------

COLOURS = dict(zip(("sgd", "adam", "lion", "lamb"), ("#c84a0c", "#0072b2", "#00926a", "#c4569a"), strict=True))
OFF_THE_SCALE = 15.0  # percent worse than the parent: such marks lie at the upper edge


def draw_figure(rows: Sequence[Row], file: Path) -> None:
    """Final loss against the bytes that a rank sent in the whole run, a panel for each short task."""
    tasks = [own for own in by_task(rows) if own[0].task.name in SHORT]
    with figure(file, "Final loss against bytes sent", 0.5 + 6.6 * len(tasks), len(tasks)) as axes:
        for own, ax in zip(tasks, axes, strict=True):
            draw_task(ax, [row for row in own if row.mean_bytes])


def draw_task(ax: Axes, rows: Sequence[Row]) -> None:
    """A line for each parent and a mark for each method, in the colour of its parent."""
    task, losses = rows[0].task, [row.loss for row in rows if row.loss is not None]
    scale = [row.loss for row in rows if row.loss and not is_off_the_scale(row)]
    room = 0.06 * (max(scale) - min(losses)) or 0.1
    ax.set_ylim(min(losses) - room, max(scale) + 2 * room)
    ax.set_xscale("log")
    sent = [row.mean_bytes * task.steps for row in rows if row.mean_bytes]
    ax.set_xlim(min(sent) / 2.5, max(sent) * 2)
    what = f"{rows[0].parameters / 1e6:.2f} M parameters, {task.ranks} ranks, {task.steps} steps"
    drawing.entitle(ax, f"{task.name}: {what}")
    ax.set_xlabel("bytes a rank sends per parameter in the whole run, log scale")
    ax.set_ylabel("final validation loss")
    top = max(scale) + 1.2 * room
    texts: list[tuple[float, float, str, str]] = []
    for row in rows:
        colour, is_parent, x = COLOURS[row.entry.parent], row.entry.label == row.entry.parent, 0.0
        x, y = (row.mean_bytes or 0.0) * task.steps, row.loss
        said = row.entry.label
        if is_parent and y is not None:
            ax.axhline(y, color=colour, linewidth=0.8, linestyle="--", alpha=0.6, zorder=1)
        if y is None or is_off_the_scale(row):
            said, y = f"{said} ({'diverged' if row.loss is None else format(row.loss, '.2f')})", top
            ax.plot([x], [y], "^", color=colour, markersize=6)
        else:
            ax.plot([x], [y], "s" if is_parent else "o", color=colour, markersize=6 if is_parent else 5)
        texts.append((x, y, said, colour))
    label_marks(ax, texts)


def is_off_the_scale(row: Row) -> bool:
    return row.loss is None or (bool(row.worse_by) and statistics.fmean(row.worse_by) > OFF_THE_SCALE)


def label_marks(ax: Axes, texts: Sequence[tuple[float, float, str, str]]) -> None:
    """Write beside each mark what it is: in the first free place, the nearest ones first, with a line to it if it is far."""
    from matplotlib.transforms import Bbox

    ax.figure.draw_without_rendering()  # type: ignore[union-attr]  # so that places are known
    frame, anchors = ax.get_window_extent(), [ax.transData.transform((x, y)) for x, y, _, _ in texts]
    taken = [Bbox([anchor - 5, anchor + 5]) for anchor in anchors]
    points = ax.figure.dpi / 72
    for anchor, (x, y, said, colour) in zip(anchors, texts, strict=True):
        note = ax.annotate(said, (x, y), (0, 0), textcoords="offset points", color=colour, fontsize=9.5, va="center")
        note.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5})
        size = note.get_window_extent()
        width, height = size.width / points, size.height / points
        for dx, dy in places(width):
            left, middle = anchor[0] + dx * points, anchor[1] + dy * points
            box = Bbox.from_bounds(left, middle - size.height / 2, size.width, size.height)
            if frame.contains(*box.min) and frame.contains(*box.max) and not box.count_overlaps(taken):
                break
        else:
            dx, dy = places(width)[0]
            box = Bbox([anchor - 1, anchor + 1])
        note.set_position((dx, dy))
        taken.append(box)
        if math.hypot(dx + (width if dx < 0 else 0), dy) > 1.5 * height:
            reach = dx + (width if dx + width < 0 else 0 if dx > 0 else -dx)
            ax.annotate(
                "", (x, y), (reach, dy), textcoords="offset points", zorder=0,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7},
            )  # fmt: skip


def places(width: float) -> list[tuple[float, float]]:
    """Where a label of this width may begin, in points from its mark, the best first."""
    near = [(7.0, 0.0), (-width - 7, 0.0), (-width / 2, 11.0), (-width / 2, -11.0), (5.0, 8.0), (5.0, -8.0)]
    rings = [
        (side * reach + (-width if side < 0 else 0), rise)
        for reach in (8.0, 20.0, 40.0, 70.0)
        for rise in (14.0, -14.0, 26.0, -26.0, 40.0, -40.0, 56.0, -56.0, 75.0, -75.0, 100.0, -100.0)
        for side in (1, -1)
    ]
    return near + sorted(rings, key=lambda place: math.hypot(place[0] + (width if place[0] < 0 else 0), place[1]))
