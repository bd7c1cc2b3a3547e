"""Errors that are told in one line: those that settings, files or the machine have caused."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of a disk, a file system or permissions. Others, such as a missing file that no option
# names, are the trainer's own mistakes and keep their traceback.
_OUTSIDE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}
_HINTS = {
    errno.EEXIST: "a folder is wanted there",
    errno.EISDIR: "a file is wanted there",
    errno.ENOTDIR: "a folder is wanted there",
    errno.ENOSPC: "make room, and run the same command",
}


def line(error: BaseException) -> str | None:
    """The line to print in place of a traceback; None if the traceback is wanted."""
    if isinstance(error, ValueError):
        return str(error)
    if not isinstance(error, OSError) or error.errno not in _OUTSIDE:
        return None
    text = error.strerror or ""
    # A text that is not the system's is ours, and complete.
    hint = _HINTS.get(error.errno) if text == os.strerror(error.errno) else None
    return ": ".join(str(part) for part in (error.filename, text, hint) if part)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of a write, by Python or by safetensors, name `path`: a full disk and the like."""
    try:
        yield
    except OSError as error:
        # The system may name another file, or a temporary one beside `path`.
        if error.filename is None or str(error.filename).startswith(str(path)):
            error.filename = str(path)
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def told_elsewhere(error: BaseException, rank: int) -> bool:
    """Whether another rank tells the same error; `Ranks.on_all` decides which."""
    return getattr(error, "teller", rank) != rank
