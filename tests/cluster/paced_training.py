"""A training small enough for a test, whose steps take 25 ms or more: a program for `commopt run`, with an outer method."""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor, nn

import commopt
from commopt.groups import connect
from commopt.optim import make_optimizer


def loss_of(model: nn.Module, target: Tensor, batch: int, data: torch.Generator) -> Tensor:
    """The mean square error of noisy answers: no model gets far below 1."""
    x = torch.randn(batch, 16, generator=data)
    error: Tensor = model(x) - (x @ target).tanh() - torch.randn(batch, 4, generator=data)
    return error.square().mean()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    group = connect()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    optimizer = make_optimizer(args.optimizer, model.parameters())
    data, target = torch.Generator(), torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    method = commopt.build(args.method, **args.options)
    wrapped = commopt.wrap(model, method)
    with commopt.attach(wrapped, method, optimizer, group=group) as run:
        for step in run.range(args.steps):
            data.manual_seed(run.rank * 100_003 + step)
            loss = loss_of(wrapped, target, 8, data)
            run.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            run.optimizer.step()
            time.sleep(0.025)
            run.log(loss=loss.item(), tokens=8)
        run.finish()
        with torch.no_grad():
            loss = loss_of(model, target, 512, data.manual_seed(7))
        run.log(validation_loss=loss.item(), tokens=512)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--method")
    parser.add_argument("--backend")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--options", type=json.loads)
    parser.add_argument("--optimizer", type=json.loads, default={"name": "adam", "lr": 0.01})
    main(parser.parse_args())
