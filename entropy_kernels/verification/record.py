"""The answers of one machine in the user's cache folder: a JSON file per question.

A file appears whole or not at all, so that processes may write at once. A question that is being
checked has a mark, which its process locks. A mark that nobody locks any more is a death: of the
kernels, or by a signal from outside. So it is asked again after the first and refused after the
second. Nothing here can fail a call: what cannot be read or written is told once.
"""

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from . import machine

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Seconds after which a mark is a death's where no lock can tell: those of other hosts.
OLD = 3600
# Deaths that refuse a question: one may be a scheduler's.
DEATHS = 2
DIED = (
    "processes ended twice during its check; python -m entropy_kernels --verify, or "
    "EK_VERIFY=force, checks it again"
)
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
        self.folder = cache_folder().absolute() / machine.folder_name(about)
        # Why answers are not kept, if any was not.
        self.problem = ""

    def read(self) -> dict[str, Answer]:
        """Every recorded answer by its question's text; two deaths since then are one too."""
        found: dict[str, Answer] = {}
        for path in self._files("*.json"):
            if path.name == "machine.json":
                continue
            answer = _parse(path)
            question, reason = answer.get("question"), answer.get("reason")
            if isinstance(question, str) and (reason is None or isinstance(reason, str)):
                found[question] = Answer(reason is None, reason or "")
            elif answer:
                _tell(path, "is no answer about a kernel; it is left out")
        for question, deaths in self._deaths("*").items():
            if deaths >= DEATHS and found.get(question, Answer(True)).right:
                found[question] = Answer(False, DIED)
        return found

    def write(self, question: str, answer: Answer) -> None:
        """Keeps an answer; it replaces an older one, and the marks of deaths before it."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        reason = None if answer.right else answer.reason
        with self._writing():
            self._put(self.folder / "machine.json", self._about)
            path = self.folder / f"{_name(question)}.json"
            self._put(path, {"question": question, "reason": reason, "date": date})
            for mark in self._files(f"{_name(question)}.*.started"):
                if _is_death(mark, _parse(mark)):
                    mark.unlink(missing_ok=True)

    @contextlib.contextmanager
    def started(self, question: str) -> Iterator[None]:
        """Marks the question as being checked. The mark stays only if the process ends within.

        It counts the deaths before it, so that ranks that end together are one.
        """
        path = self.folder / f"{_name(question)}.{secrets.token_hex(8)}.started"
        with contextlib.ExitStack() as stack:
            with self._writing():
                deaths = self._deaths(_name(question)).get(question, 0)
                mark = {"question": question, "host": socket.gethostname(), "deaths": deaths}
                # The lock ends with the file, and the file with the process.
                stack.callback(self._put(path, mark, lock=True).close)
            try:
                yield
            finally:
                with self._writing():
                    path.unlink(missing_ok=True)

    def _deaths(self, name: str) -> dict[str, int]:
        """How often processes ended within the check of a question, by its text."""
        found: dict[str, int] = {}
        for path in self._files(f"{name}.*.started"):
            mark = _parse(path)
            question, before = mark.get("question"), mark.get("deaths")
            if isinstance(question, str) and isinstance(before, int) and _is_death(path, mark):
                found[question] = max(found.get(question, 0), before + 1)
        return found

    def _files(self, pattern: str) -> list[Path]:
        with self._writing():
            return sorted(self.folder.glob(pattern))
        return []

    def _put(self, path: Path, contents: object, lock: bool = False) -> TextIO:
        """Writes a file in one step; `lock`: and returns it, locked for as long as it is open."""
        self.folder.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
        file = new.open("x", encoding="utf-8")
        try:
            if lock and fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            json.dump(contents, file, indent=1)
            file.flush()
            if not lock or fcntl is None:
                file.close()
            os.replace(new, path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            with contextlib.suppress(OSError):
                file.close()
            raise
        return file

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = str(error)
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
    except OSError as error:
        _tell(path, f"is unreadable and left out: {error}")
        return {}
    except (ValueError, RecursionError) as error:
        _tell(path, f"is damaged and left out: {error}")
        return {}
    if not isinstance(found, dict):
        _tell(path, "is damaged and left out: it holds no object")
        return {}
    return found


def _is_death(path: Path, mark: dict[str, object]) -> bool:
    """Whether the process of a mark ended within its check."""
    with contextlib.suppress(OSError):
        if fcntl is not None and mark.get("host") == socket.gethostname():
            with contextlib.suppress(OSError), path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return path.exists()  # not where the check has just ended
        return time.time() - path.stat().st_mtime > OLD
    return False


def _tell(path: Path, why: str) -> None:
    """Once per path."""
    if path not in _told:
        _told.add(path)
        warnings.warn(f"{path} {why}", RuntimeWarning, stacklevel=2)
