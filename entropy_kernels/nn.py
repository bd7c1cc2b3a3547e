"""The loss as a module."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._loss_options import LossOptions
from .head import Head
from .high_entropy_policy_loss import check_choice_of_tokens, high_entropy_policy_loss
from .options import KL, Aggregation, Backend, Correction, EntropyBonus, Parallel, Selection


class HighEntropyPolicyLoss(torch.nn.Module):
    """`high_entropy_policy_loss` with its options fixed.

    It takes that function's options once. `forward` takes its tensors, and what else changes from
    call to call. It has no parameters: the head's weight is an argument, so a tied or sharded
    weight stays the model's.
    """

    def __init__(
        self,
        *,
        fraction: float = 0.2,
        selection: Selection = Selection(),
        loss_type: str | Callable[..., Tensor] = "dapo",
        clip_low: float | Tensor | None = None,
        clip_high: float | Tensor | None = None,
        dual_clip: float | None = None,
        denominator: str | float | Tensor = "selected",
        aggregation: Aggregation = Aggregation(),
        kl: KL = KL(),
        correction: Correction = Correction(),
        entropy_bonus: EntropyBonus = EntropyBonus(),
        parallel: Parallel = Parallel(),
        backend: Backend = Backend(),
    ) -> None:
        super().__init__()
        self.fraction, self.selection, self.backend = fraction, selection, backend
        self.loss = LossOptions(
            loss_type=loss_type,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            denominator=denominator,
            aggregation=aggregation,
            kl=kl,
            correction=correction,
            entropy_bonus=entropy_bonus,
            parallel=parallel,
        )
        check_choice_of_tokens(fraction, None, None, selection, backend, self.loss)

    def forward(
        self,
        head: Head,
        old_logprob: Tensor | None,
        advantage: Tensor,
        mask: Tensor,
        *,
        selected: Tensor | None = None,
        threshold: float | Tensor | None = None,
        lengths: Tensor | None = None,
        denominator: str | float | Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        token_weight: Tensor | None = None,
        reference_logprob: Tensor | None = None,
        sampler_logprob: Tensor | None = None,
        main_grad: Tensor | None = None,
        max_active_rows: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics; see `high_entropy_policy_loss`.

        denominator and the parameters below it take the place of the fixed ones, unless None:
        num_sequences and token_weight those of `Aggregation`, reference_logprob that of `KL`,
        sampler_logprob that of `Correction`, main_grad and max_active_rows those of `Backend`.
        """
        loss, aggregation, backend = self.loss, self.loss.aggregation, self.backend
        kl, correction = loss.kl, loss.correction
        if num_sequences is not None:
            aggregation = replace(aggregation, num_sequences=num_sequences)
        if token_weight is not None:
            aggregation = replace(aggregation, token_weight=token_weight)
        if reference_logprob is not None:
            kl = replace(kl, reference_logprob=reference_logprob)
        if sampler_logprob is not None:
            correction = replace(correction, sampler_logprob=sampler_logprob)
        if main_grad is not None:
            backend = replace(backend, main_grad=main_grad)
        if max_active_rows is not None:
            backend = replace(backend, max_active_rows=max_active_rows)
        return high_entropy_policy_loss(
            head,
            old_logprob,
            advantage,
            mask,
            fraction=self.fraction,
            selected=selected,
            threshold=threshold,
            selection=self.selection,
            lengths=lengths,
            loss_type=loss.loss_type,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            dual_clip=loss.dual_clip,
            denominator=loss.denominator if denominator is None else denominator,
            aggregation=aggregation,
            kl=kl,
            correction=correction,
            entropy_bonus=loss.entropy_bonus,
            parallel=loss.parallel,
            backend=backend,
        )

    if TYPE_CHECKING:
        # To type checkers, what torch.nn.Module's returns is Any.
        __call__ = forward

    def extra_repr(self) -> str:
        """The options that are fixed."""
        return f"fraction={self.fraction!r}, selection={self.selection!r}, loss={self.loss!r}"
