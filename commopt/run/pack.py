"""Nested state as JSON and named tensors, and back: what checkpoints and letters hold, without pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from commopt.errors import CheckpointError

_KINDS = ("tensor", "tuple", "dict", "float", "bytes")  # marks: a dict with one of these keys stands for something else
_JSON = "json"


def split(value: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """JSON that stands for `value`, and its tensors by name. Raises CheckpointError, with the place, for what has no such form.

    Takes numbers, texts, None, lists, tuples, dicts with texts or numbers as keys, bytes, and tensors.
    """
    tensors: dict[str, Tensor] = {}

    def walk(x: Any, place: str) -> Any:
        if isinstance(x, Tensor):
            name = f"{prefix}{place}"
            while name in tensors:  # keys may have a slash in them, or be 1 and "1"
                name += "'"
            tensors[name] = x.detach()
            return {"tensor": name}
        if x is None or isinstance(x, bool | str):
            return x
        if isinstance(x, int) and not isinstance(x, bool):
            return int(x)
        if isinstance(x, float):
            return float(x) if math.isfinite(x) else {"float": repr(float(x))}
        if hasattr(x, "item") and getattr(x, "shape", None) == ():  # a numpy scalar
            return walk(x.item(), place)
        if isinstance(x, bytes):
            return {"bytes": x.hex()}
        if isinstance(x, list):
            return [walk(one, f"{place}/{k}") for k, one in enumerate(x)]
        if isinstance(x, tuple):
            return {"tuple": [walk(one, f"{place}/{k}") for k, one in enumerate(x)]}
        if isinstance(x, Mapping):
            if all(isinstance(key, str) for key in x) and not (len(x) == 1 and next(iter(x)) in _KINDS):
                return {key: walk(one, f"{place}/{key}") for key, one in x.items()}
            return {"dict": [[walk(key, place), walk(one, f"{place}/{key}")] for key, one in x.items()]}
        raise CheckpointError(
            f"{place or 'this'}: {type(x).__name__} cannot be stored; use numbers, texts, lists, dicts and tensors"
        )

    return walk(value, ""), tensors


def join(described: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `split` was given. Raises CheckpointError for a tensor that is missing."""
    if isinstance(described, list):
        return [join(one, tensors) for one in described]
    if not isinstance(described, dict):
        return described
    if len(described) == 1:
        ((kind, inside),) = described.items()
        if kind == "tensor":
            if inside not in tensors:
                raise CheckpointError(f"{inside}: this tensor is missing")
            return tensors[inside]
        if kind == "tuple":
            return tuple(join(one, tensors) for one in inside)
        if kind == "float":
            return float(inside)
        if kind == "bytes":
            return bytes.fromhex(inside)
        if kind == "dict":
            return {join(key, tensors): join(one, tensors) for key, one in inside}
    return {key: join(one, tensors) for key, one in described.items()}


def pack(value: Any) -> Tensor:
    """(n,) u8: a nested value as one safetensors file."""
    described, tensors = split(value)
    stored = {f"t{name}": x.to("cpu").contiguous().clone() for name, x in tensors.items()}
    stored[_JSON] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    return torch.frombuffer(bytearray(save_tensors(stored)), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """What `pack` was given. Raises CheckpointError for bytes that it did not make."""
    try:
        stored = load_tensors(packed.numpy().tobytes())
        described = json.loads(stored[_JSON].numpy().tobytes())
        return join(described, {name[1:]: x for name, x in stored.items()})
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"not a packed state: {error}") from error
