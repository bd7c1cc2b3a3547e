"""Bytes that torch's operations read and write, counted where no GPU is at hand."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They write to their first argument without reading it, and touch as many values as the index has.
_ONLY_WRITE = {"copy_", "fill_", "zero_"}
_BY_INDEX = {"gather", "scatter_"}


class Traffic(TorchDispatchMode):
    """Counts what operations on matrices of at least `least` elements read and write.

    `bytes`: their sum. A view costs nothing, a value that is broadcast counts once, and a result in
    an argument counts as read if the operation needs what was there.
    `names`: of these operations, in their order.
    """

    def __init__(self, least: int) -> None:
        super().__init__()
        self.bytes = 0
        self.names: list[str] = []
        self._least = least

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        given, returned = _tensors((args, kwargs)), _tensors(result)
        large = max((x.numel() for x in (*given, *returned)), default=0) >= self._least
        if not large or func.is_view or name.startswith(("empty", "new_empty")):
            return result
        self.names.append(name)
        if name in _BY_INDEX:
            index = next(x for x in given if not x.is_floating_point())
            self.bytes += 2 * index.numel() * given[0].element_size()
            return result
        read = _tensors(args[1:] if name in _ONLY_WRITE else args)
        self.bytes += sum(x.numel() * x.element_size() for x in (*read, *returned))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
