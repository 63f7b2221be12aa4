"""The contract suite, over every method."""

from __future__ import annotations

import pytest
from presets import ADAM, PRESETS, Preset, sgd

from commopt.errors import ConfigError
from commopt.methods import METHODS
from commopt.testing import check_method

_LOCAL = {"var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 4}

LAMB = {"name": "lamb", "lr": 0.01}
SLOW_ADAM = {"name": "adam", "lr": 0.003}

# further options of methods; every method's first ones are in presets.py
VARIANTS = [
    Preset("fp16", {"dtype": "bfloat16"}),
    Preset("ef_sign", {"scale": "l2", "residual_bits": 8, "residual_decay": 0.9}),
    Preset("ef_sign", {"scale": "model", "prescale": True}),
    Preset("ef(top_k)", {"residual_bits": 8, "residual_decay": 0.9, "reset_every": 3, "dense_1d": True}),
    Preset("ef", {"compressor": {"compressor": "threshold", "threshold": 0.005}, "residual_bits": 16}),
    Preset("ef21(top_k)", {"eta": 1.0, "dense_1d": True, "refresh_every": 5}),
    Preset("loco", {"bits": 8, "residual_bits": 32, "reset_every": 3, "beta": 0.0}),
    Preset("ef21(sign)", {"server": {"compressor": "top_k", "density": 0.2}}, sgd(0.1)),
    Preset("dice_sgd", {"clip_norm": 0.2, "error_norm": 0.0, "noise_multiplier": 1e-3, "noise_seed": 2}),
    Preset("two_way", {"worker": "sign", "server": "bf16", "residual_bits": 16, "dense_1d": True, "reset_every": 3}),
    Preset("two_way", {"worker": "bf16", "error_feedback": False}),
    Preset("two_way", {"worker": "4bit", "server": "fp8", "residual_bits": 8}),
    Preset("two_way(sign, int8)"),
    Preset("terngrad", {"clip": 0, "dense_1d": False, "dense": ["second.weight"]}),
    Preset("two_way", {"worker": "random_k", "server": {"compressor": "random_k", "density": 0.5}}),
    Preset("top_k", {"density": 0.1, "value_bits": 8, "residual_bits": 8, "residual_decay": 0.9}),
    Preset("random_k", {"density": 0.3, "value_bits": 16, "error_feedback": False, "dense_1d": False}),
    Preset("threshold", {"threshold": 0.005, "value_bits": 32, "dense_1d": False}),
    Preset("dgc", {"density": 0.05, "masking": False, "value_bits": 32}, {**sgd(0.05), "weight_decay": 0.01}),
    Preset("onebit_adam", {"freeze_step": 4, "scale": "l2", "bias_correction": False}, ADAM),
    Preset("onebit_adam", {"freeze_step": 4, "scale": "model", "prescale": True, "residual_bits": 8}, ADAM),
    Preset("onebit_adam", {"freeze_step": "auto"}, {**ADAM, "betas": (0.9, 0.7)}),
    Preset("zero_one_adam", {"var_freeze_step": None, "var_update_scaler": 2, "scale": "l2"}, ADAM),
    Preset(
        "zero_one_adam",
        {**_LOCAL, "var_freeze_step": 4, "residual_bits": 16, "bias_correction": False},
        {**SLOW_ADAM, "name": "adamw", "weight_decay": 0.1, "betas": (0.9, 0.5)},
    ),
    Preset(
        "zero_one_adam",
        {**_LOCAL, "scale": "model", "prescale": True, "residual_bits": 8, "local_step_clipper": 3},
        SLOW_ADAM,
    ),
    Preset("onebit_lamb", {"freeze_step": 4, "scale": "model", "prescale": True}, {**LAMB, "weight_decay": 0.1}),
    Preset("onebit_lamb", {"freeze_step": 4, "scale": "l2", "bias_correction": True, "residual_bits": 16}, LAMB),
    Preset("signum", {"momentum": 0.0}, {**sgd(0.003), "weight_decay": 0.1}),
]
CLIPPED = [
    Preset("dense"),
    Preset("ef_sign", {"block_size": 64}),
    Preset("ef21(top_k, sign)", {"eta": 0.5}, sgd(0.1)),
    Preset("qsgd", {"levels": 7, "norm": "l2", "dense_1d": True}),
    Preset("top_k", {"density": 0.1, "value_bits": 1, "dense_1d": False}),
    Preset("dgc", {"density": 0.05, "nesterov": True, "warmup_steps": 8, "dense_1d": False}, sgd(0.05)),
    Preset("dgc", {"density": 1}, sgd(0.05)),
    Preset("powersgd", {"rank": 1, "start_step": 3, "min_compression_rate": 1}),
    Preset("onebit_adam", {"freeze_step": 4}, {**ADAM, "name": "adamw", "weight_decay": 0.1}),
    Preset("demo", {"chunk": 9, "top_k": 5, "value_bits": 32}, {**sgd(0.003), "weight_decay": 0.1}),
    # resumes in the middle of four local steps, and the NaN comes in one
    Preset("zero_one_adam", _LOCAL, SLOW_ADAM),
    Preset("onebit_lamb", {"freeze_step": "auto"}, {**LAMB, "betas": (0.9, 0.7)}),
    Preset("distributed_lion", {"vote": "majority"}, {"name": "lion", "lr": 0.003, "weight_decay": 0.1}),
]


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_every_method_keeps_the_contract(preset: Preset) -> None:
    check_method(
        preset.method, optimizer=preset.optimizer, ranks=(1, 4)
    )  # on 2: in gpu; on 3: as recorded; 5: in equivalence


@pytest.mark.parametrize("preset", VARIANTS, ids=str)
def test_every_variant_keeps_the_contract(preset: Preset) -> None:
    check_method(preset.method, optimizer=preset.optimizer, ranks=(3,))


@pytest.mark.parametrize("preset", CLIPPED, ids=str)
def test_every_variant_keeps_the_contract_when_gradients_are_clipped(preset: Preset) -> None:
    check_method(preset.method, optimizer=preset.optimizer, ranks=(1, 3), max_norm=0.5)


def test_no_method_is_left_out() -> None:
    every_step = {name for name, method in METHODS.items() if method.kind != "outer"}
    assert {preset.name for preset in PRESETS} == every_step


def test_an_outer_method_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="noloco: check_method is for methods that exchange in every step"):
        check_method("noloco")
