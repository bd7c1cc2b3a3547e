"""One owner of a folder at a time: a lock of the operating system, which tells who has it.

The lock is fcntl's on a file beside the work. It ends with its process, however that ends, and a
child that lives on does not have it: neither a fork nor an exec inherits it, as they would flock's.
It holds between the machines of a shared file system: NFS with its lock service, and Lustre mounted
with `flock`. Where a file system has no locks, and on Windows, a warning says so and nobody is kept
out. One caution: a process that opens and closes the lock's file itself gives the lock back.
"""

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from trainer.ranks import Ranks

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # A link to nowhere would look like a folder that has gone.
_LONGEST_COMMAND = 200
# The system lets a process lock a file that it has locked. By file: the process, as a fork inherits
# this and not the lock.
_held: dict[str, int] = {}


@contextlib.contextmanager
def owned(path: Path, ranks: Ranks | None = None, beside: bool = False) -> Iterator[None]:
    """Own `path` meanwhile, so that nobody else does: a folder, made if it is missing.

    With `beside` it is a file, or a folder that must not be there yet: then the lock lies beside
    it. Of several ranks the first takes the lock for all; collective. Folders that were made here,
    and are empty at the end, are removed again.

    Raises:
        ValueError: somebody else owns it; with host, process, command and time. On all ranks.
        OSError: the folder cannot be made or written; on all ranks.
    """
    folder = path.parent if beside else path
    file = folder / (f".{path.name}{NAME}" if beside else NAME)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]

    def take() -> int | None:
        return _take(file, path)

    descriptor: int | None = None
    try:
        descriptor = take() if ranks is None else ranks.on_first(take)
        yield
    finally:
        if ranks is None or ranks.first:
            _release(file, descriptor)
            for parent in made:
                with contextlib.suppress(OSError):  # It has something in it.
                    parent.rmdir()


def _take(file: Path, path: Path) -> int | None:
    """The descriptor that has the lock; None if there are no locks."""
    if _held.get(os.path.realpath(file)) == os.getpid():
        raise ValueError(f"{path} is in use by this process")
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # In /proc, or below a working directory that is gone.
            raise ValueError(f"{path} cannot be made: {error.strerror}") from error
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
        except FileNotFoundError:  # Its owner has just removed the folder, as empty.
            continue
        try:
            if not _lock(descriptor, path):
                os.close(descriptor)
                return None
            # The one who had it removes the file: then this is a lock on nothing.
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_myself()).encode())
                _held[os.path.realpath(file)] = os.getpid()
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(file)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Whether there are locks; ValueError where somebody has this one."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no locks")
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise ValueError(f"{path} is in use{_holder(descriptor)}") from None
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"warning: {path} cannot be locked ({error.strerror}): see to it yourself that nothing "
            "else writes into it",
            file=sys.stderr,
        )
        return False
    return True


def _release(file: Path, descriptor: int | None) -> None:
    if descriptor is None or _held.get(os.path.realpath(file)) != os.getpid():
        return
    del _held[os.path.realpath(file)]
    # First removed, then unlocked: nobody else can have it meanwhile.
    with contextlib.suppress(OSError):
        file.unlink()
    os.close(descriptor)


def _myself() -> dict[str, Any]:
    command = shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": command[:_LONGEST_COMMAND],
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _holder(descriptor: int) -> str:
    """Who has the lock, as the end of a sentence."""
    try:
        own = json.loads(os.pread(descriptor, 1 << 16, 0))
        who = f"by process {own['pid']} on {own['host']} since {own['since']}: {own['command']}"
    except (ValueError, TypeError, KeyError):  # It has only just taken it.
        who = "by another process"
    return f" {who}. Wait for its end, end it, or choose another folder"
