"""What checks cost: launches, distinct compiled kernels, and bytes, counted while they run."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Predicted seconds of an H200: to compile a kernel, to launch one, for an operation of torch's.
COMPILE_SECONDS, LAUNCH_SECONDS, CALL_SECONDS = 0.75, 5e-5, 1e-5


class Cost(TorchDispatchMode):
    """Counts within a `with`, in its thread.

    launches: of Triton kernels. kernels: those that differ by what they are compiled for. calls: of
    torch's operations. bytes: the most that the tensors within held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.calls = self.bytes = self._now = 0
        self.kernels: set[tuple[Any, ...]] = set()
        self._held: dict[int, int] = {}

    def __enter__(self) -> "Cost":
        from triton.runtime.jit import KernelInterface

        self._interface, self._launch = KernelInterface, KernelInterface.__getitem__
        cost, launch = self, self._launch

        def counted(kernel: Any, grid: Any) -> Any:
            run = launch(kernel, grid)

            def call(*args: Any, **options: Any) -> Any:
                cost.launches += 1
                cost.kernels.add(_specialisation(kernel, args, options))
                calls = cost.calls
                try:
                    return run(*args, **options)
                finally:
                    # The interpreter copies every argument, by torch.
                    cost.calls = calls

            return call

        KernelInterface.__getitem__ = counted
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._interface.__getitem__ = self._launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._hold(x)
        return result

    def _hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._held or size == 0:
            return
        self._held[address] = size
        self._now += size
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(x, self._drop, address)

    def _drop(self, address: int) -> None:
        self._now -= self._held.pop(address, 0)

    @property
    def predicted_seconds(self) -> float:
        """On an H200, by arithmetic alone: nobody has measured it."""
        compiling = COMPILE_SECONDS * len(self.kernels)
        return compiling + LAUNCH_SECONDS * self.launches + CALL_SECONDS * self.calls


def _specialisation(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """The kernel, its constants, and of its arguments what Triton compiles for."""
    # The interpreter keeps its options apart.
    kept = vars(kernel).get("kwargs") or vars(kernel)
    alike = kept.get("do_not_specialize") or ()
    named = zip(kernel.arg_names, args, strict=False)
    return (
        getattr(kernel, "__name__", str(kernel)),
        *(type(x).__name__ if name in alike else _kind(x) for name, x in named),
        *((name, repr(x)) for name, x in sorted(options.items())),
    )


def _kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return str(x.dtype), x.data_ptr() % 16 == 0
    if isinstance(x, int) and not isinstance(x, bool):
        return x == 1, x % 16 == 0, abs(x) >= 1 << 31
    block = getattr(x, "block_shape", None)
    return type(x).__name__, None if block is None else tuple(block)
