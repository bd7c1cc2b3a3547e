"""A model of programs that run at the same time, for Triton's interpreter, which runs them in turn.

Every program loads what memory held at the launch. Its stores land in their order when all programs
have ended, those of the first program last. Atomics act at once. A kernel whose programs need one
another's stores is wrong under it, as it may be on a GPU.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Kernels run so inside."""
    stores: dict[tuple[int, ...], list[tuple[Any, ...]]] = {}
    store, restore = InterpreterBuilder.create_masked_store, GridExecutor._restore_args_dev

    def later(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> None:
        of_program = stores.setdefault(self.grid_idx, [])
        of_program.append((self, pointers, value, mask, *options))

    def land(self: Any, *arguments: Any) -> None:
        for of_program in reversed(stores.values()):
            for one in of_program:
                store(*one)
        stores.clear()
        restore(self, *arguments)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_store", later),
        mock.patch.object(GridExecutor, "_restore_args_dev", land),
    ):
        yield
