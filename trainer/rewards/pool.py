"""Processes that score answers, each with a time and a memory limit.

One answer that hangs, crashes or takes all memory costs its own process and nothing else. That is
why they are not `concurrent.futures`' or pebble's: there a process that dies, in the first any and
in the second an idle one, ends the pool for all others.
"""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

START_SECONDS = 300.0
"""The most seconds that a process may take to start and import the function."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one answer."""

    reward: float = 0.0
    failure: Literal["", "timeout", "crash"] = ""
    message: str = ""
    """What a crash left: the exception with its traceback, or how the process ended."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    deadline: float  # by time.monotonic: for its start, then for an answer
    ready: bool = False
    job: int | None = None  # number of the request that it works on

    @property
    def idle(self) -> bool:
        return self.ready and self.job is None

    def kill(self) -> None:
        """Kill it at once, with all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class Pool:
    """Up to `workers` processes that import `function` and score one answer at a time.

    They start when there is work for them. They end with the pool, with the trainer, however that
    ends, and with whatever interrupts a call.
    """

    def __init__(self, function: str, workers: int, seconds: float, gigabytes: float):
        self.function = function
        self.workers = workers
        self.seconds = seconds
        self.gigabytes = gigabytes
        self._workers: list[_Worker] = []
        self.close = weakref.finalize(self, _kill_all, self._workers)

    def start(self) -> None:
        """Start one process; raises ValueError for a function that cannot be used."""
        self._staff(1)
        while not any(worker.ready for worker in self._workers):
            self._collect([])

    def run(self, requests: Sequence[dict[str, Any]]) -> list[Outcome]:
        """The outcome of each request, in their order.

        A request is the function's keyword arguments, "prompt", "response" and "answer".
        Raises ValueError for a function that cannot be used or gives no verdict.
        """
        outcomes: dict[int, Outcome] = {}
        waiting = deque(range(len(requests)))
        try:
            while len(outcomes) < len(requests):
                self._hand_out(waiting, requests)
                self._staff(min(self.workers, len(requests) - len(outcomes)))
                outcomes |= self._collect(requests)
        except BaseException:  # what is under way would answer the next call
            _kill_all(self._workers)
            raise
        return [outcomes[job] for job in range(len(requests))]

    def _hand_out(self, waiting: deque[int], requests: Sequence[dict[str, Any]]) -> None:
        for worker in [worker for worker in self._workers if worker.idle]:
            if not waiting:
                return
            try:
                worker.connection.send_bytes(json.dumps(requests[waiting[0]]).encode())
            except OSError:  # it died idle, of no answer
                self._remove(worker)
                continue
            worker.job = waiting.popleft()
            worker.deadline = time.monotonic() + self.seconds

    def _staff(self, count: int) -> None:
        """Start processes until there are `count`, ready or starting."""
        while len(self._workers) < count:
            ours, theirs = Pipe()
            arguments = map(str, (theirs.fileno(), self.function, self.seconds, self.gigabytes))
            process = subprocess.Popen(
                [sys.executable, "-m", "trainer.rewards.worker", *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # A session of its own: Ctrl-C reaches the trainer alone, which then ends it.
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": _search_path(), "OMP_NUM_THREADS": "1"},
            )
            theirs.close()
            self._workers.append(_Worker(process, ours, time.monotonic() + START_SECONDS))

    def _collect(self, requests: Sequence[dict[str, Any]]) -> dict[int, Outcome]:
        """Wait until something happens to a process; the outcomes, by number of the request."""
        active = [worker for worker in self._workers if not worker.idle]
        left = min(worker.deadline for worker in active) - time.monotonic()
        heard = wait([worker.connection for worker in active], max(left, 0.0))
        found: dict[int, Outcome] = {}
        for worker in active:
            job = worker.job
            if worker.connection in heard:
                outcome = self._hear(worker, requests)
            elif time.monotonic() >= worker.deadline:
                self._remove(worker)
                if job is None:
                    raise ValueError(f"{self.function} took over {START_SECONDS:g} s to import")
                outcome = Outcome(failure="timeout")
            else:
                continue
            if job is not None and outcome is not None:
                found[job] = outcome
        return found

    def _hear(self, worker: _Worker, requests: Sequence[dict[str, Any]]) -> Outcome | None:
        """The outcome that `worker` sends; None if it says that it is ready."""
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            self._remove(worker)
            ended = f"the process of {self.function} ended with status {worker.process.returncode}"
            if worker.job is None:
                raise ValueError(f"{ended} while it started") from None
            late = time.monotonic() >= worker.deadline  # it may have been first to notice
            return Outcome(failure="timeout" if late else "crash", message=ended)
        if "error" in message:
            self._remove(worker)
            raise ValueError(message["error"])
        if worker.job is None:
            worker.ready = True
            return None
        if "unusable" in message:
            request = requests[worker.job]
            raise ValueError(
                f"{self.function} {message['unusable']} for the prompt {request['prompt']!r:.500}, "
                f"response {request['response']!r:.500}"
            )
        worker.job = None
        if "exception" in message:
            if message["out_of_memory"]:  # of its own, perhaps, piled up over many answers
                self._remove(worker)
            return Outcome(failure="crash", message=message["exception"])
        return Outcome(message["reward"])

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


def _search_path() -> str:
    """The places where this process finds modules, so that another finds the same."""
    return os.pathsep.join(folder or os.getcwd() for folder in sys.path)


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()
