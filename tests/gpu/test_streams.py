"""Exchanges on a side stream: torch's sanitizer finds no access that is out of order, and finds it where a mutant leaves a wait out."""

from __future__ import annotations

import gc
import types
from typing import Any

import pytest
import torch
from pretend import DEVICE, PRETENDED, working_on
from same import Same
from streams import Streams, pretended
from torch import Tensor, nn

from commopt import build
from commopt.frameworks import lane
from commopt.method import EveryStep
from commopt.optim.update import UpdateMethod
from commopt.wire.bucket import Bucket

pytestmark = PRETENDED
GPU: Any = types.SimpleNamespace(type="cuda")
METHODS = ["ef_sign", "two_way", "top_k", "powersgd", "onebit_adam", "distributed_lion", "demo"]


class Training:
    """A layer whose flat gradient is exchanged on a lane, as DDP's hook does it."""

    def __init__(self, name: str) -> None:
        self.net = nn.Linear(16, 16).to(DEVICE)
        self.named = [(key, p.detach()) for key, p in self.net.named_parameters()]
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        method: Any = build(name)
        self.method: EveryStep = method
        self.group, self.lane = Same(2), lane.Lane(GPU)
        self.method.follow(self.optimizer, dict(self.net.named_parameters()))
        self.method.bind(self.named, self.group)

    def submitted(self, value: float) -> tuple[Tensor, Any]:
        """A gradient, and the future of its exchange."""
        flat = torch.zeros(16 * 17, device=DEVICE).fill_(value)
        bucket = Bucket(flat, ("weight", "bias"), (0, 256))

        def job() -> Tensor:
            with working_on(DEVICE), torch.no_grad():
                self.method.exchange(bucket, self.group)
                self.method.receive(bucket)
            return bucket.flat

        return flat, self.lane.submit(job, [flat])

    @torch.no_grad()
    def step(self, flat: Tensor) -> None:
        for _, p in self.net.named_parameters():
            p.grad = torch.zeros_like(p)
        if isinstance(self.method, UpdateMethod):
            self.method.step()
        else:
            self.net.weight.add_(flat[:256].view(16, 16), alpha=-0.1)


def errors_of(name: str, waits: bool = True) -> list[str]:
    """What the sanitizer finds in three steps."""
    with pretended(lane) as streams, working_on(DEVICE):
        training = Training(name)
        for step in range(3):
            flat, future = training.submitted(step + 1.0)
            future.wait() if waits else future.done.wait()
            training.step(flat)
        training.lane.close()
    return streams.errors


@pytest.mark.parametrize("name", METHODS)
def test_nothing_on_the_side_stream_is_out_of_order(name: str) -> None:
    assert errors_of(name) == []


def test_the_sanitizer_finds_a_side_stream_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, "wait", lambda *_: None)
    assert errors_of("ef_sign")


def test_the_sanitizer_finds_results_that_nobody_has_waited_for() -> None:
    assert errors_of("ef_sign", waits=False)


@pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "a mutant that does not record"])
def test_a_bucket_dropped_by_a_failed_backward_is_not_reused_too_early(
    is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_recorded:
        monkeypatch.setattr(Streams, "record_stream", lambda *_: None)
    with pretended(lane) as streams, working_on(DEVICE):
        training = Training("ef_sign")
        flat, future = training.submitted(1.0)
        future.done.wait()
        training.lane.close()
        future.drop()
        del flat, future
        gc.collect()
    assert (streams.errors == []) == is_recorded


def test_an_error_that_cannot_be_pickled_keeps_its_words() -> None:
    error = ValueError("no room", lambda: 0)
    assert "ValueError: ('no room'" in str(lane.portable(error))
    picklable = ValueError("no room")
    assert lane.portable(picklable) is picklable
