"""Whether a result errs no more than fp32 does: two bounds, element by element, against fp64.

A GPU's own arithmetic errs more than fp32 in any order. What it may add is an allowance.

T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Units of the last place that ex2.approx and div.full may be off, 2 each, in one result.
APPROXIMATE = 4 * torch.finfo(torch.float32).eps
# Terms that a tensor core adds before it cuts the sum.
TERMS = 16


class GpuArithmetic(NamedTuple):
    """What a GPU's arithmetic may add to the errors of fp32 in the head, to first order.

    depth: D, the terms of a logit.
    largest: the largest |logit|, without bias and softcap, over its temperature.
    dtype: what the matrices hold.
    capped: the softcap over the least temperature; 0 without a softcap.
    emulated: whether the fp32 results beside it are `worst_of_orders`, or else one run of torch's.

    Tensor cores align 16-bit products to the largest exponent. They cut them, and the accumulator
    every 16 terms or fewer, to 24 bits and a few more (arXiv 2512.07004). Models of these
    (tests/hardware_model.py) lose up to 2^-23 of the largest logit per 16 terms. fp32 products are
    chains of FMA, and err by the root of their length. `worst_of_orders` has those of PRODUCT_STEPS
    and SUM_STEPS; one run may have none. Softmax and softcap use ex2.approx and div.full.
    """

    depth: int
    largest: float
    dtype: torch.dtype
    capped: float = 0.0
    emulated: bool = True

    @classmethod
    def of(
        cls,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        temperature: Tensor | float | None = None,
        softcap: float | None = None,
        emulated: bool = True,
        **others: Any,
    ) -> "GpuArithmetic":
        """That of a head, whose logits it computes: fp32 [T, V]. `others` change nothing.

        temperature: a number, [1] or [T].
        """
        z_TV = hidden_TD.detach().float() @ weight_VD.detach().float().T
        scale = torch.as_tensor(1.0 if temperature is None else temperature, device=z_TV.device)
        largest = (z_TV / scale.reshape(-1, 1)).abs().amax()
        capped = 0.0 if softcap is None else softcap / float(scale.min())
        return cls(hidden_TD.shape[1], float(largest), hidden_TD.dtype, capped, emulated)

    def _chain(self, length: int, steps: int) -> float:
        """What a chain of fp32 sums may err beyond the fp32 results beside it, relative."""
        beside = min(length, steps) if self.emulated else 0
        return (length**0.5 - beside**0.5) / 2 * torch.finfo(torch.float32).eps

    @property
    def logit(self) -> float:
        """What a logit over its temperature may err more."""
        product = self._chain(self.depth, OtherOrder.PRODUCT_STEPS)
        if self.dtype != torch.float32:
            product *= not self.emulated
            product += -(-self.depth // TERMS) * torch.finfo(torch.float32).eps
        return product * self.largest + APPROXIMATE * self.capped

    @property
    def probability(self) -> float:
        """What a probability may, relative. Logits of one sign shrink together."""
        return self.logit + self._sum + APPROXIMATE

    @property
    def _sum(self) -> float:
        return self._chain(OtherOrder.SUM_STEPS, OtherOrder.SUM_STEPS)

    def outputs(self, logprob: Tensor, entropy: Tensor, logsumexp: Tensor) -> list[Tensor]:
        """What each of these may; those of a nearly certain row next to nothing."""
        return [
            self.probability * -logprob.expm1() + APPROXIMATE * logprob.abs(),
            (self.probability + APPROXIMATE) * entropy,
            self.logit + self._sum + APPROXIMATE * logsumexp.abs().clamp_min(1),
        ]

    def statistics(
        self,
        varentropy: Tensor,
        max_prob: Tensor,
        sum_p2: Tensor,
        sum_p2_logp: Tensor,
        mean_logit: Tensor,
        *_: Tensor,
    ) -> list[Tensor]:
        """What each of these may."""
        squares = torch.minimum(sum_p2, 2 * (1 - sum_p2))
        each = [
            varentropy + 2 * varentropy.sqrt(),
            max_prob * (1 - max_prob),
            2 * squares,
            2 * sum_p2_logp.abs() + squares,
        ]
        mean = torch.full_like(mean_logit, self.logit + self._sum * self.largest)
        return [*(self.probability * x for x in each), mean + APPROXIMATE * mean_logit.abs()]

    def gradient(self, truth: Tensor) -> Tensor:
        """What a gradient of hidden states, weight or bias may; its terms err to either side."""
        product = self._chain(OtherOrder.PRODUCT_STEPS, OtherOrder.PRODUCT_STEPS)
        return (self.probability / 4 + product) * truth.abs().amax()


class OtherOrder(TorchDispatchMode):
    """Makes every fp32 sum inside run through one fp32 accumulator, in order (seed 0) or shuffled.

    torch's own sums depend on the processor and the threads, and these do not. An accumulator
    takes a bounded number of steps, one element each where that is enough; a step's own sum is
    fp64. A product may be one chain over the vocabulary. A plain sum takes fewer steps, because
    every library sums in lanes. Every second column of a product has another random order, so that
    equal columns need not tie. Products, sums, logsumexp and log_softmax are replaced, with their
    gradients.
    """

    PRODUCT_STEPS, SUM_STEPS = 2048, 256

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed) if seed else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _IN_OTHER_ORDER.get(str(func))
        if own is None or kwargs or args[0].dtype != torch.float32 or args[0].numel() == 0:
            return func(*args, **(kwargs or {}))
        return own(self, *args)

    def _parts(self, x: Tensor, count: int, steps: int) -> tuple[Tensor, ...]:
        if self._generator is None:
            order = torch.arange(count)
        else:
            order = torch.randperm(count, generator=self._generator)
        return order.to(x.device).split(-(-count // steps))

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        result = left.new_zeros(left.shape[0], right.shape[1])
        for first in range(min(2, right.shape[1])):
            columns = right[:, first::2]
            total = left.new_zeros(left.shape[0], columns.shape[1])
            for part in self._parts(left, left.shape[1], self.PRODUCT_STEPS):
                if len(part) == 1:
                    total += left[:, part] * columns[part]
                else:
                    total += (left[:, part].double() @ columns[part].double()).float()
            result[:, first::2] = total
        return result

    def _sum_all(self, x: Tensor) -> Tensor:
        return self._sum(x.flatten(), [0])

    def _sum(self, x: Tensor, dims: Sequence[int] | None, keepdim: bool = False) -> Tensor:
        dims = [d % x.dim() for d in (dims or range(x.dim()))]
        rest = [d for d in range(x.dim()) if d not in dims]
        flat = x.permute(*dims, *rest).reshape(-1, *(x.shape[d] for d in rest))
        total = torch.zeros_like(flat[0])
        for part in self._parts(x, flat.shape[0], self.SUM_STEPS):
            total = total + flat[part].double().sum(0).float()
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
        return total.reshape(shape) if keepdim else total

    def _logsumexp(self, x: Tensor, dims: list[int], keepdim: bool = False) -> Tensor:
        top = x.amax(dims, keepdim=True)
        result = top + self._sum((x - top).double().exp().float(), dims, True).log()
        return result if keepdim else result.squeeze(tuple(dims))

    def _log_softmax(self, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        shifted = x - x.amax(dim, keepdim=True)
        return shifted - self._sum(shifted.double().exp().float(), [dim], True).log()

    def _log_softmax_backward(self, grad: Tensor, logp: Tensor, dim: int, dtype: Any) -> Tensor:
        return grad - logp.exp() * self._sum(grad, [dim], True)


_IN_OTHER_ORDER: dict[str, Callable[..., Tensor]] = {
    "aten.mm.default": OtherOrder._product,
    "aten.sum.default": OtherOrder._sum_all,
    "aten.sum.dim_IntList": OtherOrder._sum,
    "aten.logsumexp.default": OtherOrder._logsumexp,
    "aten._log_softmax.default": OtherOrder._log_softmax,
    "aten._log_softmax_backward_data.default": OtherOrder._log_softmax_backward,
}


def worst_of_orders(
    formula: Callable[[], Sequence[Tensor | None]],
    truths: Sequence[Tensor | None],
    orders: int = 4,
) -> list[Tensor | None]:
    """The results of `formula()` in fp32, each element from the order of sums that errs most there.

    One order can be lucky, and other processors' libraries take other ones, so no bound may rest on
    one. A result is a tensor or None; its truth is fp64.
    """
    runs = []
    for seed in range(orders):
        with OtherOrder(seed):
            runs.append(formula())
    return worst_elements(runs, truths)


def worst_elements(
    runs: Sequence[Sequence[Tensor | None]], truths: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Each result of several runs, element by element the one that is furthest from its truth."""
    return [_worst(*pair) for pair in zip(zip(*runs, strict=True), truths, strict=True)]


def _worst(candidates: Sequence[Any], truth: Any) -> Any:
    if truth is None or truth.numel() == 0:
        return candidates[0]
    every = torch.stack(list(candidates))
    return every.gather(0, (every.double() - truth).abs().argmax(0, keepdim=True)).squeeze(0)


def assert_within_two_bounds(
    got: Tensor,
    truth: Tensor,
    eager: Tensor,
    plain: Tensor,
    *,
    factor: float = 2.0,
    operands: torch.dtype = torch.float32,
    allowance: Tensor | float = 0.0,
) -> None:
    """Bounds |got - truth|, element by element, by the worst errors of two others, plus rounding.

    truth: fp64. eager: the formula in the dtype of the inputs. plain: the same in fp32 on upcast
    inputs. fp32 results come from `worst_of_orders`. A 16-bit path must meet plain's bound too. It
    may add the rounding of its output, and of its products' operands if they have dtype `operands`.
    allowance: what the arithmetic of a GPU may add, from `GpuArithmetic`; nothing on a CPU.
    """
    truth = truth.double()
    error = (got.double() - truth).abs()
    of_got = torch.finfo(got.dtype)
    rounding = of_got.eps * truth.abs().clamp_min(of_got.smallest_normal)
    unit = (
        torch.finfo(torch.float32).eps
        if operands == torch.float32
        else torch.finfo(operands).eps / 2
    )
    rounding = rounding + unit * truth.abs().amax() + allowance
    for name, other in {"eager": eager, "plain fp32": plain}.items():
        bound = factor * (other.double() - truth).abs().amax() + rounding
        excess = (error - bound).amax() if error.numel() else torch.tensor(-1.0)
        if not excess <= 0:
            where = int((error - bound).argmax())
            raise AssertionError(
                f"error {error.flatten()[where]:.3e} at {where} exceeds {factor} x the worst error "
                f"of {name}, {bound.flatten()[where]:.3e} with rounding"
            )
