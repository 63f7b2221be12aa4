"""Exchanges on a GPU, between three ranks, of parameters that take several blocks and several pieces: as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from presets import ADAM, Preset, sgd
from pretend import DEVICES, working_on
from torch import Tensor, nn

from commopt.groups import SimGroup, SimWorld
from commopt.wire.bucket import Bucket

NUMELS = {"a": 5000, "b": 3, "c": 3998}
CASES = {
    "terngrad": Preset("terngrad", {"dense": ["b"]}),
    "terngrad without a clamp": Preset("terngrad", {"clip": 0}),
    "ef21": Preset("ef21", {"compressor": "int8"}, sgd(0.3)),
    "ef21 both ways": Preset("ef21", {"compressor": "int8", "server": "4bit"}, sgd(0.3)),
    "ef21 of top_k": Preset("ef21", {"compressor": "top_k", "dense_1d": True}, sgd(0.3)),
    "loco": Preset("loco", {"reset_every": 2}),
    "onebit_adam": Preset("onebit_adam", {"freeze_step": 1}, ADAM),
    "onebit_adam in 16 bits": Preset("onebit_adam", {"freeze_step": 1, "residual_bits": 16}, ADAM),
    "zero_one_adam": Preset("zero_one_adam", {"var_freeze_step": 1, "local_step_clipper": 1}, ADAM),
    "two_way fp16": Preset("two_way", {"worker": "fp16", "residual_bits": 16}),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, n in NUMELS.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(n if name == "b" else (n // 2, 2))))


def exchanged(preset: Preset, device: torch.device) -> list[Tensor]:
    """The buckets of rank 0 and the momentum, if it has any, after each of four exchanges, of which the third is void."""

    def rank_of(group: SimGroup) -> list[Tensor]:
        found = []
        with working_on(device):
            model = Model().to(device)
            run: Any = preset.attach(model, group)
            for step in range(4):
                generator = torch.Generator().manual_seed(10 * step + group.rank)
                grads = {name: torch.randn(n, generator=generator) for name, n in NUMELS.items()}
                if (step, group.rank) == (2, 1):
                    grads["c"][7] = float("inf")
                bucket = Bucket.of([(name, grads[name].to(device)) for name in ("c", "a", "b")])
                run.exchange([bucket])
                assert bucket.void == ("c" if step == 2 else None)
                for p in model.parameters():
                    p.grad = torch.zeros_like(p)
                run.optimizer.step()
                kept = [x.cpu().clone() for key, x in run.method.state.items() if key == "momentum"]
                found += kept if step == 2 else [bucket.flat.cpu(), *kept]
        return found

    ranks = SimWorld[list[Tensor]](3, timeout_s=60).run(rank_of)
    assert all(torch.equal(one, other) for one, other in zip(ranks[0], ranks[2], strict=True)), "replicas differ"
    return ranks[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_buckets_are_those_of_the_cpu(case: str, device: torch.device) -> None:
    expected, found = (exchanged(CASES[case], place) for place in (torch.device("cpu"), device))
    for one, other in zip(expected, found, strict=True):
        assert float((one.abs() > 0).float().mean()) > 0.2
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
