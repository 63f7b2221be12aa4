"""What every codec does: blocks of values to tensors in wire dtype, and back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from commopt.wire.bucket import Blocks, BlockTable, ParameterIndex
from commopt.wire.payload import Layout, Payload, layout_bytes
from commopt.wire.residual import Given, Moved, Residual

Codes: TypeAlias = Sequence[Tensor]  # the tensors of a message, widest dtype first
# of (T,) i64 on the device: what is noted in a message's header (`wire.payload.noted`), and its other tensors' lengths; returns them
Tell: TypeAlias = Callable[[Tensor], Sequence[int]]


class Compressor(ABC):
    """A stateless codec for blocks of float32 values; a `checked_dataclass` of its hyper-parameters."""

    stochastic = False  # whether codes depend on the blocks' random keys
    shared_scale: ClassVar[bool] = False  # the blocks of a parameter have one scale
    is_ragged: ClassVar[bool] = False  # sizes are known only after compression: see `encode`
    shares_keys: ClassVar[bool] = False  # all ranks have the same random keys, and decompressing takes them too

    block_size: int | None  # a multiple of 8, or None for whole parameters

    def block_lengths(self, numel: int, ranks: int) -> list[int]:
        """Lengths of the blocks that one parameter is cut into; all but the last are multiples of 8."""
        return equal_blocks(numel, self.block_size or max(1, numel))

    @abstractmethod
    def layout(self, blocks: Blocks) -> Layout:
        """Dtypes and lengths of the tensors that these blocks are sent as, widest dtype first."""

    def compress_(self, x: Tensor, residual: Tensor | None, parts: Sequence[Blocks], out: Sequence[Codes]) -> None:
        """Write the codes of c = x + residual into out[k] for each of `parts`, and residual <- c - decompressed.

        x: (n,) f32, left as it is. A block with a NaN or an inf is marked by a non-finite scale or value in
        its codes, and its residual is not touched.
        """
        for blocks, codes in zip(parts, out, strict=True):
            self.write_(x, residual, blocks, codes)

    def compress_payloads_(
        self,
        x: Tensor,
        residual: Given,
        parts: Sequence[Blocks],
        payloads: Sequence[Payload],
        received: Sequence[Payload] = (),
    ) -> bool:
        """`compress_` into payloads behind their headers. Returns whether these are written too: the first bad parameter, or -1.

        residual: as it is stored, or what takes its place, only if the codec `takes` it. received: messages whose headers count, too.
        """
        assert residual is None or isinstance(residual, Tensor)
        # of many ranks, most serve nothing of a small model
        busy = [(own, payload.tensors[1:]) for own, payload in zip(parts, payloads, strict=True) if len(own)]
        if busy:
            self.compress_(x, residual, [own for own, _ in busy], [codes for _, codes in busy])
        return False

    def encode_payloads(
        self,
        x: Tensor,
        residual: Tensor | None,
        parts: Sequence[Blocks],
        received: Sequence[Payload] = (),
        tell: Tell | None = None,
    ) -> tuple[list[Payload], bool]:
        """`encode` into payloads behind their headers; and whether these are written too, as of `compress_payloads_`.

        tell: called before the host knows the sizes of the one message, if it does not know them anyway.
        """
        messages = [self.encode(x, residual, blocks) for blocks in parts]
        header = torch.zeros(1, dtype=torch.int32, device=x.device)
        return [Payload.of(header, *codes) for codes in messages], False

    def decompress_payloads_(
        self,
        payloads: Sequence[Payload],
        parts: Sequence[Blocks],
        out: Tensor,
        *,
        alpha: float = 1.0,
        add: bool = False,
        also: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """`decompress_` one payload after the other.

        also: for signs that blend, a tensor that gets them, too, at the blocks' homes. mask: for those on a CPU, bool, likewise; where it
        is False, they are zero.
        """
        assert also is None
        assert mask is None
        for payload, blocks in zip(payloads, parts, strict=True):
            if len(blocks):
                self.decompress_(payload.tensors[1:], blocks, out, alpha=alpha, add=add)

    def add_up_(self, payloads: Sequence[Payload], blocks: Blocks, out: Tensor, *, alpha: float) -> None:
        """out <- alpha * values of all payloads, which have the same blocks, from zero and in this order: float sums depend on it."""
        for run in blocks.runs:
            out[run].zero_()
        self.decompress_payloads_(payloads, [blocks] * len(payloads), out, alpha=alpha, add=True)

    def takes(self, residual: Residual | Moved, *, contracts: bool) -> bool:
        """Whether `compress_payloads_` takes a residual as it is stored; contracts: `fit_` follows."""
        return False

    def pads(self, device: torch.device) -> bool:
        """Whether `compress_payloads_` writes every byte of its payloads there, those that only fill them up included."""
        return False

    @abstractmethod
    def write_(self, x: Tensor, residual: Tensor | None, blocks: Blocks, codes: Codes) -> None:
        """`compress_` for one part, whose blocks share no scale with those of others."""

    def fit_(self, codes: Codes, x: Tensor, residual: Tensor | None, blocks: Blocks) -> None:
        """Change what `compress_` wrote, and the residual, so that ||c - decompressed|| <= ||c||; here it is so already."""

    @property
    def needs_fit(self) -> bool:
        """Whether `fit_` may change something."""
        return False

    def fit_payloads_(
        self, payloads: Sequence[Payload], x: Tensor, residual: Tensor | None, parts: Sequence[Blocks]
    ) -> None:
        """`fit_` of several messages."""
        for payload, blocks in zip(payloads, parts, strict=True):
            if len(blocks):
                self.fit_(payload.tensors[1:], x, residual, blocks)

    def encode(self, x: Tensor, residual: Tensor | None, blocks: Blocks) -> Codes:
        """`compress_` for a codec whose sizes are not known beforehand; returns the tensors to send, widest dtype first."""
        raise NotImplementedError(f"{type(self).__name__} has a fixed layout")

    @abstractmethod
    def decompress_(self, codes: Codes, blocks: Blocks, out: Tensor, *, alpha: float = 1.0, add: bool = False) -> None:
        """out <- alpha * values (or out + alpha * values) at the blocks' starts; the same bits on every rank."""

    def is_bad(self, codes: Codes, blocks: Blocks) -> Tensor:
        """(B,) bool: which blocks are marked as non-finite; here by their scales, which come first."""
        return ~codes[0].isfinite()

    def table(self, index: ParameterIndex, ranks: int, without: frozenset[str] = frozenset()) -> BlockTable:
        """Every block of a model, except for the parameters in `without`, and the rank that serves it."""
        return BlockTable.cut(index, ranks, self.block_lengths, shared_scale=self.shared_scale, without=without)

    def bytes_per_element(self, ranks: int = 2) -> float:
        """Bytes of a message per element, scales and padding included, for a parameter of 2^20 elements."""
        index = ParameterIndex(("x",), (1 << 20,))
        blocks = self.table(index, ranks).everything
        return layout_bytes(self.layout(blocks)) / blocks.elements


def equal_blocks(numel: int, block_size: int) -> list[int]:
    """Blocks of `block_size`, and a shorter last one."""
    whole, rest = divmod(numel, block_size)
    return [block_size] * whole + ([rest] if rest else [])
