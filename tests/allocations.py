"""Which tensors a piece of code makes, by their bytes: those that share memory with what it was given do not count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """A context; `nbytes` has the bytes of each new storage in it, made on this thread, in their order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes: list[int] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = {x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)}
        self.nbytes += [storage.nbytes() for storage in made if storage.data_ptr() not in known]
        return out
