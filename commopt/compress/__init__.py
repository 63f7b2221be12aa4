"""Codecs, which turn values into messages and back, and their names in configurations."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from commopt.compress.base import Compressor
from commopt.compress.cast import Cast
from commopt.compress.quantize import BlockFloat8, BlockInt, Natural, QSGDLevels, Ternary
from commopt.compress.sign import BlockSign, TensorSign
from commopt.compress.sparse import RandomK, Threshold, TopK
from commopt.errors import ConfigError, did_you_mean

# name -> class, and the options that the name sets
COMPRESSORS: Mapping[str, tuple[Callable[..., Compressor], Mapping[str, Any]]] = {
    "sign": (BlockSign, {}),
    "sign_l2": (TensorSign, {}),
    "fp16": (Cast, {"dtype": torch.float16}),
    "bf16": (Cast, {"dtype": torch.bfloat16}),
    "int8": (BlockInt, {"bits": 8}),
    "4bit": (BlockInt, {"bits": 4}),
    "2bit": (BlockInt, {"bits": 2}),
    "fp8": (BlockFloat8, {}),
    "natural": (Natural, {}),
    "qsgd": (QSGDLevels, {}),
    "ternary": (Ternary, {}),
    "top_k": (TopK, {}),
    "random_k": (RandomK, {}),
    "threshold": (Threshold, {}),
}


def make_compressor(given: Any, option: str = "compressor") -> Compressor:
    """A compressor by name, "int8", or by name and options, {"compressor": "int8", "block_size": 512}.

    Raises ConfigError for an unknown name or option, or a value out of range.
    """
    if isinstance(given, Compressor):
        return given
    options = dict(given) if isinstance(given, Mapping) else {"compressor": given}
    name = options.pop("compressor", None)
    if not isinstance(name, str) or name not in COMPRESSORS:
        raise ConfigError(f"{option}: {name!r} is not a compressor{did_you_mean(str(name), COMPRESSORS)}")
    kind, preset = COMPRESSORS[name]
    known = [field.name for field in dataclasses.fields(kind) if field.name not in preset]  # type: ignore[arg-type]
    for key in options:
        if key not in known:
            raise ConfigError(f"{option}: {name}: unknown option {key!r}{did_you_mean(str(key), known)}")
    try:
        return kind(**preset, **options)
    except ConfigError as error:
        raise ConfigError(f"{option}: {name}: {error}") from None
