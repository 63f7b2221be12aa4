"""0/1 Adam against its equations in float64, against Adam, and in the middle of its local steps."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from codes import SignExchange
from pool import Pool, twin_of
from rig import make_model, scaled_step, start, train_step
from synthetic import F64, Shapes, check_free_run, check_steps, flat, gradients, parameters, simulate, snapshot, stacked
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commopt.groups import Group, SimWorld, TorchGroup

B1, B2, EPS, DECAY = 0.9, 0.99, 1e-6, 0.02
FREEZE, KAPPA, SCALER, CLIPPER, STEPS = 10, 3, 5, 4, 60
SHAPES: list[tuple[int, ...]] = [(41, 51), (7,), (1,), (0,), (3, 5, 3)]


def rate_of(step: int) -> float:
    """A rate that changes in every step and is 0 for a while: in part of an interval, and in a whole one."""
    return 0.0 if 33 <= step < 43 else 0.01 * (1 + 0.5 * math.sin(step))


def planned(steps: int) -> list[str]:
    """What each step is, by the counters of the released code (microsoft/DeepSpeed, zoadam.py)."""
    kinds: list[str] = []
    var_interval, var_counter, local_interval, local_counter = 1, 0, 1, 0
    for t in range(1, steps + 1):
        if t <= FREEZE:
            kinds.append("exact" if t % var_interval == 0 else "compressed")
            var_counter += kinds[-1] == "exact"
            if var_counter == KAPPA:
                var_counter, var_interval = 0, 2 * var_interval
        else:
            kinds.append("sync" if t % local_interval == 0 else "local")
            local_counter += 1
            if local_counter == SCALER:
                local_counter, local_interval = 0, min(CLIPPER, 2 * local_interval)
    return kinds


def reference(scale: str, corrects: bool, shapes: Shapes, step: int, before: list[dict[str, Any]]) -> Any:
    """Lu et al. 2022, Algorithm 1, in float64. Returns the state after a step, and (n,) where no sign is in doubt.

    Of each rank, as rows, are x, the momentum and u, the mean of it, in local steps; rate and kept are sums since the common point.
    """
    kind, lr, t, one = planned(step + 1)[-1], rate_of(step), step + 1, before[0]
    g = gradients(shapes, len(before), step, mean=0.5, dead=2)
    x, m, u = (stacked(before, key) for key in ("x", "momentum", "mean_momentum"))
    v, common, updates = one["variance"], one["common"] if one["local_steps"] else one["x"], one["variance_step"]
    exchange = SignExchange.of(before, [math.prod(shape) for shape in shapes], scale)
    exchange.margin, live = np.full(v.size, np.inf), v > 0
    if kind == "exact":
        g, live = np.broadcast_to(g.mean(0), g.shape), np.ones_like(live)
        v, updates = B2 * v + (1 - B2) * g[0] ** 2, updates + 1
    elif kind == "compressed":
        g = np.broadcast_to(exchange.mean(g), g.shape)
    root = np.sqrt(v / (1 - B2**updates) if corrects else v) + EPS
    r, kept = lr / (1 - B1**t) if corrects else lr, 1 - lr * DECAY
    m = B1 * m + (1 - B1) * (g if kind == "sync" else g * live)
    rate = one["rate"] * kept + r
    u = (u * one["rate"] * kept + r * m) / rate if rate else m
    x, kept = x * kept - r * m / root, one["kept"] * kept
    if kind == "local":
        numbers = {"rate": rate, "kept": kept, "local_steps": one["local_steps"] + 1}
        return (
            {"x": x, "momentum": m, "mean_momentum": u, "common": common, **numbers},
            exchange.margin > 1e-4,
            exchange,
        )
    x, m = x[0], m[0]
    if kind == "sync":
        m = exchange.mean(u) * live
        x = kept * common - rate * m / root
    if t == FREEZE:  # residuals of gradients are none of the momentum
        exchange.e[:], exchange.s[:] = 0.0, 0.0
    numbers = {"rate": 0.0, "kept": 1.0, "local_steps": 0, "variance_step": updates}
    state = {"x": x, "momentum": m, "mean_momentum": np.zeros_like(x), "variance": v, **numbers}
    return state, exchange.margin > 1e-4, exchange


def given(**changes: Any) -> dict[str, Any]:
    options = {"betas": (B1, B2), "eps": EPS, "weight_decay": DECAY, "var_freeze_step": FREEZE}
    policy = {"var_update_scaler": KAPPA, "local_step_scaler": SCALER, "local_step_clipper": CLIPPER}
    return {**options, **policy, **changes}


def sent_by(group: Group) -> float:
    """Bytes, without those that say which parameters are used."""
    nbytes = group.traffic.nbytes.items()
    return sum(n for (_, _, bucket), n in nbytes if bucket != "which parameters are used")


def state_of(run: Any) -> dict[str, Any]:
    first = run.method.entry("all.0")
    numbers = {key: first[key] for key in ("rate", "kept", "local_steps", "variance_step")}
    return {**snapshot(run), **numbers, "is_synchronised": run.method.is_synchronised, "sent": sent_by(run.group)}


def train(ranks: int, steps: int, shapes: Shapes = SHAPES, **options: Any) -> list[list[dict[str, Any]]]:
    """[rank][step] the state before each step, and after the last."""
    seen: dict[str, Any] = {"rate_of": rate_of, "observe": state_of}
    return simulate(ranks, shapes, steps, "zero_one_adam", parameters, **seen, **given(**options))


@pytest.mark.parametrize(("scale", "corrects"), [("rms", True), ("l2", False)])
def test_every_step_is_the_papers_from_the_state_before_it(scale: str, corrects: bool) -> None:
    runs = train(4, STEPS, scale=scale, bias_correction=corrects, max_ratio=None)
    near: dict[str, Any] = {"rtol": 2e-5, "atol": 5e-6, "tolerances": {"variance": (2e-5, 1e-9)}}
    check_steps(runs, partial(reference, scale, corrects, SHAPES), share=0.99, residual_atol=2e-5, **near)
    for step, kind in enumerate(planned(STEPS)):
        for run in runs:
            sent = run[step + 1]["sent"] - run[step]["sent"]
            assert (sent == 0) == (kind == "local"), f"step {step + 1}, {kind}, sent {sent} bytes"
            assert run[step + 1]["is_synchronised"] == (kind != "local")
        if kind == "local" and rate_of(step) > 0:
            assert not any(np.array_equal(run[step + 1]["x"], runs[0][step + 1]["x"]) for run in runs[1:])


def test_the_interval_of_exchanges_doubles_each_time_the_rate_has_halved() -> None:
    rates, intervals = zip(
        *[(0.5, 1), (1, 1), (1, 1), (0.6, 1), (0.5, 2), (0.3, 2), (0.25, 4), (0.1, 8), (0.05, 8), (0, 8), (1, 1)],
        strict=True,
    )

    seen: dict[str, Any] = {
        "rate_of": lambda step: 0.01 * rates[step],
        "observe": lambda run: run.method.local_interval,
    }
    options = {"var_freeze_step": 2, "local_step_clipper": 8}
    for _, *found in simulate(2, [(5,)], len(rates), "zero_one_adam", parameters, **seen, **options):
        assert found == list(intervals)


@pytest.mark.parametrize("scale", ["rms", "l2"])
def test_a_short_run_stays_with_the_reference(scale: str) -> None:
    runs = train(4, STEPS, [(5,), (3,)], scale=scale)
    check_free_run(runs, partial(reference, scale, True, [(5,), (3,)]), STEPS, rtol=1e-3, atol=1e-4)


def test_one_rank_uses_its_gradient_in_every_step_of_both_phases_and_takes_no_local_ones() -> None:
    states = train(1, STEPS)[0]
    x, m, v = states[0]["x"], np.zeros_like(states[0]["x"]), np.zeros_like(states[0]["x"])
    updates = 0
    for step, kind in enumerate(planned(STEPS)):
        g, lr = gradients(SHAPES, 1, step, mean=0.5, dead=2)[0], rate_of(step)
        if kind == "exact":
            v, updates = B2 * v + (1 - B2) * g**2, updates + 1
        m = B1 * m + (1 - B1) * g
        root = np.sqrt(v / (1 - B2**updates)) + EPS
        x = x * (1 - lr * DECAY) - lr / (1 - B1 ** (step + 1)) * m / root
        np.testing.assert_allclose(states[step + 1]["x"], x, rtol=1e-4, atol=1e-5)
        assert states[step + 1]["is_synchronised"]
    assert states[-1]["sent"] == 0.0


def test_another_number_of_ranks_goes_on_from_the_mean_of_the_local_steps() -> None:
    def attached(group: Group) -> tuple[nn.Module, Any]:
        model = parameters((40, 30), (7,), (0,), (9,))
        return model, start(model, "zero_one_adam", group, **given())

    def train(model: Any, run: Any, steps: range) -> None:
        for step in steps:
            model.set_gradients(run.group.rank, step)
            run.optimizer.step()

    def leave(group: Group) -> Any:
        model, run = attached(group)
        train(model, run, range(26))
        return copy.deepcopy((model.state_dict(), run.optimizer.state_dict(), run.method.saved()))

    states = SimWorld[Any](3).run(leave)

    def join(group: Group) -> tuple[F64, bool]:
        model, run = attached(group)
        model.load_state_dict(states[0][0])
        run.optimizer.load_state_dict(copy.deepcopy(states[0][1]))
        run.method.resize([copy.deepcopy(saved) for *_, saved in states])
        joined = {key: run.method.state[key] for key in ("momentum", "mean_momentum")}
        joined["parameters"] = torch.from_numpy(flat(run.parameters.values()))
        for key, x in joined.items():
            mean = torch.stack([saved["rank"][f"own {key}"].double() for *_, saved in states]).mean(0)
            torch.testing.assert_close(x.double(), mean, rtol=1e-6, atol=1e-12)
        train(model, run, range(26, 28))
        return flat(run.parameters.values()), run.method.is_synchronised

    (one, is_synchronised), (other, _) = SimWorld[Any](2).run(join)
    assert is_synchronised
    assert np.array_equal(one, other)


def test_replicas_are_made_equal_at_any_time_and_train_on() -> None:
    def work(group: Group) -> Any:
        model = parameters((40, 30), (7,), (0,), (9,))
        run = start(model, "zero_one_adam", group, lr=0.01, **given())
        seen = []
        for step in range(40):
            model.set_gradients(group.rank, step)
            run.optimizer.step()
            if step in (24, 25, 27):  # after 1 local step, 1 more, and an exchange
                before = state_of(run)
                run.method.synchronise(group)
                seen.append((before, state_of(run)))
        assert run.method.is_synchronised
        return seen, model.flat()

    results = SimWorld[Any](3).run(work)
    for k in range(3):
        rows = [seen[k] for seen, _ in results]
        mean = np.mean([before["mean_momentum"] for before, _ in rows], axis=0)
        for before, after in rows:
            assert after["is_synchronised"]
            assert np.array_equal(after["x"], rows[0][1]["x"])
            assert (after["sent"] == before["sent"]) == np.array_equal(before["x"], after["x"]) == (k == 2)
            if k < 2:
                assert 0.009 < before["rate"] < 0.011
                m, root = after["momentum"], np.sqrt(before["variance"] / (1 - B2 ** before["variance_step"])) + EPS
                expected = before["kept"] * before["common"] - before["rate"] * m / root
                np.testing.assert_allclose(after["x"], expected, rtol=1e-5, atol=1e-6)
                assert float((m * mean).sum()) / np.linalg.norm(m) / np.linalg.norm(mean) > 0.3
    assert all(np.array_equal(x, results[0][1]) for _, x in results)


def trained_with_nan(nan_at: int, bad_rank: int, steps: int, bucket_bytes: int = 100) -> list[Any]:
    """[rank] (what was void, parameters and sums before and after the step with the NaN, parameters at the end)"""

    def work(group: Group) -> Any:
        model = parameters((40, 30), (7,))
        run = start(model, "zero_one_adam", group, lr=0.01, **given())
        run.bucket_bytes, method = bucket_bytes, run.method  # by default a bucket for each parameter
        around = []
        for step in range(steps):
            model.set_gradients(group.rank, step)
            if (step, group.rank) == (nan_at, bad_rank):
                assert model.all[0].grad is not None
                model.all[0].grad[3, 4] = math.nan
            before = copy.deepcopy(run.optimizer.state_dict()["state"])
            run.optimizer.step()
            if step == nan_at:
                around = [before, copy.deepcopy(run.optimizer.state_dict()["state"])]
        return run.voided, around, model.flat(), method.is_synchronised, method.applied_steps

    return SimWorld[Any](3).run(work)


def test_a_nan_in_a_local_step_is_left_out_on_its_own_rank_and_no_rank_waits() -> None:
    assert planned(STEPS)[25:28] == ["local", "local", "sync"]
    results = trained_with_nan(26, 1, 28)
    for rank, (voided, (before, after), x, is_synchronised, applied) in enumerate(results):
        assert voided == ([(26, "all.0")] if rank == 1 else [])
        assert torch.equal(before[0]["momentum"], after[0]["momentum"]) == (rank == 1)
        assert not torch.equal(before[1]["momentum"], after[1]["momentum"])
        assert (after[0]["local_steps"], after[0]["rate"]) == (3, after[1]["rate"])
        assert is_synchronised
        assert applied == 28
        assert np.isfinite(x).all()
        assert np.array_equal(x, results[0][2])


def test_a_nan_at_an_exchange_leaves_its_bucket_to_the_next_exchange_on_all_ranks() -> None:
    assert planned(STEPS)[27] == planned(STEPS)[31] == "sync"
    results = trained_with_nan(27, 1, 28)
    for voided, (before, after), x, is_synchronised, applied in results:
        assert voided == [(27, "all.0")]
        assert not is_synchronised
        assert applied == 28
        for key in ("momentum", "mean_momentum", "common", "rate", "local_steps"):
            assert np.array_equal(before[0][key], after[0][key])
        assert (after[0]["local_steps"], after[1]["local_steps"]) == (3, 0)
        assert np.array_equal(x[-7:], results[0][2][-7:])
    assert not np.array_equal(results[0][2], results[1][2])
    for _, _, x, is_synchronised, _ in (later := trained_with_nan(27, 1, 32)):
        assert is_synchronised
        assert np.array_equal(x, later[0][2])


def test_a_step_void_in_every_bucket_is_taken_again_and_ranks_stay_in_step() -> None:
    results = trained_with_nan(27, 2, 29, bucket_bytes=2**20)
    assert all((len(voided), applied, done) == (1, 28, True) for voided, _, _, done, applied in results)
    assert all(np.array_equal(results[0][2], x) for _, _, x, _, _ in results)


def test_in_local_steps_every_rank_clips_its_own_norm_and_still_sends_nothing() -> None:
    def work(group: Group) -> Any:
        model = parameters((40,))
        run = start(model, "zero_one_adam", group, lr=0.01, max_norm=0.5, **given())
        method = run.method
        for step in range(28):
            model.set_gradients(group.rank, step)
            assert model.all[0].grad is not None
            model.all[0].grad *= 100
            before, nbytes = np.asarray(method.state["momentum"].double()).copy(), sent_by(group)
            is_local = method.is_local
            run.optimizer.step()
            g = (np.asarray(method.state["momentum"].double()) - B1 * before) / (1 - B1)
            if is_local:
                assert sent_by(group) == nbytes
                assert float(np.linalg.norm(g)) == pytest.approx(0.5, rel=1e-4)
        return model.flat()

    results = SimWorld[Any](2).run(work)
    assert np.array_equal(results[0], results[1])


def bytes_by_step(group: Group, steps: int, **options: Any) -> tuple[list[float], list[tuple[bool, bool]], Any]:
    """Per step: bytes per parameter, and (steady before it, synchronised after it); and the method."""
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(512, 512))
    run, sent, states = start(model, "zero_one_adam", group, **options), list[float](), list[tuple[bool, bool]]()
    for step in range(steps):
        was_steady = run.method.is_steady
        model.w.grad = torch.randn(512, 512, generator=torch.Generator().manual_seed(step + 100 * group.rank))
        before = sent_by(group)
        run.optimizer.step()
        sent.append((sent_by(group) - before) / 512**2)
        states.append((was_steady, run.method.is_synchronised))
    return sent, states, run.method


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_bytes_per_parameter_are_the_formula(ranks: int) -> None:
    options = {"var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": 4}
    results = SimWorld[Any](ranks).run(lambda group: bytes_by_step(group, 16, **options))
    formula = 2 * (ranks - 1) / ranks * (1 / 8 + 4 / 2048) / 4
    for sent, states, method in results:
        assert [n > 0 for n in sent] == [True, True, True, True] + [False, False, False, True] * 3
        assert [was_steady for was_steady, _ in states] == [False] * 2 + [True] * 14
        assert method.warmup_steps == 2
        assert method.bytes_per_parameter(ranks) == pytest.approx(formula)
    assert sum(sum(sent[4:]) / 12 for sent, _, _ in results) / ranks == pytest.approx(formula, rel=0.02)


def test_phase_a_alone_sends_signs_but_for_its_rare_exact_steps() -> None:
    options = {"var_freeze_step": None, "var_update_scaler": 2}
    for sent, states, method in SimWorld[Any](2).run(lambda group: bytes_by_step(group, 24, **options)):
        exact = [t for t, n in enumerate(sent, 1) if n == 4.0]
        assert exact == [1, 2, 4, 6, 8, 12, 16, 24]  # the interval doubles after every two
        assert method.is_steady
        assert all(is_synchronised for _, is_synchronised in states)
        formula = method.bytes_per_parameter(2)
        rest = [n for n in sent if n != 4.0]
        assert rest == pytest.approx([formula] * len(rest), rel=0.02)


def train_network(run: Any, model: nn.Module, steps: int) -> tuple[F64, list[bool]]:
    """The network's parameters, and in which steps this rank sent more than which parameters are used."""
    sends = []
    for step in range(steps):
        before = sent_by(run.group)
        train_step(model, run.optimizer, run.group.rank, step)
        sends.append(sent_by(run.group) > before)
    return flat(run.parameters.values()), sends


def train_in_ddp(process_group: dist.ProcessGroup, steps: int, options: dict[str, Any]) -> tuple[F64, list[bool]]:
    model = DistributedDataParallel(make_model(), process_group=process_group, bucket_cap_mb=0.002)
    run = start(model, "zero_one_adam", TorchGroup(twin_of(process_group)), **given(**options))
    try:
        return train_network(run, model, steps)
    finally:
        run.close()


@pytest.mark.parametrize("options", [{}, {"scale": "model", "prescale": True}])
def test_ddp_is_plain_on_every_rank_and_sends_nothing_in_local_steps(pool: Pool, options: dict[str, Any]) -> None:
    def work(group: Group) -> tuple[F64, list[bool]]:
        model = make_model()
        return train_network(start(model, "zero_one_adam", group, **given(**options)), model, 27)

    expected = SimWorld[Any](2).run(work)
    for (x, sends), (y, others) in zip(pool.run(2, train_in_ddp, 27, options), expected, strict=True):
        assert np.array_equal(x, y)
        assert sends == others == [kind != "local" for kind in planned(27)]
    assert not np.array_equal(expected[0][0], expected[1][0])  # in the middle of an interval


def train_scaled(process_group: dist.ProcessGroup, bad_steps: list[int]) -> tuple[F64, int, list[float], list[int]]:
    """32 steps with a GradScaler, where rank 1's loss overflows in some."""
    model = DistributedDataParallel(make_model(), process_group=process_group)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    run = start(model, "zero_one_adam", TorchGroup(twin_of(process_group)), lr=0.01, grad_scaler=scaler, **given())
    scales = []
    for step in range(32):
        scaled_step(scaler, model, run, step, math.inf if run.rank == 1 and step in bad_steps else 1.0)
        scales.append(scaler.get_scale())
    assert run.replicas_are_equal() == run.method.is_synchronised
    run.close()
    return flat(run.parameters.values()), run.method.applied_steps, scales, [step for step, _ in run.voided]


def test_with_a_grad_scaler_an_overflow_on_one_rank_leaves_all_ranks_in_step(pool: Pool) -> None:
    """In a local step nobody else knows of it; at an exchange all ranks skip the step, lower the scale, and take it again."""
    assert planned(28)[25:] == ["local", "local", "sync"]
    for bad_steps, applied, last_scale in (([26], 32, 8.0), ([25, 26, 27], 31, 4.0)):
        results = pool.run(2, train_scaled, bad_steps)
        for rank, (x, steps, scales, voided) in enumerate(results):
            assert np.isfinite(x).all()
            assert steps == applied
            assert scales[-1] == last_scale
            assert voided == [step for step in bad_steps if rank == 1 or step == 27]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_equal_after_every_exchange(dtype: torch.dtype) -> None:
    def seen(run: Any) -> tuple[bool, F64]:
        return run.method.is_synchronised, flat(run.parameters.values())

    def make(*shapes: tuple[int, ...]) -> Any:
        return parameters(*shapes).to(dtype)

    runs = simulate(3, [(40, 30), (7,)], 28, "zero_one_adam", make, observe=seen, lr=0.01, **given())
    first, *exchanged = ([x for is_equal, x in step if is_equal] for step in zip(*runs, strict=True))
    assert (first[0][2:] != exchanged[-1][0][2:]).mean() > 0.9
    assert [len(one) for one in exchanged] == [0 if kind == "local" else 3 for kind in planned(28)]
    assert all(np.array_equal(x, one[0]) for one in exchanged for x in one)
