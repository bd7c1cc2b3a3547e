"""The call convention of Liger-Kernel's fused linear scaled cross entropy, on our head.

What takes `LigerFusedLinearScaledCrossEntropyFunction` takes `LinearScaledCrossEntropy` in its
place: the same arguments, outputs and exceptions as in liger-kernel 0.8.5, which need not be
installed. Backward runs on the rows with gradient alone.

T tokens, D hidden, V vocabulary, K selected ids.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .._shapes import Float, Int
from ..functional import linear_logprob_entropy


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
    ) -> Any:
        """nll = -log softmax(h W^T / temperature)[target]; its entropy in nats.

        All outputs are fp32 and differentiable; rows with `ignore_index` are zero and get no
        gradient. Where Liger rounds the entropy to the inputs' 16 bits, this one stays fp32:
        rounded entropies tie, and a quantile of them selects too many or too few.

        Args:
            _input: hidden states [T, D], fp32, bf16 or fp16.
            weight: [V, D], same dtype.
            target: token ids [T].
            temperature: a finite number > 0.
            m_tiles_per_cluster: the schedule of Liger's own kernel; it changes no result there, and
                nothing here.
            selected_token_ids: int64 [K], tokens whose log-probabilities are wanted in every row.
                In fp32, from K columns of logits: a probability near 1 may exceed it by rounding.

        Returns:
            nll [T]; (nll, entropy [T]) with `return_entropy`; the log-probabilities [T, K] come
            last where `selected_token_ids` are given.

        Raises:
            TypeError, ValueError: as Liger's, for options of another type or out of range, and as
                `linear_logprob_entropy`.
        """
        _check_options(temperature, m_tiles_per_cluster, return_entropy)
        if _input.ndim != 2:
            raise ValueError(f"_input must be [T, D]; got {tuple(_input.shape)}")
        found = linear_logprob_entropy(
            _input, weight, target, temperature=float(temperature), ignore_index=ignore_index
        )
        outputs: tuple[Tensor, ...] = (-found.logprob,)
        if return_entropy:
            outputs += (found.entropy,)
        if selected_token_ids is not None:
            _check_ids(selected_token_ids, weight)
            with torch.autocast(_input.device.type, enabled=False):
                logit_TK = _input.float() @ weight[selected_token_ids].float().T / temperature
            logprob_TK = logit_TK - found.logsumexp.unsqueeze(1)
            ignored_T1 = (target == ignore_index).unsqueeze(1)
            outputs += (logprob_TK.masked_fill(ignored_T1, 0.0),)
        return outputs if len(outputs) > 1 else outputs[0]


def _check_options(
    temperature: object, m_tiles_per_cluster: object, return_entropy: object
) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a number; got {temperature!r}")
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature must be finite and > 0; got {temperature}")
    if isinstance(m_tiles_per_cluster, bool) or not isinstance(m_tiles_per_cluster, int):
        raise TypeError(f"m_tiles_per_cluster must be an int; got {m_tiles_per_cluster!r}")
    if m_tiles_per_cluster < 1:
        raise ValueError(f"m_tiles_per_cluster must be >= 1; got {m_tiles_per_cluster}")
    if not isinstance(return_entropy, bool):
        raise TypeError(f"return_entropy must be a bool; got {return_entropy!r}")


def _check_ids(ids_K: object, weight: Tensor) -> None:
    if not isinstance(ids_K, Tensor) or ids_K.dtype != torch.int64:
        got = ids_K.dtype if isinstance(ids_K, Tensor) else type(ids_K).__name__
        raise TypeError(f"selected_token_ids must be an int64 tensor; got {got}")
    if ids_K.ndim != 1 or ids_K.device != weight.device:
        raise ValueError(
            f"selected_token_ids must be [K] on {weight.device}; "
            f"got {tuple(ids_K.shape)} on {ids_K.device}"
        )
    wrong = (ids_K < 0) | (ids_K >= weight.shape[0])
    if wrong.any():
        raise ValueError(
            f"selected_token_ids must lie in [0, {weight.shape[0]}); got {int(ids_K[wrong][0])}"
        )
