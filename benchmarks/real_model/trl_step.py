"""The training part of a step of TRL's GRPOTrainer, on the model and the optimizer of a bench.

B sequences, P prompt width, L response width.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks import train_step
from benchmarks.sampler_step import FRACTION, Bench
from benchmarks.trl_grpo import grpo_trainer
from entropy_kernels.integrations.trl import patch_trl


class TrlStep:
    """TRL's GRPOTrainer around a bench's model: DAPO's loss on the top 20%."""

    def __init__(self, bench: Bench):
        self.trainer = grpo_trainer(
            bench.policy.model,
            bench.policy.tokenizer,
            len(bench.rollouts),
            beta=0.0,
            top_entropy_quantile=FRACTION,
        )
        self.inputs = _inputs(bench)
        self._tap(bench)

    def _tap(self, bench: Bench) -> None:
        """Tells the bench's parts where the backbone ends, and where its backward begins."""

        def begin(_: Any, inputs: Any, found: Any) -> None:
            if torch.is_grad_enabled():
                bench.parts.begin("head")
                found[0].register_hook(lambda _: bench.parts.begin("backward"))

        bench.policy.model.get_decoder().register_forward_hook(begin)

    def __call__(self, bench: Bench, patched: bool) -> dict[str, float]:
        """Loss and norm of the gradient of a step, with patch_trl() or without."""
        bench.parts.begin("forward")
        model = self.trainer.model.train()
        with patch_trl() if patched else nullcontext():
            loss = self.trainer.compute_loss(model, self.inputs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_step.GRAD_CLIP)
        bench.optimizer.step()
        bench.optimizer.zero_grad()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}


def _inputs(bench: Bench) -> dict[str, Tensor]:
    """The batch as the trainer hands it to its loss: prompts padded on the left."""
    rollouts, pad = bench.rollouts, bench.policy.tokenizer.pad_token_id
    tokens = rollouts.tokens_N.split(rollouts.length_B.tolist())
    lengths = rollouts.prompt_length_B.tolist()
    prompts = [x[:n] for x, n in zip(tokens, lengths, strict=True)]
    responses = [x[n:] for x, n in zip(tokens, lengths, strict=True)]
    mask_BL = _padded([torch.ones_like(x) for x in responses], 0, "right")
    return {
        "prompt_ids": _padded(prompts, pad, "left"),
        "prompt_mask": _padded([torch.ones_like(x) for x in prompts], 0, "left"),
        "completion_ids": _padded(responses, pad, "right"),
        "completion_mask": mask_BL,
        "advantages": bench.advantage_B,
        "num_items_in_batch": mask_BL.sum(),
    }


def _padded(rows: list[Tensor], fill: int, side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(
        rows, batch_first=True, padding_value=fill, padding_side=side
    )
