"""Wheel and sdist: they hold what they should, install anywhere, and say what they lack."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import textwrap
import zipfile
from pathlib import Path

import pytest

from entropy_kernels import _build_record, _native
from tests.installed import (
    ROOT,
    build_sdist,
    build_wheel,
    copy_checkout,
    copy_tests,
    environment,
    install,
    pip,
    run,
)

EXTENSION = f"entropy_kernels/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
# Without CUDA, which these tests leave out; and without a compiler.
NO_CUDA = {"trainer.py", "entropy_kernels/_cuda_not_built.txt"}
BARE = NO_CUDA | {"entropy_kernels/_cpu_not_built.txt"}
MODULES = {
    path.relative_to(ROOT).as_posix() for path in (ROOT / "entropy_kernels").rglob("*.py")
} | {"entropy_kernels/py.typed"}
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for folder in ("csrc", "cmake")
    for path in (ROOT / folder).rglob("*.*")
    if path.suffix != ".pyc"
}
needs_compiler = pytest.mark.skipif(
    _native.why_missing("cpu") is not None, reason="no compiled kernels were built here either"
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("sources") / "checkout")


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    return build_sdist(checkout, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def bare(sdist, tmp_path_factory) -> Path:
    """The wheel of a machine without a compiler."""
    return build_wheel(sdist, tmp_path_factory.mktemp("bare"), compiler=False)


@pytest.fixture(scope="module")
def bare_python(bare, tmp_path_factory) -> Path:
    return install(bare, tmp_path_factory.mktemp("bare-environment") / "venv")


def bound_by_permissions() -> tuple[str, ...]:
    """What a command is put behind so that it cannot write to what is read-only; nothing, unless
    this is root, who can."""
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root writes to anything, and setpriv, which takes that away, is missing")
    return shutil.which("setpriv"), "--bounding-set=-dac_override", "--inh-caps=-dac_override"


def in_wheel(path: Path) -> set[str]:
    """Names of a wheel's files; of its metadata, those that must be there."""
    names = set(zipfile.ZipFile(path).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    ends = {name.split(".dist-info/")[1] for name in metadata}
    assert ends == {"METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE"}
    return names - metadata


def test_the_sdist_holds_what_a_wheel_is_built_from_and_no_more(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    packaging = {"CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "setup.py", "setup.cfg"}
    about = {"LICENSE", "PKG-INFO", "README.md"}
    assert names == MODULES | SOURCES | packaging | about | {"tools/outside/trainer.py"}


@needs_compiler
def test_the_sdist_s_wheel_holds_the_package_and_computes_elsewhere(sdist, tmp_path):
    wheel = build_wheel(sdist, tmp_path / "wheel")
    assert in_wheel(wheel) == MODULES | NO_CUDA | {EXTENSION}
    python = install(wheel, tmp_path / "venv")
    printed = run(python, "-W", "error", "-m", "entropy_kernels", cwd=tmp_path, env=environment())
    assert "linear_logprob_entropy, cpu on cpu: ok" in printed
    assert "compiled CPU kernels: loaded, " in printed
    bench = "--bench", "--shape", "16", "8", "64", "--rounds", "1", "--device", "cpu"
    without_compiler = environment() | {"TORCHDYNAMO_DISABLE": "1"}
    printed = run(python, "-m", "entropy_kernels", *bench, cwd=tmp_path, env=without_compiler)
    assert re.search(r"^ours \(cpu\), 20% of the tokens +\d", printed, re.M), printed
    where = run(python, "-c", "import entropy_kernels as ek; print(ek.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path / "venv"))


def test_without_a_compiler_the_wheel_says_so_where_a_user_sees_it(bare, bare_python, tmp_path):
    assert in_wheel(bare) == MODULES | BARE
    why = (
        "entropy_kernels._cpu is not built: the machine that built the package had no C++ compiler "
        "(PATH has none of c++, g++, clang++, cl); install that, then the package again with pip's "
        "--force-reinstall --no-cache-dir --no-binary entropy-kernels"
    )
    printed = run(bare_python, "-W", "error", "-m", "entropy_kernels", cwd=tmp_path)
    assert f"compiled CPU kernels: {why}\n" in printed
    call = """
        import warnings, torch
        warnings.simplefilter("error")
        import entropy_kernels as ek
        warnings.simplefilter("always")
        for _ in range(2):
            ek.linear_logprob_entropy(ek.Head(torch.ones(3, 2), torch.ones(5, 2), torch.arange(3)))
    """
    printed = run(bare_python, "-c", textwrap.dedent(call), cwd=tmp_path)
    assert printed.count("takes the torch path, which is slower: " + why) == 1


def test_the_package_s_tests_import_nothing_of_the_checkout(bare_python, tmp_path):
    """`python -m tests.installed` runs them beside an installed wheel."""
    files = copy_tests(tmp_path)
    assert len(files) > 30
    options = "--collect-only", "-q", "-p", "no:cacheprovider"
    run(bare_python, "-m", "pytest", *options, *files, cwd=tmp_path, env=environment())


def test_sources_that_cannot_be_written_to_install(checkout, tmp_path):
    with tempfile.TemporaryDirectory(prefix="entropy-kernels-") as name:
        folder, out = Path(name), Path(name, "out")
        sources = shutil.copytree(checkout, folder / "checkout")
        out.mkdir()
        run("chmod", "-R", "a+rX,a-w", sources)
        before = sorted(sources.rglob("*"))
        pip("wheel", "-w", out, sources, compiler=False, prefix=bound_by_permissions(), cwd="/")
        assert sorted(sources.rglob("*")) == before
        (wheel,) = out.glob("*.whl")
        assert in_wheel(wheel) >= MODULES
        run("chmod", "-R", "u+w", sources)


def test_nothing_of_an_earlier_build_gets_into_a_wheel(checkout, tmp_path):
    left = checkout / "build" / "lib" / "entropy_kernels"
    (checkout / "entropy_kernels.egg-info").mkdir(exist_ok=True)
    platform = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for folder in (left, checkout / "build" / platform / "entropy_kernels"):
        folder.mkdir(parents=True)
        for name in ("removed.py", Path(EXTENSION).name):
            (folder / name).touch()
    (checkout / EXTENSION).touch()
    wheel = build_wheel(checkout, tmp_path, compiler=False)
    assert in_wheel(wheel) == MODULES | BARE
    shutil.rmtree(checkout / "build")
    (checkout / EXTENSION).unlink()


def test_an_editable_install_keeps_no_extension_of_an_earlier_one(tmp_path):
    """A compiler that comes and goes; another Python's extension has another name and stays."""
    checkout = copy_checkout(tmp_path / "checkout")
    extension = checkout / EXTENSION
    record = extension.with_name(_build_record.not_built("_cpu"))
    others = checkout / "entropy_kernels" / "_cpu.cpython-399-linux.so"
    extension.write_text("an earlier one")
    others.touch()
    pip("install", "--target", tmp_path / "first", "-e", checkout, compiler=False)
    assert not extension.exists()
    assert "no C++ compiler" in record.read_text()
    cmake = tmp_path / "bin" / "cmake"
    cmake.parent.mkdir()
    cmake.write_text(
        '#!/bin/sh\nfor x; do case $x in -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=*) out="${x#*=}"\n'
        f'mkdir -p "$out"; echo compiled > "$out/{extension.name}";; esac; done\n'
    )
    cmake.chmod(0o755)
    path = f"{cmake.parent}{os.pathsep}{environment()['PATH']}"
    command = sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"
    where = "--no-build-isolation", "--target", tmp_path / "second", "-e", checkout
    run(*command, *where, env={**environment(), "PATH": path, "CXX": "sh"})
    assert extension.read_text() == "compiled\n"
    assert not record.exists()
    assert others.exists()


@needs_compiler
def test_an_extension_of_other_sources_than_the_checkout_s_is_refused(checkout, tmp_path):
    """As after a pull that changes csrc/."""
    folder = tmp_path / "checkout"
    for name in ("csrc", "entropy_kernels"):
        shutil.copytree(checkout / name, folder / name)
    shutil.copy(checkout / "CMakeLists.txt", folder)
    shutil.copy(ROOT / EXTENSION, folder / EXTENSION)
    ask = "from entropy_kernels import _native; print(_native.why_missing('cpu'))"
    with (folder / "csrc" / "cpu" / "kernels_per_isa.cpp").open("a") as file:
        file.write("// pulled\n")
    printed = run(sys.executable, "-c", ask, cwd=folder)
    assert "_cpu is not built from this csrc/; run pip install -e . again" in printed
    (folder / "CMakeLists.txt").unlink()
    assert run(sys.executable, "-c", ask, cwd=folder) == "None\n"


def test_python_m_trainer_outside_of_the_checkout_says_where_it_lives(bare_python, tmp_path):
    command = bare_python, "-m", "trainer", "train"
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 1
    assert "lives in the project's checkout" in done.stderr
    assert "cd CHECKOUT && python -m trainer" in done.stderr
    imports = "try: import trainer.train\nexcept ModuleNotFoundError as error: print(error.name)"
    assert run(bare_python, "-c", imports, cwd=tmp_path) == "trainer\n"


@pytest.mark.parametrize("init", [True, False], ids=["package", "folder without __init__.py"])
@pytest.mark.parametrize("where", ["working directory", "site-packages"])
def test_whatever_else_is_called_trainer_comes_first(bare, init, where, tmp_path):
    """The checkout's own, another distribution's, and a user's folder: none is overwritten."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--target", site, bare)
    folder = (elsewhere if where == "working directory" else site) / "trainer"
    folder.mkdir()
    (folder / "__main__.py").write_text("print('theirs')")
    (folder / "part.py").write_text("name = 'a part of theirs'")
    if init:
        (folder / "__init__.py").touch()
    here = {"cwd": elsewhere, "env": {**os.environ, "PYTHONPATH": str(site)}}
    assert run(sys.executable, "-m", "trainer", **here) == "theirs\n"
    imports = "from trainer.part import name; print(name)"
    assert run(sys.executable, "-c", imports, **here) == "a part of theirs\n"
