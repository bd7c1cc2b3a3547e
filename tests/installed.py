"""The package built and installed elsewhere, and its own tests run there.

`python -m tests.installed [ARGUMENTS OF PYTEST]` builds an sdist, a wheel from that, installs the
wheel into an environment on top of this one, and runs the package's tests in a folder that holds
them alone.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a checkout holds beside its files.
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv*", ".hypothesis", ".*_cache", "__pycache__", "runs", "build", "dist"),
    *("*.egg-info", "*.so", "*_not_built.txt"),
)
# These are about other parts of the checkout or use them, or build packages themselves.
OF_THE_CHECKOUT = {
    *("test_architecture", "test_benchmark_steps", "test_benchmarks", "test_costs", "test_cpp"),
    *("test_bench_trl_trainers", "test_precision"),
    *("test_cuda_build", "test_callers_mistakes_elsewhere", "test_english", "test_examples"),
    *("test_gpu_rows", "test_gpu_run", "test_tile_model"),
    *("test_gpu_script", "test_hub_kernel", "test_layers", "test_loss_parity", "test_main"),
    *("test_readme", "test_real_model", "test_real_model_tables"),
    *("test_real_studies", "test_resolution", "test_sampler_step", "test_sampling"),
    "test_several_ranks",
    *("test_triton_compile", "test_triton_kernel_cases", "test_triton_ratio_loss"),
    *("test_triton_sanitizer", "test_triton_selection", "test_types", "test_wheel", "test_wiring"),
}


def copy_checkout(into: Path) -> Path:
    """A fresh checkout's files, where a build may leave what it likes."""
    return Path(shutil.copytree(ROOT, into, ignore=LEFT_OUT))


def run(*command: str | Path, fails: bool = False, **options) -> str:
    """What a command prints, which must (not) fail."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert (done.returncode != 0) is fails, done.stdout
    return done.stdout


def environment(compiler: bool = True) -> dict[str, str]:
    """The environment of a build with this one's tools, with a C++ compiler or without.

    The CUDA kernels take minutes, and tests/test_cuda_build.py builds some.
    """
    tools = sysconfig.get_path("scripts")
    path = f"{tools}{os.pathsep}{os.environ['PATH']}" if compiler else tools
    left_out = {"TRITON_INTERPRET"} if compiler else {"TRITON_INTERPRET", "CXX"}
    found = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**found, "PATH": path, "PYTHONPATH": "", "EK_CUDA": "0"}


def pip(*arguments: str | Path, compiler: bool = True, prefix: tuple = (), **options) -> str:
    """pip without an index: a build with this environment's tools."""
    offline = "--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir"
    command = *prefix, sys.executable, "-m", "pip", arguments[0], *offline, *arguments[1:]
    return run(*command, env=environment(compiler), **options)


def build_sdist(checkout: Path, out: Path) -> Path:
    """The sdist of a copy of the checkout."""
    out.mkdir(exist_ok=True)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, out, cwd=checkout, env=environment())
    (found,) = out.glob("*.tar.gz")
    return found


def build_wheel(source: Path, out: Path, compiler: bool = True) -> Path:
    """The wheel of a folder or an sdist."""
    pip("wheel", "-w", out, source, compiler=compiler)
    (found,) = out.glob("*.whl")
    return found


def install(wheel: Path, into: Path) -> Path:
    """The Python of an environment that has the wheel, and all that this one has but a checkout.

    Its own packages come before those below; an editable install's finder is none of them.
    """
    run(sys.executable, "-m", "venv", "--without-pip", into)
    python = into / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-c", where).strip())
    pip("install", "--target", packages, wheel)
    below = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "below.pth").write_text("".join(f"{path}\n" for path in below))
    return python


def copy_tests(into: Path) -> list[Path]:
    """The tests without the package, and pytest's configuration; the files that test it alone."""
    shutil.copytree(ROOT / "tests", into / "tests", ignore=LEFT_OUT)
    shutil.copy(ROOT / "pyproject.toml", into)
    files = sorted((into / "tests").glob("test_*.py"))
    return [path.relative_to(into) for path in files if path.stem not in OF_THE_CHECKOUT]


def main(*arguments: str) -> int:
    """Build, install, and run pytest; its exit status."""
    with tempfile.TemporaryDirectory(prefix="entropy-kernels-") as name:
        folder = Path(name)
        sdist = build_sdist(copy_checkout(folder / "checkout"), folder / "dist")
        wheel = build_wheel(sdist, folder / "wheel")
        for path in (sdist, wheel):
            print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)
        python = install(wheel, folder / "environment")
        files = copy_tests(folder / "elsewhere")
        here = {"cwd": folder / "elsewhere", "env": environment()}
        print(run(python, "-c", "import entropy_kernels as ek; print(ek.__file__)", **here))
        command = python, "-m", "pytest", *files, *arguments
        return subprocess.run(command, **here).returncode


if __name__ == "__main__":
    if {"-h", "--help"} & {*sys.argv}:
        print(f"usage: {__doc__}")
        sys.exit()
    sys.exit(main(*sys.argv[1:]))
