"""Merges what the ranks of each run wrote into the results document."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

from commopt.record.lines import RankRecord, StepLine, rank_files
from commopt.record.meter import CountCheck, leaving, merge, verify
from commopt.report import document
from commopt.report.document import Cluster, Environment, Event, Results, Rounds, RunResult, Validation
from commopt.report.faults import FAULTS_FILE, faults_of, read_faults
from commopt.report.rounds import clock_offsets_s, progress_of, rounds_of


def assemble(runs: Sequence[RunResult], cluster: Cluster, *, environment: Environment | None = None) -> Results:
    """The results document of several runs, which get distinct names and their speed-up over dense."""
    dense = next((run for run in runs if run.method == "dense"), None)
    named: list[RunResult] = []
    for run in runs:
        before = sum(earlier.name.partition(" (")[0] == run.name for earlier in named)
        name = run.name if before == 0 else f"{run.name} ({before + 1})"
        speedup = dense.step_s / run.step_s if dense and dense.step_s and run.step_s else None
        named.append(run.model_copy(update={"name": name, "speedup_vs_dense": speedup}))
    parameters = next((run.parameters for run in runs if run.parameters is not None), None)
    return Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        cluster=cluster,
        environment=environment or Environment.here(),
        model=document.TrainedModel(parameters=parameters),
        runs=named,
    )


def collect(
    record_dir: Path,
    *,
    method: str = "",
    options: Mapping[str, Any] | None = None,
    failure: str | None = None,
    ranks_here: Sequence[int] | None = None,
    told: Sequence[str] = (),
) -> RunResult:
    """Merge the ranks' files of one run.

    method: the run's name; by default what the ranks recorded. options: used if no rank wrote them. failure: why the run failed,
        according to the launcher.
    A run that lacks a rank or an end line has failed too; what its ranks did write is merged anyway. With outer rounds, ranks
    continue without those that leave: the run is finished if there is no `failure` and one rank trained to the end.
    Faults are read from the same folder. ranks_here: the ranks whose files are on this machine; None for all.
    told: what the launcher has to say about the run, in sentences.
    """
    records = [RankRecord.read(path) for path in rank_files(record_dir)]
    started = [record for record in records if record.start]
    first: Mapping[str, Any] = started[0].start if started else {}
    ranks, steps_planned = first.get("world_size", len(records)), first.get("steps", 0)
    expected = range(ranks) if ranks_here is None else ranks_here
    rounds = rounds_of(started)
    done = dict.fromkeys(expected, 0) | {record.rank: record.steps_done for record in started}
    left = {rank: done[rank] for rank in sorted(set(done) - {record.rank for record in started if record.ended})}
    reasons = [failure] if failure else []
    if failure is not None or rounds is None or len(left) == len(done):
        reasons += _missing(started, expected, steps_planned)
    fault_lines, unreadable_faults = read_faults(record_dir)
    faults = faults_of(fault_lines, started)
    notices = [*told, *_notices(records, started)]
    if rounds and not reasons:
        early = "rank {} ended early, after {} of {} steps; the others went on without it"
        notices += [early.format(rank, steps, steps_planned) for rank, steps in left.items()]
    if rounds and rounds.spread and not any(point.spread for point in rounds.spread):
        notices.append(
            "the replicas were equal in every round, so all machines trained on the same batches: the program should draw them by "
            "run.rank of run.ranks, as each machine's RANK is 0 under an outer method"
        )
    if unreadable_faults:
        notices.append(_unreadable(unreadable_faults, FAULTS_FILE))
    return RunResult(
        name=method or first.get("method", "unknown"),
        method=first.get("method", method or "unknown"),
        options=first.get("options", options or {}),
        status="failed" if reasons else "finished",
        failure="; ".join(reasons) or None,
        ranks=ranks,
        parameters=first.get("parameters"),
        steps_planned=steps_planned or max(done.values(), default=0),
        events=_events(started),
        notices=notices,
        rounds=rounds,
        faults=faults,
        progress=progress_of(started) if rounds or faults else [],
        ended_early=[document.EndedEarly(rank=r, steps=steps) for r, steps in left.items()] if rounds else [],
        **_training(started, is_outer=rounds is not None),
        **_speed([r for r in started if r.ended] or started if rounds else started, is_outer=rounds is not None),
        **_bytes(started, ranks, rounds, has_faults=bool(faults)),
    )


def _missing(started: Sequence[RankRecord], ranks: Sequence[int], steps_planned: int) -> list[str]:
    """What a finished run would have written and this one did not, in short sentences."""
    if not started:
        return ["no rank wrote a record; the program has to call commopt.attach"]
    silent = [rank for rank in ranks if rank not in {record.rank for record in started}]
    reasons = [f"{_ranks(silent)} wrote no record"] if silent else []
    cut = [record for record in started if not record.ended]
    for steps in sorted({record.steps_done for record in cut}):
        who = _ranks([record.rank for record in cut if record.steps_done == steps])
        reasons.append(f"{who} stopped after {steps}{f' of {steps_planned}' if steps_planned else ''} steps")
    return reasons


def _unreadable(count: int, place: str) -> str:
    return f"{count} {'line was' if count == 1 else 'lines were'} cut off or garbled in {place}, and left out"


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {_listed([str(rank) for rank in ranks])}"


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")


def _training(records: Sequence[RankRecord], *, is_outer: bool) -> dict[str, Any]:
    """Loss and time along the run: at each step, the mean over the ranks that did it; of a repeated step the last attempt counts."""
    by_step: dict[int, list[StepLine]] = {}
    for record in records:
        for step, line in {line.step: line for line in record.steps}.items():
            by_step.setdefault(step, []).append(line)
    rows = [by_step[step] for step in sorted(by_step)]
    step_seconds = [fmean(line.seconds for line in row) for row in rows]
    seconds = list(accumulate(step_seconds, initial=0.0))
    steady = [all(line.steady for line in row) for row in rows]
    to_the_end = [record for record in records if record.ended]
    validations = _validations(to_the_end if is_outer and to_the_end else records, seconds)
    own = [(record.rank, record.validations[-1]) for record in records if is_outer and record.validations]
    offsets_s = clock_offsets_s(records) if is_outer else {}  # without outer rounds, ranks start together
    last_s = [record.steps[-1].at_s + offsets_s.get(record.rank, 0.0) for record in records if record.steps]
    return {
        "steps": len(rows),
        "warmup_steps": steady.index(True) if any(steady) else None,
        "tokens": sum(line.tokens for record in records for line in record.steps),
        "train_loss": _train_loss(rows),
        "step_seconds": step_seconds,
        "seconds": seconds[1:],
        "validations": validations,
        "validation_by_rank": [
            document.RankValidation(rank=rank, after_steps=line.steps, loss=line.loss, tokens=line.tokens)
            for rank, line in own
        ],
        "val_loss": validations[-1].loss if validations else None,
        "wall_s": max(last_s, default=None),
    }


def _train_loss(rows: Sequence[Sequence[StepLine]]) -> list[float | None]:
    """At each step, the mean over the ranks that logged a loss, or that of the last step at which one did; empty if none ever did."""
    logged = [[(line.loss, 1) for line in row if line.is_logged] for row in rows]
    last: Sequence[tuple[float | None, int]] = next(filter(None, logged), [])
    losses = []
    for row in logged:
        last = row or last
        losses.append(_mean_loss(last))
    return losses if last else []


def _mean_loss(weighted: Sequence[tuple[float | None, int]]) -> float | None:
    """Weighted mean; None if any loss is None, since the mean would not be finite either."""
    weight = sum(tokens for _, tokens in weighted)
    if weight <= 0 or any(loss is None for loss, _ in weighted):
        return None
    return sum((loss or 0.0) * tokens for loss, tokens in weighted) / weight


def _validations(records: Sequence[RankRecord], seconds: Sequence[float]) -> list[Validation]:
    by_steps: dict[int, list[tuple[float | None, int]]] = {}
    for record in records:
        for line in record.validations:
            by_steps.setdefault(line.steps, []).append((line.loss, line.tokens))
    return [
        Validation(after_steps=steps, seconds=seconds[min(steps, len(seconds) - 1)], loss=_mean_loss(losses))
        for steps, losses in sorted(by_steps.items())
    ]


def _speed(records: Sequence[RankRecord], *, is_outer: bool) -> dict[str, Any]:
    """Times of the steady phase.

    step_s is the largest of the ranks' medians. The maximum over ranks at each step would count a delay twice that one
    rank has in this step and another in the next. With outer rounds step_s is the mean: the rounds fall into few steps,
    which a median ignores, and ranks do not wait for the slowest in every step.
    """
    steady = [steps for record in records if (steps := [line for line in record.steps if line.steady])]
    compute = [median(record.compute_s) for record in records if record.compute_s]
    everything = [line for steps in steady for line in steps]
    total_s = sum(line.seconds for line in everything)
    mean_s = total_s / len(everything) if everything else None
    slowest_s = max((median(line.seconds for line in steps) for steps in steady), default=None)
    return {
        "step_s": mean_s if is_outer else slowest_s,
        "step_mean_s": mean_s,
        "compute_s": max(compute, default=None),
        "wait_share": sum(line.wait_s for line in everything) / total_s if total_s > 0 else None,
    }


def _bytes(started: Sequence[RankRecord], ranks: int, rounds: Rounds | None, *, has_faults: bool) -> dict[str, Any]:
    """Both byte counts of the measured window; if a rank did not write both ends of it, what the rounds sent.

    Under faults the two are not compared: what goes to a node that is gone is counted, but never transmitted, and what a
    cut swallows is transmitted more than once.
    """
    windows = {record.rank: found for record in started if (found := record.window())}
    if not windows or set(windows) != set(range(ranks)):
        return {"payload_bytes_per_step": rounds.bytes_per_step if rounds else None}
    starts = {record.rank: record.start for record in started}
    node_of_rank = {rank: start["node"] for rank, start in starts.items()}
    nodes = dict.fromkeys(node_of_rank.values())
    checks: list[CountCheck] = []
    payload: list[float] = []  # per step, of each node
    transmitted: list[float] = []
    for node in nodes:
        mine = {rank: each for rank, (each, _, _) in windows.items() if node_of_rank[rank] == node}
        lowest = min(mine)  # reads the interface
        _, steps, nic_tx_bytes = windows[lowest]
        payload.append(leaving(node, mine.values(), node_of_rank) / steps)
        if nic_tx_bytes is not None:
            checks.append(verify(node, mine, node_of_rank, nic_tx_bytes, starts[lowest]["mtu"]))
            transmitted.append(nic_tx_bytes / steps)
    if len(nodes) == 1:
        payload = [each.payload_bytes / steps for each, steps, _ in windows.values()]
    if len(checks) < len(nodes):
        checks, transmitted = [], []
    shown = [] if has_faults else checks
    ratios = [check.ratio for check in shown if check.ratio is not None]
    bad = [(abs(c.modelled_bytes - c.nic_tx_bytes), c.node, c.defect) for c in shown if c.defect is not None]
    _, worst, defect = max(bad, default=(0.0, "", ""))
    others = [node for _, node, _ in bad if node != worst]
    return {
        "window_steps": min(steps for _, steps, _ in windows.values()),
        "payload_bytes_per_step": fmean(payload),
        "nic_tx_bytes_per_step": max(transmitted, default=None),
        "nic_over_model": max(ratios, key=lambda ratio: abs(ratio - 1), default=None),
        "nodes": shown,
        "traffic": merge([row for each, _, _ in windows.values() for row in each.rows]),
        "defects": [defect] * bool(bad) + [f"the counts of {_listed(others)} disagree too"] * bool(others),
    }


def _events(records: Sequence[RankRecord]) -> list[Event]:
    merged: dict[str, Event] = {}
    for record in records:
        for kind, fields in record.events:
            key = f"{kind} {sorted(fields.items(), key=str)}"
            event = merged.setdefault(key, Event(kind=kind, ranks=[], fields={**fields}))
            if record.rank not in event.ranks:
                event.ranks.append(record.rank)
    return list(merged.values())


def _notices(records: Sequence[RankRecord], started: Sequence[RankRecord]) -> list[str]:
    notices = []
    if unreadable := [record.rank for record in records if record.unreadable_lines]:
        count = sum(record.unreadable_lines for record in records)
        notices.append(_unreadable(count, f"the record of {_ranks(unreadable)}"))
    if afresh := [record.rank for record in started if record.starts > 1]:
        verb = "was" if len(afresh) == 1 else "were"
        notices.append(f"{_ranks(afresh)} {verb} started again from the first step; only the last start is shown")
    for record in started:
        for k, resumed_at in record.begins[1:]:
            before = record.steps[k - 1].step + 1 if k else 0
            notices += [f"rank {record.rank} was started again after step {before}, and went on at step {resumed_at}"]
    ended = min((record.steps_done for record in started if record.ended), default=0)
    if started and ended < started[0].start["steps"] and all(record.ended for record in started):
        notices.append(
            f"the program ended by itself after {ended} steps, before the {started[0].start['steps']} asked for"
        )
    if started and not any(line.steady for record in started for line in record.steps):
        notices.append("no step was past the method's warm-up, so there is no speed in the steady phase")
    is_counted = all(record.window() for record in started) or any(record.rounds for record in started)
    if started and not is_counted:
        notices.append("the window in which bytes are counted was not closed on every rank, so there is no byte count")
    return notices
