"""Train two small models under every method and under its uncompressed parent, and say what the compression costs in loss.

python scripts/bench_convergence.py                            all cells that are not stored yet; Ctrl-C keeps what is done
python scripts/bench_convergence.py --quick                    a look in minutes: fewer steps, one rate, one seed, no long runs
python scripts/bench_convergence.py --only dgc_1pct --redo     one label again, and whatever of its parent is missing
python scripts/bench_convergence.py --table | --markdown | --figure        draw what is stored, and train nothing
python scripts/bench_convergence.py --page                     the same, into docs/convergence.md and docs/convergence.png

Ranks are threads over a SimWorld, and the exchange is that of integrations.plain, so that losses and bytes are those of a
real run of as many ranks. Time is not measured: the ranks of a cell take turns on one core.

gpt       a byte-level GPT of 0.19 M parameters (launch/train.py's model, text and learning rate schedule), 4 ranks
digits    an MLP on scikit-learn's digits under noise that is drawn anew for each batch, 4 ranks
gpt_long  the same GPT on 8 ranks for 3,000 steps, for the methods that need long runs to be judged

Each method and each parent tries three learning rates a factor of 2 apart with the first seed, and up to two more where the
best one lies at the edge; at the best one it then trains with the other seeds. The long runs take the best rate of `gpt`.
The loss is that of the same held-out windows for all. "worse by" is the loss over the parent's of the same seed, mean and
standard deviation over seeds; 1 % of the loss on digits is some 0.006. A cell is stored in
scripts/results/convergence/ with its settings, and trained again only if those have changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from convergence_cells import (
    BY_LABEL,
    ENTRIES,
    LEFT_OUT,
    SEEDS,
    TASKS,
    Cell,
    Entry,
    Find,
    Pair,
    Protocol,
    Store,
    Task,
    settings_of,
    why_not,
)
from convergence_results import Row, by_task, document, draw_figure, markdown, number, remarks, row_of, table
from convergence_training import run_cell

from commopt import kernels
from commopt.errors import CommoptError, ConfigError, did_you_mean
from commopt.methods import METHODS
from commopt.record.words import seconds_text

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "convergence"
FIGURE = HERE.parent / "docs" / "convergence.png"
PAGE = FIGURE.with_suffix(".md")
BEGIN, END = "<!-- written by bench_convergence.py --page -->", "<!-- end -->"
QUICK_STEPS = 100
CELL_S = 1.5  # of a cell beside its steps, for the estimate only


# ---- the sweep -------------------------------------------------------------------------------------------------------


def start_worker(cores: Any) -> None:
    """One core for each process: the threads of a cell take turns, and gain nothing from another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    torch.set_num_threads(1)
    logging.getLogger("commopt").setLevel(logging.ERROR)  # void steps are counted instead


def end_with_parent() -> None:
    """Do not stay behind where the process that started this one was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def my_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def estimate_s(entry: Entry, task: Task, protocol: Protocol, find: Find) -> float:
    """Seconds that the remaining cells take one core, roughly."""
    return protocol.remaining(entry, task, find) * (CELL_S + task.steps * task.step_ms / 1e3)


def sweep(pairs: Sequence[Pair], protocol: Protocol, store: Store, jobs: int) -> list[str]:
    """Train what is wanted, `jobs` cells at a time, and tell each as it ends. Returns what failed."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    kernels.warm_up()  # once, before the processes start: they find the kernels in the cache
    context, failures = multiprocessing.get_context("spawn"), dict[str, str]()
    cores = context.SimpleQueue()
    for core in itertools.islice(itertools.cycle(my_cores()), jobs):
        cores.put(core)
    running: dict[Future[dict[str, Any]], Cell] = {}
    done = 0

    def next_cells() -> list[Cell]:
        taken = {cell.name for cell in running.values()} | set(failures)
        every = (cell for entry, task in pairs for cell in protocol.wanted(entry, task, store.get))
        return [cell for cell in every if cell.name not in taken]

    def left_s() -> float:
        return sum(estimate_s(entry, task, protocol, store.get) for entry, task in pairs) / jobs

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    pool = ProcessPoolExecutor(jobs, context, start_worker, (cores,))
    start_s, planned_s = time.monotonic(), left_s()
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=planned_s)
            while True:
                for cell in next_cells()[: jobs - len(running)]:
                    running[pool.submit(run_cell, settings_of(cell))] = cell
                if not running:
                    return [f"{name} failed: {failure}" for name, failure in failures.items()]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    done += 1
                    said = keep(future, cell, store, failures)
                    console.print(f"[{done}] {cell.name:44} {said}", markup=False)
                to_do_s = left_s()
                if planned_s > to_do_s:
                    pace = (time.monotonic() - start_s) / (planned_s - to_do_s)
                    said = f"{done} cells" + f", about {seconds_text(to_do_s * pace)} left" * (to_do_s > 0)
                    progress.update(bar, completed=planned_s - to_do_s, total=planned_s, description=said)
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def keep(future: Future[dict[str, Any]], cell: Cell, store: Store, failures: dict[str, str]) -> str:
    """Store what a cell came to, and say it. Raises CommoptError where the process itself is gone."""
    try:
        result = future.result()
    except BrokenProcessPool:
        raise CommoptError(f"{cell.name}: its process was killed; is there enough memory?") from None
    except Exception as error:
        failures[cell.name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"failed: {failures[cell.name]}"
    store.put(cell, result)
    return f"loss {number(result['loss'], '.4f')}  {seconds_text(result['seconds'])}"


# ---- the command line ------------------------------------------------------------------------------------------------


def chosen_pairs(labels: Sequence[str], tasks: Sequence[Task], entries: Sequence[Entry]) -> list[Pair]:
    """What to train for these labels: with their parents, and with what gives the long runs their rates. Long runs first."""
    wanted = {label: None for entry in entries if entry.label in labels for label in (entry.parent, entry.label)}
    own = [entry for entry in entries if entry.label in wanted]
    own.sort(key=lambda entry: -len(entry.tasks))  # the long runs wait for these rates
    by_name = {task.rates_from: TASKS[task.rates_from] for task in tasks if task.rates_from}
    by_name |= {task.name: task for task in tasks}
    every = [by_name[name] for name in TASKS if name in by_name]
    return [(entry, task) for task in every for entry in own if task.name in entry.tasks]


def names(option: str, text: str | None, known: Iterable[str]) -> list[str]:
    """The names in NAME,NAME,...; all that are known without. Raises ConfigError for one that is not known."""
    every = list(known)
    given = every if text is None else [name.strip() for name in text.split(",")]
    for name in given:
        if name not in every:
            hint = did_you_mean(name, every) or f"; there are {', '.join(every)}"
            raise ConfigError(f"{option}: unknown name {name!r}{hint}")
    return given


def notices(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """The entries that can be trained, and what is said about the others, and about methods without an entry."""
    reasons = {entry.label: why_not(entry) for entry in entries}
    lines = [f"{label} is skipped: {reason}" for label, reason in reasons.items() if reason is not None]
    listed = {entry.method for entry in ENTRIES} | set(LEFT_OUT)
    lines += [f"{name} has no entry in {Path(__file__).name}" for name in METHODS if name not in listed]
    return [entry for entry in entries if reasons[entry.label] is None], lines


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", metavar="LABEL,...", help=f"of {', '.join(BY_LABEL)}; parents are added")
    made.add_argument("--task", metavar="NAME,...", help=f"of {', '.join(TASKS)}; all by default")
    made.add_argument("--quick", action="store_true", help=f"short tasks of {QUICK_STEPS} steps, one rate, one seed")
    made.add_argument("--redo", action="store_true", help="train cells again that are stored")
    made.add_argument("--jobs", type=int, metavar="N", default=len(my_cores()), help="cells at a time; one per core")
    upto = f"1 to {len(SEEDS)}"
    made.add_argument("--seeds", type=int, metavar="N", default=3, help=f"of the short tasks, {upto}; 3 by default")
    made.add_argument("--long-seeds", type=int, metavar="N", default=1, help=f"of the long runs, {upto}; 1 by default")
    made.add_argument("--results", type=Path, metavar="DIR", help="where cells are stored")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the table and the targets there")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--table", action="store_true", help="only draw the table of stored cells")
    what.add_argument("--markdown", action="store_true", help="only print that table as Markdown")
    what.add_argument("--page", action="store_true", help="only write the table and the figure into docs/")
    what.add_argument(
        "--figure", nargs="?", type=Path, const=FIGURE, metavar="FILE", help="only draw them into docs/convergence.png"
    )
    return made


def run(args: argparse.Namespace) -> int:
    """Do what the command line says, and return the exit code. Raises ConfigError for a mistake in it."""
    only_draws = args.table or args.markdown or args.page or args.figure is not None
    if only_draws and args.redo:
        raise ConfigError("--redo: has no effect where nothing is trained; leave it out")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: write a number from 1")
    for option, count in (("--seeds", args.seeds), ("--long-seeds", args.long_seeds)):
        if not 1 <= count <= len(SEEDS):
            raise ConfigError(f"{option} {count}: write a number from 1 to {len(SEEDS)}")
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no folder {args.json.resolve().parent}; make it")
    labels = names("--only", args.only, BY_LABEL)
    tasks = [TASKS[name] for name in names("--task", args.task, TASKS)]
    tasks = [replace(task, seeds=SEEDS[: args.long_seeds if task.rates_from else args.seeds]) for task in tasks]
    protocol, folder = Protocol(), args.results or RESULTS
    if args.quick:
        tasks = [replace(task, steps=QUICK_STEPS, seeds=SEEDS[:1]) for task in tasks if task.rates_from is None]
        protocol, folder = Protocol(grid=(1.0,), extensions=0), args.results or RESULTS / "quick"
        if not tasks:
            raise ConfigError("--task: long runs are left out by --quick; leave one of them out")
    entries, said = notices(ENTRIES)
    pairs = chosen_pairs(labels, tasks, entries)
    redo = [(task.name, entry.label) for entry, task in pairs if entry.label in labels and task in tasks]
    store = Store(folder, redo if args.redo else ())
    failed: list[str] = []
    try:
        if not only_draws:
            print("\n".join([*said, *plan(pairs, protocol, store, args.jobs)]), flush=True)
            failed = sweep(pairs, protocol, store, args.jobs)
    finally:
        found = [row_of(entry, task, protocol, Store(folder).get) for entry, task in pairs]
        rows = [row for row in found if row is not None]
        show(rows, [*said, *failed], args)
    return 1 if failed else 0


def plan(pairs: Sequence[Pair], protocol: Protocol, store: Store, jobs: int) -> list[str]:
    """What is going to be trained, and how long that takes, about."""
    lines, total_s = [], 0.0
    for task in dict.fromkeys(task.name for _, task in pairs):
        own = [pair for pair in pairs if pair[1].name == task]
        cells = sum(protocol.remaining(*pair, store.get) for pair in own)
        seconds = sum(estimate_s(*pair, protocol, store.get) for pair in own)
        total_s += seconds
        lines.append(f"{task:9} {len(own):3} labels, {cells:4} cells to train, {seconds_text(seconds / jobs)}")
    return [*lines, f"about {seconds_text(total_s / jobs)} on {jobs} cores, and more where a grid has to be extended"]


def show(rows: Sequence[Row], said: Sequence[str], args: argparse.Namespace) -> None:
    """Print or draw the rows as the command line says."""
    if not rows:
        print("no method has been trained at all its rates yet; run this without --table, --markdown and --figure")
        return
    if args.markdown:
        print(markdown(rows))
    elif args.page:
        draw_figure(rows, FIGURE)
        before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        PAGE.write_text(f"{before}{begin}\n{markdown(rows)}\n{end}{after}", encoding="utf-8")
        print(f"written into {PAGE} and {FIGURE}")
    elif args.figure is not None:
        draw_figure(rows, args.figure)
        print(f"drawn into {args.figure}")
    else:
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 132, highlight=False)
        for own in by_task(rows):
            console.print(table(own))
            console.print()
        for line in [*said, *remarks(rows)]:
            console.print(line, markup=False)
    if args.json is not None:
        args.json.write_text(json.dumps(document(rows, said), indent=1, allow_nan=False) + "\n")


def main() -> None:
    args = parser().parse_args()
    try:
        code = run(args)
    except CommoptError as error:
        print("\n".join(f"bench_convergence: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print("bench_convergence: interrupted; the next run goes on after the cells that are stored", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)


if __name__ == "__main__":
    main()
