"""The call convention of Liger-Kernel's fused linear scaled cross entropy, on our head.

What takes `LigerFusedLinearScaledCrossEntropyFunction` takes `LinearScaledCrossEntropy` in its
place: the same arguments, outputs and exceptions as in liger-kernel 0.8.5, which need not be
installed, but for the table of `apply`. Backward runs on the rows with gradient alone. The keyword
`impl` is ours.

T tokens, D hidden, V vocabulary, K selected ids.
"""

import math
import operator
from typing import Any

import torch
from torch import Tensor

from .._shapes import Float, Int
from ..backends import check_impl
from ..head import Head
from ..linear_logprob_entropy import linear_logprob_entropy

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LinearScaledCrossEntropy:
    """Per-token NLL, and on request entropy and some tokens' log-probabilities."""

    @staticmethod
    def apply(
        _input: Float[Tensor, "T D"],
        weight: Float[Tensor, "V D"],
        target: Int[Tensor, " T"],
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Int[Tensor, " K"] | None = None,
        *,
        impl: str = "auto",
    ) -> Any:
        """nll = -log softmax(h W^T / temperature)[target]; its entropy in nats.

        All outputs are fp32 and differentiable; rows with `ignore_index` are zero and get no
        gradient. Where Liger rounds the entropy to the inputs' 16 bits, this one stays fp32:
        rounded entropies tie, and a quantile of them selects too many or too few.

        Args:
            _input: hidden states [T, D], fp32, bf16 or fp16.
            weight: [V, D], same dtype.
            target: token ids, int64 [T].
            temperature: a finite number > 0.
            m_tiles_per_cluster: the schedule of Liger's own kernel; it changes no result there, and
                nothing here.
            selected_token_ids: int64 [K], tokens whose log-probabilities are wanted in every row,
                in any order, repeats allowed. Their gradients and those of nll and entropy are
                added in fp32 and rounded once; only K columns of logits are held.
            impl: as in `linear_logprob_entropy`.

        Returns:
            nll [T]; (nll, entropy [T]) with `return_entropy`; the log-probabilities [T, K] come
            last where `selected_token_ids` are given.

        Raises:
            TypeError: an argument of another type or dtype than above.
            ValueError: shapes or devices that do not fit; no D or no V; a value out of range; an
                `impl` that is unknown or cannot run there.
            OverflowError: a number beyond int64 or fp64.

        Liger raises the same, for the same one of several wrong arguments. It only reads the values
        of targets before the temperature. This table has the other differences:

            given                              Liger                  here
            no tensor                          AttributeError         TypeError
            T = 0                              ValueError             empty outputs
            fp64                               fp32 outputs           TypeError
            float8                             NotImplementedError    TypeError
            two dtypes, under autocast         TypeError              cast as by linear
            tensors on meta                    NotImplementedError    RuntimeError
            ignore_index a float               compared as it is      TypeError
            temperature beyond fp32            computed               ValueError
            fp32 or fp16 on a Hopper GPU       TypeError              computed
            target out of range on a GPU       ValueError             NaN in its row
        """
        check_impl(impl)
        _check_options(m_tiles_per_cluster, return_entropy)
        _check_inputs(_input, weight, target)
        _check_temperature(temperature)
        ignored = _as_int64(ignore_index)
        _check_ids(selected_token_ids, weight)
        head = Head(_input, weight, target, temperature=float(temperature), ignore_index=ignored)
        found = linear_logprob_entropy(head, token_ids=selected_token_ids, impl=impl)
        outputs = (-found.logprob, *([found.entropy] if return_entropy else []))
        if found.token_logprobs is not None:
            outputs += (found.token_logprobs,)
        return outputs if len(outputs) > 1 else outputs[0]


def _check_options(m_tiles_per_cluster: object, return_entropy: object) -> None:
    if isinstance(m_tiles_per_cluster, bool) or not isinstance(m_tiles_per_cluster, int):
        raise TypeError(f"m_tiles_per_cluster must be an int; got {m_tiles_per_cluster!r}")
    if m_tiles_per_cluster < 1:
        raise ValueError(f"m_tiles_per_cluster must be >= 1; got {m_tiles_per_cluster}")
    if not isinstance(return_entropy, bool):
        raise TypeError(f"return_entropy must be a bool; got {return_entropy!r}")


def _check_inputs(_input: Tensor, weight: Tensor, target: Tensor) -> None:
    """Shapes, devices and dtypes in Liger's order, as its exceptions are of two types."""
    for name, x in {"_input": _input, "weight": weight, "target": target}.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    shapes = [tuple(x.shape) for x in (_input, weight, target)]
    of_rows, of_words, of_targets = shapes
    if [len(shape) for shape in shapes] != [2, 2, 1] or (of_rows[1:], of_rows[:1]) != (
        of_words[1:],
        of_targets,
    ):
        raise ValueError(
            "_input must be [T, D], weight [V, D] and target [T]; "
            f"got {of_rows}, {of_words} and {of_targets}"
        )
    if 0 in of_words:
        raise ValueError(f"weight must have V > 0 and D > 0; got {of_words}")
    for name, x in {"weight": weight, "target": target}.items():
        if x.device != _input.device:
            raise ValueError(f"{name} must be on {_input.device}, like _input; got {x.device}")
    cast = torch.is_autocast_enabled(_input.device.type)
    if _input.dtype not in _DTYPES or (weight.dtype != _input.dtype and not cast):
        raise TypeError(
            f"_input and weight must have one dtype out of {', '.join(map(str, _DTYPES))}; "
            f"got {_input.dtype} and {weight.dtype}"
        )
    if target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor; got {target.dtype}")


def _check_temperature(temperature: object) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a number; got {temperature!r}")
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature must be finite and > 0; got {temperature}")
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not least <= temperature <= most:
        raise ValueError(
            f"temperature must lie in fp32's [{least:.2g}, {most:.2g}]; got {temperature}"
        )


def _as_int64(ignore_index: Any) -> int:
    try:
        found = operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"ignore_index must be an int; got {ignore_index!r}") from None
    if not -(2**63) <= found < 2**63:
        raise OverflowError(f"ignore_index must fit into int64; got {found}")
    return found


def _check_ids(ids_K: object, weight: Tensor) -> None:
    if ids_K is None:
        return
    if not isinstance(ids_K, Tensor):
        raise TypeError(f"selected_token_ids must be an int64 tensor; got {type(ids_K).__name__}")
    if ids_K.ndim != 1:
        raise ValueError(f"selected_token_ids must be [K]; got {tuple(ids_K.shape)}")
    if ids_K.dtype != torch.int64:
        raise TypeError(f"selected_token_ids must be an int64 tensor; got {ids_K.dtype}")
    if ids_K.device != weight.device:
        raise ValueError(
            f"selected_token_ids must be on {weight.device}, like weight; got {ids_K.device}"
        )
    wrong = (ids_K < 0) | (ids_K >= weight.shape[0])
    if wrong.any():
        raise ValueError(
            f"selected_token_ids must lie in [0, {weight.shape[0]}); got {int(ids_K[wrong][0])}"
        )
