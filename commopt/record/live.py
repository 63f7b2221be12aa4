"""Progress of the runs while they train, from the lines that the ranks write."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, TextIO

from commopt.record.lines import RankRecord, rank_files, rank_of
from commopt.record.words import bytes_text, milliseconds, seconds_text, spread_text

if TYPE_CHECKING:
    import rich.live

    from commopt.record.board import Board

RECENT_STEPS = 10  # the step time, the wait and the time left are those of the last steps
LINES_PER_RUN, LINE_EVERY_S = 10, 10.0  # if stdout is not a terminal
QUIET_S = 2.5  # the longest time without a line there; after five minutes a 120th of what a run has taken
ALWAYS = ("method", "steps", "loss", "ms/step", "waiting")
COLUMNS = (*ALWAYS, "sent/step", "spread", "missed", "left")
SILENT_S = 10.0  # with outer rounds, a rank this far behind the newest step is left out of loss, step time and wait
SLOW_START_S = 40.0  # until a program that has recorded nothing is asked about
TOLD_EVENTS = 20  # at most, of a run with outer rounds
UNTOLD = ("helped to catch up", "final average")  # the rank that caught up records the first, all record the second


class Follower:
    """The ranks' files of one run, read as they grow."""

    def __init__(self, record_dir: Path) -> None:
        self.record_dir = record_dir
        self.records: dict[int, RankRecord] = {}
        self._offsets = Counter[int]()  # by rank: the bytes that were taken
        self._events = Counter[int]()  # by rank: the events that were told

    def poll(self) -> None:
        """Take the lines completed since the last call; an incomplete one is read again next time."""
        for path in rank_files(self.record_dir):
            rank = rank_of(path)
            record = self.records.setdefault(rank, RankRecord(rank))
            with path.open("rb") as file:
                file.seek(self._offsets[rank])
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offsets[rank] += len(line)
                    record.feed(line)

    @property
    def steps_planned(self) -> int | None:
        """The steps that were asked for; None until a rank has recorded it."""
        return next((r.start["steps"] for r in self.records.values() if r.start), None)

    @property
    def is_outer(self) -> bool:
        """Whether a rank has made an outer round; if so, ranks continue without those that leave."""
        return any(record.rounds for record in self.records.values())

    @property
    def steps(self) -> int:
        """Steps that every rank seen so far has done; with outer rounds, those of the furthest, since others may be gone."""
        done = [record.steps_done for record in self.records.values()]
        return max(done, default=0) if self.is_outer else min(done, default=0)

    @property
    def loss(self) -> float | None:
        """Mean over the ranks of the last loss that each logged, NaN if one is not finite; None before a rank has logged one."""
        logged = [next((line for line in reversed(record.steps) if line.is_logged), None) for record in self._present()]
        losses = [math.nan if line.loss is None else line.loss for line in logged if line is not None]
        return fmean(losses) if losses else None

    @property
    def bytes_per_step(self) -> float | None:
        """Bytes per step that leave rank 0's interface; None until it was read twice."""
        seen = self.records[0].nic_bytes[-RECENT_STEPS:] if 0 in self.records else []
        if len(seen) < 2:
            return None
        (first, before), (last, after) = seen[0], seen[-1]
        return (after - before) / (last - first)

    def new_events(self) -> list[str]:
        """The events of a run with outer rounds since the last call: `rank 2: caught up, step 180`."""
        told: dict[str, list[int]] = {}
        for rank, record in sorted(self.records.items()) if self.is_outer else []:
            for kind, fields in record.events[self._events[rank] :]:
                if kind not in UNTOLD:
                    text = ", ".join([kind, *(f"{key} {value}" for key, value in fields.items())])
                    told.setdefault(text, []).append(rank)
            self._events[rank] = len(record.events)
        return [
            f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}: {text}"
            for text, ranks in told.items()
        ]

    def _present(self) -> list[RankRecord]:
        """The ranks that train: all of them, except, with outer rounds, those that have fallen silent."""
        records = list(self.records.values())
        if not self.is_outer:
            return records
        stepped_s = {r.rank: r.epoch_s + r.steps[-1].at_s for r in records if r.steps}
        return [r for r in records if stepped_s.get(r.rank, 0.0) >= max(stepped_s.values()) - SILENT_S]

    def facts(self) -> dict[str, str]:
        """What is known, by column: `loss 3.214`, `1242 ms/step`, `92 % waiting`, `6.6 MB/step` of a machine, `1 min 4 s left`; texts."""
        known, loss = dict[str, str](), self.loss
        if loss is not None:
            known["loss"] = "not finite" if math.isnan(loss) else f"{loss:.3f}"
        recent = [line for record in self._present() for line in record.steps[-RECENT_STEPS:]]
        step_s = median(line.seconds for line in recent) if recent else 0.0
        total_s = sum(line.seconds for line in recent)
        if recent:
            known["ms/step"] = milliseconds(step_s)
        if total_s > 0:
            known["waiting"] = f"{sum(line.wait_s for line in recent) / total_s * 100:.0f} %"
        if self.bytes_per_step is not None:
            known["sent/step"] = bytes_text(self.bytes_per_step)
        rounds = [line for record in self.records.values() for line in record.rounds[-RECENT_STEPS:]]
        last = max((line.round for line in rounds if line.spread is not None), default=None)
        if squares := [line.spread**2 for line in rounds if line.round == last and line.spread is not None]:
            known["spread"] = spread_text(math.sqrt(fmean(squares)))
        if missed := sum(line.missed for record in self.records.values() for line in record.rounds):
            known["missed"] = str(missed)
        if recent and self.steps_planned and self.steps_planned > self.steps:
            known["left"] = seconds_text((self.steps_planned - self.steps) * step_s)  # too long in a warm-up
        return known

    def __str__(self) -> str:
        """The facts in one line."""
        forms = {"ms/step": "{} ms/step", "waiting": "{} waiting", "sent/step": "{}/step", "left": "{} left"}
        return ", ".join(forms.get(key, f"{key} {{}}").format(text) for key, text in self.facts().items())


class Live:
    """A table in a terminal, with a row per run, refreshed in place; otherwise plain lines at the start, at every tenth of the steps,
    every ten seconds if their number is not known, and at the end.

    board: gets the same, if it is given.
    """

    def __init__(self, stream: TextIO, board: Board | None = None) -> None:
        self._stream, self._board = stream, board
        self._screen = _screen(stream) if stream.isatty() else None
        self._follower: Follower | None = None
        self._rows: list[dict[str, str]] = []
        self._name, self._began_s, self._lines, self._events_told, self._is_told = "", 0.0, 0, 0, False

    def __enter__(self) -> Live:
        if self._screen:
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end("interrupted")
        if self._screen:
            self._screen.stop()

    def begin(self, name: str, record_dir: Path) -> None:
        """Follow a run whose ranks are about to write in `record_dir`."""
        self._name, self._follower, self._began_s = name, Follower(record_dir), time.monotonic()
        self._lines, self._events_told, self._is_told, self._told_s = 0, 0, False, self._began_s
        if self._board:
            self._board.begin(name)
        self._rows.append({})
        if self._screen:
            self._show("starting")
        else:
            self.say("starting")

    def tick(self) -> None:
        """Read what is new and show it; call it about five times a second."""
        follower = self._follower
        if follower is None:
            return
        follower.poll()
        for text in follower.new_events():
            self._events_told += 1
            if self._events_told <= TOLD_EVENTS + 1:
                self.say(text if self._events_told <= TOLD_EVENTS else "more events are in the report")
        if self._board:
            self._board.write(follower.records, follower.steps)
        planned, steps = follower.steps_planned, follower.steps
        if not self._is_told and not follower.records and time.monotonic() - self._began_s > SLOW_START_S:
            self._is_told = True
            self.say(f"no step in {SLOW_START_S:.0f} s; does the program call commopt.attach, and step run.optimizer?")
        took_s = time.monotonic() - self._began_s
        if self._screen:
            self._show(f"starting, {took_s:.0f} s" if not steps else "")
            return
        due = steps * LINES_PER_RUN // planned if planned else int(took_s / LINE_EVERY_S)
        done = f"step {steps}{f'/{planned}' if planned else ''}"
        if planned is not None and self._lines < due < (LINES_PER_RUN if planned else due + 1):
            self._lines = due
            self.say(f"{done}, {follower}")
        elif took_s > self._told_s - self._began_s + max(QUIET_S, took_s / 120):
            self.say(f"{done if steps else 'starting'}, {took_s:.0f} s")

    def end(self, failure: str | None = None) -> None:
        """Show the last state of the run, and why it failed if it did."""
        follower = self._follower
        if follower is None:
            return
        follower.poll()
        if self._board:
            self._board.write(follower.records, follower.steps)
        took, planned, steps = seconds_text(time.monotonic() - self._began_s), follower.steps_planned, follower.steps
        if self._screen:
            self._show(f"failed after {took}" if failure else f"took {took}")
            if failure:
                self.note(f"{self._name} failed: {failure}")
        elif failure is None:
            loss = follower.facts().get("loss")
            self.say(f"finished {steps} steps in {took}{f', loss {loss}' if loss else ''}")
        else:
            self.say(f"failed after {steps} of {planned or '?'} steps and {took}: {failure}")
        self._follower = None

    def note(self, text: str) -> None:
        """Write a line without disturbing the table."""
        self._told_s = time.monotonic()
        if self._screen:
            self._screen.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Write a line about the run."""
        self.note(f"{self._name}: {text}")

    def _show(self, state: str) -> None:
        """Draw the table. state: of the run that is followed, in place of the time left."""
        from rich.table import Table

        follower = self._follower
        assert self._screen is not None
        assert follower is not None
        planned = follower.steps_planned
        steps = f"{follower.steps}/{planned}" if planned else f"{follower.steps}"
        self._rows[-1] = {"method": self._name, "steps": steps, **follower.facts()}
        if state:
            self._rows[-1]["left"] = state
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for column in (one for one in COLUMNS if one in ("left", *ALWAYS) or any(one in row for row in self._rows)):
            is_text = column in ("method", "left")
            table.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
        for row in self._rows:
            table.add_row(*(row.get(str(column.header), "") for column in table.columns))
        self._screen.update(table, refresh=True)


def _screen(stream: TextIO) -> rich.live.Live:
    import rich.live
    from rich.console import Console

    return rich.live.Live(console=Console(file=stream), auto_refresh=False, vertical_overflow="visible")
