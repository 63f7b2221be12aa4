"""Train two small models under every method and under its uncompressed parent, and say what the compression costs in loss.

python scripts/bench/convergence.py                            all cells that are not stored yet; Ctrl-C keeps what is done
python scripts/bench/convergence.py --quick                    a look in minutes: fewer steps, one rate, one seed, no long runs
python scripts/bench/convergence.py --only dgc_1pct --redo     one label again, and whatever of its parent is missing
python scripts/bench/convergence.py --table | --markdown | --figure        draw what is stored, and train nothing
python scripts/bench/convergence.py --page                     the same, into docs/convergence.md and docs/convergence.png

Ranks are threads over a SimWorld, and the exchange is that of frameworks.plain, so that losses and bytes are those of a
real run of as many ranks. Time is not measured: the ranks of a cell take turns on one core.

gpt       a byte-level GPT of 0.19 M parameters (launch/train.py's model, text and learning rate schedule), 4 ranks
digits    an MLP on scikit-learn's digits under noise that is drawn anew for each batch, 4 ranks
gpt_long  the same GPT on 8 ranks for 3,000 steps, for the methods that need long runs to be judged

Each method and each parent tries three learning rates a factor of 2 apart with the first seed, and up to two more if the
best one lies at the edge; at the best one it then trains with the other seeds. The long runs take the best rate of `gpt`.
The loss is that of the same held-out windows for all. "worse by" is the loss over the parent's of the same seed, mean and
standard deviation over seeds; 1 % of the loss on digits is some 0.006. A cell is stored in
scripts/bench/results/convergence.jsonl with its settings, and trained again only if those have changed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from command import DOCS, main, names, new_parser, only_shows, present
from convergence_cells import (
    BY_LABEL,
    ENTRIES,
    LEFT_OUT,
    SEEDS,
    TASKS,
    Entry,
    Find,
    Pair,
    Protocol,
    Task,
    found_in,
    settings_of,
    why_not,
)
from convergence_results import report, row_of
from convergence_training import run_cell
from store import RESULTS, Store
from training import my_cores, train_all

from commopt.errors import ConfigError
from commopt.methods import METHODS
from commopt.record.words import seconds_text

STORED = RESULTS / "convergence.jsonl"
PAGE = DOCS / "convergence.md"
QUICK_STEPS = 100
CELL_S = 1.5  # of a cell beside its steps, for the estimate only


def estimate_s(entry: Entry, task: Task, protocol: Protocol, find: Find) -> float:
    """Seconds that the remaining cells take one core, roughly."""
    return protocol.remaining(entry, task, find) * (CELL_S + task.steps * task.step_ms / 1e3)


def chosen_pairs(labels: Sequence[str], tasks: Sequence[Task], entries: Sequence[Entry]) -> list[Pair]:
    """What to train for these labels: with their parents, and with what gives the long runs their rates. Long runs first."""
    wanted = {label: None for entry in entries if entry.label in labels for label in (entry.parent, entry.label)}
    own = [entry for entry in entries if entry.label in wanted]
    own.sort(key=lambda entry: -len(entry.tasks))  # the long runs wait for these rates
    by_name = {task.rates_from: TASKS[task.rates_from] for task in tasks if task.rates_from}
    by_name |= {task.name: task for task in tasks}
    every = [by_name[name] for name in TASKS if name in by_name]
    return [(entry, task) for task in every for entry in own if task.name in entry.tasks]


def notices(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """The entries that can be trained, and what is said about the others, and about methods without an entry."""
    reasons = {entry.label: why_not(entry) for entry in entries}
    lines = [f"{label} is skipped: {reason}" for label, reason in reasons.items() if reason is not None]
    listed = {entry.method for entry in ENTRIES} | set(LEFT_OUT)
    lines += [f"{name} has no entry in convergence_cells.py" for name in METHODS if name not in listed]
    return [entry for entry in entries if reasons[entry.label] is None], lines


def parser() -> argparse.ArgumentParser:
    only = f"of {', '.join(BY_LABEL)}; parents are added"
    made, _ = new_parser(__doc__, STORED, only, PAGE)
    made.add_argument("--task", metavar="NAME,...", help=f"of {', '.join(TASKS)}; all by default")
    made.add_argument("--quick", action="store_true", help=f"short tasks of {QUICK_STEPS} steps, one rate, one seed")
    made.add_argument("--jobs", type=int, metavar="N", default=len(my_cores()), help="cells at a time; one per core")
    upto = f"1 to {len(SEEDS)}"
    made.add_argument("--seeds", type=int, metavar="N", default=3, help=f"of the short tasks, {upto}; 3 by default")
    made.add_argument("--long-seeds", type=int, metavar="N", default=1, help=f"of the long runs, {upto}; 1 by default")
    return made


def run(args: argparse.Namespace) -> int:
    """Do what the command line says, and return the exit code. Raises ConfigError for a mistake in it."""
    shows = only_shows(args)
    for option, count in (("--seeds", args.seeds), ("--long-seeds", args.long_seeds)):
        if not 1 <= count <= len(SEEDS):
            raise ConfigError(f"{option} {count}: write a number from 1 to {len(SEEDS)}")
    labels = names("--only", args.only, BY_LABEL)
    tasks = [TASKS[name] for name in names("--task", args.task, TASKS)]
    tasks = [replace(task, seeds=SEEDS[: args.long_seeds if task.rates_from else args.seeds]) for task in tasks]
    protocol, file = Protocol(), args.results or STORED
    if args.quick:
        tasks = [replace(task, steps=QUICK_STEPS, seeds=SEEDS[:1]) for task in tasks if task.rates_from is None]
        protocol, file = Protocol(grid=(1.0,), extensions=0), args.results or RESULTS / "convergence-quick.jsonl"
        if not tasks:
            raise ConfigError("--task: long runs are left out by --quick; leave one of them out")
    entries, said = notices(ENTRIES)
    pairs = chosen_pairs(labels, tasks, entries)
    redo = [f"{task.name}-{label}-*" for task in tasks for label in labels if args.redo]
    failed: list[str] = []
    try:
        if not shows:
            failed = train(pairs, protocol, Store(file, redo), args.jobs, said)
    finally:
        found = [row_of(entry, task, protocol, found_in(Store(file))) for entry, task in pairs]
        notes = [*said, *failed]
        present(report([row for row in found if row is not None], notes), args, PAGE, notes)
    return 1 if failed else 0


def train(pairs: Sequence[Pair], protocol: Protocol, store: Store, jobs: int, said: Sequence[str]) -> list[str]:
    """Say what is going to be trained, and train it. Returns what failed."""
    find = found_in(store)
    print("\n".join([*said, *plan(pairs, protocol, find, jobs)]), flush=True)
    return train_all(
        lambda: (cell for entry, task in pairs for cell in protocol.wanted(entry, task, find)),
        settings_of,
        run_cell,
        store,
        jobs,
        lambda: sum(estimate_s(entry, task, protocol, find) for entry, task in pairs),
    )


def plan(pairs: Sequence[Pair], protocol: Protocol, find: Find, jobs: int) -> list[str]:
    """What is going to be trained, and how long that takes, about."""
    lines, total_s = [], 0.0
    for task in dict.fromkeys(task.name for _, task in pairs):
        own = [pair for pair in pairs if pair[1].name == task]
        cells = sum(protocol.remaining(*pair, find) for pair in own)
        seconds = sum(estimate_s(*pair, protocol, find) for pair in own)
        total_s += seconds
        lines.append(f"{task:9} {len(own):3} labels, {cells:4} cells to train, {seconds_text(seconds / jobs)}")
    return [*lines, f"about {seconds_text(total_s / jobs)} on {jobs} cores, and more where a grid has to be extended"]


if __name__ == "__main__":
    main(parser(), run)
