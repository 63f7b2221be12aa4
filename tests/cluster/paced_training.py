"""A training small enough for a test, whose steps take 25 ms or more: a program for `commopt run`, with an outer method."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

import torch
from torch import Tensor, nn

from commopt.frameworks import plain
from commopt.methods import with_optimizer
from commopt.record.recorder import Recorder


def loss_of(model: nn.Module, target: Tensor, batch: int, data: torch.Generator) -> Tensor:
    """The mean square error of noisy answers: no model gets far below 1."""
    x = torch.randn(batch, 16, generator=data)
    error: Tensor = model(x) - (x @ target).tanh() - torch.randn(batch, 4, generator=data)
    return error.square().mean()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    method, optimizer = with_optimizer(args.method, model, options=args.options, optimizer=args.optimizer)
    attachment = plain.attach(model, method, optimizer)
    rank, first = attachment.peers.rank, attachment.join()
    recorder = Recorder.from_environment()
    recorder.start(method=args.method, options=args.options, parameters=1348, steps=args.steps, resumed_at=first)
    data, target = torch.Generator(), torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    for step in attachment.range(args.steps):
        began_s, waited_s = time.perf_counter(), attachment.waited_s
        data.manual_seed(rank * 100_003 + step)
        loss = loss_of(model, target, 8, data)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        time.sleep(0.025)
        seconds, wait_s = time.perf_counter() - began_s, attachment.waited_s - waited_s
        recorder.step(step=step, loss=loss.item(), seconds=seconds, wait_s=wait_s, tokens=8, steady=step > 3)
        for report in attachment.reports:
            recorder.round(**asdict(report))
        for kind, fields in attachment.events:
            recorder.event(kind, **fields)
        attachment.reports.clear()
        attachment.events.clear()
    attachment.finish()
    with torch.no_grad():
        loss = loss_of(model, target, 512, data.manual_seed(7))
    recorder.validation(step=args.steps, loss=loss.item(), tokens=512)
    recorder.end()
    attachment.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--method")
    parser.add_argument("--backend")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--options", type=json.loads)
    parser.add_argument("--optimizer", type=json.loads, default={"name": "adam", "lr": 0.01})
    main(parser.parse_args())
