"""What attach and build refuse, in words that name the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from rig import flat, make_model, train, wrapped
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commopt import attach, build
from commopt.errors import AttachError, CommoptError, ConfigError
from commopt.groups import LocalGroup, SimGroup, SimWorld, TorchGroup
from commopt.methods import METHODS


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def adam(model: nn.Module, **options: Any) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), **options)


def of(method: Any, optimizer: Callable[[nn.Module], Any] = sgd, **given: Any) -> Callable[[], None]:
    """An attempt to attach a method with an optimizer to the small model."""

    def attempt() -> None:
        model = make_model()
        attach(model, method, optimizer(model), **given)

    return attempt


def attach_twice() -> None:
    model = make_model()
    attach(model, "dense", sgd(model))
    attach(model, "dense", sgd(model))


def attach_to_no_model() -> None:
    attach([1, 2], "dense", sgd(make_model()))  # type: ignore[arg-type]


def attach_a_frozen_model() -> None:
    model = make_model()
    optimizer = sgd(model)
    model.requires_grad_(False)
    attach(model, "dense", optimizer)


def attach_with_some_foreign_parameters() -> None:
    model, other = make_model(), make_model()
    attach(model, "dense", torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1))


def attach_channels_last() -> None:
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    attach(model, "ef_sign", sgd(model))


def attach_a_sparse_embedding() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    attach(model, "dense", sgd(model))


def attach_complex_parameters() -> None:
    model = nn.Linear(3, 3, dtype=torch.complex64)
    attach(model, "dense", sgd(model))


def attach_float64(name: str) -> Callable[[], None]:
    def attempt() -> None:
        model = make_model(torch.float64)
        attach(model, name, adam(model) if name == "onebit_adam" else sgd(model))

    return attempt


def attach_to_what_stands_in_already() -> None:
    model = make_model()
    run = attach(model, "onebit_adam", adam(model))
    attach(model, "onebit_adam", run.optimizer)


def attach_after_a_step() -> None:
    model = make_model()
    optimizer = adam(model)
    train(model, optimizer, 0, 1)
    attach(model, "onebit_adam", optimizer)


REFUSED: list[tuple[Callable[[], None], str]] = [
    (attach_twice, r"attached to this model already; close\(\) what attach returned first"),
    (attach_to_no_model, r"model: got list, expected a module \(plain, DDP or FSDP2\), .*Lightning takes"),
    (attach_a_frozen_model, r"no trainable parameter"),
    (
        of("ef_sign", lambda _: None),
        r"ef_sign: pass the optimizer of your training \(it is missing\): attach\(model, 'ef_sign', opt",
    ),
    (of("ef_sign", lambda _: 0.1), r"ef_sign: pass the optimizer of your training \(got float\)"),
    (of("dense", lambda _: sgd(make_model())), r"not this model's; build it from model\.parameters"),
    (attach_with_some_foreign_parameters, r"not this model's; build it from model\.parameters"),
    (of("onebit_adam", lambda _: adam(make_model())), r"not this model's; build it from model\.parameters"),
    (
        of("onebit_adam", lambda model: torch.optim.Adam([*model.parameters()][:3])),
        r"the optimizer does not hold the trainable parameter 2\.bias; attach takes one optimizer",
    ),
    (attach_channels_last, r"weight is not contiguous in memory .*call \.contiguous\(\)"),
    (attach_a_sparse_embedding, r"0: sparse gradients are not supported; build the embedding with sparse=False"),
    (attach_complex_parameters, r"weight: torch\.complex64 parameters are not supported"),
    (attach_float64("ef_sign"), r"0\.weight: ef_sign works in float32, .* torch\.float64; use dense"),
    (attach_float64("onebit_adam"), r"0\.weight: onebit_adam works in float32, .* torch\.float64; use dense"),
    (of("dense", max_norm=0), r"max_norm: 0 is out of range; write a number above 0, or leave it out"),
    (
        of("dense", grad_scaler=1024.0),
        r"grad_scaler: float has no get_scale\(\); pass the torch\.amp\.GradScaler itself",
    ),
    (of("dense", overlap="yes"), r"overlap: 'yes' is out of range; write True, False, or leave it out"),
    (of("dense", overlap=True), r"overlap=True with a model that is not wrapped in DDP: .*; leave overlap out"),
    (of("dice_sgd", max_norm=1.0), r"max_norm with dice_sgd: .*use the method's clip_norm"),
    (of("dense", group=7), r"group: int is not a commopt\.groups\.Group"),
    # what an update method stands in for
    (
        of("onebit_adam"),
        r"onebit_adam stands in for Adam or AdamW, not for SGD: pass torch\.optim\.AdamW\(model\.parameters\(\), \.\.\.\)",
    ),
    (of("onebit_adam", lambda model: torch.optim.Adagrad(model.parameters())), r"for Adam or AdamW, not for Adagrad"),
    (of("onebit_lamb", adam), r"onebit_lamb stands in for LAMB or .*, not for Adam: pass commopt\.optim\.LAMB"),
    (of("distributed_lion", adam), r"distributed_lion stands in for Lion, not for Adam: pass commopt\.optim\.Lion"),
    (of("demo", adam), r"demo stands in for SGD, not for Adam: pass torch\.optim\.SGD"),
    (
        of("onebit_adam", lambda model: adam(model, amsgrad=True)),
        r"onebit_adam: amsgrad=True of Adam has no counterpart; leave it out",
    ),
    (of("demo", lambda model: sgd(model, momentum=0.9)), r"demo: momentum=0\.9 of SGD has no counterpart"),
    (
        of("onebit_adam", lambda model: adam(model, weight_decay=0.1)),
        r"weight_decay=0\.1 of Adam goes into the gradient; .*: use AdamW",
    ),
    (attach_after_a_step, r"onebit_adam cannot take the place of Adam after steps: attach before the first one"),
    (attach_to_what_stands_in_already, r"the optimizer is onebit_adam's already: pass the Adam that it stands in for"),
    # a second momentum
    (of("dgc", lambda model: sgd(model, momentum=0.9)), r"not SGD with one$"),
    (
        of({"name": "dgc", "momentum": 0.9}, lambda model: torch.optim.Adafactor(model.parameters())),
        r"Adafactor would apply its own on top: leave momentum and nesterov out with Adafactor",
    ),
]


@pytest.mark.parametrize(("attempt", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_attach_refuses_what_it_cannot_serve(attempt: Callable[[], None], said: str) -> None:
    with pytest.raises((AttachError, ConfigError), match=said):
        attempt()


def test_a_refused_model_and_optimizer_are_as_before() -> None:
    model = make_model()
    optimizer = sgd(model)
    for refused in ("onebit_adam", "dgc(0.5", "dens"):
        with pytest.raises(CommoptError):
            attach(model, refused, optimizer)
    attach(model, "dense", optimizer)  # nothing was left behind that forbids it
    train(model, optimizer, 0, 1)


def test_a_closed_model_can_have_another_method() -> None:
    model = make_model()
    optimizer = sgd(model)
    first = attach(model, "ef_sign", optimizer, group=LocalGroup())
    train(model, optimizer, 0, 2)
    first.close()
    second = attach(model, "dense", optimizer, group=LocalGroup())
    train(model, optimizer, 0, 2)
    assert (first.steps, second.steps) == (2, 2)


def test_a_scaler_in_a_plain_script_of_several_ranks_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu")

    def work(group: SimGroup) -> None:
        model = make_model()
        attach(model, "dense", sgd(model), group=group, grad_scaler=scaler)

    with pytest.raises(AttachError, match="wrap the model in DistributedDataParallel"):
        SimWorld[None](2).run(work)


def test_attach_gives_every_rank_the_parameters_and_buffers_of_rank_0() -> None:
    def work(group: SimGroup) -> torch.Tensor:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                x.fill_(group.rank + 5)
        attach(model, "dense", sgd(model), group=group)
        return torch.cat([x.detach().reshape(-1).double() for x in (*model.parameters(), *model.buffers())])

    for x in SimWorld[Any](3).run(work):
        assert x.eq(5).all()


def in_ddp(process_group: dist.ProcessGroup, what: str) -> str:
    try:
        if what == "twice":
            with wrapped(process_group, "dense") as (model, _, run):
                attach(model, "dense", sgd(model.module), group=run.group)
        model = DistributedDataParallel(make_model(), process_group=process_group)
        if what == "inside":
            outside = nn.Sequential(model)
            attach(outside, "dense", sgd(outside), group=TorchGroup(process_group))
        if what == "foreign":
            attach(model, "dense", sgd(make_model()), group=TorchGroup(process_group))
        if what == "outer":
            attach(model, "noloco", sgd(model), group=TorchGroup(process_group))
        if what == "optimizer of the wrapper":
            attach(model, "onebit_adam", adam(model), group=TorchGroup.like(process_group)).close()
    except CommoptError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("twice", "AttachError: a DDP model with a communication hook: DDP takes only one"),
        ("inside", "AttachError: Sequential has a DistributedDataParallel inside (0)"),
        ("foreign", "AttachError: the optimizer holds parameters that are not this model's"),
        ("outer", "AttachError: noloco on a DistributedDataParallel model"),
        ("optimizer of the wrapper", ""),
    ],
)
def test_ddp_refuses_what_does_not_fit(pool: Pool, what: str, said: str) -> None:
    for answer in pool.run(2, in_ddp, what):
        assert answer.startswith(said) if said else answer == ""


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("onebit_adm", {}, r"unknown method 'onebit_adm'; did you mean 'onebit_adam'\?"),
        ("xyz", {}, r"unknown method 'xyz'; known: choco, decentralized_adam, demo, dense, dgc, .*onebit_adam"),
        ("ef_sign", {"block_sise": 64}, r"method ef_sign: unknown option 'block_sise'; did you mean 'block_size'\?"),
        ("dense", {"scale": "l1"}, r"method dense: unknown option 'scale'"),
        (
            "dense",
            {"max_norm": 1.0},
            r"method dense: max_norm: is not an option .*; write commopt\.attach\(\.\.\., max_norm=\.\.\.\)",
        ),
        (
            "onebit_adam",
            {"lr": 0.1},
            r"method onebit_adam: lr: is not an option .*; set it on the optimizer that you pass to attach",
        ),
        ("ef_sign", {"scale": "linf"}, r"scale: 'linf' .*write 'l1'"),
        ("ef_sign", {"block_size": 100}, r"block_size: 100 .* multiple of 8"),
        ("fp16", {"dtype": "float61"}, r"dtype: 'float61' .*'float16'"),
        ("onebit_adam", {"freeze_step": 0}, r"freeze_step: 0 is out of range; write a whole number from 1, or 'auto'"),
        ("onebit_adam", {"freeze_step": "soon"}, r"freeze_step: 'soon' is out of range"),
        ("onebit_adam", {"freeze_step": True}, r"freeze_step: True is out of range"),
    ],
)
def test_build_says_what_is_wrong_with_an_option(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(name, **options)
    model = make_model()
    with pytest.raises(ConfigError, match=said):
        attach(model, {"name": name, **options}, sgd(model))


def test_a_method_is_a_name_a_block_a_class_or_made_already() -> None:
    for choice in ("dgc", {"name": "dgc"}, METHODS["dgc"], build("dgc")):
        model = make_model()
        assert attach(model, choice, sgd(model)).method.name == "dgc"
    with pytest.raises(
        ConfigError, match=r"method: got function, expected a name, a block, a file or a commopt\.Method"
    ):
        attach(make_model(), build, sgd(make_model()))  # type: ignore[arg-type]


def test_an_update_method_takes_no_closure_of_its_own() -> None:
    model = make_model()
    run = attach(model, "onebit_adam", adam(model), group=LocalGroup())
    before = flat(model)
    with pytest.raises(AttachError, match="takes no closure here"):
        run.optimizer.step(lambda: 0.0)
    assert torch.equal(before, flat(model))


def test_an_update_method_does_not_step_after_close() -> None:
    model = make_model()
    run = attach(model, "onebit_adam", adam(model))
    run.close()
    with pytest.raises(AttachError, match=r"onebit_adam: step\(\) after close\(\): nothing is exchanged.*attach again"):
        run.optimizer.step()
