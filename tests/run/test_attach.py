"""What attach and build refuse, in words that name the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pool import Pool
from rig import flat, make_method, make_model, train, wrapped
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commopt import build
from commopt.errors import AttachError, CommoptError, ConfigError
from commopt.frameworks import ddp, plain
from commopt.groups import LocalGroup, SimWorld, TorchGroup


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def onebit_adam(model: nn.Module, **options: Any) -> Any:
    return build("onebit_adam", model.named_parameters(), **options)


def attach_twice() -> None:
    model = make_model()
    plain.attach(model, build("dense"), sgd(model))
    plain.attach(model, build("dense"), sgd(model))


def attach_ddp_to_a_plain_model() -> None:
    model = make_model()
    ddp.attach(model, build("dense"), sgd(model))  # type: ignore[arg-type]


def attach_a_frozen_model() -> None:
    model = make_model()
    optimizer = sgd(model)
    model.requires_grad_(False)
    plain.attach(model, build("dense"), optimizer)


def attach_without_an_optimizer() -> None:
    plain.attach(make_model(), build("ef_sign"))


def attach_with_one_optimizer_too_many() -> None:
    model = make_model()
    plain.attach(model, onebit_adam(model), sgd(model))


def attach_with_anothers_optimizer() -> None:
    plain.attach(make_model(), build("dense"), sgd(make_model()))


def attach_with_some_foreign_parameters() -> None:
    model, other = make_model(), make_model()
    plain.attach(model, build("dense"), torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1))


def attach_with_anothers_update_method() -> None:
    plain.attach(make_model(), onebit_adam(make_model()))


def attach_with_parameters_left_out() -> None:
    model = make_model()
    plain.attach(model, build("onebit_adam", list(model.named_parameters())[:3]))


def attach_channels_last() -> None:
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain.attach(model, build("ef_sign"), sgd(model))


def attach_a_sparse_embedding() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    plain.attach(model, build("dense"), sgd(model))


def attach_complex_parameters() -> None:
    model = nn.Linear(3, 3, dtype=torch.complex64)
    plain.attach(model, build("dense"), sgd(model))


def attach_float64(name: str) -> Callable[[], None]:
    def attach() -> None:
        model = make_model(torch.float64)
        method = onebit_adam(model) if name == "onebit_adam" else build(name)
        plain.attach(model, method, None if name == "onebit_adam" else sgd(model))

    return attach


def attach_something_else() -> None:
    model = make_model()
    plain.attach(model, build, sgd(model))  # type: ignore[call-overload]


def attach_with_no_bucket() -> None:
    model = make_model()
    plain.attach(model, build("dense"), sgd(model), bucket_bytes=0)


REFUSED: list[tuple[Callable[[], None], str]] = [
    (attach_twice, r"attached to this model already; call detach\(\)"),
    (attach_ddp_to_a_plain_model, r"Sequential is no DistributedDataParallel: wrap the model first"),
    (attach_a_frozen_model, r"no trainable parameter"),
    (attach_without_an_optimizer, r"ef_sign replaces gradients: pass the optimizer"),
    (attach_with_one_optimizer_too_many, r"onebit_adam is an optimizer itself: leave out the SGD"),
    (attach_with_anothers_optimizer, r"not this model's; build it from model\.parameters"),
    (attach_with_some_foreign_parameters, r"not this model's; build it from model\.parameters"),
    (attach_with_anothers_update_method, r"not this model's; build it from model\.parameters"),
    (
        attach_with_parameters_left_out,
        r"the optimizer does not hold the trainable parameter 2\.bias; attach takes one optimizer",
    ),
    (attach_channels_last, r"weight is not contiguous in memory .*call \.contiguous\(\)"),
    (attach_a_sparse_embedding, r"0: sparse gradients are not supported; build the embedding with sparse=False"),
    (attach_complex_parameters, r"weight: torch\.complex64 parameters are not supported"),
    (attach_float64("ef_sign"), r"0\.weight: ef_sign works in float32, .* torch\.float64; use dense"),
    (attach_float64("onebit_adam"), r"0\.weight: onebit_adam works in float32, .* torch\.float64; use dense"),
    (attach_something_else, r"function is no commopt method; make one with commopt\.build"),
    (attach_with_no_bucket, r"bucket_bytes: 0 is out of range"),
]


@pytest.mark.parametrize(("attempt", "said"), REFUSED, ids=[said[:30] for _, said in REFUSED])
def test_attach_refuses_what_it_cannot_serve(attempt: Callable[[], None], said: str) -> None:
    with pytest.raises(AttachError, match=said):
        attempt()


def test_a_refused_model_and_optimizer_are_as_before() -> None:
    model = make_model()
    optimizer = sgd(model)
    with pytest.raises(AttachError):
        plain.attach(model, build("onebit_adam", list(model.named_parameters())[:3]))
    plain.attach(model, build("dense"), optimizer)  # nothing was left behind that forbids it
    train(model, optimizer, 0, 1)


def test_a_detached_model_can_have_another_method() -> None:
    model = make_model()
    optimizer = sgd(model)
    first = plain.attach(model, build("ef_sign"), optimizer, LocalGroup())
    train(model, optimizer, 0, 2)
    first.detach()
    second = plain.attach(model, build("dense"), optimizer, LocalGroup())
    train(model, optimizer, 0, 2)
    assert (first.steps, second.steps) == (2, 2)


def test_a_scaler_in_a_plain_script_of_several_ranks_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu")

    def work(group: Any) -> None:
        model = make_model()
        plain.attach(model, build("dense", grad_scaler=scaler), sgd(model), group)

    with pytest.raises(AttachError, match=r"use integrations\.ddp with grad_scaler"):
        SimWorld[None](2).run(work)


def test_attach_gives_every_rank_the_parameters_and_buffers_of_rank_0() -> None:
    def work(group: Any) -> torch.Tensor:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        with torch.no_grad():
            for x in (*model.parameters(), *model.buffers()):
                x.fill_(group.rank + 5)
        plain.attach(model, build("dense"), sgd(model), group)
        return torch.cat([x.detach().reshape(-1).double() for x in (*model.parameters(), *model.buffers())])

    for x in SimWorld[Any](3).run(work):
        assert x.eq(5).all()


def in_ddp(process_group: dist.ProcessGroup, what: str) -> str:
    try:
        if what == "twice":
            with wrapped(process_group, "dense") as (model, _, attachment):
                ddp.attach(model, build("dense"), sgd(model.module), attachment.group)
        model = DistributedDataParallel(make_model(), process_group=process_group)
        if what == "plain":
            plain.attach(model, build("dense"), sgd(model))
        if what == "foreign":
            ddp.attach(model, build("dense"), sgd(make_model()), TorchGroup(process_group))
        if what == "names of the wrapper":
            method = onebit_adam(model)  # "module.0.weight": the same parameters all the same
            ddp.attach(model, method, group=TorchGroup.like(process_group)).detach()
    except CommoptError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("twice", "AttachError: this DDP model has a communication hook already"),
        ("plain", "AttachError: this model averages gradients itself: use integrations.ddp.attach"),
        ("foreign", "AttachError: the optimizer holds parameters that are not this model's"),
        ("names of the wrapper", ""),
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
        ("ef_sign", {"scale": "linf"}, r"scale: 'linf' .*write 'l1'"),
        ("ef_sign", {"block_size": 100}, r"block_size: 100 .* multiple of 8"),
        ("dense", {"max_norm": 0}, r"max_norm: 0 is out of range"),
        ("fp16", {"dtype": "float61"}, r"dtype: 'float61' .*did you mean 'float16'\?"),
        ("onebit_adam", {"lr": -1.0}, r"lr: -1\.0 is out of range"),
        ("onebit_adam", {"betas": (0.9, 1.0)}, r"betas: \(0\.9, 1\.0\) is out of range"),
        ("onebit_adam", {"eps": 0.0}, r"eps: 0\.0 is out of range"),
        ("onebit_adam", {"weight_decay": -0.1}, r"weight_decay: -0\.1 is out of range"),
        ("onebit_adam", {"freeze_step": 0}, r"freeze_step: 0 is out of range; write a whole number from 1, or 'auto'"),
        ("onebit_adam", {"freeze_step": "soon"}, r"freeze_step: 'soon' is out of range"),
        ("onebit_adam", {"freeze_step": True}, r"freeze_step: True is out of range"),
    ],
)
def test_build_says_what_is_wrong_with_an_option(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(name, make_model().named_parameters(), **options)


def test_an_update_method_needs_named_parameters() -> None:
    with pytest.raises(ConfigError, match=r"build\('onebit_adam', model\.named_parameters\(\)"):
        build("onebit_adam")
    with pytest.raises(ConfigError, match=r"pass model\.named_parameters\(\), not model\.parameters\(\)"):
        build("onebit_adam", make_model().parameters())


def test_an_update_method_takes_no_closure_of_its_own() -> None:
    model = make_model()
    method, _, optimizer = make_method("onebit_adam l1", model)
    plain.attach(model, method, group=LocalGroup())
    before = flat(model)
    with pytest.raises(AttachError, match="takes no closure here"):
        optimizer.step(lambda: 0.0)
    assert torch.equal(before, flat(model))


def test_an_update_method_does_not_step_before_it_is_attached() -> None:
    model = make_model()
    method = onebit_adam(model)
    train_once = model(torch.ones(2, next(model.parameters()).shape[1])).sum()
    train_once.backward()
    with pytest.raises(AttachError, match=r"onebit_adam: step\(\) before commopt\.attach"):
        method.step()
