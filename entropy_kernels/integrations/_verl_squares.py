"""verl's sum of squared probabilities (`actor.calculate_sum_pi_squared`) from its fused head.

verl's optimal token baselines weigh tokens by it. Its FSDP engine makes it of all logits, and
refuses it with fused kernels. Here the head has it in the pass that gives log-probs.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ._verl_rollout import Rollout

NAME = "calculate_sum_pi_squared"


class Squares:
    """What the head is asked for by the engine, and what it found, of one micro-batch at a time."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout, self._wanted = rollout, False
        self._found: Tensor | None = None

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics that the head computes in the running forward."""
        return ("sum_p2",) if self._wanted else ()

    def keep(self, sum_p2: Tensor | None) -> None:
        """Takes what the head found, of the shape of its log-probs."""
        self._found = sum_p2

    def replacements(self) -> list[tuple[Any, str, Any]]:
        """Owner, name and wrapper of the engine's methods around its model's forward."""
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as Engine

        return [
            (Engine, "prepare_model_inputs", self._before(Engine.prepare_model_inputs)),
            (Engine, "prepare_model_outputs", self._after(Engine.prepare_model_outputs)),
        ]

    def _before(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def prepare_model_inputs(self_: Any, micro_batch: Any) -> Any:
            self._wanted, self._found = _setting(micro_batch), None
            if self._wanted and self._rollout.known is not None:
                raise ValueError(
                    f"actor.{NAME}=True is of all tokens and the whole vocabulary; got "
                    "sets=True, or a head that runs on the selected tokens"
                )
            return prepare(self_, micro_batch)

        return prepare_model_inputs

    def _after(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def prepare_model_outputs(
            self_: Any, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
        ) -> Any:
            if not _setting(micro_batch):
                return prepare(self_, output, output_args, micro_batch, logits_processor_func)
            found, self._wanted, self._found = self._found, False, None
            if found is None:
                raise ValueError(
                    f"actor.{NAME}=True with use_fused_kernels=True needs a model whose forward "
                    "calls verl's fused head in FSDP's engine"
                )
            plain = _without(micro_batch)
            rest = output_args, plain, logits_processor_func
            outputs = prepare(self_, output, *rest)
            # The engine undoes its packing of log-probs, whatever they are.
            instead = SimpleNamespace(log_probs=found, entropy=output.entropy)
            squares = prepare(self_, instead, *rest)
            return outputs | {"sum_pi_squared": squares["log_probs"]}

        return prepare_model_outputs


def _setting(micro_batch: Any) -> bool:
    """Whether the sum is wanted of a fused head."""
    from verl.utils import tensordict_utils as tu

    names = NAME, "use_fused_kernels"
    return all(tu.get_non_tensor_data(data=micro_batch, key=x, default=False) for x in names)


def _without(micro_batch: Any) -> Any:
    """The micro-batch, and no sum wanted: what verl refuses is not asked for."""
    from verl.utils import tensordict_utils as tu

    plain = micro_batch.copy()
    tu.assign_non_tensor_data(plain, NAME, False)
    return plain
