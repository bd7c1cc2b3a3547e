"""The answers of one machine in the user's cache folder: a JSON file per question.

A file appears whole or not at all, so that processes may write at once. A question that is being
checked has a mark with the process; who finds the mark of a process that ended takes it as an
answer: the kernels ended it. Nothing here can fail a call: what cannot be read or written is told
once.
"""

import contextlib
import datetime
import hashlib
import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import machine

# Seconds after which the mark of another host's process is that of one that ended.
OLD = 3600
DIED = "the process ended during the check"
_told: set[Path] = set()


class Answer(NamedTuple):
    """right, or the reason why not."""

    right: bool
    reason: str = ""


def cache_folder() -> Path:
    """EK_CACHE_DIR, or entropy_kernels in XDG_CACHE_HOME or in ~/.cache.

    A user without a home, as containers have them, has it in the folder of temporary files.
    """
    if own := os.environ.get("EK_CACHE_DIR"):
        return Path(os.path.expanduser(own))
    home = os.path.expanduser("~")
    cache = tempfile.gettempdir() if home == "~" else os.path.join(home, ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or cache) / "entropy_kernels"


class Record:
    """The answers of one machine, as `machine.machine` describes it."""

    def __init__(self, about: dict[str, str]) -> None:
        self._about = about
        self.gpu = about["gpu"]
        self.folder = cache_folder() / machine.folder_name(about)

    def read(self) -> dict[str, Answer]:
        """Every recorded answer by its question's text; a dead process's mark is one too."""
        found: dict[str, Answer] = {}
        for path in self._files("*.started"):
            mark = _parse(path)
            question = mark.get("question")
            if isinstance(question, str) and not _runs(mark, path):
                found[question] = Answer(False, DIED)
        for path in self._files("*.json"):
            if path.name == "machine.json":
                continue
            answer = _parse(path)
            question, reason = answer.get("question"), answer.get("reason")
            if isinstance(question, str) and (reason is None or isinstance(reason, str)):
                found[question] = Answer(reason is None, reason or "")
            elif answer:
                _tell(path, "is no answer about a kernel; it is left out")
        return found

    def write(self, question: str, answer: Answer) -> None:
        """Keeps an answer; it replaces an older one, and any mark of a process that ended."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        reason = None if answer.right else answer.reason
        with self._writing():
            self._put(self.folder / "machine.json", self._about)
            path = self.folder / f"{_name(question)}.json"
            self._put(path, {"question": question, "reason": reason, "date": date})
            for mark in self._files(f"{_name(question)}.*.started"):
                if not _runs(_parse(mark), mark):
                    mark.unlink(missing_ok=True)

    @contextlib.contextmanager
    def started(self, question: str) -> Iterator[None]:
        """Marks the question as being checked. The mark stays only if the process ends within."""
        host, pid = socket.gethostname(), os.getpid()
        path = self.folder / f"{_name(question)}.{host}.{pid}.started"
        mark = {"question": question, "host": host, "pid": pid, "born": _born(pid)}
        with self._writing():
            self._put(path, mark)
        try:
            yield
        finally:
            with self._writing():
                path.unlink(missing_ok=True)

    def _files(self, pattern: str) -> list[Path]:
        with self._writing():
            return sorted(self.folder.glob(pattern))
        return []

    def _put(self, path: Path, contents: object) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=self.folder, suffix=".new", delete=False
        ) as file:
            try:
                json.dump(contents, file, indent=1)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _tell(self.folder, f"does not keep the checks of kernels: {error}")


def _name(question: str) -> str:
    op = question.split()[0]
    return f"{op}-{hashlib.sha256(question.encode()).hexdigest()[:16]}"


def _parse(path: Path) -> dict[str, object]:
    """The file's object; empty, and told, where it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _tell(path, f"is damaged and left out: {error}")
        return {}
    if not isinstance(found, dict):
        _tell(path, "is damaged and left out: it holds no object")
        return {}
    return found


def _runs(mark: dict[str, object], path: Path) -> bool:
    """Whether the process of a mark may still be checking."""
    pid = mark.get("pid")
    if not isinstance(pid, int):
        return False
    if mark.get("host") != socket.gethostname() or os.name != "posix":
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime < OLD
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    # The number may be another process's by now.
    return mark.get("born") == _born(pid)


def _born(pid: int) -> str:
    """When a process started, where the system tells."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "a zombie" if state == "Z" else fields[18]
    except (OSError, IndexError):
        return ""


def _tell(path: Path, why: str) -> None:
    """Once per path."""
    if path not in _told:
        _told.add(path)
        warnings.warn(f"{path} {why}", RuntimeWarning, stacklevel=2)
