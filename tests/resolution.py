"""Resolves what a user's first command installs, from the ordinary index; nothing is installed.

python -m tests.resolution    a line for each Python, platform and set of pins

It looks past the machine's own settings of pip and uv: a mirror, a folder of wheels or a local
build of torch there would hide a conflict that all others meet. Where the ordinary index is not
reached, it says so, checks nothing and succeeds.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ALL = ("trainer", "gym", "integrations", "dev", "docs")
LINUX = "x86_64-manylinux_2_28"
SHOWN = ("torch", "triton", "transformers", "numpy")


class Wish(NamedTuple):
    """What somebody asks pip for."""

    python: str
    platform: str = LINUX
    pins: str | None = "constraints.txt"
    extras: tuple[str, ...] = ALL

    def __str__(self) -> str:
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        return f"Python {self.python}, {self.platform}, .{extras}, " + (
            f"pinned by {self.pins}" if self.pins else "the newest versions"
        )


PYTHONS = ("3.10", "3.11", "3.12")
PLATFORMS = ("aarch64-manylinux_2_28", "aarch64-apple-darwin")
OTHERS: tuple[tuple[str, ...], ...] = ((), ("trainer", "vllm"), ("trackers",))
WISHES = (
    *(Wish(python) for python in PYTHONS),
    *(Wish(python, pins=None) for python in PYTHONS),
    *(Wish("3.12", platform) for platform in PLATFORMS),
    *(Wish("3.12", pins=None, extras=extras) for extras in OTHERS),
)


def resolve(wish: Wish, project: str = "pyproject.toml") -> dict[str, str]:
    """The version of each package that would be installed.

    Raises:
        ConnectionError: the index is not reached.
        ValueError: nothing fits, with the resolver's reason.
        RuntimeError: the resolver failed otherwise.
    """
    own = {name: x for name, x in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    options = ["--python-version", wish.python, "--python-platform", wish.platform]
    options += [x for extra in wish.extras for x in ("--extra", extra)]
    options += ["--constraint", wish.pins] if wish.pins else []
    command = [sys.executable, "-m", "uv", "pip", "compile", "--no-config", "-q", *options, project]
    environment = own | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", done.stdout, re.MULTILINE))
    if "No solution found" in done.stderr:
        raise ValueError(done.stderr.strip())
    if re.search(r"fetch|sending request|connect|timed out|dns", done.stderr, re.IGNORECASE):
        raise ConnectionError(done.stderr.strip())
    raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def reached() -> str | None:
    """Why the ordinary index is not reached; None where it is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "requirements.in")
        path.write_text("packaging\n")
        try:
            resolve(Wish("3.12", pins=None, extras=()), str(path))
        except ConnectionError as error:
            return str(error)
    return None


def failures(wishes: tuple[Wish, ...]) -> Iterator[str]:
    """Prints what each wish resolves to; yields the reasons of those that do not."""
    for wish in wishes:
        try:
            found = resolve(wish)
        except ValueError as error:
            print(f"{wish}: CONFLICT", flush=True)
            yield f"{wish}: {error}"
        except ConnectionError as error:
            print(f"{wish}: not checked, the index is not reached any more: {error}", flush=True)
        else:
            versions = ", ".join(f"{name} {found[name]}" for name in SHOWN if name in found)
            print(f"{wish}: {len(found)} packages, {versions}", flush=True)


def main() -> int:
    argparse.ArgumentParser("python -m tests.resolution", description=__doc__).parse_args()
    why = reached()
    if why is not None:
        print(f"The ordinary index is not reached, so nothing was checked: {why}")
        return 0
    found = list(failures(WISHES))
    print("\n".join(found), file=sys.stderr)
    return len(found) > 0


if __name__ == "__main__":
    sys.exit(main())
