"""What ends a command before its time: Ctrl-C and SIGTERM, each with a line and an exit status.

Ctrl-C ends it at once. SIGTERM, which schedulers send ahead of SIGKILL, lets training finish its
step and save; a second one ends that too, and so does a Ctrl-C. Every other command ends at once on
both, and keeps what it has written.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # It brings torch, which a command's --help does without.
    from trainer.ranks import Ranks

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
_NOTICE = b"SIGTERM: the step under way is finished and saved; a second one ends it at once\n"


class Stopped(KeyboardInterrupt):
    """The end by `signal`; `where` says how far it came. No Exception, as it is no fault."""

    def __init__(self, number: int, where: str = ""):
        super().__init__(where)
        self.signal = signal.Signals(number)
        self.where = where


class _State:
    """What this process knows of its signals."""

    deferred = False
    """Whether a step is under way, which SIGTERM lets end."""
    asked = False
    """Whether SIGTERM has come."""


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """Handle the signals as said above, if this is the main thread: others get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in STATUS}
    try:
        yield
    finally:
        _State.asked = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """A block that looks at `asked` after each step; until then SIGTERM ends nothing."""
    _State.deferred = True
    try:
        yield
    finally:
        _State.deferred = False


def asked(ranks: "Ranks") -> bool:
    """Whether SIGTERM has come to any rank; collective."""
    return any(ranks.gather(_State.asked))


def end_if(stopping: bool) -> None:
    """End as SIGTERM asked for, where `stopping`."""
    if stopping:
        raise Stopped(signal.SIGTERM)


def cause(error: BaseException) -> int | None:
    """The signal that caused `error`: an interruption, or a failure after SIGTERM, since processes
    of the engine and other ranks may have got the signal too."""
    if isinstance(error, Stopped):
        return error.signal
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    return signal.SIGTERM if _State.asked else None


def overtaken(error: BaseException) -> Exception | None:
    """The error that a rank was ending with when torchrun's SIGTERM came, another having failed."""
    if "RANK" in os.environ and error.__cause__ is None and isinstance(error, Stopped):
        return error.__context__ if isinstance(error.__context__, Exception) else None
    return None


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGTERM and _State.deferred and not _State.asked:
        _State.asked = True
        if os.environ.get("RANK", "0") == "0":
            os.write(2, _NOTICE)  # Not print: it may be what was interrupted.
        return
    _State.asked = _State.asked or number == signal.SIGTERM
    # The end may hang, as in an engine that does not close: the next signal needs no Python.
    signal.signal(number, signal.SIG_DFL)
    raise Stopped(number)
