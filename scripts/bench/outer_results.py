"""What the stored cells of outer.py say: losses against dense Adam's and DiLoCo's, spread of the replicas, and the figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import Report
from losses import loss_of
from outer_cells import COMPARED, JUDGES, REFERENCES, TARGET, Cell, Entry, Find, Protocol, Task
from outer_training import rate_at
from sheets import Sheet, figure

from commopt.record.words import seconds_text
from commopt.report import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]


LEFT = ("method", "what it is", "against", "target")


@dataclass(frozen=True)
class Row:
    """An entry on so many replicas, at its family's best rate; results by seed."""

    entry: Entry
    ranks: int
    results: Mapping[int, Result]

    def each(self, read: Callable[[Result], float | None]) -> list[float]:
        """What is read of each seed's result, where there is something."""
        return [value for result in self.results.values() if (value := read(result)) is not None]

    def over(self, other: Row | None, key: str = "loss") -> list[float]:
        """By how many percent its loss is above another row's, for each seed that both have."""
        if other is None:
            return []
        both = [(result, other.results[seed]) for seed, result in self.results.items() if seed in other.results]
        return [100 * (own[key] / its[key] - 1) for own, its in both if own[key] is not None and its[key] is not None]


class Results:
    """The stored cells of the entries given, in rows."""

    def __init__(self, protocol: Protocol, find: Find, entries: Sequence[Entry], task: Task) -> None:
        self.protocol, self.find, self.entries, self.task = protocol, find, entries, task

    @cached_property
    def rates(self) -> dict[str, float | None]:
        return {family: self.protocol.best_rate(family, self.find) for family in JUDGES}

    @cached_property
    def rows(self) -> list[Row]:
        """By number of replicas, and in the order of the entries."""
        made = []
        for ranks in self.protocol.seeds:
            for entry in self.entries:
                rate = self.rates[entry.family]
                if rate is None or ranks not in entry.ranks:
                    continue
                found = {
                    seed: self.find(Cell(entry, ranks, rate, seed)) for seed in self.protocol.seeds_of(entry, ranks)
                }
                results = {seed: result for seed, result in found.items() if result is not None}
                if results:
                    made.append(Row(entry, ranks, results))
        return made

    def row(self, label: str, ranks: int) -> Row | None:
        return next((row for row in self.rows if (row.entry.label, row.ranks) == (label, ranks)), None)

    @property
    def pairs(self) -> Iterator[tuple[Row, Row]]:
        """Each NoLoCo with each DiLoCo, on as many replicas."""
        for row in self.rows:
            for label in REFERENCES if row.entry.label in COMPARED else ():
                if (other := self.row(label, row.ranks)) is not None:
                    yield row, other

    def report(self) -> Report:
        """All that is stored, as tables, remarks and a figure."""
        if not self.rows:
            return Report([])
        return Report(tables(self), self.remarks(), lambda file: draw_figure(self, file))

    def missing(self) -> list[str]:
        """The names of cells that are wanted and not stored."""
        return [cell.name for cell in self.protocol.wanted(self.entries, self.find)]

    def cells(self) -> list[Result]:
        """Every stored cell that a table rests on, those that chose the rates included."""
        rates = [(family, rate) for family in JUDGES for rate in self.protocol.tried(family, self.find)]
        chosen = [cell for family, rate in rates for cell in self.protocol.judged(family, rate)]
        chosen += [
            Cell(row.entry, row.ranks, self.rates[row.entry.family] or 0, s) for row in self.rows for s in row.results
        ]
        found = (self.find(cell) for cell in dict.fromkeys(chosen))
        return [result for result in found if result is not None]

    def remarks(self) -> list[str]:
        """What the tables do not show, in sentences."""
        lines = [verdict(self)] if any(True for _ in self.pairs) else []
        for family, rate in self.rates.items():
            if rate is not None and self.protocol.is_at_edge(family, self.find):
                lines.append(f"The best learning rate of {family}, {rate:g}, is the last one tried on its side.")
        lines += followed(self) + estimated(self)
        missed = sum(result["missed"] for result in self.cells())
        lines += [f"{missed} messages did not come in time."] * bool(missed)
        if cells := self.cells():
            cpu_s, seconds = (sum(result[key] for result in cells) for key in ("cpu_seconds", "seconds"))
            lines.append(
                f"{len(cells)} trainings took {seconds_text(cpu_s)} of processor time: {seconds_text(cpu_s / 2)} on two cores that "
                f"have nothing else to do. These had: the trainings' times by the clock add up to {seconds_text(seconds)}."
            )
        if missing := self.missing():
            lines.append(f"Not trained yet: {', '.join(missing)}.")
        return lines


def verdict(results: Results) -> str:
    """Whether NoLoCo as its paper has it is within its target of each DiLoCo."""
    judged = [(own, other, own.over(other)) for own, other in results.pairs if own.entry.label == COMPARED[0]]
    missed = [
        f"{other.entry.label} on {own.ranks} replicas"
        for own, other, worse in judged
        if statistics.fmean(worse) > TARGET
    ]
    said = f"NoLoCo within {TARGET:g} % of DiLoCo: {len(judged) - len(missed)} of {len(judged)} met"
    return said + (f"; missed against {', '.join(missed)}." if missed else ".")


def followed(results: Results) -> list[str]:
    """How the spread of NoLoCo's replicas goes with the learning rate: Pearson's correlation over rounds."""
    said = []
    for row in (row for row in results.rows if row.entry.label == "noloco"):
        found = [correlation(result["spreads"], results.task) for result in row.results.values()]
        known = [value for value in found if value is not None]
        if known:
            said.append(f"{statistics.fmean(known):.2f} on {row.ranks}")
    return [
        f"Correlation of NoLoCo's spread before a round with the learning rate: {', '.join(said)} replicas."
    ] * bool(said)


def correlation(spreads: Sequence[tuple[int, float | None]], task: Task) -> float | None:
    """Of the spread before each round with the inner learning rate; None of fewer than three rounds."""
    pairs = [(rate_at(step, asdict(task)), spread) for step, spread in before_rounds(spreads, task)]
    return statistics.correlation(*zip(*pairs, strict=True)) if len(pairs) > 2 else None


def before_rounds(spreads: Sequence[tuple[int, float | None]], task: Task) -> list[tuple[int, float]]:
    """The spread one step before each round begins."""
    return [(step, spread) for step, spread in spreads if step % task.every == task.every - 1 and spread is not None]


def estimated(results: Results) -> list[str]:
    """How far the last estimate of the spread that a training reports, mostly of the last round but one, is from the true one."""
    ratios = []
    for row in (row for row in results.rows if row.entry.label == "noloco"):
        for result in row.results.values():
            before = before_rounds(result["spreads"], results.task)
            if result["spread_estimate"] is not None and len(before) > 1 and before[-2][1] > 0:
                ratios.append(result["spread_estimate"] / before[-2][1])
    if len(ratios) < 2:
        return []
    said = f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
    return [
        f"The estimate of the spread that a training reports, over the true one: {said} in {len(ratios)} trainings."
    ]


# ---- tables ----------------------------------------------------------------------------------------------------------


def with_deviation(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.2f}" if values else "-"


def words_of(row: Row, reference: Row | None, task: Task) -> list[str]:
    """What both tables of methods say of a row. reference: whose loss it is compared with."""
    losses = row.each(lambda result: result["loss"])
    apart = row.each(lambda result: None if None in result["losses"] else statistics.pstdev(result["losses"]))
    is_reference = reference is not None and reference.entry is row.entry
    return [
        with_deviation(losses, ".4f") if len(losses) == len(row.results) else "diverged",
        "" if is_reference else with_deviation(row.over(reference), "+.2f"),
        with_deviation(row.each(lambda result: result["averaged_loss"]), ".4f"),
        percent(row.each(lambda result: last_of(before_rounds(result["spreads"], task)))),
        percent(row.each(lambda result: last_of(result["spreads"]))),
        f"{statistics.fmean(apart):.4f}" if apart else "-",
        f"{statistics.fmean(row.each(lambda result: result['bytes'])):.3g}",
    ]


def last_of(spreads: Sequence[tuple[int, float | None]]) -> float | None:
    return spreads[-1][1] if spreads else None


COLUMNS = ("mean replica", "spread before %", "after %", "std of losses", "bytes")


def tables(results: Results) -> list[Sheet]:
    """All that is stored, as tables."""
    compared = "Validation loss at equal tokens, mean over replicas; bytes per parameter and step"
    beside = "Beside the comparison: the first seed, or all where a deviation is given"
    made = [
        methods(results, compared, "dense", is_extra=False),
        judged(results),
        methods(results, beside, "noloco", is_extra=True),
        chosen(results),
    ]
    return [sheet for sheet in made if sheet.rows]


def methods(results: Results, title: str, reference: str, *, is_extra: bool) -> Sheet:
    """The methods of the comparison, or those beside it, against a reference on as many replicas."""
    rows = []
    for row in (row for row in results.rows if row.entry.is_extra == is_extra):
        words = words_of(row, results.row(reference, row.ranks), results.task)
        rows.append([f"{row.ranks}", row.entry.label, row.entry.words, *words])
    headings = ("replicas", "method", "what it is", "loss", f"over {reference} %", *COLUMNS)
    return Sheet(title, headings, rows, LEFT)


def judged(results: Results) -> Sheet:
    rows = []
    for own, other in results.pairs:
        worse = own.over(other)
        is_met = statistics.fmean(worse) <= TARGET
        last = f"{TARGET:g} % {'met' if is_met else 'missed'}"
        means = with_deviation(own.over(other, "averaged_loss"), "+.2f")
        labels = [f"{own.ranks}", own.entry.label, other.entry.label, f"{len(worse)}"]
        rows.append([*labels, with_deviation(worse, "+.2f"), means, last])
    headings = ("replicas", "method", "against", "seeds", "loss, worse by %", "mean replica, worse by %", "target")
    return Sheet("NoLoCo against DiLoCo, by seeds", headings, rows, LEFT)


def chosen(results: Results) -> Sheet:
    rows = []
    for family, labels in JUDGES.items():
        for rate in results.protocol.tried(family, results.find):
            found = [result for cell in results.protocol.judged(family, rate) if (result := results.find(cell))]
            if len(found) < len(labels):
                continue
            said = ", ".join(f"{label} {loss_of(result):.4f}" for label, result in zip(labels, found, strict=True))
            mark = "  chosen" if rate == results.rates[family] else ""
            rows.append([family, f"{rate:g}{mark}", said])
    headings = ("family", "lr", "loss")
    return Sheet("The choice of learning rates, with the first seed", headings, rows, headings)


# ---- the figure ------------------------------------------------------------------------------------------------------

METHODS = ("dense", "local_sgd", "diloco", "diloco_heavy", "noloco")
COLOURS = drawing.colours([(label, label) for label in METHODS])


def draw_figure(results: Results, file: Path) -> None:
    """Loss over tokens on the fewest and on the most replicas, and the spread over steps on as many."""
    counts = sorted({row.ranks for row in results.rows if not row.entry.is_extra})
    ends = list(dict.fromkeys((counts[0], counts[-1])))
    with figure(
        file, "Outer methods: loss, and how far apart replicas are", 3.4 * 2 * len(ends), 2 * len(ends)
    ) as made:
        for ax, ranks in zip(made[: len(ends)], ends, strict=True):
            draw_losses(ax, results, ranks)
        for ax, ranks in zip(made[len(ends) :], ends, strict=True):
            draw_spreads(ax, results, ranks)


def draw_losses(ax: Axes, results: Results, ranks: int) -> None:
    """Mean validation loss of the replicas, and dotted that of their mean; averages over seeds."""
    task, own = results.task, [row for row in results.rows if row.ranks == ranks and not row.entry.is_extra]
    named = []
    for row in own:
        curves = [result["curve"] for result in row.results.values()]
        steps = [step for step, _, _ in curves[0]]
        tokens = [step / task.steps * task.tokens * ranks / 1e6 for step in steps]
        colour = COLOURS[row.entry.label]
        for column, style in ((1, "o-"), (2, ":")):
            at_step = zip(*([point[column] for point in curve] for curve in curves), strict=True)
            losses = [float("nan") if None in losses else statistics.fmean(losses) for losses in at_step]
            ax.plot(tokens, losses, style, color=colour, markersize=3.5, linewidth=1.6)
            if column == 1:
                named.append((row.entry.label, colour, losses[-1]))
    ends = [result["curve"][-1][1] for row in own for result in row.results.values() if result["curve"][-1][1]]
    ax.set_ylim(min(ends) * 0.98, max(ends) * 1.12)
    drawing.entitle(ax, f"{ranks} replicas; dotted: the loss of the mean replica")
    ax.set_ylabel("validation loss")
    ax.set_xlabel("tokens seen by all, millions")
    drawing.name_lines(ax, named)


def draw_spreads(ax: Axes, results: Results, ranks: int) -> None:
    """The spread one step before each round, and dotted right after it, with the first seed; and the shape of the learning rate."""
    task, named = results.task, []
    for label in ("local_sgd", "diloco_heavy", "noloco"):
        row = results.row(label, ranks)
        if row is None:
            continue
        spreads = next(iter(row.results.values()))["spreads"]
        before = before_rounds(spreads, task)
        after = [(step, spread) for step, spread in spreads if step % task.every == 0 and spread]
        for points, style in ((before, "-"), (after, ":")):
            steps, values = [step for step, _ in points], [100 * spread for _, spread in points]
            ax.plot(steps, values, style, color=COLOURS[label], linewidth=1.6)
        named.append((label, COLOURS[label], before[-1][1] if before else 0.0))
    high = ax.get_ylim()[1]
    rates = [high * rate_at(step, asdict(task)) for step in range(task.steps)]
    ax.fill_between(range(task.steps), rates, color=drawing.FAINT, alpha=0.5, linewidth=0)
    ax.set_ylim(0, high)
    ax.set_xlim(0, task.steps)
    drawing.entitle(ax, f"{ranks} replicas; dotted: after it; grey: learning rate")
    ax.set_ylabel("spread before a round, %")
    ax.set_xlabel("step")
    drawing.name_lines(ax, named)
