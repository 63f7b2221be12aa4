"""The algorithms, one file each, by the names that users write in YAML."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commopt.choice import Choice, is_file, keys_beside, read_choice
from commopt.errors import ConfigError, did_you_mean
from commopt.method import Method
from commopt.methods.auto import Auto as Auto
from commopt.methods.choco import Choco as Choco
from commopt.methods.decentralized_adam import DecentralizedAdam as DecentralizedAdam
from commopt.methods.demo import DeMo as DeMo
from commopt.methods.dense import Dense as Dense
from commopt.methods.dgc import DGC as DGC
from commopt.methods.dice_sgd import DiceSGD as DiceSGD
from commopt.methods.diloco import DiLoCo as DiLoCo
from commopt.methods.distributed_lion import DistributedLion as DistributedLion
from commopt.methods.ef import EF as EF
from commopt.methods.ef21 import EF21 as EF21
from commopt.methods.ef_sign import EFSign as EFSign
from commopt.methods.fp16 import FP16 as FP16
from commopt.methods.local_sgd import LocalSGD as LocalSGD
from commopt.methods.loco import LoCo as LoCo
from commopt.methods.natural import NaturalMean as NaturalMean
from commopt.methods.noloco import NoLoCo as NoLoCo
from commopt.methods.onebit_adam import OnebitAdam as OnebitAdam
from commopt.methods.onebit_lamb import OnebitLamb as OnebitLamb
from commopt.methods.powersgd import PowerSGD as PowerSGD
from commopt.methods.push_sum import PushSum as PushSum
from commopt.methods.qsgd import QSGD as QSGD
from commopt.methods.random_k import RandomKMean as RandomKMean
from commopt.methods.signum import Signum as Signum
from commopt.methods.terngrad import TernGrad as TernGrad
from commopt.methods.threshold import ThresholdMean as ThresholdMean
from commopt.methods.top_k import TopKMean as TopKMean
from commopt.methods.two_way import TwoWay as TwoWay
from commopt.methods.zero_one_adam import ZeroOneAdam as ZeroOneAdam
from commopt.options import option_names

METHODS: Mapping[str, type[Method]] = {
    method.name: method
    for method in (
        *(Dense, FP16, EFSign, EF, EF21, LoCo, DiceSGD, TwoWay, QSGD, NaturalMean, TernGrad, TopKMean, RandomKMean),
        *(ThresholdMean, DGC, PowerSGD, Signum, Auto),
        *(OnebitAdam, ZeroOneAdam, OnebitLamb, DistributedLion, DeMo),
        *(NoLoCo, DiLoCo, LocalSGD, DecentralizedAdam, Choco, PushSum),
    )
}


def build(choice: Method | type[Method] | Choice, **options: Any) -> Method:
    """Make a method by name, block or file; `commopt.attach` then puts it into a training script, and takes choices as well.

    choice: a name ("dgc", or "two_way(sign, int8)"), a `method:` block ({"name": "dgc", "density": 0.001}), the path of a YAML or JSON file
        that holds one, a `Method` class, or a `Method`, which is returned as it is. options: in addition to the choice's own.
    Raises ConfigError for an unknown name or option, or a value out of range.
    """
    if isinstance(choice, Method):
        if options:
            raise ConfigError(f"method {choice.name}: is already built; it takes no options: {', '.join(options)}")
        return choice
    if isinstance(choice, type) and issubclass(choice, Method):
        return choice(**options)
    if not isinstance(choice, str | Path | Mapping):
        raise ConfigError(
            f"method: got {type(choice).__name__}, expected a name, a block, a file or a commopt.Method; see docs/methods.md"
        )
    name, chosen = read_choice(choice)
    try:
        kind, named = _find(name)
        for key in keys_beside(choice) if is_file(choice) else ():
            if key in option_names(kind.Options):
                raise ConfigError(
                    f"{key}: stands beside the block of {kind.name}, where it has no effect; write it into the block"
                )
        for key in named:
            if key in {**chosen, **options}:
                raise ConfigError(f"method {name}: {key}: is named in the brackets already; leave one out")
        return kind(**{**named, **chosen, **options})
    except ConfigError as error:
        if is_file(choice):
            raise ConfigError(f"{choice}: {error}") from None
        raise


resolve = build  # for choices that may be a `Method` already


def is_launched() -> bool:
    """Whether a launcher has put a method of its own into the script: COMMOPT_METHOD."""
    return "COMMOPT_METHOD" in os.environ


def chosen(choice: Method | type[Method] | Choice) -> Method | type[Method] | Choice:
    """The method that a launcher compares, COMMOPT_METHOD, in place of the script's own choice; that choice if it names none.

    Raises ConfigError if that variable does not hold a `method:` block as JSON.
    """
    if not is_launched():
        return choice
    text = os.environ["COMMOPT_METHOD"]
    try:
        block = json.loads(text)
    except ValueError:
        block = None
    if not isinstance(block, dict):
        raise ConfigError(f'environment: COMMOPT_METHOD={text:.80}: no block; write one, as in {{"name": "dgc"}}')
    return block


def _find(name: str) -> tuple[type[Method], dict[str, str]]:
    """The method, and the options that `name(a, b)` gives by position: `two_way(sign, int8)` is worker: sign, server: int8."""
    word, is_called, inside = name.partition("(")
    if word not in METHODS:
        raise ConfigError(f"unknown method {name!r:.80}{did_you_mean(word, METHODS)}")
    method = METHODS[word]
    if not is_called:
        return method, {}
    values = [value.strip() for value in inside.removesuffix(")").split(",")]
    if not inside.endswith(")") or not all(values) or len(values) > len(method.positional):
        form = f"{word}({', '.join(method.positional)})" if method.positional else f"{word}, without brackets"
        raise ConfigError(f"method {name!r}: write {form}")
    return method, dict(zip(method.positional, values, strict=False))
