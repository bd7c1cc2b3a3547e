"""Runs of a comparison: a process each, several at a time, within a budget of time."""

import contextlib
import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer import checkpoint
from trainer.checkpoint.branch import find_origin
from trainer.config import Config
from trainer.errors import line
from trainer.launch.stop import STATUS, Stopped, signals_stop
from trainer.log import read_rows, read_run

LOG = "log.txt"
LAST_LINES = 5
_PR_SET_PDEATHSIG = 1
_CHILD = "from trainer.studies.compare.driver import run_one; run_one()"


@dataclass
class Outcome:
    """What a call of `drive` came to, by the names of the runs."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """The last lines of their logs."""
    left: list[str] = field(default_factory=list)
    """Not started or not finished, for want of time."""


def drive(
    configs: Sequence[Config],
    jobs: int,
    hours: float = 0.0,
    on_finished: Callable[[int], None] = lambda done: None,
    branch: str = "",
) -> Outcome:
    """Do the runs that are not finished yet, in their order, `jobs` at a time.

    The first run of each seed goes before the others of that seed, which use its warm start; runs
    of a branch have none. With `hours` no run is started that would end later, by the mean of those
    done in this call. `on_finished` is called after each, with the number that is finished. An
    interruption ends the runs under way, and so does an error of `on_finished`, which is raised.
    All of them go on from their checkpoints in the next call. `branch` is that of `train`, for all
    runs.
    """
    state = _State(configs, hours, on_finished, branch)
    workers = [threading.Thread(target=state.work) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)
    except BaseException:
        state.stop()
        for worker in workers:
            worker.join()
        raise
    if state.error is not None:
        raise state.error
    state.outcome.left += [config.name for config in state.waiting]
    return state.outcome


def is_finished(config: Config, branch: str = "") -> bool:
    """Whether the run of `config`, from that `branch` if any, is on disk with all of its steps.

    It is where its checkpoints were deleted, and is not where the last was never written.
    """
    folder = Path(config.root) / config.name
    metrics, run = folder / "metrics.jsonl", folder / "run.json"
    if not (metrics.exists() and run.exists()):
        return False
    if read_run(folder)["config"] != json.loads(json.dumps(asdict(config))):
        return False
    if began_elsewhere(config, branch):
        return False
    newest = checkpoint.newest(folder)
    if newest is not None and checkpoint.step_of(newest) != config.steps:
        return False
    rows = read_rows(metrics)
    return bool(rows) and rows[-1]["step"] == config.steps


def began_elsewhere(config: Config, branch: str = "") -> str:
    """Where the run of `config` began that is on disk, if not at `branch`; else nothing."""
    folder = Path(config.root) / config.name
    if not (folder / "run.json").exists():
        return ""
    known = read_run(folder).get("origin")
    if known is None:
        return "its own step 0" if branch else ""
    began = f"{known['run']}@{known['step']}"
    if not branch:
        return began
    origin = find_origin(branch)
    same = known["run"] == str(origin.run.resolve()) and origin.step in (None, known["step"])
    return "" if same else began


def run_one() -> None:
    """A run in this process; configuration and branch come by stdin from the one that starts it.

    The id of that process is the first argument.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it was killed before the signal was asked for
        sys.exit("error: the process that started this run has ended")
    config, branch = pickle.load(sys.stdin.buffer)

    import transformers

    from trainer.train import train

    transformers.utils.logging.disable_progress_bar()
    try:
        with signals_stop():
            train(config, branch=branch)
    except Stopped as stopped:
        print(f"stopped {stopped.where}", file=sys.stderr)
        sys.exit(STATUS[stopped.signal])
    except Exception as error:
        if (text := line(error)) is None:
            raise
        sys.exit(f"error: {text}")


class _State:
    """What the threads share, each of which waits for one process at a time."""

    def __init__(
        self,
        configs: Sequence[Config],
        hours: float,
        on_finished: Callable[[int], None],
        branch: str,
    ) -> None:
        self.outcome = Outcome([x.name for x in configs if is_finished(x, branch)])
        self.error: BaseException | None = None
        self.waiting = [config for config in configs if config.name not in self.outcome.finished]
        self._on_finished, self._branch = on_finished, branch
        self._began, self._limit = time.monotonic(), 3600 * hours
        self._seconds: list[float] = []
        self._warming: set[int] = set()
        # A seed of which a run is done has its warm start.
        self._warm = {c.seed for c in configs if c.name in self.outcome.finished}
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._changed = threading.Condition()

    def work(self) -> None:
        """Do one run after the other; an error of this process ends the other threads too."""
        try:
            self._work()
        except BaseException as error:
            self.error = error
            self.stop()

    def _work(self) -> None:
        """Until no run is left that could be started."""
        while (config := self._take()) is not None:
            began = time.monotonic()
            try:
                error = self._run(config)
            except OSError as problem:  # no process, no log: the other runs wait for an outcome
                error = str(problem)
            with self._changed:
                self._warming.discard(config.seed)
                self._put_away(config, error, time.monotonic() - began)
                self._changed.notify_all()

    def stop(self) -> None:
        """End all processes and start no more."""
        with self._changed:
            self._stopped = True
            for process in self._running:
                process.terminate()
            self._changed.notify_all()

    def _take(self) -> Config | None:
        """The next run whose warm start is there or is its own to make."""
        with self._changed:
            while self.waiting and not self._stopped and not self._late():
                for config in self.waiting:
                    if config.seed not in self._warming:
                        self.waiting.remove(config)
                        warming = config.warm_start.steps and not self._branch
                        if warming and config.seed not in self._warm:
                            self._warming.add(config.seed)
                        return config
                self._changed.wait()
            return None

    def _late(self) -> bool:
        """Whether a run that starts now would end after the limit."""
        mean = sum(self._seconds) / max(len(self._seconds), 1)
        return bool(self._limit) and time.monotonic() - self._began + mean > self._limit

    def _put_away(self, config: Config, error: str, seconds: float) -> None:
        if self._stopped:
            self.outcome.left.append(config.name)
        elif error:
            self.outcome.failed[config.name] = error
        else:
            self._warm.add(config.seed)
            self._seconds.append(seconds)
            self.outcome.finished.append(config.name)
            self._on_finished(len(self.outcome.finished))

    def _run(self, config: Config) -> str:
        """Run it to its end; the end of its log where that is not the right one."""
        log = Path(config.root) / config.name / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads or 1)}
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
            with self._changed:
                self._running.add(process)
                if self._stopped:
                    process.terminate()
            with contextlib.suppress(BrokenPipeError):  # its log says why
                process.communicate(pickle.dumps((config, self._branch)))
            with self._changed:
                self._running.discard(process)
        if process.returncode == 0:
            return ""
        lines = log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:]
        return "\n".join(lines) or f"exit status {process.returncode}"
