"""csrc/cpu without Python and torch: the program of tests/cpp on this machine and on an emulated
aarch64, the compiled loops of the products, and headers that are parsed alone."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.disassembly import BRANCH, Instruction, innermost_loops
from tests.installed import ROOT, environment, run

pytestmark = pytest.mark.timeout(1200)
TOOLCHAIN = ROOT / "cmake" / "aarch64-linux-gnu.cmake"
EMULATOR = "qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu"
CROSS = {
    "aarch64-linux-gnu-g++": "Debian and Ubuntu have it in g++-aarch64-linux-gnu",
    "qemu-aarch64": "Debian and Ubuntu have it in qemu-user",
}
# Multiplications in a loop over the units of a panel: 6 rows times kVectors.
PRODUCTS = {"avx2": 12, "avx512": 24, "avx512_bf16": 24, "neon": 24, "neon_bf16": 24}
PRODUCT = re.compile(r"vfmadd\d+ps|vdpbf16ps|fmla|bfdot")
VECTOR = re.compile(r"%[xyz]mm\d|\b[vqsd]\d+\b")
LOAD = re.compile(r"vmov[ua]ps|vmovdq[ua]\d*|ldp|ldu?r|ld1r|vbroadcastss|vpbroadcastd")


def build(folder: Path, *options: str) -> Path:
    """Builds the program in `folder`, and returns that."""
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    run(*configure, "-DEK_CPP_TESTS=ON", *options, env=environment())
    run("cmake", "--build", folder, env=environment())
    return folder


def skip(why: str) -> None:
    """Skips the test, or fails it where the environment says that nothing may be missing."""
    if os.environ.get("EK_REQUIRE_AARCH64") == "1":
        pytest.fail(why)
    pytest.skip(why)


COMPILERS = "c++", "g++", "clang++"


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    for names in (["cmake"], ["ninja"], COMPILERS):
        if not any(map(find, names)):
            pytest.skip(f"PATH has no {' or '.join(names)}")
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory) -> Path:
    for name, where in {**CROSS, "cmake": "pip has it", "ninja": "pip has it"}.items():
        if not find(name):
            skip(f"PATH has no {name}; {where}")
    return build(tmp_path_factory.mktemp("aarch64"), f"--toolchain={TOOLCHAIN}")


def find(name: str) -> str | None:
    return shutil.which(name, path=environment()["PATH"])


def sets(printed: str) -> list[str]:
    """The instruction sets that the program says it has tested."""
    return re.findall(r"instruction sets: (.*)", printed)[0].split()


@pytest.mark.parametrize("processor", ["native", "aarch64"])
def test_every_header_is_parsed_alone(processor):
    names = COMPILERS if processor == "native" else ("aarch64-linux-gnu-g++",)
    compiler = next(filter(find, names), None)
    if compiler is None:
        skip(f"PATH has no {' or '.join(names)}")
    command = compiler, "-std=c++17", "-fsyntax-only", "-x", "c++"
    run(*command, *sorted((ROOT / "csrc" / "cpu").glob("*.h")), env=environment())


def test_the_readme_names_every_source():
    entries = re.findall(r"^- (.+?):", (ROOT / "csrc" / "README.md").read_text(), re.M)
    named = re.findall(r"`(.+?)`", " ".join(entries))
    assert sorted(named) == sorted(path.name for path in (ROOT / "csrc").glob("*/*"))


def test_program(native):
    printed = run(native / "cpu_tests", env=environment())
    print(printed)
    assert sets(printed)[-1] == "portable"


def test_program_says_what_fails(native):
    assert "cannot run another" in run(native / "cpu_tests", "another", fails=True)


@pytest.mark.parametrize(
    ("processor", "usable"),
    [("max", ["neon_bf16", "neon", "portable"]), ("cortex-a72", ["neon", "portable"])],
)
def test_aarch64_program(aarch64, processor, usable):
    """A processor with BFDOT and one without."""
    printed = run(*EMULATOR, processor, aarch64 / "cpu_tests", *usable, env=environment())
    print(printed)
    assert sets(printed) == usable


def test_aarch64_program_under_sanitizers(tmp_path):
    if os.environ.get("EK_REQUIRE_AARCH64") != "1":
        pytest.skip("it takes minutes; make test-aarch64 runs it")
    options = "-DEK_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"
    folder = build(tmp_path, f"--toolchain={TOOLCHAIN}", *options)
    # The emulator lacks what a search for leaks needs.
    without_leaks = {**environment(), "ASAN_OPTIONS": "detect_leaks=0"}
    print(run(*EMULATOR, "max", folder / "cpu_tests", "neon_bf16", env=without_leaks))


def check_loops(folder: Path, isa: str, objdump: str) -> None:
    """Requires that the loops over a panel's units load, broadcast from memory and multiply only.

    A sum in memory for want of registers costs a third of the speed and changes no value. So does a
    broadcast by an addition and a shuffle.
    """
    path = folder / "CMakeFiles" / f"kernels_{isa}.dir" / "csrc" / "cpu" / "kernels_per_isa.cpp.o"
    loops = [
        (function, loop)
        for function, loop in innermost_loops(objdump, path)
        if sum(bool(PRODUCT.fullmatch(one.name)) for one in loop) == PRODUCTS[isa]
    ]
    kinds = 2 if isa.endswith("_bf16") else 1
    assert len(loops) >= 4 * kinds, [function for function, _ in loops]
    for function, loop in loops:
        strange = [str(one) for one in loop if is_strange(one)]
        assert not strange, f"{isa}, {function}: {strange}"


def is_strange(one: Instruction) -> bool:
    """Whether an instruction works on vectors and does not belong into a product's loop."""
    # A branch names an address, which may read like a register.
    harmless = PRODUCT.fullmatch(one.name) or BRANCH.fullmatch(one.name)
    if harmless or not VECTOR.search(one.operands):
        return False
    from_memory = re.search(r"\(.*\),|\[(?!sp\b)", one.operands)
    return not (LOAD.fullmatch(one.name) and from_memory)


@pytest.mark.parametrize("isa", PRODUCTS)
def test_loops_of_the_products(native, isa):
    if find("objdump") is None:
        pytest.skip("PATH has no objdump")
    if not (native / "CMakeFiles" / f"kernels_{isa}.dir").is_dir():
        pytest.skip(f"{isa} is not compiled for this machine")
    (compiler,) = native.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")
    if 'CMAKE_CXX_COMPILER_ID "GNU"' not in compiler.read_text():
        pytest.skip("the test knows the loops that GCC makes")
    check_loops(native, isa, "objdump")


@pytest.mark.parametrize("isa", ["neon", "neon_bf16"])
def test_aarch64_loops_of_the_products(aarch64, isa):
    if find("aarch64-linux-gnu-objdump") is None:
        skip("PATH has no aarch64-linux-gnu-objdump; binutils-aarch64-linux-gnu has it")
    check_loops(aarch64, isa, "aarch64-linux-gnu-objdump")
