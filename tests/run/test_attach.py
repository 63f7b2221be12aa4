"""What attach and build refuse, with the fix in the message, and what attach leaves behind."""

from __future__ import annotations

import copy
import io
import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from pool import Pool
from rig import flat, make_model, on_gloo, train
from rig import sgd_of as sgd
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.errors import AttachError, CommoptError, ConfigError, GradientsChanged
from commopt.groups import Group, LocalGroup, SimGroup, SimWorld, TorchGroup
from commopt.optim import LAMB, Lion


def made(kind: Any, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: kind(model.parameters(), **options)


adam = made(torch.optim.Adam)
float64 = partial(make_model, torch.float64)


def stepped_adam(model: nn.Module) -> torch.optim.Adam:
    optimizer: torch.optim.Adam = made(torch.optim.Adam, amsgrad=True)(model)
    train(model, optimizer, 0, 1)
    optimizer.param_groups[0]["amsgrad"] = False
    return optimizer


def of(
    method: Any, optimizer: Callable[[Any], Any] = sgd, model: Callable[[], Any] = make_model, **given: Any
) -> Callable[[], object]:
    """An attempt to attach a method with an optimizer to a model."""

    def attempt() -> None:
        made = model()
        attach(made, method, optimizer(made), **given)

    return attempt


def twice(name: str) -> Callable[[], object]:
    """An attempt to attach to one model again."""
    model = make_model()
    return lambda: [attach(model, name, sgd(model)) for _ in range(2)]


def to_two(name: str) -> Callable[[], object]:
    """An attempt to attach one method to two models."""
    method = build(name)
    return lambda: [attach(model, method, sgd(model)) for model in (make_model(), make_model())]


def channels_last() -> nn.Module:
    return nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def with_buffer(x: Tensor) -> nn.Module:
    model = make_model()
    model.register_buffer("mask", x)
    return model


def stood_in_for(model: nn.Module) -> torch.optim.Optimizer:
    return attach(model, "onebit_adam", adam(model)).optimizer


class SAM(torch.optim.Optimizer):
    """Steps an optimizer inside it by the gradient a small way uphill, and has no step of its own."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p] = p.clone()
            p += 0.05 * p.grad / p.grad.norm()
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, before in self.state.items():
            p.copy_(before)
        self.base_optimizer.step()
        self.zero_grad()


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 3, sparse=True))


def masked(*shape: int) -> Any:
    return {"name": "onebit_adam", "momentum_mask": {"0.weight": torch.ones(shape)}}


def a_momentum_in_the_second_group(model: nn.Module) -> torch.optim.Optimizer:
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": others, "momentum": 0.9}]
    return torch.optim.SGD(groups, lr=0.1)


BEFORE = r"dgc .* before it chooses.*"
PLAIN = r".*torch\.optim\.SGD\(parameters, lr=1e-4\) without momentum"
NORM = r"max_norm: .* is out of range; write a number above 0, or leave it out"
REFUSED: list[tuple[Callable[[], object], str]] = [
    *((twice(name), r"attached to this model already; close\(\) what attach returned") for name in ("dense", "noloco")),
    (to_two("ef_sign"), "this ef_sign: it was attached to a model before; build another"),
    (to_two("noloco"), "this noloco: it was attached to a model before; build another"),
    (of("ef_sign", lambda _: None), r"ef_sign: pass the .* \(it is missing\); write attach\(model, 'ef_sign', opt"),
    (of("onebit_adam", lambda _: None), r"pass the .* \(it is missing\); write attach\(model, 'onebit_adam', opt"),
    (of("noloco", lambda _: None), r"noloco: pass the .* \(it is missing\); write attach\(model, 'noloco', opt"),
    (of("dense", lambda model: sgd(model[0])), r"without the trainable parameter 2\.weight: attach takes one"),
    (of("diloco", lambda model: sgd(model[0])), r"without the trainable parameter 2\.weight: attach takes one"),
    (of("dense", model=lambda: make_model().requires_grad_(False)), "no trainable parameter"),
    (of("noloco", model=lambda: make_model().requires_grad_(False)), "no trainable parameter"),
    (of("dense", lambda _: None, lambda: [1, 2]), r"model: got list, expected a module \(plain, .*Lightning takes"),
    (of("xyz"), r"unknown method 'xyz'; known: auto, choco, decentralized_adam, demo, dense, dgc, .*onebit_adam"),
    (of("ef_sign", lambda _: 0.1), r"ef_sign: pass the optimizer of your training \(got float\)"),
    (of("dense", lambda _: sgd(make_model())), r"not this model's: .*; build it from model\.parameters"),
    (
        of("dense", lambda model: torch.optim.SGD([*model.parameters(), *make_model().parameters()], lr=0.1)),
        r"not this model's: .*; build it from model\.parameters",
    ),
    (of("ef_sign", model=channels_last), r"weight: it is not contiguous in memory .*call \.contiguous\(\)"),
    (of("dense", model=sparse), r"0: sparse gradients are not supported; build the embedding with sparse=False"),
    (of("dense", model=lambda: nn.Linear(3, 3, dtype=torch.complex64)), "weight: torch.complex64 .* are not supported"),
    (
        of("dense", model=lambda: with_buffer(torch.ones(2, device="meta"))),
        "parameters or buffers on the meta device: .*; give them storage first",
    ),
    *(
        (
            of(name, kind, float64),
            rf"0\.weight: torch\.float64 parameters: {name} works in float32, .*; use dense, or",
        )
        for name, kind in (("ef_sign", sgd), ("onebit_adam", adam), ("local_sgd", sgd), ("choco", sgd))
    ),
    *((of("dense", max_norm=value), NORM) for value in (0, -1.0, math.nan, True, "1")),
    (
        of("dense", grad_scaler=1024.0),
        r"grad_scaler: float has no get_scale\(\); pass the torch\.amp\.GradScaler itself",
    ),
    (of("dense", overlap="yes"), r"overlap: 'yes' is out of range; write True, False, or leave it out"),
    (of("dense", overlap=True), r"overlap=True with a model that is not wrapped in DDP: .*; leave overlap out"),
    (of("noloco", overlap=True), r"overlap=True with a model that is not wrapped in DDP"),
    (of("dice_sgd", max_norm=1.0), r"max_norm with dice_sgd: .*use the method's clip_norm"),
    (of("dense", group=7), r"group: int is not a commopt\.groups\.Group"),
    (of("dense", group=SimGroup(SimWorld(1), 0).peers), "group: Peers with dense: it exchanges .*use an outer method"),
    (of("noloco", grad_scaler=torch.amp.GradScaler("cpu")), "grad_scaler with noloco: .*; leave grad_scaler out"),
    *((of(masked(*shape), adam), r"is of shape \(40, 12\)") for shape in ((3, 3), (2, 40, 12), (40,))),
    # what an update method stands in for
    (of("onebit_adam"), r"for Adam or AdamW, not for SGD: pass torch\.optim\.AdamW\(model\.parameters\(\), \.\.\.\)"),
    (of("onebit_adam", made(torch.optim.Adagrad)), r"onebit_adam stands in for Adam or AdamW, not for Adagrad"),
    (of("zero_one_adam", made(torch.optim.NAdam)), "not for NAdam"),
    (of("onebit_lamb", adam), r"stands in for LAMB or Lamb or FusedLamb, not for Adam: pass commopt\.optim\.LAMB"),
    (of("distributed_lion", adam), r"distributed_lion stands in for Lion, not for Adam: pass commopt\.optim\.Lion"),
    (of("demo", adam), r"demo stands in for SGD, not for Adam: pass torch\.optim\.SGD"),
    (of("demo", made(torch.optim.RMSprop)), "stands in for SGD, not for RMSprop"),
    (of("onebit_adam", made(torch.optim.Adam, amsgrad=True)), "onebit_adam: amsgrad=True of Adam has no counterpart"),
    (of("onebit_adam", made(torch.optim.AdamW, maximize=True)), "maximize=True of AdamW has no counterpart; leave it"),
    (of("demo", made(torch.optim.SGD, momentum=0.9)), r"demo: momentum=0\.9 of SGD has no counterpart"),
    (
        of("onebit_adam", made(torch.optim.Adam, weight_decay=0.1)),
        r"weight_decay=0\.1 of Adam goes into the gradient; .* as AdamW does: use AdamW",
    ),
    (of("onebit_adam", stepped_adam), "Adam after steps: onebit_adam cannot go on from a state of .*max_exp_avg_sq"),
    (of("onebit_adam", stood_in_for), "a stand-in as the optimizer: it is onebit_adam's already; pass the optimizer"),
    (of("dense", made(torch.optim.LBFGS)), "LBFGS: it evaluates the loss several times"),
    (of("noloco", made(SAM)), "SAM as the optimizer: it is a wrapper; .*, or pass the optimizer inside"),
    (
        of("diloco", model=lambda: with_buffer(torch.eye(2).to_sparse())),
        "the buffer mask: it is sparse or quantized, .* make it a dense tensor",
    ),
    # a second momentum, or another scale
    (of("dgc", made(torch.optim.SGD, momentum=0.9)), rf"{BEFORE}use torch.optim.SGD without momentum$"),
    (of({"name": "dgc", "momentum": 0.9}, adam), rf"{BEFORE}SGD without momentum"),
    (of({"name": "dgc", "nesterov": True}, adam), rf"{BEFORE}SGD without momentum"),
    (
        of({"name": "dgc", "momentum": 0.9}, made(torch.optim.Adafactor)),
        "Adafactor would apply its own on top: leave momentum, nesterov and decay_momentum out with Adafactor",
    ),
    (of("ef21", made(torch.optim.SGD, momentum=0.9)), "without momentum, or write eta: 1"),
    (of("signum", made(torch.optim.SGD, momentum=0.9)), rf"SGD with momentum 0\.9 would smooth signs{PLAIN}"),
    (of("signum", a_momentum_in_the_second_group), r"SGD with momentum 0\.9"),
    (of("signum", made(torch.optim.RMSprop, momentum=0.5)), rf"RMSprop with momentum 0\.5 would smooth signs{PLAIN}"),
    *(
        (of("signum", made(kind)), f"{kind.__name__} scales what it gets{PLAIN}")
        for kind in (torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Rprop)
    ),
    *((of("signum", made(kind)), f"{kind.__name__} scales what it gets{PLAIN}") for kind in (Lion, LAMB)),
]


@pytest.mark.parametrize(("attempt", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_attach_refuses_what_it_cannot_serve(attempt: Callable[[], object], said: str) -> None:
    with pytest.raises((AttachError, ConfigError), match=said):
        attempt()


def test_a_package_that_is_imported_in_part_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers is, whose Trainer takes seconds to import."""

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> None:
            raise AssertionError(f"{name} is imported")

    monkeypatch.setitem(sys.modules, "transformers", Lazy("transformers"))
    attach(model := make_model(), "dense", sgd(model)).close()


def test_a_refused_model_and_optimizer_are_as_before() -> None:
    model = make_model()
    optimizer = sgd(model)
    for refused in ("onebit_adam", "dgc(0.5", "dens"):
        with pytest.raises(CommoptError):
            attach(model, refused, optimizer)
    attach(model, "dense", optimizer)  # nothing was left behind that forbids it
    train(model, optimizer, 0, 1)


@pytest.mark.parametrize("name", ["ef_sign", "noloco"])
def test_a_closed_model_trains_alone_and_can_have_another_method(name: str) -> None:
    model = make_model()
    optimizer = sgd(model)
    first = attach(model, name, optimizer)
    first.join()
    train(model, optimizer, 0, 2)
    first.close()
    train(model, optimizer, 0, 1)
    second = attach(model, "dense", optimizer, group=LocalGroup())
    train(model, optimizer, 0, 2)
    assert (first.steps, second.steps) == (2, 2)


def test_a_scaler_in_a_plain_script_of_several_ranks_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(AttachError, match="wrap the model in DistributedDataParallel"):
        SimWorld[object](2).run(lambda group: of("dense", group=group, grad_scaler=scaler)())


@pytest.mark.parametrize("name", ["dense", "noloco"])
def test_all_start_with_the_parameters_and_buffers_of_rank_0(name: str) -> None:
    def work(group: SimGroup) -> Tensor:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                x.fill_(group.rank + 5)
        assert attach(model, name, sgd(model), group=group).join() == 0
        return torch.cat([x.detach().reshape(-1).double() for x in (*model.parameters(), *model.buffers())])

    for x in SimWorld[Any](3).run(work):
        assert x.eq(5).all()


# -- what a script does around an attached model


def test_an_update_method_takes_no_closure_of_its_own() -> None:
    model = make_model()
    run = attach(model, "onebit_adam", adam(model), group=LocalGroup())
    before = flat(model)
    with pytest.raises(AttachError, match="takes no closure here"):
        run.optimizer.step(lambda: 0.0)
    assert torch.equal(before, flat(model))


def test_an_attached_model_can_be_copied_and_saved() -> None:
    model = make_model()
    attach(model, "dense", sgd(model))
    copied = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    attach(copied, "dense", sgd(copied))


def test_sam_trains_by_the_optimizer_inside_and_a_void_step_leaves_no_trace(caplog: pytest.LogCaptureFixture) -> None:
    def work(group: SimGroup) -> Tensor:
        model = make_model()
        sam = SAM(model.parameters())
        run = attach(model, "ef_sign", sam.base_optimizer, group=group)
        for step in range(4):
            for move in (sam.first_step, sam.second_step):
                backward(model, 2 * step + group.rank)
                if (step, group.rank) == (2, 1):
                    next(model.parameters()).grad[0] = math.nan  # type: ignore[index]
                move()
        assert (run.steps, [step for step, _ in run.voided]) == (4, [2])
        return flat(model)

    one, other = SimWorld[Tensor](2).run(work)
    assert torch.equal(one, other)
    assert bool(one.isfinite().all())
    assert "parameters change" not in caplog.text


def with_buffers(group: Group) -> list[Tensor]:
    model = make_model()
    kinds = [torch.bool, torch.int16, torch.uint16, torch.float8_e4m3fn, torch.bfloat16, torch.complex64]
    for k, dtype in enumerate(kinds):
        model.register_buffer(f"b{k}", torch.full((), float(group.rank) + 1).to(dtype))
    attach(model, "dense", sgd(model), group=group).close()
    return [x.to(torch.complex64) for x in model.buffers()]


def test_buffers_of_any_dtype_become_those_of_rank_0(pool: Pool) -> None:
    assert pool.run(2, on_gloo, with_buffers) == [[torch.ones((), dtype=torch.complex64)] * 6] * 2


def backward(model: nn.Module, rank: int = 0) -> None:
    model(torch.randn(4, 12, generator=torch.Generator().manual_seed(rank))).square().mean().backward()


def test_a_gradient_that_is_replaced_is_seen() -> None:
    model = make_model()
    run: Any = attach(model, "onebit_adam", adam(model))
    backward(model)
    run.exchange_gradients()
    weight = model.get_parameter("0.weight")
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(GradientsChanged, match=r"0\.weight: the gradient was changed"):
        run.optimizer.step()


@pytest.mark.parametrize("name", ["dense", "diloco"])
def test_a_parameter_that_is_unfrozen_later_is_refused(name: str) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    attach(model, name, optimizer).join()
    model[0].requires_grad_(True)
    backward(model)
    with pytest.raises(AttachError, match="a parameter that was frozen at attach has a gradient"):
        optimizer.step()


def test_a_skipped_step_leaves_no_gradient_unexchanged() -> None:
    def work(group: SimGroup) -> Tensor:
        model = make_model()
        run: Any = attach(model, "dense", sgd(model), group=group)
        backward(model, group.rank)
        run.exchange_gradients()  # and no step: a loss that was not to be trusted
        run.optimizer.zero_grad()
        backward(model, 10 + group.rank)
        run.optimizer.step()
        return flat(model)

    one, other = SimWorld[Tensor](2).run(work)
    assert torch.equal(one, other)


def small_gradient(pg: Any) -> float:
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    wrapped = DistributedDataParallel(model, process_group=pg)
    optimizer = sgd(model)
    run = attach(wrapped, "fp16", optimizer, group=TorchGroup(pg), grad_scaler=scaler)
    loss = wrapped(torch.ones(1, 12)).sum() * 1e-8
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grad = model.get_parameter("4.bias").grad
    assert grad is not None
    run.close()
    return float(grad[0])


def test_loss_scaling_keeps_small_gradients_in_half_precision(pool: Pool) -> None:
    assert pool.run(2, small_gradient) == [pytest.approx(1e-8, rel=1e-2)] * 2


def own_traffic(pg: Any) -> dict[str, float]:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    wrapped = DistributedDataParallel(model, process_group=pg, find_unused_parameters=True)
    optimizer = sgd(model)
    with pytest.raises(AttachError, match="DDP's own process group"):
        attach(wrapped, "ef_sign", optimizer, group=TorchGroup(pg))
    run = attach(wrapped, "ef_sign", optimizer, group=TorchGroup(pg), overlap=False)
    for _ in range(3):
        wrapped(torch.randn(4, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = run.traffic.as_dict()["by_operation"]
    run.close()
    return {row["bucket"]: row["bytes"] for row in rows if row["bucket"].startswith("DDP")}


def test_what_ddp_itself_sends_is_counted(pool: Pool) -> None:
    buffers, used = 3 * (2 * 6 * 4 + 8), 3 * 7 * 4
    assert pool.run(2, own_traffic) == [
        {"DDP's buffers": buffers, "DDP's unused parameters": used},
        {"DDP's buffers": 0, "DDP's unused parameters": used},
    ]
