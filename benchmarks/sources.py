"""What a result was measured with: processes, versions of libraries, the commit of the code."""

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent


def processes(count: int) -> list[str]:
    """Arguments of the Python interpreter that start `count` processes of a module."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*(launcher if count > 1 else []), "-m"]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of Python and of each package that is installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(*measured: str, length: int | None = None) -> str:
    """Short, with -dirty where files of `measured` are not the commit's; "unknown" without git."""
    git = ["git", "-C", str(ROOT)]
    short = "--short" if length is None else f"--short={length}"
    try:
        head = subprocess.check_output([*git, "rev-parse", short, "HEAD"], text=True).strip()
        changed = subprocess.check_output([*git, "status", "--porcelain", "--", *measured])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head
