"""The bytes that every method sends, against formulas that stand here and nowhere else in the code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from presets import ADAM, Preset, sgd

from commopt import attach
from commopt.groups import Group, SimWorld
from commopt.methods import METHODS

SIDE, STEPS = 512, 2  # one matrix of 2^18 elements


def ring(nbytes: float) -> Callable[[int], float]:
    """A ring all-reduce of so many bytes per parameter."""
    return lambda n: 2 * (n - 1) / n * nbytes


def two_way(up: float, down: float) -> Callable[[int], float]:
    """All-to-all up, all-gather of the owners' answers down."""
    return lambda n: (n - 1) / n * (up + down)


def gather(nbytes: float) -> Callable[[int], float]:
    return lambda n: (n - 1) * nbytes


def entry(density: float, value_bytes: float) -> float:
    """One entry of a sparse message: the value, and Elias-Fano's place at about 2 + log2(1/density) bits."""
    low = math.floor(math.log2(1 / density))
    bits = min(width + 1 + (1 / density - 1) / 2**width for width in range(low + 2))
    return density * (value_bytes + float(bits) / 8)


LION = {"name": "lion"}
SIGN, INT8, FOUR_BITS = 1 / 8 + 4 / 2048, 1 + 4 / 256, 1 / 2 + 4 / 256
FORMULAS: list[tuple[Preset, Callable[[int], float]]] = [
    (Preset("dense"), ring(4)),
    (Preset("fp16"), ring(2)),
    (Preset("ef_sign"), ring(SIGN)),
    (Preset("ef_sign", {"scale": "l2"}), ring(1 / 8)),
    (Preset("ef_sign", {"scale": "model", "prescale": True}), ring(1 / 8)),
    (Preset("two_way"), ring(INT8)),
    (Preset("two_way(4bit)"), ring(FOUR_BITS)),
    (Preset("two_way(sign, int8)"), two_way(SIGN, 1 + 4 / 2048)),
    (Preset("two_way(fp8)"), ring(INT8)),
    (Preset("loco"), ring(FOUR_BITS)),
    (Preset("ef"), gather(SIGN)),
    (Preset("ef(top_k)"), gather(entry(0.01, 2))),
    (Preset("ef21", {"compressor": {"compressor": "top_k", "density": 0.05}}, sgd(0.05)), gather(entry(0.05, 2))),
    (Preset("qsgd", {"block_size": 512}), gather(1 + 4 / 512)),
    (Preset("qsgd", {"levels": 7}), gather(1 / 2 + 4 / 512)),
    (Preset("natural"), ring(1 + 4 / 2048)),
    (Preset("terngrad"), lambda n: (n - 1) / n * (2 + math.ceil(math.log2(2 * n + 1))) / 8),
    (Preset("top_k", {"density": 0.01}), gather(entry(0.01, 2))),
    (Preset("top_k", {"density": 0.1, "value_bits": 1}), gather(entry(0.1, 1 / 8))),
    (Preset("random_k", {"density": 0.01}), ring(0.01 * 4)),
    (Preset("dgc", {"density": 0.001}, sgd(0.01)), gather(entry(0.001, 2))),
    (Preset("dgc", {"density": 0.001, "value_bits": 32}, sgd(0.01)), gather(entry(0.001, 4))),
    (Preset("dgc", {"density": 1}, sgd(0.01)), ring(4)),
    (Preset("powersgd", {"rank": 4}), ring(4 * 4 * (SIDE + SIDE) / (SIDE * SIDE))),
    (Preset("onebit_adam", {"freeze_step": 2}, ADAM), ring(SIGN)),
    (Preset("onebit_lamb", {"freeze_step": 2}, {"name": "lamb"}), ring(SIGN)),
    (Preset("distributed_lion", {"vote": "majority"}, LION), ring(1 / 8)),
    (
        Preset("distributed_lion", {"vote": "average"}, LION),
        lambda n: two_way(1 / 8, math.ceil(math.log2(n + 1)) / 8)(n),
    ),
    (Preset("signum", {}, sgd(0.01)), ring(1 / 8)),
    (Preset("onebit_lamb", {"freeze_step": 2, "scale": "model", "prescale": True}, {"name": "lamb"}), ring(1 / 8)),
    (Preset("ef21", {"server": "int8"}, sgd(0.05)), two_way(SIGN, 1 + 4 / 2048)),
    (Preset("dice_sgd", {"noise_seed": 1}), ring(4)),
    (Preset("demo", {}, sgd(0.003)), gather(100 / 4096)),
    (Preset("demo", {"value_bits": 32}, sgd(0.003)), gather(164 / 4096)),
    (Preset("demo", {"chunk": 32, "top_k": 8}, sgd(0.003)), gather(25 / 1024)),
]


def measured(preset: Preset, ranks: int) -> tuple[float, float]:
    """Bytes per parameter and step after the warm-up, the mean over ranks; and by the method's own formula."""

    def work(group: Group) -> tuple[float, float]:
        model = torch.nn.Linear(SIDE, SIDE, bias=False)
        torch.nn.init.zeros_(model.weight)
        run = attach(model, preset.method(), preset.optimizer(model), group=group)
        method: Any = run.method
        noise = torch.Generator().manual_seed(group.rank)
        sent: list[float] = []
        while len(sent) <= STEPS:
            if method.is_steady:
                sent.append(group.traffic.payload_bytes)
            model.weight.grad = torch.randn(SIDE, SIDE, generator=noise)
            run.optimizer.step()
        return (sent[-1] - sent[0]) / STEPS / SIDE**2, method.bytes_per_parameter(ranks)

    per_rank = SimWorld[Any](ranks).run(work)
    return sum(sent for sent, _ in per_rank) / ranks, per_rank[0][1]


@pytest.mark.parametrize(("preset", "formula"), FORMULAS, ids=[str(preset) for preset, _ in FORMULAS])
def test_payload_is_the_formulas(preset: Preset, formula: Callable[[int], float]) -> None:
    for ranks in (2, 5):
        sent, own_word = measured(preset, ranks)
        assert sent == pytest.approx(formula(ranks), rel=0.02), f"{ranks} ranks"
        if not preset.name.startswith("powersgd"):  # whose formula depends on the shape
            assert own_word == pytest.approx(formula(ranks), rel=0.02), f"{ranks} ranks"


def test_signs_by_gather_cost_as_much_as_dense_at_64_ranks_and_by_two_phases_a_32nd() -> None:
    dense, gathered, signs = (Preset(name).method() for name in ("dense", "ef", "ef_sign"))
    assert gathered.bytes_per_parameter(64) == pytest.approx(dense.bytes_per_parameter(64), rel=0.03)
    assert signs.bytes_per_parameter(64) == pytest.approx(dense.bytes_per_parameter(64) / 32, rel=0.03)


def test_no_method_is_left_out() -> None:
    """threshold sends what reaches it, auto what it has chosen; zero_one_adam is measured in its own tests."""
    tested = {preset.name.partition("(")[0] for preset, _ in FORMULAS}
    every_step = {name for name, method in METHODS.items() if method.kind != "outer"}
    assert tested | {"threshold", "auto", "zero_one_adam"} == every_step
