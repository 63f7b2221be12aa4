"""Write commopt/plan/profiles.json, what `commopt advise` knows of the methods without importing torch.

python scripts/plan_table.py          from the methods themselves, and from the stored results of the benchmarks of losses and codecs
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from convergence_cells import BY_LABEL, TASKS, Protocol, found_in
from convergence_results import row_of
from outer_cells import ENTRIES as OUTER_ENTRIES
from outer_cells import Protocol as OuterProtocol
from outer_cells import Task as OuterTask
from outer_cells import found_in as outer_found_in
from outer_results import Results
from store import RESULTS, Store

from commopt.advise.codecs import NEEDED
from commopt.advise.profiling import profile_of
from commopt.methods import METHODS, build
from commopt.plan.profile import TABLE, Profile, Quality

VARIANTS = ("two_way(int8)", "two_way(4bit)", "two_way(fp8)")
# what they send depends on gradients or links; two_way is there with its codecs
UNPLANNED = ("threshold", "two_way", "auto")
# the entry of the convergence benchmark that a profile's options are those of, if it is not called like the method
ENTRIES = {
    "two_way(int8)": "int8",
    "two_way(4bit)": "4bit",
    "two_way(fp8)": "fp8",
    "distributed_lion": "lion_majority",
    "powersgd": "powersgd_4",
    "top_k": "top_k_1pct",
    "random_k": "random_k_1pct",
    "dgc": "dgc_0.1pct",
}
COMMON_TASKS = ("gpt", "digits", "gpt_long")


def made() -> Iterator[Profile]:
    """A profile for every method and variant that can be planned."""
    codecs = Store(RESULTS / "codec_costs.jsonl")
    for name in (*METHODS, *VARIANTS):
        if name in UNPLANNED:
            continue
        profile = profile_of(build(name, **NEEDED.get(name, {})), name)
        cost = codecs.get(name, None) or {}
        yield replace(
            profile,
            options=None,
            exchange_copies=cost.get("exchange"),
            quality=tuple(quality(name)),
        )


def quality(name: str) -> Iterator[Quality]:
    """By how much the method's loss was above its parent's, in each task of the benchmark."""
    if METHODS[name.partition("(")[0]].kind == "outer":
        yield from outer_quality(name)
        return
    entry = BY_LABEL.get(ENTRIES.get(name, name))
    if entry is None or entry.method == "dense":
        return
    find = found_in(Store(RESULTS / "convergence.jsonl"))
    for task in (TASKS[task] for task in COMMON_TASKS if task in entry.tasks):
        row = row_of(entry, task, Protocol(), find)
        if row is not None and row.worse_by:
            what = f"{task.name.replace('gpt_long', 'GPT').replace('gpt', 'GPT')}, {row.parameters / 1e6:.2g} M, {task.steps:,} steps"
            yield Quality(what, round(statistics.fmean(row.worse_by), 1))


def outer_quality(name: str) -> Iterator[Quality]:
    """The same of an outer method, against the mean of the gradients in every step with as many replicas."""
    task = OuterTask()
    found = Results(OuterProtocol(), outer_found_in(Store(RESULTS / "outer.jsonl"), task), OUTER_ENTRIES, task)
    for ranks in (4, 16):
        row = found.row(name, ranks)
        worse = row.over(found.row("dense", ranks)) if row is not None else []
        if row is not None and worse:
            rounds = "in every step" if row.entry.period is None else f"every {task.every} of {task.steps} steps"
            yield Quality(f"GPT, {ranks} replicas, {rounds}", round(statistics.fmean(worse), 1))


def text() -> str:
    """The table, a method per line."""
    rows = ",\n".join(json.dumps(profile.to_json()) for profile in made())
    return f"[\n{rows}\n]\n"


if __name__ == "__main__":
    TABLE.write_text(text(), encoding="utf-8")
    print(f"written: {TABLE}")
