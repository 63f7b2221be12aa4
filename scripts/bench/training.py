"""Training the cells of a benchmark of losses, several at a time, each in a process with one core."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from command import Cell
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from sheets import wide_console
from store import Store

from commopt.errors import CommoptError
from commopt.record.words import seconds_text

Settings = Mapping[str, Any]


def train_all(
    wanted: Callable[[], Iterable[Cell]],
    settings_of: Callable[[Cell], Settings],
    train: Callable[[Settings], dict[str, Any]],
    store: Store,
    jobs: int,
) -> list[str]:
    """Train what is wanted, `jobs` cells at a time, and tell each as it ends. Returns what failed.

    wanted: the cells to train next, the running ones included; asked again after each.
    """
    context, failures = multiprocessing.get_context("spawn"), dict[str, str]()
    cores = context.SimpleQueue()
    for core in itertools.islice(itertools.cycle(my_cores()), jobs):
        cores.put(core)
    running: dict[Future[dict[str, Any]], Cell] = {}
    console, columns = wide_console(), (TextColumn("{task.completed} cells"), TimeElapsedColumn())
    pool = ProcessPoolExecutor(jobs, context, start_worker, (cores,))
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=None)
            while True:
                taken = {cell.name for cell in running.values()} | set(failures)
                free = (cell for cell in wanted() if cell.name not in taken)
                for cell in list(itertools.islice(free, jobs - len(running))):
                    running[pool.submit(train, settings_of(cell))] = cell
                if not running:
                    return [f"{name} failed: {failure}" for name, failure in failures.items()]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    said = keep(future, cell.name, settings_of(cell), store, failures)
                    progress.advance(bar)
                    console.print(f"{cell.name:44} {said}", markup=False)
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def keep(future: Future[dict[str, Any]], name: str, settings: Settings, store: Store, failures: dict[str, str]) -> str:
    """Store what a cell came to, and say it. Raises CommoptError if the process itself is gone."""
    try:
        result = future.result()
    except BrokenProcessPool:
        raise CommoptError(f"{name}: its process was killed; is there enough memory?") from None
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"failed: {failures[name]}"
    store.put(name, settings, result)
    loss = "diverged" if result["loss"] is None else f"{result['loss']:.4f}"
    return f"loss {loss}  {seconds_text(result['seconds'])}"


def start_worker(cores: Any) -> None:
    """One core for each process: the threads of a cell take turns, and gain nothing from another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    torch.set_num_threads(1)
    logging.getLogger("commopt").setLevel(logging.ERROR)  # void steps are counted instead


def end_with_parent() -> None:
    """Do not stay behind if the process that started this one was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def my_cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
