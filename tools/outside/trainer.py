"""Installed beside the package, so that `python -m trainer` outside of the checkout says where the
trainer lives. Importing it fails as if it were not there.

It is one file, since Python prefers every package `trainer` to it, whether of another distribution
or in the working directory. A folder of that name without an __init__.py would come after it, so
this file looks for such folders itself.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def where() -> str:
    """The message that says where the trainer is and how to run it."""
    package = find_spec("entropy_kernels")
    checkout = Path(package.origin).parents[1] if package and package.origin else Path()
    here = checkout if (checkout / "trainer" / "__main__.py").is_file() else "CHECKOUT"
    return (
        "The trainer of entropy_kernels is not an installed module: it lives in the project's "
        "checkout, and the extra [trainer] installs what it needs there. "
        f"Run it from that folder: cd {here} && python -m trainer --help"
    )


__path__ = [str(path) for entry in sys.path if (path := Path(entry, "trainer")).is_dir()]
if __name__ != "__main__":
    if not __path__:
        raise ModuleNotFoundError(where(), name="trainer")
elif any(Path(path, "__main__.py").is_file() for path in __path__):
    runpy.run_module("trainer.__main__", run_name="__main__", alter_sys=True)
else:
    sys.exit(where())
