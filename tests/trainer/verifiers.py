"""Verifiers that hang, crash and fail as the response tells them; run in processes of their own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NOT_CALLABLE = 3
OTHERS = {
    "true": True,
    "nan": float("nan"),
    "none": None,
    "text": "1.0",
    "list": [1.0],
    "complex": 1j,
    "infinite": float("-inf"),
}


def scripted(prompt: str, response: str, answer: Any) -> Any:
    """A number is its own reward, anything else is done.

    `prompt` is a folder for process ids, each a file of what the process is at.
    """
    if prompt:
        (Path(prompt) / str(os.getpid())).write_text(response)
    if response == "hang":
        while True:
            time.sleep(0.01)
    if response == "hang in C":  # deaf to signals, and no other thread gets a turn
        re.match("(a+)+$", "a" * 60 + "b")
    if response == "hang with a child":
        child = subprocess.Popen(["sleep", "1000"])
        (Path(prompt) / str(child.pid)).touch()
        time.sleep(1000)
    if response == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if response == "exit":
        os._exit(0)
    if response == "sys.exit":
        sys.exit(0)
    if response == "memory":
        return float(len(bytes(10**10)))
    if response == "raise":
        raise RuntimeError("of no use")
    if response == "slow":
        time.sleep(0.2)
        return 1
    if response == "print":
        print("from a verifier")
        return 1
    return OTHERS[response] if response in OTHERS else float(response)


def even_or_worse(prompt: str, response: str, answer: Any) -> float:
    """`Even` of the small tasks, which hangs on responses of one kind and crashes on another."""
    if response[:1] in ("7", "="):
        time.sleep(1000)
    if response[:1] in ("9", "+"):
        os._exit(1)
    return float(response[:1] in tuple("02468"))


def evaluating(prompt: str, response: str, answer: Any) -> float:
    """What no verifier may do."""
    eval(response)
    return 0.0


def of_two(prompt: str, response: str) -> float:
    """Lacks a parameter."""
    return 0.0


def always_fails(*, prompt: str, response: str, **rest: Any) -> float:
    """Fails through no answer's fault."""
    raise KeyError("column")
