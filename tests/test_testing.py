"""The contract suite, over every method, and over methods that break it."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from commopt import build
from commopt.aggregate import Aggregator
from commopt.bucket import Bucket
from commopt.groups import Group
from commopt.methods import METHODS, is_update_method
from commopt.methods.dense import Dense
from commopt.methods.ef_sign import EFSign
from commopt.testing import check_method

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("dense", {"max_norm": 0.5}),
    ("fp16", {}),
    ("fp16", {"dtype": "bfloat16"}),
    ("ef_sign", {}),
    ("ef_sign", {"scale": "l2"}),
    ("ef_sign", {"max_norm": 0.5, "block_size": 64}),
    ("onebit_adam", {"lr": 0.01, "freeze_step": 4}),
    ("onebit_adam", {"lr": 0.01, "freeze_step": 4, "scale": "l2", "bias_correction": False}),
    ("onebit_adam", {"lr": 0.01, "freeze_step": "auto", "betas": (0.9, 0.7)}),
    ("onebit_adam", {"lr": 0.01, "freeze_step": 4, "max_norm": 0.5, "weight_decay": 0.1}),
]


def made(model: nn.Module, name: str, options: dict[str, Any]) -> Aggregator:
    return build(name, model.named_parameters() if is_update_method(name) else None, **options)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_method_keeps_the_contract(name: str, options: dict[str, Any]) -> None:
    check_method(lambda model: made(model, name, options), ranks=(1, 2, 3, 5) if not options else (1, 3))


def test_no_method_is_left_out() -> None:
    assert {name for name, _ in OPTIONS} == set(METHODS)


class LocalOnly(Dense):
    """Never exchanges anything."""

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        pass


class LetsNaNThrough(EFSign):
    """Does not look at the header."""

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        super().aggregate(bucket, group)
        bucket.void = None


class ForgetsResidual(EFSign):
    """Loses its residual at a resume."""

    def load_comm_state(self, state: Any) -> None:
        pass


class DependsOnBuckets(Dense):
    """Scales by the bucket's own size."""

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        super().aggregate(bucket, group)
        bucket.flat.mul_(1 + 1e-3 * len(bucket.names))


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (LocalOnly, "replicas differ"),
        (LetsNaNThrough, "NaN"),
        (ForgetsResidual, "not bitwise"),
        (DependsOnBuckets, "smaller buckets"),
    ],
)
def test_a_method_that_breaks_the_contract_is_caught(broken: type[Aggregator], complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check_method(lambda _: broken(), ranks=(3,))
