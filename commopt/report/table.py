"""The comparison as a table, and in one sentence per run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

from commopt.record.words import megabytes, milliseconds, times_text
from commopt.report.columns import Column, aligned, cells_of, rich_rows
from commopt.report.document import Results, RunResult
from commopt.report.outer_table import ROUND_COLUMNS, fault_lines, round_cells

ALIKE = 0.03  # two speeds or byte counts that differ by less are called the same


COLUMNS = (
    Column(("method", ""), "the method; a number where it ran more than once", lambda run, _: run.name),
    Column(
        ("val", "loss"),
        "loss of the last validation, on text that is not trained on",
        lambda run, _: run.val_loss,
        "{:.3f}".format,
    ),
    Column(
        ("to", "dense"),
        "its difference to the validation loss of dense after as many steps",
        lambda run, dense: None if run is dense else loss_above_dense(run, dense),
        "{:+.1%}".format,
    ),
    Column(
        ("step", "ms"),
        "milliseconds of a step in the steady phase: the median, or the mean where a method has outer rounds, which few "
        "steps hold",
        lambda run, _: run.step_s,
        milliseconds,
    ),
    Column(
        ("compute", "ms"),
        "milliseconds of the same step with communication switched off: no method can be faster",
        lambda run, _: run.compute_s,
        milliseconds,
    ),
    Column(
        ("wait", "%"),
        "share of the steady steps spent waiting for the network",
        lambda run, _: run.wait_share,
        "{:.0%}".format,
    ),
    Column(
        ("payload", "MB/step"),
        "megabytes (10^6) that one rank hands to the network per step of the steady phase, without headers; where only "
        "outer rounds were counted, what they sent over all steps",
        lambda run, _: run.payload_bytes_per_step,
        megabytes,
    ),
    Column(
        ("wire", "MB/step"),
        "megabytes per step that left the network interface of the busiest node, by the kernel's count",
        lambda run, _: run.nic_tx_bytes_per_step,
        megabytes,
    ),
    Column(
        ("wire/", "count"),
        "the kernel's count over commopt's count with headers; 1.00 when commopt counts right",
        lambda run, _: run.nic_over_model,
        "{:.3f}".format,
    ),
    Column(
        ("times", "faster"),
        "step of dense over this step, both in their steady phase",
        lambda run, _: run.speedup_vs_dense,
        times_text,
    ),
    Column(
        ("run", "s"),
        "wall-clock seconds of all steps, warm-up and validations included",
        lambda run, _: "failed" if run.status == "failed" else run.wall_s,
        lambda wall: wall if wall == "failed" else f"{wall:.0f}" if wall >= 9.95 else f"{wall:.1f}",
    ),
)


def cells(results: Results) -> list[list[str]]:
    """One row per run, one text per column; `-` where there is nothing to say."""
    return cells_of(COLUMNS, results.runs, results.dense)


def loss_above_dense(run: RunResult, dense: RunResult | None) -> float | None:
    """How far the validation loss is above dense's, as a share of it; None unless both did as many steps."""
    if dense is None or run.steps != dense.steps or run.val_loss is None or not dense.val_loss:
        return None
    return run.val_loss / dense.val_loss - 1


def show(results: Results, stream: TextIO) -> None:
    """Write the table, a sentence on each run and what else must be known; colours only in a terminal.

    Outer rounds have a table of their own, and faults a line each, where there are any.
    """
    rounds, is_terminal = round_cells(results), stream.isatty()
    write: Callable[..., None] = partial(print, file=stream)
    rows: Callable[[Sequence[Column], Sequence[Sequence[str]]], Any] = aligned
    if is_terminal:
        from rich.console import Console

        write, rows = partial(Console(file=stream).print, markup=False, highlight=False), rich_rows
    write(rows(COLUMNS, cells(results)))
    sentences = ["", *readings(results), *(["", rows(ROUND_COLUMNS, rounds)] if rounds else [])]
    sentences += ["", *fault_lines(results)] if results.has_faults else []
    sentences += [""] if not is_terminal and (rounds or results.has_faults) else []
    for sentence in sentences:
        write(sentence)
    remarks = [f"cluster {results.cluster.name}: {notice}" for notice in results.cluster.notices]
    for run in results.runs:
        remarks += [f"{run.name}: {text}" for text in [*run.notices, *event_texts(run), *run.defects]]
    for remark in remarks:
        write(remark, style="yellow") if is_terminal else write(remark)
    stream.flush()


def event_texts(run: RunResult) -> list[str]:
    """The run's events, one text for each kind, with the first of them in words."""
    texts = []
    for kind in dict.fromkeys(event.kind for event in run.events):
        same = [event for event in run.events if event.kind == kind]
        fields = ", ".join(f"{key} {value}" for key, value in same[0].fields.items())
        who = "all ranks" if len(same[0].ranks) == run.ranks else f"rank {', '.join(map(str, same[0].ranks))}"
        more = f", and {len(same) - 1} more" if len(same) > 1 else ""
        texts.append(f"{kind}: {fields or 'no details'} ({who}){more}")
    return texts


def readings(results: Results) -> list[str]:
    """What the table says, in one sentence per run: `onebit_adam: steps 9.5x faster than dense after step 24; ...`"""
    return [f"{run.name}: {'; '.join(filter(None, _parts(run, results.dense)))}." for run in results.runs]


def _parts(run: RunResult, dense: RunResult | None) -> list[str]:
    parts = []
    if run.status == "failed":
        if run.steps == 0:
            return [f"did not finish a step ({run.failure})"]
        parts.append(f"did not finish ({run.failure}), so this is of {run.steps} of {run.steps_planned} steps")
    if dense is not None and run is not dense and run != dense:
        return [*parts, *_speed(run, dense), _loss(run, dense), _fewer_bytes(run, dense)]
    waiting = "" if run.wait_share is None else f", {run.wait_share * 100:.0f} % of it waiting for the network"
    step = "no speed in a steady phase" if run.step_s is None else f"{milliseconds(run.step_s)} ms a step{waiting}"
    return [*parts, step, _uneven(run), _loss_itself(run)]


def _speed(run: RunResult, dense: RunResult) -> list[str]:
    if run.step_s is None or dense.step_s is None:
        who = run.name if run.step_s is None else dense.name
        return [f"no speed-up to tell, since {who} has no step in a steady phase"]
    after = f" after step {run.warmup_steps}" if run.warmup_steps else ""
    text = f"steps {_faster(dense.step_s / run.step_s)} dense{after}"
    both_finished = run.status == dense.status == "finished" and run.steps == dense.steps
    if both_finished and run.wall_s and dense.wall_s:
        text += f", the whole run {_faster(dense.wall_s / run.wall_s).removesuffix(' than').removesuffix(' as')}"
    return [text, _uneven(run)]


def _faster(ratio: float) -> str:
    if abs(ratio - 1) < ALIKE:
        return "as fast as"
    return f"{_factor(ratio)} faster than" if ratio > 1 else f"{_factor(1 / ratio)} slower than"


def _factor(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1.095 else times_text(ratio)


def _uneven(run: RunResult) -> str:
    """A median hides that some steps communicate and others do not; the mean tells."""
    if run.step_s is None or run.step_mean_s is None or abs(run.step_mean_s / run.step_s - 1) < 0.2:
        return ""
    return f"its steady steps are not alike, and take {milliseconds(run.step_mean_s)} ms on average"


def _loss_itself(run: RunResult) -> str:
    if None in run.train_loss:
        first = run.train_loss.index(None) + 1
        return f"training loss not finite in {run.train_loss.count(None)} steps, first in step {first}"
    return f"val loss {run.val_loss:.3f} after {run.steps} steps" if run.val_loss is not None else "no val loss"


def _loss(run: RunResult, dense: RunResult) -> str:
    above = loss_above_dense(run, dense)
    if above is None or None in run.train_loss:
        other = f", where dense did {dense.steps}" if run.steps != dense.steps and run.val_loss is not None else ""
        return _loss_itself(run) + other
    return "the same val loss" if abs(above) < 0.0005 else val_loss_text(above)


def val_loss_text(above: float) -> str:
    """`val loss 0.2 % above`: how far a validation loss is from that of dense, which is a share of it."""
    return f"val loss {abs(above) * 100:.1f} % {'above' if above > 0 else 'below'}"


def _fewer_bytes(run: RunResult, dense: RunResult) -> str:
    if not run.payload_bytes_per_step or not dense.payload_bytes_per_step:
        return ""
    ratio = dense.payload_bytes_per_step / run.payload_bytes_per_step
    if abs(ratio - 1) < ALIKE:
        return "as many bytes a step"
    return f"{_factor(ratio)} fewer bytes a step" if ratio > 1 else f"{_factor(1 / ratio)} more bytes a step"
