"""Sees where the host would wait for a GPU, or copy to or from it, on a machine without one.

Tensors are fake ones on "cuda": they have shapes and no values, so an op that needs a value shows.
Launchers run to their launches, which are only counted.
"""

import ctypes
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from entropy_kernels import device, ops
from entropy_kernels.verification import first_use

OURS = str(Path(device.__file__).parent), str(Path(__file__).parents[1] / "trainer")
BODIES = {op._qualname: op._init_fn for op in vars(ops).values() if isinstance(op, CustomOpDef)}
# Numbers of device types in torch's registry of what guards the current device.
CUDA, META = 1, 14


class HostWaits(TorchDispatchMode):
    """Counts what waits or copies inside, by its op and the line of ours; our ops' bodies run too.

    `found` has keys such as "item at ratio_loss.py:12"; a copy that waits for nothing begins with
    "copy". An op whose result depends on values raises, once it is counted.
    """

    def __init__(self, on: str = "cuda") -> None:
        """`on`: the device whose values are asked for; a CPU can stand for a GPU."""
        super().__init__()
        self.on, self.found = on, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (body := BODIES.get(func._schema.name)) is not None:
            with self:
                return body(*args, **kwargs)
        if _needs_values(func, args, kwargs, self.on):
            self._count(func._opname)
        result = func(*args, **kwargs)
        if _mixes(func, args, kwargs, result):
            waits = not kwargs.get("non_blocking", func._opname == "copy_" and True in args[2:])
            self._count(func._opname if waits else f"copy, {func._opname}")
        return result

    def _count(self, name: str) -> None:
        name = name.replace("_local_scalar_dense", "item")
        self.found[f"{name} at {_line()}"] += 1


@contextmanager
def fake_gpu(arch: str = "sm_90") -> Iterator[Counter[str]]:
    """Makes fake tensors of all that are made inside, also on "cuda"; counts kernels' launches."""
    launches: Counter[str] = Counter()

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        launches[getattr(kernel, "fn", kernel).__name__] += 1

    _guard_cuda()
    with ExitStack() as stack:
        for replaced in (
            patch.object(GridExecutor, "__call__", launch),
            patch.object(JITFunction, "run", launch),
            patch.object(device, "on", lambda where: nullcontext()),
            patch.object(device, "architecture", lambda where: arch),
            patch.object(device, "processors", lambda where: 132),
            patch.object(torch.cuda, "get_device_name", lambda where: "a fake GPU"),
        ):
            stack.enter_context(replaced)
        stack.enter_context(warnings.catch_warnings())
        # Launchers ask whether an address is aligned; that of a fake tensor is 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        first_use.forget()
        stack.callback(first_use.forget)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        yield launches


def backward(loss: Tensor) -> None:
    """`loss.backward()` without `.grad`; torch's own needs a GPU's streams for fake tensors too."""
    start = loss.grad_fn
    assert start is not None
    arriving: dict[Any, dict[int, Tensor]] = {start: {0: torch.ones_like(loss)}}
    missing = _parents(start)
    ready = [start]
    while ready:
        node = ready.pop()
        gradients = arriving.pop(node, {})
        if hasattr(node, "variable"):
            continue
        incoming = [gradients.get(number) for number in range(len(node._input_metadata))]
        for child, place, gradient in _run(node, incoming):
            if gradient is not None:
                there = arriving.setdefault(child, {})
                there[place] = gradient if place not in there else there[place] + gradient
            missing[child] -= 1
            if missing[child] == 0:
                ready.append(child)


def _run(node: Any, incoming: list[Tensor | None]) -> Iterator[tuple[Any, int, Tensor | None]]:
    """The gradients that a node of the graph sends on, with their nodes and places there."""
    in_python = hasattr(node, "needs_input_grad")
    found = (node.apply if in_python else node)(*incoming)
    found = found if isinstance(found, tuple) else (found,)
    if in_python:
        found = [x for x, needed in zip(found, node.needs_input_grad, strict=False) if needed]
    else:
        pairs = zip(found, node.next_functions, strict=True)
        found = [x for x, (child, _) in pairs if child is not None]
    children = [child for child in node.next_functions if child[0] is not None]
    for (child, place), gradient in zip(children, found, strict=True):
        yield child, place, gradient


def _parents(start: Any) -> Counter[Any]:
    """How many gradients each node of the graph waits for."""
    missing, seen, nodes = Counter(), {start}, [start]
    while nodes:
        for child, _ in nodes.pop().next_functions:
            if child is not None:
                missing[child] += 1
                if child not in seen:
                    seen.add(child)
                    nodes.append(child)
    return missing


def _guard_cuda() -> None:
    """Gives a torch built for CPUs a guard of CUDA's current device: the one that does nothing."""
    library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    name = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(str(library)), name)
    guards[CUDA] = guards[CUDA] or guards[META]


def _line() -> str:
    """The innermost line of ours."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(OURS):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return "no line of ours"


def _needs_values(func: Any, args: Any, kwargs: Any, on: str) -> bool:
    """Whether the host needs values of a tensor on the device to go on."""
    if not any(x.device.type == on for x in _tensors((args, kwargs))):
        return False
    name = func._opname
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    tags = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
    return any(tag in func.tags for tag in tags)


def _mixes(func: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether memory of one device reaches the other. A kernel takes a number as an argument."""
    tensors = _tensors((args, kwargs, result))
    if torch.Tag.pointwise in func.tags or func._opname == "fill_":
        tensors = [x for x in tensors if x.is_cuda or x.ndim]
    return len({x.device.type for x in tensors}) > 1


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
