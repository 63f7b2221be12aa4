"""One thread that runs exchanges in the order in which they were handed in, on every rank the same."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.futures import Future


class Lane:
    """First in, first out. For tensors on a GPU, jobs run on a side stream that waits for the stream that submitted them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commopt lane")  # ends before the interpreter does

    def submit(self, job: Callable[[], torch.Tensor]) -> Future[torch.Tensor]:
        """A future of the job's result; what the job raises, its value() raises."""
        future: Future[torch.Tensor] = Future(devices=[self.device] if self._stream else [])
        ready = torch.cuda.current_stream(self.device).record_event() if self._stream else None

        def run() -> None:
            try:
                with torch.cuda.stream(self._stream):
                    if self._stream is not None and ready is not None:
                        self._stream.wait_event(ready)
                    future.set_result(job())
            except Exception as error:
                future.set_exception(error)  # type: ignore[arg-type]  # typed as a result, wrongly

        self._thread.submit(run)
        return future

    def close(self) -> None:
        """End the thread after what was submitted."""
        self._thread.shutdown()
