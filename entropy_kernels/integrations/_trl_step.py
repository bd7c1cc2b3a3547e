"""TRL's mask of the highest entropies, by the threshold of a whole optimizer step.

B sequences, L their length.
"""

import inspect
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..streaming_threshold import StreamingThreshold
from ..top_entropy_mask import top_entropy_mask
from ._trl_rollout import ENTROPIES, known_of_inputs


def choice_of_step(impl: str, sampler: bool) -> Callable[..., Tensor]:
    """What stands in for GRPOTrainer.get_high_entropy_mask."""

    def get_high_entropy_mask(
        self: Any, entropies: Tensor, mask: Tensor, threshold: float
    ) -> Tensor:
        return high_entropy_mask_of_step(self, entropies, mask, threshold, impl, sampler)

    return get_high_entropy_mask


def high_entropy_mask_of_step(
    self: Any,
    entropies: Tensor,
    mask: Tensor,
    threshold: float,
    impl: str = "auto",
    sampler: bool = False,
) -> Tensor:
    """`GRPOTrainer.get_high_entropy_mask`, by the threshold of the whole optimizer step.

    entropies [B, L], mask [B, L] of any dtype; threshold: the quantile, 1 - fraction. While `self`
    trains, n and k are of all micro-batches of its step. The entropies of the others are the
    current policy's, or with `sampler` those that rollout_func returned. In evaluation, and for any
    other caller, n and k are of the call. Another threshold in the same step scores the other
    micro-batches once more. Collective, as TRL's.

    Raises:
        ValueError: a threshold outside [0, 1]; as `patch_trl`.
    """
    fraction = _fraction(self, float(threshold))
    entropy_BL, valid_BL = entropies.detach().float(), mask.bool()
    group = dist.group.WORLD if dist.is_initialized() else None
    if getattr(self, "is_in_train", False) is not True or not self.model.training:
        return top_entropy_mask(
            entropy_BL, valid_BL, fraction, ties="threshold", group=group, impl=impl
        )
    none: tuple[range, dict[float, StreamingThreshold]] = (range(0), {})
    steps, found = getattr(self, "_threshold_of_step", none)
    if self._step not in steps:
        steps, found = _micro_batches(self), {}
        self._threshold_of_step = steps, found
    if fraction not in found:
        found[fraction] = StreamingThreshold(
            fraction, group=group, device=entropy_BL.device, impl=impl
        )
        found[fraction].update(entropy_BL, valid_BL)
        for step in steps:
            if step != self._step:
                found[fraction].update(*_score(self, step, sampler))
    return found[fraction].mask(entropy_BL, valid_BL)


def _fraction(trainer: Any, threshold: float) -> float:
    """1 - threshold: the trainer's own fraction where TRL made the threshold of it, rounding."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a quantile in [0, 1]; got {threshold}")
    own = getattr(trainer, "top_entropy_quantile", None)
    if isinstance(own, int | float) and 0 < own <= 1 and 1 - own == threshold:
        return own
    # The quantile 1 leaves the highest entropy.
    return max(float(1 - Decimal(str(threshold))), 1e-12)


def _micro_batches(trainer: Any) -> range:
    """Numbers of the micro-batches of the optimizer step that begins, all of them generated."""
    count = trainer.current_gradient_accumulation_steps
    generated = trainer.args.steps_per_generation * trainer.num_iterations
    used = trainer._step % generated
    if used + count > generated:
        raise ValueError(
            f'scope="step" needs the {count} micro-batches of an optimizer step generated before '
            f"it begins, but {generated - used} are: steps_per_generation * num_iterations = "
            f"{generated}, of which {used} are done. Make it a multiple of "
            f"gradient_accumulation_steps = {trainer.args.gradient_accumulation_steps}"
        )
    return range(trainer._step, trainer._step + count)


@torch.no_grad()
def _score(trainer: Any, step: int, sampler: bool) -> tuple[Tensor, Tensor]:
    """Entropies and mask [B, L] of a micro-batch, by the current policy or the sampler."""
    inputs = trainer._buffered_inputs[step % trainer.args.steps_per_generation]
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    if sampler:
        return inputs[ENTROPIES], mask.bool()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    takes = inspect.signature(trainer._get_per_token_logps_and_entropies).parameters
    of_images = {name: value for name, value in inputs.items() if name in takes}
    with known_of_inputs(trainer, inputs):
        _, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, mask.shape[1], compute_entropy=True, **of_images
        )
    return entropies, mask.bool()
