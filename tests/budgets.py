"""What every method's exchange of one bucket costs a GPU, and an update method's step: counted on the pretended device.

Printed as measured, in the form of the table of ceilings in tests/gpu/test_budgets.py: `python tests/budgets.py [method ...]`.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, as in tests/conftest.py

import torch
from counting import Costs, Tally, counting
from presets import ADAM, Preset, sgd
from pretend import DEVICE, working_on
from same import Same
from torch import Tensor, nn

from commopt.optim.update import UpdateMethod
from commopt.wire.bucket import Bucket

SMALL, LARGE = 64, 128  # widths of a GPT block: 49,984 and 198,272 elements
FEW, MANY = 4, 32  # ranks
# the last is counted: warm-ups are over, tables have been made, and it ends an interval of local steps
STEPS, WITHOUT_WARM_UP = 4, 2


class Network(Same):
    """Such a group; what its network would do is not counted."""

    def __init__(self, size: int, tally: Tally) -> None:
        super().__init__(size)
        self.tally = tally

    def all_reduce(self, x: Tensor) -> None:
        with self.tally.paused():
            super().all_reduce(x)

    def _gather(self, own: Tensor) -> Tensor:
        with self.tally.paused():
            return super()._gather(own)

    def _exchange(self, *arguments: Any) -> Tensor:
        with self.tally.paused():
            return super()._exchange(*arguments)


LOCAL_STEPS = {"var_freeze_step": 1, "local_step_scaler": 1, "local_step_clipper": 2}
PRESETS = {  # with the densities, ranks and so on that they have unless told otherwise, and as short a warm-up as there is
    "dense": Preset("dense"),
    "fp16": Preset("fp16"),
    "ef_sign": Preset("ef_sign"),
    "ef_sign l2": Preset("ef_sign", {"scale": "l2"}),
    "two_way int8": Preset("two_way", {"worker": "int8"}),
    "two_way 4bit": Preset("two_way", {"worker": "4bit"}),
    "two_way fp8": Preset("two_way", {"worker": "fp8"}),
    "loco": Preset("loco"),
    "natural": Preset("natural"),
    "terngrad": Preset("terngrad"),
    "signum": Preset("signum", {}, sgd(0.003)),
    "distributed_lion": Preset("distributed_lion", {}, {"name": "lion", "lr": 0.003}),
    "onebit_adam": Preset("onebit_adam", {"freeze_step": 1}, ADAM),
    "onebit_lamb": Preset("onebit_lamb", {"freeze_step": 1}, {"name": "lamb", "lr": 0.01}),
    "zero_one_adam": Preset("zero_one_adam", LOCAL_STEPS, ADAM),
    "qsgd": Preset("qsgd"),
    "ef": Preset("ef"),
    "ef21": Preset("ef21", {}, sgd(0.3)),
    "dice_sgd": Preset("dice_sgd", {"noise_multiplier": 1e-3, "noise_seed": 1}),
    "random_k": Preset("random_k"),
    "top_k": Preset("top_k"),
    "threshold": Preset("threshold", {"threshold": 2.5}),
    "dgc": Preset("dgc", {"warmup_steps": 0}, sgd(0.05)),
    "powersgd": Preset("powersgd"),
    "demo": Preset("demo", {}, sgd(0.003)),
    "auto": Preset("auto"),
}


def block(width: int) -> nn.Module:
    """The layers of a GPT block: 12 parameters."""
    attention = [nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)]
    return nn.Sequential(*attention, nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width))


class Counted(NamedTuple):
    """What a step of one bucket costs. step: of the optimizer, for update methods. by_name: launches of the exchange."""

    exchange: Costs
    step: Costs
    by_name: Counter[str]


def count(preset: Preset, width: int, ranks: int, *, blocks: int = 1, runs_kernels: bool = False) -> Counted:
    """Count the exchange of the gradients of some blocks as one bucket, and the step."""
    with working_on(DEVICE), counting(runs_kernels=runs_kernels) as tally, tally.paused():
        model = nn.Sequential(*(block(width) for _ in range(blocks))).to(DEVICE)
        run: Any = preset.attach(model, Network(ranks, tally))
        n = sum(p.numel() for p in model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for step in range(0 if run.method.warmup_steps else STEPS - WITHOUT_WARM_UP, STEPS):
            generator = torch.Generator().manual_seed(step)
            grads = [(name, torch.randn(p.numel(), generator=generator)) for name, p in model.named_parameters()]
            bucket = Bucket.of([(name, x.to(DEVICE)) for name, x in grads])
            tally.clear()
            tally.is_paused = step < STEPS - 1
            run.exchange([bucket])
            assert bucket.void is None
            exchange, by_name = tally.costs(n), tally.by_name
            tally.clear()
            run.optimizer.step()
        is_update = isinstance(run.method, UpdateMethod)
        return Counted(exchange, tally.costs(n) if is_update else Costs(0, 0.0, 0, 0.0), by_name)


def most(*costs: Costs) -> Costs:
    """The most in each column."""
    return Costs(*map(max, zip(*costs, strict=True)))


class Budget(NamedTuple):
    """A row of the table: the most of both sizes with FEW ranks, and with MANY. many: launches, None for no more than with FEW."""

    launches: int
    many: int | None
    passes: float
    many_passes: float
    syncs: int
    copied: float
    step_launches: int
    step_passes: float
    step_syncs: int

    @classmethod
    def measured(cls, preset: Preset) -> Budget:
        small, large, many = (count(preset, *case) for case in ((SMALL, FEW), (LARGE, FEW), (LARGE, MANY)))
        few, all_ = most(small.exchange, large.exchange), most(small.exchange, large.exchange, many.exchange)
        step, launches = most(small.step, large.step, many.step), many.exchange.launches
        grown = launches if launches > large.exchange.launches else None
        passes = (
            round(few.passes, 1),
            round(many.exchange.passes, 1),
        )
        return cls(
            few.launches,
            grown,
            *passes,
            all_.syncs,
            round(all_.copied, 2),
            step.launches,
            round(step.passes, 1),
            step.syncs,
        )

    @classmethod
    def read(cls, words: list[str]) -> Budget:
        return cls(*(None if word == "same" else float(word) for word in words))  # type: ignore[arg-type]

    def beyond(self, ceiling: Budget) -> list[str]:
        """The columns in which this is more than the ceiling."""
        pairs = zip(self._fields, self, ceiling, strict=True)
        return [name for name, own, most in pairs if own is not None and (most is None or own > most)]

    def __str__(self) -> str:
        many = "same" if self.many is None else f"{self.many:.0f}"
        launches, passes = f"{self.launches:8.0f}{many:>8}", f"{self.passes:9.1f}{self.many_passes:8.1f}"
        step = f"{self.step_launches:11.0f}{self.step_passes:8.1f}{self.step_syncs:7.0f}"
        return f"{launches}{passes}{self.syncs:8.0f}{self.copied:8.2f}{step}"


def main(names: list[str]) -> None:
    """Print the rows of these methods as measured, or of all."""
    sys.path.append(str(Path(__file__).with_name("gpu")))
    from test_budgets import HEAD, TARGETS

    torch.set_num_threads(1)
    print(HEAD)
    for name in names or PRESETS:
        print(f"{name:16}{Budget.measured(PRESETS[name])}{TARGETS[name]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
