"""The command line. Commands print and choose exit codes; what they do is in the modules that they import when called."""

from __future__ import annotations

import atexit
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typing_extensions import Buffer

import commopt
from commopt.choice import is_file
from commopt.cli.notes import note, telling
from commopt.cli.usage import Command, Group
from commopt.cluster.machine import Emulate
from commopt.errors import CommoptError, ConfigError, LaunchError

if TYPE_CHECKING:
    from commopt.cluster.emulate import Emulation
    from commopt.cluster.run import JobResult
    from commopt.cluster.spec import ClusterSpec, RunSpec
    from commopt.report.document import Results


class _Commands(Group):
    """Turns commopt's own exceptions into one line per mistake and an exit code."""

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
OutAnnotated = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where results go; out/NAME by default.")
]
MethodsAnnotated = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME,...", help="Which methods, in this order; all of a run's file by default."),
]
JsonAnnotated = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the results there.")]


COMPARED_STEPS = 100  # of a program under each method


BoardAnnotated = Annotated[
    Path | None,
    typer.Option("--tensorboard", metavar="DIR", help="Write loss, times and bytes to TensorBoard while it trains."),
]


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
        raise ConfigError(f"{program}: there is no such file")
    if not is_python and shutil.which(program) is None:
        raise ConfigError(f"{program}: {'it is not executable' if exists else 'there is no such program'}")


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


def write_json(path: Path, text: str) -> None:
    """Write the file that --json names. Raises ConfigError if that is impossible."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {(error.strerror or str(error)).lower()}") from None


RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN.yaml|PROGRAM.py", help="A run's file, or a program that calls commopt.attach.")
]
ArgumentsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[-- ARGUMENTS...]", help="The program's own arguments, as they are.")
]
ClusterAnnotated = Annotated[
    Path | None, typer.Option("--cluster", metavar="CLUSTER.yaml", help="For a program: the nodes and their links.")
]
StepsAnnotated = Annotated[
    int | None, typer.Option("--steps", metavar="N", min=1, help="End the program after this many optimizer steps.")
]


@app.command(cls=Command, epilog="Example: [bold]commopt run configs/runs/demo.yaml --method onebit_adam[/bold]")
def run(
    what: RunArgument,
    arguments: ArgumentsArgument = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which method; of a run's file, the first one by default.")
    ] = None,
    cluster: ClusterAnnotated = None,
    steps: StepsAnnotated = None,
    emulate: EmulateAnnotated = None,
    node: NodeAnnotated = None,
    out: OutAnnotated = None,
    json_file: JsonAnnotated = None,
    tensorboard: BoardAnnotated = None,
    print_only: PrintAnnotated = False,
) -> None:
    """Train once, and write a report."""
    if method is not None and not method.strip():
        raise ConfigError(f"--method {method!r}: the name is empty; write one, as in dense")
    spec = _run_spec(what, cluster, ["--method", *([method] if method else [])], steps, arguments or [])
    _train_and_report(
        spec, [method or next(iter(spec.methods))], emulate, node, out, json_file, tensorboard, print_only
    )


@app.command(
    cls=Command,
    epilog="Examples: [bold]commopt compare configs/runs/demo.yaml --methods dense,fp16[/bold]\n\n"
    "[bold]commopt compare train.py --cluster lab.yaml --methods dense,fp16 -- --lr 1e-3[/bold]",
)
def compare(
    what: RunArgument,
    arguments: ArgumentsArgument = None,
    methods: MethodsAnnotated = None,
    cluster: ClusterAnnotated = None,
    steps: StepsAnnotated = None,
    emulate: EmulateAnnotated = None,
    node: NodeAnnotated = None,
    out: OutAnnotated = None,
    json_file: JsonAnnotated = None,
    tensorboard: BoardAnnotated = None,
    print_only: PrintAnnotated = False,
) -> None:
    """Train the same model under each method in turn, and report loss, time and bytes side by side.

    A program needs commopt.attach, and run.log(loss=...) for its losses; it is ended after 100 steps, or --steps.
    Cluster, seed and order of the data are the same for all. The report is a page with pictures; open OUT/report.html.
    """
    names = names_in(methods)
    spec = _run_spec(what, cluster, ["--methods", *names], steps, arguments or [])
    if steps is None and not is_file(str(what)):
        spec = spec.model_copy(update={"steps": COMPARED_STEPS})
        note(f"each run ends after {COMPARED_STEPS} steps; --steps changes that")
    _train_and_report(spec, names, emulate, node, out, json_file, tensorboard, print_only)


def names_in(methods: str | None) -> list[str]:
    """The methods of a list such as `dense,two_way(sign, int8)`."""
    return [name.strip() for name in re.split(r",(?![^(]*\))", methods)] if methods is not None else []


def _run_spec(
    what: Path, cluster: Path | None, methods: Sequence[str], steps: int | None, arguments: Sequence[str]
) -> RunSpec:
    """The run of a file or a program; methods: the option that names them, and its names."""
    from commopt.cluster.spec import load_run, run_of_program

    option, *names = methods
    if not is_file(str(what)):
        check_program(str(what))
        if cluster is None:
            raise ConfigError(f"{what}: --cluster is missing; write a cluster's file, as in --cluster two-nodes.yaml")
        if not names:
            raise ConfigError(
                f"{what}: {option} is missing; write it, as in {option} dense{',onebit_adam' * (option == '--methods')}"
            )
        return run_of_program(what, cluster, methods=names, steps=steps, arguments=arguments)
    if cluster is not None or arguments:
        wrong = f"--cluster {cluster}" if cluster is not None else shlex.join(["--", *arguments])
        raise ConfigError(
            f"{wrong}: has no effect on {what}, which names its own cluster and arguments; write it there"
        )
    spec = load_run(what)
    return spec if steps is None else spec.model_copy(update={"steps": steps})


@app.command(cls=Command, epilog="Example: [bold]commopt demo --methods dense,dgc[/bold]")
def demo(
    methods: MethodsAnnotated = None,
    emulate: EmulateAnnotated = None,
    out: OutAnnotated = None,
    json_file: JsonAnnotated = None,
    print_only: PrintAnnotated = False,
) -> None:
    """Compare methods now: a small GPT on four emulated machines with 50 Mbit/s links, in about four minutes.

    It trains uncompressed, in fp16 and with 1-bit Adam. Program and files are commopt's own; nothing else is needed.
    """
    home = Path(commopt.__file__).parent  # a wheel has them inside the package, a checkout beside it
    places = (top / "configs/runs/demo.yaml" for top in (home, home.parent))
    run_file = next(place for place in places if place.is_file())
    compare(run_file, methods=methods, emulate=emulate, out=out, json_file=json_file, print_only=print_only)


def _train_and_report(
    spec: RunSpec,
    names: list[str],
    emulate: Emulate | None,
    node: str | None,
    out: Path | None,
    json_file: Path | None,
    tensorboard: Path | None,
    print_only: bool,
) -> None:
    from commopt.cli import training
    from commopt.cluster.injection import check_faults
    from commopt.record.board import Board

    check_program(str(spec.program))
    methods = training.chosen_methods(spec, names)
    emulation = emulated(spec.cluster, emulate, node, print_only=print_only)
    with telling("importing torch, checking the methods"):
        training.check_methods(spec, {**spec.methods, **methods})
        if not print_only:
            importlib.import_module("commopt.kernels").load_cpu()
    check_faults(spec.faults, emulation, spec.path.name)
    if print_only:
        for name, options in methods.items():
            typer.echo(f"# method {name}")
            words, independent = training.program_words(spec, options), training.is_independent(name)
            told = training.program_environment(spec, name, options)
            print_commands(words, emulation, independent=independent, label=f"{spec.name} {name}", told=told)
        return
    out_dir = (out or Path("out") / spec.name).resolve()
    board = Board(tensorboard) if tensorboard is not None else None
    reports = 0 in emulation.nodes  # on real machines, the first one reports what its own ranks recorded
    training.check_outputs(methods, out_dir, json_file if reports else None)
    note(*emulation.notices)
    with nullcontext() if emulation.is_elsewhere else training.locked(out_dir):  # machines may share a disk
        runs = training.train_each(
            spec,
            methods,
            emulation=emulation,
            out_dir=out_dir,
            tell=note,
            report=lambda results: _report(results, out_dir, json_file) if reports else None,
            board=board,
        )
    failed = [result.name for result in runs if result.status != "finished"]
    if failed:
        raise LaunchError(f"{', '.join(failed)} did not finish; see above")


def _report(results: Results, out_dir: Path, json_file: Path | None) -> None:
    from commopt.report.page import keep_last_good, results_json, write_report
    from commopt.report.table import show

    show(results, sys.stdout)
    try:
        if kept := keep_last_good(results, out_dir):
            note(f"a run failed; the last report without failures is now in {kept}")
        with telling("drawing the report"):
            written = write_report(results, out_dir)
    finally:
        if json_file is not None:
            write_json(json_file, results_json(results))
    here = Path.cwd()
    for path in written:
        if path.suffix in (".html", ".json"):
            note(f"wrote {path.relative_to(here) if path.is_relative_to(here) else path}")


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
