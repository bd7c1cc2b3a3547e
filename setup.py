"""Builds the compiled extensions of csrc/ with CMake; metadata is in pyproject.toml.

On a machine without a C++ compiler the package is installed without the extensions, and without
nvcc it lacks the CUDA kernels. A file in the package says why, since pip hides what a build prints.
If a compiler fails on the sources, the installation fails.

The build lies in a temporary folder. Nothing of an earlier build gets into a later one, and the
sources may be read-only.
"""

import atexit
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "entropy_kernels"
COMPILERS = ("c++", "g++", "clang++", "cl")


def load(path: Path) -> ModuleType:
    """Loads a module of the package without importing the package, which needs torch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


record = load(PACKAGE / "_build_record.py")
toolkit = load(ROOT / "cmake" / "cuda_toolkit.py")


class CMakeExtension(Extension):
    """An extension that CMakeLists.txt builds, as the target of the same last name."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures and builds one CMake target per extension."""

    def build_extension(self, ext: CMakeExtension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target = ext.name.rpartition(".")[2]
        why = why_not_buildable(target)
        if why is not None:
            print(f"{ext.name} is not built: {why}", file=sys.stderr)
            output.mkdir(parents=True, exist_ok=True)
            (output / record.not_built(target)).write_text(f"{why}\n")
            # An editable install copies each extension, unless it is optional and absent.
            ext.optional = True
            return
        build = Path(self.build_temp, target).resolve()
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "EK_SOURCES": record.digest(ROOT, target.removeprefix("_")),
        }
        if target == "_cuda":
            definitions |= {
                "EK_CUDA": "ON",
                "CMAKE_CUDA_COMPILER": toolkit.nvcc(),
                "EK_CUTLASS_DIR": toolkit.cutlass(),
                "EK_ARCHITECTURES": ";".join(toolkit.architectures()),
            }
        arguments = [f"-D{name}={value}" for name, value in definitions.items()]
        # --fresh, since the cmake and ninja of an isolated build are gone by the next one
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        compile = ["cmake", "--build", str(build), "--target", target]
        for command in (configure + arguments, compile):
            if subprocess.run(command).returncode != 0:
                without = "; EK_CUDA=0 leaves it out" if target == "_cuda" else ""
                sys.exit(f"{ext.name} does not compile here, see above{without}")

    def copy_extensions_to_source(self) -> None:
        """Copies what this build made, and removes what an earlier one made."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / PACKAGE.name
        extensions = [Path(self.get_ext_filename(ext.name)).name for ext in self.extensions]
        reasons = [record.not_built(ext.name.rpartition(".")[2]) for ext in self.extensions]
        for name in (*reasons, *extensions):
            if (built / name).exists():
                shutil.copyfile(built / name, PACKAGE / name)
            else:
                (PACKAGE / name).unlink(missing_ok=True)


def why_not_buildable(target: str) -> str | None:
    """Why this machine does not build an extension, and what to do about it; None where it does."""
    cuda = target == "_cuda"
    again = "with pip's --force-reinstall --no-cache-dir --no-binary entropy-kernels"
    if cuda and toolkit.wanted() is False:
        return f"EK_CUDA=0 was set where the package was built; install it without that, {again}"
    lacks = lacking() or (toolkit.lacking() if cuda else None)
    if lacks is None:
        return None
    if cuda and toolkit.wanted():
        sys.exit(f"EK_CUDA=1 asks for the CUDA kernels, and this machine has {lacks}")
    return (
        f"the machine that built the package had {lacks}; install that, then the package again "
        f"{again}"
    )


def lacking() -> str | None:
    """What a build of C++ extensions lacks on this machine; None if nothing."""
    named = os.environ.get("CXX", "")
    wanted = shlex.split(named)[:1] or COMPILERS
    if not any(shutil.which(compiler) for compiler in wanted):
        where = f"CXX={named} is not found" if named else f"PATH has none of {', '.join(COMPILERS)}"
        return f"no C++ compiler ({where})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"no Python headers ({header}; Debian and Ubuntu have them in python3-dev)"
    return None


def build_folders() -> dict[str, dict[str, str]]:
    """Options of setuptools' commands that make them write outside of the sources."""
    folder = tempfile.mkdtemp(prefix="entropy-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    metadata = str(ROOT) if os.access(ROOT, os.W_OK) else folder
    return {"build": {"build_base": folder}, "egg_info": {"egg_base": metadata}}


try:
    toolkit.check_choices()
except ValueError as error:
    sys.exit(str(error))
setup(
    options=build_folders(),
    ext_modules=[CMakeExtension(f"entropy_kernels.{name}") for name in ("_cpu", "_cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
