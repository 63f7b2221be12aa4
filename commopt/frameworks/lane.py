"""The thread on which exchanges run beside backward, and on a GPU the stream."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.futures import Future

from commopt.errors import GroupError
from commopt.groups import Group

_THREADS: weakref.WeakValueDictionary[int, ThreadPoolExecutor] = weakref.WeakValueDictionary()  # by id of process group


class Lane:
    """One thread that runs exchanges in the order of submission, the same on every rank.

    On a GPU jobs run on a side stream of high priority, which waits for the stream that submitted them; whoever waits for the future
    lets its own stream wait for the job. group: lanes over the same process groups share one thread, so that models with a joint
    backward do not mix their calls.
    """

    def __init__(self, device: torch.device, group: Group | None = None) -> None:
        self.device = device
        is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if is_gpu else None  # type: ignore[no-untyped-call]
        self._carriers = carriers(group)  # kept, and so their ids
        # a new thread is on the first GPU, whichever this rank has
        begin = (torch.cuda.set_device, (device,)) if is_gpu else (None, ())
        new = ThreadPoolExecutor(1, "commopt lane", *begin)  # ends before the interpreter does
        self._thread = next(threads_of(self._carriers), new)
        _THREADS.update((id(one), self._thread) for one in self._carriers)

    def submit(self, job: Callable[[], Tensor], uses: Sequence[Tensor] = ()) -> Future[Tensor]:
        """A future of the job's result; what the job raises, its value() raises.

        uses: what the job reads or writes, so that its memory is not given to others before the job is done, even if nobody waits.
        """
        stream = self._stream
        future: Future[Tensor] = Future(devices=[self.device] if stream else [])
        ready = torch.cuda.current_stream(self.device).record_event() if stream else None

        def run() -> None:
            try:
                with torch.cuda.stream(stream):
                    if stream is not None and ready is not None:
                        stream.wait_event(ready)
                        for x in uses:
                            x.record_stream(stream)
                    future.set_result(job())
            except Exception as error:
                future.set_exception(portable(error))  # type: ignore[arg-type]  # typed as a result, wrongly

        self._thread.submit(run)
        return future

    def close(self) -> None:
        """Wait for what was submitted; the thread ends when the last of its lanes is let go."""
        self._thread.submit(int).result()


def portable(error: Exception) -> Exception:
    """The error, or one with its words where it cannot be pickled, which a future for a GPU does with it."""
    try:
        pickle.dumps(error)
    except Exception:
        return GroupError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    return error


def carriers(group: Group | None) -> list[object]:
    """What carries a group's calls: its process groups, of both levels."""
    found: list[object] = []
    for part in (group.inside, getattr(group, "between", group)) if group is not None else ():
        inner = getattr(part, "inner", part)  # of a paced group
        found.append(getattr(inner, "process_group", inner))
    return [one for one in found if one is not None]


def threads_of(carriers: Sequence[object]) -> Iterator[ThreadPoolExecutor]:
    """The threads that carry out what is submitted for some carriers."""
    return (thread for one in carriers if (thread := _THREADS.get(id(one))) is not None)
