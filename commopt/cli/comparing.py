"""`commopt run`, `compare` and `demo`: train, and write a report."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import commopt
from commopt.choice import is_file
from commopt.cli.app import (
    EmulateAnnotated,
    JsonAnnotated,
    NodeAnnotated,
    PrintAnnotated,
    app,
    check_program,
    emulated,
    names_in,
    print_commands,
    write_json,
)
from commopt.cli.notes import note, telling
from commopt.cli.usage import Command
from commopt.cluster.machine import Emulate
from commopt.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from commopt.cluster.spec import RunSpec
    from commopt.report.document import Results

COMPARED_STEPS = 100  # of a program under each method

OutAnnotated = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where results go; out/NAME by default.")
]
MethodsAnnotated = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME,...", help="Which methods, in this order; all of a run's file by default."),
]
BoardAnnotated = Annotated[
    Path | None,
    typer.Option("--tensorboard", metavar="DIR", help="Write loss, times and bytes to TensorBoard while it trains."),
]
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
