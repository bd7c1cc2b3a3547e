"""The backends: where each one runs, which one "auto" stands for, and the way into its kernels.

Triton is imported when it is first asked for: a machine without it has the other backends.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.torch_version import TorchVersion

from . import _native, _rows, device
from ._arguments import check_choice, warn_caller
from ._compiler import constant
from ._cuda_kernels import module as cuda_module
from ._cuda_kernels import ratio_loss as cuda_ratio_loss
from ._cuda_kernels import selection as cuda_selection
from ._rows import ForwardRows, check_active_rows
from ._torch import head_backward, head_forward
from ._torch import ratio_loss as torch_ratio_loss
from ._torch import selection as torch_selection
from .head import Head
from .verification import first_use
from .verification.question import call_of, options_of

# The first version that compiles every kernel.
LEAST_TRITON = "3.6"
# Forward stores the logits of rows that are trained on up to this size; backward recomputes the
# others.
STORED_LOGITS_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Op(NamedTuple):
    """What `impl` of one op may be."""

    impls: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] | None = None  # what its kernels take, if not every dtype


OPS = {
    "linear_logprob_entropy": _Op(("auto", "reference", "torch", "cpu", "triton", "cuda")),
    "ratio_loss": _Op(("auto", "torch", "cpu", "triton", "cuda"), dtypes=(torch.float32,)),
    "selection": _Op(("auto", "torch", "cpu", "triton", "cuda")),
    "support": _Op(("auto", "reference", "torch", "cpu", "triton", "cuda")),
    "entropy_from_logits": _Op(("auto", "torch", "cpu", "triton", "cuda")),
}


def check_impl(impl: object, op: str = "linear_logprob_entropy") -> None:
    """A name; whether it can run shows where the tensors are."""
    check_choice("impl", impl, OPS[op].impls)


def beside_head(impl: str) -> str:
    """What a loss and a selection take beside a head of `impl`: the reference is the head's alone.

    Those of them that are plain PyTorch take "auto".
    """
    return "torch" if impl == "reference" else impl


def resolve(op: str, impl: str, where: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend that runs `op` on tensors of that device and dtype; of a head, `resolve_head`.

    "auto" is the fastest one that is known to be right there: the kernels of a GPU are checked at
    their first use.

    Raises:
        ValueError: an unknown name; a backend that cannot run there.
    """
    check_impl(impl, op)
    known = OPS[op]
    fits = known.dtypes is None or dtype in known.dtypes
    if impl == "auto":
        call = () if known.dtypes or dtype is None else (dtype,)
        if fits and _prefers_cuda(op, where, *call):
            return "cuda"
        if fits and verified(op, where, *call):
            return "triton"
        return "cpu" if fits and why_not("cpu", where) is None else "torch"
    if (why := why_not(impl, where, op)) is not None:
        raise ValueError(f'impl="{impl}" cannot run: {why}')
    if impl in ("cpu", "triton", "cuda") and not fits:
        raise ValueError(f'impl="{impl}" needs fp32 tensors; got {dtype}')
    return impl


def resolve_head(
    impl: str,
    head: Head,
    *,
    keep_logits: bool = False,
    stored: bool = False,
    statistics_wanted: int = 0,
    group: ProcessGroup | None = None,
) -> str:
    """The backend that runs a flat head; `stored` where rows above a threshold may be kept.

    group: the ranks that share the vocabulary; "auto" is the same on all of them.
    """
    op, where = "linear_logprob_entropy", head.hidden.device
    if impl != "auto":
        return resolve(op, impl, where)
    stored = stored and group is None
    summed = statistics_wanted > 0
    call = call_of(head, keep_logits=keep_logits, stored=stored, statistics=summed)
    of_cuda = group is None and statistics_wanted <= _rows.FILLED_BY_CSRC_CUDA
    if of_cuda and _prefers_cuda(op, where, *call):
        return "cuda"
    if verified(op, where, *call, group):
        return "triton"
    return "cpu" if why_not("cpu", where) is None else "torch"


def available() -> tuple[str, ...]:
    """The backends of this machine, without Triton's interpreter. Asks for a GPU."""
    here = {"torch": True, "cpu": _native.why_missing("cpu") is None}
    for name in ("triton", "cuda"):
        here[name] = torch.cuda.is_available() and why_not(name, torch.device("cuda")) is None
    return tuple(name for name, is_here in here.items() if is_here)


def why_not(impl: str, where: torch.device, op: str = "linear_logprob_entropy") -> str | None:
    """A sentence saying why `impl` cannot run on tensors of that device; None where it can."""
    if impl == "triton":
        return _why_not_triton(where)
    if impl == "cuda":
        # The head's other kernels are Triton's: those that number rows, and what csrc/cuda lacks,
        # such as all of its head over sets.
        beside = None if op in ("ratio_loss", "selection") else _why_not_triton(where)
        return cuda_module.why_not(where) or beside
    if impl == "cpu":
        on_cpu = where.type == "cpu"
        return _native.why_missing("cpu") if on_cpu else f"it needs tensors on the CPU; got {where}"
    return None


def why_torch(where: torch.device) -> str:
    """Why "auto" stands for "torch" there. The caller knows that it does."""
    if where.type == "cpu":
        return str(why_not("cpu", where))
    return why_not("triton", where) or (
        "its Triton kernels are not known to be right; python -m entropy_kernels --verify tells why"
    )


@functools.cache
def _warn_of_the_torch_path(why: str) -> None:
    warn_caller(
        f"linear_logprob_entropy takes the torch path, which is slower: {why}", RuntimeWarning
    )


@functools.cache
def why_no_triton() -> str | None:
    """Why Triton's kernels do not load; None where they do."""
    try:
        import triton

        if TorchVersion(triton.__version__) < LEAST_TRITON:
            return (
                f"Triton must be {LEAST_TRITON} or newer; got {triton.__version__}. It is torch's "
                "own: torch 2.10 and newer bring one that fits"
            )
        from ._triton.common import products  # noqa: F401
    except ImportError as error:
        return f"Triton does not load: {type(error).__name__}: {error}"
    return None


@constant
def _why_not_triton(where: torch.device) -> str | None:
    if (why := why_no_triton()) is not None:
        return why
    if where.type == "cuda" or (where.type == "cpu" and device.interpreting()):
        return None
    return f"Triton kernels need tensors on a GPU, or TRITON_INTERPRET=1; got {where}"


@constant
def verified(op: str, where: torch.device, *call: Any) -> bool:
    """Whether "auto" takes the Triton kernels: they are right there, as `first_use.right` finds.

    A head tells why it takes the torch path.
    """
    if not first_use.asks(where):
        why = why_not("cpu", where)
    elif (why := why_not("triton", where)) is None:
        found = first_use.right(op, where, *call)
        if found.right:
            return True
        why = found.reason
    if why is not None and op == "linear_logprob_entropy":
        _warn_of_the_torch_path(why)
    return False


@constant
def _prefers_cuda(op: str, where: torch.device, *call: Any) -> bool:
    """Whether "auto" takes csrc/cuda's kernels before Triton's: they are faster, and right."""
    if not first_use.asks(where) or why_not("cuda", where, op) is not None:
        return False
    return (
        first_use.measured(op, where, *call)
        and first_use.right(op, where, *call, impl="cuda").right
    )


@constant
def stores_rows(
    where: torch.device, dtype: torch.dtype, hidden: int, options: tuple[str, ...]
) -> bool:
    """Whether Triton's forward stores rows above a threshold. The caller has asked `why_not`.

    options: the call's, "stored" among them; a kernel that is known to be wrong stores none.
    """
    from ._triton.common import choice

    wrong = first_use.refused("forward", where, dtype, hidden, options)
    return choice.stores_rows(where, dtype, hidden, wrong)


def forward(
    impl: str,
    head: Head,
    *,
    keep_logits: bool,
    store_above: Tensor | None = None,
    store_rows: int = 0,
    statistics: Tensor | None = None,
) -> ForwardRows:
    """The head's forward, of a flat head; all inputs are taken in their own dtype."""
    with torch.autocast(head.hidden.device.type, enabled=False):
        if impl in ("triton", "cuda"):
            from ._triton.head_forward.launch import forward as triton_forward

            stored, summed = store_above is not None, statistics is not None
            return triton_forward(
                head,
                refused=_refused("forward", head, keep_logits, stored, summed),
                keep_logits=keep_logits,
                store_above=store_above,
                store_rows=store_rows,
                statistics=statistics,
                impl=impl,
            )
        assert store_above is None, "only Triton's forward has whole rows of logits at hand"
        if impl == "cpu":
            return _native.forward(head, keep_logits=keep_logits, statistics=statistics)
        return head_forward.forward(head, keep_logits=keep_logits, statistics=statistics)


def backward(
    impl: str,
    gradients: Gradients,
    head: Head,
    rows: ForwardRows,
    needs: tuple[bool, bool, bool],
    *,
    max_active_rows: int | None = None,
    main_grad: Tensor | None = None,
    reduce_hidden: Callable[[Tensor, Tensor], None] | None = None,
) -> Gradients:
    """Gradients of hidden, weight and bias; None for one not needed, or added to main_grad."""
    with torch.autocast(head.hidden.device.type, enabled=False):
        if impl in ("triton", "cuda"):
            from ._triton.head_backward.launch import backward as triton_backward

            return triton_backward(
                gradients,
                head,
                rows,
                needs,
                refused=_refused("dlogits", head, stored=rows.places is not None),
                max_active_rows=max_active_rows,
                main_grad=main_grad,
                reduce_hidden=reduce_hidden,
                impl=impl,
            )
        counts = impl == "cpu" or _rows.sees_values(head.hidden.device)
        if max_active_rows is not None and counts:
            check_active_rows(gradients, head, max_active_rows)
        into: dict[str, Any] = {"main_grad": main_grad, "reduce_hidden": reduce_hidden}
        if impl == "cpu":
            return _native.backward(gradients, head, rows, needs, **into)
        most = None if counts else max_active_rows
        return head_backward.backward(gradients, head, rows, needs, **into, max_active_rows=most)


def _refused(
    op: str, head: Head, keep_logits: bool = False, stored: bool = False, statistics: bool = False
) -> Callable[..., bool] | None:
    options = options_of(head, keep_logits=keep_logits, stored=stored, statistics=statistics)
    hidden = head.hidden
    return first_use.refused(op, hidden.device, hidden.dtype, hidden.shape[1], options)


def ratio_loss(impl: str) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The backend's clipped policy loss; all take and return what `_torch.ratio_loss` does."""
    if impl == "triton":
        from ._triton.ratio_loss.launch import ratio_loss as triton_ratio_loss

        return triton_ratio_loss
    if impl == "cuda":
        return cuda_ratio_loss.ratio_loss
    return _native.ratio_loss if impl == "cpu" else torch_ratio_loss.ratio_loss


def in_one_block(impl: str, values: Tensor) -> bool:
    """Whether one launch makes a whole selection of these values: csrc/cuda's, of few of them."""
    if resolve("selection", impl, values.device) != "cuda":
        return False
    return values.numel() <= cuda_selection.most_of_one_block()


def selection(impl: str, where: torch.device) -> ModuleType:
    """The module whose `radix_pick` and `select_largest` are those of `ops` on that device."""
    name = resolve("selection", impl, where)
    if name == "triton":
        from ._triton.selection import launch

        return launch
    return cuda_selection if name == "cuda" else torch_selection


def radix_histogram(
    impl: str,
    values: Tensor,
    mask: Tensor | None,
    prefix: Tensor,
    shift: int,
    bits: int,
    prefix_bits: int,
) -> Tensor:
    """How many valid values have each digit; see `ops.radix_histogram`."""
    digit = shift, bits, prefix_bits
    if resolve("selection", impl, values.device) == "cpu":
        counts = torch.zeros(1 << bits, dtype=torch.int64)
        _native.radix_histogram(values, mask, int(prefix), *digit, counts)
        return counts
    kernels = selection(impl, values.device)
    return kernels.radix_histogram(values, mask, prefix, *digit)
