"""`commopt probe`: measure a cluster, and a script on it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import commopt
from commopt.cli.app import (
    EmulateAnnotated,
    NodeAnnotated,
    app,
    check_ended_well,
    check_program,
    emulated,
    names_in,
)
from commopt.cli.notes import note, telling
from commopt.cli.usage import Command
from commopt.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from commopt.cluster.emulate import Emulation
    from commopt.cluster.spec import ClusterSpec
    from commopt.method import Method
    from commopt.plan.probe import Probe

_MOST_S = 48.0  # of a probe, without compiling kernels and without what a script needs until its first step
_SILENT_S = 2.5


@app.command(
    cls=Command,
    epilog="Examples: [bold]commopt probe configs/clusters/lab.yaml[/bold]\n\n"
    "[bold]commopt probe lab.yaml --out lab.json -- train.py --lr 1e-3[/bold]",
)
def probe(
    cluster: Annotated[Path, typer.Argument(metavar="CLUSTER.yaml", help="The nodes and their links.")],
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- PROGRAM.py [ARGUMENTS]...]",
            help="A script that calls commopt.attach, to measure its own times too.",
        ),
    ] = None,
    emulate: EmulateAnnotated = None,
    node: NodeAnnotated = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where what was measured goes.")] = Path(
        "probe.json"
    ),
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,NAME,...", help="Whose computing is timed; by default every one's.")
    ] = None,
) -> None:
    """Measure in less than a minute what planning needs to know of your machines, their links, and your script.

    Latency and rate between machines, what exchanges reach of it, and what methods compute. If the file lists real machines, run the
    same command on each of them; the first one writes the file.
    """
    from commopt.cluster.spec import load_cluster

    began_s, spec = time.monotonic(), load_cluster(cluster)
    if len(spec.nodes) < 2:
        raise ConfigError(f"{cluster}: nodes: one node has no link to measure; write two or more")
    if command:
        check_program(command[0])
    _check_out(out)
    emulation = emulated(spec, emulate, node, print_only=False)
    with telling("importing torch, checking the methods"):
        from commopt.run.prepare import prepare

        made = _made(names_in(methods))
    left_s = _MOST_S - (time.monotonic() - began_s)
    prepare(made.values(), note)
    note(*emulation.notices)
    found = _measured(cluster, spec, emulation, command or [], list(made), left_s)
    if found is None:
        note(f"done; {spec.names[0]} writes what was measured")
        return
    from commopt.report.probed import show

    found.write(out)
    show(found, sys.stdout)
    more = "" if command else " --parameters NUMBER --step TIME"  # which the script's own would tell
    note(f"wrote {out}; next: commopt advise {cluster} --probe {out}{more}")


def _check_out(out: Path) -> None:
    """Raise ConfigError if the file cannot be written, before a minute is spent."""
    folder = out.parent
    if os.path.isdir(out):
        raise ConfigError(f"--out {out}: is a folder; write the name of a file")
    if not os.path.isdir(folder):
        raise ConfigError(f"--out {out}: folder {folder} does not exist; make it, or write another path")
    if not os.access(out if os.path.exists(out) else folder, os.W_OK):
        raise ConfigError(f"--out {out}: cannot be written; write another path")


def _made(names: Sequence[str]) -> dict[str, Method]:
    """The methods to time, all that can be without names. Raises ConfigError for one that cannot be timed."""
    from commopt.advise.codecs import made, timed_methods

    for name in names:
        if made(name).kind == "outer":
            raise ConfigError(
                f"--methods: {name} exchanges parameters only now and then, so its computing is not timed; leave it out"
            )
    return {name: made(name) for name in names or timed_methods()}


class _Progress:
    """Prints what ranks say, and how long the last of it takes if they say nothing for a while."""

    def __init__(self, first: str) -> None:
        self._last, self._told_s, self._began_s = first, time.monotonic(), time.monotonic()

    def say(self, text: str) -> None:
        self._last, self._told_s, self._began_s = text, time.monotonic(), time.monotonic()
        note(text)

    def tick(self, _: float) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s > _SILENT_S:
            self._told_s = now_s
            note(f"{self._last}, {now_s - self._began_s:.0f} s")


def _measured(
    path: Path, spec: ClusterSpec, emulation: Emulation, command: Sequence[str], methods: Sequence[str], left_s: float
) -> Probe | None:
    """What the ranks have measured, in so many seconds; None on a machine that is not the first. Raises LaunchError if they fail."""
    from commopt.cluster.machine import usable_cores
    from commopt.cluster.run import Job
    from commopt.plan.probe import Probe
    from commopt.reading import validated
    from commopt.run.log import SILENT_S

    ranks_here = spec.slots * len(emulation.nodes)
    with tempfile.TemporaryDirectory(prefix="commopt-") as folder:
        record, out = os.path.join(folder, "record"), Path(folder, "found.json")
        if command:
            _run_script(path, spec, emulation, command, record)
            left_s -= SILENT_S
        settings: dict[str, Any] = {"out": str(out), "methods": methods, "record": record if command else None}
        settings |= {"until_s": time.time() + left_s}
        settings |= {"cores_per_rank": usable_cores() / ranks_here}
        progress = _Progress("starting the ranks" if 0 in emulation.nodes else "measuring with the other machines")
        result = Job(
            [sys.executable, "-m", "commopt.advise.probing", json.dumps(settings)],
            emulation=emulation,
            env={"COMMOPT_BACKEND": spec.backend},
            on_tick=progress.tick,
            on_line=lambda label, line: progress.say(line if label == spec.names[0] else f"[{label}] {line}"),
            on_note=note,
        ).run()
        check_ended_well(result)
        if 0 not in emulation.nodes:
            return None
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if command and found["script"] is None:
        raise LaunchError(f"{command[0]}: ended before some steps were timed; it must train for longer")
    return validated(Probe, {**found, **_facts(spec, emulation, settings, command, found)}, "probe")


def _facts(
    spec: ClusterSpec,
    emulation: Emulation,
    settings: Mapping[str, Any],
    command: Sequence[str],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """What the launcher knows."""
    rates = {
        name: rate if (rate := spec.link(k).bytes_per_s) < float("inf") else None for k, name in enumerate(spec.names)
    }
    return {
        "schema": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commopt": commopt.__version__,
        "cluster": spec.name,
        "backend": spec.backend,
        "cores_per_rank": settings["cores_per_rank"],
        "emulated": not emulation.is_elsewhere,
        "rates": rates,
        "script": {"program": command[0], **found["script"]} if command else None,
    }


def _run_script(path: Path, spec: ClusterSpec, emulation: Emulation, command: Sequence[str], record: str) -> None:
    """Run the user's script for some steps without communication, and record them. Raises LaunchError if it fails, or does not attach."""
    from commopt.cli import training
    from commopt.cluster.run import Job
    from commopt.cluster.spec import run_of_program
    from commopt.report.results import collect

    program, *arguments = command
    run = run_of_program(Path(program), path, methods=["dense"], steps=None, arguments=arguments)
    progress = _Progress("")
    progress.say(f"{Path(program).name}: some steps without communication")
    result = Job(
        training.program_words(run, {}),
        emulation=emulation,
        env={"COMMOPT_RECORD": record, "COMMOPT_STEPS": "0", **training.program_environment(run, "dense", {})},
        on_tick=progress.tick,
        on_line=lambda label, line: typer.echo(f"[{label}] {line}", err=True),
        on_note=note,
    ).run()
    check_ended_well(result)
    ranks = [node * spec.slots + slot for node in emulation.nodes for slot in range(spec.slots)]
    if failure := collect(Path(record), method="dense", ranks_here=ranks).failure:
        raise LaunchError(f"{program}: {failure}")
