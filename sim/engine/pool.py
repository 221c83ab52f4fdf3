"""Worker processes that play sites and arms; with one worker, the work is done in this process.

Tasks are `"module:function"` with arguments.  A worker ignores Ctrl-C (the parent decides) and dies
with its parent.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from chexfound.errors import ChexfoundError, SiteError
from sim.engine import listeners
from sim.engine.listeners import OnWarnings

OnProgress = Callable[[str, str, int, int], None]  # who, phase, done, of how many
Task = tuple[str, tuple[Any, ...]]


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    queue: deque[tuple[int, str, Task]] = field(default_factory=deque)  # ticket, label, task
    current: tuple[int, str] | None = None
    label: str = "nothing"  # of the last task


class Pool:
    """N workers, started when first needed.

    `submit` gives a task to a chosen worker, so that a site's state stays warm in one process;
    `run` spreads independent tasks over whoever is free.
    """

    def __init__(
        self, workers: int, on_progress: OnProgress | None = None, on_warnings: OnWarnings | None = None
    ) -> None:
        self.size = workers
        self.on_progress, self.on_warnings = on_progress, on_warnings
        self._workers: list[_Worker] = []
        self._results: dict[int, Any] = {}
        self._tickets = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, whatever they are doing: all that matters is on the disk."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    def submit(self, index: int, label: str, task: Task) -> int:
        """Queue a task at worker `index` (modulo their number); returns a ticket."""
        self._tickets += 1
        if self.size == 1:
            self._results[self._tickets] = task
            return self._tickets
        if not self._workers:
            self._start()
        worker = self._workers[index % self.size]
        worker.queue.append((self._tickets, label, task))
        self._feed(worker)
        return self._tickets

    def result(self, ticket: int) -> Any:
        """Wait for a task's value.

        Raises: whatever the task raised; SiteError naming what a worker was doing when it died.
        """
        if self.size == 1:
            return _call(self._results.pop(ticket), self.on_progress, self.on_warnings)
        while ticket not in self._results:
            self._pump()
        ok, value = self._results.pop(ticket)
        if not ok:
            raise value
        return value

    def run(self, tasks: Sequence[tuple[str, Task]]) -> Iterator[tuple[str, Any]]:
        """Do independent (label, task) pairs; yield (label, value) as they end."""
        if self.size == 1:
            for label, task in tasks:
                yield label, _call(task, self.on_progress, self.on_warnings)
            return
        waiting, running = deque(tasks), {}
        for index in range(min(self.size, len(tasks))):
            label, task = waiting.popleft()
            running[self.submit(index, label, task)] = (index, label)
        while running:
            while not (ended := [ticket for ticket in running if ticket in self._results]):
                self._pump()
            for ticket in ended:
                index, label = running.pop(ticket)
                if waiting:
                    next_label, task = waiting.popleft()
                    running[self.submit(index, next_label, task)] = (index, next_label)
                yield label, self.result(ticket)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, sys.path, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def _feed(self, worker: _Worker) -> None:
        if worker.current is None and worker.queue:
            ticket, label, task = worker.queue.popleft()
            worker.current, worker.label = (ticket, label), label
            try:
                worker.pipe.send((ticket, task))
            except OSError:
                self._died(worker)

    def _pump(self) -> None:
        """Take in what the workers have to say; returns after at most half a second."""
        for pipe in wait([worker.pipe for worker in self._workers], timeout=0.5):
            worker = next(worker for worker in self._workers if worker.pipe is pipe)
            try:
                kind, *content = worker.pipe.recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                self._died(worker)
                continue
            if kind in ("progress", "warnings"):
                listener: Callable[..., None] | None = self.on_progress if kind == "progress" else self.on_warnings
                if listener is not None:
                    listener(*content)
                continue
            ticket, value = content
            self._results[ticket] = (kind == "ok", value)
            worker.current = None
            self._feed(worker)

    def _died(self, worker: _Worker) -> None:
        worker.process.join(5)
        code = worker.process.exitcode
        how = (
            f"killed by signal {-code} ({signal.Signals(-code).name})"
            if code is not None and code < 0
            else f"exit code {code}"
        )
        doing = f"{'works' if worker.current else 'last worked'} on {worker.label}"
        hint = "; the machine may be out of memory" if code == -signal.SIGKILL else ""
        raise SiteError(f"the process that {doing} died ({how}{hint})")


def _call(task: Task, on_progress: OnProgress | None, on_warnings: OnWarnings | None) -> Any:
    from client.answer import hospital

    name, arguments = task
    module, _, function = name.partition(":")
    hospital.on_progress, listeners.on_warnings = on_progress, on_warnings
    return getattr(importlib.import_module(module), function)(*arguments)


def _work(pipe: Connection, path: list[str], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: two runs must never share a site's disk
        if os.getppid() != parent:
            return
    sys.path[:] = path

    def progress(*content: Any) -> None:
        pipe.send(("progress", *content))

    def warn(*content: Any) -> None:
        pipe.send(("warnings", *content))

    while True:
        try:
            ticket, task = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[str, int, Any] = ("ok", ticket, _call(task, progress, warn))
        except ChexfoundError as error:
            answer = ("error", ticket, error)
        except Exception as error:  # noqa: BLE001 (carried to the parent, which raises it)
            told = RuntimeError(f"{type(error).__name__}: {error}")
            told.add_note(traceback.format_exc())  # travels with it, for the parent's log
            answer = ("error", ticket, told)
        pipe.send(answer)
