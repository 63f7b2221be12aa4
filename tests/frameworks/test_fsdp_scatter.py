"""A compressed reduce-scatter in an FSDP2 model of one mesh dimension, on four ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_rig import (
    UNITS,
    Flats,
    Uneven,
    assert_equal,
    assert_shards_of,
    attached,
    cut,
    gradient,
    mesh_of,
    sgd,
    sharded,
    shards,
    train,
)
from pool import Pool
from told import FAST, TRIED, Quick, Told, assert_chosen
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from commopt.compress import make_compressor
from commopt.compress.base import Compressor
from commopt.compress.feedback import ErrorFeedback, Kept
from commopt.wire.bucket import ParameterIndex

STEPS, RANKS = 4, 4


class Scatter:
    """Every rank's gradient for every shard, parameter by parameter, through a codec of its own."""

    def __init__(self, codec: Compressor, bits: int) -> None:
        self.codec, self.bits = codec, bits
        self.feedbacks: dict[tuple[int, int, str], ErrorFeedback] = {}

    def decoded(self, x: Tensor, rank: int, shard: int, name: str) -> Tensor:
        if not x.numel():
            return x
        blocks = self.codec.table(ParameterIndex((name,), (x.numel(),)), 1).everything
        feedback = self.feedbacks.setdefault(
            (rank, shard, name), ErrorFeedback(self.codec, Kept(bits=self.bits), blocks)
        )
        out = torch.zeros_like(x)
        self.codec.decompress_(feedback.compress(x, [blocks])[0].tensors[1:], blocks, out, alpha=1 / RANKS)
        return out

    def mean(self, step: list[Flats]) -> Flats:
        found = Flats()
        for name in step[0]:
            parts = torch.zeros_like(step[0][name].flatten())
            for shard, part in enumerate(torch.chunk(parts.view(step[0][name].shape), RANKS)):
                for rank, own in enumerate(step):
                    part += self.decoded(cut(own[name], RANKS, shard), rank, shard, name).view_as(part)
            found[name] = parts
        return found


def train_alone(mean: Callable[[list[Flats]], Flats], steps: int = STEPS) -> nn.Module:
    """The unsharded model after steps with gradients averaged by `mean`."""
    model = Uneven()
    optimizer = sgd(model)
    for step in range(steps):
        averaged = mean([gradient(model, rank, step) for rank in range(RANKS)])
        for name, p in model.named_parameters():
            p.grad = averaged[name].view_as(p).clone()
        optimizer.step()
    return model


INT8, INT4, FP8 = ({"compressor": name, "stochastic": False} for name in ("int8", "4bit", "fp8"))
CASES: dict[str, tuple[Any, Any, int]] = {
    "two_way": ({"name": "two_way", "worker": INT8}, INT8, 32),
    "16-bit residuals": ({"name": "two_way", "worker": INT4, "residual_bits": 16}, INT4, 16),
    "no residuals": ({"name": "two_way", "worker": FP8, "error_feedback": False}, FP8, 0),
    "sign": ("two_way(sign)", "sign", 32),
    "fp16": ("fp16", "fp16", 0),
}


def train_sharded(method: Any) -> Any:
    with attached(mesh_of(4), method) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), STEPS)
        return shards(model), run.traffic.payload_bytes


@pytest.mark.parametrize("case", CASES)
def test_each_shard_is_the_mean_of_what_was_sent_to_it(fsdp_ranks: Pool, case: str) -> None:
    method, codec, bits = CASES[case]
    expected = train_alone(Scatter(make_compressor(codec), bits).mean)
    assert_shards_of(expected, [found for found, _ in fsdp_ranks.run(4, train_sharded, method)], RANKS)


def exactly(step: list[Flats]) -> Flats:
    return {name: sum(one[name] / RANKS for one in step) for name in step[0]}  # type: ignore[misc]


@pytest.mark.parametrize("method", ["natural", "qsgd", {"name": "two_way(int8)", "residual_bits": 8}])
def test_stochastic_codecs_stay_close_to_the_exact_mean(fsdp_ranks: Pool, method: Any) -> None:
    expected, first = train_alone(exactly), dict(Uneven().named_parameters())
    for rank, (found, _) in enumerate(fsdp_ranks.run(4, train_sharded, method)):
        for name, p in expected.named_parameters():
            moved = torch.linalg.vector_norm(p.detach() - first[name])
            assert torch.linalg.vector_norm(found[name] - cut(p.detach(), RANKS, rank)) < 0.3 * moved + 1e-6


def test_a_rank_sends_the_other_shards_parts(fsdp_ranks: Pool) -> None:
    for rank, (_, sent) in enumerate(fsdp_ranks.run(4, train_sharded, "fp16")):
        parameters = dict(Uneven().named_parameters())
        payloads = 0
        for names in UNITS.values():
            for shard in set(range(RANKS)) - {rank}:
                elements = sum(cut(parameters[name], RANKS, shard).numel() for name in names)
                payloads += -(-(4 + 2 * elements) // 4) * 4  # a header, and two bytes for each element
        assert sent == STEPS * payloads


@pytest.mark.parametrize("shape", [(4,), (2, 2)], ids=["shards", "replicas"])
@pytest.mark.ranks("fsdp", 4)
def test_with_communication_off_nothing_is_sent_and_training_goes_on(shape: tuple[int, ...]) -> None:
    with attached(mesh_of(*shape), "two_way(int8)") as (model, optimizer, run):
        before, sent = shards(model), run.traffic.payload_bytes
        with run.communication_off():
            train(model, optimizer, dist.get_rank(), 2)
        assert run.traffic.payload_bytes == sent
        assert all(not torch.equal(x, before[name]) for name, x in shards(model).items() if x.numel())


def train_by_auto(method: Any, folder: Path | None = None) -> Any:
    """This rank's shards after six steps, the events, and the bytes of the first steps and of the last ones."""
    with attached(mesh_of(4), method()) as (model, optimizer, run):
        sent = []
        for first in range(0, 6, TRIED):
            before = run.traffic.payload_bytes
            train(model, optimizer, dist.get_rank(), TRIED, first)
            sent.append(run.traffic.payload_bytes - before)
        return shards(model), run.events, (sent[0], sent[-1])


def fp16_only() -> Told:
    return Told(candidates=["fp16"])


def test_auto_is_the_exact_mean_and_from_the_choice_on_that_of_what_was_sent(fsdp_ranks: Pool) -> None:
    scatter, count = Scatter(make_compressor("fp16"), 0), iter(range(6))
    expected = train_alone(lambda step: exactly(step) if next(count) < TRIED else scatter.mean(step), 6)
    found = fsdp_ranks.run(4, train_by_auto, fp16_only)
    assert_shards_of(expected, [one for one, *_ in found], RANKS)
    for _, events, (first, last) in found:
        assert [told["now"] for _, told in events] == ["fp16", "fp16"]
        assert 0.4 < last / first < 0.52  # the exact exchange sends the padding, too


def test_auto_tries_what_fits_a_reduce_scatter(fsdp_ranks: Pool) -> None:
    found = fsdp_ranks.run(4, train_by_auto, Told)
    for _, events, _ in found:
        assert [told["now"] for _, told in events] == ["two_way(4bit)", "two_way(int8)", "two_way(int8)"]


@pytest.mark.ranks("fsdp", 4)
def test_auto_goes_on_with_its_choice_from_a_checkpoint(tmp_path: Path) -> None:
    with attached(mesh_of(4), Quick()) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), 5)
        run.save(tmp_path)
        train(model, optimizer, dist.get_rank(), 2, 5)
        assert_chosen(run)
        expected = shards(model)
    with attached(mesh_of(4), Quick()) as (model, optimizer, run):
        run.load(tmp_path)
        train(model, optimizer, dist.get_rank(), 2, 5)
        assert (run.method.choice, run.events) == ("two_way(int8)", [])
        assert_equal(shards(model), expected)


@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.ranks("fsdp", 4)
def test_auto_on_a_fast_link_does_what_fsdp_does(half: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "times", FAST)
    options: dict[str, Any] = {} if half is None else {"mp_policy": MixedPrecisionPolicy(half, half)}
    with attached(mesh_of(4), Told(), **options) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), 3)
        found = shards(model)
        assert run.method.choice == "dense"
        phases = run.method._profile("dense").phases
        assert [(one.operation, round(one.constant, 2)) for one in phases] == [("all_to_all", 4.0)]
    theirs = sharded(mesh_of(4), **options)
    train(theirs, sgd(theirs), dist.get_rank(), 3)
    for name, x in shards(theirs).items():
        assert torch.allclose(found[name], x, atol=1e-6 if half is None else 1e-2)


@pytest.mark.ranks("fsdp", 4)
def test_a_nan_of_one_rank_is_left_out_by_all_shards_under_auto() -> None:
    with attached(mesh_of(4), Told()) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), 1)
        before = shards(model)["second.weight"]
        model.is_poisoned = dist.get_rank() == 1
        train(model, optimizer, dist.get_rank(), 1, 1)
        assert run.voided == [(1, "second.weight")]
        assert torch.equal(shards(model)["second.weight"], before)
        model.is_poisoned = False
        train(model, optimizer, dist.get_rank(), 4, 2)
        assert all(x.isfinite().all() for x in shards(model).values())


@pytest.mark.ranks("fsdp", 4)
def test_auto_times_its_codecs_in_place_of_a_reduce_scatter() -> None:
    with attached(mesh_of(4), {"name": "auto", "measure": 1}) as (model, optimizer, run):
        train(model, optimizer, dist.get_rank(), 5)
        assert all(run.method._cost(name, 1000) > 0 for name in run.method.allowed)
        assert run.method.state["step_s"][0] > 0
