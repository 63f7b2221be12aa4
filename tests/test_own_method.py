"""A user's own method: options, one declared state and an exchange; attached like the library's, under the same contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from rig import make_model, train_step

from commopt import attach
from commopt.errors import ConfigError
from commopt.exchange.base import first_bad, is_finite
from commopt.groups import Group, SimWorld
from commopt.method import GradientMethod, Method, NoOptions, options
from commopt.methods.dense import Dense
from commopt.methods.ef_sign import EFSign
from commopt.options import Fraction
from commopt.testing import check_method
from commopt.wire.bucket import Bucket
from commopt.wire.state import State


@options
class SlowMeanOptions(NoOptions):
    decay: Fraction = 0.9


class SlowMean(GradientMethod):
    """m_i <- decay m_i + g_i on each rank; the optimizer gets the mean of all m_i."""

    name = "slow_mean"
    Options = SlowMeanOptions
    options: SlowMeanOptions
    state_form = ""
    states: ClassVar[tuple[State, ...]] = (State("momentum", held="rank", on_resize="mean"),)

    def exchange(self, bucket: Bucket, group: Group) -> None:
        moments = torch.cat([self.options.decay * self.part("momentum", name) + g for name, g in bucket.views()])
        bucket.flat.copy_(moments / group.size)
        group.all_reduce(bucket.flat)
        if self.is_void(bucket, first_bad(self.index, bucket), group):
            return
        for name, m in Bucket(moments, bucket.names, bucket.starts).views():
            self.part("momentum", name).copy_(m)

    def bytes_per_parameter(self, ranks: int) -> float:
        return 8 * (ranks - 1) / ranks


def trained(group: Group, method: Any) -> list[float]:
    model = make_model()
    run = attach(model, method, slow(model), group=group)
    losses = [train_step(model, run.optimizer, group.rank, step % 2) for step in range(8)]
    assert run.replicas_are_equal()
    return losses


def slow(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02)


def test_attach_takes_the_class_and_a_method_made_of_it() -> None:
    def losses(method: Callable[[], Any]) -> list[list[float]]:
        return SimWorld[list[float]](2).run(lambda group: trained(group, method()))

    of_class, of_method = losses(lambda: SlowMean), losses(lambda: SlowMean(decay=0.9))
    plain, dense = losses(lambda: SlowMean(decay=0.0)), losses(lambda: "dense")
    assert of_class == of_method != plain
    assert plain[0] == pytest.approx(dense[0], rel=1e-5)
    assert of_class[0][-1] < of_class[0][0]


def test_its_options_are_checked() -> None:
    with pytest.raises(
        ConfigError, match=r"^method slow_mean: decay: 1 is out of range; write a number from 0, below 1$"
    ):
        SlowMean(decay=1)
    with pytest.raises(ConfigError, match=r"^method slow_mean: unknown option 'decoy'; did you mean 'decay'\?$"):
        SlowMean(decoy=0.5)


def test_it_keeps_the_contract() -> None:
    check_method(SlowMean, ranks=(1, 3), max_norm=None, optimizer=slow)
    check_method(lambda: SlowMean(decay=0.5), ranks=(2,), max_norm=0.5, optimizer=slow)


class DoesNotRollBack(SlowMean):
    """Adds a step's gradients to its momentum before it knows that they are finite."""

    def exchange(self, bucket: Bucket, group: Group) -> None:
        for name, g in bucket.views():
            self.part("momentum", name).mul_(self.options.decay).add_(g.nan_to_num(0.0))
        bad = not is_finite(bucket.flat)
        bucket.flat.copy_(torch.cat([self.part("momentum", name) for name in bucket.names]) / group.size)
        if bad:
            bucket.flat.fill_(float("nan"))
        group.all_reduce(bucket.flat)
        self.is_void(bucket, first_bad(self.index, bucket), group)


class KeepsReplicasApart(SlowMean):
    """Steps by each rank's own momentum."""

    def exchange(self, bucket: Bucket, group: Group) -> None:
        super().exchange(bucket, group)
        if bucket.void is None:
            for name, x in bucket.views():
                x.copy_(self.part("momentum", name))


class CallsItShared(SlowMean):
    """Declares each rank's own momentum as shared."""

    states = (State("momentum"),)


class DoesNotDeclare(SlowMean):
    """Keeps its momentum outside the declared state, so no checkpoint has it."""

    states = ()

    def bound(self) -> None:
        super().bound()
        self._momentum = torch.zeros(self.index.total)

    def part(self, key: str, name: str) -> torch.Tensor:
        return self.index.view(self._momentum, name)


class LetsNaNThrough(EFSign):
    """Ignores that the exchange was void."""

    def exchange(self, bucket: Bucket, group: Group) -> None:
        super().exchange(bucket, group)
        bucket.void = None


class DependsOnBuckets(Dense):
    """Scales by the bucket's own size."""

    def exchange(self, bucket: Bucket, group: Group) -> None:
        super().exchange(bucket, group)
        bucket.flat.mul_(1 + 1e-3 * len(bucket.names))


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (LetsNaNThrough, "NaN"),
        (DependsOnBuckets, "smaller buckets"),
        (DoesNotRollBack, "must leave all state as it was"),
        (KeepsReplicasApart, "replicas differ on 3 ranks"),
        (CallsItShared, "the state 'momentum' differs between 3 ranks: declare it as held='rank'"),
        (DoesNotDeclare, "resuming is not bitwise on 3 ranks"),
    ],
)
def test_a_broken_contract_is_reported(broken: type[Method], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_method(broken, ranks=(3,), optimizer=slow)
