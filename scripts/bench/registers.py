"""Compile every Triton kernel for GPUs that need not be here, and print registers, spills, and bytes moved per element.

python scripts/bench/registers.py [--targets sm_80,sm_90,gfx942] [--quick] [--markdown] [--json FILE]

`calls` is the table of kernels: scripts/bench/gpu takes what it times from there.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from commopt import build
from commopt.compress.base import equal_blocks
from commopt.compress.indices import all_index_bytes
from commopt.compress.resident import VALUE_DTYPES
from commopt.groups import LocalGroup
from commopt.kernels.cuda import (
    apply,
    cast,
    estimates,
    factors,
    headers,
    indices,
    quantize,
    residuals,
    select,
    signs,
    sparse,
    ternary,
    votes,
)
from commopt.kernels.cuda.pieces import Messages
from commopt.kernels.reference.apply import Lamb, Move, Root
from commopt.wire import noise
from commopt.wire.bucket import Blocks, BlockTable, Bucket, ParameterIndex
from commopt.wire.payload import in_a_row
from commopt.wire.residual import Accumulated, Blended, Moved, Residual

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
UNALIGNED = ", unaligned"
EVEN, ODD = (4096, 2048), (4095, 2048)  # lengths of parameters, of which ODD leaves nothing aligned
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"}
TYPES |= {torch.int16: "*i16", torch.int8: "*i8", torch.bool: "*i1", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
Call = tuple[JITFunction[Any], dict[str, str], dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Codec:
    """A codec as its kernels know it."""

    name: str
    block: int | None
    how: dict[str, Any]


CODECS = [
    Codec("int8", 256, {"kind": "levels", "levels": 127, "bits": 8}),
    Codec("4bit", 256, {"kind": "levels", "levels": 7, "bits": 4}),
    Codec("fp8", 256, {"kind": "float8", "levels": 448, "bits": 8}),
    Codec("natural", 2048, {"kind": "natural"}),
    Codec("ternary", None, {"kind": "levels", "levels": 1, "bits": 2}),
    Codec("qsgd", 512, {"kind": "levels", "levels": 7, "bits": 4, "squared": True}),
]


def blocks_of(numels: tuple[int, ...], block: int | None) -> Blocks:
    index = ParameterIndex(tuple(f"p{k}" for k in range(len(numels))), numels)
    table = BlockTable.cut(index, 1, lambda n, _: equal_blocks(n, block or n), shared_scale=False).everything
    return table.having(words=noise.words(0, "bench", 0, np.zeros(1, np.int64)))


def launches() -> Iterator[tuple[str, Call]]:
    """What the kernels of each codec are launched with, by the codec's name and whether all is aligned."""
    made: list[Call] = []

    def note(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | given
        constants = {p.name: arguments.pop(p.name) for p in self.params if p.is_constexpr}
        names = [name for name in self.arg_names if name not in constants]
        types = {name: _type(arguments.pop(name)) for name in names}
        made.append((self, types | dict.fromkeys(constants, "constexpr"), constants, arguments))

    run, JITFunction.run = JITFunction.run, note
    made_empty: Any = torch.empty
    torch.empty = torch.zeros  # type: ignore[assignment]  # no kernel writes how many there are, and the host reads it
    try:
        for numels, word in ((EVEN, ""), (ODD, UNALIGNED)):
            for name, call in calls(numels):
                made.clear()
                call()
                yield from ((name + word, one) for one in made)
    finally:
        JITFunction.run = run
        torch.empty = made_empty


def calls(numels: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """(codec, a call that launches its kernels) for parameters of so many elements.

    Tensors are made before the call, on torch's default device.
    """
    n = sum(numels)
    x, e, codes = torch.arange(n).sin(), torch.arange(n).cos(), torch.zeros(n, dtype=torch.uint8)
    blocks, whole = blocks_of(numels, 2048), blocks_of(numels, None)
    scales, table, first = torch.ones(len(blocks)), torch.ones(8), torch.zeros(1, dtype=torch.int32)
    sent = Messages([blocks], scales, codes)
    yield "sign", lambda: signs.compress_signs_(x, e, blocks, scales, codes, squared=False)
    for bits, dtype in ((16, torch.bfloat16), (8, torch.int8)):
        stored = Residual(e.to(dtype), e, blocks.homes, decay=0.9).copying([blocks])
        yield f"sign, {bits}-bit residual", lambda r=stored: signs.compress_all_(x, r, sent, first, squared=False)
    yield "sign", lambda: signs.unpack_signs_(codes, scales, blocks, x, alpha=1.0, add=True)
    yield from _steps(numels, x)
    if numels[0] % 8:
        return
    yield "sign_l2", lambda: signs.compress_signs_(x, e, whole, scales[:2], codes, squared=True)
    ballots = in_a_row([((torch.int32, 1), (torch.uint8, blocks.sign_bytes))] * 2, x.device)
    answers = in_a_row([((torch.uint8, 2 * blocks.sign_bytes),)] * 2, x.device)
    flips = np.zeros(1, np.int64)
    yield "votes", lambda: votes.pack_all_(x, ballots, [blocks, blocks], flips, first)
    yield "votes, blended", lambda: votes.pack_all_(x, ballots, [blocks, blocks], flips, first, (e, 0.1))
    yield "votes", lambda: votes.count_all_(ballots, blocks, flips, 1, codes)
    yield "votes", lambda: votes.unpack_all_(answers, [blocks, blocks], 2, table, x)
    yield "votes, twice", lambda: votes.unpack_all_(answers, [blocks, blocks], 2, table, x, e)
    yield "headers", lambda: headers.noted_in(answers, ballots)
    yield "headers", lambda: headers.noted_in(answers, ballots, is_new=True)
    yield "headers", lambda: headers.write_(first, ballots)
    stored = Residual(e.to(torch.int8), e, whole.homes, decay=0.9).copying([whole])
    yield "int8, in pieces", lambda: residuals.read(stored, [whole])
    yield "int8, in pieces", lambda: residuals.store_(x, stored, [whole])
    yield "sign", lambda: residuals.undo_(x, e, torch.zeros(len(blocks), dtype=torch.bool), x, [blocks])
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        halves = Messages([blocks], scales, torch.zeros(2 * n, dtype=torch.uint8))
        yield name, lambda d=dtype, m=halves: cast.compress_all_(x, e, m, first, dtype=d)
        yield name, lambda d=dtype, m=halves: cast.decompress_all_(m, x, dtype=d, alpha=1.0, add=True)
    yield "ef21", lambda: estimates.settle_(x, e, estimates.difference(x, e, x, whole, 0.1), whole)
    left, other = torch.zeros(n), torch.ones(n)
    for average in (e, None):
        moved = Moved(x, average, 0.1)
        yield "sign, moved", lambda m=moved: signs.compress_all_(x, m, sent, first, squared=False)
    for name, states in (("sign, blended", ((e, 0.1),)), ("sign, blended twice", ((e, 0.1), (other, 0.1)))):
        blended = Blended(left, states=states)
        yield name, lambda b=blended: signs.compress_all_(x, b, sent, first, squared=False)
    yield "sign, twice", lambda: signs.decompress_all_(sent, x, alpha=1.0, add=False, also=e)
    yield "ef21", lambda: estimates.put_(estimates.take(x, whole), x, whole)
    means = in_a_row([((torch.float32, 2),)] * 2, x.device)
    yield "terngrad", lambda: ternary.agree_(means, torch.zeros(len(blocks), dtype=torch.int64), x)
    yield "terngrad", lambda: ternary.spread_(ternary.shares(x, whole, 2), scales, 2, [blocks], x)
    yield "terngrad", lambda: ternary.bounds_(x, whole, 2.5, scales[:2])
    clamped = residuals.Clamped(scales, torch.zeros(len(blocks), dtype=torch.int64), {})
    how: dict[str, Any] = {"kind": "levels", "bits": 2, "is_given": True}
    yield "terngrad", lambda: quantize.compress_all_(x, clamped, sent, first, **how)
    messages = Messages([whole], scales[:2], codes)
    yield "ternary", lambda: quantize.fit_all_(x, e, messages, bits=2)
    yield from _sparse(numels, x, e, whole)
    yield "powersgd", lambda: factors.normalise_(x, e, whole.having(groups=whole.starts))
    yield "demo", lambda: _demo()
    y, ns, ks = torch.arange(n).sin(), np.asarray(numels), np.asarray(numels) // 100  # one of a hundred is chosen
    yield "top_k in blocks", lambda: select.select_(y, e.zero_(), blocks, np.full(len(blocks), 20))
    yield "top_k", lambda: select.select_(y, e.zero_(), whole, ks)
    yield "threshold", lambda: select.select_(y, e.zero_(), whole, 0 * ks, 0.9999)
    sizes, chosen = all_index_bytes(ns, ks), torch.cat([100 * torch.arange(k) for k in ks.tolist()])
    yield "indices", lambda: indices.encode_(chosen, ns, ks, ks, sizes, codes[: sizes.sum()])
    yield "indices", lambda: indices.decode(codes[: sizes.sum()], ns, ks, ks, sizes)
    for codec in CODECS:
        own = blocks_of(numels, codec.block)
        scale = torch.ones(len(own))
        read = {key: value for key, value in codec.how.items() if key in ("kind", "bits")}
        yield codec.name, lambda o=own, s=scale, c=codec: quantize.compress_(x, e, o, s, codes, **c.how)
        if codec.name in ("4bit", "fp8"):
            kept, to = (
                Residual(e.to(torch.int8), e, own.homes, average=0.8).copying([own]),
                Messages([own], scale, codes),
            )
            yield (
                f"{codec.name}, 8-bit residual",
                lambda r=kept, m=to, c=codec: quantize.compress_all_(x, r, m, first, **c.how),
            )
        yield codec.name, lambda o=own, s=scale, r=read: quantize.decompress_(codes, s, o, x, alpha=1.0, add=True, **r)


def _sparse(numels: tuple[int, ...], x: torch.Tensor, e: torch.Tensor, blocks: Blocks) -> Iterator[tuple[str, Any]]:
    blocks = blocks.worded(0, "bench", 0, np.zeros(len(numels), np.int64))
    entries = sparse.Entries.of(torch.tensor([100, 50]), torch.tensor(numels), (150, 124, 20))
    first = counts = torch.zeros(2, dtype=torch.int32)
    scales, values, where = torch.ones(2), torch.ones(152), torch.cat([torch.arange(100), torch.arange(50)])
    chosen, how = sparse.Chosen(where, values, first.view(torch.uint8)[:2]), {"first": first[:1], "counts": counts}
    for bits in (16, 1):  # of the others less is computed
        out, name = torch.zeros(150, dtype=VALUE_DTYPES[bits]), f"top_k, {bits} bits"
        yield name, lambda b=bits, o=out: sparse.code_(chosen, blocks, entries, e, b, scales, o, **how)
        yield name, lambda b=bits, o=out: sparse.values_of(o, scales, entries, b, where[:1])
    yield "sum of sparse", lambda: sparse.add_(where, values, blocks, entries, x, alpha=1.0, add=False)
    for name, moved in (("dgc", x), ("dgc, Nesterov's", e.clone())):
        own = Accumulated(e, e.clone(), blocks.homes, moved, 0.9)
        yield name, lambda g=own: sparse.largest_(x, g, blocks, entries)
    yield "dgc", lambda: sparse.add_(where, values, blocks, entries, x, alpha=1.0, add=False, given=own)
    yield "random_k", lambda: sparse.find_bad_(x, None, blocks, values[150:])
    yield "random_k", lambda: sparse.draw_and_take_(x, e, blocks, entries, values, is_unbiased=True)
    yield "random_k", lambda: sparse.note_sum_(values, blocks, entries, first)
    yield "random_k", lambda: sparse.keep_(x, e, blocks, chosen.is_bad)
    yield "random_k", lambda: sparse.take_sent_(e, values, where, blocks, entries, ranks=4)


def _steps(numels: tuple[int, ...], x: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """Of optimizers' steps on parameters that are like x."""
    index = ParameterIndex(tuple(f"p{k}" for k in range(len(numels))), numels)
    flat, momentum, variance, start, mean = x.clone(), *(torch.ones_like(x) for _ in range(4))
    ps = {name: index.view(flat, name) for name in index.names}
    halves = {name: p.bfloat16() for name, p in ps.items()}
    state = {"momentum": momentum, "variance": variance, "fresh_variance": mean}
    state |= {key: torch.ones(len(numels), dtype=torch.float64) for key in ("coeff", "factor")}
    state["coeffs"] = torch.ones(len(numels), dtype=torch.int64)
    how, root, mask = Move(Root(1.0, 1e-8), 0.1), Root(1.0, 1e-8), flat > 0
    places = index.places(index.names, tuple(index.offsets[:-1].tolist()))
    yield "blend", lambda: apply.blend_(momentum, start, start, places, 0.1)
    yield "move", lambda: apply.move_(ps, index, momentum, variance, how)
    yield "move, bf16", lambda: apply.move_(halves, index, momentum, variance, how._replace(rounds=True))
    yield "move, local", lambda: apply.move_(ps, index, momentum, variance, how, start, mean)
    for name, is_frozen in (("lamb", False), ("lamb, frozen", True)):
        lamb = Lamb(is_frozen, root, 1.0, 0.1, 0.1, (0.01, 10.0), 0.9, (0.5, 4.0, 0.1), 1.0)
        yield name, lambda step=lamb: apply.lamb_(ps, index, state, step, mask)


def _demo() -> None:
    method: Any = build("demo")
    method.bind([("matrix", torch.zeros(128, 128))], LocalGroup())
    x = torch.zeros(128 * 128)
    chunks = method._device_chunks(Bucket.of([("matrix", x)]))
    chunks.add_transformed(x, x, 0.999, x)
    chunks.add_up([chunks.largest(x)] * 2, 0, x)
    chunks.put_signs(x, 2, x, x, x)


def _type(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return TYPES[x.dtype]
    return "fp32" if isinstance(x, float) else "i32"


def compiled(name: str, call: Call, target: str) -> dict[str, Any]:
    """One kernel for one target: registers of a thread, bytes spilled, and bytes of shared memory."""
    function, types, constants, options = call
    # tensors begin at multiples of 16 bytes, as torch's allocators lay them
    attributes = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(function.arg_names) if types[n][0] == "*"}
    source = ASTSource(function, types, constexprs=constants, attrs=attributes)
    with redirect_stdout(io.StringIO()) as log:
        made: Any = triton.compile(source, target=TARGETS[target], options=options)
    patterns, said = (_AMD, made.asm["amdgcn"]) if "amdgcn" in made.asm else (_NVIDIA, log.getvalue())
    registers, spilled = (int(re.findall(pattern, said)[0]) for pattern in patterns)
    kernel = f"{function.fn.__module__.rpartition('.')[2]}.{function.fn.__name__.strip('_')}"
    sizes = {"registers": registers, "spilled_bytes": spilled, "shared_bytes": made.metadata.shared}
    return {"codec": name, "kernel": kernel, "target": target, **sizes}


_AMD = (r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)")
_NVIDIA = (r"Used (\d+) reg", r"(\d+) bytes spill st")  # of the assembler


def main(targets: list[str], is_quick: bool, is_markdown: bool, json_file: Path | None) -> None:
    from gpu_kernels import moved_bytes  # which needs the table above

    moved = {} if is_quick else moved_bytes()
    rows = list({(row["kernel"], row["codec"], row["target"]): row for row in _rows(targets, is_quick)}.values())
    for row in rows:
        row["bytes_per_element"] = moved.get((row["codec"].removesuffix(UNALIGNED), row["kernel"]), math.nan)
    line = (
        "| {} | {} |" + " {} |" * len(targets) + " {} |"
        if is_markdown
        else "{:18} {:22}" + " {:>8}" * len(targets) + " {:>8}"
    )
    print(line.format("codec", "kernel", *targets, "bytes per element" if is_markdown else "bytes"))
    if is_markdown:
        print("|---|---|" + "--:|" * (len(targets) + 1))
    for codec, kernel in dict.fromkeys((row["codec"], row["kernel"]) for row in rows):
        own = {row["target"]: row for row in rows if (row["codec"], row["kernel"]) == (codec, kernel)}
        nbytes = f"{own[targets[0]]['bytes_per_element']:.2f}"
        print(line.format(codec, kernel, *(own[target]["registers"] for target in targets), nbytes))
    if not is_markdown:
        print("registers of a thread, and bytes read and written per element")
        print("bytes spilled: " + str(sum(row["spilled_bytes"] for row in rows)))
    if json_file is not None:
        json_file.write_text(json.dumps({"schema": 2, "triton": triton.__version__, "kernels": rows}, indent=1))


def _rows(targets: list[str], is_quick: bool) -> Iterator[dict[str, Any]]:
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    seen = set[Any]()
    for name, call in launches():
        if not is_quick or call[0].fn not in seen:
            yield from (compiled(name, call, target) for target in targets)
        seen.add(call[0].fn)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"some of {', '.join(TARGETS)}")
    parser.add_argument("--quick", action="store_true", help="one codec for each kernel, and no bytes")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/gpu.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    given = parser.parse_args()
    main(given.targets.split(","), given.quick, given.markdown, given.json)
