"""Triton's interpreter, which ends where a kernel reads or writes what it must not.

Every tensor argument is moved between guards, and every byte of it knows which programs of the
launch read and wrote it. Tensor descriptors load and store by the same functions as pointers.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, TensorHandle

# Bytes before and after each argument that belong to no other.
GUARD = 1 << 16
ALIGNMENT = 256
NONE, SEVERAL = -1, -2
# The interpreter's operations on memory, and where their arguments are.
OPERATIONS = {
    "create_masked_load": ("pointers", "mask"),
    "create_masked_store": ("pointers", "value", "mask"),
    "create_atomic_rmw": ("operation", "pointers", "value", "mask"),
    "create_atomic_cas": ("pointers",),
}


class Argument:
    """The storage of a tensor argument, in a place of its own; and who touched its bytes."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage, self.size = storage, storage.nbytes()
        buffer = torch.empty(self.size + 2 * GUARD + 2 * ALIGNMENT, dtype=torch.uint8)
        # An address keeps its alignment.
        start = GUARD + (storage.data_ptr() - buffer.data_ptr() - GUARD) % ALIGNMENT
        self.buffer, self.start = buffer, start
        self.address = buffer.data_ptr() + start
        self.bytes.copy_(self._given)
        self.visible = torch.zeros(self.size, dtype=torch.bool)
        self.writer, self.reader, self.atomic = (
            np.full(self.size, NONE, dtype=np.int32) for _ in range(3)
        )

    @property
    def bytes(self) -> Tensor:
        return self.buffer[self.start : self.start + self.size]

    @property
    def _given(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(self.storage, 0, (self.size,))

    def view(self, like: Tensor) -> Tensor:
        """The same view of the moved storage, whose bytes the kernel may touch."""
        item, offset = like.element_size(), like.storage_offset()
        strides = [stride * item for stride in like.stride()]
        torch.as_strided(self.visible, (*like.shape, item), (*strides, 1), offset * item).fill_(
            True
        )
        moved = like.new_empty(0)
        place = self.start + offset * item
        return moved.set_(self.buffer.untyped_storage(), place // item, like.shape, like.stride())

    def give_back(self) -> None:
        self._given.copy_(self.bytes)

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        return (addresses >= self.address - GUARD) & (addresses < self.address + self.size + GUARD)


class Launch:
    """The arguments of a launch, and what its programs do to them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.arguments: dict[int, Argument] = {}

    def move(self, x: Any) -> Any:
        """A tensor, or what holds one, with its storage moved; all else as it is."""
        if isinstance(x, tuple):
            return interpreter._tuple_create(x, map(self.move, x))
        if isinstance(x, interpreter.TensorDescriptor):
            rest = x.shape, x.strides, x.block_shape, x.padding, x.round_f32_to_tf32
            return interpreter.TensorDescriptor(self.move(x.base), *rest)
        if not hasattr(x, "data_ptr"):
            return x
        tensor = interpreter._unwrap_tensor(x)
        storage = tensor.untyped_storage()
        if storage._cdata not in self.arguments:
            self.arguments[storage._cdata] = Argument(storage)
        moved = self.arguments[storage._cdata].view(tensor)
        return interpreter._rewrap_tensor(moved, original_tensor=x)

    def access(self, kind: str, pointers: TensorHandle, mask: Any, value: Any = None) -> None:
        """Checks one load, store or atomic operation of the current program."""
        addresses = np.asarray(pointers.data).astype(np.int64)
        chosen = np.broadcast_to(True if mask is None else mask.data, addresses.shape)
        item = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = addresses[chosen]
        if addresses.size == 0:
            return
        argument = next((x for x in self.arguments.values() if x.holds(addresses).all()), None)
        if argument is None:
            self._fault(f"a {kind} in no argument, or in several")
        assert argument is not None
        first = addresses - argument.address
        places = (first[:, None] + np.arange(item)).reshape(-1)
        if places.min() < 0 or places.max() >= argument.size:
            self._fault(f"a {kind} outside of an argument's {argument.size} bytes")
        if not argument.visible.numpy()[places].all():
            self._fault(f"a {kind} outside of an argument's view")
        if kind == "store":
            values = np.broadcast_to(value.data, np.shape(pointers.data))[chosen]
            self._check_lanes(first, values)
        self._check_programs(kind, argument, places)

    def _check_lanes(self, first: np.ndarray, values: np.ndarray) -> None:
        _, lane = np.unique(first, return_index=True)
        written = dict(zip(first[lane], values[lane], strict=True))
        again = np.setdiff1d(np.arange(first.size), lane)
        for place, value in zip(first[again], values[again], strict=True):
            one = written[place]
            if value != one and not (value != value and one != one):
                self._fault("a store of different values to one address")

    def _check_programs(self, kind: str, argument: Argument, places: np.ndarray) -> None:
        builder = interpreter.interpreter_builder
        program = np.ravel_multi_index(builder.grid_idx, builder.grid_dim)
        touched = {"load": argument.reader, "store": argument.writer, "atomic": argument.atomic}
        for other, programs in touched.items():
            if kind == other != "store":
                continue
            theirs = programs[places]
            if ((theirs != NONE) & (theirs != program)).any():
                self._fault(f"a {kind} where another program has a {other}")
            if (kind, other) == ("load", "store") and (theirs == program).any():
                # Its threads have no order without a barrier.
                self._fault("a load of what the program itself has stored")
        mine = touched[kind]
        before = mine[places]
        mine[places] = np.where((before == NONE) | (before == program), program, SEVERAL)

    def _fault(self, what: str) -> None:
        raise AssertionError(f"{self.name}: {what}")


@contextmanager
def sanitized() -> Iterator[Counter[str]]:
    """Checks every launch inside, and counts them by the kernel's name.

    Raises:
        InterpreterError: names the kernel and its fault. It left the view that it was given, or
            touched what another program of the launch stores. Or it loaded what its program had
            stored, or stored two values to one address.
    """
    launches: Counter[str] = Counter()
    builder, current = interpreter.InterpreterBuilder, []

    def begin(self: Any, arguments: Any, named: dict[str, Any]) -> Any:
        launch = Launch(self.fn.__name__)
        launches[launch.name] += 1
        current[:] = [launch]
        return [*map(launch.move, arguments)], {k: launch.move(x) for k, x in named.items()}

    def end(*_: Any) -> None:
        for argument in current.pop().arguments.values():
            argument.give_back()

    def checked(name: str) -> Any:
        original = getattr(builder, name)
        kind = "atomic" if "atomic" in name else name.removeprefix("create_masked_")

        def operation(self: Any, *arguments: Any, **named: Any) -> Any:
            given = dict(zip(OPERATIONS[name], arguments, strict=False)) | named
            current[0].access(kind, given["pointers"], given.get("mask"), given.get("value"))
            return original(self, *arguments, **named)

        return patch.object(builder, name, operation)

    with ExitStack() as stack:
        for name in OPERATIONS:
            stack.enter_context(checked(name))
        stack.enter_context(patch.object(GridExecutor, "_init_args_hst", begin))
        stack.enter_context(patch.object(GridExecutor, "_restore_args_dev", end))
        yield launches


def kernels_of(folder: Path) -> set[str]:
    """The names of all jit functions in a folder that no other jit function there calls."""
    jit, called = set(), set()
    for path in folder.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(
                "jit" in ast.unparse(decorator) for decorator in function.decorator_list
            ):
                jit.add(function.name)
                calls = (x for x in ast.walk(function) if isinstance(x, ast.Call))
                called |= {ast.unparse(call.func) for call in calls}
    return jit - called
