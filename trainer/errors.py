"""Which errors are a line to the user: what the settings, the files or the machine have caused."""

import errno
import os
import re

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
    if isinstance(error, OSError):
        number, text = error.errno, error.strerror or ""
    # safetensors and tokenizers have errors of their own.
    elif found := re.search(r"\(os error (\d+)\)", str(error)):
        number, text = int(found[1]), os.strerror(int(found[1]))
    else:
        return None
    if number not in _OUTSIDE:
        return None
    name = getattr(error, "filename", None)
    # Without a name of a file the text may be one of ours, which says all.
    hint = _HINTS.get(number) if text == os.strerror(number) else None
    return ": ".join(str(part) for part in (name, text, hint) if part)


def told_elsewhere(error: BaseException, rank: int) -> bool:
    """Whether another rank has the same error to tell, as `Ranks.on_all` says."""
    return getattr(error, "teller", rank) != rank
