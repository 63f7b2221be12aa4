"""Codecs whose kernels on a GPU write or read several messages in one launch, headers included."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from commopt import kernels
from commopt.compress.base import Compressor
from commopt.wire.bucket import Blocks
from commopt.wire.payload import Bundle, Payload
from commopt.wire.residual import Given, Moved, Residual

LONGEST = 2048  # elements of a block that kernels know all of at once


class Fused(Compressor):
    """A codec of scales and codes. `writing` and `reading` are its arguments for kernels.

    goes_in_rows: on a CPU, too, kernels write and read all messages at once. recalls: there, too, they take a residual as it is stored.
    """

    goes_in_rows: ClassVar[bool] = False
    recalls: ClassVar[bool] = False

    @abstractmethod
    def writing(self) -> dict[str, Any]:
        """What `compress_all_` takes."""

    @abstractmethod
    def reading(self) -> dict[str, Any]:
        """What `decompress_all_` takes."""

    def takes(self, residual: Residual | Moved, *, contracts: bool) -> bool:
        values = residual.known if isinstance(residual, Moved) else residual.values
        if contracts and self.needs_fit:
            return False
        if not self.pads(values.device):
            known = self.recalls and isinstance(residual, Residual) and values.device.type == "cpu"
            return known and (self.block_size or LONGEST + 1) <= LONGEST
        return isinstance(residual, Moved) or not residual.has_scales or (self.block_size or LONGEST + 1) <= LONGEST

    def _rows(self, device: torch.device) -> bool:
        return self.goes_in_rows and device.type == "cpu" and not kernels.has_triton(device)

    def pads(self, device: torch.device) -> bool:
        return kernels.has_triton(device)

    def compress_payloads_(
        self,
        x: Tensor,
        residual: Given,
        parts: Sequence[Blocks],
        payloads: Sequence[Payload],
        received: Sequence[Payload] = (),
    ) -> bool:
        if self._rows(x.device):
            how = self.writing()
            bundle = Bundle.of(payloads)
            bundle.head_all_(kernels.of(how.pop("kernel"), x.device).compress_all_(x, residual, bundle, parts, **how))
            return not self.needs_fit  # which may change scales
        if not self.pads(x.device):
            return super().compress_payloads_(x, residual, parts, payloads)
        from commopt.kernels.cuda import headers
        from commopt.kernels.cuda.pieces import Messages

        first, how = headers.noted_in(payloads, received, is_new=True), self.writing()
        kernel = kernels.of(how.pop("kernel"), x.device)
        kernel.compress_all_(x, residual, Messages.of(payloads, parts), first, **how)
        headers.write_(first, payloads)
        return True

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
        if self._rows(out.device):
            how = self.reading() | {key: x for key, x in (("also", also), ("mask", mask)) if x is not None}
            kernels.of(how.pop("kernel"), out.device).decompress_all_(payloads, parts, out, alpha=alpha, add=add, **how)
            return None
        if not kernels.has_triton(out.device):
            return super().decompress_payloads_(payloads, parts, out, alpha=alpha, add=add, also=also, mask=mask)
        from commopt.kernels.cuda.pieces import Messages

        assert mask is None
        how = self.reading() | ({} if also is None else {"also": also})
        kernel = kernels.of(how.pop("kernel"), out.device)
        kernel.decompress_all_(Messages.of(payloads, parts), out, alpha=alpha, add=add, **how)
        return None

    def add_up_(self, payloads: Sequence[Payload], blocks: Blocks, out: Tensor, *, alpha: float) -> None:
        if not (kernels.has_triton(out.device) or self._rows(out.device)):
            return super().add_up_(payloads, blocks, out, alpha=alpha)
        return self.decompress_payloads_(payloads, [blocks] * len(payloads), out, alpha=alpha)
