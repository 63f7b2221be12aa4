"""Trains one program under several methods in turn, on the same cluster, for `run` and `compare`."""

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from commopt.cli.notes import telling
from commopt.cluster.emulate import Emulation
from commopt.cluster.injection import Injection
from commopt.cluster.run import Job
from commopt.cluster.spec import RunSpec
from commopt.errors import AttachError, ConfigError
from commopt.reading import shown
from commopt.record.board import Board
from commopt.record.live import Live
from commopt.report.document import Cluster, Results, RunResult
from commopt.report.page import FILES
from commopt.report.results import assemble, collect

_FULL_BYTES = 1 << 14


def chosen_methods(run: RunSpec, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options by method, in the order asked for; without names, the run's own."""
    return {name: run.methods.get(name, {}) for name in names or run.methods}


def check_methods(run: RunSpec, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Build every method once, on a tiny model. Raises ConfigError with all mistakes, each with its file and key."""
    import torch

    from commopt.methods import build
    from commopt.optim import make_optimizer

    mistakes = []
    steps = run.planned_steps
    for name, options in methods.items():
        try:
            plain, optimizer = _split(run, options)
            made = build(name, **plain)
            if optimizer:
                made.check_optimizer(make_optimizer(optimizer, torch.nn.Linear(2, 2).parameters()))
        except (ConfigError, AttachError, TypeError) as error:
            prefix = "optimizer: " if isinstance(error, AttachError) else ""
            text = str(error).removeprefix(f"method {name.partition('(')[0]}: ")
            mistakes.append(f"{run.path.name}: methods.{shown(name)[1:-1]}: {prefix}{text}")
            continue
        if steps is not None and made.warmup_steps >= steps:
            mistakes.append(
                f"{run.path.name}: methods.{name}: {made.warmup_option}: the warm-up of {made.warmup_steps} steps does not end "
                f"before the last of {steps}; lower {made.warmup_option}, or raise arguments.steps"
            )
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def check_outputs(methods: Iterable[str], out_dir: Path, json_file: Path | None) -> None:
    """Check every place that training and the report will write to. Raises ConfigError with all that cannot be written."""
    folders = [out_dir, *(out_dir / kind / name for kind in ("record", "log") for name in methods)]
    wrong = dict.fromkeys(filter(None, map(_folder_mistake, folders)))  # a file that blocks several is named once
    wrong |= dict.fromkeys(f"{folder} is a link" for folder in folders[1:] if folder.is_symlink())
    wrong |= dict.fromkeys(f"{out_dir / name} is a folder" for name in FILES if os.path.isdir(out_dir / name))
    mistakes = [f"--out {out_dir}: {text}; remove it, or write another folder" for text in wrong]
    if json_file is not None:
        folder = json_file.resolve().parent
        if os.path.isdir(json_file):
            mistakes.append(f"--json {json_file}: is a folder; write the name of a file")
        elif os.path.exists(json_file):
            if not os.access(json_file, os.W_OK):
                mistakes.append(f"--json {json_file}: cannot be written; write another path")
        elif not os.path.isdir(folder) and folder not in (out_dir, *out_dir.parents):
            mistakes.append(f"--json {json_file}: folder {folder} does not exist; create it, or write another path")
        elif text := _folder_mistake(folder):
            mistakes.append(f"--json {json_file}: {text}; write another path")
    if mistakes:
        raise ConfigError("\n".join(mistakes))


@contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Hold a folder of results until the block has ended. Raises ConfigError if another process holds it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            another = "another commopt is writing there; wait for its end, or write another folder"
            raise ConfigError(f"--out {out_dir}: {another}") from None
        yield
    finally:
        os.close(descriptor)


def _folder_mistake(folder: Path) -> str | None:
    """Why a folder, or the nearest existing one above it, cannot be written in; None if it can."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not os.path.isdir(folder):
        return f"{folder} is not a folder"
    try:
        tempfile.TemporaryFile(dir=folder).close()  # os.access allows root everything, even in /proc
    except OSError as error:
        return f"{folder} cannot be written: {(error.strerror or str(error)).lower()}"
    return None


def train_each(
    run: RunSpec,
    methods: Mapping[str, Mapping[str, Any]],
    *,
    emulation: Emulation,
    out_dir: Path,
    tell: Callable[[str], None],
    report: Callable[[Results], None],
    board: Board | None = None,
) -> list[RunResult]:
    """Train under each method in turn, showing progress, also on a board. After a run that fails, the next one still starts.

    out_dir gets record/METHOD/rank*.jsonl and log/METHOD/NODE.log. `report` gets all runs at the end. On Ctrl-C or an error it
    gets those that had ended, if any; then the exception is raised again, and nothing is left running.
    """
    from commopt.methods import build
    from commopt.run.prepare import prepare

    with telling("loading kernels") as heard:

        def show(line: str) -> None:
            heard("")
            tell(line)

        prepare((build(name, **_split(run, options)[0]) for name, options in methods.items()), show)
    results: list[RunResult] = []
    try:
        with Live(sys.stdout, board) as live:
            for name, options in methods.items():
                results.append(_train(run, name, options, emulation=emulation, out_dir=out_dir, live=live))
    finally:
        missing = list(methods)[len(results) :]
        notices = [*emulation.notices, *([f"ended early, without {', '.join(missing)}"] if missing else [])]
        if results:
            cluster = Cluster.from_spec(run.cluster, emulation=emulation.mode.value, notices=notices)
            report(assemble(results, cluster))
    return results


def program_words(run: RunSpec, options: Mapping[str, Any]) -> list[str]:
    """The program and its arguments, under a method with these options."""
    _, optimizer = _split(run, options)
    return [str(run.program), *run.argument_words(), *(["--optimizer", json.dumps(optimizer)] if optimizer else [])]


def program_environment(run: RunSpec, name: str, options: Mapping[str, Any]) -> dict[str, str]:
    """What tells a program that calls `commopt.attach` its method, and after how many steps it ends."""
    plain, _ = _split(run, options)
    told = {"COMMOPT_METHOD": json.dumps({"name": name, **plain}), "COMMOPT_BACKEND": run.cluster.backend}
    return told if run.steps is None else {**told, "COMMOPT_STEPS": str(run.steps)}


def is_independent(name: str) -> bool:
    """Whether every node is a job of its own under this method, so that nodes may come and go."""
    from commopt.methods import METHODS

    return METHODS[name.partition("(")[0]].kind == "outer"


def _split(run: RunSpec, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method's own options, and the optimizer: the one among the options, or else the run's."""
    plain = {key: value for key, value in options.items() if key != "optimizer"}
    optimizer = options.get("optimizer", run.optimizer)
    example = "write its name and arguments, as in {name: adam, lr: 0.001}"
    if not isinstance(optimizer, dict):
        wrong = "is empty" if optimizer is None else f"{shown(optimizer)} is not a set of keys and values"
        raise ConfigError(f"optimizer: {wrong}; {example}, or leave the key out")
    if "optimizer" in options and "name" not in optimizer:
        raise ConfigError(f"optimizer: {shown(optimizer)} has no name; {example}")
    return plain, dict(optimizer)


def _train(
    run: RunSpec, name: str, options: Mapping[str, Any], *, emulation: Emulation, out_dir: Path, live: Live
) -> RunResult:
    record_dir, log_dir = (_emptied(out_dir / kind / name) for kind in ("record", "log"))
    live.begin(name, record_dir)
    job = Job(
        program_words(run, options),
        emulation=emulation,
        env={"COMMOPT_RECORD": str(record_dir), **program_environment(run, name, options)},
        log_dir=log_dir,
        on_tick=lambda _: live.tick(),
        on_line=lambda label, line: typer.echo(f"[{name}, {label}] {line}"),
        on_note=live.say,
        independent=is_independent(name),
        label=f"{run.name} {name}",
        faults=Injection(run.faults, emulation=emulation, record_dir=record_dir, tell=live.say) if run.faults else None,
    ).run()
    for notice in job.notices:
        live.say(notice)
    failure = None
    if job.failure is not None:
        failure = str(job.failure)
        if job.failure.killed_at_step is not None:
            failure += f"; {name} needs every rank, and ends with it"
        if job.failure.message and not job.failure.is_told:
            live.note(job.failure.message)
        live.note(f"all output is in {log_dir}")
    if shutil.disk_usage(out_dir).free < _FULL_BYTES:
        full = f"the disk of {out_dir} is full, so records and logs are incomplete"
        failure = f"{failure}; {full}" if failure else full
    live.end(failure)
    slots = run.cluster.slots
    ranks_here = [node * slots + slot for node in emulation.nodes for slot in range(slots)]
    return collect(record_dir, method=name, options=options, failure=failure, ranks_here=ranks_here, told=job.notices)


def _emptied(folder: Path) -> Path:
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"--out {folder.parents[1]}: cannot be written: {why}") from None
    return folder.resolve()
