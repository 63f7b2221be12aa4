"""What a DeepSpeed configuration may say, what it means, and what is refused with the reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deepspeed_rig import Ranks, make_engine, two_ranks
from rig import make_model

from commopt.errors import AttachError, ConfigError
from commopt.frameworks.deepspeed_config import LEGACY, named_groups, read_legacy, read_wanted
from commopt.methods import check_options

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
    assert wanted.method == LEGACY[spelled.lower()].method
    check_options(wanted.method, wanted.options)


def test_old_knobs_keep_their_old_defaults() -> None:
    adam, zero_one, lamb = (
        read_legacy(LEGACY[name], {}).options for name in ("onebitadam", "zerooneadam", "onebitlamb")
    )
    shared = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": False}
    assert adam == {**shared, "freeze_step": 100000}
    assert zero_one == {
        **shared,
        "var_freeze_step": 100000,
        "var_update_scaler": 16,
        "local_step_scaler": 32678,
        "local_step_clipper": 16,
    }
    assert lamb["max_coeff"] == 10.0
    assert lamb["freeze_step"] == 100000


@pytest.mark.parametrize(
    ("configuration", "words"),
    [
        (legacy("OneBitAdam", freze_step=3), "optimizer.params.freze_step: .* did you mean 'freeze_step'"),
        (legacy("OneBitAdam", var_freeze_step=3), "OneBitAdam has no such option"),
        (legacy("OneBitAdam", amsgrad=True), "amsgrad"),
        (legacy("OneBitLamb", max_grad_norm=1.0), "gradient_clipping"),
        (legacy("ZeroOneAdam", comm_backend_name="ncl"), "'ncl' is no backend; did you mean 'nccl'"),
        (legacy("OneBitAdam", cuda_aware="yes"), "cuda_aware: 'yes'"),
        ({**legacy("OneBitAdam"), "commopt": {"method": "dgc"}}, "leave out the 'commopt' block"),
        ({**DGC, "commopt": {"method": "dcg"}}, "unknown method 'dcg'; did you mean 'dgc'"),
        ({**DGC, "commopt": {"method": "dgc", "densty": 1}}, "did you mean 'density'"),
        ({"commopt": {"method": "dgc"}}, "optimizer: is missing"),
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
    model = make_model()
    first, second, *_ = model.parameters()
    mask = torch.rand(first.shape).round()
    for given in (mask, mask.flatten()):
        wanted = read_legacy(LEGACY["onebitadam"], {})
        groups = named_groups(model, [{"params": first, "exp_avg_mask": given, "lr": 0.5}], wanted)
        assert torch.equal(wanted.options["momentum_mask"]["0.weight"], mask)
        assert groups == [{"lr": 0.5, "params": [("0.weight", first)]}]
    with pytest.raises(ConfigError, match="a group of its own"):
        named_groups(model, [{"params": [first, second], "exp_avg_mask": mask}], wanted)
    with pytest.raises(ConfigError, match="not this model's"):
        named_groups(model, [torch.zeros(3)], wanted)


def test_a_method_takes_over_what_the_configurations_adam_has() -> None:
    adam = {"type": "AdamW", "params": {"lr": 0.5, "betas": [0.8, 0.9], "torch_adam": True, "weight_decay": 0.1}}
    wanted = read_wanted({"optimizer": adam, "commopt": {"method": "onebit_adam", "lr": 0.25}}, None)
    assert wanted is not None
    assert wanted.options == {"lr": 0.25, "betas": [0.8, 0.9], "weight_decay": 0.1}
    adam["params"] = {"lr": 0.5, "adam_w_mode": False, "weight_decay": 0.1}
    with pytest.raises(ConfigError, match="adam_w_mode"):
        read_wanted({"optimizer": adam, "commopt": "onebit_adam"}, None)


def test_the_names_on_torch_optim_train_nothing_by_themselves() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what DeepSpeed's imports say of torch
        import commopt.frameworks.deepspeed  # noqa: F401

    for name in ("OneBitAdam", "OneBitLamb", "ZeroOneAdam"):
        with pytest.raises(ConfigError, match="its engine hands the exchange over"):
            getattr(torch.optim, name)(make_model().parameters(), lr=1e-3)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stage 1": ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage: 1: after each step"),
    "stage 2": ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: 2: gradients are split"),
    "stage 3": ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage: 3"),
    "offload": ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    "sum": ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: 'sum'"),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.dtype"),
    "deepcompile": ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
    "outer in bf16": ({"bf16": {"enabled": True}, "commopt": {"method": "noloco"}}, "bf16.enabled: true: noloco"),
    "two norms": (
        {**ADAM, "commopt": {"method": "onebit_adam", "max_norm": 2.0}, "gradient_clipping": 1.0},
        "max_norm: 2.0 is not the gradient_clipping",
    ),
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
            make_engine({**DGC, **own})
        except (AttachError, ConfigError) as error:
            told[name] = str(error)
    return told


def refused_of_engines() -> list[str]:
    """Misuse of an engine that is fine in itself."""
    import torch.distributed as dist

    import commopt

    engine = make_engine(DGC)
    told = []

    def other_method() -> None:
        commopt.attach(engine, "ef_sign")

    def other_optimizer() -> None:
        commopt.attach(make_engine(ADAM, ours=False), "powersgd", torch.optim.SGD(make_model().parameters(), lr=1.0))

    def built_update_method() -> None:
        model = make_model()
        commopt.attach(make_engine(ADAM, ours=False), commopt.build("onebit_adam", model.named_parameters()))

    def one_rank_differs() -> None:
        commopt.attach(make_engine(ADAM, ours=False), "powersgd", bucket_bytes=1000 + dist.get_rank())

    def one_rank_fails() -> None:
        commopt.attach(make_engine(ADAM, ours=False), "powersgd" if dist.get_rank() else "powersdg")

    for act in (
        engine.allreduce_gradients,
        other_method,
        other_optimizer,
        built_update_method,
        one_rank_differs,
        one_rank_fails,
    ):
        try:
            act()
        except (AttachError, ConfigError) as error:
            told.append(str(error))
    return told


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    ranks = two_ranks()  # the same ones in all files
    yield ranks
    ranks.close()


def test_what_cannot_work_is_refused_at_the_start_on_every_rank(two: Ranks) -> None:
    for told in two.run(refused):
        assert {name for name, (_, words) in REFUSED.items() if words not in told.get(name, "")} == set()


def test_misuse_of_an_engine_is_refused(two: Ranks) -> None:
    words = [
        "at engine.step()",
        "already",
        "is not this engine's",
        "is an optimizer itself",
        "bucket_bytes",
        "powersdg",
    ]
    for told in two.run(refused_of_engines):
        assert len(told) == len(words)
        assert [word for word, text in zip(words, told, strict=True) if word not in text] == []


def test_without_deepspeed_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['deepspeed'] = None; import commopt.frameworks.deepspeed"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'commopt[deepspeed]'" in done.stderr.splitlines()[-1]
