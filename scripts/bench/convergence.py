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
from dataclasses import replace

from command import DOCS, main, names, new_parser, only_shows, present
from convergence_cells import BY_LABEL, ENTRIES, SEEDS, TASKS, Protocol, chosen_pairs, found_in, notices, settings_of
from convergence_results import report, row_of
from convergence_training import run_cell
from store import RESULTS, Store
from training import my_cores, train_all

from commopt.errors import ConfigError

STORED = RESULTS / "convergence.jsonl"
PAGE = DOCS / "convergence.md"
QUICK_STEPS = 100


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
            store = Store(file, redo)
            find = found_in(store)
            print(*said, sep="\n", end="\n" * bool(said), flush=True)
            failed = train_all(
                lambda: (cell for pair in pairs for cell in protocol.wanted(*pair, find)),
                settings_of,
                run_cell,
                store,
                args.jobs,
            )
    finally:
        found = [row_of(entry, task, protocol, found_in(Store(file))) for entry, task in pairs]
        present(report([row for row in found if row is not None]), args, PAGE, [*said, *failed])
    return 1 if failed else 0


if __name__ == "__main__":
    main(parser(), run)
