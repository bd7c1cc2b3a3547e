"""The build of csrc/cuda: where it happens, what it refuses, and what the package says of it.

The sources that nvcc compiles here are stand-ins, since the real ones take minutes.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from entropy_kernels import _build_record, _extensions
from entropy_kernels._cuda_kernels import module
from tests.installed import ROOT, environment, run

EXTENSION = f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
LAUNCHER = ROOT / "cmake" / "nvcc_launcher.py"
VARIABLES = ("EK_CUDA", "EK_CUTLASS_DIR", "EK_CUDA_ARCHITECTURES", "CUDACXX")
NVCC = shutil.which(os.environ.get("CUDACXX") or "nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="PATH has no nvcc")

SPILLS = """
__global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[i * 3 % 64];
}
"""
# Only the assertion's call of a function makes the products wait.
SERIALIZED = """
#include <cassert>
__global__ void product(float* x, unsigned long a, unsigned long b, int n) {
  float d[4] = {};
  for (int i = 0; i < n; ++i) {
    asm volatile("wgmma.fence.sync.aligned;");
    assert(x != nullptr);
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    asm volatile("wgmma.commit_group.sync.aligned;");
    asm volatile("wgmma.wait_group.sync.aligned 0;");
  }
  x[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "cmake" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


toolkit = load("cuda_toolkit")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Path:
    """A folder that is all of PATH: no nvcc, no GPU, and no choice by the environment."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def headers(folder: Path) -> Path:
    """What the build asks of CUTLASS while its kernels are stand-ins."""
    (folder / "cutlass").mkdir(parents=True)
    version = "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n"
    (folder / "cutlass" / "version.h").write_text(version)
    return folder


def test_what_is_missing_is_named(machine, monkeypatch, tmp_path):
    assert toolkit.lacking() == "no nvcc (PATH has none)"
    assert toolkit.requirements() == []
    script(machine / "nvcc", "echo Cuda compilation tools, release 12.6, V12.6.85")
    assert toolkit.lacking() == f"no nvcc of CUDA 12.8 or newer ({machine}/nvcc is of 12.6)"
    assert toolkit.requirements() == []
    script(machine / "nvcc", "echo Cuda compilation tools, release 12.10, V12.10.1")
    assert toolkit.requirements() == ["nvidia-cutlass==4.2.0.0"]
    monkeypatch.setattr(toolkit.importlib.util, "find_spec", lambda name: None)
    assert toolkit.lacking() == (
        "no headers of CUTLASS (nvidia-cutlass==4.2.0.0 is not installed, and EK_CUTLASS_DIR names "
        "none)"
    )
    monkeypatch.setenv("EK_CUTLASS_DIR", str(headers(tmp_path / "include")))
    assert toolkit.requirements() == []
    assert toolkit.lacking() is None
    script(machine / "nvidia-smi", "echo 7.5")
    assert toolkit.lacking() == "no GPU of compute capability 8.0 or newer"
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert toolkit.lacking() == "no nvcc (CUDACXX=/nowhere/nvcc is not found)"
    monkeypatch.setenv("EK_CUDA", "0")
    monkeypatch.delenv("CUDACXX")
    monkeypatch.delenv("EK_CUTLASS_DIR")
    assert toolkit.requirements() == []


@pytest.mark.parametrize(
    ("gpus", "chosen", "compiled"),
    [
        (None, "", ["80", "90a", "100a"]),
        ("echo 'No devices were found'; exit 9", "", ["80", "90a", "100a"]),
        ("echo 9.0; echo 9.0", "", ["90a"]),
        ("echo 10.0; echo 8.9", "", ["80", "100a"]),
        ("echo 12.0", "", ["80"]),
        ("echo 10.3", "", ["80"]),
        ("echo 7.5; echo 8.6", "", ["80"]),
        ("echo 7.5", "", []),
        ("echo 9.0", "100a,80", ["80", "100a"]),
    ],
)
def test_architectures_are_the_chosen_or_the_machine_s_or_all(
    machine, monkeypatch, gpus, chosen, compiled
):
    if gpus is not None:
        script(machine / "nvidia-smi", gpus)
    monkeypatch.setenv("EK_CUDA_ARCHITECTURES", chosen)
    assert toolkit.architectures() == compiled


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("EK_CUDA", "yes", "EK_CUDA must be 0, 1 or unset; got 'yes'"),
        (
            "EK_CUDA_ARCHITECTURES",
            "80,90",
            "EK_CUDA_ARCHITECTURES must be some of 80, 90a, 100a, divided by commas; got '80,90'",
        ),
        ("EK_CUTLASS_DIR", "/nowhere", "EK_CUTLASS_DIR must be a folder with cutlass/version.h"),
    ],
)
def test_an_unknown_choice_ends_the_build_in_one_line(project, name, value, told):
    command = sys.executable, "setup.py", "-q", "--version"
    env = {**environment(), "EK_CUDA": "", name: value}
    printed = run(*command, fails=True, cwd=project, env=env)
    assert printed.startswith(told)
    assert printed.count("\n") == 1


def test_the_build_backend_asks_for_cutlass_where_nvcc_is_found(project, machine):
    ask = (
        "import json, build_backend as x\n"
        "print(json.dumps([x.get_requires_for_build_wheel(), x.get_requires_for_build_editable()]))"
    )

    def asked(**chosen: str) -> list[list[str]]:
        env = {**os.environ, "PYTHONPATH": "cmake", **chosen}
        printed = run(sys.executable, "-c", ask, cwd=project, env=env)
        return json.loads(printed.splitlines()[-1])

    assert asked() == [[], []]
    script(machine / "nvcc", "echo release 13.0")
    assert asked() == [[toolkit.CUTLASS]] * 2
    assert asked(EK_CUDA="0") == [[], []]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A checkout whose build makes _cuda alone, from stand-ins for the kernels."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("cmake", "csrc", "entropy_kernels"):
        without = shutil.ignore_patterns("*.so", "*_not_built.txt", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    both, text = '("_cpu", "_cuda")', (ROOT / "setup.py").read_text()
    assert both in text
    (folder / "setup.py").write_text(text.replace(both, '("_cuda",)'))
    sources = folder / "csrc" / "cuda"
    for path in sources.glob("*.cu"):
        path.write_text("")
    declared = r"^((?:int|void) (\w+)\([^;{}]*\));"
    stands_in = r'\1 { check(cudaFree(nullptr), "\2"); throw 0; }'
    found = re.findall(declared, (sources / "launch.h").read_text(), re.M)
    defined = "".join(re.sub(declared, stands_in, f"{line};\n", flags=re.S) for line, _ in found)
    (sources / "selection.cu").write_text(
        f'#include "error.h"\n#include "launch.h"\nnamespace ek {{\n{defined}}}\n'
    )
    (folder / "tools" / "outside").mkdir(parents=True)
    (folder / "tools" / "outside" / "trainer.py").touch()
    return folder


def build(project: Path, fails: bool = False, **chosen: str) -> str:
    """What an installation into the checkout prints, with nvcc for one architecture."""
    env = {name: value for name, value in environment().items() if name not in VARIABLES}
    include = project / "include"
    if not include.exists():
        headers(include)
    env |= {"EK_CUTLASS_DIR": str(include), "EK_CUDA_ARCHITECTURES": "90a"} | chosen
    return run(
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--inplace",
        fails=fails,
        cwd=project,
        env=env,
    )


def path_without_nvcc() -> str:
    folders = environment()["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not Path(folder, "nvcc").exists())


def test_a_skipped_build_removes_what_an_earlier_one_left_and_says_why(project):
    package = project / "entropy_kernels"
    why = package / _build_record.not_built("_cuda")
    (package / EXTENSION).touch()
    assert "entropy_kernels._cuda is not built: " in build(project, PATH=path_without_nvcc())
    assert not (package / EXTENSION).exists()
    assert why.read_text() == (
        "the machine that built the package had no nvcc (PATH has none); install that, then the "
        "package again with pip's --force-reinstall --no-cache-dir --no-binary entropy-kernels\n"
    )
    (package / EXTENSION).touch()
    build(project, EK_CUDA="0")
    assert not (package / EXTENSION).exists()
    assert why.read_text().startswith("EK_CUDA=0 was set where the package was built; ")
    ask = "from entropy_kernels._cuda_kernels import module; print(module.state())"
    printed = run(sys.executable, "-c", ask, cwd=project, env=environment())
    assert printed == f"entropy_kernels._cuda is not built: {why.read_text()}"


def test_a_build_that_must_have_cuda_fails_without_nvcc(project):
    printed = build(project, fails=True, EK_CUDA="1", PATH=path_without_nvcc())
    assert "EK_CUDA=1 asks for the CUDA kernels, and this machine has no nvcc" in printed


@needs_nvcc
def test_a_build_has_what_it_needs_at_load(project):
    package = project / "entropy_kernels"
    build(project, EK_CUDA="1")
    assert not (package / _build_record.not_built("_cuda")).exists()
    ask = """
from entropy_kernels._cuda_kernels import module
print(module.state())
cuda = module.cuda()
tile = cuda.Tile(architecture=90, rows=128, columns=256, depth=64)
try:
    cuda.forward_splits(tile=tile, vocabulary=1000)
except RuntimeError as error:
    print(error)
"""
    hidden = {**environment(), "CUDA_VISIBLE_DEVICES": ""}
    state, error = run(sys.executable, "-c", ask, cwd=project, env=hidden).splitlines()
    assert re.match(r"built by nvcc \d+\.\d+\.\d+ with CUTLASS 4\.2\.0, for sm_90a; ", state)
    assert re.match(r"forward_splits: cudaError\w+, ", error)


@needs_nvcc
def test_a_kernel_that_spills_ends_the_build(project):
    source = project / "csrc" / "cuda" / "merge.cu"
    source.write_text(SPILLS)
    printed = build(project, fails=True)
    source.write_text("")
    assert "Registers are spilled to local memory in function '_Z6spillsPf'" in printed
    assert "Refused: " in printed
    assert "entropy_kernels._cuda does not compile here, see above; EK_CUDA=0 leaves it" in printed


@needs_nvcc
@pytest.mark.parametrize(
    ("text", "flags", "refused"),
    [
        (SPILLS, (), True),
        (SPILLS.replace("1024, 2", "256"), (), False),
        (SERIALIZED, (), True),
        (SERIALIZED, ("-DNDEBUG",), False),
        ("no C++", (), None),
    ],
    ids=["spilled", "not spilled", "serialized", "not serialized", "no C++"],
)
def test_slow_code_is_an_error(tmp_path, text, flags, refused):
    source = tmp_path / "kernel.cu"
    source.write_text(text)
    target = "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "--warn-on-spills"
    compile = NVCC, *target, *flags, "-c", source, "-o", tmp_path / "kernel.o"
    done = subprocess.run([sys.executable, LAUNCHER, *compile], capture_output=True, text=True)
    assert (done.returncode == 0) is (refused is False)
    assert ("Refused: " in done.stdout) is (refused is True)


@pytest.mark.parametrize(
    ("runtime", "driver", "why"),
    [
        (13000, 13000, None),
        (13010, 13000, None),
        (12080, 13000, None),
        (13000, 0, "_cuda is built with CUDA 13.0, and this machine has no driver for it"),
        (
            13000,
            12080,
            "_cuda is built with CUDA 13.0, and the driver's is 12.8; install a driver of CUDA 13, "
            "or the package again with an nvcc of CUDA 12",
        ),
    ],
)
def test_a_driver_that_is_older_than_the_runtime_is_told(monkeypatch, runtime, driver, why):
    built = ModuleType("_cuda")
    vars(built).update(
        compiler="nvcc 13.0.88",
        cutlass="4.2.0",
        architectures="80 90a",
        runtime_version=lambda: runtime,
        driver_version=lambda: driver,
    )
    monkeypatch.setattr(_extensions, "load", lambda name: (built, None))
    assert module.why_missing() == why
    state = module.state()
    assert state.startswith("built by nvcc 13.0.88 with CUTLASS 4.2.0, for sm_80, sm_90a; ")
    assert state.endswith(why or "the driver's is 13.0")
