"""Worker processes that may die: a task that kills its worker is a result, not the end.

Each worker is forked from a clean process, runs on one thread and takes one task at a time; a task
sends any number of records. A worker that dies, takes too long or grows too large is replaced, and
its task recorded.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.5
# A new process spends seconds on imports, more on a busy machine; no task is to blame for those.
_START_SECONDS = 300.0
_STARTED, _DONE = "started", "done"


@dataclass(frozen=True)
class Task:
    """A call of `function(*arguments)` in a worker, which yields one record for each of `parts`."""

    name: str
    parts: tuple[str, ...]
    function: Callable[..., Iterator[dict[str, Any]]]
    arguments: tuple[Any, ...]


@dataclass
class Died:
    """A part of a task that ended its worker."""

    status: str
    error: str


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: Task | None = None
    left: list[str] = field(default_factory=list)
    since: float = 0.0
    started: bool = False


def run_tasks(
    tasks: Iterable[Task], workers: int, timeout: float, memory: float
) -> Iterator[tuple[Task, str, dict[str, Any] | Died]]:
    """Run tasks in workers; give (task, part, record or how it died) as they come.

    Args:
        tasks: what to run.
        workers: how many processes.
        timeout: seconds one part may take.
        memory: bytes one worker may hold; watched on Linux only.
    """
    context = multiprocessing.get_context("forkserver")
    queue = deque(tasks)
    pool: list[_Worker] = []
    try:
        while queue or any(w.task for w in pool):
            while queue and len(pool) < workers:
                pool.append(_start(context))
            for index, worker in enumerate(pool):
                if worker.task is None and queue:
                    if _resident(worker.process.pid) > memory / 2:
                        # What earlier models left behind must not count against the next one.
                        _stop(worker)
                        pool[index] = _start(context)
                    _give(pool[index], queue.popleft())
            ready = wait([w.connection for w in pool if w.task], timeout=_POLL_SECONDS)
            for worker in list(pool):
                if worker.task is None:
                    continue
                task, died = worker.task, _check(worker, timeout, memory)
                if worker.connection in ready:
                    try:
                        record = worker.connection.recv()
                    except (EOFError, OSError):
                        worker.process.join(5)
                        died = Died("crashed", _exit_text(worker.process.exitcode))
                    else:
                        if record == _STARTED:
                            worker.since, worker.started = time.monotonic(), True
                        elif record == _DONE:
                            worker.task = None
                        else:
                            worker.since = time.monotonic()
                            yield task, worker.left.pop(0), record
                        continue
                if died is not None:
                    _stop(worker)
                    pool.remove(worker)
                    if worker.left:
                        part, *rest = worker.left
                        if rest:
                            names = {**vars(task), "parts": tuple(rest)}
                            queue.appendleft(Task(**names))
                        yield task, part, died
    finally:
        for worker in pool:
            _stop(worker)


def _start(context: Any) -> _Worker:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _give(worker: _Worker, task: Task) -> None:
    worker.task, worker.left, worker.since = task, list(task.parts), time.monotonic()
    try:
        worker.connection.send((task.function, (*task.arguments, list(task.parts))))
    except OSError:
        pass  # it died while idle; the next look at its connection finds that out


def _check(worker: _Worker, timeout: float, memory: float) -> Died | None:
    seconds = time.monotonic() - worker.since
    if seconds > (timeout if worker.started else max(timeout, _START_SECONDS)):
        return Died("timeout", f"took more than {timeout:.0f} s; give more --timeout")
    held = _resident(worker.process.pid)
    if held > memory:
        return Died(
            "crashed", f"held {held / 2**30:.1f} GiB of {memory / 2**30:.1f}; give more --memory-gb"
        )
    return None


def _resident(pid: int) -> int:
    """Give the memory a process holds, in bytes; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join()


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was killed by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"


def _serve(connection: Connection) -> None:
    # An interrupt from the keyboard reaches every process; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = connection.recv()
            connection.send(_STARTED)
            for record in function(*arguments):
                connection.send(record)
            connection.send(_DONE)
        except (EOFError, ConnectionError):
            return  # the parent is gone
