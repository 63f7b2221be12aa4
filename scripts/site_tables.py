"""The tables in docs/finetuning.md and docs/choosing.md that are computed from the code; a test compares the pages with them.

`python scripts/site_tables.py memory` prints a table.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from site_pages import significant
from torch import nn

import commopt
from commopt.advise.advice import Cluster, advise, assumed_settings
from commopt.cluster.spec import ClusterSpec
from commopt.groups import LocalGroup, SimGroup, SimWorld
from commopt.method import Method
from commopt.methods import build
from commopt.optim import Lion
from commopt.optim.update import UpdateMethod
from commopt.plan.links import parse_rate
from commopt.plan.model import Setting, ddp_buckets
from commopt.plan.profile import profiles
from commopt.record.words import times_text
from commopt.wire.bucket import ParameterIndex, Share

PARAMETERS, MACHINES, PER_MACHINE = 1e9, 4, 8
SGD, MOMENTUM, ADAMW, LION = "SGD", "SGD with momentum", "AdamW", "Lion"
OPTIMIZERS: dict[str, Any] = {
    SGD: lambda x: torch.optim.SGD(x, lr=0.1),
    MOMENTUM: lambda x: torch.optim.SGD(x, lr=0.1, momentum=0.9),
    ADAMW: torch.optim.AdamW,
    LION: lambda x: Lion(x, lr=0.1),
}
# method, its options, and an optimizer to fine-tune with
TUNED: list[tuple[str, dict[str, Any], str]] = [
    ("dense", {}, ADAMW),
    ("fp16", {}, ADAMW),
    ("two_way", {}, ADAMW),
    ("two_way", {"residual_bits": 8}, ADAMW),
    ("loco", {}, ADAMW),
    ("onebit_adam", {}, ADAMW),
    ("onebit_adam", {"residual_bits": 8}, ADAMW),
    ("zero_one_adam", {}, ADAMW),
    ("powersgd", {}, MOMENTUM),
    ("dgc", {}, SGD),
    ("distributed_lion", {}, LION),
    ("local_sgd", {}, ADAMW),
    ("diloco", {}, ADAMW),
]
# one layer of Llama 3.2 1B: (rows, columns) of its linear maps, and how many layers it has
LLAMA, LAYERS, LORA_RANK = (
    [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), *[(8192, 2048)] * 2, (2048, 8192)],
    16,
    16,
)


def state_bytes(method: Any, optimizer: str, per_machine: int = 1, machines: int = MACHINES) -> tuple[float, float]:
    """Bytes of state per parameter, of optimizer and method, on a rank of so many machines: on its GPU, and in the host's memory."""
    parameters = [nn.Parameter(torch.zeros(1024, 1024)) for _ in range(8)]
    named, numel = {f"x{k}": p for k, p in enumerate(parameters)}, sum(p.numel() for p in parameters)
    steps = OPTIMIZERS[optimizer](parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    steps.step()
    own = sum(
        x.nbytes for state in steps.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.dim()
    )
    if method.kind == "outer":
        method.bind([*named.items()], SimGroup(SimWorld[None](machines), 0).peers, copies=(0, per_machine))
        return own / numel, method.state_bytes() / numel
    group, index = LocalGroup(), ParameterIndex.of([*named.items()])
    group.size = machines
    if isinstance(method, UpdateMethod):  # its state takes the place of the optimizer's
        method.follow(steps, named)
        own = 0
    cut = lambda n: method.pieces(n, machines)  # noqa: E731
    method.bind([*named.items()], group, share=Share.cut(index, per_machine, 0, cut) if per_machine > 1 else None)
    return (own + method.state_bytes()) / numel, 0.0


def memory() -> str:
    """Memory of a full fine-tuning."""
    rows = []
    for name, options, optimizer in TUNED:
        (gpu, host), (shared, _) = (state_bytes(build(name, **options), optimizer, n) for n in (1, PER_MACHINE))
        given = "".join(f", `{key}: {value}`" for key, value in options.items())
        rows.append(
            [f"`{name}`{given}", optimizer, *map(number, (gpu, shared, host)), f"{8 + gpu:.1f}", f"{8 + shared:.1f}"]
        )
    head = [f"{what}, {n} per machine" for what in ("on a GPU", "GB") for n in (1, PER_MACHINE)]
    return table(["method", "optimizer", *head[:2], "on the host", *head[2:]], rows, left=2)


def links() -> str:
    """Seconds of sending for a full fine-tuning."""
    rates, rows = ("100mbit", "1gbit", "10gbit", "100gbit"), []
    for name in ("dense", "fp16", "two_way(int8)", "loco", "onebit_adam", "distributed_lion", "powersgd", "diloco"):
        sent = build(name).bytes_per_parameter(MACHINES) * PARAMETERS
        rows.append([f"`{name}`", significant(sent / 1e9), *(significant(sent / parse_rate(rate)) for rate in rates)])
    return table(["method", "GB per step", *map(seconds_at, rates)], rows)


def adapters() -> tuple[int, dict[str, float]]:
    """(the number of parameters in adapters of all linear maps, {method: bytes that a rank sends per parameter and step})."""
    shapes = [shape for rows, columns in LLAMA for shape in ((LORA_RANK, columns), (rows, LORA_RANK))]
    total = sum(a * b for a, b in shapes)
    blocks: list[str | dict[str, Any]] = [
        "dense",
        "fp16",
        "two_way(int8)",
        "loco",
        {"onebit_adam": {"freeze_step": 1}},
        "powersgd",
    ]
    return total * LAYERS, {build(block).name: sent_per_step(build(block), shapes) / total for block in blocks}


def sent_per_step(method: Method, shapes: Sequence[tuple[int, int]]) -> float:
    """Bytes of payload in the last of three steps, on the rank that sends most."""

    def work(group: SimGroup) -> float:
        torch.manual_seed(0)
        model = nn.ParameterList(torch.randn(shape) for shape in shapes)
        run = commopt.attach(
            model, build(method.name, **method.given), torch.optim.AdamW(model.parameters()), group=group
        )
        for _ in range(3):
            before = run.traffic.payload_bytes
            for p in model:
                p.grad = torch.randn(p.shape)
            run.optimizer.step()
        return run.traffic.payload_bytes - before

    return max(SimWorld[float](MACHINES).run(work))


def lora() -> str:
    """Seconds of sending for adapters."""
    rates, rows = ("100mbit", "1gbit", "10gbit"), []
    numel, sent = adapters()
    for name, per_parameter in sent.items():
        cells = (per_parameter * numel / parse_rate(rate) for rate in rates)
        rows.append(
            [f"`{name}`", number(per_parameter), significant(per_parameter * numel / 1e6), *map(significant, cells)]
        )
    return table(["method", "bytes per parameter", "MB per step", *map(seconds_at, rates)], rows)


def advised() -> str:
    """What the planner names, by how long dense would send for each second of computation."""
    spec = ClusterSpec.model_validate({"nodes": MACHINES, "links": {"rate": "1gbit"}})
    cluster, rows, parameters = Cluster("", spec.link_model(), 1, True), [], 124_000_000
    sending_s = profiles()["dense"].bytes_per_parameter(MACHINES) * parameters / parse_rate("1gbit")
    for r in (0.1, 0.3, 1, 3, 10, 30, 100, 300):
        base = Setting(MACHINES, 1, sending_s / r, ddp_buckets(parameters), copy_bytes_per_s=8e11, spread=0.02)
        settings, cells = assumed_settings(cluster, base), []
        for optimizer in ("adam", "sgd", "lion"):
            advice = advise(cluster, list(profiles().values()), settings, optimizer=optimizer)
            cells.append(f"`{advice.best.name}`, {times_text(advice.best.gain)}" if advice.helps else "change nothing")
        outer = next(row for row in advice.rows if row.name == "diloco")
        rows.append(
            [
                f"{r:g}",
                f"{100 * settings['likely'].compute_s / advice.dense.likely.step_s:.2g} %",
                *cells,
                times_text(outer.gain),
            ]
        )
    return table(["r", "of a dense step, computation", "Adam", "SGD", "Lion", "`diloco` every 100"], rows, left=1)


def machines() -> str:
    """Four machines of eight GPUs, against the same GPUs in a machine each."""
    rows = []
    for name in (
        "dense",
        "fp16",
        "two_way(int8)",
        "loco",
        "onebit_adam",
        "distributed_lion",
        "powersgd",
        "top_k",
        "dgc",
        "demo",
        "diloco",
    ):
        few, many = (build(name).bytes_per_parameter(n) for n in (MACHINES, MACHINES * PER_MACHINE))
        cells = (few, few / PER_MACHINE, few / parse_rate("10gbit") * PARAMETERS, many, many / few)
        rows.append([f"`{name}`", *map(significant, cells)])
    one = f"{MACHINES * PER_MACHINE} machines of 1"
    return table(
        [
            "method",
            f"per card, {MACHINES} machines of {PER_MACHINE}",
            "per GPU",
            "s at 10 Gbit/s",
            f"per card, {one}",
            "ratio",
        ],
        rows,
    )


def inside() -> str:
    """What a rank sends to the others of its machine."""

    def work(group: SimGroup, dtype: torch.dtype | None) -> float:
        model = nn.Linear(256, 256, bias=False)
        world: Any = group.by_machine(PER_MACHINE)
        world.inner_dtype = dtype
        run = commopt.attach(model, "onebit_adam", torch.optim.AdamW(model.parameters()), group=world)
        before = world.inside.traffic.payload_bytes
        model(torch.randn(4, 256)).square().mean().backward()
        run.optimizer.step()
        return float(world.inside.traffic.payload_bytes - before) / model.weight.numel()

    rows = []
    for title, dtype in (("float32", None), ("`inner_dtype=torch.bfloat16`", torch.bfloat16)):
        sent = round(max(SimWorld[float](2 * PER_MACHINE).run(lambda group: work(group, dtype))), 2)  # noqa: B023
        rows.append([title, number(sent), *(significant(sent * PARAMETERS / rate) for rate in (10e9, 25e9, 400e9))])
    return table(
        ["gradients travel inside as", "bytes per parameter", *(f"s at {rate} GB/s" for rate in (10, 25, 400))], rows
    )


def seconds_at(rate: str) -> str:
    """The head of a column of seconds, such as "s at 10 Gbit/s"."""
    return f"s at {rate[:-4]} {rate[-4].upper()}bit/s"


def number(x: float) -> str:
    """One decimal, if it needs any; two below 1."""
    return f"{round(x, 2 if x < 1 else 1):g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, whose first columns are aligned to the left."""
    rule = "|---" * left + "|--:" * (len(head) - left) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


TABLES = {"finetuning": (memory, links, lora), "choosing": (advised, machines, inside)}  # by the page that they are in

if __name__ == "__main__":
    (wanted,) = (make for tables in TABLES.values() for make in tables if make.__name__ == sys.argv[1])
    print(wanted(), end="")
