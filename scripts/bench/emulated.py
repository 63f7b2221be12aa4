"""Measuring cells on emulated nodes: those of one cluster one after the other, in a process with namespaces of its own."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from store import Store

from commopt.cluster.emulate import Emulation, end_on_signals, end_with_parent, enter
from commopt.cluster.machine import Emulate
from commopt.cluster.run import Job
from commopt.cluster.spec import ClusterSpec
from commopt.errors import CommoptError
from commopt.record.words import seconds_text

BUSY_CORES = 0.2  # of other programs: from here on a cell's numbers are not to be trusted

Entry = Mapping[str, Any]  # name, settings, cell (its fields) and cluster (a specification) of a cell
Measure = Callable[..., dict[str, Any]]  # of an entry, the emulation and the options of `measure_all`
Outcome = Callable[[Mapping[str, Any]], str]


def measure_all(entries: Sequence[Entry], store_file: Path, **options: Any) -> None:
    """Measure the cells, one process of its own for each cluster. options: for the benchmark's `measure`."""
    done = 0
    for cluster in {entry["cluster"]["name"]: entry["cluster"] for entry in entries}.values():
        own = [entry for entry in entries if entry["cluster"] == cluster]
        plan = {"cells": own, "cluster": cluster, "done": done, "total": len(entries)}
        run_child({**plan, "store": str(store_file.resolve()), "options": options})
        done += len(own)


def measure_missing(entries: Iterable[Entry], store_file: Path, *, redo: bool) -> None:
    """`measure_all` of the cells that are not stored with these settings, or of all."""
    store = Store(store_file, ["*"] if redo else ())
    measure_all([one for one in entries if store.get(one["name"], one["settings"]) is None], store_file)


def finish(
    entry: Entry,
    words: Sequence[str],
    emulation: Emulation,
    log_dir: Path,
    longest_s: float,
    *,
    independent: bool = False,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Run a program on the nodes until it ends. Raises CommoptError if it fails, with what a rank said, or takes longer.

    check: called now and then; may raise, too.
    """

    def give_up(elapsed_s: float) -> None:
        if elapsed_s > longest_s:
            raise CommoptError(f"{entry['name']}: not done after {seconds_text(longest_s)}")
        check()

    job = Job(words, emulation=emulation, log_dir=log_dir, on_tick=give_up, independent=independent).run()
    if job.failure is not None:
        raise CommoptError(f"{entry['name']}: {job.failure}\n{job.failure.message}".rstrip())


def run_child(plan: Mapping[str, Any]) -> None:
    """Run the cells of one cluster. On Ctrl-C the child ends everything that it has started, and then this does."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        plan_file = Path(scratch, "plan.json")
        plan_file.write_text(json.dumps(plan))
        child = subprocess.Popen(
            [sys.executable, str(Path(sys.argv[0]).resolve()), "--run-plan", str(plan_file)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),
        )
        try:
            code = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if code != 0:
        raise SystemExit(code)


def start(
    args: argparse.Namespace, run: Callable[[argparse.Namespace], None], measure: Measure, outcome: Outcome
) -> None:
    """Do what the command line says, or in a child of it what the plan says. outcome: says a result in a few words."""
    if args.run_plan is not None:
        run_plan(args.run_plan, measure, outcome)
    else:
        end_on_signals()
        run(args)


def run_plan(plan_file: Path, measure: Measure, outcome: Outcome) -> None:
    """Measure the cells of one cluster; runs this command again in namespaces of its own, and exits as that does."""
    plan = json.loads(plan_file.read_text())
    cluster = ClusterSpec.model_validate(plan["cluster"])
    emulation = enter(cluster, emulate=Emulate.NETNS)
    for position, entry in enumerate(plan["cells"], start=plan["done"] + 1):
        print(f"[{position}/{plan['total']}] {entry['name']} ...", end=" ", flush=True)
        before, start_s = cpu_seconds(), time.monotonic()
        result = measure(entry, emulation, **plan["options"])
        after, wall_s = cpu_seconds(), time.monotonic() - start_s
        others = None if before is None or after is None else round(max(0.0, after - before) / wall_s, 3)
        result = {"schema": 1, **result, "wall_s": round(wall_s, 1), "others_cores": others}
        print(f"{outcome(result)}; took {seconds_text(wall_s)}", flush=True)
        Store(Path(plan["store"])).put(entry["name"], entry["settings"], result)


def cpu_seconds() -> float | None:
    """Seconds that this machine's processors have worked for others than this process and those it has waited for."""
    try:
        words = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return None
    user, nice, system = (int(word) / os.sysconf("SC_CLK_TCK") for word in words[:3])  # interrupts are the network's
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return user + nice + system - sum(usage.ru_utime + usage.ru_stime for usage in usages)
