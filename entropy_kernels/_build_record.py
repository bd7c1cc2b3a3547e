"""The record of the compiled extensions' build: their sources, and why there was none.

setup.py loads this file by itself, where there is no torch, and `_native` with the package.
"""

import hashlib
from pathlib import Path

# Beside the package's modules where an extension was not built: one line, which says why.
NOT_BUILT = "_not_built.txt"


def digest(checkout: Path, name: str) -> str | None:
    """sha256 of the sources of extension `name` in `checkout`, hexadecimal; None where it has none."""
    ends = ("cpp", "cu", "h")
    sources = sorted(path for end in ends for path in checkout.glob(f"csrc/{name}/*.{end}"))
    build = checkout / "CMakeLists.txt"
    if not sources or not build.is_file():
        return None
    found = hashlib.sha256()
    for path in (build, *sources):
        name, contents = path.relative_to(checkout).as_posix(), path.read_bytes()
        found.update(f"{name} {len(contents)}\n".encode() + contents)
    return found.hexdigest()


def why_not_built(package: Path) -> str | None:
    """The reason that the installation of `package` wrote down for building no extension."""
    record = package / NOT_BUILT
    return record.read_text().strip() if record.is_file() else None
