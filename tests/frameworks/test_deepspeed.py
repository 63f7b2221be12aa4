"""A DeepSpeed engine trains as the plain integration does, whatever its configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_rig import ADAM, SGD, engine_run, legacy, log, make_engine, plain_run, train
from framework_ranks import gathered
from level_rig import machine
from rig import flat, make_model, mean_norm
from told import Quick, assert_chosen
from torch import Tensor

from commopt.errors import AttachError, CheckpointError
from commopt.groups import TorchGroup
from commopt.methods import METHODS, resolve
from commopt.run.checks import connect

STEPS = 6
on_two_ranks = pytest.mark.ranks("deepspeed", 2)
ZERO_ONE = {"var_freeze_step": 3, "var_update_scaler": 1, "local_step_scaler": 1, "local_step_clipper": 2}
UNCORRECTED = {"lr": 0.01, "bias_correction": False}
# configuration, and the method with its options and its optimizer's settings in a plain script
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "OneBitAdam": (legacy("OneBitAdam", freeze_step=3), "onebit_adam", {**UNCORRECTED, "freeze_step": 3}),
    "ZeroOneAdam": (legacy("ZeroOneAdam", **ZERO_ONE), "zero_one_adam", {**UNCORRECTED, **ZERO_ONE}),
    "OneBitLamb": (legacy("OneBitLamb", freeze_step=3), "onebit_lamb", {**UNCORRECTED, "freeze_step": 3}),
    "dgc": ({**SGD, "commopt": {"method": "dgc", "density": 0.1}}, "dgc", {"density": 0.1}),
    "ef_sign": ({**SGD, "commopt": "ef_sign"}, "ef_sign", {}),
    "block in Adam's place": (
        {"optimizer": {"type": "Adam", "params": {"lr": 0.01}}, "commopt": {"onebit_adam": {"freeze_step": 3}}},
        "onebit_adam",
        {"lr": 0.01, "freeze_step": 3},
    ),
    "block in Lion's place": (
        {"optimizer": {"type": "Lion", "params": {"lr": 0.003}}, "commopt": "distributed_lion"},
        "distributed_lion",
        {"lr": 0.003},
    ),
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=on_two_ranks) for case in CASES]
    + [
        pytest.param(case, marks=pytest.mark.ranks("deepspeed", 4), id=f"{case} on 2 machines of 2 ranks")
        for case in ("OneBitAdam", "OneBitLamb", "dgc")
    ],
)
def test_parameters_equal_those_of_the_plain_integration_bit_for_bit(case: str) -> None:
    own, method, options = CASES[case]
    with machine(dist.get_rank() // 2 if dist.get_world_size() == 4 else 0):
        run = engine_run(own, STEPS)
        group = connect(method=resolve(method))
    assert group.per_machine == dist.get_world_size() // 2
    assert torch.equal(run, plain_run(group, method, options, STEPS))
    assert not torch.equal(run, flat(make_model()))


@on_two_ranks
def test_every_door_leads_to_the_same_training() -> None:
    import deepspeed

    import commopt
    from commopt.deepspeed import install

    group = TorchGroup.like()
    expected = plain_run(group, "onebit_adam", {**UNCORRECTED, "freeze_step": 3}, STEPS)
    options = {"freeze_step": 3, "bias_correction": False}
    adam = {"lr": 0.01, "torch_adam": True, "weight_decay": 0.0}
    engine = make_engine({"optimizer": {"type": "Adam", "params": adam}}, ours=False)
    was = engine.optimizer
    run = commopt.attach(engine, {"onebit_adam": options})
    assert run is engine.commopt
    assert run.optimizer is engine.optimizer
    train(engine, STEPS)
    assert torch.equal(flat(engine.module), expected)
    with pytest.raises(AttachError, match="has taken the place"):
        was.step()
    run.close()
    assert engine.optimizer is engine.basic_optimizer is was
    train(engine, 1)  # DeepSpeed's own training goes on
    model = make_model()
    own = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 0.5)
    block = {"commopt": {"method": "onebit_adam", **options}}
    engine = make_engine(block, model=model, optimizer=own, lr_scheduler=schedule)
    train(engine, STEPS)
    assert torch.equal(flat(engine.module), expected)
    original: Any = deepspeed.DeepSpeedEngine.__init__
    install()
    try:
        assert torch.equal(engine_run(legacy("OnebitAdam", freeze_step=3), STEPS, False), expected)
    finally:
        deepspeed.DeepSpeedEngine.__init__ = original
    engine = make_engine(SGD, ours=False)
    commopt.attach(engine, "ef_sign", engine.optimizer)
    train(engine, STEPS)
    assert torch.equal(flat(engine.module), plain_run(group, "ef_sign", {}, STEPS))


HALF: dict[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16, 1.0),
    "fp16": ({"fp16": {"enabled": True, "initial_scale_power": 8}}, torch.float16, 256.0),
    "fp16 with a scale that grows": (
        {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}},
        torch.float16,
        16.0,
    ),
}
CLIPPED = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("case", ["OneBitAdam", "OneBitLamb", "dgc"])
@pytest.mark.parametrize("half", HALF)
@on_two_ranks
def test_masters_take_unscaled_float32_gradients(half: str, case: str) -> None:
    settings, dtype, scale = HALF[half]
    own, method, options = CASES[case]
    run = engine_run({**own, **settings}, STEPS)
    expected = plain_run(TorchGroup.like(), method, options, STEPS, dtype, scale)
    close = "grows" in half  # where float16 rounds at another scale
    assert torch.allclose(run, expected, atol=0.02) if close else torch.equal(run, expected)


@on_two_ranks
def test_clipping_is_by_the_norm_of_the_mean_and_only_at_the_boundary() -> None:
    group = TorchGroup.like()
    run = engine_run({**SGD, "commopt": "dense", **CLIPPED}, STEPS)
    assert torch.equal(run, plain_run(group, "dense", {}, STEPS, clip=0.5, micro_batches=2))
    run = engine_run({**legacy("OneBitAdam", freeze_step=3), **CLIPPED}, STEPS)
    options = {**UNCORRECTED, "freeze_step": 3, "max_norm": 0.5}
    assert torch.equal(run, plain_run(group, "onebit_adam", options, STEPS, micro_batches=2))


@pytest.mark.parametrize("half", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("own", [{**SGD, "commopt": "dense"}, legacy("OneBitAdam")], ids=["dense", "OneBitAdam"])
@on_two_ranks
def test_the_engine_and_the_run_show_the_norm_of_the_mean(own: dict[str, Any], half: dict[str, Any]) -> None:
    engine = make_engine({**own, **half, "gradient_clipping": 0.05})
    assert engine.commopt.grad_norm is None
    train(engine, 1)
    assert engine.commopt.grad_norm == pytest.approx(mean_norm(2, 0), rel=1e-2 if half else 1e-6)
    assert engine.get_global_grad_norm() == engine.commopt.grad_norm


@on_two_ranks
def test_a_method_that_clips_before_it_sends_shows_its_norm_in_half_precision() -> None:
    engine = make_engine({**SGD, "commopt": "signum", "bf16": {"enabled": True}, "gradient_clipping": 0.05})
    train(engine, 1)
    assert mean_norm(2, 0) < engine.commopt.grad_norm == engine.get_global_grad_norm()


def local(engine: Any) -> list[Tensor]:
    state = engine.commopt.saved()
    return [*state["shared"].values(), *state["rank"].values()]


@pytest.mark.parametrize("case", ["OneBitAdam", "ef_sign"])
@on_two_ranks
def test_an_overflow_on_one_rank_is_skipped_on_all_and_harms_no_residual(case: str) -> None:
    engine = make_engine({**CASES[case][0], "fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}})
    train(engine, 4)
    before = [flat(engine.module), *(x.clone() for x in local(engine))]
    train(engine, 1, first=4, poison={4: 1e9})
    assert all(torch.equal(x, y) for x, y in zip(before, [flat(engine.module), *local(engine)], strict=True))
    assert (engine.skipped_steps, engine.optimizer.loss_scale_config.cur_scale) == (1, 128.0)
    train(engine, 2, first=5)
    assert (engine.skipped_steps, engine.commopt.steps) == (1, 6)
    assert engine.commopt.replicas_are_equal()


CHECKPOINTS = {
    "OneBitAdam": CASES["OneBitAdam"][0],
    "ZeroOneAdam between exchanges": legacy(
        "ZeroOneAdam", **{**ZERO_ONE, "var_freeze_step": 2, "local_step_clipper": 4}
    ),
    "dgc": CASES["dgc"][0],
    "ef_sign in bf16": {**CASES["ef_sign"][0], "bf16": {"enabled": True}},
    "ZeroOneAdam in fp16, between exchanges": {**legacy("ZeroOneAdam", **ZERO_ONE), **HALF["fp16"][0]},
    "diloco between rounds": {**ADAM, "commopt": {"method": "diloco", "every": 3}},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
@on_two_ranks
def test_a_loaded_checkpoint_goes_on_bit_for_bit(case: str, tmp_path: Path) -> None:
    engine = make_engine(CHECKPOINTS[case])
    engine.commopt.join()
    train(engine, 5)
    assert torch.equal(*gathered(flat(engine.module))) != ("between" in case)
    engine.save_checkpoint(tmp_path, client_state={"note": 7})
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("commopt*")] == ["global_step5/commopt"]
    train(engine, 3, first=5)
    engine.commopt.close()
    again = make_engine(CHECKPOINTS[case])
    with torch.no_grad():
        for p in again.module.parameters():
            p.add_(1.0)
    _, client_state = again.load_checkpoint(tmp_path)
    again.commopt.join()
    train(again, 3, first=5)
    again.commopt.close()
    assert torch.equal(flat(engine.module), flat(again.module))
    assert client_state["note"] == 7


@pytest.mark.parametrize("half", ["fp32", "bf16", "fp16"])
@on_two_ranks
def test_auto_chooses_and_goes_on_with_its_choice_from_a_checkpoint(
    half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "auto", Quick)
    own = {**SGD, "commopt": "auto", **(HALF[half][0] if half in HALF else {})}
    engine = make_engine(own)
    train(engine, 5)
    engine.save_checkpoint(tmp_path)
    train(engine, 3, first=5)
    assert_chosen(engine.commopt)
    if half == "fp32":
        assert torch.equal(flat(engine.module), plain_run(TorchGroup.like(), "auto", {}, 8))
    again = make_engine(own)
    again.load_checkpoint(tmp_path)
    train(again, 3, first=5)
    assert (again.commopt.method.choice, again.commopt.events) == ("two_way(int8)", [])
    assert torch.equal(flat(engine.module), flat(again.module))


@on_two_ranks
def test_a_checkpoint_without_the_methods_state_is_refused(tmp_path: Path) -> None:
    make_engine(ADAM, ours=False).save_checkpoint(tmp_path, tag="dense")
    engine = make_engine(CASES["OneBitAdam"][0])
    with pytest.raises(CheckpointError, match="holds no state of onebit_adam"):
        engine.load_checkpoint(tmp_path, tag="dense")
    with pytest.raises(CheckpointError, match=r"engine\.save_checkpoint"):
        engine.commopt.save(tmp_path)
    engine.load_checkpoint(tmp_path, tag="dense", load_module_only=True)
    train(engine, 1)


@pytest.mark.parametrize("half", ["fp32", "bf16"])
@on_two_ranks
def test_deepspeed_itself_exchanges_nothing(half: str) -> None:
    from deepspeed import comm

    engine = make_engine({**legacy("OneBitAdam", freeze_step=3), **(HALF[half][0] if half in HALF else {})})
    sent: list[int] = []

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a call of DeepSpeed's")

    def counted(x: Tensor, *args: Any, all_reduce: Any = dist.all_reduce, **kwargs: Any) -> Any:
        sent.append(x.nbytes)
        return all_reduce(x, *args, **kwargs)

    before = engine.commopt.traffic.payload_bytes
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_gather_into_tensor", "reduce"):
            patch.setattr(comm, name, refused)
        patch.setattr(dist, "all_reduce", counted)
        train(engine, 1)
    assert sum(sent) == engine.commopt.traffic.payload_bytes - before  # of 2 ranks each sends its part once
    nbytes = 4 * flat(make_model()).numel()
    assert nbytes <= sum(sent) < nbytes + 64  # the mean gradient, which parameters are used, and whether one overflowed
    assert engine.commopt.replicas_are_equal()


@pytest.mark.parametrize("method", ["diloco", "noloco"])
@on_two_ranks
def test_outer_methods_average_an_engines_replicas(method: str) -> None:
    engine = make_engine({**SGD, "commopt": {"method": method, "every": 3, "final_average": True}})
    run = engine.commopt
    run.join()
    for step in run.range(7):
        train(engine, 1, first=step)
    run.finish()
    assert len(run.reports) >= 2
    assert run.steps == 7
    run.close()
    first, second = gathered(flat(engine.module))
    assert torch.allclose(first, second, atol=1e-6)
    assert not torch.equal(first, flat(make_model()))


@on_two_ranks
def test_exp_avg_mask_holds_the_momentum_at_zero() -> None:
    model = make_model()
    first, *others = model.parameters()
    mask = torch.ones_like(first)
    mask[:, :4] = 0
    groups = [{"params": [first], "exp_avg_mask": mask.flatten()}, {"params": others, "weight_decay": 0.0}]
    engine = make_engine(legacy("OneBitAdam", freeze_step=2), model=model, model_parameters=groups)
    train(engine, 5)
    momentum = engine.commopt.method.entry("0.weight")["momentum"]
    assert not momentum[:, :4].any()
    assert momentum[:, 4:].all()


@on_two_ranks
def test_what_has_no_effect_is_told_once_and_by_rank_0_alone() -> None:
    own = legacy("OneBitAdam", freeze_step=9, bias_correction=True, eps_inside_sqrt=True, comm_backend_name="mpi")
    own |= {"prescale_gradients": True, "communication_data_type": "fp16"}
    with log() as told:
        train(make_engine(own), 2)
    words = ("bias_correction: true", "eps_inside_sqrt: true", "comm_backend_name: 'mpi'", "prescale", "communication")
    for word in words if dist.get_rank() == 0 else ():
        assert len([line for line in told if word in line]) == 1, word
    assert not (told and dist.get_rank())
    with log() as told:
        make_engine(SGD)
    assert any("names no communication method" in line for line in told) == (dist.get_rank() == 0)
