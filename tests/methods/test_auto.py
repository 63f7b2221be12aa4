"""auto: what it measures is told to it here, so that choices are known."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import Pool, twin_of
from rig import flat, make_model, on_gloo, scaled_step, sgd_of, train, train_step
from told import FAST, SLOW, TRIED, Told
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.errors import CheckpointError
from commopt.groups import Group, SimWorld, TorchGroup
from commopt.methods.auto import NAMES, Auto
from commopt.plan.expected import Measured
from commopt.testing import check_method


def trained(group: Group, method: Any, steps: int) -> tuple[Any, list[str], list[Tensor]]:
    """(run, the choice after each step, the parameters after each step)"""
    model = make_model()
    run: Any = attach(model, method, sgd_of(model), group=group)
    choices, states = [], []
    for step in range(steps):
        train_step(model, run.optimizer, group.rank, step)
        choices.append(run.method.choice if isinstance(run.method, Auto) else run.method.name)
        states.append(flat(model))
    return run, choices, states


def choices_of(method: Any, steps: int, ranks: int = 2) -> list[str]:
    """The choices, in their order."""
    every = SimWorld[list[str]](ranks).run(lambda group: trained(group, method(), steps)[1])
    assert all(one == every[0] for one in every)
    return [one for k, one in enumerate(every[0]) if k == 0 or one != every[0][k - 1]]


def test_candidates_are_tried_from_the_fastest_expected_one_on_until_none_is_better() -> None:
    ranks = SimWorld[Any](3).run(lambda group: trained(group, Told(), 12))
    for run, choices, _ in ranks:
        # a quarter of the bytes in 4 bits is expected to be fastest, and is not as fast as that
        assert choices == ["dense", *["two_way(4bit)"] * TRIED, *["two_way(int8)"] * 9]
        assert run.method.is_steady
        assert run.method.state["slower"][3] > 1.5


def test_a_fast_link_keeps_dense_and_times_no_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise AssertionError("a codec was timed")

    monkeypatch.setattr(Told, "_cost", fail)
    monkeypatch.setattr(Told, "times", FAST)
    assert choices_of(Told, 8) == ["dense"]


def test_only_allowed_candidates_are_tried() -> None:
    assert choices_of(lambda: Told(candidates=["fp16"]), 8) == ["dense", "fp16"]


def test_a_gain_below_five_percent_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for step_s, expected in ((0.4775, "dense"), (0.474, "fp16")):
        monkeypatch.setattr(Told, "times", {**SLOW, "fp16": Measured(step_s, 0.2, 0.2)})
        assert choices_of(lambda: Told(candidates=["fp16"]), 8)[-1] == expected


def test_all_ranks_choose_alike_whatever_their_clocks_say() -> None:
    class Differs(Told):
        def bound(self) -> None:
            super().bound()
            factor = 1 + 3 * self.rank  # the last rank alone would see a step that waits for hardly anything
            self.times = {
                key: Measured(x.step_s * factor, x.waited_s / factor, x.exchange_s / factor) for key, x in SLOW.items()
            }

    assert choices_of(Differs, 12, ranks=3)[0] == "dense"


def test_steps_are_those_of_dense_and_from_the_choice_on_of_two_way() -> None:
    def work(group: Group) -> tuple[Tensor, Tensor, bool]:
        run, choices, states = trained(group, Told(candidates=["two_way(int8)"]), 7)
        assert choices == ["dense", *["two_way(int8)"] * 6]
        model = make_model()
        dense: Any = attach(model, "dense", sgd_of(model), group=group)
        train(model, dense.optimizer, group.rank, TRIED)
        before = torch.equal(flat(model), states[TRIED - 1])
        exchanges = dense.method.exchanges.clone()
        dense.close()
        other: Any = attach(model, "two_way(int8)", sgd_of(model), group=group)
        other.method.exchanges.copy_(exchanges)  # by which rounding is drawn
        train(model, other.optimizer, group.rank, 7 - TRIED, TRIED)
        assert run.replicas_are_equal()
        return states[-1], flat(model), before

    for own, expected, before in SimWorld[Any](3).run(work):
        assert before
        assert torch.equal(own, expected)


@pytest.mark.parametrize("steps", [1, 3, 6], ids=["timing dense", "trying 4 bits", "decided"])
def test_a_resumed_run_goes_on_with_its_choice_and_residuals(tmp_path: Path, steps: int) -> None:
    def work(group: Group) -> list[tuple[Tensor, list[Tensor], str]]:
        run, *_ = trained(group, Told(), steps)
        run.save(tmp_path)
        model = make_model()
        resumed: Any = attach(model, Told(), sgd_of(model), group=group)
        resumed.load(tmp_path)
        saved = [*resumed.method.saved()["rank"].values(), resumed.method.state["choice"].clone()]
        assert torch.equal(resumed.method.state["choice"], run.method.state["choice"])
        found = []
        for one in (run, resumed):
            # a decision may come later: what was timed before the checkpoint has to be timed again
            one.method.state["measuring"].zero_()
            train(one.model, one.optimizer, group.rank, 3, steps)
            kept = [view for name in one.parameters for view in one.method.state_views(name)]
            found.append((flat(one.model), kept, one.method.choice))
        assert steps == 1 or len(saved) > 1
        return found

    for (own, kept, choice), (other, others, again) in SimWorld[Any](3).run(work):
        assert choice == again
        assert torch.equal(own, other)
        assert all(torch.equal(x, y) for x, y in zip(kept, others, strict=True))


def test_a_checkpoint_without_residuals_is_refused_before_anything_changes() -> None:
    def work(group: Group) -> str:
        run, *_ = trained(group, Told(), 6)
        saved = run.method.saved()
        other, *_ = trained(group, Told(), 1)
        with pytest.raises(CheckpointError, match="worker_residual: expected a tensor"):
            other.method.check_saved({**saved, "rank": {}})
        return str(other.method.choice)

    assert SimWorld[str](2).run(work) == ["dense", "dense"]


def test_with_fewer_ranks_it_keeps_the_choice_and_what_is_unsent_and_measures_again() -> None:
    every = SimWorld[Any](3).run(lambda group: trained(group, Told(), 8)[0].method.saved())

    def work(group: Group) -> tuple[str, bool, Tensor, Tensor]:
        model = make_model()
        run: Any = attach(model, Told(), sgd_of(model), group=group)
        run.method.resize(every)
        kept = run.method.saved()["rank"]["worker_residual"].clone()
        before, steady = run.method.choice, run.method.is_steady
        train(model, run.optimizer, group.rank, TRIED, 8)
        assert run.method.state["step_s"].count_nonzero() == 1  # of what it goes on with
        return before, steady, kept, flat(model)

    (choice, steady, kept, x), (*_, y) = SimWorld[Any](2).run(work)
    assert (choice, steady, torch.equal(x, y)) == ("two_way(int8)", True, True)
    assert kept.abs().max() > 0


def test_it_is_reconsidered_and_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: Group) -> tuple[list[str], list[int]]:
        method = Told(reconsider=4, candidates=["two_way(int8)"])
        run, choices, _ = trained(group, method, 6)
        assert run.method.state_bytes() > 4 * sum(p.numel() for p in run.parameters.values())
        method.times = {name: Measured(0.1, 0.0001, 0.0002) for name in NAMES}
        for step in range(6, 20):
            train_step(run.model, run.optimizer, group.rank, step)
            choices.append(method.choice)
        assert run.replicas_are_equal()
        assert run.method.state_bytes() < sum(p.numel() for p in run.parameters.values())
        return choices, [told["step"] for _, told in run.events]

    for choices, steps in SimWorld[Any](2).run(work):
        assert choices == ["dense", *["two_way(int8)"] * 8, *["dense"] * 11]
        assert steps == [2, 4, 10]


def test_a_choice_is_an_event_on_all_ranks_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "commopt"):
        ranks = SimWorld[Any](3).run(lambda group: trained(group, Told(candidates=["fp16"]), 10)[0].events)
    expected = [
        "dense takes 500 ms a step, of which 400 ms waiting; fp16 expected 300 ms",
        "fp16 takes 300 ms a step, of which 200 ms waiting",
    ]
    assert (
        ranks
        == [[("choice", {"step": at, "now": "fp16", "because": why}) for at, why in zip((2, 4), expected, strict=True)]]
        * 3
    )
    said = [record.message for record in caplog.records if record.name == "commopt.run.every_step"]
    assert said == [f"auto: step {at}, now fp16, because {why}" for at, why in zip((2, 4), expected, strict=True)]


def test_one_rank_stays_dense_and_is_steady() -> None:
    ((run, choices, _),) = SimWorld[Any](1).run(lambda group: trained(group, Told(), 6))
    assert (set(choices), run.method.is_steady, run.events, run.traffic.payload_bytes) == ({"dense"}, True, [], 0.0)


def test_it_keeps_the_contract_of_methods_while_it_changes() -> None:
    check_method(Told, ranks=(1, 3))


def test_several_ranks_of_a_machine_choose_alike() -> None:
    def work(group: Any) -> tuple[list[str], Tensor]:
        _, choices, states = trained(group.by_machine(2), Told(), 8)
        return choices, states[-1]

    ranks = SimWorld[Any](4).run(work)
    assert {choice for choices, _ in ranks for choice in choices} == {"dense", "two_way(4bit)", "two_way(int8)"}
    assert all(choices == ranks[0][0] and torch.equal(x, ranks[0][1]) for choices, x in ranks)


def plain(group: Group) -> tuple[list[str], Tensor]:
    _, choices, states = trained(group, Told(), 8)
    return choices, states[-1]


def ddp(process_group: Any, is_scaled: bool) -> tuple[list[str], Tensor]:
    torch.set_num_threads(1)
    model = DistributedDataParallel(make_model(), process_group=process_group, bucket_cap_mb=0.001)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10) if is_scaled else None
    group, choices = TorchGroup(twin_of(process_group)), []
    run: Any = attach(model, Told(), sgd_of(model), group=group, grad_scaler=scaler)
    assert (run._lane is None) is is_scaled
    for step in range(8):
        if is_scaled:
            scaled_step(scaler, model, run, step)
        else:
            train_step(model, run.optimizer, run.rank, step)
        choices.append(run.method.choice)
    assert run.replicas_are_equal()
    assert run.voided == []
    run.close()
    return choices, flat(model.module)


def test_ddp_is_plain_and_takes_a_scaler(pool: Pool) -> None:
    expected, found, scaled = pool.run(2, on_gloo, plain), pool.run(2, ddp, False), pool.run(2, ddp, True)
    for (choices, x), (own, y), (again, z) in zip(expected, found, scaled, strict=True):
        assert choices == own == again
        assert torch.equal(x, y)
        assert torch.allclose(x, z, atol=1e-3)


def test_a_model_in_bfloat16_sends_half_and_no_more_by_fp16() -> None:
    def work(group: Group) -> tuple[list[str], float]:
        model = make_model(torch.bfloat16)
        run: Any = attach(model, Told(candidates=["fp16"]), sgd_of(model), group=group)
        before, steps = run.traffic.payload_bytes, 4
        train(model, run.optimizer, group.rank, steps)
        assert run.replicas_are_equal()
        return [told["now"] for _, told in run.events], (run.traffic.payload_bytes - before) / steps / len(flat(model))

    for events, nbytes in SimWorld[Any](2).run(work):
        assert events == ["dense"]
        assert nbytes == pytest.approx(2, rel=0.05)


def test_real_clocks_measure_what_steps_and_exchanges_take() -> None:
    def work(group: Group) -> tuple[Measured, dict[str, float]]:
        method = build("auto", measure=4, reconsider=0)
        assert isinstance(method, Auto)
        trained(group, method, 6)
        return method.watch.read(), {name: method._cost(name, 5000) for name in NAMES}

    for found, costs in SimWorld[Any](2).run(work):
        assert 0 < found.exchange_s <= found.waited_s < found.step_s
        assert all(0 < cost < math.inf for cost in costs.values())
