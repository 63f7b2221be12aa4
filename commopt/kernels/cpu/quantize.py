"""The block quantisers on a CPU: `encoding` and `decoding` of tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commopt.kernels.cpu.compiled import F32
from commopt.kernels.cpu.decoding import ADD, PUT, SUM, decompress, fit, spread
from commopt.kernels.cpu.encoding import FLOAT8, LEVELS, NATURAL, Stored, compress
from commopt.kernels.cpu.rows import Row
from commopt.kernels.reference.quantize import float8_values, natural_values
from commopt.wire.bucket import Blocks
from commopt.wire.payload import Payload
from commopt.wire.residual import Residual

_NO_VALUES: F32 = np.zeros(0, np.float32)
_TABLES = {"levels": _NO_VALUES, "float8": float8_values().numpy(), "natural": natural_values().numpy()}
_KINDS = {"levels": LEVELS, "float8": FLOAT8, "natural": NATURAL}
_NO_SLOTS, _NO_HALVES, _NO_BYTES = np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.int8)
_PLAIN: Stored = (0, np.float32(1), np.float32(0), _NO_HALVES, _NO_BYTES, _NO_VALUES, _NO_SLOTS)


def compress_(
    x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, codes: Tensor, *, bits: int = 8, **how: Any
) -> None:
    """Scales of c = x + residual unless they `is_given`, codes of c / scale, and residual <- c - what they stand for.

    how: see `_write`. A block that is not finite gets scale NaN, and keeps its residual.
    """
    _write(x, residual, Row.alone(scales, codes, blocks, bits), bits=bits, **how)


def compress_all_(
    x: Tensor,
    residual: Tensor | Residual | None,
    payloads: Sequence[Payload],
    parts: Sequence[Blocks],
    *,
    bits: int,
    **how: Any,
) -> int:
    """`compress_` into messages, behind their headers. A residual may be one that is not plain, of blocks up to 2,048 elements.

    Returns the first bad parameter, or -1.
    """
    row = Row.of(payloads, parts, bits)
    _write(x, residual, row, bits=bits, **how)
    return row.first_bad()


def _write(
    x: Tensor,
    residual: Tensor | Residual | None,
    row: Row,
    *,
    kind: str,
    levels: int = 1,
    bits: int,
    squared: bool = False,
    stochastic: bool = True,
    is_given: bool = False,
) -> None:
    """kind: "levels", round(c / scale) in `bits` bits, scale = norm / levels with the L2 norm if `squared`, or else the largest
    magnitude; "float8", e4m3 patterns, scale = max|c| / levels; "natural", powers of two as scales, signs and exponents below
    the scale's as codes.
    """
    e, stored = _NO_VALUES, _PLAIN
    if isinstance(residual, Residual):
        e, stored = _stored(residual, row)
    elif residual is not None:
        e = residual.numpy()
    how = (_KINDS[kind], np.float32(levels), bits, squared, stochastic, is_given)
    args = (row.places, row.keys, how, _TABLES[kind], row.scales, row.codes)
    compress(x.numpy(), e, residual is not None, stored, *args)


def _stored(residual: Residual, row: Row) -> tuple[F32, Stored]:
    """A residual that is not plain: what is stored in 32 bits, and the rest."""
    values, average = residual.values, np.float32(residual.average)
    share = average if residual.average < 0.5 else average - np.float32(1)
    bits = 8 * values.itemsize
    e = values.numpy() if bits == 32 else _NO_VALUES
    halves = values.view(torch.int16).numpy().view(np.uint16) if bits == 16 else _NO_HALVES
    octets, slots = (values.numpy(), residual.slots(row.places[1])) if bits == 8 else (_NO_BYTES, _NO_SLOTS)
    return e, (bits, np.float32(residual.decay), np.float32(share), halves, octets, residual.scales.numpy(), slots)


def fit_(x: Tensor, residual: Tensor | None, blocks: Blocks, scales: Tensor, codes: Tensor, *, bits: int) -> None:
    """Multiply the scales of "levels" by 1 + <r, q> / ||q||^2, with the codes' values q and the rest r; residual <- c - that times q.

    r: the residual as `compress_` left it; without one x - q.
    """
    row, e = Row.alone(scales, codes, blocks, bits), _NO_VALUES
    if residual is not None:
        e = residual.numpy()
    fit(x.numpy(), e, residual is not None, row.places, bits, row.codes, row.scales)


def decompress_(
    codes: Tensor, scales: Tensor, blocks: Blocks, out: Tensor, *, kind: str, bits: int = 8, alpha: float, add: bool
) -> None:
    """out <- (alpha * scale) * what a code stands for, or out <- out + that, at the blocks' starts."""
    _read(Row.alone(scales, codes, blocks, bits), out, kind, bits, alpha, ADD if add else PUT)


def decompress_all_(
    payloads: Sequence[Payload], parts: Sequence[Blocks], out: Tensor, *, kind: str, bits: int, alpha: float, add: bool
) -> None:
    """`decompress_` of messages behind headers, one after the other; those of the same blocks are added up, from zero unless `add`."""
    is_sum = len(parts) > 1 and all(blocks is parts[0] for blocks in parts)
    _read(Row.of(payloads, parts, bits), out, kind, bits, alpha, ADD if add else SUM if is_sum else PUT)


def _read(row: Row, out: Tensor, kind: str, bits: int, alpha: float, mode: int) -> None:
    decompress(row.codes, row.scales, row.places, bits, _TABLES[kind], np.float32(alpha), mode, out.numpy())


def spread_(values: Tensor, factors: Tensor, blocks: Blocks, out: Tensor) -> None:
    """out <- factor value at the blocks' starts; values: (elements,) end to end, factors: (B,)."""
    spread(values.numpy(), factors.numpy(), blocks.starts, blocks.lengths, out.numpy())
