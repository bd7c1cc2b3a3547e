"""Runs the shards of a plan, each in a process that is killed at its deadline, within a budget.

A crash, a hang or a lost GPU costs one measurement: its row says why, and the shard goes on behind
it in another process. This process imports no torch and never touches the GPU.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.plan import ALONGSIDE, TABLE, Shard
from benchmarks.gpu.rows import STARTED, Row, Rows
from benchmarks.gpu.worker import LOST, OUT_OF_TIME
from benchmarks.sources import ROOT

STAGE = "run"
# Kept at the end: killed processes need time to go.
RESERVE = 3.0
# Between the time when a shard should stop by itself and its kill.
GRACE = 3.0
# Less time than this is not worth a process.
LEAST = 5.0
# Where time is short, shards have this share of theirs or more; the last ones are left out.
SHORTEST = 0.6
# A measurement that takes longer hangs: the longest compilations are a third of it.
HANG = 60.0
# Processes that a shard may take.
ATTEMPTS = 8
SHARE_OF_MEMORY = 0.85
LOG_BYTES = 4 << 20
_POLL = 0.03


class Process:
    """A worker: imports first, then a job; what it prints goes to a file without a name."""

    def __init__(self, imports: Sequence[str]) -> None:
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._rest, self._at = b"", 0
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", *imports],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            # A group of its own, so that its children are killed with it.
            start_new_session=True,
        )

    def give(self, job: Row) -> None:
        assert self._child.stdin is not None
        # One that has died already says so by its exit status.
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(job).encode() + b"\n")
            self._child.stdin.close()

    def lines(self) -> list[str]:
        """The whole lines that came since the last call; all that is left once it has ended."""
        ended = self._child.poll() is not None
        data = os.pread(self.output.fileno(), 1 << 22, self._at)
        self._at += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if ended and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        return [line.decode(errors="replace") for line in whole]

    def status(self) -> int | None:
        return self._child.poll()

    def kill(self) -> None:
        """Ends its group; a process that waits for a driver may take its time."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(GRACE)
        for file in (self._child.stdin, self.output):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):
                file.close()


@dataclass
class _Running:
    """A shard at work."""

    shard: Shard
    process: Process
    until: float
    """When it should stop by itself."""
    began: float
    measuring: Row | None = None
    """What it has started and not yet written."""
    since: float = 0.0
    last: str = ""
    """What it printed last."""
    killed: bool = False


@dataclass
class Conductor:
    """One run: `end` is the moment of time.monotonic() that it never passes."""

    rows: Rows
    shards: list[Shard]
    end: float
    job: Row
    """What every worker is told: folder, setting and what rows are about."""
    processes: int
    """At a time, in stages whose shards run beside each other."""
    memory: float
    """Bytes of the GPU; 0 where there is none."""
    imports: Sequence[str] = ()
    print: Callable[[str], None] = print
    hang: float = HANG
    _spare: list[Process] = field(default_factory=list)
    _attempts: dict[str, int] = field(default_factory=dict)
    _left_out: list[str] = field(default_factory=list)
    _logged: int = 0

    def run(self) -> list[str]:
        """The shards that had no time, by name."""
        self.shards = [x for x in self.shards if x.stage == TABLE or not self._is_done(x)]
        try:
            for stage, of_stage in groupby(list(self.shards), lambda shard: shard.stage):
                self._say(f"== {stage}")
                self._stage(list(of_stage))
        finally:
            for process in self._spare:
                process.kill()
        return self._left_out

    def _is_done(self, shard: Shard) -> bool:
        return self.rows.has(STAGE, shard.name)

    def _stage(self, waiting: list[Shard]) -> None:
        running: list[_Running] = []
        alongside = waiting[0].stage in ALONGSIDE
        until = {waiting[0].name: self._until(waiting)} if alongside else {}
        try:
            while waiting or running:
                while waiting and self._has_room(waiting[0], running):
                    shard = waiting.pop(0)
                    # One deadline for all that run beside each other, and for a shard's restarts.
                    key = next(iter(until)) if alongside else shard.name
                    until.setdefault(key, self._until([shard]))
                    started = self._start(shard, until[key])
                    running += [started] if started else []
                time.sleep(_POLL)
                for one in list(running):
                    if self._watch(one):
                        running.remove(one)
                        waiting[:0] = [one.shard] if self._conclude(one) else []
        finally:
            for one in running:
                one.process.kill()

    def _has_room(self, shard: Shard, running: list[_Running]) -> bool:
        if not running:
            return True
        taken = sum(one.shard.bytes for one in running) + shard.bytes
        fits = not self.memory or taken <= SHARE_OF_MEMORY * self.memory
        return shard.stage in ALONGSIDE and len(running) < self.processes and fits

    def _wall(self, shards: list[Shard]) -> float:
        """Predicted seconds of these shards."""
        return sum(x.seconds / (self.processes if x.stage in ALONGSIDE else 1) for x in shards)

    def _until(self, now: list[Shard]) -> float:
        """When these should stop: where time is short, they and the later ones are shortened."""
        left = self.end - RESERVE - GRACE - time.monotonic()
        # Tables are made of what there is.
        left -= self._wall([x for x in self.shards if x.stage == TABLE and x not in now])
        planned = self._wall([x for x in self.shards if x.stage != TABLE or x in now])
        share = self._wall(now) * min(1.0, max(SHORTEST, left / planned))
        return time.monotonic() + min(share + max(0.0, left - planned), left)

    def _start(self, shard: Shard, until: float) -> _Running | None:
        now = time.monotonic()
        if until - now < LEAST:
            self._say(f"{shard.name}: no time is left; --resume goes on with it")
            self._leave_out(shard)
            return None
        process = self._spare.pop(0) if self._spare else Process(self.imports)
        details = {"work": shard.work, "until": until, "bytes": shard.bytes}
        process.give(self.job | details | shard.arguments)
        self._prepare()
        return _Running(shard, process, until, now)

    def _prepare(self) -> None:
        """Has the next processes import what they need while others work."""
        now, *rest = self.shards
        begins = now.stage not in ALONGSIDE and any(x.stage in ALONGSIDE for x in rest[:1])
        while len(self._spare) < min(self.processes if begins else 1, len(rest)):
            self._spare.append(Process(self.imports))

    def _watch(self, one: _Running) -> bool:
        """Whether it has ended, or was killed."""
        ended = one.process.status() is not None
        now = time.monotonic()
        for line in one.process.lines():
            if line.startswith(STARTED):
                one.measuring, one.since = json.loads(line.removeprefix(STARTED)), now
                continue
            one.last = line.strip() or one.last
            named = one.measuring and f"{one.measuring['stage']}: {one.measuring['name']}: "
            if named and line.startswith(named):
                one.measuring = None
            self._say(line)
        if ended:
            return True
        hangs = one.measuring is not None and now - one.since > self.hang
        if hangs or now > one.until + GRACE:
            one.killed = True
            one.process.kill()
        return one.killed

    def _conclude(self, one: _Running) -> bool:
        """Writes what became of it; whether the shard goes on in another process."""
        now, status = time.monotonic(), one.process.status()
        hung = one.killed and one.measuring is not None and now - one.since > self.hang / 2
        out_of_time = status == OUT_OF_TIME or (one.killed and not hung)
        # Children that outlived it.
        one.process.kill()
        seconds = {"seconds": round(now - one.began, 2), "predicted_s": one.shard.seconds}
        if status == 0:
            self._finish(one.shard, seconds)
            return False
        if out_of_time:
            self._say(f"{one.shard.name}: its time is over; --resume goes on with it")
            self._leave_out(one.shard)
            return False
        why = f"hung: killed after {now - one.since:.0f} s" if hung else _death(status, one.last)
        if one.measuring is not None:
            values = dict(one.measuring)
            self.rows.add(values.pop("stage"), values.pop("name"), **values, error=why)
            self._say(f"{one.shard.name}: {one.measuring['name']}: {why}")
        attempt = self._attempts[one.shard.name] = self._attempts.get(one.shard.name, 0) + 1
        if attempt < ATTEMPTS and (one.measuring is not None or status == LOST):
            return True
        self._finish(one.shard, seconds | {"error": why})
        self._say(f"{one.shard.name}: {why}")
        return False

    def _finish(self, shard: Shard, values: dict[str, Any]) -> None:
        self.shards.remove(shard)
        if shard.stage != TABLE:
            self.rows.add(STAGE, shard.name, **values)

    def _leave_out(self, shard: Shard) -> None:
        self.shards.remove(shard)
        self._left_out.append(shard.name)

    def _say(self, line: str) -> None:
        self.print(line)
        if self._logged < LOG_BYTES:
            self._logged += len(line) + 1
            with Path(self.job["out"], "log.txt").open("a") as file:
                file.write(line + "\n")


def ask(work: str, job: Row, seconds: float) -> Row:
    """What a worker answers to a question: its last line, as JSON."""
    process = Process(())
    end = time.monotonic() + seconds
    process.give(job | {"work": work, "until": end})
    while process.status() is None and time.monotonic() < end:
        time.sleep(_POLL)
    lines = process.lines()
    process.kill()
    if process.status() != 0:
        raise SystemExit("\n".join(lines) or f"no answer within {seconds:.0f} s")
    return json.loads(lines[-1])


def _death(status: int | None, last: str) -> str:
    if status is not None and status < 0:
        return f"died by {signal.Signals(-status).name}: {last[:200]}"
    return f"exit status {status}: {last[:200]}"
