"""The record of the compiled extensions' build: their sources, and why there was none.

setup.py loads this file by itself, where there is no torch, and `_extensions` with the package.
"""

import hashlib
from pathlib import Path


def not_built(target: str) -> str:
    """The file beside the package's modules where `target` was not built: a line that says why."""
    return f"{target}_not_built.txt"


def digest(checkout: Path, name: str) -> str | None:
    """sha256 of the sources of extension `name` in `checkout`, hexadecimal; None without them."""
    ends = ("cpp", "cu", "h")
    sources = sorted(path for end in ends for path in checkout.glob(f"csrc/{name}/*.{end}"))
    build = [checkout / "CMakeLists.txt", *checkout.glob(f"csrc/{name}/CMakeLists.txt")]
    if not sources or not build[0].is_file():
        return None
    found = hashlib.sha256()
    for path in (*build, *sources):
        name, contents = path.relative_to(checkout).as_posix(), path.read_bytes()
        found.update(f"{name} {len(contents)}\n".encode() + contents)
    return found.hexdigest()


def why_not_built(package: Path, name: str) -> str | None:
    """Why the installation of `package` did not build extension `name`, as it wrote down."""
    record = package / not_built(f"_{name}")
    return record.read_text().strip() if record.is_file() else None
