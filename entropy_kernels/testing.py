"""What tests and benchmarks share: realistic heads, counted products, watched allocations, and an
interpreter of Triton that computes as GPUs do.

T tokens, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import _native, ops
from ._ops import add_op_namespace_prefix
from ._torch import pair_products
from .backends import why_no_triton
from .verification.truth import entropy_quantiles, scale_to_entropy

_NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
_LINEAR = "mkldnn._linear_pointwise.default"
_PRODUCTS = {
    *("aten.mm.default", "aten.mm.out", "aten.mm.dtype", "aten.mm.dtype_out"),
    *("aten.bmm.default", "aten.bmm.out", "aten.bmm.dtype", "aten.bmm.dtype_out"),
    *("aten.addmm.out", "aten.addmm.dtype_out", "aten.addmm_.default", _LINEAR),
}


def products() -> int:
    """Multiplications that torch does not count, of compiled kernels and of pairs, so far."""
    own = _native.products() + pair_products.products()
    if why_no_triton() is not None:
        return own
    from ._triton.common import products as of_triton

    return own + of_triton.counted()


class Watch(TorchDispatchMode):
    """Counts the products and the largest tensor of everything inside, our ops included.

    `products`: sum of m * n * k over all matrix products (half their flops).
    `largest`: size of the largest tensor that any operation returned, in 4-byte elements.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0
        self._depth = 0

    def __enter__(self) -> "Watch":
        if self._depth == 0:
            self._before = products()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if self._depth == 0:
            self.products += products() - self._before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = ops.BODIES.get(func.__name__.split(".")[0])
        if func.namespace == _NAMESPACE and body is not None:
            with self:
                return body(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if str(func) in _PRODUCTS:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            self.products += left.numel() * right.shape[0 if str(func) == _LINEAR else -1]
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel() * x.element_size() // 4)
        return result


def peaked_head(
    tokens: int, hidden: int, vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets whose entropies look like a reasoning model's.

    The paper (arXiv 2506.01939, section 3) finds half of the tokens below 0.01 nats and the 80th
    percentile at 0.672. Each row mixes a few candidate words; its scale is bisected until its
    entropy meets that distribution, or its logits reach 60, which language models' rarely pass.
    Targets are sampled from the rows' distributions.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5
    candidates = torch.randint(vocabulary, (tokens, min(6, vocabulary)), generator=generator)
    gaps = (0.3 + torch.rand(candidates.shape, generator=generator)).cumsum(1)
    direction_TD = torch.einsum("tc,tcd->td", (-gaps).exp(), weight_VD[candidates])
    direction_TD += 0.01 * torch.randn(tokens, hidden, generator=generator)

    hidden_TD = torch.empty(tokens, hidden)
    target_T = torch.empty(tokens, dtype=torch.int64)
    wanted_T = entropy_quantiles(tokens)[torch.randperm(tokens, generator=generator)]
    wanted_T = wanted_T.clamp_max(0.9 * torch.tensor(float(vocabulary)).log())
    for start in range(0, tokens, 64):
        rows = slice(start, start + 64)
        z_TV = direction_TD[rows] @ weight_VD.T
        scale = scale_to_entropy(z_TV, wanted_T[rows])
        hidden_TD[rows] = direction_TD[rows] * scale
        p_TV = (z_TV * scale).softmax(1)
        target_T[rows] = torch.multinomial(p_TV, 1, generator=generator).squeeze(1)
    return hidden_TD.to(dtype), weight_VD.to(dtype), target_T


def mend_interpreter() -> None:
    """Lets Triton's interpreter compute what GPUs do, in this process from now on.

    The interpreter truncates fp32 to bf16; mended, it rounds to nearest, ties to even. Its fp32
    products are numpy's, whose sums depend on the shape, the processor and its threads. Kernels
    rely on equal bits for a column of two tiles. Mended, they are summed in fp64 and rounded once
    per step.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    cast, dot = Builder.cast_impl, Builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16)
        return TensorHandle(rounded.numpy().view(np.uint16), dst_type.scalar)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar != tl.float32:
            return dot(self, a, b, d, *options)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
        return TensorHandle((product + d.data).astype(np.float32), d.dtype.scalar)

    Builder.cast_impl, Builder.create_dot = cast_impl, create_dot
