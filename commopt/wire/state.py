"""What a method remembers, declared once: allocation, views, checkpoints and resizing follow from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from commopt.errors import CheckpointError
from commopt.wire.bucket import ParameterIndex, Share

Held: TypeAlias = Literal["shared", "rank"]
Saved: TypeAlias = dict[Held, dict[str, Tensor]]


@dataclass(frozen=True)
class State:
    """One tensor that a method keeps from step to step.

    of: "element" for a number per element, in a flat tensor in registration order (on the parameters' device); "parameter" for one
        number per parameter, and "run" for `numel` numbers in all (both on the CPU).
    on_device: whether the numbers of "parameter" are on the parameters' device, where kernels change them.
    index: the layout of "element" where it is not every element of every parameter.
    held: "shared" is equal on all ranks, and saved once; "rank" is each rank's own.
    is_cut: each of a machine's ranks keeps the stretch of "element" that is its share; what a rank has for itself is cut anyway.
    on_resize: what becomes of it when a training goes on with another number of ranks. "keep" takes the shared value, "mean" the mean
        of what all ranks had, "reset" the initial value; "own" leaves it to the class's `resize`.
    """

    name: str
    of: Literal["element", "parameter", "run"] = "element"
    held: Held = "shared"
    on_resize: Literal["keep", "mean", "reset", "own"] = "keep"
    dtype: torch.dtype = torch.float32
    initial: float = 0.0
    numel: int = 1
    on_device: bool = False
    index: ParameterIndex | None = None
    is_cut: bool = False


class Stateful:
    """Holds the tensors that it declares, and those of its parts.

    A subclass lists them in `states`, or computes them in `declare` once `index` is known. `self.state[name]` is the tensor.
    """

    states: ClassVar[tuple[State, ...]] = ()
    parts: tuple[Stateful, ...] = ()
    index: ParameterIndex
    share: Share | None = None  # of a machine's ranks, if there are several
    device: torch.device
    state: dict[str, Tensor]

    @property
    def own_index(self) -> ParameterIndex:
        """The layout of what this rank exchanges: that of its share, or of everything."""
        return self.index if self.share is None else self.share.index

    def declare(self) -> Sequence[State]:
        """What this object keeps; its parts say for themselves."""
        return self.states

    def allocate(self) -> None:
        """Make every tensor that is declared, with its initial value."""
        self._declared = {one.name: one for one in self.declare()}
        self.state = {name: self._new(one) for name, one in self._declared.items()}

    def part(self, key: str, name: str) -> Tensor:
        """(n,) view: what the state `key` holds of the parameter `name`."""
        return self._layout(self._declared[key]).view(self.state[key], name)

    def layouts(self) -> dict[str, ParameterIndex]:
        """How each state of elements lies in its tensor, by its key; those of the parts included."""
        own = {key: self._layout(one) for key, one in self._declared.items() if one.of == "element"}
        for part in self.parts:
            own |= part.layouts()
        return own

    def state_views(self, name: str) -> list[Tensor]:
        """All state on this rank that an exchange of the parameter `name` may change, as views."""
        views = []
        for key, one in self._declared.items():
            if one.of == "parameter":
                k = self.index.position[name]
                views.append(self.state[key][k : k + 1])
            elif one.of == "element" and name in self._layout(one).position:
                views.append(self.part(key, name))
        return [*views, *(view for part in self.parts for view in part.state_views(name))]

    def saved(self) -> Saved:
        """What a checkpoint must hold, by who holds it; the tensors themselves."""
        saved: Saved = {"shared": {}, "rank": {}}
        for key, one in self._declared.items():
            saved[self._held(one)][key] = self.state[key]
        for part in self.parts:
            for held, tensors in part.saved().items():
                saved[held] |= tensors
        return saved

    def load(self, saved: Saved) -> None:
        """Continue bit for bit from what this rank of a world of this size saved."""
        for key, one in self._declared.items():
            load_tensor(self.state[key], saved[self._held(one)], key)
        for part in self.parts:
            part.load(saved)
        self.restored()

    def check_saved(self, saved: Saved) -> None:
        """Raise CheckpointError if `load` would find a tensor missing, or of another shape."""
        for key, one in self._declared.items():
            check_tensor(self.state[key], saved[self._held(one)], key)
        for part in self.parts:
            part.check_saved(saved)

    def resize(self, every: Sequence[Saved]) -> None:
        """Continue from what all ranks, in order, of a world of another size saved; nothing still to be sent is lost."""
        for key, one in self._declared.items():
            if one.on_resize == "keep":
                load_tensor(self.state[key], every[0][one.held], key)
            elif one.on_resize == "mean":
                load_mean(self.state[key], [saved[one.held] for saved in every], key)
            elif one.on_resize == "reset":
                self.state[key].fill_(one.initial)
        for part in self.parts:
            part.resize(every)
        self.restored()

    def reset(self) -> None:
        """Return to the initial values."""
        for key, one in self._declared.items():
            self.state[key].fill_(one.initial)
        for part in self.parts:
            part.reset()

    def restored(self) -> None:
        """Called when state has been loaded: for what follows from it."""

    def state_bytes(self) -> int:
        """Bytes that this rank keeps, parts included."""
        return sum(x.nbytes for x in self.state.values()) + sum(part.state_bytes() for part in self.parts)

    def _is_cut(self, one: State) -> bool:
        return one.is_cut or one.held == "rank"

    def _held(self, one: State) -> Held:
        """Who saves a state: a machine's ranks each their share of it."""
        return "rank" if self.share is not None and one.is_cut else one.held

    def _layout(self, one: State) -> ParameterIndex:
        return one.index or (self.own_index if self._is_cut(one) else self.index)

    def _new(self, one: State) -> Tensor:
        if one.of == "element":
            return torch.full((self._layout(one).total,), one.initial, dtype=one.dtype, device=self.device)
        numel = len(self.index.names) if one.of == "parameter" else one.numel
        return torch.full((numel,), one.initial, dtype=one.dtype, device=self.device if one.on_device else "cpu")


def check_tensor(target: Tensor, source: Mapping[str, Tensor], key: str) -> None:
    """Raise CheckpointError if source[key] is missing, or of another shape than a tensor of state."""
    if key not in source or source[key].shape != target.shape:
        found = tuple(source[key].shape) if key in source else "nothing"
        raise CheckpointError(
            f"{key}: expected a tensor of shape {tuple(target.shape)}, found {found}; is it another model or world size?"
        )


def load_tensor(target: Tensor, source: Mapping[str, Tensor], key: str) -> None:
    """Copy source[key] into a tensor of state. Raises CheckpointError as `check_tensor`."""
    check_tensor(target, source, key)
    target.copy_(source[key])


def load_mean(target: Tensor, sources: Sequence[Mapping[str, Tensor]], key: str) -> None:
    """Overwrite a tensor by the mean of what all ranks of another world held under this key. Raises CheckpointError as `load_tensor`."""
    own, total = torch.empty_like(target), torch.zeros_like(target)
    for source in sources:
        load_tensor(own, source, key)
        total += own
    target.copy_(total / len(sources))
