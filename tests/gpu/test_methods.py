"""Every method with its model on a GPU, between simulated ranks: it trains as on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from presets import PRESETS, Preset, sgd
from pretend import DEVICES, working_on
from rig import flat, loss_of, make_batch, make_model
from torch import Tensor

from commopt import attach, build, kernels
from commopt.groups import SimGroup, SimWorld
from commopt.methods import METHODS

CPU = torch.device("cpu")
pytestmark = pytest.mark.parametrize("device", DEVICES)
RANKS, STEPS = 2, 7
RESUMES = 2  # after so many steps, or one after the warm-up: then two more
MORE = {  # forms of state, and paths of the exchange, that no preset has
    "ef21 both ways": Preset("ef21", {"server": "sign", "refresh_every": 3}, sgd(0.3)),
    "ef21 without an average": Preset("ef21", {"compressor": "int8", "server": "4bit", "eta": 1, "dense_1d": True}),
    "loco in 16 bits": Preset("loco", {"residual_bits": 16, "reset_every": 3}),
    "ef_sign in 8 bits": Preset("ef_sign", {"residual_bits": 8, "residual_decay": 0.9}),
    "ef of ternary in 8 bits": Preset("ef", {"compressor": "ternary", "residual_bits": 8, "reset_every": 2}),
    "ef of fp16": Preset("ef", {"compressor": "fp16", "dense_1d": True}),
    "two_way of bf16": Preset("two_way", {"worker": "bf16", "server": "int8"}),
}


def on_cpu(state: Any) -> Any:
    """A state as `torch.load(map_location="cpu")` returns it."""
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return state.cpu() if isinstance(state, Tensor) else copy.deepcopy(state)


Trained = tuple[Tensor, list[float], dict[int, str]]


def train(preset: Preset, device: torch.device, resumes: bool = False) -> list[Trained]:
    """Some steps, with a NaN on rank 1 in the second one: the parameters after the last step that left all ranks with the same, the
    losses, and what was void."""

    method: Any = preset.method()
    last = max(RESUMES, method.warmup_steps + 1)

    def rank_of(group: SimGroup) -> Trained:
        losses, voided = list[float](), dict[int, str]()
        with working_on(device):
            model = make_model().to(device)
            run: Any = attach(model, preset.method(), preset.optimizer(model), group=group)
            shared = flat(model)
            for step in range(last + 2):
                if resumes and step == last:
                    state, optimizer = run.method.saved(), run.optimizer.state_dict()
                    run.close()
                    run = attach(model, preset.method(), preset.optimizer(model), group=group)
                    run.optimizer.load_state_dict(optimizer)
                    run.method.load(on_cpu(state))
                x, y = (t.to(device) for t in make_batch(group.rank, step))
                loss = loss_of(model(x), y)
                run.optimizer.zero_grad()
                loss.backward()
                if (step, group.rank) == (1, 1):
                    grad = next(model.parameters()).grad
                    assert grad is not None
                    grad[2, 3] = float("nan")
                run.optimizer.step()
                voided |= dict(run.voided)
                losses.append(loss.item())
                if run.method.is_synchronised:
                    shared = flat(model)
            assert shared.device.type == device.type
            return shared.cpu(), losses, voided

    return SimWorld[Trained](RANKS, timeout_s=60).run(rank_of)


@pytest.mark.parametrize("preset", [*PRESETS, *MORE.values()], ids=[*(preset.name for preset in PRESETS), *MORE])
def test_a_method_trains_survives_a_nan_and_resumes_as_on_the_cpu(preset: Preset, device: torch.device) -> None:
    (shared, losses, _), (other, _, voided) = train(preset, device, resumes=True)
    expected, expected_losses, _ = train(preset, CPU)[0]
    assert torch.equal(shared, other), "replicas differ"
    # a sum in another order may turn a sign or a vote that was close to zero, of few elements
    assert float(((shared - expected).abs() > 1e-4).float().mean()) < 0.02
    assert losses == pytest.approx(expected_losses, rel=0.02)
    assert voided == {1: "0.weight"}


@pytest.mark.parametrize("name", ["ef_sign", "two_way", "signum", "onebit_adam"])
def test_without_triton_tensors_go_through_the_host(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "has_triton", lambda _: False)
    monkeypatch.setattr(kernels, "of", kernels.of.__wrapped__)  # which keeps what it has found
    preset = next(one for one in PRESETS if one.name == name)
    (shared, losses, _), (other, _, voided) = train(preset, device)
    assert torch.equal(shared, other)
    assert losses == pytest.approx(train(preset, CPU)[0][1], rel=1e-3)
    assert voided == {1: "0.weight"}
    assert "pip install triton" in caplog.text


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.kind == "outer"])
def test_an_outer_method_averages_replicas_on_the_device(name: str, device: torch.device) -> None:
    options: dict[str, Any] = {} if name in ("decentralized_adam", "choco", "push_sum") else {"every": 3}

    def rank_of(group: SimGroup, place: torch.device) -> Tensor:
        with working_on(place):
            model = make_model().to(place)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            run: Any = attach(model, build(name, **options), optimizer, group=group)
            for step in run.range(STEPS):
                x, y = (t.to(place) for t in make_batch(group.rank, step))
                optimizer.zero_grad()
                loss_of(model(x), y).backward()
                optimizer.step()
            run.finish()
            return flat(model).cpu()

    ranks = SimWorld[Tensor](4, timeout_s=60).run(lambda group: rank_of(group, device))
    expected = SimWorld[Tensor](4, timeout_s=60).run(lambda group: rank_of(group, CPU))
    for one, other in zip(ranks, expected, strict=True):
        assert float(((one - other).abs() > 1e-4).float().mean()) < 0.02
