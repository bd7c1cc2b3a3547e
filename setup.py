"""Builds the compiled extensions of csrc/ with CMake; metadata is in pyproject.toml.

A machine without a C++ compiler gets the package without them. A compiler that fails on our
sources fails the installation.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++", "cl")


class CMakeExtension(Extension):
    """An extension whose sources CMakeLists.txt lists; its CMake target is its last name."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures and builds one CMake target an extension."""

    def build_extension(self, ext: CMakeExtension) -> None:
        why = why_not_buildable()
        if why is not None:
            print(f"{ext.name} is not built: {why}", file=sys.stderr)
            # setuptools copies an editable install's extensions unless they are optional and absent
            ext.optional = True
            return
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        arguments = [f"-D{name}={value}" for name, value in definitions.items()]
        # --fresh: an isolated build's cmake and ninja are gone by the next one
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        subprocess.run(configure + arguments, check=True)
        target = ext.name.rpartition(".")[2]
        subprocess.run(["cmake", "--build", str(build), "--target", target], check=True)


def why_not_buildable() -> str | None:
    """A sentence naming what a build of C++ extensions lacks on this machine, or None."""
    named = os.environ.get("CXX", "")
    wanted = shlex.split(named)[:1] or COMPILERS
    if not any(shutil.which(compiler) for compiler in wanted):
        where = f"CXX={named} is not found" if named else f"PATH has none of {', '.join(COMPILERS)}"
        return f"no C++ compiler ({where})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"no Python headers ({header}; Debian and Ubuntu have them in python3-dev)"
    return None


setup(
    ext_modules=[CMakeExtension("entropy_kernels._cpu")],
    cmdclass={"build_ext": CMakeBuild},
)
