"""The command line. Commands print and choose exit codes; what they do is in the modules that they import when called."""

from __future__ import annotations

import atexit
import io
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typing_extensions import Buffer

import commopt
from commopt.cli.notes import note, telling
from commopt.cli.usage import Command, Group
from commopt.cluster.machine import Emulate
from commopt.errors import CommoptError, ConfigError, LaunchError

if TYPE_CHECKING:
    from commopt.cluster.emulate import Emulation
    from commopt.cluster.run import JobResult
    from commopt.cluster.spec import ClusterSpec


class _Commands(Group):
    """Turns commopt's own exceptions into one line per mistake and an exit code."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """In the order of help, whichever module they come from."""
        return ["demo", "doctor", "probe", "advise", "compare", "run", "launch"]

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except CommoptError as error:
            fail(str(error), code=2 if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt:
            fail("interrupted by Ctrl-C; all that was started has ended", code=130)
        except SystemExit as error:
            if error.code in (128 + signal.SIGTERM, 128 + signal.SIGHUP):
                note(f"ended by {signal.Signals(int(error.code) - 128).name}; all that was started has ended")
            raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train over slow links: emulate a cluster on this machine, or launch on a real one.",
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"commopt {commopt.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """Options of the command line itself; typer adds those for shell completion."""


EmulateAnnotated = Annotated[
    Emulate | None,
    typer.Option(
        "--emulate", help="Emulate the links by the kernel (netns), by pacing, or not at all; auto takes what works."
    ),
]
NodeAnnotated = Annotated[
    str | None, typer.Option("--node", metavar="NAME", help="Which of the real machines this one is.")
]
PrintAnnotated = Annotated[bool, typer.Option("--print", help="Print each node's command, and start nothing.")]
JsonAnnotated = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results there.")]


class _Stream(io.FileIO):
    """The file of a standard stream; what it cannot take (a full disk) is dropped, so that training continues."""

    problem: OSError | None = None

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:  # the reader has ended, and wants no more
            raise
        except OSError as error:
            self.problem = error
            return memoryview(data).nbytes


def main() -> None:
    """Run the command line: exits with 0, 1 for a job that failed or lost output, 2 for a mistake in what was asked, 128 + a signal."""
    for descriptor in range(3):  # one that was closed (>&-) would be given to a socket
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    files = [_Stream(descriptor, "w", closefd=False) for descriptor in (1, 2)]
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(file),
            getattr(given, "encoding", None),
            getattr(given, "errors", None),
            line_buffering=True,
        )
        for file, given in zip(files, (sys.stdout, sys.stderr), strict=True)
    )
    try:
        app(prog_name="commopt")
    except SystemExit as ended:
        code = int(ended.code or 0)
        sys.stdout.flush()
        if problem := files[0].problem:
            code = code or 1
            with suppress(SystemExit):
                fail(f"the output is incomplete: {(problem.strerror or str(problem)).lower()}", code=code)
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)  # taking all modules down takes torch a second, which a reader of the output would wait


def fail(message: str, *, code: int) -> NoReturn:
    """Print one red line per mistake, and exit."""
    for line in message.splitlines() or [""]:
        typer.secho(f"commopt: {line}", fg=typer.colors.RED, err=True)
    raise SystemExit(code)


@app.command(cls=Command, epilog="Example: [bold]commopt launch configs/clusters/lab.yaml -- train.py[/bold]")
def launch(
    cluster: Annotated[Path, typer.Argument(metavar="CLUSTER.yaml", help="The nodes and their links.")],
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- PROGRAM [ARGUMENTS]...", help="What every rank runs; a .py file is run by Python."),
    ],
    emulate: EmulateAnnotated = None,
    node: NodeAnnotated = None,
    print_only: PrintAnnotated = False,
    log_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep each node's output in this folder.")] = None,
    independent: Annotated[
        bool,
        typer.Option(
            "--independent",
            help="Start each node on its own: any may die and be restarted alone while the others continue; "
            "for noloco, diloco and other methods that exchange parameters every N steps.",
        ),
    ] = False,
) -> None:
    """Run a program on every rank of a cluster.

    If the file only counts its nodes, all of them run on this machine, over links with the file's rate and delay.
    If it lists real machines, run the same command on each of them.
    """
    from commopt.cluster.run import Job
    from commopt.cluster.spec import load_cluster
    from commopt.record.words import bytes_text

    spec = load_cluster(cluster)
    check_program(command[0])
    emulation = emulated(spec, emulate, node, print_only=print_only)
    if print_only:
        print_commands(command, emulation, independent=independent)
        return
    note(*emulation.notices)
    is_labelled = len(emulation.nodes) > 1
    then = "" if sys.stderr.isatty() else "running"
    with telling("waiting for the ranks' first line") as heard:

        def show(label: str, line: str) -> None:
            heard(then)
            typer.echo(f"[{label}] {line}" if is_labelled else line)

        result = Job(
            command, emulation=emulation, log_dir=log_dir, on_line=show, on_note=note, independent=independent
        ).run()
    check_ended_well(result)
    sent = "; sent " + ", ".join(f"{name} {bytes_text(count)}" for name, count in result.tx_bytes.items())
    note(f"done in {result.wall_s:.1f} s{sent if result.tx_bytes else ''}")


def check_ended_well(result: JobResult) -> None:
    """Print what there is to know of a job's end. Raises LaunchError for one that failed."""
    note(*result.notices)
    if result.failure is not None:
        if result.failure.message and not result.failure.is_told:
            typer.echo(result.failure.message, err=True)
        raise LaunchError(f"{result.failure}; all output is in {result.log_dir}")


def emulated(spec: ClusterSpec, emulate: Emulate | None, node: str | None, *, print_only: bool) -> Emulation:
    """How a cluster runs here, with its network unless that is only printed. Raises ConfigError for a --node without effect."""
    from commopt.cluster.emulate import enter, is_inside, preview

    if node is not None and not (spec.has_hosts and (emulate or spec.emulation) is Emulate.NONE):
        raise ConfigError(f"--node {node}: has no effect where this machine runs all nodes; leave it out")
    if print_only:
        return preview(spec, emulate=emulate, node=node)
    with telling("" if is_inside() else "building the network", first_s=1.5) as heard:
        return enter(spec, emulate=emulate, node=node, on_inside=lambda: heard(""))


def check_program(program: str) -> None:
    """Raise ConfigError if there is no program of that name."""
    is_python, exists = program.endswith(".py"), Path(program).is_file()
    if is_python and not exists:
        raise ConfigError(f"{program}: no such file")
    if not is_python and shutil.which(program) is None:
        raise ConfigError(f"{program}: {'it is not executable' if exists else 'no such program'}")


def print_commands(
    words: Sequence[str],
    emulation: Emulation,
    *,
    independent: bool = False,
    label: str = "",
    told: Mapping[str, str] | None = None,
) -> None:
    """Print what would be started on each node, as shell commands; told: what else is in the environment."""
    from commopt.cluster import commands

    spec, peers = emulation.cluster, commands.peers_json(emulation, label) if independent else None
    ranks_here = spec.slots if emulation.is_elsewhere else spec.ranks
    for node in emulation.nodes:
        environment = commands.agent_environment(emulation, node, ranks_here=ranks_here, peers=peers)
        argv = commands.agent_words(emulation, node, words, independent=independent)
        typer.echo(f"# {spec.names[node]}")
        if emulation.is_elsewhere and emulation.interfaces[node] is None:
            typer.echo("# `commopt launch` adds GLOO_SOCKET_IFNAME there: its interface that leads to the other nodes")
        variables = (f"{key}={value}" for key, value in {**environment, **(told or {})}.items())
        typer.echo(shlex.join(["env", *variables, *emulation.prefix(spec.names[node]), *argv]))


def names_in(methods: str | None) -> list[str]:
    """The methods of a list such as `dense,two_way(sign, int8)`. Raises ConfigError for an empty or repeated name."""
    names = [] if methods is None else [name.strip() for name in re.split(r",(?![^(]*\))", methods)]
    for k, name in enumerate(names):
        if not name:
            raise ConfigError(f"--methods {methods!r}: a name is empty; write NAME,NAME,... as in dense,fp16")
        if name in names[:k]:
            raise ConfigError(f"--methods: duplicate method {name!r}")
    return names


def write_json(path: Path, text: str) -> None:
    """Write the file that --json names. Raises ConfigError if that is impossible."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {(error.strerror or str(error)).lower()}") from None


@app.command(cls=Command, epilog="Example: [bold]commopt doctor --json machine.json[/bold]")
def doctor(json_file: JsonAnnotated = None) -> None:
    """Show what this machine can do, and how to fix the rest."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from commopt.cluster.doctor import as_json, examine

    is_seen = sys.stdout.isatty()
    console, checks = Console(width=None if is_seen else 1000), []  # one line for each check where programs read it
    colors = {"ok": "green", "limited": "yellow", "missing": "red"}

    def show(*cells: Text | str) -> None:
        """One row at a time: some checks take seconds."""
        row = Table.grid("", "", "", "", padding=(0, 2, 0, 0), expand=is_seen)
        for column, width in zip(row.columns, (17, 7, None, None), strict=True):
            column.width, column.ratio = width, 1 if is_seen and not width else None
        row.add_row(*cells)
        console.print(row)

    show(*(Text(word, "bold") for word in ("check", "state", "found", "what to do")))
    with telling("checking") as heard:
        for check in examine():
            heard("checking")
            checks.append(check)
            found, cure = Text(check.found, overflow="fold"), Text(check.cure)
            show(check.check, Text(check.state, colors[check.state]), found, cure)
    if json_file is not None:
        write_json(json_file, as_json(checks))
