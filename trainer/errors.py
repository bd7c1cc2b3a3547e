"""Which errors are a line to the user: what the settings, the files or the machine have caused."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a disk, a file system or somebody's permissions say. Others, as that a file is missing which
# nobody was asked for, are mistakes of the trainer's own and keep their traceback.
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
    """What is printed in the place of a traceback; None where the traceback is wanted."""
    if isinstance(error, ValueError):
        return str(error)
    if not isinstance(error, OSError) or error.errno not in _OUTSIDE:
        return None
    text = error.strerror or ""
    # Another text is one of ours, which says all.
    hint = _HINTS.get(error.errno) if text == os.strerror(error.errno) else None
    return ": ".join(str(part) for part in (error.filename, text, hint) if part)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What a full disk and the like say of a write, by Python or by safetensors, names `path`."""
    try:
        yield
    except OSError as error:
        # A name of the system's is another file's, or that of a temporary one.
        if error.filename is None or str(error.filename).startswith(str(path)):
            error.filename = str(path)
        raise
    except Exception as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def told_elsewhere(error: BaseException, rank: int) -> bool:
    """Whether another rank has the same error to tell, as `Ranks.on_all` says."""
    return getattr(error, "teller", rank) != rank
