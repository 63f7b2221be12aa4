"""The comparison as a table and in one sentence per run; what outer rounds and faults cost, in tables and words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TextIO

from commopt.record.words import megabytes, milliseconds, seconds_text, spread_text, times_text
from commopt.report.document import DocumentPart, Fault, FaultCost, Results, Rounds, RunResult

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

NOTHING = "-"
NARROWEST = 80  # columns of a terminal; narrower ones break the lines themselves
AS_MS, AS_MEGABYTES = ("seconds", "milliseconds"), ("bytes", "megabytes (10^6)")
STOPPED = 2.0  # a stop of fewer median steps counts as none
ALIKE = 0.03  # two speeds or byte counts that differ by less are called the same


@dataclass(frozen=True)
class Column:
    """One column: its heading, its meaning, its value for a run and the dense run (None if there is none), and that value as text."""

    heading: tuple[str, str]
    meaning: str
    value: Callable[[RunResult, RunResult | None], Any]
    text: Callable[[Any], str] = str


def column_of(
    heading: tuple[str, str], field: str, text: Callable[[Any], str] = str, units: tuple[str, str] = ("", "")
) -> Column:
    """The column for a field of a run or of its rounds (`rounds.missed`), described as there; units: the field's, and the column's."""
    model = Rounds if field.startswith("rounds.") else RunResult
    meaning = described(model, field.rpartition(".")[2]).replace(*units, 1)
    return Column(heading, meaning, lambda run, _: attrgetter(field)(run), text)


def described(model: type[DocumentPart], field: str) -> str:
    """The description of a field in the results document, without the part on null."""
    return (model.model_fields[field].description or "").partition("; null ")[0]


def cells_of(columns: Sequence[Column], runs: Sequence[RunResult], dense: RunResult | None) -> list[list[str]]:
    """One row per run, one text per column; `-` for a value of None."""
    values = [[(column, column.value(run, dense)) for column in columns] for run in runs]
    return [[NOTHING if value is None else column.text(value) for column, value in row] for row in values]


def table_of(columns: Sequence[Column], cells: Sequence[Sequence[str]], gap: int = 1) -> Table:
    """The rows under their headings. In a terminal, the word failed is red."""
    from rich.text import Text

    styles = {NOTHING: "dim", "failed": "bold red"}
    rows = [[Text(name, "bold"), *(Text(text, styles.get(text, "")) for text in texts)] for name, *texts in cells]
    return columns_of(["\n".join(column.heading) for column in columns], rows, gap)


def columns_of(headings: Sequence[str], rows: Sequence[Sequence[str | Text]], gap: int = 2) -> Table:
    """The rows under their headings, with `gap` spaces between columns; only names, which come first, are folded."""
    from rich.table import Table

    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for k, heading in enumerate(headings):
        table.add_column(heading, justify="right" if k else "left", overflow="fold", no_wrap=k > 0)
    for row in rows:
        table.add_row(*row)
    return table


COLUMNS = (
    column_of(("method", ""), "name"),
    Column(
        ("loss", "at end"),
        f"{described(RunResult, 'val_loss')}; without a validation, the mean training loss of the last tenth of the steps",
        lambda run, _: run.end_loss,
        "{:.3f}".format,
    ),
    Column(
        ("to", "dense"),
        "its difference from dense's loss after the same number of steps",
        lambda run, dense: None if run is dense else loss_above_dense(run, dense),
        lambda above: f"{round(above, 3) + 0.0:+.1%}",  # no -0.0%
    ),
    column_of(("step", "ms"), "step_s", milliseconds, AS_MS),
    column_of(("compute", "ms"), "compute_s", milliseconds, AS_MS),
    column_of(("wait", "%"), "wait_share", "{:.0%}".format),
    column_of(("payload", "MB/step"), "payload_bytes_per_step", megabytes, AS_MEGABYTES),
    column_of(("wire", "MB/step"), "nic_tx_bytes_per_step", megabytes, AS_MEGABYTES),
    column_of(("wire/", "count"), "nic_over_model", "{:.3f}".format),
    column_of(("times", "faster"), "speedup_vs_dense", times_text),
    Column(
        ("run", "s"),
        described(RunResult, "wall_s"),
        lambda run, _: "failed" if run.status == "failed" else run.wall_s,
        lambda wall: wall if wall == "failed" else f"{wall:.0f}" if wall >= 9.95 else f"{wall:.1f}",
    ),
)
ROUND_COLUMNS = (
    column_of(("outer", "rounds"), "name"),
    column_of(("", "rounds"), "rounds.rounds"),
    column_of(("", "missed"), "rounds.missed"),
    column_of(("blocked", "ms/round"), "rounds.blocked_s", milliseconds, AS_MS),
    column_of(("worst", "rank"), "rounds.blocked_worst_s", milliseconds, AS_MS),
    column_of(("blocked", "%"), "rounds.blocked_share", "{:.1%}".format),
    column_of(("exchange", "s"), "rounds.exchange_s", "{:.2f}".format),
    column_of(("sent", "MB/step"), "rounds.bytes_per_step", megabytes, AS_MEGABYTES),
    column_of(("spread", "at end"), "rounds.spread_end", spread_text),
)
FAULT_COLUMNS = (
    ("at step", described(Fault, "at_step")),
    ("second", described(Fault, "at_s")),
    ("fault", "what was done to which nodes"),
    ("survivors' longest stop", f"{described(FaultCost, 'longest_stop_s')}; none if it is less than two median steps"),
    ("rounds missed", described(FaultCost, "missed")),
    ("stepped again", described(FaultCost, "back_after_s")),
)


def cells(results: Results) -> list[list[str]]:
    return cells_of(COLUMNS, results.runs, results.dense)


def loss_above_dense(run: RunResult, dense: RunResult | None) -> float | None:
    """How far the loss is above dense's, as a share of it; None unless both did the same number of steps, and have a loss of one kind."""
    if dense is None or run.steps != dense.steps or run.loss_name != dense.loss_name:
        return None
    return run.end_loss / dense.end_loss - 1 if run.end_loss is not None and dense.end_loss else None


def show(results: Results, stream: TextIO) -> None:
    """Write the table, a sentence on each run, a table of outer rounds, a line on each fault, and notices; colours only in a terminal."""
    from rich.console import Console

    is_terminal = stream.isatty()
    console = Console(file=stream, width=None if is_terminal else 200, markup=False, highlight=False)
    console.width, gap = max(console.width, NARROWEST), 1 if is_terminal else 2
    console.print(table_of(COLUMNS, cells(results), gap))
    for sentence in ["", *readings(results)]:
        console.print(sentence, soft_wrap=True)
    if rounds := round_cells(results):
        console.print("", table_of(ROUND_COLUMNS, rounds, gap), sep="\n")
    for sentence in ["", *fault_lines(results)] if results.has_faults else []:
        console.print(sentence, soft_wrap=True)
    remarks = [f"cluster {results.cluster.name}: {notice}" for notice in results.cluster.notices]
    for run in results.runs:
        remarks += [f"{run.name}: {text}" for text in [*run.notices, *event_texts(run), *run.defects]]
    for remark in ["", *remarks] if remarks else []:
        console.print(remark, style="yellow", soft_wrap=True)
    stream.flush()


def event_texts(run: RunResult) -> list[str]:
    """One text for each kind of the run's events: the first of them, and how many more there are."""
    texts = []
    for kind in dict.fromkeys(event.kind for event in run.events):
        same = [event for event in run.events if event.kind == kind]
        fields = ", ".join(f"{key} {value}" for key, value in same[0].fields.items())
        who = "all ranks" if len(same[0].ranks) == run.ranks else f"rank {', '.join(map(str, same[0].ranks))}"
        more = f", and {len(same) - 1} more" if len(same) > 1 else ""
        texts.append(f"{kind}: {fields or 'no details'} ({who}){more}")
    return texts


def readings(results: Results) -> list[str]:
    """The table in words, one sentence per run: `onebit_adam: steps 9.5x faster than dense after step 24; ...`"""
    return [f"{run.name}: {'; '.join(filter(None, _parts(run, results.dense)))}." for run in results.runs]


def _parts(run: RunResult, dense: RunResult | None) -> list[str]:
    parts = []
    if run.status == "failed":
        if run.steps == 0:
            return [f"did not finish a step ({run.failure})"]
        parts.append(f"did not finish ({run.failure}), so this is of {run.steps} of {run.steps_planned} steps")
    if dense is not None and run is not dense:
        return [*parts, *_speed(run, dense), _loss(run, dense), _fewer_bytes(run, dense)]
    waiting = "" if run.wait_share is None else f", {run.wait_share * 100:.0f} % of it waiting for the network"
    step = "no speed in a steady phase" if run.step_s is None else f"{milliseconds(run.step_s)} ms a step{waiting}"
    return [*parts, step, _uneven(run), _loss_itself(run)]


def _speed(run: RunResult, dense: RunResult) -> list[str]:
    if run.step_s is None or dense.step_s is None:
        who = run.name if run.step_s is None else dense.name
        return [f"no speed-up: {who} has no step in a steady phase"]
    after = f" after step {run.warmup_steps}" if run.warmup_steps else ""
    text = f"steps {_compared(dense.step_s / run.step_s, 'as fast as', 'faster than', 'slower than')} dense{after}"
    both_finished = run.status == dense.status == "finished" and run.steps == dense.steps
    if both_finished and run.wall_s and dense.wall_s:
        text += f", the whole run {_compared(dense.wall_s / run.wall_s, 'as fast', 'faster', 'slower')}"
    return [text, _uneven(run)]


def _compared(ratio: float, alike: str, above: str, below: str) -> str:
    if abs(ratio - 1) < ALIKE:
        return alike
    factor = max(ratio, 1 / ratio)
    times = f"{factor:.2f}x" if factor < 1.095 else times_text(factor)
    return f"{times} {above if ratio > 1 else below}"


def _uneven(run: RunResult) -> str:
    """Report a mean far from the median: some steps communicate and others do not."""
    if run.step_s is None or run.step_mean_s is None or abs(run.step_mean_s / run.step_s - 1) < 0.2:
        return ""
    return f"its steady steps are not alike, and take {milliseconds(run.step_mean_s)} ms on average"


def _loss_itself(run: RunResult) -> str:
    if None in run.train_loss:
        first = run.train_loss.index(None) + 1
        return f"training loss not finite in {run.train_loss.count(None)} steps, first in step {first}"
    return (
        f"no {run.loss_name}" if run.end_loss is None else f"{run.loss_name} {run.end_loss:.3f} after {run.steps} steps"
    )


def _loss(run: RunResult, dense: RunResult) -> str:
    above = loss_above_dense(run, dense)
    if above is None or None in run.train_loss:
        other = f", where dense did {dense.steps}" if run.steps != dense.steps and run.end_loss is not None else ""
        return _loss_itself(run) + other
    return loss_text(run, above)


def loss_text(run: RunResult, above: float) -> str:
    """`val loss 0.2 % above`, or `the same val loss`: how far a run's loss is from dense's, as a share of it."""
    if abs(above) < 0.0005:
        return f"the same {run.loss_name}"
    return f"{run.loss_name} {abs(above) * 100:.1f} % {'above' if above > 0 else 'below'}"


def _fewer_bytes(run: RunResult, dense: RunResult) -> str:
    """On the wire of the machine that sends most, with headers; payload if its interface was not read."""
    for field, what in (
        ("nic_tx_bytes_per_step", "bytes a step on the wire"),
        ("payload_bytes_per_step", "bytes a step"),
    ):
        mine, other = getattr(run, field), getattr(dense, field)
        if mine and other:
            what += " of a machine, without headers" * (field == "payload_bytes_per_step")
            return _compared(other / mine, f"as many {what}", f"fewer {what}", f"more {what}")
    return ""


def round_cells(results: Results) -> list[list[str]]:
    """One row per run that has outer rounds, one text per column."""
    return cells_of(ROUND_COLUMNS, [run for run in results.runs if run.rounds is not None], results.dense)


def fault_row(fault: Fault) -> list[str]:
    """`120`, `12.4`, `node2 killed`, `3.1 s (rank 0, 31 steps' time)`, `3 (rank 0: 2, rank 1: 1)`, `4.2 s, step 182`."""
    cost, stop, back = fault.cost, NOTHING, NOTHING
    if cost.longest_stop_s is not None:
        steps = cost.longest_stop_s / (cost.median_step_s or math.inf)
        who = f"rank {cost.stopped_rank}, {steps:.0f} steps' time"
        stop = f"{seconds_text(cost.longest_stop_s)} ({who})" if steps >= STOPPED else "none"
    missed = ", ".join(f"rank {each.rank}: {each.rounds}" for each in cost.missed)
    missed = f"{sum(each.rounds for each in cost.missed)} ({missed})" if missed else "0"
    if fault.kind == "restart":
        after_s = cost.back_after_s
        back = "never" if after_s is None else f"{seconds_text(after_s)}, step {cost.back_at_step}"
    return [str(fault.at_step), f"{fault.at_s:.1f}", str(fault), stop, missed, back]


def fault_lines(results: Results) -> list[str]:
    """`noloco, fault at step 120: node2 killed; longest stop: 3.1 s (rank 0, 31 steps' time)`."""
    return [
        f"{run.name}, fault at step {fault.at_step}: {fault}; {cost_text(fault)}"
        for run in results.runs
        for fault in run.faults
    ]


def cost_text(fault: Fault) -> str:
    """`longest stop: 3.1 s (rank 0, 31 steps' time); rounds missed: 3 (...)`."""
    said = zip(("longest stop", "rounds missed", "stepped again"), fault_row(fault)[3:], strict=True)
    return "; ".join(f"{what}: {text}" for what, text in said if text not in (NOTHING, "0")) or "nobody left to see it"
