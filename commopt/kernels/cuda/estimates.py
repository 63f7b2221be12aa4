"""EF21's state on a GPU, in one pass each: what is to be sent, and what a good exchange leaves."""

import triton
import triton.language as tl
from torch import Tensor

from commopt.kernels.cuda.pieces import Pieces, launch, piece, values
from commopt.kernels.cuda.residuals import blend, share_of
from commopt.wire.bucket import Blocks


@triton.jit
def _difference(
    x,
    average,
    known,
    out,
    columns,
    count,
    share,
    HAS_AVERAGE: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside, v = i[None, :] < n[:, None], values(x, start, n, i)
    if HAS_AVERAGE:
        v = blend(values(average, home, n, i), v, share)
        tl.store(x + start[:, None] + i[None, :], v, mask=inside)
    tl.store(out + start[:, None] + i[None, :], v - values(known, home, n, i), mask=inside)


@triton.jit
def _settle(
    x,
    average,
    estimate,
    columns,
    count,
    share,
    HAS_AVERAGE: tl.constexpr,
    BLENDS: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    if HAS_AVERAGE:
        v = values(x, start, n, i)
        if BLENDS:
            v = blend(values(average, home, n, i), v, share)
        tl.store(average + home[:, None] + i[None, :], v, mask=inside)
    tl.store(x + start[:, None] + i[None, :], values(estimate, home, n, i), mask=inside)


@triton.jit
def _move(
    x,
    state,
    columns,
    count,
    IS_OUT: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    p, live, start, home, n, scale_at, codes = piece(columns, count, ROWS, ALIGN)
    i = tl.arange(0, LENGTH)
    inside = i[None, :] < n[:, None]
    if IS_OUT:
        tl.store(x + start[:, None] + i[None, :], values(state, home, n, i), mask=inside)
    else:
        tl.store(state + home[:, None] + i[None, :], values(x, start, n, i), mask=inside)


def difference(x: Tensor, average: Tensor | None, known: Tensor, blocks: Blocks, eta: float = 1.0) -> Tensor:
    """x - known of some blocks, in the layout of x; first x <- (1 - eta) average + eta x, if there is an average."""
    out, pieces = x.new_empty(len(x)), _pieces(blocks, x)
    where = (x, x if average is None else average, known, out, pieces.columns, len(pieces), share_of(eta))
    launch(_difference, pieces.grid, *where, HAS_AVERAGE=average is not None, **pieces.shape)
    return out


def settle_(x: Tensor, average: Tensor | None, estimate: Tensor, blocks: Blocks, eta: float | None = None) -> None:
    """average <- x, if there is one, or with eta (1 - eta) average + eta x; and x <- estimate, of some blocks."""
    pieces, share = _pieces(blocks, x), 0.0 if eta is None else share_of(eta)
    where = (x, x if average is None else average, estimate, pieces.columns, len(pieces), share)
    launch(_settle, pieces.grid, *where, HAS_AVERAGE=average is not None, BLENDS=eta is not None, **pieces.shape)


def take(state: Tensor, blocks: Blocks) -> Tensor:
    """(elements,) f32: some blocks of the state, which start one after the other."""
    out = state.new_empty(blocks.elements)
    pieces = _pieces(blocks, state)
    launch(_move, pieces.grid, out, state, pieces.columns, len(pieces), IS_OUT=True, **pieces.shape)
    return out


def put_(x: Tensor, state: Tensor, blocks: Blocks) -> None:
    """Write some blocks into the state."""
    pieces = _pieces(blocks, x)
    launch(_move, pieces.grid, x, state, pieces.columns, len(pieces), IS_OUT=False, **pieces.shape)


def _pieces(blocks: Blocks, x: Tensor) -> Pieces:
    return Pieces.of([blocks], 1, x.device, [(0, 0)])
