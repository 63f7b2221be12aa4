"""Train a small GPT with dense Adam, local SGD, DiLoCo and NoLoCo at equal tokens, and say what rare averaging costs in loss.

python scripts/bench_outer.py                              all cells that are not stored yet; Ctrl-C keeps what is done
python scripts/bench_outer.py --quick                      a look in a minute: a few rounds of the methods that are compared
python scripts/bench_outer.py --only noloco_int8 --redo    one label again
python scripts/bench_outer.py --table | --page             show what is stored, or write docs/outer-convergence.md and its figure

Replicas are threads over a SimWorld, and the rounds are those of integrations.plain: a real run's arithmetic, with a network that
takes no time and loses nothing. All train launch/train.py's byte-level GPT on the standard library's sources with AdamW, the
same batches by rank and seed, and as many steps.

The learning rate of dense, and one for all outer methods, is chosen on 4 replicas with the first seed; then come 4 replicas with
three seeds, 8 and 16 with one, and options that the papers leave open with one seed. A cell is stored in
scripts/results/outer/ with its settings, and trained again only if those have changed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_convergence import keep, my_cores, names, start_worker
from outer_cells import BY_LABEL, SEEDS, Cell, Entry, Protocol, Store, Task, settings_of, why_not
from outer_results import Results, draw_figure, markdown, tables
from outer_training import run_cell

from commopt import kernels
from commopt.errors import CommoptError, ConfigError
from commopt.record.words import seconds_text

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "outer"
FIGURE = HERE.parent / "docs" / "outer-convergence.png"
PAGE = FIGURE.with_suffix(".md")
BEGIN, END = "<!-- written by bench_outer.py --page -->", "<!-- end -->"
STEP_S = 0.006  # of one replica, for the estimate only


# ---- training --------------------------------------------------------------------------------------------------------


def train_all(entries: Sequence[Entry], protocol: Protocol, store: Store, jobs: int) -> list[str]:
    """Train what is wanted, `jobs` cells at a time, and tell each as it ends. Returns what failed."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    kernels.warm_up()  # once, before the processes start: they find the kernels in the cache
    context, failures, done = multiprocessing.get_context("spawn"), dict[str, str](), 0
    cores = context.SimpleQueue()
    for core in itertools.islice(itertools.cycle(my_cores()), jobs):
        cores.put(core)
    running: dict[Future[dict[str, Any]], Cell] = {}
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    pool = ProcessPoolExecutor(jobs, context, start_worker, (cores,))
    start_s, planned_s = time.monotonic(), remaining_s(entries, protocol, store) / jobs
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=planned_s)
            while True:
                taken = {cell.name for cell in running.values()} | set(failures)
                free = (cell for cell in protocol.wanted(entries, store.get) if cell.name not in taken)
                for cell in list(itertools.islice(free, jobs - len(running))):
                    running[pool.submit(run_cell, settings_of(cell, store.task))] = cell
                if not running:
                    return [f"{name} failed: {failure}" for name, failure in failures.items()]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    done += 1
                    said = keep(future, cell, store, failures)  # type: ignore[arg-type]  # it asks for a name and a put
                    console.print(f"[{done}] {cell.name:32} {said}", markup=False)
                left_s = remaining_s(entries, protocol, store) / jobs
                pace = (time.monotonic() - start_s) / max(planned_s - left_s, 1e-9)
                said = f"{done} cells" + f", about {seconds_text(left_s * pace)} left" * (left_s > 0)
                progress.update(bar, completed=planned_s - left_s, description=said)
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def remaining_s(entries: Sequence[Entry], protocol: Protocol, store: Store) -> float:
    """Seconds that the remaining cells take one core, about; as if a rate that is not known yet were the first of the grid."""
    rates = {entry.family: protocol.best_rate(entry.family, store.get) for entry in entries}
    cells = list(protocol.wanted(entries, store.get))
    for entry in (entry for entry in entries if rates[entry.family] is None):
        for ranks in (ranks for ranks in entry.ranks if ranks in protocol.seeds):
            cells += [Cell(entry, ranks, protocol.grid[0], seed) for seed in protocol.seeds_of(entry, ranks)]
    return sum(cell.ranks for cell in dict.fromkeys(cells)) * store.task.steps * STEP_S


# ---- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", metavar="LABEL,...", help=f"of {', '.join(BY_LABEL)}; what chooses rates is added")
    made.add_argument("--ranks", metavar="N,...", help=f"numbers of replicas, of {', '.join(map(str, SEEDS))}")
    made.add_argument("--quick", action="store_true", help="4 rounds, one rate, one seed, 4 replicas; stored apart")
    made.add_argument("--redo", action="store_true", help="train cells again that are stored")
    made.add_argument("--jobs", type=int, metavar="N", default=len(my_cores()), help="cells at a time; one per core")
    made.add_argument("--results", type=Path, metavar="DIR", help="where cells are stored")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--table", action="store_true", help="only show the tables of stored cells")
    what.add_argument("--page", action="store_true", help="only write them and the figure into docs/")
    return made


def run(args: argparse.Namespace) -> int:
    """Do what the command line says, and return the exit code. Raises ConfigError for a mistake in it."""
    only_shows = args.table or args.page
    if only_shows and args.redo:
        raise ConfigError("--redo: has no effect where nothing is trained; leave it out")
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: write a number from 1")
    labels = names("--only", args.only, BY_LABEL)
    counts = [int(name) for name in names("--ranks", args.ranks, map(str, SEEDS))]
    task, protocol, folder = Task(), Protocol(seeds={n: SEEDS[n] for n in SEEDS if n in counts}), RESULTS
    if args.quick:
        task, protocol, folder = quick(min(counts))
    reasons = {label: why_not(BY_LABEL[label]) for label in labels}
    said = [f"{label} is skipped: {reason}" for label, reason in reasons.items() if reason is not None]
    entries = [BY_LABEL[label] for label in labels if reasons[label] is None]
    if args.quick:
        entries = [entry for entry in entries if args.only is not None or not entry.is_extra]
    folder, failed = args.results or folder, list[str]()
    try:
        if not only_shows:
            store = Store(folder, task, labels if args.redo else ())
            seconds = remaining_s(entries, protocol, store)
            print("\n".join([*said, f"about {seconds_text(seconds / args.jobs)} on {args.jobs} cores"]), flush=True)
            failed = train_all(entries, protocol, store, args.jobs)
    finally:
        show(Results(protocol, Store(folder, task).get, entries, task), [*said, *failed], args.page)
    return 1 if failed else 0


def quick(ranks: int) -> tuple[Task, Protocol, Path]:
    """A short task, trained with one rate and one seed."""
    task = replace(Task(), steps=40, every=10, held_out=4)
    return task, Protocol(grid=(3e-3,), extensions=0, seeds={ranks: SEEDS[ranks][:1]}), RESULTS / "quick"


def show(results: Results, said: Collection[str], writes_page: bool) -> None:
    """Print the tables, or write them into the page."""
    if not results.rows:
        print("no method has been trained at all rates that choose its own yet; run this without --table and --page")
    elif writes_page:
        draw_figure(results, FIGURE)
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
        print(f"written into {PAGE} and {FIGURE}")
    else:
        print_tables(results, said)


def with_tables(page: str, results: Results) -> str:
    """The page with what is stored between its marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{begin}\n{markdown(results)}\n{end}{after}"


def print_tables(results: Results, said: Iterable[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    for one in tables(results):
        table = Table(title=one.title, title_justify="left", title_style="bold", box=None)
        for heading in one.headings:
            table.add_column(heading, justify="left" if heading in one.left else "right", no_wrap=True)
        for row in one.rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for line in [*said, *results.remarks()]:
        console.print(line, markup=False)


def main() -> None:
    args = parser().parse_args()
    try:
        code = run(args)
    except CommoptError as error:
        print("\n".join(f"bench_outer: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        print("bench_outer: interrupted; the next run goes on after the cells that are stored", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)


if __name__ == "__main__":
    main()
