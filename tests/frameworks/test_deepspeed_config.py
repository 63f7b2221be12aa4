"""What a DeepSpeed configuration may say, what it means, and what is refused with the reason."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_rig import ADAM, SGD, legacy, make_engine
from rig import flat, make_model, train_step
from torch import Tensor

from commopt import attach
from commopt.errors import AttachError, ConfigError
from commopt.frameworks.deepspeed_config import LEGACY, parameter_groups, read_legacy, read_wanted
from commopt.frameworks.deepspeed_groups import PartlyFrozenAdam
from commopt.groups import Group, SimWorld
from commopt.methods import OnebitAdam

DGC = {**SGD, "commopt": {"method": "dgc"}}


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


@pytest.mark.ranks("deepspeed", 2)
def test_only_install_changes_deepspeed_for_good() -> None:
    import deepspeed

    from commopt.deepspeed import initialize, install

    engine, ops = deepspeed.DeepSpeedEngine, deepspeed.ops.__compatible_ops__
    init: Any = engine.__init__
    assert not hasattr(init, "_is_commopts")
    ops["deepspeed_shm_comm"] = True
    before = dir(torch.optim), dict(ops)
    with pytest.raises(AssertionError):
        initialize(model=None)
    assert engine.__init__ is init
    assert (dir(torch.optim), ops) == before
    ops["deepspeed_shm_comm"] = False
    try:
        assert install() == ("deepspeed.DeepSpeedEngine.__init__",)
        assert install() == ()
        assert engine.__init__ is not init
    finally:
        engine.__init__ = init


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
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.ranks("deepspeed", 2)
def test_what_cannot_work_is_refused_at_the_start_on_every_rank(case: str) -> None:
    own, words = REFUSED[case]
    with pytest.raises((AttachError, ConfigError), match=re.escape(words)):
        make_engine({**({} if case == "a bad rate" else DGC), **own})


@pytest.mark.ranks("deepspeed", 2)
def test_misuse_of_an_engine_that_is_fine_in_itself_is_refused() -> None:
    engine, adam = make_engine(DGC), make_engine(ADAM, ours=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ZeRO's imports say of torch
        sharded = make_engine({**ADAM, **REFUSED["stage 1"][0]}, ours=False)
    sgd = torch.optim.SGD(make_model().parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    rank = dist.get_rank()
    for words, act in (
        ("at engine.step()", engine.allreduce_gradients),
        ("dgc is attached to this engine already", lambda: attach(engine, "ef_sign")),
        ("is not the engine's", lambda: attach(adam, "powersgd", sgd)),
        ('write "gradient_clipping": 0.5 into', lambda: attach(adam, "onebit_adam", max_norm=0.5)),
        ("an engine scales the loss itself", lambda: attach(adam, "ef_sign", grad_scaler=scaler)),
        ("overlap=True with a DeepSpeed engine", lambda: attach(adam, "ef_sign", overlap=True)),
        ("zero_optimization.stage: 1 with onebit_adam", lambda: attach(sharded, "onebit_adam")),
        ("method.rank is 1 on rank 0 and 2 on rank 1", lambda: attach(adam, {"name": "powersgd", "rank": 1 + rank})),
    ):
        with pytest.raises((AttachError, ConfigError), match=re.escape(words)):
            act()
    assert attach(adam, "powersgd") is adam.commopt  # no refusal has left anything behind


# -- parameter groups that stay out of 1-bit Adam's freeze


def partly_frozen(
    group: Group, live: int, nan_at: int = -1, method: Any = PartlyFrozenAdam
) -> tuple[Tensor, list[Tensor]]:
    """Six steps with the first `live` parameters out of the freeze: all parameters, and each one's variance."""
    model = make_model()
    params = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": params[:live], "non_freeze": True}, {"params": params[live:]}]
    adam = torch.optim.Adam([g for g in groups if g["params"]], lr=0.01)
    run = attach(model, method(freeze_step=3 if method is PartlyFrozenAdam else 100), adam, group=group)
    for step in range(6):
        if step == nan_at and group.rank == 1:
            params[0].register_hook(lambda grad: grad * torch.nan if run.steps == nan_at else grad)  # type: ignore[no-untyped-call]
        train_step(model, run.optimizer, group.rank, step)
    return flat(model), [run.method.part("variance", name).clone() for name in run.parameters]


def on_two(live: int, **options: Any) -> list[tuple[Tensor, list[Tensor]]]:
    return SimWorld[tuple[Tensor, list[Tensor]]](2).run(lambda group: partly_frozen(group, live, **options))


def test_groups_out_of_the_freeze_go_on_as_adam() -> None:
    assert torch.equal(on_two(6)[0][0], on_two(0, method=OnebitAdam)[0][0])


def test_only_their_variance_adapts_after_the_freeze_and_replicas_stay_equal() -> None:
    short, other = on_two(2)
    (_, frozen), _ = on_two(0)
    assert torch.equal(short[0], other[0])
    same = [torch.equal(a, b) for a, b in zip(short[1], frozen, strict=True)]
    assert same == [False, False, True, True, True, True]


def test_a_nan_in_one_of_them_leaves_the_bucket_out_everywhere() -> None:
    first, second = on_two(2, nan_at=4)
    assert torch.equal(first[0], second[0])
    assert first[0].isfinite().all()


def test_other_methods_have_no_such_groups() -> None:
    model = make_model()
    groups = [{"params": list(model.parameters()), "non_freeze": True}]
    onebit, zero_one = (read_legacy(LEGACY[name], {}).method for name in ("onebitadam", "zerooneadam"))
    assert parameter_groups(model, groups, onebit)[0][0]["non_freeze"] is True
    with pytest.raises(ConfigError, match="only OneBitAdam has it"):
        parameter_groups(model, groups, zero_one)
