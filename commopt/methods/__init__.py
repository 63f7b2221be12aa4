"""The algorithms, one file each, by the names that users write in YAML."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, overload

import torch

from commopt.choice import Choice, read_choice
from commopt.errors import AttachError, ConfigError, did_you_mean
from commopt.exchange.mean import Aggregator
from commopt.gossip.loop import OuterLoop
from commopt.methods.choco import Choco
from commopt.methods.decentralized_adam import DecentralizedAdam
from commopt.methods.demo import DeMo
from commopt.methods.dense import Dense
from commopt.methods.dgc import DGC
from commopt.methods.dice_sgd import DiceSGD
from commopt.methods.diloco import DiLoCo
from commopt.methods.distributed_lion import DistributedLion
from commopt.methods.ef import EF
from commopt.methods.ef21 import EF21
from commopt.methods.ef_sign import EFSign
from commopt.methods.fp16 import FP16
from commopt.methods.local_sgd import SAVIC, LocalSGD
from commopt.methods.loco import LoCo
from commopt.methods.natural import NaturalMean
from commopt.methods.noloco import NoLoCo
from commopt.methods.onebit_adam import OnebitAdam
from commopt.methods.onebit_lamb import OnebitLamb
from commopt.methods.powersgd import PowerSGD
from commopt.methods.push_sum import PushSum
from commopt.methods.qsgd import QSGD
from commopt.methods.random_k import RandomKMean
from commopt.methods.signum import Signum
from commopt.methods.terngrad import TernGrad
from commopt.methods.threshold import ThresholdMean
from commopt.methods.top_k import TopKMean
from commopt.methods.two_way import TwoWay
from commopt.methods.zero_one_adam import ZeroOneAdam
from commopt.optim.parents import LAMB, AccumAdam, Lion

__all__ = [
    "DGC",
    "EF",
    "EF21",
    "FP16",
    "METHODS",
    "OPTIMIZERS",
    "OUTER_METHODS",
    "QSGD",
    "SAVIC",
    "Choco",
    "DeMo",
    "DecentralizedAdam",
    "Dense",
    "DiLoCo",
    "DiceSGD",
    "DistributedLion",
    "EFSign",
    "LoCo",
    "LocalSGD",
    "NaturalMean",
    "NoLoCo",
    "OnebitAdam",
    "OnebitLamb",
    "PowerSGD",
    "PushSum",
    "RandomKMean",
    "Signum",
    "TernGrad",
    "ThresholdMean",
    "TopKMean",
    "TwoWay",
    "ZeroOneAdam",
    "build",
    "check_options",
    "is_outer_method",
    "is_update_method",
    "with_optimizer",
]

METHODS: Mapping[str, type[Aggregator]] = {
    method.name: method
    for method in (
        Dense,
        FP16,
        EFSign,
        EF,
        EF21,
        LoCo,
        DiceSGD,
        TwoWay,
        QSGD,
        NaturalMean,
        TernGrad,
        TopKMean,
        RandomKMean,
        ThresholdMean,
        DGC,
        PowerSGD,
        OnebitAdam,
        DeMo,
        ZeroOneAdam,
        OnebitLamb,
        DistributedLion,
        Signum,
    )
}

OUTER_METHODS: Mapping[str, type[OuterLoop]] = {
    method.name: method for method in (NoLoCo, DiLoCo, LocalSGD, DecentralizedAdam, Choco, PushSum)
}

OPTIMIZERS: Mapping[str, Any] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "accum_adam": AccumAdam,
    "savic": SAVIC,
    "sgd": torch.optim.SGD,
    "lion": Lion,
    "lamb": LAMB,
}


def is_update_method(name: Choice) -> bool:
    """Whether this method is an optimizer itself, instead of replacing the gradient that another one gets."""
    return issubclass(_find(read_choice(name)[0])[0], torch.optim.Optimizer)


def is_outer_method(name: Choice) -> bool:
    """Whether this method exchanges parameters now and then, among ranks that may come and go, instead of gradients in every step."""
    return issubclass(_find(read_choice(name)[0])[0], OuterLoop)


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise ConfigError for a method, or an option of it, that does not exist."""
    method, named = _find(name)
    known = [option for option in _options(method) if option not in named]
    for option in options:
        if option not in known:
            raise ConfigError(f"method {name}: unknown option {option!r}{did_you_mean(option, known)}")


@overload
def build(
    name: Literal["noloco", "diloco", "local_sgd", "decentralized_adam", "choco", "push_sum"], **options: Any
) -> OuterLoop: ...
@overload
def build(name: Choice, named_params: Iterable[Any] | None = None, **options: Any) -> Aggregator: ...
def build(name: Choice, named_params: Iterable[Any] | None = None, **options: Any) -> Aggregator | OuterLoop:
    """Make a method; `commopt.attach` then puts it into a training script.

    name: a method's name, or a `method:` block or file as it stands in a configuration (`choice.read_choice`).
    named_params: `model.named_parameters()`, or parameter groups whose "params" are such pairs; update methods (1-bit Adam)
    need it; gradient methods (EF-sign) and outer methods (NoLoCo) go with an optimizer of yours and take none.
    Raises ConfigError for an unknown name or option, or a value out of range.
    """
    name, chosen = read_choice(name)
    options = {**chosen, **options}
    check_options(name, options)
    method: Any
    method, named = _find(name)
    options = {**named, **options}
    for option in _options(method, without_default=True):
        if option not in options:
            raise ConfigError(f"method {name}: {option}: is missing, and has no default; write {{{option}: ...}}")
    arguments = []
    if is_update_method(name):
        if named_params is None:
            raise ConfigError(f"method {name} is an optimizer: build({name!r}, model.named_parameters(), ...)")
        arguments = [list(named_params)]
    try:
        made: Aggregator | OuterLoop = method(*arguments, **options)
    except ConfigError as error:
        raise ConfigError(f"method {name}: {error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method {name}: {_refused(options, method, arguments, error)}") from None
    return made


def with_optimizer(
    name: Choice, model: torch.nn.Module, *, options: Mapping[str, Any], optimizer: Mapping[str, Any]
) -> tuple[Any, torch.optim.Optimizer]:
    """The method and the optimizer that steps, from a run's YAML; an update method is both.

    name: as `build` takes it, with options in addition.
    optimizer: {"name": "adam", "adamw" or "sgd", and that optimizer's arguments}. An update method takes lr, betas, eps and
    weight_decay from it, unless `options` say otherwise. Raises ConfigError as `build` does, and for a bad optimizer.
    """
    name, chosen = read_choice(name)
    options = {**chosen, **options}
    arguments = {key: value for key, value in optimizer.items() if key != "name"}
    kind = optimizer.get("name", "adam")
    if not isinstance(kind, str) or kind not in OPTIMIZERS:
        raise ConfigError(f"optimizer: name: unknown optimizer {kind!r}{did_you_mean(str(kind), OPTIMIZERS)}")
    if is_update_method(name):
        check_options(name, options)
        shared = [key for key in _options(_find(name)[0]) if any(key in _arguments(other) for other in OPTIMIZERS)]
        for key in arguments:
            if key not in shared:
                raise ConfigError(
                    f"optimizer: {key}: {name} steps by itself and takes only {', '.join(shared)} from the optimizer; "
                    f"give {name} an 'optimizer' of its own without {key!r}"
                )
        method = build(name, model.named_parameters(), **{**arguments, **options})
        return method, cast(torch.optim.Optimizer, method)
    known = _arguments(kind)
    for key in arguments:
        if key not in known:
            raise ConfigError(f"optimizer: {key}: unknown argument of {kind}{did_you_mean(str(key), known)}")
    method = build(name, **options)
    parameters = list(model.parameters())
    try:
        made = OPTIMIZERS[kind](parameters, **arguments)
    except Exception as error:  # torch raises what comes up, as an IndexError for betas: [0.9]
        raise ConfigError(f"optimizer: {_refused(arguments, OPTIMIZERS[kind], [parameters], error)}") from None
    try:
        method.check_optimizer(made)
    except AttachError as error:
        raise ConfigError(f"optimizer: {error}") from None
    return method, made


def _find(name: str) -> tuple[type[Aggregator] | type[OuterLoop], dict[str, str]]:
    """The method, and the options that `name(a, b)` gives by position: `two_way(sign, int8)` is worker: sign, server: int8."""
    word, is_called, inside = name.partition("(")
    every: dict[str, type[Aggregator] | type[OuterLoop]] = {**METHODS, **OUTER_METHODS}
    if word not in every:
        raise ConfigError(f"unknown method {name!r}{did_you_mean(word, every)}")
    method = every[word]
    if not is_called:
        return method, {}
    values = [value.strip() for value in inside.removesuffix(")").split(",")]
    if not inside.endswith(")") or not all(values) or len(values) > len(method.positional):
        form = f"{word}({', '.join(method.positional)})" if method.positional else f"{word}, without brackets"
        raise ConfigError(f"{name!r} is no form of {word}; write {form}")
    return method, dict(zip(method.positional, values, strict=False))


def _refused(options: Mapping[str, Any], make: Any, arguments: list[Any], error: Exception) -> str:
    """Why `make` raised `error`, and on which options: those that it needs to be without, or else all of them."""

    def is_made_without(*left_out: str) -> bool:
        try:
            make(*arguments, **{key: value for key, value in options.items() if key not in left_out})
        except Exception:
            return False
        return True

    why = (str(error) or type(error).__name__).splitlines()[0]
    if not is_made_without(*options):
        return why
    culprits = [key for key in options if is_made_without(key)] or list(options)
    values = ", ".join(f"{options[key]!r:.60}" for key in culprits)
    return f"{', '.join(culprits)}: {values} is refused by {make.__name__}: {why}; write another value, or leave it out"


def _arguments(kind: str) -> list[str]:
    parameters = inspect.signature(OPTIMIZERS[kind].__init__).parameters
    return [key for key in parameters if key not in ("self", "params")]


def _options(method: type[Aggregator] | type[OuterLoop], *, without_default: bool = False) -> list[str]:
    parameters = inspect.signature(method.__init__).parameters.values()
    options = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return [p.name for p in options if not without_default or p.default is inspect.Parameter.empty]
