"""`commopt advise`: what to expect of each method, before anything is rented."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from commopt.cli.app import JsonAnnotated, app, names_in, write_json
from commopt.cli.notes import note
from commopt.cli.usage import Command
from commopt.errors import ConfigError, did_you_mean
from commopt.plan.links import parse_delay
from commopt.record.words import rate_text

if TYPE_CHECKING:
    from commopt.cluster.spec import ClusterSpec
    from commopt.plan.probe import Probe
    from commopt.plan.profile import Profile

_COUNT = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_COPY_BYTES_PER_S = {"cpu": 5e9, "gpu": 8e11}
_CORES = 1.0  # of a rank on a CPU
_UNLISTED = ("dice_sgd",)  # which is for privacy


class Device(str, Enum):
    """What computes."""

    CPU = "cpu"
    GPU = "gpu"


class Optimizer(str, Enum):
    """The family of the user's optimizer."""

    ADAM = "adam"
    SGD = "sgd"
    LION = "lion"
    LAMB = "lamb"


@app.command(
    cls=Command,
    epilog="Examples: [bold]commopt advise lab.yaml --parameters 1.1e9 --step 0.8s[/bold]\n\n"
    "[bold]commopt advise lab.yaml --probe probe.json --target 0.9 --out advice[/bold]",
)
def advise(
    cluster: Annotated[Path, typer.Argument(metavar="CLUSTER.yaml", help="The nodes and their links.")],
    parameters: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Trainable parameters, as in 1.1e9 or 124M.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FILE.py:FUNCTION", help="A function that builds the model, to count them.")
    ] = None,
    step: Annotated[
        str | None, typer.Option(metavar="TIME", help="An optimizer step without communication, as in 0.8s.")
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option(metavar="NUMBER", help="In place of --step: FLOP/s that a rank reaches; needs --tokens."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="NUMBER", help="Tokens of a rank's step, for --flops.")] = None,
    probe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What commopt probe measured, in place of assumptions.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,NAME,...", help="Compare only these methods; all by default.")
    ] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="Your optimizer's family.")] = Optimizer.ADAM,
    device: Annotated[Device | None, typer.Option(help="What computes; gpu if the backend is nccl.")] = None,
    target: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Also show which link each method needs for this share of computation."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a page, a picture and JSON there.")] = None,
    json_file: JsonAnnotated = None,
) -> None:
    """Predict a step under every method, and recommend one, or no change.

    Without a probe, transports and codecs are assumed; every assumption is printed.
    """
    from commopt.advise import page
    from commopt.advise.advice import Cluster, advise, assumed_settings, to_json
    from commopt.advise.measured import at_rate, profiles_in, settings_of
    from commopt.cluster.spec import load_cluster
    from commopt.plan.model import Setting, ddp_buckets
    from commopt.plan.probe import read_probe

    spec = load_cluster(cluster)
    measured = None if probe is None else read_probe(probe)
    if measured is not None and (changed := _changed(spec, measured)):
        raise ConfigError(f"{probe}: {changed}; measure again: commopt probe {cluster}")
    if target is not None and not 0 < target < 1:
        raise ConfigError(f"--target {target}: write a share above 0 and below 1, as in 0.9")
    script = None if measured is None else measured.script
    count = _parameters(parameters, model, None if script is None else script.parameters)
    compute_s, computed = _compute_s(step, flops, tokens, count, None if script is None else script.compute_s)
    kind = device or (Device.GPU if spec.backend == "nccl" else Device.CPU)
    on = Cluster(spec.name, spec.link_model(), spec.slots, kind is Device.GPU)
    if not any(map(math.isfinite, on.links.bytes_per_s + on.links.between_bytes_per_s)) and measured is None:
        raise ConfigError(f"{cluster}: links.rate: is missing; write the links' rate, as in 'rate: 1gbit'")
    buckets, assumptions, rated = ddp_buckets(count), computed, None
    profiles, named = _profiles(methods)
    if measured is not None:
        if script is not None and script.parameters == count:
            buckets, profiles = tuple(script.buckets), profiles_in(measured, profiles)
        settings = settings_of(measured, compute_s, buckets, overlap=script is None or script.overlap)
        rated = at_rate(measured, settings["likely"])
    else:
        base = Setting(
            len(spec.nodes),
            spec.slots,
            compute_s,
            buckets,
            copy_bytes_per_s=_COPY_BYTES_PER_S[kind.value],
            cores_per_rank=_CORES if kind is Device.CPU else None,
            spread=0.02,
        )
        settings = assumed_settings(on, base)
        assumptions = [*assumptions, *_assumed(kind, on.bytes_per_s)]
    found = advise(
        on,
        profiles,
        settings,
        optimizer=optimizer.value,
        named=named,
        target=target,
        at_rate=rated,
        assumptions=assumptions,
    )
    page.show(found, sys.stdout)
    if json_file is not None:
        write_json(json_file, json.dumps(to_json(found), indent=1) + "\n")
    if out is not None:
        paths = page.write(found, out)
        note(f"wrote {', '.join(map(str, paths))}")


def _changed(spec: ClusterSpec, probe: Probe) -> str:
    """What of the cluster is not as it was when it was measured: its nodes, or a link's rate; empty if nothing."""
    both = ((probe.nodes, probe.slots), (spec.names, spec.slots))
    then, now = (f"{', '.join(nodes):.60} with {slots} ranks each" for nodes, slots in both)
    if then != now:
        return f"was measured on {then}, and the cluster has {now}"
    for name, rate in zip(spec.names, spec.link_model().bytes_per_s, strict=True):
        before = probe.rates.get(name) or math.inf
        if rate != before:
            return f"the link of {name} was {rate_text(before)} when it was measured, and is {rate_text(rate)} now"
    return ""


def _number(option: str, text: str) -> float:
    """A positive number, such as 1.1e9 or 124M. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kmbt]?)\s*", text.lower().replace("_", ""))
    value = float(match[1]) * _COUNT[match[2]] if match else 0.0
    if not 0 < value < 1e24:
        raise ConfigError(f"{option} {text!r:.60}: is not a positive number; write one, as in 1.1e9 or 124M")
    return value


def _parameters(text: str | None, model: str | None, measured: int | None) -> int:
    if text is not None and model is not None:
        raise ConfigError(f"--parameters {text}: has no effect with --model; leave one of them out")
    if text is not None:
        value = round(_number("--parameters", text))
        if value < 1:
            raise ConfigError(f"--parameters {text}: is less than one; write how many the model has, as in 124M")
        return value
    if model is not None:
        return _count(model)
    if measured is not None:
        return measured
    raise ConfigError(
        "--parameters: is missing; write how many the model has, as in --parameters 1.1e9, or --model FILE.py:FUNCTION"
    )


def _count(model: str) -> int:
    """How many trainable parameters the model has that a function of the user's builds. Raises ConfigError."""
    import importlib.util

    file, _, function = model.rpartition(":")
    if not file or not function.isidentifier():
        raise ConfigError(f"--model {model}: write a file and a function, as in train.py:build_model")
    if not Path(file).is_file():
        raise ConfigError(f"--model {model}: {file}: no such file")
    spec = importlib.util.spec_from_file_location("commopt_model", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--model {model}: {file} is not a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    sys.path.insert(0, str(Path(file).resolve().parent))
    try:
        spec.loader.exec_module(module)
        build: Any = getattr(module, function, None)
        if not callable(build):
            names = [name for name, value in vars(module).items() if callable(value)]
            raise ConfigError(f"--model {model}: {file} has no function {function!r}{did_you_mean(function, names)}")
        built = build()
        count = sum(p.numel() for p in built.parameters() if p.requires_grad)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        said = str(error).strip().splitlines()
        raise ConfigError(f"--model {model}: {type(error).__name__}{f': {said[0]:.200}' if said else ''}") from None
    if not count:
        raise ConfigError(f"--model {model}: the model has no trainable parameters")
    return int(count)


def _compute_s(
    step: str | None, flops: str | None, tokens: str | None, parameters: int, measured: float | None
) -> tuple[float, list[str]]:
    """Seconds that a step computes, and what was assumed of it."""
    if step is not None and flops is not None:
        raise ConfigError(f"--step {step}: has no effect with --flops; leave one of them out")
    if tokens is not None and flops is None:
        raise ConfigError("--tokens: has no effect without --flops; leave it out")
    if step is not None:
        try:
            seconds = parse_delay(step)
        except ConfigError:
            raise ConfigError(
                f"--step {step!r:.60}: is not a time; write a positive number and us, ms or s, as in 0.8s"
            ) from None
        if not 0 < seconds < 1e6:
            raise ConfigError(f"--step {step}: is out of range; write how long a step computes, as in 0.8s")
        return seconds, []
    if flops is not None:
        if tokens is None:
            raise ConfigError(
                "--tokens: is missing; write how many tokens a rank's step has, as in --flops 2e14 --tokens 16384"
            )
        seconds = 6 * parameters * _number("--tokens", tokens) / _number("--flops", flops)
        return seconds, [f"a step computes 6 x parameters x tokens: {seconds:.3g} s"]
    if measured is not None:
        return measured, []
    raise ConfigError(
        "--step: is missing; write how long a step takes without communication, as in --step 0.8s, or --flops and --tokens, or --probe "
        "FILE of a probe that ran your script"
    )


def _profiles(methods: str | None) -> tuple[list[Profile], list[str] | None]:
    """The methods' profiles, dense among them, and the names of which one may be named; None for the usual ones."""
    from commopt.plan.profile import profiles

    known = profiles()
    if methods is None:
        return [profile for name, profile in known.items() if name not in _UNLISTED], None
    names = names_in(methods.replace(" ", ""))
    found = [known[name] if name in known else _built(name, known) for name in names]
    if "dense" not in names:
        found.insert(0, known["dense"])
    return found, [name for name in names if name != "dense"]


def _built(name: str, known: Iterable[str]) -> Profile:
    """The profile of a method that is not in the table, such as dgc with options in a file; this needs torch."""
    base = name.partition("(")[0]
    if base not in known and base != "threshold" and not name.endswith((".yaml", ".yml", ".json")):
        raise ConfigError(f"--methods: unknown method {name!r:.80}{did_you_mean(name, known)}")
    from commopt.advise.profiling import profile_of
    from commopt.methods import build

    return profile_of(build(name), name)


def _assumed(kind: Device, bytes_per_s: float) -> Sequence[str]:
    """What is not known without a probe, in sentences."""
    from commopt.plan.transport import BEST, LIKELY, WORST

    shares = [f"{one.share(bytes_per_s):.0%}" for one in (LIKELY, WORST, BEST)]
    copy = f"{_COPY_BYTES_PER_S[kind.value] / 1e9:g} GB/s"
    where = (
        "a GPU, beside which codecs run"
        if kind is Device.GPU
        else "one CPU core per rank, which codecs share with the training"
    )
    return [
        f"exchanges fill {shares[0]} of a link ({shares[1]} to {shares[2]})",
        f"{where}; it copies {copy}, and a codec takes as many copies as on a CPU (docs/steps.md)",
        *(
            [f"a machine's ranks send each other {LIKELY.inside_gpu_bytes_per_s / 1e9:g} GB/s, as over PCIe"]
            if kind is Device.GPU
            else []
        ),
        "backward takes two thirds of a step, in buckets of 25 MiB; step times of ranks differ by 2 %",
    ]
