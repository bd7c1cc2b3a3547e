"""Lays out a Hugging Face Hub repository from which `kernels` loads the package.

    python -m tools.hub_kernel OUT [--repo-id OWNER/entropy-kernels] [--version 0]

OUT/build/torch-BACKEND/ holds the package per backend, in the layout of `kernels` 0.17: Python only
(torch-noarch), and metadata.json with the sha256 of each file. An identifier made from the contents
is the copy's module name and its namespace in torch.ops. OUT/build.toml and OUT/torch-ext/ are the
sources for kernel-builder; OUT/README.md is the card. Nothing is uploaded.

A Hub kernel may import only the standard library, torch, and itself. So it has neither the adapters
to other libraries, `entropy_kernels.integrations`, nor the compiled kernels. On a CPU "auto"
takes blocks of torch.mm, and says so once. An installed package beside it keeps both.
"""

import argparse
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "entropy_kernels"
NAME = "entropy-kernels"
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
# The adapters, see above, and what only `python -m entropy_kernels` runs.
LEFT_OUT = {"_bench", "integrations", "__main__.py"}
NOT_BUILT = (
    "a kernel from the Hugging Face Hub is Python only; pip's package entropy-kernels has it\n"
)
# For earlier releases of `kernels`, which look one folder deeper.
COMPATIBILITY = '''"""For earlier releases of `kernels`: the names of the folder above."""

import importlib.util
import sys
from pathlib import Path

if "{identifier}" not in sys.modules:
    _path = Path(__file__).parents[1] / "__init__.py"
    _spec = importlib.util.spec_from_file_location("{identifier}", _path)
    sys.modules["{identifier}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{identifier}"])
globals().update({{
    name: value
    for name, value in vars(sys.modules["{identifier}"]).items()
    if not name.startswith("__") or name in ("__all__", "__version__")
}})
'''
CARD = """---
library_name: kernels
license: apache-2.0
---

{about}

```python
import torch
from kernels import get_kernel

ek = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
head = ek.Head(hidden, weight, target)
out = ek.linear_logprob_entropy(head)    # out.logprob, out.entropy: fp32
```

The public names are {names}. The kernel is Python only, with Triton on GPUs. The package that pip
installs under the same name also has the adapters to transformers, TRL and verl, and the compiled
CPU kernels.
"""


def layout(out: Path, repo_id: str, version: int) -> None:
    """Writes the repository into `out`.

    Raises:
        ValueError: `out` exists and is not an empty folder, or `version` is negative.
    """
    if version < 0:
        raise ValueError(f"version must be >= 0; got {version}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"OUT must be a new or empty folder; got {out}")
    files = {path: (PACKAGE / path).read_bytes() for path in package_files()}
    files |= {Path(f"_{name}_not_built.txt"): NOT_BUILT.encode() for name in ("cpu", "cuda")}
    unique = hashlib.sha256(json.dumps(digest(files)).encode()).hexdigest()[:10]
    write(out / "torch-ext" / PACKAGE.name, files)
    for backend in BACKENDS:
        identifier = f"_{PACKAGE.name}_{backend}_{unique}"
        compatibility = COMPATIBILITY.format(identifier=identifier).encode()
        variant = {**files, Path(PACKAGE.name, "__init__.py"): compatibility}
        metadata = {
            "name": NAME,
            "id": identifier,
            "version": version,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digest(variant)},
        }
        variant[Path("metadata.json")] = (json.dumps(metadata, indent=2) + "\n").encode()
        write(out / "build" / f"torch-{backend}", variant)
    (out / "build.toml").write_text(build_toml(repo_id, version))
    (out / "README.md").write_text(card(repo_id, version))
    shutil.copy(ROOT / "LICENSE", out)


def package_files() -> list[Path]:
    """The package's modules that a copy from the Hub has, relative to the package."""
    modules = (path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py")))
    return [path for path in modules if path.parts[0] not in LEFT_OUT]


def digest(files: dict[Path, bytes]) -> dict[str, str]:
    """The sha256 of each file in base64, by the file's name."""
    return {
        path.as_posix(): base64.b64encode(hashlib.sha256(contents).digest()).decode()
        for path, contents in sorted(files.items())
    }


def write(folder: Path, files: dict[Path, bytes]) -> None:
    for path, contents in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents)


def build_toml(repo_id: str, version: int) -> str:
    """The configuration that kernel-builder reads, edition 5."""
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return (
        f'[general]\nname = "{NAME}"\nversion = {version}\nedition = 5\nlicense = "apache-2.0"\n'
        f'backends = [{backends}]\n\n[general.hub]\nrepo-id = "{repo_id}"\n\n'
        '[torch-noarch]\npyext = ["py", "txt"]\n'
    )


def card(repo_id: str, version: int) -> str:
    """The Hub's page: the head of the README without its pictures, and how to load the kernel."""
    head = (ROOT / "README.md").read_text().partition("\n## ")[0]
    about = re.sub(r"^!\[.*\n+", "", head, flags=re.M).strip()
    exported = re.search(r"__all__ = \[(.*?)\]", (PACKAGE / "__init__.py").read_text(), re.S)
    assert exported is not None
    names = ", ".join(f"`{name}`" for name in re.findall(r'"(\w+)"', exported[1]))
    return CARD.format(about=about, repo_id=repo_id, version=version, names=names)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.hub_kernel", description="Lay out a Hugging Face Hub repository."
    )
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--repo-id", default="OWNER/entropy-kernels", help="the card names it")
    parser.add_argument("--version", type=int, default=0, help="0: not released")
    arguments = parser.parse_args()
    try:
        layout(arguments.out, arguments.repo_id, arguments.version)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {arguments.out}: build/torch-{{{','.join(BACKENDS)}}}, torch-ext, README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
