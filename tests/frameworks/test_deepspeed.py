"""A DeepSpeed engine trains as the plain integration does, whatever its configuration names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed_rig import engine_run, make_engine, plain_run, train
from pool import Pool
from rig import flat, make_model
from torch import Tensor

from commopt.groups import SimWorld, TorchGroup

STEPS = 6
SGD = {"type": "SGD", "params": {"lr": 0.05}}


def old(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {"lr": 0.01, **params}}}


ZERO_ONE = {"var_freeze_step": 3, "var_update_scaler": 1, "local_step_scaler": 1, "local_step_clipper": 2}
UNCORRECTED = {"lr": 0.01, "bias_correction": False}
# configuration, and the method with its options and its optimizer's settings in a plain script
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "OneBitAdam": (old("OneBitAdam", freeze_step=3), "onebit_adam", {**UNCORRECTED, "freeze_step": 3}),
    "ZeroOneAdam": (old("ZeroOneAdam", **ZERO_ONE), "zero_one_adam", {**UNCORRECTED, **ZERO_ONE}),
    "OneBitLamb": (old("OneBitLamb", freeze_step=3), "onebit_lamb", {**UNCORRECTED, "freeze_step": 3}),
    "dgc": ({"optimizer": SGD, "commopt": {"method": "dgc", "density": 0.1}}, "dgc", {"density": 0.1}),
    "ef_sign": ({"optimizer": SGD, "commopt": "ef_sign"}, "ef_sign", {}),
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


def simulated(n: int, *arguments: Any, **options: Any) -> list[Tensor]:
    return SimWorld[Tensor](n, timeout_s=60).run(lambda group: plain_run(group, *arguments, **options))


def all_runs(cases: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: engine_run(case[0], STEPS) for name, case in cases.items()}


def both_runs(cases: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    group = TorchGroup.like()  # sums of four ranks depend on who carries them
    return {
        name: (engine_run(own, STEPS), plain_run(group, method, options, STEPS))
        for name, (own, method, options) in cases.items()
    }


@pytest.mark.parametrize("n", [2, 4])
def test_parameters_equal_those_of_the_plain_integration_bit_for_bit(n: int, deepspeed_ranks: Pool) -> None:
    cases = CASES if n == 2 else {name: CASES[name] for name in ("OneBitAdam", "OneBitLamb", "dgc")}
    runs = deepspeed_ranks.run(n, both_runs, cases)
    for own in runs:
        assert [name for name, (engine, plain) in own.items() if not torch.equal(engine, plain)] == []
        assert all(not torch.equal(engine, flat(make_model())) for engine, _ in own.values())


def other_doors() -> dict[str, Tensor]:
    import deepspeed

    import commopt
    from commopt.deepspeed import install

    found = {}
    options = {"freeze_step": 3, "bias_correction": False}
    adam = {"lr": 0.01, "torch_adam": True, "weight_decay": 0.0}
    engine = make_engine({"optimizer": {"type": "Adam", "params": adam}}, ours=False)
    was = engine.optimizer
    run = commopt.attach(engine, {"onebit_adam": options})
    assert run is engine.commopt
    assert run.optimizer is engine.optimizer
    train(engine, STEPS)
    found["attach by name"] = flat(engine.module)
    with pytest.raises(commopt.errors.AttachError, match="has taken the place"):
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
    found["client Adam with a scheduler"] = flat(engine.module)
    engine = make_engine({"optimizer": SGD}, ours=False)
    commopt.attach(engine, "ef_sign", engine.optimizer)
    train(engine, STEPS)
    found["ef_sign by attach"] = flat(engine.module)
    original: Any = deepspeed.DeepSpeedEngine.__init__
    assert install() == ("deepspeed.DeepSpeedEngine.__init__",)
    assert install() == ()
    try:
        found["install"] = engine_run(old("OnebitAdam", freeze_step=3), STEPS, False)
    finally:
        deepspeed.DeepSpeedEngine.__init__ = original
    return found


def test_every_door_leads_to_the_same_training(deepspeed_ranks: Pool) -> None:
    expected = simulated(2, "onebit_adam", {**UNCORRECTED, "freeze_step": 3}, STEPS)[0]
    signs = simulated(2, "ef_sign", {}, STEPS)[0]
    for found in deepspeed_ranks.run(2, other_doors):
        assert [name for name, x in found.items() if not torch.equal(x, signs if "ef" in name else expected)] == []


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


@pytest.mark.parametrize("half", HALF)
def test_masters_take_unscaled_float32_gradients(half: str, deepspeed_ranks: Pool) -> None:
    own, dtype, scale = HALF[half]
    cases = {name: ({**CASES[name][0], **own},) for name in ("OneBitAdam", "OneBitLamb", "dgc")}
    runs = deepspeed_ranks.run(2, all_runs, cases)
    for name in cases:
        _, method, options = CASES[name]
        expected = simulated(2, method, options, STEPS, dtype, scale)
        close = "grows" in half  # where float16 rounds at another scale
        for run, other in zip(runs, expected, strict=True):
            assert torch.allclose(run[name], other, atol=0.02) if close else torch.equal(run[name], other), name


def test_clipping_is_by_the_norm_of_the_mean_and_only_at_the_boundary(deepspeed_ranks: Pool) -> None:
    dense = {"optimizer": SGD, "commopt": "dense", **CLIPPED}
    adam = {**old("OneBitAdam", freeze_step=3), **CLIPPED}
    runs = deepspeed_ranks.run(2, all_runs, {"dense": (dense,), "onebit_adam": (adam,)})
    expected = simulated(2, "dense", {}, STEPS, clip=0.5, micro_batches=2)
    assert torch.equal(runs[0]["dense"], expected[0])
    options = {**UNCORRECTED, "freeze_step": 3, "max_norm": 0.5}
    expected = simulated(2, "onebit_adam", options, STEPS, micro_batches=2)
    assert torch.equal(runs[0]["onebit_adam"], expected[0])


def overflown(own: dict[str, Any]) -> tuple[Any, ...]:
    engine = make_engine({**own, "fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}})
    train(engine, 4)
    before = [flat(engine.module), *(x.clone() for x in local(engine))]
    train(engine, 1, first=4, poison={4: 1e9})
    after = [flat(engine.module), *local(engine)]
    unharmed = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    skipped, scale = engine.skipped_steps, engine.optimizer.loss_scale_config.cur_scale
    train(engine, 2, first=5)
    return unharmed, skipped, scale, engine.skipped_steps, engine.commopt.replicas_are_equal(), engine.commopt.steps


def local(engine: Any) -> list[Tensor]:
    state = engine.commopt.saved()
    return [*state["shared"].values(), *state["rank"].values()]


@pytest.mark.parametrize("case", ["OneBitAdam", "ef_sign"])
def test_an_overflow_on_one_rank_is_skipped_on_all_and_harms_no_residual(case: str, deepspeed_ranks: Pool) -> None:
    assert deepspeed_ranks.run(2, overflown, CASES[case][0]) == [(True, 1, 128.0, 1, True, 6)] * 2


def resumed(own: dict[str, Any], folder: str, first: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
    engine = make_engine(own)
    train(engine, first)
    engine.save_checkpoint(folder, client_state={"note": 7})
    train(engine, 3, first=first)
    on = flat(engine.module).float()
    engine.commopt.close()
    again = make_engine(own, model=make_model().apply(lambda module: None))
    with torch.no_grad():
        for p in again.module.parameters():
            p.add_(1.0)
    _, client_state = again.load_checkpoint(folder)
    train(again, 3, first=first)
    return on, flat(again.module).float(), client_state


CHECKPOINTS = {
    "OneBitAdam": CASES["OneBitAdam"][0],
    "ZeroOneAdam between exchanges": old("ZeroOneAdam", **{**ZERO_ONE, "var_freeze_step": 2, "local_step_clipper": 4}),
    "dgc": CASES["dgc"][0],
    "ef_sign in bf16": {**CASES["ef_sign"][0], "bf16": {"enabled": True}},
    "ZeroOneAdam in fp16": {**old("ZeroOneAdam", **ZERO_ONE), **HALF["fp16"][0]},
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_loaded_checkpoint_goes_on_bit_for_bit(case: str, deepspeed_ranks: Pool, tmp_path: Path) -> None:
    for on, again, client_state in deepspeed_ranks.run(2, resumed, CHECKPOINTS[case], str(tmp_path), 5):
        assert torch.equal(on, again)
        assert client_state["note"] == 7
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("commopt*")] == ["global_step5/commopt"]


def foreign_checkpoints(folder: str) -> list[str]:
    from commopt.errors import CheckpointError

    adam = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}}
    make_engine(adam, ours=False).save_checkpoint(folder, tag="dense")
    told = []
    engine = make_engine(CASES["OneBitAdam"][0])
    for act, options in ((engine.load_checkpoint, {"tag": "dense"}), (engine.commopt.save, {})):
        try:
            act(folder, **options)
        except CheckpointError as error:
            told.append(str(error))
    engine.load_checkpoint(folder, tag="dense", load_module_only=True)
    train(engine, 1)
    return told


def test_a_checkpoint_without_the_methods_state_is_refused(deepspeed_ranks: Pool, tmp_path: Path) -> None:
    for missing, other in deepspeed_ranks.run(2, foreign_checkpoints, str(tmp_path)):
        assert "saved without onebit_adam's state" in missing
        assert "engine.save_checkpoint" in other


def counted(own: dict[str, Any]) -> tuple[list[str], float, bool]:
    """What DeepSpeed and torch are asked to send while an engine trains: names of calls, our own bytes, equal replicas."""
    from deepspeed import comm

    engine = make_engine(own)
    calls: list[str] = []

    def spy(name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return called

    names = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_gather_into_tensor", "reduce")
    originals = {name: getattr(comm, name) for name in names}
    ours = dist.all_reduce
    sent: list[int] = []

    def count(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(x.nbytes)
        return ours(x, *args, **kwargs)

    for name in names:
        setattr(comm, name, spy(name))
    before, dist.all_reduce = engine.commopt.traffic.payload_bytes, count  # type: ignore[assignment]
    train(engine, 1)
    dist.all_reduce = ours
    for name in names:
        setattr(comm, name, originals[name])
    assert sum(sent) == engine.commopt.traffic.payload_bytes - before  # of 2 ranks each sends its part once
    return calls, sum(sent), engine.commopt.replicas_are_equal()


@pytest.mark.parametrize("half", ["fp32", "bf16"])
def test_deepspeed_itself_exchanges_nothing(half: str, deepspeed_ranks: Pool) -> None:
    own = {**old("OneBitAdam", freeze_step=3), **(HALF[half][0] if half in HALF else {})}
    nbytes = 4 * flat(make_model()).numel()
    for calls, sent, is_equal in deepspeed_ranks.run(2, counted, own):
        assert calls == []
        assert nbytes <= sent < nbytes + 64  # the mean gradient, which parameters are used, and whether one overflowed
        assert is_equal


def outer(own: dict[str, Any]) -> tuple[int, int, Tensor]:
    engine = make_engine(own)
    run = engine.commopt
    run.join()
    for step in run.range(7):
        train(engine, 1, first=step)
    run.finish()
    rounds = len(run.reports)
    run.close()
    return rounds, run.steps, flat(engine.module)


@pytest.mark.parametrize("method", ["diloco", "noloco"])
def test_outer_methods_average_an_engines_replicas(method: str, deepspeed_ranks: Pool) -> None:
    block = {"method": method, "every": 3, "final_average": True}
    first, second = deepspeed_ranks.run(2, outer, {"optimizer": SGD, "commopt": block})
    assert torch.allclose(first[2], second[2], atol=1e-6)
    assert not torch.equal(first[2], flat(make_model()))
    assert all(rounds >= 2 and steps == 7 for rounds, steps, _ in (first, second))


def resumed_replicas(folder: str) -> tuple[Tensor, Tensor, Tensor]:
    adam = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}
    own = {"optimizer": adam, "commopt": {"method": "diloco", "every": 3}}
    engine = make_engine(own)
    engine.commopt.join()
    train(engine, 5)  # two steps after a round: replicas differ
    engine.save_checkpoint(folder)
    saved = flat(engine.module)
    train(engine, 4, first=5)
    on = flat(engine.module)
    engine.commopt.close()
    again = make_engine(own)
    again.load_checkpoint(folder)
    again.commopt.join()
    train(again, 4, first=5)
    again.commopt.close()
    return saved, on, flat(again.module)


def test_under_an_outer_method_a_checkpoint_keeps_every_ranks_replica(deepspeed_ranks: Pool, tmp_path: Path) -> None:
    first, second = deepspeed_ranks.run(2, resumed_replicas, str(tmp_path))
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(on, again) for _, on, again in (first, second))


def never_joined() -> str:
    from commopt.errors import AttachError

    engine = make_engine({"optimizer": SGD, "commopt": "noloco"})
    try:
        train(engine, 1)
    except AttachError as error:
        return str(error)
    finally:
        engine.commopt.close()
    return ""


def test_an_outer_method_that_nobody_joins_raises_at_the_first_step(deepspeed_ranks: Pool) -> None:
    assert all("run.join()" in told for told in deepspeed_ranks.run(2, never_joined))


def masked() -> dict[str, Any]:
    model = make_model()
    first, *others = model.parameters()
    mask = torch.ones_like(first)
    mask[:, :4] = 0
    groups = [{"params": [first], "exp_avg_mask": mask.flatten()}, {"params": others, "weight_decay": 0.0}]
    engine = make_engine(old("OneBitAdam", freeze_step=2), model=model, model_parameters=groups)
    train(engine, 5)
    return {"momentum": engine.commopt.method.entry("0.weight")["momentum"].clone()}


def test_exp_avg_mask_holds_the_momentum_at_zero(deepspeed_ranks: Pool) -> None:
    for state in deepspeed_ranks.run(2, masked):
        assert not state["momentum"][:, :4].any()
        assert state["momentum"][:, 4:].all()


def logged(own: dict[str, Any]) -> list[str]:
    told: list[str] = []
    log = logging.getLogger("commopt")
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        train(make_engine(own), 2)
    finally:
        log.removeHandler(handler)
    return told


def test_what_has_no_effect_is_told_once_and_by_rank_0_alone(deepspeed_ranks: Pool) -> None:
    own = old("OneBitAdam", freeze_step=9, bias_correction=True, eps_inside_sqrt=True, comm_backend_name="mpi")
    own |= {"prescale_gradients": True, "communication_data_type": "fp16"}
    told, nothing = deepspeed_ranks.run(2, logged, own)
    assert nothing == []
    for word in (
        "bias_correction: true",
        "eps_inside_sqrt: true",
        "comm_backend_name: 'mpi'",
        "prescale",
        "communication",
    ):
        assert len([line for line in told if word in line]) == 1, word
    assert any(
        "names no communication method" in line for line in deepspeed_ranks.run(2, logged, {"optimizer": SGD})[0]
    )
