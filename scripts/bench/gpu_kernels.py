"""The Triton kernels, launch by launch: the bytes that each must move, and how long it takes on a GPU with a cold cache.

The table of kernels is `registers.calls`. Bytes are counted in triton's interpreter, which runs on the CPU:

python scripts/bench/gpu_kernels.py         print (codec, kernel, bytes per element) as JSON
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
from numpy.typing import NDArray
from registers import calls

from commopt.kernels.cuda import pieces

Moved = Mapping[tuple[str, str], float]  # bytes per element, by codec and kernel
FEW, MORE = (4096, 64), (6144, 64)  # elements, in the difference of which bytes are counted


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__.strip('_')}"

    def start(self) -> None:
        pieces.start(self.kernel, self.grid, self.arguments, self.constants)


def launches_of(call: Callable[[], object], around: Callable[[Launch], object]) -> None:
    """Make a call, in which `around` starts each launch."""
    start: Any = pieces.start

    def note(*given: Any) -> None:
        pieces.start = start
        around(Launch(*given))
        pieces.start = noting

    noting: Any = note
    pieces.start = noting
    try:
        call()
    finally:
        pieces.start = start


# ---- bytes -----------------------------------------------------------------------------------------------------------


class Counting:
    """Stands in for the interpreter's memory, and notes which addresses are read and written."""

    def __init__(self, memory: Any) -> None:
        self._memory, self._seen = memory, list[tuple[bool, int, NDArray[np.uint64]]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._note(False, np.dtype(dtype).itemsize, pointers, mask)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        self._note(True, values.dtype.itemsize, pointers, mask)
        return self._memory.store(pointers, values, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, values: Any, mask: Any, order: Any) -> Any:
        for is_written in (False, True):
            self._note(is_written, values.dtype.itemsize, pointers, mask)
        return self._memory.atomic_rmw(operation, pointers, values, mask, order)

    def _note(self, is_written: bool, width: int, pointers: Any, mask: Any) -> None:
        self._seen.append((is_written, width, pointers[np.asarray(mask, dtype=bool)].reshape(-1)))

    def taken(self) -> int:
        """Bytes since the last call: each address that was read, and each that was written, once."""
        kinds = {(is_written, width) for is_written, width, _ in self._seen}
        places = {kind: np.concatenate([at for *own, at in self._seen if (*own,) == kind]) for kind in kinds}
        self._seen = []
        return sum(width * len(np.unique(at)) for (_, width), at in places.items())


@cache
def counted() -> dict[tuple[str, str], float]:
    """Bytes that every kernel reads and writes for each further element, tables of pieces and scales of blocks included."""
    few, more = (_all_bytes(numels) for numels in (FEW, MORE))
    return {key: (nbytes - few[key]) / (sum(MORE) - sum(FEW)) for key, nbytes in more.items()}


def _all_bytes(numels: tuple[int, ...]) -> Counter[tuple[str, str]]:
    from triton.runtime import interpreter

    moved = Counter[tuple[str, str]]()
    memory = interpreter._interpreter
    interpreter._interpreter = counting = Counting(memory)
    try:
        for codec, call in calls(numels):

            def count(launch: Launch, codec: str = codec) -> None:
                launch.start()
                moved[codec, launch.name] += counting.taken()

            launches_of(call, count)
    finally:
        interpreter._interpreter = memory
    return moved


def moved_bytes() -> Moved:
    """`counted`, in a process of its own unless kernels run in the interpreter here."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return counted()
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run([sys.executable, __file__], env=variables, check=True, capture_output=True, text=True).stdout
    return {(codec, kernel): nbytes for codec, kernel, nbytes in json.loads(said)}


# ---- seconds ---------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds of what runs on a device. On a GPU nothing is in its L2 when a run begins, and the run is queued by then."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        if self.is_gpu:
            cache: int = torch.cuda.get_device_properties(device).L2_cache_size
            self._larger = torch.empty(max(4 * cache, 1 << 26), dtype=torch.uint8, device=device)

    def span(self, run: Callable[[], object]) -> Callable[[], float]:
        """Run it; what is returned tells the seconds, after `settle`."""
        if not self.is_gpu:
            begun = time.perf_counter()
            run()
            elapsed_s = time.perf_counter() - begun
            return lambda: elapsed_s
        made: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        begin, end = made
        self._larger.zero_()
        torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]  # cycles, in which the host gets ahead
        begin.record()
        run()
        end.record()
        return lambda: float(begin.elapsed_time(end)) / 1000

    def settle(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()


def copy_rate(device: torch.device, numel: int, watch: Stopwatch, repeats: int) -> float:
    """Bytes per second, read and written, of a plain copy of float32."""
    x, other = torch.ones(numel, device=device), torch.empty(numel, device=device)
    spans = [watch.span(lambda: other.copy_(x)) for _ in range(repeats)]
    watch.settle()
    return 8 * numel / statistics.median(span() for span in spans)


def timed(
    device: torch.device, numels: tuple[int, int], repeats: int, moved: Moved, is_late: Callable[[], bool]
) -> Iterator[list[dict[str, Any]] | str]:
    """By codec and call: a row for each kernel, all its launches together, or only the codec's name, if it is late.

    The first row is a plain copy's.
    """
    watch, elements = Stopwatch(device), sum(numels)
    rate = copy_rate(device, elements, watch, repeats)
    yield [_row("copy", "", 1, 8.0, 8 * elements / rate, elements, rate)]
    for codec, call in _calls_on(device, numels):
        if is_late():
            yield codec
            continue
        if watch.is_gpu:
            call()  # compiles
        calls_s = [_seconds(call, watch) for _ in range(repeats)]
        yield [
            _row(
                codec,
                name,
                len(calls_s[0][name]),
                moved.get((codec, name)),
                statistics.median(sum(spans[name]) for spans in calls_s),
                elements,
                rate,
            )
            for name in calls_s[0]
        ]


def _seconds(call: Callable[[], object], watch: Stopwatch) -> dict[str, list[float]]:
    """Of each launch in a call, by kernel."""
    spans: dict[str, list[Callable[[], float]]] = {}
    launches_of(call, lambda launch: spans.setdefault(launch.name, []).append(watch.span(launch.start)))
    watch.settle()
    return {name: [span() for span in own] for name, own in spans.items()}


def _calls_on(device: torch.device, numels: tuple[int, int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls, whose tensors are made on the device."""
    made = calls(numels)
    while True:
        with torch.device(device):
            found = next(made, None)
        if found is None:
            return
        yield found


def _row(
    codec: str, kernel: str, launches: int, nbytes: float | None, seconds: float, elements: int, rate: float
) -> dict[str, Any]:
    share = None if nbytes is None or nbytes < 0.01 else nbytes * elements / seconds / rate
    row = {"codec": codec, "kernel": kernel, "launches": launches, "bytes_per_element": nbytes}
    return row | {"seconds": seconds, "share_of_copy": share}


if __name__ == "__main__":
    print(json.dumps([[*key, nbytes] for key, nbytes in counted().items()]))
