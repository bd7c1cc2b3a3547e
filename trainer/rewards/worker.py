"""A process that scores responses with one function: a request in, a result out, until the end.

`python -m trainer.rewards.worker DESCRIPTOR FUNCTION SECONDS GIGABYTES`, started by
`trainer.rewards.pool`; messages are JSON. It imports nothing of torch: a process starts in the time
that its function takes to import.
"""

import faulthandler
import inspect
import json
import numbers
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from multiprocessing.connection import Connection
from typing import Any

from trainer.functions import function_named

# The trainer kills a process after its time limit. Without a trainer it ends by itself, this much
# later, whatever it is doing: the timer is a thread that needs nothing of the interpreter.
GRACE = 1.0
LONGEST_MESSAGE = 2000  # characters
LARGEST = 3.4028234663852886e38  # of fp32


def load(name: str) -> Callable[..., Any]:
    """The function of `name`, "module:function".

    Raises ValueError, naming what is missing, for what cannot be imported or called as
    `function(prompt=..., response=..., answer=...)`.
    """
    function = function_named(name, "a verifier")
    signature = inspect.signature(function)
    try:
        signature.bind(prompt="", response="", answer="")
    except TypeError as error:
        raise ValueError(
            f"{name}{signature} cannot be called with prompt, response and answer: {error}"
        ) from error
    return function


def score(function: Callable[..., Any], request: dict[str, Any]) -> dict[str, Any]:
    """The outcome of one request: a reward, an exception's text, or why it is no verdict."""
    try:
        value = function(**request)
    except Exception as error:  # of any kind: the answer is at fault, or the function
        text = traceback.format_exc()[-LONGEST_MESSAGE:]
        return {"exception": text, "out_of_memory": isinstance(error, MemoryError)}
    try:
        return {"reward": as_verdict(value)}
    except ValueError as error:
        return {"unusable": str(error)}


def as_verdict(value: Any) -> float:
    """`value` as a float: a number or a truth value, of Python, of numpy or of a tensor of no axes.

    Raises ValueError for anything else, and for what is not finite in fp32.
    """
    number = value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        number = value.item()
    with suppress(ArithmeticError):
        if isinstance(number, numbers.Real | Decimal) and abs(float(number)) <= LARGEST:
            return float(number)
    shown = " ".join(f"{value!r:.500}".split())
    raise ValueError(f"must return a number, finite in fp32; got {shown}, a {type(value).__name__}")


def _set_limits(gigabytes: float) -> None:
    """Let the process allocate `gigabytes` beyond what it has, and write no core file; on Linux."""
    try:
        import resource

        with open("/proc/self/statm") as sizes:
            now = int(sizes.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # not Linux
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + int(gigabytes * 1e9)
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _serve(trainer: Connection, function: Callable[..., Any], seconds: float) -> None:
    """Answer requests until the trainer closes the connection or is gone."""
    with open(os.devnull, "w") as nowhere, suppress(EOFError, OSError):
        _send(trainer, {"ready": True})
        while True:
            request = json.loads(trainer.recv_bytes())
            faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=nowhere)
            result = score(function, request)
            faulthandler.cancel_dump_traceback_later()
            _send(trainer, result)


def _send(trainer: Connection, message: dict[str, Any]) -> None:
    trainer.send_bytes(json.dumps(message).encode())


def main(descriptor: str, name: str, seconds: str, gigabytes: str) -> None:
    """Serve the trainer at the other end of the socket `descriptor`."""
    os.set_inheritable(int(descriptor), False)
    with Connection(int(descriptor)) as trainer:
        try:
            function = load(name)
        except ValueError as error:
            _send(trainer, {"error": str(error)})
            return
        _set_limits(float(gigabytes))
        _serve(trainer, function, float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
