"""Shared fixtures. Shapes and types of the public functions are checked as they are called, and
uninitialised memory is NaN, so that a kernel that reads it shows."""

import functools
import gc
import os
import signal
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import jaxtyping
import pytest
import torch
from _pytest.mark.structures import ParameterSet

from tests import sampling, shapes

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

PACKAGE = find_spec("entropy_kernels")
assert PACKAGE is not None
assert PACKAGE.origin is not None
# All of the package but the Triton kernels, whose interpreter does not see through a wrapped one;
# and but the head, the support and the options, as torch.compile does not through the __init__ of
# a dataclass.
CHECKED = [
    f"entropy_kernels.{path.stem}"
    for path in Path(PACKAGE.origin).parent.iterdir()
    if path.stem not in ("_triton", "options", "_loss_options", "head", "support")
]
# Ignored by what a shell starts in the background, and by all that this starts in turn.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

jaxtyping.install_import_hook(CHECKED, f"{shapes.__name__}.checker")

# The same examples each time, however slowly they come.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# Triton on the GPU, or in its interpreter on the CPU.
BACKENDS = [*(("torch", device) for device in DEVICES), ("cpu", "cpu"), ("triton", DEVICES[-1])]
BACKENDS += [("cuda", "cuda")]
# Those alone that the environment names, separated by commas.
if "EK_TEST_IMPLS" in os.environ:
    BACKENDS = [pair for pair in BACKENDS if pair[0] in os.environ["EK_TEST_IMPLS"].split(",")]

# The hook above checks them as they are imported.
from entropy_kernels import _native, backends  # noqa: E402

WHY_NO_TRITON = backends.why_not("triton", torch.device(DEVICES[-1]))
if WHY_NO_TRITON is None and os.environ.get("TRITON_INTERPRET") == "1":
    from entropy_kernels.testing import mend_interpreter

    mend_interpreter()
# These import the kernels themselves; the others skip what they cannot run.
collect_ignore_glob = [] if WHY_NO_TRITON is None else ["test_triton_*.py", "test_gpu_script.py"]


def params_of(pairs: Iterable[tuple[str, str]]) -> list[ParameterSet]:
    """Implementations and devices as parameters; those of csrc/cuda are marked to need a GPU."""
    falls = pytest.mark.filterwarnings('ignore:impl="cuda" takes a Triton kernel:RuntimeWarning')
    marks = {"cuda": [pytest.mark.gpu, falls]}
    return [pytest.param(x, id=" on ".join(x), marks=marks.get(x[0], [])) for x in pairs]


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of the tests that are marked as sampled, run a share of the parameters"
    parser.addoption("--sampled", action="store_true", help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--sampled", default=False):
        return
    grids: dict[str, dict[str, pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled") and hasattr(item, "callspec"):
            grids.setdefault(item.nodeid.split("[")[0], {})[item.nodeid] = item
    left_out: set[str] = set()
    for grid in grids.values():
        points = {name: item.callspec.indices for name, item in grid.items()}
        (share,) = next(iter(grid.values())).get_closest_marker("sampled").args
        left_out |= grid.keys() - sampling.sample(points, share)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
    items[:] = [item for item in items if item.nodeid not in left_out]


def pytest_collection_finish() -> None:
    """Garbage is not looked for among the thousands of tests, which stay."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WHY_NO_TRITON is not None:
        names = ", ".join(collect_ignore_glob)
        terminalreporter.write_line(f"{names} were left out: {WHY_NO_TRITON}")


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=params_of(BACKENDS))
def backend(request) -> tuple[str, str]:
    """An implementation of linear_logprob_entropy and a device it runs on."""
    impl, device = request.param
    why = backends.why_not(impl, torch.device(device))
    if why is not None:
        pytest.skip(why)
    return request.param


@pytest.fixture
def impl(backend) -> str:
    return backend[0]


@pytest.fixture
def device(backend) -> str:
    return backend[1]


@pytest.fixture
def head(impl):
    """linear_logprob_entropy by one implementation."""
    from tests.head_cases import logprob_entropy

    return functools.partial(logprob_entropy, impl=impl)


@pytest.fixture
def block(impl, device) -> tuple[int, int]:
    """(rows, vocabulary) of a block: small in Triton's interpreter, which takes ms for each."""
    from tests.head_cases import BLOCK_T, BLOCK_V

    return (32, 64) if impl == "triton" and device == "cpu" else (BLOCK_T, BLOCK_V)


@pytest.fixture(params=["torch", "native"])
def selection_backend(request, monkeypatch):
    """The threshold and the mask by the torch path, or by the compiled kernels."""
    if request.param == "torch":
        monkeypatch.setattr(_native, "why_missing", lambda name: "left out")
    elif _native.cpu() is None:
        pytest.skip(_native.why_missing("cpu"))


@pytest.fixture
def unchecked_shapes():
    """Without the shape checks of the tests' import hook: what a user's process sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine whose CPU is asked about as a GPU is, with a record of its own."""
    from entropy_kernels.verification import first_use

    monkeypatch.setenv("EK_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("EK_VERIFY", raising=False)
    monkeypatch.setattr(first_use, "asks", lambda where: where.type == "cpu")
    first_use.forget()
    yield
    first_use.forget()


@pytest.fixture
def gpu_alone(gpu, monkeypatch):
    """The same without the compiled kernels for its CPU."""
    monkeypatch.setattr(_native, "why_missing", lambda name: "left out")
    backends._warn_of_the_torch_path.cache_clear()
