"""The contract suite, over every method, and over methods that break it."""

from __future__ import annotations

from typing import Any

import pytest
from presets import PRESETS, Preset

from commopt.exchange.mean import Aggregator
from commopt.groups import Group
from commopt.methods import METHODS
from commopt.methods.dense import Dense
from commopt.methods.ef_sign import EFSign
from commopt.testing import check_method
from commopt.wire.bucket import Bucket

_LOCAL = {"local_step_scaler": 1, "local_step_clipper": 4}

# further options of methods; every method's first ones are in presets.py
VARIANTS = [
    Preset("dense", {"max_norm": 0.5}),
    Preset("fp16", {"dtype": "bfloat16"}),
    Preset("ef_sign", {"scale": "l2"}),
    Preset("ef_sign", {"max_norm": 0.5, "block_size": 64}),
    Preset("ef_sign", {"scale": "model", "prescale": True}),
    Preset("ef_sign", {"residual_bits": 8, "residual_decay": 0.9}),
    Preset("ef(top_k)", {"residual_bits": 8, "residual_decay": 0.9, "reset_every": 3, "dense_1d": True}),
    Preset("ef", {"compressor": {"compressor": "threshold", "threshold": 0.005}, "residual_bits": 16}),
    Preset("ef21(top_k)", {"eta": 1.0, "dense_1d": True, "refresh_every": 5}),
    Preset("ef21(top_k, sign)", {"max_norm": 0.5, "eta": 0.5}, {"lr": 0.1}),
    Preset("loco", {"bits": 8, "residual_bits": 32, "reset_every": 3, "beta": 0.0}),
    Preset("ef21(sign)", {"server": {"compressor": "top_k", "density": 0.2}}, {"lr": 0.1}),
    Preset("dice_sgd", {"clip_norm": 0.2, "error_norm": 0.0, "noise_multiplier": 1e-3, "noise_seed": 2}),
    Preset("two_way", {"worker": "sign", "server": "bf16", "residual_bits": 16, "dense_1d": True, "reset_every": 3}),
    Preset("two_way", {"worker": "bf16", "error_feedback": False}),
    Preset("two_way", {"worker": "4bit", "server": "fp8", "residual_bits": 8}),
    Preset("two_way", {"worker": "fp16"}),
    Preset("two_way(sign, int8)"),
    Preset("qsgd", {"levels": 7, "norm": "l2", "dense_1d": True, "max_norm": 0.5}),
    Preset("terngrad", {"clip": 0, "dense_1d": False, "dense": ["second.weight"]}),
    Preset("two_way", {"worker": "random_k", "server": {"compressor": "random_k", "density": 0.5}}),
    Preset("top_k", {"density": 0.1, "value_bits": 1, "dense_1d": False, "max_norm": 0.5}),
    Preset("top_k", {"density": 0.1, "value_bits": 8, "residual_bits": 8, "residual_decay": 0.9}),
    Preset("random_k", {"density": 0.3, "value_bits": 16, "error_feedback": False, "dense_1d": False}),
    Preset("threshold", {"threshold": 0.005, "value_bits": 32, "dense_1d": False}),
    Preset(
        "dgc", {"density": 0.05, "max_norm": 0.5, "nesterov": True, "warmup_steps": 8, "dense_1d": False}, {"lr": 0.05}
    ),
    Preset("dgc", {"density": 0.05, "masking": False, "value_bits": 32}, {"lr": 0.05, "weight_decay": 0.01}),
    Preset("dgc", {"density": 1, "max_norm": 0.5}, {"lr": 0.05}),
    Preset("powersgd", {"rank": 1, "start_step": 3, "min_compression_rate": 1, "max_norm": 0.5}),
    Preset("onebit_adam", {"lr": 0.01, "freeze_step": 4, "scale": "l2", "bias_correction": False}),
    Preset("onebit_adam", {"lr": 0.01, "freeze_step": 4, "scale": "model", "prescale": True, "residual_bits": 8}),
    Preset("onebit_adam", {"lr": 0.01, "freeze_step": "auto", "betas": (0.9, 0.7)}),
    Preset("onebit_adam", {"lr": 0.01, "freeze_step": 4, "max_norm": 0.5, "weight_decay": 0.1}),
    Preset("demo", {"lr": 0.003, "chunk": 9, "top_k": 5, "value_bits": 32, "weight_decay": 0.1, "max_norm": 0.5}),
    Preset("zero_one_adam", {"lr": 0.01, "var_freeze_step": None, "var_update_scaler": 2, "scale": "l2"}),
    # resumes in the middle of four local steps, and the NaN comes in one
    Preset("zero_one_adam", {"lr": 0.003, "var_freeze_step": 2, **_LOCAL, "max_norm": 0.5}),
    Preset("zero_one_adam", {"lr": 0.003, **_LOCAL, "var_freeze_step": 2, "weight_decay": 0.1, "residual_bits": 16}),
    Preset(
        "zero_one_adam", {"lr": 0.003, **_LOCAL, "var_freeze_step": 4, "betas": (0.9, 0.5), "bias_correction": False}
    ),
    Preset("zero_one_adam", {"lr": 0.003, "var_freeze_step": 2, **_LOCAL, "scale": "model", "prescale": True}),
    Preset("zero_one_adam", {"lr": 0.003, "var_freeze_step": 2, **_LOCAL, "residual_bits": 8, "local_step_clipper": 3}),
    Preset("onebit_lamb", {"lr": 0.01, "freeze_step": 4, "scale": "model", "prescale": True, "weight_decay": 0.1}),
    Preset("onebit_lamb", {"lr": 0.01, "freeze_step": 4, "scale": "l2", "bias_correction": True, "residual_bits": 16}),
    Preset("onebit_lamb", {"lr": 0.01, "freeze_step": "auto", "betas": (0.9, 0.7), "max_norm": 0.5}),
    Preset("distributed_lion", {"lr": 0.003, "vote": "majority", "weight_decay": 0.1, "max_norm": 0.5}),
    Preset("signum", {"momentum": 0.0}, sgd={"lr": 0.003, "weight_decay": 0.1}),
]


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_every_method_keeps_the_contract(preset: Preset) -> None:
    check_method(preset.method, optimizer=preset.optimizer)


@pytest.mark.parametrize("preset", VARIANTS, ids=str)
def test_every_variant_keeps_the_contract(preset: Preset) -> None:
    check_method(preset.method, optimizer=preset.optimizer, ranks=(1, 3))


def test_no_method_is_left_out() -> None:
    assert sorted(preset.name for preset in PRESETS) == sorted(METHODS)


class LocalOnly(Dense):
    """Never exchanges anything."""

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        pass


class LetsNaNThrough(EFSign):
    """Does not look at the header."""

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        super().exchange(bucket, group)
        bucket.void = None


class ForgetsResidual(EFSign):
    """Loses its residual at a resume."""

    def load_comm_state(self, state: Any) -> None:
        pass


class DependsOnBuckets(Dense):
    """Scales by the bucket's own size."""

    def aggregate(self, bucket: Bucket, group: Group) -> None:
        super().exchange(bucket, group)
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
