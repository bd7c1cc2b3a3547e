"""Numbers for a host program of csrc/cuda, and its answers, as files that answers.h reads."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from . import host


def answers(program: Path, numbers: Iterable[np.ndarray], seed: int = 0) -> bytes:
    """What the program writes, given `numbers`, in the order of one schedule.

    raises: AssertionError with what the program says, or a sanitizer in it, where it fails;
        host.Crash.
    """
    given, written = program.with_suffix(".in"), program.with_suffix(".out")
    given.write_bytes(b"".join(array.tobytes() for array in numbers))
    done = host.run(program, str(given), str(written), str(seed))
    assert host.how_failed(done) == "", done.stderr
    return written.read_bytes()
