"""What a script may do around an attached model, and what it is told when it may not."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from pool import Pool
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.errors import AttachError, GradientsChanged
from commopt.groups import SimGroup, SimWorld, TorchGroup


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def backward(model: nn.Module, seed: int = 0) -> None:
    model(torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def test_an_attached_model_can_be_copied_and_saved() -> None:
    model = model_of()
    attach(model, "dense", torch.optim.SGD(model.parameters(), lr=0.1))
    copied = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    attach(copied, "dense", torch.optim.SGD(copied.parameters(), lr=0.1))


def test_one_optimizer_must_hold_every_parameter() -> None:
    model = model_of()
    with pytest.raises(AttachError, match=r"does not hold the trainable parameter 2\.weight"):
        attach(model, "dense", torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_a_method_serves_one_model() -> None:
    method = build("ef_sign")
    for seed in (0, 1):
        model = model_of(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if seed == 0:
            attach(model, method, optimizer)
        else:
            with pytest.raises(AttachError, match="build another one"):
                attach(model, method, optimizer)


def test_a_gradient_that_is_replaced_is_seen() -> None:
    model = model_of()
    run: Any = attach(model, "onebit_adam", torch.optim.Adam(model.parameters()))
    backward(model)
    run.exchange_gradients()
    weight = model.get_parameter("0.weight")
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(GradientsChanged, match=r"0\.weight: the gradient was changed"):
        run.optimizer.step()


def test_a_parameter_that_is_unfrozen_later_is_refused() -> None:
    model = model_of()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, "dense", optimizer)
    model[0].bias.requires_grad_(True)
    backward(model)
    with pytest.raises(AttachError, match="frozen at attach"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(3, 3), (2, 7, 5), (7,)])
def test_a_mask_of_another_shape_is_refused_at_attach(shape: tuple[int, ...]) -> None:
    model = model_of()
    method = build("onebit_adam", momentum_mask={"0.weight": torch.ones(shape)})
    with pytest.raises(AttachError, match=r"is of shape \(7, 5\)"):
        attach(model, method, torch.optim.Adam(model.parameters()))


def skipped_step(group: SimGroup, models: list[nn.Sequential]) -> Tensor:
    model = models[group.rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run: Any = attach(model, "dense", optimizer, group=group)
    backward(model, seed=group.rank)
    run.exchange_gradients()  # and no step: a loss that was not to be trusted
    optimizer.zero_grad()
    backward(model, seed=10 + group.rank)
    optimizer.step()
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def test_a_skipped_step_leaves_no_gradient_unexchanged() -> None:
    models = [model_of() for _ in range(2)]
    one, other = SimWorld[Tensor](2).run(lambda group: skipped_step(group, models))
    assert torch.equal(one, other)


def small_gradient(pg: Any) -> float:
    model = model_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    wrapped = DistributedDataParallel(model, process_group=pg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = attach(wrapped, "fp16", optimizer, group=TorchGroup(pg), grad_scaler=scaler)
    loss = wrapped(torch.ones(1, 5)).sum() * 1e-8
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad = model.get_parameter("2.bias").grad
    assert grad is not None
    gradient = float(grad[0])
    run.close()
    return gradient


def test_loss_scaling_keeps_small_gradients_in_half_precision(pool: Pool) -> None:
    assert pool.run(2, small_gradient) == [pytest.approx(1e-8, rel=1e-2)] * 2


def own_traffic(pg: Any) -> dict[str, float]:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    wrapped = DistributedDataParallel(model, process_group=pg, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AttachError, match="DDP's own process group"):
        attach(wrapped, "ef_sign", optimizer, group=TorchGroup(pg))
    run = attach(wrapped, "ef_sign", optimizer, group=TorchGroup(pg), overlap=False)
    for _ in range(3):
        wrapped(torch.randn(4, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = run.traffic.as_dict()["by_operation"]
    run.close()
    return {row["bucket"]: row["bytes"] for row in rows if row["bucket"].startswith("DDP")}


def test_what_ddp_itself_sends_is_counted(pool: Pool) -> None:
    buffers, used = 3 * (2 * 6 * 4 + 8), 3 * 7 * 4
    assert pool.run(2, own_traffic) == [
        {"DDP's buffers": buffers, "DDP's unused parameters": used},
        {"DDP's buffers": 0, "DDP's unused parameters": used},
    ]
