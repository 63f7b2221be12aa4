"""What a DeepSpeed configuration may say, what it means, and what is refused with the reason."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from deepspeed_rig import make_engine, train
from pool import Pool
from rig import make_model

from commopt.errors import AttachError, ConfigError
from commopt.frameworks.deepspeed_config import LEGACY, parameter_groups, read_legacy, read_wanted

ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}}
DGC = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "commopt": {"method": "dgc"}}


def legacy(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}}


@pytest.mark.parametrize(
    "spelled", ["OneBitAdam", "OnebitAdam", "onebitadam", "ZeroOneAdam", "OneBitLamb", "ONEBITLAMB"]
)
def test_old_names_are_matched_whatever_their_case(spelled: str) -> None:
    wanted = read_wanted(legacy(spelled, lr=1e-3), None)
    assert wanted is not None
    assert wanted.method.name == LEGACY[spelled.lower()].method


def test_old_knobs_keep_their_old_defaults() -> None:
    adam, zero_one, lamb = (read_legacy(LEGACY[name], {}) for name in ("onebitadam", "zerooneadam", "onebitlamb"))
    shared = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    assert adam.optimizer == {"name": "adamw", **shared}
    assert adam.method.given == {"freeze_step": 100000, "bias_correction": False}
    assert zero_one.optimizer == {"name": "adamw", **shared}
    assert zero_one.method.given == {
        "var_freeze_step": 100000,
        "var_update_scaler": 16,
        "local_step_scaler": 32678,
        "local_step_clipper": 16,
        "bias_correction": False,
    }
    assert lamb.optimizer == {"name": "lamb", **shared, "max_coeff": 10.0, "min_coeff": 0.01}
    factors = {"coeff_beta": 0.9, "factor_max": 4.0, "factor_min": 0.5, "factor_threshold": 0.1}
    assert lamb.method.given == {"freeze_step": 100000, **factors, "bias_correction": False}


@pytest.mark.parametrize(
    ("configuration", "words"),
    [
        (legacy("OneBitAdam", freze_step=3), "optimizer.params.freze_step: .* did you mean 'freeze_step'"),
        (legacy("OneBitAdam", var_freeze_step=3), "OneBitAdam has no such option"),
        (legacy("OneBitAdam", amsgrad=True), "amsgrad"),
        (legacy("OneBitLamb", max_grad_norm=1.0), "gradient_clipping"),
        (legacy("ZeroOneAdam", comm_backend_name="ncl"), "'ncl' is not a backend; did you mean 'nccl'"),
        (legacy("OneBitAdam", cuda_aware="yes"), "cuda_aware: 'yes'"),
        ({**legacy("OneBitAdam"), "commopt": {"method": "dgc"}}, "leave out the 'commopt' block"),
        ({**DGC, "commopt": {"method": "dcg"}}, "unknown method 'dcg'; did you mean 'dgc'"),
        ({**DGC, "commopt": {"method": "dgc", "densty": 1}}, "did you mean 'density'"),
        ({"commopt": {"method": "dgc"}}, "optimizer: is missing"),
        ({"commopt": "distributed_lion"}, r"distributed_lion needs one \(Lion\)"),
        ({**ADAM, "commopt": None}, "commopt: null is not a method"),
        ({**ADAM, "commopt": {"method": "onebit_adam", "max_norm": 2.0}}, 'max_norm: 2.0: write "gradient_clipping"'),
        ({**ADAM, "commopt": {"method": "onebit_adam", "lr": 0.1}}, "lr: 0.1: belongs to the optimizer"),
        (legacy("OneBitAdam", freeze_step=0), "OneBitAdam: method onebit_adam: freeze_step: 0 is out of range"),
        ({**DGC, "commopt": {"method": "onebit_adam"}}, "can take the place of adam or adamw only"),
        ({**ADAM, "commopt": {"density": 1}}, "names no method"),
    ],
)
def test_mistakes_are_told_by_key_and_value(configuration: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_wanted(configuration, None)


def test_two_optimizers_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="leave out one"):
        read_wanted(legacy("OneBitAdam"), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))


def test_a_configuration_without_a_method_is_deepspeeds_own() -> None:
    assert read_wanted(ADAM, None) is None


def test_a_mask_is_flat_or_of_the_parameters_shape() -> None:
    model, method = make_model(), read_legacy(LEGACY["onebitadam"], {}).method
    first, second, *_ = model.parameters()
    mask = torch.rand(first.shape).round()
    for given in (mask, mask.flatten()):
        groups, masks = parameter_groups(model, [{"params": first, "exp_avg_mask": given, "lr": 0.5}], method)
        assert torch.equal(masks["0.weight"], mask)
        assert groups == [{"lr": 0.5, "params": [first]}]
    with pytest.raises(ConfigError, match="a group of its own"):
        parameter_groups(model, [{"params": [first, second], "exp_avg_mask": mask}], method)
    with pytest.raises(ConfigError, match="not this model's"):
        parameter_groups(model, [torch.zeros(3)], method)


def test_the_configurations_adam_is_what_an_update_method_stands_in_for() -> None:
    params = {"lr": 0.5, "betas": [0.8, 0.9], "torch_adam": True, "weight_decay": 0.1, "bias_correction": False}
    own: dict[str, Any] = {"optimizer": {"type": "Adam", "params": params}, "commopt": "onebit_adam"}
    wanted = read_wanted(own, None)
    assert wanted is not None
    assert wanted.optimizer == {"name": "adamw", "lr": 0.5, "betas": [0.8, 0.9], "weight_decay": 0.1}
    assert wanted.method.given == {"bias_correction": False}
    own["optimizer"]["params"] = {"lr": 0.5, "adam_w_mode": False, "weight_decay": 0.1}
    with pytest.raises(ConfigError, match="adam_w_mode"):
        read_wanted(own, None)


CHANGED = """
import warnings; warnings.simplefilter("ignore")
import deepspeed, torch
init, names, ops = deepspeed.DeepSpeedEngine.__init__, dir(torch.optim), dict(deepspeed.ops.__compatible_ops__)
import commopt.deepspeed
from commopt.deepspeed import initialize, install
import commopt
assert commopt.deepspeed.install is install
try:
    initialize(model=None)
except AssertionError:
    pass
assert deepspeed.DeepSpeedEngine.__init__ is init
assert dir(torch.optim) == names
assert deepspeed.ops.__compatible_ops__ == ops
assert install() and not install()
assert deepspeed.DeepSpeedEngine.__init__ is not init
"""


def test_only_install_changes_deepspeed_for_good() -> None:
    subprocess.run([sys.executable, "-c", CHANGED], check=True, timeout=100)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stage 1": ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage: 1 with dgc: after each step"),
    "stage 2": ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: 2 with dgc: gradients are split"),
    "stage 3": ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: 3"),
    "offload": ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    "sum": ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: 'sum'"),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype"),
    "deepcompile": ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
    "outer in bf16": ({"bf16": {"enabled": True}, "commopt": {"method": "noloco"}}, "bf16.enabled: true with noloco"),
    "a bad rate": (legacy("OneBitAdam", lr=-1.0), "lr: -1.0 is refused by AdamW"),
    "a bad option": ({"commopt": {"method": "dgc", "density": 7}}, "density: 7"),
    "momentum twice": (
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
        "momentum",
    ),
}


def refused() -> dict[str, str]:
    told = {}
    for name, (own, _) in REFUSED.items():
        try:
            make_engine({**({} if name == "a bad rate" else DGC), **own})
        except (AttachError, ConfigError) as error:
            told[name] = str(error)
    return told


def refused_of_engines() -> list[str]:
    """Misuse of an engine that is fine in itself."""
    import torch.distributed as dist

    import commopt

    engine, adam = make_engine(DGC), make_engine(ADAM, ours=False)
    trained = make_engine(ADAM, ours=False)
    train(trained, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ZeRO's imports say of torch
        sharded = make_engine({**ADAM, **REFUSED["stage 1"][0]}, ours=False)
    told = []
    for act in (
        engine.allreduce_gradients,
        lambda: commopt.attach(engine, "ef_sign"),
        lambda: commopt.attach(adam, "powersgd", torch.optim.SGD(make_model().parameters(), lr=1.0)),
        lambda: commopt.attach(adam, "onebit_adam", max_norm=0.5),
        lambda: commopt.attach(adam, "ef_sign", grad_scaler=torch.amp.GradScaler("cpu")),
        lambda: commopt.attach(adam, "ef_sign", overlap=True),
        lambda: commopt.attach(adam, "distributed_lion"),
        lambda: commopt.attach(trained, "onebit_adam"),
        lambda: commopt.attach(sharded, "onebit_adam"),
        lambda: commopt.attach(adam, {"name": "powersgd", "rank": 1 + dist.get_rank()}),
        lambda: commopt.attach(adam, "powersgd" if dist.get_rank() else "powersdg"),
    ):
        try:
            act()
        except (AttachError, ConfigError) as error:
            told.append(str(error))
    assert commopt.attach(adam, "powersgd") is adam.commopt  # no refusal has left anything behind
    return told


def test_what_cannot_work_is_refused_at_the_start_on_every_rank(deepspeed_ranks: Pool) -> None:
    for told in deepspeed_ranks.run(2, refused):
        assert {name for name, (_, words) in REFUSED.items() if words not in told.get(name, "")} == set()


def test_misuse_of_an_engine_is_refused(deepspeed_ranks: Pool) -> None:
    words = [
        "at engine.step()",
        "dgc is attached to this engine already",
        "is not the engine's",
        'write "gradient_clipping": 0.5 into the configuration',
        "an engine scales the loss itself",
        "overlap=True with a DeepSpeed engine",
        "stands in for Lion, not for Adam",
        "after steps",
        "zero_optimization.stage: 1 with onebit_adam",
        "method.rank is 1 on rank 0 and 2 on rank 1",
        "powersdg",
    ]
    for told in deepspeed_ranks.run(2, refused_of_engines):
        assert len(told) == len(words)
        assert [word for word, text in zip(words, told, strict=True) if word not in text] == []


def test_without_deepspeed_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['deepspeed'] = None; import commopt.frameworks.deepspeed"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'commopt[deepspeed]'" in done.stderr.splitlines()[-1]
