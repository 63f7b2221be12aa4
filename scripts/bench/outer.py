"""Train a small GPT with dense Adam, local SGD, DiLoCo and NoLoCo at equal tokens, and say what rare averaging costs in loss.

python scripts/bench/outer.py                              all cells that are not stored yet; Ctrl-C keeps what is done
python scripts/bench/outer.py --quick                      a look in a minute: a few rounds of the methods that are compared
python scripts/bench/outer.py --only noloco_int8 --redo    one label again
python scripts/bench/outer.py --table | --page             show what is stored, or write docs/outer-convergence.md and its figure

Replicas are threads over a SimWorld, and the rounds are those of frameworks.plain: a real run's arithmetic, with a network that
takes no time and loses nothing. All train launch/train.py's byte-level GPT on the standard library's sources with AdamW, the
same batches by rank and seed, and as many steps.

The learning rate of dense, and one for all outer methods, is chosen on 4 replicas with the first seed; then come 4 replicas with
three seeds, 8 and 16 with one, and options that the papers leave open with one seed. A cell is stored in
scripts/bench/results/outer.jsonl with its settings, and trained again only if those have changed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from command import DOCS, main, names, new_parser, only_shows, present
from outer_cells import BY_LABEL, SEEDS, Protocol, Task, found_in, settings_of, why_not
from outer_results import Results
from outer_training import run_cell
from store import RESULTS, Store
from training import my_cores, train_all

STORED = RESULTS / "outer.jsonl"
PAGE = DOCS / "outer-convergence.md"


def parser() -> argparse.ArgumentParser:
    only = f"of {', '.join(BY_LABEL)}; what chooses rates is added"
    made, _ = new_parser(__doc__, STORED, only, PAGE)
    made.add_argument("--ranks", metavar="N,...", help=f"numbers of replicas, of {', '.join(map(str, SEEDS))}")
    made.add_argument("--quick", action="store_true", help="4 rounds, one rate, one seed, 4 replicas; stored apart")
    made.add_argument("--jobs", type=int, metavar="N", default=len(my_cores()), help="cells at a time; one per core")
    return made


def run(args: argparse.Namespace) -> int:
    """Do what the command line says, and return the exit code. Raises ConfigError for a mistake in it."""
    shows, labels = only_shows(args), names("--only", args.only, BY_LABEL)
    counts = [int(name) for name in names("--ranks", args.ranks, map(str, SEEDS))]
    task, protocol, file = Task(), Protocol(seeds={n: SEEDS[n] for n in SEEDS if n in counts}), args.results or STORED
    reasons = {label: why_not(BY_LABEL[label]) for label in labels}
    said = [f"{label} is skipped: {reason}" for label, reason in reasons.items() if reason is not None]
    entries = [BY_LABEL[label] for label in labels if reasons[label] is None]
    if args.quick:
        task, protocol = quick(min(counts))
        file = args.results or RESULTS / "outer-quick.jsonl"
        entries = [entry for entry in entries if args.only is not None or not entry.is_extra]
    failed: list[str] = []
    try:
        if not shows:
            store = Store(file, [f"*-{label}-*" for label in labels if args.redo])
            find = found_in(store, task)
            print(*said, sep="\n", end="\n" * bool(said), flush=True)
            failed = train_all(
                lambda: protocol.wanted(entries, find),
                lambda cell: settings_of(cell, task),
                run_cell,
                store,
                args.jobs,
            )
    finally:
        results = Results(protocol, found_in(Store(file), task), entries, task)
        present(results.report(), args, PAGE, [*said, *failed])
    return 1 if failed else 0


def quick(ranks: int) -> tuple[Task, Protocol]:
    """A short task, trained with one rate and one seed."""
    task = replace(Task(), steps=8, every=2, held_out=4)
    return task, Protocol(grid=(3e-3,), extensions=0, seeds={ranks: SEEDS[ranks][:1]})


if __name__ == "__main__":
    main(parser(), run)
